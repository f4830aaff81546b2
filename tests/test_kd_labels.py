"""The labels of `kd`: soft, smoothed and weighted by class, as in F.cross_entropy."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from choice import quick_if
from exactness import assert_as_exact, assert_same, by_formula, exact, results
from inputs import DEVICE, logits_and_labels, normal
from row_cases import LONG
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd

SHAPES = [(6,), (2, 3)]
N_COLS = 11
KINDS = ["hard", "soft"]
OPTIONS = [
    {},
    dict(label_smoothing=0.1),
    dict(label_smoothing=1.0),
    dict(class_weights=True),
    dict(class_weights=True, label_smoothing=0.3),
]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
# weights and smoothing together are what kernels do of each
both_on_kernels = quick_if(lambda options, engine: engine != "triton" or len(options) == 2)


def batch(kind, shape=(6,), n_cols=N_COLS, dtype=torch.float64):
    """Return logits of both networks and labels, one of which is ignored or of two sums."""
    student, teacher, labels = logits_and_labels(shape, n_cols, dtype)
    flat = labels.view(-1)
    flat[1] = -100
    if kind == "hard":
        return student, teacher, labels
    classes = labels.clamp(min=0)
    soft = 0.7 * F.one_hot(classes, n_cols) + 0.3 * F.one_hot((classes + 3) % n_cols, n_cols)
    soft.view(-1, n_cols)[2] *= 2  # no distribution, which F.cross_entropy takes
    soft.view(-1, n_cols)[3] = 0
    return student, teacher, soft.to(dtype)


def chosen(options, n_cols=N_COLS, dtype=torch.float64):
    """Return options of which the weights are a tensor, the first of them 0."""
    if "class_weights" not in options:
        return options
    weights = normal(n_cols, seed=3).square()
    weights[0] = 0
    return {**options, "class_weights": weights.to(dtype)}


def of_torch(student, labels, reduction, label_smoothing=0.0, class_weights=None):
    rows = student.reshape(-1, student.shape[-1])
    targets = labels.reshape(-1, *labels.shape[student.ndim - 1 :])
    found = F.cross_entropy(
        rows, targets, class_weights, label_smoothing=label_smoothing, reduction=reduction
    )
    return found.view(student.shape[:-1]) if reduction == "none" else found


def with_gradient(loss, student):
    upstream = normal(*loss.shape, dtype=loss.dtype, seed=9)
    return [loss.detach(), *torch.autograd.grad(loss, student, upstream, retain_graph=True)]


@each_kind
@each_option
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@quick_if(lambda options, reduction, engine: engine != "triton" or reduction == "mean")
def test_the_cross_entropy_is_that_of_torch(kind, options, reduction, engine):
    for shape in SHAPES:
        student, teacher, labels = batch(kind, shape)
        own = chosen(options)
        loss, part, _ = fastkd.kd(
            student, teacher, labels, alpha=1.0, reduction=reduction, return_parts=True, **own
        )
        expected = with_gradient(of_torch(student, labels, reduction, **own), student)
        assert_same(with_gradient(loss, student), expected)
        assert_same([part], expected[:1])


@each_kind
@each_option
@both_on_kernels
def test_the_divergence_is_what_it_is_without(kind, options, engine):
    student, teacher, labels = batch(kind)
    own = dict(alpha=0.3, divergence="jensen_shannon", beta=0.2, temperature=2.0)
    loss, part, divergence = fastkd.kd(
        student, teacher, labels, return_parts=True, **own, **chosen(options)
    )
    labelled = labels if kind == "hard" else None
    of_rows = dict(temperature=2.0, beta=0.2, labels=labelled)
    expected = fastkd.jensen_shannon(student, teacher, **of_rows)
    assert_same(with_gradient(divergence, student), with_gradient(expected, student))
    assert_same([loss], [0.3 * part + 0.7 * expected])
    assert_same([fastkd.kd(student, teacher, labels, **own, **chosen(options))], [loss])


@each_kind
@each_option
@both_on_kernels
def test_weights_of_rows_multiply_those_of_classes(kind, options, engine):
    student, teacher, labels = batch(kind)
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 3.0], dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        student[4] = math.nan
        if kind == "soft":
            labels[4] = math.nan
    own = dict(alpha=1.0, **chosen(options))
    rows = fastkd.kd(student, teacher, labels, weights=weights, reduction="none", **own)
    kept = [0, 1, 2, 3, 5]
    expected = of_torch(student[kept], labels[kept], "none", **chosen(options)) * weights[kept]
    assert_same([rows[kept]], [expected])
    assert rows[4] == 0
    counts = weights[kept]
    if kind == "hard":
        counts = counts * (labels[kept] != -100)
        if "class_weights" in own:
            counts = counts * own["class_weights"][labels[kept].clamp(min=0)]
    mean = fastkd.kd(student, teacher, labels, weights=weights, **own)
    assert_same(with_gradient(mean, student), with_gradient(expected.sum() / counts.sum(), student))
    for normalizer in (7, torch.tensor(7.0, device=DEVICE)):
        found = fastkd.kd(student, teacher, labels, weights=weights, normalizer=normalizer, **own)
        assert_same([found], [expected.sum() / 7])


@each_option
@both_on_kernels
def test_unlabelled_rows_count_in_the_divergence_alone(options, engine):
    student, teacher, labels = batch("hard")
    own = chosen(options)
    _, part, divergence = fastkd.kd(
        student, teacher, labels, distill_ignored=True, return_parts=True, temperature=2.0, **own
    )
    assert_same([part], [of_torch(student, labels, "mean", **own)])
    assert_same([divergence], [fastkd.forward_kl(student, teacher, temperature=2.0)])


@each_kind
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@quick_if(lambda smoothing, engine: engine != "triton" or smoothing == 0.3)
def test_a_smoothing_may_be_a_tensor(kind, smoothing, is_weighted, engine):
    """Labels of all rows are taken, since the portable engine has one number for them then."""
    student, teacher, labels = batch(kind)
    labels = labels.clamp(min=0)
    own = dict(temperature=2.0, class_weights=normal(N_COLS).exp() if is_weighted else None)
    in_tensor = torch.tensor(smoothing, dtype=torch.float64, device=DEVICE)
    for reduction in ("mean", "none"):
        found, expected = (
            with_gradient(
                fastkd.kd(
                    student, teacher, labels, label_smoothing=x, reduction=reduction, **own
                ),
                student,
            )
            for x in (in_tensor, smoothing)
        )  # fmt: skip
        assert_same(found, expected)


@each_kind
@each_option
@pytest.mark.parametrize("n_cols", [67, LONG])
@quick_if(lambda n_cols, engine: n_cols == 67 or engine == "triton")
def test_the_error_is_that_of_the_formula(kind, options, n_cols, engine):
    inputs = batch(kind, (5,), n_cols, torch.float32)
    weights = chosen(options, n_cols, torch.float32)
    own = dict(alpha=0.6, temperature=3.0, reduction="none", **weights)
    with fastkd.backend("formula"):
        yardstick = with_gradient(fastkd.kd(*inputs, **own), inputs[0])
        wide = exact(inputs)
        truth = with_gradient(fastkd.kd(*wide, **own), wide[0])
    assert_as_exact(with_gradient(fastkd.kd(*inputs, **own), inputs[0]), yardstick, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_kind
@each_option
@both_on_kernels
def test_gradients_in_half_precision_are_those_of_two_passes(kind, options, dtype, engine):
    """Each pass rounds its gradient once, and so does their sum."""
    inputs = batch(kind, (5,), 67, dtype)
    own = dict(temperature=3.0, reduction="none", **chosen(options, 67, torch.float32))
    wide = exact(inputs)
    with fastkd.backend("formula"):
        parts = [
            with_gradient(fastkd.kd(*wide, alpha=a, distill_weight=d, **own), wide[0])
            for a, d in ((0.6, 0.0), (0.0, 0.4), (0.6, 0.4))
        ]
        own_without = {k: v for k, v in own.items() if k != "label_smoothing"}
        of_one = fastkd.kd(*wide, alpha=0.6, distill_weight=0.0, **own_without)
    losses, found = with_gradient(
        fastkd.kd(*inputs, alpha=0.6, distill_weight=0.4, **own), inputs[0]
    )
    assert_same([losses], [parts[2][0]], 1e-6)
    of_labels, of_teacher, truth = (gradient for _, gradient in parts)
    _, of_unsmoothed = with_gradient(of_one, wide[0])
    size = of_labels.abs() + of_unsmoothed.abs() + of_teacher.abs()
    allowed = 1.01 * torch.finfo(dtype).eps * size
    tiny = torch.finfo(dtype).tiny
    assert ((found.double() - truth).abs() <= allowed + tiny).all()


@each_kind
@each_option
@both_on_kernels
def test_logits_of_2000_are_finite(kind, options, engine):
    student, teacher, labels = batch(kind, dtype=torch.float32)
    with torch.no_grad():
        student.mul_(2000 / student.abs().amax(-1, keepdim=True))
    own = chosen(options, dtype=torch.float32)
    found = with_gradient(fastkd.kd(student, 700 * teacher, labels, alpha=1.0, **own), student)
    assert all(x.isfinite().all() for x in found)
    assert_same(found, with_gradient(of_torch(student, labels, "mean", **own), student), 1e-6)


@each_kind
def test_classes_that_both_leave_out_count_for_nothing(kind, engine):
    """A class of no weight may have a logit of −∞, which no target meets."""
    student, teacher, labels = batch(kind)
    labels = labels.clamp(min=4) if kind == "hard" else labels * (torch.arange(11) > 3).to(DEVICE)
    weights = torch.ones(N_COLS, dtype=torch.float64, device=DEVICE)
    weights[:4] = 0
    with torch.no_grad():
        student[:, :4] = teacher[:, :4] = -math.inf
    own = dict(alpha=0.5, label_smoothing=0.2, class_weights=weights)
    found = with_gradient(fastkd.kd(student, teacher, labels, **own), student)
    assert all(x.isfinite().all() for x in found)
    low = student.detach().clamp(min=-600).requires_grad_()
    expected = with_gradient(fastkd.kd(low, teacher.clamp(min=-600), labels, **own), low)
    assert_same(found, expected)


@each_kind
@each_option
@pytest.mark.parametrize("n_cols", [N_COLS, LONG])
@quick_if(lambda options, n_cols, engine: engine == "triton" or n_cols == N_COLS)
def test_a_target_of_an_excluded_class_is_infinite(kind, options, n_cols, engine):
    student, teacher, labels = batch(kind, n_cols=n_cols)
    excluded = labels[4].argmax() if kind == "soft" else labels[4]
    with torch.no_grad():
        student[4, excluded] = student[5, 0] = -math.inf
    own = dict(alpha=1.0, reduction="none", **chosen(options, n_cols))
    found = fastkd.kd(student, teacher, labels, **own)
    with fastkd.backend("formula"):
        expected = fastkd.kd(student, teacher, labels, **own)
    assert found[4] == math.inf
    assert_same([found], [expected])


def test_a_smoothing_of_0_leaves_nothing_of_excluded_classes(engine):
    """A tensor has it, and so has every graph that is compiled, in which numbers are tensors."""
    student, teacher, labels = batch("hard")
    labels = labels.clamp(min=1)
    with torch.no_grad():
        student[:, 0] = teacher[:, 0] = -math.inf
    compiled = torch.compile(fastkd.kd, backend="aot_eager", fullgraph=True)
    of_tensor = torch.tensor(0.0, dtype=torch.float64, device=DEVICE)
    expected = with_gradient(fastkd.kd(student, teacher, labels), student)
    assert all(x.isfinite().all() for x in expected)
    assert_same(with_gradient(compiled(student, teacher, labels), student), expected)
    for backend in (engine.split()[0], "formula"):
        with fastkd.backend(backend):
            losses = fastkd.kd(student, teacher, labels, label_smoothing=of_tensor)
            assert_same(with_gradient(losses, student), expected)


@each_kind
@pytest.mark.parametrize("is_weighted", [False, True])
def test_labels_smoothed_away_leave_an_infinite_loss(kind, is_weighted):
    """All classes have 1 / V of the target then, and the gradient of what is left is finite."""
    student, teacher, labels = batch(kind)
    excluded = labels[4].argmax() if kind == "soft" else labels[4]
    weights = torch.ones(N_COLS, dtype=torch.float64, device=DEVICE) + is_weighted
    own = dict(alpha=1.0, reduction="none", class_weights=weights if is_weighted else None)
    with torch.no_grad():
        student[4, excluded] = -math.inf
    for smoothing in (1, 1.0, torch.tensor(1.0, device=DEVICE)):
        with fastkd.backend("formula"):
            losses = fastkd.kd(student, teacher, labels, label_smoothing=smoothing, **own)
        assert losses.isposinf().tolist() == [False] * 4 + [True, False]
        (gradient,) = torch.autograd.grad(losses[4], student)
        q = student[4].detach().softmax(-1)
        assert_same([gradient[4]], [(q - 1 / N_COLS) * (1 + is_weighted)])


@each_kind
@each_option
@quick_if(lambda options, engine: engine == "portable" and len(options) == 2)
def test_transforms(kind, options, engine):
    student, teacher, labels = batch(kind, (2, 5))
    own = dict(alpha=0.3, reduction="mean", **chosen(options))

    def loss(*inputs):
        return fastkd.kd(*inputs, **own)

    constants = [student.detach(), teacher, labels]
    found = torch.func.vmap(torch.func.grad_and_value(loss))(*constants)
    single = [torch.func.grad_and_value(loss)(*x) for x in zip(*constants, strict=True)]
    assert_same(found, [torch.stack(x) for x in zip(*single, strict=True)])
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = with_gradient(loss(student, teacher, labels), student)
    assert_same(with_gradient(compiled(student, teacher, labels), student), expected)


@each_kind
@each_option
@quick_if(lambda engine: engine == "portable")
def test_no_step_waits_for_a_gpu(kind, options, engine):
    with FakeTensorMode():
        inputs = [torch.empty(x.shape, dtype=x.dtype) for x in batch(kind, dtype=torch.float32)]
        own = {**options, **{k: torch.empty(N_COLS) for k in options if k == "class_weights"}}
        loss = fastkd.kd(inputs[0].requires_grad_(), *inputs[1:], **own)
        (gradient,) = torch.autograd.grad(loss, inputs[0])
    assert gradient.shape == (6, N_COLS)


def test_soft_labels_are_constants_of_any_dtype(engine):
    student, teacher, labels = batch("soft", dtype=torch.float32)
    labels.requires_grad_()
    loss = fastkd.kd(student, teacher, labels)
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, labels, allow_unused=True) == (None,)
    wide = fastkd.kd(student, teacher, labels.double())
    assert wide.dtype == torch.float32
    assert_same([wide], [loss], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@each_option
@both_on_kernels
def test_soft_labels_are_read_as_they_lie(dtype, options, engine):
    """They have a dtype and strides of their own, and shifted sequences, as language models do."""
    for n_cols in (67, LONG):
        student, teacher, labels = batch("soft", (2, 4), n_cols, torch.float32)
        labels = labels.to(dtype)
        own = dict(reduction="none", **chosen(options, n_cols, torch.float32))
        truth = exact([student, teacher, labels])
        with fastkd.backend("formula"):
            expected = with_gradient(fastkd.kd(*truth, **own), truth[0])
        for moved in (labels, labels.mT.contiguous().mT, torch.cat([labels, labels], 1)[:, :4]):
            found = with_gradient(fastkd.kd(student, teacher, moved, **own), student)
            assert_same(found, expected, 3e-6)


@each_kind
def test_labels_beside_a_wider_teacher_and_a_learnt_temperature(kind, engine):
    student, teacher, labels = batch(kind, dtype=torch.float32)
    temperature = torch.tensor(2.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    options = chosen(dict(class_weights=True, label_smoothing=0.3), dtype=torch.bfloat16)
    inputs = [student, teacher.double(), labels.double() if kind == "soft" else labels]

    def loss(*xs):
        return fastkd.kd(*xs, temperature=temperature, reduction="none", **options)

    assert_same(results(loss, inputs), by_formula(loss, inputs), 1e-5)


def test_without_options_nothing_changes(engine):
    """The bits are those of a call that names no option."""
    student, teacher, labels = batch("hard", (40,), 37, torch.float32)
    plain = with_gradient(fastkd.kd(student, teacher, labels), student)
    named = fastkd.kd(student, teacher, labels, label_smoothing=0.0, class_weights=None)
    assert all(map(torch.equal, with_gradient(named, student), plain))


def test_the_module_has_the_options():
    student, teacher, labels = batch("hard")
    own = chosen(dict(class_weights=True, label_smoothing=0.3))
    module = fastkd.KDLoss(**own)
    assert "class_weights" in dict(module.named_buffers())
    assert torch.equal(module(student, teacher, labels), fastkd.kd(student, teacher, labels, **own))
    narrow = copy.deepcopy(module).to(torch.float32)
    assert narrow.class_weights.dtype == torch.float32
    module.class_weights = None
    expected = fastkd.kd(student, teacher, labels, label_smoothing=0.3)
    assert torch.equal(module(student, teacher, labels), expected)
    soft = batch("soft")
    assert torch.equal(module(*soft), fastkd.kd(*soft, label_smoothing=0.3))
    with pytest.raises(ValueError, match="at least 0"):
        module.class_weights = -own["class_weights"]


def test_errors_are_sentences():
    student, teacher, labels = batch("hard")
    soft = batch("soft")[2]
    for wrong, says in (
        (soft[:, :7], r"need the shape of the logits, \[6, 11\], got \[6, 7\].*of other classes"),
        (labels.double()[:, None], r"got \[6, 1\] of torch.float64: .*\.squeeze\(-1\).long\(\)"),
        (teacher, r"probabilities of at least 0, got -.*labels.softmax\(-1\)"),
    ):
        with pytest.raises(ValueError, match=says):
            fastkd.kd(student, teacher, wrong)
    with pytest.raises(TypeError, match=r"class indices \(torch.int64\), got torch.float64"):
        fastkd.kd(student, teacher, labels.double())
    weights = torch.ones(11, device=DEVICE)
    for wrong, says in (
        (weights[:7], r"V = 11 classes, got \[7\]"),
        (weights.long(), r"got \[11\] of torch.int64"),
        (-weights, "at least 0 and some of them above, got -1 to -1"),
        (0 * weights, "got 0 to 0"),
    ):
        with pytest.raises(ValueError, match=says):
            fastkd.kd(student, teacher, labels, class_weights=wrong)
    with pytest.raises(TypeError, match=r"got list: pass torch.tensor\(class_weights\)"):
        fastkd.kd(student, teacher, labels, class_weights=[1.0] * 11)
    for wrong in (-0.1, 1.5, math.nan, "half"):
        with pytest.raises(ValueError, match=r"label_smoothing must be a number in \[0, 1\]"):
            fastkd.kd(student, teacher, labels, label_smoothing=wrong)
