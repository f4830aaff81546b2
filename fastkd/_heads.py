"""Losses of hidden states under two heads, by chunks of rows whose logits are thrown away.

The logits of a row are z = softcap(scale · (W h + b)). A chunk of rows takes two products to have
those of both networks, gets dz together with their divergences, which an engine solves as `Rows`,
and takes two more, dh = dz W and dW = dzᵀ h: four in all, three where the head is frozen and two
without gradients. Further teachers take a product each, whose logits lie in one place, one
teacher's after another's, and are added to a mixture. Gradients are sums over rows in the compute
dtype: what the caller divides by comes in when they are cast, because it would round a float16 to 0
before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._logits import Head, Teacher, logits_of, measure
from fastkd._op import Number
from fastkd._pages import in_huge_pages
from fastkd._products import multiply, split
from fastkd._reduction import selected, total
from fastkd.problems.linear import (
    Linear,
    compute_dtype_of,
    names_of,
    row_losses,
    width_of_report,
)
from fastkd.problems.rows import OPTIONS, Rows, is_exactly

MOST_ROWS, FEWEST_ROWS = 1024, 256  # of a chunk, between which the products are quick
_BUDGET = {"cpu": 1 << 28, "elsewhere": 1 << 30}  # bytes

# rows.value_and_gradients of an engine
SolveRows = Callable[..., tuple[tuple[Tensor, Tensor | None], tuple[Tensor | None]]]
# adds the probabilities of a teacher to a mixture: (mixture, logits, T, log shares, is_first)
Mix = Callable[[Tensor, Tensor, Number, Tensor, bool], None]
Gradients = tuple[Tensor | None, ...]


def are_at_hand(weights: Tensor) -> bool:
    """Return whether a look at the weights is no host sync."""
    return weights.is_cpu


class Engine(NamedTuple):
    """The contract of an engine, for one that solves the rows of a chunk and mixes teachers."""

    solve_rows: SolveRows
    mix: Mix

    def value_and_gradients(
        self, problem: Linear, needs_grad: Sequence[bool]
    ) -> tuple[tuple[Tensor, Tensor], Gradients]:
        """Return Σ weight · loss and the report, and the gradients of hidden states, head, bias."""
        chunks = _Chunks(problem, needs_grad, self)
        gradients = chunks.solve()
        losses = row_losses(problem, chunks.report)
        if problem.row_weights is not None:
            weights = problem.row_weights.to(losses.dtype)
            losses = selected(losses * weights, weights != 0)
        return (chunks.or_nan(total(losses)), chunks.report), gradients

    def forward(
        self, problem: Linear, needs_grad: Sequence[bool]
    ) -> tuple[tuple[Tensor], tuple[Tensor]]:
        """Return the loss of each row without its weight, and the report."""
        chunks = _Chunks(problem, (False, False, False), self)
        chunks.solve()
        return (chunks.or_nan(row_losses(problem, chunks.report)),), (chunks.report,)

    def backward(
        self,
        problem: Linear,
        statistics: Tensor,
        upstream: Sequence[Tensor | None],
        needs_grad: Sequence[bool],
    ) -> Gradients:
        """Return the gradients of Σ upstream · loss, for which all is computed again."""
        (weights,) = upstream
        assert weights is not None
        if problem.row_weights is not None:
            weights = selected(weights, problem.row_weights != 0)
        chunks = _Chunks(problem._replace(row_weights=weights), needs_grad, self)
        fields = problem.student, problem.student_weight, problem.student_bias
        return tuple(
            None if gradient is None or field is None else gradient.to(field.dtype)
            for gradient, field in zip(chunks.solve(), fields, strict=True)
        )


class _Chunks:
    """A problem whose rows are taken by chunks, with what all chunks share."""

    def __init__(self, problem: Linear, needs_grad: Sequence[bool], engine: Engine) -> None:
        self.problem, self.engine = problem, engine
        self.dtype, self.names = compute_dtype_of(problem), names_of(problem)
        self.needs_grad = needs_grad
        hidden, weight = problem.student, problem.student_weight
        self.examples, self.n_rows = hidden.shape[:-1], hidden.shape[:-1].numel()
        self.n_cols = len(weight)
        self.teachers = [
            Teacher(
                hidden_or_logits.reshape(self.n_rows, hidden_or_logits.shape[-1]),
                Head(
                    head, bias, problem.teacher_scale,
                    problem.teacher_softcap if problem.teacher_is_capped else None,
                ),
            )
            for hidden_or_logits, head, bias in zip(
                problem.teachers, problem.teacher_weights, problem.teacher_biases, strict=True
            )
            if hidden_or_logits is not None
        ]  # fmt: skip
        self.width = max([self.n_cols, *(teacher.n_cols for teacher in self.teachers)])
        self.student_head = Head(
            weight, problem.student_bias, problem.student_scale,
            problem.student_softcap if problem.student_is_capped else None,
        )  # fmt: skip
        self.hidden = hidden.reshape(self.n_rows, hidden.shape[-1])
        self.labels = None if problem.labels is None else problem.labels.reshape(-1)
        self.temperatures: list[Number] = []  # of the mixtures: metrics are those of one at T = 1
        if len(self.teachers) > 1 or problem.teacher_shares is not None:
            self.temperatures = [problem.temperature]
            if problem.metrics and not is_exactly(problem.temperature, 1):
                self.temperatures.append(1.0)
            self.log_shares = self._log_shares()
        self.weights = problem.row_weights
        if self.weights is not None:
            self.weights = self.weights.reshape(-1).to(self.dtype)
        self.rows, self.is_cut_short = self._rows_that_count()
        self.is_first = True  # the first chunk writes what the others add to
        # the gradient may replace the logits where nothing asks for them afterwards
        self.in_place = len(self.names) <= 1 and not problem.student_is_capped
        self.report = hidden.new_zeros((*self.examples, width_of_report(problem)), dtype=self.dtype)

    def solve(self) -> Gradients:
        """Fill the report and return the gradients, of every row with its weight."""
        problem, (of_hidden, of_weight, of_bias) = self.problem, self.needs_grad
        new = self.hidden.new_empty
        # contiguous, as torch.compile is told, even if the head is a transposed matrix
        zeros = functools.partial(self.hidden.new_zeros, dtype=self.dtype)
        gradients: list[Tensor | None] = [None, None, None]
        if of_hidden:  # rows of weight 0 may be in no chunk
            gradients[0] = zeros(self.hidden.shape)
        if of_weight:
            shape = problem.student_weight.shape
            gradients[1] = in_huge_pages(new(shape, dtype=self.dtype))
        if of_bias and problem.student_bias is not None:
            gradients[2] = zeros(problem.student_bias.shape)
        n_rows = self.n_rows if self.rows is None else len(self.rows)
        if gradients[1] is not None and not n_rows:  # no chunk writes it
            gradients[1].zero_()
        size = self._size_of_chunks(n_rows)
        z = in_huge_pages(new((size, self.width), dtype=self.dtype))
        z_teacher = None
        if any(not teacher.is_there(self.width) for teacher in self.teachers):
            z_teacher = in_huge_pages(torch.empty_like(z))
        mixtures = [in_huge_pages(torch.empty_like(z)) for _ in self.temperatures]
        report = self.report.view(self.n_rows, self.report.shape[-1])
        for rows in self._chunks(n_rows, size):
            self._solve_chunk(rows, z, z_teacher, mixtures, report, gradients)
            self.is_first = False
        if gradients[0] is not None:
            gradients[0] = gradients[0].view(problem.student.shape)
        return tuple(gradients)

    def _solve_chunk(
        self,
        rows: slice | Tensor,
        z: Tensor,
        z_teacher: Tensor | None,
        mixtures: Sequence[Tensor],
        report: Tensor,
        gradients: Sequence[Tensor | None],
    ) -> None:
        problem = self.problem
        hidden = self.hidden[rows]
        labels = None if self.labels is None else self.labels[rows]
        weights = mask = None
        if self.weights is not None:
            weights = self.weights[rows]
        if weights is not None and not are_at_hand(weights):  # others take no row of weight 0
            mask = weights != 0
            hidden = selected(hidden, mask)
            labels = None if labels is None else torch.where(mask, labels, -1)
        n = len(hidden)
        z = logits_of(hidden, self.student_head, z[:n])
        teacher = measured_teacher = None
        if mixtures:
            teacher, measured_teacher = self._mixture(rows, mask, z_teacher, mixtures)
        elif self.teachers:
            teacher = measured_teacher = self._teacher_logits(
                self.teachers[0], rows, mask, z_teacher
            )
        columns = report[rows] if isinstance(rows, slice) else report.new_zeros(n, report.shape[1])
        if problem.metrics:
            measured = columns[:, 1 + len(self.names) :]
            measure(z, measured_teacher, measured)
            if mask is not None:
                measured.masked_fill_(~mask[:, None], 0)
        gradient = self._solve_rows(z, teacher, labels, mask, weights, columns)
        if not isinstance(rows, slice):
            report[rows] = columns
        if gradient is not None:
            self._add_products(rows, hidden, gradient[:, : self.n_cols], z, gradients)

    def _teacher_logits(
        self, teacher: Teacher, rows: slice | Tensor, mask: Tensor | None, out: Tensor | None
    ) -> Tensor:
        found = teacher.hidden_or_logits[rows]
        if out is None or teacher.is_there(self.width):
            return found
        out = out[: len(found)]
        if teacher.head.weight is not None:
            return logits_of(selected(found, mask), teacher.head, out)
        out[:, : teacher.n_cols] = found
        out[:, teacher.n_cols :] = -torch.inf
        return out

    def _mixture(
        self,
        rows: slice | Tensor,
        mask: Tensor | None,
        z_teacher: Tensor | None,
        mixtures: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the logarithms of all teachers' probabilities, and the same at T = 1."""
        log_shares = self.log_shares[rows]
        mixtures = [x[: len(log_shares)] for x in mixtures]
        for k, teacher in enumerate(self.teachers):
            logits = self._teacher_logits(teacher, rows, mask, z_teacher)
            for mixture, temperature in zip(mixtures, self.temperatures, strict=True):
                self.engine.mix(mixture, logits, temperature, log_shares[:, k : k + 1], k == 0)
        return mixtures[0], mixtures[-1]

    def _log_shares(self) -> Tensor:
        """Return the logarithms of the teachers' shares in each row, [N, T]."""
        n, shares = len(self.teachers), self.problem.teacher_shares
        if shares is None:  # the same for all, which are divided by their sum
            return self.hidden.new_zeros((), dtype=self.dtype).expand(self.n_rows, n)
        return shares.reshape(self.n_rows, n).to(self.dtype).log()

    def _solve_rows(
        self,
        z: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        mask: Tensor | None,
        weights: Tensor | None,
        report: Tensor,
    ) -> Tensor | None:
        """Write the losses of a chunk to its report, and return dz if a gradient is needed."""
        problem, needs_grad, gradient = self.problem, any(self.needs_grad), None
        if weights is None:
            weights = z.new_ones(len(z))
        of_labels = None
        if labels is not None and not is_exactly(problem.alpha, 0):
            of_labels = weights * problem.alpha
        for i, name in enumerate(self.names or [""]):
            rows = Rows(
                z, z if teacher is None else teacher, labels if i == 0 else None, mask,
                problem.temperature, 1.0 if self.temperatures else problem.temperature,
                self._option(name), problem.scale, name,
            )  # fmt: skip
            (losses, cross_entropies), (slopes,) = self.engine.solve_rows(
                rows,
                (needs_grad,),
                row_weights=weights * self._share(i) if name else None,
                ce_weights=of_labels if i == 0 else None,
                in_place=self.in_place,
            )
            if name:
                report[:, 1 + i] = losses
            if cross_entropies is not None:
                report[:, 0] = cross_entropies
            if slopes is not None:
                gradient = slopes if gradient is None else gradient.add_(slopes)
        return gradient

    def _option(self, name: str) -> Number:
        option = OPTIONS.get(name)
        return 0.0 if option is None else getattr(self.problem, option)

    def _share(self, i: int) -> Number:
        shares = self.problem.shares
        return self.problem.share if shares is None else self.problem.share * shares[i]

    def _add_products(
        self,
        rows: slice | Tensor,
        hidden: Tensor,
        dz: Tensor,
        z: Tensor,
        gradients: Sequence[Tensor | None],
    ) -> None:
        problem, (of_hidden, of_weight, of_bias) = self.problem, gradients
        if problem.student_is_capped:  # the slope of c tanh(z / c)
            slope = z[:, : self.n_cols].div_(problem.student_softcap).square_().neg_().add_(1)
            dz.mul_(slope)
        if not is_exactly(problem.student_scale, 1):
            dz.mul_(problem.student_scale)
        if of_bias is not None:
            of_bias += dz.sum(0)
        if of_hidden is None and of_weight is None:
            return
        head, halves = problem.student_weight, None
        if hidden.dtype == head.dtype:
            halves = split(dz, head)
        if halves is not None:  # one below the other, because sums over rows are read and written
            dz, hidden = halves.flatten(0, 1), hidden.repeat(2, 1)
        if of_hidden is not None:
            sums = of_hidden.new_empty(len(hidden), hidden.shape[1])
            multiply(dz, head, sums)
            if halves is not None:
                sums = sums.view(2, -1, hidden.shape[1]).sum(0)
            of_hidden[rows] = sums
        if of_weight is not None:
            multiply(dz.t(), hidden, of_weight, adds=not self.is_first)

    def or_nan(self, losses: Tensor) -> Tensor:
        """Return the losses, or NaN if rows that count had no room."""
        if self.is_cut_short is None:
            return losses
        return torch.where(self.is_cut_short, torch.nan, losses)

    def _rows_that_count(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the numbers of rows to take, None for all, and whether some had no room."""
        weights, bound = self.weights, self.problem.n_valid
        if weights is None:
            return None, None
        if are_at_hand(weights):
            counts = weights != 0
            return (None if counts.all() else counts.nonzero().squeeze(1)), None
        if bound < 0 or bound >= self.n_rows:
            return None, None
        # without a look at the weights, which would be a host sync
        rows = (weights == 0).to(torch.uint8).argsort(stable=True)[:bound]
        is_cut_short = (weights != 0).sum() > bound
        # no step of an optimizer shall take a gradient from which rows are missing
        self.weights = torch.where(is_cut_short, torch.nan, weights)
        return rows, is_cut_short

    def _chunks(self, n_rows: int, size: int) -> Iterator[slice | Tensor]:
        for start in range(0, n_rows, size):
            places = slice(start, min(start + size, n_rows))
            yield places if self.rows is None else self.rows[places]

    def _size_of_chunks(self, n_rows: int) -> int:
        """Return how many rows a chunk has: as the budget allows, and all chunks about as many."""
        n_tensors = 1 + (len(self.teachers) > 0) + len(self.temperatures)
        if any(self.needs_grad):
            n_tensors += 0 if self.in_place else min(2, 1 + len(self.names))
            n_tensors += self.hidden.is_cuda and self.hidden.dtype != self.dtype
        size = n_tensors * self.width * self.report.element_size()
        budget, fewest = self.problem.memory_budget, 1
        if budget < 0:
            budget, fewest = _BUDGET["cpu" if self.hidden.is_cpu else "elsewhere"], FEWEST_ROWS
        most = min(MOST_ROWS, max(fewest, budget // max(1, size)))
        n_chunks = max(1, -(-n_rows // most))
        return max(1, -(-n_rows // n_chunks))
