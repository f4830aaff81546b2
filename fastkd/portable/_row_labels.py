"""The cross-entropy of a chunk of rows with their labels: its value and its slope.

The target of a row is t = w ((1 − ε) label + ε / V), where the label is a class or any numbers.
With S = Σ t its cross-entropy is −Σ t log q = S log Z − Σ t d, and the slope S q − t.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd._precision import compute_dtype
from fastkd.portable._softmaxes import Softmax, log_odds, softplus
from fastkd.problems.rows import Rows, is_exactly, with_smoothing

_LN2 = math.log(2)


class Targets(NamedTuple):
    """The targets of rows, which their cross-entropies are with."""

    labels: Tensor  # [R, 1], classes, any where there is none; or [R, V], soft labels
    smoothing: Number  # ε
    class_weights: Tensor | None  # w, (V,)
    dtype: torch.dtype  # which is computed in
    # of the rows that `of` chose, [R, 1] or of all: what the label has of the target, and S
    of_label: Number = 1.0
    sums: Number = 1.0
    may_vanish: bool = False  # whether S may be 0

    def of(self, rows: slice) -> Targets:
        """Return those of some rows with their sums, where soft labels are the targets."""
        labels = self.labels if rows.stop is None else self.labels[rows]
        smoothing, weights = self.smoothing, self.class_weights
        if self.are_soft:
            target = with_smoothing(labels.to(self.dtype), smoothing, weights)
            of_rows = target.sum(-1, keepdim=True)
            return self._replace(labels=target, sums=of_rows, may_vanish=_has_zeros(of_rows))
        own: Number = 1.0 if weights is None else weights[labels]
        sums: Number = own
        if not is_exactly(smoothing, 0):
            own = own * (1 - smoothing)
            sums = 1.0 if weights is None else own + weights.mean() * smoothing
        may_vanish = isinstance(sums, Tensor) and _has_zeros(sums)
        return Targets(labels, smoothing, weights, self.dtype, own, sums, may_vanish)

    @property
    def are_soft(self) -> bool:
        return self.labels.is_floating_point()


def _has_zeros(numbers: Tensor) -> bool:
    """Return whether one may be 0: elsewhere than on a CPU a look would be a host sync."""
    return not (numbers.is_cpu and bool(numbers.all()))


def targets_of(problem: Rows) -> Targets | None:
    """Return the targets of all rows, or None if there is no cross-entropy."""
    labels = problem.labels
    if labels is None:
        return None
    if labels.is_floating_point():
        labels = labels.reshape(-1, labels.shape[-1])
    else:
        labels = labels.reshape(-1, 1)
        if problem.row_mask is not None or not problem.adds_cross_entropy:
            labels = labels.clamp(min=0)
    dtype = compute_dtype(problem.student, problem.teacher)
    return Targets(labels, problem.label_smoothing, problem.class_weights, dtype)


def without_label(problem: Rows) -> Tensor | None:
    """Return which rows (...) have no cross-entropy, or None if all have one."""
    if problem.adds_cross_entropy:
        return None
    if problem.labels is not None and not problem.labels.is_floating_point():
        return problem.labels < 0
    return None if problem.row_mask is None else ~problem.row_mask


def cross_entropy(
    q: Softmax, total: Tensor, temperature: Number, targets: Targets, out: Tensor | None = None
) -> Tensor:
    """Return rows [R, 1] of −Σ t log softmax(z), of which q is the softmax at a temperature.

    A row without a label gives a number without meaning. Where a class is set apart it is the
    label.

    Args:
        q: The softmax of z / temperature.
        total: Z of z, [R, 1].
        temperature: What divides the logits in q.
        targets: Those of the rows.
        out: A buffer [R, V] that is overwritten.
    """
    if q.apart is not None:
        return softplus(_log_odds(q, total, temperature).neg_())
    smoothing, weights, sums = targets.smoothing, targets.class_weights, targets.sums
    if targets.are_soft:  # 0 · ∞ counts as 0
        seen = torch.mul(q.d, targets.labels, out=out).nansum(-1, keepdim=True)
        losses = _less(total.log2() * sums, seen, temperature)
    else:
        losses = total.log2()
        losses = losses * sums if isinstance(sums, Tensor) else losses
        losses = _less(losses, q.d.gather(1, targets.labels), targets.of_label * temperature)
        if not is_exactly(smoothing, 0):
            if weights is None:
                each = q.d.sum(-1, keepdim=True)
            else:
                each = torch.mul(q.d, weights, out=out).nansum(-1, keepdim=True)
            losses = _less(losses, each, smoothing * temperature / q.d.shape[-1])
    losses = losses.mul_(_LN2)
    if not targets.may_vanish:
        return losses
    assert isinstance(sums, Tensor)
    # a row without a target has any distribution, so that it has no NaN
    return torch.where(sums == 0, 0, losses)


def _log_odds(q: Softmax, total: Tensor, temperature: Number) -> Tensor:
    """Return rows [R, 1] of those of the class that is set apart, at a temperature of 1."""
    assert q.of_apart is not None
    return log_odds(q._replace(total=total, of_apart=q.of_apart * temperature))


def _less(x: Tensor, y: Tensor, factor: Number) -> Tensor:
    """Return x − factor · y, where a factor of 0 wins over an infinity."""
    if isinstance(factor, Tensor):
        return x - torch.where(factor == 0, 0, y * factor)
    return x.sub_(y, alpha=factor) if factor else x


def cross_entropy_factor(
    q: Softmax, total: Tensor, temperature: Number, targets: Targets, factor: Number
) -> Number:
    """Return what multiplies S e / Z − t in the gradient of factor · cross-entropy.

    Where the label is set apart it is factor · (1 − q[label]), which has all its digits.
    """
    if q.apart is not None:
        chance = _log_odds(q, total, temperature).neg_().sigmoid_() * factor
        return torch.where(factor == 0, 0, chance) if isinstance(factor, Tensor) else chance
    if not targets.may_vanish:
        return factor
    assert isinstance(targets.sums, Tensor)
    return torch.where(targets.sums == 0, 0, torch.zeros_like(total) + factor)


def cross_entropy_slope(
    e: Tensor, total: Tensor, targets: Targets, factor: Number, out: Tensor
) -> Tensor:
    """Write factor · (S e / Z − t) to `out`, which may be e itself."""
    torch.mul(e, targets.sums * factor / total, out=out)
    if targets.are_soft:
        if isinstance(factor, Tensor):
            return out.addcmul_(targets.labels, factor, value=-1)
        return out.sub_(targets.labels, alpha=factor)
    smoothing, weights, n = targets.smoothing, targets.class_weights, out.shape[-1]
    if not is_exactly(smoothing, 0):
        each = factor * (smoothing / n)
        if weights is None:
            out = out.sub_(each)
        elif isinstance(each, Tensor):
            out = out.addcmul_(weights, each, value=-1)
        else:
            out = out.sub_(weights, alpha=each)
    of_label = torch.zeros_like(total) - factor * targets.of_label
    return out.scatter_add_(1, targets.labels, of_label)
