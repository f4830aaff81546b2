"""Which engine runs, how to choose one, and what importing fastkd brings along."""

import asyncio
import contextvars
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch._dynamo.testing
from inputs import DEVICE, normal

import fastkd
from fastkd import _backend, _op


def engine_in_use():
    return _backend.choose([torch.zeros(2, 3, device=DEVICE)])


def run_python(code, folder, **environment):
    """Run code in a process of its own, from a folder without fastkd's sources."""
    environment = {**os.environ, "FASTKD_BACKEND": "auto", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_backends_nest_and_end():
    outside = engine_in_use()
    with fastkd.backend("portable"):
        assert engine_in_use() == "portable"
        with fastkd.backend("formula"):
            assert engine_in_use() == "formula"
        assert engine_in_use() == "portable"
        with pytest.raises(KeyError), fastkd.backend("formula"):
            raise KeyError
        assert engine_in_use() == "portable"
    assert engine_in_use() == outside


def test_a_backend_decorates_even_what_calls_itself():
    outside = engine_in_use()

    @fastkd.backend("formula")
    def engines(depth):
        inner = engines(depth - 1) if depth else []
        return [*inner, engine_in_use()]

    assert engines(2) == ["formula"] * 3
    assert engine_in_use() == outside


def test_a_backend_decorates_nothing_whose_body_begins_later():
    async def coroutine():
        return engine_in_use()

    def generator():
        yield engine_in_use()

    for function in (coroutine, generator):
        with pytest.raises(TypeError, match=f"{function.__name__}.* put the `with` block into"):
            fastkd.backend("formula")(function)


def in_thread(function):
    """Return what the function returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_a_choice_belongs_to_its_thread(monkeypatch):
    monkeypatch.setattr(_backend, "_default", "portable")
    assert in_thread(_backend.chosen) == "portable"
    with fastkd.backend("formula"):
        assert in_thread(_backend.chosen) == "portable"  # as torch.no_grad, it is not inherited
        leave, entered = threading.Event(), threading.Event()

        def other():
            with fastkd.backend("auto"):
                entered.set()
                leave.wait()
            return _backend.chosen()

        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
        assert _backend.chosen() == "formula"
    leave.set()
    thread.join()
    assert in_thread(_backend.chosen) == "portable"


def test_a_choice_belongs_to_its_task():
    outside, order = _backend.chosen(), []

    async def task(name):
        with fastkd.backend(name):
            await asyncio.sleep(0)  # now the others enter their blocks
            order.append(name)
            found = _backend.chosen()
            await asyncio.sleep(0)
        return found, _backend.chosen()

    async def all_tasks():
        return await asyncio.gather(*map(task, ("formula", "portable", "auto")))

    found = asyncio.run(all_tasks())
    assert found == [(name, outside) for name in ("formula", "portable", "auto")]
    assert order == ["formula", "portable", "auto"] and _backend.chosen() == outside


def test_a_block_may_end_in_another_context():
    def blocks():
        with fastkd.backend("formula"):
            yield _backend.chosen()

    outside, generator = _backend.chosen(), blocks()
    assert contextvars.Context().run(next, generator) == "formula"
    generator.close()
    assert _backend.chosen() == outside


def test_a_backward_has_the_engine_of_its_forward():
    student, teacher = normal(2, 3).requires_grad_(), normal(2, 3, seed=1)
    with fastkd.backend("portable"):
        loss = fastkd.forward_kl(student, teacher)
    with fastkd.backend("formula"):
        loss.backward()
    assert student.grad.any() and loss.grad_fn is not None


def test_a_compiled_graph_is_that_of_the_choice():
    def choices(x):
        with fastkd.backend("portable"):
            inside = _backend.chosen()
        return x + (inside == "portable") + 2 * (_backend.chosen() == "formula")

    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(choices, backend=graphs, fullgraph=True)
    with fastkd.backend("auto"):
        for _ in range(2):
            assert compiled(torch.zeros(1)) == 1
            with fastkd.backend("formula"):
                assert compiled(torch.zeros(1)) == 3
            assert in_thread(lambda: compiled(torch.zeros(1))) == 1
    assert graphs.frame_count <= 3 and not _backend._traced


@pytest.mark.parametrize("name", ["", "fast"])
def test_a_default_that_is_no_backend_is_told_by_the_first_loss(name, monkeypatch):
    monkeypatch.setattr(_backend, "_default", name)
    told = f"got the backend '{name}', need one of auto, .*; set or unset FASTKD_BACKEND"
    x = normal(2, 3)
    with pytest.raises(ValueError, match=told):
        contextvars.Context().run(fastkd.forward_kl, x, x)
    fastkd.KDLoss()  # asks for no engine
    with fastkd.backend("portable"):
        fastkd.forward_kl(x, x)


def test_an_interpreter_as_shipped_is_an_obstacle_for_bfloat16(monkeypatch):
    monkeypatch.setattr(_backend, "_interpreted", True)
    monkeypatch.setattr(_backend, "interpreter_knows_bfloat16", False)
    for dtype in (torch.float32, torch.float16):
        assert _backend.triton_obstacle([torch.zeros(1, dtype=dtype)]) is None
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    with fastkd.backend("triton"), pytest.raises(RuntimeError, match="the bits of bfloat16"):
        fastkd.forward_kl(x, x)


def test_the_environment_sets_the_default(tmp_path):
    code = "import fastkd, torch; print(fastkd._backend.choose([torch.zeros(1)]))"
    assert run_python(code, tmp_path, FASTKD_BACKEND="formula").stdout == "formula\n"


def test_without_a_gpu_triton_says_why(tmp_path):
    code = (
        "import fastkd, torch\n"
        "x = torch.zeros(2, 3)\n"
        "fastkd.forward_kl(x, x)\n"
        "with fastkd.backend('triton'): fastkd.forward_kl(x, x)"
    )
    error = run_python(code, tmp_path, TRITON_INTERPRET="0").stderr.splitlines()[-1]
    assert error == (
        'RuntimeError: fastkd.backend("triton") cannot run here: the tensors are on cpu, '
        'not on a GPU. Use "auto" or "portable".'
    )


def test_without_triton_everything_else_runs(tmp_path):
    code = (
        "import sys, importlib.util as util\n"
        "sys.modules['triton'] = None\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *xs: None if name == 'triton' else find(name, *xs)\n"
        "import fastkd, torch\n"
        "x = torch.ones(2, 3, requires_grad=True)\n"
        "fastkd.reverse_kl(x, torch.zeros(2, 3)).backward()\n"
        "print(fastkd._backend.triton_obstacle([x]))"
    )
    result = run_python(code, tmp_path)
    assert result.stdout == "Triton is not installed\n", result.stderr


def test_a_missing_engine_is_an_error_and_no_fallback(monkeypatch):
    """Only a missing Triton may mean fallback: anything else would be slow for no known reason."""
    monkeypatch.setitem(sys.modules, "fastkd.portable.rows", None)
    _op._engine.cache_clear()
    with fastkd.backend("portable"), pytest.raises(ImportError):
        fastkd.forward_kl(normal(2, 3), normal(2, 3))


def test_importing_fastkd_is_light_and_shadows_nothing(tmp_path):
    code = (
        "import sys, fastkd\n"
        "from importlib.util import find_spec\n"
        "print([name for name in ('kernels', 'tests', 'benchmarks') if find_spec(name)])\n"
        "extras = ('triton', 'rich', 'matplotlib', 'sklearn', 'transformers')\n"
        "print([name for name in extras if name in sys.modules])"
    )
    alone = run_python("import torch, sys; print('triton' in sys.modules)", tmp_path).stdout
    brought_by_torch = ["triton"] if alone == "True\n" else []
    assert run_python(code, tmp_path).stdout.splitlines() == ["[]", str(brought_by_torch)]


def test_every_public_name_is_documented():
    for name in fastkd.__all__:
        thing = getattr(fastkd, name)
        if callable(thing):
            assert len(thing.__doc__.splitlines()) >= 2, name
