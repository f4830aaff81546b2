"""The instructions of a launch that the gate captured, on an NVIDIA GPU: counted, never timed.

    report = analyse(launch)            registers, spills, occupancy, instruction counts
    complaints(launch)                  sentences, none if all is well

What only rows whose student is certain of a class execute is counted apart: see `body_of_few`.

Limits: every instruction of a loop counts as issued, predicated or not, and a loop may be unrolled
(divide by what its load_bytes say); the bodies of outer loops count as outside; a wait for a
barrier is a loop too; bytes moved by TMA are not seen.
"""

import functools
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

PROGRAMS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS_PER_SCHEDULER = 16384
SCHEDULERS = 4  # of a multiprocessor
WITH_FEW = ("whole_rows",)  # kernels with a branch that few rows take
RESERVED_SHARED_BYTES = 1024  # by the driver, for each program

LABEL = re.compile(r"\s*(\.L_\w+):")
INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
JUMP = re.compile(r"`\((\.L_\w+)\)")
WIDTH = re.compile(r"\.(?:[US](8|16)|(64|128|256))\b")


@dataclass
class Instruction:
    address: int
    code: str  # LDG.E.128
    target: int | None  # of a jump
    is_conditional: bool = False

    @property
    def name(self) -> str:
        return self.code.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes one thread moves, for loads and stores."""
        width = WIDTH.search(self.code)
        return int(width[1] or width[2]) // 8 if width else 4


@dataclass
class Report:
    registers: int
    stack_bytes: int
    spills: int  # instructions that store or load spilled registers
    shared_bytes: int
    warps: int
    warps_per_sm: int
    limited_by: str
    outside: Counter  # everything outside the innermost loops
    loops: list[Counter]  # one for each innermost loop, in the order of the code
    bodies: list[Counter]  # one for each loop, without the loops inside it
    few: Counter  # what few rows execute besides, and is in none of these; a loop there once

    @property
    def main(self) -> Counter:
        """Where most global bytes are loaded."""
        return max([self.outside, *self.loops], key=lambda counts: counts["load_bytes"])

    @property
    def sweeps(self) -> list[Counter]:
        """The loops that load whole vectors, or else all that load.

        A kernel without such a loop reads everything once.
        """
        found = [loop for loop in self.loops if loop["LDG.128"] or loop["LDGSTS.128"]]
        found = found or [body for body in self.bodies if body["load_bytes"]]
        return found or [self.outside]

    @property
    def total(self) -> Counter:
        return sum(self.loops, Counter(self.outside))


def analyse(launch) -> Report:
    resources, instructions = disassemble(launch.asm["cubin"])
    everything, few = count(instructions), []
    if launch.name in WITH_FEW:
        few = body_of_few(instructions)
        instructions = [i for i in instructions if i not in few]
    ranges = all_loops(instructions)
    loops = [within(x, instructions) for x in innermost(ranges)]
    looped = {i.address for loop in loops for i in loop}
    outside = [i for i in instructions if i.address not in looped]
    warps_per_sm, limited_by = occupancy(launch, resources["REG"])
    return Report(
        registers=resources["REG"],
        stack_bytes=resources["STACK"],
        spills=everything["LDL"] + everything["STL"],
        shared_bytes=launch.metadata.shared,
        warps=launch.metadata.num_warps,
        warps_per_sm=warps_per_sm,
        limited_by=limited_by,
        outside=count(outside),
        loops=[count(loop) for loop in loops],
        bodies=[count(body_of(x, ranges, instructions)) for x in ranges],
        few=count(few),
    )


def complaints(
    launch, least_warps: int = 16, least_bytes: int = 8, float64: bool = False
) -> list[str]:
    """Return what is wrong with a kernel that should be limited by memory."""
    report, found = analyse(launch), []
    if report.spills:
        found.append(f"{report.spills} spill instructions, {report.stack_bytes} bytes of stack")
    if report.total["fp64"] and not float64:
        found.append(f"{report.total['fp64']} float64 instructions")
    hot = report.loops or [report.outside]
    for counts, name in itertools.product(hot, ("LDG", "LDGSTS", "STG")):
        moved = {size: counts[f"{name}.{8 * size}"] * size for size in (1, 2, 4, 8, 16, 32)}
        narrow = sum(moved[size] for size in moved if size < least_bytes)
        # a few scalars of each row are narrow by nature
        if narrow > 24 and narrow > sum(moved.values()) / 4:
            found.append(
                f"{narrow} of {sum(moved.values())} bytes a thread moves by {name} "
                f"go in accesses narrower than {least_bytes} bytes"
            )
    if report.warps_per_sm < least_warps:
        found.append(
            f"{report.warps_per_sm} warps fit on a multiprocessor, fewer than {least_warps}: "
            f"limited by {report.limited_by}"
        )
    return [f"{launch.name}: {sentence}" for sentence in found]


@functools.cache
def disassemble(cubin: bytes) -> tuple[dict[str, int], list[Instruction]]:
    """Resource usage, and the instructions in order of address."""
    resources, listing = resources_of(cubin), run(cubin, "nvdisasm", "-c")
    addresses, pending, rows = {}, [], []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            pending.append(label[1])
        elif row := INSTRUCTION.match(line):
            addresses.update(dict.fromkeys(pending, int(row[1], 16)))
            pending = []
            rows.append(row.groups())
    instructions = []
    for address, predicate, code, operands in rows:
        jump = JUMP.search(operands)
        target = addresses.get(jump[1]) if jump else None
        instructions.append(Instruction(int(address, 16), code, target, bool(predicate)))
    while instructions and instructions[-1].name == "NOP":  # padding
        instructions.pop()
    return resources, instructions


def resources_of(cubin: bytes) -> dict[str, int]:
    """Return the registers (REG), bytes of stack (STACK) and so on, sooner than a listing."""
    usage = run(cubin, "cuobjdump", "--dump-resource-usage")
    return {what: int(number) for what, number in re.findall(r"([A-Z]+):(\d+)", usage)}


def run(cubin: bytes, program: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(PROGRAMS / program), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


Range = tuple[int, int]  # first and last address


def all_loops(instructions: list[Instruction]) -> list[Range]:
    """Return the range of every backward branch, in the order of the code."""
    last_of = {}
    for i in instructions:
        if i.name == "BRA" and i.target is not None and i.target < i.address:
            last_of[i.target] = i.address
    return sorted(last_of.items())


def innermost(loops: list[Range]) -> list[Range]:
    return [loop for loop in loops if not any(is_inside(x, loop) for x in loops)]


def is_inside(inner: Range, outer: Range) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def within(loop: Range, instructions: list[Instruction]) -> list[Instruction]:
    return [i for i in instructions if loop[0] <= i.address <= loop[1]]


def body_of(loop: Range, loops: list[Range], instructions: list[Instruction]) -> list[Instruction]:
    """Return the instructions of a loop that are in no loop inside it."""
    inner = [x for x in loops if is_inside(x, loop)]
    return [
        i
        for i in within(loop, instructions)
        if not any(first <= i.address <= last for first, last in inner)
    ]


def body_of_few(instructions: list[Instruction]) -> list[Instruction]:
    """Return the instructions that a kernel jumps over, or ends before, in most of its rows.

    They load a part of what was loaded before them once more.
    """
    ends = [i.address for i in instructions if i.name == "EXIT" and not i.is_conditional]
    for jump in instructions:
        end = jump.target or 0
        if jump.name == "EXIT":
            end = next((x + 1 for x in ends if x > jump.address), 0)
        if jump.is_conditional and end > jump.address:
            before = count([i for i in instructions if i.address < jump.address])
            body = [i for i in instructions if jump.address < i.address < end]
            if 0 < count(body)["load_bytes"] < before["load_bytes"]:
                return body + far_from(body, instructions)
    return []


def far_from(body: list[Instruction], instructions: list[Instruction]) -> list[Instruction]:
    """Return what a body jumps to elsewhere, up to the jump that comes back to it.

    It is what shuffles would do if their warp had diverged.
    """
    inside, found = {i.address for i in body}, []
    for target in {i.target for i in body} - inside - {None}:
        run = [i for i in instructions if i.address >= target]
        n = next((n for n, i in enumerate(run, 1) if i.target in inside), 0)
        found += run[:n]
    return found


def count(instructions: list[Instruction]) -> Counter:
    """Names (LDG, MUFU, FFMA), widths (LDG.128), functions (MUFU.EX2), and totals in lower case."""
    counts = Counter(instructions=len(instructions))
    for i in instructions:
        counts[i.name] += 1
        if i.name in ("LDG", "LDGSTS", "STG"):
            counts[f"{i.name}.{8 * i.width}"] += 1
            counts["store_bytes" if i.name == "STG" else "load_bytes"] += i.width
        elif i.name == "MUFU":
            counts["mufu"] += 1
            counts[i.code] += 1
        elif i.name in ("BAR", "SYNCS"):
            counts["barriers"] += 1
        elif i.name == "SHFL":
            counts["shuffles"] += 1
        elif i.name.endswith("MMA"):
            counts["tensor"] += 1
        if i.name in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA"):
            counts["fp64"] += 1
    return counts


def occupancy(launch, registers: int) -> tuple[int, str]:
    """Warps that fit on one multiprocessor, and what limits them."""
    warps = launch.metadata.num_warps
    registers_per_warp = max(-(-registers // 8), 1) * 8 * 32
    shared_per_sm = launch.device.shared_bytes + RESERVED_SHARED_BYTES
    programs = {
        "warps": launch.device.most_warps // warps,
        "registers": REGISTERS_PER_SCHEDULER // registers_per_warp * SCHEDULERS // warps,
        "shared memory": shared_per_sm // (launch.metadata.shared + RESERVED_SHARED_BYTES),
        "programs": launch.device.most_programs,
    }
    least = min(programs, key=programs.get)
    return programs[least] * warps, least
