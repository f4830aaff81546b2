"""The autograd functions of an op: for eager mode, for torch.func and for torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd._backend import transforms_active

if TYPE_CHECKING:
    from fastkd._op import Op

ops: dict[str, Op] = {}  # by the names of their problems
_SECOND_ORDER = (
    "{} is not implemented by fastkd's engines, their gradient is a constant of the graph. Put "
    '`with fastkd.backend("formula"):` around the loss to differentiate its definition instead.'
)
_BATCHED_BY_AUTOGRAD = (
    "torch.autograd.grad(is_grads_batched=True) and jacobian(vectorize=True) are not implemented "
    "by fastkd's engines. Use torch.func.jacrev or torch.func.vmap, or put "
    '`with fastkd.backend("formula"):` around the loss.'
)


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


def _keep(ctx: Any, op: Op, arguments: Sequence[Any], saved: Sequence[Any]) -> None:
    """Save for the backward what the forward made, the tensors that it needs, and the rest."""
    ctx.foreseen = ()
    if op.recomputes and saved[0] is not None:
        saved, ctx.foreseen = saved[:1], saved[1:]
    start = len(arguments) - op.n_arguments
    tensors = [*range(start), *(start + i for i in op.tensors)]
    kept = tensors  # autograd notices if one of them is overwritten before the backward
    if not op.recomputes or saved[0] is None:
        # a gradient that is there already needs its field alone, the dtype of which it gets
        needs_grad = arguments[start + op.n_fields : -1]
        kept = [start + i for i, needed in zip(op.trained, needs_grad, strict=True) if needed]
    rest, fields = [*arguments], [arguments[i] for i in kept]
    for i in tensors:  # those that the backward does not need are not kept alive
        if op.row_mask is None or i != start + op.row_mask:
            rest[i] = None
    if not torch.compiler.is_compiling():
        for place, i in enumerate(kept):
            field = fields[place]
            # an inference tensor, often a teacher's logits, cannot be saved: the context keeps it
            if field is not None and field.is_inference():
                rest[i], fields[place] = field, None
    ctx.save_for_backward(*saved, *fields)
    ctx.set_materialize_grads(False)
    ctx.rest, ctx.kept = rest, kept


def _gradients(ctx: Any, op: Op, gradient_node: Any, upstream: Sequence[Any]) -> Any:
    """Return the gradients of all arguments, None for those that have none."""
    arguments, gradients = ctx.rest, [None] * len(ctx.rest)
    start = len(arguments) - op.n_arguments
    if all(x is None for x in upstream):
        return tuple(gradients)
    backward: Callable[..., Any] = op.backward
    foreseen: Sequence[Tensor] = ()
    found: Any = None
    if not torch.compiler.is_compiling():
        # whoever gets the gradient may write over it, so that another backward computes it again
        foreseen, ctx.foreseen = ctx.foreseen, ()
        for x in upstream:
            if x is not None and torch._C._functorch.is_legacy_batchedtensor(x):
                raise RuntimeError(_BATCHED_BY_AUTOGRAD)
        # grad mode is on in a backward only under create_graph=True, and vmap may map over it
        if torch.is_grad_enabled() or transforms_active():
            backward, foreseen = gradient_node.apply, ()
        elif foreseen and op.is_foreseen(arguments[start:], upstream, foreseen):
            found = foreseen
    if found is None:
        tensors = ctx.saved_tensors
        n_saved = len(tensors) - len(ctx.kept)
        if n_saved < len(tensors):
            arguments = [*arguments]
            for i, x in zip(ctx.kept, tensors[n_saved:], strict=True):
                arguments[i] = arguments[i] if x is None else x
        found = backward(*upstream, *tensors[:n_saved], *foreseen, *arguments)
    for i, x in zip(op.trained, found, strict=True):
        gradients[start + i] = x if ctx.needs_input_grad[start + i] else None
    return tuple(gradients)


def differentiable(name: str) -> tuple[type[torch.autograd.Function], ...]:
    """Return the functions of an op for eager mode, for torch.func and for torch.compile.

    In eager mode the losses are the only outputs, which saves time; torch.func wants all that is
    saved among them; torch.compile refuses any `jvp`. All look the op up by its name, because the
    compiler cannot see an Op in a closure.
    """

    class Gradient(_FirstOrder):
        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            found = ops[name].backward(*arguments)
            like = next(x for x in found if x is not None)
            return tuple(like.new_empty(0) if x is None else x for x in found)  # vmap maps tensors

        @staticmethod
        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            op = ops[name]
            of_problem = op.are_rowwise(arguments)
            n_before = len(arguments) - len(of_problem)
            rowwise = [op.per_example] * n_before + of_problem
            rowwise = [op.maps_gradients and x for x in rowwise]
            return _batched(Gradient, rowwise, info.batch_size, in_dims, arguments)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            op = ops[name]
            outputs = op.forward(*arguments)
            _keep(ctx, op, arguments, outputs[op.n_before_saved :])
            ctx.mark_non_differentiable(*outputs[op.n_losses : op.n_outputs])
            return outputs[: op.n_outputs]

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            op = ops[name]
            return _gradients(ctx, op, Gradient, upstream[: op.n_losses])

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(_SECOND_ORDER.format("Forward-mode AD"))

    class Traced(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            return ops[name].opaque.solve(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            op = ops[name]
            ctx.mark_non_differentiable(*output[op.n_losses :])
            _keep(ctx, op, inputs, output[op.n_before_saved :])
            fields = inputs[len(inputs) - op.n_arguments :]
            ctx.absent = [field is not None and fields[field] is None for field in op.losses]

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            op = ops[name]
            # the compiler fills in zeros even for a loss of no elements
            present = [
                None if is_absent else x
                for x, is_absent in zip(upstream[: op.n_losses], ctx.absent, strict=True)
            ]
            return _gradients(ctx, op, Gradient, present)

    class Mapped(Traced):
        @staticmethod
        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            rowwise = ops[name].are_rowwise(arguments)
            return _batched(Mapped, rowwise, info.batch_size, in_dims, arguments)

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
