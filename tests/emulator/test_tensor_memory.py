"""Tensor memory, the products that it takes part in (tcgen05), and the barriers they arrive at."""

import numpy as np
import pytest
import torch
from ptx import UnknownInstruction

from .snippets import kinds
from .test_warp_groups import BARRIER, FENCE, ORDERS, laid_out, problem, run

ROOM = 128  # words behind the matrices, for a barrier and the address of the columns
KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # as the shape names them
MMA = "tcgen05.mma.cta_group::1"
ALLOC = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32"
DEALLOC = "tcgen05.dealloc.cta_group::1.sync.aligned.b32"
INIT, INVAL = "mbarrier.init.shared::cta.b64 [%r12], 1;", "mbarrier.inval.shared::cta.b64 [%r12];"
COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r12];"
TRY = "mbarrier.try_wait.parity.shared::cta.b64 done, [%r12], 0;"
WAIT = f"{{ .reg .pred done; again: {TRY} @!done bra.uni again; }}"
LOADED = "tcgen05.wait::ld.sync.aligned;"
STORED = "tcgen05.wait::st.sync.aligned;"


def start(n_words, n_columns=32):
    """Return what reserves columns, from %r30 on, and begins a barrier at %r12.

    %p0 is the first warp, %p1 its first thread, %p2 is false; %r31 are the rows of a warp.
    """
    place = 4 * (n_words - ROOM)
    return f"""
    setp.lt.u32 %p0, %t, 32; setp.eq.u32 %p1, %t, 0; setp.ne.u32 %p2, %t, %t;
    mov.u32 %r10, memory; add.s32 %r11, %r10, {place}; add.s32 %r12, %r10, {place + 8}; {BARRIER}
    @%p0 {ALLOC} [%r11], {n_columns};
    @%p1 {INIT} {BARRIER}
    ld.shared.b32 %r30, [%r11];
    shr.b32 %r13, %t, 5; shl.b32 %r13, %r13, 21; add.s32 %r31, %r30, %r13;
    """


END = f"{BARRIER} @%p1 {INVAL} @%p0 {DEALLOC} %r30, 32;"


def moved(what, n, place="%r31+0", split=8, first=0):
    """Return a load ("ld") or store ("st") of n registers by each lane."""
    registers = "{" + ", ".join(f"%f{first + i}" for i in range(n)) + "}"
    operands = (
        (registers, f"[{place}]", split) if what == "ld" else (f"[{place}]", split, registers)
    )
    return f"tcgen05.{what}.sync.aligned.16x32bx2.x{n}.b32 {', '.join(map(str, operands))};"


def load(m):
    """Return loads of a product of m rows and 16 columns."""
    halves = ["%r31+0"] if m == 64 else ["%r31+0", f"%r31+{16 << 16}"]
    return "".join(moved("ld", 8, half, first=8 * i) for i, half in enumerate(halves)) + LOADED


def gathered(result, m):
    """Return the matrix [m, 16] that the registers of 128 threads hold."""
    parts = result.reshape(4, 2, 16, -1, 8)  # warp, columns, lane, rows, column
    return parts.transpose(0, 3, 2, 1, 4).reshape(m, 16)


def descriptor(place, pitch, leading=0, stride=None):
    """Return the descriptor of a matrix in shared memory."""
    stride = 8 * pitch if stride is None else stride
    swizzle = {128: 2, 64: 4, 32: 6}[pitch]
    return place >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | swizzle << 61


def shape(m, n, dtype, turned=(0, 0)):
    kind = KINDS[dtype]
    bits = 1 << 4 | kind << 7 | kind << 10 | turned[0] << 15 | turned[1] << 16
    return bits | n >> 3 << 17 | m >> 4 << 24


def multiply(left, right, shape, adds, kind="f16"):
    """Return the product of the first thread, of descriptors or, on the left, an address."""
    left = left if isinstance(left, str) else f"{left}"
    return f"@%p1 {MMA}.kind::{kind} [%r30+0], {left}, {right}, {shape}, {adds};"


