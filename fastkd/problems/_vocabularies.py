"""Two vocabularies: checks of what joins them, and the statements of divergences between them.

A divergence between vocabularies is one of rows once both networks speak of the same entries:
those that both have, or the teacher's, to which a map takes the student's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd import _checks, _option_checks
from fastkd._op import Number
from fastkd._precision import compute_dtype
from fastkd._reduction import selected
from fastkd.problems import _temperatures, rows

if TYPE_CHECKING:
    from fastkd._loss import Call

MASSES = ("renormalized", "tail", "raw")  # of entries that both vocabularies have
MASSES_OF_MAPS = ("renormalized", "full")  # of the teacher's entries


# ------------------------------------------------------------------------------------------ checks


def check_sorted(student: Tensor, teacher: Tensor, **softening: Any) -> None:
    """Raise an error for logits that do not fit together and options out of range."""
    _checks.logits_of_two_vocabularies(student, teacher)
    _check_softening(teacher, **softening)


def check_matched(
    student: Tensor,
    teacher: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    *,
    mass: str,
    divergence: str,
    beta: Number,
    skew: Number,
    weight: Number,
    scale_t2: bool,
    **softening: Any,
) -> None:
    """Raise an error for logits and ids that do not fit together and options out of range."""
    _checks.logits_of_two_vocabularies(student, teacher)
    _check_softening(teacher, **softening)
    _option_checks.one_of(MASSES, mass=mass)
    _check_divergence(divergence, beta=beta, skew=skew, weight=weight)
    both = (("student_ids", student_ids, student), ("teacher_ids", teacher_ids, teacher))
    for name, ids, logits in both:
        _check_ids(name, ids, logits)
        if ids.ndim != 1 or not len(ids):
            raise ValueError(
                f"{name} needs the shape [K] with K ≥ 1, an entry for each string that both "
                f"vocabularies have, got {_checks.shape(ids)}"
            )
    if len(student_ids) != len(teacher_ids):
        raise ValueError(
            "student_ids and teacher_ids need the same K strings in the same order, got "
            f"{_checks.shape(student_ids)} and {_checks.shape(teacher_ids)}"
        )
    for name, ids, _ in both:
        if _checks.has_values_at_hand(ids):
            known, counts = ids.unique(return_counts=True)
            if len(known) < len(ids):
                repeated = known[counts > 1][0].item()
                raise ValueError(
                    f"{name} must name each entry once, got {repeated} repeatedly: its mass would "
                    "count twice; keep one of its strings"
                )


def check_projected(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor,
    shares: Tensor | None,
    *,
    mass: str,
    divergence: str,
    beta: Number,
    skew: Number,
    weight: Number,
    scale_t2: bool,
    **softening: Any,
) -> None:
    """Raise an error for logits and a map that do not fit together and options out of range."""
    _checks.logits_of_two_vocabularies(student, teacher)
    _check_softening(teacher, **softening)
    _option_checks.one_of(MASSES_OF_MAPS, mass=mass)
    _check_divergence(divergence, beta=beta, skew=skew, weight=weight)
    _check_ids("ids", ids, teacher, has_none=True)
    n_entries = student.shape[-1]
    if ids.ndim != 2 or len(ids) != n_entries or not ids.shape[1]:
        raise ValueError(
            f"ids needs the shape [V, k] = [{n_entries}, k] with k ≥ 1, the teacher's entries of "
            f"each of the student's, got {_checks.shape(ids)}; −1 stands for no entry"
        )
    if shares is None:
        return
    if not isinstance(shares, Tensor) or shares.dtype not in _checks.FLOATS:
        got = str(shares.dtype) if isinstance(shares, Tensor) else type(shares).__name__
        raise TypeError(f"shares must be a floating-point tensor in the shape of ids, got {got}")
    if shares.shape != ids.shape:
        raise ValueError(
            "shares needs the shape of ids, a share for each entry, got "
            f"{_checks.shape(shares)} for {_checks.shape(ids)}"
        )
    _checks.same_device(student_logits=student, shares=shares)
    if _checks.has_values_at_hand(shares):
        lowest = shares.detach().min().item()
        if lowest < 0:
            raise ValueError(
                f"shares must be at least 0, got {lowest:g}: they are parts of a probability, and "
                "their logarithms need .exp()"
            )


def _check_softening(
    teacher: Tensor,
    *,
    temperature: Number,
    student_temperature: Number | None,
    teacher_temperature: Number | None,
    teacher_form: str,
) -> None:
    of_each = dict(
        temperature=temperature,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    for name, value in of_each.items():
        if value is not None:
            _option_checks.temperature(value, name)
    if teacher_form != "logits":
        _option_checks.one_of(rows.FORMS, teacher_form=teacher_form)
        _checks.probabilities(teacher, teacher_form)


def _check_divergence(divergence: str, **options: Number) -> None:
    _option_checks.one_of(rows.DIVERGENCES, divergence=divergence)
    _option_checks.fraction(**own_option(divergence, **options))


def _check_ids(name: str, ids: Any, logits: Tensor, has_none: bool = False) -> None:
    """Raise an error unless the ids are entries of the vocabulary of the logits, or −1 for none."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = str(ids.dtype) if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be a tensor of token ids (torch.int64), got {got}")
    _checks.same_device(logits=logits, **{name: ids})
    if not _checks.has_values_at_hand(ids) or not ids.numel():
        return
    lowest, highest = (x.item() for x in ids.aminmax())
    n, least = logits.shape[-1], -1 if has_none else 0
    if lowest < least or highest >= n:
        wrong = lowest if lowest < least else highest
        raise ValueError(
            f"{name} must lie in [{least}, {n}), the entries of the logits, got {wrong}: drop the "
            "strings that one of the models has no logit for"
        )


