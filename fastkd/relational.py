"""Relational knowledge distillation: the distances and the angles between the examples of a batch.

Student and teacher are embeddings [N, D] of the same N examples; D may differ, more dimensions are
flattened. What is compared are relations inside each network, so a loss is one number for the batch
and takes no weights and no reduction. All of them take

normalize       divide each embedding by its length first
smooth_l1_beta  where the penalty H turns linear: that of `torch.nn.functional.smooth_l1_loss`
precision       "high" computes in float64, for batches that hold near-duplicates
group           a torch.distributed process group whose ranks hold parts of the batch, of any sizes.
                Each gets the loss of the whole and, times the number of ranks, its gradient in the
                own rows: what DistributedDataParallel averages into that of a single process.

The teacher is a constant. Examples that coincide have no direction and pass no gradient to each
other. Fewer than two examples have no relations: their loss is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _checks, _distributed
from fastkd._engine import Engine, compute_dtype, is_differentiated
from fastkd._loss import batch_loss, by_formula

Number = float | Tensor

# as published: the squares of distances are at least this, shorter differences have no direction
LEAST_SQUARE = 1e-12
LEAST_LENGTH = 1e-12


class Problem(NamedTuple):
    """The arguments that every function of an engine of this family takes."""

    student: Tensor  # [n, D], the rows whose gradient is wanted
    teacher: Tensor  # [N, D'], the whole batch
    everyone: Tensor | None  # [N, D], the student's whole batch, if `student` is a part of it
    distance_weight: Number
    angle_weight: Number
    smooth_l1_beta: Number
    parts: str  # "distance", "angle" or "both"
    precision: str  # "default" or "high"
    trained: bool
    first: int  # the place of the first row of `student` in the batch

    @property
    def students(self) -> Tensor:
        return self.student if self.everyone is None else self.everyone

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return _dtype(self.student, self.teacher, self.precision)

    def allocate(self) -> tuple[Tensor, Tensor]:
        """Empty: the own rows' share of the loss, and the gradient of the whole loss in them."""
        dtype = compute_dtype(self.student, self.teacher)
        shape = self.student.shape if self.trained else (0,)
        return self.student.new_empty((), dtype=dtype), self.student.new_empty(shape, dtype=dtype)


_engine = Engine(
    "relational",
    tensors="Tensor student, Tensor teacher, Tensor? everyone",
    scalars="distance_weight, angle_weight, smooth_l1_beta",
    options="str parts, str precision, bool trained, int first",
)


def _dtype(student: Tensor, teacher: Tensor, precision: str) -> torch.dtype:
    return torch.float64 if precision == "high" else compute_dtype(student, teacher)


def _check(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool,
    smooth_l1_beta: Number,
    precision: str,
    group: Any,
    **weights: Number,
) -> None:
    _checks.embeddings(student, teacher)
    _checks.one_of(("default", "high"), precision=precision)
    _checks.at_least_0(smooth_l1_beta=smooth_l1_beta, **weights)
    _checks.process_group(group)


def _fused(
    formula: Callable[..., Tensor],
    engine: str,
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool,
    smooth_l1_beta: Number,
    precision: str,
    group: Any,
    **weights: Number,
) -> Tensor:
    dtype, everyone, first = _dtype(student, teacher, precision), None, 0
    result_dtype = compute_dtype(student, teacher)
    if group is not None:
        (everyone, teacher), first = _distributed.gathered([student, teacher], group)
    if len(teacher) < 2:
        return student[:0].sum(dtype=result_dtype)
    if engine == "formula":
        if everyone is not None:
            student = torch.cat([everyone[:first], student, everyone[first + len(student) :]])
        options = dict(smooth_l1_beta=smooth_l1_beta, **weights)
        loss = by_formula(formula, dtype, student, teacher, normalize=normalize, **options)
        loss = loss.to(result_dtype)
        return loss if group is None else _distributed.before_averaging(loss, loss, group)
    if normalize:
        student, teacher = (directions(_rows(x).to(dtype)) for x in (student, teacher))
        everyone = None if everyone is None else directions(_rows(everyone).to(dtype))
    distance_weight, angle_weight = _WEIGHTS.get(formula.__name__) or weights.values()
    share, _ = _engine(
        engine, _rows(student), _rows(teacher), None if everyone is None else _rows(everyone),
        distance_weight, angle_weight, smooth_l1_beta,
        _parts(distance_weight, angle_weight), precision, is_differentiated(student), first,
    )  # fmt: skip
    share = share.to(result_dtype)
    if group is None:
        return share
    return _distributed.before_averaging(share, _distributed.summed(share, group), group)


# of the distances and of the angles, in the losses that have no such options
_WEIGHTS = {"rkd_distance": (1.0, 0.0), "rkd_angle": (0.0, 1.0)}


