"""Correlations in a batch in PyTorch, for any device.

Relations between examples see the features x only through the rows of the Gram matrix, which are
taken in chunks: with H the slopes of the loss in the Gram matrix, dx = (H + Hᵀ) x. Not the features
are divided by their lengths l but the Gram matrix, which is smaller; what that leaves of the
gradient is its part across x, dx − x (x·dx) / l². The products are those of the definition: TF32,
where it is allowed, costs both the same.

DIST reads the logits twice. The moments of rows and of columns that the first sweep adds up are all
that the slope of a probability needs, with p° and q° less the mean of their column:

    h_iv = b_i p_iv + a_i q_iv + b_v p°_iv + a_v q°_iv,       dz_iv = q_iv (h_iv − Σ_v q_iv h_iv),

and q waits in the memory of the gradient for the second one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastkd._engine import scaled_gradient
from fastkd.correlation import PEARSON_EPSILON, PKT_EPSILON, Number, Problem, falloff
from fastkd.relational import LEAST_LENGTH

backward = scaled_gradient

_CHUNK_ELEMENTS = {"cpu": 1 << 18}  # a few buffers of that size stay in a CPU's cache
_LARGE_CHUNK = 1 << 22  # elsewhere a chunk must pay for its launches

Chunks = Iterator[tuple[slice, list[Tensor]]]


def allocate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """What `forward` returns, empty."""
    return Problem(*arguments).allocate()


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(*Problem) -> the loss and its gradient."""
    problem = Problem(*arguments)
    beta, gamma, temperature = (
        x.to(problem.dtype) if isinstance(x, Tensor) else x for x in problem[2:5]
    )
    problem = problem._replace(beta=beta, gamma=gamma, temperature=temperature)
    loss, gradient = problem.allocate()
    compute = {"sequential": _sequential, "dist_kd": _dist}.get(problem.name, _relations)
    loss.copy_(compute(problem, gradient))
    return loss, gradient


def _scratch(problem: Problem, n_buffers: int, n_rows: int, n_columns: int) -> Tensor:
    """[n_buffers, elements], for chunks of a matrix of that shape: fresh memory is slow."""
    most = _CHUNK_ELEMENTS.get(problem.student.device.type, _LARGE_CHUNK)
    # a row at least, and one of the features
    elements = max(min(most, n_rows * n_columns), n_columns, problem.student.shape[1])
    return problem.student.new_empty(n_buffers, elements, dtype=problem.dtype)


def _chunks(scratch: Tensor, n_rows: int, n_columns: int) -> Chunks:
    """Rows of a matrix, as many as a buffer holds, and the buffers in their shape."""
    size = scratch.shape[1] // n_columns
    for start in range(0, n_rows, size):
        shape = min(size, n_rows - start), n_columns
        yield slice(start, start + shape[0]), [x[: math.prod(shape)].view(shape) for x in scratch]


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum()


# ------------------------------------------------------------------- relations between examples


def _relations(problem: Problem, gradient: Tensor) -> Tensor:
    """The loss of the Gram matrices' rows, and in `gradient` what their slopes make of it."""
    x, y = (features.to(problem.dtype) for features in problem[:2])
    (n, width), name = x.shape, problem.name
    of_cosines, share = name != "similarity_preserving", 1 / float(n) ** 2
    if of_cosines:
        epsilon = PKT_EPSILON if name == "pkt" else 0.0
        lengths = _lengths(x)
        divisors, teacher_divisors = lengths + epsilon, _lengths(y) + epsilon
    measure = {"pkt": _neighbours, "kernel": _kernels}.get(name, _similarities)
    scratch = _scratch(problem, 4, n, n)
    losses = []
    if problem.trained:
        gradient.zero_()
    for rows, buffers in _chunks(scratch, n, n):
        own, teacher = buffers[:2]
        torch.mm(x[rows], x.T, out=own)
        torch.mm(y[rows], y.T, out=teacher)
        if of_cosines:
            own.div_(divisors).div_(divisors[rows, None])
            teacher.div_(teacher_divisors).div_(teacher_divisors[rows, None])
        loss, slopes = measure(problem, *buffers)
        losses.append(loss)
        if not problem.trained:
            continue
        if of_cosines:
            slopes.div_(divisors).div_(divisors[rows, None])
        if name == "kernel":  # H = Hᵀ
            gradient[rows].addmm_(slopes, x, alpha=2 * share)
        elif len(own) == n:
            gradient.addmm_(torch.add(slopes, slopes.T, out=own), x, alpha=share)
        else:
            gradient[rows].addmm_(slopes, x, alpha=share)
            gradient.addmm_(slopes.T, x[rows], alpha=share)
    if problem.trained and of_cosines:
        for rows, (product, *_) in _chunks(scratch, n, width):
            along = torch.mul(x[rows], gradient[rows], out=product).sum(1)
            along.div_(lengths[rows] * divisors[rows])
            gradient[rows].addcmul_(x[rows], along[:, None], value=-1)
    return _total(losses) * share


