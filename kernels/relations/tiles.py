"""Tiles of pairs of examples: their distances, their angles with every third, the gradient.

The formulas are those of launch.py. A pair has four numbers: h and r of the student, h and r of the
teacher. They lie side by side for each tile of columns, [row, tile, 4, TILE], so that one address
reaches all of them. They are 0 where there are no examples, so that no loop over third points has a
mask. A visit of a tile of edges by a third point loads 8 · TILE numbers for TILE² edges, 1 B an
edge in float32.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.tiles import number
from fastkd.problems.relations import LEAST_LENGTH, LEAST_SQUARE

TILE = tl.constexpr(32)  # of edges: other sizes bring spills or barriers into the loop
_LEAST_SQUARE = tl.constexpr(LEAST_SQUARE)
_LEAST_LENGTH = tl.constexpr(LEAST_LENGTH)
_PARTS = tl.constexpr(512)  # of a sum: as many as one program adds at once


class Embeddings(NamedTuple):
    """Embeddings of a network, or their transpose, as an argument of kernels."""

    ptr: Any  # (N, width), transposed (width, padded)
    stride: Any  # between rows, transposed between features, in elements
    width: Any


# integers that vary with N stay outside of tuples: not every Triton would leave them unspecialised


@triton.jit
def _root(x, DTYPE: tl.constexpr):
    """Return √x, rounded to nearest."""
    return tl.sqrt_rn(x) if DTYPE == tl.float32 else tl.sqrt(x)


@triton.jit
def _quotient(x, y, DTYPE: tl.constexpr):
    """Return x / y, rounded to nearest."""
    return tl.div_rn(x, y) if DTYPE == tl.float32 else x / y


@triton.jit
def _huber_slope(x, DTYPE: tl.constexpr):
    """Return the penalty's slope; float32 alone has an instruction for it."""
    if DTYPE == tl.float32:
        return tl.clamp(x, -1.0, 1.0)
    return tl.minimum(tl.maximum(x, -1.0), 1.0)


@triton.jit
def _total(parts_ptr, n_parts, DTYPE: tl.constexpr):
    """Return the sum of what programs stored, in an order that is always the same."""
    places = tl.arange(0, _PARTS)
    total = tl.zeros([_PARTS], DTYPE)
    for first in range(0, n_parts, _PARTS):
        total += tl.load(parts_ptr + first + places, mask=first + places < n_parts, other=0.0)
    return tl.sum(total)


