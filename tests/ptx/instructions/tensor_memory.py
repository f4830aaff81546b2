"""Products of Blackwell (tcgen05): accumulators in tensor memory, and barriers that count arrivals.

A product is there at once, but what it reads and writes stays in flight until a thread has waited
for the barrier to which it was committed. Who waits there in vain lets all others go on first.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ..forms import Form, instruction
from .control import whole
from .matrices import numbers
from .warp_groups import Swizzle

U16, U32, U64, F32 = np.uint16, np.uint32, np.uint64, np.float32


@instruction("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32", "[a], i", together="warp")
def allocate(form: Form, address: Any, n_columns: int) -> Any:
    """Reserve columns, and store the address of the first one in shared memory."""
    check_columns(n_columns)

    def execute(machine: Any) -> None:
        whole(machine, 32)
        lanes = machine.numbers()[::32]
        first = machine.tensors.allocate(machine.program[lanes], n_columns)
        places = address(machine)[::32]
        machine.flight.store(lanes, places, 4, 1, [first.astype(U32)])

    return execute


@instruction("tcgen05.dealloc.cta_group::1.sync.aligned.b32", "s, i", together="warp")
def free(form: Form, address: Any, n_columns: int) -> Any:
    check_columns(n_columns)

    def execute(machine: Any) -> None:
        whole(machine, 32)
        firsts = machine.spread(address(machine))[::32]
        machine.tensors.free(machine.program[machine.numbers()[::32]], firsts, n_columns)

    return execute


def check_columns(n: int) -> None:
    if n not in (32, 64, 128, 256, 512):
        raise ValueError(f"got {n} columns, need a power of 2 from 32 to 512")


@instruction("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned", together="warp")
def relinquish(form: Form) -> Any:
    return lambda machine: None


@instruction("tcgen05.wait::ld.sync.aligned", together="warp")
def wait_for_loads(form: Form) -> Any:
    return lambda machine: machine.tensors.wait_for_loads()


@instruction("tcgen05.wait::st.sync.aligned", together="warp")
def wait_for_stores(form: Form) -> Any:
    return lambda machine: machine.tensors.wait_for_stores()


@instruction("tcgen05.fence::(before|after)_thread_sync")
def fence(form: Form) -> Any:
    """Order nothing: products are ordered by barriers alone here."""
    return lambda machine: None


# ---------------------------------------------------------------------- registers and tensor memory


def cells(machine: Any, address: Any, n: int, split: int) -> tuple:
    """Return programs, rows and columns [lanes, n] of two halves of a warp.

    The first 16 lanes have the rows and columns from the address on, a row each; the others have
    the same rows, `split` columns further.
    """
    whole(machine, 32)
    given = address(machine).astype(np.int64)
    lane = machine.of_lanes(machine.thread) % 32
    row = (given >> 16) + lane % 16
    column = (given & 0xFFFF) + (lane >= 16) * split
    quarter = machine.of_lanes(machine.warp) % 4
    if (row // 32 != quarter).any():
        machine.report("a warp touches rows of tensor memory that are another warp's")
    program = machine.of_lanes(machine.program)
    columns = column[:, None] + np.arange(n)
    machine.tensors.check(program, row, columns)
    return program[:, None], row[:, None] % 128, columns % 512


def check_registers(form: Form, registers: list) -> None:
    if len(registers) != form.number("x"):
        raise ValueError(f"got {len(registers)} registers, need {form.number('x')} for {form.text}")


SHAPE = ".sync.aligned.16x32bx2(.x1|.x2|.x4|.x8|.x16|.x32|.x64|.x128).b32"


@instruction("tcgen05.ld" + SHAPE, "{d}, [a], i", together="warp")
def load(form: Form, destinations: list, address: Any, split: int) -> Any:
    check_registers(form, destinations)
    slots = frozenset(destination.slot for destination in destinations)

    def execute(machine: Any) -> None:
        machine.tensors.load(slots)
        values = machine.tensors.words[cells(machine, address, len(destinations), split)]
        for i, destination in enumerate(destinations):
            destination(machine, values[:, i])

    return execute


@instruction("tcgen05.st" + SHAPE, "[a], i, {s}", together="warp")
def store(form: Form, address: Any, split: int, sources: list) -> Any:
    check_registers(form, sources)

    def execute(machine: Any) -> None:
        machine.tensors.store()
        values = np.stack([machine.spread(source(machine)) for source in sources], 1)
        machine.tensors.words[cells(machine, address, len(sources), split)] = values

    return execute


# ----------------------------------------------------------------------------------------- products


class TensorSwizzle(Swizzle):
    """The layout of a matrix in shared memory, as descriptors of this generation have it."""

    PITCH: ClassVar = {2: 128, 4: 64, 6: 32}
    MODE = 61, 3


def multiply(form: Form, target: Any, left: Any, right: Any, shape: Any, adds: Any) -> Any:
    """Compute D = A B + D, or A B, of one thread's operands; A may be in tensor memory.

    The descriptor of the shape has the types, the transpositions, and the numbers of rows.
    """
    tf32 = form.has("kind::tf32")
    in_tensors = hasattr(left, "offset")
    depth, size = (8, 4) if tf32 else (16, 2)

    def execute(machine: Any) -> None:
        lanes = machine.numbers()
        program = machine.program[lanes]
        given = np.unique(machine.spread(shape(machine)))
        if len(given) != 1:
            raise ValueError(f"got the shapes {given}, need one")
        bits = int(given[0])
        kind = {0: "f16", 1: "bf16", 2: "tf32"}.get(bits >> 7 & 7)
        m, n = (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3
        if bits & 0xE080606F or not bits >> 4 & 1 or (bits >> 10 ^ bits >> 7) & 7 or not kind:
            raise ValueError(f"got the shape {bits:#x}, need plain products of one type in float32")
        if (kind == "tf32") != tf32 or m not in (64, 128) or not n or n > 256 or n % (m // 8):
            raise ValueError(f"got the shape {m} x {n} of {kind}, which {form.text} does not have")
        rows = np.arange(m) if m == 128 else np.arange(m) // 16 * 32 + np.arange(m) % 16
        touched = [np.zeros((len(lanes), 0), np.int64)]

        def matrix(descriptor: Any, n_rows: int, turned: int) -> np.ndarray:
            descriptors = machine.spread(descriptor(machine))
            places = TensorSwizzle(descriptors).addresses(n_rows, depth, size, bool(turned))
            each = np.repeat(program, places[0].size)
            flat = machine.shared.places(each, places.ravel(), size)
            touched.append(flat.reshape(len(lanes), -1))
            words = machine.shared.bytes.view(U32 if tf32 else U16)[flat // size]
            return numbers(words, kind).reshape(places.shape)

        def cells_of(address: Any, n: int) -> tuple:
            """Return the index of rows and n columns from an address on."""
            first = address(machine).astype(np.int64)[:, None, None]
            columns = (first & 0xFFFF) + np.arange(n)
            return program[:, None, None], (first >> 16) + rows[:, None], columns

        if in_tensors:
            words = machine.tensors.words[cells_of(left, depth * size // 4)]
            a = numbers(np.ascontiguousarray(words).view(U32 if tf32 else U16), kind)
        else:
            a = matrix(left, m, bits >> 15 & 1)
        b = matrix(right, n, bits >> 16 & 1)
        place = cells_of(target, n)
        keeps = machine.spread(adds(machine))[:, None, None]
        c = np.where(keeps, machine.tensors.words[place].view(F32), F32(0))
        machine.tensors.words[place] = (a @ b.swapaxes(1, 2) + c).astype(F32).view(U32)
        warps = np.repeat(machine.warp[lanes][:, None], 4, 1)
        units = machine.flight.read_by_proxy(program, warps, np.concatenate(touched, 1))
        machine.tensors.begin(program, target(machine), m, n, units)

    return execute


for operand in ("s:b64", "[a]"):
    instruction(
        "tcgen05.mma.cta_group::1(.kind::f16|.kind::tf32)", f"[a], {operand}, s:b64, s:b32, p"
    )(multiply)


@instruction("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64", "[a]")
def commit(form: Form, address: Any) -> Any:
    """Let a barrier count an arrival when the thread's products have ended."""

    def execute(machine: Any) -> None:
        machine.tensors.commit(machine.of_lanes(machine.program), address(machine))

    return execute


