"""Every arithmetic instruction, against Python's integers and fractions or against torch."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import UnknownInstruction
from ptx.forms import SIZES, TYPES

from .snippets import compute

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


FLOATS = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
    "div.rn": lambda x, y: x / y,
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("kind", ["f32", "ftz.f32", "f64"])
def test_floats(name, kind):
    flush = "ftz" in kind
    type_ = kind.removeprefix("ftz.")
    x, y = floats(type_, 2)
    found = compute(f"{name}.{kind} %0, %1, %2", type_, (type_, x), (type_, y))
    with np.errstate(all="ignore"):
        if flush:
            x, y = flushed(x), flushed(y)
        expected = FLOATS[name](x, y)
        assert_bits(found, flushed(expected) if flush else expected)


@pytest.mark.parametrize("kind", ["f32", "ftz.f32", "f64"])
def test_fma_rounds_once(kind):
    type_ = kind.removeprefix("ftz.")
    x, y, z = floats(type_, 3)
    with np.errstate(all="ignore"):
        z[500:1500] = -(x * y)[500:1500]  # what is left is the error of the product
        near = slice(1500, 1800)  # the sum is near a tie of float32
        z[near] = ((x * y) * TYPES[type_](2.0**-24) * (1 + 2.0**-20))[near]
    found = compute(f"fma.rn.{kind} %0, %1, %2, %3", type_, *((type_, v) for v in (x, y, z)))
    with np.errstate(all="ignore"):
        if "ftz" in kind:
            x, y, z = map(flushed, (x, y, z))
        expected = x.astype(F64) * y + z
    for i, numbers in enumerate(zip(x, y, z, strict=True)):
        if all(map(math.isfinite, numbers)):
            a, b, c = (Fraction(float(v)) for v in numbers)
            if a * b + c:
                expected[i] = once(a * b + c, type_)
    assert_bits(found, flushed(expected) if "ftz" in kind else expected.astype(TYPES[type_]))


@pytest.mark.parametrize("low", [-1074, -1060, -1020, -960])
def test_fma_of_tiny_and_huge_doubles(low):
    n = 200
    x = chance.standard_normal(n) * 2.0 ** (low // 2)
    y = chance.standard_normal(n) * 2.0 ** (low - low // 2)
    z = chance.standard_normal(n) * np.ldexp(1.0, chance.integers(low - 3, low + 60, n))
    z[:20], x[20:40] = 1e308, 1e308
    found = compute("fma.rn.f64 %0, %1, %2, %3", "f64", *(("f64", v) for v in (x, y, z)))
    for result, *numbers in zip(found, x, y, z, strict=True):
        a, b, c = (Fraction(float(v)) for v in numbers)
        assert result == once(a * b + c, "f64")


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", ["max", "min"])
def test_extremes_of_floats(name, kind):
    """Return the number beside a NaN; -0 is less than 0."""
    x, y = floats(kind, 2)
    found = compute(f"{name}.{kind} %0, %1, %2", kind, (kind, x), (kind, y))
    key = {"max": max, "min": min}[name]
    expected = [
        b if math.isnan(a) else a if math.isnan(b)
        else key((a, b), key=lambda v: (v, math.copysign(1, v)))
        for a, b in zip(x, y, strict=True)
    ]  # fmt: skip
    assert_bits(found, expected)


def test_extremes_with_modifiers():
    x, y = floats("f32", 2)
    operands = ("f32", x), ("f32", y)
    nan = np.isnan(x) | np.isnan(y)
    found = compute("max.NaN.f32 %0, %1, %2", "f32", *operands)
    assert (np.isnan(found) == nan).all()
    found = compute("min.xorsign.abs.f32 %0, %1, %2", "f32", *operands)
    magnitude = np.fmin(np.abs(x), np.abs(y))
    expected = np.where(np.signbit(x) ^ np.signbit(y), -magnitude, magnitude)
    assert_bits(found[~nan], expected[~nan])
    found = compute("max.ftz.f32 %0, %1, %2", "f32", *operands)
    assert_bits(
        found[~nan],
        compute("max.f32 %0, %1, %2", "f32", ("f32", flushed(x)), ("f32", flushed(y)))[~nan],
    )
    z = floats("f32", 1)[0][: len(x)]
    x, y, z = (v[: len(z)] for v in (x, y, z))
    found = compute("max.f32 %0, %1, %2, %3", "f32", ("f32", x), ("f32", y), ("f32", z))
    np.testing.assert_array_equal(found, np.fmax(np.fmax(x, y), z))


UNARY = {
    "neg.f32": np.negative, "abs.f32": np.abs, "abs.ftz.f32": lambda x: np.abs(flushed(x)),
    "sqrt.rn.f32": np.sqrt, "sqrt.approx.ftz.f32": lambda x: flushed(np.sqrt(flushed(x))),
    "rcp.rn.f32": lambda x: 1 / x, "rcp.approx.ftz.f32": lambda x: flushed(1 / flushed(x)),
    "ex2.approx.f32": lambda x: np.exp2(x.astype(F64)),
    "ex2.approx.ftz.f32": lambda x: flushed(np.exp2(flushed(x).astype(F64)).astype(F32)),
    "lg2.approx.ftz.f32": lambda x: np.log2(flushed(x).astype(F64)),
    "rsqrt.approx.ftz.f32": lambda x: flushed(1 / np.sqrt(flushed(x).astype(F64))),
    "neg.f64": np.negative, "abs.f64": np.abs, "sqrt.rn.f64": np.sqrt,
    "rcp.rn.f64": lambda x: 1 / x,
    "cvt.rzi.f32.f32": np.trunc, "cvt.rni.f32.f32": np.rint, "cvt.rmi.f64.f64": np.floor,
    "cvt.rpi.f64.f64": np.ceil,
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_functions(name):
    kind = name.split(".")[-1]
    (x,) = floats(kind, 1)
    found = compute(f"{name} %0, %1", kind, (kind, x))
    with np.errstate(all="ignore"):
        assert_bits(found, UNARY[name](x).astype(TYPES[kind]))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_half_and_floats(kind):
    """Where a float32 and halves meet, the halves are widened first."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    a, b = torch.randn(2, 500).to(dtype)
    bits = [v.view(torch.int16).numpy().view(np.uint16) for v in (a, b)]
    a, b, c = a.float().numpy(), b.float().numpy(), floats("f32", 1)[0][100:600]
    halves = [(kind.replace("f16", "b16").replace("bb", "b"), v) for v in bits]
    assert_bits(compute(f"add.rn.f32.{kind} %0, %1, %2", "f32", halves[0], ("f32", c)), a + c)
    assert_bits(compute(f"sub.rn.f32.{kind} %0, %1, %2", "f32", halves[0], ("f32", c)), a - c)
    text = f"fma.rn.f32.{kind} %0, %1, %2, %3"
    found = compute(text, "f32", *halves, ("f32", c))
    expected = compute("fma.rn.f32 %0, %1, %2, %3", "f32", ("f32", a), ("f32", b), ("f32", c))
    assert_bits(found, expected)
    for word in ("lt", "neu"):
        text = f"setp.{word}.{kind} %0, %1, %2"
        found = compute(text, "pred", *halves)
        assert (found == (a < b if word == "lt" else a != b)).all()


