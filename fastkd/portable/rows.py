"""Solve `Rows` in PyTorch, for any device: divergences between softmax rows.

Every D = Σ d(log p, log q) has ∂D/∂student = (h − q Σ h) / T with h = ∂d/∂log q, known up to a
multiple of q: a divergence is a value and a slope, which `_row_terms` has.

Rows are taken in chunks that stay in the cache. Where one chunk holds all of them, or where it is
known what the losses are multiplied by, the forward makes value and slope at once and keeps the
gradient. Otherwise the backward computes the softmaxes again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd._pages import in_huge_pages
from fastkd._precision import compute_dtype
from fastkd._reduction import weighted_sum
from fastkd.portable._chunks import most_elements, with_buffers
from fastkd.portable._row_chunks import (
    FEW,
    ON_CPU,
    at,
    factors_of,
    for_chunks,
    foresees_weight,
    has_zeros,
    in_compute_dtype,
    is_written_at_once,
    joined,
    rescale,
    select,
    with_views,
)
from fastkd.portable._row_labels import (
    Targets,
    cross_entropy,
    cross_entropy_factor,
    cross_entropy_slope,
    targets_of,
    without_label,
)
from fastkd.portable._row_terms import CENTRED, N_SCRATCH, logit_mse, terms_of
from fastkd.portable._softmaxes import (
    Moments,
    Scratch,
    Softmax,
    add_slope_of_deviation,
    at_1,
    centre,
    certain_rows,
    moments_of,
    softmax,
)
from fastkd.problems._temperatures import EPSILON
from fastkd.problems.corrected import weight_of_soft_label, weighted
from fastkd.problems.rows import Rows

_NO_SCRATCH = (None,) * N_SCRATCH
_WEIGHTED, _NORMALIZED = "weighted_soft_cross_entropy", "normalized_soft_cross_entropy"

Losses = tuple[Tensor, Tensor | None]  # the second one where there are labels


def n_statistics(problem: Rows) -> int:
    """Return how many numbers of each row `forward` saves where it does not save the gradient.

    They are the largest logit and Z of both networks, Σ q·v where the value takes it too or the
    weight of the row, and the student's Z at T = 1 with labels; or the sum of squares. Without a
    divergence they are the student's alone.
    """
    if problem.divergence == "logit_mse":
        return 1
    if not problem.divergence:
        return 3
    has_mean = problem.divergence in (*CENTRED, _WEIGHTED, _NORMALIZED)
    return 4 + has_mean + (problem.labels is not None)


def forward(problem: Rows, needs_grad: Sequence[bool]) -> tuple[Losses, tuple[Any, ...]]:
    """Return rows of scale · divergence and of cross-entropy, and what the backward needs.

    That is None and the gradient of each of them where one chunk holds all rows; no statistics and
    the gradient of all where it is known what multiplies them; or else the statistics of the
    softmaxes.
    """
    problem = in_compute_dtype(problem)
    student = problem.student
    # cross-entropies are multiplied by something else, and need a place of the slope that is added
    dtype = compute_dtype(student, problem.teacher)
    is_addable = problem.adds_cross_entropy and is_written_at_once(student, dtype)
    has_one_loss = problem.labels is None or is_addable or problem.divergence == _WEIGHTED
    if needs_grad[0] and has_one_loss and foresees_weight(problem):
        gradient = in_huge_pages(torch.empty_like(student))
        found, _ = value_and_gradients(
            problem, needs_grad, row_weights=problem.row_weight, gradient=gradient
        )
        return found, (student.new_empty((*student.shape[:-1], 0), dtype=dtype), gradient)
    is_small = student.numel() <= most_elements(student, ON_CPU, 0)
    is_kept = student.is_cpu and is_small and not problem.adds_cross_entropy
    if needs_grad[0] and problem.divergence and is_kept:
        solved = _losses_and_gradients(problem)
        if solved is not None:
            return solved
    losses, cross_entropies = _empty_losses(problem)
    examples, width = student.shape[:-1], n_statistics(problem)
    targets, table = targets_of(problem), losses.new_empty(examples.numel(), 1 + width)
    apart = _classes(problem.apart)

    def work(rows: slice, chunks: Sequence[Tensor], scratch: Scratch) -> None:
        z, z_teacher = chunks
        terms = weight = None
        if problem.divergence == "logit_mse":
            squares, terms = logit_mse(z, z_teacher, losses.dtype, scratch)
            known = [squares]
        else:
            beside = None if apart is None else apart[rows]
            of_student, of_teacher, _ = _temperatures(problem, rows, z, z_teacher, losses.dtype)
            q = softmax(z, of_student, losses.dtype, scratch[:2], apart=beside)
            totals = []
            if targets is not None and cross_entropies is not None:
                own, (_, total) = targets.of(rows), at_1(q, of_student, scratch[2])
                of_labels = cross_entropy(q, total, of_student, own, scratch[2])
                cross_entropies.view(-1, 1)[rows] = of_labels
                totals = [total]
            known = [q.top, q.total, *totals]
            if problem.divergence:
                p = softmax(z_teacher, of_teacher, losses.dtype, scratch[2:4], apart=beside)
                if problem.divergence in (_WEIGHTED, _NORMALIZED):
                    weight = _weight(problem, of_labels, p, of_teacher, own, scratch[4])
                terms = terms_of(problem.divergence, q, p, problem.weight, scratch[4:])
                means = [x for x in (terms.mean, weight) if x is not None]
                known = [q.top, q.total, p.top, p.total, *means, *totals]
        value = terms.value(problem.scale) if terms else torch.zeros_like(known[0])
        if problem.divergence == _WEIGHTED and weight is not None:
            value = weighted(value, weight)
        if problem.adds_cross_entropy:
            value = _sum_of_both(problem, value, of_labels, weight)
        torch.cat([value, *known], 1, out=table[rows])

    for_chunks(work, _n_scratch(problem), student, problem.teacher)
    losses.view(-1).copy_(table[:, 0])
    statistics = table[:, 1:].contiguous().view(*examples, width)
    return _masked(problem, losses, cross_entropies), (statistics,)


def backward(
    problem: Rows,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    foreseen: Tensor | None = None,
) -> Tensor:
    """Return Σ upstream · ∂losses + Σ upstream · ∂cross-entropies with respect to the student."""
    problem = in_compute_dtype(problem)
    of_losses, _ = upstream
    if foreseen is not None and of_losses is not None:
        if rescale(foreseen, of_losses, problem.row_weight, statistics.dtype):
            return foreseen
    # in the order of the student's strides
    found = in_huge_pages(torch.empty_like(problem.student)) if foreseen is None else foreseen
    if not statistics.shape[-1]:  # the forward foresaw another upstream gradient
        value_and_gradients(problem, (True,), row_weights=of_losses, gradient=found)
        return found
    gradient = with_views(found)
    _fill(gradient, problem, statistics, *factors_of(problem, *upstream))
    return found if gradient is found else found.copy_(gradient)


def value_and_gradients(
    problem: Rows,
    needs_grad: Sequence[bool],
    *,
    row_weights: Number | None = None,
    ce_weights: Tensor | None = None,
    in_place: bool = False,
    is_wide: bool = True,
    gradient: Tensor | None = None,
) -> tuple[Losses, tuple[Tensor | None]]:
    """Return the losses, and the gradient of Σ row_weights · losses + Σ ce_weights · them.

    It is for a caller that knows the weights beforehand, often on chunks of logits that are thrown
    away afterwards: `in_place` writes the gradient over the student. Without the name of a
    divergence there is the cross-entropy alone. The gradient is in the compute dtype anyway, unless
    there is a place for it; one without cross-entropies may have any dtype and strides.
    """
    problem = in_compute_dtype(problem)
    student, dtype = problem.student, compute_dtype(problem.student, problem.teacher)
    if problem.divergence and not needs_grad[0]:
        return forward(problem, (False,))[0], (None,)
    place = gradient
    if gradient is not None:
        gradient = with_views(gradient)
    elif needs_grad[0]:
        gradient = student
        if not in_place:  # contiguous, because chunks of other strides may be no views of it
            kept = torch.contiguous_format
            gradient = torch.empty_like(student, dtype=dtype, memory_format=kept)
    weights = 1.0 if row_weights is None else row_weights
    factors, ce_factors = factors_of(problem, weights, ce_weights)
    assert factors is not None
    factors = factors * (problem.scale * problem.share)
    targets, apart = targets_of(problem), _classes(problem.apart)
    is_masked = has_zeros(factors)
    in_scratch = gradient is not None and not is_written_at_once(gradient, dtype)

    def work(rows: slice, chunks: Sequence[Tensor], scratch: Scratch) -> Losses:
        z, z_teacher, *out = chunks
        beside = None if apart is None else at(apart, rows)
        of_student, of_teacher, moments = _temperatures(problem, rows, z, z_teacher, dtype)
        q = softmax(z, of_student, dtype, scratch[:2], apart=beside)
        slope, certain, weight = out[0] if out else None, None, None
        value, of_labels, totals = None, None, [q.total]
        if slope is not None and in_scratch:
            slope = torch.empty_like(z, dtype=dtype) if scratch[-1] is None else scratch[-1]
        if targets is not None:
            own, (e_at_1, total) = targets.of(rows), at_1(q, of_student, scratch[-1])
            of_labels = cross_entropy(q, total, of_student, own, scratch[2])
            totals = [q.total] if ce_factors is None or total is q.total else [q.total, total]
        if problem.divergence:
            p = softmax(z_teacher, of_teacher, dtype, scratch[2:4], apart=beside)
            if of_labels is not None and problem.divergence in (_WEIGHTED, _NORMALIZED):
                weight = _weight(problem, of_labels, p, of_teacher, own, scratch[4])
        if slope is not None:
            certain = certain_rows(q.d, totals)
        if slope is not None and targets is not None and ce_factors is not None:
            ce_factor = at(ce_factors, rows)
            if problem.divergence == _NORMALIZED and weight is not None:
                ce_factor = weighted(weight, ce_factor)
            ce_factor = cross_entropy_factor(q, total, of_student, own, ce_factor)
            cross_entropy_slope(e_at_1, total, own, ce_factor, slope)
            if has_zeros(ce_factor):
                select(slope, ce_factor)
        if problem.divergence:
            terms = terms_of(problem.divergence, q, p, problem.weight, scratch[4:])
            value, factor = terms.value(problem.scale), at(factors, rows)
            if problem.divergence == _WEIGHTED and weight is not None:
                value, factor = weighted(value, weight), weighted(weight, factor)
            if problem.adds_cross_entropy and of_labels is not None:
                value = _sum_of_both(problem, value, of_labels, weight)
            if slope is not None:
                of_terms = slope if ce_factors is None else terms.spare
                terms.slope(of_terms, factor / of_student)
                if moments is not None:
                    centre(of_terms, certain)
                    add_slope_of_deviation(of_terms, moments)
                if is_masked if weight is None else has_zeros(factor):
                    select(of_terms, factor)
                if of_terms is not slope:
                    slope.add_(of_terms)
        elif slope is not None and ce_factors is None:
            slope.zero_()
        if slope is not None:
            centre(slope, certain)
            if in_scratch:
                out[0].copy_(slope)
        value = torch.zeros_like(q.total) if value is None else value
        return value, None if problem.adds_cross_entropy else of_labels

    tensors = [student, problem.teacher] + ([] if gradient is None else [gradient])
    if found := for_chunks(work, _n_scratch(problem, in_scratch), *tensors):
        losses, cross_entropies = (joined(x, student) for x in zip(*found, strict=True))
    else:
        losses, cross_entropies = _empty_losses(problem)
    if place is not None and gradient is not None and place is not gradient:
        gradient = place.copy_(gradient)
    return _masked(problem, losses, cross_entropies), (gradient,)


def _losses_and_gradients(problem: Rows) -> tuple[Losses, tuple[Any, ...]] | None:
    """Return what `forward` does for a small problem, with the gradients, in one pass.

    None stands for losses that are not finite: a row with a NaN may have no gradient upstream, and
    `backward` has to leave it out then.
    """
    z, z_teacher = _matrix(problem.student), _matrix(problem.teacher)
    if z.numel() <= FEW:
        return _in_one_pass(problem, z, z_teacher, None)
    return with_buffers(
        lambda scratch: _in_one_pass(problem, z, z_teacher, scratch),
        (_n_scratch(problem), *z.shape),
        compute_dtype(z, z_teacher),
        z,
    )


def _in_one_pass(
    problem: Rows, z: Tensor, z_teacher: Tensor, buffers: Scratch | None
) -> tuple[Losses, tuple[Any, ...]] | None:
    student, targets, cross_entropies, ce_slopes = problem.student, targets_of(problem), None, None
    targets, examples = None if targets is None else targets.of(slice(None)), student.shape[:-1]
    dtype, slopes, certain, weight = compute_dtype(z, z_teacher), None, None, None
    of_student, moments = problem.student_temperature, None
    scratch = _NO_SCRATCH if buffers is None else buffers
    if buffers is not None:
        slopes = torch.empty_like(z, dtype=dtype)
    if problem.divergence == "logit_mse":
        _, terms = logit_mse(z, z_teacher, dtype, scratch)
    else:
        beside = _classes(problem.apart)
        of_student, of_teacher, moments = _temperatures(problem, slice(None), z, z_teacher, dtype)
        q = softmax(z, of_student, dtype, scratch[:2], apart=beside)
        if targets is not None and problem.divergence != _WEIGHTED:
            masked = without_label(problem)
            cross_entropies, ce_slopes = _of_labels(q, of_student, targets, masked, scratch[2:4])
        certain = certain_rows(q.d, [q.total])
        p = softmax(z_teacher, of_teacher, dtype, scratch[2:4], apart=beside)
        if targets is not None and problem.divergence == _WEIGHTED:
            _, total = at_1(q, of_student, scratch[4])
            cross_entropies = cross_entropy(q, total, of_student, targets, scratch[4])
            weight = _weight(problem, cross_entropies, p, of_teacher, targets, scratch[4])
        terms = terms_of(problem.divergence, q, p, problem.weight, scratch[4:])
    losses, factor = terms.value(problem.scale), problem.scale
    slopes = terms.spare if slopes is None else slopes
    if weight is not None:
        losses, factor = weighted(losses, weight), weight * factor
    terms.slope(slopes, factor / of_student)
    centre(slopes, certain)
    if moments is not None:
        add_slope_of_deviation(slopes, moments)
    if problem.row_mask is not None:
        masked = ~problem.row_mask.reshape(-1, 1)
        losses.masked_fill_(masked, 0)
        slopes.masked_fill_(masked, 0)
    total = losses.sum()
    if cross_entropies is not None and ce_slopes is not None:
        total += cross_entropies.sum()
        ce_slopes = ce_slopes.view(student.shape)
    if cross_entropies is not None:
        cross_entropies = cross_entropies.view(examples)
    if not math.isfinite(total.item()):
        return None
    if student.ndim != 2:
        slopes = slopes.view(student.shape)
    if not student.is_contiguous():  # the gradient is laid out as in `backward`
        slopes = torch.empty_like(student, dtype=dtype).copy_(slopes)
    return (losses.view(examples), cross_entropies), (None, slopes, ce_slopes)


def _of_labels(
    q: Softmax, temperature: Number, targets: Targets, masked: Tensor | None, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropies with the labels and their gradient in the logits."""
    e, total = at_1(q, temperature, scratch[0])
    losses = cross_entropy(q, total, temperature, targets, scratch[1])
    factor = cross_entropy_factor(q, total, temperature, targets, 1.0)
    slopes = cross_entropy_slope(e, total, targets, factor, torch.empty_like(e))
    centre(slopes, certain_rows(q.d, [total]))
    if masked is not None and (masked := masked.reshape(-1, 1)).any():
        return losses.masked_fill_(masked, 0), slopes.masked_fill_(masked, 0)
    return losses, slopes


