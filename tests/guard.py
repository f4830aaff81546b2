"""Canaries: tensors inside a poisoned buffer, for devices on which the meter cannot watch.

    guard = Guard()
    student = guard.surround(torch.randn(3, 1000), gap=24)      a guarded copy
    losses = guard.empty(3)                                     a guarded output
    ...
    guard.check()

Limits: a load outside a tensor shows only where its NaN reaches an output.
"""

import math

import torch

ZONE = 4096  # bytes on each side; a multiple of 16, so that alignment is that of a whole tensor
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
POISON = -1  # all bits set: NaN in every float format


class Guard:
    def __init__(self):
        self._guarded: list[tuple[torch.Tensor, torch.Tensor, bool]] = []

    def surround(self, tensor: torch.Tensor, gap: int = 0) -> torch.Tensor:
        """Return a copy with poison around it and, if asked for, gaps of it between its rows."""
        view = self._allocate(tensor.shape, tensor.dtype, tensor.device, gap, is_output=False)
        return view.copy_(tensor)

    def empty(self, *shape: int, dtype=torch.float32, device="cpu", gap: int = 0) -> torch.Tensor:
        """Return an output, every element of which must be written."""
        return self._allocate(shape, dtype, device, gap, is_output=True)

    def check(self):
        for buffer, view, is_output in self._guarded:
            poisoned = bits(buffer) == POISON
            places = torch.arange(buffer.numel(), device=buffer.device)
            mine = places.as_strided(view.shape, view.stride(), view.storage_offset())
            inside = torch.zeros_like(poisoned).index_fill_(0, mine.reshape(-1), True)
            overwritten = int((~poisoned & ~inside).sum())
            assert not overwritten, f"{overwritten} elements overwritten around {view.shape}"
            missing = int((poisoned & inside).sum())
            assert not (is_output and missing), f"{missing} elements of {view.shape} not written"

    def _allocate(self, shape, dtype, device, gap, is_output):
        *rows, columns = shape or (1,)
        margin = ZONE // torch.empty((), dtype=dtype).element_size()
        size = math.prod(rows) * (columns + gap)
        buffer = torch.empty(size + 2 * margin, dtype=dtype, device=device)
        bits(buffer).fill_(POISON)
        view = buffer[margin : margin + size].view(*rows, columns + gap)[..., :columns].view(shape)
        self._guarded.append((buffer, view, is_output))
        return view


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])
