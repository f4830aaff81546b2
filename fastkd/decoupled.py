"""Losses between logits that treat the label's class apart from all others.

With y the label, p_y and q_y are the probabilities of its class in the teacher and in the student,
and p̂ and q̂ the softmaxes over the other classes alone, all of logits / T. None of them is made by
a subtraction: 1 − q_y is the softmax of the others, so that logits of any size have finite losses
and gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._loss import loss
from fastkd._op import Number
from fastkd._reduction import Term, selected
from fastkd.problems import _decoupled
from fastkd.problems._temperatures import divided, standardized, widened
from fastkd.problems.corrected import weighted
from fastkd.problems.rows import classes_of, is_exactly, smoothed


def _parted(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-odds of the class (...), and the log-softmax of all others (..., V).

    Where no other class is allowed the odds are infinite, and all others have the probability 0.
    """
    # NaN throughout a row without a softmax, whichever of its classes makes it one
    logits, classes = logits + 0 * logits.detach().amax(-1, keepdim=True), classes.unsqueeze(-1)
    others = logits.scatter(-1, classes, -torch.inf)
    is_alone = (others == -torch.inf).all(-1, keepdim=True)
    of_others = torch.where(is_alone, 0, others).logsumexp(-1, keepdim=True)
    log_softmax = torch.where(is_alone, -torch.inf, others - of_others)
    odds = logits.gather(-1, classes) - torch.where(is_alone, -torch.inf, of_others)
    return odds.squeeze(-1), log_softmax


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """Return Σ p·x over the classes, where p = 0 wins over an infinite x."""
    return (p * torch.where(p == 0, 0, x)).sum(-1)


