"""Solve `Linear` on a GPU: cuBLAS makes the logits of a chunk, the kernels of `Rows` take them.

Bytes for each (row, entry) of a chunk, in float32: 4 written and 4 read for each of both networks,
4 written as dz and read twice. Nothing of that outlives its chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastkd import _heads
from fastkd.kernels.ensembles.teachers import mix
from fastkd.kernels.rows import launch as rows
from fastkd.problems.linear import compute_dtype_of as compute_dtype_of
from fastkd.problems.linear import width_of_report as n_statistics  # noqa: F401
from fastkd.problems.rows import Rows


def _solve_rows(
    problem: Rows, needs_grad: Sequence[bool], *, row_weights: Tensor | None, **options: Any
) -> Any:
    """Return what `rows.value_and_gradients` does, for cross-entropy alone too."""
    if problem.divergence:
        return rows.value_and_gradients(problem, needs_grad, row_weights=row_weights, **options)
    # the student against itself, read from the cache, has a divergence of 0
    itself = problem._replace(divergence="forward_kl", scale=0.0)
    nothing = problem.student.new_zeros(()).expand(problem.student.shape[:-1])
    return rows.value_and_gradients(itself, needs_grad, row_weights=nothing, **options)


_engine = _heads.Engine(_solve_rows, mix)
value_and_gradients, forward, backward = (
    _engine.value_and_gradients, _engine.forward, _engine.backward,
)  # fmt: skip
