"""Solve `Linear` on a GPU: cuBLAS makes the logits of a chunk, the kernels of `Rows` take them.

Bytes for each (row, entry) of a chunk, in float32: 4 written and 4 read for each of both networks,
4 written as dz and read twice. Nothing of that outlives its chunk.
"""

from fastkd import _heads
from fastkd.kernels.ensembles.teachers import mix
from fastkd.kernels.rows import launch as rows
from fastkd.problems.linear import compute_dtype_of as compute_dtype_of
from fastkd.problems.linear import width_of_report as n_statistics  # noqa: F401

_engine = _heads.Engine(rows.value_and_gradients, mix)
value_and_gradients, forward, backward = (
    _engine.value_and_gradients, _engine.forward, _engine.backward,
)  # fmt: skip
