"""Tiles of a matrix of similarities, which is never stored: S = scale · f_i g_j ⟨x_i, y_j⟩.

S comes in units of log2, so that exp2 gives exp S. Matrices have DEPTH columns and whole tiles of
rows, zeros where there are no embeddings: no load has a mask. A program that owns a block of rows
of x walks over the tiles of y: first over those without a masked pair, then over those that a
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


class Views(NamedTuple):
    """Two views of each example, of which queries i and i + half are made."""

    half: Any
    offset: Any  # row r is that of query r + offset, if there is one


class Mask(NamedTuple):
    """The masked pairs of a tile: those outside of [n, m], and those on diagonals."""

    n: Any
    m: Any
    diagonal: Any  # pairs (i, i + diagonal), of one example, are masked; None: no such pairs
    views: Any  # Views: pairs of the two views of an example are masked too; or None
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
def two_views(n, m, diagonal, OF_KEYS: tl.constexpr):
    """Return the Views of queries, which are the rows or, OF_KEYS, the columns."""
    if OF_KEYS:
        return Views(m // 2, diagonal)
    return Views(n // 2, tl.zeros([], tl.int32))


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
    if mask.views is not None:
        query, half = rows + mask.views.offset, mask.views.half
        other = rows + mask.diagonal + tl.where(query < half, half, -half)
        exists = (query >= 0) & (query < 2 * half)
        s = tl.where(exists & (other == columns), -INFINITY, s)
    return s


class _Parts(NamedTuple):
    """Tiles of columns: all of [first, end) that are whole, of which two parts are masked."""

    first: Any
    end: Any
    masked: Any  # the first tile of the first masked part
    n_masked: Any
    other: Any  # and of the second, which comes after it
    n_other: Any


@triton.jit
def _crossed(column, first, end, TILE):
    """Return the tiles [start, stop) of [first, end) that meet ROWS columns from `column` on."""
    start = tl.maximum(column, 0) // TILE.COLUMNS
    stop = (tl.maximum(column + TILE.ROWS, 0) + TILE.COLUMNS - 1) // TILE.COLUMNS
    start = tl.minimum(tl.maximum(start, first), end)
    return start, tl.minimum(tl.maximum(stop, start), end)


@triton.jit
def split_tiles(row, low, high, mask, TILE):
    """Return the parts of the whole tiles of columns [low, high)."""
    first, end = low // TILE.COLUMNS, tl.maximum(low, high) // TILE.COLUMNS
    start, stop = end, end
    if mask.diagonal is not None:
        start, stop = _crossed(row + mask.diagonal, first, end, TILE)
    if mask.EDGES:
        is_whole = row + TILE.ROWS <= mask.n
        start, stop = tl.where(is_whole, start, first), tl.where(is_whole, stop, end)
    other, other_stop = stop, stop
    if mask.views is not None:
        query, half = row + mask.views.offset, mask.views.half
        column = row + mask.diagonal + tl.where(query < half, half, -half)
        other, other_stop = _crossed(column, first, end, TILE)
        # rows of both views have their other views in two places: all tiles are masked
        is_one = (query >= half) | (query + TILE.ROWS <= half)
        other, other_stop = tl.where(is_one, other, first), tl.where(is_one, other_stop, end)
        is_first, begin, until = other < start, start, stop
        start, stop = tl.where(is_first, other, start), tl.where(is_first, other_stop, stop)
        other = tl.maximum(tl.where(is_first, begin, other), stop)
        other_stop = tl.maximum(tl.where(is_first, until, other_stop), other)
    return _Parts(first, end, start, stop - start, other, other_stop - other)


@triton.jit
def fold_tiles(state, operands, row, low, high, mask, FOLD: tl.constexpr, TILE):
    """Return the state after FOLD took every tile of the columns [low, high).

    FOLD(state, operands, row, column, mask, MASKED, TILE) returns the next state. Masked tiles have
    a loop of their own, so that the loop over all others compares no places.
    """
    parts = split_tiles(row, low, high, mask, TILE)
    n_masked = parts.n_masked + parts.n_other
    for k in range(parts.first, parts.end - n_masked):
        tile = tl.where(k < parts.masked, k, k + parts.n_masked)
        if mask.views is not None:
            tile = tl.where(tile < parts.other, tile, tile + parts.n_other)
        state = FOLD(state, operands, row, tile * TILE.COLUMNS, mask, False, TILE)
    for k in range(n_masked + (high > parts.end * TILE.COLUMNS)):
        tile = parts.masked + k
        if mask.views is not None:
            tile = tl.where(k < parts.n_masked, tile, parts.other + k - parts.n_masked)
        tile = tl.where(k < n_masked, tile, parts.end)
        state = FOLD(state, operands, row, tile * TILE.COLUMNS, mask, True, TILE)
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
