"""Accesses outside, deadlocks, copies nobody waits for, and text that is refused."""

import numpy as np
import pytest
from ptx import UnknownInstruction

from .snippets import SHARED, run, seen

WORDS = np.arange(64, dtype=np.uint64)


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