def _labelled(
    student: Tensor, teacher: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return both networks' logits with 0 in rows without a label, the classes, and the mask."""
    labelled, classes = classes_of(labels, ignore_index)
    return selected(student, labelled), selected(teacher, labelled), classes, labelled


@loss(_decoupled.check, _decoupled.decoupled_kd, per_example=True, of_examples=("temperature",))
def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: Number = 1.0,
    beta: Number = 8.0,
    temperature: Number = 4.0,
    scale_t2: bool = True,
    standardize: bool = False,
    ignore_index: int = -100,
    dim: int = -1,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Any:
    """Compute T² [α KL(b_p ‖ b_q) + β KL(p̂ ‖ q̂)] with b = (probability of y, that of all others).

    The first term, of the target class, says how sure the teacher is; the second one, among the
    other classes, has the weight 1 − p_y in the KL of all classes and its own one here. The paper
    adds the cross-entropy with the labels.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        labels: Class indices, (...), integers in [0, V) or `ignore_index`.
        alpha: α ≥ 0, the weight of the target class.
        beta: β ≥ 0, the weight of the other classes.
        temperature: T > 0, which divides both networks' logits, as in `forward_kl`.
        scale_t2: Whether the loss is multiplied by T².
        standardize: Whether the logits of each row are made (z − mean) / (deviation + 1e-7) before
            T divides them, as in `forward_kl`.
        ignore_index: Rows with this label count as rows of weight 0.
        dim: The dimension of the classes, as in `forward_kl`.
        weights: One number or bool for each row, (...). A row of weight 0 contributes exactly 0 to
            loss and gradient, whatever it holds.
        normalizer: Replaces the divisor Σ weights of the mean. A number or a tensor of one element.
        reduction: "mean" (Σ w·l / Σ w), "sum" (Σ w·l) or "none" (w·l).

    Returns:
        A scalar or, with reduction "none", one loss for each row (...).

    Raises:
        TypeError: The logits are no floating-point tensors or the labels no integers, or an option
            has an unknown name.
        ValueError: The inputs do not fit together, a label does not exist, or an option is out of
            range.

    Reference:
        Zhao et al., Decoupled Knowledge Distillation, 2022. arXiv:2203.08679
    """
    student, teacher, classes, labelled = _labelled(
        student_logits, teacher_logits, labels, ignore_index
    )
    nothing = selected(student[..., 0], torch.zeros_like(labelled))
    if student.shape[-1] == 1:  # one class is no choice
        return [Term(1.0, nothing, labelled)]
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    T = widened(temperature)
    of_q, log_q = _parted(divided(student, T), classes)
    of_p, log_p = _parted(divided(teacher, T), classes)
    target = torch.zeros_like(of_q)
    for x, y in ((of_p, of_q), (-of_p, -of_q)):
        p = x.sigmoid()
        target = target + torch.where(p == 0, 0, p * (F.logsigmoid(x) - F.logsigmoid(y)))
    others = _expectation(log_p.exp(), log_p - log_q)
    # a term of weight 0 counts for nothing, even where it is infinite
    target = nothing if is_exactly(alpha, 0) else weighted(target, alpha)
    others = nothing if is_exactly(beta, 0) else weighted(others, beta)
    t2 = T**2 if scale_t2 else 1.0
    return [Term(1.0, selected(t2 * (target + others), labelled), labelled)]


@loss(_decoupled.check, _decoupled.nkd, per_example=True, of_examples=("temperature",))
def nkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: Number = 1.5,
    temperature: Number = 1.0,
    scale_t2: bool = True,
    ignore_index: int = -100,
    return_parts: bool = False,
    dim: int = -1,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Any:
    """Compute −p_y log q_y − γ T² Σ p̂ log q̂, normalised knowledge distillation.

    The first term is that of the target class at T = 1, and the sum goes over the other classes.
    The paper adds the cross-entropy with the labels.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        labels: Class indices, (...), integers in [0, V) or `ignore_index`.
        gamma: γ ≥ 0, the weight of the other classes.
        temperature: T > 0, which divides both networks' logits in p̂ and q̂.
        scale_t2: Whether the second term is multiplied by T².
        ignore_index: Rows with this label count as rows of weight 0.
        return_parts: Whether to return (loss, −p_y log q_y, −T² Σ p̂ log q̂).
        dim, weights, normalizer, reduction: As in `decoupled_kd`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...). A tuple of three of them
        with `return_parts`.

    Raises:
        TypeError, ValueError: As in `decoupled_kd`.

    Reference:
        Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach
        with Normalized Loss and Customized Soft Labels, 2023. arXiv:2303.13005
    """
    student, teacher, classes, labelled = _labelled(
        student_logits, teacher_logits, labels, ignore_index
    )
    if student.shape[-1] == 1:  # one class is no choice
        nothing = selected(student[..., 0], torch.zeros_like(labelled))
        return [Term(1.0, nothing, labelled), Term(gamma, nothing, labelled)]
    (of_q, _), (of_p, _) = _parted(student, classes), _parted(teacher, classes)
    p = of_p.sigmoid()
    target = torch.where(p == 0, 0, p * -F.logsigmoid(of_q))
    T = widened(temperature)
    _, log_q = _parted(divided(student, T), classes)
    _, log_p = _parted(divided(teacher, T), classes)
    others = _expectation(log_p.exp(), -log_q) * (T**2 if scale_t2 else 1.0)
    return [
        Term(1.0, selected(target, labelled), labelled),
        Term(gamma, selected(others, labelled), labelled),
    ]


@loss(_decoupled.check_alone, _decoupled.uskd, per_example=True, n_deciding=3)
def uskd(
    student_logits: Tensor,
    labels: Tensor,
    weak_logits: Tensor | None = None,
    *,
    alpha: Number = 1.0,
    beta: Number = 0.1,
    mu: Number = 0.005,
    label_smoothing: Number = 0.1,
    ranking: str = "probabilities",
    ignore_index: int = -100,
    return_parts: bool = False,
    dim: int = -1,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Any:
    """Compute −α (1 + q_y² − mean q_y²) log q_y − β Σ ẑ log q̂ + μ H(u, w): NKD without a teacher.

    The student makes the soft labels itself, as constants. That of the label's class is 1 + q_y²
    less the mean of q_y² over the rows that count. Those of the other classes follow Zipf's law,
    ẑ_i ∝ 1 / rank_i. Classes are ranked by q_i / (1 − q_y) + w_i / (1 − w_y) with the softmax w of
    `weak_logits`, which a linear layer makes of the features of an earlier layer and which learn
    the smoothed label u by the last term. Without them the student's own order counts, and that
    term is missing. The paper adds the cross-entropy with the labels.

    A rank is that among all classes, so that the label leaves its place free, most often the first.
    Of equal classes the one with the lower number comes first. A class that the student excludes by
    a logit of −∞ has no soft label.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        labels: Class indices, (...), integers in [0, V) or `ignore_index`.
        weak_logits: Logits of the same rows from an earlier layer, (..., V), or None. They get the
            gradient of the last term.
        alpha: α ≥ 0, the weight of the label's class.
        beta: β ≥ 0, the weight of the other classes.
        mu: μ ≥ 0, the weight of what the weak logits learn.
        label_smoothing: Which part of u is spread over all classes, in [0, 1].
        ranking: "probabilities", or "log_probabilities" for the order of the authors' code, which
            has log q_i / (1 − log q_y) in place of q_i / (1 − q_y). Without weak logits both
            are one.
        ignore_index: Rows with this label count as rows of weight 0.
        return_parts: Whether to return (loss, term of the label's class, of the others, of the weak
            logits), the terms without α, β and μ. The last one is 0 without weak logits.
        dim, weights, normalizer, reduction: As in `decoupled_kd`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...). A tuple of four of them
        with `return_parts`.

    Raises:
        TypeError, ValueError: As in `decoupled_kd`.

    Reference:
        Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach
        with Normalized Loss and Customized Soft Labels, 2023. arXiv:2303.13005
    """
    labelled, classes = classes_of(labels, ignore_index)
    student = selected(student_logits, labelled)
    weak = None if weak_logits is None else selected(weak_logits, labelled)
    nothing = selected(student[..., 0], torch.zeros_like(labelled))
    target, others, of_weak = nothing, nothing, nothing
    if student.shape[-1] > 1:  # one class is no choice
        cross_entropies = _cross_entropies(student, classes)
        soft = _decoupled.soft_target(cross_entropies.detach(), labelled)
        target = soft * cross_entropies
        zipf = _decoupled.zipf_logits(
            student.detach(), None if weak is None else weak.detach(), classes, ranking
        )
        (_, log_z), (_, log_q) = _parted(zipf, classes), _parted(student, classes)
        others = _expectation(log_z.exp(), -log_q)
    if weak is not None:
        of_weak = _cross_entropies(weak, classes)
        if not is_exactly(label_smoothing, 0):
            uniform = -weak.log_softmax(-1).mean(-1)
            of_weak = smoothed(of_weak, uniform, label_smoothing)
    return [
        Term(factor, selected(losses, labelled), labelled)
        for factor, losses in ((alpha, target), (beta, others), (mu, of_weak))
    ]


def _cross_entropies(logits: Tensor, classes: Tensor) -> Tensor:
    """Return −log q of these classes."""
    return -logits.log_softmax(-1).gather(-1, classes.unsqueeze(-1)).squeeze(-1)
