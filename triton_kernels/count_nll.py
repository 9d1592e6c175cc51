"""``count_nll``: hidden units, heads, library and counts to one negative log-likelihood a cell.

Rows are cells, or Monte-Carlo samples of cells; row ``i`` has the counts of cell ``i % n_cells``.
The forward pass finds each row's ``shift``, which makes log(mu) of its logits, then its likelihood
and ``usum``, the sum over genes of the derivative with respect to log(mu). The backward pass
recomputes each tile. Nothing of size rows x genes exists; the two routes differ in what a tile's
logits come from:

- *fused*: a product inside the kernel, and so are the gradients' products. Few launches, for small
  mini-batches on tensor cores.
- *chunked*: a product of the vendor's library for a chunk of genes, which the kernels then read,
  and overwrite with gradients. For all else: the gradients of an element are computed once, where
  the fused route computes them anew for every product that takes them.

:func:`is_fused` chooses. CSR counts are scattered into a dense chunk on either route.

Gamma functions
---------------
With Binet's function ``S(v) = lgamma(v) - ((v - 1/2) log(v) - v + log(2 pi) / 2)`` the log
probability of the negative binomial is that of a mean equal to the count, which is
``-log(2 pi x (x + theta) / theta) / 2 + S(x + theta) - S(theta) - S(x)``, plus a deviance, which is
``x log1p(theta (mu - x) / (x (mu + theta))) - theta log((mu + theta) / (x + theta))``: each part is
about as small as the result, where ``lgamma(x + theta) - lgamma(theta)`` cancels. ``S`` is a short
polynomial in ``1/v``, so that the non-zeros need no kernel of their own (Loader 2000, Fast and
accurate computation of binomial probabilities).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import dot, exp, expm1, launch, log1p, product_precision, sigmoid, softplus

if TYPE_CHECKING:
    from decoder_fast.reference.count_nll import Inputs

#: Bytes of all the buffers (rows x genes of a chunk) that exist at once. Fewer would fit an L2
#: cache, but then Python would take longer to launch the kernels than a GPU to run them.
CHUNK_BYTES = 48 << 20
#: Rows x genes up to which the fused route is taken.
FUSED_ELEMENTS = 1 << 20
#: Widest hidden layer that the fused route holds in one tile.
MAX_FUSED_HIDDEN = 128
#: Programs that fill a large GPU twice.
_PROGRAMS = 264
_EPS = tl.constexpr(1e-8)


@triton.jit
def _binet_above_one(inverse):
    """Binet's function of ``1 / inverse``, for ``0 < inverse <= 1``; relative error 1.1e-7."""
    p = 1.3703082e-4
    p = p * inverse - 6.29498098e-4
    p = p * inverse + 1.04442485e-3
    p = p * inverse - 5.03267038e-5
    p = p * inverse - 2.77341711e-3
    p = p * inverse - 7.4985773e-8
    p = p * inverse + 0.0833333308
    return p * inverse


@triton.jit
def _binet_slope_above_one(inverse):
    """``-v S'(v)`` of Binet's function at ``v = 1 / inverse >= 1``; relative error 1.8e-7."""
    p = -2.58759985e-4
    p = p * inverse + 1.78273889e-3
    p = p * inverse - 4.79708797e-3
    p = p * inverse + 5.8417553e-3
    p = p * inverse - 3.91938915e-4
    p = p * inverse - 8.29276414e-3
    p = p * inverse - 1.61238293e-6
    p = p * inverse + 0.0833333439
    return p * inverse


@triton.jit
def _binet(v, inverse):
    """Binet's function for any ``v > 0``: below one by the recurrence from ``v + 1``."""
    small = v < 1.0
    shift = (v + 0.5) * tl.log(1.0 + inverse) - 1.0
    return _binet_above_one(tl.where(small, 1.0 / (v + 1.0), inverse)) + tl.where(small, shift, 0.0)


@triton.jit
def _binet_slope(v, inverse):
    """``-v S'(v)`` of Binet's function for any ``v > 0``."""
    small = v < 1.0
    inverse_of_next = 1.0 / (v + 1.0)
    slope = _binet_slope_above_one(tl.where(small, inverse_of_next, inverse))
    shift = (v + 0.5) * inverse_of_next - v * tl.log(1.0 + inverse)
    return tl.where(small, v * inverse_of_next * slope + shift, slope)


@triton.jit
def _log1p(relative, ratio, inverse_ratio):
    """``log(ratio)`` of ``ratio = 1 + relative``, accurate near one thanks to ``relative``."""
    near = relative > -0.5
    ratio = tl.where(near, 1.0 + relative, ratio)
    return tl.log(ratio) + tl.where(near, (relative - (ratio - 1.0)) * inverse_ratio, 0.0)


@triton.jit
def _saturation_minus_log1p(z, saturation, log1p_z):
    """``saturation - log1p(z)``, with ``saturation = z / (1 + z)``, without cancellation."""
    # -(s + log(1 - s)) / s**2 of the saturation s, where abs(z) < 0.2; relative error 1.2e-8
    p = 0.0884972736
    p = p * saturation + 0.129273936
    p = p * saturation + 0.144220427
    p = p * saturation + 0.166622683
    p = p * saturation + 0.199978277
    p = p * saturation + 0.25000006
    p = p * saturation + 0.333333433
    p = p * saturation + 0.5
    return tl.where(tl.abs(z) < 0.2, -saturation * saturation * p, saturation - log1p_z)


