"""Contrastive losses on a GPU, by tiles of similarities that never leave a multiprocessor.

With G the slopes of the loss in S, as in the portable engine, whose letters these are: one sweep
over the tiles gives the log-sum-exps n and c, others Σ_j G_ij k_j and Σ_i G_ij q_i, for which

    G_ij = exp(S_ij − (n_i − log u_i)) + exp(S_ij − (c_j − log v_j))

needs no product with the slopes u and v. Without columns the first sweep makes the sum of the
queries too. Programs own what they sum: no atomics, the same bits in every run.

Work, in products of 2 N M D FLOPs: rows 1, 2 with the gradient in queries, 4 in both; rows and
columns, and rows with classes, 1, 3, 5; examples of one kind 1, 3. Products are of the embeddings
as they came, in half precision, summed in float32; of float32 they are where the user allows TF32.
All else goes by chunks through cuBLAS, rows 3 and rows and columns 4, whose numbers kernels read
twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastkd._contrasts import Problem
from fastkd.kernels._chunks import Chunks
from fastkd.kernels._contrastive_tiles import (
    column_log_sums,
    log_sums,
    softplus_sums,
    weighed_sums,
)
from fastkd.kernels._launch import device_of, on_device
from fastkd.kernels._similarities import (
    Side,
    Tiling,
    of_all_shares,
    padded,
    shares,
    side,
    tiling,
)
from fastkd.kernels._tiles import LN2, LOG2E
from fastkd.portable import contrastive as by_chunks
from fastkd.portable._similarities import HEADROOM

allocate, allocate_gradients = by_chunks.allocate, by_chunks.allocate_gradients
backward = by_chunks.backward

_LANES = 128


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(*Problem) -> the own rows' share of the loss, and the gradients of it, one after another."""
    problem = Problem(*arguments)
    query, key = problem.query, problem.key
    tiles = tiling(query, problem.half, problem.dtype)
    with on_device(query):
        if tiles is None or not query.numel() or not (key is None or key.numel()):
            return by_chunks.forward(*arguments, chunks=Chunks)
        return _Sweeps(problem, tiles).forward()


