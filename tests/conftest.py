"""Engines, and which tests belong to `make test`.

Without a GPU the kernels run in Triton's interpreter, corrected to round as a GPU does. What is
marked `full` is left to `make test-all`; that marker is the only mechanism that chooses.
"""

import os

import pytest
import torch
from choice import ENGINES
from force import in_chunks_of

import fastkd
from fastkd._backend import triton_obstacle

torch.set_num_threads(1)  # because the tests run in two processes on two cores

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.correct()


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Let each engine in turn compute the losses, the portable one in many chunks too."""
    name = request.param
    if name == "portable in chunks":
        in_chunks_of(50, monkeypatch)
    if name == "triton":
        from cases import DEVICE

        obstacle = triton_obstacle([torch.empty(0, device=DEVICE)])
        if obstacle:
            pytest.skip(f"{obstacle}; TRITON_INTERPRET=1 runs the kernels without one")
    with fastkd.backend(name.split()[0]):
        yield name


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Drop kernels that do not exist, and mark `full` what the condition of `quick_if` refuses."""
    kept, dropped = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        case = params.get("case")
        missing = case is not None and not getattr(case, "has_kernels", True)
        (dropped if missing and params.get("engine") == "triton" else kept).append(item)
        for marker in item.iter_markers("quick_if"):
            (condition,) = marker.args
            names = condition.__code__.co_varnames[: condition.__code__.co_argcount]
            if not condition(*(params[name] for name in names)):
                item.add_marker(pytest.mark.full)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
