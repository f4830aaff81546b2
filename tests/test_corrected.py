"""Particulars of losses that look at labels: limits, infinities, layouts, memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import LOSSES, of
from choice import quick_if
from exactness import assert_exact, assert_same, by_formula, exact, results
from force import in_chunks_of
from inputs import DEVICE, logits_and_labels
from meter import PeakMemory

import fastkd

CASES = of("corrected", "wsld")
each_case = pytest.mark.parametrize("case", CASES, ids=str)
corrected = pytest.mark.parametrize("case", of("corrected"), ids=str)
quick = quick_if(lambda case, engine: engine != "triton" or case in LOSSES)  # the others are alike
LONG = 8999  # columns, more than stay on chip


def row(*logits):
    return torch.tensor([logits], dtype=torch.float64, device=DEVICE)


def label(*classes):
    return torch.tensor(classes, device=DEVICE)


def low(x):
    """Return logits with exp(−600), a number in float64 and nothing beside 1, in place of 0."""
    return x.detach().clamp(min=-600).requires_grad_(x.requires_grad)


# --------------------------------------------------------------------------------- weighted labels


def test_weights_of_soft_labels_have_their_limits(engine):
    """The teacher alone is certain, the student alone, both, and the teacher excludes the label."""
    certain, usual, never = row(900.0, 0, 0), row(1.0, 0, 0), row(-math.inf, 0, 0)
    for student, teacher, weight in (
        (usual, certain, 1.0),
        (certain, usual, 0.0),
        (certain, certain, 0.0),
        (usual, never, 0.0),
        (never, never, 0.0),
        (usual, usual, 1 - math.exp(-1)),
    ):
        inputs = [student.clone().requires_grad_(), teacher, label(0)]
        found = results(lambda *x: fastkd.wsld(*x, reduction="none"), inputs)
        plain = results(
            lambda *x: fastkd.soft_cross_entropy(*x, temperature=2.0, reduction="none"), inputs[:2]
        )
        for x, y in zip(found, plain, strict=True):
            expected = weight * y if weight else torch.zeros_like(y)
            torch.testing.assert_close(x, expected, rtol=1e-12, atol=0)


def test_weights_of_soft_labels_are_constants(engine):
    """Their gradient is that of a soft cross-entropy with these weights, as people write it."""
    student, teacher, labels = logits_and_labels((8,), 11)
    of_student, of_teacher = (
        F.cross_entropy(z.detach(), labels, reduction="none") for z in (student, teacher)
    )
    weights = 1 - torch.exp(-of_student / of_teacher)
    own = dict(temperature=3.0, reduction="sum")
    found = results(lambda *x: fastkd.wsld(*x, labels, **own), [student, teacher])
    expected = results(
        lambda *x: fastkd.soft_cross_entropy(*x, weights=weights, **own), [student, teacher]
    )
    assert_same(found, expected)


# --------------------------------------------------------------------------------- minifinetuning


@pytest.mark.parametrize(
    "p, of_label, threshold, expected",
    [
        ((0.6, 0.3, 0.1), 1, 0.2, (0.6 * 0.8 / 1.3, 0.3 * 0.8 / 1.3 + 0.5 / 1.3, 0.1 * 0.8 / 1.3)),
        ((0.6, 0.3, 0.1), 0, 0.2, (0.8, 0.15, 0.05)),
        ((0.6, 0.3, 0.1), 0, 0.4, (1.0, 0.0, 0.0)),
        ((0.6, 0.3, 0.1), 0, 0.0, (0.6, 0.3, 0.1)),
        ((0.6, 0.3, 0.1), 2, 1.0, (0.0, 0.0, 1.0)),
        ((0.25, 0.25, 0.5), 2, 0.5, (0.0, 0.0, 1.0)),
        ((0.4, 0.4, 0.2), 1, 0.3, (0.2, 0.7, 0.1)),  # a tie is won
        ((1.0, 0.0, 0.0), 0, 0.2, (1.0, 0.0, 0.0)),
        ((1.0, 0.0, 0.0), 2, 0.2, (0.4, 0.0, 0.6)),
    ],
)
def test_the_label_wins_by_the_threshold(p, of_label, threshold, expected, engine):
    """The gradient q − p′ says what the teacher became."""
    teacher = row(*p).log()
    student = row(0.3, -0.2, 0.5).requires_grad_()
    options = dict(threshold=threshold, reduction="sum")
    loss = fastkd.mft(student, teacher, label(of_label), **options)
    (gradient,) = torch.autograd.grad(loss, student)
    target = row(*expected)
    torch.testing.assert_close(student.softmax(1) - gradient, target, rtol=0, atol=1e-15)
    kl = F.kl_div(student.log_softmax(1), target, reduction="sum")
    torch.testing.assert_close(loss, kl, rtol=1e-14, atol=1e-15)


def test_a_student_that_is_the_corrected_teacher_has_no_loss(engine):
    _, teacher, labels = logits_and_labels((64,), 37)
    labels[::2] = teacher.argmax(1)[::2]
    uniform = torch.zeros_like(teacher).requires_grad_()
    loss = fastkd.mft(uniform, teacher, labels, threshold=0.01, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, uniform)  # q − p′
    student = (1 / 37 - gradient).log().requires_grad_()
    found = results(lambda *x: fastkd.mft(*x, labels, threshold=0.01), [student, teacher])
    assert (found[0] >= 0).all()
    assert all(x.abs().max() <= 1e-14 for x in found)


# ----------------------------------------------------------------------- teacher-free distillation


def test_the_code_of_the_authors_is_a_temperature_of_1(engine):
    """They give softmax(u / T) to a student at T = 1, and divide by all numbers."""
    student, _, labels = logits_and_labels((8,), 11)
    T, a, n = 20.0, 0.99, 11
    u = torch.full_like(student, (1 - a) / (n - 1)).scatter(1, labels[:, None], a)
    expected = F.kl_div(student.log_softmax(1), (u / T).softmax(1), reduction="batchmean")
    probability = 1 / (1 + (n - 1) * math.exp(((1 - a) / (n - 1) - a) / T))
    found = fastkd.teacher_free_kd(
        student, labels, correct_probability=probability, temperature=1.0
    )
    assert_same([found], [expected])


def test_a_temperature_of_1_is_label_smoothing_less_its_entropy(engine):
    student, _, labels = logits_and_labels((8,), 11)
    smoothing = 0.1
    of_label = 1 - smoothing + smoothing / 11
    own = dict(correct_probability=of_label, temperature=1.0)
    others = smoothing / 11
    entropy = -of_label * math.log(of_label) - 10 * others * math.log(others)
    found = results(lambda x: fastkd.teacher_free_kd(x, labels, **own), [student])
    expected = results(
        lambda x: F.cross_entropy(x, labels, label_smoothing=smoothing) - entropy, [student]
    )
    assert_same(found, expected)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
def test_virtual_teachers_of_any_probability(probability, temperature, engine):
    """Numbers and tensors give the same; the label alone is a cross-entropy."""
    student, _, labels = logits_and_labels((8,), 11)
    tensors = (
        torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (probability, temperature)
    )
    found, expected = (
        results(
            lambda x, a=a, T=T: fastkd.teacher_free_kd(
                x, labels, correct_probability=a, temperature=T, scale_t2=False
            ),
            [student],
        )
        for a, T in (tuple(tensors), (probability, temperature))
    )
    assert_same(found, expected)
    if probability == 1:
        assert_same(found, results(lambda x: F.cross_entropy(x / temperature, labels), [student]))


@pytest.mark.parametrize("left", [1e-6, 1e-9])
def test_what_a_sure_virtual_teacher_leaves_keeps_its_digits(left, engine):
    """1 less its probability lost them in float32; the label's slope is that of the others."""
    student, _, labels = logits_and_labels((4,), 11)
    student = (student.detach() - 40.0 * F.one_hot(labels, 11)).float().requires_grad_()
    inputs = [student, labels]
    own = dict(correct_probability=1 - left, temperature=1.0)
    found = results(lambda *x: fastkd.teacher_free_kd(*x, **own), inputs)
    expected = by_formula(lambda *x: fastkd.teacher_free_kd(*x, **own), exact(inputs))
    assert_same(found, expected, 1e-6)
    # a student that is like its teacher but for a part of what is left to the others
    near = torch.full((1, 11), math.log(left / 10), device=DEVICE)
    near[0, 3], near[0, 5] = 0.0, math.log(2 * left / 10)
    inputs = [near.requires_grad_(), label(3)]
    found = results(lambda *x: fastkd.teacher_free_kd(*x, **own), inputs)
    expected = by_formula(lambda *x: fastkd.teacher_free_kd(*x, **own), exact(inputs))
    assert_same(found[1:], expected[1:], 2e-5)


