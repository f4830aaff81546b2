"""Reduction of the losses of examples: weights, masks, divisors, and sums of several terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._checks import has_values_at_hand
from fastkd._op import Number

_LONG, _PART = 1 << 15, 1 << 12  # numbers of a sum that PyTorch cuts, and of a part of ours
_saved_tensors_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None
)


class Reduction(NamedTuple):
    """How the caller wants a per-example loss reduced."""

    weights: Tensor | None
    normalizer: Any
    reduction: str
    return_parts: bool


class Term(NamedTuple):
    """A summand of a per-example loss, which is reduced by itself."""

    factor: Number
    losses: Tensor  # (...)
    row_mask: Tensor | None  # (...), bool: the examples that count in this term
    counts: Tensor | None = None  # (...), as how many examples the mean counts each; without, as 1


def selected(rows: Tensor, mask: Tensor | None, masked: int = 0) -> Tensor:
    """Return the rows with `masked` where the mask is False: a NaN there reaches nothing."""
    if mask is None:
        return rows
    return torch.where(mask[(..., *[None] * (rows.ndim - mask.ndim))], rows, masked)


def reduce(
    losses: Tensor,
    weights: Tensor | None,
    row_mask: Tensor | None,
    normalizer: Any,
    reduction: str,
) -> Tensor:
    """Return Σ w·l / Σ w, or / normalizer, of "mean", Σ w·l of "sum", w·l of "none".

    Where the row mask is False there is 0, and no gradient of any size comes through. Where no
    example is left, the loss is 0 and still on the graph.
    """
    if weights is not None:
        weights = weights.to(losses.dtype)
        losses = selected(losses * weights, row_mask)
    if reduction == "none":
        return losses
    if reduction == "mean" and normalizer is None and weights is None:
        n = losses.numel()
        if n and not _is_cut(losses, n):
            return losses.mean()
    return divided(total(losses), weights, losses.numel(), normalizer, reduction)


def divided(
    total_loss: Tensor, weights: Tensor | None, n: int, normalizer: Any, reduction: str
) -> Tensor:
    """Return Σ w·l of n examples over what its reduction divides it by."""
    if reduction == "sum":
        return total_loss
    if normalizer is None:
        normalizer = n if weights is None else total(weights.to(total_loss.dtype))
    if isinstance(normalizer, Tensor):
        whole = not normalizer.is_floating_point()
        divisor = normalizer.clamp(min=1) if whole else torch.where(normalizer == 0, 1, normalizer)
        return total_loss / divisor.to(total_loss.dtype)
    return total_loss / (normalizer or 1)


def weight_of_rows(rows: Any, mask: Tensor | None, normalizer: Any, reduction: str) -> float:
    """Return what `reduce` multiplies the losses of the rows that count by, 0 if that is not known.

    It is a number, and not one for each row: the mask stands for all the weights that there are.
    """
    if reduction == "none" or isinstance(normalizer, Tensor) or not isinstance(rows, Tensor):
        return 0.0
    if torch.compiler.is_compiling() or (mask is not None and not has_values_at_hand(mask)):
        return 0.0
    # checkpointing and offloading free what the graph saves, and a gradient is none of that
    if _saved_tensors_hooks(True):
        return 0.0
    if reduction == "sum":
        return 1.0
    # a number of numpy would not count as plain, and the op would take the way of traced ones
    if normalizer is not None:
        return 1 / (float(normalizer) or 1)
    return 1 / ((rows.shape[:-1].numel() if mask is None else int(mask.sum())) or 1)


def total(x: Tensor) -> Tensor:
    """Return the sum of all numbers, with the same bits for any number of threads."""
    return totals(x.flatten()) if _is_cut(x, x.numel()) else x.sum()


def totals(x: Tensor) -> Tensor:
    """Return the sums over the last dimension, with the same bits for any number of threads."""
    n = x.shape[-1]
    if not _is_cut(x, n):
        return x.sum(-1)
    whole = n // _PART * _PART
    found = totals(x[..., :whole].unflatten(-1, (-1, _PART)).sum(-1))
    return found if whole == n else found + x[..., whole:].sum(-1)


def _is_cut(x: Tensor, n: int) -> bool:
    """Return whether PyTorch cuts a sum of n of these numbers, a part for each thread."""
    return not torch.compiler.is_compiling() and n >= _LONG and x.is_cpu


def sum_of_terms(
    terms: Sequence[Term],
    weights: Tensor | None,
    row_mask: Tensor | None,
    normalizer: Any,
    reduction: str,
    return_parts: bool,
) -> Any:
    """Return Σ factor · reduced term and, if asked for, the terms without their factors."""
    if not return_parts and all(term.row_mask is None and term.counts is None for term in terms):
        # one reduction of the sum, since all terms have the same divisor
        losses = weighted_sum([(term.factor, term.losses) for term in terms])
        return reduce(losses, weights, row_mask, normalizer, reduction)
    parts = []
    for _, losses, mask, counts in terms:
        divisor = normalizer
        if counts is not None and normalizer is None:
            counts = selected(counts, mask)
            if weights is not None:
                counts = selected(counts * weights.to(counts.dtype), row_mask)
            divisor = total(counts)
        if mask is None:
            part = reduce(losses, weights, row_mask, divisor, reduction)
        elif weights is not None and row_mask is not None:
            counted = mask & row_mask
            part = reduce(losses, torch.where(mask, weights, 0), counted, divisor, reduction)
        else:  # masked rows are 0 already, so that only their number is missing
            divisor = mask.sum() if divisor is None else divisor
            part = reduce(losses, None, None, divisor, reduction)
        parts.append(part)
    factors = [term.factor for term in terms]
    loss = weighted_sum([*zip(factors, parts, strict=True)])
    return (loss, *parts) if return_parts else loss


def weighted_sum(summands: Sequence[tuple[Number, Tensor]]) -> Tensor:
    """Return Σ factor · x without the x of factor 0, which count for nothing even if infinite."""
    (_, first), total = summands[0], None
    for factor, x in summands:
        is_known = not isinstance(factor, Tensor)
        if is_known and factor == 0:
            continue
        if total is None:
            total = x if is_known and factor == 1 else (factor * x).to(x.dtype)
        elif is_known and not torch.compiler.is_compiling():  # alpha would be specialised on
            total = torch.add(total, x, alpha=factor)  # type: ignore[arg-type]
        else:
            total = total + (factor * x).to(x.dtype)
    return selected(first, torch.zeros_like(first, dtype=torch.bool)) if total is None else total
