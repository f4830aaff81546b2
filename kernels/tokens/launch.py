"""Solve `TokenRelations` on a GPU, by tiles of S and T that never leave a multiprocessor.

One sweep over the tiles of both gives the divergence and the normalizers of rows, a second one the
gradient; the squares of S − T need one sweep for both. Work, in products of 2 L² d FLOPs for each
head: 2 and 3, or 3 for squares. Memory: four numbers for each token and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._precision import compute_dtype
from fastkd.kernels.device import INTERPRETED, device_of, on_device, or_portable
from fastkd.kernels.tokens.sweeps import (
    Network,
    Tile,
    relation_divergences,
    relation_gradients,
    relation_squares,
)
from fastkd.problems.pairs import SHORTEST
from fastkd.problems.tokens import TokenRelations

_WIDEST_HALF, _WIDEST_TF32 = 128, 64  # heads whose sums stay in registers


class _Tiling(NamedTuple):
    """The sides of a tile, and the options with which Triton compiles a kernel over it."""

    rows: int
    columns: int
    stages: int
    warps: int


def takes(problem: TokenRelations) -> bool:
    """Return whether the products of a problem are those of tensor cores, and fit on chip.

    Otherwise chunks through cuBLAS are the better way: wide heads, and float32 that must not be
    rounded to TF32.
    """
    if INTERPRETED:  # there, the kernels can be compared with the formulas to all digits
        return True
    student, teacher = problem.student, problem.teacher
    width = max(student.shape[-1], teacher.shape[-1]) // problem.heads
    halves = (torch.float16, torch.bfloat16)
    if student.dtype in halves and teacher.dtype in halves:
        return width <= _WIDEST_HALF
    is_double = torch.float64 in (student.dtype, teacher.dtype)
    return width <= _WIDEST_TF32 and not is_double and _may_be_rounded()


@or_portable
def value_and_gradients(
    problem: TokenRelations, needs_grad: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor | None]]:
    """Launch the kernels; return the loss of each sequence and the gradients of each in tokens."""
    dtype = compute_dtype(problem.student, problem.teacher)
    examples, (length, width) = problem.student.shape[:-2], problem.student.shape[-2:]
    n = examples.numel()
    student, teacher = (
        _tokens(x.reshape(n, *x.shape[-2:])) for x in (problem.student, problem.teacher)
    )
    if dtype == torch.float64:  # in the interpreter
        student, teacher = student.double(), teacher.double()
    mask = None if problem.mask is None else problem.mask.reshape(n, length).contiguous()
    with on_device(student):
        gradient = student.new_empty((n, length, width), dtype=dtype) if needs_grad[0] else None
        losses = student.new_zeros(n, dtype=dtype)
        if n and length:
            losses, weights = _launch(problem, student, teacher, mask, gradient, dtype)
            losses = losses.view(n, -1).sum(1).mul_(weights).relu_()
    return losses.view(examples), (
        None if gradient is None else gradient.view(problem.student.shape),
    )


def _launch(
    problem: TokenRelations,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    gradient: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return sums of divergences or squares, several for each sequence, and their weights, [B]."""
    n, length, _ = student.shape
    heads = problem.heads
    tiles, precision = _tiling(problem)
    n_units, n_blocks = n * heads, triton.cdiv(length, tiles.rows)
    networks = (
        _network(student, heads, problem.scale, problem.normalize, dtype),
        _network(teacher, heads, problem.teacher_scale, problem.normalize, dtype),
    )
    weights = _weights(problem, student, mask, dtype)
    losses = student.new_empty((n_units, n_blocks), dtype=dtype)
    bits = None if mask is None else mask.view(torch.uint8)
    has_edges = mask is not None or length % max(tiles.rows, tiles.columns) > 0
    constants = dict(
        TILE=Tile(
            *map(
                tl.constexpr,
                (
                    tiles.rows, tiles.columns, *(_depth(x.width) for x in networks), precision,
                    tl.float64 if dtype == torch.float64 else tl.float32, has_edges, problem.causal,
                ),
            )
        ),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip
    sizes = dict(n_tokens=length, n_heads=heads, n_blocks=n_blocks)
    grid = (n_units * n_blocks,)
    if problem.divergence == "mse":
        relation_squares[grid](
            *networks, bits, losses, weights, gradient, **sizes, REMOVED=problem.removed,
            **constants,
        )  # fmt: skip
        return losses, weights
    normalizers = None if gradient is None else losses.new_empty((4, n_units, length))
    relation_divergences[grid](*networks, bits, losses, normalizers, n_units, **sizes, **constants)
    if gradient is not None:
        relation_gradients[grid](
            *networks, bits, normalizers, weights, gradient, n_units, **sizes, **constants
        )
    return losses, weights


def _tokens(x: Tensor) -> Tensor:
    """Return [B, L, D] with features next to each other."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _network(
    x: Tensor, heads: int, scale: float | Tensor, normalize: bool, dtype: torch.dtype
) -> Network:
    """Return the tokens as the kernels read them."""
    factors = None
    if normalize:
        lengths = torch.linalg.vector_norm(x.unflatten(-1, (heads, -1)), dim=-1, dtype=dtype)
        factors = 1 / lengths.clamp_(min=SHORTEST).transpose(1, 2).contiguous()
    if isinstance(scale, Tensor):
        scale = scale.to(dtype)
    else:
        scale = x.new_full((), scale, dtype=dtype)
    return Network(x, factors, scale, x.stride(0), x.stride(1), x.shape[-1] // heads)


def _weights(
    problem: TokenRelations, student: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return what multiplies the divergences or the squares of each sequence, [B]."""
    n, length, _ = student.shape
    if mask is None:
        n_tokens = student.new_full((n,), length, dtype=dtype)
    else:
        n_tokens = mask.sum(1).to(dtype).clamp_(min=1)
    if problem.divergence == "mse":
        n_tokens = n_tokens * (n_tokens + 1) / 2 if problem.causal else n_tokens * n_tokens
    return 1 / (problem.heads * n_tokens)


def _depth(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _tiling(problem: TokenRelations) -> tuple[_Tiling, str]:
    """Return the tiles whose sums stay in registers, found by compiling, and the precision."""
    student, teacher = problem.student, problem.teacher
    depth = max(_depth(x.shape[-1] // problem.heads) for x in (student, teacher))
    if torch.float64 in (student.dtype, teacher.dtype):  # in the interpreter
        return _Tiling(32, 16, 1, 4), "ieee"
    device = device_of(student)
    if torch.float32 in (student.dtype, teacher.dtype):
        warps = 8 if problem.normalize or problem.divergence == "mse" else 4
        return _Tiling(32, 32, 2, warps), "tf32" if _may_be_rounded() else "ieee"
    # of float16 times slopes in `relation_squares`
    precision = "tf32" if INTERPRETED or device.nvidia else "ieee"
    has_most = problem.normalize and (problem.causal or student.dtype == torch.float16)
    if has_most:
        stages = 1 if device.nvidia and device.generation > 8 else 2
        return _Tiling(32, 32, stages, 8 if device.nvidia else 4), precision
    is_narrow = depth > 64 or device.generation == 8 or problem.causal or problem.normalize
    return _Tiling(64, 32 if is_narrow else 64, 2, 4), precision


def _may_be_rounded() -> bool:
    """Return whether the user allows matmuls of float32 to use TF32."""
    matmul = torch.backends.cuda.matmul
    if torch.version.hip is not None:
        return False
    if hasattr(matmul, "fp32_precision"):  # because reading the older name may then be an error
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32
