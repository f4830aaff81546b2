"""Moves between registers and memory, matrices, and every fault that the emulator must see."""

import numpy as np
import pytest
import torch
from ptx import Traffic, UnknownInstruction, launch
from ptx.forms import TYPES

from .snippets import compute, kernel

WORDS = np.arange(64, dtype=np.uint64)


def run(body, *arrays, threads=64, grid=(1,), shared=4096, traffic=None):
    return launch(kernel(body, len(arrays)), arrays, grid, threads, shared, traffic)


def kinds(launched):
    return {problem.kind for problem in launched.problems}


def seen(launched, *words):
    """Return whether there is a problem of which each word is a part, and no other kind."""
    return kinds(launched) and all(word in kind for word in words for kind in kinds(launched))


SHARED = """
mov.u32 %r0, memory;
shl.b32 %r1, %t, 2;
add.s32 %r2, %r0, %r1;      // the word of this thread
xor.b32 %r3, %r1, 128;
add.s32 %r3, %r0, %r3;      // that of the same lane in the other warp
add.s32 %r9, %t, 7;
"""


# -------------------------------------------------------------------------------------------- moves


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


# -------------------------------------------------------------------------------------------- races


def test_shared_memory_behind_a_barrier_is_clean():
    y = np.zeros(64, np.uint64)
    body = (
        SHARED + "st.shared.b32 [%r2], %r9; {} ld.shared.b32 %r4, [%r3]; st.global.b32 [%a0], %r4;"
    )
    assert not run(body.replace("{}", "bar.sync 0;"), y).problems
    assert (y == (np.arange(64) ^ 32) + 7).all()
    launched = run(body.replace("{}", ""), y)
    assert seen(launched, "shared memory is read where another warp wrote, without a barrier")
    # a warp is in lockstep, and needs none
    assert not run(body.replace("{}", "").replace("[%r3]", "[%r2]"), y).problems


def test_writes_after_reads_and_writes_need_a_barrier():
    y = np.zeros(64, np.uint64)
    start = SHARED + "st.shared.b32 [%r2], %r9; bar.sync 0; ld.shared.b32 %r4, [%r3];"
    end = "st.shared.b32 [%r2], %t; st.global.b32 [%a0], %r4;"
    assert seen(run(start + end, y), "shared memory is written where another warp read")
    assert not run(start + "bar.sync 0;" + end, y).problems
    twice = SHARED + "st.shared.b32 [%r2], %r9; {} st.shared.b32 [%r3], %r9;"
    assert seen(
        run(twice.replace("{}", ""), y), "shared memory is written where another warp wrote"
    )
    assert not run(twice.replace("{}", "bar.sync 0;"), y).problems


def test_a_reader_is_seen_behind_another_one():
    """The first warp reads, then the second reads and writes: its own read hides nothing."""
    y = np.zeros(64, np.uint64)
    body = (
        SHARED
        + """
    st.shared.b32 [%r2], %r9; bar.sync 0;
    and.b32 %r5, %r1, 127; add.s32 %r5, %r0, %r5;
    ld.shared.b32 %r4, [%r5];
    setp.gt.u32 %p0, %t, 31;
    @%p0 st.shared.b32 [%r5], %r9;
    """
    )
    assert seen(run(body, y), "shared memory is written where another warp read")


def test_lanes_that_store_different_numbers_in_one_place():
    y = np.zeros(64, np.uint64)
    assert seen(run(SHARED + "st.shared.b32 [%r0], %t;", y, threads=32), "lanes that disagree")
    assert not run(SHARED + "st.shared.b32 [%r0], 3;", y, threads=32).problems
    assert seen(
        run(
            "and.b64 %q0, %a0, -512; st.global.b32 [%q0], %t;",
            aligned(512),
        ),
        "lanes that disagree",
    )


