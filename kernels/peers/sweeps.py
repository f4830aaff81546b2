"""Kernels of rows that are too long to stay on chip: a sweep for the sums, one for the gradients.

Bytes for each (row, entry) of bfloat16 and K networks: the sums read 2 K, and the gradients read
and write 2 K each. Rows of which a network is nearly certain are read once more.
"""

import triton
import triton.language as tl

from fastkd.kernels.device import Strided
from fastkd.kernels.peers.tiles import Peers, distance, slopes_of_tile, sums_of_tile, values
from fastkd.kernels.rows.reading import edges, vectors
from fastkd.kernels.rows.terms import LOWEST, is_certain
from fastkd.kernels.tiles import (
    INFINITY,
    LN2,
    head_of,
    log2_units,
    number,
    row_offset,
    rows_of_each,
)


@triton.jit
def _load(starts, columns, inside, DTYPE: tl.constexpr):
    """Return a tuple of the tiles of all networks."""
    logits = ()
    for k in tl.static_range(len(starts)):
        logits += (tl.load(starts[k] + columns, inside, -INFINITY).to(DTYPE),)
    return logits


@triton.jit
def _raised(tops, totals, sums, higher, unit, K: tl.constexpr):
    """Return the totals and sums of threads in units of pivots that have risen.

    With r = the rise · unit and R = Σ r a sum of e (K d − D) loses Z (K r − R).
    """
    of_all = (higher[0] - tops[0]) * unit
    for k in tl.static_range(1, K):
        of_all += (higher[k] - tops[k]) * unit
    of_totals = ()
    of_sums = ()
    for k in tl.static_range(K):
        rise = (higher[k] - tops[k]) * unit
        shrink = tl.exp2(-rise)
        of_totals += (totals[k] * shrink,)
        moved = (sums[k] - totals[k] * (K * rise - of_all)) * shrink
        # selected, because a factor that has vanished wins over an infinite sum
        of_sums += (tl.where(shrink > 0, moved, 0.0),)
    return of_totals, of_sums


@triton.jit
def _fold(logits, tops, totals, sums, unit, K: tl.constexpr):
    """Add a tile [R, K] of every network to the pivots, totals and sums [R] of R threads."""
    higher = ()
    for k in tl.static_range(K):
        higher += (tl.maximum(tops[k], tl.max(logits[k], 1)),)
    totals, sums = _raised(tops, totals, sums, higher, unit, K)
    more, of_more = sums_of_tile(logits, higher, unit, K)
    of_totals = ()
    of_sums = ()
    for k in tl.static_range(K):
        of_totals += (totals[k] + more[k],)
        of_sums += (sums[k] + of_more[k],)
    return higher, of_totals, of_sums


