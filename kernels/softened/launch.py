"""Solve `Softened` on a GPU: each network's gradient as that of `Rows`, by the same kernels.

Bytes for each (row, entry) of bf16 logits: those of the rows for each network that is trained, and
4 more where its temperature is.
"""

from fastkd import _softened
from fastkd.kernels.rows import launch as rows

_engine = _softened.Engine(rows.value_and_gradients)
forward, backward = _engine.forward, _engine.backward
n_statistics = _softened.n_statistics
