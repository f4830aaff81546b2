"""Tensors and devices as launchers know them before a kernel starts."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

_Function = TypeVar("_Function", bound=Callable[..., Any])

_WIDEST_VECTOR = 16  # elements, of 1 byte
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Device(NamedTuple):
    """The properties of a GPU on which launch sizes depend."""

    multiprocessors: int
    nvidia: bool  # log2 is an instruction there, and registers can be capped
    generation: int = 9  # of NVIDIA's: 8 Ampere and Ada, 9 Hopper, 10 and 12 Blackwell
    shared_bytes: int = 227 << 10  # the most that one program may use


@functools.cache
def _describe(active: Any, index: int) -> Device:
    properties, target = active.utils.get_device_properties(index), active.get_current_target()
    is_nvidia = target.backend == "cuda"
    generation = target.arch // 10 if is_nvidia else 0
    return Device(
        properties["multiprocessor_count"], is_nvidia, generation, properties["max_shared_mem"]
    )


def device_of(tensor: Tensor) -> Device:
    """Return the properties of the tensor's device; the interpreter passes for an H100."""
    if INTERPRETED:
        return Device(132, False)
    with on_device(tensor):  # because the driver describes the current device
        return _describe(driver.active, driver.active.get_current_device())


def on_device(tensor: Tensor) -> Any:
    """Return a context in which kernels start on the tensor's device."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.cache
def warn_of_chunks(resource: str, needed: int, limit: int) -> None:
    """Warn once that the tiles of some embeddings do not fit on a GPU."""
    warnings.warn(
        f"the kernels of these embeddings need more {resource} than this GPU gives a program "
        f"({needed}, not {limit}), so that the similarities go through cuBLAS in chunks: as exact, "
        "and slower. Please report the GPU, and the widths and dtypes of the embeddings.",
        UserWarning,
        stacklevel=2,
    )


@functools.cache
def _warn_of_portable_engine(resource: str, needed: int, limit: int) -> None:
    warnings.warn(
        f"a kernel of this loss needs more {resource} than this GPU gives a program ({needed}, not "
        f"{limit}), so that PyTorch's operations compute it: as exact, and slower. Please report "
        "the GPU, and the shapes and dtypes of the inputs.",
        UserWarning,
        stacklevel=3,
    )


def or_portable(function: _Function) -> _Function:
    """Return a function of an engine that leaves what does not fit on a GPU to its portable twin.

    A warning says so once. Decorate functions whose results the twin's `backward` can take.
    """
    problem = function.__module__.split(".")[-2]

    @functools.wraps(function)
    def solve(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OutOfResources as error:
            _warn_of_portable_engine(error.name, error.required, error.limit)
        portable = importlib.import_module(f"fastkd.portable.{problem}")
        return getattr(portable, function.__name__)(*arguments)

    return solve  # type: ignore[return-value]


class Strided(NamedTuple):
    """A tensor (..., V) whose row r starts at r // inner · outer_stride + r % inner · inner_stride.

    `inner` is the size of the last dimension but one. Kernels take it as one argument, where `ptr`
    has become the pointer.
    """

    ptr: Tensor
    outer_stride: int
    inner_stride: int


def rows_of(tensor: Tensor) -> Strided:
    """Return the tensor's rows as they lie in memory, without a copy if two strides describe them.

    A copy is made of a last dimension with gaps, and of more than three dimensions that cannot be
    flattened to three.
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    if tensor.ndim > 3:
        tensor = tensor.reshape(-1, *tensor.shape[-2:])
    strides = [
        stride if size > 1 else 0
        for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
    ]
    return Strided(tensor, *[0] * (2 - len(strides)), *strides)


def alignment(tensors: list[Strided], most: int) -> int:
    """Return the largest power of two that divides `most` and, in elements, each row's start.

    It is at most what vectors of every dtype need, because each other number would compile a
    kernel anew.
    """
    together = most | _WIDEST_VECTOR
    for rows in tensors:
        start = rows.ptr.data_ptr() // rows.ptr.element_size()
        together |= start | rows.outer_stride | rows.inner_stride
    return together & -together


def congruent(a: Strided, b: Strided, width: int) -> bool:
    """Return whether the same rows of `a` and `b` start equally far from a vector's boundary."""
    start_a = a.ptr.data_ptr() // a.ptr.element_size()
    start_b = b.ptr.data_ptr() // b.ptr.element_size()
    differences = (
        start_a - start_b,
        a.outer_stride - b.outer_stride,
        a.inner_stride - b.inner_stride,
    )
    return all(difference % width == 0 for difference in differences)


def warps_of_long_rows(losses: Tensor) -> int:
    """Return the warps of a program that reads a row, more where rows are fewer than programs."""
    warps = 8 if losses.numel() >= 2 * device_of(losses).multiprocessors else 16
    # numbers of float64 take two registers
    return warps // 2 if losses.dtype == torch.float64 else warps


def written_like(student: Tensor, write: Callable[[Tensor], None]) -> Tensor:
    """Return a gradient in the order of the student's strides, which `write` writes contiguously.

    Where the student is not contiguous it is copied, and of no elements nothing is written.
    """
    found = gradient = torch.empty_like(student)
    if not found.is_contiguous():
        gradient = torch.empty_like(found, memory_format=torch.contiguous_format)
    if gradient.numel():
        write(gradient)
    return found if gradient is found else found.copy_(gradient)
