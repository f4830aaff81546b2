"""Logits of a network, from hidden states and its head, and what is measured of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd._products import multiply
from fastkd.problems.rows import is_exactly

_BLOCK = 1 << 18  # logits that metrics are made of at once


class Head(NamedTuple):
    """The head of a network, whose logits are softcap(scale · (W h + b))."""

    weight: Tensor | None
    bias: Tensor | None
    scale: Number
    softcap: Number | None


class Teacher(NamedTuple):
    """A teacher, whose logits are there, [N, V], or are made from hidden states [N, H]."""

    hidden_or_logits: Tensor
    head: Head

    @property
    def n_cols(self) -> int:
        """Return the size of its vocabulary."""
        weight = self.head.weight
        return self.hidden_or_logits.shape[1] if weight is None else len(weight)

    def is_there(self, width: int) -> bool:
        """Return whether its logits are there already, in rows of this width."""
        return self.head.weight is None and self.n_cols == width


def logits_of(hidden: Tensor, head: Head, out: Tensor) -> Tensor:
    """Write the logits to the first columns of `out` and −∞ to those after, and return it."""
    weight, bias, scale, softcap = head
    assert weight is not None
    z = out[:, : len(weight)]
    multiply(hidden, weight.t(), z)
    if bias is not None:
        z.add_(bias)
    if not is_exactly(scale, 1):
        z.mul_(scale)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    out[:, len(weight) :] = -torch.inf
    return out


def measure(z: Tensor, teacher: Tensor | None, report: Tensor) -> None:
    """Write the entropies of both networks at T = 1, and whether their largest logits agree."""
    size = max(1, _BLOCK // z.shape[1])
    networks = [z] if teacher is None else [z, teacher]
    for column, logits in enumerate(networks):
        for block, found in zip(logits.split(size), report[:, column].split(size), strict=True):
            probabilities = block.to(report.dtype).softmax(-1)
            found.copy_(torch.special.entr(probabilities).sum(-1))
    if teacher is not None:
        report[:, 2] = z.argmax(-1) == teacher.argmax(-1)
