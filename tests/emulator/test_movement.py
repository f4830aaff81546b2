"""Moves between registers, lanes and memory, and threads that part and meet again."""

import numpy as np
import pytest
from ptx import Traffic, launch
from ptx.forms import TYPES

from .snippets import aligned, compute, kernel, run


@pytest.mark.parametrize("kind", ["b8", "b16", "b32", "b64", "s8", "u8", "s32", "f32", "f64"])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_loads_and_stores(kind, space):
    """Return what was stored; what is narrower than a register is extended by its sign or zeros."""
    size = np.dtype(TYPES[kind]).itemsize
    target = {1: "%h0", 2: "%h0", 4: "%r5", 8: "%q5"}[size]
    x = np.random.default_rng(0).integers(0, 2**63, 64).astype(np.uint64)
    y = np.zeros(64, np.uint64)
    body = f"ld.global.{kind} {target}, [%a0];"
    if space == "shared":
        body += f"""shl.b32 %r1, %t, 3; mov.u32 %r0, memory; add.s32 %r1, %r0, %r1;
        st.shared.{kind} [%r1], {target}; bar.sync 0; ld.shared.{kind} {target}, [%r1+0];"""
    wide = {"%h": "b16", "%r": "b32", "%q": "b64"}[target[:2]]
    launched = run(body + f"st.global.{wide} [%a1], {target};", x, y)
    assert not launched.problems
    narrow = x.view(TYPES[kind]).reshape(64, -1)[:, 0]
    register = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64}[wide]
    expected = narrow.astype(np.int16).view(np.uint16) if kind == "s8" else narrow
    expected = expected.astype(register) if size == 1 and kind != "s8" else expected.view(register)
    assert (y.view(register).reshape(64, -1)[:, 0] == expected).all()


def test_vectors_parameters_and_packing():
    x, y = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    body = """
    mad.wide.u32 %q0, %t, 8, %a0;
    ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%q0];
    mov.b64 %q1, {%r0, %r1};
    mov.b64 {_, %r5}, %q1;
    mov.b32 {%h0, %h1}, %r2;
    mov.b32 %r6, {%h1, %h0};
    mad.wide.u32 %q2, %t, 8, %a1;
    st.global.v4.b32 [%q2], {%r0, %r5, %r6, %r3};
    """
    launched = run(body, x, y, threads=64)
    assert not launched.problems
    expected = x.reshape(64, 4).copy()
    expected[:, 2] <<= 16
    assert (y.reshape(64, 4) == expected).all()


def test_special_registers_and_grids():
    y = np.zeros(6 * 32, np.uint64)
    text = kernel(
        """
        mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.z;
        mov.u32 %r3, %nctaid.x; mov.u32 %r4, %nctaid.y; mov.u32 %r5, %laneid;
        mad.lo.s32 %r6, %r2, %r4, %r1; mad.lo.s32 %r6, %r6, %r3, %r0;
        mad.lo.s32 %r7, %r6, 32, %r5; mad.wide.u32 %q0, %r7, 8, %q1;
        st.global.b32 [%q0], %r6;
        """.replace("%q1", "%q9"),
        1,
        ".reg .b64 %z;",
    ).replace("mad.lo.s32 %g", "ld.param.b64 %q9, [p0];\nmad.lo.s32 %g", 1)
    launched = launch(text, [y], (1, 3, 2), 32)
    assert not launched.problems
    assert (y.reshape(6, 32) == np.arange(6)[:, None]).all()


