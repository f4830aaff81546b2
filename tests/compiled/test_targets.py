"""Every loss compiles in every pair of dtypes for every target, and its kernels fit there."""

import pytest
import torch
from choice import quick_if
from targets import CALLS, compile_call

DOUBLE, SINGLE, HALF = torch.float64, torch.float32, torch.bfloat16
# a type that a kernel forgets shows on any target, and what does not fit on the small ones
QUICK = {
    ("total_variation", DOUBLE, SINGLE), ("total_variation", HALF, DOUBLE),
    ("jensen_shannon", DOUBLE, DOUBLE), ("kd", DOUBLE, HALF), ("hint", DOUBLE, SINGLE),
    ("rkd_distance", DOUBLE, DOUBLE), ("attention_transfer", HALF, DOUBLE),
    ("similarity_kl", DOUBLE, HALF), ("info_nce", SINGLE, SINGLE),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=str)
@quick_if(lambda call: call.target == "sm_120" and (call.loss.name, *call.dtypes) in QUICK)
def test_every_pair_of_dtypes_compiles(call):
    compile_call(call)
