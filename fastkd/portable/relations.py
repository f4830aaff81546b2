"""Distances and angles in a batch in PyTorch, for any device.

Both losses see the embeddings only through the squared distances Q. With h = Q/2, d = √Q, r = 1/d
(0 for examples that coincide) the cosine at example j between i and k is the law of cosines,

    A_j[i,k] = r_ij r_kj (h_ij + h_kj − h_ik) = ½ (d_ij r_kj + r_ij d_kj) − r_ij r_kj h_ik,

so that Q alone depends on D. It is summed from differences, because the products of a Gram matrix
would cancel. With C the slopes of the penalty and W_j[i,k] = C r_ij r_kj the gradient in Q_ab is

    g_ab = −U_ab + V_ab + V_ba − S_ab − S_ba        U_ik = Σ_j W_j[i,k]      V_ji = Σ_k W_j[i,k]
    S_ji = ½ r_ij² (Q_ij V_ji + Σ_k W_j[i,k] (Q_kj − Q_ik))

and that in the embeddings is its graph Laplacian, dx_a = 2 Σ_b g_ab (x_a − x_b). All of the N³ work
is in chunks that stay in the cache. A matrix A_j is symmetric, so that one triangle of its blocks
is enough. Groups of vertices j are given to workers: they own rows of V and S, and return a U each.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._precision import compute_dtype
from fastkd.portable import _chunks
from fastkd.problems.relations import LEAST_LENGTH, LEAST_SQUARE, Number, Relations

_ON_CPU = 1 << 19  # three buffers of that size stay in a CPU's cache, and calls on fewer are short
_ELSEWHERE = 1 << 24
_N_GROUPS = 8  # of vertices, because more would make U of a block larger than all the rest


def value_and_gradients(
    problem: Relations, needs_grad: tuple[bool, ...]
) -> tuple[Tensor, tuple[Tensor | None]]:
    """Return the local rows' share of the loss, and the gradient of the whole loss in them."""
    whole = problem.whole
    is_large = len(whole) ** 3 > _chunks.most_elements(whole, _ON_CPU, _ELSEWHERE)
    return _chunks.by_workers(lambda: _solve(problem, needs_grad), is_large, whole)


def _solve(problem: Relations, needs_grad: tuple[bool, ...]) -> tuple[Tensor, tuple[Tensor | None]]:
    """Return the loss and the gradient, in chunks that workers share."""
    dtype, local, (with_slopes,) = _dtype(problem), problem.local, needs_grad
    students = problem.whole.to(dtype)
    squares = _squared_distances(students, problem.teacher.to(dtype))
    beta = _penalty_beta(problem.smooth_l1_beta, dtype)
    distance_weight, angle_weight = (
        x.to(dtype) if isinstance(x, Tensor) else x
        for x in (problem.distance_weight, problem.angle_weight)
    )
    parts = []
    if problem.parts != "angle":
        parts.append(_distances(squares, local, distance_weight, beta, with_slopes))
    if problem.parts != "distance":
        parts.append(_angles(squares, local, angle_weight, beta, with_slopes))
    losses, slopes = zip(*parts, strict=True)
    result_dtype = compute_dtype(problem.student, problem.teacher)
    loss = sum(losses[1:], losses[0]).to(result_dtype)
    if not with_slopes:
        return loss, (None,)
    gradient = _laplacian(sum(slopes[1:], slopes[0]), students, local)
    return loss, (gradient.to(result_dtype),)


def _dtype(problem: Relations) -> torch.dtype:
    """Return float64 where products of matrices would be TF32, because they cancel."""
    on_cuda = problem.student.device.type == "cuda"
    is_tf32 = on_cuda and torch.backends.cuda.matmul.allow_tf32
    return torch.float64 if is_tf32 else problem.compute_dtype


def _penalty_beta(beta: Number, dtype: torch.dtype) -> Number:
    """Return the penalty's beta; for 0 a difference below all that rounding leaves."""
    least = 1e-30 if dtype == torch.float64 else 1e-12
    return beta.to(dtype).clamp(min=least) if isinstance(beta, Tensor) else max(beta, least)