def aligned(n_bytes):
    """Return 64-bit words that begin at a multiple of so many bytes."""
    memory = np.zeros(2 * n_bytes // 8, np.uint64)
    skip = -memory.ctypes.data % n_bytes // 8
    return memory[skip : skip + n_bytes // 8]


def test_global_memory_races_inside_a_program():
    y = np.zeros(64, np.uint64)
    body = """
    xor.b32 %r0, %t, 32; sub.s32 %r0, %r0, %t; mul.wide.s32 %q0, %r0, 8; add.s64 %q0, %a0, %q0;
    st.global.b32 [%a0], %t; {} ld.global.b32 %r1, [%q0];
    """
    launched = run(body.replace("{}", ""), y)
    assert seen(launched, "global memory", "is read where another warp wrote, without a barrier")
    assert not run(body.replace("{}", "bar.sync 0;"), y).problems


def test_global_memory_races_between_programs():
    y = np.zeros(64, np.uint64)
    other = """
    setp.lt.u32 %p0, %g, 32; selp.b32 %r0, 256, -256, %p0; cvt.s64.s32 %q0, %r0;
    add.s64 %q0, %a0, %q0;   // the element of the other program
    """
    read = other + "st.global.b32 [%a0], %t; bar.sync 0; ld.global.b32 %r1, [%q0];"
    launched = run(read, y, threads=32, grid=(2,))
    assert all("another program" in kind for kind in kinds(launched)) and launched.problems
    write = other + "st.global.b32 [%a0], %t; st.global.b32 [%q0], %t;"
    launched = run(write, y, threads=32, grid=(2,))
    assert seen(launched, "is written where another program wrote")
    after = other + "ld.global.b32 %r1, [%q0]; st.global.b32 [%a0], %r1;"
    launched = run(after, y, threads=32, grid=(2,))
    assert launched.problems and all("another program" in kind for kind in kinds(launched))
    alone = other + "ld.global.b32 %r1, [%q0]; ld.global.b32 %r1, [%a0];"
    assert not run(alone, y, threads=32, grid=(2,)).problems


# ------------------------------------------------------------------------------------- other faults


def test_accesses_outside():
    y = np.zeros(64, np.uint64)
    for offset, what in ((8, "read"), (8, "write"), (-8, "read")):
        access = "ld.global.b32 %r1, [%a0+{}];" if what == "read" else "st.global.b32 [%a0+{}], %t;"
        assert seen(run(access.format(offset), y), "access outside of every tensor")
    assert seen(run("ld.shared.b32 %r1, [memory+4096];", y), "access outside of shared memory")
    assert seen(
        run("mov.b32 %r1, -16; st.shared.b32 [%r1], 3;", y, threads=32), "access outside of shared"
    )


def test_misaligned_vectors():
    y = np.zeros(200, np.uint64)
    body = "mov.b64 %q0, %a0; ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%q0];"
    assert seen(run(body, y), "misaligned vector in global memory")  # each second is
    assert seen(
        run("mov.u32 %r0, memory; ld.shared.v2.b32 {%r1, %r2}, [%r0+4];", y),
        "misaligned vector in shared",
    )
    assert seen(run("ld.global.b64 %q0, [%a0+4];", y, threads=32), "misaligned vector in global")


def test_deadlocks_and_barriers_that_some_miss():
    y = np.zeros(64, np.uint64)
    body = """
    setp.lt.u32 %p0, %t, 32;
    @%p0 bra $one;
    bar.sync 0; bra.uni $end;
    $one: bar.sync 0; st.global.b32 [%a0], %t;
    $end:
    """
    assert seen(run(body, y), "deadlock")
    assert seen(
        run("setp.lt.u32 %p0, %t, 5; @%p0 bar.sync 0;", y), "a barrier that not all threads reach"
    )


def test_a_register_that_was_never_written():
    with pytest.raises(RuntimeError, match="%r7 was never written"):
        run("add.s32 %r1, %r7, 1;", np.zeros(64, np.uint64))
    y = np.zeros(64, np.uint64)  # the half of a pair that nobody reads need not be
    assert not run("mov.b64 %q0, {%t, %r7}; st.global.b64 [%a0], %q0;", y).problems
    assert y.tolist() == [t | 0xFFFFFFFF << 32 for t in range(64)]


# -------------------------------------------------------------------------------- copies (cp.async)

COPY = (
    SHARED
    + """
cp.async.ca.shared.global [%r2+0], [%a0+0], 0x4, %r8;
cp.async.commit_group;
{}
ld.shared.b32 %r4, [%r2];
st.global.b32 [%a1], %r4;
"""
)


def copied(wait, present="mov.b32 %r8, 4;"):
    x, y = np.arange(100, 164, dtype=np.uint64), np.zeros(64, np.uint64)
    return run(present + COPY.replace("{}", wait), x, y), y


def test_a_copy_arrives_when_it_is_waited_for():
    launched, y = copied("cp.async.wait_group 0;")
    assert not launched.problems and (y == np.arange(100, 164)).all()
    launched, y = copied("cp.async.wait_all;")
    assert not launched.problems and (y == np.arange(100, 164)).all()
    launched, y = copied(
        "cp.async.wait_group 0;", "setp.lt.u32 %p0, %t, 9; selp.b32 %r8, 4, 0, %p0;"
    )
    assert (
        not launched.problems and (y == np.where(np.arange(64) < 9, np.arange(100, 164), 0)).all()
    )


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;"])
def test_a_copy_that_is_not_waited_for(wait):
    launched, y = copied(wait)
    assert (y == 2**32 - 1).all()  # what nobody knows
    assert seen(launched, "cp.async is never waited for")


def test_copies_of_others_need_a_barrier_too():
    text = COPY.replace("ld.shared.b32 %r4, [%r2]", "ld.shared.b32 %r4, [%r3]")
    x, y = WORDS.copy(), np.zeros(64, np.uint64)
    for barrier in ("bar.sync 0;", ""):
        launched = run(
            "mov.b32 %r8, 4;" + text.replace("{}", "cp.async.wait_group 0;" + barrier), x, y
        )
        assert bool(launched.problems) == (not barrier)


# ----------------------------------------------------------------------------------------- matrices


def halves_of(x):
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_go_through_shared_memory(trans):
    """Each lane has a pair of four matrices: of row lane / 4, from column 2 (lane % 4) on."""
    x = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    source, y = x.reshape(32, 8).copy(), np.zeros((32, 4), np.uint32)
    body = f"""
    mov.u32 %r0, memory; shl.b32 %r1, %t, 4; add.s32 %r1, %r0, %r1;
    mad.wide.u32 %q0, %t, 8, %a0;
    ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%q0];
    st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r6, %r7, %r8, %r9}}, [%r1];
    add.s32 %r1, %r1, 512;
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r1], {{%r6, %r7, %r8, %r9}};
    ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r1];
    mad.wide.u32 %q0, %t, 8, %a1;
    st.global.v4.b32 [%q0], {{%r6, %r7, %r8, %r9}};
    mad.wide.u32 %q0, %t, 8, %a2;
    st.global.v4.b32 [%q0], {{%r2, %r3, %r4, %r5}};
    """
    back = np.zeros((32, 4), np.uint32)
    launched = run(body, source, y, back, threads=32)
    assert not launched.problems
    matrices = x.swapaxes(1, 2) if trans else x
    for lane in range(32):
        pairs = matrices[:, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].astype(np.uint32)
        assert (y[lane] == pairs[:, 0] | pairs[:, 1] << 16).all()
    assert (back.view(np.uint16).reshape(4, 8, 8) == x).all()


MMA = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": (torch.bfloat16, 16),
    "m16n8k16.row.col.f32.f16.f16.f32": (torch.float16, 16),
    "m16n8k8.row.col.f32.bf16.bf16.f32": (torch.bfloat16, 8),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (torch.float32, 8),
    "m16n8k4.row.col.f32.tf32.tf32.f32": (torch.float32, 4),
}


@pytest.mark.parametrize("form", MMA)
def test_products_of_a_warp(form):
    """Fill the registers as the tables of PTX's page on mma say, lane by lane."""
    dtype, depth = MMA[form]
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, depth, generator=generator).to(dtype)
    b = torch.randn(depth, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    if dtype == torch.float32:  # 13 bits are not read: make them nonsense
        exact = [(x.view(torch.int32) & -0x2000).view(torch.float32).double() for x in (a, b)]
    else:
        exact = [a.double(), b.double()]
    per = 1 if dtype == torch.float32 else 2
    n_a, n_b = 16 * depth // 32 // per, 8 * depth // 32 // per
    registers = np.zeros((32, 16), np.uint32)
    for lane in range(32):
        group, in_group = divmod(lane, 4)
        for i in range(n_a):
            row = group + 8 * (i % 2)
            column = per * in_group + 4 * per * (i // 2)
            registers[lane, i] = bits_of(a[row, column : column + per])
        for i in range(n_b):
            row = per * in_group + 4 * per * i
            registers[lane, 4 + i] = bits_of(b[row : row + per, group])
        for i in range(4):
            place = group + 8 * (i // 2), 2 * in_group + i % 2
            registers[lane, 8 + i] = bits_of(c[place][None])
    result = np.zeros((32, 4), np.float32)
    loads = "".join(f"ld.global.b32 %r{i}, [%q0+{4 * i}];" for i in range(12))
    names = [", ".join(f"%r{i}" for i in range(s, s + n)) for s, n in ((0, n_a), (4, n_b), (8, 4))]
    operands = ", ".join(f"{{{name}}}" for name in names)
    body = f"""
    mad.wide.u32 %q0, %t, 56, %a0; {loads}
    mma.sync.aligned.{form} {{%r12, %r13, %r14, %r15}}, {operands};
    mad.wide.u32 %q1, %t, 8, %a1;
    st.global.v4.b32 [%q1], {{%r12, %r13, %r14, %r15}};
    """
    assert not run(body, registers, result, threads=32).problems
    expected = (exact[0] @ exact[1] + c).numpy()
    for lane in range(32):
        for i in range(4):
            place = lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2
            assert result[lane, i] == np.float32(expected[place]) or abs(
                result[lane, i] - expected[place]
            ) < 1e-6 * abs(expected[place])


def bits_of(numbers):
    """Return one or two numbers as a register."""
    numbers = numbers.contiguous()
    if numbers.dtype == torch.float32:
        return int(numbers.view(torch.int32)[0]) & 0xFFFFFFFF
    low, high = (int(x) & 0xFFFF for x in numbers.view(torch.int16))
    return low | high << 16


# ------------------------------------------------------------------------------------------ traffic


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


@pytest.mark.parametrize(
    "text",
    [
        "ld.global.b128 %q0, [%a0]", "ld.local.b32 %r0, [%r1]",
        "atom.global.add.f32 %r0, [%a0], %r1",
        "ld.acquire.gpu.global.b32 %r0, [%a0]",
        "cp.async.bulk.shared.global [%r0], [%a0], 16, [%r1]",
        "shfl.up.b32 %r0, %r1, 1, 0", "call foo, (%r0)",
        "tex.2d.v4.f32.f32 {%r0,%r1,%r2,%r3}, [%r4]",
        "st.global.b32 [%a0+%r1], %r0", "mov.b32 %r0, %clock", "bar.red.popc.u32 %r0, 0, %p0",
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(text):
    with pytest.raises(UnknownInstruction):
        run(text + ";", WORDS.copy())
