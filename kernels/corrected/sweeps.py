"""Kernels of corrected rows: those that stay on chip at once, longer ones by two sweeps.

The sums of a row say what its label makes of the teacher, its value and the few numbers that turn
the exponentials of a logit into its slope: see `terms.py`. For each entry of bf16 logits the sums
read 4 bytes and the gradient moves 6, without a teacher 2 and 4.

No class but the label has more than half of a corrected teacher, unless it is the only other one.
So a slope whose student is nearly certain is no small difference of numbers near 1, and needs no
look at the others, as in `rows/gradients.py`.
"""

import triton
import triton.language as tl

from fastkd.kernels.corrected.terms import (
    Row,
    add,
    corrected,
    label_logit,
    no_sums,
    reference_of,
    slope,
    whole,
)
from fastkd.kernels.device import Strided
from fastkd.kernels.rows.reading import Pointers, edges, load_logits, units_of, vectors
from fastkd.kernels.rows.terms import LOWEST, Sums, merge
from fastkd.kernels.tiles import at_boundary, head_of, number, row_offset

N_STATISTICS = tl.constexpr(5)  # of a Row and, in the order of Sums, of a split


@triton.jit
def _store(pointer, a, b, c, d, e):
    """Store what a row or a split has."""
    tl.store(pointer, a)
    tl.store(pointer + 1, b)
    tl.store(pointer + 2, c)
    tl.store(pointer + 3, d)
    tl.store(pointer + 4, e)


