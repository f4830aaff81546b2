"""Chunks of rows whose temporaries stay in a CPU's cache, and the workers that take them.

A worker takes whole chunks, and its calls of PyTorch run on its own thread. A call that is spread
over threads ends at a barrier instead, thousands of times in a loss: beside another busy process a
thread waits there for one that the system does not let run.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor

LIMIT: int | None = None  # the most elements of a chunk, where set: small inputs in many chunks

_TINY = 5e-324  # which is 0 to a thread that flushes denormal numbers

Scratch = TypeVar("Scratch")
Result = TypeVar("Result")


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


def for_each(
    work: Callable[[slice, Scratch], Result],
    chunks: list[slice],
    scratch: Callable[[], Scratch],
    like: Tensor,
) -> list[Result]:
    """Call work(chunk, scratch) for each of the chunks, and return the results in their order.

    A worker has a scratch of its own, and writes only what belongs to its chunk. What chunks have
    in common is returned and combined by the caller, or added up afterwards by chunks of another
    dimension, so that results are the same bit for bit for any number of threads.

    Workers have no autograd and no autocast, as all engines. The threads are those of PyTorch: as
    many, as long as they last. One chunk stays on the caller's thread, as does all that is called
    from a worker, whose number of threads is 1.

    Raises:
        Exception: What `work` raises, once no worker is at work any more.
    """
    todo, results = deque(enumerate(chunks)), dict[int, Result]()

    def take() -> None:
        own = scratch()
        while todo:
            try:
                i, chunk = todo.popleft()
            except IndexError:  # because another worker was faster
                return
            results[i] = work(chunk, own)

    if len(chunks) > 1 and like.is_cpu and torch.get_num_threads() > 1:
        _let_workers(take, todo)
    else:
        take()
    return [results[i] for i in range(len(chunks))]


def _let_workers(take: Callable[[], None], todo: deque) -> None:
    """Let workers take what is to do, and return when all of it is done."""
    n_threads, is_inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    flushes = _TINY == 0.0

    def work() -> None:
        torch.set_flush_denormal(flushes)  # modes hold for a thread
        try:
            with torch.inference_mode(is_inference), torch.no_grad():
                take()
        except BaseException:
            todo.clear()
            raise

    futures = list[Future]()
    try:
        workers = _workers(n_threads, os.getpid())
        for _ in range(min(n_threads, len(todo))):
            futures.append(workers.submit(work))
        wait(futures)
    except RuntimeError:  # no thread starts any more, because the interpreter is about to exit
        take()
    finally:  # nobody goes on with what the caller gives up, because it may use the tensors again
        todo.clear()
        wait(futures)
    for future in futures:
        future.result()


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