def _squared_distances(*networks: Tensor) -> Tensor:
    """Return [networks, N, N], 0 for duplicates and exact far from the origin."""
    x, n = networks[0], len(networks[0])
    if x.device.type not in ("cpu", "cuda"):  # because these alone have pdist
        mode = "donot_use_mm_for_euclid_dist"
        return torch.stack([torch.cdist(x, x, compute_mode=mode) for x in networks]).square_()
    above = torch.ones(n, n, dtype=torch.bool, device=x.device).triu_(1)
    pairs = torch.stack([torch.pdist(x) for x in networks]).square_()
    squares = x.new_zeros(len(networks), n, n).masked_scatter_(above, pairs)
    return squares + squares.mT


# --------------------------------------------------------------------------------------- distances


def _distances(
    squares: Tensor, local: slice, weight: Number, beta: Number, with_slopes: bool
) -> tuple[Tensor, Tensor]:
    """Return the local rows' share of the loss, and the slopes of the whole in their Q, [n, N]."""
    n = squares.shape[-1]
    n_pairs = n * (n - 1)
    distances = squares.clamp(min=LEAST_SQUARE).sqrt_()
    distances.diagonal(dim1=1, dim2=2).zero_()
    units = distances.sum((1, 2), keepdim=True).mul_(beta / n_pairs)
    student, teacher = distances / units
    penalties = F.huber_loss(student[local], teacher[local], reduction="none")
    loss = _chunks.total(penalties) * (beta * weight / n**2)
    if not with_slopes:
        return loss, loss
    slopes = student.sub_(teacher).clamp_(-1, 1)
    d, unit = distances[0], units[0]
    # every distance moves the mean, and with it all penalties
    of_mean = _chunks.total(slopes * d).div_(unit.squeeze() * (n_pairs / beta))
    slopes = slopes[local].sub_(of_mean).div_(d[local]).mul_((beta * weight / n**2) / unit)
    return loss, slopes.masked_fill_(squares[0, local] < LEAST_SQUARE, 0)


# ------------------------------------------------------------------------------------------ angles


class _Cosines(NamedTuple):
    """The factors of the cosines of both networks, in units of beta."""

    q: Tensor  # [N, N], of the student
    teacher_q: Tensor  # [N, N]
    ends: Tensor  # [j, i, 4]: d and r of the student, −d and −r of the teacher
    others: Tensor  # [j, 4, k]: r and d of the student, r and d of the teacher


class _Block(NamedTuple):
    """Pairs of ends, and what the vertices that see them have in common."""

    i: slice
    k: slice
    mirrored: bool  # whether the sums are those of the pairs (k, i) too
    q: Tensor  # [i, k]
    teacher_q: Tensor  # [i, k]
    zero: Tensor
    n_vertices: int  # of a chunk


class _Sums(NamedTuple):
    """The sums over the angles from which their slopes in Q are made, [N, N] each."""

    u: Tensor  # [an end, the other end]
    v: Tensor  # [vertex, an end]
    s: Tensor  # [vertex, an end], without the factor ½ r²


