"""Put several teachers together: their softmaxes, their logits, or the terms of each.

A mixture p̄ = Σ_k w_k p_k is kept as logarithms where a probability may be too small for a float and
its logarithm is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd.portable._chunks import by_workers, cut, for_each, most_elements
from fastkd.portable._row_chunks import has_zeros
from fastkd.portable._row_terms import (
    Terms,
    _log_ratio,
    _mean,
    _not_below_0,
    _weighted,
    terms_of,
)
from fastkd.portable._softmaxes import Scratch, Softmax, softmax

_ON_CPU, _ELSEWHERE = 1 << 18, 1 << 23  # elements of a chunk
_LOG2E = math.log2(math.e)
_LEAST = -100  # log2 of what added to 1 leaves it 1 in float64 too; smaller ones would be denormal
_VANISHING = 1e-30  # a probability close to those that float32 has no numbers for

# divergences whose weighted sum over teachers has one slope
SUMMED = ("forward_kl", "soft_cross_entropy", "reverse_kl")


def mix(
    mixture: Tensor, logits: Tensor, temperature: Number, log_shares: Tensor, is_first: bool
) -> None:
    """Add a teacher's probabilities times its share in each row to a mixture, all as logarithms.

    Args:
        mixture: log p̄ of the teachers before, [N, V], overwritten. The first teacher finds nothing.
        logits: Those of the teacher, [N, V].
        temperature: What divides them.
        log_shares: log w, [N, 1].
        is_first: Whether no teacher came before.
    """
    n_rows, n_cols = logits.shape
    size = max(1, most_elements(mixture, _ON_CPU, _ELSEWHERE) // n_cols)

    def of_chunk(rows: slice, scratch: Sequence[Tensor]) -> None:
        z, out, n = logits[rows], mixture[rows], rows.stop - rows.start
        above, e = (x[:n] for x in scratch)
        top = z.amax(-1, keepdim=True).to(above.dtype)
        # the maximum is subtracted first, because one multiplication for both would round it away
        torch.sub(z, top, out=above).mul_(1 / temperature)
        total = torch.mul(above, _LOG2E, out=e).exp2_().sum(-1, keepdim=True)
        shift = log_shares[rows] - total.log_()
        if is_first:
            torch.add(above, shift, out=out)
        else:
            _add_exponentials(out, above.add_(shift), e, _LOG2E)

    def scratch() -> Sequence[Tensor]:
        return mixture.new_empty((2, min(size, n_rows), n_cols)).unbind()

    chunks = cut(range(n_rows), size)
    by_workers(lambda: for_each(of_chunk, chunks, scratch), len(chunks) > 1, mixture)


def _add_exponentials(out: Tensor, other: Tensor, scratch: Tensor | None, unit: float) -> None:
    """Write log(e^out + e^other) to `out`, of logarithms that are log2 when they are times `unit`.

    PyTorch's logaddexp takes twenty times as long where the numbers lie far apart.
    """
    above = torch.sub(out, other, out=scratch).abs_().mul_(-unit).clamp_(min=_LEAST)
    # −∞ of both has no difference and stays −∞; a NaN stays in the maximum
    above.nan_to_num_(_LEAST).exp2_().add_(1).log2_()
    torch.maximum(out, other, out=out).add_(above, alpha=1 / unit)


def mixture(
    teachers: Sequence[Tensor],
    weights: Sequence[Number],
    temperature: Number,
    dtype: torch.dtype,
    scratch: Scratch,
    needs_logs: bool,
) -> Softmax:
    """Return Σ w p of a chunk's teachers [R, V] in the first two of four buffers.

    Args:
        teachers: Logits.
        weights: w of each teacher, [R, 1] or one number, which add up to 1.
        temperature: What divides the logits.
        dtype: The compute dtype.
        scratch: Four buffers.
        needs_logs: Whether logarithms are asked for even where nobody has a probability.
    """
    if needs_logs and not teachers[0].is_cpu:  # a look at the numbers would be a host sync
        return _log_mixture(teachers, weights, temperature, dtype, scratch)
    e: Tensor | None = None
    for z, weight in zip(teachers, weights, strict=True):
        p = softmax(z, temperature, dtype, scratch[2:4])
        share = weight / p.total
        if e is None:
            e = torch.mul(p.e, share, out=scratch[1])
        else:
            torch.addcmul(e, p.e, share, out=e)
    assert e is not None
    # compared this way round, because a row that does not count may hold NaN
    if needs_logs and e.numel() and not e.amin() >= _VANISHING:
        return _log_mixture(teachers, weights, temperature, dtype, scratch)
    return Softmax(torch.log2(e, out=scratch[0]), e, p.top, e.sum(-1, keepdim=True))


def _log_mixture(
    teachers: Sequence[Tensor],
    weights: Sequence[Number],
    temperature: Number,
    dtype: torch.dtype,
    scratch: Scratch,
) -> Softmax:
    d: Tensor | None = None
    for z, weight in zip(teachers, weights, strict=True):
        p = softmax(z, temperature, dtype, scratch[2:4])
        shift = (weight / p.total).log2_()
        if d is None:
            d = torch.add(p.d, shift, out=scratch[0])
        else:
            _add_exponentials(d, p.d.add_(shift), p.e, 1.0)
    assert d is not None
    top = d.amax(-1, keepdim=True)
    e = torch.exp2(d.sub_(top), out=scratch[1])
    return Softmax(d, e, top, e.sum(-1, keepdim=True))


def weighted_logits(
    teachers: Sequence[Tensor], weights: Sequence[Number], dtype: torch.dtype, out: Tensor | None
) -> Tensor:
    """Return Σ w t of a chunk's teachers [R, V]; a weight of 0 adds nothing, even of −∞."""
    total: Tensor | None = None
    for z, weight in zip(teachers, weights, strict=True):
        total = _add_weighted(total, z.to(dtype), weight, out)
    assert total is not None
    return total


