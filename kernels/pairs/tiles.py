"""Tiles of a matrix of similarities, which is never stored: S = scale · f_i g_j ⟨x_i, y_j⟩.

S comes in units of log2, so that exp2 gives exp S. Matrices have DEPTH columns and whole tiles of
rows, zeros where there are no embeddings: no load has a mask. A program that owns a block of rows
of x walks over the tiles of y: first over those without a masked pair, then over those that the
masked diagonal crosses, or with an edge. It reads 2 bytes of y per element of a tile in half
precision, mostly from the L2 cache, for 2 · ROWS FLOPs with each.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.tiles import INFINITY, LOG2E

# finite, since it stands for a maximum of no numbers, and −inf − (−inf) would be NaN
LOWEST = tl.constexpr(-3.0e38)


class Tile(NamedTuple):
    """The constants of a tile; each is a tl.constexpr.

    Tuples with constants are made where they are passed on, because Triton makes tensors of the
    constants where a tuple is assigned to a name.
    """

    ROWS: Any
    COLUMNS: Any
    DEPTH: Any  # features
    PRECISION: Any  # of products of float32: "tf32" or "ieee"
    DTYPE: Any  # of sums


class Side(NamedTuple):
    """Queries or keys in memory, times a factor for each row if there are factors."""

    ptr: Any  # [n_padded, DEPTH]
    factors_ptr: Any  # [n_padded], or None


class Similarities(NamedTuple):
    """The similarities of rows x and columns y, in memory."""

    x: Side
    y: Side
    scale_ptr: Any  # 0-dim


class Block(NamedTuple):
    """The rows of x that a program owns, in registers."""

    x: Any  # [ROWS, DEPTH]
    scales: Any  # [ROWS], scale · f_i


class Mask(NamedTuple):
    """The masked pairs of a tile: those outside of [n, m], and those on a diagonal."""

    n: Any
    m: Any
    diagonal: Any  # pairs (i, i + diagonal), of one example, are masked; None: no such pairs
    EDGES: Any  # whether rows from n on are masked too; what they add up to is not read otherwise


@triton.jit
def row_pointers(ptr, row, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Return pointers to ROWS rows of DEPTH elements from `row` on."""
    places = tl.arange(0, ROWS)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    return ptr + row.to(tl.int64) * DEPTH + places


@triton.jit
def load_block(similarities, row, TILE):
    """Load the rows of x from `row` on, and their scales in units of log2."""
    x = tl.load(row_pointers(similarities.x.ptr, row, TILE.ROWS, TILE.DEPTH))
    scale = tl.load(similarities.scale_ptr).to(TILE.DTYPE) * LOG2E
    if similarities.x.factors_ptr is not None:
        scales = tl.load(similarities.x.factors_ptr + row + tl.arange(0, TILE.ROWS)) * scale
    else:
        scales = tl.full([TILE.ROWS], 1.0, TILE.DTYPE) * scale
    return Block(x, scales)


@triton.jit
def load_tile(similarities, block, column, TILE):
    """Return a tile of y, [COLUMNS, DEPTH], and of S, [ROWS, COLUMNS]."""
    y = tl.load(row_pointers(similarities.y.ptr, column, TILE.COLUMNS, TILE.DEPTH))
    s = tl.dot(block.x, tl.trans(y), input_precision=TILE.PRECISION, out_dtype=TILE.DTYPE)
    if similarities.y.factors_ptr is not None:
        s *= tl.load(similarities.y.factors_ptr + column + tl.arange(0, TILE.COLUMNS))[None, :]
    return y, s * block.scales[:, None]


@triton.jit
def load_transposed(similarities, block, column, TILE):
    """Return a tile of Sᵀ, [COLUMNS, ROWS]."""
    y = tl.load(row_pointers(similarities.y.ptr, column, TILE.COLUMNS, TILE.DEPTH))
    s = tl.dot(y, tl.trans(block.x), input_precision=TILE.PRECISION, out_dtype=TILE.DTYPE)
    if similarities.y.factors_ptr is not None:
        s *= tl.load(similarities.y.factors_ptr + column + tl.arange(0, TILE.COLUMNS))[:, None]
    return s * block.scales[None, :]


@triton.jit
def lift(weights, LIKE: tl.constexpr):
    """Return 4096 times the weights of float16 rows, because small ones would vanish in float16."""
    return weights * 4096.0 if LIKE == tl.float16 else weights


@triton.jit
def add_weighted(total, weights, y, side, column, TILE):
    """Return total + Σ_j weights_ij g_j y_j, [ROWS, DEPTH]."""
    if side.factors_ptr is not None:
        weights *= tl.load(side.factors_ptr + column + tl.arange(0, TILE.COLUMNS))[None, :]
    return tl.dot(
        weights.to(y.dtype), y, total, input_precision=TILE.PRECISION, out_dtype=TILE.DTYPE
    )


