"""Chunks of rows of S whose products cuBLAS makes.

They solve what tiles cannot: wide embeddings, and float32 that must not be rounded.

One kernel reads a chunk of products for the sums of its rows or columns, and another one for the
slopes G, which it leaves as the next products want them: dQ = scale · G K, dK = scale · Gᵀ Q and
dscale = Σ_i ⟨q_i, (G K)_i⟩. The slopes of rows are known as soon as their chunk is complete, so
that one pass makes loss and gradient; those of columns are known after all rows, and a second pass
follows. Per element of S a chunk costs 4 bytes written and, for each kernel and product, 4 read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.device import device_of
from fastkd.kernels.pairs.chunk_sweeps import (
    Factors,
    LogSums,
    Products,
    SlopesOut,
    differences_of_chunk,
    divergences_of_chunk,
    exponentials_of_chunk,
    fold_chunk,
    log_sums_of_chunk,
    pairs_of_chunk,
)
from fastkd.kernels.pairs.sweeps import Classes, ColumnSums
from fastkd.kernels.pairs.tiling import merge_statistics
from fastkd.problems.pairs import (
    HEADROOM,
    Half,
    Pairs,
    SoftPairs,
    column_penalty,
    in_half,
    of_lengths,
    over_ranks,
    own_columns,
    penalty,
    units,
    weighted_sum,
)

ELEMENTS = 1 << 24  # of a chunk, which must be large enough to pay for its launches
COLUMNS = 2048  # of a row that a program reads at once
_TILE = 32, 64  # rows and columns, where columns are added up
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
        if half and len(query) and multiplies_halves(self.q, half):
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
        """Return memory for a chunk of rows."""
        n, m = len(self.q), len(self.k)
        n_chunks = max(1, triton.cdiv(n * m, ELEMENTS))
        return self.q.new_empty(min(n, max(1, triton.cdiv(n, n_chunks))), self.stride)[:, :m]

    def chunks(self, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows and products of one chunk after the other, in the same buffer."""
        n, step = len(self.q), len(buffer)
        for start in range(0, n, step or 1):
            rows = slice(start, min(start + step, n))
            yield rows, self.products(rows, buffer)

    def products(self, rows: slice, buffer: Tensor) -> Tensor:
        """Return rows of S, in half precision without the scale and the factors of both."""
        part = buffer[: rows.stop - rows.start]
        if self.halves is None:
            return torch.mm(self.q[rows] * self.scale, self.k.mT, out=part)
        return _product(self.halves[0].matrix[rows], self.halves[1].matrix.mT, part)

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
        n_blocks = triton.cdiv(len(self.k), COLUMNS)
        most = triton.cdiv(_PROGRAMS * device_of(part).multiprocessors, len(part))
        n_splits = max(1, min(most, n_blocks))
        return n_splits, triton.cdiv(n_blocks, n_splits)

    def slopes_out(self, part: Tensor) -> SlopesOut | None:
        """Return where slopes go: in place, or in half precision to memory of their own."""
        if not self.trains:
            return None
        if self.halves is None:
            return SlopesOut(None, None, None)
        needs = self.query_sums is not None, self.key_sums is not None
        if self._stored is None:
            dtype = self.halves[0].matrix.dtype
            stored = part.new_empty((sum(needs), len(part), self.stride), dtype=dtype)
            self._stored = stored[..., : part.shape[1]]
        for_queries, for_keys = self._stored[0], self._stored[-1]
        return SlopesOut(
            for_queries if needs[0] else None, for_keys if needs[1] else None, self.lift
        )

    # ------------------------------------------------------------------------------- the sweeps

    def log_sums(self, rows: slice, part: Tensor) -> Tensor:
        """Return log Σ_j exp S_ij of these rows."""
        n_splits, n_blocks = self.splits(part)
        parts = part.new_empty(n_splits, len(part))
        log_sums_of_chunk[len(part), n_splits](
            self.in_memory(rows, part), parts, **self.sizes(rows), m=len(self.k),
            n_blocks=n_blocks, TWO_VIEWS=self.two_views, COLUMNS=COLUMNS,
        )  # fmt: skip
        return parts.logsumexp(0) if n_splits > 1 else parts[0]

    def fold(self, rows: slice, part: Tensor, largest: Tensor, total: Tensor) -> None:
        """Add these rows to Σ_i exp(S_ij − largest_j) of the first columns, in place."""
        n_rows, n_columns = _TILE
        fold_chunk[(triton.cdiv(len(largest), n_columns),)](
            self.in_memory(rows, part), ColumnSums(largest, total), **self.sizes(rows),
            m=len(largest), TWO_VIEWS=self.two_views, ROWS=n_rows, COLUMNS=n_columns,
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
        exponentials_of_chunk[len(part), triton.cdiv(len(self.k), COLUMNS)](
            self.in_memory(rows, part), of_rows, of_columns, classes, self.slopes_out(part),
            **self.sizes(rows), m=len(self.k), n_trained=self.n_trained, n_columns=n_columns,
            TWO_VIEWS=self.two_views, COLUMNS=COLUMNS,
        )  # fmt: skip
        self.add_stored(rows, part)

    def add_pairs(
        self, rows: slice, part: Tensor, positive_logits: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return Σ_j softplus(S_ij − a_i) and Σ_j of its slopes; add the gradients of w_i times it.

        positive_logits: a of these rows; weights: w.
        """
        n_splits, n_blocks = self.splits(part)
        sums = part.new_empty(n_splits, 2, len(part))
        pairs_of_chunk[len(part), n_splits](
            self.in_memory(rows, part), positive_logits, weights, sums, self.slopes_out(part),
            **self.sizes(rows), m=len(self.k), n_trained=self.n_trained, n_blocks=n_blocks,
            TWO_VIEWS=self.two_views, COLUMNS=COLUMNS, NEEDS_GRAD=self.trains,
        )  # fmt: skip
        if self.trains:
            self.add_stored(rows, part)
        losses, slopes = sums.sum(0)
        return losses, slopes

    # ---------------------------------------------------------------------------- the gradients

    def add_stored(self, rows: slice, part: Tensor) -> None:
        """Add the gradients of the slopes that a kernel left."""
        if self.halves is None:
            if self.query_sums is not None:
                self.query_sums[rows].addmm_(part, self.k)
            if self.key_sums is not None:
                self.key_sums.addmm_(part[:, : self.n_trained].mT, self.q[rows])
            return
        assert self._stored is not None
        for_queries, for_keys = self._stored[0, : len(part)], self._stored[-1, : len(part)]
        q, k = (side.matrix for side in self.halves)
        if self.query_sums is not None:
            values = _product(for_queries, k, torch.empty_like(self.q[rows]))
            self.query_sums[rows] += values / self.lift
        if self.key_sums is not None:
            for_keys = for_keys[:, : self.n_trained]
            values = _product(for_keys.mT, q[rows], torch.empty_like(self.key_sums))
            self.key_sums += values / self.lift

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return those in query, key and scale, which replace the sums."""
        of_query = of_key = of_scale = None
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
    losses, slopes = torch.zeros_like(weights), torch.zeros_like(weights)
    for rows, part in chunks.chunks(chunks.buffer()):
        of_rows = positive_logits[rows], weights[rows]
        losses[rows], slopes[rows] = chunks.add_pairs(rows, part, *of_rows)
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
    log_sums = buffer.new_empty(n)
    largest = buffer.new_full((n_columns,), -torch.inf)
    total = torch.zeros_like(largest)
    for rows, part in chunks.chunks(buffer):
        log_sums[rows] = chunks.log_sums(rows, part)
        chunks.fold(rows, part, largest, total)
    column_sums = over_ranks(largest + total.log(), problem.group)
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
    buffers = student.buffer(), student.buffer()
    losses = student.q.new_empty(len(student.q))
    for rows, s in student.chunks(buffers[0]):
        t = teacher.products(rows, buffers[1])
        n_splits, n_blocks = student.splits(s)
        parts = s.new_empty(n_splits, 5, len(s))
        networks = student.in_memory(rows, s), teacher.in_memory(rows, t)
        sizes: dict[str, Any] = dict(**student.sizes(rows), m=s.shape[1], COLUMNS=COLUMNS)
        divergences_of_chunk[len(s), n_splits](
            *networks, parts, **sizes, n_blocks=n_blocks,
            CROSS_ENTROPY=problem.form == "cross_entropy", num_warps=8,
        )  # fmt: skip
        losses[rows], largest, total, largest_t, total_t = merge_statistics(
            parts, 1.0, problem.form
        )
        if student.trains:
            log_sums, log_sums_t = largest + total.log(), largest_t + total_t.log()
            if problem.weights is not None:  # w exp(S − n) is exp(S − (n − log w))
                logarithms = problem.weights[rows].to(losses.dtype).log()
                log_sums, log_sums_t = log_sums - logarithms, log_sums_t - logarithms
            differences_of_chunk[len(s), triton.cdiv(s.shape[1], COLUMNS)](
                *networks, log_sums, log_sums_t, student.slopes_out(s),
                **sizes, n_trained=student.n_trained,
            )  # fmt: skip
            student.add_stored(rows, s)
    return weighted_sum(losses, problem.weights), student.gradients()


def multiplies_halves(rows: Tensor, half: str) -> bool:
    """Return whether cuBLAS multiplies half precision with a float32 result that is not rounded."""
    if not rows.is_cuda or torch.version.hip is not None or rows.dtype != torch.float32:
        return False
    rounded = getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    return half == "bfloat16" or not rounded


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=out.dtype, out=out)