def test_two_classes_of_which_a_student_is_certain(engine):
    """Both slopes are what is left of the larger probabilities, and neither has lost digits."""
    student = torch.tensor([[0.0, 16.0], [16.0, 0.0]], device=DEVICE, requires_grad=True)
    inputs = [student, label(0, 0)]
    for probability in (2e-7, 1 - 2e-7):
        own = dict(correct_probability=probability, temperature=1.0)
        found = results(lambda *x, own=own: fastkd.teacher_free_kd(*x, **own), inputs)
        expected = by_formula(lambda *x, own=own: fastkd.teacher_free_kd(*x, **own), exact(inputs))
        for slopes, true in zip(found[1], expected[1], strict=True):
            assert_same([slopes], [true], 1e-5)


# -------------------------------------------------------------------------------------------- rows


@corrected
@quick
def test_long_rows(case, engine):
    """They go by several programs, off the boundary, with labels at their ends and none."""
    *networks, labels = case.inputs((4,), LONG + 1, torch.float32)
    labels = torch.tensor([0, LONG - 1, 4000, -100], device=DEVICE)
    inputs = [x.detach()[:, 1:].requires_grad_(x.requires_grad) for x in networks]
    inputs[0].detach()[3] = math.nan
    assert_exact(case, [x[:3].detach().requires_grad_(x.requires_grad) for x in (*inputs, labels)])
    losses, gradient = results(case, [*inputs, labels])
    assert losses[3] == 0 and not gradient[3].any()
    assert losses.isfinite().all() and gradient.isfinite().all()


