"""The cross-entropy of a chunk of rows with their labels: its value and its slope.

A target t of a row is a label, smoothed and weighted by class, w ((1 − ε) label + ε / V), or any
numbers. With S = Σ t its cross-entropy is −Σ t log q = S log Z − Σ t d, and the slope S q − t.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd.portable._row_terms import Softmax, log_odds, softplus
from fastkd.problems.rows import Rows, is_exactly

_LN2 = math.log(2)


class Targets(NamedTuple):
    """The targets of rows, which their cross-entropies are with."""

    labels: Tensor  # [R, 1], classes, any where there is none; or [R, V], the targets
    smoothing: Number  # ε, of classes
    class_weights: Tensor | None  # w, (V,), of classes
    sums: Tensor | float = 1.0  # S, [R, 1], of the rows that `of` chose

    def of(self, rows: slice) -> Targets:
        """Return those of some rows, with their sums."""
        found = self if rows.stop is None else self._replace(labels=self.labels[rows])
        return found._replace(sums=found._sums())

    @property
    def are_soft(self) -> bool:
        return self.labels.is_floating_point()

    def of_label(self) -> Number:
        """Return what the label itself has of the target, [R, 1] or of all."""
        own = 1.0 if self.class_weights is None else self.class_weights[self.labels]
        return own if is_exactly(self.smoothing, 0) else own * (1 - self.smoothing)

    def _sums(self) -> Tensor | float:
        if self.are_soft:
            return self.labels.sum(-1, keepdim=True)
        if self.class_weights is None:
            return 1.0
        own = self.of_label()
        if is_exactly(self.smoothing, 0):
            return own
        return own + self.class_weights.mean() * self.smoothing


def targets_of(problem: Rows) -> Targets | None:
    """Return the targets of all rows, or None if there is no cross-entropy."""
    labels = problem.labels
    if labels is None:
        return None
    if labels.is_floating_point():
        labels = labels.reshape(-1, labels.shape[-1])
    else:
        labels = labels.reshape(-1, 1)
        if not problem.adds_cross_entropy:
            labels = labels.clamp(min=0)
    return Targets(labels, problem.label_smoothing, problem.class_weights)


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
        assert q.of_apart is not None
        return softplus((total.log2() - q.of_apart * temperature).mul_(_LN2))
    smoothing, weights = targets.smoothing, targets.class_weights
    if targets.are_soft:  # 0 · ∞ counts as 0
        seen = torch.mul(q.d, targets.labels, out=out).nansum(-1, keepdim=True)
    else:
        seen, own = q.d.gather(1, targets.labels), targets.of_label()
        if isinstance(own, Tensor):
            seen = torch.where(own == 0, 0, seen * own)
        elif own != 1:
            seen.mul_(own)
        if not is_exactly(smoothing, 0):
            if weights is None:
                each = q.d.mean(-1, keepdim=True)
            else:
                products = torch.mul(q.d, weights, out=out).nansum(-1, keepdim=True)
                each = products / len(weights)
            seen += each * smoothing
    if not is_exactly(temperature, 1):
        seen = seen * temperature
    sums, losses = targets.sums, total.log2()
    if not isinstance(sums, Tensor):
        return losses.sub_(seen).mul_(_LN2)
    losses = (losses * sums - seen).mul_(_LN2)
    # a row without a target has any distribution, so that it has no NaN
    return torch.where(sums == 0, 0, losses)


def cross_entropy_factor(q: Softmax, targets: Targets, factor: Tensor) -> Tensor:
    """Return what multiplies S e / Z − t in the gradient of factor · cross-entropy.

    Where the label is set apart it is factor · (1 − q[label]), which has all its digits.
    """
    if q.apart is not None:
        return torch.where(factor == 0, 0, factor * log_odds(q).neg_().sigmoid_())
    total = targets.sums
    return torch.where(total == 0, 0, factor) if isinstance(total, Tensor) else factor


def cross_entropy_slope(q: Softmax, targets: Targets, factor: Tensor, out: Tensor) -> Tensor:
    """Write factor · (S e / Z − t) to `out`, which may be e itself."""
    each = factor / q.total
    torch.mul(q.e, each * targets.sums if isinstance(targets.sums, Tensor) else each, out=out)
    if targets.are_soft:
        return out.addcmul_(targets.labels, factor, value=-1)
    smoothing, weights, n = targets.smoothing, targets.class_weights, out.shape[-1]
    if not is_exactly(smoothing, 0):
        each = factor * (smoothing / n)
        out = out.sub_(each) if weights is None else out.addcmul_(weights, each, value=-1)
    return out.scatter_add_(1, targets.labels, factor * -targets.of_label())
