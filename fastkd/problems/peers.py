"""Rows of several networks that teach each other: the divergences between all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._loss import Call
from fastkd._op import Number, Op
from fastkd._precision import compute_dtype
from fastkd.problems import rows

MOST = 4  # networks that the engines take at once


class Peers(NamedTuple):
    """The sum over i of the divergences KL(p_j ‖ p_i) of row i from those of all others.

    The p are the softmaxes of the networks' logits / temperature, and the losses of a row are
    scale times the sum.
    """

    first: Tensor  # (..., V)
    second: Tensor  # (..., V)
    third: Tensor | None  # (..., V)
    fourth: Tensor | None  # (..., V)
    row_mask: Tensor | None  # (...), bool: rows that count
    temperature: Number
    scale: Number
    are_constants: bool  # whether p_j has no gradient in KL(p_j ‖ p_i)
    row_weight: Number = 0.0  # as in `Rows`


_FIELDS = ("first", "second", "third", "fourth")
solve = Op(Peers, trained=_FIELDS, per_example=True, recomputes=True, keeps_strides=True)


def logits_of(problem: Peers) -> list[Tensor]:
    """Return the logits of the networks that there are."""
    return [x for x in problem[:MOST] if isinstance(x, Tensor)]


def check(
    logits: Sequence[Tensor], *, temperature: Number, scale_t2: bool, detach_peers: bool
) -> None:
    """Raise an error for logits that do not fit together and options out of range."""
    needed = (
        "logits must be a list or tuple of tensors (..., V), one for each of 2 or more networks"
    )
    if not isinstance(logits, (list, tuple)):
        way = ": one tensor of all networks is .unbind(0)" if isinstance(logits, Tensor) else ""
        raise TypeError(f"{needed}, got {type(logits).__name__}{way}")
    if len(logits) < 2:
        raise ValueError(f"{needed}, got {len(logits)}: one network has nobody to learn from")
    way = "the rows of all sequences, .values() of a jagged tensor, for all networks"
    for i, x in enumerate(logits):
        name = f"logits[{i}]"
        _checks.floats(name, x, "a tensor of shape (..., V)", "logits", way)
        if x.ndim == 0 or x.shape[-1] == 0:
            raise ValueError(f"{name} needs the shape (..., V) with V ≥ 1, got {_checks.shape(x)}")
        if x.shape != logits[0].shape:
            raise ValueError(
                f"the logits of all networks need one shape, got {_checks.shape(logits[0])} in "
                f"logits[0] and {_checks.shape(x)} in {name}: align the positions, or cut them to "
                "the vocabulary that they share"
            )
        if i:
            _checks.same_device(**{"logits[0]": logits[0], name: x})
    _option_checks.temperature(temperature)


def mutual(
    call: Call,
    logits: Sequence[Tensor],
    *,
    temperature: Number,
    scale_t2: bool,
    detach_peers: bool,
) -> Any:
    """Solve for all divergences at once, or those of many networks for one pair after another."""
    dtype = compute_dtype(*logits)
    if dtype == torch.float64:
        logits = [x.to(dtype) for x in logits]
    T, n_peers = temperature, len(logits)
    scale = (T * T if scale_t2 else 1.0) / (n_peers - 1)
    if n_peers <= MOST:
        first, second, *others = logits
        third, fourth = (*others, None, None)[: MOST - 2]
        problem = Peers(
            first, second, third, fourth, call.row_mask, T, scale, detach_peers, call.row_weight
        )
        return solve(call.engine, problem)
    if call.engine != "triton" or not detach_peers:
        return NotImplemented
    losses = [
        rows.solve(
            call.engine,
            rows.Rows(
                student, teacher.detach(), None, call.row_mask, T, T, 0.0, scale, "forward_kl",
                call.row_weight,
            ),
        )[0]
        for student in logits
        for teacher in logits
        if teacher is not student
    ]  # fmt: skip
    return sum(losses[1:], losses[0])
