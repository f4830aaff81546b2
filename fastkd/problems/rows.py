"""Rows of softmax probabilities against rows: divergences between the logits of two networks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastkd import _checks
from fastkd._loss import Call, Term
from fastkd._op import Number, Op
from fastkd._precision import compute_dtype


class Rows(NamedTuple):
    """The divergence of each row from the teacher's and, with labels, its cross-entropy.

    With p = softmax(teacher / teacher_temperature) and q = softmax(student / student_temperature)
    the losses of a row are scale · D(p, q) and −log softmax(student)[label].
    """

    student: Tensor  # (..., V)
    teacher: Tensor  # (..., V)
    labels: Tensor | None  # (...), class numbers; a negative one means no label
    row_mask: Tensor | None  # (...), bool: rows that count in the divergence
    student_temperature: Number
    teacher_temperature: Number
    weight: Number  # the divergence's own option: beta, skew or weight
    scale: Number  # multiplies the divergence
    divergence: str


solve = Op(Rows, trained=("student",), losses=(None, "labels"), per_example=True, recomputes=True)

# the name of the option that is `Rows.weight`
OPTIONS = {
    "jensen_shannon": "beta",
    "skew_kl": "skew",
    "skew_reverse_kl": "skew",
    "symmetric_kl": "weight",
}
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_kl",
    "skew_reverse_kl",
    "symmetric_kl",
    "total_variation",
    "soft_cross_entropy",
)
# with an option of exactly 0 or 1 these divergences are plain KLs
_LIMITS = {
    ("jensen_shannon", 0): "forward_kl",
    ("jensen_shannon", 1): "reverse_kl",
    ("skew_kl", 0): "forward_kl",
    ("skew_reverse_kl", 0): "reverse_kl",
    ("symmetric_kl", 0): "reverse_kl",
    ("symmetric_kl", 1): "forward_kl",
}


def check(
    student: Tensor, teacher: Tensor, *, temperature: Number, scale_t2: bool, **fraction: Number
) -> None:
    """Raise an error for logits that do not fit together and options out of range."""
    _checks.logits(student, teacher)
    _checks.temperature(temperature)
    if fraction:
        _checks.fraction(**fraction)


def check_kd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: Number,
    temperature: Number,
    divergence: str,
    scale_t2: bool,
    ignore_index: int,
    distill_ignored: bool,
    **options: Number,
) -> None:
    """Raise an error for logits and labels that do not fit together and options out of range."""
    if not isinstance(divergence, str) or divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    _checks.fraction(alpha=alpha)
    own = {name: options[name] for name in [OPTIONS.get(divergence)] if name}
    check(student, teacher, temperature=temperature, scale_t2=scale_t2, **own)
    _checks.labels(labels, student, ignore_index)


def is_exactly(number: Number, value: float) -> bool:
    """Return whether a number is that value; a tensor is not looked at, which is a host sync."""
    return not isinstance(number, Tensor) and number == value


def divergence(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Number,
    scale_t2: bool,
    **weight: Number,
) -> Tensor:
    """Solve for the divergence that the loss is named after."""
    losses, _ = _solve(call, call.name, student, teacher, None, temperature, scale_t2, weight)
    return losses


def logit_mse(
    call: Call, student: Tensor, teacher: Tensor, *, temperature: Number, scale_t2: bool
) -> Tensor:
    """Solve for the mean squared difference of logits."""
    if isinstance(temperature, Tensor):  # a narrower dtype than that of the logits would round 1/T²
        temperature = temperature.to(compute_dtype(student, teacher))
    scale = 1.0 if scale_t2 else 1 / temperature**2
    problem = Rows(student, teacher, None, call.row_mask, 1.0, 1.0, 0.0, scale, "logit_mse")
    losses, _ = solve(call.engine, problem)
    return losses


def kd(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: Number,
    temperature: Number,
    divergence: str,
    scale_t2: bool,
    ignore_index: int,
    distill_ignored: bool,
    **options: Number,
) -> list[Term]:
    """Solve for the cross-entropy with the labels and for a divergence, in one pass."""
    mask, labels = call.row_mask, labels.long()  # −100 is 156 in uint8
    labelled = None if _checks.all_labelled(labels, ignore_index) else labels != ignore_index
    if labelled is not None:
        mask = labelled if mask is None else labelled & mask
    if mask is not None:
        labels = labels.masked_fill(~mask, -1)
    if not distill_ignored:
        call = call._replace(row_mask=mask)
    weight = {name: options[name] for name in [OPTIONS.get(divergence)] if name}
    losses, cross_entropies = _solve(
        call, divergence, student, teacher, labels, temperature, scale_t2, weight
    )
    distilled = None if distill_ignored else labelled
    return [Term(alpha, cross_entropies, labelled), Term(1 - alpha, losses, distilled)]


def _solve(
    call: Call,
    name: str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: Number,
    scale_t2: bool,
    weight: dict[str, Number],
) -> tuple[Tensor, Tensor]:
    mixture = next(iter(weight.values()), 0.0)
    # only numbers that are a limit are looked up, otherwise torch.compile would specialise on them
    if is_exactly(mixture, 0) or is_exactly(mixture, 1):
        name = _LIMITS.get((name, mixture), name)  # type: ignore[arg-type]
    scale = temperature**2 if scale_t2 else 1.0
    problem = Rows(
        student, teacher, labels, call.row_mask, temperature, temperature, mixture, scale, name
    )
    return solve(call.engine, problem)
