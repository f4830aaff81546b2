"""Solve `Corrected` in PyTorch, for any device: rows whose teacher a label has corrected.

The corrected teacher is share · e with e = exp2(d) of the teacher's logits, but for the label,
which has a probability t of its own. With d of both networks in log2 units and Z of the student

    KL = share Σ e (d − d_q) + t (log2 (t / share) − d_q) + log2 (share Z)

with a sum over the other classes and d_q of the label. Where the student is like the teacher all
terms are small, so that they lose no digits to each other. The teacher's row is seen once, and no
corrected row is stored. As in `rows`, the backward computes the softmaxes again unless one chunk
holds all rows or it is known what the losses are multiplied by; `share` and `t` are among the
statistics.
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
from fastkd.portable._row_chunks import (
    ON_CPU,
    at,
    for_chunks,
    foresees_weight,
    has_zeros,
    is_written_at_once,
    joined,
    rescale,
    select,
    with_views,
)
from fastkd.portable._softmaxes import Scratch, Softmax, centre, certain_rows, softmax
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
    """Return rows of scale · KL, and statistics or, where `rows` makes them too, gradients."""
    problem = _in_compute_dtype(problem)
    student, dtype = problem.student, _dtype_of(problem)
    if needs_grad[0] and foresees_weight(problem):
        gradient = in_huge_pages(torch.empty_like(student))
        losses = _solve(problem, problem.row_weight, gradient)
        return (losses,), (losses.new_empty((*losses.shape, 0)), gradient)
    is_counted = problem.labels.reshape(-1, 1) >= 0
    if needs_grad[0] and student.is_cpu and student.numel() <= most_elements(student, ON_CPU, 0):
        gradient = torch.empty_like(student, dtype=dtype)
        losses = _solve(problem, is_counted.to(dtype), gradient)
        losses.view(-1, 1).masked_fill_(~is_counted, 0)
        # a row with a NaN may have no gradient upstream, and `backward` leaves it out then
        if math.isfinite(losses.sum().item()):
            return (losses,), (None, gradient)
    losses = student.new_empty(student.shape[:-1], dtype=dtype)
    column, n_numbers = losses.view(-1, 1), n_statistics(problem)
    table = losses.new_empty((len(column), n_numbers))
    labels = problem.labels.reshape(-1, 1).clamp(min=0)

    def work(rows: slice, chunks: Sequence[Tensor], scratch: Scratch) -> None:
        q, p, target = _networks(problem, chunks, labels[rows], dtype, scratch)
        top = q.top if p is None else p.top
        torch.cat([q.top, q.total, top, target.share, target.of_label], 1, out=table[rows])
        column[rows] = _value(target, p, q, labels[rows]).mul_(problem.scale)

    for_chunks(work, _N_SCRATCH, student, _teacher_of(problem))
    column.masked_fill_(~is_counted, 0)
    return (losses,), (table.view(*losses.shape, n_numbers),)


def _solve(problem: Corrected, factors: Number, gradient: Tensor) -> Tensor:
    """Return the losses of all rows, and write their gradients times the factors [N, 1]."""
    student, dtype = problem.student, _dtype_of(problem)
    labels = problem.labels.reshape(-1, 1)
    if isinstance(factors, Tensor):  # or else all rows have a label
        labels = labels.clamp(min=0)
    scaled = factors * (problem.scale / problem.student_temperature)
    has_masked = has_zeros(factors)
    out = with_views(gradient)
    in_scratch = not is_written_at_once(out, dtype)

    def work(rows: slice, chunks: Sequence[Tensor], scratch: Scratch) -> Tensor:
        classes, slope = at(labels, rows), scratch[4] if in_scratch else chunks[2]
        if slope is None:
            slope = torch.empty_like(chunks[0], dtype=dtype)
        q, p, target = _networks(problem, chunks, classes, dtype, scratch)
        value = _value(target, p, q, classes).mul_(problem.scale)
        _slope(target, p, q, chunks[0], classes, at(scaled, rows), slope)
        if has_masked:
            select(slope, at(factors, rows))
        if in_scratch:
            chunks[2].copy_(slope)
        return value

    found = for_chunks(work, _N_SCRATCH, student, _teacher_of(problem), out)
    if out is not gradient:
        gradient.copy_(out)
    return joined(found, student) if found else student.new_empty(student.shape[:-1], dtype=dtype)


def backward(
    problem: Corrected,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    foreseen: Tensor | None = None,
) -> Tensor:
    """Return Σ upstream · ∂losses with respect to the student, in `foreseen` if it is there."""
    problem = _in_compute_dtype(problem)
    student, dtype = problem.student, statistics.dtype
    (given,) = upstream
    assert given is not None
    if foreseen is not None and rescale(foreseen, given, problem.row_weight, dtype):
        return foreseen
    # in the order of the student's strides
    found = in_huge_pages(torch.empty_like(student)) if foreseen is None else foreseen
    is_counted = problem.labels.reshape(-1, 1) >= 0
    factors = torch.where(is_counted, given.reshape(-1, 1).to(dtype), 0)
    if not statistics.shape[-1]:  # the forward foresaw another upstream gradient
        _solve(problem, factors, found)
        return found
    gradient = with_views(found)
    in_scratch = not is_written_at_once(gradient, dtype)
    labels = problem.labels.reshape(-1, 1).clamp(min=0)
    scaled = factors * (problem.scale / problem.student_temperature)
    has_masked = has_zeros(factors)
    table = statistics.reshape(-1, n_statistics(problem), 1)

    def work(rows: slice, chunks: Sequence[Tensor], scratch: Scratch) -> None:
        z, z_teacher, out = chunks
        classes = labels[rows]
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

    for_chunks(work, _N_SCRATCH, student, _teacher_of(problem), gradient)
    return found if gradient is found else found.copy_(gradient)


def _teacher_of(problem: Corrected) -> Tensor:
    """Return the teacher's logits, those of the student where there is none."""
    return problem.student if problem.teacher is None else problem.teacher


