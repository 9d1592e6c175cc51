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

:func:`is_fused` chooses. The fused route scatters CSR counts into a dense chunk. On the chunked one
kernels of their own take a row's non-zeros, and the kernels that read the whole chunk compute what
is left at a count of zero, which takes less than half the arithmetic. What the former leave for the
latter: in the forward pass a mean of zero, whose likelihood is one; in the backward pass the
gradients, and marks that say where (the derivative by the log dispersion, which is never zero).

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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    cdiv,
    dot,
    exp,
    expm1,
    launch,
    log1p,
    next_power_of_2,
    product_precision,
    sigmoid,
    softplus,
)

if TYPE_CHECKING:
    from decoder_fast.reference.count_nll import Inputs

#: Bytes of all the buffers (rows x genes of a chunk) that exist at once, unless that makes too many
#: chunks. Fewer would fit an L2 cache, but then Python would take longer to launch the kernels than
#: a GPU to run them.
CHUNK_BYTES = 48 << 20
#: Chunks at most, for the same reason: a chunk's launches take Python a quarter of a millisecond.
MAX_CHUNKS = 6
#: Rows x genes up to which the fused route is taken.
FUSED_ELEMENTS = 1 << 20
#: Widest hidden layer that the fused route holds in one tile.
MAX_FUSED_HIDDEN = 128
#: Programs that fill a large GPU: so many that some compute while others wait for memory.
_PROGRAMS = 1056
#: The same of kernels that fill a multiprocessor's registers.
_FUSED_PROGRAMS = 264
_EPS = tl.constexpr(1e-8)
#: Stands for a gradient of zero, or less than that, among the marks: a mark of zero says that none
#: has been computed.
_MARK_OF_ZERO = tl.constexpr(1e-37)
#: The logit of a mean of zero, whose likelihood at a count of zero is one, and all gradients zero.
_NO_MEAN = tl.constexpr(float("-inf"))


# Every mini-batch has another number of non-zeros: no variant where it is divisible by 16.
_jit_for_csr = triton.jit(do_not_specialize=["n_values"])


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
def _terms_of_zero(
    mu,
    theta,
    inverse_theta,
    d,
    LIKELIHOOD: tl.constexpr,
    VALUE: tl.constexpr,
    D_THETA: tl.constexpr,
):
    """Compute what :func:`_terms` does, where all counts are zero.

    ``inverse_theta`` is that of ``theta + eps``. All results are zero where the mean is.
    """
    if LIKELIHOOD == "poisson":
        return -mu, -mu, mu, mu
    inverse_t = 1.0 / (mu + (theta + _EPS))
    z = mu * inverse_theta
    ratio = 1.0 + z
    log1p_z = tl.log(ratio) + (z - (ratio - 1.0)) * ((theta + _EPS) * inverse_t)
    value = -theta * log1p_z
    saturation = mu * inverse_t
    d_mu = -theta * saturation
    d_theta = value
    if D_THETA:
        d_theta = _saturation_minus_log1p(z, saturation, log1p_z)
        d_theta = theta * (d_theta - saturation * (_EPS * inverse_theta))
    if LIKELIHOOD == "nb":
        return value, d_mu, d_theta, value

    of_zero = value
    s = of_zero - d
    e_s = tl.exp(-tl.abs(s))
    e_d = tl.exp(-tl.abs(d))
    inverse = 1.0 / ((1.0 + e_s) * (1.0 + e_d))
    inverse_s = inverse * (1.0 + e_d)
    if VALUE:
        # softplus(s) - softplus(-d), its linear parts subtracted before they are rounded
        relative = (e_s - e_d) * (inverse * (1.0 + e_s))
        ratio = 1.0 + relative
        logarithm = tl.log(ratio) + (relative - (ratio - 1.0)) * ((1.0 + e_d) * inverse_s)
        value = tl.maximum(of_zero, tl.minimum(d, 0.0)) + logarithm
    sigmoid_s = tl.where(s >= 0.0, 1.0, e_s) * inverse_s
    # sigmoid(-d) - sigmoid(s), as a product
    d_dropout = tl.where(s >= 0.0, e_s, 1.0) * (tl.where(d >= 0.0, e_d, 1.0) * inverse)
    return value, d_mu * sigmoid_s, d_theta * sigmoid_s, d_dropout * -expm1(of_zero)


@triton.jit
def _tile(matrix, rows, row_mask, n_hidden, HIDDEN: tl.constexpr):
    """All hidden units of some rows of (rows, n_hidden)."""
    units = tl.arange(0, HIDDEN)
    mask = row_mask[:, None] & (units < n_hidden)[None, :]
    offsets = rows.to(tl.int64)[:, None] * n_hidden + units[None, :]
    return tl.load(matrix + offsets, mask=mask, other=0.0)


@triton.jit
def _products(
    hidden,
    weight,
    chunk,
    rows,
    columns,
    genes,
    row_mask,
    gene_mask,
    n_columns,
    n_hidden,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTSIDE: tl.constexpr,
):
    """Products of hidden units and a head's weight for a tile: taken here, or read from ``chunk``.

    ``columns`` of the chunk are ``genes`` of all. ``OUTSIDE`` of the matrix the products are that.
    """
    inside = row_mask[:, None] & gene_mask[None, :]
    if FUSED:
        products = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
        row_offsets = rows.to(tl.int64)[:, None] * n_hidden
        gene_offsets = genes.to(tl.int64)[None, :] * n_hidden
        for start in range(0, n_hidden, 32):  # a loop, lest registers hold whole operands
            units = start + tl.arange(0, 32)
            mask = row_mask[:, None] & (units < n_hidden)[None, :]
            a = tl.load(hidden + row_offsets + units[None, :], mask=mask, other=0.0)
            mask = gene_mask[None, :] & (units < n_hidden)[:, None]
            b = tl.load(weight + gene_offsets + units[:, None], mask=mask, other=0.0)
            products = dot(a, b, products, PRECISION)
        return tl.where(inside, products, OUTSIDE)
    else:
        offsets = rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
        return tl.load(chunk + offsets, mask=inside, other=OUTSIDE)


@triton.jit
def _logits(products, bias, genes, gene_mask):
    if bias is not None:
        products += tl.load(bias + genes, mask=gene_mask, other=0.0)[None, :]
    return products


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
def _of_theta(log_theta, theta, WHAT: tl.constexpr):
    """Compute a function of the inverse dispersion: Binet's, the slope of that, or the inverse."""
    if WHAT == "inverse":
        return 1.0 / (theta + _EPS)
    else:
        # below that the inverse may not be finite, and the limits are taken
        tiny = log_theta < -80.0
        inverse = 1.0 / tl.where(tiny, 1.0, theta)
        if WHAT == "slope":
            return tl.where(tiny, 0.5, _binet_slope(theta, inverse))
        else:
            return tl.where(tiny, -0.5 * log_theta - 0.918938533, _binet(theta, inverse))


