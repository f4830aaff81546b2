"""Branches, barriers and fences."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..forms import Form, instruction


@instruction("bra[.uni]", "label")
@instruction("(ret|exit)")
def jump(form: Form, *operands: Any) -> Any:
    """Return nothing: the machine's schedule takes branches and returns itself."""
    raise AssertionError(form.text)


@instruction("bar.sync", "i", together="program")
@instruction("barrier.sync[.aligned]", "i", together="program")
def barrier(form: Form, number: int) -> Any:
    if number:
        raise ValueError(f"got barrier {number}, need 0: parts of a program do not wait for others")

    def execute(machine: Any) -> None:
        programs, arrived = np.unique(machine.program[machine.numbers()], return_counts=True)
        if (arrived != machine.threads).any():
            machine.report("a barrier that not all threads reach", f"{arrived.min()} do")
        machine.epoch[programs] += 1

    return execute


@instruction("bar.warp.sync", "i", together="warp")
def warp_barrier(form: Form, mask: int) -> Any:
    """Order nothing: the lanes of a warp are in lockstep here."""
    return lambda machine: whole(machine, 32)


@instruction("fence.proxy.async.shared::cta")
def proxy_fence(form: Form) -> Any:
    return lambda machine: machine.flight.fence()


@instruction("fence(.sc|.acq_rel)(.cta|.gpu|.sys)")
@instruction("membar(.cta|.gl|.sys)")
def fence(form: Form) -> Any:
    """Order nothing: what a thread writes is seen at once here."""
    return lambda machine: None


@instruction("elect.sync", "d|p, i", together="warp")
def elect(form: Form, destinations: list, mask: int) -> Any:
    """Elect the first lane of each warp."""
    leader, elected = destinations

    def execute(machine: Any) -> None:
        leader(machine, np.zeros(machine.n, np.uint32))
        elected(machine, machine.of_lanes(machine.thread) % 32 == 0)

    return execute


def whole(machine: Any, size: int) -> None:
    """Report active lanes that are not whole warps, or groups of so many threads."""
    threads = machine.thread[machine.numbers()]
    if len(threads) % size or (threads.reshape(-1, size) % size != np.arange(size)).any():
        machine.report(f"an instruction of {size} threads that not all of them reach")
        raise RuntimeError("not all threads are here")
