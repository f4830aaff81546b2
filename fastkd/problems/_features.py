"""Feature maps and sequences: their checks, their positions, and how values of those are reduced.

A position is everything but the feature dimension: a pixel of a map, a token of a sequence. Losses
see features as [B, P, C], P positions of each of B examples, a view in any strides.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._checks import shape
from fastkd._op import Number
from fastkd._reduction import reduce, selected, total, totals
from fastkd.problems._maps import pooled, smaller_size

KINDS = ("mse", "smooth_l1", "cosine", "normalized_mse")
Features = Tensor | Sequence[Tensor]  # of one layer, or of several


# ------------------------------------------------------------------------------------------ checks


def check_hint(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str,
    beta: Number,
    weights: Tensor | None,
    mask: Tensor | None,
    feature_dim: int | None,
    batch_dim: int,
    normalizer: Any,
    reduction: str,
) -> None:
    """Raise an error for features that do not fit together and options out of range."""
    check_layers(student, teacher)
    _option_checks.one_of(KINDS, kind=kind)
    _option_checks.at_least_0(beta=beta)
    _option_checks.reduction(reduction, normalizer)
    feature, batch = dimensions(student, feature_dim, batch_dim)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher need one shape, got {shape(student)} and {shape(teacher)}: "
            + _cure(student, teacher, feature, batch)
        )
    if not student.shape[feature]:
        raise ValueError(
            f"feature_dim={feature} has no feature in it: got {shape(student)}, need at least one"
        )
    _checks.same_device(student=student, teacher=teacher)
    _checks.constant_teacher(teacher=teacher)
    for name, x in (("weights", weights), ("mask", mask)):
        if x is not None:
            _check_of_positions(name, x, student, feature, batch)


def check_layers(student: Tensor, teacher: Tensor) -> None:
    """Raise an error unless both are features with as many dimensions as each other."""
    _floats(student, teacher, "the features of a layer, (N, D), (B, L, D) or (B, C, H, W)")
    if min(student.ndim, teacher.ndim) < 2:
        raise ValueError(
            "hint needs features of at least two dimensions, examples and features, got "
            f"{shape(student)} and {shape(teacher)}"
        )
    if student.ndim != teacher.ndim:
        raise ValueError(
            f"student and teacher need one shape, got {shape(student)} and {shape(teacher)}: give "
            "both the same dimensions, for example tokens of a ViT as maps by "
            ".mT.unflatten(-1, (H, W))"
        )


def _cure(student: Tensor, teacher: Tensor, feature: int, batch: int) -> str:
    """Return what to do about features of two shapes with the same number of dimensions."""
    own, other = [*student.shape], [*teacher.shape]
    if sorted(own) == sorted(other):
        to_other = [other.index(size) for size in own] if len({*own}) == len(own) else "dims"
        if student.ndim == 3 and own == [other[1], other[0], other[2]]:
            return (
                "one of them has tokens before examples, so transpose(0, 1) it; batch_dim says "
                "which dimension of both has the examples"
            )
        return (
            f"the dimensions have another order: teacher.permute({to_other}) brings them to the "
            "student's, and feature_dim says which one has the features"
        )
    if own[batch] != other[batch]:
        return (
            f"batch_dim={batch} must have the same examples in both; where tokens come before "
            "examples, as in [S, B, H], it is 1"
        )
    sizes = [i for i in range(student.ndim) if i not in (feature, batch)]
    if any(own[i] != other[i] for i in sizes):
        pool = "pool the larger ones, for example by F.adaptive_avg_pool2d"
        return f"{pool}, or take fastkd.HintLoss, which does it with resize=..."
    return (
        f"fastkd.HintLoss(student_channels={own[feature]}, teacher_channels={other[feature]}) has "
        f"a projector to the teacher's width, and feature_dim={feature} is where the features are"
    )


def check_embeddings(student: Tensor, teacher: Tensor, *, normalize: bool) -> None:
    """Raise an error unless both are embeddings (..., D) of one shape."""
    _floats(student, teacher, "embeddings (..., D)")
    for name, x in (("student", student), ("teacher", teacher)):
        if not x.ndim or not x.shape[-1]:
            raise ValueError(f"{name} needs the shape (..., D) with D ≥ 1, got {shape(x)}")
    if student.shape != teacher.shape:
        way = "give both the same rows"
        if student.shape[:-1] == teacher.shape[:-1]:
            way = (
                f"project the student, for example by nn.Linear({student.shape[-1]}, "
                f"{teacher.shape[-1]}), or take fastkd.HintLoss, which has a projector"
            )
        raise ValueError(
            f"student and teacher need one shape, got {shape(student)} and {shape(teacher)}: {way}"
        )
    _checks.same_device(student=student, teacher=teacher)
    _checks.constant_teacher(teacher=teacher)


def check_maps(student: Features, teacher: Features, *, p: Number, kind: str) -> None:
    """Raise an error unless both have feature maps [B, C, ...] of the same examples, or as many."""
    _option_checks.one_of(("sum", "max"), kind=kind)
    _option_checks.temperature(p, "p")
    pairs = list_of(student), list_of(teacher)
    if len(pairs[0]) != len(pairs[1]) or not pairs[0]:
        raise ValueError(
            "student and teacher need as many maps as each other, at least one, got "
            f"{len(pairs[0])} and {len(pairs[1])}: choose the layers that belong together"
        )
    for s, t in zip(*pairs, strict=True):
        _floats(s, t, "feature maps [B, C, H, W], or a list of them")
        if s.ndim != t.ndim or s.ndim < 3:
            raise ValueError(
                "student and teacher need feature maps [B, C, ...] with as many dimensions as each "
                f"other, at least three, got {shape(s)} and {shape(t)}: tokens [B, L, D] of a ViT "
                "are maps by .mT.unflatten(-1, (H, W))"
            )
        if len(s) != len(t):
            raise ValueError(
                f"student and teacher need the same examples: one B, got {shape(s)} and {shape(t)}"
            )
        for name, x in (("student", s), ("teacher", t)):
            if not x.shape[1:].numel():
                raise ValueError(f"{name} needs at least one channel and position, got {shape(x)}")
        _checks.same_device(student=s, teacher=t)
        _checks.constant_teacher(teacher=t)


def _floats(student: Any, teacher: Any, needed: str) -> None:
    for name, x in (("student", student), ("teacher", teacher)):
        padded = "a padded tensor with mask=, or .values() where each row is an example"
        _checks.floats(name, x, needed, "features", padded)


def _check_of_positions(name: str, x: Any, features: Tensor, feature: int, batch: int) -> None:
    """Raise an error unless there is a weight, or an entry of a mask, for each position."""
    sizes = [size for i, size in enumerate(features.shape) if i != feature]
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if type(x) is not Tensor or x.is_nested:
        _checks.one_piece(name, x, "one entry for each position")
    if name == "mask" and (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"mask must hold bools, or 0 and 1 as integers, got {x.dtype}: numbers that multiply "
            "the values of positions are weights=..."
        )
    if x.is_complex():
        raise TypeError(f"weights must be real, got {x.dtype}")
    own = [*x.shape]
    if x.ndim == features.ndim and own[feature] == 1:
        del own[feature]
    fits = len(own) <= len(sizes) and all(
        a in (1, b) for a, b in zip(reversed(own), reversed(sizes), strict=False)
    )
    if not fits:
        way = f"pass the shape {sizes}, or one that broadcasts to it"
        if features.ndim == 3 and own == sizes[::-1]:
            way = (
                "transpose it, or pass batch_dim=1 where the features are [S, B, H] and the mask "
                "[S, B]"
            )
        elif own == [sizes[batch - (batch > feature)]]:
            way = f"weights of examples are {name}[:, {', '.join(['None'] * (len(sizes) - 1))}]"
        raise ValueError(
            f"{name} needs one entry for each position of the features {shape(features)}, whose "
            f"feature_dim is {feature}: the shape {sizes}, got {shape(x)}: {way}"
        )
    if x.device != features.device:
        raise ValueError(f"{name} are on {x.device}, the features on {features.device}: move them")


# --------------------------------------------------------------------------------------- positions


def dimensions(features: Tensor, feature_dim: int | None, batch_dim: int) -> tuple[int, int]:
    """Return the dimensions of features and of examples, counted from the first one."""
    n = features.ndim
    if feature_dim is None:
        feature_dim = 1 if n >= 4 else -1
    for name, dim in (("feature_dim", feature_dim), ("batch_dim", batch_dim)):
        if not isinstance(dim, int) or isinstance(dim, bool) or not -n <= dim < n:
            raise ValueError(
                f"{name} must be a whole number from {-n} to {n - 1} for features "
                f"{shape(features)}, got {dim!r}"
            )
    feature, batch = feature_dim % n, batch_dim % n
    if feature == batch:
        raise ValueError(
            f"feature_dim and batch_dim must differ, got {feature} for both in features "
            f"{shape(features)}"
        )
    return feature, batch


def positions(features: Tensor, feature: int, batch: int) -> Tensor:
    """Return features [B, P, C], a view if the strides of a crop do not forbid it."""
    moved = features.movedim((batch, feature), (0, -1))
    if moved.ndim == 2:
        return moved.unsqueeze(1)
    places = zip(moved.shape[1:-1], moved.stride()[1:-1], strict=True)
    steps = [(size, stride) for size, stride in places if size > 1]
    if any(
        a[1] != b[0] * b[1] for a, b in itertools.pairwise(steps)
    ):  # a copy keeps the order of dimensions, which flatten would not
        moved = features.clone().movedim((batch, feature), (0, -1))
    return moved.flatten(1, -2)


def of_positions(x: Tensor | None, features: Tensor, feature: int, batch: int) -> Tensor | None:
    """Return weights or a mask as [B, P]."""
    if x is None:
        return None
    if x.ndim == features.ndim:
        x = x.squeeze(feature)
    sizes = [size for i, size in enumerate(features.shape) if i != feature]
    x = x.expand(sizes).movedim(batch - (batch > feature), 0)
    return x.unsqueeze(1) if x.ndim == 1 else x.flatten(1)


def counted(weights: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the weights of positions, 0 of those that are masked, or else the mask, or neither."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    if weights is None:
        return None, mask
    if mask is None:
        return (None, weights) if weights.dtype == torch.bool else (weights, None)
    return torch.where(mask, weights, 0), None


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return w·v, which is 0 where w is, whatever v is."""
    if weights is None:
        return values
    return selected(values * weights.to(values.dtype), weights.detach() != 0)