def test_the_coarse_reciprocal_has_half_the_bits():
    x = np.array([3.0, -7.0, 1e-310, 0.0, math.inf, 1.2345678901234567])
    found = compute("rcp.approx.ftz.f64 %0, %1", "f64", ("f64", x))
    assert not (found.view(np.uint64) & np.uint64(0xFFFFFFFF)).any()
    np.testing.assert_allclose(found, [1 / 3, -1 / 7, math.inf, math.inf, 0, 1 / x[-1]], rtol=2e-6)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma.rn"])
def test_pairs_are_two_floats(name):
    n = 3 if name == "fma.rn" else 2
    numbers = [x[:2000] for x in floats("f32", n)]
    operands = [("f32x2", x.view(np.uint64)) for x in numbers]
    places = ", ".join(f"%{i}" for i in range(n + 1))
    found = compute(f"{name}.f32x2 {places}", "f32x2", *operands).view(F32)
    assert_bits(found, compute(f"{name}.f32 {places}", "f32", *(("f32", x) for x in numbers)))


# ----------------------------------------------------------------------------------------- integers


def wrapped(value, kind):
    bits = 8 * SIZES[kind]
    value %= 1 << bits
    return value - (1 << bits) if kind[0] == "s" and value >> bits - 1 else value


def cut(x, y):
    """Divide towards zero."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


ARITHMETIC = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul.lo": lambda x, y: x * y,
    "max": max, "min": min, "div": lambda x, y: cut(x, y) if y else -1,
    "rem": lambda x, y: x - y * cut(x, y) if y else x,
}  # fmt: skip


@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers(name, kind):
    x, y = integers(kind, 2)
    found = compute(f"{name}.{kind} %0, %1, %2", kind, (kind, x), (kind, y))
    expected = [
        wrapped(ARITHMETIC[name](a, b), kind) for a, b in zip(x.tolist(), y.tolist(), strict=True)
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_and_high_products(kind):
    x, y = integers(kind, 2)
    wide = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[kind]
    z = integers(wide, 1)[0][: len(x)]
    x, y = x[: len(z)], y[: len(z)]
    products = [a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    found = compute(f"mul.wide.{kind} %0, %1, %2", wide, (kind, x), (kind, y))
    assert found.tolist() == products
    found = compute(f"mad.wide.{kind} %0, %1, %2, %3", wide, (kind, x), (kind, y), (wide, z))
    expected = [wrapped(p + c, wide) for p, c in zip(products, z.tolist(), strict=True)]
    assert found.tolist() == expected
    if "32" in kind:
        found = compute(f"mul.hi.{kind} %0, %1, %2", kind, (kind, x), (kind, y))
        assert found.tolist() == [p >> 32 for p in products]


def test_the_high_half_of_64_bits():
    x, y = integers("u64", 2)
    found = compute("mul.hi.u64 %0, %1, %2", "u64", ("u64", x), ("u64", y))
    assert found.tolist() == [a * b >> 64 for a, b in zip(x.tolist(), y.tolist(), strict=True)]


@pytest.mark.parametrize("kind", ["s32", "s64"])
def test_multiply_add_keeps_the_lowest_bits(kind):
    x, y, z = integers(kind, 3)
    found = compute(f"mad.lo.{kind} %0, %1, %2, %3", kind, (kind, x), (kind, y), (kind, z))
    rows = zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    assert found.tolist() == [wrapped(a * b + c, kind) for a, b, c in rows]


LOGIC = {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_bits(kind):
    x, y = integers(kind.replace("b", "u"), 2)
    for name, function in LOGIC.items():
        found = compute(f"{name}.{kind} %0, %1, %2", kind, (kind, x), (kind, y))
        assert found.tolist() == [
            function(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)
        ]
    found = compute(f"not.{kind} %0, %1", kind, (kind, x))
    assert found.tolist() == [wrapped(~a, kind.replace("b", "u")) for a in x.tolist()]


def test_predicates():
    x, y = np.array([0, 0, 1, 1], bool), np.array([0, 1, 0, 1], bool)
    for name, function in LOGIC.items():
        found = compute(f"{name}.pred %0, %1, %2", "pred", ("pred", x), ("pred", y))
        assert found.tolist() == function(x, y).tolist()
    assert compute("not.pred %0, %1", "pred", ("pred", x)).tolist() == (~x).tolist()


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "u32", "s16", "s32", "s64"])
def test_shifts(kind):
    numbers = integers(kind.replace("b", "u"), 1)[0]
    amounts = np.array([0, 1, 5, 15, 16, 31, 32, 33, 63, 64, 65, 200, 2**32 - 1], np.uint32)
    x, amount = (v.ravel() for v in np.meshgrid(numbers, amounts))
    signed = kind[0] == "s"
    found = compute(f"shr.{kind} %0, %1, %2", kind, (kind, x), ("u32", amount))
    expected = [a >> min(int(n), 100) for a, n in zip(x.tolist(), amount, strict=True)]
    assert found.tolist() == expected
    if not signed and kind[0] == "b":
        found = compute(f"shl.{kind} %0, %1, %2", kind, (kind, x), ("u32", amount))
        expected = [
            wrapped(a << min(int(n), 100), "u" + kind[1:])
            for a, n in zip(x.tolist(), amount, strict=True)
        ]
        assert found.tolist() == expected


def field(x, start, length, kind):
    """Return a field of bits as PTX's page on bfe writes it."""
    top = 8 * SIZES[kind] - 1
    bits = x % (1 << top + 1)
    sign = bits >> min(start + length - 1, top) & 1 if kind[0] == "s" and length else 0
    result = sum(
        (bits >> start + i & 1 if i < length and start + i <= top else sign) << i
        for i in range(top + 1)
    )
    return wrapped(result, kind)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_fields_of_bits(kind):
    numbers = integers(kind, 1)[0][:40]
    places = np.array([0, 1, 5, 31, 32, 40, 63, 64, 255, 256], np.uint32)
    x, start, length = (v.ravel() for v in np.meshgrid(numbers, places, places))
    found = compute(f"bfe.{kind} %0, %1, %2, %3", kind, (kind, x), ("u32", start), ("u32", length))
    rows = zip(x.tolist(), start.tolist(), length.tolist(), strict=True)
    assert found.tolist() == [field(a, s & 255, n & 255, kind) for a, s, n in rows]


