"""Chunks of similarities on a GPU, for what is too wide for tiles and float32 not to be rounded.

cuBLAS makes the products. A kernel reads them for what a row or a column adds up to, and another
one for the slopes, which it leaves as the next products want them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels._chunk_sweeps import (
    exponentials_of_chunk,
    fold_chunk,
    log_sums_of_chunk,
    pairs_of_chunk,
)
from fastkd.kernels._launch import device_of
from fastkd.portable._similarities import Similarities

COLUMNS = 2048  # of a row that a program reads at once
_TILE = 32, 64  # rows and columns, where columns are added up
_PROGRAMS = 4  # for each multiprocessor, so that some wait for memory while others compute


class Chunks(Similarities):
    """Whose parts are products alone: the kernels know the factors, and what is left out."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.trains = self.of_queries is not None, self.of_keys is not None
        self.stored: Tensor | None = None
        if self.halves is not None:
            self.key_factors = self.padded(self.halves[1].factors)

    def padded(self, of_columns: Tensor) -> Tensor:
        """To be read as the products are, a vector at a time."""
        return F.pad(of_columns, (0, self.stride - len(of_columns)))

    def shift(self) -> float | None:
        return None  # a look at the numbers would wait for them

    def rows(self, rows: slice, buffer: Tensor) -> Tensor:
        return self.products(rows, buffer)

    def log_sums(self, rows: slice, part: Tensor) -> Tensor:
        n_shares, n_blocks = self.shares(part)
        found = part.new_empty(n_shares, len(part))
        log_sums_of_chunk[len(part), n_shares](
            **self.of_chunk(rows, part), **self.left_out(rows, part), log_sums_ptr=found,
            m=len(self.k), n_blocks=n_blocks, COLUMNS=COLUMNS,
        )  # fmt: skip
        return found.logsumexp(0) if n_shares > 1 else found[0]

    def fold(self, rows: slice, part: Tensor, largest: Tensor, sums: Tensor) -> None:
        rows_at_once, columns = _TILE
        fold_chunk[(triton.cdiv(len(largest), columns),)](
            **self.of_chunk(rows, part), **self.left_out(rows, part), largest_ptr=largest,
            sums_ptr=sums, m=len(largest), ROWS=rows_at_once, COLUMNS=columns,
        )  # fmt: skip

    def add_exponentials(
        self,
        rows: slice,
        part: Tensor,
        of_rows: Tensor,
        slopes: Tensor,
        of_columns: Tensor | None = None,
        column_slopes: Tensor | None = None,
    ) -> None:
        if not any(self.trains):
            return
        exponentials_of_chunk[len(part), triton.cdiv(len(self.k), COLUMNS)](
            **self.of_chunk(rows, part), **self.left_out(rows, part), **self.of_classes(rows, part),
            **self.slopes_to(part), of_rows_ptr=of_rows, slopes_ptr=slopes, m=len(self.k),
            of_columns_ptr=of_rows if of_columns is None else self.padded(of_columns),
            column_slopes_ptr=of_rows if column_slopes is None else self.padded(column_slopes),
            n_paired=0 if of_columns is None else len(of_columns),
            PAIRED=of_columns is not None, COLUMNS=COLUMNS,
        )  # fmt: skip
        self.add_stored(rows, part)

    def add_pairs(
        self, rows: slice, part: Tensor, anchors: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        n_shares, n_blocks = self.shares(part)
        sums = part.new_empty(n_shares, 2, len(part))
        pairs_of_chunk[len(part), n_shares](
            **self.of_chunk(rows, part), **self.left_out(rows, part), **self.slopes_to(part),
            anchors_ptr=anchors, weights_ptr=weights, sums_ptr=sums, m=len(self.k),
            n_blocks=n_blocks, SLOPES=any(self.trains), COLUMNS=COLUMNS,
        )  # fmt: skip
        self.add_stored(rows, part)
        losses, slopes = sums.sum(0)
        return losses, slopes

    def add_stored(self, rows: slice, part: Tensor) -> None:
        """The slopes that a kernel left."""
        if not any(self.trains):
            return
        if self.stored is None:
            self.add(rows, part)
            return
        for_queries, for_keys = self.stored[0, : len(part)], self.stored[-1, : len(part)]
        self.add_in_half(rows, for_queries, for_keys[:, : self.n_trained])

    # ------------------------------------------------------------------- what the kernels take

    def shares(self, part: Tensor) -> tuple[int, int]:
        """How many programs share a row, to fill the device, and how many blocks each has."""
        n_blocks = triton.cdiv(len(self.k), COLUMNS)
        wanted = triton.cdiv(_PROGRAMS * device_of(part).multiprocessors, len(part))
        n_shares = max(1, min(wanted, n_blocks))
        return n_shares, triton.cdiv(n_blocks, n_shares)

    def of_chunk(self, rows: slice, part: Tensor, suffix: str = "") -> dict[str, Any]:
        f = g = self.scale
        if self.halves is not None:
            f, g = self.halves[0].factors[rows], self.key_factors
        tensors = dict(products=part, scale=self.scale, row_factors=f, factors=g)
        return {f"{name}{suffix}_ptr": tensor for name, tensor in tensors.items()} | {
            f"stride{suffix}": self.stride,
            f"FACTORS{suffix.upper()}": self.halves is not None,
        }

    def left_out(self, rows: slice, part: Tensor) -> dict[str, Any]:
        return dict(
            n_rows=len(part), first=self.first, start=rows.start, n=len(self.q),
            OWN=self.first >= 0, VIEWS=self.two_views,
            DTYPE=tl.float64 if part.dtype == torch.float64 else tl.float32,
        )  # fmt: skip

    def of_classes(self, rows: slice, part: Tensor) -> dict[str, Any]:
        if self.classes is None or self.attractions is None:
            return dict(row_classes_ptr=part, classes_ptr=part, attractions_ptr=part, CLASSES=False)
        return dict(
            row_classes_ptr=self.own(self.classes, rows), classes_ptr=self.padded(self.classes),
            attractions_ptr=self.own(self.attractions, rows), CLASSES=True,
        )  # fmt: skip

    def slopes_to(self, part: Tensor) -> dict[str, Any]:
        """Where they go: in place, or in half precision to memory of their own."""
        of_queries, of_keys, lift = part, part, self.scale
        if self.halves is not None and any(self.trains):
            if self.stored is None:
                self.stored = part.new_empty(
                    (sum(self.trains), len(part), self.stride),
                    dtype=self.halves[0].matrix.dtype,
                )[..., : part.shape[1]]
            of_queries, of_keys, lift = self.stored[0], self.stored[-1], self.lift
        return dict(
            of_queries_ptr=of_queries, of_keys_ptr=of_keys, lift_ptr=lift,
            n_trained=self.n_trained, QUERIES=self.trains[0], KEYS=self.trains[1],
        )  # fmt: skip
