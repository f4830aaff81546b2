"""A training step can be captured as a CUDA graph and never waits for the GPU."""

import pytest
import torch
from losses import LOSSES, RELATIONAL

pytestmark = pytest.mark.gpu
# one launch, several programs for a row, and a program for each of many rows
SHAPES = [((64,), 1000), ((3,), 20011), ((150,), 8999)]
# one tile of pairs, and many
PAIRS = [((20,), 33), ((300,), 64)]
PROBLEMS = [
    pytest.param(case, *shape, id=f"{case}-{shape}")
    for cases, shapes in ((LOSSES, SHAPES), (RELATIONAL, PAIRS))
    for case in cases
    for shape in shapes
]
each_problem = pytest.mark.parametrize("case, examples, n_cols", PROBLEMS)


def step(case, inputs):
    loss = case(*inputs).mean()
    return loss, *torch.autograd.grad(loss, inputs[0])


@each_problem
def test_forward_and_backward_in_a_cuda_graph(case, examples, n_cols):
    inputs = case.inputs(examples, n_cols, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled and loaded before the capture
        step(case, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, inputs)
    others = case.inputs(examples, n_cols, torch.bfloat16, seed=5)
    with torch.no_grad():
        for tensor, other in zip(inputs, others, strict=True):
            tensor.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for replayed, expected in zip(captured, step(case, others), strict=True):
        assert torch.equal(replayed, expected)


@each_problem
@pytest.mark.parametrize("weighted", [False, True])
def test_no_step_waits_for_the_gpu(case, examples, n_cols, weighted):
    inputs = case.inputs(examples, n_cols, torch.bfloat16)
    number = torch.tensor(1.5, device=inputs[0].device)
    weights = torch.rand(examples, device=inputs[0].device).round()
    options = {}
    if weighted and case in RELATIONAL:
        options = dict(smooth_l1_beta=number)
    elif weighted:
        options = dict(temperature=number, weights=weights)

    def weighted_step():
        return torch.autograd.grad(case(*inputs, **options).mean(), inputs[0])

    weighted_step()  # loading a kernel may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        weighted_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
