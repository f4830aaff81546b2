"""The precision that losses are computed in, whatever the dtype of their inputs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if a tensor is float64, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def without_autocast(device: torch.device) -> Any:
    """Return a context without autocast, which is on in eager bodies and off in compiled ones."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def as_under_autocast(x: Any) -> Any:
    """Return an operand of a matrix product in the dtype that autocast would give it."""
    if isinstance(x, (list, tuple)):
        return [as_under_autocast(each) for each in x]
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