@triton.jit
def _gene_numbers(r, numbers, n_genes, a_row, GENES: tl.constexpr):
    """Compute what :func:`_dispersion` takes of each gene: four numbers, rows of ``numbers``."""
    genes = tl.program_id(0) * GENES + tl.arange(0, GENES)
    gene_mask = genes < n_genes
    log_theta = tl.load(r + genes, mask=gene_mask, other=0.0)
    theta = tl.exp(log_theta)
    tl.store(numbers + genes, theta, mask=gene_mask)
    numbers += a_row
    tl.store(numbers + genes, _of_theta(log_theta, theta, "binet"), mask=gene_mask)
    numbers += a_row
    tl.store(numbers + genes, _of_theta(log_theta, theta, "slope"), mask=gene_mask)
    numbers += a_row
    tl.store(numbers + genes, _of_theta(log_theta, theta, "inverse"), mask=gene_mask)


@triton.jit
def _dispersion(
    r,
    r_bias,
    thetas,
    of_thetas,
    rows,
    columns,
    genes,
    row_mask,
    gene_mask,
    r_rows,
    r_row,
    r_gene,
    R_BY_GENE: tl.constexpr,
    WHAT: tl.constexpr,
):
    """Logarithm of a tile's inverse dispersion, itself, and a function of it (:func:`_of_theta`).

    By gene alone, and then read from ``thetas`` and ``of_thetas``, or by row, of which there are
    ``r_rows``.
    """
    if R_BY_GENE:
        log_theta = tl.load(r + genes, mask=gene_mask, other=0.0)[None, :]
        theta = tl.load(thetas + genes, mask=gene_mask, other=1.0)[None, :]
        of_theta = tl.load(of_thetas + genes, mask=gene_mask, other=0.0)[None, :]
    else:
        row_offsets = (rows % r_rows).to(tl.int64) * r_row
        offsets = row_offsets[:, None] + columns.to(tl.int64)[None, :] * r_gene
        inside = row_mask[:, None] & gene_mask[None, :]
        log_theta = tl.load(r + offsets, mask=inside, other=0.0)
        if r_bias is not None:
            log_theta += tl.load(r_bias + genes, mask=gene_mask, other=0.0)[None, :]
        theta = tl.exp(log_theta)
        of_theta = _of_theta(log_theta, theta, WHAT)
    return log_theta, theta, of_theta


@triton.jit
def _bad(counts):
    """2 where a count is negative or NaN, else 1 where it is infinite, else 0."""
    return tl.where(counts >= 0.0, tl.where(counts < float("inf"), 0, 1), 2)


@triton.jit
def _counts(x, rows, columns, row_mask, gene_mask, n_cells, x_row, x_gene):
    """Load counts; with them 2 if one is negative or NaN, else 1 if one is infinite, else 0."""
    row_offsets = (rows % n_cells).to(tl.int64) * x_row
    offsets = row_offsets[:, None] + columns.to(tl.int64)[None, :] * x_gene
    inside = row_mask[:, None] & gene_mask[None, :]
    counts = tl.load(x + offsets, mask=inside, other=0).to(tl.float32)
    # scvi-tools takes anything up to 1e-8 for zero
    return tl.where(counts > _EPS, counts, 0.0), tl.max(_bad(counts))


@triton.jit
def _add(total, rest, value):
    """Add to a sum, and to the rest that its rounding leaves (Knuth's two-sum)."""
    result = total + value
    virtual = result - total
    return result, rest + ((total - (result - virtual)) + (value - virtual))


@triton.jit
def _add_short(total, excess, value):
    """Add to a sum, and to the excess of its rounding: Kahan's sum, less exact, but shorter."""
    value -= excess
    result = total + value
    return result, (result - total) - value


