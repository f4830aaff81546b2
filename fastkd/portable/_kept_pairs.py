"""Queries against keys where one chunk holds all similarities S on a CPU: S is kept.

Calls of PyTorch cost more than their memory here. The fewest of them turn S, in place, into the
slopes G of the loss in it. Exponentials are powers of 2, which are the fastest, and need no maxima
where S has bounds. With E = exp S, o_i the sum of E over the negatives of a row, e_i that of its
positive pair and r_i = o_i / e_i, the loss is Σ_i w_i log(1 + r_i), whose logarithm has all digits
where the pairs are nearly perfect, or Σ_i w_i log r_i ("linear"), and with u_i the slopes in o_i

    G_ij = u_i E_ij   over the negatives,   −u_i o_i   at the positive pair.

Columns have the same sums with slopes v_j. Infinities show in the loss, and small exponentials are
looked for: the chunks, with their maxima, then solve the problem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.portable import _chunks
from fastkd.portable._pair_chunks import LARGEST, LEAST
from fastkd.problems.pairs import Gradients, Pairs, of_lengths, units

_LN2 = math.log(2)


class _Slopes(NamedTuple):
    """A loss and its slopes in S."""

    loss: Tensor
    matrix: Tensor  # [n, M]; G + Gᵀ where the queries are the keys
    of_logits: Tensor | None  # [n], the gradient in the positive logits


def value_and_gradients(
    problem: Pairs, needs_grad: Sequence[bool]
) -> tuple[Tensor, Gradients] | None:
    """Return the loss and its gradients; None if the chunks must solve the problem."""
    query, key, bank = problem.query, problem.key, problem.bank
    n_keys = (query if key is None else key).shape[0] + (0 if bank is None else bank.shape[0])
    n_pairs = query.shape[0] * n_keys
    if problem.further_logits is not None:
        return None
    if not query.is_cpu or not 0 < n_pairs <= _chunks.most_elements(query, 1 << 20, 0):
        return None
    scale = problem.scale.item()
    # a factor of 0 would hide NaN and infinities, because BLAS does not multiply by it
    if not scale or not math.isfinite(scale):
        return None
    normalize = problem.normalize
    q, q_lengths = units(query, normalize)
    k, k_lengths = (q, q_lengths) if key is None else units(key, normalize)
    keys = k if bank is None else torch.cat((k, units(bank, normalize)[0]))
    slopes_of = _softplus_of_pairs if problem.form == "pairs" else _log_sum_exps
    if problem.classes is not None:
        slopes_of = _with_classes
    slopes = slopes_of(problem, q, keys, scale, needs_grad)
    if slopes is None or not math.isfinite(slopes.loss.item()):
        return None
    loss, g, of_logits = slopes
    needs_query, needs_key, needs_scale, needs_logits, _ = needs_grad
    in_query = in_key = in_scale = None
    if needs_query or needs_scale:
        # the first tensor is not read, because beta is 0
        in_query = torch.addmm(q, g, keys, beta=0, alpha=scale)
        if needs_scale:  # in G + Gᵀ each pair counts twice
            in_scale = torch.linalg.vecdot(in_query, q).sum()
            in_scale.mul_((0.5 if key is None else 1) / scale)
        in_query = of_lengths(in_query, q, q_lengths) if needs_query else None
    if needs_key:
        of_keys = g if bank is None else g[:, : k.shape[0]]
        in_key = torch.addmm(k, of_keys.T, q, beta=0, alpha=scale)
        in_key = of_lengths(in_key, k, k_lengths)
    return loss, (in_query, in_key, in_scale, of_logits if needs_logits else None, None)


def _similarities(q: Tensor, keys: Tensor, scale: float, less: Tensor | None = None) -> Tensor:
    """Return scale · Q Kᵀ, less a number for each row, in bits: the exponents of powers of 2."""
    if less is None:
        return torch.addmm(q.new_empty(()), q, keys.T, beta=0, alpha=scale / _LN2)
    return torch.addmm(less.unsqueeze(1), q, keys.T, beta=-1 / _LN2, alpha=scale / _LN2)


def _pairs_of_views(problem: Pairs, s: Tensor) -> Tensor:
    """Return a view [2, n/2] of the pairs of each view with the other one of its example."""
    n, m = s.shape
    half = n // 2
    return s.as_strided((2, half), (half * m - half, m + 1), problem.first + half)


def _log_sum_exps(
    problem: Pairs, q: Tensor, keys: Tensor, scale: float, needs_grad: Sequence[bool]
) -> _Slopes | None:
    """Return the loss of rows and, with weights of keys, of columns, and its slopes."""
    given, key_weights, of_kind = problem.positive_logits, problem.key_weights, problem.key is None
    # columns of other queries have other positive pairs
    if key_weights is not None and (of_kind or key_weights.shape != problem.weights.shape):
        return None
    if problem.group:
        return None
    if given is None and (of_kind != problem.two_views or problem.first < 0):
        return None
    given = None if given is None else given.to(q.dtype)
    s = _similarities(q, keys, scale)
    own = s.diagonal(problem.first) if problem.first >= 0 else None
    pairs = _pairs_of_views(problem, s) if problem.two_views else own
    positive = pairs if given is None else given / _LN2
    assert positive is not None
    has_bounds = problem.normalize and abs(scale) <= LARGEST
    if not has_bounds:  # the largest number is subtracted, because powers could overflow
        largest = s.amax() if given is None else torch.maximum(s.amax(), positive.amax())
        if not positive.amin().item() - largest.item() > math.log2(LEAST):
            return None
        s.sub_(largest)
        positive = positive if given is None else positive - largest
    s.exp2_()
    if given is not None:
        positive = positive.exp2()
    else:  # a copy, because these pairs are no negatives
        positive = positive.clone() if pairs is own else positive.flatten()
    if own is not None:
        own.zero_()
    if pairs is not own and pairs is not None:
        pairs.zero_()
    if problem.masked_pairs is not None:
        s.masked_fill_(problem.masked_pairs, 0)

    sums = s.sum(1)
    loss, u = _penalty(problem.form, sums, positive, problem.weights.to(s.dtype))
    is_linear = problem.form == "linear"  # whose sums have logarithms
    if is_linear and not has_bounds and not sums.amin().item() > LEAST:
        return None
    if key_weights is not None:
        column_sums = s[:, : key_weights.shape[0]].sum(0)
        share, v = _penalty(problem.form, column_sums, positive, key_weights.to(s.dtype))
        loss = loss + share
        if is_linear and not has_bounds and not column_sums.amin().item() > LEAST:
            return None
    if not any(needs_grad):
        return _Slopes(loss, s, None)

    if key_weights is not None:
        slopes = torch.addcmul(v * column_sums, u, sums)
        if v.shape[0] < keys.shape[0]:
            v = torch.cat((v, v.new_zeros(keys.shape[0] - v.shape[0])))
        s.mul_(u.unsqueeze(1) + v)
    else:
        slopes = u * sums
        s.mul_(u.unsqueeze(1) + u if of_kind else u.unsqueeze(1))
    if given is not None:
        return _Slopes(loss, s, slopes.neg_())
    assert pairs is not None
    if of_kind:  # (i, j) and (j, i) are one pair
        pairs.sub_(slopes.view(2, -1).sum(0))
    else:
        torch.neg(slopes, out=pairs)
    return _Slopes(loss, s, None)


def _penalty(form: str, sums: Tensor, positive: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss from the sums of exponentials, and its slopes in the sums."""
    ratios = sums / positive
    if form == "softplus":
        return ratios.log1p_() @ weights, weights / (sums + positive)
    return ratios.log_() @ weights, weights / sums


