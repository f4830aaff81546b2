"""A batch that is spread over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd import _option_checks


class Ranks:
    """The ranks that hold parts of a batch, of any sizes; without a group this process alone.

    A loss of the whole batch that every rank computes has, in the rows of one rank, the gradient
    that DistributedDataParallel's mean over the ranks makes out of `number of ranks` times it.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """Return the ranks of a group, of that with this name, or without one this process."""
        return cls(_option_checks.process_group(group))

    def __bool__(self) -> bool:
        return self.group is not None

    @property
    def name(self) -> str:
        """Return the group's name, since an op takes no group, or "" without one."""
        return self.group.group_name if self else ""

    def gather(self, *tensors: Tensor) -> tuple[list[Tensor], int]:
        """Return the rows of all ranks in their order, without gradient, and the rank offset.

        All tensors have one number of rows, which may differ from rank to rank. This is a host
        sync, because ranks tell each other their sizes first.
        """
        if not self:
            return [*tensors], 0
        wholes, n_rows = self._gather(tensors)
        return wholes, sum(n_rows[: dist.get_rank(self.group)])

    def share(self, rows: Tensor, *constants: Tensor) -> tuple[Any, ...]:
        """Return the rows of all ranks, the rank offset, and the constants of all these rows.

        Gradients in the rows are summed over the ranks; the constants get none.
        """
        if not self:
            return rows, 0, *constants
        (whole, *rest), n_rows = self._gather([rows, *constants])
        first = sum(n_rows[: dist.get_rank(self.group)])
        return _Shared.apply(rows, whole, n_rows, self.group), first, *rest

    def own(self, rows: Tensor) -> slice:
        """Return where this rank's rows are among those of all ranks; a host sync, as `gather`."""
        _, first = self.gather(rows[:, :0])
        return slice(first, first + len(rows))

    def sum(self, share: Tensor) -> Tensor:
        """Return the sum of what all ranks have, without gradient."""
        if not self:
            return share
        total = share.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def total(self, share: Tensor) -> Tensor:
        """Return the loss of the whole batch, with the gradient of this rank's share of it."""
        return self.valued(share, self.sum(share)) if self else share

    def mean(self, loss: Tensor, n_examples: int) -> Tensor:
        """Return the mean loss of the examples of all ranks from that of this rank's examples."""
        if not self:
            return loss
        n = loss.new_full((), n_examples)
        total, n_of_all = self.sum(torch.stack([loss.detach() * n, n]))
        n_of_all = n_of_all.clamp(min=1)
        return self.valued(loss * (n / n_of_all), total / n_of_all)

    def valued(self, loss: Tensor, value: Tensor) -> Tensor:
        """Return `value` with the gradient of `loss` times the number of ranks."""
        return _Valued.apply(loss * dist.get_world_size(self.group), value)

    def _gather(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
        """Return the rows of all ranks, and how many each rank has."""
        mine = torch.tensor([len(tensors[0])], device=tensors[0].device)
        sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(sizes, mine, self.group)
        n_rows = [int(size) for size in torch.cat(sizes).tolist()]
        wholes = []
        for tensor in tensors:
            # rows are padded because a collective takes one shape from every rank
            padded = tensor.new_zeros((max(n_rows), *tensor.shape[1:]))
            padded[: len(tensor)] = tensor.detach()
            parts = [torch.empty_like(padded) for _ in n_rows]
            dist.all_gather(parts, padded, self.group)
            wholes.append(torch.cat([part[:n] for part, n in zip(parts, n_rows, strict=True)]))
        return wholes, n_rows


class _Shared(torch.autograd.Function):
    """The rows of all ranks as a function of this rank's rows."""

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


class _Valued(torch.autograd.Function):
    """Another value with the same gradient; a difference of the two would lose infinities."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream, None


def log_sum_exp(of_ranks: Tensor, group: str) -> Tensor:
    """Return the log-sum-exp over the ranks of the group with that name."""
    ranks = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    largest = of_ranks.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, ranks)
    # the maximum is made finite, because −inf − (−inf) would be NaN
    largest = largest.clamp(min=torch.finfo(largest.dtype).min)
    return largest + Ranks(ranks).sum((of_ranks - largest).exp()).log()
