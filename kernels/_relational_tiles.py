"""Tiles of pairs of examples: their distances, their angles with every third, the gradient.

What is known of a pair, `pairs`, are four numbers: h and r of the student, h and r of the teacher.
They lie side by side for each tile of columns, [row, tile, 4, TILE], so that one address reaches
all of them. They are 0 where there are no examples: no loop over third points has a mask.
"""

import triton
import triton.language as tl

from fastkd.kernels._tiles import number
from fastkd.relational import LEAST_LENGTH, LEAST_SQUARE

TILE = tl.constexpr(32)  # of edges; other sizes bring spills or barriers into the loop
_LEAST_SQUARE = tl.constexpr(LEAST_SQUARE)
_LEAST_LENGTH = tl.constexpr(LEAST_LENGTH)
_PARTS = tl.constexpr(512)  # of a sum that one program adds at once


@triton.jit
def _root(x, DTYPE: tl.constexpr):
    return tl.sqrt_rn(x) if DTYPE == tl.float32 else tl.sqrt(x)


@triton.jit
def _quotient(x, y, DTYPE: tl.constexpr):
    return tl.div_rn(x, y) if DTYPE == tl.float32 else x / y


@triton.jit
def _bent(x, DTYPE: tl.constexpr):
    """The penalty's slope: one instruction, which is only there for float32."""
    if DTYPE == tl.float32:
        return tl.clamp(x, -1.0, 1.0)
    return tl.minimum(tl.maximum(x, -1.0), 1.0)


@triton.jit
def _total(parts_ptr, n_parts, DTYPE: tl.constexpr):
    """The sum of what programs left behind, in an order that is always the same."""
    places = tl.arange(0, _PARTS)
    total = tl.zeros([_PARTS], DTYPE)
    for first in range(0, n_parts, _PARTS):
        total += tl.load(parts_ptr + first + places, mask=first + places < n_parts, other=0.0)
    return tl.sum(total)


