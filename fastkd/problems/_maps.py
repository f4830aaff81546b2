"""Feature maps [B, C, ...]: the checks of their losses, and channels of maps stated as rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._op import Number
from fastkd.problems import rows

if TYPE_CHECKING:
    from fastkd._loss import Call

BINS = ("sum", "mean")

# ----------------------------------------------------------------------------------- checks of maps


def a_map(name: str, tensor: Any) -> None:
    """Raise an error unless it is a floating-point tensor [B, C, ...] with a position or more."""
    needed = "a tensor of shape [B, C, H, W] or [B, C, L]"
    _checks.floats(name, tensor, needed, "features", "maps of one size, padded or resized")
    if tensor.ndim < 3 or not tensor.shape[1:].numel():
        raise ValueError(
            f"{name} needs the shape [B, C, H, W] or [B, C, L], a map for each of C channels, got "
            f"{_checks.shape(tensor)}: channels that come last are moved by .movedim(-1, 1)"
        )


def same_examples(student: Tensor, teacher: Tensor) -> None:
    """Raise an error unless both are maps of the same examples with as many kinds of positions."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        a_map(name, tensor)
    _checks.same_examples(student=student, teacher=teacher)
    if student.ndim != teacher.ndim:
        raise ValueError(
            f"student and teacher need as many dimensions, got {_checks.shape(student)} and "
            f"{_checks.shape(teacher)}: tokens [B, L, C] of a grid are maps by "
            ".mT.unflatten(2, (H, W)), maps are tokens by .flatten(2)"
        )
    _checks.same_device(student=student, teacher=teacher)
    _checks.constant_teacher(teacher=teacher)


def _same_channels(student: Tensor, teacher: Tensor, advice: str) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher need one number of channels, got {_checks.shape(student)} and "
            f"{_checks.shape(teacher)}: {advice}"
        )


def check_channel_wise(
    student: Tensor, teacher: Tensor, *, temperature: Number, scale_t2: bool
) -> None:
    """Raise an error for maps that do not fit together or a temperature out of range."""
    same_examples(student, teacher)
    channels = f"{student.shape[1]}, {teacher.shape[1]}"
    _same_channels(
        student,
        teacher,
        f"project the student's to the teacher's, for example by torch.nn.Conv2d({channels}, 1), "
        "which is trained with it",
    )
    if student.shape != teacher.shape:
        size = (*teacher.shape[2:],)
        raise ValueError(
            f"student and teacher need maps of one size, got {_checks.shape(student)} and "
            f"{_checks.shape(teacher)}: resize the student's, for example by "
            f'torch.nn.functional.interpolate(student, {size}, mode="bilinear")'
        )
    _option_checks.temperature(temperature)


def check_localization(
    student: Tensor, teacher: Tensor, *, temperature: Number, bins: str, scale_t2: bool
) -> None:
    """Raise an error for logits that do not fit together and options out of range."""
    _option_checks.temperature(temperature)
    rows.check(student, teacher, temperature=temperature, scale_t2=scale_t2)
    _option_checks.one_of(BINS, bins=bins)


def check_selectivity(student: Tensor, teacher: Tensor) -> None:
    """Raise an error unless both are maps of the same examples, of any number of channels."""
    same_examples(student, teacher)


def check_pairs(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor | None
) -> None:
    """Raise an error unless both are maps of two layers with as many channels in both networks."""
    for name, pair in (("student", student), ("teacher", teacher)):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            got = f"{len(pair)} maps" if isinstance(pair, (list, tuple)) else type(pair).__name__
            raise TypeError(
                f"{name} must be the maps of two layers, (first, second), got {got}: "
                "fsp((student_1, student_2), (teacher_1, teacher_2))"
            )
        for i, x in enumerate(pair):
            a_map(f"{name}[{i}]", x)
            if x.ndim != pair[0].ndim or len(x) != len(student[0]):
                raise ValueError(
                    f"all maps need the same examples and as many dimensions, got "
                    f"{_checks.shape(student[0])} and {name}[{i}] {_checks.shape(x)}"
                )
            if x is not student[0]:
                _checks.same_device(**{"student[0]": student[0], f"{name}[{i}]": x})
            if name == "teacher":
                _checks.constant_teacher(**{f"teacher[{i}]": x})
    channels = [[x.shape[1] for x in pair] for pair in (student, teacher)]
    if channels[0] != channels[1]:
        raise ValueError(
            f"student and teacher need as many channels in both layers, got {channels[0]} and "
            f"{channels[1]}: project the student's maps with a 1×1 convolution"
        )
    if mask is not None:
        sizes = {(*x.shape[2:],) for x in (*student, *teacher)}
        check_mask(mask, student[0], (len(student[0]), *student[0].shape[2:]), "position")
        if len(sizes) > 1:
            raise ValueError(
                f"a mask needs maps of one size, got {sorted(sizes)}: resize them, or leave it out"
            )


def check_mask(mask: Tensor, of: Tensor, shape: Sequence[int], unit: str) -> None:
    """Raise an error unless the mask is a bool, or 0 or 1, for each position."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if type(mask) is not Tensor or mask.is_nested:
        _checks.one_piece("mask", mask, f"one bool for each {unit}")
    if mask.is_floating_point() or mask.is_complex() or mask.shape != torch.Size(shape):
        raise ValueError(
            f"mask needs one bool (or 0 and 1) for each {unit}: the shape {[*shape]}, got "
            f"{_checks.shape(mask)} of {mask.dtype}"
        )
    if mask.device != of.device:
        raise ValueError(f"mask is on {mask.device}, the inputs on {of.device}: move it")


def check_variational(
    mean: Tensor, teacher: Tensor, variance_parameter: Tensor, *, epsilon: Number
) -> None:
    """Raise an error unless the mean has the teacher's channels, each with a parameter."""
    same_examples(mean, teacher)
    _same_channels(
        mean, teacher, "the student's maps need a regressor to the teacher's, which VIDLoss owns"
    )
    if (
        not isinstance(variance_parameter, Tensor)
        or variance_parameter.shape != teacher.shape[1:2]
        or not variance_parameter.is_floating_point()
    ):
        x = variance_parameter
        got = f"{_checks.shape(x)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"variance_parameter needs one number for each channel, the shape "
            f"{[teacher.shape[1]]}, got {got}"
        )
    if variance_parameter.device != mean.device:
        _checks.same_device(student=mean, variance_parameter=variance_parameter)
    _option_checks.temperature(epsilon, "epsilon")


