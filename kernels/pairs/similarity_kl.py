"""Sweeps over the tiles of S of a student and T of a teacher, for the loss of `SoftPairs`.

With P and R the softmax of the rows of S and of T

    KL_i = Σ_j R_ij (T_ij − S_ij) + log Σ_j exp S_ij − log Σ_j exp T_ij

has the slope P − R in S; a cross-entropy, Σ_j R_ij (log Σ_k exp S_ik − S_ij), has the same. Per
element of S and T nothing is read or written; per tile a program reads COLUMNS · (DEPTH + DEPTH_T)
elements, mostly from the L2 cache.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.pairs.tiles import (
    LOWEST,
    Mask,
    add_weighted,
    columns_of_split,
    fold_tiles,
    load_block,
    load_tile,
    masked,
    store_values,
)


class _Statistics(NamedTuple):
    largest: Any  # [ROWS], of S, and below the same of T
    total: Any  # [ROWS], Σ_j exp2(S_ij − largest_i)
    largest_t: Any
    total_t: Any
    differences: Any  # [ROWS], Σ_j exp2(T_ij − largest_t_i)(T_ij − S_ij), or without that T_ij


class _StatisticOperands(NamedTuple):
    student: Any  # Similarities
    teacher: Any
    block: Any
    block_t: Any
    TILE_T: Any
    CROSS_ENTROPY: Any


@triton.jit
def _add_divergence(sums, operands, row, column, mask, MASKED: tl.constexpr, TILE):
    _, s = load_tile(operands.student, operands.block, column, TILE)
    _, t = load_tile(operands.teacher, operands.block_t, column, operands.TILE_T)
    # before they are masked, because −inf − (−inf) would be NaN
    difference = -s if operands.CROSS_ENTROPY else t - s
    if MASKED:
        s = masked(s, row, column, mask, TILE)
        t = masked(t, row, column, mask, TILE)
    risen = tl.maximum(sums.largest, tl.max(s, 1))
    risen_t = tl.maximum(sums.largest_t, tl.max(t, 1))
    shrunk_t = tl.exp2(sums.largest_t - risen_t)
    total = sums.total * tl.exp2(sums.largest - risen) + tl.sum(tl.exp2(s - risen[:, None]), 1)
    e_t = tl.exp2(t - risen_t[:, None])
    total_t = sums.total_t * shrunk_t + tl.sum(e_t, 1)
    differences = sums.differences * shrunk_t + tl.sum(e_t * difference, 1)
    return _Statistics(risen, total, risen_t, total_t, differences)


@triton.jit(do_not_specialize=["n", "m", "per_split", "diagonal"])
def divergences(
    student,  # Similarities
    teacher,
    statistics_ptr,  # [n_splits, 5, n_padded], as in _Statistics
    n,
    n_padded,
    m,
    per_split,
    diagonal,
    TILE,
    TILE_T,
    CROSS_ENTROPY: tl.constexpr,
):
    """Compute the statistics of rows of S and T; program (tile of rows, split of the columns)."""
    row, split = tl.program_id(0) * TILE.ROWS, tl.program_id(1)
    low, high = columns_of_split(split, per_split, m)
    block, block_t = load_block(student, row, TILE), load_block(teacher, row, TILE_T)
    largest = tl.full([TILE.ROWS], LOWEST, TILE.DTYPE)
    zeros = tl.zeros([TILE.ROWS], TILE.DTYPE)
    sums = _Statistics(largest, zeros, largest, zeros, zeros)
    sums = fold_tiles(
        sums, _StatisticOperands(student, teacher, block, block_t, TILE_T, CROSS_ENTROPY),
        row, low, high, Mask(n, m, diagonal, None, False), _add_divergence, TILE,
    )  # fmt: skip
    statistics_ptr += split * 5 * n_padded + row + tl.arange(0, TILE.ROWS)
    tl.store(statistics_ptr, sums.largest)
    tl.store(statistics_ptr + n_padded, sums.total)
    tl.store(statistics_ptr + 2 * n_padded, sums.largest_t)
    tl.store(statistics_ptr + 3 * n_padded, sums.total_t)
    tl.store(statistics_ptr + 4 * n_padded, sums.differences)


class Shifts(NamedTuple):
    """The log-sum-exps of S and of T, in units of log2, less what lifts the slopes."""

    student_ptr: Any  # [n_padded] of x, or [m_padded] of y
    teacher_ptr: Any


class _DifferenceOperands(NamedTuple):
    student: Any  # Similarities
    teacher: Any
    block: Any
    block_t: Any
    row_shifts: Any  # [ROWS], or None
    row_shifts_t: Any
    column_shifts: Any  # Shifts, or None
    TILE_T: Any


@triton.jit
def _add_differences(values, operands, row, column, mask, MASKED: tl.constexpr, TILE):
    if operands.student.y.ptr.dtype.element_ty == tl.float32:
        # T first: for S in TF32 the tile is copied inside shared memory, and Triton takes the fence
        # behind that for one behind the teacher's tile, which may still be on its way
        _, t = load_tile(operands.teacher, operands.block_t, column, operands.TILE_T)
        y, s = load_tile(operands.student, operands.block, column, TILE)
    else:
        y, s = load_tile(operands.student, operands.block, column, TILE)
        _, t = load_tile(operands.teacher, operands.block_t, column, operands.TILE_T)
    if MASKED:
        s = masked(s, row, column, mask, TILE)
        t = masked(t, row, column, mask, TILE)
    places = column + tl.arange(0, TILE.COLUMNS)
    slopes = tl.zeros([TILE.ROWS, TILE.COLUMNS], TILE.DTYPE)
    if operands.row_shifts is not None:
        of_student = tl.exp2(s - operands.row_shifts[:, None])
        slopes += of_student - tl.exp2(t - operands.row_shifts_t[:, None])
    if operands.column_shifts is not None:
        shifts = tl.load(operands.column_shifts.student_ptr + places)[None, :]
        shifts_t = tl.load(operands.column_shifts.teacher_ptr + places)[None, :]
        slopes += tl.exp2(s - shifts) - tl.exp2(t - shifts_t)
    return add_weighted(values, slopes, y, operands.student.y, column, TILE)


@triton.jit(do_not_specialize=["n", "m", "per_split", "diagonal"])
def weighed_differences(
    student,  # Similarities
    teacher,
    row_shifts,  # Shifts, or None
    column_shifts,  # Shifts, or None
    values_ptr,  # [n_splits, n_padded, DEPTH]
    n,
    n_padded,
    m,
    per_split,
    diagonal,
    TILE,
    TILE_T,
):
    """Compute Σ_j G_ij g_j y_j; program (tile of rows, split of the columns).

    G_ij = exp2(S_ij − shift_i) − exp2(T_ij − shift_t_i) with the shifts of rows, and the same with
    those of columns; with both it is the sum.
    """
    row, split = tl.program_id(0) * TILE.ROWS, tl.program_id(1)
    low, high = columns_of_split(split, per_split, m)
    block, block_t = load_block(student, row, TILE), load_block(teacher, row, TILE_T)
    of_rows, of_rows_t = None, None
    if row_shifts is not None:
        of_rows = tl.load(row_shifts.student_ptr + row + tl.arange(0, TILE.ROWS))
        of_rows_t = tl.load(row_shifts.teacher_ptr + row + tl.arange(0, TILE.ROWS))
    values = tl.zeros([TILE.ROWS, TILE.DEPTH], TILE.DTYPE)
    values = fold_tiles(
        values,
        _DifferenceOperands(
            student, teacher, block, block_t, of_rows, of_rows_t, column_shifts, TILE_T
        ),
        row, low, high, Mask(n, m, diagonal, None, False), _add_differences, TILE,
    )  # fmt: skip
    store_values(values_ptr, values, split, n_padded, row, TILE)
