"""Chunks of rows of logits that stay in the cache, and what multiplies the gradients of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd._precision import compute_dtype
from fastkd.portable._chunks import by_workers, cut, for_each, most_elements
from fastkd.portable._row_labels import without_label
from fastkd.portable._row_terms import N_SCRATCH, Scratch
from fastkd.problems.rows import Rows

ON_CPU, _ELSEWHERE = 1 << 18, 1 << 23  # elements of a chunk
_OF_MANY = 1 << 19  # those of a large problem on a CPU, whose workers then wait less for each other
FEW = 1 << 14  # elements whose buffers cost less than their views do


def foresees_weight(problem: Any) -> bool:
    """Return whether a large problem makes the gradient for its row weight in the forward."""
    student, row_weight = problem.student, problem.row_weight
    is_known = isinstance(row_weight, Tensor) or row_weight != 0
    # a loss in float16 is scaled so that its gradient does not vanish
    return is_known and student.dtype != torch.float16


def rescale(foreseen: Tensor, upstream: Tensor, row_weight: Number, dtype: torch.dtype) -> bool:
    """Turn the gradient for the row weight into that for the upstream one, if that can be done.

    Return whether it was: a gradient in a narrower dtype would be rounded twice.
    """
    factor = upstream.reshape(-1, 1).to(dtype) / row_weight
    # elsewhere than on a CPU a look at the numbers would be a host sync
    if factor.is_cpu and (factor == 1).all():
        return True
    if foreseen.dtype != dtype or not foreseen.is_contiguous():
        return False
    select(foreseen.view(-1, foreseen.shape[-1]).mul_(factor), factor)
    return True


def in_compute_dtype(problem: Rows) -> Rows:
    """Return the problem with the numbers that are tensors in the precision of the logits."""
    numbers = (
        problem.student_temperature,
        problem.teacher_temperature,
        problem.weight,
        problem.scale,
    )
    if Tensor not in map(type, numbers):
        return problem
    dtype = compute_dtype(problem.student, problem.teacher)
    student, teacher, weight, scale = (x.to(dtype) if isinstance(x, Tensor) else x for x in numbers)
    return problem._replace(
        student_temperature=student, teacher_temperature=teacher, weight=weight, scale=scale
    )


def factors_of(
    problem: Rows, upstream: Tensor | None, ce_upstream: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return what multiplies the gradients of both losses in each row [N, 1], 0 if masked."""
    dtype, masked = compute_dtype(problem.student, problem.teacher), without_label(problem)
    of_losses = None if upstream is None else upstream.reshape(-1, 1).to(dtype)
    if of_losses is not None and problem.row_mask is not None:
        of_losses = torch.where(problem.row_mask.reshape(-1, 1), of_losses, 0)
    if ce_upstream is None or problem.labels is None:
        return of_losses, None
    of_labels = ce_upstream.reshape(-1, 1).to(dtype)
    return of_losses, of_labels if masked is None else of_labels.masked_fill(
        masked.reshape(-1, 1), 0
    )


def select(rows: Tensor, factor: Tensor) -> Tensor:
    """Zero the rows whose factor is 0, NaN included; on their bits, because that is fast."""
    integers = {4: torch.int32, 8: torch.int64}[rows.element_size()]
    rows.view(integers).bitwise_and_((factor != 0).to(integers).neg_())
    return rows


def for_chunks(
    work: Callable[[slice, list[Tensor], Scratch], None],
    n_scratch: int,
    *tensors: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Call `work` with row numbers, chunks [R, V] of the tensors, and scratch of that shape.

    The scratch has the dtype, or else the compute dtype of the first two tensors.
    Shifted logits, [B, S, V] cut to [:, :-1], do not flatten to rows: their blocks are taken one
    after the other, so that they need no copy.
    """
    student, teacher = tensors[:2]
    if not student.numel():
        return
    n_cols, most = student.shape[-1], most_elements(student, ON_CPU, _ELSEWHERE)
    if student.numel() <= most and all(x.is_contiguous() for x in tensors):
        work(slice(None), [x.view(-1, n_cols) for x in tensors], (None,) * n_scratch)
        return
    most = max(most, most_elements(student, min(_OF_MANY, student.numel() // 64), _ELSEWHERE))
    inner = student.shape[-2] if student.ndim > 1 else 1
    blocks = [x.reshape(-1, inner, n_cols) for x in tensors]
    if all(x.is_contiguous() for x in blocks):
        blocks = [x.reshape(1, -1, n_cols) for x in blocks]
    n_blocks, inner, _ = blocks[0].shape
    size = max(1, most // n_cols)
    # the cache holds more rows where they need less scratch, but many threads want a chunk each
    size = min(inner, max(size, min(size * N_SCRATCH // n_scratch, inner // 64)))
    shape, dtype = (n_scratch, size, n_cols), dtype or compute_dtype(student, teacher)
    matrices = list(zip(*blocks, strict=True))

    def of_chunk(places: slice, scratch: Sequence[Tensor]) -> None:
        i, n = places.start // inner, places.stop - places.start
        rows = slice(places.start - i * inner, places.stop - i * inner)
        if n < size:
            scratch = [x[:n] for x in scratch]
        work(places, [x[rows] for x in matrices[i]], scratch)

    def scratch() -> Sequence[Tensor]:
        return student.new_empty(shape, dtype=dtype).unbind()

    chunks = [x for i in range(n_blocks) for x in cut(range(i * inner, (i + 1) * inner), size)]
    by_workers(lambda: for_each(of_chunk, chunks, scratch), len(chunks) > 1, student)
