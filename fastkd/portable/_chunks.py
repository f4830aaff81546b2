"""Chunks of rows whose temporaries stay in a CPU's cache, and the workers that take them.

A worker takes whole chunks, and its calls of PyTorch run on its own thread. A call that is spread
over threads ends at a barrier instead, thousands of times in a loss: beside another busy process a
thread waits there for one that the system does not let run.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIMIT: int | None = None  # the most elements of a chunk, where set: small inputs in many chunks

_TINY = 5e-324  # which is 0 to a thread that flushes denormal numbers

Scratch = TypeVar("Scratch")
Result = TypeVar("Result")


class _Kept(threading.local):
    """The memory that a thread keeps for small problems, and the buffers that it was cut to."""

    memory: Tensor | None = None  # bytes
    shape: tuple[tuple[int, ...], torch.dtype] | None = None  # of the buffers, and their dtype
    buffers: tuple[Tensor, ...] = ()


_kept = _Kept()


def with_buffers(
    solve: Callable[[tuple[Tensor, ...]], Result],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    like: Tensor,
) -> Result:
    """Return solve(buffers) with shape[0] buffers of shape[1:], which nothing of the result is.

    On a CPU they lie in memory that the thread keeps: the system may take back what is freed, and
    would clear its pages for every problem, which takes longer than to solve a small one.
    """
    # a mode may watch what is allocated, or make tensors that hold nothing
    if not like.is_cpu or torch._C._len_torch_dispatch_stack():
        return solve(like.new_empty(shape, dtype=dtype).unbind())
    memory, known, buffers = _kept.memory, _kept.shape, _kept.buffers
    _kept.memory = None  # a problem inside of this one finds none
    if memory is None or known != (shape, dtype):
        size = math.prod(shape) * dtype.itemsize
        with torch.inference_mode(False):  # what that makes is of no use outside
            if memory is None or memory.numel() < size:
                memory = torch.empty(size, dtype=torch.uint8, device=like.device)
            buffers = memory[:size].view(dtype).view(shape).unbind()
    try:
        return solve(buffers)
    finally:
        _kept.memory, _kept.shape, _kept.buffers = memory, (shape, dtype), buffers


def most_elements(like: Tensor, on_cpu: int, elsewhere: int) -> int:
    """Return how many elements a chunk on the tensor's device has at most.

    A CPU wants chunks that its cache holds; elsewhere a chunk must pay for its launches.
    """
    if LIMIT is not None:
        return LIMIT
    return on_cpu if like.is_cpu else elsewhere


def cut(rows: range, size: int) -> list[slice]:
    """Return chunks of at most `size` that the rows consist of, whatever the number of threads."""
    size = max(1, size)
    return [slice(i, min(i + size, rows.stop)) for i in range(rows.start, rows.stop, size)]


def total(x: Tensor) -> Tensor:
    """Return the sum of a matrix, by rows: that of all at once would depend on the threads."""
    return x.sum(-1).sum()


class _Team(NamedTuple):
    """The workers of a problem, and the modes of its caller, which hold for a thread each."""

    workers: ThreadPoolExecutor
    size: int
    is_inference: bool
    flushes: bool
    is_given_up: threading.Event

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        return self.workers.submit(self._run, work)

    def _run(self, work: Callable[[], Result]) -> Result:
        torch.set_flush_denormal(self.flushes)
        with (
            torch.inference_mode(self.is_inference),
            torch.no_grad(),
            forward_ad._set_fwd_grad_enabled(False),
        ):
            return work()


class _Here(threading.local):
    """The team of which this thread is the first worker."""

    team: _Team | None = None


_here = _Here()


def by_workers(solve: Callable[[], Result], is_large: bool, like: Tensor) -> Result:
    """Return solve(), which a worker calls if the problem is large, and others help.

    Workers are as many as PyTorch has threads; the threads stay for the next problem. Calls of
    PyTorch run on one thread in all that `solve` does, so that results are the same bit for bit for
    any number of threads. A problem inside of another one, and a small one, are solved at once.

    Raises:
        Exception: What `solve` raises, once nobody works on the problem any more.
    """
    n_threads = torch.get_num_threads() if is_large and like.is_cpu else 1
    # a mode that watches or counts calls sees those of its own thread alone
    if n_threads == 1 or torch._C._len_torch_dispatch_stack():
        return solve()

    def first() -> Result:
        _here.team = team
        try:
            return solve()
        finally:
            _here.team = None

    modes = torch.is_inference_mode_enabled(), _TINY == 0.0
    try:
        team = _Team(_workers(n_threads, os.getpid()), n_threads, *modes, threading.Event())
        future = team.submit(first)
    except RuntimeError:  # no thread starts any more, because the interpreter is about to exit
        return solve()
    try:
        return future.result()
    finally:  # nobody goes on with what the caller gives up, because it may use the tensors again
        team.is_given_up.set()
        if not future.cancel():
            wait([future])
        del future  # because its exception would keep this frame alive, and this frame it


def for_each(
    work: Callable[[slice, Scratch], Result],
    chunks: list[slice],
    scratch: Callable[[], Scratch],
) -> list[Result]:
    """Call work(chunk, scratch) for each of the chunks, and return the results in their order.

    Within `by_workers` others take chunks too. A worker has a scratch of its own, and writes only
    what belongs to its chunk. What chunks have in common is returned and combined by the caller, or
    added up afterwards in chunks of another dimension, always in the same order.
    """
    team, todo, results = _here.team, deque(enumerate(chunks)), dict[int, Result]()

    def take() -> None:
        own = scratch()
        while todo:
            if team is not None and team.is_given_up.is_set():
                raise CancelledError
            try:
                i, chunk = todo.popleft()
            except IndexError:  # because another worker was faster
                return
            results[i] = work(chunk, own)

    if team is None or len(chunks) < 2:
        take()
    else:
        _share(team, take, todo)
    return [results[i] for i in range(len(chunks))]


def _share(team: _Team, take: Callable[[], None], todo: deque) -> None:
    """Take what is to do, with the help of those of the team that are free."""

    def take_or_stop() -> None:
        try:
            take()
        except BaseException:
            todo.clear()
            raise

    helpers: list[Future] = []
    with contextlib.suppress(RuntimeError):  # no thread starts any more at the interpreter's end
        for _ in range(min(team.size, len(todo)) - 1):
            helpers.append(team.submit(take_or_stop))
    try:
        take_or_stop()
    finally:
        helpers = [x for x in helpers if not x.cancel()]  # those that have begun
        wait(helpers)
    while helpers:
        helpers.pop().result()


@functools.lru_cache(maxsize=4)
def _workers(n_threads: int, process: int) -> ThreadPoolExecutor:
    """Return threads of this process, not of the one that it was forked from."""
    workers = ThreadPoolExecutor(n_threads, "fastkd", _compute_alone)
    started = threading.Barrier(n_threads + 1)
    try:
        for _ in range(n_threads):
            workers.submit(started.wait)
        started.wait()
    except BaseException:
        started.abort()
        raise
    torch.set_num_threads(n_threads)  # because threads that start later take what was set last
    return workers


def _compute_alone() -> None:
    """Let calls of PyTorch run on this thread alone."""
    torch.get_num_threads()  # because what asks first gives the thread the number of the others
    torch.set_num_threads(1)
