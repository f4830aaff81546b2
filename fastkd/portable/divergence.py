"""Divergences between softmax rows in PyTorch, for any device.

Every D = Σ d(log p, log q) has ∂D/∂student = (h − q Σ h) / T with h = ∂d/∂log q, known up to a
multiple of q. Rows are taken in chunks that stay in the cache: what is computed twice there costs
less than what is stored once, so nothing the size of the logits is kept but the gradient itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastkd._engine import compute_dtype
from fastkd.divergence import Number, Problem

_CHUNK_ELEMENTS = {"cpu": 1 << 18}  # a few megabytes of scratch stay in a CPU's cache
_LARGE_CHUNK = 1 << 23  # elsewhere a chunk must pay for its launches


def allocate(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What `forward` returns, empty: nothing is kept for `backward`, it computes all anew."""
    return Problem(*arguments).allocate(0)


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(*Problem) -> rows of divergence · scale, rows of cross-entropy at T = 1, statistics."""
    problem = Problem(*arguments)
    labels, offset, keep, temperature, teacher_temperature, weight, scale, name = problem[2:]
    losses, cross_entropies, statistics = problem.allocate(0)
    flat, flat_ce = losses.view(-1), cross_entropies.view(-1)
    for rows, (z, z_teacher), scratch in _chunks(problem.student, problem.teacher):
        if labels is not None:
            log_q = _log_softmax(z, 1.0, None, scratch, 0)
            classes = labels.reshape(-1, 1)[rows].clamp(min=0)
            torch.neg(log_q.gather(1, classes).squeeze(1), out=flat_ce[rows])
        log_q = _log_softmax(z, temperature, None, scratch, 0)
        log_p = _log_softmax(z_teacher, teacher_temperature, offset, scratch, 1)
        # nansum drops 0·∞ and with it a NaN of the input, which fills its row: put it back
        nan = log_q[:, 0].add(log_p[:, 0]).clamp_(0, 0)
        torch.add(_value(name, log_p, log_q, weight, scratch[2:]), nan, out=flat[rows])
    losses.mul_(scale)
    if keep is not None:
        losses.masked_fill_(~keep, 0)
    if labels is not None:
        cross_entropies.masked_fill_(labels < 0, 0)
    return losses, cross_entropies, statistics


def backward(
    upstream: Tensor | None, ce_upstream: Tensor | None, statistics: Tensor | None, *arguments: Any
) -> Tensor:
    """Σ upstream · ∂losses + Σ ce_upstream · ∂cross_entropies with respect to the student."""
    problem = Problem(*arguments)
    gradient = torch.empty_like(problem.student, memory_format=torch.contiguous_format)
    _fill(gradient, upstream, ce_upstream, problem)
    return gradient


def value_and_gradient(
    *arguments: Any,
    row_weights: Tensor,
    ce_weights: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, cross-entropies and the gradient of Σ row_weights·losses + Σ ce_weights·them.

    For a caller that knows the weights beforehand, on chunks of logits that are thrown away
    afterwards: `in_place` writes the gradient over the student.
    """
    losses, cross_entropies, _ = forward(*arguments)
    if not in_place:
        return losses, cross_entropies, backward(row_weights, ce_weights, None, *arguments)
    problem = Problem(*arguments)
    _fill(problem.student, row_weights, ce_weights, problem)
    return losses, cross_entropies, problem.student


def _fill(
    gradient: Tensor, upstream: Tensor | None, ce_upstream: Tensor | None, problem: Problem
) -> None:
    """Write the gradient, which may be the student itself."""
    labels, offset, keep, temperature, teacher_temperature, weight, scale, name = problem[2:]
    dtype = compute_dtype(problem.student, problem.teacher)
    factors = _factors(upstream, keep, dtype)
    if factors is not None:
        factors = factors * scale / temperature
    ce_factors = None if labels is None else _factors(ce_upstream, labels >= 0, dtype)
    in_scratch = gradient.dtype != dtype or gradient is problem.student
    for rows, (z, z_teacher, out), scratch in _chunks(problem.student, problem.teacher, gradient):
        slope = scratch[5] if in_scratch else out
        if factors is None:
            slope.zero_()
        else:
            log_q = _log_softmax(z, temperature, None, scratch, 0)
            log_p = _log_softmax(z_teacher, teacher_temperature, offset, scratch, 1)
            _slope(name, log_p, log_q, weight, scratch[2:], slope)
            _scale_rows(slope, factors[rows])
        if ce_factors is not None and labels is not None:
            factor = ce_factors[rows]
            slope.add_(_scale_rows(_log_softmax(z, 1.0, None, scratch, 0).exp_(), factor))
            classes = labels.reshape(-1, 1)[rows].clamp(min=0)
            slope.scatter_add_(1, classes, -factor.unsqueeze(1))
        if in_scratch:
            out.copy_(slope)


