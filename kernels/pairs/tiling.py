"""Cut the similarities of a problem into tiles, and these among programs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.device import INTERPRETED, Device, device_of
from fastkd.kernels.pairs.embeddings import Embeddings
from fastkd.kernels.pairs.tiles import Tile

_WIDEST_HALF, _WIDEST_TF32 = 256, 128  # widths whose sums stay in registers
# tiles in shared memory, so that the copies of the next ones run while one is multiplied
_AHEAD = 3
_SCRATCH = 2 << 10  # bytes of shared memory that a program needs besides


class Tiling(NamedTuple):
    """Products of `product` numbers, summed in `dtype`, in tiles of `rows` by `columns` pairs."""

    product: torch.dtype
    dtype: torch.dtype
    depth: int  # the width of the embeddings, rounded up to a power of two
    rows: int
    columns: int
    stages: int
    warps: int

    def narrow(self) -> Tiling:
        """Return tiles with fewer columns, for kernels that need more registers for each pair."""
        return self._replace(columns=min(self.columns, 8 * self.warps))

    def tile(self, has_tf32: bool = False) -> Tile:
        """Return the constants of a kernel; `has_tf32` if another product in it is of float32."""
        constants = (
            self.rows,
            self.columns,
            self.depth,
            # half precision ignores it, so that one precision serves two products
            "tf32" if has_tf32 or self.product == torch.float32 else "ieee",
            tl.float64 if self.dtype == torch.float64 else tl.float32,
        )
        return Tile(*map(tl.constexpr, constants))

    @property
    def options(self) -> dict[str, int]:
        """Return the options with which Triton compiles a kernel over these tiles."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def tiling(rows: Tensor, half: str, dtype: torch.dtype) -> Tiling | None:
    """Return the tiles for these embeddings, None where chunks through cuBLAS are the better way.

    Chunks are better for wide embeddings, and for float32 that must not be rounded to TF32.
    """
    depth = max(16, triton.next_power_of_2(rows.shape[1]))
    device = device_of(rows)
    if device.nvidia and device.generation < 8:  # because it has too little shared memory
        return None
    if dtype == torch.float64:
        if not INTERPRETED:  # there, the kernels can be compared with the formulas to all digits
            return None
        return Tiling(dtype, dtype, depth, 32, 16, 1, 4)
    if half:
        if depth > _WIDEST_HALF:
            return None
        is_small = triton.cdiv(len(rows), 128) < device.multiprocessors
        return Tiling(getattr(torch, half), dtype, depth, *_sides(depth, device, is_small))
    if depth > _WIDEST_TF32 or not _may_be_rounded(device.nvidia):
        return None
    return Tiling(dtype, dtype, depth, 64, 32, _AHEAD, 4 if depth > 64 else 8)


def _sides(depth: int, device: Device, is_small: bool) -> tuple[int, int, int, int]:
    """Return the rows, columns, stages and warps whose sums stay in registers, found by compiling.

    `is_small`: tiles of 128 rows would leave multiprocessors idle.
    """
    is_wide = depth > 128
    if device.generation == 9:  # because warps of one group share a product of 64 rows
        columns = 64 if is_wide else 128
        return (64, columns, _AHEAD, 4) if is_small else (128, columns, _AHEAD, 8)
    if device.generation == 10:
        return (64, 64, 1, 8) if is_wide else (64, 64, _AHEAD, 4)
    if device.nvidia:
        # half of the columns where another program, or any, would not fit beside it
        room = device.shared_bytes // (1 if is_wide else 2) - _SCRATCH
        columns = 64 if (64 + _AHEAD * 64) * depth * 2 <= room else 32
        return 64, columns, _AHEAD, 8 if is_wide else 4
    return 64, 32 if is_wide else 64, 1, 4  # because there are 64 KB of shared memory


