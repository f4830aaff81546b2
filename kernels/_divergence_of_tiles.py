"""The divergence of two networks' similarities, and embeddings weighed by its slopes."""

import triton
import triton.language as tl

from fastkd.kernels._similarity_tiles import (
    LOWEST,
    left_out,
    rows_of,
    scales_of,
    similarities,
    tiles_of,
    weighed,
)


@triton.jit
def _add_divergence(
    largest, total, largest_t, total_t, differences, x, scales, x_t, scales_t,
    y_ptr, y_factors_ptr, y_t_ptr, y_t_factors_ptr, row, column, n, m, own,
    MASKED: tl.constexpr, OWN: tl.constexpr, FACTORS: tl.constexpr, FACTORS_T: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, DEPTH_T: tl.constexpr,
):  # fmt: skip
    _, s = similarities(
        x, scales, y_ptr, y_factors_ptr, column, FACTORS, PRECISION, DTYPE, COLUMNS, DEPTH
    )
    _, t = similarities(
        x_t, scales_t, y_t_ptr, y_t_factors_ptr, column,
        FACTORS_T, PRECISION, DTYPE, COLUMNS, DEPTH_T,
    )  # fmt: skip
    difference = t - s
    if MASKED:
        s = left_out(s, row, column, n, m, own, False, OWN, ROWS, COLUMNS)
        t = left_out(t, row, column, n, m, own, False, OWN, ROWS, COLUMNS)
    risen, risen_t = tl.maximum(largest, tl.max(s, 1)), tl.maximum(largest_t, tl.max(t, 1))
    shrunk_t = tl.exp2(largest_t - risen_t)
    total = total * tl.exp2(largest - risen) + tl.sum(tl.exp2(s - risen[:, None]), 1)
    e_t = tl.exp2(t - risen_t[:, None])
    total_t = total_t * shrunk_t + tl.sum(e_t, 1)
    differences = differences * shrunk_t + tl.sum(e_t * difference, 1)
    return risen, total, risen_t, total_t, differences


@triton.jit(do_not_specialize=["n", "m", "per_split", "own"])
def divergences(
    x_ptr, y_ptr, x_factors_ptr, y_factors_ptr, scale_ptr,
    x_t_ptr, y_t_ptr, x_t_factors_ptr, y_t_factors_ptr, scale_t_ptr,
    statistics_ptr, n, n_padded, m, per_split, own,
    OWN: tl.constexpr, FACTORS: tl.constexpr, FACTORS_T: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, DEPTH_T: tl.constexpr,
):  # fmt: skip
    """Programs (tile of rows, share of the columns): [shares, 5, n_padded] statistics.

    Largest and Σ_j exp2(S_ij − largest_i), the same of T, Σ_j exp2(T_ij − largest_i)(T_ij − S_ij).
    """
    row, split = tl.program_id(0) * ROWS, tl.program_id(1)
    low, high = split * per_split, tl.minimum(split * per_split + per_split, m)
    x = tl.load(rows_of(x_ptr, row, ROWS, DEPTH))
    x_t = tl.load(rows_of(x_t_ptr, row, ROWS, DEPTH_T))
    scales = scales_of(scale_ptr, x_factors_ptr, row, FACTORS, ROWS, DTYPE)
    scales_t = scales_of(scale_t_ptr, x_t_factors_ptr, row, FACTORS_T, ROWS, DTYPE)
    largest, total = tl.full([ROWS], LOWEST, DTYPE), tl.zeros([ROWS], DTYPE)
    largest_t, total_t, differences = largest, total, total
    first, looked_at, n_looked_at, end = tiles_of(row, low, high, n, own, False, OWN, ROWS, COLUMNS)
    for k in range(first, end - n_looked_at):
        column = tl.where(k < looked_at, k, k + n_looked_at) * COLUMNS
        largest, total, largest_t, total_t, differences = _add_divergence(
            largest, total, largest_t, total_t, differences, x, scales, x_t, scales_t,
            y_ptr, y_factors_ptr, y_t_ptr, y_t_factors_ptr, row, column, n, m, own,
            False, OWN, FACTORS, FACTORS_T, PRECISION, DTYPE, ROWS, COLUMNS, DEPTH, DEPTH_T,
        )  # fmt: skip
    for k in range(n_looked_at + (high > end * COLUMNS)):
        column = tl.where(k < n_looked_at, looked_at + k, end) * COLUMNS
        largest, total, largest_t, total_t, differences = _add_divergence(
            largest, total, largest_t, total_t, differences, x, scales, x_t, scales_t,
            y_ptr, y_factors_ptr, y_t_ptr, y_t_factors_ptr, row, column, n, m, own,
            True, OWN, FACTORS, FACTORS_T, PRECISION, DTYPE, ROWS, COLUMNS, DEPTH, DEPTH_T,
        )  # fmt: skip
    statistics_ptr += split * 5 * n_padded + row + tl.arange(0, ROWS)
    tl.store(statistics_ptr, largest)
    tl.store(statistics_ptr + n_padded, total)
    tl.store(statistics_ptr + 2 * n_padded, largest_t)
    tl.store(statistics_ptr + 3 * n_padded, total_t)
    tl.store(statistics_ptr + 4 * n_padded, differences)


