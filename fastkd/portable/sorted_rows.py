"""Solve `SortedRows` in PyTorch, for any device: sort softmax rows, and sum what they differ by.

The k-th largest q meets the k-th largest p. With σ the sign of their difference, taken back to the
entry v that has this q, the gradient in a logit is q_v (σ_v − Σ q σ) / T. So the forward keeps a
byte for each logit, σ, and the backward makes the softmax again without sorting. A backward that
finds no signs, the second one of a graph or that of torch.compile, sorts again.

Rows are taken in chunks: to sort takes 12 bytes for each number of a chunk, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkd._precision import compute_dtype
from fastkd.portable._chunks import by_workers, cut, for_each, most_elements
from fastkd.problems.sorted_rows import SortedRows

_ON_CPU, _ELSEWHERE = 1 << 16, 1 << 22  # elements of a chunk


def n_statistics(problem: SortedRows) -> int:
    """Return how many numbers of each row the backward needs: the largest logit, Z and Σ q σ."""
    return 3


def forward(problem: SortedRows, needs_grad: Sequence[bool]) -> tuple[tuple[Tensor], tuple]:
    """Return the distances, and the statistics of the rows and their signs for the backward."""
    problem = _in_compute_dtype(problem)
    student, teacher = problem.student, problem.teacher
    examples, dtype = student.shape[:-1], compute_dtype(student, teacher)
    table = student.new_empty((examples.numel(), 4), dtype=dtype)
    signs = [torch.empty_like(student, dtype=torch.int8, memory_format=torch.contiguous_format)]

    def work(rows: slice, z: Tensor, z_teacher: Tensor, *signs: Tensor) -> None:
        q, top, total = _softmax(z, problem.student_temperature, dtype)
        p, *_ = _softmax(z_teacher, problem.teacher_temperature, dtype)
        distance, mean = _compare(q, p, *signs)
        torch.cat([distance, top, total, mean], 1, out=table[rows])

    _for_chunks(work, student, teacher, *signs[: needs_grad[0]])
    losses = table[:, 0].clone().view(examples)
    if problem.row_mask is not None:
        losses.masked_fill_(~problem.row_mask, 0)
    statistics = table[:, 1:].contiguous().view(*examples, 3)
    return (losses,), (statistics, *signs[: needs_grad[0]])


def backward(
    problem: SortedRows,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    signs: Tensor | None = None,
) -> Tensor:
    """Return upstream · ∂losses with respect to the student."""
    problem = _in_compute_dtype(problem)
    student, dtype = problem.student, statistics.dtype
    (factors,) = upstream
    assert factors is not None
    factors = factors.reshape(-1, 1).to(dtype)
    if problem.row_mask is not None:
        factors = torch.where(problem.row_mask.reshape(-1, 1), factors, 0)
    table = statistics.reshape(-1, 3, 1)
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)

    def work(rows: slice, z: Tensor, z_teacher: Tensor, out: Tensor, *signs: Tensor) -> None:
        top, total, mean = table[rows].unbind(1)
        q = z.to(dtype).sub(top).div_(problem.student_temperature).exp_().div_(total)
        if signs:
            (sign,) = signs
        else:
            sign = torch.empty_like(q, dtype=torch.int8)
            _compare(q, _softmax(z_teacher, problem.teacher_temperature, dtype)[0], sign)
        factor = factors[rows]
        slope = q.mul_(sign - mean).mul_(factor / problem.student_temperature)
        # a row of weight 0 may hold NaN, and what is 0 times NaN must be 0
        out.copy_(torch.where(factor == 0, 0, slope))

    kept = [] if signs is None else [signs]
    _for_chunks(work, student, problem.teacher, gradient, *kept)
    return gradient


def _softmax(
    logits: Tensor, temperature: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the softmax of the rows, their largest logits, and Z with respect to them."""
    z = logits.to(dtype)
    top = z.amax(-1, keepdim=True)
    e = (z - top).div_(temperature).exp_()
    total = e.sum(-1, keepdim=True)
    return e.div_(total), top, total


def _compare(q: Tensor, p: Tensor, signs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return Σ |sort(q) − sort(p)| and Σ q σ of the rows, and write the signs σ."""
    # stable, so that of equal probabilities the same one gets the sign as by the formula
    difference, order = torch.sort(q, dim=-1, descending=True, stable=True)
    others = torch.sort(p, dim=-1, descending=True).values
    n = min(q.shape[-1], p.shape[-1])
    sorted_q = difference.clone()
    difference[:, :n].sub_(others[:, :n])
    sign = difference.sign()
    if signs is not None:
        signs.scatter_(1, order, sign.to(signs.dtype))
    mean = sorted_q.mul_(sign).sum(-1, keepdim=True)
    of_others = others[:, n:].sum(-1, keepdim=True)
    return difference.abs_().sum(-1, keepdim=True).add_(of_others), mean


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
