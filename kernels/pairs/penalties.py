"""The loss of `Pairs` from the sums of rows and of columns, and its slopes in them.

One program does it, because the loss and the largest slope are of all rows: with those of columns
2 (n + N) numbers of a split are read and 4 (n + N) written, once in 1024. The formulas are those of
`penalty` and `column_penalty` in fastkd.problems.pairs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.pairs.sweeps import softplus
from fastkd.kernels.pairs.tiles import LOWEST
from fastkd.kernels.tiles import INFINITY, LN2, LOG2E

HEADROOM = tl.constexpr(12)  # as in fastkd.problems.pairs


class Positives(NamedTuple):
    """Positive logits: `ptr` times the scale if there is one."""

    ptr: Any  # [n]
    scale_ptr: Any  # 0-dim, or None


class Examples(NamedTuple):
    """The log-sum-exps, positive logits and weights of rows, or of columns."""

    log_sums_ptr: Any  # [n], in units of log2
    positives: Positives
    weights_ptr: Any  # [n]
    shifts_ptr: Any  # [n_padded], out: what exponents lack, ∞ where there is nothing to add


@triton.jit
def _positives(positives, places, exist, DTYPE: tl.constexpr):
    logits = tl.load(positives.ptr + places, mask=exist, other=0.0).to(DTYPE)
    if positives.scale_ptr is not None:
        logits *= tl.load(positives.scale_ptr).to(DTYPE)
    return logits


@triton.jit
def _penalty(
    examples, log_sums, places, exist, SOFTPLUS: tl.constexpr, CLASSES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the weighted losses of these examples and their slopes in the log-sum-exps."""
    odds = log_sums * LN2 - _positives(examples.positives, places, exist, DTYPE)
    weights = tl.load(examples.weights_ptr + places, mask=exist, other=0.0).to(DTYPE)
    if CLASSES:  # the positive pairs are among all: rounding alone is below 0
        odds = tl.where(odds < 0, 0.0, odds)
    losses, slopes = odds, weights
    if SOFTPLUS:
        losses, sigmoid = softplus(odds * LOG2E, DTYPE)
        slopes = sigmoid * weights
    return tl.where(exist, losses * weights, 0.0), tl.where(exist, slopes, 0.0)


@triton.jit
def _log_sums_of_columns(examples, places, exist):
    return tl.load(examples.log_sums_ptr + places, mask=exist, other=0.0)


@triton.jit
def _store_shifts(shifts_ptr, log_sums, slopes, most, places, n_padded):
    """Store c with exp2(S − c) = 2^HEADROOM · slope · softmax / most, for S in units of log2."""
    shifts = log_sums - tl.log2(slopes / most) - HEADROOM
    shifts = tl.where(slopes == 0, INFINITY, shifts)
    tl.store(shifts_ptr + places, shifts, mask=places < n_padded)


