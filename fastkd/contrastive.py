"""Contrastive losses: an embedding against its positive key among many negative ones.

In distillation the queries are the student's embeddings and the keys the teacher's. The matrix of
their similarities is never stored: memory grows with N + M, not with N · M. Both sides get
gradients; detach what shall get none. A temperature or a scale may be a number or a 0-dim tensor,
which gets a gradient too. A loss is one number for the batch. All of them take

group  a torch.distributed process group whose ranks hold parts of the batch, of any sizes: the keys
       of all ranks are negatives. Each rank gets the loss of the whole and, times the number of
       ranks, its gradient in the own rows: what DistributedDataParallel averages into that of a
       single process.

An example without negatives has no loss. Half precision is computed in float32 inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _checks, _distributed
from fastkd._engine import Engine, compute_dtype, is_differentiated, without_autocast
from fastkd._loss import batch_loss

Number = float | Tensor


class Problem(NamedTuple):
    """Queries against keys: the arguments that every function of an engine of this family takes.

    With S = scale · Q Kᵀ and all sums without the own pairs the loss is, by its form,

    softplus  Σ_i w_i softplus(n_i − a_i)   n_i = log Σ_j exp S_ij
    linear    Σ_i w_i (n_i − a_i)
    pairs     Σ_i w_i Σ_j softplus(S_ij − a_i)

    and with anchors of keys, in the first two, the same over the columns of those keys besides.
    """

    query: Tensor  # [n, D]
    key: Tensor | None  # [M, D]; None: the queries
    scale: Tensor  # 0-dim
    anchors: Tensor  # a, [n]
    weights: Tensor  # w, [n]
    key_anchors: Tensor | None  # [N], of the first N keys
    key_weights: Tensor | None
    form: str
    first: int  # the own pair of query i is key first + i; -1: it has none
    wanted: str  # of query, key, scale and anchors: what gets a gradient
    group: str  # the name of the process group over whose ranks columns are summed, or nothing

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return compute_dtype(self.query, self.query if self.key is None else self.key)

    def allocate(self) -> tuple[Tensor, Tensor]:
        """Empty: the loss, and all gradients in a row."""
        n_elements = sum(x.numel() for x in self.allocate_gradients())
        loss = self.query.new_empty((), dtype=self.dtype)
        return loss, loss.new_empty(n_elements)

    def allocate_gradients(self) -> tuple[Tensor, ...]:
        """Empty, one for each trained tensor."""
        wanted, nothing = self.wanted.split(), self.query.new_empty(0)
        trained = (self.query, self.key, self.scale, self.anchors)
        return tuple(
            nothing
            if x is None or name not in wanted
            else torch.empty_like(x, memory_format=torch.contiguous_format)
            for name, x in zip(("query", "key", "scale", "anchors"), trained, strict=True)
        )


_engine = Engine(
    "contrastive",
    tensors="Tensor query, Tensor? key, Tensor scale, Tensor anchors, Tensor weights, "
    "Tensor? key_anchors, Tensor? key_weights",
    options="str form, int first, str wanted, str group",
    n_trained=4,
)


def _computed(
    engine: str,
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    anchors: Tensor,
    weights: Tensor,
    *,
    form: str,
    first: int,
    n_columns: int = 0,
    group: Any = None,
) -> Tensor:
    """The loss of the whole batch by an engine; with columns, of the first keys."""
    key_anchors = key_weights = None
    if n_columns:
        key_anchors = anchors.detach()
        if group is not None:
            (key_anchors,), _ = _distributed.gathered([key_anchors], group)
        key_weights = weights.new_full((n_columns,), 0.5 / n_columns)
    trained = {"query": query, "key": key, "scale": scale, "anchors": anchors}
    wanted = [name for name, x in trained.items() if x is not None and is_differentiated(x)]
    loss, _ = _engine(
        engine, query, key, scale, anchors, weights, key_anchors, key_weights, form, first,
        " ".join(wanted), group.group_name if group is not None and n_columns else "",
    )  # fmt: skip
    return loss


def _whole(share: Tensor, group: Any) -> Tensor:
    if group is None:
        return share
    return _distributed.before_averaging(share, _distributed.summed(share, group), group)


def _everyone(rows: Tensor, group: Any) -> tuple[Tensor, int]:
    """The rows of all ranks, with gradients, and the place of the first own one."""
    return (rows, 0) if group is None else _distributed.shared(rows, group)


def _scale(temperature: Number, like: Tensor) -> Tensor:
    return 1 / torch.as_tensor(temperature, dtype=like.dtype, device=like.device)


def _similarities(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.mT


def _own_left_out(similarities: Tensor) -> Tensor:
    own = torch.eye(*similarities.shape, dtype=torch.bool, device=similarities.device)
    return similarities.masked_fill(own, -torch.inf)


def _nothing(*tensors: Any) -> Tensor:
    """The loss of no examples, on the graph of all that is trained."""
    dtype = compute_dtype(*(x for x in tensors[:2] if isinstance(x, Tensor)))
    parts = [x.to(dtype).sum() * 0 for x in tensors if isinstance(x, Tensor)]
    return torch.stack(parts).sum()


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp x), with the slope of the definition everywhere."""
    return -F.logsigmoid(-x)


