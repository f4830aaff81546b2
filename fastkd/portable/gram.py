"""Correlations in a batch in PyTorch, for any device.

Relations between examples see the features x only through the rows of the Gram matrix, which are
taken in chunks: with H the slopes of the loss in the Gram matrix, dx = (H + Hᵀ) x. It is not the
features that are divided by their lengths l but the Gram matrix, because it is smaller; what that
leaves of the gradient is its part across x, dx − x (x·dx) / l². The products are those of the
definition, so that TF32, where it is allowed, costs both the same accuracy.

DIST reads the logits twice. The moments of rows and of columns that the first sweep adds up are all
that the slope of a probability needs, with p° and q° less the mean of their column:

    h_iv = b_i p_iv + a_i q_iv + b_v p°_iv + a_v q°_iv,       dz_iv = q_iv (h_iv − Σ_v q_iv h_iv),

and q waits in the memory of the gradient for the second one.

Workers own the rows of their chunks. The transposes that all rows add to the gradient wait, so that
workers own rows of the gradient then: a sheet of slopes is made by rows and read by columns. The
moments of columns are those of groups of rows, which are merged in their order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._precision import compute_dtype
from fastkd.portable import _chunks
from fastkd.problems.gram import PKT_EPSILON, Gram, Number, falloff
from fastkd.problems.relations import LEAST_LENGTH

_ON_CPU = 1 << 21  # elements of a sheet, and of an eighth of it those of a chunk
_ELSEWHERE = 1 << 22
_N_PARTS = 8


def value_and_gradients(
    problem: Gram, needs_grad: tuple[bool, ...]
) -> tuple[Tensor, tuple[Tensor | None]]:
    """Return the loss and its gradient in the student's features or logits."""
    dtype = compute_dtype(problem.student, problem.teacher)
    beta, gamma, temperature, epsilon = (
        x.to(dtype) if isinstance(x, Tensor) else x
        for x in (problem.beta, problem.gamma, problem.temperature, problem.epsilon)
    )
    problem = problem._replace(beta=beta, gamma=gamma, temperature=temperature, epsilon=epsilon)
    gradient = None
    if needs_grad[0]:
        gradient = problem.student.new_empty(problem.student.shape, dtype=dtype)
    solve = {"sequential": _sequential, "dist_kd": _dist}.get(problem.name, _relations)
    n, width = problem.student.shape
    n_columns = n if solve is _relations else width
    is_large = n * n_columns > _Chunks.make(problem, dtype, n_columns).elements
    loss = _chunks.by_workers(
        lambda: solve(problem, dtype, gradient).to(dtype), is_large, problem.student
    )
    return loss, (gradient,)


