"""Hidden units, heads, library and counts to one negative log-likelihood a cell, in plain PyTorch.

The heads' products are taken gene tile by gene tile, so nothing of size cells x genes outlives a
tile. The forward pass walks the genes twice (log-sum-exp, then the likelihood) and keeps two
numbers a cell; the backward pass recomputes each tile and turns it at once into gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .counts import Counts
from .log_prob import Terms, at_nonzero, at_zero, wide_dtype

#: Elements of a tile (cells x genes): a few temporaries of it stay in the cache of a CPU core.
TILE = 1 << 18
#: Elsewhere a tile is large: each takes hundreds of launches, and waits for the device.
_LARGE_TILE = 1 << 24
_MAX_ROWS = 2048


@dataclass
class Inputs:
    """What the likelihood is computed from; ``S`` Monte-Carlo samples of ``N`` cells.

    ``hidden`` (S, N, H), ``library`` (S, N), weights (G, H), biases (G,), ``px_r`` (G,) or (G, n)
    with ``px_r_index`` (N,). ``dropout_*`` only for ``"zinb"``; ``r_*`` only for ``'gene-cell'``
    dispersion, ``px_r`` for the others, neither for ``"poisson"``.
    """

    hidden: Tensor
    library: Tensor
    scale_weight: Tensor
    scale_bias: Tensor | None
    dropout_weight: Tensor | None
    dropout_bias: Tensor | None
    r_weight: Tensor | None
    r_bias: Tensor | None
    px_r: Tensor | None
    px_r_index: Tensor | None
    counts: Counts
    likelihood: str
    scale_activation: str

    def cell_blocks(self) -> Iterator[slice]:
        """Blocks of cells with at most ``_MAX_ROWS`` rows (cells x samples) each."""
        n_samples, n_cells, _ = self.hidden.shape
        step = max(1, _MAX_ROWS // max(1, n_samples))
        for n0 in range(0, n_cells, step):
            yield slice(n0, min(n0 + step, n_cells))

    def gene_tiles(self, cells: slice) -> Iterator[slice]:
        """Tiles of genes for a block of cells."""
        rows = self.hidden.shape[0] * (cells.stop - cells.start)
        n_genes = self.scale_weight.shape[0]
        tile = TILE if self.hidden.device.type == "cpu" else _LARGE_TILE
        step = max(16, tile // max(1, rows))
        for g0 in range(0, n_genes, step):
            yield slice(g0, min(g0 + step, n_genes))


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, genes: slice) -> Tensor:
    return F.linear(hidden, weight[genes], None if bias is None else bias[genes])


def _shift(inputs: Inputs, hidden: Tensor, cells: slice) -> Tensor:
    """Compute what log(mu) of a block has and its log(scale), not normalised, has not: (S, n, 1).

    The library, under softmax less the logits' log-sum-exp. Wide, because it shifts every mean of a
    cell alike: its roundings, one a tile, would add up.
    """
    wide = wide_dtype(hidden.device)
    library = inputs.library[:, cells, None].to(wide)
    if inputs.scale_activation != "softmax":
        return library
    lse = torch.full_like(library, -torch.inf)
    for genes in inputs.gene_tiles(cells):
        logits = _head(hidden, inputs.scale_weight, inputs.scale_bias, genes)
        lse = torch.logaddexp(lse, logits.logsumexp(-1, keepdim=True).to(wide))
    return library - lse


@dataclass
class _Tile:
    """One tile: its inputs, evaluated. All of shape (S, n, T), or broadcastable to it."""

    logits: Tensor
    mu: Tensor
    theta: Tensor | None
    d: Tensor | None
    row: Tensor  # of the non-zeros, within the block of cells
    col: Tensor  # of the non-zeros, within the tile
    nonzero: Terms
    zero: Terms

    def put(self, dense: Tensor, at_nonzeros: Tensor) -> Tensor:
        """Overwrite the elements of ``dense`` whose count is not zero."""
        dense[:, self.row, self.col] = at_nonzeros.to(dense.dtype)
        return dense


def _evaluate(
    inputs: Inputs, hidden: Tensor, shift: Tensor, cells: slice, genes: slice, **wanted: bool
) -> _Tile:
    logits = _head(hidden, inputs.scale_weight, inputs.scale_bias, genes)
    softmax = inputs.scale_activation == "softmax"
    narrow = shift.to(logits.dtype)
    mu = (logits + narrow).exp_() if softmax else narrow.exp() * F.softplus(logits)
    theta = d = None
    if inputs.r_weight is not None:
        theta = _head(hidden, inputs.r_weight, inputs.r_bias, genes).exp()
    elif inputs.px_r is not None:
        px_r = inputs.px_r[genes]
        theta = px_r.exp() if px_r.dim() == 1 else px_r.t()[inputs.px_r_index[cells]].exp()  # type: ignore[index]
    if inputs.dropout_weight is not None:
        d = _head(hidden, inputs.dropout_weight, inputs.dropout_bias, genes)

    zero = at_zero(inputs.likelihood, mu, theta, d, **wanted)
    row, col, x = inputs.counts.block(cells.start, cells.stop, genes.start, genes.stop)
    wide = wide_dtype(hidden.device)

    def pick(dense: Tensor | None) -> Tensor | None:
        if dense is None:
            return None
        if dense.dim() == 1:
            return dense[col].to(wide)
        return dense[..., row, col].to(wide)

    logit = logits[:, row, col].to(wide)
    if not softmax:
        # log(softplus(a)) is a itself where softplus underflows
        logit = torch.where(logit < -30, logit, torch.log(F.softplus(logit)))
    log_mu = logit + shift.to(wide)[:, row, 0]
    nonzero = at_nonzero(inputs.likelihood, x.to(wide), log_mu, pick(theta), pick(d), **wanted)
    return _Tile(logits, mu, theta, d, row, col, nonzero, zero)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the negative log-likelihood of each cell.

    Returns
    -------
    tuple of Tensor
        ``nll``, and what the backward pass needs: ``shift`` (the library, under softmax less the
        log-sum-exp of the logits) and ``usum`` (sum over genes of the derivative with respect to
        log(mu)); each (S, N).
    """
    nll = inputs.hidden.new_empty(inputs.hidden.shape[:2])
    all_shifts = torch.empty_like(nll)
    usum = torch.empty_like(nll)
    wide = wide_dtype(nll.device)
    for cells in inputs.cell_blocks():
        hidden = inputs.hidden[:, cells]
        shift = _shift(inputs, hidden, cells)
        total = torch.zeros(shift.shape[:2], dtype=wide, device=shift.device)
        u_total = torch.zeros_like(total)
        for genes in inputs.gene_tiles(cells):
            tile = _evaluate(inputs, hidden, shift, cells, genes, gradients=False)
            assert tile.zero.log_prob is not None and tile.nonzero.log_prob is not None
            assert tile.zero.d_log_mu is not None and tile.nonzero.d_log_mu is not None
            total += tile.put(tile.zero.log_prob, tile.nonzero.log_prob).sum(-1)
            u_total += tile.put(tile.zero.d_log_mu, tile.nonzero.d_log_mu).sum(-1)
        nll[:, cells] = -total.to(nll.dtype)
        usum[:, cells] = u_total.to(nll.dtype)
        all_shifts[:, cells] = shift[..., 0]
    return nll, all_shifts, usum


