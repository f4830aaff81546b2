"""Large tensors on a CPU in huge pages, where the system has them.

Every page of 4 KiB of a fresh tensor costs a fault when it is first written, which takes several
times as long as the writing. A page of 2 MiB costs one. Linux gives them to those who ask.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

_HUGE = 1 << 21  # bytes of such a page on x86 and on most of Arm
_ADVICE = 14  # MADV_HUGEPAGE


def in_huge_pages(fresh: Tensor) -> Tensor:
    """Return a tensor that nothing was written to yet, in huge pages if it is as large as two."""
    advise = _advise()
    if advise is not None and type(fresh) is Tensor and fresh.is_cpu and fresh.nbytes >= 2 * _HUGE:
        first, last = fresh.data_ptr(), fresh.data_ptr() + fresh.nbytes
        # whole pages inside the tensor, so that nothing else is touched; a refusal is no error
        start, end = -(-first // _HUGE) * _HUGE, last // _HUGE * _HUGE
        advise(start, end - start, _ADVICE)
    return fresh


@functools.cache
def _advise() -> Callable[..., Any] | None:
    """Return the system's call for advice about memory, or None where there is none."""
    if sys.platform != "linux":
        return None
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
