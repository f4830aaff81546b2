"""Which engine computes a loss, and how to choose one."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

_BACKENDS = ("auto", "triton", "portable", "formula")
_OLDEST_TRITON = (3, 4)


def _known(name: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(f"got the backend {name!r}, need one of {', '.join(_BACKENDS)}")
    return name


_current = _known(os.environ.get("FASTKD_BACKEND", "auto"))
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


class backend(contextlib.ContextDecorator):
    """Choose what computes the losses in a `with` block: ``with fastkd.backend("formula"): ...``

    "auto" takes the best engine that can run, "triton" and "portable" insist on one (losses that
    have no kernels take the portable one in any case), "formula" runs the definition itself (any
    order of derivative, most memory). The environment variable
    FASTKD_BACKEND sets the default. The choice holds for the process, not for a thread.
    Raises ValueError for another name; a loss raises RuntimeError where the engine cannot run.
    """

    def __init__(self, name: str) -> None:
        self.name = _known(name)
        self._outer: list[str] = []  # one instance may decorate a function that calls itself

    def __enter__(self) -> None:
        global _current
        self._outer.append(_current)
        _current = self.name

    def __exit__(self, *error: object) -> None:
        global _current
        _current = self._outer.pop()


def _triton_version() -> str:
    for distribution in ("triton", "pytorch-triton", "pytorch-triton-rocm"):  # nightlies, ROCm
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return importlib.import_module("triton").__version__


def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = _triton_version()
    if tuple(map(int, version.split(".")[:2])) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"Triton {version} is installed, {oldest} or newer is needed"
    return None


_no_triton = _missing_triton()
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def triton_obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Return why the Triton engine cannot take these tensors, as the end of a sentence, or None."""
    if _no_triton:
        return _no_triton
    for tensor in tensors:
        kind = tensor.device.type
        # meta tensors have shapes alone: the kernels are compiled for them, never run
        if kind not in ("cuda", "meta") and not (kind == "cpu" and _interpreted):
            return f"the tensors are on {tensor.device}, not on a GPU"
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            return f"the kernels do not take {tensor.dtype}"
    return None


def choose(tensors: Sequence[Tensor], has_kernels: bool = True) -> str:
    """Return the engine for these tensors: "triton", "portable" or "formula"."""
    if not has_kernels:
        return "formula" if _current == "formula" else "portable"
    if _current == "triton":
        obstacle = triton_obstacle(tensors)
        if obstacle:
            raise RuntimeError(
                f'fastkd.backend("triton") cannot run here: {obstacle}. Use "auto" or "portable".'
            )
        return "triton"
    if _current != "auto":
        return _current
    on_gpu = bool(tensors) and all(tensor.device.type == "cuda" for tensor in tensors)
    return "triton" if on_gpu and triton_obstacle(tensors) is None else "portable"
