"""Whatever the shapes, the numbers and the options: the engines equal the formula.

HYPOTHESIS_PROFILE=explore looks for new counterexamples; else the examples are always the same.
"""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from losses import CASES, DEVICE

import fastkd

quiet = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("ci", derandomize=True, database=None, max_examples=60, **quiet)
settings.register_profile("explore", max_examples=3000, **quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@some.composite
def problems(draw):
    """A loss, inputs in any layout with masked classes, and options."""
    case = draw(some.sampled_from(CASES))
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


@pytest.mark.parametrize("engine", ["portable", "portable in chunks", "triton"], indirect=True)
@given(problems())
def test_engines_equal_the_formula(engine, problem):
    case, inputs, options = problem
    found, expected = [], []
    for backend, results in ((engine, found), ("formula", expected)):
        with fastkd.backend(backend):
            loss = case(*inputs, **options)
            results += [loss.detach(), *torch.autograd.grad(loss.sum(), inputs[0])]
    size = max(1.0, options["temperature"] ** 2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11 * size, equal_nan=True)
