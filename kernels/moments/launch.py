"""Values of the positions of feature maps, solved on a GPU.

Bytes for each feature of bf16 maps, forward + backward: 4 + 6 with a teacher, 2 + 4 of one network,
each one launch, and one more where maps are compared. Features [B, P, C] are read in vectors along
the dimension that is contiguous, channels of channels_last maps and of sequences, positions of
other maps, so that neither is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._op import Number
from fastkd._precision import compute_dtype
from fastkd.kernels.device import device_of, on_device, or_portable
from fastkd.kernels.moments import sweeps
from fastkd.problems.moments import Maps, Moments
from fastkd.problems.rows import is_exactly

_WIDEST_VECTOR = 16  # elements
_SECTOR = 32  # bytes that memory moves at least


def n_statistics(problem: Moments) -> int:
    """Return how many numbers of a position `backward` needs besides the features."""
    kinds = ("cosine", "normalized_mse", "max")
    return sweeps.N_STATISTICS.value if problem.kind in kinds else 0


@or_portable
def forward(problem: Moments, needs_grad: Sequence[bool]) -> tuple[Any, tuple[Tensor]]:
    """Compute the value of each position.

    Args:
        problem: Features (..., P, C) and what is asked about them.
        needs_grad: Not used, because saving the statistics costs nothing that shows.

    Returns:
        ((values,), (statistics,)): values (..., P) and (..., P, n_statistics(problem)) numbers, in
        the compute dtype.
    """
    student = problem.student
    values = student.new_empty(student.shape[:-1], dtype=_dtype(problem))
    statistics = values.new_empty((*values.shape, n_statistics(problem)))
    if student.numel():
        arguments, grid, _ = _arguments(problem, [])
        with on_device(student):
            sweeps.values[(grid,)](
                **arguments,
                values_ptr=values,
                statistics_ptr=statistics,
                WHOLE=arguments["n_features"] <= arguments["COLUMNS"],
            )
    return (values,), (statistics,)


@or_portable
def backward(problem: Moments, statistics: Tensor, upstream: Sequence[Tensor | None]) -> Tensor:
    """Compute Σ upstream · ∂values/∂student.

    Args:
        problem: The problem that `forward` solved.
        statistics: The tensor that `forward` saved.
        upstream: The upstream gradient (..., P).

    Returns:
        The gradient with respect to the student, in its shape and dtype, laid out as it is.
    """
    gradient, (factors,) = torch.empty_like(problem.student), upstream
    assert factors is not None  # without an upstream gradient there is no backward
    if not gradient.numel():
        return gradient
    blocks = _blocks(gradient)
    arguments, grid, (laid_out,) = _arguments(problem, [blocks])
    factors = factors.reshape(-1)  # of a plain mean all are one number, expanded
    is_expanded = factors.stride(0) == 0
    with on_device(gradient):
        sweeps.slopes[(grid * triton.cdiv(arguments["n_features"], arguments["COLUMNS"]),)](
            **arguments,
            gradient=_features(laid_out),
            statistics_ptr=statistics.contiguous(),  # mapped upstreams have one of all, expanded
            upstream_ptr=factors if is_expanded else factors.contiguous(),
            GRADIENT_UNIT=_unit(laid_out),  # not the student's, of which features may be expanded
            IS_EXPANDED=is_expanded,
        )
    if blocks.untyped_storage()._cdata != gradient.untyped_storage()._cdata:
        gradient.copy_(blocks.view(gradient.shape))  # mapped examples that are no one dimension
    return gradient


@or_portable
def value_and_gradients(
    problem: Maps, needs_grad: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor | None]]:
    """Compute the difference of two maps, and its gradient in the student's.

    Args:
        problem: Maps (B, P), of one dtype.
        needs_grad: Whether the student's map needs a gradient.

    Returns:
        (loss, (gradient,)): a 0-dim tensor and (B, P), or None where it is not needed.
    """
    student, teacher = (x.contiguous() for x in problem)
    n_examples, n_positions = student.shape
    losses = student.new_empty(n_examples)
    gradient = torch.empty_like(student) if needs_grad[0] else None
    is_wide = student.dtype == torch.float64
    block = min(1024 if is_wide else 4096, triton.next_power_of_2(n_positions))
    with on_device(student):
        sweeps.map_differences[(n_examples,)](
            student_ptr=student,
            teacher_ptr=teacher,
            losses_ptr=losses,
            gradient_ptr=gradient,
            n_positions=n_positions,
            n_examples=n_examples,
            DTYPE=tl.float64 if is_wide else tl.float32,
            ALIGNMENT=min(_WIDEST_VECTOR, n_positions & -n_positions),
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )
    return losses.sum() / student.numel(), (gradient,)


def _arguments(
    problem: Moments, gradients: list[Tensor]
) -> tuple[dict[str, Any], int, list[Tensor]]:
    """Return what both kernels take, how many programs have all positions, and the gradients.

    The gradients have the shape of the features that the kernels see.
    """
    one = problem.teacher is None
    student = _blocks(problem.student)
    teacher = student if problem.teacher is None else _blocks(problem.teacher)
    tensors = [student, teacher, *gradients]
    unit = _unit(student)
    # the positions of all examples are those of one where their distance is the same everywhere
    if unit == 2 and all(x.stride(0) == x.shape[1] * x.stride(1) for x in tensors):
        tensors = [x.reshape(1, -1, x.shape[-1]) for x in tensors]
    n_examples, n_positions, n_features = tensors[0].shape
    dtype, device = _dtype(problem), device_of(student)
    positions, columns = _tile(tensors[0], unit, dtype, 2 * device.multiprocessors)
    is_square = problem.kind in ("sum", "max") and is_exactly(problem.number, 2)
    # float64 goes by pointer too, because a Python float reaches a kernel as float32
    on_device = dtype == torch.float64 or isinstance(problem.number, Tensor)
    arguments = dict(
        student=_features(tensors[0]),
        teacher=_features(tensors[1]),
        row_mask_ptr=_flat(problem.row_mask),
        weights_ptr=_flat(problem.weights),
        option=_on_device(problem.number, student) if on_device else float(problem.number),
        n_positions=n_positions,
        n_features=n_features,
        KIND=problem.kind,
        ONE=one,
        IS_SQUARE=is_square,
        DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
        ON_DEVICE=on_device,
        STUDENT_UNIT=unit,
        TEACHER_UNIT=_unit(tensors[1]),
        ALIGNMENT=_alignment(tensors, unit),
        POSITIONS=positions,
        COLUMNS=columns,
        num_warps=max(1, min(8, positions * columns // (512 if dtype == torch.float32 else 256))),
    )
    programs = n_examples * triton.cdiv(n_positions, positions)
    return arguments, programs, tensors[2:]


def _tile(features: Tensor, unit: int, dtype: torch.dtype, programs: int) -> tuple[int, int]:
    """Return the positions and features of a tile: whole vectors, and programs for the device."""
    n_examples, n_positions, n_features = features.shape
    elements = 4096 if dtype == torch.float32 else 1024
    wide, long = triton.next_power_of_2(n_features), triton.next_power_of_2(n_positions)
    if unit == 2:
        columns = min(wide, elements)
        positions, least = min(long, elements // columns), 1
    else:
        positions, least = min(long, 64), _SECTOR // features.element_size()
    while positions > least and n_examples * triton.cdiv(n_positions, positions) < programs:
        positions //= 2
    return positions, min(wide, elements // positions)


def _unit(features: Tensor) -> int:
    """Return the dimension that is contiguous: 2, features, 1, positions, or 0 if none is."""
    if features.stride(2) == 1 or features.shape[2] == 1:
        return 2
    return 1 if features.stride(1) == 1 or features.shape[1] == 1 else 0


def _alignment(tensors: Sequence[Tensor], unit: int) -> int:
    """Return what divides the starts of all vectors in elements, a power of 2, at most 16."""
    together = _WIDEST_VECTOR | (tensors[0].shape[unit] if unit else 1)
    for x in tensors:
        together |= x.data_ptr() // x.element_size()
        for stride, size, dim in zip(x.stride(), x.shape, range(3), strict=True):
            together |= stride if size > 1 and dim != _unit(x) else 0
    return together & -together


def _flat(of_positions: Tensor | None) -> Tensor | None:
    return None if of_positions is None else of_positions.reshape(-1).contiguous()


def _features(x: Tensor) -> sweeps.Features:
    return sweeps.Features(x, *x.stride())


def _blocks(features: Tensor) -> Tensor:
    """Return features [B, P, C]; more dimensions of examples are made one."""
    return features if features.ndim == 3 else features.reshape(-1, *features.shape[-2:])


def _dtype(problem: Moments) -> torch.dtype:
    student, teacher = problem.student, problem.teacher
    return compute_dtype(student, student if teacher is None else teacher)


def _on_device(number: Number, like: Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number
    return torch.full((), number, dtype=torch.float64, device=like.device)
