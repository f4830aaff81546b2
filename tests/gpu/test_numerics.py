"""Every loss on the GPU against float64, the same in every run, at any size."""

import pytest
import torch
from exactness import assert_as_exact, assert_same, exact, results
from losses import DEVICE, LOSSES, each_case, each_loss, each_relation

import fastkd

pytestmark = pytest.mark.gpu
# many rows in a program, one, several programs for a row, and a row after the other
SHAPES = [((33,), 10), ((5,), 1000), ((3,), 20011), ((150,), 8999)]
each_shape = pytest.mark.parametrize("examples, n_cols", SHAPES, ids=str)


@each_loss
@each_shape
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_as_exact_as_the_formula(case, examples, n_cols, dtype):
    inputs = case.inputs(examples, n_cols, dtype)
    with fastkd.backend("formula"):
        yardstick = results(case, inputs)
    assert_as_exact(results(case, inputs), yardstick, results(case.eager, exact(inputs)))


@each_case
def test_every_option(case):
    inputs = case.inputs((5,), 1000, torch.float32)
    with fastkd.backend("formula"):
        yardstick = results(case, inputs)
    assert_as_exact(results(case, inputs), yardstick, results(case.eager, exact(inputs)))


@each_loss
@each_shape
def test_three_runs_agree_bit_for_bit(case, examples, n_cols):
    inputs = case.inputs(examples, n_cols, torch.bfloat16)
    first, *others = (results(case, inputs) for _ in range(3))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@each_relation
@pytest.mark.parametrize("n, n_features", [(33, 17), (130, 64), (512, 100)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_relations_are_as_exact_as_the_formula(case, n, n_features, dtype):
    inputs = case.inputs((n,), n_features, dtype)
    with fastkd.backend("formula"):
        yardstick, truth = results(case, inputs), results(case, exact(inputs))
    # the law of cosines rounds about twice as much as the definition's directions
    assert_as_exact(results(case, inputs), yardstick, truth, times=4)
    high = results(lambda *xs: case(*xs, precision="high"), inputs)
    assert_as_exact(high, yardstick, truth)


@each_relation
@pytest.mark.parametrize("n", [33, 512, 2048])
def test_relations_of_three_runs_agree_bit_for_bit(case, n):
    inputs = case.inputs((n,), 64, torch.bfloat16)
    first, *others = (results(case, inputs) for _ in range(3))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("case", [LOSSES[0], LOSSES[2], LOSSES[-1]], ids=str)
def test_under_torch_compile(case):
    inputs = case.inputs((5,), 1000, torch.float32)

    def between_layers(student, teacher, *labels):
        return case(student.sin(), teacher.cos(), *labels)

    torch.compiler.reset()
    compiled = torch.compile(between_layers, fullgraph=True)
    expected = results(between_layers, inputs)
    assert_same(results(compiled, inputs), expected, tolerance=1e-5)


@pytest.mark.parametrize("case", [LOSSES[0], LOSSES[2]], ids=str)
@pytest.mark.parametrize("shape", [(17000, 128256), (263000, 8192)], ids=str)
def test_more_elements_than_32_bits_can_count(case, shape):
    needed = 4 * 2 * shape[0] * shape[1]  # two networks, a gradient, and room for one more
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    generator = torch.Generator(DEVICE).manual_seed(0)
    student, teacher = (
        torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(0, 3, generator=generator)
        for _ in range(2)
    )
    student.requires_grad_()
    losses = case(student, teacher)
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    last = slice(-1000, None)  # computed alone, none of their offsets is large
    alone = student.detach()[last].clone().requires_grad_()
    expected = case(alone, teacher[last].clone())
    (gradient_alone,) = torch.autograd.grad(expected.sum(), alone)
    assert torch.equal(losses[last], expected)
    assert torch.equal(gradient[last], gradient_alone)
