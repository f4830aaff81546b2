"""Sweeps over the tiles of S for the losses of `Pairs`.

With slopes u in the log-sum-exps n of rows, and v in those c of columns, the gradient in S is

    G_ij = u_i exp(S_ij − n_i) + v_j exp(S_ij − c_j) = exp(S_ij − (n_i − log u_i)) + …

so that no product with the slopes is needed. A program owns what it sums up: there are no atomics,
and the bits are the same in every run. Per element of S nothing is read or written; per tile a
program reads COLUMNS · DEPTH elements of y, mostly from the L2 cache.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.pairs.tiles import (
    LOWEST,
    Mask,
    add_weighted,
    columns_of_split,
    fold_tiles,
    lift,
    load_block,
    load_tile,
    masked,
    same_class,
    store_values,
    two_views,
)
from fastkd.kernels.tiles import LN2, LOG2E

# What varies with N and M is passed by itself, because members of a tuple are always specialised.


class ColumnSums(NamedTuple):
    """The sums over the rows of each block, for columns j."""

    largest_ptr: Any  # [n_blocks, n_columns], the maximum of S_ij
    total_ptr: Any  # [n_blocks, n_columns], Σ_i exp2(S_ij − maximum_j)


class Classes(NamedTuple):
    """Numbers of classes, and what is subtracted from the slopes of pairs of one class."""

    x_ptr: Any  # [n_padded], numbers of classes
    y_ptr: Any  # [m_padded]
    attractions_ptr: Any  # of the queries, whose place among rows and columns the kernels know


class _Sums(NamedTuple):
    largest: Any  # [ROWS]
    total: Any  # [ROWS], Σ_j exp2(S_ij − largest_i)
    weighted: Any  # [ROWS, DEPTH], Σ_j exp2(S_ij − largest_i) g_j y_j
    alike: Any  # [ROWS], Σ_j S_ij over the pairs of one class
    rest: Any  # [ROWS], what its rounding added


class SumOperands(NamedTuple):
    similarities: Any
    block: Any
    classes_ptr: Any  # of the columns, or None
    row_classes: Any  # [ROWS], or None
    WEIGHTED: Any


@triton.jit
def add_exponentials(sums, operands, row, column, mask, MASKED: tl.constexpr, TILE):
    y, s = load_tile(operands.similarities, operands.block, column, TILE)
    if MASKED:
        s = masked(s, row, column, mask, TILE)
    risen = tl.maximum(sums.largest, tl.max(s, 1))
    e, shrunk = tl.exp2(s - risen[:, None]), tl.exp2(sums.largest - risen)
    total, weighted = sums.total * shrunk + tl.sum(e, 1), sums.weighted
    if operands.WEIGHTED:
        weighted = add_weighted(
            weighted * shrunk[:, None], lift(e, y.dtype), y, operands.similarities.y, column, TILE
        )
    alike, rest = sums.alike, sums.rest
    if operands.classes_ptr is not None:
        same = same_class(s, operands.row_classes, operands.classes_ptr, column, MASKED, TILE)
        # compensated, because sums of many numbers that are alike are rounded often
        part = tl.sum(tl.where(same, s, 0.0), 1) - rest
        grown = alike + part
        alike, rest = grown, (grown - alike) - part
    return _Sums(risen, total, weighted, alike, rest)


@triton.jit
def no_sums(TILE):
    zeros = tl.zeros([TILE.ROWS], TILE.DTYPE)
    return _Sums(
        tl.full([TILE.ROWS], LOWEST, TILE.DTYPE),
        zeros,
        tl.zeros([TILE.ROWS, TILE.DEPTH], TILE.DTYPE),
        zeros,
        zeros,
    )


@triton.jit(do_not_specialize=["n", "m", "per_split", "diagonal"])
def log_sums(
    similarities,
    row_classes_ptr,  # [n_padded], or None
    column_classes_ptr,  # [m_padded], or None
    log_sums_ptr,  # [n_splits, n_padded]
    alike_ptr,  # [n_splits, n_padded], Σ_j S_ij over the pairs of one class; None without classes
    values_ptr,  # [n_splits, n_padded, DEPTH], or None
    n,
    n_padded,
    m,
    per_split,
    diagonal,
    TILE,
    TWO_VIEWS: tl.constexpr,
):
    """Compute log2 Σ_j exp2 S_ij; program (tile of rows, split of the columns).

    The values are Σ_j softmax_j(S_ij) g_j y_j over the columns of the split.
    """
    row, split = tl.program_id(0) * TILE.ROWS, tl.program_id(1)
    low, high = columns_of_split(split, per_split, m)
    rows = row + tl.arange(0, TILE.ROWS)
    block = load_block(similarities, row, TILE)
    views = None
    if TWO_VIEWS:
        views = two_views(n, m, diagonal, False)
    row_classes = None
    if row_classes_ptr is not None:
        row_classes = tl.load(row_classes_ptr + rows)
    sums = fold_tiles(
        no_sums(TILE),
        SumOperands(
            similarities, block, column_classes_ptr, row_classes,
            values_ptr is not None,
        ),
        row, low, high, Mask(n, m, diagonal, views, False), add_exponentials, TILE,
    )  # fmt: skip
    tl.store(log_sums_ptr + split * n_padded + rows, sums.largest + tl.log2(sums.total))
    if alike_ptr is not None:
        tl.store(alike_ptr + split * n_padded + rows, sums.alike)
    if values_ptr is not None:
        total = lift(tl.where(sums.total == 0, 1.0, sums.total), block.x.dtype)
        store_values(values_ptr, sums.weighted / total[:, None], split, n_padded, row, TILE)


@triton.jit
def _log1p(y, DTYPE: tl.constexpr):
    """Return log(1 + y) for y from 0 to 1.

    log2(1 + y) would lose the digits of a small y.
    """
    if DTYPE == tl.float64:
        return tl.log(1 + y)
    p = y * 0.0052534578 - 0.0295885074  # Chebyshev, with an error of 2e-7 of the result
    p = p * y + 0.078361668
    p = p * y - 0.136747697
    p = p * y + 0.191114311
    p = p * y - 0.248443699
    p = p * y + 0.333192713
    p = p * y - 0.499995015
    return (p * y + 0.999999971) * y


@triton.jit
def _sigmoid(x):
    """Return the sigmoid of numbers in units of log2, and exp −|x|."""
    y = tl.exp2(-tl.abs(x))
    return tl.where(x >= 0, 1.0, y) / (1 + y), y


@triton.jit
def softplus(odds, DTYPE: tl.constexpr):
    """Return the softplus of numbers in units of log2, in units of log, and its slope."""
    sigmoid, y = _sigmoid(odds)
    return tl.maximum(odds, 0.0) * LN2 + _log1p(y, DTYPE), sigmoid


class _Softplus(NamedTuple):
    total: Any  # [ROWS], Σ_j softplus(S_ij − a_i)
    slopes: Any  # [ROWS], Σ_j of its slopes
    weighted: Any  # [ROWS, DEPTH], Σ_j slope_ij g_j y_j


class _SoftplusOperands(NamedTuple):
    similarities: Any
    block: Any
    positive_logits: Any  # [ROWS]
    WEIGHTED: Any


@triton.jit
def _add_softplus(sums, operands, row, column, mask, MASKED: tl.constexpr, TILE):
    y, s = load_tile(operands.similarities, operands.block, column, TILE)
    odds = s - operands.positive_logits[:, None]
    if MASKED:
        odds = masked(odds, row, column, mask, TILE)
    penalty, sigmoid = softplus(odds, TILE.DTYPE)
    total, slopes = sums.total + tl.sum(penalty, 1), sums.slopes + tl.sum(sigmoid, 1)
    weighted = sums.weighted
    if operands.WEIGHTED:
        weights = lift(sigmoid, y.dtype)
        weighted = add_weighted(weighted, weights, y, operands.similarities.y, column, TILE)
    return _Softplus(total, slopes, weighted)


@triton.jit(do_not_specialize=["n", "m", "per_split", "diagonal"])
def softplus_sums(
    similarities,
    positive_logits_ptr,  # a, [n]
    sums_ptr,  # [n_splits, n_padded]
    slopes_ptr,  # [n_splits, n_padded]
    values_ptr,  # [n_splits, n_padded, DEPTH], or None
    n,
    n_padded,
    m,
    per_split,
    diagonal,
    TILE,
):
    """Compute Σ_j softplus(S_ij − a_i) and Σ_j of its slopes; program (tile of rows, split).

    The values are Σ_j slope_ij g_j y_j.
    """
    row, split = tl.program_id(0) * TILE.ROWS, tl.program_id(1)
    low, high = columns_of_split(split, per_split, m)
    rows = row + tl.arange(0, TILE.ROWS)
    block = load_block(similarities, row, TILE)
    positive_logits = tl.load(positive_logits_ptr + rows, mask=rows < n, other=0.0)
    positive_logits = positive_logits.to(TILE.DTYPE) * LOG2E
    sums = _Softplus(
        tl.zeros([TILE.ROWS], TILE.DTYPE),
        tl.zeros([TILE.ROWS], TILE.DTYPE),
        tl.zeros([TILE.ROWS, TILE.DEPTH], TILE.DTYPE),
    )
    sums = fold_tiles(
        sums, _SoftplusOperands(similarities, block, positive_logits, values_ptr is not None),
        row, low, high, Mask(n, m, diagonal, None, False), _add_softplus, TILE,
    )  # fmt: skip
    tl.store(sums_ptr + split * n_padded + rows, sums.total)
    tl.store(slopes_ptr + split * n_padded + rows, sums.slopes)
    if values_ptr is not None:
        one = lift(tl.full([], 1.0, TILE.DTYPE), block.x.dtype)
        store_values(values_ptr, sums.weighted / one, split, n_padded, row, TILE)


class _SlopeOperands(NamedTuple):
    similarities: Any
    block: Any
    classes: Any  # `Classes`, or None
    row_classes: Any  # [ROWS]
    attractions: Any  # [ROWS]; None: rows attract nothing
    row_shifts: Any  # [ROWS], or None
    column_shifts_ptr: Any
    weights_ptr: Any
    COLUMNS_ATTRACT: Any


@triton.jit
def _add_slopes(values, operands, row, column, mask, MASKED: tl.constexpr, TILE):
    y, s = load_tile(operands.similarities, operands.block, column, TILE)
    if MASKED:
        s = masked(s, row, column, mask, TILE)
    places = column + tl.arange(0, TILE.COLUMNS)
    if operands.weights_ptr is not None:
        slopes, _ = _sigmoid(s - tl.load(operands.column_shifts_ptr + places)[None, :])
        slopes *= tl.load(operands.weights_ptr + places)[None, :]
    else:
        slopes = tl.zeros([TILE.ROWS, TILE.COLUMNS], TILE.DTYPE)
        if operands.column_shifts_ptr is not None:
            slopes += tl.exp2(s - tl.load(operands.column_shifts_ptr + places)[None, :])
        if operands.row_shifts is not None:
            slopes += tl.exp2(s - operands.row_shifts[:, None])
        if operands.classes is not None:
            same = same_class(s, operands.row_classes, operands.classes.y_ptr, column, MASKED, TILE)
            if operands.attractions is not None:
                slopes = tl.where(same, slopes - operands.attractions[:, None], slopes)
            if operands.COLUMNS_ATTRACT:
                of_columns = tl.load(operands.classes.attractions_ptr + places)
                slopes = tl.where(same, slopes - of_columns[None, :], slopes)
    return add_weighted(values, slopes, y, operands.similarities.y, column, TILE)


@triton.jit(do_not_specialize=["n", "m", "per_split", "diagonal"])
def weighed_sums(
    similarities,
    classes,  # Classes, or None
    row_shifts_ptr,  # [n_padded], or None
    column_shifts_ptr,  # [m_padded], or None
    weights_ptr,  # [m_padded], or None
    values_ptr,  # [n_splits, n_padded, DEPTH]
    n,
    n_padded,
    m,
    per_split,
    diagonal,
    TILE,
    TWO_VIEWS: tl.constexpr,
    OF_KEYS: tl.constexpr,  # whether rows are keys, and columns queries
    ROWS_ATTRACT: tl.constexpr,
    COLUMNS_ATTRACT: tl.constexpr,
):
    """Compute Σ_j G_ij g_j y_j; program (tile of rows, split of the columns).

    G_ij = exp2(S_ij − column_shift_j) + exp2(S_ij − row_shift_i), with the shifts that there are,
    minus attraction_i, attraction_j or both for each pair of one class; with weights it is
    weight_j σ(S_ij − column_shift_j).
    """
    row, split = tl.program_id(0) * TILE.ROWS, tl.program_id(1)
    low, high = columns_of_split(split, per_split, m)
    block = load_block(similarities, row, TILE)
    lanes = tl.arange(0, TILE.ROWS)
    views, row_classes, attractions, row_shifts = None, None, None, None
    if classes is not None:
        row_classes = tl.load(classes.x_ptr + row + lanes)
        if ROWS_ATTRACT:
            attractions = tl.load(classes.attractions_ptr + row + lanes)
    if TWO_VIEWS:
        views = two_views(n, m, diagonal, OF_KEYS)
    if row_shifts_ptr is not None:
        row_shifts = tl.load(row_shifts_ptr + row + lanes)
    values = tl.zeros([TILE.ROWS, TILE.DEPTH], TILE.DTYPE)
    values = fold_tiles(
        values,
        _SlopeOperands(
            similarities, block, classes, row_classes, attractions, row_shifts,
            column_shifts_ptr, weights_ptr, COLUMNS_ATTRACT,
        ),
        row, low, high, Mask(n, m, diagonal, views, False), _add_slopes, TILE,
    )  # fmt: skip
    store_values(values_ptr, values, split, n_padded, row, TILE)
