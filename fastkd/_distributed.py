"""A batch that is spread over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(tensors: Sequence[Tensor], group: Any) -> tuple[list[Tensor], int]:
    """The rows of all ranks in their order, and where the own ones begin; no gradient passes.

    All tensors have as many rows, and any number of them on each rank. It waits for the sizes.
    """
    wholes, n_rows = _gathered(tensors, group)
    return wholes, sum(n_rows[: dist.get_rank(group)])


def _gathered(tensors: Sequence[Tensor], group: Any) -> tuple[list[Tensor], list[int]]:
    """And how many rows each rank has."""
    mine = torch.tensor([len(tensors[0])], device=tensors[0].device)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group)
    n_rows = [int(size) for size in torch.cat(sizes).tolist()]
    wholes = []
    for tensor in tensors:
        # a collective takes one shape from every rank
        padded = tensor.new_zeros((max(n_rows), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor.detach()
        parts = [torch.empty_like(padded) for _ in n_rows]
        dist.all_gather(parts, padded, group)
        wholes.append(torch.cat([part[:n] for part, n in zip(parts, n_rows, strict=True)]))
    return wholes, n_rows


def shared(rows: Tensor, group: Any, *constants: Tensor) -> tuple[Any, ...]:
    """The rows of all ranks, where the own ones begin, and the constants of all of these rows.

    Gradients in the rows are summed over the ranks.
    """
    (whole, *rest), n_rows = _gathered([rows, *constants], group)
    return _Shared.apply(rows, whole, n_rows, group), sum(n_rows[: dist.get_rank(group)]), *rest


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, whole: Tensor, n_rows: list[int], group: Any) -> Tensor:
        ctx.n_rows, ctx.group = n_rows, group
        return whole

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        parts = [*upstream.contiguous().split(ctx.n_rows)]
        own = torch.empty_like(parts[dist.get_rank(ctx.group)])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own, None, None, None


def log_sum_exp(of_ranks: Tensor, group: str) -> Tensor:
    """Of what each rank has, with the name of the group: an op takes no group."""
    ranks = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    largest = of_ranks.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, ranks)
    # −inf − −inf would be no number
    largest = largest.clamp(min=torch.finfo(largest.dtype).min)
    return largest + summed((of_ranks - largest).exp(), ranks).log()


def summed(share: Tensor, group: Any) -> Tensor:
    """The sum of the shares of all ranks; no gradient passes."""
    total = share.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def before_averaging(loss: Tensor, value: Tensor, group: Any) -> Tensor:
    """`value`, with the gradient of `loss` times the ranks: DDP's mean takes the factor out."""
    return _Valued.apply(loss * dist.get_world_size(group), value)


class _Valued(torch.autograd.Function):
    """Another value, the same gradient: a difference of the two would lose infinities."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream, None
