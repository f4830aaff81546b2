"""Meters of what a step allocates and multiplies, and of the memory of process and machine."""

from __future__ import annotations

import math
from pathlib import Path

import torch

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "addbmm")


def profiler() -> torch.profiler.profile:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    return torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def products(profile: torch.profiler.profile) -> tuple[int, int]:
    """Return how many products of matrices were made, and their FLOP; oneDNN's blocks are many."""
    n = flops = 0
    for event in profile.events():
        name = event.name.removeprefix("aten::")
        if name in PRODUCTS and event.name.startswith("aten::"):
            a, b = event.input_shapes[1:3] if "add" in name else event.input_shapes[:2]
            n_cols = b[-1]
        elif name == "mkldnn::_linear_pointwise":
            a, (n_cols, _) = event.input_shapes[:2]
        else:
            continue
        n += 1
        flops += 2 * math.prod(a) * n_cols
    return n, flops


def allocated(profile: torch.profiler.profile) -> int:
    """Return the most bytes of PyTorch's allocator in use at once, beyond those at the start."""
    events = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
