"""Temperatures that are learnt or that each row has, teachers that learn, classes anywhere."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import LOSSES, Case
from choice import quick_if
from exactness import assert_exact, assert_same, by_formula, results
from inputs import DEVICE

import fastkd

ROWS = [
    case
    for case in LOSSES
    if case.problem == "rows" and {"temperature", "dim"} <= {*case.parameters}
]
DIVERGENCES = [case for case in ROWS if "teacher_gradient" in case.parameters]
SIZES = [((5,), 17), ((2, 3), 8200)]
each_loss = pytest.mark.parametrize("case", ROWS, ids=str)
each_divergence = pytest.mark.parametrize("case", DIVERGENCES, ids=str)
# one kernel has all divergences: their values and slopes are those of test_engines.py
OF_ONE_KERNEL = {case.name for case in DIVERGENCES} - {"jensen_shannon"}
quickly = quick_if(lambda case, engine: engine != "triton" or case.name not in OF_ONE_KERNEL)
each_size = pytest.mark.parametrize(("examples", "n_cols"), SIZES)


def numbers(shape, seed=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator, dtype=torch.float64) + 1
    return values.to(DEVICE, dtype).requires_grad_()


def with_last(case: Case, **named) -> Case:
    """Return the case whose options of these names are its last tensors, by the formula."""

    def loss(*inputs, **options):
        n = len(inputs) - len(named)
        return case.loss(*inputs[:n], **dict(zip(named, inputs[n:], strict=True)), **options)

    def formula(*inputs, **options):
        with fastkd.backend("formula"):
            return loss(*inputs, **options, reduction="none")

    loss.__name__ = case.name
    options = {name: x for name, x in case.options.items() if name not in named}
    return Case(loss, case.problem, case.inputs, formula, options, None, True)


@pytest.mark.parametrize(
    "case", [case for case in LOSSES if "temperature" in case.parameters], ids=str
)
@quick_if(lambda case, engine: engine != "triton" or case.problem in ("corrected", "peers"))
def test_a_temperature_in_half_precision_is_squared_in_the_precision_of_the_logits(case, engine):
    inputs, temperature = case.inputs((5,), 17), torch.tensor(1.7, device=DEVICE).bfloat16()
    expected = by_formula(lambda *xs: case(*xs, temperature=temperature.item()), inputs)
    for compute in (results, by_formula):
        assert_same(compute(lambda *xs: case(*xs, temperature=temperature), inputs), expected)


@each_loss
@quickly
def test_temperatures_of_rows_in_float64_widen_all(case, engine):
    """They are inputs as the logits are; one number for all rows takes no part."""
    inputs = case.inputs((5,), 17, torch.float32)
    of_rows, of_all = numbers((5,), dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
    for temperature in (of_rows, of_rows.detach()):
        ours = with_last(case, temperature=temperature)
        found = results(ours, [*inputs, temperature])
        expected = results(ours.truth, [*inputs, temperature])
        assert found[0].dtype == expected[0].dtype == torch.float64
        assert_same(found[:1], expected[:1])
        for x, y in zip(found[1:], expected[1:], strict=True):
            assert_same([x], [y], 1e-12 if x.dtype == torch.float64 else 2e-7)
    for compute in (results, by_formula):
        losses, _ = compute(lambda *xs: case(*xs, temperature=of_all.to(DEVICE)), inputs)
        assert losses.dtype == torch.float32


def test_no_rows_of_networks_that_learn(engine):
    student, teacher = torch.ones(2, 0, 7, device=DEVICE, requires_grad=True).unbind()
    loss = fastkd.reverse_kl(student, teacher, teacher_gradient=True, temperature=numbers((0,)))
    assert all(x.shape == (0, 7) for x in torch.autograd.grad(loss, [student, teacher]))


def test_a_tensor_leaves_excluded_classes_the_gradient_that_a_number_gives():
    student, teacher = LOSSES[0].inputs((3,), 7)
    student.detach()[1, 4] = -math.inf

    def loss(temperature):
        return lambda *xs: fastkd.forward_kl(*xs, temperature=temperature, reduction="none")

    expected = by_formula(loss(2.0), [student, teacher])
    temperature = torch.tensor(2.0, device=DEVICE)
    assert_same(by_formula(loss(temperature), [student, teacher]), expected)
    losses, gradient = expected
    assert losses[1].isposinf() and gradient[1, 4] != 0


@each_size
@each_loss
@quickly
def test_a_learnt_temperature_of_each_row(case, examples, n_cols, engine):
    temperature = numbers(examples)
    inputs = [*case.inputs(examples, n_cols, torch.float32), temperature]
    assert_exact(with_last(case, temperature=temperature), inputs)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1)])
@each_loss
@quick_if(lambda shape, engine: engine != "triton" or shape == (2, 1))
@quickly
def test_a_learnt_temperature_of_several_rows(case, shape, engine):
    """Its gradient is the sum of those of its rows."""
    inputs, shared = case.inputs((2, 3), 17, torch.float32), numbers(shape)
    expanded = shared.detach().expand(2, 3).clone().requires_grad_()
    (found,), (of_rows,) = (
        torch.autograd.grad(case(*inputs, temperature=x).sum(), x) for x in (shared, expanded)
    )
    slack = 1e-6 * float(of_rows.abs().sum())  # because terms of both signs are summed
    torch.testing.assert_close(found, of_rows.sum_to_size(shape), rtol=1e-6, atol=slack)


@each_divergence
@quickly
def test_learnt_temperatures_of_both_networks(case, engine):
    of_both = dict(student_temperature=numbers((6,)), teacher_temperature=numbers((6,), 7))
    inputs = [*case.inputs((6,), 33, torch.float32), *of_both.values()]
    assert_exact(with_last(case, **of_both), inputs)


@each_divergence
@quickly
def test_half_precision_gives_temperatures_their_digits(case, engine):
    """A temperature's gradient is summed before anything is rounded."""
    temperature = numbers((7,))
    inputs = [*case.inputs((7,), 300, torch.bfloat16), temperature]
    assert_exact(with_last(case, temperature=temperature), inputs)


