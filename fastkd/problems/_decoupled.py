"""Losses of rows that set the class of the label apart: their checks, and their statements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._loss import Call
from fastkd._op import Number
from fastkd._reduction import Term
from fastkd.problems import rows
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
    if rows.is_trained_besides(temperature) or student.shape[-1] == 1:  # which has no others
        return NotImplemented
    labels, mask, labelled = rows.counted(call, labels, ignore_index)
    total = alpha + beta
    share = 0.0 if is_exactly(total, 0) else alpha / _not_0(total)
    temperature = rows.widened(temperature)
    t2 = temperature**2 if scale_t2 else 1.0
    problem = Rows(
        student, teacher, None, mask, temperature, temperature, share, t2 * total, "decoupled_kl",
        call.row_weight if labelled is None else 0.0, labels, standardize,
    )  # fmt: skip
    losses, _ = rows.solve(call.engine, problem)
    return [Term(1.0, losses, labelled)]


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
    if rows.is_trained_besides(temperature) or student.shape[-1] == 1:  # which has no others
        return NotImplemented
    labels, mask, labelled = rows.counted(call, labels, ignore_index)
    temperature = rows.widened(temperature)
    problem = Rows(
        student, teacher, labels, mask, temperature, temperature, 0.0,
        temperature**2 if scale_t2 else 1.0, "soft_cross_entropy", 0.0, labels,
    )  # fmt: skip
    losses, cross_entropies = rows.solve(call.engine, problem)
    p = rows.label_cross_entropies(call, teacher.detach(), labels).neg().exp()
    target = p * torch.where(p == 0, 0, cross_entropies)
    return [Term(1.0, target, labelled), Term(gamma, losses, labelled)]


def _not_0(total: Number) -> Number:
    """Return the number, with 1 in place of the 0 of a tensor, at which nobody looks."""
    return torch.where(total == 0, 1, total) if isinstance(total, Tensor) else total
