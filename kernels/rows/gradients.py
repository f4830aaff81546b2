"""Kernels that write the gradient of long rows, by blocks of a row.

The gradient in a logit is factor · (h − q Σ h), with the sums of `sweeps.py`, and what the
deviation of a standardized row adds. For each entry of bf16 logits they move 6 bytes.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.device import Strided
from fastkd.kernels.rows.labels import (
    Target,
    from_boundary,
    label_of,
    label_slopes,
    load_shares,
    own_of,
)
from fastkd.kernels.rows.reading import (
    edges,
    load_logits,
    pointers_of,
    smoothing_of,
    temperature_of,
    units_of,
    vectors,
    without_apart,
)
from fastkd.kernels.rows.standardized import (
    EPSILON,
    load_standard,
    slopes_of_deviation,
    standardized,
)
from fastkd.kernels.rows.sweeps import N_STATISTICS, load_statistics, statistics_of
from fastkd.kernels.rows.terms import is_certain, slope
from fastkd.kernels.tiles import INFINITY, at_boundary, number, row_offset


class Factors(NamedTuple):
    """Factors of a row's two gradients, 0 where it is masked, and what its label is."""

    divergence: tl.tensor
    cross_entropy: tl.tensor
    label: tl.tensor
    own: tl.tensor  # what the class of the label has of the target besides its share


