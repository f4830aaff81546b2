"""From an engine, two plain functions, to a differentiable op; and the choice of the engine.

An engine of a family is a module with `forward` and `backward`: `fastkd/portable/<family>.py` for
any device and `kernels/<family>.py` for a GPU, same names, same arguments, same results. `Engine`
makes both of them one op that works in eager mode, under torch.compile, torch.func and autocast.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_BACKENDS = ("auto", "triton", "portable", "formula")
_OLDEST_TRITON = (3, 4)
_library = torch.library.Library("fastkd", "DEF")


def _known(name: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(f"got the backend {name!r}, need one of {', '.join(_BACKENDS)}")
    return name


_backend = _known(os.environ.get("FASTKD_BACKEND", "auto"))


class backend(contextlib.ContextDecorator):
    """Choose what computes the losses inside a `with` block: ``with fastkd.backend("formula"): ...``

    "auto" takes the best engine that can run, "triton" and "portable" insist on one, "formula" runs
    the definition itself (any order of derivative, most memory). The environment variable
    FASTKD_BACKEND sets the default. The choice holds for the process, not for a thread.
    Raises ValueError for another name; a loss raises RuntimeError where the engine cannot run.
    """

    def __init__(self, name: str) -> None:
        self.name = _known(name)
        self._outer: list[str] = []  # one instance may decorate a function that calls itself

    def __enter__(self) -> None:
        global _backend
        self._outer.append(_backend)
        _backend = self.name

    def __exit__(self, *error: object) -> None:
        global _backend
        _backend = self._outer.pop()


def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"Triton {version} is installed, {oldest} or newer is needed"
    return None


_no_triton = _missing_triton()
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def triton_obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Why the Triton engine cannot take these tensors, as the end of a sentence; None if it can."""
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


def choose(tensors: Sequence[Tensor]) -> str:
    """The engine for these tensors: "triton", "portable" or "formula"."""
    if _backend == "triton":
        obstacle = triton_obstacle(tensors)
        if obstacle:
            raise RuntimeError(
                f'fastkd.backend("triton") cannot run here: {obstacle}. Use "auto" or "portable".'
            )
        return "triton"
    if _backend != "auto":
        return _backend
    on_gpu = all(tensor.device.type == "cuda" for tensor in tensors)
    return "triton" if on_gpu and triton_obstacle(tensors) is None else "portable"


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is float64, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def without_autocast(device: torch.device) -> Any:
    """Autocast is on in eager bodies and off in compiled ones: engines always switch it off."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _module(family: str, name: str) -> types.ModuleType:
    # fastkd.kernels is part of every installation: if it is missing, its ImportError must surface
    package = "kernels" if name == "triton" else "portable"
    return importlib.import_module(f"fastkd.{package}.{family}")


_SECOND_ORDER = (
    "{} is not implemented by fastkd's engines, their gradient is a constant of the graph. Put "
    '`with fastkd.backend("formula"):` around the loss to differentiate its definition instead.'
)


class Engine:
    """The differentiable op of a family, ``engine(backend, *tensors, *scalars, *options)``.

    tensors   schema of the tensor arguments, for example "Tensor student, Tensor? labels"; the
              first one gets a gradient
    scalars   names of the numbers that vary at run time (floats or 0-dim tensors)
    options   schema of what selects code, for example "str divergence"
    allocate  (*tensors, *options) -> (losses…, statistics): empty outputs of `forward`. Only the
              statistics, which come last, get no gradient
    """

    def __init__(
        self, family: str, *, tensors: str, scalars: str, options: str, allocate: Callable
    ) -> None:
        self.family = family
        self.allocate = allocate
        self.n_tensors = len(tensors.split(","))
        self.n_scalars = len(scalars.split(","))
        numbers = ", ".join(f"Tensor {name.strip()}" for name in scalars.split(","))
        arguments = f"{tensors}, {numbers}, {options}, str backend"
        returns = "(Tensor, Tensor, Tensor)"
        _library.define(f"{family}_forward({arguments}) -> {returns}")
        _library.define(
            f"{family}_backward(Tensor? upstream_0, Tensor? upstream_1, Tensor statistics, "
            f"{arguments}) -> Tensor"
        )
        for direction, body, fake in (
            ("forward", self._forward, self._fake_forward),
            ("backward", self._backward, self._fake_backward),
        ):
            name = f"{family}_{direction}"
            _library.impl(name, body, "CompositeExplicitAutograd")
            torch.library.register_fake(f"fastkd::{name}", fake, lib=_library)
        self._function = _differentiable(self)

    def __call__(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        """Losses and statistics; `arguments` are the tensors, the scalars and the options."""
        return self._function.apply(*arguments, backend)

    def dispatch(self, direction: str, *arguments: Any) -> Any:
        """The plain body in eager mode; under a tracer an opaque op, chunk loops and all."""
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
        if plain and not torch.compiler.is_compiling():
            return self._forward(*arguments) if direction == "forward" else self._backward(*arguments)
        op = getattr(torch.ops.fastkd, f"{self.family}_{direction}")
        first = len(arguments) - self.n_scalars - self.n_options - 1
        numbers = range(first, first + self.n_scalars)
        # numbers become tensors, else every new temperature would compile anew
        return op(
            *(
                torch.full((), x, dtype=torch.float64, device=tensors[0].device)
                if i in numbers and not isinstance(x, Tensor)
                else x
                for i, x in enumerate(arguments)
            )
        )

    def _forward(self, *arguments: Any) -> Any:
        with without_autocast(arguments[0].device):
            return _module(self.family, arguments[-1]).forward(*arguments[:-1])

    def _backward(self, *arguments: Any) -> Any:
        with without_autocast(arguments[2].device):
            return _module(self.family, arguments[-1]).backward(*arguments[:-1])
