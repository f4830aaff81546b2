"""Distillation of language models from hidden states, whose logits are never whole in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import divergence as divergences
from fastkd._loss import Detailed, loss
from fastkd._op import Number
from fastkd._reduction import Term, selected
from fastkd.problems import linear, rows

_FORMULAS = {name: getattr(divergences, name).formula for name in rows.DIVERGENCES}
# what configurations call the cap of the logits
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# what they call the factor of the logits or of the hidden states, and whether they divide by it
_SCALES = {
    "logit_scale": False,
    "output_multiplier": False,
    "lm_head_multiplier": False,
    "logits_scaling": True,
    "logits_mup_width_multiplier": True,
}
_WITHOUT_LOGIT_SCALE = ("mpt",)  # whose model does not read its logit_scale
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)


@loss(
    linear.check,
    linear.linear_kd,
    per_example=True,
    same_on_ranks=("student_weight", "teacher_weight"),
    multiplies=True,
    of_examples=("teacher_logits", "teacher_weights"),
)
def linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor] | None = None,
    teacher_weight: Tensor | Sequence[Tensor] | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    teacher_logits: Tensor | Sequence[Tensor] | None = None,
    teacher_weights: Tensor | Sequence[float] | None = None,
    alpha: Number = 0.0,
    temperature: Number = 1.0,
    scale_t2: bool = True,
    divergence: str | Sequence[str] | Mapping[str, Number] = "forward_kl",
    beta: Number = 0.5,
    skew: Number = 0.1,
    weight: Number = 0.5,
    ignore_index: int = -100,
    num_valid: int | None = None,
    student_softcap: Number | None = None,
    teacher_softcap: Number | None = None,
    student_logit_scale: Number | None = None,
    teacher_logit_scale: Number | None = None,
    vocab: str | Tensor = "same",
    memory_budget: int | None = None,
    metrics: bool = False,
    return_parts: bool = False,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Any:
    """Compute α CE(q, labels) + (1 − α) T² D(p, q) of the logits that two heads make.

    A network's logits are z = softcap(scale · (W h + b)), with softcap(x) = c · tanh(x / c). They
    are made for a chunk of positions at a time, together with their gradient: no tensor has the
    size of all logits, nor do several teachers' logits lie in memory together. The cross-entropy is
    that of the student at T = 1. Gradients reach the student's hidden states, head and bias.

    Args:
        student_hidden: Hidden states of the student before its head, (..., H_s).
        student_weight: The student's head W, [V, H_s], as `lm_head.weight` is.
        teacher_hidden: Hidden states of the teacher, (..., H_t), of any width and dtype; or a
            sequence of them for several teachers, the mixture of whose probabilities is p.
        teacher_weight: The teacher's head, [V, H_t], or a sequence of heads.
        labels: Class indices of the positions, (...), integers in [0, V) or `ignore_index`. The
            positions with `ignore_index` count in neither term.
        student_bias, teacher_bias: b, [V]; a sequence, None for none, for several teachers.
        teacher_logits: Logits (..., V) in place of a teacher's hidden states and head, or a
            sequence of logits.
        teacher_weights: The shares of K teachers in the mixture, [K] or (..., K), at least 0, which
            are divided by their sum. Without them all teachers have the same share. They get no
            gradient.
        alpha: α in [0, 1], the share of the cross-entropy. A term of share 0 counts for nothing,
            even where it is infinite. Without a teacher it must be 1.
        temperature: T > 0, which divides both networks' logits in D.
        scale_t2: Whether D is multiplied by T².
        divergence: The name of D, any of the losses between logits but `logit_mse`; or several
            names, or a dict of names with their weights, whose weighted sum is D.
        beta: The option of D = "jensen_shannon".
        skew: The option of D = "skew_kl" and "skew_reverse_kl".
        weight: The option of D = "symmetric_kl".
        ignore_index: Positions with this label count in neither term.
        num_valid: An upper bound of the positions that count, where the collator knows it. On a GPU
            it saves the products of the others, which a CPU does not make anyway. If it is too
            small, the loss and its gradients are NaN there.
        student_softcap, teacher_softcap: c, as `final_logit_softcapping` of Gemma is; None for
            none.
        student_logit_scale, teacher_logit_scale: scale, as `logit_scale` of Cohere is; None for 1.
            `fastkd.head_options` reads both from a model's configuration.
        vocab: "same" for one vocabulary. Where one has more entries at its end, "common" for those
            that both have, renormalised, and "pad" for a probability of 0 of the missing ones. Or
            a tensor [K] of the entries to compare, renormalised, whose positions in it the labels
            are; beside a larger network one with K entries, a draft model, is taken as it is.
        memory_budget: Bytes that the logits of a chunk may take, 2²⁸ on a CPU and 2³⁰ elsewhere
            unless given.
        metrics: Whether to return further a dict of detached numbers of each position: the
            entropies of both networks at T = 1, whether their largest logits agree, the label's
            log-probability, and each divergence, without weights.
        return_parts: Whether to return (loss, CE, D), the parts without their shares and detached;
            with several divergences each of them.
        weights: One number or bool for each position, (...). A position of weight 0 contributes
            exactly 0 to loss and gradients, whatever it holds.
        normalizer: Replaces the divisor Σ weights of the mean, for example by the number of target
            tokens of a whole accumulated batch. A number or a tensor with one element.
        reduction: "mean" (Σ w·l / Σ w), "sum" (Σ w·l) or "none" (w·l), for which the backward
            makes the logits once more.

    Returns:
        A scalar or, with reduction "none", one loss for each position (...). With `return_parts`
        or `metrics` a tuple: the loss, its parts, the dict.

    Raises:
        TypeError: A tensor is none of floating-point numbers or the labels are no integers, a head
            is a DTensor, or an option has an unknown name.
        ValueError: The inputs do not fit together, the vocabularies differ, or an option is out of
            range.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
        Agarwal et al., On-Policy Distillation of Language Models, 2024. arXiv:2306.13649
    """
    hidden, *of_teachers = linear.teachers_of(
        teacher_hidden, teacher_weight, teacher_bias, teacher_logits
    )
    student_weight, student_bias, *of_teachers = linear.restricted(
        vocab, student_weight, student_bias, *of_teachers
    )
    labelled = None
    if labels is not None:
        labels = labels.long()  # −100 is 156 in uint8
        labelled = labels != ignore_index
        # before the product, because the gradient of the head is one with the hidden states
        student_hidden = selected(student_hidden, labelled)
    z = _logits(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    teachers = [
        x.to(z.dtype) for x in _teachers(hidden, of_teachers, teacher_logit_scale, teacher_softcap)
    ]
    if isinstance(vocab, str) and vocab == "pad":
        width = max(x.shape[-1] for x in (z, *teachers))
        z, *teachers = (_padded(x, width) for x in (z, *teachers))
    # 0 on the graph, so that a loss whose terms all have the share 0 has a gradient of 0
    cross_entropies = selected(z[..., 0], torch.zeros_like(z[..., 0], dtype=torch.bool))
    if labels is not None and labelled is not None:
        z = selected(z, labelled)
        classes = torch.where(labelled, labels, 0).unsqueeze(-1)
        cross_entropies = -z.log_softmax(-1).gather(-1, classes).squeeze(-1)
    parts, shares = {}, linear.shares_of(divergence)
    if teachers:
        teachers = [selected(x, labelled) for x in teachers]
        log_p = selected(_mixture(teachers, teacher_weights, temperature), labelled)
        for name in shares:
            own = dict(beta=beta, skew=skew, weight=weight)
            parts[name] = _FORMULAS[name](
                z, log_p, student_temperature=temperature, teacher_temperature=1.0,
                teacher_form="log_probabilities", temperature=1.0, scale_t2=False,
                **{option: own[option] for option in [rows.OPTIONS.get(name)] if option},
            ) * (temperature**2 if scale_t2 else 1.0)  # fmt: skip
    share = 1 - alpha
    terms = [Term(alpha, selected(cross_entropies, labelled), labelled)] + [
        # a tensor of 0 would not be known to be 0, and 0 · ∞ be NaN
        Term(
            0.0 if rows.is_exactly(share, 0) else share * shares[name],
            selected(x, labelled),
            labelled,
        )
        for name, x in parts.items()
    ]
    if not metrics:
        return Detailed(terms, None)
    details = {name: x.detach() for name, x in parts.items()}
    details["student_entropy"] = _entropy(z)
    if teachers:
        log_p = _mixture(teachers, teacher_weights, 1.0)
        details["teacher_entropy"] = _entropy(log_p)
        details["top1_agreement"] = (z.argmax(-1) == log_p.argmax(-1)).to(z.dtype)
    if labels is not None:
        details["label_log_probability"] = -cross_entropies.detach()
    return Detailed(terms, {name: selected(x, labelled) for name, x in details.items()})


def head_options(config: Any, network: str = "student") -> dict[str, float]:
    """Return the softcap and scale of a model's logits as options of `linear_kd`.

    Without them a loss from hidden states trains on other logits than the model's. Configurations
    of Hugging Face have them under several names: the softcap as `final_logit_softcapping` (Gemma),
    `logits_soft_cap` (RecurrentGemma) and `output_logit_soft_cap` (xLSTM), the scale as
    `logit_scale` (Cohere), `output_multiplier`, `lm_head_multiplier` (Falcon-H1),
    `logits_mup_width_multiplier` and `logits_scaling`, by which Granite divides and HyperCLOVA X
    multiplies. MiniCPM divides by `hidden_size / dim_model_base`.

    Args:
        config: The configuration, an object or a dict; one of a model of text and images may hold
            that of its text as `text_config`.
        network: "student" or "teacher", for which the options are named.

    Returns:
        A dict with `student_softcap` and `student_logit_scale`, or the teacher's, of those that the
        configuration has. The bias of a head is none of them: pass `lm_head.bias`.

    Raises:
        ValueError: The network has another name.
    """
    if network not in ("student", "teacher"):
        raise ValueError(f'network must be "student" or "teacher", got {network!r}')
    text = _entry(config, "text_config")
    config = config if text is None else text
    found, scale, kind = {}, 1.0, str(_entry(config, "model_type") or "")
    for name in _SOFTCAPS:
        softcap = _entry(config, name)
        if softcap:
            found[f"{network}_softcap"] = float(softcap)
    for name, divides in _SCALES.items():
        value = _entry(config, name)
        is_read = name != "logit_scale" or kind not in _WITHOUT_LOGIT_SCALE
        if value is not None and is_read:
            multiplies = name == "logits_scaling" and kind in _MULTIPLIES_BY_LOGITS_SCALING
            scale *= 1 / float(value) if divides and not multiplies else float(value)
    base = _entry(config, "dim_model_base")
    if base and kind.startswith("minicpm") and _entry(config, "logits_scaling") is None:
        scale *= float(base) / float(_entry(config, "hidden_size"))
    if scale != 1:
        found[f"{network}_logit_scale"] = scale
    return found


def _entry(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Number | None,
    softcap: Number | None,
) -> Tensor:
    """Return softcap(scale · (W h + b))."""
    z = hidden @ weight.t()
    z = z if bias is None else z + bias.to(z.dtype)
    z = z if scale is None else z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _teachers(hidden: Any, of_teachers: Sequence[Any], scale: Any, softcap: Any) -> list[Tensor]:
    """Return the constant logits of all teachers."""
    return [
        (_logits(h.to(weight.dtype), weight, bias, scale, softcap) if z is None else z).detach()
        for h, weight, bias, z in zip(hidden, *of_teachers, strict=True)
    ]


def _mixture(teachers: Sequence[Tensor], shares: Any, temperature: Number) -> Tensor:
    """Return the logarithms of the probabilities of all teachers together."""
    logs = [(x / temperature).log_softmax(-1) for x in teachers]
    if len(logs) == 1 and shares is None:
        return logs[0]
    if shares is None:
        shares = logs[0].new_full((len(logs),), 1 / len(logs))
    shares = torch.as_tensor(shares, dtype=logs[0].dtype, device=logs[0].device).detach().log()
    return torch.stack(logs, -1).add(shares.unsqueeze(-2)).logsumexp(-1)


def _padded(logits: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(logits, (0, width - logits.shape[-1]), value=-torch.inf)


def _entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.detach().softmax(-1)).sum(-1)
