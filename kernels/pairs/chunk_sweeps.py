"""Sweeps over a chunk of rows of S whose products are in memory, for `Pairs` and `SoftPairs`.

S is the products, or with factors scale · f_i g_j · products. Every kernel masks what does not
exist, the pairs of one example and, with two views, those with the other view: their slopes are 0.
Slopes replace the products or, with factors, go in half precision to where the next products read
them, times `lift` and those factors that the next products miss. A sweep reads 4 bytes per element
of S; what stores slopes writes 4, or with factors 2 for the queries and 2 for the keys.
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
    factors: Any  # Factors, or None
    DTYPE: Any


class Factors(NamedTuple):
    """The factors of embeddings in half precision."""

    row_ptr: Any  # f, [n_rows]
    column_ptr: Any  # g, [stride]
    scale_ptr: Any  # 0-dim


class SlopesOut(NamedTuple):
    """Memory for slopes if there are factors; without factors they replace the products."""

    query_ptr: Any  # [n_rows, stride], lift · slope_ij g_j; None: queries are not trained
    key_ptr: Any  # [n_rows, stride], lift · slope_ij f_i; None: keys are not trained
    lift_ptr: Any  # 0-dim


class LogSums(NamedTuple):
    """Log-sum-exps and the slopes of the loss in them, of rows or of columns."""

    log_sums_ptr: Any
    slopes_ptr: Any


@triton.jit
def _places(pointer, rows, columns, stride):
    return pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]


@triton.jit
def _columns_of_split(m, n_blocks, COLUMNS: tl.constexpr):
    """Return the columns [low, high) of this program, which shares a row with others."""
    low = tl.program_id(1) * n_blocks * COLUMNS
    return low, tl.minimum(low + n_blocks * COLUMNS, m)


@triton.jit
def _load_similarities(
    products, rows, columns, n_rows, m, first, start, n,
    DIAGONAL: tl.constexpr, TWO_VIEWS: tl.constexpr,
):  # fmt: skip
    """Return S of these rows of the chunk, −inf where it is masked.

    The chunk begins with row `start` of all n; the key of query i's own example is first + i.
    """
    stride = products.stride
    in_memory = (rows < n_rows)[:, None] & (columns < stride)[None, :]
    s = tl.load(_places(products.ptr, rows, columns, stride), mask=in_memory, other=0.0)
    if products.factors is not None:
        f = tl.load(products.factors.row_ptr + rows, mask=rows < n_rows, other=0.0)
        f *= tl.load(products.factors.scale_ptr)
        g = tl.load(products.factors.column_ptr + columns, mask=columns < stride, other=0.0)
        s *= f[:, None] * g[None, :]
    exist = (rows < n_rows)[:, None] & (columns < m)[None, :]
    query = start + rows
    if DIAGONAL:
        exist &= (first + query)[:, None] != columns[None, :]
    if TWO_VIEWS:
        other = first + tl.where(query < n // 2, query + n // 2, query - n // 2)
        exist &= other[:, None] != columns[None, :]
    return tl.where(exist, s, -INFINITY)


@triton.jit
def _store_slopes(slopes, products, out, row, column, n_trained, COLUMNS: tl.constexpr):
    """Store [1, COLUMNS] slopes; in columns that do not exist anything may be written."""
    columns = column + tl.arange(0, COLUMNS)
    stride = products.stride
    in_memory = (columns < stride)[None, :]
    rows = row + tl.arange(0, 1)
    if products.factors is not None:
        slopes *= tl.load(out.lift_ptr)
        if out.query_ptr is not None:
            g = tl.load(products.factors.column_ptr + columns, mask=columns < stride, other=0.0)
            for_queries = (slopes * g[None, :]).to(out.query_ptr.dtype.element_ty)
            tl.store(_places(out.query_ptr, rows, columns, stride), for_queries, mask=in_memory)
        if out.key_ptr is not None:
            if column < n_trained:
                for_keys = slopes * tl.load(products.factors.row_ptr + row)
                for_keys = for_keys.to(out.key_ptr.dtype.element_ty)
                tl.store(_places(out.key_ptr, rows, columns, stride), for_keys, mask=in_memory)
    else:
        tl.store(_places(products.ptr, rows, columns, stride), slopes, mask=in_memory)


@triton.jit(do_not_specialize=["n_rows", "m", "first", "start", "n", "n_blocks"])
def log_sums_of_chunk(
    products, log_sums_ptr, n_rows, m, first, start, n, n_blocks,
    DIAGONAL: tl.constexpr, TWO_VIEWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute log Σ_j exp S_ij; program (row, split of the columns).

    log_sums: [n_splits, n_rows].
    """
    DTYPE: tl.constexpr = products.DTYPE
    rows = tl.program_id(0) + tl.arange(0, 1)
    low, high = _columns_of_split(m, n_blocks, COLUMNS)
    largest, total = tl.full([1, COLUMNS], LOWEST, DTYPE), tl.zeros([1, COLUMNS], DTYPE)
    for column in range(low, high, COLUMNS):
        s = _load_similarities(
            products, rows, column + tl.arange(0, COLUMNS), n_rows, m, first, start, n,
            DIAGONAL, TWO_VIEWS,
        )  # fmt: skip
        risen = tl.maximum(largest, s)
        total = total * tl.exp(largest - risen) + tl.exp(s - risen)
        largest = risen
    most = tl.max(largest, 1)
    total = tl.sum(total * tl.exp(largest - most[:, None]), 1)
    tl.store(log_sums_ptr + tl.program_id(1) * n_rows + rows, most + tl.log(total))


