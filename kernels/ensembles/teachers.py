"""The kernel that mixes the probabilities of several teachers in one place, one after the other.

log p̄ = log Σ_k w_k p_k is kept as a logarithm, to which a teacher adds its share:
log p̄ ← max + log(1 + e^(min − max)) of log p̄ and log w_k + log p_k, which is z_k / T minus its
log-sum-exp. A row is read twice for that, the second time from the cache. It is for logits that are
made and thrown away in chunks; those that are there are put together where they are read.

Bytes for each (row, entry) and teacher of bfloat16, in memory: 2 read. In the cache, where the
chunk's mixture stays: 2 read, 4 written and, but for the first teacher, 4 read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._op import Number
from fastkd.kernels.device import congruent, on_device, rows_of
from fastkd.kernels.rows.reading import edges, vectors
from fastkd.kernels.rows.terms import LOWEST
from fastkd.kernels.tiles import LN2, LOG2E, at_boundary, head_of, log2_units, number, row_offset

_VECTORS = 512  # of 16 bytes of logits, that a program takes of a row at once


@triton.jit
def log_sum(a, b):
    """Return log(e^a + e^b), −∞ of two of them; compared so that a NaN stays a NaN."""
    higher, lower = tl.where(a > b, a, b), tl.where(a > b, b, a)
    above = tl.log2(1 + tl.exp2((lower - higher) * LOG2E)) * LN2
    return tl.where(higher == float("-inf"), higher, higher + above)


@triton.jit
def _fold(z, top, total, unit):
    """Add logits [R, K] to the pivots and sums [R] of R threads."""
    higher = tl.maximum(top, tl.max(z, 1))
    above = tl.exp2((z - higher[:, None]) * unit)
    return higher, total * tl.exp2((top - higher) * unit) + tl.sum(above, 1)


@triton.jit
def _add_tile(
    mixture_row, teacher_row, columns, inside, highest, log_total, log_share, unit,
    IS_FIRST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add the share of a tile of one row, whose log-sum-exp is known, to the mixture."""
    z = tl.load(teacher_row + columns, inside, float("-inf")).to(DTYPE)
    found = ((z - highest) * unit - log_total) * LN2 + log_share
    if not IS_FIRST:
        found = log_sum(tl.load(mixture_row + columns, inside, float("-inf")), found)
        tl.debug_barrier()  # because another warp may have read what a thread is about to write
    tl.store(mixture_row + columns, found, inside)


@triton.jit(do_not_specialize=["inner"])
def add_probabilities(
    mixture,  # Strided (n_rows, n_cols), logarithms, written
    teacher,  # Strided (n_rows, n_cols), logits
    log_shares_ptr,  # (n_rows,)
    share_stride,
    temperature,  # of the teacher
    n_cols,
    inner,  # size of the logits' last dimension but one
    IS_FIRST: tl.constexpr, DTYPE: tl.constexpr, ON_DEVICE: tl.constexpr, CONGRUENT: tl.constexpr,
    VECTORS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add a teacher's share of a row to the mixture: program (row)."""
    row = tl.program_id(0)
    unit = log2_units(number(temperature, ON_DEVICE, DTYPE), DTYPE)
    teacher_row = teacher.ptr + row_offset(row, inner, teacher)
    head = head_of(teacher_row, n_cols, WIDTH)
    teacher_row = at_boundary(teacher_row, head, True)
    mixture_row = at_boundary(mixture.ptr, row_offset(row, inner, mixture) + head, CONGRUENT)
    n_vectors = (n_cols - head) // WIDTH
    top, total = tl.full([VECTORS], LOWEST, DTYPE), tl.zeros([VECTORS], DTYPE)
    for start in range(0, n_vectors, VECTORS):
        inside = (start + tl.arange(0, VECTORS) < n_vectors)[:, None]
        columns = vectors(start, VECTORS, WIDTH)
        z = tl.load(teacher_row + columns, inside, float("-inf")).to(DTYPE)
        top, total = _fold(z, top, total, unit)
    at_edge, inside_edge = edges(head, n_cols, VECTORS, WIDTH)
    has_edges = n_cols % WIDTH + head > 0
    if has_edges:
        z = tl.load(teacher_row + at_edge, inside_edge, float("-inf")).to(DTYPE)
        top, total = _fold(z, top, total, unit)
    highest = tl.max(top, 0)
    log_total = tl.log2(tl.sum(total * tl.exp2((top - highest) * unit), 0))
    log_share = tl.load(log_shares_ptr + row.to(tl.int64) * share_stride).to(DTYPE)
    for start in range(0, n_vectors, VECTORS):
        inside = (start + tl.arange(0, VECTORS) < n_vectors)[:, None]
        _add_tile(
            mixture_row, teacher_row, vectors(start, VECTORS, WIDTH), inside, highest, log_total,
            log_share, unit, IS_FIRST, DTYPE,
        )  # fmt: skip
    if has_edges:
        _add_tile(
            mixture_row, teacher_row, at_edge, inside_edge, highest, log_total, log_share, unit,
            IS_FIRST, DTYPE,
        )  # fmt: skip


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
    if not len(logits):
        return
    with on_device(mixture):
        add_probabilities[(len(logits),)](
            rows_of(mixture),
            log_shares_ptr=log_shares,
            share_stride=log_shares.stride(0),
            temperature=temperature,
            IS_FIRST=is_first,
            ON_DEVICE=by_pointer,
            **_shared(mixture, logits),
        )


def _shared(found: Tensor, logits: Tensor) -> dict[str, Any]:
    """Return what all kernels take, by the names of their parameters."""
    n_rows, n_cols = logits.shape
    teacher, width = rows_of(logits), _width(logits)
    return dict(
        teacher=teacher,
        n_cols=n_cols,
        inner=n_rows,
        DTYPE=tl.float64 if found.dtype == torch.float64 else tl.float32,
        CONGRUENT=congruent(teacher, rows_of(found), width),
        # at least 2, because a row has two edges
        VECTORS=max(2, min(_VECTORS, triton.next_power_of_2(triton.cdiv(n_cols, width)))),
        WIDTH=width,
        num_warps=8,
    )


def _width(logits: Tensor) -> int:
    """Return the elements of a vector of 16 bytes."""
    return 16 // logits.element_size()