@triton.jit(do_not_specialize=["inner"])
def peer_statistics(
    networks,  # K of Strided (n_rows, n_cols)
    row_mask_ptr,  # (n_rows,) or None
    losses_ptr,  # (n_rows,)
    statistics_ptr,  # (n_rows, 3 K): the tops, Z and values of all networks
    n_cols,
    inner,  # size of the logits' last dimension but one
    temperature,
    scale,
    DTYPE: tl.constexpr, ON_DEVICE: tl.constexpr, CONGRUENT: tl.constexpr, THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the losses and statistics of a row: program (row)."""
    K: tl.constexpr = len(networks)
    row = tl.program_id(0)
    statistics_row = statistics_ptr + row.to(tl.int64) * (3 * K)
    if row_mask_ptr is not None:
        if tl.load(row_mask_ptr + row) == 0:  # so that no logits of a masked row are read
            tl.store(losses_ptr + row, 0.0)
            for k in tl.static_range(3 * K):
                tl.store(statistics_row + k, 0.0)
            return
    unit = log2_units(number(temperature, ON_DEVICE, DTYPE), DTYPE)
    first = Strided(networks[0][0], networks[0][1], networks[0][2])
    head = head_of(first.ptr + row_offset(row, inner, first), n_cols, WIDTH)
    starts = rows_of_each(networks, row, inner, head, 0 if CONGRUENT else -1)
    n_vectors = (n_cols - head) // WIDTH
    tops = ()
    totals = ()
    for _k in tl.static_range(K):
        tops += (tl.full([THREADS], LOWEST, DTYPE),)
        totals += (tl.zeros([THREADS], DTYPE),)
    sums = totals
    for i in range(0, n_vectors, THREADS):
        inside = (i + tl.arange(0, THREADS) < n_vectors)[:, None]
        logits = _load(starts, vectors(i, THREADS, WIDTH), inside, DTYPE)
        tops, totals, sums = _fold(logits, tops, totals, sums, unit, K)
    if n_cols % WIDTH + head > 0:
        at_edge, inside_edge = edges(head, n_cols, THREADS, WIDTH)
        of_edges = _load(starts, at_edge, inside_edge, DTYPE)
        tops, totals, sums = _fold(of_edges, tops, totals, sums, unit, K)
    highest = ()
    for k in tl.static_range(K):
        highest += (tl.max(tops[k], 0),)
    of_threads, sums_of_threads = _raised(tops, totals, sums, highest, unit, K)
    of_row = ()
    sums_of_row = ()
    for k in tl.static_range(K):
        of_row += (tl.sum(of_threads[k], 0),)
        sums_of_row += (tl.sum(sums_of_threads[k], 0),)
    above = values(of_row, sums_of_row, K)
    value = distance(of_row, sums_of_row, K)
    tl.store(losses_ptr + row, value * (number(scale, ON_DEVICE, DTYPE) * LN2))
    for k in tl.static_range(K):
        tl.store(statistics_row + k, highest[k])
        tl.store(statistics_row + (K + k), of_row[k])
        tl.store(statistics_row + (2 * K + k), above[k])


@triton.jit
def _without_top(
    starts, of, columns, inside, unit, factor, STUDENT: tl.constexpr, CONSTANTS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the sum of a network's gradient in a tile without its top, and the top's column."""
    logits = _load(starts, columns, inside, DTYPE)
    slopes = slopes_of_tile(logits, of, unit, STUDENT, CONSTANTS, len(starts)) * factor
    is_top = logits[STUDENT] == of.tops[STUDENT]
    top = tl.max(tl.max(tl.where(inside & is_top, columns, -(1 << 30)), 1), 0)
    return tl.sum(tl.sum(tl.where(inside & ~is_top, slopes, 0.0), 1), 0), top


@triton.jit
def _store_tile(
    starts, written, of, columns, inside, unit, factor, have_softmax,
    PLACES: tl.constexpr, CONSTANTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a tile, but for the class of which a network is certain."""
    logits = _load(starts, columns, inside & (factor != 0), DTYPE)
    for k in tl.static_range(len(starts)):
        if PLACES[k] >= 0:
            slopes = slopes_of_tile(logits, of, unit, k, CONSTANTS, len(starts))
            slopes = tl.where(factor == 0, 0.0, slopes * factor)
            certain = have_softmax & is_certain(of.totals[k], of.totals[k], of.totals[k], False)
            kept = inside & ~(certain & (logits[k] == of.tops[k]))
            gradient_row = written[PLACES[k]]
            tl.store(gradient_row + columns, slopes.to(gradient_row.dtype.element_ty), kept)


@triton.jit(do_not_specialize=["inner", "upstream_stride"])
def peer_gradients(
    networks,  # K of Strided (n_rows, n_cols)
    gradients,  # Strided (n_rows, n_cols) of each network that learns, written
    row_mask_ptr,  # (n_rows,) or None
    upstream_ptr,  # (n_rows,) of the losses
    statistics_ptr,  # (n_rows, 3 K)
    n_cols,
    n_blocks,  # of VECTORS vectors, to a row
    inner,  # size of the logits' last dimension but one
    upstream_stride,
    temperature,
    scale,
    PLACES: tl.constexpr, CONSTANTS: tl.constexpr, DTYPE: tl.constexpr, ON_DEVICE: tl.constexpr,
    CONGRUENT: tl.constexpr, VECTORS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of a block of a row: program row · n_blocks + block.

    PLACES has that of each network's gradient among all, −1 of one that learns nothing.
    Where a network is nearly certain of a class, whose Z has lost the digits of the rest, that of
    this class is minus the sum of the others: the first block reads the whole row for it.
    """
    K: tl.constexpr = len(networks)
    program = tl.program_id(0)
    row, block = program // n_blocks, program % n_blocks
    of_temperature = number(temperature, ON_DEVICE, DTYPE)
    unit = log2_units(of_temperature, DTYPE)
    factor = number(scale, ON_DEVICE, DTYPE) / of_temperature
    factor *= tl.load(upstream_ptr + row.to(tl.int64) * upstream_stride).to(DTYPE)
    if row_mask_ptr is not None:
        factor = tl.where(tl.load(row_mask_ptr + row) != 0, factor, 0.0)
    statistics_row = statistics_ptr + row.to(tl.int64) * (3 * K)
    tops = ()
    totals = ()
    above = ()
    have_softmax = factor != 0
    for k in tl.static_range(K):
        tops += (tl.load(statistics_row + k),)
        totals += (tl.load(statistics_row + (K + k)),)
        above += (tl.load(statistics_row + (2 * K + k)),)
        have_softmax &= totals[k] > 0
    of = Peers(tops, totals, above)
    first = Strided(networks[0][0], networks[0][1], networks[0][2])
    head = head_of(first.ptr + row_offset(row, inner, first), n_cols, WIDTH)
    starts = rows_of_each(networks, row, inner, head, 0 if CONGRUENT else -1)
    written = rows_of_each(gradients, row, inner, head, 0 if CONGRUENT else -1)
    n_vectors = (n_cols - head) // WIDTH
    inside = (block * VECTORS + tl.arange(0, VECTORS) < n_vectors)[:, None]
    _store_tile(
        starts, written, of, vectors(block * VECTORS, VECTORS, WIDTH), inside, unit,
        factor, have_softmax, PLACES, CONSTANTS, DTYPE,
    )  # fmt: skip
    if block == 0:
        at_edge, inside_edge = edges(head, n_cols, 2, WIDTH)
        _store_tile(
            starts, written, of, at_edge, inside_edge, unit, factor, have_softmax,
            PLACES, CONSTANTS, DTYPE,
        )  # fmt: skip
        for k in tl.static_range(K):
            if PLACES[k] >= 0:
                if have_softmax & is_certain(totals[k], totals[k], totals[k], False):
                    others, top = _without_top(
                        starts, of, at_edge, inside_edge, unit, factor, k, CONSTANTS, DTYPE
                    )
                    for i in range(0, n_vectors, VECTORS):
                        within = (i + tl.arange(0, VECTORS) < n_vectors)[:, None]
                        more, found = _without_top(
                            starts, of, vectors(i, VECTORS, WIDTH), within, unit, factor, k,
                            CONSTANTS, DTYPE,
                        )  # fmt: skip
                        others, top = others + more, tl.maximum(top, found)
                    gradient_row = written[PLACES[k]]
                    value = (-others).to(gradient_row.dtype.element_ty)
                    tl.store(gradient_row + top, value)
