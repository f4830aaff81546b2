"""Divergences between softmax rows: their values and their slopes, for a chunk of rows.

Buffers are overwritten as soon as they are not needed any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd.portable._softmaxes import LN2, Scratch, Softmax, log_odds, softplus
from fastkd.problems.corrected import weighted

N_SCRATCH = 6  # buffers of a chunk: d and e of both networks, and two for a divergence


class Terms(NamedTuple):
    """A divergence of a chunk: its value and, asked for afterwards, its slope."""

    value: Callable[[Number], Tensor]  # rows [R, 1] of the divergence times a number
    slope: Callable[[Tensor, Number], None]  # writes factor · (h − q Σ h) to [R, V]
    spare: Tensor  # [R, V], a buffer that the slope may be written to
    mean: Tensor | None = None  # [R, 1], Σ q·v, where the value takes it as the slope does


def terms_of(
    divergence: str,
    q: Softmax,
    p: Softmax,
    weight: Number,
    scratch: Scratch,
    mean: Tensor | None = None,
) -> Terms:
    """Return the value and the slope of a divergence, which overwrite both softmaxes.

    Those in CENTRED take Σ q·v if it is known.
    """
    if mean is None:
        return _DIVERGENCES[divergence](q, p, weight, scratch)
    return _DIVERGENCES[divergence](q, p, weight, scratch, mean)


def _mean(x: Tensor, weights: Softmax, out: Tensor | None = None) -> Tensor:
    """Return rows [R, 1] of the expectation of x; 0·∞ is a NaN, which counts as 0."""
    return torch.mul(x, weights.e, out=out).nansum(-1, keepdim=True).div_(weights.total)


def _log_ratio(p: Softmax, q: Softmax) -> Tensor:
    """Return log2(Z_p / Z_q), which is NaN for a row with a NaN: the sums above drop it."""
    return (p.total / q.total).log2_()


def _not_below_0(losses: Tensor, scale: Number) -> Tensor:
    """Return scale · losses from bits; rounding alone makes one negative, and NaN stays."""
    return losses.relu_().mul_(scale * LN2)


def _forward_kl(q: Softmax, p: Softmax, weight: Number, scratch: Scratch) -> Terms:
    ratio = p.total / q.total

    def value(scale: Number) -> Tensor:
        above = p.d.sub_(q.d)
        return _not_below_0(_mean(above, p, out=above).sub_(ratio.log2()), scale)

    return Terms(value, lambda out, factor: _difference(q, p, out, ratio, factor), p.d)


def _decoupled_kl(q: Softmax, p: Softmax, weight: Number, scratch: Scratch) -> Terms:
    """Return the terms of weight · KL of (class, others) + (1 − weight) · KL among the others."""
    rest, ratio, each = _forward_kl(q, p, weight, scratch), p.total / q.total, _each(q, 1)
    of_q, of_p = log_odds(q), log_odds(p)
    apart = q.apart
    assert apart is not None

    def value(scale: Number) -> Tensor:
        of_others = weighted(_among_others(rest.value(scale), p), 1 - weight)
        return of_others.add_(weighted(_binary_kl(of_p, of_q).mul_(scale), weight))

    def slope(out: Tensor, factor: Number) -> None:
        # the smaller of both probabilities, because the larger one may have lost its digits
        excess = torch.where(
            of_p + of_q > 0,
            (-of_p).sigmoid_() - (-of_q).sigmoid_(),
            of_q.sigmoid() - of_p.sigmoid(),
        ).mul_(factor * weight)
        _difference(q, p, out, ratio, _factor_among_others(q, p, factor * (1 - weight)))
        out.addcmul_(q.e, excess * each, value=-1).scatter_(1, apart, excess)

    return Terms(value, slope, p.d)


def _among_others(values: Tensor, p: Softmax) -> Tensor:
    """Return values among other classes than the one set apart, 0 where the teacher has none."""
    if p.of_apart is None or not p.may_be_alone:
        return values
    return values.masked_fill_(p.of_apart == math.inf, 0)


def _factor_among_others(q: Softmax, p: Softmax, factor: Number) -> Number:
    """Return a factor of rows [R, 1], 0 where a network allows no class but the one set apart.

    A number of all rows stays one where that is known not to happen.
    """
    assert q.of_apart is not None and p.of_apart is not None
    if not (q.may_be_alone or p.may_be_alone):
        return factor
    is_alone = (q.of_apart == math.inf) | (p.of_apart == math.inf)
    # a selection from plain numbers would be in float32
    return torch.where(is_alone, 0, torch.zeros_like(q.total) + factor)


def _binary_kl(of_p: Tensor, of_q: Tensor) -> Tensor:
    """Return rows of the KL between two probabilities with these logarithms of their odds."""
    total = torch.zeros_like(of_p)
    for x, y in ((of_p, of_q), (-of_p, -of_q)):
        p = x.sigmoid()
        total += torch.where(p == 0, 0, p * (softplus(-y) - softplus(-x)))
    return total.relu_()


def _soft_cross_entropy(q: Softmax, p: Softmax, weight: Number, scratch: Scratch) -> Terms:
    def value(scale: Number) -> Tensor:
        values = q.total.log2().sub_(_mean(q.d, p, out=q.d)).mul_(scale * LN2)
        return _among_others(values, p)

    def slope(out: Tensor, factor: Number) -> None:
        if q.apart is not None:
            factor = _factor_among_others(q, p, factor)
        _difference(q, p, out, p.total / q.total, factor)

    return Terms(value, slope, p.d)


def _reverse_kl(
    q: Softmax, p: Softmax, weight: Number, scratch: Scratch, mean: Tensor | None = None
) -> Terms:
    ratio, above = _log_ratio(p, q), q.d.sub_(p.d)
    of_q = _mean(above, q, out=scratch[0]) if mean is None else mean

    def slope(out: Tensor, factor: Number) -> None:
        _weighted(above.sub_(of_q).nan_to_num_(0), q, out, ratio + of_q, factor * LN2)

    return Terms(lambda scale: _not_below_0(of_q + ratio, scale), slope, p.d, of_q)


def _reverse_cross_entropy(
    q: Softmax, p: Softmax, weight: Number, scratch: Scratch, mean: Tensor | None = None
) -> Terms:
    """Return the terms of −Σ q log p, which is the cross-entropy for the teacher."""
    ratio, below = _log_ratio(p, q), p.d.neg_()
    of_q = _mean(below, q, out=scratch[0]) if mean is None else mean

    def slope(out: Tensor, factor: Number) -> None:
        _weighted(below.sub_(of_q).nan_to_num_(0), q, out, ratio + of_q, factor * LN2)

    return Terms(lambda scale: (of_q + p.total.log2()).mul_(scale * LN2), slope, q.d, of_q)


def _symmetric_kl(
    q: Softmax, p: Softmax, weight: Number, scratch: Scratch, mean: Tensor | None = None
) -> Terms:
    ratio, above = _log_ratio(p, q), q.d.sub_(p.d)
    of_q = _mean(above, q, out=scratch[0]) if mean is None else mean

    reverse = weighted(of_q + ratio, 1 - weight)

    def value(scale: Number) -> Tensor:
        forward = _mean(above, p, out=p.d).add_(ratio).neg_()
        return _not_below_0(weighted(forward, weight) + reverse, scale)

    def slope(out: Tensor, factor: Number) -> None:
        centred = above.sub_(of_q).nan_to_num_(0)
        _weighted(centred, q, out, ratio + reverse, factor * ((1 - weight) * LN2))
        out.add_(q.e.mul_(_each(q, factor * weight))).sub_(p.e.mul_(_each(p, factor * weight)))

    return Terms(value, slope, p.d, of_q)


def _total_variation(q: Softmax, p: Softmax, weight: Number, scratch: Scratch) -> Terms:
    ratio = _log_ratio(p, q)
    q = _in_units_of(p, q)
    difference = torch.sub(q.e, p.e, out=q.d)

    def value(scale: Number) -> Tensor:
        above = torch.abs(difference, out=p.d)
        return above.sum(-1, keepdim=True).div_(p.total).mul_(scale * 0.5)

    def slope(out: Tensor, factor: Number) -> None:
        sign = difference.sign_()
        _weighted(sign.sub_(_mean(sign, q, out=out)), q, out, ratio, factor * 0.5)

    return Terms(value, slope, p.d)


def _skew_kl(q: Softmax, p: Softmax, weight: Number, scratch: Scratch) -> Terms:
    ratio = _log_ratio(p, q)
    q = _in_units_of(p, q)
    m = _mixture(q, p, weight, scratch[0])

    def value(scale: Number) -> Tensor:
        above = torch.div(p.e, m, out=p.d).log2_()
        return _not_below_0(_mean(above, p, out=above).add_(ratio - ratio), scale)

    def slope(out: Tensor, factor: Number) -> None:
        share = p.e.div_(m)
        # summed as Z is, so that a share of 1 has a mean of exactly 1
        mean = torch.mul(share, q.e, out=out).sum(-1, keepdim=True).div_(q.total)
        centred = share.sub_(mean)
        _weighted(centred, q, out, ratio, factor * (weight - 1))

    return Terms(value, slope, p.d)


def _skew_reverse_kl(q: Softmax, p: Softmax, weight: Number, scratch: Scratch) -> Terms:
    ratio = _log_ratio(p, q)
    q = _in_units_of(p, q)
    m = _mixture(p, q, weight, scratch[0])
    above = torch.div(q.e, m, out=q.d).log2_()

    def value(scale: Number) -> Tensor:
        return _not_below_0(_mean(above, q, out=p.d).add_(ratio - ratio), scale)

    def slope(out: Tensor, factor: Number) -> None:
        share, unit = torch.div(q.e, m, out=p.e), weight
        if isinstance(weight, Tensor):  # a weight of 0 leaves the logarithm alone
            share.masked_fill_(weight == 0, 0)
            unit = torch.where(weight == 0, 1, weight)
        v = share.sub_(above.nan_to_num_(0, neginf=0).mul_(LN2 / unit))
        mean = torch.mul(v, q.e, out=out).sum(-1, keepdim=True).div_(q.total)
        _weighted(v.sub_(mean), q, out, ratio, factor * -unit)

    return Terms(value, slope, p.d)


def _jensen_shannon(
    q: Softmax, p: Softmax, weight: Number, scratch: Scratch, mean: Tensor | None = None
) -> Terms:
    ratio, q, p = _log_ratio(p, q), _normalised(q), _normalised(p)
    if not isinstance(weight, Tensor) and weight == 0.5:  # the same bits for (p, q) and (q, p)
        m = torch.add(q.e, p.e, out=scratch[0]).mul_(0.5)
        m.clamp_(min=torch.finfo(m.dtype).tiny)
    else:
        m = _mixture(q, p, weight, scratch[0])
    # the logarithm of a quotient is exactly 0 where the networks are equal
    above = torch.div(q.e, m, out=q.d).log2_()
    of_q = mean
    if of_q is None:
        of_q = torch.mul(above, q.e, out=scratch[1]).nansum(-1, keepdim=True)

    def value(scale: Number) -> Tensor:
        above_p = torch.div(p.e, m, out=p.d).log2_()
        of_p = torch.mul(above_p, p.e, out=above_p).nansum(-1, keepdim=True)
        both = of_p.mul_(weight).add_(of_q * (1 - weight))
        return _not_below_0(both.add_(ratio - ratio), scale)

    def slope(out: Tensor, factor: Number) -> None:
        centred = above.sub_(of_q).nan_to_num_(0)
        _weighted(centred, q, out, ratio, factor * ((1 - weight) * LN2))

    return Terms(value, slope, p.d, of_q)


def logit_mse(
    z: Tensor,
    z_teacher: Tensor,
    dtype: torch.dtype,
    scratch: Scratch,
    squares: Tensor | None = None,
) -> tuple[Tensor, Terms]:
    """Return Σ (difference of logits)² of rows, if it is not known, and the terms of its mean.

    The sums are not finite where infinities must be looked for.
    """
    z, z_teacher = z.to(dtype), z_teacher.to(dtype)
    difference = torch.sub(z, z_teacher, out=scratch[0])
    if squares is None:
        squares = torch.linalg.vector_norm(difference, dim=-1, keepdim=True).square_()
    finite = squares
    # elsewhere than on a CPU a look at the numbers would be a host sync
    is_finite = z.is_cpu and math.isfinite(squares.sum().item())
    lowest = torch.finfo(dtype).min  # in place of −∞, since −∞ in both networks is no difference
    if not is_finite:
        difference = torch.clamp(z, min=lowest, out=scratch[0]).sub_(z_teacher.clamp(min=lowest))
        finite = torch.linalg.vector_norm(difference, dim=-1, keepdim=True).square_()

    def slope(out: Tensor, factor: Number) -> None:
        torch.mul(difference, factor * (2 / z.shape[-1]), out=out)
        if not is_finite:
            out.masked_fill_(z < lowest, 0)

    return squares, Terms(lambda scale: finite * (scale / z.shape[-1]), slope, difference)


CENTRED = (
    "reverse_kl",
    "symmetric_kl",
    "jensen_shannon",
    "reverse_cross_entropy",
)  # their terms have a mean
_DIVERGENCES: dict[str, Callable[..., Terms]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "symmetric_kl": _symmetric_kl,
    "total_variation": _total_variation,
    "soft_cross_entropy": _soft_cross_entropy,
    "weighted_soft_cross_entropy": _soft_cross_entropy,
    "normalized_soft_cross_entropy": _soft_cross_entropy,
    "decoupled_kl": _decoupled_kl,
    "reverse_cross_entropy": _reverse_cross_entropy,
}


def _each(softmax: Softmax, factor: Number) -> Tensor:
    """Return factor / Z, what a row's e are multiplied by."""
    each = softmax.total.reciprocal()
    return each if not isinstance(factor, Tensor) and factor == 1 else each.mul_(factor)


