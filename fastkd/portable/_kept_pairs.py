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
from fastkd.problems.pairs import Gradients, Pairs, of_lengths, own_columns, units

_LN2 = math.log(2)
_MOST = 1e30  # weights over a larger number may be flushed to 0


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
    n_pairs = query.shape[0] * sum(
        x.shape[0] for x in (query if key is None else key, bank) if x is not None
    )
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
    needs_query, needs_key, needs_scale, needs_logits = needs_grad
    in_query = in_key = in_scale = None
    if needs_query or needs_scale:
        # the first tensor is not read, because beta is 0
        in_query = torch.addmm(q, g, keys, beta=0, alpha=scale)
        if needs_scale:  # in G + Gᵀ each pair counts twice
            in_scale = torch.linalg.vecdot(in_query, q).sum()
            in_scale.mul_((0.5 if key is None else 1) / scale)
        in_query = of_lengths(in_query, q, q_lengths) if needs_query else None
    if needs_key:
        in_key = torch.addmm(k, g[:, : k.shape[0]].T, q, beta=0, alpha=scale)
        in_key = of_lengths(in_key, k, k_lengths)
    return loss, (in_query, in_key, in_scale, of_logits if needs_logits else None)


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
    if key_weights is not None and (of_kind or problem.group):
        return None
    if given is None and (of_kind != problem.two_views or problem.first < 0):
        return None
    given = None if given is None else given.to(q.dtype)
    s = _similarities(q, keys, scale)
    own = s.diagonal(problem.first) if problem.first >= 0 else None
    pairs = _pairs_of_views(problem, s) if problem.two_views else own
    # the largest positive logit is subtracted where powers could overflow
    bound = abs(scale) if problem.normalize else math.inf
    shift = None
    if LARGEST < bound < math.inf:
        largest = pairs if given is None else given / _LN2
        assert largest is not None
        shift = largest.amax()
        s.sub_(shift)
    s.exp2_()
    if given is not None:
        positive = _powers(given, shift)
    else:
        assert pairs is not None
        positive = pairs.clone() if pairs is own else pairs.flatten()
    if own is not None:
        own.zero_()
    if pairs is not own and pairs is not None:
        pairs.zero_()
    if problem.left_out is not None:
        s.masked_fill_(problem.left_out, 0)

    sums = s.sum(1)
    loss, u = _penalty(problem.form, sums, positive, problem.weights.to(s.dtype))
    is_in_range = bound <= LARGEST or _are_in_range(problem.form, sums, positive)
    if key_weights is not None:
        column_sums = s[:, : key_weights.shape[0]].sum(0)
        of_keys = problem.key_positive_logits
        if of_keys is not None:
            positive = _powers(of_keys.to(s.dtype), shift)
        share, v = _penalty(problem.form, column_sums, positive, key_weights.to(s.dtype))
        loss = loss + share
        # otherwise the check of the rows was that of all sums and positive pairs
        if bound > LARGEST and (of_keys is not None or problem.form == "linear"):
            is_in_range &= _are_in_range(problem.form, column_sums, positive)
    if not is_in_range:
        return None
    if not any(needs_grad):
        return _Slopes(loss, s, None)

    if key_weights is not None:
        of_columns = v * column_sums
        if given is not None:
            of_columns = of_columns[own_columns(problem)]
        slopes = torch.addcmul(of_columns, u, sums)
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


def _powers(logits: Tensor, shift: Tensor | None) -> Tensor:
    """Return exp(logits), divided by 2^shift."""
    in_bits = logits / _LN2
    return in_bits.exp2_() if shift is None else in_bits.sub_(shift).exp2_()


def _penalty(form: str, sums: Tensor, positive: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss from the sums of exponentials, and its slopes in the sums."""
    ratios = sums / positive
    if form == "softplus":
        return ratios.log1p_() @ weights, weights / (sums + positive)
    return ratios.log_() @ weights, weights / sums


def _are_in_range(form: str, sums: Tensor, positive: Tensor) -> bool:
    """Return whether no exponential that matters was flushed to 0, nor will a slope be."""
    if form == "linear" and not sums.amin().item() > LEAST:
        return False
    return positive.amin().item() > LEAST and (sums + positive).sum().item() < _MOST


def _with_classes(
    problem: Pairs, q: Tensor, keys: Tensor, scale: float, needs_grad: Sequence[bool]
) -> _Slopes | None:
    """Return the loss of examples that are attracted by all of their class, and its slopes."""
    classes, query_classes, r = problem.classes, problem.query_classes, problem.attractions
    if problem.positive_logits is not None or query_classes is None or r is None:
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
    loss = sums.log().mul_(weights).sub_(attracted, alpha=_LN2).sum()
    if any(needs_grad):
        u, of_rows = weights / sums, r.unsqueeze(1)
        s.mul_(u.unsqueeze(1) + u if problem.key is None else u.unsqueeze(1))
        s.addcmul_(alike, of_rows, value=-1)
        if problem.key is None:  # (i, j) and (j, i) are one pair
            s.addcmul_(alike, r, value=-1)
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
