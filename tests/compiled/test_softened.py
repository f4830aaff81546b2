"""Both networks' gradients as they are compiled: launches, bytes and spills."""

import itertools

import pytest
import torch
from budgets import TARGETS, VERSION
from choice import quick_if
from counts import resources
from gate import capture
from step import count
from workloads import BOTH

import fastkd

HAS_LINKER = tuple(map(int, VERSION.split("."))) >= (3, 5)  # which gfx942 needs
HALF, DOUBLE = torch.bfloat16, torch.float64
DTYPES = [*itertools.product((HALF, torch.float32), repeat=2), (DOUBLE, DOUBLE)]
ON_CHIP = ["whole_rows", "both_of_whole_rows"]
LONG = ["row_statistics", "both_gradients", "finish_rows"]


@pytest.mark.parametrize("case", BOTH, ids=lambda x: x.name)
@pytest.mark.parametrize(
    ("shape", "kernels"), [((4096, 1000), ON_CHIP), ((4096, 8192), ON_CHIP), ((2048, 128256), LONG)]
)
@quick_if(lambda case, shape: shape != (4096, 8192) and case.case.name == "forward_kl")
def test_logits_are_read_once_for_both_gradients(case, shape, kernels):
    """4 bytes an entry in the forward, and 4 read and 4 written in the backward."""
    step = count(case, shape, HALF)
    ours = [x for x in step.operations if x.is_kernel]
    assert [x.name for x in ours] == kernels
    n_entries = shape[0] * shape[1]
    assert 12 <= sum(x.read + x.written for x in ours) / n_entries <= 12.05
    assert 12 <= step.bytes / n_entries <= 12.1 and step.launches <= len(kernels) + 8


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", BOTH, ids=lambda x: x.name)
@pytest.mark.parametrize("n_cols", [10, 1000, 8192, 32000])
@quick_if(
    lambda target, dtypes, case, n_cols: (
        (target, dtypes, n_cols) in (("sm_90", (HALF, HALF), 8192), ("sm_90", (HALF, HALF), 32000))
        and case.case.name == "symmetric_kl"
    )
)
def test_nothing_spills_with_temperatures_either(target, dtypes, case, n_cols):
    if target == "gfx942" and not HAS_LINKER:
        pytest.skip("needs an external ld.lld before triton 3.5")
    inputs = [torch.empty(2048, n_cols, dtype=x, device="meta", requires_grad=True) for x in dtypes]
    inputs.append(torch.empty(2048, device="meta", requires_grad=True))
    with capture(target) as found, fastkd.backend("triton"):
        loss = case.case.loss(*inputs[:2], temperature=inputs[2], teacher_gradient=True)
        torch.autograd.grad(loss, inputs)
    assert not any(resources(x, 1)["spills"] for x in found if x.name != "kernel")
