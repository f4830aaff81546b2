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
from fastkd.portable._row_terms import Softmax, log_odds, softplus
from fastkd.problems.rows import Rows, is_exactly, with_smoothing

_LN2 = math.log(2)


class Targets(NamedTuple):
    """The targets of rows, which their cross-entropies are with."""

    labels: Tensor  # [R, 1], classes, a negative one where there is none; or [R, V], soft labels
    smoothing: Number  # ε
    class_weights: Tensor | None  # w, (V,)
    dtype: torch.dtype  # which is computed in
    sums: Tensor | float = 1.0  # S, [R, 1], of the rows that `of` chose

    def of(self, rows: slice) -> Targets:
        """Return those of some rows with their sums, where soft labels are the targets."""
        found = self._replace(labels=self.labels[rows])
        if self.are_soft:
            soft = found.labels.to(self.dtype)
            target = with_smoothing(soft, self.smoothing, self.class_weights)
            found = found._replace(labels=target)
        return found._replace(sums=found._sums())

    @property
    def are_soft(self) -> bool:
        return self.labels.is_floating_point()

    @property
    def classes(self) -> Tensor:
        """Return the classes, where a row without one has any."""
        return self.labels.clamp(min=0)

    def of_label(self) -> Tensor | float:
        """Return what the label itself has of the target, [R, 1]."""
        own = 1.0 if self.class_weights is None else self.class_weights[self.classes]
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
    width = labels.shape[-1] if labels.is_floating_point() else 1
    dtype = compute_dtype(problem.student, problem.teacher)
    return Targets(labels.reshape(-1, width), problem.label_smoothing, problem.class_weights, dtype)


def without_label(problem: Rows) -> Tensor | None:
    """Return which rows (...) have no cross-entropy, or None if all have one."""
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
        seen, own = q.d.gather(1, targets.classes), targets.of_label()
        seen = torch.where(own == 0, 0, seen * own) if isinstance(own, Tensor) else seen * own
        if not is_exactly(smoothing, 0):
            if weights is None:
                each = q.d.mean(-1, keepdim=True)
            else:
                products = torch.mul(q.d, weights, out=out).nansum(-1, keepdim=True)
                each = products / len(weights)
            seen += each * smoothing
    if not is_exactly(temperature, 1):
        seen = seen * temperature
    sums = targets.sums
    losses = (total.log2() * sums - seen).mul_(_LN2)
    # a row without a target has any distribution, so that it has no NaN
    return torch.where(sums == 0, 0, losses) if isinstance(sums, Tensor) else losses


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
    torch.mul(q.e, factor * targets.sums / q.total, out=out)
    if targets.are_soft:
        return out.addcmul_(targets.labels, factor, value=-1)
    smoothing, weights, n = targets.smoothing, targets.class_weights, out.shape[-1]
    if not is_exactly(smoothing, 0):
        each = factor * (smoothing / n)
        out = out.sub_(each) if weights is None else out.addcmul_(weights, each, value=-1)
    return out.scatter_add_(1, targets.classes, -factor * targets.of_label())
