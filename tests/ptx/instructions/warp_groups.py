"""Products of warp groups (wgmma): 128 threads, with matrices that shared memory holds."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ..asynchrony import Product
from ..forms import Form, instruction
from .control import whole
from .matrices import numbers, parts

U16, U32, U64, F32 = np.uint16, np.uint32, np.uint64, np.float32
THREAD = np.arange(128)
ROW, PAIR = 16 * (THREAD // 32) + THREAD % 32 // 4, THREAD % 4


@instruction("wgmma.fence.sync.aligned", together="warp group")
def fence(form: Form) -> Any:
    """Order nothing: registers are written at once here."""
    return lambda machine: whole(machine, 128)


@instruction("wgmma.commit_group.sync.aligned", together="warp group")
def commit(form: Form) -> Any:
    def execute(machine: Any) -> None:
        machine.flight.n_products[groups_of(machine)] += 1

    return execute


@instruction("wgmma.wait_group.sync.aligned", "i", together="warp group")
def wait(form: Form, most: int) -> Any:
    return lambda machine: machine.flight.wait_for_products(groups_of(machine), most)


def groups_of(machine: Any) -> np.ndarray:
    """Return the warp groups of the active lanes, counted through all programs."""
    whole(machine, 128)
    lanes = machine.numbers()[::128]
    return machine.program[lanes] * -(-machine.threads // 128) + machine.thread[lanes] // 128


class Swizzle:
    """How a matrix lies in shared memory: rows of 128, 64 or 32 bytes, whose parts are mixed.

    The descriptor has its start, the distance between blocks along the leading dimension and along
    the other one (all in 16 bytes), and the swizzle.
    """

    PITCH: ClassVar = {1: 128, 2: 64, 3: 32}
    MODE = 62, 2  # the first bit, and how many

    def __init__(self, descriptors: np.ndarray):
        def field(start: int, bits: int) -> np.ndarray:
            return (descriptors >> U64(start) & U64(2**bits - 1)).astype(np.int64)

        modes = np.unique(field(*self.MODE))
        if len(modes) != 1 or int(modes[0]) not in self.PITCH:
            raise ValueError(f"got the swizzles {modes}, need one of 128, 64 or 32 bytes")
        if field(49, 3).any():
            raise ValueError("got a matrix off the boundary of its pattern, which is not known")
        self.pitch = self.PITCH[int(modes[0])]
        self.start, self.leading, self.stride = (16 * field(x, 14) for x in (0, 16, 32))

    def addresses(self, rows: int, depth: int, size: int, transposed: bool) -> np.ndarray:
        """Return the addresses [G, rows, depth] of the numbers of a matrix, of `size` bytes each.

        Along the depth they lie one after the other, or along the rows where it is transposed.
        """
        row, k = np.arange(rows)[:, None], np.arange(depth)[None]
        start, leading, stride = (x[:, None, None] for x in (self.start, self.leading, self.stride))
        if transposed:
            per = self.pitch // size
            inside = k % 8 * self.pitch + row % per * size
            places = start + row // per * leading + k // 8 * stride + inside
        else:
            places = start + row // 8 * stride + row % 8 * self.pitch + k * size
        return places ^ (places >> 7 & self.pitch // 16 - 1) << 4


@instruction(
    "wgmma.mma_async.sync.aligned.m64n#k16.f32(.bf16.bf16|.f16.f16)",
    "{d}:f32, s:b64, s:b64, p, i, i, i, i",
    "warp group",
)
@instruction(
    "wgmma.mma_async.sync.aligned.m64n#k8.f32.tf32.tf32",
    "{d}:f32, s:b64, s:b64, p, i, i",
    "warp group",
)
@instruction(
    "wgmma.mma_async.sync.aligned.m64n#k16.f32(.bf16.bf16|.f16.f16)",
    "{d}:f32, {s}:b32, s:b64, p, i, i, i",
    "warp group",
)
@instruction(
    "wgmma.mma_async.sync.aligned.m64n#k8.f32.tf32.tf32",
    "{d}:f32, {s}:b32, s:b64, p, i, i", "warp group",
)  # fmt: skip
def multiply(
    form: Form,
    results: list,
    left: Any,
    right: Any,
    adds: Any,
    sign: int,
    sign_2: int,
    *turned: int,
) -> Any:
    """Begin D = A B + D, or A B where the predicate says so; it is summed in float64."""
    if (sign, sign_2) != (1, 1):
        raise ValueError(f"got the signs {sign} and {sign_2}, need 1 and 1")
    width, depth = map(int, form.words[4].removeprefix("m64n").split("k"))
    kind = form.words[-1]
    size = 4 if kind == "tf32" else 2
    if len(results) != width // 2:
        raise ValueError(f"got {len(results)} registers, need {width // 2} for {form.text}")
    in_registers = isinstance(left, list)
    turns = (*turned, 0, 0) if not in_registers else (0, *turned, 0)
    used = [*results, *(left if in_registers else [])]
    slots = frozenset(register.slot for register in used)
    columns = [8 * (i // 4) + 2 * PAIR + i % 2 for i in range(len(results))]
    rows = [ROW + 8 * (i // 2 % 2) for i in range(len(results))]

    def execute(machine: Any) -> None:
        owners = groups_of(machine)
        program = machine.of_lanes(machine.program)[::128]
        touched = [np.zeros((len(owners), 0), np.int64)]

        def matrix(descriptor: Any, n: int, transposed: int) -> np.ndarray:
            given = machine.spread(descriptor(machine)).reshape(-1, 128)
            if (given != given[:, :1]).any():
                machine.report("the threads of a warp group name different matrices")
            addresses = Swizzle(given[:, 0]).addresses(n, depth, size, bool(transposed))
            programs = np.repeat(program, addresses[0].size)
            places = machine.shared.places(programs, addresses.ravel(), size)
            touched.append(places.reshape(len(owners), -1))
            bits = machine.shared.bytes.view(U32 if size == 4 else U16)[places // size]
            return numbers(bits, kind).reshape(addresses.shape)

        if in_registers:
            a = np.zeros((len(owners), 64, depth))
            for i, source in enumerate(left):
                bits = machine.spread(source(machine)).reshape(-1, 128)
                per = 4 // size
                for j, part in enumerate(parts(bits, per)):
                    a[:, ROW + 8 * (i % 2), 4 * per * (i // 2) + per * PAIR + j] = numbers(
                        part, kind
                    )
        else:
            a = matrix(left, 64, turns[0])
        b = matrix(right, width, turns[1])
        c = np.zeros((len(owners), 64, width))
        keeps = machine.spread(adds(machine)).reshape(-1, 128)[:, 0]
        if keeps.any():
            for row, column, result in zip(rows, columns, results, strict=True):
                values = machine.read(result.slot).view(F32).reshape(-1, 128)
                c[:, row, column] = np.where(keeps[:, None], values, F32(0))
        product = (a @ b.swapaxes(1, 2) + c).astype(F32)
        for row, column, result in zip(rows, columns, results, strict=True):
            result(machine, product[:, row, column].ravel())
        warps = machine.of_lanes(machine.warp).reshape(-1, 128)[:, ::32]
        units = machine.flight.read_by_proxy(program, warps, np.concatenate(touched, 1))
        numbers_of_groups = machine.flight.n_products[owners].copy()
        machine.flight.begin_product(Product(owners, numbers_of_groups, units, slots))

    return execute
