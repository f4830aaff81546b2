"""Correlations: which examples of a batch are alike, and how predictions vary over it.

`similarity_preserving`, `pkt` and `correlation_congruence` compare relations between the examples
of a batch, for features [N, D] of the same N examples; D may differ, more dimensions are flattened.
`dist_kd` compares the rows and the columns of logits. A loss is one number for the batch and takes
no weights and no reduction. The teacher is a constant.

An example whose features are all 0 has no direction: its similarities are 0, and it gets no
gradient through its direction. An empty batch has the loss 0. Engines keep the gradient and a chunk
of rows of the relations. There are no kernels, because the work is matrix products, which PyTorch's
kernels do best.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _checks
from fastkd._loss import loss
from fastkd.problems import gram
from fastkd.problems.gram import PEARSON_EPSILON, PKT_EPSILON, Number, falloff
from fastkd.problems.relations import directions

# --------------------------------------------------------------------------- similarity preserving


@loss(_checks.embeddings, gram.similarities, per_example=False, has_kernels=False)
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare which examples are alike to the student and to the teacher.

        (1/N²) Σ_ij (G_ij / ‖G_i‖ − T_ij / ‖T_i‖)²

    G = F Fᵀ is the Gram matrix of the student's features, T that of the teacher's, G_i is a row.

    Args:
        student: Features [N, ...], float16, bfloat16, float32 or float64.
        teacher: Features [N, ...] of the same examples, of any width; a constant.

    Returns:
        The loss, a 0-dim tensor in float32, or in float64 where an input is float64.

    Raises:
        TypeError: If an input is no tensor of floating-point features.
        ValueError: If the inputs differ in N or in their device.

    Reference:
        Tung and Mori, Similarity-Preserving Knowledge Distillation, 2019. arXiv:1907.09682
    """
    student, teacher = student.flatten(1), teacher.flatten(1)
    s, t = directions(student @ student.T), directions(teacher @ teacher.T)
    return (s - t).square().sum() / max(len(student), 1) ** 2


# -------------------------------------------------------------- probabilistic knowledge transfer


@loss(_checks.embeddings, gram.similarities, per_example=False, has_kernels=False)
def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the probabilities of examples to be neighbours: probabilistic knowledge transfer.

        (1/N²) Σ_ij p_ij log((p_ij + ε) / (q_ij + ε))        q_ij = (1 + cos_ij) / Σ_k (1 + cos_ik)

    q is made of the cosines of the student's features, p of those of the teacher's, and ε = 1e-7,
    which is added to the lengths in the cosines too. The mean over N² is that of the authors' code.

    Args:
        student: Features [N, ...], float16, bfloat16, float32 or float64.
        teacher: Features [N, ...] of the same examples, of any width; a constant.

    Returns:
        The loss, a 0-dim tensor in float32, or in float64 where an input is float64.

    Raises:
        TypeError: If an input is no tensor of floating-point features.
        ValueError: If the inputs differ in N or in their device.

    Reference:
        Passalis and Tefas, Probabilistic Knowledge Transfer, 2018. arXiv:1803.10837
    """
    q, p = _neighbours(student), _neighbours(teacher)
    return (p * ((p + PKT_EPSILON) / (q + PKT_EPSILON)).log()).sum() / max(len(student), 1) ** 2


def _neighbours(features: Tensor) -> Tensor:
    """Return [N, N], the probability of each example to be the neighbour of the row's example."""
    unit = directions(features.flatten(1), PKT_EPSILON)
    similarities = (unit @ unit.T + 1) / 2
    return similarities / similarities.sum(1, keepdim=True)


# ------------------------------------------------------------------------- correlation congruence