@triton.jit
def _log_sum_exp(
    hidden,
    weight,
    bias,
    chunk,
    maxima,
    sums,
    n_rows,
    first_gene,
    n_columns,
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
    for start in range(first, tl.minimum(first + genes_a_split, n_columns), GENES):
        columns = start + tl.arange(0, GENES)
        genes = first_gene + columns
        gene_mask = columns < n_columns
        a = _products(
            hidden, weight, chunk, rows, columns, genes, row_mask, gene_mask, n_columns, n_hidden,
            FUSED, PRECISION, _NO_MEAN,
        )  # fmt: skip
        a = _logits(a, bias, genes, gene_mask)
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
    first_gene,
    n_columns,
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
    """Log-likelihood, and its derivative by log(mu), of some rows over one split of the genes.

    Without ``x`` all counts are zero, or the mean is.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_rows
    row_shift = tl.load(shift + rows, mask=row_mask, other=0.0)
    log_prob = tl.zeros((ROWS,), tl.float32)
    log_prob_rest = tl.zeros((ROWS,), tl.float32)
    usum = tl.zeros((ROWS,), tl.float32)
    usum_rest = tl.zeros((ROWS,), tl.float32)
    any_bad = 0
    first = tl.program_id(1) * genes_a_split
    for start in range(first, tl.minimum(first + genes_a_split, n_columns), GENES):
        columns = start + tl.arange(0, GENES)
        genes = first_gene + columns
        gene_mask = columns < n_columns
        a = _products(
            hidden, scale_weight, scale_chunk, rows, columns, genes, row_mask, gene_mask,
            n_columns, n_hidden, FUSED, PRECISION, _NO_MEAN,
        )  # fmt: skip
        a = _logits(a, scale_bias, genes, gene_mask)
        log_mu, mu = _mean(a, row_shift, SOFTMAX)
        theta, log_theta, of_theta, d = mu, mu, mu, mu
        if LIKELIHOOD != "poisson":
            log_theta, theta, of_theta = _dispersion(
                r, r_bias, thetas, of_thetas, rows, columns, genes, row_mask, gene_mask, r_rows,
                r_row, r_gene, R_BY_GENE, "inverse" if x is None else "binet",
            )  # fmt: skip
        if LIKELIHOOD == "zinb":
            d = _products(
                hidden, dropout_weight, dropout_chunk, rows, columns, genes, row_mask, gene_mask,
                n_columns, n_hidden, FUSED, PRECISION, 0.0,
            )  # fmt: skip
            d = _logits(d, dropout_bias, genes, gene_mask)
        if x is None:
            value, u, _, _ = _terms_of_zero(mu, theta, of_theta, d, LIKELIHOOD, True, False)
        else:
            counts, tile_bad = _counts(
                x, rows, columns, row_mask, gene_mask, n_cells, x_row, x_gene
            )
            any_bad = tl.maximum(any_bad, tile_bad)
            value, u, _, _ = _terms(
                counts, log_mu, mu, theta, log_theta, of_theta, of_theta, d, LIKELIHOOD,
                FRACTIONS, True, False,
            )  # fmt: skip
        log_prob, log_prob_rest = _add(log_prob, log_prob_rest, tl.sum(value, 1))
        usum, usum_rest = _add(usum, usum_rest, tl.sum(u, 1))
    offsets = tl.program_id(1).to(tl.int64) * n_rows + rows
    tl.store(log_probs + offsets, log_prob + log_prob_rest, mask=row_mask)
    tl.store(usums + offsets, usum + usum_rest, mask=row_mask)
    if bad is not None:
        tl.store(bad + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), any_bad)


@triton.jit
def _row_of_csr(crow, cell, n_values):
    """First position of a row and the one behind its last, within the values whatever it says."""
    start = tl.minimum(tl.maximum(tl.load(crow + cell).to(tl.int64), 0), n_values)
    return start, tl.minimum(tl.load(crow + cell + 1).to(tl.int64), n_values)


@triton.jit
def _block_of_csr(col, totals, block, stop, first_gene, n_columns, BLOCK: tl.constexpr):
    """Columns of the chunk, and counts, of a block; which are of the chunk and not zero."""
    positions = block + tl.arange(0, BLOCK)
    inside = positions < stop
    columns = tl.load(col + positions, mask=inside, other=0).to(tl.int64) - first_gene
    wanted = inside & (columns >= 0) & (columns < n_columns)
    counts = tl.load(totals + positions, mask=wanted, other=0.0)
    return columns, counts, wanted & (counts > _EPS)


@_jit_for_csr
def _likelihood_of_nonzeros(
    crow,
    col,
    totals,
    shift,
    scale_bias,
    dropout_bias,
    r,
    r_bias,
    thetas,
    of_thetas,
    scale_chunk,
    dropout_chunk,
    log_probs,
    usums,
    n_values,
    first_gene,
    n_rows,
    n_cells,
    n_columns,
    r_rows,
    r_row,
    r_gene,
    R_BY_GENE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    FRACTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum what :func:`_likelihood` does, over a part of one row's non-zeros.

    Their logits are overwritten with those of a mean of zero.
    """
    rows = tl.program_id(0) + tl.arange(0, 1)
    row_mask = rows < n_rows
    row_shift = tl.load(shift + rows, mask=row_mask, other=0.0)
    log_prob = tl.zeros((1, BLOCK), tl.float32)
    log_prob_rest = tl.zeros((1, BLOCK), tl.float32)
    usum = tl.zeros((1, BLOCK), tl.float32)
    usum_rest = tl.zeros((1, BLOCK), tl.float32)
    start, stop = _row_of_csr(crow, tl.program_id(0) % n_cells, n_values)
    for block in range(start + tl.program_id(1) * BLOCK, stop, tl.num_programs(1) * BLOCK):
        columns, counts, wanted = _block_of_csr(
            col, totals, block, stop, first_gene, n_columns, BLOCK
        )
        genes = first_gene + columns
        if tl.max(wanted.to(tl.int32)) > 0:
            a = _products(
                None, None, scale_chunk, rows, columns, genes, row_mask, wanted, n_columns, 0,
                False, "ieee", 0.0,
            )  # fmt: skip
            a = _logits(a, scale_bias, genes, wanted)
            log_mu, mu = _mean(a, row_shift, SOFTMAX)
            theta, log_theta, binet_theta, d = mu, mu, mu, mu
            if LIKELIHOOD != "poisson":
                log_theta, theta, binet_theta = _dispersion(
                    r, r_bias, thetas, of_thetas, rows, columns, genes, row_mask, wanted, r_rows,
                    r_row, r_gene, R_BY_GENE, "binet",
                )  # fmt: skip
            if LIKELIHOOD == "zinb":
                d = _products(
                    None, None, dropout_chunk, rows, columns, genes, row_mask, wanted, n_columns,
                    0, False, "ieee", 0.0,
                )  # fmt: skip
                d = _logits(d, dropout_bias, genes, wanted)
            value, u, _, _ = _terms(
                counts[None, :], log_mu, mu, theta, log_theta, binet_theta, binet_theta, d,
                LIKELIHOOD, FRACTIONS, True, False,
            )  # fmt: skip
            value = tl.where(wanted[None, :], value, 0.0)
            log_prob, log_prob_rest = _add(log_prob, log_prob_rest, value)
            usum, usum_rest = _add(usum, usum_rest, tl.where(wanted[None, :], u, 0.0))
            offsets = rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
            tl.debug_barrier()  # other threads may have to read the same logits yet
            tl.store(scale_chunk + offsets, _NO_MEAN, mask=wanted[None, :])
    offsets = tl.program_id(1).to(tl.int64) * n_rows + rows
    tl.store(log_probs + offsets, tl.sum(log_prob + log_prob_rest, 1), mask=row_mask)
    tl.store(usums + offsets, tl.sum(usum + usum_rest, 1), mask=row_mask)


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
    of_theta,
    d,
    SOFTMAX: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    FRACTIONS: tl.constexpr,
    D_R: tl.constexpr,
):
    """Gradients of the loss by logits, log dispersion and dropout logits of a tile.

    Where ``counts`` is None all are zero, and ``of_theta`` is the inverse instead of the slope.
    """
    scale = tl.exp(a + row_shift[:, None]) if SOFTMAX else softplus(a)
    mu = scale * row_factor[:, None]
    if counts is None:
        _, u, d_r, d_dropout = _terms_of_zero(mu, theta, of_theta, d, LIKELIHOOD, False, D_R)
    else:
        _, u, d_r, d_dropout = _terms(
            counts, mu, mu, theta, log_theta, of_theta, of_theta, d, LIKELIHOOD, FRACTIONS,
            False, D_R,
        )  # fmt: skip
    if SOFTMAX:
        u -= scale * row_usum[:, None]
    else:
        # d log(softplus(a)) / da, which tends to 1 where both underflow
        capped = tl.maximum(a, -80.0)
        u *= sigmoid(capped) / softplus(capped)
    weight = row_weight[:, None]
    return u * weight, d_r * weight, d_dropout * weight


