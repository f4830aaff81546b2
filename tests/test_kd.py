"""Vanilla distillation: labels and a softened teacher together, and known answers."""

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_same
from losses import DEVICE, logits_and_labels

import fastkd

smoke = pytest.mark.smoke
DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jensen_shannon": dict(beta=0.2),
    "skew_kl": dict(skew=0.3),
    "skew_reverse_kl": dict(skew=0.3),
    "symmetric_kl": dict(weight=0.7),
    "total_variation": {},
    "soft_cross_entropy": {},
}
IGNORED = -100


@pytest.fixture
def inputs():
    student, teacher, labels = logits_and_labels((6,), 11)
    labels[[1, 4]] = IGNORED
    return student, teacher, labels


def gradient(loss, student):
    return torch.autograd.grad(loss, student, retain_graph=True)[0]


def softened(student, teacher, temperature=4.0):
    """The rows of the forward KL that everybody writes."""
    log_q = F.log_softmax(student / temperature, -1)
    p = F.softmax(teacher / temperature, -1)
    return temperature**2 * F.kl_div(log_q, p, reduction="none").sum(-1)


@smoke
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
def test_kd_is_cross_entropy_and_kl_div(alpha, shape, inputs, engine):
    student, teacher, labels = inputs
    kept = labels != IGNORED
    expected = alpha * F.cross_entropy(student, labels) + (1 - alpha) * (
        softened(student, teacher)[kept].mean()
    )
    shaped = student.view(*shape, 11), teacher.view(*shape, 11), labels.view(shape)
    loss = fastkd.kd(*shaped, alpha=alpha)
    assert_same([loss, gradient(loss, student)], [expected, gradient(expected, student)])


@smoke
def test_unlabelled_examples_are_distilled_on_request(inputs, engine):
    student, teacher, labels = inputs
    expected = 0.3 * F.cross_entropy(student, labels) + 0.7 * softened(student, teacher).mean()
    loss = fastkd.kd(*inputs, alpha=0.3, distill_ignored=True)
    assert_same([loss, gradient(loss, student)], [expected, gradient(expected, student)])


@pytest.mark.parametrize("distill_ignored", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_count_in_both_terms(distill_ignored, reduction, inputs, engine):
    student, teacher, labels = inputs
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5, 0.0, 3.0], dtype=torch.float64, device=DEVICE)
    labelled = labels != IGNORED
    ce = F.cross_entropy(student, labels, reduction="none") * weights
    kl = softened(student, teacher) * weights
    if not distill_ignored:
        kl = kl * labelled
    if reduction == "mean":
        labelled_weight = (weights * labelled).sum()
        ce = ce.sum() / labelled_weight
        kl = kl.sum() / (weights.sum() if distill_ignored else labelled_weight)
    elif reduction == "sum":
        ce, kl = ce.sum(), kl.sum()
    expected = 0.5 * ce + 0.5 * kl
    loss = fastkd.kd(*inputs, weights=weights, reduction=reduction, distill_ignored=distill_ignored)
    assert_same([loss], [expected])
    assert_same([gradient(loss.sum(), student)], [gradient(expected.sum(), student)])


@pytest.mark.parametrize("distill_ignored", [True, False])
def test_a_normalizer_divides_both_terms(distill_ignored, inputs, engine):
    """Tokens of all accumulated batches, counted beforehand."""
    student, teacher, labels = inputs
    labelled = labels != IGNORED
    kl = softened(student, teacher)
    kl = kl.sum() if distill_ignored else kl[labelled].sum()
    expected = (0.5 * F.cross_entropy(student, labels, reduction="sum") + 0.5 * kl) / 50
    for normalizer in (50, torch.tensor(50, device=DEVICE)):
        loss = fastkd.kd(*inputs, normalizer=normalizer, distill_ignored=distill_ignored)
        assert_same([loss], [expected])


@smoke
def test_another_ignore_index(inputs, engine):
    student, teacher, labels = inputs
    renamed = labels.masked_fill(labels == IGNORED, 7)
    labels = labels.masked_fill(renamed == 7, IGNORED)
    assert_same(
        [fastkd.kd(student, teacher, renamed, ignore_index=7)],
        [fastkd.kd(student, teacher, labels)],
        tolerance=0,
    )


@smoke
def test_parts(inputs, engine):
    student, teacher, labels = inputs
    loss, ce, kl = fastkd.kd(*inputs, alpha=0.3, return_parts=True)
    expected = [F.cross_entropy(student, labels), softened(student, teacher)[labels >= 0].mean()]
    assert_same([loss, ce, kl], [0.3 * expected[0] + 0.7 * expected[1], *expected])
    # each part has a graph of its own
    assert_same([gradient(ce, student)], [gradient(expected[0], student)])
    assert_same([gradient(kl, student)], [gradient(expected[1], student)])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_divergence_is_that_of_its_function(divergence, inputs, engine):
    student, teacher, labels = inputs
    own = DIVERGENCES[divergence]
    options = dict(temperature=3.0, scale_t2=False) | own
    loss = fastkd.kd(*inputs, alpha=0.3, divergence=divergence, **options)
    expected = 0.3 * F.cross_entropy(student, labels) + 0.7 * (
        getattr(fastkd, divergence)(student, teacher, weights=labels >= 0, **options)
    )
    assert_same([loss, gradient(loss, student)], [expected, gradient(expected, student)])