@triton.jit
def _add_differences(
    values, x, scales, x_t, scales_t, of_rows, of_rows_t,
    y_ptr, y_factors_ptr, y_t_ptr, y_t_factors_ptr, of_columns_ptr, of_columns_t_ptr,
    row, column, n, m, own,
    MASKED: tl.constexpr, OWN: tl.constexpr, FACTORS: tl.constexpr, FACTORS_T: tl.constexpr,
    BY_ROWS: tl.constexpr, BY_COLUMNS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DEPTH_T: tl.constexpr,
):  # fmt: skip
    y, s = similarities(
        x, scales, y_ptr, y_factors_ptr, column, FACTORS, PRECISION, DTYPE, COLUMNS, DEPTH
    )
    _, t = similarities(
        x_t, scales_t, y_t_ptr, y_t_factors_ptr, column,
        FACTORS_T, PRECISION, DTYPE, COLUMNS, DEPTH_T,
    )  # fmt: skip
    if MASKED:
        s = left_out(s, row, column, n, m, own, False, OWN, ROWS, COLUMNS)
        t = left_out(t, row, column, n, m, own, False, OWN, ROWS, COLUMNS)
    places = column + tl.arange(0, COLUMNS)
    slopes = tl.zeros([ROWS, COLUMNS], DTYPE)
    if BY_ROWS:
        slopes += tl.exp2(s - of_rows[:, None]) - tl.exp2(t - of_rows_t[:, None])
    if BY_COLUMNS:
        of_columns = tl.load(of_columns_ptr + places)[None, :]
        of_columns_t = tl.load(of_columns_t_ptr + places)[None, :]
        slopes += tl.exp2(s - of_columns) - tl.exp2(t - of_columns_t)
    return weighed(values, slopes, y, y_factors_ptr, column, FACTORS, PRECISION, COLUMNS, DTYPE)


@triton.jit(do_not_specialize=["n", "m", "per_split", "own"])
def weighed_differences(
    x_ptr, y_ptr, x_factors_ptr, y_factors_ptr, scale_ptr,
    x_t_ptr, y_t_ptr, x_t_factors_ptr, y_t_factors_ptr, scale_t_ptr,
    of_rows_ptr, of_rows_t_ptr, of_columns_ptr, of_columns_t_ptr,
    values_ptr, n, n_padded, m, per_split, own,
    OWN: tl.constexpr, FACTORS: tl.constexpr, FACTORS_T: tl.constexpr,
    BY_ROWS: tl.constexpr, BY_COLUMNS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DEPTH_T: tl.constexpr,
):  # fmt: skip
    """Programs (tile of rows, share of the columns): Σ_j G_ij g_j y_j for each share.

    G_ij = exp2(S_ij − of_rows_i) − exp2(T_ij − of_rows_t_i), the same of columns, or both.
    """
    row, split = tl.program_id(0) * ROWS, tl.program_id(1)
    low, high = split * per_split, tl.minimum(split * per_split + per_split, m)
    x = tl.load(rows_of(x_ptr, row, ROWS, DEPTH))
    x_t = tl.load(rows_of(x_t_ptr, row, ROWS, DEPTH_T))
    scales = scales_of(scale_ptr, x_factors_ptr, row, FACTORS, ROWS, DTYPE)
    scales_t = scales_of(scale_t_ptr, x_t_factors_ptr, row, FACTORS_T, ROWS, DTYPE)
    of_rows, of_rows_t = scales, scales_t
    if BY_ROWS:
        of_rows = tl.load(of_rows_ptr + row + tl.arange(0, ROWS))
        of_rows_t = tl.load(of_rows_t_ptr + row + tl.arange(0, ROWS))
    values = tl.zeros([ROWS, DEPTH], DTYPE)
    first, looked_at, n_looked_at, end = tiles_of(row, low, high, n, own, False, OWN, ROWS, COLUMNS)
    for k in range(first, end - n_looked_at):
        column = tl.where(k < looked_at, k, k + n_looked_at) * COLUMNS
        values = _add_differences(
            values, x, scales, x_t, scales_t, of_rows, of_rows_t,
            y_ptr, y_factors_ptr, y_t_ptr, y_t_factors_ptr, of_columns_ptr, of_columns_t_ptr,
            row, column, n, m, own, False, OWN, FACTORS, FACTORS_T, BY_ROWS, BY_COLUMNS,
            PRECISION, DTYPE, ROWS, COLUMNS, DEPTH, DEPTH_T,
        )  # fmt: skip
    for k in range(n_looked_at + (high > end * COLUMNS)):
        column = tl.where(k < n_looked_at, looked_at + k, end) * COLUMNS
        values = _add_differences(
            values, x, scales, x_t, scales_t, of_rows, of_rows_t,
            y_ptr, y_factors_ptr, y_t_ptr, y_t_factors_ptr, of_columns_ptr, of_columns_t_ptr,
            row, column, n, m, own, True, OWN, FACTORS, FACTORS_T, BY_ROWS, BY_COLUMNS,
            PRECISION, DTYPE, ROWS, COLUMNS, DEPTH, DEPTH_T,
        )  # fmt: skip
    values_ptr += split.to(tl.int64) * n_padded * DEPTH
    tl.store(rows_of(values_ptr, row, ROWS, DEPTH), values)
