"""Solve `Ensemble` on a GPU: the teachers of a row are put together where it is solved.

Nothing of the logits' size is written but the gradient. Bytes for each (row, entry) of bfloat16,
K teachers, forward + backward. V ≤ ON_CHIP: (2 K + 2) + (2 K + 4), each one launch; (2 K + 4) + 0
with the row weight known beforehand. Above: `sweeps.py` says what the losses read, once or more;
the gradient takes 2 K + 4, or 2 with the losses of a forward KL whose row weight is known. With a
teacher chosen for each row K counts as 1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.device import (
    alignment,
    congruent,
    device_of,
    on_device,
    rows_of,
    warps_of_long_rows,
    written_like,
)
from fastkd.kernels.ensembles import gradients, sweeps
from fastkd.kernels.ensembles.whole_rows import Strides, whole_ensembles
from fastkd.kernels.rows import launch as of_rows
from fastkd.kernels.rows.reading import Numbers
from fastkd.kernels.rows.sweeps import N_STATISTICS
from fastkd.problems.ensembles import Ensemble
from fastkd.problems.ensembles import compute_dtype_of as compute_dtype_of

# whose gradient needs nothing of the row but both Z, so that one sweep makes it with the losses
_WITH_LOSSES = ("forward_kl", "soft_cross_entropy")
_LOGS = ("reverse_kl", "symmetric_kl")  # in which log p counts where p is too small for a float
_PER_WARP = {torch.float32: 1024, torch.float64: 256}  # entries of whole rows


def n_statistics(problem: Ensemble) -> int:
    """Return how many numbers a row saves for `backward`: none if it fits on chip."""
    if problem.student.shape[-1] <= _longest(compute_dtype_of(problem)):
        return 0
    n, count = len(problem.teachers), N_STATISTICS.value
    return n * count if problem.combine == "sum" else count + 2 * n * (problem.combine == "mixture")


def forward(problem: Ensemble, needs_grad: Sequence[bool]) -> tuple[tuple[Tensor], tuple[Any, ...]]:
    """Return rows of scale · D and statistics and, if it is foreseen, the gradient."""
    student, dtype = problem.student, compute_dtype_of(problem)
    losses = student.new_empty(student.shape[:-1], dtype=dtype)
    statistics = student.new_empty((*student.shape[:-1], n_statistics(problem)), dtype=dtype)
    if not losses.numel():
        return (losses,), (statistics,)
    gradient = None
    if needs_grad[0] and _foresees_weight(problem):
        gradient = torch.empty_like(student)
        gradient = gradient if gradient.is_contiguous() else None
    launch = functools.partial(_launch_statistics, statistics=statistics)
    (launch if statistics.numel() else _launch_whole_rows)(problem, losses, gradient=gradient)
    return (losses,), ((statistics,) if gradient is None else (statistics, gradient))


def backward(
    problem: Ensemble,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    foreseen: Tensor | None = None,
) -> Tensor:
    """Return Σ upstream · ∂losses with respect to the student, in `foreseen` if it is there."""
    (of_losses,) = upstream
    assert of_losses is not None

    def write(gradient: Tensor) -> None:
        is_foreseen = gradient is foreseen
        if statistics.numel():
            _launch_gradient(problem, statistics, gradient, of_losses, is_foreseen=is_foreseen)
        else:
            _launch_whole_rows(problem, None, gradient, of_losses, is_foreseen=is_foreseen)

    if foreseen is None:
        return written_like(problem.student, write)
    write(foreseen)
    return foreseen


def _longest(dtype: torch.dtype) -> int:
    """Return the columns of the longest rows that stay on chip."""
    # numbers of float64 take two registers, and more to compute with
    return of_rows.ON_CHIP // 4 if dtype == torch.float64 else of_rows.ON_CHIP


def _foresees_weight(problem: Ensemble) -> bool:
    """Return whether the forward makes the gradient too, for the weight that the caller knows."""
    is_known = isinstance(problem.row_weight, Tensor) or problem.row_weight != 0
    in_one_sweep = problem.combine == "mixture" and problem.divergence in _WITH_LOSSES
    if n_statistics(problem) and not in_one_sweep:
        return False
    # a loss in float16 is scaled so that its gradient does not vanish
    return is_known and problem.student.dtype != torch.float16


def _launch_whole_rows(
    problem: Ensemble,
    losses: Tensor | None,
    gradient: Tensor | None = None,
    upstream: Tensor | None = None,
    *,
    is_foreseen: bool = False,
) -> None:
    n_rows, n_cols = problem.student.shape[:-1].numel(), problem.student.shape[-1]
    given: list[Any] = [problem.student, *problem.teachers]
    networks = [rows_of(x) for x in given]
    aligned = networks if gradient is None else [*networks, rows_of(gradient)]
    columns, per_warp = triton.next_power_of_2(n_cols), _PER_WARP[compute_dtype_of(problem)]
    is_mixture = problem.divergence in of_rows._MIXTURES
    if is_mixture and problem.combine == "sum":  # whose slopes wait in registers for each teacher
        per_warp //= 2
    # many short rows where that leaves a program for every multiprocessor, as `rows` has them
    block = max(1, per_warp // 2 // columns)
    if n_rows < block * device_of(problem.student).multiprocessors:
        block = 1
    with on_device(problem.student):
        whole_ensembles[(triton.cdiv(n_rows, block),)](
            **_arguments(problem, gradient, upstream),
            student=networks[0],
            teachers=tuple(networks[1:]),
            losses_ptr=losses,
            n_rows=n_rows,
            IS_MIXTURE=is_mixture,
            ALIGNMENT=alignment(aligned, n_cols),
            ROWS=block,
            COLUMNS=columns,
            WEIGHED=is_foreseen,
            num_warps=max(1, block * columns // per_warp),
        )


def _launch_statistics(
    problem: Ensemble, losses: Tensor, *, statistics: Tensor, gradient: Tensor | None
) -> None:
    arguments, student, width = _long_rows(problem, statistics, gradient)
    del arguments["upstream_ptr"]
    of_gradient = student if gradient is None else rows_of(gradient)
    num_warps = warps_of_long_rows(losses)
    with on_device(problem.student):
        sweeps.ensemble_statistics[(losses.numel(),)](
            **arguments,
            losses_ptr=losses,
            IS_MIXTURE=problem.divergence in of_rows._MIXTURES,
            GRADIENT_CONGRUENT=congruent(student, of_gradient, width),
            THREADS=32 * num_warps,
            WIDTH=width,
            num_warps=num_warps,
        )


def _launch_gradient(
    problem: Ensemble,
    statistics: Tensor,
    gradient: Tensor,
    upstream: Tensor,
    *,
    is_foreseen: bool,
) -> None:
    n_rows, n_cols = problem.student.shape[:-1].numel(), problem.student.shape[-1]
    arguments, student, width = _long_rows(problem, statistics, gradient, upstream)
    vectors = 2048 // width  # 16 entries of a thread
    n_blocks = triton.cdiv(n_cols, vectors * width)
    with on_device(problem.student):
        gradients.ensemble_gradient[(n_rows * n_blocks,)](
            **arguments,
            n_blocks=n_blocks,
            GRADIENT_CONGRUENT=congruent(student, rows_of(gradient), width),
            VECTORS=vectors,
            WIDTH=width,
            WEIGHED=is_foreseen,
            num_warps=4,
        )


def _long_rows(
    problem: Ensemble,
    statistics: Tensor,
    gradient: Tensor | None = None,
    upstream: Tensor | None = None,
) -> tuple[dict[str, Any], Any, int]:
    """Return what both kernels of long rows take, the student's rows, and a vector's elements."""
    networks: list[Any] = [problem.student, *problem.teachers]
    width = 16 // min(x.element_size() for x in networks)
    student, *teachers = map(rows_of, networks)
    arguments = dict(
        **_arguments(problem, gradient, upstream),
        student=student,
        teachers=tuple(teachers),
        statistics_ptr=statistics.contiguous(),  # mapped upstreams have one of all, expanded
        n_statistics=statistics.shape[-1],
        CONGRUENT=all(congruent(student, x, width) for x in teachers),
    )
    return arguments, student, width


def _arguments(
    problem: Ensemble, gradient: Tensor | None, upstream: Tensor | None
) -> dict[str, Any]:
    """Return what all kernels take, by the names of their parameters."""
    dtype, student = compute_dtype_of(problem), problem.student
    given = Numbers(
        problem.student_temperature,
        problem.teacher_temperature,
        problem.weight,
        problem.scale,
        problem.row_weight,
        None,
    )
    # float64 goes by pointer too, because a Python float reaches a kernel as float32
    by_pointer = dtype == torch.float64 or any(isinstance(x, Tensor) for x in given)
    numbers = Numbers._make(
        None if x is None else of_rows._on_device(x, student.device) if by_pointer else float(x)
        for x in given
    )
    weights, n = problem.teacher_weights, len(problem.teachers)
    if weights is not None:
        weights = weights.reshape(-1, n)
        weights = weights if weights.is_floating_point() else weights.to(dtype)
    upstream = None if upstream is None else upstream.reshape(-1)
    of_gradient = (None, 0, 0) if gradient is None else rows_of(gradient)
    return dict(
        weights_ptr=weights,
        index_ptr=of_rows._flat(problem.teacher_index),
        row_mask_ptr=of_rows._flat(problem.row_mask),
        upstream_ptr=upstream,
        gradient_ptr=of_gradient[0],
        n_cols=student.shape[-1],
        inner=student.shape[-2] if student.ndim > 1 else 1,
        strides=Strides(
            *of_gradient[1:],
            0 if upstream is None else upstream.stride(0),
            *((0, 0) if weights is None else weights.stride()),
        ),
        numbers=numbers,
        DIVERGENCE=problem.divergence,
        COMBINE=problem.combine,
        LOGS=problem.combine == "mixture" and problem.divergence in _LOGS,
        DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
        FAST=dtype == torch.float32 and device_of(student).nvidia,
        ON_DEVICE=by_pointer,
    )
