"""Numbers with their edges, and exact results of what instructions make of them."""

import itertools
import math
from fractions import Fraction

import numpy as np
from ptx.forms import SIZES, TYPES

F32, F64 = np.float32, np.float64
SMALLEST = float(np.finfo(F32).smallest_normal)
EDGES = [0.0, -0.0, 1.0, -1.0, 1 + 2**-23, 2**-149, -(2**-130), SMALLEST, 3e38, -3e38]
EDGES += [math.inf, -math.inf, math.nan, 0.1, -7.25]
chance = np.random.default_rng(0)


def floats(kind, n_operands):
    """Return all combinations of edges, and numbers whose exponents are near and far."""
    edges = np.array(list(itertools.product(EDGES, repeat=min(n_operands, 2))))
    edges = np.concatenate([edges, edges[:, :1]], 1)[:, :n_operands]
    numbers = chance.standard_normal((2000, n_operands)) * 2.0 ** chance.integers(
        -70, 70, (2000, n_operands)
    )
    return [x.astype(TYPES[kind]) for x in np.concatenate([edges, numbers]).T]


def integers(kind, n_operands):
    info = np.iinfo(TYPES[kind])
    edges = [info.min, info.max, 0, 1, info.max // 2, 3, 7 if info.min == 0 else -7]
    rows = [*itertools.product(edges, repeat=n_operands)]
    rows += chance.integers(info.min, info.max, (200, n_operands), TYPES[kind], True).tolist()
    return [np.array(x, TYPES[kind]) for x in zip(*rows, strict=True)]


def assert_bits(found, expected):
    """Demand the same bits, except of NaN."""
    expected = np.asarray(expected, found.dtype)
    if found.dtype.kind == "f":
        assert (np.isnan(found) == np.isnan(expected)).all()
        found, expected = (
            np.where(np.isnan(found), 0, found),
            np.where(np.isnan(expected), 0, expected),
        )
        assert (np.signbit(found) == np.signbit(expected)).all()
    np.testing.assert_array_equal(found, expected)


def flushed(x):
    return np.where(np.abs(x) < SMALLEST, np.copysign(F32(0), x), x).astype(F32)


def once(exact, kind):
    """Return a fraction rounded once to a float."""
    if kind == "f64":
        try:
            return float(exact)
        except OverflowError:
            return math.inf if exact > 0 else -math.inf
    if exact == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(exact.numerator)) - math.log2(exact.denominator)), -126)
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > -126 and abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    result = round(exact / unit) * unit
    result = float(result) if abs(result) < Fraction(2) ** 128 else math.inf
    return math.copysign(result, exact)


def wrapped(value, kind):
    bits = 8 * SIZES[kind]
    value %= 1 << bits
    return value - (1 << bits) if kind[0] == "s" and value >> bits - 1 else value


LOGIC = {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}
