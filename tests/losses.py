"""Every loss on one line, with what the tests know about it independently of fastkd.

A family joins with its lines: the contracts hold for all CASES.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import textbook
import torch
from torch import Tensor

import fastkd

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


@dataclass(frozen=True)
class Case:
    loss: Callable[..., Any]
    options: dict[str, Any]
    known: tuple[Callable[..., float], Callable[..., Tensor]]  # by hand and eager, see textbook.py
    inputs: Callable[..., list[Tensor]]  # (examples, width, dtype) -> what the loss takes
    fused: bool = True  # whether engines compute it

    def __str__(self) -> str:
        return "-".join([self.loss.__name__, *(f"{k}={v}" for k, v in self.options.items())])

    def __call__(self, *inputs: Tensor, **options: Any) -> Tensor:
        """The loss of fastkd, one for each example."""
        return self.loss(*inputs, **{"reduction": "none", **self.options, **options})

    def eager(self, *inputs: Tensor, **options: Any) -> Tensor:
        return self.known[1](*inputs, **{**self.options, **options})

    def by_hand(self, *inputs: Tensor, **options: Any) -> Tensor:
        options = {**self.options, **options}
        examples = inputs[0].shape[:-1]
        rows = [x.reshape(examples.numel(), *x.shape[len(examples) :]).tolist() for x in inputs]
        losses = [self.known[0](*row, **options) for row in zip(*rows, strict=True)]
        return torch.tensor(losses, dtype=torch.float64, device=inputs[0].device).view(examples)


class BatchCase(Case):
    """A loss of the batch as a whole: one number."""

    def __call__(self, *inputs: Tensor, **options: Any) -> Tensor:
        return self.loss(*inputs, **{**self.options, **options})

    def by_hand(self, *inputs: Tensor, **options: Any) -> Tensor:
        loss = self.known[0](*(x.tolist() for x in inputs), **{**self.options, **options})
        return torch.tensor(loss, dtype=torch.float64, device=inputs[0].device)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """The same numbers on every device and in every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def logits(
    examples: tuple[int, ...], n_cols: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    student, teacher = 3 * normal(2, *examples, n_cols, seed=seed)
    return [student.to(dtype).requires_grad_(), teacher.to(dtype)]


def logits_and_labels(
    examples: tuple[int, ...], n_cols: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_cols, examples, generator=generator).to(DEVICE)
    return [*logits(examples, n_cols, dtype, seed), labels]


def embeddings(
    examples: tuple[int, ...], n_features: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """The teacher's have two features more."""
    student = normal(*examples, n_features, seed=seed, dtype=dtype)
    return [student.requires_grad_(), normal(*examples, n_features + 2, seed=seed + 1, dtype=dtype)]


def _divergence(loss: Callable, known: tuple, temperature: float = 2.0, **options: Any) -> Case:
    return Case(loss, dict(temperature=temperature) | options, known, logits)


def _kd(divergence: str, known: tuple, **options: Any) -> Case:
    options = dict(temperature=4.0, alpha=0.3, divergence=divergence) | options
    return Case(fastkd.kd, options, textbook.with_labels(known), logits_and_labels)


UNSCALED = dict(temperature=2.0, scale_t2=False)

CASES = [
    _divergence(fastkd.forward_kl, textbook.FORWARD_KL, temperature=4.0),
    _divergence(fastkd.forward_kl, textbook.FORWARD_KL, **UNSCALED),
    _divergence(fastkd.reverse_kl, textbook.REVERSE_KL),
    _divergence(fastkd.jensen_shannon, textbook.JENSEN_SHANNON, beta=0.1),
    _divergence(fastkd.jensen_shannon, textbook.JENSEN_SHANNON, beta=0.5, temperature=1.0),
    _divergence(fastkd.jensen_shannon, textbook.FORWARD_KL, beta=0.0),
    _divergence(fastkd.jensen_shannon, textbook.REVERSE_KL, beta=1.0),
    _divergence(fastkd.skew_kl, textbook.SKEW_KL, skew=0.1),
    _divergence(fastkd.skew_kl, textbook.FORWARD_KL, skew=0.0),
    _divergence(fastkd.skew_reverse_kl, textbook.SKEW_REVERSE_KL, skew=0.1),
    _divergence(fastkd.skew_reverse_kl, textbook.REVERSE_KL, skew=0.0),
    _divergence(fastkd.symmetric_kl, textbook.SYMMETRIC_KL, weight=0.3),
    _divergence(fastkd.symmetric_kl, textbook.REVERSE_KL, weight=0.0),
    _divergence(fastkd.symmetric_kl, textbook.FORWARD_KL, weight=1.0),
    _divergence(fastkd.total_variation, textbook.TOTAL_VARIATION),
    _divergence(fastkd.soft_cross_entropy, textbook.SOFT_CROSS_ENTROPY, temperature=4.0),
    Case(
        fastkd.logit_mse, dict(temperature=2.0, scale_t2=False), textbook.LOGIT_MSE, logits, False
    ),
    _kd("forward_kl", textbook.FORWARD_KL),
    _kd("jensen_shannon", textbook.JENSEN_SHANNON, beta=0.1),
    _kd("total_variation", textbook.TOTAL_VARIATION),
]
# of a batch as a whole
RELATIONAL = [
    BatchCase(fastkd.rkd_distance, {}, textbook.RKD_DISTANCE, embeddings),
    BatchCase(fastkd.rkd_angle, {}, textbook.RKD_ANGLE, embeddings),
    BatchCase(fastkd.rkd, {}, textbook.RKD, embeddings),
    BatchCase(
        fastkd.rkd,
        dict(distance_weight=1.0, angle_weight=2.0, smooth_l1_beta=0.25),
        textbook.RKD,
        embeddings,
    ),
]
# one line of each function: what does not depend on the options is tested with it
LOSSES = [case for i, case in enumerate(CASES) if case.loss not in [c.loss for c in CASES[:i]]]

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_relation = pytest.mark.parametrize("case", RELATIONAL, ids=str)
each_loss = pytest.mark.parametrize("case", LOSSES, ids=str)
