"""Solve `Softened` in PyTorch, for any device: each network's gradient as that of `Rows`."""

from fastkd import _softened
from fastkd.portable import rows

_engine = _softened.Engine(rows.value_and_gradients)
forward, backward = _engine.forward, _engine.backward
n_statistics = _softened.n_statistics
