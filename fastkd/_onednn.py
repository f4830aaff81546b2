"""Matrix products in float32 by oneDNN, on processors where PyTorch's own take twice the time.

PyTorch multiplies float32 by MKL, which has slower ways for processors that are not Intel's.
oneDNN, which PyTorch brings too, has not, but its operator returns a new matrix: products are made
by blocks, which stay in the cache until they lie in their place. It adds more numbers one after the
other than MKL does, which costs digits: sums are cut to be as exact. MKL keeps all other products,
among them those on Intel's processors and on those without AVX-512, where nobody measured oneDNN.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

_BLOCK = 1 << 19  # elements of a block
_MOST = 4 * _BLOCK  # those of a block that would have too few rows
_FEWEST_ROWS = 256  # below which the other factor is read too often
_DEPTH = 128  # terms of a sum that one call of the operator adds
_LEAST_WORK = 1 << 24  # multiplications below which a call costs more than is gained
_LARGE = 8 * _BLOCK  # elements of a matrix beside which a block takes no memory to speak of


def pays(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Return whether oneDNN writes a b to `out` in less time than PyTorch's own product."""
    if any(type(x) not in (Tensor, Parameter) for x in (a, b, out)):
        return False
    if any(not x.is_cpu or x.dtype != torch.float32 for x in (a, b, out)):
        return False
    if a.numel() * b.shape[1] < _LEAST_WORK or max(x.numel() for x in (a, b, out)) < _LARGE:
        return False
    if not _is_quicker():
        return False
    return bool(torch.backends.mkldnn.enabled) and _rows_of_blocks(a, b) > 0


def multiply(a: Tensor, b: Tensor, out: Tensor, *, adds: bool) -> None:
    """Write a b to `out`, or add it to that."""
    for part, block in _blocks(a, b, out):
        _ = part.add_(block) if adds else part.copy_(block)


def _blocks(a: Tensor, b: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Return parts of `out` and what belongs there, made from columns of b or from rows of a."""
    size = _rows_of_blocks(a, b)
    if _is_wide(a, b):
        for columns, part in zip(b.split(size, 1), out.split(size, 1), strict=True):
            yield part, _sum_of_products(a, columns)
    else:
        for rows, part in zip(a.split(size), out.split(size), strict=True):
            yield part, _sum_of_products(rows, b)


def _rows_of_blocks(a: Tensor, b: Tensor) -> int:
    """Return how many columns or rows make a block, or 0 if a block would be too large."""
    width = len(a) if _is_wide(a, b) else b.shape[1]
    size = max(_BLOCK // width, _FEWEST_ROWS)
    return size if size * width <= _MOST else 0


def _is_wide(a: Tensor, b: Tensor) -> bool:
    """Return whether columns of b are taken rather than rows of a."""
    return b.t().is_contiguous() and b.shape[1] >= len(a)


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    found = None
    for x, y in zip(a.split(_DEPTH, 1), b.split(_DEPTH), strict=True):
        # of a matrix with holes oneDNN has no quick product
        y = y.t() if y.is_contiguous() else y.t().contiguous()
        found = _product(x, y) if found is None else found.add_(_product(x, y))
    assert found is not None
    return found


def _product(a: Tensor, transposed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, transposed, None, "none", [], "")


@functools.cache
def _is_quicker() -> bool:
    """Return whether PyTorch has both libraries, and the processor is one for which that counts."""
    if not torch.backends.mkl.is_available() or _is_made_by_intel():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    ones = torch.ones(2, 2)
    with contextlib.suppress(AttributeError, RuntimeError, TypeError):
        return torch.equal(_product(ones, ones), 2 * ones)
    return False


def _is_made_by_intel() -> bool:
    with contextlib.suppress(OSError):
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    return "GenuineIntel" in platform.processor()
