"""Each loss beside the expression that people write for it today: one line for each in CASES."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

T = 2.0  # the temperature of every case

# rows and classes, or tokens and vocabulary: digits, CIFAR-100, ImageNet, Llama 2, Llama 3
SIZES = [(128, 10), (128, 100), (256, 1000), (2048, 32000)]
GPU_SIZES = [*SIZES, (4096, 128256)]


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q = F.log_softmax(student / T, dim=-1)
    return F.kl_div(log_q, F.softmax(teacher / T, dim=-1), reduction="batchmean") * T**2


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student / T, dim=-1), F.log_softmax(teacher / T, dim=-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * T**2


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student / T, dim=-1), F.log_softmax(teacher / T, dim=-1)
    log_half = torch.tensor(0.5, dtype=log_q.dtype, device=log_q.device).log()
    log_m = torch.logsumexp(torch.stack([log_q + log_half, log_p + log_half]), dim=0)
    of_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    of_q = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return (of_p + of_q) / 2 * T**2


def skew_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = F.softmax(teacher / T, dim=-1), F.softmax(student / T, dim=-1)
    log_m = (0.1 * p + 0.9 * q).log()
    return (p * (F.log_softmax(teacher / T, dim=-1) - log_m)).sum(-1).mean() * T**2


def skew_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = F.softmax(teacher / T, dim=-1), F.softmax(student / T, dim=-1)
    log_m = (0.9 * p + 0.1 * q).log()
    return (q * (F.log_softmax(student / T, dim=-1) - log_m)).sum(-1).mean() * T**2


def symmetric_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student / T, dim=-1), F.log_softmax(teacher / T, dim=-1)
    forward = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    reverse = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return (forward + reverse) / 2 * T**2


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = F.softmax(teacher / T, dim=-1), F.softmax(student / T, dim=-1)
    return 0.5 * (p - q).abs().sum(-1).mean() * T**2


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(student / T, F.softmax(teacher / T, dim=-1)) * T**2


def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher)  # T and T² cancel


def kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * F.cross_entropy(student, labels) + 0.5 * forward_kl(student, teacher)


class Case(NamedTuple):
    loss: Callable[..., Any]
    eager: Callable[..., Tensor]
    with_labels: bool = False

    @property
    def name(self) -> str:
        return self.loss.__name__

    def fastkd(self, *inputs: Tensor) -> Tensor:
        return self.loss(*inputs, temperature=T)

    def inputs(
        self, n_rows: int, n_cols: int, dtype: torch.dtype, device: str = "cpu"
    ) -> list[Tensor]:
        """Student, teacher and perhaps labels, the same numbers on every device."""
        generator = torch.Generator().manual_seed(0)
        student, teacher = (
            torch.randn(n_rows, n_cols, generator=generator).mul_(3).to(device, dtype)
            for _ in range(2)
        )
        labels = torch.randint(n_cols, (n_rows,), generator=generator).to(device)
        return [student.requires_grad_(), teacher, *([labels] if self.with_labels else [])]


CASES = [
    Case(fastkd.forward_kl, forward_kl),
    Case(fastkd.reverse_kl, reverse_kl),
    Case(fastkd.jensen_shannon, jensen_shannon),
    Case(fastkd.skew_kl, skew_kl),
    Case(fastkd.skew_reverse_kl, skew_reverse_kl),
    Case(fastkd.symmetric_kl, symmetric_kl),
    Case(fastkd.total_variation, total_variation),
    Case(fastkd.soft_cross_entropy, soft_cross_entropy),
    Case(fastkd.logit_mse, logit_mse),
    Case(fastkd.kd, kd, with_labels=True),
]
