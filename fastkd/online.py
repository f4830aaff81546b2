"""Online distillation: networks that are trained together teach each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastkd._loss import loss
from fastkd._op import Number
from fastkd.divergence import forward_kl
from fastkd.problems import peers


@loss(peers.check, peers.mutual, per_example=True)
def mutual_kl(
    logits: Sequence[Tensor],
    *,
    temperature: Number = 1.0,
    scale_t2: bool = True,
    detach_peers: bool = True,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute Σ_i 1/(K − 1) Σ_{j≠i} T² KL(p_j ‖ p_i), deep mutual learning of K networks.

    p_i = softmax(logits_i / T). Each network learns from the mean of the others. Its cross-entropy
    with the labels is added by the caller: the sum over all networks, as here.

    Args:
        logits: Logits of K ≥ 2 networks, (..., V) each, unnormalised. All get a gradient.
        temperature: T > 0, which divides all logits. A number or a 0-dim tensor.
        scale_t2: Whether the loss is multiplied by T².
        detach_peers: Whether a network takes the others as constants, as in the paper: the gradient
            of KL(p_j ‖ p_i) reaches network i alone. Otherwise it reaches network j too.
        labels: Class indices of the rows, (...), integers. They only say which rows count.
        ignore_index: Rows with this label count as rows of weight 0.
        weights: One number or bool for each row, (...). A row of weight 0 contributes exactly 0 to
            loss and gradient, whatever it holds.
        normalizer: Replaces the divisor Σ weights of the mean. A number or a tensor of one element.
        reduction: "mean" (Σ w·l / Σ w), "sum" (Σ w·l) or "none" (w·l).

    Returns:
        A scalar or, with reduction "none", one loss for each row (...); float64 if an input is,
        else float32.

    Raises:
        TypeError: The logits are no floating-point tensors.
        ValueError: The logits do not fit together, or an option is out of range.

    Reference:
        Zhang et al., Deep Mutual Learning, 2018. arXiv:1706.00384
    """
    total = None
    for i, student in enumerate(logits):
        for j, teacher in enumerate(logits):
            if i == j:
                continue
            divergence = forward_kl.formula(
                student,
                teacher.detach() if detach_peers else teacher,
                temperature=temperature,
                scale_t2=scale_t2,
            )
            total = divergence if total is None else total + divergence
    assert total is not None  # because there are two networks at least
    return total / (len(logits) - 1)
