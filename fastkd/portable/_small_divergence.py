"""Divergences of few logits, whose calls cost more than their memory: value and slope at once.

The fewest calls of PyTorch give the losses and, kept for the backward, their slopes. Infinities
are not cared for: they show in the losses, and the caller then takes the careful way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._engine import compute_dtype
from fastkd.divergence import Number, Problem

_MOST_ELEMENTS = 1 << 18
_LN2 = math.log(2)


def suits(problem: Problem) -> bool:
    """Few logits at hand on a CPU, to be differentiated, and nothing unusual."""
    student = problem.student
    return (
        student.requires_grad
        and 0 < student.numel() <= _MOST_ELEMENTS
        and student.device.type == "cpu"
        and problem.offset is None
        and not any(isinstance(number, Tensor) for number in problem[5:9])
        and bool(problem.student_temperature == problem.teacher_temperature)
    )


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor] | None:
    """What an engine's `forward` gives, with the slopes, (..., 1 or 2, V), as statistics."""
    student, teacher, labels, _, keep, *_, name = problem
    temperature, _, weight, scale = map(float, problem[5:9])
    dtype = compute_dtype(student, teacher)
    if name == "total_variation":  # where p = q is a corner: equal logits need equal roundings
        q, p = (_softmax(x.contiguous(), temperature, dtype) for x in (student, teacher))
        losses, slope = _total_variation(p, q)
    else:
        both = torch.stack([student, teacher])
        losses, slope = _value_and_slope(name, _softmax(both, temperature, dtype, out=both), weight)
    losses.mul_(_LN2 * scale)
    if keep is not None:
        losses.masked_fill_(~keep, 0)
        slope.masked_fill_(~keep.unsqueeze(-1), 0)
    if labels is None:
        cross_entropies, slopes, visible = (
            losses.new_empty((*losses.shape, 0)),
            slope.unsqueeze(-2),
            losses,
        )
    else:
        cross_entropies, of_labels = _cross_entropy(_softmax(student, 1.0, dtype), labels)
        slopes, visible = torch.stack([slope, of_labels], -2), losses + cross_entropies
    if not math.isfinite(visible.sum().item()):
        return None
    return losses, cross_entropies, slopes


def backward(
    upstream: Tensor | None, ce_upstream: Tensor | None, slopes: Tensor, problem: Problem
) -> Tensor:
    """An engine's `backward`, from the slopes of `forward`."""
    gradient = None
    if upstream is not None:
        if problem.keep is not None:  # a NaN of a row that is left out stays outside
            upstream = torch.where(problem.keep, upstream, 0)
        unit = problem.scale / problem.student_temperature
        gradient = slopes.select(-2, 0) * (upstream * unit).unsqueeze(-1)
    if ce_upstream is not None and problem.labels is not None:
        ce_upstream = torch.where(problem.labels < 0, 0, ce_upstream)
        of_labels = slopes.select(-2, 1) * ce_upstream.unsqueeze(-1)
        gradient = of_labels if gradient is None else gradient.add_(of_labels)
    assert gradient is not None  # `backward` is called for a reason
    dtype = problem.student.dtype
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


class _Softmax(NamedTuple):
    """e / total, where e = exp2(d) is 1 at a row's maximum."""

    d: Tensor  # [..., V]
    e: Tensor  # [..., V]
    total: Tensor  # [..., 1]


def _softmax(
    logits: Tensor, temperature: float, dtype: torch.dtype, out: Tensor | None = None
) -> _Softmax:
    if logits.dtype != dtype:
        logits, out = logits.to(dtype), None
    unit = 1 / (_LN2 * temperature)
    d = torch.add(logits.amax(-1, keepdim=True).mul_(-unit), logits, alpha=unit, out=out)
    e = d.exp2()
    return _Softmax(d, e, e.sum(-1, keepdim=True))


