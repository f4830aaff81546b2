"""Relations in a batch: the distances between its examples, and the angles that they form."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Number = float | Tensor


class Relations(NamedTuple):
    """The penalty on differences between the distances and the angles of two networks."""

    student: Tensor  # [n, D], the rows that get a gradient
    teacher: Tensor  # [N, D'], the whole batch
    whole_student: Tensor | None  # [N, D], the student's whole batch if `student` is a part of it
    distance_weight: Number
    angle_weight: Number
    smooth_l1_beta: Number
    parts: str  # "distance", "angle" or "both"
    precision: str  # "default" or "high"
    first: int  # the place of the first row of `student` in the batch
