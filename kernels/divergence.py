"""Divergences between softmax rows on a GPU.

Every D = Σ d(log p, log q) has ∂D/∂student = (h − q Σ h) / T with h = ∂d/∂log q, known up to a
multiple of q. All is in log2 units: x = z·log2(e)/T, p = exp2(x − pivot) / Z, the pivot a row's
maximum. Pivot and Z are kept apart: one number for both would lose what a large pivot rounds away.

Bytes for each (row, entry) of bf16 logits, forward + backward. V ≤ ON_CHIP: 4 + 6, each one sweep
and one launch. Above: the KLs 4 + 6; mixtures and total variation, which need both Z before they
can sum, 8 + 6. `value_and_gradient` moves as much, or 6 in its one sweep where V ≤ ON_CHIP (half
of it for a mixture with labels).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._engine import compute_dtype
from fastkd.divergence import Number, Problem
from fastkd.kernels import _divergence_sweeps as sweeps
from fastkd.kernels._launch import (
    Rows,
    alignment,
    congruent,
    device_of,
    on_device,
    rows_of,
)

ON_CHIP = 8192  # the longest rows that are read once for every divergence
_MIXTURES = ("jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation")
_NUMBERS = ("student_temperature", "teacher_temperature", "weight", "scale")
_SHORTEST_SPLIT = 8192  # columns that pay for a program of their own


def allocate(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What `forward` returns, empty: rows that fit on chip keep no statistics for `backward`."""
    problem = Problem(*arguments)
    return problem.allocate(sweeps.N_STATISTICS.value if problem.student.shape[-1] > ON_CHIP else 0)


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(*Problem) -> rows of divergence · scale, rows of cross-entropy at T = 1, statistics."""
    problem = Problem(*arguments)
    losses, cross_entropies, statistics = allocate(*arguments)
    if not losses.numel():
        pass
    elif problem.student.shape[-1] <= ON_CHIP:
        _launch_whole_rows(problem, losses, cross_entropies)
    else:
        _launch_statistics(problem, losses, cross_entropies, statistics)
    return losses, cross_entropies, statistics


def backward(
    upstream: Tensor | None, ce_upstream: Tensor | None, statistics: Tensor, *arguments: Any
) -> Tensor:
    """Σ upstream · ∂losses + Σ ce_upstream · ∂cross_entropies with respect to the student."""
    problem = Problem(*arguments)
    gradient = torch.empty_like(problem.student, memory_format=torch.contiguous_format)
    if not gradient.numel():
        pass
    elif problem.student.shape[-1] <= ON_CHIP:
        _launch_whole_rows(problem, None, None, gradient, upstream, ce_upstream)
    else:
        _launch_gradient(problem, statistics, gradient, upstream, ce_upstream)
    return gradient


def value_and_gradient(
    *arguments: Any,
    row_weights: Tensor,
    ce_weights: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, cross-entropies and the gradient of Σ row_weights·losses + Σ ce_weights·them.

    For a caller that knows the weights beforehand, on chunks of logits that are thrown away
    afterwards: `in_place` writes the gradient over the student, which must be contiguous.
    """
    problem = Problem(*arguments)
    student = problem.student
    gradient = (
        student if in_place else torch.empty_like(student, memory_format=torch.contiguous_format)
    )
    # all of it at once takes more registers than either half
    crowded = problem.labels is not None and problem.divergence in _MIXTURES
    on_chip = student.shape[-1] <= (ON_CHIP // 2 if crowded else ON_CHIP)
    losses, cross_entropies, statistics = problem.allocate(
        0 if on_chip else sweeps.N_STATISTICS.value
    )
    if not losses.numel():
        pass
    elif on_chip:
        _launch_whole_rows(problem, losses, cross_entropies, gradient, row_weights, ce_weights)
    else:
        _launch_statistics(problem, losses, cross_entropies, statistics)
        _launch_gradient(problem, statistics, gradient, row_weights, ce_weights)
    return losses, cross_entropies, gradient


def _launch_whole_rows(
    problem: Problem,
    losses: Tensor | None,
    cross_entropies: Tensor | None,
    gradient: Tensor | None = None,
    upstream: Tensor | None = None,
    ce_upstream: Tensor | None = None,
) -> None:
    n_rows, n_cols = problem.n_rows, problem.student.shape[-1]
    rows = [rows_of(problem.student), rows_of(problem.teacher)]
    columns = triton.next_power_of_2(n_cols)
    # as many rows as fill a program, as few as give every multiprocessor two programs
    device = device_of(problem.student)
    most_warps = 32 if device.nvidia else 16  # 1024 threads: AMD's warps have 64
    sharing = triton.cdiv(n_rows, 2 * device.multiprocessors)
    block = max(1, min(4096 // columns, triton.next_power_of_2(sharing)))
    with on_device(problem.student):
        sweeps.whole_rows[(triton.cdiv(n_rows, block),)](
            **_problem_arguments(problem, *rows),
            **_gradient_arguments(gradient, upstream, ce_upstream),
            losses_ptr=losses,
            cross_entropies_ptr=cross_entropies,
            n_rows=n_rows,
            IS_MIXTURE=problem.divergence in _MIXTURES,
            ALIGNMENT=alignment(rows if gradient is None else [*rows, rows_of(gradient)], n_cols),
            ROWS=block,
            COLUMNS=columns,
            num_warps=max(1, min(most_warps, block * columns // 256)),
        )


def _launch_statistics(
    problem: Problem, losses: Tensor, cross_entropies: Tensor, statistics: Tensor
) -> None:
    n_rows, n_cols = problem.n_rows, problem.student.shape[-1]
    student, teacher = rows_of(problem.student), rows_of(problem.teacher)
    arguments = _problem_arguments(problem, student, teacher)
    is_mixture = problem.divergence in _MIXTURES
    width = _width(problem)
    multiprocessors = device_of(problem.student).multiprocessors
    num_warps = 8 if n_rows >= 2 * multiprocessors else 16
    threads = 32 * num_warps
    # fewer rows than multiprocessors: several programs share a row
    splits = 1
    if n_rows < multiprocessors:
        most = triton.cdiv(n_cols, _SHORTEST_SPLIT)
        splits = min(triton.cdiv(2 * multiprocessors, n_rows), most)
    per_split = triton.cdiv(triton.cdiv(n_cols // width, splits), threads) * threads
    splits = triton.cdiv(n_cols // width, per_split)
    partial = (
        statistics.new_empty((n_rows, splits, sweeps.N_STATISTICS.value)) if splits > 1 else None
    )
    outputs = dict(
        losses_ptr=losses, cross_entropies_ptr=cross_entropies, statistics_ptr=statistics
    )
    with on_device(problem.student):
        for sweep in (0,) if splits == 1 else (1, 2) if is_mixture else (1,):
            sweeps.row_statistics[(n_rows, splits)](
                **arguments,
                **outputs,
                partial_ptr=partial,
                vectors_per_split=per_split,
                IS_MIXTURE=is_mixture,
                SWEEP=sweep,
                CONGRUENT=congruent(student, teacher, width),
                THREADS=threads,
                WIDTH=width,
                num_warps=num_warps,
            )
            if sweep:
                shared = {
                    name: arguments[name] for name in sweeps.combine.arg_names if name in arguments
                }
                sweeps.combine[(n_rows,)](
                    **shared,
                    **outputs,
                    partial_ptr=partial,
                    n_splits=splits,
                    IS_MIXTURE=is_mixture,
                    SWEEP=sweep,
                    SPLITS=triton.next_power_of_2(splits),
                    num_warps=1,
                )


def _launch_gradient(
    problem: Problem,
    statistics: Tensor,
    gradient: Tensor,
    upstream: Tensor | None,
    ce_upstream: Tensor | None,
) -> None:
    student, teacher = rows_of(problem.student), rows_of(problem.teacher)
    width = _width(problem)
    vectors, num_warps = 512, 4
    n_blocks = triton.cdiv(problem.student.shape[-1], vectors * width)
    with on_device(problem.student):
        sweeps.gradient[(problem.n_rows * n_blocks,)](
            **_problem_arguments(problem, student, teacher),
            **_gradient_arguments(gradient, upstream, ce_upstream),
            statistics_ptr=statistics,
            n_blocks=n_blocks,
            CONGRUENT=congruent(student, teacher, width),
            GRADIENT_CONGRUENT=congruent(student, rows_of(gradient), width),
            VECTORS=vectors,
            WIDTH=width,
            num_warps=num_warps,
        )


def _width(problem: Problem) -> int:
    """Elements of a vector: 16 bytes of the narrower network."""
    return 16 // min(problem.student.element_size(), problem.teacher.element_size())


def _problem_arguments(problem: Problem, student: Rows, teacher: Rows) -> dict[str, Any]:
    """What every kernel takes, by the names of its parameters."""
    dtype = compute_dtype(problem.student, problem.teacher)
    numbers = dict(zip(_NUMBERS, problem[5:9], strict=True))
    # a Python float reaches a kernel as float32
    on_device = dtype == torch.float64 or any(isinstance(x, Tensor) for x in numbers.values())
    if on_device:
        numbers = {name: _on_device(x, problem.student.device) for name, x in numbers.items()}
    else:
        numbers = {name: float(x) for name, x in numbers.items()}
    return dict(
        student_ptr=student.tensor,
        teacher_ptr=teacher.tensor,
        labels_ptr=_flat(problem.labels),
        offset_ptr=None if problem.offset is None else problem.offset.contiguous(),
        keep_ptr=_flat(problem.keep),
        n_cols=problem.student.shape[-1],
        inner=problem.student.shape[-2] if problem.student.ndim > 1 else 1,
        student_outer=student.outer_stride,
        student_inner=student.inner_stride,
        teacher_outer=teacher.outer_stride,
        teacher_inner=teacher.inner_stride,
        **numbers,
        ON_DEVICE=on_device,
        DIVERGENCE=problem.divergence,
        DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
        FAST=dtype == torch.float32 and device_of(problem.student).nvidia,
    )


def _gradient_arguments(
    gradient: Tensor | None, upstream: Tensor | None, ce_upstream: Tensor | None
) -> dict[str, Any]:
    rows = Rows(None, 0, 0) if gradient is None else rows_of(gradient)
    upstream, ce_upstream = (None if x is None else x.reshape(-1) for x in (upstream, ce_upstream))
    return dict(
        gradient_ptr=rows.tensor,
        gradient_outer=rows.outer_stride,
        gradient_inner=rows.inner_stride,
        upstream_ptr=upstream,
        upstream_stride=0 if upstream is None else upstream.stride(0),
        ce_upstream_ptr=ce_upstream,
        ce_upstream_stride=0 if ce_upstream is None else ce_upstream.stride(0),
    )


def _flat(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows.reshape(-1).contiguous()


def _on_device(number: Number, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number
    return torch.full((), number, dtype=torch.float64, device=device)
