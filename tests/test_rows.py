"""Particulars of rows of logits: infinities, temperatures, layouts of sequences, labels."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, LOSSES, named, of
from choice import ENGINES, full, pairwise, quick_if
from exactness import assert_exact, assert_same, by_formula, exact, results
from force import in_chunks_of
from inputs import DEVICE, logits, logits_and_labels, normal

import fastkd

OF_OTHERS = ("ibot", "multi_teacher")  # test_self_distillation.py, test_ensemble.py
ROWS = [
    case
    for case in CASES
    if case.per_example and case.problem == "rows" and case.name not in OF_OTHERS
]
SOFTMAXED = [case for case in ROWS if case.name != "logit_mse"]
EACH = [case for case in ROWS if case in LOSSES]
# a KL, a mixture, and labels
THREE = named(
    "forward_kl-temperature=4.0", "jensen_shannon-temperature=2.0-beta=0.1",
    "kd-temperature=4.0-alpha=0.3-divergence=forward_kl",
)  # fmt: skip
each_loss = pytest.mark.parametrize("case", EACH, ids=str)
each_of_three = pytest.mark.parametrize("case", THREE, ids=str)
FEW = ("forward_kl", "jensen_shannon", "kd")  # a KL, a mixture, with labels: for kernels, quickly
# those that are infinite where the teacher excludes what the student allows
REVERSED = named(
    "reverse_kl-temperature=2.0", "jensen_shannon-temperature=2.0-beta=1.0",
    "skew_reverse_kl-temperature=2.0-skew=0.0", "symmetric_kl-temperature=2.0-weight=0.3",
    "symmetric_kl-temperature=2.0-weight=0.0",
)  # fmt: skip
LONG = 8999  # columns, more than stay on chip


def of_all_sizes(smallest, largest, n_rows):
    """Return factors for rows of logits, among them usual ones that errors are measured by."""
    return torch.logspace(math.log10(smallest), math.log10(largest), n_rows, device=DEVICE)[:, None]


def moved(inputs, move):
    """Move the logits of both networks, and leave the labels."""
    student, teacher, *labels = inputs
    return [move(student.detach()).requires_grad_(), move(teacher), *labels]


# ---------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("cut", [False, True])
@each_loss
def test_every_row_of_every_chunk(case, cut, monkeypatch):
    """The portable engine takes two rows at a time, within each sequence if one is cut."""
    in_chunks_of(2 * 4000, monkeypatch)
    inputs = case.inputs((3, 4), 4000, torch.float32)
    if cut:
        inputs = [x.detach()[:, :-1].requires_grad_(x.requires_grad) for x in inputs]
    with fastkd.backend("portable"):
        assert_exact(case, inputs)


@pytest.mark.parametrize("n_cols", [17, LONG])
@each_of_three
def test_one_row_without_a_batch(case, n_cols, engine):
    inputs = case.inputs((), n_cols, torch.float32)
    batch = [x.detach().unsqueeze(0).requires_grad_(x.requires_grad) for x in inputs]
    losses, gradient = results(case, inputs)
    assert losses.shape == ()
    assert_same([losses, gradient], [case(*batch)[0], results(case, batch)[1][0]])


@pytest.mark.parametrize("order", [(2, 1, 0, 3), (1, 2, 0, 3), (3, 2, 1, 0), (0, 3, 1, 2)], ids=str)
@quick_if(lambda order, engine: engine != "triton" or order == (2, 1, 0, 3))
def test_dimensions_in_any_order(order, engine):
    """The gradient has the strides of the student, in whichever order its chunks are taken."""
    inverse = [order.index(i) for i in range(4)]
    inputs = logits((3, 4, 5), 6)
    moved = [x.detach().permute(order).contiguous().permute(inverse) for x in inputs]
    found = results(fastkd.forward_kl, [moved[0].requires_grad_(), moved[1]])
    assert_same(found, results(fastkd.forward_kl, inputs))


@each_loss
def test_no_rows(case, engine):
    for examples in ((0,), (0, 3), (3, 0)):
        losses, gradient = results(case, case.inputs(examples, 10, torch.float32))
        assert losses.shape == examples and gradient.shape == (*examples, 10)


@pytest.mark.parametrize("case", SOFTMAXED, ids=str)
@quick_if(lambda case, engine: case in LOSSES)
def test_one_class_is_no_choice(case, engine):
    losses, gradient = results(case, case.inputs((3,), 1, torch.float32))
    assert not losses.any() and not gradient.any()


@pytest.mark.parametrize("case", SOFTMAXED, ids=str)
@quick_if(
    lambda case, engine: (
        engine == "portable" or (case in LOSSES and (engine != "triton" or case.name in FEW))
    )
)
def test_rounding_crosses_no_bound(case, engine):
    """Rows near the teacher are not negative, rows that both networks are certain of are 0."""
    student, teacher, *labels = case.inputs((64,), 100, torch.float32)
    near = (3 * teacher + 1e-4 * student.detach()).requires_grad_()
    losses, _ = results(case, [near, 3 * teacher, *labels])
    assert (losses >= 0).all()
    if case.name == "nkd" or case.options.get("standardize"):
        return  # the first is a cross-entropy, and nobody is certain of a standardized logit
    certain = torch.zeros_like(teacher)
    certain[:, 7] = 1000 + teacher[:, 0]
    labels = [torch.full_like(x, 7) for x in labels]
    losses, gradient = results(case, [certain.requires_grad_(), 0.7 * certain.detach(), *labels])
    assert not losses.any() and not gradient.any()


@pytest.mark.parametrize("n_cols", [1000, LONG])
def test_jensen_shannon_of_a_half_is_symmetric(n_cols, engine):
    student, teacher = (x.detach() for x in logits((16,), n_cols, torch.float32))
    there, back = (
        fastkd.jensen_shannon(*both, temperature=2.0, reduction="none")
        for both in ((student, teacher), (teacher, student))
    )
    assert torch.equal(there, back)


# what is done to the logits, and the temperature; rows of all sizes have a usual one among them
EXTREMES = {
    "tiny temperature": (lambda x: x * of_all_sizes(1e-3, 1.0, 6), 1e-3),
    "small temperature": (lambda x: x * of_all_sizes(0.1, 1.0, 6), 0.1),
    "high temperature": (lambda x: x * of_all_sizes(1.0, 20.0, 6), 20.0),
    "huge temperature": (lambda x: x * of_all_sizes(1.0, 1e3, 6), 1e3),
    "huge logits": (lambda x: x * of_all_sizes(1.0, 1e4, 6), None),
    "an offset common to a row": (lambda x: x + 1e4, None),
}


@pairwise(case=EACH, engine=ENGINES, extreme=EXTREMES, n_cols=[37, LONG])
def test_extreme_logits(case, engine, extreme, n_cols):
    """Reverse divergences of saturated rows cancel: what is left is noise, of one size for all."""
    move, temperature = EXTREMES[extreme]
    inputs = moved(case.inputs((6,), n_cols, torch.float32), move)
    options = {} if temperature is None else dict(temperature=temperature)
    assert_exact(case, inputs, times=2 if "offset" in extreme else 10, **options)


@each_loss
@pytest.mark.parametrize("n_cols, top", [(1000, 60.0), (LONG, 60.0), (LONG, -60.0)])
@quick_if(
    lambda case, n_cols, top, engine: n_cols == LONG and (engine != "triton" or case.name in FEW)
)
def test_ramps_move_the_running_maximum(case, n_cols, top, engine):
    ramp = torch.linspace(0, top, n_cols, device=DEVICE)
    assert_exact(case, moved(case.inputs((3,), n_cols, torch.float32), lambda x: x + ramp))


@each_loss
def test_a_student_near_its_teacher(case, engine):
    """The end of a training: computed in half precision, divergences would come out negative."""
    student, teacher, *labels = case.inputs((8,), 1000, torch.bfloat16)
    near = (teacher + 0.05 * student.detach()).requires_grad_()
    inputs = [near, teacher, *labels]
    found = results(case, inputs)
    truth = results(case.truth, exact(inputs))
    assert ((found[0] - truth[0]).abs() <= 1e-3 * truth[0]).all()
    assert (found[1] - truth[1]).norm() <= 4e-3 * truth[1].norm()


@pytest.mark.parametrize("case", ROWS, ids=str)
@quick_if(lambda case, engine: case in LOSSES or engine == "portable")
def test_confident_rows(case, engine):
    """Rows are one-hot to the last bit, at the same and at another class, beside a usual row."""
    student, teacher, *labels = case.inputs((4,), 5, torch.float32)
    peaks = 200 * torch.eye(5, device=DEVICE)
    peaks[0] = 0
    student = (student.detach() + peaks[:4]).requires_grad_()
    assert_exact(case, [student, teacher + peaks[[0, 1, 2, 4]], *labels])


@pytest.mark.parametrize(
    "loss, option",
    [(fastkd.skew_kl, "skew"), (fastkd.skew_reverse_kl, "skew"), (fastkd.jensen_shannon, "beta")],
)
def test_shares_of_any_size(loss, option, engine):
    """A large one is exact, and a small one is not rounded away."""
    inputs = logits((5,), 37)
    options = {option: 0.9, "reduction": "none"}
    expected = by_formula(lambda *x: loss(*x, **options), inputs)
    assert_same(results(lambda *x: loss(*x, **options), inputs), expected)
    for share in (1e-3, 1e-6) if option == "skew" else ():
        options = {option: share, "reduction": "none"}
        narrow = [x.float() for x in inputs]
        with fastkd.backend("formula"):
            true = loss(*(x.double() for x in narrow), **options)
        torch.testing.assert_close(loss(*narrow, **options).double(), true, rtol=3e-6, atol=0)


@pytest.mark.parametrize("loss", [fastkd.reverse_kl, fastkd.symmetric_kl, fastkd.jensen_shannon])
def test_what_is_decided_has_no_gradient(loss, engine):
    """Logits of 1e4 leave one class: a sum that is not quite 1 would be multiplied by 1e4."""
    student, teacher = (3e3 * x.detach() for x in logits((64,), 10, torch.float32))
    inputs = [student.requires_grad_(), teacher]
    wide = [student.detach().double().requires_grad_(), teacher.double()]
    (found,) = torch.autograd.grad(loss(*inputs, reduction="sum"), student)
    with fastkd.backend("formula"):
        (expected,) = torch.autograd.grad(loss(*wide, reduction="sum"), wide[0])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_equal_networks_have_no_gradient_in_any_layout(engine):
    student, _ = logits((37,), 41, torch.float32)
    transposed = student.detach().T.contiguous().T.requires_grad_()
    fastkd.total_variation(transposed, student.detach()).backward()
    assert not transposed.grad.any()


LAYOUTS = {
    "one position masked": lambda x: F.pad(x, (0, 0, 0, 1), value=torch.nan)[..., :-1, :],
    "first position masked": lambda x: F.pad(x, (0, 0, 1, 0), value=torch.nan)[..., 1:, :],
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "column-major": lambda x: x.mT.contiguous().mT,
    "padded": lambda x: F.pad(x, (0, 3), value=torch.nan)[..., :-3],
    "off the boundary": lambda x: F.pad(x.flatten(), (1, 0), value=torch.nan)[1:].view(x.shape),
    "one row for all": lambda x: x[:1, :1].expand(x.shape),
    "one sequence for all": lambda x: x[:1].expand(x.shape),
}


@pairwise(
    case=THREE, layout=LAYOUTS, of_teacher=[*LAYOUTS], n_cols=[37, LONG],
    dtype=[torch.float32, torch.bfloat16], engine=ENGINES,
)  # fmt: skip
def test_layouts_of_sequences(case, layout, of_teacher, n_cols, dtype, engine):
    student, teacher, *labels = case.inputs((2, 2), n_cols, dtype)
    strided = [LAYOUTS[layout](student.detach()), LAYOUTS[of_teacher](teacher)]
    plain = [x.clone(memory_format=torch.contiguous_format) for x in strided]
    found, expected = (
        results(case, [x[0].requires_grad_(), x[1], *labels]) for x in (strided, plain)
    )
    assert_same(found, expected, 1e-5 if dtype == torch.float32 else 4e-3)  # one step of bfloat16


# -------------------------------------------------------------------------------------- infinities

MASKED = [0, 3, 16]  # these classes, in every row but the first


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
    """Return logits with exp(−600), a number in float64 and nothing beside 1, in place of 0."""
    return logits.detach().double().clamp(min=-600).requires_grad_(logits.requires_grad)


ACCURACY = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("whose", ["student and teacher", "student", "teacher"])
@pytest.mark.parametrize("case", ROWS, ids=str)
@quick_if(lambda case, engine: engine != "triton" or case.name in FEW)
def test_a_masked_vocabulary(case, whose, engine):
    """Losses are those of the definition, gradients the limit of those of very low logits.

    The mean is that of the rows, also where it is infinite.
    """
    if case.name == "logit_mse" and whose != "student and teacher":
        return  # an infinite distance
    if case.options.get("standardize"):
        return  # very low logits have another deviation than excluded ones
    options = dict(temperature=1.0)
    dtypes = [*ACCURACY]
    dtype = dtypes[(len(case.id) + len(whose)) % 3] if engine == "portable in chunks" else dtypes[0]
    student, teacher, *labels = inputs = masked_inputs(case, whose, dtype)
    expected = case.hand(*inputs, **options)
    limit = [very_low(student), very_low(teacher), *labels]
    _, truth = results(lambda *xs: case.truth(*xs, **options), limit)
    losses, gradient = results(lambda *xs: case(*xs, **options), inputs)
    assert_same([losses], [expected], tolerance=min(ACCURACY[dtype], 1e-5))
    if whose == "teacher":  # an infinite reverse divergence has no gradient
        gradient, truth = gradient[expected.isfinite()], truth[expected.isfinite()]
    assert_same([gradient], [truth], tolerance=ACCURACY[dtype])
    rows, mean = case(*inputs, **options), case(*inputs, reduction="mean", **options)
    assert_same([mean], [rows.mean()], 1e-6)
    if mean.isfinite():
        found, expected = (torch.autograd.grad(x, student)[0] for x in (mean, rows.mean()))
        assert_same([found], [expected], ACCURACY[dtype])


@pytest.mark.parametrize("case", SOFTMAXED, ids=str)
def test_infinities_are_where_the_definition_has_them(case, engine):
    """The table says it in words: who excludes what the other allows."""
    divergence = case.options.get("divergence", case.name)
    mixtures = [case.options[k] for k in ("beta", "skew", "weight") if k in case.options]
    mixture = (*mixtures, 0.5)[0]
    infinite_for_student = {
        "forward_kl": True,
        "channel_wise": True,
        "localization": True,
        "soft_cross_entropy": True,
        "decoupled_kd": True,
        "nkd": True,
        "wsld": True,
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


@pairwise(
    case=EACH,
    engine=ENGINES,
    bad=[math.nan, math.inf, "a row of -inf"],
    whose=["student", "teacher"],
    n_cols=[17, LONG],
)
def test_a_row_without_a_softmax_gives_nan_and_spoils_no_other(case, engine, bad, whose, n_cols):
    if case.name == "logit_mse" and bad != bad:
        bad = math.nan
    inputs = case.inputs((3,), n_cols, torch.float32)
    expected = results(case, inputs)
    i = ["student", "teacher"].index(whose)
    spoilt = inputs[i].detach().clone()
    if isinstance(bad, str):
        spoilt[1] = -math.inf
    else:
        spoilt[1, n_cols // 2] = bad
    inputs[i] = spoilt.requires_grad_(i == 0)
    losses, gradient = results(case, inputs)
    if case.name != "logit_mse":
        assert losses[1].isnan()
        # torch's derivatives of |NaN| and of a clamped NaN are 0
        if whose == "student" or case.name != "total_variation":
            assert gradient[1].isnan().all()
    assert not losses[1].isfinite()
    others = [0, 2]
    assert_same([losses[others], gradient[others]], [x[others] for x in expected], 1e-6)


@pytest.mark.parametrize("case", SOFTMAXED, ids=str)
@quick_if(lambda case, engine: engine != "triton" or case.name in FEW)
def test_a_perfect_student_has_no_loss_and_no_gradient(case, engine):
    if case.name in ("kd", "nkd", "soft_cross_entropy", "wsld"):
        return  # they do not vanish
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        student, _, *labels = case.inputs((5,), 37, dtype)
        losses, gradient = results(case, [student, student.detach().clone(), *labels])
        assert not losses.any()
        # a kernel's probabilities add up to 1 but for rounding, by which a constant slope is off
        is_inexact = engine == "triton" and "skew" in case.name
        rounding = 2 * torch.finfo(losses.dtype).eps if is_inexact else 0
        assert gradient.abs().max() <= rounding


# ----------------------------------------------------------------------- labels and the divergence

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


# ------------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("place", [0, 1, 2])
@each_of_three
@quick_if(lambda case, place, engine: engine == "portable" or case is THREE[2])
def test_vmap_of_losses(case, place, engine):
    """Any dimension is mapped over; what is not mapped is shared."""
    student, teacher, *labels = case.inputs((4, 3), 7)
    expected = case(student, teacher, *labels).detach()
    mapped = [student.detach().movedim(0, place), teacher.movedim(0, place)]
    dims = (place, place, *(0 for _ in labels))
    assert_same([torch.func.vmap(case, dims)(*mapped, *labels)], [expected])
    shared = [x[0] for x in (teacher, *labels)]
    found = torch.func.vmap(lambda x: case(x, *shared), place)(mapped[0])
    assert_same([found], [torch.stack([case(x, *shared) for x in student.detach()])])


@each_of_three
def test_gradients_of_single_examples(case, engine):
    """They are what differential privacy wants, and no row has a gradient from another."""
    student, *others = case.inputs((4,), 7)
    expected = torch.autograd.grad(case(student, *others).sum(), student)[0]
    found = torch.func.vmap(torch.func.grad(case))(student.detach(), *others)
    assert_same([found], [expected])
    jacobian = torch.func.jacrev(lambda x: case(x, *others))(student.detach())
    rows = torch.arange(4, device=DEVICE)
    assert not jacobian[rows != rows[:, None]].any()
    assert_same([jacobian[rows, rows]], [expected])


def test_vmap_over_what_is_not_an_example(engine):
    """A temperature for each teacher of an ensemble takes one call each."""
    student, teacher = logits((3,), 7)
    temperatures = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, device=DEVICE)

    def loss(x, temperature):
        return fastkd.forward_kl(x, teacher, temperature=temperature)

    both = torch.func.grad_and_value(loss)
    found = torch.func.vmap(both, (None, 0))(student.detach(), temperatures)
    expected = [torch.stack(x) for x in zip(*(both(student, t) for t in temperatures), strict=True)]
    assert_same(found, expected)


def test_gradients_batched_by_autograd_are_an_error(engine):
    student, teacher = logits((3,), 7)
    losses = fastkd.forward_kl(student, teacher, reduction="none")
    eye = torch.eye(3, dtype=losses.dtype, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"Use torch\.func\.jacrev"):
        torch.autograd.grad(losses, student, eye, is_grads_batched=True)


def test_logit_mse_spreads_nan_no_further_than_its_row():
    student, teacher = normal(2, 4, 17)
    student[2, 5] = math.nan
    losses = fastkd.logit_mse(student, teacher, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False]


@full
@pytest.mark.parametrize("case", of("rows"), ids=str)
def test_every_width_up_to_a_block(case, engine):
    for width in (2, 3, 16, 31, 33, 64, 127, 130, 257):
        if width == 2 and case.options.get("standardize"):
            continue  # two logits always become the same ones, without a gradient
        inputs = case.inputs((2,), width)
        assert_same(results(case, inputs), results(case.truth, inputs), 1e-11)


# -------------------------------------------------------------------------- options of divergences

with_options = pytest.mark.parametrize("name, own", DIVERGENCES.items(), ids=str)


def of_rows(name, inputs, reduction="none", **options):
    return results(lambda *x: getattr(fastkd, name)(*x, reduction=reduction, **options), inputs)


@with_options
def test_each_network_may_have_a_temperature_of_its_own(name, own, engine):
    student, teacher = logits((5,), 17)
    expected = of_rows(name, [student / 3, teacher / 2], **own)
    expected = [6 * expected[0], 2 * expected[1]]
    of_teacher = dict(temperature=3.0, teacher_temperature=2.0)
    of_both = dict(student_temperature=3.0, teacher_temperature=torch.tensor(2.0, device=DEVICE))
    for options in (of_teacher, of_both):
        assert_same(of_rows(name, [student, teacher], **own, **options), expected)


@with_options
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
@quick_if(lambda name, engine: engine != "triton" or name in FEW)
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


def nearly_certain(n_rows, n_cols, dtype=torch.float64):
    """Return logits of a student that leaves 1e-6 to all classes but one, and of a teacher."""
    teacher, student = 0.1 * normal(2, n_rows, n_cols, seed=3)
    student[:, 3], teacher[:, 3] = (x + math.log(n_cols) for x in (13.8, 13.3))
    return student.to(dtype), teacher.to(dtype)


def gradient_of(student, teacher, labels, divergence):
    z = student.requires_grad_()
    if labels is None:
        loss = getattr(fastkd, divergence)(z, teacher)
    else:
        options = dict(alpha=0.5, temperature=1.0, divergence=divergence)
        loss = fastkd.kd(z, teacher, labels, **options)
    return torch.autograd.grad(loss, z)[0].double()


# total variation counts which classes are above the teacher's, as no sum of small numbers does
SMOOTH = [x for x in DIVERGENCES if x != "total_variation"]


@pytest.mark.parametrize("n_rows", [3, 400])  # one chunk, and several
@pytest.mark.parametrize("divergence", SMOOTH)
@pytest.mark.parametrize("with_labels", [False, True])
def test_the_gradient_of_a_certain_student_keeps_its_digits(divergence, n_rows, with_labels):
    """Z = 1 + rest has lost the digits of a rest of 1e-6, which the largest slope would need."""
    assert_digits("portable", divergence, n_rows, 1000, with_labels, torch.float32)


@pytest.mark.parametrize("n_cols", [10, 100, 1000, LONG])
@pytest.mark.parametrize("divergence", SMOOTH)
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("engine", ["triton"], indirect=True)
@quick_if(
    lambda n_cols, divergence, with_labels, dtype: (
        n_cols >= 1000 and divergence in ("forward_kl", "jensen_shannon") and dtype.itemsize < 8
    )
)
def test_kernels_keep_the_digits_of_a_certain_student(
    divergence, n_cols, with_labels, dtype, engine
):
    assert_digits(engine, divergence, 3, n_cols, with_labels, dtype)


def assert_digits(engine, divergence, n_rows, n_cols, with_labels, dtype):
    student, teacher = nearly_certain(n_rows, n_cols, dtype)
    labels = None
    if with_labels:
        labels = torch.full((n_rows,), 3, device=DEVICE)
        labels[1] = -100
    with fastkd.backend("formula"):
        truth = gradient_of(student.double(), teacher.double(), labels, divergence)
    with fastkd.backend(engine):
        found = gradient_of(student, teacher, labels, divergence)
    within = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float64: 1e-7}[dtype]
    assert ((found - truth)[:, 3].abs() <= within * truth[:, 3].abs()).all()
    assert (found - truth).norm() <= within * truth.norm()


def test_decoupled_kd_of_two_weights_of_0_is_0(engine):
    """Whether they are numbers or tensors, as those of a warm-up are."""
    inputs = [torch.randn(3, 9, device=DEVICE).requires_grad_(i == 0) for i in range(2)]
    labels, zero = torch.arange(3, device=DEVICE), torch.zeros((), device=DEVICE)
    loss = fastkd.decoupled_kd(*inputs, labels, alpha=zero, beta=zero)
    (gradient,) = torch.autograd.grad(loss, inputs[0])
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("n_cols", [17, LONG])
@pytest.mark.parametrize("case", REVERSED, ids=str)
@quick_if(
    lambda case, n_cols, engine: engine != "triton" or (case.name == "reverse_kl" and n_cols == 17)
)
def test_an_infinite_reverse_divergence_has_no_gradient(case, n_cols, engine):
    """It is NaN throughout the row, also where the student has next to nothing or nothing."""
    student, teacher = case.inputs((3,), n_cols)
    with torch.no_grad():
        teacher[1, 4] = student[1, 3] = -math.inf
        student[1, 5] = -90.0
    for found in (results(case, [student, teacher]), by_formula(case, [student, teacher])):
        losses, gradient = found
        assert losses[1].isposinf() and gradient[1].isnan().all()
        assert all(x[[0, 2]].isfinite().all() for x in found)


@pytest.mark.parametrize("mass", ["forward_kl", "symmetric_kl"])
def test_nor_has_the_teacher_whom_a_student_excludes(mass, engine):
    student, teacher = logits((3,), 17)
    student.detach()[1, 4] = -math.inf
    loss = getattr(fastkd, mass)
    inputs = [teacher.requires_grad_(), student.detach()]

    def of_teacher(teacher, student):
        return loss(student, teacher, teacher_gradient=True, temperature=2.0, reduction="none")

    for found in (results(of_teacher, inputs), by_formula(of_teacher, inputs)):
        losses, gradient = found
        assert losses[1].isposinf() and gradient[1].isnan().all()
        assert all(x[[0, 2]].isfinite().all() for x in found)


@pytest.mark.parametrize("n_cols", [17, LONG])
@pytest.mark.parametrize("whose", ["both", "student", "teacher"])
@pytest.mark.parametrize("case", of("decoupled_kd", "nkd"), ids=str)
@quick_if(lambda case, n_cols, engine: engine != "triton" or (case in LOSSES and n_cols == 17))
def test_a_row_in_which_the_label_alone_is_allowed(case, whose, n_cols, engine):
    """Others that nobody allows have no term; a student without any is infinitely far."""
    if case.options.get("standardize"):
        return  # one logit has no deviation
    student, teacher, labels = case.inputs((3,), n_cols)
    alone = torch.full_like(teacher[1], -math.inf).scatter(0, labels[1], 0.5)
    with torch.no_grad():
        if whose != "teacher":
            student[1] = alone
        if whose != "student":
            teacher[1] = alone
    inputs = [student, teacher, labels]
    losses, gradient = found = results(case, inputs)
    assert_same(found, by_formula(case, inputs))
    assert gradient.isfinite().all()
    if whose == "both":
        assert losses[1] == 0 and not gradient[1].any()
    elif whose == "student":
        assert losses[1].isposinf()
    else:  # the term of the label alone
        assert losses[1] > 0 and gradient[1, labels[1]] != 0
        options = {"decoupled_kd": {"beta": 0.0}, "nkd": {"gamma": 0.0}}[case.name]
        assert_same([losses[1]], [case(*inputs, **options)[1]])