@_jit_for_csr
def _gradients_of_nonzeros(
    crow,
    col,
    totals,
    row_numbers,
    scale_bias,
    dropout_bias,
    r,
    r_bias,
    thetas,
    of_thetas,
    scale_chunk,
    dropout_chunk,
    marks,
    n_values,
    first_gene,
    n_rows,
    n_cells,
    n_columns,
    r_rows,
    r_row,
    r_gene,
    R_BY_GENE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    FRACTIONS: tl.constexpr,
    D_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of a part of one row's non-zeros, written over their logits and into ``marks``."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    row_mask = rows < n_rows
    row_shift, row_factor, row_usum, row_weight = _load_row_numbers(
        row_numbers, rows, row_mask, n_rows
    )
    start, stop = _row_of_csr(crow, tl.program_id(0) % n_cells, n_values)
    for block in range(start + tl.program_id(1) * BLOCK, stop, tl.num_programs(1) * BLOCK):
        columns, counts, wanted = _block_of_csr(
            col, totals, block, stop, first_gene, n_columns, BLOCK
        )
        genes = first_gene + columns
        if tl.max(wanted.to(tl.int32)) > 0:
            a = _products(
                None, None, scale_chunk, rows, columns, genes, row_mask, wanted, n_columns, 0,
                False, "ieee", 0.0,
            )  # fmt: skip
            a = _logits(a, scale_bias, genes, wanted)
            theta, log_theta, slope_theta, d = a, a, a, a
            if LIKELIHOOD != "poisson":
                log_theta, theta, slope_theta = _dispersion(
                    r, r_bias, thetas, of_thetas, rows, columns, genes, row_mask, wanted, r_rows,
                    r_row, r_gene, R_BY_GENE, "slope",
                )  # fmt: skip
            if LIKELIHOOD == "zinb":
                d = _products(
                    None, None, dropout_chunk, rows, columns, genes, row_mask, wanted, n_columns,
                    0, False, "ieee", 0.0,
                )  # fmt: skip
                d = _logits(d, dropout_bias, genes, wanted)
            d_a, d_log_theta, d_d = _gradients(
                a, row_shift, row_factor, row_usum, row_weight, counts[None, :], log_theta, theta,
                slope_theta, d, SOFTMAX, LIKELIHOOD, FRACTIONS, D_R,
            )  # fmt: skip
            inside = wanted[None, :]
            offsets = rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
            tl.store(scale_chunk + offsets, d_a, mask=inside)
            if LIKELIHOOD == "zinb":
                tl.store(dropout_chunk + offsets, d_d, mask=inside)
            if D_R:
                negligible = tl.abs(d_log_theta) < _MARK_OF_ZERO
                mark = tl.where(negligible, _MARK_OF_ZERO, d_log_theta)
            else:
                mark = tl.full((1, BLOCK), _MARK_OF_ZERO, tl.float32)
            tl.store(marks + offsets, mark, mask=inside)


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
    marks,
    r_chunk,
    d_weight,
    d_scale_bias,
    d_dropout_bias,
    d_r,
    n_rows,
    n_cells,
    first_gene,
    n_columns,
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
    given) with their gradients; without ``x`` all counts are zero, but for those that ``marks`` say
    have their gradients already.
    """
    columns = tl.program_id(0) * GENES + tl.arange(0, GENES)
    genes = first_gene + columns
    gene_mask = columns < n_columns
    if FUSED:
        products = tl.zeros((GENES, HIDDEN), tl.float32)
    # By element: sums over a tile's rows would make the threads wait for one another.
    scale_sum = tl.zeros((ROWS, GENES), tl.float32)
    scale_excess = tl.zeros((ROWS, GENES), tl.float32)
    dropout_sum = tl.zeros((ROWS, GENES), tl.float32)
    dropout_excess = tl.zeros((ROWS, GENES), tl.float32)
    r_sum = tl.zeros((ROWS, GENES), tl.float32)
    r_excess = tl.zeros((ROWS, GENES), tl.float32)
    first = tl.program_id(1) * rows_a_split
    for start in range(first, tl.minimum(first + rows_a_split, n_rows), ROWS):
        rows = start + tl.arange(0, ROWS)
        row_mask = rows < n_rows
        inside = row_mask[:, None] & gene_mask[None, :]
        chunk_offsets = rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
        counts = None
        if x is not None:
            counts, _ = _counts(x, rows, columns, row_mask, gene_mask, n_cells, x_row, x_gene)
        scale_products = _products(
            hidden, scale_weight, scale_chunk, rows, columns, genes, row_mask, gene_mask,
            n_columns, n_hidden, FUSED, PRECISION, _NO_MEAN,
        )  # fmt: skip
        a = _logits(scale_products, scale_bias, genes, gene_mask)
        row_shift, row_factor, row_usum, row_weight = _load_row_numbers(
            row_numbers, rows, row_mask, n_rows
        )
        theta, log_theta, of_theta, d = a, a, a, a
        if LIKELIHOOD != "poisson":
            log_theta, theta, of_theta = _dispersion(
                r, r_bias, thetas, of_thetas, rows, columns, genes, row_mask, gene_mask, r_rows,
                r_row, r_gene, R_BY_GENE, "inverse" if x is None else "slope",
            )  # fmt: skip
        if LIKELIHOOD == "zinb":
            dropout_products = _products(
                hidden, dropout_weight, dropout_chunk, rows, columns, genes, row_mask, gene_mask,
                n_columns, n_hidden, FUSED, PRECISION, 0.0,
            )  # fmt: skip
            d = _logits(dropout_products, dropout_bias, genes, gene_mask)
        d_a, d_log_theta, d_d = _gradients(
            a, row_shift, row_factor, row_usum, row_weight, counts, log_theta, theta, of_theta,
            d, SOFTMAX, LIKELIHOOD, FRACTIONS, D_R,
        )  # fmt: skip
        if x is None:
            mark = tl.load(marks + chunk_offsets, mask=inside, other=0.0)
            done = mark != 0.0
            d_a = tl.where(done, scale_products, d_a)
            if LIKELIHOOD == "zinb":
                d_d = tl.where(done, dropout_products, d_d)
            if D_R:
                d_log_theta = tl.where(done, mark, d_log_theta)
                d_log_theta = tl.where(mark == _MARK_OF_ZERO, 0.0, d_log_theta)
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
        if d_scale_bias is not None:
            scale_sum, scale_excess = _add_short(scale_sum, scale_excess, d_a)
        if d_dropout_bias is not None:
            dropout_sum, dropout_excess = _add_short(dropout_sum, dropout_excess, d_d)
        if d_r is not None:
            r_sum, r_excess = _add_short(r_sum, r_excess, d_log_theta)
    split_columns = tl.program_id(1).to(tl.int64) * n_columns + columns
    if d_scale_bias is not None:
        tl.store(d_scale_bias + split_columns, tl.sum(scale_sum, 0), mask=gene_mask)
    if d_dropout_bias is not None:
        tl.store(d_dropout_bias + split_columns, tl.sum(dropout_sum, 0), mask=gene_mask)
    if d_r is not None:
        tl.store(d_r + split_columns, tl.sum(r_sum, 0), mask=gene_mask)
    if FUSED:
        units = tl.arange(0, HIDDEN)
        stored = gene_mask[:, None] & (units < n_hidden)[None, :]
        offsets = split_columns[:, None] * n_hidden + units[None, :]
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
    first_gene,
    n_columns,
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
    for start in range(first, tl.minimum(first + genes_a_split, n_columns), GENES):
        columns = start + tl.arange(0, GENES)
        genes = first_gene + columns
        gene_mask = columns < n_columns
        a = _products(
            hidden, scale_weight, None, rows, columns, genes, row_mask, gene_mask, n_columns,
            n_hidden, True, PRECISION, _NO_MEAN,
        )  # fmt: skip
        a = _logits(a, scale_bias, genes, gene_mask)
        counts, _ = _counts(x, rows, columns, row_mask, gene_mask, n_cells, x_row, x_gene)
        theta, log_theta, d = a, a, a
        if LIKELIHOOD != "poisson":
            log_theta, theta, _ = _dispersion(
                r,
                None,
                thetas,
                of_thetas,
                rows,
                columns,
                genes,
                row_mask,
                gene_mask,
                1,
                0,
                1,
                True,
                "slope",
            )
        if LIKELIHOOD == "zinb":
            d = _products(
                hidden, dropout_weight, None, rows, columns, genes, row_mask, gene_mask, n_columns,
                n_hidden, True, PRECISION, 0.0,
            )  # fmt: skip
            d = _logits(d, dropout_bias, genes, gene_mask)
        d_a, _, d_d = _gradients(
            a, row_shift, row_factor, row_usum, row_weight, counts, log_theta, theta, theta, d,
            SOFTMAX, LIKELIHOOD, FRACTIONS, False,
        )  # fmt: skip
        scale_tile = _tile(scale_weight, genes, gene_mask, n_hidden, HIDDEN)
        products = dot(d_a, scale_tile, products, PRECISION)
        if LIKELIHOOD == "zinb":
            dropout_tile = _tile(dropout_weight, genes, gene_mask, n_hidden, HIDDEN)
            products = dot(d_d, dropout_tile, products, PRECISION)
    units = tl.arange(0, HIDDEN)
    offsets = (tl.program_id(1).to(tl.int64) * n_rows + rows)[:, None] * n_hidden + units[None, :]
    tl.store(d_hidden + offsets, products, mask=row_mask[:, None] & (units < n_hidden)[None, :])


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


@_jit_for_csr
def _canonical(
    crow,
    col,
    values,
    totals,
    bad_indices,
    bad_counts,
    n_values,
    n_genes,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Write one cell's counts, as float32, and where a column repeats their sum and zeros.

    Columns may be in any order, which takes longer. What the row pointers and columns say is held
    against the sizes of the tensors: a lie is reported, and nothing read outside.
    """
    cell = tl.program_id(0)
    start = tl.load(crow + cell).to(tl.int64)
    stop = tl.load(crow + cell + 1).to(tl.int64)
    lies = ((start < 0) | (stop < start) | (stop > n_values)).to(tl.int32)
    if cell == 0:
        lies = tl.maximum(lies, (start != 0).to(tl.int32))
    if cell == tl.num_programs(0) - 1:
        lies = tl.maximum(lies, (stop != n_values).to(tl.int32))
    start, stop = _row_of_csr(crow, cell, n_values)
    unordered = 0
    any_bad = 0
    for block in range(start, stop, BLOCK):
        positions = block + tl.arange(0, BLOCK)
        inside = positions < stop
        genes = tl.load(col + positions, mask=inside, other=0).to(tl.int64)
        lies = tl.maximum(lies, tl.max((inside & ((genes < 0) | (genes >= n_genes))).to(tl.int32)))
        before = tl.load(col + positions - 1, mask=inside & (positions > start), other=-1)
        unordered = tl.maximum(unordered, tl.max((inside & (genes <= before)).to(tl.int32)))
        counts = tl.load(values + positions, mask=inside, other=0).to(tl.float32)
        any_bad = tl.maximum(any_bad, tl.max(_bad(counts)))
        tl.store(totals + positions, counts, mask=inside)
    if unordered > 0:
        any_bad = 0
        for block in range(start, stop, BLOCK):
            positions = block + tl.arange(0, BLOCK)
            inside = positions < stop
            genes = tl.load(col + positions, mask=inside, other=-1)
            total = tl.zeros((BLOCK,), tl.float32)
            repeated = tl.zeros((BLOCK,), tl.int32)
            for block_of_others in range(start, stop, OTHERS):
                others = block_of_others + tl.arange(0, OTHERS)
                inside_too = others < stop
                theirs = tl.load(col + others, mask=inside_too, other=-2)
                counts = tl.load(values + others, mask=inside_too, other=0).to(tl.float32)
                same = genes[:, None] == theirs[None, :]
                total += tl.sum(tl.where(same, counts[None, :], 0.0), 1)
                same &= others[None, :] < positions[:, None]
                repeated = tl.maximum(repeated, tl.max(same.to(tl.int32), 1))
            any_bad = tl.maximum(any_bad, tl.max(_bad(tl.where(inside, total, 0.0))))
            tl.store(totals + positions, tl.where(repeated > 0, 0.0, total), mask=inside)
    tl.store(bad_indices + cell, lies)
    tl.store(bad_counts + cell, any_bad)


