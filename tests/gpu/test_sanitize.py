"""Small problems for compute-sanitizer; canaries around the tensors for when it is missing."""

import pytest
import torch
from guard import Guard
from losses import DEVICE, LOSSES, RELATIONAL

from fastkd.kernels import divergence as kernels
from fastkd.kernels._launch import Device

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]


@pytest.mark.parametrize("case", [LOSSES[2], LOSSES[-1]], ids=str)
@pytest.mark.parametrize(
    "n_cols, multiprocessors", [(37, 132), (8203, 132), (8203, 1)], ids=["short", "split", "whole"]
)
def test_every_access_is_inside(case, n_cols, multiprocessors, monkeypatch):
    # a device of one multiprocessor is filled by two rows, and none is split
    device = Device(multiprocessors, DEVICE.type == "cuda")
    monkeypatch.setattr(kernels, "device_of", lambda tensor: device)
    inputs = case.inputs((2,), n_cols, torch.bfloat16)
    guard = Guard()
    student, teacher = (guard.surround(x.detach(), gap=3) for x in inputs[:2])
    loss = case(student.requires_grad_(), teacher, *inputs[2:], reduction="mean")
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    guard.check()


@pytest.mark.parametrize("case", RELATIONAL[:3], ids=str)
def test_every_access_to_embeddings_is_inside(case):
    inputs = case.inputs((37,), 19, torch.bfloat16)
    guard = Guard()
    student, teacher = (guard.surround(x.detach(), gap=3) for x in inputs)
    loss = case(student.requires_grad_(), teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    guard.check()