def _weight(
    problem: Rows,
    of_student: Tensor,
    p: Softmax,
    temperature: Number,
    targets: Targets,
    out: Tensor | None,
) -> Tensor:
    """Return rows [R, 1] of the weight of a soft label, from the student's cross-entropy.

    Where the losses are normalised, it is the teacher's probability of the label.
    """
    _, total = at_1(p, temperature, out)
    of_teacher = cross_entropy(p, total, temperature, targets, out)
    if problem.divergence == _NORMALIZED:
        return of_teacher.neg_().exp_()
    return weight_of_soft_label(of_student, of_teacher)


def _sum_of_both(
    problem: Rows, divergences: Tensor, cross_entropies: Tensor, weight: Tensor | None
) -> Tensor:
    """Return the losses of rows [R, 1] with their cross-entropies, as they are added elsewhere."""
    if weight is not None:
        cross_entropies = weighted(cross_entropies, weight)
    return weighted_sum([(problem.ce_scale, cross_entropies), (problem.share, divergences)])


def _matrix(logits: Tensor) -> Tensor:
    """Return the logits as contiguous rows."""
    if logits.ndim != 2:
        logits = logits.reshape(-1, logits.shape[-1])
    return logits.contiguous()


def _fill(
    gradient: Tensor,
    problem: Rows,
    statistics: Tensor,
    factors: Number | None,
    ce_factors: Number | None,
) -> None:
    """Write the gradient, which may be the student itself."""
    dtype, targets, apart = statistics.dtype, targets_of(problem), _classes(problem.apart)
    in_scratch = gradient is problem.student or not is_written_at_once(gradient, dtype)
    n_rows, width = problem.student.shape[:-1].numel(), statistics.shape[-1]
    table = statistics.reshape(n_rows, width, 1)
    scaled = None if factors is None else factors * (problem.scale * problem.share)
    has_masked = factors is not None and has_zeros(factors)

    def work(rows: slice, chunks: Sequence[Tensor], scratch: Scratch) -> None:
        z, z_teacher, out = chunks
        slope = scratch[-1] if in_scratch else out
        if slope is None:
            slope = torch.empty_like(z, dtype=dtype)
        known = table[rows].unbind(1)
        beside = None if apart is None else apart[rows]
        totals = [] if problem.divergence == "logit_mse" else [known[1]]
        totals += [known[-1]] if ce_factors is not None and targets is not None else []
        certain = certain_rows(z, totals) if totals and beside is None else None
        if factors is None or scaled is None or not problem.divergence:
            slope.zero_()
        else:
            of_student, moments = problem.student_temperature, None
            if problem.divergence == "logit_mse":
                _, terms = logit_mse(z, z_teacher, dtype, (slope,), known[0])
            else:
                of_student, of_teacher, moments = _temperatures(problem, rows, z, z_teacher, dtype)
                q = softmax(z, of_student, dtype, scratch[:2], known[:2], apart=beside)
                if beside is not None:
                    certain = certain_rows(q.d, totals)
                p = softmax(
                    z_teacher, of_teacher, dtype, scratch[2:4], known[2:4],
                    problem.divergence != "reverse_kl", beside,
                )  # fmt: skip
                mean = known[4] if problem.divergence in CENTRED else None
                terms = terms_of(problem.divergence, q, p, problem.weight, scratch[4:], mean)
            factor = at(scaled, rows)
            if problem.divergence == _WEIGHTED:
                factor = weighted(known[4], factor)
            terms.slope(slope, factor / of_student)
            if moments is not None:
                centre(slope, certain)
                add_slope_of_deviation(slope, moments)
            if has_masked or problem.divergence == _WEIGHTED:
                select(slope, factor)
        if ce_factors is not None and targets is not None:
            q = softmax(z, 1.0, dtype, scratch, (known[0], known[-1]), apart=beside)
            if beside is not None:
                certain = certain_rows(q.d, totals)
            own = targets.of(rows)
            ce_factor = at(ce_factors, rows)
            if problem.divergence == _NORMALIZED:
                ce_factor = weighted(known[4], ce_factor)
            ce_factor = cross_entropy_factor(q, q.total, 1.0, own, ce_factor)
            slope.add_(select(cross_entropy_slope(q.e, q.total, own, ce_factor, q.e), ce_factor))
        centre(slope, certain)
        if in_scratch:
            out.copy_(slope)

    for_chunks(work, _n_scratch(problem, in_scratch), problem.student, problem.teacher, gradient)


