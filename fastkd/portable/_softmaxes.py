"""Softmaxes of a chunk of rows, and what all gradients in their logits have in common.

With e = exp2(d), where d is in log2 units and relative to a row's maximum, one exp2 gives both e
and, with its sum Z, the softmax e / Z, for less than PyTorch's exp or log_softmax take. Buffers are
overwritten as soon as they are not needed any more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd.problems._temperatures import EPSILON, moments
from fastkd.problems.rows import is_exactly

LN2 = math.log(2)
_CERTAIN = 1 / 0.9  # Z of a row, relative to its maximum, with a class of probability 0.9

Scratch = Sequence[Tensor | None]
Certain = tuple[Tensor, Tensor] | None  # numbers of rows, or a bool for each, and their classes


class Softmax(NamedTuple):
    """The softmax e / total, where e = exp2(d) is exactly 1 at a row's maximum.

    A class that is set apart has d = −∞ and e = 0, and no part in the maximum and in Z. Where no
    other class is allowed all have, the maximum is −∞, Z is any number, and of_apart ∞.
    """

    d: Tensor  # [R, V]
    e: Tensor  # [R, V]
    top: Tensor  # [R, 1], the largest logit
    total: Tensor  # [R, 1], Z
    apart: Tensor | None = None  # [R, 1], the number of the class that is set apart
    of_apart: Tensor | None = None  # [R, 1], what its d would be
    may_be_alone: bool = False  # whether a row may allow that class alone


class Moments(NamedTuple):
    """The moments that standardize rows of logits, in which excluded classes have no part."""

    above: Tensor  # [R, V], the logits less their mean
    deviation: Tensor  # [R, 1]
    n: Tensor | int  # [R, 1], the number of classes


def softmax(
    logits: Tensor,
    temperature: Number,
    dtype: torch.dtype,
    scratch: Scratch,
    statistics: Sequence[Tensor] = (),
    needs_e: bool = True,
    apart: Tensor | None = None,
) -> Softmax:
    """Return the softmax of logits / temperature in two buffers, from its statistics if known."""
    d, e, *_ = scratch
    of_apart, may_be_alone = None, False
    if apart is not None:
        of_apart = logits.gather(1, apart).to(dtype)
        d = torch.empty_like(logits, dtype=dtype) if d is None else d
        logits = d.copy_(logits).scatter_(1, apart, -math.inf)
    if statistics:
        top, total = statistics
    else:
        top, total = logits.amax(-1, keepdim=True), None
        if top.dtype != dtype:
            top = top.to(dtype)
    pivot = top
    if of_apart is not None:
        # elsewhere than on a CPU a look at the numbers would be a host sync
        may_be_alone = not (top.is_cpu and math.isfinite((top + of_apart).sum().item()))
    if of_apart is not None and may_be_alone:
        # NaN in a row without a softmax, whichever of its classes makes it one
        top = top + 0 * torch.maximum(top, of_apart)
        is_alone = top == -math.inf
        pivot = top.masked_fill(is_alone, 0)
        of_apart += torch.where(is_alone, math.inf, 0)
    # the maximum is subtracted first, because one multiplication for both would round it away
    unit = 1 / (LN2 * temperature)
    d = torch.sub(logits, pivot, out=d).mul_(unit)
    e = torch.exp2(d, out=e) if needs_e else d
    if total is None:
        total = e.sum(-1, keepdim=True)
        if may_be_alone:
            total = torch.where(is_alone, 2, total)  # that of 1 would be certain of a class
    if of_apart is not None:
        of_apart = of_apart.sub_(pivot).mul_(unit)
    return Softmax(d, e, top, total, apart, of_apart, may_be_alone)


def at_1(q: Softmax, temperature: Number, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return e and Z of the same logits at a temperature of 1, by way of a buffer [R, V]."""
    if is_exactly(temperature, 1):
        return q.e, q.total
    if is_exactly(temperature, 2) or is_exactly(temperature, 4):  # products cost less than exp2
        e = torch.mul(q.e, q.e, out=out)
        e = e.mul_(e) if temperature == 4 else e
    else:
        e = torch.mul(q.d, temperature, out=out).exp2_()
    total = e.sum(-1, keepdim=True)
    # a row without any other class than the one set apart has no e, and any number for its Z
    return e, torch.where(q.top == -math.inf, q.total, total) if q.may_be_alone else total


