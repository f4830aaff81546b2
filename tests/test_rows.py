"""Particulars of rows of logits: extreme sizes, digits, layouts of sequences, transforms."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import LOSSES, named, of
from choice import ENGINES, full, pairwise, quick_if
from exactness import assert_exact, assert_same, by_formula, exact, results
from force import in_chunks_of
from inputs import DEVICE, logits, normal
from row_cases import DIVERGENCES, EACH, FEW, LONG, ROWS, SOFTMAXED

import fastkd
from fastkd.problems import _temperatures

# a KL, a mixture, and labels
THREE = named(
    "forward_kl-temperature=4.0", "jensen_shannon-temperature=2.0-beta=0.1",
    "kd-temperature=4.0-alpha=0.3-divergence=forward_kl",
)  # fmt: skip
each_loss = pytest.mark.parametrize("case", EACH, ids=str)
each_of_three = pytest.mark.parametrize("case", THREE, ids=str)


def of_all_sizes(smallest, largest, n_rows):
    """Return factors for rows of logits, among them usual ones that errors are measured by."""
    return torch.logspace(math.log10(smallest), math.log10(largest), n_rows, device=DEVICE)[:, None]


def moved(inputs, move):
    """Move the logits of both networks, and leave the labels."""
    student, teacher, *labels = inputs
    return [move(student.detach()).requires_grad_(), move(teacher), *labels]


# ---------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("n_cols", [17, 1000, LONG])
@pytest.mark.parametrize("case", [x for x in ROWS if x.options.get("standardize")], ids=str)
@quick_if(
    lambda case, n_cols, engine: engine != "triton" or (case.name == "reverse_kl" and n_cols > 17)
)
def test_the_deviation_of_logits_that_lie_far_from_0(case, n_cols, engine):
    """Mean and deviation have all digits of what the logits differ by."""
    student, teacher, *labels = case.inputs((4,), n_cols, torch.float32)
    far = [1000 + 3e-3 * student.detach(), 3e-3 * teacher - 1000, *labels]
    inputs = [far[0].requires_grad_(), *far[1:]]
    assert_same(results(case, inputs), by_formula(case, exact(inputs)), 5e-6)
    for x in inputs[:2]:
        assert_same([_temperatures.standardized(x)], [_temperatures.standardized(x.double())], 1e-6)


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
    inputs = logits((2, 3, 4), 6)
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
    n_rows = 16 if engine == "triton" else 64
    student, teacher, *labels = case.inputs((n_rows,), 100, torch.float32)
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
    student, teacher = (x.detach() for x in logits((4,), n_cols, torch.float32))
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
    lambda case, n_cols, top, engine: (
        n_cols == LONG and (engine != "triton" or (case.name in FEW and top > 0))
    )
)
def test_ramps_move_the_running_maximum(case, n_cols, top, engine):
    ramp = torch.linspace(0, top, n_cols, device=DEVICE)
    assert_exact(case, moved(case.inputs((3,), n_cols, torch.float32), lambda x: x + ramp))


@each_loss
def test_a_student_near_its_teacher(case, engine):
    """The end of a training: computed in half precision, divergences would come out negative."""
    student, teacher, *labels = case.inputs((4,), 1000, torch.bfloat16)
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


@pytest.mark.parametrize(
    "loss, options, excludes",
    [
        (fastkd.symmetric_kl, dict(weight=0.0), "student"),
        (fastkd.symmetric_kl, dict(weight=1.0), "teacher"),
        (fastkd.skew_kl, dict(skew=0.0), "nobody"),
        (fastkd.skew_reverse_kl, dict(skew=0.0), "nobody"),
    ],
    ids=["reverse", "forward", "skewed", "skewed reverse"],
)
@pytest.mark.parametrize("engine", [x for x in ENGINES if x != "triton"], indirect=True)
def test_a_share_of_0_in_a_tensor_leaves_nothing_of_a_term(loss, options, excludes, engine):
    """Not even of an infinite one: what is left is a plain KL."""
    student, teacher = logits((5,), 37)
    with torch.no_grad():
        if excludes != "nobody":
            (student if excludes == "student" else teacher)[0, 3] = -math.inf

    def of(in_tensor):
        own = {name: torch.tensor(x) if in_tensor else x for name, x in options.items()}
        return results(lambda *x: loss(*x, **own, reduction="none"), [student, teacher])

    found, expected = of(True), of(False)
    assert all(x.isfinite().all() for x in expected)
    assert_same(found, expected)


@pytest.mark.parametrize("loss", [fastkd.reverse_kl, fastkd.symmetric_kl, fastkd.jensen_shannon])
def test_what_is_decided_has_no_gradient(loss, engine):
    """Logits of 1e4 leave one class: a sum that is not quite 1 would be multiplied by 1e4."""
    n_rows = 16 if engine == "triton" else 64
    student, teacher = (3e3 * x.detach() for x in logits((n_rows,), 10, torch.float32))
    inputs = [student.requires_grad_(), teacher]
    wide = [student.detach().double().requires_grad_(), teacher.double()]
    (found,) = torch.autograd.grad(loss(*inputs, reduction="sum"), student)
    with fastkd.backend("formula"):
        (expected,) = torch.autograd.grad(loss(*wide, reduction="sum"), wide[0])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_equal_networks_have_no_gradient_in_any_layout(engine):
    student, _ = logits((9,), 41, torch.float32)
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


@full
@pytest.mark.parametrize("case", of("rows"), ids=str)
def test_every_width_up_to_a_block(case, engine):
    for width in (2, 3, 16, 31, 33, 64, 127, 130, 257):
        if width == 2 and case.options.get("standardize"):
            continue  # two logits always become the same ones, without a gradient
        inputs = case.inputs((2,), width)
        assert_same(results(case, inputs), results(case.truth, inputs), 1e-11)


# -------------------------------------------------------------------------------- digits


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
KINDS = ["no labels", "classes", "soft"]


@pytest.mark.parametrize("n_rows", [3, 400])  # one chunk, and several
@pytest.mark.parametrize("divergence", SMOOTH)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_certain_student_keeps_its_digits(divergence, n_rows, kind):
    """Z = 1 + rest has lost the digits of a rest of 1e-6, which the largest slope would need."""
    assert_digits("portable", divergence, n_rows, 1000, kind, torch.float32)


@pytest.mark.parametrize("n_cols", [10, 100, 1000, LONG])
@pytest.mark.parametrize("divergence", SMOOTH)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("engine", ["triton"], indirect=True)
@quick_if(
    lambda n_cols, divergence, kind, dtype: (
        (n_cols, dtype) in ((1000, torch.bfloat16), (LONG, torch.float32))
        and divergence in ("forward_kl", "jensen_shannon")
    )
)
def test_kernels_keep_the_digits_of_a_certain_student(divergence, n_cols, kind, dtype, engine):
    assert_digits(engine, divergence, 3, n_cols, kind, dtype)


def assert_digits(engine, divergence, n_rows, n_cols, kind, dtype):
    student, teacher = nearly_certain(n_rows, n_cols, dtype)
    labels = None
    if kind == "classes":
        labels = torch.full((n_rows,), 3, device=DEVICE)
        labels[1] = -100
    elif kind == "soft":  # of other sums than 1, one of them 0
        labels = torch.zeros_like(student)
        labels[:, 3] = 1.5
        labels[1] = 0
    with fastkd.backend("formula"):
        truth = gradient_of(student.double(), teacher.double(), labels, divergence)
    with fastkd.backend(engine):
        found = gradient_of(student, teacher, labels, divergence)
    within = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float64: 1e-7}[dtype]
    assert ((found - truth)[:, 3].abs() <= within * truth[:, 3].abs()).all()
    assert (found - truth).norm() <= within * truth.norm()


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
