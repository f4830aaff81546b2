"""Masked patches of images against a teacher's, stated as `Rows`, and the neighbours of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._loss import Call
from fastkd._op import Number
from fastkd._precision import compute_dtype
from fastkd._reduction import totals
from fastkd.problems import _crops
from fastkd.problems.rows import Rows, solve
from fastkd.problems.tokens import as_bool, check_mask

_AT_ONCE = 1 << 24  # products of embeddings, in a chunk of the search for neighbours


def _check_outputs(name: str, tensor: Any, needed: str, what: str) -> None:
    way = "the outputs of all images, with a mask"
    _checks.floats(name, tensor, f"a tensor of shape {needed}", "outputs", way)
    if tensor.ndim < 2 or tensor.shape[-1] == 0:
        raise ValueError(
            f"{name} needs the shape {needed} with K ≥ 1, {what}, got {_checks.shape(tensor)}"
        )


def check_outputs(teacher: Tensor, mask: Tensor | None) -> None:
    """Raise an error for outputs of a teacher of which no centre can be made."""
    _check_outputs("teacher", teacher, "(..., K)", "an output for each crop or patch")
    if mask is not None:
        check_mask(mask, teacher, "teacher")


def check(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    center: Tensor | None = None,
    *,
    student_temperature: Number,
    teacher_temperature: Number,
) -> None:
    """Raise an error for patches that do not fit together and options out of range."""
    tensors = dict(student_patches=student, teacher_patches=teacher)
    for name, tensor in tensors.items():
        _check_outputs(name, tensor, "[B, L, K]", "an output for each of L patches of B images")
    if student.shape != teacher.shape:
        raise ValueError(
            "student_patches and teacher_patches need the same patches and outputs, got "
            f"{_checks.shape(student)} and {_checks.shape(teacher)}: pass those of the same crops; "
            "of masked ones alone fastkd.soft_cross_entropy with weights makes this loss"
        )
    _checks.same_device(**tensors)
    _checks.constant_teacher(teacher_patches=teacher)
    check_mask(mask, student, "student_patches")
    if center is not None:
        _crops.check_center(center, teacher)
    _option_checks.temperature(student_temperature, "student_temperature")
    _option_checks.temperature(teacher_temperature, "teacher_temperature")


def masked(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    center: Tensor | None = None,
    *,
    student_temperature: Number,
    teacher_temperature: Number,
) -> Tensor:
    """Solve for the mean over the masked patches of each image."""
    mask = as_bool(mask)
    counts = mask if call.row_mask is None else mask & call.row_mask.unsqueeze(-1)
    of_student, of_teacher, places = student, teacher.detach(), places_of(counts)
    counted: Tensor | None = counts
    if places is not None:
        of_student, of_teacher = (x.flatten(0, -2)[places] for x in (of_student, of_teacher))
        counted = None
    if center is not None:
        dtype = compute_dtype(student, teacher)
        of_teacher = of_teacher.to(dtype) - center.detach().to(dtype)
    problem = Rows(
        of_student, of_teacher, None, counted, student_temperature, teacher_temperature, 0.0, 1.0,
        "soft_cross_entropy",
    )  # fmt: skip
    losses, _ = solve(call.engine, problem)
    if places is not None:
        losses = losses.new_zeros(mask.numel()).index_copy(0, places, losses).view(mask.shape)
    return mean_of_masked(losses, mask)


def places_of(mask: Tensor) -> Tensor | None:
    """Return the numbers of the masked patches, or None where to find them is a host sync."""
    return mask.flatten().nonzero().squeeze(1) if _checks.has_values_at_hand(mask) else None


def mean_of_masked(losses: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the masked patches of each image, 0 for an image without one."""
    return totals(losses) / mask.sum(-1).clamp(min=1)


# -------------------------------------------------------------------------------------- neighbours


def check_embeddings(embeddings: Tensor, *, epsilon: float) -> None:
    """Raise an error for what are no embeddings, and an epsilon out of range."""
    _checks.matrices(embeddings=embeddings)
    _option_checks.at_least_0(epsilon=epsilon)


@torch.no_grad()
def nearest(units: Tensor) -> Tensor:
    """Return for each row of length 1 the number of the nearest other one, by chunks of rows."""
    n, found = len(units), []
    size = max(1, _AT_ONCE // n)
    for start in range(0, n, size):
        products = units[start : start + size] @ units.mT
        products.diagonal(start).fill_(-2)  # below every cosine, because none is its own neighbour
        found.append(products.argmax(1))
    return torch.cat(found)


def rows_at(places: Tensor, rows: Tensor) -> Tensor:
    """Return the rows at these places, of which some may be the same, in this order."""
    # each of the two adds gradients of one row atomically, in any order, where the other is taken
    return rows.index_select(0, places) if rows.is_cpu else rows[places]
