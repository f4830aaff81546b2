"""Solve `SoftPairs` on a GPU, by tiles of both networks' similarities or by chunks.

One sweep gives both networks' log-sum-exps and KL, a second one Σ_j G_ij k_j, a third one
Σ_i G_ij q_i, with G the slopes of the loss in S; if the queries are the keys, the second one gives
both. Work, in products of 2 N M D FLOPs: 1 of each network, with the gradient in queries 3 and 2,
in both 5 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fastkd.kernels.device import warn_of_chunks
from fastkd.kernels.pairs.by_chunks import soft_pairs_by_chunks
from fastkd.kernels.pairs.embeddings import Embeddings, embeddings, with_rows_in_order
from fastkd.kernels.pairs.similarity_kl import Shifts, divergences, weighed_differences
from fastkd.kernels.pairs.tiles import Similarities
from fastkd.kernels.pairs.tiling import (
    Tiling,
    merge_statistics,
    sizes_of,
    splits_of,
    tiling,
    tilings_of_two,
)
from fastkd.kernels.tiles import LN2
from fastkd.problems.pairs import HEADROOM, Gradients, SoftPairs, weighted_sum


def solve_soft_pairs(problem: SoftPairs, needs_grad: Sequence[bool]) -> tuple[Tensor, Gradients]:
    """Return the loss of these queries, and its gradients in query, key and scale."""
    query, teacher = problem.query, problem.teacher_query
    tiles = tilings_of_two(
        query,
        tiling(query, problem.half, query.dtype),
        tiling(teacher, problem.teacher_half, query.dtype),
    )
    is_empty = any(x is not None and not x.numel() for x in (*problem[:2], *problem[3:5]))
    if tiles is None or is_empty:
        return soft_pairs_by_chunks(problem, needs_grad)
    try:
        return _SoftSweeps(problem, tiles, needs_grad).value_and_gradients()
    except OutOfResources as error:
        warn_of_chunks(error.name, error.required, error.limit)
    return soft_pairs_by_chunks(problem, needs_grad)


class _SoftSweeps:
    """The sweeps over the tiles of `SoftPairs`; names that end in _t are the teacher's."""

    def __init__(
        self, problem: SoftPairs, tiles: tuple[Tiling, Tiling], needs_grad: Sequence[bool]
    ) -> None:
        self.problem, self.needs_grad = problem, needs_grad
        self.tiles, tiles_t = tiles
        products = self.tiles.product, tiles_t.product
        has_tf32 = torch.float32 in products
        self.constants = dict(
            TILE=self.tiles.tile(has_tf32), TILE_T=tiles_t.tile(has_tf32), **self.tiles.options
        )
        dtype = problem.query.dtype
        self.scale, self.scale_t = problem.scale.to(dtype), problem.teacher_scale.to(dtype)

        def laid_out(rows: Tensor, tiles: Tiling) -> Embeddings:
            rows, normalize = with_rows_in_order(rows), problem.normalize
            return embeddings(rows, normalize, tiles.product, tiles.dtype, tiles.depth)

        self.queries = laid_out(problem.query, self.tiles)
        self.queries_t = laid_out(problem.teacher_query, tiles_t)
        self.keys, self.keys_t = self.queries, self.queries_t
        if problem.key is not None:
            self.keys = laid_out(problem.key, self.tiles)
        if problem.teacher_key is not None:
            self.keys_t = laid_out(problem.teacher_key, tiles_t)
        self.most = self.scale.new_ones(())  # that a slope may be, and is divided by in the sweeps
        if problem.weights is not None:
            self.most = problem.weights.to(dtype).amax().clamp(min=1e-30)

    def value_and_gradients(self) -> tuple[Tensor, Gradients]:
        needs_query, needs_key, needs_scale = self.needs_grad
        is_one_matrix = self.problem.key is None
        losses, shifts = self._divergences()
        of_query = of_key = of_scale = None
        most = self.most * 2**-HEADROOM
        if needs_query or needs_scale:
            values = self._weighted_differences(shifts, shifts if is_one_matrix else None)
            of_query, of_scale = self.queries.gradient(
                values, self.scale, needs_rows=needs_query, needs_scale=needs_scale, most=most,
                is_double=is_one_matrix,
            )  # fmt: skip
        if needs_key and not is_one_matrix:
            values = self._weighted_differences(None, shifts)
            of_key, _ = self.keys.gradient(
                values, self.scale, needs_rows=True, needs_scale=False, most=most
            )
        return weighted_sum(losses, self.problem.weights), (of_query, of_key, of_scale)

    def _divergences(self) -> tuple[Tensor, Shifts]:
        """Return the losses of rows, and what to subtract from S and T for lifted softmaxes."""
        x, y = self.queries, self.keys
        n_splits, per_split = splits_of(x, y, self.tiles)
        parts = self.scale.new_empty((n_splits, 5, len(x.matrix)))
        divergences[len(x.matrix) // self.tiles.rows, n_splits](
            Similarities(x.side, y.side, self.scale),
            Similarities(self.queries_t.side, self.keys_t.side, self.scale_t),
            parts, **sizes_of(x, y, per_split, self.problem.first), **self.constants,
            CROSS_ENTROPY=self.problem.form == "cross_entropy",
        )  # fmt: skip
        losses, largest, total, largest_t, total_t = merge_statistics(
            parts, LN2.value, self.problem.form
        )
        lifts: Tensor | int = HEADROOM
        if self.problem.weights is not None:  # w exp2(S − n) is exp2(S − (n − log2 w))
            lifts = x.pad((self.problem.weights.to(losses.dtype) / self.most).log2()) + HEADROOM
        shifts = Shifts(largest + total.log2() - lifts, largest_t + total_t.log2() - lifts)
        return losses[: len(x.rows)], shifts

    def _weighted_differences(
        self, row_shifts: Shifts | None, column_shifts: Shifts | None
    ) -> Tensor:
        """Return Σ_j G_ij k_j in units of `most`, or without the shifts of rows Σ_i G_ij q_i."""
        x, x_t, y, y_t = self.queries, self.queries_t, self.keys, self.keys_t
        if row_shifts is None:
            x, x_t, y, y_t = y, y_t, x, x_t
        n_splits, per_split = splits_of(x, y, self.tiles)
        values = self.scale.new_empty((n_splits, len(x.matrix), self.tiles.depth))
        weighed_differences[len(x.matrix) // self.tiles.rows, n_splits](
            Similarities(x.side, y.side, self.scale),
            Similarities(x_t.side, y_t.side, self.scale_t),
            row_shifts, column_shifts, values,
            **sizes_of(x, y, per_split, self.problem.first, is_swapped=row_shifts is None),
            **self.constants,
        )  # fmt: skip
        return values
