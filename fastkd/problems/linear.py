"""Hidden states under heads: divergences and cross-entropies of logits that are never whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._checks import all_labelled
from fastkd._loss import Call, Reduced
from fastkd._op import Number, Op, Tensors
from fastkd._precision import compute_dtype
from fastkd._reduction import divided, reduce
from fastkd.problems import _linear_checks as checks
from fastkd.problems import rows
from fastkd.problems.ensembles import of_each_row, stacked

check = checks.check


class Linear(NamedTuple):
    """Σ over rows of weight · [alpha · CE + share · Σ_k share_k · scale · D_k(p, q)].

    The logits are z = softcap(scale · (W h + b)) of the hidden states h of a network, p and q their
    softmax at the temperature, and CE that of the student at T = 1. Several teachers have the
    mixture p = Σ share · p_t of theirs, whose shares are divided by their sum.
    """

    student: Tensor  # (..., H)
    student_weight: Tensor  # [V, H]
    student_bias: Tensor | None  # [V]
    teachers: Tensors  # (..., H_t) of each, or logits (..., V) where there is no weight
    teacher_weights: Tensors  # [V, H_t]
    teacher_biases: Tensors  # [V]
    teacher_shares: Tensor | None  # (..., T) of T teachers, None for one share
    labels: Tensor | None  # (...), a negative one means no label
    row_weights: Tensor | None  # (...), None for 1
    shares: Tensor | None  # [K], None for 1
    student_scale: Number
    teacher_scale: Number
    student_softcap: Number
    teacher_softcap: Number
    temperature: Number
    beta: Number  # the options of divergences
    skew: Number
    weight: Number
    scale: Number
    alpha: Number
    share: Number
    divergences: str  # K names with "+" between them
    student_is_capped: bool
    teacher_is_capped: bool
    n_valid: int  # an upper bound of the rows with a weight, below 0 if that is not known
    memory_budget: int  # bytes of a chunk, below 0 for the engine's choice
    metrics: bool  # whether the report has more than losses


class LinearRows(Linear):
    """The same for each row, without its weight: a row of weight 0 counts for nothing."""


_TRAINED = ("student", "student_weight", "student_bias")
_SHARED = ("student_weight", "student_bias", "teacher_weights", "teacher_biases", "shares")
solve = Op(Linear, trained=_TRAINED, reports=True)
solve_rows = Op(
    LinearRows, trained=_TRAINED, per_example=True, shared=_SHARED, recomputes=True, reports=True
)

# what the report of a row has besides its losses, asked for by `metrics`
METRICS = ("student_entropy", "teacher_entropy", "top1_agreement")


def names_of(problem: Linear) -> list[str]:
    """Return the names of the divergences."""
    return problem.divergences.split("+") if problem.divergences else []


def width_of_report(problem: Linear) -> int:
    """Return how many numbers a row's report has: cross-entropy, divergences, metrics."""
    return 1 + len(names_of(problem)) + len(METRICS) * problem.metrics


def compute_dtype_of(problem: Linear) -> torch.dtype:
    """Return float64 if a tensor of a network is float64, else float32."""
    fields = problem.student, problem.student_weight, problem.teacher_shares
    of_teachers = *problem.teachers, *problem.teacher_weights
    return compute_dtype(*(x for x in (*fields, *of_teachers) if x is not None))


def row_losses(problem: Linear, report: Tensor) -> Tensor:
    """Return the loss of each row from its report; a term of share 0 counts for nothing."""
    losses, divergences = torch.zeros_like(report[..., 0]), names_of(problem)
    if problem.labels is not None and not rows.is_exactly(problem.alpha, 0):
        losses = losses + problem.alpha * report[..., 0]
    if divergences and not rows.is_exactly(problem.share, 0):
        of_teacher = report[..., 1 : 1 + len(divergences)]
        if problem.shares is not None:
            shares = problem.shares
            of_teacher = torch.where(shares != 0, of_teacher * shares, 0)
        losses = losses + problem.share * of_teacher.sum(-1)
    return losses


