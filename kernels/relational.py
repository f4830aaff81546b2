"""Distances and angles in a batch on a GPU.

Both losses see the embeddings only through the squared distances Q, taken from differences. With
h = Q/2, r = 1/√Q (0 for examples that coincide, and for padding) and u = h_ac − h_bc the cosines of
the triangle a, b, c are

    A_a = r_ac r_ab (h_ab + u)   A_b = r_bc r_ab (h_ab − u)   A_c = r_ac r_bc (h_ac + h_bc − h_ab)

and with their slopes C the gradient in Q_ab is, but for 1/N³,

    g_ab = r_ab/2 Σ_c (C_a r_ac + C_b r_bc) − r_ab³ Σ_c u (C_a r_ac − C_b r_bc) − Σ_c C_c r_ac r_bc

so that a program which owns edges (a, b) and walks over c needs no other's results. Distances add
to g what they say of each pair, and the gradient in the embeddings is the graph Laplacian of g:
dx_a = 2 Σ_b g_ab (x_a − x_b). h is kept in units of the penalty's beta, in which it bends at 1.

Work: N²/2 · D differences for each network, N²/2 · N visits of an edge by a third point, at most 36
instructions each (14 without a gradient), N² · D for the Laplacian. Memory: four matrices [N, N],
and one for each program that shares an edge's third points.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._engine import scaled_gradient
from fastkd.kernels._launch import device_of, on_device
from fastkd.kernels._relational_tiles import (
    TILE,
    distances,
    edges,
    laplacian,
    squares,
    sum_splits,
)
from fastkd.relational import Number, Problem

backward = scaled_gradient

_FEATURES = 64  # of a program of the Laplacian
_LEAST_BETA = {torch.float32: 1e-12, torch.float64: 1e-30}  # below all that rounding leaves


def allocate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """What `forward` returns, empty."""
    return Problem(*arguments).allocate()


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(*Problem) -> the own rows' share of the loss, and the gradient of the whole loss in them."""
    problem = Problem(*arguments)
    share, gradient = problem.allocate()
    student, teacher = _rows(problem.students), _rows(problem.teacher)
    dtype, n, n_own = problem.dtype, len(teacher), len(problem.student)
    side = 64 if n >= 1024 else 32  # few tiles leave a device idle, small ones load more often
    # float64 takes twice the registers
    n_warps = 8 if dtype == torch.float64 else 4
    n_tiles, n_sides = triton.cdiv(n, TILE.value), triton.cdiv(n, side)
    padded = n_sides * side
    n_splits = _splits(problem, n_tiles)
    new = student.new_empty
    pairs = new((padded, 4 * padded), dtype=dtype)
    lengths = new((2, n_sides, n_sides), dtype=dtype)
    slopes = new((max(1, n_splits), padded, padded) if problem.trained else 0, dtype=dtype)
    has_distance = problem.parts != "angle"
    losses = new((has_distance + n_splits, n_tiles, n_tiles), dtype=dtype)
    of_means = new((n_tiles, n_tiles), dtype=dtype)
    distance_weight, angle_weight, beta, by_pointer = _numbers(problem)
    shared = dict(
        pairs_ptr=pairs, n=n, padded=padded, beta=beta, ON_DEVICE=by_pointer,
        DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    means = dict(
        lengths_ptr=lengths, n_lengths=n_sides**2, of_means_ptr=of_means,
        distance_weight=distance_weight,
    )  # fmt: skip
    own = dict(first=problem.first, n_own=n_own)
    with on_device(student):
        squares[(n_sides, n_sides, 2)](
            student_ptr=student, teacher_ptr=teacher, lengths_ptr=lengths,
            student_stride=student.stride(0), teacher_stride=teacher.stride(0),
            student_width=student.shape[1], teacher_width=teacher.shape[1],
            **shared, SIDE=side, DEPTH=4, num_warps=n_warps * side // TILE.value,
        )  # fmt: skip
        if has_distance:
            distances[(n_tiles, n_tiles)](
                **shared, **means, **own, losses_ptr=losses[n_splits],
                PART=problem.everyone is not None, num_warps=n_warps,
            )  # fmt: skip
        if n_splits:
            edges[(n_tiles, n_tiles, n_splits)](
                **shared, **own, slopes_ptr=slopes, losses_ptr=losses,
                per_split=triton.cdiv(n, n_splits), angle_weight=angle_weight,
                TRAINED=problem.trained, PART=problem.everyone is not None, num_warps=n_warps,
                **_four_programs(student, dtype),
            )  # fmt: skip
        sum_splits[(n_tiles, n_tiles) if problem.trained else (1, 1)](
            **shared, **means, slopes_ptr=slopes, losses_ptr=losses, loss_ptr=share,
            n_tiles=n_tiles, n_losses=losses.numel(), n_splits=n_splits,
            DISTANCE=has_distance, TRAINED=problem.trained, num_warps=n_warps,
        )  # fmt: skip
        if problem.trained and n_own:
            rows = TILE.value
            laplacian[(triton.cdiv(n_own, rows), triton.cdiv(student.shape[1], _FEATURES))](
                x_ptr=student, slopes_ptr=slopes, gradient_ptr=gradient, n=n,
                padded=padded, **own, stride=student.stride(0),
                width=student.shape[1], DTYPE=shared["DTYPE"], ROWS=rows, COLUMNS=_FEATURES,
                num_warps=n_warps,
            )  # fmt: skip
    return share, gradient


def _rows(embeddings: Tensor) -> Tensor:
    """Any stride between rows, none inside them."""
    return embeddings if embeddings.stride(1) == 1 else embeddings.contiguous()


def _four_programs(tensor: Tensor, dtype: torch.dtype) -> dict[str, int]:
    """A few registers more, and a multiprocessor holds three."""
    capped = device_of(tensor).nvidia and dtype == torch.float32
    return {"maxnreg": 128} if capped else {}


def _splits(problem: Problem, n_tiles: int) -> int:
    """How many programs share the third points of a tile: enough to fill the device."""
    if problem.parts == "distance":
        return 0
    n_programs = n_tiles * (n_tiles + 1) // 2
    if problem.everyone is not None:
        n_programs = triton.cdiv(len(problem.student), TILE.value) * n_tiles
    at_once = 4 * device_of(problem.teacher).multiprocessors  # of 4 warps with 128 registers
    return max(1, min(triton.cdiv(at_once, max(1, n_programs)), n_tiles, 16))


def _numbers(problem: Problem) -> tuple[Any, Any, Any, bool]:
    """Weight of the distances, weight of the angles, beta; whether they are passed by pointer."""
    least = _LEAST_BETA[problem.dtype]  # 0 turns linear at once
    beta = problem.smooth_l1_beta
    if isinstance(beta, Tensor):
        beta = beta.to(problem.dtype).clamp(min=least)
    else:
        beta = max(beta, least)
    numbers = problem.distance_weight, problem.angle_weight, beta
    # a Python float reaches a kernel as float32
    if problem.dtype == torch.float64 or any(isinstance(x, Tensor) for x in numbers):
        return *(_on_device(x, problem.teacher.device) for x in numbers), True
    return *map(float, numbers), False


def _on_device(number: Number, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number
    return torch.full((), number, dtype=torch.float64, device=device)
