"""Schedules of numbers that change during training: an alpha, a temperature, a decay.

Each function returns a schedule, which is called with the number of the step, 0 for the first one,
and returns a float. Schedules are compared, printed and pickled as what they were made from. The
options of modules are attributes, so that a step sets them:

    temperature = fastkd.schedules.linear(8.0, 1.0, steps=1000)
    for step, batch in enumerate(batches):
        criterion.temperature = temperature(step)

Where a schedule is expected, a number is one that never changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """Return a schedule that is `value` at every step.

    Args:
        value: A finite number.

    Returns:
        A schedule.

    Raises:
        ValueError: The value is no finite number.
    """
    return _Constant(_finite(value=value))


def linear(start: float, end: float, steps: int, warmup: int = 0) -> Schedule:
    """Return a schedule that goes from `start` to `end` in a straight line.

    Args:
        start: The value at step 0, which the first `warmup` steps keep.
        end: The value at step `steps` and at all later ones.
        steps: The number of steps until `end`, with those of `warmup`.
        warmup: How many of them keep `start`.

    Returns:
        A schedule.

    Raises:
        ValueError: A value is no finite number, or the numbers of steps do not fit together.
    """
    return _Linear(*_finite_pair(start, end), *_steps(steps, warmup))


def cosine(start: float, end: float, steps: int, warmup: int = 0) -> Schedule:
    """Return a schedule that goes from `start` to `end` along half a cosine.

    It is end + (start − end) (1 + cos(π x)) / 2 with x from 0 to 1: flat at both ends. DINO's
    decay is ``cosine(0.996, 1.0, steps)``.

    Args:
        start: The value at step 0, which the first `warmup` steps keep.
        end: The value at step `steps` and at all later ones.
        steps: The number of steps until `end`, with those of `warmup`.
        warmup: How many of them keep `start`.

    Returns:
        A schedule.

    Raises:
        ValueError: A value is no finite number, or the numbers of steps do not fit together.

    Reference:
        Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017.
        arXiv:1608.03983
    """
    return _Cosine(*_finite_pair(start, end), *_steps(steps, warmup))


def warmup(steps: int, then: float | Schedule, start: float = 0.0) -> Schedule:
    """Return a schedule that rises from `start` in a straight line, and goes on with another one.

    Args:
        steps: The number of steps until the other schedule begins.
        then: A schedule, whose step 0 is step `steps` of this one, or the number that stays.
        start: The value at step 0.

    Returns:
        A schedule.

    Raises:
        TypeError: `then` is neither a schedule nor a number.
        ValueError: A value is no finite number, or `steps` no whole number of at least 0.
    """
    n, _ = _steps(steps, 0)
    following = _as_schedule("then", then)
    return _Phases(n, _Linear(_finite(start=start), _finite(then=following(0)), n, 0), following)


def until(step: int, value: float | Schedule, then: float | Schedule) -> Schedule:
    """Return a schedule that is `value` before a step, and `then` from that step on.

    Early-stopped distillation drops the teacher before the end of training: with the weight of the
    labels as ``alpha = until(steps * 6 // 10, 0.5, then=1.0)`` the last steps see labels alone.

    Args:
        step: The first step of `then`.
        value: A number, or a schedule.
        then: A number, or a schedule whose step 0 is `step` of this one.

    Returns:
        A schedule.

    Raises:
        TypeError: `value` or `then` is neither a schedule nor a number.
        ValueError: A value is no finite number, or `step` no whole number of at least 0.

    Reference:
        Cho and Hariharan, On the Efficacy of Knowledge Distillation, 2019. arXiv:1910.01348
    """
    n, _ = _steps(step, 0)
    return _Phases(n, _as_schedule("value", value), _as_schedule("then", then))


@dataclass(frozen=True)
class _Constant:
    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class _Linear:
    start: float
    end: float
    steps: int
    warmup: int

    def __call__(self, step: int) -> float:
        if step >= self.steps:  # which tells the end exactly
            return self.end
        return self.start + (self.end - self.start) * self.share(step)

    def share(self, step: int) -> float:
        """Return how far the step is between both ends, in [0, 1)."""
        return max(step - self.warmup, 0) / (self.steps - self.warmup)


@dataclass(frozen=True)
class _Cosine(_Linear):
    def share(self, step: int) -> float:
        return (1 - math.cos(math.pi * super().share(step))) / 2


@dataclass(frozen=True)
class _Phases:
    steps: int
    first: Schedule
    then: Schedule

    def __call__(self, step: int) -> float:
        return self.first(step) if step < self.steps else self.then(step - self.steps)


def _finite(**values: float) -> float:
    """Return the value, or raise an error with its name if it is no finite number."""
    ((name, value),) = values.items()
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _finite_pair(start: float, end: float) -> tuple[float, float]:
    return _finite(start=start), _finite(end=end)


def _steps(steps: int, warmup: int) -> tuple[int, int]:
    """Return both numbers of steps, or raise an error if they do not fit together."""
    for name, n in (("steps", steps), ("warmup", warmup)):
        if not isinstance(n, int) or n < 0:
            raise ValueError(f"{name} must be a whole number of at least 0, got {n!r}")
    if warmup > steps:
        raise ValueError(
            f"the {warmup} steps of warmup are among the steps, got {steps} of those: pass "
            f"steps={steps + warmup}, or fewer of warmup"
        )
    return steps, warmup


def _as_schedule(name: str, value: float | Schedule) -> Schedule:
    if callable(value):
        return value
    if not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} must be a number or a schedule, a function of the step, got "
            f"{type(value).__name__}"
        )
    return _Constant(_finite(**{name: value}))
