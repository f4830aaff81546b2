"""Matrices of a warp: how they go through shared memory, and their products."""

import numpy as np
import pytest
import torch

from .snippets import bits_of, run


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