@each_case
def test_logits_of_2000_are_finite(case, engine):
    student, *others = case.inputs((8,), 37, torch.float32)
    student = (2000 * student.detach().sign()).requires_grad_()
    others = [2000 * x.sign() if x.is_floating_point() else x for x in others]
    found = results(case, [student, *others])
    assert all(x.isfinite().all() for x in found)
    wide = [student.detach().double().requires_grad_()]
    wide += [x.double() if x.is_floating_point() else x for x in others]
    assert_same(found, results(case.truth, wide), 1e-6)


@pytest.mark.parametrize("whose", ["both", "student", "teacher"])
@corrected
@quick
def test_a_masked_vocabulary(case, whose, engine):
    student, *others = case.inputs((3,), 17)
    mask = torch.zeros(3, 17, dtype=torch.bool, device=DEVICE)
    mask[1:, [0, 3, 16]] = True
    inputs = [student, *(x if x.is_floating_point() else 1 + 0 * x for x in others)]
    if whose != "teacher":
        inputs[0] = student.detach().masked_fill(mask, -math.inf).requires_grad_()
    if whose != "student" and len(inputs) == 3:
        inputs[1] = inputs[1].masked_fill(mask, -math.inf)
    losses, gradient = results(case, inputs)
    assert_same([losses], [case.hand(*inputs)])
    is_infinite = whose == "student" or (whose == "both" and len(inputs) == 2)
    assert losses[0].isfinite() and losses[1:].isposinf().all() == is_infinite
    limit = [low(x) if x.is_floating_point() else x for x in inputs]
    assert_same([gradient], [results(case.truth, limit)[1]])


@corrected
@pytest.mark.parametrize("bad", [math.nan, math.inf, "a row of -inf"])
@quick
def test_a_row_without_a_softmax_gives_nan_and_spoils_no_other(case, bad, engine):
    for i in range(len(case.inputs((3,), 17)) - 1):
        inputs = case.inputs((3,), 17, torch.float32)
        expected = results(case, inputs)
        spoilt = inputs[i].detach().clone()
        if isinstance(bad, str):
            spoilt[1] = -math.inf
        else:
            spoilt[1, 8] = bad
        inputs[i] = spoilt.requires_grad_(i == 0)
        losses, gradient = results(case, inputs)
        assert losses[1].isnan() and gradient[1].isnan().all()
        kept = [0, 2]
        assert_same([losses[kept], gradient[kept]], [x[kept] for x in expected], 1e-6)


