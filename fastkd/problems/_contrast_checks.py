"""Checks of the inputs of contrastive losses, before any of them is stated as pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._op import Number


def check_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    false_negatives: Tensor | None,
    *,
    temperature: Number,
    negative_weight: Number,
    symmetric: bool,
    margin: Number,
    in_batch_negatives: bool,
    weights: Tensor | None = None,
    reduction: str = "mean",
    **_: bool,
) -> None:
    bank = {} if negatives is None else {"negatives": _first_of_each("negatives", negatives)}
    _checks.matrices(query=query, key=key, **bank)
    _checks.same_examples(query=query, key=key)
    if negatives is not None and negatives.ndim == 3:
        _checks.same_examples(query=query, negatives=negatives)
    _option_checks.number(temperature=temperature, above=0)
    _option_checks.number(negative_weight=negative_weight, above=0)
    _option_checks.number(margin=margin)
    _weights_and_reduction(weights, reduction, query)
    if not in_batch_negatives and (negatives is None or symmetric):
        got = "negatives=None" if negatives is None else "symmetric=True"
        raise ValueError(
            "in_batch_negatives=False needs negatives [M, D], or [N, M, D] of each query, and no "
            f"symmetric form, since these count for the queries alone; got {got}"
        )
    if false_negatives is not None:
        _mask(query, false_negatives=false_negatives)


def check_columns(n_keys: int, **masks: Tensor | None) -> None:
    """Raise an error unless the masks of pairs have one column for each key of a query."""
    for name, mask in masks.items():
        if mask is not None and mask.shape[1] != n_keys:
            raise ValueError(
                f"{name} needs one column for each of {n_keys} keys, those of the batch, of all "
                f"ranks, and then further negatives, got the shape {[*mask.shape]}"
            )


def check_clip_contrastive(
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    logit_bias: Number | None,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    **_: bool,
) -> None:
    _checks.matrices(image=image, text=text)
    _checks.same_examples(image=image, text=text)
    _option_checks.number(logit_scale=logit_scale)
    if logit_bias is not None:
        _option_checks.number(logit_bias=logit_bias)
    _weights_and_reduction(weights, reduction, image)


def check_nt_xent(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: Number,
    weights: Tensor | None = None,
    reduction: str = "mean",
    **_: bool,
) -> None:
    _checks.matrices(view1=view1, view2=view2)
    _checks.same_examples(view1=view1, view2=view2)
    _option_checks.number(temperature=temperature, above=0)
    _weights_and_reduction(weights, reduction, view1)


def check_sup_con(
    features: Tensor,
    labels: Tensor | None,
    keys: Tensor | None,
    key_labels: Tensor | None,
    positives: Tensor | None,
    *,
    temperature: Number,
    base_temperature: Number | None,
    anchors: str,
    weights: Tensor | None = None,
    reduction: str = "mean",
    **_: bool,
) -> None:
    others = {} if keys is None else {"keys": keys}
    _checks.matrices(features=_first_of_each("features", features), **others)
    if (labels is None) == (positives is None):
        got = "neither" if labels is None else "both"
        raise ValueError(
            f"sup_con needs labels, or positives, a mask of the pairs of one class; got {got}"
        )
    if (key_labels is None) != (keys is None or labels is None):
        got, missing = ("keys", "key_labels") if key_labels is None else ("key_labels", "keys")
        raise ValueError(
            f"keys with a class each need keys [M, D], key_labels [M] and labels [N]; got {got} "
            f"without {missing if keys is None or labels is not None else 'labels'}"
        )
    if labels is not None:
        _labels("features", features, labels=labels)
    if keys is not None and key_labels is not None:
        _labels("keys", keys, key_labels=key_labels)
    if positives is not None:
        _mask(features, positives=positives)
    _option_checks.number(temperature=temperature, above=0)
    if base_temperature is not None:
        _option_checks.number(base_temperature=base_temperature, above=0)
    _option_checks.one_of(("with_positive", "all"), anchors=anchors)
    _weights_and_reduction(weights, reduction, features)


def check_similarity_kl(
    student: Tensor,
    teacher: Tensor,
    student_keys: Tensor | None,
    teacher_keys: Tensor | None,
    *,
    student_temperature: Number,
    teacher_temperature: Number,
    form: str,
    symmetric: bool,
    mask_self: bool,
    weights: Tensor | None = None,
    reduction: str = "mean",
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
        if symmetric and (weights is not None or reduction != "mean"):
            got = f"reduction={reduction!r}" if weights is None else "weights"
            raise ValueError(
                "symmetric=True with keys is the mean of a mean over queries and one over keys, "
                f"not a loss of each query; got {got}: call similarity_kl once for each direction"
            )
    _checks.constant_teacher(teacher=teacher)
    _option_checks.number(above=0, student_temperature=student_temperature)
    _option_checks.number(above=0, teacher_temperature=teacher_temperature)
    _option_checks.one_of(("kl", "cross_entropy"), form=form)
    _weights_and_reduction(weights, reduction, student)


def _first_of_each(name: str, x: Any) -> Any:
    """Return [N, D] of [N, M, D], several embeddings of each example, and all else as it is."""
    if not isinstance(x, Tensor) or x.is_nested or x.ndim < 3:
        return x
    if x.ndim > 3:
        raise ValueError(
            f"{name} needs the shape [N, D], or [N, M, D] with M embeddings of each example, got "
            f"{[*x.shape]}: pool them to D features each"
        )
    return x[:, 0] if x.shape[1] else x.flatten(0, 1)


def _labels(of: str, rows: Tensor, **labels: Any) -> None:
    for name, classes in labels.items():
        if isinstance(classes, Tensor):
            _checks.one_piece(name, classes, f"one class for each of the {of}")
        if not isinstance(classes, Tensor) or classes.is_floating_point() or classes.is_complex():
            got = classes.dtype if isinstance(classes, Tensor) else type(classes).__name__
            raise TypeError(f"{name} must be a tensor of classes (torch.int64), got {got}")
        if classes.shape != rows.shape[:1]:
            raise ValueError(
                f"{name} need one class for each of the {len(rows)} {of}, got the shape "
                f"{[*classes.shape]}"
            )
        _checks.same_device(**{of: rows, name: classes})


def _mask(rows: Tensor, **mask: Any) -> None:
    for name, pairs in mask.items():
        if isinstance(pairs, Tensor):
            _checks.one_piece(name, pairs, "a tensor with one row for each example")
        if not isinstance(pairs, Tensor) or pairs.dtype != torch.bool:
            got = pairs.dtype if isinstance(pairs, Tensor) else type(pairs).__name__
            raise TypeError(f"{name} must be a tensor of torch.bool, got {got}: compare with != 0")
        if pairs.ndim != 2 or len(pairs) != len(rows):
            raise ValueError(
                f"{name} needs one row for each of {len(rows)} examples and one column for each "
                f"key, got the shape {[*pairs.shape]}"
            )
        _checks.same_device(embeddings=rows, **{name: pairs})


def _weights_and_reduction(weights: Tensor | None, reduction: str, rows: Tensor) -> None:
    if reduction != "mean":
        _option_checks.reduction(reduction, None)
    if weights is not None:
        _checks.weights(weights, rows.shape[:-1], rows.device)
