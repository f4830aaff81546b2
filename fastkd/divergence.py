"""Losses between the logits of a student and of a teacher.

With p = softmax(teacher_logits / T) and q = softmax(student_logits / T), logits of shape (..., V)
give one loss for each row (...). The factor T² keeps the size of the gradient when T changes [1].
Logits of −∞ in both networks are a masked vocabulary and contribute nothing. The teacher is a
constant. Half precision is computed in float32 inside, and its gradient comes back in half.

[1] Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
[2] Sun et al., Logit Standardization in Knowledge Distillation, 2024. arXiv:2403.01427
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._loss import loss
from fastkd._op import Number
from fastkd.problems import _temperatures, rows
from fastkd.problems.rows import is_exactly


def _softened(
    student: Tensor,
    teacher: Tensor,
    temperature: Number,
    student_temperature: Number | None,
    teacher_temperature: Number | None,
    teacher_form: str,
    scale_t2: bool,
    standardize: bool,
) -> tuple[Tensor, Tensor, Number]:
    """Return log q, log p and the factor T² of a loss, or 1."""
    of_student, of_teacher = _temperatures.of_both(
        temperature, student_temperature, teacher_temperature
    )
    teacher = rows.as_logits(teacher, teacher_form)
    if standardize:
        student, teacher = _temperatures.standardized(student), _temperatures.standardized(teacher)
    log_q = _temperatures.divided(student, of_student).log_softmax(-1)
    log_p = _temperatures.divided(teacher, of_teacher).log_softmax(-1)
    return log_q, log_p, of_student * of_teacher if scale_t2 else 1.0


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """Return Σ p·x over the classes, where p = 0 wins over an infinite x.

    A product that is infinite has a derivative in x, and NaN for one in p.
    """
    products = p * torch.where(p == 0, 0, x)
    return torch.where(products.isinf(), p.detach() * x, products).sum(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q)."""
    return _expectation(log_p.exp(), log_p - log_q)


def _log_mixture(p: Tensor, q: Tensor, weight: Number) -> Tensor:
    """Return log(weight · p + (1 − weight) · q), finite where both vanish."""
    m, tiny = weight * p + (1 - weight) * q, torch.finfo(p.dtype).tiny
    return torch.where(m < tiny, tiny, m).log()  # the derivative of a clamped NaN would be 0