def _networks(
    problem: Corrected,
    chunks: Sequence[Tensor],
    classes: Tensor,
    dtype: torch.dtype,
    scratch: Scratch,
) -> tuple[Softmax, Softmax | None, _Target]:
    """Return the softmaxes of both networks, the teacher's with 0 at the labels, and the target."""
    z, z_teacher, *_ = chunks
    q, p = softmax(z, problem.student_temperature, dtype, scratch[:2]), None
    if problem.teacher is not None:
        p = softmax(z_teacher, problem.teacher_temperature, dtype, scratch[2:4])
    return q, p, _target_of(problem, p, q, classes)


def _target_of(problem: Corrected, p: Softmax | None, q: Softmax, classes: Tensor) -> _Target:
    """Return the corrected teacher of rows, and zero the labels among the e of the teacher."""
    correction = problem.correction
    if p is None:
        log_odds = torch.zeros_like(q.total) + correction
        return _Target((-log_odds).sigmoid_() / max(q.e.shape[1] - 1, 1), log_odds.sigmoid())
    label = p.e.gather(1, classes)  # over Z, as all that follows is
    p.e.scatter_(1, classes, 0)
    others = p.e.sum(-1, keepdim=True)
    of_teacher = label / p.total
    # where another class wins, (1 − correction) / (1 + behind) of the teacher is kept
    behind = (1 - label) / p.total
    kept = (1 - correction) / (1 + behind)
    lifted = (behind + correction + of_teacher * (1 - correction)).div_(1 + behind)
    # where the label wins, its probability grows by the correction, up to 1
    left = (others / p.total - correction).clamp_(min=0)
    raised = torch.where(left == 0, 1, of_teacher + correction)
    is_behind = label < 1
    # where the teacher has no others, none are left
    left.div_(others.clamp_(min=torch.finfo(others.dtype).tiny))
    share = torch.where(is_behind, kept.div_(p.total), left)
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
