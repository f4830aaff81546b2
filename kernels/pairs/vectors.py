"""Rows of embeddings before and after the sweeps: x → x / ‖x‖ as products want it, and gradients.

With v_i the sum over all pairs of row i of their slopes times the other embedding, and u = x / ‖x‖,
the gradient in x is scale · (v − ⟨u, v⟩ u) / ‖x‖. The pair of a row with its positive partner is
masked in the sweeps and joins v here. `lay_out` reads an embedding, and its partner, and writes
it once; `gradients` reads both again, with the sums of all splits, and writes the gradient.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.pairs.tiles import LOWEST, partners
from fastkd.problems import pairs as problems

SHORTEST = tl.constexpr(problems.SHORTEST)


class Sources(NamedTuple):
    """Embeddings as they came, and what they are the partners of."""

    ptr: Any  # [n, stride]
    TWO_VIEWS: Any  # as in `partners`; both are tl.constexpr
    OF_KEYS: Any


class Shares(NamedTuple):
    """Factors of the sums of the splits, u_i exp2(part_i − n_i) of each."""

    parts_ptr: Any  # [n_splits, n_padded], log-sum-exps of the splits in units of log2
    log_sums_ptr: Any  # n, [n], over all splits


@triton.jit
def _load(ptr, rows, exist, width, stride, DEPTH: tl.constexpr, DTYPE: tl.constexpr):
    columns = tl.arange(0, DEPTH)[None, :]
    places = rows.to(tl.int64)[:, None] * stride + columns
    return tl.load(ptr + places, mask=exist[:, None] & (columns < width), other=0.0).to(DTYPE)


@triton.jit
def _lengths(x):
    return tl.maximum(tl.sqrt(tl.sum(x * x, 1)), tl.full([], SHORTEST, x.dtype))


@triton.jit
def _halves(x, lengths):
    """Return rows of float16 at a length near 1, because products overflow otherwise, and factors.

    For a length of 0 any factor will do.
    """
    exponents = (lengths.to(tl.int32, bitcast=True) >> 23) - 126  # length / 2^exponent is below 1
    down = ((127 - exponents) << 23).to(tl.float32, bitcast=True)
    up = ((127 + exponents) << 23).to(tl.float32, bitcast=True)
    return x * down[:, None], tl.minimum(up / lengths, 2.0)


@triton.jit(do_not_specialize=["n", "n_queries", "first"])
def lay_out(
    rows_ptr,  # [n, stride]
    matrix_ptr,  # [n_padded, DEPTH]
    factors_ptr,  # [n_padded], or None
    partner,  # Sources, or None
    cosines_ptr,  # [n], of rows and partners, or None
    n,
    width,
    stride,
    partner_stride,
    n_queries,
    first,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write rows in the precision of the products, zeros up to whole tiles; program (ROWS rows).

    Rows are divided by their lengths if NORMALIZE: in half precision by factors, so that they are
    not rounded.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exist = rows < n
    x = _load(rows_ptr, rows, exist, width, stride, DEPTH, DTYPE)
    matrix, lengths = x, tl.full([ROWS], 1.0, DTYPE)
    if NORMALIZE:
        lengths = _lengths(x)
        if factors_ptr is None:
            matrix = x / lengths[:, None]
        else:
            factors = 1 / lengths
            if matrix_ptr.dtype.element_ty == tl.float16:
                matrix, factors = _halves(x, lengths)
            tl.store(factors_ptr + rows, tl.where(exist, factors, 0.0))
    places = rows.to(tl.int64)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    tl.store(matrix_ptr + places, matrix.to(matrix_ptr.dtype.element_ty))
    if cosines_ptr is not None:
        _, place, paired = partners(rows, n_queries, first, partner.TWO_VIEWS, partner.OF_KEYS)
        y = _load(partner.ptr, place, exist & paired, width, partner_stride, DEPTH, DTYPE)
        products = tl.sum(x * y, 1)
        if NORMALIZE:
            products /= lengths * _lengths(y)
        tl.store(cosines_ptr + rows, products, mask=exist)


@triton.jit(do_not_specialize=["n", "n_padded", "n_splits", "n_queries", "first"])
def gradients(
    rows_ptr,  # [n, stride]
    values_ptr,  # [n_splits, n_padded, DEPTH], Σ_j G_ij y_j over the columns of a split
    most_ptr,  # 0-dim, what all of them are multiplied by, or None
    weights_ptr,  # [n], what those of a row are multiplied by, or None
    shares,  # Shares, what those of a split are multiplied by, or None
    partner,  # Sources, or None
    slopes_ptr,  # [n_queries], of the similarities of queries to their positive partners, or None
    scale_ptr,  # 0-dim
    gradient_ptr,  # [n, width], or None
    along_ptr,  # [n], ⟨x_i, v_i⟩ of the normalised rows, or None
    n,
    n_padded,
    n_splits,
    width,
    stride,
    partner_stride,
    n_queries,
    first,
    IS_DOUBLE: tl.constexpr,  # rows are queries and keys, and a partner has a slope of its own
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Compute the gradients of rows; program (ROWS rows)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exist = rows < n
    total = tl.zeros([ROWS, DEPTH], DTYPE)
    for split in range(n_splits):
        places = split * n_padded + rows
        values = _load(values_ptr, places, exist, DEPTH, DEPTH, DEPTH, DTYPE)
        if shares is not None:
            log_sum = tl.load(shares.log_sums_ptr + rows, mask=exist, other=0.0)
            of_split = tl.load(shares.parts_ptr + places, mask=exist, other=0.0)
            values *= tl.exp2(of_split - tl.maximum(log_sum, LOWEST))[:, None]
        total += values
    if most_ptr is not None:
        total *= tl.load(most_ptr)
    if weights_ptr is not None:
        total *= tl.load(weights_ptr + rows, mask=exist, other=0.0).to(DTYPE)[:, None]
    if slopes_ptr is not None:
        query, place, paired = partners(rows, n_queries, first, partner.TWO_VIEWS, partner.OF_KEYS)
        paired &= exist
        y = _load(partner.ptr, place, paired, width, partner_stride, DEPTH, DTYPE)
        slopes = tl.load(slopes_ptr + query, mask=paired, other=0.0)
        if IS_DOUBLE:
            slopes += tl.load(slopes_ptr + place, mask=paired, other=0.0)
        if NORMALIZE:
            slopes /= _lengths(y)
        total += slopes[:, None] * y
    scale = tl.load(scale_ptr).to(DTYPE)
    x = _load(rows_ptr, rows, exist, width, stride, DEPTH, DTYPE)
    factors = tl.zeros([ROWS], DTYPE) + scale
    if NORMALIZE:
        lengths = _lengths(x)
        x /= lengths[:, None]
        factors = tl.where(lengths > tl.full([], SHORTEST, DTYPE), scale / lengths, 0.0)
    along = tl.sum(x * total, 1)
    if along_ptr is not None:
        tl.store(along_ptr + rows, along * 0.5 if IS_DOUBLE else along, mask=exist)
    if gradient_ptr is not None:
        if NORMALIZE:
            total -= along[:, None] * x
        columns = tl.arange(0, DEPTH)[None, :]
        places = rows.to(tl.int64)[:, None] * width + columns
        tl.store(
            gradient_ptr + places, total * factors[:, None],
            mask=exist[:, None] & (columns < width),
        )  # fmt: skip
