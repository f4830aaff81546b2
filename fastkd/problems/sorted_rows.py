"""Sorted rows against sorted rows: probabilities of two vocabularies, whichever entry has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from fastkd._op import Number, Op
from fastkd.problems._temperatures import of_both
from fastkd.problems.rows import as_logits

if TYPE_CHECKING:
    from fastkd._loss import Call


class SortedRows(NamedTuple):
    """The distance Σ |sort(q) − sort(p)| of each row, where the shorter one is padded with zeros.

    p = softmax(teacher / teacher_temperature) and q = softmax(student / student_temperature).
    """

    student: Tensor  # (..., V)
    teacher: Tensor  # (..., V')
    row_mask: Tensor | None  # (...), bool: rows that count
    student_temperature: Number
    teacher_temperature: Number
    row_weight: Number = 0.0  # as in `Rows`


solve = Op(SortedRows, trained=("student",), per_example=True, recomputes=True)


def uld(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Number,
    student_temperature: Number | None,
    teacher_temperature: Number | None,
    teacher_form: str,
) -> Tensor:
    """Solve for the distances of sorted probabilities."""
    of_student, of_teacher = of_both(temperature, student_temperature, teacher_temperature)
    teacher = as_logits(teacher, teacher_form, student)
    problem = SortedRows(student, teacher, call.row_mask, of_student, of_teacher, call.row_weight)
    return solve(call.engine, problem)
