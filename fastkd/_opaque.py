"""Custom ops, which torch.compile does not trace into, for the forward and backward of an `Op`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd._precision import compute_dtype, without_autocast
from fastkd._version import __version__

if TYPE_CHECKING:
    from fastkd._op import Op

_library = torch.library.Library("fastkd", "DEF")
_SCHEMA = {
    Tensor: "Tensor",
    tuple[Tensor | None, ...]: "int",  # a list's length: its tensors stand before the fields
    Tensor | None: "Tensor?",
    float | Tensor: "Tensor",  # the compiler would specialise on the value of a float
    str: "str",
    int: "SymInt",  # an int would be specialised on, too
    bool: "bool",
}


class OpaqueOps:
    """The custom ops of an `Op`: its forward and, if it recomputes, its backward.

    Args:
        op: The op whose outputs and gradients they return.
        fields: The annotations of the problem's fields.
        trained: The fields that get a gradient.
    """

    def __init__(self, op: Op, fields: Mapping[str, Any], trained: Sequence[str]) -> None:
        self.op = op
        # the compiler's cache on disk knows an op by its name, so another release has another name
        name = f"{op.name}_{{}}_{__version__.replace('.', '_')}"
        schema = [f"{_SCHEMA[kind]} {field}" for field, kind in fields.items()]
        schema = ["Tensor?[] of_lists"] * bool(op.lists) + schema
        arguments = ", ".join([*schema, *(f"bool needs_{x}" for x in trained), "str engine"])
        n_saved = 1 if op.recomputes else op.reports + len(trained)
        outputs = ", ".join(["Tensor"] * (op.n_losses + n_saved))
        self.forward = _define(
            name.format("forward"), f"({arguments}) -> ({outputs})", self._forward, self._outputs
        )
        if op.recomputes:
            upstream = ", ".join(f"Tensor? upstream_{i}" for i in range(op.n_losses))
            gradients = ", ".join(["Tensor"] * len(trained))
            self.backward = _define(
                name.format("backward"),
                f"({upstream}, Tensor statistics, {arguments}) -> ({gradients})",
                self._backward,
                self._gradients,
            )

    def apply_forward(self, *arguments: Any) -> Any:
        """Return what the op of the forward returns."""
        return self.forward(*self.listed(arguments))

    def apply_backward(self, *arguments: Any) -> Any:
        """Return what the op of the backward returns."""
        return self.backward(*self.listed(arguments))

    def listed(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """Return the arguments with the tensors of lists in one list, as the ops take them."""
        if not self.op.lists:
            return arguments
        start = len(arguments) - self.op.n_arguments
        first = start - self.op.n_listed(arguments)
        return *arguments[:first], [*arguments[first:start]], *arguments[start:]

    def _unlisted(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        if not self.op.lists:
            return tuple(arguments)
        start = len(arguments) - self.op.n_arguments
        return *arguments[: start - 1], *arguments[start - 1], *arguments[start:]

    def numbers_as_tensors(self, arguments: Sequence[Any]) -> list[Any]:
        """Return the arguments with a new tensor in place of each number and each second mention.

        The compiler would specialise on numbers, and it refuses a tensor that is passed twice, as a
        head that both networks share. A product makes the tensor, because torch.full would be
        specialised as well.
        """
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        wide = any(x.dtype == torch.float64 and x.ndim for x in tensors)
        # some devices have no float64
        dtype = torch.float64 if wide else torch.float32
        one = torch.ones((), dtype=dtype, device=tensors[0].device)
        found: list[Any] = []
        start = len(arguments) - self.op.n_arguments
        for i, x in enumerate(arguments, -start):
            if i in self.op.numbers:
                x = one * x
            elif isinstance(x, Tensor) and any(x is y for y in found):
                x = x.view_as(x)
            found.append(x)
        return found

    def solve(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Return what `Op.forward` returns, with an empty tensor for each that is not there."""
        op = self.op
        if op.recomputes:  # the compiler must know what is saved: statistics
            n = len(op.trained)
            arguments = (*arguments[: -n - 1], *[False] * n, arguments[-1])
        outputs = op.forward(*arguments)
        examples = arguments[len(arguments) - op.n_arguments + op.trained[0]].shape[op.examples]
        return tuple(
            outputs[0].new_empty((*examples, 0) if i < op.n_losses else 0) if x is None else x
            for i, x in enumerate(outputs)
        )

    def _forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        arguments = self._unlisted(arguments)
        device = arguments[len(arguments) - self.op.n_arguments + self.op.trained[0]].device
        # autocast is off where an eager loss is solved, but may be on in a compiled graph
        with torch.no_grad(), without_autocast(device):
            return self.solve(*_detached(arguments))

    def _backward(self, *arguments: Any) -> Any:
        arguments = self._unlisted(arguments)
        with torch.no_grad():
            found = self.op.backward(*_detached(arguments))
        if len(found) == 1:
            return found[0]
        like = arguments[len(arguments) - self.op.n_arguments + self.op.trained[0]]
        return tuple(like.new_empty(0) if x is None else x for x in found)

    def _outputs(self, *arguments: Any) -> tuple[Tensor, ...]:
        op = self.op
        problem, needs_grad, engine = op.read(self._unlisted(arguments))
        like = problem[op.trained[0]]
        if hasattr(engine, "compute_dtype_of"):  # which knows fields that do not widen it
            dtype = engine.compute_dtype_of(problem)
        else:
            dtype = compute_dtype(*(x for x in problem if isinstance(x, Tensor) and x.ndim))
        new = functools.partial(like.new_empty, dtype=dtype)
        examples = like.shape[op.examples]
        absent = [field is not None and problem[field] is None for field in op.losses]
        losses = [new((*examples, 0) if gone else examples) for gone in absent]
        if op.recomputes or op.reports:
            losses.append(new((*like.shape[:-1], engine.n_statistics(problem))))
        if op.recomputes:
            return tuple(losses)
        gradients = zip(op.trained, needs_grad, strict=True)
        return *losses, *(new(problem[i].shape if needed else 0) for i, needed in gradients)

    def _gradients(self, *arguments: Any) -> Any:
        op, start = self.op, len(arguments) - self.op.n_arguments
        kept = torch.preserve_format if op.keeps_strides else torch.contiguous_format
        needs_grad = arguments[start + op.n_fields : -1]
        fields = [arguments[start + i] for i in op.trained]
        if len(fields) == 1:
            return torch.empty_like(fields[0], memory_format=kept)
        return tuple(
            torch.empty_like(x, memory_format=kept) if needed else fields[0].new_empty(0)
            for x, needed in zip(fields, needs_grad, strict=True)
        )


def _define(name: str, schema: str, body: Callable, fake: Callable) -> Any:
    """Define a custom op with its body and the outputs that it announces, and return it."""
    _library.define(name + schema)
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastkd::{name}", fake, lib=_library)
    return getattr(torch.ops.fastkd, name).default


def _detached(arguments: Sequence[Any]) -> list[Any]:
    return [x.detach() if isinstance(x, Tensor) else x for x in arguments]
