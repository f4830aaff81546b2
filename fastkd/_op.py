"""Differentiable ops, made from problems, which are NamedTuples, and solved by engines.

The annotations of a problem are the one list of its arguments. The op's schema, its outputs under
torch.compile and its autograd functions are made from them, so that a problem works in eager mode,
under torch.compile, torch.func, vmap and autocast without a line of its own.

The engines of a problem in `fastkd/problems/<name>.py` are the modules `fastkd.portable.<name>` for
any device and `fastkd.kernels.<name>.launch` for a GPU. Both have

    value_and_gradients(problem, needs_grad) -> loss, gradients of the trained fields

whose gradients the forward keeps and the backward multiplies by the upstream gradient. A problem
whose gradient is as large as its input and cheap to compute again has besides

    forward(problem, needs_grad) -> losses, (statistics, *gradients)
        either statistics for `backward`, or None and the gradient of each loss in the trained
        field, or both statistics and the gradient for upstream gradients that the problem foresees
    backward(problem, statistics, upstream, *gradients) -> gradient of the trained field
        it may return the foreseen gradient, overwritten: the first backward alone gets that, and
        is not even called on a CPU if the upstream gradient is the problem's `row_weight`; in its
        place there may be whole numbers, for any upstream gradient
    n_statistics(problem) -> how many numbers for each example the statistics have; without
        needs_grad there are statistics

An engine may report numbers of each row that get no gradient, which the op returns after its
losses: then `value_and_gradients` returns (loss, report) in place of the loss, and the statistics
of `forward` are the report. Where several fields are trained, `backward` takes needs_grad in place
of the gradients, and returns a tuple; gradients that are foreseen come after it.

A problem may have lists of tensors, as of several teachers, which get no gradient. Autograd sees
tensors among the arguments alone, so that those of the lists stand before all fields, in which a
list is its length.

An engine whose compute dtype some of its tensors do not widen, such as weights, has
`compute_dtype_of(problem)`. Kernels that are no gain for some problems have `takes(problem)`, which
is False for those that the portable engine solves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
import typing
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._backend import transforms_active
from fastkd._functions import differentiable, ops
from fastkd._opaque import OpaqueOps
from fastkd._precision import without_autocast

Number = float | Tensor
Tensors = tuple[Tensor | None, ...]  # a list of a problem

# autograd has a look at every operation that it could record, although an engine needs none
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)
# what an engine computes with at once; fake tensors, DTensors and symbolic numbers are traced
_PLAIN = {Tensor, torch.nn.Parameter, float, int, bool, str, type(None)}


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a gradient may be asked for; under torch.func one cannot know."""
    if not torch.is_grad_enabled():
        return False
    return tensor.requires_grad or (not torch.compiler.is_compiling() and transforms_active())


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
            last one, or with a number −n but its last n.
        shared: The tensors that all examples share, and which therefore have no such dimensions.
        recomputes: Whether the engines have `forward` and `backward`.
        reports: Whether the engines report numbers of each row, (..., n_statistics(problem)).
        keeps_strides: Whether the gradient of `backward` is laid out as `torch.empty_like` lays out
            what is like the field; otherwise it is contiguous.
    """

    def __init__(
        self,
        problem: type,
        *,
        trained: Sequence[str],
        losses: Sequence[str | None] = (None,),
        per_example: bool | int = False,
        shared: Sequence[str] = (),
        recomputes: bool = False,
        reports: bool = False,
        keeps_strides: bool = False,
    ) -> None:
        kinds = typing.get_type_hints(problem)
        fields: tuple[str, ...] = problem._fields  # type: ignore[attr-defined]
        self.problem, self.recomputes, self.per_example = problem, recomputes, bool(per_example)
        self.examples = slice(-1 if per_example is True else int(per_example))  # of the dimensions
        self.keeps_strides, self.reports = keeps_strides, reports
        self.losses = [None if name is None else fields.index(name) for name in losses]
        self.n_losses, self.n_fields = len(losses), len(fields)
        self.n_outputs = self.n_losses + reports
        # a report that the backward takes is saved too
        self.n_before_saved = self.n_losses if recomputes else self.n_outputs
        self.module, self.name = problem.__module__.rpartition(".")[2], problem.__name__.lower()
        self.n_arguments = len(fields) + len(trained) + 1
        self.trained = [fields.index(name) for name in trained]
        self.row_weight = fields.index("row_weight") if "row_weight" in fields else None
        self.row_mask = fields.index("row_mask") if "row_mask" in fields else None
        self.numbers = [i for i, name in enumerate(fields) if kinds[name] == Number]
        self.tensors = [i for i, x in enumerate(fields) if kinds[x] in (Tensor, Tensor | None)]
        self.lists = [i for i, name in enumerate(fields) if kinds[name] == Tensors]
        of_examples = [
            i for i in (*self.tensors, *self.lists) if per_example and fields[i] not in shared
        ]
        self.rowwise = [i in of_examples for i in range(self.n_arguments)]
        # a gradient that all examples share is a sum over them
        self.maps_gradients = all(self.rowwise[i] for i in self.trained)
        self.opaque = OpaqueOps(self, {name: kinds[name] for name in fields}, trained)
        ops[self.name] = self
        self._eager, self._mapped, self._traced = differentiable(self.name)

    def __call__(self, engine: str, problem: Any) -> Any:
        """Solve the problem with the engine "portable" or "triton"."""
        is_compiled = torch.compiler.is_compiling()
        is_mapped = not is_compiled and transforms_active()
        is_trained = torch.is_grad_enabled()
        fields = [problem[i] for i in self.trained]
        needs_grad = [  # under torch.func one cannot know
            is_trained and x is not None and (x.requires_grad or is_mapped) for x in fields
        ]
        arguments = (*self._unlisted(problem), *needs_grad, engine)
        if is_compiled:
            # the compiler would call `forward` with a context where nothing is trained
            traced = self._traced.apply if any(needs_grad) else self.opaque.apply_forward
            outputs = traced(*self.opaque.numbers_as_tensors(arguments))
        elif is_mapped:
            outputs = self._mapped.apply(*arguments)
        else:
            # this is what `apply` does without torch.func: to bind a signature costs a launch
            function: Any = super(torch.autograd.Function, self._eager)
            outputs = function.apply(*arguments)
        return outputs[0] if self.n_outputs == 1 else outputs[: self.n_outputs]

    def forward(self, *arguments: Any) -> tuple[Any, ...]:
        """Return the losses and what the backward wants, None in place of what is not there."""
        if _is_traced(arguments):
            return self.opaque.apply_forward(*self.opaque.numbers_as_tensors(arguments))
        problem, needs_grad, engine = self.read(arguments)
        with _below_autograd():
            if self.recomputes:
                losses, saved = engine.forward(problem, needs_grad)
                return *losses, *saved
            found, gradients = engine.value_and_gradients(problem, needs_grad)
        return (*found, *gradients) if self.reports else (found, *gradients)

    def backward(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients from the upstream ones, what the forward saved and its arguments."""
        start = len(arguments) - self.n_arguments
        fields, first = arguments[start:], start - self.n_listed(arguments)
        upstream, saved = arguments[: self.n_losses], arguments[self.n_losses : first]
        if not self.recomputes:
            pairs = zip(saved, self.trained, strict=True)
            return tuple(_scaled([gradient], upstream, fields[i]) for gradient, i in pairs)
        statistics, *gradients = saved
        if statistics is None:
            return (_scaled(gradients, upstream, fields[self.trained[0]]),)
        if _is_traced((*upstream, *arguments[first:])):
            traced = self.opaque.numbers_as_tensors(arguments[first:])
            found = self.opaque.apply_backward(*upstream, statistics, *traced)
            return (found,) if isinstance(found, Tensor) else found
        problem, needs_grad, engine = self.read(arguments)
        with without_autocast(fields[self.trained[0]].device), _below_autograd():
            if len(self.trained) > 1:
                return engine.backward(problem, statistics, upstream, needs_grad, *gradients)
            return (engine.backward(problem, statistics, upstream, *gradients),)

    def is_foreseen(
        self,
        fields: Sequence[Any],
        upstream: Sequence[Tensor | None],
        kept: Sequence[Tensor | None],
    ) -> bool:
        """Return whether gradients are kept, and for these upstream ones.

        Elsewhere than on a CPU that is not known, because to look at them would be a host sync, and
        a kernel looks by itself.
        """
        first, *others = upstream
        is_looked_at = first is not None and first.is_cpu and fields[-1] == "portable"
        if self.row_weight is None or not is_looked_at:
            return False
        if any(x is not None for x in others):
            return False
        if any(x is not None and not x.is_floating_point() for x in kept):
            return False
        is_met = first == fields[self.row_weight]
        mask = None if self.row_mask is None else fields[self.row_mask]
        # rows that do not count have no gradient, whatever their upstream one
        return bool((is_met if mask is None else is_met | ~mask).all())

    def read(self, arguments: Sequence[Any]) -> tuple[Any, Sequence[bool], types.ModuleType]:
        """Return the problem, which trained fields need a gradient, and the engine."""
        start = len(arguments) - self.n_arguments
        fields, end = [*arguments[start : start + self.n_fields]], start - self.n_listed(arguments)
        for i in self.lists:
            first, end = end, end + fields[i]
            fields[i] = arguments[first:end]
        problem, engine = self.problem(*fields), _engine(self.module, arguments[-1])
        if hasattr(engine, "takes") and not engine.takes(problem):
            engine = _engine(self.module, "portable")
        return problem, arguments[start + self.n_fields : -1], engine

    def n_listed(self, arguments: Sequence[Any]) -> int:
        """Return how many tensors of lists stand before the fields."""
        start = len(arguments) - self.n_arguments
        return sum(arguments[start + i] for i in self.lists)

    def are_rowwise(self, arguments: Sequence[Any]) -> list[bool]:
        """Return which of the arguments of `forward` have a row for each example."""
        fields = arguments[len(arguments) - self.n_arguments :]
        return [*(self.rowwise[i] for i in self.lists for _ in range(fields[i])), *self.rowwise]

    def _unlisted(self, problem: Any) -> Sequence[Any]:
        """Return the tensors of the lists and the fields, with the length of each list."""
        if not self.lists:
            return problem
        listed = [x for i in self.lists for x in problem[i]]
        return *listed, *(len(x) if i in self.lists else x for i, x in enumerate(problem))


