"""Engines, and which tests belong to `make test`.

Without a GPU the kernels run in Triton's interpreter, corrected to round as a GPU does; or, where
PTX_TARGET is the name of a target such as sm_90, they are compiled for it and their PTX is executed
(tests/ptx/). What is marked `full` is left to `make test-all`; that marker is the only mechanism
that chooses.
"""

import hashlib
import os
import time

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
EXECUTED = pytest.StashKey()


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


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput") and PTX_TARGET:
        session.config.workeroutput["emulated"] = executed(session.config)


@pytest.hookimpl(optionalhook=True)  # because pytest-xdist may be missing
def pytest_testnodedown(node, error):
    """Keep what the emulator of another process executed."""
    node.config.stash.setdefault(EXECUTED, []).append(node.workeroutput.get("emulated"))


def executed(config):
    """Return launches, hashes of kernels, instructions and CPU-seconds of this process."""
    emulator = config.emulator
    kernels = [hashlib.sha256(ptx).hexdigest() for ptx in emulator.kernels]
    instructions = sum(launch.instructions for launch in emulator.launches)
    return len(emulator.launches), kernels, instructions, time.process_time()


def pytest_terminal_summary(terminalreporter, config):
    """Say on a line what was executed, in all processes."""
    if not PTX_TARGET:
        return
    import triton

    parts = [part for part in config.stash.get(EXECUTED, []) if part] or [executed(config)]
    launches, kernels, instructions, seconds = zip(*parts, strict=True)
    n_kernels = len({name for names in kernels for name in names})
    passed = len(terminalreporter.stats.get("passed", []))
    terminalreporter.write_line(
        f"PTX of {PTX_TARGET} by triton {triton.__version__}: "
        f"{passed} tests passed, {sum(launches)} launches of {n_kernels} kernels, "
        f"{sum(instructions)} instructions, {sum(seconds):.0f} CPU-seconds"
    )


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Let each engine in turn compute the losses, the portable one in many chunks too."""
    name = request.param
    if name == "portable in chunks":
        in_chunks_of(50, monkeypatch)
    if name == "triton":
        from inputs import DEVICE

        obstacle = triton_obstacle([torch.empty(0, device=DEVICE)])
        if obstacle:
            pytest.skip(f"{obstacle}; TRITON_INTERPRET=1 runs the kernels without one")
    with fastkd.backend(name.split()[0]):
        yield name


# whose rounding an interpreter in numpy cannot show: `make test` runs its kernels as PTX alone
ON_PTX = "test_the_error_is_that_of_the_formula"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Drop kernels that do not exist, and mark `full` what the condition of `quick_if` refuses."""
    kept, dropped = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        case = params.get("case")
        missing = case is not None and not getattr(case, "has_kernels", True)
        on_kernels = params.get("engine") == "triton"
        without = (missing and on_kernels) or (PTX_TARGET and not runs_kernels(item))
        (dropped if without else kept).append(item)
        for marker in item.iter_markers("quick_if"):
            (condition,) = marker.args
            names = condition.__code__.co_varnames[: condition.__code__.co_argcount]
            if not condition(*(params[name] for name in names)):
                item.add_marker(pytest.mark.full)
        # in which a formula is what it is in one chunk
        if params.get("engine") == "portable in chunks" and getattr(case, "problem", "") is None:
            item.add_marker(pytest.mark.full)
        if on_kernels and (item.originalname == ON_PTX) != bool(PTX_TARGET):
            item.add_marker(pytest.mark.full)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def runs_kernels(item):
    """Return whether a test runs kernels, and does not count what the interpreter does."""
    engine = getattr(item, "callspec", None) and item.callspec.params.get("engine")
    fixtures = getattr(item, "fixturenames", ())
    counts = "Meter" in item.function.__code__.co_names
    return not counts and (engine == "triton" or (engine is None and "triton" in fixtures))
