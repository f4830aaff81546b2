"""Particulars of levels of logits: both shapes of Gram matrices, panels, ends of a training."""

import math

import pytest
import torch
from exactness import assert_same, exact, results
from force import in_chunks_of
from inputs import DEVICE, logits
from meter import PeakMemory

import fastkd
from fastkd.portable import levels as portable_levels
from fastkd.problems.levels import Levels

SHAPES = [(40, 9), (9, 40), (16, 16)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def portable():
    with fastkd.backend("portable"):
        yield


def in_formula(inputs, **options):
    with fastkd.backend("formula"):
        return results(lambda *x: fastkd.mlkd(*x, **options), inputs)


def test_panels_of_columns_keep_the_digits_of_large_logits(monkeypatch):
    in_chunks_of(1, monkeypatch)
    student, teacher = (x.detach().float() + 1000 for x in logits((3,), 33))
    inputs, options = [student.requires_grad_(), teacher], dict(temperatures=(1.0, 4.0))
    found = results(lambda *xs: fastkd.mlkd(*xs, **options), inputs)
    assert_same(found, in_formula(exact(inputs), **options), 2e-6)


@each_shape
@pytest.mark.parametrize("most", [1, 50, 150, 100_000])
def test_panels_of_any_width(shape, most, monkeypatch):
    """A panel of one column or row, several with a rest, and one of all."""
    in_chunks_of(most, monkeypatch)
    inputs = logits(shape[:1], shape[1])
    assert_same(results(fastkd.mlkd, inputs), in_formula(inputs))


@each_shape
@pytest.mark.parametrize("level", ["instance_weight", "batch_weight", "class_weight"])
def test_each_level_alone(shape, level):
    inputs = logits(shape[:1], shape[1])
    weights = dict.fromkeys(("instance_weight", "batch_weight", "class_weight"), 0.0)
    options = {**weights, level: 2.0, "temperatures": (1.5,)}
    found = results(lambda *x: fastkd.mlkd(*x, **options), inputs)
    assert_same(found, in_formula(inputs, **options))
    assert found[0] > 0


@each_shape
@pytest.mark.parametrize("most", [100, 100_000])
def test_a_student_near_its_teacher_has_the_digits_of_the_difference(shape, most, monkeypatch):
    """Gram matrices that were subtracted would leave 1e-7 of their own size."""
    in_chunks_of(most, monkeypatch)
    difference, teacher = logits(shape[:1], shape[1], torch.float32)
    student = (teacher + 1e-3 * difference.detach()).requires_grad_()
    options = dict(instance_weight=0.0, temperatures=(1.0, 2.0))
    found = results(lambda *x: fastkd.mlkd(*x, **options), [student, teacher])
    truth = in_formula(exact([student, teacher]), **options)
    for x, true in zip(found, truth, strict=True):
        assert (x.double() - true).norm() <= 2e-3 * true.norm()
    same = [teacher.clone().requires_grad_(), teacher]
    assert not any(x.any() for x in results(lambda *x: fastkd.mlkd(*x, **options), same))


@each_shape
def test_logits_of_2000_are_finite(shape):
    student, teacher = (2000 * x.detach().sign() for x in logits(shape[:1], shape[1]))
    inputs = [student.float().requires_grad_(), teacher.float()]
    found = results(fastkd.mlkd, inputs)
    assert all(x.isfinite().all() for x in found)
    assert_same(found, in_formula(exact(inputs)), 1e-5)


@pytest.mark.parametrize("most", [100, 100_000])
@each_shape
def test_a_masked_vocabulary(shape, most, monkeypatch):
    """Classes that both leave out count for nothing; those of the student alone, in the KL."""
    in_chunks_of(most, monkeypatch)
    student, teacher = logits(shape[:1], shape[1])
    mask = torch.zeros(shape[1], dtype=torch.bool, device=DEVICE)
    mask[[0, 3]] = True
    student = student.detach().masked_fill(mask, -math.inf).requires_grad_()
    both = [student, teacher.masked_fill(mask, -math.inf)]
    low = [x.detach().clamp(min=-5000).requires_grad_(x.requires_grad) for x in both]
    assert_same(results(fastkd.mlkd, both), in_formula(low))
    loss, gradient = results(fastkd.mlkd, [student, teacher])
    assert loss.isposinf() and gradient.isfinite().all()
    with torch.no_grad():
        student[1, 1] = math.nan
    assert fastkd.mlkd(*both).isnan()


def test_temperatures_and_weights_may_be_tensors():
    inputs = logits((7,), 5)
    numbers = dict(temperatures=[2.0, 5.0], batch_weight=0.5)
    tensors = dict(
        temperatures=[2.0, torch.tensor(5.0, device=DEVICE)],
        batch_weight=torch.tensor(0.5, device=DEVICE),
    )
    found, expected = (
        results(lambda *x, o=options: fastkd.mlkd(*x, **o), inputs)
        for options in (tensors, numbers)
    )
    assert_same(found, expected)


def test_more_dimensions_are_one_batch():
    student, teacher = logits((3, 4), 5)
    flat = [x.detach().flatten(0, 1).requires_grad_(x.requires_grad) for x in (student, teacher)]
    loss, gradient = results(fastkd.mlkd, [student, teacher])
    assert_same([loss, gradient.flatten(0, 1)], results(fastkd.mlkd, flat))


@pytest.mark.parametrize("shape", [(64, 4000), (4000, 64)], ids=str)
def test_memory_is_the_gradient_and_panels(shape, monkeypatch):
    """No tensor has the size of the larger Gram matrix; temperatures share all memory."""
    most = 1 << 14
    in_chunks_of(most, monkeypatch)
    student, teacher = logits(shape[:1], shape[1], torch.float32)
    with PeakMemory() as memory:
        fastkd.mlkd(student, teacher).backward()
    gradient = student.numel() * 4
    # the gradient once more, times the upstream one; ten Gram matrices, two panels and chunks
    most_bytes = 2 * gradient + 4 * (10 * 64**2 + 3 * most + 4 * sum(shape))
    assert gradient < memory.peak_bytes <= most_bytes


def test_errors_are_sentences():
    student, teacher = logits((4,), 7)
    for wrong, says in (
        ((), "need at least one temperature"),
        (4.0, r"list or tuple of numbers, got 4.0.*pass \(T,\)"),
        (torch.ones(3), r"\.tolist\(\)"),
        ((2.0, 0.0), r"temperatures\[1\] must be a finite number above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=says):
            fastkd.mlkd(student, teacher, temperatures=wrong)
    with pytest.raises(ValueError, match="class_weight must be a finite number of at least 0"):
        fastkd.mlkd(student, teacher, class_weight=-1.0)
    with pytest.raises(ValueError, match="need one shape"):
        fastkd.mlkd(student, teacher[:, :6])


@each_shape
@pytest.mark.parametrize("most", [50, 100_000])
def test_a_part_of_the_batch_has_its_part_of_the_gradient(shape, most, monkeypatch):
    """A rank may have no row at all."""
    in_chunks_of(most, monkeypatch)
    student, teacher = (x.detach() for x in logits(shape[:1], shape[1]))
    temperatures = torch.tensor([1.0, 3.0], dtype=torch.float64, device=DEVICE)

    def solved(rows):
        options = temperatures, 1.0, 0.5, 2.0, rows.start
        problem = Levels(student[rows], student, teacher, *options)
        loss, (gradient,) = portable_levels.value_and_gradients(problem, (True,))
        return [loss, gradient]

    loss, gradient = solved(slice(0, shape[0]))
    for rows in (slice(0, 0), slice(0, 2), slice(2, 7), slice(7, shape[0])):
        assert_same(solved(rows), [loss, gradient[rows]], 1e-11)
