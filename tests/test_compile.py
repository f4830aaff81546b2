"""torch.compile: nothing is compiled anew where only numbers and sizes vary from step to step."""

from functools import partial

import pytest
import torch
from cases import named
from choice import full, quick_if
from exactness import assert_same, results
from inputs import DEVICE

import fastkd

FORWARD_KL, JSD, KD, SKEW, RKD, DIST, NCE, CLIP, SIGLIP, NT_XENT, SUP_CON, SOFT = named(
    "forward_kl-temperature=4.0", "jensen_shannon-temperature=2.0-beta=0.1",
    "kd-temperature=4.0-alpha=0.3-divergence=forward_kl", "skew_kl-temperature=2.0-skew=0.1",
    "rkd", "dist_kd", "info_nce", "clip_contrastive-logit_scale=5.0",
    "siglip-logit_scale=5.0-logit_bias=-2.0", "nt_xent", "sup_con", "similarity_kl",
)  # fmt: skip
THREE = [FORWARD_KL, JSD, KD]
each_of_three = pytest.mark.parametrize("case", THREE, ids=str)
quick = quick_if(lambda case, engine: engine == "portable" and case not in THREE[:2])


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


def graphs_of_steps(case, steps, dynamic=None):
    """Return how many graphs were compiled until each step, all of which equal eager mode's."""
    counting, counts = Counting(), []
    compiled = torch.compile(case, backend=counting, fullgraph=True, dynamic=dynamic)
    for inputs, options in steps:
        found = results(partial(compiled, **options), inputs)
        assert_same(found, results(partial(case, **options), inputs))
        counts.append(counting.graphs)
    return counts


@pytest.mark.parametrize("case", [*THREE, RKD, DIST], ids=str)
@quick
def test_a_new_batch_size_compiles_nothing(case, engine):
    steps = [(case.inputs((n_rows,), 17), {}) for n_rows in (5, 6, 33)]
    counts = graphs_of_steps(case, steps, dynamic=True)
    assert counts == counts[:1] * 3


NUMBERS = [
    (FORWARD_KL, ["temperature"]),
    (KD, ["temperature", "alpha"]),
    (JSD, ["beta"]),
    (SKEW, ["skew"]),
    (RKD, ["distance_weight", "smooth_l1_beta"]),
    (DIST, ["beta"]),
    (NCE, ["temperature", "negative_weight", "margin"]),
    (CLIP, ["logit_scale"]),
    (SIGLIP, ["logit_scale", "logit_bias"]),
    (NT_XENT, ["temperature"]),
    (SUP_CON, ["temperature"]),
    (SOFT, ["student_temperature"]),
]


@pytest.mark.parametrize("case, options", NUMBERS, ids=str)
@quick_if(lambda case, engine: engine == "portable" and case in (KD, RKD, DIST, NCE, SOFT))
def test_a_new_number_compiles_nothing(case, options, engine):
    """Schedules change it at every step. The first is a constant, the second makes it vary."""
    inputs = case.inputs((9,), 7)
    steps = [(inputs, dict.fromkeys(options, x)) for x in (0.15, 0.2, 0.45)]
    counts = graphs_of_steps(case, steps)
    assert counts[1:] == counts[1:2] * 2


@pytest.mark.parametrize("case, options", NUMBERS, ids=str)
def test_a_number_in_a_tensor_is_not_looked_at(case, options):
    """That would wait for a GPU, and tensors on the meta device have nothing to look at."""
    numbers = {name: torch.empty((), device="meta") for name in options}
    with fastkd.backend("portable"):
        assert case(*case.inputs((9,), 7, device="meta"), **numbers).is_meta


@each_of_three
@quick
def test_numbers_in_tensors_and_weights(case, engine):
    inputs = case.inputs((4,), 17)
    numbers = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (1.5, 2.0, 3.0))
    counts = graphs_of_steps(case, [(inputs, dict(temperature=x)) for x in numbers])
    assert counts == counts[:1] * 3
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0], device=DEVICE)
    for given in (dict(weights=weights > 0), dict(weights=weights, normalizer=weights.sum())):
        graphs_of_steps(case, [(inputs, dict(reduction="mean", **given))])


@each_of_three
@quick
def test_evaluation_and_export(case, engine):
    inputs = case.inputs((3,), 17)
    compiled = torch.compile(case, backend=Counting(), fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same([compiled(*inputs)], [case(*inputs)])
    constants = tuple(x.detach() for x in inputs)
    assert_same([compiled(*constants)], [case(*constants)])

    class Training(torch.nn.Module):
        def forward(self, *inputs):
            return case(*inputs)

    exported = torch.export.export(Training(), constants)
    assert_same([exported.module()(*constants)], [case(*constants)])


@full
def test_inductor(engine):
    """Code is generated around the op; two hidden layers fuse as they would without it."""
    inputs = FORWARD_KL.inputs((3,), 17, torch.float32)

    def between_layers(x, y):
        return FORWARD_KL(x.sin(), y.cos())

    compiled = torch.compile(between_layers, fullgraph=True)
    assert_same(results(compiled, inputs), results(between_layers, inputs), tolerance=1e-5)


@pytest.mark.parametrize("module", [fastkd.SkewKLLoss, pytest.param(fastkd.KDLoss, marks=full)])
def test_modules_compile_without_a_break(module):
    loss, inputs = module(temperature=2.0), (KD if module is fastkd.KDLoss else JSD).inputs((3,), 7)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, inputs), results(loss, inputs))