@triton.jit
def partners(rows, n_queries, first, TWO_VIEWS: tl.constexpr, OF_KEYS: tl.constexpr):
    """Return the positive partners of queries among the keys or, OF_KEYS, of keys among queries.

    Of each pair come the query's number, the partner's, and whether there is one. Query i and key
    first + i are of one example; with TWO_VIEWS the key of its other view is the partner.
    """
    query = rows - first if OF_KEYS else rows
    exist = (query >= 0) & (query < n_queries)
    partner = query
    if TWO_VIEWS:
        half = n_queries // 2
        partner = tl.where(query < half, query + half, query - half)
    if OF_KEYS:
        query = partner
    else:
        partner += first
    return query, partner, exist


@triton.jit
def other_views(rows, n, m, diagonal, OF_KEYS: tl.constexpr):
    """Return the column of the other view of each row's example, or −1."""
    if OF_KEYS:
        _, column, exist = partners(rows, m, -diagonal, True, True)
    else:
        _, column, exist = partners(rows, n, diagonal, True, False)
    return tl.where(exist, column, -1)


@triton.jit
def mask_other_view(s, other_view, column, TILE):
    """Return S with −inf for the pairs of a row and the other view of its example.

    other_view: [ROWS], columns.
    """
    columns = column + tl.arange(0, TILE.COLUMNS)[None, :]
    return tl.where(other_view[:, None] == columns, -INFINITY, s)


@triton.jit
def same_class(s, classes, classes_ptr, column, MASKED: tl.constexpr, TILE):
    """Return which pairs of a tile are of one class and not masked.

    classes: [ROWS]; classes_ptr: [m_padded].
    """
    of_columns = tl.load(classes_ptr + column + tl.arange(0, TILE.COLUMNS))
    same = classes[:, None] == of_columns[None, :]
    if MASKED:
        same &= s != -INFINITY
    return same


@triton.jit
def masked(s, row, column, mask, TILE):
    """Return S with −inf for masked pairs."""
    rows, columns = row + tl.arange(0, TILE.ROWS), column + tl.arange(0, TILE.COLUMNS)
    return _masked(s, rows[:, None], columns[None, :], mask)


@triton.jit
def masked_transposed(s, row, column, mask, TILE):
    """Return Sᵀ with −inf for masked pairs."""
    rows, columns = row + tl.arange(0, TILE.ROWS), column + tl.arange(0, TILE.COLUMNS)
    return _masked(s, rows[None, :], columns[:, None], mask)


@triton.jit
def _masked(s, rows, columns, mask):
    s = tl.where(columns < mask.m, s, -INFINITY)
    if mask.EDGES:
        s = tl.where(rows < mask.n, s, -INFINITY)
    if mask.diagonal is not None:
        s = tl.where(rows + mask.diagonal == columns, -INFINITY, s)
    return s


@triton.jit
def split_tiles(row, low, high, mask, TILE):
    """Split the whole tiles of columns [low, high) into unmasked, masked and unmasked ones.

    Return the first tile, the first masked one, the number of masked ones, and the end.
    """
    first, end = low // TILE.COLUMNS, tl.maximum(low, high) // TILE.COLUMNS
    start, stop = end, end
    if mask.diagonal is not None:
        start = tl.maximum(row + mask.diagonal, 0) // TILE.COLUMNS
        stop = tl.maximum(row + mask.diagonal + TILE.ROWS, 0) + TILE.COLUMNS - 1
        stop = stop // TILE.COLUMNS
        start = tl.minimum(tl.maximum(start, first), end)
        stop = tl.minimum(tl.maximum(stop, start), end)
    if mask.EDGES:
        is_whole = row + TILE.ROWS <= mask.n
        start, stop = tl.where(is_whole, start, first), tl.where(is_whole, stop, end)
    return first, start, stop - start, end


@triton.jit
def fold_tiles(state, operands, row, low, high, mask, FOLD: tl.constexpr, TILE):
    """Return the state after FOLD took every tile of the columns [low, high).

    FOLD(state, operands, row, column, mask, MASKED, TILE) returns the next state. Masked tiles have
    a loop of their own, so that the loop over all others compares no places.
    """
    first, first_masked, n_masked, end = split_tiles(row, low, high, mask, TILE)
    for k in range(first, end - n_masked):
        column = tl.where(k < first_masked, k, k + n_masked) * TILE.COLUMNS
        state = FOLD(state, operands, row, column, mask, False, TILE)
    for k in range(n_masked + (high > end * TILE.COLUMNS)):
        column = tl.where(k < n_masked, first_masked + k, end) * TILE.COLUMNS
        state = FOLD(state, operands, row, column, mask, True, TILE)
    return state


@triton.jit
def columns_of_split(split, per_split, m):
    """Return the columns [low, high) of a program that shares a tile of rows with others."""
    return split * per_split, tl.minimum(split * per_split + per_split, m)


@triton.jit
def store_values(values_ptr, values, split, n_padded, row, TILE):
    """Store [ROWS, DEPTH] in [n_splits, n_padded, DEPTH]."""
    values_ptr += split.to(tl.int64) * n_padded * TILE.DEPTH
    tl.store(row_pointers(values_ptr, row, TILE.ROWS, TILE.DEPTH), values)
