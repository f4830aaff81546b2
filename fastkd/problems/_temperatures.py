"""Temperatures of rows: numbers, learnt ones, one for each row, or deviations of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd._precision import compute_dtype

EPSILON = 1e-7  # added to a deviation


def of_both(
    temperature: Number, student_temperature: Number | None, teacher_temperature: Number | None
) -> tuple[Number, Number]:
    """Return the temperatures of student and teacher, T where they have none of their own."""
    return (
        widened(temperature if student_temperature is None else student_temperature),
        widened(temperature if teacher_temperature is None else teacher_temperature),
    )


def widened(number: Number) -> Number:
    """Return a number of half precision in float32, because its square would be rounded."""
    is_half = isinstance(number, Tensor) and number.dtype in (torch.float16, torch.bfloat16)
    return number.float() if is_half else number  # type: ignore[union-attr]


def as_wide_as(temperatures: Sequence[Number], teacher: Tensor) -> Tensor:
    """Return the teacher in float64 if temperatures of rows are, so that all is computed in it."""
    of_rows = [x for x in temperatures if isinstance(x, Tensor) and x.ndim]
    return teacher.double() if compute_dtype(*of_rows) == torch.float64 else teacher


def of_rows(number: Number, logits: Tensor, dtype: torch.dtype, row_mask: Tensor | None) -> Tensor:
    """Return a number for each row of logits, 1 where it is masked."""
    if not isinstance(number, Tensor):
        return logits.new_full(logits.shape[:-1], number, dtype=dtype)
    number = number.to(dtype).expand(logits.shape[:-1])
    return number if row_mask is None else torch.where(row_mask, number, 1)


def is_trained_besides(*others: Number | None) -> bool:
    """Return whether one of them has a gradient, or is a number of each row."""
    return any(
        isinstance(x, Tensor) and (x.requires_grad or (x.ndim > 0 and i < 2))
        for i, x in enumerate(others)
    )


def divided(logits: Tensor, temperature: Number) -> Tensor:
    """Return logits / T, T one or one for each row, to which excluded classes give no gradient.

    Logits over a tensor are less the largest of their row, which no softmax sees: otherwise T would
    have another gradient for each number that is added to all logits of an infinite loss.
    """
    if not isinstance(temperature, Tensor):
        return logits / temperature
    if temperature.ndim:
        temperature = temperature.unsqueeze(-1).to(logits.dtype)
    return _over(logits - logits.detach().amax(-1, keepdim=True), temperature)


def _over(logits: Tensor, divisor: Tensor) -> Tensor:
    """Return logits / divisor, to which excluded classes give no gradient."""
    excluded = logits == -torch.inf  # because times their gradient of 0 they would be NaN
    finite = torch.where(excluded, 0, logits) / divisor
    return torch.where(excluded, logits / divisor.detach(), finite)


def standardized(logits: Tensor) -> Tensor:
    """Return the logits of each row less their mean, divided by their deviation + EPSILON."""
    above, deviation, _ = moments(logits)
    return _over(above, deviation + EPSILON)


def moments(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of each row less their mean, their deviation, and the number of classes.

    Excluded classes have no part in mean and deviation. The deviation is unbiased, and unlike that
    of torch.std it has the slope 0 where it is 0.
    """
    allowed = logits != -torch.inf
    n = allowed.sum(-1, keepdim=True, dtype=logits.dtype)  # whose root is as exact as the rest
    above = logits
    for _ in range(2):  # because the mean of logits that lie far from 0 is rounded
        above = above - torch.where(allowed, above, 0).sum(-1, keepdim=True) / n
    norm = torch.linalg.vector_norm(torch.where(allowed, above, 0), dim=-1, keepdim=True)
    return above, norm / (n - 1).clamp(min=1).sqrt(), n
