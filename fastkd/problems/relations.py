"""Relations in a batch: the distances between its examples, and the angles that they form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._op import Number, Op
from fastkd._precision import compute_dtype

if TYPE_CHECKING:
    from fastkd._loss import Call

# as published: squared distances are at least this, shorter differences have no direction
LEAST_SQUARE = 1e-12
LEAST_LENGTH = 1e-12


class Relations(NamedTuple):
    """The penalty on differences between the distances and the angles of two networks.

    With H the smooth L1 penalty, d and t the distances of student and teacher in units of their
    means, A and B the cosines of the angles at example j between the examples i and k, it is

        distance_weight / N² · Σ_ij H(d_ij − t_ij) + angle_weight / N³ · Σ_ijk H(A_ijk − B_ijk)

    If `student` is only a part of the batch, an engine returns a share of the loss and the gradient
    of the whole loss in these rows: the shares of all parts add up to the loss.
    """

    student: Tensor  # [n, D], the rows that get a gradient
    teacher: Tensor  # [N, D'], the whole batch
    whole_student: Tensor | None  # [N, D], the student's whole batch if `student` is a part of it
    distance_weight: Number
    angle_weight: Number
    smooth_l1_beta: Number  # where H turns linear
    parts: str  # "distance", "angle" or "both"
    precision: str  # "default" or "high", which computes in float64
    first: int  # the rank offset: the place of the first row of `student` in the batch

    @property
    def whole(self) -> Tensor:
        """Return the student's whole batch, [N, D]."""
        return self.student if self.whole_student is None else self.whole_student

    @property
    def local(self) -> slice:
        """Return the place of `student` in the batch."""
        return slice(self.first, self.first + len(self.student))

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the compute dtype, which `precision` may widen."""
        return _compute_dtype(self.student, self.teacher, self.precision)


solve = Op(Relations, trained=("student",))


def check(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool,
    smooth_l1_beta: Number,
    precision: str,
    **weights: Number,
) -> None:
    """Refuse what is no pair of embeddings of the same examples, and options out of range."""
    _checks.embeddings(student, teacher)
    _option_checks.one_of(("default", "high"), precision=precision)
    _option_checks.at_least_0(smooth_l1_beta=smooth_l1_beta, **weights)


def distances_and_angles(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: Number,
    angle_weight: Number,
    normalize: bool,
    smooth_l1_beta: Number,
    precision: str,
) -> Tensor:
    """Return the weighted sum of both losses of the batch that all ranks hold."""
    dtype = _compute_dtype(student, teacher, precision)
    result_dtype = compute_dtype(student, teacher)
    whole, first = None, 0
    if call.ranks:
        (whole, teacher), first = call.ranks.gather(student, teacher)
    if len(teacher) < 2:
        return student[:0].sum(dtype=result_dtype)
    student, teacher = student.flatten(1), teacher.flatten(1)
    whole = None if whole is None else whole.flatten(1)
    if normalize:
        student, teacher = directions(student.to(dtype)), directions(teacher.to(dtype))
        whole = None if whole is None else directions(whole.to(dtype))
    problem = Relations(
        student=student,
        teacher=teacher,
        whole_student=whole,
        distance_weight=distance_weight,
        angle_weight=angle_weight,
        smooth_l1_beta=smooth_l1_beta,
        parts=_parts(distance_weight, angle_weight),
        precision=precision,
        first=first,
    )
    return call.ranks.total(solve(call.engine, problem).to(result_dtype))


def distances(call: Call, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """Return the loss of the distances alone."""
    return distances_and_angles(
        call, student, teacher, distance_weight=1.0, angle_weight=0.0, **options
    )


def angles(call: Call, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """Return the loss of the angles alone."""
    return distances_and_angles(
        call, student, teacher, distance_weight=0.0, angle_weight=1.0, **options
    )


def directions(rows: Tensor, epsilon: float = 0.0) -> Tensor:
    """Return rows [N, D] divided by length + epsilon; 0, without gradient, if the length is 0."""
    squares = rows.square().sum(1, keepdim=True)
    is_zero = squares < LEAST_LENGTH**2
    # selected before the root is taken, because where a root is 0 its slope is infinite
    return torch.where(is_zero, 0, rows / (torch.where(is_zero, 1, squares).sqrt() + epsilon))


def _compute_dtype(student: Tensor, teacher: Tensor, precision: str) -> torch.dtype:
    """Return float64 if the precision is high, else the compute dtype of the embeddings."""
    return torch.float64 if precision == "high" else compute_dtype(student, teacher)


def _parts(distance_weight: Number, angle_weight: Number) -> str:
    """Return what an engine has to compute.

    A weight that is a tensor may be 0, but it is not read, because that would be a host sync.
    """
    if not isinstance(angle_weight, Tensor) and angle_weight == 0:
        return "distance"
    if not isinstance(distance_weight, Tensor) and distance_weight == 0:
        return "angle"
    return "both"
