"""Queries against keys: losses of their similarities, without storing the matrix of them.

`Pairs` is the problem of the contrastive losses, `SoftPairs` that of similarities against a
teacher's; the mathematics that the engines share follows. `_contrasts.py` states the losses.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _ranks
from fastkd._op import Op

Number = float | Tensor
Gradients = tuple[Tensor | None, ...]

SHORTEST = 1e-12  # F.normalize divides by at least this length; a row of it has no direction
LINEAR = 50.0  # from here on a softplus equals its argument, in float64 too
IGNORED = -100  # the label of an example without a class
HEADROOM = 12  # slopes are lifted by 2^12, since small ones would vanish in float16


class Pairs(NamedTuple):
    """Queries against keys, S = scale · Q Kᵀ, of rows divided by their lengths if `normalize`.

    Query i and key first + i are of one example. That key is its positive one or, with `two_views`,
    the other view of the example is; the rest are its negatives. With sums over the negatives j the
    loss is, by its form,

    softplus  Σ_i w_i softplus(n_i − a_i)   n_i = log (Σ_j exp S_ij + Σ_m exp f_im)
    linear    Σ_i w_i (n_i − a_i)
    pairs     Σ_i w_i (softplus(a_i − s_i) + Σ_j softplus(S_ij − a_i))

    where s are the similarities to the positive keys and a the positive logits, which equal s if
    they are None. "pairs" needs them. With weights of keys the first two forms have the same sums
    over the columns of those keys besides. Without them, and with positive logits, f are the logits
    of further negatives of each query alone. Classes go with "linear": all keys of a query's class
    are its positive ones, and r_i S_ij is subtracted for each such pair. A query without any, as
    with the label IGNORED, has the weight 0.

    The gradient in the positive logits includes that in the positive logits of the queries' keys.
    """

    query: Tensor  # [n, D], in the compute dtype or as it came in half precision
    key: Tensor | None  # [M, D], as the queries; None: the queries are the keys
    scale: Tensor  # 0-dim, in the compute dtype
    positive_logits: Tensor | None  # a, [n]; None: s, or by classes
    further_logits: Tensor | None  # f, [n, M']; None: there are none
    weights: Tensor  # w, [n]
    bank: Tensor | None  # [B, D], further keys, which get no gradient
    masked_pairs: Tensor | None  # [n, M + B], bool: further masked pairs; kernels do not read it
    key_positive_logits: Tensor | None  # [N], a of the examples of the first N keys; None: s
    key_weights: Tensor | None  # [N]; None: columns have no loss
    classes: Tensor | None  # [M], the labels of all keys
    query_classes: Tensor | None  # [n]
    attractions: Tensor | None  # r, [n], which `with_attractions` knows; None: it was not asked
    attractions_differ: bool  # whether they do within a class
    over_anchors: bool  # whether weights are over their sum over queries with a positive key
    form: str
    first: int  # the rank offset: query i and key first + i are of one example; -1: none are
    two_views: bool  # queries are two views of each example, the first views before the second
    normalize: bool
    half: str  # "bfloat16" or "float16" if that holds all rows without rounding, else ""
    group: str  # the name of the process group over whose ranks columns are summed, or ""


class SoftPairs(NamedTuple):
    """Σ_i w_i KL(softmax_j T_ij ‖ softmax_j S_ij), S of the student and T of the teacher.

    S and T are as in `Pairs`. The form "cross_entropy" lacks the teacher's entropy.
    """

    query: Tensor  # [n, D], the student's, in the compute dtype
    key: Tensor | None  # [M, D]; None: the queries are the keys
    scale: Tensor  # 0-dim
    teacher_query: Tensor  # [n, D']
    teacher_key: Tensor | None  # [M, D']
    teacher_scale: Tensor  # 0-dim
    weights: Tensor | None  # w, [n]; None: all 1
    form: str  # "kl" or "cross_entropy"
    first: int  # key first + i is query i itself and masked; -1: none is
    normalize: bool
    half: str  # "bfloat16" or "float16" if that holds the student's rows without rounding, else ""
    teacher_half: str


solve = Op(Pairs, trained=("query", "key", "scale", "positive_logits", "further_logits"))
solve_soft = Op(SoftPairs, trained=("query", "key", "scale"))


# ------------------------------------------------------------------ embeddings as engines take them


def widened(problem: Pairs) -> Pairs:
    """Return the problem with embeddings in the compute dtype."""
    dtype = problem.scale.dtype
    if problem.query.dtype == dtype:
        return problem
    key, bank = (x if x is None else x.to(dtype) for x in (problem.key, problem.bank))
    return problem._replace(query=problem.query.to(dtype), key=key, bank=bank)


class Half(NamedTuple):
    """Rows in half precision: matrix · factors, divided by their lengths if these are known."""

    matrix: Tensor  # [n, D]
    factors: Tensor  # [n]


def in_half(rows: Tensor, lengths: Tensor | None, half: str) -> Half:
    """Return rows, which came in half precision, in it again."""
    dtype = getattr(torch, half)
    if lengths is None:
        return Half(rows.to(dtype), rows.new_ones(len(rows)))
    if dtype == torch.bfloat16:
        return Half(rows.to(dtype), 1 / lengths[:, 0])
    # rows are scaled to a length near 1, because products of float16 overflow; any factor will do
    # for a length of 0
    _, exponents = torch.frexp(lengths)
    factors = torch.ldexp(1 / lengths, exponents)[:, 0].clamp_(max=2)
    return Half(torch.ldexp(rows, -exponents).to(dtype), factors)


def units(rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Return rows divided by their lengths, and these, [n, 1], or None if not `normalize`."""
    if not normalize:
        return rows, None
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_(min=SHORTEST)
    return rows / lengths, lengths


