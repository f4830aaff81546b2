"""Sweeps over tiles of S and T, the products of the tokens of a sequence in two networks, by heads.

S = scale · f_i f_j ⟨x_i, x_j⟩ is never stored and is symmetric. With q_ij = exp(S_ij − m_i) / Z_i
the softmax of a row, and p that of T, the divergence of the rows has the gradient

    scale · Σ_j (q_ij + q_ji − p_ij − p_ji) f_j x_j        q_ji = exp(S_ij − m_j) / Z_j

so that a program which owns the tokens i needs no tile but its own, and no atomics. The squares of
S − T have the gradient 4 scale · Σ_j (S_ij − T_ij) f_j x_j.

S comes in units of log2 for softmaxes. Per tile a program reads COLUMNS · (DEPTH + DEPTH_T) tokens'
elements, mostly from the L2 cache: 4 bytes in half precision for 4 · ROWS FLOPs of S and T.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.tiles import INFINITY, LN2, LOG2E

# of a pair that does not count; finite, since −inf − (−inf) would be NaN
_LOWEST = tl.constexpr(-3.0e38)
# of a length so short that it has no direction; lengths of at least 1e-12 divide
_NO_DIRECTION = tl.constexpr(9.99e11)
# of slopes that are at most 2 and would vanish in float16 where they are small
_LIFT = tl.constexpr(4096.0)


class Tile(NamedTuple):
    """The constants of a tile; each is a tl.constexpr."""

    ROWS: Any
    COLUMNS: Any
    DEPTH: Any  # the width of a head of the student, rounded up to a power of two
    DEPTH_T: Any  # that of the teacher
    PRECISION: Any  # of products of float32: "tf32" or "ieee"
    DTYPE: Any  # of sums
    EDGES: Any  # whether a tile may hold tokens that do not count
    CAUSAL: Any


class Network(NamedTuple):
    """The tokens of a network in memory."""

    ptr: Any  # [B, L, heads · width], with the strides below
    factors_ptr: Any  # f, [B · heads, L]; None: all 1
    scale_ptr: Any  # 0-dim
    sequence_stride: Any
    token_stride: Any
    width: Any  # of a head


class Place(NamedTuple):
    """A head of a sequence, and how many tokens that has."""

    sequence: Any
    head: Any
    unit: Any  # sequence · heads + head
    n_tokens: Any


@triton.jit
def _place(unit, n_tokens, n_heads):
    sequence = unit // n_heads
    return Place(sequence, unit - sequence * n_heads, unit, n_tokens)


@triton.jit
def _counted(place, mask_ptr, tokens):
    """Return which of the tokens count."""
    counted = tokens < place.n_tokens
    if mask_ptr is not None:  # not in the place, because older compilers return no None
        start = mask_ptr + place.sequence.to(tl.int64) * place.n_tokens
        counted &= tl.load(start + tokens, mask=counted, other=0) != 0
    return counted


@triton.jit
def _load(network, place, tokens, counted, DEPTH: tl.constexpr, EDGES: tl.constexpr):
    """Load tokens, [TOKENS, DEPTH], zeros for those that do not count."""
    columns = tl.arange(0, DEPTH)
    start = place.sequence.to(tl.int64) * network.sequence_stride + place.head * network.width
    places = tokens[:, None].to(tl.int64) * network.token_stride + columns[None, :]
    exists = (columns < network.width)[None, :]
    if EDGES:
        exists &= counted[:, None]
    return tl.load(network.ptr + start + places, mask=exists, other=0)


@triton.jit
def _factors(network, place, tokens, counted):
    """Return f of the tokens, [TOKENS]."""
    start = place.unit.to(tl.int64) * place.n_tokens
    return tl.load(network.factors_ptr + start + tokens, mask=counted, other=0)


@triton.jit
def _scales(network, place, tokens, counted, UNIT: tl.constexpr, TILE):
    """Return scale · f of the tokens in the unit, [TOKENS]."""
    scale = tl.load(network.scale_ptr).to(TILE.DTYPE) * UNIT
    scales = tl.full([TILE.ROWS], 1.0, TILE.DTYPE) * scale
    if network.factors_ptr is not None:
        scales *= _factors(network, place, tokens, counted)
    return scales


@triton.jit
def _products(network, place, x, scales, tokens, counted, DEPTH: tl.constexpr, TILE):
    """Return tokens, [COLUMNS, DEPTH], and their products with the rows, [ROWS, COLUMNS]."""
    y = _load(network, place, tokens, counted, DEPTH, TILE.EDGES)
    s = tl.dot(x, tl.trans(y), input_precision=TILE.PRECISION, out_dtype=TILE.DTYPE)
    if network.factors_ptr is not None:
        s *= _factors(network, place, tokens, counted)[None, :]
    return y, s * scales[:, None]


@triton.jit
def _add_weighted(total, slopes, student, place, y, tokens, counted, IS_LIFTED: tl.constexpr, TILE):
    """Return total + Σ_j slopes_ij f_j y_j, [ROWS, DEPTH]; IS_LIFTED: slopes are times _LIFT."""
    if y.dtype == tl.float16 and IS_LIFTED:
        if student.factors_ptr is not None:  # which could be too large for float16
            y = y * _factors(student, place, tokens, counted)[:, None]
        return tl.dot((slopes * _LIFT).to(tl.float16), y.to(tl.float16), total)
    if student.factors_ptr is not None:
        slopes *= _factors(student, place, tokens, counted)[None, :]
    if y.dtype == tl.float16:  # slopes have no bounds; tokens of float16 are exact in TF32
        return tl.dot(slopes, y.to(tl.float32), total, input_precision=TILE.PRECISION)
    return tl.dot(
        slopes.to(y.dtype), y, total, input_precision=TILE.PRECISION, out_dtype=TILE.DTYPE
    )


@triton.jit
def _store_gradient(
    gradient_ptr,
    total,
    student,
    place,
    x,
    rows,
    counted,
    weights_ptr,
    n_heads,
    IS_LIFTED: tl.constexpr,
    TILE,
):
    """Store the gradient in the rows, of Σ_j G_ij f_j y_j, in [B, L, heads · width]."""
    weight = tl.load(weights_ptr + place.sequence) * tl.load(student.scale_ptr).to(TILE.DTYPE)
    if x.dtype == tl.float16 and IS_LIFTED:
        weight *= 1 / _LIFT
    total *= weight
    if student.factors_ptr is not None:
        factors = _factors(student, place, rows, counted)
        unit = x.to(TILE.DTYPE) * factors[:, None]
        total -= unit * tl.sum(unit * total, 1)[:, None]
        total *= tl.where(factors < _NO_DIRECTION, factors, 0)[:, None]
    total = tl.where(counted[:, None], total, 0)
    columns = tl.arange(0, TILE.DEPTH)
    width = student.width * n_heads
    start = place.sequence.to(tl.int64) * place.n_tokens * width + place.head * student.width
    places = rows[:, None].to(tl.int64) * width + columns[None, :]
    exists = (rows < place.n_tokens)[:, None] & (columns < student.width)[None, :]
    tl.store(gradient_ptr + start + places, total, mask=exists)


class _Statistics(NamedTuple):
    largest: Any  # [ROWS], of S, and below the same of T
    total: Any  # [ROWS], Σ_j exp2(S_ij − largest_i)
    largest_t: Any
    total_t: Any
    differences: Any  # [ROWS], Σ_j exp2(T') (T' − S'), both less their largest


@triton.jit(do_not_specialize=["n_heads", "n_blocks"])
def relation_divergences(
    student,  # Network
    teacher,
    mask_ptr,  # [B, L], 1 or 0; or None
    losses_ptr,  # [B · heads, n_blocks]
    normalizers_ptr,  # [4, B · heads, L], as in _Normalizers; or None
    n_units,
    n_tokens,
    n_heads,
    n_blocks,
    TILE,
):
    """Compute Σ KL over the rows of a block, and the normalizers of rows, ∞ and 0 if masked."""
    unit = tl.program_id(0) // n_blocks
    block = tl.program_id(0) - unit * n_blocks
    place = _place(unit, n_tokens, n_heads)
    rows = block * TILE.ROWS + tl.arange(0, TILE.ROWS)
    row_counted = _counted(place, mask_ptr, rows)
    x = _load(student, place, rows, row_counted, TILE.DEPTH, TILE.EDGES)
    x_t = _load(teacher, place, rows, row_counted, TILE.DEPTH_T, TILE.EDGES)
    scales = _scales(student, place, rows, row_counted, LOG2E, TILE)
    scales_t = _scales(teacher, place, rows, row_counted, LOG2E, TILE)
    largest = tl.full([TILE.ROWS], _LOWEST, TILE.DTYPE)
    zeros = tl.zeros([TILE.ROWS], TILE.DTYPE)
    sums = _Statistics(largest, zeros, largest, zeros, zeros)
    end = n_tokens
    if TILE.CAUSAL:
        end = tl.minimum(n_tokens, (block + 1) * TILE.ROWS)
    for column in range(0, end, TILE.COLUMNS):
        tokens = column + tl.arange(0, TILE.COLUMNS)
        counted = _counted(place, mask_ptr, tokens)
        _, s = _products(student, place, x, scales, tokens, counted, TILE.DEPTH, TILE)
        _, t = _products(teacher, place, x_t, scales_t, tokens, counted, TILE.DEPTH_T, TILE)
        if TILE.EDGES or TILE.CAUSAL:
            kept = counted[None, :]
            if TILE.CAUSAL:
                kept = kept & (tokens[None, :] <= rows[:, None])
            s, t = tl.where(kept, s, _LOWEST), tl.where(kept, t, _LOWEST)
        risen = tl.maximum(sums.largest, tl.max(s, 1))
        risen_t = tl.maximum(sums.largest_t, tl.max(t, 1))
        shift, shift_t = sums.largest - risen, sums.largest_t - risen_t
        shrunk_t = tl.exp2(shift_t)
        # first, because S and T may be large and far apart where what is left of them is small
        s, t = s - risen[:, None], t - risen_t[:, None]
        e_t = tl.exp2(t)
        total = sums.total * tl.exp2(shift) + tl.sum(tl.exp2(s), 1)
        total_t = sums.total_t * shrunk_t + tl.sum(e_t, 1)
        differences = (sums.differences + sums.total_t * (shift_t - shift)) * shrunk_t
        differences += tl.sum(e_t * (t - s), 1)
        sums = _Statistics(risen, total, risen_t, total_t, differences)
    losses = (sums.differences / sums.total_t + tl.log2(sums.total / sums.total_t)) * LN2
    tl.store(losses_ptr + tl.program_id(0), tl.sum(tl.where(row_counted, losses, 0), 0))
    if normalizers_ptr is not None:
        found = _normalizers(normalizers_ptr, unit, n_units, n_tokens)
        exists = rows < n_tokens
        largest = tl.where(row_counted, sums.largest, INFINITY)
        largest_t = tl.where(row_counted, sums.largest_t, INFINITY)
        tl.store(found.largest_ptr + rows, largest, mask=exists)
        tl.store(found.inverse_ptr + rows, tl.where(row_counted, 1 / sums.total, 0), mask=exists)
        tl.store(found.largest_t_ptr + rows, largest_t, mask=exists)
        tl.store(
            found.inverse_t_ptr + rows, tl.where(row_counted, 1 / sums.total_t, 0), mask=exists
        )


class _Normalizers(NamedTuple):
    """The softmaxes of some tokens as rows: exp2(S − largest) · inverse, in memory."""

    largest_ptr: Any  # [L]
    inverse_ptr: Any
    largest_t_ptr: Any  # the same of T
    inverse_t_ptr: Any


@triton.jit
def _normalizers(normalizers_ptr, unit, n_units, n_tokens):
    first = normalizers_ptr + unit.to(tl.int64) * n_tokens
    step = n_units.to(tl.int64) * n_tokens
    return _Normalizers(first, first + step, first + 2 * step, first + 3 * step)


@triton.jit
def _differences(s, t, normalizers, tokens, n_tokens, OF_ROWS: tl.constexpr):
    """Return the softmax of S less that of T, both with the normalizers of rows or of columns."""
    exists = tokens < n_tokens
    largest = tl.load(normalizers.largest_ptr + tokens, mask=exists, other=INFINITY)
    inverse = tl.load(normalizers.inverse_ptr + tokens, mask=exists, other=0)
    largest_t = tl.load(normalizers.largest_t_ptr + tokens, mask=exists, other=INFINITY)
    inverse_t = tl.load(normalizers.inverse_t_ptr + tokens, mask=exists, other=0)
    if OF_ROWS:
        largest, inverse = largest[:, None], inverse[:, None]
        largest_t, inverse_t = largest_t[:, None], inverse_t[:, None]
    else:
        largest, inverse = largest[None, :], inverse[None, :]
        largest_t, inverse_t = largest_t[None, :], inverse_t[None, :]
    return tl.exp2(s - largest) * inverse - tl.exp2(t - largest_t) * inverse_t


@triton.jit(do_not_specialize=["n_heads", "n_blocks"])
def relation_gradients(
    student,  # Network
    teacher,
    mask_ptr,  # [B, L], or None
    normalizers_ptr,  # [4, B · heads, L], as from `relation_divergences`
    weights_ptr,  # [B], what multiplies the divergences of the rows of a sequence
    gradient_ptr,  # [B, L, heads · width]
    n_units,
    n_tokens,
    n_heads,
    n_blocks,
    TILE,
):
    """Compute the gradient of Σ_i KL_i in the tokens of a block."""
    unit = tl.program_id(0) // n_blocks
    block = tl.program_id(0) - unit * n_blocks
    place = _place(unit, n_tokens, n_heads)
    rows = block * TILE.ROWS + tl.arange(0, TILE.ROWS)
    row_counted = _counted(place, mask_ptr, rows)
    x = _load(student, place, rows, row_counted, TILE.DEPTH, TILE.EDGES)
    x_t = _load(teacher, place, rows, row_counted, TILE.DEPTH_T, TILE.EDGES)
    scales = _scales(student, place, rows, row_counted, LOG2E, TILE)
    scales_t = _scales(teacher, place, rows, row_counted, LOG2E, TILE)
    normalizers = _normalizers(normalizers_ptr, unit, n_units, n_tokens)
    values = tl.zeros([TILE.ROWS, TILE.DEPTH], TILE.DTYPE)
    for column in range(0, n_tokens, TILE.COLUMNS):
        tokens = column + tl.arange(0, TILE.COLUMNS)
        counted = _counted(place, mask_ptr, tokens)
        y, s = _products(student, place, x, scales, tokens, counted, TILE.DEPTH, TILE)
        _, t = _products(teacher, place, x_t, scales_t, tokens, counted, TILE.DEPTH_T, TILE)
        slopes = _differences(s, t, normalizers, rows, n_tokens, True)
        of_columns = _differences(s, t, normalizers, tokens, n_tokens, False)
        if TILE.CAUSAL:
            slopes = tl.where(tokens[None, :] <= rows[:, None], slopes, 0)
            of_columns = tl.where(rows[:, None] <= tokens[None, :], of_columns, 0)
        slopes += of_columns
        if TILE.EDGES:
            slopes = tl.where(counted[None, :], slopes, 0)
        values = _add_weighted(values, slopes, student, place, y, tokens, counted, True, TILE)
    _store_gradient(
        gradient_ptr, values, student, place, x, rows, row_counted, weights_ptr, n_heads, True, TILE
    )


@triton.jit(do_not_specialize=["n_heads", "n_blocks"])
def relation_squares(
    student,  # Network
    teacher,
    mask_ptr,  # [B, L], or None
    losses_ptr,  # [B · heads, n_blocks]
    weights_ptr,  # [B], what multiplies the squares of a sequence
    gradient_ptr,  # [B, L, heads · width], or None
    n_tokens,
    n_heads,
    n_blocks,
    REMOVED: tl.constexpr,
    TILE,
):
    """Compute Σ (S − T)² over the rows of a block, and its gradient in the block's tokens.

    Tokens that do not count are 0, so that their products are 0 in both networks.
    """
    unit = tl.program_id(0) // n_blocks
    block = tl.program_id(0) - unit * n_blocks
    place = _place(unit, n_tokens, n_heads)
    rows = block * TILE.ROWS + tl.arange(0, TILE.ROWS)
    row_counted = _counted(place, mask_ptr, rows)
    x = _load(student, place, rows, row_counted, TILE.DEPTH, TILE.EDGES)
    x_t = _load(teacher, place, rows, row_counted, TILE.DEPTH_T, TILE.EDGES)
    scales = _scales(student, place, rows, row_counted, 1.0, TILE)
    scales_t = _scales(teacher, place, rows, row_counted, 1.0, TILE)
    loss = tl.zeros([TILE.ROWS], TILE.DTYPE)
    values = tl.zeros([TILE.ROWS, TILE.DEPTH], TILE.DTYPE)
    for column in range(0, n_tokens, TILE.COLUMNS):
        tokens = column + tl.arange(0, TILE.COLUMNS)
        counted = _counted(place, mask_ptr, tokens)
        y, s = _products(student, place, x, scales, tokens, counted, TILE.DEPTH, TILE)
        _, t = _products(teacher, place, x_t, scales_t, tokens, counted, TILE.DEPTH_T, TILE)
        difference = s - t
        slopes = 4 * difference
        if REMOVED != "":
            removed = s < 0
            if REMOVED == "teacher":
                removed &= t < 0
            # NaN is no number below 0 and stays
            difference = tl.where(removed, 0, s) - tl.where(t < 0, 0, t)
            slopes = tl.where(removed, 0, 4 * difference)
        if TILE.CAUSAL:
            before, after = tokens[None, :] <= rows[:, None], rows[:, None] <= tokens[None, :]
            # a pair is met from both of its tokens, and counts for the later one
            slopes = tl.where(before & after, slopes, 0.5 * slopes)
            difference = tl.where(before, difference, 0)
        loss += tl.sum(difference * difference, 1)
        if gradient_ptr is not None:
            values = _add_weighted(values, slopes, student, place, y, tokens, counted, False, TILE)
    tl.store(losses_ptr + tl.program_id(0), tl.sum(loss, 0))
    if gradient_ptr is not None:
        _store_gradient(
            gradient_ptr, values, student, place, x, rows, row_counted, weights_ptr, n_heads,
            False, TILE,
        )  # fmt: skip
