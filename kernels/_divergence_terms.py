"""What a divergence is, for one tile of logits: its sums, its value and its slope.

All is in log2 units and relative to a pivot, the maximum of a row or of a thread's part of it:
ds = log2(e)·z/T − pivot for the student, dt for the teacher; e = exp2(d), Z = Σ e, q = es / Zs.
Pivot and Z are kept apart: one number for both would lose what a large pivot rounds away.
"""

import triton
import triton.language as tl

from fastkd.kernels._tiles import LN2, log2

LOWEST = tl.constexpr(-1e30)  # the pivot of an empty sum: finite, so that differences are numbers
SMALLEST = tl.constexpr(-120.0)  # log2 of what counts as nothing in a mixture
TINY = tl.constexpr(1e-30)  # q·log q is nothing below


@triton.jit
def rescaled(
    a, b, zs, zt, rise_s, rise_t, shrink_s, shrink_t, DIVERGENCE: tl.constexpr
):  # fmt: skip
    """The sums a (weighted by p) and b (by q) of log ratios, in units of pivots that have risen."""
    # where a factor has vanished it wins over an infinite sum
    if (DIVERGENCE == "forward_kl") or (DIVERGENCE == "symmetric_kl"):
        a = tl.where(shrink_t > 0, (a + zt * (rise_s - rise_t)) * shrink_t, 0.0)
    if DIVERGENCE == "soft_cross_entropy":
        a = tl.where(shrink_t > 0, (a + zt * rise_s) * shrink_t, 0.0)
    if (DIVERGENCE == "reverse_kl") or (DIVERGENCE == "symmetric_kl"):
        b = tl.where(shrink_s > 0, (b + zs * (rise_t - rise_s)) * shrink_s, 0.0)
    return a, b


@triton.jit
def add_products(a, b, ds, dt, es, et, DIVERGENCE: tl.constexpr):
    """Add log ratios of a tile [R, K], in units of the pivots, to the sums a and b."""
    if (DIVERGENCE == "forward_kl") or (DIVERGENCE == "symmetric_kl"):
        a += tl.sum(tl.where(et > 0, et * (dt - ds), 0.0), 1)
    if DIVERGENCE == "soft_cross_entropy":
        a += tl.sum(tl.where(et > 0, et * -ds, 0.0), 1)
    if (DIVERGENCE == "reverse_kl") or (DIVERGENCE == "symmetric_kl"):
        b += tl.sum(tl.where(es > 0, es * (ds - dt), 0.0), 1)
    return a, b


