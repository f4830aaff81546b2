"""The gradient of rows that are too long to stay on chip, with all their teachers."""

import triton
import triton.language as tl

from fastkd.kernels.device import Strided
from fastkd.kernels.ensembles.spans import Span, load_tile, tile_of
from fastkd.kernels.ensembles.tiles import Committee, weights_of_rows
from fastkd.kernels.rows.sweeps import N_STATISTICS, load_statistics
from fastkd.kernels.rows.terms import Units, is_certain, slope
from fastkd.kernels.tiles import at_boundary, head_of, log2_units, number, row_offset, rows_of_each


@triton.jit
def _slopes(
    student_row, of, statistics_row, i, span, units, weight, factor, AT_EDGE: tl.constexpr,
    DIVERGENCE: tl.constexpr, COMBINE: tl.constexpr, LOGS: tl.constexpr, DTYPE: tl.constexpr,
    FAST: tl.constexpr, VECTORS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a tile in the student's logits, and where these are the row's top."""
    for k in tl.static_range(len(of.rows) if COMBINE == "sum" else 1):
        x, y = load_tile(
            student_row, of, i, span, AT_EDGE, k, COMBINE, LOGS, DTYPE, FAST, VECTORS, WIDTH
        )
        row = load_statistics(statistics_row + k * N_STATISTICS)
        ds, dt = (x - row.ms) * units.cs, (y - row.mt) * units.ct
        by_log_q = slope(ds, dt, row, weight, DIVERGENCE, FAST)
        if COMBINE == "sum":
            by_log_q = tl.where(of.shares[k] == 0, 0.0, of.shares[k] * by_log_q)
        if k == 0:
            slopes = by_log_q
            is_top = x == row.ms
        else:
            slopes += by_log_q
    return slopes * factor, is_top


@triton.jit
def store_zeros(
    gradient_row, i, span, AT_EDGE: tl.constexpr, VECTORS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Store the gradient of a tile of a row that does not count."""
    columns, inside = tile_of(i, span, AT_EDGE, VECTORS, WIDTH)
    zeros = tl.zeros([VECTORS, WIDTH], gradient_row.dtype.element_ty)
    tl.store(gradient_row + columns, zeros, inside)


@triton.jit
def _store_tile(
    student_row, gradient_row, of, statistics_row, i, span, units, weight, factor, certain,
    AT_EDGE: tl.constexpr, DIVERGENCE: tl.constexpr, COMBINE: tl.constexpr, LOGS: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr, VECTORS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a tile, but for a class of which the student is certain."""
    slopes, is_top = _slopes(
        student_row, of, statistics_row, i, span, units, weight, factor, AT_EDGE, DIVERGENCE,
        COMBINE, LOGS, DTYPE, FAST, VECTORS, WIDTH,
    )  # fmt: skip
    columns, inside = tile_of(i, span, AT_EDGE, VECTORS, WIDTH)
    kept = inside & ~(is_top & certain)
    tl.store(gradient_row + columns, slopes.to(gradient_row.dtype.element_ty), kept)


@triton.jit
def _without_top(
    student_row, of, statistics_row, i, span, units, weight, factor, AT_EDGE: tl.constexpr,
    DIVERGENCE: tl.constexpr, COMBINE: tl.constexpr, LOGS: tl.constexpr, DTYPE: tl.constexpr,
    FAST: tl.constexpr, VECTORS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the sum of a tile's gradient without the row's top, and the top's column."""
    slopes, is_top = _slopes(
        student_row, of, statistics_row, i, span, units, weight, factor, AT_EDGE, DIVERGENCE,
        COMBINE, LOGS, DTYPE, FAST, VECTORS, WIDTH,
    )  # fmt: skip
    columns, inside = tile_of(i, span, AT_EDGE, VECTORS, WIDTH)
    top = tl.max(tl.max(tl.where(inside & is_top, columns, -WIDTH), 1), 0)
    return tl.sum(tl.sum(tl.where(inside & ~is_top, slopes, 0.0), 1), 0), top


@triton.jit
def store_top(
    student_row, gradient_row, of, statistics_row, span, units, weight, factor,
    DIVERGENCE: tl.constexpr, COMBINE: tl.constexpr, LOGS: tl.constexpr, DTYPE: tl.constexpr,
    FAST: tl.constexpr, VECTORS: tl.constexpr, EDGES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a row's top, minus the sum of the others, which are computed anew."""
    others, top = _without_top(
        student_row, of, statistics_row, 0, span, units, weight, factor, True, DIVERGENCE, COMBINE,
        LOGS, DTYPE, FAST, EDGES, WIDTH,
    )  # fmt: skip
    for i in range(0, span.n_vectors, VECTORS):
        more, found = _without_top(
            student_row, of, statistics_row, i, span, units, weight, factor, False, DIVERGENCE,
            COMBINE, LOGS, DTYPE, FAST, VECTORS, WIDTH,
        )  # fmt: skip
        others, top = others + more, tl.maximum(top, found)
    tl.store(gradient_row + top, (-others).to(gradient_row.dtype.element_ty))


@triton.jit(do_not_specialize=["inner"])
def ensemble_gradient(
    student,  # Strided (n_rows, n_cols)
    teachers,  # K of Strided (n_rows, n_cols)
    weights_ptr,  # (n_rows, K), of the teachers, or None for 1 / K
    index_ptr,  # (n_rows,), of the chosen teachers, or None
    row_mask_ptr,  # (n_rows,) or None
    upstream_ptr,  # (n_rows,), of the losses
    statistics_ptr,  # (n_rows, n_statistics)
    gradient_ptr,  # (n_rows, n_cols), written
    n_statistics,
    n_cols,
    n_blocks,  # of VECTORS vectors, to a row
    inner,  # size of the logits' last dimension but one
    strides,  # whole_rows.Strides
    numbers,  # rows.sweeps.Numbers
    DIVERGENCE: tl.constexpr, COMBINE: tl.constexpr, LOGS: tl.constexpr, DTYPE: tl.constexpr,
    FAST: tl.constexpr, ON_DEVICE: tl.constexpr, CONGRUENT: tl.constexpr,
    GRADIENT_CONGRUENT: tl.constexpr, VECTORS: tl.constexpr, WIDTH: tl.constexpr,
    WEIGHED: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a block of a row from its statistics: program row · n_blocks + block.

    WEIGHED, that for the row weight is there already, and rows with it for an upstream gradient are
    left alone. Where a student is nearly certain of a class, whose Z has lost the digits of the
    rest, that of this class is minus the sum of the others: the first block reads the whole row for
    it.
    """
    program = tl.program_id(0)
    row, block = program // n_blocks, program % n_blocks
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    unit = log2_units(number(numbers.teacher_temperature, ON_DEVICE, DTYPE), DTYPE)
    of_student = number(numbers.student_temperature, ON_DEVICE, DTYPE)
    one = tl.full([], 1, DTYPE)
    units = Units(log2_units(of_student, DTYPE), one if COMBINE == "mixture" else unit, one)
    upstream = tl.load(upstream_ptr + row.to(tl.int64) * strides.upstream).to(DTYPE)
    if WEIGHED:
        if upstream == number(numbers.row_weight, ON_DEVICE, DTYPE):
            return
    factor = upstream * number(numbers.scale, ON_DEVICE, DTYPE) / of_student
    if row_mask_ptr is not None:
        factor = tl.where(tl.load(row_mask_ptr + row) != 0, factor, 0.0)
    shares = weights_of_rows(
        weights_ptr, row, row >= 0, strides.weights, strides.weights_of_teacher, len(teachers),
        COMBINE == "mixture", DTYPE,
    )  # fmt: skip
    index = tl.load(index_ptr + row).to(tl.int64) if index_ptr is not None else -1
    statistics_row = statistics_ptr + row.to(tl.int64) * n_statistics
    zs = tl.load(statistics_row + 1)
    certain = (factor != 0) & (zs > 0)  # a student without a softmax has no top
    for k in tl.static_range(len(teachers) if COMBINE == "sum" else 1):
        zt = tl.load(statistics_row + k * N_STATISTICS + 3)
        if COMBINE == "sum":
            zt = tl.where(shares[k] == 0, 1.0, zt)
        certain &= is_certain(zs, zt, zs, False)
    tops = shares
    shifts = shares
    if COMBINE == "mixture":
        tops = ()
        shifts = ()
        for k in tl.static_range(len(teachers)):
            tops += (tl.load(statistics_row + N_STATISTICS + 2 * k),)
            shifts += (tl.load(statistics_row + N_STATISTICS + 2 * k + 1),)

    student_row = student.ptr + row_offset(row, inner, student)
    head = head_of(student_row, n_cols, WIDTH)
    student_row = at_boundary(student_row, head, True)
    span = Span((n_cols - head) // WIDTH, head, n_cols)
    teacher_rows = rows_of_each(teachers, row, inner, head, 0 if CONGRUENT else -1)
    of = Committee(teacher_rows, shares, tops, shifts, index, unit)
    gradient = Strided(gradient_ptr, strides.gradient_outer, strides.gradient_inner)
    gradient_row = at_boundary(
        gradient_ptr, row_offset(row, inner, gradient) + head, GRADIENT_CONGRUENT
    )
    if factor == 0:  # returns, so that no logits of a masked row are read
        store_zeros(gradient_row, block * VECTORS, span, False, VECTORS, WIDTH)
        if block == 0:
            store_zeros(gradient_row, 0, span, True, 2, WIDTH)
        return
    _store_tile(
        student_row, gradient_row, of, statistics_row, block * VECTORS, span, units, weight,
        factor, certain, False, DIVERGENCE, COMBINE, LOGS, DTYPE, FAST, VECTORS, WIDTH,
    )  # fmt: skip
    if block == 0:
        _store_tile(
            student_row, gradient_row, of, statistics_row, 0, span, units, weight, factor, certain,
            True, DIVERGENCE, COMBINE, LOGS, DTYPE, FAST, 2, WIDTH,
        )  # fmt: skip
        if certain:
            store_top(
                student_row, gradient_row, of, statistics_row, span, units, weight, factor,
                DIVERGENCE, COMBINE, LOGS, DTYPE, FAST, VECTORS, 2, WIDTH,
            )  # fmt: skip
