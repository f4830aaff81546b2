"""Losses of statistics of feature maps [B, C, ...]: how channels respond, not what they hold.

`nst` and `fsp` compare Gram matrices of channels, `vid` the likelihood of a teacher's maps, and
`attention_mse` the scores of attention. The teacher is a constant. They are computed as their
formulas stand here, whose work is matrix products and few sweeps over the maps, but for the squares
of `vid`: they are rows to the portable engine, which keeps no tensor of the maps' size but the
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._loss import loss
from fastkd._op import Number
from fastkd.problems import _maps as maps
from fastkd.problems.relations import LEAST_LENGTH

# ---------------------------------------------------------------------- neuron selectivity transfer


@loss(maps.check_selectivity, per_example=1)
def nst(
    student: Tensor,
    teacher: Tensor,
    *,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the distance MMD² between the channels of two networks: neuron selectivity transfer.

        mean_ij (s_i·s_j)² + mean_kl (t_k·t_l)² − 2 mean_ik (s_i·t_k)²

    s_i is a channel of the student's map divided by its length over the positions, t_k one of the
    teacher's; the kernel is the polynomial of degree 2 without a constant. Numbers of channels may
    differ. Sizes are pooled to the smaller one by averages.

    Σ_ij (s_i·t_j)² is the squared length of a matrix [C, C'], and the product of two Gram matrices
    of positions [HW, HW]: whichever is less work is made, and the published B·C·C·HW numbers never.
    A channel of zeros has no direction and gets no gradient.

        RepDistiller NSTLoss    the same number, for each layer of a list
        TextBrewer "nst"        another loss, `fsp` of tokens: see there

    Args:
        student: Maps of the student, [B, C, H, W], [B, C, L] or with more positions.
        teacher: Maps [B, C', ...] of the same examples. They get no gradient.
        weights: One number or bool for each example, [B]. An example of weight 0 contributes
            exactly 0 to loss and gradient, whatever it holds.
        normalizer, reduction: As in `forward_kl`, with an example in place of a row.

    Returns:
        A scalar or, with reduction "none", one loss for each example, [B]; float64 if an input is,
        else float32.

    Raises:
        TypeError: The maps are no floating-point tensors, or an option has an unknown name.
        ValueError: The maps do not fit together, or an option is out of range.

    Reference:
        Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017.
        arXiv:1707.01219
    """
    s, t = (x.flatten(2) for x in maps.of_the_smaller_size(student, teacher))
    (_, n_s, n_positions), n_t = s.shape, t.shape[1]
    if n_positions * (n_s + n_t) < n_s * n_s + n_s * n_t + n_t * n_t:
        return (_of_positions(s) - _of_positions(t)).square().sum(2).sum(1)
    own, others, between = (a @ b.mT for a, b in ((s, s), (t, t), (s, t)))
    of_s, of_t = (_reciprocal_lengths(torch.diagonal(x, dim1=1, dim2=2)) for x in (own, others))
    losses = (
        _mean_squared_cosine(own, of_s, of_s)
        + _mean_squared_cosine(others, of_t, of_t)
        - 2 * _mean_squared_cosine(between, of_s, of_t)
    )
    # the terms cancel where the networks agree, and a distance below 0 is rounding
    return torch.where(losses < 0, losses - losses.detach(), losses)


def _of_positions(channels: Tensor) -> Tensor:
    """Return [B, P, P], the mean over the channels of the products of their directions."""
    directions = channels * _reciprocal_lengths(channels.square().sum(2, keepdim=True))
    return directions.mT @ directions / channels.shape[1]