def check_scores(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None, masked_below: Number
) -> None:
    """Raise an error for attention scores that do not fit together, or a mask that does not."""
    for name, tensor in (("student_scores", student), ("teacher_scores", teacher)):
        needed, padded = "a tensor of shape [B, heads, L, L]", "scores padded to one length"
        _checks.floats(name, tensor, needed, "scores", f"{padded}, with a mask")
        if tensor.ndim < 3:
            raise ValueError(
                f"{name} needs the shape [B, heads, L, L] or [B, L, L], got {_checks.shape(tensor)}"
            )
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_scores and teacher_scores need one shape, got {_checks.shape(student)} and "
            f"{_checks.shape(teacher)}: where the numbers of heads differ, average both over their "
            "heads, .mean(1), or take fastkd.minilm_relation, which splits them anew"
        )
    _checks.same_device(student_scores=student, teacher_scores=teacher)
    _checks.constant_teacher(teacher_scores=teacher)
    _option_checks.number(masked_below=masked_below)
    if mask is not None:
        if student.shape[-2] != student.shape[-1]:
            raise ValueError(
                f"a mask of tokens needs scores of all against all, [..., L, L], got "
                f"{_checks.shape(student)}: for queries and keys that differ, give masked scores "
                f"the value {masked_below:g} in both networks"
            )
        check_mask(mask, student, (len(student), student.shape[-1]), "token")


# ------------------------------------------------------------------------------------ sizes of maps


def of_the_smaller_size(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps in the smaller size, averages over bins as adaptive pooling makes them."""
    size = smaller_size(first, second)
    return pooled(first, size), pooled(second, size)


def smaller_size(first: Tensor, second: Tensor) -> list[int]:
    """Return the smaller number of positions in each dimension."""
    return [min(sizes) for sizes in zip(first.shape[2:], second.shape[2:], strict=True)]


def pooled(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return averages over bins of positions, those of torch's adaptive_avg_pool.

    Its backward adds atomically on a GPU; products and sums give the same bits in every run.
    """
    for dim, n in enumerate(size, start=2):
        length = x.shape[dim]
        if length == n or not n:
            x = x.narrow(dim, 0, n)
            continue
        if length % n == 0:
            x = x.unflatten(dim, (n, length // n)).mean(dim + 1)
            continue
        places = torch.arange(length, device=x.device)
        bins = torch.arange(n, device=x.device)[:, None]
        starts, stops = bins * length // n, (bins * length + length + n - 1) // n
        averages = ((places >= starts) & (places < stops)).to(x.dtype) / (stops - starts)
        x = (x.movedim(dim, -1) @ averages.T).movedim(-1, dim)
    return x


# ------------------------------------------------------------------------------------ maps as rows


def channel_wise(
    call: Call, student: Tensor, teacher: Tensor, *, temperature: Number, scale_t2: bool
) -> Tensor:
    """Solve for KL between the softmaxes over the positions of each channel."""
    scale = temperature * temperature if scale_t2 else 1.0
    maps = student.flatten(2), teacher.flatten(2)
    return _forward_kl(call, *maps, temperature, scale)


def localization(
    call: Call, student: Tensor, teacher: Tensor, *, temperature: Number, bins: str, scale_t2: bool
) -> Tensor:
    """Solve for KL between the distributions of each edge of a box."""
    scale = (temperature * temperature if scale_t2 else 1.0) / divisor(student, bins)
    return _forward_kl(call, student, teacher, temperature, scale)


def variational(
    call: Call, student: Tensor, teacher: Tensor, variance_parameter: Tensor, *, epsilon: Number
) -> Tensor:
    """Solve for the mean squares of each channel, and return their likelihoods [B]."""
    means, targets = (x.flatten(2) for x in of_the_smaller_size(student, teacher))
    mask = call.row_mask
    if mask is not None:
        mask = mask[:, None].expand(means.shape[:2])
    squares, _ = rows.solve(
        call.engine, rows.Rows(means, targets, None, mask, 1.0, 1.0, 0.0, 1.0, "logit_mse")
    )
    return likelihoods(squares, variance_parameter.to(squares.dtype), epsilon)


def likelihoods(squares: Tensor, variance_parameter: Tensor, epsilon: Number) -> Tensor:
    """Return ½ mean_c (squares / σ² + log σ²) of each example, [B]."""
    zero = variance_parameter.new_zeros(())
    variance = torch.logaddexp(variance_parameter, zero) + epsilon
    return (squares / variance + variance.log()).mean(1) / 2


def divisor(logits: Tensor, bins: str) -> int:
    """Return what the sum over the bins is divided by."""
    return logits.shape[-1] if bins == "mean" else 1


def _forward_kl(
    call: Call, student: Tensor, teacher: Tensor, temperature: Number, scale: Number
) -> Tensor:
    problem = rows.Rows(
        student, teacher, None, call.row_mask, temperature, temperature, 0.0, scale, "forward_kl"
    )
    losses, _ = rows.solve(call.engine, problem)
    return losses
