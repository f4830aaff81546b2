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
    n_own = min(len(student), len(p)) if skip_same_view else 0
    if isinstance(student, Tensor):  # all that have one target at once
        groups = [[part] for part in student.split([1] * n_own + [len(student) - n_own])]
    else:
        crops = [crop.unsqueeze(0) for crop in student]
        groups = [*([crop] for crop in crops[:n_own]), crops[n_own:]]
    losses = []
    for v, group in enumerate(groups):
        others = torch.cat([p[:v], p[v + 1 :]]) if v < n_own else p
        if not len(others) or not any(map(len, group)):
            continue
        target = student_temperature * others.mean(0).log()
        for part in group:
            loss = soft_cross_entropy(
                part,
                target.expand_as(part),
                temperature=student_temperature,
                scale_t2=False,
                reduction="sum",
            )
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

    The mean over the B images and the pairs of a crop t of the teacher and a crop v of the student,
    with `skip_same_view` without those of one index. Shapes: [n_crops, B, K] or sequences of
    [B, K], the centre c [K]; an output [n_crops · B, K] is `.unflatten(0, (n_crops, B))`. Teacher
    and centre are constants. With a process group as `group` the B images are those of all ranks,
    and DistributedDataParallel's averaging gives the gradient of the whole.
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