@smoke
@pytest.mark.parametrize("distill_ignored", [True, False])
def test_no_label_at_all(distill_ignored, inputs, engine):
    student, teacher, labels = inputs
    labels = labels.fill_(IGNORED)
    loss = fastkd.kd(student, teacher, labels, distill_ignored=distill_ignored)
    expected = 0.5 * softened(student, teacher).mean() * distill_ignored
    assert_same([loss, gradient(loss, student)], [expected, gradient(expected, student)])


@smoke
def test_an_ignored_row_may_hold_anything(inputs, engine):
    student, teacher, _ = inputs
    loss = fastkd.kd(*inputs)
    expected = [loss.detach(), gradient(loss, student)]
    with torch.no_grad():
        student[1] = teacher[4] = torch.nan
    loss = fastkd.kd(*inputs)
    assert_same([loss, gradient(loss, student)], expected)


@smoke
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_labels_of_any_integer_dtype(dtype, engine):
    student, teacher, labels = logits_and_labels((6,), 11)
    expected = fastkd.kd(student, teacher, labels)
    assert_same([fastkd.kd(student, teacher, labels.to(dtype))], [expected], tolerance=0)


def test_strided_labels_and_weights(engine):
    student, teacher, labels = logits_and_labels((2, 3), 11)
    weights = torch.arange(6.0, device=DEVICE).view(2, 3)
    strided = [x.mT.contiguous().mT for x in (labels, weights)]
    expected = fastkd.kd(student, teacher, labels, weights=weights)
    found = fastkd.kd(student, teacher, strided[0], weights=strided[1])
    assert_same([found], [expected], tolerance=1e-12)


@smoke
def test_known_answers(engine):
    torch.manual_seed(0)
    student = (3 * torch.randn(8, 10, dtype=torch.float64)).to(DEVICE)
    teacher = (3 * torch.randn(8, 10, dtype=torch.float64)).to(DEVICE)
    options = dict(temperature=4.0)
    scaled = fastkd.forward_kl(student, teacher, **options)
    plain = fastkd.forward_kl(student, teacher, scale_t2=False, **options)
    soft = fastkd.soft_cross_entropy(student, teacher, scale_t2=False, **options)
    assert scaled.item() == pytest.approx(8.337987, abs=5e-7)
    assert plain.item() == pytest.approx(0.521124, abs=5e-7)
    assert soft.item() == pytest.approx(2.628791, abs=5e-7)


@smoke
def test_soft_cross_entropy_is_that_of_torch(inputs, engine):
    student, teacher, _ = inputs
    expected = F.cross_entropy(student / 3, (teacher / 3).softmax(-1))
    loss = fastkd.soft_cross_entropy(student, teacher, temperature=3.0, scale_t2=False)
    assert_same([loss, gradient(loss, student)], [expected, gradient(expected, student)])


@pytest.mark.parametrize("temperature", [1.0, 4.0, 16.0])
def test_scale_t2_scales_the_loss_and_its_gradient(temperature, inputs, engine):
    """A T² on one of the two alone would train with another weight than is reported."""
    student, teacher, _ = inputs
    for name, own in DIVERGENCES.items():
        pair = []
        for scale_t2 in (True, False):
            options = dict(temperature=temperature, scale_t2=scale_t2) | own
            loss = getattr(fastkd, name)(student, teacher, **options)
            pair.append([loss.detach(), gradient(loss, student)])
        assert_same(pair[0], [temperature**2 * x for x in pair[1]])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8, torch.uint16], ids=str)
def test_labels_of_any_integer_type(dtype, inputs, engine):
    student, teacher, labels = inputs
    expected = fastkd.kd(student, teacher, labels.clamp(min=0))
    assert_same([fastkd.kd(student, teacher, labels.clamp(min=0).to(dtype))], [expected])


def test_more_classes_than_a_label_of_16_bits_can_name(engine):
    student, teacher, _ = logits_and_labels((3,), 50257)
    labels = torch.tensor([1, IGNORED, 3], device=DEVICE)
    expected = fastkd.kd(student, teacher, labels)
    assert_same([fastkd.kd(student, teacher, labels.short())], [expected])


def test_a_term_without_weight_may_be_infinite(inputs, engine):
    student, teacher, labels = inputs
    barred = student.detach().clone()
    barred[0, labels[0]] = -float("inf")
    assert fastkd.kd(barred, teacher, labels, alpha=0.0, divergence="reverse_kl").isfinite()
    barred = student.detach().clone()
    barred[0, (labels[0] + 1) % 11] = -float("inf")
    assert fastkd.kd(barred, teacher, labels, alpha=1.0).isfinite()
    assert fastkd.kd(barred, teacher, labels, alpha=0.5).isposinf()
