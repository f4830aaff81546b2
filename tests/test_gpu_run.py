"""The GPU run tried out without a GPU, and the order in which it measures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from choice import full

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_run  # noqa: E402
import records  # noqa: E402
import runner  # noqa: E402
from workloads import BY_NAME, WORKLOADS  # noqa: E402


@full
def test_a_dry_run_does_all_of_it(tmp_path):
    losses = "logit_mse", "kd", "clip_contrastive"
    only = f"--only=tests,ceilings,bench,sweep,sanitizer,{','.join(losses)}"
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "gpu_run.py"), "--dry"]
    result = subprocess.run(
        [*command, only, f"--out={tmp_path}", "--minutes=20"],
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    (of_run,) = record["runs"]
    steps = of_run["steps"]
    assert not [step for step in steps.values() if "error" in step], steps
    assert steps["tests"]["status"] == steps["sanitizer"]["unwatched"] == 0
    assert "passed" in steps["tests"]["last_line"]
    assert all(of_run["ceilings"].values())
    assert (record["schema"], record["label"]) == (3, "dry")

    assert {(row["loss"], row["direction"]) for row in record["rows"]} == {
        (loss, way) for loss in losses for way in runner.DIRECTIONS
    }
    for row in record["rows"]:
        assert row["bytes"] > 0 and row["least_milliseconds"] > 0
        assert row["sources"] == records.sources(BY_NAME[row["loss"]].case, "triton")
        for name in ("fastkd", "eager", "torch.compile"):
            entry = row["implementations"][name]
            assert "note" not in entry, entry
            assert entry["ratio"] > 0 and entry["peak_extra_bytes"] > 0
    sweep = of_run["sweep"]
    assert {row["kernel"] for row in sweep if row["milliseconds"]} == {
        "row_statistics", "gradient", "whole_rows", "ON_CHIP",
    }  # fmt: skip
    assert not [row for row in sweep if row["choice"] is None and "note" in row]
    assert "CHOICES = {" in result.stdout
    assert "A dry run" in result.stdout and "| kd " in result.stdout


def test_what_is_not_known_is_refused(tmp_path):
    options = SimpleNamespace(dry=True, only=["forward_lk"], skip=[], minutes=9, out=tmp_path)
    with pytest.raises(SystemExit, match="got forward_lk; known: "):
        gpu_run.Run(options)


def test_the_most_telling_problems_come_first():
    device = SimpleNamespace(
        dtypes=(torch.bfloat16, torch.float32), shapes=lambda workload: workload.family.gpu_sizes
    )
    problems = gpu_run.in_order(WORKLOADS, device)
    assert [x.workload.name for x in problems[: len(WORKLOADS)]] == [x.name for x in WORKLOADS]
    assert problems[0].shape == (4096, 128256) and problems[0].dtype == torch.bfloat16
    keys = [(x.workload.name, *x[1:]) for x in problems]
    all_sizes = [
        (x.name, size, dtype, direction)
        for x in WORKLOADS
        for size in x.family.gpu_sizes
        for dtype in device.dtypes
        for direction in runner.DIRECTIONS
    ]
    assert len(keys) == len(all_sizes) and {*keys} == {*all_sizes}
