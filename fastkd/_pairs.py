"""What the losses between queries and keys share: batches over ranks, gradients, empty batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _distributed
from fastkd._backend import is_plain_on_cpu
from fastkd._engine import compute_dtype, without_autocast

Number = float | Tensor
_FEW_PAIRS = 1 << 20  # whose matrix is smaller than a chunk of the engine, and quicker
_FEWER_PAIRS = 1 << 16  # where the formula is quicker than the engine
SHORTEST = 1e-12  # what F.normalize divides by at least


def in_batches(few: Callable[..., Tensor | None]) -> Callable[..., Callable[..., Tensor]]:
    """Of (engine, *tensors, **options) a `fused` for `batch_loss`; the first two are the batch.

    All come in what is computed in, without autocast, and `half` tells what the embeddings were
    in, which products may use. The formula gets those of all ranks: the gradients of the ranks then
    add up to their number times the batch's, as they shall. Small batches on a CPU go to `few` and,
    where it returns None, the smaller ones to the formula.
    """

    def decorate(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(run)
        def fused(
            formula: Callable[..., Tensor], engine: str, *tensors: Any, group: Any, **options: Any
        ) -> Tensor:
            dtype = compute_dtype(*tensors[:2])
            batch = [
                in_dtype(x, dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
                for x in tensors
            ]
            with without_autocast(batch[0].device):
                if engine == "portable" and group is None and is_small(*batch, most=_FEW_PAIRS):
                    loss = few(*batch, **options) if len(batch[0]) > 1 else None
                    if loss is not None:
                        return loss
                    if is_small(*batch, most=_FEWER_PAIRS):
                        engine = "formula"
                if engine == "formula":
                    whole = [everyone(x, group)[0] for x in batch[:2]]
                    return formula(*whole, *batch[2:], **options)
                embeddings = [x for x in tensors if isinstance(x, Tensor) and x.ndim == 2]
                return run(engine, *batch, half=half_of(*embeddings), group=group, **options)

        return fused

    return decorate


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype != dtype:
        x = x.to(dtype)
    # what torch.inference_mode made cannot be saved for a backward
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


def is_small(query: Tensor, key: Any, *rest: Any, most: int) -> bool:
    """Whether calls of PyTorch on a CPU cost more than what they compute."""
    n_keys = 0
    for x in (key, *rest):
        if isinstance(x, Tensor) and x.ndim:
            n_keys += x.shape[0]
    return query.shape[0] * n_keys <= most and is_plain_on_cpu(query, key)


def everyone(rows: Tensor, group: Any, *constants: Tensor) -> tuple[Any, ...]:
    """The rows of all ranks, with gradients, the place of the first own one, and constants of all.

    In one exchange: ranks wait for each other's sizes.
    """
    return (rows, 0, *constants) if group is None else _distributed.shared(rows, group, *constants)


def of_all_ranks(share: Tensor, group: Any) -> Tensor:
    """The loss of the whole batch, with the gradient of the own share of it."""
    if group is None:
        return share
    return _distributed.before_averaging(share, _distributed.summed(share, group), group)


def scale_of(temperature: Number, like: Tensor) -> Tensor:
    return 1 / number_like(temperature, like)


def logarithm(number: Number, like: Tensor) -> Tensor:
    return number_like(number, like).log()


def is_number(number: Number, value: float) -> bool:
    return not isinstance(number, Tensor) and number == value


def number_like(number: Number, like: Tensor) -> Tensor:
    """A tensor: a product, since a copy from the host waits and a compiler would burn it in."""
    return like.new_ones(()) * number


def half_of(*embeddings: Tensor) -> str:
    """The name of the half precision of all of them, or nothing."""
    dtypes = {x.dtype for x in embeddings}
    is_half = dtypes == {torch.bfloat16} or dtypes == {torch.float16}
    return str(dtypes.pop()).removeprefix("torch.") if is_half else ""


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Of each row and its partner, as F.normalize has lengths; F.cosine_similarity takes longer."""
    length, other = (torch.linalg.vector_norm(z, dim=1).clamp(min=SHORTEST) for z in (x, y))
    return (x * y).sum(1) / (length * other)


def own_left_out(similarities: Tensor) -> Tensor:
    own = torch.eye(*similarities.shape, dtype=torch.bool, device=similarities.device)
    return similarities.masked_fill(own, -torch.inf)


def nothing(*trained: Any) -> Tensor:
    """The loss of no examples, on the graph of all that is trained."""
    tensors = [x for x in trained if isinstance(x, Tensor)]
    dtype, device = compute_dtype(*tensors[:2]), tensors[0].device
    return torch.stack([x.sum().to(device, dtype) * 0 for x in tensors]).sum()


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp x), with the slope of the definition everywhere."""
    return -F.logsigmoid(-x)


def empty_gradients(wanted: str, **trained: Tensor | None) -> tuple[Tensor, ...]:
    """One for each, of no elements where it is not wanted."""
    like = next(x for x in trained.values() if x is not None)
    return tuple(
        like.new_empty(0)
        if x is None or name not in wanted.split()
        else torch.empty_like(x, memory_format=torch.contiguous_format)
        for name, x in trained.items()
    )


def empty_statistics(gradients: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients in a row."""
    loss = gradients[0].new_empty((), dtype=dtype)
    return loss, loss.new_empty(sum(x.numel() for x in gradients))
