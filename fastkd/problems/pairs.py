"""Queries against keys: every loss of their similarities, without the matrix of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _ranks

Number = float | Tensor

SHORTEST = 1e-12  # F.normalize divides by at least this length
LINEAR = 50.0  # from here on a softplus equals its argument, in float64 too
HEADROOM = (
    12  # slopes in half precision are lifted by 2^12, since small ones would vanish in float16
)


class Pairs(NamedTuple):
    """Queries against keys, S = scale · Q Kᵀ, of rows divided by their lengths if `normalize`.

    With sums over j that leave out a query's own key, the loss is, by its form,

    softplus  Σ_i w_i softplus(n_i − a_i)   n_i = log Σ_j exp S_ij
    linear    Σ_i w_i (n_i − a_i)
    pairs     Σ_i w_i Σ_j softplus(S_ij − a_i)

    where a are the positive logits. Given positive logits of keys, the first two have the same sums
    over the columns of those keys besides. Classes go with "linear": r_i S_ij, which equals
    r_j S_ij, is subtracted for each pair of one class.
    """

    query: Tensor  # [n, D]
    key: Tensor | None  # [M, D]; None: the queries are the keys
    scale: Tensor  # 0-dim
    positive_logits: Tensor  # a, [n]
    weights: Tensor  # w, [n]
    bank: Tensor | None  # [B, D], further keys, which get no gradient
    key_positive_logits: Tensor | None  # [N], of the first N keys
    key_weights: Tensor | None  # [N]
    classes: Tensor | None  # [M], float numbers of the classes of all keys, the queries' among them
    attractions: Tensor | None  # r, [M], one value for all keys of a class
    form: str
    first: int  # the rank offset: query i's own key is first + i; -1: queries have no own key
    two_views: bool  # queries are two views of each example; the other view is left out too
    normalize: bool
    half: str  # "bfloat16" or "float16" if that holds all rows without rounding, else ""
    group: str  # the name of the process group over whose ranks columns are summed, or ""


class SoftPairs(NamedTuple):
    """Σ_i KL(softmax_j T_ij ‖ softmax_j S_ij), S of the student and T of the teacher as in `Pairs`.

    Rows are divided by their lengths.
    """

    query: Tensor  # [n, D], the student's
    key: Tensor | None  # [M, D]; None: the queries are the keys
    scale: Tensor  # 0-dim
    teacher_query: Tensor  # [n, D']
    teacher_key: Tensor | None  # [M, D']
    teacher_scale: Tensor  # 0-dim
    first: int  # key first + i is query i itself and left out; -1: none is
    half: str  # "bfloat16" or "float16" if that holds the student's rows without rounding, else ""
    teacher_half: str


class Half(NamedTuple):
    """matrix · factors are the rows, divided by their lengths if these are known."""

    matrix: Tensor  # [n, D]
    factors: Tensor  # [n]


def in_half(rows: Tensor, lengths: Tensor | None, half: str) -> Half:
    dtype = getattr(torch, half)
    if lengths is None:
        return Half(rows.to(dtype), rows.new_ones(len(rows)))
    if dtype == torch.bfloat16:
        return Half(rows.to(dtype), 1 / lengths[:, 0])
    # float16 does not bear any length; that of 0 may have any factor
    _, exponents = torch.frexp(lengths)
    factors = torch.ldexp(1 / lengths, exponents)[:, 0].clamp_(max=2)
    return Half(torch.ldexp(rows, -exponents).to(dtype), factors)


def units(rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Rows divided by their lengths, and these."""
    if not normalize:
        return rows, None
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=SHORTEST)
    return rows / lengths, lengths


def of_lengths(gradients: Tensor, rows: Tensor, lengths: Tensor | None) -> Tensor:
    """From gradients in the units `rows`, in place, those in what they were made of."""
    if lengths is None:
        return gradients
    along = torch.linalg.vecdot(gradients, rows)[:, None]
    # what is not longer is divided by a constant, and loses nothing
    along.mul_(lengths > SHORTEST)
    return gradients.addcmul_(rows, along, value=-1).div_(lengths)


def own_columns(problem: Pairs) -> slice:
    return slice(problem.first, problem.first + len(problem.query))


def penalty(problem: Pairs, log_sums: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The share of the loss of these rows, and the slopes in their log-sum-exps."""
    weights = problem.weights[rows].to(problem.query.dtype)
    return _of_form(
        problem.form, log_sums - problem.positive_logits[rows].to(problem.query.dtype), weights
    )


def column_penalty(problem: Pairs, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Of the own columns the share of the loss, of all of them the slopes."""
    assert problem.key_positive_logits is not None and problem.key_weights is not None
    weights, own = problem.key_weights.to(problem.query.dtype), own_columns(problem)
    odds = log_sums - problem.key_positive_logits.to(problem.query.dtype)
    _, slopes = _of_form(problem.form, odds, weights)
    return _of_form(problem.form, odds[own], weights[own])[0], slopes


def _of_form(form: str, odds: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    if form == "softplus":
        return F.softplus(odds, threshold=LINEAR) @ weights, odds.sigmoid() * weights
    return odds @ weights, weights.clone()


def over_ranks(log_sums: Tensor, group: str) -> Tensor:
    return _ranks.log_sum_exp(log_sums, group) if group else log_sums