def _difference(q: Softmax, p: Softmax, out: Tensor, ratio: Tensor, factor: Number) -> None:
    """Write factor · (softmax of q − softmax of p), the slope of h = −p; `ratio` is Z_p / Z_q."""
    torch.addcmul(p.e, q.e, ratio, value=-1, out=out).mul_(_each(p, -factor))


def _weighted(centred: Tensor, q: Softmax, out: Tensor, ratio: Tensor, factor: Number) -> None:
    """Write factor · q (v − Σ q·v), the slope of h = q·v, from v less its mean.

    The NaN of an input, which the sums drop, comes back from the ratio, and so does that of an
    infinite divergence, which has no gradient.
    """
    # `out` is written once, because it lies in memory and the others in the cache
    torch.mul(centred.mul_(q.e), _each(q, factor).add_(ratio - ratio), out=out)


def _in_units_of(p: Softmax, q: Softmax) -> Softmax:
    """Return q with its e in units of the teacher's Z."""
    q.e.mul_(p.total / q.total)
    return q._replace(total=p.total)


def _normalised(q: Softmax) -> Softmax:
    """Return q with its probabilities as e and a total of 1."""
    q.e.mul_(q.total.reciprocal())
    return q._replace(total=torch.ones_like(q.total))


def _mixture(q: Softmax, p: Softmax, weight: Number, out: Tensor | None) -> Tensor:
    """Return weight · p + (1 − weight) · q of two with one Z, not 0 where both vanish."""
    of_q, of_p = q.e, p.e
    if not isinstance(weight, Tensor) and weight > 0.5:  # 1 − (1 − w) would round a small w away
        of_q, of_p, weight = of_p, of_q, 1 - weight
    m = torch.lerp(of_q, of_p, weight, out=out)
    return m.clamp_(min=torch.finfo(m.dtype).tiny)
