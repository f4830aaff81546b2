"""Losses between models whose tokenizers, and therefore vocabularies, are not the same.

Both networks see the same text, cut into other tokens. These losses compare distributions over the
next token, at positions where both have read the same text, which `align` finds: `uld` without
knowing what the entries of the vocabularies mean, `matched_kl` over the strings that both have,
`projected_kl` over the teacher's entries, to which a map takes the student's. `alm`, of how likely
both find a text, needs no common positions. The teacher is a constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import divergence as divergences
from fastkd._loss import loss
from fastkd._op import Number
from fastkd.problems import _temperatures, rows, sorted_rows
from fastkd.problems import _vocabularies as vocabularies

_FORMULAS = {name: getattr(divergences, name).formula for name in rows.DIVERGENCES}


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

    The portable engine sorts a chunk of rows at a time. It keeps the gradient alone until the
    backward, in place of eight numbers for each logit; or a byte, if the losses are weighted,
    masked or not reduced, because then the gradient is made in the backward.

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
    of_each = _temperatures.of_both(temperature, student_temperature, teacher_temperature)
    both = student_logits, rows.as_logits(teacher_logits, teacher_form)
    width = max(x.shape[-1] for x in both)
    q, p = (
        (x / T).softmax(-1).sort(dim=-1, descending=True, stable=True).values
        for x, T in zip(both, of_each, strict=True)
    )
    q, p = (F.pad(x, (0, width - x.shape[-1])) for x in (q, p))
    return rows.absolute(q - p).sum(-1)


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
    of_each = _temperatures.of_both(temperature, student_temperature, teacher_temperature)
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
    of_student, of_teacher = _temperatures.of_both(
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
