"""Weights, normalizer and reduction: one pure function, tried out with one loss of each shape."""

import itertools
import math

import pytest
import torch
from cases import LOSSES, named
from choice import quick_if
from exactness import assert_same, results
from inputs import DEVICE, normal

TWO = named(
    "jensen_shannon-temperature=2.0-beta=0.1", "kd-temperature=4.0-alpha=0.3-divergence=forward_kl"
)
each_of_two = pytest.mark.parametrize("case", TWO, ids=str)
each_loss = pytest.mark.parametrize("case", [c for c in LOSSES if c.per_example], ids=str)
WEIGHTS = torch.tensor([0.5, 0.0, 2.0, 1.25], dtype=torch.float64, device=DEVICE)


def by_definition(losses, reduction="none", weights=None, normalizer=None):
    weighted = losses if weights is None else losses * weights
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    total = losses.numel() if weights is None else weights.sum()
    return weighted.sum() / (total if normalizer is None else normalizer)


def reduced(case, inputs, **options):
    """Return loss and gradient under an upstream of 1."""
    loss = case(*inputs, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), inputs[0])]


@each_of_two
@pytest.mark.parametrize("weights", [None, WEIGHTS, WEIGHTS > 0], ids=["plain", "float", "bool"])
def test_reductions_and_normalizers(case, weights, engine):
    """1e6: the gradients of a large batch are small, zeros are no better for it."""
    inputs = case.inputs((4,), 17)
    normalizers = [1e6, 7, torch.tensor(2.5, device=DEVICE)]
    ways = [dict(reduction=name) for name in ("mean", "sum", "none")]
    ways += [dict(reduction="mean", normalizer=n) for n in normalizers]
    for way in ways:
        found = reduced(case, inputs, weights=weights, **way)
        expected = by_definition(case.truth(*inputs), weights=weights, **way)
        of_expected = torch.autograd.grad(expected.sum(), inputs[0])
        assert_same(found, [expected.detach(), *of_expected])


@each_of_two
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_a_normalizer_leaves_the_dtype_of_the_loss(case, dtype, engine):
    inputs = case.inputs((4,), 17, torch.float32)
    normalizer = torch.tensor(3, dtype=dtype, device=DEVICE)
    for weights in (None, WEIGHTS):
        found, expected = (
            reduced(case, inputs, weights=weights, normalizer=x, reduction="mean")
            for x in (normalizer, 3)
        )
        assert found[0].dtype == torch.float32
        assert_same(found, expected, 1e-6)


@each_loss
def test_the_mean_is_the_default_and_weights_have_the_leading_shape(case, engine):
    shape = (2, 3) if case.problem == "rows" else (6,)
    inputs = case.inputs(shape, 17)
    weights = normal(*shape).abs()
    assert torch.equal(case.loss(*inputs, **case.options), case(*inputs, reduction="mean"))
    found = results(lambda *x: case(*x, weights=weights), inputs)
    assert_same(found, results(lambda *x: case.truth(*x) * weights, inputs))


@each_loss
@pytest.mark.parametrize("bad, n_cols", [(math.nan, 17), (-math.inf, 17), (math.nan, 8999)])
@quick_if(lambda case, n_cols, engine: case in TWO or (n_cols == 17 and engine != "triton"))
def test_an_example_of_weight_0_may_hold_anything(case, bad, n_cols, engine):
    inputs = case.inputs((4,), n_cols, torch.float32)
    kinds = (WEIGHTS, WEIGHTS > 0) if n_cols == 17 else (WEIGHTS > 0,)
    expected = [reduced(case, inputs, reduction="mean", weights=w) for w in kinds]
    with torch.no_grad():
        for x in inputs[:2]:
            x[1] = bad if x.is_floating_point() else -100
    for weights, true in zip(kinds, expected, strict=True):
        found = reduced(case, inputs, reduction="mean", weights=weights)
        assert not found[1][1].any()
        assert_same(found, true)


@each_of_two
def test_a_masked_row_has_no_gradient_even_of_an_infinite_upstream(case, engine):
    for n_cols in (17, 8999):
        inputs = case.inputs((3,), n_cols)
        losses = case(*inputs, weights=torch.tensor([1.0, 0.0, 2.0], device=DEVICE))
        upstream = torch.tensor([1.0, math.nan, math.inf], dtype=losses.dtype, device=DEVICE)
        (gradient,) = torch.autograd.grad(losses, inputs[0], upstream)
        assert not gradient[1].any()
        assert gradient[0].isfinite().all() and not gradient[2].isfinite().all()


@each_of_two
def test_where_no_example_is_left_the_loss_is_0_and_on_the_graph(case, engine):
    inputs = case.inputs((3,), 17, torch.float32)
    with torch.no_grad():
        inputs[0].fill_(math.nan)
    nobody = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    ways = (("mean", None), ("mean", 3), ("mean", 0), ("sum", None))
    ways += (("mean", torch.tensor(0, device=DEVICE)), ("mean", torch.tensor(0.0, device=DEVICE)))
    for weights, (reduction, normalizer) in itertools.product((nobody, nobody.float()), ways):
        options = dict(weights=weights, reduction=reduction, normalizer=normalizer)
        assert not any(x.any() for x in reduced(case, inputs, **options))
    for examples, reduction in itertools.product([(0,), (2, 0), (0, 3)], ("mean", "sum")):
        for weights in (None, torch.zeros(examples, device=DEVICE)):
            empty = case.inputs(examples, 17, torch.float32)
            loss, gradient = reduced(case, empty, reduction=reduction, weights=weights)
            assert loss == 0 and gradient.shape == (*examples, 17)


@each_of_two
def test_weights_may_require_a_gradient(case, engine):
    """A weighting network trains through it; its gradient is the loss of each example."""
    inputs = case.inputs((4,), 17)
    weights = WEIGHTS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(case(*inputs, weights=weights).sum(), weights)
    kept = WEIGHTS != 0
    assert_same([gradient[kept]], [case.truth(*inputs)[kept]])
