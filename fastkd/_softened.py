"""Gradients to both networks and to their temperatures, by an engine that has the student's.

D(p, q) = D'(q, p) with another divergence D', in which the teacher is the student: its gradient is
solved like the student's. A temperature T, which divides the logits z, has the gradient
−Σ z · (∂D/∂z) / T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.problems.rows import Rows
from fastkd.problems.softened import Softened, mirror_of

_CHUNK = 1 << 22  # logits of a chunk

# rows.value_and_gradients of an engine
SolveRows = Callable[..., tuple[tuple[Tensor, Tensor | None], tuple[Tensor | None]]]


def n_statistics(problem: Softened) -> int:
    """Return how many numbers of each row the forward saves."""
    return 0


class Engine(NamedTuple):
    """The contract of an engine, for one that solves rows with a temperature for each."""

    solve_rows: SolveRows

    def forward(
        self, problem: Softened, needs_grad: Sequence[bool]
    ) -> tuple[tuple[Tensor], tuple[Tensor]]:
        """Return the losses of the rows, and statistics without a number."""
        (losses, _), _ = self.solve_rows(_rows(problem), (False,))
        return (losses,), (losses.new_empty((*losses.shape, 0)),)

    def backward(
        self,
        problem: Softened,
        statistics: Tensor,
        upstream: Sequence[Tensor | None],
        needs_grad: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of Σ upstream · loss, for which all is computed again."""
        (weights,) = upstream
        of_student, of_teacher = (
            self._of_one(rows, weights, *needs)
            for rows, needs in zip(
                (_rows(problem), _mirrored(problem)),
                ((needs_grad[0], needs_grad[2]), (needs_grad[1], needs_grad[3])),
                strict=True,
            )
        )
        gradients = of_student[0], of_teacher[0], of_student[1], of_teacher[1]
        fields = (
            problem.student, problem.teacher, problem.student_temperature,
            problem.teacher_temperature,
        )  # fmt: skip
        return tuple(
            None if gradient is None else gradient.to(field.dtype)
            for gradient, field in zip(gradients, fields, strict=True)
        )

    def _of_one(
        self, rows: Rows, weights: Tensor | None, for_logits: bool, for_temperature: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients for the logits and the temperatures of the first network."""
        if not (for_logits or for_temperature):
            return None, None
        _, (gradient,) = self.solve_rows(
            rows, (True,), row_weights=weights, is_wide=for_temperature
        )
        assert gradient is not None and isinstance(rows.student_temperature, Tensor)
        of_temperature = None
        if for_temperature:
            of_temperature = _sums_of_products(gradient, rows) / -rows.student_temperature
        return gradient if for_logits else None, of_temperature


def _sums_of_products(gradient: Tensor, rows: Rows) -> Tensor:
    """Return Σ z · ∂D/∂z of each row, 0 where it is masked, by chunks of rows."""
    z, n_cols, dtype = rows.student, rows.student.shape[-1], gradient.dtype
    z, gradient = z.reshape(-1, n_cols), gradient.reshape(-1, n_cols)
    size = max(1, _CHUNK // max(1, n_cols))
    sums = gradient.new_empty(len(z))
    for start in range(0, len(z), size):
        part = slice(start, start + size)
        # finite, because an excluded class has a gradient of 0
        above = z[part].to(dtype).clamp(min=torch.finfo(dtype).min)
        sums[part] = torch.linalg.vecdot(gradient[part], above)
    sums = sums.view(rows.student.shape[:-1])
    return sums if rows.row_mask is None else torch.where(rows.row_mask, sums, 0)


def _rows(problem: Softened) -> Rows:
    return Rows(
        problem.student, problem.teacher, None, problem.row_mask, problem.student_temperature,
        problem.teacher_temperature, problem.weight, 1.0, problem.divergence,
    )  # fmt: skip


def _mirrored(problem: Softened) -> Rows:
    """Return the rows in which the teacher is the student."""
    divergence, weight = mirror_of(problem.divergence, problem.weight)
    return Rows(
        problem.teacher, problem.student, None, problem.row_mask, problem.teacher_temperature,
        problem.student_temperature, weight, 1.0, divergence,
    )  # fmt: skip
