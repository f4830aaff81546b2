"""A stand-in for Triton's driver: what is launched is compiled for a GPU and executed here."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from .assembly import Kernel, parse
from .machine import Launched, Machine, Problem
from .traffic import Traffic

SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


# Triton before 3.7 writes no fence between the arrival of cp.async and the wgmma that reads it, and
# no kernel can mend that
FENCES_COPIES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


class PtxBackend(CUDABackend):
    """Triton's compiler for NVIDIA, stopped at PTX: ptxas makes nothing that could run here."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict, *arguments: Any) -> None:
        super().add_stages(stages, *arguments)
        del stages["cubin"]

    def hash(self) -> str:
        return f"ptx of {self.target.arch}"  # because Triton's cache must keep both apart


_kernels: dict[bytes, Kernel] = {}
_numbers = itertools.count(5000)  # of devices: a kernel keeps what it compiled for each


class Emulator:
    """A GPU of a target such as "sm_90", as Triton's driver describes and uses one.

    `launches` and `problems` grow with every launch, and `traffic` where it is not None.
    """

    def __init__(self, target: str = "sm_90", multiprocessors: int | None = None, seed: int = 0):
        self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        self.properties = {
            "max_shared_mem": SHARED_BYTES[self.target.arch],
            "max_num_regs": 65536,
            "multiprocessor_count": multiprocessors or MULTIPROCESSORS[self.target.arch],
            "warpSize": 32,
        }
        self.index, self.utils = next(_numbers), self
        self.generator = np.random.default_rng(seed)
        self.launches: list[Launched] = []
        self.problems: list[Problem] = []
        self.traffic: Traffic | None = None
        self.kernels: set[bytes] = set()
        self.change: Any = None  # what edits the PTX before it is parsed, for mutants

    # ----------------------------------------------------------------------- as Triton's driver

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, index: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, index: int | None = None) -> dict[str, int]:
        return self.properties

    def load_binary(self, name: str, ptx: bytes, shared: int, index: int) -> tuple:
        """Return module, function, registers, spills and the most threads of a kernel."""
        return ptx, ptx, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: Any, ptx: bytes, *further: Any) -> None:
            # packed metadata, launch metadata, two hooks, arguments
            self.execute(source, metadata, (x, y, z), ptx, further[4:])

        return launch

    # ---------------------------------------------------------------------------------- execution

    def execute(
        self, source: Any, metadata: Any, grid: tuple, ptx: bytes, arguments: tuple
    ) -> None:
        if self.change is not None:
            ptx = self.change(ptx.decode()).encode()
        self.kernels.add(ptx)
        if ptx not in _kernels:
            _kernels[ptx] = parse(ptx.decode())
        kernel = _kernels[ptx]
        given = [
            argument
            for name, value in zip(source.fn.arg_names, arguments, strict=True)
            for argument in flat(name, value, source.signature.get(name, "constexpr"))
        ]
        memory: dict[int, tuple[str, int]] = {}
        parameters: dict[str, Any] = {}
        for parameter, (name, value, kind) in itertools.zip_longest(
            kernel.parameters, given, fillvalue=("scratch", 0, "i64")
        ):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                names = name
                if storage.data_ptr() in memory:
                    names = f"{memory[storage.data_ptr()][0]}, {name}"
                memory[storage.data_ptr()] = names, storage.nbytes()
                value = np.uint64(value.data_ptr())
            elif kind.startswith("fp"):
                value = {"fp32": np.float32, "fp64": np.float64}[kind](value)
            else:
                value = np.uint64(int(value) % (1 << 64))
            parameters[parameter.name] = value
        threads = 32 * metadata.num_warps
        machine = Machine(
            kernel, grid, threads, parameters, memory, metadata.shared, self.traffic, FENCES_COPIES
        )
        launched = machine.run(self.generator)
        self.launches.append(launched)
        self.problems += launched.problems


class Argument(NamedTuple):
    name: str
    value: Any
    kind: str


def flat(name: str, value: Any, kind: Any) -> Iterator[Argument]:
    """Yield the arguments that PTX gets of one in Python: none of a constant, many of a tuple."""
    if isinstance(kind, tuple):
        names = getattr(value, "_fields", range(len(kind)))
        for part, inner, each in zip(names, value, kind, strict=True):
            yield from flat(f"{name}.{part}", inner, each)
    elif kind != "constexpr":
        if kind.startswith("tensordesc") or kind in ("fp16", "bf16"):
            raise TypeError(f"got {name}, an argument of the kind {kind}, which is not known")
        yield Argument(name, value, kind)


@contextlib.contextmanager
def emulated(
    target: str = "sm_90", multiprocessors: int | None = None, seed: int = 0
) -> Iterator[Emulator]:
    """Run Triton's kernels on CPU tensors as PTX of a target, and yield what watches them."""
    emulator = Emulator(target, multiprocessors, seed)
    # triton 3.4 keeps the driver in an attribute, later ones behind a property
    attribute = "active" if "active" in vars(driver) else "_active"
    nvidia = dataclasses.replace(backends["nvidia"], compiler=PtxBackend)
    with (
        mock.patch.dict(backends, nvidia=nvidia),
        mock.patch.object(driver, attribute, emulator),
    ):
        yield emulator