@triton.jit
def _terms(
    x,
    log_mu,
    mu,
    theta,
    log_theta,
    binet_theta,
    slope_theta,
    d,
    LIKELIHOOD: tl.constexpr,
    FRACTIONS: tl.constexpr,
    VALUE: tl.constexpr,
    D_THETA: tl.constexpr,
):
    """Log-likelihood, and derivatives by log(mu), log(theta), dropout logits, of each element.

    Those that are not asked for (``VALUE``, ``D_THETA``) or that the likelihood lacks are any
    number. Without ``FRACTIONS`` no count lies between zero and one. Symbols as in
    ``decoder_fast/reference/log_prob.py``. The kernels wait for their arithmetic, and a division
    takes that of a dozen products: each reciprocal is taken once.
    """
    counted = x > 0.0
    x1 = tl.where(counted, x, 1.0)  # a count to divide by
    difference = mu - x
    if LIKELIHOOD == "poisson":
        value = x
        if VALUE:
            inverse_x = 1.0 / x1
            relative = difference * inverse_x
            near = tl.abs(relative) < 0.5
            log_x = tl.log(x1)
            log_ratio = tl.where(near, log1p(tl.where(near, relative, 0.0)), log_mu - log_x)
            if FRACTIONS:
                binet_x = _binet(x1, inverse_x)
            else:
                binet_x = _binet_above_one(inverse_x)
            at_mean = 0.5 * (log_x + 1.8378770664093453) + binet_x
            value = tl.where(counted, x * log_ratio - at_mean, 0.0) - difference
        return value, -difference, value, value

    theta_eps = theta + _EPS
    total = x + theta_eps
    t = mu + theta_eps
    inverse_total = 1.0 / total
    inverse_t = 1.0 / t
    inverse_mu = 1.0 / (mu + _EPS)
    z = difference * inverse_total
    log1p_z = _log1p(z, t * inverse_total, total * inverse_t)
    of_zero = -theta * log1p_z  # all there is where the count is zero
    n = x1 + theta  # where counted the total but for the epsilon, which is lost beside a one
    inverse_n = inverse_total
    if FRACTIONS:
        inverse_n += _EPS * inverse_total * inverse_total
    value = of_zero
    if VALUE:
        inverse_x = 1.0 / x1
        gamma = 0.5 * (log_theta - tl.log(x1 * n) - 1.8378770664093453) - binet_theta
        if FRACTIONS:
            gamma += _binet(n, inverse_n) - _binet(x1, inverse_x)
        else:
            gamma += _binet_above_one(inverse_n) - _binet_above_one(inverse_x)
        # log(mu / x) - log1p(z) as one logarithm, because x times either may be large
        inverse = inverse_x * inverse_t
        log_ratio = _log1p(
            theta * difference * inverse,
            (mu + _EPS) * total * inverse,
            x1 * t * (inverse_mu * inverse_total),
        )
        value += tl.where(counted, x * log_ratio + gamma, 0.0)
    d_mu = theta * inverse_t * (x * (mu * inverse_mu) - mu)
    d_theta = value
    if D_THETA:
        d_theta = _saturation_minus_log1p(z, difference * inverse_t, log1p_z)
        d_theta = theta * (d_theta - mu * inverse_t * (_EPS / theta_eps))
        if FRACTIONS:
            slope = _binet_slope(n, inverse_n)
        else:
            slope = _binet_slope_above_one(inverse_n)
        of_gamma = inverse_n * (0.5 * x - theta * slope) + slope_theta
    if LIKELIHOOD == "nb":
        if D_THETA:
            d_theta += tl.where(counted, of_gamma, 0.0)
        return value, d_mu, d_theta, value

    s = of_zero - d  # where the count is zero
    e_s = tl.exp(-tl.abs(s))
    e_d = tl.exp(-tl.abs(d))
    inverse = 1.0 / ((1.0 + e_s) * (1.0 + e_d))
    inverse_s = inverse * (1.0 + e_d)
    inverse_d = inverse * (1.0 + e_s)
    if VALUE:
        # softplus(s) - softplus(-d), its linear parts subtracted before they are rounded; where
        # counted softplus(d)
        relative = tl.where(counted, e_d, (e_s - e_d) * inverse_d)
        ratio = 1.0 + relative
        inverse_ratio = tl.where(counted, inverse_d, (1.0 + e_d) * inverse_s)
        logarithm = tl.log(ratio) + (relative - (ratio - 1.0)) * inverse_ratio
        at_zero = tl.maximum(of_zero, tl.minimum(d, 0.0)) + logarithm
        value = tl.where(counted, value - (tl.maximum(d, 0.0) + logarithm), at_zero)
    sigmoid_s = tl.where(s >= 0.0, 1.0, e_s) * inverse_s
    d_mu *= tl.where(counted, 1.0, sigmoid_s)
    if D_THETA:
        d_theta = tl.where(counted, d_theta + of_gamma, d_theta * sigmoid_s)
    # where the count is zero sigmoid(-d) - sigmoid(s), as a product
    difference_s = tl.where(s >= 0.0, e_s, 1.0) * (tl.where(d >= 0.0, e_d, 1.0) * inverse)
    difference_s *= -expm1(of_zero)
    sigmoid_d = tl.where(d >= 0.0, 1.0, e_d) * inverse_d
    return value, d_mu, d_theta, tl.where(counted, -sigmoid_d, difference_s)


@triton.jit
def _tile(matrix, rows, row_mask, n_hidden, HIDDEN: tl.constexpr):
    """All hidden units of some rows of (rows, n_hidden)."""
    units = tl.arange(0, HIDDEN)
    mask = row_mask[:, None] & (units < n_hidden)[None, :]
    offsets = rows.to(tl.int64)[:, None] * n_hidden + units[None, :]
    return tl.load(matrix + offsets, mask=mask, other=0.0)