@loss(gram.check_congruence, gram.congruence, per_example=False, has_kernels=False)
def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    *,
    form: str = "sequential",
    gamma: Number = 0.4,
    order: int = 2,
) -> Tensor:
    """Compare the correlations between examples, of neighbours in the batch or of all pairs.

        sequential   Σ_i |s_i − t_i| · |s_i+1 − t_i+1| / (N−1)
        kernel       Σ_ij (k(s_i, s_j) − k(t_i, t_j))² / N²

    "sequential" is the loss of RepDistiller and takes features of one width. "kernel" is the
    paper's, with k(a, b) = e^(−2γ) Σ_{p ≤ order} (2γ a·b)^p / p! of features divided by their
    lengths; torchdistill takes the root of its sum, and features as they are.

    Args:
        student: Features [N, ...], float16, bfloat16, float32 or float64.
        teacher: Features [N, ...] of the same examples; a constant.
        form: "sequential" or "kernel".
        gamma: The kernel's γ ≥ 0, a number or a 0-dim tensor without gradient.
        order: The last power of the kernel's series, at least 1.

    Returns:
        The loss, a 0-dim tensor in float32, or in float64 where an input is float64.

    Raises:
        TypeError: If an input is no tensor of floating-point features.
        ValueError: If the inputs differ in N, in their device or, for "sequential", in their
            width, or if an option is outside its range.

    Reference:
        Peng et al., Correlation Congruence for Knowledge Distillation, 2019. arXiv:1904.01802
    """
    student, teacher = student.flatten(1), teacher.flatten(1)
    if form == "sequential":
        differences = (student - teacher).abs()
        return (differences[:-1] * differences[1:]).sum() / max(len(student) - 1, 1)
    s, t = (_kernel(directions(x), gamma, order) for x in (student, teacher))
    return (s - t).square().sum() / max(len(student), 1) ** 2


def _kernel(directions: Tensor, gamma: Number, order: int) -> Tensor:
    """Return [N, N], the Taylor series of the Gaussian kernel of all pairs."""
    exponents = 2 * gamma * (directions @ directions.T)
    terms = [exponents**p / math.factorial(p) for p in range(order + 1)]
    return torch.stack(terms).sum(0) * falloff(gamma)


# ----------------------------------------------------------------------------------------- dist_kd


@loss(gram.check_predictions, gram.predictions, per_example=False, has_kernels=False)
def dist_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: Number = 1.0,
    gamma: Number = 1.0,
    temperature: Number = 1.0,
    epsilon: Number = PEARSON_EPSILON,
) -> Tensor:
    """Correlate predictions between classes and between examples: DIST.

        T² [β (1 − mean_i ρ(q_i, p_i)) + γ (1 − mean_v ρ(q_·v, p_·v))]

    p = softmax(teacher / T), q = softmax(student / T), and ρ is Pearson's correlation with ε
    added to the product of the deviations: of rows i, between classes, and of columns v, between
    examples.

    Args:
        student_logits: Logits (..., V), float16, bfloat16, float32 or float64; all rows are one
            batch.
        teacher_logits: Logits (..., V) of the same shape; a constant.
        beta: The weight β ≥ 0 of the rows, a number or a 0-dim tensor without gradient.
        gamma: The weight γ ≥ 0 of the columns, likewise.
        temperature: The temperature T > 0, likewise.
        epsilon: ε > 0, likewise, 1e-8 as in the authors' code.

    Returns:
        The loss, a 0-dim tensor in float32, or in float64 where an input is float64.

    Raises:
        TypeError: If an input is no tensor of floating-point logits.
        ValueError: If the inputs differ in shape or device, or if an option is outside its range.

    Reference:
        Huang et al., Knowledge Distillation from A Stronger Teacher, 2022. arXiv:2205.10536
    """
    if not student_logits.numel():
        return student_logits.sum()
    q, p = (
        F.softmax(z.reshape(-1, z.shape[-1]) / temperature, 1)
        for z in (student_logits, teacher_logits)
    )
    between_classes = beta * (1 - _pearson(q, p, epsilon).mean())
    between_examples = gamma * (1 - _pearson(q.T, p.T, epsilon).mean())
    return temperature**2 * (between_classes + between_examples)


def _pearson(a: Tensor, b: Tensor, epsilon: Number) -> Tensor:
    """Return [N], the correlations of the rows of one with those of the other."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    deviations = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / (deviations + epsilon)
