"""Relations between the tokens of a sequence: which of them are alike, to each of two networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._loss import Call
from fastkd._op import Number, Op
from fastkd._precision import compute_dtype
from fastkd._reduction import Term, reduce


class TokenRelations(NamedTuple):
    """A comparison of the products of the tokens of each sequence, S = scale · X Xᵀ, by heads.

    With n tokens that count in a sequence, A heads and T the products of the teacher's tokens, the
    loss of a sequence is, by its divergence,

    kl     1/(A n) Σ_ai KL(softmax_j T_aij ‖ softmax_j S_aij)
    mse    the mean of (S_aij − T_aij)² over heads and pairs

    over the pairs of tokens that count, with `causal` those with j ≤ i. A sequence without a token
    that counts has the loss 0. The gradient in X is scale · (G + Gᵀ) X with the slopes G in S.
    """

    student: Tensor  # [..., L, D]
    teacher: Tensor  # [..., L, D']
    mask: Tensor | None  # [..., L], bool: the tokens that count; others may hold NaN
    scale: Number
    teacher_scale: Number
    heads: int  # into which both widths are split
    divergence: str  # "kl" or "mse"
    normalize: bool  # whether a token is divided by its length in each head
    causal: bool
    removed: str  # products below 0 that are 0 in "mse": "", "both" or "teacher", as gram_anchoring


solve = Op(TokenRelations, trained=("student",), per_example=-2)


# ----------------------------------------------------------------------------------------- checks


def _check_tokens(student: Any, teacher: Any, mask: Any, names: Sequence[str], one: str) -> None:
    """Raise an error unless both are [B, L, D] of the same B and L, and the mask is [B, L]."""
    for name, x in zip(names, (student, teacher), strict=True):
        form = f"the shape [B, L, D], or [L, D] for one {one}, with D ≥ 1"
        padded = "padded sequences, .to_padded_tensor(0), and their mask"
        _checks.floats(name, x, f"a tensor of {form}", "features", padded)
        if x.ndim not in (2, 3) or not x.shape[-1]:
            way = ": a feature map [B, C, H, W] is .flatten(2).mT" if x.ndim == 4 else ""
            raise ValueError(f"{name} needs {form}, got {_checks.shape(x)}{way}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{names[0]} and {names[1]} need the same tokens, one B and L, got "
            f"{_checks.shape(student)} and {_checks.shape(teacher)}: resize or pool one of them"
        )
    _checks.same_device(**dict(zip(names, (student, teacher), strict=True)))
    _checks.constant_teacher(**{names[1]: teacher})
    if mask is not None:
        check_mask(mask, student, names[0])


def check_mask(mask: Any, student: Tensor, name: str) -> None:
    """Raise an error unless the mask has a bool, or 1 or 0, for each token."""
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"mask must be a tensor of bool, or of 1 and 0, got {type(mask).__name__}: "
            "pass torch.tensor(mask)"
        )
    _checks.one_piece("mask", mask, "a bool for each token, [B, L]")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"mask must be of bool, or of the integers 1 and 0, got {mask.dtype}: an additive mask "
            "of 0 and −inf is mask == 0, one of ones and zeros mask.bool()"
        )
    if mask.shape != student.shape[:-1]:
        raise ValueError(
            f"mask needs a bool for each token of {name}: the shape {[*student.shape[:-1]]}, got "
            f"{_checks.shape(mask)}"
        )
    _checks.same_device(**{name: student, "mask": mask})


def _check_heads(student: Tensor, teacher: Tensor, heads: Any, name: str = "heads") -> None:
    _option_checks.at_least_1(**{name: heads})
    widths = student.shape[-1], teacher.shape[-1]
    # a module checks its options with an empty batch, the width of which says nothing
    if student.numel() and any(width % heads for width in widths):
        raise ValueError(
            f"{name} must divide the widths of student and teacher, {widths[0]} and {widths[1]}, "
            f"got {heads}: pass a divisor of {math.gcd(*widths)}"
        )


def check(
    student: Tensor,
    teacher: Tensor,
    *,
    heads: int,
    normalize: bool,
    temperature: Number | None,
    student_temperature: Number | None,
    teacher_temperature: Number | None,
    divergence: str,
    causal: bool,
    mask: Tensor | None,
) -> None:
    """Raise an error for tokens that do not fit together and options out of range."""
    _check_tokens(student, teacher, mask, ("student", "teacher"), "sequence")
    _check_heads(student, teacher, heads)
    temperatures = dict(
        temperature=temperature,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    for name, value in temperatures.items():
        if value is not None:
            _option_checks.temperature(value, name)
    _option_checks.one_of(("kl", "mse"), divergence=divergence)


def check_minilm(
    student_qkv: Sequence[Tensor],
    teacher_qkv: Sequence[Tensor],
    *,
    n_heads: int,
    weights: Sequence[Number] | None,
    causal: bool,
    mask: Tensor | None,
) -> None:
    """Raise an error for relations that do not fit together and options out of range."""
    for name, vectors in (("student_qkv", student_qkv), ("teacher_qkv", teacher_qkv)):
        if not isinstance(vectors, (list, tuple)):
            way = ""
            if isinstance(vectors, Tensor):
                way = f": pass ({name},) for one relation, {name}.unbind(0) or .chunk(3, -1)"
            raise TypeError(
                f"{name} must be a list or tuple of tensors [B, L, D], one for each relation, got "
                f"{type(vectors).__name__}{way}"
            )
    if len(student_qkv) != len(teacher_qkv) or not len(student_qkv):
        raise ValueError(
            "student_qkv and teacher_qkv need one tensor for each relation, one at least, got "
            f"{len(student_qkv)} and {len(teacher_qkv)}"
        )
    first = student_qkv[0]
    for i, (student, teacher) in enumerate(zip(student_qkv, teacher_qkv, strict=True)):
        names = f"student_qkv[{i}]", f"teacher_qkv[{i}]"
        _check_tokens(student, teacher, mask, names, "sequence")
        _check_heads(student, teacher, n_heads, "n_heads")
        if student.shape[:-1] != first.shape[:-1]:
            raise ValueError(
                f"all relations need the same tokens, one B and L, got {_checks.shape(first)} in "
                f"student_qkv[0] and {_checks.shape(student)} in {names[0]}"
            )
    if weights is not None:
        if not isinstance(weights, (list, tuple)) or (
            len(weights) != len(student_qkv) and first.numel()
        ):
            raise ValueError(
                f"weights need a number for each of {len(student_qkv)} relations, got {weights!r}"
            )
        for weight in weights:
            _option_checks.at_least_0(weights=weight)


def check_anchoring(
    student: Tensor,
    teacher: Tensor,
    *,
    remove_negative: str | None,
    per_image: bool,
    mask: Tensor | None,
) -> None:
    """Raise an error for patches that do not fit together and options out of range."""
    _check_tokens(student, teacher, mask, ("student", "teacher"), "image")
    if remove_negative not in ("both", "teacher", None):
        raise ValueError(
            f'remove_negative must be "both", "teacher" or None, got {remove_negative!r}'
        )


def check_cka(student: Tensor, teacher: Tensor, *, center: bool, mask: Tensor | None) -> None:
    """Raise an error for features that do not fit together."""
    _check_tokens(student, teacher, mask, ("student", "teacher"), "example")


# ------------------------------------------------------------------------------------- statements


def relation(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    *,
    heads: int,
    normalize: bool,
    temperature: Number | None,
    student_temperature: Number | None,
    teacher_temperature: Number | None,
    divergence: str,
    causal: bool,
    mask: Tensor | None,
) -> Any:
    """Solve for the loss of each sequence."""
    of_student = temperature if student_temperature is None else student_temperature
    of_teacher = temperature if teacher_temperature is None else teacher_temperature
    problem = TokenRelations(
        student=student,
        teacher=teacher,
        mask=_counted(as_bool(mask), call.row_mask, student),
        scale=_scale(of_student, student, heads),
        teacher_scale=_scale(of_teacher, teacher, heads),
        heads=heads,
        divergence=divergence,
        normalize=normalize,
        causal=causal,
        removed="",
    )
    return of_sequences(solve(call.engine, problem), as_bool(mask))


def minilm(
    call: Call,
    student_qkv: Sequence[Tensor],
    teacher_qkv: Sequence[Tensor],
    *,
    n_heads: int,
    weights: Sequence[Number] | None,
    causal: bool,
    mask: Tensor | None,
) -> Tensor:
    """Solve for the loss of each sequence in each relation, add them up, and take the mean."""
    is_counted = _counted(as_bool(mask), call.row_mask, student_qkv[0])
    if compute_dtype(*student_qkv, *teacher_qkv) == torch.float64:  # which one relation makes all
        teacher_qkv = [x.double() for x in teacher_qkv]
    losses = []
    for student, teacher in zip(student_qkv, teacher_qkv, strict=True):
        scale, teacher_scale = (_scale(None, x, n_heads) for x in (student, teacher))
        problem = TokenRelations(
            student, teacher, is_counted, scale, teacher_scale, n_heads, "kl", False, causal, ""
        )
        losses.append(solve(call.engine, problem))
    return mean_of_sequences(weighted_sum(losses, weights), as_bool(mask))


def anchoring(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    *,
    remove_negative: str | None,
    per_image: bool,
    mask: Tensor | None,
) -> Tensor:
    """Solve for the loss of each image, or of the batch as one image, and take the mean."""
    mask = as_bool(mask)
    if not per_image:
        student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
        mask = None if mask is None else mask.flatten()
    removed = remove_negative or ""
    problem = TokenRelations(student, teacher, mask, 1.0, 1.0, 1, "mse", True, False, removed)
    return mean_of_sequences(solve(call.engine, problem), mask)


def _counted(mask: Tensor | None, row_mask: Tensor | None, student: Tensor) -> Tensor | None:
    """Return which tokens count, in sequences of weight 0 none."""
    if row_mask is None:
        return mask
    if mask is None:
        return row_mask.unsqueeze(-1).expand(student.shape[:-1])
    return mask & row_mask.unsqueeze(-1)


def _scale(temperature: Number | None, vectors: Tensor, heads: int) -> Number:
    """Return 1 / T; None is the root of the width of a head."""
    return (heads / vectors.shape[-1]) ** 0.5 if temperature is None else 1 / temperature


# ----------------------------------------------------------- what formulas and statements share


@overload
def as_bool(mask: Tensor) -> Tensor: ...
@overload
def as_bool(mask: Tensor | None) -> Tensor | None: ...
def as_bool(mask: Tensor | None) -> Tensor | None:
    """Return a mask of integers as one of bool."""
    return mask if mask is None or mask.dtype == torch.bool else mask != 0


def of_sequences(losses: Tensor, mask: Tensor | None) -> Any:
    """Return the losses of sequences; with a mask those without a token are no examples."""
    return losses if mask is None else [Term(1.0, losses, mask.any(-1))]


def mean_of_sequences(losses: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the sequences, or images, with a token that counts."""
    return reduce(losses, None, None, None if mask is None else mask.any(-1).sum(), "mean")


def weighted_sum(losses: Sequence[Tensor], factors: Sequence[Number] | None) -> Tensor:
    """Return Σ factor · loss without those of factor 0; without factors all are 1."""
    factors = [1.0] * len(losses) if factors is None else factors
    kept = [
        loss if type(factor) is float and factor == 1 else factor * loss
        for factor, loss in zip(factors, losses, strict=True)
        if isinstance(factor, Tensor) or factor
    ]
    return sum(kept[1:], kept[0]) if kept else losses[0] * 0
