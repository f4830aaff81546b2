"""Chunks of a matrix of similarities, S = scale · Q Kᵀ, and gradients from its slopes.

dQ = scale · G K, dK = scale · Gᵀ Q and dscale = Σ ⟨q_i, (G K)_i⟩ for slopes G in S. Of rows that
are divided by their lengths gradients lose their part along the row, and are divided too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._pairs import SHORTEST

_CHUNK_ELEMENTS = {"cpu": 1 << 22}  # 16 MB of float32, what a CPU's last cache holds
_LARGE_CHUNK = 1 << 24  # elsewhere a chunk must pay for its launches
_LARGEST = 60.0  # exp of it, times the keys, is a float32 number, and so is exp(-60)
_LEAST_SUM = 1e-25  # below, exponentials that count may have been flushed to 0
HEADROOM = 12  # of slopes in half precision: in float16 what is small shall not vanish


class Similarities:
    """Of queries and keys, or of the queries among each other; `wanted`: what gets a gradient.

    `half` holds both without rounding; slopes are at most the largest of `weights`, or 1.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor | None,
        scale: Tensor,
        *,
        dtype: torch.dtype,
        first: int,
        two_views: bool = False,
        normalize: bool,
        half: str,
        weights: Tensor | None = None,
        wanted: str,
    ) -> None:
        self.scale, self.first, self.two_views = scale.to(dtype), first, two_views
        self.q, self.q_lengths = _units(query.to(dtype), normalize)
        self.k, self.k_lengths = self.q, self.q_lengths
        if key is not None:
            self.k, self.k_lengths = _units(key.to(dtype), normalize)
        self.is_square, self.wanted = key is None, wanted.split()
        # of one matrix that is both, the two are one gradient
        trains_key = ("query" if key is None else "key") in self.wanted
        self.dq = torch.empty_like(self.q) if {"query", "scale"} & {*self.wanted} else None
        self.dk = torch.zeros_like(self.k) if trains_key else None
        self.halves: tuple[Half, Half] | None = None
        if half and len(query) and multiplies_halves(self.q, half):
            of_queries = in_half(query, self.q_lengths, half)
            of_keys = of_queries if key is None else in_half(key, self.k_lengths, half)
            most = self.scale.new_ones(1) if weights is None else weights
            self.lift = 2**HEADROOM / most.amax().clamp(min=1e-30)
            self.halves = of_queries, of_keys

    def buffer(self) -> Tensor:
        """For a chunk of rows."""
        n, m = len(self.q), len(self.k)
        elements = _CHUNK_ELEMENTS.get(self.q.device.type, _LARGE_CHUNK)
        n_chunks = max(1, -(-n * m // elements))
        return self.q.new_empty(min(n, max(1, -(-n // n_chunks))), m)

    def chunks(self, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of S, one chunk after the other in the same buffer."""
        n, step = len(self.q), len(buffer)
        for start in range(0, n, step or 1):
            rows = slice(start, min(start + step, n))
            yield rows, self.rows(rows, buffer)

    def rows(self, rows: slice, buffer: Tensor) -> Tensor:
        part = buffer[: rows.stop - rows.start]
        if self.halves is None:
            return torch.mm(self.q[rows] * self.scale, self.k.mT, out=part)
        (q, of_q), (k, of_k) = self.halves
        _product(q[rows], k.mT, part)
        return part.mul_((self.scale * of_q[rows])[:, None]).mul_(of_k)

    def leave_out(self, rows: slice, part: Tensor, value: float) -> Tensor:
        """The own pairs, on diagonals of these rows, become `value`."""
        n, start = len(self.q), self.first + rows.start
        if self.first >= 0:
            part[:, start : start + len(part)].diagonal().fill_(value)
        if self.two_views:  # the other view is half of the own queries away
            half = n // 2
            for first, last, other in ((0, half, half), (half, n, -half)):
                low, high = max(rows.start, first), min(rows.stop, last)
                if low < high:
                    of_view = part[low - rows.start : high - rows.start]
                    place = self.first + low + other
                    of_view[:, place : place + len(of_view)].diagonal().fill_(value)
        return part

    def shift(self) -> float | None:
        """What S exceeds by _LARGEST at most; None where the exponentials need maxima.

        So on a GPU, which a look at the values would wait for.
        """
        if not self.q.is_cpu or not len(self.q) or not len(self.k):
            return None
        longest = [torch.linalg.vector_norm(x, dim=1).max() for x in (self.q, self.k)]
        bound = (self.scale.abs() * longest[0] * longest[1]).item()
        return max(0.0, bound - _LARGEST) if bound < 4 * _LARGEST else None

    def exponentials(self, rows: slice, part: Tensor, shift: float) -> Tensor:
        """exp(S − shift) in place, 0 for what is left out."""
        if shift:
            part.sub_(shift)
        return self.leave_out(rows, part.exp_(), 0.0)

    def add(self, rows: slice, slopes: Tensor, of_rows: Tensor | None = None) -> None:
        """Of the loss in these rows of S: `slopes`, each row of them times its `of_rows`."""
        if self.halves is not None:
            self._add_halves(rows, slopes if of_rows is None else slopes * of_rows[:, None])
            return
        if self.dq is not None:
            torch.mm(slopes, self.k, out=self.dq[rows])
            if of_rows is not None:
                self.dq[rows].mul_(of_rows[:, None])
        if self.dk is not None:
            q = self.q[rows] if of_rows is None else self.q[rows] * of_rows[:, None]
            self.dk.addmm_(slopes.mT, q)

    def _add_halves(self, rows: slice, slopes: Tensor) -> None:
        assert self.halves is not None
        (q, of_q), (k, of_k) = self.halves
        slopes = slopes * self.lift
        if self.dq is not None:
            _product((slopes * of_k).to(k.dtype), k, self.dq[rows])
            self.dq[rows] /= self.lift
        if self.dk is not None:
            of_keys = torch.empty_like(self.dk)
            _product((slopes * of_q[rows, None]).to(q.dtype).mT, q[rows], of_keys)
            self.dk += of_keys / self.lift

    def reset(self) -> None:
        """Forget what was added."""
        if self.dk is not None:
            self.dk.zero_()

    def gradients(self) -> list[Tensor]:
        """What is wanted of query, key and scale; the last to ask: it is computed in place."""
        found = []
        if "scale" in self.wanted and self.dq is not None:
            found.append((self.q * self.dq).sum().view(1))
        if not self.is_square and self.dk is not None:
            found.insert(0, _of_lengths(self.dk.mul_(self.scale), self.k, self.k_lengths))
        if "query" in self.wanted and self.dq is not None:
            if self.is_square and self.dk is not None:
                self.dq += self.dk
            found.insert(0, _of_lengths(self.dq.mul_(self.scale), self.q, self.q_lengths))
        return [x.flatten() for x in found]


class Half(NamedTuple):
    """matrix · factors are the rows, divided by their lengths if these are known."""

    matrix: Tensor  # [n, D]
    factors: Tensor  # [n]


def in_half(rows: Tensor, lengths: Tensor | None, half: str) -> Half:
    dtype = getattr(torch, half)
    if lengths is None:
        return Half(rows.to(dtype), rows.new_ones(len(rows)))
    if dtype == torch.bfloat16:
        return Half(rows.to(dtype), 1 / lengths[:, 0])
    # float16 does not bear any length; that of 0 may have any factor
    _, exponents = torch.frexp(lengths)
    factors = torch.ldexp(1 / lengths, exponents)[:, 0].clamp_(max=2)
    return Half(torch.ldexp(rows, -exponents).to(dtype), factors)


def multiplies_halves(rows: Tensor, half: str) -> bool:
    """Whether products of half precision have a result in what is computed in."""
    if not rows.is_cuda or torch.version.hip is not None or rows.dtype != torch.float32:
        return False
    rounded = getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    return half == "bfloat16" or not rounded


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _units(rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Rows divided by their lengths, and these."""
    if not normalize:
        return rows, None
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=SHORTEST)
    return rows / lengths, lengths


def _of_lengths(gradients: Tensor, units: Tensor, lengths: Tensor | None) -> Tensor:
    """From gradients in the units, in place, those in the rows that they were made of."""
    if lengths is None:
        return gradients
    along = torch.linalg.vecdot(gradients, units)[:, None]
    return gradients.addcmul_(units, along, value=-1).div_(lengths)


def are_large(sums: Tensor) -> bool:
    """Whether sums of shifted exponentials have lost nothing that counts."""
    return not sums.numel() or bool(sums.min() > _LEAST_SUM)


def split(statistics: Tensor, gradients: tuple[Tensor, ...], upstream: Tensor) -> None:
    """The gradients that the forward made, one after another, times `upstream`."""
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, made in zip(gradients, statistics.split(sizes), strict=True):
        torch.mul(made.view_as(gradient), upstream, out=gradient)
