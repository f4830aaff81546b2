"""Engines, and which tests belong to `make test`.

Without a GPU the kernels run in Triton's interpreter, corrected to round as a GPU does; or, where
PTX_TARGET is the name of a target such as sm_90, they are compiled for it and their PTX is executed
(tests/ptx/). What is marked `full` is left to `make test-all`; that marker is the only mechanism
that chooses.
"""

import os

import pytest
import torch
from choice import ENGINES
from force import in_chunks_of

import fastkd
from fastkd import _backend
from fastkd._backend import triton_obstacle

torch.set_num_threads(1)  # because the tests run in two processes on two cores

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.correct()

PTX_TARGET = os.environ.get("PTX_TARGET")


def pytest_configure(config):
    """Let an emulated GPU execute the PTX of kernels, for all of the session."""
    if PTX_TARGET:
        from ptx.triton_driver import emulated

        emulator = emulated(PTX_TARGET)
        config.emulator = emulator.__enter__()
        config.add_cleanup(lambda: emulator.__exit__(None, None, None))
        # it takes the tensors of a CPU, as the interpreter does
        _backend._interpreted = _backend.interpreter_knows_bfloat16 = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail where the emulator saw a race, an access outside or another fault."""
    emulator = getattr(item.config, "emulator", None)
    if emulator is None:
        return (yield)
    emulator.problems.clear()
    result = yield
    if emulator.problems:
        pytest.fail("\n".join(map(str, emulator.problems)), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "emulator"):
        import triton

        summary = f"PTX of {PTX_TARGET} by triton {triton.__version__}: {config.emulator.summary()}"
        terminalreporter.write_line(summary)


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
