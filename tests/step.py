"""Count what a training step of a loss launches on a GPU and moves through its memory, without one.

    python tests/step.py info_nce 65536x512 bfloat16 [sm_90]
    python tests/step.py forward_kl-teacher_gradient 4096x8192 bfloat16
    python tests/step.py "kd, soft labels" 4096x1000 bfloat16
    step = count(BY_NAME["info_nce"], (65536, 512), torch.bfloat16)
    step.launches, step.bytes       forward and backward of PyTorch's operations and our kernels

Meta tensors stand for those on the GPU, so that production sizes cost nothing. An operation reads
its inputs and writes its outputs, each byte once: caches are taken to hold what is read again, and
temporaries inside one operation are not seen. For kernels their own code tells which arguments they
read and write. Products of half precision, which only CUDA has, are taken to be there.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from gate import DEVICES, Launch, Tensor, capture
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastkd
from fastkd import _products as products

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from logit_rows import WORKLOADS
from workloads import BOTH, BY_NAME, Workload

# they allocate, or say how memory is to be seen
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("lift_fresh", "resize_", "set_", "_unsafe_view", "detach"),
}
# made of several others inside PyTorch
SEVERAL = {"logsumexp": 9, "constant_pad_nd": 2, "masked_fill": 2}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
# kernels that read logits, or write gradients, where a network is certain alone
OF_FEW_ROWS = ("certain_classes", "finish_rows")
OVERWRITE = {"copy_", "zero_", "fill_"}  # do not read what they write to
FILLED = {"new_full", "full_like", "new_ones", "ones_like", "new_zeros", "zeros_like"}  # read none


class Operation(NamedTuple):
    """An operation that PyTorch runs at once, or a launch of a kernel of ours."""

    name: str
    launches: int
    read: int  # bytes
    written: int
    is_kernel: bool
    flops: int = 0  # of a product of matrices


class Step(NamedTuple):
    """Everything that a step launches, the `n_forward` operations of the loss first."""

    operations: list[Operation]
    n_forward: int

    @property
    def launches(self) -> int:
        return sum(x.launches for x in self.operations)

    @property
    def bytes(self) -> int:
        return sum(x.read + x.written for x in self.operations)

    @property
    def flops(self) -> int:
        return sum(x.flops for x in self.operations)


class Operations(TorchDispatchMode):
    """The operations of PyTorch in a region that would launch something on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operation] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name, outputs = function._schema.name.removeprefix("aten::"), tensors_of(result)
        device = {x.device.type for x in [*outputs, *tensors_of((args, kwargs))]}
        if function.is_view or name in FREE or "meta" not in device or not any(map(numel, outputs)):
            return result
        read = [] if name in FILLED else [*args[1:]] if name in OVERWRITE else [*args]
        read += [value for key, value in kwargs.items() if not is_out(function, key)]
        inputs = {id(x): x for x in tensors_of(read)}.values()
        sizes = (sum(map(bytes_of, x)) for x in (inputs, outputs))
        flops = 0
        if name.removesuffix("_") in PRODUCTS:
            *_, a, b = (x for x in args if isinstance(x, torch.Tensor))
            flops = 2 * a.numel() * b.shape[-1]
        self.found.append(Operation(name, SEVERAL.get(name, 1), *sizes, False, flops))
        return result


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def bytes_of(tensor: torch.Tensor | Tensor) -> int:
    """Return the bytes of a tensor, those that it repeats once."""
    strides = tensor.stride() if isinstance(tensor, torch.Tensor) else tensor.stride
    sizes = zip(tensor.shape, strides, strict=True)
    return prod(size for size, stride in sizes if stride) * tensor.dtype.itemsize


def numel(tensor: torch.Tensor) -> int:
    return tensor.numel()


def is_out(function: Any, name: str) -> bool:
    return any(x.name == name and x.is_out for x in function._schema.arguments)


# ------------------------------------------------------------------------------------- our kernels