# ----------------------------------------------------------------------------------------- barriers


@instruction("mbarrier.init.shared[::cta].b64", "[a], i")
def begin_barrier(form: Form, address: Any, n_arrivals: int) -> Any:
    if n_arrivals != 1:
        raise ValueError(f"got a barrier of {n_arrivals} arrivals, need 1")

    def execute(machine: Any) -> None:
        write_barrier(machine, address)
        machine.tensors.begin_barriers(machine.of_lanes(machine.program), address(machine))

    return execute


@instruction("mbarrier.inval.shared[::cta].b64", "[a]")
def end_barrier(form: Form, address: Any) -> Any:
    def execute(machine: Any) -> None:
        write_barrier(machine, address)
        machine.tensors.end_barriers(machine.of_lanes(machine.program), address(machine))

    return execute


def write_barrier(machine: Any, address: Any) -> None:
    """Write the memory of a barrier, so that who uses it without having waited races with this."""
    places = address(machine)
    machine.flight.store(machine.numbers(), places, 8, 1, [np.zeros(len(places), U64)])


@instruction("mbarrier.try_wait.parity.shared[::cta].b64", "d:pred, [a], s:b32")
def try_barrier(form: Form, done: Any, address: Any, parity: Any) -> Any:
    """Say whether the phase of this parity has ended."""

    def execute(machine: Any) -> None:
        program, places = machine.of_lanes(machine.program), address(machine)
        machine.shared.access(program, places, 8, 1, machine.marks())
        given = machine.spread(parity(machine)).astype(np.int64)
        ended = machine.tensors.ended(program, places, given)
        done(machine, ended)
        machine.sleep(machine.numbers()[~ended])

    return execute
