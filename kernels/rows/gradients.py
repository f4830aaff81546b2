"""Kernels that write the gradient of rows, by blocks of a row or of rows that stay on chip.

The gradient in a logit is factor · (h − q Σ h), with the sums of `sweeps.py` or, in `whole_rows`,
sums of its own. For each entry of bf16 logits both move 6 bytes.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.device import Strided
from fastkd.kernels.rows.sweeps import (
    N_STATISTICS,
    Pointers,
    edges,
    load_logits,
    load_statistics,
    temperature_of,
    units_of,
    vectors,
)
from fastkd.kernels.rows.terms import (
    LOWEST,
    Statistics,
    Units,
    add_products,
    among_others,
    cross_entropy,
    decoupled,
    is_certain,
    kl_value,
    log2_odds,
    logit_of,
    mixture,
    mixture_value,
    slope,
    without_others,
)
from fastkd.kernels.tiles import INFINITY, at_boundary, head_of, number, row_offset

EPSILON = tl.constexpr(1e-7)  # added to a deviation


class Factors(NamedTuple):
    """Factors of a row's two gradients, 0 where it is masked, and its label."""

    divergence: tl.tensor
    cross_entropy: tl.tensor
    label: tl.tensor


@triton.jit
def _row_factors(
    rows, mask, n_cols, upstream_ptr, ce_upstream_ptr, strides, row_mask_ptr, labels_ptr, scale,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the Factors of rows; `scale` multiplies the gradient of the divergence."""
    factor = tl.zeros(rows.shape, DTYPE)
    ce_factor, label = factor, tl.full(rows.shape, -1, tl.int64)
    rows = rows.to(tl.int64)  # because upstream gradients may be far apart
    if upstream_ptr is not None:
        factor = tl.load(upstream_ptr + rows * strides.upstream, mask, 0.0).to(DTYPE) * scale
    elif ce_upstream_ptr is None:
        factor += scale
    if row_mask_ptr is not None:
        factor = tl.where(tl.load(row_mask_ptr + rows, mask, 0) != 0, factor, 0.0)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + rows, mask, -1).to(tl.int64)
    if ce_upstream_ptr is not None:
        ce_factor = tl.load(ce_upstream_ptr + rows * strides.ce_upstream, mask, 0.0).to(DTYPE)
        # a label out of range shows as NaN, unless an upstream gradient of 0 masks its row
        ce_factor = tl.where((label >= n_cols) & (ce_factor != 0), float("nan"), ce_factor)
        ce_factor = tl.where(label < 0, 0.0, ce_factor)
    return Factors(factor, ce_factor, label)


@triton.jit
def _slopes(
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
def _label_slopes(x, columns, units, row, factors, APART: tl.constexpr):
    """Return the gradient of the cross-entropy, of a tile."""
    q1 = tl.exp2((x - row.ms) * units.c1) * (1 / row.z1)
    distance = q1 - tl.where(columns == factors.label, 1.0, 0.0)
    factor = factors.cross_entropy
    if APART:
        factor *= row.left
    return tl.where(factors.cross_entropy == 0, 0.0, distance * factor)


@triton.jit
def _row_gradient(
    x, y, columns, is_apart, units, row, weight, factors, DIVERGENCE: tl.constexpr,
    IS_DECOUPLED: tl.constexpr, LABELS: tl.constexpr, APART: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a tile in the student's logits."""
    gradient = _slopes(x, y, is_apart, units, row, weight, factors, DIVERGENCE, IS_DECOUPLED, FAST)
    if LABELS:
        gradient += _label_slopes(x, columns, units, row, factors, APART)
    return gradient


@triton.jit
def _is_top(rows, columns, mask, pivots, APART: tl.constexpr):
    """Return where the student's logits are these pivots; they are read anew, from the cache.

    Kept from where they were read first, they would take registers of rows that need no look.
    """
    logits = tl.load(rows.student + columns, mask, -INFINITY)
    is_top = logits == pivots.to(logits.dtype)
    return is_top & (columns != rows.apart) if APART else is_top


@triton.jit
def _with_certain(slopes, rows, columns, mask, certain, ms, APART: tl.constexpr):
    """Return the slopes of rows, in which a certain class has minus the sum of the others."""
    if tl.max(certain.to(tl.int32), 0) != 0:
        pivots = tl.where(certain, ms, INFINITY)[:, None]
        is_top = _is_top(rows, columns, mask, pivots, APART)
        others = tl.sum(tl.where(is_top, 0.0, slopes), 1)
        slopes = tl.where(is_top, -others[:, None], slopes)
    return slopes


@triton.jit
def _gradient_tile(
    rows, gradient_row, columns, inside, unmasked, head, units, row, weight, factors,
    DIVERGENCE: tl.constexpr, IS_DECOUPLED: tl.constexpr, LABELS: tl.constexpr,
    APART: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a tile of one row, whose logits are read only if it is unmasked."""
    x, y = load_logits(rows, columns, inside & unmasked, DIVERGENCE, APART, DTYPE)
    gradient = _row_gradient(
        x, y, columns + head, columns == rows.apart, units, row, weight, factors, DIVERGENCE,
        IS_DECOUPLED, LABELS, APART, FAST,
    )  # fmt: skip
    tl.store(gradient_row + columns, gradient.to(gradient_row.dtype.element_ty), mask=inside)


@triton.jit
def _pointers_of(
    row, student_ptr, teacher_ptr, apart_ptr, n_cols, inner, strides, CONGRUENT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the Pointers to a row, and how many of its elements precede its first boundary."""
    student = Strided(student_ptr, strides.student_outer, strides.student_inner)
    teacher = Strided(teacher_ptr, strides.teacher_outer, strides.teacher_inner)
    student_row = student_ptr + row_offset(row, inner, student)
    head = head_of(student_row, n_cols, WIDTH)
    apart = tl.load(apart_ptr + row).to(tl.int64) if apart_ptr is not None else -1
    rows = Pointers(
        at_boundary(student_row, head, True),
        at_boundary(teacher_ptr, row_offset(row, inner, teacher) + head, CONGRUENT),
        apart - head,
    )
    return rows, head


@triton.jit
def _other_gradients(
    rows, columns, inside, head, units, row, weight, factors, DIVERGENCE: tl.constexpr,
    IS_DECOUPLED: tl.constexpr, LABELS: tl.constexpr, APART: tl.constexpr, DTYPE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Return the sum of a tile's gradient without the row's top, and the top, for each thread."""
    x, y = load_logits(rows, columns, inside, DIVERGENCE, APART, DTYPE)
    gradient = _row_gradient(
        x, y, columns + head, columns == rows.apart, units, row, weight, factors, DIVERGENCE,
        IS_DECOUPLED, LABELS, APART, FAST,
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
    statistics_ptr,  # (n_rows, N_STATISTICS)
    gradient_ptr,  # (n_rows, n_cols), written there; None before it is
    tops_ptr,  # (n_rows,), written; None with gradient_ptr
    of_tops_ptr,  # (n_rows,), written; None with gradient_ptr
    n_cols,
    inner,  # size of the logits' last dimension but one
    strides,  # Strides
    numbers,  # Numbers
    DIVERGENCE: tl.constexpr, IS_DECOUPLED: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ON_DEVICE: tl.constexpr, PER_ROW: tl.constexpr, CONGRUENT: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr,
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
    LABELS: tl.constexpr = ce_upstream_ptr is not None
    APART: tl.constexpr = apart_ptr is not None
    factors = _row_factors(
        row, row >= 0, n_cols, upstream_ptr, ce_upstream_ptr, strides, row_mask_ptr, labels_ptr,
        number(numbers.scale, ON_DEVICE, DTYPE) / temperature, DTYPE,
    )  # fmt: skip
    statistics = load_statistics(statistics_ptr + row.to(tl.int64) * N_STATISTICS)
    unmasked = (factors.divergence != 0) | (factors.cross_entropy != 0)
    if not (unmasked & is_certain(statistics.zs, statistics.zt, statistics.z1, LABELS)):
        if tops_ptr is not None:
            tl.store(tops_ptr + row, -1)
        return
    rows, head = _pointers_of(
        row, student_ptr, teacher_ptr, apart_ptr, n_cols, inner, strides, CONGRUENT, WIDTH
    )
    end = (n_cols - head) // WIDTH
    sums, tops = tl.zeros([THREADS], DTYPE), tl.full([THREADS], -1, tl.int32)
    for i in range(0, end, THREADS):
        inside = (i + tl.arange(0, THREADS) < end)[:, None]
        others, top = _other_gradients(
            rows, vectors(i, THREADS, WIDTH), inside, head, units, statistics, weight, factors,
            DIVERGENCE, IS_DECOUPLED, LABELS, APART, DTYPE, FAST,
        )  # fmt: skip
        sums, tops = sums + others, tl.maximum(tops, top)
    at_edge, inside_edge = edges(head, n_cols, THREADS, WIDTH)
    others, top = _other_gradients(
        rows, at_edge, inside_edge, head, units, statistics, weight, factors, DIVERGENCE,
        IS_DECOUPLED, LABELS, APART, DTYPE, FAST,
    )  # fmt: skip
    value, top = -tl.sum(sums + others, 0), tl.max(tl.maximum(tops, top), 0)
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
    statistics_ptr,  # (n_rows, N_STATISTICS)
    gradient_ptr,  # (n_rows, n_cols), written
    tops_ptr,  # (n_rows,), what `certain_classes` found before, or None
    of_tops_ptr,  # (n_rows,), or None
    n_cols,
    n_blocks,  # of VECTORS vectors, to a row
    inner,  # size of the logits' last dimension but one
    strides,  # Strides
    numbers,  # Numbers
    DIVERGENCE: tl.constexpr, IS_DECOUPLED: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ON_DEVICE: tl.constexpr, PER_ROW: tl.constexpr, CONGRUENT: tl.constexpr,
    GRADIENT_CONGRUENT: tl.constexpr, VECTORS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a block of a row from its statistics: program row · n_blocks + block.

    Both are on one axis of the grid, because the others hold 65,535 programs at most.
    """
    program = tl.program_id(0)
    row, block = program // n_blocks, program % n_blocks
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    temperature = temperature_of(numbers.student_temperature, row, PER_ROW, ON_DEVICE, DTYPE)
    units = units_of(numbers, row, PER_ROW, ON_DEVICE, DTYPE)
    LABELS: tl.constexpr = ce_upstream_ptr is not None
    APART: tl.constexpr = apart_ptr is not None
    factors = _row_factors(
        row, row >= 0, n_cols, upstream_ptr, ce_upstream_ptr, strides, row_mask_ptr, labels_ptr,
        number(numbers.scale, ON_DEVICE, DTYPE) / temperature, DTYPE,
    )  # fmt: skip
    statistics = load_statistics(statistics_ptr + row.to(tl.int64) * N_STATISTICS)

    rows, head = _pointers_of(
        row, student_ptr, teacher_ptr, apart_ptr, n_cols, inner, strides, CONGRUENT, WIDTH
    )
    gradient = Strided(gradient_ptr, strides.gradient_outer, strides.gradient_inner)
    gradient_row = at_boundary(
        gradient_ptr, row_offset(row, inner, gradient) + head, GRADIENT_CONGRUENT
    )
    unmasked = (factors.divergence != 0) | (factors.cross_entropy != 0)
    start, end = block * VECTORS, (n_cols - head) // WIDTH
    inside = (start + tl.arange(0, VECTORS) < end)[:, None]
    _gradient_tile(
        rows, gradient_row, vectors(start, VECTORS, WIDTH), inside, unmasked, head, units,
        statistics, weight, factors, DIVERGENCE, IS_DECOUPLED, LABELS, APART, DTYPE, FAST,
    )  # fmt: skip
    if (block == 0) & (n_cols % WIDTH + head > 0):
        at_edge, inside_edge = edges(head, n_cols, 2, WIDTH)
        _gradient_tile(
            rows, gradient_row, at_edge, inside_edge, unmasked, head, units, statistics, weight,
            factors, DIVERGENCE, IS_DECOUPLED, LABELS, APART, DTYPE, FAST,
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


@triton.jit
def _others_of_rows(
    rows, certain, exists, n_cols, units, row, weight, factors,
    DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the sums of the gradients of rows without their tops, and these, −1 if uncertain.

    They are read anew in narrow tiles, which take few registers.
    """
    NARROW: tl.constexpr = min(1024, max(1, COLUMNS // 4))
    sums, tops = tl.zeros([ROWS, NARROW], DTYPE), tl.full([ROWS, NARROW], -1, tl.int32)
    for start in range(0, n_cols, NARROW):
        columns = start + tl.arange(0, NARROW)[None, :]
        x, y = load_logits(rows, columns, exists & (columns < n_cols), DIVERGENCE, False, DTYPE)
        gradient = _slopes(x, y, columns < 0, units, row, weight, factors, DIVERGENCE, False, FAST)
        sums += tl.where(x == row.ms, 0.0, gradient)
        tops = tl.where(x == row.ms, columns, tops)
    return tl.sum(sums, 1), tl.max(tl.where(certain, tops, -1), 1)


@triton.jit
def _moments(x):
    """Return the mean of each row of logits, its unbiased deviation and its number of classes.

    They are columns, in which the classes that −∞ excludes have no part.
    """
    allowed = x != -INFINITY  # which those outside the row are not
    n = tl.sum(allowed.to(x.dtype), 1)[:, None]
    mean = tl.sum(tl.where(allowed, x, 0.0), 1)[:, None] / n
    above = tl.where(allowed, x - mean, 0.0)
    return mean, tl.sqrt(tl.sum(above * above, 1)[:, None] / tl.maximum(n - 1, 1)), n


@triton.jit
def _slopes_of_deviation(slopes, x, mean, deviation, n):
    """Return what the deviation, which divides the logits, contributes to their gradient.

    Logits that are all equal stand where it has no slope, for which PyTorch takes 0.
    """
    allowed = x != -INFINITY
    above = tl.where(allowed, x - mean, 0.0)
    each = tl.sum(tl.where(allowed, slopes, 0.0) * above, 1)[:, None]
    each = each / ((deviation + EPSILON) * deviation * (n - 1))
    return -above * tl.where(deviation == 0, 0.0, each)


@triton.jit(do_not_specialize=["n_rows", "inner"])
def whole_rows(
    student_ptr,  # (n_rows, n_cols)
    teacher_ptr,  # (n_rows, n_cols)
    labels_ptr,  # (n_rows,) or None
    row_mask_ptr,  # (n_rows,) or None
    apart_ptr,  # (n_rows,), classes that are set apart, or None
    upstream_ptr,  # (n_rows,) of the losses, or None
    ce_upstream_ptr,  # (n_rows,) of the cross-entropies, or None
    losses_ptr,  # (n_rows,); None: the gradient alone
    cross_entropies_ptr,  # (n_rows,); None without losses_ptr or without labels
    gradient_ptr,  # (n_rows, n_cols), written; None: the losses alone
    n_rows,
    n_cols,
    inner,  # size of the logits' last dimension but one
    strides,  # Strides
    numbers,  # Numbers
    DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, IS_DECOUPLED: tl.constexpr,
    IS_STANDARDIZED: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ON_DEVICE: tl.constexpr, PER_ROW: tl.constexpr, ALIGNMENT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, IN_PLACE: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """Compute the losses, the gradient or both of ROWS rows, which are read once and stay on chip.

    ALIGNMENT divides n_cols and the start of every row. A gradient without upstream gradients is
    that for the row weight; WEIGHED, it is there already, and rows with this upstream gradient are
    left alone. IN_PLACE it is written over the student.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < n_rows
    row_weight = number(numbers.row_weight, ON_DEVICE, DTYPE)
    if WEIGHED:
        places = upstream_ptr + rows.to(tl.int64) * strides.upstream
        differs = exists & (tl.load(places, exists, 0.0).to(DTYPE) != row_weight)
        if tl.sum(differs.to(tl.int32), 0) == 0:
            return
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    # a column where each row has its own, so that it divides a tile of logits
    own = tl.where(exists, rows, 0)[:, None] if PER_ROW else 0
    temperature = temperature_of(numbers.student_temperature, own, PER_ROW, ON_DEVICE, DTYPE)
    scale = number(numbers.scale, ON_DEVICE, DTYPE)
    units = units_of(numbers, own, PER_ROW, ON_DEVICE, DTYPE)
    LABELS: tl.constexpr = labels_ptr is not None
    APART: tl.constexpr = apart_ptr is not None
    n_cols = n_cols // ALIGNMENT * ALIGNMENT  # unchanged; tells the compiler what divides it
    columns = tl.arange(0, COLUMNS)[None, :]
    student = Strided(student_ptr, strides.student_outer, strides.student_inner)
    teacher = Strided(teacher_ptr, strides.teacher_outer, strides.teacher_inner)
    student_rows = row_offset(rows, inner, student) // ALIGNMENT * ALIGNMENT
    teacher_rows = row_offset(rows, inner, teacher) // ALIGNMENT * ALIGNMENT
    inside = exists[:, None] & (columns < n_cols)
    apart = tl.load(apart_ptr + rows, exists, 0).to(tl.int64)[:, None] if APART else -1
    pointers = Pointers(
        student_ptr + student_rows[:, None], teacher_ptr + teacher_rows[:, None], apart
    )
    if IS_STANDARDIZED:
        x, y = load_logits(pointers, columns, inside, DIVERGENCE, False, DTYPE)
        mean, deviation, n = _moments(x)
        _, of_teacher, _ = _moments(y)
        temperature *= deviation + EPSILON
        units = Units(units.cs / (deviation + EPSILON), units.ct / (of_teacher + EPSILON), units.c1)
    x, y = load_logits(pointers, columns, inside, DIVERGENCE, APART, DTYPE)

    ms, mt = tl.maximum(tl.max(x, 1), LOWEST), tl.maximum(tl.max(y, 1), LOWEST)
    above = x - ms[:, None]
    ds, dt = above * units.cs, (y - mt[:, None]) * units.ct
    es, et = tl.exp2(ds), tl.exp2(dt)
    zs, zt = tl.sum(es, 1), tl.sum(et, 1)
    if IS_MIXTURE:
        summand, q, v = mixture(ds, dt, zs[:, None], zt[:, None], weight, DIVERGENCE, FAST)
        value, slope_sum = mixture_value(
            tl.sum(summand, 1), tl.sum(q * v, 1), zs, zt, weight, DIVERGENCE
        )
    else:
        zeros = tl.zeros([ROWS], DTYPE)
        a, b = add_products(zeros, zeros, ds, dt, es, et, DIVERGENCE)
        value, slope_sum = kl_value(zs, zt, a, b, weight, DIVERGENCE)
    if APART:
        value = among_others(value, zs, zt)
    z1, left = zs, zs
    if LABELS:
        z1 = tl.sum(tl.exp2(above * units.c1), 1)
    if IS_DECOUPLED:
        of_q = log2_odds(
            logit_of(pointers.student, apart, n_cols, DTYPE), ms[:, None], zs[:, None], units.cs
        )
        of_p = log2_odds(
            logit_of(pointers.teacher, apart, n_cols, DTYPE), mt[:, None], zt[:, None], units.ct
        )
        value, slope_sum = decoupled(value[:, None], of_p, of_q, weight)
        value, slope_sum = tl.max(value, 1), tl.max(slope_sum, 1)

    if losses_ptr is not None:
        unmasked = (
            tl.load(row_mask_ptr + rows, exists, 0) != 0 if row_mask_ptr is not None else exists
        )
        tl.store(losses_ptr + rows, tl.where(unmasked, value * scale, 0.0), exists)
    if LABELS and (APART or losses_ptr is not None):
        label = tl.load(labels_ptr + rows, exists, -1).to(tl.int64)
        row_ptr = student_ptr + student_rows
        ce, left = cross_entropy(row_ptr, label, n_cols, units.c1, ms, z1, APART, DTYPE)
        if losses_ptr is not None:
            tl.store(cross_entropies_ptr + rows, ce, exists)
    if gradient_ptr is not None:
        if APART:
            zs, zt = without_others(zs, zt, IS_DECOUPLED)
            z1 = tl.where(z1 == 0, INFINITY, z1)
        unit = scale / temperature
        if (upstream_ptr is None) and (ce_upstream_ptr is None):
            unit *= row_weight
        if IS_STANDARDIZED or PER_ROW:
            unit = tl.max(unit, 1)  # the column's one
        factors = _row_factors(
            rows, exists, n_cols, upstream_ptr, ce_upstream_ptr, strides, row_mask_ptr, labels_ptr,
            unit, DTYPE,
        )  # fmt: skip
        row = Statistics(
            ms[:, None], zs[:, None], mt[:, None], zt[:, None], slope_sum[:, None],
            left[:, None], z1[:, None],
        )  # fmt: skip
        factors = Factors(
            factors.divergence[:, None], factors.cross_entropy[:, None], factors.label[:, None]
        )
        slopes = _slopes(
            x, y, columns == apart, units, row, weight, factors, DIVERGENCE, IS_DECOUPLED, FAST
        )
        certain = is_certain(zs, zt, z1, ce_upstream_ptr is not None)
        if IS_STANDARDIZED:
            slopes = _with_certain(slopes, pointers, columns, inside, certain, ms, APART)
            if APART:
                x, y = load_logits(pointers, columns, inside, DIVERGENCE, False, DTYPE)
            of_deviation = _slopes_of_deviation(slopes, x, mean, deviation, n)
            # a row that does not count may hold a NaN
            slopes += tl.where(factors.divergence != 0, of_deviation, 0.0)
            if APART:
                x, y = load_logits(pointers, columns, inside, DIVERGENCE, APART, DTYPE)
        if ce_upstream_ptr is not None:
            slopes += _label_slopes(x, columns, units, row, factors, APART)
        # the gradient of a KL alone takes few registers, which a tile of logits would add to
        IS_LEAN: tl.constexpr = not (
            losses_ptr is not None or LABELS or IS_MIXTURE or IS_STANDARDIZED or APART
        )
        if not IS_LEAN:
            slopes = _with_certain(slopes, pointers, columns, inside, certain, ms, APART)
        if IN_PLACE and LABELS:
            tl.debug_barrier()  # so that the label's logit has been read before it is overwritten
        gradient = Strided(gradient_ptr, strides.gradient_outer, strides.gradient_inner)
        gradient_rows = row_offset(rows, inner, gradient) // ALIGNMENT * ALIGNMENT
        tl.store(
            gradient_ptr + gradient_rows[:, None] + columns,
            slopes.to(gradient_ptr.dtype.element_ty),
            mask=inside,
        )
        if IS_LEAN:
            if tl.max(certain.to(tl.int32), 0) != 0:
                others, tops = _others_of_rows(
                    pointers, certain[:, None], exists[:, None], n_cols, units, row, weight,
                    factors, DIVERGENCE, DTYPE, FAST, ROWS, COLUMNS,
                )  # fmt: skip
                tl.debug_barrier()  # so that this is stored after what the tile has there
                tl.store(
                    gradient_ptr + gradient_rows + tops,
                    (-others).to(gradient_ptr.dtype.element_ty),
                    mask=tops >= 0,
                )
