"""Solve `Moments` in PyTorch, for any device: values of positions from their features.

Positions are taken in chunks that stay in the cache: whole examples, or positions of one of them. A
chunk is [b, n, C] in whatever strides the features have, and its buffers have the same order of
dimensions, so that every call goes through memory as it lies. The backward reads the features
again, because the gradient that it writes is the only tensor of their size then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._pages import in_huge_pages
from fastkd._precision import compute_dtype
from fastkd.portable._chunks import by_workers, cut, for_each, most_elements
from fastkd.problems.moments import SHORTEST, Maps, Moments, Number, normalised
from fastkd.problems.rows import is_exactly

_ON_CPU, _ELSEWHERE = 1 << 20, 1 << 24  # elements of a chunk

_OF_MAPS = 1 << 15  # of maps, of which each example is one row


class Chunk(NamedTuple):
    """Some positions: their features [b, n, C] in the compute dtype, and buffers as large."""

    student: Tensor
    teacher: Tensor  # the student where there is none
    buffer: Callable[[int], Tensor | None]  # the buffer of that number; None lets PyTorch allocate


Places = tuple[slice, slice]  # examples, and positions of each of them
Values = tuple[Tensor, ...]  # the value of each position [b, n], and its statistics


def n_statistics(problem: Moments) -> int:
    """Return how many numbers of each position `backward` needs besides the features.

    Of a direction they are the factors of teacher and student in the gradient; of a maximum itself
    and the slope of each feature that has it.
    """
    return 2 if problem.kind in ("cosine", "normalized_mse", "max") else 0


def forward(problem: Moments, needs_grad: Sequence[bool]) -> tuple[Any, tuple[Tensor]]:
    """Return the value of each position (..., P), and what `backward` needs."""
    student, dtype, n = problem.student, _dtype(problem), n_statistics(problem)
    values = student.new_empty(student.shape[:-1], dtype=dtype)
    statistics = values.new_empty((*values.shape, n))
    places = _blocks(student).shape[:2]
    of_values, of_statistics = values.view(places), statistics.view(*places, n)
    value_of, number = _VALUES[problem.kind], _number(problem)

    def work(at: Places, chunk: Chunk, out: Tensor | None) -> None:
        value, *known = value_of(chunk, number)
        counts, weights = _weights(problem, at, dtype)
        if weights is not None:
            value.mul_(weights)
        if counts is not None:
            value.masked_fill_(~counts, 0)
        of_values[at] = value
        for i, x in enumerate(known):
            of_statistics[(*at, i)] = x

    _for_chunks(work, problem, None)
    return (values,), (statistics,)


def backward(problem: Moments, statistics: Tensor, upstream: Sequence[Tensor | None]) -> Tensor:
    """Return Σ upstream · ∂values with respect to the student, laid out as the student is."""
    (factors,), blocks = upstream, _blocks(problem.student)
    assert factors is not None  # without an upstream gradient there is no backward
    places, gradient = blocks.shape[:2], in_huge_pages(torch.empty_like(blocks))
    factors = factors.reshape(places).to(_dtype(problem))
    known = (
        statistics.reshape(*places, -1) if statistics.numel() else factors.new_empty((*places, 0))
    )
    slope_of, number = _SLOPES[problem.kind], _number(problem)

    def work(at: Places, chunk: Chunk, out: Tensor | None) -> None:
        assert out is not None
        slopes = out if out.dtype == factors.dtype else chunk.buffer(1)
        if slopes is None:
            slopes = torch.empty_like(out, dtype=factors.dtype)
        counts, weights = _weights(problem, at, factors.dtype)
        factor = factors[at] if weights is None else factors[at] * weights
        of_chunk = [x[..., None] for x in (factor, *known[at].unbind(-1))]
        slope_of(chunk, number, of_chunk, slopes)
        # elsewhere than on a CPU a look at the mask would be a host sync
        if counts is not None and not (counts.is_cpu and counts.all()):
            slopes.masked_fill_(~counts[..., None], 0)
        if slopes is not out:
            out.copy_(slopes)

    _for_chunks(work, problem, gradient)
    if blocks is problem.student:
        return gradient
    return torch.empty_like(problem.student).copy_(gradient.view(problem.student.shape))


def value_and_gradients(
    problem: Maps, needs_grad: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor | None]]:
    """Return the difference of two maps, and its gradient in the student's."""
    student, teacher = problem
    n, n_positions = student.numel(), student.shape[1]
    gradient = torch.empty_like(student) if needs_grad[0] else None

    def work(rows: slice, scratch: None) -> Tensor:
        slopes = None if gradient is None else gradient[rows]
        return _difference(student[rows], teacher[rows], n, slopes)

    chunks = cut(range(len(student)), most_elements(student, _OF_MAPS, n) // n_positions)
    # a call of PyTorch is spread over threads from as many elements on
    losses = by_workers(lambda: for_each(work, chunks, lambda: None), n > _OF_MAPS, student)
    return torch.stack(losses).sum(), (gradient,)


def _difference(student: Tensor, teacher: Tensor, n: int, gradient: Tensor | None) -> Tensor:
    """Return Σ (A/‖A‖ − T/‖T‖)² / n of maps [B, P], and write its gradient if there is a place."""
    (s, inverse), (t, _) = normalised(student), normalised(teacher)
    d = t.neg_().add_(s)
    if gradient is not None:
        along = (d * s).sum(1, keepdim=True)
        torch.addcmul(d, s, along, value=-1, out=gradient).mul_(inverse.mul_(2 / n))
    return d.square_().sum() / n


# ------------------------------------------------------------------------------ values and slopes
# A slope writes `factor` · ∂value/∂student, the factor being the first of `known` [b, n, 1].


def _squares(chunk: Chunk, number: Number) -> Values:
    d = torch.sub(chunk.student, chunk.teacher, out=chunk.buffer(0))
    return (d.square_().sum(-1).div_(d.shape[-1]),)


def _square_slopes(chunk: Chunk, number: Number, known: Sequence[Tensor], out: Tensor) -> None:
    torch.sub(chunk.student, chunk.teacher, out=out).mul_(known[0] * (2 / out.shape[-1]))


def _penalties(chunk: Chunk, beta: Number) -> Values:
    d = torch.sub(chunk.student, chunk.teacher, out=chunk.buffer(0))
    slope = torch.div(d, beta, out=chunk.buffer(1)).clamp_(-1, 1)
    linear = d.mul_(slope).sum(-1)
    return ((linear - slope.square_().sum(-1) * (beta / 2)) / d.shape[-1],)


def _penalty_slopes(chunk: Chunk, beta: Number, known: Sequence[Tensor], out: Tensor) -> None:
    torch.sub(chunk.student, chunk.teacher, out=out).div_(beta).clamp_(-1, 1)
    out.mul_(known[0] / out.shape[-1])


def _inverse(features: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Return the lengths of features, and what divides them to directions."""
    lengths = torch.mul(features, features, out=chunk.buffer(0)).sum(-1).sqrt_()
    return lengths, lengths.clamp(min=SHORTEST).reciprocal_()


def _factors(length: Tensor, s: Tensor, t: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of −teacher and of student in ∂(1 − cosine), 0 without a direction."""
    s = torch.where(length > SHORTEST, s, 0)
    return t * s, cosine * s.square()


def _cosines(chunk: Chunk, number: Number) -> Values:
    (length, s), (_, t) = _inverse(chunk.student, chunk), _inverse(chunk.teacher, chunk)
    cosine = torch.mul(chunk.student, chunk.teacher, out=chunk.buffer(0)).sum(-1).mul_(s).mul_(t)
    return 1 - cosine, *_factors(length, s, t, cosine)


def _normalized_squares(chunk: Chunk, number: Number) -> Values:
    (length, s), (of_teacher, t) = _inverse(chunk.student, chunk), _inverse(chunk.teacher, chunk)
    d = torch.mul(chunk.student, s[..., None], out=chunk.buffer(0))
    # a difference of directions keeps the digits that 1 − cosine would lose
    squares = d.addcmul_(chunk.teacher, t[..., None], value=-1).square_().sum(-1)
    cosine = (1 + of_teacher.mul_(t).square_() - squares) / 2
    of_slope, n = _factors(length, s, t, cosine), chunk.student.shape[-1]
    return squares / n, *(x * (2 / n) for x in of_slope)


def _direction_slopes(chunk: Chunk, number: Number, known: Sequence[Tensor], out: Tensor) -> None:
    factor, of_teacher, of_student = known
    torch.mul(chunk.student, factor * of_student, out=out)
    out.addcmul_(chunk.teacher, factor * of_teacher, value=-1)


def _power_sums(chunk: Chunk, p: Number) -> Values:
    x, buffer = chunk.student, chunk.buffer(0)
    if is_exactly(p, 2):
        return (torch.mul(x, x, out=buffer).sum(-1),)
    return (torch.abs(x, out=buffer).pow_(p).sum(-1),)


def _power_slopes(chunk: Chunk, p: Number, known: Sequence[Tensor], out: Tensor) -> None:
    if is_exactly(p, 2):
        torch.mul(chunk.student, 2 * known[0], out=out)
        return
    powers = torch.abs(chunk.student, out=chunk.buffer(0))
    # the magnitude is not 0, because below p = 1 the power of that is infinite
    powers.clamp_(min=torch.finfo(powers.dtype).tiny).pow_(p - 1)
    torch.sign(chunk.student, out=out).mul_(powers).mul_(p * known[0])


def _maxima(chunk: Chunk, p: Number) -> Values:
    magnitudes = torch.abs(chunk.student, out=chunk.buffer(0))
    top = magnitudes.amax(-1)
    n_largest = magnitudes.eq_(top[..., None]).sum(-1)
    slope = top.clamp(min=torch.finfo(top.dtype).tiny).pow_(p - 1).mul_(p)
    return top**p, top, slope / n_largest


def _maximum_slopes(chunk: Chunk, p: Number, known: Sequence[Tensor], out: Tensor) -> None:
    factor, top, slope = known
    are_largest = torch.abs(chunk.student, out=chunk.buffer(0)).eq_(top)
    torch.sign(chunk.student, out=out).mul_(are_largest).mul_(factor * slope)


_VALUES: dict[str, Callable[[Chunk, Number], Values]] = {
    "mse": _squares,
    "smooth_l1": _penalties,
    "cosine": _cosines,
    "normalized_mse": _normalized_squares,
    "sum": _power_sums,
    "max": _maxima,
}
_SLOPES: dict[str, Callable[[Chunk, Number, Sequence[Tensor], Tensor], None]] = {
    "mse": _square_slopes,
    "smooth_l1": _penalty_slopes,
    "cosine": _direction_slopes,
    "normalized_mse": _direction_slopes,
    "sum": _power_slopes,
    "max": _maximum_slopes,
}


# ------------------------------------------------------------------------- positions and chunks


def _dtype(problem: Moments) -> torch.dtype:
    teacher = problem.teacher
    return compute_dtype(problem.student, *([] if teacher is None else [teacher]))


def _number(problem: Moments) -> Number:
    """Return the number in the compute dtype; a beta of 0 as what is next to it."""
    number, dtype = problem.number, _dtype(problem)
    if isinstance(number, Tensor):
        number = number.to(dtype)
    if problem.kind != "smooth_l1":
        return number
    least = torch.finfo(dtype).tiny
    return number.clamp(min=least) if isinstance(number, Tensor) else max(number, least)


def _weights(problem: Moments, at: Places, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Return which positions of a chunk [b, n] count, and their weights."""
    mask, weights = (
        x if x is None or x.ndim == 2 else x.reshape(-1, x.shape[-1])
        for x in (problem.row_mask, problem.weights)
    )
    counts = None if mask is None else mask[at]
    if weights is None:
        return counts, None
    weights = weights[at].to(dtype)
    return weights != 0 if counts is None else counts & (weights != 0), weights


def _blocks(features: Tensor) -> Tensor:
    """Return features [B, P, C]; more dimensions of examples are made one."""
    return features if features.ndim == 3 else features.reshape(-1, *features.shape[-2:])


class _Buffers:
    """The buffers of a worker, each of which is made when a chunk first asks for it."""

    def __init__(self, features: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.made: dict[int, Tensor] = {}
        b, n, n_features = shape
        if features.stride(-1) <= features.stride(-2):
            self.new = lambda: in_huge_pages(features.new_empty(shape, dtype=dtype))
        else:  # features of a channel lie together
            shape = (b, n_features, n)
            self.new = lambda: in_huge_pages(features.new_empty(shape, dtype=dtype)).mT

    def of(self, chunk: Tensor, i: int) -> Tensor:
        """Return the part of a buffer that is as large as the chunk."""
        if i not in self.made:
            self.made[i] = self.new()
        return self.made[i][: chunk.shape[0], : chunk.shape[1]]


def _for_chunks(
    work: Callable[[Places, Chunk, Tensor | None], None], problem: Moments, gradient: Tensor | None
) -> None:
    """Call `work` with the places of each chunk, the chunk, and its part of the gradient."""
    student = _blocks(problem.student)
    teacher = None if problem.teacher is None else _blocks(problem.teacher)
    n_examples, n_positions, n_features = student.shape
    if not student.numel():
        return
    dtype, most = _dtype(problem), most_elements(student, _ON_CPU, _ELSEWHERE)
    if student.numel() <= most:
        s = student.to(dtype)
        t = s if teacher is None else teacher.to(dtype)
        work((slice(None), slice(None)), Chunk(s, t, lambda i: None), gradient)
        return
    whole = min(n_examples, most // (n_positions * n_features))  # examples that fit into a chunk
    part = n_positions if whole else max(1, min(n_positions, most // n_features))

    def of_chunk(places: slice, buffers: _Buffers) -> None:
        if whole:
            at = (places, slice(None))
        else:
            i, first = divmod(places.start, n_positions)
            at = (slice(i, i + 1), slice(first, first + places.stop - places.start))
        s = student[at]
        t = s if teacher is None else teacher[at]
        if s.dtype != dtype:
            s = buffers.of(s, 2).copy_(s)
        if teacher is None:
            t = s
        elif t.dtype != dtype:
            t = buffers.of(t, 3).copy_(t)
        chunk = Chunk(s, t, functools.partial(buffers.of, s))
        work(at, chunk, None if gradient is None else gradient[at])

    if whole:
        chunks = cut(range(n_examples), whole)
    else:
        ranges = (range(i * n_positions, (i + 1) * n_positions) for i in range(n_examples))
        chunks = [chunk for each in ranges for chunk in cut(each, part)]
    buffers = functools.partial(_Buffers, student, (max(whole, 1), part, n_features), dtype)
    by_workers(lambda: for_each(of_chunk, chunks, buffers), len(chunks) > 1, student)
