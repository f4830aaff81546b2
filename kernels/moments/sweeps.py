"""Kernels of moments: the value of each position of feature maps, and the gradient.

A program has a tile of positions and features, in vectors along whichever of them is contiguous. To
make values it walks over the features, and each thread keeps what it adds up until the end. For
each feature of bf16 maps `values` reads 2 bytes of each network, and `slopes` reads as much and
writes 2. Only directions of features that do not stay on chip are read twice, for their lengths
first. `map_differences` has a few sweeps over maps, which are as small as one feature.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.tiles import number

SHORTEST = tl.constexpr(1e-12)  # F.normalize divides by at least this length
LEAST_BETA = tl.constexpr(1e-37)  # which stands for 0
N_STATISTICS = tl.constexpr(2)  # of a position, where there are any


class Features(NamedTuple):
    """Features [B, P, C] in memory, and their strides in elements."""

    ptr: Tensor
    example: int
    position: int
    feature: int


class Sums(NamedTuple):
    """The sums of a thread over tiles [R, K]; of `max` a maximum, and how often it is there."""

    a: tl.tensor
    b: tl.tensor
    c: tl.tensor


@triton.jit
def _places(features, example, positions, columns, UNIT: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Return pointers [R, K] into features of which dimension UNIT, 1 or 2, is contiguous.

    ALIGNMENT divides all other strides, which is what the compiler learns here.
    """
    first = example.to(tl.int64) * (features.example // ALIGNMENT * ALIGNMENT)
    of_positions, of_columns = positions.to(tl.int64), columns.to(tl.int64)
    if UNIT != 1:
        of_positions *= features.position // ALIGNMENT * ALIGNMENT
    if UNIT != 2:
        of_columns *= features.feature // ALIGNMENT * ALIGNMENT
    return features.ptr + first + (of_positions[:, None] + of_columns[None, :])


@triton.jit
def _power(magnitudes, p, IS_SQUARE: tl.constexpr):
    """Return |x|^p, which is 0 of 0."""
    return magnitudes * magnitudes if IS_SQUARE else tl.exp2(p * tl.log2(magnitudes))


@triton.jit
def _clipped(x):
    return tl.where(x > 1, 1.0, tl.where(x < -1, -1.0, x))  # a NaN stays a NaN


@triton.jit
def _fold(x, y, sums, option, KIND: tl.constexpr, IS_SQUARE: tl.constexpr):
    """Return the Sums with a tile of both networks."""
    a, b, c = sums
    if KIND == "mse":
        a += (x - y) * (x - y)
    elif KIND == "smooth_l1":
        slope = _clipped((x - y) * (1 / option))
        a += slope * ((x - y) - slope * (0.5 * option))
    elif KIND == "sum":
        a += _power(tl.abs(x), option, IS_SQUARE)
    elif KIND == "max":
        magnitudes = tl.abs(x)
        is_new = (magnitudes > a) | (magnitudes != magnitudes)
        b = tl.where(is_new, 1.0, tl.where(magnitudes == a, b + 1, b))
        a = tl.where(is_new, magnitudes, a)
    else:
        a, b = a + x * x, b + y * y
        if KIND == "cosine":
            c += x * y
    return Sums(a, b, c)


@triton.jit
def _inverse(squares):
    """Return the length, and what divides features to a direction."""
    length = tl.sqrt(squares)
    return length, 1 / tl.where(length > SHORTEST, length, SHORTEST)


@triton.jit
def _tile(
    student, teacher, example, positions, columns, inside, ONE: tl.constexpr,
    STUDENT_UNIT: tl.constexpr, TEACHER_UNIT: tl.constexpr, ALIGNMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the features [R, K] of both networks, or those of ONE twice."""
    pointers = _places(student, example, positions, columns, STUDENT_UNIT, ALIGNMENT)
    x = tl.load(pointers, mask=inside, other=0.0).to(DTYPE)
    if ONE:
        return x, x
    pointers = _places(teacher, example, positions, columns, TEACHER_UNIT, ALIGNMENT)
    return x, tl.load(pointers, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _inside(exists, counts, columns, n_features, UNIT: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Return the mask of a tile, which lets whole vectors through or none of them."""
    if UNIT == 2:
        n_features = n_features // ALIGNMENT * ALIGNMENT  # unchanged; the compiler learns it
        return (exists & counts)[:, None] & (columns < n_features)[None, :]
    return exists[:, None] & (columns < n_features)[None, :]


@triton.jit
def _weights(row_mask_ptr, weights_ptr, places, exists, DTYPE: tl.constexpr):
    """Return which positions count, and their weights."""
    counts, weights = exists, tl.full(places.shape, 1, DTYPE)
    if row_mask_ptr is not None:
        counts &= tl.load(row_mask_ptr + places, mask=exists, other=0) != 0
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + places, mask=exists, other=0.0).to(DTYPE)
        counts &= weights != 0
    return counts, weights


@triton.jit
def _statistics(statistics_ptr, places):
    """Return where the statistics [R, N_STATISTICS] of positions are."""
    return statistics_ptr + (places[:, None] * N_STATISTICS + tl.arange(0, N_STATISTICS)[None, :])


@triton.jit
def values(
    student,  # Features
    teacher,  # Features, not read of one network
    row_mask_ptr,  # (B, P) or None
    weights_ptr,  # (B, P) or None
    values_ptr,  # (B, P)
    statistics_ptr,  # (B, P, N_STATISTICS), or of no elements
    option,  # beta or p: a number, or ON_DEVICE a pointer to it
    n_positions,
    n_features,
    KIND: tl.constexpr, ONE: tl.constexpr, IS_SQUARE: tl.constexpr, DTYPE: tl.constexpr,
    ON_DEVICE: tl.constexpr, STUDENT_UNIT: tl.constexpr, TEACHER_UNIT: tl.constexpr,
    ALIGNMENT: tl.constexpr, WHOLE: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the values of POSITIONS positions of an example: program (example and block).

    All features are one tile if WHOLE.
    """
    n_blocks = tl.cdiv(n_positions, POSITIONS)
    example, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    if STUDENT_UNIT == 1:
        n_positions = n_positions // ALIGNMENT * ALIGNMENT  # unchanged; the compiler learns it
    positions = block * POSITIONS + tl.arange(0, POSITIONS)
    exists = positions < n_positions
    places = example.to(tl.int64) * n_positions + positions
    counts, weights = _weights(row_mask_ptr, weights_ptr, places, exists, DTYPE)
    option = number(option, ON_DEVICE, DTYPE)
    if KIND == "smooth_l1":
        option = tl.maximum(option, LEAST_BETA)
    columns = tl.arange(0, COLUMNS)
    zeros = tl.zeros([POSITIONS, COLUMNS], DTYPE)
    sums = Sums(zeros, zeros, zeros)
    if WHOLE:
        inside = _inside(exists, counts, columns, n_features, STUDENT_UNIT, ALIGNMENT)
        x, y = _tile(
            student, teacher, example, positions, columns, inside, ONE, STUDENT_UNIT,
            TEACHER_UNIT, ALIGNMENT, DTYPE,
        )  # fmt: skip
        sums = _fold(x, y, sums, option, KIND, IS_SQUARE)
    else:
        for start in range(0, n_features, COLUMNS):
            inside = _inside(exists, counts, start + columns, n_features, STUDENT_UNIT, ALIGNMENT)
            x, y = _tile(
                student, teacher, example, positions, start + columns, inside, ONE,
                STUDENT_UNIT, TEACHER_UNIT, ALIGNMENT, DTYPE,
            )  # fmt: skip
            sums = _fold(x, y, sums, option, KIND, IS_SQUARE)

    n = tl.zeros([], DTYPE) + n_features  # a quotient of integers would be float32
    if KIND == "max":
        top = tl.max(sums.a, 1)
        is_nan = tl.max((sums.a != sums.a).to(tl.int32), 1) != 0
        top = tl.where(is_nan, float("nan"), top)
        n_largest = tl.sum(tl.where(sums.a == top[:, None], sums.b, 0.0), 1)
        value = _power(top, option, IS_SQUARE)
        # of a maximum of 0 nothing gets a gradient
        slope = option * value / tl.where(top == 0, 1.0, top * n_largest)
        statistics = tl.join(top, slope)
        tl.store(_statistics(statistics_ptr, places), statistics, mask=exists[:, None])
    elif (KIND == "cosine") or (KIND == "normalized_mse"):
        length, s = _inverse(tl.sum(sums.a, 1))
        of_teacher, t = _inverse(tl.sum(sums.b, 1))
        scale = 1.0
        if KIND == "cosine":
            cosine = tl.sum(sums.c, 1) * s * t
            value = 1 - cosine
        else:
            scale = 2 / n
            squares = zeros
            if WHOLE:
                d = x * s[:, None] - y * t[:, None]
                squares += d * d
            else:
                for start in range(0, n_features, COLUMNS):
                    inside = _inside(
                        exists, counts, start + columns, n_features, STUDENT_UNIT, ALIGNMENT
                    )
                    x, y = _tile(
                        student, teacher, example, positions, start + columns, inside, ONE,
                        STUDENT_UNIT, TEACHER_UNIT, ALIGNMENT, DTYPE,
                    )  # fmt: skip
                    d = x * s[:, None] - y * t[:, None]
                    squares += d * d
            total = tl.sum(squares, 1)
            value = total / n
            cosine = (1 + (of_teacher * t) * (of_teacher * t) - total) * 0.5
        s = tl.where(length > SHORTEST, s, 0.0)
        statistics = tl.join(scale * t * s, scale * cosine * s * s)
        tl.store(_statistics(statistics_ptr, places), statistics, mask=exists[:, None])
    else:
        value = tl.sum(sums.a, 1)
        if KIND != "sum":
            value /= n
    tl.store(values_ptr + places, tl.where(counts, value * weights, 0.0), mask=exists)


@triton.jit
def slopes(
    student,  # Features
    teacher,  # Features, not read of one network
    gradient,  # Features
    row_mask_ptr,  # (B, P) or None
    weights_ptr,  # (B, P) or None
    statistics_ptr,  # (B, P, N_STATISTICS), or of no elements
    upstream_ptr,  # (B, P), or one number for all if IS_EXPANDED
    option,  # beta or p: a number, or ON_DEVICE a pointer to it
    n_positions,
    n_features,
    KIND: tl.constexpr, ONE: tl.constexpr, IS_SQUARE: tl.constexpr, DTYPE: tl.constexpr,
    ON_DEVICE: tl.constexpr, STUDENT_UNIT: tl.constexpr, TEACHER_UNIT: tl.constexpr,
    GRADIENT_UNIT: tl.constexpr, ALIGNMENT: tl.constexpr, POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr, IS_EXPANDED: tl.constexpr,
):  # fmt: skip
    """Compute upstream · ∂value/∂student of a tile: program (example, positions and features)."""
    n_blocks, n_parts = tl.cdiv(n_positions, POSITIONS), tl.cdiv(n_features, COLUMNS)
    block, part = tl.program_id(0) // n_parts, tl.program_id(0) % n_parts
    example, block = block // n_blocks, block % n_blocks
    if STUDENT_UNIT == 1:
        n_positions = n_positions // ALIGNMENT * ALIGNMENT  # unchanged; the compiler learns it
    positions = block * POSITIONS + tl.arange(0, POSITIONS)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    exists = positions < n_positions
    places = example.to(tl.int64) * n_positions + positions
    counts, weights = _weights(row_mask_ptr, weights_ptr, places, exists, DTYPE)
    option = number(option, ON_DEVICE, DTYPE)
    if IS_EXPANDED:
        factor = weights * tl.load(upstream_ptr).to(DTYPE)
    else:
        factor = weights * tl.load(upstream_ptr + places, mask=exists, other=0.0).to(DTYPE)
    factor = tl.where(counts, factor, 0.0)
    inside = _inside(exists, counts, columns, n_features, STUDENT_UNIT, ALIGNMENT)
    x, y = _tile(
        student, teacher, example, positions, columns, inside, ONE, STUDENT_UNIT, TEACHER_UNIT,
        ALIGNMENT, DTYPE,
    )  # fmt: skip
    if (KIND == "cosine") or (KIND == "normalized_mse") or (KIND == "max"):
        pointers = _statistics(statistics_ptr, places)
        first, second = tl.split(tl.load(pointers, mask=exists[:, None], other=0.0))
        first, second = first[:, None], (factor * second)[:, None]
    n = tl.zeros([], DTYPE) + n_features  # a quotient of integers would be float32
    if KIND == "mse":
        slope = (x - y) * (factor * (2 / n))[:, None]
    elif KIND == "smooth_l1":
        beta = tl.maximum(option, LEAST_BETA)
        slope = _clipped((x - y) * (1 / beta)) * (factor / n)[:, None]
    elif KIND == "max":
        signed = tl.where(x > 0, second, tl.where(x < 0, -second, 0.0))
        slope = tl.where(tl.abs(x) == first, signed, 0.0)
    elif KIND == "sum":
        if IS_SQUARE:
            slope = x * (2 * factor)[:, None]
        else:  # below p = 1 the power of 0 is infinite
            signed = tl.exp2((option - 1) * tl.log2(tl.abs(x))) * (option * factor)[:, None]
            slope = tl.where(x > 0, signed, tl.where(x < 0, -signed, x))
    else:
        slope = x * second - y * (factor[:, None] * first)
    slope = tl.where(counts[:, None], slope, 0.0)
    if STUDENT_UNIT == 2:
        n_features = n_features // ALIGNMENT * ALIGNMENT
    tl.store(
        _places(gradient, example, positions, columns, GRADIENT_UNIT, ALIGNMENT),
        slope.to(gradient.ptr.dtype.element_ty),
        mask=exists[:, None] & (columns < n_features)[None, :],
    )


@triton.jit
def _scale(map_row, n_positions, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest entry of a map, 1 for 0, and what brings it to length 1 in these units."""
    top, squares = tl.zeros([BLOCK], DTYPE), tl.zeros([BLOCK], DTYPE)
    places = tl.arange(0, BLOCK)
    for start in range(0, n_positions, BLOCK):
        inside = start + places < n_positions
        top = tl.maximum(top, tl.load(map_row + start + places, mask=inside, other=0.0))
    unit = tl.max(top, 0)
    is_zero = unit == 0
    unit = tl.where(is_zero, 1.0, unit)
    for start in range(0, n_positions, BLOCK):
        inside = start + places < n_positions
        x = tl.load(map_row + start + places, mask=inside, other=0.0) / unit
        squares += x * x
    return unit, tl.where(is_zero, 0.0, 1 / tl.sqrt(tl.sum(squares, 0)))


@triton.jit
def map_differences(
    student_ptr,  # (B, P), maps of at least 0
    teacher_ptr,  # (B, P)
    losses_ptr,  # (B,)
    gradient_ptr,  # (B, P), or None
    n_positions,
    n_examples,
    DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute Σ (A/‖A‖ − T/‖T‖)² of an example and its gradient over B · P: program (example)."""
    n_positions = n_positions // ALIGNMENT * ALIGNMENT  # unchanged; the compiler learns it
    row = tl.program_id(0).to(tl.int64) * n_positions
    student, teacher = student_ptr + row, teacher_ptr + row
    unit, s = _scale(student, n_positions, DTYPE, BLOCK)
    unit_of_teacher, t = _scale(teacher, n_positions, DTYPE, BLOCK)
    loss, along = tl.zeros([BLOCK], DTYPE), tl.zeros([BLOCK], DTYPE)
    places = tl.arange(0, BLOCK)
    for start in range(0, n_positions, BLOCK):
        inside = start + places < n_positions
        x = tl.load(student + start + places, mask=inside, other=0.0) / unit * s
        y = tl.load(teacher + start + places, mask=inside, other=0.0) / unit_of_teacher * t
        loss += (x - y) * (x - y)
        along += (x - y) * x
    tl.store(losses_ptr + tl.program_id(0), tl.sum(loss, 0))
    if gradient_ptr is not None:
        n = tl.zeros([], DTYPE) + n_positions  # of both the product may need 64 bits
        factor, part = 2 / n / (tl.zeros([], DTYPE) + n_examples) * s / unit, tl.sum(along, 0)
        for start in range(0, n_positions, BLOCK):
            inside = start + places < n_positions
            x = tl.load(student + start + places, mask=inside, other=0.0) / unit * s
            y = tl.load(teacher + start + places, mask=inside, other=0.0) / unit_of_teacher * t
            tl.store(gradient_ptr + row + start + places, (x - y - x * part) * factor, mask=inside)
