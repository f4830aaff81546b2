"""Losses of what a softmax says about places: the positions of a channel, the edges of a box.

Both are divergences of softmax rows and are solved by the engines of the logits' losses. The
teacher is a constant. Half precision is computed in float32 inside.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkd._loss import loss
from fastkd._op import Number
from fastkd.divergence import forward_kl
from fastkd.problems import _maps as maps


@loss(maps.check_channel_wise, maps.channel_wise, per_example=2)
def channel_wise(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Number = 4.0,
    scale_t2: bool = True,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² (1/BC) Σ_bc KL(p_bc ‖ q_bc), channel-wise distillation.

    p_bc = softmax(teacher[b, c] / T) over the positions of a channel, q_bc that of the student: a
    channel says where it is active, not how much. Maps are features, or logits of segmentation.

    Implementations agree in the sum over positions and the mean over B and C, but not in T:

        TorchDistiller, its authors'    temperature=4.0
        mmrazor ChannelWiseDivergence   temperature=1.0, times its loss_weight

    The gradient has the layout of the maps. Contiguous maps are read as they lie, and by the
    portable engine so are channels-last ones. The kernels want the positions of a channel side by
    side: for each direction they copy channels-last maps of both networks, and the gradient, which
    moves three times the bytes, 30 in place of 10 for each number in bfloat16.

    Args:
        student: Maps of the student, [B, C, H, W], [B, C, L] or with more positions.
        teacher: Maps of the teacher, the same shape. They get no gradient. Where sizes differ,
            `torch.nn.functional.interpolate` the student's.
        temperature: T > 0, which divides both networks' maps. A number or a 0-dim tensor.
        scale_t2: Whether the loss is multiplied by T².
        weights: One number or bool for each channel of each example, [B, C]. A channel of weight 0
            contributes exactly 0 to loss and gradient, whatever it holds.
        normalizer, reduction: As in `forward_kl`, with a channel [b, c] in place of a row.

    Returns:
        A scalar or, with reduction "none", one loss for each channel, [B, C]; float64 if an input
        is, else float32.

    Raises:
        TypeError: The maps are no floating-point tensors, or an option has an unknown name.
        ValueError: The maps do not fit together, or an option is out of range.

    Reference:
        Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, 2021.
        arXiv:2011.13256
    """
    return forward_kl.formula(
        student.flatten(2), teacher.flatten(2), temperature=temperature, scale_t2=scale_t2
    )


@loss(maps.check_localization, maps.localization, per_example=True)
def localization(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Number = 10.0,
    bins: str = "sum",
    scale_t2: bool = True,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² KL(p ‖ q) between the distributions of the edges of boxes.

    A detector with distributions says of each edge of a box, by logits of n_bins distances, where
    it lies. p = softmax(teacher / T) and q = softmax(student / T) are over the bins. Outputs
    [N, 4 · n_bins], with n_bins = reg_max + 1, are `.unflatten(-1, (4, n_bins))`, and weights [N]
    of the boxes are then `weights[:, None].expand(-1, 4)`.

    Implementations differ in their divisor:

        the paper           bins="sum"
        mmdetection, LD     bins="mean", reduction="sum" over weights of edges, then / avg_factor:
                            normalizer=avg_factor in place of the sum

    Args:
        student_logits: Logits of the student, (..., n_bins), unnormalised.
        teacher_logits: Logits of the teacher, the same shape. They get no gradient.
        temperature: T > 0, which divides both networks' logits. A number or a 0-dim tensor.
        bins: Whether the terms of the n_bins are summed or averaged: "sum" or "mean".
        scale_t2: Whether the loss is multiplied by T².
        weights, normalizer, reduction: As in `forward_kl`, with an edge in place of a row.

    Returns:
        A scalar or, with reduction "none", one loss for each edge (...); float64 if an input is,
        else float32.

    Raises:
        TypeError: The logits are no floating-point tensors, or an option has an unknown name.
        ValueError: The logits do not fit together, or an option is out of range.

    Reference:
        Zheng et al., Localization Distillation for Dense Object Detection, 2022. arXiv:2102.12252
    """
    divergence = forward_kl.formula(
        student_logits, teacher_logits, temperature=temperature, scale_t2=scale_t2
    )
    return divergence / maps.divisor(student_logits, bins)
