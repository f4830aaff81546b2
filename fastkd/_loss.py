"""The decorator that turns a formula into a loss: checks, choice of engine, weights, reduction."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _backend, _checks, _engine

# the options that `loss` adds to those of the formula
_REDUCTION = {"weights": None, "normalizer": None, "reduction": "mean"}


def loss(
    check: Callable[..., None],
    fused: Callable[..., Tensor] | None = None,
    *,
    shortcut: Callable[..., Tensor | None],
) -> Callable:
    """Decorate a formula: (student, teacher, *, options) -> one loss for each example.

    check     what the two tensors must satisfy
    fused     (loss's name, engine's name, student, teacher, keep, **options) -> the same rows by an
              engine; without it the loss is its formula everywhere
    shortcut  (loss's name, student, teacher, keep, divisor, **options) -> the same rows or, if
              there is a divisor, their sum through it; None where it does not lead there
    """

    def decorate(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(formula)
        tensors = [p.name for p in signature.parameters.values() if p.kind != p.KEYWORD_ONLY]
        own = {p.name: p.default for p in signature.parameters.values() if p.name not in tensors}
        public = [*own, *_REDUCTION]

        @functools.wraps(formula)
        def compute(
            *arguments: Any,
            weights: Tensor | None = None,
            normalizer: Any = None,
            reduction: str = "mean",
            **options: Any,
        ) -> Tensor:
            if len(arguments) != len(tensors):
                arguments = _bound(signature, tensors, arguments, options)
            _checks.options(options, public, formula.__name__)
            _checks.reduction(reduction, normalizer)
            options = own | options
            check(*arguments, **options)
            student, teacher = arguments
            if weights is not None:
                _checks.weights(weights, student.shape[:-1], student.device)
            keep = kept(weights)
            divisor = known_divisor(student, weights, normalizer, reduction)
            losses = shortcut(formula.__name__, student, teacher, keep, divisor, **options)
            if losses is None:
                losses = rows(formula, fused, student, teacher, keep, options)
            elif divisor is not None:
                return losses
            return reduce(losses, weights, normalizer, reduction)

        return _public(compute, formula, fused, signature, _REDUCTION)

    return decorate


def batch_loss(
    check: Callable[..., None],
    fused: Callable[..., Tensor],
    has_kernels: bool = True,
    **added: Any,
) -> Callable:
    """Decorate a formula: (student, teacher, *, options) -> one loss for the batch as a whole.

    check        what the two tensors and the options must satisfy
    fused        (formula, engine's name, student, teacher, **options) -> the same by an engine
    has_kernels  for a GPU; without them the portable engine computes the loss everywhere
    added        options beside those of the formula, with their defaults
    """

    def decorate(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(formula)
        tensors = [p.name for p in signature.parameters.values() if p.kind != p.KEYWORD_ONLY]
        own = {p.name: p.default for p in signature.parameters.values() if p.name not in tensors}
        defaults = own | added

        @functools.wraps(formula)
        def compute(*arguments: Any, **options: Any) -> Tensor:
            if len(arguments) != len(tensors):
                arguments = _bound(signature, tensors, arguments, options)
            _checks.options(options, defaults, formula.__name__)
            options = defaults | options
            check(*arguments, **options)
            # not labels, nor a temperature
            embeddings = [x for x in arguments if isinstance(x, Tensor) and x.ndim > 1]
            engine = _backend.choose(embeddings, has_kernels)
            return fused(formula, engine, *arguments, **options)

        compute.has_kernels = has_kernels  # type: ignore[attr-defined]
        return _public(compute, formula, fused, signature, added)

    return decorate


def _bound(
    signature: inspect.Signature, tensors: Sequence[str], arguments: Any, options: dict[str, Any]
) -> tuple[Any, ...]:
    """The tensors, of which some were given by their names: those are taken out of the options.

    Or not at all, where they have a default.
    """
    given = {name: options.pop(name) for name in tensors if name in options}
    rest = [signature.parameters[name].default for name in tensors[len(arguments) :]]
    if not given and rest and inspect.Parameter.empty not in rest:  # what takes no time
        return *arguments, *rest
    return signature.bind(*arguments, **given).args


def _public(
    compute: Any, formula: Callable, fused: Any, signature: inspect.Signature, added: dict[str, Any]
) -> Callable[..., Tensor]:
    """With the signature that a user sees."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in added.items()
    ]
    compute.__signature__ = signature.replace(
        parameters=[*signature.parameters.values(), *parameters]
    )
    compute.formula, compute.fused = formula, fused
    return compute


def by_formula(
    formula: Callable[..., Tensor],
    dtype: torch.dtype,
    student: Tensor,
    teacher: Tensor,
    **options: Any,
) -> Tensor:
    """The definition itself, computed in `dtype`; the teacher is a constant."""
    with _engine.without_autocast(student.device):
        return formula(student.to(dtype), teacher.detach().to(dtype), **options)


def rows(
    formula: Callable[..., Tensor],
    fused: Callable[..., Tensor] | None,
    student: Tensor,
    teacher: Tensor,
    keep: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """One loss for each example, 0 for those that are not kept."""
    engine = _backend.choose((student, teacher)) if fused else "formula"
    if fused and engine != "formula":
        return fused(formula.__name__, engine, student, teacher, keep, **options)
    dtype = _engine.compute_dtype(student, teacher)
    with _engine.without_autocast(student.device):
        if keep is not None:  # selected before the formula: a NaN left out must not come back
            student = torch.where(keep.unsqueeze(-1), student, 0)
            teacher = torch.where(keep.unsqueeze(-1), teacher, 0)
        losses = formula(student.to(dtype), teacher.detach().to(dtype), **options)
        return losses if keep is None else torch.where(keep, losses, 0)


def kept(weights: Tensor | None) -> Tensor | None:
    if weights is None or weights.dtype == torch.bool:
        return weights
    return weights.detach() != 0


def known_divisor(
    student: Tensor, weights: Tensor | None, normalizer: Any, reduction: str
) -> float | None:
    """The number that the sum of the losses is divided by; None if it is not that simple."""
    if weights is not None or reduction == "none" or isinstance(normalizer, Tensor):
        return None
    if reduction == "sum":
        return 1.0
    return student.shape[:-1].numel() if normalizer is None else normalizer or 1.0


def reduce(losses: Tensor, weights: Tensor | None, normalizer: Any, reduction: str) -> Tensor:
    """mean: Σ w·l / Σ w, or / normalizer; sum: Σ w·l; none: w·l. Nothing left: 0, on the graph."""
    if weights is not None:
        weights = weights.to(losses.dtype)
        losses = losses * weights
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if normalizer is None:
        if weights is None:
            return losses.mean() if losses.numel() else losses.sum()
        normalizer = weights.sum()
    if isinstance(normalizer, Tensor):
        whole = not normalizer.is_floating_point()
        return losses.sum() / (
            normalizer.clamp(min=1) if whole else torch.where(normalizer == 0, 1, normalizer)
        )
    return losses.sum() / (normalizer or 1)
