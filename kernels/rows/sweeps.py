"""Kernels that sum over rows; `gradients.py` has those that write a gradient.

With h = ∂d/∂log q a divergence D = Σ d(log p, log q) has the slope (h − q Σ h) / T, so that a row
needs a sweep for its sums and one for its gradient. For each entry of bf16 logits `row_statistics`
reads 4 bytes, or 8 in two sweeps where both Z must be known before d is summed.

A row is read in vectors of 16 bytes that lie on their boundary, whatever its start and length; what
remains at its two ends is read by elements. Sums stay private to a thread until the row ends.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.rows.terms import (
    LOWEST,
    Statistics,
    Sums,
    Units,
    among_others,
    cross_entropy,
    decoupled,
    fold,
    kl_value,
    log2_odds,
    logit_of,
    merge,
    mixture_of_both,
    mixture_unit,
    mixture_value,
    without_others,
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
    row_weight: float | Tensor


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
    apart: tl.tensor  # the column, counted from there, of the class that is set apart


class Span(NamedTuple):
    """The vectors [start, end) of a row of n_cols elements, of which `head` precede vector 0."""

    start: tl.tensor
    end: tl.tensor
    head: tl.tensor
    n_cols: tl.tensor


@triton.jit
def temperature_of(
    temperature, row, PER_ROW: tl.constexpr, ON_DEVICE: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Return the temperature of a row, or PER_ROW of several that exist."""
    if PER_ROW:
        found = tl.load(temperature + row).to(DTYPE)
    else:
        found = number(temperature, ON_DEVICE, DTYPE)
    return found


