"""Every loss on the GPU against float64, the same in every run, at any size."""

import pytest
import torch
from cases import CASES, LOSSES, named
from exactness import assert_exact, assert_same, results
from inputs import DEVICE

import fastkd

pytestmark = pytest.mark.gpu
# of rows: many in a program, one, several programs for a row, and a row after the other
SHAPES = {"rows": [((33,), 10), ((5,), 1000), ((3,), 20011), ((150,), 8999)]}
SHAPES["ensembles"] = SHAPES["corrected"] = SHAPES["peers"] = SHAPES["rows"]
SHAPES["relations"] = [((33,), 17), ((130,), 64), ((512,), 100)]
# by tiles, the widest ones, and by chunks in half precision; float32 goes by chunks
SHAPES["pairs"] = [((67,), 33), ((150,), 256), ((300,), 512)]
# positions in one block and in several; one tile of tokens, and heads of several widths
SHAPES["moments"] = [((7,), 5), ((33,), 140)]
SHAPES["tokens"] = [((3,), 16), ((2,), 60)]
SHAPES["linear"] = [((33,), 16), ((1500,), 64)]  # a chunk, and several
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
KERNELS = [case for case in LOSSES if case.has_kernels]


def problems(cases):
    return [
        pytest.param(case, shape, id=f"{case}-{shape}")
        for case in cases
        for shape in SHAPES[case.problem]
    ]


@pytest.mark.parametrize("case, shape", problems(KERNELS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_the_formula(case, shape, dtype):
    inputs = case.inputs(*shape, dtype)
    times, options = 2, {}
    if case.problem == "pairs":
        times = 4  # because cuBLAS sums products in its order
        # the gradients of a mean over many examples are too small for float16
        options["reduction"] = "sum"
    if case.name == "similarity_kl":
        # pairs of an example with itself outweigh all others, and both networks agree on them
        options["mask_self"] = True
    assert_exact(case, inputs, times, rounds_halves=True, **options)
    if case.problem == "relations":
        assert_exact(case, inputs, times=1, precision="high")


@pytest.mark.parametrize("case", [case for case in CASES if case.has_kernels], ids=str)
def test_every_option(case):
    shape = ((5,), 1000) if case.problem in ("rows", "ensembles") else ((67,), 33)
    assert_exact(case, case.inputs(*shape, torch.float32), rounds_halves=True)


@pytest.mark.parametrize("case, shape", problems(KERNELS))
def test_three_runs_agree_bit_for_bit(case, shape):
    inputs = case.inputs(*shape, torch.bfloat16)
    first, *others = (results(case, inputs) for _ in range(3))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("case", named("pkt", "info_nce", "rkd", "dino"), ids=str)
def test_under_torch_compile(case):
    inputs = case.inputs((5,), 100, torch.float32)

    def between_layers(student, *others):
        return case(student.sin(), *others)

    torch.compiler.reset()
    compiled = torch.compile(between_layers, fullgraph=True)
    assert_same(results(compiled, inputs), results(between_layers, inputs), tolerance=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("shape", [(17000, 128256), (263000, 8192)], ids=str)
def test_more_elements_than_32_bits_can_count(name, shape):
    needed = 4 * 2 * shape[0] * shape[1]  # two networks, a gradient, and room for one more
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    generator = torch.Generator(DEVICE).manual_seed(0)
    student, teacher = (
        torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(0, 3, generator=generator)
        for _ in range(2)
    )

    def step(student, teacher):
        losses = getattr(fastkd, name)(student.requires_grad_(), teacher, reduction="none")
        return losses, *torch.autograd.grad(losses.sum(), student)

    last = slice(-1000, None)  # computed alone, none of their offsets is large
    alone = step(student.detach()[last].clone(), teacher[last].clone())
    for whole, part in zip(step(student, teacher), alone, strict=True):
        assert torch.equal(whole[last], part)
