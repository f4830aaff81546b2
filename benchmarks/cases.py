"""Each loss beside the expression that people write for it today: one line for each in CASES."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import published
import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

T = 2.0  # the temperature of every case


class Family(NamedTuple):
    """What the losses of one module of fastkd share: a family joins all benchmarks with its own."""

    name: str  # fastkd/<name>.py, kernels/<name>.py
    axes: tuple[str, ...]  # what the numbers of a shape are called
    temporary: Callable[[tuple[int, ...]], int]  # numbers in the largest that eager writes
    sizes: list[tuple[int, ...]]  # that a CPU takes seconds for at most
    gpu_sizes: list[tuple[int, ...]]
    compiled_sizes: list[tuple[int, ...]]  # where the launch sites choose another code
    independent: bool = True  # the examples, N of them


# rows and classes, or tokens and vocabulary: digits, CIFAR-100, ImageNet, Llama 2, Llama 3
_DIVERGENCE_SIZES = [(128, 10), (128, 100), (256, 1000), (2048, 32000)]
DIVERGENCE = Family(
    "divergence",
    ("N", "V"),
    math.prod,
    _DIVERGENCE_SIZES,
    [*_DIVERGENCE_SIZES, (4096, 128256)],
    # long rows, off the boundary of 16 bytes, fewer than multiprocessors, on chip, many in one
    [(4096, 128256), (4096, 151669), (8, 128256), (8192, 8192), (256, 1000), (128, 10)],
)

# batches of images, and global ones; widths of ResNets and of transformers
_RELATIONAL_SIZES = [(64, 64), *product((64, 128, 256, 512, 1024, 2048), (128, 512, 1024))]
RELATIONAL = Family(
    "relational",
    ("N", "D"),
    lambda shape: shape[0] ** 2 * sum(shape),  # all cosines, and all differences
    _RELATIONAL_SIZES,
    [*_RELATIONAL_SIZES, (4096, 512)],
    # several programs for a third of each tile's points, one
    [(2048, 1024), (1024, 512), (256, 512), (64, 128)],
    independent=False,
)

# features of a layer, of a small and of a large batch; rows and classes for DIST
_CORRELATION_SIZES = [(64, 128), (256, 1000), (256, 16384), (2048, 512)]
CORRELATION = Family(
    "correlation",
    ("N", "D"),
    lambda shape: shape[0] * max(shape),
    _CORRELATION_SIZES,
    _CORRELATION_SIZES,
    [],  # PyTorch's kernels
    independent=False,
)

# batches of a GPU, and global ones; widths of projections and of encoders
CONTRASTIVE = Family(
    "contrastive",
    ("N", "D"),
    lambda shape: shape[0] ** 2,
    [(256, 256), (1024, 256), (4096, 256), (8192, 256)],
    [*product((1024, 4096, 8192, 16384, 32768, 65536), (64, 256, 512, 1024))],
    # many and few rows of tiles, and the widest tiles
    [(32768, 256), (32768, 128), (4096, 256), (4096, 64)],
    independent=False,
)
# of one loss the other widths, and batches whose similarities fit into no memory
_SERIES = [(4096, 64), (4096, 512), (4096, 1024), (16384, 256), (32768, 256), (65536, 64)]
SIMILARITY = CONTRASTIVE._replace(name="similarity", compiled_sizes=[(32768, 256), (4096, 64)])

N_CROPS = (10, 2)  # of the student and of the teacher
# images of a GPU and outputs of DINO's head, and smaller
_SELF_DISTILLATION_SIZES = [(8, 1024), (16, 8192), (16, 65536)]
SELF_DISTILLATION = Family(
    "self_distillation",
    ("B", "K"),
    lambda shape: N_CROPS[0] * math.prod(shape),
    _SELF_DISTILLATION_SIZES,
    [*_SELF_DISTILLATION_SIZES, (64, 65536), (64, 131072)],
    [],  # the kernels of divergences
)


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


def logits(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Of student and teacher, or embeddings: the same on every device, no numbers on "meta"."""
    if device == "meta":
        student, teacher = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    else:
        generator = torch.Generator().manual_seed(0)
        student, teacher = (
            torch.randn(shape, generator=generator).mul_(3).to(device, dtype) for _ in range(2)
        )
    return [student.requires_grad_(), teacher]


