"""Checks of inputs, whose errors say what was got, what is needed and what to do."""

from __future__ import annotations

import functools
import numbers
import warnings
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def one_piece(name: str, tensor: Tensor, values: str) -> None:
    """Raise an error for a tensor whose rows are spread over devices or of different lengths."""
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor, whose rows have different lengths: pass {values}"
        )
    if hasattr(tensor, "full_tensor"):  # looked at so late that torch.distributed is not imported
        raise TypeError(
            f"{name} is a DTensor, which the losses do not shard: pass {name}.full_tensor(), or "
            f"{name}.to_local() where a rank holds whole rows and its part of the batch is meant"
        )


def logits(
    student: Tensor,
    teacher: Tensor,
    *,
    teacher_name: str = "teacher_logits",
    teacher_is_constant: bool = True,
) -> None:
    """Raise an error unless both are logits of one shape (..., V) on one device."""
    for name, tensor in (("student_logits", student), (teacher_name, teacher)):
        _rows_of_logits(name, tensor)
    if student.shape != teacher.shape:
        advice = "align the positions, or cut both to the vocabulary that they share"
        raise ValueError(
            f"student_logits and {teacher_name} need one shape, "
            f"got {shape(student)} and {shape(teacher)}: {advice}"
        )
    if student.device != teacher.device:
        same_device(**{"student_logits": student, teacher_name: teacher})
    if teacher_is_constant and teacher.requires_grad:
        constant_teacher(teacher_logits=teacher)


def logits_of_two_vocabularies(student: Tensor, teacher: Tensor) -> None:
    """Raise an error unless both are logits of the same rows, (..., V) and (..., V')."""
    for name, tensor in (("student_logits", student), ("teacher_logits", teacher)):
        _rows_of_logits(name, tensor)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student_logits and teacher_logits need the same rows, whatever their vocabularies, "
            f"got {shape(student)} and {shape(teacher)}: take from both the positions at which the "
            "groups of fastkd.align begin"
        )
    same_device(student_logits=student, teacher_logits=teacher)
    constant_teacher(teacher_logits=teacher)


def _rows_of_logits(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (..., V), got {type(tensor).__name__}")
    if type(tensor) is not Tensor or tensor.is_nested:
        rows = "the rows of all sequences, .values() of a jagged tensor, for both networks"
        one_piece(name, tensor, rows)
    if tensor.dtype not in FLOATS or tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must hold floating-point logits (float16, bfloat16, float32 or float64, "
            f"dense), got {tensor.dtype}, {tensor.layout}; did labels come in its place?"
        )
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name} needs the shape (..., V) with V ≥ 1, got {shape(tensor)}")


def floats(name: str, tensor: Any, needed: str, values: str, in_one_piece: str) -> None:
    """Raise an error unless it is a dense floating-point tensor of values, in one piece.

    needed: what it must be, with its shape. in_one_piece: what to pass in place of its pieces.
    """
    if not isinstance(tensor, Tensor):
        # the most common reason: an option that is given by its place
        way = "; an option goes by its name, as option=value" if isinstance(tensor, float) else ""
        raise TypeError(f"{name} must be {needed}, got {type(tensor).__name__}{way}")
    if type(tensor) is not Tensor or tensor.is_nested:
        one_piece(name, tensor, in_one_piece)
    if tensor.dtype not in FLOATS or tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must hold floating-point {values} (float16, bfloat16, float32 or float64, "
            f"dense), got {tensor.dtype}, {tensor.layout}"
        )


def _embedding(name: str, tensor: Any) -> None:
    rows = "one embedding for each example, pooled, or .values() where each row is an example"
    floats(name, tensor, "a tensor of shape [N, D]", "embeddings", rows)
    if tensor.ndim < 2 or not tensor.shape[1:].numel():
        raise ValueError(
            f"{name} needs the shape [N, D] with D ≥ 1, an embedding for each of N examples, "
            f"got {shape(tensor)}"
        )


