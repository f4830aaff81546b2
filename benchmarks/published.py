"""Relational distillation as its authors' code and its followers compute it, for comparison.

Distances come from a Gram matrix and are divided by the mean of the positive ones, angles from all
N² directions at once: N² D and N³ numbers for each network, and several of them for autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _squares(x: Tensor) -> Tensor:
    products = x @ x.T
    lengths = products.diagonal()
    return lengths[:, None] + lengths - 2 * products


def _distances(x: Tensor) -> Tensor:
    d = _squares(x).clamp(min=1e-12).sqrt()
    return d.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)


def _relative(d: Tensor) -> Tensor:
    return d / d[d > 0].mean()


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        target = _relative(_distances(teacher))
    return F.smooth_l1_loss(_relative(_distances(student)), target)


def _cosines(x: Tensor) -> Tensor:
    directions = F.normalize(x[None] - x[:, None], dim=2)
    return directions @ directions.mT


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        target = _cosines(teacher)
    return F.smooth_l1_loss(_cosines(student), target)


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    return 25 * rkd_distance(student, teacher) + 50 * rkd_angle(student, teacher)


rkd_distance_from_gram = rkd_distance


def _cosines_from_gram(x: Tensor) -> Tensor:
    """[j, i, k], by the law of cosines."""
    q = _squares(x).clamp(min=0).fill_diagonal_(0)
    r = torch.where(q < 1e-24, 0, torch.where(q < 1e-24, 1, q).rsqrt())
    return (q[:, :, None] + q[:, None] - q) / 2 * r[:, :, None] * r[:, None]


def rkd_angle_from_gram(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        target = _cosines_from_gram(teacher)
    return F.smooth_l1_loss(_cosines_from_gram(student), target)