def tilings_of_two(
    rows: Tensor, tiles: Tiling | None, tiles_t: Tiling | None
) -> tuple[Tiling, Tiling] | None:
    """Return the tilings of student and teacher, whose tiles are on chip at the same time."""
    if tiles is None or tiles_t is None:
        return None
    device = device_of(rows)
    depth = max(tiles.depth, tiles_t.depth)
    has_tf32 = torch.float32 in (tiles.product, tiles_t.product)
    n_rows, n_columns, warps = 64, 32, 4
    if not has_tf32 and depth <= 128:
        n_columns = min(tiles.columns, tiles_t.columns, 64)
    elif not has_tf32 and device.generation in (9, 10):
        n_rows, warps = 128, 8
    stages = 1
    if device.nvidia:  # as many as fit
        of_row = sum(x.depth * x.product.itemsize for x in (tiles, tiles_t))
        room = device.shared_bytes - _SCRATCH - n_rows * of_row
        if device.generation == 10:  # because slopes pass through shared memory there
            room -= 4 * n_rows * n_columns
        stages = max(1, min(_AHEAD, room // (n_columns * of_row)))
    if has_tf32 and (depth <= 64 or stages == 1):
        warps = 8
    tiles = tiles._replace(rows=n_rows, columns=n_columns, stages=stages, warps=warps)
    return tiles, tiles_t._replace(rows=n_rows, columns=n_columns)


def _may_be_rounded(nvidia: bool) -> bool:
    """Return whether the user allows matmuls of float32 to use TF32."""
    matmul = torch.backends.cuda.matmul
    if not (nvidia or INTERPRETED):
        return False
    if hasattr(matmul, "fp32_precision"):  # because reading the older name may then be an error
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def splits_of(x: Embeddings, y: Embeddings, tiles: Tiling) -> tuple[int, int]:
    """Return how many programs split the columns of a tile of rows, and the columns of each.

    The programs are as many as fill the device; each has whole tiles.
    """
    n_blocks = len(x.matrix) // tiles.rows
    n_tiles = triton.cdiv(len(y.rows), tiles.columns)
    n_splits = max(1, min(device_of(x.rows).multiprocessors // n_blocks, n_tiles))
    return n_splits, triton.cdiv(n_tiles, n_splits) * tiles.columns


class Statistics(NamedTuple):
    """The losses of rows, and the maximum and Σ_j exp(S_ij − maximum_i) of each, and of T."""

    losses: Tensor
    largest: Tensor
    total: Tensor
    largest_t: Tensor
    total_t: Tensor


def merge_statistics(parts: Tensor, unit: float, form: str) -> Statistics:
    """Merge [n_splits, 5, n], what `divergences` leaves with S and T in numbers of `unit`."""
    largest, total, largest_t, total_t, differences = parts.unbind(1)
    if len(parts) > 1:
        risen, risen_t = largest.amax(0), largest_t.amax(0)
        shrunk, shrunk_t = ((largest - risen) * unit).exp(), ((largest_t - risen_t) * unit).exp()
        total, total_t = (total * shrunk).sum(0), (total_t * shrunk_t).sum(0)
        largest, largest_t = risen, risen_t
        differences = (differences * shrunk_t).sum(0)
    else:
        largest, total, largest_t, total_t, differences = parts[0]
    if form == "cross_entropy":
        losses = (differences / total_t + largest) * unit + total.log()
    else:
        # maxima are subtracted before the logarithms are added, because they are large and alike
        losses = (differences / total_t + (largest - largest_t)) * unit
        losses = losses + (total / total_t).log()
    # rounding alone makes a loss negative
    return Statistics(losses.relu_(), largest, total, largest_t, total_t)


def sizes_of(
    x: Embeddings, y: Embeddings, per_split: int, first: int, is_swapped: bool = False
) -> dict[str, Any]:
    """Return the sizes that every sweep takes; `is_swapped`: x are keys, and y queries."""
    diagonal = None
    if first >= 0:
        diagonal = -first if is_swapped else first
    return dict(
        n=len(x.rows), n_padded=len(x.matrix), m=len(y.rows), per_split=per_split,
        diagonal=diagonal,
    )  # fmt: skip
