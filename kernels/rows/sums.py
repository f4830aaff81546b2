"""Device code that sums over a row, or over a part of it, in one loop; no memory is written.

Every thread keeps its own sums until the end. Standardized logits, and labels of which all classes
have a share, have more of them, of which kernels without have none.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.rows.labels import Spread, fold_spread, load_shares, merge_spread
from fastkd.kernels.rows.reading import edges, has_edges, load_logits, vectors
from fastkd.kernels.rows.standardized import Levels, fold_levels, level_of, merged_levels
from fastkd.kernels.rows.terms import LOWEST, Sums, fold, merge, mixture_of_both


class Mixed(NamedTuple):
    """Sums of a mixture over the logits that a thread, a split or a row has read."""

    value: tl.tensor  # Σ d
    slopes: tl.tensor  # Σ q·v
    of_slopes: tl.tensor  # Σ q·v · level, of standardized logits
    of_q: tl.tensor  # Σ q · level, of standardized logits
    teacher_slopes: tl.tensor  # Σ p·u, where BOTH networks learn


@triton.jit
def _add_tile(
    x, y, shares, units, standard, sums, levels, spread, DIVERGENCE: tl.constexpr,
    LABELS: tl.constexpr,
):  # fmt: skip
    """Add the logits x, y [R, K], and the shares of labels, to the sums [R] of R threads."""
    before = sums
    sums = fold(x, y, units, sums, DIVERGENCE, LABELS)
    if standard is not None:
        levels = fold_levels(x, y, units, standard, before, sums, levels, DIVERGENCE)
    if shares is not None:
        spread = fold_spread(x, shares, before.ms, sums.ms, spread)
    return sums, levels, spread


@triton.jit
def merged(sums, levels, spread, units, DIVERGENCE: tl.constexpr):
    """Return the sums of a row from those of its threads, or of its splits."""
    of_row = merge(sums, units, DIVERGENCE)
    return (
        of_row,
        merged_levels(sums, of_row, units, levels, DIVERGENCE),
        merge_spread(sums.ms, of_row.ms, spread),
    )


@triton.jit
def online_sums(
    rows, target, span, units, standard, DIVERGENCE: tl.constexpr, LABELS: tl.constexpr,
    APART: tl.constexpr, DTYPE: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the Sums over a span, and over the edges of the row if the span starts at 0.

    Levels of standardized logits and the Spread of labels follow. Every thread keeps its own pivots
    and sums, so that there is no barrier before the end.
    """
    ms, zeros = tl.full([THREADS], LOWEST, DTYPE), tl.zeros([THREADS], DTYPE)
    mt = ms
    if standard is not None:  # starts at the means, because levels are counted from no other place
        ms, mt = zeros + standard.pivot, zeros + standard.teacher_pivot
    sums = Sums(ms, zeros, mt, zeros, zeros, zeros, zeros)
    levels, spread = Levels(zeros, zeros, zeros), Spread(zeros, zeros)
    rest = span.start + (span.end - span.start) // THREADS * THREADS
    for i in range(span.start, rest, THREADS):
        columns = vectors(i, THREADS, WIDTH)
        x, y = load_logits(rows, columns, None, DIVERGENCE, APART, DTYPE)
        shares = load_shares(target, columns, None, span.n_cols, DTYPE)
        sums, levels, spread = _add_tile(
            x, y, shares, units, standard, sums, levels, spread, DIVERGENCE, LABELS
        )
    if rest < span.end:
        inside = (rest + tl.arange(0, THREADS) < span.end)[:, None]
        columns = vectors(rest, THREADS, WIDTH)
        x, y = load_logits(rows, columns, inside, DIVERGENCE, APART, DTYPE)
        shares = load_shares(target, columns, inside, span.n_cols, DTYPE)
        sums, levels, spread = _add_tile(
            x, y, shares, units, standard, sums, levels, spread, DIVERGENCE, LABELS
        )
    if has_edges(span, WIDTH):
        columns, inside = edges(span.head, span.n_cols, THREADS, WIDTH)
        x, y = load_logits(rows, columns, inside, DIVERGENCE, APART, DTYPE)
        shares = load_shares(target, columns, inside, span.n_cols, DTYPE)
        sums, levels, spread = _add_tile(
            x, y, shares, units, standard, sums, levels, spread, DIVERGENCE, LABELS
        )
    return merged(sums, levels, spread, units, DIVERGENCE)


@triton.jit
def _add_mixture(
    x, y, units, standard, ms, zs, mt, zt, weight, mixed, DIVERGENCE: tl.constexpr,
    BOTH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add those of a tile to the Mixed sums of each thread."""
    ds, dt = (x - ms) * units.cs, (y - mt) * units.ct
    summand, q, v, p, u = mixture_of_both(ds, dt, zs, zt, weight, DIVERGENCE, FAST)
    of_slopes, of_q, teacher_slopes = mixed.of_slopes, mixed.of_q, mixed.teacher_slopes
    if standard is not None:
        level = level_of(x, ms, standard, units)
        of_slopes, of_q = of_slopes + tl.sum(q * v * level, 1), of_q + tl.sum(q * level, 1)
    if BOTH:
        teacher_slopes += tl.sum(p * u, 1)
    return Mixed(
        mixed.value + tl.sum(summand, 1), mixed.slopes + tl.sum(q * v, 1), of_slopes, of_q,
        teacher_slopes,
    )  # fmt: skip


@triton.jit
def mixture_sums(
    rows, span, units, standard, ms, zs, mt, zt, weight, DIVERGENCE: tl.constexpr,
    APART: tl.constexpr, BOTH: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the Mixed sums over what `online_sums` reads, given the pivots and Z of the row."""
    zeros = tl.zeros([THREADS], DTYPE)
    mixed = Mixed(zeros, zeros, zeros, zeros, zeros)
    rest = span.start + (span.end - span.start) // THREADS * THREADS
    for i in range(span.start, rest, THREADS):
        x, y = load_logits(rows, vectors(i, THREADS, WIDTH), None, DIVERGENCE, APART, DTYPE)
        mixed = _add_mixture(
            x, y, units, standard, ms, zs, mt, zt, weight, mixed, DIVERGENCE, BOTH, FAST
        )
    if rest < span.end:
        inside = (rest + tl.arange(0, THREADS) < span.end)[:, None]
        x, y = load_logits(rows, vectors(rest, THREADS, WIDTH), inside, DIVERGENCE, APART, DTYPE)
        mixed = _add_mixture(
            x, y, units, standard, ms, zs, mt, zt, weight, mixed, DIVERGENCE, BOTH, FAST
        )
    if has_edges(span, WIDTH):
        columns, inside = edges(span.head, span.n_cols, THREADS, WIDTH)
        x, y = load_logits(rows, columns, inside, DIVERGENCE, APART, DTYPE)
        mixed = _add_mixture(
            x, y, units, standard, ms, zs, mt, zt, weight, mixed, DIVERGENCE, BOTH, FAST
        )
    return Mixed(
        tl.sum(mixed.value, 0), tl.sum(mixed.slopes, 0), tl.sum(mixed.of_slopes, 0),
        tl.sum(mixed.of_q, 0), tl.sum(mixed.teacher_slopes, 0),
    )  # fmt: skip
