"""Sums over rows and columns of similarities, and the embeddings weighed by what they say."""

import triton
import triton.language as tl

from fastkd.kernels._similarity_tiles import (
    LOWEST,
    alike,
    left_out,
    lifted,
    other_views_out,
    rows_of,
    scales_of,
    similarities,
    tiles_of,
    weighed,
)
from fastkd.kernels._tiles import LN2


@triton.jit
def _absorb(
    largest, total, values, x, scales, others, y_ptr, y_factors_ptr, largest_ptr, sums_ptr,
    row, column, n, m, n_paired, own, is_first,
    MASKED: tl.constexpr, OWN: tl.constexpr, VIEWS: tl.constexpr, FACTORS: tl.constexpr,
    VALUES: tl.constexpr, PAIRED: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    y, s = similarities(
        x, scales, y_ptr, y_factors_ptr, column, FACTORS, PRECISION, DTYPE, COLUMNS, DEPTH
    )
    if MASKED:
        s = left_out(s, row, column, n, m, own, PAIRED, OWN, ROWS, COLUMNS)
    if VIEWS:
        s = other_views_out(s, others, column, COLUMNS)
    risen = tl.maximum(largest, tl.max(s, 1))
    e, shrunk = tl.exp2(s - risen[:, None]), tl.exp2(largest - risen)
    total = total * shrunk + tl.sum(e, 1)
    if VALUES:
        values = weighed(
            values * shrunk[:, None], lifted(e, y.dtype), y, y_factors_ptr, column,
            FACTORS, PRECISION, COLUMNS, DTYPE,
        )  # fmt: skip
    if PAIRED:  # the same for the columns, in memory of this program alone
        places = column + tl.arange(0, COLUMNS)
        known = (places < n_paired) & (is_first == 0)
        before = tl.load(largest_ptr + places, mask=known, other=LOWEST)
        of_column = tl.maximum(before, tl.max(s, 0))
        sums = tl.load(sums_ptr + places, mask=known, other=0.0) * tl.exp2(before - of_column)
        sums += tl.sum(tl.exp2(s - of_column[None, :]), 0)
        tl.store(largest_ptr + places, of_column, mask=places < n_paired)
        tl.store(sums_ptr + places, sums, mask=places < n_paired)
    return risen, total, values


# all that varies with N and M is the same code
@triton.jit(do_not_specialize=["n", "m", "per_split", "n_paired", "own"])
def log_sums(
    x_ptr, y_ptr, x_factors_ptr, y_factors_ptr, scale_ptr, others_ptr,
    log_sums_ptr, values_ptr, largest_ptr, sums_ptr, n, n_padded, m, per_split, n_paired, own,
    OWN: tl.constexpr, VIEWS: tl.constexpr, FACTORS: tl.constexpr, VALUES: tl.constexpr,
    PAIRED: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Programs (some tiles of rows, share of the columns): log2 Σ_j exp2 S_ij for each share.

    values: [splits, n_padded, DEPTH], Σ_j exp2(S_ij − that) g_j y_j; largest, sums: [programs,
    n_paired], of exp2(S_ij − largest_j) over the rows of a program.
    """
    program, split = tl.program_id(0), tl.program_id(1)
    low, high = split * per_split, tl.minimum(split * per_split + per_split, m)
    largest_ptr += program.to(tl.int64) * n_paired
    sums_ptr += program.to(tl.int64) * n_paired
    for step in range(tl.cdiv(n_padded // ROWS - program, tl.num_programs(0))):
        row, is_first = (program + step * tl.num_programs(0)) * ROWS, step == 0
        if PAIRED:
            tl.debug_barrier()  # what the block before stored is read
        x = tl.load(rows_of(x_ptr, row, ROWS, DEPTH))
        scales = scales_of(scale_ptr, x_factors_ptr, row, FACTORS, ROWS, DTYPE)
        others = scales
        if VIEWS:
            others = tl.load(others_ptr + row + tl.arange(0, ROWS))
        largest, total = tl.full([ROWS], LOWEST, DTYPE), tl.zeros([ROWS], DTYPE)
        values = tl.zeros([ROWS, DEPTH], DTYPE)
        first, looked_at, n_looked_at, end = tiles_of(
            row, low, high, n, own, PAIRED, OWN, ROWS, COLUMNS
        )
        for k in range(first, end - n_looked_at):
            column = tl.where(k < looked_at, k, k + n_looked_at) * COLUMNS
            largest, total, values = _absorb(
                largest, total, values, x, scales, others, y_ptr, y_factors_ptr,
                largest_ptr, sums_ptr,
                row, column, n, m, n_paired, own, is_first,
                False, OWN, VIEWS, FACTORS, VALUES, PAIRED,
                PRECISION, DTYPE, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
        for k in range(n_looked_at + (high > end * COLUMNS)):
            column = tl.where(k < n_looked_at, looked_at + k, end) * COLUMNS
            largest, total, values = _absorb(
                largest, total, values, x, scales, others, y_ptr, y_factors_ptr,
                largest_ptr, sums_ptr,
                row, column, n, m, n_paired, own, is_first,
                True, OWN, VIEWS, FACTORS, VALUES, PAIRED,
                PRECISION, DTYPE, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
        rows = row + tl.arange(0, ROWS)
        tl.store(log_sums_ptr + split * n_padded + rows, largest + tl.log2(total))
        if VALUES:
            place_ptr = values_ptr + split.to(tl.int64) * n_padded * DEPTH
            total = lifted(tl.where(total == 0, 1.0, total), x.dtype)
            tl.store(rows_of(place_ptr, row, ROWS, DEPTH), values / total[:, None])


@triton.jit(do_not_specialize=["n_parts", "n_paired"])
def column_log_sums(
    largest_ptr, sums_ptr, log_sums_ptr, n_parts, n_paired, LANES: tl.constexpr
):  # fmt: skip
    """Programs (some columns): log2 Σ_i exp2 S_ij of the parts that `log_sums` left."""
    places = tl.program_id(0) * LANES + tl.arange(0, LANES)
    exist = places < n_paired
    largest = tl.load(largest_ptr + places, mask=exist, other=LOWEST)
    total = tl.load(sums_ptr + places, mask=exist, other=0.0)
    for _ in range(1, n_parts):
        largest_ptr += n_paired
        sums_ptr += n_paired
        of_part = tl.load(largest_ptr + places, mask=exist, other=LOWEST)
        risen = tl.maximum(largest, of_part)
        total *= tl.exp2(largest - risen)
        total += tl.load(sums_ptr + places, mask=exist, other=0.0) * tl.exp2(of_part - risen)
        largest = risen
    tl.store(log_sums_ptr + places, largest + tl.log2(total), mask=exist)


@triton.jit
def _log1p(y, DTYPE: tl.constexpr):
    """Of y from 0 to 1: log2 of 1 + y has 7 digits of 1, and none of a small y."""
    if DTYPE == tl.float64:
        return tl.log(1 + y)
    p = y * 0.0052534578 - 0.0295885074  # Chebyshev, to 2e-7 of the result
    p = p * y + 0.078361668
    p = p * y - 0.136747697
    p = p * y + 0.191114311
    p = p * y - 0.248443699
    p = p * y + 0.333192713
    p = p * y - 0.499995015
    return (p * y + 0.999999971) * y


@triton.jit
def _sigmoid(x):
    """Of numbers in units of log2; and exp −|x|."""
    y = tl.exp2(-tl.abs(x))
    return tl.where(x >= 0, 1.0, y) / (1 + y), y


@triton.jit
def penalties(odds, DTYPE: tl.constexpr):
    """softplus of numbers in units of log2, in those of log, and its slopes."""
    sigmoid, y = _sigmoid(odds)
    return tl.maximum(odds, 0.0) * LN2 + _log1p(y, DTYPE), sigmoid


@triton.jit
def _add_penalties(
    total, slopes, values, x, scales, anchors, y_ptr, y_factors_ptr, row, column, n, m, own,
    MASKED: tl.constexpr, OWN: tl.constexpr, FACTORS: tl.constexpr, VALUES: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    y, s = similarities(
        x, scales, y_ptr, y_factors_ptr, column, FACTORS, PRECISION, DTYPE, COLUMNS, DEPTH
    )
    odds = s - anchors[:, None]
    if MASKED:
        odds = left_out(odds, row, column, n, m, own, False, OWN, ROWS, COLUMNS)
    penalty, sigmoid = penalties(odds, DTYPE)
    total += tl.sum(penalty, 1)
    slopes += tl.sum(sigmoid, 1)
    if VALUES:
        weights = lifted(sigmoid, y.dtype)
        values = weighed(
            values, weights, y, y_factors_ptr, column, FACTORS, PRECISION, COLUMNS, DTYPE
        )
    return total, slopes, values


@triton.jit(do_not_specialize=["n", "m", "per_split", "own"])
def softplus_sums(
    x_ptr, y_ptr, x_factors_ptr, y_factors_ptr, scale_ptr, anchors_ptr,
    sums_ptr, slopes_ptr, values_ptr, n, n_padded, m, per_split, own,
    OWN: tl.constexpr, FACTORS: tl.constexpr, VALUES: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Programs (tile of rows, share of the columns): Σ_j softplus(S_ij − a_i), Σ_j of its slopes.

    values: Σ_j slope_ij g_j y_j; all with the shares before the rows.
    """
    row, split = tl.program_id(0) * ROWS, tl.program_id(1)
    low, high = split * per_split, tl.minimum(split * per_split + per_split, m)
    rows = row + tl.arange(0, ROWS)
    x = tl.load(rows_of(x_ptr, row, ROWS, DEPTH))
    scales = scales_of(scale_ptr, x_factors_ptr, row, FACTORS, ROWS, DTYPE)
    anchors = tl.load(anchors_ptr + rows)
    total, slopes = tl.zeros([ROWS], DTYPE), tl.zeros([ROWS], DTYPE)
    values = tl.zeros([ROWS, DEPTH], DTYPE)
    first, looked_at, n_looked_at, end = tiles_of(row, low, high, n, own, False, OWN, ROWS, COLUMNS)
    for k in range(first, end - n_looked_at):
        column = tl.where(k < looked_at, k, k + n_looked_at) * COLUMNS
        total, slopes, values = _add_penalties(
            total, slopes, values, x, scales, anchors, y_ptr, y_factors_ptr, row, column,
            n, m, own, False, OWN, FACTORS, VALUES, PRECISION, DTYPE, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    for k in range(n_looked_at + (high > end * COLUMNS)):
        column = tl.where(k < n_looked_at, looked_at + k, end) * COLUMNS
        total, slopes, values = _add_penalties(
            total, slopes, values, x, scales, anchors, y_ptr, y_factors_ptr, row, column,
            n, m, own, True, OWN, FACTORS, VALUES, PRECISION, DTYPE, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    tl.store(sums_ptr + split * n_padded + rows, total)
    tl.store(slopes_ptr + split * n_padded + rows, slopes)
    if VALUES:
        values_ptr += split.to(tl.int64) * n_padded * DEPTH
        one = lifted(tl.full([], 1.0, DTYPE), x.dtype)
        tl.store(rows_of(values_ptr, row, ROWS, DEPTH), values / one)


@triton.jit
def _add_slopes(
    values, x, scales, others, classes, attractions, of_rows, y_ptr, y_factors_ptr,
    y_classes_ptr, of_columns_ptr, weights_ptr, row, column, n, m, own,
    MASKED: tl.constexpr, OWN: tl.constexpr, VIEWS: tl.constexpr, CLASSES: tl.constexpr,
    FACTORS: tl.constexpr, PAIRS: tl.constexpr, BOTH: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    y, s = similarities(
        x, scales, y_ptr, y_factors_ptr, column, FACTORS, PRECISION, DTYPE, COLUMNS, DEPTH
    )
    if MASKED:
        s = left_out(s, row, column, n, m, own, False, OWN, ROWS, COLUMNS)
    if VIEWS:
        s = other_views_out(s, others, column, COLUMNS)
    places = column + tl.arange(0, COLUMNS)
    if PAIRS:
        slopes, _ = _sigmoid(s - tl.load(of_columns_ptr + places)[None, :])
        slopes *= tl.load(weights_ptr + places)[None, :]
    else:
        slopes = tl.exp2(s - tl.load(of_columns_ptr + places)[None, :])
        if BOTH:
            slopes += tl.exp2(s - of_rows[:, None])
        if CLASSES:
            same = alike(s, classes, y_classes_ptr, column, MASKED, COLUMNS)
            slopes = tl.where(same, slopes - attractions[:, None], slopes)
    return weighed(values, slopes, y, y_factors_ptr, column, FACTORS, PRECISION, COLUMNS, DTYPE)


@triton.jit(do_not_specialize=["n", "m", "per_split", "own"])
def weighed_sums(
    x_ptr, y_ptr, x_factors_ptr, y_factors_ptr, scale_ptr, others_ptr, x_classes_ptr,
    y_classes_ptr, attractions_ptr, of_rows_ptr, of_columns_ptr, weights_ptr, values_ptr,
    n, n_padded, m, per_split, own,
    OWN: tl.constexpr, VIEWS: tl.constexpr, CLASSES: tl.constexpr, FACTORS: tl.constexpr,
    PAIRS: tl.constexpr, BOTH: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Programs (tile of rows, share of the columns): Σ_j G_ij g_j y_j for each share.

    G_ij = exp2(S_ij − of_columns_j), with BOTH + exp2(S_ij − of_rows_i); of PAIRS it is
    weights_j σ(S_ij − of_columns_j). With CLASSES attractions_i less for each pair of one class.
    """
    row, split = tl.program_id(0) * ROWS, tl.program_id(1)
    low, high = split * per_split, tl.minimum(split * per_split + per_split, m)
    x = tl.load(rows_of(x_ptr, row, ROWS, DEPTH))
    scales = scales_of(scale_ptr, x_factors_ptr, row, FACTORS, ROWS, DTYPE)
    others, of_rows, classes, attractions = scales, scales, scales, scales
    if CLASSES:
        classes = tl.load(x_classes_ptr + row + tl.arange(0, ROWS))
        attractions = tl.load(attractions_ptr + row + tl.arange(0, ROWS))
    if VIEWS:
        others = tl.load(others_ptr + row + tl.arange(0, ROWS))
    if BOTH:
        of_rows = tl.load(of_rows_ptr + row + tl.arange(0, ROWS))
    values = tl.zeros([ROWS, DEPTH], DTYPE)
    first, looked_at, n_looked_at, end = tiles_of(row, low, high, n, own, False, OWN, ROWS, COLUMNS)
    for k in range(first, end - n_looked_at):
        column = tl.where(k < looked_at, k, k + n_looked_at) * COLUMNS
        values = _add_slopes(
            values, x, scales, others, classes, attractions, of_rows, y_ptr, y_factors_ptr,
            y_classes_ptr, of_columns_ptr, weights_ptr, row, column, n, m, own,
            False, OWN, VIEWS, CLASSES, FACTORS, PAIRS, BOTH,
            PRECISION, DTYPE, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    for k in range(n_looked_at + (high > end * COLUMNS)):
        column = tl.where(k < n_looked_at, looked_at + k, end) * COLUMNS
        values = _add_slopes(
            values, x, scales, others, classes, attractions, of_rows, y_ptr, y_factors_ptr,
            y_classes_ptr, of_columns_ptr, weights_ptr, row, column, n, m, own,
            True, OWN, VIEWS, CLASSES, FACTORS, PAIRS, BOTH,
            PRECISION, DTYPE, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    values_ptr += split.to(tl.int64) * n_padded * DEPTH
    tl.store(rows_of(values_ptr, row, ROWS, DEPTH), values)