@triton.jit(
    do_not_specialize=[
        "n", "n_padded", "n_splits", "n_columns", "n_columns_padded", "first",
    ]
)  # fmt: skip
def log_sum_penalties(
    parts_ptr,  # [n_splits, n_padded], log-sum-exps of rows over the columns of a split
    rows,  # Examples
    columns,  # Examples, or None
    attractions_ptr,  # [n], or None
    loss_ptr,  # 0-dim, out
    slopes_ptr,  # [n], out: in the log-sum-exps of rows
    of_positives_ptr,  # [n], out: in the positive logits
    most_ptr,  # 0-dim, out: the largest slope, times 2^-HEADROOM
    pulls_ptr,  # [n_padded], out: attractions in units of it, `PULL` times
    n,
    n_padded,
    n_splits,
    n_columns,
    n_columns_padded,
    first,
    SOFTPLUS: tl.constexpr,
    PULL: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Compute the loss of queries, and of their keys' columns, and all that the gradients need."""
    CLASSES: tl.constexpr = attractions_ptr is not None
    total, most = tl.zeros([BLOCK], DTYPE), tl.zeros([BLOCK], DTYPE)
    for start in range(0, n, BLOCK):
        places = start + tl.arange(0, BLOCK)
        exist = places < n
        log_sums = _merge(parts_ptr, places, exist, n_padded, n_splits, BLOCK, DTYPE)
        losses, slopes = _penalty(rows, log_sums, places, exist, SOFTPLUS, CLASSES, DTYPE)
        total, most = total + losses, tl.maximum(most, slopes)
        tl.store(rows.log_sums_ptr + places, log_sums, mask=exist)
        tl.store(slopes_ptr + places, slopes, mask=exist)
        of_positives = -slopes
        if columns is not None:
            own = _log_sums_of_columns(columns, first + places, exist)
            losses, slopes = _penalty(columns, own, first + places, exist, SOFTPLUS, False, DTYPE)
            total, of_positives = total + losses, of_positives - slopes
        tl.store(of_positives_ptr + places, of_positives, mask=exist)
    if columns is not None:
        for start in range(0, n_columns, BLOCK):
            places = start + tl.arange(0, BLOCK)
            exist = places < n_columns
            log_sums = _log_sums_of_columns(columns, places, exist)
            _, slopes = _penalty(columns, log_sums, places, exist, SOFTPLUS, False, DTYPE)
            most = tl.maximum(most, slopes)
    largest = tl.max(most, 0)
    tl.store(loss_ptr, tl.sum(total, 0))
    tl.store(most_ptr, largest * 2.0**-HEADROOM)
    for start in range(0, n_padded, BLOCK):
        places = start + tl.arange(0, BLOCK)
        exist = places < n
        log_sums = _merge(parts_ptr, places, exist, n_padded, n_splits, BLOCK, DTYPE)
        _, slopes = _penalty(rows, log_sums, places, exist, SOFTPLUS, CLASSES, DTYPE)
        _store_shifts(rows.shifts_ptr, log_sums, slopes, largest, places, n_padded)
        if CLASSES:
            pulls = tl.load(attractions_ptr + places, mask=exist, other=0.0).to(DTYPE)
            pulls = tl.where(pulls == 0, 0.0, pulls * PULL / (largest * 2.0**-HEADROOM))
            tl.store(pulls_ptr + places, pulls, mask=places < n_padded)
    if columns is not None:
        for start in range(0, n_columns_padded, BLOCK):
            places = start + tl.arange(0, BLOCK)
            exist = places < n_columns
            log_sums = _log_sums_of_columns(columns, places, exist)
            _, slopes = _penalty(columns, log_sums, places, exist, SOFTPLUS, False, DTYPE)
            _store_shifts(columns.shifts_ptr, log_sums, slopes, largest, places, n_columns_padded)


@triton.jit
def _merge(parts_ptr, places, exist, n_padded, n_splits, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Return the log-sum-exps of rows over all splits, in units of log2."""
    largest, total = tl.full([BLOCK], LOWEST, DTYPE), tl.zeros([BLOCK], DTYPE)
    for split in range(n_splits):
        part = tl.load(parts_ptr + split * n_padded + places, mask=exist, other=0.0)
        risen = tl.maximum(largest, part)
        total = total * tl.exp2(largest - risen) + tl.exp2(part - risen)
        largest = risen
    return largest + tl.log2(total)


@triton.jit(do_not_specialize=["n", "n_padded", "n_splits"])
def pair_penalties(
    sums_ptr,  # [2, n_splits, n_padded], Σ_j softplus(S_ij − a_i) and Σ_j of its slopes
    thresholds_ptr,  # a, [n]
    weights_ptr,  # [n]
    positives,  # Positives, the similarities to the positive keys; None: there are none
    loss_ptr,  # 0-dim, out
    of_logits_ptr,  # [n], out: in the positive logits
    of_positives_ptr,  # [n], out: in the similarities to the positive keys
    most_ptr,  # 0-dim, out: the largest weight, times 2^-HEADROOM
    shifts_ptr,  # [n_padded], out: a in units of log2
    shares_ptr,  # [n_padded], out: weights in units of `most`
    n,
    n_padded,
    n_splits,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Compute Σ_i w_i (softplus(a_i − s_i) + Σ_j softplus(S_ij − a_i)) and its slopes."""
    total, most = tl.zeros([BLOCK], DTYPE), tl.zeros([BLOCK], DTYPE)
    for start in range(0, n, BLOCK):
        places = start + tl.arange(0, BLOCK)
        exist = places < n
        losses, slopes = tl.zeros([BLOCK], DTYPE), tl.zeros([BLOCK], DTYPE)
        for split in range(n_splits):
            part = sums_ptr + split * n_padded + places
            losses += tl.load(part, mask=exist, other=0.0)
            slopes += tl.load(part + n_splits * n_padded, mask=exist, other=0.0)
        weights = tl.load(weights_ptr + places, mask=exist, other=0.0).to(DTYPE)
        of_logits = -slopes * weights
        if positives is not None:
            thresholds = tl.load(thresholds_ptr + places, mask=exist, other=0.0).to(DTYPE)
            odds = thresholds - _positives(positives, places, exist, DTYPE)
            loss, sigmoid = softplus(odds * LOG2E, DTYPE)
            losses += loss
            of_logits += sigmoid * weights
            tl.store(of_positives_ptr + places, -sigmoid * weights, mask=exist)
        tl.store(of_logits_ptr + places, of_logits, mask=exist)
        total, most = total + tl.where(exist, losses * weights, 0.0), tl.maximum(most, weights)
    largest = tl.maximum(tl.max(most, 0), 1e-30)
    tl.store(loss_ptr, tl.sum(total, 0))
    tl.store(most_ptr, largest * 2.0**-HEADROOM)
    for start in range(0, n_padded, BLOCK):
        places = start + tl.arange(0, BLOCK)
        exist = places < n
        thresholds = tl.load(thresholds_ptr + places, mask=exist, other=0.0).to(DTYPE)
        weights = tl.load(weights_ptr + places, mask=exist, other=0.0).to(DTYPE)
        tl.store(shifts_ptr + places, thresholds * LOG2E, mask=places < n_padded)
        shares = weights / (largest * 2.0**-HEADROOM)
        tl.store(shares_ptr + places, shares, mask=places < n_padded)
