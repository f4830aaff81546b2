"""The log-sum-exps of rows and of columns from one sweep over the tiles of S.

With c_j the maximum of column j in a block of rows, and C the largest of these,

    Σ_i exp(S_ij − c_j)   and   Σ_j exp(S_ij − c_j) exp(c_j − C)

take one exponential of each pair. Each block leaves the first sums and their maxima in memory, 8
bytes for each of its columns: 8 M N / ROWS in all, 64 MiB for N = M = 32768. Nothing is read again
but to merge the blocks.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.pairs.sweeps import ColumnSums, SumOperands, add_exponentials, no_sums
from fastkd.kernels.pairs.tiles import (
    LOWEST,
    Mask,
    columns_of_split,
    fold_tiles,
    load_block,
    load_transposed,
    masked_transposed,
)

# a row's sum relative to the largest exponential of its block: what float32 flushes to 0 of that,
# 2^-126 each, is below the rounding of such a sum
SMALLEST_TOTAL = tl.constexpr(2.0**-80)


class _BothSums(NamedTuple):
    """Sums of rows, in parts: part k has the columns in place k of their tiles."""

    largest: Any  # [COLUMNS], the maximum of S over all rows of the block, by parts
    total: Any  # [COLUMNS, ROWS], Σ_j exp2(S_ij − largest_k)


class _BothOperands(NamedTuple):
    similarities: Any
    block: Any
    columns: Any  # this block's part of `ColumnSums`
    n_columns: Any


@triton.jit
def _add_to_both(sums, operands, row, column, mask, MASKED: tl.constexpr, TILE):
    """Store the sums of the columns of a tile, and add its exponentials to those of the rows.

    The tile is transposed, because a thread then has whole columns but for a few others', and no
    thread needs another one's share of a row before all tiles are done.
    """
    s = load_transposed(operands.similarities, operands.block, column, TILE)
    if MASKED:
        s = masked_transposed(s, row, column, mask, TILE)
    largest = tl.maximum(tl.max(s, 1), LOWEST)
    e = tl.exp2(s - largest[:, None])
    places = column + tl.arange(0, TILE.COLUMNS)
    exist = places < operands.n_columns
    tl.store(operands.columns.largest_ptr + places, largest, mask=exist)
    tl.store(operands.columns.total_ptr + places, tl.sum(e, 1), mask=exist)
    risen = tl.maximum(sums.largest, largest)
    shrunk, weights = tl.exp2(sums.largest - risen), tl.exp2(largest - risen)
    return _BothSums(risen, sums.total * shrunk[:, None] + e * weights[:, None])


@triton.jit(do_not_specialize=["n", "m", "per_split", "n_columns", "diagonal"])
def row_and_column_log_sums(
    similarities,
    log_sums_ptr,  # [n_splits, n_padded]
    columns,  # ColumnSums
    n,
    n_padded,
    m,
    per_split,
    n_columns,
    diagonal,
    TILE,
):
    """Compute log2 Σ_j exp2 S_ij, and the sums of the first n_columns columns over each block.

    One exponential of each pair serves both: relative to the maximum of its column in the block,
    times that one's share of the block's. In a row that lies far below the others of its block
    all may be 0. The program that finds one computes its rows anew, as `log_sums` does.
    """
    row, split = tl.program_id(0) * TILE.ROWS, tl.program_id(1)
    low, high = columns_of_split(split, per_split, m)
    block = load_block(similarities, row, TILE)
    place = tl.program_id(0).to(tl.int64) * n_columns
    of_block = ColumnSums(columns.largest_ptr + place, columns.total_ptr + place)
    both = fold_tiles(
        _BothSums(
            tl.full([TILE.COLUMNS], LOWEST, TILE.DTYPE),
            tl.zeros([TILE.COLUMNS, TILE.ROWS], TILE.DTYPE),
        ),
        _BothOperands(similarities, block, of_block, n_columns),
        row, low, high, Mask(n, m, diagonal, None, True), _add_to_both, TILE,
    )  # fmt: skip
    rows = row + tl.arange(0, TILE.ROWS)
    largest = tl.max(both.largest, 0)
    total = tl.sum(both.total * tl.exp2(both.largest - largest)[:, None], 0)
    log_sums = largest + tl.log2(total)
    if tl.min(tl.where(rows < n, total, 1.0)) < SMALLEST_TOTAL:
        sums = fold_tiles(
            no_sums(TILE), SumOperands(similarities, block, None, None, False),
            row, low, high, Mask(n, m, diagonal, None, False), add_exponentials, TILE,
        )  # fmt: skip
        log_sums = sums.largest + tl.log2(sums.total)
    tl.store(log_sums_ptr + split * n_padded + rows, log_sums)


@triton.jit(do_not_specialize=["n_blocks", "n_columns"])
def column_log_sums(
    columns,  # ColumnSums
    log_sums_ptr,  # [n_columns]
    n_blocks,
    n_columns,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute log2 Σ_i exp2 S_ij from the sums over blocks of rows; program (COLUMNS columns)."""
    places = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = log_sums_ptr.dtype.element_ty
    largest, total = tl.full([COLUMNS], LOWEST, dtype), tl.zeros([COLUMNS], dtype)
    for first in range(0, n_blocks, BLOCKS):
        blocks = (first + tl.arange(0, BLOCKS)).to(tl.int64)[:, None]
        exist = (blocks < n_blocks) & (places < n_columns)[None, :]
        offsets = blocks * n_columns + places[None, :]
        of_blocks = tl.load(columns.largest_ptr + offsets, mask=exist, other=LOWEST)
        totals = tl.load(columns.total_ptr + offsets, mask=exist, other=0.0)
        risen = tl.maximum(largest, tl.max(of_blocks, 0))
        shrunk = total * tl.exp2(largest - risen)
        total = shrunk + tl.sum(totals * tl.exp2(of_blocks - risen[None, :]), 0)
        largest = risen
    tl.store(log_sums_ptr + places, largest + tl.log2(total), mask=places < n_columns)
