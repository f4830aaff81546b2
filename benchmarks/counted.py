"""What the kernels cost on a GPU, counted without one: python benchmarks/counted.py [--all]

Bytes come from Triton's interpreter, which watches every access; launches, registers, spills and
instructions from the code compiled at the real launch sites; memory from the allocations there. All
of it is the same on every machine and in every run. `--all` adds sm_80 and sm_100 to sm_90.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from cases import CONTRASTIVE, DIVERGENCE, RELATIONAL, SIMILARITY, Case, T  # noqa: E402
from counts import FUSED, compiled, metered, resources, scaled_down  # noqa: E402
from sass import analyse  # noqa: E402
from tables import Table  # noqa: E402
from tile_work import work_of  # noqa: E402

from fastkd.portable import _similarities as similarities  # noqa: E402

LOGITS = [case for case in FUSED if case.family is DIVERGENCE]
RELATIONS = [case for case in FUSED if case.family is RELATIONAL]
CONTRASTS = [case for case in FUSED if case.family in (CONTRASTIVE, SIMILARITY)]
N_ROWS = 4096
WIDE = (8192, 1024)  # embeddings whose products cuBLAS makes
ON_CHIP, LONG = 8192, 128256  # the longest rows read once for every divergence; Llama 3


def bytes_per_entry() -> dict[str, list[list[float]]]:
    """Forward, and forward + backward, of rows on chip and of longer ones. In the interpreter."""
    from interpreter import correct

    correct()
    found: dict[str, list[list[float]]] = {}
    for case in LOGITS:
        for n_cols in (ON_CHIP, 2 * ON_CHIP):
            small, device = scaled_down(case, (N_ROWS, n_cols))
            with device:
                forward, backward, (_, gradient) = metered(case, small, torch.bfloat16)
            moved = (forward.traffic, forward.traffic + backward.traffic)
            found.setdefault(case.name, []).append([round(x / gradient.numel(), 2) for x in moved])
    return found


def call(case: Case, n_cols: int, target: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Launches and memory of many rows, and each of the kernels."""
    return counts_of(case, (N_ROWS, n_cols), n_cols, target)


