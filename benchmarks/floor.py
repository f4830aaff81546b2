"""Model the least time that a GPU needs for each loss: python benchmarks/floor.py [--check]

A launch takes at least as long as the resource of which it asks most: memory, tensor cores, issue
slots, and the units for arithmetic, special functions and shared memory. The counts are of the code
that is compiled at the real launch sites and of the bytes that it touches in the interpreter; the
rates are the device's. A floor is no estimate: MODEL.md says what it leaves out.

`--check` lists the rows of the GPUs' records that are faster than their floor.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import checkout  # noqa: F401
import child
import records
import torch
from counts import compiled, main_walk, metered, scaled_down
from gate import Tensor
from sass import analyse, count, disassemble
from tables import section
from tile_work import work_of
from workloads import FUSED, Shape, Workload

FILE = records.RESULTS / "modelled.json"
DIRECTIONS = ("forward", "backward", "forward+backward")


class Device(NamedTuple):
    name: str  # a part of the one that the driver reports
    target: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes/s that a large copy reaches, read + written
    tensor_rate: float  # FLOP/s that a large matmul reaches, bfloat16
    cache: int  # bytes of L2


# H100, H200: copy and matmul as measured. A100: assumed, by the H100's shares 0.90 and 0.80 of the
# nominal 2.04 TB/s (80 GB) and 312 TFLOP/s.
DEVICES = [
    Device("H100", "sm_90", 132, 1.755e9, 3.0e12, 790e12, 50 << 20),
    Device("H200", "sm_90", 132, 1.755e9, 4.3e12, 790e12, 50 << 20),
    Device("A100", "sm_80", 108, 1.410e9, 1.83e12, 250e12, 40 << 20),
]

# Units of a multiprocessor, the instructions that keep each busy, and how many of them, for a whole
# warp each, it starts in one clock (CUDA C++ Programming Guide, throughput of instructions).
UNITS = {
    "issue": {"all": 4.0},
    "FMA": {"multiply-add": 4.0, "integer multiply-add": 2.0},
    "ALU": {"compare, select, convert, integer": 2.0},
    "MUFU": {"special function": 0.5},
    "shared memory": {"shared memory": 1.0},
}
UNITS_OF = {
    "sm_90": UNITS,
    "sm_80": {**UNITS, "FMA": {"multiply-add": 2.0, "integer multiply-add": 2.0}},
}
_CLASSES = {
    "multiply-add": "FADD FMUL FFMA",
    "integer multiply-add": "IMAD HFMA2 HADD2 HMUL2 IDP VIADDMNMX",
    "compare, select, convert, integer": "FMNMX FSETP FSEL FSET FCHK SEL ISETP IADD3 IADD VIADD "
    "LOP3 SHF SHL SHR PRMT LEA MOV PLOP3 IMNMX VIMNMX SGXT I2FP F2FP BMSK IABS P2R R2P HMNMX2 "
    "HSETP2",
    "special function": "MUFU F2F F2I I2F I2I FRND POPC FLO BREV",
    "shared memory": "LDS STS LDSM STSM SHFL",
}
CLASS_OF = {name: kind for kind, names in _CLASSES.items() for name in names.split()}


class Counts(NamedTuple):
    """The work that one launch asks of the device."""

    warps: int  # in all programs together
    work: Mapping[str, float]  # instructions of one warp, by class
    unique_bytes: float  # each byte once
    uncached_bytes: float  # each time it is asked for
    flops: float = 0.0  # on tensor cores


class Floor(NamedTuple):
    """Seconds by resource; of memory if L2 keeps all it can hold, and if it keeps nothing."""

    resources: Mapping[str, float]
    uncached: float

    @property
    def seconds(self) -> float:
        return max(self.resources.values())

    @property
    def seconds_uncached(self) -> float:
        return max(self.seconds, self.uncached)

    @property
    def binds(self) -> str:
        return max(self.resources, key=lambda name: self.resources[name])


def floor(counts: Counts, device: Device) -> Floor:
    clocks = device.multiprocessors * device.clock
    # what the launch before left in L2 need not be read again
    from_memory = max(0.0, counts.unique_bytes - device.cache)
    resources = {"memory": from_memory / device.bandwidth}
    resources["tensor cores"] = counts.flops / device.tensor_rate
    for unit, rates in UNITS_OF[device.target].items():
        busy = sum(counts.work.get(kind, 0) / rate for kind, rate in rates.items())
        resources[unit] = counts.warps * busy / clocks
    return Floor(resources, counts.uncached_bytes / device.bandwidth)


def summary(floors: Sequence[Floor]) -> dict[str, Any]:
    """Add the floors of launches that follow one another; what binds longest is said to bind."""
    longest: Counter[str] = Counter()
    for each in floors:
        longest[each.binds] += each.seconds  # type: ignore[assignment]
    low, high = sum(x.seconds for x in floors), sum(x.seconds_uncached for x in floors)
    return {
        "milliseconds": [round(1e3 * low, 6), round(1e3 * high, 6)],
        "binds": longest.most_common(1)[0][0] if longest else "–",  # no kernel of ours
    }


def classes_of(instructions: Mapping[str, float]) -> dict[str, float]:
    """Sum up by class what sass.count counted by name."""
    work: Counter = Counter(all=instructions["instructions"])
    for name, kind in CLASS_OF.items():
        work[kind] += instructions.get(name, 0)
    return dict(work)


def executed(
    outside: Mapping[str, float], loops: Sequence[Mapping[str, float]], loaded: float
) -> dict[str, float]:
    """Return the instructions of one warp, of which a thread loads `loaded` bytes in all.

    Every loop that loads takes an equal share of them, so that unrolling cancels out; any other, a
    wait or the end of a reduction, is run once.
    """
    sweeps = [loop for loop in loops if loop["load_bytes"]]
    in_loops = max(0.0, loaded - outside.get("load_bytes", 0))
    total = Counter(outside)
    for loop in loops:
        trips = in_loops / len(sweeps) / loop["load_bytes"] if loop["load_bytes"] else 1.0
        for name, number in loop.items():
            total[name] += number * trips  # type: ignore[assignment]
    return dict(total)


def walked(
    outside: Mapping[str, float], loops: Sequence[Mapping[str, float]], trips: float, started: float
) -> dict[str, float]:
    """Return the instructions of a mean warp, where a part has work and walks over points.

    The loop that walks is the one that loads most, or several alike, of which each takes its share;
    any other is run once.
    """
    most = max((loop["load_bytes"] for loop in loops), default=0)
    walks = [loop for loop in loops if loop["load_bytes"] == most]
    if any(loop["tensor"] for loop in walks):  # of tiles: others are for edges and for rare rows
        walks = [main_walk(walks)]
    total: Counter[str] = Counter()
    for part, times in [
        (outside, started),
        *((loop, trips / len(walks) if loop in walks else started) for loop in loops),
    ]:
        for name, number in part.items():
            total[name] += number * times  # type: ignore[assignment]
    return dict(total)


def counts_of(launch: Any, loaded: float, unique: float, uncached: float) -> Counts:
    """Count what a launch asks for that the gate captured, from the bytes that it moves."""
    instructions = disassemble(launch.asm["cubin"])[1]
    last_exit = max(k for k, i in enumerate(instructions) if i.name == "EXIT")
    subroutines = count(instructions[last_exit + 1 :])  # divisions by odd numbers: not executed
    report, work, programs = analyse(launch), work_of(launch), prod(launch.grid)
    warps, outside = programs * report.warps, report.outside - subroutines
    if work is None:
        counted = executed(outside, report.loops, loaded / (32 * warps))
        return Counts(warps, classes_of(counted), unique, uncached)
    counted = walked(outside, report.loops, work.trips / programs, work.programs / programs)
    # how much the points of a walk share in a cache depends on N: what is asked for is derived
    touched = sum(prod(x.shape) * x.dtype.itemsize for x in tensors_in(launch.args.values()))
    asked = touched + work.trips * work.bytes_per_trip
    return Counts(warps, classes_of(counted), touched, asked, work.flops)


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments of a kernel and in their tuples."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors_in(argument)


def bytes_per_entry() -> dict[str, Any]:
    """Watch all launches in the interpreter, and return by loss and shape those of each direction.

    Each is [name, loaded, unique, uncached], in bytes for each entry of a matrix of logits.
    """
    from interpreter import correct

    correct()
    found: dict[str, Any] = {}
    for workload in FUSED:
        for shape in workload.family.compiled_sizes:
            small, device = scaled_down(workload, shape)
            with device:
                *meters, _ = metered(workload, small, torch.bfloat16)
            found.setdefault(workload.name, {})["x".join(map(str, shape))] = [
                [[x.name, *(n / prod(small) for n in bytes_of(x))] for x in meter.launches]
                for meter in meters
            ]
    return found


def bytes_of(launch: Any) -> tuple[int, int, int]:
    loaded = sum(argument.loaded for argument in launch.arguments.values())
    return loaded, launch.floor, launch.traffic


def counted(workload: Workload, shape: Shape, target: str, moved: Any) -> list[list[Counts]]:
    """Return the counts of the launches forward and backward."""
    run = compiled(workload, shape, torch.bfloat16, target)
    directions = []
    for launches, bytes_moved in zip(
        (run.launches[: run.n_forward], run.launches[run.n_forward :]), moved, strict=True
    ):
        found = []
        for launch, (metered_name, *numbers) in zip(launches, bytes_moved, strict=True):
            assert launch.name == metered_name, f"{workload.name} at {shape}: other kernels"
            found.append(counts_of(launch, *(each * prod(shape) for each in numbers)))
        directions.append(found)
    return directions


def model() -> dict[str, Any]:
    moved = child.interpreted(__file__, "--bytes")
    rows = []
    for workload in FUSED:
        for shape in workload.family.compiled_sizes:
            bytes_moved = moved[workload.name]["x".join(map(str, shape))]
            counts = {
                target: counted(workload, shape, target, bytes_moved)
                for target in {device.target: None for device in DEVICES}
            }
            for device in DEVICES:
                forward, backward = (
                    [floor(each, device) for each in launches] for launches in counts[device.target]
                )
                each = map(summary, (forward, backward, forward + backward))
                row = {"loss": workload.name, "shape": list(shape), "dtype": "bfloat16"}
                row["device"] = device.name
                rows.append({**row, **dict(zip(DIRECTIONS, each, strict=True))})
    return {
        "schema": 2,
        "label": "modelled",
        "torch": torch.__version__,
        "triton": sys.modules["triton"].__version__,
        "rows": rows,
    }


def check(measured: Mapping[str, Any], modelled: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a device's record that are faster than their floor.

    Each is a defect of the model. What is not modelled, or did not run, is passed over.
    """
    floors = {
        (row["loss"], *row["shape"], row["dtype"], direction): row[direction]["milliseconds"][0]
        for row in modelled["rows"]
        if row["device"] in measured["device"]
        for direction in DIRECTIONS
        if direction in row
    }
    defects = []
    for row in measured["rows"]:
        least = floors.get((row["loss"], *row["shape"], row["dtype"], row["direction"]), 0)
        found = row["implementations"].get("fastkd", {}).get("milliseconds", least)
        if found < least:
            defects.append({**row, "floor": least})
    return defects