# ----------------------------------------------------------------------------------------- InfoNCE


def _check_info_nce(
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
    group: Any,
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


def _fused_info_nce(
    formula: Callable[..., Tensor],
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
    group: Any,
) -> Tensor:
    dtype = compute_dtype(query, key)
    query, key = query.to(dtype), key.to(dtype)
    bank = query[:0] if negatives is None else negatives.to(dtype)
    with without_autocast(query.device):
        if engine == "formula":
            query, key = _everyone(query, group)[0], _everyone(key, group)[0]
            return formula(
                query, key, bank, temperature=temperature, negative_weight=negative_weight,
                normalize=normalize, symmetric=symmetric, margin=margin, decoupled=decoupled,
                in_batch_negatives=in_batch_negatives,
            )  # fmt: skip
        if normalize:
            query, key, bank = F.normalize(query), F.normalize(key), F.normalize(bank)
        keys, first = _everyone(key, group)
        n = len(keys)
        if not n or not len(bank) + (n - 1 if in_batch_negatives else 0):
            return _nothing(query, key, bank, temperature, negative_weight, margin)
        scale = _scale(temperature, query)
        anchors = ((query * key).sum(1) - margin) * scale - _log(negative_weight)
        if not in_batch_negatives:
            keys, first = bank, -1
        elif len(bank):
            keys = torch.cat([keys, bank])
        weights = query.new_full((len(query),), (0.5 if symmetric else 1) / n)
        share = _computed(
            engine, query, keys, scale, anchors, weights, first=first, group=group,
            form="linear" if decoupled else "softplus", n_columns=n if symmetric and n > 1 else 0,
        )  # fmt: skip
        return _whole(share, group)


def _log(number: Number) -> Number:
    return number.log() if isinstance(number, Tensor) else math.log(number)


@batch_loss(_check_info_nce, _fused_info_nce, has_kernels=False, group=None)
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
    similarities = _similarities(query, key) / temperature
    positive = similarities.diagonal() - margin / temperature
    others = _own_left_out(similarities) if in_batch_negatives else similarities[:, :0]
    bank = [] if negatives is None else [_similarities(query, negatives) / temperature]
    n_others = len(query) - 1 if in_batch_negatives else 0
    if not len(query) or not n_others + sum(x.shape[1] for x in bank):
        return _nothing(query, key, *bank, temperature, negative_weight, margin)

    def against(negative: Tensor) -> Tensor:
        odds = negative + _log(negative_weight) - positive
        return (odds if decoupled else softplus(odds)).mean()

    loss = against(torch.cat([others, *bank], 1).logsumexp(1))
    if not symmetric:
        return loss
    return (loss + against(others.logsumexp(0)) if len(query) > 1 else loss) / 2


# ---------------------------------------------------------------------- images against their texts


def _check_clip(
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = None,
    *,
    group: Any,
) -> None:
    _checks.matrices(image=image, text=text)
    _checks.same_examples(image=image, text=text)
    _checks.number(logit_scale=logit_scale)
    if logit_bias is not None:
        _checks.number(logit_bias=logit_bias)
    _checks.process_group(group)


def _fused_clip(
    formula: Callable[..., Tensor],
    engine: str,
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = None,
    *,
    group: Any,
) -> Tensor:
    dtype = compute_dtype(image, text)
    image, text = image.to(dtype), text.to(dtype)
    with without_autocast(image.device):
        if engine == "formula":
            pair = _everyone(image, group)[0], _everyone(text, group)[0]
            return formula(*pair, logit_scale, logit_bias)
        keys, first = _everyone(text, group)
        n = len(keys)
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=image.device)
        bias = (
            image.new_zeros(())
            if logit_bias is None
            else torch.as_tensor(logit_bias, dtype=dtype, device=image.device)
        )
        if formula.__name__ == "siglip":
            if not n:
                return _nothing(image, text, scale, bias)
            own = (image * text).sum(1) * scale + bias
            weights = image.new_full((len(image),), 1 / n)
            share = softplus(-own).sum() / n + _computed(
                engine, image, keys, scale, -bias.expand(len(image)), weights,
                first=first, form="pairs",
            )  # fmt: skip
            return _whole(share, group)
        if n < 2:
            return _nothing(image, text, scale, bias)
        weights = image.new_full((len(image),), 0.5 / n)
        share = _computed(
            engine, image, keys, scale, (image * text).sum(1) * scale, weights,
            first=first, form="softplus", n_columns=n, group=group,
        )  # fmt: skip
        return _whole(share + 0 * bias, group)  # which cancels