# -------------------------------------------------------------------------------------- statements


def own_option(divergence: str, **options: Number) -> dict[str, Number]:
    """Return the option that the divergence has of beta, skew and weight, by its name."""
    return {name: options[name] for name in [rows.OPTIONS.get(divergence)] if name}


def matched(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    *,
    mass: str,
    temperature: Number,
    student_temperature: Number | None,
    teacher_temperature: Number | None,
    teacher_form: str,
    **options: Any,
) -> Any:
    """Solve for the divergence between the entries that both have; "raw" has no engine."""
    if mass == "raw":
        return NotImplemented
    of_each = _temperatures.of_both(temperature, student_temperature, teacher_temperature)
    teacher = rows.as_logits(teacher.detach(), teacher_form, student)
    both = (student, student_ids), (teacher, teacher_ids)
    if mass == "renormalized":
        z, z_teacher = (x.index_select(-1, ids) for x, ids in both)
        return _solve(call, z, z_teacher, of_each, of_each, **options)
    dtype = compute_dtype(student, teacher)
    z, z_teacher = (
        with_tail(x, ids, T, dtype, call.row_mask)
        for (x, ids), T in zip(both, of_each, strict=True)
    )
    return _solve(call, z, z_teacher, (1.0, 1.0), of_each, **options)


def projected(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    ids: Tensor,
    shares: Tensor | None,
    *,
    mass: str,
    temperature: Number,
    student_temperature: Number | None,
    teacher_temperature: Number | None,
    teacher_form: str,
    **options: Any,
) -> Tensor:
    """Solve for the divergence between the student's mass at the teacher's entries and its own."""
    of_student, of_teacher = _temperatures.of_both(
        temperature, student_temperature, teacher_temperature
    )
    dtype, n_entries = compute_dtype(student, teacher), teacher.shape[-1]
    teacher = rows.as_logits(teacher.detach(), teacher_form, student)
    log_q = (selected(student, call.row_mask).to(dtype) / of_student).log_softmax(-1)
    log_shares = log_of_shares(ids, shares, dtype)
    projected = project(log_q, ids, log_shares, n_entries)
    if mass == "renormalized":
        teacher = teacher.masked_fill(~is_reached(ids, log_shares, n_entries), -torch.inf)
    temperatures = (1.0, of_teacher), (of_student, of_teacher)
    return _solve(call, projected, teacher, *temperatures, **options)


def _solve(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    temperatures: tuple[Number, Number],
    softened_by: tuple[Number, Number],
    *,
    divergence: str,
    scale_t2: bool,
    **options: Number,
) -> Tensor:
    """Solve for the divergence of rows that `temperatures` still divide, times T² if asked for.

    T² is the product of the temperatures by which the networks are softened in all.
    """
    option = (*own_option(divergence, **options).values(), 0.0)[0]
    name = rows.limit_of(divergence, option)
    scale = softened_by[0] * softened_by[1] if scale_t2 else 1.0
    problem = rows.Rows(
        student, teacher, None, call.row_mask, *temperatures, option, scale, name, call.row_weight
    )
    losses, _ = rows.solve(call.engine, problem)
    return losses


