"""The similarities inside two networks against each other: soft targets of contrastive learning.

A network's similarities are those between its embeddings of N queries and of M keys, or of the
queries among each other. Neither matrix is stored: memory grows with N + M.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _checks, _distributed
from fastkd._engine import Engine, compute_dtype, is_differentiated, without_autocast
from fastkd._loss import batch_loss
from fastkd._pairs import (
    Number,
    empty_gradients,
    empty_statistics,
    everyone,
    half_of,
    in_dtype,
    is_small,
    nothing,
    of_all_ranks,
    scale_of,
)

_FEW_PAIRS = 1 << 14


class Problem(NamedTuple):
    """The arguments that every function of an engine of this family takes.

    The loss is Σ_i KL(softmax_j T_ij ‖ softmax_j S_ij) with S = scale · Q Kᵀ of the student and T
    that of the teacher, of rows divided by their lengths.
    """

    query: Tensor  # [n, D], the student's
    key: Tensor | None  # [M, D]; None: the queries
    scale: Tensor  # 0-dim
    teacher_query: Tensor  # [n, D']
    teacher_key: Tensor | None
    teacher_scale: Tensor
    first: int  # key first + i is query i itself and left out; -1: none is
    half: str  # "bfloat16" or "float16", if that holds the student's without rounding
    teacher_half: str
    wanted: str  # of query, key and scale: what gets a gradient

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return compute_dtype(self.query, self.teacher_query)

    def allocate(self) -> tuple[Tensor, Tensor]:
        """Empty: the loss, and all gradients in a row."""
        return empty_statistics(self.allocate_gradients(), self.dtype)

    def allocate_gradients(self) -> tuple[Tensor, ...]:
        """Empty, one for each trained tensor."""
        return empty_gradients(self.wanted, query=self.query, key=self.key, scale=self.scale)


_engine = Engine(
    "similarity",
    tensors="Tensor query, Tensor? key, Tensor scale, "
    "Tensor teacher_query, Tensor? teacher_key, Tensor teacher_scale",
    options="int first, str half, str teacher_half, str wanted",
    n_trained=3,
)


def _check(
    student: Tensor,
    teacher: Tensor,
    *,
    student_keys: Tensor | None,
    teacher_keys: Tensor | None,
    student_temperature: Number,
    teacher_temperature: Number,
    symmetric: bool,
    mask_self: bool,
    group: Any,
) -> None:
    for query, key, name in (
        (student, student_keys, "student"),
        (teacher, teacher_keys, "teacher"),
    ):
        _checks.matrices(**{name: query}, **({} if key is None else {f"{name}_keys": key}))
    _checks.same_examples(student=student, teacher=teacher)
    _checks.same_device(student=student, teacher=teacher)
    if (student_keys is None) != (teacher_keys is None):
        raise ValueError(
            "student_keys and teacher_keys are embeddings of the same keys: give both, or none for "
            "the similarities of the queries among each other"
        )
    if student_keys is not None and teacher_keys is not None:
        _checks.same_examples(student_keys=student_keys, teacher_keys=teacher_keys)
        _checks.constant_teacher(teacher_keys=teacher_keys)
        if mask_self and len(student_keys) != len(student):
            raise ValueError(
                f"mask_self leaves key i out for query i: as many keys as queries are needed, got "
                f"{len(student_keys)} and {len(student)}"
            )
    _checks.constant_teacher(teacher=teacher)
    _checks.number(above=0, student_temperature=student_temperature)
    _checks.number(above=0, teacher_temperature=teacher_temperature)
    _checks.process_group(group)


def _fused(
    formula: Callable[..., Tensor],
    engine: str,
    student: Tensor,
    teacher: Tensor,
    *,
    student_keys: Tensor | None,
    teacher_keys: Tensor | None,
    student_temperature: Number,
    teacher_temperature: Number,
    symmetric: bool,
    mask_self: bool,
    group: Any,
) -> Tensor:
    dtype = compute_dtype(student, teacher)
    half, teacher_half = (
        half_of(*(x for x in network if x is not None))
        for network in ((student, student_keys), (teacher, teacher_keys))
    )

    with without_autocast(student.device):
        student, teacher = in_dtype(student, dtype), in_dtype(teacher.detach(), dtype)
        if student_keys is not None and teacher_keys is not None:
            student_keys = in_dtype(student_keys, dtype)
            teacher_keys = in_dtype(teacher_keys.detach(), dtype)
        if engine == "portable" and group is None:
            keys = student if student_keys is None else student_keys
            if is_small(student, keys, most=_FEW_PAIRS):
                engine = "formula"
        if engine == "formula":
            student, _, teacher = everyone(student, group, teacher)
            if student_keys is not None and teacher_keys is not None:
                student_keys, _, teacher_keys = everyone(student_keys, group, teacher_keys)
            return formula(
                student, teacher,
                student_keys=student_keys, teacher_keys=teacher_keys,
                student_temperature=student_temperature, teacher_temperature=teacher_temperature,
                symmetric=symmetric, mask_self=mask_self,
            )  # fmt: skip
        scale = scale_of(student_temperature, student)
        teacher_scale = scale_of(teacher_temperature, student).detach()

        def of_rows(
            query: Tensor, key: Tensor | None, teacher_query: Tensor, teacher_key: Tensor | None
        ) -> Tensor:
            """The own share of the mean over all rows."""
            if group is not None and key is None:  # the own queries are a part of the keys
                key, teacher_key = query, teacher_query
            first = 0
            if key is not None and teacher_key is not None:
                key, first, teacher_key = everyone(key, group, teacher_key)
            n = len(query)
            if group is not None:
                n = int(_distributed.summed(torch.tensor(n, device=query.device), group))
            if not n or len(query if key is None else key) - mask_self < 1:
                return nothing(query, scale, key)
            if key is query:  # the compiler refuses a tensor twice
                key = key.view_as(key)
            if teacher_key is teacher_query:
                teacher_key = teacher_key.view_as(teacher_key)
            trained = {"query": query, "key": key, "scale": scale}
            wanted = [x for x, y in trained.items() if y is not None and is_differentiated(y)]
            loss, _ = _engine(
                engine, query, key, scale, teacher_query, teacher_key, teacher_scale,
                first if mask_self else -1, half, teacher_half, " ".join(wanted),
            )  # fmt: skip
            return loss / n

        share = of_rows(student, student_keys, teacher, teacher_keys)
        if symmetric:
            # of the queries among each other the columns are the rows
            if student_keys is not None and teacher_keys is not None:
                share = (share + of_rows(student_keys, student, teacher_keys, teacher)) / 2
        return of_all_ranks(share, group)


@batch_loss(_check, _fused, group=None)
def similarity_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    student_keys: Tensor | None = None,
    teacher_keys: Tensor | None = None,
    student_temperature: Number = 0.07,
    teacher_temperature: Number = 0.07,
    symmetric: bool = False,
    mask_self: bool = False,
) -> Tensor:
    """(1/N) Σ_i KL(softmax_j t_ij ‖ softmax_j s_ij): soft positives in place of one each.

    s and t are the cosines over a temperature, in the student and in the teacher, of queries [N, D]
    and keys [M, D], or of the queries among each other; the two may differ in D. `mask_self` leaves
    out j = i, `symmetric` is the mean with the KL of the columns. The teacher is a constant; the
    student's temperature may be a 0-dim tensor with a gradient. Raises TypeError for what is no
    embedding, ValueError for shapes that do not match or a temperature ≤ 0.

    Fang et al., SEED, 2021, arXiv:2101.04731; Yang et al., CLIP-KD, 2024, arXiv:2307.12732
    """
    queries = F.normalize(student), F.normalize(teacher)
    keys = (
        queries[0] if student_keys is None else F.normalize(student_keys),
        queries[1] if teacher_keys is None else F.normalize(teacher_keys),
    )
    temperatures = student_temperature, teacher_temperature
    s, t = (q / T @ k.mT for q, k, T in zip(queries, keys, temperatures, strict=True))
    if not s.shape[0] or s.shape[1] - mask_self < 1:
        return s.sum() * 0
    own = torch.eye(*s.shape, dtype=torch.bool, device=s.device) & mask_self
    s, t = s.masked_fill(own, -torch.inf), t.masked_fill(own, -torch.inf)

    def divergence(dim: int) -> Tensor:
        log_p, log_q = t.log_softmax(dim), s.log_softmax(dim)
        terms = log_p.exp() * (log_p - log_q)
        return terms.masked_fill(own, 0).sum(dim).mean()

    return (divergence(1) + divergence(0)) / 2 if symmetric else divergence(1)
