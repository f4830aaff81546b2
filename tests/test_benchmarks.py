"""The benchmarks compare like with like, cover every loss, and write their record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exactness import assert_same

import fastkd

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench  # noqa: E402
from cases import CASES  # noqa: E402


def test_every_loss_has_a_line():
    public = {name for name in fastkd.__all__ if name.islower() and hasattr(fastkd, name)}
    assert {case.name for case in CASES} == public - {"backend", "__version__"}


@pytest.mark.parametrize(
    "case, size",
    [
        pytest.param(case, size, id=f"{case.name}-{'x'.join(map(str, size))}")
        for case in CASES
        for size in case.family.sizes[:2]
    ],
)
def test_what_is_compared_is_the_same_loss(case, size):
    results = []
    for loss in (case.fastkd, case.eager):
        inputs = case.inputs(size, torch.float64)
        value = loss(*inputs)
        value.backward()
        results.append([value.detach(), inputs[0].grad])
    assert_same(*results)


def test_what_does_not_fit_is_not_compared(monkeypatch):
    monkeypatch.setattr(bench, "fits", lambda largest: bench.COPIES * largest < 16 << 30)
    (case,) = (case for case in CASES if case.name == "info_nce")
    fused = {"torch linear_cross_entropy", "liger-kernel", "cut-cross-entropy"} & {*bench.PEERS}
    assert {*bench.implementations(case, (65536, 64), torch.float32, True)} == {"fastkd", *fused}
    found = {*bench.implementations(case, (1024, 64), torch.float32, True)}
    assert {"fastkd", "eager", *fused} <= found
    assert "pytorch-metric-learning NTXentLoss" not in found  # of N³ numbers


def test_a_run_writes_its_record(tmp_path):
    # pytest-benchmark does nothing under xdist, and the interpreter would be timed
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_XDIST", "TRITON_INTERPRET"))
    }
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-quiet", "-p", "no:cacheprovider"]
    command += ["benchmarks/bench.py", "--quick", "--only=forward_kl", "--sizes=4x8"]
    subprocess.run([*command, f"--results={tmp_path}"], cwd=ROOT, env=environment, check=True)
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    assert (record["schema"], record["label"], record["threads"]) == (1, "measured", 1)
    assert {"device", "torch", "commit", "sources", "temperature", "load"} < record.keys()
    assert record["peers"].keys() <= {row["implementation"] for row in record["rows"]}
    for row in record["rows"]:
        assert row["loss"] == "forward_kl" and row["shape"] == [4, 8]
        assert row["implementation"] in ("fastkd", "eager", "torch.compile")
        assert row["seconds"] > 0 and row["ratio"] > 0
        assert row["peak_extra_bytes"] is None or row["peak_extra_bytes"] > 0
        assert row["implementation"] != "fastkd" or row["ratio"] == 1
    assert "| forward_kl | 4×8 |" in file.with_suffix(".md").read_text()
    report = [sys.executable, "benchmarks/report.py", "--plots", str(tmp_path)]
    drawn = subprocess.run(report, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert drawn.split() == [f"{file.with_suffix('')}-{what}.png" for what in ("time", "memory")]
    assert all(Path(png).stat().st_size > 10_000 for png in drawn.split())
