"""Solve `Peers` in PyTorch, for any device: networks that teach each other.

With l_i = log p_i and L = Σ l_i over the K networks, all divergences from p_j add up to
Σ_{i≠j} KL(p_j ‖ p_i) = Σ p_j (K l_j − L), so that K sums stand for K (K − 1) divergences. With
S = Σ p_j the gradient of network i is K p_i − S, and where it is asked what the others learn from i
too, besides p_i (K l_i − L), less p_i times the sum of that.

Rows are taken in chunks that stay in the cache, and every softmax is made once for the losses and
once for the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._pages import in_huge_pages
from fastkd._precision import compute_dtype
from fastkd.portable._row_chunks import for_chunks, select
from fastkd.portable._row_terms import Scratch, Softmax, centre, certain_rows, softmax
from fastkd.problems.peers import MOST, Peers, logits_of

_LN2 = math.log(2)


def n_statistics(problem: Peers) -> int:
    """Return how many numbers of each row `backward` needs.

    They are the largest logit, Z and Σ p (K log2 p − L) of each network.
    """
    return 3 * len(logits_of(problem))


def forward(problem: Peers, needs_grad: Sequence[bool]) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """Return rows of scale · all divergences, and what the backward needs."""
    logits, temperature, scale = _numbers(problem)
    dtype, examples, n_peers = compute_dtype(*logits), logits[0].shape[:-1], len(logits)
    losses = logits[0].new_empty(examples, dtype=dtype)
    statistics = losses.new_empty((examples.numel(), 3 * n_peers))
    of_rows = losses.view(-1, 1)

    def work(rows: slice, chunks: Sequence[Tensor], scratch: Scratch) -> None:
        buffers = _buffers(scratch, n_peers)
        peers = [
            softmax(z, temperature, dtype, buffers[2 * i : 2 * i + 2]) for i, z in enumerate(chunks)
        ]
        total = _total_of_d(peers, buffers[-1])
        # a difference of logarithms would lose the digits of networks that are alike; in the
        # distance of all they cancel
        ratios = [(q.total / peers[0].total).log2_() for q in peers]
        distance, sums, of_all = torch.zeros_like(ratios[0]), [], torch.stack(ratios).sum(0)
        for q, ratio in zip(peers, ratios, strict=True):
            above = torch.mul(q.d, n_peers, out=buffers[-2]).sub_(total)
            # 0·∞ is a NaN, which counts as 0
            above = above.mul_(q.e).nansum(-1, keepdim=True).div_(q.total)
            distance += above
            sums.append(above - ratio.mul_(n_peers).sub_(of_all))
        # rounding alone makes it negative; the NaN of an input, which the sums drop, comes back
        of_rows[rows] = distance.relu_().add_(of_all - of_all).mul_(scale * _LN2)
        torch.cat(
            [*(q.top for q in peers), *(q.total for q in peers), *sums], 1, out=statistics[rows]
        )

    for_chunks(work, _n_scratch(n_peers), *logits)
    if problem.row_mask is not None:
        losses.masked_fill_(~problem.row_mask, 0)
    return (losses,), (statistics.view(*examples, 3 * n_peers),)


def backward(
    problem: Peers,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return Σ upstream · ∂losses with respect to each network that needs it."""
    logits, temperature, scale = _numbers(problem)
    dtype, n_peers = statistics.dtype, len(logits)
    (of_losses,) = upstream
    assert of_losses is not None  # without an upstream gradient there is no backward
    factors = of_losses.reshape(-1, 1).to(dtype)
    if problem.row_mask is not None:
        factors = torch.where(problem.row_mask.reshape(-1, 1), factors, 0)
    scaled = factors * (scale / temperature)
    # elsewhere than on a CPU a look at the factors would be a host sync
    has_masked = not (factors.is_cpu and factors.all())
    table = statistics.reshape(-1, 3, n_peers, 1)
    needed = [i for i in range(n_peers) if needs_grad[i]]
    # in the order of the logits' strides, of which chunks may be no views
    found = {i: in_huge_pages(torch.empty_like(logits[i])) for i in needed}
    gradients = {
        i: x if x.ndim < 4 or x.is_contiguous() else x.new_empty(x.shape) for i, x in found.items()
    }

    def work(rows: slice, chunks: Sequence[Tensor], scratch: Scratch) -> None:
        buffers, (tops, totals, sums) = _buffers(scratch, n_peers), table[rows].unbind(1)
        z, out = chunks[:n_peers], dict(zip(needed, chunks[n_peers:], strict=True))
        peers = []
        for i in range(n_peers):
            known = tops[:, i], totals[:, i]
            peers.append(softmax(z[i], temperature, dtype, buffers[2 * i : 2 * i + 2], known))
        if not problem.are_constants:
            logs = _log_probabilities(peers, buffers[-1])
        for q in peers:
            q.e.mul_(q.total.reciprocal())
        mean = torch.add(peers[0].e, peers[1].e, out=buffers[-2])
        for q in peers[2:]:
            mean.add_(q.e)
        for i in needed:
            q = peers[i]
            if problem.are_constants:
                slope = torch.mul(q.e, n_peers, out=q.d).sub_(mean)
            else:
                slope = (
                    q.d.mul_(n_peers)
                    .sub_(logs)
                    .sub_(sums[:, i])
                    .nan_to_num_(0, neginf=0)
                    .mul_(_LN2)
                )
                slope = slope.add_(n_peers).mul_(q.e).sub_(mean)
            # an infinite divergence from a network has no gradient in it
            factor = scaled[rows] if problem.are_constants else scaled[rows] + 0 * sums[:, i]
            slope.mul_(factor)
            if has_masked:
                select(slope, factors[rows])
            centre(slope, certain_rows(z[i], [q.total]))
            out[i].copy_(slope)

    for_chunks(work, _n_scratch(n_peers), *logits, *gradients.values())
    for i, x in gradients.items():
        if x is not found[i]:
            found[i].copy_(x)
    return tuple(found.get(i) for i in range(MOST))


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
    return _total_of_d(peers, out)


def _total_of_d(peers: Sequence[Softmax], out: Tensor | None) -> Tensor:
    """Return the sum of the d of all networks."""
    total = torch.add(peers[0].d, peers[1].d, out=out)
    for q in peers[2:]:
        total.add_(q.d)
    return total
