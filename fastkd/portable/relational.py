"""Distances and angles in a batch in PyTorch, for any device.

Both losses see the embeddings only through the squared distances Q. With h = Q/2, d = √Q, r = 1/d
(0 for examples that coincide) the cosine at example j between i and k is the law of cosines,

    A_j[i,k] = r_ij r_kj (h_ij + h_kj − h_ik) = ½ (d_ij r_kj + r_ij d_kj) − r_ij r_kj h_ik,

so nothing depends on D but Q itself, taken from differences (the products of a Gram matrix would
cancel). With C the slopes of the penalty, W_j[i,k] = C r_ij r_kj, the gradient in Q_ab is

    g_ab = −U_ab + V_ab + V_ba − S_ab − S_ba        U_ik = Σ_j W_j[i,k]      V_ji = Σ_k W_j[i,k]
    S_ji = ½ r_ij² (Q_ij V_ji + Σ_k W_j[i,k] (Q_kj − Q_ik))

and that in the embeddings its graph Laplacian, dx_a = 2 Σ_b g_ab (x_a − x_b). All of the N³ work is
in chunks that stay in the cache; a matrix A_j is symmetric: of its blocks one triangle is enough.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._engine import compute_dtype, scaled_gradient
from fastkd.relational import LEAST_LENGTH, LEAST_SQUARE, Number, Problem

backward = scaled_gradient

_CHUNK_ELEMENTS = {"cpu": 1 << 18}  # three buffers of that size stay in a CPU's cache
_LARGE_CHUNK = 1 << 24  # elsewhere a chunk must pay for its launches


def allocate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """What `forward` returns, empty."""
    return Problem(*arguments).allocate()


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(*Problem) -> the own rows' share of the loss, and the gradient of the whole loss in them."""
    problem = Problem(*arguments)
    dtype = _dtype(problem)
    own = slice(problem.first, problem.first + len(problem.student))
    students = problem.students.to(dtype)
    squares = _squared_distances(students, problem.teacher.to(dtype))
    beta = _penalty_beta(problem.smooth_l1_beta, dtype)
    distance_weight, angle_weight = (
        x.to(dtype) if isinstance(x, Tensor) else x for x in problem[3:5]
    )
    found = []
    if problem.parts != "angle":
        found.append(_distances(squares, own, distance_weight, beta, problem.trained))
    if problem.parts != "distance":
        found.append(_angles(squares, own, angle_weight, beta, problem.trained))
    losses, slopes = zip(*found, strict=True)
    share, result_dtype = sum(losses[1:], losses[0]), compute_dtype(*arguments[:2])
    if problem.trained:
        gradient = _laplacian(sum(slopes[1:], slopes[0]), students, own)
    else:
        gradient = students.new_empty(0)
    return share.to(result_dtype), gradient.to(result_dtype)


def _dtype(problem: Problem) -> torch.dtype:
    """float64 where products of matrices would be TF32: they cancel."""
    on_cuda = problem.student.device.type == "cuda"
    return torch.float64 if on_cuda and torch.backends.cuda.matmul.allow_tf32 else problem.dtype


def _penalty_beta(beta: Number, dtype: torch.dtype) -> Number:
    """0 turns linear at once: at a difference below all that rounding leaves."""
    least = 1e-30 if dtype == torch.float64 else 1e-12
    return beta.to(dtype).clamp(min=least) if isinstance(beta, Tensor) else max(beta, least)


def _squared_distances(*networks: Tensor) -> Tensor:
    """[networks, N, N] from differences: 0 for duplicates, exact far from the origin."""
    x, n = networks[0], len(networks[0])
    if x.device.type not in ("cpu", "cuda"):  # which alone have pdist
        mode = "donot_use_mm_for_euclid_dist"
        return torch.stack([torch.cdist(x, x, compute_mode=mode) for x in networks]).square_()
    above = torch.ones(n, n, dtype=torch.bool, device=x.device).triu_(1)
    pairs = torch.stack([torch.pdist(x) for x in networks]).square_()
    squares = x.new_zeros(len(networks), n, n).masked_scatter_(above, pairs)
    return squares + squares.mT


# ---------------------------------------------------------------------------------------- distance


def _distances(
    squares: Tensor, own: slice, weight: Number, beta: Number, trained: bool
) -> tuple[Tensor, Tensor]:
    """The own rows' share of the loss, and the slopes of the whole in the own rows [n, N] of Q."""
    n = squares.shape[-1]
    n_pairs = n * (n - 1)
    distances = squares.clamp(min=LEAST_SQUARE).sqrt_()
    distances.diagonal(dim1=1, dim2=2).zero_()
    units = distances.sum((1, 2), keepdim=True).mul_(beta / n_pairs)
    student, teacher = distances / units
    loss = F.huber_loss(student[own], teacher[own], reduction="sum") * (beta * weight / n**2)
    if not trained:
        return loss, loss
    slopes = student.sub_(teacher).clamp_(-1, 1)
    d, unit = distances[0], units[0]
    # every distance moves the mean, and with it all penalties
    of_mean = (slopes * d).sum().div_(unit.squeeze() * (n_pairs / beta))
    slopes = slopes[own].sub_(of_mean).div_(d[own]).mul_((beta * weight / n**2) / unit)
    return loss, slopes.masked_fill_(squares[0, own] < LEAST_SQUARE, 0)


# ------------------------------------------------------------------------------------------- angle


