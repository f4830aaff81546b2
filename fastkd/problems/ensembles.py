"""Rows of softmax probabilities against those of several teachers together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._loss import Call
from fastkd._op import Number, Op, Tensors
from fastkd._precision import compute_dtype
from fastkd.problems import _temperatures, rows


class Ensemble(NamedTuple):
    """The divergence of each row from what K teachers say together, scale · D(p, q).

    With p_k = softmax(teachers[k] / teacher_temperature) and q = softmax(student /
    student_temperature) p is, as `combine` says: "mixture", Σ w_k p_k / Σ w_k; "logits", the
    softmax of Σ w_k teachers[k]; "chosen", p_k of the row's own k, NaN where that is none of them.
    "sum" has Σ w_k D(p_k, q) in place of D(p, q). A weight of 0 counts for nothing.
    """

    student: Tensor  # (..., V)
    teachers: Tensors  # K of (..., V)
    teacher_weights: Tensor | None  # (..., K), None for 1/K
    teacher_index: Tensor | None  # (...), of "chosen"
    row_mask: Tensor | None  # (...), bool: rows that count
    student_temperature: Number
    teacher_temperature: Number
    weight: Number  # the divergence's own option: beta, skew or weight
    scale: Number  # multiplies the divergence
    divergence: str
    combine: str
    row_weight: Number = 0.0  # as in `Rows`


solve = Op(
    Ensemble,
    trained=("student",),
    per_example=True,
    recomputes=True,
    keeps_strides=True,
)

COMBINATIONS = ("mixture", "logits", "sum")


def compute_dtype_of(problem: Ensemble) -> torch.dtype:
    """Return float64 if a tensor of the problem is float64, else float32."""
    given = problem.student, *problem.teachers, problem.teacher_weights
    return compute_dtype(*(x for x in given if x is not None))


def weights_of_rows(problem: Ensemble) -> Sequence[Number]:
    """Return each teacher's weights, [N, 1] or one number; those of "mixture" add up to 1."""
    n_rows, n = problem.student.shape[:-1].numel(), len(problem.teachers)
    if problem.teacher_weights is None:
        return [1 / n] * n
    weights = problem.teacher_weights.reshape(n_rows, n, 1).to(compute_dtype_of(problem))
    if problem.row_mask is not None:  # a row that does not count may hold anything
        weights = torch.where(problem.row_mask.reshape(n_rows, 1, 1), weights, 1)
    if problem.combine == "mixture":
        weights = weights / weights.sum(1, keepdim=True)
    return weights.unbind(1)


def check(
    student: Tensor,
    teachers: Sequence[Tensor],
    *,
    teacher_weights: Any,
    combine: str,
    teacher_index: Tensor | None,
    divergence: str,
    beta: Number,
    skew: Number,
    weight: Number,
    **softening: Any,
) -> None:
    """Raise an error for logits that do not fit together and options out of range."""
    check_teachers(teachers)
    if not isinstance(divergence, str) or divergence not in rows.DIVERGENCES:
        known = ", ".join(rows.DIVERGENCES)
        raise ValueError(f"divergence must be one of {known}, got {divergence!r}")
    _option_checks.one_of(COMBINATIONS, combine=combine)
    options = dict(beta=beta, skew=skew, weight=weight)
    own: dict[str, Any] = {name: options[name] for name in [rows.OPTIONS.get(divergence)] if name}
    for name in ("temperature", "student_temperature", "teacher_temperature"):
        if softening.get(name) is not None:
            _option_checks.temperature(softening[name], name)
    for k, teacher in enumerate(teachers):
        try:
            rows.check(student, teacher, **softening, **own)
        except (TypeError, ValueError) as error:
            if k == 0:
                raise
            raise type(error)(f"the teacher teachers[{k}]: {error}") from None
    if teacher_index is not None:
        _check_index(teacher_index, student, len(teachers), teacher_weights)
    if teacher_weights is not None:
        check_weights(teacher_weights, len(teachers), student, combine)


def check_teachers(teachers: Any) -> None:
    """Raise an error unless there is a sequence of at least one teacher."""
    if isinstance(teachers, Tensor):
        raise TypeError(
            f"teachers must be a list or tuple of K tensors (..., V), got a tensor "
            f"{_checks.shape(teachers)}: pass [teacher] of one, teachers.unbind() of several"
        )
    if not isinstance(teachers, (list, tuple)):
        raise TypeError(
            f"teachers must be a list or tuple of K tensors (..., V), got {type(teachers).__name__}"
        )
    if not teachers:
        raise ValueError("teachers is empty: pass the logits of at least one teacher")


