"""The kernel of rows that stay on chip, those of all networks at once.

Bytes for each (row, entry) of bfloat16 and K networks: 2 K read and, of the gradients, 2 K written.
"""

import triton
import triton.language as tl

from fastkd.kernels.device import Strided
from fastkd.kernels.peers.tiles import Peers, distance, slopes_of_tile, sums_of_tile, values
from fastkd.kernels.rows.on_chip import with_certain
from fastkd.kernels.rows.reading import Pointers
from fastkd.kernels.rows.terms import LOWEST, is_certain
from fastkd.kernels.tiles import INFINITY, LN2, log2_units, number, row_offset, rows_of_each


@triton.jit(do_not_specialize=["n_rows", "inner", "upstream_stride"])
def whole_peers(
    networks,  # K of Strided (n_rows, n_cols)
    gradients,  # Strided (n_rows, n_cols) of each network that learns, written
    row_mask_ptr,  # (n_rows,) or None
    upstream_ptr,  # (n_rows,) of the losses; None: the losses alone
    losses_ptr,  # (n_rows,); None: the gradients alone
    n_rows,
    n_cols,
    inner,  # size of the logits' last dimension but one
    upstream_stride,
    temperature,
    scale,
    PLACES: tl.constexpr, CONSTANTS: tl.constexpr, DTYPE: tl.constexpr, ON_DEVICE: tl.constexpr,
    ALIGNMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the losses or the gradients of ROWS rows: program (block of rows).

    Rows that do not count are not read. PLACES has that of each network's gradient, −1 of none.
    """
    K: tl.constexpr = len(networks)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < n_rows
    counts = exists
    if row_mask_ptr is not None:
        counts = tl.load(row_mask_ptr + rows, exists, 0) != 0
    n_cols = n_cols // ALIGNMENT * ALIGNMENT  # unchanged; tells the compiler what divides it
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = counts[:, None] & (columns < n_cols)
    of_temperature = number(temperature, ON_DEVICE, DTYPE)
    unit, scale = log2_units(of_temperature, DTYPE), number(scale, ON_DEVICE, DTYPE)
    starts = rows_of_each(networks, rows[:, None], inner, 0, ALIGNMENT)
    logits = ()
    tops = ()
    for k in tl.static_range(K):
        z = tl.load(starts[k] + columns, inside, -INFINITY).to(DTYPE)
        logits += (z,)
        tops += (tl.maximum(tl.max(z, 1), LOWEST),)
    totals, sums = sums_of_tile(logits, tops, unit, K)
    if losses_ptr is not None:
        value = distance(totals, sums, K)
        tl.store(losses_ptr + rows, tl.where(counts, value * (scale * LN2), 0.0), exists)
    if upstream_ptr is not None:
        above = values(totals, sums, K)
        factor = tl.load(upstream_ptr + rows.to(tl.int64) * upstream_stride, exists, 0.0)
        factor = tl.where(counts, factor.to(DTYPE) * (scale / of_temperature), 0.0)[:, None]
        of_tops = ()
        of_totals = ()
        of_above = ()
        have_softmax = counts
        for k in tl.static_range(K):
            of_tops += (tops[k][:, None],)
            of_totals += (totals[k][:, None],)
            of_above += (above[k][:, None],)
            have_softmax &= totals[k] > 0
        of = Peers(of_tops, of_totals, of_above)
        for k in tl.static_range(K):
            if PLACES[k] >= 0:
                slopes = slopes_of_tile(logits, of, unit, k, CONSTANTS, K)
                slopes = tl.where(factor == 0, 0.0, slopes * factor)  # 0 wins over a NaN
                certain = have_softmax & is_certain(totals[k], totals[k], totals[k], False)
                pointers = Pointers(starts[k], starts[k], -1)
                slopes = with_certain(slopes, pointers, columns, inside, certain, tops[k], False)
                found = gradients[PLACES[k]]
                gradient = Strided(found[0], found[1], found[2])
                places = row_offset(rows, inner, gradient)[:, None] // ALIGNMENT * ALIGNMENT
                tl.store(
                    gradient.ptr + places + columns,
                    slopes.to(found[0].dtype.element_ty),
                    mask=exists[:, None] & (columns < n_cols),
                )
