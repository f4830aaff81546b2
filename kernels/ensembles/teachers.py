"""Kernels that put several teachers together in one place, a teacher after another.

log p̄ = log Σ_k w_k p_k is kept as a logarithm, to which a teacher adds its share:
log p̄ ← max + log(1 + e^(min − max)) of log p̄ and log w_k + log p_k, which is z_k / T minus its
log-sum-exp. A row is read twice for that, the second time from the cache. Logits are added up as
they are, and chosen ones are copied.

Bytes for each (row, entry) and teacher of bfloat16, in memory: 2 read. In the cache, where the
chunk's result stays: 4 written and, but for the first teacher, 4 read; in a mixture 2 read more. Of
chosen rows 2 read and 4 written, whatever the number of teachers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._op import Number
from fastkd.kernels.device import on_device, rows_of
from fastkd.kernels.rows.terms import LOWEST
from fastkd.kernels.tiles import LN2, LOG2E, log2_units, number, row_offset

_COLUMNS = 2048  # of a block


@triton.jit
def log_sum(a, b):
    """Return log(e^a + e^b), −∞ of two of them; compared so that a NaN stays a NaN."""
    higher, lower = tl.where(a > b, a, b), tl.where(a > b, b, a)
    above = tl.log2(1 + tl.exp2((lower - higher) * LOG2E)) * LN2
    return tl.where(higher == float("-inf"), higher, higher + above)


@triton.jit(do_not_specialize=["inner"])
def add_probabilities(
    mixture,  # Strided (n_rows, n_cols), logarithms, written
    teacher,  # Strided (n_rows, n_cols), logits
    log_shares_ptr,  # (n_rows,)
    share_stride,
    temperature,  # of the teacher
    n_cols,
    inner,  # size of the logits' last dimension but one
    IS_FIRST: tl.constexpr, DTYPE: tl.constexpr, ON_DEVICE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add a teacher's share of a row to the mixture: program (row)."""
    row = tl.program_id(0)
    unit = log2_units(number(temperature, ON_DEVICE, DTYPE), DTYPE)
    teacher_row = teacher.ptr + row_offset(row, inner, teacher)
    mixture_row = mixture.ptr + row_offset(row, inner, mixture)
    columns = tl.arange(0, COLUMNS)
    top, total = tl.full([COLUMNS], LOWEST, DTYPE), tl.zeros([COLUMNS], DTYPE)
    for start in range(0, n_cols, COLUMNS):
        inside = start + columns < n_cols
        z = tl.load(teacher_row + start + columns, inside, float("-inf")).to(DTYPE)
        higher = tl.maximum(top, z)
        total = total * tl.exp2((top - higher) * unit) + tl.exp2((z - higher) * unit)
        top = higher
    highest = tl.max(top, 0)
    log_total = tl.log2(tl.sum(total * tl.exp2((top - highest) * unit), 0))
    log_share = tl.load(log_shares_ptr + row.to(tl.int64) * share_stride).to(DTYPE)
    for start in range(0, n_cols, COLUMNS):
        inside = start + columns < n_cols
        z = tl.load(teacher_row + start + columns, inside, float("-inf")).to(DTYPE)
        found = ((z - highest) * unit - log_total) * LN2 + log_share
        if not IS_FIRST:
            found = log_sum(tl.load(mixture_row + start + columns, inside, float("-inf")), found)
        tl.store(mixture_row + start + columns, found, inside)


