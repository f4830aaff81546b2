"""What is made of a chunk of rows of similarities whose products are in memory.

S is the products or, with FACTORS, scale · f g · products. Whoever reads a chunk leaves out what
does not exist, the own pairs and, of VIEWS, those with the other view of an example: their slopes
are 0. Slopes go to where the products are or, with FACTORS, in half precision to where the next
products read them, times `lift` and the factors that those miss.
"""

import triton
import triton.language as tl

from fastkd.kernels._contrastive_tiles import penalties
from fastkd.kernels._similarity_tiles import LOWEST
from fastkd.kernels._tiles import INFINITY, LOG2E


@triton.jit
def _places(pointer, rows, columns, stride):
    return pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]


@triton.jit
def _share(m, n_blocks, COLUMNS: tl.constexpr):
    """Of the columns of a row, those of this program."""
    low = tl.program_id(1) * n_blocks * COLUMNS
    return low, tl.minimum(low + n_blocks * COLUMNS, m)


@triton.jit
def _similarities(
    products_ptr, scale_ptr, row_factors_ptr, factors_ptr, rows, columns, n_rows, m, stride,
    first, start, n, OWN: tl.constexpr, VIEWS: tl.constexpr, FACTORS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Of these rows of the chunk, which begins with row `start` of all n.

    Memory is there for `stride` columns: a multiple of the longest vector, other than m.
    """
    in_memory = (rows < n_rows)[:, None] & (columns < stride)[None, :]
    s = tl.load(_places(products_ptr, rows, columns, stride), mask=in_memory, other=0.0)
    if FACTORS:
        f = tl.load(row_factors_ptr + rows, mask=rows < n_rows, other=0.0)
        f *= tl.load(scale_ptr)
        g = tl.load(factors_ptr + columns, mask=columns < stride, other=0.0)
        s *= f[:, None] * g[None, :]
    exist = (rows < n_rows)[:, None] & (columns < m)[None, :]
    query = start + rows
    if OWN:
        exist &= (first + query)[:, None] != columns[None, :]
    if VIEWS:
        other = first + tl.where(query < n // 2, query + n // 2, query - n // 2)
        exist &= other[:, None] != columns[None, :]
    return tl.where(exist, s, -INFINITY)


@triton.jit
def _store_slopes(
    slopes, products_ptr, of_queries_ptr, of_keys_ptr, lift_ptr, row_factors_ptr, factors_ptr,
    row, column, n_trained, stride, FACTORS: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a row: in the columns that do not exist anything may be written."""
    columns = column + tl.arange(0, COLUMNS)
    in_memory = (columns < stride)[None, :]
    rows = row + tl.arange(0, 1)
    if FACTORS:
        slopes *= tl.load(lift_ptr)
        if QUERIES:
            g = tl.load(factors_ptr + columns, mask=columns < stride, other=0.0)
            for_queries = (slopes * g[None, :]).to(of_queries_ptr.dtype.element_ty)
            tl.store(_places(of_queries_ptr, rows, columns, stride), for_queries, mask=in_memory)
        if KEYS:
            if column < n_trained:
                for_keys = slopes * tl.load(row_factors_ptr + row)
                for_keys = for_keys.to(of_keys_ptr.dtype.element_ty)
                tl.store(_places(of_keys_ptr, rows, columns, stride), for_keys, mask=in_memory)
    else:
        tl.store(_places(products_ptr, rows, columns, stride), slopes, mask=in_memory)


@triton.jit(do_not_specialize=["n_rows", "m", "first", "start", "n", "n_blocks"])
def log_sums_of_chunk(
    products_ptr, scale_ptr, row_factors_ptr, factors_ptr, log_sums_ptr,
    n_rows, m, stride, first, start, n, n_blocks,
    OWN: tl.constexpr, VIEWS: tl.constexpr, FACTORS: tl.constexpr, DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs (row, share of the columns): log Σ_j exp S_ij for each share."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    low, high = _share(m, n_blocks, COLUMNS)
    largest, total = tl.full([1, COLUMNS], LOWEST, DTYPE), tl.zeros([1, COLUMNS], DTYPE)
    for column in range(low, high, COLUMNS):
        s = _similarities(
            products_ptr, scale_ptr, row_factors_ptr, factors_ptr, rows,
            column + tl.arange(0, COLUMNS), n_rows, m, stride,
            first, start, n, OWN, VIEWS, FACTORS, DTYPE,
        )  # fmt: skip
        risen = tl.maximum(largest, s)
        total = total * tl.exp(largest - risen) + tl.exp(s - risen)
        largest = risen
    most = tl.max(largest, 1)
    total = tl.sum(total * tl.exp(largest - most[:, None]), 1)
    tl.store(log_sums_ptr + tl.program_id(1) * n_rows + rows, most + tl.log(total))


@triton.jit(do_not_specialize=["n_rows", "m", "first", "start", "n"])
def fold_chunk(
    products_ptr, scale_ptr, row_factors_ptr, factors_ptr, largest_ptr, sums_ptr,
    n_rows, m, stride, first, start, n,
    OWN: tl.constexpr, VIEWS: tl.constexpr, FACTORS: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs (some of the first m columns): Σ_i exp(S_ij − largest_j) of this chunk too."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exist = columns < m
    largest = tl.maximum(tl.load(largest_ptr + columns, mask=exist, other=LOWEST), LOWEST)
    total = tl.load(sums_ptr + columns, mask=exist, other=0.0)
    for row in range(0, n_rows, ROWS):
        s = _similarities(
            products_ptr, scale_ptr, row_factors_ptr, factors_ptr, row + tl.arange(0, ROWS),
            columns, n_rows, m, stride, first, start, n, OWN, VIEWS, FACTORS, DTYPE,
        )  # fmt: skip
        risen = tl.maximum(largest, tl.max(s, 0))
        total = total * tl.exp(largest - risen) + tl.sum(tl.exp(s - risen[None, :]), 0)
        largest = risen
    tl.store(largest_ptr + columns, largest, mask=exist)
    tl.store(sums_ptr + columns, total, mask=exist)


@triton.jit(do_not_specialize=["n_rows", "m", "n_trained", "n_paired", "first", "start", "n"])
def exponentials_of_chunk(
    products_ptr, scale_ptr, row_factors_ptr, factors_ptr, row_classes_ptr, classes_ptr,
    attractions_ptr, of_rows_ptr, slopes_ptr, of_columns_ptr, column_slopes_ptr,
    of_queries_ptr, of_keys_ptr, lift_ptr,
    n_rows, m, n_trained, n_paired, stride, first, start, n,
    CLASSES: tl.constexpr, PAIRED: tl.constexpr, OWN: tl.constexpr, VIEWS: tl.constexpr,
    FACTORS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs (row, some columns): slopes_i exp(S_ij − of_rows_i), PAIRED the same of columns.

    With CLASSES attractions_i less for each pair of one class.
    """
    rows, column = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    s = _similarities(
        products_ptr, scale_ptr, row_factors_ptr, factors_ptr, rows, columns, n_rows, m, stride,
        first, start, n, OWN, VIEWS, FACTORS, DTYPE,
    )  # fmt: skip
    of_rows = tl.maximum(tl.load(of_rows_ptr + rows), LOWEST)
    slopes = tl.load(slopes_ptr + rows)[:, None] * tl.exp(s - of_rows[:, None])
    if CLASSES:
        classes = tl.load(classes_ptr + columns, mask=columns < stride, other=0.0)
        alike = tl.load(row_classes_ptr + rows)[:, None] == classes[None, :]
        alike &= s != -INFINITY  # for what is left out
        slopes -= tl.where(alike, tl.load(attractions_ptr + rows)[:, None], 0.0)
    if PAIRED:
        paired = columns < n_paired
        of_columns = tl.load(of_columns_ptr + columns, mask=columns < stride, other=0.0)
        of_columns = tl.maximum(of_columns, LOWEST)
        weights = tl.load(column_slopes_ptr + columns, mask=columns < stride, other=0.0)
        by_columns = weights[None, :] * tl.exp(s - of_columns[None, :])
        slopes += tl.where(paired[None, :], by_columns, 0.0)
    _store_slopes(
        slopes, products_ptr, of_queries_ptr, of_keys_ptr, lift_ptr, row_factors_ptr, factors_ptr,
        tl.program_id(0), column, n_trained, stride, FACTORS, QUERIES, KEYS, COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "m", "n_trained", "first", "start", "n", "n_blocks"])
def pairs_of_chunk(
    products_ptr, scale_ptr, row_factors_ptr, factors_ptr, anchors_ptr, weights_ptr, sums_ptr,
    of_queries_ptr, of_keys_ptr, lift_ptr,
    n_rows, m, n_trained, stride, first, start, n, n_blocks,
    SLOPES: tl.constexpr, OWN: tl.constexpr, VIEWS: tl.constexpr, FACTORS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs (row, share of the columns): [shares, 2, rows] Σ_j softplus(S_ij − a_i), Σ_j σ.

    With SLOPES weights_i σ(S_ij − a_i) too.
    """
    rows = tl.program_id(0) + tl.arange(0, 1)
    low, high = _share(m, n_blocks, COLUMNS)
    anchors = tl.load(anchors_ptr + rows)
    weights = tl.load(weights_ptr + rows)
    of_pairs, of_slopes = tl.zeros([1, COLUMNS], DTYPE), tl.zeros([1, COLUMNS], DTYPE)
    for column in range(low, high, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        s = _similarities(
            products_ptr, scale_ptr, row_factors_ptr, factors_ptr, rows, columns, n_rows, m,
            stride, first, start, n, OWN, VIEWS, FACTORS, DTYPE,
        )  # fmt: skip
        penalty, slopes = penalties((s - anchors[:, None]) * LOG2E, DTYPE)
        of_pairs += penalty
        of_slopes += slopes
        if SLOPES:
            _store_slopes(
                weights[:, None] * slopes, products_ptr, of_queries_ptr, of_keys_ptr, lift_ptr,
                row_factors_ptr, factors_ptr, tl.program_id(0), column, n_trained, stride,
                FACTORS, QUERIES, KEYS, COLUMNS,
            )  # fmt: skip
    sums_ptr += tl.program_id(1) * 2 * n_rows
    tl.store(sums_ptr + rows, tl.sum(of_pairs, 1))
    tl.store(sums_ptr + n_rows + rows, tl.sum(of_slopes, 1))


@triton.jit(do_not_specialize=["n_rows", "m", "first", "start", "n", "n_blocks"])
def divergences_of_chunk(
    products_ptr, scale_ptr, row_factors_ptr, factors_ptr,
    products_t_ptr, scale_t_ptr, row_factors_t_ptr, factors_t_ptr, statistics_ptr,
    n_rows, m, stride, stride_t, first, start, n, n_blocks,
    OWN: tl.constexpr, FACTORS: tl.constexpr, FACTORS_T: tl.constexpr, DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs (row, share of the columns): [shares, 5, rows] statistics of the tiles' kind."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    low, high = _share(m, n_blocks, COLUMNS)
    largest, total = tl.full([1, COLUMNS], LOWEST, DTYPE), tl.zeros([1, COLUMNS], DTYPE)
    largest_t, total_t, differences = largest, total, total
    for column in range(low, high, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        s = _similarities(
            products_ptr, scale_ptr, row_factors_ptr, factors_ptr, rows, columns, n_rows, m,
            stride, first, start, n, OWN, False, FACTORS, DTYPE,
        )  # fmt: skip
        t = _similarities(
            products_t_ptr, scale_t_ptr, row_factors_t_ptr, factors_t_ptr, rows, columns, n_rows,
            m, stride_t, first, start, n, OWN, False, FACTORS_T, DTYPE,
        )  # fmt: skip
        difference = tl.where(t == -INFINITY, 0.0, t - s)  # both are, or none
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
    products_ptr, scale_ptr, row_factors_ptr, factors_ptr,
    products_t_ptr, scale_t_ptr, row_factors_t_ptr, factors_t_ptr, of_rows_ptr, of_rows_t_ptr,
    of_queries_ptr, of_keys_ptr, lift_ptr,
    n_rows, m, n_trained, stride, stride_t, first, start, n,
    OWN: tl.constexpr, FACTORS: tl.constexpr, FACTORS_T: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, DTYPE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs (row, some columns): exp(S_ij − of_rows_i) − exp(T_ij − of_rows_t_i)."""
    rows, column = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    s = _similarities(
        products_ptr, scale_ptr, row_factors_ptr, factors_ptr, rows, columns, n_rows, m, stride,
        first, start, n, OWN, False, FACTORS, DTYPE,
    )  # fmt: skip
    t = _similarities(
        products_t_ptr, scale_t_ptr, row_factors_t_ptr, factors_t_ptr, rows, columns, n_rows, m,
        stride_t, first, start, n, OWN, False, FACTORS_T, DTYPE,
    )  # fmt: skip
    of_rows, of_rows_t = tl.load(of_rows_ptr + rows), tl.load(of_rows_t_ptr + rows)
    slopes = tl.exp(s - of_rows[:, None]) - tl.exp(t - of_rows_t[:, None])
    _store_slopes(
        slopes, products_ptr, of_queries_ptr, of_keys_ptr, lift_ptr, row_factors_ptr, factors_ptr,
        tl.program_id(0), column, n_trained, stride, FACTORS, QUERIES, KEYS, COLUMNS,
    )  # fmt: skip
