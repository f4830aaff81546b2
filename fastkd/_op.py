"""Differentiable ops, made from problems, which are NamedTuples, and solved by engines.

The annotations of a problem are the one list of its arguments. The op's schema, its outputs under
torch.compile and its autograd functions are made from them, so that a problem works in eager mode,
under torch.compile, torch.func, vmap and autocast without a line of its own.

The engines of a problem in `fastkd/problems/<name>.py` are the modules `fastkd.portable.<name>` for
any device and `fastkd.kernels.<name>.launch` for a GPU. Both have

    value_and_gradients(problem, needs_grad) -> loss, gradients of the trained fields

whose gradients the forward keeps and the backward multiplies by the upstream gradient. A problem
whose gradient is as large as its input and cheap to compute again has besides

    forward(problem, needs_grad) -> losses, saved       what its engine likes to keep
    backward(problem, saved, upstream) -> gradients
    n_statistics(problem) -> how many numbers for each example `saved` has without needs_grad
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._backend import transforms_active
from fastkd._version import __version__

Number = float | Tensor

_library = torch.library.Library("fastkd", "DEF")
_ops: dict[str, Op] = {}
_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Number: "Tensor",  # the compiler would specialise on the value of a float
    str: "str",
    int: "int",
    bool: "bool",
}
# what an engine computes with at once; fake tensors, DTensors and symbolic numbers are traced
_PLAIN = {Tensor, torch.nn.Parameter, float, int, bool, str, type(None)}
_SECOND_ORDER = (
    "{} is not implemented by fastkd's engines, their gradient is a constant of the graph. Put "
    '`with fastkd.backend("formula"):` around the loss to differentiate its definition instead.'
)
_BATCHED_BY_AUTOGRAD = (
    "torch.autograd.grad(is_grads_batched=True) and jacobian(vectorize=True) are not implemented "
    "by fastkd's engines. Use torch.func.jacrev or torch.func.vmap, or put "
    '`with fastkd.backend("formula"):` around the loss.'
)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if a tensor is float64, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a gradient may be asked for; under torch.func one cannot know."""
    if not torch.is_grad_enabled():
        return False
    return tensor.requires_grad or (not torch.compiler.is_compiling() and transforms_active())


