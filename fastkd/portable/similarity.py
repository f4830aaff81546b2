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
    return Divergence(Problem(*arguments)).forward()


class Divergence:
    """Of the teacher's similarities and the student's, chunk by chunk."""

    chunks: type[Similarities] = Similarities

    def __init__(self, problem: Problem) -> None:
        self.student, self.teacher = (
            self.chunks(
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
        self.shifts = self.student.shift(), self.teacher.shift()

    def forward(self) -> tuple[Tensor, Tensor]:
        student = self.student
        buffers = student.buffer(), student.buffer()
        losses = student.q.new_empty(len(student.q))
        for rows, s in student.chunks(buffers[0]):
            t = self.teacher.rows(rows, buffers[1])
            losses[rows] = self.losses(rows, s, t)
            if student.wanted:
                self.add_slopes(rows, s, t)
        return losses.sum(), torch.cat([*student.gradients(), losses.new_empty(0)])

    def losses(self, rows: slice, s: Tensor, t: Tensor) -> Tensor:
        """Of these rows; leaves P in s and R in t."""
        difference = torch.sub(t, s, out=self.student.of_spare(s))
        self.student.leave_out(rows, difference, 0.0)
        largest, sums = [], []
        for network, x, shift in zip(
            (self.student, self.teacher), (s, t), self.shifts, strict=True
        ):
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

    def add_slopes(self, rows: slice, s: Tensor, t: Tensor) -> None:
        """After the losses of these rows."""
        self.student.add(rows, s.sub_(t))


def backward(upstream: Tensor, statistics: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Each gradient, in the dtype of its tensor."""
    gradients = Problem(*arguments).allocate_gradients()
    split(statistics, gradients, upstream)
    return gradients
