"""Kernels of the rows: sums over them, and their gradient.

With h = ∂d/∂log q a divergence D = Σ d(log p, log q) has the slope (h − q Σ h) / T, so that a row
needs a sweep for its sums and one for its gradient. For each entry of bf16 logits `row_statistics`
reads 4 bytes, or 8 in two sweeps where both Z must be known before d is summed; `gradient` and
`whole_rows` with a gradient move 6.

A row is read in vectors of 16 bytes that lie on their boundary, whatever its start and length; what
remains at its two ends is read by elements. Sums stay private to a thread until the row ends.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.device import Strided
from fastkd.kernels.rows.terms import (
    LOWEST,
    Statistics,
    Sums,
    Units,
    add_products,
    cross_entropy,
    fold,
    kl_value,
    merge,
    mixture,
    mixture_value,
    slope,
)
from fastkd.kernels.tiles import (
    INFINITY,
    LOG2E,
    at_boundary,
    head_of,
    log2_units,
    number,
    row_offset,
)

N_STATISTICS = tl.constexpr(7)  # numbers of a row or split in memory, in the order of Sums


class Numbers(NamedTuple):
    """The numbers of a problem: by value, or all of them as pointers to one element."""

    student_temperature: float | Tensor
    teacher_temperature: float | Tensor
    weight: float | Tensor
    scale: float | Tensor


class Strides(NamedTuple):
    """Strides of logits and of upstream gradients, in elements; 0 for what is not there.

    They follow all pointers, because other orders of the parameters cost registers.
    """

    student_outer: int
    student_inner: int
    teacher_outer: int
    teacher_inner: int
    gradient_outer: int
    gradient_inner: int
    upstream: int
    ce_upstream: int


class Pointers(NamedTuple):
    """Pointers into the same row of both networks, to its first boundary."""

    student: tl.tensor
    teacher: tl.tensor


class Span(NamedTuple):
    """The vectors [start, end) of a row of n_cols elements, of which `head` precede vector 0."""

    start: tl.tensor
    end: tl.tensor
    head: tl.tensor
    n_cols: tl.tensor


class Factors(NamedTuple):
    """Factors of a row's two gradients, 0 where it is masked, and its label."""

    divergence: tl.tensor
    cross_entropy: tl.tensor
    label: tl.tensor


@triton.jit
def _units(numbers, ON_DEVICE: tl.constexpr, DTYPE: tl.constexpr):
    return Units(
        log2_units(number(numbers.student_temperature, ON_DEVICE, DTYPE), DTYPE),
        log2_units(number(numbers.teacher_temperature, ON_DEVICE, DTYPE), DTYPE),
        tl.full([], LOG2E, DTYPE),
    )


@triton.jit
def _logits(rows, columns, mask, DTYPE: tl.constexpr):
    fill = None if mask is None else -INFINITY
    x = tl.load(rows.student + columns, mask=mask, other=fill).to(DTYPE)
    y = tl.load(rows.teacher + columns, mask=mask, other=fill).to(DTYPE)
    return x, y


