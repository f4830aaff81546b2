"""Products of a batch with itself: which examples are alike, and how predictions vary over them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Number = float | Tensor


class Gram(NamedTuple):
    """A comparison of the Gram matrices of two networks, or of the moments of their predictions."""

    student: Tensor  # [N, D], or logits [N, V]
    teacher: Tensor  # [N, D'], or [N, V]
    beta: Number
    gamma: Number
    temperature: Number
    name: str  # of the loss, or of its form where it has several
    order: int
