"""What engines give to other engines of fastkd: the functions themselves, on chunks of logits."""

import importlib

import pytest
import torch
from exactness import assert_same
from losses import DEVICE, logits_and_labels, normal

import fastkd
from fastkd.problems.rows import Rows

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
    names = {"portable": "fastkd.portable.rows", "triton": "fastkd.kernels.rows.launch"}
    return importlib.import_module(names[engine])


def problem(divergence, n_cols=17, dtype=torch.float64, **other):
    """Return a problem with all that is optional."""
    student, teacher, labels = logits_and_labels((4,), n_cols, dtype)
    labels[2] = -1
    return Rows(
        student=student.detach(),
        teacher=teacher,
        labels=labels,
        row_mask=torch.tensor([True, True, False, True], device=DEVICE),
        student_temperature=2.0,
        teacher_temperature=0.7,
        weight=DIVERGENCES[divergence],
        scale=3.0,
        divergence=divergence,
    )._replace(**other)


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
    """The teacher is sharpened, as in DINO."""
    rows = problem(divergence, n_cols)
    student, teacher, labels, mask = rows[:4]
    options = {"jensen_shannon": "beta", "symmetric_kl": "weight"}.get(divergence, "skew")
    own = {options: DIVERGENCES[divergence]} if DIVERGENCES[divergence] else {}
    student.requires_grad_()
    # temperatures 2 and 0.7 of the two are one of 1 of logits divided by them
    losses = (
        mask
        * 3
        * getattr(fastkd, divergence).formula(student / 2, teacher / 0.7, temperature=1.0, **own)
    )
    cross_entropies = torch.nn.functional.cross_entropy(
        student, labels, ignore_index=-1, reduction="none"
    )
    of_losses, of_cross_entropies = upstreams()
    total = (of_losses * losses + of_cross_entropies * cross_entropies).sum()
    (gradient,) = torch.autograd.grad(total, student)
    student.requires_grad_(False)

    for needs_grad in (False, True):  # an engine may prepare for it
        found, saved = module.forward(rows, (needs_grad,))
        found_gradient = module.backward(rows, saved, (of_losses, of_cross_entropies))
        assert_same(found, [losses, cross_entropies])
        assert_same(found_gradient, [gradient], tolerance=1e-11)

    found, found_gradient = module.value_and_gradients(
        rows, (True,), row_weights=of_losses, ce_weights=of_cross_entropies
    )
    assert_same([*found, *found_gradient], [losses, cross_entropies, gradient], tolerance=1e-11)
    found, found_gradient = module.value_and_gradients(rows, (False,))
    assert_same(found, [losses, cross_entropies])
    assert found_gradient == (None,)


@pytest.mark.parametrize("without", ["labels", "row_mask"])
@pytest.mark.parametrize("n_cols", WIDTHS)
def test_what_is_optional(without, n_cols, module):
    """None is the same as labels for no row, and as a mask of all rows."""
    neutral = dict(
        labels=torch.full((4,), -1, device=DEVICE),
        row_mask=torch.ones(4, dtype=torch.bool, device=DEVICE),
    )
    weights, ce_weights = upstreams()
    given = dict(row_weights=weights, ce_weights=ce_weights)
    expected, found = (
        module.value_and_gradients(problem("forward_kl", n_cols, **{without: x}), (True,), **given)
        for x in (neutral[without], None)
    )
    assert_same([found[0][0], found[1][0]], [expected[0][0], expected[1][0]])


@pytest.mark.parametrize("n_cols", WIDTHS)
def test_either_upstream_alone(n_cols, module):
    rows = problem("jensen_shannon", n_cols)
    of_losses, of_cross_entropies = upstreams()
    _, saved = module.forward(rows, (True,))
    (both,) = module.backward(rows, saved, (of_losses, of_cross_entropies))
    (first,) = module.backward(rows, saved, (of_losses, None))
    (second,) = module.backward(rows, saved, (None, of_cross_entropies))
    assert_same([first + second], [both])
    assert (first != 0).any() and (second != 0).any()
    weights_alone = module.value_and_gradients(rows, (True,), row_weights=of_losses)[1]
    assert_same(weights_alone, [first])
    without_weights = module.value_and_gradients(rows, (True,))[1]
    assert_same(without_weights, module.backward(rows, saved, (torch.ones_like(of_losses), None)))


@pytest.mark.parametrize("n_cols", [pytest.param(17, marks=smoke), 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_the_gradient_overwrites_the_student(n_cols, dtype, module):
    for divergence in ("forward_kl", "skew_reverse_kl"):
        rows = problem(divergence, n_cols, dtype)
        weights, ce_weights = upstreams(torch.float32)
        given = dict(row_weights=weights, ce_weights=ce_weights)
        expected = module.value_and_gradients(rows, (True,), **given)
        teacher = rows.teacher.clone()
        found = module.value_and_gradients(rows, (True,), **given, in_place=True)
        assert found[1][0].data_ptr() == rows.student.data_ptr()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert torch.equal(rows.teacher, teacher)


@pytest.mark.parametrize("n_cols", WIDTHS)
def test_numbers_may_be_tensors(n_cols, module):
    """Centres and temperatures that change at every step live on the device."""
    numbers = dict(student_temperature=2.5, teacher_temperature=0.75, weight=0.25, scale=3.0)
    on_device = {name: torch.tensor(x, device=DEVICE) for name, x in numbers.items()}
    expected, _ = module.forward(problem("jensen_shannon", n_cols, **numbers), (False,))
    found, _ = module.forward(problem("jensen_shannon", n_cols, **on_device), (False,))
    assert_same(found, expected)


@pytest.mark.parametrize("n_cols", WIDTHS)
def test_outputs_are_those_announced(n_cols, module):
    """The compiler plans with shapes and dtypes: contiguous, and without needs_grad statistics."""
    for labels in (None, torch.zeros(4, dtype=torch.int64, device=DEVICE)):
        for dtype in (torch.float64, torch.bfloat16):
            rows = problem("forward_kl", n_cols, dtype, labels=labels)
            (losses, cross_entropies), (statistics,) = module.forward(rows, (False,))
            assert (cross_entropies is None) == (labels is None)
            assert statistics.shape == (4, module.n_statistics(rows))
            for found in (losses, statistics, *([] if labels is None else [cross_entropies])):
                assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert found.shape[:1] == (4,) and found.is_contiguous()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU torch checks labels by itself")
def test_a_label_out_of_range_is_never_a_number(module):
    """Where the check cannot look at labels, a wrong one must show."""
    rows = problem("forward_kl", labels=torch.tensor([0, 17, 1, 16]))
    try:
        (_, cross_entropies), _ = module.forward(rows, (False,))
    except (IndexError, RuntimeError):
        return
    assert cross_entropies.isnan().tolist() == [False, True, False, False]
