"""Peak memory and time of a loss with its gradients."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Count the bytes of tensors that are made inside and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._sizes = dict[int, int]()  # of every storage that is alive; 0 if it was there before

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self._see((args, kwargs), are_new=False)
        result = function(*args, **(kwargs or {}))
        self._see(result, are_new=True)
        return result

    def _see(self, values: Any, are_new: bool) -> None:
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes() if are_new else 0
                self.live_bytes += self._sizes[key]
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


class Cost(NamedTuple):
    """Memory and time of a loss and its gradients."""

    peak_bytes: int  # beyond the inputs; the gradients are among them
    seconds: float


def compare(
    losses: Sequence[Callable[[], Tensor]], trained: Sequence[Tensor], n_rounds: int
) -> list[Cost]:
    """Return the cost of each of the losses; they take turns, and the median of the rounds counts.

    The first call of each counts memory and no time.
    """
    peaks = []
    for loss in losses:
        with PeakMemory() as memory:
            torch.autograd.grad(loss(), trained)
        peaks.append(memory.peak_bytes)
    seconds: list[list[float]] = [[] for _ in losses]
    for _ in range(n_rounds):
        for loss, own in zip(losses, seconds, strict=True):
            _wait_for(trained[0])
            began = time.perf_counter()
            torch.autograd.grad(loss(), trained)
            _wait_for(trained[0])
            own.append(time.perf_counter() - began)
    return [Cost(peak, median(own)) for peak, own in zip(peaks, seconds, strict=True)]


def _wait_for(x: Tensor) -> None:
    if not x.is_cpu:
        torch.accelerator.synchronize(x.device)
