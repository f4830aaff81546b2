"""Rows of softmax probabilities against rows: divergences between the logits of two networks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Number = float | Tensor


class Rows(NamedTuple):
    """The divergence of each row from the teacher's and, with labels, its cross-entropy.

    With p = softmax(teacher / teacher_temperature) and q = softmax(student / student_temperature)
    the losses of a row are scale · D(p, q) and −log softmax(student)[label].
    """

    student: Tensor  # (..., V)
    teacher: Tensor  # (..., V)
    labels: Tensor | None  # (...), class numbers; a negative one means no label
    row_mask: Tensor | None  # (...), bool: rows that count in the divergence
    student_temperature: Number
    teacher_temperature: Number
    weight: Number  # the divergence's own option: beta, skew or weight
    scale: Number  # multiplies the divergence
    divergence: str
