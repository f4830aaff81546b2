"""The divergence of two networks' similarities in PyTorch, for any device, without their matrices.

Chunks of rows of S and T, made together, stay in the cache. With P and R the softmax of the rows of
S and of T, the loss of a row and its slopes in S are

    KL_i = Σ_j R_ij (T_ij − S_ij + log Σ_k exp S_ik − log Σ_k exp T_ik)     G = w (P − R)

A cross-entropy is Σ_j R_ij (log Σ_k exp S_ik − S_ij), with the same slopes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.portable._pair_chunks import PairChunks, are_large
from fastkd.problems.pairs import Gradients, SoftPairs, weighted_sum

_SMALL = 1 << 14  # pairs whose errors do not average out: the logarithms of softmaxes are exact


def value_and_gradients(problem: SoftPairs, needs_grad: Sequence[bool]) -> tuple[Tensor, Gradients]:
    """Return the sum of the rows' losses, and its gradients in the trained fields."""
    student = PairChunks(
        problem.query, problem.key, problem.scale, needs_grad,
        first=problem.first, normalize=problem.normalize, half=problem.half,
        weights=problem.weights,
    )  # fmt: skip
    teacher = PairChunks(
        problem.teacher_query, problem.teacher_key, problem.teacher_scale, (False,) * 3,
        first=problem.first, normalize=problem.normalize, half=problem.teacher_half,
    )  # fmt: skip
    is_small = student.q.is_cpu and len(student.q) * len(student.k) <= _SMALL
    shifts = student.shift(), teacher.shift()
    buffer, teacher_buffer = student.buffer(), student.buffer()
    losses, weights = buffer.new_empty(len(student.q)), problem.weights
    of_teacher = problem.form == "kl"  # otherwise the loss is without the teacher's entropy

    def of_chunk(rows: slice, s: Tensor, spare: Tensor) -> None:
        t = teacher.rows(rows, teacher_buffer)
        if is_small:
            return of_few(rows, s, t)
        difference = torch.sub(t, s, out=spare) if of_teacher else torch.neg(s, out=spare)
        student.mask(rows, difference, 0.0)
        s_shift, s_sums = _softmax(student, rows, s, shifts[0])
        t_shift, t_sums = _softmax(teacher, rows, t, shifts[1])
        # the log-sum-exps are large and alike, so that their difference is made of the differences
        # of their parts. The quotient of the sums may be no float32 number; that of their roots is.
        log_sums = s_shift + s_sums.log()
        if of_teacher:
            log_sums = (s_shift - t_shift) + 2 * (s_sums.sqrt() / t_sums.sqrt()).log()
        torch.linalg.vecdot(t, difference.add_(log_sums[:, None]), out=losses[rows])
        if any(needs_grad):
            add(rows, s.sub_(t))

    def of_few(rows: slice, s: Tensor, t: Tensor) -> None:
        log_q = student.mask(rows, s, -torch.inf).log_softmax(1)
        log_p = teacher.mask(rows, t, -torch.inf).log_softmax(1)
        difference = log_p - log_q if of_teacher else -log_q
        difference, p = student.mask(rows, difference, 0.0), log_p.exp_()
        torch.linalg.vecdot(p, difference, out=losses[rows])
        if any(needs_grad):
            add(rows, torch.sub(log_q.exp_(), p, out=s))

    def add(rows: slice, slopes: Tensor) -> None:
        student.add(rows, slopes, None if weights is None else weights[rows])

    student.for_each(buffer, of_chunk, student.add_to_keys if any(needs_grad) else None)
    return weighted_sum(losses.relu_(), weights), student.gradients()


def _softmax(
    chunks: PairChunks, rows: slice, x: Tensor, shift: float | None
) -> tuple[Tensor | float, Tensor]:
    """Turn rows of S into their softmax; return what was subtracted from S, and the sums of exp."""
    subtracted, sums = chunks.exponentials(rows, x, shift)
    if shift is not None and not are_large(sums):
        subtracted, sums = chunks.exponentials(rows, chunks.rows(rows, x), None)
    x.div_(sums[:, None])
    return subtracted, sums
