"""Contrastive losses in PyTorch, for any device, without the matrix of similarities.

Rows of S = scale · Q Kᵀ are computed in chunks that stay in the cache. With n_i and c_j the
log-sum-exps of its rows and columns and φ' the slopes of the loss in them, the gradient in S is

    G_ij = w_i φ'(n_i − a_i) exp(S_ij − n_i) + w_j φ'(c_j − a_j) exp(S_ij − c_j) = e_ij (u_i + v_j),

dQ = scale · G K, dK = scale · Gᵀ Q and dscale = Σ ⟨q_i, (G K)_i⟩. Rows know u as soon as they are
complete: one pass makes loss and gradient. Columns know v after all rows: a second pass follows,
unless one chunk is all. Where |S| is known to be small exponentials need no maximum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _distributed
from fastkd._contrasts import Problem
from fastkd.portable._similarities import LINEAR, Similarities, are_large, split


def allocate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """What `forward` returns, empty."""
    return Problem(*arguments).allocate()


def allocate_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """What `backward` returns, empty."""
    return Problem(*arguments).allocate_gradients()


def forward(*arguments: Any, chunks: type[Similarities] = Similarities) -> tuple[Tensor, Tensor]:
    """(*Problem) -> the own rows' share of the loss, and the gradients of it, one after another."""
    problem = Problem(*arguments)
    similarities = chunks(
        problem.query, problem.key, problem.scale,
        bank=problem.bank, dtype=problem.dtype, first=problem.first, two_views=problem.two_views,
        normalize=problem.normalize, half=problem.half, weights=problem.weights,
        classes=problem.classes, attractions=problem.attractions, wanted=problem.wanted,
    )  # fmt: skip
    loss, of_anchors = _LOSSES[problem.form](problem, similarities)
    wanted = [of_anchors] if "anchors" in similarities.wanted else []
    return loss, torch.cat([*similarities.gradients(), *wanted, loss.new_empty(0)])


