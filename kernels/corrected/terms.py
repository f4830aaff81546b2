"""Corrected rows of one tile of logits: their sums, their value and their slope.

With the label set apart, t its probability in the corrected teacher and p̂, q̂ the softmaxes among
the other classes,

    KL(corrected ‖ q) = KL of (t, 1 − t) and (q_label, 1 − q_label) + (1 − t) KL(p̂ ‖ q̂)
    slope             = q − (1 − t) p̂ of another class, q_label − t of the label

Sums go over the other classes, relative to the largest of their logits, as in `rows/terms.py`. So
1 / Z of the teacher is the largest of p̂, and where another class wins, t is given by that alone:
t / (1 − t) = (1 / Z + τ) / (1 − τ). No probability is 1 less another one: the logarithm of the odds
of t gives both. Without a teacher p̂ is uniform, and Z the number of the other classes.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.rows.terms import (
    LOWEST,
    Sums,
    decoupled,
    entry_of,
    fold,
    kl_value,
    log2_odds,
    sigmoid,
)
from fastkd.kernels.tiles import INFINITY, LOG2E


class Target(NamedTuple):
    """A corrected teacher's share of a row's label, and what is left to all other classes."""

    odds: tl.tensor  # log2 of t / (1 − t)
    left: tl.tensor  # 1 − t


class Row(NamedTuple):
    """Numbers of a row that its gradient needs besides the logits."""

    ms: tl.tensor  # pivot of the student
    of_student: tl.tensor  # what e is multiplied by, so that it is q
    mt: tl.tensor  # pivot of the teacher
    of_teacher: tl.tensor  # what e is multiplied by, so that it is the corrected teacher
    of_label: tl.tensor  # the slope of the label


@triton.jit
def no_sums(pivot, N: tl.constexpr, DTYPE: tl.constexpr):
    """Return the Sums [N] over no logits, with this number for a pivot of the teacher."""
    zeros = tl.zeros([N], DTYPE)
    return Sums(zeros + LOWEST, zeros, zeros + pivot, zeros, zeros, zeros, zeros)


@triton.jit
def reference_of(x):
    """Return a finite number that the logits [R, K] of rows, one of them or all, lie near."""
    top = tl.max(x, 1)
    return tl.where(top == -INFINITY, 0.0, top)


@triton.jit
def add(sums, x, y, is_counted, units, DIVERGENCE: tl.constexpr):
    """Return the sums [R] with the logits x, y [R, K], which are −∞ where they are not counted.

    Without a teacher, which is a DIVERGENCE of "", a is the sum of what the logits are below the
    reference that stands for a pivot of the teacher. It is the same for a whole row, so that it
    never changes, as pivots do.
    """
    if DIVERGENCE != "":
        return fold(x, y, units, sums, DIVERGENCE, False)
    ms = tl.maximum(sums.ms, tl.max(x, 1))
    shrink = tl.exp2((sums.ms - ms) * units.cs)
    zs = sums.zs * shrink + tl.sum(tl.exp2((x - ms[:, None]) * units.cs), 1)
    a = sums.a + tl.sum(tl.where(is_counted, sums.mt[:, None] - x, 0.0), 1)
    return Sums(ms, zs, sums.mt, sums.zt, a, sums.b, sums.z1)


@triton.jit
def whole(sums, n_cols, units, DIVERGENCE: tl.constexpr):
    """Return the sums of whole rows as of two networks, where the teacher may be uniform."""
    if DIVERGENCE != "":
        return sums
    n_others = (n_cols - 1).to(sums.zs.dtype)
    a = (n_others * (sums.ms - sums.mt) + sums.a) * units.cs
    zeros = tl.zeros_like(sums.zs)
    return Sums(sums.ms, sums.zs, zeros, zeros + n_others, a, zeros, zeros)


@triton.jit
def label_logit(row_ptr, label, n_cols, DTYPE: tl.constexpr):
    """Return the logit of the label, NaN of one that does not exist or has no softmax."""
    found = entry_of(row_ptr, label, n_cols, DTYPE)
    return tl.where(found == INFINITY, float("nan"), found)


@triton.jit
def target_of(label, sums, unit, correction, DIVERGENCE: tl.constexpr):
    """Return the Target of rows whose teacher gives the label this logit."""
    if DIVERGENCE == "":
        odds = correction * LOG2E + 0 * sums.zt
        return Target(odds, sigmoid(-odds))
    of_p = log2_odds(label, sums.mt, sums.zt, unit)
    # a row without a softmax goes the other way, where it gives NaN
    is_behind = (label < sums.mt) & (sums.zt > 0)
    lifted = tl.log2((1 + correction * sums.zt) / ((1 - correction) * sums.zt))
    kept = (1 - correction) * sums.zt / (1 + sums.zt)
    left = sigmoid(-of_p) - correction
    left = tl.where(left < 0, 0.0, left)  # compared so that a NaN stays
    raised = tl.log2((sigmoid(of_p) + correction) / left)
    raised = tl.where(left == 0, INFINITY, raised)
    return Target(tl.where(is_behind, lifted, raised), tl.where(is_behind, kept, left))


@triton.jit
def corrected(
    sums, units, student_label, teacher_label, correction, DIVERGENCE: tl.constexpr
):  # fmt: skip
    """Return the KL of whole rows from their sums and the logits of their labels, and their Row."""
    target = target_of(teacher_label, sums, units.ct, correction, DIVERGENCE)
    of_q = log2_odds(student_label, sums.ms, sums.zs, units.cs)
    among, _ = kl_value(sums.zs, sums.zt, sums.a, sums.b, correction, "forward_kl")
    # what is left of 0 wins; a student that leaves nothing is infinitely far by its odds alone
    among = tl.where((target.left == 0) | (sums.zs == 0), 0.0, target.left * among)
    value, of_label = decoupled(among, target.odds, of_q, 0.5)  # half of the sum
    e_label = tl.exp2((student_label - sums.ms) * units.cs)
    of_teacher = tl.where(target.left == 0, 0.0, target.left / sums.zt)
    return 2 * value, Row(sums.ms, 1 / (sums.zs + e_label), sums.mt, of_teacher, 2 * of_label)


@triton.jit
def slope(x, y, is_label, units, row, DIVERGENCE: tl.constexpr):
    """Return T · ∂KL/∂student of a tile, given the Row of its rows."""
    slopes = tl.exp2((x - row.ms) * units.cs) * row.of_student
    if DIVERGENCE == "":
        slopes -= row.of_teacher
    else:
        slopes -= tl.exp2((y - row.mt) * units.ct) * row.of_teacher
    return tl.where(is_label, row.of_label, slopes)