def directions(rows: Tensor) -> Tensor:
    """Return rows as F.normalize does; those that are too short for a direction get gradient 0."""
    lengths = torch.linalg.vector_norm(rows.detach(), dim=-1, keepdim=True)
    return F.normalize(torch.where(lengths > SHORTEST, rows, rows.detach()), dim=-1)


def divisors(lengths: Tensor) -> Tensor:
    """Return what divides the gradients of rows: their lengths, ∞ where there is no direction."""
    return torch.threshold(lengths, SHORTEST, math.inf)


def of_lengths(gradients: Tensor, rows: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the gradients in x from those in `rows` = x / ‖x‖, in place."""
    if lengths is None:
        return gradients
    along = torch.linalg.vecdot(gradients, rows).unsqueeze(-1)
    return gradients.addcmul_(rows, along, value=-1).div_(divisors(lengths))


# ----------------------------------------------------------------- the loss, from log-sum-exps


def weighted_sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return Σ w_i l_i; without weights all are 1."""
    return losses.sum() if weights is None else losses @ weights.to(losses.dtype)


def own_columns(problem: Pairs) -> slice:
    """Return the columns of the keys that are of one example with the queries."""
    return slice(problem.first, problem.first + len(problem.query))


class Penalty(NamedTuple):
    """The share of rows in the loss, and its slopes."""

    loss: Tensor
    slopes: Tensor  # in the log-sum-exps of S
    of_positive: Tensor  # in the positive logits
    of_further: Tensor | None  # in the further logits, [n, M']


def penalty(problem: Pairs, log_sums: Tensor, rows: slice, shift: Tensor | float = 0.0) -> Penalty:
    """Return the share of these rows in the loss, and its slopes.

    The log-sum-exps are those of S − shift. It is added to them after the positive logits are
    subtracted, because both may be large and alike.
    """
    assert problem.positive_logits is not None
    dtype = log_sums.dtype
    positive, weights = problem.positive_logits[rows].to(dtype), problem.weights[rows].to(dtype)
    odds = log_sums + (shift - positive)
    if problem.further_logits is not None:
        further = problem.further_logits[rows].to(dtype)
        odds = torch.cat([odds[:, None], further - positive[:, None]], 1).logsumexp(1)
        loss, slopes = _of_form(problem.form, odds, weights)
        # from the logits themselves, because odds are rounded once more
        shares = torch.cat([(log_sums + shift)[:, None], further], 1).softmax(1)
        shares.mul_(slopes[:, None])
        return Penalty(loss, shares[:, 0].contiguous(), -slopes, shares[:, 1:])
    if problem.classes is not None:  # the positive pairs are among all: rounding alone is below 0
        odds = odds.relu()
    loss, slopes = _of_form(problem.form, odds, weights)
    return Penalty(loss, slopes, -slopes, None)


def column_penalty(
    problem: Pairs, log_sums: Tensor, shift: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the share of the queries' own columns in the loss, and the slopes of all columns."""
    assert problem.key_positive_logits is not None and problem.key_weights is not None
    weights, own = problem.key_weights.to(problem.query.dtype), own_columns(problem)
    odds = log_sums + (shift - problem.key_positive_logits.to(problem.query.dtype))
    _, slopes = _of_form(problem.form, odds, weights)
    return _of_form(problem.form, odds[own], weights[own])[0], slopes


def _of_form(form: str, odds: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    if form == "softplus":
        return F.softplus(odds, threshold=LINEAR) @ weights, odds.sigmoid() * weights
    return odds @ weights, weights.clone()


def over_ranks(log_sums: Tensor, group: str) -> Tensor:
    """Return the log-sum-exps over the ranks of a group; without one those of this process."""
    return _ranks.log_sum_exp(log_sums, group) if group else log_sums
