"""Without a GPU the kernels run in Triton's interpreter, corrected to round as a GPU does."""

import os

import pytest
import torch

import fastkd
from fastkd._backend import triton_obstacle
from fastkd.portable import _small_divergence, relational
from fastkd.portable import divergence as portable

torch.set_num_threads(1)  # the tests run in two processes on two cores

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.correct()


@pytest.fixture(params=["formula", "portable", "portable in chunks", "triton"])
def engine(request, monkeypatch):
    """Each engine in turn computes the losses of the test; the portable one also as for many."""
    name = request.param
    if name == "portable in chunks":
        name = "portable"
        monkeypatch.setattr(_small_divergence, "_MOST_ELEMENTS", 0)
        for family in (portable, relational):
            monkeypatch.setitem(family._CHUNK_ELEMENTS, "cpu", 50)
    if request.param == "triton":
        from losses import DEVICE

        obstacle = triton_obstacle([torch.empty(0, device=DEVICE)])
        if obstacle:
            pytest.skip(f"{obstacle}; TRITON_INTERPRET=1 runs the kernels without one")
    with fastkd.backend(name):
        yield name
