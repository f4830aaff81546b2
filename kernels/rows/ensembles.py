"""Kernels that mix the probabilities of several teachers, one teacher after another.

log p̄ = log Σ_k w_k p_k is kept as a logarithm, to which a teacher adds its share:
log p̄ ← max + log(1 + e^(min − max)) of log p̄ and log w_k + log p_k, which is z_k / T minus its
log-sum-exp. A row is read twice, the second time from the cache.

Bytes for each (row, entry) of a chunk, in float32, for each teacher: 4 read twice, 4 written, and
but for the first teacher 4 of the mixture read.
"""

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
def add_teacher(
    mixture,  # Strided (n_rows, n_cols), written
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
    n_rows, n_cols = logits.shape
    # float64 goes by pointer too, because a Python float reaches a kernel as float32
    by_pointer = mixture.dtype == torch.float64 or isinstance(temperature, Tensor)
    if by_pointer and not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=torch.float64, device=mixture.device)
    if not n_rows:
        return
    with on_device(mixture):
        add_teacher[(n_rows,)](
            rows_of(mixture),
            rows_of(logits),
            log_shares,
            log_shares.stride(0),
            temperature,
            n_cols,
            n_rows,
            IS_FIRST=is_first,
            DTYPE=tl.float64 if mixture.dtype == torch.float64 else tl.float32,
            ON_DEVICE=by_pointer,
            COLUMNS=min(_COLUMNS, triton.next_power_of_2(n_cols)),
            num_warps=8,
        )
