"""Divergences between softmax rows in PyTorch, for any device.

Every D = Σ d(log p, log q) has ∂D/∂student = (h − q Σ h) / T with h = ∂d/∂log q, known up to a
multiple of q. All is in log2 units and relative to the row's maximum, as in the kernels: one exp2
gives both e and, with its sum Z, the softmax, for less than PyTorch's exp or log_softmax take.
Rows are taken in chunks that stay in the cache: what is computed twice there costs less than what
is stored once, so nothing the size of the logits is kept but the gradient itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._engine import compute_dtype
from fastkd.divergence import Number, Problem
from fastkd.portable import _small_divergence

_CHUNK_ELEMENTS = {"cpu": 1 << 18}  # a few megabytes of scratch stay in a CPU's cache
_LARGE_CHUNK = 1 << 23  # elsewhere a chunk must pay for its launches
_LN2 = math.log(2)
_N_SCRATCH = 6
_N_STATISTICS = 4  # −pivot and Z of the student, and of the teacher


def allocate(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What `forward` returns, empty."""
    return Problem(*arguments).allocate(_N_STATISTICS)


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(*Problem) -> rows of divergence · scale, rows of cross-entropy at T = 1, statistics."""
    problem = _problem(arguments)
    labels, offset, keep, temperature, teacher_temperature, weight, scale, name = problem[2:]
    losses, cross_entropies, statistics = problem.allocate(_N_STATISTICS)
    table, dtype = statistics.view(-1, _N_STATISTICS), statistics.dtype
    flat, flat_ce = losses.view(-1, 1), cross_entropies.view(-1, 1)
    for rows, (z, z_teacher), scratch in _chunks(problem.student, problem.teacher):
        if labels is not None:
            q = _softmax(z, dtype, 1.0, None, *scratch[:2])
            flat_ce[rows] = _cross_entropy(q, labels.reshape(-1, 1)[rows])
        q = _softmax(z, dtype, temperature, None, *scratch[:2])
        p = _softmax(z_teacher, dtype, teacher_temperature, offset, *scratch[2:4])
        torch.cat([q.shift, q.total, p.shift, p.total], 1, out=table[rows])
        flat[rows] = _value(name, p, q, weight, scale, scratch[4])
    if keep is not None:
        losses.masked_fill_(~keep, 0)
    if labels is not None:
        cross_entropies.masked_fill_(labels < 0, 0)
    return losses, cross_entropies, statistics


def backward(
    upstream: Tensor | None, ce_upstream: Tensor | None, statistics: Tensor, *arguments: Any
) -> Tensor:
    """Σ upstream · ∂losses + Σ ce_upstream · ∂cross_entropies with respect to the student."""
    problem = _problem(arguments)
    gradient = torch.empty_like(problem.student, memory_format=torch.contiguous_format)
    _fill(gradient, upstream, ce_upstream, statistics, problem)
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
    problem = _problem(arguments)
    losses, cross_entropies, statistics = forward(*problem)
    gradient = problem.student
    if not in_place:
        gradient = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    _fill(gradient, row_weights, ce_weights, statistics, problem)
    return losses, cross_entropies, gradient


def _problem(arguments: Sequence[Any]) -> Problem:
    """Numbers that are tensors in the precision of the logits."""
    problem = Problem(*arguments)
    if any(isinstance(number, Tensor) for number in problem[5:9]):
        dtype = compute_dtype(problem.student, problem.teacher)
        t_s, t_t, weight, scale = (
            x.to(dtype) if isinstance(x, Tensor) else x for x in problem[5:9]
        )
        problem = problem._replace(
            student_temperature=t_s, teacher_temperature=t_t, weight=weight, scale=scale
        )
    return problem


def _fill(
    gradient: Tensor,
    upstream: Tensor | None,
    ce_upstream: Tensor | None,
    statistics: Tensor,
    problem: Problem,
) -> None:
    """Write the gradient, which may be the student itself."""
    labels, offset, keep, temperature, teacher_temperature, weight, scale, name = problem[2:]
    dtype = compute_dtype(problem.student, problem.teacher)
    factors = _factors(upstream, keep, dtype)
    if factors is not None:
        factors = factors * scale / temperature
    ce_factors = None if labels is None else _factors(ce_upstream, labels >= 0, dtype)
    in_scratch = gradient.dtype != dtype or gradient is problem.student
    table = statistics.reshape(-1, _N_STATISTICS, 1)
    for rows, (z, z_teacher, out), scratch in _chunks(problem.student, problem.teacher, gradient):
        slope = scratch[5] if in_scratch else out
        if slope is None:
            slope = torch.empty_like(z, dtype=dtype)
        if factors is None:
            slope.zero_()
        else:
            known = table[rows].unbind(1)
            q = _softmax(z, dtype, temperature, None, *scratch[:2], *known[:2])
            p = _softmax(z_teacher, dtype, teacher_temperature, offset, *scratch[2:4], *known[2:])
            _slope(name, p, q, weight, factors[rows], scratch[4], slope)
            _select(slope, factors[rows])
        if ce_factors is not None and labels is not None:
            factor = ce_factors[rows]
            q = _softmax(z, dtype, 1.0, None, *scratch[:2])
            slope.add_(_select(q.e.mul_(factor / q.total), factor))
            classes = labels.reshape(-1, 1)[rows].clamp(min=0)
            slope.scatter_add_(1, classes, -factor)
        if in_scratch:
            out.copy_(slope)


def _chunks(*tensors: Tensor) -> Iterator[tuple[slice, list[Tensor], tuple[Tensor | None, ...]]]:
    """Row numbers, chunks [R, V] of the tensors, places for temporaries (if not one chunk).

    Shifted logits, [B, S, V] cut to [:, :-1], do not flatten to rows: they are taken one by one.
    """
    student, teacher = tensors[:2]
    if not student.numel():
        return  # no rows, of which there are any number
    n_cols, most = student.shape[-1], _CHUNK_ELEMENTS.get(student.device.type, _LARGE_CHUNK)
    if student.numel() <= most and all(x.is_contiguous() for x in tensors):
        yield slice(None), [x.view(-1, n_cols) for x in tensors], (None,) * _N_SCRATCH
        return
    inner = student.shape[-2] if student.ndim > 1 else 1
    blocks = [x.reshape(-1, inner, n_cols) for x in tensors]
    if all(x.is_contiguous() for x in blocks):
        blocks = [x.reshape(1, -1, n_cols) for x in blocks]
    outer, inner, _ = blocks[0].shape
    size = max(1, most // n_cols)
    scratch = student.new_empty(
        (_N_SCRATCH, min(size, inner), n_cols), dtype=compute_dtype(student, teacher)
    )
    for i in range(outer):
        for start in range(0, inner, size):
            stop = min(start + size, inner)
            rows = slice(i * inner + start, i * inner + stop)
            yield rows, [x[i, start:stop] for x in blocks], scratch[:, : stop - start].unbind()


class _Softmax(NamedTuple):
    """e / total, where e = exp2(d) is 1 at a row's maximum."""

    d: Tensor  # [R, V]
    e: Tensor  # [R, V]
    shift: Tensor  # [R, 1], −pivot
    total: Tensor  # [R, 1]