def linear_kd(
    call: Call,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Any,
    teacher_weight: Any,
    labels: Tensor | None,
    *,
    student_bias: Tensor | None,
    teacher_bias: Any,
    teacher_logits: Any,
    alpha: Number,
    temperature: Number,
    scale_t2: bool,
    divergence: Any,
    beta: Number,
    skew: Number,
    weight: Number,
    ignore_index: int,
    num_valid: int | None,
    student_softcap: Number | None,
    teacher_softcap: Number | None,
    student_logit_scale: Number | None,
    teacher_logit_scale: Number | None,
    vocab: Any,
    memory_budget: int | None,
    metrics: bool,
    teacher_weights: Any,
) -> Any:
    """Solve for the weighted sum of all rows, or for each row where it is asked for."""
    asked = call.reduction
    assert asked is not None
    shares = shares_of(divergence)
    options = dict(beta=beta, skew=skew, weight=weight)
    resolved = [
        rows.limit_of(name, options[rows.OPTIONS[name]]) if name in rows.OPTIONS else name
        for name in shares
    ]
    hidden, *of_teachers = teachers_of(teacher_hidden, teacher_weight, teacher_bias, teacher_logits)
    student_weight, student_bias, *of_teachers = restricted(
        vocab, student_weight, student_bias, *of_teachers
    )
    heads, biases, logits = map(tuple, of_teachers)
    teachers = tuple(h if z is None else z for h, z in zip(hidden, logits, strict=True))
    networks = (student_hidden, student_weight, *teachers, *heads, teacher_weights)
    dtype = compute_dtype(*(x for x in networks if isinstance(x, Tensor)))
    # a divergence of share 0 is computed for those alone who ask for its value
    if rows.is_exactly(alpha, 1) and not (metrics or asked.return_parts):
        teachers = heads = biases = ()
        if dtype == torch.float64:  # which a teacher decides who is not read, too
            student_hidden = student_hidden.double()
    weights, labels = weights_of_rows(asked.weights, labels, ignore_index)
    is_distilled = len(teachers) > 0
    is_one = len(shares) == 1 and rows.is_exactly(next(iter(shares.values())), 1)
    problem = Linear(
        student_hidden,
        student_weight,
        student_bias,
        teachers,
        heads,
        biases,
        of_each_row(teacher_weights if teachers else None, len(teachers), student_hidden, dtype),
        labels,
        weights,
        stacked([*shares.values()], student_hidden, dtype) if is_distilled and not is_one else None,
        1.0 if student_logit_scale is None else student_logit_scale,
        1.0 if teacher_logit_scale is None else teacher_logit_scale,
        1.0 if student_softcap is None else student_softcap,
        1.0 if teacher_softcap is None else teacher_softcap,
        temperature,
        beta,
        skew,
        weight,
        temperature**2 if scale_t2 else 1.0,
        alpha,
        1 - alpha,
        "+".join(resolved) if is_distilled else "",
        student_softcap is not None,
        teacher_softcap is not None,
        -1 if num_valid is None or weights is None else num_valid,  # without weights all rows count
        -1 if memory_budget is None else memory_budget,
        metrics,
    )
    mask = None if weights is None else weights != 0
    how = asked.normalizer, asked.reduction
    # weights that are learnt get their gradient from the loss of each row
    is_weighted_after = weights is not None and weights.requires_grad
    if asked.reduction == "none" or is_weighted_after:
        losses, report = solve_rows(call.engine, LinearRows(*problem))
        loss = reduce(losses, weights, mask, *how)
    else:
        loss, report = solve(call.engine, problem)
        loss = divided(loss, weights, student_hidden.shape[:-1].numel(), *how)
    result: list[Any] = [loss]
    if asked.return_parts:
        parts = report[..., : 1 + len(shares) * is_distilled].unbind(-1)
        constant = None if weights is None else weights.detach()
        result += [reduce(part, constant, mask, *how) for part in parts]
    if metrics:
        result.append(_metrics(problem, report, list(shares) if is_distilled else []))
    return Reduced(tuple(result) if len(result) > 1 else loss)


def _metrics(problem: Linear, report: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    cross_entropy, *others = report.unbind(-1)
    found = dict(zip([*names, *METRICS], others, strict=True))
    if problem.labels is not None:
        found["label_log_probability"] = -cross_entropy
    if not problem.teachers:
        del found["teacher_entropy"], found["top1_agreement"]
    return found


def shares_of(divergence: Any) -> dict[str, Number]:
    """Return the share of each divergence by its name: 1 where none is given."""
    if isinstance(divergence, Mapping):
        return dict(divergence)
    return dict.fromkeys([divergence] if isinstance(divergence, str) else divergence, 1.0)


def weights_of_rows(
    weights: Tensor | None, labels: Tensor | None, ignore_index: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return weights that are 0 where a label is to be ignored, and labels that are −1 there."""
    if labels is None:
        return weights, None
    labels = labels.long()  # −100 is 156 in uint8
    if all_labelled(labels, ignore_index):
        return weights, labels
    labelled = labels != ignore_index
    weights = labelled if weights is None else torch.where(labelled, weights, 0)
    return weights, labels.masked_fill(~labelled, -1)


def teachers_of(hidden: Any, weight: Any, bias: Any, logits: Any) -> tuple[Sequence[Any], ...]:
    """Return the hidden states, heads, biases and logits of all teachers, None where one lacks it.

    Each of them is given as that of one teacher, or as a sequence.
    """
    given = [x if isinstance(x, (list, tuple)) else [x] for x in (hidden, weight, bias, logits)]
    n = 0 if hidden is None and logits is None else len(given[0 if logits is None else 3])
    return tuple(x if len(x) == n else [None] * n for x in given)


def restricted(
    vocab: Any,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_weights: Sequence[Tensor | None],
    teacher_biases: Sequence[Tensor | None],
    teacher_logits: Sequence[Tensor | None],
) -> tuple[Any, ...]:
    """Return heads, biases and logits of the entries of the vocabulary that all networks have."""
    if isinstance(vocab, str) and vocab != "common":
        return student_weight, student_bias, teacher_weights, teacher_biases, teacher_logits
    of_each = list(zip(teacher_weights, teacher_biases, teacher_logits, strict=True))
    sizes = [len(student_weight), *(n_entries(weight, logits) for weight, _, logits in of_each)]
    is_common = isinstance(vocab, str)
    n_left = min(sizes) if is_common else len(vocab)
    entries = slice(0, n_left) if is_common else vocab
    # a network with as many entries as are left has just those, if another one has more
    has_draft = is_common or any(size != n_left for size in sizes)

    def cut(size: int, *network: Tensor | None) -> Sequence[Tensor | None]:
        if has_draft and size == n_left:
            return network
        weight, bias, logits = network
        left = [None if x is None else x[entries] for x in (weight, bias)]
        return *left, None if logits is None else logits[..., entries]

    student_head = cut(sizes[0], student_weight, student_bias, None)[:2]
    found = [cut(size, *network) for size, network in zip(sizes[1:], of_each, strict=True)]
    return *student_head, *([network[i] for network in found] for i in range(3))


def n_entries(teacher_weight: Tensor | None, teacher_logits: Tensor | None) -> int:
    """Return the size of a teacher's vocabulary."""
    if teacher_logits is not None:
        return teacher_logits.shape[-1]
    assert teacher_weight is not None
    return len(teacher_weight)
