"""From an engine, two plain functions, to a differentiable op.

An engine of a family is a module with `forward` and `backward`: `fastkd/portable/<family>.py` for
any device and `kernels/<family>.py` for a GPU, same names, same arguments, same results. `Engine`
makes both of them one op that works in eager mode, under torch.compile, torch.func and autocast.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._backend import transforms_active
from fastkd._version import __version__

_library = torch.library.Library("fastkd", "DEF")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is float64, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def is_differentiated(tensor: Tensor) -> bool:
    """Whether a gradient may be asked for; under torch.func one cannot know."""
    if not torch.is_grad_enabled():
        return False
    return tensor.requires_grad or (not torch.compiler.is_compiling() and transforms_active())


def scaled_gradient(upstream: Tensor, gradient: Tensor, trained: Tensor, *rest: Any) -> Tensor:
    """The `backward` of an engine whose statistics are the gradient, made in the forward."""
    scaled = torch.empty_like(trained, memory_format=torch.contiguous_format)
    return torch.mul(gradient, upstream, out=scaled)


def without_autocast(device: torch.device) -> Any:
    """Autocast is on in eager bodies and off in compiled ones: engines always switch it off."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@functools.cache
def _module(family: str, name: str) -> types.ModuleType:
    # fastkd.kernels is part of every installation: if it is missing, its ImportError must surface
    package = "kernels" if name == "triton" else "portable"
    return importlib.import_module(f"fastkd.{package}.{family}")


_SECOND_ORDER = (
    "{} is not implemented by fastkd's engines, their gradient is a constant of the graph. Put "
    '`with fastkd.backend("formula"):` around the loss to differentiate its definition instead.'
)
_BATCHED_BY_AUTOGRAD = (
    "torch.autograd.grad(is_grads_batched=True) and jacobian(vectorize=True) are not implemented "
    "by fastkd's engines. Use torch.func.jacrev or torch.func.vmap, or put "
    '`with fastkd.backend("formula"):` around the loss.'
)


