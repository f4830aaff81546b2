"""Relations between the tokens of a sequence, or the patches of an image, in two networks.

A network is seen through the products of its tokens with each other, so that the widths of student
and teacher may differ and nothing is projected. Tokens are [B, L, D], or [L, D] for one sequence.
The teacher is a constant. Each loss is a mean over sequences, and those of one value for each
sequence take `weights`, `normalizer` and `reduction`.

`mask` marks the tokens that count, [B, L], as tokenizers give it: bool, or 1 and 0. Other tokens
reach nothing, whatever they hold, and the mean is over the sequences with a token that counts.

No matrix [L, L] is stored. On a GPU kernels solve heads of at most 128 features in half precision,
and of at most 64 where float32 may be rounded to TF32; all else goes by chunks through cuBLAS, as
on any other device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._loss import loss
from fastkd._op import Number
from fastkd._reduction import Term, selected
from fastkd.problems import tokens
from fastkd.problems.pairs import directions
from fastkd.problems.tokens import as_bool, mean_of_sequences, of_sequences, weighted_sum


@loss(tokens.check, tokens.relation, per_example=-2)
def token_relation(
    student: Tensor,
    teacher: Tensor,
    *,
    heads: int = 1,
    normalize: bool = False,
    temperature: Number | None = None,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    divergence: str = "kl",
    causal: bool = False,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compare how the tokens of a sequence attend to each other, or their Gram matrices.

        kl     1/(A n) Σ_ai KL(softmax_j(T_aij) ‖ softmax_j(S_aij))
        mse    1/(A n²) Σ_aij (S_aij − T_aij)²

    S_a = X_a X_aᵀ / T are the products of the student's n tokens in head a of A, T_a those of the
    teacher's. Published losses are, with their mean over the sequences or images,

    - a relation of MiniLMv2: heads=A; `minilm_relation` adds up several;
    - the local loss of lightly-train's distillation v3: normalize=True, temperature=0.07, whose
      "batchmean" over the B · L rows is the mean here;
    - the Gram loss of DINOv3 without removal of negatives: normalize=True, temperature=1,
      divergence="mse"; `gram_anchoring` has the removal.

    Args:
        student: Tokens of the student, [B, L, D], or [L, D] for one sequence. A feature map
            [B, C, H, W] is `.flatten(2).mT`.
        teacher: Tokens of the teacher, [B, L, D'], with any width. They get no gradient.
        heads: A ≥ 1, into which both widths are split anew; it must divide them.
        normalize: Whether a token is divided by its length in each head.
        temperature: T > 0, a number or a 0-dim tensor; None: √(D / A), which is each network's own.
        student_temperature, teacher_temperature: Replace T for one of the networks.
        divergence: "kl", or "mse" of S and T without a softmax.
        causal: Whether a token sees those before it and itself only; "mse" is a mean over these
            pairs then.
        mask: The tokens that count, [B, L], bool or 1 and 0; n is their number.
        weights: One number or bool for each sequence, [B]. A sequence of weight 0 contributes
            exactly 0 to loss and gradient, whatever it holds.
        normalizer: Replaces the divisor Σ weights of the mean. A number or a tensor of one element.
        reduction: "mean" (Σ w·l / Σ w over the sequences with a token), "sum" (Σ w·l) or "none"
            (w·l).

    Returns:
        A scalar or, with reduction "none", one loss for each sequence [B]; float64 if an input is,
        else float32.

    Raises:
        TypeError: Student or teacher are no floating-point tensors, or the mask is of floats.
        ValueError: The inputs do not fit together, or an option is out of range.

    Reference:
        Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing
        Pretrained Transformers, 2021. arXiv:2012.15828
    """
    mask = as_bool(mask)
    losses = _relation(
        student, teacher, mask, heads, normalize,
        temperature if student_temperature is None else student_temperature,
        temperature if teacher_temperature is None else teacher_temperature, divergence, causal,
    )  # fmt: skip
    return of_sequences(losses, mask)


