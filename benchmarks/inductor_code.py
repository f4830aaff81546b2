"""Generate what torch.compile would for an H100, on a machine that has none.

    with pretend_h100():
        forward, backward = map(lower, graphs(loss, inputs))
    with runnable("cpu"):                                              or "meta"
        outputs = load(forward)([inputs])

The graph of forward and backward is traced on the CPU and said to lie on the GPU; all that follows
is Inductor's own: its passes, where it divides the graph, the source, the block sizes and warps,
the first of them where it would time several. Private to torch 2.13: a development tool.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from gate import STAND_INS
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._inductor import async_compile, config, scheduler
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import _recursive_post_grad_passes, partition_fn
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton as torch_triton
from torch.utils._pytree import tree_map_only
from triton.runtime import driver

CUDA = torch.device("cuda:0")
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


def register_guard() -> None:
    root, folder = Path(torch.__file__).parent, tempfile.mkdtemp()
    library = f"{folder}/guard.so"
    source = str(Path(__file__).with_name("inductor_guard.cpp"))
    paths = [f"-I{root}/include", f"-L{root}/lib", "-lc10", f"-Wl,-rpath,{root}/lib"]
    command = ["g++", "-shared", "-fPIC", "-std=c++20", source, "-o", library, *paths]
    subprocess.run(command, check=True)
    ctypes.CDLL(library)


def _always(value: Any) -> Any:
    return lambda *args, **options: value


@contextlib.contextmanager
def pretend_h100(multiprocessors: int = 132) -> Iterator[None]:
    joint_graph.lazy_init(CUDA)  # once: its patterns are traced on the GPU if there is one
    device = SimpleNamespace(**{**vars(H100), "multi_processor_count": multiprocessors})
    answers = {
        torch.cuda: dict(
            is_available=True,
            device_count=1,
            current_device=0,
            get_device_properties=device,
            get_device_capability=(9, 0),
            get_device_name=H100.name,
            get_rng_state=torch.empty(0),
            set_rng_state=None,
            _exchange_device=0,
            _maybe_exchange_device=0,
        ),
        CudaInterface: dict(
            is_available=True,
            is_triton_capable=True,
            raise_if_triton_unavailable=None,
            get_device_properties=device,
            get_compute_capability=90,
        ),
        CudaInterface.Worker: dict(get_device_properties=device),
        scheduler: dict(has_triton=True),
        torch_triton: dict(has_triton=True),
    }
    with contextlib.ExitStack() as patches:
        for place, values in answers.items():
            for name, value in values.items():
                patches.enter_context(mock.patch.object(place, name, _always(value)))
        attribute = "active" if "active" in vars(driver) else "_active"
        for place, name, value in (
            (torch.version, "cuda", "13.0"),
            (driver, attribute, STAND_INS["sm_90"]),
        ):
            patches.enter_context(mock.patch.object(place, name, value))
        settings = {"compile_threads": 1, "force_disable_caches": True}
        patches.enter_context(config.patch(settings))
        yield


def graphs(loss: Callable[..., Any], inputs: Sequence[Any]) -> Sequence[Any]:
    """Trace forward and backward on the pretended GPU, divided as Inductor divides them."""
    with FakeTensorMode() as mode:
        # autograd would ask for a stream of the GPU: the graph is traced on the CPU
        fakes = [
            torch.empty(x.shape, dtype=x.dtype).requires_grad_(x.requires_grad) for x in inputs
        ]
        joint = aot_export_joint_simple(
            lambda *inputs: (loss(*inputs),),
            fakes,
            trace_joint=True,
            decompositions=select_decomp_table(),
        )
        for node in joint.graph.nodes:
            node.meta = tree_map_only(torch.Tensor, on_cuda, node.meta)
        with V.set_fake_mode(mode):  # it computes constants: they must be on the CPU yet
            parts = partition_fn(joint, examples_of(joint), num_fwd_outputs=1)
        for part in parts:
            for node in part.graph.nodes:
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": CUDA}
        return parts


def on_cuda(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)


def examples_of(graph: torch.fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]


def lower(graph: torch.fx.GraphModule) -> str:
    """Return the source of the module that Inductor generates for the graph."""
    inputs = examples_of(graph)
    with V.set_fake_mode(inputs[0].fake_mode), V.set_debug_handler(DebugContext()):
        _recursive_post_grad_passes(graph)
        lowering = GraphLowering(graph, example_inputs=inputs)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            code, _ = lowering.codegen()
    return code.value


class Launcher:
    """A substitute for Inductor's autotuner that launches with the first of its configurations."""

    def __init__(self, kernel, configs, inductor_meta, **options):
        self.kernel, self.config, self.meta = kernel, configs[0], inductor_meta

    def run(self, *arguments, stream=None):
        named = dict(zip(self.kernel.arg_names, arguments, strict=False))
        grid = triton_heuristics.GridExpr.from_meta(self.meta, self.config).eval_slow(named)
        options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
        self.kernel[grid](*arguments, **self.config.kwargs, **options)


class Kernels:
    """A substitute for Inductor's pool of compilers that imports a kernel's source at once."""

    def triton(self, name, source, **options):
        return getattr(PyCodeCache.load(source), name)

    def wait(self, scope):
        pass


class Mathematics:
    """A substitute for libdevice, which the interpreter lacks; it patches tl.math at a start."""

    def __getattr__(self, name):
        return getattr(tl.math, name)

    def isnan(self, x):
        return x != x


@contextlib.contextmanager
def runnable(device: str) -> Iterator[None]:
    """Make Inductor's modules run, on "cpu" in the interpreter and on "meta" in the gate."""

    def empty(shape, stride, dtype):
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    first = functools.partial(triton_heuristics.cached_autotune, caching_autotuner_cls=Launcher)
    replaced = [
        (async_compile, "AsyncCompile", Kernels),
        (triton_heuristics, "cached_autotune", first),
        (triton_helpers, "set_driver_to_gpu", _always(None)),
        (torch._C, "_cuda_getCurrentRawStream", _always(0)),
        (torch._C._dynamo.guards, "_empty_strided_cuda", empty),
        (torch.cuda, "_DeviceGuard", lambda index: contextlib.nullcontext()),
        (torch.cuda, "set_device", _always(None)),
    ]
    if device == "cpu":
        replaced += [(triton_helpers, name, Mathematics()) for name in ("libdevice", "math")]
        # the same but for NaN, and not one element after the other
        replaced += [(triton_helpers, "max2", lambda x, axis: tl.max(x, axis))]
    with contextlib.ExitStack() as patches:
        for place, name, value in replaced:
            patches.enter_context(mock.patch.object(place, name, value, create=True))
        yield


def load(code: str) -> Callable[[list[Any]], Sequence[Any]]:
    scope: dict[str, Any] = {"__name__": "generated", "__file__": __file__}
    exec(compile(code, "generated", "exec"), scope)
    return scope["call"]