def test_shuffles():
    x = np.random.default_rng(0).integers(0, 2**32, 64).astype(np.uint32)
    lanes, rows = np.arange(32), x.reshape(2, 32)
    for i in (1, 2, 4, 8, 16):
        found = compute(f"shfl.sync.bfly.b32 %0, %1, {i}, 31, -1", "b32", ("b32", x))
        assert (found.reshape(2, 32) == rows[:, lanes ^ i]).all()
    for text, chosen in {
        "up.b32 %0, %1, 3, 0, -1": np.where(lanes >= 3, lanes - 3, lanes),
        "down.b32 %0, %1, 3, 31, -1": np.where(lanes < 29, lanes + 3, lanes),
        "idx.b32 %0, %1, 7, 31, -1": np.full(32, 7),
        # segments of 8 lanes
        "idx.b32 %0, %1, 2, 6175, -1": lanes // 8 * 8 + 2,
        "down.b32 %0, %1, 1, 6175, -1": np.where(lanes % 8 < 7, lanes + 1, lanes),
    }.items():
        found = compute(f"shfl.sync.{text}", "b32", ("b32", x))
        assert (found.reshape(2, 32) == rows[:, chosen]).all()
    other = np.tile(np.roll(lanes, 5), 2).astype(np.uint32)
    found = compute("shfl.sync.idx.b32 %0, %1, %2, 31, -1", "b32", ("b32", x), ("b32", other))
    assert (found.reshape(2, 32) == rows[:, np.roll(lanes, 5)]).all()


def test_reductions_of_a_warp():
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    rows = x.reshape(2, 32)
    mask = ("u32", np.full(64, 2**32 - 1, np.uint32))
    found = compute("redux.sync.max.f32 %0, %1, %2", "f32", ("f32", x), mask)
    assert (found == np.repeat(rows.max(1), 32)).all()
    found = compute("redux.sync.min.abs.f32 %0, %1, %2", "f32", ("f32", x), mask)
    assert (found == np.repeat(np.abs(rows).min(1), 32)).all()
    bits = x.view(np.uint32)
    found = compute("redux.sync.add.u32 %0, %1, %2", "u32", ("u32", bits), mask)
    assert (found == np.repeat(bits.reshape(2, 32).sum(1, dtype=np.uint32), 32)).all()
    found = compute("redux.sync.xor.b32 %0, %1, %2", "b32", ("b32", bits), mask)
    assert (found == np.repeat(np.bitwise_xor.reduce(bits.reshape(2, 32), axis=1), 32)).all()


def test_one_lane_is_elected():
    found = compute("elect.sync _|%p0, -1", "pred", ("b32", np.zeros(64, np.uint32)))
    assert found.tolist() == ([True] + [False] * 31) * 2


def test_threads_part_and_meet_again():
    """Count down from the lane's number: each leaves the loop at another time."""
    y = np.zeros(64, np.uint64)
    body = """
    mov.b32 %r0, 0;
    mov.b32 %r1, %t;
    $again:
    setp.eq.b32 %p0, %r1, 0;
    @%p0 bra $done;
    add.s32 %r0, %r0, %r1;
    sub.s32 %r1, %r1, 1;
    bra.uni $again;
    $done:
    shfl.sync.bfly.b32 %r0, %r0, 1, 31, -1;
    st.global.b32 [%a0], %r0;
    setp.lt.u32 %p1, %t, 10;
    @%p1 ret;
    st.global.b32 [%a0], %r1;
    """
    assert not run(body, y).problems
    expected = [sum(range((t ^ 1) + 1)) if t < 10 else 0 for t in range(64)]
    assert y.tolist() == expected


def test_scopes_may_declare_a_register_again():
    y = np.zeros(32, np.uint64)
    body = """
    mov.b32 %r0, 1;
    { .reg .b32 tmp; .reg .b32 %r0; mov.b32 %r0, 5; mov.b32 tmp, %r0; mov.b32 %r1, tmp; }
    { .reg .b64 tmp; mov.b64 tmp, {%r0, %r1}; st.global.b64 [%a0], tmp; }
    """
    assert not run(body, y, threads=32).problems
    assert (y == 1 + (5 << 32)).all()


def test_lines_and_sectors_of_a_warp():
    memory = aligned(32 * 256)
    for step, lines, sectors in ((4, 1, 4), (8, 2, 8), (32, 8, 32), (256, 32, 32)):
        traffic = Traffic()
        body = (
            f"ld.param.b64 %q1, [p0]; mad.wide.u32 %q0, %t, {step}, %q1; ld.global.b32 %r0, [%q0];"
        )
        assert not run(body, memory, threads=32, traffic=traffic).problems
        counts = traffic.total("snippet", "load")
        assert (counts.requests, counts.lines, counts.sectors, counts.n_bytes) == (
            1,
            lines,
            sectors,
            128,
        )
        assert f"{lines / 1:.1f}" in traffic.table()