@loss(tokens.check_minilm, tokens.minilm)
def minilm_relation(
    student_qkv: Sequence[Tensor],
    teacher_qkv: Sequence[Tensor],
    *,
    n_heads: int = 48,
    weights: Sequence[Number] | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute Σ_r α_r · token_relation(student_r, teacher_r, heads=A), MiniLMv2's relations.

    The relations are usually those of queries, keys and values of one layer of self-attention,
    before they are split into the heads of the network: [B, L, width]. So student and teacher may
    have different widths and numbers of heads. Each is scaled by 1 / √d with d = width / A.

    MiniLM (v1) compares values among each other and attention itself, as many heads in both:
    ``minilm_relation([v], [v_t], n_heads=A) + forward_kl(scores, scores_t).mean()`` with the scores
    q kᵀ / √d of attention, [B, A, L, L].

    Args:
        student_qkv: A list or tuple of the student's vectors, [B, L, D] each, one at least. One
            tensor of all is `.unbind(0)` or `.chunk(3, -1)`.
        teacher_qkv: As many of the teacher, [B, L, D'] each. They get no gradient.
        n_heads: A ≥ 1, the number of relation heads, which must divide all widths: 48 for networks
            as wide as BERT-base and 64 for BERT-large in the paper.
        weights: α ≥ 0 for each relation, numbers or 0-dim tensors; None: all 1.
        causal: Whether a token sees those before it and itself only, as in a decoder.
        mask: The tokens that count, [B, L], bool or 1 and 0, as `attention_mask`.

    Returns:
        A scalar, the mean over the sequences with a token that counts; float64 if an input is, else
        float32.

    Raises:
        TypeError: Student or teacher are no sequences of floating-point tensors.
        ValueError: The inputs do not fit together, or an option is out of range.

    Reference:
        Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing
        Pretrained Transformers, 2021. arXiv:2012.15828; v1: Wang et al., MiniLM, 2020.
        arXiv:2002.10957
    """
    mask = as_bool(mask)
    losses = [
        _relation(s, t, mask, n_heads, False, None, None, "kl", causal)
        for s, t in zip(student_qkv, teacher_qkv, strict=True)
    ]
    return mean_of_sequences(weighted_sum(losses, weights), mask)


@loss(tokens.check_anchoring, tokens.anchoring)
def gram_anchoring(
    student: Tensor,
    teacher: Tensor,
    *,
    remove_negative: str | None = "both",
    per_image: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the mean of (cos(s_i, s_j) − cos(t_i, t_j))² over pairs of patches: Gram anchoring.

    DINOv3's `GramLoss` is this number: `per_image` is its `img_level`, "both" its `remove_neg`,
    None both of its options off, as in its recipe and its paper. Its `remove_only_teacher_neg`
    sets the teacher's negatives to 0 before it looks for pairs where both are negative, and so
    leaves the student's; "teacher" does what it is documented to do.

    Args:
        student: Patches of the student, [B, L, D], or [L, D] for one image. A feature map
            [B, C, H, W] is `.flatten(2).mT`.
        teacher: Patches of the teacher, [B, L, D'], with any width. They get no gradient.
        remove_negative: "both": negative cosines of both networks are 0. "teacher": those of the
            teacher are, and those of the student where both are negative. None: all count.
        per_image: Whether patches are compared within an image; otherwise with those of the whole
            batch.
        mask: The patches that count, [B, L], bool or 1 and 0. The mean is over their pairs, and
            then over the images that have one.

    Returns:
        A scalar; float64 if an input is, else float32.

    Raises:
        TypeError: Student or teacher are no floating-point tensors, or the mask is of floats.
        ValueError: The inputs do not fit together, or an option is out of range.

    Reference:
        Siméoni et al., DINOv3, 2025. arXiv:2508.10104
    """
    mask = as_bool(mask)
    if not per_image:
        student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
        mask = None if mask is None else mask.flatten()
    s, t = (_similarities(x, mask, 1, True, 1.0) for x in (student, teacher))
    if remove_negative is not None:
        removed = (s < 0) & (t < 0) if remove_negative == "teacher" else s < 0
        s, t = s.masked_fill(removed, 0), t.relu()
    losses = _mean_square(s, t, _pairs(s, mask, False))
    return mean_of_sequences(losses, mask)


@loss(tokens.check_cka, per_example=-2)
def cka(
    student: Tensor,
    teacher: Tensor,
    *,
    center: bool = True,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute 1 − ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), linear centred kernel alignment of the features.

    X are the student's features [L, D] and Y the teacher's, less their means over the L positions;
    the norms are Frobenius'. Rotations and the scales of either network change nothing. The loss
    lies in [0, 1]. It is made of the smaller products, those of features, D · D', or those of
    positions, L · L: it takes no memory of L² numbers where L is large.

    lightly's `PatchKernelAlignmentLoss` has the same mean over images; below ‖XᵀX‖ = 1e-3, which
    features of usual size do not reach, it divides by 1e-3 instead. Its mask says which patches do
    not count, that here which do.

    Args:
        student: Features of the student, [B, L, D], one example each, or [N, D] for one example,
            the features of a batch. A feature map [B, C, H, W] is `.flatten(2).mT`.
        teacher: Features of the teacher, [B, L, D'], with any width. They get no gradient.
        center: Whether the means over the positions are subtracted.
        mask: The positions that count, [B, L], bool or 1 and 0.
        weights: One number or bool for each example, [B], as in `token_relation`.
        normalizer: Replaces the divisor Σ weights of the mean.
        reduction: "mean" (Σ w·l / Σ w over the examples with two positions, or without `center`
            one), "sum" (Σ w·l) or "none" (w·l).

    Returns:
        A scalar or, with reduction "none", one loss for each example [B]. An example all features
        of which are alike has the loss 1 and gets no gradient, since it has no kernel.

    Raises:
        TypeError: Student or teacher are no floating-point tensors, or the mask is of floats.
        ValueError: The inputs do not fit together, or an option is out of range.

    Reference:
        Kornblith et al., Similarity of Neural Network Representations Revisited, 2019.
        arXiv:1905.00414; of patches: Patch-Level Kernel Alignment for Dense Self-Supervised
        Learning, 2025. arXiv:2509.05606
    """
    mask = as_bool(mask)
    x, y = (_spread(features, mask, center) for features in (student, teacher))
    (length, width), other = x.shape[-2:], y.shape[-1]
    if length * (width + other) < width**2 + width * other + other**2:
        of_x, of_y = x @ x.mT, y @ y.mT
        common = (of_x * of_y).sum((-2, -1))
    else:
        of_x, of_y = x.mT @ x, y.mT @ y
        common = (x.mT @ y).square().sum((-2, -1))
    size = _length(of_x) * _length(of_y)
    alignment = common / torch.where(size == 0, 1, size)
    losses: Any = (1 - alignment).relu()
    if mask is None and length > int(center):
        return losses
    n = torch.full_like(losses, length) if mask is None else mask.sum(-1)
    counted = n > int(center)
    return [Term(1.0, selected(losses, counted), counted)]  # type: ignore[return-value]


def _relation(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    heads: int,
    normalize: bool,
    student_temperature: Number | None,
    teacher_temperature: Number | None,
    divergence: str,
    causal: bool,
) -> Tensor:
    """Return the loss of each sequence, [...]; 0 without a token that counts."""
    s = _similarities(student, mask, heads, normalize, student_temperature)
    t = _similarities(teacher, mask, heads, normalize, teacher_temperature)
    pairs = _pairs(s, mask, causal)
    if divergence == "mse":
        return _mean_square(s, t, pairs)
    if pairs is not None:
        # a token that does not count sees itself alone, so that its divergence is 0
        kept = pairs | torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)
        s, t = s.masked_fill(~kept, -torch.inf), t.masked_fill(~kept, -torch.inf)
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    if pairs is not None:  # since −∞ − (−∞) is NaN
        terms = terms.masked_fill(~pairs, 0)
    n = student.shape[-2] if mask is None else mask.sum(-1)
    return _over(terms.sum((-3, -2, -1)), heads * n).relu()


def _similarities(
    vectors: Tensor, mask: Tensor | None, heads: int, normalize: bool, temperature: Number | None
) -> Tensor:
    """Return [..., heads, L, L], the products of tokens with each other over the temperature."""
    rows = selected(vectors, mask).unflatten(-1, (heads, -1)).transpose(-3, -2)
    if normalize:
        rows = directions(rows)
    return rows @ rows.mT / (math.sqrt(rows.shape[-1]) if temperature is None else temperature)


def _pairs(similarities: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Return the pairs that count, bool, in a shape like [..., 1, L, L]; None: all do."""
    pairs = None
    if causal:
        pairs = torch.ones_like(similarities[..., :1, :, :], dtype=torch.bool).tril()
    if mask is not None:
        among = mask[..., None, :, None] & mask[..., None, None, :]
        pairs = among if pairs is None else among & pairs
    return pairs


def _mean_square(s: Tensor, t: Tensor, pairs: Tensor | None) -> Tensor:
    """Return the mean of (S − T)² over the pairs that count in each sequence, [...]."""
    squares = (s - t).square()
    heads, n, _ = s.shape[-3:]
    if pairs is None:
        return _over(squares.sum((-3, -2, -1)), heads * n * n)
    n_pairs = pairs.sum((-3, -2, -1))
    return _over(squares.masked_fill(~pairs, 0).sum((-3, -2, -1)), heads * n_pairs)


def _over(total: Tensor, n: int | Tensor) -> Tensor:
    """Return total / n, of nothing 0."""
    return total / (n.clamp(min=1) if isinstance(n, Tensor) else max(n, 1))


def _spread(features: Tensor, mask: Tensor | None, center: bool) -> Tensor:
    """Return features [..., L, D] less their means and over their length; 0 if they are alike.

    The length is a constant, since it changes neither the alignment nor, multiplied, its gradient.
    """
    x = selected(features, mask)
    length = _length(x.detach())
    if center:
        n = x.shape[-2] if mask is None else mask.sum(-1)[..., None, None]
        x = selected(x - _over(x.sum(-2, keepdim=True), n), mask)
    spread = _length(x.detach())
    # what rounding leaves of equal features has no direction
    are_alike = spread <= 8 * torch.finfo(x.dtype).eps * length
    return selected(x, ~are_alike) / torch.where(are_alike, 1, spread)[..., None, None]


def _length(matrices: Tensor) -> Tensor:
    """Return the Frobenius norm of each of the matrices [..., m, n]."""
    return torch.linalg.vector_norm(matrices, dim=(-2, -1))