@triton.jit
def units_of(
    numbers, row, PER_ROW: tl.constexpr, ON_DEVICE: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    student = temperature_of(numbers.student_temperature, row, PER_ROW, ON_DEVICE, DTYPE)
    teacher = temperature_of(numbers.teacher_temperature, row, PER_ROW, ON_DEVICE, DTYPE)
    return Units(log2_units(student, DTYPE), log2_units(teacher, DTYPE), tl.full([], LOG2E, DTYPE))


@triton.jit
def load_logits(
    rows, columns, mask, DIVERGENCE: tl.constexpr, APART: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Return the logits of both networks, −∞ outside the mask and of the class set APART."""
    fill = None if mask is None else -INFINITY
    x = tl.load(rows.student + columns, mask=mask, other=fill).to(DTYPE)
    y = x
    if DIVERGENCE != "":
        y = tl.load(rows.teacher + columns, mask=mask, other=fill).to(DTYPE)
    if APART:
        x = tl.where(columns == rows.apart, -INFINITY, x)
        y = tl.where(columns == rows.apart, -INFINITY, y)
    return x, y


@triton.jit
def vectors(start, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the columns [R, K] of the vectors from `start`, relative to the first boundary."""
    return (start + tl.arange(0, THREADS))[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def edges(head, n_cols, THREADS: tl.constexpr, WIDTH: tl.constexpr):
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
    rows, span, units, DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, APART: tl.constexpr,
    DTYPE: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the Sums over a span, and over the edges of the row if the span starts at 0.

    Every thread keeps its own pivots and sums, so that there is no barrier before the end.
    """
    pivots, zeros = tl.full([THREADS], LOWEST, DTYPE), tl.zeros([THREADS], DTYPE)
    sums = Sums(pivots, zeros, pivots, zeros, zeros, zeros, zeros)
    rest = span.start + (span.end - span.start) // THREADS * THREADS
    for i in range(span.start, rest, THREADS):
        x, y = load_logits(rows, vectors(i, THREADS, WIDTH), None, DIVERGENCE, APART, DTYPE)
        sums = fold(x, y, units, sums, DIVERGENCE, LABELS)
    if rest < span.end:
        inside = (rest + tl.arange(0, THREADS) < span.end)[:, None]
        x, y = load_logits(rows, vectors(rest, THREADS, WIDTH), inside, DIVERGENCE, APART, DTYPE)
        sums = fold(x, y, units, sums, DIVERGENCE, LABELS)
    if _has_edges(span, WIDTH):
        columns, inside = edges(span.head, span.n_cols, THREADS, WIDTH)
        x, y = load_logits(rows, columns, inside, DIVERGENCE, APART, DTYPE)
        sums = fold(x, y, units, sums, DIVERGENCE, LABELS)
    return merge(sums, units, DIVERGENCE)


@triton.jit
def _mixture_of(
    x, y, units, ms, zs, mt, zt, weight, DIVERGENCE: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Return Σ d, Σ q·v and Σ p·u of a tile, for each thread."""
    ds, dt = (x - ms) * units.cs, (y - mt) * units.ct
    summand, q, v, p, u = mixture_of_both(ds, dt, zs, zt, weight, DIVERGENCE, FAST)
    return tl.sum(summand, 1), tl.sum(q * v, 1), tl.sum(p * u, 1)


@triton.jit
def _mixture_sums(
    rows, span, units, ms, zs, mt, zt, weight, DIVERGENCE: tl.constexpr, APART: tl.constexpr,
    BOTH: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Return Σ d and Σ q·v over what `_online_sums` reads, given the pivots and Z of the row.

    Of BOTH networks it returns Σ p·u too, and otherwise 0.
    """
    value = tl.zeros([THREADS], DTYPE)
    slope_sum, teacher_sum = value, value
    rest = span.start + (span.end - span.start) // THREADS * THREADS
    for i in range(span.start, rest, THREADS):
        x, y = load_logits(rows, vectors(i, THREADS, WIDTH), None, DIVERGENCE, APART, DTYPE)
        d, qv, pu = _mixture_of(x, y, units, ms, zs, mt, zt, weight, DIVERGENCE, FAST)
        value, slope_sum = value + d, slope_sum + qv
        if BOTH:
            teacher_sum += pu
    if rest < span.end:
        inside = (rest + tl.arange(0, THREADS) < span.end)[:, None]
        x, y = load_logits(rows, vectors(rest, THREADS, WIDTH), inside, DIVERGENCE, APART, DTYPE)
        d, qv, pu = _mixture_of(x, y, units, ms, zs, mt, zt, weight, DIVERGENCE, FAST)
        value, slope_sum = value + d, slope_sum + qv
        if BOTH:
            teacher_sum += pu
    if _has_edges(span, WIDTH):
        columns, inside = edges(span.head, span.n_cols, THREADS, WIDTH)
        x, y = load_logits(rows, columns, inside, DIVERGENCE, APART, DTYPE)
        d, qv, pu = _mixture_of(x, y, units, ms, zs, mt, zt, weight, DIVERGENCE, FAST)
        value, slope_sum = value + d, slope_sum + qv
        if BOTH:
            teacher_sum += pu
    return tl.sum(value, 0), tl.sum(slope_sum, 0), tl.sum(teacher_sum, 0)


@triton.jit
def _store_sums(pointer, sums):
    for i in tl.static_range(N_STATISTICS):
        tl.store(pointer + i, sums[i])


@triton.jit
def _store_statistics(
    pointer, sums, slope_sum, left, IS_DECOUPLED: tl.constexpr, APART: tl.constexpr
):  # fmt: skip
    """Store the Statistics of a row: a's place is the slope sum's, and b's what a class leaves.

    Where BOTH networks learn no class leaves anything, and the teacher's Σ p·u is in that place.
    """
    zs, zt, z1 = sums.zs, sums.zt, sums.z1
    if APART:
        zs, zt = without_others(zs, zt, IS_DECOUPLED)
        z1 = tl.where(z1 == 0, float("inf"), z1)
    _store_sums(pointer, Sums(sums.ms, zs, sums.mt, zt, slope_sum, left, z1))


@triton.jit
def load_statistics(pointer):
    return Statistics(
        tl.load(pointer),
        tl.load(pointer + 1),
        tl.load(pointer + 2),
        tl.load(pointer + 3),
        tl.load(pointer + 4),
        tl.load(pointer + 5),
        tl.load(pointer + 6),
    )


@triton.jit
def apart_value(
    value, student_row, teacher_row, apart, n_cols, sums, units, weight, DTYPE: tl.constexpr
):  # fmt: skip
    """Return what `decoupled` does for a row whose other classes have this value."""
    of_q = log2_odds(logit_of(student_row, apart, n_cols, DTYPE), sums.ms, sums.zs, units.cs)
    of_p = log2_odds(logit_of(teacher_row, apart, n_cols, DTYPE), sums.mt, sums.zt, units.ct)
    return decoupled(value, of_p, of_q, weight)


# numbers that vary with the batch stay unspecialised, so that every batch runs the same code
@triton.jit(do_not_specialize=["inner", "vectors_per_split"])
def row_statistics(
    student,  # Strided (n_rows, n_cols)
    teacher,  # Strided (n_rows, n_cols)
    labels_ptr,  # (n_rows,) or None
    row_mask_ptr,  # (n_rows,) or None
    apart_ptr,  # (n_rows,), classes that are set apart, or None
    losses_ptr,  # (n_rows,)
    cross_entropies_ptr,  # (n_rows,) or None, without labels
    statistics_ptr,  # (n_rows, N_STATISTICS)
    partial_ptr,  # (n_rows, n_splits, N_STATISTICS) or None, with SWEEP 0
    numbers,  # Numbers
    n_cols,
    inner,  # size of the logits' last dimension but one
    vectors_per_split,
    DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, IS_DECOUPLED: tl.constexpr,
    BOTH: tl.constexpr, SWEEP: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ON_DEVICE: tl.constexpr, PER_ROW: tl.constexpr, CONGRUENT: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr,
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
    units = units_of(numbers, row, PER_ROW, ON_DEVICE, DTYPE)
    whole_row = student.ptr + row_offset(row, inner, student)
    head = head_of(whole_row, n_cols, WIDTH)
    APART: tl.constexpr = apart_ptr is not None
    apart = tl.load(apart_ptr + row).to(tl.int64) if apart_ptr is not None else -1
    rows = Pointers(
        at_boundary(whole_row, head, True),
        at_boundary(teacher.ptr, row_offset(row, inner, teacher) + head, CONGRUENT),
        apart - head,
    )
    start = split * vectors_per_split
    end = tl.maximum(start, tl.minimum(start + vectors_per_split, (n_cols - head) // WIDTH))
    span = Span(start, end, head, n_cols)

    if SWEEP < 2:
        sums = _online_sums(rows, span, units, DIVERGENCE, LABELS, APART, DTYPE, THREADS, WIDTH)
        ms, zs, mt, zt = sums.ms, sums.zs, sums.mt, sums.zt
    else:
        ms, zs = tl.load(statistics_row), tl.load(statistics_row + 1)
        mt, zt = tl.load(statistics_row + 2), tl.load(statistics_row + 3)
    if IS_MIXTURE and SWEEP != 1:
        value, slope_sum, teacher_sum = _mixture_sums(
            rows, span, units, ms, zs, mt, zt, weight, DIVERGENCE, APART, BOTH, DTYPE, FAST,
            THREADS, WIDTH,
        )  # fmt: skip
        if SWEEP == 0:
            value, slope_sum = mixture_value(value, slope_sum, zs, zt, weight, DIVERGENCE)
            teacher_sum *= mixture_unit(zs, zt, DIVERGENCE)
    elif SWEEP == 0:
        value, slope_sum = kl_value(zs, zt, sums.a, sums.b, weight, DIVERGENCE)
        teacher_sum = sums.a / zt

    if SWEEP == 0:
        if APART:
            value = among_others(value, zs, zt)
        if IS_DECOUPLED:
            teacher_row = teacher.ptr + row_offset(row, inner, teacher)
            value, slope_sum = apart_value(
                value, whole_row, teacher_row, apart, n_cols, sums, units, weight, DTYPE
            )
        scale = number(numbers.scale, ON_DEVICE, DTYPE)
        tl.store(losses_ptr + row, tl.where(unmasked, value * scale, 0.0))
        left = teacher_sum if BOTH else tl.zeros_like(sums.z1)
        if LABELS:
            ce, left = cross_entropy(
                whole_row, label, n_cols, units.c1, sums.ms, sums.z1, APART, DTYPE
            )
            tl.store(cross_entropies_ptr + row, ce)
        _store_statistics(statistics_row, sums, slope_sum, left, IS_DECOUPLED, APART)
    else:
        place = (row.to(tl.int64) * tl.num_programs(1) + split) * N_STATISTICS
        if SWEEP == 1:
            _store_sums(partial_ptr + place, sums)
        else:
            tl.store(partial_ptr + place, value)
            tl.store(partial_ptr + place + 1, slope_sum)
            if BOTH:
                tl.store(partial_ptr + place + 2, teacher_sum)


@triton.jit(do_not_specialize=["inner", "n_splits"])
def combine(
    student,  # Strided (n_rows, n_cols)
    teacher,  # Strided (n_rows, n_cols)
    labels_ptr,  # (n_rows,) or None
    row_mask_ptr,  # (n_rows,) or None
    apart_ptr,  # (n_rows,), classes that are set apart, or None
    losses_ptr,  # (n_rows,)
    cross_entropies_ptr,  # (n_rows,) or None, without labels
    statistics_ptr,  # (n_rows, N_STATISTICS)
    partial_ptr,  # (n_rows, n_splits, N_STATISTICS)
    numbers,  # Numbers
    n_cols,
    inner,  # size of the logits' last dimension but one
    n_splits,
    DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, IS_DECOUPLED: tl.constexpr,
    BOTH: tl.constexpr, SWEEP: tl.constexpr, DTYPE: tl.constexpr, ON_DEVICE: tl.constexpr,
    PER_ROW: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Combine what the splits of a row summed, always in the same order: program (row)."""
    row = tl.program_id(0)
    unmasked = tl.load(row_mask_ptr + row) != 0 if row_mask_ptr is not None else row >= 0
    label = tl.load(labels_ptr + row).to(tl.int64) if labels_ptr is not None else -1
    LABELS: tl.constexpr = labels_ptr is not None
    APART: tl.constexpr = apart_ptr is not None
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
        units = units_of(numbers, row, PER_ROW, ON_DEVICE, DTYPE)
        sums = merge(sums, units, DIVERGENCE)
        value, slope_sum = kl_value(sums.zs, sums.zt, sums.a, sums.b, weight, DIVERGENCE)
        if APART:
            value = among_others(value, sums.zs, sums.zt)
        row_ptr = student.ptr + row_offset(row, inner, student)
        left = sums.a / sums.zt if BOTH else tl.zeros_like(sums.z1)
        if IS_DECOUPLED:
            apart = tl.load(apart_ptr + row).to(tl.int64)
            teacher_row = teacher.ptr + row_offset(row, inner, teacher)
            value, slope_sum = apart_value(
                value, row_ptr, teacher_row, apart, n_cols, sums, units, weight, DTYPE
            )
        if LABELS:
            ce, left = cross_entropy(
                row_ptr, label, n_cols, units.c1, sums.ms, sums.z1, APART, DTYPE
            )
            tl.store(cross_entropies_ptr + row, ce)
        _store_statistics(statistics_row, sums, slope_sum, left, IS_DECOUPLED, APART)
    else:
        summands, slopes = tl.load(place, inside, 0.0), tl.load(place + 1, inside, 0.0)
        zs, zt = tl.load(statistics_row + 1), tl.load(statistics_row + 3)
        value, slope_sum = mixture_value(
            tl.sum(summands, 0), tl.sum(slopes, 0), zs, zt, weight, DIVERGENCE
        )
        tl.store(statistics_row + 4, slope_sum)
        if BOTH:
            sums_of_teacher = tl.sum(tl.load(place + 2, inside, 0.0), 0)
            tl.store(statistics_row + 5, sums_of_teacher * mixture_unit(zs, zt, DIVERGENCE))
    if SWEEP == 2 or not IS_MIXTURE:
        tl.store(losses_ptr + row, tl.where(unmasked, value * scale, 0.0))
