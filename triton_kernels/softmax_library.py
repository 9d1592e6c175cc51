"""``softmax_library``: logits, or hidden units and a head, to ``px_scale`` and ``px_rate``.

From logits each row (a cell, or a sample of one) takes one of three routes, by shape alone:

- *whole*: the row fits the registers of one program, which reads it once.
- *long*: one program walks the row twice, the second time backwards, so that what it read last
  still lies in the cache.
- *few*: too few long rows to fill a GPU. Programs share a row: each finds the maximum and the sum
  of exponentials of a tile, these are combined, and a second pass writes.

From hidden units the logits are a product inside the kernels, taken twice, once for the maxima and
sums and once to write, so that nothing but the two outputs is stored. Where no tensor cores take
that product, or the hidden layer is too wide to sit in one tile, the vendor's library writes it
into ``px_rate``, and one of the three routes replaces it there: see :func:`is_fused`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    cdiv,
    dot_of_operands,
    exp,
    expm1,
    launch,
    next_power_of_2,
    operand,
    product_precision,
    softplus,
)

#: Most genes of a row that one program holds in its registers.
MAX_WHOLE = 16384
#: Fewer long rows than this leave much of a large GPU idle if each has one program.
FEW_ROWS = 512
#: Widest hidden layer that the fused route holds in one tile.
MAX_FUSED_HIDDEN = 128
#: Programs that fill a large GPU twice.
_PROGRAMS = 264
#: Tile of a long row that one program walks: its loads of the next tiles are under way meanwhile.
_LONG = {"TILE": 8192, "STAGES": 3, "num_warps": 32}
#: The same for the backward pass, which reads three tensors.
_LONG_BACKWARD = {"TILE": 4096, "STAGES": 3, "num_warps": 32}
#: Widest tile of a row that programs share.
_FEW_TILE = 4096
#: Tile of the product of hidden units and weights.
_HEAD = {"ROWS": 128, "GENES": 32, "num_warps": 8, "num_stages": 2}


@triton.jit
def _library_size(library, rows, mask, stride):
    """Exponential of log library sizes, of which an error would be in every output."""
    return exp(tl.load(library + rows.to(tl.int64) * stride, mask=mask, other=0.0))


@triton.jit
def _genes_of_tile(row, n_genes, tile, TILE: tl.constexpr):
    """Genes of a tile of a row, and which of them exist: tiles begin where cache lines do."""
    before = (row.to(tl.int64) * n_genes % 32).to(tl.int32)
    genes = tile * TILE - before + tl.arange(0, TILE)
    return genes, (genes >= 0) & (genes < n_genes)


@triton.jit
def _whole_rows(logits, library, scale, rate, n_genes, library_stride, GENES: tl.constexpr):
    row = tl.program_id(0)
    genes = tl.arange(0, GENES)
    inside = genes < n_genes
    first = row.to(tl.int64) * n_genes
    a = tl.load(logits + first + genes, mask=inside, other=float("-inf"))
    size = _library_size(library, row, row >= 0, library_stride)
    e = tl.exp(a - tl.max(a))
    value = e * (1.0 / tl.sum(e))
    tl.store(scale + first + genes, value, mask=inside)
    tl.store(rate + first + genes, size * value, mask=inside)


@triton.jit
def _long_rows(
    logits,
    library,
    scale,
    rate,
    n_genes,
    library_stride,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0)
    first = row.to(tl.int64) * n_genes
    size = _library_size(library, row, row >= 0, library_stride)
    n_tiles = tl.cdiv(n_genes + 31, TILE)
    maximum = tl.cast(-3e38, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for tile in tl.range(0, n_tiles, num_stages=STAGES):
        genes, inside = _genes_of_tile(row, n_genes, tile, TILE)
        a = tl.load(
            logits + first + genes, mask=inside, other=float("-inf"), eviction_policy="evict_last"
        )
        highest = tl.maximum(maximum, tl.max(a))
        total = total * tl.exp(maximum - highest) + tl.exp(a - highest)
        maximum = highest
    inverse = 1.0 / tl.sum(total)
    for step in tl.range(0, n_tiles, num_stages=STAGES):
        genes, inside = _genes_of_tile(row, n_genes, n_tiles - 1 - step, TILE)
        a = tl.load(
            logits + first + genes, mask=inside, other=float("-inf"), eviction_policy="evict_first"
        )
        value = tl.exp(a - maximum) * inverse
        tl.store(scale + first + genes, value, mask=inside, eviction_policy="evict_first")
        tl.store(rate + first + genes, size * value, mask=inside, eviction_policy="evict_first")


@triton.jit
def _tile_statistics(logits, maxima, totals, n_rows, n_genes, TILE: tl.constexpr):
    """Maximum and sum of exponentials of a tile of a row."""
    row, tile = tl.program_id(0), tl.program_id(1)
    genes, inside = _genes_of_tile(row, n_genes, tile, TILE)
    first = row.to(tl.int64) * n_genes
    a = tl.load(logits + first + genes, mask=inside, other=float("-inf"))
    maximum = tl.maximum(tl.max(a), -3e38)
    offset = tile.to(tl.int64) * n_rows + row
    tl.store(maxima + offset, maximum)
    tl.store(totals + offset, tl.sum(tl.exp(a - maximum)))


@triton.jit
def _combine(
    maxima, totals, maximum, inverse, n_rows, n_parts, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """Maximum of each row, and one over its sum of exponentials, from those of its parts."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    parts = tl.arange(0, PARTS)
    row_mask = rows < n_rows
    inside = (parts < n_parts)[:, None] & row_mask[None, :]
    offsets = parts.to(tl.int64)[:, None] * n_rows + rows[None, :]
    of_parts = tl.load(maxima + offsets, mask=inside, other=-3e38)
    highest = tl.max(of_parts, 0)
    total = tl.load(totals + offsets, mask=inside, other=0.0) * tl.exp(of_parts - highest[None, :])
    tl.store(maximum + rows, highest, mask=row_mask)
    inverse_total = 1.0 / tl.where(row_mask, tl.sum(total, 0), 1.0)
    tl.store(inverse + rows, inverse_total, mask=row_mask)


