"""How the contrastive losses, and the divergence of similarities, are stated as pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd import _checks
from fastkd._op import is_differentiated, is_inference
from fastkd._precision import compute_dtype
from fastkd.problems.pairs import SHORTEST, Number, Pairs, SoftPairs, solve, solve_soft

if TYPE_CHECKING:
    from fastkd._loss import Call

# ----------------------------------------------------------------------------------------- checks


def check_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    *,
    temperature: Number,
    negative_weight: Number,
    symmetric: bool,
    margin: Number,
    in_batch_negatives: bool,
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


def check_clip_contrastive(
    image: Tensor, text: Tensor, logit_scale: Number, logit_bias: Number | None
) -> None:
    check_siglip(image, text, logit_scale, 0.0 if logit_bias is None else logit_bias)


def check_siglip(image: Tensor, text: Tensor, logit_scale: Number, logit_bias: Number) -> None:
    _checks.matrices(image=image, text=text)
    _checks.same_examples(image=image, text=text)
    _checks.number(logit_scale=logit_scale, logit_bias=logit_bias)


def check_nt_xent(view1: Tensor, view2: Tensor, *, temperature: Number) -> None:
    _checks.matrices(view1=view1, view2=view2)
    _checks.same_examples(view1=view1, view2=view2)
    _checks.number(temperature=temperature, above=0)


def check_sup_con(features: Tensor, labels: Tensor, *, temperature: Number, anchors: str) -> None:
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


def check_similarity_kl(
    student: Tensor,
    teacher: Tensor,
    student_keys: Tensor | None,
    teacher_keys: Tensor | None,
    *,
    student_temperature: Number,
    teacher_temperature: Number,
    mask_self: bool,
    **_: bool,
) -> None:
    for query, key, name in (
        (student, student_keys, "student"),
        (teacher, teacher_keys, "teacher"),
    ):
        _checks.matrices(**{name: query}, **({} if key is None else {f"{name}_keys": key}))
    _checks.same_examples(student=student, teacher=teacher)
    _checks.same_device(student=student, teacher=teacher)
    if (student_keys is None) != (teacher_keys is None):
        raise ValueError(
            "student_keys and teacher_keys are embeddings of the same keys: give both, or none for "
            "the similarities of the queries among each other"
        )
    if student_keys is not None and teacher_keys is not None:
        _checks.same_examples(student_keys=student_keys, teacher_keys=teacher_keys)
        _checks.constant_teacher(teacher_keys=teacher_keys)
        if mask_self and len(student_keys) != len(student):
            raise ValueError(
                f"mask_self masks key i for query i: as many keys as queries are needed, got "
                f"{len(student_keys)} and {len(student)}"
            )
    _checks.constant_teacher(teacher=teacher)
    _checks.number(above=0, student_temperature=student_temperature)
    _checks.number(above=0, teacher_temperature=teacher_temperature)


# --------------------------------------------------------------- embeddings against their keys


def info_nce(
    call: Call,
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    *,
    temperature: Number,
    negative_weight: Number,
    normalize: bool,
    symmetric: bool,
    margin: Number,
    decoupled: bool,
    in_batch_negatives: bool,
) -> Tensor:
    half = half_of(query, key, negatives)
    query, key, bank = in_compute_dtype(query, key, negatives)
    scale = _inverse(temperature, query)
    logits = None
    is_plain = in_batch_negatives and is_number(margin, 0) and is_number(negative_weight, 1)
    if not is_plain or (symmetric and call.ranks):
        positive = cosines(query, key) if normalize else (query * key).sum(1)
        logits = (positive - margin) * scale - logarithm(negative_weight, query)
    gathered = [logits.detach()] if symmetric and logits is not None else []
    keys, first, *of_keys = call.ranks.share(key, *gathered)
    n, n_bank = keys.shape[0], 0 if bank is None else bank.shape[0]
    if not n or not n_bank + (n - 1 if in_batch_negatives else 0):
        return zero_loss(query, key, bank, temperature, negative_weight, margin)
    if bank is not None:
        if not in_batch_negatives:
            keys, bank, first = bank, None, -1
        elif is_differentiated(bank):
            keys, bank = torch.cat([keys, bank]), None
    share = _solve(
        call, query, keys, scale, (0.5 if symmetric else 1) / n,
        form="linear" if decoupled else "softplus", first=first, normalize=normalize, half=half,
        bank=bank, positive_logits=logits,
        key_positive_logits=of_keys[0] if of_keys and n > 1 else None,
        n_columns=n if symmetric and n > 1 else 0,
    )  # fmt: skip
    return call.ranks.total(share)


def clip_contrastive(
    call: Call,
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    logit_bias: Number | None,
) -> Tensor:
    half = half_of(image, text)
    image, text = in_compute_dtype(image, text)
    scale = _number_like(logit_scale, image)
    logits = (image * text).sum(1) * scale if call.ranks else None
    texts, first, *of_keys = call.ranks.share(text, *([] if logits is None else [logits.detach()]))
    n = texts.shape[0]
    if n < 2:
        return zero_loss(image, text, scale, logit_bias)
    share = _solve(
        call, image, texts, scale, 0.5 / n, form="softplus", first=first, normalize=False,
        half=half, positive_logits=logits, key_positive_logits=of_keys[0] if of_keys else None,
        n_columns=n,
    )  # fmt: skip
    if isinstance(logit_bias, Tensor):
        share = share + (0 * logit_bias).to(share)  # the bias cancels, but is on the graph
    return call.ranks.total(share)


def siglip(
    call: Call, image: Tensor, text: Tensor, logit_scale: Number, logit_bias: Number
) -> Tensor:
    half = half_of(image, text)
    image, text = in_compute_dtype(image, text)
    texts, first = call.ranks.share(text)
    scale, bias = _number_like(logit_scale, image), _number_like(logit_bias, image)
    n = texts.shape[0]
    if not n:
        return zero_loss(image, text, scale, bias)
    share = _solve(
        call, image, texts, scale, 1 / n, form="pairs", first=first, normalize=False, half=half,
        positive_logits=-bias.expand(image.shape[0]),
    )  # fmt: skip
    return call.ranks.total(share)


# ------------------------------------------------------------------------ examples of one kind


def nt_xent(call: Call, view1: Tensor, view2: Tensor, *, temperature: Number) -> Tensor:
    half = half_of(view1, view2)
    both = torch.cat(in_compute_dtype(view1, view2))
    views, first = call.ranks.share(both)
    n = len(views)
    if n <= 2:
        return zero_loss(view1, view2, temperature)
    share = _solve(
        call, both, views if call.ranks else None, _inverse(temperature, both), 1 / n,
        form="softplus", first=first, two_views=True, half=half,
    )  # fmt: skip
    return call.ranks.total(share)


def sup_con(
    call: Call, features: Tensor, labels: Tensor, *, temperature: Number, anchors: str
) -> Tensor:
    half = half_of(features)
    (features,) = in_compute_dtype(features)
    whole, first, labels = call.ranks.share(features, labels)
    n = len(whole)
    if n < 2:
        return zero_loss(features, features, temperature)
    classes, n_alike = _classes(labels.long().contiguous())
    n_positives = n_alike.to(whole.dtype).sub_(1)
    is_anchor = n_positives.clamp(max=1)
    weights = is_anchor / (is_anchor.sum().clamp(min=1) if anchors == "with_positive" else n)
    own = slice(first, first + features.shape[0])
    share = _solve(
        call, features, whole if call.ranks else None, _inverse(temperature, features),
        weights[own], form="linear", first=first, half=half,
        classes=classes.to(whole.dtype), attractions=weights / n_positives.clamp(min=1),
    )  # fmt: skip
    return call.ranks.total(share)


def _classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers below N for the classes, and the size of each example's, without a host sync.

    The number of a class is the place of its first label among all labels in order.
    """
    ordered = labels.sort()[0]
    place = torch.searchsorted(ordered, labels)
    return place, torch.searchsorted(ordered, labels, right=True) - place


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
    symmetric: bool,
    mask_self: bool,
) -> Tensor:
    half, teacher_half = half_of(student, student_keys), half_of(teacher, teacher_keys)
    student, teacher, student_keys, teacher_keys = in_compute_dtype(
        student, teacher.detach(), student_keys,
        None if teacher_keys is None else teacher_keys.detach(),
    )  # fmt: skip
    scale = _inverse(student_temperature, student)
    teacher_scale = _inverse(teacher_temperature, student).detach()

    def of_rows(
        query: Tensor, key: Tensor | None, teacher_query: Tensor, teacher_key: Tensor | None
    ) -> Tensor:
        """Return the share of this rank's rows in the mean over all rows."""
        if call.ranks and key is None:  # the queries of this rank are a part of the keys
            key, teacher_key = query, teacher_query
        first, n = 0, len(query)
        if key is not None and teacher_key is not None:
            key, first, teacher_key = call.ranks.share(key, teacher_key)
        if call.ranks:
            n = int(call.ranks.sum(torch.tensor(n, device=query.device)))
        if not n or len(query if key is None else key) - mask_self < 1:
            return zero_loss(query, query if key is None else key, scale)
        problem = SoftPairs(
            query, _apart(key, query), scale,
            teacher_query, _apart(teacher_key, teacher_query), teacher_scale,
            first if mask_self else -1, half, teacher_half,
        )  # fmt: skip
        return solve_soft(call.engine, problem) / n

    share = of_rows(student, student_keys, teacher, teacher_keys)
    # the columns of the queries among each other are their rows
    if symmetric and student_keys is not None and teacher_keys is not None:
        share = (share + of_rows(student_keys, student, teacher_keys, teacher)) / 2
    return call.ranks.total(share)


