"""Products through cuBLAS that are summed in float32, of half precision too.

PyTorch has those of half precision on CUDA alone, and adds them to float32 in newer versions.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastkd._precision import multiplies_halves as multiplies_halves


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
