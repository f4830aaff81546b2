"""How the contrastive losses, and the divergence of similarities, are stated as pairs.

An engine returns the loss of a batch, and has made its gradients by then. A statement therefore
returns NotImplemented, so that the formula is computed, where the losses of examples are asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd._loss import Call
from fastkd._op import is_differentiated
from fastkd._precision import compute_dtype
from fastkd.problems._contrast_checks import check_columns
from fastkd.problems._embeddings import (
    apart,
    cosines,
    half_of,
    in_compute_dtype,
    inverse,
    is_number,
    logarithm,
    number_like,
    zero_loss,
)
from fastkd.problems._positives import numbers_of_classes
from fastkd.problems.pairs import (
    IGNORED,
    Number,
    Pairs,
    SoftPairs,
    directions,
    solve,
    solve_soft,
)

# --------------------------------------------------------------- embeddings against their keys


def info_nce(
    call: Call,
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    false_negatives: Tensor | None,
    *,
    temperature: Number,
    negative_weight: Number,
    normalize: bool,
    symmetric: bool,
    margin: Number,
    decoupled: bool,
    in_batch_negatives: bool,
    weights: Tensor | None,
    reduction: str,
) -> Tensor:
    if negatives is not None and not negatives.shape[-2]:
        negatives = negatives.flatten(0, -2)  # none of each query are none of all queries
    of_each = negatives is not None and negatives.ndim == 3
    if reduction == "none" or (of_each and (symmetric or not in_batch_negatives)):
        return NotImplemented
    if false_negatives is not None:
        if decoupled:
            return NotImplemented
        # the kernels read no mask of pairs, and old compilers do not trace _replace
        call = Call(call.name, "portable", call.row_mask, call.ranks)
    half = half_of(query, key, None if of_each else negatives)
    is_plain = in_batch_negatives and is_number(margin, 0) and is_number(negative_weight, 1)
    needs_logits = not is_plain or of_each or (symmetric and bool(call.ranks))
    kept = "" if needs_logits or call.ranks else half
    query, key, negatives = in_compute_dtype(query, key, negatives, half=kept)
    scale = inverse(temperature, query)
    logits = None
    if needs_logits:
        positive = cosines(query, key) if normalize else (query * key).sum(1)
        logits = (positive - margin) * scale - logarithm(negative_weight, query)
    gathered = [logits.detach()] if symmetric and logits is not None else []
    keys, first, *of_keys = call.ranks.share(key, *gathered)
    n, n_further = keys.shape[0], 0 if negatives is None else negatives.shape[-2]
    check_columns((n if in_batch_negatives else 0) + n_further, false_negatives=false_negatives)
    if not n or not n_further + (n - 1 if in_batch_negatives else 0):
        return zero_loss(query, key, negatives, temperature, negative_weight, margin)
    factors = _factors(call, weights, n, reduction, query)
    further_logits, bank = None, negatives
    if of_each:
        assert negatives is not None
        bank, further_logits = None, _similarities_of_each(query, negatives, normalize) * scale
        if false_negatives is not None:
            # finite, because log-sum-exps of −inf alone have the gradient NaN
            least = torch.finfo(further_logits.dtype).min / 4
            further_logits = further_logits.masked_fill(false_negatives[:, n:], least)
            false_negatives = false_negatives[:, :n]
    elif not in_batch_negatives:
        keys, bank, first = negatives, None, -1
    elif bank is not None and is_differentiated(bank):
        keys, bank = torch.cat([keys, bank]), None
    share = _solve(
        call, query, keys, scale, factors * 0.5 if symmetric else factors,
        form="linear" if decoupled else "softplus", first=first,
        normalize=normalize, half=half, bank=bank, masked_pairs=false_negatives,
        positive_logits=logits, further_logits=further_logits,
        key_positive_logits=of_keys[0] if of_keys and n > 1 else None,
        n_columns=n if symmetric and n > 1 else 0,
    )  # fmt: skip
    return call.ranks.total(share)


def _similarities_of_each(query: Tensor, negatives: Tensor, normalize: bool) -> Tensor:
    """Return the similarities [N, M] of queries to negatives [N, M, D] of their own."""
    if normalize:
        query, negatives = directions(query), directions(negatives)
    return (negatives @ query[:, :, None])[:, :, 0]


def clip_contrastive(
    call: Call,
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    logit_bias: Number | None,
    *,
    weights: Tensor | None,
    reduction: str,
) -> Tensor:
    if reduction == "none":
        return NotImplemented
    half = half_of(image, text)
    image, text = in_compute_dtype(image, text, half="" if call.ranks else half)
    scale = number_like(logit_scale, image)
    logits = (image * text).sum(1) * scale if call.ranks else None
    texts, first, *of_keys = call.ranks.share(text, *([] if logits is None else [logits.detach()]))
    n = texts.shape[0]
    if n < 2:
        return zero_loss(image, text, scale, logit_bias)
    share = _solve(
        call, image, texts, scale, _factors(call, weights, n, reduction, image) * 0.5,
        form="softplus", first=first, normalize=False, half=half, positive_logits=logits,
        key_positive_logits=of_keys[0] if of_keys else None, n_columns=n,
    )  # fmt: skip
    if isinstance(logit_bias, Tensor):
        share = share + (0 * logit_bias).to(share)  # the bias cancels, but is on the graph
    return call.ranks.total(share)


def siglip(
    call: Call,
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    logit_bias: Number | None,
    *,
    negative_only: bool,
    weights: Tensor | None,
    reduction: str,
) -> Tensor:
    if reduction == "none":
        return NotImplemented
    half = half_of(image, text)
    image, text = in_compute_dtype(image, text, half="" if call.ranks else half)
    texts, first = call.ranks.share(text)
    scale = number_like(logit_scale, image)
    n = texts.shape[0]
    if not n:
        return zero_loss(image, text, scale, logit_bias)
    bias = 0.0 if logit_bias is None else logit_bias
    share = _solve(
        call, image, texts, scale, _factors(call, weights, n, reduction, image), form="pairs",
        first=-1 if negative_only else first, normalize=False, half=half,
        positive_logits=_thresholds(bias, image),
    )  # fmt: skip
    return call.ranks.total(share)


def _thresholds(bias: Number, image: Tensor) -> Tensor:
    """Return −bias for each image."""
    if isinstance(bias, Tensor):
        return number_like(bias, image).neg().expand(image.shape[0])
    return number_like(-bias, image, image.shape[0])


# ------------------------------------------------------------------------ examples of one kind


def nt_xent(
    call: Call,
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: Number,
    normalize: bool,
    decoupled: bool,
    weights: Tensor | None,
    reduction: str,
) -> Tensor:
    if reduction == "none":
        return NotImplemented
    half = half_of(view1, view2)
    both = torch.cat(in_compute_dtype(view1, view2, half="" if call.ranks else half))
    views, first = call.ranks.share(both)
    n = len(views)
    if n <= 2:
        return zero_loss(view1, view2, temperature)
    # the loss of an example is the mean of those of its views, which share its weight
    factors = _factors(call, weights, n // 2, reduction, both) * 0.5
    share = _solve(
        call, both, views if call.ranks else None, inverse(temperature, both),
        factors.repeat(2) if isinstance(factors, Tensor) else factors,
        form="linear" if decoupled else "softplus", first=first, two_views=True,
        normalize=normalize, half=half,
    )  # fmt: skip
    return call.ranks.total(share)


def sup_con(
    call: Call,
    features: Tensor,
    labels: Tensor | None,
    keys: Tensor | None,
    key_labels: Tensor | None,
    positives: Tensor | None,
    *,
    temperature: Number,
    base_temperature: Number | None,
    normalize: bool,
    anchors: str,
    weights: Tensor | None,
    reduction: str,
) -> Tensor:
    if reduction == "none" or labels is None:
        return NotImplemented
    half = half_of(features, keys)
    if features.ndim == 3:
        labels = labels.repeat_interleave(features.shape[1])
        features = features.flatten(0, 1)
        weights = None if weights is None else weights.flatten()
    dtype = compute_dtype(features)
    features, _, keys = in_compute_dtype(features, features, keys, half="" if call.ranks else half)
    labels = labels.long().contiguous()
    of_keys, is_apart = labels, keys is not None
    if key_labels is not None:
        of_keys = key_labels.long().contiguous()
    whole, first, of_keys = call.ranks.share(features if keys is None else keys, of_keys)
    if not whole.shape[0] or (whole.shape[0] < 2 and not is_apart):
        return zero_loss(features, whole, temperature)
    over_anchors = reduction == "mean" and anchors == "with_positive" and not call.ranks
    factors: float | Tensor = 1.0 if weights is None else weights.detach().to(dtype)
    if reduction == "mean" and not over_anchors:
        counted = torch.ones_like(labels, dtype=dtype)
        counted = counted if weights is None else counted * weights.detach().to(dtype)
        if anchors == "with_positive":  # over all ranks
            *_, n_positives = numbers_of_classes(of_keys, labels, dtype)
            counted = counted * ((n_positives > int(not is_apart)) & (labels != IGNORED))
        factors = _over_sum(call, counted, counted)
    share = _solve(
        call, features, whole if is_apart or call.ranks else None,
        inverse(temperature, features), factors, form="linear", first=-1 if is_apart else first,
        normalize=normalize, half=half, classes=of_keys, query_classes=labels,
        attractions_differ=weights is not None, over_anchors=over_anchors,
    )  # fmt: skip
    total = call.ranks.total(share)
    if base_temperature is None:
        return total
    return total * (number_like(temperature, features) / base_temperature)


# ---------------------------------------------------------------------- two networks' similarities


def similarity_kl(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    student_keys: Tensor | None,
    teacher_keys: Tensor | None,
    *,
    student_temperature: Number,
    teacher_temperature: Number,
    form: str,
    normalize: bool,
    symmetric: bool,
    mask_self: bool,
    weights: Tensor | None,
    reduction: str,
) -> Tensor:
    if reduction == "none":
        return NotImplemented
    half, teacher_half = half_of(student, student_keys), half_of(teacher, teacher_keys)
    student, teacher, student_keys, teacher_keys = in_compute_dtype(
        student, teacher.detach(), student_keys,
        None if teacher_keys is None else teacher_keys.detach(),
    )  # fmt: skip
    scale = inverse(student_temperature, student)
    teacher_scale = inverse(teacher_temperature, student).detach()

    def of_rows(
        query: Tensor, key: Tensor | None, teacher_query: Tensor, teacher_key: Tensor | None
    ) -> Tensor:
        """Return the share of this rank's rows in the loss of all rows."""
        if call.ranks and key is None:  # the queries of this rank are a part of the keys
            key, teacher_key = query, teacher_query
        first, n = 0, len(query)
        if key is not None and teacher_key is not None:
            key, first, teacher_key = call.ranks.share(key, teacher_key)
        if call.ranks:
            n = int(call.ranks.sum(torch.tensor(n, device=query.device)))
        if not n or len(query if key is None else key) - mask_self < 1:
            return zero_loss(query, query if key is None else key, scale)
        factors = _factors(call, weights, n, reduction, query)
        problem = SoftPairs(
            query, apart(key, query), scale,
            teacher_query, apart(teacher_key, teacher_query), teacher_scale,
            factors if isinstance(factors, Tensor) else None, form,
            first if mask_self else -1, normalize, half, teacher_half,
        )  # fmt: skip
        share = solve_soft(call.engine, problem)
        return share if isinstance(factors, Tensor) else share * factors

    share = of_rows(student, student_keys, teacher, teacher_keys)
    # the columns of the queries among each other are their rows
    if symmetric and student_keys is not None and teacher_keys is not None:
        share = (share + of_rows(student_keys, student, teacher_keys, teacher)) / 2
    return call.ranks.total(share)


