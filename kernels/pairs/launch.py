"""Solve `Pairs` and `SoftPairs` on a GPU, by tiles of S that never leave a multiprocessor.

Pairs: with G the slopes of the loss in S, one sweep over the tiles gives the log-sum-exps n of rows
and c of columns, others give Σ_j G_ij k_j and Σ_i G_ij q_i. Without log-sum-exps of columns the
first sweep gives the sum for the queries too. `soft_launch.py` has SoftPairs.

Work, in products of 2 N M D FLOPs: with rows alone 1, with the gradient in queries 2, in both
4; with columns, or with classes, 1, 3, 5; if the queries are the keys 1, 3. Products are of
embeddings as they came, in half precision, summed in float32; of float32 they are where the user
allows TF32. All other problems go by chunks through cuBLAS.

A step takes 5 to 9 launches here, whatever N: one for each side that lays out embeddings, finds
lengths and similarities to positive keys, the sweeps, one that makes the loss and all slopes of
what they add up, and one for each side that makes the gradient. Further logits, ranks and a
trained scale take a few of PyTorch's more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fastkd.kernels.device import on_device, warn_of_chunks
from fastkd.kernels.pairs.both_sums import column_log_sums, row_and_column_log_sums
from fastkd.kernels.pairs.by_chunks import pairs_by_chunks
from fastkd.kernels.pairs.embeddings import Embeddings, Partners, embeddings, with_rows_in_order
from fastkd.kernels.pairs.penalties import (
    ClassSums,
    Examples,
    Positives,
    class_numbers,
    log_sum_penalties,
    pair_penalties,
)
from fastkd.kernels.pairs.soft_launch import solve_soft_pairs
from fastkd.kernels.pairs.sweeps import (
    Classes,
    ColumnSums,
    log_sums,
    softplus_sums,
    weighed_sums,
)
from fastkd.kernels.pairs.tiles import Similarities
from fastkd.kernels.pairs.tiling import Tiling, sizes_of, splits_of, tiling
from fastkd.kernels.pairs.vectors import Shares
from fastkd.kernels.tiles import LN2, LOG2E
from fastkd.problems._positives import with_attractions, with_positives
from fastkd.problems.pairs import (
    HEADROOM,
    Gradients,
    Pairs,
    SoftPairs,
    over_ranks,
    penalty,
    widened,
)

_BLOCKS, _COLUMNS = 8, 128  # whose sums a program reads at once
_BLOCK, _WARPS = 4096, 16  # of the one program of a loss, which waits for memory once a block
_LABELS = 32  # whose keys a program counts
_OF_EXAMPLES = (
    "weights", "positive_logits", "key_weights", "key_positive_logits", "classes", "query_classes",
)  # fmt: skip


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


def _solve_pairs(problem: Pairs, needs_grad: Sequence[bool]) -> tuple[Tensor, Gradients]:
    problem = _with_numbers_in_order(problem)
    query, key = problem.query, problem.key
    tiles = tiling(query, problem.half, problem.scale.dtype)
    if tiles is not None and query.numel() and (key is None or key.numel()):
        try:
            return _Sweeps(problem, tiles, needs_grad).value_and_gradients()
        except OutOfResources as error:
            warn_of_chunks(error.name, error.required, error.limit)
    return _by_chunks(with_attractions(widened(problem)), needs_grad)


_by_chunks = with_positives(pairs_by_chunks)


def _with_numbers_in_order(problem: Pairs) -> Pairs:
    """Return the problem with the numbers of examples side by side, as the kernels read them."""
    given = {name: getattr(problem, name) for name in _OF_EXAMPLES}
    return problem._replace(**{name: x.contiguous() for name, x in given.items() if x is not None})


class _Slopes(NamedTuple):
    """A loss and its slopes, with what the second sweep and the gradients need of them."""

    loss: Tensor
    of_logits: Tensor | None  # in the positive logits, [n]
    of_further: Tensor | None
    of_positives: Tensor | None  # in the similarities to the positive keys, [n]
    most: Tensor  # 0-dim, what the sums of the second sweep are multiplied by
    row_shifts: Tensor  # [n_padded]
    column_shifts: Tensor | None  # of the columns that have a loss, [m_padded]
    pulls: Tensor | None  # attractions in units of `most`, [n_padded]
    weights: Tensor | None  # of queries in units of `most`, [n_padded], of the form "pairs"


class _FirstSums(NamedTuple):
    """The sums for the queries, if the first sweep gives them, and their units."""

    values: Tensor
    weights: Tensor
    shares: Shares | None


class _Sweeps:
    """The sweeps over the tiles of `Pairs`."""

    def __init__(self, problem: Pairs, tiles: Tiling, needs_grad: Sequence[bool]) -> None:
        self.problem, self.tiles, self.needs_grad = problem, tiles, needs_grad
        self.scale = problem.scale.to(tiles.dtype)
        self.queries = queries = with_rows_in_order(problem.query)
        self.trained_keys = queries if problem.key is None else with_rows_in_order(problem.key)
        is_given = problem.form != "pairs" and problem.positive_logits is not None
        self.has_positives = problem.first >= 0 and not is_given and problem.classes is None
        self.x = self._laid_out(queries, self._partners(self.trained_keys))
        self.y = self.trained_y = self.x
        if problem.key is not None:
            keys = self.trained_keys
            if problem.bank is not None:
                keys = torch.cat([keys, problem.bank.to(keys.dtype)])
            self.y = self._laid_out(keys)
            self.trained_y = self.y.head(len(self.trained_keys))
        # by the id of the embeddings, which are x or y
        self.classes: dict[int, Tensor] = {}
        if problem.classes is not None:
            assert problem.query_classes is not None
            numbers, self.n_alike = self._numbered(self.x, problem.query_classes)
            self.classes[id(self.x)] = numbers
            if self.x is not self.y:
                self.classes[id(self.y)], _ = self._numbered(self.y, problem.classes)
        needs_query, needs_key, needs_scale = needs_grad[:3]
        self.trains_rows = needs_query or needs_scale
        self.trains_columns = problem.key is not None and needs_key

    def value_and_gradients(self) -> tuple[Tensor, Gradients]:
        """Return the loss and its gradients in the trained fields."""
        if self.problem.form == "pairs":
            slopes, first = self._pairs()
        else:
            slopes, first = self._log_sum_exps()
        needs_query, _, needs_scale, needs_logits, needs_further = self.needs_grad
        of_query = of_key = of_scale = None
        if self.trains_rows:
            units: dict[str, Any] = dict(most=slopes.most)
            if first is None:
                values = self._sums_of_rows(slopes)
            else:
                values, *of_rows = first
                units = dict(zip(("weights", "shares"), of_rows, strict=True))
            of_query, of_scale = self.x.gradient(
                values, self.scale, needs_rows=needs_query, needs_scale=needs_scale, **units,
                partners=self._partners(self.trained_keys), slopes=slopes.of_positives,
                is_double=self.problem.key is None,
            )  # fmt: skip
        if self.trains_columns:
            of_key, _ = self.trained_y.gradient(
                self._sums_of_columns(slopes), self.scale, needs_rows=True, needs_scale=False,
                most=slopes.most, partners=self._partners(self.queries, of_keys=True),
                slopes=slopes.of_positives,
            )  # fmt: skip
        of_logits = slopes.of_logits if needs_logits else None
        of_further = slopes.of_further if needs_further else None
        return slopes.loss, (of_query, of_key, of_scale, of_logits, of_further)

    # ------------------------------------------------------------------------------- the losses

    def _log_sum_exps(self) -> tuple[_Slopes, _FirstSums | None]:
        problem, x, y = self.problem, self.x, self.y
        n, n_columns = len(x.rows), 0
        if problem.key_weights is not None:
            n_columns = len(problem.key_weights)
        needs_sweep = n_columns > 0 or problem.key is None or problem.classes is not None
        parts, alike, values, column_sums = self._log_sums(
            n_columns, self.trains_rows and not needs_sweep
        )
        if problem.further_logits is not None:
            return self._with_further(parts, values)
        loss, most = parts.new_empty(()), parts.new_empty(())
        log_sums, of_rows, of_positives = parts.new_empty((3, n))
        row_shifts, column_shifts = parts.new_empty(len(x.matrix)), None
        columns = classes = pulls = positives = None
        if alike is None:
            positives = self._positives()
        else:
            pulls = torch.empty_like(row_shifts)
            assert problem.query_classes is not None
            classes = ClassSums(
                problem.query_classes, self.n_alike, alike, pulls,
                *map(tl.constexpr, (problem.first >= 0, problem.over_anchors, self._is_double())),
            )  # fmt: skip
        rows = Examples(log_sums, positives, problem.weights, row_shifts)
        if column_sums is not None:
            column_shifts = parts.new_empty(len(y.matrix))
            logits = Positives(problem.key_positive_logits, None)
            if problem.key_positive_logits is None:
                logits = self._positives()
            columns = Examples(column_sums, logits, problem.key_weights, column_shifts)
        log_sum_penalties[(1,)](
            parts, rows, columns, classes, loss, of_rows, of_positives, most,
            n=n, n_padded=len(x.matrix), n_splits=len(parts), n_columns=n_columns,
            n_columns_padded=len(y.matrix), first=problem.first, HAS_COLUMNS=columns is not None,
            SOFTPLUS=problem.form == "softplus", BLOCK=_BLOCK, DTYPE=self.tiles.tile().DTYPE,
            num_warps=_WARPS,
        )  # fmt: skip
        slopes = _Slopes(
            loss, of_positives, None, of_positives if self.has_positives else None, most,
            row_shifts, column_shifts, pulls, None,
        )  # fmt: skip
        if values is None:
            return slopes, None
        return slopes, _FirstSums(values, of_rows, Shares(parts, log_sums))

    def _with_further(
        self, parts: Tensor, values: Tensor | None
    ) -> tuple[_Slopes, _FirstSums | None]:
        """Return the slopes with further logits, whose weights PyTorch applies."""
        x, n = self.x, len(self.x.rows)
        log_sums = (parts[:, :n] * LN2.value).logsumexp(0)
        loss, of_rows, of_logits, of_further = penalty(self.problem, log_sums, slice(0, n))
        most = of_rows.amax()
        shifts = log_sums * LOG2E.value - (of_rows / most).log2() - HEADROOM
        shifts = x.pad(torch.where(of_rows == 0, torch.inf, shifts), torch.inf)
        most = most * 2**-HEADROOM
        slopes = _Slopes(loss, of_logits, of_further, None, most, shifts, None, None, None)
        if values is None:
            return slopes, None
        return slopes, _FirstSums(values, of_rows, Shares(parts, log_sums * LOG2E.value))

    def _pairs(self) -> tuple[_Slopes, _FirstSums | None]:
        problem, x = self.problem, self.x
        assert problem.positive_logits is not None
        tiles, n, n_padded = self.tiles.narrow(), len(x.rows), len(x.matrix)
        thresholds = problem.positive_logits
        n_splits, per_split = splits_of(x, self.y, tiles)
        sums = self.scale.new_empty((2, n_splits, n_padded))
        values = self._empty_values(x, n_splits) if self.trains_rows else None
        softplus_sums[n_padded // tiles.rows, n_splits](
            self._similarities(x, self.y), thresholds, sums[0], sums[1], values,
            **self._sizes(x, self.y, per_split), TILE=tiles.tile(), **tiles.options,
        )  # fmt: skip
        loss, most = sums.new_empty(()), sums.new_empty(())
        of_logits, of_positives = sums.new_empty((2, n))
        shifts, weights = sums.new_empty((2, n_padded))
        positives = self._positives() if self.has_positives else None
        pair_penalties[(1,)](
            sums, thresholds, problem.weights, positives, loss, of_logits, of_positives, most,
            shifts, weights, n=n, n_padded=n_padded, n_splits=n_splits, BLOCK=_BLOCK,
            DTYPE=tiles.tile().DTYPE, num_warps=_WARPS,
        )  # fmt: skip
        slopes = _Slopes(
            loss, of_logits, None, of_positives if self.has_positives else None, most, shifts,
            None, None, weights,
        )  # fmt: skip
        return slopes, None if values is None else _FirstSums(values, problem.weights, None)

    # ------------------------------------------------------------------------------- the sweeps

    def _log_sums(
        self, n_columns: int, needs_values: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return n of the splits [n_splits, n_padded], in units of log2, and c [n_columns].

        Between them are Σ_j S_ij over the pairs of one class, as n, and Σ_j softmax_j(S_ij) k_j
        over the columns of the splits, if needed.
        """
        x, y, tiles = self.x, self.y, self.tiles
        n_blocks = len(x.matrix) // tiles.rows
        n_splits, per_split = splits_of(x, y, tiles)
        parts = self.scale.new_empty((n_splits, len(x.matrix)))
        constants = dict(**self._sizes(x, y, per_split), TILE=tiles.tile(), **tiles.options)
        if not n_columns:
            values = self._empty_values(x, n_splits) if needs_values else None
            alike = torch.empty_like(parts) if self.classes else None
            log_sums[n_blocks, n_splits](
                self._similarities(x, y), self.classes.get(id(x)), self.classes.get(id(y)), parts,
                alike, values, TWO_VIEWS=self.problem.two_views, **constants,
            )  # fmt: skip
            return parts, alike, values, None
        columns = ColumnSums(*parts.new_empty((2, n_blocks, n_columns)))
        row_and_column_log_sums[n_blocks, n_splits](
            self._similarities(x, y), parts, columns, n_columns=n_columns, **constants
        )
        column_sums = parts.new_empty(n_columns)
        column_log_sums[(triton.cdiv(n_columns, _COLUMNS),)](
            columns, column_sums, n_blocks, n_columns, BLOCKS=_BLOCKS, COLUMNS=_COLUMNS
        )
        if self.problem.group:
            of_ranks = over_ranks(column_sums * LN2.value, self.problem.group)
            column_sums = of_ranks * LOG2E.value
        return parts, None, None, column_sums

    def _sums_of_rows(self, slopes: _Slopes) -> Tensor:
        """Return Σ_j G_ij k_j in units of `most`, by splits."""
        columns_attract = self.y is self.x and self.problem.attractions_differ
        column_shifts = slopes.column_shifts
        if column_shifts is None and self.y is self.x:
            column_shifts = slopes.row_shifts
        return self._weighed_sums(
            self.x, self.y, slopes.row_shifts, column_shifts, slopes.pulls,
            columns_attract=columns_attract,
        )  # fmt: skip

    def _sums_of_columns(self, slopes: _Slopes) -> Tensor:
        """Return Σ_i G_ij q_i in units of `most`, by splits."""
        return self._weighed_sums(
            self.trained_y, self.x, slopes.column_shifts, slopes.row_shifts, slopes.pulls,
            weights=slopes.weights, rows_attract=False, columns_attract=True,
        )  # fmt: skip

    def _weighed_sums(
        self,
        x: Embeddings,
        y: Embeddings,
        row_shifts: Tensor | None,
        column_shifts: Tensor | None,
        attractions: Tensor | None,
        weights: Tensor | None = None,
        rows_attract: bool = True,
        columns_attract: bool = False,
    ) -> Tensor:
        """Return Σ_j G_ij y_j, [n_splits, n_padded, depth], with G as in the kernel."""
        # narrow, because classes take registers too
        tiles = self.tiles.narrow() if self.classes and self.tiles.depth > 128 else self.tiles
        n_splits, per_split = splits_of(x, y, tiles)
        values = self._empty_values(x, n_splits)
        classes = None
        if self.classes:
            classes = Classes(self.classes[id(x)], self.classes[id(y)], attractions)
        weighed_sums[len(x.matrix) // tiles.rows, n_splits](
            self._similarities(x, y), classes, row_shifts, column_shifts, weights, values,
            **self._sizes(x, y, per_split), TILE=tiles.tile(), TWO_VIEWS=self.problem.two_views,
            OF_KEYS=x is not self.x, ROWS_ATTRACT=rows_attract and bool(self.classes),
            COLUMNS_ATTRACT=columns_attract and bool(self.classes), **tiles.options,
        )  # fmt: skip
        return values

    def _laid_out(self, rows: Tensor, partners: Partners | None = None) -> Embeddings:
        tiles = self.tiles
        return embeddings(
            rows, self.problem.normalize, tiles.product, tiles.dtype, tiles.depth, partners
        )

    def _partners(self, rows: Tensor, of_keys: bool = False) -> Partners | None:
        problem = self.problem
        if not self.has_positives:
            return None
        return Partners(rows, len(self.queries), problem.first, problem.two_views, of_keys)

    def _positives(self) -> Positives:
        """Return the positive logits of the queries."""
        if self.has_positives:
            return Positives(self.x.cosines, self.scale)
        assert self.problem.positive_logits is not None
        return Positives(self.problem.positive_logits, None)

    def _numbered(self, x: Embeddings, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return numbers of classes for the rows of a matrix, and how many keys each label has."""
        assert self.problem.classes is not None
        numbers, counts = self.scale.new_empty(len(x.matrix)), self.scale.new_empty(len(labels))
        class_numbers[(len(x.matrix) // _LABELS,)](
            labels, self.problem.classes, numbers, counts, len(labels), len(self.problem.classes),
            ROWS=_LABELS, COLUMNS=_COLUMNS,
        )  # fmt: skip
        return numbers, counts

    def _is_double(self) -> bool:
        """Return whether each pair of a class is met as (i, j) and as (j, i)."""
        return self.y is self.x and not self.problem.attractions_differ

    def _empty_values(self, x: Embeddings, n_splits: int) -> Tensor:
        return self.scale.new_empty((n_splits, len(x.matrix), self.tiles.depth))

    def _similarities(self, x: Embeddings, y: Embeddings) -> Similarities:
        return Similarities(x.side, y.side, self.scale)

    def _sizes(self, x: Embeddings, y: Embeddings, per_split: int) -> dict[str, Any]:
        return sizes_of(x, y, per_split, self.problem.first, is_swapped=x is not self.x)