class _Chunks(NamedTuple):
    """Chunks of matrices with a row for each example, and the memory that a worker has for them."""

    like: Tensor  # a matrix of the problem
    dtype: torch.dtype
    elements: int  # of a chunk

    @classmethod
    def make(cls, problem: Gram, dtype: torch.dtype, n_columns: int) -> _Chunks:
        """Return chunks that have at least a row of the matrix, and one of the features."""
        n, width = problem.student.shape
        most = _chunks.most_elements(problem.student, _ON_CPU, _ELSEWHERE) // _N_PARTS
        return cls(problem.student, dtype, max(min(most, n * n_columns), n_columns, width))

    def cut(self, n_columns: int, start: int, stop: int) -> list[slice]:
        """Return chunks of rows with so many columns."""
        return _chunks.cut(range(start, stop), self.elements // n_columns)

    def memory(self, n_buffers: int) -> Callable[[], Tensor]:
        """Return what makes the memory of a worker, once because fresh memory is slow."""
        return functools.partial(self.like.new_empty, (n_buffers, self.elements), dtype=self.dtype)

    def for_each(self, work: Callable, n_buffers: int, n_columns: int, n_rows: int) -> list:
        """Call work(rows, *buffers) with buffers [n_rows of the chunk, n_columns]."""
        return _chunks.for_each(
            lambda rows, memory: work(rows, *_buffers(memory, rows, n_columns)),
            self.cut(n_columns, 0, n_rows),
            self.memory(n_buffers),
        )


def _buffers(memory: Tensor, rows: slice, n_columns: int) -> list[Tensor]:
    shape = rows.stop - rows.start, n_columns
    return [x[: math.prod(shape)].view(shape) for x in memory]


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum()


# ------------------------------------------------------------------- relations between examples


def _relations(problem: Gram, dtype: torch.dtype, gradient: Tensor | None) -> Tensor:
    """Return the loss of the Gram matrices; write what their slopes make of the gradient."""
    x, y = problem.student.to(dtype), problem.teacher.to(dtype)
    (n, width), name = x.shape, problem.name
    of_cosines, share = name != "similarity_preserving", 1 / float(n) ** 2
    if of_cosines:
        epsilon = PKT_EPSILON if name == "pkt" else 0.0
        lengths = _lengths(x)
        divisors, teacher_divisors = lengths + epsilon, _lengths(y) + epsilon
    measures: dict[str, Callable[..., Tensor]] = {
        "similarity_preserving": _similarities,
        "pkt": _neighbours,
        "kernel": functools.partial(_kernels, problem),
    }
    measure = measures[name]
    chunks = _Chunks.make(problem, dtype, n)
    rows_of_chunk = max(1, chunks.elements // n)
    if gradient is not None:
        gradient.zero_()
    sheet, losses = x.new_empty(min(n, _N_PARTS * rows_of_chunk), n), list[Tensor]()

    def solve(at: slice, rows: slice, memory: Tensor) -> Tensor:
        student, teacher, product = _buffers(memory, rows, n)
        torch.mm(x[rows], x.T, out=student)
        torch.mm(y[rows], y.T, out=teacher)
        if of_cosines:
            student.div_(divisors).div_(divisors[rows, None])
            teacher.div_(teacher_divisors).div_(teacher_divisors[rows, None])
        slopes = sheet[rows.start - at.start : rows.stop - at.start]
        loss = measure(student, teacher, slopes, product, with_slopes=gradient is not None)
        if gradient is not None:
            if of_cosines:
                slopes.div_(divisors).div_(divisors[rows, None])
            if name == "kernel":  # H = Hᵀ
                gradient[rows].addmm_(slopes, x, alpha=2 * share)
            elif len(sheet) < n:
                gradient[rows].addmm_(slopes, x, alpha=share)
        return loss

    def transpose(into: Tensor, at: slice, rows: slice, both: Tensor) -> None:
        if len(sheet) == n:
            torch.add(sheet[rows], sheet[:, rows].T, out=both)
            into[rows].addmm_(both, x, alpha=share)
        else:
            into[rows].addmm_(sheet[: at.stop - at.start, rows].T, x[at], alpha=share)

    for at in _chunks.cut(range(n), len(sheet)):
        of_sheet, rows = functools.partial(solve, at), chunks.cut(n, at.start, at.stop)
        losses += _chunks.for_each(of_sheet, rows, chunks.memory(3))
        if gradient is not None and name != "kernel":
            chunks.for_each(functools.partial(transpose, gradient, at), 1, n, n)
    if gradient is not None and of_cosines:
        project = functools.partial(_project, gradient, x, lengths.mul_(divisors))
        chunks.for_each(project, 1, width, n)
    return _total(losses) * share


def _project(gradient: Tensor, x: Tensor, squares: Tensor, rows: slice, product: Tensor) -> None:
    """Take from the gradient of these rows its part along x, since a length is no direction."""
    along = torch.mul(x[rows], gradient[rows], out=product).sum(1).div_(squares[rows])
    gradient[rows].addcmul_(x[rows], along[:, None], value=-1)


def _lengths(rows: Tensor) -> Tensor:
    """Return lengths, infinite for a row without a direction: what is divided by it is 0."""
    lengths = torch.linalg.vector_norm(rows, dim=1)
    return lengths.masked_fill_(lengths < LEAST_LENGTH, math.inf)


def _similarities(
    student: Tensor, teacher: Tensor, slopes: Tensor, product: Tensor, *, with_slopes: bool
) -> Tensor:
    """Return Σ (g / ‖g‖ − t / ‖t‖)² of rows g and t of Gram matrices; write its slopes in g."""
    lengths = _lengths(student)[:, None]
    student.div_(lengths)
    difference = torch.sub(student, teacher.div_(_lengths(teacher)[:, None]), out=slopes)
    loss = _chunks.total(torch.mul(difference, difference, out=product))
    if with_slopes:
        along = torch.mul(difference, student, out=product).sum(1, keepdim=True)
        difference.addcmul_(student, along, value=-1).div_(lengths).mul_(2)
    return loss


def _neighbours(
    student: Tensor, teacher: Tensor, slopes: Tensor, product: Tensor, *, with_slopes: bool
) -> Tensor:
    """Return Σ p log((p + ε) / (q + ε)) of rows of cosines, and write its slopes.

    Terms that cancel in a row, because Σ p = Σ q, are dropped from both: what is left is small
    where p is near q.
    """
    totals = student.add_(1).sum(1, keepdim=True)
    q, p = student.div_(totals), teacher.add_(1)
    difference = p.div_(p.sum(1, keepdim=True)).sub_(q)
    q_epsilon = q.add_(PKT_EPSILON)
    logs = torch.div(difference, q_epsilon, out=slopes).log1p_()
    torch.add(difference, q_epsilon, out=product).sub_(PKT_EPSILON)  # p
    loss = _chunks.total(product.mul_(logs).sub_(difference))
    if with_slopes:
        torch.sub(difference, PKT_EPSILON, out=slopes).div_(q_epsilon)  # their negative
        mean = torch.sub(q_epsilon, PKT_EPSILON, out=product).mul_(slopes).sum(1, keepdim=True)
        slopes.sub_(mean).div_(-totals)
    return loss


def _kernels(
    problem: Gram,
    student: Tensor,
    teacher: Tensor,
    slopes: Tensor,
    product: Tensor,
    *,
    with_slopes: bool,
) -> Tensor:
    """Return Σ (k(student) − k(teacher))² of rows of cosines, and write its slopes."""
    gamma, order, factor = problem.gamma, problem.order, falloff(problem.gamma)
    _exponential(student.mul_(2 * gamma), order, out=product)
    difference = product.sub_(_exponential(teacher.mul_(2 * gamma), order, out=slopes))
    loss = _chunks.total(torch.mul(difference, difference, out=slopes)) * (factor * factor)
    if with_slopes:
        _exponential(student, order - 1, out=slopes)
        slopes.mul_(difference).mul_(4 * gamma * factor * factor)
    return loss


def _exponential(x: Tensor, order: int, out: Tensor) -> Tensor:
    """Return Σ_{p ≤ order} x^p / p! by Horner's rule; its derivative has an order less."""
    out.fill_(1)
    for p in range(order, 0, -1):
        out.mul_(x).div_(p).add_(1)
    return out


# ------------------------------------------------------------------------- neighbours in the batch


def _sequential(problem: Gram, dtype: torch.dtype, gradient: Tensor | None) -> Tensor:
    """Return 1/(N−1) Σ_i |s_i − t_i| · |s_i+1 − t_i+1|; write the gradient.

    A chunk sees a row more on both of its sides.
    """
    student, teacher = problem.student, problem.teacher
    n, width = student.shape
    chunks = _Chunks.make(problem, dtype, width).cut(width, 0, n)
    shape = 3, chunks[0].stop + 2, width

    def add(rows: slice, memory: Tensor) -> Tensor:
        around = slice(max(rows.start - 1, 0), min(rows.stop + 1, n))
        differences, sizes, product = memory[:, : rows.stop - rows.start + 2]
        start = around.start - rows.start + 1
        stop = start + around.stop - around.start
        torch.sub(student[around].to(dtype), teacher[around].to(dtype), out=differences[start:stop])
        torch.abs(differences[start:stop], out=sizes[start:stop])
        sizes[:start].zero_()  # before the first example of the batch, and after the last
        sizes[stop:].zero_()
        before, here, after = sizes[:-2], sizes[1:-1], sizes[2:]
        loss = _chunks.total(torch.mul(here, after, out=product[2:]))
        if gradient is not None:
            slopes = torch.add(before, after, out=gradient[rows])
            slopes.mul_(differences[1:-1].sign_()).div_(max(n - 1, 1))
        return loss

    scratch = functools.partial(student.new_empty, shape, dtype=dtype)
    return _total(_chunks.for_each(add, chunks, scratch)) / max(n - 1, 1)


# ----------------------------------------------------------------------------------------- dist_kd


class _Columns:
    """The moments of columns around their means, over the chunks so far."""

    means: Tensor  # [2, V]
    moments: Tensor  # [3, V]

    def __init__(self) -> None:
        self.n_rows = 0

    def merge(self, n_rows: int, means: Tensor, moments: Tensor) -> None:
        """Add the moments of further rows, which are around the means of these rows."""
        self.n_rows += n_rows
        if self.n_rows == n_rows:
            self.means, self.moments = means, moments
            return
        # the difference of the means is a part of the deviations
        shift, share = means - self.means, n_rows / self.n_rows
        self.means.add_(shift, alpha=share)
        of_shift = _moments(shift[:1], shift[1:], 0).mul_((self.n_rows - n_rows) * share)
        self.moments += of_shift.add_(moments)


def _dist(problem: Gram, dtype: torch.dtype, gradient: Tensor | None) -> Tensor:
    """Return T² [β (1 − mean ρ(q_i, p_i)) + γ (1 − mean ρ(q_·v, p_·v))]; write the gradient."""
    student, teacher, beta, gamma, temperature = problem[:5]
    n, n_classes = student.shape
    chunks = _Chunks.make(problem, dtype, n_classes)
    groups = _chunks.cut(range(n), max(chunks.elements // n_classes, -(-n // _N_PARTS)))

    def add(group: slice, memory: Tensor) -> tuple[Tensor, _Columns, Tensor | None]:
        columns, of_rows = _Columns(), []
        for rows in chunks.cut(n_classes, group.start, group.stop):
            p, a, b, product, *rest = _buffers(memory, rows, n_classes)
            q = gradient[rows] if gradient is not None else rest[0]
            _softmax(student[rows], temperature, product, out=q)
            _softmax(teacher[rows], temperature, product, out=p)
            # the mean of a row is 1 / V, so that a uniform row has a deviation of exactly 0
            torch.sub(q, 1 / n_classes, out=a)
            of_rows.append(_moments(a, torch.sub(p, 1 / n_classes, out=b), 1, product))
            means = torch.stack([_means(q, product), _means(p, product)])
            torch.sub(q, means[0], out=a)
            moments = _moments(a, torch.sub(p, means[1], out=b), 0, product)
            columns.merge(len(p), means, moments)
        return torch.cat(of_rows, 1), columns, p if len(p) == n else None

    n_buffers = 4 if gradient is not None else 5
    parts = _chunks.for_each(add, groups, chunks.memory(n_buffers))
    of_rows, (columns, *others), (kept, *_) = zip(*parts, strict=True)
    for other in others:
        columns.merge(other.n_rows, other.means, other.moments)
    rho_rows, a_rows, b_rows = _pearson(torch.cat(of_rows, 1), problem.epsilon)
    rho_columns, a_columns, b_columns = _pearson(columns.moments, problem.epsilon)
    squared = temperature * temperature
    loss = squared * (beta * (1 - rho_rows.mean()) + gamma * (1 - rho_columns.mean()))
    if gradient is None:
        return loss
    by_row, by_column = -temperature * beta / n, -temperature * gamma / n_classes
    a_rows, b_rows = (x.mul_(by_row)[:, None] for x in (a_rows, b_rows))
    a_columns, b_columns = (x.mul_(by_column) for x in (a_columns, b_columns))

    def finish(rows: slice, p: Tensor, slopes: Tensor, product: Tensor) -> None:
        q = gradient[rows]
        if kept is not None:
            p = kept  # of the only chunk
        else:
            _softmax(teacher[rows], temperature, product, out=p)
        torch.mul(p, b_rows[rows], out=slopes).addcmul_(q, a_rows[rows])
        # centred first, because in a column that hardly varies the slopes are large
        slopes.addcmul_(p.sub_(columns.means[1]), b_columns)
        slopes.addcmul_(torch.sub(q, columns.means[0], out=product), a_columns)
        q.mul_(slopes.sub_(torch.mul(slopes, q, out=product).sum(1, keepdim=True)))

    chunks.for_each(finish, 3, n_classes, n)
    return loss


def _means(rows: Tensor, product: Tensor) -> Tensor:
    """Return the means of columns; that of a constant column exactly, so that it deviates by 0."""
    return torch.sub(rows, rows[0], out=product).mean(0).add_(rows[0])


def _softmax(logits: Tensor, temperature: Number, scaled: Tensor, out: Tensor) -> None:
    """Write softmax(logits / temperature), with `scaled` as scratch."""
    torch.softmax(scaled.copy_(logits).div_(temperature), 1, out=out)


def _moments(student: Tensor, teacher: Tensor, dim: int, product: Tensor | None = None) -> Tensor:
    """Return [3, ...]: the sums of student · teacher, of student² and of teacher²."""
    pairs = (student, teacher), (student, student), (teacher, teacher)
    return torch.stack([torch.mul(*pair, out=product).sum(dim) for pair in pairs])


def _pearson(moments: Tensor, epsilon: Number) -> tuple[Tensor, Tensor, Tensor]:
    """Return ρ, a and b: its slope in a centred student's number is a · student + b · teacher."""
    both, student, teacher = moments
    deviation, teacher_deviation = student.sqrt(), teacher.sqrt()
    b = (deviation * teacher_deviation + epsilon).reciprocal_()
    # in this order, because no product overflows then; a deviation of 0 has the slope 0
    a = -(both / deviation * b * (teacher_deviation * b))
    return both * b, a.masked_fill_(deviation == 0, 0), b
