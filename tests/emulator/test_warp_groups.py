"""Products of warp groups, and what must order their reads of shared memory."""

import numpy as np
import pytest
import torch
from ptx import launch

from .snippets import bits_of, kernel, kinds

FENCE, BARRIER = "fence.proxy.async.shared::cta;", "bar.sync 0;"
END = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
SWIZZLE = {128: 1, 64: 2, 32: 3}  # bytes of a row, and the number in the descriptor
SIGNS = ", 1, 1"
LEFT = "{%r4, %r5, %r6, %r7}"
MMA = "wgmma.mma_async.sync.aligned"


def laid_out(matrix, pitch):
    """Return the words of a matrix whose 16-byte parts are mixed in blocks of 8 rows."""
    n_rows, size = matrix.shape[0], matrix.shape[1] * matrix.element_size()
    assert size == pitch
    raw = matrix.contiguous().view(torch.uint8).numpy().reshape(n_rows, size // 16, 16)
    out = np.zeros_like(raw)
    mask = pitch // 16 - 1
    for row in range(n_rows):
        for part in range(size // 16):
            place = row * pitch + 16 * part
            out[row, (place ^ (place >> 7 & mask) << 4) % pitch // 16] = raw[row, part]
    return out.reshape(-1).view(np.uint32)


def descriptor(start, pitch, leading=0, stride=None):
    """Return the descriptor of a matrix that begins at a byte of shared memory."""
    stride = 8 * pitch if stride is None else stride
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLE[pitch] << 62


def run(body, words, result, threads=128, wrap=lambda machine: None):
    """Run a body with the words in shared memory, written by all threads, behind a barrier."""
    copies = "".join(
        f"ld.global.b32 %r2, [%q0+{4 * i}]; st.shared.b32 [%r1+{4 * i}], %r2;"
        for i in range(len(words) // threads)
    )
    each = 4 * (len(words) // threads)
    start = f"""
    ld.param.b64 %q1, [p0]; mad.wide.u32 %q0, %t, {each}, %q1;
    mov.u32 %r0, memory; mad.lo.s32 %r1, %t, {each}, %r0; {copies}
    """
    stores = "".join(f"st.global.f32 [%q0+{4 * i}], %f{i};" for i in range(result.shape[1]))
    end = f"ld.param.b64 %q1, [p1]; mad.wide.u32 %q0, %t, {4 * result.shape[1]}, %q1; {stores}"
    text = kernel(start + body + end, 2, ".reg .f32 %f<129>;")
    return launch(text, [words, result], (1,), threads, 4 * len(words), wrap=wrap)


def accumulators(n):
    return "{" + ", ".join(f"%f{i}" for i in range(n)) + "}"


def zeros(n):
    return "".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(n))


def gathered(result, width):
    """Return the matrix [64, width] that the registers of 128 threads hold."""
    matrix = np.zeros((64, width), np.float32)
    for thread in range(128):
        for i in range(width // 2):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
            matrix[row, 8 * (i // 4) + 2 * (thread % 4) + i % 2] = result[thread, i]
    return matrix


def problem(dtype, pitch, width):
    """Return operands of one step, as deep as a row is long, and their product."""
    depth = 16 if dtype != torch.float32 else 8
    per_row = pitch // dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, per_row, generator=generator).to(dtype) for n in (64, width))
    exact = [(x.view(torch.int32) & -0x2000).view(x.dtype) if depth == 8 else x for x in (a, b)]
    product = exact[0][:, :depth].double() @ exact[1][:, :depth].double().T
    return a, b, product.numpy()


FORMS = {
    torch.bfloat16: "k16.f32.bf16.bf16", torch.float16: "k16.f32.f16.f16",
    torch.float32: "k8.f32.tf32.tf32",
}  # fmt: skip


@pytest.mark.parametrize("dtype", FORMS, ids=str)
@pytest.mark.parametrize("pitch", [32, 64, 128])
def test_products_of_matrices_in_shared_memory(dtype, pitch):
    width = 16
    a, b, expected = problem(dtype, pitch, width)
    words = np.concatenate([laid_out(a, pitch), laid_out(b, pitch), np.zeros(2048, np.uint32)])
    words = words[: len(words) // 128 * 128].copy()
    turned = ", 0, 0" if dtype != torch.float32 else ""
    body = f"""
    {FENCE} {BARRIER} {zeros(8)}
    mov.b64 %q2, {descriptor(0, pitch)}; mov.b64 %q3, {descriptor(64 * pitch, pitch)};
    wgmma.fence.sync.aligned;
    {MMA}.m64n16{FORMS[dtype]} {accumulators(8)}, %q2, %q3, 0{SIGNS}{turned};
    {MMA}.m64n16{FORMS[dtype]} {accumulators(8)}, %q2, %q3, 1{SIGNS}{turned};
    {END}
    """
    result = np.zeros((128, 8), np.float32)
    launched = run(body, words, result)
    assert not launched.problems
    np.testing.assert_allclose(gathered(result, width), 2 * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FORMS, ids=str)
def test_the_left_matrix_may_be_in_registers(dtype):
    pitch, width = 32, 16
    a, b, expected = problem(dtype, pitch, width)
    per = 4 // dtype.itemsize
    registers = np.zeros((128, 4), np.uint32)
    for thread in range(128):
        row = 16 * (thread // 32) + thread % 32 // 4
        for i in range(4):
            column = per * (thread % 4) + 4 * per * (i // 2)
            registers[thread, i] = bits_of(a[row + 8 * (i % 2), column : column + per])
    space = np.zeros(1024 - 16 * pitch // 4, np.uint32)
    words = np.concatenate([laid_out(b, pitch), space, registers.ravel()])
    turned = ", 0" if dtype != torch.float32 else ""
    body = f"""
    {FENCE} {BARRIER}
    mad.lo.s32 %r3, %t, 16, 4096; ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
    mov.b64 %q3, {descriptor(0, pitch)};
    wgmma.fence.sync.aligned;
    {MMA}.m64n16{FORMS[dtype]} {accumulators(8)}, {LEFT}, %q3, 0{SIGNS}{turned};
    {END}
    """
    result = np.zeros((128, 8), np.float32)
    assert not run(body, words, result).problems
    np.testing.assert_allclose(gathered(result, width), expected, rtol=1e-5, atol=1e-5)


def test_the_right_matrix_may_be_transposed():
    """Its rows are then along the depth: 16 of them, of 64 numbers."""
    a, _, _ = problem(torch.bfloat16, 32, 16)
    b = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    words = np.concatenate([laid_out(a, 32), laid_out(b, 128), np.zeros(1024, np.uint32)])
    body = f"""
    {FENCE} {BARRIER}
    mov.b64 %q2, {descriptor(0, 32)}; mov.b64 %q3, {descriptor(2048, 128, 0, 1024)};
    wgmma.fence.sync.aligned;
    {MMA}.m64n64k16.f32.bf16.bf16 {accumulators(32)}, %q2, %q3, 0{SIGNS}, 0, 1;
    {END}
    """
    result = np.zeros((128, 32), np.float32)
    assert not run(body, words, result).problems
    expected = (a.double() @ b.double()).numpy()
    np.testing.assert_allclose(gathered(result, 64), expected, rtol=1e-5, atol=1e-5)


ORDERS = {
    "fence, barrier": (FENCE + BARRIER, None),
    "barrier, fence": (BARRIER + FENCE, None),
    "barrier alone": (BARRIER, "a product reads what was written without fence.proxy.async"),
    "fence alone": (FENCE, "a product reads what another warp wrote, without a barrier"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_product_reads_is_ordered_by_a_fence_and_a_barrier(order):
    between, fault = ORDERS[order]
    words = np.zeros(4096, np.uint32)
    body = f"""
    {between} mov.b64 %q2, {descriptor(0, 32)}; mov.b64 %q3, {descriptor(2048, 32)};
    {MMA}.m64n16k16.f32.bf16.bf16 {accumulators(8)}, %q2, %q3, 0{SIGNS}, 0, 0;
    {END}
    """
    # two warp groups, so that some of what each reads was written by the other
    launched = run(body, words, np.zeros((256, 8), np.float32), threads=256)
    assert kinds(launched) == ({fault} if fault else set())


@pytest.mark.parametrize("fence", [FENCE, ""])
def test_what_copies_wrote_needs_a_fence_too(fence):
    words, result = np.zeros(4096, np.uint32), np.zeros((128, 8), np.float32)
    body = f"""
    cp.async.ca.shared.global [%r0+0], [%q1+0], 0x4; cp.async.wait_all; {BARRIER} {fence}
    mov.b64 %q2, {descriptor(0, 32)}; mov.b64 %q3, {descriptor(2048, 32)};
    {MMA}.m64n16k16.f32.bf16.bf16 {accumulators(8)}, %q2, %q3, 0{SIGNS}, 0, 0;
    {END}
    """
    start = f"setp.eq.b32 %p0, %t, 0; {FENCE} {BARRIER} "
    body = start + body.replace("cp.async.ca", "@%p0 cp.async.ca")
    fault = set() if fence else {"a product reads what was written without fence.proxy.async"}
    assert kinds(run(body, words, result)) == fault

    def exempt(machine):  # as code of an older Triton needs it
        machine.copies_need_fence = False

    assert not run(body, words, result, wrap=exempt).problems


IN_FLIGHT = {
    "st.shared.b32 [%r0], 0;": "shared memory is written that a product in flight reads",
    "add.f32 %f3, %f3, %f3;": "a register of a product in flight is touched",
    "mov.b32 %r5, 1;": None,
    "ld.shared.b32 %r5, [%r0];": None,
}


@pytest.mark.parametrize("statement", IN_FLIGHT)
def test_a_product_in_flight_keeps_its_operands(statement):
    words = np.zeros(4096, np.uint32)
    product = f"""
    {FENCE} {BARRIER} {zeros(8)}
    mov.b64 %q2, {descriptor(0, 32)}; mov.b64 %q3, {descriptor(2048, 32)};
    {MMA}.m64n16k16.f32.bf16.bf16 {accumulators(8)}, %q2, %q3, 0{SIGNS}, 0, 0;
    """
    result = np.zeros((128, 8), np.float32)
    clean = run(
        product + END + "setp.eq.b32 %p0, %t, 0; bar.sync 0; @%p0 " + statement, words, result
    )
    assert not clean.problems
    begun = (
        "wgmma.commit_group.sync.aligned; @%p0 " + statement + "wgmma.wait_group.sync.aligned 0;"
    )
    launched = run("setp.eq.b32 %p0, %t, 0;" + product + begun, words, result)
    fault = IN_FLIGHT[statement]
    assert kinds(launched) == ({fault} if fault else set())


def test_a_product_that_is_not_waited_for():
    words, result = np.zeros(4096, np.uint32), np.zeros((128, 8), np.float32)
    body = f"""
    {FENCE} {BARRIER} mov.b64 %q2, {descriptor(0, 32)}; mov.b64 %q3, {descriptor(2048, 32)};
    {MMA}.m64n16k16.f32.bf16.bf16 {accumulators(8)}, %q2, %q3, 0{SIGNS}, 0, 0;
    wgmma.commit_group.sync.aligned; {{}}
    """
    launched = run(body.replace("{}", ""), words, result)
    assert "wgmma is never waited for" in kinds(launched)
    assert not run(body.replace("{}", "wgmma.wait_group.sync.aligned 0;"), words, result).problems
    late = run(body.replace("{}", "wgmma.wait_group.sync.aligned 1;"), words, result)
    assert "a register of a product in flight is touched" in kinds(late)
