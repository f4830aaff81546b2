"""Self-distillation: a network is taught by the moving average of itself, over crops of an image.

Crops are a tensor [n_crops, B, K] or a sequence of tensors [B, K]: K outputs for each of the same B
images. The global crops, which both networks see, come first in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _checks, _distributed
from fastkd._engine import compute_dtype, without_autocast
from fastkd._loss import batch_loss, reduce
from fastkd.divergence import Number, soft_cross_entropy

Crops = Tensor | Sequence[Tensor]


def constant(crops: Crops) -> Tensor:
    """[n_crops, B, K], without gradient."""
    return crops.detach() if isinstance(crops, Tensor) else torch.stack([x.detach() for x in crops])


def _tensors(crops: Crops) -> Sequence[Tensor]:
    return [crops] if isinstance(crops, Tensor) else crops


def _n_pairs(student: Crops, teacher: Crops, skip_same_view: bool) -> int:
    n_same = min(len(student), len(teacher)) if skip_same_view else 0
    return len(student) * len(teacher) - n_same


def _check(
    student: Crops,
    teacher: Crops,
    center: Tensor | None = None,
    *,
    student_temperature: Number,
    teacher_temperature: Number,
    skip_same_view: bool,
    group: Any,
) -> None:
    _checks.crops(student=student, teacher=teacher)
    for crop in _tensors(teacher):
        _checks.constant_teacher(teacher=crop)
    if center is not None:
        _checks.center(center, teacher[0])
        _checks.constant_teacher(center=center)
    if not _n_pairs(student, teacher, skip_same_view):
        raise ValueError(
            f"the teacher's {len(teacher)} and the student's {len(student)} crops have no pair of "
            "different views: add a crop, or pass skip_same_view=False"
        )
    _checks.temperature(student_temperature, "student_temperature")
    _checks.temperature(teacher_temperature, "teacher_temperature")
    _checks.process_group(group)


def _fused(
    formula: Callable[..., Tensor],
    engine: str,
    student: Crops,
    teacher: Crops,
    center: Tensor | None = None,
    *,
    group: Any,
    **options: Any,
) -> Tensor:
    teacher = constant(teacher)
    dtype = compute_dtype(*_tensors(student), teacher)
    teacher = teacher.to(dtype)
    if center is not None:
        center = center.detach().to(dtype)
    with without_autocast(teacher.device):
        if engine == "formula":
            loss = formula([crop.to(dtype) for crop in student], teacher, center, **options)
        else:
            loss = _against_means(student, teacher, center, **options)
        if group is None:
            return loss
        n = loss.new_full((), teacher.shape[1])
        total, n_of_all = _distributed.summed(torch.stack([loss.detach() * n, n]), group)
        n_of_all = n_of_all.clamp(min=1)
        return _distributed.before_averaging(loss * (n / n_of_all), total / n_of_all, group)


def _against_means(
    student: Crops,
    teacher: Tensor,
    center: Tensor | None,
    *,
    student_temperature: Number,
    teacher_temperature: Number,
    skip_same_view: bool,
) -> Tensor:
    """Σ_t H(p_t, q) = n H(mean p_t, q): each crop of the student is read once, not n times."""
    p = teacher if center is None else teacher - center
    p = (p / teacher_temperature).softmax(-1)
    n_global = min(len(student), len(p)) if skip_same_view else 0
    if isinstance(student, Tensor):  # what has the same target at once
        parts = student.split([1] * n_global + [len(student) - n_global])
    else:
        parts = tuple(crop.unsqueeze(0) for crop in student)
    losses = []
    for v, part in enumerate(parts):
        others = torch.cat([p[:v], p[v + 1 :]]) if v < n_global else p
        if len(others) and len(part):
            logits = student_temperature * others.mean(0).log()
            loss = soft_cross_entropy(
                part, logits.expand_as(part),
                temperature=student_temperature, scale_t2=False, reduction="sum",
            )  # fmt: skip
            losses.append(len(others) * loss)
    n = p.shape[1] * _n_pairs(student, p, skip_same_view)
    return torch.stack(losses).sum() / max(n, 1)


@batch_loss(_check, _fused, group=None)
def dino(
    student: Crops,
    teacher: Crops,
    center: Tensor | None = None,
    *,
    student_temperature: Number = 0.1,
    teacher_temperature: Number = 0.04,
    skip_same_view: bool = True,
) -> Tensor:
    """mean_tv H(softmax((t − c) / T_t), softmax(s_v / T_s)), H(p, q) = −Σ p log q: DINO.

    The mean is over the B images and all pairs of a crop t of the teacher and a crop v of the
    student, without those of one index if `skip_same_view`. Shapes: student and teacher
    [n_crops, B, K] or sequences of [B, K] (what lies in one tensor [n_crops · B, K] is
    `.unflatten(0, (n_crops, B))`), the centre c [K]. The teacher and the centre are constants.
    `group` is a process group whose ranks hold parts of the B images: the loss is that of all,
    and after DistributedDataParallel's averaging the gradient too.
    Raises TypeError or ValueError for crops that do not fit together and temperatures ≤ 0.

    Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021. arXiv:2104.14294
    """
    centred = [t if center is None else t - center for t in teacher]
    losses = [
        soft_cross_entropy.formula(s / student_temperature, t / teacher_temperature)
        for i, t in enumerate(centred)
        for j, s in enumerate(student)
        if not (skip_same_view and i == j)
    ]
    return reduce(torch.stack(losses), None, None, "mean")
