"""Contrastive losses, and the divergence of two networks' similarities.

An embedding is compared with its positive key among many negative ones, or with a distribution over
keys. In contrastive distillation the queries are the student's embeddings and the keys the
teacher's. The matrix of similarities is not stored, unless a chunk of memory holds it: memory grows
with N + M, not with N · M.

Both sides of a contrastive loss get gradients; detach the side that must get none. A temperature or
a scale may be a number or a 0-dim tensor, which gets a gradient too. An example without negatives
has no loss, and one of zeros, which has no direction, gets the gradient 0. Half precision is
computed in float32 inside, and its gradient comes back in half.

All losses take `weights` and `reduction`. A weight multiplies the loss of its example: one of
weight 0 has none, but its embeddings are still compared with the others, so that a NaN in them
shows. `reduction="none"` is computed by the formula, with the matrix of similarities in memory, and
so are few options, which say so.

All losses take `group`, a process group of torch.distributed whose ranks hold parts of the batch,
of any sizes, or "world" for all ranks. The keys of all ranks are then negatives (all-gather). Each
rank gets the loss of the whole batch and, multiplied by the number of ranks, its gradient in this
rank's embeddings: DistributedDataParallel averages these into the gradient of one process with the
whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._loss import loss
from fastkd._op import Number
from fastkd._reduction import reduce
from fastkd.problems import _contrast_checks as checks
from fastkd.problems import _contrasts as contrasts
from fastkd.problems._embeddings import is_number, logarithm
from fastkd.problems.pairs import IGNORED, directions


@loss(checks.check_info_nce, contrasts.info_nce, same_on_ranks=("negatives",))
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    false_negatives: Tensor | None = None,
    *,
    temperature: Number = 0.07,
    negative_weight: Number = 1.0,
    normalize: bool = True,
    symmetric: bool = False,
    margin: Number = 0.0,
    decoupled: bool = False,
    in_batch_negatives: bool = True,
    weights: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
) -> Tensor:
    """Compute InfoNCE: each query finds its own key among the keys of the other examples.

    The loss is (1/N) Σ_i −log e^{s₊} / (e^{s₊} + λ Σ e^{s₋}) with the positive logit
    s₊ = (cos(q_i, k_i) − margin) / T and the negative ones s₋ = cos(q_i, k_j) / T, j ≠ i.

    The formula computes `false_negatives` that come with `decoupled`, and negatives of each query
    that come with `symmetric` or without those of the batch.

    Args:
        query: Embeddings [N, D], for example the student's. They get a gradient.
        key: Embeddings [N, D]; key i is the positive one of query i. They get a gradient.
        negatives: A bank of further negative keys [M, D], the same on all ranks, for example a
            queue of earlier keys or hard negatives, or [N, M, D]: M negatives of each query alone.
            They get a gradient if they require one.
        false_negatives: A mask of torch.bool, True for pairs that are masked, for example those of
            one class. It has a row for each query, and a column for each key of the batch, with a
            `group` of all ranks, if these are negatives, and then for each of `negatives`. The
            positive pair is never masked.
        temperature: T > 0, a number or a 0-dim tensor.
        negative_weight: λ > 0, a number or a 0-dim tensor.
        normalize: Whether embeddings are divided by their lengths; otherwise cos is their product.
        symmetric: Whether the loss is the mean with that of keys which find their queries. A bank
            has negatives for the queries alone.
        margin: Subtracted from the positive similarity, a number or a 0-dim tensor.
        decoupled: Whether e^{s₊} is missing in the denominator.
        in_batch_negatives: Whether the keys of other examples are negatives. Without them
            `negatives` are all.
        weights: A weight of at least 0 for each example, [N], float or bool; None: all 1. They get
            no gradient.
        reduction: "mean" is Σ w·l / Σ w, "sum" is Σ w·l, and "none" is w·l, which the formula
            computes.
        group: A process group whose ranks hold parts of the batch; see the module's text.

    Returns:
        A scalar, over the examples of all ranks, or one loss for each example [N]; float64 if an
        input is, else float32.

    Raises:
        TypeError: An argument is no floating-point tensor, a mask not of torch.bool, or an option
            has an unknown name.
        ValueError: Shapes do not match, T or λ is not above 0, or `in_batch_negatives=False` has
            no negatives or comes with `symmetric=True`.

    Reference:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018.
        arXiv:1807.03748; decoupled: Yeh et al., Decoupled Contrastive Learning, 2022.
        arXiv:2110.06848; a bank: He et al., Momentum Contrast, 2020. arXiv:1911.05722
    """
    if normalize:
        query, key = directions(query), directions(key)
        negatives = None if negatives is None else directions(negatives)
    query = query / temperature
    logits = query @ key.mT if in_batch_negatives else (query * key).sum(1, keepdim=True)
    further = query[:, :0]
    if negatives is not None:
        of_each = negatives.ndim == 3
        further = (negatives @ query[:, :, None])[..., 0] if of_each else query @ negatives.mT
    if false_negatives is not None:
        n_keys = logits.shape[1] if in_batch_negatives else 0
        checks.check_columns(n_keys + further.shape[1], false_negatives=false_negatives)
        further = further.masked_fill(false_negatives[:, n_keys:], -torch.inf)
        if in_batch_negatives:
            own_pairs = torch.eye(n_keys, dtype=torch.bool, device=query.device)
            logits = logits.masked_fill(false_negatives[:, :n_keys] & ~own_pairs, -torch.inf)
    positive = logits.diagonal() if in_batch_negatives else logits[:, 0]
    if decoupled or not (is_number(margin, 0) and is_number(negative_weight, 1)):
        # a softmax ignores a constant, so that λ may as well divide the positive exponential
        positive = positive - positive.new_ones(()) * margin / temperature
        positive = positive - logarithm(negative_weight, positive)
        own_logit = positive - torch.inf if decoupled else positive
        logits = logits.diagonal_scatter(own_logit) if in_batch_negatives else own_logit[:, None]

    def against(logits: Tensor, own: Tensor) -> Tensor:
        if decoupled:
            return _decoupled(logits, positive)
        return F.cross_entropy(logits, own, reduction="none")

    own = torch.arange(len(query), device=query.device)
    own = own if in_batch_negatives else 0 * own
    losses = against(torch.cat([logits, further], 1), own)
    if symmetric:
        losses = (losses + against(logits.mT, own)) / 2
    return _reduced(losses, weights, reduction)


@loss(checks.check_clip_contrastive, contrasts.clip_contrastive)
def clip_contrastive(
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = None,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
) -> Tensor:
    """Compute CLIP's loss, ½ (CE of rows + CE of columns): images and texts find each other.

    The logits are logit_scale · image · textᵀ + logit_bias, and the class of row i is i. The loss
    of an example is the mean of those of its row and its column.

    Args:
        image: Embeddings [N, D], already normalised. They get a gradient.
        text: Embeddings [N, D], already normalised; text i belongs to image i. They get a gradient.
        logit_scale: Multiplies the products; not its logarithm. A number or a 0-dim tensor.
        logit_bias: A number or a 0-dim tensor. It cancels, so that its gradient is 0.
        weights, reduction: As in `info_nce`.
        group: A process group whose ranks hold parts of the batch; see the module's text.

    Returns:
        A scalar, over the examples of all ranks, or one loss for each example [N]; float64 if an
        input is, else float32.

    Raises:
        TypeError: An embedding is no floating-point tensor, or an option has an unknown name.
        ValueError: Shapes do not match, or a number is not finite.

    Reference:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
        arXiv:2103.00020
    """
    logits, own = logit_scale * image @ text.mT, torch.arange(len(image), device=image.device)
    losses = F.cross_entropy(logits, own, reduction="none")
    losses = (losses + F.cross_entropy(logits.mT, own, reduction="none")) / 2
    if logit_bias is not None:
        # added to all logits it would leave noise, not the gradient 0
        losses = losses + 0 * logit_bias
    return _reduced(losses, weights, reduction)


@loss(checks.check_clip_contrastive, contrasts.siglip)
def siglip(
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = None,
    *,
    negative_only: bool = False,
    weights: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
) -> Tensor:
    """Compute SigLIP's loss, which decides for each pair by itself whether the two belong together.

    The loss is (1/N) Σ_ij softplus(−y_ij (logit_scale · ⟨image_i, text_j⟩ + logit_bias)), where
    y_ij is 1 for i = j and −1 otherwise. The loss of example i is that of its image with all texts.

    Args:
        image: Embeddings [N, D], already normalised. They get a gradient.
        text: Embeddings [N, D], already normalised; text i belongs to image i. They get a gradient.
        logit_scale: Multiplies the products; not its logarithm. A number or a 0-dim tensor.
        logit_bias: Added to the products. A number or a 0-dim tensor; None: 0.
        negative_only: Whether no pair belongs together, as with the texts of another process.
        weights, reduction: As in `info_nce`.
        group: A process group whose ranks hold parts of the batch; see the module's text.

    Returns:
        A scalar, over the images of all ranks, or one loss for each image [N]; float64 if an input
        is, else float32.

    Raises:
        TypeError: An embedding is no floating-point tensor, or an option has an unknown name.
        ValueError: Shapes do not match, or a number is not finite.

    Reference:
        Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023. arXiv:2303.15343
    """
    logits = logit_scale * image @ text.mT + (0.0 if logit_bias is None else logit_bias)
    belong = torch.eye(len(image), dtype=logits.dtype, device=logits.device)
    signs = 2 * (0 * belong if negative_only else belong) - 1
    return _reduced(-F.logsigmoid(signs * logits).sum(1), weights, reduction)


@loss(checks.check_nt_xent, contrasts.nt_xent)
def nt_xent(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: Number = 0.5,
    normalize: bool = True,
    decoupled: bool = False,
    weights: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
) -> Tensor:
    """Compute NT-Xent (SimCLR): each of 2N views finds the other view of its example.

    The loss is (1/2N) Σ_i −log e^{s_i₊} / Σ_{j≠i} e^{s_ij} with s = cos / T between all views, and
    s_i₊ between view i and the other view of the same example. The loss of an example is the mean
    of those of its two views.

    Args:
        view1: Embeddings [N, D]. They get a gradient.
        view2: Embeddings [N, D] of other views of the same examples. They get a gradient.
        temperature: T > 0, a number or a 0-dim tensor.
        normalize: Whether embeddings are divided by their lengths; otherwise cos is their product.
        decoupled: Whether e^{s_i₊} is missing in the denominator.
        weights, reduction: As in `info_nce`.
        group: A process group whose ranks hold parts of the batch; see the module's text.

    Returns:
        A scalar, over the views of all ranks, or one loss for each example [N]; float64 if an input
        is, else float32.

    Raises:
        TypeError: An embedding is no floating-point tensor, or an option has an unknown name.
        ValueError: Shapes do not match, or T is not above 0.

    Reference:
        Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020.
        arXiv:2002.05709; decoupled: Yeh et al., Decoupled Contrastive Learning, 2022.
        arXiv:2110.06848
    """
    n, views = len(view1), torch.cat([view1, view2])
    views = directions(views) if normalize else views
    logits = _without_own_pairs(views / temperature @ views.mT)
    other = torch.arange(2 * n, device=views.device).roll(n)
    if decoupled:
        place = other[:, None]
        negatives = logits.scatter(1, place, -torch.inf)
        losses = _decoupled(negatives, logits.gather(1, place)[:, 0])
    else:
        losses = F.cross_entropy(logits, other, reduction="none")
    return _reduced(losses.view(2, n).mean(0), weights, reduction)


@loss(checks.check_sup_con, contrasts.sup_con)
def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    positives: Tensor | None = None,
    *,
    temperature: Number = 0.1,
    base_temperature: Number | None = None,
    normalize: bool = True,
    anchors: str = "with_positive",
    weights: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
) -> Tensor:
    """Compute the supervised contrastive loss: examples of one class attract each other.

    The loss is mean_i (1/|P_i|) Σ_{p∈P_i} −log e^{s_ip} / Σ_{j≠i} e^{s_ij} with s = cos / T, where
    the positives P_i are the other examples with the label of anchor i. With keys j is one of them
    instead of the other examples.

    Args:
        features: Embeddings [N, D], or [N, views, D] of several views of each example, all of which
            are anchors with the label of their example. They get a gradient.
        labels: Classes [N], whole numbers of any value. An example of the label −100 has no class:
            it has no loss and is no positive of any other, but it is a negative of all others.
        keys: Embeddings [M, D] with which the features are compared, instead of among each other.
            They get a gradient if they require one.
        key_labels: Classes [M] of the keys; none is positive with the label −100.
        positives: Instead of labels: a mask of torch.bool, [N, M] with keys and [N, N] without,
            True where the key has the class of the example. A view is no positive of itself. With a
            `group` the columns are those of all ranks. The formula computes it.
        temperature: T > 0, a number or a 0-dim tensor.
        base_temperature: If given, the loss is multiplied by T / base_temperature, as in the
            authors' code, where it is 0.07.
        normalize: Whether embeddings are divided by their lengths; otherwise cos is their product.
        anchors: What the mean is over: the anchors "with_positive", or "all" examples, of which
            those without a positive add 0.
        weights: A weight of at least 0 for each anchor, [N] or [N, views]; None: all 1. They get
            no gradient.
        reduction: As in `info_nce`.
        group: A process group whose ranks hold parts of the batch and of the keys; see the module's
            text.

    Returns:
        A scalar, over the anchors of all ranks, or one loss for each anchor, [N] or [N, views];
        float64 if the features are, else float32.

    Raises:
        TypeError: The features are no floating-point tensor, the labels no classes, or an option
            has an unknown name.
        ValueError: Shapes do not match, T is not above 0, `anchors` is unknown, or there are
            neither labels nor positives, both, or keys without classes.

    Reference:
        Khosla et al., Supervised Contrastive Learning, 2020. arXiv:2004.11362
    """
    z = features.flatten(0, -2)
    n_views = features.shape[1] if features.ndim == 3 else 1
    of_keys = z if keys is None else keys
    if normalize:
        z, of_keys = directions(z), directions(of_keys)
    similarities = z / temperature @ of_keys.mT
    if labels is not None:
        others = labels if key_labels is None else key_labels
        positives = (labels[:, None] == others) & (labels != IGNORED)[:, None]
    assert positives is not None
    checks.check_columns(len(features if keys is None else keys), positives=positives)
    alike = positives.repeat_interleave(n_views, 0)
    logits = similarities
    if keys is None:
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)
        alike = alike.repeat_interleave(n_views, 1) & ~own  # in place it could not be compiled
        logits = similarities.masked_fill(own, -torch.inf)
    n_alike = alike.sum(1)
    is_anchor = n_alike > 0
    # selected before, because the log-sum-exp of no key has the gradient NaN
    log_sums = logits.masked_fill(~is_anchor[:, None], 0).logsumexp(1)
    losses = log_sums - torch.where(alike, similarities, 0).sum(1) / n_alike.clamp(min=1)
    losses = torch.where(is_anchor, _not_below_0(losses), 0).view(features.shape[:-1])
    if anchors == "with_positive":
        n_anchors = is_anchor.view_as(losses).to(losses.dtype)
        weights = n_anchors if weights is None else n_anchors * weights
    if base_temperature is not None:
        losses = losses * temperature / base_temperature
    return _reduced(losses, weights, reduction)


@loss(checks.check_similarity_kl, contrasts.similarity_kl)
def similarity_kl(
    student: Tensor,
    teacher: Tensor,
    student_keys: Tensor | None = None,
    teacher_keys: Tensor | None = None,
    *,
    student_temperature: Number = 0.07,
    teacher_temperature: Number = 0.07,
    form: str = "kl",
    normalize: bool = True,
    symmetric: bool = False,
    mask_self: bool = False,
    weights: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
) -> Tensor:
    """Compute (1/N) Σ_i KL(softmax_j t_ij ‖ softmax_j s_ij): the teacher's similarities as targets.

    s and t are the cosines over a temperature in the student and in the teacher, between queries
    and keys or, without keys, of the queries among each other. With `symmetric` and keys the loss
    takes no weights, because that of the columns is one of the keys.

    Args:
        student: Embeddings [N, D] of the queries by the student. They get a gradient.
        teacher: Embeddings [N, D'] of the same queries by the teacher, a constant.
        student_keys: Embeddings [M, D] of keys by the student. They get a gradient.
        teacher_keys: Embeddings [M, D'] of the same keys by the teacher, a constant.
        student_temperature: Above 0, a number or a 0-dim tensor, which may get a gradient.
        teacher_temperature: Above 0, a number or a 0-dim tensor, a constant.
        form: "kl", or "cross_entropy": −Σ_j p_ij log q_ij, which has the same gradient and is
            larger by the teacher's entropy.
        normalize: Whether embeddings are divided by their lengths; otherwise s and t are their
            products over a temperature.
        symmetric: Whether the loss is the mean with the divergence of the columns, which with keys
            are distributions over the queries.
        mask_self: Whether key i is masked for query i.
        weights, reduction: As in `info_nce`.
        group: A process group whose ranks hold parts of the queries and of the keys; see the
            module's text.

    Returns:
        A scalar, over the queries of all ranks, or one loss for each query [N]; float64 if an input
        is, else float32.

    Raises:
        TypeError: An embedding is no floating-point tensor, or an option has an unknown name.
        ValueError: Shapes do not match, a temperature is not above 0, `form` is unknown, only one
            network has keys, `mask_self` meets another number of keys than of queries, or weights
            meet `symmetric` and keys.

    Reference:
        Fang et al., SEED: Self-supervised Distillation For Visual Representation, 2021.
        arXiv:2101.04731; Yang et al., CLIP-KD: An Empirical Study of CLIP Model Distillation, 2024.
        arXiv:2307.12732
    """

    def similarities(query: Tensor, keys: Tensor | None, temperature: Number) -> Tensor:
        keys = query if keys is None else keys
        if normalize:
            query, keys = directions(query), directions(keys)
        return query / temperature @ keys.mT

    s = similarities(student, student_keys, student_temperature)
    t = similarities(teacher, teacher_keys, teacher_temperature)
    if not s.shape[0] or s.shape[1] - mask_self < 1:
        return _reduced(s.sum(1) * 0, weights, reduction)
    own = torch.eye(*s.shape, dtype=torch.bool, device=s.device) & mask_self
    s, t = s.masked_fill(own, -torch.inf), t.masked_fill(own, -torch.inf)

    def divergences(dim: int) -> Tensor:
        log_p, log_q = t.log_softmax(dim), s.log_softmax(dim)
        terms = log_p.exp() * (log_p - log_q if form == "kl" else -log_q)
        return _not_below_0(terms.masked_fill(own, 0).sum(dim))

    if symmetric and student_keys is not None:
        return (divergences(1).mean() + divergences(0).mean()) / 2
    # the columns of the queries among each other are their rows
    return _reduced(divergences(1), weights, reduction)


def _without_own_pairs(similarities: Tensor) -> Tensor:
    own = torch.eye(*similarities.shape, dtype=torch.bool, device=similarities.device)
    return similarities.masked_fill(own, -torch.inf)


def _reduced(losses: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    weights = None if weights is None else weights.detach()  # because engines give them no gradient
    return reduce(losses, weights, None, None, reduction)


def _not_below_0(losses: Tensor) -> Tensor:
    """Return losses, 0 where rounding made one negative, with the gradient that they have."""
    return losses + (losses.relu() - losses).detach()


def _decoupled(negatives: Tensor, positive: Tensor) -> Tensor:
    """Return the log-sum-exps of rows less the positive logits; 0 for a row without negatives."""
    alone = negatives.isneginf().all(1)
    # selected before, because the log-sum-exp of no negative has the gradient NaN
    log_sums = negatives.masked_fill(alone[:, None], 0).logsumexp(1)
    return (log_sums - positive).masked_fill(alone, 0)
