"""Matrix products that are summed in float32, or wider, whatever the precision of their factors.

PyTorch has those of half precision on CUDA alone, and adds them to float32 in newer versions.
Elsewhere a factor of half precision is cast, a tile at a time, because it may be a head.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastkd import _onednn

_TILE = 1 << 22  # elements of a factor that are cast at once


def multiplies_halves(rows: Tensor, half: str) -> bool:
    """Return whether a product of half precision gives sums of the rows' dtype, not rounded."""
    if not rows.is_cuda or torch.version.hip is not None or rows.dtype != torch.float32:
        return False
    rounded = getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    return half == "bfloat16" or not rounded


def multiply(a: Tensor, b: Tensor, out: Tensor, *, adds: bool = False) -> None:
    """Write a b to `out`, or add it to that, with sums of the precision of `out`."""
    if a.dtype == b.dtype and (a.dtype == out.dtype or _multiplies(a, out)):
        if _onednn.pays(a, b, out):
            _onednn.multiply(a, b, out, adds=adds)
        elif adds:
            add_product(a, b, out)
        elif a.dtype == out.dtype:
            torch.mm(a, b, out=out)
        else:
            product(a, b, out)
        return
    a = a.to(out.dtype)
    n_inner, n_cols = b.shape
    if b.dtype == out.dtype or b.numel() <= _TILE:
        multiply(a, b.to(out.dtype), out, adds=adds)
    elif n_cols >= n_inner:
        size = max(1, _TILE // n_inner)
        # one buffer, because the system may not take back those of earlier tiles
        cast = torch.empty_like(b[:, :size], dtype=out.dtype)
        for tile, part in zip(b.split(size, 1), out.split(size, 1), strict=True):
            multiply(a, cast[:, : tile.shape[1]].copy_(tile), part, adds=adds)
    else:
        size = max(1, _TILE // n_cols)
        cast = torch.empty_like(b[:size], dtype=out.dtype)
        for tile, part in zip(b.split(size), a.split(size, 1), strict=True):
            multiply(part, cast[: len(tile)].copy_(tile), out, adds=adds)
            adds = True


def split(x: Tensor, like: Tensor) -> Tensor | None:
    """Return two matrices [2, n, m] in the dtype of `like` whose sum is x, if that pays.

    It does where factors of half precision are multiplied as they are. Two of them have twice the
    digits of one, in which a difference of nearly equal numbers is not lost.
    """
    if x.dtype == like.dtype or not _multiplies(like, x):
        return None
    halves = x.new_empty((2, *x.shape), dtype=like.dtype)
    halves[0] = x
    torch.sub(x, halves[0], out=halves[1])
    return halves


def _multiplies(half: Tensor, sums: Tensor) -> bool:
    """Return whether factors of half precision are multiplied as they are."""
    name = str(half.dtype).removeprefix("torch.")
    return name in ("float16", "bfloat16") and multiplies_halves(sums, name)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Return a b in `out`, half precision summed in float32."""
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(a: Tensor, b: Tensor, sums: Tensor) -> None:
    """Add a b to `sums`, half precision summed in float32."""
    if a.dtype == sums.dtype:
        sums.addmm_(a, b)
    elif _adds_in_place(a.dtype, a.device):
        torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
    else:
        sums += product(a, b, torch.empty_like(sums))


@functools.cache
def _adds_in_place(half: torch.dtype, device: torch.device) -> bool:
    """Return whether PyTorch adds products of half precision to float32, as newer ones do."""
    sums = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(sums, sums.to(half), sums.to(half), out_dtype=sums.dtype, out=sums)
    except RuntimeError:
        return False
    return True
