"""Chunks in workers: the same results for any number of threads, whatever the caller's state."""

import contextlib
import functools
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import LOSSES
from exactness import results
from force import in_chunks_of
from inputs import logits
from meter import PeakMemory

import fastkd
from fastkd.portable import _chunks

CHUNKS = [slice(i, i + 1) for i in range(12)]
ON_CPU = torch.empty(0)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    in_chunks_of(20000, monkeypatch)
    torch.set_num_threads(2)
    with fastkd.backend("portable"):
        yield
    torch.set_num_threads(1)


def in_chunks(work):
    """Return the results of work(chunk)."""

    def solve():
        return _chunks.for_each(lambda chunk, _: work(chunk.start), CHUNKS, lambda: None)

    return _chunks.by_workers(solve, True, ON_CPU)


@pytest.fixture
def a_loss():
    """Return a loss with gradients, in chunks."""
    inputs = logits((150,), 300, torch.float32, device="cpu")
    return lambda: results(functools.partial(fastkd.jensen_shannon, reduction="none"), inputs)


def assert_equal(found, expected):
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", [x for x in LOSSES if x.name != "rkd_distance"], ids=str)
def test_results_are_the_same_for_any_number_of_threads(case, monkeypatch):
    shared, share = [], _chunks._share
    monkeypatch.setattr(_chunks, "_share", lambda *x: shared.append(x) or share(*x))
    inputs, found = case.inputs((150,), 300, torch.float32, device="cpu"), []
    if case.problem in ("tokens", "linear"):  # a sequence of which has few, or a row of logits
        monkeypatch.setattr(_chunks, "LIMIT", 1000)
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(results(case, inputs))
        assert bool(shared) == (n > 1 and case.problem is not None)
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


@pytest.mark.parametrize(
    "shape", [(70001,), (32768,), (1, 40000), (300, 200), (2, 3, 20001)], ids=str
)
def test_many_losses_are_summed_alike_for_any_number_of_threads(shape):
    """PyTorch cuts a sum of so many numbers in a part for each thread."""
    x, y = (torch.rand(*shape, 2, generator=torch.Generator().manual_seed(i)) for i in range(2))
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    for loss in (fastkd.embedding_mse, fastkd.hint, fastkd.forward_kl):
        options = dict(feature_dim=-1) if loss is fastkd.hint else {}
        if loss is fastkd.hint and len(shape) == 1:
            x, y, weights = x[None], y[None], weights[None]
        for reduction in ("mean", "sum", "none"):
            for given in (None, weights):
                found = []
                for n_threads in (1, 2, 5):
                    torch.set_num_threads(n_threads)
                    options = dict(options, weights=given, reduction=reduction)
                    found.append(loss(x, y, **options))
                assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
                truth = loss(x.double(), y.double(), **options)
                torch.testing.assert_close(found[0].double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("is_inference", [False, True])
def test_workers_have_the_state_of_their_caller(is_inference, flushes):
    def state(_):
        flushed = not (torch.full((8,), 1e-40) * 0.5).any()
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), bool(flushed)
        return threading.get_ident(), torch.get_num_threads(), modes

    torch.set_flush_denormal(flushes)
    try:
        with torch.inference_mode(is_inference):
            threads, numbers, modes = map(set, zip(*in_chunks(state), strict=True))
    finally:
        torch.set_flush_denormal(False)
    assert threading.get_ident() not in threads and len(threads) <= 2
    assert numbers == {1} and modes == {(is_inference, False, flushes)}
    with ThreadPoolExecutor(1) as another:  # a thread that starts later is no worker
        assert another.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_losses_in_modes_of_autograd(mode, a_loss):
    expected, _ = a_loss()
    inputs = logits((150,), 300, torch.float32, device="cpu")
    with mode():
        assert torch.equal(fastkd.jensen_shannon(*inputs, reduction="none"), expected)


def test_a_mode_that_counts_memory_sees_it(a_loss):
    with PeakMemory() as memory:
        a_loss()
    assert memory.peak_bytes > 6 * 4 * 20000


def test_an_exception_surfaces_and_stops_the_others():
    begun = []

    def fail(i):
        begun.append(i)
        time.sleep(0.001)
        if i == 2:
            raise LookupError("the third chunk")

    with pytest.raises(LookupError, match="the third chunk") as caught:
        in_chunks(fail)
    assert caught.traceback[-1].name == "fail"
    n_begun = len(begun)
    assert n_begun < len(CHUNKS)
    assert in_chunks(lambda i: i) == [*range(len(CHUNKS))] and len(begun) == n_begun


def test_an_interrupted_caller_leaves_nobody_at_work():
    begun = []

    def interrupt(*_):
        raise KeyboardInterrupt

    def work(i):
        begun.append(i)
        time.sleep(0.02)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.03)
            in_chunks(work)
    finally:
        signal.signal(signal.SIGALRM, before)
    n_begun = len(begun)
    time.sleep(0.03)
    assert len(begun) == n_begun < len(CHUNKS)


def test_losses_in_threads_of_the_user_share_the_workers(a_loss):
    expected = a_loss()
    n_threads = threading.active_count()
    with ThreadPoolExecutor(4) as users:
        for found in users.map(lambda _: a_loss(), range(8)):
            assert_equal(found, expected)
        assert threading.active_count() <= n_threads + 4
    outer = in_chunks(lambda i: sum(in_chunks(lambda j: i * j)))  # a worker calls a loss
    assert outer == [66 * i for i in range(len(CHUNKS))]


def test_losses_in_a_forked_process(a_loss):
    expected = a_loss()
    child = os.fork()
    if not child:
        signal.alarm(20)  # what hangs ends
        with contextlib.suppress(BaseException):
            found = a_loss()
            torch.set_num_threads(1)  # because PyTorch's own threads are not there any more
            assert_equal(found, expected)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
