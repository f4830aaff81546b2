"""Weights, normalizer and reduction, for every loss."""

import math

import pytest
import torch
from exactness import assert_same
from losses import DEVICE, each_loss, normal

smoke = pytest.mark.smoke
WEIGHTS = torch.tensor([0.5, 0.0, 2.0, 1.25], dtype=torch.float64, device=DEVICE)


def reduced(case, inputs, **options):
    """Loss and gradient with an upstream of 1."""
    loss = case(*inputs, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), [x for x in inputs if x.requires_grad])]


def by_definition(case, inputs, reduction, weights=None, normalizer=None):
    losses = case.eager(*inputs)
    if weights is not None:
        losses = losses * weights
    loss = losses
    if reduction == "sum":
        loss = losses.sum()
    elif reduction == "mean":
        total = losses.numel() if weights is None else weights.sum()
        loss = losses.sum() / (total if normalizer is None else normalizer)
    trained = [x for x in inputs if x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss.sum(), trained)]


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "weights",
    [None, pytest.param(WEIGHTS, marks=smoke), WEIGHTS > 0],
    ids=["plain", "float", "bool"],
)
def test_reductions(case, reduction, weights, engine):
    inputs = case.inputs((4,), 17)
    found = reduced(case, inputs, reduction=reduction, weights=weights)
    assert_same(found, by_definition(case, inputs, reduction, weights))


@each_loss
def test_the_mean_is_the_default(case, engine):
    inputs = case.inputs((4,), 17)
    assert torch.equal(case.loss(*inputs, **case.options), case(*inputs, reduction="mean"))


@each_loss
@pytest.mark.parametrize(
    "normalizer",
    [1e6, pytest.param(7, marks=smoke), torch.tensor(2.5, device=DEVICE)],
    ids=str,
)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_a_normalizer_replaces_the_divisor(case, normalizer, weights, engine):
    """1e6: the gradients of a large batch are small, zeros are no better for it."""
    inputs = case.inputs((4,), 17)
    found = reduced(case, inputs, reduction="mean", weights=weights, normalizer=normalizer)
    assert_same(found, by_definition(case, inputs, "mean", weights, normalizer))


@each_loss
def test_weights_keep_the_leading_shape(case, engine):
    inputs = case.inputs((2, 3), 17)
    weights = normal(2, 3).abs()
    found = reduced(case, inputs, weights=weights)
    assert found[0].shape == (2, 3)
    assert_same(found, by_definition(case, inputs, "none", weights))


@each_loss
@pytest.mark.parametrize(
    "bad, n_cols, weights",
    [
        pytest.param(math.nan, 17, WEIGHTS, marks=smoke, id="NaN"),
        pytest.param(-math.inf, 17, WEIGHTS > 0, id="infinities, bool weights"),
        pytest.param(math.nan, 9000, WEIGHTS > 0, id="NaN in long rows"),
    ],
)
def test_an_example_of_weight_0_may_hold_anything(case, bad, n_cols, weights, engine):
    inputs = case.inputs((4,), n_cols, torch.float32)
    expected = reduced(case, inputs, reduction="mean", weights=weights)
    with torch.no_grad():
        inputs[0][1] = inputs[1][1] = bad
    loss, gradient = reduced(case, inputs, reduction="mean", weights=weights)
    assert (gradient[1] == 0).all()
    assert_same([loss, gradient], expected)


@each_loss
@pytest.mark.parametrize(
    "reduction, normalizer",
    [pytest.param("mean", None, marks=smoke), ("mean", 3), ("mean", 0), ("sum", None)],
)
def test_nothing_left_is_a_loss_of_0_on_the_graph(case, reduction, normalizer, engine):
    inputs = case.inputs((3,), 17, torch.float32)
    with torch.no_grad():
        inputs[0].fill_(math.nan)
    nobody = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    for weights in (nobody, nobody.float()):
        loss, gradient = reduced(
            case, inputs, weights=weights, reduction=reduction, normalizer=normalizer
        )
        assert (loss == 0).all() and (gradient == 0).all()


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("examples", [(0,), (2, 0), (0, 3)], ids=str)
def test_an_empty_batch_is_a_loss_of_0_on_the_graph(case, reduction, examples, engine):
    for weights in (None, torch.zeros(examples, device=DEVICE)):
        inputs = case.inputs(examples, 17, torch.float32)
        loss, gradient = reduced(case, inputs, reduction=reduction, weights=weights)
        assert loss == 0 and gradient.shape == (*examples, 17)


@each_loss
def test_weights_may_require_a_gradient(case, engine):
    """A weighting network trains through it; its gradient is the loss of each example."""
    inputs = case.inputs((4,), 17)
    weights = WEIGHTS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(case(*inputs, weights=weights).sum(), weights)
    expected = case.eager(*inputs).detach()
    kept = WEIGHTS != 0
    assert_same([gradient[kept]], [expected[kept]])