class Engine:
    """The differentiable op of a family: ``engine(backend, *tensors, *scalars, *options)``.

    tensors   schema of the tensor arguments, for example "Tensor student, Tensor? labels"
    scalars   names of the numbers that vary at run time (floats or 0-dim tensors)
    options   schema of what selects code, for example "str divergence"
    rowwise   names of the tensors that start with the example dimensions: none, if the losses are
              of the batch as a whole
    n_losses  of `forward`
    n_trained of the tensors, the first ones: each gets a gradient

    The engine's modules have `forward`, `backward` and `allocate`, the empty outputs of `forward`:
    the losses, and the statistics that `backward` needs, which get no gradient. Where more than one
    tensor is trained, they have `allocate_gradients` too: one for each, of no elements for those
    that are not asked for.
    """

    def __init__(
        self,
        family: str,
        *,
        tensors: str,
        scalars: str = "",
        options: str,
        rowwise: Sequence[str] = (),
        n_losses: int = 1,
        n_trained: int = 1,
    ) -> None:
        self.family, self.n_losses, self.n_trained = family, n_losses, n_trained
        numbers = [f"Tensor {name.strip()}" for name in scalars.split(",") if name]
        self.n_scalars, self.n_options = len(numbers), len(options.split(","))
        names = [tensor.split()[-1] for tensor in tensors.split(",")]
        self.rowwise = [name in rowwise for name in names]
        arguments = ", ".join([tensors, *numbers, options, "str backend"])
        upstream = ", ".join(f"Tensor? upstream_{i}" for i in range(n_losses))
        outputs, gradients = (", ".join(["Tensor"] * n) for n in (n_losses + 1, n_trained))
        # the compiler's cache on disk knows an op by its name: another release, another name
        release = __version__.replace(".", "_")
        forward, backward = (f"{family}_{way}_{release}" for way in ("forward", "backward"))
        _library.define(f"{forward}({arguments}) -> ({outputs})")
        _library.define(f"{backward}({upstream}, Tensor statistics, {arguments}) -> ({gradients})")
        # `backward` has the upstream and the statistics before the arguments of `forward`
        for name, direction, first in (
            (forward, "forward", 0),
            (backward, "backward", n_losses + 1),
        ):
            _library.impl(
                name, functools.partial(_run, family, direction, first), "CompositeExplicitAutograd"
            )
        torch.library.register_fake(
            f"fastkd::{forward}",
            lambda *xs: _module(family, xs[-1]).allocate(*xs[:-1]),
            lib=_library,
        )
        torch.library.register_fake(
            f"fastkd::{backward}",
            lambda *xs: _empty_gradients(family, n_trained, xs[n_losses + 1 :]),
            lib=_library,
        )
        self.opaque_forward = getattr(torch.ops.fastkd, forward).default
        self.opaque_backward = getattr(torch.ops.fastkd, backward).default
        _engines[family] = self
        self._function, self._traced_function = _differentiable(
            family, self.rowwise, n_losses, n_trained
        )

    def __call__(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            traced = self._scalars_as_tensors((*arguments, backend))
            trained = arguments[: self.n_trained]
            if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in trained):
                return self._traced_function.apply(*traced)
            return self.opaque_forward(*traced)  # the compiler would call `forward` with a context
        if transforms_active():
            return self._function.apply(*arguments, backend)
        if not torch.is_grad_enabled():  # engines prepare a backward for what requires a gradient
            trained = arguments[: self.n_trained]
            detached = [None if x is None else x.detach() for x in trained]
            arguments = (*detached, *arguments[self.n_trained :])
        # what `apply` does without torch.func: binding the signature would cost more than a launch
        function: Any = super(torch.autograd.Function, self._function)
        return function.apply(*arguments, backend)

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        if _traced(arguments):
            return self.opaque_forward(*self._scalars_as_tensors(arguments))
        return _call(_module(self.family, arguments[-1]).forward, arguments[0], arguments)

    def backward(self, *arguments: Any) -> Any:
        if _traced(arguments):
            return self.opaque_backward(*self._scalars_as_tensors(arguments))
        trained = arguments[self.n_losses + 1]
        return _call(_module(self.family, arguments[-1]).backward, trained, arguments)

    def _scalars_as_tensors(self, arguments: Sequence[Any]) -> list[Any]:
        """Each a tensor of its own: the compiler would burn numbers in and refuses a tensor twice.

        A product, since torch.full burns its number in as well.
        """
        last = len(arguments) - self.n_options - 1
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        one = torch.ones((), dtype=torch.float64, device=device)
        return [
            one * x if last - self.n_scalars <= i < last else x for i, x in enumerate(arguments)
        ]


def _call(body: Callable, like: Tensor, arguments: Sequence[Any]) -> Any:
    """An engine's function; autograd is off here, in a Function and in a backward."""
    if like.device.type != "meta" and torch.is_autocast_enabled(like.device.type):
        with without_autocast(like.device):
            return body(*arguments[:-1])
    return body(*arguments[:-1])


def _run(family: str, direction: str, first: int, *arguments: Any) -> Any:
    """The body of an opaque op, which autograd does not see."""
    body = getattr(_module(family, arguments[-1]), direction)
    with torch.no_grad():
        plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        return _call(body, arguments[first], plain)


def _empty_gradients(family: str, n_trained: int, arguments: Sequence[Any]) -> Any:
    if n_trained > 1:
        return _module(family, arguments[-1]).allocate_gradients(*arguments[:-1])
    return torch.empty_like(arguments[0], memory_format=torch.contiguous_format)


def _traced(arguments: Sequence[Any]) -> bool:
    """Whether the op must be opaque: chunk loops are not to be inlined, fake data not computed."""
    if torch.compiler.is_compiling():
        return True
    for x in arguments:
        if isinstance(x, Tensor) and type(x) is not Tensor and type(x) is not torch.nn.Parameter:
            return True
    return False


def _made_for_inference(x: Any) -> bool:
    return isinstance(x, Tensor) and not torch.compiler.is_compiling() and x.is_inference()


def refuse_batches(*upstream: Tensor | None) -> None:
    for x in upstream:
        if x is not None and torch._C._functorch.is_legacy_batchedtensor(x):
            raise RuntimeError(_BATCHED_BY_AUTOGRAD)