@triton.jit
def _vectors(start, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the columns [R, K] of the vectors from `start`, relative to the first boundary."""
    return (start + tl.arange(0, THREADS))[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _edges(head, n_cols, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the columns [R, K] before the first and after the last boundary, and their mask."""
    thread, k = tl.arange(0, THREADS)[:, None], tl.arange(0, WIDTH)[None, :]
    end = (n_cols - head) // WIDTH * WIDTH
    columns = tl.where(thread == 0, k - head, end + k)
    before, after = (thread == 0) & (k < head), (thread == 1) & (end + k < n_cols - head)
    return columns, before | after


@triton.jit
def _has_edges(span, WIDTH: tl.constexpr):
    """Return whether the span starts its row, which then has edges to be read with it."""
    return (span.start == 0) & (span.n_cols % WIDTH + span.head > 0)


@triton.jit
def _online_sums(
    rows, span, units, DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, DTYPE: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the Sums over a span, and over the edges of the row if the span starts at 0.

    Every thread keeps its own pivots and sums, so that there is no barrier before the end.
    """
    pivots, zeros = tl.full([THREADS], LOWEST, DTYPE), tl.zeros([THREADS], DTYPE)
    sums = Sums(pivots, zeros, pivots, zeros, zeros, zeros, zeros)
    rest = span.start + (span.end - span.start) // THREADS * THREADS
    for i in range(span.start, rest, THREADS):
        x, y = _logits(rows, _vectors(i, THREADS, WIDTH), None, DTYPE)
        sums = fold(x, y, units, sums, DIVERGENCE, LABELS)
    if rest < span.end:
        inside = (rest + tl.arange(0, THREADS) < span.end)[:, None]
        x, y = _logits(rows, _vectors(rest, THREADS, WIDTH), inside, DTYPE)
        sums = fold(x, y, units, sums, DIVERGENCE, LABELS)
    if _has_edges(span, WIDTH):
        columns, inside = _edges(span.head, span.n_cols, THREADS, WIDTH)
        x, y = _logits(rows, columns, inside, DTYPE)
        sums = fold(x, y, units, sums, DIVERGENCE, LABELS)
    return merge(sums, units, DIVERGENCE)


@triton.jit
def _mixture_of(
    x, y, units, ms, zs, mt, zt, weight, DIVERGENCE: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Return Σ d and Σ q·v of a tile, for each thread."""
    ds, dt = (x - ms) * units.cs, (y - mt) * units.ct
    summand, q, v = mixture(ds, dt, zs, zt, weight, DIVERGENCE, FAST)
    return tl.sum(summand, 1), tl.sum(q * v, 1)


@triton.jit
def _mixture_sums(
    rows, span, units, ms, zs, mt, zt, weight, DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr,
    FAST: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return Σ d and Σ q·v over what `_online_sums` reads, given the pivots and Z of the row."""
    value = tl.zeros([THREADS], DTYPE)
    slope_sum = value
    rest = span.start + (span.end - span.start) // THREADS * THREADS
    for i in range(span.start, rest, THREADS):
        x, y = _logits(rows, _vectors(i, THREADS, WIDTH), None, DTYPE)
        summands, slopes = _mixture_of(x, y, units, ms, zs, mt, zt, weight, DIVERGENCE, FAST)
        value, slope_sum = value + summands, slope_sum + slopes
    if rest < span.end:
        inside = (rest + tl.arange(0, THREADS) < span.end)[:, None]
        x, y = _logits(rows, _vectors(rest, THREADS, WIDTH), inside, DTYPE)
        summands, slopes = _mixture_of(x, y, units, ms, zs, mt, zt, weight, DIVERGENCE, FAST)
        value, slope_sum = value + summands, slope_sum + slopes
    if _has_edges(span, WIDTH):
        columns, inside = _edges(span.head, span.n_cols, THREADS, WIDTH)
        x, y = _logits(rows, columns, inside, DTYPE)
        summands, slopes = _mixture_of(x, y, units, ms, zs, mt, zt, weight, DIVERGENCE, FAST)
        value, slope_sum = value + summands, slope_sum + slopes
    return tl.sum(value, 0), tl.sum(slope_sum, 0)


@triton.jit
def _store_sums(pointer, sums):
    for i in tl.static_range(N_STATISTICS):
        tl.store(pointer + i, sums[i])


@triton.jit
def _store_statistics(pointer, sums, slope_sum):
    """Store the Statistics of a row, where a's place is the slope sum's and b's stays empty."""
    _store_sums(
        pointer,
        Sums(sums.ms, sums.zs, sums.mt, sums.zt, slope_sum, 0.0, sums.z1),
    )


@triton.jit
def _load_statistics(pointer):
    return Statistics(
        tl.load(pointer),
        tl.load(pointer + 1),
        tl.load(pointer + 2),
        tl.load(pointer + 3),
        tl.load(pointer + 4),
        tl.load(pointer + 6),
    )


@triton.jit
def row_statistics(
    student,  # Strided (n_rows, n_cols)
    teacher,  # Strided (n_rows, n_cols)
    labels_ptr,  # (n_rows,) or None
    row_mask_ptr,  # (n_rows,) or None
    losses_ptr,  # (n_rows,)
    cross_entropies_ptr,  # (n_rows,) or None, without labels
    statistics_ptr,  # (n_rows, N_STATISTICS)
    partial_ptr,  # (n_rows, n_splits, N_STATISTICS) or None, with SWEEP 0
    numbers,  # Numbers
    n_cols,
    inner,  # size of the logits' last dimension but one
    vectors_per_split,
    DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, SWEEP: tl.constexpr, DTYPE: tl.constexpr,
    FAST: tl.constexpr, ON_DEVICE: tl.constexpr, CONGRUENT: tl.constexpr, THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the losses and statistics of a row, or a split's part of them: program (row, split).

    SWEEP 0 does all of a row. SWEEP 1 sums over a split, SWEEP 2 sums what needs the Z of the row.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    unmasked = tl.load(row_mask_ptr + row) != 0 if row_mask_ptr is not None else row >= 0
    label = tl.load(labels_ptr + row).to(tl.int64) if labels_ptr is not None else -1
    LABELS: tl.constexpr = labels_ptr is not None
    statistics_row = statistics_ptr + row.to(tl.int64) * N_STATISTICS
    if (unmasked == 0) & (label < 0):  # returns, so that no logits of a masked row are read
        if SWEEP == 0:
            tl.store(losses_ptr + row, 0.0)
            if LABELS:
                tl.store(cross_entropies_ptr + row, 0.0)
            _store_sums(statistics_row, Sums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
        return
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    units = _units(numbers, ON_DEVICE, DTYPE)
    whole_row = student.ptr + row_offset(row, inner, student)
    head = head_of(whole_row, n_cols, WIDTH)
    rows = Pointers(
        at_boundary(whole_row, head, True),
        at_boundary(teacher.ptr, row_offset(row, inner, teacher) + head, CONGRUENT),
    )
    start = split * vectors_per_split
    end = tl.maximum(start, tl.minimum(start + vectors_per_split, (n_cols - head) // WIDTH))
    span = Span(start, end, head, n_cols)

    if SWEEP < 2:
        sums = _online_sums(rows, span, units, DIVERGENCE, LABELS, DTYPE, THREADS, WIDTH)
        ms, zs, mt, zt = sums.ms, sums.zs, sums.mt, sums.zt
    else:
        ms, zs = tl.load(statistics_row), tl.load(statistics_row + 1)
        mt, zt = tl.load(statistics_row + 2), tl.load(statistics_row + 3)
    if IS_MIXTURE and SWEEP != 1:
        value, slope_sum = _mixture_sums(
            rows, span, units, ms, zs, mt, zt, weight, DIVERGENCE, DTYPE, FAST, THREADS, WIDTH
        )
        if SWEEP == 0:
            value, slope_sum = mixture_value(value, slope_sum, zs, zt, DIVERGENCE)
    elif SWEEP == 0:
        value, slope_sum = kl_value(zs, zt, sums.a, sums.b, weight, DIVERGENCE)

    if SWEEP == 0:
        scale = number(numbers.scale, ON_DEVICE, DTYPE)
        tl.store(losses_ptr + row, tl.where(unmasked, value * scale, 0.0))
        if LABELS:
            ce = cross_entropy(whole_row, label, n_cols, units.c1, sums.ms, sums.z1, DTYPE)
            tl.store(cross_entropies_ptr + row, ce)
        _store_statistics(statistics_row, sums, slope_sum)
    else:
        place = (row.to(tl.int64) * tl.num_programs(1) + split) * N_STATISTICS
        if SWEEP == 1:
            _store_sums(partial_ptr + place, sums)
        else:
            tl.store(partial_ptr + place, value)
            tl.store(partial_ptr + place + 1, slope_sum)


@triton.jit
def combine(
    student,  # Strided (n_rows, n_cols)
    labels_ptr,  # (n_rows,) or None
    row_mask_ptr,  # (n_rows,) or None
    losses_ptr,  # (n_rows,)
    cross_entropies_ptr,  # (n_rows,) or None, without labels
    statistics_ptr,  # (n_rows, N_STATISTICS)
    partial_ptr,  # (n_rows, n_splits, N_STATISTICS)
    numbers,  # Numbers
    n_cols,
    inner,  # size of the logits' last dimension but one
    n_splits,
    DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, SWEEP: tl.constexpr, DTYPE: tl.constexpr,
    ON_DEVICE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Combine what the splits of a row summed, always in the same order: program (row)."""
    row = tl.program_id(0)
    unmasked = tl.load(row_mask_ptr + row) != 0 if row_mask_ptr is not None else row >= 0
    label = tl.load(labels_ptr + row).to(tl.int64) if labels_ptr is not None else -1
    LABELS: tl.constexpr = labels_ptr is not None
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    scale = number(numbers.scale, ON_DEVICE, DTYPE)
    statistics_row = statistics_ptr + row.to(tl.int64) * N_STATISTICS
    split = tl.arange(0, SPLITS)
    inside = (split < n_splits) & (unmasked | (label >= 0))
    place = partial_ptr + (row.to(tl.int64) * n_splits + split) * N_STATISTICS
    if SWEEP == 1:
        sums = Sums(
            tl.load(place, inside, LOWEST),
            tl.load(place + 1, inside, 0.0),
            tl.load(place + 2, inside, LOWEST),
            tl.load(place + 3, inside, 0.0),
            tl.load(place + 4, inside, 0.0),
            tl.load(place + 5, inside, 0.0),
            tl.load(place + 6, inside, 0.0),
        )
        sums = merge(sums, _units(numbers, ON_DEVICE, DTYPE), DIVERGENCE)
        value, slope_sum = kl_value(sums.zs, sums.zt, sums.a, sums.b, weight, DIVERGENCE)
        _store_statistics(statistics_row, sums, slope_sum)
        if LABELS:
            row_ptr = student.ptr + row_offset(row, inner, student)
            c1 = tl.full([], LOG2E, DTYPE)
            ce = cross_entropy(row_ptr, label, n_cols, c1, sums.ms, sums.z1, DTYPE)
            tl.store(cross_entropies_ptr + row, ce)
    else:
        summands, slopes = tl.load(place, inside, 0.0), tl.load(place + 1, inside, 0.0)
        zs, zt = tl.load(statistics_row + 1), tl.load(statistics_row + 3)
        value, slope_sum = mixture_value(tl.sum(summands, 0), tl.sum(slopes, 0), zs, zt, DIVERGENCE)
        tl.store(statistics_row + 4, slope_sum)
    if SWEEP == 2 or not IS_MIXTURE:
        tl.store(losses_ptr + row, tl.where(unmasked, value * scale, 0.0))


@triton.jit
def _row_factors(
    rows, mask, n_cols, upstream_ptr, ce_upstream_ptr, strides, row_mask_ptr, labels_ptr, scale,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the Factors of rows; `scale` multiplies the gradient of the divergence."""
    factor = tl.zeros(rows.shape, DTYPE)
    ce_factor, label = factor, tl.full(rows.shape, -1, tl.int64)
    if upstream_ptr is not None:
        factor = tl.load(upstream_ptr + rows * strides.upstream, mask, 0.0).to(DTYPE) * scale
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
def _row_gradient(
    x, y, columns, units, row, weight, factors,
    DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a tile; a factor of 0 selects, so that it wins over a NaN."""
    ds, dt = (x - row.ms) * units.cs, (y - row.mt) * units.ct
    by_log_q = slope(ds, dt, row, weight, DIVERGENCE, FAST)
    gradient = tl.where(factors.divergence == 0, 0.0, by_log_q * factors.divergence)
    if LABELS:
        q1 = tl.exp2((x - row.ms) * units.c1) * (1 / row.z1)
        distance = q1 - tl.where(columns == factors.label, 1.0, 0.0)
        gradient += tl.where(factors.cross_entropy == 0, 0.0, distance * factors.cross_entropy)
    return gradient


@triton.jit
def _gradient_tile(
    rows, gradient_row, columns, inside, unmasked, head, units, row, weight, factors,
    DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a tile of one row, whose logits are read only if it is unmasked."""
    x, y = _logits(rows, columns, inside & unmasked, DTYPE)
    gradient = _row_gradient(
        x, y, columns + head, units, row, weight, factors, DIVERGENCE, LABELS, FAST
    )
    tl.store(gradient_row + columns, gradient.to(gradient_row.dtype.element_ty), mask=inside)


@triton.jit
def gradient(
    student_ptr,  # (n_rows, n_cols)
    teacher_ptr,  # (n_rows, n_cols)
    labels_ptr,  # (n_rows,) or None
    row_mask_ptr,  # (n_rows,) or None
    upstream_ptr,  # (n_rows,) of the losses, or None
    ce_upstream_ptr,  # (n_rows,) of the cross-entropies, or None
    statistics_ptr,  # (n_rows, N_STATISTICS)
    gradient_ptr,  # (n_rows, n_cols), written
    n_cols,
    n_blocks,  # of VECTORS vectors, to a row
    inner,  # size of the logits' last dimension but one
    strides,  # Strides
    numbers,  # Numbers
    DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, ON_DEVICE: tl.constexpr,
    CONGRUENT: tl.constexpr, GRADIENT_CONGRUENT: tl.constexpr, VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a block of a row from its statistics: program row · n_blocks + block.

    Both are on one axis of the grid, because the others hold 65,535 programs at most.
    """
    program = tl.program_id(0)
    row, block = program // n_blocks, program % n_blocks
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    temperature = number(numbers.student_temperature, ON_DEVICE, DTYPE)
    units = _units(numbers, ON_DEVICE, DTYPE)
    LABELS: tl.constexpr = ce_upstream_ptr is not None
    factors = _row_factors(
        row, row >= 0, n_cols, upstream_ptr, ce_upstream_ptr, strides, row_mask_ptr, labels_ptr,
        number(numbers.scale, ON_DEVICE, DTYPE) / temperature, DTYPE,
    )  # fmt: skip
    statistics = _load_statistics(statistics_ptr + row.to(tl.int64) * N_STATISTICS)

    student = Strided(student_ptr, strides.student_outer, strides.student_inner)
    teacher = Strided(teacher_ptr, strides.teacher_outer, strides.teacher_inner)
    gradient = Strided(gradient_ptr, strides.gradient_outer, strides.gradient_inner)
    student_row = student_ptr + row_offset(row, inner, student)
    head = head_of(student_row, n_cols, WIDTH)
    rows = Pointers(
        at_boundary(student_row, head, True),
        at_boundary(teacher_ptr, row_offset(row, inner, teacher) + head, CONGRUENT),
    )
    gradient_row = at_boundary(
        gradient_ptr, row_offset(row, inner, gradient) + head, GRADIENT_CONGRUENT
    )
    unmasked = (factors.divergence != 0) | (factors.cross_entropy != 0)
    start = block * VECTORS
    inside = (start + tl.arange(0, VECTORS) < (n_cols - head) // WIDTH)[:, None]
    _gradient_tile(
        rows, gradient_row, _vectors(start, VECTORS, WIDTH), inside, unmasked, head, units,
        statistics, weight, factors, DIVERGENCE, LABELS, DTYPE, FAST,
    )  # fmt: skip
    if (block == 0) & (n_cols % WIDTH + head > 0):
        at_edge, inside_edge = _edges(head, n_cols, 2, WIDTH)
        _gradient_tile(
            rows, gradient_row, at_edge, inside_edge, unmasked, head, units, statistics, weight,
            factors, DIVERGENCE, LABELS, DTYPE, FAST,
        )  # fmt: skip


@triton.jit
def whole_rows(
    student_ptr,  # (n_rows, n_cols)
    teacher_ptr,  # (n_rows, n_cols)
    labels_ptr,  # (n_rows,) or None
    row_mask_ptr,  # (n_rows,) or None
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
    DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ON_DEVICE: tl.constexpr, ALIGNMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the losses, the gradient or both of ROWS rows, which are read once and stay on chip.

    ALIGNMENT divides n_cols and the start of every row.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < n_rows
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    temperature = number(numbers.student_temperature, ON_DEVICE, DTYPE)
    scale = number(numbers.scale, ON_DEVICE, DTYPE)
    units = _units(numbers, ON_DEVICE, DTYPE)
    LABELS: tl.constexpr = labels_ptr is not None
    n_cols = n_cols // ALIGNMENT * ALIGNMENT  # unchanged; tells the compiler what divides it
    columns = tl.arange(0, COLUMNS)[None, :]
    student = Strided(student_ptr, strides.student_outer, strides.student_inner)
    teacher = Strided(teacher_ptr, strides.teacher_outer, strides.teacher_inner)
    student_rows = row_offset(rows, inner, student) // ALIGNMENT * ALIGNMENT
    teacher_rows = row_offset(rows, inner, teacher) // ALIGNMENT * ALIGNMENT
    inside = exists[:, None] & (columns < n_cols)
    pointers = Pointers(student_ptr + student_rows[:, None], teacher_ptr + teacher_rows[:, None])
    x, y = _logits(pointers, columns, inside, DTYPE)

    ms, mt = tl.maximum(tl.max(x, 1), LOWEST), tl.maximum(tl.max(y, 1), LOWEST)
    above = x - ms[:, None]
    ds, dt = above * units.cs, (y - mt[:, None]) * units.ct
    es, et = tl.exp2(ds), tl.exp2(dt)
    zs, zt = tl.sum(es, 1), tl.sum(et, 1)
    if IS_MIXTURE:
        summand, q, v = mixture(ds, dt, zs[:, None], zt[:, None], weight, DIVERGENCE, FAST)
        value, slope_sum = mixture_value(tl.sum(summand, 1), tl.sum(q * v, 1), zs, zt, DIVERGENCE)
    else:
        zeros = tl.zeros([ROWS], DTYPE)
        a, b = add_products(zeros, zeros, ds, dt, es, et, DIVERGENCE)
        value, slope_sum = kl_value(zs, zt, a, b, weight, DIVERGENCE)
    z1 = zs
    if LABELS:
        z1 = tl.sum(tl.exp2(above * units.c1), 1)

    if losses_ptr is not None:
        unmasked = (
            tl.load(row_mask_ptr + rows, exists, 0) != 0 if row_mask_ptr is not None else exists
        )
        tl.store(losses_ptr + rows, tl.where(unmasked, value * scale, 0.0), exists)
        if LABELS:
            label = tl.load(labels_ptr + rows, exists, -1).to(tl.int64)
            row_ptr = student_ptr + student_rows
            ce = cross_entropy(row_ptr, label, n_cols, units.c1, ms, z1, DTYPE)
            tl.store(cross_entropies_ptr + rows, ce, exists)
    if gradient_ptr is not None:
        factors = _row_factors(
            rows, exists, n_cols, upstream_ptr, ce_upstream_ptr, strides, row_mask_ptr, labels_ptr,
            scale / temperature, DTYPE,
        )  # fmt: skip
        slopes = _row_gradient(
            x, y, columns, units,
            Statistics(
                ms[:, None], zs[:, None], mt[:, None], zt[:, None], slope_sum[:, None],
                z1[:, None],
            ),
            weight,
            Factors(
                factors.divergence[:, None], factors.cross_entropy[:, None], factors.label[:, None]
            ),
            DIVERGENCE, ce_upstream_ptr is not None, FAST,
        )  # fmt: skip
        tl.debug_barrier()  # so that the label's logit has been read before it is overwritten
        gradient = Strided(gradient_ptr, strides.gradient_outer, strides.gradient_inner)
        gradient_rows = row_offset(rows, inner, gradient) // ALIGNMENT * ALIGNMENT
        tl.store(
            gradient_ptr + gradient_rows[:, None] + columns,
            slopes.to(gradient_ptr.dtype.element_ty),
            mask=inside,
        )
