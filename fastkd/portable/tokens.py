"""Relations of tokens in PyTorch, for any device.

A chunk holds the products of the tokens of some sequences and heads, or of some rows of one head
where they are many, so that no matrix [L, L] is larger than a chunk. With the slopes G in S, the
gradient of a head's tokens X is scale · (G + Gᵀ) X: each block of rows adds G X to its rows and
Gᵀ X to all others. Without a softmax G is symmetric, and a block owns its rows.

Exponents are in bits, because powers of 2 are the fastest. A token that does not count is 0, so
that its products are 0 in both networks; a softmax gives it a finite, lowest exponent.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._precision import compute_dtype
from fastkd.portable import _chunks
from fastkd.problems.pairs import of_lengths, units
from fastkd.problems.tokens import Number, TokenRelations

_ON_CPU = 1 << 18  # three buffers of that size stay in a CPU's cache
_ELSEWHERE = 1 << 24
_N_GROUPS = 4  # of the rows of one head, which workers share where there are fewer heads
_LN2 = math.log(2)


class _Vectors(NamedTuple):
    """The tokens of one network in a chunk, [n, L, d]."""

    x: Tensor
    lengths: Tensor | None  # [n, L, 1], by which they were divided
    scaled: Tensor  # x times the scale of the products


class _Chunk(NamedTuple):
    """Heads of sequences, n of them, and what belongs to them."""

    sequences: slice
    heads: slice
    group: int  # of rows
    rows: list[slice]  # blocks
    student: _Vectors
    teacher: _Vectors
    mask: Tensor | None  # [n, L], 1 or 0
    weights: Tensor | float  # of the queries in the loss, [n, L, 1], or all alike


Scratch = tuple[Tensor, Tensor, Tensor]


def value_and_gradients(
    problem: TokenRelations, needs_grad: tuple[bool, ...]
) -> tuple[Tensor, tuple[Tensor | None]]:
    """Return the loss of each sequence, [...], and the gradient of each in its tokens."""
    n_pairs = problem.student.shape[:-1].numel() * problem.student.shape[-2] * problem.heads
    is_large = n_pairs > _chunks.most_elements(problem.student, _ON_CPU, _ELSEWHERE)
    solver = _Solver(problem, *needs_grad)
    return _chunks.by_workers(solver.solve, is_large, problem.student)


class _Solver:
    """The way through a problem, in chunks that workers share."""

    def __init__(self, problem: TokenRelations, needs_grad: bool) -> None:
        self.problem, self.needs_grad = problem, needs_grad
        self.dtype = compute_dtype(problem.student, problem.teacher)
        self.n_sequences, self.length = (
            problem.student.shape[:-2].numel(),
            problem.student.shape[-2],
        )
        self.student, self.teacher = (
            x.reshape(self.n_sequences, *x.shape[-2:]) for x in (problem.student, problem.teacher)
        )
        self.mask = None
        if problem.mask is not None:
            self.mask = problem.mask.reshape(self.n_sequences, self.length)
        self.is_symmetric = problem.divergence == "mse" and not problem.causal
        most = _chunks.most_elements(self.student, _ON_CPU, _ELSEWHERE)
        self.size = max(most, self.length)
        self.is_whole = self.length**2 <= self.size  # whether a head fits in a chunk
        n_heads = self.n_sequences * problem.heads
        self.n_groups = 1 if self.is_whole or n_heads >= _N_GROUPS else _N_GROUPS
        self.losses = self.student.new_zeros(
            (self.n_groups, self.n_sequences, problem.heads), dtype=self.dtype
        )
        self.gradients: Tensor | None = None
        if needs_grad:
            # rows that a block owns need no part of the gradient for each group
            n_parts = 1 if self.is_symmetric else self.n_groups
            shape = (n_parts, *self.student.shape)
            self.gradients = self.student.new_empty(shape, dtype=self.dtype)

    def solve(self) -> tuple[Tensor, tuple[Tensor | None]]:
        """Return the losses and the gradient, in the shapes of the problem."""
        _chunks.for_each(self._add, self._chunks(), self._scratch)
        losses = self.losses.sum(0).sum(-1).relu_().view(self.problem.student.shape[:-2])
        if self.gradients is None:
            return losses, (None,)
        gradient = self.gradients[0] if len(self.gradients) == 1 else self.gradients.sum(0)
        return losses, (gradient.view(self.problem.student.shape),)

    def _chunks(self) -> list[slice]:
        """Return slices of sequences · heads · groups: whole sequences or parts of one."""
        heads, n_heads = self.problem.heads, self.size // max(self.length, 1) ** 2
        if not self.length:
            return []
        if heads <= n_heads:
            return _chunks.cut(range(self.n_sequences * heads), n_heads // heads * heads)
        if not self.is_whole:
            return _chunks.cut(range(self.n_sequences * heads * self.n_groups), 1)
        firsts = range(0, self.n_sequences * heads, heads)
        return [x for i in firsts for x in _chunks.cut(range(i, i + heads), n_heads)]

    def _scratch(self) -> Scratch:
        s, t, difference = self.student.new_empty((3, self.size), dtype=self.dtype)
        return s, t, difference

    def _open(self, chunk: slice) -> _Chunk:
        """Return the heads of a chunk."""
        heads = self.problem.heads
        first, group = divmod(chunk.start, self.n_groups)
        n = len(range(chunk.start, chunk.stop))
        sequence, head = divmod(first, heads)
        sequences = slice(sequence, sequence + max(n // heads, 1))
        in_sequence = (
            slice(0, heads) if n >= heads and self.n_groups == 1 else slice(head, head + n)
        )
        rows = range(self.length)
        if self.n_groups > 1:
            size = -(-self.length // self.n_groups)
            rows = rows[group * size : (group + 1) * size]
        n_rows = self.length if self.is_whole else self.size // self.length
        mask = None
        n_heads = in_sequence.stop - in_sequence.start
        if self.mask is not None:
            mask = self.mask[sequences].repeat_interleave(n_heads, 0)
        return _Chunk(
            sequences, in_sequence, group, _chunks.cut(rows, n_rows),
            self._vectors(self.student, sequences, in_sequence, mask, self.problem.scale),
            self._vectors(self.teacher, sequences, in_sequence, mask, self.problem.teacher_scale),
            mask, self._weights(mask),
        )  # fmt: skip

    def _vectors(
        self, x: Tensor, sequences: slice, heads: slice, mask: Tensor | None, scale: Number
    ) -> _Vectors:
        x = x[sequences].unflatten(-1, (self.problem.heads, -1))[:, :, heads].transpose(1, 2)
        x = x.flatten(0, 1).to(self.dtype)
        if mask is not None:
            x = torch.where(mask[..., None], x, 0)
        x, lengths = units(x, self.problem.normalize)
        if isinstance(scale, Tensor):
            scale = scale.to(self.dtype)
        return _Vectors(
            x, lengths, x * (scale / _LN2 if self.problem.divergence == "kl" else scale)
        )

    def _weights(self, mask: Tensor | None) -> Tensor | float:
        """Return what multiplies the divergence of a query, or the square of a pair."""
        is_kl, heads = self.problem.divergence == "kl", self.problem.heads
        n: Any = self.length if mask is None else mask.sum(1).to(self.dtype)[:, None, None]
        if not is_kl:
            n = n * (n + 1) / 2 if self.problem.causal else n * n
        if mask is None:
            return 1 / (heads * max(n, 1))
        weights = 1 / (heads * n.clamp(min=1))
        return weights * mask[..., None] if is_kl else weights

    def _add(self, chunk: slice, scratch: Scratch) -> None:
        """Write the losses of the heads of a chunk and their gradients."""
        c = self._open(chunk)
        n, length, width = c.student.x.shape
        sums = None
        if self.gradients is not None:
            sums = self.student.new_empty((n, length, width), dtype=self.dtype)
            if not self.is_whole and not self.is_symmetric:
                sums.zero_()
        blocks = []
        for rows in c.rows:
            blocks.append(self._block(c, rows, scratch, sums))
        n_sequences = c.sequences.stop - c.sequences.start
        losses = self.losses[c.group, c.sequences, c.heads]
        if blocks:
            losses.copy_(torch.stack(blocks).sum(0).view(n_sequences, -1))
        if sums is None or self.gradients is None:
            return
        is_owner = self.is_symmetric and self.n_groups > 1
        whole = slice(c.rows[0].start, c.rows[-1].stop) if is_owner and c.rows else slice(0, length)
        if is_owner and not c.rows:
            return
        sums = sums[:, whole].mul_(self.problem.scale)
        lengths = c.student.lengths
        sums = of_lengths(
            sums, c.student.x[:, whole], None if lengths is None else lengths[:, whole]
        )
        part = self.gradients[0 if self.is_symmetric else c.group, c.sequences]
        part = part.unflatten(-1, (self.problem.heads, -1))[:, whole, c.heads]
        part.copy_(sums.view(n_sequences, -1, *sums.shape[1:]).transpose(1, 2))

    def _block(self, c: _Chunk, rows: slice, scratch: Scratch, sums: Tensor | None) -> Tensor:
        """Return the loss of some rows of each head, [n], and add its slopes in all tokens."""
        keys = slice(0, rows.stop if self.problem.causal else self.length)
        shape = len(c.student.x), rows.stop - rows.start, keys.stop
        n_elements = shape[0] * shape[1] * shape[2]
        s, t, difference = (x[:n_elements].view(shape) for x in scratch)
        for vectors, out in ((c.student, s), (c.teacher, t)):
            torch.bmm(vectors.scaled[:, rows], vectors.x[:, keys].mT, out=out)
        solve = self._divergence if self.problem.divergence == "kl" else self._squares
        loss, slopes = solve(c, rows, keys, s, t, difference)
        if sums is None:
            return loss
        x = c.student.x
        if self.is_symmetric:
            torch.bmm(slopes, x, out=sums[:, rows])
        elif self.is_whole:
            torch.bmm(slopes, x, out=sums)
            sums.baddbmm_(slopes.mT, x)
        else:
            sums[:, rows].baddbmm_(slopes, x[:, keys])
            sums[:, keys].baddbmm_(slopes.mT, x[:, rows])
        return loss

    def _divergence(
        self, c: _Chunk, rows: slice, keys: slice, s: Tensor, t: Tensor, difference: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return Σ KL over some rows, [n], and the slopes in S, in place of s."""
        for products in (s, t):
            lowest = torch.finfo(products.dtype).min / 2  # finite, since −∞ − (−∞) is NaN
            if c.mask is not None:
                products.masked_fill_(~c.mask[:, None, keys], lowest)
            if self.problem.causal:
                products.masked_fill_(self._future(products, rows), lowest)
            products.sub_(products.amax(-1, keepdim=True))
        torch.sub(t, s, out=difference)
        q, p = s.exp2_(), t.exp2_()
        of_q, of_p = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
        divergences = difference.mul_(p).sum(-1, keepdim=True).div_(of_p)
        divergences.add_(torch.log2(of_q / of_p)).mul_(_LN2)
        weights = c.weights[:, rows] if isinstance(c.weights, Tensor) else c.weights
        loss = (divergences * weights).sum((1, 2))
        if self.needs_grad:
            q.mul_(weights / of_q).addcmul_(p, weights / of_p, value=-1)
        return loss, q

    def _squares(
        self, c: _Chunk, rows: slice, keys: slice, s: Tensor, t: Tensor, difference: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return Σ (S − T)² over some rows, [n], and the slopes in S, twice where symmetric."""
        removed = None
        if self.problem.removed:
            removed = s < 0
            if self.problem.removed == "teacher":
                removed &= t < 0
            s.masked_fill_(removed, 0)
            t.relu_()
        torch.sub(s, t, out=difference)
        if self.problem.causal:
            difference.masked_fill_(self._future(difference, rows), 0)
        weights = c.weights.view(-1, 1, 1) if isinstance(c.weights, Tensor) else c.weights
        loss = torch.mul(difference, difference, out=s).sum((1, 2), keepdim=True).mul_(weights)
        if self.needs_grad:
            if removed is not None:
                difference.masked_fill_(removed, 0)
            difference.mul_(weights * (4 if self.is_symmetric else 2))
        return loss.view(-1), difference

    def _future(self, products: Tensor, rows: slice) -> Tensor:
        """Return [rows, keys], whether a key comes after its query."""
        shape = products.shape[1:]
        return torch.ones(shape, dtype=torch.bool, device=products.device).triu_(rows.start + 1)