class FirstOrder(torch.autograd.Function):
    """A backward as a node of its own: its derivative is an error, not a wrong number."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError(_SECOND_ORDER.format("Double backward"))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_SECOND_ORDER.format("Forward-mode AD"))


_engines: dict[str, Engine] = {}


def _differentiable(
    family: str, rowwise: Sequence[bool], n_losses: int, n_trained: int
) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """The function of a family for eager mode, and for torch.compile, which refuses any `jvp`.

    The compiler cannot see an Engine in a closure either: it is looked up by its family's name.
    """

    class Gradient(FirstOrder):
        @staticmethod
        def forward(*arguments: Any) -> Tensor:
            return _engines[family].backward(*arguments)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            rows = [any(rowwise)] * (n_losses + 1) + [*rowwise]
            gradients = _batched(Gradient, rows, info.batch_size, in_dims, arguments)
            return gradients, 0 if n_trained == 1 else (0,) * n_trained

    class TracedLoss(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return _engines[family].forward(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            statistics = output[-1]
            ctx.mark_non_differentiable(statistics)
            ctx.set_materialize_grads(False)
            tensors = inputs[: len(rowwise)]
            # what torch.inference_mode made, often a teacher's logits, cannot be saved: it is kept
            ctx.kept = [x if _made_for_inference(x) else None for x in tensors]
            tensors = [
                x if kept is None else None for x, kept in zip(tensors, ctx.kept, strict=True)
            ]
            ctx.save_for_backward(statistics, *tensors)
            ctx.scalars_and_options = inputs[len(rowwise) :]

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            statistics, *tensors = ctx.saved_tensors
            tensors = [
                x if kept is None else kept for x, kept in zip(tensors, ctx.kept, strict=True)
            ]
            # the compiler fills in zeros, even for rows (..., 0) that were not asked for
            rank = tensors[0].ndim
            upstream = tuple(None if x is None or x.ndim == rank else x for x in upstream[:-1])
            nothing = [None] * (len(rowwise) + len(ctx.scalars_and_options) - n_trained)
            if all(x is None for x in upstream):
                return *[None] * n_trained, *nothing
            gradient = _engines[family].backward
            # grad mode is on in a backward only under create_graph=True, and vmap may map over it
            eager = not torch.compiler.is_compiling()
            if eager:
                refuse_batches(*upstream)
            if eager and (torch.is_grad_enabled() or transforms_active()):
                gradient = Gradient.apply
            found = gradient(*upstream, statistics, *tensors, *ctx.scalars_and_options)
            if n_trained == 1:
                return found, *nothing
            wanted = ctx.needs_input_grad[:n_trained]
            return *(x if w else None for x, w in zip(found, wanted, strict=True)), *nothing

        @staticmethod
        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            outputs = _batched(Loss, rowwise, info.batch_size, in_dims, arguments)
            return outputs, (0,) * (n_losses + 1)

    class Loss(TracedLoss):
        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(_SECOND_ORDER.format("Forward-mode AD"))

    Loss.__name__ = Loss.__qualname__ = family.capitalize()
    Loss._backward_cls.__name__ = f"{Loss.__name__}Backward"  # the name of the grad_fn
    return Loss, TracedLoss


def _batched(
    function: Any, rowwise: Sequence[bool], size: int, in_dims: Any, arguments: Any
) -> Any:
    """vmap: one call with one more example dimension, or a call each where that cannot be."""
    rows = [i < len(rowwise) and rowwise[i] for i in range(len(arguments))]
    one_call = all(row or dim is None for row, dim in zip(rows, in_dims, strict=True))
    front = [
        x if dim is None else x.movedim(dim, 0) for x, dim in zip(arguments, in_dims, strict=True)
    ]
    if one_call:
        return function.apply(
            *(
                x.expand(size, *x.shape) if row and dim is None and isinstance(x, Tensor) else x
                for x, row, dim in zip(front, rows, in_dims, strict=True)
            )
        )
    calls = [
        function.apply(*(x if dim is None else x[i] for x, dim in zip(front, in_dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls)
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))
