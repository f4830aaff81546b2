"""Small problems for compute-sanitizer: without a GPU tests/meter.py watches every access."""

import pytest
import torch
from cases import LOSSES, of
from force import on_device_of

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]
ROWS = [case for case in LOSSES if case.name in ("jensen_shannon", "kd")]


def step(case, inputs, **options):
    loss = case(*inputs, **options)
    (gradient,) = torch.autograd.grad(loss, inputs[0])
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("case", ROWS, ids=str)
@pytest.mark.parametrize(
    "n_cols, multiprocessors", [(37, 132), (8203, 132), (8203, 1)], ids=["short", "split", "whole"]
)
def test_every_access_to_rows_is_inside(case, n_cols, multiprocessors, monkeypatch):
    # a device of one multiprocessor is filled by two rows, and none is split
    on_device_of(multiprocessors, monkeypatch)
    step(case, case.inputs((2,), n_cols, torch.bfloat16), reduction="mean")


@pytest.mark.parametrize("case", of("relations", "pairs", cases=LOSSES), ids=str)
def test_every_access_to_embeddings_is_inside(case):
    step(case, case.inputs((37,), 19, torch.bfloat16))
