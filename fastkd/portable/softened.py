"""Solve `Softened` in PyTorch, for any device: the losses as of `Rows`, all gradients at once.

D(p, q) = D'(q, p) with another divergence D', in which the teacher is the student: a chunk's two
softmaxes give the slopes of both. A temperature, which divides logits z, has the gradient
−Σ (z − pivot) · ∂D/∂z / T with any pivot, because the gradient of a row has the sum 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd._softened import rows_of_problem
from fastkd.portable import rows
from fastkd.portable._row_chunks import (
    factors_of,
    for_chunks,
    has_zeros,
    in_compute_dtype,
    select,
)
from fastkd.portable._row_terms import CENTRED, N_SCRATCH, terms_of
from fastkd.portable._softmaxes import Scratch, Softmax, centre, certain_rows, softmax
from fastkd.problems.softened import Softened, mirror_of

# divergences whose slopes leave both softmaxes as they are, and those that read no d of them
_PRESERVING = ("forward_kl", "soft_cross_entropy")
_WITHOUT_D = ("jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation")


class _Network(NamedTuple):
    """A network, the divergence whose student it is, and where its gradients go."""

    divergence: str
    weight: Number  # the divergence's own option
    logits: Tensor  # (..., V)
    temperature: Tensor  # [N, 1]
    of_logits: Tensor | None  # (..., V)
    of_temperature: Tensor | None  # (...)

    @property
    def learns(self) -> bool:
        return self.of_logits is not None or self.of_temperature is not None


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
    known = in_compute_dtype(rows_of_problem(problem))
    factors, _ = factors_of(known, upstream[0], None)
    assert isinstance(factors, Tensor)  # without an upstream gradient there is no backward
    networks = student, teacher = _networks(problem, known.weight, needs_grad)
    learning = [i for i in (0, 1) if networks[i].learns]
    if teacher.divergence in _PRESERVING:
        learning.reverse()
    keeps = networks[learning[0]].divergence in _PRESERVING or len(learning) == 1
    n_scratch = N_SCRATCH + 1 + (0 if keeps else 4)
    written = [i for i in (0, 1) if needs_grad[i]]
    dtype, table = statistics.dtype, statistics.reshape(-1, statistics.shape[-1], 1)
    has_masked = has_zeros(factors)

    def work(chunk: slice, chunks: Sequence[Tensor], scratch: Scratch) -> None:
        z, out = chunks[:2], dict(zip(written, chunks[2:], strict=True))
        numbers, factor = table[chunk].unbind(1), factors[chunk]
        both = [
            softmax(z[i], x.temperature[chunk], dtype, scratch[2 * i :], numbers[2 * i : 2 * i + 2])
            for i, x in enumerate(networks)
        ]
        for i in learning:
            own, temperature = networks[i], networks[i].temperature[chunk]
            is_last = i == learning[-1]
            # the other network needs the softmaxes too
            q, p = both[i], both[1 - i]
            if not (keeps or is_last):
                needs_d = own.divergence not in _WITHOUT_D
                q = _copy(q, scratch[6], scratch[7], needs_d)
                p = _copy(p, scratch[8], scratch[9], needs_d)
            mean = numbers[4] if i == 0 and own.divergence in CENTRED else None
            terms = terms_of(own.divergence, q, p, own.weight, scratch[4:6], mean)
            slope = out[i] if i in out and out[i].dtype == dtype else scratch[-1]
            if slope is None:
                slope = torch.empty_like(z[i], dtype=dtype)
            terms.slope(slope, factor / temperature)
            if has_masked:
                select(slope, factor)
            if own.of_temperature is not None:
                above = torch.sub(z[i], both[i].top, out=scratch[4])
                found = _of_temperature(slope, above).div_(temperature)
                own.of_temperature.view(-1, 1)[chunk] = torch.where(factor == 0, 0, found)
            if i in out:
                centre(slope, certain_rows(z[i], [both[i].total]))
                if slope is not out[i]:
                    out[i].copy_(slope)

    gradients = [x.of_logits for x in networks if x.of_logits is not None]
    for_chunks(work, n_scratch, student.logits, teacher.logits, *gradients)
    return *(x.of_logits for x in networks), *(x.of_temperature for x in networks)


def _networks(
    problem: Softened, weight: Number, needs_grad: Sequence[bool]
) -> tuple[_Network, _Network]:
    """Return student and teacher, with new tensors for what needs a gradient."""
    fields = (
        problem.student, problem.teacher, problem.student_temperature, problem.teacher_temperature,
    )  # fmt: skip
    found = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None
        for x, needed in zip(fields, needs_grad, strict=True)
    ]
    return (
        _Network(
            problem.divergence, weight, problem.student,
            problem.student_temperature.reshape(-1, 1), found[0], found[2],
        ),
        _Network(
            *mirror_of(problem.divergence, weight), problem.teacher,
            problem.teacher_temperature.reshape(-1, 1), found[1], found[3],
        ),
    )  # fmt: skip


def _copy(network: Softmax, d: Tensor | None, e: Tensor | None, needs_d: bool) -> Softmax:
    """Return the softmax in two other buffers, the first of which may be left to write to."""
    d = torch.empty_like(network.d) if d is None else d
    return network._replace(
        d=d.copy_(network.d) if needs_d else d,
        e=network.e.clone() if e is None else e.copy_(network.e),
    )


def _of_temperature(slopes: Tensor, above: Tensor) -> Tensor:
    """Return −Σ slopes · (z − pivot) of rows [R, 1], overwriting the latter.

    Excluded classes have no part in it.
    """
    above.nan_to_num_(math.nan, posinf=math.inf, neginf=0)
    return above.mul_(slopes).sum(-1, keepdim=True).neg_()
