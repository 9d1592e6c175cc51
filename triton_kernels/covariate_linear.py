"""``covariate_linear``: linear + covariate injection + norm + activation, one hidden layer.

A product kernel takes the linear map, gathers the weight columns of integer covariates, and goes
on to norm and activation wherever one program holds what they need: whole rows for layer norm,
the whole mini-batch for batch norm's statistics. Where it does not, it leaves the mean and the
centred sum of squares of its part of each column (never a mean of squares, which cancels), and a
second kernel merges the parts, normalises and activates.

Rows are cells, or Monte-Carlo samples of cells; row ``i`` has the covariates of cell
``i % n_cells``. Batch statistics are of one *group* of rows, which is a sample; otherwise all rows
are one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, dot, expm1, launch, next_power_of_2, product_precision, sigmoid

if TYPE_CHECKING:
    from decoder_fast.reference.covariate_linear import Inputs

#: Most rows whose batch statistics one program finds for itself.
MAX_ROWS_A_PROGRAM = 128
#: Most hidden units of a row that the product kernel holds: with more, programs would be too few.
MAX_FUSED_HIDDEN = 256
#: Most parts of a column's statistics that every program merges for itself.
_MAX_PARTS = 64
#: Programs that fill a large GPU twice.
_PROGRAMS = 264
#: What one sum over rows each differentiates by.
_PARAMETERS = ("bias", "batch_norm_weight", "batch_norm_bias")


@triton.jit
def _activate(a, parameter, ACTIVATION: tl.constexpr):
    # Comparisons that are false for NaN, so that it stays.
    if ACTIVATION == "relu":
        return tl.where(a <= 0.0, 0.0, a)
    elif ACTIVATION == "leaky_relu":
        return tl.where(a <= 0.0, parameter * a, a)
    elif ACTIVATION == "elu":
        return tl.where(a <= 0.0, parameter * expm1(tl.where(a <= 0.0, a, 0.0)), a)
    elif ACTIVATION == "gelu":
        return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return a * sigmoid(a)
    else:
        return a


@triton.jit
def _activate_backward(grad, a, parameter, ACTIVATION: tl.constexpr):
    """Gradient by the activation's input ``a`` (for relu the output does as well)."""
    if ACTIVATION == "relu":
        return tl.where(a <= 0.0, 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        return tl.where(a <= 0.0, parameter * grad, grad)
    elif ACTIVATION == "elu":
        return tl.where(a <= 0.0, parameter * tl.exp(tl.where(a <= 0.0, a, 0.0)) * grad, grad)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
        return grad * (cdf + a * (tl.exp(-0.5 * a * a) * 0.3989422804014327))
    elif ACTIVATION == "silu":
        s = sigmoid(a)
        return grad * (s * (1.0 + a * (1.0 - s)))
    else:
        return grad


@triton.jit
def _inverse_deviation(variance, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def _affine(v, mean, invstd, weight, bias, units, unit_mask):
    """Batch norm of a tile: standardised, and with its weight and bias."""
    standardised = (v - mean[None, :]) * invstd[None, :]
    a = standardised
    if weight is not None:
        a *= tl.load(weight + units, mask=unit_mask, other=0.0)[None, :]
    if bias is not None:
        a += tl.load(bias + units, mask=unit_mask, other=0.0)[None, :]
    return standardised, a


@triton.jit
def _layer_norm(a, inside, n_hidden, eps):
    """Layer norm of a tile of whole rows, and 1 / standard deviation of each."""
    mean = tl.sum(tl.where(inside, a, 0.0), 1) / n_hidden
    centred = tl.where(inside, a - mean[:, None], 0.0)
    rstd = _inverse_deviation(tl.sum(centred * centred, 1) / n_hidden, eps)
    return centred * rstd[:, None], rstd


@triton.jit
def _move_running(running_mean, running_var, mean, variance, momentum, units, unit_mask):
    """Let running statistics take one step; ``variance`` is the unbiased one."""
    old_mean = tl.load(running_mean + units, mask=unit_mask, other=0.0)
    old_var = tl.load(running_var + units, mask=unit_mask, other=0.0)
    new_mean = (1.0 - momentum) * old_mean + momentum * mean
    new_var = (1.0 - momentum) * old_var + momentum * variance
    tl.store(running_mean + units, new_mean, mask=unit_mask)
    tl.store(running_var + units, new_var, mask=unit_mask)


@triton.jit
def _merge(
    means,
    squares,
    first_part,
    n_parts,
    rows_a_part,
    n_rows,
    units,
    unit_mask,
    n_hidden,
    PARTS: tl.constexpr,
):
    """Mean and centred sum of squares of ``n_rows`` rows, from those of their parts.

    Chan, Golub & LeVeque 1983, Algorithms for computing the sample variance.
    """
    mean = tl.zeros((units.shape[0],), tl.float32)
    square = tl.zeros((units.shape[0],), tl.float32)
    count = 0.0
    for start in range(0, n_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        inside = (parts < n_parts)[:, None] & unit_mask[None, :]
        offsets = (first_part + parts).to(tl.int64)[:, None] * n_hidden + units[None, :]
        part_means = tl.load(means + offsets, mask=inside, other=0.0)
        part_squares = tl.load(squares + offsets, mask=inside, other=0.0)
        counts = tl.minimum(tl.maximum(n_rows - parts * rows_a_part, 0), rows_a_part)
        counts = tl.where(parts < n_parts, counts, 0).to(tl.float32)
        added = tl.sum(counts, 0)
        added_mean = tl.sum(counts[:, None] * part_means, 0) / added
        deviations = part_means - added_mean[None, :]
        added_square = tl.sum(part_squares + counts[:, None] * deviations * deviations, 0)
        total = count + added
        difference = added_mean - mean
        mean += difference * (added / total)
        square += added_square + difference * difference * (count * (added / total))
        count = total
    return mean, square


@triton.jit
def _check_labels(labels, n_cats, labels_ok, n_cells, CELLS: tl.constexpr):
    """Write for each covariate whether all its labels are in range."""
    for k in tl.static_range(len(labels)):
        bad = 0
        for start in range(0, n_cells, CELLS):
            cells = start + tl.arange(0, CELLS)
            label = tl.load(labels[k] + cells, mask=cells < n_cells, other=0)
            outside = (label < 0) | (label >= n_cats[k])
            bad = tl.maximum(bad, tl.max(outside.to(tl.int32), 0))
        tl.store(labels_ok + k, 1 - bad)


@triton.jit
def _linear(
    matrices,
    matrix_starts,
    widths,
    labels,
    label_starts,
    n_cats,
    weight,
    bias,
    batch_norm_weight,
    batch_norm_bias,
    running_mean,
    running_var,
    out,
    v,
    mean,
    invstd,
    means,
    squares,
    labels_ok,
    n_row_tiles,
    group_rows,
    n_cells,
    n_hidden,
    n_columns,
    momentum,
    batch_norm_eps,
    layer_norm_eps,
    parameter,
    BATCH_NORM: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Linear map of a tile into ``v``, and the whole layer into ``out`` if that is given.

    ``matrices`` are ``x`` and the soft covariates. With ``BATCH_NORM == "batch"`` the tile holds a
    whole group of rows if ``out`` is given, else it leaves statistics of its part (``means``,
    ``squares``).
    """
    group = tl.program_id(0) // n_row_tiles
    tile = tl.program_id(0) % n_row_tiles
    first_row = group * group_rows + tile * ROWS
    rows = tl.arange(0, ROWS)
    row_mask = tile * ROWS + rows < group_rows
    cells = (first_row + rows) % n_cells
    first_unit = tl.program_id(1) * UNITS
    units = first_unit + tl.arange(0, UNITS)
    unit_mask = units < n_hidden
    inside = row_mask[:, None] & unit_mask[None, :]
    # 64 bits for where a tile begins, 32 within it: half the registers.
    weight_tile = weight + first_unit.to(tl.int64) * n_columns
    weight_rows = tl.arange(0, UNITS) * n_columns

    # Products first: added to a bias they would be rounded at its size, one by one.
    value = tl.zeros((ROWS, UNITS), tl.float32)
    for k in tl.static_range(len(matrices)):
        if k == 0:
            matrix_tile = matrices[k] + first_row.to(tl.int64) * widths[k]
            matrix_rows = rows * widths[k]
        else:
            matrix_tile = matrices[k]
            matrix_rows = cells.to(tl.int64) * widths[k]
        for start in range(0, widths[k], COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            column_mask = columns < widths[k]
            left = tl.load(
                matrix_tile + matrix_rows[:, None] + columns[None, :],
                mask=row_mask[:, None] & column_mask[None, :],
                other=0.0,
            )
            right = tl.load(
                weight_tile + matrix_starts[k] + weight_rows[:, None] + columns[None, :],
                mask=unit_mask[:, None] & column_mask[None, :],
                other=0.0,
            )
            value = dot(left, tl.trans(right), value, PRECISION)
    for k in tl.static_range(len(labels)):
        label = tl.load(labels[k] + cells, mask=row_mask, other=0)
        in_range = (label >= 0) & (label < n_cats[k])
        column = weight_tile + label_starts[k] + label
        value += tl.load(
            column[:, None] + weight_rows[None, :], mask=inside & in_range[:, None], other=0.0
        )
    if bias is not None:
        value += tl.load(bias + units, mask=unit_mask, other=0.0)[None, :]
    begin = first_row.to(tl.int64) * n_hidden
    offsets = rows[:, None] * n_hidden + units[None, :]
    if v is not None:
        tl.store(v + begin + offsets, value, mask=inside)
    if labels_ok is not None:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            _check_labels(labels, n_cats, labels_ok, n_cells, 512)

    a = value
    if BATCH_NORM == "running":
        used_mean = tl.load(running_mean + units, mask=unit_mask, other=0.0)
        variance = tl.load(running_var + units, mask=unit_mask, other=1.0)
        used_invstd = _inverse_deviation(variance, batch_norm_eps)
        if tl.program_id(0) == 0:
            tl.store(mean + units, used_mean, mask=unit_mask)
            tl.store(invstd + units, used_invstd, mask=unit_mask)
        _, a = _affine(
            value, used_mean, used_invstd, batch_norm_weight, batch_norm_bias, units, unit_mask
        )
    elif BATCH_NORM == "batch":
        count = tl.minimum(group_rows - tile * ROWS, ROWS).to(tl.float32)
        used_mean = tl.sum(tl.where(inside, value, 0.0), 0) / count
        deviations = tl.where(inside, value - used_mean[None, :], 0.0)
        square = tl.sum(deviations * deviations, 0)
        if out is None:
            part = tl.program_id(0).to(tl.int64) * n_hidden + units
            tl.store(means + part, used_mean, mask=unit_mask)
            tl.store(squares + part, square, mask=unit_mask)
        else:
            used_invstd = _inverse_deviation(square / count, batch_norm_eps)
            tl.store(mean + units, used_mean, mask=unit_mask)
            tl.store(invstd + units, used_invstd, mask=unit_mask)
            if running_mean is not None:
                unbiased = square / (count - 1.0)
                _move_running(
                    running_mean, running_var, used_mean, unbiased, momentum, units, unit_mask
                )
            _, a = _affine(
                value, used_mean, used_invstd, batch_norm_weight, batch_norm_bias, units, unit_mask
            )
    if out is not None:
        if LAYER_NORM:
            a, _ = _layer_norm(a, inside, n_hidden, layer_norm_eps)
        tl.store(out + begin + offsets, _activate(a, parameter, ACTIVATION), mask=inside)


@triton.jit
def _finish_statistics(
    means,
    squares,
    mean,
    invstd,
    running_mean,
    running_var,
    n_groups,
    n_parts,
    rows_a_part,
    group_rows,
    n_hidden,
    momentum,
    batch_norm_eps,
    PARTS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Statistics of each group from those of its parts; move the running ones once for each."""
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    unit_mask = units < n_hidden
    for group in range(n_groups):
        group_mean, square = _merge(
            means, squares, group * n_parts, n_parts, rows_a_part, group_rows, units, unit_mask,
            n_hidden, PARTS,
        )  # fmt: skip
        offsets = tl.cast(group, tl.int64) * n_hidden + units
        tl.store(mean + offsets, group_mean, mask=unit_mask)
        group_invstd = _inverse_deviation(square / group_rows, batch_norm_eps)
        tl.store(invstd + offsets, group_invstd, mask=unit_mask)
        if running_mean is not None:
            unbiased = square / (group_rows - 1)
            _move_running(
                running_mean, running_var, group_mean, unbiased, momentum, units, unit_mask
            )


@triton.jit
def _batch_norm(
    v,
    mean,
    invstd,
    batch_norm_weight,
    batch_norm_bias,
    group,
    units,
    unit_mask,
    n_hidden,
):
    """Batch norm of a tile with a group's statistics: as :func:`_affine`."""
    offsets = group.to(tl.int64) * n_hidden + units
    group_mean = tl.load(mean + offsets, mask=unit_mask, other=0.0)
    group_invstd = tl.load(invstd + offsets, mask=unit_mask, other=0.0)
    return _affine(
        v, group_mean, group_invstd, batch_norm_weight, batch_norm_bias, units, unit_mask
    )


@triton.jit
def _tile_of_rows(group, tile, group_rows, units, unit_mask, n_hidden, ROWS: tl.constexpr):
    """Where a tile of (rows, units) begins, the offsets within it, and which of them exist.

    64 bits for the one, 32 for the others: half the registers.
    """
    rows = tl.arange(0, ROWS)
    row_mask = tile * ROWS + rows < group_rows
    begin = (group * group_rows + tile * ROWS).to(tl.int64) * n_hidden
    return begin, rows[:, None] * n_hidden + units[None, :], row_mask[:, None] & unit_mask[None, :]


@triton.jit
def _normalise(
    v,
    out,
    mean,
    invstd,
    means,
    squares,
    batch_norm_weight,
    batch_norm_bias,
    running_mean,
    running_var,
    n_groups,
    n_row_tiles,
    n_parts,
    rows_a_part,
    group_rows,
    n_hidden,
    momentum,
    batch_norm_eps,
    layer_norm_eps,
    parameter,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Norms and activation of a tile; with layer norm it holds whole rows.

    Batch norm's statistics are ``mean`` and ``invstd``; or, if ``means`` is given, every program
    merges those of the parts for itself, and one row of programs more keeps them.
    """
    group = tl.program_id(0) // n_row_tiles
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    unit_mask = units < n_hidden
    if group == n_groups:
        if means is not None:
            _finish_statistics(
                means, squares, mean, invstd, running_mean, running_var, n_groups, n_parts,
                rows_a_part, group_rows, n_hidden, momentum, batch_norm_eps, PARTS, UNITS,
            )  # fmt: skip
    else:
        begin, offsets, inside = _tile_of_rows(
            group, tl.program_id(0) % n_row_tiles, group_rows, units, unit_mask, n_hidden, ROWS
        )
        a = tl.load(v + begin + offsets, mask=inside, other=0.0)
        if means is not None:
            group_mean, square = _merge(
                means, squares, group * n_parts, n_parts, rows_a_part, group_rows, units,
                unit_mask, n_hidden, PARTS,
            )  # fmt: skip
            group_invstd = _inverse_deviation(square / group_rows, batch_norm_eps)
            _, a = _affine(
                a, group_mean, group_invstd, batch_norm_weight, batch_norm_bias, units, unit_mask
            )
        elif mean is not None:
            _, a = _batch_norm(
                a, mean, invstd, batch_norm_weight, batch_norm_bias, group, units, unit_mask,
                n_hidden,
            )  # fmt: skip
        if LAYER_NORM:
            a, _ = _layer_norm(a, inside, n_hidden, layer_norm_eps)
        tl.store(out + begin + offsets, _activate(a, parameter, ACTIVATION), mask=inside)


@triton.jit
def _update_running(
    running_mean,
    running_var,
    mean,
    invstd,
    n_samples,
    n_cells,
    n_hidden,
    momentum,
    eps,
    UNITS: tl.constexpr,
):
    """Move running statistics, once for each sample, by those that batch norm used."""
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    unit_mask = units < n_hidden
    for sample in range(n_samples):
        offsets = tl.cast(sample, tl.int64) * n_hidden + units
        sample_mean = tl.load(mean + offsets, mask=unit_mask, other=0.0)
        sample_invstd = tl.load(invstd + offsets, mask=unit_mask, other=1.0)
        variance = tl.div_rn(1.0, sample_invstd * sample_invstd) - eps
        unbiased = tl.maximum(variance, 0.0) * (n_cells / (n_cells - 1))
        _move_running(running_mean, running_var, sample_mean, unbiased, momentum, units, unit_mask)


@triton.jit
def _added(sums, first_part, n_parts, units, unit_mask, n_hidden, PARTS: tl.constexpr):
    """Sum of consecutive parts, in their order."""
    total = tl.zeros((units.shape[0],), tl.float32)
    for start in range(0, n_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        inside = (parts < n_parts)[:, None] & unit_mask[None, :]
        offsets = (first_part + parts).to(tl.int64)[:, None] * n_hidden + units[None, :]
        total += tl.sum(tl.load(sums + offsets, mask=inside, other=0.0), 0)
    return total


@triton.jit
def _store_parameters(
    total,
    total_standardised,
    invstd,
    batch_norm_weight,
    d_bias,
    d_batch_norm_weight,
    d_batch_norm_bias,
    units,
    unit_mask,
    BATCH_STATISTICS: tl.constexpr,
):
    """Gradients by bias and batch norm's parameters, from the sums over all rows."""
    if d_batch_norm_weight is not None:
        tl.store(d_batch_norm_weight + units, total_standardised, mask=unit_mask)
    if d_batch_norm_bias is not None:
        tl.store(d_batch_norm_bias + units, total, mask=unit_mask)
    if d_bias is not None:
        if BATCH_STATISTICS:
            total *= 0.0  # batch norm takes a constant away; what is not finite shows
        elif invstd is not None:
            total *= tl.load(invstd + units, mask=unit_mask, other=0.0)
            if batch_norm_weight is not None:
                total *= tl.load(batch_norm_weight + units, mask=unit_mask, other=0.0)
        tl.store(d_bias + units, total, mask=unit_mask)


@triton.jit
def _parameter_gradients(
    sums,
    sums_standardised,
    invstd,
    batch_norm_weight,
    d_bias,
    d_batch_norm_weight,
    d_batch_norm_bias,
    n_parts,
    n_hidden,
    BATCH_STATISTICS: tl.constexpr,
    PARTS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Gradients by bias and batch norm's parameters, from parts of the sums over all rows."""
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    unit_mask = units < n_hidden
    total = _added(sums, 0, n_parts, units, unit_mask, n_hidden, PARTS)
    total_standardised = total
    if d_batch_norm_weight is not None:
        total_standardised = _added(
            sums_standardised, 0, n_parts, units, unit_mask, n_hidden, PARTS
        )
    _store_parameters(
        total, total_standardised, invstd, batch_norm_weight, d_bias, d_batch_norm_weight,
        d_batch_norm_bias, units, unit_mask, BATCH_STATISTICS,
    )  # fmt: skip


@triton.jit
def _norm_backward(
    grad,
    out,
    v,
    mean,
    invstd,
    batch_norm_weight,
    batch_norm_bias,
    d_v,
    sums,
    sums_standardised,
    d_bias,
    d_batch_norm_weight,
    d_batch_norm_bias,
    n_groups,
    n_row_tiles,
    n_parts,
    group_rows,
    n_hidden,
    layer_norm_eps,
    parameter,
    BATCH_STATISTICS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Gradient by the linear map's output of a tile into ``d_v``, if that is given.

    With layer norm the tile holds whole rows. The sums over rows that parameters and batch
    statistics need are, by ``SUMS``: those of the tile (``"tile"``); left as one part of them in
    ``sums`` and ``sums_standardised``, if given (``"write"``); or those of the parts found there,
    from which one row of programs more computes the parameters' gradients (``"read"``).
    """
    group = tl.program_id(0) // n_row_tiles
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    unit_mask = units < n_hidden
    if group == n_groups:
        if SUMS == "read":
            _parameter_gradients(
                sums, sums_standardised, invstd, batch_norm_weight, d_bias, d_batch_norm_weight,
                d_batch_norm_bias, n_groups * n_parts, n_hidden, BATCH_STATISTICS, PARTS, UNITS,
            )  # fmt: skip
    else:
        begin, offsets, inside = _tile_of_rows(
            group, tl.program_id(0) % n_row_tiles, group_rows, units, unit_mask, n_hidden, ROWS
        )
        d = tl.load(grad + begin + offsets, mask=inside, other=0.0)
        standardised, a = d, d
        if v is not None:
            standardised = tl.load(v + begin + offsets, mask=inside, other=0.0)
            a = standardised
            if mean is not None:
                standardised, a = _batch_norm(
                    a, mean, invstd, batch_norm_weight, batch_norm_bias, group, units, unit_mask,
                    n_hidden,
                )  # fmt: skip
            if LAYER_NORM:
                a, rstd = _layer_norm(a, inside, n_hidden, layer_norm_eps)
        if ACTIVATION == "relu":
            # From the output, so that the sign is the forward pass' own.
            output = tl.load(out + begin + offsets, mask=inside, other=0.0)
            d = _activate_backward(d, output, parameter, ACTIVATION)
        else:
            d = _activate_backward(d, a, parameter, ACTIVATION)
        if LAYER_NORM:
            common = tl.sum(d, 1) / n_hidden
            slope = tl.sum(d * a, 1) / n_hidden
            d = rstd[:, None] * (d - common[:, None] - a * slope[:, None])
        if SUMS == "read":
            first_part = group * n_parts
            total = _added(sums, first_part, n_parts, units, unit_mask, n_hidden, PARTS)
            total_standardised = _added(
                sums_standardised, first_part, n_parts, units, unit_mask, n_hidden, PARTS
            )
        else:
            total = tl.sum(tl.where(inside, d, 0.0), 0)
            total_standardised = tl.sum(tl.where(inside, d * standardised, 0.0), 0)
        if SUMS == "write":
            part = tl.program_id(0).to(tl.int64) * n_hidden + units
            if sums is not None:
                tl.store(sums + part, total, mask=unit_mask)
            if sums_standardised is not None:
                tl.store(sums_standardised + part, total_standardised, mask=unit_mask)
        if SUMS == "tile":
            _store_parameters(
                total, total_standardised, invstd, batch_norm_weight, d_bias, d_batch_norm_weight,
                d_batch_norm_bias, units, unit_mask, BATCH_STATISTICS,
            )  # fmt: skip
        if d_v is not None:
            if BATCH_STATISTICS:
                slope = total_standardised / group_rows
                d -= (total / group_rows)[None, :] + standardised * slope[None, :]
            if mean is not None:
                statistics = group.to(tl.int64) * n_hidden + units
                scale = tl.load(invstd + statistics, mask=unit_mask, other=0.0)
                if batch_norm_weight is not None:
                    scale *= tl.load(batch_norm_weight + units, mask=unit_mask, other=0.0)
                d *= scale[None, :]
            tl.store(d_v + begin + offsets, d, mask=inside)


@triton.jit
def _sum_by_label(
    by_cell,
    labels,
    d_weight,
    n_cells,
    n_cat,
    n_hidden,
    row_stride,
    cells_a_split,
    SCAN: tl.constexpr,
    CELLS: tl.constexpr,
    UNITS: tl.constexpr,
    CATEGORIES: tl.constexpr,
    FEW: tl.constexpr,
):
    """Sum the rows of ``by_cell`` (cells, units) by label, into ``d_weight`` (units, categories).

    One split of the cells, ``SCAN`` at a time: where up to ``FEW`` of them have a label of this
    tile, cell by cell; else ``CELLS`` at a time by a product with their one-hot matrix.
    """
    first_category = tl.program_id(0) * CATEGORIES
    categories = first_category + tl.arange(0, CATEGORIES)
    category_mask = categories < n_cat
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    unit_mask = units < n_hidden
    total = tl.zeros((UNITS, CATEGORIES), tl.float32)
    first_cell = tl.program_id(2) * cells_a_split
    end_cell = tl.minimum(first_cell + cells_a_split, n_cells)
    end_category = tl.minimum(first_category + CATEGORIES, n_cat)
    for start in range(first_cell, end_cell, SCAN):
        cells = start + tl.arange(0, SCAN)
        label = tl.load(labels + cells, mask=cells < end_cell, other=-1)
        hit = (label >= first_category) & (label < end_category)
        n_hits = tl.sum(hit.to(tl.int32), 0)
        if n_hits <= FEW:
            cell = start - 1
            for _ in range(n_hits):
                cell = tl.min(tl.where(hit & (cells > cell), cells, n_cells - 1), 0)
                category = tl.load(labels + cell)
                row = tl.load(
                    by_cell + cell.to(tl.int64) * n_hidden + units, mask=unit_mask, other=0.0
                )
                total += tl.where((categories == category)[None, :], row[:, None], 0.0)
        else:
            for block in range(start, tl.minimum(start + SCAN, end_cell), CELLS):
                some = block + tl.arange(0, CELLS)
                their_label = tl.load(labels + some, mask=some < end_cell, other=-1)
                one_hot = (their_label[:, None] == categories[None, :]) & category_mask[None, :]
                tile = tl.load(
                    by_cell
                    + tl.cast(block, tl.int64) * n_hidden
                    + tl.arange(0, CELLS)[:, None] * n_hidden
                    + units[None, :],
                    mask=(some < end_cell)[:, None] & unit_mask[None, :],
                    other=0.0,
                )
                # A sum, not a product: nothing of it is rounded first.
                total = dot(tl.trans(tile), one_hot.to(tl.float32), total, "ieee")
    rows = tl.program_id(2).to(tl.int64) * n_hidden + units
    tl.store(
        d_weight + rows[:, None] * row_stride + categories[None, :],
        total,
        mask=unit_mask[:, None] & category_mask[None, :],
    )


def _covering(n: int, most: int = 1 << 30) -> int:
    """Return the side of the tiles that cover ``n`` with little padding."""
    return max(16, min(most, next_power_of_2(n)))


def _tile(rows: int, units: int) -> dict[str, int]:
    """Options of a launch: at most 16 elements a thread, 8 if that takes no more than 16 warps."""
    elements = rows * units
    warps = max(1, min(16, elements // 256), min(32, elements // 512))
    return {"ROWS": rows, "UNITS": units, "num_warps": warps}


def _parts_at_once(n_parts: int) -> int:
    return 1 if n_parts == 1 else _covering(n_parts, _MAX_PARTS)


class _Problem:
    """A layer's sizes, how its norms group the rows, and the tiles that follow."""

    def __init__(self, inputs: Inputs) -> None:
        self.n_samples, self.n_cells, self.n_in = inputs.x.shape
        self.n_hidden = inputs.weight.shape[0]
        self.layer_norm = inputs.use_layer_norm
        self.batch_norm = "none"
        if inputs.use_batch_norm:
            self.batch_norm = "batch" if inputs.batch_statistics else "running"
        self.n_groups = self.n_samples if self.batch_norm == "batch" else 1
        self.group_rows = self.n_samples * self.n_cells // self.n_groups
        # One program has all rows of some units, and waits for no other.
        self.whole_columns = (
            self.batch_norm == "batch"
            and not self.layer_norm
            and self.n_groups == 1
            and self.group_rows <= MAX_ROWS_A_PROGRAM
        )

    def column_tile(self) -> dict[str, int]:
        """Tile for what needs no whole rows."""
        if self.whole_columns:
            return _tile(_covering(self.group_rows, MAX_ROWS_A_PROGRAM), 16)
        most = 16 if self.group_rows <= 512 else 32 if self.group_rows <= 2048 else 64
        return _tile(_covering(self.group_rows, most), _covering(self.n_hidden, 32))

    def norm_tile(self) -> dict[str, int]:
        """Tile for the norms."""
        if not self.layer_norm:
            return self.column_tile()
        units = _covering(self.n_hidden)
        return _tile(max(1, 2048 // units), units)


def _covariates(inputs: Inputs) -> list[tuple[int, Tensor, int, int]]:
    """Position, labels or matrix, first column and number of columns of each covariate."""
    start, found = inputs.x.shape[-1], []
    for k, (category, n_cat) in enumerate(zip(inputs.categories, inputs.n_cats, strict=True)):
        found.append((k, category.contiguous(), start, n_cat))
        start += n_cat
    return found


def _columns(items: list[tuple[Any, ...]], n: int) -> tuple[tuple[Any, ...], ...]:
    """Transpose a list of ``n``-tuples, which may be empty."""
    return tuple(tuple(item[i] for item in items) for i in range(n))


def forward(
    inputs: Inputs, moved: tuple[Tensor, Tensor] | None = None, momentum: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the layer.

    Parameters
    ----------
    inputs
        As for ``decoder_fast.reference.covariate_linear.forward``, in float32; at least one cell
        of one sample, and one hidden unit.
    moved
        Running mean and variance, contiguous float32 (H,), that take a step of ``momentum`` in
        place for each sample; only with batch statistics.
    momentum
        Weight of a sample in that step.

    Returns
    -------
    tuple of Tensor
        As ``decoder_fast.reference.covariate_linear.forward``.

    Raises
    ------
    RuntimeError
        If a label is out of range: on a GPU by an assertion on the device.
    """
    problem = _Problem(inputs)
    n_hidden, n_groups, group_rows = problem.n_hidden, problem.n_groups, problem.group_rows
    x = inputs.x.contiguous()
    out = x.new_empty(problem.n_samples, problem.n_cells, n_hidden)
    keeps = inputs.keeps_linear
    v = torch.empty_like(out) if keeps else x.new_empty(0)
    shape = (n_groups, n_hidden) if inputs.use_batch_norm else (0,)
    mean, invstd = x.new_empty(shape), x.new_empty(shape)
    batch_statistics = problem.batch_norm == "batch"
    running = (inputs.running_mean, inputs.running_var)
    if batch_statistics:
        running = (None, None) if moved is None else moved

    # The product kernel finishes the layer where its tiles hold what the norms need.
    tile, fused = problem.column_tile(), problem.whole_columns
    if not batch_statistics:
        fused = not inputs.use_layer_norm or n_hidden <= MAX_FUSED_HIDDEN
        if fused and inputs.use_layer_norm:
            tile = _tile(16, _covering(n_hidden))
    n_parts = cdiv(group_rows, tile["ROWS"])
    means = squares = None
    if batch_statistics and not fused:
        means, squares = x.new_empty(2, n_groups * n_parts, n_hidden)

    covariates = _covariates(inputs)
    matrices = [(x, 0, problem.n_in)]
    matrices += [c[1:] for c in covariates if c[1].is_floating_point()]
    labels = [c for c in covariates if not c[1].is_floating_point()]
    labels_ok = None
    if labels:
        labels_ok = torch.empty(len(labels), dtype=torch.int32, device=x.device)
    precision = product_precision()
    # Without tensor cores a product holds its whole tiles in registers.
    most_columns = 16 if precision == "ieee" and tile["UNITS"] > 64 else 32
    columns = _covering(max(width for *_, width in matrices), most_columns)
    options = {"num_stages": 2}
    if columns == 16 and 16 in (tile["ROWS"], tile["UNITS"]):
        # Loads ahead of few columns and a small tile gain nothing, and cost registers; of which
        # the compiler, left to itself, takes so few, to fit more programs, that it spills.
        options = {"num_stages": 1, "maxnreg": 128}
    launch(
        _linear,
        (n_groups * n_parts, cdiv(n_hidden, tile["UNITS"])),
        *_columns(matrices, 3),
        *_columns(labels, 4)[1:],
        inputs.weight.contiguous(),
        inputs.bias,
        inputs.batch_norm_weight,
        inputs.batch_norm_bias,
        *running,
        out if fused else None,
        v if keeps else None,
        mean,
        invstd,
        means,
        squares,
        labels_ok,
        n_parts,
        group_rows,
        problem.n_cells,
        n_hidden,
        inputs.weight.shape[1],
        momentum,
        inputs.batch_norm_eps,
        inputs.layer_norm_eps,
        inputs.activation_parameter,
        BATCH_NORM=problem.batch_norm,
        LAYER_NORM=inputs.use_layer_norm,
        ACTIVATION=inputs.activation,
        PRECISION=precision,
        COLUMNS=columns,
        **options,
        **tile,
    )
    for i, (k, _, _, n_cat) in enumerate(labels):
        assert labels_ok is not None
        torch._assert_async(labels_ok[i], f"category {k}: a label is outside 0..{n_cat - 1}")
    if fused:
        return out, v, mean, invstd

    statistics = (n_parts, tile["ROWS"], group_rows, n_hidden, momentum, inputs.batch_norm_eps)
    if means is not None and (inputs.use_layer_norm or n_parts > _MAX_PARTS):
        launch(
            _finish_statistics,
            (1, cdiv(n_hidden, 32)),
            means,
            squares,
            mean,
            invstd,
            *running,
            n_groups,
            *statistics,
            PARTS=_MAX_PARTS,
            UNITS=32,
            num_warps=4,
        )
        means = squares = None
    tile = problem.norm_tile()
    row_tiles = cdiv(group_rows, tile["ROWS"])
    launch(
        _normalise,
        (n_groups * row_tiles + (means is not None), cdiv(n_hidden, tile["UNITS"])),
        v,
        out,
        *((mean, invstd) if inputs.use_batch_norm else (None, None)),
        means,
        squares,
        inputs.batch_norm_weight,
        inputs.batch_norm_bias,
        *running,
        n_groups,
        row_tiles,
        *statistics,
        inputs.layer_norm_eps,
        inputs.activation_parameter,
        LAYER_NORM=inputs.use_layer_norm,
        ACTIVATION=inputs.activation,
        PARTS=1 if means is None else _parts_at_once(n_parts),
        **tile,
    )
    return out, v, mean, invstd


def update_running(
    running: tuple[Tensor, Tensor],
    mean: Tensor,
    invstd: Tensor,
    momentum: float,
    eps: float,
    n_cells: int,
) -> None:
    """Move running statistics once for each sample, in place.

    Parameters
    ----------
    running
        Running mean and variance, contiguous float32 (H,).
    mean, invstd
        As returned by :func:`forward`, (S, H).
    momentum
        Weight of a sample in each step.
    eps
        That of the batch norm.
    n_cells
        Cells of a sample, at least two.
    """
    n_samples, n_hidden = mean.shape
    launch(
        _update_running,
        (cdiv(n_hidden, 128),),
        *running,
        mean.contiguous(),
        invstd.contiguous(),
        n_samples,
        n_cells,
        n_hidden,
        momentum,
        eps,
        UNITS=128,
        num_warps=1,
    )


def _gradient_of_linear(
    inputs: Inputs,
    grad: Tensor,
    out: Tensor,
    v: Tensor,
    mean: Tensor,
    invstd: Tensor,
    parameters: dict[str, Tensor],
    d_v: Tensor | None,
) -> None:
    """Compute ``d_v`` (rows, H) if given, and the gradients by the vectors ``parameters``."""
    problem = _Problem(inputs)
    n_hidden, n_groups = problem.n_hidden, problem.n_groups
    batch_statistics = problem.batch_norm == "batch"
    mean_and_invstd = (mean, invstd) if inputs.use_batch_norm else (None, None)
    tile = problem.norm_tile()
    row_tiles = cdiv(problem.group_rows, tile["ROWS"])
    grad, out, v = grad.contiguous(), out.contiguous(), v.contiguous()
    outputs = [parameters.get(name) for name in _PARAMETERS]

    def run(how: str, d_v: Tensor | None, sums: Sequence[Tensor | None], n_parts: int) -> None:
        launch(
            _norm_backward,
            (n_groups * row_tiles + (how == "read"), cdiv(n_hidden, tile["UNITS"])),
            grad,
            out,
            v if v.numel() else None,
            *mean_and_invstd,
            inputs.batch_norm_weight,
            inputs.batch_norm_bias,
            d_v,
            *sums,
            *outputs,
            n_groups,
            row_tiles,
            n_parts,
            problem.group_rows,
            n_hidden,
            inputs.layer_norm_eps,
            inputs.activation_parameter,
            BATCH_STATISTICS=batch_statistics,
            LAYER_NORM=inputs.use_layer_norm,
            ACTIVATION=inputs.activation,
            SUMS=how,
            PARTS=_parts_at_once(n_parts) if how == "read" else 1,
            **tile,
        )

    if problem.whole_columns:
        run("tile", d_v, (None, None), 1)
        return
    if not parameters and not batch_statistics:
        run("write", d_v, (None, None), 1)
        return
    parts = grad.new_empty(1 + inputs.use_batch_norm, n_groups, row_tiles, n_hidden)
    sums: tuple[Tensor | None, ...] = (*parts, None)[:2]
    run("write", None if batch_statistics else d_v, sums, 1)
    n_parts = row_tiles
    if n_parts > (1 if inputs.use_layer_norm else _MAX_PARTS):
        sums, n_parts = (*parts.sum(2), None)[:2], 1
    if batch_statistics and d_v is not None:
        run("read", d_v, sums, n_parts)
        return
    launch(
        _parameter_gradients,
        (1, cdiv(n_hidden, 32)),
        *sums,
        mean_and_invstd[1],
        inputs.batch_norm_weight,
        *outputs,
        n_groups * n_parts,
        n_hidden,
        BATCH_STATISTICS=batch_statistics,
        PARTS=_parts_at_once(n_groups * n_parts),
        UNITS=32,
        num_warps=4,
    )


def _gradient_of_columns(by_cell: Tensor, labels: Tensor, d_weight: Tensor) -> None:
    """Sum ``by_cell`` (N, H) by label into ``d_weight`` (H, categories), a view of some columns."""
    n_cells, n_hidden = by_cell.shape
    n_cat = d_weight.shape[1]
    # Few cells have a label of the tile, if there are many categories.
    cells = 16 if n_cat > 4 * n_cells else 32
    categories, units = _covering(n_cat, 32), _covering(n_hidden, 32)
    tiles = cdiv(n_cat, categories), cdiv(n_hidden, units)
    splits = min(cdiv(n_cells, 4 * cells), max(1, _PROGRAMS // (tiles[0] * tiles[1])))
    split = cdiv(n_cells, splits * cells) * cells
    splits = cdiv(n_cells, split)
    parts = d_weight if splits == 1 else by_cell.new_empty(splits, n_hidden, n_cat)
    launch(
        _sum_by_label,
        (*tiles, splits),
        by_cell,
        labels,
        parts,
        n_cells,
        n_cat,
        n_hidden,
        parts.stride(-2),
        split,
        SCAN=_covering(split, 1024),
        CELLS=cells,
        UNITS=units,
        CATEGORIES=categories,
        FEW=8,
        num_warps=max(1, categories * units // 128),
        num_stages=2,
    )
    if splits > 1:
        torch.sum(parts, 0, out=d_weight)


def backward(
    inputs: Inputs,
    grad: Tensor,
    out: Tensor,
    v: Tensor,
    mean: Tensor,
    invstd: Tensor,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    """Compute gradients.

    Parameters
    ----------
    inputs
        As in :func:`forward`.
    grad
        Gradient with respect to the layer's output, (S, N, H).
    out, v, mean, invstd
        As returned by :func:`forward`.
    wanted
        What to differentiate: names of fields of ``inputs``, and ``"categories.k"`` for the soft
        matrix ``k``.

    Returns
    -------
    dict
        Gradient by name. That by a bias under batch statistics is zero: batch norm takes any
        constant away.
    """
    n_samples, n_cells, n_in = inputs.x.shape
    n_hidden = inputs.weight.shape[0]
    parameters = {name: grad.new_empty(n_hidden) for name in _PARAMETERS if name in wanted}
    grads = dict(parameters)
    if wanted == parameters.keys():
        _gradient_of_linear(inputs, grad, out, v, mean, invstd, parameters, None)
        return grads
    d_v = grad.new_empty(n_samples * n_cells, n_hidden)
    _gradient_of_linear(inputs, grad, out, v, mean, invstd, parameters, d_v)

    if "x" in wanted:
        grads["x"] = (d_v @ inputs.weight[:, :n_in]).view(n_samples, n_cells, n_in)
    covariates = _covariates(inputs)
    by_cell = d_v
    if covariates and n_samples > 1:
        # Every sample of a cell shares its covariates.
        by_cell = d_v.view(n_samples, n_cells, n_hidden).sum(0)
    if "weight" in wanted:
        d_weight = torch.empty_like(inputs.weight, memory_format=torch.contiguous_format)
        torch.mm(d_v.t(), inputs.x.flatten(0, 1), out=d_weight[:, :n_in])
        for _, category, start, n_cat in covariates:
            columns = d_weight[:, start : start + n_cat]
            if category.is_floating_point():
                torch.mm(by_cell.t(), category, out=columns)
            else:
                _gradient_of_columns(by_cell, category, columns)
        grads["weight"] = d_weight
    for k, _, start, n_cat in covariates:
        if f"categories.{k}" in wanted:
            grads[f"categories.{k}"] = by_cell @ inputs.weight[:, start : start + n_cat]
    return grads