def _lengths(rows: Tensor) -> Tensor:
    """Infinite where a row has no direction: what is divided by it is 0."""
    lengths = torch.linalg.vector_norm(rows, dim=1)
    return lengths.masked_fill_(lengths < LEAST_LENGTH, math.inf)


def _similarities(
    problem: Problem, own: Tensor, teacher: Tensor, product: Tensor, _: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of Gram matrices -> Σ (g / ‖g‖ − t / ‖t‖)², and its slopes in g."""
    lengths = _lengths(own)[:, None]
    own.div_(lengths)
    difference = teacher.div_(_lengths(teacher)[:, None]).sub_(own).neg_()
    loss = torch.mul(difference, difference, out=product).sum()
    if problem.trained:
        along = torch.mul(difference, own, out=product).sum(1, keepdim=True)
        difference.addcmul_(own, along, value=-1).div_(lengths).mul_(2)
    return loss, difference


def _neighbours(
    problem: Problem, own: Tensor, teacher: Tensor, logs: Tensor, product: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of cosines -> Σ p log((p + ε) / (q + ε)), and its slopes.

    Both up to terms that cancel in a row, since Σ p = Σ q: what is left is small where p is near q.
    """
    totals = own.add_(1).sum(1, keepdim=True)
    q, p = own.div_(totals), teacher.add_(1)
    difference = p.div_(p.sum(1, keepdim=True)).sub_(q)
    q_epsilon = q.add_(PKT_EPSILON)
    torch.div(difference, q_epsilon, out=logs).log1p_()
    torch.add(difference, q_epsilon, out=product).sub_(PKT_EPSILON)  # p
    loss = product.mul_(logs).sub_(difference).sum()
    slopes = logs
    if problem.trained:
        torch.sub(difference, PKT_EPSILON, out=slopes).div_(q_epsilon)  # their negative
        mean = torch.sub(q_epsilon, PKT_EPSILON, out=product).mul_(slopes).sum(1, keepdim=True)
        slopes.sub_(mean).div_(-totals)
    return loss, slopes


def _kernels(
    problem: Problem, own: Tensor, teacher: Tensor, series: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of cosines -> Σ (k(own) − k(teacher))², and its slopes."""
    gamma, order, factor = problem.gamma, problem.order, falloff(problem.gamma)
    _exponential(own.mul_(2 * gamma), order, out=series)
    _exponential(teacher.mul_(2 * gamma), order, out=other)
    difference = series.sub_(other)
    loss = torch.mul(difference, difference, out=other).sum() * (factor * factor)
    if problem.trained:
        _exponential(own, order - 1, out=other).mul_(difference).mul_(4 * gamma * factor * factor)
    return loss, other


def _exponential(x: Tensor, order: int, out: Tensor) -> Tensor:
    """Σ_{p ≤ order} x^p / p!, by Horner's rule; its derivative is that of one order less."""
    out.fill_(1)
    for p in range(order, 0, -1):
        out.mul_(x).div_(p).add_(1)
    return out


# ------------------------------------------------------------------------- neighbours in the batch


def _sequential(problem: Problem, gradient: Tensor) -> Tensor:
    """1/(N−1) Σ_i |s_i − t_i| · |s_i+1 − t_i+1|, in chunks that see one row more on both sides."""
    student, teacher, dtype = problem.student, problem.teacher, problem.dtype
    (n, width), losses = student.shape, []
    chunks = list(_chunks(_scratch(problem, 1, n, width), n, width))
    framed = student.new_empty(2, chunks[0][0].stop + 2, width, dtype=dtype)
    for rows, (product,) in chunks:
        around = slice(max(rows.start - 1, 0), min(rows.stop + 1, n))
        differences, sizes = framed[:, : len(product) + 2]
        start = around.start - rows.start + 1
        stop = start + around.stop - around.start
        torch.sub(student[around].to(dtype), teacher[around].to(dtype), out=differences[start:stop])
        torch.abs(differences[start:stop], out=sizes[start:stop])
        sizes[:start].zero_()  # before the first example of all, and after the last
        sizes[stop:].zero_()
        before, own, after = sizes[:-2], sizes[1:-1], sizes[2:]
        losses.append(torch.mul(own, after, out=product).sum())
        if problem.trained:
            slopes = torch.add(before, after, out=gradient[rows])
            slopes.mul_(differences[1:-1].sign_()).div_(max(n - 1, 1))
    return _total(losses) / max(n - 1, 1)


# ----------------------------------------------------------------------------------------- dist_kd


def _dist(problem: Problem, gradient: Tensor) -> Tensor:
    """T² [β (1 − mean ρ(q_i, p_i)) + γ (1 − mean ρ(q_·v, p_·v))]."""
    student, teacher, beta, gamma, temperature = problem[:5]
    n, n_classes = student.shape
    scratch = _scratch(problem, 4 if problem.trained else 5, n, n_classes)
    chunks = list(_chunks(scratch, n, n_classes))
    of_rows = []
    for rows, (p, a, b, product, *rest) in chunks:
        q = gradient[rows] if problem.trained else rest[0]
        _softmax(student[rows], temperature, product, out=q)
        _softmax(teacher[rows], temperature, product, out=p)
        # of a row the mean is 1 / V: a row that is uniform has a deviation of 0
        torch.sub(q, 1 / n_classes, out=a)
        of_rows.append(_moments(a, torch.sub(p, 1 / n_classes, out=b), 1, product))
        new_means = torch.stack([_means(q, product), _means(p, product)])
        torch.sub(q, new_means[0], out=a)
        new = _moments(a, torch.sub(p, new_means[1], out=b), 0, product)
        if rows.start == 0:
            of_columns, means = new, new_means
            continue
        # what the means of these rows and of those before differ by counts too
        shift, share = new_means - means, len(p) / rows.stop
        means.add_(shift, alpha=share)
        of_columns += new + _moments(shift[:1], shift[1:], 0) * (rows.start * share)
    rho_rows, a_rows, b_rows = _pearson(torch.cat(of_rows, 1))
    rho_columns, a_columns, b_columns = _pearson(of_columns)
    squared = temperature * temperature
    loss = squared * (beta * (1 - rho_rows.mean()) + gamma * (1 - rho_columns.mean()))
    if not problem.trained:
        return loss
    by_row, by_column = -temperature * beta / n, -temperature * gamma / n_classes
    a_rows, b_rows = (x.mul_(by_row)[:, None] for x in (a_rows, b_rows))
    a_columns, b_columns = (x.mul_(by_column) for x in (a_columns, b_columns))
    for rows, (p, slopes, product, *_) in chunks:
        q = gradient[rows]
        if len(chunks) > 1:  # else it is still there
            _softmax(teacher[rows], temperature, product, out=p)
        torch.mul(p, b_rows[rows], out=slopes).addcmul_(q, a_rows[rows])
        # centred first: in a column that hardly varies the slopes are large
        slopes.addcmul_(p.sub_(means[1]), b_columns)
        slopes.addcmul_(torch.sub(q, means[0], out=product), a_columns)
        q.mul_(slopes.sub_(torch.mul(slopes, q, out=product).sum(1, keepdim=True)))
    return loss


def _means(rows: Tensor, product: Tensor) -> Tensor:
    """Of columns; of one that does not vary exactly, or its deviation would not be 0."""
    return torch.sub(rows, rows[0], out=product).mean(0).add_(rows[0])


def _softmax(logits: Tensor, temperature: Number, scaled: Tensor, out: Tensor) -> None:
    torch.softmax(scaled.copy_(logits).div_(temperature), 1, out=out)


def _moments(own: Tensor, teacher: Tensor, dim: int, product: Tensor | None = None) -> Tensor:
    """[3, ...]: the sums of own · teacher, of own² and of teacher²."""
    pairs = (own, teacher), (own, own), (teacher, teacher)
    return torch.stack([torch.mul(*pair, out=product).sum(dim) for pair in pairs])


def _pearson(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ρ, and a and b: its slope in a centred number of the student is a · own + b · teacher."""
    both, own, teacher = moments
    deviation, teacher_deviation = own.sqrt(), teacher.sqrt()
    b = (deviation * teacher_deviation + PEARSON_EPSILON).reciprocal_()
    # in this order nothing overflows; a deviation of 0 has the slope 0
    a = -(both / deviation * b * (teacher_deviation * b))
    return both * b, a.masked_fill_(deviation == 0, 0), b
