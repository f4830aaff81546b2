"""Print which files and functions of fastkd a loss passes, forward and backward.

    python tests/trip.py [forward_kl info_nce rkd]

Kernels run in Triton's interpreter. Comprehensions and lambdas do not count as functions; a switch
is a call of a function in another file than the one of the function that was called before it.
"""

import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import interpreter
import torch

import fastkd

ROOT = Path(fastkd.__file__).resolve().parent.parent
F32, BF16 = torch.float32, torch.bfloat16
LOSSES = {  # (way, engine, rows, columns, dtype)
    "forward_kl": [
        ("whole rows", "triton", 4, 64, F32),
        ("rows in sweeps", "triton", 2, 9000, F32),
        ("one chunk", "portable", 4, 64, F32),
        ("many chunks", "portable", 64, 16000, F32),
    ],
    "info_nce": [
        ("tiles", "triton", 16, 16, BF16),
        ("chunks", "triton", 16, 16, F32),
        ("one chunk", "portable", 16, 16, F32),
        ("many chunks", "portable", 1200, 16, F32),
    ],
    "rkd": [("tiles", "triton", 8, 16, F32), ("one chunk", "portable", 8, 16, F32)],
}


def trip(loss: Callable[..., Any], *batch: torch.Tensor) -> list[tuple[str, str]]:
    """Return (file, function) of each call in the project, forward and backward, in order."""
    calls: list[tuple[str, str]] = []

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        file = _in_project(code.co_filename) if event == "call" else ""
        if file and not code.co_name.startswith("<"):
            name = code.co_qualname if sys.version_info >= (3, 11) else code.co_name
            calls.append((file, name.replace("<locals>.", "")))

    threading.setprofile(note)  # of threads that start during the run
    sys.setprofile(note)
    try:
        loss(*batch).backward()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return calls


@functools.cache
def _in_project(file: str) -> str:
    path = os.path.relpath(os.path.realpath(file), ROOT)
    return path if path.startswith(("fastkd/", "kernels/")) else ""


def main(losses: list[str]) -> None:
    interpreter.correct()
    for loss in losses or list(LOSSES):
        for way, engine, rows, columns, dtype in LOSSES[loss]:
            student = torch.randn(rows, columns, dtype=dtype, requires_grad=True)
            teacher = torch.randn(rows, columns, dtype=dtype)
            print(f"\n{loss}, {engine}, {way}: {rows} × {columns}, {dtype}")
            with fastkd.backend(engine):
                for _ in range(2):  # the imports and caches of a first call are not counted
                    calls = trip(getattr(fastkd, loss), student, teacher)
            switches = sum(before[0] != after[0] for before, after in itertools.pairwise(calls))
            functions = {file: dict.fromkeys(y for x, y in calls if x == file) for file, _ in calls}
            count = sum(map(len, functions.values()))
            print(f"{len(functions)} files, {count} functions, {switches} switches of file")
            for file, names in functions.items():
                print(f"  {file:36} {len(names):2}  {', '.join(names)}")


if __name__ == "__main__":
    main(sys.argv[1:])
