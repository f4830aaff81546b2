"""Gradients of both networks in one sweep: what each needs, and what no order may change."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import LOSSES
from choice import quick_if
from exactness import assert_same, by_formula, exact, results
from inputs import DEVICE, normal

DIVERGENCES = [case for case in LOSSES if "teacher_gradient" in case.parameters]
each_divergence = pytest.mark.parametrize("case", DIVERGENCES, ids=str)
# kernels of rows on chip and of longer ones, which are read in vectors and end in between
SIZES = [((5,), 37), ((3,), 8999)]
SOME = ("forward_kl", "jensen_shannon", "total_variation")
quickly = quick_if(lambda case, engine: engine != "triton" or case.name == "jensen_shannon")


def learning(case, **options):
    """Return the loss whose teacher gets a gradient, and whose third tensor is the temperature."""

    def loss(student, teacher, temperature=None):
        own = {} if temperature is None else dict(temperature=temperature)
        return case(student, teacher, teacher_gradient=True, **own, **options)

    return loss


def networks(case, examples, n_cols, dtype=torch.float64):
    return [x.detach().requires_grad_() for x in case.inputs(examples, n_cols, dtype)]


def temperatures(examples, dtype=torch.float64):
    return (1 + normal(*examples, seed=5).abs()).to(dtype).requires_grad_()


@pytest.mark.parametrize(("examples", "n_cols"), SIZES)
@each_divergence
@quickly
def test_the_gradients_are_those_of_the_formula(case, examples, n_cols, engine):
    inputs = [*networks(case, examples, n_cols), temperatures(examples)]
    assert_same(results(learning(case), inputs), by_formula(learning(case), inputs), 1e-12)


@pytest.mark.parametrize(("examples", "n_cols"), SIZES)
@each_divergence
@quick_if(lambda case, n_cols, engine: case.name == "jensen_shannon" and n_cols < 1000)
def test_each_gradient_alone_is_that_of_all(case, examples, n_cols, engine):
    inputs = [*networks(case, examples, n_cols), temperatures(examples)]
    losses, *gradients = results(learning(case), inputs)
    for needed in itertools.product((False, True), repeat=3):
        if any(needed):
            own = [x.detach().requires_grad_(y) for x, y in zip(inputs, needed, strict=True)]
            expected = [x for x, y in zip(gradients, needed, strict=True) if y]
            assert_same(results(learning(case), own), [losses, *expected], 1e-13)


# total variation counts which classes are above the others, as no sum of small numbers does
SMOOTH = [case for case in DIVERGENCES if case.name != "total_variation"]


@pytest.mark.parametrize("whose", [(0,), (1,), (0, 1)], ids=["student", "teacher", "both"])
@pytest.mark.parametrize("n_cols", [100, 8999])
@pytest.mark.parametrize("case", SMOOTH, ids=str)
@quick_if(
    lambda case, n_cols, whose, engine: (
        engine != "triton" or (case.name in SOME and (len(whose) == 2 or n_cols < 1000))
    )
)
def test_certain_networks_keep_their_digits(case, n_cols, whose, engine):
    """A class that a network leaves 1e-6 to all others has minus the sum of their gradients."""
    inputs = [0.1 * x for x in normal(2, 3, n_cols, seed=3)]
    for i in whose:
        inputs[i][:, 3] = (13.8, 13.3)[i] + math.log(n_cols)
    narrow = [x.float().requires_grad_() for x in inputs]
    loss = learning(case, temperature=1.0)
    _, *found = results(loss, narrow)
    _, *truth = by_formula(loss, exact(narrow))
    for x, true in zip(found, truth, strict=True):
        assert (x - true)[:, 3].abs().le(1e-5 * true[:, 3].abs()).all()
        assert (x - true).norm() <= 1e-5 * true.norm()


@pytest.mark.parametrize("whose", [(0,), (1,), (0, 1)], ids=["student", "teacher", "both"])
@each_divergence
@quickly
def test_excluded_classes(case, whose, engine):
    """Logits of −∞ have the gradients that very low ones have, where the loss is finite."""
    inputs, excluded = networks(case, (3,), 17), torch.zeros(3, 17, dtype=torch.bool, device=DEVICE)
    excluded[1:, [0, 3, 16]] = True
    low = [*inputs]
    for i in whose:
        inputs[i], low[i] = (
            inputs[i].detach().masked_fill(excluded, x).requires_grad_() for x in (-math.inf, -900)
        )
    temperature = torch.ones(3, dtype=torch.float64, device=DEVICE)
    losses, *found = results(learning(case), [*inputs, temperature.requires_grad_()])
    _, *limit = by_formula(learning(case), [*low, temperature])
    finite = losses.isfinite()
    assert finite[0]
    assert_same([x[finite] for x in found], [x[finite] for x in limit])


@pytest.mark.parametrize(("examples", "n_cols"), SIZES)
@each_divergence
@quickly
def test_equal_networks_have_nothing_to_learn(case, examples, n_cols, engine):
    """Neither network moves on the kink that total variation has there."""
    if case.name == "soft_cross_entropy":
        return  # whose least value is the teacher's entropy, which the teacher may lower
    student, _ = networks(case, examples, n_cols, torch.float32)
    losses, *gradients = results(
        learning(case), [student, student.detach().clone().requires_grad_()]
    )
    # a kernel's probabilities add up to 1 but for rounding, by which a constant slope is off
    is_inexact = engine == "triton" and "skew" in case.name
    rounding = 2 * torch.finfo(losses.dtype).eps if is_inexact else 0
    assert not losses.any()
    assert all(x.abs().max() <= rounding for x in gradients)


@pytest.mark.parametrize(("examples", "n_cols"), SIZES)
def test_the_networks_of_jensen_shannon_may_change_places(examples, n_cols, engine):
    (case,) = (x for x in DIVERGENCES if x.name == "jensen_shannon")
    student, teacher = networks(case, examples, n_cols, torch.float32)
    loss = learning(case, beta=0.5)
    there, back = results(loss, [student, teacher]), results(loss, [teacher, student])
    for x, y in zip(there, (back[0], back[2], back[1]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("examples", "n_cols"), SIZES)
@each_divergence
@quickly
def test_a_nan_stays_in_its_row_and_shows_in_both_networks(case, examples, n_cols, engine):
    inputs = [*networks(case, examples, n_cols), temperatures(examples)]
    expected = results(learning(case), inputs)
    with torch.no_grad():
        inputs[0][1, 3] = math.nan
    found, others = results(learning(case), inputs), [0, *range(2, *examples)]
    assert_same([x[others] for x in found], [x[others] for x in expected])
    assert all(x[1].isnan().any() for x in found if case.name != "total_variation")


def shifted(x):
    return F.pad(x.detach(), (0, 0, 0, 1), value=math.nan)[..., :-1, :].requires_grad_()


def transposed(x):
    return x.detach().mT.contiguous().mT.requires_grad_()


@pytest.mark.parametrize("moves", [(shifted, shifted), (transposed, shifted)], ids=str)
@pytest.mark.parametrize("n_cols", [37, 8999])
@each_divergence
@quick_if(
    lambda case, n_cols, engine: (
        case.name == "jensen_shannon" and (n_cols < 1000 or engine != "triton")
    )
)
def test_logits_of_any_layout_and_dtype(case, n_cols, moves, engine):
    """The gradients are in the dtypes of their networks."""
    inputs = networks(case, (2, 3), n_cols, torch.float32)
    inputs[1] = inputs[1].detach().half().requires_grad_()
    found = results(learning(case), [move(x) for move, x in zip(moves, inputs, strict=True)])
    assert_same(found, results(learning(case), inputs), 1e-6)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.float16]


@each_divergence
@quick_if(lambda case, engine: case.name == "jensen_shannon")
def test_a_second_backward_is_the_first(case, engine):
    inputs = [*networks(case, (4,), 19, torch.float32), temperatures((4,), torch.float32)]
    losses = learning(case)(*inputs)
    first, second = (torch.autograd.grad(losses.sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@each_divergence
@quick_if(lambda case, engine: case.name == "jensen_shannon")
def test_transforms_of_both_gradients(case, engine):
    inputs = [*networks(case, (2, 3), 7), temperatures((2, 3))]
    constants = [x.detach() for x in inputs]

    def loss(*batch):
        return learning(case)(*batch).sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    found = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*constants)
    assert_same(found, expected)
    losses = learning(case)(*inputs)
    upstreams = normal(2, *losses.shape, dtype=losses.dtype, seed=11)

    def gradients(upstream):
        return torch.autograd.grad(losses, inputs, upstream, retain_graph=True)

    each = zip(*map(gradients, upstreams), strict=True)
    assert_same(torch.func.vmap(gradients)(upstreams), [torch.stack(x) for x in each])


@each_divergence
@quick_if(lambda case, engine: case.name == "jensen_shannon" and engine != "portable in chunks")
def test_torch_compile_makes_one_graph_of_both(case, engine):
    inputs = [*networks(case, (4,), 19), temperatures((4,))]
    compiled = torch.compile(learning(case), backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, inputs), results(learning(case), inputs))


def test_a_factor_that_vanishes_writes_nothing_outside_its_row(engine):
    """Memory that nobody has written holds numbers that are no column."""
    student, teacher = networks(DIVERGENCES[0], (2,), 8999, torch.float32)
    for x in (student, teacher):
        x.detach()[:, 3] = 50.0
    inputs = [student, teacher, 4 * torch.ones(2, device=DEVICE).requires_grad_()]
    torch.use_deterministic_algorithms(True)
    try:
        losses = learning(DIVERGENCES[0], scale_t2=False)(*inputs)
        found = torch.autograd.grad(losses, inputs, torch.full_like(losses, 1e-45))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(not x.any() for x in found)
