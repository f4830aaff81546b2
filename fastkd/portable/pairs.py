"""Losses of queries against keys in PyTorch, for any device, without the matrix of similarities.

Rows of S = scale · Q Kᵀ are computed in chunks that stay in the cache. With n_i and c_j the
log-sum-exps of its rows and columns and φ' the slopes of the loss in them, the gradient in S is

    G_ij = w_i φ'(n_i − a_i) exp(S_ij − n_i) + w_j φ'(c_j − a_j) exp(S_ij − c_j) = e_ij (u_i + v_j),

dQ = scale · G K, dK = scale · Gᵀ Q and dscale = Σ ⟨q_i, (G K)_i⟩. u is known as soon as a row is
complete, so that one pass makes loss and gradient. v is known after all rows, so that a second pass
follows. Where |S| is known to be small exponentials need no maximum.

Where one chunk holds S on a CPU, `_kept_pairs` needs no second pass and fewer calls of PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.portable import _kept_pairs, _soft_pairs
from fastkd.portable._chunks import by_workers
from fastkd.portable._pair_chunks import PairChunks, are_large, are_many, lowest, powers
from fastkd.problems._positives import means_over_classes, with_attractions
from fastkd.problems.pairs import (
    LINEAR,
    Gradients,
    Pairs,
    SoftPairs,
    column_penalty,
    over_ranks,
    own_columns,
    penalty,
    widened,
)


def value_and_gradients(
    problem: Pairs | SoftPairs, needs_grad: Sequence[bool]
) -> tuple[Tensor, Gradients]:
    """Return the share of the queries in the loss, and its gradients in the trained fields."""
    if isinstance(problem, Pairs):
        problem = with_attractions(widened(problem))
    query, n_keys = problem.query, len(problem.query if problem.key is None else problem.key)
    if isinstance(problem, Pairs):
        solved = _kept_pairs.value_and_gradients(problem, needs_grad)
        if solved is not None:
            return solved
        n_keys += 0 if problem.bank is None else len(problem.bank)
    return by_workers(lambda: _solve(problem, needs_grad), are_many(query, n_keys), query)


def _solve(problem: Pairs | SoftPairs, needs_grad: Sequence[bool]) -> tuple[Tensor, Gradients]:
    """Solve a problem chunk by chunk."""
    if isinstance(problem, SoftPairs):
        return _soft_pairs.value_and_gradients(problem, needs_grad)
    return _Solver(problem, needs_grad).solve()


class _Solver:
    """A problem that is solved chunk by chunk."""

    def __init__(self, problem: Pairs, needs_grad: Sequence[bool]) -> None:
        self.needs_grad = needs_grad
        # positive logits that are not given are similarities, and S has gradients at those pairs
        self.reads_positives = problem.positive_logits is None and problem.classes is None
        if self.reads_positives:
            positive = torch.empty_like(problem.weights, dtype=problem.query.dtype)
            columns = positive if problem.key_weights is not None else None
            problem = problem._replace(positive_logits=positive, key_positive_logits=columns)
        elif problem.positive_logits is None:
            problem = problem._replace(positive_logits=means_over_classes(problem))
        self.problem = problem
        self.chunks = PairChunks(
            problem.query, problem.key, problem.scale, needs_grad,
            bank=problem.bank, first=problem.first, two_views=problem.two_views,
            masked_pairs=problem.masked_pairs, normalize=problem.normalize, half=problem.half,
            weights=problem.weights,
        )  # fmt: skip
        self.buffer = self.chunks.buffer()
        self.add_to_keys = self.chunks.add_to_keys if any(needs_grad) else None

    def solve(self) -> tuple[Tensor, Gradients]:
        """Return the loss and its gradients."""
        of_further = None
        if self.problem.form == "pairs":
            loss, of_logits = self._pairs()
        else:
            loss, of_logits, of_further = self._log_sum_exps()
        *_, needs_logits, needs_further = self.needs_grad
        of_numbers = of_logits if needs_logits else None, of_further if needs_further else None
        return loss, (*self.chunks.gradients(), *of_numbers)

    def _read_positives(self, rows: slice, part: Tensor) -> None:
        """Copy the positive logits of these rows from S, unless they are given."""
        if self.reads_positives:
            assert self.problem.positive_logits is not None
            for some, pairs in self.chunks.positive_pairs(rows, part):
                self.problem.positive_logits[rows][some] = pairs

    def _write_positives(self, rows: slice, part: Tensor, slopes: Tensor) -> None:
        """Copy slopes, one for each of these rows, to their positive pairs."""
        if self.reads_positives:
            for some, pairs in self.chunks.positive_pairs(rows, part):
                pairs.copy_(slopes[some])

    # ------------------------------------------------------------ the forms of log-sum-exps

    def _log_sum_exps(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the loss and its gradient in the positive and in the further logits."""
        solve = self._rows if self.problem.key_weights is None else self._rows_and_columns
        shift = self.chunks.shift()
        if shift is not None:
            try:
                return solve(shift)
            except _Underflow:
                self.chunks.reset()
        return solve(None)

    def _rows(self, shift: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Solve in one pass, with exp(S − shift) or with maxima."""
        chunks, of_logits = self.chunks, self.buffer.new_empty(len(self.chunks.q))
        of_further = self.problem.further_logits
        if of_further is not None:
            of_further = torch.empty_like(of_further, dtype=of_logits.dtype)

        def of_chunk(rows: slice, part: Tensor, spare: Tensor) -> Tensor:
            self._read_positives(rows, part)
            largest, sums = chunks.exponentials(rows, part, shift)
            if shift is not None:
                _check_size(sums)
            share, slopes, of_logits[rows], of_others = penalty(
                self.problem, sums.log(), rows, largest
            )
            if of_further is not None and of_others is not None:
                of_further[rows] = of_others
            if any(self.needs_grad):
                self._write_positives(rows, part, -sums)
                self._add_softmax(rows, part, spare, _over_sums(slopes, sums))
            return share

        shares = chunks.for_each(self.buffer, of_chunk, self.add_to_keys)
        return _total(of_logits, shares), of_logits, of_further

    def _add_softmax(self, rows: slice, part: Tensor, spare: Tensor, slopes: Tensor) -> None:
        """Add slopes_i `part`_ij as slopes in S, less what attracts the others of a class."""
        chunks, problem = self.chunks, self.problem
        if problem.classes is None:
            chunks.add(rows, part, slopes)
            return
        assert problem.query_classes is not None and problem.attractions is not None
        alike = torch.eq(problem.query_classes[rows, None], problem.classes, out=spare)
        chunks.mask(rows, alike, 0.0)
        # the difference of each pair, because the difference of two sums would round it away
        attractions = problem.attractions[rows, None]
        part.mul_(slopes[:, None]).addcmul_(alike, attractions, value=-1)
        chunks.add(rows, part)

    def _rows_and_columns(self, shift: float | None) -> tuple[Tensor, Tensor, None]:
        """Solve in two passes, or one where exp(S − shift) of all rows fits into the buffer."""
        problem, chunks, buffer = self.problem, self.chunks, self.buffer
        assert problem.key_weights is not None
        n, n_columns = len(chunks.q), len(problem.key_weights)
        largest, sums = buffer.new_empty(2, n)
        column_largest = buffer.new_full((n_columns,), -torch.inf if shift is None else shift)
        column_sums = buffer.new_zeros(n_columns)

        def of_chunk(rows: slice, part: Tensor, spare: Tensor) -> None:
            self._read_positives(rows, part)
            if shift is None:  # S is left for the columns
                part = spare.copy_(chunks.mask(rows, part, -torch.inf))
            largest[rows], sums[rows] = chunks.exponentials(rows, part, shift)
            if shift is not None:
                _check_size(sums[rows])

        def add_columns(_: slice, sheet: Tensor, keys: slice, spare: Tensor) -> None:
            some = slice(keys.start, min(keys.stop, n_columns))
            if shift is None:
                _add_to_columns(sheet[:, some], column_largest[some], column_sums[some])
            else:
                column_sums[some].add_(sheet[:, some].sum(0))

        chunks.for_each(buffer, of_chunk, add_columns)
        if shift is not None:
            _check_size(column_sums)
        if problem.group:
            of_columns = over_ranks(column_largest + column_sums.log(), problem.group)
            if shift is None:
                column_largest = of_columns.clamp(min=lowest(buffer))
            column_sums = (of_columns - column_largest).exp_()
        loss, slopes, _, _ = penalty(problem, sums.log(), slice(0, n), largest)
        share, column_slopes = column_penalty(problem, column_sums.log(), column_largest)
        of_logits = -slopes - column_slopes[own_columns(problem)]
        if not any(self.needs_grad):
            return loss + share, of_logits, None
        u, v = _over_sums(slopes, sums), buffer.new_zeros(buffer.shape[1])
        v[:n_columns] = _over_sums(column_slopes, column_sums)

        def add_slopes(rows: slice, part: Tensor, spare: Tensor) -> None:
            if shift is None:
                chunks.mask(rows, part, -torch.inf)
                by_columns = powers(part[:, :n_columns] - column_largest).mul_(v[:n_columns])
                powers(part.sub_(largest[rows, None])).mul_(u[rows, None])
                part[:, :n_columns] += by_columns
            else:
                if len(buffer) < n:
                    chunks.shifted_exponentials(rows, part, shift)
                part.mul_(torch.add(u[rows, None], v, out=spare))
            self._write_positives(rows, part, of_logits[rows])
            chunks.add(rows, part)

        is_solved = shift is not None and len(buffer) == n
        chunks.for_each(buffer, add_slopes, self.add_to_keys, is_solved=is_solved)
        return loss + share, of_logits, None

    # --------------------------------------------------------------------- the form of single pairs

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Return the sum of softplus(± (S_ij − a_i)), − for positive pairs; its gradient in a."""
        problem, chunks, dtype = self.problem, self.chunks, self.buffer.dtype
        assert problem.positive_logits is not None
        logits, weights = problem.positive_logits.to(dtype), problem.weights.to(dtype)
        losses, slopes = torch.zeros_like(weights), torch.zeros_like(weights)

        def of_chunk(rows: slice, part: Tensor, spare: Tensor) -> None:
            part.sub_(logits[rows, None])
            positive = chunks.positive_pairs(rows, part)
            for _, pairs in positive:
                pairs.neg_()
            F.softplus(part, threshold=LINEAR, out=spare)  # type: ignore[call-arg]
            torch.sum(spare, 1, out=losses[rows])
            if any(self.needs_grad):
                part.sigmoid_()
                for _, pairs in positive:
                    pairs.neg_()
                torch.sum(part, 1, out=slopes[rows])
                chunks.add(rows, part, weights[rows])

        chunks.for_each(self.buffer, of_chunk, self.add_to_keys)
        return losses @ weights, -slopes * weights


class _Underflow(Exception):
    """Exponentials without maxima were too small."""


def _check_size(sums: Tensor) -> None:
    if not are_large(sums):
        raise _Underflow


def _over_sums(slopes: Tensor, sums: Tensor) -> Tensor:
    """Return slopes / sums, in place; where there is no negative both are 0, and so is it."""
    return slopes.div_(sums.clamp(min=torch.finfo(sums.dtype).tiny))


def _add_to_columns(part: Tensor, largest: Tensor, sums: Tensor) -> None:
    """Combine the rows of S in a sheet with Σ_i exp(S_ij − largest_j) of the sheets before."""
    risen = torch.maximum(largest, part.amax(0)).clamp_(min=lowest(part))
    sums.mul_((largest - risen).exp_()).add_(powers(part - risen).sum(0))
    largest.copy_(risen)


def _total(like: Tensor, shares: list[Tensor]) -> Tensor:
    return torch.stack([like.new_zeros(()), *shares]).sum()
