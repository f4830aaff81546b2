"""The memory that the meter counts without a GPU is the memory that a GPU gives."""

import pytest
import torch
from gate import capture
from losses import LOSSES, RELATIONAL
from meter import PeakMemory

import fastkd

pytestmark = pytest.mark.gpu
FUSED = [case for case in LOSSES if case.loss is not fastkd.logit_mse]


def step(case, inputs):
    # not backward(): the gate's stand-in holds on to the gradient, which would make it a copy
    loss = case(*inputs).mean()
    return torch.autograd.grad(loss, inputs[0])


def metered(case, inputs):
    imagined = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in inputs]
    with capture("sm_90"), PeakMemory() as memory:
        step(case, imagined)
    return memory.peak_bytes


def measured(case, inputs):
    step(case, inputs)  # what is allocated once, and stays
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(case, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


PROBLEMS = [
    pytest.param(case, shape, id=f"{case}-{shape}")
    for cases, shapes in (
        (FUSED, [(4096, 32000), (8192, 8192), (4096, 1000), (8, 128256)]),
        (RELATIONAL, [(256, 512), (1024, 512), (2048, 100)]),
    )
    for case in cases
    for shape in shapes
]


@pytest.mark.parametrize("case, shape", PROBLEMS)
def test_metered_peak_is_the_measured_one(case, shape):
    inputs = case.inputs(shape[:1], shape[1], torch.bfloat16)
    expected = metered(case, inputs)
    assert measured(case, inputs) == pytest.approx(expected, rel=0.01, abs=2 << 20)
