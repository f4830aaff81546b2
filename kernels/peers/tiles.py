"""Tiles of networks that teach each other, all of which a program holds at once.

With l_i = log2 p_i and L = Σ l_i over the K networks all divergences from p_j add up to
Σ_{i≠j} KL(p_j ‖ p_i) = Σ p_j (K l_j − L), and with S = Σ p_j the gradient of network i is
K p_i − S and, where the others learn from i too, p_i (K l_i − L) less p_i times the sum of that.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.rows.terms import finite_unit


class Peers(NamedTuple):
    """Numbers of a row of every network, or columns of those of several rows, each in tuples."""

    tops: tuple  # the largest logits
    totals: tuple  # Z, relative to them
    above: tuple  # Σ p (K log2 p − L)


@triton.jit
def _selected(e, d, total_of_d, K: tl.constexpr):
    """Return e (K d − D) of a tile, 0 where e is."""
    return tl.where(e > 0, e * (K * d - total_of_d), 0.0)


@triton.jit
def sums_of_tile(logits, tops, unit, K: tl.constexpr):
    """Return tuples of Σ e and of Σ e (K d − D) over the columns of a tile, of each network.

    Of d = (z − top) · unit, its exponential e, and D = Σ d over all networks.
    """
    of_all = (logits[0] - tops[0][:, None]) * unit
    for k in tl.static_range(1, K):
        of_all += (logits[k] - tops[k][:, None]) * unit
    totals = ()
    sums = ()
    for k in tl.static_range(K):
        d = (logits[k] - tops[k][:, None]) * unit
        e = tl.exp2(d)
        totals += (tl.sum(e, 1),)
        sums += (tl.sum(_selected(e, d, of_all, K), 1),)
    return totals, sums


@triton.jit
def distance(totals, sums, K: tl.constexpr):
    """Return all divergences of whole rows in bits, from the sums of each network.

    No Z is in them but that of its own softmax: K log2 Z − Σ log2 Z of all networks add up to 0.
    """
    found = sums[0] / totals[0]
    for k in tl.static_range(1, K):
        found += sums[k] / totals[k]
    return tl.where(found < 0, 0.0, found)  # by rounding alone; the NaN without a softmax stays


@triton.jit
def values(totals, sums, K: tl.constexpr):
    """Return Σ p (K log2 p − L) of each network, from its sums over a whole row.

    Rounding alone makes one negative; the NaN of a row without a softmax stays.
    """
    # a difference of logarithms would lose the digits of networks that are alike
    above = ()
    of_all = tl.zeros_like(totals[0])
    for k in tl.static_range(K):
        above += (tl.log2(totals[k] / totals[0]),)
        of_all += above[k]
    found = ()
    for k in tl.static_range(K):
        value = sums[k] / totals[k] - (K * above[k] - of_all)
        # a sum drops the NaN of 0·∞, which the Z of all have where a row has no softmax
        value += of_all - of_all
        found += (tl.where(value < 0, 0.0, value),)
    return found


@triton.jit
def slopes_of_tile(
    logits, of, unit, STUDENT: tl.constexpr, CONSTANTS: tl.constexpr, K: tl.constexpr
):
    """Return T times the gradient of one network in a tile of the logits of all."""
    p = tl.exp2((logits[STUDENT] - of.tops[STUDENT]) * unit) * (1 / of.totals[STUDENT])
    others = tl.zeros_like(p)
    for k in tl.static_range(K):
        if k != STUDENT:
            others += tl.exp2((logits[k] - of.tops[k]) * unit) * (1 / of.totals[k])
    slopes = (K - 1) * p - others
    if not CONSTANTS:
        own = (logits[STUDENT] - of.tops[STUDENT]) * unit - tl.log2(of.totals[STUDENT])
        above = tl.zeros_like(p)
        for k in tl.static_range(K):
            if k != STUDENT:
                above += own - ((logits[k] - of.tops[k]) * unit - tl.log2(of.totals[k]))
        pull = tl.where(p > 0, p * (above - of.above[STUDENT]), 0.0)
        slopes += pull * finite_unit(of.above[STUDENT])
    return slopes
