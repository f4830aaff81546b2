"""Divergences of few logits, whose calls cost more than their memory: value and slope at once.

The fewest calls of PyTorch give the losses and, kept for the backward, their slopes, in a function
of autograd that does nothing else. Infinities are not cared for: they show in the losses, and the
caller then takes the careful way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import _engine

_MOST_ELEMENTS = 1 << 18
_LN2 = math.log(2)


class Arguments(NamedTuple):
    teacher: Tensor  # (..., V)
    labels: Tensor | None  # (...), negative: no label
    keep: Tensor | None  # (...), rows that count in the divergence
    temperature: float
    weight: float
    scale: float  # of the divergence
    ce_scale: float  # of the cross-entropy
    divergence: str
    is_summed: bool  # to one number; else rows of divergence and, with labels, of cross-entropy


def suits(student: Tensor, temperature: Any, weight: Any) -> bool:
    """Few logits, and numbers that are known."""
    return (
        0 < student.numel() <= _MOST_ELEMENTS
        and not isinstance(temperature, Tensor)
        and not isinstance(weight, Tensor)
    )


def losses(student: Tensor, arguments: Arguments) -> tuple[Tensor, ...] | None:
    """One number, or rows of divergence and, with labels, of cross-entropy; None if not finite."""
    if torch.is_grad_enabled() and student.requires_grad:
        # what `apply` does without torch.func
        function: Any = super(torch.autograd.Function, Divergence)
        return function.apply(student, arguments)
    return _finite(_terms(student, arguments), arguments.is_summed)


class Divergence(torch.autograd.Function):
    """Its name is that of the engine's: it is in the graph of a loss."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, arguments: Arguments) -> tuple[Tensor, ...] | None:
        terms = _terms(student, arguments)
        outputs = _finite(terms, arguments.is_summed)
        if outputs is None:
            return None
        slopes = [term.gradient() for term in terms]
        if arguments.is_summed:
            slopes = [functools.reduce(Tensor.add_, slopes)]
        # the student, since autograd then notices if it is overwritten
        ctx.save_for_backward(student, *slopes)
        ctx.counts = [None] if arguments.is_summed else [term.counts for term in terms]
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, None]:
        _engine.refuse_batches(*upstream)
        student, *slopes = ctx.saved_tensors
        gradient = None
        for slope, counts, factor in zip(slopes, ctx.counts, upstream, strict=True):
            if factor is None:
                continue
            if counts is not None:  # a NaN of a row that is left out stays outside
                factor = torch.where(counts, factor, 0)
            product = slope * (factor.unsqueeze(-1) if factor.ndim else factor)
            gradient = product if gradient is None else gradient + product
        if torch.is_grad_enabled() and gradient is not None:  # only under create_graph=True
            gradient = _Constant.apply(gradient, student)
        return gradient, None


class _Constant(_engine.FirstOrder):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, student: Tensor) -> Tensor:
        return gradient.clone()


_Slope = Callable[[], tuple[Tensor, float, Tensor]]


class _Term(NamedTuple):
    losses: Tensor  # [..., 1]
    slope: _Slope  # gives, when it is wanted, [..., V] · number / [..., 1]
    slope_scale: float
    counts: Tensor | None  # [...], rows that are not left out: in those all is 0

    def gradient(self) -> Tensor:
        entries, unit, total = self.slope()
        entries.mul_(total.reciprocal().mul_(unit * self.slope_scale))
        return entries if self.counts is None else _zeroed(entries, self.counts)


def _terms(student: Tensor, arguments: Arguments) -> list[_Term]:
    """Divergence and, with labels, cross-entropy."""
    teacher, labels, keep, temperature, weight, scale, ce_scale, name, is_summed = arguments
    dtype = _engine.compute_dtype(student, teacher)
    q = _softmax(student, temperature, dtype)
    p = _softmax(teacher.detach(), temperature, dtype)
    terms = []
    if labels is not None:  # first, since the divergence overwrites q
        all_count = is_summed or labels.min().item() >= 0
        counts = None if all_count else labels >= 0
        bits, slope = _cross_entropy(q.d * temperature, labels, counts)
        terms = [_term(bits, slope, ce_scale, 1.0, counts)]
    bits, slope = _divergence(name, q, p, weight)
    return [_term(bits, slope, scale, temperature, keep), *terms]


def _term(
    bits: Tensor, slope: _Slope, scale: float, temperature: float, counts: Tensor | None
) -> _Term:
    losses = bits.mul_(_LN2 * scale)
    if counts is not None:
        _zeroed(losses, counts)
    return _Term(losses, slope, scale / temperature, counts)


def _zeroed(rows: Tensor, counts: Tensor) -> Tensor:
    """0 in place of rows that do not count, whatever they hold."""
    return rows.masked_fill_(~counts.unsqueeze(-1), 0)


def _finite(terms: list[_Term], is_summed: bool) -> tuple[Tensor, ...] | None:
    if is_summed:
        total = functools.reduce(torch.add, [term.losses for term in terms]).sum()
        return (total,) if math.isfinite(total.item()) else None
    if all(math.isfinite(term.losses.sum().item()) for term in terms):
        return tuple(term.losses.squeeze(-1) for term in terms)
    return None


