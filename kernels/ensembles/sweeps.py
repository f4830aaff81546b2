"""Kernels of rows that are too long to stay on chip, with all their teachers.

A mixture needs the Z of each teacher before it can be formed, for which a sweep over the teachers
precedes. Nothing of the logits' size is written but the gradient. Bytes for each (row, entry) of
bfloat16 that the losses read of K teachers, in parentheses where a divergence needs both Z before
it can sum:

    logits     2 K + 2 (4 K + 4)
    mixture    4 K + 2 (4 K + 4): its own Z is 1
    sum        4 K (8 K), half of it the student's, from the cache
    chosen     4 (8)

The gradient takes 2 K + 2 + 2, of chosen rows 6. The forward KL from a mixture whose row weight is
known takes 4 K + 4 + 2 for both: its slope needs no sum but both Z, so that it is written where the
loss is summed.
"""

import triton
import triton.language as tl

from fastkd.kernels.device import Strided
from fastkd.kernels.ensembles.gradients import store_top, store_zeros
from fastkd.kernels.ensembles.spans import Span, has_edges, load_tile, tile_of
from fastkd.kernels.ensembles.tiles import Committee, weights_of_rows
from fastkd.kernels.rows.sweeps import N_STATISTICS
from fastkd.kernels.rows.terms import (
    LOWEST,
    Statistics,
    Sums,
    Units,
    add_products,
    fold,
    is_certain,
    kl_value,
    merge,
    mixture,
    mixture_value,
    slope,
)
from fastkd.kernels.tiles import (
    INFINITY,
    at_boundary,
    head_of,
    log2_units,
    number,
    row_offset,
    rows_of_each,
)