def counts_of(
    case: Case, shape: tuple[int, ...], columns: Any, target: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    run = compiled(case, shape, torch.bfloat16, target)
    total = {
        "loss": case.name,
        "columns": columns,
        "launches": [run.n_forward, len(run.launches)],
        "peak_extra_memory": [
            round(x / run.trained_bytes, 3) for x in (run.forward_bytes, run.peak_bytes)
        ],
        "peak_extra_bytes": run.peak_bytes,
    }
    works = [work_of(launch) for launch in run.launches]
    flops = [work.flops if work else 0 for work in works]
    if any(flops):
        product = 2 * shape[0] ** 2 * shape[1]
        total["products"] = [round(sum(x) / product, 2) for x in (flops[: run.n_forward], flops)]
    kernels = []
    for launch in run.launches:
        found = resources(launch, run.element_bytes)
        kernels.append(
            {
                "loss": case.name,
                "columns": columns,
                "target": target,
                "kernel": launch.name,
                "registers": found["registers"],
                "spills": found["spills"],
                "warps_per_multiprocessor": found["warps_per_sm"],
                "instructions": [round(x, 1) for x in found["instructions"]],
                "mufu": [round(x, 2) for x in found["mufu"]],
                **({"tensor": found["tensor"]} if found["tensor"] else {}),
            }
        )
    return total, kernels


def sweeps_of_chunks(case: Case, target: str) -> list[dict[str, Any]]:
    """The kernels that read products of half precision, each once."""
    with (
        mock.patch.object(similarities, "multiplies_halves", lambda rows, half: bool(half)),
        mock.patch.object(similarities, "_product", lambda a, b, out: out),
    ):
        run = compiled(case, WIDE, torch.bfloat16, target)
    found = []
    for launch in {launch.name: launch for launch in run.launches}.values():
        report = analyse(launch)
        block = launch.args.get("ROWS", 1) * launch.args["COLUMNS"]
        pairs = block / (32 * report.warps)  # of a thread
        found.append(
            {
                "loss": case.name,
                "columns": "×".join(map(str, WIDE)),
                "target": target,
                "kernel": launch.name,
                "registers": report.registers,
                "spills": report.spills,
                "warps_per_multiprocessor": report.warps_per_sm,
                "instructions": round(report.main["instructions"] / pairs, 1),
                "mufu": round(report.main["mufu"] / pairs, 2),
            }
        )
    return found


def count(targets: Sequence[str]) -> dict[str, Any]:
    # the interpreter decides at import: its part needs a process of its own
    metered = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--bytes"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    moved = json.loads(metered.stdout)
    losses, kernels = [], []
    for case in LOGITS:
        for n_cols, each in zip((ON_CHIP, LONG), moved[case.name], strict=True):
            for target in targets:
                total, found = call(case, n_cols, target)
                kernels += found
            losses.append({**total, "bytes_per_entry": each})
    relations: dict[str, list[Any]] = {"losses": [], "kernels": []}
    for case in RELATIONS:
        for shape in case.family.compiled_sizes:
            for target in targets:
                total, found = counts_of(case, shape, "×".join(map(str, shape)), target)
                relations["kernels"] += found if shape == (1024, 512) else []
            relations["losses"].append(total)
    contrasts: dict[str, list[Any]] = {"losses": [], "kernels": [], "chunks": []}
    for case in CONTRASTS:
        for shape in case.family.compiled_sizes:
            for target in targets:
                total, found = counts_of(case, shape, "×".join(map(str, shape)), target)
                contrasts["kernels"] += found if shape == case.family.compiled_sizes[0] else []
            contrasts["losses"].append(total)
        contrasts["chunks"] += [x for target in targets for x in sweeps_of_chunks(case, target)]
    return {
        "schema": 1,
        "label": "counted",
        "torch": torch.__version__,
        "triton": sys.modules["triton"].__version__,
        "dtype": "bfloat16",
        "temperature": T,
        "losses": losses,
        "kernels": kernels,
        "relations": relations,
        "contrasts": contrasts,
    }


def tables(record: dict[str, Any]) -> list[Table]:
    one = Table(
        "bfloat16 logits, forward / forward + backward: counted",
        ["loss", "V", "bytes per entry", "launches", "extra memory"],
        [
            [
                row["loss"],
                row["columns"],
                *(
                    f"{row[what][0]} / {row[what][1]}"
                    for what in ("bytes_per_entry", "launches", "peak_extra_memory")
                ),
            ]
            for row in record["losses"]
        ],
        [
            "bytes per entry: asked of memory for each (row, class) of both networks; the least is "
            "4 / 10 where a backward reads the logits again. Rows of 16384 stand for 128256.",
            "extra memory: peak beyond the inputs at 4096 rows, in times one logits tensor; a "
            "backward makes one.",
        ],
    )
    two = Table(
        "The kernels, for 4096 rows of bfloat16 logits: counted",
        [
            *("loss", "V", "target", "kernel", "registers", "spills", "warps per SM"),
            *("instructions", "MUFU"),
        ],
        [
            [", ".join(map(str, x)) if isinstance(x, list) else x for x in row.values()]
            for row in record["kernels"]
        ],
        [
            "instructions, MUFU: issued for each entry, one figure for each sweep over the row; "
            "row_statistics: of its loops alone, the others: of the whole kernel.",
            f"torch {record['torch']}, triton {record['triton']}, T = {record['temperature']:g}.",
        ],
    )
    relations = record["relations"]
    three = Table(
        "bfloat16 embeddings N×D, forward + backward: counted",
        ["loss", "N×D", "launches", "extra memory, MB", "in N² floats"],
        [
            [
                row["loss"], row["columns"], row["launches"][1] + 1,
                f"{row['peak_extra_bytes'] / 1e6:.1f}",
                f"{row['peak_extra_bytes'] / 4 / int(row['columns'].split('×')[0]) ** 2:.1f}",
            ]
            for row in relations["losses"]
        ],
        ["launches: kernels, and PyTorch's product with the upstream in the backward."],
    )  # fmt: skip
    four = Table(
        "The kernels of relations at 1024×512: counted",
        [
            *("loss", "N×D", "target", "kernel", "registers", "spills", "warps per SM"),
            *("instructions", "MUFU"),
        ],
        [
            [", ".join(map(str, x)) if isinstance(x, list) else x for x in row.values()]
            for row in relations["kernels"]
        ],
        [
            "instructions: of the main loop, for each pair and feature (squares, laplacian), each "
            "pair and third point (edges), each pair and split (sum_splits); of distances, which "
            "has no loop but sums, for a thread.",
        ],
    )
    contrasts = record["contrasts"]
    five = Table(
        "bfloat16 embeddings N×D, N queries and keys, forward + backward: counted",
        ["loss", "N×D", "launches", "products", "extra memory, MB", "similarities, MB"],
        [
            [
                row["loss"], row["columns"], row["launches"][1], row["products"][1],
                f"{row['peak_extra_bytes'] / 1e6:.1f}",
                f"{4e-6 * int(row['columns'].split('×')[0]) ** 2:.1f}",
            ]
            for row in contrasts["losses"]
        ],
        [
            "products: FLOPs on tensor cores in units of 2 N² D, gradients for both sides.",
            "similarities: what one matrix of them would take in float32; none is stored.",
        ],
    )  # fmt: skip
    six = Table(
        f"The kernels of contrasts at {contrasts['kernels'][0]['columns']}: counted",
        [
            *("loss", "N×D", "target", "kernel", "registers", "spills", "warps per SM"),
            *("instructions", "MUFU", "tensor"),
        ],
        [
            [", ".join(map(str, x)) if isinstance(x, list) else x for x in row.values()]
            + [""] * ("tensor" not in row)
            for row in contrasts["kernels"]
        ],
        [
            "instructions, MUFU: of the main loop, for each pair (column_log_sums, which adds up "
            "what programs left, for each part of a column); tensor: instructions on tensor cores "
            "in the whole kernel.",
        ],
    )
    seven = Table(
        f"The kernels that read what cuBLAS multiplied, at {contrasts['chunks'][0]['columns']}: "
        "counted",
        [
            *("loss", "N×D", "target", "kernel", "registers", "spills", "warps per SM"),
            *("instructions", "MUFU"),
        ],
        [[*row.values()] for row in contrasts["chunks"]],
        [
            "instructions, MUFU: of the main loop, or of a kernel that has none, for each pair, of "
            "which 4 bytes are read for each network and 2 written for each side with a gradient."
        ],
    )
    return [one, two, three, four, five, six, seven]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="sm_80, sm_90 and sm_100")
    parser.add_argument("--bytes", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bytes:
        print(json.dumps(bytes_per_entry()))
        return
    record = count(["sm_80", "sm_90", "sm_100"] if options.all else ["sm_90"])
    found = tables(record)
    for table in found:
        table.show()
    if options.all:
        return  # the record has one target
    file = ROOT / "benchmarks" / "results" / "counted.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text("\n".join(table.markdown() for table in found))
    print(f"written: {file} and, for a page, {file.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
