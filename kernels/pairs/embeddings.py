"""Lay out embeddings as the sweeps read them, and make gradients of what the sweeps add up."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.pairs.tiles import Side
from fastkd.kernels.pairs.vectors import Shares, Sources, gradients, lay_out

ALIGNMENT = 128  # matrices have a multiple of so many rows, which the sides of all tiles divide
_NUMBERS = 2048  # of embeddings that a program handles
_WARPS = 8  # of a gradient, so that a thread has one vector of each: two leave no registers


class Partners(NamedTuple):
    """The other embeddings of positive pairs: query i and key first + i are of one example."""

    rows: Tensor  # the keys, or the queries
    n_queries: int
    first: int
    two_views: bool  # whether the key of the other view of the query's example is the partner
    of_keys: bool  # whether the partners of keys are meant

    def arguments(self) -> dict[str, Any]:
        """Return what the kernels take."""
        flags = tl.constexpr(self.two_views), tl.constexpr(self.of_keys)
        return dict(
            partner=Sources(self.rows, *flags), partner_stride=self.rows.stride(0),
            n_queries=self.n_queries, first=self.first,
        )  # fmt: skip


_NO_PARTNERS: dict[str, Any] = dict(partner=None, partner_stride=0, n_queries=0, first=0)


class Embeddings(NamedTuple):
    """Queries, or keys: `matrix` times `factors` are the rows, divided by their lengths."""

    rows: Tensor  # [n, D], as they came
    matrix: Tensor  # [n_padded, depth]
    factors: Tensor | None  # [n_padded]
    cosines: Tensor | None  # [n], of rows and their partners; products if rows are not normalised
    normalize: bool
    dtype: torch.dtype  # of sums

    @property
    def side(self) -> Side:
        """Return the pointers that the sweeps read."""
        return Side(self.matrix, self.factors)

    def head(self, n: int) -> Embeddings:
        """Return the first n rows."""
        if n == len(self.rows):
            return self
        # the last tile may hold rows of others, whose results are not read
        n_padded = _padded(n)
        factors = None if self.factors is None else self.factors[:n_padded]
        return self._replace(rows=self.rows[:n], matrix=self.matrix[:n_padded], factors=factors)

    def pad(self, numbers: Tensor, value: float = 0.0) -> Tensor:
        """Return a number for each row of the matrix, `value` after the given ones."""
        padded = numbers.new_full((len(self.matrix),), value)
        padded[: len(numbers)] = numbers
        return padded

    def gradient(
        self,
        values: Tensor,
        scale: Tensor,
        *,
        needs_rows: bool,
        needs_scale: bool,
        most: Tensor | None = None,
        weights: Tensor | None = None,
        shares: Shares | None = None,
        partners: Partners | None = None,
        slopes: Tensor | None = None,
        is_double: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradient in the rows, and that in the scale, of a loss with slopes G.

        Args:
            values: [n_splits, n_padded, depth], Σ_j G_ij y_j in units of `most`, of `weights` of
                the rows, or of `shares` of the splits.
            scale: A 0-dim tensor.
            needs_rows, needs_scale: Which of them is needed.
            partners, slopes: The other rows of positive pairs, and the slopes in their
                similarities, one for each query.
            is_double: Whether rows are queries and keys at once, so that each pair is met twice.
        """
        n, width = self.rows.shape
        gradient = self.rows.new_empty((n, width), dtype=self.dtype) if needs_rows else None
        along = values.new_empty(n) if needs_scale else None
        places = _NO_PARTNERS if partners is None else partners.arguments()
        rows = _rows_of(self.matrix)
        gradients[(triton.cdiv(n, rows),)](
            self.rows, values, most, weights, shares, slopes_ptr=slopes, scale_ptr=scale,
            gradient_ptr=gradient, along_ptr=along, n=n, n_padded=len(self.matrix),
            n_splits=len(values), width=width, stride=self.rows.stride(0), **places,
            IS_DOUBLE=is_double, **self._constants(rows), num_warps=_WARPS,
        )  # fmt: skip
        return gradient, None if along is None else along.sum()

    def _constants(self, rows: int) -> dict[str, Any]:
        dtype = tl.float64 if self.dtype == torch.float64 else tl.float32
        return dict(NORMALIZE=self.normalize, ROWS=rows, DEPTH=self.matrix.shape[1], DTYPE=dtype)


def embeddings(
    rows: Tensor,
    normalize: bool,
    product: torch.dtype,
    dtype: torch.dtype,
    depth: int,
    partners: Partners | None = None,
) -> Embeddings:
    """Return rows [n, D] in the precision of the products, zeros up to whole tiles of this depth.

    The sums of products are of `dtype`.
    """
    (n, width), n_padded = rows.shape, _padded(len(rows))
    matrix = rows.new_empty((n_padded, depth), dtype=product)
    factors = cosines = None
    if normalize and product.itemsize == 2:
        factors = rows.new_empty(n_padded, dtype=dtype)
    places = _NO_PARTNERS
    if partners is not None:
        places, cosines = partners.arguments(), rows.new_empty(n, dtype=dtype)
    found = Embeddings(rows, matrix, factors, cosines, normalize, dtype)
    block = _rows_of(matrix)
    lay_out[(n_padded // block,)](
        rows, matrix, factors, cosines_ptr=cosines, n=n, width=width, stride=rows.stride(0),
        **places, **found._constants(block),
    )  # fmt: skip
    return found


def with_rows_in_order(rows: Tensor) -> Tensor:
    """Return rows whose numbers lie side by side, as the kernels read them."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _rows_of(matrix: Tensor) -> int:
    """Return how many rows a program handles."""
    return max(1, min(ALIGNMENT, _NUMBERS // matrix.shape[1]))


def _padded(n: int) -> int:
    return triton.cdiv(n, ALIGNMENT) * ALIGNMENT