@triton.jit(do_not_specialize=["inner"])
def add_logits(
    total,  # Strided (n_rows, n_cols), written
    teacher,  # Strided (n_rows, n_cols), logits
    weights_ptr,  # (n_rows,)
    weight_stride,
    n_cols,
    inner,  # size of the logits' last dimension but one
    IS_FIRST: tl.constexpr, DTYPE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add a teacher's row times its weight to the total: program (row, block)."""
    row, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    weight = tl.load(weights_ptr + row.to(tl.int64) * weight_stride).to(DTYPE)
    # a weight of 0 selects, so that it wins over a logit of −∞; its logits are not read
    inside = (columns < n_cols) & (weight != 0)
    teacher_row = teacher.ptr + row_offset(row, inner, teacher)
    total_row = total.ptr + row_offset(row, inner, total)
    found = tl.load(teacher_row + columns, inside, 0.0).to(DTYPE) * weight
    if not IS_FIRST:
        found += tl.load(total_row + columns, columns < n_cols, 0.0)
    tl.store(total_row + columns, found, columns < n_cols)


@triton.jit(do_not_specialize=["inner", "teacher_place", "n_teachers"])
def copy_chosen(
    chosen,  # Strided (n_rows, n_cols), written
    teacher,  # Strided (n_rows, n_cols), logits
    index_ptr,  # (n_rows,), places of teachers
    teacher_place,
    n_teachers,
    n_cols,
    inner,  # size of the logits' last dimension but one
    DTYPE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy a teacher's row if it is the chosen one: program (row, block).

    The first teacher writes NaN where no teacher is chosen.
    """
    row, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.load(index_ptr + row).to(tl.int64)
    is_chosen = index == teacher_place
    is_none = (teacher_place == 0) & ((index < 0) | (index >= n_teachers))
    inside = columns < n_cols
    teacher_row = teacher.ptr + row_offset(row, inner, teacher)
    found = tl.load(teacher_row + columns, inside & is_chosen, float("nan")).to(DTYPE)
    chosen_row = chosen.ptr + row_offset(row, inner, chosen)
    tl.store(chosen_row + columns, found, inside & (is_chosen | is_none))


def mix(
    mixture: Tensor, logits: Tensor, temperature: Number, log_shares: Tensor, is_first: bool
) -> None:
    """Add a teacher's probabilities times its share in each row to a mixture, all as logarithms.

    Args:
        mixture: log p̄ of the teachers before, [N, V], overwritten. The first teacher finds nothing.
        logits: Those of the teacher, [N, V].
        temperature: What divides them.
        log_shares: log w, [N, 1].
        is_first: Whether no teacher came before.
    """
    # float64 goes by pointer too, because a Python float reaches a kernel as float32
    by_pointer = mixture.dtype == torch.float64 or isinstance(temperature, Tensor)
    if by_pointer and not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=torch.float64, device=mixture.device)
    n_rows, n_cols = logits.shape
    if not n_rows:
        return
    with on_device(mixture):
        add_probabilities[(n_rows,)](
            rows_of(mixture),
            rows_of(logits),
            log_shares,
            log_shares.stride(0),
            temperature,
            n_cols,
            n_rows,
            IS_FIRST=is_first,
            DTYPE=_dtype(mixture),
            ON_DEVICE=by_pointer,
            COLUMNS=_columns(n_cols),
            num_warps=8,
        )


def add(total: Tensor, logits: Tensor, weights: Tensor, is_first: bool) -> None:
    """Add a teacher's logits [N, V] times its weight [N, 1] to a total, which is overwritten."""
    n_rows, n_cols = logits.shape
    columns = _columns(n_cols)
    with on_device(total):
        add_logits[(n_rows, triton.cdiv(n_cols, columns))](
            rows_of(total),
            rows_of(logits),
            weights,
            weights.stride(0),
            n_cols,
            n_rows,
            IS_FIRST=is_first,
            DTYPE=_dtype(total),
            COLUMNS=columns,
            num_warps=8,
        )


def choose(chosen: Tensor, logits: Tensor, index: Tensor, place: int, n_teachers: int) -> None:
    """Copy the rows [N, V] of a teacher whose index [N] is its place; the first writes NaN too."""
    n_rows, n_cols = logits.shape
    columns = _columns(n_cols)
    with on_device(chosen):
        copy_chosen[(n_rows, triton.cdiv(n_cols, columns))](
            rows_of(chosen),
            rows_of(logits),
            index,
            place,
            n_teachers,
            n_cols,
            n_rows,
            DTYPE=_dtype(chosen),
            COLUMNS=columns,
            num_warps=8,
        )


def _columns(n_cols: int) -> int:
    return min(_COLUMNS, triton.next_power_of_2(n_cols))


def _dtype(found: Tensor) -> tl.dtype:
    return tl.float64 if found.dtype == torch.float64 else tl.float32
