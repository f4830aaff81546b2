"""Distillation from several teachers: of their probabilities, of their logits, or of each by rows.

Losses of features and relations of several teachers are sums of their losses: see the recipes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd import divergence as divergences
from fastkd._loss import loss
from fastkd._op import Number
from fastkd._precision import compute_dtype
from fastkd.problems import _temperatures, ensembles, rows

_FORMULAS = {name: getattr(divergences, name).formula for name in rows.DIVERGENCES}
_SCORES = ("cross_entropy", "entropy", "max_probability")


@loss(ensembles.check, ensembles.multi_teacher, per_example=True, of_examples=("teacher_weights",))
def multi_teacher(
    student_logits: Tensor,
    teachers: Sequence[Tensor],
    *,
    teacher_weights: Tensor | Sequence[float] | None = None,
    combine: str = "mixture",
    teacher_index: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: Number = 0.5,
    skew: Number = 0.1,
    weight: Number = 0.5,
    temperature: Number = 1.0,
    student_temperature: Number | None = None,
    teacher_temperature: Number | None = None,
    scale_t2: bool = True,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute T² D(p̄, q) of what K teachers say together, p̄ = Σ_k w_k p_k.

    `combine` says how the teachers t_k, with p_k = softmax(t_k / T), are put together:

        "mixture"  T² D(Σ w_k p_k, q): the student learns what the teachers say on average
        "logits"   T² D(softmax(Σ w_k t_k / T), q): the normalised product of their powers, small
                   wherever one of them is
        "sum"      T² Σ w_k D(p_k, q): the sum of the losses of each

    The mean over teachers of the forward KL has the gradient of that of the mixture, Σ w_k KL(p_k ‖
    q) = KL(p̄ ‖ q) + Σ w_k KL(p_k ‖ p̄), and the mean of the reverse KL that of the averaged logits:
    those of "sum" are their values, at the price of K losses.

    Args:
        student_logits: Logits of the student, (..., V), unnormalised.
        teachers: A list or tuple of the logits of K teachers, each of the same shape and of any
            dtype. They get no gradient.
        teacher_weights: w, [K] or (..., K), at least 0, 1/K without them. In a mixture they are
            divided by their sum. In "logits" and "sum" they are used as given: a sum of them other
            than 1 sharpens the logits or multiplies the loss. A teacher of weight 0 counts for
            nothing. They get no gradient; `teacher_weights` makes some from how sure a teacher is.
        combine: "mixture", "logits" or "sum".
        teacher_index: (...), integers in [0, K): the one teacher that a row learns from, in place
            of weights. No row of another teacher is read.
        divergence: The name of D, any of the losses between logits but `logit_mse`.
        beta: The option of D = "jensen_shannon".
        skew: The option of D = "skew_kl" and "skew_reverse_kl".
        weight: The option of D = "symmetric_kl".
        temperature: T > 0, which divides all networks' logits. One number for all rows, or a 0-dim
            tensor, which gets no gradient.
        student_temperature, teacher_temperature: Replace T for the student and for all teachers.
        scale_t2: As in `forward_kl`.
        labels, ignore_index, weights, normalizer, reduction: As in `forward_kl`.

    Returns:
        A scalar or, with reduction "none", one loss for each row (...).

    Raises:
        TypeError: The logits are no floating-point tensors or the teachers no list of them, or an
            option has an unknown name.
        ValueError: The logits do not fit together, an index does not exist, or an option is out of
            range. On a GPU, where a look at the indices would be a host sync, one that does not
            exist gives a NaN instead.

    Reference:
        You et al., Learning from Multiple Teacher Networks, 2017.
        Fukuda et al., Efficient Knowledge Distillation from an Ensemble of Teachers, 2017.
    """
    of_student, of_teacher = _temperatures.of_both(
        temperature, student_temperature, teacher_temperature
    )
    options = dict(beta=beta, skew=skew, weight=weight)
    own = {name: options[name] for name in [rows.OPTIONS.get(divergence)] if name}
    scale = of_student * of_teacher if scale_t2 else 1.0

    def distance(teacher: Tensor, form: str = "logits") -> Tensor:
        return scale * _FORMULAS[divergence](
            student_logits, teacher, student_temperature=of_student, temperature=1.0,
            teacher_temperature=of_teacher if form == "logits" else 1.0, teacher_form=form,
            scale_t2=False, **own,
        )  # fmt: skip

    if teacher_index is not None:
        teacher = torch.full_like(student_logits.detach(), torch.nan)
        for k, logits in enumerate(teachers):
            teacher = torch.where((teacher_index == k).unsqueeze(-1), logits, teacher)
        return distance(teacher)
    given = ensembles.of_each_row(
        teacher_weights, len(teachers), student_logits, student_logits.dtype
    )
    if given is None:
        given = student_logits.new_full((), 1 / len(teachers)).expand(
            *student_logits.shape[:-1], len(teachers)
        )
    shares = given.to(student_logits.dtype).unbind(-1)
    pairs = list(zip(shares, teachers, strict=True))
    if combine == "sum":
        # a teacher of weight 0 may be infinitely far, whose gradient times 0 would be NaN
        near = student_logits.detach()
        return _weighted(
            [(w, distance(torch.where((w == 0).unsqueeze(-1), near, x))) for w, x in pairs]
        )
    if combine == "logits":
        return distance(_weighted([(w.unsqueeze(-1), logits) for w, logits in pairs]))
    logs = [(t / of_teacher).log_softmax(-1) + w.log().unsqueeze(-1) for w, t in pairs]
    return distance(torch.stack(logs).logsumexp(0), "log_probabilities")