def embeddings(student: Tensor, teacher: Tensor) -> None:
    """Raise an error unless both are features [N, ...] of the same N examples on one device."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        _embedding(name, tensor)
    if len(student) != len(teacher):
        raise ValueError(
            f"student and teacher need the same examples: one N, got {shape(student)} and "
            f"{shape(teacher)}"
        )
    same_device(student=student, teacher=teacher)
    constant_teacher(teacher=teacher)


def matrices(**tensors: Tensor) -> None:
    """Raise an error unless all are embeddings [N, D] of any N, with one D, on one device."""
    (first, first_tensor), *_ = tensors.items()
    for name, tensor in tensors.items():
        _embedding(name, tensor)
        if tensor.ndim != 2:
            raise ValueError(
                f"{name} needs the shape [N, D], got {shape(tensor)}: pool it to one embedding "
                "for each example, or .flatten(0, -2) it where each row is an example"
            )
        if tensor.shape[1] != first_tensor.shape[1]:
            raise ValueError(
                f"{first} and {name} need one D, got {shape(first_tensor)} and {shape(tensor)}: "
                "project one of them"
            )
        if tensor is not first_tensor:
            same_device(**{first: first_tensor, name: tensor})


def same_examples(**tensors: Tensor) -> None:
    (first, a), (second, b) = tensors.items()
    if len(a) != len(b):
        raise ValueError(
            f"{first} and {second} need the same examples: one N, got {shape(a)} and {shape(b)}"
        )


def labels(labels: Tensor, student: Tensor, ignore_index: int) -> None:
    """Raise an error unless the labels are class indices (...), one for each row of logits."""
    if isinstance(labels, Tensor) and (type(labels) is not Tensor or labels.is_nested):
        one_piece("labels", labels, "one label for each row of the logits")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        got = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        if isinstance(labels, Tensor) and labels.shape == student.shape:
            got += "; with a probability for each class pass labels.argmax(-1)"
        raise TypeError(f"labels must be a tensor of class indices (torch.int64), got {got}")
    if labels.shape != student.shape[:-1]:
        way = "; a label of ones and zeros is labels.argmax(-1)"
        way = way if labels.shape == student.shape else _classes_last(student, labels)
        raise ValueError(
            f"labels need one class for each row: the shape {shape(student[..., 0])} for logits "
            f"of shape {shape(student)}, got {shape(labels)}{way}"
        )
    if not isinstance(ignore_index, numbers.Integral):
        raise TypeError(
            f"ignore_index must be a whole number, got {ignore_index!r}: leave it out, or pass one "
            "that no label has, so that none is ignored"
        )
    same_device(student_logits=student, labels=labels)
    # on a GPU this look at the values would be a host sync; there a wrong class gives a NaN loss
    if not has_values_at_hand(labels) or not labels.numel():
        return
    n_classes, labels = student.shape[-1], labels.long()  # a narrow type holds no large n_classes
    lowest, highest = (x.item() for x in labels.aminmax())
    if lowest < 0 or highest >= n_classes:
        wrong = ((labels < 0) | (labels >= n_classes)) & (labels != ignore_index)
        if wrong.any():
            raise ValueError(
                f"labels must lie in [0, {n_classes}) or be ignore_index={ignore_index}, "
                f"got {labels[wrong][0].item()}"
            )


def soft_labels(labels: Tensor, student: Tensor) -> None:
    """Raise an error unless the labels are probabilities (..., V), one for each logit."""
    if type(labels) is not Tensor or labels.is_nested:
        one_piece("labels", labels, "probabilities of one shape with the logits")
    if labels.dtype not in FLOATS or labels.shape != student.shape:
        way = "of class indices pass .squeeze(-1).long()"
        if labels.shape[-1] != 1:
            way = "of other classes pass those of the logits"
        raise ValueError(
            f"labels of a floating-point dtype are probabilities of classes and need the shape of "
            f"the logits, {shape(student)}, got {shape(labels)} of {labels.dtype}: {way}"
        )
    same_device(student_logits=student, labels=labels)
    if has_values_at_hand(labels) and labels.numel() and (lowest := labels.min().item()) < 0:
        raise ValueError(
            f"labels must be probabilities of at least 0, got {lowest:g}: of logits pass "
            f"labels.softmax(-1)"
        )


def class_weights(class_weights: Tensor, student: Tensor) -> None:
    """Raise an error unless there is a weight for each class (V,)."""
    if not isinstance(class_weights, Tensor):
        raise TypeError(
            f"class_weights must be a tensor with a number for each class, got "
            f"{type(class_weights).__name__}: pass torch.tensor(class_weights)"
        )
    one_piece("class_weights", class_weights, "one tensor of shape [V]")
    if class_weights.shape != student.shape[-1:] or class_weights.dtype not in FLOATS:
        raise ValueError(
            f"class_weights need a floating-point number for each of V = {student.shape[-1]} "
            f"classes, got {shape(class_weights)} of {class_weights.dtype}"
        )
    same_device(student_logits=student, class_weights=class_weights)
    if has_values_at_hand(class_weights):
        lowest, highest = (x.item() for x in class_weights.aminmax())
        if lowest < 0 or highest == 0:
            raise ValueError(
                f"class_weights must be at least 0 and some of them above, got {lowest:g} to "
                f"{highest:g}"
            )


def _classes_last(logits: Tensor | None, of_rows: Tensor) -> str:
    """Return what to do about logits (N, V, ...), to which labels or weights (N, ...) belong."""
    if logits is None or logits.ndim < 3 or of_rows.shape != logits.shape[:1] + logits.shape[2:]:
        return ""
    return (
        "; classes come last: pass dim=1 or, to a loss without that option, "
        "student_logits.movedim(1, -1) and likewise all other logits"
    )


def probabilities(teacher: Tensor, form: str) -> None:
    """Raise an error if a teacher of this form holds what is no probability or logarithm of one."""
    if not has_values_at_hand(teacher) or not teacher.numel():
        return
    lowest, highest = (x.item() for x in teacher.aminmax())
    if form == "probabilities" and lowest < 0:
        raise ValueError(
            f"teacher_form={form!r} needs numbers of at least 0, got {lowest:g}: logarithms of "
            'probabilities are "log_probabilities", unnormalised ones are "logits"'
        )
    if form == "log_probabilities" and highest > 1e-2:
        raise ValueError(
            f"teacher_form={form!r} needs numbers of at most 0, got {highest:g}: probabilities are "
            '"probabilities", unnormalised logarithms are "logits"'
        )


def all_labelled(labels: Tensor, ignore_index: int) -> bool:
    """Return whether it is known, without a host sync, that no label is to be ignored."""
    if ignore_index >= 0 or not has_values_at_hand(labels) or not labels.numel():
        return False
    return labels.long().min().item() >= 0  # a narrow type has no minimum


def weights(
    weights: Tensor, examples: torch.Size, device: torch.device, logits: Tensor | None = None
) -> None:
    """Raise an error unless there is a weight for each example, which may be rows of logits."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor, got {type(weights).__name__}")
    if type(weights) is not Tensor or weights.is_nested:
        one_piece("weights", weights, "one weight for each example")
    if weights.is_complex() or weights.shape != examples:
        raise ValueError(
            f"weights need one real number or bool for each example: the shape {[*examples]}, "
            f"got {shape(weights)} of {weights.dtype}{_classes_last(logits, weights)}"
        )
    if weights.device != device:
        raise ValueError(f"weights are on {weights.device}, the losses on {device}: move them")


def same_device(**tensors: Tensor) -> None:
    (first, a), (second, b) = tensors.items()
    if a.device != b.device:
        raise ValueError(f"{first} is on {a.device}, {second} on {b.device}: move them together")


def has_values_at_hand(tensor: Tensor) -> bool:
    """Return whether the values can be read without a host sync: on a CPU, not traced or mapped."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def constant_teacher(**teacher: Tensor) -> None:
    """Warn once that a teacher gets no gradient, where that would change a training."""
    for name, tensor in teacher.items():
        if tensor.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _warn_once(
                f"{name} requires grad, but the loss gives it none: the teacher is a constant. "
                f"Run the teacher under torch.no_grad() or pass {name}.detach()."
            )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=6)


def shape(tensor: Tensor) -> str:
    """Return the shape of a tensor as errors show it."""
    return str([*tensor.shape])