# ------------------------------------------------------------------------ what the formulas share


def with_tail(
    logits: Tensor,
    ids: Tensor,
    temperature: Number,
    dtype: torch.dtype,
    row_mask: Tensor | None = None,
) -> Tensor:
    """Return [..., K + 1], logits over the temperature of the ids and of all other entries at once.

    The last one is the log-sum-exp of the others: no probability is subtracted from 1.
    """
    n_entries = logits.shape[-1]
    is_other = torch.ones(n_entries, dtype=torch.bool, device=logits.device)
    is_other = is_other.index_fill(0, ids, False)
    # the others come first, and how many they are is known: to select by the mask would wait
    others = (~is_other).to(torch.int8).argsort(stable=True)[: n_entries - len(ids)]
    # a row of weight 0 may hold NaN, through which no gradient of 0 may come
    rest = selected(logits.index_select(-1, others), row_mask).to(dtype) / temperature
    matched = logits.index_select(-1, ids).to(dtype) / temperature
    return torch.cat([matched, _log_sum_exp(rest).unsqueeze(-1)], -1)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """Return log Σ exp over the last dimension, without a gradient where it is −∞."""
    is_masked = (logits == -torch.inf).all(-1)
    found = torch.where(is_masked.unsqueeze(-1), 0, logits).logsumexp(-1)
    return torch.where(is_masked, -torch.inf, found)


def log_of_shares(ids: Tensor, shares: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the logarithms of the shares [V, k] of each row's mass, −∞ where there is no entry."""
    is_entry = ids >= 0
    shares = is_entry.to(dtype) if shares is None else torch.where(is_entry, shares.to(dtype), 0)
    total = shares.sum(1, keepdim=True)
    return (shares / torch.where(total == 0, 1, total)).log().detach()


def project(log_q: Tensor, ids: Tensor, log_shares: Tensor, n_entries: int) -> Tensor:
    """Return log Σ_v q_v share_vu for the entries u of the teacher, (..., n_entries).

    It is a log-sum-exp for each entry, of as many terms as reach it.
    """
    # what is added to an entry is one row, because strided numbers would take twenty times as long
    examples, by_entry = log_q.shape[:-1], log_q.reshape(-1, log_q.shape[-1]).mT.contiguous()
    columns = [*zip(ids.long().clamp(min=0).unbind(1), log_shares.unbind(1), strict=True)]
    with torch.no_grad():
        top = by_entry.new_full((n_entries, by_entry.shape[1]), -torch.inf)
        for index, share in columns:
            term = by_entry + share[:, None]
            top.scatter_reduce_(0, index[:, None].expand_as(term), term, "amax")
        top.masked_fill_(top == -torch.inf, 0)  # where nothing has mass any number will do
    total = torch.zeros_like(top)
    for index, share in columns:
        term = by_entry + share[:, None] - top.index_select(0, index)
        add_at(total, index, term.exp())
    # without a gradient where it is −∞
    has_mass = total != 0
    found = torch.where(has_mass, torch.where(has_mass, total, 1).log() + top, -torch.inf)
    return found.mT.contiguous().view(*examples, n_entries)


def is_reached(ids: Tensor, log_shares: Tensor, n_entries: int) -> Tensor:
    """Return which entries of the teacher the map gives mass, [n_entries]."""
    counts = torch.zeros(n_entries, dtype=torch.int64, device=ids.device)
    index, has_share = ids.long().clamp(min=0).flatten(), (log_shares > -torch.inf).flatten()
    return counts.index_add(0, index, has_share.long()) > 0


def add_at(x: Tensor, index: Tensor, values: Tensor) -> None:
    """Add values to the rows of the index, in the same order in every run.

    On a GPU `index_add` adds in any order, but `index_put` sorts the index first; on a CPU it is
    the other way round.
    """
    if x.is_cpu:
        x.index_add_(0, index, values)
    else:
        x.index_put_((index,), values, accumulate=True)