@triton.jit
def _pairs_at(pairs_ptr, row, column, padded, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return pointers [ROWS, COLUMNS] to h of the student, (row, column) being the first pair."""
    start = (row.to(tl.int64) * padded + column) * 4
    lanes = tl.arange(0, COLUMNS)
    places = lanes // TILE * (4 * TILE) + lanes % TILE
    return pairs_ptr + start + (tl.arange(0, ROWS)[:, None] * (4 * padded) + places[None, :])


@triton.jit
def _transposed_tile(x, found, n, padded, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a tile of rows [ROWS, COLUMNS] as [COLUMNS, ROWS], 0 where there are no embeddings."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < x.width)[None, :]
    tile = tl.load(x.ptr + rows.to(tl.int64)[:, None] * x.stride + columns[None, :], inside, 0.0)
    places = columns.to(tl.int64)[:, None] * padded + rows[None, :]
    kept = (columns < found.width)[:, None] & (rows < padded)[None, :]
    tl.store(found.ptr + places, tl.trans(tile), kept)


# unspecialised, so that every N is the same code
@triton.jit(do_not_specialize=["n"])
def transposes(
    student,  # Embeddings
    teacher,  # Embeddings
    student_found,  # Embeddings, transposed, written
    teacher_found,  # Embeddings, transposed, written
    n,
    padded,  # N, rounded up to whole tiles
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write transposes, which warps read in whole lines: programs (rows, features, network)."""
    if tl.program_id(2) == 0:
        _transposed_tile(student, student_found, n, padded, ROWS, COLUMNS)
    else:
        _transposed_tile(teacher, teacher_found, n, padded, ROWS, COLUMNS)


@triton.jit
def _squares_of_tile(x, rows, columns, zeros, DTYPE: tl.constexpr, DEPTH: tl.constexpr):
    """Return [rows, columns], the squared distances between embeddings, given their transpose."""
    left, right = x.ptr + rows, x.ptr + columns
    total = zeros
    for _ in range(0, x.width, DEPTH):
        part = zeros  # a partial sum, because rounding grows with the number of terms
        for _feature in tl.static_range(DEPTH):
            difference = tl.load(left).to(DTYPE)[:, None] - tl.load(right).to(DTYPE)[None, :]
            part += difference * difference
            left += x.stride
            right += x.stride
        total += part
    return total


@triton.jit(do_not_specialize=["n"])
def squares(
    student,  # Embeddings, transposed, their width a multiple of DEPTH
    teacher,  # Embeddings, transposed
    pairs_ptr,  # (padded, padded / TILE, 4, TILE), written
    lengths_ptr,  # (2, tiles, tiles), written: sums of the distances
    n,
    padded,  # N, rounded up to whole tiles
    beta,
    ON_DEVICE: tl.constexpr,
    DTYPE: tl.constexpr,
    SIDE: tl.constexpr,  # of a tile
    DEPTH: tl.constexpr,
):
    """Write the pairs: programs (tile, tile, network).

    Programs above the diagonal write for those below.
    """
    i, j, network = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_tiles = tl.num_programs(1)
    length_ptr = lengths_ptr + (network * n_tiles + i) * n_tiles + j
    if j < i:
        tl.store(length_ptr, 0.0)
        return
    rows, columns = i * SIDE + tl.arange(0, SIDE), j * SIDE + tl.arange(0, SIDE)
    pairs_ptr += network * (2 * TILE)
    h_ptr = _pairs_at(pairs_ptr, i * SIDE, j * SIDE, padded, SIDE, SIDE)
    # loaded, because zeros get the layout of the stores then, which is the one with vectors
    zeros = tl.load(h_ptr, mask=(rows < 0)[:, None] & (columns < 0)[None, :], other=0.0)
    if network == 0:
        q = _squares_of_tile(student, rows, columns, zeros, DTYPE, DEPTH)
    else:
        q = _squares_of_tile(teacher, rows, columns, zeros, DTYPE, DEPTH)
    exists = (rows < n)[:, None] & (columns < n)[None, :]
    apart = exists & (rows[:, None] != columns[None, :])
    distance = _root(q, DTYPE)
    close = (distance < _LEAST_LENGTH) | (apart == 0)  # False for NaN, which stays
    r = tl.where(close, 0.0, _quotient(1.0, tl.where(close, 1.0, distance), DTYPE))
    h = tl.where(exists, q, 0.0) * _quotient(0.5, number(beta, ON_DEVICE, DTYPE), DTYPE)
    length = _root(tl.where(q < _LEAST_SQUARE, _LEAST_SQUARE, q), DTYPE)
    times = tl.where(i == j, 1.0, 2.0)
    tl.store(length_ptr, tl.sum(tl.where(apart, length, 0.0)) * times)
    tl.store(h_ptr, h)
    tl.store(h_ptr + TILE, r)
    if i != j:
        mirrored_ptr = _pairs_at(pairs_ptr, j * SIDE, i * SIDE, padded, SIDE, SIDE)
        tl.store(mirrored_ptr, tl.trans(h))
        tl.store(mirrored_ptr + TILE, tl.trans(r))


@triton.jit
def _relative_distances(h, ht, apart, lengths_ptr, n_lengths, n, beta, DTYPE: tl.constexpr):
    """Return d of the student, the mean of all d times beta, and the penalty's argument."""
    n_pairs = n.to(DTYPE) * (n - 1).to(DTYPE)
    unit = beta * _total(lengths_ptr, n_lengths, DTYPE) / n_pairs
    unit_t = beta * _total(lengths_ptr + n_lengths, n_lengths, DTYPE) / n_pairs
    q, qt = 2 * beta * h, 2 * beta * ht
    d = _root(tl.where(q < _LEAST_SQUARE, _LEAST_SQUARE, q), DTYPE)
    t = _root(tl.where(qt < _LEAST_SQUARE, _LEAST_SQUARE, qt), DTYPE)
    return d, unit, tl.where(apart, d / unit - t / unit_t, 0.0)


@triton.jit
def _apart(i, j, n):
    """Return [TILE, TILE], whether a pair of a tile is two different examples."""
    a, b = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    return (a < n)[:, None] & (b < n)[None, :] & (a[:, None] != b[None, :])


@triton.jit
def _is_local(i, first, n_local):
    """Return [TILE, 1], whether a row of a tile is one of the n_local rows from `first` on."""
    a = i * TILE + tl.arange(0, TILE)
    return ((a >= first) & (a < first + n_local))[:, None]


# each program stores one number in `losses`, so that its alignment changes no code
@triton.jit(
    do_not_specialize=["n", "n_lengths", "first", "n_local"],
    do_not_specialize_on_alignment=["losses_ptr"],
)
def distances(
    pairs_ptr,  # (padded, padded / TILE, 4, TILE)
    lengths_ptr,  # (2, n_lengths)
    losses_ptr,  # (tiles, tiles), written
    of_means_ptr,  # (tiles, tiles), written: sums of slope · distance
    n,
    padded,  # N, rounded up to whole tiles
    n_lengths,
    first,
    n_local,
    distance_weight,
    beta,
    ON_DEVICE: tl.constexpr,
    PART: tl.constexpr,  # whether the loss is that of n_local rows from `first` on
    DTYPE: tl.constexpr,
):
    """Write the loss of the distances: programs (tile, tile)."""
    i, j = tl.program_id(0), tl.program_id(1)
    place = i * tl.num_programs(1) + j
    h_ptr = _pairs_at(pairs_ptr, i * TILE, j * TILE, padded, TILE, TILE)
    h, ht = tl.load(h_ptr), tl.load(h_ptr + 2 * TILE)
    beta_, size = number(beta, ON_DEVICE, DTYPE), n.to(DTYPE)
    apart = _apart(i, j, n)
    d, _, x = _relative_distances(h, ht, apart, lengths_ptr, n_lengths, n, beta_, DTYPE)
    slope_x = _huber_slope(x, DTYPE)
    penalty = slope_x * (x - 0.5 * slope_x)
    if PART:
        penalty = tl.where(_is_local(i, first, n_local), penalty, 0.0)
    scale = beta_ * number(distance_weight, ON_DEVICE, DTYPE) / (size * size)
    tl.store(losses_ptr + place, tl.sum(penalty) * scale)
    tl.store(of_means_ptr + place, tl.sum(tl.where(apart, slope_x * d, 0.0)))


@triton.jit(do_not_specialize=["n", "first", "n_local", "per_split"])
def edges(
    pairs_ptr,  # (padded, padded / TILE, 4, TILE)
    slopes_ptr,  # (splits, padded, padded), written: the place of b comes before that of a
    losses_ptr,  # (splits, tiles, tiles), written
    n,
    padded,  # N, rounded up to whole tiles
    first,
    n_local,
    per_split,  # third points
    angle_weight,
    beta,
    ON_DEVICE: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    PART: tl.constexpr,  # whether only edges of n_local rows from `first` on are visited
    DTYPE: tl.constexpr,
):
    """Write the loss of the angles and its slopes g: programs (tile of a, tile of b, split of c).

    For the whole batch a program above the diagonal writes for that below.
    """
    i, j, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_tiles = tl.num_programs(1)
    losses_ptr += (split * n_tiles + i) * n_tiles + j
    start, stop = split * per_split, tl.minimum(split * per_split + per_split, n)
    if PART:  # rows of other ranks are not visited
        stop = tl.where((i * TILE < first + n_local) & (i * TILE + TILE > first), stop, start)
    elif j < i:
        tl.store(losses_ptr, 0.0)
        return
    lanes = tl.arange(0, TILE)
    h_ptr = _pairs_at(pairs_ptr, i * TILE, j * TILE, padded, TILE, TILE)
    h, r = tl.load(h_ptr), tl.load(h_ptr + TILE)
    ht, rt = tl.load(h_ptr + 2 * TILE), tl.load(h_ptr + 3 * TILE)
    k, kt, half_r = h * r, ht * rt, 0.5 * r
    loss, by_r, by_u = h * 0, h * 0, h * 0
    row_ptr = pairs_ptr + start.to(tl.int64) * (4 * padded) + lanes
    a_ptr, b_ptr = row_ptr + i * (4 * TILE), row_ptr + j * (4 * TILE)
    for _ in range(start, stop):
        ha, hb = tl.load(a_ptr)[:, None], tl.load(b_ptr)[None, :]
        ra, rb = tl.load(a_ptr + TILE)[:, None], tl.load(b_ptr + TILE)[None, :]
        hta, htb = tl.load(a_ptr + 2 * TILE)[:, None], tl.load(b_ptr + 2 * TILE)[None, :]
        rta, rtb = tl.load(a_ptr + 3 * TILE)[:, None], tl.load(b_ptr + 3 * TILE)[None, :]
        at_c = ra * rb
        x = at_c * ((ha + hb) - h) - (rta * rtb) * ((hta + htb) - ht)
        slope_x = _huber_slope(x, DTYPE)
        loss += slope_x * (x - 0.5 * slope_x)
        if NEEDS_GRAD:
            u, ut = ha - hb, hta - htb
            slope_a = ra * _huber_slope(ra * (k + r * u) - rta * (kt + rt * ut), DTYPE)
            slope_b = _huber_slope(rb * (k - r * u) - rtb * (kt - rt * ut), DTYPE)
            by_r += half_r * (slope_a + slope_b * rb)
            by_r -= at_c * slope_x
            by_u += u * (slope_a - slope_b * rb)
        a_ptr += 4 * padded
        b_ptr += 4 * padded
    beta_, size = number(beta, ON_DEVICE, DTYPE), n.to(DTYPE)
    scale = number(angle_weight, ON_DEVICE, DTYPE) / (size * size * size)
    if PART:
        loss = tl.where(_is_local(i, first, n_local), loss, 0.0)
    else:
        loss *= tl.where(i == j, 1.0, 2.0)
    tl.store(losses_ptr, tl.sum(loss) * (beta_ * scale))
    if NEEDS_GRAD:
        slope = (by_r - beta_ * (r * (r * (r * by_u)))) * scale  # r³ alone may underflow
        slope = tl.where(_apart(i, j, n), slope, 0.0)
        slopes_ptr += split.to(tl.int64) * padded * padded
        within = lanes[:, None] * padded + lanes[None, :]
        mirrored_ptr = slopes_ptr + j.to(tl.int64) * TILE * padded + i * TILE
        tl.store(mirrored_ptr + within, tl.trans(slope))
        if not PART:
            if i != j:
                tl.store(slopes_ptr + i.to(tl.int64) * TILE * padded + j * TILE + within, slope)


@triton.jit(do_not_specialize=["n", "n_lengths", "n_tiles", "n_losses", "n_splits"])
def sum_splits(
    pairs_ptr,  # (padded, padded / TILE, 4, TILE)
    lengths_ptr,  # (2, n_lengths)
    slopes_ptr,  # (splits, padded, padded), the first of which is written
    losses_ptr,  # (n_losses,)
    of_means_ptr,  # (n_tiles, n_tiles)
    loss_ptr,  # (), written
    n,
    padded,  # N, rounded up to whole tiles
    n_lengths,
    n_tiles,
    n_losses,
    n_splits,
    distance_weight,
    beta,
    ON_DEVICE: tl.constexpr,
    DISTANCE: tl.constexpr,  # whether distances have a part in the loss
    NEEDS_GRAD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sum the loss, and the slopes of angles and distances in place: programs (tile, tile)."""
    i, j = tl.program_id(0), tl.program_id(1)
    if i + j == 0:
        loss = _total(losses_ptr, n_losses, DTYPE)
        tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    if NEEDS_GRAD:
        lanes = tl.arange(0, TILE)
        slope_ptr = slopes_ptr + i.to(tl.int64) * TILE * padded + j * TILE
        slope_ptr += lanes[:, None] * padded + lanes[None, :]
        slope = tl.load(slope_ptr, mask=(lanes < n_splits * TILE)[:, None], other=0.0)
        split_ptr = slope_ptr
        for _ in range(1, n_splits):
            split_ptr += padded.to(tl.int64) * padded
            slope += tl.load(split_ptr)
        if DISTANCE:
            h_ptr = _pairs_at(pairs_ptr, i * TILE, j * TILE, padded, TILE, TILE)
            h, r, ht = tl.load(h_ptr), tl.load(h_ptr + TILE), tl.load(h_ptr + 2 * TILE)
            beta_, size = number(beta, ON_DEVICE, DTYPE), n.to(DTYPE)
            apart = _apart(i, j, n)
            _, unit, x = _relative_distances(h, ht, apart, lengths_ptr, n_lengths, n, beta_, DTYPE)
            # every distance moves the mean, and with it all penalties
            of_mean = _total(of_means_ptr, n_tiles * n_tiles, DTYPE) * beta_
            of_mean = of_mean / (unit * size * (size - 1))
            scale = beta_ * number(distance_weight, ON_DEVICE, DTYPE) / (size * size * unit)
            moved = apart & (2 * beta_ * h >= _LEAST_SQUARE)
            slope += tl.where(moved, r * (_huber_slope(x, DTYPE) - of_mean) * scale, 0.0)
        tl.store(slope_ptr, slope)


@triton.jit(do_not_specialize=["n", "first", "n_local"])
def laplacian(
    x,  # Embeddings
    slopes_ptr,  # (padded, padded)
    gradient_ptr,  # (n_local, width), written
    n,
    padded,
    first,
    n_local,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Write 2 Σ_k slopes_ki (x_i − x_k): programs (local rows, features).

    DEPTH of the k are loaded at once, so that few waits for the cache follow one another.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists, inside = rows < n_local, columns < x.width
    both = exists[:, None] & inside[None, :]
    places, k = first + rows, tl.arange(0, DEPTH)
    left_ptr = x.ptr + places[:, None].to(tl.int64) * x.stride + columns[None, :]
    left = tl.load(left_ptr, mask=both, other=0.0).to(DTYPE)
    total = left * 0
    right_ptr = x.ptr + k[:, None].to(tl.int64) * x.stride + columns[None, :]
    slope_ptr = slopes_ptr + k[:, None] * padded + places[None, :]
    for start in range(0, n, DEPTH):
        is_there = (start + k < n)[:, None] & inside[None, :]
        right = tl.load(right_ptr, mask=is_there, other=0.0).to(DTYPE)
        slope = tl.load(slope_ptr, mask=exists[None, :], other=0.0)  # 0 beyond the last example
        total += tl.sum(slope[:, :, None] * (left[None, :, :] - right[:, None, :]), 0)
        right_ptr += DEPTH * x.stride
        slope_ptr += DEPTH * padded
    gradient_ptr += rows[:, None].to(tl.int64) * x.width + columns[None, :]
    tl.store(gradient_ptr, (2 * total).to(gradient_ptr.dtype.element_ty), mask=both)