@corrected
@pytest.mark.parametrize("cut", [False, True])
def test_every_row_of_every_chunk(case, cut, monkeypatch):
    in_chunks_of(2 * 400, monkeypatch)
    inputs = case.inputs((3, 4), 400, torch.float32)
    if cut:
        inputs = [x.detach()[:, :-1].requires_grad_(x.requires_grad) for x in inputs]
    with fastkd.backend("portable"):
        assert_exact(case, inputs)


@corrected
def test_confident_rows(case, engine):
    """Rows are one-hot to the last bit, at the label and at another class, beside a usual row."""
    student, *others = case.inputs((4,), 5, torch.float32)
    peaks = 200 * torch.eye(5, device=DEVICE)
    peaks[0] = 0
    student = (student.detach() + peaks[:4]).requires_grad_()
    moved = [
        x + peaks[[0, 1, 2, 4]] if x.is_floating_point() else label(1, 1, 0, 4) for x in others
    ]
    assert_exact(case, [student, *moved])


@each_case
@pytest.mark.parametrize("ignored", [-100, 3, 255])
def test_ignored_labels_are_rows_of_weight_0(case, ignored, engine):
    inputs = case.inputs((6,), 11)
    labels = inputs[-1].clamp(max=2)
    kept = torch.tensor([0, 2, 3, 5], device=DEVICE)
    marked = labels.clone()
    marked[[1, 4]] = ignored
    if ignored == 255:
        marked = marked.to(torch.uint8)
    with torch.no_grad():
        inputs[0][1] = math.nan
    own = dict(ignore_index=ignored, reduction="mean")
    loss, gradient = results(lambda *x: case(*x, **own), [*inputs[:-1], marked])
    fewer = [x.detach()[kept] for x in inputs[:-1]]
    expected, of_kept = results(
        lambda *x: case(*x, reduction="mean"), [fewer[0].requires_grad_(), *fewer[1:], labels[kept]]
    )
    assert_same([loss, gradient[kept]], [expected, of_kept])
    assert not gradient[[1, 4]].any()


@corrected
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_gradient_and_a_chunk(case, dtype, monkeypatch):
    """The gradient, five buffers of a chunk, and less than 64 numbers a row."""
    chunk, n_rows, n_cols = 1 << 14, 64, 2000
    in_chunks_of(chunk, monkeypatch)
    inputs = case.inputs((n_rows,), n_cols, dtype)
    gradient = n_rows * n_cols * dtype.itemsize
    with fastkd.backend("portable"), PeakMemory() as memory:
        case(*inputs, reduction="mean").backward()
    assert gradient < memory.peak_bytes <= gradient + 21 * chunk + 256 * n_rows


def test_errors_are_sentences():
    student, teacher, labels = logits_and_labels((4,), 7)
    for loss, inputs in (
        (fastkd.wsld, (student, teacher)),
        (fastkd.mft, (student, teacher)),
        (fastkd.teacher_free_kd, (student,)),
    ):
        with pytest.raises(ValueError, match=r"one class for each row: the shape \[4\]"):
            loss(*inputs, labels[:3])
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 7\)"):
            loss(*inputs, labels + 7)
        with pytest.raises(TypeError, match="class indices"):
            loss(*inputs, labels.double())
        with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
            loss(*inputs, labels, temperature=0.0)
        with pytest.raises(ValueError, match=r"student_logits needs the shape \(..., V\)"):
            loss(student[:, :0], *(x[:, :0] for x in inputs[1:]), labels)
    for wrong in (-0.1, 1.1, math.nan, "much"):
        with pytest.raises(ValueError, match=r"threshold must be a number in \[0, 1\]"):
            fastkd.mft(student, teacher, labels, threshold=wrong)
        with pytest.raises(ValueError, match=r"correct_probability must be a number in \[0, 1\]"):
            fastkd.teacher_free_kd(student, labels, correct_probability=wrong)
