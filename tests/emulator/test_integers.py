"""Arithmetic of integers and bits, against Python's integers."""

import numpy as np
import pytest
from ptx.forms import SIZES

from .samples import LOGIC, integers, wrapped
from .snippets import compute


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
