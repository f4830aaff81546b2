"""Which engine computes a loss, and how to choose one."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_BACKENDS = ("auto", "triton", "portable", "formula")
_OLDEST_TRITON = (3, 4)
_LATER = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def _known(name: str, advice: str = "") -> str:
    if name not in _BACKENDS:
        raise ValueError(f"got the backend {name!r}, need one of {', '.join(_BACKENDS)}{advice}")
    return name


_default = os.environ.get("FASTKD_BACKEND", "auto")
_current: ContextVar[Any] = ContextVar("fastkd's backend")
_outer: ContextVar[tuple[Any, ...]] = ContextVar("those of the blocks around", default=())
# the blocks that torch.compile has entered while tracing, because it traces no ContextVar
_traced: tuple[str, ...] = ()
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


class _Context:
    """The choice of a context: its `backend` is a name, or this object where none was chosen.

    A property that C code computes is what torch.compile reads and guards on, so that a graph is
    used where the choice is the one that it was compiled for.
    """

    backend = property(_current.get)  # the object is the default value that `get` takes


_context = _Context()


def chosen() -> str:
    """Return the choice of the blocks around, or else of FASTKD_BACKEND."""
    if _traced:
        return _traced[-1]
    name = _context.backend
    return _known(_default, "; set or unset FASTKD_BACKEND") if name is _context else name


class backend(contextlib.ContextDecorator):
    """Choose what computes the losses in a `with` block: ``with fastkd.backend("formula"): ...``

    "auto" takes the best engine that can run, "triton" and "portable" insist on one (losses that
    have no kernels take the portable one in any case), "formula" runs the definition itself (any
    order of derivative, most memory). The environment variable FASTKD_BACKEND sets the default.

    Each thread and each asyncio task has its own choice, and a new thread begins with the default.
    A backward has the engine of its forward. Activation checkpointing computes a loss again in the
    backward, perhaps in another thread, so that the block belongs inside what is checkpointed.

    Raises ValueError for another name, and TypeError where it decorates a generator or a coroutine,
    whose body the block would not see; a loss raises RuntimeError where the engine cannot run.
    """

    def __init__(self, name: str) -> None:
        self.name = _known(name)

    def __call__(self, function: Any) -> Any:
        """Return the function with the block around its body."""
        code = getattr(function, "__code__", None)
        if code is not None and code.co_flags & _LATER:
            raise TypeError(
                f"fastkd.backend({self.name!r}) cannot decorate {function.__name__}, which is a "
                "generator or a coroutine: the block would end before its body begins, so put the "
                "`with` block into the body"
            )
        return super().__call__(function)

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            global _traced
            _traced = (*_traced, self.name)
            return
        _outer.set((*_outer.get(), _context.backend))
        _current.set(self.name)

    def __exit__(self, *error: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            global _traced
            _traced = _traced[:-1]
            return
        # a generator may be closed in another context, which has no choice to return to
        *outer, name = _outer.get() or (_context,)
        _outer.set((*outer,))
        _current.set(name)


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
interpreter_knows_bfloat16 = False  # what corrects Triton's interpreter says so


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
        is_bits = tensor.dtype == torch.bfloat16 and not interpreter_knows_bfloat16
        if _interpreted and is_bits and kind != "meta":
            return (
                "the interpreter of TRITON_INTERPRET=1 computes with the bits of bfloat16 in place "
                "of its values, so that it needs float32 or float16"
            )
    return None


def choose(tensors: Sequence[Tensor], has_kernels: bool = True) -> str:
    """Return the engine for these tensors: "triton", "portable" or "formula"."""
    name = chosen()
    if not has_kernels:
        return "formula" if name == "formula" else "portable"
    if name == "triton":
        obstacle = triton_obstacle(tensors)
        if obstacle:
            raise RuntimeError(
                f'fastkd.backend("triton") cannot run here: {obstacle}. Use "auto" or "portable".'
            )
        return "triton"
    if name != "auto":
        return name
    on_gpu = len(tensors) > 0 and all(tensor.is_cuda for tensor in tensors)
    return "triton" if on_gpu and triton_obstacle(tensors) is None else "portable"
