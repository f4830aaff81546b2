"""A small problem of each kind for compute-sanitizer: tests/meter.py watches without a GPU."""

import pytest
import torch
from cases import named
from force import on_device_of

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]
(ROWS,) = named("jensen_shannon-temperature=2.0-beta=0.1")
# compute-sanitizer is some hundred times slower: one problem for each kind of kernel
OTHERS = named(
    "clip_contrastive-logit_scale=5.0", "similarity_kl", "rkd", "attention_transfer",
    "token_relation-heads=2",
)  # fmt: skip


def step(case, inputs, **options):
    loss = case(*inputs, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), inputs[0])
    assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize(
    "n_cols, multiprocessors", [(37, 132), (8203, 132), (8203, 1)], ids=["short", "split", "whole"]
)
def test_every_access_to_rows_is_inside(n_cols, multiprocessors, monkeypatch):
    # a device of one multiprocessor is filled by two rows, and none is split
    on_device_of(multiprocessors, monkeypatch)
    step(ROWS, ROWS.inputs((2,), n_cols, torch.bfloat16), reduction="mean")


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_every_access_to_features_is_inside(case):
    step(case, case.inputs((37,), 19, torch.bfloat16))