def backward(upstream: Tensor, statistics: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Each gradient, in the dtype of its tensor."""
    gradients = Problem(*arguments).allocate_gradients()
    split(statistics, gradients, upstream)
    return gradients


def _pairs(problem: Problem, similarities: Similarities) -> tuple[Tensor, Tensor]:
    """Σ_i w_i Σ_j softplus(S_ij − a_i), and its gradient in a."""
    dtype = problem.dtype
    anchors, weights = problem.anchors.to(dtype), problem.weights.to(dtype)
    losses, slopes = torch.zeros_like(weights), torch.zeros_like(weights)
    for rows, part in similarities.chunks(similarities.buffer()):
        of_rows = anchors[rows], weights[rows]
        losses[rows], slopes[rows] = similarities.add_pairs(rows, part, *of_rows)
    return losses @ weights, -slopes * weights


def _log_sum_exps(problem: Problem, similarities: Similarities) -> tuple[Tensor, Tensor]:
    """Σ_i w_i φ(n_i − a_i) and, with anchors of keys, Σ_j w_j φ(c_j − a_j); its gradient in a."""
    shift, found = similarities.shift(), None
    if shift is not None:
        if problem.key_anchors is None:
            found = _of_rows(problem, similarities, shift)
        else:
            found = _of_both(problem, similarities, len(problem.key_anchors), shift)
    if found is None:
        similarities.reset()
        found = _with_maxima(problem, similarities)
    return found


_LOSSES = {"pairs": _pairs, "softplus": _log_sum_exps, "linear": _log_sum_exps}


def _of_rows(
    problem: Problem, similarities: Similarities, shift: float
) -> tuple[Tensor, Tensor] | None:
    """In one pass; None where a sum shows that some exponentials were too small."""
    loss = similarities.q.new_zeros(())
    of_anchors = similarities.q.new_empty(len(similarities.q))
    for rows, part in similarities.chunks(similarities.buffer()):
        sums = similarities.exponentials(rows, part, shift).sum(1)
        if not are_large(sums):
            return None
        share, slopes = penalty(problem, shift + sums.log(), rows)
        loss += share
        if problem.wanted:
            torch.neg(slopes, out=of_anchors[rows])
            similarities.add_softmax(rows, part, slopes.div_(sums))
    return loss, of_anchors


def _of_both(
    problem: Problem, similarities: Similarities, n_columns: int, shift: float
) -> tuple[Tensor, Tensor] | None:
    """In two passes, or one where all rows fit; None as above."""
    buffer, q = similarities.buffer(), similarities.q
    row_sums, column_sums = q.new_empty(len(q)), q.new_zeros(n_columns)
    everything = slice(0, len(q))
    for rows, part in similarities.chunks(buffer):
        similarities.exponentials(rows, part, shift)
        torch.sum(part, 1, out=row_sums[rows])
        column_sums += part[:, :n_columns].sum(0)
    if not are_large(row_sums) or not are_large(column_sums):
        return None
    of_columns = over_ranks(shift + column_sums.log(), problem.group)
    loss, slopes = penalty(problem, shift + row_sums.log(), everything)
    share, column_slopes = column_penalty(problem, of_columns)
    of_anchors = -slopes - column_slopes[own_columns(problem)]
    if problem.wanted:
        u, v = slopes.div_(row_sums), q.new_zeros(buffer.shape[1])
        v[:n_columns] = column_slopes.mul_(torch.exp(shift - of_columns))
        kept = len(buffer) == len(q)
        for rows, part in [(everything, buffer)] if kept else similarities.chunks(buffer):
            e = part if kept else similarities.exponentials(rows, part, shift)
            factors = torch.add(u[rows, None], v, out=similarities.of_spare(part))
            similarities.add(rows, factors.mul_(e))
    return loss + share, of_anchors


def _with_maxima(problem: Problem, similarities: Similarities) -> tuple[Tensor, Tensor]:
    """With a maximum for each row and column: for any numbers, and without a look at them."""
    buffer, n = similarities.buffer(), len(similarities.q)
    if problem.key_anchors is None:
        loss, of_anchors = problem.scale.new_zeros((), dtype=problem.dtype), buffer.new_empty(n)
        for rows, part in similarities.chunks(buffer):
            of_rows = similarities.log_sums(rows, part)
            share, slopes = penalty(problem, of_rows, rows)
            loss += share
            torch.neg(slopes, out=of_anchors[rows])
            if problem.wanted:
                similarities.add_exponentials(rows, part, of_rows, slopes)
        return loss, of_anchors
    of_rows = buffer.new_empty(n)
    largest = buffer.new_full((len(problem.key_anchors),), -torch.inf)
    sums = torch.zeros_like(largest)
    for rows, part in similarities.chunks(buffer):
        of_rows[rows] = similarities.log_sums(rows, part)
        similarities.fold(rows, part, largest, sums)
    of_columns = over_ranks(largest + sums.log(), problem.group)
    loss, slopes = penalty(problem, of_rows, slice(0, n))
    share, column_slopes = column_penalty(problem, of_columns)
    of_anchors = -slopes - column_slopes[own_columns(problem)]
    if problem.wanted:
        for rows, part in similarities.chunks(buffer):
            similarities.add_exponentials(
                rows, part, of_rows[rows], slopes[rows], of_columns, column_slopes
            )
    return loss + share, of_anchors


def own_columns(problem: Problem) -> slice:
    return slice(problem.first, problem.first + len(problem.query))


def penalty(problem: Problem, log_sums: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The share of the loss of these rows, and the slopes in their log-sum-exps."""
    weights = problem.weights[rows].to(problem.dtype)
    return _of_form(problem.form, log_sums - problem.anchors[rows].to(problem.dtype), weights)


def column_penalty(problem: Problem, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Of the own columns the share of the loss, of all of them the slopes."""
    assert problem.key_anchors is not None and problem.key_weights is not None
    weights, own = problem.key_weights.to(problem.dtype), own_columns(problem)
    odds = log_sums - problem.key_anchors.to(problem.dtype)
    _, slopes = _of_form(problem.form, odds, weights)
    return _of_form(problem.form, odds[own], weights[own])[0], slopes


def _of_form(form: str, odds: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    if form == "softplus":
        return F.softplus(odds, threshold=LINEAR) @ weights, odds.sigmoid() * weights
    return odds @ weights, weights.clone()


def over_ranks(log_sums: Tensor, group: str) -> Tensor:
    return _distributed.log_sum_exp(log_sums, group) if group else log_sums
