"""Losses of rows that set the class of the label apart: their checks, and their statements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._loss import Call
from fastkd._op import Number
from fastkd._precision import compute_dtype
from fastkd._reduction import Term
from fastkd.problems import _temperatures, rows
from fastkd.problems.rows import Rows, is_exactly


def check(
    student: Tensor, teacher: Tensor, labels: Tensor, *, ignore_index: int, **options: Any
) -> None:
    """Raise an error for logits and labels that do not fit together and options out of range."""
    softening = {"standardize": options.pop("standardize", False)}
    softening |= {name: options.pop(name) for name in ("temperature", "scale_t2")}
    _option_checks.at_least_0(**options)
    rows.check(student, teacher, **softening)
    _checks.labels(labels, student, ignore_index)


def check_alone(
    student: Tensor,
    labels: Tensor,
    weak: Tensor | None,
    *,
    ranking: str,
    label_smoothing: Number,
    ignore_index: int,
    **weights: Number,
) -> None:
    """Raise an error for logits and labels that do not fit together and options out of range."""
    _checks.logits(student, student.detach() if isinstance(student, Tensor) else student)
    if weak is not None:
        _checks.logits(student, weak, teacher_name="weak_logits", teacher_is_constant=False)
    _option_checks.one_of(("probabilities", "log_probabilities"), ranking=ranking)
    _option_checks.fraction(label_smoothing=label_smoothing)
    _option_checks.at_least_0(**weights)
    _checks.labels(labels, student, ignore_index)


def decoupled_kd(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: Number,
    beta: Number,
    temperature: Number,
    scale_t2: bool,
    standardize: bool,
    ignore_index: int,
) -> Any:
    """Solve for α · KL of the label's class and all others + β · KL among the others."""
    if (
        _temperatures.is_trained_besides(temperature) or student.shape[-1] == 1
    ):  # which has no others
        return NotImplemented
    labels, mask, labelled = rows.counted(call, labels, ignore_index)
    total = alpha + beta
    share = alpha / (1 if is_exactly(total, 0) else _not_0(total))
    # known where it can be, because a share of 0 counts for nothing, even if its term is infinite
    share = 0.0 if is_exactly(alpha, 0) else 1.0 if is_exactly(beta, 0) else share
    temperature = _temperatures.widened(temperature)
    t2 = temperature**2 if scale_t2 else 1.0
    problem = Rows(
        student, teacher, None, mask, temperature, temperature, share, t2 * total, "decoupled_kl",
        rows.weight_of_counted(call, student, mask), labels, standardize,
    )  # fmt: skip
    losses, _ = rows.solve(call.engine, problem)
    return [Term(0.0 if is_exactly(total, 0) else 1.0, losses, labelled)]


def nkd(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    gamma: Number,
    temperature: Number,
    scale_t2: bool,
    ignore_index: int,
) -> Any:
    """Solve for −p log q of the label's class and for the cross-entropy among the others."""
    if (
        _temperatures.is_trained_besides(temperature) or student.shape[-1] == 1
    ):  # which has no others
        return NotImplemented
    labels, mask, labelled = rows.counted(call, labels, ignore_index)
    temperature = _temperatures.widened(temperature)
    scale = temperature**2 if scale_t2 else 1.0
    weight = rows.weight_of_sum(call, student, teacher, mask)
    if weight and not is_exactly(gamma, 0):  # which wins over an infinite term
        problem = Rows(
            student, teacher, labels, mask, temperature, temperature, 0.0, scale,
            "normalized_soft_cross_entropy", weight, labels, adds_cross_entropy=True, share=gamma,
        )  # fmt: skip
        losses, _ = rows.solve(call.engine, problem)
        return [Term(1.0, losses, labelled)]
    problem = Rows(
        student, teacher, labels, mask, temperature, temperature, 0.0, scale,
        "soft_cross_entropy", 0.0, labels,
    )  # fmt: skip
    losses, cross_entropies = rows.solve(call.engine, problem)
    of_teacher = rows.label_cross_entropies(call, teacher.detach(), labels, beside=student)
    p = of_teacher.neg().exp()
    target = p * torch.where(p == 0, 0, cross_entropies)
    return [Term(1.0, target, labelled), Term(gamma, losses, labelled)]


def uskd(
    call: Call,
    student: Tensor,
    labels: Tensor,
    weak: Tensor | None,
    *,
    alpha: Number,
    beta: Number,
    mu: Number,
    label_smoothing: Number,
    ranking: str,
    ignore_index: int,
) -> Any:
    """Solve for the cross-entropies with the label, and with ranks as a teacher's logits."""
    if student.shape[-1] == 1:  # which has no others
        return NotImplemented
    labels, mask, labelled = rows.counted(call, labels, ignore_index)
    with torch.no_grad():
        teacher = zipf_logits(student, weak, labels.clamp(min=0), ranking)
    problem = Rows(
        student, teacher, labels, mask, 1.0, 1.0, 0.0, 1.0, "soft_cross_entropy", 0.0, labels
    )  # fmt: skip
    losses, cross_entropies = rows.solve(call.engine, problem)
    target = soft_target(cross_entropies.detach(), mask) * cross_entropies
    terms = [Term(alpha, target, labelled), Term(beta, losses, labelled)]
    if weak is None:
        return [*terms, Term(0.0, torch.zeros_like(target), labelled)]
    of_weak = rows.label_cross_entropies(call, weak, labels, label_smoothing, beside=student)
    return [*terms, Term(mu, of_weak, labelled)]


def soft_target(cross_entropies: Tensor, mask: Tensor | None) -> Tensor:
    """Return 1 + q_y² less the mean of q_y² over the rows that count."""
    squares = (-2 * cross_entropies).exp()
    if mask is None:
        return 1 + (squares - squares.mean())
    squares = torch.where(mask, squares, 0)
    return 1 + (squares - squares.sum() / mask.sum().clamp(min=1))


def zipf_logits(student: Tensor, weak: Tensor | None, classes: Tensor, ranking: str) -> Tensor:
    """Return −log rank of every class, whose softmax is Zipf's law; −∞ for what is excluded.

    The classes are ranked by what both networks say of them, those that are equal by their order.
    """
    student = student.to(compute_dtype(student, student if weak is None else weak))
    excluded, scores = student == -torch.inf, student
    if weak is not None:
        of_weak = log_odds(weak.to(student.dtype), classes)
        if ranking == "log_probabilities":
            log_q = student.log_softmax(-1)
            of_label = log_q.gather(-1, classes.unsqueeze(-1))
            scores = log_q / (1 - of_label) + of_weak.exp()
        else:  # sums are compared by their logarithms, because small ones would all be 0
            scores = torch.logaddexp(log_odds(student, classes), of_weak)
        scores = scores.masked_fill(excluded, -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(1, student.shape[-1] + 1, device=student.device, dtype=student.dtype)
    logits = torch.empty_like(student).scatter(-1, order, ranks.log().neg().expand_as(student))
    return logits.masked_fill(excluded, -torch.inf)


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """Return log(probability of each class / probability of all classes but this one)."""
    others = logits.scatter(-1, classes.unsqueeze(-1), -torch.inf)
    return logits - others.logsumexp(-1, keepdim=True)


def _not_0(total: Number) -> Number:
    """Return the number, with 1 in place of the 0 of a tensor, at which nobody looks."""
    return torch.where(total == 0, 1, total) if isinstance(total, Tensor) else total
