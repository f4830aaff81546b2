"""Contrastive losses: an embedding against its positive key among many negative ones.

In distillation the queries are the student's embeddings and the keys the teacher's. The matrix of
their similarities is never stored, unless it is small: memory grows with N + M, not with N · M.
Both sides get gradients; detach what shall get none. A temperature or a scale may be a number or a
0-dim tensor, which gets a gradient too. A loss is one number for the batch. All of them take

group  a torch.distributed process group whose ranks hold parts of the batch, of any sizes: the keys
       of all ranks are negatives. Each rank gets the loss of the whole and, times the number of
       ranks, its gradient in the own rows: what DistributedDataParallel averages into that of a
       single process.

An example without negatives has no loss. Half precision is computed in float32 inside.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _checks
from fastkd._contrasts import by_engine, means_of_classes, places_of_classes
from fastkd._engine import is_differentiated
from fastkd._loss import batch_loss
from fastkd._pairs import (
    Number,
    cosines,
    everyone,
    in_batches,
    is_number,
    logarithm,
    nothing,
    of_all_ranks,
    own_left_out,
    scale_of,
    softplus,
)
from fastkd.portable import _small_contrastive

# ----------------------------------------------------------------------------------------- InfoNCE


def _check_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: Number,
    negative_weight: Number,
    symmetric: bool,
    margin: Number,
    in_batch_negatives: bool,
    group: Any,
    **_: bool,
) -> None:
    bank = {} if negatives is None else {"negatives": negatives}
    _checks.matrices(query=query, key=key, **bank)
    _checks.same_examples(query=query, key=key)
    _checks.number(temperature=temperature, above=0)
    _checks.number(negative_weight=negative_weight, above=0)
    _checks.number(margin=margin)
    if not in_batch_negatives and (negatives is None or symmetric):
        got = "negatives=None" if negatives is None else "symmetric=True"
        raise ValueError(
            "in_batch_negatives=False needs negatives [M, D], and no symmetric form, since a bank "
            f"counts for the queries alone; got {got}"
        )
    _checks.process_group(group)


@in_batches(_small_contrastive.info_nce)
def _fused_info_nce(
    engine: str,
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: Number,
    negative_weight: Number,
    normalize: bool,
    symmetric: bool,
    margin: Number,
    decoupled: bool,
    in_batch_negatives: bool,
    half: str,
    group: Any,
) -> Tensor:
    bank = query[:0] if negatives is None else negatives
    scale = scale_of(temperature, query)
    own = cosines(query, key) if normalize else (query * key).sum(1)
    anchors = (own - margin) * scale - logarithm(negative_weight, query)
    keys, first, *of_keys = everyone(key, group, *([anchors.detach()] if symmetric else []))
    n = len(keys)
    if not n or not len(bank) + (n - 1 if in_batch_negatives else 0):
        return nothing(query, key, bank, temperature, negative_weight, margin)
    constant = None
    if not in_batch_negatives:
        keys, first = bank, -1
    elif negatives is not None and is_differentiated(negatives):
        keys = torch.cat([keys, negatives])
    else:
        constant = negatives
    weights = query.new_full((len(query),), (0.5 if symmetric else 1) / n)
    share = by_engine(
        engine, query, keys, scale, anchors, weights, first=first, half=half, group=group,
        bank=constant, normalize=normalize, form="linear" if decoupled else "softplus",
        key_anchors=of_keys[0] if symmetric and n > 1 else None,
    )  # fmt: skip
    return of_all_ranks(share, group)


@batch_loss(_check_info_nce, _fused_info_nce, group=None)
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: Number = 0.07,
    negative_weight: Number = 1.0,
    normalize: bool = True,
    symmetric: bool = False,
    margin: Number = 0.0,
    decoupled: bool = False,
    in_batch_negatives: bool = True,
) -> Tensor:
    """(1/N) Σ_i −log e^{s₊} / (e^{s₊} + λ Σ e^{s₋}): each query finds its own key among others.

    s₊ = (cos(q_i, k_i) − margin) / T; s₋ = cos(q_i, k_j) / T for the keys j ≠ i, unless
    `in_batch_negatives` is False, and for a bank of `negatives` [M, D], the same on all ranks.
    Queries and keys [N, D], divided by their length if `normalize`; λ is `negative_weight`, T the
    temperature. `symmetric`: the mean with keys finding queries; `decoupled`: e^{s₊} is not in the
    denominator. Raises TypeError for what is no embedding, ValueError for shapes that do not
    match, T ≤ 0 or λ ≤ 0.

    van den Oord et al., 2018, arXiv:1807.03748; decoupled: Yeh et al., 2022, arXiv:2110.06848
    """
    if normalize:
        query, key = F.normalize(query), F.normalize(key)
        negatives = None if negatives is None else F.normalize(negatives)
    query = query / temperature
    bank = [] if negatives is None else [query @ negatives.mT]
    n_others = len(query) - 1 if in_batch_negatives else 0
    if not len(query) or not n_others + sum(x.shape[1] for x in bank):
        return nothing(query, key, *bank, temperature, negative_weight, margin)

    logits = query @ key.mT if in_batch_negatives else (query * key).sum(1, keepdim=True)
    positive = logits.diagonal() if in_batch_negatives else logits[:, 0]
    if decoupled or not (is_number(margin, 0) and is_number(negative_weight, 1)):
        # what all logits of a row share does not count: λ is taken off the positive one
        positive = positive - margin / temperature
        positive = positive - logarithm(negative_weight, positive)
        own_logit = positive - torch.inf if decoupled else positive
        logits = logits.diagonal_scatter(own_logit) if in_batch_negatives else own_logit[:, None]

    def against(logits: Tensor, own: Tensor) -> Tensor:
        return (
            (logits.logsumexp(1) - positive).mean() if decoupled else F.cross_entropy(logits, own)
        )

    own = torch.arange(len(query), device=query.device)
    own = own if in_batch_negatives else 0 * own
    loss = against(torch.cat([logits, *bank], 1) if bank else logits, own)
    if not symmetric:
        return loss
    return (loss + against(logits.mT, own) if len(query) > 1 else loss) / 2


# ---------------------------------------------------------------------- images against their texts


def _check_siglip(
    image: Tensor, text: Tensor, logit_scale: Number, logit_bias: Number, *, group: Any
) -> None:
    _checks.matrices(image=image, text=text)
    _checks.same_examples(image=image, text=text)
    _checks.number(logit_scale=logit_scale, logit_bias=logit_bias)
    _checks.process_group(group)


def _check_clip(
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = None,
    *,
    group: Any,
) -> None:
    bias = 0.0 if logit_bias is None else logit_bias  # it cancels
    _check_siglip(image, text, logit_scale, bias, group=group)


@in_batches(_small_contrastive.clip_contrastive)
def _fused_clip(
    engine: str,
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = None,
    *,
    half: str,
    group: Any,
) -> Tensor:
    scale = image.new_ones(()) * logit_scale
    own = (image * text).sum(1) * scale
    texts, first, of_keys = everyone(text, group, own.detach())
    n = len(texts)
    if n < 2:
        return nothing(image, text, scale, logit_bias)
    weights = image.new_full((len(image),), 0.5 / n)
    share = by_engine(
        engine, image, texts, scale, own, weights, first=first, form="softplus", half=half,
        normalize=False, key_anchors=of_keys, group=group,
    )  # fmt: skip
    if logit_bias is not None:
        share = share + 0 * logit_bias  # it cancels, but is on the graph
    return of_all_ranks(share, group)


@in_batches(_small_contrastive.siglip)
def _fused_siglip(
    engine: str,
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    logit_bias: Number,
    *,
    half: str,
    group: Any,
) -> Tensor:
    texts, first = everyone(text, group)
    n, one = len(texts), image.new_ones(())
    scale, bias = one * logit_scale, one * logit_bias
    if not n:
        return nothing(image, text, scale, bias)
    own = (image * text).sum(1) * scale + bias
    weights = image.new_full((len(image),), 1 / n)
    others = by_engine(
        engine, image, texts, scale, -bias.expand(len(image)), weights,
        first=first, form="pairs", half=half, normalize=False,
    )  # fmt: skip
    return of_all_ranks(softplus(-own).sum() / n + others, group)


@batch_loss(_check_clip, _fused_clip, group=None)
def clip_contrastive(
    image: Tensor, text: Tensor, logit_scale: Number, logit_bias: Number | None = None
) -> Tensor:
    """½ (CE of the rows + CE of the columns) of scale · image · textᵀ: both find each other.

    Embeddings [N, D], already normalised; the scale, which is not a logarithm, multiplies their
    products. A bias cancels: its gradient is 0. Raises TypeError for what is no embedding,
    ValueError for shapes that do not match.

    Radford et al., Learning Transferable Visual Models, 2021. arXiv:2103.00020
    """
    if not len(image):
        return nothing(image, text, logit_scale, logit_bias)
    logits = logit_scale * image @ text.mT
    if logit_bias is not None:
        logits = logits + logit_bias
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2


@batch_loss(_check_siglip, _fused_siglip, group=None)
def siglip(image: Tensor, text: Tensor, logit_scale: Number, logit_bias: Number) -> Tensor:
    """(1/N) Σ_ij softplus(−y_ij (scale · ⟨image_i, text_j⟩ + bias)): each pair by itself.

    y is 1 for the own pairs i = j, −1 for others. Embeddings [N, D], already normalised; gradients
    to the scale, which is not a logarithm, and to the bias too. Raises TypeError for what is no
    embedding, ValueError for shapes that do not match.

    Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023. arXiv:2303.15343
    """
    if not len(image):
        return nothing(image, text, logit_scale, logit_bias)
    logits = logit_scale * image @ text.mT + logit_bias
    signs = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


# --------------------------------------------------------------------------- examples of one kind


def _check_nt_xent(view1: Tensor, view2: Tensor, *, temperature: Number, group: Any) -> None:
    _checks.matrices(view1=view1, view2=view2)
    _checks.same_examples(view1=view1, view2=view2)
    _checks.number(temperature=temperature, above=0)
    _checks.process_group(group)


@in_batches(_small_contrastive.nt_xent)
def _fused_nt_xent(
    engine: str,
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: Number,
    half: str,
    group: Any,
) -> Tensor:
    both = torch.cat([view1, view2])
    views, first = everyone(both, group)
    if len(views) <= 2:
        return nothing(view1, view2, temperature)
    scale = scale_of(temperature, both)
    positives = (cosines(view1, view2) * scale).repeat(2)
    weights = both.new_full((len(both),), 1 / len(views))
    share = by_engine(
        engine, both, None if group is None else views, scale, positives, weights,
        first=first, form="softplus", two_views=True, half=half,
    )  # fmt: skip
    return of_all_ranks(share, group)


@batch_loss(_check_nt_xent, _fused_nt_xent, group=None)
def nt_xent(view1: Tensor, view2: Tensor, *, temperature: Number = 0.5) -> Tensor:
    """(1/2N) Σ_i −log e^{s_i₊} / Σ_{j≠i} e^{s_ij}: of 2N views each finds the other one.

    s = cos / T between all views of both kinds, [N, D] each; s₊ is that with the other view of the
    same example. Raises TypeError for what is no embedding, ValueError for shapes that do not
    match or T ≤ 0.

    Chen et al., A Simple Framework for Contrastive Learning (SimCLR), 2020. arXiv:2002.05709
    """
    n = len(view1)
    if not n:
        return nothing(view1, view2, temperature)
    views = F.normalize(torch.cat([view1, view2]))
    logits = own_left_out(views / temperature @ views.mT)
    other = torch.arange(2 * n, device=views.device).roll(n)
    return F.cross_entropy(logits, other)


def _check_sup_con(
    features: Tensor, labels: Tensor, *, temperature: Number, anchors: str, group: Any
) -> None:
    _checks.matrices(features=features)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of classes (torch.int64), got {got}")
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels need one class for each of the {len(features)} features, got the shape "
            f"{[*labels.shape]}"
        )
    _checks.same_device(features=features, labels=labels)
    _checks.number(temperature=temperature, above=0)
    _checks.one_of(("with_positive", "all"), anchors=anchors)
    _checks.process_group(group)


@in_batches(_small_contrastive.sup_con)
def _fused_sup_con(
    engine: str,
    features: Tensor,
    labels: Tensor,
    *,
    temperature: Number,
    anchors: str,
    half: str,
    group: Any,
) -> Tensor:
    whole, first, labels = everyone(features, group, labels)
    if len(whole) < 2:
        return nothing(features, temperature)
    own = slice(first, first + len(features))
    place = places_of_classes(labels)
    zeros = torch.zeros_like(place, dtype=whole.dtype)
    n_alike = zeros.index_add(0, place, zeros + 1)[place]
    n_positives = (n_alike - 1).clamp(min=1)
    weights = (n_alike > 1).to(zeros.dtype)
    weights = weights / (weights.sum().clamp(min=1) if anchors == "with_positive" else len(whole))
    scale = scale_of(temperature, features)
    with torch.no_grad():  # gradients are those of each pair, by the engine
        z = F.normalize(whole)
        of_class = (z[own] * means_of_classes(z, place, n_alike)[own]).sum(1) * n_alike[own]
        positives = (of_class - z[own].square().sum(1)) / n_positives[own] * scale
        del z
    share = by_engine(
        engine, features, None if group is None else whole, scale, positives, weights[own],
        first=first, form="linear", half=half, classes=place.to(zeros.dtype),
        attractions=weights / n_positives,
    )  # fmt: skip
    return of_all_ranks(share, group)


@batch_loss(_check_sup_con, _fused_sup_con, group=None)
def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: Number = 0.1,
    anchors: str = "with_positive",
) -> Tensor:
    """mean_i (1/|P_i|) Σ_{p∈P_i} −log e^{s_ip} / Σ_{j≠i} e^{s_ij}: examples of a class attract.

    s = cos / T between features [N, D], P_i are the others with the label of i. The mean is over
    the `anchors` "with_positive", or over "all", of which those without one add 0. Several views of
    an example are rows of their own. Raises TypeError for what are no features or labels,
    ValueError for shapes that do not match or T ≤ 0.

    Khosla et al., Supervised Contrastive Learning, 2020. arXiv:2004.11362
    """
    n = len(features)
    if n < 2:
        return nothing(features, temperature)
    z = F.normalize(features)
    similarities = z / temperature @ z.mT
    log_sums = own_left_out(similarities).logsumexp(1)
    alike = (labels[:, None] == labels).fill_diagonal_(False)
    n_alike = alike.sum(1)
    losses = log_sums - torch.where(alike, similarities, 0).sum(1) / n_alike.clamp(min=1)
    is_anchor = n_alike > 0
    n_anchors = is_anchor.sum().clamp(min=1) if anchors == "with_positive" else n
    return torch.where(is_anchor, losses, 0).sum() / n_anchors