@_jit_for_csr
def _scatter(crow, col, totals, dense, n_values, first_gene, n_columns, BLOCK: tl.constexpr):
    """Write one cell's counts of a chunk of genes into ``dense``, which holds zeros."""
    cell = tl.program_id(0)
    start, stop = _row_of_csr(crow, cell, n_values)
    for block in range(start, stop, BLOCK):
        columns, counts, counted = _block_of_csr(
            col, totals, block, stop, first_gene, n_columns, BLOCK
        )
        tl.store(dense + cell.to(tl.int64) * n_columns + columns, counts, mask=counted)


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


def _split_size(n: int, tile: int, other_programs: int, *, fused: bool) -> int:
    """Size of the splits of ``n`` that fill the GPU: a multiple of ``tile``."""
    tiles = cdiv(n, tile)
    programs = _FUSED_PROGRAMS if fused else _PROGRAMS
    splits = max(1, min(tiles, programs // max(1, other_programs)))
    return cdiv(tiles, splits) * tile


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _Chunk(NamedTuple):
    """Some genes: their number among the chunks, the first of them, and how many there are."""

    number: int
    start: int
    size: int

    @property
    def genes(self) -> slice:
        return slice(self.start, self.start + self.size)


class _Dispersion(NamedTuple):
    """Log inverse dispersion as the kernels read it: of all genes, or of a chunk's."""

    log_theta: Tensor | None
    bias: Tensor | None
    #: Rows of :func:`_gene_numbers`, if it is by gene.
    numbers: tuple[Tensor, ...] | None
    #: Its rows, and its strides.
    layout: tuple[int, int, int]

    @property
    def by_gene(self) -> bool:
        return self.log_theta is None or self.numbers is not None

    def tensors(self, function: Literal["binet", "slope", "inverse"]) -> list[Tensor | None]:
        """Return it, its bias, and by gene its exponential and a function of that."""
        if self.numbers is None:
            return [self.log_theta, self.bias, None, None]
        theta, *others = self.numbers
        of_theta = others[("binet", "slope", "inverse").index(function)]
        return [self.log_theta, self.bias, theta, of_theta]


class _Problem:
    """The inputs as the kernels read them, and the route that they take.

    What every chunk needs is made once: on a GPU, the time of small problems is that of Python.
    """

    def __init__(self, inputs: Inputs, *, checked: bool = False) -> None:
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
        self.hidden_tile = max(16, next_power_of_2(self.n_hidden)) if self.fused else 16
        heads = {
            name: weight.contiguous()
            for name in ("scale", "dropout", "r")
            if (weight := getattr(inputs, f"{name}_weight")) is not None
        }
        self.has_table = inputs.px_r_index is not None
        csr = inputs.counts.dense is None
        if self.fused:
            numbers = self.n_cells * csr
        else:
            numbers = self.n_rows * (len(heads) + self.has_table + csr)
        fitting = CHUNK_BYTES // (4 * numbers) if numbers else self.n_genes
        fitting = max(fitting, cdiv(self.n_genes, MAX_CHUNKS) + 63)
        # A multiple of 64 genes keeps every chunk's first address aligned.
        step = max(64, min(fitting, cdiv(self.n_genes, 64) * 64) // 64 * 64)
        starts = range(0, self.n_genes, step)
        self.chunks = [_Chunk(i, g, min(step, self.n_genes - g)) for i, g in enumerate(starts)]
        #: Weights of the heads whose products the kernels take.
        self.weights: dict[str, Tensor] = heads if self.fused else {}
        #: Weights of the others, chunk by chunk.
        self.heads = {} if self.fused else {head: w.split(step) for head, w in heads.items()}
        self.transposed = {
            head: [weight.t() for weight in weights] for head, weights in self.heads.items()
        }
        #: Scale's bias, dropout's bias.
        self.biases = (_contiguous(inputs.scale_bias), _contiguous(inputs.dropout_bias))
        self.r_bias = _contiguous(inputs.r_bias)
        self.by_gene = self._by_gene()
        self.csr = self._canonical_csr(checked) if csr else None
        #: Whether other kernels than those of a chunk's zeros take its non-zeros.
        self.zeros_apart = csr and not self.fused
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int], Tensor] = {}

    def _by_gene(self) -> _Dispersion | None:
        """Compute what the kernels want of a dispersion by gene."""
        px_r = self.inputs.px_r
        if px_r is None and "r" not in self.heads:
            return _Dispersion(None, None, None, (1, 0, 1))
        if px_r is None or self.has_table:
            return None
        px_r = px_r.contiguous()
        numbers = self.hidden.new_empty(4, cdiv(self.n_genes, 64) * 64)
        launch(
            _gene_numbers,
            (cdiv(self.n_genes, 256),),
            px_r,
            numbers,
            self.n_genes,
            numbers.shape[1],
            GENES=256,
            num_warps=4,
        )
        return _Dispersion(px_r, None, numbers.unbind(), (1, 0, 1))

    def _canonical_csr(self, checked: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return row pointers, columns, and counts without repetitions; ``checked``, or else do."""
        counts = self.inputs.counts
        crow, col = counts.crow.contiguous(), counts.col.contiguous()
        n_values = counts.values.numel()
        totals = self.hidden.new_empty(n_values)
        # without cells nothing is launched
        bad_indices, bad_counts = torch.zeros(
            2, self.n_cells, dtype=torch.int32, device=totals.device
        ).unbind()
        launch(
            _canonical,
            (self.n_cells,),
            crow,
            col,
            counts.values.contiguous(),
            totals,
            bad_indices,
            bad_counts,
            n_values,
            self.n_genes,
            BLOCK=128,
            OTHERS=16,
            num_warps=4,
        )
        if not checked:
            counts.require_indices(bad_indices)
            counts.require_counts(bad_counts)
        return crow, col, totals

    def tile(self, chunked: dict[str, dict[str, int]]) -> dict[str, int]:
        """Return the tile of the route; ``chunked`` has those of a dispersion by gene or row."""
        if self.fused:
            return _FUSED_TILE
        return chunked["row" if self.by_gene is None else "gene"]

    def buffer(self, name: str, n_rows: int, chunk: _Chunk) -> Tensor:
        """Return a (rows, genes of the chunk) matrix, in memory that all chunks share."""
        key = name, chunk.size
        if key not in self._views:
            if name not in self._buffers:
                self._buffers[name] = self.hidden.new_empty(n_rows * self.chunks[0].size)
            flat = self._buffers[name][: n_rows * chunk.size]
            self._views[key] = flat.view(n_rows, chunk.size)
        return self._views[key]

    def logits(self, head: str, chunk: _Chunk) -> Tensor | None:
        """Logits of a head, less its bias, for a chunk; None on the route that needs none."""
        if head not in self.heads:
            return None
        out = self.buffer(head, self.n_rows, chunk)
        return torch.mm(self.hidden, self.transposed[head][chunk.number], out=out)

    def dispersion(self, chunk: _Chunk) -> _Dispersion:
        """Return the log inverse dispersion of a chunk."""
        if self.by_gene is not None:
            return self.by_gene
        if (logits := self.logits("r", chunk)) is not None:
            return _Dispersion(logits, self.r_bias, None, (self.n_rows, chunk.size, 1))
        table, labels = self.inputs.px_r, self.inputs.px_r_index
        assert table is not None
        assert labels is not None
        looked_up = table[chunk.genes].index_select(1, labels)
        return _Dispersion(looked_up, None, None, (self.n_cells, 1, self.n_cells))

    def counts(self, chunk: _Chunk) -> tuple[Tensor | None, int, int]:
        """Return the counts of a chunk, dense, and their strides; None where zeros are apart."""
        if self.zeros_apart:
            return None, 0, 0
        if self.csr is None:
            assert self.inputs.counts.dense is not None
            dense = self.inputs.counts.dense[:, chunk.genes]
        else:
            dense = self.buffer("counts", self.n_cells, chunk).zero_()
            launch(
                _scatter,
                (self.n_cells,),
                *self.csr,
                dense,
                self.csr[1].numel(),
                chunk.start,
                chunk.size,
                BLOCK=512,
                num_warps=4,
            )
        return dense, dense.stride(0), dense.stride(1)

    def nonzero_parts(self) -> int:
        """Into how many parts each row's non-zeros are split; 0 where none are apart."""
        if not self.zeros_apart:
            return 0
        assert self.csr is not None
        blocks = self.csr[1].numel() // (_NONZEROS["BLOCK"] * max(1, self.n_cells))
        return max(1, min(blocks, 2 * _PROGRAMS // max(1, self.n_rows)))

    def launch_nonzeros(
        self, kernel: Any, chunk: _Chunk, *args: Any, layout: tuple[int, int, int], **options: Any
    ) -> None:
        """Launch a kernel that takes the non-zeros of a chunk."""
        assert self.csr is not None
        launch(
            kernel,
            (self.n_rows, self.nonzero_parts()),
            *self.csr,
            *args,
            self.csr[1].numel(),
            chunk.start,
            self.n_rows,
            self.n_cells,
            chunk.size,
            *layout,
            **options,
            **self.kinds,
            **_NONZEROS,
        )


# Tiles. Of the likelihood's many temporaries a thread holds those of 2 to 4 elements; more spill.
# With a dispersion by row ("row") there are more temporaries than with one by gene.
_TILE = {"ROWS": 8, "GENES": 64, "num_warps": 4}
_TILE_OF_LIKELIHOOD = {"gene": _TILE, "row": {**_TILE, "num_warps": 8}}
_TILE_OF_GRADIENTS = {"gene": {**_TILE, "maxnreg": 168}, "row": {**_TILE, "maxnreg": 208}}
_TILE_OF_LOG_SUM_EXP = {"ROWS": 4, "GENES": 512, "num_warps": 4}
_NONZEROS = {"BLOCK": 128, "num_warps": 4}
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
    scale_chunk = None
    shift = problem.library.clone()  # all of it under softplus
    if problem.softmax:
        scale_chunk = _find_shift(problem, shift)

    tile = problem.tile(_TILE_OF_LIKELIHOOD)
    row_tiles = cdiv(n_rows, tile["ROWS"])
    split = _split_size(problem.chunks[0].size, tile["GENES"], row_tiles, fused=problem.fused)
    # What the kernels sum, in the order in which they are launched.
    sizes = []
    for chunk in problem.chunks:
        if problem.zeros_apart:
            sizes.append(problem.nonzero_parts())
        sizes.append(cdiv(chunk.size, split))
    log_probs, usums = shift.new_empty(2, sum(sizes), n_rows).unbind()
    log_prob_parts, usum_parts = iter(log_probs.split(sizes)), iter(usums.split(sizes))
    bad, bad_parts = None, itertools.repeat(None)
    if problem.csr is None:
        bad = torch.empty(sum(sizes), row_tiles, dtype=torch.int32, device=shift.device)
        bad_parts = iter(bad.split(sizes))
    for chunk in problem.chunks:
        if scale_chunk is None or chunk.number:  # the first may be there already
            scale_chunk = problem.logits("scale", chunk)
        dropout_chunk = problem.logits("dropout", chunk)
        dispersion = problem.dispersion(chunk)
        if problem.zeros_apart:
            problem.launch_nonzeros(
                _likelihood_of_nonzeros,
                chunk,
                shift,
                *problem.biases,
                *dispersion.tensors("binet"),
                scale_chunk,
                dropout_chunk,
                next(log_prob_parts),
                next(usum_parts),
                layout=dispersion.layout,
                R_BY_GENE=dispersion.by_gene,
            )
        x, *x_strides = problem.counts(chunk)
        launch(
            _likelihood,
            (row_tiles, cdiv(chunk.size, split)),
            problem.hidden,
            shift,
            problem.weights.get("scale"),
            problem.biases[0],
            problem.weights.get("dropout"),
            problem.biases[1],
            *dispersion.tensors("inverse" if x is None else "binet"),
            x,
            scale_chunk,
            dropout_chunk,
            next(log_prob_parts),
            next(usum_parts),
            next(bad_parts),
            n_rows,
            problem.n_cells,
            chunk.start,
            chunk.size,
            problem.n_hidden,
            split,
            *dispersion.layout,
            *x_strides,
            R_BY_GENE=dispersion.by_gene,
            **problem.kinds,
            **problem.products,
            **tile,
        )
    if bad is not None:
        inputs.counts.require_counts(bad)
    return -log_probs.sum(0).view(shape), shift.view(shape), usums.sum(0).view(shape)


def _find_shift(problem: _Problem, shift: Tensor) -> Tensor | None:
    """Write library less log-sum-exp; return the logits of the first chunk, if that is all."""
    n_rows = problem.n_rows
    tile = _FUSED_TILE if problem.fused else _TILE_OF_LOG_SUM_EXP
    row_tiles = cdiv(n_rows, tile["ROWS"])
    split = _split_size(problem.chunks[0].size, tile["GENES"], row_tiles, fused=problem.fused)
    sizes = [cdiv(chunk.size, split) for chunk in problem.chunks]
    maxima, sums = shift.new_empty(2, sum(sizes), n_rows).unbind()
    scale_chunk = None
    for chunk, size, maximum, total in zip(
        problem.chunks, sizes, maxima.split(sizes), sums.split(sizes), strict=True
    ):
        scale_chunk = problem.logits("scale", chunk)
        launch(
            _log_sum_exp,
            (row_tiles, size),
            problem.hidden,
            problem.weights.get("scale"),
            problem.biases[0],
            scale_chunk,
            maximum,
            total,
            n_rows,
            chunk.start,
            chunk.size,
            problem.n_hidden,
            split,
            **problem.products,
            **tile,
        )
    launch(
        _shift,
        (cdiv(n_rows, 128),),
        maxima,
        sums,
        problem.library,
        shift,
        n_rows,
        sum(sizes),
        ROWS=128,
        num_warps=4,
    )
    return scale_chunk if len(problem.chunks) == 1 else None


class _Sums:
    """Gradients by gene that sum over rows: split by split, then the splits in order."""

    def __init__(self, problem: _Problem, names: list[str], n_splits: int) -> None:
        step = problem.chunks[0].size
        out = problem.hidden.new_empty(len(names), problem.n_genes)
        self.out = dict(zip(names, out.unbind(), strict=True))
        self._chunks = out.split(step, 1)
        self._splits = problem.hidden.new_empty(len(names) * n_splits * step)
        self._shape = len(names), n_splits

    def splits(self, chunk: _Chunk) -> Tensor:
        """Return memory for the sums of a chunk, (names, splits, genes)."""
        size = self._shape[0] * self._shape[1] * chunk.size
        return self._splits[:size].view(*self._shape, chunk.size)

    def finish(self, splits: Tensor, chunk: _Chunk) -> None:
        """Add up what was written there."""
        if self.out:
            torch.sum(splits, 1, out=self._chunks[chunk.number])


def _gradients_of_chunk(
    problem: _Problem,
    chunk: _Chunk,
    split: int,
    row_numbers: Tensor,
    cells_by_label: tuple[Tensor, Tensor] | None,
    sums: _Sums,
    out: dict[str, Tensor],
) -> None:
    """Compute ``sums`` and what ``out`` asks for; on the chunked route add to its ``hidden``."""
    n_rows = problem.n_rows
    tile = problem.tile(_TILE_OF_GRADIENTS)
    n_splits = cdiv(n_rows, split)

    dispersion = problem.dispersion(chunk)
    r_chunk = None
    if cells_by_label is not None:
        r_chunk = problem.buffer("d_r", n_rows, chunk)
    elif "r" in problem.heads and (sums.out.keys() | out.keys()) & _GRADIENTS_THROUGH_R:
        r_chunk = dispersion.log_theta  # each element is read before it is overwritten
    x, *x_strides = problem.counts(chunk)
    scale_chunk, dropout_chunk = (problem.logits(name, chunk) for name in ("scale", "dropout"))
    splits = sums.splits(chunk)
    parts = dict(zip(sums.out, splits.unbind(), strict=True))
    d_r_part = parts.get("r_bias", parts.get("px_r"))
    d_r = r_chunk is not None or d_r_part is not None
    marks = None
    if problem.zeros_apart:
        marks = problem.buffer("marks", n_rows, chunk).zero_()
        problem.launch_nonzeros(
            _gradients_of_nonzeros,
            chunk,
            row_numbers,
            *problem.biases,
            *dispersion.tensors("slope"),
            scale_chunk,
            dropout_chunk,
            marks,
            layout=dispersion.layout,
            R_BY_GENE=dispersion.by_gene,
            D_R=d_r,
        )
    weights = [head for head in problem.weights if f"{head}_weight" in out]
    for head in weights or [""]:  # the products of one head a launch, all else in the first
        products = None
        if head:
            products = problem.hidden.new_empty(n_splits, chunk.size, problem.n_hidden)
        launch(
            _gradients_by_gene,
            (cdiv(chunk.size, tile["GENES"]), n_splits),
            problem.hidden,
            row_numbers,
            problem.weights.get("scale"),
            problem.biases[0],
            problem.weights.get("dropout"),
            problem.biases[1],
            *dispersion.tensors("inverse" if x is None else "slope"),
            x,
            scale_chunk,
            dropout_chunk,
            marks,
            r_chunk,
            products,
            parts.get("scale_bias"),
            parts.get("dropout_bias"),
            d_r_part,
            n_rows,
            problem.n_cells,
            chunk.start,
            chunk.size,
            problem.n_hidden,
            split,
            *dispersion.layout,
            *x_strides,
            R_BY_GENE=dispersion.by_gene,
            **problem.kinds,
            D_R=d_r,
            DROPOUT_PRODUCTS=head == "dropout",
            HIDDEN=problem.hidden_tile,
            **problem.products,
            **tile,
        )
        if products is not None:
            torch.sum(products, 0, out=out[f"{head}_weight"][chunk.genes])
        parts, d_r_part = {}, None
    sums.finish(splits, chunk)
    if cells_by_label is not None:
        launch(
            _sum_by_label,
            (out["px_r"].shape[1], cdiv(chunk.size, 128)),
            r_chunk,
            *cells_by_label,
            out["px_r"][chunk.genes],
            problem.n_cells,
            n_rows // problem.n_cells,
            chunk.size,
            out["px_r"].shape[1],
            GENES=128,
            num_warps=1,
        )
    gradients = {"scale": scale_chunk, "dropout": dropout_chunk}
    if "r" in problem.heads:
        gradients["r"] = r_chunk
    for head, gradient in gradients.items():
        if gradient is None:
            continue
        if f"{head}_weight" in out:
            d_weight = out[f"{head}_weight"][chunk.genes]
            torch.mm(gradient.t(), problem.hidden, out=d_weight)
        if "hidden" in out:
            first = chunk.number == 0 and head == "scale"
            weight = problem.heads[head][chunk.number]
            out["hidden"].addmm_(gradient, weight, beta=0 if first else 1)


#: What the derivative by the log dispersion of a head by cell leads to.
_GRADIENTS_THROUGH_R = {"hidden", "r_weight", "r_bias"}


def _fused_gradient_of_hidden(problem: _Problem, row_numbers: Tensor, d_hidden: Tensor) -> None:
    tile = _FUSED_TILE_OF_HIDDEN
    row_tiles = cdiv(problem.n_rows, tile["ROWS"])
    split = _split_size(problem.chunks[0].size, tile["GENES"], row_tiles, fused=True)
    sizes = [cdiv(chunk.size, split) for chunk in problem.chunks]
    sums = d_hidden.new_empty(sum(sizes), *d_hidden.shape)
    for chunk, size, part in zip(problem.chunks, sizes, sums.split(sizes), strict=True):
        r, _, *of_genes = problem.dispersion(chunk).tensors("slope")
        x, *x_strides = problem.counts(chunk)
        launch(
            _gradient_of_hidden,
            (row_tiles, size),
            problem.hidden,
            row_numbers,
            problem.weights.get("scale"),
            problem.biases[0],
            problem.weights.get("dropout"),
            problem.biases[1],
            r,
            *of_genes,
            x,
            part,
            problem.n_rows,
            problem.n_cells,
            chunk.start,
            chunk.size,
            problem.n_hidden,
            split,
            *x_strides,
            **problem.kinds,
            HIDDEN=problem.hidden_tile,
            PRECISION=problem.products["PRECISION"],
            **tile,
        )
    torch.sum(sums, 0, out=d_hidden)


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
    gradients: dict[str, Tensor] = {}
    if "library" in wanted:
        gradients["library"] = -grad * usum
    asked = {
        name: tensor
        for name in wanted - {"library"}
        if (tensor := getattr(inputs, name)) is not None
    }
    if not asked:
        return gradients
    problem = _Problem(inputs, checked=True)
    row_numbers = problem.hidden.new_empty(4, problem.n_rows)
    grad_by_row = grad.reshape(-1)
    launch(
        _row_numbers,
        (cdiv(problem.n_rows, 128),),
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
    if problem.has_table and "px_r" in asked:
        assert inputs.px_r_index is not None
        labels, order = torch.sort(inputs.px_r_index, stable=True)
        every = torch.arange(asked["px_r"].shape[1] + 1, device=labels.device)
        cells_by_label = (order, torch.searchsorted(labels, every))

    tile = problem.tile(_TILE_OF_GRADIENTS)
    gene_tiles = cdiv(problem.chunks[0].size, tile["GENES"])
    split = _split_size(problem.n_rows, tile["ROWS"], gene_tiles, fused=problem.fused)
    by_gene = [name for name, tensor in asked.items() if tensor.dim() == 1]
    sums = _Sums(problem, sorted(by_gene), cdiv(problem.n_rows, split))
    out = {
        name: torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for name, tensor in asked.items()
        if name not in sums.out
    }
    gradients |= out
    if "hidden" in out:
        out["hidden"] = out["hidden"].view(problem.hidden.shape)
        if problem.fused:
            _fused_gradient_of_hidden(problem, row_numbers, out.pop("hidden"))
    if sums.out or out:
        for chunk in problem.chunks:
            _gradients_of_chunk(problem, chunk, split, row_numbers, cells_by_label, sums, out)
    # each with memory of its own, as torch.library wants it
    return gradients | {name: total.clone() for name, total in sums.out.items()}