@triton.jit
def _pointers_of(
    row, label, student_ptr, teacher_ptr, n_cols, inner, strides, CONGRUENT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the Pointers to a row, and how many of its elements precede its first boundary."""
    student = Strided(student_ptr, strides.student_outer, strides.student_inner)
    teacher = Strided(teacher_ptr, strides.teacher_outer, strides.teacher_inner)
    student_row = student_ptr + row_offset(row, inner, student)
    head = head_of(student_row, n_cols, WIDTH)
    rows = Pointers(
        at_boundary(student_row, head, True),
        at_boundary(teacher_ptr, row_offset(row, inner, teacher) + head, CONGRUENT),
        (label - head).to(tl.int32),  # because numbers of 64 bits take more to compare with
    )
    return rows, head


@triton.jit
def _is_counted(rows, columns, mask):
    """Return which columns of a tile are inside their rows and not the label."""
    is_other = columns != rows.apart
    return is_other if mask is None else is_other & mask


@triton.jit
def _add_tile(
    sums, rows, columns, mask, units, DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Return the sums with the logits of a tile of one row, a vector for each thread."""
    x, y = load_logits(rows, columns, mask, DIVERGENCE, True, DTYPE)
    return add(sums, x, y, _is_counted(rows, columns, mask), units, DIVERGENCE)


@triton.jit
def _finish(
    sums, rows, head, row, label, n_cols, units, numbers, losses_ptr, statistics_ptr,
    DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Store the loss of a row and the numbers that its gradient needs."""
    correction = number(numbers.weight, ON_DEVICE, DTYPE)
    of_student = label_logit(rows.student - head, label, n_cols, DTYPE)
    of_teacher = of_student
    if DIVERGENCE != "":
        of_teacher = label_logit(rows.teacher - head, label, n_cols, DTYPE)
    sums = whole(sums, n_cols, units, DIVERGENCE)
    value, found = corrected(sums, units, of_student, of_teacher, correction, DIVERGENCE)
    tl.store(losses_ptr + row, value * number(numbers.scale, ON_DEVICE, DTYPE))
    _store(statistics_ptr + row.to(tl.int64) * N_STATISTICS, *found)


# numbers that vary with the batch stay unspecialised, so that every batch runs the same code
@triton.jit(do_not_specialize=["inner", "vectors_per_split"])
def corrected_sums(
    student_ptr,  # (n_rows, n_cols)
    teacher_ptr,  # (n_rows, n_cols), not read without a teacher
    apart_ptr,  # (n_rows,), labels
    losses_ptr,  # (n_rows,)
    statistics_ptr,  # (n_rows, N_STATISTICS)
    partial_ptr,  # (n_rows, n_splits, N_STATISTICS), or None for whole rows
    n_cols,
    inner,  # size of the logits' last dimension but one
    vectors_per_split,
    strides,  # Strides
    numbers,  # Numbers, whose weight is the correction
    DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr, ON_DEVICE: tl.constexpr,
    CONGRUENT: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the loss and statistics of a row, or sum over a split of it: program (row, split).

    Every thread keeps its own pivots and sums, so that there is no barrier before the end.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    label = tl.load(apart_ptr + row).to(tl.int64)
    if label < 0:  # returns, so that no logits of a row without a label are read
        if partial_ptr is None:
            tl.store(losses_ptr + row, 0.0)
            _store(statistics_ptr + row.to(tl.int64) * N_STATISTICS, 0.0, 0.0, 0.0, 0.0, 0.0)
        return
    units = units_of(numbers, row, False, ON_DEVICE, DTYPE)
    rows, head = _pointers_of(
        row, label, student_ptr, teacher_ptr, n_cols, inner, strides, CONGRUENT, WIDTH
    )
    start = split * vectors_per_split
    end = tl.maximum(start, tl.minimum(start + vectors_per_split, (n_cols - head) // WIDTH))
    pivot = LOWEST
    if DIVERGENCE == "":
        first = tl.arange(0, THREADS)[None, :]  # the same for all splits
        x, _ = load_logits(rows, first - head, first < n_cols, "", True, DTYPE)
        pivot = tl.max(reference_of(x), 0)
    sums = no_sums(pivot, THREADS, DTYPE)
    rest = start + (end - start) // THREADS * THREADS
    for i in range(start, rest, THREADS):
        columns = vectors(i, THREADS, WIDTH)
        sums = _add_tile(sums, rows, columns, None, units, DIVERGENCE, DTYPE)
    if rest < end:
        inside = (rest + tl.arange(0, THREADS) < end)[:, None]
        columns = vectors(rest, THREADS, WIDTH)
        sums = _add_tile(sums, rows, columns, inside, units, DIVERGENCE, DTYPE)
    if (split == 0) & (n_cols % WIDTH + head > 0):
        at_edge, inside_edge = edges(head, n_cols, THREADS, WIDTH)
        sums = _add_tile(sums, rows, at_edge, inside_edge, units, DIVERGENCE, DTYPE)
    sums = merge(sums, units, DIVERGENCE)
    if partial_ptr is None:
        _finish(
            sums, rows, head, row, label, n_cols, units, numbers, losses_ptr, statistics_ptr,
            DIVERGENCE, DTYPE, ON_DEVICE,
        )  # fmt: skip
    else:
        place = (row.to(tl.int64) * tl.num_programs(1) + split) * N_STATISTICS
        _store(partial_ptr + place, sums.ms, sums.zs, sums.mt, sums.zt, sums.a)


@triton.jit(do_not_specialize=["inner", "n_splits"])
def combine_corrected(
    student_ptr,  # (n_rows, n_cols)
    teacher_ptr,  # (n_rows, n_cols), not read without a teacher
    apart_ptr,  # (n_rows,), labels
    losses_ptr,  # (n_rows,)
    statistics_ptr,  # (n_rows, N_STATISTICS)
    partial_ptr,  # (n_rows, n_splits, N_STATISTICS)
    n_cols,
    inner,  # size of the logits' last dimension but one
    n_splits,
    strides,  # Strides
    numbers,  # Numbers, whose weight is the correction
    DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr, ON_DEVICE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Combine what the splits of a row summed, always in the same order: program (row)."""
    row = tl.program_id(0)
    label = tl.load(apart_ptr + row).to(tl.int64)
    if label < 0:
        tl.store(losses_ptr + row, 0.0)
        _store(statistics_ptr + row.to(tl.int64) * N_STATISTICS, 0.0, 0.0, 0.0, 0.0, 0.0)
        return
    split = tl.arange(0, SPLITS)
    inside = split < n_splits
    place = partial_ptr + (row.to(tl.int64) * n_splits + split) * N_STATISTICS
    zeros = tl.zeros([SPLITS], DTYPE)
    sums = Sums(
        tl.load(place, inside, LOWEST),
        tl.load(place + 1, inside, 0.0),
        tl.load(place + 2, inside, LOWEST),
        tl.load(place + 3, inside, 0.0),
        tl.load(place + 4, inside, 0.0),
        zeros,
        zeros,
    )
    units = units_of(numbers, row, False, ON_DEVICE, DTYPE)
    rows, _ = _pointers_of(row, label, student_ptr, teacher_ptr, 0, inner, strides, False, 1)
    _finish(
        merge(sums, units, DIVERGENCE), rows, 0, row, label, n_cols, units, numbers, losses_ptr,
        statistics_ptr, DIVERGENCE, DTYPE, ON_DEVICE,
    )  # fmt: skip


@triton.jit
def _factor_of(
    rows, label, upstream_ptr, strides, numbers, ON_DEVICE: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Return what multiplies the slopes of rows, 0 of those without a label."""
    scale = number(numbers.scale, ON_DEVICE, DTYPE)
    scale /= number(numbers.student_temperature, ON_DEVICE, DTYPE)
    places = upstream_ptr + rows.to(tl.int64) * strides.upstream  # which may be far apart
    return tl.load(places, label >= 0, 0.0).to(DTYPE) * scale


@triton.jit
def _gradient_tile(
    rows, gradient_row, columns, inside, units, row, factor, DIVERGENCE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a tile of one row, whose logits are read only if its factor is not 0.

    A factor of 0 selects: it wins over a NaN.
    """
    x, y = load_logits(rows, columns, inside & (factor != 0), DIVERGENCE, False, DTYPE)
    slopes = slope(x, y, columns == rows.apart, units, row, DIVERGENCE)
    found = tl.where(factor == 0, 0.0, slopes * factor)
    tl.store(gradient_row + columns, found.to(gradient_row.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["inner"])
def corrected_gradient(
    student_ptr,  # (n_rows, n_cols)
    teacher_ptr,  # (n_rows, n_cols), not read without a teacher
    apart_ptr,  # (n_rows,), labels
    upstream_ptr,  # (n_rows,)
    statistics_ptr,  # (n_rows, N_STATISTICS)
    gradient_ptr,  # (n_rows, n_cols), written
    n_cols,
    n_blocks,  # of VECTORS vectors, to a row
    inner,  # size of the logits' last dimension but one
    strides,  # Strides
    numbers,  # Numbers, whose weight is the correction
    DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr, ON_DEVICE: tl.constexpr,
    CONGRUENT: tl.constexpr, GRADIENT_CONGRUENT: tl.constexpr, VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a block of a row from its statistics: program row · n_blocks + block.

    Both are on one axis of the grid, because the others hold 65,535 programs at most.
    """
    program = tl.program_id(0)
    row, block = program // n_blocks, program % n_blocks
    label = tl.load(apart_ptr + row).to(tl.int64)
    units = units_of(numbers, row, False, ON_DEVICE, DTYPE)
    factor = _factor_of(row, label, upstream_ptr, strides, numbers, ON_DEVICE, DTYPE)
    place = statistics_ptr + row.to(tl.int64) * N_STATISTICS
    of_row = Row(
        tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3),
        tl.load(place + 4),
    )  # fmt: skip
    rows, head = _pointers_of(
        row, label, student_ptr, teacher_ptr, n_cols, inner, strides, CONGRUENT, WIDTH
    )
    view = Strided(gradient_ptr, strides.gradient_outer, strides.gradient_inner)
    gradient_row = at_boundary(
        gradient_ptr, row_offset(row, inner, view) + head, GRADIENT_CONGRUENT
    )
    start, end = block * VECTORS, (n_cols - head) // WIDTH
    inside = (start + tl.arange(0, VECTORS) < end)[:, None]
    _gradient_tile(
        rows, gradient_row, vectors(start, VECTORS, WIDTH), inside, units, of_row, factor,
        DIVERGENCE, DTYPE,
    )  # fmt: skip
    if (block == 0) & (n_cols % WIDTH + head > 0):
        at_edge, inside_edge = edges(head, n_cols, 2, WIDTH)
        _gradient_tile(
            rows, gradient_row, at_edge, inside_edge, units, of_row, factor, DIVERGENCE, DTYPE
        )


@triton.jit(do_not_specialize=["n_rows", "inner"])
def corrected_rows(
    student_ptr,  # (n_rows, n_cols)
    teacher_ptr,  # (n_rows, n_cols), not read without a teacher
    apart_ptr,  # (n_rows,), labels
    upstream_ptr,  # (n_rows,), or None with losses_ptr
    losses_ptr,  # (n_rows,); None: the gradient
    gradient_ptr,  # (n_rows, n_cols), written; None: the losses
    n_rows,
    n_cols,
    inner,  # size of the logits' last dimension but one
    strides,  # Strides
    numbers,  # Numbers, whose weight is the correction
    DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr, ON_DEVICE: tl.constexpr,
    ALIGNMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the losses or the gradient of ROWS rows, which are read once and stay on chip.

    ALIGNMENT divides n_cols and the start of every row.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < n_rows
    label = tl.load(apart_ptr + rows, exists, -1).to(tl.int64)
    units = units_of(numbers, rows, False, ON_DEVICE, DTYPE)
    n_cols = n_cols // ALIGNMENT * ALIGNMENT  # unchanged; tells the compiler what divides it
    columns = tl.arange(0, COLUMNS)[None, :]
    student = Strided(student_ptr, strides.student_outer, strides.student_inner)
    teacher = Strided(teacher_ptr, strides.teacher_outer, strides.teacher_inner)
    student_rows = student_ptr + row_offset(rows, inner, student) // ALIGNMENT * ALIGNMENT
    teacher_rows = teacher_ptr + row_offset(rows, inner, teacher) // ALIGNMENT * ALIGNMENT
    pointers = Pointers(student_rows[:, None], teacher_rows[:, None], label.to(tl.int32)[:, None])
    inside = (label >= 0)[:, None] & (columns < n_cols)
    x, y = load_logits(pointers, columns, inside, DIVERGENCE, True, DTYPE)
    pivot = reference_of(x) if DIVERGENCE == "" else LOWEST
    is_counted = _is_counted(pointers, columns, inside)
    sums = add(no_sums(pivot, ROWS, DTYPE), x, y, is_counted, units, DIVERGENCE)
    sums = whole(sums, n_cols, units, DIVERGENCE)
    of_student = label_logit(student_rows, label, n_cols, DTYPE)
    of_teacher = of_student
    if DIVERGENCE != "":
        of_teacher = label_logit(teacher_rows, label, n_cols, DTYPE)
    correction = number(numbers.weight, ON_DEVICE, DTYPE)
    value, row = corrected(sums, units, of_student, of_teacher, correction, DIVERGENCE)
    if losses_ptr is not None:
        value *= number(numbers.scale, ON_DEVICE, DTYPE)
        tl.store(losses_ptr + rows, tl.where(label >= 0, value, 0.0), exists)
    else:
        factor = _factor_of(rows, label, upstream_ptr, strides, numbers, ON_DEVICE, DTYPE)[:, None]
        row = Row(
            row.ms[:, None], row.of_student[:, None], row.mt[:, None], row.of_teacher[:, None],
            row.of_label[:, None],
        )  # fmt: skip
        slopes = slope(x, y, columns == pointers.apart, units, row, DIVERGENCE)
        if COLUMNS == 2:  # the other class has minus the slope of the label, with all its digits
            slopes = tl.where(columns == pointers.apart, row.of_label, -row.of_label)
        view = Strided(gradient_ptr, strides.gradient_outer, strides.gradient_inner)
        gradient_rows = gradient_ptr + row_offset(rows, inner, view) // ALIGNMENT * ALIGNMENT
        tl.store(
            gradient_rows[:, None] + columns,
            tl.where(factor == 0, 0.0, slopes * factor).to(gradient_ptr.dtype.element_ty),
            mask=exists[:, None] & (columns < n_cols),
        )