def _value_and_slope(name: str, both: _Softmax, weight: float) -> tuple[Tensor, Tensor]:
    """Rows of the divergence in bits and T · ∂D/∂student, from student and teacher, [2, ...]."""
    if name in ("jensen_shannon", "skew_kl", "skew_reverse_kl"):
        return _mixture(name, both, weight)
    (d_q, d_p), (q, p), (total_q, total_p) = (x.unbind() for x in both)
    if name == "soft_cross_entropy":
        p.div_(total_p)
        return (total_q.log2().squeeze(-1)).sub_(d_q.mul_(p).sum(-1)), q.div_(total_q).sub_(p)
    ratio = (total_p / total_q).log2_().squeeze(-1)
    above = d_q.sub_(d_p)
    if name == "forward_kl":
        p.div_(total_p)
        return above.mul_(p).sum(-1).add_(ratio).neg_(), q.div_(total_q).sub_(p)
    of_q = (above * q).sum(-1, keepdim=True).div_(total_q)
    reverse = of_q.squeeze(-1) + ratio
    if name == "reverse_kl":
        return reverse, above.sub_(of_q).mul_(q.mul_(_LN2 / total_q))
    q.div_(total_q)
    p.div_(total_p)
    forward = (above * p).sum(-1).add_(ratio)
    slope = above.sub_(of_q).mul_(q).mul_(_LN2 * (1 - weight)).add_(q.sub_(p), alpha=weight)
    return reverse.mul_(1 - weight).sub_(forward, alpha=weight), slope


def _total_variation(p: _Softmax, q: _Softmax) -> tuple[Tensor, Tensor]:
    difference = q.e.mul_(q.total.reciprocal()) - p.e.mul_(p.total.reciprocal())
    losses = difference.abs().sum(-1).mul_(0.5 / _LN2)
    return losses, _centred(difference.sign_(), q.e).mul_(0.5)


def _mixture(name: str, both: _Softmax, weight: float) -> tuple[Tensor, Tensor]:
    """`_value_and_slope` of what is relative to a mixture m, all in units of the teacher's e."""
    (log_q, log_p), (q, p), (total_q, total) = (x.unbind() for x in both)
    ratio = total / total_q
    log_q.add_(ratio.log2())
    q.mul_(ratio)
    m = mixed(q, p, name, weight)
    log_m = m.log2()
    if name == "skew_kl":
        losses = log_p.sub_(log_m).mul_(p).sum(-1, keepdim=True).div_(total)
        return losses.squeeze(-1), _centred(p.div_(m), q, total, weight - 1)
    above = log_q.sub_(log_m)
    of_q = (above * q).sum(-1, keepdim=True).div_(total)
    if name == "skew_reverse_kl":
        above.sub_(torch.div(q, m, out=m), alpha=weight / _LN2)
        return of_q.squeeze(-1), _centred(above, q, total, _LN2)
    of_p = log_p.sub_(log_m).mul_(p).sum(-1, keepdim=True).div_(total)
    losses = torch.lerp(of_q, of_p, weight).squeeze(-1)
    return losses, above.sub_(of_q).mul_(q.mul_(_LN2 * (1 - weight) / total))


def mixed(q: Tensor, p: Tensor, name: str, weight: Number, out: Tensor | None = None) -> Tensor:
    """The mixture m of a divergence. 1 − (1 − share) would round a small share away."""
    if name == "skew_reverse_kl":
        q, p = p, q
    if not isinstance(weight, Tensor) and weight > 0.5:
        q, p, weight = p, q, 1 - weight
    return torch.lerp(q, p, weight, out=out)


def _centred(v: Tensor, q: Tensor, total: Tensor | None = None, unit: float = 1.0) -> Tensor:
    """unit · q (v − Σ q·v), for q / total; overwrites v and q: of h = q·v the part in a softmax."""
    mean = (v * q).sum(-1, keepdim=True)
    if total is not None:
        mean.div_(total)
        q.mul_(unit / total)
    return v.sub_(mean).mul_(q)


def _cross_entropy(student: _Softmax, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of −ln q[label] and their slopes q − onehot, both 0 where the label is negative."""
    classes = labels.unsqueeze(-1)
    left_out = classes < 0
    classes = classes.clamp(min=0)
    losses = student.total.log2().sub_(student.d.gather(-1, classes)).mul_(_LN2)
    slope = student.e.mul_(student.total.reciprocal())
    slope.scatter_add_(-1, classes, slope.new_full((1,) * slope.ndim, -1.0).expand_as(classes))
    return losses.masked_fill_(left_out, 0).squeeze(-1), slope.masked_fill_(left_out, 0)
