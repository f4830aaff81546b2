"""Solve `Levels` in PyTorch, for any device.

Both Gram matrices are seen through the smaller one. With S = (Q + P) / 2 and D = Q − P

    QQᵀ − PPᵀ = SDᵀ + DSᵀ,      ‖QᵀQ − PᵀP‖² = 2 ⟨SSᵀ, DDᵀ⟩ + 2 ⟨SDᵀ, DSᵀ⟩,

and with the rows and the columns exchanged where a batch has more examples than classes. Nothing
cancels where the student is near its teacher, because every term has the difference D twice. The
slopes in Q are X S + Y D, with two matrices of the size of the smaller Gram matrix.

S and D are made in panels, of columns or, with the exchange, of rows; the softmaxes are computed
again for the gradient, unless one panel holds all of them. Workers own rows, of what a panel adds
to a Gram matrix too. Where the batch is spread over ranks, the Gram matrices are of all its rows,
and the gradient is made in a rank's own rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd._precision import compute_dtype
from fastkd.portable import _chunks
from fastkd.problems.levels import Levels

_ON_CPU, _ELSEWHERE = 1 << 21, 1 << 24  # elements of a panel
_N_PARTS = 8  # of a panel and of a Gram matrix, that workers take


class _Panel(NamedTuple):
    """Some columns of S and D or, where there are fewer classes than examples, some rows."""

    rows: slice
    columns: slice
    s: Tensor
    d: Tensor


class _Grams(NamedTuple):
    """SSᵀ, DDᵀ and SDᵀ, or SᵀS, DᵀD and SᵀD."""

    ss: Tensor
    dd: Tensor
    sd: Tensor


def value_and_gradients(
    problem: Levels, needs_grad: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor | None]]:
    """Return the loss of the whole batch, and its gradient in the local rows."""
    dtype = compute_dtype(problem.student, problem.teacher)
    problem = problem._replace(
        temperatures=problem.temperatures.to(dtype),
        instance=_in(dtype, problem.instance),
        batch=_in(dtype, problem.batch),
        classes=_in(dtype, problem.classes),
    )
    gradient = None
    if needs_grad[0]:
        gradient = problem.student.new_zeros(problem.student.shape, dtype=dtype)
    whole = problem.whole
    most = _chunks.most_elements(whole, _ON_CPU, _ELSEWHERE)

    def solve() -> Tensor:
        losses = [
            _AtOneTemperature(problem, T, most, gradient).solve() for T in problem.temperatures
        ]
        return torch.stack(losses).sum()

    is_large = whole.numel() > most // _N_PARTS // 4
    return _chunks.by_workers(solve, is_large, whole), (gradient,)


class _AtOneTemperature:
    """The levels of one temperature, whose gradient is added to that of the others."""

    def __init__(
        self, problem: Levels, temperature: Tensor, most: int, gradient: Tensor | None
    ) -> None:
        self.problem, self.temperature, self.gradient = problem, temperature, gradient
        self.dtype = compute_dtype(problem.student, problem.teacher)
        self.n, self.n_classes = problem.whole.shape
        self.by_rows = self.n > self.n_classes
        self.size = min(self.n, self.n_classes)  # of a Gram matrix
        length = max(self.n, self.n_classes)
        self.width = min(length, max(1, most // self.size))
        self.panels = _chunks.cut(range(length), self.width)
        self.elements = max(1, most // _N_PARTS)
        self.log_sums: tuple[Tensor, Tensor] | None = None

    def solve(self) -> Tensor:
        """Return the loss, and add to the gradient."""
        problem, n, n_classes = self.problem, self.n, self.n_classes
        if not self.by_rows and len(self.panels) > 1:
            self.log_sums = self._log_sum_exps()
        new = problem.student.new_empty
        shape = (self.width, n_classes) if self.by_rows else (n, self.width)
        memory = new((2, *shape), dtype=self.dtype)
        divergences = torch.zeros((n, 1), dtype=self.dtype, device=problem.student.device)
        grams = _Grams(*torch.zeros_like(divergences[:1]).expand(3, self.size, self.size).clone())
        for part in self.panels:
            panel = self._fill(part, memory, divergences)
            self._add(grams, panel)
        level = problem.batch / n, problem.classes / n_classes
        own, other = level[::-1] if self.by_rows else level
        ss, dd, sd = grams
        difference = sd + sd.T  # of the smaller Gram matrices of both networks
        of_other = (_chunks.total(ss * dd) + _chunks.total(sd * sd.T)).mul_(2).clamp_(min=0)
        loss = own * _chunks.total(difference * difference) + other * of_other
        squared = self.temperature * self.temperature
        loss = loss + problem.instance * squared / n * divergences.clamp_(min=0).sum()
        if self.gradient is None:
            return loss
        of_s = ss.add_(sd.T, alpha=0.5)  # the student's products with S and with D
        of_d = dd.mul_(0.5).add_(sd)
        x = (4 * own) * difference + (4 * other) * of_d
        y = (2 * own) * difference + (4 * other) * of_s
        means = (x * of_s + y * of_d).sum(1, keepdim=True)  # of the slopes, where rows are whole
        for part in self.panels:
            if not self.by_rows or self._local(part):
                if len(self.panels) > 1:
                    panel = self._fill(part, memory)
                self._add_gradient(panel, x, y, means)
        return loss

    def _local(self, rows: slice) -> range:
        """Return which of these rows of the batch get a gradient."""
        first, n = self.problem.first, len(self.problem.student)
        return range(max(first, rows.start), min(first + n, rows.stop))

    def _each(self, work: Callable[[slice], object], n_rows: int, width: int) -> None:
        """Call `work` with chunks of rows, as many as workers may share whatever their number."""
        size = min(max(1, self.elements // width), -(-n_rows // _N_PARTS))
        chunks = _chunks.cut(range(n_rows), size)
        _chunks.for_each(lambda rows, _: work(rows), chunks, lambda: None)

    def _log_sum_exps(self) -> tuple[Tensor, Tensor]:
        """Return the largest of the logits over T, and log Σ exp of them less that, [2, N, 1]."""
        tops, sums = self.problem.student.new_empty((2, 2, self.n, 1), dtype=self.dtype)

        def work(rows: slice) -> None:
            for i, z in enumerate((self.problem.whole, self.problem.teacher)):
                scaled = z[rows].to(self.dtype) / self.temperature
                tops[i, rows] = scaled.amax(1, keepdim=True)
                torch.logsumexp(scaled.sub_(tops[i, rows]), 1, keepdim=True, out=sums[i, rows])

        self._each(work, self.n, self.n_classes)
        return tops, sums

    def _fill(self, part: slice, memory: Tensor, divergences: Tensor | None = None) -> _Panel:
        """Return a panel in this memory, and add up the divergences of the rows."""
        whole = slice(0, self.n_classes if self.by_rows else self.n)
        rows, columns = (part, whole) if self.by_rows else (whole, part)
        length = part.stop - part.start
        s, d = memory[:, :length] if self.by_rows else memory[..., :length]

        def log_probabilities(z: Tensor, i: int, chosen: slice) -> Tensor:
            scaled = z[chosen, columns].to(self.dtype) / self.temperature
            if self.log_sums is None:
                return scaled.log_softmax(1)
            # one number for both would lose what a large logit rounds away
            tops, sums = self.log_sums
            return scaled.sub_(tops[i, chosen]).sub_(sums[i, chosen])

        def work(chunk: slice) -> None:
            chosen = slice(rows.start + chunk.start, rows.start + chunk.stop)
            log_q = log_probabilities(self.problem.whole, 0, chosen)
            log_p = log_probabilities(self.problem.teacher, 1, chosen)
            p = log_p.exp()
            if divergences is not None:
                # 0 · ∞ counts as 0, and the NaN of an input is in D
                divergences[chosen] += log_p.sub_(log_q).mul_(p).nansum(1, keepdim=True)
            q = log_q.exp_()
            torch.sub(q, p, out=d[chunk])
            torch.add(q, p, out=s[chunk]).mul_(0.5)

        self._each(work, rows.stop - rows.start, columns.stop - columns.start)
        return _Panel(rows, columns, s, d)

    def _add(self, grams: _Grams, panel: _Panel) -> None:
        """Add what a panel has of the products."""
        s, d = (x.T if self.by_rows else x for x in (panel.s, panel.d))

        def work(rows: slice) -> None:
            grams.ss[rows].addmm_(s[rows], s.T)
            grams.dd[rows].addmm_(d[rows], d.T)
            grams.sd[rows].addmm_(s[rows], d.T)

        self._each(work, self.size, self.size)

    def _add_gradient(self, panel: _Panel, x: Tensor, y: Tensor, means: Tensor) -> None:
        """Add to the gradient of a panel's logits q (h − Σ q h) / T, with the slopes h in Q."""
        assert self.gradient is not None
        local, start = self._local(panel.rows), panel.rows.start
        first = local.start - self.problem.first
        gradient = self.gradient[first : first + len(local), panel.columns]
        unit = self.problem.instance * self.temperature / self.n

        def work(rows: slice) -> None:
            chosen = slice(local.start + rows.start, local.start + rows.stop)  # of the batch
            of_panel = slice(chosen.start - start, chosen.stop - start)
            s, d = panel.s[of_panel], panel.d[of_panel]
            q = torch.add(s, d, alpha=0.5)
            if self.by_rows:
                slopes = torch.mm(s, x.T).addmm_(d, y.T)
                mean = (slopes * q).sum(1, keepdim=True)
            else:
                slopes = torch.mm(x[chosen], panel.s).addmm_(y[chosen], panel.d)
                mean = means[chosen]
            slopes.sub_(mean).mul_(q).div_(self.temperature).add_(d * unit)
            gradient[rows].add_(slopes)

        self._each(work, len(local), gradient.shape[1])


def _in(dtype: torch.dtype, number: Number) -> Number:
    return number.to(dtype) if isinstance(number, Tensor) else number
