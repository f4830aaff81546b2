"""Device code of rows whose logits are divided by their deviation besides.

A softmax does not see what is subtracted from all logits, so that standardizing a row is a
temperature of its own, τ = T · (σ + EPSILON). The logits move σ too: a loss with the slope g in
z / τ has besides the slope −(z − μ) · Σ g z / (τ σ (n − 1)), one number for each row times z − μ.
As Σ g = 0 that sum is taken of levels, which are the logits relative to the pivot, in units of
log2: the class of the largest logit, whose g may have lost its digits, has no part in it then.
Classes that −∞ excludes have no part in σ and μ, and the level of μ, so that their slope is 0.

Before the sums of a row its logits are read once more, for σ: 4 bytes of bf16 for each entry.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.rows.reading import edges, has_edges, load_logits, vectors
from fastkd.kernels.rows.terms import LOWEST, Units, mixture_unit
from fastkd.kernels.tiles import INFINITY, LN2

EPSILON = tl.constexpr(1e-7)  # added to a deviation
N_STANDARD = tl.constexpr(7)  # numbers of a row in memory, in the order of Standard


class Moments(NamedTuple):
    """The moments of the logits that a thread, a split or a row has read, without those of −∞."""

    n: tl.tensor
    pivot: tl.tensor  # one of the logits, LOWEST where there is none
    mean: tl.tensor  # relative to the pivot, so that it has the digits of the deviation
    squares: tl.tensor  # Σ (z − mean)²


class Standard(NamedTuple):
    """The numbers that standardize a row, and that its gradient needs besides."""

    pivot: tl.tensor  # a number near the mean of the student's logits
    mean: tl.tensor  # the mean, relative to the pivot
    n: tl.tensor  # the student's classes
    deviation: tl.tensor
    teacher_pivot: tl.tensor
    teacher_deviation: tl.tensor
    pull: tl.tensor  # T Σ g z / (σ (n − 1)), 0 where σ is


class Whole(NamedTuple):
    """The numbers that standardize rows which stay on chip, without the classes of −∞."""

    pivot: tl.tensor  # a number near the mean
    mean: tl.tensor  # relative to the pivot, so that it has the digits of the deviation
    n: tl.tensor
    deviation: tl.tensor  # unbiased


class Levels(NamedTuple):
    """Sums of the levels of the student's logits, relative to the pivots of Sums."""

    of_q: tl.tensor  # Σ es · level
    of_p: tl.tensor  # Σ et · level, if the divergence has a forward KL
    of_ratio: tl.tensor  # Σ es · log ratio · level, if it has a reverse one


# ---------------------------------------------------------------------------- moments of long rows


@triton.jit
def _added(x, moments):
    """Return the moments [R] of R threads that have read the logits x [R, K] besides."""
    allowed = x != -INFINITY
    pivot = tl.where(moments.n == 0, tl.maximum(tl.max(x, 1), LOWEST), moments.pivot)
    above = tl.where(allowed, (x - pivot[:, None]) - moments.mean[:, None], 0.0)
    n, total = moments.n + tl.sum(allowed.to(x.dtype), 1), tl.sum(above, 1)
    rise = total / tl.maximum(n, 1)
    squares = moments.squares + (tl.sum(above * above, 1) - total * rise)
    return Moments(n, pivot, moments.mean + rise, squares)


@triton.jit
def merged_moments(moments):
    """Return the moments of a row from those of its threads, or of its splits."""
    n, pivot = tl.sum(moments.n, 0), tl.max(moments.pivot, 0)
    has_any = moments.n > 0
    means = tl.where(has_any, moments.mean + (moments.pivot - pivot), 0.0)
    mean = tl.sum(moments.n * means, 0) / n
    apart = tl.where(has_any, means - mean, 0.0)
    return Moments(n, pivot, mean, tl.sum(moments.squares + moments.n * (apart * apart), 0))


