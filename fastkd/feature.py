"""Features of hidden layers: hints, embeddings and attention maps of student and teacher.

`hint` and `embedding_mse` compare features of one width position by position, where a position is a
pixel of a map or a token of a sequence. `attention_transfer` compares where in a map the student
and the teacher are active, so that their widths may differ. The teacher is a constant.

A position whose features are all 0 has no direction, and a map of zeros no attention: its gradient
is 0. Half precision is computed in float32 inside; the gradient has the dtype and, where that is
dense, the memory format of the input.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._loss import loss
from fastkd._op import Number
from fastkd._reduction import selected
from fastkd.problems import _features as features
from fastkd.problems import moments
from fastkd.problems._features import Features
from fastkd.problems.pairs import directions

# ------------------------------------------------------------------------------------------- hints


@loss(features.check_hint, moments.hint)
def hint(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "mse",
    beta: Number = 1.0,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    feature_dim: int | None = None,
    batch_dim: int = 0,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute Σ w·v / Σ w over the positions of a layer, where v compares features of one width.

        mse              v = (1/C) Σ (s − t)²
        smooth_l1        v = (1/C) Σ (s − t)² / 2β, or |s − t| − β/2 where |s − t| ≥ β
        cosine           v = 1 − s·t / (‖s‖ ‖t‖)
        normalized_mse   v = (1/C) ‖s/‖s‖ − t/‖t‖‖²

    C is the width. What public code computes, in these terms, for [B, C, H, W] and [B, L, C]:

        FitNets, timm, RepDistiller       F.mse_loss: hint(s, t)
        Ultralytics loss_sl2              hint(s, t, weights=scores), scores [B, 1, H, W] those of
                                          the teacher's best class: Σ (s − t)² w / (Σ w · C)
        DistilBERT                        CosineEmbeddingLoss: hint(s, t, kind="cosine", mask=mask)
        TextBrewer hid_mse, cos           hint(s, t, mask=mask); kind="cosine": over the masked mean
        NeMo Automodel, intermediate      hint(s, t, kind=..., mask=mask), "mse", "smooth_l1" or
                                          "cosine"
        Liger, ModelOpt HiddenStateCosine hint(s, t, kind="cosine", mask=mask); [S, B, H], as of
                                          Megatron, with batch_dim=1
        PKD of BERT                       C · hint(s, t, kind="normalized_mse"), which sums over C

    A sum in place of a mean, as of F.mse_loss(reduction="sum"), is C · hint(s, t, reduction="sum").

    Args:
        student: Features [N, C], [B, L, C], [B, C, H, W] or [B, C, D, H, W], float16, bfloat16,
            float32 or float64. `HintLoss` has a projector to the teacher's width.
        teacher: Features of the same shape; a constant.
        kind: "mse", "smooth_l1", "cosine" or "normalized_mse".
        beta: β ≥ 0 of "smooth_l1", a number or a 0-dim tensor without gradient.
        weights: w, one number for each position: the features' shape without the feature dimension,
            or with 1 there, or what broadcasts to that, as [H, W] or [B, 1] do. A position of
            weight 0 contributes exactly 0 to loss and gradient, whatever it holds.
        mask: Which positions count, bools or the 0 and 1 of a tokenizer, in a shape as of weights.
        feature_dim: The dimension of the features: by default 1 where there are four or more, as in
            [B, C, H, W], and the last one where there are two or three.
        batch_dim: The dimension of the examples; 1 for Megatron's [S, B, H].
        normalizer: Replaces the divisor Σ w of the mean, for example by the number of tokens of a
            whole accumulated batch. A number or a tensor of one element.
        reduction: "mean" (Σ w·v / Σ w), "sum" (Σ w·v) or "none", which is Σ w·v / Σ w over the
            positions of each example, [B]. Where no position counts, it is 0.

    Returns:
        A scalar or, with reduction "none", one number for each example [B]; float64 if an input is,
        else float32.

    Raises:
        TypeError: The features, weights or mask are no tensors of the right kind.
        ValueError: The features do not fit together, nor weights or mask to them, or an option is
            out of range.

    Reference:
        Romero et al., FitNets: Hints for Thin Deep Nets, 2015. arXiv:1412.6550
    """
    places = features.dimensions(student, feature_dim, batch_dim)
    w, m = features.counted(*(features.of_positions(x, student, *places) for x in (weights, mask)))
    counts = m if w is None else w.detach() != 0
    s, t = (selected(features.positions(x, *places), counts) for x in (student, teacher))
    values = features.weighted(selected(_of_positions(s, t, kind, beta), counts), w)
    return features.reduced(values, m if w is None else w, normalizer, reduction)