@batch_loss(_check_clip, _fused_clip, has_kernels=False, group=None)
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
        return _nothing(image, text, logit_scale, logit_bias)
    logits = logit_scale * _similarities(image, text)
    if logit_bias is not None:
        logits = logits + logit_bias
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2


@batch_loss(_check_clip, _fused_clip, has_kernels=False, group=None)
def siglip(image: Tensor, text: Tensor, logit_scale: Number, logit_bias: Number) -> Tensor:
    """(1/N) Σ_ij softplus(−y_ij (scale · ⟨image_i, text_j⟩ + bias)): each pair by itself.

    y is 1 for the own pairs i = j, −1 for others. Embeddings [N, D], already normalised; gradients
    to the scale, which is not a logarithm, and to the bias too. Raises TypeError for what is no
    embedding, ValueError for shapes that do not match.

    Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023. arXiv:2303.15343
    """
    if not len(image):
        return _nothing(image, text, logit_scale, logit_bias)
    logits = logit_scale * _similarities(image, text) + logit_bias
    signs = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    return softplus(-signs * logits).sum() / len(image)


# --------------------------------------------------------------------------- examples of one kind


def _check_nt_xent(view1: Tensor, view2: Tensor, *, temperature: Number, group: Any) -> None:
    _checks.matrices(view1=view1, view2=view2)
    _checks.same_examples(view1=view1, view2=view2)
    _checks.number(temperature=temperature, above=0)
    _checks.process_group(group)


def _fused_nt_xent(
    formula: Callable[..., Tensor],
    engine: str,
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: Number,
    group: Any,
) -> Tensor:
    dtype = compute_dtype(view1, view2)
    view1, view2 = view1.to(dtype), view2.to(dtype)
    with without_autocast(view1.device):
        if engine == "formula":
            pair = _everyone(view1, group)[0], _everyone(view2, group)[0]
            return formula(*pair, temperature=temperature)
        view1, view2 = F.normalize(view1), F.normalize(view2)
        both = torch.cat([view1, view2])
        everyone, first = _everyone(both, group)
        if not len(everyone):
            return _nothing(view1, view2, temperature)
        scale = _scale(temperature, both)
        positives = ((view1 * view2).sum(1) * scale).repeat(2)
        weights = both.new_full((len(both),), 1 / len(everyone))
        share = _computed(
            engine, both, None if group is None else everyone, scale, positives, weights,
            first=first, form="linear",
        )  # fmt: skip
        return _whole(share, group)


