"""Solve `Ensemble` in PyTorch, for any device: divergences from what several teachers say together.

Rows are taken in chunks that stay in the cache, as those of `Rows` are. A chunk's teachers become
one softmax there, which no tensor of the logits' size holds. Since that costs more than the
divergence, the forward makes the gradient too where it knows what the losses are multiplied by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd._pages import in_huge_pages
from fastkd.portable._chunks import most_elements
from fastkd.portable._mixtures import (
    SUMMED,
    chosen_logits,
    mixture,
    summed_terms,
    times,
    weighted_logits,
)
from fastkd.portable._row_chunks import (
    at,
    for_chunks,
    foresees_weight,
    has_zeros,
    rescale,
    select,
    with_views,
)
from fastkd.portable._row_terms import N_SCRATCH, Terms, terms_of
from fastkd.portable._softmaxes import Scratch, Softmax, centre, certain_rows, softmax
from fastkd.problems.ensembles import Ensemble, weights_of_rows
from fastkd.problems.ensembles import compute_dtype_of as compute_dtype_of

_WITH_LOGS = ("reverse_kl", "symmetric_kl")  # in which log p counts where p is 0


def n_statistics(problem: Ensemble) -> int:
    """Return how many numbers of each row `forward` saves: none."""
    return 0


def forward(problem: Ensemble, needs_grad: Sequence[bool]) -> tuple[tuple[Tensor], tuple[Any, ...]]:
    """Return rows of scale · D and what the backward has: the gradient, or nothing.

    It is that of each loss where one chunk holds all rows, or else that for the row weight.
    """
    student, dtype = problem.student, compute_dtype_of(problem)
    statistics = student.new_empty((*student.shape[:-1], 0), dtype=dtype)
    if needs_grad[0] and foresees_weight(problem):
        gradient = in_huge_pages(torch.empty_like(student))
        losses = _solve(problem, _factors(problem) * problem.row_weight, gradient)
        return (losses,), (statistics, gradient)
    if needs_grad[0] and student.is_cpu and student.numel() <= most_elements(student, 1 << 18, 0):
        slopes = torch.empty_like(student, dtype=dtype)
        losses = _solve(problem, _factors(problem), slopes)
        # a row with a NaN may have no gradient upstream, and `backward` has to leave it out then
        if losses.isfinite().all():
            return (losses,), (None, slopes)
    return (_solve(problem, None, None),), (statistics,)


def backward(
    problem: Ensemble,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    foreseen: Tensor | None = None,
) -> Tensor:
    """Return Σ upstream · ∂losses with respect to the student, in `foreseen` if it is there."""
    (of_losses,) = upstream
    assert of_losses is not None
    dtype = compute_dtype_of(problem)
    if foreseen is not None and rescale(foreseen, of_losses, problem.row_weight, dtype):
        return foreseen
    gradient = in_huge_pages(torch.empty_like(problem.student)) if foreseen is None else foreseen
    factors = of_losses.reshape(-1, 1).to(dtype)
    if problem.row_mask is not None:
        factors = torch.where(problem.row_mask.reshape(-1, 1), factors, 0)
    _solve(problem, factors, gradient, needs_losses=False)
    return gradient


def _factors(problem: Ensemble) -> Number:
    """Return 1 for each row that counts, else 0, [N, 1]; or 1 if all of them do."""
    if problem.row_mask is None:
        return 1.0
    return problem.row_mask.reshape(-1, 1).to(compute_dtype_of(problem))


def _solve(
    problem: Ensemble,
    factors: Number | None,
    gradient: Tensor | None,
    needs_losses: bool = True,
) -> Tensor:
    """Return the losses (...), and write factor · ∂loss of each row to the gradient, if any."""
    student, dtype = problem.student, compute_dtype_of(problem)
    losses = student.new_empty(student.shape[:-1], dtype=dtype)
    column, n = losses.view(-1, 1), len(problem.teachers)
    weights = weights_of_rows(problem)
    index = None if problem.teacher_index is None else problem.teacher_index.reshape(-1)
    out = None if gradient is None else with_views(gradient)
    unit = problem.scale / problem.student_temperature
    scaled = None if factors is None else factors * unit
    has_masked = factors is not None and has_zeros(factors)
    in_scratch = out is not None and (
        out.dtype != dtype or (out.stride(-1) != 1 and out.shape[-1] > 1)
    )

    is_loop = problem.combine == "sum" and problem.divergence not in SUMMED

    def terms_of_chunk(
        q: Softmax, z_teachers: Sequence[Tensor], shares: Sequence[Number], scratch: Scratch
    ) -> Terms:
        if problem.combine == "sum" and not is_loop:
            return summed_terms(
                problem.divergence, q, z_teachers, shares, problem.teacher_temperature,
                scratch[2:6],
            )  # fmt: skip
        if problem.combine == "mixture":
            p = mixture(
                z_teachers, shares, problem.teacher_temperature, dtype, scratch[2:6],
                problem.divergence in _WITH_LOGS,
            )  # fmt: skip
        else:
            (z,) = z_teachers
            p = softmax(z, problem.teacher_temperature, dtype, scratch[2:4])
        return terms_of(problem.divergence, q, p, problem.weight, scratch[4:6])

    def work(rows: slice, chunks: Sequence[Tensor], scratch: Scratch) -> None:
        z, z_teachers, certain = chunks[0], chunks[1 : 1 + n], None
        slope, shares = None, [at(x, rows) for x in weights]
        if out is not None:
            slope = scratch[N_SCRATCH] if in_scratch else chunks[-1]
            if slope is None:
                slope = torch.empty_like(z, dtype=dtype)
        if problem.combine == "logits":
            z_teachers = [weighted_logits(z_teachers, shares, dtype, scratch[5])]
        elif index is not None:
            z_teachers = [chosen_logits(z_teachers, at(index, rows), dtype, scratch[5])]
        groups = [[x] for x in z_teachers] if is_loop else [z_teachers]
        for k, group in enumerate(groups):
            q = softmax(z, problem.student_temperature, dtype, scratch[:2])
            if slope is not None and k == 0:
                certain = certain_rows(z, [q.total])
            weight = shares[k] if is_loop else None
            terms = terms_of_chunk(q, group, shares, scratch)
            if needs_losses:
                value = terms.value(problem.scale)
                if weight is not None:
                    value = times(value, weight)
                    value = column[rows] + value if k else value
                column[rows] = value
            if slope is None or scaled is None:
                continue
            factor = at(scaled, rows)
            factor = factor if weight is None else factor * weight
            of_terms = slope if k == 0 else terms.spare
            terms.slope(of_terms, factor)
            if has_masked or weight is not None:
                select(of_terms, factor)
            if k:
                slope.add_(of_terms)
        if slope is not None and out is not None:
            centre(slope, certain)
            if in_scratch:
                chunks[-1].copy_(slope)

    of_networks: list[Any] = [student, *problem.teachers]
    tensors = of_networks if out is None else [*of_networks, out]
    for_chunks(work, N_SCRATCH + in_scratch, *tensors, dtype=dtype)
    if gradient is not None and out is not None and out is not gradient:
        gradient.copy_(out)
    if problem.row_mask is not None:
        losses.masked_fill_(~problem.row_mask, 0)
    return losses