class _Sweeps:
    """Over the tiles of a problem."""

    def __init__(self, problem: Problem, tiles: Tiling) -> None:
        dtype = problem.dtype
        self.problem, self.tiles, self.wanted = problem, tiles, problem.wanted.split()
        self.scale = problem.scale.to(dtype)
        self.x = side(problem.query.to(dtype), problem.normalize, problem.half, tiles)
        self.y = self.trained = self.x
        if problem.key is not None:
            keys = problem.key.to(dtype)
            if problem.bank is not None:
                keys = torch.cat([keys, problem.bank.to(dtype)])
            self.y = side(keys, problem.normalize, problem.half, tiles)
            self.trained = self.y.first(len(problem.key))
        self.others = self._other_views() if problem.two_views else {}
        self.classes: dict[int, Tensor] = {}
        if problem.classes is not None:
            of_all = problem.classes.to(dtype)
            own = of_all[by_chunks.own_columns(problem)]
            self.classes = {id(self.y): padded(of_all, self.y, -1)}
            if self.x is not self.y:
                self.classes[id(self.x)] = padded(own, self.x, -1)
        self.trains_rows = bool({"query", "scale"} & {*self.wanted})
        self.trains_columns = problem.key is not None and "key" in self.wanted

    def forward(self) -> tuple[Tensor, Tensor]:
        if self.problem.form == "pairs":
            loss, of_anchors, of_rows, of_columns = self._pairs()
        else:
            loss, of_anchors, of_rows, of_columns = self._log_sum_exps()
        found = []
        if of_rows is not None:
            gradient, along = self.x.gradient(of_rows, self.scale)
            if "query" in self.wanted:
                found.append(gradient)
        if of_columns is not None:
            found.append(self.trained.gradient(of_columns, self.scale)[0])
        if of_rows is not None and "scale" in self.wanted:
            # of one matrix each pair was met from both sides
            found.append(along.sum() * (1.0 if self.problem.key is not None else 0.5))
        if "anchors" in self.wanted:
            found.append(of_anchors)
        return loss, torch.cat([loss.new_empty(0), *(x.flatten() for x in found)])

    # ------------------------------------------------------------------------------- the losses

    def _log_sum_exps(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The loss, its gradient in the anchors, and the sums over columns and over rows."""
        problem, x, y = self.problem, self.x, self.y
        n, n_columns = len(x.rows), 0 if problem.key_anchors is None else len(problem.key_anchors)
        both = n_columns > 0 or problem.key is None or problem.classes is not None
        of_rows, values, of_columns = self._log_sums(n_columns, self.trains_rows and not both)
        loss, u = by_chunks.penalty(problem, of_rows, slice(0, n))
        of_anchors, v = -u, u
        if n_columns:
            of_columns = by_chunks.over_ranks(of_columns, problem.group)
            share, v = by_chunks.column_penalty(problem, of_columns)
            loss, of_anchors = loss + share, of_anchors - v[by_chunks.own_columns(problem)]
        if not (self.trains_rows or self.trains_columns):
            return loss, of_anchors, None, None
        if values is not None:
            values = values[:n] * u[:, None]
        most = u.amax() if v is u else torch.maximum(u.amax(), v.amax())
        rows = padded(_relative(of_rows, u, most), x, torch.inf)
        columns = rows
        if n_columns:
            columns = padded(_relative(of_columns, v, most), y, torch.inf)
        elif self.classes and problem.key is not None:  # there is no loss of columns
            columns = padded(rows[:0], y, torch.inf)
        most = most * 2**-HEADROOM
        of_rows = of_columns = None
        if problem.attractions is not None:
            r = problem.attractions.to(most.dtype)
            r = torch.where(r == 0, 0, r / most)
            # of one kind each pair is met as (i, j) and as (j, i)
            of_rows = padded(2 * r if y is x else r[by_chunks.own_columns(problem)], x)
            of_columns = padded(r, y)
        if self.trains_rows and values is None:
            values = self._weighed(x, y, rows, columns, attractions=of_rows) * most
        sums = None
        if self.trains_columns:
            by_rows = columns if n_columns else None
            sums = self._weighed(self.trained, x, by_rows, rows, attractions=of_columns) * most
        return loss, of_anchors, values, sums

    def _pairs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        problem, x, dtype = self.problem, self.x, self.problem.dtype
        anchors = padded(problem.anchors.to(dtype) * LOG2E.value, x)
        weights = problem.weights.to(dtype)
        tiles = self.tiles.narrow()
        n_shares, per_share = shares(x, self.y, tiles)
        sums = weights.new_empty((2, n_shares, len(x.matrix)))
        values = self._values(x, n_shares if self.trains_rows else 0)
        softplus_sums[len(x.matrix) // tiles.rows, n_shares](
            **self._sides(x, self.y, per_share, tiles), anchors_ptr=anchors, sums_ptr=sums[0],
            slopes_ptr=sums[1], values_ptr=values, VALUES=self.trains_rows,
        )  # fmt: skip
        of_pairs, slopes = sums.sum(1)[:, : len(weights)]
        columns = None
        if self.trains_columns:
            most = weights.amax() * 2**-HEADROOM
            shares_of_most = padded(weights / most, x)
            columns = self._weighed(self.trained, x, None, anchors, shares_of_most) * most
        rows = None
        if self.trains_rows:
            rows = of_all_shares(values)[: len(weights)] * weights[:, None]
        return of_pairs @ weights, -slopes * weights, rows, columns

    # ------------------------------------------------------------------------------- the sweeps

    def _log_sums(self, n_columns: int, values_too: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of rows, the values weighed by their softmax, of columns."""
        x, y, tiles = self.x, self.y, self.tiles.narrow() if n_columns else self.tiles
        n_blocks = len(x.matrix) // tiles.rows
        n_shares, per_share = shares(x, y, tiles)
        # each program has its own sums of columns: no more of them than run at once
        n_programs = n_blocks
        if n_columns:
            rounds = triton.cdiv(n_blocks, device_of(x.rows).multiprocessors)
            n_programs = triton.cdiv(n_blocks, rounds)
        found = self.scale.new_empty((n_shares, len(x.matrix)))
        values = self._values(x, n_shares if values_too else 0)
        parts = found.new_empty((2, n_programs, n_columns))
        log_sums[n_programs, n_shares](
            **self._sides(x, y, per_share, tiles), **self._views(x), log_sums_ptr=found,
            values_ptr=values, largest_ptr=parts[0], sums_ptr=parts[1], n_paired=n_columns,
            VALUES=values_too, PAIRED=n_columns > 0,
        )  # fmt: skip
        of_columns = found.new_empty(n_columns)
        if n_columns:
            column_log_sums[(triton.cdiv(n_columns, _LANES),)](
                parts[0], parts[1], of_columns, n_programs, n_columns, LANES=_LANES
            )
        found *= LN2.value
        of_rows = found.logsumexp(0) if n_shares > 1 else found[0]
        sums = None
        if values_too:
            sums = values[0]
            if n_shares > 1:
                lowest = torch.finfo(found.dtype).min
                parts_of_rows = (found - of_rows.clamp(min=lowest)).exp()
                sums = (values * parts_of_rows[..., None]).sum(0)
        return of_rows[: len(x.rows)], sums, of_columns * LN2.value

    def _weighed(
        self, x: Side, y: Side, of_rows: Tensor | None, of_columns: Tensor,
        weights: Tensor | None = None, attractions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Σ_j G_ij y_j."""
        # what attracts takes registers too
        tiles = self.tiles.narrow() if self.classes and self.tiles.depth > 128 else self.tiles
        n_shares, per_share = shares(x, y, tiles)
        values = self._values(x, n_shares)
        weighed_sums[len(x.matrix) // tiles.rows, n_shares](
            **self._sides(x, y, per_share, tiles, swapped=x is not self.x), **self._views(x),
            **self._classes(x, y),
            attractions_ptr=of_columns if attractions is None else attractions,
            of_rows_ptr=of_columns if of_rows is None else of_rows, of_columns_ptr=of_columns,
            weights_ptr=of_columns if weights is None else weights, values_ptr=values,
            PAIRS=weights is not None, BOTH=of_rows is not None,
        )  # fmt: skip
        return of_all_shares(values)

    def _other_views(self) -> dict[int, Tensor]:
        """Of each side, for each row the place of the other view of its example; −1: none."""
        n, first = len(self.x.rows), self.problem.first
        places = torch.arange(n, device=self.scale.device, dtype=torch.int32).roll(-(n // 2))
        others = {id(self.x): padded(places + first, self.x, -1)}
        if self.trained is not self.x:
            of_keys = padded(places[:0], self.trained, -1)
            of_keys[first : first + n] = places
            others[id(self.trained)] = of_keys
        return others

    def _views(self, x: Side) -> dict[str, Any]:
        return dict(others_ptr=self.others.get(id(x), x.matrix), VIEWS=bool(self.others))

    def _classes(self, x: Side, y: Side) -> dict[str, Any]:
        of_rows, of_columns = x.matrix, y.matrix
        if self.classes:
            of_rows, of_columns = self.classes[id(x)], self.classes[id(y)]
        return dict(x_classes_ptr=of_rows, y_classes_ptr=of_columns, CLASSES=bool(self.classes))

    def _values(self, x: Side, n_shares: int) -> Tensor:
        return self.scale.new_empty((n_shares, len(x.matrix), self.tiles.depth))

    def _sides(
        self, x: Side, y: Side, per_share: int, tiles: Tiling, swapped: bool = False
    ) -> dict[str, Any]:
        first = self.problem.first
        return dict(
            x_ptr=x.matrix, y_ptr=y.matrix, scale_ptr=self.scale,
            x_factors_ptr=x.matrix if x.factors is None else x.factors,
            y_factors_ptr=y.matrix if y.factors is None else y.factors,
            n=len(x.rows), n_padded=len(x.matrix), m=len(y.rows), per_split=per_share,
            own=-first if swapped else first, OWN=first >= 0, FACTORS=x.factors is not None,
            **tiles.constants,
        )  # fmt: skip


def _relative(log_sums: Tensor, slopes: Tensor, most: Tensor) -> Tensor:
    """In units of log2 what to take off S for exp2 of it to be slope · softmax, but for `most`."""
    shift = log_sums * LOG2E.value - (slopes / most).log2() - HEADROOM
    return torch.where(slopes == 0, torch.inf, shift)