def with_room(*parts):
    """Return the words of shared memory, a whole number for each of 128 threads."""
    words = np.concatenate([[], *(np.asarray(part, np.uint32).ravel() for part in parts)])
    return np.concatenate([words, np.zeros(ROOM + -len(words) % 128)]).astype(np.uint32)


def kind_of(dtype):
    return "tf32" if dtype == torch.float32 else "f16"


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("m", [64, 128])
@pytest.mark.parametrize("pitch", [32, 64, 128])
def test_products_of_matrices_in_shared_memory(dtype, m, pitch):
    """Sum over rows of 32, 64 or 128 bytes, 32 of them a step, and over all of it twice."""
    a, b, _ = problem(dtype, pitch, 16)
    a = torch.cat([a, -2 * a.flip(0)])[:m]
    exact = [
        (x.view(torch.int32) & -0x2000).view(x.dtype) if x.itemsize == 4 else x for x in (a, b)
    ]
    words = with_room(laid_out(a, pitch), laid_out(b, pitch))
    steps = [
        multiply(
            descriptor(32 * i, pitch), descriptor(m * pitch + 32 * i, pitch), shape(m, 16, dtype),
            "%p3", kind_of(dtype),
        ) + "setp.eq.u32 %p3, %t, %t;"
        for i in range(pitch // 32)
    ]  # fmt: skip
    body = start(len(words)) + FENCE + BARRIER + "setp.ne.u32 %p3, %t, %t;" + "".join(2 * steps)
    result = np.zeros((128, m // 8), np.float32)
    launched = run(body + f"@%p1 {COMMIT}" + WAIT + load(m) + END, words, result)
    assert not launched.problems
    expected = 2 * (exact[0].double() @ exact[1].double().T).numpy()
    np.testing.assert_allclose(gathered(result, m), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turned", [(1, 0), (0, 1)])
def test_either_matrix_may_be_transposed(turned):
    """Its rows are then along the depth: 16 of them, of 64 numbers."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 16, generator=generator).bfloat16() for _ in range(2))
    sides = [
        (laid_out(x.T if turn else x, 128 if turn else 32), 128 if turn else 32)
        for x, turn in zip((a, b), turned, strict=True)
    ]
    words = with_room(*(side for side, _ in sides))
    places = [descriptor(2048 * i, pitch, 0, 8 * pitch) for i, (_, pitch) in enumerate(sides)]
    product = multiply(*places, shape(64, 64, torch.bfloat16, turned), "%p2") + f"@%p1 {COMMIT}"
    end = END.replace(", 32;", ", 64;")
    body = start(len(words), 64) + FENCE + BARRIER + product + WAIT
    result = np.zeros((128, 32), np.float32)
    assert not run(body + moved("ld", 32, split=32) + LOADED + end, words, result).problems
    found = result.reshape(4, 2, 16, 32).transpose(0, 2, 1, 3).reshape(64, 64)
    expected = (a.double() @ b.double().T).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_left_matrix_may_be_in_tensor_memory(dtype):
    """A row of 32 bytes lies in 8 columns, behind those of the product."""
    a, b, expected = problem(dtype, 32, 16)
    rows = a.contiguous().view(torch.int32).numpy().view(np.uint32)  # [64, 8]
    # a lane has half a row: its first 4 words, or its last
    halves = rows.reshape(4, 16, 2, 4).transpose(0, 2, 1, 3).reshape(128, 4)
    words = with_room(laid_out(b, 32), np.zeros(1024 - 16 * 8), halves)
    loads = "".join(f"ld.shared.f32 %f{i}, [%r14+{4 * i}];" for i in range(4))
    body = f"""
    {start(len(words))} mad.lo.s32 %r14, %t, 16, 4096; {loads}
    {moved("st", 4, "%r31+16", split=4)} {STORED} {FENCE} {BARRIER}
    {multiply("[%r30+16]", descriptor(0, 32), shape(64, 16, dtype), "%p2", kind_of(dtype))}
    @%p1 {COMMIT} {WAIT} {load(64)} {END}
    """
    result = np.zeros((128, 8), np.float32)
    assert not run(body, words, result).problems
    np.testing.assert_allclose(gathered(result, 64), expected, rtol=1e-5, atol=1e-5)


def test_stores_and_loads_of_a_warp():
    """Let the first lanes of a warp have its rows, and the others the same ones, 8 columns on."""
    words, result = with_room(np.arange(512)), np.zeros((128, 4), np.float32)
    machines = []
    loads = "".join(f"ld.shared.f32 %f{i}, [%r14+{4 * i}];" for i in range(4))
    body = f"""
    {start(len(words))} mad.lo.s32 %r14, %t, 16, %r10; {loads}
    {moved("st", 4, f"%r31+{(16 << 16) + 3}")} {STORED} {moved("ld", 4, f"%r31+{(16 << 16) + 3}")}
    {LOADED} {END}
    """
    assert not run(body, words, result, wrap=machines.append).problems
    assert (result.view(np.uint32).ravel() == np.arange(512)).all()
    memory = machines[0].tensors.words[0].reshape(4, 2, 16, 512)
    given = np.arange(512).reshape(4, 2, 16, 4)
    for half in range(2):
        assert (memory[:, 1, :, 3 + 8 * half : 7 + 8 * half] == given[:, half]).all()
    assert (memory[:, 0] == 0xFFFFFFFF).all() and (memory[:, 1, :, 7:11] == 0xFFFFFFFF).all()


# ------------------------------------------------------------------------------------------ columns


def columns(body):
    """Return the problems of a warp and four words that it stores at %r11."""
    text = f"mov.u32 %r11, memory; add.s32 %r11, %r11, 256; {body}"
    text += "".join(f"ld.shared.f32 %f{i}, [%r11+{4 * i}];" for i in range(4))
    result = np.zeros((32, 4), np.float32)
    launched = run(text, np.zeros(128, np.uint32), result, threads=32)
    return kinds(launched), result.view(np.uint32)[0].tolist()


def test_columns_are_reserved_and_given_back():
    taken = "".join(f"{ALLOC} [%r11+{4 * i}], {n};" for i, n in enumerate((32, 256, 32)))
    again = f"{DEALLOC} 0, 32; {ALLOC} [%r11+12], 32;"
    freed = f"{DEALLOC} 0, 32; {DEALLOC} 32, 32; {DEALLOC} 256, 256;"
    found, firsts = columns(taken + again + freed)
    assert not found and firsts == [0, 256, 32, 0]
    kept, _ = columns(taken)
    assert kept == {"tensor memory is not given back"}
    more, _ = columns(f"{ALLOC} [%r11], 512; {ALLOC} [%r11+4], 32; {DEALLOC} 0, 512;")
    assert more == {"more tensor memory is asked for than there is"}
    for place in (32, 496):
        freed, _ = columns(f"{ALLOC} [%r11], 32; {DEALLOC} 0, 32; {DEALLOC} {place}, 32;")
        assert freed == {"tensor memory is given back that is not reserved"}


@pytest.mark.parametrize("n", [0, 16, 48, 1024])
def test_other_numbers_of_columns_are_refused(n):
    with pytest.raises(ValueError, match=f"got {n} columns"):
        columns(f"{ALLOC} [%r11], {n};")


# -------------------------------------------------------------------------------------------- order

PRODUCT = multiply(descriptor(0, 32), descriptor(2048, 32), shape(64, 16, torch.bfloat16), "%p2")
WORDS = with_room(np.zeros(1024))
BEGUN = start(len(WORDS)) + FENCE + BARRIER + PRODUCT
WRITE = "mad.lo.s32 %r14, %t, 16, %r10; st.shared.b32 [%r14], 0;"  # of all threads, to A
FLIES = "tensor memory is touched that a product in flight writes"


def faults(body):
    zeros = "".join(f"mov.b32 %f{i}, 0;" for i in range(8))
    return kinds(run(zeros + body, WORDS.copy(), np.zeros((128, 8), np.float32)))


def test_a_product_is_there_when_it_is_waited_for():
    assert faults(BEGUN + f"@%p1 {COMMIT}" + WAIT + load(64) + END) == set()
    never = "a product is never waited for"
    assert faults(BEGUN + END) == {never}
    early = faults(BEGUN + f"@%p1 {COMMIT}" + load(64) + WAIT + END)
    # whoever loads at once is no barrier away from the thread that multiplies, either
    assert FLIES in early
    ignored = WAIT.replace("@!done bra.uni again;", "")  # a try that fails is no wait
    assert {FLIES, never} <= faults(BEGUN + f"@%p1 {COMMIT}" + ignored + load(64) + END)


def test_a_later_product_is_waited_for_by_the_other_parity():
    both = BEGUN + f"@%p1 {COMMIT}" + WAIT + load(64) + BARRIER + PRODUCT + f"@%p1 {COMMIT}"
    assert faults(both + WAIT.replace("], 0", "], 1") + load(64) + END) == set()
    assert FLIES in faults(both + WAIT + load(64) + END)  # of a phase that has ended long since


def test_who_waits_lets_others_go_on():
    """Let the loop lie before the code of the product, where it would run for ever."""
    body = f"""
    {start(len(WORDS))} {FENCE} {BARRIER}
    @%p0 bra $product;
    $wait: {WAIT} {load(64)} {END} bra.uni $end;
    $product: {PRODUCT} @%p1 {COMMIT} bra.uni $wait;
    $end:
    """
    assert faults(body) == set()


def test_who_waits_for_no_product_does_not_wait_for_ever():
    fault = "deadlock: threads wait for a barrier at which no product arrives"
    assert fault in faults(start(len(WORDS)) + WAIT + END)
    some = start(len(WORDS)) + "@%p0 bra $end;" + WAIT + "$end:" + END
    assert fault in faults(some)


OUTSIDE = {
    moved("ld", 8, split=32) + LOADED: "columns of tensor memory that are not reserved",
    moved("ld", 8, "%r31+500", split=8) + LOADED: "columns of tensor memory that are not reserved",
    moved("st", 8, "%r31+20", split=8) + STORED: "columns of tensor memory that are not reserved",
    moved("ld", 8, "%r30+0")
    + LOADED: "a warp touches rows of tensor memory that are another warp's",
    moved("ld", 8) + LOADED: None,
}


@pytest.mark.parametrize("access", OUTSIDE)
def test_accesses_outside(access):
    found = faults(start(len(WORDS)) + access + END)
    assert found == ({OUTSIDE[access]} if OUTSIDE[access] else set())


def test_products_outside():
    wide = shape(64, 64, torch.bfloat16)
    product = multiply(descriptor(0, 32), descriptor(2048, 32), wide, "%p2") + f"@%p1 {COMMIT}"
    found = faults(start(len(WORDS)) + FENCE + BARRIER + product + WAIT + END)
    assert found == {"columns of tensor memory that are not reserved"}


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_product_reads_is_ordered_by_a_fence_and_a_barrier(order):
    between, fault = ORDERS[order]
    begun = start(len(WORDS)) + FENCE + BARRIER + WRITE + between + PRODUCT
    found = faults(begun + f"@%p1 {COMMIT}" + WAIT + load(64) + END)
    assert found == ({fault} if fault else set())


def test_what_a_product_reads_is_not_written():
    committed, end = BEGUN + f"@%p1 {COMMIT}", load(64) + END
    assert faults(committed + WAIT + BARRIER + WRITE + end) == set()
    fault = "shared memory is written that a product in flight reads"
    assert faults(committed + WRITE + WAIT + end) == {fault}


def test_registers_and_stores_are_waited_for():
    use = "add.f32 %f9, %f0, %f0;"
    loads = start(len(WORDS)) + moved("ld", 8)
    assert faults(loads + LOADED + use + END) == set()
    assert faults(loads + use + LOADED + END) == {"a register is touched before tcgen05.wait::ld"}
    stores, again = start(len(WORDS)) + moved("st", 8), moved("ld", 8) + LOADED + END
    assert faults(stores + STORED + again) == set()
    assert faults(stores + again) == {"tensor memory is loaded before tcgen05.wait::st"}


@pytest.mark.parametrize("missing", ["", STORED, BARRIER])
def test_a_product_begins_behind_stores_and_a_barrier(missing):
    order = (STORED + BARRIER).replace(missing, "") if missing else STORED + BARRIER
    body = start(len(WORDS)) + FENCE + BARRIER + moved("st", 8) + order + PRODUCT
    fault = {
        "": set(),
        STORED: {"a product begins before tcgen05.wait::st"},
        BARRIER: {"a product begins where another warp touches, without a barrier"},
    }
    assert faults(body + f"@%p1 {COMMIT}" + WAIT + STORED + load(64) + END) == fault[missing]


# ----------------------------------------------------------------------------------------- barriers


def test_barriers_begin_and_end():
    committed = BEGUN + f"@%p1 {COMMIT}"
    whole = committed + WAIT + load(64) + END
    assert "a barrier is used that has not begun" in faults(whole.replace("@%p1 " + INIT, ""))
    assert "a barrier ends before the products that arrive at it" in faults(committed + END)
    behind = whole.replace(END, END + BARRIER + WAIT)
    assert faults(behind) >= {"a barrier is used that has not begun"}
    # others must not wait before it has begun
    race = faults(whole.replace(f"@%p1 {INIT}", "").replace(WAIT, f"@%p1 {INIT} {WAIT}"))
    assert "shared memory is read where another warp wrote, without a barrier" in race
    with pytest.raises(ValueError, match="a barrier of 2 arrivals"):
        faults(whole.replace(INIT, INIT.replace("1;", "2;")))


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "text",
    [
        f"{ALLOC.replace('::1', '::2')} [%r1], 32",
        "tcgen05.mma.cta_group::2.kind::f16 [%r1], %q0, %q1, %r2, %p0",
        f"{MMA}.kind::i8 [%r1], %q0, %q1, %r2, %p0",
        f"{MMA}.kind::f16.ashift [%r1], [%r2], %q1, %r2, %p0",
        f"{MMA}.kind::f16 [%r1], %q0, %q1, %r2, {{%r3, %r3, %r3, %r3}}, %p0",
        "tcgen05.mma.ws.cta_group::1.kind::f16 [%r1], %q0, %q1, %r2, %p0",
        "tcgen05.mma.sp.cta_group::1.kind::f16 [%r1], %q0, %q1, [%r3], %r2, %p0",
        "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r1}, [%r2]",
        "tcgen05.ld.sync.aligned.16x32bx2.x1.pack::16b.b32 {%r1}, [%r2], 1",
        "tcgen05.ld.sync.aligned.16x32bx2.x3.b32 {%r1, %r2, %r3}, [%r4], 3",
        "tcgen05.cp.cta_group::1.128x256b [%r1], %q0",
        "tcgen05.shift.cta_group::1.down [%r1]",
        COMMIT.replace("commit.cta_group::1", "commit.cta_group::2").rstrip(";"),
        "mbarrier.arrive.shared::cta.b64 %q0, [%r1]",
        "mbarrier.test_wait.parity.shared::cta.b64 %p0, [%r1], 0",
        "mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r1], 0, 1000",
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(text):
    with pytest.raises(UnknownInstruction):
        faults(text + ";")


PLAIN = shape(64, 16, torch.bfloat16)
SHAPES = {
    "96 rows": shape(96, 16, torch.bfloat16), "no columns": shape(64, 0, torch.bfloat16),
    "24 columns of 128 rows": shape(128, 24, torch.bfloat16),
    "264 columns": shape(64, 264, torch.bfloat16), "tf32": shape(64, 16, torch.float32),
    "two types": PLAIN ^ 1 << 10, "sums in float16": PLAIN ^ 1 << 4, "sparse": PLAIN | 1 << 2,
    "saturating": PLAIN | 1 << 3, "negated": PLAIN | 1 << 13, "shifted": PLAIN | 1 << 30,
    "other types": PLAIN | 3 << 7,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_are_refused(name):
    body = BEGUN.replace(f", {PLAIN}, ", f", {SHAPES[name]}, ")
    with pytest.raises(RuntimeError, match="got"):
        faults(body + END)


def test_as_many_registers_as_the_form_says():
    for what in ("ld", "st"):
        with pytest.raises(ValueError, match="got 8 registers, need 4"):
            faults(moved(what, 8).replace(".x8", ".x4"))