# --------------------------------------------------------------------------- what statements share


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
    bank: Tensor | None = None,
    n_columns: int = 0,
    key_positive_logits: Tensor | None = None,
    classes: Tensor | None = None,
    attractions: Tensor | None = None,
    two_views: bool = False,
    normalize: bool = True,
) -> Tensor:
    """Return the share of these queries in the loss, by the engine of the call.

    One weight goes for all examples. The first `n_columns` columns have a loss, half of the whole.
    """
    if not isinstance(weights, Tensor):
        weights = query.new_full(query.shape[:1], weights)
    key_weights = query.new_full((n_columns,), 0.5 / n_columns) if n_columns else None
    problem = Pairs(
        query=query, key=_apart(key, query), scale=scale, positive_logits=positive_logits,
        weights=weights, bank=_apart(bank, query, key), key_positive_logits=key_positive_logits,
        key_weights=key_weights, classes=classes, attractions=attractions, form=form, first=first,
        two_views=two_views, normalize=normalize, half=half,
        group=call.ranks.name if n_columns else "",
    )  # fmt: skip
    return solve(call.engine, problem)


def _apart(x: Tensor | None, *others: Tensor | None) -> Tensor | None:
    """Return a view of a tensor that is one of the others, since the compiler refuses one twice."""
    return x.view_as(x) if x is not None and any(x is other for other in others) else x


