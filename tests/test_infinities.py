"""Masked vocabularies (logits of −∞), NaN and perfect students in the logits family."""

import math

import pytest
import torch
from exactness import assert_same, results
from losses import CASES, DEVICE, LOSSES, each_case, normal

import fastkd
from fastkd.portable import _small_divergence

smoke = pytest.mark.smoke
MASKED = [0, 3, 16]  # these classes, in every row but the first
SOFTMAXED = [case for case in CASES if case.loss is not fastkd.logit_mse]
each_softmaxed = pytest.mark.parametrize("case", SOFTMAXED, ids=str)


def masked_inputs(case, whose, dtype):
    student, teacher, *labels = case.inputs((3,), 17, dtype)
    mask = torch.zeros(3, 17, dtype=torch.bool, device=DEVICE)
    mask[1:, MASKED] = True
    if "student" in whose:
        student = student.detach().masked_fill(mask, -math.inf).requires_grad_()
    if "teacher" in whose:
        teacher = teacher.masked_fill(mask, -math.inf)
    return [student, teacher, *(1 + 0 * label for label in labels)]  # a class that is allowed


def very_low(logits):
    """exp(−600) is a number in float64, and nothing beside 1."""
    return logits.detach().double().clamp(min=-600).requires_grad_(logits.requires_grad)


@each_case
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float64, marks=smoke), torch.float32, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("whose", ["student and teacher", "student", "teacher"])
def test_masked_vocabulary(case, whose, dtype, engine):
    """Losses are those of the definition, gradients the limit of those of very low logits."""
    if case.loss is fastkd.logit_mse and whose != "student and teacher":
        pytest.skip("an infinite distance")
    temperature = dict(temperature=1.0)
    student, teacher, *labels = inputs = masked_inputs(case, whose, dtype)
    expected = case.by_hand(*inputs, **temperature)
    limit = [very_low(student), very_low(teacher), *labels]
    _, truth = results(lambda *xs: case.eager(*xs, **temperature), limit)
    losses, gradient = results(lambda *xs: case(*xs, **temperature), inputs)
    accuracy = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert_same([losses], [expected], tolerance=min(accuracy, 1e-5))
    if whose == "teacher":  # an infinite reverse divergence has no gradient
        gradient, truth = gradient[expected.isfinite()], truth[expected.isfinite()]
    assert_same([gradient], [truth], tolerance=accuracy)


@smoke
@each_case
@pytest.mark.parametrize("whose", ["student and teacher", "student"])
def test_masked_vocabulary_in_a_mean(case, whose, engine):
    """The mean of the rows, also where that is infinite, and its gradient."""
    inputs = masked_inputs(case, whose, torch.float64)
    student = inputs[0]
    rows, mean = case(*inputs), case(*inputs, reduction="mean")
    assert_same([mean], [rows.mean()])
    if mean.isfinite():
        found, expected = (torch.autograd.grad(x, student)[0] for x in (mean, rows.mean()))
        assert_same([found], [expected])


@each_softmaxed
def test_infinities_are_where_the_definition_has_them(case, engine):
    """In words, for reading: who excludes what the other allows."""
    options = case.options
    divergence = options.get("divergence", case.loss.__name__)
    mixture = options.get("beta", options.get("skew", options.get("weight", 0.5)))
    infinite_for_student = {
        "forward_kl": True,
        "soft_cross_entropy": True,
        "jensen_shannon": mixture == 0,
        "skew_kl": mixture == 0,
        "symmetric_kl": mixture > 0,
    }
    infinite_for_teacher = {
        "reverse_kl": True,
        "jensen_shannon": mixture == 1,
        "skew_reverse_kl": mixture == 0,
        "symmetric_kl": mixture < 1,
    }
    for whose, infinite in (("student", infinite_for_student), ("teacher", infinite_for_teacher)):
        losses = case(*masked_inputs(case, whose, torch.float32))
        assert losses[0].isfinite()
        assert (losses[1:].isposinf() if infinite.get(divergence) else losses[1:].isfinite()).all()


@pytest.mark.parametrize("case", [case for case in SOFTMAXED if case in LOSSES], ids=str)
@pytest.mark.parametrize(
    "n_cols, bad",
    [
        pytest.param(17, math.nan, marks=smoke),
        (17, math.inf),
        pytest.param(17, "a row of -inf", marks=smoke),
        (9000, math.nan),
    ],
)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_row_without_a_softmax_gives_nan_and_spoils_no_other(
    case, n_cols, bad, whose, engine, monkeypatch
):
    inputs = case.inputs((3,), n_cols, torch.float32)
    with monkeypatch.context() as patch:  # the short way for few logits leaves NaNs to the other
        patch.setattr(_small_divergence, "_MOST_ELEMENTS", 0)
        expected = results(case, inputs)
    i = ["student", "teacher"].index(whose)
    spoilt = inputs[i].detach().clone()
    if isinstance(bad, str):
        spoilt[1] = -math.inf
    else:
        spoilt[1, n_cols // 2] = bad
    inputs[i] = spoilt.requires_grad_(i == 0)
    losses, gradient = results(case, inputs)
    assert losses[1].isnan()
    # torch's derivatives of |NaN| and of a clamped NaN are 0
    total_variation = "total_variation" in str(case)
    if whose == "student" or not (engine == "formula" or total_variation):
        assert gradient[1].isnan().all()
    others = [0, 2]
    assert_same([losses[others], gradient[others]], [x[others] for x in expected])


def test_logit_mse_spreads_nan_no_further_than_its_row():
    student, teacher = normal(2, 4, 17)
    student[2, 5] = math.nan
    losses = fastkd.logit_mse(student, teacher, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False]


@each_softmaxed
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_perfect_student_has_no_loss_and_no_gradient(case, dtype, engine):
    student, _, *labels = case.inputs((5,), 37, dtype)
    if labels or case.loss is fastkd.soft_cross_entropy:
        pytest.skip("this loss does not vanish")
    losses, gradient = results(case, [student, student.detach().clone()])
    rounding = 1e-14 if dtype == torch.float64 else 4e-6
    assert losses.abs().max() <= rounding and gradient.abs().max() <= rounding


@pytest.mark.smoke
@pytest.mark.parametrize("case", [LOSSES[0], LOSSES[2], LOSSES[-1]], ids=str)
@pytest.mark.parametrize("n_cols", [17, 9000])
def test_a_row_left_out_has_no_gradient_even_of_an_infinite_upstream(case, n_cols, engine):
    student, teacher, *labels = case.inputs((3,), n_cols)
    losses = case(student, teacher, *labels, weights=torch.tensor([1.0, 0.0, 2.0], device=DEVICE))
    upstream = torch.tensor([1.0, math.nan, math.inf], dtype=losses.dtype, device=DEVICE)
    (gradient,) = torch.autograd.grad(losses, student, upstream)
    assert (gradient[1] == 0).all()
    assert gradient[0].isfinite().all() and not gradient[2].isfinite().all()
