"""Losses between the logits of a student and of a teacher.

With p = softmax(teacher_logits / T) and q = softmax(student_logits / T), logits of shape (..., V)
give one loss for each row (...). `scale_t2` multiplies it by T², which keeps the size of the
gradient when T changes [1]. `weights` has one number or bool for each row, `normalizer` replaces
the divisor of the mean, `reduction` is "mean" (for [N, V] torch's "batchmean"), "sum" or "none".
The teacher is a constant. Logits of −∞ in both are a masked vocabulary: they count for nothing.

[1] Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _checks
from fastkd._backend import choose, is_plain_on_cpu
from fastkd._engine import Engine, _module, compute_dtype
from fastkd._loss import kept, known_divisor, loss, reduce, rows

Number = float | Tensor


class Problem(NamedTuple):
    """The arguments that every function of an engine of this family takes."""

    student: Tensor  # (..., V)
    teacher: Tensor  # (..., V)
    labels: Tensor | None  # (...), negative: no label
    offset: Tensor | None  # (V), subtracted from the teacher's logits
    keep: Tensor | None  # (...), rows that count in the divergence
    student_temperature: Number
    teacher_temperature: Number
    weight: Number
    scale: Number
    divergence: str

    @property
    def n_rows(self) -> int:
        return self.student.shape[:-1].numel()

    def allocate(self, n_statistics: int) -> tuple[Tensor, Tensor, Tensor]:
        """Empty rows of divergence, rows of cross-entropy (0 long without labels), statistics."""
        dtype = compute_dtype(self.student, self.teacher)
        examples = self.student.shape[:-1]
        return (
            self.student.new_empty(examples, dtype=dtype),
            self.student.new_empty(
                examples if self.labels is not None else (*examples, 0), dtype=dtype
            ),
            self.student.new_empty((*examples, n_statistics), dtype=dtype),
        )


_engine = Engine(
    "divergence",
    tensors="Tensor student, Tensor teacher, Tensor? labels, Tensor? offset, Tensor? keep",
    scalars="student_temperature, teacher_temperature, weight, scale",
    options="str divergence",
    rowwise=("student", "teacher", "labels", "keep"),
    n_losses=2,
)


# the ends of the mixtures are losses of their own
_ENDS: dict[tuple[str, float], str] = {
    ("jensen_shannon", 0): "forward_kl",
    ("jensen_shannon", 1): "reverse_kl",
    ("skew_kl", 0): "forward_kl",
    ("skew_reverse_kl", 0): "reverse_kl",
    ("symmetric_kl", 0): "reverse_kl",
    ("symmetric_kl", 1): "forward_kl",
}


def _is(option: Number, end: int) -> bool:
    """A tensor is not looked at: on a GPU that would wait for it."""
    return not isinstance(option, Tensor) and option == end


def _mixture_and_name(divergence: str, weight: dict[str, float]) -> tuple[float, str]:
    mixture = next(iter(weight.values()), 0.0)
    if _is(mixture, 0) or _is(mixture, 1):  # a look-up alone would make torch.compile burn it in
        divergence = _ENDS.get((divergence, mixture), divergence)
    return mixture, divergence


def _fused(
    divergence: str,
    engine: str,
    student: Tensor,
    teacher: Tensor,
    keep: Tensor | None,
    *,
    temperature: float,
    scale_t2: bool,
    labels: Tensor | None = None,
    **weight: float,
) -> Any:
    mixture, divergence = _mixture_and_name(divergence, weight)
    scale = temperature**2 if scale_t2 else 1.0
    losses, cross_entropies, _ = _engine(
        engine, student, teacher, labels, None, keep,
        temperature, temperature, mixture, scale, divergence,
    )  # fmt: skip
    return losses if labels is None else (losses, cross_entropies)


def _shortcut(
    divergence: str,
    student: Tensor,
    teacher: Tensor,
    keep: Tensor | None,
    divisor: float | None,
    *,
    temperature: float,
    scale_t2: bool,
    labels: Tensor | None = None,
    alpha: float = 0.0,
    **weight: float,
) -> Any:
    """For few logits; with labels and a divisor the sum of α CE + (1 − α) D."""
    if not is_plain_on_cpu(student, teacher):
        return None
    small = _module("divergence", "portable")._small_divergence
    mixture, divergence = _mixture_and_name(divergence, weight)
    if not small.suits(student, temperature, mixture):
        return None
    scale, ce_scale = temperature**2 if scale_t2 else 1.0, 1.0
    if divisor is not None:
        scale, ce_scale = (1 - alpha) * scale / divisor, alpha / divisor
    arguments = small.Arguments(
        teacher, labels, keep, float(temperature), float(mixture), scale, ce_scale, divergence,
        is_summed=divisor is not None,
    )  # fmt: skip
    losses = small.losses(student, arguments)
    return losses if losses is None or len(losses) == 2 else losses[0]


def _check(
    student: Tensor, teacher: Tensor, *, temperature: float, scale_t2: bool, **fraction: float
) -> None:
    _checks.logits(student, teacher)
    _checks.temperature(temperature)
    _checks.fraction(**fraction)


def _log_softmaxes(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """Σ p·x over the classes, where p = 0 wins over an infinite x."""
    return (p * torch.where(p == 0, 0, x)).sum(-1)


def _log_mixture(p: Tensor, q: Tensor, weight: float) -> Tensor:
    """log(weight·p + (1 − weight)·q), finite where both vanish."""
    return (weight * p + (1 - weight) * q).clamp(min=torch.finfo(p.dtype).tiny).log()


def _scaled(losses: Tensor, temperature: float, scale_t2: bool) -> Tensor:
    return temperature**2 * losses if scale_t2 else losses


@loss(_check, _fused, shortcut=_shortcut)
def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    scale_t2: bool = True,
) -> Tensor:
    """T² KL(p ‖ q) = T² Σ p (log p − log q): the student covers every mode of the teacher.

    Shapes: logits (..., V), weights (...). +∞ where the student excludes what the teacher allows.
    Raises TypeError or ValueError for logits that do not fit together and options out of range.
    Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
    """
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits, temperature)
    return _scaled(_expectation(log_p.exp(), log_p - log_q), temperature, scale_t2)


@loss(_check, _fused, shortcut=_shortcut)
def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    scale_t2: bool = True,
) -> Tensor:
    """T² KL(q ‖ p) = T² Σ q (log q − log p): the student may drop what it cannot model.

    Shapes: logits (..., V), weights (...). +∞ where the teacher excludes what the student allows.
    Raises TypeError or ValueError for logits that do not fit together and options out of range.
    Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2024. arXiv:2306.08543
    """
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits, temperature)
    return _scaled(_expectation(log_q.exp(), log_q - log_p), temperature, scale_t2)


@loss(_check, _fused, shortcut=_shortcut)
def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_t2: bool = True,
) -> Tensor:
    """T² [β KL(p ‖ m) + (1 − β) KL(q ‖ m)] with m = β p + (1 − β) q: bounded and always finite.

    β in [0, 1]; by convention exactly 0 is the forward KL and exactly 1 the reverse KL (the limits
    of the formula are 0). Shapes: logits (..., V), weights (...).
    Raises TypeError or ValueError for logits that do not fit together and options out of range.
    Agarwal et al., On-Policy Distillation of Language Models, 2024. arXiv:2306.13649
    """
    if _is(beta, 0) or _is(beta, 1):
        kl = reverse_kl if beta else forward_kl
        return kl.formula(
            student_logits, teacher_logits, temperature=temperature, scale_t2=scale_t2
        )
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits, temperature)
    q, p = log_q.exp(), log_p.exp()
    log_m = _log_mixture(p, q, beta)
    divergence = beta * _expectation(p, log_p - log_m) + (1 - beta) * _expectation(q, log_q - log_m)
    return _scaled(divergence, temperature, scale_t2)


@loss(_check, _fused, shortcut=_shortcut)
def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    temperature: float = 1.0,
    scale_t2: bool = True,
) -> Tensor:
    """T² KL(p ‖ α p + (1 − α) q) with α = `skew`: a forward KL with bounded gradients.

    α in [0, 1]; 0 is the forward KL. Shapes: logits (..., V), weights (...).
    Raises TypeError or ValueError for logits that do not fit together and options out of range.
    Ko et al., DistiLLM: Towards Streamlined Distillation, 2024. arXiv:2402.03898
    """
    if _is(skew, 0):
        return forward_kl.formula(
            student_logits, teacher_logits, temperature=temperature, scale_t2=scale_t2
        )
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits, temperature)
    p = log_p.exp()
    log_m = _log_mixture(p, log_q.exp(), skew)
    return _scaled(_expectation(p, log_p - log_m), temperature, scale_t2)


@loss(_check, _fused, shortcut=_shortcut)
def skew_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    temperature: float = 1.0,
    scale_t2: bool = True,
) -> Tensor:
    """T² KL(q ‖ (1 − α) p + α q) with α = `skew`: a reverse KL that is always finite for α > 0.

    α in [0, 1]; 0 is the reverse KL. Shapes: logits (..., V), weights (...).
    Raises TypeError or ValueError for logits that do not fit together and options out of range.
    Ko et al., DistiLLM: Towards Streamlined Distillation, 2024. arXiv:2402.03898
    """
    if _is(skew, 0):
        return reverse_kl.formula(
            student_logits, teacher_logits, temperature=temperature, scale_t2=scale_t2
        )
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits, temperature)
    q = log_q.exp()
    log_m = _log_mixture(log_p.exp(), q, 1 - skew)
    return _scaled(_expectation(q, log_q - log_m), temperature, scale_t2)


@loss(_check, _fused, shortcut=_shortcut)
def symmetric_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    weight: float = 0.5,
    temperature: float = 1.0,
    scale_t2: bool = True,
) -> Tensor:
    """T² [w KL(p ‖ q) + (1 − w) KL(q ‖ p)] with w = `weight` in [0, 1].

    Shapes: logits (..., V), weights (...). w = ½ is half of Jeffreys' divergence.
    Raises TypeError or ValueError for logits that do not fit together and options out of range.
    Jeffreys, An Invariant Form for the Prior Probability in Estimation Problems, 1946
    """
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits, temperature)
    q, p = log_q.exp(), log_p.exp()
    # weighted inside, so that a weight of exactly 0 leaves out even what is infinite
    forward = _expectation(weight * p, log_p - log_q)
    reverse = _expectation((1 - weight) * q, log_q - log_p)
    return _scaled(forward + reverse, temperature, scale_t2)


@loss(_check, _fused, shortcut=_shortcut)
def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    scale_t2: bool = True,
) -> Tensor:
    """T² ½ Σ |p − q|: the mass that must move to make the student the teacher.

    Shapes: logits (..., V), weights (...). The gradient is 0 at classes where p = q.
    Raises TypeError or ValueError for logits that do not fit together and options out of range.
    Wen et al., f-Divergence Minimization for Knowledge Distillation, 2023. arXiv:2307.15190
    """
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits, temperature)
    return _scaled(0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1), temperature, scale_t2)


@loss(_check, _fused, shortcut=_shortcut)
def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    scale_t2: bool = True,
) -> Tensor:
    """−T² Σ p log q: the forward KL plus the teacher's entropy, with the same gradient.

    Shapes: logits (..., V), weights (...). What several frameworks call their "KL" loss.
    Raises TypeError or ValueError for logits that do not fit together and options out of range.
    Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
    """
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits, temperature)
    return _scaled(_expectation(log_p.exp(), -log_q), temperature, scale_t2)


_MEAN = 1  # how the function below F.mse_loss, which checks all again, calls the reduction


def _mse_shortcut(
    _: str,
    student: Tensor,
    teacher: Tensor,
    keep: Tensor | None,
    divisor: float | None,
    *,
    temperature: float,
    scale_t2: bool,
) -> Tensor | None:
    """PyTorch's own mean of all, where a look at it costs nothing; not of infinities."""
    if divisor is None or not is_plain_on_cpu(student, teacher) or isinstance(temperature, Tensor):
        return None
    if student.dtype != torch.float32 or teacher.dtype != torch.float32:
        dtype = compute_dtype(student, teacher)
        student, teacher = student.to(dtype), teacher.to(dtype)
    loss = torch._C._nn.mse_loss(student, teacher.detach(), _MEAN)  # type: ignore[arg-type]
    if not math.isfinite(loss.item()):
        return None
    scale = student.shape[:-1].numel() / divisor
    if not scale_t2:
        scale = scale / temperature**2
    return loss if scale == 1 else loss * scale


