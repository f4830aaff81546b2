"""Solve `Linear` in PyTorch, for any device: the divergences of each chunk of logits as `Rows`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkd import _heads
from fastkd.portable import rows
from fastkd.problems.linear import Linear, compute_dtype_of  # noqa: F401
from fastkd.problems.linear import width_of_report as n_statistics  # noqa: F401

Gradients = tuple[Tensor | None, ...]


def value_and_gradients(
    problem: Linear, needs_grad: Sequence[bool]
) -> tuple[tuple[Tensor, Tensor], Gradients]:
    """Return Σ weight · loss and the report, and the gradients of that sum."""
    return _heads.value_and_gradients(problem, needs_grad, rows.value_and_gradients)


def forward(problem: Linear, needs_grad: Sequence[bool]) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """Return the loss of each row without its weight, and the report."""
    losses, report = _heads.losses_of_rows(problem, rows.value_and_gradients)
    return (losses,), (report,)


def backward(
    problem: Linear,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
) -> Gradients:
    """Return the gradients of Σ upstream · loss, for which all is computed again."""
    (of_losses,) = upstream
    assert of_losses is not None
    return _heads.gradients_of_rows(problem, of_losses, needs_grad, rows.value_and_gradients)