@each_size
@each_divergence
@quickly
def test_a_teacher_that_learns(case, examples, n_cols, engine):
    """The gradients of both networks, and none of the teacher where it is not asked for."""
    both = with_last(case)
    both.options["teacher_gradient"] = True  # type: ignore[index]
    student, teacher = case.inputs(examples, n_cols, torch.float32)
    assert_exact(both, [student, teacher.requires_grad_()])
    losses = case(student, teacher.detach(), teacher_gradient=True)
    assert torch.autograd.grad(losses.sum(), student)


def test_a_row_of_weight_0_may_hold_anything(engine):
    student, teacher = (torch.randn(3, 9, device=DEVICE).requires_grad_() for _ in range(2))
    weights = torch.tensor([1.0, 0.0, 2.0], device=DEVICE)
    temperature = torch.tensor([2.0, math.nan, 3.0], device=DEVICE, requires_grad=True)
    with torch.no_grad():
        student[1], teacher[1] = math.nan, math.inf
    loss = fastkd.forward_kl(
        student, teacher, temperature=temperature, weights=weights, teacher_gradient=True
    )
    loss.backward()
    for x in (student, teacher, temperature):
        assert x.grad.isfinite().all() and not x.grad[1].any()


def test_excluded_classes_give_a_temperature_no_gradient(engine):
    student, teacher = (torch.randn(3, 9, device=DEVICE) for _ in range(2))
    student[:, 2], teacher[:, 2] = -math.inf, -math.inf
    temperature, found = numbers(()), []
    for left in (slice(None), [0, 1, *range(3, 9)]):
        loss = fastkd.forward_kl(student[:, left], teacher[:, left], temperature=temperature)
        found.append(torch.autograd.grad(loss, temperature)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["forward_kl", "soft_cross_entropy", "kd"])
def test_the_gradient_of_a_temperature_is_that_of_logits_of_any_offset(name, engine):
    """Even where the loss is infinite, because the student excludes a class."""
    (case,) = [case for case in LOSSES if case.name == name]
    student, teacher, *labels = case.inputs((3,), 9)
    student.detach()[1, 4] = -math.inf
    found = []
    for offset in (0, 5):
        moved = (student.detach() + offset).requires_grad_()
        temperature = numbers((3,), dtype=torch.float64)
        inputs = [moved, teacher, *(0 * x for x in labels), temperature]
        loss = with_last(case, student_temperature=temperature)
        loss.options["scale_t2"] = False  # because T² times an infinite loss has no gradient
        found += [compute(loss, inputs)[1:] for compute in (results, by_formula)]
    for gradients in found[1:]:
        assert_same(gradients, found[0], 1e-11)


@each_loss
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@quick_if(lambda memory_format, engine: engine != "triton" or memory_format == torch.channels_last)
@quickly
def test_classes_that_are_not_last(case, memory_format, engine):
    """Logits [N, V, H, W] have the losses [N, H, W], and the gradient the strides of the logits."""
    inputs = case.inputs((2, 2, 3), 5, torch.float32)
    as_images = [
        x.detach().movedim(-1, 1).contiguous(memory_format=memory_format).requires_grad_(i == 0)
        if x.is_floating_point()
        else x
        for i, x in enumerate(inputs)
    ]
    expected, found = case(*inputs), case(*as_images, dim=1)
    torch.testing.assert_close(found, expected)
    up = torch.rand_like(found)
    (of_rows,) = torch.autograd.grad(expected, inputs[0], up)
    (of_images,) = torch.autograd.grad(found, as_images[0], up)
    torch.testing.assert_close(of_images.movedim(1, -1), of_rows)
    assert of_images.stride() == as_images[0].stride()


