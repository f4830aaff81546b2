"""The compile gate: what a launcher would launch on a GPU, compiled without one.

    with capture("sm_90") as launches:
        operation(tensors on the meta device)

A stand-in for the driver compiles every kernel for the target and launches nothing; meta tensors
have shapes, strides and alignment but no memory, so production sizes cost nothing. What would wait
for the GPU raises: nothing can look at values that are not there, nor at the end of a stream.

Limits: @triton.autotune and kernel.warmup are not supported; inside torch.library.custom_op meta
tensors reach the fake and no launch is seen; gfx942 needs an external ld.lld before triton 3.5; a
copy from the host is not seen to wait, nor is what runs for tensors with is_cuda only.
"""

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.language import constexpr
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Device(NamedTuple):
    target: GPUTarget
    shared_bytes: int  # the most that one program may use
    multiprocessors: int
    most_warps: int = 64  # of a multiprocessor, and below of its programs
    most_programs: int = 32


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 166912, 108),  # A100
    "sm_86": Device(GPUTarget("cuda", 86, 32), 101376, 72, 48, 16),  # A10
    "sm_89": Device(GPUTarget("cuda", 89, 32), 101376, 142, 48, 24),  # L40S
    "sm_90": Device(GPUTarget("cuda", 90, 32), 232448, 132),  # H100
    "sm_100": Device(GPUTarget("cuda", 100, 32), 232448, 148),  # B200
    "sm_120": Device(GPUTarget("cuda", 120, 32), 101376, 170, 48, 24),  # RTX 5090
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 65536, 304),  # MI300X
}


class Tensor(NamedTuple):
    """A tensor argument without its memory: holding the tensor would change what autograd does."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Launch:
    name: str
    device: Device
    grid: tuple[int, int, int]
    args: dict[str, Any]  # by parameter name: a Tensor, the value, or a NamedTuple of both
    kernel: Any  # triton's CompiledKernel

    @property
    def metadata(self) -> Any:
        """Return num_warps, num_stages, shared (bytes) and so on."""
        return self.kernel.metadata

    @property
    def asm(self) -> dict[str, Any]:
        """Return ttir, ttgir, llir, and ptx and cubin, or amdgcn and hsaco."""
        return self.kernel.asm


class StandIn:
    """A triton driver with as much as a launch asks for."""

    def __init__(self, device: Device, index: int):
        self.device, self.index = device, index
        self.utils = self
        self.launched: tuple = ()  # grid and arguments of the latest launch

    def get_current_target(self):
        return self.device.target

    def get_current_device(self):
        return self.index

    def get_current_stream(self, index=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_device_properties(self, index=None):
        return {
            "max_shared_mem": self.device.shared_bytes,
            "max_num_regs": 65536,
            "multiprocessor_count": self.device.multiprocessors,
            "warpSize": self.device.target.warp_size,
        }

    def load_binary(self, name, binary, shared, index):
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module):
        pass

    def launcher_cls(self, source, metadata):
        def launch(*arguments):
            # grid (3), stream, function, packed metadata, launch metadata, hooks (2), arguments
            self.launched = tuple(map(int, arguments[:3])), arguments[9:]

        return launch


# A kernel keeps what it compiled per device index: far from any real index, one for each target.
STAND_INS = {name: StandIn(DEVICES[name], 1000 + i) for i, name in enumerate(DEVICES)}


WAITING = (torch.cuda, torch.cuda.Stream, torch.cuda.Event)  # their method synchronize


def wait(*args, **options):
    raise RuntimeError("synchronize() waits for the GPU: a loss must not")


@contextlib.contextmanager
def capture(target: str = "sm_90"):
    """Yield the launches made inside; what does not compile, fit or go on at once raises."""
    launches: list[Launch] = []
    stand_in = STAND_INS[target]
    run_kernel = JITFunction.run

    def run(self, *args, **options):
        kernel = run_kernel(self, *args, **options)
        grid, values = stand_in.launched
        described = dict(zip(self.arg_names, map(describe, values), strict=True))
        stand_in.launched = ()  # tensors that are held change what autograd does
        launches.append(Launch(self.__name__, stand_in.device, grid, described, kernel))
        return kernel

    # triton 3.4 keeps the driver in an attribute, later ones behind a property
    attribute = "active" if "active" in vars(driver) else "_active"
    with contextlib.ExitStack() as patches:
        for place, name, replacement in (
            (driver, attribute, stand_in),
            (JITFunction, "run", run),
            *((place, "synchronize", wait) for place in WAITING),
        ):
            patches.enter_context(mock.patch.object(place, name, replacement))
        yield launches


def describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Tensor(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, tuple):
        members = map(describe, value)
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    return value.value if isinstance(value, constexpr) else value
