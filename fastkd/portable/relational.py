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

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._engine import scaled_gradient
from fastkd.relational import LEAST_LENGTH, LEAST_SQUARE, Number, Problem

backward = scaled_gradient

_CHUNK_ELEMENTS = {"cpu": 1 << 17}  # three buffers of that size stay in a CPU's cache
_LARGE_CHUNK = 1 << 24  # elsewhere a chunk must pay for its launches


def allocate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """What `forward` returns, empty."""
    return Problem(*arguments).allocate()


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(*Problem) -> the own rows' share of the loss, and the gradient of the whole loss in them."""
    problem = Problem(*arguments)
    dtype = problem.dtype
    own = slice(problem.first, problem.first + len(problem.student))
    students = problem.students.to(dtype)
    squares = _squared_distances(students), _squared_distances(problem.teacher.to(dtype))
    beta = _penalty_beta(problem.smooth_l1_beta, dtype)
    weighted: list[tuple[Any, ...]] = []
    if problem.parts != "angle":
        of_distances = _distances(squares, own, beta, problem.trained)
        weighted.append((problem.distance_weight, *of_distances))
    if problem.parts != "distance":
        of_angles = _angles(squares, own, beta, problem.trained)
        weighted.append((problem.angle_weight, *of_angles))
    share, gradient = problem.allocate()
    share.copy_(sum(weight * loss for weight, loss, _ in weighted))  # type: ignore[arg-type]
    if problem.trained:
        slopes = sum(each.mul_(weight) for weight, _, each in weighted if each is not None)
        gradient.copy_(_laplacian(slopes, students, own))
    return share, gradient


def _penalty_beta(beta: Number, dtype: torch.dtype) -> Number:
    """0 turns linear at once: at a difference below all that rounding leaves."""
    least = 1e-30 if dtype == torch.float64 else 1e-12
    return beta.to(dtype).clamp(min=least) if isinstance(beta, Tensor) else max(beta, least)


def _squared_distances(x: Tensor) -> Tensor:
    """[N, N] from differences: exactly 0 for duplicates, exact to rounding far from the origin."""
    if x.device.type not in ("cpu", "cuda"):  # which alone have pdist
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square_()
    n = len(x)
    squares = x.new_zeros(n, n)
    above = torch.ones(n, n, dtype=torch.bool, device=x.device).triu_(1)
    squares.masked_scatter_(above, torch.pdist(x).square_())
    return squares.add_(squares.T.clone())


# ---------------------------------------------------------------------------------------- distance


