"""Sheets of a matrix of similarities, S = scale · Q Kᵀ, and gradients from its slopes.

For slopes G in S the gradients are dQ = scale · G K, dK = scale · Gᵀ Q and
dscale = Σ ⟨q_i, (G K)_i⟩. In rows that are divided by their lengths they lose their part along the
row, and are divided too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._products import multiplies_halves, multiply
from fastkd.portable import _chunks
from fastkd.problems.pairs import HEADROOM, Half, in_half, of_lengths, units

LARGEST = 60.0  # exp(60) times the keys is a float32 number, and so is exp(−60)
LEAST = 1e-25  # sums below it may lack exponentials that were flushed to 0
_LOG2E = 1 / math.log(2)
_LINE = 16  # numbers: rows that start on a line of the cache are read and multiplied faster
_N_CHUNKS = 8  # of a sheet, which stay in the cache
_LEAST_ROWS = 64  # of a chunk, because a product of fewer reads more than it computes
_PAGE = 1024  # numbers: rows whole pages apart would share few lines of a CPU's cache


class PairChunks:
    """Rows of S in sheets, chunks of which workers take, and the gradients that they add up to.

    Args:
        query: [n, D].
        key: [M, D]; None: the queries are the keys.
        scale: A 0-dim tensor.
        needs_grad: For the query, the key and the scale.
        bank: [B, D], keys after the others, which get no gradient.
        first: Query i and key first + i are of one example, and the pair is masked; -1: none is.
        two_views: Whether the pairs of two views of an example are masked too.
        masked_pairs: [n, M + B], further pairs that are masked.
        normalize: Whether rows are divided by their lengths.
        half: The half precision that holds all rows without rounding, or "".
        weights: [n], slopes are at most the largest of these; None: at most 1.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor | None,
        scale: Tensor,
        needs_grad: Sequence[bool],
        *,
        first: int,
        half: str,
        bank: Tensor | None = None,
        two_views: bool = False,
        masked_pairs: Tensor | None = None,
        normalize: bool = True,
        weights: Tensor | None = None,
    ) -> None:
        self.scale, self.first, self.two_views = scale.to(query.dtype), first, two_views
        self.normalize, self.needs_grad = normalize, tuple(needs_grad[:3])
        self.masked_pairs = masked_pairs
        keys = query if key is None else key
        self.n_trained = len(keys)
        if bank is not None:
            keys = torch.cat([keys, bank])
        self.q, self.q_lengths = units(query, normalize)
        self.k, self.k_lengths = self.q, self.q_lengths
        if keys is not query:
            self.k, self.k_lengths = units(keys, normalize)
        self.halves: tuple[Half, Half] | None = None
        if half and len(query) and multiplies_halves(query, half):
            of_queries = in_half(query, self.q_lengths, half)
            of_keys = of_queries if keys is query else in_half(keys, self.k_lengths, half)
            most = self.scale.new_ones(1) if weights is None else weights
            self.lift = 2**HEADROOM / most.amax().clamp(min=1e-30)
            self.halves = of_queries, of_keys
        needs_query, needs_key, needs_scale = self.needs_grad
        self.of_queries = _Sums(self.q) if needs_query or needs_scale else None
        self.of_keys = None
        if key is None:
            self.of_keys = self.of_queries if needs_query else None
        elif needs_key:
            self.of_keys = _Sums(self.k[: self.n_trained])
        limit = _chunks.most_elements(query, on_cpu=1 << 23, elsewhere=1 << 24)
        n, m = len(self.q), len(self.k)
        n_sheets = max(1, -(-n * m // limit))
        self.n_rows = min(n, max(1, -(-n // n_sheets)))  # of a sheet
        # one product gives both sides of each pair
        of_one_kind = self.of_keys is not None and self.of_keys is self.of_queries
        self.adds_both_sides = of_one_kind and self.n_rows == n and self.halves is None
        self.stride = -(-m // _LINE) * _LINE
        if query.is_cpu and not self.stride % _PAGE:
            self.stride += _LINE

    # ------------------------------------------------------------------------------- rows of S

    def buffer(self) -> Tensor:
        """Return memory for the rows of a sheet."""
        return self.q.new_empty(self.n_rows, self.stride)[:, : len(self.k)]

    def for_each(
        self,
        buffer: Tensor,
        work: Callable[[slice, Tensor, Tensor], Any],
        by_columns: Callable[[slice, Tensor, slice, Tensor], None] | None = None,
        *,
        is_solved: bool = False,
    ) -> list[Any]:
        """Call work(rows, rows of S, spare) for each chunk, and return the results in order.

        The buffer holds a sheet of S, whose rows workers share out. Once all of them are done, they
        share out its columns: by_columns(rows, the sheet, columns of trained keys, spare). A worker
        has spare memory for a chunk. `is_solved` says that the buffer has what an earlier loop made
        of S.
        """
        n, n_rows, n_columns = len(self.q), self._share(self.n_rows), self._share(self.n_trained)
        spare = functools.partial(self.q.new_empty, n_rows * self.stride)
        results: list[Any] = []

        def of_rows(rows: slice, spare: Tensor) -> Any:
            part = buffer[self._place(rows)] if is_solved else self.rows(rows, buffer)
            return work(rows, part, spare[: part.numel()].view(part.shape))

        for sheet in _chunks.cut(range(n), self.n_rows):
            rows = _chunks.cut(range(sheet.start, sheet.stop), n_rows)
            results += _chunks.for_each(of_rows, rows, spare)
            if by_columns is not None:
                of_columns = functools.partial(by_columns, sheet, buffer[self._place(sheet)])
                columns = _chunks.cut(range(self.n_trained), n_columns)
                _chunks.for_each(of_columns, columns, spare)
        return results

    def _place(self, rows: slice) -> slice:
        """Return where a sheet has these rows."""
        start = rows.start % self.n_rows
        return slice(start, start + rows.stop - rows.start)

    def _share(self, n: int) -> int:
        """Return how many of n rows or columns a chunk has: few are slow to multiply."""
        return max(-(-n // _N_CHUNKS), _LEAST_ROWS) if are_many(self.q, len(self.k)) else n

    def rows(self, rows: slice, buffer: Tensor) -> Tensor:
        """Return these rows of S, in the buffer."""
        part = self.products(rows, buffer)
        if self.halves is None:
            return part
        (_, of_q), (_, of_k) = self.halves
        return part.mul_((self.scale * of_q[rows])[:, None]).mul_(of_k)

    def products(self, rows: slice, buffer: Tensor) -> Tensor:
        """Return these rows of S, in half precision without the scale and the factors of rows."""
        part = buffer[self._place(rows)]
        if self.halves is None:
            multiply(self.q[rows] * self.scale, self.k.mT, part)
            return part
        return _product(self.halves[0].matrix[rows], self.halves[1].matrix.mT, part)

    def mask(self, rows: slice, part: Tensor, value: float) -> Tensor:
        """Fill the masked pairs of these rows, which are no negatives, with a value."""
        for _, diagonal in self._own_pairs(rows, part):
            diagonal.fill_(value)
        if self.two_views:
            for _, diagonal in self.positive_pairs(rows, part):
                diagonal.fill_(value)
        if self.masked_pairs is not None:
            part.masked_fill_(self.masked_pairs[rows], value)
        return part

    def positive_pairs(self, rows: slice, part: Tensor) -> list[tuple[slice, Tensor]]:
        """Return views of the positive pairs of these rows: (rows of the chunk, a diagonal)."""
        if not self.two_views:
            return self._own_pairs(rows, part)
        n, views = len(self.q), []
        for low, high, shift in ((0, n // 2, n // 2), (n // 2, n, -(n // 2))):
            low, high = max(rows.start, low), min(rows.stop, high)
            if low < high:
                place = self.first + low + shift
                some = slice(low - rows.start, high - rows.start)
                views.append((some, part[some, place : place + high - low].diagonal()))
        return views

    def _own_pairs(self, rows: slice, part: Tensor) -> list[tuple[slice, Tensor]]:
        if self.first < 0:
            return []
        start = self.first + rows.start
        return [(slice(len(part)), part[:, start : start + len(part)].diagonal())]

    # ---------------------------------------------------------------------------- exponentials

    def shift(self) -> float | None:
        """Return by how much |S| may exceed LARGEST; None if exponentials need maxima.

        They do on a GPU, where a look at the values would be a host sync.
        """
        if not self.q.is_cpu or not len(self.q) or not len(self.k):
            return None
        bound = self.scale.abs()
        if not self.normalize:
            for x in (self.q, self.k):
                bound = bound * torch.linalg.vector_norm(x, dim=1).max()
        largest = bound.item()
        return max(0.0, largest - LARGEST) if largest < 4 * LARGEST else None

    def exponentials(
        self, rows: slice, part: Tensor, shift: float | None
    ) -> tuple[Tensor | float, Tensor]:
        """Turn rows of S into exp(S − shift), in place, with 0 for masked pairs.

        Return the shift and the sums of the rows. Without a shift, that of a row is its maximum.
        """
        if shift is None:
            largest = self.mask(rows, part, -torch.inf).amax(1).clamp_(min=lowest(part))
            return largest, powers(part.sub_(largest[:, None])).sum(1)
        return shift, self.shifted_exponentials(rows, part, shift).sum(1)

    def shifted_exponentials(self, rows: slice, part: Tensor, shift: float) -> Tensor:
        """Return exp(S − shift), in place, with 0 for masked pairs."""
        if shift:
            part.sub_(shift)
        return self.mask(rows, powers(part), 0.0)

    # ------------------------------------------------------------------------------- gradients

    def add(self, rows: slice, slopes: Tensor, of_rows: Tensor | None = None) -> None:
        """Add to the sums of these queries what the slopes of the loss in their rows of S give.

        Each row counts `of_rows` times. The slopes stay in the buffer, for `add_to_keys`.
        """
        if of_rows is not None:
            slopes.mul_(of_rows[:, None])
        if self.halves is not None:
            self._add_halves(rows, slopes)
        elif self.of_queries is not None and not self.adds_both_sides:
            multiply(slopes, self.k, self.of_queries.values[rows], adds=True)

    def add_to_keys(self, rows: slice, sheet: Tensor, columns: slice, spare: Tensor) -> None:
        """Add to the sums of some keys what the slopes in these rows of S give."""
        if self.of_keys is None or self.halves is not None:
            return
        values = self.of_keys.values[columns]
        if self.adds_both_sides:
            part = sheet[columns]
            both = torch.add(part, sheet[:, columns].mT, out=spare[: part.numel()].view(part.shape))
            multiply(both, self.k, values, adds=True)
        else:
            multiply(sheet[:, columns].mT, self.q[rows], values, adds=True)

    def _add_halves(self, rows: slice, slopes: Tensor) -> None:
        assert self.halves is not None
        (_, of_q), (_, of_k) = self.halves
        slopes = slopes * self.lift
        if self.of_queries is not None:
            self.add_in_half(rows, of_queries=slopes * of_k)
        if self.of_keys is not None:
            self.add_in_half(rows, of_keys=slopes[:, : self.n_trained] * of_q[rows, None])

    def add_in_half(
        self, rows: slice, of_queries: Tensor | None = None, of_keys: Tensor | None = None
    ) -> None:
        """Add slopes · `lift`: those for the queries times the keys' factors, and vice versa."""
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
                sums.values.zero_()

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients in query, key and scale; once, because they are made in place."""
        of_queries, of_keys = self.of_queries, self.of_keys
        in_query = in_key = in_scale = None
        needs_query, _, needs_scale = self.needs_grad
        if needs_scale and of_queries is not None:
            in_scale = _chunks.total(self.q * of_queries.values)
            if of_keys is of_queries:  # each pair was added from both sides
                in_scale = in_scale / 2
        if of_keys is not None and of_keys is not of_queries:
            lengths = None if self.k_lengths is None else self.k_lengths[: self.n_trained]
            in_key = of_keys.gradient(self.scale, lengths)
        if needs_query and of_queries is not None:
            in_query = of_queries.gradient(self.scale, self.q_lengths)
        return in_query, in_key, in_scale


def are_many(queries: Tensor, n_keys: int) -> bool:
    """Return whether workers share the pairs, which only a CPU has."""
    least = _chunks.most_elements(queries, on_cpu=1 << 18, elsewhere=0)
    return queries.is_cpu and len(queries) * n_keys > least


class _Sums:
    """Σ_j G_ij y_j for the rows x_i, from slopes G."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.values = x, torch.zeros_like(x)

    def gradient(self, scale: Tensor, lengths: Tensor | None) -> Tensor:
        """Return the gradient in the rows before they were divided by their lengths, in place."""
        return of_lengths(self.values.mul_(scale), self.x, lengths)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def powers(x: Tensor) -> Tensor:
    """Return exp x, in place, as a power of 2.

    `exp` itself takes more than twice as long, and thirty times as long where its results are
    subnormal, as most are when similarities spread widely.
    """
    return x.mul_(_LOG2E).exp2_()


def lowest(like: Tensor) -> float:
    """Return a finite number for the maximum of masked rows, since −∞ − (−∞) would be NaN."""
    return torch.finfo(like.dtype).min


def are_large(sums: Tensor) -> bool:
    """Return whether sums of shifted exponentials have lost none that matters."""
    return not sums.numel() or bool(sums.min() > LEAST)
