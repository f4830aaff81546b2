"""Self-distillation: the moving average of a network teaches it, over crops of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._loss import loss
from fastkd._op import Number
from fastkd.divergence import soft_cross_entropy
from fastkd.problems import _crops as crops

Crops = Tensor | Sequence[Tensor]


@loss(crops.check, crops.against_means, is_mean=True)
def dino(
    student: Crops,
    teacher: Crops,
    center: Tensor | None = None,
    *,
    student_temperature: Number = 0.1,
    teacher_temperature: Number = 0.04,
    skip_same_view: bool = True,
    group: Any = None,
) -> Tensor:
    """Compute mean_tv H(softmax((t − c) / T_t), softmax(s_v / T_s)) with H(p, q) = −Σ p log q.

    The mean is over the B images and the pairs of a crop t of the teacher and a crop v of the
    student. The global crops, which both networks see, come first in both.

    Args:
        student: Outputs of the student for its crops: a tensor [n_crops, B, K] or a sequence of
            tensors [B, K]. An output [n_crops · B, K] is `.unflatten(0, (n_crops, B))`.
        teacher: Outputs of the teacher for its crops, as above. They get no gradient.
        center: The centre c [K], which is subtracted from the teacher's outputs. A constant.
        student_temperature: T_s > 0. A number or a 0-dim tensor.
        teacher_temperature: T_t > 0. A number or a 0-dim tensor.
        skip_same_view: Whether pairs of one index, which are the same crop, are no pairs.
        group: A torch.distributed process group, or "world" for all ranks, whose ranks hold parts
            of the B images, of any sizes. Each rank gets the loss of the whole batch, and
            DistributedDataParallel averages the gradients to that of the whole batch.

    Returns:
        A scalar.

    Raises:
        TypeError: Student, teacher or centre are no floating-point tensors.
        ValueError: The crops do not fit together, have no pair, or a temperature is not above 0.

    Reference:
        Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021.
        arXiv:2104.14294
    """
    centred = [t if center is None else t - center.detach() for t in teacher]
    losses = [
        soft_cross_entropy.formula(s / student_temperature, t / teacher_temperature)
        for i, t in enumerate(centred)
        for j, s in enumerate(student)
        if not (skip_same_view and i == j)
    ]
    of_pairs = torch.stack(losses)
    return of_pairs.mean() if of_pairs.numel() else of_pairs.sum()
