"""Chunks of rows of logits that stay in the cache, and what multiplies the gradients of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd._precision import compute_dtype
from fastkd.portable._chunks import by_workers, cut, for_each, most_elements, with_buffers
from fastkd.portable._row_labels import without_label
from fastkd.portable._row_terms import N_SCRATCH
from fastkd.portable._softmaxes import Scratch
from fastkd.problems.rows import Rows

ON_CPU, _ELSEWHERE = 1 << 18, 1 << 23  # elements of a chunk
_OF_MANY = 1 << 19  # those of a large problem on a CPU, whose workers then wait less for each other
FEW = 1 << 14  # elements whose buffers cost less than their views do

Result = TypeVar("Result")
OfRows = TypeVar("OfRows")


def foresees_weight(problem: Any) -> bool:
    """Return whether the forward makes the gradient for the row weight of the problem."""
    is_known = isinstance(problem.row_weight, Tensor) or problem.row_weight != 0
    # a loss in float16 is scaled so that its gradient does not vanish
    return is_known and problem[0].dtype != torch.float16


def rescale(foreseen: Tensor, upstream: Tensor, row_weight: Number, dtype: torch.dtype) -> bool:
    """Turn the gradient for the row weight into that for the upstream one, if that can be done.

    Return whether it was: a gradient in a narrower dtype would be rounded twice.
    """
    if foreseen.dtype != dtype or not foreseen.is_contiguous():
        return False
    factor = upstream.reshape(-1, 1).to(dtype) / row_weight
    foreseen.view(-1, foreseen.shape[-1]).mul_(factor)
    if has_zeros(factor):
        select(foreseen.view(-1, foreseen.shape[-1]), factor)
    return True


def in_compute_dtype(problem: Rows) -> Rows:
    """Return the problem with the numbers that are tensors in the precision of the logits."""
    numbers = (
        problem.student_temperature,
        problem.teacher_temperature,
        problem.weight,
        problem.scale,
        problem.ce_scale,
        problem.share,
    )
    if Tensor not in map(type, numbers):
        return problem
    dtype = compute_dtype(problem.student, problem.teacher)
    student, teacher, weight, scale, ce_scale, share = (
        x.to(dtype) if isinstance(x, Tensor) else x for x in numbers
    )
    return problem._replace(
        student_temperature=student,
        teacher_temperature=teacher,
        weight=weight,
        scale=scale,
        ce_scale=ce_scale,
        share=share,
    )


def factors_of(
    problem: Rows, upstream: Number | None, ce_upstream: Number | None
) -> tuple[Number | None, Number | None]:
    """Return what multiplies the gradients of both losses in each row [N, 1], 0 if masked.

    A number that all rows share, of which none is masked, stays one.
    """
    mask, of_losses = problem.row_mask, None
    if upstream is not None:
        of_losses = _column(problem, upstream, None if mask is None else ~mask)
    if problem.adds_cross_entropy:
        ce_upstream = None if of_losses is None else of_losses * problem.ce_scale
    if ce_upstream is None or problem.labels is None:
        return of_losses, None
    return of_losses, _column(problem, ce_upstream, without_label(problem))


def _column(problem: Rows, number: Number, masked: Tensor | None) -> Number:
    """Return numbers of rows as a column [N, 1] in the compute dtype, with 0 where masked."""
    student, dtype = problem.student, compute_dtype(problem.student, problem.teacher)
    if not isinstance(number, Tensor):
        if masked is None:
            return number
        return student.new_full((masked.numel(), 1), number, dtype=dtype).masked_fill_(
            masked.reshape(-1, 1), 0
        )
    column = number.reshape(-1, 1).to(dtype).expand(student.shape[:-1].numel(), 1)
    return column if masked is None else column.masked_fill(masked.reshape(-1, 1), 0)


def has_zeros(factors: Number) -> bool:
    """Return whether a factor may be 0: elsewhere than on a CPU a look would be a host sync."""
    if not isinstance(factors, Tensor):
        return factors == 0
    return not (factors.is_cpu and bool(factors.all()))


def at(number: OfRows, rows: slice) -> OfRows:
    """Return a number that all rows share, or those of some rows."""
    if rows.stop is None or not isinstance(number, Tensor) or not number.ndim:
        return number
    return number[rows]  # type: ignore[return-value]


def joined(of_chunks: Sequence[Tensor | None], student: Tensor) -> Any:
    """Return numbers of all rows (...) from those of chunks, [R, 1], or None if there are none."""
    there = [x for x in of_chunks if x is not None]
    if not there:
        return None
    return (there[0] if len(there) == 1 else torch.cat(there)).view(student.shape[:-1])


def with_views(gradient: Tensor) -> Tensor:
    """Return the gradient, or as much room if chunks of its rows are no views of it."""
    if gradient.ndim <= 3 or gradient.is_contiguous():
        return gradient
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


def is_written_at_once(gradient: Tensor, dtype: torch.dtype) -> bool:
    """Return whether rows of the gradient can be computed in their place."""
    return gradient.dtype == dtype and (gradient.stride(-1) == 1 or gradient.shape[-1] == 1)


def select(rows: Tensor, factor: Number) -> Tensor:
    """Zero the rows whose factor is 0, NaN included; on their bits, because that is fast."""
    if not isinstance(factor, Tensor):
        return rows if factor else rows.zero_()
    integers = {4: torch.int32, 8: torch.int64}[rows.element_size()]
    rows.view(integers).bitwise_and_((factor != 0).to(integers).neg_())
    return rows


def for_chunks(
    work: Callable[[slice, list[Tensor], Scratch], Result],
    n_scratch: int,
    *tensors: Tensor,
    dtype: torch.dtype | None = None,
) -> list[Result]:
    """Call `work` with row numbers, chunks [R, V] of the tensors, and scratch of that shape.

    Return its results in the order of the rows.
    The scratch has the dtype, or else the compute dtype of the first two tensors.
    Shifted logits, [B, S, V] cut to [:, :-1], do not flatten to rows: their blocks are taken one
    after the other, so that they need no copy.
    """
    student, teacher = tensors[:2]
    if not student.numel():
        return []
    n_cols, most = student.shape[-1], most_elements(student, ON_CPU, _ELSEWHERE)
    if student.numel() <= most and all(x.is_contiguous() for x in tensors):
        matrices = [x if x.ndim == 2 else x.view(-1, n_cols) for x in tensors]
        if student.numel() <= FEW:
            return [work(slice(None), matrices, (None,) * n_scratch)]
        return with_buffers(
            lambda buffers: [work(slice(None), matrices, buffers)],
            (n_scratch, *matrices[0].shape),
            dtype or compute_dtype(student, teacher),
            student,
        )
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
    of_blocks = list(zip(*blocks, strict=True))

    def of_chunk(places: slice, scratch: Sequence[Tensor]) -> Result:
        i, n = places.start // inner, places.stop - places.start
        rows = slice(places.start - i * inner, places.stop - i * inner)
        if n < size:
            scratch = [x[:n] for x in scratch]
        return work(places, [x[rows] for x in of_blocks[i]], scratch)

    def scratch() -> Sequence[Tensor]:
        return student.new_empty(shape, dtype=dtype).unbind()

    chunks = [x for i in range(n_blocks) for x in cut(range(i * inner, (i + 1) * inner), size)]
    return by_workers(lambda: for_each(of_chunk, chunks, scratch), len(chunks) > 1, student)