@triton.jit
def _pairs_at(pairs_ptr, row, column, padded, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers [ROWS, COLUMNS] to h of the student from (row, column), a multiple of TILE, on."""
    start = (row.to(tl.int64) * padded + column) * 4
    lanes = tl.arange(0, COLUMNS)
    places = lanes // TILE * (4 * TILE) + lanes % TILE
    return pairs_ptr + start + (tl.arange(0, ROWS)[:, None] * (4 * padded) + places[None, :])


@triton.jit
def _squares_of_tile(
    x_ptr, stride, width, rows, columns, n, zeros, DTYPE: tl.constexpr, DEPTH: tl.constexpr
):
    """Of the differences between rows and columns of x: [rows, columns]."""
    left, right = x_ptr + rows.to(tl.int64) * stride, x_ptr + columns.to(tl.int64) * stride
    total = zeros
    for first in range(0, width, DEPTH):
        part = zeros  # rounding grows with the number of terms
        for k in tl.static_range(DEPTH):
            inside = first + k < width
            a = tl.load(left + first + k, mask=(rows < n) & inside, other=0.0).to(DTYPE)
            b = tl.load(right + first + k, mask=(columns < n) & inside, other=0.0).to(DTYPE)
            difference = a[:, None] - b[None, :]
            part += difference * difference
        total += part
    return total


# all that varies with N is the same code
@triton.jit(do_not_specialize=["n"])
def squares(
    student_ptr, teacher_ptr, pairs_ptr, lengths_ptr, n, padded, student_stride, teacher_stride,
    student_width, teacher_width, beta,
    ON_DEVICE: tl.constexpr, DTYPE: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Programs (tile, tile, network), of which those above the diagonal write for those below.

    lengths: [2, tiles, tiles], sums of the distances.
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
    # zeros in the layout of the stores, which is the one with vectors
    zeros = tl.load(h_ptr, mask=(rows < 0)[:, None] & (columns < 0)[None, :], other=0.0)
    if network == 0:
        q = _squares_of_tile(
            student_ptr, student_stride, student_width, rows, columns, n, zeros, DTYPE, DEPTH
        )
    else:
        q = _squares_of_tile(
            teacher_ptr, teacher_stride, teacher_width, rows, columns, n, zeros, DTYPE, DEPTH
        )
    exists = (rows < n)[:, None] & (columns < n)[None, :]
    apart = exists & (rows[:, None] != columns[None, :])
    distance = _root(q, DTYPE)
    close = (distance < _LEAST_LENGTH) | (apart == 0)  # a NaN is not
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
    """d of the student, the mean of all d in units of beta, and what the penalty is taken of."""
    n_pairs = n.to(DTYPE) * (n - 1).to(DTYPE)
    unit = beta * _total(lengths_ptr, n_lengths, DTYPE) / n_pairs
    unit_t = beta * _total(lengths_ptr + n_lengths, n_lengths, DTYPE) / n_pairs
    q, qt = 2 * beta * h, 2 * beta * ht
    d = _root(tl.where(q < _LEAST_SQUARE, _LEAST_SQUARE, q), DTYPE)
    t = _root(tl.where(qt < _LEAST_SQUARE, _LEAST_SQUARE, qt), DTYPE)
    return d, unit, tl.where(apart, d / unit - t / unit_t, 0.0)


@triton.jit
def _apart(i, j, n):
    """Pairs of a tile that are two examples."""
    a, b = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    return (a < n)[:, None] & (b < n)[None, :] & (a[:, None] != b[None, :])


@triton.jit
def _is_own(i, first, n_own):
    """[TILE, 1], of the rows of a tile."""
    a = i * TILE + tl.arange(0, TILE)
    return ((a >= first) & (a < first + n_own))[:, None]


# one number of each program goes to `losses`: where they begin changes nothing
@triton.jit(
    do_not_specialize=["n", "n_lengths", "first", "n_own"],
    do_not_specialize_on_alignment=["losses_ptr"],
)
def distances(
    pairs_ptr, lengths_ptr, losses_ptr, of_means_ptr, n, padded, n_lengths, first, n_own,
    distance_weight, beta, ON_DEVICE: tl.constexpr, PART: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Programs (tile, tile): the loss of the distances, of_means: sums of slope · distance."""
    i, j = tl.program_id(0), tl.program_id(1)
    place = i * tl.num_programs(1) + j
    h_ptr = _pairs_at(pairs_ptr, i * TILE, j * TILE, padded, TILE, TILE)
    h, ht = tl.load(h_ptr), tl.load(h_ptr + 2 * TILE)
    beta_, size = number(beta, ON_DEVICE, DTYPE), n.to(DTYPE)
    apart = _apart(i, j, n)
    d, _, x = _relative_distances(h, ht, apart, lengths_ptr, n_lengths, n, beta_, DTYPE)
    bent = _bent(x, DTYPE)
    penalty = bent * (x - 0.5 * bent)
    if PART:
        penalty = tl.where(_is_own(i, first, n_own), penalty, 0.0)
    scale = beta_ * number(distance_weight, ON_DEVICE, DTYPE) / (size * size)
    tl.store(losses_ptr + place, tl.sum(penalty) * scale)
    tl.store(of_means_ptr + place, tl.sum(tl.where(apart, bent * d, 0.0)))


@triton.jit(do_not_specialize=["n", "first", "n_own", "per_split"])
def edges(
    pairs_ptr, slopes_ptr, losses_ptr, n, padded, first, n_own, per_split, angle_weight, beta,
    ON_DEVICE: tl.constexpr, TRAINED: tl.constexpr, PART: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Programs (tile of a, tile of b, share of the third points): angles, their slopes g.

    slopes: [splits, padded, padded], the place of b before that of a; losses: one for each program.
    Of the whole batch a program above the diagonal writes for that below; a PART of it has the
    edges of its own n_own rows from `first`.
    """
    i, j, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_tiles = tl.num_programs(1)
    losses_ptr += (split * n_tiles + i) * n_tiles + j
    start, stop = split * per_split, tl.minimum(split * per_split + per_split, n)
    if PART:  # rows of others are not visited
        stop = tl.where((i * TILE < first + n_own) & (i * TILE + TILE > first), stop, start)
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
        bent = _bent(x, DTYPE)
        loss += bent * (x - 0.5 * bent)
        if TRAINED:
            u, ut = ha - hb, hta - htb
            of_a = ra * _bent(ra * (k + r * u) - rta * (kt + rt * ut), DTYPE)
            bent_b = _bent(rb * (k - r * u) - rtb * (kt - rt * ut), DTYPE)
            by_r += half_r * (of_a + bent_b * rb)
            by_r -= at_c * bent
            by_u += u * (of_a - bent_b * rb)
        a_ptr += 4 * padded
        b_ptr += 4 * padded
    beta_, size = number(beta, ON_DEVICE, DTYPE), n.to(DTYPE)
    scale = number(angle_weight, ON_DEVICE, DTYPE) / (size * size * size)
    if PART:
        loss = tl.where(_is_own(i, first, n_own), loss, 0.0)
    else:
        loss *= tl.where(i == j, 1.0, 2.0)
    tl.store(losses_ptr, tl.sum(loss) * (beta_ * scale))
    if TRAINED:
        slope = (by_r - beta_ * (r * (r * (r * by_u)))) * scale  # r³ alone may vanish
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
    pairs_ptr, lengths_ptr, slopes_ptr, losses_ptr, of_means_ptr, loss_ptr,
    n, padded, n_lengths, n_tiles, n_losses, n_splits, distance_weight, beta,
    ON_DEVICE: tl.constexpr, DISTANCE: tl.constexpr, TRAINED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Programs (tile, tile): the slopes of the angles, summed in place, and of the distances."""
    i, j = tl.program_id(0), tl.program_id(1)
    if i + j == 0:
        loss = _total(losses_ptr, n_losses, DTYPE)
        tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    if TRAINED:
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
            slope += tl.where(moved, r * (_bent(x, DTYPE) - of_mean) * scale, 0.0)
        tl.store(slope_ptr, slope)


@triton.jit(do_not_specialize=["n", "first", "n_own"])
def laplacian(
    x_ptr, slopes_ptr, gradient_ptr, n, padded, first, n_own, stride, width,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs (own rows, features): 2 Σ_k slopes_ki (x_i − x_k)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists, inside = rows < n_own, columns < width
    both = exists[:, None] & inside[None, :]
    own = first + rows
    own_ptr = x_ptr + own[:, None].to(tl.int64) * stride + columns[None, :]
    x = tl.load(own_ptr, mask=both, other=0.0).to(DTYPE)
    total = x * 0
    row_ptr, slope_ptr = x_ptr + columns, slopes_ptr + own
    for _ in range(n):
        row = tl.load(row_ptr, mask=inside, other=0.0).to(DTYPE)
        slope = tl.load(slope_ptr, mask=exists, other=0.0)
        total += slope[:, None] * (x - row[None, :])
        row_ptr += stride
        slope_ptr += padded
    gradient_ptr += rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(gradient_ptr, (2 * total).to(gradient_ptr.dtype.element_ty), mask=both)
