"""Rows of logits with infinities and NaN: what is excluded, what has no softmax, what vanishes."""

import math

import pytest
import torch
from cases import LOSSES, named, of
from choice import ENGINES, pairwise, quick_if
from exactness import assert_same, by_formula, results
from inputs import DEVICE, logits, normal
from row_cases import EACH, FEW, LONG, ROWS, SOFTMAXED

import fastkd

few_on_kernels = quick_if(
    lambda case, engine: engine != "triton" or (case in EACH and case.name in FEW)
)
# those that are infinite where the teacher excludes what the student allows
REVERSED = named(
    "reverse_kl-temperature=2.0", "jensen_shannon-temperature=2.0-beta=1.0",
    "skew_reverse_kl-temperature=2.0-skew=0.0", "symmetric_kl-temperature=2.0-weight=0.3",
    "symmetric_kl-temperature=2.0-weight=0.0",
)  # fmt: skip
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
@few_on_kernels
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
@quick_if(lambda case, engine: engine != "triton" or case in EACH)
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
    dtype=[torch.float32, torch.float16],
)
def test_a_row_without_a_softmax_gives_nan_and_spoils_no_other(
    case, engine, bad, whose, n_cols, dtype
):
    if case.name == "logit_mse" and bad != bad:
        bad = math.nan
    inputs = case.inputs((3,), n_cols, dtype)
    i = ["student", "teacher"].index(whose)
    bad_row = inputs[i].detach().clone()
    if isinstance(bad, str):
        bad_row[1] = -math.inf
    else:
        bad_row[1, n_cols // 2] = bad
    spoilt = [*inputs]
    spoilt[i] = bad_row.requires_grad_(i == 0)
    for compute in (results, by_formula):
        expected, (losses, gradient) = compute(case, inputs), compute(case, spoilt)
        if case.name != "logit_mse":  # the derivative of a clamped NaN is 0 in torch
            assert losses[1].isnan() and gradient[1].isnan().all()
        assert not losses[1].isfinite()
        others = [0, 2]
        assert_same([losses[others], gradient[others]], [x[others] for x in expected], 1e-6)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
def test_rows_of_half_precision_that_exclude_every_class(name, standardize, engine):
    """The pivot that kernels have for a row without logits is −∞ in float16."""
    student, teacher = logits((3,), 17, torch.float16)
    student.detach()[1] = -math.inf

    def loss(*xs):
        return getattr(fastkd, name)(*xs, standardize=standardize, reduction="none")

    found = results(loss, [student, teacher])
    assert all(x[1].isnan().all() and x[[0, 2]].isfinite().all() for x in found)


@pytest.mark.parametrize("case", SOFTMAXED, ids=str)
@few_on_kernels
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


def test_logit_mse_spreads_nan_no_further_than_its_row():
    student, teacher = normal(2, 4, 17)
    student[2, 5] = math.nan
    losses = fastkd.logit_mse(student, teacher, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False]


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


@pytest.mark.parametrize("n_cols", [17, LONG])
@pytest.mark.parametrize("whose", ["student", "teacher", "student and teacher"])
@pytest.mark.parametrize("case", [x for x in ROWS if x.options.get("standardize")], ids=str)
@quick_if(
    lambda case, n_cols, engine: (
        (engine != "triton" or case.name in ("forward_kl", "reverse_kl")) and n_cols == 17
    )
)
def test_standardized_rows_that_exclude_classes(case, whose, n_cols, engine):
    """A class that is excluded has no part in the deviation, but its gradient, as without one."""
    student, teacher, *labels = case.inputs((3,), n_cols)
    with torch.no_grad():
        if "student" in whose:
            student[1, MASKED] = student[2, 5] = -math.inf
        if "teacher" in whose:
            teacher[1, MASKED] = teacher[2, 6] = -math.inf
    inputs = [student, teacher, *(1 + 0 * label for label in labels)]
    found = losses, gradient = results(case, inputs)
    assert_same(found, by_formula(case, inputs))
    assert found[0][0].isfinite()
    if case.name == "reverse_kl":
        assert gradient[losses.isposinf()].isnan().all()
    else:
        assert gradient.isfinite().all()


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


@pytest.mark.parametrize(
    "shares",
    [
        (0.0, 8.0),
        (0.0, torch.tensor(8.0)),
        (torch.tensor(0.0), 8.0),
        (1.0, 0.0),
        (1.0, torch.tensor(0.0)),
        (0.0, 0.0),
    ],
    ids=str,
)
def test_a_share_of_0_counts_for_nothing(shares, engine):
    """Not even where its term is infinite; the other term may be."""
    alpha, beta = shares
    student, teacher, _ = inputs = of("decoupled_kd")[0].inputs((4,), 17)
    labels = torch.full((4,), 3, device=DEVICE)
    with torch.no_grad():
        student[1, 3] = student[2, 4] = -math.inf
    inputs = [student, teacher, labels]

    def loss(*xs):
        return fastkd.decoupled_kd(*xs, alpha=alpha, beta=beta, reduction="none")

    losses, _ = found = results(loss, inputs)
    assert_same(found, by_formula(loss, inputs))
    # the label of row 1 has the probability 0, and others have some
    is_infinite = [False, alpha > 0, beta > 0, False]
    assert not losses.isnan().any()
    assert losses.isposinf().tolist() == is_infinite


@pytest.mark.parametrize("name", ["decoupled_kd", "nkd"])
def test_a_label_whose_probability_vanishes_counts_as_one_of_0(name, engine):
    student, teacher, labels = of(name)[0].inputs((3,), 17)
    with torch.no_grad():
        student[1, labels[1]], teacher[1, labels[1]] = -math.inf, -4000.0
    options = dict(temperature=1.0, reduction="none")
    inputs = [student, teacher, labels]

    def loss(*xs):
        return getattr(fastkd, name)(*xs, **options)

    found = results(loss, inputs)
    assert_same(found, by_formula(loss, inputs))
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("n_cols", [17, LONG])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("case", of("decoupled_kd", "nkd", cases=LOSSES), ids=str)
@quick_if(lambda bad, n_cols, engine: engine != "triton" or (n_cols == 17 and bad == math.inf))
def test_a_label_whose_logit_is_infinite_has_no_softmax(case, whose, bad, n_cols, engine):
    student, teacher, labels = case.inputs((3,), n_cols)
    with torch.no_grad():
        (student if whose == "student" else teacher)[1, labels[1]] = bad
    inputs = [student, teacher, labels]
    for compute in (results, by_formula):
        losses, gradient = compute(case, inputs)
        assert losses[1].isnan() and gradient[1].isnan().all()
        assert all(x[[0, 2]].isfinite().all() for x in (losses, gradient))
        if case.name == "decoupled_kd":  # nor where the label's own term counts for nothing
            losses, gradient = compute(lambda *xs: case(*xs, alpha=0.0), inputs)
            assert losses.isnan().tolist() == [False, True, False] and gradient[1].isnan().any()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_the_one_class_of_a_teacher_without_a_softmax_gives_nan(name, engine):
    student, teacher = logits((3,), 1)
    teacher[1] = math.nan
    for compute in (results, by_formula):
        found = compute(
            lambda *xs: getattr(fastkd, name)(*xs, reduction="none"), [student, teacher]
        )
        assert all(x.flatten().isnan().tolist() == [False, True, False] for x in found)