@functools.cache
def _engine(problem: str, name: str) -> types.ModuleType:
    # fastkd.kernels is part of every installation: if it is missing, its ImportError must surface
    path = f"kernels.{problem}.launch" if name == "triton" else f"portable.{problem}"
    return importlib.import_module(f"fastkd.{path}")


def _scaled(
    gradients: Sequence[Tensor | None], upstream: Sequence[Tensor | None], field: Tensor | None
) -> Tensor | None:
    """Return Σ upstream · gradient in the dtype of the field, or None without a gradient."""
    total = None
    for gradient, factor in zip(gradients, upstream, strict=True):
        if gradient is None or factor is None:
            continue
        if field is None or not gradient.numel():
            return gradient
        for _ in range(gradient.ndim - factor.ndim if factor.ndim else 0):
            factor = factor.unsqueeze(-1)
        if len(gradients) == 1 and field.dtype != gradient.dtype and not _is_traced([gradient]):
            # rounded as it is written, because a head has no room for another one in float32
            if not transforms_active():
                return torch.mul(
                    gradient, factor, out=torch.empty_like(gradient, dtype=field.dtype)
                )
        product = gradient * factor
        total = product if total is None else total + product
    if total is None or field is None or total.dtype == field.dtype:
        return total
    return total.to(field.dtype)


def _is_traced(arguments: Sequence[Any]) -> bool:
    """Return whether the op must be opaque: chunk loops are not traced, fake data not computed."""
    return torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, arguments))
