"""Sweeps over a chunk of rows of S whose products are in memory, for `Pairs` and `SoftPairs`.

S is the products or, with factors, scale · f_i g_j · products. Every kernel masks what does not
exist, the pairs of one example and, with two views, those with the other view: their slopes are 0.
Blocks without a masked pair compare no places.

Slopes G replace the products or, with factors, go in half precision to memory of their own as
H = lift · f_i g_j G. It serves both gradients, because Σ_j G_ij g_j k_j = Σ_j H_ij k_j / (lift f_i)
and the same of columns. A sweep reads 4 bytes per element of S; what stores slopes writes 4 or,
with factors, 2.

Threads add up what they read themselves: BLOCK = TURNS · LANES columns of a row are read as TURNS
vectors of LANES, and TURNS rows of LANES columns where columns are added up.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.pairs.sweeps import softplus
from fastkd.kernels.pairs.tiles import LOWEST
from fastkd.kernels.tiles import INFINITY, LOG2E

# What varies with N and M is passed by itself, because members of a tuple are always specialised.


class Products(NamedTuple):
    """A chunk of products, and what makes S of them."""

    ptr: Any  # [n_rows, stride]
    stride: Any  # of rows: a multiple of the longest vector, at least m
    factors: Any  # Factors, or None if the products are S
    DTYPE: Any


class Factors(NamedTuple):
    """The factors of embeddings in half precision."""

    row_ptr: Any  # f, [n_rows]
    column_ptr: Any  # g, [stride]
    scale_ptr: Any  # 0-dim


class SlopesOut(NamedTuple):
    """Memory for H if there are factors; without factors slopes replace the products."""

    ptr: Any  # [n_rows, stride]
    lift_ptr: Any  # 0-dim


class LogSums(NamedTuple):
    """Log-sum-exps and the slopes of the loss in them, of rows or of columns."""

    log_sums_ptr: Any
    slopes_ptr: Any


@triton.jit
def _exp(x):
    """Return exp x as a power of 2, which needs fewer instructions.

    Differences are brought to units of log2, because a rounded factor of all S would add up.
    """
    return tl.exp2(x * LOG2E)


@triton.jit
def _columns_of_split(m, n_blocks, BLOCK: tl.constexpr):
    """Return the columns [low, high) of this program, which shares a row with others."""
    low = tl.program_id(1) * n_blocks * BLOCK
    return low, tl.minimum(low + n_blocks * BLOCK, m)


@triton.jit
def _block_of_row(TURNS: tl.constexpr, LANES: tl.constexpr):
    """Return the places of a block of columns of this program's row, [TURNS, LANES]."""
    return tl.arange(0, TURNS)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _row_factors(products, rows, n_rows):
    """Return f of these rows, and with the scale; without factors anything."""
    if products.factors is not None:
        f = tl.load(products.factors.row_ptr + rows, mask=rows < n_rows, other=0.0)
        scaled = f * tl.load(products.factors.scale_ptr)
    else:
        f, scaled = rows, rows
    return f, scaled


@triton.jit
def _column_factors(products, columns):
    """Return g of these columns; without factors anything."""
    if products.factors is not None:
        in_memory = columns < products.stride
        g = tl.load(products.factors.column_ptr + columns, mask=in_memory, other=0.0)
    else:
        g = columns
    return g


