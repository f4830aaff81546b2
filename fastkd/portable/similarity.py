"""The divergence of similarities in PyTorch, for any device, without their matrices.

Chunks of rows of S and T, made together, stay in the cache. With P and R the softmax of the rows of
S and of T, a row's loss and slopes are

    KL_i = Σ_j R_ij (T_ij − S_ij + log Σ_k exp S_ik − log Σ_k exp T_ik)          G = P − R
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.portable._similarities import Similarities, are_large, split
from fastkd.similarity import Problem


def allocate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """What `forward` returns, empty."""
    return Problem(*arguments).allocate()


def allocate_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """What `backward` returns, empty."""
    return Problem(*arguments).allocate_gradients()


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(*Problem) -> the sum of the rows' losses, and the gradients of it, one after another."""
    problem = Problem(*arguments)
    student, teacher = (
        Similarities(
            *network,
            dtype=problem.dtype,
            first=problem.first,
            normalize=True,
            half=half,
            wanted=wanted,
        )
        for network, half, wanted in (
            (problem[:3], problem.half, problem.wanted),
            (problem[3:6], problem.teacher_half, ""),
        )
    )
    shifts = student.shift(), teacher.shift()
    buffers = student.buffer(), student.buffer(), student.buffer()
    losses = student.q.new_empty(len(student.q))
    for rows, s in student.chunks(buffers[0]):
        t, p = teacher.rows(rows, buffers[1]), buffers[2][: len(s)]
        losses[rows] = _divergence(student, teacher, rows, s, t, p, shifts)
        if problem.wanted:
            student.add(rows, s.sub_(t))
    return losses.sum(), torch.cat([*student.gradients(), losses.new_empty(0)])


def _divergence(
    student: Similarities,
    teacher: Similarities,
    rows: slice,
    s: Tensor,
    t: Tensor,
    difference: Tensor,
    shifts: tuple[float | None, float | None],
) -> Tensor:
    """Of these rows; leaves P in s and R in t."""
    torch.sub(t, s, out=difference)
    student.leave_out(rows, difference, 0.0)
    largest, sums = [], []
    for network, x, shift in ((student, s, shifts[0]), (teacher, t, shifts[1])):
        if shift is not None:
            largest.append(x.new_full((len(x), 1), shift))
            sums.append(network.exponentials(rows, x, shift).sum(1, keepdim=True))
            if are_large(sums[-1]):
                x.div_(sums[-1])
                continue
            del largest[-1], sums[-1]
            network.rows(rows, x)
        network.leave_out(rows, x, -torch.inf)
        largest.append(x.amax(1, keepdim=True))
        sums.append(x.sub_(largest[-1]).exp_().sum(1, keepdim=True))
        x.div_(sums[-1])
    # the difference of the log-sum-exps first, and not of each: they are large and alike
    # and their quotient by its root, which stays a float32 number where it does not
    log_sums = (largest[0] - largest[1]) + 2 * (sums[0].sqrt() / sums[1].sqrt()).log()
    return torch.linalg.vecdot(t, difference.add_(log_sums))


def backward(upstream: Tensor, statistics: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Each gradient, in the dtype of its tensor."""
    gradients = Problem(*arguments).allocate_gradients()
    split(statistics, gradients, upstream)
    return gradients
