"""What engines give to other engines of fastkd: the functions themselves, on chunks of logits."""

import importlib

import pytest
import torch
from exactness import assert_same
from losses import DEVICE, logits_and_labels, normal

import fastkd

smoke = pytest.mark.smoke
DIVERGENCES = {
    "forward_kl": 0.0,
    "reverse_kl": 0.0,
    "jensen_shannon": 0.3,
    "skew_kl": 0.2,
    "skew_reverse_kl": 0.2,
    "symmetric_kl": 0.3,
    "total_variation": 0.0,
    "soft_cross_entropy": 0.0,
}
WIDTHS = [17, 9000]


pytestmark = pytest.mark.parametrize(
    "engine", ["portable", "portable in chunks", "triton"], indirect=True
)


@pytest.fixture
def module(engine):
    package = {"portable": "fastkd.portable", "triton": "fastkd.kernels"}[engine]
    return importlib.import_module(f"{package}.divergence")


def problem(divergence, n_cols=17, dtype=torch.float64, **other):
    """The arguments of every function of an engine, with all that is optional."""
    student, teacher, labels = logits_and_labels((4,), n_cols, dtype)
    labels[2] = -1
    arguments = dict(
        student=student.detach(),
        teacher=teacher,
        labels=labels,
        offset=normal(n_cols, dtype=dtype, seed=5),
        keep=torch.tensor([True, True, False, True], device=DEVICE),
        student_temperature=2.0,
        teacher_temperature=0.7,
        weight=DIVERGENCES[divergence],
        scale=3.0,
        divergence=divergence,
    )
    return list((arguments | other).values())


def upstreams(dtype=torch.float64):
    return normal(4, dtype=dtype, seed=8), normal(4, dtype=dtype, seed=9)


@pytest.mark.parametrize(
    "divergence, n_cols",
    [
        *(pytest.param(divergence, 17, marks=smoke) for divergence in DIVERGENCES),
        pytest.param("forward_kl", 9000, marks=smoke),
        *((divergence, 9000) for divergence in DIVERGENCES if divergence != "forward_kl"),
    ],
)
def test_the_gradient_is_that_of_the_values(divergence, n_cols, module):
    """The teacher is centred and sharpened, as in DINO."""
    arguments = problem(divergence, n_cols)
    student, teacher, labels, offset, keep = arguments[:5]
    options = {"jensen_shannon": "beta", "symmetric_kl": "weight"}.get(divergence, "skew")
    own = {options: DIVERGENCES[divergence]} if DIVERGENCES[divergence] else {}
    student.requires_grad_()
    # temperatures 2 and 0.7 of the two are one of 1 of logits divided by them
    losses = (
        keep
        * 3
        * getattr(fastkd, divergence).formula(
            student / 2, (teacher - offset) / 0.7, temperature=1.0, **own
        )
    )
    cross_entropies = torch.nn.functional.cross_entropy(
        student, labels, ignore_index=-1, reduction="none"
    )
    of_losses, of_cross_entropies = upstreams()
    total = (of_losses * losses + of_cross_entropies * cross_entropies).sum()
    (gradient,) = torch.autograd.grad(total, student)
    student.requires_grad_(False)

    found_losses, found_cross_entropies, statistics = module.forward(*arguments)
    found = module.backward(of_losses, of_cross_entropies, statistics, *arguments)
    assert_same([found_losses, found_cross_entropies], [losses, cross_entropies])
    assert_same([found], [gradient], tolerance=1e-11)

    trained = [student.clone().requires_grad_(), *arguments[1:]]  # an engine may prepare for it
    with torch.no_grad():
        found_losses, found_cross_entropies, statistics = module.forward(*trained)
        found = module.backward(of_losses, of_cross_entropies, statistics, *trained)
    assert_same([found_losses, found_cross_entropies], [losses, cross_entropies])
    assert_same([found], [gradient], tolerance=1e-11)

    at_once = module.value_and_gradient(
        *arguments, row_weights=of_losses, ce_weights=of_cross_entropies
    )
    assert_same(at_once, [losses, cross_entropies, gradient], tolerance=1e-11)


@smoke
@pytest.mark.parametrize(
    "own", [dict(offset=None), dict(student_temperature=0.7, teacher_temperature=0.7)], ids=str
)
def test_that_the_student_is_trained_changes_no_value(own, module):
    """With an offset alone, and with two temperatures alone."""
    student, *others = problem("forward_kl", **own)
    expected = module.forward(student, *others)[:2]
    with torch.no_grad():
        found = module.forward(student.clone().requires_grad_(), *others)[:2]
    assert_same(found, expected)