@triton.jit
def _logits(
    hidden,
    weight,
    bias,
    chunk,
    rows,
    genes,
    row_mask,
    gene_mask,
    n_genes,
    n_hidden,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of a head for a tile: a product over the hidden units, or read from ``chunk``."""
    inside = row_mask[:, None] & gene_mask[None, :]
    if FUSED:
        logits = tl.zeros((rows.shape[0], genes.shape[0]), tl.float32)
        row_offsets = rows.to(tl.int64)[:, None] * n_hidden
        gene_offsets = genes.to(tl.int64)[None, :] * n_hidden
        for start in range(0, n_hidden, 32):  # a loop, lest registers hold whole operands
            units = start + tl.arange(0, 32)
            mask = row_mask[:, None] & (units < n_hidden)[None, :]
            a = tl.load(hidden + row_offsets + units[None, :], mask=mask, other=0.0)
            mask = gene_mask[None, :] & (units < n_hidden)[:, None]
            b = tl.load(weight + gene_offsets + units[:, None], mask=mask, other=0.0)
            logits = dot(a, b, logits, PRECISION)
    else:
        offsets = rows.to(tl.int64)[:, None] * n_genes + genes[None, :]
        logits = tl.load(chunk + offsets, mask=inside, other=0.0)
    if bias is not None:
        logits += tl.load(bias + genes, mask=gene_mask, other=0.0)[None, :]
    return logits


@triton.jit
def _mean(a, shift, SOFTMAX: tl.constexpr):
    """``log(mu)`` and ``mu`` of a tile."""
    if SOFTMAX:
        log_mu = a + shift[:, None]
        mu = tl.exp(log_mu)
    else:
        scale = softplus(a)
        mu = exp(shift)[:, None] * scale
        # log(softplus(a)) is a itself where softplus underflows
        log_scale = tl.where(a < -30.0, a, tl.log(tl.maximum(scale, 1e-30)))
        log_mu = log_scale + shift[:, None]
    return log_mu, mu


@triton.jit
def _gene_numbers(r, numbers, n_genes, GENES: tl.constexpr):
    """Compute what :func:`_dispersion` takes of each gene: three numbers, rows of ``numbers``."""
    genes = tl.program_id(0) * GENES + tl.arange(0, GENES)
    gene_mask = genes < n_genes
    log_theta = tl.load(r + genes, mask=gene_mask, other=0.0)
    theta = tl.exp(log_theta)
    # below that its inverse may not be finite, and these are the limits
    tiny = log_theta < -80.0
    inverse = 1.0 / tl.where(tiny, 1.0, theta)
    binet = tl.where(tiny, -0.5 * log_theta - 0.918938533, _binet(theta, inverse))
    slope = tl.where(tiny, 0.5, _binet_slope(theta, inverse))
    tl.store(numbers + genes, theta, mask=gene_mask)
    numbers += n_genes
    tl.store(numbers + genes, binet, mask=gene_mask)
    numbers += n_genes
    tl.store(numbers + genes, slope, mask=gene_mask)


@triton.jit
def _dispersion(
    r,
    r_bias,
    thetas,
    of_thetas,
    rows,
    genes,
    row_mask,
    gene_mask,
    r_rows,
    r_row,
    r_gene,
    R_BY_GENE: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Logarithm of a tile's inverse dispersion, itself, and Binet's function of it.

    With ``SLOPE`` that function's slope. By gene alone, and then read from ``thetas`` and
    ``of_thetas``, or by row, of which there are ``r_rows``.
    """
    if R_BY_GENE:
        log_theta = tl.load(r + genes, mask=gene_mask, other=0.0)[None, :]
        theta = tl.load(thetas + genes, mask=gene_mask, other=1.0)[None, :]
        of_theta = tl.load(of_thetas + genes, mask=gene_mask, other=0.0)[None, :]
    else:
        row_offsets = (rows % r_rows).to(tl.int64) * r_row
        offsets = row_offsets[:, None] + genes.to(tl.int64)[None, :] * r_gene
        inside = row_mask[:, None] & gene_mask[None, :]
        log_theta = tl.load(r + offsets, mask=inside, other=0.0)
        if r_bias is not None:
            log_theta += tl.load(r_bias + genes, mask=gene_mask, other=0.0)[None, :]
        theta = tl.exp(log_theta)
        inverse = 1.0 / theta
        of_theta = _binet_slope(theta, inverse) if SLOPE else _binet(theta, inverse)
    return log_theta, theta, of_theta


@triton.jit
def _counts(x, rows, genes, row_mask, gene_mask, n_cells, x_row, x_gene):
    """Load counts; with them 2 if one is negative or NaN, else 1 if one is infinite, else 0."""
    offsets = (rows % n_cells).to(tl.int64)[:, None] * x_row + genes.to(tl.int64)[None, :] * x_gene
    inside = row_mask[:, None] & gene_mask[None, :]
    counts = tl.load(x + offsets, mask=inside, other=0).to(tl.float32)
    bad = tl.max(tl.where(counts >= 0.0, tl.where(counts < float("inf"), 0, 1), 2))
    # scvi-tools takes anything up to 1e-8 for zero
    return tl.where(counts > _EPS, counts, 0.0), bad


@triton.jit
def _add(total, rest, value):
    """Add to a sum, and to the rest that its rounding leaves (Knuth's two-sum)."""
    result = total + value
    virtual = result - total
    return result, rest + ((total - (result - virtual)) + (value - virtual))


@triton.jit
def _log_sum_exp(
    hidden,
    weight,
    bias,
    chunk,
    maxima,
    sums,
    n_rows,
    n_genes,
    n_hidden,
    genes_a_split,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    GENES: tl.constexpr,
):
    """Maximum and sum of exponentials of the logits of some rows, over one split of the genes."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_rows
    maximum = tl.full((ROWS,), -3e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    first = tl.program_id(1) * genes_a_split
    for start in range(first, tl.minimum(first + genes_a_split, n_genes), GENES):
        genes = start + tl.arange(0, GENES)
        gene_mask = genes < n_genes
        a = _logits(
            hidden, weight, bias, chunk, rows, genes, row_mask, gene_mask,
            n_genes, n_hidden, FUSED, PRECISION,
        )  # fmt: skip
        a = tl.where(gene_mask[None, :], a, float("-inf"))
        highest = tl.maximum(maximum, tl.max(a, 1))
        ratio = tl.exp(maximum - highest)
        total, rest = _add(total * ratio, rest * ratio, tl.sum(tl.exp(a - highest[:, None]), 1))
        maximum = highest
    offsets = tl.program_id(1).to(tl.int64) * n_rows + rows
    tl.store(maxima + offsets, maximum, mask=row_mask)
    tl.store(sums + offsets, total + rest, mask=row_mask)


@triton.jit
def _shift(maxima, sums, library, shift, n_rows, n_splits, ROWS: tl.constexpr):
    """``library - log-sum-exp`` of some rows, rounded once: it shifts every mean of a row alike."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_rows
    maximum = tl.full((ROWS,), -3e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    for split in range(n_splits):
        offsets = tl.cast(split, tl.int64) * n_rows + rows
        other = tl.load(maxima + offsets, mask=row_mask, other=0.0)
        highest = tl.maximum(maximum, other)
        ratio = tl.exp(maximum - highest)
        part = tl.load(sums + offsets, mask=row_mask, other=1.0) * tl.exp(other - highest)
        total, rest = _add(total * ratio, rest * ratio, part)
        maximum = highest
    total += rest
    # total = 2**n f with f in [1, 2); the first constant has few enough bits for an exact product
    bits = total.to(tl.int32, bitcast=True)
    n = ((bits >> 23) - 127).to(tl.float32)
    f = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    row_library = tl.load(library + rows, mask=row_mask, other=0.0)
    result, rounding = _add(row_library, 0.0, -maximum)
    result, rounding = _add(result, rounding, -0.693359375 * n)
    result += rounding - (tl.log(f) - 2.12194440e-4 * n)
    result = tl.where(total < float("inf"), result, float("nan"))
    result = tl.where(row_library == float("-inf"), row_library, result)  # a cell without counts
    tl.store(shift + rows, result, mask=row_mask)


@triton.jit
def _likelihood(
    hidden,
    shift,
    scale_weight,
    scale_bias,
    dropout_weight,
    dropout_bias,
    r,
    r_bias,
    thetas,
    of_thetas,
    x,
    scale_chunk,
    dropout_chunk,
    log_probs,
    usums,
    bad,
    n_rows,
    n_cells,
    n_genes,
    n_hidden,
    genes_a_split,
    r_rows,
    r_row,
    r_gene,
    x_row,
    x_gene,
    R_BY_GENE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    FRACTIONS: tl.constexpr,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    GENES: tl.constexpr,
):
    """Log-likelihood, and its derivative by log(mu), of some rows over one split of the genes."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_rows
    row_shift = tl.load(shift + rows, mask=row_mask, other=0.0)
    log_prob = tl.zeros((ROWS,), tl.float32)
    log_prob_rest = tl.zeros((ROWS,), tl.float32)
    usum = tl.zeros((ROWS,), tl.float32)
    usum_rest = tl.zeros((ROWS,), tl.float32)
    any_bad = 0
    first = tl.program_id(1) * genes_a_split
    for start in range(first, tl.minimum(first + genes_a_split, n_genes), GENES):
        genes = start + tl.arange(0, GENES)
        gene_mask = genes < n_genes
        a = _logits(
            hidden, scale_weight, scale_bias, scale_chunk, rows, genes, row_mask, gene_mask,
            n_genes, n_hidden, FUSED, PRECISION,
        )  # fmt: skip
        log_mu, mu = _mean(a, row_shift, SOFTMAX)
        counts, tile_bad = _counts(x, rows, genes, row_mask, gene_mask, n_cells, x_row, x_gene)
        any_bad = tl.maximum(any_bad, tile_bad)
        theta, log_theta, binet_theta, d = mu, mu, mu, mu
        if LIKELIHOOD != "poisson":
            log_theta, theta, binet_theta = _dispersion(
                r, r_bias, thetas, of_thetas, rows, genes, row_mask, gene_mask, r_rows, r_row,
                r_gene, R_BY_GENE, False,
            )  # fmt: skip
        if LIKELIHOOD == "zinb":
            d = _logits(
                hidden, dropout_weight, dropout_bias, dropout_chunk, rows, genes, row_mask,
                gene_mask, n_genes, n_hidden, FUSED, PRECISION,
            )  # fmt: skip
        value, u, _, _ = _terms(
            counts, log_mu, mu, theta, log_theta, binet_theta, binet_theta, d, LIKELIHOOD,
            FRACTIONS, True, False,
        )  # fmt: skip
        value = tl.sum(tl.where(gene_mask[None, :], value, 0.0), 1)
        u = tl.sum(tl.where(gene_mask[None, :], u, 0.0), 1)
        log_prob, log_prob_rest = _add(log_prob, log_prob_rest, value)
        usum, usum_rest = _add(usum, usum_rest, u)
    offsets = tl.program_id(1).to(tl.int64) * n_rows + rows
    tl.store(log_probs + offsets, log_prob + log_prob_rest, mask=row_mask)
    tl.store(usums + offsets, usum + usum_rest, mask=row_mask)
    tl.store(bad + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), any_bad)


@triton.jit
def _row_numbers(
    library, shift, usum, grad, numbers, n_rows, grad_row, SOFTMAX: tl.constexpr, ROWS: tl.constexpr
):
    """Compute what :func:`_gradients` takes of each row: four numbers, rows of ``numbers``."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_rows
    row_library = tl.load(library + rows, mask=row_mask, other=0.0)
    row_usum = tl.load(usum + rows, mask=row_mask, other=0.0)
    if SOFTMAX:
        # One exponential a gene serves the mean and the softmax. It is the mean, but where that
        # underflows, and the softmax does not.
        bounded = tl.maximum(row_library, -40.0)
        row_shift = tl.load(shift + rows, mask=row_mask, other=0.0)
        none = row_library == float("-inf")  # a cell without counts, and so without a mean
        row_shift = tl.where(none, row_shift, row_shift + (bounded - row_library))
        tl.store(numbers + rows, row_shift, mask=row_mask)
        row_library -= bounded
        row_usum *= exp(-bounded)
    numbers += n_rows
    tl.store(numbers + rows, exp(row_library), mask=row_mask)
    numbers += n_rows
    tl.store(numbers + rows, row_usum, mask=row_mask)
    numbers += n_rows
    row_grad = tl.load(grad + rows.to(tl.int64) * grad_row, mask=row_mask, other=0.0)
    tl.store(numbers + rows, -row_grad, mask=row_mask)


@triton.jit
def _load_row_numbers(numbers, rows, row_mask, n_rows):
    shift = tl.load(numbers + rows, mask=row_mask, other=0.0)
    factor = tl.load(numbers + n_rows + rows, mask=row_mask, other=0.0)
    usum = tl.load(numbers + 2 * n_rows + rows, mask=row_mask, other=0.0)
    weight = tl.load(numbers + 3 * n_rows + rows, mask=row_mask, other=0.0)
    return shift, factor, usum, weight


@triton.jit
def _gradients(
    a,
    row_shift,
    row_factor,
    row_usum,
    row_weight,
    counts,
    log_theta,
    theta,
    slope_theta,
    d,
    inside,
    SOFTMAX: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    FRACTIONS: tl.constexpr,
    D_R: tl.constexpr,
):
    """Gradients of the loss by logits, log dispersion and dropout logits of a tile."""
    scale = tl.exp(a + row_shift[:, None]) if SOFTMAX else softplus(a)
    mu = scale * row_factor[:, None]
    _, u, d_r, d_dropout = _terms(
        counts, mu, mu, theta, log_theta, slope_theta, slope_theta, d, LIKELIHOOD,
        FRACTIONS, False, D_R,
    )
    if SOFTMAX:
        u -= scale * row_usum[:, None]
    else:
        # d log(softplus(a)) / da, which tends to 1 where both underflow
        capped = tl.maximum(a, -80.0)
        u *= sigmoid(capped) / softplus(capped)
    weight = tl.where(inside, row_weight[:, None], 0.0)
    # Multiplied only inside: what stands outside may be infinite.
    u = tl.where(inside, u, 0.0) * weight
    return u, tl.where(inside, d_r, 0.0) * weight, tl.where(inside, d_dropout, 0.0) * weight


@triton.jit
def _gradients_by_gene(
    hidden,
    row_numbers,
    scale_weight,
    scale_bias,
    dropout_weight,
    dropout_bias,
    r,
    r_bias,
    thetas,
    of_thetas,
    x,
    scale_chunk,
    dropout_chunk,
    r_chunk,
    d_weight,
    d_scale_bias,
    d_dropout_bias,
    d_r,
    n_rows,
    n_cells,
    n_genes,
    n_hidden,
    rows_a_split,
    r_rows,
    r_row,
    r_gene,
    x_row,
    x_gene,
    R_BY_GENE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    FRACTIONS: tl.constexpr,
    D_R: tl.constexpr,
    DROPOUT_PRODUCTS: tl.constexpr,
    FUSED: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    GENES: tl.constexpr,
):
    """Gradients that sum over rows, for some genes and one split of the rows.

    The fused route takes the products of one head's gradients with the hidden units along the way:
    those of two would spill. The chunked one overwrites the logits (of ``r_chunk`` too, where it is
    given) with their gradients.
    """
    genes = tl.program_id(0) * GENES + tl.arange(0, GENES)
    gene_mask = genes < n_genes
    if FUSED:
        products = tl.zeros((GENES, HIDDEN), tl.float32)
    scale_sum = tl.zeros((GENES,), tl.float32)
    scale_rest = tl.zeros((GENES,), tl.float32)
    dropout_sum = tl.zeros((GENES,), tl.float32)
    dropout_rest = tl.zeros((GENES,), tl.float32)
    r_sum = tl.zeros((GENES,), tl.float32)
    r_rest = tl.zeros((GENES,), tl.float32)
    first = tl.program_id(1) * rows_a_split
    for start in range(first, tl.minimum(first + rows_a_split, n_rows), ROWS):
        rows = start + tl.arange(0, ROWS)
        row_mask = rows < n_rows
        inside = row_mask[:, None] & gene_mask[None, :]
        chunk_offsets = rows.to(tl.int64)[:, None] * n_genes + genes[None, :]
        a = _logits(
            hidden, scale_weight, scale_bias, scale_chunk, rows, genes, row_mask, gene_mask,
            n_genes, n_hidden, FUSED, PRECISION,
        )  # fmt: skip
        row_shift, row_factor, row_usum, row_weight = _load_row_numbers(
            row_numbers, rows, row_mask, n_rows
        )
        counts, _ = _counts(x, rows, genes, row_mask, gene_mask, n_cells, x_row, x_gene)
        theta, log_theta, slope_theta, d = a, a, a, a
        if LIKELIHOOD != "poisson":
            log_theta, theta, slope_theta = _dispersion(
                r, r_bias, thetas, of_thetas, rows, genes, row_mask, gene_mask, r_rows, r_row,
                r_gene, R_BY_GENE, True,
            )  # fmt: skip
        if LIKELIHOOD == "zinb":
            d = _logits(
                hidden, dropout_weight, dropout_bias, dropout_chunk, rows, genes, row_mask,
                gene_mask, n_genes, n_hidden, FUSED, PRECISION,
            )  # fmt: skip
        d_a, d_log_theta, d_d = _gradients(
            a, row_shift, row_factor, row_usum, row_weight, counts, log_theta, theta, slope_theta,
            d, inside, SOFTMAX, LIKELIHOOD, FRACTIONS, D_R,
        )  # fmt: skip
        if FUSED:
            if d_weight is not None:
                d_head = d_d if DROPOUT_PRODUCTS else d_a
                hidden_tile = _tile(hidden, rows, row_mask, n_hidden, HIDDEN)
                products = dot(tl.trans(d_head), hidden_tile, products, PRECISION)
        else:
            tl.store(scale_chunk + chunk_offsets, d_a, mask=inside)
            if LIKELIHOOD == "zinb":
                tl.store(dropout_chunk + chunk_offsets, d_d, mask=inside)
            if r_chunk is not None:
                tl.store(r_chunk + chunk_offsets, d_log_theta, mask=inside)
        scale_sum, scale_rest = _add(scale_sum, scale_rest, tl.sum(d_a, 0))
        if d_dropout_bias is not None:
            dropout_sum, dropout_rest = _add(dropout_sum, dropout_rest, tl.sum(d_d, 0))
        if d_r is not None:
            r_sum, r_rest = _add(r_sum, r_rest, tl.sum(d_log_theta, 0))
    split_genes = tl.program_id(1).to(tl.int64) * n_genes + genes
    if d_scale_bias is not None:
        tl.store(d_scale_bias + split_genes, scale_sum + scale_rest, mask=gene_mask)
    if d_dropout_bias is not None:
        tl.store(d_dropout_bias + split_genes, dropout_sum + dropout_rest, mask=gene_mask)
    if d_r is not None:
        tl.store(d_r + split_genes, r_sum + r_rest, mask=gene_mask)
    if FUSED:
        units = tl.arange(0, HIDDEN)
        stored = gene_mask[:, None] & (units < n_hidden)[None, :]
        offsets = split_genes[:, None] * n_hidden + units[None, :]
        if d_weight is not None:
            tl.store(d_weight + offsets, products, mask=stored)


@triton.jit
def _gradient_of_hidden(
    hidden,
    row_numbers,
    scale_weight,
    scale_bias,
    dropout_weight,
    dropout_bias,
    r,
    thetas,
    of_thetas,
    x,
    d_hidden,
    n_rows,
    n_cells,
    n_genes,
    n_hidden,
    genes_a_split,
    x_row,
    x_gene,
    SOFTMAX: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    FRACTIONS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    GENES: tl.constexpr,
):
    """Gradient by the hidden units of some rows, over one split of the genes: the fused route."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_rows
    row_shift, row_factor, row_usum, row_weight = _load_row_numbers(
        row_numbers, rows, row_mask, n_rows
    )
    products = tl.zeros((ROWS, HIDDEN), tl.float32)
    first = tl.program_id(1) * genes_a_split
    for start in range(first, tl.minimum(first + genes_a_split, n_genes), GENES):
        genes = start + tl.arange(0, GENES)
        gene_mask = genes < n_genes
        inside = row_mask[:, None] & gene_mask[None, :]
        a = _logits(
            hidden, scale_weight, scale_bias, hidden, rows, genes, row_mask, gene_mask,
            n_genes, n_hidden, True, PRECISION,
        )  # fmt: skip
        counts, _ = _counts(x, rows, genes, row_mask, gene_mask, n_cells, x_row, x_gene)
        theta, log_theta, d = a, a, a
        if LIKELIHOOD != "poisson":
            log_theta, theta, _ = _dispersion(
                r, None, thetas, of_thetas, rows, genes, row_mask, gene_mask, 1, 0, 1, True, True
            )
        if LIKELIHOOD == "zinb":
            d = _logits(
                hidden, dropout_weight, dropout_bias, hidden, rows, genes, row_mask, gene_mask,
                n_genes, n_hidden, True, PRECISION,
            )  # fmt: skip
        d_a, _, d_d = _gradients(
            a, row_shift, row_factor, row_usum, row_weight, counts, log_theta, theta, theta, d,
            inside, SOFTMAX, LIKELIHOOD, FRACTIONS, False,
        )  # fmt: skip
        scale_tile = _tile(scale_weight, genes, gene_mask, n_hidden, HIDDEN)
        products = dot(d_a, scale_tile, products, PRECISION)
        if LIKELIHOOD == "zinb":
            dropout_tile = _tile(dropout_weight, genes, gene_mask, n_hidden, HIDDEN)
            products = dot(d_d, dropout_tile, products, PRECISION)
    units = tl.arange(0, HIDDEN)
    offsets = (tl.program_id(1).to(tl.int64) * n_rows + rows)[:, None] * n_hidden + units[None, :]
    tl.store(
        d_hidden + offsets, products, mask=row_mask[:, None] & (units < n_hidden)[None, :]
    )


@triton.jit
def _sum_by_label(
    d_r,
    order,
    bounds,
    table,
    n_cells,
    n_samples,
    n_genes,
    n_labels,
    GENES: tl.constexpr,
):
    """Sum the rows ``(n_samples, n_cells)`` of ``d_r`` by their cells' labels, into ``table``.

    ``order`` lists the cells label by label; those of label ``k`` lie from ``bounds[k]`` on.
    """
    label = tl.program_id(0)
    genes = tl.program_id(1) * GENES + tl.arange(0, GENES)
    gene_mask = genes < n_genes
    total = tl.zeros((GENES,), tl.float32)
    rest = tl.zeros((GENES,), tl.float32)
    for i in range(tl.load(bounds + label), tl.load(bounds + label + 1)):
        cell = tl.load(order + i)
        for sample in range(n_samples):
            offsets = (tl.cast(sample, tl.int64) * n_cells + cell) * n_genes + genes
            value = tl.load(d_r + offsets, mask=gene_mask, other=0.0)
            total, rest = _add(total, rest, value)
    offsets = genes.to(tl.int64) * n_labels + label
    tl.store(table + offsets, total + rest, mask=gene_mask)


@triton.jit
def _scatter(
    crow,
    col,
    values,
    dense,
    bad,
    n_values,
    n_genes,
    first_gene,
    n_chunk,
    BLOCK: tl.constexpr,
):
    """Write one cell's counts of a chunk of genes into ``dense``, which holds zeros.

    Columns may be in any order. Added, because they may repeat, in which case counts sum; an
    address that is met once gets the same bits at every run. What the row pointers and columns
    say is held against the sizes of the tensors: a lie is reported, and nothing read outside.
    """
    cell = tl.program_id(0)
    start = tl.load(crow + cell).to(tl.int64)
    stop = tl.load(crow + cell + 1).to(tl.int64)
    any_bad = ((start < 0) | (stop < start) | (stop > n_values)).to(tl.int32)
    if cell == 0:
        any_bad = tl.maximum(any_bad, (start != 0).to(tl.int32))
    if cell == tl.num_programs(0) - 1:
        any_bad = tl.maximum(any_bad, (stop != n_values).to(tl.int32))
    start = tl.maximum(start, 0)
    stop = tl.minimum(stop, n_values)
    for block in range(start, stop, BLOCK):
        positions = block + tl.arange(0, BLOCK)
        inside = positions < stop
        genes = tl.load(col + positions, mask=inside, other=0).to(tl.int64)
        outside = inside & ((genes < 0) | (genes >= n_genes))
        any_bad = tl.maximum(any_bad, tl.max(outside.to(tl.int32)))
        genes -= first_gene
        wanted = inside & (genes >= 0) & (genes < n_chunk)
        counts = tl.load(values + positions, mask=wanted, other=0).to(tl.float32)
        tl.atomic_add(dense + cell.to(tl.int64) * n_chunk + genes, counts, mask=wanted)
    tl.store(bad + cell, any_bad)


def is_fused(inputs: Inputs) -> bool:
    """Whether products of the heads are taken inside the kernels.

    Where tensor cores take them, the hidden units fit one tile, and the dispersion is by gene: with
    one by cell the kernels would hold a third tile, or its gradient would have to be stored. And
    where launches take longer than arithmetic, of which the fused route has two times as much.
    """
    by_gene = inputs.r_weight is None and inputs.px_r_index is None
    return (
        by_gene
        and inputs.hidden.shape[:-1].numel() * inputs.scale_weight.shape[0] <= FUSED_ELEMENTS
        and inputs.hidden.shape[-1] <= MAX_FUSED_HIDDEN
        and product_precision() != "ieee"
    )


def _split_size(n: int, tile: int, other_programs: int) -> int:
    """Size of the splits of ``n`` that fill the GPU: a multiple of ``tile``."""
    tiles = triton.cdiv(n, tile)
    splits = max(1, min(tiles, _PROGRAMS // max(1, other_programs)))
    return triton.cdiv(tiles, splits) * tile


class _Problem:
    """The inputs as the kernels read them, and the route that they take."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.fused = is_fused(inputs)
        n_samples, self.n_cells, self.n_hidden = inputs.hidden.shape
        self.n_rows = n_samples * self.n_cells
        self.n_genes = inputs.scale_weight.shape[0]
        self.hidden = inputs.hidden.reshape(self.n_rows, self.n_hidden).contiguous()
        self.library = inputs.library.reshape(self.n_rows).contiguous()
        self.softmax = inputs.scale_activation == "softmax"
        values = inputs.counts.values if inputs.counts.dense is None else inputs.counts.dense
        self.kinds = {
            "SOFTMAX": self.softmax,
            "LIKELIHOOD": inputs.likelihood,
            "FRACTIONS": values.is_floating_point(),
        }
        self.products = {
            "FUSED": self.fused,
            "PRECISION": product_precision() if self.fused else "ieee",
        }
        # All hidden units in one tile, where the fused route sums products with them.
        self.hidden_tile = max(16, triton.next_power_of_2(self.n_hidden)) if self.fused else 16
        self.heads = {
            name: weight.contiguous()
            for name in ("scale", "dropout", "r")
            if (weight := getattr(inputs, f"{name}_weight")) is not None
        }
        self.has_table = inputs.px_r_index is not None
        numbers = 0 if self.fused else self.n_rows * (len(self.heads) + self.has_table)
        numbers += self.n_cells if inputs.counts.dense is None else 0
        fitting = CHUNK_BYTES // (4 * numbers) if numbers else self.n_genes
        # A multiple of 64 genes keeps every chunk's first address aligned.
        self.step = max(64, min(fitting, triton.cdiv(self.n_genes, 64) * 64) // 64 * 64)
        self.gene_numbers = self._gene_numbers()
        self._buffers: dict[str, Tensor] = {}
        self.bad_indices: Tensor | None = None

    def _gene_numbers(self) -> Tensor | None:
        """Compute what the kernels want of a dispersion by gene."""
        px_r = self.inputs.px_r
        if px_r is None or self.has_table:
            return None
        numbers = self.hidden.new_empty(3, self.n_genes)
        launch(
            _gene_numbers,
            (triton.cdiv(self.n_genes, 256),),
            px_r.contiguous(),
            numbers,
            self.n_genes,
            GENES=256,
            num_warps=4,
        )
        return numbers

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.n_genes, self.step):
            yield slice(start, min(start + self.step, self.n_genes))

    def buffer(self, name: str, n_rows: int, genes: slice) -> Tensor:
        """Return a (rows, genes of the chunk) matrix, in memory that all chunks share."""
        if name not in self._buffers:
            self._buffers[name] = self.hidden.new_empty(n_rows * min(self.step, self.n_genes))
        n_genes = genes.stop - genes.start
        return self._buffers[name][: n_rows * n_genes].view(n_rows, n_genes)

    def logits(self, head: str, genes: slice) -> Tensor | None:
        """Logits of a head, less its bias, for a chunk; None on the route that needs none."""
        if self.fused or head not in self.heads:
            return None
        out = self.buffer(head, self.n_rows, genes)
        return torch.mm(self.hidden, self.heads[head][genes].t(), out=out)

    def bias(self, head: str, genes: slice) -> Tensor | None:
        bias = getattr(self.inputs, f"{head}_bias")
        return None if bias is None else bias[genes]

    def weight(self, head: str, genes: slice) -> Tensor | None:
        return self.heads[head][genes] if self.fused and head in self.heads else None

    def dispersion(
        self, genes: slice, *, slope: bool
    ) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        """Log inverse dispersion of a chunk and its bias, and by gene itself and Binet's function.

        With them the number of its rows, its strides, and whether it is by gene.
        """
        if (logits := self.logits("r", genes)) is not None:
            tensors = (logits, self.bias("r", genes), None, None)
            return tensors, (self.n_rows, logits.stride(0), 1, False)
        if self.inputs.px_r is None:
            return (None,) * 4, (1, 0, 1, True)
        px_r = self.inputs.px_r[genes]
        if self.gene_numbers is not None:
            theta, of_theta = self.gene_numbers[0], self.gene_numbers[2 if slope else 1]
            return (px_r.contiguous(), None, theta[genes], of_theta[genes]), (1, 0, 1, True)
        assert self.inputs.px_r_index is not None
        looked_up = px_r.index_select(1, self.inputs.px_r_index)
        return (looked_up, None, None, None), (self.n_cells, 1, looked_up.stride(0), False)

    def counts(self, genes: slice) -> tuple[Tensor, int, int]:
        """Return the counts of a chunk, dense, and their strides."""
        counts = self.inputs.counts
        if counts.dense is not None:
            dense = counts.dense[:, genes]
            return dense, dense.stride(0), dense.stride(1)
        dense = self.buffer("counts", self.n_cells, genes).zero_()
        if self.bad_indices is None:
            self.bad_indices = torch.empty(
                self.n_cells, dtype=torch.int32, device=dense.device
            )
        launch(
            _scatter,
            (self.n_cells,),
            counts.crow.contiguous(),
            counts.col.contiguous(),
            counts.values.contiguous(),
            dense,
            self.bad_indices,
            counts.values.numel(),
            self.n_genes,
            genes.start,
            dense.shape[1],
            BLOCK=512,
            num_warps=4,
        )
        return dense, dense.stride(0), dense.stride(1)


def _slots(chunks: list[slice], split: int) -> list[int]:
    """Return the number of each chunk's first split, and the number of all splits."""
    sizes = (triton.cdiv(genes.stop - genes.start, split) for genes in chunks)
    return list(itertools.accumulate(sizes, initial=0))


# Tiles. Of the likelihood's many temporaries a thread holds those of 2 to 4 elements; more spill.
_TILE = {"ROWS": 8, "GENES": 64, "num_warps": 4}
_TILE_BY_GENE = {"ROWS": 8, "GENES": 64, "num_warps": 4, "maxnreg": 168}
_FUSED_TILE = {"ROWS": 32, "GENES": 32, "num_warps": 8, "num_stages": 1, "maxnreg": 224}
_FUSED_TILE_OF_HIDDEN = {**_FUSED_TILE, "GENES": 16}


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the negative log-likelihood of each cell.

    Parameters
    ----------
    inputs
        As for ``decoder_fast.reference.count_nll.forward``, in float32.

    Returns
    -------
    tuple of Tensor
        ``nll``, ``shift`` and ``usum``; each (S, N), float32.

    Raises
    ------
    ValueError
        In the interpreter, if a count is negative or not finite, or CSR indices do not fit their
        shape. On a GPU both are assertions on the device.
    """
    problem = _Problem(inputs)
    n_rows = problem.n_rows
    shape = inputs.hidden.shape[:2]
    tile = _FUSED_TILE if problem.fused else _TILE
    row_tiles = triton.cdiv(n_rows, tile["ROWS"])
    chunks = list(problem.chunks())
    split = _split_size(chunks[0].stop, tile["GENES"], row_tiles)
    slots = _slots(chunks, split)
    partial = inputs.hidden.new_empty(2, slots[-1], n_rows)
    options = {**problem.products, **tile}

    scale_chunk = None
    shift = problem.library.clone()  # all of it under softplus
    if problem.softmax:
        for genes, slot, end in zip(chunks, slots, slots[1:], strict=False):
            scale_chunk = problem.logits("scale", genes)
            launch(
                _log_sum_exp,
                (row_tiles, end - slot),
                problem.hidden,
                problem.weight("scale", genes),
                problem.bias("scale", genes),
                scale_chunk,
                partial[0, slot:],
                partial[1, slot:],
                n_rows,
                genes.stop - genes.start,
                problem.n_hidden,
                split,
                **options,
            )
        launch(
            _shift,
            (triton.cdiv(n_rows, 128),),
            *partial,
            problem.library,
            shift,
            n_rows,
            slots[-1],
            ROWS=128,
            num_warps=4,
        )
    bad = torch.empty(row_tiles * slots[-1], dtype=torch.int32, device=partial.device)
    for genes, slot, end in zip(chunks, slots, slots[1:], strict=False):
        if scale_chunk is None or len(chunks) > 1:  # one chunk's logits are still there
            scale_chunk = problem.logits("scale", genes)
        dispersion, (*r_layout, by_gene) = problem.dispersion(genes, slope=False)
        x, *x_strides = problem.counts(genes)
        launch(
            _likelihood,
            (row_tiles, end - slot),
            problem.hidden,
            shift,
            problem.weight("scale", genes),
            problem.bias("scale", genes),
            problem.weight("dropout", genes),
            problem.bias("dropout", genes),
            *dispersion,
            x,
            scale_chunk,
            problem.logits("dropout", genes),
            partial[0, slot:],
            partial[1, slot:],
            bad[row_tiles * slot :],
            n_rows,
            problem.n_cells,
            genes.stop - genes.start,
            problem.n_hidden,
            split,
            *r_layout,
            *x_strides,
            R_BY_GENE=by_gene,
            **problem.kinds,
            **options,
        )
    if problem.bad_indices is not None:
        inputs.counts.require_indices(problem.bad_indices)
    inputs.counts.require_counts(bad)
    log_prob, usum = partial.sum(1)
    return -log_prob.view(shape), shift.view(shape), usum.view(shape)


class _Sum:
    """A gradient that is a sum over splits: written split by split, then added in order."""

    def __init__(self, out: Tensor, n_splits: int) -> None:
        self.out = out
        self.splits = out if n_splits == 1 else out.new_empty(n_splits, *out.shape)

    def finish(self) -> None:
        if self.splits is not self.out:
            torch.sum(self.splits, 0, out=self.out)


def _gradients_of_chunk(
    problem: _Problem,
    genes: slice,
    row_numbers: Tensor,
    cells_by_label: tuple[Tensor, Tensor] | None,
    out: dict[str, Tensor],
) -> None:
    """Compute what ``out`` asks for that sums over rows; on the chunked route add to ``hidden``."""
    n_rows, n_chunk = problem.n_rows, genes.stop - genes.start
    tile = _FUSED_TILE if problem.fused else _TILE_BY_GENE
    gene_tiles = triton.cdiv(n_chunk, tile["GENES"])
    split = _split_size(n_rows, tile["ROWS"], gene_tiles)
    n_splits = triton.cdiv(n_rows, split)

    dispersion, (*r_layout, by_gene) = problem.dispersion(genes, slope=True)
    r_chunk = None
    if cells_by_label is not None:
        r_chunk = problem.buffer("d_r", n_rows, genes)
    elif "r" in problem.heads and out.keys() & {"hidden", "r_weight", "r_bias"}:
        r_chunk = dispersion[0]  # each element is read before it is overwritten
    x, *x_strides = problem.counts(genes)
    chunks = {name: problem.logits(name, genes) for name in ("scale", "dropout")}
    sums = {
        name: _Sum(out[key][genes], n_splits)
        for name, key in (
            ("scale", "scale_bias"),
            ("dropout", "dropout_bias"),
            ("r", "r_bias" if cells_by_label or "r_bias" in out else "px_r"),
        )
        if key in out
    }
    weights = [head for head in ("scale", "dropout") if problem.fused and f"{head}_weight" in out]
    for head in weights or [""]:  # the products of one head a launch, all else in the first
        if head:
            sums["products"] = _Sum(out[f"{head}_weight"][genes], n_splits)
        splits = {name: total.splits for name, total in sums.items()}
        launch(
            _gradients_by_gene,
            (gene_tiles, n_splits),
            problem.hidden,
            row_numbers,
            problem.weight("scale", genes),
            problem.bias("scale", genes),
            problem.weight("dropout", genes),
            problem.bias("dropout", genes),
            *dispersion,
            x,
            chunks["scale"],
            chunks["dropout"],
            r_chunk,
            splits.get("products"),
            splits.get("scale"),
            splits.get("dropout"),
            splits.get("r"),
            n_rows,
            problem.n_cells,
            n_chunk,
            problem.n_hidden,
            split,
            *r_layout,
            *x_strides,
            R_BY_GENE=by_gene,
            **problem.kinds,
            D_R=r_chunk is not None or "r" in sums,
            DROPOUT_PRODUCTS=head == "dropout",
            HIDDEN=problem.hidden_tile,
            **problem.products,
            **tile,
        )
        for total in sums.values():
            total.finish()
        sums = {}
    if cells_by_label is not None:
        launch(
            _sum_by_label,
            (out["px_r"].shape[1], triton.cdiv(n_chunk, 128)),
            r_chunk,
            *cells_by_label,
            out["px_r"][genes],
            problem.n_cells,
            n_rows // problem.n_cells,
            n_chunk,
            out["px_r"].shape[1],
            GENES=128,
            num_warps=1,
        )
    if problem.fused:
        return
    if "r" in problem.heads and r_chunk is not None:
        chunks["r"] = r_chunk
    for name, chunk in chunks.items():
        if chunk is None:
            continue
        if f"{name}_weight" in out:
            torch.mm(chunk.t(), problem.hidden, out=out[f"{name}_weight"][genes])
        if "hidden" in out:
            out["hidden"].addmm_(chunk, problem.heads[name][genes])


def _fused_gradient_of_hidden(
    problem: _Problem, row_numbers: Tensor, d_hidden: Tensor
) -> None:
    tile = _FUSED_TILE_OF_HIDDEN
    row_tiles = triton.cdiv(problem.n_rows, tile["ROWS"])
    chunks = list(problem.chunks())
    split = _split_size(chunks[0].stop, tile["GENES"], row_tiles)
    slots = _slots(chunks, split)
    total = _Sum(d_hidden, slots[-1])
    splits = total.splits.view(slots[-1], *d_hidden.shape)
    for genes, slot, end in zip(chunks, slots, slots[1:], strict=False):
        (r, _, *of_genes), _ = problem.dispersion(genes, slope=True)
        x, *x_strides = problem.counts(genes)
        launch(
            _gradient_of_hidden,
            (row_tiles, end - slot),
            problem.hidden,
            row_numbers,
            problem.weight("scale", genes),
            problem.bias("scale", genes),
            problem.weight("dropout", genes),
            problem.bias("dropout", genes),
            r,
            *of_genes,
            x,
            splits[slot:],
            problem.n_rows,
            problem.n_cells,
            genes.stop - genes.start,
            problem.n_hidden,
            split,
            *x_strides,
            **problem.kinds,
            HIDDEN=problem.hidden_tile,
            PRECISION=problem.products["PRECISION"],
            **tile,
        )
    total.finish()


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
    gradients = {
        name: torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for name in wanted
        if name != "library" and (tensor := getattr(inputs, name)) is not None
    }
    if gradients:
        problem = _Problem(inputs)
        row_numbers = problem.hidden.new_empty(4, problem.n_rows)
        grad_by_row = grad.reshape(-1)
        launch(
            _row_numbers,
            (triton.cdiv(problem.n_rows, 128),),
            problem.library,
            shift.reshape(-1).contiguous(),
            usum.reshape(-1).contiguous(),
            grad_by_row,
            row_numbers,
            problem.n_rows,
            grad_by_row.stride(0),
            SOFTMAX=problem.softmax,
            ROWS=128,
            num_warps=4,
        )
        cells_by_label = None
        if problem.has_table and "px_r" in gradients:
            assert inputs.px_r_index is not None
            labels, order = torch.sort(inputs.px_r_index, stable=True)
            every = torch.arange(gradients["px_r"].shape[1] + 1, device=labels.device)
            cells_by_label = (order, torch.searchsorted(labels, every))
        out = dict(gradients)
        if "hidden" in out:
            out["hidden"] = out["hidden"].view(problem.hidden.shape)
            if problem.fused:
                _fused_gradient_of_hidden(problem, row_numbers, out.pop("hidden"))
            else:
                out["hidden"].zero_()
        if out:
            for genes in problem.chunks():
                _gradients_of_chunk(problem, genes, row_numbers, cells_by_label, out)
    if "library" in wanted:
        gradients["library"] = -grad * usum
    return gradients
