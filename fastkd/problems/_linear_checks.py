"""Checks of hidden states, heads and what belongs to them."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._op import Number
from fastkd.problems import rows

VOCABULARIES = ("same", "common", "pad")
# what to do where each position has a temperature of its own
_DIVIDED = (
    "divide both networks' hidden states by it, student_hidden / temperature[..., None] and "
    "teacher_hidden / temperature[..., None], where there is neither bias nor softcap nor alpha, "
    'with reduction="none", and multiply what comes back by temperature ** 2'
)


def check(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Any = None,
    teacher_weight: Any = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None,
    teacher_bias: Any,
    teacher_logits: Any,
    teacher_weights: Any,
    alpha: Number,
    temperature: Number,
    scale_t2: bool,
    divergence: Any,
    ignore_index: int,
    num_valid: int | None,
    vocab: Any,
    memory_budget: int | None,
    metrics: bool,
    **options: Any,
) -> None:
    """Raise an error for tensors that do not fit together and options out of range."""
    _hidden("student_hidden", student_hidden)
    _head("student", student_weight, student_bias, student_hidden)
    teachers = _teachers(
        teacher_hidden, teacher_weight, teacher_bias, teacher_logits, student_hidden
    )
    _check_options(divergence, temperature, alpha, num_valid, memory_budget, options)
    _option_checks.yes_or_no(metrics=metrics)
    _check_terms(alpha, labels, bool(teachers))
    n_classes = _check_vocabulary(vocab, len(student_weight), teachers, student_hidden.device)
    if labels is not None:
        logits = student_hidden[..., :1].expand(*student_hidden.shape[:-1], n_classes)
        if isinstance(labels, Tensor):
            _checks.same_device(student_hidden=student_hidden, labels=labels)
        _checks.labels(labels, logits, ignore_index)
    if teacher_weights is not None:
        _check_teacher_weights(teacher_weights, len(teachers), student_hidden)


def _hidden(name: str, hidden: Any) -> None:
    way = "the hidden states of all positions, .values() of a jagged tensor, for both networks"
    _checks.floats(name, hidden, "a tensor of shape (..., H)", "hidden states", way)
    if hidden.ndim < 2 or hidden.shape[-1] == 0:
        raise ValueError(
            f"{name} needs the shape (..., H) with H ≥ 1, the hidden states before the head, got "
            f"{_checks.shape(hidden)}"
        )


def _head(network: str, weight: Any, bias: Any, hidden: Tensor) -> None:
    """Raise an error unless a head [V, H] with its bias [V] takes the hidden states."""
    name = f"{network}_weight"
    for each, tensor in ((name, weight), (f"{network}_bias", bias)):
        if hasattr(tensor, "full_tensor"):
            raise TypeError(
                f"{each} is a DTensor, of which a rank holds a part: pass {each}.full_tensor(), "
                "which gathers the whole head on every rank, or call the loss inside the module's "
                "forward, where FSDP has gathered it"
            )
    if isinstance(weight, torch.nn.Module):
        raise TypeError(
            f"{name} must be a tensor of shape [V, H], got {type(weight).__name__}: pass its "
            f".weight, and its .bias as {network}_bias if it has one"
        )
    whole = f"{name} in one piece, as {network}.lm_head.weight is"
    _checks.floats(name, weight, "a tensor of shape [V, H]", "weights of a head", whole)
    if weight.ndim != 2 or not weight.numel() or weight.shape[1] != hidden.shape[-1]:
        turned = weight.ndim == 2 and weight.shape[0] == hidden.shape[-1]
        way = f"pass {name}.t()" if turned else f"is it the head of the {network}?"
        raise ValueError(
            f"{name} needs the shape [V, H] with H = {hidden.shape[-1]} of {network}_hidden "
            f"{_checks.shape(hidden)}, got {_checks.shape(weight)}: {way}"
        )
    _checks.same_device(**{f"{network}_hidden": hidden, name: weight})
    if bias is None:
        return
    name = f"{network}_bias"
    _checks.floats(name, bias, "a tensor of shape [V]", "biases", "the bias in one piece")
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name} needs the shape [{len(weight)}] of the entries of {network}_weight, got "
            f"{_checks.shape(bias)}"
        )
    _checks.same_device(**{f"{network}_weight": weight, name: bias})


def _teachers(
    hidden: Any, weight: Any, bias: Any, logits: Any, student: Tensor
) -> list[tuple[str, int]]:
    """Return where each teacher has its vocabulary, and its size."""
    if logits is not None:
        if hidden is not None or weight is not None or bias is not None:
            raise ValueError(
                "got teacher_logits and teacher_hidden, teacher_weight or teacher_bias: a teacher "
                "has logits, or hidden states and a head; drop one of them"
            )
        many = logits if isinstance(logits, (list, tuple)) else [logits]
        return [_logits(x, student) for x in many]
    if hidden is None and weight is None and bias is None:
        return []
    if hidden is None or weight is None:
        missing = "teacher_hidden" if hidden is None else "teacher_weight"
        raise ValueError(
            f"{missing} is missing: a teacher has hidden states and a head, teacher_hidden and "
            "teacher_weight, or teacher_logits"
        )
    if not any(isinstance(x, (list, tuple)) for x in (hidden, weight, bias)):
        hidden, weight, bias = [hidden], [weight], [bias]
    elif bias is None:
        bias = [None] * len(hidden)
    are_many = all(isinstance(x, (list, tuple)) for x in (hidden, weight, bias))
    if not are_many or not len(hidden) == len(weight) == len(bias) > 0:
        raise ValueError(
            "several teachers need a sequence of hidden states, one of heads and, where they have "
            "biases, one of those with None for none, all of one length of at least 1"
        )
    found = []
    for each, head, own in zip(hidden, weight, bias, strict=True):
        _hidden("teacher_hidden", each)
        if each.shape[:-1] != student.shape[:-1]:
            raise ValueError(
                f"student_hidden and teacher_hidden need the same positions, got "
                f"{_checks.shape(student)} and {_checks.shape(each)}: all but their last dimension "
                "must agree"
            )
        _checks.same_device(student_hidden=student, teacher_hidden=each)
        _head("teacher", head, own, each)
        if each.requires_grad:
            _checks.constant_teacher(teacher_hidden=each)
        found.append(("teacher_weight", len(head)))
    return found


def _logits(logits: Any, student: Tensor) -> tuple[str, int]:
    rows_of_all = "the logits of all positions"
    _checks.floats("teacher_logits", logits, "a tensor of shape (..., V)", "logits", rows_of_all)
    if logits.ndim == 0 or not logits.shape[-1] or logits.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_logits need the shape (..., V) for the positions of student_hidden "
            f"{_checks.shape(student)}, got {_checks.shape(logits)}"
        )
    _checks.same_device(student_hidden=student, teacher_logits=logits)
    if logits.requires_grad:
        _checks.constant_teacher(teacher_logits=logits)
    return "teacher_logits", logits.shape[-1]


def _check_options(
    divergence: Any,
    temperature: Number,
    alpha: Number,
    num_valid: int | None,
    memory_budget: int | None,
    options: Mapping[str, Any],
) -> None:
    is_many = isinstance(divergence, Collection) and not isinstance(divergence, str)
    names = list(divergence) if is_many else [divergence]
    if not names or any(name not in rows.DIVERGENCES for name in names):
        known = ", ".join(rows.DIVERGENCES)
        raise ValueError(
            f"divergence must be one of {known}, several of them, or a dict of them with their "
            f"weights, got {divergence!r}"
        )
    if len({*names}) != len(names):
        raise ValueError(f"divergence names one twice, got {divergence!r}: add up its weights")
    if isinstance(divergence, Mapping):
        _option_checks.at_least_0(**{f"divergence[{name!r}]": x for name, x in divergence.items()})
    _option_checks.temperature(temperature, "temperature", _DIVIDED)
    _option_checks.fraction(alpha=alpha)
    for name in names:
        if name in rows.OPTIONS:
            _option_checks.fraction(**{rows.OPTIONS[name]: options[rows.OPTIONS[name]]})
    for network in ("student", "teacher"):
        scale, softcap = options[f"{network}_logit_scale"], options[f"{network}_softcap"]
        if scale is not None:
            _option_checks.number(**{f"{network}_logit_scale": scale})
            way = "multiply the hidden states by one that is learnt, and the bias if there is one"
            _without_gradient(f"{network}_logit_scale", scale, way)
        if softcap is not None:
            _option_checks.number(0.0, **{f"{network}_softcap": softcap})
            way = "make the logits and pass them to fastkd.kd where it is learnt"
            _without_gradient(f"{network}_softcap", softcap, way)
    for name, value, least in (("num_valid", num_valid, 0), ("memory_budget", memory_budget, 1)):
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if value is not None and (not is_whole or value < least):
            raise ValueError(
                f"{name} must be a whole number of at least {least}, known on the host, got "
                f"{value!r}"
            )


def _without_gradient(name: str, value: Number, way: str) -> None:
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{name} must be a number or a tensor without gradient, got requires_grad=True: {way}"
        )


def _check_terms(alpha: Number, labels: Tensor | None, has_teacher: bool) -> None:
    if not has_teacher and not rows.is_exactly(alpha, 1):
        raise ValueError(
            f"got no teacher and alpha={alpha!r}: pass teacher_hidden with teacher_weight, or "
            "teacher_logits, or alpha=1.0 for the cross-entropy with labels alone"
        )
    if labels is None and not rows.is_exactly(alpha, 0):
        raise ValueError(
            f"alpha={alpha!r} weights a cross-entropy, which needs labels: pass them, or alpha=0.0"
        )


def _check_vocabulary(
    vocab: Any, n_student: int, teachers: Sequence[tuple[str, int]], device: torch.device
) -> int:
    """Return how many entries of the student's vocabulary labels may name."""
    if isinstance(vocab, str):
        _option_checks.one_of(VOCABULARIES, vocab=vocab)
        for name, size in teachers:
            if vocab == "same" and size != n_student:
                raise ValueError(
                    f"student_weight has {n_student} entries of a vocabulary and {name} {size}: if "
                    'one is the other with more entries at its end, pass vocab="common" for those '
                    'that both have, renormalised, or vocab="pad" to give the missing ones the '
                    "probability 0; otherwise vocab=ids, a tensor of the entries to compare"
                )
        return min([n_student, *(size for _, size in teachers)]) if vocab == "common" else n_student
    if not isinstance(vocab, Tensor) or vocab.dtype != torch.int64 or vocab.ndim != 1:
        got = f"{_checks.shape(vocab)} of {vocab.dtype}" if isinstance(vocab, Tensor) else vocab
        raise ValueError(
            'vocab must be "same", "common", "pad" or a tensor [K] of entries (torch.int64), got '
            f"{got}"
        )
    if vocab.device != device:
        raise ValueError(f"vocab is on {vocab.device}, the hidden states on {device}: move it")
    if not len(vocab):
        raise ValueError("vocab has no entry: pass those to compare")
    if vocab.is_cpu and not torch.compiler.is_compiling():
        sizes = [n_student, *(size for _, size in teachers)]
        sizes = [x for x in sizes if x != len(vocab)] or sizes
        if vocab.min() < 0 or vocab.max() >= min(sizes):
            raise ValueError(
                f"vocab must hold entries in [0, {min(sizes)}), got {vocab.min()} to {vocab.max()}"
            )
        if len(vocab.unique()) != len(vocab):
            raise ValueError("vocab holds an entry twice, which would count twice: pass unique ids")
    return len(vocab)


def _check_teacher_weights(weights: Any, n_teachers: int, student: Tensor) -> None:
    """Raise an error unless there is a weight for each teacher, or one for each and each row."""
    if isinstance(weights, (list, tuple)) and not any(isinstance(x, str) for x in weights):
        weights = torch.as_tensor(weights)
    if not isinstance(weights, Tensor) or weights.shape not in (
        (n_teachers,),
        (*student.shape[:-1], n_teachers),
    ):
        got = _checks.shape(weights) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(
            f"teacher_weights need one number for each of {n_teachers} teachers, [K], or for each "
            f"position too, (..., K), got {got}"
        )
    if weights.requires_grad:
        _checks.constant_teacher(teacher_weights=weights)
    # a position that does not count may hold anything
    if weights.ndim == 1 and _checks.has_values_at_hand(weights):
        if not (weights >= 0).all() or not weights.sum() > 0:
            raise ValueError(
                "teacher_weights, the shares of the mixture, must be at least 0 and "
                f"one of them above, got {weights.tolist()}"
            )
