"""The loss of how likely two models find the same pieces of a text, whatever their tokenizers.

`align` finds the groups of tokens that cover the same bytes, `sum_by_group` has how likely a model
finds the text of each, and `alm` compares both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd import divergence as divergences
from fastkd._loss import loss
from fastkd._op import Number
from fastkd._precision import compute_dtype
from fastkd.problems import _vocabularies as vocabularies
from fastkd.problems import rows

_FORMULAS = {name: getattr(divergences, name).formula for name in rows.DIVERGENCES}
_ALL_DIMENSIONS = 64  # more than a tensor has, so that every entry has a loss of its own


def _check_likelihoods(
    student: Tensor, teacher: Tensor, *, temperature: Number, divergence: str
) -> None:
    for name, x in (("student_logprobs", student), ("teacher_logprobs", teacher)):
        needed = "a tensor (..., C), the log-probability of each group"
        padded = "them padded to one number of groups, with weights of 0 for those that are not"
        _checks.floats(name, x, needed, "log-probabilities", padded)
        if not x.ndim:
            raise ValueError(f"{name} needs the shape (..., C), C groups, got a number")
    if student.shape != teacher.shape:
        raise ValueError(
            "student_logprobs and teacher_logprobs need one shape, that of the groups, got "
            f"{_checks.shape(student)} and {_checks.shape(teacher)}: add up those of the tokens by "
            "fastkd.sum_by_group"
        )
    _checks.same_device(student_logprobs=student, teacher_logprobs=teacher)
    _checks.constant_teacher(teacher_logprobs=teacher)
    for name, x in (("student_logprobs", student), ("teacher_logprobs", teacher)):
        if _checks.has_values_at_hand(x) and x.numel() and x.detach().max().item() > 1e-2:
            raise ValueError(
                f"{name} must be logarithms of probabilities, at most 0, got "
                f"{x.detach().max().item():g}: take .log_softmax(-1) of logits"
            )
    _option_checks.temperature(temperature)
    _option_checks.one_of(("kl", "tv"), divergence=divergence)


@loss(_check_likelihoods, per_example=_ALL_DIMENSIONS)
def alm(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    temperature: Number = 100.0,
    divergence: str = "kl",
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute f(p, q) + f(1 − p, 1 − q) of the likelihoods of groups of tokens.

        p = P_teacher(group)^(1/τ)    q = P_student(group)^(1/τ)    τ = `temperature`

    f(p, q) is p log(p / q) with "kl", ½ |p − q| with "tv". A group is a piece of the text that both
    tokenizers cut at its ends: `align` finds them, and `sum_by_group` adds up the log-probabilities
    of its tokens. Nothing but the log-probabilities of the text is needed from the teacher.

    1 − p is made from the logarithm, so that its digits are kept where p is nearly 1. A
    log-probability that is nearer to 0 than the smallest number that makes a difference to 1 counts
    as that, because otherwise rounding would make the loss and its gradient infinite. The gradient
    is finite for likelihoods of 0 too; "kl" is +∞ where the student excludes what the teacher has.

        tokenkit "binary_ce"    "kl" plus the entropy of (p, 1 − p); it subtracts 1e-6 from both
                                logarithms
        tokenkit "abs_exp"      "tv"

    Args:
        student_logprobs: Logarithms of the student's likelihoods of the groups, (..., C).
        teacher_logprobs: Those of the teacher, the same shape. They get no gradient.
        temperature: τ > 0; a likelihood of 0.01 becomes 0.95 by the default, so that unlikely text
            counts too.
        divergence: "kl" or "tv".
        weights: One number or bool for each group, (..., C). A group of weight 0 contributes
            exactly 0 to loss and gradient, whatever it holds.
        normalizer, reduction: Those of `forward_kl`, with a group in place of a row.

    Returns:
        A scalar or, with reduction "none", one loss for each group (..., C); float64 if an input
        is, else float32.

    Raises:
        TypeError: The likelihoods are no floating-point tensors, or an option has an unknown name.
        ValueError: The likelihoods do not fit together or are above 1, or an option is out of
            range.

    Reference:
        Minixhofer et al., Cross-Tokenizer Distillation via Approximate Likelihood Matching, 2025.
        arXiv:2503.20083
    """
    log_q, log_p = (_below_0(x / temperature) for x in (student_logprobs, teacher_logprobs))
    if divergence == "tv":
        largest = torch.maximum(log_q, log_p)
        gap = torch.where(log_q == log_p, 0, (log_q - log_p).abs())  # −∞ − −∞ is no number
        return -largest.exp() * torch.expm1(-gap)
    p, log_ratio = log_p.exp(), log_p - log_q
    losses = torch.where(p == 0, 0, p * log_ratio)
    losses = losses - torch.expm1(log_p) * (_log1mexp(log_p) - _log1mexp(log_q))
    # the terms cancel where the networks agree, and a divergence below 0 is rounding
    return torch.where(losses < 0, losses - losses.detach(), losses)