@triton.jit
def moments_of(
    rows, span, DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr, THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the Moments of both networks over a span, and over the edges if it starts at 0."""
    zeros = tl.zeros([THREADS], DTYPE)
    of_student = Moments(zeros, tl.full([THREADS], LOWEST, DTYPE), zeros, zeros)
    of_teacher = of_student
    rest = span.start + (span.end - span.start) // THREADS * THREADS
    for i in range(span.start, rest, THREADS):
        x, y = load_logits(rows, vectors(i, THREADS, WIDTH), None, DIVERGENCE, False, DTYPE)
        of_student, of_teacher = _added(x, of_student), _added(y, of_teacher)
    if rest < span.end:
        inside = (rest + tl.arange(0, THREADS) < span.end)[:, None]
        x, y = load_logits(rows, vectors(rest, THREADS, WIDTH), inside, DIVERGENCE, False, DTYPE)
        of_student, of_teacher = _added(x, of_student), _added(y, of_teacher)
    if has_edges(span, WIDTH):
        columns, inside = edges(span.head, span.n_cols, THREADS, WIDTH)
        x, y = load_logits(rows, columns, inside, DIVERGENCE, False, DTYPE)
        of_student, of_teacher = _added(x, of_student), _added(y, of_teacher)
    return merged_moments(of_student), merged_moments(of_teacher)


@triton.jit
def load_moments(pointer, inside):
    """Return the Moments of the splits that are inside, none of the others."""
    return Moments(
        tl.load(pointer, inside, 0.0),
        tl.load(pointer + 1, inside, LOWEST),
        tl.load(pointer + 2, inside, 0.0),
        tl.load(pointer + 3, inside, 0.0),
    )


@triton.jit
def _deviation(moments):
    return tl.sqrt(moments.squares / tl.maximum(moments.n - 1, 1))


@triton.jit
def standard_of(of_student, of_teacher):
    """Return the Standard of a row with these moments, but for its pull."""
    pivot = of_student.pivot + of_student.mean
    return Standard(
        pivot,
        of_student.mean - (pivot - of_student.pivot),
        of_student.n,
        _deviation(of_student),
        of_teacher.pivot + of_teacher.mean,
        _deviation(of_teacher),
        tl.zeros_like(pivot),
    )


@triton.jit
def load_standard(pointer):
    return Standard(
        tl.load(pointer),
        tl.load(pointer + 1),
        tl.load(pointer + 2),
        tl.load(pointer + 3),
        tl.load(pointer + 4),
        tl.load(pointer + 5),
        tl.load(pointer + 6),
    )


@triton.jit
def store_standard(pointer, standard, pull):
    tl.store(pointer, standard.pivot)
    tl.store(pointer + 1, standard.mean)
    tl.store(pointer + 2, standard.n)
    tl.store(pointer + 3, standard.deviation)
    tl.store(pointer + 4, standard.teacher_pivot)
    tl.store(pointer + 5, standard.teacher_deviation)
    tl.store(pointer + 6, pull)


@triton.jit
def standardized(units, deviation, of_teacher):
    """Return the Units of rows with these deviations."""
    return Units(units.cs / (deviation + EPSILON), units.ct / (of_teacher + EPSILON), units.c1)


# ------------------------------------------------------------------------- the slope of a deviation


@triton.jit
def level_of(x, ms, standard, units):
    """Return the levels of the student's logits, relative to a pivot."""
    z = tl.where(x == -INFINITY, standard.pivot, x)
    return (z - ms) * units.cs


@triton.jit
def _rescaled_levels(before, after, units, levels, DIVERGENCE: tl.constexpr):
    """Return the sums of levels in units of pivots that have risen; `before` are the Sums then."""
    rise_s, rise_t = (after.ms - before.ms) * units.cs, (after.mt - before.mt) * units.ct
    shrink_s, shrink_t = tl.exp2(-rise_s), tl.exp2(-rise_t)
    of_q, of_p, of_ratio = levels.of_q, levels.of_p, levels.of_ratio
    if (DIVERGENCE == "reverse_kl") or (DIVERGENCE == "symmetric_kl"):
        grown = of_ratio - rise_s * before.b + (rise_t - rise_s) * (of_q - rise_s * before.zs)
        of_ratio = tl.where(shrink_s > 0, grown * shrink_s, 0.0)
    if DIVERGENCE == "reverse_cross_entropy":
        grown = of_ratio - rise_s * before.b + rise_t * (of_q - rise_s * before.zs)
        of_ratio = tl.where(shrink_s > 0, grown * shrink_s, 0.0)
    of_q = tl.where(shrink_s > 0, (of_q - before.zs * rise_s) * shrink_s, 0.0)
    of_p = tl.where(shrink_t > 0, (of_p - before.zt * rise_s) * shrink_t, 0.0)
    return of_q, of_p, of_ratio


@triton.jit
def fold_levels(x, y, units, standard, before, after, levels, DIVERGENCE: tl.constexpr):
    """Add those of the logits x, y [R, K], which have made the Sums `after` from `before`."""
    of_q, of_p, of_ratio = _rescaled_levels(before, after, units, levels, DIVERGENCE)
    level = level_of(x, after.ms[:, None], standard, units)
    ds, dt = (x - after.ms[:, None]) * units.cs, (y - after.mt[:, None]) * units.ct
    es, et = tl.exp2(ds), tl.exp2(dt)
    of_q += tl.sum(es * level, 1)
    if (
        (DIVERGENCE == "forward_kl")
        or (DIVERGENCE == "symmetric_kl")
        or (DIVERGENCE == "soft_cross_entropy")
    ):
        of_p += tl.sum(et * level, 1)
    if (DIVERGENCE == "reverse_kl") or (DIVERGENCE == "symmetric_kl"):
        of_ratio += tl.sum(tl.where(es > 0, es * (ds - dt), 0.0) * level, 1)
    if DIVERGENCE == "reverse_cross_entropy":
        of_ratio += tl.sum(tl.where(es > 0, es * -dt, 0.0) * level, 1)
    return Levels(of_q, of_p, of_ratio)


@triton.jit
def merged_levels(before, after, units, levels, DIVERGENCE: tl.constexpr):
    """Return the levels of a row, with the Sums `after`, from those of threads or splits."""
    of_q, of_p, of_ratio = _rescaled_levels(before, after, units, levels, DIVERGENCE)
    return Levels(tl.sum(of_q, 0), tl.sum(of_p, 0), tl.sum(of_ratio, 0))


@triton.jit
def kl_level(sums, levels, slope_sum, weight, DIVERGENCE: tl.constexpr):
    """Return Σ g · level of a row, g = T · ∂D/∂student."""
    of_q = levels.of_q / sums.zs
    if (DIVERGENCE == "forward_kl") or (DIVERGENCE == "soft_cross_entropy"):
        return of_q - levels.of_p / sums.zt
    reverse = (levels.of_ratio / sums.zs - slope_sum * of_q) * LN2
    if DIVERGENCE == "symmetric_kl":
        return weight * (of_q - levels.of_p / sums.zt) + (1 - weight) * reverse
    return reverse


@triton.jit
def decoupled_level(level, of_apart, of_q, slope_sum, weight):
    """Return Σ g · level of a decoupled row, of whose other classes it is `level`."""
    return (1 - weight) * level + slope_sum * (of_apart - of_q)


@triton.jit
def mixture_level(of_slopes, of_q, slope_sum, zs, zt, weight, DIVERGENCE: tl.constexpr):
    """Return Σ g · level of a mixture from Σ q · v · level and Σ q · level."""
    each = mixture_unit(zs, zt, DIVERGENCE)
    if DIVERGENCE == "jensen_shannon":
        each *= (1 - weight) * LN2
    return (of_slopes - slope_sum * of_q) * each


@triton.jit
def pull_of(level, temperature, standard):
    """Return the pull of a row with this Σ g · level; `temperature` is T without its deviation.

    Logits that are all equal stand where the deviation has no slope, for which PyTorch takes 0.
    """
    pull = level * temperature * LN2 / (standard.deviation * (standard.n - 1))
    return tl.where(standard.deviation == 0, 0.0, pull)


@triton.jit
def slopes_of_deviation(x, ms, standard, factor):
    """Return what the deviation adds to the gradient in logits x, where `factor` multiplies g."""
    mean = standard.mean - (ms - standard.pivot)
    above = tl.where(x == -INFINITY, 0.0, (x - ms) - mean)
    return tl.where(factor == 0, 0.0, -above * (standard.pull * factor))


# ------------------------------------------------------------------------ rows that stay on chip


@triton.jit
def moments_of_whole(x):
    """Return the Whole of rows of logits, in columns."""
    allowed = x != -INFINITY  # which those outside the row are not
    n = tl.sum(allowed.to(x.dtype), 1)[:, None]
    pivot = tl.sum(tl.where(allowed, x, 0.0), 1)[:, None] / n
    above = tl.where(allowed, x - pivot, 0.0)
    mean = tl.sum(above, 1)[:, None] / n  # what rounding took from that of logits far from 0
    above = tl.where(allowed, above - mean, 0.0)
    deviation = tl.sqrt(tl.sum(above * above, 1)[:, None] / tl.maximum(n - 1, 1))
    return Whole(pivot, mean, n, deviation)


@triton.jit
def slopes_of_whole(slopes, x, moments):
    """Return what the deviation, which divides the logits, contributes to their gradient.

    Logits that are all equal stand where it has no slope, for which PyTorch takes 0.
    """
    allowed, deviation = x != -INFINITY, moments.deviation
    above = tl.where(allowed, (x - moments.pivot) - moments.mean, 0.0)
    each = tl.sum(slopes * above, 1)[:, None]
    each = each / ((deviation + EPSILON) * deviation * (moments.n - 1))
    return -above * tl.where(deviation == 0, 0.0, each)