def _mean_squared_cosine(products: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """Return [B], from products of channels and the reciprocal lengths of either side."""
    cosines = products * of_rows[:, :, None] * of_columns[:, None]
    return cosines.square().mean(2).mean(1)


def _reciprocal_lengths(squares: Tensor) -> Tensor:
    """Return 1 / length, and 0 without a gradient where there is no direction."""
    is_zero = squares < LEAST_LENGTH**2
    return torch.where(is_zero, 0, torch.where(is_zero, 1, squares).rsqrt())


# ----------------------------------------------------------------------- flow of solution procedure


@loss(maps.check_pairs, per_example=1)
def fsp(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compare how a network goes from one layer to another: the flow of solution procedure.

        (1/C C') Σ_ij (G_ij − H_ij)²        G = (1/P) Σ_p first_ip second_jp

    G is made of two layers of the student over the P positions, H of two layers of the teacher.
    Where the sizes of the two layers differ, the larger one is pooled by averages.

        RepDistiller FSP    the same number, for each pair of a list
        torchdistill        Σ_j ‖G_·j − H_·j‖ (no square) of maps pooled by maxima; for its pooling
                            give `torch.nn.functional.adaptive_max_pool2d` of the maps
        TextBrewer "fsp"    states [B, L, D] are given as `.mT`
        TextBrewer "nst"    states [B, L, D] are given as they are; its mask is another one

    Args:
        student: Maps of two layers of the student, (first, second): [B, C, ...] and [B, C', ...].
        teacher: Maps of two layers of the teacher, with the same C and C'. They get no gradient.
        mask: Bools, or 0 and 1, of the positions of all four maps, [B, ...]. A position that is
            False contributes exactly 0 to loss and gradient and is not counted in P.
        weights: One number or bool for each example, [B]. An example of weight 0 contributes
            exactly 0 to loss and gradient, whatever it holds.
        normalizer, reduction: As in `forward_kl`, with an example in place of a row.

    Returns:
        A scalar or, with reduction "none", one loss for each example, [B]; float64 if an input is,
        else float32.

    Raises:
        TypeError: An input is no pair of floating-point maps, or an option has an unknown name.
        ValueError: The maps do not fit together, or an option is out of range.

    Reference:
        Yim et al., A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
        Transfer Learning, 2017
    """
    return (_flow(student, mask) - _flow(teacher, mask)).square().mean(2).mean(1)


def _flow(layers: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Return [B, C, C'], the means over the positions of the products of channels."""
    first, second = (x.flatten(2) for x in maps.of_the_smaller_size(*layers))
    n_positions: int | Tensor = first.shape[2]
    if mask is not None:
        mask = mask.flatten(1)[:, None] != 0
        first, second = (torch.where(mask, x, 0) for x in (first, second))
        n_positions = mask.sum(2, keepdim=True).clamp(min=1)
    return first @ second.mT / n_positions


# ------------------------------------------------------------- variational information distillation


@loss(
    maps.check_variational,
    maps.variational,
    per_example=1,
    has_kernels=False,
    same_on_ranks=("variance_parameter",),
)
def vid(
    student: Tensor,
    teacher: Tensor,
    variance_parameter: Tensor,
    *,
    epsilon: Number = 1e-5,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute mean ½ ((μ − t)² / σ² + log σ²), the teacher's negative log-likelihood.

    μ is what a regressor makes of the student's maps, and σ² = softplus(α) + ε is a variance for
    each channel, whose α is learnt. `VIDLoss` owns both. Sizes are pooled to the smaller one by
    averages. There is no constant ½ log 2π, as in no implementation:

        RepDistiller, torchdistill VIDLoss    the same number

    Args:
        student: The mean μ, [B, C, H, W], [B, C, L] or with more positions.
        teacher: Maps of the teacher, [B, C, ...]. They get no gradient.
        variance_parameter: α, [C]. It gets a gradient.
        epsilon: ε > 0, the smallest variance. A number or a 0-dim tensor.
        weights: One number or bool for each example, [B]. An example of weight 0 contributes
            exactly 0 to loss and gradient, whatever it holds.
        normalizer, reduction: As in `forward_kl`, with an example in place of a row.

    Returns:
        A scalar or, with reduction "none", one loss for each example, [B]; float64 if an input is,
        else float32. It may be negative.

    Raises:
        TypeError: The maps are no floating-point tensors, or an option has an unknown name.
        ValueError: The maps do not fit together, or an option is out of range.

    Reference:
        Ahn et al., Variational Information Distillation for Knowledge Transfer, 2019.
        arXiv:1904.05835
    """
    student, teacher = maps.of_the_smaller_size(student, teacher)
    squares = (student - teacher).square()
    while squares.ndim > 2:  # at once the sum of one channel would depend on the threads
        squares = squares.mean(-1)
    return maps.likelihoods(squares, variance_parameter, epsilon)


# ---------------------------------------------------------------------------------------- attention


@loss(maps.check_scores)
def attention_mse(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    mask: Tensor | None = None,
    masked_below: Number = -100.0,
) -> Tensor:
    """Compute the mean squared difference of attention scores, those before the softmax.

    Scores of at most `masked_below`, by which models exclude keys, count as 0 in either network.

        TinyBERT                        the same number, without a mask
        TextBrewer "attention_mse"      masked_below=-1e-3 without a mask, which also excludes what
                                        is merely negative; with a mask the same number

    Args:
        student_scores: Scores of the student, [B, heads, L, L] or [B, L, L].
        teacher_scores: Scores of the teacher, the same shape. They get no gradient. Where the
            numbers of heads differ, give means over the heads.
        mask: Bools, or 0 and 1, of the tokens, [B, L]. Only scores of a query and a key that are
            both True are counted; others contribute exactly 0 to loss and gradient.
        masked_below: The bound below which a score is none. A number or a 0-dim tensor.

    Returns:
        The loss, a 0-dim tensor in float32, or in float64 where an input is float64.

    Raises:
        TypeError: The scores are no floating-point tensors, or an option has an unknown name.
        ValueError: The scores do not fit together, or a mask or an option does not fit.

    Reference:
        Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, 2020.
        arXiv:1909.10351
    """
    s, t = (torch.where(x <= masked_below, 0, x) for x in (student_scores, teacher_scores))
    difference = s - t
    if mask is None:
        return _total(difference.square()) / max(difference.numel(), 1)
    kept = mask != 0
    pairs = kept[:, :, None] & kept[:, None]
    n_heads = difference[0:1].numel() // max(pairs[0:1].numel(), 1)
    pairs = pairs.view(len(kept), *[1] * (difference.ndim - 3), *pairs.shape[1:])
    counted = _total(torch.where(pairs, difference, 0).square())
    return counted / (pairs.sum() * n_heads).clamp(min=1)


def _total(x: Tensor) -> Tensor:
    """Return the sum, made dimension by dimension: at once it would depend on the threads."""
    while x.ndim:
        x = x.sum(-1)
    return x