@each_divergence
@quickly
def test_excluded_classes_have_no_part_in_the_deviation(case, engine):
    """Logits of −∞ in both networks change neither loss nor gradient of standardized logits."""
    inputs = case.inputs((4,), 17, torch.float64)
    wide = [F.pad(x.detach(), (2, 3), value=-math.inf) for x in inputs]
    wide[0].requires_grad_()
    found, expected = (case(*x, standardize=True) for x in (wide, inputs))
    torch.testing.assert_close(found, expected)
    (of_wide,), (of_inputs,) = (
        torch.autograd.grad(x.sum(), y[0]) for x, y in ((found, wide), (expected, inputs))
    )
    torch.testing.assert_close(of_wide, F.pad(of_inputs, (2, 3)))


@each_divergence
@quickly
def test_equal_logits_have_no_deviation(case, engine):
    """A row of equal logits is standardized to zeros, and gets a finite gradient."""
    student, teacher = case.inputs((2,), 5, torch.float32)
    with torch.no_grad():
        student[0] = 3.0
    with fastkd.backend("formula"):
        (expected,) = torch.autograd.grad(case(student, teacher, standardize=True).sum(), student)
    (found,) = torch.autograd.grad(case(student, teacher, standardize=True).sum(), student)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.isfinite().all()


@each_divergence
@quickly
def test_a_learnt_temperature_of_classes_that_are_not_last(case, engine):
    """The gradients of logits [N, V, H, W] are those of the same rows with their classes last."""
    student, teacher = (x.detach() for x in case.inputs((2, 3, 4), 5, torch.float32))
    found = []
    for dim in (-1, 1):
        inputs = [x.movedim(-1, dim).contiguous().requires_grad_() for x in (student, teacher)]
        inputs.append(numbers((2, 3, 4)))
        losses = case(*inputs[:2], temperature=inputs[2], teacher_gradient=True, dim=dim)
        *of_logits, of_temperature = torch.autograd.grad(losses.sum(), inputs)
        found.append([*(x.movedim(dim, -1) for x in of_logits), of_temperature])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_divergence
@quickly
def test_the_square_of_a_temperature_in_half_precision_is_not_rounded(case, dtype, engine):
    temperature = torch.tensor(1 + 2**-7, dtype=dtype, device=DEVICE)
    inputs = case.inputs((3,), 9, torch.float32)
    expected = case(*inputs, temperature=temperature.item())
    torch.testing.assert_close(case(*inputs, temperature=temperature), expected, rtol=1e-5, atol=0)


@each_divergence
def test_excluded_classes_give_a_temperature_of_standardized_logits_no_gradient(case, engine):
    inputs = [x.detach() for x in case.inputs((3,), 9, torch.float32)]
    wide, temperature = [F.pad(x, (0, 2), value=-math.inf) for x in inputs], numbers(())
    found = [
        torch.autograd.grad(case(*x, temperature=temperature, standardize=True).sum(), temperature)
        for x in (wide, inputs)
    ]
    torch.testing.assert_close(*found)


def test_ignored_rows_of_probabilities_give_a_temperature_no_gradient(engine):
    student, labels = torch.randn(3, 9, device=DEVICE), torch.tensor([0, -100, 2], device=DEVICE)
    teacher = torch.randn(3, 9, device=DEVICE).softmax(-1)
    temperature, found = numbers(()), []
    for rows in (slice(None), [0, 2]):
        loss = fastkd.forward_kl(
            student[rows], teacher[rows], labels=labels[rows], temperature=temperature,
            teacher_form="probabilities", standardize=True,
        )  # fmt: skip
        found.append(torch.autograd.grad(loss, temperature)[0])
    torch.testing.assert_close(*found)


@each_divergence
@quickly
def test_a_standardized_row_of_weight_0_may_hold_anything(case, engine):
    student, teacher = (torch.randn(3, 9, device=DEVICE) for _ in range(2))
    student[1], teacher[1] = math.nan, math.inf
    weights = torch.tensor([True, False, True], device=DEVICE)
    losses = case(student.requires_grad_(), teacher, weights=weights, standardize=True)
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert losses.isfinite().all() and gradient.isfinite().all() and not gradient[1].any()
