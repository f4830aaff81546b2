"""Distillation of logits on several levels at once.

The loss is one number for the batch and takes no weights and no reduction. The teacher is a
constant. An empty batch has the loss 0.

With a `group` the batch is spread over the ranks of a process group, in parts of any sizes. Each
rank gets the loss of the whole batch and, times the number of ranks, its gradient in the rank's
rows, which DistributedDataParallel averages into the gradient of a single process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._loss import loss
from fastkd._op import Number
from fastkd.divergence import forward_kl
from fastkd.problems import levels


@loss(levels.check, levels.levels, per_example=False, has_kernels=False)
def mlkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperatures: Sequence[Number] = (2.0, 3.0, 4.0, 5.0, 6.0),
    instance_weight: Number = 1.0,
    batch_weight: Number = 1.0,
    class_weight: Number = 1.0,
    group: Any = None,
) -> Tensor:
    """Compare predictions of examples, of pairs of examples and of pairs of classes, at several T.

        Σ_T [w_i T² mean_i KL(P_i ‖ Q_i) + w_b ‖QQᵀ − PPᵀ‖² / N + w_c ‖QᵀQ − PᵀP‖² / V]

    Q = softmax(student_logits / T) and P = softmax(teacher_logits / T) are matrices [N, V], and the
    norms are Frobenius'. The authors' code multiplies these sums by the share of the examples, or
    classes, of which the teacher is less confident than of the median, about ½: the mask meets what
    is summed up already. Their loss is that with weights of about ½.

    Args:
        student_logits: Logits (..., V), float16, bfloat16, float32 or float64; all rows are one
            batch of N.
        teacher_logits: Logits (..., V) of the same shape; a constant.
        temperatures: Temperatures T > 0, numbers or 0-dim tensors without gradient.
        instance_weight: w_i ≥ 0, a number or a 0-dim tensor without gradient.
        batch_weight: w_b ≥ 0, likewise.
        class_weight: w_c ≥ 0, likewise.
        group: A torch.distributed process group whose ranks hold parts of the batch, "world" for
            all ranks, or None. Ranks exchange the logits of both networks.

    Returns:
        The loss, a 0-dim tensor in float32, or in float64 where an input is float64.

    Raises:
        TypeError: If an input is no tensor of floating-point logits, or `group` no process group.
        ValueError: If the inputs differ in shape or device, or if an option is outside its range.
        RuntimeError: If there is a `group`, but torch.distributed is not initialised.

    Reference:
        Jin et al., Multi-Level Logit Distillation, 2023.
        openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper
    """
    if not student_logits.numel():
        return student_logits.sum()
    z, z_teacher = (x.reshape(-1, x.shape[-1]) for x in (student_logits, teacher_logits))
    losses = []
    for temperature in temperatures:
        q, p = ((x / temperature).softmax(1) for x in (z, z_teacher))
        instance = forward_kl.formula(z, z_teacher, temperature=temperature).mean()
        batch = (q @ q.T - p @ p.T).square().sum() / len(z)
        classes = (q.T @ q - p.T @ p).square().sum() / z.shape[1]
        losses.append(instance_weight * instance + batch_weight * batch + class_weight * classes)
    return torch.stack(losses).sum()