@triton.jit
def _may_be_masked(
    row, column, n_rows, m, first, start, n,
    DIAGONAL: tl.constexpr, TWO_VIEWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return whether a pair of these ROWS and COLUMNS may be masked."""
    found = (row + ROWS > n_rows) | (column + COLUMNS > m)
    own = first + start + row - column  # the place of the first row's own key
    if DIAGONAL:
        found |= (own > -ROWS) & (own < COLUMNS)
    if TWO_VIEWS:
        after, before = own + n // 2, own - n // 2
        found |= (after > -ROWS) & (after < COLUMNS)
        found |= (before > -ROWS) & (before < COLUMNS)
    return found


@triton.jit
def _load_similarities(
    products, scaled, g, rows, columns, may_be_masked, n_rows, m, first, start, n,
    DIAGONAL: tl.constexpr, TWO_VIEWS: tl.constexpr,
):  # fmt: skip
    """Return S of rows and columns of the chunk that broadcast, −inf where it is masked.

    The chunk begins with row `start` of all n; the key of query i's own example is first + i.
    """
    in_memory = (rows < n_rows) & (columns < products.stride)
    places = products.ptr + rows.to(tl.int64) * products.stride + columns
    s = tl.load(places, mask=in_memory, other=0.0)
    if products.factors is not None:
        s *= scaled * g
    if may_be_masked:
        exist = (rows < n_rows) & (columns < m)
        query = start + rows
        if DIAGONAL:
            exist &= first + query != columns
        if TWO_VIEWS:
            exist &= first + tl.where(query < n // 2, query + n // 2, query - n // 2) != columns
        s = tl.where(exist, s, -INFINITY)
    return s


@triton.jit
def _store_slopes(slopes, f, g, products, out, row, columns):
    """Store slopes of a row; in columns that do not exist anything may be written."""
    stride = products.stride
    places = row.to(tl.int64) * stride + columns
    if products.factors is not None:
        slopes = slopes * (f * tl.load(out.lift_ptr)) * g
        slopes = slopes.to(out.ptr.dtype.element_ty)
        tl.store(out.ptr + places, slopes, mask=columns < stride)
    else:
        tl.store(products.ptr + places, slopes, mask=columns < stride)


@triton.jit(do_not_specialize=["n_rows", "m", "first", "start", "n", "n_blocks"])
def log_sums_of_chunk(
    products, log_sums_ptr, n_rows, m, first, start, n, n_blocks,
    DIAGONAL: tl.constexpr, TWO_VIEWS: tl.constexpr, TURNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute log Σ_j exp S_ij; program (row, split of the columns).

    log_sums: [n_splits, n_rows].
    """
    DTYPE: tl.constexpr = products.DTYPE
    BLOCK: tl.constexpr = TURNS * LANES
    row = tl.program_id(0)
    rows, block = row + tl.zeros([1, 1], tl.int32), _block_of_row(TURNS, LANES)
    low, high = _columns_of_split(m, n_blocks, BLOCK)
    _, scaled = _row_factors(products, rows, n_rows)
    largest, total = tl.full([LANES], LOWEST, DTYPE), tl.zeros([LANES], DTYPE)
    for column in range(low, high, BLOCK):
        g = _column_factors(products, column + block)
        masks = _may_be_masked(
            row, column, n_rows, m, first, start, n, DIAGONAL, TWO_VIEWS, 1, BLOCK
        )
        s = _load_similarities(
            products, scaled, g, rows, column + block, masks, n_rows, m, first, start, n,
            DIAGONAL, TWO_VIEWS,
        )  # fmt: skip
        risen = tl.maximum(largest, tl.max(s, 0))
        total = total * _exp(largest - risen) + tl.sum(_exp(s - risen[None, :]), 0)
        largest = risen
    most = tl.max(largest, 0)
    total = tl.sum(total * _exp(largest - most), 0)
    tl.store(log_sums_ptr + tl.program_id(1) * n_rows + row, most + tl.log(total))


@triton.jit(do_not_specialize=["n_rows", "m", "n_columns", "first", "start", "n", "per_split"])
def fold_chunk(
    products, sums_ptr, n_rows, m, n_columns, first, start, n, per_split,
    DIAGONAL: tl.constexpr, TWO_VIEWS: tl.constexpr, TURNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add this chunk to Σ_i exp(S_ij − largest_j); program (LANES columns, split of the rows).

    sums: [n_splits, 2, n_columns], of the first columns largest_j and the sum.
    """
    column, low = tl.program_id(0) * LANES, tl.program_id(1) * per_split
    lanes = column + tl.arange(0, LANES)
    sums_ptr += tl.program_id(1) * 2 * n_columns + lanes
    exist = lanes < n_columns
    largest = tl.load(sums_ptr, mask=exist, other=LOWEST)
    total = tl.load(sums_ptr + n_columns, mask=exist, other=0.0)
    g = _column_factors(products, lanes[None, :])
    for row in range(low, tl.minimum(low + per_split, n_rows), TURNS):
        rows = row + tl.arange(0, TURNS)[:, None]
        _, scaled = _row_factors(products, rows, n_rows)
        masks = _may_be_masked(
            row, column, n_rows, m, first, start, n, DIAGONAL, TWO_VIEWS, TURNS, LANES
        )
        s = _load_similarities(
            products, scaled, g, rows, lanes[None, :], masks, n_rows, m, first, start, n,
            DIAGONAL, TWO_VIEWS,
        )  # fmt: skip
        risen = tl.maximum(largest, tl.max(s, 0))
        total = total * _exp(largest - risen) + tl.sum(_exp(s - risen[None, :]), 0)
        largest = risen
    tl.store(sums_ptr, largest, mask=exist)
    tl.store(sums_ptr + n_columns, total, mask=exist)


@triton.jit(do_not_specialize=["n_rows", "m", "n_columns", "first", "start", "n"])
def exponentials_of_chunk(
    products, of_rows, of_columns, classes, out, n_rows, m, n_columns, first, start, n,
    DIAGONAL: tl.constexpr, TWO_VIEWS: tl.constexpr, TURNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute the slopes G_ij; program (row, block of columns).

    G_ij = u_i exp(S_ij − n_i) + v_j exp(S_ij − c_j), the latter for the first n_columns columns,
    minus attraction_i for each pair of one class.
    of_rows: LogSums n and u, [n_rows]; of_columns: LogSums c and v, [stride], or None; classes:
    Classes of [n_rows] and [stride], or None; out: SlopesOut.
    """
    row, column = tl.program_id(0), tl.program_id(1) * TURNS * LANES
    rows, columns = row + tl.zeros([1, 1], tl.int32), column + _block_of_row(TURNS, LANES)
    f, scaled = _row_factors(products, rows, n_rows)
    g = _column_factors(products, columns)
    masks = _may_be_masked(
        row, column, n_rows, m, first, start, n, DIAGONAL, TWO_VIEWS, 1, TURNS * LANES
    )
    s = _load_similarities(
        products, scaled, g, rows, columns, masks, n_rows, m, first, start, n, DIAGONAL, TWO_VIEWS
    )
    in_memory = columns < products.stride
    row_sum = tl.maximum(tl.load(of_rows.log_sums_ptr + row), LOWEST)
    slopes = tl.load(of_rows.slopes_ptr + row) * _exp(s - row_sum)
    if classes is not None:
        column_classes = tl.load(classes.y_ptr + columns, mask=in_memory, other=0.0)
        same = column_classes == tl.load(classes.x_ptr + row)
        same &= s != -INFINITY  # because masked pairs attract nothing
        slopes -= tl.where(same, tl.load(classes.attractions_ptr + row), 0.0)
    if of_columns is not None:
        column_sums = tl.load(of_columns.log_sums_ptr + columns, mask=in_memory, other=0.0)
        column_sums = tl.maximum(column_sums, LOWEST)
        weights = tl.load(of_columns.slopes_ptr + columns, mask=in_memory, other=0.0)
        slopes += tl.where(columns < n_columns, weights * _exp(s - column_sums), 0.0)
    _store_slopes(slopes, f, g, products, out, row, columns)


@triton.jit(do_not_specialize=["n_rows", "m", "first", "start", "n", "n_blocks"])
def pairs_of_chunk(
    products, positive_logits_ptr, weights_ptr, sums_ptr, out,
    n_rows, m, first, start, n, n_blocks,
    DIAGONAL: tl.constexpr, TWO_VIEWS: tl.constexpr, TURNS: tl.constexpr, LANES: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
):  # fmt: skip
    """Compute Σ_j softplus(S_ij − a_i) and Σ_j of its slopes σ; program (row, split).

    positive_logits: a, [n_rows]; weights: w, [n_rows]; sums: [n_splits, 2, n_rows]; out: SlopesOut
    of G_ij = w_i σ(S_ij − a_i), or None unless NEEDS_GRAD.
    """
    DTYPE: tl.constexpr = products.DTYPE
    BLOCK: tl.constexpr = TURNS * LANES
    row = tl.program_id(0)
    rows, block = row + tl.zeros([1, 1], tl.int32), _block_of_row(TURNS, LANES)
    low, high = _columns_of_split(m, n_blocks, BLOCK)
    positive_logit = tl.load(positive_logits_ptr + row)
    weight = tl.load(weights_ptr + row)
    f, scaled = _row_factors(products, rows, n_rows)
    total, total_slopes = tl.zeros([LANES], DTYPE), tl.zeros([LANES], DTYPE)
    for column in range(low, high, BLOCK):
        columns = column + block
        g = _column_factors(products, columns)
        masks = _may_be_masked(
            row, column, n_rows, m, first, start, n, DIAGONAL, TWO_VIEWS, 1, BLOCK
        )
        s = _load_similarities(
            products, scaled, g, rows, columns, masks, n_rows, m, first, start, n,
            DIAGONAL, TWO_VIEWS,
        )  # fmt: skip
        penalty, slopes = softplus((s - positive_logit) * LOG2E, DTYPE)
        total += tl.sum(penalty, 0)
        total_slopes += tl.sum(slopes, 0)
        if NEEDS_GRAD:
            _store_slopes(weight * slopes, f, g, products, out, row, columns)
    sums_ptr += tl.program_id(1) * 2 * n_rows + row
    tl.store(sums_ptr, tl.sum(total, 0))
    tl.store(sums_ptr + n_rows, tl.sum(total_slopes, 0))


@triton.jit(do_not_specialize=["n_rows", "m", "first", "start", "n", "n_blocks"])
def divergences_of_chunk(
    student, teacher, statistics_ptr, n_rows, m, first, start, n, n_blocks,
    DIAGONAL: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
    TURNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of rows of S and T; program (row, split of the columns).

    student, teacher: Products; statistics: [n_splits, 5, n], as `divergences` has them but in
    units of log.
    """
    DTYPE: tl.constexpr = student.DTYPE
    BLOCK: tl.constexpr = TURNS * LANES
    row = tl.program_id(0)
    rows, block = row + tl.zeros([1, 1], tl.int32), _block_of_row(TURNS, LANES)
    low, high = _columns_of_split(m, n_blocks, BLOCK)
    largest, total = tl.full([LANES], LOWEST, DTYPE), tl.zeros([LANES], DTYPE)
    largest_t, total_t, differences = largest, total, total
    _, scaled = _row_factors(student, rows, n_rows)
    _, scaled_t = _row_factors(teacher, rows, n_rows)
    for column in range(low, high, BLOCK):
        columns = column + block
        masks = _may_be_masked(row, column, n_rows, m, first, start, n, DIAGONAL, False, 1, BLOCK)
        g, g_t = _column_factors(student, columns), _column_factors(teacher, columns)
        s = _load_similarities(
            student, scaled, g, rows, columns, masks, n_rows, m, first, start, n, DIAGONAL, False
        )
        t = _load_similarities(
            teacher, scaled_t, g_t, rows, columns, masks, n_rows, m, first, start, n,
            DIAGONAL, False,
        )  # fmt: skip
        # selected, because where one is −inf the other is too
        difference = tl.where(t == -INFINITY, 0.0, -s if CROSS_ENTROPY else t - s)
        risen = tl.maximum(largest, tl.max(s, 0))
        risen_t = tl.maximum(largest_t, tl.max(t, 0))
        total = total * _exp(largest - risen) + tl.sum(_exp(s - risen[None, :]), 0)
        shrunk_t, e_t = _exp(largest_t - risen_t), _exp(t - risen_t[None, :])
        total_t = total_t * shrunk_t + tl.sum(e_t, 0)
        differences = differences * shrunk_t + tl.sum(e_t * difference, 0)
        largest, largest_t = risen, risen_t
    most, most_t = tl.max(largest, 0), tl.max(largest_t, 0)
    shrunk, shrunk_t = _exp(largest - most), _exp(largest_t - most_t)
    statistics_ptr += tl.program_id(1) * 5 * n + start + row
    tl.store(statistics_ptr, most)
    tl.store(statistics_ptr + n, tl.sum(total * shrunk, 0))
    tl.store(statistics_ptr + 2 * n, most_t)
    tl.store(statistics_ptr + 3 * n, tl.sum(total_t * shrunk_t, 0))
    tl.store(statistics_ptr + 4 * n, tl.sum(differences * shrunk_t, 0))


@triton.jit(do_not_specialize=["n_rows", "m", "first", "start", "n"])
def differences_of_chunk(
    student, teacher, log_sums_ptr, out, n_rows, m, first, start, n,
    DIAGONAL: tl.constexpr, TURNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute the slopes exp(S_ij − n_i) − exp(T_ij − n_t_i); program (row, block of columns).

    student, teacher: Products; log_sums: n and n_t, [2, n_rows]; out: SlopesOut.
    """
    row, column = tl.program_id(0), tl.program_id(1) * TURNS * LANES
    rows, columns = row + tl.zeros([1, 1], tl.int32), column + _block_of_row(TURNS, LANES)
    masks = _may_be_masked(
        row, column, n_rows, m, first, start, n, DIAGONAL, False, 1, TURNS * LANES
    )
    f, scaled = _row_factors(student, rows, n_rows)
    _, scaled_t = _row_factors(teacher, rows, n_rows)
    g, g_t = _column_factors(student, columns), _column_factors(teacher, columns)
    s = _load_similarities(
        student, scaled, g, rows, columns, masks, n_rows, m, first, start, n, DIAGONAL, False
    )
    t = _load_similarities(
        teacher, scaled_t, g_t, rows, columns, masks, n_rows, m, first, start, n, DIAGONAL, False
    )
    slopes = _exp(s - tl.load(log_sums_ptr + row))
    slopes -= _exp(t - tl.load(log_sums_ptr + n_rows + row))
    _store_slopes(slopes, f, g, student, out, row, columns)