def _below_0(log_probability: Tensor) -> Tensor:
    """Return it at a distance from 0 that makes a difference to 1, with a gradient everywhere."""
    least = -torch.finfo(log_probability.dtype).eps
    clamped = log_probability.detach().clamp(max=least)
    return torch.where(
        log_probability > least,
        log_probability - log_probability.detach() + clamped,
        log_probability,
    )


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − eˣ) of x < 0, without subtracting numbers that are nearly equal."""
    is_near_0 = x > -0.6931471805599453  # −log 2, where eˣ is a half
    near, far = torch.where(is_near_0, x, -1), torch.where(is_near_0, -1, x)
    return torch.where(is_near_0, (-torch.expm1(near)).log(), torch.log1p(-far.exp()))


def sum_by_group(values: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """Return the sums of the values of each group, for example of log-probabilities of tokens.

    They are in the compute dtype, and the gradient comes back in that of the values. Two runs agree
    bit for bit.

    Args:
        values: A number for each token, (..., L).
        groups: The group of each token, (..., L), integers in [0, n_groups); a token of no group
            has a negative one. `group_tensors` makes them.
        n_groups: C, how many groups there are.

    Returns:
        The sums (..., C), 0 for a group without a token.

    Raises:
        TypeError: The values are no floating-point tensor or the groups no integers.
        ValueError: The shapes differ, or a group is none of the n_groups.
    """
    _checks.floats(
        "values", values, "a tensor (..., L)", "numbers", "them padded, with groups of −1"
    )
    if not isinstance(groups, Tensor) or groups.dtype not in (torch.int32, torch.int64):
        got = str(groups.dtype) if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(f"groups must be a tensor of integers (torch.int64), got {got}")
    if not values.ndim or values.shape != groups.shape:
        raise ValueError(
            "values and groups need one shape (..., L), a group for each token, got "
            f"{_checks.shape(values)} and {_checks.shape(groups)}"
        )
    _checks.same_device(values=values, groups=groups)
    if not isinstance(n_groups, int) or n_groups < 0:
        raise ValueError(f"n_groups must be a whole number of at least 0, got {n_groups!r}")
    if _checks.has_values_at_hand(groups) and groups.numel():
        highest = int(groups.max().item())
        if highest >= n_groups:
            raise ValueError(
                f"groups must lie below n_groups={n_groups}, got {highest}: n_groups is the number "
                "of groups of the sequence that has most of them"
            )
    n_rows, values = values.shape[:-1].numel(), values.to(compute_dtype(values))
    # tokens of no group go to one more group, which is cut off
    index = torch.where(groups < 0, n_groups, groups.long()).reshape(n_rows, groups.shape[-1])
    index = index + (n_groups + 1) * torch.arange(n_rows, device=groups.device)[:, None]
    total = values.new_zeros(n_rows * (n_groups + 1))
    vocabularies.add_at(total, index.flatten(), values.reshape(-1))
    return total.view(*groups.shape[:-1], n_groups + 1)[..., :n_groups]
