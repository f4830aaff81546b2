"""Rows of softmax probabilities against rows: divergences between the logits of two networks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import _checks
from fastkd._loss import Call
from fastkd._op import Number, Op
from fastkd._precision import compute_dtype
from fastkd._reduction import Term, selected


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
    # what the caller multiplies every divergence with before it adds them, 0 if that is not known;
    # an engine may make the gradient for this upstream gradient together with the losses
    row_weight: Number = 0.0


solve = Op(
    Rows,
    trained=("student",),
    losses=(None, "labels"),
    per_example=True,
    recomputes=True,
    keeps_strides=True,
)

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


FORMS = ("logits", "probabilities", "log_probabilities")
# what to do where each row has a temperature of its own
_DIVIDED = (
    'divide by it: {}, of shape (..., 1), with reduction="none", and multiply what comes back by {}'
)
_OF_EACH_ROW = {
    "temperature": _DIVIDED.format(
        "student_logits / temperature and teacher_logits / temperature",
        "temperature.squeeze(-1) ** 2",
    ),
    **{
        f"{network}_temperature": _DIVIDED.format(
            f"{network}_logits / {network}_temperature", f"{network}_temperature.squeeze(-1)"
        )
        for network in ("student", "teacher")
    },
}
_OF_EACH_ROW_OF_KD = {
    name: "write alpha * F.cross_entropy(student_logits, labels) + (1 - alpha) * a divergence such "
    f"as fastkd.forward_kl, and for that {way}"
    for name, way in _OF_EACH_ROW.items()
}


def check(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Number,
    scale_t2: bool,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    teacher_form: str = "logits",
    of_each_row: dict[str, str] = _OF_EACH_ROW,
    **fraction: Number,
) -> None:
    """Raise an error for logits that do not fit together and options out of range."""
    _checks.logits(student, teacher)
    _checks.temperature(temperature, "temperature", of_each_row["temperature"])
    if student_temperature is not None:
        name = "student_temperature"
        _checks.temperature(student_temperature, name, of_each_row[name])
    if teacher_temperature is not None:
        name = "teacher_temperature"
        _checks.temperature(teacher_temperature, name, of_each_row[name])
    if teacher_form != "logits":
        _checks.one_of(FORMS, teacher_form=teacher_form)
        _checks.probabilities(teacher, teacher_form)
    if fraction:
        _checks.fraction(**fraction)


def check_kd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: Number,
    distill_weight: Number | None,
    divergence: str,
    ignore_index: int,
    distill_ignored: bool,
    beta: Number,
    skew: Number,
    weight: Number,
    label_smoothing: Number,
    class_weights: Tensor | None,
    **softening: Any,
) -> None:
    """Raise an error for logits and labels that do not fit together and options out of range."""
    if not isinstance(divergence, str) or divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if distill_weight is None:
        try:
            _checks.fraction(alpha=alpha)
        except ValueError as error:
            raise ValueError(
                f"{error}; with distill_weight, D's own, any number of at least 0"
            ) from None
    else:
        _checks.at_least_0(alpha=alpha, distill_weight=distill_weight)
    options = dict(beta=beta, skew=skew, weight=weight)
    own: dict[str, Any] = {name: options[name] for name in [OPTIONS.get(divergence)] if name}
    check(student, teacher, of_each_row=_OF_EACH_ROW_OF_KD, **softening, **own)
    _checks.fraction(label_smoothing=label_smoothing)
    if class_weights is not None:
        _checks.class_weights(class_weights, student)
    if is_soft(labels, student):
        _checks.soft_labels(labels, student)
    else:
        _checks.labels(labels, student, ignore_index)


def temperatures(
    temperature: Number, student_temperature: Number | None, teacher_temperature: Number | None
) -> tuple[Number, Number]:
    """Return the temperatures of student and teacher, T where they have none of their own."""
    return (
        temperature if student_temperature is None else student_temperature,
        temperature if teacher_temperature is None else teacher_temperature,
    )


def as_logits(teacher: Tensor, form: str) -> Tensor:
    """Return logits with these probabilities, whose logarithms are logits already."""
    if form != "probabilities":
        return teacher
    return teacher.detach().to(compute_dtype(teacher)).log()


def is_soft(labels: Any, logits: Tensor) -> bool:
    """Return whether the labels are probabilities of classes and not their numbers."""
    return isinstance(labels, Tensor) and labels.is_floating_point() and labels.ndim == logits.ndim


def is_exactly(number: Number, value: float) -> bool:
    """Return whether a number is that value; a tensor is not looked at, which is a host sync."""
    return not isinstance(number, Tensor) and number == value


def limit_of(divergence: str, option: Number) -> str:
    """Return the name of the divergence that one with this option is."""
    # only numbers that are a limit are looked up, otherwise torch.compile would specialise on them
    if is_exactly(option, 0) or is_exactly(option, 1):
        return _LIMITS.get((divergence, option), divergence)  # type: ignore[arg-type]
    return divergence


def divergence(call: Call, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """Solve for the divergence that the loss is named after."""
    losses, _ = _solve(call, call.name, student, teacher, None, **options)
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
    distill_weight: Number | None,
    divergence: str,
    ignore_index: int,
    distill_ignored: bool,
    beta: Number,
    skew: Number,
    weight: Number,
    label_smoothing: Number,
    class_weights: Tensor | None,
    **softening: Any,
) -> list[Term]:
    """Solve for the cross-entropy with the labels and for a divergence.

    Both take one pass, but for soft, smoothed and weighted labels, which have one more.
    """
    options = dict(beta=beta, skew=skew, weight=weight)
    own: dict[str, Any] = {name: options[name] for name in [OPTIONS.get(divergence)] if name}
    share = 1 - alpha if distill_weight is None else distill_weight
    if is_soft(labels, student):
        losses, _ = _solve(call, divergence, student, teacher, None, **softening, **own)
        soft = labels.to(losses.dtype)
        target = with_smoothing(soft, label_smoothing, class_weights)
        return [
            Term(alpha, _cross_entropies(call, student, target), None),
            Term(share, losses, None),
        ]
    mask, labels = call.row_mask, labels.long()  # −100 is 156 in uint8
    labelled = None if _checks.all_labelled(labels, ignore_index) else labels != ignore_index
    if labelled is not None:
        mask = labelled if mask is None else labelled & mask
    if mask is not None:
        labels = labels.masked_fill(~mask, -1)
    of_labels = Call(call.name, call.engine, mask, call.ranks)
    if not distill_ignored:
        # written out, because old compilers do not trace _replace
        call = of_labels
    losses, cross_entropies = _solve(call, divergence, student, teacher, labels, **softening, **own)
    counts = None
    if class_weights is not None:
        class_weights = class_weights.detach().to(cross_entropies)
        counts = class_weights[labels.clamp(min=0)]
        cross_entropies = selected(cross_entropies * counts, counts != 0)
    if not is_exactly(label_smoothing, 0):
        each = class_weights
        if each is None:
            each = cross_entropies.new_ones(student.shape[-1])
        smooth = _cross_entropies(of_labels, student, each / len(each))
        cross_entropies = (1 - label_smoothing) * cross_entropies + label_smoothing * smooth
    distilled = None if distill_ignored else labelled
    return [Term(alpha, cross_entropies, labelled, counts), Term(share, losses, distilled)]


def with_smoothing(soft: Tensor, label_smoothing: Number, class_weights: Tensor | None) -> Tensor:
    """Return w · ((1 − ε) t + ε / V) of soft labels t, what is multiplied by −log q."""
    soft = soft.detach()
    if not is_exactly(label_smoothing, 0):
        soft = soft * (1 - label_smoothing) + label_smoothing / soft.shape[-1]
    return soft if class_weights is None else soft * class_weights.detach().to(soft)


def _cross_entropies(call: Call, student: Tensor, target: Tensor) -> Tensor:
    """Solve for −Σ target · log q at T = 1, of targets (..., V) or (V,) of any sum."""
    total = target.sum(-1)
    # a row without a target has any distribution, so that it has no NaN
    teacher = torch.where((total == 0).unsqueeze(-1), 1, target).log_()
    problem = Rows(
        student, teacher.expand_as(student), None, call.row_mask, 1.0, 1.0, 0.0, 1.0,
        "soft_cross_entropy",
    )  # fmt: skip
    losses, _ = solve(call.engine, problem)
    # of masked rows, because their gradient, which is 0, is multiplied by it
    total = selected(total.expand_as(losses), call.row_mask)
    return selected(losses * total, total != 0)


def _solve(
    call: Call,
    name: str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    temperature: Number,
    student_temperature: Number | None,
    teacher_temperature: Number | None,
    teacher_form: str,
    scale_t2: bool,
    **own: Number,
) -> tuple[Tensor, Tensor]:
    mixture = (*own.values(), 0.0)[0]
    name = limit_of(name, mixture)
    of_student, of_teacher = temperatures(temperature, student_temperature, teacher_temperature)
    scale = of_student * of_teacher if scale_t2 else 1.0
    if teacher_form != "logits":
        teacher = as_logits(teacher, teacher_form)
    problem = Rows(
        student, teacher, labels, call.row_mask, of_student, of_teacher, mixture, scale, name,
        call.row_weight,
    )  # fmt: skip
    return solve(call.engine, problem)