@triton.jit
def fold(
    x, y, cs, ct, c1, ms, zs, mt, zt, a, b, m1, z1,
    DIVERGENCE: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Add the logits x, y [R, K] to the sums of R threads."""
    top_s, top_t = tl.maximum(ms, tl.max(x, 1) * cs), tl.maximum(mt, tl.max(y, 1) * ct)
    shrink_s, shrink_t = tl.exp2(ms - top_s), tl.exp2(mt - top_t)
    ds, dt = tl.fma(x, cs, -top_s[:, None]), tl.fma(y, ct, -top_t[:, None])
    es, et = tl.exp2(ds), tl.exp2(dt)
    a, b = rescaled(a, b, zs, zt, top_s - ms, top_t - mt, shrink_s, shrink_t, DIVERGENCE)
    a, b = add_products(a, b, ds, dt, es, et, DIVERGENCE)
    zs = zs * shrink_s + tl.sum(es, 1)
    zt = zt * shrink_t + tl.sum(et, 1)
    if LABELS:
        top_1 = tl.maximum(m1, tl.max(x, 1) * c1)
        z1 = z1 * tl.exp2(m1 - top_1) + tl.sum(tl.exp2(tl.fma(x, c1, -top_1[:, None])), 1)
        m1 = top_1
    return top_s, zs, top_t, zt, a, b, m1, z1


@triton.jit
def merge(ms, zs, mt, zt, a, b, m1, z1, DIVERGENCE: tl.constexpr):
    """The sums of many threads, or of many splits, to those of the row."""
    top_s, top_t, top_1 = tl.max(ms, 0), tl.max(mt, 0), tl.max(m1, 0)
    shrink_s, shrink_t = tl.exp2(ms - top_s), tl.exp2(mt - top_t)
    a, b = rescaled(a, b, zs, zt, top_s - ms, top_t - mt, shrink_s, shrink_t, DIVERGENCE)
    return (
        top_s,
        tl.sum(zs * shrink_s, 0),
        top_t,
        tl.sum(zt * shrink_t, 0),
        tl.sum(a, 0),
        tl.sum(b, 0),
        top_1,
        tl.sum(z1 * tl.exp2(m1 - top_1), 0),
    )


@triton.jit
def kl_value(zs, zt, a, b, weight, DIVERGENCE: tl.constexpr):
    """The KL that the sums of a row make, and Σ q·(log2 q − log2 p) in units of the pivots."""
    ratio = tl.log2(zt / zs)
    if DIVERGENCE == "forward_kl":
        value = a / zt - ratio
    elif DIVERGENCE == "reverse_kl":
        value = b / zs + ratio
    elif DIVERGENCE == "symmetric_kl":
        value = weight * (a / zt - ratio) + (1 - weight) * (b / zs + ratio)
    else:
        value = a / zt + tl.log2(zs)
    return value * LN2, b / zs


@triton.jit
def mixture(ds, dt, ratio, weight, DIVERGENCE: tl.constexpr, FAST: tl.constexpr):
    """Of divergences that need both Z: the summand d, and q and v of the gradient q (v − Σ q v).

    ds, dt: log2 e. All in units of the teacher's Z, the student is brought there by `ratio`.
    """
    if DIVERGENCE == "total_variation":
        p, q = tl.exp2(dt), tl.exp2(ds + ratio)
        return 0.5 * tl.abs(p - q), q, tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    # floors instead of selections: 0·∞ cannot come up
    log_q, log_p = tl.maximum(ds + ratio, SMALLEST), tl.maximum(dt, SMALLEST)
    p, q = tl.exp2(log_p), tl.exp2(log_q)
    of_teacher, of_student = weight, 1 - weight
    if DIVERGENCE == "skew_reverse_kl":
        of_teacher, of_student = 1 - weight, weight
    log_m = log2(of_teacher * p + of_student * q, FAST)
    if DIVERGENCE == "skew_kl":
        share = tl.exp2(log_p - log_m)
        return p * (log_p - log_m) * LN2, q, (weight - 1) * share
    if DIVERGENCE == "skew_reverse_kl":
        share = tl.exp2(log_q - log_m)
        above = (log_q - log_m) * LN2
        return q * above, q, above - weight * share
    above = (log_q - log_m) * ((1 - weight) * LN2)
    return p * (log_p - log_m) * (weight * LN2) + q * above, q, above


@triton.jit
def slope(
    ds, dt, zs, zt, slope_sum, weight, DIVERGENCE: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """T · ∂D/∂student from log2 e and the statistics of the row."""
    if (DIVERGENCE == "forward_kl") or (DIVERGENCE == "soft_cross_entropy"):
        return tl.exp2(ds) * (1 / zs) - tl.exp2(dt) * (1 / zt)
    if (DIVERGENCE == "reverse_kl") or (DIVERGENCE == "symmetric_kl"):
        q = tl.exp2(ds) * (1 / zs)
        # this way round a NaN stays a NaN
        reverse = tl.where(q <= TINY, 0.0, q * ((ds - dt) - slope_sum) * LN2)
        if DIVERGENCE == "reverse_kl":
            return reverse
        return (1 - weight) * reverse + weight * (q - tl.exp2(dt) * (1 / zt))
    ratio = tl.log2(zt / zs)
    _, q, v = mixture(ds, dt, ratio, weight, DIVERGENCE, FAST)
    # a row without a softmax, all −∞ or with +∞, shows in Z alone
    return tl.where(ds <= SMALLEST, 0.0, q * (v - slope_sum)) * ((1 + 0 * ratio) / zt)


@triton.jit
def cross_entropy(student_row, label, n_cols, c1, m1, z1, DTYPE: tl.constexpr):
    """−log softmax(student)[label] at T = 1; 0 for no label, NaN for one that does not exist."""
    inside = (label >= 0) & (label < n_cols)
    x = tl.load(student_row + label, mask=inside, other=float("nan")).to(DTYPE)
    return tl.where(label < 0, 0.0, (tl.log2(z1) - tl.fma(x, c1, -m1)) * LN2)