def test_other_functions_of_bits():
    x, y = (v[:100] for v in integers("u32", 2))
    found = compute("popc.b32 %0, %1", "u32", ("b32", x))
    assert found.tolist() == [a.bit_count() for a in x.tolist()]
    found = compute("clz.b32 %0, %1", "u32", ("b32", x))
    assert found.tolist() == [32 - a.bit_length() for a in x.tolist()]
    selector = np.resize(
        np.array([0x3210, 0x7654, 0x1032, 0x5410, 0xB3A2, 0xFFFF], np.uint32), len(x)
    )
    found = compute("prmt.b32 %0, %1, %2, %3", "u32", ("b32", x), ("b32", y), ("b32", selector))
    for result, a, b, s in zip(
        found.tolist(), x.tolist(), y.tolist(), selector.tolist(), strict=True
    ):
        both = (a | b << 32).to_bytes(8, "little")
        picked = [(both[s >> 4 * i & 7], s >> 4 * i & 8) for i in range(4)]
        assert result == sum(
            (255 * (v > 127) if sign else v) << 8 * i for i, (v, sign) in enumerate(picked)
        )
    start, length = (
        np.resize(np.array(v, np.uint32), len(x)) for v in ([0, 3, 30, 32], [1, 5, 40])
    )
    operands = ("b32", x), ("b32", y), ("u32", start), ("u32", length)
    found = compute("bfi.b32 %0, %1, %2, %3, %4", "u32", *operands)
    for result, a, b, s, n in zip(found, *(v.tolist() for v in (x, y, start, length)), strict=True):
        mask = (1 << n) - 1 << s
        assert result == (b & ~mask | a << s & mask) % (1 << 32)


