"""Conversions between types, comparisons and choices, and forms that are refused."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import UnknownInstruction
from ptx.forms import TYPES

from .samples import F32, F64, LOGIC, assert_bits, chance, floats, integers, once, wrapped
from .snippets import compute


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