def without_autocast(device: torch.device) -> Any:
    """Return a context without autocast, which is on in eager bodies and off in compiled ones."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def is_inference(x: Any) -> bool:
    """Return whether torch.inference_mode made a tensor: autograd cannot save it."""
    return isinstance(x, Tensor) and not torch.compiler.is_compiling() and x.is_inference()


class Op:
    """The differentiable op of a problem: ``op(engine, problem)`` returns its loss or losses.

    Args:
        problem: The NamedTuple. Its fields are tensors, numbers, which vary at run time, and
            options, which select code.
        trained: The fields that get a gradient, the first of which is always there.
        losses: One entry for each loss: the field that it needs, or None if it is always there. A
            loss whose field is None has the shape (..., 0).
        per_example: Whether a loss has one value for each example. All tensors of the problem then
            start with the example dimensions, which are those of the first trained field but its
            last one.
        recomputes: Whether the engines have `forward` and `backward`.
    """

    def __init__(
        self,
        problem: type,
        *,
        trained: Sequence[str],
        losses: Sequence[str | None] = (None,),
        per_example: bool = False,
        recomputes: bool = False,
    ) -> None:
        kinds = typing.get_type_hints(problem)
        fields: tuple[str, ...] = problem._fields  # type: ignore[attr-defined]
        self.problem, self.recomputes = problem, recomputes
        self.losses = [None if name is None else fields.index(name) for name in losses]
        self.per_example, self.n_losses = per_example, len(losses)
        self.module, self.name = problem.__module__.rpartition(".")[2], problem.__name__.lower()
        self.n_arguments = len(fields) + len(trained) + 1
        self.trained = [fields.index(name) for name in trained]
        self.numbers = [i for i, name in enumerate(fields) if kinds[name] == Number]
        tensors = [i for i, x in enumerate(fields) if kinds[x] in (Tensor, Tensor | None)]
        # a recomputed gradient needs all tensors; autograd notices if a saved one is overwritten
        self.saved_fields = tensors if recomputes else self.trained
        self.rowwise = [per_example and i in tensors for i in range(self.n_arguments)]
        self._register([f"{_SCHEMA[kinds[x]]} {x}" for x in fields], trained)
        _ops[self.name] = self
        self._eager, self._mapped, self._traced = _differentiable(self.name)

    def __call__(self, engine: str, problem: Any) -> Any:
        """Solve the problem with the engine "portable" or "triton"."""
        fields = [problem[i] for i in self.trained]
        needs_grad = [x is not None and is_differentiated(x) for x in fields]
        arguments = (*problem, *needs_grad, engine)
        if torch.compiler.is_compiling():
            # the compiler would call `forward` with a context where nothing is trained
            traced = self._traced.apply if any(needs_grad) else self.opaque_forward
            outputs = traced(*self._numbers_as_tensors(arguments))
        elif transforms_active():
            outputs = self._mapped.apply(*arguments)
        else:
            # this is what `apply` does without torch.func: to bind a signature costs a launch
            function: Any = super(torch.autograd.Function, self._eager)
            outputs = function.apply(*arguments)
        return outputs[0] if self.n_losses == 1 else outputs[: self.n_losses]

    # --------------------------------------------------------------- what autograd functions call

    def forward(self, *arguments: Any) -> tuple[Any, ...]:
        """Return the losses and what the backward wants, None in place of what is not there."""
        if _is_traced(arguments):
            return self.opaque_forward(*self._numbers_as_tensors(arguments))
        problem, needs_grad, engine = self._read(arguments)
        if self.recomputes:
            losses, saved = engine.forward(problem, needs_grad)
            return *losses, *saved
        loss, gradients = engine.value_and_gradients(problem, needs_grad)
        return loss, *gradients

    def backward(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients from the upstream ones, what the forward saved and its arguments."""
        start = len(arguments) - self.n_arguments
        upstream, saved = arguments[: self.n_losses], arguments[self.n_losses : start]
        fields = arguments[start:]
        if not self.recomputes:
            gradients = zip(saved, self.trained, strict=True)
            return tuple(_scaled(gradient, upstream[0], fields[i]) for gradient, i in gradients)
        if _is_traced((*upstream, *fields)):
            found = self.opaque_backward(*upstream, *saved, *self._numbers_as_tensors(fields))
            return (found,) if isinstance(found, Tensor) else found
        problem, _, engine = self._read(fields)
        with without_autocast(fields[self.trained[0]].device):
            return engine.backward(problem, saved, upstream)

    def _read(self, arguments: Sequence[Any]) -> tuple[Any, Sequence[bool], types.ModuleType]:
        """Return the problem, which trained fields need a gradient, and the engine."""
        n = self.n_arguments - len(self.trained) - 1
        return self.problem(*arguments[:n]), arguments[n:-1], _engine(self.module, arguments[-1])

    # ------------------------------------------------------------------ what torch.compile sees

    def _register(self, fields: list[str], trained: Sequence[str]) -> None:
        """Define the opaque ops, which are not traced into, and the outputs that they announce."""
        # the compiler's cache on disk knows an op by its name, so another release has another name
        name = f"{self.name}_{{}}_{__version__.replace('.', '_')}"
        arguments = ", ".join([*fields, *(f"bool needs_{x}" for x in trained), "str engine"])
        n_saved = 1 if self.recomputes else len(trained)
        outputs = ", ".join(["Tensor"] * (self.n_losses + n_saved))
        self.opaque_forward = _opaque(
            name.format("forward"), f"({arguments}) -> ({outputs})", self._run, self._fake
        )
        if self.recomputes:
            upstream = ", ".join(f"Tensor? upstream_{i}" for i in range(self.n_losses))
            gradients = ", ".join(["Tensor"] * len(trained))
            self.opaque_backward = _opaque(
                name.format("backward"),
                f"({upstream}, Tensor saved, {arguments}) -> ({gradients})",
                self._run_backward,
                self._fake_backward,
            )

    def _run(self, *traced: Any) -> tuple[Tensor, ...]:
        arguments, n_trained = _detached(traced), len(self.trained)
        if self.recomputes:  # the compiler must know what is saved: statistics
            arguments[-1 - n_trained : -1] = [False] * n_trained
        # autocast is off where an eager loss is solved, but may be on in a compiled graph
        with torch.no_grad(), without_autocast(arguments[self.trained[0]].device):
            return self._without_none(arguments, self.forward(*arguments))

    def _run_backward(self, *traced: Any) -> Any:
        with torch.no_grad():
            found = self.backward(*_detached(traced))
        return found if len(found) > 1 else found[0]

    def _without_none(self, arguments: Sequence[Any], outputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """Return the outputs of a solution with an empty tensor for each that is not there."""
        examples = arguments[self.trained[0]].shape[:-1] if self.per_example else ()
        return tuple(
            outputs[0].new_empty((*examples, 0) if i < self.n_losses else 0) if x is None else x
            for i, x in enumerate(outputs)
        )

    def _fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        problem, needs_grad, engine = self._read(arguments)
        like = problem[self.trained[0]]
        wide = [x for x in problem if isinstance(x, Tensor) and x.ndim]
        new = functools.partial(like.new_empty, dtype=compute_dtype(*wide))
        examples = like.shape[:-1] if self.per_example else like.shape[:0]
        absent = [field is not None and problem[field] is None for field in self.losses]
        losses = [new((*examples, 0) if gone else examples) for gone in absent]
        if self.recomputes:
            return *losses, new((*examples, engine.n_statistics(problem)))
        gradients = zip(self.trained, needs_grad, strict=True)
        return *losses, *(new(problem[i].shape if needed else 0) for i, needed in gradients)

    def _fake_backward(self, *arguments: Any) -> Any:
        fields = arguments[len(arguments) - self.n_arguments :]
        found = [_contiguous_like(fields[i]) for i in self.trained]
        return tuple(found) if len(found) > 1 else found[0]

    def _numbers_as_tensors(self, arguments: Sequence[Any]) -> list[Any]:
        """Return the arguments with a new tensor in place of each number.

        The compiler would specialise on numbers, and it refuses a tensor that is passed twice. A
        product makes the tensor, because torch.full would be specialised as well.
        """
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        one = torch.ones((), dtype=torch.float64, device=device)
        return [one * x if i in self.numbers else x for i, x in enumerate(arguments)]


def _opaque(name: str, schema: str, body: Callable, fake: Callable) -> Any:
    _library.define(name + schema)
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastkd::{name}", fake, lib=_library)
    return getattr(torch.ops.fastkd, name).default


@functools.cache
def _engine(problem: str, name: str) -> types.ModuleType:
    # fastkd.kernels is part of every installation: if it is missing, its ImportError must surface
    path = f"kernels.{problem}.launch" if name == "triton" else f"portable.{problem}"
    return importlib.import_module(f"fastkd.{path}")


def _detached(arguments: Sequence[Any]) -> list[Any]:
    return [x.detach() if isinstance(x, Tensor) else x for x in arguments]


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _scaled(gradient: Tensor | None, upstream: Tensor, field: Tensor | None) -> Tensor | None:
    """Return upstream · gradient in the dtype of the field; `gradient` if it is not there."""
    if field is None or gradient is None or not gradient.numel():
        return gradient
    if upstream.ndim:
        upstream = upstream[(..., *[None] * (gradient.ndim - upstream.ndim))]
    if gradient.dtype == field.dtype:
        return gradient * upstream
    if torch.compiler.is_compiling() or type(gradient) is not Tensor:
        return (gradient * upstream).to(field.dtype)
    # one pass over memory multiplies and rounds
    return torch.mul(gradient, upstream, out=_contiguous_like(field))


def _is_traced(arguments: Sequence[Any]) -> bool:
    """Return whether the op must be opaque: chunk loops are not traced, fake data not computed."""
    return torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, arguments))


