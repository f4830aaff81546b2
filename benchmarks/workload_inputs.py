"""Random inputs of the losses at the sizes of their workloads, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]
Inputs = Callable[[Shape, torch.dtype, str], list[Tensor]]  # the first is trained
N_CROPS = (10, 2)  # of the student and of the teacher


def normal(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Return random logits or embeddings, made on the device; on "meta" without numbers."""
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).mul_(3).to(dtype)


def two_networks(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    student, teacher = (normal(shape, dtype, device, seed) for seed in range(2))
    return [student.requires_grad_(), teacher]


def with_labels(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(shape[1], shape[:1], generator=generator)
    return [*two_networks(shape, dtype, device), labels.to(device)]


def one_network(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return logits and labels, without a teacher."""
    return with_labels(shape, dtype, device)[::2]


def with_weak_logits(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return logits, labels and logits of an earlier layer, which are trained too."""
    student, weak, labels = with_labels(shape, dtype, device)
    return [student, labels, weak.requires_grad_()]


def both_trained(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    return [x.requires_grad_() for x in two_networks(shape, dtype, device)]


def heads(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return hidden states and heads, whose logits have a deviation of 3; both trained first."""
    n_tokens, width, *wider, n_cols = shape if len(shape) > 2 else (*shape, shape[-1])
    found = []
    for i, size in enumerate((width, *(wider or [width]))):
        hidden = normal((n_tokens, size), dtype, device, seed=2 * i)
        head = normal((n_cols, size), dtype, device, seed=2 * i + 1).div_(3 * size**0.5)
        found += [hidden.requires_grad_(i == 0), head.requires_grad_(i == 0)]
    return found


def towers(n_numbers: int) -> Inputs:
    """Return a maker of normalised embeddings of both towers, a scale and a bias."""

    def inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        pair = [x.detach() for x in two_networks(shape, dtype, device)]
        numbers = torch.tensor([10.0, -10.0], device=device)[:n_numbers]
        return [*(F.normalize(x).requires_grad_() for x in pair), *numbers]

    return inputs


def views(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return N views of half as many examples."""
    return both_trained((shape[0] // 2, *shape[1:]), dtype, device)


def with_classes(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return features and their classes, 100 of them or so few that most have two examples."""
    n_classes = max(1, min(100, shape[0] // 2))
    return [
        normal(shape, dtype, device).requires_grad_(),
        torch.arange(shape[0], device=device) % n_classes,
    ]


def weighted_maps(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return maps of two networks, and the teacher's scores of their positions."""
    n, _, *sizes = shape
    scores = normal((n, 1, *sizes), dtype, device, seed=2).sigmoid()
    return [*two_networks(shape, dtype, device), scores]


def crops(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return the outputs of the student's and the teacher's crops, and a centre."""
    student = normal((N_CROPS[0], *shape), dtype, device).requires_grad_()
    teacher = normal((N_CROPS[1], *shape), dtype, device, seed=1)
    return [student, teacher, normal(shape[1:], dtype, device, seed=2)]


def maps_of_layers(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return the maps of two layers, for each the student's and the teacher's."""
    networks = [normal(shape, dtype, device, seed) for seed in range(4)]
    return [x.requires_grad_(i % 2 == 0) for i, x in enumerate(networks)]


def maps_and_variances(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    # near where it starts, because log(1 + exp(alpha)) is 0 below −6 in half precision
    alpha = normal(shape[1:2], dtype, device, seed=2).mul_(0.1).add_(5.0)
    return [*two_networks(shape, dtype, device), alpha.requires_grad_()]


def relations(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return queries, keys and values of the student, all trained, and then the teacher's."""
    vectors = [normal(shape, dtype, device, seed) for seed in range(6)]
    return [x.requires_grad_(i < 3) for i, x in enumerate(vectors)]


def likelihoods(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return log-probabilities of groups of tokens, the student's trained."""
    student, teacher = (-normal(shape, dtype, device, seed).abs() for seed in range(2))
    return [student.requires_grad_(), teacher]
