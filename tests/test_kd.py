"""Labels beside a divergence, and the options of divergences: weights, forms, temperatures."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from choice import quick_if
from exactness import assert_same, results
from inputs import DEVICE, logits, logits_and_labels, normal
from row_cases import DIVERGENCES, FEW

import fastkd

IGNORED = -100


@pytest.fixture
def inputs():
    student, teacher, labels = logits_and_labels((6,), 11)
    labels[[1, 4]] = IGNORED
    return student, teacher, labels


def gradient(loss, student):
    return torch.autograd.grad(loss, student, retain_graph=True)[0]


def softened(student, teacher, temperature=4.0):
    """Return the rows of the forward KL that everybody writes."""
    log_q, p = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
    return temperature**2 * F.kl_div(log_q, p, reduction="none").sum(-1)


def assert_loss(student, found, expected):
    assert_same(
        [found, gradient(found.sum(), student)], [expected, gradient(expected.sum(), student)]
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
def test_kd_is_cross_entropy_and_kl_div(alpha, shape, inputs, engine):
    student, teacher, labels = inputs
    kl = softened(student, teacher)[labels != IGNORED].mean()
    expected = alpha * F.cross_entropy(student, labels) + (1 - alpha) * kl
    shaped = student.view(*shape, 11), teacher.view(*shape, 11), labels.view(shape)
    assert_loss(student, fastkd.kd(*shaped, alpha=alpha), expected)


@pytest.mark.parametrize("distill_ignored", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", 50])
@quick_if(
    lambda distill_ignored, reduction, engine: (
        engine != "triton" or (distill_ignored, reduction) == (False, "mean")
    )
)
def test_weights_and_normalizers_count_in_both_terms(distill_ignored, reduction, inputs, engine):
    student, teacher, labels = inputs
    labelled = labels != IGNORED
    for weights in (None, [1.0, 2.0, 0.0, 0.5, 0.0, 3.0]):
        options = dict(
            weights=weights and torch.tensor(weights, dtype=torch.float64, device=DEVICE)
        )
        w = (
            torch.ones(6, dtype=torch.float64, device=DEVICE)
            if weights is None
            else options["weights"]
        )
        ce = F.cross_entropy(student, labels, reduction="none") * w
        kl = softened(student, teacher) * (w if distill_ignored else w * labelled)
        if reduction == "mean":
            ce = ce.sum() / (w * labelled).sum()
            kl = kl.sum() / (w if distill_ignored else w * labelled).sum()
        elif reduction == "sum":
            ce, kl = ce.sum(), kl.sum()
        elif reduction == 50:  # tokens of all accumulated batches, counted beforehand
            ce, kl = ce.sum() / 50, kl.sum() / 50
        known = dict(normalizer=50) if reduction == 50 else dict(reduction=reduction)
        found = fastkd.kd(*inputs, alpha=0.3, distill_ignored=distill_ignored, **options, **known)
        assert_loss(student, found, 0.3 * ce + 0.7 * kl)


def test_parts_have_graphs_of_their_own(inputs, engine):
    student, teacher, labels = inputs
    loss, *parts = fastkd.kd(*inputs, alpha=0.3, return_parts=True)
    expected = [F.cross_entropy(student, labels), softened(student, teacher)[labels >= 0].mean()]
    assert_loss(student, loss, 0.3 * expected[0] + 0.7 * expected[1])
    for part, true in zip(parts, expected, strict=True):
        assert_loss(student, part, true)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@quick_if(lambda divergence, engine: engine != "triton" or divergence in FEW)
def test_the_divergence_is_that_of_its_function(divergence, inputs, engine):
    student, teacher, labels = inputs
    options = dict(temperature=3.0, scale_t2=False) | DIVERGENCES[divergence]
    found = fastkd.kd(*inputs, alpha=0.3, divergence=divergence, **options)
    rows = getattr(fastkd, divergence)(student, teacher, weights=labels >= 0, **options)
    assert_loss(student, found, 0.3 * F.cross_entropy(student, labels) + 0.7 * rows)


def test_labels_are_ignored_renamed_and_of_any_dtype(inputs, engine):
    student, teacher, labels = inputs
    expected = fastkd.kd(*inputs)
    renamed = labels.masked_fill(labels == IGNORED, 7)
    swapped = labels.masked_fill(renamed == 7, IGNORED)
    assert_same(
        [fastkd.kd(student, teacher, renamed, ignore_index=7)],
        [fastkd.kd(student, teacher, swapped)],
        tolerance=0,
    )
    spoilt = [x.detach().clone() for x in (student, teacher)]
    spoilt[0][1] = spoilt[1][4] = torch.nan  # an ignored row may hold anything
    spoilt[0].requires_grad_()
    found = fastkd.kd(*spoilt, labels)
    assert_same([found, gradient(found, spoilt[0])], [expected, gradient(expected, student)])
    expected = fastkd.kd(student, teacher, labels.clamp(min=0))
    for dtype in (torch.int16, torch.int32, torch.uint8, torch.uint16):
        found = fastkd.kd(student, teacher, labels.clamp(min=0).to(dtype))
        assert_same([found], [expected], tolerance=0)
    nobody = torch.full_like(labels, IGNORED)
    for distilled in (True, False):
        found = fastkd.kd(student, teacher, nobody, distill_ignored=distilled)
        assert_loss(student, found, 0.5 * softened(student, teacher).mean() * distilled)


def test_more_classes_than_a_label_of_16_bits_can_name(engine):
    student, teacher, _ = logits_and_labels((3,), 50257)
    labels = torch.tensor([1, IGNORED, 3], device=DEVICE)
    expected = fastkd.kd(student, teacher, labels)
    assert_same([fastkd.kd(student, teacher, labels.short())], [expected])


def test_strided_labels_and_weights(engine):
    student, teacher, labels = logits_and_labels((2, 3), 11)
    weights = torch.arange(6.0, device=DEVICE).view(2, 3)
    strided = [x.mT.contiguous().mT for x in (labels, weights)]
    found = fastkd.kd(student, teacher, strided[0], weights=strided[1])
    assert_same([found], [fastkd.kd(student, teacher, labels, weights=weights)])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU torch checks labels by itself")
def test_a_label_that_does_not_exist_is_never_a_number(engine):
    """Where the check cannot look at labels, a wrong one must show."""
    student, teacher, labels = logits_and_labels((4,), 17)
    labels[1] = 17
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastkd._checks, "labels", lambda *_: None)
        try:
            losses = fastkd.kd(student, teacher, labels, reduction="none")
        except (IndexError, RuntimeError):
            return
    assert losses.isnan().tolist() == [False, True, False, False]


def test_a_term_without_weight_may_be_infinite(inputs, engine):
    student, teacher, labels = inputs
    barred = student.detach().clone()
    barred[0, labels[0]] = -math.inf
    assert fastkd.kd(barred, teacher, labels, alpha=0.0, divergence="reverse_kl").isfinite()
    barred = student.detach().clone()
    barred[0, (labels[0] + 1) % 11] = -math.inf
    assert fastkd.kd(barred, teacher, labels, alpha=1.0).isfinite()
    assert fastkd.kd(barred, teacher, labels, alpha=0.5).isposinf()


def test_known_answers(engine):
    torch.manual_seed(0)
    student, teacher = ((3 * torch.randn(8, 10, dtype=torch.float64)).to(DEVICE) for _ in range(2))
    for loss, scale_t2, answer in (
        (fastkd.forward_kl, True, 8.337987),
        (fastkd.forward_kl, False, 0.521124),
        (fastkd.soft_cross_entropy, False, 2.628791),
    ):
        found = loss(student, teacher, temperature=4.0, scale_t2=scale_t2)
        assert found.item() == pytest.approx(answer, abs=5e-7)


def test_soft_cross_entropy_is_that_of_torch(inputs, engine):
    student, teacher, _ = inputs
    found = fastkd.soft_cross_entropy(student, teacher, temperature=3.0, scale_t2=False)
    assert_loss(student, found, F.cross_entropy(student / 3, (teacher / 3).softmax(-1)))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@quick_if(lambda divergence, engine: engine != "triton" or divergence in FEW)
def test_scale_t2_scales_the_loss_and_its_gradient(divergence, inputs, engine):
    """A T² on one of the two alone would train with another weight than is reported."""
    student, teacher, _ = inputs
    for temperature in (1.0, 16.0, torch.tensor(4.0, dtype=torch.float64, device=DEVICE)):
        options = dict(temperature=temperature) | DIVERGENCES[divergence]
        scaled, plain = (
            getattr(fastkd, divergence)(student, teacher, scale_t2=scale_t2, **options)
            for scale_t2 in (True, False)
        )
        assert_loss(student, scaled, float(temperature) ** 2 * plain)


# -------------------------------------------------------------------------- options of divergences

# test_engines.py has all divergences of the kernels, with two temperatures
few_on_kernels = quick_if(lambda name, engine: engine != "triton" or name in FEW)
with_options = pytest.mark.parametrize("name, own", DIVERGENCES.items(), ids=str)


def of_rows(name, inputs, reduction="none", **options):
    return results(lambda *x: getattr(fastkd, name)(*x, reduction=reduction, **options), inputs)


@with_options
@few_on_kernels
def test_each_network_may_have_a_temperature_of_its_own(name, own, engine):
    student, teacher = logits((5,), 17)
    expected = of_rows(name, [student / 3, teacher / 2], **own)
    expected = [6 * expected[0], 2 * expected[1]]
    of_teacher = dict(temperature=3.0, teacher_temperature=2.0)
    of_both = dict(student_temperature=3.0, teacher_temperature=torch.tensor(2.0, device=DEVICE))
    for options in (of_teacher, of_both):
        assert_same(of_rows(name, [student, teacher], **own, **options), expected)


@with_options
@few_on_kernels
def test_teachers_may_be_probabilities_or_their_logarithms(name, own, engine):
    student, teacher = logits((5,), 17)
    teacher[:, 3] = -math.inf
    log_p = teacher.log_softmax(-1)
    expected = of_rows(name, [student, teacher], temperature=2.0, **own)
    for form, given in {"log_probabilities": log_p, "probabilities": log_p.exp()}.items():
        found = of_rows(name, [student, given], temperature=2.0, teacher_form=form, **own)
        assert_same(found, expected)


@pytest.mark.parametrize("name", [*DIVERGENCES, "logit_mse"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@quick_if(
    lambda name, dtype, engine: (
        engine != "triton" or (name, dtype) == ("jensen_shannon", torch.uint8)
    )
)
def test_labels_say_which_rows_count(name, dtype, engine):
    student, teacher = logits((3, 4), 17)
    teacher[0, 1], weights = math.nan, normal(3, 4).abs()
    labels = torch.full((3, 4), 5, dtype=dtype, device=DEVICE)
    labels[0, 1] = labels[2, 3] = 200
    for given, counts in ((None, labels != 200), (weights, weights * (labels != 200))):
        expected = of_rows(name, [student, teacher], "mean", weights=counts)
        options = dict(labels=labels, ignore_index=200, weights=given)
        assert_same(of_rows(name, [student, teacher], "mean", **options), expected)


def test_probabilities_of_rows_that_do_not_count(inputs, engine):
    student, teacher, labels = inputs
    weights = torch.arange(labels.numel(), device=DEVICE).view_as(labels) % 2
    expected = fastkd.kd(*inputs, weights=weights, return_parts=True)
    of_teacher = dict(teacher_form="probabilities", weights=weights, return_parts=True)
    for backend in (contextlib.nullcontext(), fastkd.backend("formula")):
        with backend:
            found = fastkd.kd(student, teacher.softmax(-1), labels, **of_teacher)
        assert_same(found, expected)


def test_the_weights_of_both_terms_are_free(inputs, engine):
    loss, ce, distance = fastkd.kd(*inputs, alpha=2.0, distill_weight=3.0, return_parts=True)
    assert_same([loss], [2 * ce + 3 * distance])
    student, teacher, labels = inputs
    nothing = fastkd.kd(student, math.inf * teacher, labels, alpha=0.0, distill_weight=0.0)
    nothing.backward()
    assert nothing == 0 and not student.grad.any()


def test_decoupled_kd_of_two_weights_of_0_is_0(engine):
    """Whether they are numbers or tensors, as those of a warm-up are."""
    inputs = [torch.randn(3, 9, device=DEVICE).requires_grad_(i == 0) for i in range(2)]
    labels, zero = torch.arange(3, device=DEVICE), torch.zeros((), device=DEVICE)
    loss = fastkd.decoupled_kd(*inputs, labels, alpha=zero, beta=zero)
    (gradient,) = torch.autograd.grad(loss, inputs[0])
    assert loss == 0 and not gradient.any()
