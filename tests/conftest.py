"""Without a GPU the kernels run in Triton's interpreter, corrected to round as a GPU does."""

import importlib.util
import os

import pytest
import torch

import fastkd
from fastkd._engine import triton_obstacle

torch.set_num_threads(1)  # the tests run in two processes on two cores

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.correct()


@pytest.fixture(params=["formula", "portable", "triton"])
def engine(request):
    """Each engine in turn computes the losses of the test."""
    if request.param == "triton":
        from losses import DEVICE

        if importlib.util.find_spec("fastkd.kernels.divergence") is None:
            pytest.skip("kernels/divergence.py is not written yet")
        obstacle = triton_obstacle([torch.empty(0, device=DEVICE)])
        if obstacle:
            pytest.skip(f"{obstacle}; TRITON_INTERPRET=1 runs the kernels without one")
    with fastkd.backend(request.param):
        yield request.param
