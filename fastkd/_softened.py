"""A problem whose teacher or temperatures are trained too, as the rows that it consists of."""

from __future__ import annotations

from fastkd.problems.rows import Rows
from fastkd.problems.softened import Softened


def rows_of_problem(problem: Softened) -> Rows:
    """Return the rows, of which the student alone is trained."""
    return Rows(
        problem.student, problem.teacher, None, problem.row_mask, problem.student_temperature,
        problem.teacher_temperature, problem.weight, 1.0, problem.divergence,
    )  # fmt: skip
