"""Solve `Corrected` on a GPU: rows whose label is set apart, and corrects the teacher.

Bytes for each (row, entry) of bf16 logits, forward + backward: 4 + 6, without a teacher 2 + 4. Rows
of V ≤ ON_CHIP columns take one sweep and one launch each; longer ones keep a few numbers of each
row between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastkd.kernels.corrected import sweeps
from fastkd.kernels.device import alignment, congruent, on_device, rows_of, written_like
from fastkd.kernels.rows import launch as of_rows
from fastkd.problems.corrected import Corrected
from fastkd.problems.rows import Rows

_OF_ROWS = ("apart_ptr", "numbers", "n_cols", "inner", "DIVERGENCE", "DTYPE", "ON_DEVICE")


def n_statistics(problem: Corrected) -> int:
    """Return how many numbers a row saves for `backward`: none if it fits on chip."""
    return sweeps.N_STATISTICS.value if of_rows.n_statistics(_as_rows(problem)) else 0


def forward(
    problem: Corrected, needs_grad: Sequence[bool]
) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    """Return rows of scale · KL, and (..., n_statistics(problem)) numbers for `backward`."""
    rows = _as_rows(problem)
    examples, dtype = problem.student.shape[:-1], of_rows._dtype(rows)
    losses = problem.student.new_empty(examples, dtype=dtype)
    statistics = losses.new_empty((*examples, n_statistics(problem)))
    if not losses.numel():
        pass
    elif statistics.numel():
        _launch_statistics(rows, losses, statistics)
    else:
        _launch_whole_rows(rows, losses, None, None)
    return (losses,), (statistics,)


def backward(problem: Corrected, statistics: Tensor, upstream: Sequence[Tensor | None]) -> Tensor:
    """Return Σ upstream · ∂losses with respect to the student, in the order of its strides."""
    rows, (given,) = _as_rows(problem), upstream

    def write(gradient: Tensor) -> None:
        if statistics.numel():
            _launch_gradient(rows, statistics, gradient, given)
        else:
            _launch_whole_rows(rows, None, gradient, given)

    return written_like(problem.student, write)


def _as_rows(problem: Corrected) -> Rows:
    """Return the rows with their labels set apart; without a teacher they have no divergence."""
    student, teacher = problem.student, problem.teacher
    return Rows(
        student, student if teacher is None else teacher, None, None, problem.student_temperature,
        problem.teacher_temperature, problem.correction, problem.scale,
        "" if teacher is None else "forward_kl", apart=problem.labels,
    )  # fmt: skip


def _launch_whole_rows(
    rows: Rows, losses: Tensor | None, gradient: Tensor | None, upstream: Tensor | None
) -> None:
    n_rows, n_cols = of_rows._shape(rows)
    block, columns, num_warps = of_rows._tile(rows)
    tensors = [rows.student, rows.teacher] if gradient is None else [*rows[:2], gradient]
    with on_device(rows.student):
        sweeps.corrected_rows[(triton.cdiv(n_rows, block),)](
            **_operands(rows, gradient, upstream),
            losses_ptr=losses,
            n_rows=n_rows,
            ALIGNMENT=alignment([rows_of(x) for x in tensors], n_cols),
            ROWS=block,
            COLUMNS=columns,
            num_warps=num_warps,
        )


def _launch_statistics(rows: Rows, losses: Tensor, statistics: Tensor) -> None:
    n_rows, _ = of_rows._shape(rows)
    splits, per_split, num_warps = of_rows._splits(rows)
    partial, width = None, of_rows._width(rows)
    if splits > 1:
        partial = statistics.new_empty((n_rows, splits, sweeps.N_STATISTICS.value))
    shared = _operands(rows, None, None)
    del shared["upstream_ptr"], shared["gradient_ptr"]
    shared |= dict(losses_ptr=losses, statistics_ptr=statistics, partial_ptr=partial)
    with on_device(rows.student):
        sweeps.corrected_sums[(n_rows, splits)](
            **shared,
            vectors_per_split=per_split,
            CONGRUENT=congruent(rows_of(rows.student), rows_of(rows.teacher), width),
            THREADS=32 * num_warps,
            WIDTH=width,
            num_warps=num_warps,
        )
        if splits > 1:
            sweeps.combine_corrected[(n_rows,)](
                **shared, n_splits=splits, SPLITS=triton.next_power_of_2(splits), num_warps=1
            )


def _launch_gradient(
    rows: Rows, statistics: Tensor, gradient: Tensor, upstream: Tensor | None
) -> None:
    n_rows, n_cols = of_rows._shape(rows)
    student, width = rows_of(rows.student), of_rows._width(rows)
    # numbers of float64 take two registers: a thread has 8 of them
    vectors = 1024 // width if statistics.dtype == torch.float64 else 512
    n_blocks = triton.cdiv(n_cols, vectors * width)
    with on_device(rows.student):
        sweeps.corrected_gradient[(n_rows * n_blocks,)](
            **_operands(rows, gradient, upstream),
            statistics_ptr=statistics.contiguous(),  # mapped upstreams have one of all, expanded
            n_blocks=n_blocks,
            CONGRUENT=congruent(student, rows_of(rows.teacher), width),
            GRADIENT_CONGRUENT=congruent(student, rows_of(gradient), width),
            VECTORS=vectors,
            WIDTH=width,
            num_warps=4,
        )


def _operands(rows: Rows, gradient: Tensor | None, upstream: Tensor | None) -> dict[str, Any]:
    """Return what the kernels take, by the names of their parameters."""
    written = None if gradient is None else rows_of(gradient)
    operands = of_rows._operands(
        rows_of(rows.student), rows_of(rows.teacher), written, (upstream, None)
    )
    del operands["ce_upstream_ptr"]
    arguments = of_rows._arguments(rows)
    return operands | {name: arguments[name] for name in _OF_ROWS}
