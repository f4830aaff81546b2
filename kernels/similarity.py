"""The divergence of similarities on a GPU, by tiles of both networks' that are never stored.

With P and R the softmax of the rows of S and of T, G = P − R is the slope of the loss in S: one
sweep over the tiles gives both log-sum-exps and KL, a second Σ_j G_ij k_j, a third Σ_i G_ij q_i; of
the queries among each other the second one gives both. Work, in products of 2 N M D FLOPs: 1 of
each network, with the gradient in queries 3 and 2, or in both 5 and 3.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastkd.kernels._chunk_sweeps import differences_of_chunk, divergences_of_chunk
from fastkd.kernels._chunks import COLUMNS, Chunks
from fastkd.kernels._divergence_of_tiles import divergences, weighed_differences
from fastkd.kernels._launch import on_device
from fastkd.kernels._similarities import Side, Tiling, of_all_shares, of_two, shares, side, tiling
from fastkd.kernels._tiles import LN2
from fastkd.portable import similarity as by_chunks
from fastkd.portable._similarities import HEADROOM
from fastkd.similarity import Problem

allocate, allocate_gradients = by_chunks.allocate, by_chunks.allocate_gradients
backward = by_chunks.backward


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(*Problem) -> the sum of the rows' losses, and the gradients of it, one after another."""
    problem = Problem(*arguments)
    query, teacher, dtype = problem.query, problem.teacher_query, problem.dtype
    tiles = of_two(
        query,
        tiling(query, problem.half, dtype),
        tiling(teacher, problem.teacher_half, dtype),
    )
    is_empty = any(x is not None and not x.numel() for x in (*problem[:2], *problem[3:5]))
    with on_device(query):
        if tiles is None or is_empty:
            return DivergenceOfChunks(problem).forward()
        return _Sweeps(problem, *tiles).forward()


def _of_shares(statistics: Tensor, unit: float) -> tuple[Tensor, ...]:
    """The losses, from `divergences` in numbers of `unit`, and their largest and total."""
    largest, total, largest_t, total_t, differences = statistics.unbind(1)
    if len(statistics) > 1:
        risen, risen_t = largest.amax(0), largest_t.amax(0)
        shrunk, shrunk_t = ((largest - risen) * unit).exp(), ((largest_t - risen_t) * unit).exp()
        total, total_t = (total * shrunk).sum(0), (total_t * shrunk_t).sum(0)
        largest, largest_t = risen, risen_t
        differences = (differences * shrunk_t).sum(0)
    else:
        largest, total, largest_t, total_t, differences = statistics[0]
    # the difference of the log-sum-exps first, and not of each: they are large and alike
    losses = (differences / total_t + (largest - largest_t)) * unit
    return losses + (total / total_t).log(), largest, total, largest_t, total_t


class DivergenceOfChunks(by_chunks.Divergence):
    """Whose statistics one kernel makes, and slopes another."""

    chunks = Chunks
    student: Chunks
    teacher: Chunks

    def losses(self, rows: slice, s: Tensor, t: Tensor) -> Tensor:
        n_shares, n_blocks = self.student.shares(s)
        statistics = s.new_empty(n_shares, 5, len(s))
        divergences_of_chunk[len(s), n_shares](
            **self._chunks(rows, s, t), statistics_ptr=statistics, n_blocks=n_blocks, num_warps=8
        )
        losses, largest, total, largest_t, total_t = _of_shares(statistics, 1.0)
        self.log_sums = largest + total.log(), largest_t + total_t.log()
        return losses

    def add_slopes(self, rows: slice, s: Tensor, t: Tensor) -> None:
        of_rows, of_rows_t = self.log_sums
        differences_of_chunk[len(s), triton.cdiv(s.shape[1], COLUMNS)](
            **self._chunks(rows, s, t), **self.student.slopes_to(s),
            of_rows_ptr=of_rows, of_rows_t_ptr=of_rows_t,
        )  # fmt: skip
        self.student.add_stored(rows, s)

    def _chunks(self, rows: slice, s: Tensor, t: Tensor) -> dict[str, Any]:
        left_out = self.student.left_out(rows, s)
        del left_out["VIEWS"]
        of_both = self.student.of_chunk(rows, s) | self.teacher.of_chunk(rows, t, "_t")
        return of_both | left_out | dict(m=s.shape[1], COLUMNS=COLUMNS)


