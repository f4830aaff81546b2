"""Solve `Pairs` and `SoftPairs` on a GPU, by tiles of S that never leave a multiprocessor.

Pairs: with G the slopes of the loss in S, one sweep over the tiles gives the log-sum-exps n of rows
and c of columns, others give Σ_j G_ij k_j and Σ_i G_ij q_i. Without log-sum-exps of columns the
first sweep gives the sum for the queries too. `soft_launch.py` has SoftPairs.

Work, in products of 2 N M D FLOPs: with rows alone 1, with the gradient in queries 2, in both
4; with columns, or with classes, 1, 3, 5; if the queries are the keys 1, 3. Products are of
embeddings as they came, in half precision, summed in float32; of float32 they are where the user
allows TF32. All other problems go by chunks through cuBLAS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fastkd.kernels.device import on_device, warn_of_chunks
from fastkd.kernels.pairs.chunks import pairs_by_chunks
from fastkd.kernels.pairs.soft_launch import solve_soft_pairs
from fastkd.kernels.pairs.sweeps import (
    Classes,
    ColumnSums,
    column_log_sums,
    log_sums,
    row_and_column_log_sums,
    softplus_sums,
    weighed_sums,
)
from fastkd.kernels.pairs.tiles import Similarities
from fastkd.kernels.pairs.tiling import (
    Embeddings,
    Tiling,
    embeddings,
    sizes_of,
    splits_of,
    sum_of_splits,
    tiling,
)
from fastkd.kernels.tiles import LN2, LOG2E
from fastkd.problems.pairs import (
    HEADROOM,
    Gradients,
    Pairs,
    SoftPairs,
    column_penalty,
    over_ranks,
    own_columns,
    penalty,
    with_positives,
)

_BLOCKS, _COLUMNS = 8, 128  # whose sums a program reads at once


def value_and_gradients(
    problem: Pairs | SoftPairs, needs_grad: Sequence[bool]
) -> tuple[Tensor, Gradients]:
    """Return the loss of these queries, 0-dim, and its gradients in the trained fields.

    needs_grad and gradients: query, key, scale and, of Pairs, positive_logits and further_logits.
    """
    with on_device(problem.query):
        if isinstance(problem, SoftPairs):
            return solve_soft_pairs(problem, needs_grad)
        return _solve_pairs(problem, needs_grad)


@with_positives
def _solve_pairs(problem: Pairs, needs_grad: Sequence[bool]) -> tuple[Tensor, Gradients]:
    query, key = problem.query, problem.key
    tiles = tiling(query, problem.half, query.dtype)
    if tiles is None or not query.numel() or not (key is None or key.numel()):
        return pairs_by_chunks(problem, needs_grad)
    try:
        return _Sweeps(problem, tiles, needs_grad).value_and_gradients()
    except OutOfResources as error:
        warn_of_chunks(error.name, error.required, error.limit)
    return pairs_by_chunks(problem, needs_grad)


class _Sweeps:
    """The sweeps over the tiles of `Pairs`."""

    def __init__(self, problem: Pairs, tiles: Tiling, needs_grad: Sequence[bool]) -> None:
        self.problem, self.tiles, self.needs_grad = problem, tiles, needs_grad
        dtype = problem.query.dtype
        self.scale = problem.scale.to(dtype)
        self.x = embeddings(problem.query, problem.normalize, problem.half, tiles)
        self.y = self.trained_y = self.x
        if problem.key is not None:
            keys = problem.key
            if problem.bank is not None:
                keys = torch.cat([keys, problem.bank.to(dtype)])
            self.y = embeddings(keys, problem.normalize, problem.half, tiles)
            self.trained_y = self.y.head(len(problem.key))
        # numbers for the rows of a matrix, by the id of its embeddings, which are x or y
        self.other_views = self._other_views() if problem.two_views else {}
        self.classes: dict[int, Tensor] = {}
        if problem.classes is not None:
            classes = problem.classes.to(dtype)
            self.classes = {id(self.y): self.y.pad(classes, -1)}
            if self.x is not self.y:
                assert problem.query_classes is not None
                self.classes[id(self.x)] = self.x.pad(problem.query_classes.to(dtype), -1)
        needs_query, needs_key, needs_scale = needs_grad[:3]
        self.trains_rows = needs_query or needs_scale
        self.trains_columns = problem.key is not None and needs_key

    def value_and_gradients(self) -> tuple[Tensor, Gradients]:
        solve = self._pairs if self.problem.form == "pairs" else self._log_sum_exps
        loss, of_logits, of_further, row_sums, column_sums = solve()
        needs_query, _, needs_scale, needs_logits, needs_further = self.needs_grad
        of_query = of_key = of_scale = None
        if row_sums is not None:
            gradient, along = self.x.gradient(row_sums, self.scale)
            if needs_query:
                of_query = gradient
            if needs_scale:
                # halved if the queries are the keys, because each pair was met from both sides
                of_scale = along.sum() * (1.0 if self.problem.key is not None else 0.5)
        if column_sums is not None:
            of_key, _ = self.trained_y.gradient(column_sums, self.scale)
        of_numbers = of_logits if needs_logits else None, of_further if needs_further else None
        return loss, (of_query, of_key, of_scale, *of_numbers)

    # ------------------------------------------------------------------------------- the losses

    def _log_sum_exps(
        self,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return the loss, its gradients in a and f, Σ_j G_ij k_j and Σ_i G_ij q_i."""
        problem, x, y = self.problem, self.x, self.y
        n, n_columns = len(x.rows), 0
        if problem.key_positive_logits is not None:
            n_columns = len(problem.key_positive_logits)
        needs_sweep = n_columns > 0 or problem.key is None or problem.classes is not None
        row_sums, values, column_sums = self._log_sums(
            n_columns, self.trains_rows and not needs_sweep
        )
        loss, u, of_logits, of_further = penalty(problem, row_sums, slice(0, n))
        v = u
        if n_columns:
            column_sums = over_ranks(column_sums, problem.group)
            share, v = column_penalty(problem, column_sums)
            loss, of_logits = loss + share, of_logits - v[own_columns(problem)]
        if not (self.trains_rows or self.trains_columns):
            return loss, of_logits, of_further, None, None
        if values is not None:
            values = values[:n] * u[:, None]
        most = u.amax() if v is u else torch.maximum(u.amax(), v.amax())
        row_shifts = x.pad(_shifts(row_sums, u, most), torch.inf)
        column_shifts = row_shifts
        if n_columns:
            column_shifts = y.pad(_shifts(column_sums, v, most), torch.inf)
        elif self.classes and problem.key is not None:  # because there is no loss of columns
            column_shifts = y.pad(row_shifts[:0], torch.inf)
        most = most * 2**-HEADROOM
        # if the queries are the keys, each pair is met as (i, j) and as (j, i)
        r, is_double = None, y is x and not problem.attractions_differ
        if problem.attractions is not None:
            r = problem.attractions.to(most.dtype) * (2 if is_double else 1)
            r = x.pad(torch.where(r == 0, 0, r / most))
        if self.trains_rows and values is None:
            values = self._weighted_sums(
                x, y, row_shifts, column_shifts, attractions=r,
                columns_attract=y is x and problem.attractions_differ,
            )  # fmt: skip
            values = values * most
        sums = None
        if self.trains_columns:
            by_rows = column_shifts if n_columns else None
            sums = self._weighted_sums(
                self.trained_y, x, by_rows, row_shifts, attractions=r, rows_attract=False,
                columns_attract=True,
            )  # fmt: skip
            sums = sums * most
        return loss, of_logits, of_further, values, sums

    def _pairs(self) -> tuple[Tensor, Tensor, None, Tensor | None, Tensor | None]:
        """Return the same of Σ_i w_i Σ_j softplus(S_ij − a_i)."""
        problem, x = self.problem, self.x
        assert problem.positive_logits is not None
        dtype = problem.query.dtype
        positive_logits = x.pad(problem.positive_logits.to(dtype) * LOG2E.value)
        weights = problem.weights.to(dtype)
        tiles = self.tiles.narrow()
        n_splits, per_split = splits_of(x, self.y, tiles)
        sums = weights.new_empty((2, n_splits, len(x.matrix)))
        values = self._empty_values(x, n_splits) if self.trains_rows else None
        softplus_sums[len(x.matrix) // tiles.rows, n_splits](
            self._similarities(x, self.y), positive_logits, sums[0], sums[1], values,
            **self._sizes(x, self.y, per_split), TILE=tiles.tile(), **tiles.options,
        )  # fmt: skip
        penalties, slopes = sums.sum(1)[:, : len(weights)]
        column_sums = row_sums = None
        if self.trains_columns:
            most = weights.amax().clamp(min=1e-30) * 2**-HEADROOM
            column_sums = self._weighted_sums(
                self.trained_y, x, None, positive_logits, weights=x.pad(weights / most)
            )
            column_sums = column_sums * most
        if values is not None:
            row_sums = sum_of_splits(values)[: len(weights)] * weights[:, None]
        return penalties @ weights, -slopes * weights, None, row_sums, column_sums

    # ------------------------------------------------------------------------------- the sweeps

    def _log_sums(self, n_columns: int, needs_values: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return n [n], Σ_j softmax_j(S_ij) k_j [n_padded, depth] if needed, and c [n_columns]."""
        x, y, tiles = self.x, self.y, self.tiles
        n_blocks = len(x.matrix) // tiles.rows
        n_splits, per_split = splits_of(x, y, tiles)
        parts = self.scale.new_empty((n_splits, len(x.matrix)))
        column_sums, values = parts.new_empty(n_columns), None
        constants = dict(**self._sizes(x, y, per_split), TILE=tiles.tile(), **tiles.options)
        if n_columns:
            columns = ColumnSums(*parts.new_empty((2, n_blocks, n_columns)))
            row_and_column_log_sums[n_blocks, n_splits](
                self._similarities(x, y), parts, columns, n_columns=n_columns, **constants
            )
            column_log_sums[(triton.cdiv(n_columns, _COLUMNS),)](
                columns, column_sums, n_blocks, n_columns, BLOCKS=_BLOCKS, COLUMNS=_COLUMNS
            )
        else:
            values = self._empty_values(x, n_splits) if needs_values else None
            log_sums[n_blocks, n_splits](
                self._similarities(x, y), self.other_views.get(id(x)), parts, values, **constants
            )
        parts *= LN2.value
        row_sums = parts.logsumexp(0) if n_splits > 1 else parts[0]
        means = None
        if values is not None:
            means = values[0]
            if n_splits > 1:
                lowest = torch.finfo(parts.dtype).min
                of_splits = (parts - row_sums.clamp(min=lowest)).exp()
                means = (values * of_splits[..., None]).sum(0)
        return row_sums[: len(x.rows)], means, column_sums * LN2.value

    def _weighted_sums(
        self,
        x: Embeddings,
        y: Embeddings,
        row_shifts: Tensor | None,
        column_shifts: Tensor,
        weights: Tensor | None = None,
        attractions: Tensor | None = None,
        rows_attract: bool = True,
        columns_attract: bool = False,
    ) -> Tensor:
        """Return Σ_j G_ij y_j, [n_padded, depth], with G as in the kernel `weighed_sums`."""
        # narrow, because classes take registers too
        tiles = self.tiles.narrow() if self.classes and self.tiles.depth > 128 else self.tiles
        n_splits, per_split = splits_of(x, y, tiles)
        values = self._empty_values(x, n_splits)
        classes = None
        if self.classes:
            classes = Classes(self.classes[id(x)], self.classes[id(y)], attractions)
        weighed_sums[len(x.matrix) // tiles.rows, n_splits](
            self._similarities(x, y), self.other_views.get(id(x)), classes,
            row_shifts, column_shifts, weights, values,
            **self._sizes(x, y, per_split), TILE=tiles.tile(),
            ROWS_ATTRACT=rows_attract and bool(self.classes),
            COLUMNS_ATTRACT=columns_attract and bool(self.classes), **tiles.options,
        )  # fmt: skip
        return sum_of_splits(values)

    def _other_views(self) -> dict[int, Tensor]:
        """Return for each row of x and of y the place of the other view of its example, or −1."""
        n, first = len(self.x.rows), self.problem.first
        places = torch.arange(n, device=self.scale.device, dtype=torch.int32).roll(-(n // 2))
        others = {id(self.x): self.x.pad(places + first, -1)}
        if self.trained_y is not self.x:
            of_keys = self.trained_y.pad(places[:0], -1)
            of_keys[first : first + n] = places
            others[id(self.trained_y)] = of_keys
        return others

    def _empty_values(self, x: Embeddings, n_splits: int) -> Tensor:
        return self.scale.new_empty((n_splits, len(x.matrix), self.tiles.depth))

    def _similarities(self, x: Embeddings, y: Embeddings) -> Similarities:
        return Similarities(x.side, y.side, self.scale)

    def _sizes(self, x: Embeddings, y: Embeddings, per_split: int) -> dict[str, Any]:
        return sizes_of(x, y, per_split, self.problem.first, is_swapped=x is not self.x)


def _shifts(log_sums: Tensor, slopes: Tensor, most: Tensor) -> Tensor:
    """Return c with exp2(S − c) = 2^HEADROOM · slope · softmax / most, for S in units of log2."""
    shifts = log_sums * LOG2E.value - (slopes / most).log2() - HEADROOM
    return torch.where(slopes == 0, torch.inf, shifts)
