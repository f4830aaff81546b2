"""Device code of labels: what a row's target is, its cross-entropy and the slope of that.

The target of a row is t = w ((1 − ε) label + ε / V), where the label is a class or any numbers.
With S = Σ t its cross-entropy at T = 1 is −Σ t log q = S log Z − Σ t d, and the slope S q − t. Of
all t the class of a label has one number of its own, (1 − ε) w. The rest are the shares, which all
classes have of soft and of smoothed labels: soft labels and w are read where the logits are.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.rows.terms import entry_of, log2_odds, sigmoid, softplus
from fastkd.kernels.tiles import LN2, at_boundary, row_offset


class Target(NamedTuple):
    """Pointers to what the shares of a row's classes are made of; None for what there is not.

    Kernels make it themselves, because functions of Triton 3.4 return no None in a tuple.
    """

    soft: tl.tensor  # soft labels, from the first boundary of the row on
    weights: tl.tensor  # w, of the classes from there on
    smoothing: tl.tensor  # ε, which is no pointer


class Spread(NamedTuple):
    """Sums over the shares of the classes that a thread, a split or a row has read."""

    seen: tl.tensor  # Σ share · (z_student − ms)
    sum: tl.tensor  # Σ share


@triton.jit
def label_of(rows, exists, unmasked, labels_ptr, soft):
    """Return the labels of rows, −1 where there is none; class 0 stands for soft ones."""
    label = -1
    if labels_ptr is not None:
        fill = None if exists is None else -1
        label = tl.load(labels_ptr + rows, exists, fill).to(tl.int64)
    elif soft is not None:
        label = tl.where(unmasked, 0, -1)
    return label


@triton.jit
def own_of(label, soft, class_weights, smoothing, n_cols, DTYPE: tl.constexpr):
    """Return what the class of a label has of the target besides its share."""
    own = 1.0
    if soft is not None:
        own = 0.0
    else:
        if smoothing is not None:
            own = 1 - smoothing
        if class_weights is not None:
            own *= entry_of(class_weights.ptr, label, n_cols, DTYPE)
    return own


@triton.jit
def from_boundary(row, view, inner, head, CONGRUENT: tl.constexpr):
    """Return a pointer to a row's first boundary, which `head` elements precede; None of None."""
    found = None
    if view is not None:
        found = at_boundary(view.ptr, row_offset(row, inner, view) + head, CONGRUENT)
    return found


@triton.jit
def load_shares(target, columns, mask, n_cols, DTYPE: tl.constexpr):
    """Return the shares of a tile's classes, 0 outside the mask; None if labels have them alone."""
    fill = None if mask is None else 0.0
    shares = None
    if target.smoothing is not None:
        shares = tl.zeros(columns.shape, DTYPE) + target.smoothing / n_cols
        if mask is not None:
            shares = tl.where(mask, shares, 0.0)
    if target.soft is not None:
        soft = tl.load(target.soft + columns, mask=mask, other=fill).to(DTYPE)
        if target.smoothing is not None:
            shares += soft * (1 - target.smoothing)
        else:
            shares = soft
    if (target.weights is not None) and (shares is not None):
        shares *= tl.load(target.weights + columns, mask=mask, other=fill).to(DTYPE)
    return shares


@triton.jit
def spread_of(above, shares):
    """Return the Spread of a tile whose logits are `above` the pivots."""
    products = tl.where(shares == 0, 0.0, shares * above)  # 0 · ∞ counts as 0
    return Spread(tl.sum(products, 1), tl.sum(shares, 1))


@triton.jit
def fold_spread(x, shares, before, after, spread):
    """Add the logits x [R, K], which have raised the pivots from `before` to `after`."""
    # unchanged, because Triton's compiler fails at the sum of what a loop has just loaded
    shares = tl.where(shares == 0, 0.0, shares)
    found = spread_of(x - after[:, None], shares)
    seen = spread.seen - spread.sum * (after - before)
    return Spread(seen + found.seen, spread.sum + found.sum)


@triton.jit
def merge_spread(before, after, spread):
    """Return the sums of a row, whose pivot is `after`, from those of threads or splits."""
    return Spread(tl.sum(spread.seen - spread.sum * (after - before), 0), tl.sum(spread.sum, 0))


@triton.jit
def cross_entropy(
    student_row, label, own, spread, n_cols, c1, ms, z1, HAS_SHARES: tl.constexpr,
    APART: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return −Σ t log softmax(student) at T = 1, and S, which its slope needs.

    Where the label is set APART, the latter is 1 less its softmax. Rows without a label have 0, and
    so have those without a target, whatever they hold; a label out of range gives a NaN.
    """
    x = entry_of(student_row, label, n_cols, DTYPE)
    if APART:
        odds = log2_odds(x, ms, z1, c1)
        left = sigmoid(-odds)
        return tl.where(label < 0, 0.0, softplus(-odds) * LN2), tl.where(label < 0, 0.0, left)
    seen, total = tl.where(own == 0, 0.0, own * (x - ms)), own
    if HAS_SHARES:
        seen, total = seen + spread.seen, total + spread.sum
    ce = (tl.log2(z1) * total - seen * c1) * LN2
    return tl.where((label < 0) | (total == 0), 0.0, ce), tl.zeros_like(ce) + total


@triton.jit
def label_slopes(x, shares, columns, units, row, factors, target, APART: tl.constexpr):
    """Return the gradient of the cross-entropy, of a tile."""
    factor, total = factors.cross_entropy, 1
    if (target.soft is not None) or (target.weights is not None):
        total = row.left
        factor = tl.where(total == 0, 0.0, factor)
    distance = tl.exp2((x - row.ms) * units.c1) * (total / row.z1)
    distance -= tl.where(columns == factors.label, factors.own, 0.0)
    if shares is not None:
        distance -= shares
    scaled = factor * row.left if APART else factor
    return tl.where(factor == 0, 0.0, distance * scaled)
