"""Checks of options: numbers, names, reductions and groups. `_checks.py` has those of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._backend import chosen
from fastkd._checks import one_piece, same_device, shape

_SHARED = "all examples share it"  # what to do about a number for each of them


def reduction(reduction: str, normalizer: Any) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if normalizer is not None and reduction != "mean":
        raise ValueError(
            f'normalizer replaces the divisor of reduction="mean", got reduction={reduction!r}: '
            f"drop one of the two"
        )
    if isinstance(normalizer, Tensor):
        one_piece("normalizer", normalizer, "one number")
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer must be a number or a tensor of one element, got {shape(normalizer)}"
                ": where torch.nn.DataParallel repeats one total for its devices, pass "
                "normalizer[0], or in Hugging Face's Trainer, which multiplies the loss by their "
                "number, normalizer.sum()"
            )
    elif normalizer is not None and not _ordered(-math.inf, normalizer, math.inf):
        raise ValueError(
            f"normalizer must be a number or a tensor of one element, got {normalizer!r}"
        )


def _one_number(name: str, value: Tensor, of_each_row: str) -> None:
    """Raise an error unless a tensor is one number, with a way for one that each row has."""
    one_piece(name, value, "one number")
    if value.ndim != 0 or value.is_complex():
        way = "take its element, for example with .squeeze()" if value.numel() == 1 else of_each_row
        raise ValueError(
            f"{name} must be a number or a 0-dim tensor, got {shape(value)} of {value.dtype}: {way}"
        )


def _is_tensor(name: str, value: Any, of_each_row: str = _SHARED) -> bool:
    """Return whether it is a tensor, whose value is not checked, because that is a host sync."""
    if not isinstance(value, Tensor):
        return False
    _one_number(name, value, of_each_row)
    if value.requires_grad and chosen() != "formula":
        raise ValueError(
            f"{name} must be a number or a 0-dim tensor without gradient, got "
            f"requires_grad={value.requires_grad}: the engines are not differentiable with respect "
            'to it; put `with fastkd.backend("formula"):` around the loss, where it gets a gradient'
        )
    return True


def temperature(value: Any, name: str = "temperature", of_each_row: str = _SHARED) -> None:
    """Raise an error for a temperature out of range, with a way for one that each row has."""
    if type(value) is float and 0 < value < math.inf:  # what it nearly always is
        return
    if _is_tensor(name, value, of_each_row):
        return
    if not _ordered(0, value, math.inf) or value == 0 or value == math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def temperature_of_rows(value: Any, name: str, logits: Tensor) -> None:
    """Raise an error unless it is a temperature, or a tensor with one for each row of logits."""
    if not isinstance(value, Tensor):
        temperature(value, name)
        return
    rows = logits.shape[:-1]
    one_piece(name, value, "one number for each row")
    if not value.is_floating_point() or not _expands_to(value.shape, rows):
        way = "make it floating-point, for example with .float()"
        if value.is_floating_point():
            way = (
                "leave out the dimension of the classes, for example with .squeeze(-1); where "
                "classes have temperatures of their own, divide the logits by them"
            )
        raise ValueError(
            f"{name} must be a number, a 0-dim tensor or one number for each row, in a "
            f"floating-point tensor whose shape expands to {[*rows]}, got {shape(value)} of "
            f"{value.dtype}: {way}"
        )
    if value.ndim:
        same_device(student_logits=logits, **{name: value})


def _expands_to(shape: torch.Size, wanted: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    return len(shape) <= len(wanted) and all(n in (1, m) for n, m in pairs)


def fraction(**option: Any) -> None:
    for name, value in option.items():
        if not _is_tensor(name, value) and not _ordered(0, value, 1):
            raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")


def yes_or_no(**options: Any) -> None:
    for name, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def at_least_0(**options: Any) -> None:
    for name, value in options.items():
        if not _is_tensor(name, value) and not (_ordered(0, value, math.inf) and value < math.inf):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def at_least_1(**options: Any) -> None:
    for name, value in options.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def number(above: float = -math.inf, **options: Any) -> None:
    """Raise an error unless each is a finite number, or a 0-dim tensor, which may be learnt."""
    for name, value in options.items():
        if isinstance(value, Tensor):
            _one_number(name, value, _SHARED)
        elif not _ordered(-math.inf, value, math.inf) or not above < value < math.inf:
            bound = f" above {above:g}" if above > -math.inf else ""
            raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")


def one_of(known: Sequence[str], **option: Any) -> None:
    for name, value in option.items():
        if value not in known:
            choices = " or ".join(f'"{each}"' for each in known)
            raise ValueError(f"{name} must be {choices}, got {value!r}")


def process_group(group: Any) -> Any:
    """Return the process group that is meant, which "world" or its own name may stand for."""
    if group is None:
        return None
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise RuntimeError(
            "group needs torch.distributed: call torch.distributed.init_process_group first, or "
            "leave group=None for the batch of this process alone"
        )
    if group == "world":
        return torch.distributed.group.WORLD
    if isinstance(group, str):
        try:
            return torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"no process group here has the name {group!r}: set the group itself, or "
                '"world" for all ranks'
            ) from error
    if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "this rank is no member of the group: only its ranks take part in the loss"
        )
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            "group must be a process group, which a DeviceMesh gives by get_group(), or "
            f'"world" for all ranks, got {type(group).__name__}'
        )
    return group


def _ordered(lowest: Any, value: Any, highest: Any) -> bool:
    """Return whether it is a number between both, by no isinstance: traced ones lack a class."""
    try:
        return bool(lowest <= value <= highest)
    except (TypeError, ValueError):  # the latter from an array of several numbers
        return False


def options(given: Any, known: Any, loss: str) -> None:
    for name in given:
        if name not in known:
            names = ", ".join(known) or "none"
            raise TypeError(f"{loss} has no option {name!r}; its options are {names}")
