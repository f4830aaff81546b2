"""Divergences between softmax rows in PyTorch, for any device.

Every D = Σ d(log p, log q) has ∂D/∂student = (h − q Σ h) / T with h = ∂d/∂log q, known up to a
multiple of q. Rows are taken in chunks that stay in the cache: what is computed twice there costs
less than what is stored once, so nothing the size of the logits is kept but the gradient itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._engine import compute_dtype
from fastkd.divergence import N_STATISTICS

Number = float | Tensor

_CHUNK_ELEMENTS = {"cpu": 1 << 18}  # a few megabytes of scratch stay in a CPU's cache
_LARGE_CHUNK = 1 << 23  # elsewhere a chunk must pay for its launches


class _Problem(NamedTuple):
    """The arguments that every function of an engine takes."""

    student: Tensor  # (..., V)
    teacher: Tensor  # (..., V)
    labels: Tensor | None  # (...), negative: no label
    offset: Tensor | None  # (V), subtracted from the teacher's logits
    keep: Tensor | None  # (...), rows that count in the divergence
    student_temperature: Number
    teacher_temperature: Number
    weight: Number
    scale: Number
    divergence: str


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(*_Problem) -> rows of divergence · scale, rows of cross-entropy at T = 1, statistics.

    Statistics are what `backward` wants of a row: here nothing, it computes everything anew.
    """
    problem = _Problem(*arguments)
    losses, cross_entropies = _compute(problem)
    statistics = losses.new_zeros(()).expand(*losses.shape, N_STATISTICS)
    return losses, cross_entropies, statistics


def backward(
    upstream: Tensor | None, ce_upstream: Tensor | None, statistics: Tensor, *arguments: Any
) -> Tensor:
    """Σ upstream · ∂losses + Σ ce_upstream · ∂cross_entropies with respect to the student."""
    problem = _Problem(*arguments)
    gradient = torch.empty_like(problem.student, memory_format=torch.contiguous_format)
    _compute(problem, gradient, upstream, ce_upstream, values=False)
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
    problem = _Problem(*arguments)
    student = problem.student
    gradient = (
        student if in_place else torch.empty_like(student, memory_format=torch.contiguous_format)
    )
    return *_compute(problem, gradient, row_weights, ce_weights), gradient


def _compute(
    problem: _Problem,
    gradient: Tensor | None = None,
    upstream: Tensor | None = None,
    ce_upstream: Tensor | None = None,
    values: bool = True,
) -> tuple[Tensor, Tensor]:
    (
        student,
        teacher,
        labels,
        offset,
        keep,
        temperature,
        teacher_temperature,
        weight,
        scale,
        name,
    ) = problem
    dtype = compute_dtype(student, teacher)
    examples = student.shape[:-1]
    n_rows = examples.numel()
    losses = student.new_empty(n_rows, dtype=dtype)
    cross_entropies = student.new_empty(n_rows if labels is not None else 0, dtype=dtype)
    if labels is not None:
        labels = labels.reshape(-1)
        labelled = labels >= 0
        classes = labels.clamp(min=0).unsqueeze(1)
    factors = _factors(upstream, keep, scale / temperature, dtype)
    ce_factors = None if labels is None else _factors(ce_upstream, labelled, 1.0, dtype)

    chunks = _chunks(student, teacher, gradient, dtype)
    for rows, z, z_teacher, g, scratch in chunks:
        if values and labels is not None:
            log_q = _log_softmax(z, 1.0, None, scratch, 0)
            torch.neg(log_q.gather(1, classes[rows]).squeeze(1), out=cross_entropies[rows])
        if values:
            log_q = _log_softmax(z, temperature, None, scratch, 0)
            log_p = _log_softmax(z_teacher, teacher_temperature, offset, scratch, 1)
            # nansum drops 0·∞ and with it a NaN of the input, which fills its row: put it back
            nan = log_q[:, 0].add(log_p[:, 0]).clamp_(0, 0)
            torch.add(_value(name, log_p, log_q, weight, scratch[2:]), nan, out=losses[rows])
        if gradient is None:
            continue
        slope = g if g.dtype == dtype and gradient is not student else scratch[5]
        if factors is None:
            slope.zero_()
        else:
            log_q = _log_softmax(z, temperature, None, scratch, 0)
            log_p = _log_softmax(z_teacher, teacher_temperature, offset, scratch, 1)
            _slope(name, log_p, log_q, weight, scratch[2:], slope)
            _scale_rows(slope, factors[rows])
        if ce_factors is not None:
            factor = ce_factors[rows]
            slope.add_(_scale_rows(_log_softmax(z, 1.0, None, scratch, 0).exp_(), factor))
            slope.scatter_add_(1, classes[rows], -factor.unsqueeze(1))
        if slope is not g:
            g.copy_(slope)

    losses.mul_(scale)
    if keep is not None:
        losses.masked_fill_(~keep.reshape(-1), 0)
    if labels is None:
        return losses.view(examples), cross_entropies.view(*examples, 0)
    return losses.view(examples), cross_entropies.masked_fill_(~labelled, 0).view(examples)


def _chunks(
    student: Tensor, teacher: Tensor, gradient: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None, Tensor]]:
    """Row numbers, chunks [R, V] of the tensors, and scratch [6, R, V]; never a copy of logits.

    Shifted logits, [B, S, V] cut to [:, :-1], do not flatten to rows: they are taken batch by batch.
    """
    n_cols = student.shape[-1]
    inner = student.shape[-2] if student.ndim > 1 else 1
    blocks = [
        None if x is None else x.reshape(-1, inner, n_cols) for x in (student, teacher, gradient)
    ]
    if all(x is None or x.is_contiguous() for x in blocks):
        blocks = [None if x is None else x.reshape(1, -1, n_cols) for x in blocks]
    outer, inner, _ = blocks[0].shape
    size = max(1, _CHUNK_ELEMENTS.get(student.device.type, _LARGE_CHUNK) // n_cols)
    scratch = student.new_empty((6, min(size, inner), n_cols), dtype=dtype)
    for i in range(outer):
        for start in range(0, inner, size):
            stop = min(start + size, inner)
            s, t, g = (None if x is None else x[i, start:stop] for x in blocks)
            yield slice(i * inner + start, i * inner + stop), s, t, g, scratch[:, : stop - start]


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


def _factors(
    upstream: Tensor | None, keep: Tensor | None, scale: Number, dtype: torch.dtype
) -> Tensor | None:
    """What multiplies the gradient of each row: 0 for a row that is left out."""
    if upstream is None:
        return None
    factors = upstream.reshape(-1).to(dtype) * scale
    return factors if keep is None else torch.where(keep.reshape(-1), factors, 0)


def _scale_rows(rows: Tensor, factor: Tensor) -> Tensor:
    """rows · factor, where a factor of 0 selects: it wins over a NaN."""
    factor = factor.unsqueeze(1)
    return rows.mul_(factor).masked_fill_(factor == 0, 0)
