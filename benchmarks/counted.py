"""What each kernel costs, counted without a GPU: python benchmarks/counted.py [sm_80 sm_100 …]

Bytes come from Triton's interpreter, which watches every access; registers, spills and instructions
from the code compiled at the real launch sites. Two runs give the same table.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import fastkd

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

LOSSES = [
    *("forward_kl", "reverse_kl", "symmetric_kl", "soft_cross_entropy", "kd"),
    *("jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation"),
]
ON_CHIP, LONG = 8192, 128256


def call(loss: str, n_rows: int, n_cols: int, device: str) -> tuple:
    """Student and the loss of bf16 logits."""
    student, teacher = (
        torch.zeros(n_rows, n_cols, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    labels = [torch.zeros(n_rows, dtype=torch.int64, device=device)] if loss == "kd" else []
    return getattr(fastkd, loss)(student.requires_grad_(), teacher, *labels, temperature=2.0)


def bytes_per_entry() -> dict:
    """Under TRITON_INTERPRET=1: {loss: {V: (forward, forward + backward)}} for bf16."""
    from interpreter import correct
    from meter import Meter

    correct()
    logits = ("student_ptr", "teacher_ptr", "gradient_ptr")
    found: dict = {}
    for loss in LOSSES:
        for n_cols in (ON_CHIP, 2 * ON_CHIP):
            moved = []
            with fastkd.backend("triton"):
                with Meter() as forward:
                    result = call(loss, 2, n_cols, "cpu")
                with Meter() as backward:
                    result.backward()
            for meter in (forward, backward):
                arguments = [x.arguments[name] for x in meter.launches for name in logits]
                moved.append(sum(a.loaded + a.stored for a in arguments) / (2 * n_cols))
            found.setdefault(loss, {})[n_cols] = moved[0], sum(moved)
    return found


def compiled(loss: str, n_cols: int, target: str) -> list[dict]:
    """One row for each launch at 4096 rows."""
    from gate import capture
    from sass import analyse, per_element

    with capture(target) as launches, fastkd.backend("triton"):
        call(loss, 4096, n_cols, "meta").backward()
    rows = []
    for launch in launches:
        report = analyse(launch)
        sweeps = [loop for loop in report.loops if loop["LDG.128"]] or [report.outside]
        each = [per_element(loop, loop["load_bytes"] / 4) for loop in sweeps]  # two of bf16
        rows.append(
            {
                "loss": loss,
                "columns": n_cols,
                "kernel": launch.name,
                "target": target,
                "registers": report.registers,
                "spills": report.spills,
                "warps_per_sm": report.warps_per_sm,
                "instructions": [round(x["instructions"], 1) for x in each],
                "mufu": [round(x["mufu"], 2) for x in each],
            }
        )
    return rows


def main() -> None:
    if sys.argv[1:] == ["--bytes"]:
        print(json.dumps(bytes_per_entry()))
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    metered = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--bytes"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    traffic = json.loads(metered.stdout)
    targets = sys.argv[1:] or ["sm_90"]
    rows = [
        row
        for target in targets
        for loss in LOSSES
        for n_cols in (ON_CHIP, LONG)
        for row in compiled(loss, n_cols, target)
    ]

    console = Console(width=130)
    table = Table(title="Bytes for each (row, entry) of bf16 logits, counted")
    for name in (
        "loss",
        f"V ≤ {ON_CHIP}: forward",
        "and backward",
        "above: forward",
        "and backward",
    ):
        table.add_column(name, justify="left" if name == "loss" else "right")
    for loss, of_size in traffic.items():
        table.add_row(loss, *(f"{x:.1f}" for sizes in of_size.values() for x in sizes))
    console.print(table)
    table = Table(
        title="The kernels for bf16 logits, counted; per entry of a sweep, pairs: 2 sweeps"
    )
    headings = (
        "loss",
        "V",
        "kernel",
        "target",
        "registers",
        "spills",
        "warps/SM",
        "instructions",
        "MUFU",
    )
    for name in headings:
        table.add_column(name, justify="left" if name in ("loss", "kernel") else "right")
    for row in rows:
        table.add_row(
            *(str(", ".join(map(str, x)) if isinstance(x, list) else x) for x in row.values())
        )
    console.print(table)
    record = {"label": "counted", "torch": torch.__version__, "bytes": traffic, "kernels": rows}
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "counted.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
