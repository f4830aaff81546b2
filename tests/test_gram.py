"""Particulars of correlations: directions of nothing, uniform rows, saturated logits."""

import pytest
import torch
from cases import named, of
from exactness import assert_same, by_formula, exact, results
from inputs import DEVICE, normal

import fastkd

KERNEL, PKT, SIMILARITIES, DIST = named(
    "correlation_congruence-form=kernel", "pkt", "similarity_preserving", "dist_kd"
)
pytestmark = pytest.mark.parametrize(
    "engine", ["portable", "portable in chunks"], indirect=True
)  # there are no kernels


def test_pkt_is_exact_near_the_teacher(engine):
    """There the terms of the sum cancel, and the definition in float32 has not one digit right."""
    student = normal(64, 32).float()
    teacher = student + 1e-3 * normal(64, 32, seed=1).float()
    inputs = [student.requires_grad_(), teacher]
    for x, true in zip(results(PKT, inputs), results(PKT, exact(inputs)), strict=True):
        assert (x.double() - true).norm() <= 1e-3 * true.norm()


def test_options_given_as_tensors(engine):
    for case, options in (
        (KERNEL, dict(gamma=0.7)),
        (DIST, dict(beta=0.5, gamma=2.0, temperature=3.0)),
    ):
        inputs = case.inputs((9,), 5)
        tensors = {name: torch.tensor(value, device=DEVICE) for name, value in options.items()}
        found = results(lambda *x, c=case, o=tensors: c(*x, **o), inputs)
        expected = results(lambda *x, c=case, o=options: c(*x, **o), inputs)
        assert_same(found, expected, tolerance=1e-6)


@pytest.mark.parametrize("case", [SIMILARITIES, PKT, KERNEL], ids=str)
@pytest.mark.parametrize("whose", [(0, 1), (1,), (0,)], ids=["both", "teacher", "student"])
def test_examples_without_features(case, whose, engine):
    """The published loss, and a gradient from the directions of the others alone."""
    inputs = [x.detach() for x in case.inputs((17,), 3)]
    for i in whose:
        inputs[i][[2, 5]] = 0
    inputs[0].requires_grad_()
    loss, gradient = results(case, inputs)
    assert_same([loss], [case.truth(*inputs).detach()])
    assert_same([gradient], by_formula(case, inputs)[1:])
    assert gradient.abs().max() < 10
    if 0 in whose and case is not SIMILARITIES:
        assert not gradient[[2, 5]].any()


def test_a_uniform_row_correlates_with_nothing(engine):
    student, teacher = DIST.inputs((9,), 8)
    with torch.no_grad():
        student[3] = 1.5
    assert_same(results(DIST, [student, teacher]), results(DIST.truth, [student, teacher]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_teacher_that_does_not_vary_and_saturated_or_masked_logits(dtype, engine):
    student, teacher = DIST.inputs((50,), 7, dtype)
    # views of one image: nothing between examples is to be learned
    views = [student, teacher[:1].expand(50, 7)]
    assert_same(results(DIST, views), results(DIST.truth, exact(views)), tolerance=1e-5)
    saturated = [1000 * x.detach() for x in (student, teacher)]
    for x in saturated:
        x[:, 3] = -torch.inf
    loss, gradient = results(DIST, [saturated[0].requires_grad_(), saturated[1]])
    assert_same([loss], [DIST.truth(*saturated).detach()], tolerance=1e-6)
    assert gradient.isfinite().all()


def test_without_kernels_the_portable_engine_is_the_best(engine):
    for name in ("triton", "auto"):
        with fastkd.backend(name):
            for case in of("gram"):
                node = case(*case.inputs((3,), 5)).grad_fn
                assert isinstance(node, torch.autograd.function.BackwardCFunction)
