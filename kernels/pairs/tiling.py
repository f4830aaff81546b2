"""Cut the similarities of a problem into tiles, and lay out embeddings as the kernels read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.device import INTERPRETED, Device, device_of
from fastkd.kernels.pairs.tiles import Side, Tile
from fastkd.problems.pairs import SHORTEST, divisors, in_half

ALIGNMENT = 128  # matrices have a multiple of so many rows, which the sides of all tiles divide
_WIDEST_HALF, _WIDEST_TF32 = 256, 128  # widths whose sums stay in registers
_ROOM_FOR_TWO = 120 << 10  # bytes of shared memory that two stages of both networks' tiles fill


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
    return Tiling(dtype, dtype, depth, 64, 32, 2, 4 if depth > 64 else 8)


def _sides(depth: int, device: Device, is_small: bool) -> tuple[int, int, int, int]:
    """Return the rows, columns, stages and warps whose sums stay in registers, found by compiling.

    `is_small`: tiles of 128 rows would leave multiprocessors idle.
    """
    is_wide = depth > 128
    if device.generation == 9:  # because warps of one group share a product of 64 rows
        columns = 64 if is_wide else 128
        return (64, columns, 3, 4) if is_small else (128, columns, 3, 8)
    if device.generation == 10:
        return (64, 64, 1, 8) if is_wide else (64, 64, 2, 4)
    if device.nvidia:
        return (64, 64, 2, 8) if is_wide else (64, 64, 2, 4)
    return 64, 32 if is_wide else 64, 1, 4  # because there are 64 KB of shared memory


def tilings_of_two(
    rows: Tensor, tiles: Tiling | None, tiles_t: Tiling | None
) -> tuple[Tiling, Tiling] | None:
    """Return the tilings of student and teacher, whose tiles are on chip at the same time."""
    if tiles is None or tiles_t is None:
        return None
    device = device_of(rows)
    depth = max(tiles.depth, tiles_t.depth)
    if torch.float32 in (tiles.product, tiles_t.product):
        is_tight = depth > 64 and device.shared_bytes < _ROOM_FOR_TWO
        warps = 8 if is_tight or depth <= 64 else 4
        tiles = tiles._replace(rows=64, columns=32, stages=1 if is_tight else 2, warps=warps)
    elif depth <= 128:
        tiles = tiles._replace(rows=min(tiles.rows, 64), columns=min(tiles.columns, 64), warps=4)
    elif device.generation in (9, 10):
        tiles = tiles._replace(rows=128, columns=32, stages=2, warps=8)
    else:
        tiles = tiles._replace(rows=64, columns=32, stages=1, warps=4)
    return tiles, tiles_t._replace(rows=tiles.rows, columns=tiles.columns)


def _may_be_rounded(nvidia: bool) -> bool:
    """Return whether the user allows matmuls of float32 to use TF32."""
    matmul = torch.backends.cuda.matmul
    if not (nvidia or INTERPRETED):
        return False
    if hasattr(matmul, "fp32_precision"):  # because reading the older name may then be an error
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


class Embeddings(NamedTuple):
    """Queries, or keys: `matrix` times `factors` are the rows, divided by their lengths."""

    rows: Tensor  # [n, D]
    lengths: Tensor | None  # [n, 1]
    matrix: Tensor  # [n_padded, depth]
    factors: Tensor | None  # [n_padded]

    @property
    def side(self) -> Side:
        """Return the pointers that the kernels read."""
        return Side(self.matrix, self.factors)

    def head(self, n: int) -> Embeddings:
        """Return the first n rows."""
        if n == len(self.rows):
            return self
        # the last tile may hold rows of others, whose results are not read
        n_padded = _padded(n)
        lengths = None if self.lengths is None else self.lengths[:n]
        factors = None if self.factors is None else self.factors[:n_padded]
        return Embeddings(self.rows[:n], lengths, self.matrix[:n_padded], factors)

    def pad(self, numbers: Tensor, value: float = 0.0) -> Tensor:
        """Return a number for each row of the matrix, `value` after the given ones."""
        padded = numbers.new_full((len(self.matrix),), value)
        padded[: len(numbers)] = numbers
        return padded

    def gradient(self, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient in the rows, and for each row x_i its ⟨x_i, Σ_j G_ij y_j⟩.

        values: [n_padded, depth], Σ_j G_ij y_j. The sum of these products is the gradient in scale.
        """
        values = values[: len(self.rows), : self.rows.shape[1]]
        if self.lengths is None:
            return values * scale, torch.linalg.vecdot(self.rows, values)
        units = self.rows / self.lengths
        along = torch.linalg.vecdot(units, values)
        gradient = torch.addcmul(values, units, along[:, None], value=-1)
        return gradient.mul_(scale / divisors(self.lengths)), along


def embeddings(rows: Tensor, normalize: bool, half: str, tiles: Tiling) -> Embeddings:
    """Return rows [n, D] in the precision of the products, zeros up to whole tiles."""
    n, width = rows.shape
    matrix = rows.new_zeros((_padded(n), tiles.depth), dtype=tiles.product)
    lengths = None
    if normalize:
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=SHORTEST)
    if lengths is None or tiles.product == tiles.dtype:  # copying rounds nothing
        matrix[:n, :width] = rows if lengths is None else rows / lengths
        return Embeddings(rows, lengths, matrix, None)
    factors = rows.new_zeros(len(matrix))
    matrix[:n, :width], factors[:n] = in_half(rows, lengths, half)
    return Embeddings(rows, lengths, matrix, factors)


def _padded(n: int) -> int:
    return triton.cdiv(n, ALIGNMENT) * ALIGNMENT


def splits_of(x: Embeddings, y: Embeddings, tiles: Tiling) -> tuple[int, int]:
    """Return how many programs split the columns of a tile of rows, and the columns of each.

    The programs are as many as fill the device; each has whole tiles.
    """
    n_blocks = len(x.matrix) // tiles.rows
    n_tiles = triton.cdiv(len(y.rows), tiles.columns)
    n_splits = max(1, min(device_of(x.rows).multiprocessors // n_blocks, n_tiles))
    return n_splits, triton.cdiv(n_tiles, n_splits) * tiles.columns


def sum_of_splits(values: Tensor) -> Tensor:
    """Return [n_padded, depth] from the [n_splits, n_padded, depth] of the programs."""
    return values.sum(0) if len(values) > 1 else values[0]


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
