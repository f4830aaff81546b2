"""Contrastive losses and the divergence of similarities on the GPU: tiles, and chunks of cuBLAS."""

import pytest
import torch
from contrasts import each_case, each_loss
from exactness import assert_as_exact, exact, results

import fastkd

pytestmark = pytest.mark.gpu
# by tiles, the widest ones, and by chunks in half precision; float32 goes by chunks
each_shape = pytest.mark.parametrize("n, width", [(67, 33), (700, 256), (300, 500)], ids=str)


@each_case
@pytest.mark.parametrize(
    "n, width, dtype",
    [
        (67, 33, torch.bfloat16),
        (700, 256, torch.bfloat16),
        (300, 500, torch.bfloat16),
        (300, 500, torch.float16),
        (67, 33, torch.float32),
        (67, 33, torch.float64),
    ],
    ids=str,
)
def test_as_exact_as_the_formula(case, n, width, dtype):
    inputs = case.inputs((n,), width, dtype)
    truth, yardstick = reference(case, exact(inputs)), reference(case, inputs)
    found = results(case, inputs)
    if dtype.itemsize > 2:
        assert_as_exact(found, yardstick, truth, times=4)
        return
    assert_as_exact(found[:1], yardstick[:1], truth[:1], times=4)
    for x, y in zip(found[1:], truth[1:], strict=True):  # slopes are rounded once more
        assert (x.double() - y).abs().max() <= torch.finfo(dtype).eps * y.abs().max()


def reference(case, inputs):
    with fastkd.backend("formula"):
        return results(case, inputs)


@each_loss
@each_shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_three_runs_agree_bit_for_bit(case, n, width, dtype):
    inputs = case.inputs((n,), width, dtype)
    first, *others = (results(case, inputs) for _ in range(3))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@each_loss
@pytest.mark.parametrize("width", [256, 512])
def test_no_matrix_of_similarities(case, width):
    """Of 32768 examples it would be 4 GB in float32."""
    inputs = case.inputs((32768,), width, torch.bfloat16)
    results(case, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(case, inputs)
    assert torch.cuda.max_memory_allocated() - before < 1 << 31