def summed_terms(
    divergence: str,
    q: Softmax,
    teachers: Sequence[Tensor],
    weights: Sequence[Number],
    temperature: Number,
    scratch: Scratch,
) -> Terms:
    """Return value and slope of Σ w D(p, q) for a D in SUMMED, with one slope for all teachers.

    That of Σ w KL(p ‖ q) is Σ w (q − p), and that of Σ w KL(q ‖ p) is q (v − Σ q v) with
    v = Σ w (log q − log p): neither needs the teachers one by one.
    """
    if divergence == "reverse_kl":
        return _summed_reverse_kl(q, teachers, weights, temperature, scratch)
    total: Tensor | None = None
    losses = torch.zeros_like(q.total)
    for z, weight in zip(teachers, weights, strict=True):
        p = softmax(z, temperature, q.total.dtype, scratch[2:4])
        total = _add_weighted(total, p.e, weight, scratch[0], p.total)
        own_q = q
        if divergence == "soft_cross_entropy":  # whose terms overwrite logarithms that others need
            own_q = q._replace(d=torch.clone(q.d) if scratch[1] is None else scratch[1].copy_(q.d))
        own = terms_of(divergence, own_q, p, 0.0, ()).value(1.0)
        losses += times(own, weight)
    assert total is not None
    of_teachers = total

    def slope(out: Tensor, factor: Number) -> None:
        torch.mul(q.e, sum(weights) / q.total, out=out)
        out.sub_(of_teachers).mul_(factor)

    return Terms(lambda scale: losses * scale, slope, q.d)


def _summed_reverse_kl(
    q: Softmax,
    teachers: Sequence[Tensor],
    weights: Sequence[Number],
    temperature: Number,
    scratch: Scratch,
) -> Terms:
    above: Tensor | None = None
    ratio = torch.zeros_like(q.total)
    for z, weight in zip(teachers, weights, strict=True):
        p = softmax(z, temperature, q.total.dtype, scratch[2:4])
        above = _add_weighted(above, torch.sub(q.d, p.d, out=p.d), weight, scratch[0])
        ratio += times(_log_ratio(p, q), weight)
    assert above is not None
    v, of_q = above, _mean(above, q, out=scratch[1])

    def slope(out: Tensor, factor: Number) -> None:
        _weighted(v.sub_(of_q).nan_to_num_(0), q, out, ratio + of_q, factor * math.log(2))

    return Terms(lambda scale: _not_below_0(of_q + ratio, scale), slope, q.d)


def times(values: Tensor, weight: Number) -> Tensor:
    """Return weight · values of rows [R, 1]; a weight of 0 wins over an infinity."""
    if not isinstance(weight, Tensor):
        return values * weight
    return torch.where(weight == 0, 0, values * weight)


def _add_weighted(
    total: Tensor | None,
    x: Tensor,
    weight: Number,
    out: Tensor | None,
    divisor: Tensor | None = None,
) -> Tensor:
    """Return total + weight · x, or over a divisor of rows [R, 1], overwriting the total.

    A weight of 0 wins over an infinity.
    """
    factor = weight if divisor is None else weight / divisor
    if isinstance(weight, Tensor) and has_zeros(weight):
        x, factor = (torch.where(weight == 0, 0, y) for y in (x, factor))
    if total is None:
        return torch.mul(x, factor, out=out)
    if not isinstance(factor, Tensor):
        return torch.add(total, x, alpha=factor, out=total)
    return torch.addcmul(total, x, factor, out=total)


def chosen_logits(
    teachers: Sequence[Tensor], index: Tensor, dtype: torch.dtype, out: Tensor | None
) -> Tensor:
    """Return each row [R, V] of the teacher that its index [R] names, NaN where that is none."""
    found = torch.empty_like(teachers[0], dtype=dtype) if out is None else out
    found.fill_(torch.nan)
    for k, z in enumerate(teachers):
        if index.is_cpu:
            places = (index == k).nonzero().squeeze(1)
            found.index_copy_(0, places, z[places].to(dtype))
        else:  # where rows that are few cannot be counted without a host sync
            torch.where((index == k).unsqueeze(1), z, found, out=found)
    return found