def _weighted(terms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return Σ w · x, to which a weight of 0 adds nothing, even where x is infinite."""
    total: Any = 0
    for w, x in terms:
        total = total + torch.where(w == 0, 0, w * x)
    return total


@torch.no_grad()
def teacher_weights(
    teachers: Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    by: str = "cross_entropy",
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Return weights of teachers in each row, the more the surer or the more right one is.

    They are softmax_k(s_k / temperature) of scores s_k of each teacher in each row: minus its
    cross-entropy with the label, minus its entropy, or its largest probability.

    Args:
        teachers: A list or tuple of the logits of K teachers, (..., V).
        labels: Class indices of the rows, (...), integers in [0, V) or `ignore_index`, which "by"
            a cross-entropy needs. A row with `ignore_index` gives all teachers the same weight.
        by: "cross_entropy", "entropy" or "max_probability".
        temperature: What the scores are divided by, above 0; a small one chooses the best teacher.
        ignore_index: The label of rows without one.

    Returns:
        Weights (..., K) for `multi_teacher` and `linear_kd`, which add up to 1 in each row.

    Raises:
        TypeError: The logits are no floating-point tensors, or the labels no integers.
        ValueError: The logits do not fit together, labels are missing, or an option is unknown.

    Reference:
        Zhang et al., Confidence-Aware Multi-Teacher Knowledge Distillation, 2022. arXiv:2201.00007
    """
    ensembles.check_teachers(teachers)
    first = teachers[0]
    for teacher in teachers:
        _checks.logits(first, teacher)
    _option_checks.one_of(_SCORES, by=by)
    _option_checks.temperature(temperature)
    if by == "cross_entropy":
        if labels is None:
            raise ValueError('by="cross_entropy" needs labels: pass them, or by="entropy"')
        _checks.labels(labels, first, ignore_index)
    dtype, scores = compute_dtype(*teachers), []
    for teacher in teachers:
        z = teacher.to(dtype)
        if by == "max_probability":
            scores.append(z.softmax(-1).amax(-1))
        elif by == "entropy":
            scores.append(-torch.special.entr(z.softmax(-1)).sum(-1))
        else:
            assert labels is not None
            flat = z.reshape(-1, z.shape[-1]), labels.reshape(-1).long()
            losses = F.cross_entropy(*flat, ignore_index=ignore_index, reduction="none")
            scores.append(-losses.view(labels.shape))
    return (torch.stack(scores, -1) / temperature).softmax(-1)