@triton.jit(do_not_specialize=["n_rows", "m", "first", "start", "n"])
def fold_chunk(
    products, sums, n_rows, m, first, start, n,
    DIAGONAL: tl.constexpr, TWO_VIEWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add this chunk to Σ_i exp(S_ij − largest_j); program (COLUMNS of the first m columns).

    sums: ColumnSums of [m], in units of log.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exist = columns < m
    largest = tl.maximum(tl.load(sums.largest_ptr + columns, mask=exist, other=LOWEST), LOWEST)
    total = tl.load(sums.total_ptr + columns, mask=exist, other=0.0)
    for row in range(0, n_rows, ROWS):
        s = _load_similarities(
            products, row + tl.arange(0, ROWS), columns, n_rows, m, first, start, n,
            DIAGONAL, TWO_VIEWS,
        )  # fmt: skip
        risen = tl.maximum(largest, tl.max(s, 0))
        total = total * tl.exp(largest - risen) + tl.sum(tl.exp(s - risen[None, :]), 0)
        largest = risen
    tl.store(sums.largest_ptr + columns, largest, mask=exist)
    tl.store(sums.total_ptr + columns, total, mask=exist)


@triton.jit(do_not_specialize=["n_rows", "m", "n_trained", "n_columns", "first", "start", "n"])
def exponentials_of_chunk(
    products, of_rows, of_columns, classes, out,
    n_rows, m, n_trained, n_columns, first, start, n,
    DIAGONAL: tl.constexpr, TWO_VIEWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the slopes G_ij; program (row, COLUMNS columns).

    G_ij = u_i exp(S_ij − n_i) + v_j exp(S_ij − c_j), the latter for the first n_columns columns,
    minus attraction_i for each pair of one class.
    of_rows: LogSums n and u, [n_rows]; of_columns: LogSums c and v, [stride], or None; classes:
    Classes of [n_rows] and [stride], or None; out: SlopesOut.
    """
    rows, column = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    s = _load_similarities(products, rows, columns, n_rows, m, first, start, n, DIAGONAL, TWO_VIEWS)
    in_memory = columns < products.stride
    row_sums = tl.maximum(tl.load(of_rows.log_sums_ptr + rows), LOWEST)
    slopes = tl.load(of_rows.slopes_ptr + rows)[:, None] * tl.exp(s - row_sums[:, None])
    if classes is not None:
        column_classes = tl.load(classes.y_ptr + columns, mask=in_memory, other=0.0)
        same = tl.load(classes.x_ptr + rows)[:, None] == column_classes[None, :]
        same &= s != -INFINITY  # because masked pairs attract nothing
        slopes -= tl.where(same, tl.load(classes.attractions_ptr + rows)[:, None], 0.0)
    if of_columns is not None:
        column_sums = tl.load(of_columns.log_sums_ptr + columns, mask=in_memory, other=0.0)
        column_sums = tl.maximum(column_sums, LOWEST)
        weights = tl.load(of_columns.slopes_ptr + columns, mask=in_memory, other=0.0)
        by_columns = weights[None, :] * tl.exp(s - column_sums[None, :])
        slopes += tl.where((columns < n_columns)[None, :], by_columns, 0.0)
    _store_slopes(slopes, products, out, tl.program_id(0), column, n_trained, COLUMNS)


@triton.jit(do_not_specialize=["n_rows", "m", "n_trained", "first", "start", "n", "n_blocks"])
def pairs_of_chunk(
    products, positive_logits_ptr, weights_ptr, sums_ptr, out,
    n_rows, m, n_trained, first, start, n, n_blocks,
    DIAGONAL: tl.constexpr, TWO_VIEWS: tl.constexpr, COLUMNS: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
):  # fmt: skip
    """Compute Σ_j softplus(S_ij − a_i) and Σ_j of its slopes σ; program (row, split).

    positive_logits: a, [n_rows]; weights: w, [n_rows]; sums: [n_splits, 2, n_rows]; out: SlopesOut
    of G_ij = w_i σ(S_ij − a_i), or None unless NEEDS_GRAD.
    """
    DTYPE: tl.constexpr = products.DTYPE
    rows = tl.program_id(0) + tl.arange(0, 1)
    low, high = _columns_of_split(m, n_blocks, COLUMNS)
    positive_logits = tl.load(positive_logits_ptr + rows)
    weights = tl.load(weights_ptr + rows)
    total, total_slopes = tl.zeros([1, COLUMNS], DTYPE), tl.zeros([1, COLUMNS], DTYPE)
    for column in range(low, high, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        s = _load_similarities(
            products, rows, columns, n_rows, m, first, start, n, DIAGONAL, TWO_VIEWS
        )
        penalty, slopes = softplus((s - positive_logits[:, None]) * LOG2E, DTYPE)
        total += penalty
        total_slopes += slopes
        if NEEDS_GRAD:
            _store_slopes(
                weights[:, None] * slopes, products, out, tl.program_id(0), column, n_trained,
                COLUMNS,
            )  # fmt: skip
    sums_ptr += tl.program_id(1) * 2 * n_rows
    tl.store(sums_ptr + rows, tl.sum(total, 1))
    tl.store(sums_ptr + n_rows + rows, tl.sum(total_slopes, 1))


@triton.jit(do_not_specialize=["n_rows", "m", "first", "start", "n", "n_blocks"])
def divergences_of_chunk(
    student, teacher, statistics_ptr, n_rows, m, first, start, n, n_blocks,
    DIAGONAL: tl.constexpr, CROSS_ENTROPY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of rows of S and T; program (row, split of the columns).

    student, teacher: Products; statistics: [n_splits, 5, n_rows], as `divergences` has them but in
    units of log.
    """
    DTYPE: tl.constexpr = student.DTYPE
    rows = tl.program_id(0) + tl.arange(0, 1)
    low, high = _columns_of_split(m, n_blocks, COLUMNS)
    largest, total = tl.full([1, COLUMNS], LOWEST, DTYPE), tl.zeros([1, COLUMNS], DTYPE)
    largest_t, total_t, differences = largest, total, total
    for column in range(low, high, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        s = _load_similarities(student, rows, columns, n_rows, m, first, start, n, DIAGONAL, False)
        t = _load_similarities(teacher, rows, columns, n_rows, m, first, start, n, DIAGONAL, False)
        # selected, because where one is −inf the other is too
        difference = tl.where(t == -INFINITY, 0.0, -s if CROSS_ENTROPY else t - s)
        risen, risen_t = tl.maximum(largest, s), tl.maximum(largest_t, t)
        total = total * tl.exp(largest - risen) + tl.exp(s - risen)
        shrunk_t, e_t = tl.exp(largest_t - risen_t), tl.exp(t - risen_t)
        total_t = total_t * shrunk_t + e_t
        differences = differences * shrunk_t + e_t * difference
        largest, largest_t = risen, risen_t
    most, most_t = tl.max(largest, 1), tl.max(largest_t, 1)
    shrunk = tl.exp(largest - most[:, None])
    shrunk_t = tl.exp(largest_t - most_t[:, None])
    statistics_ptr += tl.program_id(1) * 5 * n_rows + rows
    tl.store(statistics_ptr, most)
    tl.store(statistics_ptr + n_rows, tl.sum(total * shrunk, 1))
    tl.store(statistics_ptr + 2 * n_rows, most_t)
    tl.store(statistics_ptr + 3 * n_rows, tl.sum(total_t * shrunk_t, 1))
    tl.store(statistics_ptr + 4 * n_rows, tl.sum(differences * shrunk_t, 1))


@triton.jit(do_not_specialize=["n_rows", "m", "n_trained", "first", "start", "n"])
def differences_of_chunk(
    student, teacher, log_sums_ptr, log_sums_t_ptr, out,
    n_rows, m, n_trained, first, start, n,
    DIAGONAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the slopes exp(S_ij − n_i) − exp(T_ij − n_t_i); program (row, COLUMNS columns).

    student, teacher: Products; log_sums, log_sums_t: n and n_t, [n_rows]; out: SlopesOut.
    """
    rows, column = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    s = _load_similarities(student, rows, columns, n_rows, m, first, start, n, DIAGONAL, False)
    t = _load_similarities(teacher, rows, columns, n_rows, m, first, start, n, DIAGONAL, False)
    log_sums, log_sums_t = tl.load(log_sums_ptr + rows), tl.load(log_sums_t_ptr + rows)
    slopes = tl.exp(s - log_sums[:, None]) - tl.exp(t - log_sums_t[:, None])
    _store_slopes(slopes, student, out, tl.program_id(0), column, n_trained, COLUMNS)
