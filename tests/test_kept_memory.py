"""The memory that a thread keeps for problems that one chunk holds."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import LOSSES
from exactness import results
from inputs import logits
from meter import PeakMemory

import fastkd
from fastkd.portable import _chunks
from fastkd.portable._row_chunks import FEW

N_ROWS, WIDTH = 70, 300  # more numbers than those that need no such memory
CASES = [x for x in LOSSES if x.per_example and x.problem in ("rows", "ensembles", "peers")]
CASES += [x for x in LOSSES if x.problem == "corrected"]


@pytest.fixture(autouse=True)
def without_memory(monkeypatch):
    monkeypatch.setattr(_chunks, "_kept", _chunks._Kept())
    with fastkd.backend("portable"):
        yield


@pytest.fixture
def a_loss():
    inputs = logits((N_ROWS,), WIDTH, torch.float32, device="cpu")
    return lambda: results(lambda *x: fastkd.jensen_shannon(*x, reduction="none"), inputs)


def poison():
    """Fill what is kept with NaN, as a problem with other numbers would fill it."""
    _chunks._kept.memory.fill_(255)


def address():
    return _chunks._kept.memory.data_ptr()


def of_mean(case, inputs):
    return results(lambda *x: case(*x, reduction="mean"), inputs)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("solve", [results, of_mean], ids=["none", "mean"])
def test_results_are_no_part_of_it_and_do_not_depend_on_it(solve, case):
    assert N_ROWS * WIDTH > FEW
    inputs = case.inputs((N_ROWS,), WIDTH, torch.float32, device="cpu")
    found = solve(case, inputs)
    kept = [x.clone() for x in found]
    if _chunks._kept.memory is None:
        pytest.skip("another engine solves this case, in memory of its own")
    poison()
    assert all(torch.equal(x, y) for x, y in zip(found, kept, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(solve(case, inputs), kept, strict=True))


def test_a_thread_allocates_it_once_for_its_largest_problem(a_loss):
    a_loss()
    first, n_bytes = address(), _chunks._kept.memory.numel()
    for n_rows, dtype in ((N_ROWS, torch.float32), (60, torch.float32), (60, torch.bfloat16)):
        inputs = logits((n_rows,), WIDTH, dtype, device="cpu")
        fastkd.reverse_kl(*inputs).backward()
        assert address() == first and _chunks._kept.memory.numel() == n_bytes
    fastkd.jensen_shannon(*logits((2 * N_ROWS,), WIDTH, torch.float32, device="cpu")).backward()
    assert _chunks._kept.memory.numel() == 2 * n_bytes


def test_a_problem_inside_of_another_one_gets_memory_of_its_own():
    like, shape = torch.empty(0), (2, 3, 5)

    def solve(buffers):
        [outer.fill_(1) for outer in buffers]
        _chunks.with_buffers(lambda inner: [x.fill_(2) for x in inner], shape, torch.float32, like)
        return torch.stack(buffers).clone()

    found = _chunks.with_buffers(solve, shape, torch.float32, like)
    assert torch.equal(found, torch.ones(shape))


def test_it_is_given_back_after_an_exception(a_loss):
    a_loss()
    first = address()

    def fail(buffers):
        raise LookupError

    with pytest.raises(LookupError):
        _chunks.with_buffers(fail, (2, 3, 5), torch.float32, torch.empty(0))
    assert address() == first


def test_threads_keep_memory_of_their_own(a_loss):
    expected = a_loss()
    with ThreadPoolExecutor(4) as users:
        for found in users.map(lambda _: a_loss(), range(32)):
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_what_inference_mode_leaves_trains_later(a_loss):
    with torch.inference_mode():
        fastkd.jensen_shannon(*logits((N_ROWS,), WIDTH, torch.float32, device="cpu"))
    a_loss()


def test_a_mode_that_counts_memory_sees_every_problem(a_loss):
    peaks = []
    for _ in range(2):
        with PeakMemory() as memory:
            a_loss()
        peaks.append(memory.peak_bytes)
    assert peaks[0] == peaks[1] > 6 * 4 * N_ROWS * WIDTH
