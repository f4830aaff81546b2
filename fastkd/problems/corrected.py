"""Rows whose label corrects what the teacher says: the teacher of a row has one class changed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._loss import Call
from fastkd._op import Number, Op
from fastkd._precision import compute_dtype
from fastkd._reduction import Term
from fastkd.problems import rows


class Corrected(NamedTuple):
    """The forward KL of each row from a teacher that gives its label another probability.

    With p = softmax(teacher / teacher_temperature) the corrected teacher gives the label t and
    every other class p (1 − t) / (1 − p_label). The loss of a row is scale · KL(corrected ‖ q) with
    q = softmax(student / student_temperature).

    With a teacher, t is what makes the label win by `correction`: see `fastkd.mft`. Without one p
    is uniform and `correction` is log(t / (1 − t)), of which both t and 1 − t have all digits; that
    of ∞ leaves the cross-entropy with the label.
    """

    student: Tensor  # (..., V)
    teacher: Tensor | None  # (..., V)
    labels: Tensor  # (...), class numbers; a row with a negative one does not count
    student_temperature: Number
    teacher_temperature: Number
    correction: Number
    scale: Number
    row_weight: Number = 0.0  # as in `Rows`; where it is known, all rows have a label


solve = Op(Corrected, trained=("student",), per_example=True, recomputes=True, keeps_strides=True)


def check(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: Number,
    scale_t2: bool,
    ignore_index: int,
    **fraction: Number,
) -> None:
    """Raise an error for logits and labels that do not fit together and options out of range."""
    _checks.logits(student, teacher)
    _option_checks.temperature(temperature)
    if fraction:
        _option_checks.fraction(**fraction)
    _checks.labels(labels, student, ignore_index)


def check_virtual(
    student: Tensor,
    labels: Tensor,
    *,
    correct_probability: Number,
    temperature: Number,
    scale_t2: bool,
    ignore_index: int,
) -> None:
    """Raise an error for logits and labels that do not fit together and options out of range."""
    _checks.logits(student, student.detach() if isinstance(student, Tensor) else student)
    _option_checks.fraction(correct_probability=correct_probability)
    _option_checks.temperature(temperature)
    _checks.labels(labels, student, ignore_index)


def weight_of_soft_label(of_student: Tensor, of_teacher: Tensor) -> Tensor:
    """Return 1 − exp(−CE_s / CE_t) of rows, which is 0 where the student needs no help.

    It is 0 too where the teacher excludes the label, and 1 where the teacher alone is certain.
    """
    weight = -torch.expm1(-(of_student / of_teacher).abs())  # because one of 0 may be −0
    return torch.where((of_student == 0) | (of_teacher == math.inf), 0, weight)


def weighted(losses: Tensor, weight: Number) -> Tensor:
    """Return weight · losses, where a weight of 0 wins over an infinite loss."""
    if not isinstance(weight, Tensor):
        return losses * weight if weight else torch.zeros_like(losses)
    return torch.where(weight == 0, 0, weight * losses)


def softened(
    probability: Number, n_classes: int, temperature: Number, dtype: torch.dtype
) -> Number:
    """Return log(t / (1 − t)) for the t that softmax(log u / T) gives a class.

    u gives it this probability, and the other classes equal shares of the rest. Tensors are taken
    in this dtype.
    """
    if n_classes == 1:
        return math.inf
    probability, temperature = (
        x.to(dtype) if isinstance(x, Tensor) else x for x in (probability, temperature)
    )
    log_others = math.log(n_classes - 1)
    return (_log_odds(probability) + log_others) / temperature - log_others


def _log_odds(probability: Number) -> Number:
    if isinstance(probability, Tensor):
        return torch.logit(probability)
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def soft_labels(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: Number,
    scale_t2: bool,
    ignore_index: int,
) -> list[Term]:
    """Solve for the cross-entropy with soft labels and those with labels, which weigh it.

    The kernels know no such weight, so that there the teacher's is a pass of its own.
    """
    labels, counted, labelled = rows.counted(call, labels, ignore_index)
    scale = temperature * temperature if scale_t2 else 1.0
    in_one_pass = call.engine == "portable"
    problem = rows.Rows(
        student, teacher, labels, counted, temperature, temperature, 0.0, scale,
        "weighted_soft_cross_entropy" if in_one_pass else "soft_cross_entropy",
        rows.weight_of_counted(call, student, counted),
    )  # fmt: skip
    losses, of_student = rows.solve(call.engine, problem)
    if in_one_pass:
        return [Term(1.0, losses, labelled)]
    of_teacher = rows.label_cross_entropies(call, teacher.detach(), labels, beside=student)
    weight = weight_of_soft_label(of_student.detach(), of_teacher)
    return [Term(1.0, weighted(losses, weight), labelled)]


def winning_labels(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    threshold: Number,
    temperature: Number,
    scale_t2: bool,
    ignore_index: int,
) -> list[Term]:
    """Solve for the divergence from a teacher to whom the label wins by the threshold."""
    labels, _, labelled = rows.counted(call, labels, ignore_index)
    scale = temperature * temperature if scale_t2 else 1.0
    problem = Corrected(
        student, teacher, labels, temperature, temperature, threshold, scale,
        call.row_weight if labelled is None and call.row_mask is None else 0.0,
    )  # fmt: skip
    return [Term(1.0, solve(call.engine, problem), labelled)]


def virtual_teacher(
    call: Call,
    student: Tensor,
    labels: Tensor,
    *,
    correct_probability: Number,
    temperature: Number,
    scale_t2: bool,
    ignore_index: int,
) -> list[Term]:
    """Solve for the divergence from a teacher that knows the label and no other class."""
    labels, _, labelled = rows.counted(call, labels, ignore_index)
    scale = temperature * temperature if scale_t2 else 1.0
    dtype = compute_dtype(student)
    log_odds = softened(correct_probability, student.shape[-1], temperature, dtype)
    problem = Corrected(
        student, None, labels, temperature, 1.0, log_odds, scale,
        call.row_weight if labelled is None and call.row_mask is None else 0.0,
    )  # fmt: skip
    return [Term(1.0, solve(call.engine, problem), labelled)]
