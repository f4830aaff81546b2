"""Devices to time a loss on: a CPU, a GPU or, to try a GPU run out, Triton's interpreter.

All that they do differently is here; runner.py measures the same way on each.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from workloads import LEADERS, Shape, Workload

Step = Callable[[], Tensor]


class Batch(NamedTuple):
    milliseconds: list[float]  # of each call
    host_milliseconds: float | None = None  # of one call, until all of it is launched


class Cpu:
    """A CPU, with as many threads as PyTorch takes or as the user says."""

    name, label, engine = "cpu", "measured", "portable"
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    compile_modes: ClassVar[dict[str, dict[str, Any]]] = {"torch.compile": {}}
    copy_bytes, matmul_size = 1 << 28, 2048
    compiled = 256 * 1000, 1 << 26  # numbers of the problems that are worth a compilation
    copies = 6  # of their largest temporary, that eager and its backward have at once
    unseen = ("torch.compile", "torch linear_cross_entropy")  # whose buffers no dispatch mode sees
    seconds, quick_seconds = 5.0, 0.5  # of measuring a problem

    def __init__(self, threads: int | None = None, quick: bool = False) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.quick = quick
        self.compile_modes = {} if quick or not shutil.which("g++") else self.compile_modes

    @property
    def threads(self) -> int | None:
        return torch.get_num_threads()

    def description(self) -> dict[str, Any]:
        return {"device": processor()}

    def shapes(self, workload: Workload) -> list[Shape]:
        family = workload.family
        return [x for x in family.sizes if not self.quick or family.temporary(x) < 1 << 24]

    def takes(self, name: str, temporary: int, itemsize: int) -> bool:
        """Return whether an implementation that writes so many numbers fits and is worth it."""
        low, high = self.compiled
        if name in self.compile_modes and not low <= temporary < high:
            return False
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return name == "fastkd" or self.copies * temporary * itemsize < 0.75 * memory

    def options(self, name: str) -> dict[str, Any]:
        """Return those of torch.compile, whose code is made for one number of threads."""
        return {"options": {"cpp.threads": self.threads}}

    def first(self, name: str, step: Step) -> tuple[Tensor, int | None]:
        """Return the value of a first call, and the most bytes that it allocates at once."""
        if name in self.unseen:
            return step(), None
        from meter import PeakMemory

        with PeakMemory() as memory:
            value = step()
        return value, memory.peak_bytes

    def plan(self, seconds: dict[str, float]) -> tuple[int, dict[str, int]]:
        """Return the number of rounds, and of calls in each, from what one call takes."""
        calls = {name: max(1, min(200, int(0.01 / once))) for name, once in seconds.items()}
        of_round = sum(calls[name] * once for name, once in seconds.items())
        if of_round > 20:
            return 1, calls
        allowed = self.quick_seconds if self.quick else self.seconds
        return max(3, min(21, int(allowed / of_round))), calls

    def time(self, step: Step, calls: int, inputs_bytes: int, host_seconds: float) -> Batch:
        if host_seconds < 0.1:
            step()  # because the one before has emptied the caches and the allocator's lists
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - began))
        return Batch(times)

    def synchronise(self) -> None:
        pass

    def forget(self) -> None:
        """Drop what one problem left behind, which must not make the next one fail."""
        torch.compiler.reset()


class Gpu:
    """CUDA events around each call, which finds no input in L2 and all launches in the queue."""

    name, label, engine, threads = "cuda", "measured", "triton", None
    dtypes = (torch.bfloat16, torch.float32)
    compile_modes: ClassVar[dict[str, dict[str, Any]]] = {
        "torch.compile": {},
        "torch.compile max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    }
    copy_bytes, matmul_size = 1 << 31, 8192
    rounds, least_calls, most_calls, seconds = 5, 5, 20, 0.03

    @functools.cached_property
    def _other(self) -> Tensor:
        """Return a tensor that is four times as large as L2."""
        return torch.ones(torch.cuda.get_device_properties(0).L2_cache_size, device=self.name)

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

    def shapes(self, workload: Workload) -> list[Shape]:
        return workload.family.gpu_sizes

    def headlines(self, workload: Workload) -> list[Shape]:
        """Return the shapes that tell most of a loss, each of which goes another way."""
        return workload.family.headlines[: None if workload.name in LEADERS else 1]

    def takes(self, name: str, temporary: int, itemsize: int) -> bool:
        return True  # because a GPU says itself that it is full

    def options(self, name: str) -> dict[str, Any]:
        return self.compile_modes[name]

    def first(self, name: str, step: Step) -> tuple[Tensor, int | None]:
        value = step()  # compiles
        self.synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        self.synchronise()
        return value, torch.cuda.max_memory_allocated() - before

    def plan(self, seconds: dict[str, float]) -> tuple[int, dict[str, int]]:
        # more launches than that would not fit into the queue
        return self.rounds, {
            name: max(self.least_calls, min(self.most_calls, int(self.seconds / once)))
            for name, once in seconds.items()
        }

    def time(self, step: Step, calls: int, inputs_bytes: int, host_seconds: float) -> Batch:
        is_small = inputs_bytes < self._other.nbytes
        host = []
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        self.synchronise()
        # sleeps at 2 GHz until all is launched, so that the times are the device's alone
        torch.cuda._sleep(int(2e9 * min(0.2, 1e-3 + 1.2 * calls * host_seconds)))
        for start, end in events:
            if is_small:
                self._other.sum()  # leaves nothing of the inputs in L2
            start.record()
            began = time.perf_counter()
            step()
            host.append(time.perf_counter() - began)
            end.record()
        self.synchronise()
        # the quickest, because those wait for the device that find the queue full
        return Batch([start.elapsed_time(end) for start, end in events], 1e3 * min(host))

    def synchronise(self) -> None:
        torch.cuda.synchronize()

    def forget(self) -> None:
        torch.compiler.reset()
        torch.cuda.empty_cache()


class Interpreter(Cpu):
    """The run of a GPU in two minutes without one. Its times mean nothing."""

    label, engine, threads = "dry", "triton", None
    dtypes = (torch.bfloat16,)
    compiled = 0, 1 << 62
    compile_modes: ClassVar[dict[str, dict[str, Any]]] = {
        "torch.compile": {"backend": "aot_eager"},  # traces all and generates nothing
    }
    copy_bytes, matmul_size = 1 << 20, 64
    unseen = ()

    def __init__(self) -> None:
        from interpreter import correct

        torch.set_num_threads(1)
        correct()

    def description(self) -> dict[str, Any]:
        return {"device": f"Triton's interpreter on {processor()}"}

    def shapes(self, workload: Workload) -> list[Shape]:
        first, *_, last = workload.family.sizes
        if len(first) > 2:  # of maps and tokens, whose kernels take the interpreter longest
            middle = [min(size, 40) for size in first[1:-1]]
            return [(n, *middle, first[-1]) for n in (1, 2)]
        # long enough for every way to read a row, and more than one tile of related examples
        n, most = (2, 9000) if workload.family.independent else (33, 128)
        return [(n, min(width, most)) for _, width in (first, last)]

    def headlines(self, workload: Workload) -> list[Shape]:
        return self.shapes(workload)[:1]

    def time(self, step: Step, calls: int, inputs_bytes: int, host_seconds: float) -> Batch:
        batch = super().time(step, calls, inputs_bytes, host_seconds)
        return batch._replace(host_milliseconds=min(batch.milliseconds))

    def options(self, name: str) -> dict[str, Any]:
        return self.compile_modes[name]

    def plan(self, seconds: dict[str, float]) -> tuple[int, dict[str, int]]:
        return 1, dict.fromkeys(seconds, 1)


Device = Cpu | Gpu | Interpreter


def processor() -> str:
    """Return the name of the processor, and the vector instructions that PyTorch takes there.

    Processors of one name differ in these, and so do their figures.
    """
    return f"{_model()}, {torch.backends.cpu.get_cpu_capability()}"


def _model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = re.sub(r"\((R|TM)\)", "", line.split(":")[1])
                return " ".join(name.split())
    return platform.processor() or platform.machine()


def median(device: Any, step: Callable[[], Any], inputs_bytes: int) -> float:
    """Return the milliseconds of a step by itself."""
    step()  # compiles
    rounds, calls = device.plan({"": 1e-3})
    batches = [device.time(step, calls[""], inputs_bytes, 2e-4) for _ in range(rounds)]
    return statistics.median(x for batch in batches for x in batch.milliseconds)


def ceilings(device: Any) -> dict[str, float]:
    """Return what this device reaches now: a large copy, and large products of matrices."""
    source = torch.randn(device.copy_bytes // 4, device=device.name)
    target = torch.empty_like(source)
    copy = median(device, lambda: target.copy_(source), source.nbytes)
    size = device.matmul_size
    rates = {"copy_GBps": 2 * source.nbytes / copy / 1e6}
    wide = torch.randn(2, size, size, device=device.name)  # in float32: PyTorch's default precision
    for name, (left, right) in {"bf16": wide.bfloat16(), "fp32": wide}.items():
        product = median(device, functools.partial(torch.mm, left, right), left.nbytes)
        rates[f"matmul_{name}_TFLOPs"] = 2 * size**3 / product / 1e9
    return {name: float(f"{rate:.4g}") for name, rate in rates.items()}