def table(record: Mapping[str, Any]) -> str:
    rows: dict[tuple, list] = {}
    for row in record["rows"]:
        cells = rows.setdefault((row["loss"], "×".join(map(str, row["shape"]))), [])
        for direction in DIRECTIONS if row["device"] == DEVICES[0].name else DIRECTIONS[-1:]:
            cells += [span(row[direction]["milliseconds"]), row[direction]["binds"]]
    first, *others = (device.name for device in DEVICES)
    columns = [f"{first} forward, µs", "backward", "both", *(f"{name} both" for name in others)]
    return section(
        "The least time for bfloat16 logits and embeddings: modelled",
        ["loss", "shape", *(cell for column in columns for cell in (column, "binds"))],
        [[*key, *cells] for key, cells in rows.items()],
        "from … to: L2 keeps all that it can hold between two reads, or it keeps nothing. The time "
        "to start a kernel, some µs, is in no floor. benchmarks/MODEL.md: how far to believe it.",
        f"torch {record['torch']}, triton {record['triton']}.",
    )


def span(milliseconds: Sequence[float]) -> str:
    low, high = (f"{1e3 * x:.{0 if x >= 0.01 else 1}f}" for x in milliseconds)
    return low if low == high else f"{low} … {high}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="exit 1 where a row is below its floor"
    )
    parser.add_argument("--bytes", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bytes:
        print(json.dumps(bytes_per_entry()))
    elif options.check:
        modelled = json.loads(FILE.read_text())
        defects = [row for record in records.read() for row in check(record, modelled)]
        for row in defects:
            print(f"below its floor: {row}")
        return 1 if defects else 0
    else:
        record = model()
        records.write(FILE, record)
        print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
