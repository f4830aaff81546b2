"""What the GPU run times on: a GPU or, to try the run out, Triton's interpreter on a CPU.

All that the two do differently is here.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from cases import Family
from provenance import processor
from torch import Tensor

DIRECTIONS = ("forward+backward", "forward")
Step = Callable[[], Any]


class Batch(NamedTuple):
    milliseconds: list[float]  # of each call, on the device
    host_milliseconds: float  # of one call, until all is launched


class Gpu:
    """CUDA events around each call, which finds no input in L2 and all launches in the queue."""

    name, label = "cuda", "measured"
    dtypes = (torch.bfloat16, torch.float32)
    compile_modes: ClassVar[dict[str, dict[str, Any]]] = {
        "torch.compile": {},
        "torch.compile max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    }
    rounds, calls, seconds_of_batch = 5, 5, 0.03
    most_random = 1 << 22  # elements that a CPU makes while nobody waits
    copy_bytes, matmul_size = 1 << 31, 8192

    def __init__(self) -> None:
        self._cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._other = torch.ones(self._cache_bytes, device=self.name)  # four times as large

    def description(self) -> dict[str, Any]:
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"]
        answer = ""
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # it may be missing or hang
            answer = subprocess.run(
                [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10
            ).stdout
        return {
            "device": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "driver": (answer.strip().splitlines() or ["unknown"])[0],
            "cuda": torch.version.cuda,
        }

    def target(self) -> str:
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"

    def sizes(self, family: Family) -> list[tuple[int, ...]]:
        return family.gpu_sizes

    def synchronise(self) -> None:
        torch.cuda.synchronize()

    def time(self, step: Step, calls: int, inputs_bytes: int, host_seconds: float) -> Batch:
        """`host_seconds`: what a call took to launch, or a guess of it."""
        is_small = inputs_bytes < 4 * self._cache_bytes
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        self.synchronise()
        # at 2 GHz until all is launched: no launch is waited for, the times are the device's
        torch.cuda._sleep(int(2e9 * min(0.2, 1e-3 + 1.2 * calls * host_seconds)))
        began = time.perf_counter()
        for start, end in events:
            if is_small:
                self._other.sum()  # leaves nothing of the inputs in L2
            start.record()
            step()
            end.record()
        host = (time.perf_counter() - began) / calls
        self.synchronise()
        return Batch([start.elapsed_time(end) for start, end in events], 1e3 * host)

    def peak(self, step: Step) -> int:
        """The most bytes that a step allocates at once."""
        self.synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        self.synchronise()
        return torch.cuda.max_memory_allocated() - before

    def forget(self) -> None:
        """What one problem left behind must not make the next one fail."""
        torch.compiler.reset()
        torch.cuda.empty_cache()


class Interpreter:
    """The same run in two minutes without a GPU. Its times mean nothing."""

    name, label = "cpu", "dry"
    dtypes = (torch.bfloat16,)
    compile_modes: ClassVar[dict[str, dict[str, Any]]] = {
        "torch.compile": {"backend": "aot_eager"},  # traces all and generates nothing
    }
    rounds, calls, seconds_of_batch = 2, 1, 0.0
    most_random = 1 << 10
    copy_bytes, matmul_size = 1 << 20, 64

    def __init__(self) -> None:
        from interpreter import correct

        torch.set_num_threads(1)
        correct()

    def description(self) -> dict[str, Any]:
        return {"device": f"Triton's interpreter on {processor()}"}

    def target(self) -> str:
        return "sm_90"

    def sizes(self, family: Family) -> list[tuple[int, ...]]:
        # long enough for every way to read a row; more than one tile of related examples
        return [
            (2 if family.independent else 40, *(min(size, 9000) for size in shape[1:]))
            for shape in (family.sizes[0], family.sizes[-1])
        ]

    def synchronise(self) -> None:
        pass

    def time(self, step: Step, calls: int, inputs_bytes: int, host_seconds: float) -> Batch:
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - began))
        return Batch(times, sum(times) / calls)

    def peak(self, step: Step) -> int:
        from meter import PeakMemory

        with PeakMemory() as memory:
            step()
        return memory.peak_bytes

    def forget(self) -> None:
        torch.compiler.reset()


Device = Gpu | Interpreter


def versions() -> dict[str, str]:
    import triton

    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "platform": sys.platform,
    }


def step_of(loss: Callable[..., Tensor], inputs: list[Tensor], direction: str) -> Step:
    def forward() -> Tensor:
        with torch.no_grad():
            return loss(*inputs)

    def both() -> Tensor:
        inputs[0].grad = None
        value = loss(*inputs)
        value.backward()
        return value.detach()

    return forward if direction == "forward" else both


class Found(NamedTuple):
    """What a step computed."""

    value: Tensor
    gradient: Tensor | None


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, by norm; of what is 0, absolute."""
    norm = functools.partial(torch.linalg.vector_norm, dtype=torch.float32)
    return float(norm(found - expected) / (norm(expected) or 1))


def disagreement(found: Found, ours: Found, tolerance: float) -> str:
    """In which way it is not fastkd's loss; nothing where it is."""
    if not difference(found.value, ours.value) < tolerance:
        return f"its loss is {found.value:.7g}, fastkd's {ours.value:.7g}"
    if found.gradient is not None and ours.gradient is not None:
        off = difference(found.gradient, ours.gradient)
        if not off < tolerance:
            norms = (f"{torch.linalg.vector_norm(x.gradient):.4g}" for x in (found, ours))
            return "its gradient, of norm {}, is off fastkd's, {}, by {:.2%}".format(*norms, off)
    return ""


def ceilings(device: Device) -> dict[str, float]:
    """What this device reaches now: a large copy, and large products of matrices."""
    source = torch.randn(device.copy_bytes // 4, device=device.name)
    target = torch.empty_like(source)
    copy = median(device, lambda: target.copy_(source), source.nbytes)
    size = device.matmul_size
    rates = {"copy_GBps": 2 * source.nbytes / copy / 1e6}
    wide = torch.randn(2, size, size, device=device.name)  # in float32: PyTorch's default precision
    for name, (left, right) in {"bf16": wide.bfloat16(), "fp32": wide}.items():
        product = median(device, functools.partial(torch.mm, left, right), left.nbytes)
        rates[f"matmul_{name}_TFLOPs"] = 2 * size**3 / product / 1e9
    return rates


def median(device: Device, step: Step, inputs_bytes: int) -> float:
    """Milliseconds of a step by itself."""
    step()  # compiles
    batches = [device.time(step, device.calls, inputs_bytes, 2e-4) for _ in range(device.rounds)]
    return statistics.median(x for batch in batches for x in batch.milliseconds)
