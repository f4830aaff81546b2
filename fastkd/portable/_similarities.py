"""Chunks of a matrix of similarities, S = scale · Q Kᵀ, and gradients from its slopes.

dQ = scale · G K, dK = scale · Gᵀ Q and dscale = Σ ⟨q_i, (G K)_i⟩ for slopes G in S. Of rows that
are divided by their lengths gradients lose their part along the row, and are divided too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._pairs import SHORTEST

_CHUNK_ELEMENTS = {"cpu": 1 << 22}  # 16 MB of float32, what a CPU's last cache holds
_LARGE_CHUNK = 1 << 24  # elsewhere a chunk must pay for its launches
LARGEST = 60.0  # exp of it, times the keys, is a float32 number, and so is exp(-60)
LEAST = 1e-25  # below, exponentials that count may have been flushed to 0
LINEAR = 50.0  # from where a softplus is its argument, in float64 too
_LINE = 16  # numbers: rows that start on one are read and multiplied quicker
_PAGE = 1024  # of float32: rows whole pages apart share few lines of a CPU's cache
HEADROOM = 12  # of slopes in half precision: in float16 what is small shall not vanish


class Similarities:
    """Of queries and keys, or of the queries among each other; `wanted`: what gets a gradient.

    After the keys come those of a `bank`, which get none. `half` holds all of them without
    rounding; slopes are at most the largest of `weights`, or 1. `classes` of all keys: for each
    pair of one class its `attractions` are taken off the slopes that `add_softmax` adds.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor | None,
        scale: Tensor,
        *,
        bank: Tensor | None = None,
        dtype: torch.dtype,
        first: int,
        two_views: bool = False,
        normalize: bool,
        half: str,
        weights: Tensor | None = None,
        classes: Tensor | None = None,
        attractions: Tensor | None = None,
        wanted: str,
    ) -> None:
        self.scale, self.first, self.two_views = scale.to(dtype), first, two_views
        self.wanted = wanted.split()
        self.spare: Tensor | None = None
        self.classes, self.attractions = classes, attractions
        keys = query if key is None else key
        self.n_trained = len(keys)
        if bank is not None:
            keys = torch.cat([keys, bank])
        self.stride = -(-len(keys) // _LINE) * _LINE
        if query.is_cpu and not self.stride % _PAGE:
            self.stride += _LINE
        self.q, self.q_lengths = units(query.to(dtype), normalize)
        self.k, self.k_lengths = self.q, self.q_lengths
        if keys is not query:
            self.k, self.k_lengths = units(keys.to(dtype), normalize)
        self.halves: tuple[Half, Half] | None = None
        if half and len(query) and multiplies_halves(self.q, half):
            of_queries = in_half(query, self.q_lengths, half)
            of_keys = of_queries if keys is query else in_half(keys, self.k_lengths, half)
            most = self.scale.new_ones(1) if weights is None else weights
            self.lift = 2**HEADROOM / most.amax().clamp(min=1e-30)
            self.halves = of_queries, of_keys
        trains_query = bool({"query", "scale"} & {*self.wanted})
        self.of_queries = _Sums(self.q, self.k) if trains_query else None
        self.of_keys = None
        if key is None:
            self.of_keys = self.of_queries if "query" in self.wanted else None
        elif "key" in self.wanted:
            self.of_keys = _Sums(self.k[: self.n_trained], self.q)

    def buffer(self) -> Tensor:
        """For a chunk of rows."""
        n, m = len(self.q), len(self.k)
        elements = _CHUNK_ELEMENTS.get(self.q.device.type, _LARGE_CHUNK)
        n_chunks = max(1, -(-n * m // elements))
        return self.q.new_empty(min(n, max(1, -(-n // n_chunks))), self.stride)[:, :m]

    def chunks(self, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of S, one chunk after the other in the same buffer."""
        n, step = len(self.q), len(buffer)
        for start in range(0, n, step or 1):
            rows = slice(start, min(start + step, n))
            yield rows, self.rows(rows, buffer)

    def rows(self, rows: slice, buffer: Tensor) -> Tensor:
        part = self.products(rows, buffer)
        if self.halves is None:
            return part
        (_, of_q), (_, of_k) = self.halves
        return part.mul_((self.scale * of_q[rows])[:, None]).mul_(of_k)

    def products(self, rows: slice, buffer: Tensor) -> Tensor:
        """Rows of S; in half precision without the scale and the factors of both."""
        part = buffer[: rows.stop - rows.start]
        if self.halves is None:
            return torch.mm(self.q[rows] * self.scale, self.k.mT, out=part)
        return _product(self.halves[0].matrix[rows], self.halves[1].matrix.mT, part)

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
        """What S exceeds by LARGEST at most; None where the exponentials need maxima.

        So on a GPU, which a look at the values would wait for.
        """
        if not self.q.is_cpu or not len(self.q) or not len(self.k):
            return None
        longest = [torch.linalg.vector_norm(x, dim=1).max() for x in (self.q, self.k)]
        bound = (self.scale.abs() * longest[0] * longest[1]).item()
        return max(0.0, bound - LARGEST) if bound < 4 * LARGEST else None

    def exponentials(self, rows: slice, part: Tensor, shift: float) -> Tensor:
        """exp(S − shift) in place, 0 for what is left out."""
        if shift:
            part.sub_(shift)
        return self.leave_out(rows, part.exp_(), 0.0)

    def own(self, of_keys: Tensor, rows: slice) -> Tensor:
        """Of numbers of the keys those of these rows' own ones."""
        return of_keys[self.first + rows.start : self.first + rows.stop]

    def of_spare(self, part: Tensor) -> Tensor:
        """Memory for as many numbers."""
        if self.spare is None:
            self.spare = self.buffer()
        return self.spare[: len(part)]

    def log_sums(self, rows: slice, part: Tensor) -> Tensor:
        """log Σ_j exp S_ij with maxima, as all that follows; `part` then has −∞ for own pairs."""
        return self.leave_out(rows, part, -torch.inf).logsumexp(1)

    def fold(self, rows: slice, part: Tensor, largest: Tensor, sums: Tensor) -> None:
        """A chunk after `log_sums` into Σ_i exp(S_ij − largest_j) of the first columns."""
        part = part[:, : len(largest)]
        risen = torch.maximum(largest, part.amax(0)).clamp_(min=_lowest(part))
        sums.mul_((largest - risen).exp_()).add_((part - risen).exp_().sum(0))
        largest.copy_(risen)

    def add_exponentials(
        self,
        rows: slice,
        part: Tensor,
        of_rows: Tensor,
        slopes: Tensor,
        of_columns: Tensor | None = None,
        column_slopes: Tensor | None = None,
    ) -> None:
        """slopes_i exp(S_ij − of_rows_i), and the same of the first columns, as slopes in S."""
        self.leave_out(rows, part, -torch.inf)
        by_columns = None
        if of_columns is not None and column_slopes is not None:
            by_columns = part[:, : len(of_columns)] - of_columns.clamp(min=_lowest(part))
            by_columns.exp_().mul_(column_slopes)
        part.sub_(of_rows[:, None].clamp(min=_lowest(part))).exp_()
        if by_columns is None:
            self.add_softmax(rows, part, slopes)
        else:
            part.mul_(slopes[:, None])[:, : by_columns.shape[1]] += by_columns
            self.add(rows, part)

    def add_softmax(self, rows: slice, part: Tensor, slopes: Tensor) -> None:
        """slopes_i `part`_ij as slopes in S, less what attracts the others of a class."""
        if self.classes is None or self.attractions is None:
            self.add(rows, part, slopes)
            return
        alike = self.of_spare(part)
        torch.eq(self.own(self.classes, rows)[:, None], self.classes, out=alike)
        self.leave_out(rows, alike, 0.0)
        # the difference of each pair: sums of both would round it away
        part.mul_(slopes[:, None]).addcmul_(alike, self.attractions, value=-1)
        self.add(rows, part)

    def add_pairs(
        self, rows: slice, part: Tensor, anchors: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Σ_j softplus(S_ij − a_i) and its slope in a_i; weights_i of it are in the loss."""
        self.leave_out(rows, part.sub_(anchors[:, None]), -torch.inf)
        of_pairs = self.of_spare(part)
        F.softplus(part, threshold=LINEAR, out=of_pairs)  # type: ignore[call-arg]
        losses = of_pairs.sum(1)
        if not self.wanted:
            return losses, torch.zeros_like(losses)
        slopes = part.sigmoid_().sum(1)
        self.add(rows, part, weights)
        return losses, slopes

    def add(self, rows: slice, slopes: Tensor, of_rows: Tensor | None = None) -> None:
        """Of the loss in these rows of S: `slopes`, each row of them times its `of_rows`."""
        if self.halves is not None:
            self._add_halves(rows, slopes if of_rows is None else slopes * of_rows[:, None])
            return
        if self.of_queries is not None:
            self.of_queries.add(slopes, rows, slice(None), of_rows=of_rows)
        if self.of_keys is not None:
            trained = slice(self.n_trained)
            self.of_keys.add(slopes[:, trained].mT, trained, rows, of_columns=of_rows)

    def _add_halves(self, rows: slice, slopes: Tensor) -> None:
        assert self.halves is not None
        (_, of_q), (_, of_k) = self.halves
        slopes, of_queries, of_keys = slopes * self.lift, None, None
        if self.of_queries is not None:
            of_queries = slopes * of_k
        if self.of_keys is not None:
            of_keys = slopes[:, : self.n_trained] * of_q[rows, None]
        self.add_in_half(rows, of_queries, of_keys)

    def add_in_half(self, rows: slice, of_queries: Tensor | None, of_keys: Tensor | None) -> None:
        """Slopes times `lift`, those for the queries times the keys' factors, and vice versa."""
        assert self.halves is not None
        q, k = (side.matrix for side in self.halves)
        if self.of_queries is not None and of_queries is not None:
            values = _product(of_queries.to(k.dtype), k, torch.empty_like(self.q[rows]))
            self.of_queries.values[rows] += values / self.lift
        if self.of_keys is not None and of_keys is not None:
            values = torch.empty_like(self.of_keys.values)
            _product(of_keys.to(q.dtype).mT, q[rows], values)
            self.of_keys.values += values / self.lift

    def reset(self) -> None:
        """Forget what was added."""
        for sums in (self.of_queries, self.of_keys):
            if sums is not None:
                sums.reset()

    def gradients(self) -> list[Tensor]:
        """What is wanted of query, key and scale; the last to ask: it is computed in place."""
        found, of_queries, of_keys = [], self.of_queries, self.of_keys
        if "scale" in self.wanted and of_queries is not None:
            along = of_queries.along()
            # of one matrix that is both, each pair was added from both sides
            found.append((along / 2 if of_keys is of_queries else along).view(1))
        if of_keys is not None and of_keys is not of_queries:
            lengths = None if self.k_lengths is None else self.k_lengths[: self.n_trained]
            found.insert(0, of_keys.gradient(self.scale, lengths))
        if "query" in self.wanted and of_queries is not None:
            found.insert(0, of_queries.gradient(self.scale, self.q_lengths))
        return [x.flatten() for x in found]


class _Sums:
    """Σ_j G_ij y_j of rows x_i, from slopes G."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.values = x, y, torch.zeros_like(x)

    def add(
        self,
        slopes: Tensor,
        rows: slice,
        columns: slice,
        *,
        of_rows: Tensor | None = None,
        of_columns: Tensor | None = None,
    ) -> None:
        """Of these rows and columns: `slopes`, times the factors of rows and columns."""
        y, values = self.y[columns], self.values[rows]
        if of_columns is not None:
            y = y * of_columns[:, None]
        if of_rows is None:
            values.addmm_(slopes, y)
        else:
            values.addcmul_(slopes @ y, of_rows[:, None])

    def reset(self) -> None:
        self.values.zero_()

    def along(self) -> Tensor:
        """Σ_ij G_ij ⟨x_i, y_j⟩."""
        return (self.x * self.values).sum()

    def gradient(self, scale: Tensor, lengths: Tensor | None) -> Tensor:
        """In the rows, in place."""
        return of_lengths(self.values.mul_(scale), self.x, lengths)


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


def units(rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Rows divided by their lengths, and these."""
    if not normalize:
        return rows, None
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=SHORTEST)
    return rows / lengths, lengths


def of_lengths(gradients: Tensor, rows: Tensor, lengths: Tensor | None) -> Tensor:
    """From gradients in the units `rows`, in place, those in what they were made of."""
    if lengths is None:
        return gradients
    along = torch.linalg.vecdot(gradients, rows)[:, None]
    # what is not longer is divided by a constant, and loses nothing
    along.mul_(lengths > SHORTEST)
    return gradients.addcmul_(rows, along, value=-1).div_(lengths)


def _lowest(like: Tensor) -> float:
    """In the place of a maximum of nothing: −∞ − (−∞) would be no number."""
    return torch.finfo(like.dtype).min


def are_large(sums: Tensor) -> bool:
    """Whether sums of shifted exponentials have lost nothing that counts."""
    return not sums.numel() or bool(sums.min() > LEAST)


def split(statistics: Tensor, gradients: tuple[Tensor, ...], upstream: Tensor) -> None:
    """The gradients that the forward made, one after another, times `upstream`."""
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, made in zip(gradients, statistics.split(sizes), strict=True):
        torch.mul(made.view_as(gradient), upstream, out=gradient)
