"""Moments of features: what compares the features of a position, and what makes attention maps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._loss import Call
from fastkd._op import Number, Op, is_differentiated
from fastkd._precision import compute_dtype
from fastkd.problems._features import (
    Features,
    counted,
    dimensions,
    list_of,
    of_one_size,
    of_positions,
    positions,
    reduced,
    weighted,
)

SHORTEST = 1e-12  # F.normalize divides by at least this length; what is as short has no direction


class Moments(NamedTuple):
    """A value of each position: a difference of the features of two networks, or a power of one's.

        mse              (1/C) Σ (s − t)²
        smooth_l1        (1/C) Σ of the penalty that turns linear at `number`
        cosine           1 − s·t / (‖s‖ ‖t‖)
        normalized_mse   (1/C) ‖s/‖s‖ − t/‖t‖‖²
        sum, max         Σ |s|^p, max |s|^p with p = `number`, without a teacher

    The gradient has the strides of the student, or, where that has gaps, their order.
    """

    student: Tensor  # (..., P, C), in any strides
    teacher: Tensor | None  # (..., P, C)
    row_mask: Tensor | None  # (..., P), bool: positions that count
    weights: Tensor | None  # (..., P), what values are multiplied by; those of 0 do not count
    number: Number
    kind: str


class Maps(NamedTuple):
    """The mean of (A/‖A‖ − T/‖T‖)² over all positions of two maps, each example with its length."""

    student: Tensor  # [B, P], in the compute dtype
    teacher: Tensor  # [B, P], in the compute dtype


solve = Op(Moments, trained=("student",), per_example=True, recomputes=True, keeps_strides=True)
compare = Op(Maps, trained=("student",))


def hint(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str,
    beta: Number,
    weights: Tensor | None,
    mask: Tensor | None,
    feature_dim: int | None,
    batch_dim: int,
    normalizer: Any,
    reduction: str,
) -> Tensor:
    """Solve for the weighted differences of all positions, and reduce them."""
    places = dimensions(student, feature_dim, batch_dim)
    w, m = counted(*(of_positions(x, student, *places) for x in (weights, mask)))
    s, t = (positions(x, *places) for x in (student, teacher))
    if w is not None and is_differentiated(w):  # the engines take weights as constants
        values = solve(call.engine, Moments(s, t, w.detach() != 0, None, beta, kind))
        values = weighted(values, w)
    else:
        values = solve(call.engine, Moments(s, t, m, w, beta, kind))
    return reduced(values, m if w is None else w, normalizer, reduction)


def embeddings(call: Call, student: Tensor, teacher: Tensor, *, normalize: bool) -> Tensor:
    """Solve for the difference of each embedding, or of its direction."""
    kind, examples = "normalized_mse" if normalize else "mse", student.shape[:-1]
    s, t, mask = student, teacher, call.row_mask
    if s.ndim < 3:  # all embeddings are positions of one example
        s, t = (x.reshape(1, -1, x.shape[-1]) for x in (s, t))
        mask = mask if mask is None else mask.reshape(1, -1)
    return solve(call.engine, Moments(s, t, mask, None, 0.0, kind)).reshape(examples)


def attention(call: Call, student: Features, teacher: Features, *, p: Number, kind: str) -> Tensor:
    """Solve for the maps of both networks, and compare them."""

    def map_of(features: Tensor) -> Tensor:
        return solve(call.engine, Moments(features, None, None, None, p, kind))

    def difference(student: Tensor, teacher: Tensor) -> Tensor:
        if not student.numel():
            return student.sum()
        return compare(call.engine, Maps(student, teacher))

    return transfer(map_of, difference, student, teacher)


def transfer(
    attention: Callable[[Tensor], Tensor],
    difference: Callable[[Tensor, Tensor], Tensor],
    student: Features,
    teacher: Features,
) -> Tensor:
    """Return the sum over the layers of the differences of their maps.

    Args:
        attention: Returns the map [B, P] of features [B, P, C].
        difference: Returns the loss of two maps.
        student: Features [B, C, ...] of one layer, or of several.
        teacher: The same of the teacher, a constant.
    """
    pairs = [*zip(list_of(student), list_of(teacher), strict=True)]
    dtype, terms = compute_dtype(*itertools.chain(*pairs)), []
    for s, t in pairs:
        pair = of_one_size(s, t.detach(), dtype)
        if dtype == torch.float64:  # the engines take one network at a time, in its own precision
            pair = pair[0].to(dtype), pair[1].to(dtype)
        terms.append(difference(*(attention(positions(x, 1, 0)) for x in pair)))
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def map_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of normalised maps [B, P], for autograd."""
    squares = (normalised(student)[0] - normalised(teacher)[0]).square()
    return squares.sum() / max(squares.numel(), 1)


def normalised(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps [B, P] divided by their lengths, and 1 / length; of a map of zeros both are 0."""
    top = maps.detach().amax(1, keepdim=True)
    is_zero = top == 0
    # in units of its largest entry the square of a map neither overflows nor vanishes
    maps = maps / torch.where(is_zero, 1, top)
    inverse = torch.where(is_zero, 1, maps.square().sum(1, keepdim=True)).rsqrt()
    return maps * inverse, torch.where(is_zero, 0, inverse / top)
