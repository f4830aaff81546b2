"""Correlations: which examples of a batch are alike, and how predictions vary over it.

`similarity_preserving`, `pkt` and `correlation_congruence` compare relations between the examples
of a batch, for features [N, D] of the same N examples; D may differ, more dimensions are flattened.
`dist_kd` compares the rows and the columns of logits. A loss is one number for the batch and takes
no weights and no reduction. The teacher is a constant.

An example without features, all of them 0, has no direction: its similarities are 0, and it gets no
gradient from its own direction. An empty batch has the loss 0. Engines keep the gradient and a
chunk of rows of the relations. Their work is matrix products: there are no kernels to better them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _checks
from fastkd._engine import Engine, compute_dtype, is_differentiated
from fastkd._loss import batch_loss, by_formula
from fastkd.relational import directions

Number = float | Tensor

# as published
PKT_EPSILON = 1e-7  # of the lengths and of the probabilities
PEARSON_EPSILON = 1e-8  # of the product of the deviations


class Problem(NamedTuple):
    """The arguments that every function of an engine of this family takes."""

    student: Tensor  # [N, D], or logits [N, V]
    teacher: Tensor  # [N, D'], or [N, V]
    beta: Number
    gamma: Number
    temperature: Number
    name: str  # of the loss; of its form, where it has several
    order: int
    trained: bool

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return compute_dtype(self.student, self.teacher)

    def allocate(self) -> tuple[Tensor, Tensor]:
        """Empty: the loss and its gradient."""
        new = functools.partial(self.student.new_empty, dtype=self.dtype)
        return new(()), new(self.student.shape if self.trained else (0,))


_engine = Engine(
    "correlation",
    tensors="Tensor student, Tensor teacher",
    scalars="beta, gamma, temperature",
    options="str name, int order, bool trained",
)


def _fused(
    formula: Callable[..., Tensor], engine: str, student: Tensor, teacher: Tensor, **options: Any
) -> Tensor:
    dtype = compute_dtype(student, teacher)
    if not student.numel():
        return student.sum(dtype=dtype)
    if engine == "formula":
        return by_formula(formula, dtype, student, teacher, **options)
    rows = _rows_of_logits if formula.__name__ == "dist_kd" else _rows
    loss, _ = _engine(
        engine, rows(student), rows(teacher),
        options.get("beta", 0.0), options.get("gamma", 0.0), options.get("temperature", 1.0),
        options.get("form", formula.__name__), options.get("order", 0), is_differentiated(student),
    )  # fmt: skip
    return loss


_correlation_loss = functools.partial(batch_loss, fused=_fused, has_kernels=False)


def _rows(features: Tensor) -> Tensor:
    return features.flatten(1)


def _rows_of_logits(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])


# --------------------------------------------------------------------------- similarity preserving


@_correlation_loss(_checks.embeddings)
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """(1/N²) Σ_ij (G_ij / ‖G_i‖ − T_ij / ‖T_i‖)²: what is alike to the teacher, to the student too.

    G = F Fᵀ and T are the Gram matrices of the features of student and teacher, G_i is a row of
    one. Features of shapes [N, ...]; gives a scalar. Raises TypeError for what are no features,
    ValueError for another N or device.

    Tung and Mori, Similarity-Preserving Knowledge Distillation, 2019. arXiv:1907.09682
    """
    s, t = (directions(_rows(x) @ _rows(x).T) for x in (student, teacher))
    return (s - t).square().sum() / len(student) ** 2


# -------------------------------------------------------------- probabilistic knowledge transfer


@_correlation_loss(_checks.embeddings)
def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """(1/N²) Σ_ij p_ij log((p_ij + ε) / (q_ij + ε)): neighbours are as probable as the teacher's.

    q_ij = (1 + cos_ij) / Σ_k (1 + cos_ik) of the student's features, p of the teacher's, ε = 1e-7,
    which the lengths in the cosines get too. Features of shapes [N, ...]; gives a scalar. The mean
    over N² is that of the authors' code. Raises TypeError for what are no features, ValueError for
    another N or device.

    Passalis and Tefas, Probabilistic Knowledge Transfer, 2018. arXiv:1803.10837
    """
    q, p = _neighbours(student), _neighbours(teacher)
    return (p * ((p + PKT_EPSILON) / (q + PKT_EPSILON)).log()).mean()


def _neighbours(features: Tensor) -> Tensor:
    """[N, N], the probability of each example to be the neighbour of the one of the row."""
    unit = directions(_rows(features), PKT_EPSILON)
    similarities = (unit @ unit.T + 1) / 2
    return similarities / similarities.sum(1, keepdim=True)


# ------------------------------------------------------------------------- correlation congruence


def _check_congruence(
    student: Tensor, teacher: Tensor, *, form: str, gamma: Number, order: int
) -> None:
    _checks.embeddings(student, teacher)
    _checks.one_of(("sequential", "kernel"), form=form)
    _checks.at_least_0(gamma=gamma)
    _checks.at_least_1(order=order)
    if form == "sequential" and student[0:0].flatten(1).shape != teacher[0:0].flatten(1).shape:
        raise ValueError(
            f'form="sequential" subtracts features: student and teacher need one width, got '
            f"{[*student.shape]} and {[*teacher.shape]}; project the student to the teacher's "
            f'width, or take form="kernel"'
        )


@_correlation_loss(_check_congruence)
def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    *,
    form: str = "sequential",
    gamma: float = 0.4,
    order: int = 2,
) -> Tensor:
    """Σ_i |s_i − t_i| · |s_i+1 − t_i+1| / (N−1), or Σ_ij (k(s_i, s_j) − k(t_i, t_j))² / N².

    The first, "sequential", is the loss of RepDistiller: of neighbours in the batch, of one width.
    "kernel" is the paper's: k(a, b) = e^(−2γ) Σ_{p ≤ order} (2γ a·b)^p / p! of features divided by
    their length; torchdistill takes the root of its sum, and features as they are.
    Features of shapes [N, ...]; gives a scalar. Raises TypeError for what are no features,
    ValueError for another N or device, or for an option outside its range.

    Peng et al., Correlation Congruence for Knowledge Distillation, 2019. arXiv:1904.01802
    """
    if form == "sequential":
        differences = (_rows(student) - _rows(teacher)).abs()
        return (differences[:-1] * differences[1:]).sum() / max(len(student) - 1, 1)
    s, t = (_kernel(directions(_rows(x)), gamma, order) for x in (student, teacher))
    return (s - t).square().sum() / len(student) ** 2


def _kernel(directions: Tensor, gamma: Number, order: int) -> Tensor:
    exponents = 2 * gamma * (directions @ directions.T)
    terms = [exponents**p / math.factorial(p) for p in range(order + 1)]
    return torch.stack(terms).sum(0) * falloff(gamma)


def falloff(gamma: Number) -> Number:
    """e^(−2γ), of a tensor without looking at it."""
    return (-2 * gamma).exp() if isinstance(gamma, Tensor) else math.exp(-2 * gamma)


# ----------------------------------------------------------------------------------------- dist_kd


def _check_dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: Number,
    gamma: Number,
    temperature: Number,
) -> None:
    _checks.logits(student_logits, teacher_logits)
    _checks.at_least_0(beta=beta, gamma=gamma)
    _checks.temperature(temperature)


@_correlation_loss(_check_dist)
def dist_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """T² [β (1 − mean ρ(q_i, p_i)) + γ (1 − mean ρ(q_·v, p_·v))]: DIST.

    p = softmax(teacher / T), q = softmax(student / T), ρ is the correlation of Pearson with 1e-8
    added to the product of the deviations: of rows, between classes, and of columns, between
    examples. Logits of shape (..., V), all rows one batch; gives a scalar. Raises TypeError or
    ValueError for inputs that do not fit together and options out of range.

    Huang et al., Knowledge Distillation from A Stronger Teacher, 2022. arXiv:2205.10536
    """
    q, p = (
        F.softmax(_rows_of_logits(z) / temperature, 1) for z in (student_logits, teacher_logits)
    )
    between_classes = beta * (1 - _pearson(q, p).mean())
    between_examples = gamma * (1 - _pearson(q.T, p.T).mean())
    return temperature**2 * (between_classes + between_examples)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """[N], of the rows of one with those of the other."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    deviations = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / (deviations + PEARSON_EPSILON)