# ------------------------------------------------------------------------- rows, chunks and masks


def _n_scratch(problem: Rows, in_scratch: bool = False) -> int:
    """Return how many buffers a chunk needs, the last one for slopes that are made in scratch."""
    if problem.divergence == "logit_mse" and problem.labels is None:
        return 1
    if problem.divergence == "forward_kl":
        # d and e of both networks, and the student's e at a temperature of 1
        return 4 + (in_scratch or problem.labels is not None)
    return N_SCRATCH


def _empty_losses(problem: Rows) -> Losses:
    """Return places for rows of divergence and, with labels, of cross-entropy."""
    dtype, examples = compute_dtype(problem.student, problem.teacher), problem.student.shape[:-1]
    losses = problem.student.new_empty(examples, dtype=dtype)
    return losses, None if problem.labels is None else torch.empty_like(losses)


def _masked(problem: Rows, losses: Tensor, cross_entropies: Tensor | None) -> Losses:
    if problem.row_mask is not None:
        losses.masked_fill_(~problem.row_mask, 0)
    masked = without_label(problem)
    if cross_entropies is not None and masked is not None:
        cross_entropies.masked_fill_(masked, 0)
    return losses, cross_entropies


def _temperatures(
    problem: Rows, rows: slice, z: Tensor, z_teacher: Tensor, dtype: torch.dtype
) -> tuple[Number, Number, Moments | None]:
    """Return both networks' temperatures, and the moments of the student's rows, if asked for.

    Standardised logits are logits that have their deviation for a temperature.
    """
    student, teacher = (
        x.reshape(-1, 1)[rows] if isinstance(x, Tensor) and x.ndim else x
        for x in (problem.student_temperature, problem.teacher_temperature)
    )
    if not problem.standardized:
        return student, teacher, None
    known, of_teacher = moments_of(z, dtype), moments_of(z_teacher, dtype)
    return (
        (known.deviation + EPSILON) * student,
        (of_teacher.deviation + EPSILON) * teacher,
        known,
    )


def _classes(labels: Tensor | None) -> Tensor | None:
    """Return the classes as a column, where a masked row has any."""
    return None if labels is None else labels.reshape(-1, 1).clamp(min=0)
