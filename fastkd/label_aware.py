"""Distillation that looks at the labels: they weigh, correct or replace the teacher.

Each loss has one value for each row of logits (..., V) whose label counts, as the divergences have,
and stands beside a cross-entropy with the labels, which it does not contain. With
p = softmax(teacher_logits / T) and q = softmax(student_logits / T) the factor T² keeps the size of
the gradient when T changes. The teacher is a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd._loss import loss
from fastkd._op import Number
from fastkd._reduction import Term, selected
from fastkd.divergence import soft_cross_entropy
from fastkd.problems import corrected, rows


def _kl(p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q), where p = 0 wins over an infinite log q."""
    return (p * torch.where(p == 0, 0, p.log() - log_q)).sum(-1)


@loss(corrected.check, corrected.soft_labels, per_example=True)
def wsld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: Number = 2.0,
    scale_t2: bool = True,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² w H(p, q) with w = 1 − exp(−CE_s / CE_t): weighted soft labels.

    H(p, q) = −Σ p log q, and CE_s and CE_t are the cross-entropies of student and teacher with the
    label, at T = 1. The soft label of an example counts the more, the worse the student knows the
    label in comparison with the teacher. The weight w is a constant: it is 1 where the teacher
    alone is certain of the label, 0 where the student is, and 0 where the teacher excludes it.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        labels: Class indices, (...), integers in [0, V) or `ignore_index`.
        temperature: T > 0, which divides both networks' logits in H.
        scale_t2: Whether the loss is multiplied by T².
        ignore_index: Rows with this label count as rows of weight 0.
        weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...).

    Raises:
        TypeError: The logits are no floating-point tensors or the labels no integers, or an option
            has an unknown name.
        ValueError: The inputs do not fit together, a label does not exist, or an option is out of
            range.

    Reference:
        Zhou et al., Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
        Perspective, 2021. arXiv:2102.00650
    """
    labelled, classes = rows.classes_of(labels, ignore_index)
    classes = classes.unsqueeze(-1)
    student, teacher = selected(student_logits, labelled), selected(teacher_logits, labelled)
    of_student, of_teacher = (
        -z.log_softmax(-1).gather(-1, classes).squeeze(-1) for z in (student.detach(), teacher)
    )
    losses = soft_cross_entropy.formula(
        student, teacher, temperature=temperature, scale_t2=scale_t2
    )
    weight = corrected.weight_of_soft_label(of_student, of_teacher)
    return _terms(corrected.weighted(losses, weight), labelled)


@loss(corrected.check, corrected.winning_labels, per_example=True)
def mft(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    threshold: Number = 0.2,
    temperature: Number = 1.0,
    scale_t2: bool = True,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² KL(p′ ‖ q) with p′ = (1 − m) p + m · label: minifinetuning.

    The label corrects the teacher p, most often the student before it was tuned, so that it wins:

        another class wins    m = (max p − p_label + τ) / (1 + max p − p_label)
        the label wins        m = min(1, τ / (1 − p_label))

    with τ = `threshold`. In the first case p′_label is τ above the class that won, in the second
    p_label + τ, at most 1. A label that ties with another class wins.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        labels: Class indices, (...), integers in [0, V) or `ignore_index`.
        threshold: τ in [0, 1], by how much the label wins. A number or a 0-dim tensor.
        temperature: T > 0, which divides both networks' logits; p is corrected after that.
        scale_t2, ignore_index: As in `wsld`.
        weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...).

    Raises:
        TypeError, ValueError: As in `wsld`.

    Reference:
        Belcak et al., Minifinetuning: Low-Data Generation Domain Adaptation through Corrective
        Self-Distillation, 2025. arXiv:2506.15702
    """
    labelled, classes = rows.classes_of(labels, ignore_index)
    classes = classes.unsqueeze(-1)
    student, teacher = selected(student_logits, labelled), selected(teacher_logits, labelled)
    p = (teacher / temperature).softmax(-1)
    of_label = p.gather(-1, classes)
    behind = p.amax(-1, keepdim=True) - of_label
    lifted = (behind + threshold) / (1 + behind)
    raised = threshold / (1 - of_label).clamp(min=torch.finfo(p.dtype).tiny)
    mixed = torch.where(behind > 0, lifted, torch.where(of_label == 1, 1, raised.clamp(max=1)))
    target = ((1 - mixed) * p).scatter_add(-1, classes, mixed)
    losses = _kl(target, (student / temperature).log_softmax(-1))
    return _terms(losses * temperature**2 if scale_t2 else losses, labelled)


@loss(corrected.check_virtual, corrected.virtual_teacher, per_example=True)
def teacher_free_kd(
    student_logits: Tensor,
    labels: Tensor,
    *,
    correct_probability: Number = 0.99,
    temperature: Number = 20.0,
    scale_t2: bool = True,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² KL(p ‖ q) from a virtual teacher p = softmax(log u / T), without another network.

    u gives the label the probability a = `correct_probability`, and every other class
    b = (1 − a) / (V − 1). No teacher is stored. T = 1 is label smoothing, less its entropy.

    The paper softens both u and the student by T. The authors' code takes instead a student at
    T = 1 and a teacher softmax(u / T), of probabilities as if they were logits, which is nearly
    uniform: that is a temperature of 1 and a = 1 / (1 + (V − 1) exp((b − a) / T)) here.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        labels: Class indices, (...), integers in [0, V) or `ignore_index`.
        correct_probability: a in [0, 1]. A number or a 0-dim tensor.
        temperature: T > 0, which softens both the virtual teacher and the student.
        scale_t2, ignore_index: As in `wsld`.
        weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...).

    Raises:
        TypeError, ValueError: As in `wsld`.

    Reference:
        Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization, 2020.
        arXiv:1909.11723
    """
    labelled, classes = rows.classes_of(labels, ignore_index)
    classes = classes.unsqueeze(-1)
    log_q = (selected(student_logits, labelled) / temperature).log_softmax(-1)
    n_classes = log_q.shape[-1]
    log_odds = corrected.softened(correct_probability, n_classes, temperature, log_q.dtype)
    log_odds = torch.zeros_like(log_q) + log_odds
    at_label = torch.zeros_like(log_q).scatter(-1, classes, 1) > 0
    others = (-log_odds).sigmoid() / max(n_classes - 1, 1)
    losses = _kl(torch.where(at_label, log_odds.sigmoid(), others), log_q)
    return _terms(losses * temperature**2 if scale_t2 else losses, labelled)


def _terms(losses: Tensor, labelled: Tensor) -> Any:
    """Return the only term of a loss, whose mean is over the rows with a label."""
    return [Term(1.0, selected(losses, labelled), labelled)]