def _chunks(*tensors: Tensor) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
    """Row numbers, chunks [R, V] of the tensors, and scratch [6, R, V]; never a copy of logits.

    Shifted logits, [B, S, V] cut to [:, :-1], do not flatten to rows: they are taken one by one.
    """
    student, teacher = tensors[:2]
    if not student.numel():
        return  # no rows, of which there are any number
    n_cols = student.shape[-1]
    inner = student.shape[-2] if student.ndim > 1 else 1
    blocks = [x.reshape(-1, inner, n_cols) for x in tensors]
    if all(x.is_contiguous() for x in blocks):
        blocks = [x.reshape(1, -1, n_cols) for x in blocks]
    outer, inner, _ = blocks[0].shape
    size = max(1, _CHUNK_ELEMENTS.get(student.device.type, _LARGE_CHUNK) // n_cols)
    scratch = student.new_empty(
        (6, min(size, inner), n_cols), dtype=compute_dtype(student, teacher)
    )
    for i in range(outer):
        for start in range(0, inner, size):
            stop = min(start + size, inner)
            rows = slice(i * inner + start, i * inner + stop)
            yield rows, [x[i, start:stop] for x in blocks], scratch[:, : stop - start]


def _log_softmax(
    logits: Tensor, temperature: Number, offset: Tensor | None, scratch: Tensor, place: int
) -> Tensor:
    """log_softmax((logits − offset) / temperature) in scratch[place]."""
    scaled, out = scratch[2], scratch[place]
    if offset is not None:
        torch.sub(logits, offset, out=scaled).div_(temperature)
    elif isinstance(temperature, float | int) and temperature == 1:
        scaled = logits if logits.dtype == out.dtype else scaled.copy_(logits)
    else:
        torch.div(logits, temperature, out=scaled)
    return torch.log_softmax(scaled, -1, out=out)


def _mixture(p: Tensor, q: Tensor, weight: Number, out: Tensor) -> Tensor:
    """weight·p + (1 − weight)·q, not 0 where both vanish."""
    mixture = torch.lerp(q, p, weight, out=out)
    return mixture.clamp_(min=torch.finfo(mixture.dtype).tiny)


def _value(name: str, log_p: Tensor, log_q: Tensor, weight: Number, scratch: Tensor) -> Tensor:
    """Rows of the divergence; overwrites its inputs. Only 0·∞ gives a NaN, which counts as 0."""
    if name == "forward_kl":
        p = torch.exp(log_p, out=scratch[0])
        return log_p.sub_(log_q).mul_(p).nansum(-1)
    if name == "reverse_kl":
        q = torch.exp(log_q, out=scratch[0])
        return log_q.sub_(log_p).mul_(q).nansum(-1)
    if name == "soft_cross_entropy":
        return log_p.exp_().mul_(log_q).nansum(-1).neg_()
    if name == "total_variation":
        return log_p.exp_().sub_(log_q.exp_()).abs_().sum(-1).mul_(0.5)
    p, q = torch.exp(log_p, out=scratch[0]), torch.exp(log_q, out=scratch[1])
    if name == "symmetric_kl":
        return log_p.sub_(log_q).mul_(p.mul_(weight).sub_(q.mul_(1 - weight))).nansum(-1)
    if name == "jensen_shannon":
        log_m = _mixture(p, q, weight, scratch[2]).log_()
        of_teacher = log_p.sub_(log_m).mul_(p).nansum(-1).mul_(weight)
        return of_teacher.add_(log_q.sub_(log_m).mul_(q).nansum(-1).mul_(1 - weight))
    if name == "skew_kl":
        return log_p.sub_(_mixture(p, q, weight, scratch[2]).log_()).mul_(p).nansum(-1)
    if name == "skew_reverse_kl":
        return log_q.sub_(_mixture(p, q, 1 - weight, scratch[2]).log_()).mul_(q).nansum(-1)
    raise ValueError(f"no divergence is called {name!r}")


def _slope(
    name: str, log_p: Tensor, log_q: Tensor, weight: Number, scratch: Tensor, out: Tensor
) -> None:
    """h − q Σ h for rows of the divergence; overwrites its inputs."""
    if name in ("forward_kl", "soft_cross_entropy"):
        torch.sub(log_q.exp_(), log_p.exp_(), out=out)
        return
    q = torch.exp(log_q, out=scratch[0])
    if name == "total_variation":  # h = ½ sign(q − p) q
        sign = torch.sub(q, log_p.exp_(), out=out).sign_()
        mean = torch.mul(sign, q, out=log_q).sum(-1, keepdim=True)
        sign.sub_(mean).mul_(q).mul_(0.5)
        return
    if name == "skew_kl":  # h = −(1 − weight) p q / m
        p = log_p.exp_()
        torch.div(p, _mixture(p, q, weight, scratch[1]), out=out).mul_(q)
        total = out.sum(-1, keepdim=True)
        out.sub_(q.mul_(total)).mul_(weight - 1)
        return
    # the others are h = q·v: their gradient is q (v − Σ q·v)
    share: Number = 1.0
    if name == "reverse_kl":
        v = log_q.sub_(log_p)
    elif name == "symmetric_kl":
        p = torch.exp(log_p, out=scratch[1])
        v, share = log_q.sub_(log_p), 1 - weight
    else:
        mixing = weight if name == "jensen_shannon" else 1 - weight
        p = torch.exp(log_p, out=scratch[1])
        m = _mixture(p, q, mixing, log_p)
        v = log_q.sub_(torch.log(m, out=scratch[1]))
        if name == "skew_reverse_kl":
            v.sub_(torch.div(q, m, out=scratch[1]).mul_(weight))
        else:
            share = 1 - weight
    mean = torch.mul(q, v, out=out).nansum(-1, keepdim=True)
    torch.mul(v.sub_(mean), q, out=out).masked_fill_(q == 0, 0)
    if name == "symmetric_kl":
        out.mul_(share).add_(q.sub_(p).mul_(weight))
    elif name == "jensen_shannon":
        out.mul_(share)


def _factors(upstream: Tensor | None, counts: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What multiplies the gradient of each row: 0 for a row that is left out."""
    if upstream is None:
        return None
    factors = upstream.reshape(-1).to(dtype)
    return factors if counts is None else torch.where(counts.reshape(-1), factors, 0)


def _scale_rows(rows: Tensor, factor: Tensor) -> Tensor:
    """rows · factor, where a factor of 0 selects: it wins over a NaN."""
    factor = factor.unsqueeze(1)
    return rows.mul_(factor).masked_fill_(factor == 0, 0)