@loss(rows.check, rows.divergence, per_example=True, of_examples=rows.TEMPERATURES)
def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Number = 1.0,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    teacher_form: str = "logits",
    scale_t2: bool = True,
    standardize: bool = False,
    teacher_gradient: bool = False,
    dim: int = -1,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² KL(p ‖ q) = T² Σ p (log p − log q), the forward Kullback-Leibler divergence.

    The student covers every mode of the teacher. The loss is +∞ where the student excludes, by a
    logit of −∞, what the teacher allows; its gradient is finite there.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient unless asked.
        temperature: T > 0, which divides both networks' logits. A number, or a tensor with one
            number for all rows or for each, of a shape that expands to (...). One that requires
            grad is learnt.
        student_temperature: Replaces T for the student. T² becomes the product of both.
        teacher_temperature: Replaces T for the teacher, for example 1 for one whose probabilities
            were softened when they were recorded.
        teacher_form: What teacher_logits hold: "logits", "probabilities" or "log_probabilities".
            Logarithms of probabilities are logits, which T softens (further).
        scale_t2: Whether the loss is multiplied by T².
        standardize: Whether the logits of each row are made (z − mean) / (deviation + 1e-7) before
            T divides them [2], so that a student may have logits of another size.
        teacher_gradient: Whether the teacher gets a gradient too, as one of several networks that
            learn from each other.
        dim: The dimension of the classes, where it is not the last one: 1 for [N, V, H, W], whose
            rows are then [N, H, W]. Logits whose strides allow it are not copied.
        labels: Class indices of the rows, (...), integers. They only say which rows count.
        ignore_index: Rows with this label count as rows of weight 0.
        weights: One number or bool for each row, (...). A row of weight 0 contributes exactly 0 to
            loss and gradient, whatever it holds.
        normalizer: Replaces the divisor Σ weights of the mean, for example by the number of target
            tokens of a whole accumulated batch. A number or a tensor of one element.
        reduction: "mean" (Σ w·l / Σ w; torch's "batchmean" for [N, V]), "sum" (Σ w·l) or "none"
            (w·l).

    Returns:
        A scalar or, with reduction "none", one loss for each row (...); float64 if an input is,
        else float32.

    Raises:
        TypeError: The logits are no floating-point tensors, or an option has an unknown name.
        ValueError: The logits do not fit together, or an option is out of range.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
    """
    log_q, log_p, t2 = _softened(
        student_logits, teacher_logits, temperature, student_temperature, teacher_temperature,
        teacher_form, scale_t2, standardize,
    )  # fmt: skip
    return t2 * _kl(log_p, log_q)


@loss(rows.check, rows.divergence, per_example=True, of_examples=rows.TEMPERATURES)
def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Number = 1.0,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    teacher_form: str = "logits",
    scale_t2: bool = True,
    standardize: bool = False,
    teacher_gradient: bool = False,
    dim: int = -1,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² KL(q ‖ p) = T² Σ q (log q − log p), the reverse Kullback-Leibler divergence.

    The student may drop modes that it cannot model. The loss is +∞ where the teacher excludes, by a
    logit of −∞, what the student allows.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        temperature, student_temperature, teacher_temperature, teacher_form: As in `forward_kl`.
        scale_t2, standardize, teacher_gradient, dim: As in `forward_kl`.
        labels, ignore_index, weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...).

    Raises:
        TypeError, ValueError: As in `forward_kl`.

    Reference:
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2024.
        arXiv:2306.08543
    """
    log_q, log_p, t2 = _softened(
        student_logits, teacher_logits, temperature, student_temperature, teacher_temperature,
        teacher_form, scale_t2, standardize,
    )  # fmt: skip
    return t2 * _kl(log_q, log_p)


@loss(rows.check, rows.divergence, per_example=True, of_examples=rows.TEMPERATURES)
def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: Number = 0.5,
    temperature: Number = 1.0,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    teacher_form: str = "logits",
    scale_t2: bool = True,
    standardize: bool = False,
    teacher_gradient: bool = False,
    dim: int = -1,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² [β KL(p ‖ m) + (1 − β) KL(q ‖ m)] with the mixture m = β p + (1 − β) q.

    The generalised Jensen-Shannon divergence is bounded and always finite. By convention β of
    exactly 0 is the forward KL and exactly 1 the reverse KL; the limits of the formula are 0.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        beta: β in [0, 1], the teacher's share of the mixture. A number or a 0-dim tensor.
        temperature, student_temperature, teacher_temperature, teacher_form: As in `forward_kl`.
        scale_t2, standardize, teacher_gradient, dim: As in `forward_kl`.
        labels, ignore_index, weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...).

    Raises:
        TypeError, ValueError: As in `forward_kl`.

    Reference:
        Agarwal et al., On-Policy Distillation of Language Models, 2024. arXiv:2306.13649
    """
    log_q, log_p, t2 = _softened(
        student_logits, teacher_logits, temperature, student_temperature, teacher_temperature,
        teacher_form, scale_t2, standardize,
    )  # fmt: skip
    if is_exactly(beta, 0) or is_exactly(beta, 1):
        return t2 * (_kl(log_q, log_p) if beta else _kl(log_p, log_q))
    q, p = log_q.exp(), log_p.exp()
    log_m = _log_mixture(p, q, beta)
    divergence = beta * _expectation(p, log_p - log_m) + (1 - beta) * _expectation(q, log_q - log_m)
    return t2 * divergence


@loss(rows.check, rows.divergence, per_example=True, of_examples=rows.TEMPERATURES)
def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: Number = 0.1,
    temperature: Number = 1.0,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    teacher_form: str = "logits",
    scale_t2: bool = True,
    standardize: bool = False,
    teacher_gradient: bool = False,
    dim: int = -1,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² KL(p ‖ α p + (1 − α) q) with α = `skew`, a forward KL with bounded gradients.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        skew: α in [0, 1], the teacher's share of the mixture; 0 is the forward KL.
        temperature, student_temperature, teacher_temperature, teacher_form: As in `forward_kl`.
        scale_t2, standardize, teacher_gradient, dim: As in `forward_kl`.
        labels, ignore_index, weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...).

    Raises:
        TypeError, ValueError: As in `forward_kl`.

    Reference:
        Ko et al., DistiLLM: Towards Streamlined Distillation, 2024. arXiv:2402.03898
    """
    log_q, log_p, t2 = _softened(
        student_logits, teacher_logits, temperature, student_temperature, teacher_temperature,
        teacher_form, scale_t2, standardize,
    )  # fmt: skip
    if is_exactly(skew, 0):
        return t2 * _kl(log_p, log_q)
    p = log_p.exp()
    log_m = _log_mixture(p, log_q.exp(), skew)
    return t2 * _expectation(p, log_p - log_m)