def backward(
    inputs: Inputs, grad: Tensor, shift: Tensor, usum: Tensor, wanted: frozenset[str]
) -> dict[str, Tensor]:
    """Compute gradients.

    Parameters
    ----------
    inputs
        As in :func:`forward`.
    grad
        (S, N) gradient with respect to each cell's negative log-likelihood.
    shift, usum
        As returned by :func:`forward`.
    wanted
        Names of the fields of ``inputs`` to differentiate; products of others are not computed.

    Returns
    -------
    dict
        Gradient by field name.
    """
    out = {
        name: torch.zeros_like(getattr(inputs, name))
        for name in wanted
        if name != "library" and getattr(inputs, name) is not None
    }
    if "library" in wanted:
        out["library"] = -grad * usum
    theta_wanted = bool({"r_weight", "r_bias", "px_r"} & out.keys())
    logits_wanted = bool({"hidden", "scale_weight", "scale_bias"} & out.keys())
    r_wanted = bool({"hidden", "r_weight", "r_bias", "px_r"} & out.keys())
    d_wanted = bool({"hidden", "dropout_weight", "dropout_bias"} & out.keys())
    if not (theta_wanted or logits_wanted or r_wanted or d_wanted):
        return out
    softmax = inputs.scale_activation == "softmax"

    for cells in inputs.cell_blocks():
        hidden = inputs.hidden[:, cells]
        rows = hidden.flatten(0, 1)
        block_shift = shift[:, cells, None]
        block_usum = usum[:, cells, None]
        weight = -grad[:, cells, None]
        d_hidden = torch.zeros_like(rows) if "hidden" in out else None

        def through_head(
            name: str,
            d_out: Tensor,
            genes: slice,
            rows: Tensor = rows,
            d_hidden: Tensor | None = d_hidden,
        ) -> None:
            """Carry a head's gradient (S, n, T) to its weight, its bias and the hidden units."""
            flat = d_out.flatten(0, 1)
            if f"{name}_weight" in out:
                out[f"{name}_weight"][genes].addmm_(flat.t(), rows)
            if f"{name}_bias" in out:
                out[f"{name}_bias"][genes] += flat.sum(0)
            if d_hidden is not None:
                d_hidden.addmm_(flat, getattr(inputs, f"{name}_weight")[genes])

        for genes in inputs.gene_tiles(cells):
            tile = _evaluate(
                inputs,
                hidden,
                block_shift,
                cells,
                genes,
                log_prob=False,
                gradients=r_wanted or d_wanted,
            )
            zero, nonzero = tile.zero, tile.nonzero
            if logits_wanted:
                assert zero.d_log_mu is not None and nonzero.d_log_mu is not None
                u = tile.put(zero.d_log_mu, nonzero.d_log_mu)
                if softmax:
                    library = inputs.library[:, cells, None]
                    # Without counts, and so without library, there is no gradient.
                    of_scale = block_shift - library.clamp(min=torch.finfo(library.dtype).min)
                    u.addcmul_((tile.logits + of_scale).exp_(), block_usum, value=-1)
                else:
                    # d log(softplus(a)) / da, which tends to 1 where both underflow
                    a = tile.logits.clamp(min=-80)
                    u.mul_(torch.sigmoid(a).div_(F.softplus(a)))
                through_head("scale", u.mul_(weight), genes)
            if r_wanted and zero.d_log_theta is not None:
                assert nonzero.d_log_theta is not None
                d_r = tile.put(zero.d_log_theta, nonzero.d_log_theta).mul_(weight)
                if inputs.r_weight is not None:
                    through_head("r", d_r, genes)
                elif "px_r" in out:
                    assert inputs.px_r is not None
                    if inputs.px_r.dim() == 1:
                        out["px_r"][genes] += d_r.sum((0, 1))
                    else:
                        assert inputs.px_r_index is not None
                        table = torch.zeros_like(inputs.px_r[genes].t())
                        table.index_add_(0, inputs.px_r_index[cells], d_r.sum(0))
                        out["px_r"][genes] += table.t()
            if d_wanted and zero.d_dropout is not None:
                assert nonzero.d_dropout is not None
                d_d = tile.put(zero.d_dropout, nonzero.d_dropout).mul_(weight)
                through_head("dropout", d_d, genes)
        if d_hidden is not None:
            out["hidden"][:, cells] = d_hidden.view_as(hidden)
    return out
