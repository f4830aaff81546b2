"""Solve `Linear` in PyTorch, for any device: the divergences of each chunk of logits as `Rows`."""

from fastkd import _heads
from fastkd.portable import rows
from fastkd.portable._mixtures import mix
from fastkd.problems.linear import compute_dtype_of as compute_dtype_of
from fastkd.problems.linear import width_of_report as n_statistics  # noqa: F401

_engine = _heads.Engine(rows.value_and_gradients, mix)
value_and_gradients, forward, backward = (
    _engine.value_and_gradients, _engine.forward, _engine.backward,
)  # fmt: skip
