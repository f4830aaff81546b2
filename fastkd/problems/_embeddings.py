"""Embeddings and numbers in the form in which engines take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd._op import Number, is_inference
from fastkd._precision import compute_dtype
from fastkd.problems.pairs import directions


def apart(x: Tensor | None, *others: Tensor | None) -> Tensor | None:
    """Return a view of a tensor that is one of the others, since the compiler refuses one twice."""
    return x.view_as(x) if x is not None and any(x is other for other in others) else x


def in_compute_dtype(*embeddings: Any, half: str = "") -> list[Any]:
    """Return embeddings as engines take them, which widen those in `half` themselves.

    None stays None. The first two tell the compute dtype. Inference tensors are cloned, because
    autograd cannot save them for a backward.
    """
    dtype = compute_dtype(*embeddings[:2])
    wide = [x if half or x is None or x.dtype == dtype else x.to(dtype) for x in embeddings]
    return [x.clone() if is_inference(x) else x for x in wide]


def half_of(*embeddings: Tensor | None) -> str:
    """Return the name of the half precision that all embeddings came in, or ""."""
    dtypes = {x.dtype for x in embeddings if x is not None}
    is_half = dtypes == {torch.bfloat16} or dtypes == {torch.float16}
    return str(dtypes.pop()).removeprefix("torch.") if is_half else ""


def number_like(number: Number, like: Tensor, *shape: int) -> Tensor:
    """Return a tensor of this number on the device of `like`, 0-dim without a shape.

    It is of the compute dtype of `like`.
    """
    dtype = compute_dtype(like)
    if isinstance(number, Tensor) and not (shape or number.ndim) and number.device == like.device:
        return number.to(dtype)
    if isinstance(number, Tensor) or torch.compiler.is_compiling():
        # a copy from the host is a host sync, and the compiler would specialise on a number
        return like.new_ones(shape, dtype=dtype) * number
    return like.new_full(shape, number, dtype=dtype)


def inverse(temperature: Number, like: Tensor) -> Tensor:
    """Return 1 / temperature as a 0-dim tensor on the device of `like`."""
    if isinstance(temperature, Tensor) or torch.compiler.is_compiling():
        return 1 / number_like(temperature, like)
    return number_like(1 / temperature, like)


def logarithm(number: Number, like: Tensor) -> Tensor:
    """Return the logarithm as a 0-dim tensor on the device of `like`."""
    return number_like(number, like).log()


def is_number(number: Number, value: float) -> bool:
    """Return whether an option is no tensor and has that value."""
    return not isinstance(number, Tensor) and number == value


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine of each row and its partner, with lengths as in F.normalize."""
    return (directions(x) * directions(y)).sum(1)


def zero_loss(*trained: Any) -> Tensor:
    """Return the loss of no examples, on the graph of all that is trained.

    The first two tensors tell the compute dtype.
    """
    tensors = [x for x in trained if isinstance(x, Tensor)]
    dtype, device = compute_dtype(*tensors[:2]), tensors[0].device
    return torch.stack([x.sum().to(device, dtype) * 0 for x in tensors]).sum()
