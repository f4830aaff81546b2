"""Solve `SortedRows` in PyTorch, for any device: sort softmax rows, and sum what they differ by.

The k-th largest q meets the k-th largest p. With σ the sign of their difference, taken back to the
entry v that has this q, the gradient in a logit is q_v (σ_v − Σ q σ) / T. The forward makes it
where it knows what the losses are multiplied by. Otherwise it keeps a byte for each logit, σ, and
the backward makes the softmax again without sorting. A backward that finds neither, the second one
of a graph or that of torch.compile, sorts again.

Rows are taken in chunks: to sort takes up to 40 bytes for each number of a chunk. On a CPU all rows
of a chunk are sorted at once as whole numbers, which begin with that of the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd._pages import in_huge_pages
from fastkd._precision import compute_dtype
from fastkd.portable._chunks import by_workers, cut, for_each, most_elements
from fastkd.portable._row_chunks import at, foresees_weight, has_zeros, rescale
from fastkd.problems.sorted_rows import SortedRows

_ON_CPU, _ELSEWHERE = 1 << 16, 1 << 22  # elements of a chunk
_FLAT = 1 << 15  # elements from which on PyTorch sorts whole numbers by radix
_BITS = (1 << 31) - 1  # those of a float32 without its sign


def n_statistics(problem: SortedRows) -> int:
    """Return how many numbers of each row the backward needs: the largest logit, Z and Σ q σ."""
    return 3


def forward(problem: SortedRows, needs_grad: Sequence[bool]) -> tuple[tuple[Tensor], tuple]:
    """Return the distances, and what the backward needs.

    That is statistics of the rows, and the gradient for the row weight or else the signs.
    """
    problem = _in_compute_dtype(problem)
    student, teacher = problem.student, problem.teacher
    examples, dtype = student.shape[:-1], compute_dtype(student, teacher)
    table = student.new_empty((examples.numel(), 4), dtype=dtype)
    makes_gradient, of_rows = needs_grad[0] and foresees_weight(problem), []
    if needs_grad[0]:
        kept = torch.empty_like(
            student,
            dtype=student.dtype if makes_gradient else torch.int8,
            memory_format=torch.contiguous_format,
        )
        of_rows = [in_huge_pages(kept)]
    factors = _factors(problem, problem.row_weight)

    def work(rows: slice, z: Tensor, z_teacher: Tensor, *kept: Tensor) -> None:
        q, top, total = _softmax(z, problem.student_temperature, dtype)
        p, *_ = _softmax(z_teacher, problem.teacher_temperature, dtype)
        signs = [torch.empty_like(q)] if makes_gradient else kept
        distance, mean = _compare(q, p, *signs)
        torch.cat([distance, top, total, mean], 1, out=table[rows])
        if makes_gradient:
            _write_slope(q, signs[0], mean, at(factors, rows), *kept)

    _for_chunks(work, student, teacher, *of_rows)
    losses = table[:, 0].clone().view(examples)
    if problem.row_mask is not None:
        losses.masked_fill_(~problem.row_mask, 0)
    statistics = table[:, 1:].contiguous().view(*examples, 3)
    return (losses,), (statistics, *of_rows)


def backward(
    problem: SortedRows,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    kept: Tensor | None = None,
) -> Tensor:
    """Return upstream · ∂losses with respect to the student, in what is kept if that is one."""
    problem = _in_compute_dtype(problem)
    student, dtype = problem.student, statistics.dtype
    (of_losses,) = upstream
    assert of_losses is not None
    signs = kept if kept is not None and kept.dtype == torch.int8 else None
    if kept is not None and signs is None and rescale(kept, of_losses, problem.row_weight, dtype):
        return kept
    factors = _factors(problem, of_losses)
    table = statistics.reshape(-1, 3, 1)
    gradient = kept if signs is None else None
    if gradient is None:
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format)

    def work(rows: slice, z: Tensor, z_teacher: Tensor, out: Tensor, *signs: Tensor) -> None:
        top, total, mean = table[rows].unbind(1)
        q = _exponentials(z.to(dtype), top, problem.student_temperature).div_(total)
        if signs:
            (sign,) = signs
        else:
            sign = torch.empty_like(q, dtype=torch.int8)
            _compare(q, _softmax(z_teacher, problem.teacher_temperature, dtype)[0], sign)
        _write_slope(q, sign, mean, at(factors, rows), out)

    of_rows = [gradient] if signs is None else [gradient, signs]
    _for_chunks(work, student, problem.teacher, *of_rows)
    return gradient


def _factors(problem: SortedRows, of_losses: Number) -> Number:
    """Return what multiplies the slopes of rows, [N, 1] or one number, 0 where they are masked."""
    dtype = compute_dtype(problem.student, problem.teacher)
    if isinstance(of_losses, Tensor):
        of_losses = of_losses.reshape(-1, 1).to(dtype)
    factors = of_losses / problem.student_temperature
    if problem.row_mask is None:
        return factors
    mask = problem.row_mask.reshape(-1, 1)
    return torch.where(mask, factors, torch.zeros_like(mask, dtype=dtype))


def _write_slope(q: Tensor, sign: Tensor, mean: Tensor, factor: Number, out: Tensor) -> None:
    """Write factor · q (σ − Σ q σ) of rows, overwriting q."""
    slope = q.mul_(sign - mean).mul_(factor)
    if isinstance(factor, Tensor) and has_zeros(factor):
        # a row of weight 0 may hold NaN, and what is 0 times NaN must be 0
        slope = torch.where(factor == 0, 0, slope)
    out.copy_(slope)


def _softmax(
    logits: Tensor, temperature: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the softmax of the rows, their largest logits, and Z with respect to them."""
    z = logits.to(dtype)
    top = z.amax(-1, keepdim=True)
    e = _exponentials(z, top, temperature)
    total = e.sum(-1, keepdim=True)
    return e.div_(total), top, total


