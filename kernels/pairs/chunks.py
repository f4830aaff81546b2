"""Chunks of rows of S whose products cuBLAS makes.

They solve what tiles cannot: wide embeddings, and float32 that must not be rounded.

One kernel reads a chunk of products for the sums of its rows or columns, and another one for the
slopes G, which it leaves as the next products want them: dQ = scale · G K, dK = scale · Gᵀ Q and
dscale = Σ_i ⟨q_i, (G K)_i⟩. The slopes of rows are known as soon as their chunk is complete, so
that one pass makes loss and gradient; those of columns are known after all rows, and a second pass
follows.

Memory: 4 bytes for each number of a chunk, and 2 more for slopes in half precision. A chunk has
2^26 numbers at most, and never more than S has. Work: per element of S a pass writes 4 bytes and
reads 4 in each kernel; slopes are written and, in each of two products, read with 4 bytes or in
half precision with 2. Each chunk of C rows also adds to all of dK: 8 D / C bytes per element.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastkd import _products as products
from fastkd.kernels.device import device_of
from fastkd.kernels.pairs.chunk_sweeps import (
    Factors,
    LogSums,
    Products,
    SlopesOut,
    exponentials_of_chunk,
    fold_chunk,
    log_sums_of_chunk,
    pairs_of_chunk,
)
from fastkd.kernels.pairs.sweeps import Classes
from fastkd.problems.pairs import (
    HEADROOM,
    Half,
    in_half,
    of_lengths,
    units,
)

ELEMENTS = 1 << 26  # of a chunk, which must pay for its launches and for adding to all of dK
LANES = 1024  # numbers that a program reads at once: 16 bytes of half precision for each thread
TURNS = 2  # times that it does so before it compares maxima
_ROW_TURNS = 4  # the same where columns are added up
_PROGRAMS = 4  # per multiprocessor, so that some wait for memory while others compute
_LINE = 16  # numbers: rows that start on one are read and multiplied quicker


class Chunks:
    """The similarities of one network, S = scale · Q Kᵀ, and gradients from slopes in them.

    needs_grad is that of query, key and scale. Slopes are at most the largest of `weights`, or 1.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor | None,
        scale: Tensor,
        *,
        bank: Tensor | None = None,
        first: int,
        two_views: bool = False,
        normalize: bool = True,
        half: str,
        weights: Tensor | None = None,
        needs_grad: Sequence[bool] = (False, False, False),
    ) -> None:
        self.scale, self.first, self.two_views = scale.to(query.dtype), first, two_views
        self.is_one_matrix = key is None
        keys = query if key is None else key
        self.n_trained = len(keys)
        if bank is not None:
            keys = torch.cat([keys, bank])
        self.stride = triton.cdiv(len(keys), _LINE) * _LINE
        self.q, self.q_lengths = units(query, normalize)
        self.k, self.k_lengths = self.q, self.q_lengths
        if keys is not query:
            self.k, self.k_lengths = units(keys, normalize)
        self.halves: tuple[Half, Half] | None = None
        if half and len(query) and products.multiplies_halves(self.q, half):
            of_queries = in_half(query, self.q_lengths, half)
            of_keys = of_queries if keys is query else in_half(keys, self.k_lengths, half)
            self.halves = of_queries, of_keys
            self.key_factors = self.padded(of_keys.factors)
            most = self.scale.new_ones(1) if weights is None else weights
            self.lift = 2**HEADROOM / most.amax().clamp(min=1e-30)
        needs_query, needs_key, self.needs_scale = needs_grad
        # Σ_j G_ij k_j for each query, and Σ_i G_ij q_i for each key, of one matrix in one place
        self.query_sums = torch.zeros_like(self.q) if needs_query or self.needs_scale else None
        self.key_sums: Tensor | None = None
        if self.is_one_matrix:
            self.key_sums = self.query_sums if needs_query else None
        elif needs_key:
            self.key_sums = torch.zeros_like(self.k[: self.n_trained])
        self.needs_query = needs_query
        self.trains = self.query_sums is not None or self.key_sums is not None
        self._stored: Tensor | None = None

    def padded(self, numbers: Tensor) -> Tensor:
        """Return a number for each column in memory, to be read a vector at a time."""
        return F.pad(numbers, (0, self.stride - len(numbers)))

    # ---------------------------------------------------------------------------- the products

    def buffer(self) -> Tensor:
        """Return memory for a chunk of rows, whole vectors of them if there are more chunks."""
        n, m = len(self.q), len(self.k)
        n_rows = triton.cdiv(n, max(1, triton.cdiv(n * m, ELEMENTS)))
        n_rows = min(n, triton.cdiv(n_rows, _LINE) * _LINE)
        return self.q.new_empty(n_rows, self.stride)[:, :m]

    def chunks(self, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows and products of one chunk after the other, in the same buffer."""
        n = len(self.q)
        for start in range(0, n, max(1, len(buffer))):
            rows = slice(start, min(start + len(buffer), n))
            yield rows, self.products(rows, buffer)

    def products(self, rows: slice, buffer: Tensor) -> Tensor:
        """Return rows of S in half precision without scale and factors."""
        part = buffer[: rows.stop - rows.start]
        if self.halves is None:
            return torch.mm(self.q[rows] * self.scale, self.k.mT, out=part)
        return products.product(self.halves[0].matrix[rows], self.halves[1].matrix.mT, part)

    # --------------------------------------------------------------- what the kernels are given

    def in_memory(self, rows: slice, part: Tensor) -> Products:
        factors = None
        if self.halves is not None:
            factors = Factors(self.halves[0].factors[rows], self.key_factors, self.scale)
        dtype = tl.float64 if part.dtype == torch.float64 else tl.float32
        return Products(part, self.stride, factors, tl.constexpr(dtype))

    def sizes(self, rows: slice) -> dict[str, int]:
        """Return the arguments that place the rows among the queries, and mask pairs."""
        return dict(
            n_rows=rows.stop - rows.start, first=self.first, start=rows.start, n=len(self.q),
            DIAGONAL=self.first >= 0,
        )  # fmt: skip

    def splits(self, part: Tensor) -> tuple[int, int]:
        """Return how many programs split a row, to fill the device, and the blocks of each."""
        n_blocks = triton.cdiv(len(self.k), TURNS * LANES)
        n_splits = max(1, min(_programs_each(part, len(part)), n_blocks))
        return n_splits, triton.cdiv(n_blocks, n_splits)

    def blocks(self, part: Tensor) -> tuple[int, int]:
        """Return a grid with a program for each block of columns of a row."""
        return len(part), triton.cdiv(len(self.k), TURNS * LANES)

    def slopes_out(self, part: Tensor) -> SlopesOut | None:
        """Return where slopes go: in place, or in half precision to memory of their own."""
        if not self.trains:
            return None
        if self.halves is None:
            return SlopesOut(None, None)
        if self._stored is None:  # by the first chunk, which is the largest
            stored = part.new_empty(len(part), self.stride, dtype=self.halves[0].matrix.dtype)
            self._stored = stored[:, : part.shape[1]]
        return SlopesOut(self._stored, self.lift)

    # ------------------------------------------------------------------------------- the sweeps

    def log_sums(self, rows: slice, part: Tensor) -> Tensor:
        """Return log Σ_j exp S_ij of these rows."""
        n_splits, n_blocks = self.splits(part)
        parts = part.new_empty(n_splits, len(part))
        log_sums_of_chunk[len(part), n_splits](
            self.in_memory(rows, part), parts, **self.sizes(rows), m=len(self.k),
            n_blocks=n_blocks, TWO_VIEWS=self.two_views, TURNS=TURNS, LANES=LANES,
        )  # fmt: skip
        return merged(parts)

    def column_parts(self, buffer: Tensor, n_columns: int) -> Tensor:
        """Return what `fold` adds rows to, the largest of each column and a sum of its programs."""
        n_blocks, n_turns = triton.cdiv(n_columns, LANES), triton.cdiv(len(buffer), _ROW_TURNS)
        n_splits = max(1, min(_programs_each(buffer, n_blocks), n_turns))
        sums = buffer.new_zeros(n_splits, 2, n_columns)
        sums[:, 0] = torch.finfo(sums.dtype).min
        return sums

    def fold(self, rows: slice, part: Tensor, sums: Tensor) -> None:
        """Add these rows, and the largest of each column, to those of the rows before."""
        n_splits, _, n_columns = sums.shape
        per_split = triton.cdiv(triton.cdiv(len(part), n_splits), _ROW_TURNS) * _ROW_TURNS
        fold_chunk[triton.cdiv(n_columns, LANES), n_splits](
            self.in_memory(rows, part), sums, **self.sizes(rows), m=len(self.k),
            n_columns=n_columns, per_split=per_split, TWO_VIEWS=self.two_views,
            TURNS=_ROW_TURNS, LANES=LANES,
        )  # fmt: skip

    def add_exponentials(
        self,
        rows: slice,
        part: Tensor,
        of_rows: LogSums,
        of_columns: LogSums | None = None,
        n_columns: int = 0,
        classes: Classes | None = None,
    ) -> None:
        """Add the gradients of slopes u_i exp(S_ij − n_i) + v_j exp(S_ij − c_j) − attractions.

        of_rows: n and u of these rows; of_columns: c and v of the first n_columns columns, padded.
        """
        exponentials_of_chunk[self.blocks(part)](
            self.in_memory(rows, part), of_rows, of_columns, classes, self.slopes_out(part),
            **self.sizes(rows), m=len(self.k), n_columns=n_columns, TWO_VIEWS=self.two_views,
            TURNS=TURNS, LANES=LANES,
        )  # fmt: skip
        self.add_stored(rows, part)

    def add_pairs(
        self, rows: slice, part: Tensor, positive_logits: Tensor, weights: Tensor
    ) -> Tensor:
        """Return Σ_j softplus(S_ij − a_i) and Σ_j of its slopes; add the gradients of w_i times it.

        positive_logits: a of these rows; weights: w.
        """
        n_splits, n_blocks = self.splits(part)
        sums = part.new_empty(n_splits, 2, len(part))
        pairs_of_chunk[len(part), n_splits](
            self.in_memory(rows, part), positive_logits, weights, sums, self.slopes_out(part),
            **self.sizes(rows), m=len(self.k), n_blocks=n_blocks, TWO_VIEWS=self.two_views,
            TURNS=TURNS, LANES=LANES, NEEDS_GRAD=self.trains,
        )  # fmt: skip
        if self.trains:
            self.add_stored(rows, part)
        return sums.sum(0) if n_splits > 1 else sums[0]

    # ---------------------------------------------------------------------------- the gradients

    def add_stored(self, rows: slice, part: Tensor) -> None:
        """Add the gradients of the slopes that a kernel left."""
        q, k, slopes = self.q, self.k, part
        if self.halves is not None:
            assert self._stored is not None
            q, k = (side.matrix for side in self.halves)
            slopes = self._stored[: len(part)]
        if self.query_sums is not None:
            products.add_product(slopes, k, self.query_sums[rows])
        if self.key_sums is not None:
            products.add_product(slopes[:, : self.n_trained].mT, q[rows], self.key_sums)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return those in query, key and scale, which replace the sums."""
        of_query = of_key = of_scale = None
        if self.halves is not None:  # because slopes were stored with the factors of both sides
            of_queries, of_keys = (self.lift * side.factors[:, None] for side in self.halves)
            if self.query_sums is not None:
                self.query_sums.div_(of_queries)
            if self.key_sums is not None and not self.is_one_matrix:
                self.key_sums.div_(of_keys[: self.n_trained])
        if self.needs_scale and self.query_sums is not None:
            of_scale = (self.q * self.query_sums).sum()
            if self.key_sums is self.query_sums:  # because each pair was added from both sides
                of_scale = of_scale / 2
        if self.key_sums is not None and not self.is_one_matrix:
            lengths = None if self.k_lengths is None else self.k_lengths[: self.n_trained]
            keys = self.k[: self.n_trained]
            of_key = of_lengths(self.key_sums.mul_(self.scale), keys, lengths)
        if self.needs_query and self.query_sums is not None:
            of_query = of_lengths(self.query_sums.mul_(self.scale), self.q, self.q_lengths)
        return of_query, of_key, of_scale


def _programs_each(like: Tensor, n: int) -> int:
    """Return how many programs each of n parts of the work needs to fill the device."""
    return triton.cdiv(_PROGRAMS * device_of(like).multiprocessors, max(1, n))


def merged(parts: Tensor) -> Tensor:
    """Return log Σ exp over the first dimension."""
    return parts.logsumexp(0) if len(parts) > 1 else parts[0]
