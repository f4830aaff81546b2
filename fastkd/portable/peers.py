"""Solve `Peers` in PyTorch, for any device: networks that teach each other.

With l_i = log p_i and L = Σ l_i over the K networks, all divergences from p_j add up to
Σ_{i≠j} KL(p_j ‖ p_i) = Σ p_j (K l_j − L), so that K sums stand for K (K − 1) divergences. With
S = Σ p_j the gradient of network i is K p_i − S, and where it is asked what the others learn from i
too, besides p_i (K l_i − L), less p_i times the sum of that.

Rows are taken in chunks that stay in the cache. Every softmax is made once for both if it is known
what the losses are multiplied by, or else once for the losses and once for the gradients.
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
from fastkd.portable._row_chunks import (
    at,
    for_chunks,
    foresees_weight,
    has_zeros,
    joined,
    rescale,
    select,
)
from fastkd.portable._softmaxes import Scratch, Softmax, centre, certain_rows, softmax
from fastkd.problems.peers import MOST, Peers, logits_of

_LN2 = math.log(2)


def n_statistics(problem: Peers) -> int:
    """Return how many numbers of each row `backward` needs.

    They are the largest logit, Z and Σ p (K log2 p − L) of each network.
    """
    return 3 * len(logits_of(problem))


def forward(
    problem: Peers, needs_grad: Sequence[bool]
) -> tuple[tuple[Tensor], tuple[Tensor | None, ...]]:
    """Return rows of scale · all divergences, and what the backward needs.

    It has the gradients of all that need one where it is known what the losses are multiplied by.
    """
    logits, _, _ = _numbers(problem)
    if any(needs_grad) and foresees_weight(problem):
        factors = _counted(problem, problem.row_weight)
        losses, found = _solve(problem, needs_grad, factors=factors)
        return (losses,), (losses.new_empty((*losses.shape, 0)), *found)
    statistics = logits[0].new_empty(
        (logits[0].shape[:-1].numel(), n_statistics(problem)), dtype=compute_dtype(*logits)
    )
    losses, _ = _solve(problem, needs_grad, table=statistics)
    return (losses,), (statistics.view(*losses.shape, -1 if losses.numel() else 3 * len(logits)),)


def backward(
    problem: Peers,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
    *foreseen: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return Σ upstream · ∂losses with respect to each network that needs it."""
    (of_losses,) = upstream
    assert of_losses is not None  # without an upstream gradient there is no backward
    there = [x for x in foreseen if x is not None]
    dtype = statistics.dtype
    if there and all(rescale(x, of_losses, problem.row_weight, dtype) for x in there):
        return foreseen
    factors = _counted(problem, of_losses.reshape(-1, 1).to(dtype))
    known = statistics.reshape(-1, 3, len(logits_of(problem)), 1) if statistics.shape[-1] else None
    _, found = _solve(problem, needs_grad, factors=factors, known=known)
    return found