@loss(rows.check, rows.divergence, per_example=True, of_examples=rows.TEMPERATURES)
def skew_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: Number = 0.1,
    temperature: Number = 1.0,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    teacher_form: str = "logits",
    scale_t2: bool = True,
    standardize: bool = False,
    teacher_gradient: bool = False,
    dim: int = -1,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² KL(q ‖ (1 − α) p + α q) with α = `skew`, a reverse KL that stays finite.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        skew: α in [0, 1], the student's share of the mixture; 0 is the reverse KL, which may be +∞.
        temperature, student_temperature, teacher_temperature, teacher_form: As in `forward_kl`.
        scale_t2, standardize, teacher_gradient, dim: As in `forward_kl`.
        labels, ignore_index, weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...).

    Raises:
        TypeError, ValueError: As in `forward_kl`.

    Reference:
        Ko et al., DistiLLM: Towards Streamlined Distillation, 2024. arXiv:2402.03898
    """
    log_q, log_p, t2 = _softened(
        student_logits, teacher_logits, temperature, student_temperature, teacher_temperature,
        teacher_form, scale_t2, standardize,
    )  # fmt: skip
    if is_exactly(skew, 0):
        return t2 * _kl(log_q, log_p)
    q = log_q.exp()
    log_m = _log_mixture(log_p.exp(), q, 1 - skew)
    return t2 * _expectation(q, log_q - log_m)


@loss(rows.check, rows.divergence, per_example=True, of_examples=rows.TEMPERATURES)
def symmetric_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    weight: Number = 0.5,
    temperature: Number = 1.0,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    teacher_form: str = "logits",
    scale_t2: bool = True,
    standardize: bool = False,
    teacher_gradient: bool = False,
    dim: int = -1,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² [w KL(p ‖ q) + (1 − w) KL(q ‖ p)] with w = `weight`.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        weight: w in [0, 1], the share of the forward KL; ½ gives half of Jeffreys' divergence.
        temperature, student_temperature, teacher_temperature, teacher_form: As in `forward_kl`.
        scale_t2, standardize, teacher_gradient, dim: As in `forward_kl`.
        labels, ignore_index, weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...).

    Raises:
        TypeError, ValueError: As in `forward_kl`.

    Reference:
        Jeffreys, An Invariant Form for the Prior Probability in Estimation Problems, 1946
    """
    log_q, log_p, t2 = _softened(
        student_logits, teacher_logits, temperature, student_temperature, teacher_temperature,
        teacher_form, scale_t2, standardize,
    )  # fmt: skip
    q, p = log_q.exp(), log_p.exp()
    # weighted inside the sums, so that a weight of exactly 0 masks even what is infinite
    forward = _expectation(weight * p, log_p - log_q)
    reverse = _expectation((1 - weight) * q, log_q - log_p)
    return t2 * (forward + reverse)


@loss(rows.check, rows.divergence, per_example=True, of_examples=rows.TEMPERATURES)
def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Number = 1.0,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    teacher_form: str = "logits",
    scale_t2: bool = True,
    standardize: bool = False,
    teacher_gradient: bool = False,
    dim: int = -1,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² ½ Σ |p − q|, the mass that must move to make the student the teacher.

    The gradient is 0 at classes where p = q.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        temperature, student_temperature, teacher_temperature, teacher_form: As in `forward_kl`.
        scale_t2, standardize, teacher_gradient, dim: As in `forward_kl`.
        labels, ignore_index, weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...).

    Raises:
        TypeError, ValueError: As in `forward_kl`.

    Reference:
        Wen et al., f-Divergence Minimization for Knowledge Distillation, 2023. arXiv:2307.15190
    """
    log_q, log_p, t2 = _softened(
        student_logits, teacher_logits, temperature, student_temperature, teacher_temperature,
        teacher_form, scale_t2, standardize,
    )  # fmt: skip
    return t2 * 0.5 * rows.absolute(log_p.exp() - log_q.exp()).sum(-1)


@loss(rows.check, rows.divergence, per_example=True, of_examples=rows.TEMPERATURES)
def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Number = 1.0,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    teacher_form: str = "logits",
    scale_t2: bool = True,
    standardize: bool = False,
    teacher_gradient: bool = False,
    dim: int = -1,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute −T² Σ p log q, the forward KL plus the teacher's entropy.

    The gradient is that of the forward KL. Several frameworks call this their "KL" loss.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        temperature, student_temperature, teacher_temperature, teacher_form: As in `forward_kl`.
        scale_t2, standardize, teacher_gradient, dim: As in `forward_kl`.
        labels, ignore_index, weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...).

    Raises:
        TypeError, ValueError: As in `forward_kl`.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
    """
    log_q, log_p, t2 = _softened(
        student_logits, teacher_logits, temperature, student_temperature, teacher_temperature,
        teacher_form, scale_t2, standardize,
    )  # fmt: skip
    return t2 * _expectation(log_p.exp(), -log_q)


@loss(
    rows.check,
    rows.logit_mse,
    per_example=True,
    has_kernels=False,
    on_cpu_alone=True,
    of_examples=("temperature",),
)
def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Number = 1.0,
    scale_t2: bool = True,
    dim: int = -1,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² (1/V) Σ ((z_s − z_t) / T)² over the V logits of a row.

    With `scale_t2` the temperature cancels. Unlike a softmax, the loss also ties the offset of the
    logits.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        temperature, scale_t2, dim, labels, ignore_index: As in `forward_kl`.
        weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...).

    Raises:
        TypeError, ValueError: As in `forward_kl`.

    Reference:
        Ba and Caruana, Do Deep Nets Really Need to be Deep?, 2014. arXiv:1312.6184
    """
    lowest = torch.finfo(student_logits.dtype).min  # −∞ in both networks is no difference
    student, teacher = student_logits.clamp(min=lowest), teacher_logits.clamp(min=lowest)
    losses = F.mse_loss(student, teacher, reduction="none").mean(-1)
    return losses if scale_t2 else losses / temperature**2