class _Sweeps:
    """Over the tiles of a problem."""

    def __init__(self, problem: Problem, tiles: Tiling, tiles_t: Tiling) -> None:
        self.problem, self.tiles, self.tiles_t = problem, tiles, tiles_t
        self.scale, self.scale_t = (
            x.to(problem.dtype) for x in (problem.scale, problem.teacher_scale)
        )
        self.queries, self.queries_t = (
            side(x.to(problem.dtype), True, half, t)
            for x, half, t in (
                (problem.query, problem.half, tiles),
                (problem.teacher_query, problem.teacher_half, tiles_t),
            )
        )
        self.keys, self.keys_t = (
            queries if x is None else side(x.to(problem.dtype), True, half, t)
            for x, half, t, queries in (
                (problem.key, problem.half, tiles, self.queries),
                (problem.teacher_key, problem.teacher_half, tiles_t, self.queries_t),
            )
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        wanted, of_one_kind = self.problem.wanted.split(), self.problem.key is None
        losses, log_sums, log_sums_t = self._divergences()
        found = []
        if {"query", "scale"} & {*wanted}:
            values = self._weighed(log_sums, log_sums_t, by_rows=True, by_columns=of_one_kind)
            gradient, along = self.queries.gradient(values, self.scale)
            if "query" in wanted:
                found.append(gradient)
        if "key" in wanted:
            values = self._weighed(log_sums, log_sums_t, by_rows=False, by_columns=True)
            found.append(self.keys.gradient(values, self.scale)[0])
        if "scale" in wanted:
            # of one kind each pair was met from both sides
            found.append(along.sum() * (0.5 if of_one_kind else 1.0))
        return losses.sum(), torch.cat([losses[:0], *(x.flatten() for x in found)])

    def _divergences(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the rows, and the log2 of their sums in S and in T."""
        x = self.queries
        n_shares, per_share = shares(x, self.keys, self.tiles)
        statistics = self.scale.new_empty((n_shares, 5, len(x.matrix)))
        divergences[len(x.matrix) // self.tiles.rows, n_shares](
            **self._sides(x, self.queries_t, self.keys, self.keys_t, per_share),
            statistics_ptr=statistics,
        )
        losses, largest, total, largest_t, total_t = _of_shares(statistics, LN2.value)
        return losses[: len(x.rows)], largest + total.log2(), largest_t + total_t.log2()

    def _weighed(
        self, log_sums: Tensor, log_sums_t: Tensor, *, by_rows: bool, by_columns: bool
    ) -> Tensor:
        """Σ_j G_ij k_j, or without rows Σ_i G_ij q_i."""
        x, x_t, y, y_t = self.queries, self.queries_t, self.keys, self.keys_t
        if not by_rows:
            x, x_t, y, y_t = y, y_t, x, x_t
        n_shares, per_share = shares(x, y, self.tiles)
        values = log_sums.new_empty((n_shares, len(x.matrix), self.tiles.depth))
        low, low_t = log_sums - HEADROOM, log_sums_t - HEADROOM
        weighed_differences[len(x.matrix) // self.tiles.rows, n_shares](
            **self._sides(x, x_t, y, y_t, per_share, swapped=not by_rows),
            of_rows_ptr=low, of_rows_t_ptr=low_t, of_columns_ptr=low, of_columns_t_ptr=low_t,
            values_ptr=values, BY_ROWS=by_rows, BY_COLUMNS=by_columns,
        )  # fmt: skip
        return of_all_shares(values) * 2**-HEADROOM

    def _sides(
        self, x: Side, x_t: Side, y: Side, y_t: Side, per_share: int, swapped: bool = False
    ) -> dict[str, Any]:
        first = self.problem.first
        return dict(
            x_ptr=x.matrix, y_ptr=y.matrix, scale_ptr=self.scale,
            x_factors_ptr=x.matrix if x.factors is None else x.factors,
            y_factors_ptr=y.matrix if y.factors is None else y.factors,
            x_t_ptr=x_t.matrix, y_t_ptr=y_t.matrix, scale_t_ptr=self.scale_t,
            x_t_factors_ptr=x_t.matrix if x_t.factors is None else x_t.factors,
            y_t_factors_ptr=y_t.matrix if y_t.factors is None else y_t.factors,
            n=len(x.rows), n_padded=len(x.matrix), m=len(y.rows), per_split=per_share,
            own=-first if swapped else first, OWN=first >= 0, FACTORS=x.factors is not None,
            FACTORS_T=x_t.factors is not None, DEPTH_T=self.tiles_t.depth,
            **self.tiles.constants | self._precision(),
        )  # fmt: skip

    def _precision(self) -> dict[str, str]:
        """Of float32; for half precision it means nothing."""
        products = self.tiles.product, self.tiles_t.product
        return {"PRECISION": "tf32" if torch.float32 in products else "ieee"}
