"""Solve `Ensemble` on a GPU: a chunk's teachers are put together, and it is solved as `Rows`.

A chunk of rows fits into the cache, so that what `teachers.py` writes for it, in float32, does not
go through memory where it is read again. Beside the bytes that are counted there, a chunk takes
those of `Rows`, but for the teacher's, and in bfloat16 a gradient is copied to its place: 2 bytes
read from the cache. A "sum" takes the bytes of `Rows` for each teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels.device import device_of
from fastkd.kernels.ensembles import teachers
from fastkd.kernels.rows import launch as of_rows
from fastkd.problems.ensembles import Ensemble, weights_of_rows
from fastkd.problems.ensembles import compute_dtype_of as compute_dtype_of
from fastkd.problems.rows import Rows

_CHUNK = 32 << 20  # bytes of a chunk's teacher, which the cache of a large GPU holds


def n_statistics(problem: Ensemble) -> int:
    """Return how many numbers of each row `forward` saves: none."""
    return 0


def forward(problem: Ensemble, needs_grad: Sequence[bool]) -> tuple[tuple[Tensor], tuple[Any, ...]]:
    """Return rows of scale · D and, if it is foreseen, the gradient for the row weight."""
    student, dtype = problem.student, compute_dtype_of(problem)
    statistics = student.new_empty((*student.shape[:-1], 0), dtype=dtype)
    is_known = isinstance(problem.row_weight, Tensor) or problem.row_weight != 0
    # in half precision a gradient that another upstream gradient multiplies is rounded twice
    if needs_grad[0] and is_known and student.dtype == dtype and student.is_contiguous():
        gradient = torch.empty_like(student)
        factors = student.new_ones((), dtype=dtype) * problem.row_weight
        losses = _solve(problem, factors.expand(student.shape[:-1]), gradient)
        return (losses,), (statistics, gradient)
    return (_solve(problem, None, None),), (statistics,)


def backward(
    problem: Ensemble,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    foreseen: Tensor | None = None,
) -> Tensor:
    """Return Σ upstream · ∂losses with respect to the student, in `foreseen` if it is there."""
    (factors,) = upstream
    assert factors is not None
    if foreseen is not None:
        factor = (factors.to(foreseen.dtype) / problem.row_weight).unsqueeze(-1)
        return foreseen.mul_(factor).masked_fill_(factor == 0, 0)
    gradient = torch.empty_like(problem.student)
    if problem.row_mask is not None:
        factors = torch.where(problem.row_mask, factors, 0)
    _solve(problem, factors, gradient)
    return gradient


def _solve(problem: Ensemble, factors: Tensor | None, gradient: Tensor | None) -> Tensor:
    """Return the losses (...), and write factor · ∂loss of each row to the gradient, if any."""
    student, dtype = problem.student, compute_dtype_of(problem)
    losses = student.new_empty(student.shape[:-1], dtype=dtype)
    if not student.numel():
        return losses.zero_()
    column, weights = losses.view(-1), weights_of_rows(problem)
    index, mask, of_rows_given = (
        None if x is None else x.reshape(-1).contiguous()
        for x in (problem.teacher_index, problem.row_mask, factors)
    )
    out, n = gradient, len(problem.teachers)
    if gradient is not None and gradient.ndim > 3 and not gradient.is_contiguous():
        out = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    of_networks: list[Any] = [student, *problem.teachers]
    tensors = of_networks if out is None else [*of_networks, out]
    buffer: Tensor | None = None
    for rows, chunks in _chunks(tensors, dtype):
        z, z_teachers, of_chunk = chunks[0], chunks[1 : 1 + n], weights[rows]
        chunk_mask = None if mask is None else mask[rows]
        factor = None if of_rows_given is None else of_rows_given[rows].to(dtype)
        if problem.combine == "sum":
            found, slopes = _sum(problem, z, z_teachers, of_chunk, chunk_mask, factor, dtype)
        else:
            if buffer is None:
                buffer = student.new_empty(z.shape, dtype=dtype)
            teacher = _together(
                problem, z_teachers, of_chunk, None if index is None else index[rows],
                buffer[: len(z)],
            )  # fmt: skip
            temperature = 1.0 if problem.combine == "mixture" else problem.teacher_temperature
            found, slopes = _rows(problem, z, teacher, temperature, chunk_mask, factor)
        column[rows] = found
        if slopes is not None:
            chunks[-1].copy_(slopes)
    if gradient is not None and out is not None and out is not gradient:
        gradient.copy_(out)
    return losses


def _together(
    problem: Ensemble,
    z_teachers: Sequence[Tensor],
    weights: Tensor,
    index: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Return log p̄, the weighted logits or the chosen ones of a chunk's teachers."""
    log_weights = weights.log() if problem.combine == "mixture" else weights
    for k, z in enumerate(z_teachers):
        if index is not None:
            teachers.choose(out, z, index, k, len(z_teachers))
        elif problem.combine == "mixture":
            T = problem.teacher_temperature
            teachers.mix(out, z, T, log_weights[:, k : k + 1], k == 0)
        else:
            teachers.add(out, z, weights[:, k : k + 1], k == 0)
    return out


def _rows(
    problem: Ensemble,
    z: Tensor,
    teacher: Tensor,
    teacher_temperature: Any,
    mask: Tensor | None,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    rows = Rows(
        z, teacher, None, mask, problem.student_temperature, teacher_temperature, problem.weight,
        problem.scale, problem.divergence,
    )  # fmt: skip
    (losses, _), (slopes,) = of_rows.value_and_gradients(
        rows, (factor is not None,), row_weights=factor
    )
    return losses, slopes


def _sum(
    problem: Ensemble,
    z: Tensor,
    z_teachers: Sequence[Tensor],
    weights: Tensor,
    mask: Tensor | None,
    factor: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Return Σ w D and its gradient, whose terms are added in the compute dtype."""
    losses, slopes, z = z.new_zeros(len(z), dtype=dtype), None, z.to(dtype)
    for k, teacher in enumerate(z_teachers):
        weight = weights[:, k]
        own, of_own = _rows(
            problem, z, teacher, problem.teacher_temperature, mask,
            None if factor is None else factor * weight,
        )  # fmt: skip
        losses += torch.where(weight == 0, 0, own * weight)
        if of_own is not None:
            slopes = of_own if slopes is None else slopes.add_(of_own)
    return losses, slopes


def _chunks(
    tensors: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[tuple[slice, Sequence[Tensor]]]:
    """Yield numbers of rows and the rows [R, V] of all tensors.

    Shifted logits, [B, S, V] cut to [:, :-1], do not flatten to rows: their blocks are taken one
    after the other, so that they need no copy.
    """
    student = tensors[0]
    n_cols, inner = student.shape[-1], student.shape[-2] if student.ndim > 1 else 1
    blocks = [x.reshape(-1, inner, n_cols) for x in tensors]
    if all(x.is_contiguous() for x in blocks):
        blocks = [x.reshape(1, -1, n_cols) for x in blocks]
    n_blocks, inner, _ = blocks[0].shape
    # a row is a program, and at least a wave of them shall run; chunks of a multiple of 8 rows
    # start at a boundary of 16 bytes, whatever the length of a row
    size = max(device_of(student).multiprocessors, _CHUNK // (n_cols * dtype.itemsize))
    size = -(-size // 8) * 8
    for i in range(n_blocks):
        for start in range(0, inner, size):
            end = min(start + size, inner)
            rows = slice(i * inner + start, i * inner + end)
            yield rows, [x[i, start:end] for x in blocks]
