"""Rows of softmax probabilities against rows: divergences between the logits of two networks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._loss import Call
from fastkd._op import Number, Op
from fastkd._precision import compute_dtype
from fastkd._reduction import Term, selected, total, weight_of_rows
from fastkd.problems import softened
from fastkd.problems._temperatures import as_wide_as, is_trained_besides, of_both, of_rows
from fastkd.problems.softened import Softened


class Rows(NamedTuple):
    """The divergence of each row from the teacher's and, with labels, its cross-entropy.

    With p = softmax(teacher / teacher_temperature) and q = softmax(student / student_temperature)
    the losses of a row are scale · D(p, q) and −log softmax(student)[label].
    """

    student: Tensor  # (..., V)
    teacher: Tensor  # (..., V)
    # (...), class numbers, a negative one means no label; or (..., V), soft labels in any dtype
    labels: Tensor | None
    row_mask: Tensor | None  # (...), bool: rows that count in the divergence
    student_temperature: Number
    teacher_temperature: Number
    weight: Number  # the divergence's own option: beta, skew or weight
    scale: Number  # multiplies the divergence
    # "" for the cross-entropy alone; "weighted_soft_cross_entropy" is multiplied by 1 −
    # exp(−CE_s / CE_t), of the cross-entropies of both networks with the label, as a constant;
    # "normalized_soft_cross_entropy" adds cross-entropies, times the teacher's probability of it
    divergence: str
    # what the caller multiplies every divergence with before it adds them, 0 if that is not known;
    # an engine may make the gradient for this upstream gradient together with the losses
    row_weight: Number = 0.0
    # (...), a class number of each row that the divergence sets apart: p and q are those among the
    # other classes, and "decoupled_kl" adds how the class compares with the others
    apart: Tensor | None = None
    # whether the logits of each row are divided by their deviation + EPSILON besides
    standardized: bool = False
    # ε: the cross-entropy is with (1 − ε) labels + ε / V
    label_smoothing: Number = 0.0
    # (V,), what multiplies the term of each class in the cross-entropy
    class_weights: Tensor | None = None
    # whether the loss of each row is ce_scale · cross-entropy + share · divergence, the only one
    adds_cross_entropy: bool = False
    ce_scale: Number = 1.0
    share: Number = 1.0


solve = Op(
    Rows,
    trained=("student",),
    losses=(None, "labels"),
    per_example=True,
    shared=("class_weights",),
    recomputes=True,
    keeps_strides=True,
)

TEMPERATURES = ("temperature", "student_temperature", "teacher_temperature")  # of each row or all

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


def check(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Number,
    scale_t2: bool,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    teacher_form: str = "logits",
    standardize: bool = False,
    teacher_gradient: bool = False,
    **fraction: Number,
) -> None:
    """Raise an error for logits that do not fit together and options out of range."""
    _option_checks.yes_or_no(standardize=standardize, teacher_gradient=teacher_gradient)
    _checks.logits(student, teacher, teacher_is_constant=not teacher_gradient)
    for name, value in (
        ("temperature", temperature),
        ("student_temperature", student_temperature),
        ("teacher_temperature", teacher_temperature),
    ):
        if value is not None:
            _option_checks.temperature_of_rows(value, name, student)
    if teacher_form != "logits":
        _option_checks.one_of(FORMS, teacher_form=teacher_form)
        _checks.probabilities(teacher, teacher_form)
    if teacher_gradient and teacher_form == "probabilities":
        raise ValueError(
            'teacher_gradient=True needs logits or teacher_form="log_probabilities", got '
            'teacher_form="probabilities", whose logarithms have no gradient at 0: pass '
            "teacher_logits as they are before the softmax"
        )
    if fraction:
        _option_checks.fraction(**fraction)


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
            _option_checks.fraction(alpha=alpha)
        except ValueError as error:
            raise ValueError(
                f"{error}; with distill_weight, D's own, any number of at least 0"
            ) from None
    else:
        _option_checks.at_least_0(alpha=alpha, distill_weight=distill_weight)
    options = dict(beta=beta, skew=skew, weight=weight)
    own: dict[str, Any] = {name: options[name] for name in [OPTIONS.get(divergence)] if name}
    check(student, teacher, **softening, **own)
    _option_checks.fraction(label_smoothing=label_smoothing)
    if class_weights is not None:
        _checks.class_weights(class_weights, student)
    if is_soft(labels, student):
        _checks.soft_labels(labels, student)
    else:
        _checks.labels(labels, student, ignore_index)


def as_logits(teacher: Tensor, form: str, *beside: Tensor) -> Tensor:
    """Return logits with these probabilities, whose logarithms are logits already.

    They are taken in the compute dtype of the teacher and of what stands `beside` it.
    """
    if form != "probabilities":
        return teacher
    return teacher.detach().to(compute_dtype(teacher, *beside)).log()


def is_soft(labels: Any, logits: Tensor) -> bool:
    """Return whether the labels are probabilities of classes and not their numbers."""
    return isinstance(labels, Tensor) and labels.is_floating_point() and labels.ndim == logits.ndim


def is_exactly(number: Number, value: float) -> bool:
    """Return whether a number is that value; a tensor is not looked at, which is a host sync."""
    return not isinstance(number, Tensor) and number == value


def absolute(x: Tensor) -> Tensor:
    """Return |x|, of which the derivative of torch.abs would be 0 where x is NaN."""
    return x * torch.where(x.isnan(), x, x.sign())


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
    teacher = as_wide_as((temperature,), teacher)
    if isinstance(temperature, Tensor):  # a narrower dtype than that of the logits would round 1/T²
        temperature = temperature.to(compute_dtype(student, teacher))
    scale = 1.0 if scale_t2 else 1 / temperature**2
    after = isinstance(scale, Tensor) and (scale.ndim > 0 or scale.requires_grad)
    problem = Rows(
        student, teacher, None, call.row_mask, 1.0, 1.0, 0.0, 1.0 if after else scale, "logit_mse"
    )
    losses, _ = solve(call.engine, problem)
    return selected(losses * scale, call.row_mask) if after else losses


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
) -> Any:
    """Solve for the cross-entropy with the labels and for a divergence, in one pass."""
    teacher = as_wide_as([softening[name] for name in TEMPERATURES], teacher)
    options = dict(beta=beta, skew=skew, weight=weight)
    own: dict[str, Any] = {name: options[name] for name in [OPTIONS.get(divergence)] if name}
    share = 1 - alpha if distill_weight is None else distill_weight
    if class_weights is not None:
        class_weights = class_weights.detach().to(compute_dtype(student, teacher))
    mask, labelled, counts = call.row_mask, None, None
    row_weight: Number = 0.0
    if is_soft(labels, student):
        labels = labels.detach()
    else:
        labels, mask, labelled = counted(call, labels, ignore_index)
        if class_weights is not None:
            counts = class_weights[labels.clamp(min=0)]
    if labelled is None or not distill_ignored:
        row_weight = weight_of_sum(call, student, teacher, mask)
        # written out, because old compilers do not trace _replace
        call = Call(call.name, call.engine, mask, call.ranks, row_weight, call.reduction)
    if row_weight:
        losses = _sum_of_both(
            call, divergence, student, teacher, alpha, share, softening | own, labels,
            label_smoothing, class_weights, counts,
        )  # fmt: skip
        if losses is not None:
            return [Term(1.0, losses, labelled)]
    losses, cross_entropies = _solve(
        call, divergence, student, teacher, labels, label_smoothing=label_smoothing,
        class_weights=class_weights, **softening, **own,
    )  # fmt: skip
    if losses is NotImplemented:
        return NotImplemented
    distilled = None if distill_ignored else labelled
    return [Term(alpha, cross_entropies, labelled, counts), Term(share, losses, distilled)]


def _sum_of_both(
    call: Call,
    divergence: str,
    student: Tensor,
    teacher: Tensor,
    alpha: Number,
    share: Number,
    options: dict[str, Any],
    labels: Tensor,
    label_smoothing: Number,
    class_weights: Tensor | None,
    counts: Tensor | None,
) -> Tensor | None:
    """Return α · cross-entropy + share · divergence, of which the forward makes one gradient.

    Return None if one of them has no share, which wins over an infinite term.
    """
    asked = call.reduction
    if asked is None or is_exactly(alpha, 0) or is_exactly(share, 0):
        return None
    if counts is not None and asked.reduction == "mean" and asked.normalizer is None:
        # the mean of the cross-entropies has a divisor of its own
        of_all = total(selected(counts, call.row_mask))
        if _checks.has_values_at_hand(of_all):
            alpha = alpha / ((of_all.item() or 1.0) * call.row_weight)
        else:
            alpha = alpha / (torch.where(of_all == 0, 1, of_all) * call.row_weight)
    losses, _ = _solve(
        call, divergence, student, teacher, labels, label_smoothing=label_smoothing,
        class_weights=class_weights, share=share, ce_scale=alpha, **options,
    )  # fmt: skip
    return None if losses is NotImplemented else losses


def weight_of_counted(call: Call, logits: Tensor, mask: Tensor | None) -> Number:
    """Return what the losses of all rows in the mask are multiplied by, 0 if that is not known."""
    if mask is call.row_mask:
        return call.row_weight
    asked = call.reduction
    if asked is None or (asked.weights is not None and asked.weights.dtype != torch.bool):
        return 0.0
    if mask is not None and call.engine != "portable":  # on a GPU nobody counts its rows
        return 0.0
    return weight_of_rows(logits, mask, asked.normalizer, asked.reduction)


def weight_of_sum(call: Call, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Number:
    """Return that weight where an engine adds cross-entropies to the losses, and 0 elsewhere.

    It has the gradient of the sum alone, which in a narrower dtype would have no room for it.
    """
    is_apart = call.reduction is None or call.reduction.return_parts
    if is_apart or call.engine != "portable" or student.dtype != compute_dtype(student, teacher):
        return 0.0
    return weight_of_counted(call, student, mask)


def with_smoothing(soft: Tensor, label_smoothing: Number, class_weights: Tensor | None) -> Tensor:
    """Return w · ((1 − ε) t + ε / V) of soft labels t, what is multiplied by −log q."""
    soft = soft.detach()
    if not is_exactly(label_smoothing, 0):
        soft = soft * (1 - label_smoothing) + label_smoothing / soft.shape[-1]
    return soft if class_weights is None else soft * class_weights.detach().to(soft)


def smoothed(losses: Tensor, of_all: Tensor, label_smoothing: Number) -> Tensor:
    """Return (1 − ε) · losses + ε · the mean of those with all classes.

    A share of 0, which a tensor may hold too, leaves nothing of an infinite loss.
    """
    smooth = torch.zeros_like(losses) + label_smoothing
    sharp = 1 - smooth
    return selected(sharp * losses, sharp != 0) + selected(smooth * of_all, smooth != 0)


def counted(
    call: Call, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return labels that are negative where no row counts, the row mask, and which are labelled.

    The masks are None where all rows count, and where all have a label.
    """
    labels, mask = labels.long(), call.row_mask  # −100 is 156 in uint8
    labelled = None if _checks.all_labelled(labels, ignore_index) else labels != ignore_index
    if labelled is not None:
        mask = labelled if mask is None else labelled & mask
    if mask is not None:
        labels = labels.masked_fill(~mask, -1)
    return labels, mask, labelled


