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
from fastkd.contrastive import Number


class Problem(NamedTuple):
    """The arguments that every function of an engine of this family takes.

    The loss is Σ_i KL(softmax_j T_ij ‖ softmax_j S_ij) with S = scale · Q Kᵀ of the student and T
    that of the teacher.
    """

    query: Tensor  # [n, D], the student's
    key: Tensor | None  # [M, D]; None: the queries
    scale: Tensor  # 0-dim
    teacher_query: Tensor  # [n, D']
    teacher_key: Tensor | None
    teacher_scale: Tensor
    first: int  # key first + i is query i itself and left out; -1: none is
    wanted: str  # of query, key and scale: what gets a gradient

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return compute_dtype(self.query, self.teacher_query)

    def allocate(self) -> tuple[Tensor, Tensor]:
        """Empty: the loss, and all gradients in a row."""
        n_elements = sum(x.numel() for x in self.allocate_gradients())
        loss = self.query.new_empty((), dtype=self.dtype)
        return loss, loss.new_empty(n_elements)

    def allocate_gradients(self) -> tuple[Tensor, ...]:
        """Empty, one for each trained tensor."""
        wanted, nothing = self.wanted.split(), self.query.new_empty(0)
        return tuple(
            nothing
            if x is None or name not in wanted
            else torch.empty_like(x, memory_format=torch.contiguous_format)
            for name, x in zip(("query", "key", "scale"), self[:3], strict=True)
        )


_engine = Engine(
    "similarity",
    tensors="Tensor query, Tensor? key, Tensor scale, "
    "Tensor teacher_query, Tensor? teacher_key, Tensor teacher_scale",
    options="int first, str wanted",
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

    def of_all_ranks(x: Tensor | None) -> tuple[Tensor | None, int]:
        if x is None or group is None:
            return x, 0
        return _distributed.shared(x, group)

    with without_autocast(student.device):
        student, teacher = (F.normalize(x.to(dtype)) for x in (student, teacher.detach()))
        if student_keys is not None and teacher_keys is not None:
            student_keys = F.normalize(student_keys.to(dtype))
            teacher_keys = F.normalize(teacher_keys.detach().to(dtype))
        if engine == "formula":
            student_keys, teacher_keys = (
                of_all_ranks(student_keys)[0],
                of_all_ranks(teacher_keys)[0],
            )
            return formula(
                of_all_ranks(student)[0], of_all_ranks(teacher)[0],
                student_keys=student_keys, teacher_keys=teacher_keys,
                student_temperature=student_temperature, teacher_temperature=teacher_temperature,
                symmetric=symmetric, mask_self=mask_self,
            )  # fmt: skip
        scale, teacher_scale = (
            1 / torch.as_tensor(x, dtype=dtype, device=student.device)
            for x in (student_temperature, teacher_temperature)
        )

        def of_rows(
            query: Tensor, key: Tensor | None, teacher_query: Tensor, teacher_key: Tensor | None
        ) -> Tensor:
            """The own share of the mean over all rows."""
            if group is not None and key is None:  # the own queries are a part of the keys
                key, teacher_key = query, teacher_query
            (key, first), (teacher_key, _) = of_all_ranks(key), of_all_ranks(teacher_key)
            n = len(query)
            if group is not None:
                n = int(_distributed.summed(torch.tensor(n, device=query.device), group))
            if not n or len(query if key is None else key) - mask_self < 1:
                return (query.sum() + scale + (0 if key is None else key.sum())) * 0
            trained = {"query": query, "key": key, "scale": scale}
            wanted = [x for x, y in trained.items() if y is not None and is_differentiated(y)]
            loss, _ = _engine(
                engine, query, key, scale, teacher_query, teacher_key, teacher_scale.detach(),
                first if mask_self else -1, " ".join(wanted),
            )  # fmt: skip
            return loss / n

        share = of_rows(student, student_keys, teacher, teacher_keys)
        if symmetric:
            # of the queries among each other the columns are the rows
            if student_keys is not None and teacher_keys is not None:
                share = (share + of_rows(student_keys, student, teacher_keys, teacher)) / 2
        if group is None:
            return share
        return _distributed.before_averaging(share, _distributed.summed(share, group), group)


@batch_loss(_check, _fused, has_kernels=False, group=None)
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
    s, t = (q @ k.mT / T for q, k, T in zip(queries, keys, temperatures, strict=True))
    if not s.shape[0] or s.shape[1] - mask_self < 1:
        return s.sum() * 0
    own = torch.eye(*s.shape, dtype=torch.bool, device=s.device) & mask_self
    s, t = s.masked_fill(own, -torch.inf), t.masked_fill(own, -torch.inf)

    def divergence(dim: int) -> Tensor:
        log_p, log_q = t.log_softmax(dim), s.log_softmax(dim)
        terms = log_p.exp() * (log_p - log_q)
        return terms.masked_fill(own, 0).sum(dim).mean()

    return (divergence(1) + divergence(0)) / 2 if symmetric else divergence(1)