@triton.jit
def _scale(a, maximum, inverse):
    """Scale from logits; without the row's ``maximum`` the activation is softplus."""
    if maximum is not None:
        value = tl.exp(a - maximum) * inverse
    else:
        value = softplus(a)
    return value


@triton.jit
def _tiles(
    logits,
    library,
    maximum,
    inverse,
    scale,
    rate,
    n_genes,
    library_stride,
    TILE: tl.constexpr,
):
    """Write a tile of a row, from its logits and its row's statistics."""
    row = tl.program_id(0)
    if maximum is not None:
        maximum = tl.load(maximum + row)
        inverse = tl.load(inverse + row)
    # backwards: what was read last may still lie in the cache
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    genes, inside = _genes_of_tile(row, n_genes, tile, TILE)
    first = row.to(tl.int64) * n_genes
    size = _library_size(library, row, row >= 0, library_stride)
    a = tl.load(logits + first + genes, mask=inside, other=float("-inf"))
    value = _scale(a, maximum, inverse)
    tl.store(scale + first + genes, value, mask=inside)
    tl.store(rate + first + genes, size * value, mask=inside)


@triton.jit
def _rows_of_hidden(
    hidden,
    n_rows,
    n_hidden,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Return some rows, which of them exist, and their hidden units as operands."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_rows
    units = tl.arange(0, HIDDEN)
    inside = row_mask[:, None] & (units < n_hidden)[None, :]
    offsets = rows.to(tl.int64)[:, None] * n_hidden + units[None, :]
    hidden_tile = tl.load(hidden + offsets, mask=inside, other=0.0)
    return rows, row_mask, operand(hidden_tile, PRECISION)


@triton.jit
def _logits(
    hidden_tile,
    weight,
    bias,
    start,
    n_genes,
    n_hidden,
    HIDDEN: tl.constexpr,
    GENES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of a tile, and which of its genes exist: hidden units of its rows times weights."""
    genes = tl.arange(0, GENES)
    gene_mask = start + genes < n_genes
    units = tl.arange(0, HIDDEN)
    inside = (units < n_hidden)[:, None] & gene_mask[None, :]
    offsets = genes[None, :] * n_hidden + units[:, None]
    first = tl.cast(start, tl.int64) * n_hidden
    weight_tile = tl.load(weight + first + offsets, mask=inside, other=0.0)
    zeros = tl.zeros((hidden_tile.shape[0], GENES), tl.float32)
    a = dot_of_operands(hidden_tile, operand(weight_tile, PRECISION), zeros, PRECISION)
    if bias is not None:
        a += tl.load(bias + start + genes, mask=gene_mask, other=0.0)[None, :]
    return a, gene_mask


@triton.jit
def _head_statistics(
    hidden,
    weight,
    bias,
    maxima,
    totals,
    n_rows,
    n_genes,
    n_hidden,
    genes_a_split,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    GENES: tl.constexpr,
):
    """Maximum and sum of exponentials of some rows over one split of the genes."""
    rows, row_mask, hidden_tile = _rows_of_hidden(
        hidden, n_rows, n_hidden, PRECISION, ROWS, HIDDEN
    )
    maximum = tl.full((ROWS,), -3e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    first = tl.program_id(1) * genes_a_split
    for start in range(first, tl.minimum(first + genes_a_split, n_genes), GENES):
        a, gene_mask = _logits(
            hidden_tile, weight, bias, start, n_genes, n_hidden, HIDDEN, GENES, PRECISION
        )
        a = tl.where(gene_mask[None, :], a, float("-inf"))
        highest = tl.maximum(maximum, tl.max(a, 1))
        total = total * tl.exp(maximum - highest) + tl.sum(tl.exp(a - highest[:, None]), 1)
        maximum = highest
    offsets = tl.program_id(1).to(tl.int64) * n_rows + rows
    tl.store(maxima + offsets, maximum, mask=row_mask)
    tl.store(totals + offsets, total, mask=row_mask)


@triton.jit
def _head(
    hidden,
    weight,
    bias,
    library,
    maximum,
    inverse,
    scale,
    rate,
    n_rows,
    n_genes,
    n_hidden,
    genes_a_split,
    library_stride,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    GENES: tl.constexpr,
):
    """Write some rows over one split of the genes, from the rows' statistics."""
    rows, row_mask, hidden_tile = _rows_of_hidden(
        hidden, n_rows, n_hidden, PRECISION, ROWS, HIDDEN
    )
    size = _library_size(library, rows, row_mask, library_stride)[:, None]
    if maximum is not None:
        maximum = tl.load(maximum + rows, mask=row_mask, other=0.0)[:, None]
        inverse = tl.load(inverse + rows, mask=row_mask, other=0.0)[:, None]
    scale += (tl.program_id(0) * ROWS).to(tl.int64) * n_genes
    rate += (tl.program_id(0) * ROWS).to(tl.int64) * n_genes
    offsets = tl.arange(0, ROWS)[:, None] * n_genes + tl.arange(0, GENES)[None, :]
    first = tl.program_id(1) * genes_a_split
    for start in range(first, tl.minimum(first + genes_a_split, n_genes), GENES):
        a, gene_mask = _logits(
            hidden_tile, weight, bias, start, n_genes, n_hidden, HIDDEN, GENES, PRECISION
        )
        value = _scale(a, maximum, inverse)
        inside = row_mask[:, None] & gene_mask[None, :]
        tl.store(scale + start + offsets, value, mask=inside)
        tl.store(rate + start + offsets, size * value, mask=inside)


@triton.jit
def _gradients(
    grad_scale,
    grad_rate,
    row,
    genes,
    inside,
    size,
    scale_row,
    scale_gene,
    rate_row,
    rate_gene,
):
    """Upstream gradients of a tile of a row: by scale in all, and by rate (zero without one)."""
    upstream = tl.zeros(genes.shape, tl.float32)
    of_rate = upstream
    if grad_rate is not None:
        offsets = row.to(tl.int64) * rate_row + genes * rate_gene
        of_rate = tl.load(grad_rate + offsets, mask=inside, other=0.0)
        upstream = size * of_rate
    if grad_scale is not None:
        offsets = row.to(tl.int64) * scale_row + genes * scale_gene
        upstream += tl.load(grad_scale + offsets, mask=inside, other=0.0)
    return upstream, of_rate


@triton.jit
def _gradient_of_logits(upstream, scale, total, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        gradient = scale * (upstream - total)
    else:
        gradient = upstream * -expm1(-scale)  # sigmoid(a) = 1 - exp(-softplus(a))
    return gradient


@triton.jit
def _whole_rows_backward(
    grad_scale,
    grad_rate,
    scale,
    library,
    d_logits,
    d_library,
    n_genes,
    library_stride,
    scale_row,
    scale_gene,
    rate_row,
    rate_gene,
    SOFTMAX: tl.constexpr,
    GENES: tl.constexpr,
):
    row = tl.program_id(0)
    genes = tl.arange(0, GENES)
    inside = genes < n_genes
    first = row.to(tl.int64) * n_genes
    size = _library_size(library, row, row >= 0, library_stride)
    upstream, of_rate = _gradients(
        grad_scale, grad_rate, row, genes, inside, size, scale_row, scale_gene, rate_row, rate_gene
    )
    value = tl.load(scale + first + genes, mask=inside, other=0.0)
    if d_library is not None:
        tl.store(d_library + row, size * tl.sum(of_rate * value))
    if d_logits is not None:
        total = tl.sum(upstream * value)
        if SOFTMAX:  # what the scales' sum and this one lack to be exact, all genes would share
            total += tl.sum((upstream - total) * value)
        gradient = _gradient_of_logits(upstream, value, total, SOFTMAX)
        tl.store(d_logits + first + genes, gradient, mask=inside)


@triton.jit
def _long_rows_backward(
    grad_scale,
    grad_rate,
    scale,
    library,
    d_logits,
    d_library,
    n_genes,
    library_stride,
    scale_row,
    scale_gene,
    rate_row,
    rate_gene,
    SOFTMAX: tl.constexpr,
    SUMS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0)
    first = row.to(tl.int64) * n_genes
    size = _library_size(library, row, row >= 0, library_stride)
    n_tiles = tl.cdiv(n_genes + 31, TILE)
    total = tl.zeros((TILE,), tl.float32)
    total_of_rate = tl.zeros((TILE,), tl.float32)
    if SUMS:
        for tile in tl.range(0, n_tiles, num_stages=STAGES):
            genes, inside = _genes_of_tile(row, n_genes, tile, TILE)
            upstream, of_rate = _gradients(
                grad_scale, grad_rate, row, genes, inside, size,
                scale_row, scale_gene, rate_row, rate_gene,
            )  # fmt: skip
            value = tl.load(scale + first + genes, mask=inside, other=0.0)
            total += upstream * value
            total_of_rate += of_rate * value
    if d_library is not None:
        tl.store(d_library + row, size * tl.sum(total_of_rate))
    if d_logits is not None:
        sum_of_row = tl.sum(total)
        for step in tl.range(0, n_tiles, num_stages=STAGES):
            genes, inside = _genes_of_tile(row, n_genes, n_tiles - 1 - step, TILE)
            upstream, _ = _gradients(
                grad_scale, grad_rate, row, genes, inside, size,
                scale_row, scale_gene, rate_row, rate_gene,
            )  # fmt: skip
            value = tl.load(scale + first + genes, mask=inside, other=0.0)
            gradient = _gradient_of_logits(upstream, value, sum_of_row, SOFTMAX)
            tl.store(d_logits + first + genes, gradient, mask=inside)


@triton.jit
def _tile_sums(
    grad_scale,
    grad_rate,
    scale,
    library,
    totals,
    totals_of_rate,
    n_rows,
    n_genes,
    library_stride,
    scale_row,
    scale_gene,
    rate_row,
    rate_gene,
    TILE: tl.constexpr,
):
    """Sum upstream gradient times scale over a tile of a row, in all and by rate."""
    row, tile = tl.program_id(0), tl.program_id(1)
    genes, inside = _genes_of_tile(row, n_genes, tile, TILE)
    size = _library_size(library, row, row >= 0, library_stride)
    upstream, of_rate = _gradients(
        grad_scale, grad_rate, row, genes, inside, size, scale_row, scale_gene, rate_row, rate_gene
    )
    first = row.to(tl.int64) * n_genes
    value = tl.load(scale + first + genes, mask=inside, other=0.0)
    offset = tile.to(tl.int64) * n_rows + row
    tl.store(totals + offset, tl.sum(upstream * value))
    tl.store(totals_of_rate + offset, size * tl.sum(of_rate * value))


@triton.jit
def _tiles_backward(
    grad_scale,
    grad_rate,
    scale,
    library,
    totals,
    d_logits,
    n_genes,
    library_stride,
    scale_row,
    scale_gene,
    rate_row,
    rate_gene,
    SOFTMAX: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    genes, inside = _genes_of_tile(row, n_genes, tile, TILE)
    size = _library_size(library, row, row >= 0, library_stride)
    upstream, _ = _gradients(
        grad_scale, grad_rate, row, genes, inside, size, scale_row, scale_gene, rate_row, rate_gene
    )
    first = row.to(tl.int64) * n_genes
    value = tl.load(scale + first + genes, mask=inside, other=0.0)
    total = 0.0
    if SOFTMAX:
        total = tl.load(totals + row)
    gradient = _gradient_of_logits(upstream, value, total, SOFTMAX)
    tl.store(d_logits + first + genes, gradient, mask=inside)


def is_fused(n_hidden: int) -> bool:
    """Whether the kernels take the product of hidden units and weights themselves.

    They take it twice. That is cheaper than to write and read logits where tensor cores take it and
    the hidden units fit one tile; in strict float32, or for a wide hidden layer, it is not.
    """
    return n_hidden <= MAX_FUSED_HIDDEN and product_precision() != "ieee"


def _route(n_rows: int, n_genes: int) -> str:
    if n_genes <= MAX_WHOLE:
        return "whole"
    return "few" if n_rows < FEW_ROWS else "long"


def _tile(n_genes: int) -> tuple[int, int]:
    """Width of a tile that holds so many genes, and its number of warps: 16 genes a thread."""
    tile = max(32, next_power_of_2(n_genes))
    return tile, max(1, tile // 512)


def _whole(n_genes: int) -> dict[str, int]:
    """Options of the kernels whose programs hold a row."""
    tile, num_warps = _tile(n_genes)
    return {"GENES": tile, "num_warps": num_warps}


def _few(n_rows: int, n_genes: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and options of the kernels whose programs share rows."""
    tile, num_warps = _tile(min(n_genes, _FEW_TILE))
    # a row may begin within a cache line of 32 numbers
    grid = (n_rows, cdiv(n_genes + 31, tile))
    return grid, {"TILE": tile, "num_warps": num_warps}


def _by_row(library: Tensor, shape: torch.Size) -> Tensor:
    """Log library sizes, one a row; of stride zero if there is one for all."""
    return library.expand(*shape[:-1], 1).reshape(shape[:-1].numel())


def _combined(partial: Tensor) -> Tensor:
    """Maximum, and one over the sum of exponentials, by row, from those of its parts."""
    _, n_parts, n_rows = partial.shape
    statistics = partial.new_empty(2, n_rows)
    parts = next_power_of_2(n_parts)
    rows = max(1, min(32, 2048 // parts))
    launch(
        _combine,
        (cdiv(n_rows, rows),),
        *partial,
        *statistics,
        n_rows,
        n_parts,
        ROWS=rows,
        PARTS=parts,
        num_warps=4,
    )
    return statistics


def _from_logits(
    logits: Tensor, library: Tensor, scale: Tensor, rate: Tensor, softmax: bool
) -> None:
    """Write the outputs; ``logits`` may be ``rate`` itself."""
    n_rows, n_genes = scale.shape[:-1].numel(), scale.shape[-1]
    shared = (scale, rate, n_genes, library.stride(0))
    route = _route(n_rows, n_genes)
    if softmax and route == "whole":
        launch(_whole_rows, (n_rows,), logits, library, *shared, **_whole(n_genes))
    elif softmax and route == "long":
        launch(_long_rows, (n_rows,), logits, library, *shared, **_LONG)
    else:
        grid, options = _few(n_rows, n_genes)
        statistics: Any = (None, None)
        if softmax:
            partial = logits.new_empty(2, grid[1], n_rows)
            launch(_tile_statistics, grid, logits, *partial, n_rows, n_genes, **options)
            statistics = _combined(partial)
        launch(_tiles, grid, logits, library, *statistics, *shared, **options)


def _from_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    library: Tensor,
    scale: Tensor,
    rate: Tensor,
    softmax: bool,
) -> None:
    """Write the outputs, the logits never stored."""
    n_rows, n_hidden = hidden.shape
    n_genes = weight.shape[0]
    row_tiles = cdiv(n_rows, _HEAD["ROWS"])
    gene_tiles = cdiv(n_genes, _HEAD["GENES"])
    splits = max(1, min(gene_tiles, _PROGRAMS // max(1, row_tiles)))
    genes_a_split = cdiv(gene_tiles, splits) * _HEAD["GENES"]
    grid = (row_tiles, cdiv(n_genes, genes_a_split))
    shape = (n_rows, n_genes, n_hidden, genes_a_split)
    options = {
        "HIDDEN": max(16, next_power_of_2(n_hidden)),
        "PRECISION": product_precision(),
        **_HEAD,
    }
    statistics: Any = (None, None)
    if softmax:
        partial = hidden.new_empty(2, grid[1], n_rows)
        launch(_head_statistics, grid, hidden, weight, bias, *partial, *shape, **options)
        statistics = _combined(partial)
    launch(
        _head,
        grid,
        hidden,
        weight,
        bias,
        library,
        *statistics,
        scale,
        rate,
        *shape,
        library.stride(0),
        **options,
    )


def forward(
    inputs: Tensor,
    library: Tensor,
    scale_activation: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what ``decoder_fast.reference.softmax_library.forward`` computes, in float32."""
    softmax = scale_activation == "softmax"
    by_row = _by_row(library, inputs.shape)
    if weight is None:
        logits = inputs.contiguous()
        scale, rate = torch.empty_like(logits), torch.empty_like(logits)
        _from_logits(logits, by_row, scale, rate, softmax)
        return scale, rate
    n_genes, n_hidden = weight.shape
    shape = (*inputs.shape[:-1], n_genes)
    scale, rate = inputs.new_empty(shape), inputs.new_empty(shape)
    if scale.numel() == 0:
        return scale, rate
    hidden = inputs.reshape(by_row.shape[0], n_hidden).contiguous()
    if is_fused(n_hidden):
        bias = None if bias is None else bias.contiguous()
        _from_hidden(hidden, weight.contiguous(), bias, by_row, scale, rate, softmax)
        return scale, rate
    logits = rate.view(by_row.shape[0], n_genes)
    if bias is None:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        torch.addmm(bias, hidden, weight.t(), out=logits)
    _from_logits(rate, by_row, scale, rate, softmax)
    return scale, rate


def _strided_rows(grad: Tensor | None, n_rows: int, n_genes: int) -> tuple[Any, tuple[int, ...]]:
    """Rows of an upstream gradient, and their strides: expanded ones stay as they are."""
    if grad is None:
        return None, (0, 0)
    grad = grad.reshape(n_rows, n_genes)
    if grad.stride(1) not in (0, 1):
        grad = grad.contiguous()
    return grad, grad.stride()


def backward(
    grad_scale: Tensor | None,
    grad_rate: Tensor | None,
    scale: Tensor,
    library: Tensor,
    scale_activation: str,
    logits_wanted: bool,
    library_wanted: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute what ``decoder_fast.reference.softmax_library.backward`` computes."""
    scale = scale.contiguous()
    n_rows, n_genes = scale.shape[:-1].numel(), scale.shape[-1]
    softmax = scale_activation == "softmax"
    by_row = _by_row(library, scale.shape)
    grad_scale, strides_of_scale = _strided_rows(grad_scale, n_rows, n_genes)
    grad_rate, strides_of_rate = _strided_rows(grad_rate, n_rows, n_genes)
    d_logits = d_library = None
    if logits_wanted:
        d_logits = torch.empty_like(scale)
    if library_wanted and grad_rate is not None:
        d_library = library.new_empty(n_rows)
    read = (grad_scale, grad_rate, scale, by_row)
    shared = (n_genes, by_row.stride(0), *strides_of_scale, *strides_of_rate)
    route = _route(n_rows, n_genes)
    sums = d_library is not None or (softmax and logits_wanted)
    if d_logits is None and d_library is None:
        pass
    elif route == "whole":
        launch(
            _whole_rows_backward,
            (n_rows,),
            *read,
            d_logits,
            d_library,
            *shared,
            SOFTMAX=softmax,
            **_whole(n_genes),
        )
    elif route == "long":
        launch(
            _long_rows_backward,
            (n_rows,),
            *read,
            d_logits,
            d_library,
            *shared,
            SOFTMAX=softmax,
            SUMS=sums,
            **_LONG_BACKWARD,
        )
    else:
        grid, options = _few(n_rows, n_genes)
        total = None
        if sums:
            partial = scale.new_empty(2, grid[1], n_rows)
            launch(_tile_sums, grid, *read, *partial, n_rows, *shared, **options)
            total, total_of_rate = partial.sum(1)
            if d_library is not None:
                d_library = total_of_rate
        if d_logits is not None:
            launch(
                _tiles_backward, grid, *read, total, d_logits, *shared, SOFTMAX=softmax, **options
            )
    if not library_wanted:
        return d_logits, None
    if d_library is None:
        return d_logits, torch.zeros_like(library)
    return d_logits, d_library.view(*scale.shape[:-1], 1).sum_to_size(library.shape)