def certain_rows(logits: Tensor, totals: Sequence[Tensor]) -> Certain:
    """Return which rows [R, V] have a student that is nearly certain of one class, and of which.

    The logits may be relative ones, d of a softmax.

    There Z = 1 + rest has lost the digits of the rest, and the slope of that class would be the
    difference of numbers near 1: see `centre`. None stands for no such row.
    """
    if logits.shape[-1] == 1:  # which has no others, and whose slope is exact
        return None
    total = functools.reduce(torch.minimum, totals)
    if not logits.is_cpu:  # a look at the numbers would be a host sync
        return total < _CERTAIN, logits.argmax(-1, keepdim=True)
    if total.numel() and total.min().item() >= _CERTAIN:
        return None
    rows = (total.squeeze(1) < _CERTAIN).nonzero().squeeze(1)
    return (rows, logits[rows].argmax(-1, keepdim=True)) if len(rows) else None


def centre(slopes: Tensor, certain: Certain) -> None:
    """Make the slope of a certain class minus the sum of the others, which have all their digits.

    The slopes of every row have the sum 0.
    """
    if certain is None:
        return
    rows, places = certain
    if rows.dtype == torch.bool:
        of_others = slopes.scatter(-1, places, 0).sum(-1, keepdim=True)
        own = torch.where(rows, of_others.neg_(), slopes.gather(-1, places))
        slopes.scatter_(-1, places, own)
    else:
        of_others = slopes[rows].scatter_(-1, places, 0).sum(-1)
        slopes[rows, places.squeeze(-1)] = of_others.neg_()


def log_odds(q: Softmax) -> Tensor:
    """Return rows [R, 1] of log(q[class] / (1 − q[class])) of the class that is set apart."""
    assert q.of_apart is not None
    return (q.of_apart - q.total.log2()).mul_(LN2)


def moments_of(z: Tensor, dtype: torch.dtype) -> Moments:
    """Return what standardizes logits: those of many classes are read as few times as possible."""
    z = z.to(dtype)
    mean = z.mean(-1, keepdim=True)
    # elsewhere than on a CPU a look at the numbers would be a host sync
    if not z.is_cpu or not math.isfinite(mean.sum().item()):  # as some class may be excluded
        above, deviation, n_allowed = moments(z)
        return Moments(above.masked_fill_(above == -math.inf, 0), deviation, n_allowed)
    above, n = z - mean, z.shape[-1]
    above -= above.mean(-1, keepdim=True)  # which rounding took from that of logits far from 0
    norm = torch.linalg.vector_norm(above, dim=-1, keepdim=True)
    return Moments(above, norm.div_(max(n - 1, 1) ** 0.5), n)


def add_slope_of_deviation(slopes: Tensor, known: Moments) -> None:
    """Add to the slopes in z what the deviation s of a row contributes, which divides its logits.

    For L(z / τ), τ proportional to s + ε, it is −(z − mean) Σ slopes · z / ((s + ε) s (V − 1)).
    """
    above, deviation, n = known
    each = torch.linalg.vecdot(slopes, above).unsqueeze(-1)
    each /= (deviation + EPSILON) * deviation * (1 - n)
    # logits that are all equal stand where the deviation has no slope, for which PyTorch takes 0
    slopes.addcmul_(above, torch.where(deviation == 0, 0, each))


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), to the last digit for every x."""
    return torch.logaddexp(x, torch.zeros_like(x))