def of_kernel(launch: Launch) -> Operation:
    """Return a launch with the bytes of those arguments that its code loads from and stores to."""
    tensors = [x for x in tree_leaves(launch.args, is_leaf=is_tensor) if is_tensor(x)]
    loaded, stored = accesses(launch.asm["ttir"], len(tensors))
    # usual rows are meant, whose gradient is there already where it was foreseen
    if launch.name in OF_FEW_ROWS or launch.args.get("WEIGHED"):
        n_cols = launch.args["n_cols"]
        whole = {i for i, x in enumerate(tensors) if x.shape[-1:] == (n_cols,)}
        loaded, stored = loaded - whole, stored - whole
    read, written = (sum(bytes_of(tensors[i]) for i in places) for places in (loaded, stored))
    return Operation(launch.name, 1, read, written, is_kernel=True)


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def accesses(ttir: str, n_pointers: int) -> tuple[set[int], set[int]]:
    """Return the places, among the pointers that a kernel is given, of those loaded and stored."""
    lines = iter(ttir.splitlines())
    heading = next(line for line in lines if "tt.func" in line)
    pointers = re.findall(r"(%\w+): !tt\.ptr<", heading)
    assert len(pointers) == n_pointers, "an argument is no pointer in the compiled kernel"
    origins: dict[str, set[int]] = defaultdict(set, {x: {i} for i, x in enumerate(pointers)})
    found: dict[str, set[int]] = {"load": set(), "store": set()}
    for line in lines:
        for name, start in re.findall(r"(%\w+) = (%\w+)", line):  # what a loop carries
            origins[name] |= origins[start]
        result, _, operation = line.strip().partition(" = ")
        values = re.findall(r"%\w+", operation or result)
        if access := re.search(r"tt\.(load|store) ", line):
            assert origins[values[0]], f"which argument is this? {line}"
            found[access[1]] |= origins[values[0]]
        elif operation and "!tt.ptr<" in operation:
            # anew, because another branch may have a value of the same name
            origins[result.split(":")[0]] = set().union(*(origins[x] for x in values))
    return found["load"], found["store"]


# ---------------------------------------------------------------------------------------- the step


@contextlib.contextmanager
def multiplying_halves() -> Iterator[None]:
    """Let products of half precision have a float32 result, which PyTorch has on CUDA alone."""
    with mock.patch.multiple(
        products,
        multiplies_halves=lambda rows, half: bool(half),
        _adds_in_place=lambda half, device: True,
    ):
        yield


def count(
    case: Workload, shape: tuple[int, ...], dtype: torch.dtype, target: str = "sm_90"
) -> Step:
    """Return what the loss and the gradients in all its trained inputs launch."""
    inputs = case.inputs(shape, dtype, "meta")
    with capture(target) as launches, multiplying_halves(), Operations() as operations:
        with fastkd.backend("triton"):
            loss = case.fastkd(*inputs)
            n_launches, n_operations = len(launches), len(operations.found)
            torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])
    kernels, others = [*map(of_kernel, launches)], operations.found
    forward = kernels[:n_launches] + others[:n_operations]
    return Step(forward + kernels[n_launches:] + others[n_operations:], len(forward))


def unit_of(case: Workload, shape: tuple[int, ...]) -> tuple[str, int]:
    """Return what bytes are counted for, and how many of it there are."""
    if case.problem in ("pairs", "relations"):
        return "pair", shape[0] ** 2
    if case.problem == "linear":
        return "logit", shape[0] * shape[-1]
    return "element", prod(shape)


def table(step: Step, unit: str, n: int) -> list[str]:
    """Return a line for the whole, and one for each kind of operation, the largest first."""
    ours = sum(x.launches for x in step.operations if x.is_kernel)
    lines = [
        f"{step.launches} launches ({step.launches - ours} of PyTorch, {ours} of our kernels), "
        f"{step.bytes / n:.2f} bytes for each {unit}"
    ]
    if step.flops:
        n_products = sum(x.launches for x in step.operations if x.flops)
        lines[0] += f", {n_products} products of matrices with {step.flops / 1e12:.3g} TFLOP"
    kinds: dict[str, list[Operation]] = defaultdict(list)
    for operation in step.operations:
        kinds[operation.name + " (kernel)" * operation.is_kernel].append(operation)
    sums = [(sum(y.read + y.written for y in x), name, x) for name, x in kinds.items()]
    for moved, name, same in sorted(sums, key=lambda x: (-x[0], x[1])):
        lines.append(f"{sum(x.launches for x in same):7} {moved / n:9.3f}  {name}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = {x.label: x for x in (*WORKLOADS, *BOTH)} | BY_NAME
    parser.add_argument("loss", choices=known, metavar="LOSS")
    parser.add_argument("shape", metavar="65536x512")
    parser.add_argument("dtype", choices=("bfloat16", "float16", "float32", "float64"))
    parser.add_argument("target", nargs="?", default="sm_90", choices=DEVICES)
    options = parser.parse_args()
    case, shape = known[options.loss], tuple(map(int, options.shape.split("x")))
    step = count(case, shape, getattr(torch, options.dtype), options.target)
    lines = table(step, *unit_of(case, shape))
    print(f"{options.loss} {options.shape} {options.dtype} {options.target}: {lines[0]}")
    print(*lines[1:], sep="\n")


if __name__ == "__main__":
    main()