def _angles(
    squares: Tensor, local: slice, weight: Number, beta: Number, with_slopes: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss of the angles at local examples, and the slopes of the whole in their Q.

    The squares are divided by beta in place.
    """
    n = squares.shape[-1]
    d = squares.sqrt()
    r = d.reciprocal().masked_fill_(d < LEAST_LENGTH, 0)
    d.div_(beta)
    squares.div_(beta)
    others, ends = (torch.stack(x, 1) for x in ((r, d), (d, r)))
    ends[1].neg_()
    others, ends = others.view(4, n, n).transpose(0, 1), ends.view(4, n, n).permute(1, 2, 0)
    cosines, whole = _Cosines(squares[0], squares[1], ends, others), slice(0, n)
    loss, at_local = _summed(cosines, local, whole, with_slopes)
    loss = loss * (beta * weight / float(n) ** 3)
    if at_local is None:
        return loss, loss
    r_squared = r[0].square().mul_(beta / 2)
    arms = arms_with_local = torch.addcmul(at_local.v, at_local.s, r_squared, value=-1)
    facing = at_local.u
    if local != whole:
        _, with_local = _summed(cosines, whole, local, with_slopes)
        assert with_local is not None
        arms_with_local = torch.addcmul(with_local.v, with_local.s, r_squared, value=-1)
        facing = with_local.u
    # an edge (local, b) is an arm of the angles at both of its ends, and faces all other vertices
    slopes = (arms[local] + arms_with_local[:, local].T).sub_(facing[local])
    slopes[:, local].fill_diagonal_(0)
    return loss, slopes.mul_(weight / float(n) ** 3)


def _summed(
    cosines: _Cosines, vertices: slice, ends: slice, with_slopes: bool
) -> tuple[Tensor, _Sums | None]:
    """Return the penalties of the angles at `vertices` between one of `ends` and any example."""
    q, n = cosines.q, len(cosines.q)
    whole, rows = slice(0, n), range(vertices.start, vertices.stop)
    # with small blocks the calls would cost more than the half of the angles that they spare
    n_blocks = 1 if n < 256 or ends != whole else 2 if n < 512 else 4
    blocks = _cut(whole, -(-n // n_blocks))
    sums = _Sums(*q.new_zeros(3, n, n)) if with_slopes else None
    most = _chunks.most_elements(q, _ON_CPU, _ELSEWHERE)
    zero = q.new_zeros(1)
    losses = []
    for i in blocks if ends == whole else [ends]:
        for k in blocks:
            if ends == whole and k.start < i.start:
                continue  # because its mirror image is visited
            mirrored, q_ik = ends == whole and k != i, q[i, k]
            size = min(max(1, most // max(1, q_ik.numel())), len(rows))
            block = _Block(i, k, mirrored, q_ik, cosines.teacher_q[i, k], zero, size)
            parts = _chunks.for_each(
                functools.partial(_add, sums, cosines, block),
                _chunks.cut(rows, max(size, -(-len(rows) // _N_GROUPS))),
                functools.partial(q.new_empty, 2, size * q_ik.numel()),
            )
            for of_group, u in parts:
                losses += of_group * (2 if mirrored else 1)
                if sums is not None:
                    sums.u[i, k].add_(u)
            if mirrored and sums is not None:
                sums.u[k, i] = sums.u[i, k].T
    wide = None if q.device.type == "mps" else torch.float64
    loss = torch.stack(losses).sum(dtype=wide) if losses else q.new_zeros(())
    if sums is not None:
        sums.s.addcmul_(q, sums.v)
    return loss, sums


def _add(
    sums: _Sums | None, cosines: _Cosines, block: _Block, vertices: slice, buffers: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Return the penalties of the angles at these vertices, in the block, and their share of U.

    Their rows of V and S are added in place, because no other group has them.
    """
    i, k, mirrored, q_ik, teacher_q_ik, zero, n_vertices = block
    losses, q, of_group = [], cosines.q, torch.zeros_like(q_ik)
    for j in _chunks.cut(range(vertices.start, vertices.stop), n_vertices):
        shape = j.stop - j.start, *q_ik.shape
        x, w = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
        left, right = cosines.ends[j, i], cosines.others[j, :, k]
        torch.mul(teacher_q_ik, left[..., 3:], out=x).mul_(right[:, 2:3])
        torch.mul(left[..., 1:2], right[:, :1], out=w)
        x.addcmul_(w, q_ik).baddbmm_(left, right, beta=-0.5, alpha=0.5)  # A − B
        losses.append(_chunks.total(F.huber_loss(x, zero.expand_as(x), reduction="none")))
        if sums is None:
            continue
        u, v, s = of_group, sums.v, sums.s
        w.mul_(x.clamp_(-1, 1))
        # the difference is taken first, because its terms are as large as the batch is wide
        torch.sub(q[j, None, k], q_ik, out=x)
        v[j, i].add_(w.sum(2))
        s[j, i].add_(x.mul_(w).sum(2))
        u.add_(w.sum(0))
        if mirrored:
            torch.sub(q[j, i, None], q_ik, out=x)
            v[j, k].add_(w.sum(1))
            s[j, k].add_(x.mul_(w).sum(1))
    return losses, of_group


def _cut(whole: slice, size: int) -> list[slice]:
    """Return slices of at most `size` that the whole consists of."""
    return [slice(i, min(i + size, whole.stop)) for i in range(whole.start, whole.stop, size)]


# ---------------------------------------------------------------------------------------- gradient


def _laplacian(slopes: Tensor, x: Tensor, local: slice) -> Tensor:
    """Return dx_a = 2 Σ_b slopes_ab (x_a − x_b) for the local rows."""
    centred = x - x.mean(0)  # the less there is to cancel, the better
    return (slopes.sum(1, keepdim=True) * centred[local]).addmm_(slopes, centred, alpha=-1).mul_(2)
