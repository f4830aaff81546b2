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


def multiplies_halves(rows: Tensor, half: str) -> bool:
    """Return whether a product of half precision gives sums of the rows' dtype, not rounded."""
    if not rows.is_cuda or torch.version.hip is not None or rows.dtype != torch.float32:
        return False
    rounded = getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    return half == "bfloat16" or not rounded
