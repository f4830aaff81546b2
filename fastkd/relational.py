"""Relational knowledge distillation: the distances and the angles between the examples of a batch.

Student and teacher are embeddings [N, D] of the same N examples; D may differ, more dimensions are
flattened. A loss compares relations inside one network with those inside the other, so that it is
one number for the batch and takes no weights and no reduction. The teacher is a constant. Examples
that coincide have no direction and pass no gradient to each other. Fewer than two examples have no
relations: their loss is 0.

With a `group` the batch is spread over the ranks of a process group, in parts of any sizes. Each
rank gets the loss of the whole batch and, times the number of ranks, its gradient in the rank's
rows, which DistributedDataParallel averages into the gradient of a single process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._loss import loss
from fastkd.problems import relations
from fastkd.problems.relations import LEAST_LENGTH, LEAST_SQUARE, Number, directions


@loss(relations.check, relations.distances, per_example=False)
def rkd_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = False,
    smooth_l1_beta: Number = 1.0,
    precision: str = "default",
    group: Any = None,
) -> Tensor:
    """Compare the relative distances of pairs of examples.

        (1/N²) Σ_ij H(d_ij / mean d − t_ij / mean t)

    d and t are the distances between the embeddings of student and teacher, means are over the
    pairs of different examples, H is the smooth L1 penalty.

    Args:
        student: Embeddings [N, ...], float16, bfloat16, float32 or float64.
        teacher: Embeddings [N, ...] of the same examples, of any width; a constant.
        normalize: Whether to divide each embedding by its length first.
        smooth_l1_beta: Where H turns linear, ≥ 0, in units of the mean distance, like the `beta`
            of `torch.nn.functional.smooth_l1_loss`: a number or a 0-dim tensor without gradient.
        precision: "default", or "high" to compute in float64, for batches that hold
            near-duplicates.
        group: A torch.distributed process group whose ranks hold parts of the batch, "world" for
            all ranks, or None.

    Returns:
        The loss, a 0-dim tensor in float32, or in float64 where an input is float64.

    Raises:
        TypeError: If an input is no tensor of floating-point embeddings, or `group` no process
            group.
        ValueError: If the inputs differ in N or in their device, or if an option is outside its
            range.
        RuntimeError: If there is a `group`, but torch.distributed is not initialised.

    Reference:
        Park et al., Relational Knowledge Distillation, 2019. arXiv:1904.05068
    """
    if len(student) < 2:
        return student[:0].sum()
    s, t = (_rows(x, normalize, precision) for x in (student, teacher))
    loss = _mean_penalty(_relative_distances(s), _relative_distances(t), smooth_l1_beta)
    return loss.to(student.dtype)


@loss(relations.check, relations.angles, per_example=False)
def rkd_angle(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = False,
    smooth_l1_beta: Number = 1.0,
    precision: str = "default",
    group: Any = None,
) -> Tensor:
    """Compare the angles of triples of examples.

        (1/N³) Σ_ijk H(cos ∠s_ijk − cos ∠t_ijk)

    ∠s_ijk and ∠t_ijk are the angles at example j between those to i and k, of student and teacher,
    H is the smooth L1 penalty. Triples with i = j or j = k enter with a cosine of 0, those with
    i = k with 1. Engines take memory for N² numbers, this definition for N³ and N² D.

    Args:
        student: Embeddings [N, ...], float16, bfloat16, float32 or float64.
        teacher: Embeddings [N, ...] of the same examples, of any width; a constant.
        normalize: Whether to divide each embedding by its length first.
        smooth_l1_beta: Where H turns linear, ≥ 0, in units of the cosine, like the `beta` of
            `torch.nn.functional.smooth_l1_loss`: a number or a 0-dim tensor without gradient.
        precision: "default", or "high" to compute in float64, for batches that hold
            near-duplicates.
        group: A torch.distributed process group whose ranks hold parts of the batch, "world" for
            all ranks, or None.

    Returns:
        The loss, a 0-dim tensor in float32, or in float64 where an input is float64.

    Raises:
        TypeError: If an input is no tensor of floating-point embeddings, or `group` no process
            group.
        ValueError: If the inputs differ in N or in their device, or if an option is outside its
            range.
        RuntimeError: If there is a `group`, but torch.distributed is not initialised.

    Reference:
        Park et al., Relational Knowledge Distillation, 2019. arXiv:1904.05068
    """
    if len(student) < 2:
        return student[:0].sum()
    s, t = (_rows(x, normalize, precision) for x in (student, teacher))
    return _mean_penalty(_cosines(s), _cosines(t), smooth_l1_beta).to(student.dtype)


@loss(relations.check, relations.distances_and_angles, per_example=False)
def rkd(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: Number = 25.0,
    angle_weight: Number = 50.0,
    normalize: bool = False,
    smooth_l1_beta: Number = 1.0,
    precision: str = "default",
    group: Any = None,
) -> Tensor:
    """Compare distances and angles: both relational losses, the work for pairs done once.

        distance_weight · rkd_distance + angle_weight · rkd_angle

    Args:
        student: Embeddings [N, ...], float16, bfloat16, float32 or float64.
        teacher: Embeddings [N, ...] of the same examples, of any width; a constant.
        distance_weight: The weight of the distances, ≥ 0, a number or a 0-dim tensor without
            gradient. The default is that of the authors' code for classification.
        angle_weight: The weight of the angles, likewise.
        normalize: Whether to divide each embedding by its length first.
        smooth_l1_beta: Where the smooth L1 penalty turns linear, ≥ 0, like the `beta` of
            `torch.nn.functional.smooth_l1_loss`: a number or a 0-dim tensor without gradient.
        precision: "default", or "high" to compute in float64, for batches that hold
            near-duplicates.
        group: A torch.distributed process group whose ranks hold parts of the batch, "world" for
            all ranks, or None.

    Returns:
        The loss, a 0-dim tensor in float32, or in float64 where an input is float64.

    Raises:
        TypeError: If an input is no tensor of floating-point embeddings, or `group` no process
            group.
        ValueError: If the inputs differ in N or in their device, or if an option is outside its
            range.
        RuntimeError: If there is a `group`, but torch.distributed is not initialised.

    Reference:
        Park et al., Relational Knowledge Distillation, 2019. arXiv:1904.05068
    """
    s, t = (_rows(x, normalize, precision) for x in (student, teacher))
    distance, angle = (
        formula(s, t, smooth_l1_beta=smooth_l1_beta)
        for formula in (rkd_distance.formula, rkd_angle.formula)
    )
    return (distance_weight * distance + angle_weight * angle).to(student.dtype)


def _mean_penalty(student: Tensor, teacher: Tensor, beta: Number) -> Tensor:
    """Return the mean of the smooth L1 penalty; PyTorch takes a 0-dim tensor as its beta too."""
    return F.smooth_l1_loss(student, teacher, beta=beta)  # type: ignore[arg-type]


def _rows(embeddings: Tensor, normalize: bool, precision: str) -> Tensor:
    """Return embeddings [N, D] in the precision that is asked for, normalised if they must be."""
    rows = embeddings.flatten(1)
    rows = rows.double() if precision == "high" else rows
    return directions(rows) if normalize else rows


def _relative_distances(rows: Tensor) -> Tensor:
    """Return [N, N], distances in units of their mean over pairs of different examples."""
    squares = (rows[:, None] - rows[None]).square().sum(-1)
    close = squares < LEAST_SQUARE
    # selected before the root is taken, because where a root is 0 its slope is infinite
    distances = torch.where(close, LEAST_SQUARE**0.5, torch.where(close, 1, squares).sqrt())
    n = len(rows)
    distances = distances.masked_fill(torch.eye(n, dtype=torch.bool, device=squares.device), 0)
    return distances / (distances.sum() / (n * (n - 1)))


def _cosines(rows: Tensor) -> Tensor:
    """Return [j, i, k], the cosine of the angle at example j between the directions to i and k."""
    differences = rows[None] - rows[:, None]
    squares = differences.square().sum(-1, keepdim=True)
    close = squares < LEAST_LENGTH**2
    directions = torch.where(close, 0, differences / torch.where(close, 1, squares).sqrt())
    return directions @ directions.mT
