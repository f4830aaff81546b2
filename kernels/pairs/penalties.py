"""The loss of `Pairs` from the sums of rows and of columns, and its slopes in them.

One program does it, because the loss and the largest slope are of all rows, and another launch
would cost a small batch more. It moves 40 bytes for each row and 40 for each column. For 65,536 of
both that is 5 MB, which one multiprocessor with 48 KB on their way moves in some 0.1 ms (modelled):
2 % of the step with embeddings of 64 numbers, and less with wider ones. The formulas are those of
`penalty` and `column_penalty` in fastkd.problems.pairs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.pairs.sweeps import softplus
from fastkd.kernels.pairs.tiles import LOWEST
from fastkd.kernels.tiles import INFINITY, LN2, LOG2E
from fastkd.problems import pairs as problems

HEADROOM = tl.constexpr(problems.HEADROOM)
IGNORED = tl.constexpr(problems.IGNORED)


class Positives(NamedTuple):
    """Positive logits: `ptr` times the scale if there is one."""

    ptr: Any  # [n]
    scale_ptr: Any  # 0-dim, or None


class Examples(NamedTuple):
    """The log-sum-exps, positive logits and weights of rows, or of columns."""

    log_sums_ptr: Any  # [n], in units of log2
    positives: Positives | None  # None with classes
    weights_ptr: Any  # [n]
    shifts_ptr: Any  # [n_padded], out: what exponents lack, ∞ where there is nothing to add


class ClassSums(NamedTuple):
    """The sums that give the positive logits of queries whose classes have several keys."""

    labels_ptr: Any  # [n]
    counts_ptr: Any  # [n], keys of the query's class
    alike_ptr: Any  # [n_splits, n_padded], Σ_j S_ij over the pairs of one class, in units of log2
    pulls_ptr: Any  # [n_padded], out: what is subtracted from the slopes of those pairs
    AMONG_KEYS: Any  # whether queries are among the keys, and count; all are tl.constexpr
    OVER_ANCHORS: Any  # whether weights are divided by their sum over queries with positive keys
    DOUBLE: Any  # whether each pair is met from both sides


@triton.jit
def class_numbers(
    labels_ptr,  # [n]
    key_labels_ptr,  # [m]
    numbers_ptr,  # [n_padded], out: the place of the first key of the label; m if there is none
    counts_ptr,  # [n], out: how many keys have the label
    n,
    m,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute numbers for the classes of labels, without a sort; program (ROWS labels).

    It takes n · m comparisons, a few of the 2 D instructions that a similarity costs. What follows
    the last label gets −1.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exist = rows < n
    labels = tl.load(labels_ptr + rows, mask=exist, other=0)
    first, count = tl.zeros([ROWS], tl.int32) + m, tl.zeros([ROWS], tl.int32)
    for column in range(0, m, COLUMNS):
        places = column + tl.arange(0, COLUMNS)
        of_keys = tl.load(key_labels_ptr + places, mask=places < m, other=0)
        same = (labels[:, None] == of_keys[None, :]) & (places < m)[None, :]
        first = tl.minimum(first, tl.min(tl.where(same, places[None, :], m), 1))
        count += tl.sum(same.to(tl.int32), 1)
    numbers = tl.where(exist, first, -1).to(numbers_ptr.dtype.element_ty)
    tl.store(numbers_ptr + rows, numbers)
    tl.store(counts_ptr + rows, count.to(counts_ptr.dtype.element_ty), mask=exist)


@triton.jit
def _positives(positives, places, exist, DTYPE: tl.constexpr):
    logits = tl.load(positives.ptr + places, mask=exist, other=0.0).to(DTYPE)
    if positives.scale_ptr is not None:
        logits *= tl.load(positives.scale_ptr).to(DTYPE)
    return logits


class _Odds(NamedTuple):
    log_sums: Any  # in units of log2
    odds: Any  # what the penalty is of, in units of log
    weights: Any
    n_positives: Any  # keys of a query's class, or 1


@triton.jit
def _odds_of_rows(
    parts_ptr, rows, classes, places, exist, n_padded, n_splits,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    log_sums = _merge(parts_ptr, places, exist, n_padded, n_splits, BLOCK, DTYPE)
    weights = tl.load(rows.weights_ptr + places, mask=exist, other=0.0).to(DTYPE)
    if classes is not None:
        count = tl.load(classes.counts_ptr + places, mask=exist, other=0.0) - classes.AMONG_KEYS
        labels = tl.load(classes.labels_ptr + places, mask=exist, other=IGNORED)
        n_positives = tl.where(labels == IGNORED, 0.0, count)
        alike = tl.zeros([BLOCK], DTYPE)
        for split in range(n_splits):
            alike += tl.load(classes.alike_ptr + split * n_padded + places, mask=exist, other=0.0)
        odds = (log_sums - alike / tl.maximum(n_positives, 1.0)) * LN2
        # the positive pairs are among all: rounding alone is below 0
        odds = tl.where(odds < 0, 0.0, odds)
        weights = tl.where(n_positives > 0, weights, 0.0)
    else:
        n_positives = tl.full([BLOCK], 1.0, DTYPE)
        odds = log_sums * LN2 - _positives(rows.positives, places, exist, DTYPE)
    return _Odds(log_sums, odds, weights, n_positives)


@triton.jit
def _odds_of_columns(columns, places, exist, DTYPE: tl.constexpr):
    log_sums = tl.load(columns.log_sums_ptr + places, mask=exist, other=0.0)
    weights = tl.load(columns.weights_ptr + places, mask=exist, other=0.0).to(DTYPE)
    logits = _positives(columns.positives, places, exist, DTYPE)
    return _Odds(log_sums, log_sums * LN2 - logits, weights, weights)


@triton.jit
def _penalty(odds, exist, SOFTPLUS: tl.constexpr, DTYPE: tl.constexpr):
    """Return weighted losses and their slopes in the log-sum-exps, 0 for what does not exist."""
    losses, slopes = odds.odds, odds.weights
    if SOFTPLUS:
        losses, sigmoid = softplus(odds.odds * LOG2E, DTYPE)
        slopes = sigmoid * odds.weights
    return tl.where(exist, losses * odds.weights, 0.0), tl.where(exist, slopes, 0.0)


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
    classes,  # ClassSums, or None
    loss_ptr,  # 0-dim, out
    slopes_ptr,  # [n], out: in the log-sum-exps of rows
    of_positives_ptr,  # [n], out: in the positive logits
    most_ptr,  # 0-dim, out: the largest slope, times 2^-HEADROOM
    n,
    n_padded,
    n_splits,
    n_columns,
    n_columns_padded,
    first,
    HAS_COLUMNS: tl.constexpr,  # because older compilers compare no tuple with a None in it
    SOFTPLUS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Compute the loss of queries, and of their keys' columns, and all that the gradients need."""
    total, most = tl.zeros([BLOCK], DTYPE), tl.zeros([BLOCK], DTYPE)
    weight = tl.zeros([BLOCK], DTYPE)
    for start in range(0, n, BLOCK):
        places = start + tl.arange(0, BLOCK)
        exist = places < n
        odds = _odds_of_rows(
            parts_ptr, rows, classes, places, exist, n_padded, n_splits, BLOCK, DTYPE
        )
        losses, slopes = _penalty(odds, exist, SOFTPLUS, DTYPE)
        total, most = total + losses, tl.maximum(most, slopes)
        weight += tl.where(exist, odds.weights, 0.0)
        tl.store(rows.log_sums_ptr + places, odds.log_sums, mask=exist)
        tl.store(slopes_ptr + places, slopes, mask=exist)
        of_positives = -slopes
        if HAS_COLUMNS:
            of_columns = _odds_of_columns(columns, first + places, exist, DTYPE)
            losses, slopes = _penalty(of_columns, exist, SOFTPLUS, DTYPE)
            total, of_positives = total + losses, of_positives - slopes
        tl.store(of_positives_ptr + places, of_positives, mask=exist)
    if HAS_COLUMNS:
        for start in range(0, n_columns, BLOCK):
            places = start + tl.arange(0, BLOCK)
            exist = places < n_columns
            of_columns = _odds_of_columns(columns, places, exist, DTYPE)
            _, slopes = _penalty(of_columns, exist, SOFTPLUS, DTYPE)
            most = tl.maximum(most, slopes)
    largest, divisor = tl.max(most, 0), tl.full([], 1.0, DTYPE)
    if classes is not None:
        if classes.OVER_ANCHORS:
            divisor = tl.maximum(tl.sum(weight, 0), 1e-37)
    tl.store(loss_ptr, tl.sum(total, 0) / divisor)
    tl.store(most_ptr, largest / divisor * 2.0**-HEADROOM)
    for start in range(0, n_padded, BLOCK):
        places = start + tl.arange(0, BLOCK)
        exist = places < n
        odds = _odds_of_rows(
            parts_ptr, rows, classes, places, exist, n_padded, n_splits, BLOCK, DTYPE
        )
        _, slopes = _penalty(odds, exist, SOFTPLUS, DTYPE)
        _store_shifts(rows.shifts_ptr, odds.log_sums, slopes, largest, places, n_padded)
        if classes is not None:
            lifted = slopes / tl.maximum(odds.n_positives, 1.0) / (largest * 2.0**-HEADROOM)
            pulls = tl.where(slopes == 0, 0.0, lifted)
            pulls *= 2.0 if classes.DOUBLE else 1.0
            tl.store(classes.pulls_ptr + places, pulls, mask=places < n_padded)
    if HAS_COLUMNS:
        for start in range(0, n_columns_padded, BLOCK):
            places = start + tl.arange(0, BLOCK)
            exist = places < n_columns
            of_columns = _odds_of_columns(columns, places, exist, DTYPE)
            _, slopes = _penalty(of_columns, exist, SOFTPLUS, DTYPE)
            _store_shifts(
                columns.shifts_ptr, of_columns.log_sums, slopes, largest, places, n_columns_padded
            )


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