def _of_positions(s: Tensor, t: Tensor, kind: str, beta: Number) -> Tensor:
    """Return v of each position from features (..., C)."""
    if kind == "mse":
        return (s - t).square().mean(-1)
    if kind == "smooth_l1":  # PyTorch takes a 0-dim tensor as its beta too
        return F.smooth_l1_loss(s, t, beta=beta, reduction="none").mean(-1)  # type: ignore[arg-type]
    s, t = directions(s), directions(t)
    return 1 - (s * t).sum(-1) if kind == "cosine" else (s - t).square().mean(-1)


# -------------------------------------------------------------------------------------- embeddings


@loss(features.check_embeddings, moments.embeddings, per_example=True)
def embedding_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = False,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute (1/D) ‖s − t‖² of each embedding, or of its direction.

    What public code computes, in these terms:

        TinyBERT, embedding layer                 embedding_mse(s, t), of s projected to D
        sentence-transformers MSELoss             embedding_mse(s, t)
        sentence-transformers EmbedDistillLoss    "mse" embedding_mse(s, t); "cosine" is
                                                  (D / 2) · embedding_mse(s, t, normalize=True)

    Args:
        student: Embeddings (..., D), float16, bfloat16, float32 or float64.
        teacher: Embeddings of the same shape; they get no gradient.
        normalize: Whether to divide each embedding by its length first.
        weights: One number or bool for each embedding, (...), as the attention mask of tokens is.
            One of weight 0 contributes exactly 0 to loss and gradient, whatever it holds.
        normalizer: Replaces the divisor Σ weights of the mean. A number or a tensor of one element.
        reduction: "mean" (Σ w·l / Σ w), "sum" (Σ w·l) or "none" (w·l, in the shape (...)).

    Returns:
        A scalar or, with reduction "none", one loss for each embedding (...); float64 if an input
        is, else float32.

    Raises:
        TypeError: The embeddings are no floating-point tensors, or an option has an unknown name.
        ValueError: The embeddings do not fit together, or an option is out of range.

    Reference:
        Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, 2020.
        arXiv:1909.10351
    """
    return _of_positions(student, teacher, "normalized_mse" if normalize else "mse", 1.0)


# ------------------------------------------------------------------------------- attention transfer


@loss(features.check_maps, moments.attention)
def attention_transfer(
    student: Features, teacher: Features, *, p: Number = 2.0, kind: str = "sum"
) -> Tensor:
    """Compute mean_bx (A/‖A‖ − T/‖T‖)², the difference of normalised attention maps.

        sum   A_bx = Σ_c |s_bcx|^p
        max   A_bx = max_c |s_bcx|^p

    A is the map of the student, T that of the teacher, x are positions, and ‖A‖ is the length of
    the map of an example. Features of the larger spatial size are pooled to the smaller one by
    adaptive averages, in each dimension, as RepDistiller does, before the maps are made. Of maps of
    several layers the losses are added up. Public code, with P positions in an example:

        RepDistiller, torchdistill "code"   mean over B and P: attention_transfer(s, t)
        torchdistill "paper"                Σ_b ‖A/‖A‖ − T/‖T‖‖: not squared, so that it is not
                                            a multiple of this
        the paper, its L_AT                 (β/2) Σ over layers of that norm; its authors' code, and
                                            all that followed it, take the mean of squares
        mean_c in place of Σ_c              the same, because the maps are normalised

    Args:
        student: Feature maps [B, C, H, W], or [B, C, L], [B, C, D, H, W], or a list of such.
        teacher: Feature maps of the same examples, of any width and spatial size, as many as the
            student has; constants.
        p: The power, a number above 0 or a 0-dim tensor without gradient. 2 is that of the public
            code; larger ones look at the most active places.
        kind: "sum" or "max" over the channels. Channels with the same maximum share its gradient.

    Returns:
        The loss, a 0-dim tensor in float32, or in float64 where an input is float64.

    Raises:
        TypeError: An input has other entries than floating-point feature maps.
        ValueError: The maps do not fit together, or an option is out of range.

    Reference:
        Zagoruyko and Komodakis, Paying More Attention to Attention, 2017. arXiv:1612.03928
    """
    attention = functools.partial(_attention, p=p, kind=kind)
    return moments.transfer(attention, moments.map_difference, student, teacher)


def _attention(maps: Tensor, p: Number, kind: str) -> Tensor:
    """Return Σ_c |s|^p or max_c |s|^p of features [B, P, C]."""
    magnitudes = maps.abs()
    if kind == "max":
        magnitudes = magnitudes.amax(-1)
    # selected before the power is taken, because below p = 1 its slope at 0 is infinite
    is_zero = magnitudes == 0
    powers = torch.where(is_zero, 0, torch.where(is_zero, 1, magnitudes).pow(p))
    return powers if kind == "max" else powers.sum(-1)