def classes_of(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return which rows have a label, and the classes, 0 where there is none."""
    labels = labels.long()  # −100 is 156 in uint8
    labelled = labels != ignore_index
    return labelled, torch.where(labelled, labels, 0)


def label_cross_entropies(
    call: Call,
    logits: Tensor,
    labels: Tensor,
    smoothing: Number = 0.0,
    class_weights: Tensor | None = None,
    *,
    beside: Tensor,
) -> Tensor:
    """Return the cross-entropy of each row with its label, 0 for a class that is negative.

    It is in the compute dtype of these logits and of the other network's, which stand `beside`.
    """
    if class_weights is not None:
        class_weights = class_weights.to(compute_dtype(logits, beside))
    problem = Rows(
        logits, beside.detach(), labels, call.row_mask if labels.is_floating_point() else None,
        1.0, 1.0, 0.0, 1.0, "", 0.0, None, False, smoothing, class_weights,
    )  # fmt: skip
    _, cross_entropies = solve(call.engine, problem)
    return cross_entropies


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
    standardize: bool = False,
    teacher_gradient: bool = False,
    label_smoothing: Number = 0.0,
    class_weights: Tensor | None = None,
    share: Number = 1.0,
    ce_scale: Number | None = None,
    **own: Number,
) -> tuple[Any, Any]:
    mixture = (*own.values(), 0.0)[0]
    name = limit_of(name, mixture)
    of_student, of_teacher = of_both(temperature, student_temperature, teacher_temperature)
    scale = of_student * of_teacher if scale_t2 else 1.0
    teacher = as_wide_as((temperature, of_student, of_teacher), teacher)
    if teacher_form != "logits":
        teacher = as_logits(teacher, teacher_form, student)
    if is_trained_besides(of_student, of_teacher, teacher if teacher_gradient else None):
        if standardize or ce_scale is not None:
            return NotImplemented, NotImplemented
        if not teacher_gradient:
            teacher = teacher.detach()
        dtype = compute_dtype(student, teacher)
        own_student, own_teacher = (
            of_rows(x, student, dtype, call.row_mask) for x in (of_student, of_teacher)
        )
        losses = softened.solve(
            call.engine,
            Softened(student, teacher, own_student, own_teacher, call.row_mask, mixture, name),
        )
        if scale_t2:
            losses = losses * (own_student * own_teacher)
        of_labels = None
        if labels is not None:
            of_labels = label_cross_entropies(
                call, student, labels, label_smoothing, class_weights, beside=teacher
            )
        return losses, of_labels
    problem = Rows(
        student, teacher, labels, call.row_mask, of_student, of_teacher, mixture, scale, name,
        call.row_weight, None, standardize, label_smoothing, class_weights,
        ce_scale is not None, 1.0 if ce_scale is None else ce_scale, share,
    )  # fmt: skip
    return solve(call.engine, problem)