def in_compute_dtype(*embeddings: Any) -> list[Any]:
    """Return embeddings as engines take them; None stays None.

    The first two tell the compute dtype. Inference tensors are cloned, because autograd cannot save
    them for a backward.
    """
    dtype = compute_dtype(*embeddings[:2])
    return [x if x is None else _cloned_inference(x.to(dtype)) for x in embeddings]


def _cloned_inference(x: Tensor) -> Tensor:
    return x.clone() if is_inference(x) else x


def half_of(*embeddings: Tensor | None) -> str:
    """Return the name of the half precision that all embeddings came in, or ""."""
    dtypes = {x.dtype for x in embeddings if x is not None}
    is_half = dtypes == {torch.bfloat16} or dtypes == {torch.float16}
    return str(dtypes.pop()).removeprefix("torch.") if is_half else ""


def _number_like(number: Number, like: Tensor) -> Tensor:
    """Return a 0-dim tensor on the device of `like`."""
    if isinstance(number, Tensor) or torch.compiler.is_compiling():
        # a copy from the host is a host sync, and the compiler would specialise on a number
        return like.new_ones(()) * number
    return like.new_full((), number)


def _inverse(temperature: Number, like: Tensor) -> Tensor:
    """Return 1 / temperature as a 0-dim tensor on the device of `like`."""
    if isinstance(temperature, Tensor) or torch.compiler.is_compiling():
        return 1 / _number_like(temperature, like)
    return like.new_full((), 1 / temperature)


def logarithm(number: Number, like: Tensor) -> Tensor:
    """Return the logarithm as a 0-dim tensor on the device of `like`."""
    return _number_like(number, like).log()


def is_number(number: Number, value: float) -> bool:
    """Return whether an option is no tensor and has that value."""
    return not isinstance(number, Tensor) and number == value


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine of each row and its partner, with lengths as in F.normalize.

    F.cosine_similarity takes longer.
    """
    x_lengths, y_lengths = (torch.linalg.vector_norm(z, dim=1).clamp(min=SHORTEST) for z in (x, y))
    return (x * y).sum(1) / (x_lengths * y_lengths)


def zero_loss(*trained: Any) -> Tensor:
    """Return the loss of no examples, on the graph of all that is trained.

    The first two tensors tell the compute dtype.
    """
    tensors = [x for x in trained if isinstance(x, Tensor)]
    dtype, device = compute_dtype(*tensors[:2]), tensors[0].device
    return torch.stack([x.sum().to(device, dtype) * 0 for x in tensors]).sum()
