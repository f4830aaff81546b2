"""Crops of images against those of a teacher, stated as `Rows`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._loss import Call
from fastkd._op import Number
from fastkd._precision import compute_dtype
from fastkd.problems.rows import Rows, solve

Crops = Tensor | Sequence[Tensor]


def constant(crops: Crops) -> Tensor:
    """Return the crops as one tensor [n_crops, B, K] without gradient."""
    return crops.detach() if isinstance(crops, Tensor) else torch.stack([x.detach() for x in crops])


def tensors_of(crops: Crops) -> Sequence[Tensor]:
    """Return the tensors that the crops consist of."""
    return [crops] if isinstance(crops, Tensor) else crops


def _n_pairs(student: Crops, teacher: Crops, skip_same_view: bool) -> int:
    n_same = min(len(student), len(teacher)) if skip_same_view else 0
    return len(student) * len(teacher) - n_same


def _check_crops(**views: Any) -> None:
    """Raise an error unless all are [n_crops, B, K] or sequences of [B, K], of one B and K."""
    found: list[tuple[str, Tensor]] = []
    for name, view in views.items():
        n_dims = 3 if isinstance(view, Tensor) else 2
        crops = [view] if isinstance(view, Tensor) else view
        needed = (
            f"{name} needs crops: a tensor [n_crops, B, K] or a list or tuple of tensors [B, K]"
        )
        if not isinstance(crops, (list, tuple)) or not all(isinstance(x, Tensor) for x in crops):
            raise TypeError(f"{needed}, got {type(view).__name__}")
        for crop in crops:
            if type(crop) is not Tensor or crop.is_nested:
                _checks.one_piece(name, crop, "a list with a tensor [B, K] for each crop")
            if crop.dtype not in _checks.FLOATS or crop.layout is not torch.strided:
                raise TypeError(
                    f"{name} must hold floating-point outputs (float16, bfloat16, float32 or "
                    f"float64, dense), got {crop.dtype}, {crop.layout}"
                )
            if crop.ndim != n_dims or crop.shape[-1] == 0:
                raise ValueError(
                    f"{needed}, with K ≥ 1, got {_checks.shape(crop)}; crops that lie one after "
                    "the other in [n_crops · B, K] are .unflatten(0, (n_crops, B))"
                )
            found.append((name, crop))
        if not len(view):
            raise ValueError(f"{needed}, got no crop")
    first_name, first = found[0]
    for name, crop in found:
        if crop.shape[-2:] != first.shape[-2:]:
            raise ValueError(
                f"all crops need the same B images and K outputs, got {_checks.shape(first)} in "
                f"{first_name} and {_checks.shape(crop)} in {name}"
            )
        if crop.device != first.device:
            raise ValueError(
                f"{first_name} is on {first.device}, {name} on {crop.device}: move them together"
            )


def check_center(center: Any, like: Tensor) -> None:
    """Raise an error unless the centre has a number for each of K outputs of a teacher (..., K)."""
    if not isinstance(center, Tensor):
        raise TypeError(f"center must be a tensor of shape [K], got {type(center).__name__}")
    _checks.one_piece("center", center, "one tensor [K]")
    if center.shape != like.shape[-1:] or center.dtype not in _checks.FLOATS:
        raise ValueError(
            f"center needs one floating-point number for each of K = {like.shape[-1]} outputs, got "
            f"{_checks.shape(center)} of {center.dtype}"
        )
    _checks.same_device(teacher=like, center=center)


def check(
    student: Crops,
    teacher: Crops,
    center: Tensor | None = None,
    *,
    student_temperature: Number,
    teacher_temperature: Number,
    skip_same_view: bool,
) -> None:
    """Raise an error for crops that do not fit together and options out of range."""
    _check_crops(student=student, teacher=teacher)
    for crop in tensors_of(teacher):
        _checks.constant_teacher(teacher=crop)
    if center is not None:
        check_center(center, teacher[0])
        _checks.constant_teacher(center=center)
    if not _n_pairs(student, teacher, skip_same_view):
        raise ValueError(
            f"the teacher's {len(teacher)} and the student's {len(student)} crops have no pair of "
            "different views: add a crop, or pass skip_same_view=False"
        )
    _option_checks.temperature(student_temperature, "student_temperature")
    _option_checks.temperature(teacher_temperature, "teacher_temperature")


def against_means(
    call: Call,
    student: Crops,
    teacher: Crops,
    center: Tensor | None = None,
    *,
    student_temperature: Number,
    teacher_temperature: Number,
    skip_same_view: bool,
) -> Tensor:
    """Solve Σ_t H(p_t, q) as n H(mean p_t, q), which reads a student's crop once, not n times."""
    teacher = constant(teacher)
    dtype = compute_dtype(*tensors_of(student), teacher)
    p = teacher.to(dtype)
    if center is not None:
        p = p - center.detach().to(dtype)
    p = (p / teacher_temperature).softmax(-1)
    n_same = min(len(student), len(p)) if skip_same_view else 0
    if isinstance(student, Tensor):  # all crops that have one target are solved at once
        groups = [[part] for part in student.split([1] * n_same + [len(student) - n_same])]
    else:
        crops = [crop.unsqueeze(0) for crop in student]
        groups = [*([crop] for crop in crops[:n_same]), crops[n_same:]]
    losses = []
    for v, group in enumerate(groups):
        others = torch.cat([p[:v], p[v + 1 :]]) if v < n_same else p
        if not len(others) or not any(map(len, group)):
            continue
        target = student_temperature * others.mean(0).log()
        for part in group:
            T, expanded = student_temperature, target.expand_as(part)
            rows = Rows(part, expanded, None, None, T, T, 0.0, 1.0, "soft_cross_entropy")
            losses.append(len(others) * solve(call.engine, rows)[0].sum())
    n = p.shape[1] * _n_pairs(student, p, skip_same_view)
    return torch.stack(losses).sum() / max(n, 1)
