"""Logits of a batch on three levels: each example, all pairs of examples, all pairs of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._op import Number, Op
from fastkd._precision import compute_dtype

if TYPE_CHECKING:
    from fastkd._loss import Call


class Levels(NamedTuple):
    """A comparison of Q = softmax(student / T) with P of the teacher, summed over temperatures.

    For each T it is instance · T²/N Σ_i KL(P_i ‖ Q_i) + batch / N ‖QQᵀ − PPᵀ‖² +
    classes / V ‖QᵀQ − PᵀP‖², of Frobenius' norms.

    If `student` is only a part of the batch, an engine returns the loss of the whole batch and its
    gradient in these rows.
    """

    student: Tensor  # [n, V], the rows that get a gradient
    whole_student: Tensor | None  # [N, V], the student's whole batch if `student` is a part of it
    teacher: Tensor  # [N, V], the whole batch
    temperatures: Tensor  # (n,)
    instance: Number
    batch: Number
    classes: Number
    first: int  # the rank offset: the place of the first row of `student` in the batch

    @property
    def whole(self) -> Tensor:
        """Return the student's whole batch, [N, V]."""
        return self.student if self.whole_student is None else self.whole_student


solve = Op(Levels, trained=("student",))


def check(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperatures: Sequence[Number],
    instance_weight: Number,
    batch_weight: Number,
    class_weight: Number,
) -> None:
    """Refuse logits that do not fit together, and options out of range."""
    _checks.logits(student_logits, teacher_logits)
    if isinstance(temperatures, (Tensor, str)) or not isinstance(temperatures, Sequence):
        raise ValueError(
            f"temperatures must be a list or tuple of numbers, got {temperatures!r}: of one "
            f"temperature T pass (T,), of a tensor its .tolist()"
        )
    if not temperatures:
        raise ValueError("temperatures need at least one temperature, got none")
    for i, temperature in enumerate(temperatures):
        _option_checks.temperature(temperature, f"temperatures[{i}]")
    _option_checks.at_least_0(
        instance_weight=instance_weight, batch_weight=batch_weight, class_weight=class_weight
    )


def levels(
    call: Call,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperatures: Sequence[Number],
    instance_weight: Number,
    batch_weight: Number,
    class_weight: Number,
) -> Tensor:
    """Return the loss of the batch that all ranks hold, which is 0 for an empty one."""
    student, teacher = (z.reshape(-1, z.shape[-1]) for z in (student_logits, teacher_logits))
    dtype = compute_dtype(student, teacher)
    whole, first = None, 0
    if call.ranks:
        (whole, teacher), first = call.ranks.gather(student, teacher)
    if not teacher.numel():
        return student.sum(dtype=dtype)
    known: dict[str, Any] = dict(dtype=dtype, device=student.device)
    # each is filled in on its device, because a copy to a GPU would wait for it
    each = [
        x.to(dtype) if isinstance(x, Tensor) else torch.full((), x, **known) for x in temperatures
    ]
    weights = instance_weight, batch_weight, class_weight
    problem = Levels(student, whole, teacher, torch.stack(each), *weights, first)
    loss = solve(call.engine, problem)
    return call.ranks.valued(loss, loss.detach()) if call.ranks else loss