class _Cosines(NamedTuple):
    """What the cosines of both networks, in units of beta, are made of."""

    squares: Tensor  # [2, N, N]
    ends: Tensor  # [j, i, 4]: d and r of the student, −d and −r of the teacher
    others: Tensor  # [j, 4, k]: r and d of the student, r and d of the teacher


class _Sums(NamedTuple):
    """What the angles add up to; U, V and S, [N, N], are empty without a gradient."""

    loss: Tensor
    u: Tensor  # [an end, the other end]
    v: Tensor  # [vertex, an end]
    s: Tensor  # [vertex, an end]


def _angles(
    squares: Tensor, own: slice, weight: Number, beta: Number, trained: bool
) -> tuple[Tensor, Tensor]:
    """The loss of the angles at own examples, and the slopes of the whole in the own rows of Q.

    Brings the squares to units of beta.
    """
    n = squares.shape[-1]
    d = squares.sqrt()
    r = d.reciprocal().masked_fill_(d < LEAST_LENGTH, 0)
    d.div_(beta)
    squares.div_(beta)
    others, ends = (torch.stack(x, 1) for x in ((r, d), (d, r)))
    ends[1].neg_()
    others, ends = others.view(4, n, n).transpose(0, 1), ends.view(4, n, n).permute(1, 2, 0)
    cosines = _Cosines(squares, ends, others)
    everyone = slice(0, n)
    at_own = _sums(cosines, own, everyone, trained)
    loss = at_own.loss * (beta * weight / float(n) ** 3)
    if not trained:
        return loss, loss
    r_squared = r[0].square().mul_(beta / 2)
    arms = arms_with_own = torch.addcmul(at_own.v, at_own.s, r_squared, value=-1)
    with_own = at_own
    if own != everyone:
        with_own = _sums(cosines, everyone, own, trained)
        arms_with_own = torch.addcmul(with_own.v, with_own.s, r_squared, value=-1)
    # an edge (own, b) is an arm of the angles at both ends, and faces the other vertices
    slopes = (arms[own] + arms_with_own[:, own].T).sub_(with_own.u[own])
    slopes[:, own].fill_diagonal_(0)
    return loss, slopes.mul_(weight / float(n) ** 3)


def _sums(cosines: _Cosines, vertices: slice, ends: slice, trained: bool) -> _Sums:
    """Of the angles at `vertices` between one of `ends` and any example; S without its ½ r²."""
    (q, teacher_q), n = cosines.squares, cosines.squares.shape[-1]
    everyone = slice(0, n)
    # few blocks, where calls cost more than the half of the angles that they spare
    n_blocks = 1 if n < 256 or ends != everyone else 2 if n < 512 else 4
    columns = _cut(everyone, -(-n // n_blocks))
    u, v, s = q.new_zeros(3, n, n if trained else 0)
    losses = [q.new_zeros(1)]
    most = _CHUNK_ELEMENTS.get(q.device.type, _LARGE_CHUNK)
    buffers = q.new_empty(2, max(most, n * n)).unbind()
    for i in columns if ends == everyone else [ends]:
        for k in columns:
            if ends == everyone and k.start < i.start:
                continue  # mirrored
            mirrored = ends == everyone and k != i
            q_ik, teacher_q_ik = q[i, k], teacher_q[i, k]
            for j in _cut(vertices, max(1, most // max(1, q_ik.numel()))):
                shape = j.stop - j.start, *q_ik.shape
                x, w = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
                left, right = cosines.ends[j, i], cosines.others[j, :, k]
                torch.mul(teacher_q_ik, left[..., 3:], out=x).mul_(right[:, 2:3])
                torch.mul(left[..., 1:2], right[:, :1], out=w)
                x.addcmul_(w, q_ik).baddbmm_(left, right, beta=-0.5, alpha=0.5)  # A − B
                loss = F.huber_loss(x, losses[0].expand_as(x), reduction="sum")
                losses += [loss, loss] if mirrored else [loss]
                if not trained:
                    continue
                w.mul_(x.clamp_(-1, 1))
                # the difference first: its terms are as large as the batch is wide
                torch.sub(q[j, None, k], q_ik, out=x)
                v[j, i].add_(w.sum(2))
                s[j, i].add_(x.mul_(w).sum(2))
                u[i, k].add_(w.sum(0))
                if mirrored:
                    torch.sub(q[j, i, None], q_ik, out=x)
                    v[j, k].add_(w.sum(1))
                    s[j, k].add_(x.mul_(w).sum(1))
            if mirrored and trained:
                u[k, i] = u[i, k].T
    wide = None if q.device.type == "mps" else torch.float64
    loss = torch.stack(losses[1:]).sum(dtype=wide) if losses[1:] else losses[0].sum()
    return _Sums(loss, u, v, s.addcmul_(q, v) if trained else s)


def _cut(whole: slice, size: int) -> list[slice]:
    return [slice(i, min(i + size, whole.stop)) for i in range(whole.start, whole.stop, size)]


def _laplacian(slopes: Tensor, x: Tensor, own: slice) -> Tensor:
    """dx_a = 2 Σ_b slopes_ab (x_a − x_b) for the own rows."""
    centred = x - x.mean(0)  # it sees differences alone: the less there is to cancel, the better
    return (slopes.sum(1, keepdim=True) * centred[own]).addmm_(slopes, centred, alpha=-1).mul_(2)