def logits_and_labels(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(shape[1], shape[:1], generator=generator)
    return [*logits(shape, dtype, device), labels.to(device)]


def towers(n_numbers: int) -> Callable[..., list[Tensor]]:
    """Normalised embeddings of both, a scale and a bias."""

    def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        pair = [F.normalize(x.detach()).requires_grad_() for x in logits(shape, dtype, device)]
        return [*pair, *torch.tensor([10.0, -10.0], device=device)[:n_numbers]]

    return inputs


def both_trained(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    return [x.requires_grad_() for x in logits(shape, dtype, device)]


def views(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """N of them, of half as many examples."""
    return both_trained((shape[0] // 2, *shape[1:]), dtype, device)


def features_and_labels(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    return [logits(shape, dtype, device)[0], torch.arange(shape[0], device=device) % 100]


def crops(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Of student and teacher, and a centre."""
    student, teacher = logits((N_CROPS[0], *shape), dtype, device)
    return [student, teacher[: N_CROPS[1]], teacher[-1, 0]]


class Case(NamedTuple):
    family: Family
    loss: Callable[..., Any]
    eager: Callable[..., Tensor]
    inputs: Callable[..., list[Tensor]] = logits  # (shape, dtype, device); the first is trained
    options: Mapping[str, Any] = MappingProxyType({"temperature": T})
    more_sizes: Sequence[tuple[int, ...]] = ()  # of a CPU

    @property
    def name(self) -> str:
        return self.loss.__name__

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Of a CPU."""
        return [*self.family.sizes, *self.more_sizes]

    def fastkd(self, *inputs: Tensor) -> Tensor:
        return self.loss(*inputs, **self.options)


CASES = [
    Case(DIVERGENCE, fastkd.forward_kl, forward_kl),
    Case(DIVERGENCE, fastkd.reverse_kl, reverse_kl),
    Case(DIVERGENCE, fastkd.jensen_shannon, jensen_shannon),
    Case(DIVERGENCE, fastkd.skew_kl, skew_kl),
    Case(DIVERGENCE, fastkd.skew_reverse_kl, skew_reverse_kl),
    Case(DIVERGENCE, fastkd.symmetric_kl, symmetric_kl),
    Case(DIVERGENCE, fastkd.total_variation, total_variation),
    Case(DIVERGENCE, fastkd.soft_cross_entropy, soft_cross_entropy),
    Case(DIVERGENCE, fastkd.logit_mse, logit_mse),
    Case(DIVERGENCE, fastkd.kd, kd, logits_and_labels),
    Case(RELATIONAL, fastkd.rkd_distance, published.rkd_distance, options={}),
    Case(RELATIONAL, fastkd.rkd_angle, published.rkd_angle, options={}),
    Case(RELATIONAL, fastkd.rkd, published.rkd, options={}),
    Case(CORRELATION, fastkd.similarity_preserving, published.similarity_preserving, options={}),
    Case(CORRELATION, fastkd.pkt, published.pkt, options={}),
    Case(
        CORRELATION,
        fastkd.correlation_congruence,
        published.correlation_congruence,
        options={"form": "kernel"},
    ),
    Case(CORRELATION, fastkd.dist_kd, published.dist_kd),
    Case(
        CONTRASTIVE,
        fastkd.info_nce,
        published.info_nce,
        both_trained,
        {},
        _SERIES,
    ),
    Case(
        CONTRASTIVE,
        fastkd.clip_contrastive,
        published.clip_contrastive,
        towers(1),
        {},
        _SERIES[-1:],
    ),
    Case(CONTRASTIVE, fastkd.siglip, published.siglip, towers(2), {}),
    Case(CONTRASTIVE, fastkd.nt_xent, published.nt_xent, views, {}),
    Case(CONTRASTIVE, fastkd.sup_con, published.sup_con, features_and_labels, {}),
    Case(SIMILARITY, fastkd.similarity_kl, published.similarity_kl, options={}),
    Case(SELF_DISTILLATION, fastkd.dino, published.dino, crops, {}),
]
