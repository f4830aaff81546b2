"""Losses of pairs from chunks of S: one pass over them, or two where columns have losses too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels.pairs.chunk_sweeps import (
    LogSums,
    differences_of_chunk,
    divergences_of_chunk,
)
from fastkd.kernels.pairs.chunks import LANES, TURNS, Chunks, merged
from fastkd.kernels.pairs.sweeps import Classes
from fastkd.kernels.pairs.tiling import merge_statistics
from fastkd.problems.pairs import (
    Pairs,
    SoftPairs,
    column_penalty,
    over_ranks,
    own_columns,
    penalty,
    weighted_sum,
)


def pairs_by_chunks(
    problem: Pairs, needs_grad: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the loss and its gradients in the trained fields."""
    chunks = Chunks(
        problem.query, problem.key, problem.scale, bank=problem.bank, first=problem.first,
        two_views=problem.two_views, normalize=problem.normalize, half=problem.half,
        weights=problem.weights, needs_grad=needs_grad[:3],
    )  # fmt: skip
    of_further = None
    if problem.form == "pairs":
        loss, of_logits = _sum_of_pairs(problem, chunks)
    elif problem.key_positive_logits is None:
        loss, of_logits, of_further = _log_sum_exps(problem, chunks)
    else:
        loss, of_logits = _log_sum_exps_of_both(problem, chunks)
    *_, needs_logits, needs_further = needs_grad
    of_numbers = of_logits if needs_logits else None, of_further if needs_further else None
    return loss, (*chunks.gradients(), *of_numbers)


def _sum_of_pairs(problem: Pairs, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Return Σ_i w_i Σ_j softplus(S_ij − a_i), and its gradient in a."""
    assert problem.positive_logits is not None
    dtype = problem.query.dtype
    positive_logits, weights = problem.positive_logits.to(dtype), problem.weights.to(dtype)
    sums = weights.new_empty(2, len(weights))
    for rows, part in chunks.chunks(chunks.buffer()):
        sums[:, rows] = chunks.add_pairs(rows, part, positive_logits[rows], weights[rows])
    losses, slopes = sums
    return losses @ weights, -slopes * weights


def _log_sum_exps(problem: Pairs, chunks: Chunks) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return Σ_i w_i φ(n_i − a_i), and its gradients in a and f, in one pass."""
    n = len(problem.query)
    loss, of_logits = problem.query.new_zeros(()), problem.query.new_empty(n)
    of_further = problem.further_logits
    if of_further is not None:
        of_further = torch.empty_like(of_further, dtype=of_logits.dtype)
    column_classes = None if problem.classes is None else chunks.padded(problem.classes)
    for rows, part in chunks.chunks(chunks.buffer()):
        log_sums = chunks.log_sums(rows, part)
        share, slopes, of_logits[rows], of_others = penalty(problem, log_sums, rows)
        loss += share
        if of_further is not None and of_others is not None:
            of_further[rows] = of_others
        if chunks.trains:
            of_class, classes = None, problem.query_classes
            if classes is not None and problem.attractions is not None:
                of_class = Classes(classes[rows], column_classes, problem.attractions[rows])
            chunks.add_exponentials(rows, part, LogSums(log_sums, slopes), classes=of_class)
    return loss, of_logits, of_further


def _log_sum_exps_of_both(problem: Pairs, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Return Σ_i w_i φ(n_i − a_i) and the same of columns, and its gradient in a, in two passes."""
    assert problem.key_positive_logits is not None
    buffer, n = chunks.buffer(), len(problem.query)
    n_columns = len(problem.key_positive_logits)
    log_sums, column_parts = buffer.new_empty(n), chunks.column_parts(buffer, n_columns)
    for rows, part in chunks.chunks(buffer):
        log_sums[rows] = chunks.log_sums(rows, part)
        chunks.fold(rows, part, column_parts)
    largest, total = column_parts.unbind(1)
    column_sums = over_ranks(merged(largest + total.log()), problem.group)
    loss, slopes, _, _ = penalty(problem, log_sums, slice(0, n))
    share, column_slopes = column_penalty(problem, column_sums)
    of_logits = -slopes - column_slopes[own_columns(problem)]
    if chunks.trains:
        of_columns = LogSums(chunks.padded(column_sums), chunks.padded(column_slopes))
        for rows, part in chunks.chunks(buffer):
            of_rows = LogSums(log_sums[rows], slopes[rows])
            chunks.add_exponentials(rows, part, of_rows, of_columns, n_columns)
    return loss + share, of_logits


def soft_pairs_by_chunks(
    problem: SoftPairs, needs_grad: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return Σ_i w_i KL_i and its gradients in query, key and scale."""
    student = Chunks(
        *problem[:3], first=problem.first, normalize=problem.normalize, half=problem.half,
        weights=problem.weights, needs_grad=needs_grad,
    )  # fmt: skip
    teacher = Chunks(
        *problem[3:6], first=problem.first, normalize=problem.normalize, half=problem.teacher_half
    )
    buffers, n = (student.buffer(), student.buffer()), len(student.q)
    n_splits, n_blocks = student.splits(buffers[0])
    statistics = student.q.new_empty(n_splits, 5, n)
    lifts = None
    if problem.weights is not None:  # w exp(S − n) is exp(S − (n − log w))
        lifts = problem.weights.to(statistics.dtype).log()
    for rows, s in student.chunks(buffers[0]):
        t = teacher.products(rows, buffers[1])
        networks = student.in_memory(rows, s), teacher.in_memory(rows, t)
        sizes: dict[str, Any] = dict(**student.sizes(rows), m=s.shape[1], TURNS=TURNS, LANES=LANES)
        divergences_of_chunk[len(s), n_splits](
            *networks, statistics, **sizes, n_blocks=n_blocks,
            CROSS_ENTROPY=problem.form == "cross_entropy",
        )  # fmt: skip
        if student.trains:
            largest, total = statistics[:, 0:4:2, rows], statistics[:, 1:4:2, rows]
            log_sums = merged(largest + total.log())
            if lifts is not None:
                log_sums = log_sums - lifts[rows]
            differences_of_chunk[student.blocks(s)](
                *networks, log_sums, student.slopes_out(s), **sizes
            )
            student.add_stored(rows, s)
    losses = merge_statistics(statistics, 1.0, problem.form).losses
    return weighted_sum(losses, problem.weights), student.gradients()
