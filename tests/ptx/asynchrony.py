"""Operations beside the threads: copies, products of warp groups, and the proxy they read by."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .memory import EPOCH, PROGRAM

if TYPE_CHECKING:
    from .assembly import Statement
    from .machine import Machine

WARPS = (1 << EPOCH) - 1


class Copy(NamedTuple):
    """Copies to shared memory that some lanes have begun."""

    lanes: np.ndarray
    groups: np.ndarray  # the number of each lane's group
    targets: np.ndarray
    sources: np.ndarray
    n_bytes: int
    zeros: np.ndarray  # bool: the lane writes zeros and reads nothing


class Product(NamedTuple):
    """Products that some warp groups have begun: what they read, and where they will write."""

    owners: np.ndarray  # [G] warp groups, counted through all programs
    groups: np.ndarray  # [G] the number of each one's group
    units: list[np.ndarray]  # [G] of shared memory
    registers: frozenset[int]


class Asynchrony:
    """All that one batch of programs has in flight.

    A copy arrives when it is waited for and never before; until then its target holds NaN. Shared
    memory that a product reads must not be written before it is waited for, nor its registers be
    touched.
    """

    def __init__(self, machine: Machine):
        self.machine = machine
        self.copies: list[Copy] = []
        self.n_copies = np.zeros(machine.n_lanes, np.int64)  # groups that each lane committed
        self.products: list[Product] = []
        self.n_products = np.zeros(-(-machine.n_lanes // 128) + len(machine.programs), np.int64)
        self.registers: frozenset[int] = frozenset()
        self.read_by_products = np.zeros(len(machine.shared.watch.writer), np.int16)
        # when each unit was written, and when each warp ordered its accesses for the async proxy
        self.clock = 0
        n_warps = -(-machine.threads // 32)
        self.written = np.zeros(len(machine.shared.watch.writer), np.int64)
        self.fenced = np.zeros((len(machine.programs), n_warps), np.int64)
        self.fence_epoch = np.full((len(machine.programs), n_warps), -1, np.int64)

    # -------------------------------------------------------------------------------------- copies

    def begin_copy(
        self,
        lanes: np.ndarray,
        targets: np.ndarray,
        sources: np.ndarray,
        n_bytes: int,
        zeros: np.ndarray,
    ) -> None:
        groups = self.n_copies[lanes]
        self.copies.append(Copy(lanes.copy(), groups, targets, sources, n_bytes, zeros))

    def wait_for_copies(self, most: int) -> None:
        """Let those of the active lanes arrive, except their latest groups."""
        machine = self.machine
        here = np.zeros(machine.n_lanes, bool)
        here[machine.numbers()] = True
        waiting = []
        for copy in self.copies:
            arrive = here[copy.lanes] & (copy.groups < self.n_copies[copy.lanes] - most)
            if arrive.any():
                self._land(Copy(*(x[arrive] if isinstance(x, np.ndarray) else x for x in copy)))
            if not arrive.all():
                later = (x[~arrive] if isinstance(x, np.ndarray) else x for x in copy)
                waiting.append(Copy(*later))
        self.copies = waiting

    def _land(self, copy: Copy) -> None:
        machine, words = self.machine, copy.n_bytes // 4
        data = np.zeros((words, len(copy.lanes)), np.uint32)
        real = np.flatnonzero(~copy.zeros)
        if len(real):
            marks = machine.marks(copy.lanes[real])
            data[:, real] = machine.memory.access(copy.sources[real], 4, words, marks)
            machine.count("load", copy.lanes[real], copy.sources[real], copy.n_bytes)
        units = self.store(copy.lanes, copy.targets, 4, words, list(data))
        if not machine.copies_need_fence:
            self.written[units] = 0

    # -------------------------------------------------------------------------------------- shared

    def store(
        self, lanes: np.ndarray, addresses: np.ndarray, width: int, n: int, data: list
    ) -> np.ndarray:
        """Store into shared memory, and return the units, none of which a product may read."""
        machine = self.machine
        program = machine.program[lanes]
        machine.shared.access(program, addresses, width, n, machine.marks(lanes), data)
        places = np.clip(addresses.astype(np.int64), 0, machine.shared.n_bytes - width * n)
        units = machine.shared.units(program * machine.shared.n_bytes + places, width * n)
        self.note_write(units)
        return units

    def note_write(self, units: np.ndarray) -> None:
        """Note when units of shared memory are written, and whether a product reads them."""
        if self.read_by_products[units].any():
            self.machine.report("shared memory is written that a product in flight reads")
        self.clock += 1
        self.written[units] = self.clock

    def fence(self) -> None:
        """Order the accesses of the active lanes' warps before those of the async proxy."""
        machine = self.machine
        self.clock += 1
        lanes = machine.numbers()
        programs, warps = machine.program[lanes], machine.warp[lanes]
        self.fenced[programs, warps] = self.clock
        self.fence_epoch[programs, warps] = machine.epoch[programs]

    def read_by_proxy(self, program: np.ndarray, warps: np.ndarray, places: np.ndarray) -> list:
        """Check reads of the async proxy by warp groups [G], with their warps [G, 4].

        Places are [G, n], of bytes. What others wrote must lie behind a barrier, and what anybody
        wrote behind a fence: of the writer, or of the reader after that barrier. Return the units.
        """
        machine = self.machine
        units = [np.unique(x // machine.shared.unit) for x in places]
        for i, unit in enumerate(units):
            writer = machine.shared.watch.writer[unit]
            by = writer & WARPS
            epoch = (writer >> EPOCH) & ((1 << PROGRAM - EPOCH) - 1)
            known, one = writer >= 0, program[i]
            foreign = ~np.isin(by, warps[i])
            if (known & foreign & (epoch == machine.epoch[one])).any():
                machine.report("a product reads what another warp wrote, without a barrier")
            by = np.where(known, by, 0)
            ordered = self.fenced[one][by] > self.written[unit]
            reader = warps[i][warps[i] < self.fenced.shape[1]]
            after_barrier = (self.fence_epoch[one][reader].min() > epoch) | ~foreign
            ordered |= (self.fenced[one][reader].min() > self.written[unit]) & after_barrier
            if (known & ~ordered).any():
                machine.report("a product reads what was written without fence.proxy.async")
        return units

    # ------------------------------------------------------------------------------------ products

    def begin_product(self, product: Product) -> None:
        self.products.append(product)
        self.registers |= product.registers
        for units in product.units:
            self.read_by_products[units] += 1

    def wait_for_products(self, owners: np.ndarray, most: int) -> None:
        """Let those of these warp groups end, except their latest groups."""
        waiting = []
        for product in self.products:
            ends = np.isin(product.owners, owners)
            ends &= product.groups < self.n_products[product.owners] - most
            for i in np.flatnonzero(ends):
                self.read_by_products[product.units[i]] -= 1
            if not ends.all():
                kept = np.flatnonzero(~ends)
                units = [product.units[i] for i in kept]
                parts = product.owners[kept], product.groups[kept], units, product.registers
                waiting.append(Product(*parts))
        self.products = waiting
        self.registers = frozenset().union(*(x.registers for x in waiting))

    def touched(self, statement: Statement) -> None:
        """Report a statement that has to do with registers in flight; products may share theirs."""
        if self.products and statement.opcode != "wgmma":
            self.machine.report("a register of a product in flight is touched")
        if not self.products and self.machine.tensors.is_loading():
            self.machine.report("a register is touched before tcgen05.wait::ld")

    def finish(self) -> None:
        """Report what nobody waited for."""
        if any(len(copy.lanes) for copy in self.copies):
            self.machine.report("cp.async is never waited for")
        if self.products:
            self.machine.report("wgmma is never waited for")
