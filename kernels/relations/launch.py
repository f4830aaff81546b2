"""Distances and angles in a batch on a GPU.

Both losses see the embeddings only through the squared distances Q, which are summed from
differences. With h = Q/2, r = 1/√Q (0 for examples that coincide, and for padding) and
u = h_ac − h_bc the cosines of the triangle a, b, c are

    A_a = r_ac r_ab (h_ab + u)   A_b = r_bc r_ab (h_ab − u)   A_c = r_ac r_bc (h_ac + h_bc − h_ab)

and with their slopes C the gradient in Q_ab is, but for 1/N³,

    g_ab = r_ab/2 Σ_c (C_a r_ac + C_b r_bc) − r_ab³ Σ_c u (C_a r_ac − C_b r_bc) − Σ_c C_c r_ac r_bc

so that a program which owns edges (a, b) and walks over c needs no results of other programs.
Distances add their slope in each pair to g, and the gradient in the embeddings is the graph
Laplacian of g: dx_a = 2 Σ_b g_ab (x_a − x_b). h is kept in units of the penalty's beta, so that the
penalty turns linear at 1.

Work: N²/2 · D differences for each network, read from transposes, so that a warp loads whole lines;
N²/2 · N visits of an edge by a third point, at most 36 instructions each (14 without a gradient);
N² · D for the Laplacian. Memory: the transposes, and later four matrices [N, N], and one for each
program that shares an edge's third points. Bytes: a visit loads 8 · 32 numbers for a tile of 32²
edges, 1 B an edge in float32, from the cache; an edge's slope is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._precision import compute_dtype
from fastkd.kernels.device import device_of, on_device
from fastkd.kernels.relations.tiles import (
    TILE,
    Embeddings,
    distances,
    edges,
    laplacian,
    squares,
    sum_splits,
    transposes,
)
from fastkd.problems.relations import Number, Relations

_FEATURES = 64  # of a program of the Laplacian
_LEAST_BETA = {torch.float32: 1e-12, torch.float64: 1e-30}  # below all that rounding leaves


def value_and_gradients(
    problem: Relations, needs_grad: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor | None]]:
    """Launch the kernels; return the local rows' share of the loss and the gradient in them."""
    (with_slopes,), is_part = needs_grad, problem.whole_student is not None
    student, teacher = _rows(problem.whole), _rows(problem.teacher)
    dtype, n, n_local = problem.compute_dtype, len(teacher), len(problem.student)
    result_dtype = compute_dtype(problem.student, problem.teacher)
    # large tiles would leave a device idle in a small batch, small ones load more often
    side = 64 if n >= 1024 else 32
    n_warps = 8 if dtype == torch.float64 else 4  # because float64 takes twice the registers
    n_tiles, n_sides = triton.cdiv(n, TILE.value), triton.cdiv(n, side)
    padded = n_sides * side
    n_splits = _n_splits(problem, n_tiles)
    has_distance = problem.parts != "angle"
    new = student.new_empty
    pairs = new((padded, 4 * padded), dtype=dtype)
    lengths = new((2, n_sides, n_sides), dtype=dtype)
    numbers = _numbers(problem)
    shared = dict(
        pairs_ptr=pairs, n=n, padded=padded, beta=numbers.beta, ON_DEVICE=numbers.on_device,
        DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    x, y = (Embeddings(rows, rows.stride(0), rows.shape[1]) for rows in (student, teacher))
    _launch_squares(x, y, side, n_warps * side // TILE.value, lengths_ptr=lengths, **shared)
    slopes = new((max(1, n_splits), padded, padded) if with_slopes else 0, dtype=dtype)
    losses = new((has_distance + n_splits, n_tiles, n_tiles), dtype=dtype)
    of_means = new((n_tiles, n_tiles), dtype=dtype)
    loss = new((), dtype=result_dtype)
    gradient = new((n_local, student.shape[1]), dtype=result_dtype) if with_slopes else None
    means = dict(
        lengths_ptr=lengths, n_lengths=n_sides**2, of_means_ptr=of_means,
        distance_weight=numbers.distance_weight,
    )  # fmt: skip
    local = dict(first=problem.first, n_local=n_local)
    with on_device(student):
        if has_distance:
            distances[(n_tiles, n_tiles)](
                **shared, **means, **local, losses_ptr=losses[n_splits], PART=is_part,
                num_warps=n_warps,
            )  # fmt: skip
        if n_splits:
            edges[(n_tiles, n_tiles, n_splits)](
                **shared, **local, slopes_ptr=slopes, losses_ptr=losses,
                per_split=triton.cdiv(n, n_splits), angle_weight=numbers.angle_weight,
                NEEDS_GRAD=with_slopes, PART=is_part, num_warps=n_warps,
                **_register_limit(student, dtype),
            )  # fmt: skip
        sum_splits[(n_tiles, n_tiles) if with_slopes else (1, 1)](
            **shared, **means, slopes_ptr=slopes, losses_ptr=losses, loss_ptr=loss,
            n_tiles=n_tiles, n_losses=losses.numel(), n_splits=n_splits, DISTANCE=has_distance,
            NEEDS_GRAD=with_slopes, num_warps=n_warps,
        )  # fmt: skip
        if with_slopes and n_local:
            # low tiles are many programs, which wait less often for the cache
            rows, depth, n_warps = (8, 16, n_warps) if n < 1024 else (32, 8, 8)
            grid = triton.cdiv(n_local, rows), triton.cdiv(student.shape[1], _FEATURES)
            laplacian[grid](
                x=x, slopes_ptr=slopes, gradient_ptr=gradient, n=n, padded=padded, **local,
                DTYPE=shared["DTYPE"], ROWS=rows, COLUMNS=_FEATURES, DEPTH=depth, num_warps=n_warps,
            )  # fmt: skip
    return loss, (gradient,)


def _launch_squares(
    x: Embeddings, y: Embeddings, side: int, n_warps: int, **arguments: Any
) -> None:
    """Launch the squared distances, which read transposes that nothing else needs."""
    n, padded = arguments["n"], arguments["padded"]
    depth = 8 if side == TILE.value else 4  # features that are loaded at once: registers allow it
    found = []
    for rows in (x, y):
        width = triton.cdiv(rows.width, depth) * depth
        found.append(Embeddings(rows.ptr.new_empty((width, padded)), padded, width))
    grid = padded // TILE.value, triton.cdiv(max(x.width, y.width), _FEATURES), 2
    n_sides = padded // side
    with on_device(x.ptr):
        transposes[grid](x, y, *found, n=n, padded=padded, ROWS=TILE.value, COLUMNS=_FEATURES)
        squares[(n_sides, n_sides, 2)](
            *found, **arguments, SIDE=side, DEPTH=depth, num_warps=n_warps
        )


def _rows(embeddings: Tensor) -> Tensor:
    """Return embeddings with any stride between rows, and none inside them."""
    return embeddings if embeddings.stride(1) == 1 else embeddings.contiguous()


def _register_limit(tensor: Tensor, dtype: torch.dtype) -> dict[str, int]:
    """Return at most 128 registers, so that four programs fit on a multiprocessor, not three."""
    is_limited = device_of(tensor).nvidia and dtype == torch.float32
    return {"maxnreg": 128} if is_limited else {}


def _n_splits(problem: Relations, n_tiles: int) -> int:
    """Return how many programs share the third points of a tile, so that they fill the device."""
    if problem.parts == "distance":
        return 0
    n_programs = n_tiles * (n_tiles + 1) // 2
    if problem.whole_student is not None:
        n_programs = triton.cdiv(len(problem.student), TILE.value) * n_tiles
    at_once = 4 * device_of(problem.teacher).multiprocessors  # of 4 warps with 128 registers
    return max(1, min(triton.cdiv(at_once, max(1, n_programs)), n_tiles, 16))


class _Numbers(NamedTuple):
    """Numbers as kernels take them: by value, or by pointer where `on_device`."""

    distance_weight: Any
    angle_weight: Any
    beta: Any
    on_device: bool


def _numbers(problem: Relations) -> _Numbers:
    """Return the weights and beta, which is raised above 0, where the penalty is linear at once."""
    dtype, beta = problem.compute_dtype, problem.smooth_l1_beta
    least = _LEAST_BETA[dtype]
    if isinstance(beta, Tensor):
        beta = beta.to(dtype).clamp(min=least)
    else:
        beta = max(beta, least)
    numbers = problem.distance_weight, problem.angle_weight, beta
    # by pointer in float64 too, because a Python float reaches a kernel as float32
    if dtype == torch.float64 or any(isinstance(x, Tensor) for x in numbers):
        a, b, c = [_on_device(x, problem.teacher.device) for x in numbers]
        return _Numbers(a, b, c, on_device=True)
    return _Numbers(float(numbers[0]), float(numbers[1]), float(numbers[2]), on_device=False)


def _on_device(number: Number, device: torch.device) -> Tensor:
    """Return a number as a 0-dim tensor."""
    if isinstance(number, Tensor):
        return number
    return torch.full((), number, dtype=torch.float64, device=device)
