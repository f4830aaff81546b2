"""Embeddings as tiles of similarities want them, and the gradients that come back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._pairs import SHORTEST
from fastkd.kernels._launch import INTERPRETED, device_of

ROWS_TOGETHER = 128  # a multiple of the sides of all tiles
_WIDEST_HALF, _WIDEST_TF32 = 256, 128  # of tiles whose sums stay in registers
HEADROOM = 12.0  # slopes are at most 2 to this: of float16 what is small shall not vanish


class Tiling(NamedTuple):
    """How the products are made: in `product`, summed in `dtype`, tiles of ROWS by COLUMNS."""

    product: torch.dtype
    dtype: torch.dtype
    depth: int
    rows: int
    columns: int
    stages: int
    warps: int

    @property
    def constants(self) -> dict[str, Any]:
        return dict(
            PRECISION="tf32" if self.product == torch.float32 else "ieee",
            DTYPE=tl.float64 if self.dtype == torch.float64 else tl.float32,
            ROWS=self.rows, COLUMNS=self.columns, DEPTH=self.depth,
            num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip


def tiling(rows: Tensor, width: int, half: str, dtype: torch.dtype) -> Tiling | None:
    """None for what cuBLAS does better: wide embeddings, and float32 that is not to be rounded."""
    depth = max(16, triton.next_power_of_2(width))
    device = device_of(rows)
    if dtype == torch.float64:
        if not INTERPRETED:  # where the kernels can be compared with the formulas to all digits
            return None
        return Tiling(dtype, dtype, depth, 32, 16, 1, 4)
    if half:
        if depth > _WIDEST_HALF:
            return None
        product = getattr(torch, half)
        if not device.nvidia and not INTERPRETED:  # 64 KB of shared memory
            return Tiling(product, dtype, depth, 64, 64 if depth <= 128 else 32, 1, 4)
        few = triton.cdiv(len(rows), 128) < device.multiprocessors
        columns = 128 if depth <= 128 else 64
        return Tiling(product, dtype, depth, 64 if few else 128, columns, 2, 4 if few else 8)
    if depth > _WIDEST_TF32 or not _may_be_rounded(device.nvidia):
        return None
    return Tiling(dtype, dtype, depth, 64, 64, 2, 4)


def of_two(tiles: Tiling | None, other: Tiling | None) -> tuple[Tiling, Tiling] | None:
    """For products of two networks, whose tiles are on chip together."""
    if tiles is None or other is None:
        return None
    most = 64 if max(tiles.depth, other.depth) <= 128 else 32
    rows, columns = min(tiles.rows, other.rows, 64), min(tiles.columns, other.columns, most)
    tiles = tiles._replace(rows=rows, columns=columns, warps=4)
    return tiles, other._replace(rows=rows, columns=columns, warps=4)


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

    def gradient(self, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """In the rows, of Σ_j G_ij y_j, and for each row its product with that."""
        values = values[: len(self.rows), : self.rows.shape[1]]
        if self.lengths is None:
            return values * scale, torch.linalg.vecdot(self.rows, values)
        units = self.rows / self.lengths
        along = torch.linalg.vecdot(units, values)
        gradient = torch.addcmul(values, units, along[:, None], value=-1)
        return gradient.mul_(scale / self.lengths), along


def side(rows: Tensor, normalize: bool, tiles: Tiling) -> Side:
    n, width = rows.shape
    padded = triton.cdiv(n, ROWS_TOGETHER) * ROWS_TOGETHER
    matrix = rows.new_zeros((padded, tiles.depth), dtype=tiles.product)
    lengths = None
    if normalize:
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=SHORTEST)
    if lengths is None or tiles.product == tiles.dtype:
        matrix[:n, :width] = rows if lengths is None else rows / lengths
        return Side(rows, lengths, matrix, None)
    factors = rows.new_zeros(padded)
    if tiles.product == torch.float16:  # whose exponents do not bear any length
        _, exponents = torch.frexp(lengths)
        matrix[:n, :width] = torch.ldexp(rows, -exponents)
        factors[:n] = torch.ldexp(1 / lengths, exponents)[:, 0].clamp_(max=2)  # 0 has any
    else:
        matrix[:n, :width] = rows
        factors[:n] = 1 / lengths[:, 0]
    return Side(rows, lengths, matrix, factors)


def padded(numbers: Tensor, side: Side, value: float = 0.0) -> Tensor:
    """As many as the matrix has rows."""
    whole = numbers.new_full((len(side.matrix),), value)
    whole[: len(numbers)] = numbers
    return whole


def shares(x: Side, y: Side, tiles: Tiling) -> tuple[int, int]:
    """How many programs share the columns of a tile of rows, to fill the device; how many each."""
    n_rows = len(x.matrix) // tiles.rows
    n_columns = triton.cdiv(len(y.rows), tiles.columns)
    n_shares = max(1, min(device_of(x.rows).multiprocessors // n_rows, n_columns))
    return n_shares, triton.cdiv(n_columns, n_shares) * tiles.columns