def _solve(
    problem: Peers,
    needs_grad: Sequence[bool],
    *,
    factors: Number | None = None,
    table: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the losses of all rows, unless statistics are known, and the gradients.

    Args:
        problem: The networks.
        needs_grad: Which of them need a gradient.
        factors: What multiplies the gradients, [N, 1] or of all rows; None for no gradients.
        table: A place for the statistics of the rows, [N, 3K], or None.
        known: The statistics, [N, 3, K, 1], or None.
    """
    logits, temperature, scale = _numbers(problem)
    dtype, examples, n_peers = compute_dtype(*logits), logits[0].shape[:-1], len(logits)
    needed = [i for i in range(n_peers) if needs_grad[i] and factors is not None]
    # in the order of the logits' strides, of which chunks may be no views
    found = {i: in_huge_pages(torch.empty_like(logits[i])) for i in needed}
    gradients = {
        i: x if x.ndim < 4 or x.is_contiguous() else x.new_empty(x.shape) for i, x in found.items()
    }
    factors = 0.0 if factors is None else factors
    scaled, has_masked = factors * (scale / temperature), has_zeros(factors)

    def work(rows: slice, chunks: Sequence[Tensor], scratch: Scratch) -> Tensor | None:
        buffers, value = _buffers(scratch, n_peers), None
        z, out = chunks[:n_peers], dict(zip(needed, chunks[n_peers:], strict=True))
        numbers = [] if known is None else known[rows].unbind(1)
        peers = []
        for i in range(n_peers):
            statistics = [x[:, i] for x in numbers[:2]]  # the largest logits and Z
            peers.append(softmax(z[i], temperature, dtype, buffers[2 * i : 2 * i + 2], statistics))
        certain = {i: certain_rows(z[i], [peers[i].total]) for i in needed}
        difference = None
        if n_peers == 2 and problem.are_constants and not numbers and table is None:
            distance, difference = _of_two(peers, buffers)
            value = distance.mul_(scale * _LN2)
        elif not numbers:
            distance, means = _value(peers, buffers)
            value = distance.mul_(scale * _LN2)
            if table is not None:
                statistics = [*(q.top for q in peers), *(q.total for q in peers), *means]
                torch.cat(statistics, 1, out=table[rows])
        else:
            means = [*numbers[2].unbind(1)]
        if not needed:
            return value
        logs = None if problem.are_constants else _log_probabilities(peers, buffers[-1])
        if difference is None:
            _normalize(peers)
        mean = None
        if n_peers > 2 or logs is not None:
            mean = _total([q.e for q in peers], buffers[-2])
        for i in needed:
            q, factor = peers[i], at(scaled, rows)
            if difference is not None:
                slope, factor = difference, -factor if i else factor
            elif logs is None or mean is None:
                slope = _above_total([q.e for q in peers], i, mean, q.d)
            else:
                slope = q.d.mul_(n_peers).sub_(logs).sub_(means[i])
                slope = slope.nan_to_num_(0, neginf=0).mul_(_LN2)
                slope = slope.add_(n_peers).mul_(q.e).sub_(mean)
                # an infinite divergence from a network has no gradient in it
                factor = factor + 0 * means[i]
            is_written = out[i].dtype == dtype
            slope = torch.mul(slope, factor, out=out[i] if is_written else q.d)
            if has_masked:
                select(slope, at(factors, rows))
            centre(slope, certain[i])
            if not is_written:
                out[i].copy_(slope)
        return value

    of_chunks = for_chunks(work, _n_scratch(n_peers), *logits, *gradients.values())
    for i, x in gradients.items():
        if x is not found[i]:
            found[i].copy_(x)
    losses = joined(of_chunks, logits[0])
    if losses is None:
        losses = logits[0].new_empty(examples, dtype=dtype)
    if problem.row_mask is not None:
        losses.masked_fill_(~problem.row_mask, 0)
    return losses, tuple(found.get(i) for i in range(MOST))


def _counted(problem: Peers, factors: Number) -> Number:
    """Return the factors of rows [N, 1], 0 where they are masked; or one number if none is."""
    if problem.row_mask is None:
        return factors
    mask = problem.row_mask.reshape(-1, 1)
    if not isinstance(factors, Tensor):
        return mask.to(compute_dtype(*logits_of(problem))) * factors
    return torch.where(mask, factors, 0)


def _value(peers: Sequence[Softmax], buffers: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
    """Return rows [R, 1] of all divergences in bits, and of Σ p (K log2 p − L) of each network."""
    n_peers = len(peers)
    logs = [q.d for q in peers]
    total = _total(logs, buffers[-1]) if n_peers > 2 else None
    # a difference of logarithms would lose the digits of networks that are alike; in the
    # distance of all they cancel
    ratios = [(q.total / peers[0].total).log2_() for q in peers]
    distance, means, of_all = (
        torch.zeros_like(ratios[0]),
        [],
        sum(ratios[2:], ratios[0] + ratios[1]),
    )
    for i, (q, ratio) in enumerate(zip(peers, ratios, strict=True)):
        above = _above_total(logs, i, total, buffers[-2])
        # 0·∞ is a NaN, which counts as 0
        above = above.mul_(q.e).nansum(-1, keepdim=True).div_(q.total)
        distance += above
        means.append(above - ratio.mul_(n_peers).sub_(of_all))
    # rounding alone makes it negative; the NaN of an input, which the sums drop, comes back
    return distance.relu_().add_(of_all - of_all), means


def _of_two(peers: Sequence[Softmax], buffers: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Return rows [R, 1] of Σ (p − q) (log p − log q) of two networks in bits, and p − q [R, V]."""
    first, second = peers
    ratio = first.total / second.total
    _normalize(peers)
    difference = torch.sub(first.e, second.e, out=buffers[-1])
    # 0·∞ is a NaN, which counts as 0; Z has no part in it, because the differences add up to 0
    above = torch.sub(first.d, second.d, out=first.d).mul_(difference)
    distance = above.nansum(-1, keepdim=True)
    # rounding alone makes it negative; the NaN of an input, which the sums drop, comes back
    return distance.relu_().add_(ratio - ratio), difference


def _normalize(peers: Sequence[Softmax]) -> None:
    for q in peers:
        q.e.mul_(q.total.reciprocal())


def _numbers(problem: Peers) -> tuple[list[Tensor], Any, Any]:
    """Return the logits, and the numbers in their precision where these are tensors."""
    logits = logits_of(problem)
    dtype, numbers = compute_dtype(*logits), (problem.temperature, problem.scale)
    temperature, scale = (x.to(dtype) if isinstance(x, Tensor) else x for x in numbers)
    return logits, temperature, scale


def _n_scratch(n_peers: int) -> int:
    return 2 * n_peers + 2


def _buffers(scratch: Scratch, n_peers: int) -> list[Tensor | None]:
    """Return d and e of each network and two more; None lets PyTorch allocate."""
    return [*scratch, *[None] * (_n_scratch(n_peers) - len(scratch))]


def _log_probabilities(peers: Sequence[Softmax], out: Tensor | None) -> Tensor:
    """Make each d the log2 of the probabilities, and return the sum of them all."""
    for q in peers:
        q.d.sub_(q.total.log2())
    return _total([q.d for q in peers], out)


def _total(of_peers: Sequence[Tensor], out: Tensor | None) -> Tensor:
    """Return the sum of what all networks have."""
    total = torch.add(of_peers[0], of_peers[1], out=out)
    for x in of_peers[2:]:
        total.add_(x)
    return total


def _above_total(
    of_peers: Sequence[Tensor], i: int, total: Tensor | None, out: Tensor | None
) -> Tensor:
    """Return K times what network i has less the total; of two networks that is a difference."""
    if total is None:
        return torch.sub(of_peers[i], of_peers[1 - i], out=out)
    return torch.mul(of_peers[i], len(of_peers), out=out).sub_(total)
