"""Solve `Peers` on a GPU: all networks are read at once, and all gradients are written at once.

Bytes for each (row, entry) of bfloat16 and K networks, forward + backward: 2 K + 4 K, each one
launch. Rows with V ≤ ON_CHIP stay there, so that nothing is saved; of longer ones three numbers for
each network are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._precision import compute_dtype
from fastkd.kernels.device import (
    Strided,
    alignment,
    congruent,
    device_of,
    on_device,
    rows_of,
    warps_of_long_rows,
)
from fastkd.kernels.peers import sweeps
from fastkd.kernels.peers.whole_rows import whole_peers
from fastkd.kernels.rows import launch as of_rows
from fastkd.problems.peers import MOST, Peers, logits_of

_PER_WARP = {torch.float32: 2048, torch.float64: 512}  # entries of whole rows, of all networks


def n_statistics(problem: Peers) -> int:
    """Return how many numbers a row saves for `backward`: none if it fits on chip."""
    logits = logits_of(problem)
    longest = of_rows.ON_CHIP
    if compute_dtype(*logits) == torch.float64:  # numbers of two registers
        longest //= 4
    if len(logits) > 2 and not problem.are_constants:  # which wants all logarithms at once
        longest //= 2
    return 3 * len(logits) if logits[0].shape[-1] > longest else 0


def forward(problem: Peers, needs_grad: Sequence[bool]) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """Return rows of scale · all divergences, and what `backward` needs besides the problem."""
    logits = logits_of(problem)
    losses = logits[0].new_empty(logits[0].shape[:-1], dtype=compute_dtype(*logits))
    statistics = losses.new_empty((*losses.shape, n_statistics(problem)))
    if not losses.numel():
        pass
    elif statistics.numel():
        networks, arguments, width = _long_rows(problem, logits)
        num_warps = warps_of_long_rows(losses)
        with on_device(logits[0]):
            sweeps.peer_statistics[(losses.numel(),)](
                networks,
                losses_ptr=losses,
                statistics_ptr=statistics,
                **arguments,
                CONGRUENT=_are_congruent(networks, width),
                THREADS=32 * num_warps,
                WIDTH=width,
                num_warps=num_warps,
            )
    else:
        _launch_whole_rows(problem, losses)
    return (losses,), (statistics,)


def backward(
    problem: Peers,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return Σ upstream · ∂losses with respect to each network that needs it."""
    logits = logits_of(problem)
    (of_losses,) = upstream
    assert of_losses is not None
    found = [torch.empty_like(x) if needs_grad[i] else None for i, x in enumerate(logits)]
    # contiguous ones are written, which are copied where the logits have other strides
    written = [
        x
        if x is None or x.is_contiguous()
        else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in found
    ]
    if not logits[0].numel():
        pass
    elif statistics.numel():
        _launch_gradients(problem, statistics, written, of_losses.reshape(-1))
    else:
        _launch_whole_rows(problem, None, written, of_losses.reshape(-1))
    for x, y in zip(found, written, strict=True):
        if x is not None and y is not None and x is not y:
            x.copy_(y)
    return (*found, *[None] * (MOST - len(found)))


def _launch_whole_rows(
    problem: Peers,
    losses: Tensor | None,
    gradients: Sequence[Tensor | None] = (),
    upstream: Tensor | None = None,
) -> None:
    logits = logits_of(problem)
    n_rows, n_cols = logits[0].shape[:-1].numel(), logits[0].shape[-1]
    networks = tuple(map(rows_of, logits))
    written = tuple(rows_of(x) for x in gradients if x is not None)
    columns = triton.next_power_of_2(n_cols)
    # a power of two, because it divides one: 3 networks take as many entries as 4
    per_warp = _PER_WARP[compute_dtype(*logits)] // triton.next_power_of_2(len(logits))
    # many short rows where that leaves a program for every multiprocessor, as `rows` has them
    block = max(1, per_warp // 2 // columns)
    if n_rows < block * device_of(logits[0]).multiprocessors:
        block = 1
    with on_device(logits[0]):
        whole_peers[(triton.cdiv(n_rows, block),)](
            networks,
            written,
            upstream_ptr=upstream,
            losses_ptr=losses,
            n_rows=n_rows,
            upstream_stride=0 if upstream is None else upstream.stride(0),
            **_arguments(problem, logits),
            PLACES=_places(gradients, len(logits)),
            CONSTANTS=problem.are_constants,
            ALIGNMENT=alignment([*networks, *written], n_cols),
            ROWS=block,
            COLUMNS=columns,
            num_warps=max(1, block * columns // per_warp),
        )


def _launch_gradients(
    problem: Peers, statistics: Tensor, gradients: Sequence[Tensor | None], upstream: Tensor
) -> None:
    logits = logits_of(problem)
    n_rows, n_cols = logits[0].shape[:-1].numel(), logits[0].shape[-1]
    networks, arguments, width = _long_rows(problem, logits)
    written = tuple(rows_of(x) for x in gradients if x is not None)
    # entries of a thread and network: 8, or half as many of what takes twice the registers
    vectors = 1024 // width
    if not problem.are_constants:
        vectors //= 2
    if statistics.dtype == torch.float64:
        vectors //= 2
    n_blocks = triton.cdiv(n_cols, vectors * width)
    with on_device(logits[0]):
        sweeps.peer_gradients[(n_rows * n_blocks,)](
            networks,
            written,
            upstream_ptr=upstream,
            statistics_ptr=statistics.contiguous(),  # mapped upstreams have one of all, expanded
            n_blocks=n_blocks,
            upstream_stride=upstream.stride(0),
            **arguments,
            PLACES=_places(gradients, len(logits)),
            CONSTANTS=problem.are_constants,
            CONGRUENT=_are_congruent([*networks, *written], width),
            VECTORS=vectors,
            WIDTH=width,
            num_warps=4,
        )


def _places(gradients: Sequence[Tensor | None], n_networks: int) -> tuple[int, ...]:
    """Return the place of each network's gradient among those that there are, −1 of none."""
    learning = [k for k, x in enumerate(gradients) if x is not None]
    return tuple(learning.index(k) if k in learning else -1 for k in range(n_networks))


def _long_rows(
    problem: Peers, logits: Sequence[Tensor]
) -> tuple[tuple[Strided, ...], dict[str, Any], int]:
    """Return the rows of all networks, what both kernels take, and the elements of a vector."""
    width = 16 // min(x.element_size() for x in logits)
    return tuple(map(rows_of, logits)), _arguments(problem, logits), width


def _are_congruent(tensors: Sequence[Strided], width: int) -> bool:
    return all(congruent(tensors[0], x, width) for x in tensors[1:])


def _arguments(problem: Peers, logits: Sequence[Tensor]) -> dict[str, Any]:
    """Return what all kernels take, by the names of their parameters."""
    dtype, first = compute_dtype(*logits), logits[0]
    numbers = problem.temperature, problem.scale
    # float64 goes by pointer too, because a Python float reaches a kernel as float32
    by_pointer = dtype == torch.float64 or any(isinstance(x, Tensor) for x in numbers)
    temperature, scale = (
        of_rows._on_device(x, first.device) if by_pointer else float(x) for x in numbers
    )
    return dict(
        row_mask_ptr=of_rows._flat(problem.row_mask),
        n_cols=first.shape[-1],
        inner=first.shape[-2] if first.ndim > 1 else 1,
        temperature=temperature,
        scale=scale,
        DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
        ON_DEVICE=by_pointer,
    )
