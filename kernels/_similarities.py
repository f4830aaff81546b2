"""Embeddings as tiles of similarities want them, and the gradients that come back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._pairs import SHORTEST
from fastkd.kernels._launch import INTERPRETED, Device, device_of
from fastkd.portable._similarities import in_half

ROWS_TOGETHER = 128  # a multiple of the sides of all tiles
_WIDEST_HALF, _WIDEST_TF32 = 256, 128  # of tiles whose sums stay in registers


class Tiling(NamedTuple):
    """How the products are made: in `product`, summed in `dtype`, tiles of ROWS by COLUMNS."""

    product: torch.dtype
    dtype: torch.dtype
    depth: int
    rows: int
    columns: int
    stages: int
    warps: int

    def narrow(self) -> Tiling:
        """For kernels that need more registers for each pair."""
        return self._replace(columns=min(self.columns, 8 * self.warps))

    @property
    def constants(self) -> dict[str, Any]:
        return dict(
            PRECISION="tf32" if self.product == torch.float32 else "ieee",
            DTYPE=tl.float64 if self.dtype == torch.float64 else tl.float32,
            ROWS=self.rows, COLUMNS=self.columns, DEPTH=self.depth,
            num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip


def tiling(rows: Tensor, half: str, dtype: torch.dtype) -> Tiling | None:
    """None for what cuBLAS does better: wide embeddings, and float32 that is not to be rounded."""
    depth = max(16, triton.next_power_of_2(rows.shape[1]))
    device = device_of(rows)
    if device.nvidia and device.generation < 8:  # too little shared memory
        return None
    if dtype == torch.float64:
        if not INTERPRETED:  # where the kernels can be compared with the formulas to all digits
            return None
        return Tiling(dtype, dtype, depth, 32, 16, 1, 4)
    if half:
        if depth > _WIDEST_HALF:
            return None
        few = triton.cdiv(len(rows), 128) < device.multiprocessors
        return Tiling(getattr(torch, half), dtype, depth, *_sides(depth, device, few))
    if depth > _WIDEST_TF32 or not _may_be_rounded(device.nvidia):
        return None
    return Tiling(dtype, dtype, depth, 64, 32, 2, 4 if depth > 64 else 8)


def _sides(depth: int, device: Device, few: bool) -> tuple[int, int, int, int]:
    """Rows, columns, stages and warps whose sums stay in registers: the compiler tells which do."""
    wide = depth > 128
    if device.generation == 9:  # warps of one group share a product of 64 rows
        columns = 64 if wide else 128
        return (64, columns, 2, 4) if few else (128, columns, 2, 8)
    if device.generation == 10:
        return (64, 64, 1, 8) if wide else (64, 64, 2, 4)
    if device.nvidia:
        return (64, 64, 2, 8) if wide else (64, 64, 2, 4)
    return 64, 32 if wide else 64, 1, 4  # 64 KB of shared memory


def of_two(
    rows: Tensor, tiles: Tiling | None, other: Tiling | None
) -> tuple[Tiling, Tiling] | None:
    """For products of two networks, whose tiles are on chip together."""
    if tiles is None or other is None:
        return None
    device = device_of(rows)
    depth = max(tiles.depth, other.depth)
    if torch.float32 in (tiles.product, other.product):
        tiles = tiles._replace(rows=64, columns=32, stages=2, warps=4 if depth > 64 else 8)
    elif depth <= 128:
        tiles = tiles._replace(rows=min(tiles.rows, 64), columns=min(tiles.columns, 64), warps=4)
    elif device.generation in (9, 10):
        tiles = tiles._replace(rows=128, columns=32, stages=2, warps=8)
    else:
        tiles = tiles._replace(rows=64, columns=32, stages=1, warps=4)
    return tiles, other


def _may_be_rounded(nvidia: bool) -> bool:
    """Whether the user allows matmuls of float32 to use TF32."""
    matmul = torch.backends.cuda.matmul
    if not (nvidia or INTERPRETED):
        return False
    if hasattr(matmul, "fp32_precision"):  # reading the older name may then be an error
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


class Side(NamedTuple):
    """Queries, or keys: `matrix` times `factors` are the rows, divided by their lengths."""

    rows: Tensor  # [n, D]
    lengths: Tensor | None  # [n, 1]
    matrix: Tensor  # [padded, depth]
    factors: Tensor | None  # [padded]

    def first(self, n: int) -> Side:
        """The first n rows."""
        if n == len(self.rows):
            return self
        whole = _padded(n)  # after them others may come: what is found for those is not read
        lengths = None if self.lengths is None else self.lengths[:n]
        factors = None if self.factors is None else self.factors[:whole]
        return Side(self.rows[:n], lengths, self.matrix[:whole], factors)

    def gradient(self, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """In the rows, of Σ_j G_ij y_j, and for each row its product with that."""
        values = values[: len(self.rows), : self.rows.shape[1]]
        if self.lengths is None:
            return values * scale, torch.linalg.vecdot(self.rows, values)
        units = self.rows / self.lengths
        along = torch.linalg.vecdot(units, values)
        # what is not longer is divided by a constant, and loses nothing
        lost = along * (self.lengths[:, 0] > SHORTEST)
        gradient = torch.addcmul(values, units, lost[:, None], value=-1)
        return gradient.mul_(scale / self.lengths), along


def side(rows: Tensor, normalize: bool, half: str, tiles: Tiling) -> Side:
    n, width = rows.shape
    matrix = rows.new_zeros((_padded(n), tiles.depth), dtype=tiles.product)
    lengths = None
    if normalize:
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=SHORTEST)
    if lengths is None or tiles.product == tiles.dtype:
        matrix[:n, :width] = rows if lengths is None else rows / lengths
        return Side(rows, lengths, matrix, None)
    factors = rows.new_zeros(len(matrix))
    matrix[:n, :width], factors[:n] = in_half(rows, lengths, half)
    return Side(rows, lengths, matrix, factors)


def _padded(n: int) -> int:
    return triton.cdiv(n, ROWS_TOGETHER) * ROWS_TOGETHER


def padded(numbers: Tensor, side: Side, value: float = 0.0) -> Tensor:
    """As many as the matrix has rows."""
    whole = numbers.new_full((len(side.matrix),), value)
    whole[: len(numbers)] = numbers
    return whole


def of_all_shares(values: Tensor) -> Tensor:
    """[n_padded, depth] from those of each share."""
    return values.sum(0) if len(values) > 1 else values[0]


def shares(x: Side, y: Side, tiles: Tiling) -> tuple[int, int]:
    """How many programs share the columns of a tile of rows, to fill the device; how many each."""
    n_rows = len(x.matrix) // tiles.rows
    n_columns = triton.cdiv(len(y.rows), tiles.columns)
    n_shares = max(1, min(device_of(x.rows).multiprocessors // n_rows, n_columns))
    return n_shares, triton.cdiv(n_columns, n_shares) * tiles.columns