# --------------------------------------------------------------------------- what statements share


def _factors(
    call: Call, weights: Tensor | None, n: int, reduction: str, like: Tensor
) -> float | Tensor:
    """Return what multiplies the losses of this rank's examples, one number without weights.

    n: how many examples all ranks have.
    """
    if weights is None:
        return 1 / n if reduction == "mean" else 1.0
    weights = weights.detach().to(compute_dtype(like))
    return weights if reduction == "sum" else _over_sum(call, weights, weights)


def _over_sum(call: Call, weights: Tensor, counted: Tensor) -> Tensor:
    """Return weights / Σ counted over the ranks; 0 where that is 0."""
    total = call.ranks.sum(counted.sum())
    return weights / total.clamp(min=torch.finfo(total.dtype).tiny)


def _solve(
    call: Call,
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    weights: float | Tensor,
    *,
    form: str,
    first: int,
    half: str,
    positive_logits: Tensor | None = None,
    further_logits: Tensor | None = None,
    bank: Tensor | None = None,
    masked_pairs: Tensor | None = None,
    n_columns: int = 0,
    key_positive_logits: Tensor | None = None,
    classes: Tensor | None = None,
    query_classes: Tensor | None = None,
    attractions_differ: bool = False,
    over_anchors: bool = False,
    two_views: bool = False,
    normalize: bool = True,
) -> Tensor:
    """Return the share of these queries in the loss, by the engine of the call.

    One weight goes for all examples. The first `n_columns` columns have the loss of their example
    with the same weight.
    """
    key_weights = None
    if not isinstance(weights, Tensor):
        weight, weights = weights, scale.new_full(query.shape[:1], weights)
        if n_columns:
            key_weights = scale.new_full((n_columns,), weight) if call.ranks else weights
    elif n_columns:
        (key_weights,), _ = call.ranks.gather(weights)
    problem = Pairs(
        query=query, key=apart(key, query), scale=scale, positive_logits=positive_logits,
        further_logits=further_logits, weights=weights,
        bank=apart(bank, query, key), masked_pairs=masked_pairs,
        key_positive_logits=key_positive_logits, key_weights=apart(key_weights, weights),
        classes=classes, query_classes=apart(query_classes, classes), attractions=None,
        attractions_differ=attractions_differ, over_anchors=over_anchors, form=form, first=first,
        two_views=two_views, normalize=normalize, half=half,
        group=call.ranks.name if n_columns else "",
    )  # fmt: skip
    return solve(call.engine, problem)
