"""Solve `Linear` on a GPU: cuBLAS makes the logits of a chunk, the kernels of `Rows` take them.

Bytes for each (row, entry) of a chunk, in float32: 4 written and 4 read for each of both networks,
4 written as dz and read twice. Nothing of that outlives its chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastkd import _heads
from fastkd.kernels.rows import launch as rows
from fastkd.problems.linear import Linear, compute_dtype_of  # noqa: F401
from fastkd.problems.linear import width_of_report as n_statistics  # noqa: F401
from fastkd.problems.rows import Rows

Gradients = tuple[Tensor | None, ...]


def value_and_gradients(
    problem: Linear, needs_grad: Sequence[bool]
) -> tuple[tuple[Tensor, Tensor], Gradients]:
    """Return Σ weight · loss and the report, and the gradients of that sum."""
    return _heads.value_and_gradients(problem, needs_grad, _solve_rows)


def forward(problem: Linear, needs_grad: Sequence[bool]) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """Return the loss of each row without its weight, and the report."""
    losses, report = _heads.losses_of_rows(problem, _solve_rows)
    return (losses,), (report,)


def backward(
    problem: Linear,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
) -> Gradients:
    """Return the gradients of Σ upstream · loss, for which all is computed again."""
    (of_losses,) = upstream
    assert of_losses is not None
    return _heads.gradients_of_rows(problem, of_losses, needs_grad, _solve_rows)


def _solve_rows(
    problem: Rows, needs_grad: Sequence[bool], *, row_weights: Tensor | None, **options: Any
) -> Any:
    """Return what `rows.value_and_gradients` does, for cross-entropy alone too."""
    if problem.divergence:
        return rows.value_and_gradients(problem, needs_grad, row_weights=row_weights, **options)
    # the student against itself, read from the cache, has a divergence of 0
    itself = problem._replace(divergence="forward_kl", scale=0.0)
    nothing = problem.student.new_zeros(()).expand(problem.student.shape[:-1])
    return rows.value_and_gradients(itself, needs_grad, row_weights=nothing, **options)