def _parts(distance_weight: Number, angle_weight: Number) -> str:
    """What an engine has to compute; a tensor is not looked at: on a GPU that would wait for it."""
    if not isinstance(angle_weight, Tensor) and angle_weight == 0:
        return "distance"
    if not isinstance(distance_weight, Tensor) and distance_weight == 0:
        return "angle"
    return "both"


def _rows(embeddings: Tensor) -> Tensor:
    return embeddings.flatten(1)


def _relative_distances(embeddings: Tensor) -> Tensor:
    """[N, N], in units of the mean between two different examples."""
    squares = (embeddings[:, None] - embeddings[None]).square().sum(-1)
    close = squares < LEAST_SQUARE
    # selected first: where a root is 0 its slope is infinite
    distances = torch.where(close, LEAST_SQUARE**0.5, torch.where(close, 1, squares).sqrt())
    n = len(embeddings)
    distances = distances.masked_fill(torch.eye(n, dtype=torch.bool, device=squares.device), 0)
    return distances / (distances.sum() / (n * (n - 1)))


def _cosines(embeddings: Tensor) -> Tensor:
    """[j, i, k], of the angle at example j between the directions to i and to k."""
    differences = embeddings[None] - embeddings[:, None]
    squares = differences.square().sum(-1, keepdim=True)
    close = squares < LEAST_LENGTH**2
    directions = torch.where(close, 0, differences / torch.where(close, 1, squares).sqrt())
    return directions @ directions.mT


@batch_loss(_check, _fused, precision="default", group=None)
def rkd_distance(
    student: Tensor, teacher: Tensor, *, normalize: bool = False, smooth_l1_beta: float = 1.0
) -> Tensor:
    """(1/N²) Σ_ij H(d_ij / mean d − t_ij / mean t): pairs keep their relative distances.

    d and t are the distances between the embeddings of student and teacher, means over the pairs of
    different examples, H is the smooth L1 penalty. Embeddings of shapes [N, ...]; gives a scalar.
    Raises TypeError for what is no embedding, ValueError for another N, rank or device, or for an
    option outside its range.

    Park et al., Relational Knowledge Distillation, 2019. arXiv:1904.05068
    """
    student, teacher = _prepared(student, normalize), _prepared(teacher, normalize)
    relations = _relative_distances(student), _relative_distances(teacher)
    return F.smooth_l1_loss(*relations, beta=smooth_l1_beta)


@batch_loss(_check, _fused, precision="default", group=None)
def rkd_angle(
    student: Tensor, teacher: Tensor, *, normalize: bool = False, smooth_l1_beta: float = 1.0
) -> Tensor:
    """(1/N³) Σ_ijk H(cos ∠s_ijk − cos ∠t_ijk): triples of examples keep their angles.

    ∠s_ijk and ∠t_ijk are the angles at example j between those to i and k, of student and teacher,
    H is the smooth L1 penalty; triples with i = j or j = k count with a cosine of 0, those with
    i = k with 1. Embeddings of shapes [N, ...]; gives a scalar. Takes memory for N² numbers, the
    definition for N³ and N² D. Raises TypeError for what is no embedding, ValueError for another N,
    rank or device, or for an option outside its range.

    Park et al., Relational Knowledge Distillation, 2019. arXiv:1904.05068
    """
    student, teacher = _prepared(student, normalize), _prepared(teacher, normalize)
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher), beta=smooth_l1_beta)


@batch_loss(_check, _fused, precision="default", group=None)
def rkd(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    normalize: bool = False,
    smooth_l1_beta: float = 1.0,
) -> Tensor:
    """distance_weight · rkd_distance + angle_weight · rkd_angle, the work for pairs done once.

    Embeddings of shapes [N, ...]; gives a scalar. The weights are those of the authors' code for
    classification. Raises TypeError for what is no embedding, ValueError for another N, rank or
    device, or for an option outside its range.

    Park et al., Relational Knowledge Distillation, 2019. arXiv:1904.05068
    """
    options = dict(normalize=normalize, smooth_l1_beta=smooth_l1_beta)
    return distance_weight * rkd_distance.formula(
        student, teacher, **options
    ) + angle_weight * rkd_angle.formula(student, teacher, **options)


def _prepared(embeddings: Tensor, normalize: bool) -> Tensor:
    return directions(_rows(embeddings)) if normalize else _rows(embeddings)


def directions(rows: Tensor, epsilon: float = 0.0) -> Tensor:
    """Rows divided by their length + epsilon; 0, and without gradient, for those without one."""
    squares = rows.square().sum(1, keepdim=True)
    none = squares < LEAST_LENGTH**2
    # selected first: where a root is 0 its slope is infinite
    return torch.where(none, 0, rows / (torch.where(none, 1, squares).sqrt() + epsilon))
