"""What PyTorch's users may expect of every loss of a batch, one function for each promise."""

import pytest
import torch
from exactness import assert_same, results
from losses import DEVICE
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint


def agrees_with_itself(case, inputs):
    for first, second in zip(results(case, inputs), results(case, inputs), strict=True):
        assert torch.equal(first, second)


def maps_over_batches(case, inputs, trained=0):
    """torch.func: the gradient in the arguments `trained`, of each batch and of all at once."""
    inputs = [x.detach() for x in inputs]
    gradient_and_value = torch.func.grad_and_value(case, trained)
    single = [tree_leaves(gradient_and_value(*batch)) for batch in zip(*inputs, strict=True)]
    found = torch.func.vmap(gradient_and_value)(*inputs)
    assert_same(tree_leaves(found), [torch.stack(x) for x in zip(*single, strict=True)])
    first = [x[0].clone() for x in inputs]
    places = (trained,) if isinstance(trained, int) else trained
    wanted = [first[i].requires_grad_() for i in places]
    assert_same(single[0][:-1], torch.autograd.grad(case(*first), wanted))


def survives_checkpoint(case, inputs, reentrant):
    trained = [x for x in inputs if x.requires_grad]
    expected = torch.autograd.grad(case(*inputs), trained)
    checkpoint(case, *inputs, use_reentrant=reentrant).backward()
    assert_same([x.grad for x in trained], expected)


def ignores_autocast(case, inputs, dtype, engine):
    trained = [x for x in inputs if x.requires_grad]
    expected = case(*inputs)
    with torch.autocast(DEVICE.type, dtype):
        found = case(*inputs)
        if engine != "formula":  # of which autograd makes the backward
            inside = torch.autograd.grad(found, trained, retain_graph=True)
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(expected, trained)
    for each in (torch.autograd.grad(found, trained), gradients if engine == "formula" else inside):
        assert all(torch.equal(x, y) for x, y in zip(each, gradients, strict=True))


def compiles(case, inputs):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: case(*x) * 1.5, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, inputs), results(lambda *x: case(*x) * 1.5, inputs))
    with torch.no_grad():
        assert_same([compiled(*inputs)], [case(*inputs) * 1.5])


def says_how_to_differentiate_twice(case, inputs, engine):
    first, *others = inputs
    if engine == "formula":
        assert torch.autograd.gradgradcheck(lambda x: case(x, *others), [first])
        return
    (gradient,) = torch.autograd.grad(case(*inputs), first, create_graph=True)
    with pytest.raises(RuntimeError, match=r'Double backward .* fastkd.backend\("formula"\)'):
        gradient.square().sum().backward()
