"""A training step can be captured as a CUDA graph, never waits, and takes its memory."""

import pytest
import torch
from cases import LOSSES
from gate import capture
from meter import PeakMemory

pytestmark = pytest.mark.gpu
# one launch, several programs for a row, and a program for each of many rows; tiles, one and many
SHAPES = {"rows": [((64,), 1000), ((3,), 20011), ((150,), 8999)], "pairs": [((300,), 64)]}
SHAPES["ensembles"] = SHAPES["corrected"] = SHAPES["peers"] = SHAPES["rows"]
SHAPES["relations"] = [((20,), 33), ((300,), 64)]
SHAPES["moments"], SHAPES["tokens"] = [((20,), 64)], [((3,), 16)]
SHAPES["linear"] = [((1500,), 64)]
LARGE = {"rows": [(4096, 32000), (8192, 8192), (4096, 1000), (8, 128256)], "pairs": []}
LARGE["ensembles"] = LARGE["corrected"] = LARGE["peers"] = LARGE["rows"]
LARGE["linear"] = []  # whose memory is that of its heads
LARGE["moments"], LARGE["tokens"] = [(256, 64)], [(64, 32)]
LARGE["relations"] = [(256, 512), (1024, 512), (2048, 100)]
KERNELS = [case for case in LOSSES if case.has_kernels and case.name != "dino"]


def each(shapes):
    found = [(case, shape) for case in KERNELS for shape in shapes[case.problem]]
    return pytest.mark.parametrize("case, shape", found, ids=str)


def step(case, inputs, **options):
    # not backward(): the gate's stand-in holds on to the gradient, which would make it a copy
    loss = case(*inputs, **options).mean()
    return loss, *torch.autograd.grad(loss, inputs[0])


@each(SHAPES)
def test_forward_and_backward_in_a_cuda_graph(case, shape):
    inputs = case.inputs(*shape, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled and loaded before the capture
        step(case, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, inputs)
    others = case.inputs(*shape, torch.bfloat16, seed=5)
    with torch.no_grad():
        for tensor, other in zip(inputs, others, strict=True):
            tensor.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for replayed, expected in zip(captured, step(case, others), strict=True):
        assert torch.equal(replayed, expected)


@each(SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_step_waits_for_the_gpu(case, shape, weighted):
    inputs = case.inputs(*shape, torch.bfloat16)
    options = {}
    if weighted and case.per_example:
        number = torch.tensor(1.5, device=inputs[0].device)
        options = dict(temperature=number, weights=torch.rand(shape[0], device=number.device))
    step(case, inputs, **options)  # loading a kernel may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, inputs, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", [c for c in LOSSES if c.problem == "pairs"], ids=str)
@pytest.mark.parametrize("width", [256, 512])
def test_no_matrix_of_similarities(case, width):
    """A matrix of 32768 examples would be 4 GB in float32."""
    inputs = case.inputs((32768,), width, torch.bfloat16)
    step(case, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(case, inputs)
    assert torch.cuda.max_memory_allocated() - before < 1 << 31


@each(LARGE)
def test_metered_peak_is_the_measured_one(case, shape):
    """The memory that the meter counts without a GPU is the memory that a GPU gives."""
    inputs = case.inputs(shape[:1], shape[1], torch.bfloat16)
    imagined = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in inputs]
    with capture("sm_90"), PeakMemory() as memory:
        step(case, imagined)
    step(case, inputs)  # what is allocated once, and stays
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(case, inputs)
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    assert found == pytest.approx(memory.peak_bytes, rel=0.01, abs=2 << 20)