@batch_loss(_check_nt_xent, _fused_nt_xent, has_kernels=False, group=None)
def nt_xent(view1: Tensor, view2: Tensor, *, temperature: Number = 0.5) -> Tensor:
    """(1/2N) Σ_i −log e^{s_i₊} / Σ_{j≠i} e^{s_ij}: of 2N views each finds the other one.

    s = cos / T between all views of both kinds, [N, D] each; s₊ is that with the other view of the
    same example. Raises TypeError for what is no embedding, ValueError for shapes that do not
    match or T ≤ 0.

    Chen et al., A Simple Framework for Contrastive Learning (SimCLR), 2020. arXiv:2002.05709
    """
    n = len(view1)
    if not n:
        return _nothing(view1, view2, temperature)
    views = F.normalize(torch.cat([view1, view2]))
    logits = _own_left_out(_similarities(views, views) / temperature)
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


def _fused_sup_con(
    formula: Callable[..., Tensor],
    engine: str,
    features: Tensor,
    labels: Tensor,
    *,
    temperature: Number,
    anchors: str,
    group: Any,
) -> Tensor:
    features = features.to(compute_dtype(features, features))
    with without_autocast(features.device):
        all_labels, n_own = labels, len(features)
        if group is not None:
            (all_labels,), _ = _distributed.gathered([labels], group)
        if engine == "formula":
            everyone, _ = _everyone(features, group)
            return formula(everyone, all_labels, temperature=temperature, anchors=anchors)
        features = F.normalize(features)
        everyone, first = _everyone(features, group)
        if len(everyone) < 2:
            return _nothing(features, temperature)
        scale = _scale(temperature, features)
        place, own = _places(all_labels), slice(first, first + n_own)
        sums = torch.zeros_like(everyone).index_add(0, place, everyone)
        n_alike = torch.zeros_like(all_labels, dtype=features.dtype)
        n_alike = n_alike.index_add(0, place, torch.ones_like(n_alike))[place] - 1
        # the positives are those of the own class, without oneself
        alike = (features * (sums[place[own]] - features)).sum(1)
        alike = alike * scale / n_alike[own].clamp(min=1)
        is_anchor = n_alike > 0
        n_anchors = is_anchor.sum().clamp(min=1) if anchors == "with_positive" else len(everyone)
        weights = is_anchor[own].to(features.dtype) / n_anchors
        share = _computed(
            engine, features, None if group is None else everyone, scale, alike,
            weights, first=first, form="linear",
        )  # fmt: skip
        return _whole(share, group)


def _places(labels: Tensor) -> Tensor:
    """Classes numbered from 0, without waiting for their number."""
    ordered, order = labels.sort()
    is_new = ordered != ordered.roll(1)
    is_new[:1] = False
    return is_new.cumsum(0)[order.argsort()]


@batch_loss(_check_sup_con, _fused_sup_con, has_kernels=False, group=None)
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
        return _nothing(features, temperature)
    z = F.normalize(features)
    similarities = _similarities(z, z) / temperature
    log_sums = _own_left_out(similarities).logsumexp(1)
    alike = (labels[:, None] == labels).fill_diagonal_(False)
    n_alike = alike.sum(1)
    losses = log_sums - torch.where(alike, similarities, 0).sum(1) / n_alike.clamp(min=1)
    is_anchor = n_alike > 0
    n_anchors = is_anchor.sum().clamp(min=1) if anchors == "with_positive" else n
    return torch.where(is_anchor, losses, 0).sum() / n_anchors
