"""Small PTX kernels of one instruction, whose inputs and outputs are numpy arrays."""

import numpy as np
import torch
from ptx import Traffic, launch
from ptx.forms import SIZES, TYPES
from ptx.machine import Launched

HEAD = ".version 8.7\n.target sm_100a\n.address_size 64\n.extern .shared .align 16 .b8 memory[];\n"


def kernel(body: str, n_pointers: int, registers: str = "") -> str:
    """Return PTX whose thread t has its element of each array at address %a0, %a1 and so on.

    Element sizes are fixed at 8 bytes; %t is the thread and %g its number through all programs.
    """
    parameters = ",\n".join(f".param .u64 p{i}" for i in range(n_pointers))
    addresses = "\n".join(
        f"ld.param.b64 %a{i}, [p{i}];\nmad.wide.u32 %a{i}, %g, 8, %a{i};" for i in range(n_pointers)
    )
    return f"""{HEAD}
.visible .entry snippet(
{parameters}
)
.reqntid 32
{{
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .b64 %q<40>;
.reg .b64 %a<{max(n_pointers, 1)}>; .reg .b32 %t; .reg .b32 %g; .reg .b32 %c; .reg .b32 %n;
{registers}
mov.u32 %t, %tid.x;
mov.u32 %c, %ctaid.x;
mov.u32 %n, %ntid.x;
mad.lo.s32 %g, %c, %n, %t;
{addresses}
{body}
ret;
}}"""


REGISTER = {1: "%h", 2: "%h", 4: "%r", 8: "%q"}
STORED = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def register(kind: str, i: int) -> str:
    return f"%p{i}" if kind == "pred" else f"{REGISTER[SIZES[kind]]}{i}"


def compute(text: str, result: str, *operands: tuple[str, np.ndarray]) -> np.ndarray:
    """Return what an instruction makes of arrays; its operands are %0 (the result), %1 and so on.

    `result` and the operands have the names of PTX types.
    """
    kinds = [result, *(kind for kind, _ in operands)]
    body, arrays = [], []
    for i, (kind, values) in enumerate(operands, 1):
        size = SIZES[kind]
        column = np.zeros(len(values), np.uint64)
        bits = np.ascontiguousarray(values, TYPES[kind])
        column.view(np.uint8).reshape(-1, 8)[:, :size] = bits.view(np.uint8).reshape(-1, size)
        arrays.append(column)
        width = STORED[size]
        where = f"%h{i}" if kind == "pred" else register(kind, i)
        body.append(f"ld.global.{width} {where}, [%a{i - 1}];")
        if kind == "pred":
            body.append(f"setp.ne.b16 %p{i}, %h{i}, 0;")
    names = [register(kind, i) for i, kind in enumerate(kinds)]
    for i in reversed(range(len(names))):
        text = text.replace(f"%{i}", names[i])
    body.append(f"{text};")
    if result == "pred":
        body.append("selp.b16 %h0, 1, 0, %p0;")
    width = STORED[SIZES[result]]
    target = "%h0" if result == "pred" else names[0]
    body.append(f"st.global.{width} [%a{len(operands)}], {target};")
    n = len(arrays[0]) if arrays else 32
    padded = -(-n // 32) * 32
    arrays = [np.concatenate([x, np.zeros(padded - n, x.dtype)]) for x in arrays]
    arrays.append(np.zeros(padded, np.uint64))
    run = launch(kernel("\n".join(body), len(arrays)), arrays, (padded // 32,), 32)
    assert not run.problems, run.problems
    size = SIZES[result]
    column = arrays[-1][:n].view(np.uint8).reshape(-1, 8)[:, :size]
    return np.ascontiguousarray(column).view(TYPES[result])[:, 0]


def run(
    body: str,
    *arrays: np.ndarray,
    threads: int = 64,
    grid: tuple = (1,),
    shared: int = 4096,
    traffic: Traffic | None = None,
) -> Launched:
    """Run a body whose thread t has its element of array i at %ai."""
    return launch(kernel(body, len(arrays)), arrays, grid, threads, shared, traffic)


def kinds(launched: Launched) -> set[str]:
    return {problem.kind for problem in launched.problems}


def seen(launched: Launched, *words: str) -> bool:
    """Return whether there is a problem, and each word is a part of every kind that there is."""
    found = kinds(launched)
    return bool(found) and all(word in kind for word in words for kind in found)


def aligned(n_bytes: int) -> np.ndarray:
    """Return 64-bit words that begin at a multiple of so many bytes."""
    memory = np.zeros(2 * n_bytes // 8, np.uint64)
    skip = -memory.ctypes.data % n_bytes // 8
    return memory[skip : skip + n_bytes // 8]


def bits_of(numbers: torch.Tensor) -> int:
    """Return one or two numbers as a register."""
    numbers = numbers.contiguous()
    if numbers.dtype == torch.float32:
        return int(numbers.view(torch.int32)[0]) & 0xFFFFFFFF
    low, high = (int(x) & 0xFFFF for x in numbers.view(torch.int16))
    return low | high << 16


# two warps that each write words of shared memory, and read their own or those of the other
SHARED = """
mov.u32 %r0, memory;
shl.b32 %r1, %t, 2;
add.s32 %r2, %r0, %r1;      // the word of this thread
xor.b32 %r3, %r1, 128;
add.s32 %r3, %r0, %r3;      // that of the same lane in the other warp
add.s32 %r9, %t, 7;
"""
