"""Races in shared and global memory, between warps and between programs."""

import numpy as np

from .snippets import SHARED, aligned, kinds, run, seen


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
