"""Losses between models whose tokenizers, and therefore vocabularies, are not the same.

Both networks see the same text, cut into other tokens. `align` finds the groups of tokens that
cover the same bytes. `alm` compares how likely both find the text of a group; the other losses
compare distributions over the next token, at positions where both networks have read the same text:
`uld` without knowing what the entries of the vocabularies mean, `matched_kl` over the strings that
both have, `projected_kl` over the teacher's entries, to which a map takes the student's. The
teacher is a constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd import divergence as divergences
from fastkd._loss import loss
from fastkd._op import Number
from fastkd._precision import compute_dtype
from fastkd.problems import _vocabularies as vocabularies
from fastkd.problems import rows, sorted_rows

_FORMULAS = {name: getattr(divergences, name).formula for name in rows.DIVERGENCES}
_ALL_DIMENSIONS = 64  # more than a tensor has, so that every entry has a loss of its own


@loss(vocabularies.check_sorted, sorted_rows.uld, per_example=True, has_kernels=False)
def uld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Number = 1.0,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    teacher_form: str = "logits",
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute Σ_k |q_(k) − p_(k)| of sorted probabilities, universal logit distillation.

    q_(k) is the k-th largest probability of the student, p_(k) that of the teacher; the smaller
    vocabulary is padded with zeros. The gradient goes to the entry that has the k-th largest
    probability; where both are equal it is 0.

    The portable engine sorts a chunk of rows at a time and keeps a byte for each logit until the
    backward, in place of eight numbers.

        TRL GOLD    the same for each position, a mean over the positions of a sequence, and then
                    over the sequences; its default takes the logits at the tokens of an answer

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher for the same rows, (..., V'). They get no gradient.
        temperature: T > 0, which divides both networks' logits. A number or a 0-dim tensor.
        student_temperature, teacher_temperature: Replace T for one network.
        teacher_form, labels, ignore_index: As in `forward_kl`.
        weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...); float64 if an input is,
        else float32.

    Raises:
        TypeError: The logits are no floating-point tensors, or an option has an unknown name.
        ValueError: The rows do not fit together, or an option is out of range.

    Reference:
        Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss
        for LLMs, 2024. arXiv:2402.12030
    """
    of_each = rows.temperatures(temperature, student_temperature, teacher_temperature)
    both = student_logits, rows.as_logits(teacher_logits, teacher_form)
    width = max(x.shape[-1] for x in both)
    q, p = (
        (x / T).softmax(-1).sort(dim=-1, descending=True, stable=True).values
        for x, T in zip(both, of_each, strict=True)
    )
    q, p = (F.pad(x, (0, width - x.shape[-1])) for x in (q, p))
    return (q - p).abs().sum(-1)


