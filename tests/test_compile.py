"""torch.compile: one graph forward and backward, whatever varies from step to step."""

from functools import partial

import pytest
import torch
from exactness import assert_same, results
from losses import DEVICE, LOSSES, each_loss

a_few = pytest.mark.parametrize("case", [LOSSES[0], LOSSES[2], LOSSES[-1]], ids=str)


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that traces forward and backward as Inductor's, and generates no code."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)


@each_loss
def test_one_graph_with_the_same_results(case, engine):
    inputs = case.inputs((3,), 17)
    counting = Counting()
    compiled = torch.compile(
        lambda x, *xs: case(x * 1, *xs) * 1.5, backend=counting, fullgraph=True
    )
    expected = results(lambda *xs: case(*xs) * 1.5, inputs)
    assert_same(results(compiled, inputs), expected)
    assert counting.graphs == 1


def graphs_of_steps(case, steps, dynamic=None):
    """How many graphs were compiled until each step; the results of all are those of eager mode."""
    counting, counts = Counting(), []
    compiled = torch.compile(case, backend=counting, fullgraph=True, dynamic=dynamic)
    for inputs, options in steps:
        found = results(partial(compiled, **options), inputs)
        assert_same(found, results(partial(case, **options), inputs))
        counts.append(counting.graphs)
    return counts


@a_few
def test_a_new_batch_size_compiles_nothing(case, engine):
    steps = [(case.inputs((n_rows,), 17), {}) for n_rows in (5, 6, 9, 33)]
    counts = graphs_of_steps(case, steps, dynamic=True)
    assert counts == counts[:1] * 4


@pytest.mark.parametrize(
    "case, option",
    [
        (LOSSES[0], "temperature"),
        (LOSSES[-1], "temperature"),
        (LOSSES[-1], "alpha"),
        (LOSSES[2], "beta"),
        (LOSSES[3], "skew"),
    ],
    ids=str,
)
def test_a_new_number_compiles_nothing(case, option, engine):
    """Schedules change it at every step. The first is a constant, the second makes it vary."""
    inputs = case.inputs((3,), 17)
    counts = graphs_of_steps(case, [(inputs, {option: x}) for x in (0.15, 0.2, 0.3, 0.45)])
    assert counts[1:] == counts[1:2] * 3


@a_few
def test_a_new_temperature_in_a_tensor_compiles_nothing(case, engine):
    temperatures = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (1.5, 2.0, 3.0))
    inputs = case.inputs((3,), 17)
    counts = graphs_of_steps(case, [(inputs, dict(temperature=x)) for x in temperatures])
    assert counts == counts[:1] * 3


@a_few
@pytest.mark.parametrize("dtype", [torch.float64, torch.bool], ids=str)
def test_weights_and_the_mean(case, dtype, engine):
    inputs = case.inputs((4,), 17)
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0], device=DEVICE).to(dtype)
    options = [dict(weights=weights), dict(weights=weights, normalizer=weights.sum())]
    graphs_of_steps(case, [(inputs, dict(reduction="mean", **given)) for given in options])


@a_few
def test_evaluation(case, engine):
    inputs = case.inputs((3,), 17)
    compiled = torch.compile(case, backend=Counting(), fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same([compiled(*inputs)], [case(*inputs)])
    constants = [x.detach() for x in inputs]
    assert_same([compiled(*constants)], [case(*constants)])


def test_inductor(engine):
    """Generated code around the op; two hidden layers fuse as they would without it."""
    case = LOSSES[0]
    inputs = case.inputs((3,), 17, torch.float32)
    compiled = torch.compile(lambda x, y: case(x.sin(), y.cos()), fullgraph=True)
    expected = results(lambda x, y: case(x.sin(), y.cos()), inputs)
    assert_same(results(compiled, inputs), expected, tolerance=1e-5)


@a_few
def test_autocast_in_a_compiled_graph(case, engine):
    """There autocast is off inside the op, in eager mode it is on: the engines switch it off."""
    inputs = case.inputs((3,), 17, torch.float32)
    compiled = torch.compile(case, backend=Counting(), fullgraph=True)
    expected = results(case, inputs)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert_same(results(compiled, inputs), expected, tolerance=1e-6)


@a_few
def test_export(case, engine):
    class Training(torch.nn.Module):
        def forward(self, *inputs):
            return case(*inputs)

    inputs = tuple(x.detach() for x in case.inputs((3,), 17))
    exported = torch.export.export(Training(), inputs)
    assert_same([exported.module()(*inputs)], [case(*inputs)])