def _with_classes(
    problem: Pairs, q: Tensor, keys: Tensor, scale: float, needs_grad: Sequence[bool]
) -> _Slopes | None:
    """Return the loss of examples that are attracted by all of their class, and its slopes."""
    classes, query_classes, r = problem.classes, problem.query_classes, problem.attractions
    assert classes is not None and query_classes is not None and r is not None
    if problem.positive_logits is not None:
        return None
    if not problem.normalize or abs(scale) > LARGEST or problem.two_views:
        return None
    s = _similarities(q, keys, scale)
    # eq gives numbers here, because booleans and their sums take far longer
    alike = torch.eq(query_classes.unsqueeze(1), classes, out=torch.empty_like(s))
    if problem.first >= 0:
        alike.diagonal(problem.first).zero_()
    attracted = torch.linalg.vecdot(alike, s).mul_(r)
    s.exp2_()
    if problem.first >= 0:
        s.diagonal(problem.first).zero_()
    sums, weights = s.sum(1), problem.weights.to(s.dtype)
    losses = sums.log().mul_(weights).sub_(attracted, alpha=_LN2)
    loss = losses.relu_().sum()  # the attracting pairs are in the sums: rounding alone is below 0
    if any(needs_grad):
        u, of_rows, of_kind = weights / sums, r.unsqueeze(1), problem.key is None
        s.mul_(u.unsqueeze(1) + u if of_kind else u.unsqueeze(1))
        if of_kind and problem.attractions_differ:  # (i, j) and (j, i) are one pair
            of_rows = of_rows + r
        is_double = of_kind and not problem.attractions_differ
        s.addcmul_(alike, of_rows, value=-2 if is_double else -1)
    return _Slopes(loss, s, None)


def _softplus_of_pairs(
    problem: Pairs, q: Tensor, keys: Tensor, scale: float, needs_grad: Sequence[bool]
) -> _Slopes | None:
    """Return the loss of each pair by itself, and its slopes."""
    logits = problem.positive_logits
    if logits is None or problem.key is None or problem.two_views:
        return None
    s = _similarities(q, keys, scale, less=logits.to(q.dtype))
    own = s.diagonal(problem.first) if problem.first >= 0 else None
    weights = problem.weights.to(q.dtype)
    if own is not None:
        own.neg_()
    e = s.exp2_()
    scratch = torch.log1p(e)
    loss, of_logits = scratch.sum(1) @ weights, None
    if any(needs_grad):
        e.div_(torch.add(e, 1, out=scratch))
        if own is not None:
            own.neg_()
        e.mul_(weights.unsqueeze(1))
        if needs_grad[3]:
            of_logits = e.sum(1).neg_()
    return _Slopes(loss, e, of_logits)