class _Softmax(NamedTuple):
    """e / total, where e = exp2(d) is 1 at a row's maximum."""

    d: Tensor  # [..., V]
    e: Tensor  # [..., V]
    total: Tensor  # [..., 1]


def _softmax(logits: Tensor, temperature: float, dtype: torch.dtype) -> _Softmax:
    logits = logits.contiguous()  # equal logits get equal roundings
    if logits.dtype != dtype:
        logits = logits.to(dtype)
    unit = 1 / (_LN2 * temperature)
    d = logits.amax(-1, keepdim=True).mul_(-unit).add(logits, alpha=unit)
    e = d.exp2()
    return _Softmax(d, e, e.sum(-1, keepdim=True))


def _divergence(name: str, q: _Softmax, p: _Softmax, weight: float) -> tuple[Tensor, _Slope]:
    """Rows [..., 1] in bits and T · ∂D/∂student; overwrites q and p."""
    if name == "soft_cross_entropy":
        return q.total.log2().sub_(_mean(q.d.mul_(p.e), p)), lambda: _difference(q, p)
    ratio = p.total / q.total
    log_ratio = ratio.log2()
    if name == "forward_kl":
        return _mean(p.d.sub_(q.d).mul_(p.e), p).sub_(log_ratio), lambda: _difference(q, p)
    if name in ("reverse_kl", "symmetric_kl"):
        above = q.d.sub_(p.d)
        of_q = _mean(above * q.e, q)
        reverse = of_q + log_ratio
        if name == "reverse_kl":
            return reverse, lambda: (above.sub_(of_q).mul_(q.e), _LN2, q.total)
        forward = _mean(torch.mul(above, p.e, out=p.d), p).add_(log_ratio).neg_()
        unit = _LN2 * (1 - weight)
        share = weight / unit

        def slope() -> tuple[Tensor, float, Tensor]:  # unit · q (above − of_q) + weight · (q − p)
            entries = above.sub_(of_q).add_(share).mul_(q.e)
            return entries.sub_(p.e.mul_(ratio.reciprocal_()), alpha=share), unit, q.total

        return torch.lerp(reverse, forward, weight), slope
    q.e.mul_(ratio)  # now all is in units of the teacher's total
    if name == "total_variation":
        difference = torch.sub(q.e, p.e, out=q.d)
        losses = _mean(torch.abs(difference, out=p.d), p).mul_(0.5 / _LN2)
        return losses, lambda: (_centred(difference.sign_(), q, p, p.d), 0.5, p.total)
    m = mixed(q.e, p.e, name, weight)
    log_m = m.log2()
    if name == "skew_kl":
        losses = _mean(p.d.sub_(log_m).mul_(p.e), p)
        return losses, lambda: (_centred(p.e.div_(m), q, p, m), weight - 1, p.total)
    above = q.d.sub_(log_m)
    of_q = _mean(above * q.e, p)
    reverse = of_q + log_ratio
    if name == "skew_reverse_kl":

        def slope() -> tuple[Tensor, float, Tensor]:
            above.sub_(torch.div(q.e, m, out=m), alpha=weight / _LN2)
            return _centred(above, q, p, m), _LN2, p.total

        return reverse, slope
    losses = torch.lerp(reverse, _mean(p.d.sub_(log_m).mul_(p.e), p), weight)
    return losses, lambda: (above.sub_(of_q).mul_(q.e), _LN2 * (1 - weight), p.total)


def mixed(q: Tensor, p: Tensor, name: str, weight: Any, out: Tensor | None = None) -> Tensor:
    """The mixture m of a divergence. 1 − (1 − share) would round a small share away."""
    if name == "skew_reverse_kl":
        q, p = p, q
    if not isinstance(weight, Tensor) and weight > 0.5:
        q, p, weight = p, q, 1 - weight
    return torch.lerp(q, p, weight, out=out)


def _mean(products: Tensor, of: _Softmax) -> Tensor:
    """Rows [..., 1] of an expectation, from what was multiplied by e."""
    return products.sum(-1, keepdim=True).div_(of.total)


def _difference(q: _Softmax, p: _Softmax) -> tuple[Tensor, float, Tensor]:
    """q − p."""
    return q.e.mul_(p.total / q.total).sub_(p.e), 1.0, p.total


def _centred(v: Tensor, q: _Softmax, p: _Softmax, scratch: Tensor) -> Tensor:
    """q (v − Σ q·v), a softmax's share of q·v, for q in units of the teacher's; overwrites v."""
    return v.sub_(_mean(torch.mul(v, q.e, out=scratch), p)).mul_(q.e)


def _cross_entropy(d: Tensor, labels: Tensor, counts: Tensor | None) -> tuple[Tensor, _Slope]:
    """Rows [..., 1] of −log q[label] in bits and q − onehot, of d at T = 1."""
    classes = (labels if counts is None else labels.clamp(min=0)).unsqueeze(-1)
    e = d.exp2()
    total = e.sum(-1, keepdim=True)
    losses = total.log2().sub_(d.gather(-1, classes))
    return losses, lambda: (e.scatter_add_(-1, classes, total.neg()), 1.0, total)
