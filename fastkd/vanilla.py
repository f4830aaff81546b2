"""Vanilla knowledge distillation: cross-entropy with labels and a divergence from the teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import divergence as divergences
from fastkd._loss import loss
from fastkd._op import Number
from fastkd._reduction import Term, selected
from fastkd.problems import rows

_FORMULAS = {name: getattr(divergences, name).formula for name in rows.DIVERGENCES}


@loss(rows.check_kd, rows.kd, per_example=True, of_examples=rows.TEMPERATURES)
def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: Number = 0.5,
    distill_weight: Number | None = None,
    temperature: Number = 4.0,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    divergence: str = "forward_kl",
    beta: Number = 0.5,
    skew: Number = 0.1,
    weight: Number = 0.5,
    teacher_form: str = "logits",
    scale_t2: bool = True,
    standardize: bool = False,
    ignore_index: int = -100,
    distill_ignored: bool = False,
    label_smoothing: Number = 0.0,
    class_weights: Tensor | None = None,
    return_parts: bool = False,
    dim: int = -1,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Any:
    """Compute α CE(softmax(student_logits), labels) + (1 − α) T² D(p, q), vanilla distillation.

    The cross-entropy is that of the logits at T = 1. Each term is a mean over its own rows.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        labels: Class indices, (...), integers in [0, V) or `ignore_index`; or probabilities of the
            classes, (..., V), as mixup and CutMix give them, a constant in floating point.
        alpha: α in [0, 1], the share of the cross-entropy. A term of share 0 counts for nothing,
            even where it is infinite.
        distill_weight: Replaces 1 − α, the weight of D; α may then be any number of at least 0.
        temperature: T > 0, which divides both networks' logits in D.
        student_temperature, teacher_temperature: As in `forward_kl`.
        divergence: The name of D, any of the losses above but `logit_mse`.
        beta: The option of D = "jensen_shannon".
        skew: The option of D = "skew_kl" and "skew_reverse_kl".
        weight: The option of D = "symmetric_kl".
        teacher_form: As in `forward_kl`.
        scale_t2: Whether D is multiplied by T².
        standardize: Whether the logits of D are standardized, as in `forward_kl`; those of the
            cross-entropy never are.
        ignore_index: Rows with this label count in neither term.
        distill_ignored: Whether those rows count in D after all, as unlabelled examples: CE is then
            the mean over the labelled rows, D over all of them.
        label_smoothing: ε in [0, 1], with which the cross-entropy is with (1 − ε) labels + ε / V.
        class_weights: A weight of at least 0 for each class, (V,), as in `F.cross_entropy`: the
            term of class v in the cross-entropy is multiplied by w_v, and its mean divides by the
            sum of the weights of the labels, but for soft labels, by the number of rows.
        return_parts: Whether to return (loss, CE, D), the parts without their shares.
        dim: The dimension of the classes, as in `forward_kl`.
        weights: One number or bool for each row, (...). A row of weight 0 contributes exactly 0 to
            loss and gradient, whatever it holds.
        normalizer: Replaces the divisor Σ weights of the means. A number or a tensor with one
            element.
        reduction: "mean" (Σ w·l / Σ w), "sum" (Σ w·l) or "none" (w·l).

    Returns:
        A scalar or, with reduction "none", one loss for each row (...). A tuple of three of them
        with `return_parts`.

    Raises:
        TypeError: The logits are no floating-point tensors or the labels no integers or
            probabilities, or an option has an unknown name.
        ValueError: The inputs do not fit together, a label does not exist or is negative, or an
            option is out of range. On a GPU, where a look at the labels would be a host sync, a
            label that does not exist gives a NaN instead.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
    """
    labelled = counts = None
    if rows.is_soft(labels, student_logits):
        of_labels = student_logits
        target = rows.with_smoothing(labels, label_smoothing, class_weights)
        log_q = of_labels.log_softmax(-1)
        cross_entropies = -(target * torch.where(target == 0, 0, log_q)).sum(-1)
    else:
        labelled, classes = rows.classes_of(labels, ignore_index)
        of_labels = selected(student_logits, labelled)
        log_q = of_labels.log_softmax(-1)
        cross_entropies = -log_q.gather(-1, classes.unsqueeze(-1)).squeeze(-1)
        if class_weights is not None:
            class_weights = class_weights.detach().to(log_q)
            counts = class_weights[classes]
            cross_entropies = selected(cross_entropies * counts, counts != 0)
        if not rows.is_exactly(label_smoothing, 0):
            each = torch.ones_like(log_q) if class_weights is None else class_weights
            smooth = -(each * torch.where(each == 0, 0, log_q)).mean(-1)
            cross_entropies = rows.smoothed(cross_entropies, smooth, label_smoothing)
    distilled = None if distill_ignored else labelled
    own = dict(beta=beta, skew=skew, weight=weight)
    distances = _FORMULAS[divergence](
        of_labels if distilled is not None else student_logits,
        selected(teacher_logits, distilled, 1),  # of which there is a logarithm too
        temperature=temperature,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        teacher_form=teacher_form,
        scale_t2=scale_t2,
        standardize=standardize,
        **{name: own[name] for name in [rows.OPTIONS.get(divergence)] if name},
    )
    share = 1 - alpha if distill_weight is None else distill_weight
    return [
        Term(alpha, selected(cross_entropies, labelled), labelled, counts),
        Term(share, selected(distances, distilled), distilled),
    ]