def _softmax(
    logits: Tensor,
    dtype: torch.dtype,
    temperature: Number,
    offset: Tensor | None,
    d: Tensor | None,
    e: Tensor | None,
    shift: Tensor | None = None,
    total: Tensor | None = None,
) -> _Softmax:
    """Of (logits − offset) / temperature, in d and e, and of known statistics, if given."""
    if offset is not None:
        logits = torch.sub(logits.to(dtype), offset, out=d)
    unit = 1 / (_LN2 * temperature)
    if shift is None:
        shift = logits.amax(-1, keepdim=True).to(dtype).mul_(-unit)
    d = _affine(logits, unit, shift, d)
    e = torch.exp2(d, out=e)
    return _Softmax(d, e, shift, e.sum(-1, keepdim=True) if total is None else total)


def _affine(x: Tensor, factor: Number, row: Tensor, out: Tensor | None) -> Tensor:
    """factor · x + row, in one pass."""
    if isinstance(factor, Tensor):
        return torch.addcmul(row, x.to(row.dtype), factor.to(row.dtype), out=out)
    return torch.add(row, x, alpha=factor, out=out)


def _mixture(
    name: str, p: _Softmax, q: _Softmax, ratio: Tensor, weight: Number, out: Tensor | None
) -> Tensor:
    """Of p and q, not 0 where both vanish; brings q to the units of p."""
    q.d.add_(ratio)
    q.e.mul_(p.total / q.total)
    m = _small_divergence.mixed(q.e, p.e, name, weight, out)
    return m.clamp_(min=torch.finfo(m.dtype).tiny)


def _mean(x: Tensor, weights: _Softmax) -> Tensor:
    """Rows [R, 1] of the expectation of x, which it overwrites; 0·∞ is a NaN and counts as 0."""
    return x.mul_(weights.e).nansum(-1, keepdim=True).div_(weights.total)


