"""The kernels of the divergences: sums over the rows, and the gradient.

A row is read in vectors of 16 bytes that lie on their boundary, whatever its start and length; what
is left at its two ends is read by elements. Sums stay private to a thread until the row ends.
"""

import triton
import triton.language as tl

from fastkd.kernels._divergence_terms import (
    LOWEST,
    add_products,
    cross_entropy,
    fold,
    kl_value,
    merge,
    mixture,
    slope,
)
from fastkd.kernels._tiles import (
    INFINITY,
    LOG2E,
    at_boundary,
    head_of,
    log2_units,
    number,
    row_offset,
)

N_STATISTICS = tl.constexpr(8)  # floats that a row keeps between forward and backward


@triton.jit
def _logits(student_row, teacher_row, offset_row, columns, mask, DTYPE: tl.constexpr):
    nothing = None if mask is None else -INFINITY
    x = tl.load(student_row + columns, mask=mask, other=nothing).to(DTYPE)
    y = tl.load(teacher_row + columns, mask=mask, other=nothing).to(DTYPE)
    if offset_row is not None:
        y -= tl.load(offset_row + columns, mask=mask, other=None if mask is None else 0.0)
    return x, y


@triton.jit
def _vectors(first, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns [R, K] of the vectors from `first`, counted from the first boundary."""
    return (first + tl.arange(0, THREADS))[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _edges(head, n_cols, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """What is before the first boundary and after the last one: columns [R, K] and their mask."""
    thread, k = tl.arange(0, THREADS)[:, None], tl.arange(0, WIDTH)[None, :]
    end = (n_cols - head) // WIDTH * WIDTH
    columns = tl.where(thread == 0, k - head, end + k)
    before, after = (thread == 0) & (k < head), (thread == 1) & (end + k < n_cols - head)
    return columns, before | after


@triton.jit
def _online_sums(
    student_row, teacher_row, offset_row, first, last, head, n_cols, cs, ct, c1,
    DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, DTYPE: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The sums of the vectors [first, last) of a row; of its edges too if it starts at 0.

    Every thread keeps its own pivots and sums: there is no barrier before the end.
    """
    ms = tl.full([THREADS], LOWEST, DTYPE)
    zs = tl.zeros([THREADS], DTYPE)
    mt, zt, a, b, m1, z1 = ms, zs, zs, zs, ms, zs
    rest = first + (last - first) // THREADS * THREADS
    for i in range(first, rest, THREADS):
        x, y = _logits(
            student_row, teacher_row, offset_row, _vectors(i, THREADS, WIDTH), None, DTYPE
        )
        ms, zs, mt, zt, a, b, m1, z1 = fold(
            x, y, cs, ct, c1, ms, zs, mt, zt, a, b, m1, z1, DIVERGENCE, LABELS
        )
    if rest < last:
        inside = (rest + tl.arange(0, THREADS) < last)[:, None]
        x, y = _logits(
            student_row, teacher_row, offset_row, _vectors(rest, THREADS, WIDTH), inside, DTYPE
        )
        ms, zs, mt, zt, a, b, m1, z1 = fold(
            x, y, cs, ct, c1, ms, zs, mt, zt, a, b, m1, z1, DIVERGENCE, LABELS
        )
    if (first == 0) & (n_cols % WIDTH + head > 0):
        columns, inside = _edges(head, n_cols, THREADS, WIDTH)
        x, y = _logits(student_row, teacher_row, offset_row, columns, inside, DTYPE)
        ms, zs, mt, zt, a, b, m1, z1 = fold(
            x, y, cs, ct, c1, ms, zs, mt, zt, a, b, m1, z1, DIVERGENCE, LABELS
        )
    return merge(ms, zs, mt, zt, a, b, m1, z1, DIVERGENCE)


@triton.jit
def _mixture_of(x, y, cs, ct, ms, mt, ratio, weight, DIVERGENCE: tl.constexpr, FAST: tl.constexpr):
    ds, dt = tl.fma(x, cs, -ms), tl.fma(y, ct, -mt)
    summand, q, v = mixture(ds, dt, ratio, weight, DIVERGENCE, FAST)
    return tl.sum(summand, 1), tl.sum(q * v, 1)


@triton.jit
def _mixture_sums(
    student_row, teacher_row, offset_row, first, last, head, n_cols, cs, ct, ms, zs, mt, zt, weight,
    DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Σ d and Σ q v over the vectors [first, last) of a row whose Z are known."""
    ratio = tl.log2(zt / zs)
    value = tl.zeros([THREADS], DTYPE)
    slope_sum = value
    rest = first + (last - first) // THREADS * THREADS
    for i in range(first, rest, THREADS):
        x, y = _logits(
            student_row, teacher_row, offset_row, _vectors(i, THREADS, WIDTH), None, DTYPE
        )
        value_here, slope_here = _mixture_of(x, y, cs, ct, ms, mt, ratio, weight, DIVERGENCE, FAST)
        value, slope_sum = value + value_here, slope_sum + slope_here
    if rest < last:
        inside = (rest + tl.arange(0, THREADS) < last)[:, None]
        x, y = _logits(
            student_row, teacher_row, offset_row, _vectors(rest, THREADS, WIDTH), inside, DTYPE
        )
        value_here, slope_here = _mixture_of(x, y, cs, ct, ms, mt, ratio, weight, DIVERGENCE, FAST)
        value, slope_sum = value + value_here, slope_sum + slope_here
    if (first == 0) & (n_cols % WIDTH + head > 0):
        columns, inside = _edges(head, n_cols, THREADS, WIDTH)
        x, y = _logits(student_row, teacher_row, offset_row, columns, inside, DTYPE)
        value_here, slope_here = _mixture_of(x, y, cs, ct, ms, mt, ratio, weight, DIVERGENCE, FAST)
        value, slope_sum = value + value_here, slope_sum + slope_here
    each = (1 + 0 * ratio) / zt  # the floors hide the NaN of a network: Z shows it
    return tl.sum(value, 0) * each, tl.sum(slope_sum, 0) * each


@triton.jit
def _store_statistics(pointer, ms, zs, mt, zt, a, b, m1, z1):
    tl.store(pointer, ms)
    tl.store(pointer + 1, zs)
    tl.store(pointer + 2, mt)
    tl.store(pointer + 3, zt)
    tl.store(pointer + 4, a)
    tl.store(pointer + 5, b)
    tl.store(pointer + 6, m1)
    tl.store(pointer + 7, z1)


@triton.jit
def row_statistics(
    student_ptr, teacher_ptr, labels_ptr, offset_ptr, keep_ptr,
    losses_ptr, cross_entropies_ptr, statistics_ptr, partial_ptr,
    n_cols, inner, student_outer, student_inner, teacher_outer, teacher_inner, vectors_per_split,
    student_temperature, teacher_temperature, weight, scale,
    DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, SWEEP: tl.constexpr, DTYPE: tl.constexpr,
    FAST: tl.constexpr, ON_DEVICE: tl.constexpr, CONGRUENT: tl.constexpr, THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (row, split). SWEEP 0: all of a row; 1, 2: a split's sums, with 2 once Z is known."""
    row, split = tl.program_id(0), tl.program_id(1)
    counts = tl.load(keep_ptr + row) != 0 if keep_ptr is not None else row >= 0
    label = tl.load(labels_ptr + row).to(tl.int64) if labels_ptr is not None else -1
    LABELS: tl.constexpr = labels_ptr is not None
    statistics_row = statistics_ptr + row.to(tl.int64) * N_STATISTICS
    if (counts == 0) & (label < 0):  # nothing is read of a row that is left out
        if SWEEP == 0:
            tl.store(losses_ptr + row, 0.0)
            if LABELS:
                tl.store(cross_entropies_ptr + row, 0.0)
            _store_statistics(statistics_row, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        return
    weight = number(weight, ON_DEVICE, DTYPE)
    cs = log2_units(number(student_temperature, ON_DEVICE, DTYPE), DTYPE)
    ct = log2_units(number(teacher_temperature, ON_DEVICE, DTYPE), DTYPE)
    c1 = tl.full([], LOG2E, DTYPE)
    whole_row = student_ptr + row_offset(row, inner, student_outer, student_inner)
    head = head_of(whole_row, n_cols, WIDTH)
    student_row = at_boundary(whole_row, head, True)
    teacher_row = at_boundary(
        teacher_ptr, row_offset(row, inner, teacher_outer, teacher_inner) + head, CONGRUENT
    )
    offset_row = offset_ptr + head if offset_ptr is not None else None
    first = split * vectors_per_split
    last = tl.maximum(first, tl.minimum(first + vectors_per_split, (n_cols - head) // WIDTH))

    if SWEEP < 2:
        ms, zs, mt, zt, a, b, m1, z1 = _online_sums(
            student_row, teacher_row, offset_row, first, last, head, n_cols, cs, ct, c1,
            DIVERGENCE, LABELS, DTYPE, THREADS, WIDTH,
        )  # fmt: skip
    else:
        ms, zs = tl.load(statistics_row), tl.load(statistics_row + 1)
        mt, zt = tl.load(statistics_row + 2), tl.load(statistics_row + 3)
    if IS_MIXTURE and SWEEP != 1:
        value, slope_sum = _mixture_sums(
            student_row, teacher_row, offset_row, first, last, head, n_cols,
            cs, ct, ms, zs, mt, zt, weight, DIVERGENCE, DTYPE, FAST, THREADS, WIDTH,
        )  # fmt: skip
    elif SWEEP == 0:
        value, slope_sum = kl_value(zs, zt, a, b, weight, DIVERGENCE)

    if SWEEP == 0:
        tl.store(losses_ptr + row, tl.where(counts, value * number(scale, ON_DEVICE, DTYPE), 0.0))
        if LABELS:
            ce = cross_entropy(whole_row, label, n_cols, c1, m1, z1, DTYPE)
            tl.store(cross_entropies_ptr + row, ce)
        _store_statistics(statistics_row, ms, zs, mt, zt, slope_sum, 0.0, m1, z1)
    else:
        place = (row.to(tl.int64) * tl.num_programs(1) + split) * N_STATISTICS
        if SWEEP == 1:
            _store_statistics(partial_ptr + place, ms, zs, mt, zt, a, b, m1, z1)
        else:
            tl.store(partial_ptr + place, value)
            tl.store(partial_ptr + place + 1, slope_sum)


@triton.jit
def combine(
    student_ptr, labels_ptr, keep_ptr, losses_ptr, cross_entropies_ptr, statistics_ptr, partial_ptr,
    n_cols, n_splits, inner, student_outer, student_inner, weight, scale,
    DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, SWEEP: tl.constexpr, DTYPE: tl.constexpr,
    ON_DEVICE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program a row: what its splits summed, always in the same order."""
    row = tl.program_id(0)
    counts = tl.load(keep_ptr + row) != 0 if keep_ptr is not None else row >= 0
    label = tl.load(labels_ptr + row).to(tl.int64) if labels_ptr is not None else -1
    LABELS: tl.constexpr = labels_ptr is not None
    weight, scale = number(weight, ON_DEVICE, DTYPE), number(scale, ON_DEVICE, DTYPE)
    statistics_row = statistics_ptr + row.to(tl.int64) * N_STATISTICS
    split = tl.arange(0, SPLITS)
    inside = (split < n_splits) & (counts | (label >= 0))
    place = partial_ptr + (row.to(tl.int64) * n_splits + split) * N_STATISTICS
    if SWEEP == 1:
        ms, zs = tl.load(place, inside, LOWEST), tl.load(place + 1, inside, 0.0)
        mt, zt = tl.load(place + 2, inside, LOWEST), tl.load(place + 3, inside, 0.0)
        a, b = tl.load(place + 4, inside, 0.0), tl.load(place + 5, inside, 0.0)
        m1, z1 = tl.load(place + 6, inside, LOWEST), tl.load(place + 7, inside, 0.0)
        ms, zs, mt, zt, a, b, m1, z1 = merge(ms, zs, mt, zt, a, b, m1, z1, DIVERGENCE)
        value, slope_sum = kl_value(zs, zt, a, b, weight, DIVERGENCE)
        _store_statistics(statistics_row, ms, zs, mt, zt, slope_sum, 0.0, m1, z1)
        if LABELS:
            row_ptr = student_ptr + row_offset(row, inner, student_outer, student_inner)
            c1 = tl.full([], LOG2E, DTYPE)
            ce = cross_entropy(row_ptr, label, n_cols, c1, m1, z1, DTYPE)
            tl.store(cross_entropies_ptr + row, ce)
    else:
        value = tl.sum(tl.load(place, inside, 0.0), 0)
        tl.store(statistics_row + 4, tl.sum(tl.load(place + 1, inside, 0.0), 0))
    if SWEEP == 2 or not IS_MIXTURE:
        tl.store(losses_ptr + row, tl.where(counts, value * scale, 0.0))


@triton.jit
def _row_factors(
    rows, mask, n_cols, upstream_ptr, ce_upstream_ptr, keep_ptr, labels_ptr, upstream_stride,
    ce_upstream_stride, scale, DTYPE: tl.constexpr,
):  # fmt: skip
    """What multiplies the gradients of divergence and cross-entropy; 0 for what is left out."""
    factor = tl.zeros(rows.shape, DTYPE)
    ce_factor, label = factor, tl.full(rows.shape, -1, tl.int64)
    if upstream_ptr is not None:
        factor = tl.load(upstream_ptr + rows * upstream_stride, mask, 0.0).to(DTYPE) * scale
    if keep_ptr is not None:
        factor = tl.where(tl.load(keep_ptr + rows, mask, 0) != 0, factor, 0.0)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + rows, mask, -1).to(tl.int64)
    if ce_upstream_ptr is not None:
        upstream = tl.load(ce_upstream_ptr + rows * ce_upstream_stride, mask, 0.0).to(DTYPE)
        # a label that does not exist is an error, but one of a row that does not count is not
        upstream = tl.where((label >= n_cols) & (upstream != 0), float("nan"), upstream)
        ce_factor = tl.where(label < 0, 0.0, upstream)
    return factor, ce_factor, label


@triton.jit
def _row_gradient(
    x, y, columns, cs, ct, c1, ms, zs, mt, zt, slope_sum, m1, z1, weight, factor, ce_factor, label,
    DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile; a factor of 0 selects, it wins over a NaN."""
    ds, dt = tl.fma(x, cs, -ms), tl.fma(y, ct, -mt)
    by_log_q = slope(ds, dt, zs, zt, slope_sum, weight, DIVERGENCE, FAST)
    gradient = tl.where(factor == 0, 0.0, by_log_q * factor)
    if LABELS:
        distance = tl.exp2(tl.fma(x, c1, -m1)) * (1 / z1) - tl.where(columns == label, 1.0, 0.0)
        gradient += tl.where(ce_factor == 0, 0.0, distance * ce_factor)
    return gradient


@triton.jit
def _gradient_tile(
    student_row, teacher_row, offset_row, gradient_row, columns, inside, counts, head,
    cs, ct, c1, ms, zs, mt, zt, slope_sum, m1, z1, weight, factor, ce_factor, label,
    DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    x, y = _logits(student_row, teacher_row, offset_row, columns, inside & counts, DTYPE)
    gradient = _row_gradient(
        x, y, columns + head, cs, ct, c1, ms, zs, mt, zt, slope_sum, m1, z1, weight,
        factor, ce_factor, label, DIVERGENCE, LABELS, FAST,
    )  # fmt: skip
    tl.store(gradient_row + columns, gradient.to(gradient_row.dtype.element_ty), mask=inside)


@triton.jit
def gradient(
    student_ptr, teacher_ptr, labels_ptr, offset_ptr, keep_ptr, upstream_ptr, ce_upstream_ptr,
    statistics_ptr, gradient_ptr, n_cols, n_blocks, inner, student_outer, student_inner,
    teacher_outer, teacher_inner, gradient_outer, gradient_inner, upstream_stride,
    ce_upstream_stride, student_temperature, teacher_temperature, weight, scale,
    DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, ON_DEVICE: tl.constexpr,
    CONGRUENT: tl.constexpr, GRADIENT_CONGRUENT: tl.constexpr, VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Programs (row, block) on one axis: every entry on its own, given the row's statistics."""
    program = tl.program_id(0)
    row, block = program // n_blocks, program % n_blocks
    weight, temperature = (
        number(weight, ON_DEVICE, DTYPE),
        number(student_temperature, ON_DEVICE, DTYPE),
    )
    cs = log2_units(temperature, DTYPE)
    ct = log2_units(number(teacher_temperature, ON_DEVICE, DTYPE), DTYPE)
    c1 = tl.full([], LOG2E, DTYPE)
    LABELS: tl.constexpr = ce_upstream_ptr is not None
    factor, ce_factor, label = _row_factors(
        row, row >= 0, n_cols, upstream_ptr, ce_upstream_ptr, keep_ptr, labels_ptr,
        upstream_stride, ce_upstream_stride, number(scale, ON_DEVICE, DTYPE) / temperature, DTYPE,
    )  # fmt: skip
    statistics_row = statistics_ptr + row.to(tl.int64) * N_STATISTICS
    ms, zs = tl.load(statistics_row), tl.load(statistics_row + 1)
    mt, zt = tl.load(statistics_row + 2), tl.load(statistics_row + 3)
    slope_sum = tl.load(statistics_row + 4)
    m1, z1 = tl.load(statistics_row + 6), tl.load(statistics_row + 7)

    student_row = student_ptr + row_offset(row, inner, student_outer, student_inner)
    head = head_of(student_row, n_cols, WIDTH)
    student_row = at_boundary(student_row, head, True)
    teacher_row = at_boundary(
        teacher_ptr, row_offset(row, inner, teacher_outer, teacher_inner) + head, CONGRUENT
    )
    gradient_row = at_boundary(
        gradient_ptr,
        row_offset(row, inner, gradient_outer, gradient_inner) + head,
        GRADIENT_CONGRUENT,
    )
    offset_row = offset_ptr + head if offset_ptr is not None else None
    counts = (factor != 0) | (ce_factor != 0)  # nothing is read of a row that is left out

    first = block * VECTORS
    inside = (first + tl.arange(0, VECTORS) < (n_cols - head) // WIDTH)[:, None]
    _gradient_tile(
        student_row, teacher_row, offset_row, gradient_row, _vectors(first, VECTORS, WIDTH), inside,
        counts, head, cs, ct, c1, ms, zs, mt, zt, slope_sum, m1, z1, weight, factor, ce_factor,
        label, DIVERGENCE, LABELS, DTYPE, FAST,
    )  # fmt: skip
    if (block == 0) & (n_cols % WIDTH + head > 0):
        at_edge, inside_edge = _edges(head, n_cols, 2, WIDTH)
        _gradient_tile(
            student_row, teacher_row, offset_row, gradient_row, at_edge, inside_edge,
            counts, head, cs, ct, c1, ms, zs, mt, zt, slope_sum, m1, z1, weight, factor, ce_factor,
            label, DIVERGENCE, LABELS, DTYPE, FAST,
        )  # fmt: skip


@triton.jit
def whole_rows(
    student_ptr, teacher_ptr, labels_ptr, offset_ptr, keep_ptr, upstream_ptr, ce_upstream_ptr,
    losses_ptr, cross_entropies_ptr, gradient_ptr, n_rows, n_cols, inner,
    student_outer, student_inner, teacher_outer, teacher_inner, gradient_outer, gradient_inner,
    upstream_stride, ce_upstream_stride, student_temperature, teacher_temperature, weight, scale,
    DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ON_DEVICE: tl.constexpr, ALIGNMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows on chip: losses, gradient or both in one sweep, without statistics."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < n_rows
    weight, temperature = (
        number(weight, ON_DEVICE, DTYPE),
        number(student_temperature, ON_DEVICE, DTYPE),
    )
    scale = number(scale, ON_DEVICE, DTYPE)
    cs = log2_units(temperature, DTYPE)
    ct = log2_units(number(teacher_temperature, ON_DEVICE, DTYPE), DTYPE)
    c1 = tl.full([], LOG2E, DTYPE)
    LABELS: tl.constexpr = labels_ptr is not None
    n_cols = n_cols // ALIGNMENT * ALIGNMENT  # says what divides it
    columns = tl.arange(0, COLUMNS)[None, :]
    student_row = row_offset(rows, inner, student_outer, student_inner) // ALIGNMENT * ALIGNMENT
    teacher_row = row_offset(rows, inner, teacher_outer, teacher_inner) // ALIGNMENT * ALIGNMENT
    inside = exists[:, None] & (columns < n_cols)
    x, y = _logits(
        student_ptr + student_row[:, None], teacher_ptr + teacher_row[:, None], offset_ptr,
        columns, inside, DTYPE,
    )  # fmt: skip

    ms, mt = tl.maximum(tl.max(x, 1) * cs, LOWEST), tl.maximum(tl.max(y, 1) * ct, LOWEST)
    ds, dt = tl.fma(x, cs, -ms[:, None]), tl.fma(y, ct, -mt[:, None])
    es, et = tl.exp2(ds), tl.exp2(dt)
    zs, zt = tl.sum(es, 1), tl.sum(et, 1)
    if IS_MIXTURE:
        ratio = tl.log2(zt / zs)
        summand, q, v = mixture(ds, dt, ratio[:, None], weight, DIVERGENCE, FAST)
        each = (1 + 0 * ratio) / zt  # the floors hide the NaN of a network: Z shows it
        value, slope_sum = tl.sum(summand, 1) * each, tl.sum(q * v, 1) * each
    else:
        nothing = tl.zeros([ROWS], DTYPE)
        a, b = add_products(nothing, nothing, ds, dt, es, et, DIVERGENCE)
        value, slope_sum = kl_value(zs, zt, a, b, weight, DIVERGENCE)
    if LABELS:
        m1 = tl.maximum(tl.max(x, 1) * c1, LOWEST)
        z1 = tl.sum(tl.exp2(tl.fma(x, c1, -m1[:, None])), 1)
    else:
        m1, z1 = ms, zs

    if losses_ptr is not None:
        counts = tl.load(keep_ptr + rows, exists, 0) != 0 if keep_ptr is not None else exists
        tl.store(losses_ptr + rows, tl.where(counts, value * scale, 0.0), exists)
        if LABELS:
            label = tl.load(labels_ptr + rows, exists, -1).to(tl.int64)
            row_ptr = student_ptr + student_row
            ce = cross_entropy(row_ptr, label, n_cols, c1, m1, z1, DTYPE)
            tl.store(cross_entropies_ptr + rows, ce, exists)
    if gradient_ptr is not None:
        factor, ce_factor, label = _row_factors(
            rows, exists, n_cols, upstream_ptr, ce_upstream_ptr, keep_ptr, labels_ptr,
            upstream_stride, ce_upstream_stride, scale / temperature, DTYPE,
        )  # fmt: skip
        gradient = _row_gradient(
            x, y, columns, cs, ct, c1, ms[:, None], zs[:, None], mt[:, None], zt[:, None],
            slope_sum[:, None], m1[:, None], z1[:, None], weight, factor[:, None],
            ce_factor[:, None], label[:, None], DIVERGENCE, ce_upstream_ptr is not None, FAST,
        )  # fmt: skip
        tl.debug_barrier()  # in place, the label's logit must have been read
        row = row_offset(rows, inner, gradient_outer, gradient_inner) // ALIGNMENT * ALIGNMENT
        tl.store(
            gradient_ptr + row[:, None] + columns,
            gradient.to(gradient_ptr.dtype.element_ty), mask=inside,
        )  # fmt: skip