@triton.jit
def row_factors(
    rows, mask, n_cols, upstream_ptr, ce_upstream_ptr, strides, row_mask_ptr, labels_ptr, soft,
    class_weights, smoothing, scale, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the Factors of rows; `scale` multiplies the gradient of the divergence."""
    factor = tl.zeros(rows.shape, DTYPE)
    ce_factor, own, label = factor, factor, tl.full(rows.shape, -1, tl.int64)
    unmasked = mask
    rows = rows.to(tl.int64)  # because upstream gradients may be far apart
    if upstream_ptr is not None:
        factor = tl.load(upstream_ptr + rows * strides.upstream, mask, 0.0).to(DTYPE) * scale
    elif ce_upstream_ptr is None:
        factor += scale
    if row_mask_ptr is not None:
        unmasked = tl.load(row_mask_ptr + rows, mask, 0) != 0
        factor = tl.where(unmasked, factor, 0.0)
    if ce_upstream_ptr is not None:
        label = label_of(rows, mask, unmasked, labels_ptr, soft)
        own += own_of(label, soft, class_weights, smoothing, n_cols, DTYPE)
        ce_factor = tl.load(ce_upstream_ptr + rows * strides.ce_upstream, mask, 0.0).to(DTYPE)
        # a label out of range shows as NaN, unless an upstream gradient of 0 masks its row
        ce_factor = tl.where((label >= n_cols) & (ce_factor != 0), float("nan"), ce_factor)
        ce_factor = tl.where(label < 0, 0.0, ce_factor)
    return Factors(factor, ce_factor, label, own)


@triton.jit
def slopes_of(
    x, y, is_apart, units, row, weight, factors, DIVERGENCE: tl.constexpr,
    IS_DECOUPLED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Return the divergence's gradient of a tile; a factor of 0 selects: it wins over a NaN."""
    ds, dt = (x - row.ms) * units.cs, (y - row.mt) * units.ct
    by_log_q = slope(ds, dt, row, weight, DIVERGENCE, FAST)
    if IS_DECOUPLED:
        rest = tl.where(row.zt == INFINITY, 0.0, 1 - weight)  # where a network has no others
        by_log_q = by_log_q * rest - tl.exp2(ds) * (1 / row.zs) * row.slope_sum
        by_log_q = tl.where(is_apart, row.slope_sum, by_log_q)
    return tl.where(factors.divergence == 0, 0.0, by_log_q * factors.divergence)


@triton.jit
def _row_gradient(
    x, y, shares, columns, is_apart, units, row, weight, factors, target,
    DIVERGENCE: tl.constexpr, IS_DECOUPLED: tl.constexpr, LABELS: tl.constexpr,
    APART: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a tile in the student's logits, but for that of its deviation."""
    gradient = slopes_of(
        x, y, is_apart, units, row, weight, factors, DIVERGENCE, IS_DECOUPLED, FAST
    )
    if LABELS:
        gradient += label_slopes(x, shares, columns, units, row, factors, target, APART)
    return gradient


@triton.jit
def _gradient_tile(
    rows, gradient_row, columns, inside, unmasked, head, n_cols, units, row, standard, weight,
    factors, target, DIVERGENCE: tl.constexpr, IS_DECOUPLED: tl.constexpr,
    LABELS: tl.constexpr, APART: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a tile of one row, whose logits are read only if it is unmasked."""
    logits, y = load_logits(rows, columns, inside & unmasked, DIVERGENCE, False, DTYPE)
    x, y = without_apart(logits, y, rows, columns, APART)
    shares = load_shares(target, columns, inside & unmasked, n_cols, DTYPE)
    gradient = _row_gradient(
        x, y, shares, columns + head, columns == rows.apart, units, row, weight, factors,
        target, DIVERGENCE, IS_DECOUPLED, LABELS, APART, FAST,
    )  # fmt: skip
    if standard is not None:
        gradient += slopes_of_deviation(logits, row.ms, standard, factors.divergence)
    tl.store(gradient_row + columns, gradient.to(gradient_row.dtype.element_ty), mask=inside)


@triton.jit
def _other_gradients(
    rows, columns, inside, head, n_cols, units, row, weight, factors, target,
    DIVERGENCE: tl.constexpr, IS_DECOUPLED: tl.constexpr, LABELS: tl.constexpr,
    APART: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Return the sum of a tile's gradient without the row's top, and the top, for each thread."""
    x, y = load_logits(rows, columns, inside, DIVERGENCE, APART, DTYPE)
    shares = load_shares(target, columns, inside, n_cols, DTYPE)
    gradient = _row_gradient(
        x, y, shares, columns + head, columns == rows.apart, units, row, weight, factors,
        target, DIVERGENCE, IS_DECOUPLED, LABELS, APART, FAST,
    )  # fmt: skip
    top = tl.max(tl.where(x == row.ms, columns + head, -1), 1)
    return tl.sum(tl.where(inside & (x != row.ms), gradient, 0.0), 1), top


@triton.jit(do_not_specialize=["inner"])
def certain_classes(
    student_ptr,  # (n_rows, n_cols)
    teacher_ptr,  # (n_rows, n_cols)
    labels_ptr,  # (n_rows,) or None
    row_mask_ptr,  # (n_rows,) or None
    apart_ptr,  # (n_rows,), classes that are set apart, or None
    upstream_ptr,  # (n_rows,) of the losses, or None
    ce_upstream_ptr,  # (n_rows,) of the cross-entropies, or None
    statistics_ptr,  # (n_rows, N_STATISTICS), and N_STANDARD more if IS_STANDARDIZED
    gradient_ptr,  # (n_rows, n_cols), written there; None before it is
    tops_ptr,  # (n_rows,), written; None with gradient_ptr
    of_tops_ptr,  # (n_rows,), written; None with gradient_ptr
    n_cols,
    inner,  # size of the logits' last dimension but one
    strides,  # Strides
    numbers,  # Numbers
    soft,  # Strided (n_rows, n_cols), soft labels, or None
    class_weights,  # Strided (n_rows, n_cols), whose rows are one, or None
    DIVERGENCE: tl.constexpr, IS_DECOUPLED: tl.constexpr, IS_STANDARDIZED: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr, ON_DEVICE: tl.constexpr, PER_ROW: tl.constexpr,
    CONGRUENT: tl.constexpr, TARGET_CONGRUENT: tl.constexpr, THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a class that a student is nearly certain of: program (row).

    It is minus the sum of the others, because the gradient of every row has the sum 0, and with
    Z = 1 + rest, which loses the digits of the rest, it would be the difference of numbers near 1.
    Other rows are not read; their top is −1. This is no part of `gradient`, because no block there
    has a whole row, and because a loop over one would take registers of all.
    """
    row = tl.program_id(0)
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    temperature = temperature_of(numbers.student_temperature, row, PER_ROW, ON_DEVICE, DTYPE)
    units = units_of(numbers, row, PER_ROW, ON_DEVICE, DTYPE)
    statistics_row = statistics_of(statistics_ptr, row, IS_STANDARDIZED)
    standard = None
    if IS_STANDARDIZED:
        standard = load_standard(statistics_row + N_STATISTICS)
        temperature *= standard.deviation + EPSILON
        units = standardized(units, standard.deviation, standard.teacher_deviation)
    smoothing = smoothing_of(numbers, ON_DEVICE, DTYPE)
    LABELS: tl.constexpr = ce_upstream_ptr is not None
    APART: tl.constexpr = apart_ptr is not None
    factors = row_factors(
        row, row >= 0, n_cols, upstream_ptr, ce_upstream_ptr, strides, row_mask_ptr, labels_ptr,
        soft, class_weights, smoothing, number(numbers.scale, ON_DEVICE, DTYPE) / temperature,
        DTYPE,
    )  # fmt: skip
    statistics = load_statistics(statistics_row)
    unmasked = (factors.divergence != 0) | (factors.cross_entropy != 0)
    if not (unmasked & is_certain(statistics.zs, statistics.zt, statistics.z1, LABELS)):
        if tops_ptr is not None:
            tl.store(tops_ptr + row, -1)
        return
    student = Strided(student_ptr, strides.student_outer, strides.student_inner)
    teacher = Strided(teacher_ptr, strides.teacher_outer, strides.teacher_inner)
    rows, head = pointers_of(row, student, teacher, apart_ptr, n_cols, inner, CONGRUENT, WIDTH)
    target = Target(
        from_boundary(row, soft, inner, head, TARGET_CONGRUENT),
        from_boundary(row, class_weights, inner, head, TARGET_CONGRUENT),
        smoothing,
    )
    end = (n_cols - head) // WIDTH
    sums, tops = tl.zeros([THREADS], DTYPE), tl.full([THREADS], -1, tl.int32)
    for i in range(0, end, THREADS):
        inside = (i + tl.arange(0, THREADS) < end)[:, None]
        others, top = _other_gradients(
            rows, vectors(i, THREADS, WIDTH), inside, head, n_cols, units, statistics, weight,
            factors, target, DIVERGENCE, IS_DECOUPLED, LABELS, APART, DTYPE, FAST,
        )  # fmt: skip
        sums, tops = sums + others, tl.maximum(tops, top)
    at_edge, inside_edge = edges(head, n_cols, THREADS, WIDTH)
    others, top = _other_gradients(
        rows, at_edge, inside_edge, head, n_cols, units, statistics, weight, factors, target,
        DIVERGENCE, IS_DECOUPLED, LABELS, APART, DTYPE, FAST,
    )  # fmt: skip
    value, top = -tl.sum(sums + others, 0), tl.max(tl.maximum(tops, top), 0)
    if IS_STANDARDIZED:  # loaded anew, because it would take registers in the loop
        standard = load_standard(statistics_row + N_STATISTICS)
        value += slopes_of_deviation(statistics.ms, statistics.ms, standard, factors.divergence)
    if gradient_ptr is not None:
        gradient = Strided(gradient_ptr, strides.gradient_outer, strides.gradient_inner)
        place = gradient_ptr + row_offset(row, inner, gradient) + top
        tl.store(place, value.to(gradient_ptr.dtype.element_ty), top >= 0)
    else:
        tl.store(tops_ptr + row, top)
        tl.store(of_tops_ptr + row, value)


@triton.jit(do_not_specialize=["inner"])
def gradient(
    student_ptr,  # (n_rows, n_cols)
    teacher_ptr,  # (n_rows, n_cols)
    labels_ptr,  # (n_rows,) or None
    row_mask_ptr,  # (n_rows,) or None
    apart_ptr,  # (n_rows,), classes that are set apart, or None
    upstream_ptr,  # (n_rows,) of the losses, or None
    ce_upstream_ptr,  # (n_rows,) of the cross-entropies, or None
    statistics_ptr,  # (n_rows, N_STATISTICS), and N_STANDARD more if IS_STANDARDIZED
    gradient_ptr,  # (n_rows, n_cols), written
    tops_ptr,  # (n_rows,), what `certain_classes` found before, or None
    of_tops_ptr,  # (n_rows,), or None
    n_cols,
    n_blocks,  # of VECTORS vectors, to a row
    inner,  # size of the logits' last dimension but one
    strides,  # Strides
    numbers,  # Numbers
    soft,  # Strided (n_rows, n_cols), soft labels, or None
    class_weights,  # Strided (n_rows, n_cols), whose rows are one, or None
    DIVERGENCE: tl.constexpr, IS_DECOUPLED: tl.constexpr, IS_STANDARDIZED: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr, ON_DEVICE: tl.constexpr, PER_ROW: tl.constexpr,
    CONGRUENT: tl.constexpr, TARGET_CONGRUENT: tl.constexpr, GRADIENT_CONGRUENT: tl.constexpr,
    VECTORS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a block of a row from its statistics: program row · n_blocks + block.

    Both are on one axis of the grid, because the others hold 65,535 programs at most.
    """
    program = tl.program_id(0)
    row, block = program // n_blocks, program % n_blocks
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    temperature = temperature_of(numbers.student_temperature, row, PER_ROW, ON_DEVICE, DTYPE)
    units = units_of(numbers, row, PER_ROW, ON_DEVICE, DTYPE)
    statistics_row = statistics_of(statistics_ptr, row, IS_STANDARDIZED)
    standard = None
    if IS_STANDARDIZED:
        standard = load_standard(statistics_row + N_STATISTICS)
        temperature *= standard.deviation + EPSILON
        units = standardized(units, standard.deviation, standard.teacher_deviation)
    smoothing = smoothing_of(numbers, ON_DEVICE, DTYPE)
    LABELS: tl.constexpr = ce_upstream_ptr is not None
    APART: tl.constexpr = apart_ptr is not None
    factors = row_factors(
        row, row >= 0, n_cols, upstream_ptr, ce_upstream_ptr, strides, row_mask_ptr, labels_ptr,
        soft, class_weights, smoothing, number(numbers.scale, ON_DEVICE, DTYPE) / temperature,
        DTYPE,
    )  # fmt: skip
    statistics = load_statistics(statistics_row)

    student = Strided(student_ptr, strides.student_outer, strides.student_inner)
    teacher = Strided(teacher_ptr, strides.teacher_outer, strides.teacher_inner)
    rows, head = pointers_of(row, student, teacher, apart_ptr, n_cols, inner, CONGRUENT, WIDTH)
    target = Target(
        from_boundary(row, soft, inner, head, TARGET_CONGRUENT),
        from_boundary(row, class_weights, inner, head, TARGET_CONGRUENT),
        smoothing,
    )
    gradient = Strided(gradient_ptr, strides.gradient_outer, strides.gradient_inner)
    gradient_row = at_boundary(
        gradient_ptr, row_offset(row, inner, gradient) + head, GRADIENT_CONGRUENT
    )
    unmasked = (factors.divergence != 0) | (factors.cross_entropy != 0)
    start, end = block * VECTORS, (n_cols - head) // WIDTH
    inside = (start + tl.arange(0, VECTORS) < end)[:, None]
    _gradient_tile(
        rows, gradient_row, vectors(start, VECTORS, WIDTH), inside, unmasked, head, n_cols, units,
        statistics, standard, weight, factors, target, DIVERGENCE, IS_DECOUPLED, LABELS, APART,
        DTYPE, FAST,
    )  # fmt: skip
    if (block == 0) & (n_cols % WIDTH + head > 0):
        at_edge, inside_edge = edges(head, n_cols, 2, WIDTH)
        _gradient_tile(
            rows, gradient_row, at_edge, inside_edge, unmasked, head, n_cols, units, statistics,
            standard, weight, factors, target, DIVERGENCE, IS_DECOUPLED, LABELS, APART, DTYPE,
            FAST,
        )  # fmt: skip
    if tops_ptr is not None:
        top = tl.load(tops_ptr + row)
        vector = (top - head + WIDTH) // WIDTH - 1  # rounded down, because a division rounds to 0
        is_own = (vector >= start) & (vector < tl.minimum(start + VECTORS, end))
        is_own |= (block == 0) & ((vector < 0) | (vector >= end))
        if (top >= 0) & is_own:
            tl.debug_barrier()  # so that this is stored after what the tile has there
            value = tl.load(of_tops_ptr + row)
            tl.store(gradient_row + (top - head), value.to(gradient_row.dtype.element_ty))