def _distances(
    both_squares: tuple[Tensor, Tensor], own: slice, beta: Number, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """The own rows' share of the loss, and the slopes of the whole in the own rows [n, N] of Q."""
    squares, n = both_squares[0], len(both_squares[0])
    n_pairs = n * (n - 1)
    d, t = (x.clamp(min=LEAST_SQUARE).sqrt_().fill_diagonal_(0) for x in both_squares)
    mean, teacher_mean = d.sum() / n_pairs, t.sum() / n_pairs
    difference = (d / mean).sub_(t.div_(teacher_mean)).div_(beta)
    slope = difference.clamp(-1, 1)
    penalties = difference.sub_(slope / 2).mul_(slope)
    loss = penalties[own].sum() * (beta / n**2)
    if not trained:
        return loss, None
    # every distance moves the mean, and with it all penalties
    of_mean = (slope * d).sum() / (mean * mean * n_pairs)
    squares, d, slope = squares[own], d[own], slope[own]
    slope.div_(mean).sub_(of_mean).div_(d).div_(n**2)
    return loss, slope.masked_fill_(squares < LEAST_SQUARE, 0)


# ------------------------------------------------------------------------------------------- angle


class _Network(NamedTuple):
    """What the cosines of a network are made of, each [N, N]."""

    q: Tensor  # squared distances
    d: Tensor  # distances
    r: Tensor  # their inverses, 0 for examples that coincide


def _network(squares: Tensor) -> _Network:
    d = squares.sqrt()
    return _Network(squares, d, d.reciprocal().masked_fill_(d < LEAST_LENGTH, 0))


class _Sums(NamedTuple):
    """What the angles add up to; U, V and S, [N, N], are empty without a gradient."""

    loss: Tensor
    u: Tensor  # [an end, the other end]
    v: Tensor  # [vertex, an end]
    s: Tensor  # [vertex, an end]


def _angles(
    both_squares: tuple[Tensor, Tensor], own: slice, beta: Number, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of the angles at own examples, and the slopes of the whole in the own rows of Q."""
    n = len(both_squares[0])
    student, teacher = map(_network, both_squares)
    everyone = slice(0, n)
    at_own = _sums(student, teacher, own, everyone, beta, trained)
    loss = at_own.loss * beta / float(n) ** 3
    if not trained:
        return loss, None
    alone = own == everyone
    with_own = at_own if alone else _sums(student, teacher, everyone, own, beta, trained)
    # an edge (own, b) is an arm of angles at b, and at the own example, or faces the vertex
    slopes = (at_own.v - at_own.s)[own]
    slopes += (with_own.v - with_own.s)[:, own].T
    slopes -= with_own.u[own]
    slopes[:, own].fill_diagonal_(0)
    return loss, slopes.div_(float(n) ** 3)


def _sums(
    student: _Network, teacher: _Network, vertices: slice, ends: slice, beta: Number, trained: bool
) -> _Sums:
    """Of the angles at `vertices` between one of `ends` and any example."""
    n = len(student.q)
    everyone = slice(0, n)
    n_ends, n_vertices = ends.stop - ends.start, vertices.stop - vertices.start
    # few blocks, where calls cost more than the half of the angles that they spare
    n_blocks = 1 if n <= 64 else 2 if n < 512 else 4
    step = -(-n_ends // n_blocks) if ends == everyone else n
    most = _CHUNK_ELEMENTS.get(student.q.device.type, _LARGE_CHUNK)
    at_once = max(1, min(n_vertices, most // (step * min(step, n_ends))))
    buffers = [student.q.new_empty(at_once * step * min(step, n_ends)) for _ in range(3)]
    u, v, s = student.q.new_zeros(3, n, n if trained else 0)
    loss = student.q.new_zeros((), dtype=torch.float64 if _has_float64(student.q) else None)
    for first in range(vertices.start, vertices.stop, at_once):
        j = slice(first, min(first + at_once, vertices.stop))
        for i in _blocks(ends, step):
            for k in _blocks(everyone if ends != everyone else slice(i.start, n), step):
                x, w, c = _cosine_differences(student, teacher, j, i, k, buffers)
                if not (isinstance(beta, float | int) and beta == 1):
                    x.div_(beta)
                torch.clamp(x, -1, 1, out=c)
                of_block = torch.dot(c.view(-1), x.view(-1)) - torch.dot(c.view(-1), c.view(-1)) / 2
                mirrored = ends == everyone and i != k
                loss += 2 * of_block if mirrored else of_block
                if not trained:
                    continue
                w.mul_(c)
                of_ends = w.sum(0)
                u[i, k] += of_ends
                v[j, i] += w.sum(2)
                # the difference first: its terms are as large as the batch is wide
                torch.sub(student.q[j, None, k], student.q[i, k], out=x)
                s[j, i] += x.mul_(w).sum(2)
                if mirrored:
                    u[k, i] += of_ends.T
                    v[j, k] += w.sum(1)
                    torch.sub(student.q[j, i, None], student.q[i, k], out=x)
                    s[j, k] += x.mul_(w).sum(1)
    if trained:
        s.addcmul_(student.q, v).mul_(student.r).mul_(student.r).div_(2)
    return _Sums(loss, u, v, s)


def _blocks(ends: slice, step: int) -> list[slice]:
    return [slice(i, min(i + step, ends.stop)) for i in range(ends.start, ends.stop, step)]


def _cosine_differences(
    student: _Network,
    teacher: _Network,
    j: slice,
    i: slice,
    k: slice,
    buffers: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """A − B, r_ij r_kj of the student, and a place for more: [vertices, ends, other ends]."""
    shape = j.stop - j.start, i.stop - i.start, k.stop - k.start
    x, w, free = (buffer[: shape[0] * shape[1] * shape[2]].view(shape) for buffer in buffers)
    d_i, r_i, t_i, e_i = (y[j, i, None] for y in (student.d, student.r, teacher.d, teacher.r))
    d_k, r_k, t_k, e_k = (y[j, None, k] for y in (student.d, student.r, teacher.d, teacher.r))
    torch.mul(teacher.q[i, k], e_i, out=x)
    x.mul_(e_k)
    torch.mul(r_i, r_k, out=w)
    x.addcmul_(w, student.q[i, k], value=-1)
    columns = torch.cat([d_i, r_i, t_i, e_i], 2)
    x.baddbmm_(columns, torch.cat([r_k, d_k, -e_k, -t_k], 1), beta=0.5, alpha=0.5)
    return x, w, free


def _has_float64(x: Tensor) -> bool:
    return x.device.type != "mps"


def _laplacian(slopes: Any, x: Tensor, own: slice) -> Tensor:
    """dx_a = 2 Σ_b slopes_ab (x_a − x_b) for the own rows."""
    centred = x - x.mean(0)  # it sees differences alone: the less there is to cancel, the better
    if x.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        centred, slopes = centred.double(), slopes.double()
    return (slopes.sum(1, keepdim=True) * centred[own]).addmm_(slopes, centred, alpha=-1).mul_(2)