@triton.jit
def _add_total(
    teacher_row, reads, top, total, unit, i, span, AT_EDGE: tl.constexpr, DTYPE: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add a tile of a teacher's row to the pivots and the Z [R] of R threads."""
    columns, inside = tile_of(i, span, AT_EDGE, THREADS, WIDTH)
    z = tl.load(teacher_row + columns, inside & reads, -INFINITY).to(DTYPE)
    higher = tl.maximum(top, tl.max(z, 1))
    above = tl.exp2((z - higher[:, None]) * unit)
    return higher, total * tl.exp2((top - higher) * unit) + tl.sum(above, 1)


@triton.jit
def _softmax(
    network_row, reads, unit, span, DTYPE: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Return the largest logit of a row and its Z, LOWEST and 0 if it is not read."""
    top, total = tl.full([THREADS], LOWEST, DTYPE), tl.zeros([THREADS], DTYPE)
    for i in range(0, span.n_vectors, THREADS):
        top, total = _add_total(
            network_row, reads, top, total, unit, i, span, False, DTYPE, THREADS, WIDTH
        )
    if has_edges(span, WIDTH):
        top, total = _add_total(
            network_row, reads, top, total, unit, 0, span, True, DTYPE, THREADS, WIDTH
        )
    highest = tl.max(top, 0)
    return highest, tl.sum(total * tl.exp2((top - highest) * unit), 0)


@triton.jit
def _softmaxes(
    rows, shares, unit, span, DTYPE: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Return the tops and the shifts of a Committee.

    The teachers are read one after the other, because many at once would take many registers.
    """
    tops = ()
    shifts = ()
    for k in tl.static_range(len(rows)):
        reads = shares[k] != 0
        top, total = _softmax(rows[k], reads, unit, span, DTYPE, THREADS, WIDTH)
        tops += (top,)
        shifts += (tl.where(reads, tl.log2(shares[k] / total), -INFINITY),)
    return tops, shifts


@triton.jit
def _sums(
    student_row, of, span, units, TERM: tl.constexpr, DIVERGENCE: tl.constexpr,
    COMBINE: tl.constexpr, LOGS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the Sums of a row, of which every thread keeps its own until the row ends."""
    pivots, zeros = tl.full([THREADS], LOWEST, DTYPE), tl.zeros([THREADS], DTYPE)
    sums = Sums(pivots, zeros, pivots, zeros, zeros, zeros, zeros)
    for i in range(0, span.n_vectors, THREADS):
        x, y = load_tile(
            student_row, of, i, span, False, TERM, COMBINE, LOGS, DTYPE, FAST, THREADS, WIDTH
        )
        sums = fold(x, y, units, sums, DIVERGENCE, False)
    if has_edges(span, WIDTH):
        x, y = load_tile(
            student_row, of, 0, span, True, TERM, COMBINE, LOGS, DTYPE, FAST, THREADS, WIDTH
        )
        sums = fold(x, y, units, sums, DIVERGENCE, False)
    return merge(sums, units, DIVERGENCE)


@triton.jit
def _sum_and_store(
    student_row, gradient_row, of, i, span, units, row, weight, factor, certain, a, total,
    AT_EDGE: tl.constexpr, DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add a tile to the log ratios and the Z of a mixture, for each thread, and store its gradient.

    That of a class of which the student is certain is not stored.
    """
    x, y = load_tile(
        student_row, of, i, span, AT_EDGE, 0, "mixture", False, DTYPE, FAST, THREADS, WIDTH
    )
    columns, inside = tile_of(i, span, AT_EDGE, THREADS, WIDTH)
    ds, e = (x - row.ms) * units.cs, tl.exp2(y)
    slopes = slope(ds, y, row, weight, DIVERGENCE, FAST) * factor
    slopes = tl.where(factor == 0, 0.0, slopes)  # a factor of 0 wins over a NaN
    kept = inside & ~((x == row.ms) & certain)
    tl.store(gradient_row + columns, slopes.to(gradient_row.dtype.element_ty), kept)
    a, _ = add_products(a, a, ds, y, tl.exp2(ds), e, DIVERGENCE)
    return a, total + tl.sum(e, 1)


@triton.jit
def _sums_and_gradient(
    student_row, gradient_row, of, span, units, weight, factor, DIVERGENCE: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the Sums of a row and a mixture, of which the pivot is 1, and store its gradient."""
    ms, zs = _softmax(student_row, True, units.cs, span, DTYPE, THREADS, WIDTH)
    one = tl.full([], 1, DTYPE)
    row = Statistics(ms, zs, one - one, one, zs, zs, zs)
    certain = (factor != 0) & (zs > 0) & is_certain(zs, one, zs, False)
    a, total = tl.zeros([THREADS], DTYPE), tl.zeros([THREADS], DTYPE)
    for i in range(0, span.n_vectors, THREADS):
        a, total = _sum_and_store(
            student_row, gradient_row, of, i, span, units, row, weight, factor, certain, a, total,
            False, DIVERGENCE, DTYPE, FAST, THREADS, WIDTH,
        )  # fmt: skip
    if has_edges(span, WIDTH):
        a, total = _sum_and_store(
            student_row, gradient_row, of, 0, span, units, row, weight, factor, certain, a, total,
            True, DIVERGENCE, DTYPE, FAST, THREADS, WIDTH,
        )  # fmt: skip
    total = tl.sum(total, 0)
    return Sums(ms, zs, one - one, total, tl.sum(a, 0), one - one, zs), certain


@triton.jit
def _of_mixture(x, y, units, sums, weight, DIVERGENCE: tl.constexpr, FAST: tl.constexpr):
    """Return Σ d and Σ q·v of a tile, for each thread."""
    ds, dt = (x - sums.ms) * units.cs, (y - sums.mt) * units.ct
    summand, q, v = mixture(ds, dt, sums.zs, sums.zt, weight, DIVERGENCE, FAST)
    return tl.sum(summand, 1), tl.sum(q * v, 1)


@triton.jit
def _mixture_value(
    student_row, of, span, units, sums, weight, TERM: tl.constexpr, DIVERGENCE: tl.constexpr,
    COMBINE: tl.constexpr, LOGS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the value of a divergence that needs both Z, and Σ q·v, given the Sums of the row."""
    summands, slopes = tl.zeros([THREADS], DTYPE), tl.zeros([THREADS], DTYPE)
    for i in range(0, span.n_vectors, THREADS):
        x, y = load_tile(
            student_row, of, i, span, False, TERM, COMBINE, LOGS, DTYPE, FAST, THREADS, WIDTH
        )
        more, of_slopes = _of_mixture(x, y, units, sums, weight, DIVERGENCE, FAST)
        summands, slopes = summands + more, slopes + of_slopes
    if has_edges(span, WIDTH):
        x, y = load_tile(
            student_row, of, 0, span, True, TERM, COMBINE, LOGS, DTYPE, FAST, THREADS, WIDTH
        )
        more, of_slopes = _of_mixture(x, y, units, sums, weight, DIVERGENCE, FAST)
        summands, slopes = summands + more, slopes + of_slopes
    return mixture_value(
        tl.sum(summands, 0), tl.sum(slopes, 0), sums.zs, sums.zt, weight, DIVERGENCE
    )


@triton.jit(do_not_specialize=["inner"])
def ensemble_statistics(
    student,  # Strided (n_rows, n_cols)
    teachers,  # K of Strided (n_rows, n_cols)
    weights_ptr,  # (n_rows, K), of the teachers, or None for 1 / K
    index_ptr,  # (n_rows,), of the chosen teachers, or None
    row_mask_ptr,  # (n_rows,) or None
    losses_ptr,  # (n_rows,)
    statistics_ptr,  # (n_rows, n_statistics): those of each term, tops and shifts of a mixture
    gradient_ptr,  # (n_rows, n_cols), written for the row weight; None: it is not
    n_statistics,
    n_cols,
    inner,  # size of the logits' last dimension but one
    strides,  # whole_rows.Strides
    numbers,  # rows.sweeps.Numbers
    DIVERGENCE: tl.constexpr, COMBINE: tl.constexpr, IS_MIXTURE: tl.constexpr,
    LOGS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, ON_DEVICE: tl.constexpr,
    CONGRUENT: tl.constexpr, GRADIENT_CONGRUENT: tl.constexpr, THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the losses and statistics of a row: program (row).

    With them comes the gradient of the forward KL from a mixture, if there is a place for it.
    """
    row = tl.program_id(0)
    statistics_row = statistics_ptr + row.to(tl.int64) * n_statistics
    student_row = student.ptr + row_offset(row, inner, student)
    head = head_of(student_row, n_cols, WIDTH)
    student_row = at_boundary(student_row, head, True)
    span = Span((n_cols - head) // WIDTH, head, n_cols)
    if gradient_ptr is not None:
        gradient = Strided(gradient_ptr, strides.gradient_outer, strides.gradient_inner)
        gradient_row = at_boundary(
            gradient_ptr, row_offset(row, inner, gradient) + head, GRADIENT_CONGRUENT
        )
    if row_mask_ptr is not None:
        if tl.load(row_mask_ptr + row) == 0:  # so that no logits of a masked row are read
            tl.store(losses_ptr + row, 0.0)
            for i in range(n_statistics):
                tl.store(statistics_row + i, 0.0)
            if gradient_ptr is not None:
                for i in range(0, span.n_vectors, THREADS):
                    store_zeros(gradient_row, i, span, False, THREADS, WIDTH)
                store_zeros(gradient_row, 0, span, True, THREADS, WIDTH)
            return
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    unit = log2_units(number(numbers.teacher_temperature, ON_DEVICE, DTYPE), DTYPE)
    one = tl.full([], 1, DTYPE)
    units = Units(
        log2_units(number(numbers.student_temperature, ON_DEVICE, DTYPE), DTYPE),
        one if COMBINE == "mixture" else unit,
        one,
    )
    teacher_rows = rows_of_each(teachers, row, inner, head, 0 if CONGRUENT else -1)
    shares = weights_of_rows(
        weights_ptr, row, row >= 0, strides.weights, strides.weights_of_teacher, len(teachers),
        COMBINE == "mixture", DTYPE,
    )  # fmt: skip
    index = tl.load(index_ptr + row).to(tl.int64) if index_ptr is not None else -1
    tops = shares
    shifts = shares
    if COMBINE == "mixture":
        tops, shifts = _softmaxes(teacher_rows, shares, unit, span, DTYPE, THREADS, WIDTH)
        for k in tl.static_range(len(teachers)):
            tl.store(statistics_row + N_STATISTICS + 2 * k, tops[k])
            tl.store(statistics_row + N_STATISTICS + 2 * k + 1, shifts[k])
    of = Committee(teacher_rows, shares, tops, shifts, index, unit)

    if gradient_ptr is not None:
        factor = number(numbers.scale, ON_DEVICE, DTYPE) * number(
            numbers.row_weight, ON_DEVICE, DTYPE
        )
        factor /= number(numbers.student_temperature, ON_DEVICE, DTYPE)
    loss = tl.zeros([], DTYPE)
    for k in tl.static_range(len(teachers) if COMBINE == "sum" else 1):
        if gradient_ptr is not None:
            sums, certain = _sums_and_gradient(
                student_row, gradient_row, of, span, units, weight, factor, DIVERGENCE, DTYPE, FAST,
                THREADS, WIDTH,
            )  # fmt: skip
        elif IS_MIXTURE and (COMBINE == "mixture"):
            ms, zs = _softmax(student_row, True, units.cs, span, DTYPE, THREADS, WIDTH)
            zt = one
            for j in tl.static_range(len(teachers)):  # a teacher without a softmax makes a NaN
                zt += tl.where(shares[j] == 0, 0.0, 0 * shifts[j])
            sums = Sums(ms, zs, one - one, zt, one, one, one)
        else:
            sums = _sums(
                student_row, of, span, units, k, DIVERGENCE, COMBINE, LOGS, DTYPE, FAST, THREADS,
                WIDTH,
            )  # fmt: skip
        if IS_MIXTURE:
            value, slope_sum = _mixture_value(
                student_row, of, span, units, sums, weight, k, DIVERGENCE, COMBINE, LOGS, DTYPE,
                FAST, THREADS, WIDTH,
            )  # fmt: skip
        else:
            value, slope_sum = kl_value(sums.zs, sums.zt, sums.a, sums.b, weight, DIVERGENCE)
        if COMBINE == "sum":
            value = tl.where(shares[k] == 0, 0.0, shares[k] * value)
        loss += value
        of_term = statistics_row + k * N_STATISTICS
        tl.store(of_term, sums.ms)
        tl.store(of_term + 1, sums.zs)
        tl.store(of_term + 2, sums.mt)
        tl.store(of_term + 3, sums.zt)
        tl.store(of_term + 4, slope_sum)
    tl.store(losses_ptr + row, loss * number(numbers.scale, ON_DEVICE, DTYPE))
    if gradient_ptr is not None:
        if certain:
            tl.debug_barrier()  # so that all threads find the statistics that were stored
            store_top(
                student_row, gradient_row, of, statistics_row, span, units, weight, factor,
                DIVERGENCE, COMBINE, LOGS, DTYPE, FAST, THREADS, THREADS, WIDTH,
            )  # fmt: skip