@pytest.mark.parametrize("without", ["labels", "offset", "keep"])
@pytest.mark.parametrize("n_cols", WIDTHS)
def test_what_is_optional(without, n_cols, module):
    """Left out is the same as an offset of nothing, labels for nobody, all rows kept."""
    nothing = dict(
        labels=torch.full((4,), -1, device=DEVICE),
        offset=torch.zeros(n_cols, dtype=torch.float64, device=DEVICE),
        keep=torch.ones(4, dtype=torch.bool, device=DEVICE),
    )
    weights, ce_weights = upstreams()
    with_nothing = problem("forward_kl", n_cols, **{without: nothing[without]})
    left_out = problem("forward_kl", n_cols, **{without: None})
    expected = module.value_and_gradient(*with_nothing, row_weights=weights, ce_weights=ce_weights)
    found = module.value_and_gradient(*left_out, row_weights=weights, ce_weights=ce_weights)
    assert_same([found[0], found[2]], [expected[0], expected[2]])


@pytest.mark.parametrize("n_cols", WIDTHS)
def test_either_upstream_alone(n_cols, module):
    arguments = problem("jensen_shannon", n_cols)
    of_losses, of_cross_entropies = upstreams()
    _, _, statistics = module.forward(*arguments)
    both = module.backward(of_losses, of_cross_entropies, statistics, *arguments)
    first = module.backward(of_losses, None, statistics, *arguments)
    second = module.backward(None, of_cross_entropies, statistics, *arguments)
    assert_same([first + second], [both])
    assert (first != 0).any() and (second != 0).any()
    weights_alone = module.value_and_gradient(*arguments, row_weights=of_losses)[2]
    assert_same([weights_alone], [first])


@pytest.mark.parametrize("n_cols", [pytest.param(17, marks=smoke), 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_the_gradient_overwrites_the_student(n_cols, dtype, module):
    for divergence in ("forward_kl", "skew_reverse_kl"):
        arguments = problem(divergence, n_cols, dtype)
        weights, ce_weights = upstreams(torch.float32)
        given = dict(row_weights=weights, ce_weights=ce_weights)
        expected = module.value_and_gradient(*arguments, **given)
        teacher = arguments[1].clone()
        arguments[0].requires_grad_()  # of no consequence
        with torch.no_grad():
            found = module.value_and_gradient(*arguments, **given, in_place=True)
        assert found[2].data_ptr() == arguments[0].data_ptr()
        assert all(map(torch.equal, found, expected))
        assert torch.equal(arguments[1], teacher)


@pytest.mark.parametrize("n_cols", WIDTHS)
def test_numbers_may_be_tensors(n_cols, module):
    """Centres and temperatures that change at every step live on the device."""
    numbers = dict(student_temperature=2.5, teacher_temperature=0.75, weight=0.25, scale=3.0)
    on_device = {name: torch.tensor(x, device=DEVICE) for name, x in numbers.items()}
    expected = module.forward(*problem("jensen_shannon", n_cols, **numbers))
    found = module.forward(*problem("jensen_shannon", n_cols, **on_device))
    assert_same(found[:2], expected[:2])


@pytest.mark.parametrize("n_cols", WIDTHS)
def test_outputs_are_those_allocated(n_cols, module):
    """The compiler plans with `allocate`: shapes, dtypes and strides must be those of `forward`."""
    for labels in (None, torch.zeros(4, dtype=torch.int64, device=DEVICE)):
        for dtype in (torch.float64, torch.bfloat16):
            arguments = problem("forward_kl", n_cols, dtype, labels=labels)
            for found, planned in zip(
                module.forward(*arguments), module.allocate(*arguments), strict=True
            ):
                assert (found.shape, found.dtype) == (planned.shape, planned.dtype)
                assert found.stride() == planned.stride()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU torch checks labels by itself")
def test_a_label_out_of_range_is_never_a_number(module):
    """Where the check cannot look at labels, a wrong one must show."""
    arguments = problem("forward_kl", labels=torch.tensor([0, 17, 1, 16]))
    try:
        _, cross_entropies, _ = module.forward(*arguments)
    except (IndexError, RuntimeError):
        return
    assert cross_entropies.isnan().tolist() == [False, True, False, False]