@loss(_check, shortcut=_mse_shortcut)
def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    scale_t2: bool = True,
) -> Tensor:
    """T² (1/V) Σ ((z_s − z_t) / T)² over the V logits; with `scale_t2` the T cancels.

    Shapes: logits (..., V), weights (...). Unlike a softmax, it also ties the logits' offset.
    Raises TypeError or ValueError for logits that do not fit together and options out of range.
    Ba and Caruana, Do Deep Nets Really Need to be Deep?, 2014. arXiv:1312.6184
    """
    lowest = torch.finfo(student_logits.dtype).min  # −∞ in both is no difference
    student, teacher = student_logits.clamp(min=lowest), teacher_logits.clamp(min=lowest)
    losses = F.mse_loss(student, teacher, reduction="none").mean(-1)
    return losses if scale_t2 else losses / temperature**2


_DIVERGENCES = {
    f.__name__: f
    for f in (
        forward_kl, reverse_kl, jensen_shannon, skew_kl, skew_reverse_kl, symmetric_kl,
        total_variation, soft_cross_entropy,
    )
}  # fmt: skip
_OPTION = {
    "jensen_shannon": "beta",
    "skew_kl": "skew",
    "skew_reverse_kl": "skew",
    "symmetric_kl": "weight",
}


def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 4.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    weight: float = 0.5,
    scale_t2: bool = True,
    ignore_index: int = -100,
    distill_ignored: bool = False,
    return_parts: bool = False,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Any:
    """α CE(q at T = 1, labels) + (1 − α) T² D(p, q): vanilla knowledge distillation.

    `divergence` names D, whose own option is `beta`, `skew` or `weight`. Shapes: logits (..., V),
    labels and weights (...). Rows labelled `ignore_index` count in neither term; `distill_ignored`
    keeps them in D, for unlabelled examples: CE is then averaged over the labelled rows, D over
    all. `return_parts` gives (loss, CE, D), the parts without α.
    Raises TypeError or ValueError for inputs that do not fit together and options out of range.
    Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
    """
    if not isinstance(divergence, str) or divergence not in _DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(_DIVERGENCES)}, got {divergence!r}")
    option = _OPTION.get(divergence)
    own = {option: dict(beta=beta, skew=skew, weight=weight)[option]} if option else {}
    options: dict[str, Any] = dict(temperature=temperature, scale_t2=scale_t2, **own)
    _checks.reduction(reduction, normalizer)
    _checks.fraction(alpha=alpha)
    _check(student_logits, teacher_logits, **options)
    complete = _checks.labels(labels, student_logits, ignore_index)
    if weights is not None:
        _checks.weights(weights, labels.shape, student_logits.device)

    labels = labels.long()
    labelled = None if complete else labels != ignore_index
    counted = keep = kept(weights)
    if labelled is not None:
        counted = labelled if keep is None else labelled & keep
    if counted is not None:
        labels = labels.masked_fill(~counted, -1)
    distilled = keep if distill_ignored else counted
    # all in one, if both terms are there and divided by the same number
    one_divisor = None
    is_one_sum = labelled is None and not return_parts and not isinstance(alpha, Tensor)
    if is_one_sum and not _is(alpha, 0) and not _is(alpha, 1):
        one_divisor = known_divisor(student_logits, weights, normalizer, reduction)
    both = _shortcut(
        divergence, student_logits, teacher_logits, distilled, one_divisor,
        labels=labels, alpha=alpha, **options,
    )  # fmt: skip
    if both is not None and one_divisor is not None:
        return both
    engine = choose((student_logits, teacher_logits))
    if both is not None:
        divergences, cross_entropies = both
    elif engine == "formula":
        # here, not in each term: the sum of their gradients is rounded once
        student_logits = student_logits.to(compute_dtype(student_logits, teacher_logits))
        divergences = rows(
            _DIVERGENCES[divergence].formula,
            None,
            student_logits,
            teacher_logits,
            distilled,
            options,
        )
        cross_entropies = rows(
            _cross_entropy, None, student_logits, student_logits, counted, dict(labels=labels)
        )
    else:
        divergences, cross_entropies = _fused(
            divergence, engine, student_logits, teacher_logits, distilled, labels=labels, **options
        )
    ce_weights = kd_weights = weights
    divisor = normalizer
    if labelled is not None and weights is not None:
        ce_weights = torch.where(labelled, weights, 0)
        kd_weights = weights if distill_ignored else ce_weights
    elif labelled is not None and normalizer is None:
        # the rows that are left out are 0 already: only their number is wanted
        divisor = labelled.sum()
    ce = reduce(cross_entropies, ce_weights, divisor, reduction)
    softened = reduce(
        divergences, kd_weights, normalizer if distill_ignored else divisor, reduction
    )
    # an infinite term that has no weight counts for nothing
    if _is(alpha, 0):
        total = softened
    elif _is(alpha, 1):
        total = ce
    else:
        total = alpha * ce + (1 - alpha) * softened
    return (total, ce, softened) if return_parts else total


def _cross_entropy(student: Tensor, _: Tensor, *, labels: Tensor) -> Tensor:
    """−log softmax(student)[label]; rows with a negative label are left out by the caller."""
    return -student.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
