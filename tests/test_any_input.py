"""Whatever the shapes, the numbers and the options: the engines equal the formula.

HYPOTHESIS_PROFILE=explore looks for new counterexamples; else the examples are always the same.
"""

import math
import os

import pytest
import torch
from cases import named, of
from choice import quick_if
from exactness import exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from inputs import DEVICE

import fastkd

quiet = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("ci", derandomize=True, database=None, max_examples=20, **quiet)
settings.register_profile("explore", max_examples=3000, **quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
ROWS = [x for x in of("rows") if x.per_example and x.name != "ibot"]  # whose rows are masked
NUMBERS = {
    "temperature": some.floats(0.1, 20),
    "student_temperature": some.floats(0.1, 5),
    "teacher_temperature": some.floats(0.1, 5),
    "negative_weight": some.floats(0.1, 3),
    "margin": some.floats(-0.5, 0.5),
    "logit_scale": some.floats(0.1, 30),
    "logit_bias": some.floats(-5, 5),
    "distance_weight": some.floats(0, 5),
    "angle_weight": some.floats(0, 5),
    "smooth_l1_beta": some.floats(0, 3),
    "gamma": some.floats(0, 2),
}


def strided(draw, tensor):
    """Return the tensor in some layout."""
    return draw(
        some.sampled_from(
            [
                lambda x: x,
                lambda x: torch.nn.functional.pad(x, (0, 2))[..., :-2],
                lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
                lambda x: x.repeat_interleave(2, 0)[::2] if x.ndim else x,
            ]
        )
    )(tensor)


@some.composite
def rows(draw):
    """Draw a loss of logits, inputs in any layout with masked classes, and options."""
    case = draw(some.sampled_from(ROWS))
    examples = tuple(draw(some.lists(some.integers(0, 4), max_size=3)))
    n_cols = draw(some.integers(1, 40))
    # one more row and column, cut off again: strides that are not the usual ones
    more = draw(some.booleans())
    inputs = case.inputs(
        tuple(n + more for n in examples), n_cols + more, seed=draw(some.integers(0, 99))
    )
    size = draw(some.sampled_from([0.0, 0.01, 1.0, 30.0]))
    masked = draw(some.lists(some.integers(1, 40), max_size=5))
    cut = [slice(n) for n in examples]
    student, teacher = (size * x.detach()[(*cut, slice(n_cols))] for x in inputs[:2])
    mask = torch.zeros(n_cols, dtype=torch.bool, device=DEVICE)
    mask[[column for column in masked if column < n_cols]] = True
    for logits in (student, teacher):
        logits.masked_fill_(mask, -math.inf)
    labels = [0 * x[tuple(cut)] for x in inputs[2:]]
    options = dict(
        temperature=draw(some.floats(0.1, 20)),
        scale_t2=draw(some.booleans()),
        reduction=draw(some.sampled_from(["mean", "sum", "none"])),
    )
    kind = draw(some.sampled_from([None, torch.float64, torch.bool]))
    if kind:
        generator = torch.Generator().manual_seed(draw(some.integers(0, 9)))
        weights = torch.rand(examples, generator=generator, dtype=torch.float64) - 0.4
        options["weights"] = weights.clamp(min=0).to(DEVICE, kind)
    return case, [student.requires_grad_(), teacher, *labels], options


@some.composite
def batches(draw, problem):
    """Draw a loss of a whole batch, inputs of any size in any layout, and its numbers."""
    case = draw(some.sampled_from([case for case in of(problem) if not case.per_example]))
    n, width = draw(some.integers(0, 24)), draw(some.integers(1, 12))
    inputs = case.inputs((n,), width, seed=draw(some.integers(0, 99)))
    size = draw(some.sampled_from([0.01, 1.0, 10.0])) if "unit" not in case.note else 1.0
    alike = draw(some.booleans()) and n > 3
    for i, x in enumerate(inputs):
        if x.is_floating_point():
            x = x.detach() * size
            if alike and case.problem != "relations":
                x[1:3] = x[:1]
            inputs[i] = strided(draw, x).requires_grad_(inputs[i].requires_grad)
    return case, inputs, {k: draw(NUMBERS[k]) for k in case.options if k in NUMBERS}


def assert_engine_equals_formula(engine, case, inputs, options):
    found, expected = [], []
    trained = [x for x in inputs if x.requires_grad]
    for backend, kept in ((engine.split()[0], found), ("formula", expected)):
        with fastkd.backend(backend):
            loss = case(*inputs, **options)
            kept += [loss.detach(), *torch.autograd.grad(loss.sum(), trained)]
    size = max(1.0, options.get("temperature", 1.0) ** 2)
    for x, y in zip(found, expected, strict=True):
        finite = y[y.isfinite()]
        largest = float(finite.abs().max()) if finite.numel() and not case.per_example else 0.0
        most = 1e-11 * size + 1e-10 * largest
        torch.testing.assert_close(x, y, rtol=1e-9, atol=most, equal_nan=True)


@given(rows())
def test_rows(engine, problem):
    assert_engine_equals_formula(engine, *problem)


@pytest.mark.parametrize("problem", ["pairs", "relations", "gram", "rows", "sorted_rows"])
@quick_if(lambda problem, engine: engine != "triton")
@given(some.data())
def test_batches(engine, problem, data):
    case, inputs, options = data.draw(batches(problem))
    if engine == "triton" and not case.has_kernels:
        engine = "portable"
    assert_engine_equals_formula(engine, case, inputs, options)


def test_few_pairs_are_as_exact_as_the_formula():
    """Their errors do not average out, and those of a student near its teacher show most."""
    (case,) = named("similarity_kl")
    errors = {"portable": [], "formula": []}
    for seed in range(40):
        difference, teacher = case.inputs((3,), 5, torch.float32, seed=seed)
        teacher = teacher[:, :5]
        inputs = [teacher + 0.1 * difference.detach(), teacher]
        truth = case.truth(*exact(inputs)).detach()
        for engine, found in errors.items():
            with fastkd.backend(engine):
                found.append((case(*inputs).detach().double() - truth).abs() / truth)
    # how one number is rounded is luck, which differs from one processor to the next
    for measure in (torch.max, torch.median):
        ours, of_formula = (measure(torch.stack(found)) for found in errors.values())
        assert ours <= 2 * of_formula + 1e-6