def _check_index(index: Any, student: Tensor, n_teachers: int, weights: Any) -> None:
    if weights is not None:
        raise ValueError(
            "got teacher_index and teacher_weights: an index gives each row to one teacher, "
            "weights to all of them; drop one of the two"
        )
    is_integer = isinstance(index, Tensor) and not (
        index.is_floating_point() or index.is_complex() or index.dtype == torch.bool
    )
    if not is_integer or index.shape != student.shape[:-1]:
        got = f"{_checks.shape(index)} of {index.dtype}" if isinstance(index, Tensor) else index
        raise ValueError(
            f"teacher_index needs one whole number for each row: a tensor of integers of shape "
            f"{[*student.shape[:-1]]}, got {got}"
        )
    _checks.same_device(student_logits=student, teacher_index=index)
    # on a GPU this look at the values would be a host sync; there such a row gives a NaN
    if not _checks.has_values_at_hand(index) or not index.numel():
        return
    lowest, highest = (x.item() for x in index.aminmax())
    if lowest < 0 or highest >= n_teachers:
        raise ValueError(
            f"teacher_index must lie in [0, {n_teachers}), the places of the teachers, got "
            f"{lowest if lowest < 0 else highest}; rows without a teacher get weights=0"
        )


def check_weights(weights: Any, n_teachers: int, student: Tensor, combine: str = "mixture") -> None:
    """Raise an error unless there is a weight for each teacher, or one for each and each row."""
    if isinstance(weights, (list, tuple)) and not any(isinstance(x, str) for x in weights):
        weights = torch.as_tensor(weights)
    is_tensor = isinstance(weights, Tensor)
    shapes = (n_teachers,), (*student.shape[:-1], n_teachers)
    if not is_tensor or weights.is_complex() or weights.shape not in shapes:
        got = _checks.shape(weights) if is_tensor else type(weights).__name__
        raise ValueError(
            f"teacher_weights need one number for each of {n_teachers} teachers, [K], or for each "
            f"row too, (..., K), got {got}"
        )
    if weights.requires_grad:
        _checks.constant_teacher(teacher_weights=weights)
    # a row that does not count may hold anything
    if weights.ndim == 1 and _checks.has_values_at_hand(weights):
        needs_one = combine == "mixture" and not weights.sum() > 0
        if not (weights >= 0).all() or needs_one:
            raise ValueError(
                "teacher_weights must be at least 0"
                + (", and one of them above in a mixture" if combine == "mixture" else "")
                + f", got {weights.tolist()}"
            )


def of_each_row(weights: Any, n_teachers: int, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the teachers' weights in each row (..., K), as constants, numbers in this dtype."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        weights = stacked(weights, like, dtype)
    return weights.detach().expand(*like.shape[:-1], n_teachers)


def stacked(numbers: Sequence[Number], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers, some of which may be tensors, as a tensor [K] of this dtype."""
    # made on the device, because a copy from the host would be a host sync
    return torch.stack([like.new_ones((), dtype=dtype) * x for x in numbers])


def multi_teacher(
    call: Call,
    student: Tensor,
    teachers: Sequence[Tensor],
    *,
    teacher_weights: Any,
    combine: str,
    teacher_index: Tensor | None,
    divergence: str,
    beta: Number,
    skew: Number,
    weight: Number,
    temperature: Number,
    student_temperature: Number | None,
    teacher_temperature: Number | None,
    scale_t2: bool,
) -> Tensor:
    """Solve for the divergence from what all teachers say together."""
    options = dict(beta=beta, skew=skew, weight=weight)
    own = ([options[name] for name in [rows.OPTIONS.get(divergence)] if name] or [0.0])[0]
    of_student, of_teacher = _temperatures.of_both(
        temperature, student_temperature, teacher_temperature
    )
    problem = Ensemble(
        student,
        tuple(teachers),
        of_each_row(teacher_weights, len(teachers), student, compute_dtype(student, *teachers)),
        teacher_index,
        call.row_mask,
        of_student,
        of_teacher,
        own,
        of_student * of_teacher if scale_t2 else 1.0,
        rows.limit_of(divergence, own),
        combine if teacher_index is None else "chosen",
        call.row_weight,
    )
    return solve(call.engine, problem)
