"""Tiles of what several teachers say of rows, put together in registers.

A mixture p̄ = Σ w_k p_k becomes logits log2 p̄, and whatever the teachers are to be, their sum, their
choice or a mixture, is a tile of logits like that of one teacher. Teachers come as tuples, of which
a kernel is compiled for each length; one of weight 0 is not read.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.tiles import INFINITY, log2


class Committee(NamedTuple):
    """The teachers of a row, or of a column of rows, what each has in tuples."""

    rows: tuple  # pointers to their rows
    shares: tuple  # their weights
    tops: tuple  # in a mixture their largest logits, otherwise anything
    shifts: tuple  # in a mixture log2(weight / Z), −∞ of a weight of 0
    index: tl.tensor  # the place of the chosen one
    unit: tl.tensor  # log2(e) / T


@triton.jit
def weights_of_rows(
    weights_ptr, rows, exists, row_stride, teacher_stride, K: tl.constexpr,
    IS_MIXTURE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return a tuple of the K teachers' weights in rows; those of a mixture add up to 1."""
    found = ()
    total = tl.zeros(rows.shape, DTYPE)
    for k in tl.static_range(K):
        if weights_ptr is None:
            weight = tl.full(rows.shape, 1 / K, DTYPE)
        else:
            place = weights_ptr + rows.to(tl.int64) * row_stride + k * teacher_stride
            weight = tl.load(place, exists, 0.0).to(DTYPE)
        total += weight
        found += (weight,)
    if IS_MIXTURE and weights_ptr is not None:
        shares = ()
        for k in tl.static_range(K):
            shares += (found[k] / total,)
        return shares
    return found


@triton.jit
def join(a, b, LOGS: tl.constexpr, FAST: tl.constexpr):
    """Return the sum of parts of a mixture or, of LOGS to base 2, its logarithm.

    That of two −∞ is −∞, and a comparison lets a NaN stay one.
    """
    if not LOGS:
        return a + b
    higher, lower = tl.where(a > b, a, b), tl.where(a > b, b, a)
    above = log2(1 + tl.exp2(lower - higher), FAST)
    return tl.where(higher == -INFINITY, higher, higher + above)


@triton.jit
def mixture_tile(
    of, columns, inside, LOGS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Return log2 Σ w p of a tile of a Committee whose softmaxes are known.

    Without LOGS a probability that float has no number for is taken for 0.
    """
    for k in tl.static_range(len(of.rows)):
        z = tl.load(of.rows[k] + columns, inside & (of.shares[k] != 0), -INFINITY).to(DTYPE)
        part = (z - of.tops[k]) * of.unit + of.shifts[k]
        if not LOGS:
            part = tl.exp2(part)
        if k == 0:
            found = part
        else:
            found = join(found, part, LOGS, FAST)
    return found if LOGS else log2(found, FAST)


@triton.jit
def teacher_tile(
    of, columns, inside, TERM: tl.constexpr, COMBINE: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Return a tile of the logits of teacher TERM, of a "sum", or of all, −∞ outside.

    A weight of 0 adds nothing to the weighted "logits", even of −∞. Of "chosen" rows that of the
    index alone is read, and they are NaN where nobody is chosen.
    """
    if COMBINE == "sum":
        read = inside & (of.shares[TERM] != 0)
        return tl.load(of.rows[TERM] + columns, read, -INFINITY).to(DTYPE)
    if COMBINE == "logits":
        for k in tl.static_range(len(of.rows)):
            read = inside & (of.shares[k] != 0)
            part = tl.load(of.rows[k] + columns, read, 0.0).to(DTYPE) * of.shares[k]
            if k == 0:
                found = part
            else:
                found += part
        return tl.where(inside, found, -INFINITY)
    found = tl.where(inside, float("nan"), -INFINITY).to(DTYPE)
    for k in tl.static_range(len(of.rows)):
        is_chosen = inside & (of.index == k)
        z = tl.load(of.rows[k] + columns, is_chosen, -INFINITY).to(DTYPE)
        found = tl.where(is_chosen, z, found)
    return found