def _exponentials(z: Tensor, top: Tensor, temperature: float | Tensor) -> Tensor:
    # a sort of all rows at once takes their numbers as they lie in memory
    return (z.contiguous() - top).mul_(1 / (math.log(2) * temperature)).exp2_()


def _compare(q: Tensor, p: Tensor, signs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return Σ |sort(q) − sort(p)| and Σ q σ of the rows, and write the signs σ."""
    difference, order = _sorted(q)
    others, _ = _sorted(p)
    n = min(q.shape[-1], p.shape[-1])
    sorted_q = difference.clone()
    difference[:, :n].sub_(others[:, :n])
    sign = difference.sign()
    if signs is not None:
        narrow = sign.to(signs.dtype)
        if order.ndim == 1:
            signs.view(-1).scatter_(0, order, narrow.view(-1))
        else:
            signs.scatter_(1, order, narrow)
    mean = sorted_q.mul_(sign).sum(-1, keepdim=True)
    of_others = others[:, n:].sum(-1, keepdim=True)
    distance = difference.abs_().sum(-1, keepdim=True).add_(of_others)
    # a NaN has the sign 0, and a row that has one has no gradient
    return distance, mean.add_(distance - distance)


def _sorted(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of probabilities, largest first, and where these numbers stood.

    The places are those in the rows, or of a flat sort those in the matrix. Equal numbers keep
    their order, so that the same one of them gets the sign as by the formula.
    """
    if x.dtype != torch.float32 or x.numel() < _FLAT or not _sorts_by_radix(x):
        return torch.sort(x, dim=-1, descending=True, stable=True)
    # bits of numbers from 0 on are in their order; a NaN of either sign comes first
    rows = torch.arange(len(x), device=x.device).unsqueeze(1) << 31
    keys = (x.view(torch.int32) & _BITS).bitwise_xor_(_BITS) + rows
    keys, places = torch.sort(keys.view(-1), stable=True)
    found = keys.bitwise_and_(_BITS).bitwise_xor_(_BITS).to(torch.int32)
    return found.view(torch.float32).view_as(x), places


def _sorts_by_radix(x: Tensor) -> bool:
    """Return whether PyTorch sorts a vector of many whole numbers by their digits.

    That takes a fifth of the time of comparisons.
    """
    return x.is_cpu and "fbgemm" in torch.backends.quantized.supported_engines


def _in_compute_dtype(problem: SortedRows) -> SortedRows:
    """Return the problem with temperatures that are tensors in the precision of the logits."""
    dtype = compute_dtype(problem.student, problem.teacher)
    of_student, of_teacher = (
        x.to(dtype) if isinstance(x, Tensor) else x
        for x in (problem.student_temperature, problem.teacher_temperature)
    )
    return problem._replace(student_temperature=of_student, teacher_temperature=of_teacher)


def _for_chunks(work: Callable[..., None], *tensors: Tensor) -> None:
    """Call `work` with row numbers and the rows of the tensors, each as a matrix.

    Shifted logits, [B, S, V] cut to [:, :-1], do not flatten to rows: their blocks are taken one
    after the other, so that they need no copy.
    """
    student = tensors[0]
    n_rows = student.shape[:-1].numel()
    if not n_rows:
        return
    inner = student.shape[-2] if student.ndim > 1 else 1
    blocks = [x.reshape(-1, inner, x.shape[-1]) for x in tensors]
    if all(x.is_contiguous() for x in blocks):
        inner, blocks = n_rows, [x.reshape(1, n_rows, x.shape[-1]) for x in blocks]
    width = max(x.shape[-1] for x in tensors)
    size = most_elements(student, _ON_CPU, _ELSEWHERE) // width

    def of_chunk(rows: slice, _: None) -> None:
        i = rows.start // inner
        places = slice(rows.start - i * inner, rows.stop - i * inner)
        work(rows, *(x[i, places] for x in blocks))

    chunks = [x for i in range(0, n_rows, inner) for x in cut(range(i, i + inner), size)]
    by_workers(lambda: for_each(of_chunk, chunks, lambda: None), len(chunks) > 1, student)
