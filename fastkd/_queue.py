"""A queue of keys, the negatives that an `InfoNCELoss` keeps from the batches before."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn


class Queue(nn.Module):
    """The latest keys of the batches before, in a ring of one size: the oldest are replaced.

    It is neither a parameter nor a buffer, because an average of keys is no key, and a rank that is
    sent the keys of another loses its own. In the state it is one opaque value, because a queue
    that has seen no batch yet does not know the width of the one that is loaded in its place.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.keys = torch.zeros(size, 0)  # [size, D] from the first step on
        # a number, because the count of filled keys in a tensor would be waited for
        self.count = 0
        self.place = torch.zeros((), dtype=torch.int64)  # of the next key: it replaces the oldest

    def like(self, key: Tensor) -> Tensor:
        """Return the keys that are filled, [count, D], on the device and in the dtype of `key`."""
        if not self.count:
            return key.detach()[:0]
        if self.keys.shape[1] != key.shape[1]:
            raise ValueError(
                f"the queue holds keys of D = {self.keys.shape[1]}, got keys {[*key.shape]}: "
                "another width needs a new InfoNCELoss"
            )
        return self.keys[: self.count].to(key)

    def add(self, keys: Tensor) -> None:
        """Replace the oldest keys by these, the last of them where not all fit."""
        size, keys = len(self.keys), keys[-len(self.keys) :]
        if not self.count:
            self.keys = keys.new_zeros(size, keys.shape[1])
        place = self.place.to(keys.device)
        places = (place + torch.arange(len(keys), device=keys.device)) % size
        # a new tensor, because a backward may still need the old one
        self.keys = self.keys.to(keys).index_copy(0, places, keys)
        self.place = (place + len(keys)) % size
        self.count = min(self.count + len(keys), size)

    def get_extra_state(self) -> bytes:
        file = io.BytesIO()
        torch.save((self.keys, self.count, self.place), file)
        return file.getvalue()

    def set_extra_state(self, state: bytes) -> None:
        keys, count, place = torch.load(io.BytesIO(state), self.keys.device, weights_only=True)
        if len(keys) == len(self.keys):
            self.keys, self.count, self.place = keys, count, place
        else:
            self.count, self.place = 0, torch.zeros_like(place)
            self.add(keys[:count].roll(-int(place), 0))  # the oldest first

    def extra_repr(self) -> str:
        return f"size={len(self.keys)}"
