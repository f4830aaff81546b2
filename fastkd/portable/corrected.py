"""Solve `Corrected` in PyTorch, for any device: rows whose teacher a label has corrected.

The corrected teacher is share · e with e = exp2(d) of the teacher's logits, but for the label,
which has a probability t of its own. With d of both networks in log2 units and Z of the student

    KL = share Σ e (d − d_q) + t (log2 (t / share) − d_q) + log2 (share Z)

with a sum over the other classes and d_q of the label. Where the student is like the teacher all
terms are small, so that they lose no digits to each other. The teacher's row is seen once, and no
corrected row is stored. As in `rows`, the backward computes the softmaxes again unless one chunk
holds all rows; `share` and `t` are among the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd._pages import in_huge_pages
from fastkd._precision import compute_dtype
from fastkd.portable._chunks import most_elements
from fastkd.portable._row_chunks import ON_CPU, for_chunks, select
from fastkd.portable._row_terms import Scratch, Softmax, centre, certain_rows, softmax
from fastkd.problems.corrected import Corrected

_LN2 = math.log(2)
_N_SCRATCH = 5  # buffers of a chunk: d and e of both networks, and a slope


class _Target(NamedTuple):
    """A corrected teacher: share · e of the other classes, and t of the label."""

    share: Tensor  # [R, 1]
    of_label: Tensor  # [R, 1]


def n_statistics(problem: Corrected) -> int:
    """Return how many numbers of each row the backward needs.

    They are the largest logits, the student's Z, and the share and the label of the target.
    """
    return 5


def forward(
    problem: Corrected, needs_grad: Sequence[bool]
) -> tuple[tuple[Tensor], tuple[Any, ...]]:
    """Return rows of scale · KL, and statistics or, where one chunk holds all rows, gradients."""
    problem = _in_compute_dtype(problem)
    student, dtype = problem.student, _dtype_of(problem)
    examples = student.shape[:-1]
    losses = student.new_empty(examples, dtype=dtype)
    statistics = losses.new_empty(*examples, n_statistics(problem))
    gradient = None
    if needs_grad[0] and student.is_cpu and student.numel() <= most_elements(student, ON_CPU, 0):
        gradient = _empty_gradient(student, dtype)
    labels, table = problem.labels.reshape(-1, 1), statistics.view(-1, n_statistics(problem))
    column, unit = losses.view(-1, 1), problem.scale / problem.student_temperature
    uncounted = labels < 0

    def work(rows: slice, chunks: Sequence[Tensor], scratch: Scratch) -> None:
        z, z_teacher, *out = chunks
        classes = labels[rows].clamp(min=0)
        q = softmax(z, problem.student_temperature, dtype, scratch[:2])
        p = None
        if problem.teacher is not None:
            p = softmax(z_teacher, problem.teacher_temperature, dtype, scratch[2:4])
        target = _target_of(problem, p, q, classes)
        top = q.top if p is None else p.top
        torch.cat([q.top, q.total, top, target.share, target.of_label], 1, out=table[rows])
        column[rows] = _value(target, p, q, classes).mul_(problem.scale)
        if out:
            _slope(target, p, q, z, classes, unit, out[0])

    tensors = [student, student if problem.teacher is None else problem.teacher]
    for_chunks(work, _N_SCRATCH, *tensors, *([] if gradient is None else [gradient]))
    column.masked_fill_(uncounted, 0)
    # a row with a NaN may have no gradient upstream, and `backward` leaves it out then
    if gradient is None or not math.isfinite(losses.sum().item()):
        return (losses,), (statistics,)
    if uncounted.any():  # here on a CPU, where a look costs less than a pass
        gradient.masked_fill_(uncounted.view(*examples, 1), 0)
    if student.is_contiguous() or gradient.stride() == student.stride():
        return (losses,), (None, gradient)
    return (losses,), (None, torch.empty_like(student, dtype=dtype).copy_(gradient))


def backward(problem: Corrected, statistics: Tensor, upstream: Sequence[Tensor | None]) -> Tensor:
    """Return Σ upstream · ∂losses with respect to the student."""
    problem = _in_compute_dtype(problem)
    student, dtype = problem.student, statistics.dtype
    found = in_huge_pages(torch.empty_like(student))  # in the order of the student's strides
    gradient = found if student.ndim <= 3 or found.is_contiguous() else _empty_gradient(found)
    in_scratch = gradient.dtype != dtype or (gradient.stride(-1) != 1 and gradient.shape[-1] > 1)
    labels, (given,) = problem.labels.reshape(-1, 1), upstream
    assert given is not None
    factors = torch.where(labels >= 0, given.reshape(-1, 1).to(dtype), 0)
    scaled = factors * (problem.scale / problem.student_temperature)
    # elsewhere than on a CPU a look at the factors would be a host sync
    has_masked = not (factors.is_cpu and bool(factors.all()))
    table = statistics.reshape(-1, n_statistics(problem), 1)

    def work(rows: slice, chunks: Sequence[Tensor], scratch: Scratch) -> None:
        z, z_teacher, out = chunks
        classes = labels[rows].clamp(min=0)
        slope = scratch[4] if in_scratch else out
        if slope is None:
            slope = torch.empty_like(z, dtype=dtype)
        top, total, top_teacher, share, of_label = table[rows].unbind(1)
        q, p = softmax(z, problem.student_temperature, dtype, scratch[:2], (top, total)), None
        if problem.teacher is not None:
            known = top_teacher, total  # its own Z is not needed any more
            p = softmax(z_teacher, problem.teacher_temperature, dtype, scratch[2:4], known)
            p.e.scatter_(1, classes, 0)
        target = _Target(share, of_label)
        _slope(target, p, q, z, classes, scaled[rows], slope)
        if has_masked:
            select(slope, factors[rows])
        if in_scratch:
            out.copy_(slope)

    teacher = student if problem.teacher is None else problem.teacher
    for_chunks(work, _N_SCRATCH, student, teacher, gradient)
    return found if gradient is found else found.copy_(gradient)


def _target_of(problem: Corrected, p: Softmax | None, q: Softmax, classes: Tensor) -> _Target:
    """Return the corrected teacher of rows, and zero the labels among the e of the teacher."""
    correction = problem.correction
    if p is None:
        log_odds = torch.zeros_like(q.total) + correction
        return _Target((-log_odds).sigmoid_() / max(q.e.shape[1] - 1, 1), log_odds.sigmoid())
    label = p.e.gather(1, classes)  # over Z, as all that follows is
    p.e.scatter_(1, classes, 0)
    others = p.e.sum(-1, keepdim=True)
    # where another class wins, (1 − correction) / (1 + behind) of the teacher is kept
    behind = (1 - label) / p.total
    kept = (1 - correction) / (1 + behind)
    lifted = (correction + behind + (1 - correction) * label / p.total) / (1 + behind)
    # where the label wins, its probability grows by the correction, up to 1
    left = (others / p.total - correction).clamp_(min=0)
    raised = torch.where(left == 0, 1, label / p.total + correction)
    is_behind = label < 1
    share = torch.where(is_behind, kept / p.total, torch.where(left == 0, 0, left / others))
    return _Target(share, torch.where(is_behind, lifted, raised))


def _value(target: _Target, p: Softmax | None, q: Softmax, classes: Tensor) -> Tensor:
    """Return rows [R, 1] of KL(target ‖ q); d of both networks are overwritten."""
    share, of_label = target
    at_label = q.d.gather(1, classes)
    if p is None:
        q.d.scatter_(1, classes, 0)
        others = q.d.sum(-1, keepdim=True).neg_()
    else:
        above = p.d.sub_(q.d)
        others = torch.mul(above, p.e, out=above).nansum(-1, keepdim=True)  # 0 · ∞ counts as 0
    is_certain = share == 0
    others = torch.where(is_certain, share, share * others)
    unit = torch.where(is_certain, 1, share)
    label = of_label * (torch.log2(of_label / unit) - at_label)
    bits = others + torch.where(of_label == 0, of_label, label) + (unit * q.total).log2_()
    return bits.mul_(_LN2).relu_()  # rounding alone makes one negative


def _slope(
    target: _Target,
    p: Softmax | None,
    q: Softmax,
    z: Tensor,
    classes: Tensor,
    factor: Number,
    out: Tensor,
) -> None:
    """Write factor · (q − target)."""
    torch.mul(q.e, q.total.reciprocal().mul_(factor), out=out)
    share, of_label = target.share * factor, target.of_label * factor
    at_label = out.gather(1, classes).sub_(of_label)
    if p is None:
        out.sub_(share)
    else:
        out.addcmul_(p.e, share, value=-1)
    out.scatter_(1, classes, at_label)
    centre(out, certain_rows(z, [q.total]))


def _empty_gradient(student: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return room for the gradient of which chunks are views."""
    kept = torch.contiguous_format if student.ndim > 3 else torch.preserve_format
    return torch.empty_like(student, dtype=dtype, memory_format=kept)


def _dtype_of(problem: Corrected) -> torch.dtype:
    return compute_dtype(*(x for x in (problem.student, problem.teacher) if x is not None))


def _in_compute_dtype(problem: Corrected) -> Corrected:
    """Return the problem with the numbers that are tensors in the precision of the logits."""
    dtype = _dtype_of(problem)
    numbers = {
        name: getattr(problem, name).to(dtype)
        for name in ("student_temperature", "teacher_temperature", "correction", "scale")
        if isinstance(getattr(problem, name), Tensor)
    }
    return problem._replace(**numbers) if numbers else problem
