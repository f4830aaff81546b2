"""Moments of features: what compares the features of a position, and what makes attention maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastkd._precision import compute_dtype
from fastkd.problems._features import Features, list_of, of_one_size, positions


def transfer(attention: Callable[[Tensor], Tensor], student: Features, teacher: Features) -> Tensor:
    """Return the sum over the layers of the mean squared difference of their normalised maps.

    Args:
        attention: Returns the map [B, P] of features [B, P, C].
        student: Features [B, C, ...] of one layer, or of several.
        teacher: The same of the teacher, a constant.
    """
    terms = []
    for s, t in zip(list_of(student), list_of(teacher), strict=True):
        of_student, of_teacher = (
            _normalised(attention(positions(x, 1, 0)))
            for x in of_one_size(s, t.detach(), compute_dtype(s, t))
        )
        squares = (of_student - of_teacher).square()
        terms.append(squares.sum() / max(squares.numel(), 1))
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def _normalised(maps: Tensor) -> Tensor:
    """Return maps [B, P] divided by their lengths; those of zeros stay, and get no gradient."""
    # in units of its largest entry the square of a map neither overflows nor vanishes
    top = maps.detach().amax(1, keepdim=True)
    maps = maps / torch.where(top > 0, top, 1)
    squares = maps.square().sum(1, keepdim=True)
    return maps * torch.where(squares == 0, 1, squares).rsqrt()
