"""Solve `Softened` on a GPU: the losses by the kernels of `Rows`, all gradients in one sweep.

Bytes for each (row, entry) of bf16 logits, forward + backward. V ≤ ON_CHIP: 4 + 8, each one sweep
and one launch. Above: the KLs 4 + 8; mixtures and total variation, which need both Z before they
can sum, 8 + 8. A network that does not learn writes 2 less, and temperatures take no sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastkd._softened import rows_of_problem
from fastkd.kernels.device import Strided, alignment, congruent, on_device, rows_of
from fastkd.kernels.rows import launch as of_rows
from fastkd.kernels.rows import reading
from fastkd.kernels.softened import gradients
from fastkd.problems.rows import Rows
from fastkd.problems.softened import Softened

_TAKEN = (
    "row_mask_ptr", "numbers", "n_cols", "inner", "DIVERGENCE", "DTYPE", "ON_DEVICE", "PER_ROW",
)  # fmt: skip


def n_statistics(problem: Softened) -> int:
    """Return how many numbers a row saves for `backward`: none if it fits on chip."""
    return of_rows.n_statistics(rows_of_problem(problem))


def forward(problem: Softened, needs_grad: Sequence[bool]) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """Compute the losses of the rows, (...), and the statistics that `backward` needs."""
    rows = rows_of_problem(problem)
    losses, statistics = of_rows._allocate(rows, of_rows.n_statistics(rows))
    if not losses[0].numel():
        pass
    elif statistics.numel():
        of_rows._launch_statistics(rows, losses, statistics, both=True)
    else:
        of_rows._launch_whole_rows(rows, losses)
    return (losses[0],), (statistics,)


def backward(
    problem: Softened,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Compute Σ upstream · ∂losses with respect to what is needed, in its shape and dtype."""
    (of_losses,) = upstream
    assert of_losses is not None  # without an upstream gradient there is no backward
    rows, kept = rows_of_problem(problem), torch.contiguous_format
    fields = (
        problem.student, problem.teacher, problem.student_temperature, problem.teacher_temperature,
    )  # fmt: skip
    found = [
        torch.empty_like(x, memory_format=kept) if needed else None
        for x, needed in zip(fields, needs_grad, strict=True)
    ]
    if not problem.student.numel():
        pass
    elif statistics.numel():
        _launch_blocks(rows, statistics, of_losses.reshape(-1), found)
    else:
        _launch_whole_rows(rows, of_losses.reshape(-1), found)
    return tuple(found)


def _launch_whole_rows(rows: Rows, upstream: Tensor, found: Sequence[Tensor | None]) -> None:
    n_rows, n_cols = of_rows._shape(rows)
    student, teacher = rows_of(rows.student), rows_of(rows.teacher)
    aligned = [student, teacher, *(rows_of(x) for x in found[:2] if x is not None)]
    block, columns, num_warps = of_rows._tile(rows, n_tiles=2)
    with on_device(rows.student):
        gradients.both_of_whole_rows[(triton.cdiv(n_rows, block),)](
            **_operands(rows, student, teacher, upstream),
            **_outputs(found),
            n_rows=n_rows,
            IS_MIXTURE=rows.divergence in of_rows._MIXTURES,
            FAST=of_rows._has_fast_log2(rows),
            ALIGNMENT=alignment(aligned, n_cols),
            ROWS=block,
            COLUMNS=columns,
            num_warps=num_warps,
        )


def _launch_blocks(
    rows: Rows, statistics: Tensor, upstream: Tensor, found: Sequence[Tensor | None]
) -> None:
    n_rows, n_cols = of_rows._shape(rows)
    student, teacher = rows_of(rows.student), rows_of(rows.teacher)
    width, outputs = of_rows._width(rows), _outputs(found)
    operands = _operands(rows, student, teacher, upstream)
    # a thread has 16 entries of each network, or 8 of float64, whose numbers take two registers
    vectors = (1024 if statistics.dtype == torch.float64 else 2048) // width
    n_blocks = triton.cdiv(n_cols, vectors * width)
    shared = dict(
        row_mask_ptr=operands["row_mask_ptr"],
        upstream_ptr=upstream,
        statistics_ptr=statistics.contiguous(),  # mapped upstreams have one of all, expanded
        of_student_ptr=outputs["of_student_ptr"],
        of_teacher_ptr=outputs["of_teacher_ptr"],
        tops_ptr=statistics.new_empty((n_rows, 2), dtype=torch.int32),
        sums_ptr=statistics.new_empty((n_rows, n_blocks, gradients.N_SUMS.value)),
        n_blocks=n_blocks,
        strides=operands["strides"],
        DTYPE=operands["DTYPE"],
    )
    are_congruent = (x is not None and congruent(student, rows_of(x), width) for x in found[:2])
    with on_device(rows.student):
        gradients.both_gradients[(n_rows * n_blocks,)](
            **{**operands, **shared},
            HAS_TEMPERATURES=any(x is not None for x in found[2:]),
            FAST=of_rows._has_fast_log2(rows),
            CONGRUENT=congruent(student, teacher, width),
            **dict(zip(("STUDENT_CONGRUENT", "TEACHER_CONGRUENT"), are_congruent, strict=True)),
            VECTORS=vectors,
            WIDTH=width,
            num_warps=4,
        )
        gradients.finish_rows[(n_rows,)](
            **{**outputs, **shared},
            n_cols=n_cols,
            BLOCKS=triton.next_power_of_2(n_blocks),
            num_warps=1,
        )


def _operands(rows: Rows, student: Strided, teacher: Strided, upstream: Tensor) -> dict[str, Any]:
    """Return what both sweeps take, by the names of their parameters."""
    arguments = of_rows._arguments(rows)
    return dict(
        {name: arguments[name] for name in _TAKEN},
        student_ptr=student.ptr,
        teacher_ptr=teacher.ptr,
        upstream_ptr=upstream,
        strides=reading.Strides(
            *(student.outer_stride, student.inner_stride),
            *(teacher.outer_stride, teacher.inner_stride),
            *(0, 0),  # the gradients are contiguous
            *(upstream.stride(0), 0),
        ),
    )


def _outputs(found: Sequence[Tensor | None]) -> dict[str, Any]:
    student, teacher, student_temperature, teacher_temperature = found
    return dict(
        of_student_ptr=student,
        of_teacher_ptr=teacher,
        of_student_temperature_ptr=student_temperature,
        of_teacher_temperature_ptr=teacher_temperature,
    )
