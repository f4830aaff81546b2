"""Tiles of a matrix of similarities, which is never stored: S = scale · f_i g_j ⟨x_i, y_j⟩.

S comes in units of log2. Matrices have DEPTH columns and rows for whole tiles, zeros where there is
nothing: no load has a mask. A program that owns rows of x walks over the tiles of y: first over
those where all pairs count, then over those with own pairs, which are left out, or with an edge.
"""

import triton
import triton.language as tl

from fastkd.kernels._tiles import INFINITY, LOG2E

LOWEST = tl.constexpr(-3.0e38)  # of a maximum of nothing: −inf − −inf would be no number


@triton.jit
def rows_of(pointer, first, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """ROWS rows from `first` on."""
    places = tl.arange(0, ROWS)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    return pointer + first.to(tl.int64) * DEPTH + places


@triton.jit
def scales_of(
    scale_ptr, factors_ptr, first,
    FACTORS: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """scale · f of ROWS rows, in units of log2."""
    scale = tl.load(scale_ptr).to(DTYPE) * LOG2E
    if FACTORS:
        return tl.load(factors_ptr + first + tl.arange(0, ROWS)) * scale
    return tl.full([ROWS], 1.0, DTYPE) * scale


@triton.jit
def similarities(
    x, scales, y_ptr, factors_ptr, column, FACTORS: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of y, and of S."""
    y = tl.load(rows_of(y_ptr, column, COLUMNS, DEPTH))
    s = tl.dot(x, tl.trans(y), input_precision=PRECISION, out_dtype=DTYPE)
    if FACTORS:
        s *= tl.load(factors_ptr + column + tl.arange(0, COLUMNS))[None, :]
    return y, s * scales[:, None]


@triton.jit
def lifted(weights, LIKE: tl.constexpr):
    """Of float16 what is small shall not vanish: 4096 times as much of it."""
    return weights * 4096.0 if LIKE == tl.float16 else weights


@triton.jit
def weighed(
    total, weights, y, factors_ptr, column,
    FACTORS: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """total + Σ_j weights_ij g_j y_j."""
    if FACTORS:
        weights *= tl.load(factors_ptr + column + tl.arange(0, COLUMNS))[None, :]
    return tl.dot(weights.to(y.dtype), y, total, input_precision=PRECISION, out_dtype=DTYPE)


@triton.jit
def other_views_out(s, others, column, COLUMNS: tl.constexpr):
    """−∞ for the pairs of a row and the other view of its example."""
    return tl.where(others[:, None] == column + tl.arange(0, COLUMNS)[None, :], -INFINITY, s)


@triton.jit
def alike(s, classes, classes_ptr, column, MASKED: tl.constexpr, COLUMNS: tl.constexpr):
    """Pairs of one class in a tile, but for those that are left out."""
    of_columns = tl.load(classes_ptr + column + tl.arange(0, COLUMNS))
    same = classes[:, None] == of_columns[None, :]
    if MASKED:
        same &= s != -INFINITY
    return same


@triton.jit
def left_out(
    s, row, column, n, m, own, EDGES: tl.constexpr, OWN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """−∞ in a tile for columns that do not exist, with EDGES rows too, and for own pairs.

    `own`: how much further the own column is than the row.
    """
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    s = tl.where((columns < m)[None, :], s, -INFINITY)
    if EDGES:
        s = tl.where((rows < n)[:, None], s, -INFINITY)
    if OWN:
        s = tl.where(rows[:, None] + own == columns[None, :], -INFINITY, s)
    return s


@triton.jit
def tiles_of(
    row, low, high, n, own, EDGES: tl.constexpr, OWN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of the whole tiles among the columns from low to high, the first, the first that needs a look
    at each pair, how many do, and the first after all of them. EDGES: rows that do not exist count.
    """
    first, end = low // COLUMNS, tl.maximum(low, high) // COLUMNS
    start, stop = end, end
    if OWN:
        start = tl.maximum(row + own, 0) // COLUMNS
        stop = (tl.maximum(row + own + ROWS, 0) + COLUMNS - 1) // COLUMNS
        start = tl.minimum(tl.maximum(start, first), end)
        stop = tl.minimum(tl.maximum(stop, start), end)
    if EDGES:
        is_whole = row + ROWS <= n
        start, stop = tl.where(is_whole, start, first), tl.where(is_whole, stop, end)
    return first, start, stop - start, end