@loss(vocabularies.check_matched, vocabularies.matched, per_example=True)
def matched_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    *,
    mass: str = "renormalized",
    divergence: str = "forward_kl",
    beta: Number = 0.5,
    skew: Number = 0.1,
    weight: Number = 0.5,
    temperature: Number = 1.0,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    teacher_form: str = "logits",
    scale_t2: bool = True,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² D(p, q) over the K strings that both vocabularies have.

    `mass` says what becomes of the probability of all other entries:

        "renormalized"    nothing: softmaxes over the K entries
        "tail"            one more entry for all of them, log Σ exp of their logits
        "raw"             it is missing: softmaxes over all entries, D summed over the K alone

    The tail is never larger than D of both distributions over all strings, and at least 0. A "raw"
    D is no divergence: it may be negative, and is smallest for students that move mass away from
    what is matched. It is its formula, without an engine.

        TRL GOLD, matched part     "raw", divergence "jensen_shannon", scale_t2=False; TRL clamps
                                   probabilities below 1e-8
        NeMo-RL, `gold_loss`       "raw", of the strings that match one to one

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher for the same rows, (..., V'). They get no gradient.
        student_ids: Entries of the student's vocabulary, [K], integers, each once.
        teacher_ids: Those of the teacher's with the same strings, [K], in the same order.
        mass: "renormalized", "tail" or "raw".
        divergence: The name of D, any of the divergences between logits but `logit_mse`.
        beta: The option of D = "jensen_shannon".
        skew: The option of D = "skew_kl" and "skew_reverse_kl".
        weight: The option of D = "symmetric_kl".
        temperature, student_temperature, teacher_temperature, teacher_form, scale_t2: As in
            `forward_kl`.
        labels, ignore_index, weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...); float64 if an input is,
        else float32.

    Raises:
        TypeError: The logits are no floating-point tensors or the ids no integers, or an option has
            an unknown name.
        ValueError: The rows or the ids do not fit together, an id does not exist or is repeated, or
            an option is out of range. On a GPU, where a look at the ids would be a host sync,
            nothing says that an id is repeated.

    Reference:
        Patiño et al., Unlocking On-Policy Distillation for Any Model Family (GOLD), 2025
    """
    of_each = rows.temperatures(temperature, student_temperature, teacher_temperature)
    both = (
        (student_logits, student_ids),
        (rows.as_logits(teacher_logits, teacher_form), teacher_ids),
    )
    t2 = of_each[0] * of_each[1] if scale_t2 else 1.0
    own = vocabularies.own_option(divergence, beta=beta, skew=skew, weight=weight)
    if mass == "tail":
        z, z_teacher = (
            vocabularies.with_tail(x, ids, T, x.dtype)
            for (x, ids), T in zip(both, of_each, strict=True)
        )
    else:
        softened = [x / T for (x, _), T in zip(both, of_each, strict=True)]
        if mass == "raw":
            softened = [x.log_softmax(-1) for x in softened]
        z, z_teacher = (x.index_select(-1, ids) for x, (_, ids) in zip(softened, both, strict=True))
    if mass == "raw":
        return t2 * _unnormalized(divergence, z, z_teacher, *own.values())
    return t2 * _FORMULAS[divergence](z, z_teacher, temperature=1.0, scale_t2=False, **own)


def _unnormalized(divergence: str, log_q: Tensor, log_p: Tensor, option: Number = 0.0) -> Tensor:
    """Return Σ d(log p, log q) of a divergence, of probabilities that need not sum to 1."""
    expectation, mixture = divergences._expectation, divergences._log_mixture
    divergence = rows.limit_of(divergence, option)
    q, p = log_q.exp(), log_p.exp()
    if divergence == "forward_kl":
        return expectation(p, log_p - log_q)
    if divergence == "reverse_kl":
        return expectation(q, log_q - log_p)
    if divergence == "soft_cross_entropy":
        return expectation(p, -log_q)
    if divergence == "total_variation":
        return 0.5 * (p - q).abs().sum(-1)
    if divergence == "symmetric_kl":
        reverse = expectation((1 - option) * q, log_q - log_p)
        return expectation(option * p, log_p - log_q) + reverse
    if divergence == "skew_reverse_kl":
        return expectation(q, log_q - mixture(p, q, 1 - option))
    log_m = mixture(p, q, option)
    if divergence == "skew_kl":
        return expectation(p, log_p - log_m)
    return option * expectation(p, log_p - log_m) + (1 - option) * expectation(q, log_q - log_m)


@loss(
    vocabularies.check_projected,
    vocabularies.projected,
    per_example=True,
    same_on_ranks=("ids", "shares"),
)
def projected_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    ids: Tensor,
    shares: Tensor | None = None,
    *,
    mass: str = "renormalized",
    divergence: str = "forward_kl",
    beta: Number = 0.5,
    skew: Number = 0.1,
    weight: Number = 0.5,
    temperature: Number = 1.0,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    teacher_form: str = "logits",
    scale_t2: bool = True,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² D(p, q̂) with q̂_u = Σ_v q_v share_vu, the student's mass at the teacher's entries.

    A sparse map takes each entry v of the student's vocabulary to at most k of the teacher's. The
    sum is made of logarithms, so that an entry to which very little mass comes keeps its digits.

        NeMo-RL "P-KL"    the same, cut to the entries that the teacher finds likeliest in the
                          batch, of means over the tokens of a group, with an epsilon in the
                          logarithm

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teacher_logits: Logits of the teacher for the same rows, (..., V'). They get no gradient.
        ids: Entries of the teacher's vocabulary for each of the student's, [V, k], integers; −1
            stands for no entry. The mass of a row without one is lost, and q̂ is renormalised.
        shares: The parts of the mass that go to them, [V, k], at least 0; each row is divided by
            its sum. All are equal without it. They get no gradient.
        mass: Which entries of the teacher count: "renormalized", those that the map reaches, with
            its softmax over them, or "full", all of them: the forward KL is then +∞ where the
            teacher allows what the map does not reach.
        divergence: The name of D, any of the divergences between logits but `logit_mse`.
        beta: The option of D = "jensen_shannon".
        skew: The option of D = "skew_kl" and "skew_reverse_kl".
        weight: The option of D = "symmetric_kl".
        temperature, student_temperature, teacher_temperature, teacher_form, scale_t2: As in
            `forward_kl`.
        labels, ignore_index, weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...); float64 if an input is,
        else float32.

    Raises:
        TypeError: The logits are no floating-point tensors or the ids no integers, or an option has
            an unknown name.
        ValueError: The rows or the map do not fit together, an id does not exist, or an option is
            out of range.

    Reference:
        Sreenivas et al., X-Token: Projection-Guided Cross-Tokenizer Knowledge Distillation, 2026.
        arXiv:2605.21699
    """
    of_student, of_teacher = rows.temperatures(
        temperature, student_temperature, teacher_temperature
    )
    n_entries, log_q = teacher_logits.shape[-1], (student_logits / of_student).log_softmax(-1)
    log_p = rows.as_logits(teacher_logits, teacher_form) / of_teacher
    log_shares = vocabularies.log_of_shares(ids, shares, log_q.dtype)
    projected = vocabularies.project(log_q, ids, log_shares, n_entries)
    if mass == "renormalized":
        is_reached = vocabularies.is_reached(ids, log_shares, n_entries)
        log_p = log_p.masked_fill(~is_reached, -torch.inf)
    own = vocabularies.own_option(divergence, beta=beta, skew=skew, weight=weight)
    t2 = of_student * of_teacher if scale_t2 else 1.0
    return t2 * _FORMULAS[divergence](projected, log_p, temperature=1.0, scale_t2=False, **own)


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