class _FirstOrder(torch.autograd.Function):
    """A backward as a node of its own, whose derivative is an error instead of a wrong number."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError(_SECOND_ORDER.format("Double backward"))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_SECOND_ORDER.format("Forward-mode AD"))


def _keep(ctx: Any, op: Op, arguments: Sequence[Any], saved: Sequence[Tensor]) -> None:
    """Save for the backward what the forward made, the tensors that it needs, and the rest."""
    # tensors that the backward does not need are not kept alive
    rest = [None if isinstance(x, Tensor) else x for x in arguments]
    for i in op.numbers:
        rest[i] = arguments[i]
    fields = []
    needs_grad = dict(zip(op.trained, arguments[-1 - len(op.trained) : -1], strict=True))
    for i in op.saved_fields:
        # a gradient that is there already needs its field alone, the dtype of which it gets
        field = arguments[i] if op.recomputes or needs_grad[i] else None
        # an inference tensor, often a teacher's logits, cannot be saved: the context keeps it
        if is_inference(field):
            field, rest[i] = None, field
        fields.append(field)
    ctx.save_for_backward(*saved, *fields)
    ctx.set_materialize_grads(False)
    ctx.rest = rest


def _gradients(ctx: Any, op: Op, gradient_node: Any, upstream: Sequence[Any]) -> Any:
    """Return the gradients of all arguments, None for those that have none."""
    tensors = ctx.saved_tensors
    n_saved = len(tensors) - len(op.saved_fields)
    saved, fields = tensors[:n_saved], tensors[n_saved:]
    arguments, gradients = [*ctx.rest], [None] * op.n_arguments
    for i, x in zip(op.saved_fields, fields, strict=True):
        if x is not None:
            arguments[i] = x
    # the compiler fills in zeros even for a loss of no elements
    upstream = [
        None if field is not None and arguments[field] is None else x
        for field, x in zip(op.losses, upstream[: op.n_losses], strict=True)
    ]
    if all(x is None for x in upstream):
        return tuple(gradients)
    backward: Callable[..., Any] = op.backward
    # grad mode is on in a backward only under create_graph=True, and vmap may map over it
    if not torch.compiler.is_compiling():
        if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in upstream):
            raise RuntimeError(_BATCHED_BY_AUTOGRAD)
        if torch.is_grad_enabled() or transforms_active():
            backward = gradient_node.apply
    found = backward(*upstream, *saved, *arguments)
    for i, x in zip(op.trained, found, strict=True):
        gradients[i] = x if ctx.needs_input_grad[i] else None
    return tuple(gradients)


def _differentiable(name: str) -> tuple[type[torch.autograd.Function], ...]:
    """Return the functions of an op for eager mode, for torch.func and for torch.compile.

    In eager mode the losses are the only outputs, which saves time; torch.func wants all that is
    saved among them; torch.compile refuses any `jvp`. All look the op up by its name, because the
    compiler cannot see an Op in a closure.
    """

    class Gradient(_FirstOrder):
        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            found = _ops[name].backward(*arguments)
            like = next(x for x in found if x is not None)
            return tuple(like.new_empty(0) if x is None else x for x in found)  # vmap maps tensors

        @staticmethod
        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            op = _ops[name]
            n_before = len(arguments) - op.n_arguments
            rowwise = [op.per_example] * n_before + op.rowwise
            return _batched(Gradient, rowwise, info.batch_size, in_dims, arguments)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            op = _ops[name]
            outputs = op.forward(*arguments)
            _keep(ctx, op, arguments, outputs[op.n_losses :])
            return outputs[: op.n_losses]

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            return _gradients(ctx, _ops[name], Gradient, upstream)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(_SECOND_ORDER.format("Forward-mode AD"))

    class Traced(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            op = _ops[name]
            return op._without_none(arguments, op.forward(*arguments))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            op = _ops[name]
            saved = output[op.n_losses :]
            ctx.mark_non_differentiable(*saved)
            _keep(ctx, op, inputs, saved)

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            return _gradients(ctx, _ops[name], Gradient, upstream)

    class Mapped(Traced):
        @staticmethod
        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            return _batched(Mapped, _ops[name].rowwise, info.batch_size, in_dims, arguments)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(_SECOND_ORDER.format("Forward-mode AD"))

    for function in (Eager, Mapped):  # the name of the grad_fn
        function.__name__ = function.__qualname__ = name.capitalize()
        function._backward_cls.__name__ = f"{function.__name__}Backward"  # type: ignore[attr-defined]
    return Eager, Mapped, Traced


def _batched(
    function: Any, rowwise: Sequence[bool], size: int, in_dims: Any, arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Map over a dimension by one call with one more example dimension, or else by a call each."""
    one_call = all(row or dim is None for row, dim in zip(rowwise, in_dims, strict=True))
    front = [
        x if dim is None else x.movedim(dim, 0) for x, dim in zip(arguments, in_dims, strict=True)
    ]
    if one_call:
        outputs = function.apply(
            *(
                x.expand(size, *x.shape) if row and dim is None and isinstance(x, Tensor) else x
                for x, row, dim in zip(front, rowwise, in_dims, strict=True)
            )
        )
    else:
        calls = [
            function.apply(
                *(x if dim is None else x[i] for x, dim in zip(front, in_dims, strict=True))
            )
            for i in range(size)
        ]
        outputs = tuple(torch.stack(results) for results in zip(*calls, strict=True))
    return outputs, (0,) * len(outputs)
