"""Solve `Softened` in PyTorch, for any device: the losses as of `Rows`, all gradients at once.

D(p, q) = D'(q, p) with another divergence D', in which the teacher is the student: a chunk's two
softmaxes give the slopes of both. A temperature, which divides logits z, has the gradient
−Σ (z − pivot) · ∂D/∂z / T with any pivot, because the gradient of a row has the sum 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._pages import in_huge_pages
from fastkd._softened import rows_of_problem
from fastkd.portable import rows
from fastkd.portable._row_terms import (
    CENTRED,
    N_SCRATCH,
    Scratch,
    Softmax,
    centre,
    certain_rows,
    softmax,
    terms_of,
)
from fastkd.portable.rows import _for_chunks, _in_compute_dtype, _select
from fastkd.problems.rows import Rows
from fastkd.problems.softened import Softened, mirror_of

# divergences that leave both softmaxes as they are when they write a slope
_PRESERVING = ("forward_kl", "soft_cross_entropy")


def n_statistics(problem: Softened) -> int:
    """Return how many numbers of each row `backward` needs: those of `Rows`."""
    return rows.n_statistics(rows_of_problem(problem))


def forward(problem: Softened, needs_grad: Sequence[bool]) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """Return the losses of the rows, and the statistics of both softmaxes."""
    (losses, _), (statistics,) = rows.forward(rows_of_problem(problem), (False,))
    return (losses,), (statistics,)


def backward(
    problem: Softened,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return Σ upstream · ∂losses with respect to what is needed: logits and temperatures."""
    (of_losses,) = upstream
    assert of_losses is not None  # without an upstream gradient there is no backward
    known = _in_compute_dtype(rows_of_problem(problem))
    logits, temperatures = (known.student, known.teacher), _temperatures(known)
    n_rows, dtype = logits[0].shape[:-1].numel(), statistics.dtype
    table, factors = statistics.reshape(n_rows, -1, 1), _factors(known, of_losses, dtype)
    # elsewhere than on a CPU a look at the factors would be a host sync
    has_masked = not (factors.is_cpu and factors.all())
    mirror = mirror_of(known.divergence, known.weight)
    divergences = (known.divergence, known.weight), mirror
    learning = [i for i in (0, 1) if needs_grad[i] or needs_grad[2 + i]]
    if mirror[0] in _PRESERVING:
        learning.reverse()
    is_overwritten = len(learning) == 2 and divergences[learning[0]][0] not in _PRESERVING
    needed = [i for i in (0, 1) if needs_grad[i]]
    gradients = [
        in_huge_pages(torch.empty_like(logits[i], memory_format=torch.contiguous_format))
        for i in needed
    ]
    of_temperatures = {i: factors.new_empty((n_rows, 1)) for i in (0, 1) if needs_grad[2 + i]}

    def work(chunk: slice, chunks: Sequence[Tensor], scratch: Scratch) -> None:
        z, out = chunks[:2], dict(zip(needed, chunks[2:], strict=True))
        numbers, factor = table[chunk].unbind(1), factors[chunk]
        own = [temperatures[i][chunk] for i in (0, 1)]
        networks = [
            softmax(z[i], own[i], dtype, scratch[2 * i : 2 * i + 2], numbers[2 * i : 2 * i + 2])
            for i in (0, 1)
        ]
        for place, i in enumerate(learning):
            softmaxes = networks
            if is_overwritten and place == 0:
                softmaxes = [
                    _copy(x, *scratch[6 + 2 * j : 8 + 2 * j]) for j, x in enumerate(networks)
                ]
            divergence, weight = divergences[i]
            mean = numbers[4] if i == 0 and divergence in CENTRED else None
            terms = terms_of(divergence, softmaxes[i], softmaxes[1 - i], weight, scratch[4:6], mean)
            slope = out[i] if i in out and out[i].dtype == dtype else scratch[-1]
            if slope is None:
                slope = torch.empty_like(z[i], dtype=dtype)
            terms.slope(slope, factor / own[i])
            if has_masked:
                _select(slope, factor)
            if i in of_temperatures:
                above = torch.sub(z[i], networks[i].top, out=scratch[4])
                found = _of_temperature(slope, above, own[i])
                of_temperatures[i][chunk] = torch.where(factor == 0, 0, found)
            if i in out:
                centre(slope, certain_rows(z[i], [networks[i].total]))
                if slope is not out[i]:
                    out[i].copy_(slope)

    _for_chunks(work, N_SCRATCH + 4 * is_overwritten + 1, *logits, *gradients)
    of_logits = dict(zip(needed, gradients, strict=True))
    return *(of_logits.get(i) for i in (0, 1)), *(
        of_temperatures[i].view(logits[0].shape[:-1]) if i in of_temperatures else None
        for i in (0, 1)
    )


def _temperatures(known: Rows) -> list[Tensor]:
    """Return the temperatures of student and teacher as columns [N, 1]."""
    both = known.student_temperature, known.teacher_temperature
    return [x.reshape(-1, 1) for x in both if isinstance(x, Tensor)]


def _factors(known: Rows, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what multiplies the gradient of each row [N, 1], 0 if it is masked."""
    factors = upstream.reshape(-1, 1).to(dtype)
    if known.row_mask is None:
        return factors
    return torch.where(known.row_mask.reshape(-1, 1), factors, 0)


def _copy(network: Softmax, d: Tensor | None, e: Tensor | None) -> Softmax:
    """Return the softmax in two other buffers."""
    return network._replace(
        d=network.d.clone() if d is None else d.copy_(network.d),
        e=network.e.clone() if e is None else e.copy_(network.e),
    )


def _of_temperature(slopes: Tensor, above: Tensor, temperature: Tensor) -> Tensor:
    """Return the gradient of temperatures [R, 1], overwriting the logits above the pivot.

    Excluded classes have no part in it.
    """
    above.nan_to_num_(math.nan, posinf=math.inf, neginf=0)
    return above.mul_(slopes).sum(-1, keepdim=True).div_(temperature).neg_()