def reduced(values: Tensor, weights: Tensor | None, normalizer: Any, reduction: str) -> Tensor:
    """Return Σ x / Σ w of "mean", or / normalizer, Σ x of "sum", a mean of each example of "none".

    Args:
        values: x, the weighted values of positions [B, P].
        weights: w, numbers or bools [B, P]; None for 1.
        normalizer: As in `hint`.
        reduction: As in `hint`.
    """
    if weights is not None and weights.dtype != torch.bool:
        weights = weights.to(values.dtype)
    if reduction == "none":
        total_weights = values.shape[1] if weights is None else totals(weights)
        return _quotient(totals(values), total_weights)
    if reduction == "mean" and normalizer is None and weights is not None:
        normalizer = total(weights)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.reshape(())
    return reduce(values, None, None, normalizer, reduction)


def _quotient(sums: Tensor, total: Any) -> Tensor:
    """Return sums / total, and the sums where the total is 0."""
    return sums / (torch.where(total == 0, 1, total) if isinstance(total, Tensor) else total or 1)


# -------------------------------------------------------------------------------------------- maps


def list_of(features: Features) -> Sequence[Tensor]:
    """Return the maps of all layers."""
    return [features] if isinstance(features, Tensor) else features


def of_one_size(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two maps of one spatial size, the larger pooled to the smaller in each dimension."""
    size = smaller_size(student, teacher)
    # pooled in the compute dtype, because half precision would round what the powers enlarge
    s, t = (x if [*x.shape[2:]] == size else pooled(x.to(dtype), size) for x in (student, teacher))
    return s, t
