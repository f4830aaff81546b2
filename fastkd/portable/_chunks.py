"""Chunks of rows whose temporaries stay in a CPU's cache, and the workers that own them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

LIMIT: int | None = None  # the most elements of a chunk, where set: small inputs in many chunks

Result = TypeVar("Result")


def most_elements(like: Tensor, on_cpu: int, elsewhere: int) -> int:
    """Return how many elements a chunk on the tensor's device has at most.

    A CPU wants chunks that its cache holds; elsewhere a chunk must pay for its launches.
    """
    if LIMIT is not None:
        return LIMIT
    return on_cpu if like.device.type == "cpu" else elsewhere


def for_each(work: Callable[[slice], Result], rows: range, size: int) -> list[Result]:
    """Call `work` on chunks of `size` of these rows, and return what it returns for each.

    A worker owns the rows of its chunk: it writes them alone. What chunks have in common, such as
    a sum over all of them, is returned and combined by the caller, in the order of the chunks.
    """
    size = max(1, size)
    starts = range(rows.start, rows.stop, size)
    return [work(slice(start, min(start + size, rows.stop))) for start in starts]
