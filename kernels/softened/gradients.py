"""Kernels that write the gradients of both networks of rows, and of their temperatures.

With h = ∂d/∂log q and k = ∂d/∂log p a divergence D = Σ d(log p, log q) has the gradients
(h − q Σ h) / T in the student's logits and (k − p Σ k) / T in the teacher's, so that one sweep
makes both. Those of a row add up to 0: a temperature, which divides logits z, has the gradient
−Σ (z − pivot) · ∂D/∂z / T with any pivot, and the largest logit, which is the pivot, no part in it.

For each entry of bf16 logits both sweeps read 4 bytes and write 4, 2 for each network that learns.
"""

import triton
import triton.language as tl

from fastkd.kernels.device import Strided
from fastkd.kernels.rows.on_chip import with_certain
from fastkd.kernels.rows.reading import (
    Pointers,
    edges,
    load_logits,
    pointers_of,
    temperature_of,
    units_of,
    vectors,
)
from fastkd.kernels.rows.sweeps import N_STATISTICS, load_statistics
from fastkd.kernels.rows.terms import (
    LEAST,
    LOWEST,
    SMALLEST,
    TINY,
    Statistics,
    add_products,
    finite_unit,
    is_certain,
    mixture_of_both,
    mixture_unit,
    slope,
)
from fastkd.kernels.tiles import INFINITY, LN2, at_boundary, number, row_offset

N_SUMS = tl.constexpr(4)  # of a block: both gradients without the tops, both temperatures'


@triton.jit
def teacher_slope(ds, dt, row, weight, DIVERGENCE: tl.constexpr, FAST: tl.constexpr):
    """Return T · ∂D/∂teacher of a tile, given the Statistics of its rows.

    What it has in common with `slope`, to which the student may seem a teacher, is computed once.
    """
    if (DIVERGENCE == "forward_kl") or (DIVERGENCE == "symmetric_kl"):
        p = tl.exp2(dt) * (1 / row.zt)
        # compared this way round, so that a NaN stays a NaN
        forward = tl.where(p <= TINY, 0.0, p * ((dt - ds) - row.left))
        if DIVERGENCE == "forward_kl":
            return forward * finite_unit(row.left)
        of_reverse = (1 - weight) * (p - tl.exp2(ds) * (1 / row.zs))
        return forward * (weight * finite_unit(row.left)) + of_reverse
    if DIVERGENCE == "soft_cross_entropy":
        p = tl.exp2(dt) * (1 / row.zt)
        return tl.where(p <= TINY, 0.0, p * (-ds - row.left)) * finite_unit(row.left)
    if DIVERGENCE == "reverse_kl":
        return tl.exp2(dt) * (1 / row.zt) - tl.exp2(ds) * (1 / row.zs)
    _, _, _, p, u = mixture_of_both(ds, dt, row.zs, row.zt, weight, DIVERGENCE, FAST)
    each = mixture_unit(row.zs, row.zt, DIVERGENCE)
    is_none = dt <= SMALLEST
    if DIVERGENCE == "jensen_shannon":
        each *= weight * LN2
        is_none = p <= LEAST  # because dt would stay in a register of each entry until here
    return tl.where(is_none, 0.0, p * (u - row.left)) * each


@triton.jit
def _selected(slopes, factor):
    """Return slopes · factor; a factor of 0 selects: it wins over a NaN."""
    return tl.where(factor == 0, 0.0, slopes * factor)


@triton.jit
def _of_temperature(slopes, d, factor):
    """Return the gradient of temperatures from tiles [R, K] of the gradient and of d."""
    # an excluded class has no part in it, nor has a row of factor 0, which may hold a NaN
    counts = (d != -INFINITY) & (factor != 0)
    return tl.sum(tl.where(counts, slopes * d, 0.0), 1) * -LN2


@triton.jit
def _row_factor(rows, exists, upstream_ptr, row_mask_ptr, stride, DTYPE: tl.constexpr):
    """Return the upstream gradients of rows, 0 where they are masked."""
    factor = tl.load(upstream_ptr + rows.to(tl.int64) * stride, exists, 0.0).to(DTYPE)
    if row_mask_ptr is not None:
        factor = tl.where(tl.load(row_mask_ptr + rows, exists, 0) != 0, factor, 0.0)
    return factor


@triton.jit
def _over(factor, temperature):
    """Return factor / T, 0 in a masked row, whose T may be a NaN."""
    return tl.where(factor == 0, 0.0, factor / temperature)


