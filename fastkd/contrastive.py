"""Contrastive losses, and the divergence of two networks' similarities.

An embedding is compared with its positive key among many negative ones, or with a distribution over
keys. In contrastive distillation the queries are the student's embeddings and the keys the
teacher's. The matrix of similarities is not stored, unless a chunk of memory holds it: memory grows
with N + M, not with N · M.

Both sides of a contrastive loss get gradients; detach the side that must get none. A temperature or
a scale may be a number or a 0-dim tensor, which gets a gradient too. A loss is one number for the
batch, and an example without negatives has no loss. Half precision is computed in float32 inside,
and its gradient comes back in half.

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
from fastkd.problems import _contrasts as contrasts
from fastkd.problems._contrasts import is_number, logarithm, zero_loss


@loss(contrasts.check_info_nce, contrasts.info_nce, same_on_ranks=("negatives",))
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
    group: Any = None,
) -> Tensor:
    """Compute InfoNCE: each query finds its own key among the keys of the other examples.

    The loss is (1/N) Σ_i −log e^{s₊} / (e^{s₊} + λ Σ e^{s₋}) with the positive logit
    s₊ = (cos(q_i, k_i) − margin) / T and the negative ones s₋ = cos(q_i, k_j) / T, j ≠ i.

    Args:
        query: Embeddings [N, D], for example the student's. They get a gradient.
        key: Embeddings [N, D]; key i is the positive one of query i. They get a gradient.
        negatives: A bank of further negative keys [M, D], the same on all ranks, for example a
            queue of earlier keys or hard negatives. It gets a gradient if it requires one.
        temperature: T > 0, a number or a 0-dim tensor.
        negative_weight: λ > 0, a number or a 0-dim tensor.
        normalize: Whether embeddings are divided by their lengths; otherwise cos is their product.
        symmetric: Whether the loss is the mean with that of keys which find their queries. A bank
            has negatives for the queries alone.
        margin: Subtracted from the positive similarity, a number or a 0-dim tensor.
        decoupled: Whether e^{s₊} is missing in the denominator.
        in_batch_negatives: Whether the keys of other examples are negatives. Without them the bank
            has all negatives.
        group: A process group whose ranks hold parts of the batch; see the module's text.

    Returns:
        A scalar, the mean over the examples of all ranks; float64 if an input is, else float32.

    Raises:
        TypeError: An argument is no floating-point tensor, or an option has an unknown name.
        ValueError: Shapes do not match, T or λ is not above 0, or `in_batch_negatives=False` has
            no bank or comes with `symmetric=True`.

    Reference:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018.
        arXiv:1807.03748; decoupled: Yeh et al., Decoupled Contrastive Learning, 2022.
        arXiv:2110.06848; a bank: He et al., Momentum Contrast, 2020. arXiv:1911.05722
    """
    if normalize:
        query, key = F.normalize(query), F.normalize(key)
        negatives = None if negatives is None else F.normalize(negatives)
    query = query / temperature
    bank = [] if negatives is None else [query @ negatives.mT]
    n_negatives = len(query) - 1 if in_batch_negatives else 0
    if not len(query) or not n_negatives + sum(x.shape[1] for x in bank):
        return zero_loss(query, key, *bank, temperature, negative_weight, margin)

    logits = query @ key.mT if in_batch_negatives else (query * key).sum(1, keepdim=True)
    positive = logits.diagonal() if in_batch_negatives else logits[:, 0]
    if decoupled or not (is_number(margin, 0) and is_number(negative_weight, 1)):
        # a softmax ignores a constant, so that λ may as well divide the positive exponential
        positive = positive - margin / temperature
        positive = positive - logarithm(negative_weight, positive)
        own_logit = positive - torch.inf if decoupled else positive
        logits = logits.diagonal_scatter(own_logit) if in_batch_negatives else own_logit[:, None]

    def against(logits: Tensor, own: Tensor) -> Tensor:
        if decoupled:
            return (logits.logsumexp(1) - positive).mean()
        return F.cross_entropy(logits, own)

    own = torch.arange(len(query), device=query.device)
    own = own if in_batch_negatives else 0 * own
    loss = against(torch.cat([logits, *bank], 1) if bank else logits, own)
    if not symmetric:
        return loss
    return (loss + against(logits.mT, own) if len(query) > 1 else loss) / 2


@loss(contrasts.check_clip_contrastive, contrasts.clip_contrastive)
def clip_contrastive(
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = None,
    *,
    group: Any = None,
) -> Tensor:
    """Compute CLIP's loss, ½ (CE of rows + CE of columns): images and texts find each other.

    The logits are logit_scale · image · textᵀ + logit_bias, and the class of row i is i.

    Args:
        image: Embeddings [N, D], already normalised. They get a gradient.
        text: Embeddings [N, D], already normalised; text i belongs to image i. They get a gradient.
        logit_scale: Multiplies the products; not its logarithm. A number or a 0-dim tensor.
        logit_bias: A number or a 0-dim tensor. It cancels, so that its gradient is 0.
        group: A process group whose ranks hold parts of the batch; see the module's text.

    Returns:
        A scalar, the mean over the examples of all ranks; float64 if an input is, else float32.

    Raises:
        TypeError: An embedding is no floating-point tensor, or an option has an unknown name.
        ValueError: Shapes do not match, or a number is not finite.

    Reference:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
        arXiv:2103.00020
    """
    if not len(image):
        return zero_loss(image, text, logit_scale, logit_bias)
    logits = logit_scale * image @ text.mT
    if logit_bias is not None:
        logits = logits + logit_bias
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2


@loss(contrasts.check_siglip, contrasts.siglip)
def siglip(
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    logit_bias: Number,
    *,
    group: Any = None,
) -> Tensor:
    """Compute SigLIP's loss, which decides for each pair by itself whether the two belong together.

    The loss is (1/N) Σ_ij softplus(−y_ij (logit_scale · ⟨image_i, text_j⟩ + logit_bias)), where
    y_ij is 1 for i = j and −1 otherwise.

    Args:
        image: Embeddings [N, D], already normalised. They get a gradient.
        text: Embeddings [N, D], already normalised; text i belongs to image i. They get a gradient.
        logit_scale: Multiplies the products; not its logarithm. A number or a 0-dim tensor.
        logit_bias: Added to the products. A number or a 0-dim tensor.
        group: A process group whose ranks hold parts of the batch; see the module's text.

    Returns:
        A scalar, the mean over the examples of all ranks; float64 if an input is, else float32.

    Raises:
        TypeError: An embedding is no floating-point tensor, or an option has an unknown name.
        ValueError: Shapes do not match, or a number is not finite.

    Reference:
        Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023. arXiv:2303.15343
    """
    if not len(image):
        return zero_loss(image, text, logit_scale, logit_bias)
    logits = logit_scale * image @ text.mT + logit_bias
    signs = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


@loss(contrasts.check_nt_xent, contrasts.nt_xent)
def nt_xent(
    view1: Tensor, view2: Tensor, *, temperature: Number = 0.5, group: Any = None
) -> Tensor:
    """Compute NT-Xent (SimCLR): each of 2N views finds the other view of its example.

    The loss is (1/2N) Σ_i −log e^{s_i₊} / Σ_{j≠i} e^{s_ij} with s = cos / T between all views, and
    s_i₊ between view i and the other view of the same example.

    Args:
        view1: Embeddings [N, D]. They get a gradient.
        view2: Embeddings [N, D] of other views of the same examples. They get a gradient.
        temperature: T > 0, a number or a 0-dim tensor.
        group: A process group whose ranks hold parts of the batch; see the module's text.

    Returns:
        A scalar, the mean over the views of all ranks; float64 if an input is, else float32.

    Raises:
        TypeError: An embedding is no floating-point tensor, or an option has an unknown name.
        ValueError: Shapes do not match, or T is not above 0.

    Reference:
        Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020.
        arXiv:2002.05709
    """
    n = len(view1)
    if not n:
        return zero_loss(view1, view2, temperature)
    views = F.normalize(torch.cat([view1, view2]))
    logits = _without_own_pairs(views / temperature @ views.mT)
    other = torch.arange(2 * n, device=views.device).roll(n)
    return F.cross_entropy(logits, other)


@loss(contrasts.check_sup_con, contrasts.sup_con)
def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: Number = 0.1,
    anchors: str = "with_positive",
    group: Any = None,
) -> Tensor:
    """Compute the supervised contrastive loss: examples of one class attract each other.

    The loss is mean_i (1/|P_i|) Σ_{p∈P_i} −log e^{s_ip} / Σ_{j≠i} e^{s_ij} with s = cos / T, where
    the positives P_i are the other examples with the label of anchor i.

    Args:
        features: Embeddings [N, D]. Several views of an example are rows of their own. They get a
            gradient.
        labels: Classes [N], whole numbers of any value.
        temperature: T > 0, a number or a 0-dim tensor.
        anchors: What the mean is over: the anchors "with_positive", or "all" examples, of which
            those without a positive add 0.
        group: A process group whose ranks hold parts of the batch; see the module's text.

    Returns:
        A scalar, the mean over the anchors of all ranks; float64 if the features are, else float32.

    Raises:
        TypeError: The features are no floating-point tensor, the labels no classes, or an option
            has an unknown name.
        ValueError: Shapes do not match, T is not above 0, or `anchors` is unknown.

    Reference:
        Khosla et al., Supervised Contrastive Learning, 2020. arXiv:2004.11362
    """
    n = len(features)
    if n < 2:
        return zero_loss(features, temperature)
    z = F.normalize(features)
    similarities = z / temperature @ z.mT
    log_sums = _without_own_pairs(similarities).logsumexp(1)
    alike = (labels[:, None] == labels).fill_diagonal_(False)
    n_alike = alike.sum(1)
    losses = log_sums - torch.where(alike, similarities, 0).sum(1) / n_alike.clamp(min=1)
    is_anchor = n_alike > 0
    n_anchors = is_anchor.sum().clamp(min=1) if anchors == "with_positive" else n
    return torch.where(is_anchor, losses, 0).sum() / n_anchors


@loss(contrasts.check_similarity_kl, contrasts.similarity_kl)
def similarity_kl(
    student: Tensor,
    teacher: Tensor,
    student_keys: Tensor | None = None,
    teacher_keys: Tensor | None = None,
    *,
    student_temperature: Number = 0.07,
    teacher_temperature: Number = 0.07,
    symmetric: bool = False,
    mask_self: bool = False,
    group: Any = None,
) -> Tensor:
    """Compute (1/N) Σ_i KL(softmax_j t_ij ‖ softmax_j s_ij): the teacher's similarities as targets.

    s and t are the cosines over a temperature in the student and in the teacher, between queries
    and keys or, without keys, of the queries among each other.

    Args:
        student: Embeddings [N, D] of the queries by the student. They get a gradient.
        teacher: Embeddings [N, D'] of the same queries by the teacher, a constant.
        student_keys: Embeddings [M, D] of keys by the student. They get a gradient.
        teacher_keys: Embeddings [M, D'] of the same keys by the teacher, a constant.
        student_temperature: Above 0, a number or a 0-dim tensor, which may get a gradient.
        teacher_temperature: Above 0, a number or a 0-dim tensor, a constant.
        symmetric: Whether the loss is the mean with the divergence of the columns, which with keys
            are distributions over the queries.
        mask_self: Whether key i is masked for query i.
        group: A process group whose ranks hold parts of the queries and of the keys; see the
            module's text.

    Returns:
        A scalar, the mean over the queries of all ranks; float64 if an input is, else float32.

    Raises:
        TypeError: An embedding is no floating-point tensor, or an option has an unknown name.
        ValueError: Shapes do not match, a temperature is not above 0, only one network has keys, or
            `mask_self` meets another number of keys than of queries.

    Reference:
        Fang et al., SEED: Self-supervised Distillation For Visual Representation, 2021.
        arXiv:2101.04731; Yang et al., CLIP-KD: An Empirical Study of CLIP Model Distillation, 2024.
        arXiv:2307.12732
    """
    queries = F.normalize(student), F.normalize(teacher)
    keys = (
        queries[0] if student_keys is None else F.normalize(student_keys),
        queries[1] if teacher_keys is None else F.normalize(teacher_keys),
    )
    temperatures = student_temperature, teacher_temperature
    s, t = (q / T @ k.mT for q, k, T in zip(queries, keys, temperatures, strict=True))
    if not s.shape[0] or s.shape[1] - mask_self < 1:
        return s.sum() * 0
    own = torch.eye(*s.shape, dtype=torch.bool, device=s.device) & mask_self
    s, t = s.masked_fill(own, -torch.inf), t.masked_fill(own, -torch.inf)

    def divergence(dim: int) -> Tensor:
        log_p, log_q = t.log_softmax(dim), s.log_softmax(dim)
        terms = log_p.exp() * (log_p - log_q)
        return terms.masked_fill(own, 0).sum(dim).mean()

    return (divergence(1) + divergence(0)) / 2 if symmetric else divergence(1)


def _without_own_pairs(similarities: Tensor) -> Tensor:
    own = torch.eye(*similarities.shape, dtype=torch.bool, device=similarities.device)
    return similarities.masked_fill(own, -torch.inf)