def _cross_entropy(q: _Softmax, classes: Tensor) -> Tensor:
    """Rows [R, 1] of −log q[class]; without meaning for a negative class."""
    return (q.total.log2() - q.d.gather(1, classes.clamp(min=0))).mul_(_LN2)


def _value(
    name: str, p: _Softmax, q: _Softmax, weight: Number, scale: Number, scratch: Tensor | None
) -> Tensor:
    """Rows [R, 1] of the divergence · scale; overwrites p and q."""
    unit = _LN2 * scale
    ratio = (p.total / q.total).log2_()  # holds the NaN of an input, which nansum drops
    if name == "forward_kl":
        return (_mean(p.d.sub_(q.d), p) - ratio).mul_(unit)
    if name == "reverse_kl":
        return (_mean(q.d.sub_(p.d), q) + ratio).mul_(unit)
    if name == "soft_cross_entropy":
        return (q.total.log2() - _mean(q.d, p)).mul_(unit)
    if name == "symmetric_kl":
        above = p.d.sub_(q.d)
        of_q = _mean(q.d.copy_(above), q)
        of_p = _mean(above, p)
        return ((of_p - ratio) * weight + (ratio - of_q) * (1 - weight)).mul_(unit)
    if name == "total_variation":
        difference = p.e.div_(p.total).sub_(q.e.div_(q.total))
        return difference.abs_().sum(-1, keepdim=True).mul_(0.5 * scale)
    log_m = _mixture(name, p, q, ratio, weight, scratch).log2_()
    q = q._replace(total=p.total)
    nothing = ratio * 0
    if name == "skew_kl":
        return (_mean(p.d.sub_(log_m), p) + nothing).mul_(unit)
    of_q = _mean(q.d.sub_(log_m), q)
    if name == "skew_reverse_kl":
        return (of_q + nothing).mul_(unit)
    of_p = _mean(p.d.sub_(log_m), p)
    return (of_p * weight + of_q * (1 - weight) + nothing).mul_(unit)


def _slope(
    name: str,
    p: _Softmax,
    q: _Softmax,
    weight: Number,
    factor: Tensor,
    scratch: Tensor | None,
    out: Tensor,
) -> None:
    """factor · (h − q Σ h) for rows of the divergence; overwrites p and q."""
    if name in ("forward_kl", "soft_cross_entropy"):  # h = −p
        torch.mul(q.e, factor / q.total, out=out)
        out.sub_(p.e.mul_(factor / p.total))
        return
    # the others are h = q·v: their gradient is q (v − Σ q·v)
    ratio = (p.total / q.total).log2_()
    # holds the NaN of an input, which nan_to_num_ drops
    factor = ratio * 0 + factor
    unit: Number
    if name == "total_variation":
        q.e.mul_(p.total / q.total)
        q = q._replace(total=p.total)
        v = torch.sub(q.e, p.e, out=q.d).sign_()
        unit = 0.5
    elif name in ("reverse_kl", "symmetric_kl"):
        v = q.d.sub_(p.d).nan_to_num_(0)
        unit = _LN2
    else:
        m = _mixture(name, p, q, ratio, weight, scratch)
        q = q._replace(total=p.total)
        if name == "skew_kl":
            v, unit = p.e.div_(m), weight - 1
        elif name == "skew_reverse_kl":
            of_m = torch.div(q.e, m, out=p.e).mul_(-weight / _LN2)
            v, unit = q.d.sub_(m.log2_()).nan_to_num_(0).add_(of_m), _LN2
        else:
            v, unit = q.d.sub_(m.log2_()).nan_to_num_(0), (1 - weight) * _LN2
    mean = torch.mul(v, q.e, out=out).sum(-1, keepdim=True).div_(q.total)
    torch.mul(v.sub_(mean), q.e, out=out)
    if name == "symmetric_kl":
        out.mul_(factor / q.total * ((1 - weight) * _LN2))
        out.add_(q.e.mul_(factor / q.total * weight)).sub_(p.e.mul_(factor / p.total * weight))
    else:
        out.mul_(factor / q.total * unit)


def _factors(upstream: Tensor | None, counts: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[N, 1]: what multiplies the gradient of each row, 0 for a row that is left out."""
    if upstream is None:
        return None
    factors = upstream.reshape(-1, 1).to(dtype)
    return factors if counts is None else torch.where(counts.reshape(-1, 1), factors, 0)


def _select(rows: Tensor, factor: Tensor) -> Tensor:
    """Rows whose factor is not 0; the others become 0 even from NaN, by their bits: it is fast."""
    integers = {4: torch.int32, 8: torch.int64}[rows.element_size()]
    rows.view(integers).bitwise_and_((factor != 0).to(integers).neg_())
    return rows
