"""Products of a batch with itself: which examples are alike, and how predictions vary over them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._op import Number, Op
from fastkd._precision import compute_dtype

if TYPE_CHECKING:
    from fastkd._loss import Call

# as published
PKT_EPSILON = 1e-7  # added to lengths and to probabilities
PEARSON_EPSILON = 1e-8  # the default of dist_kd


class Gram(NamedTuple):
    """A comparison of the Gram matrices of two networks, or of the moments of their predictions.

    A loss of Gram matrices sees the features only through F Fᵀ, [N, N]; `dist_kd` sees logits
    through the correlations of the rows and of the columns of softmax(logits / temperature).
    """

    student: Tensor  # [N, D], or logits [N, V]
    teacher: Tensor  # [N, D'], or [N, V]
    beta: Number  # the weight of the rows in dist_kd
    gamma: Number  # the weight of the columns there; the width of the kernel of "kernel"
    temperature: Number
    epsilon: Number  # added to the product of two deviations in dist_kd
    name: str  # "similarity_preserving", "pkt", "sequential", "kernel" or "dist_kd"
    order: int  # of the series of "kernel"


solve = Op(Gram, trained=("student",))


def check_congruence(
    student: Tensor, teacher: Tensor, *, form: str, gamma: Number, order: int
) -> None:
    """Refuse features that do not fit together or do not fit the form, and options out of range."""
    _checks.embeddings(student, teacher)
    _option_checks.one_of(("sequential", "kernel"), form=form)
    _option_checks.at_least_0(gamma=gamma)
    _option_checks.at_least_1(order=order)
    if form == "sequential" and student[0:0].flatten(1).shape != teacher[0:0].flatten(1).shape:
        raise ValueError(
            f'form="sequential" subtracts features: student and teacher need one width, got '
            f"{[*student.shape]} and {[*teacher.shape]}; project the student to the teacher's "
            f'width, or take form="kernel"'
        )


def check_predictions(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: Number,
    gamma: Number,
    temperature: Number,
    epsilon: Number,
) -> None:
    """Refuse logits that do not fit together, and options out of range."""
    _checks.logits(student_logits, teacher_logits)
    _option_checks.at_least_0(beta=beta, gamma=gamma)
    _option_checks.temperature(temperature)
    _option_checks.temperature(epsilon, "epsilon")


def similarities(call: Call, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss of the Gram matrices of features, which has the name of the call."""
    features = student.flatten(1), teacher.flatten(1)
    return _solved(call, Gram(*features, 0.0, 0.0, 1.0, 0.0, call.name, 0))


def congruence(
    call: Call, student: Tensor, teacher: Tensor, *, form: str, gamma: Number, order: int
) -> Tensor:
    """Return the loss of neighbours in the batch, or of the kernel of all pairs."""
    features = student.flatten(1), teacher.flatten(1)
    return _solved(call, Gram(*features, 0.0, gamma, 1.0, 0.0, form, order))


def predictions(
    call: Call,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: Number,
    gamma: Number,
    temperature: Number,
    epsilon: Number,
) -> Tensor:
    """Return the loss of the correlations of rows and of columns of probabilities."""
    student, teacher = (z.reshape(-1, z.shape[-1]) for z in (student_logits, teacher_logits))
    return _solved(call, Gram(student, teacher, beta, gamma, temperature, epsilon, call.name, 0))


def falloff(gamma: Number) -> Number:
    """Return e^(−2γ); that of a tensor without a host sync."""
    return (-2 * gamma).exp() if isinstance(gamma, Tensor) else math.exp(-2 * gamma)


def _solved(call: Call, problem: Gram) -> Tensor:
    """Return the loss, which is 0 for an empty batch."""
    if not problem.student.numel():
        return problem.student.sum(dtype=compute_dtype(problem.student, problem.teacher))
    return solve(call.engine, problem)