def test_signs_of_integers():
    for kind in ("s16", "s32", "s64"):
        (x,) = integers(kind, 1)
        for name, function in (("neg", lambda a: -a), ("abs", abs)):
            found = compute(f"{name}.{kind} %0, %1", kind, (kind, x))
            assert found.tolist() == [wrapped(function(a), kind) for a in x.tolist()]


# -------------------------------------------------------------------------- conversions and choices


@pytest.mark.parametrize("target", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers_become_others(source, target):
    (x,) = integers(source, 1)
    found = compute(f"cvt.{target}.{source} %0, %1", target, (source, x))
    assert found.tolist() == [wrapped(a, target) for a in x.tolist()]


@pytest.mark.parametrize("target", ["f32", "f64"])
@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64"])
def test_integers_become_floats(source, target):
    (x,) = integers(source, 1)
    found = compute(f"cvt.rn.{target}.{source} %0, %1", target, (source, x))
    assert found.tolist() == [once(Fraction(a), target) for a in x.tolist()]


ROUNDINGS = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("target", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_floats_become_integers(source, target, rounding):
    x = np.array(
        [0.5, 1.5, -0.5, -2.5, 1e4, 3e9, -3e9, 1e30, -1e30, math.inf, math.nan], TYPES[source]
    )
    found = compute(f"cvt.{rounding}.{target}.{source} %0, %1", target, (source, x))
    info = np.iinfo(TYPES[target])
    highest = info.min or 1 << 63
    of_nan = highest if source == "f64" or "64" in target else 0
    if target == "u32" and source == "f64":
        of_nan = 1 << 31
    expected = [
        of_nan if math.isnan(a)
        else info.max if a == math.inf
        else min(max(ROUNDINGS[rounding](float(a)), info.min), info.max)
        for a in x
    ]  # fmt: skip
    assert found.tolist() == expected


def test_floats_become_narrower_and_wider():
    (x,) = floats("f32", 1)
    x[:100] *= F32(1e-38)
    bits = torch.from_numpy(x)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        expected = bits.to(dtype)
        found = compute(f"cvt.rn.{name}.f32 %0, %1", "b16", ("f32", x))
        kept = torch.from_numpy(found.view(np.int16)).view(dtype)
        torch.testing.assert_close(kept, expected, rtol=0, atol=0, equal_nan=True)
        back = compute(f"cvt.f32.{name} %0, %1", "f32", ("b16", found))
        assert_bits(back, expected.float().numpy())
        pair = compute(f"cvt.rn.{name}x2.f32 %0, %1, %2", "b32", ("f32", x), ("f32", x[::-1]))
        other = compute(f"cvt.rn.{name}.f32 %0, %1", "b16", ("f32", x[::-1]))
        assert (pair == found.astype(np.uint32) << 16 | other).all()
        cut = compute(f"cvt.rz.{name}.f32 %0, %1", "b16", ("f32", x))
        value = torch.from_numpy(cut.view(np.int16)).view(dtype).float().numpy()
        good = ~np.isnan(x)
        assert (np.abs(value[good]) <= np.abs(x[good])).all()
    with np.errstate(over="ignore"):
        assert_bits(
            compute("cvt.rn.f32.f64 %0, %1", "f32", ("f64", x / 3e0)), (x / 3e0).astype(F32)
        )
    assert_bits(compute("cvt.f64.f32 %0, %1", "f64", ("f32", x)), x.astype(F64))


def test_doubles_become_bfloat16_in_one_rounding():
    tie = 1 + 2.0**-8
    x = np.array([tie, tie + 2.0**-40, tie - 2.0**-40, -tie - 2.0**-40, math.inf, 3.0, 0.0])
    found = compute("cvt.rn.bf16.f64 %0, %1", "b16", ("f64", x))
    back = compute("cvt.f64.bf16 %0, %1", "f64", ("b16", found))
    assert back.tolist() == [1, 1 + 2**-7, 1, -1 - 2**-7, math.inf, 3, 0]


def test_tf32_rounds_ties_away_from_zero():
    x = np.array([1 + 2**-11, 1 + 2**-11 - 2**-23, -(1 + 2**-11), 1 + 3 * 2**-11, math.inf], F32)
    found = compute("cvt.rna.tf32.f32 %0, %1", "b32", ("f32", x)).view(F32)
    assert found.tolist() == [1 + 2**-10, 1, -(1 + 2**-10), 1 + 2 * 2**-10, math.inf]


WORDS = {
    "eq": "__eq__",
    "ne": "__ne__",
    "lt": "__lt__",
    "le": "__le__",
    "gt": "__gt__",
    "ge": "__ge__",
}
OF_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize("kind", ["f32", "f64", "s32", "u32", "s64", "u64", "s16", "u16"])
def test_comparisons(kind):
    x, y = floats(kind, 2) if kind[0] == "f" else integers(kind, 2)
    nan = np.isnan(x) | np.isnan(y)
    for word, method in WORDS.items():
        expected = getattr(x, method)(y)
        found = compute(f"setp.{word}.{kind} %0, %1, %2", "pred", (kind, x), (kind, y))
        assert (found == expected & ~nan).all()
        if kind[0] == "f":
            found = compute(f"setp.{word}u.{kind} %0, %1, %2", "pred", (kind, x), (kind, y))
            assert (found == expected | nan).all()
        p = chance.random(len(x)) > 0.5
        for join, function in LOGIC.items():
            text = f"setp.{word}.{join}.{kind} %0, %1, %2, %3"
            found = compute(text, "pred", (kind, x), (kind, y), ("pred", p))
            assert (found == function(expected & ~nan, p)).all()
    if kind[0] == "f":
        for word, expected in (("nan", nan), ("num", ~nan)):
            found = compute(f"setp.{word}.{kind} %0, %1, %2", "pred", (kind, x), (kind, y))
            assert (found == expected).all()
    if kind[0] == "u":
        for word, same in OF_UNSIGNED.items():
            found = compute(f"setp.{word}.{kind} %0, %1, %2", "pred", (kind, x), (kind, y))
            assert (found == getattr(x, WORDS[same])(y)).all()


def test_halves_are_compared_and_change_their_signs():
    x = torch.randn(64, 2).bfloat16()
    y = torch.where(torch.rand(64, 2) > 0.5, x, torch.randn(64, 2).bfloat16())
    a, b = (v.view(torch.int32).numpy().view(np.uint32)[:, 0] for v in (x, y))
    for word in ("gt", "eq"):
        expected = getattr(torch, word)(x, y).numpy()
        for i, names in enumerate(("%p0|%p8", "%p8|%p0")):
            found = compute(f"setp.{word}.bf16x2 {names}, %1, %2", "pred", ("b32", a), ("b32", b))
            assert (found == expected[:, i]).all()
    for word, function in (("abs", torch.abs), ("neg", torch.neg)):
        found = compute(f"{word}.bf16x2 %0, %1", "b32", ("b32", a))
        assert (found == function(x).view(torch.int32).numpy().view(np.uint32)[:, 0]).all()


def test_selections():
    x, y = floats("f32", 2)
    p = chance.random(len(x)) > 0.5
    found = compute("selp.f32 %0, %1, %2, %3", "f32", ("f32", x), ("f32", y), ("pred", p))
    assert_bits(found, np.where(p, x, y))
    sign = np.where(p, 1, -1).astype(np.int32)
    found = compute("slct.f32.s32 %0, %1, %2, %3", "f32", ("f32", x), ("f32", y), ("s32", sign))
    assert_bits(found, np.where(p, x, y))
    assert_bits(
        compute("copysign.f32 %0, %1, %2", "f32", ("f32", x), ("f32", y)), np.copysign(y, x)
    )


@pytest.mark.parametrize(
    "text",
    [
        "add.sat.f32 %0, %1, %1", "add.rz.f32 %0, %1, %1", "min.xorsign.f32 %0, %1, %1",
        "fma.rn.relu.f32 %0, %1, %1, %1", "cvt.rn.satfinite.bf16.f32 %h0, %1", "mul.f32 %0, %1",
        "mul.f32 %0, %1, %1, %1", "add.f32 %0, %1, %q1", "add.f32 %0, 1, %1",
        "mul24.lo.s32 %0, %1, %1", "div.approx.f32 %0, %1, %1",
        "ex2.approx.ftz.f16 %h0, %h0", "setp.gt.f32.f32 %p0, %1, %1", "shl.s32 %0, %1, %1",
        "add.f32 %0, %1, {%1, %1}", "add.f32 %0, %1, [%1]", "selp.f32 %0, %1, %1, %1",
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(text):
    with pytest.raises(UnknownInstruction):
        compute(text, "f32", ("f32", np.ones(1, F32)))
