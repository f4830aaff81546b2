"""What launchers must know of tensors and devices before a kernel starts."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

_WIDEST_VECTOR = 16  # elements, of 1 byte
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Device(NamedTuple):
    multiprocessors: int
    nvidia: bool  # log2 is an instruction there, and registers can be capped
    generation: int = 9  # of NVIDIA's: 8 Ampere and Ada, 9 Hopper, 10 Blackwell


@functools.cache
def _describe(active: Any, index: int) -> Device:
    properties, target = active.utils.get_device_properties(index), active.get_current_target()
    if target.backend != "cuda":
        return Device(properties["multiprocessor_count"], False, 0)
    return Device(properties["multiprocessor_count"], True, target.arch // 10)


def device_of(tensor: Tensor) -> Device:
    if INTERPRETED:
        return Device(132, False)
    with on_device(tensor):  # the driver describes the current one
        return _describe(driver.active, driver.active.get_current_device())


def on_device(tensor: Tensor) -> Any:
    """Kernels start on the current device: make it the tensor's."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


class Rows(NamedTuple):
    """A tensor (..., V): row r starts at r // inner · outer_stride + r % inner · inner_stride."""

    tensor: Tensor
    outer_stride: int
    inner_stride: int


def rows_of(tensor: Tensor) -> Rows:
    """Any strides but a copy: only a last dimension with gaps, or four odd ones, need that."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    if tensor.ndim > 3:
        tensor = tensor.reshape(-1, *tensor.shape[-2:])
    strides = [
        stride if size > 1 else 0
        for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
    ]
    return Rows(tensor, *[0] * (2 - len(strides)), *strides)


def alignment(tensors: list[Rows], most: int) -> int:
    """The largest power of two that divides `most` and, in elements, the start of every row.

    No more than vectors of every dtype need: each other number would be compiled anew.
    """
    together = most | _WIDEST_VECTOR
    for rows in tensors:
        first = rows.tensor.data_ptr() // rows.tensor.element_size()
        together |= first | rows.outer_stride | rows.inner_stride
    return together & -together


def congruent(a: Rows, b: Rows, width: int) -> bool:
    """Whether each row of `b` starts as far from a vector's boundary as the same row of `a`."""
    first_a = a.tensor.data_ptr() // a.tensor.element_size()
    first_b = b.tensor.data_ptr() // b.tensor.element_size()
    differences = (
        first_a - first_b,
        a.outer_stride - b.outer_stride,
        a.inner_stride - b.inner_stride,
    )
    return all(difference % width == 0 for difference in differences)