@triton.jit(do_not_specialize=["n_rows", "inner"])
def both_of_whole_rows(
    student_ptr,  # (n_rows, n_cols)
    teacher_ptr,  # (n_rows, n_cols)
    row_mask_ptr,  # (n_rows,) or None
    upstream_ptr,  # (n_rows,)
    of_student_ptr,  # (n_rows, n_cols), contiguous, written, or None
    of_teacher_ptr,  # (n_rows, n_cols), contiguous, written, or None
    of_student_temperature_ptr,  # (n_rows,), written, or None
    of_teacher_temperature_ptr,  # (n_rows,), written, or None
    n_rows,
    n_cols,
    inner,  # size of the logits' last dimension but one
    strides,  # Strides
    numbers,  # Numbers
    DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ON_DEVICE: tl.constexpr, PER_ROW: tl.constexpr, ALIGNMENT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of ROWS rows, which are read once and stay on chip.

    ALIGNMENT divides n_cols and the start of every row.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < n_rows
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    own = tl.where(exists, rows, 0)[:, None] if PER_ROW else 0
    T_student = temperature_of(numbers.student_temperature, own, PER_ROW, ON_DEVICE, DTYPE)
    T_teacher = temperature_of(numbers.teacher_temperature, own, PER_ROW, ON_DEVICE, DTYPE)
    units = units_of(numbers, own, PER_ROW, ON_DEVICE, DTYPE)
    n_cols = n_cols // ALIGNMENT * ALIGNMENT  # unchanged; tells the compiler what divides it
    columns = tl.arange(0, COLUMNS)[None, :]
    student = Strided(student_ptr, strides.student_outer, strides.student_inner)
    teacher = Strided(teacher_ptr, strides.teacher_outer, strides.teacher_inner)
    student_rows = (row_offset(rows, inner, student) // ALIGNMENT * ALIGNMENT)[:, None]
    teacher_rows = (row_offset(rows, inner, teacher) // ALIGNMENT * ALIGNMENT)[:, None]
    inside = exists[:, None] & (columns < n_cols)
    pointers = Pointers(student_ptr + student_rows, teacher_ptr + teacher_rows, -1)
    x, y = load_logits(pointers, columns, inside, DIVERGENCE, False, DTYPE)

    ms, mt = tl.maximum(tl.max(x, 1), LOWEST), tl.maximum(tl.max(y, 1), LOWEST)
    ds, dt = (x - ms[:, None]) * units.cs, (y - mt[:, None]) * units.ct
    es, et = tl.exp2(ds), tl.exp2(dt)
    zs, zt = tl.sum(es, 1), tl.sum(et, 1)
    if IS_MIXTURE:
        _, q, v, p, u = mixture_of_both(ds, dt, zs[:, None], zt[:, None], weight, DIVERGENCE, FAST)
        each = mixture_unit(zs, zt, DIVERGENCE)
        slope_sum, teacher_sum = tl.sum(q * v, 1) * each, tl.sum(p * u, 1) * each
    else:
        zeros = tl.zeros([ROWS], DTYPE)
        a, b = add_products(zeros, zeros, ds, dt, es, et, DIVERGENCE)
        slope_sum, teacher_sum = b / zs, a / zt
    row = Statistics(
        ms[:, None], zs[:, None], mt[:, None], zt[:, None], slope_sum[:, None],
        teacher_sum[:, None], zs[:, None],
    )  # fmt: skip
    factor = _row_factor(rows, exists, upstream_ptr, row_mask_ptr, strides.upstream, DTYPE)
    factor = factor[:, None]
    places = rows.to(tl.int64)[:, None] * n_cols // ALIGNMENT * ALIGNMENT + columns
    of_student = _over(factor, T_student)
    slopes = _selected(slope(ds, dt, row, weight, DIVERGENCE, FAST), of_student)
    if of_student_temperature_ptr is not None:
        found = _of_temperature(slopes, ds, of_student)
        tl.store(of_student_temperature_ptr + rows, found, exists)
    if of_student_ptr is not None:
        certain = is_certain(zs, zt, zs, False)
        slopes = with_certain(slopes, pointers, columns, inside, certain, ms, False)
        tl.store(of_student_ptr + places, slopes.to(of_student_ptr.dtype.element_ty), mask=inside)
    of_teacher = _over(factor, T_teacher)
    slopes = _selected(teacher_slope(ds, dt, row, weight, DIVERGENCE, FAST), of_teacher)
    if of_teacher_temperature_ptr is not None:
        found = _of_temperature(slopes, dt, of_teacher)
        tl.store(of_teacher_temperature_ptr + rows, found, exists)
    if of_teacher_ptr is not None:
        mirrored = Pointers(pointers.teacher, pointers.student, -1)
        certain = is_certain(zt, zs, zt, False)
        slopes = with_certain(slopes, mirrored, columns, inside, certain, mt, False)
        tl.store(of_teacher_ptr + places, slopes.to(of_teacher_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _others(slopes, d, columns, inside, top_ptr):
    """Return the sum of a tile's gradient without the row's largest logit.

    The column of that is stored if the tile has it.
    """
    is_top = inside & (d == 0)
    top = tl.max(tl.max(tl.where(is_top, columns, -1), 1), 0)
    tl.store(top_ptr, top, top >= 0)
    return tl.sum(tl.sum(tl.where(is_top, 0.0, slopes), 1), 0)


@triton.jit
def _store_tile(
    gradient_row, top_ptr, slopes, d, columns, inside, head, factor, is_certain,
    HAS_TEMPERATURES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a tile in one network, and return two sums of it.

    They are that without the largest logit, of a row that is certain, and that of the temperature.
    """
    others, of_temperature = tl.zeros([], DTYPE), tl.zeros([], DTYPE)
    if HAS_TEMPERATURES:
        of_temperature = tl.sum(_of_temperature(slopes, d, factor), 0)
    if gradient_row is not None:
        tl.store(gradient_row + columns, slopes.to(gradient_row.dtype.element_ty), inside)
        if is_certain & (factor != 0):
            others = _others(slopes, d, columns + head, inside, top_ptr)
    return others, of_temperature


@triton.jit
def _gradient_tile(
    rows, of_student_row, of_teacher_row, tops_row, columns, inside, head, units, row, weight,
    of_student, of_teacher, DIVERGENCE: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Store both gradients of a tile of one row, and return their sums.

    The logits are read only if the row is not masked.
    """
    unmasked = (of_student != 0) | (of_teacher != 0)
    x, y = load_logits(rows, columns, inside & unmasked, DIVERGENCE, False, DTYPE)
    ds, dt = (x - row.ms) * units.cs, (y - row.mt) * units.ct
    slopes = _selected(slope(ds, dt, row, weight, DIVERGENCE, FAST), of_student)
    others_s, T_s = _store_tile(
        of_student_row, tops_row, slopes, ds, columns, inside, head, of_student,
        is_certain(row.zs, row.zt, row.zs, False), HAS_TEMPERATURES, DTYPE,
    )  # fmt: skip
    slopes = _selected(teacher_slope(ds, dt, row, weight, DIVERGENCE, FAST), of_teacher)
    others_t, T_t = _store_tile(
        of_teacher_row, tops_row + 1, slopes, dt, columns, inside, head, of_teacher,
        is_certain(row.zt, row.zs, row.zt, False), HAS_TEMPERATURES, DTYPE,
    )  # fmt: skip
    return others_s, others_t, T_s, T_t


@triton.jit(do_not_specialize=["inner"])
def both_gradients(
    student_ptr,  # (n_rows, n_cols)
    teacher_ptr,  # (n_rows, n_cols)
    row_mask_ptr,  # (n_rows,) or None
    upstream_ptr,  # (n_rows,)
    statistics_ptr,  # (n_rows, N_STATISTICS)
    of_student_ptr,  # (n_rows, n_cols), contiguous, written, or None
    of_teacher_ptr,  # (n_rows, n_cols), contiguous, written, or None
    tops_ptr,  # (n_rows, 2), written for networks that are certain
    sums_ptr,  # (n_rows, n_blocks, N_SUMS), written
    n_cols,
    n_blocks,  # of VECTORS vectors, to a row
    inner,  # size of the logits' last dimension but one
    strides,  # Strides
    numbers,  # Numbers
    DIVERGENCE: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, DTYPE: tl.constexpr,
    FAST: tl.constexpr, ON_DEVICE: tl.constexpr, PER_ROW: tl.constexpr, CONGRUENT: tl.constexpr,
    STUDENT_CONGRUENT: tl.constexpr, TEACHER_CONGRUENT: tl.constexpr, VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute both gradients of a block of a row, and their sums: program row · n_blocks + block.

    Both are on one axis of the grid, because the others hold 65,535 programs at most.
    """
    program = tl.program_id(0)
    row, block = program // n_blocks, program % n_blocks
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    T_student = temperature_of(numbers.student_temperature, row, PER_ROW, ON_DEVICE, DTYPE)
    T_teacher = temperature_of(numbers.teacher_temperature, row, PER_ROW, ON_DEVICE, DTYPE)
    units = units_of(numbers, row, PER_ROW, ON_DEVICE, DTYPE)
    factor = _row_factor(row, row >= 0, upstream_ptr, row_mask_ptr, strides.upstream, DTYPE)
    of_student, of_teacher = _over(factor, T_student), _over(factor, T_teacher)
    statistics = load_statistics(statistics_ptr + row.to(tl.int64) * N_STATISTICS)
    student = Strided(student_ptr, strides.student_outer, strides.student_inner)
    teacher = Strided(teacher_ptr, strides.teacher_outer, strides.teacher_inner)
    rows, head = pointers_of(row, student, teacher, None, n_cols, inner, CONGRUENT, WIDTH)
    offset = row.to(tl.int64) * n_cols + head
    of_student_row, of_teacher_row = None, None
    if of_student_ptr is not None:
        of_student_row = at_boundary(of_student_ptr, offset, STUDENT_CONGRUENT)
    if of_teacher_ptr is not None:
        of_teacher_row = at_boundary(of_teacher_ptr, offset, TEACHER_CONGRUENT)
    tops_row = tops_ptr + row.to(tl.int64) * 2
    start, end = block * VECTORS, (n_cols - head) // WIDTH
    inside = (start + tl.arange(0, VECTORS) < end)[:, None]
    others_s, others_t, T_s, T_t = _gradient_tile(
        rows, of_student_row, of_teacher_row, tops_row, vectors(start, VECTORS, WIDTH), inside,
        head, units, statistics, weight, of_student, of_teacher, DIVERGENCE,
        HAS_TEMPERATURES, DTYPE, FAST,
    )  # fmt: skip
    if (block == 0) & (n_cols % WIDTH + head > 0):
        at_edge, inside_edge = edges(head, n_cols, 2, WIDTH)
        more_s, more_t, more_T_s, more_T_t = _gradient_tile(
            rows, of_student_row, of_teacher_row, tops_row, at_edge, inside_edge, head, units,
            statistics, weight, of_student, of_teacher, DIVERGENCE, HAS_TEMPERATURES, DTYPE,
            FAST,
        )  # fmt: skip
        others_s, others_t = others_s + more_s, others_t + more_t
        T_s, T_t = T_s + more_T_s, T_t + more_T_t
    place = sums_ptr + program.to(tl.int64) * N_SUMS
    tl.store(place, others_s)
    tl.store(place + 1, others_t)
    if HAS_TEMPERATURES:
        tl.store(place + 2, T_s)
        tl.store(place + 3, T_t)


@triton.jit
def _store_top(of_network_row, top_ptr, others, n_cols):
    """Store minus the sum of the others as the gradient of a row's largest logit.

    A factor that vanishes when it is divided by T has left any number for the column of it.
    """
    top, value = tl.load(top_ptr), -tl.sum(others, 0)
    exists = (top >= 0) & (top < n_cols)
    tl.store(of_network_row + top, value.to(of_network_row.dtype.element_ty), exists)


@triton.jit(do_not_specialize=["n_blocks"])
def finish_rows(
    row_mask_ptr,  # (n_rows,) or None
    upstream_ptr,  # (n_rows,)
    statistics_ptr,  # (n_rows, N_STATISTICS)
    of_student_ptr,  # (n_rows, n_cols), contiguous, written where it is certain, or None
    of_teacher_ptr,  # (n_rows, n_cols), contiguous, written where it is certain, or None
    of_student_temperature_ptr,  # (n_rows,), written, or None
    of_teacher_temperature_ptr,  # (n_rows,), written, or None
    tops_ptr,  # (n_rows, 2)
    sums_ptr,  # (n_rows, n_blocks, N_SUMS)
    n_cols,
    n_blocks,
    strides,  # Strides
    DTYPE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add up what the blocks of a row summed, always in the same order: program (row).

    A class that a network is nearly certain of has minus the sum of the others as its gradient,
    because with Z = 1 + rest, which loses the digits of the rest, it would be the difference of
    numbers near 1.
    """
    row = tl.program_id(0)
    factor = _row_factor(row, row >= 0, upstream_ptr, row_mask_ptr, strides.upstream, DTYPE)
    statistics = load_statistics(statistics_ptr + row.to(tl.int64) * N_STATISTICS)
    zs, zt = statistics.zs, statistics.zt
    blocks = tl.arange(0, BLOCKS)
    inside, start = blocks < n_blocks, row.to(tl.int64) * n_cols
    places = sums_ptr + (row.to(tl.int64) * n_blocks + blocks) * N_SUMS
    if of_student_temperature_ptr is not None:
        found = tl.sum(tl.load(places + 2, inside, 0.0), 0)
        tl.store(of_student_temperature_ptr + row, found)
    if of_teacher_temperature_ptr is not None:
        found = tl.sum(tl.load(places + 3, inside, 0.0), 0)
        tl.store(of_teacher_temperature_ptr + row, found)
    top_ptr = tops_ptr + row.to(tl.int64) * 2
    if of_student_ptr is not None:
        if (factor != 0) & is_certain(zs, zt, zs, False):
            _store_top(of_student_ptr + start, top_ptr, tl.load(places, inside, 0.0), n_cols)
    if of_teacher_ptr is not None:
        if (factor != 0) & is_certain(zt, zs, zt, False):
            _store_top(
                of_teacher_ptr + start, top_ptr + 1, tl.load(places + 1, inside, 0.0), n_cols
            )
