"""Divergences of one tile of logits: their sums, their value and their slope.

Every D = Σ d(log p, log q) is taken from sums over the row, relative to pivots: with
c = log2(e) / T for each network, ds = c·(z_student − pivot), dt = c·(z_teacher − pivot),
es = exp2(ds), et = exp2(dt) and Z = Σ e, the softmaxes are q = es / Zs and p = et / Zt. A pivot is
the largest logit of what was read so far. It is subtracted first, so that e is exactly 1 there, and
Z is kept apart from it, because one number for both would lose what a large pivot rounds away. No
memory is touched here, but for the entries of single classes.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.tiles import INFINITY, LN2, LOG2E, log2

LOWEST = tl.constexpr(-1e30)  # pivot of an empty sum: finite, so that differences are numbers
SMALLEST = tl.constexpr(-120.0)  # log2 of the probability that a mixture takes for 0
LEAST = tl.constexpr(2.0**-119)  # above exp2(SMALLEST), however that is rounded
CERTAIN = tl.constexpr(1 / 0.9)  # Z of a row, relative to its maximum, with a class of 0.9
TINY = tl.constexpr(1e-30)  # q·log q is taken for 0 below this q


class Units(NamedTuple):
    """Factors that bring logits to log2 units: exp(z / T) = exp2(c · z)."""

    cs: tl.tensor  # of the student at its temperature
    ct: tl.tensor  # of the teacher at its temperature
    c1: tl.tensor  # of the student at T = 1, for the cross-entropy


class Sums(NamedTuple):
    """Sums over the logits that a thread, a split or a row has read, relative to their pivots."""

    ms: tl.tensor  # pivot of the student
    zs: tl.tensor  # Σ es
    mt: tl.tensor  # pivot of the teacher
    zt: tl.tensor  # Σ et
    a: tl.tensor  # Σ et · log ratio
    b: tl.tensor  # Σ es · log ratio
    z1: tl.tensor  # Σ exp2(c1·(z_student − ms))


class Statistics(NamedTuple):
    """Numbers of a row that its gradient needs besides the logits."""

    ms: tl.tensor
    zs: tl.tensor
    mt: tl.tensor
    zt: tl.tensor
    slope_sum: tl.tensor  # Σ q·v, which the slope q·(v − Σ q·v) subtracts; or weight · excess
    # what the student, at T = 1, leaves of 1 to other classes than the one set apart; or Σ t
    left: tl.tensor
    z1: tl.tensor


@triton.jit
def rescaled(sums, rise_s, rise_t, shrink_s, shrink_t, DIVERGENCE: tl.constexpr):
    """Return the sums a and b in units of pivots that have risen."""
    a, b = sums.a, sums.b
    # selected, because a factor that has vanished wins over an infinite sum
    if (DIVERGENCE == "forward_kl") or (DIVERGENCE == "symmetric_kl"):
        a = tl.where(shrink_t > 0, (a + sums.zt * (rise_s - rise_t)) * shrink_t, 0.0)
    if DIVERGENCE == "soft_cross_entropy":
        a = tl.where(shrink_t > 0, (a + sums.zt * rise_s) * shrink_t, 0.0)
    if (DIVERGENCE == "reverse_kl") or (DIVERGENCE == "symmetric_kl"):
        b = tl.where(shrink_s > 0, (b + sums.zs * (rise_t - rise_s)) * shrink_s, 0.0)
    return a, b


@triton.jit
def add_products(a, b, ds, dt, es, et, DIVERGENCE: tl.constexpr):
    """Add the log ratios of a tile [R, K] to the sums a and b, and return both."""
    if (DIVERGENCE == "forward_kl") or (DIVERGENCE == "symmetric_kl"):
        a += tl.sum(tl.where(et > 0, et * (dt - ds), 0.0), 1)
    if DIVERGENCE == "soft_cross_entropy":
        a += tl.sum(tl.where(et > 0, et * -ds, 0.0), 1)
    if (DIVERGENCE == "reverse_kl") or (DIVERGENCE == "symmetric_kl"):
        b += tl.sum(tl.where(es > 0, es * (ds - dt), 0.0), 1)
    return a, b


@triton.jit
def fold(x, y, units, sums, DIVERGENCE: tl.constexpr, LABELS: tl.constexpr):
    """Add the logits x, y [R, K] to the sums [R] of R threads."""
    ms, mt = tl.maximum(sums.ms, tl.max(x, 1)), tl.maximum(sums.mt, tl.max(y, 1))
    rise_s, rise_t = (ms - sums.ms) * units.cs, (mt - sums.mt) * units.ct
    shrink_s, shrink_t = tl.exp2(-rise_s), tl.exp2(-rise_t)
    above = x - ms[:, None]
    ds, dt = above * units.cs, (y - mt[:, None]) * units.ct
    es, et = tl.exp2(ds), tl.exp2(dt)
    a, b = rescaled(sums, rise_s, rise_t, shrink_s, shrink_t, DIVERGENCE)
    a, b = add_products(a, b, ds, dt, es, et, DIVERGENCE)
    zs = sums.zs * shrink_s + tl.sum(es, 1)
    zt = sums.zt * shrink_t + tl.sum(et, 1)
    z1 = sums.z1
    if LABELS:
        shrink_1 = tl.exp2((sums.ms - ms) * units.c1)
        z1 = z1 * shrink_1 + tl.sum(tl.exp2(above * units.c1), 1)
    return Sums(ms, zs, mt, zt, a, b, z1)


@triton.jit
def merge(sums, units, DIVERGENCE: tl.constexpr):
    """Return the sums of a row from those of its threads, or of its splits."""
    ms, mt = tl.max(sums.ms, 0), tl.max(sums.mt, 0)
    rise_s, rise_t = (ms - sums.ms) * units.cs, (mt - sums.mt) * units.ct
    shrink_s, shrink_t = tl.exp2(-rise_s), tl.exp2(-rise_t)
    a, b = rescaled(sums, rise_s, rise_t, shrink_s, shrink_t, DIVERGENCE)
    return Sums(
        ms,
        tl.sum(sums.zs * shrink_s, 0),
        mt,
        tl.sum(sums.zt * shrink_t, 0),
        tl.sum(a, 0),
        tl.sum(b, 0),
        tl.sum(sums.z1 * tl.exp2((sums.ms - ms) * units.c1), 0),
    )


@triton.jit
def not_below_0(value):
    """Return the value of a divergence, which rounding alone makes negative; NaN stays."""
    return tl.where(value < 0, 0.0, value)


@triton.jit
def kl_value(zs, zt, a, b, weight, DIVERGENCE: tl.constexpr):
    """Return the KL that the sums of a row make, and Σ q·(log2 q − log2 p) in pivot units."""
    ratio = tl.log2(zt / zs)
    if DIVERGENCE == "forward_kl":
        value = a / zt - ratio
    elif DIVERGENCE == "reverse_kl":
        value = b / zs + ratio
    elif DIVERGENCE == "symmetric_kl":
        value = weight * (a / zt - ratio) + (1 - weight) * (b / zs + ratio)
    elif DIVERGENCE == "":
        value = tl.zeros_like(zs)
    else:
        value = a / zt + tl.log2(zs)
    return not_below_0(value * LN2), b / zs


@triton.jit
def mixture(ds, dt, zs, zt, weight, DIVERGENCE: tl.constexpr, FAST: tl.constexpr):
    """Return d, q and v of a divergence that needs both Z and has the slope q·(v − Σ q·v)."""
    d, q, v, _, _ = mixture_of_both(ds, dt, zs, zt, weight, DIVERGENCE, FAST)
    return d, q, v


@triton.jit
def mixture_of_both(ds, dt, zs, zt, weight, DIVERGENCE: tl.constexpr, FAST: tl.constexpr):
    """Return d, q and v, and p and u, of which the teacher has the slope p·(u − Σ p·u).

    The divergence is Σ d. Of Jensen-Shannon it is w Σ d + (1 − w) Σ q·v, in units of log2: its two
    sums are made alike, so that with a weight of ½ student and teacher may change places, and
    without their factors, because these would take a multiplication and a register of each entry.
    """
    if DIVERGENCE == "jensen_shannon":
        log_q, log_p = ds - tl.log2(zs), dt - tl.log2(zt)
    else:  # in units of the teacher's Z, because that takes fewer registers
        log_q, log_p = ds + tl.log2(zt / zs), dt
    if DIVERGENCE == "total_variation":
        p, q = tl.exp2(log_p), tl.exp2(log_q)
        sign = (q > p).to(q.dtype) - (q < p).to(q.dtype)  # because a constant would be float32
        return 0.5 * tl.abs(p - q), q, 0.5 * sign, p, -0.5 * sign
    # floors instead of selections, because with them 0·∞ cannot come up
    log_q, log_p = tl.maximum(log_q, SMALLEST), tl.maximum(log_p, SMALLEST)
    p, q = tl.exp2(log_p), tl.exp2(log_q)
    of_teacher, of_student = weight, 1 - weight
    if DIVERGENCE == "skew_reverse_kl":
        of_teacher, of_student = 1 - weight, weight
    log_m = log2(of_teacher * p + of_student * q, FAST)
    # exactly 0 where the networks are equal
    p_above = tl.where(log_p == log_q, 0.0, log_p - log_m)
    q_above = tl.where(log_p == log_q, 0.0, log_q - log_m)
    if DIVERGENCE == "skew_kl":
        above = p_above * LN2
        share = tl.exp2(p_above)
        return p * above, q, (weight - 1) * share, p, above - weight * share
    if DIVERGENCE == "skew_reverse_kl":
        above = q_above * LN2
        share = tl.exp2(q_above)
        return q * above, q, above - weight * share, p, (weight - 1) * share
    return p * p_above, q, q_above, p, p_above


@triton.jit
def mixture_unit(zs, zt, DIVERGENCE: tl.constexpr):
    """Return what the sums of a mixture are multiplied by.

    It is NaN for a row without a softmax (all −∞, or +∞ in it), which shows in Z alone.
    """
    if DIVERGENCE == "jensen_shannon":
        return 1 + 0 * (tl.log2(zs) + tl.log2(zt))
    return (1 + 0 * tl.log2(zt / zs)) / zt


@triton.jit
def mixture_value(summands, slopes, zs, zt, weight, DIVERGENCE: tl.constexpr):
    """Return the value of a row, and Σ q·v, from the sums of d and of q·v."""
    each, value = mixture_unit(zs, zt, DIVERGENCE), summands
    if DIVERGENCE == "jensen_shannon":
        value = (weight * summands + (1 - weight) * slopes) * LN2
    return not_below_0(value * each), slopes * each


@triton.jit
def finite_unit(slope_sum):
    """Return log 2, or NaN for rows whose divergence is infinite and has no gradient."""
    return LN2 + 0 * slope_sum


@triton.jit
def slope(ds, dt, row, weight, DIVERGENCE: tl.constexpr, FAST: tl.constexpr):
    """Return T · ∂D/∂student of a tile, given the Statistics of its rows."""
    if (DIVERGENCE == "forward_kl") or (DIVERGENCE == "soft_cross_entropy"):
        return tl.exp2(ds) * (1 / row.zs) - tl.exp2(dt) * (1 / row.zt)
    if DIVERGENCE == "":
        return tl.zeros_like(ds)
    if (DIVERGENCE == "reverse_kl") or (DIVERGENCE == "symmetric_kl"):
        q = tl.exp2(ds) * (1 / row.zs)
        # compared this way round, so that a NaN stays a NaN
        reverse = tl.where(q <= TINY, 0.0, q * ((ds - dt) - row.slope_sum))
        if DIVERGENCE == "reverse_kl":
            return reverse * finite_unit(row.slope_sum)
        of_reverse = (1 - weight) * finite_unit(row.slope_sum)
        return reverse * of_reverse + weight * (q - tl.exp2(dt) * (1 / row.zt))
    _, q, v = mixture(ds, dt, row.zs, row.zt, weight, DIVERGENCE, FAST)
    each = mixture_unit(row.zs, row.zt, DIVERGENCE)
    is_none = ds <= SMALLEST
    if DIVERGENCE == "jensen_shannon":
        each *= (1 - weight) * LN2
        is_none = q <= LEAST  # because ds would stay in a register of each entry until here
    return tl.where(is_none, 0.0, q * (v - row.slope_sum)) * each


@triton.jit
def is_certain(zs, zt, z1, LABELS: tl.constexpr):
    """Return whether a student is nearly certain of a class, where its Z has lost digits.

    A teacher without a softmax makes NaN of the row, which stays.
    """
    certain = zs < CERTAIN
    if LABELS:
        certain |= z1 < CERTAIN
    return certain & (zt > 0)


@triton.jit
def among_others(value, zs, zt):
    """Return the value of rows among other classes than the one that is set apart.

    It is 0 where the teacher allows none, and infinite where the student alone allows none.
    """
    value = tl.where(zs == 0, float("inf"), value)
    return tl.where(zt == 0, 0.0, value)


@triton.jit
def without_others(zs, zt, IS_DECOUPLED: tl.constexpr):
    """Return both Z with ∞ in place of those that give no gradient among the other classes.

    Those are of rows in which one network allows none. Decoupled rows still need the student's.
    """
    is_alone = (zs == 0) | (zt == 0)
    gone = (zs == 0) if IS_DECOUPLED else is_alone
    return tl.where(gone, float("inf"), zs), tl.where(is_alone, float("inf"), zt)


@triton.jit
def log2_odds(logit, pivot, z, unit):
    """Return log2 of the odds of a class that is set apart, from the sum over all others."""
    logit = tl.where(logit == INFINITY, float("nan"), logit)  # because no softmax has one of +∞
    return (logit - pivot) * unit - tl.log2(z)


@triton.jit
def softplus(x):
    """Return log2(1 + 2^x), to the last digit for every x."""
    u = tl.exp2(-tl.abs(x))
    # what 1 + u has lost of u, its logarithm has lost in the same proportion
    of_u = tl.where(1 + u == 1, u * LOG2E, tl.log2(1 + u) * (u / ((1 + u) - 1)))
    return tl.maximum(x, 0.0) + of_u


@triton.jit
def sigmoid(odds):
    """Return the probability with this log2 of its odds."""
    return 1 / (1 + tl.exp2(-odds))


@triton.jit
def binary_kl(of_p, of_q):
    """Return the KL, in bits, between two probabilities with these log2 of their odds."""
    p, left = sigmoid(of_p), sigmoid(-of_p)
    value = tl.where(p == 0, 0.0, p * (softplus(-of_q) - softplus(-of_p)))
    return value + tl.where(left == 0, 0.0, left * (softplus(of_q) - softplus(of_p)))


@triton.jit
def decoupled(value, of_p, of_q, weight):
    """Return the value of decoupled rows, and weight · (q − p) of the class set apart.

    `value` is the KL among the other classes. A share of 0 wins over an infinite term, but not over
    a NaN of the odds, which shows in the other number.
    """
    of_class = not_below_0(binary_kl(of_p, of_q) * LN2)
    both = tl.where(weight == 0, 0.0, weight * of_class)
    both += tl.where(weight == 1, 0.0, (1 - weight) * value)
    # the smaller of both probabilities, because the larger one may have lost its digits
    is_large = of_p + of_q > 0
    excess = tl.where(is_large, sigmoid(-of_p) - sigmoid(-of_q), sigmoid(of_q) - sigmoid(of_p))
    return both + 0 * excess, weight * excess


@triton.jit
def entry_of(row_ptr, label, n_cols, DTYPE: tl.constexpr):
    """Return the entry of a class in a row, NaN if there is no such class."""
    inside = (label >= 0) & (label < n_cols)
    return tl.load(row_ptr + label, mask=inside, other=float("nan")).to(DTYPE)
