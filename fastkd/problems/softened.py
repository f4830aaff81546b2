"""Rows whose teacher or temperatures are trained too, or whose temperatures differ by row."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastkd._op import Number, Op


class Softened(NamedTuple):
    """The divergence of each row, without the mixture of its gradients: all four are trained.

    It is D(p, q) of p = softmax(teacher / teacher_temperature) and q = softmax(student /
    student_temperature), with one temperature for each row.
    """

    student: Tensor  # (..., V)
    teacher: Tensor  # (..., V)
    student_temperature: Tensor  # (...)
    teacher_temperature: Tensor  # (...)
    row_mask: Tensor | None  # (...), bool: rows that count
    weight: Number  # the divergence's own option: beta, skew or weight
    divergence: str


solve = Op(
    Softened,
    trained=("student", "teacher", "student_temperature", "teacher_temperature"),
    per_example=True,
    recomputes=True,
)

# the divergence that has the same value when the networks change places, and what becomes of its
# option: the gradient for one network is that of the mirror for the other
_MIRRORS = {
    "forward_kl": "reverse_kl",
    "reverse_kl": "forward_kl",
    "jensen_shannon": "jensen_shannon",
    "skew_kl": "skew_reverse_kl",
    "skew_reverse_kl": "skew_kl",
    "symmetric_kl": "symmetric_kl",
    "total_variation": "total_variation",
    "soft_cross_entropy": "reverse_cross_entropy",
}


def mirror_of(divergence: str, weight: Number) -> tuple[str, Number]:
    """Return D' and its option with D'(q, p) = D(p, q)."""
    is_share = divergence in ("jensen_shannon", "symmetric_kl")
    return _MIRRORS[divergence], 1 - weight if is_share else weight
