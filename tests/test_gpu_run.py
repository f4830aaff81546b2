"""The GPU run tried out without a GPU: its order, what it survives, and how it goes on."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from choice import full

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import child  # noqa: E402
import devices  # noqa: E402
import gpu_run  # noqa: E402
import plan  # noqa: E402
import records  # noqa: E402
import runner  # noqa: E402
import suites  # noqa: E402
from workloads import BY_NAME, LEADERS, WORKLOADS  # noqa: E402

NO_XDIST = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}


def dry_run(folder, only, *options):
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "gpu_run.py"), "--dry"]
    command += [f"--only={','.join(only)}", f"--out={folder}", "--minutes=30", *options]
    result = subprocess.run(command, env=NO_XDIST, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text()), result.stdout


@full
def test_a_dry_run_does_all_of_it(tmp_path):
    losses = "logit_mse", "kd", "clip_contrastive"
    record, printed = dry_run(tmp_path, [*gpu_run.STEPS, *losses])
    (of_run,) = record["runs"]
    steps = of_run["steps"]
    assert [*steps] == [*gpu_run.STEPS]
    assert not [step for step in steps.values() if "error" in step or step.get("left")], steps
    assert steps["first_light"]["status"] == steps["tests"]["status"] == 0
    assert steps["sanitizer"]["unwatched"] == 0
    assert steps["first_light"]["passed"] == 45 and steps["tests"]["passed"] > 0
    assert all(of_run["ceilings"].values())
    assert (record["schema"], record["label"]) == (3, "dry")

    assert {(row["loss"], row["direction"]) for row in record["rows"]} == {
        (loss, way) for loss in losses for way in runner.DIRECTIONS
    }
    n_of_shapes = 0
    for row in record["rows"]:
        assert row["bytes"] > 0 and row["least_milliseconds"] > 0
        assert row["sources"] == records.sources(BY_NAME[row["loss"]].case, "triton")
        n_of_shapes += "torch.compile" not in row["implementations"]
        for name in ("fastkd", "eager"):
            entry = row["implementations"][name]
            assert "note" not in entry, entry
            assert entry["ratio"] > 0 and entry["peak_extra_bytes"] > 0
            assert entry["host_milliseconds"] > 0
    assert n_of_shapes == len(record["rows"]) / 2  # the others are the headlines
    sweep = of_run["sweep"]
    assert {row["kernel"] for row in sweep if row["milliseconds"]} == {
        "row_statistics", "gradient", "whole_rows", "ON_CHIP",
    }  # fmt: skip
    assert len(sweep) == 8 and not [row for row in sweep if "note" in row]
    assert "CHOICES = {" in printed and "**Timeline**" in printed
    assert "A dry run" in printed and "| kd " in printed
    assert len([*tmp_path.iterdir()]) <= 8


# ---------------------------------------------------------------------------------------- the order


GPU = SimpleNamespace(
    dtypes=devices.Gpu.dtypes,
    compile_modes=devices.Gpu.compile_modes,
    shapes=lambda workload: workload.family.gpu_sizes,
    headlines=lambda workload: devices.Gpu.headlines(None, workload),
)


def key_of(problem):
    return problem.workload.name, *problem[1:]


def test_the_most_telling_problems_come_first():
    headlines = plan.headlines(WORKLOADS, GPU)
    n = len(headlines) // 2
    assert {x.dtype for x in headlines} == {torch.bfloat16}
    assert {x.direction for x in headlines[:n]} == {"forward+backward"}
    assert [x[:3] for x in headlines[n:]] == [x[:3] for x in headlines[:n]]
    assert [x.workload.name for x in headlines[: len(LEADERS)]] == [*LEADERS]
    assert headlines[0].shape == (4096, 128256)
    n_of_leaders = sum(len(BY_NAME[name].family.headlines) for name in LEADERS)
    assert {x.workload.name for x in headlines[:n_of_leaders]} == {*LEADERS}
    assert {x.workload.name for x in headlines[:n]} == {*BY_NAME}
    assert n_of_leaders <= 40 and n <= 75  # about a second each


def test_every_problem_is_planned_once():
    problems = [*plan.headlines(WORKLOADS, GPU), *plan.all_others(WORKLOADS, GPU)]
    keys = [*map(key_of, problems)]
    assert len({*keys}) == len(keys)
    assert {*keys} >= {
        (x.name, size, dtype, direction)
        for x in WORKLOADS
        for size in x.family.gpu_sizes
        for dtype in GPU.dtypes
        for direction in runner.DIRECTIONS
    }


def test_a_stage_adds_implementations():
    peers = {"liger-kernel": ["kd"]}
    everything = ["fastkd", "eager", *GPU.compile_modes, *peers]

    def adds(stage, wanted=everything):
        problems = plan.stage(stage, WORKLOADS, GPU, peers, wanted)
        return [(problem.workload.name, names) for problem, names in problems]

    assert {tuple(names) for _, names in adds("headlines")} == {("fastkd", "eager")}
    assert {tuple(names) for _, names in adds("compiled")} == {("torch.compile",)}
    assert adds("peers") == 2 * [("kd", ["liger-kernel"])]
    assert {tuple(names) for _, names in adds("autotuned")} == {("torch.compile max-autotune",)}
    assert not adds("autotuned", ["fastkd", "eager"])
    steps = [*gpu_run.STEPS]
    assert steps[:3] == ["first_light", "ceilings", "headlines"]
    assert [x for x in steps if x in plan.STAGES] == [*plan.STAGES] and steps[-1] == "autotuned"


# ------------------------------------------------------------------------------------------- a run


class Instant:
    """A worker whose measurements take no time; `trouble` may raise instead."""

    def __init__(self, trouble=lambda names: None):
        self.asked, self.trouble, self.started = [], trouble, 0

    def ask(self, task, deadline):
        names = task.get("names", [])
        self.asked.append((task.get("loss"), [*names]))
        self.trouble(names)
        if task["task"] == "peers":
            versions = {"trl": "1.0", "quack-kernels": "cannot be imported"}
            return {"losses": {"trl": ["kd"]}, "versions": versions}
        problem = runner.Problem(
            BY_NAME[task["loss"]],
            tuple(task["shape"]),
            getattr(torch, task["dtype"]),
            task["direction"],
        )
        found = {name: {"milliseconds": 1.0} for name in names}
        row = problem.row(devices.Interpreter)
        return {**row, "bytes": 1, "flops": 0, "implementations": found}

    def stop(self):
        pass


def a_run(folder, monkeypatch, worker, only=("headlines", "kd"), earlier=None):
    monkeypatch.setattr(gpu_run, "BEGAN", time.monotonic())
    options = SimpleNamespace(
        dry=True, only=[*only], skip=[], minutes=9, out=folder, peers=None, continue_from=earlier
    )
    run = gpu_run.Run(options)
    run.worker = worker
    return run


def entries(run):
    return [row["implementations"] for row in run.record.content["rows"]]


def test_what_is_not_known_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="got forward_lk; known: "):
        a_run(tmp_path, monkeypatch, None, ["forward_lk"])


def do(run, *steps):
    for name in steps:
        run.step(name, gpu_run.measuring(name))
    return [run.record.run["steps"][name] for name in steps]


def test_a_row_is_measured_anew_with_what_a_stage_adds(tmp_path, monkeypatch):
    worker = Instant()
    stages = "headlines", "compiled", "peers"
    run = a_run(tmp_path, monkeypatch, worker, [*stages, "kd"])
    assert [step["rows"] for step in do(run, *stages)] == [2, 2, 2]
    together = [names for loss, names in worker.asked if loss][::2]
    assert together == [
        ["fastkd", "eager"],
        ["fastkd", "eager", "torch.compile"],
        ["fastkd", "eager", "torch.compile", "trl"],
    ]
    assert run.record.run["peers"]["quack-kernels"] == "cannot be imported"


def test_what_takes_the_process_along_is_left_out(tmp_path, monkeypatch):
    def trouble(names):
        if "torch.compile" in names:
            raise child.Lost("torch.compile", "AcceleratorError: CUDA error: an illegal access")

    worker = Instant(trouble)
    run = a_run(tmp_path, monkeypatch, worker, ["headlines", "compiled", "peers", "kd"])
    assert do(run, "headlines", "compiled")[1]["left"] == 0
    for entry in entries(run):
        assert entry["torch.compile"]["note"].endswith("an illegal access")
        assert entry["fastkd"]["milliseconds"] and entry["eager"]["milliseconds"]
    # it has its note, and is not tried again, neither alone nor beside others
    assert [step["rows"] for step in do(run, "compiled", "peers")] == [0, 2]
    assert worker.asked[-1] == ("kd", ["fastkd", "eager", "trl"])
    assert ["torch.compile" in names for _, names in worker.asked].count(True) == 2
    assert all("note" in entry["torch.compile"] for entry in entries(run))


def test_a_loss_that_loses_the_gpu_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch):
    def trouble(names):
        if "fastkd" in names and worker.asked[-1][0] == "kd":
            raise child.Lost("fastkd", "its process died (SIGSEGV)")

    worker = Instant(trouble)
    run = a_run(tmp_path, monkeypatch, worker, ["headlines", "kd", "rkd"])
    do(run, "headlines")
    for row in run.record.content["rows"]:
        died = row["loss"] == "kd"
        assert ("note" in row["implementations"]["fastkd"]) == died
        assert "milliseconds" in row["implementations"]["eager"]
    assert {row["loss"] for row in run.record.content["rows"]} == {"kd", "rkd"}


def test_what_takes_the_process_along_is_noted_even_if_the_time_is_up(tmp_path, monkeypatch):
    def trouble(names):
        if len(worker.asked) > 2:
            raise child.Lost("torch.compile", "hangs") if "torch.compile" in names else child.Late

    worker = Instant(trouble)
    run = a_run(tmp_path, monkeypatch, worker, ["headlines", "compiled", "kd"])
    assert do(run, "headlines", "compiled")[1]["left"] == 2
    found = entries(run)[0]
    assert found.pop("torch.compile") == {"note": "hangs"}
    assert [*found] == ["fastkd", "eager"] and found["fastkd"]["milliseconds"]


def test_a_second_run_goes_on_with_what_is_left(tmp_path, monkeypatch):
    def late(names):
        if len(worker.asked) > 3:
            raise child.Late

    worker = Instant(late)
    only = ["headlines", "kd", "rkd", "info_nce"]
    first = a_run(tmp_path / "first", monkeypatch, worker, only)
    ((step),) = do(first, "headlines")
    assert (step["rows"], step["left"]) == (3, 3)
    file = first.record.file
    assert len(json.loads(file.read_text())["rows"]) == 3

    second = a_run(tmp_path / "second", monkeypatch, Instant(), only, earlier=file)
    (step,) = do(second, "headlines")
    assert (step["rows"], step["done before"], step["left"]) == (3, 3, 0)
    content = json.loads(second.record.file.read_text())
    assert sorted(row["run"] for row in content["rows"]) == [0, 0, 0, 1, 1, 1]
    # in the same folder it needs no option; what the code has changed since is measured anew
    stale = content["rows"][0] | {"sources": "0" * 16}
    records.write(second.record.file, {**content, "rows": [stale, *content["rows"][1:]]})
    (step,) = do(a_run(tmp_path / "second", monkeypatch, Instant(), only), "headlines")
    assert (step["rows"], step["done before"]) == (1, 5)


def test_the_record_of_another_device_is_not_continued(tmp_path, monkeypatch):
    other = tmp_path / "other.json"
    records.write(other, {"label": "measured", "device": "NVIDIA H200", "runs": [], "rows": []})
    with pytest.raises(SystemExit, match=r"NVIDIA H200 \(measured\).*continue the record of the"):
        a_run(tmp_path, monkeypatch, None, earlier=other)


def test_tests_that_passed_are_not_run_again(tmp_path, monkeypatch):
    lines = {
        "alone": "tests/gpu/test_x.py::test_a[rkd-(33,), 17] PASSED   [ 10%]\n",
        "of xdist": "[gw3] [ 20%] FAILED tests/gpu/test_x.py::test_b[kd-(5,), 10] \n",
        "and again": "[gw0] [  9%] PASSED tests/gpu/test_x.py::test_c \n",
        "skipped": "tests/gpu/test_x.py::test_d SKIPPED (needs a GPU) [ 30%]\n",
    }
    ran = []

    def run(command, log, seconds, environment):
        ran.append(command)
        with log.open("a") as file:
            file.write("".join(lines.values()) + "= 1 failed, 2 passed, 1 skipped in 1 s =\n")
        return 1

    monkeypatch.setattr(child, "run", run)
    found = suites.tests(a_run(tmp_path, monkeypatch, None), time.monotonic())
    assert (found["status"], found["passed"], found["failed"], found["skipped"]) == (1, 2, 1, 1)
    assert found["last_line"] == "1 failed, 2 passed, 1 skipped in 1 s"

    again = a_run(tmp_path, monkeypatch, None)
    again.record.content["runs"].insert(0, {"code": again.code, "steps": {"tests": found}})
    suites.tests(again, time.monotonic())
    left_out = [option for option in ran[1] if option.startswith("--deselect")]
    assert left_out == [
        "--deselect=tests/gpu/test_x.py::test_a[rkd-(33,), 17]",
        "--deselect=tests/gpu/test_x.py::test_c",
    ]
    assert not [option for option in ran[0] if option.startswith("--deselect")]
    again.record.content["runs"][0]["code"] = "another"
    suites.tests(again, time.monotonic())
    assert not [option for option in ran[2] if option.startswith("--deselect")]
    again.record.content["runs"][0] = {"code": again.code, "steps": {"tests": {"status": 0}}}
    assert suites.tests(again, time.monotonic())["done before"] and len(ran) == 3


def test_as_many_processes_as_cores_allow():
    assert [suites.n_workers(n) for n in (1, 2, 4, 16, 64)] == [1, 1, 2, 14, 14]


# ---------------------------------------------------------------------------- errors of the device


@pytest.mark.parametrize(
    "message, expected",
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx", True),
        ("CUDA out of memory. Tried to allocate 2 GiB", False),
        ("CUDA error: out of memory", False),
        ("out of resource: shared memory, Required: 300000, Hardware limit: 232448", False),
        ("got logits of shape [3]", False),
    ],
)
def test_errors_after_which_a_process_is_of_no_use(message, expected):
    assert child.is_device_error(RuntimeError(message)) == expected
    with pytest.raises(ValueError) as outer, contextlib.ExitStack():
        try:
            raise RuntimeError(message)
        except RuntimeError as error:
            raise ValueError("while compiling") from error
    assert child.is_device_error(outer.value) == expected


WORKER = """
import json, os, sys, time
for line in sys.stdin:
    what = json.loads(line)["what"]
    print(json.dumps({"at": "before " + what}), flush=True)
    if what == "dies":
        os.abort()
    if what == "hangs":
        time.sleep(60)
    key = "lost" if what == "loses" else "answer"
    print(json.dumps({key: os.getpid()}), flush=True)
"""


def test_a_worker_that_is_lost_is_replaced(tmp_path):
    worker = child.Worker([sys.executable, "-c", WORKER], tmp_path / "log", patience=5)

    def ask(what, seconds=30.0):
        return worker.ask({"what": what}, time.monotonic() + seconds)

    try:
        first = ask("a")
        assert ask("b") == first and worker.started == 1
        for what, why in (("dies", "SIGABRT"), ("loses", r"\d"), ("hangs", "no word in 5 s")):
            with pytest.raises(child.Lost, match=why) as lost:
                ask(what)
            assert lost.value.at == f"before {what}"
            assert ask("c") not in (None, first)
        assert worker.started == 4
        with pytest.raises(child.Late):
            ask("hangs", -child.GRACE + 1)
        assert ask("d")
    finally:
        worker.stop()


POISONING = '''
import os, torch

class InfoNCE:
    """Lose the GPU, as an illegal access does: from then on nothing works in this process."""
    def __init__(self, temperature): pass
    def __call__(self, query, key):
        def fail(*args, **options):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        torch.Tensor.backward = torch.randn = fail
        fail()
'''
DYING = """
import os

class NTXentLoss:
    def __init__(self, temperature): pass
    def __call__(self, first, second): os.abort()
"""


@full
def test_a_loss_after_one_that_loses_the_gpu_is_measured(tmp_path):
    (tmp_path / "peers/lightly/loss").mkdir(parents=True)
    (tmp_path / "peers/info_nce.py").write_text(POISONING)
    for folder in ("lightly", "lightly/loss", "lightly/models", "lightly/models/modules"):
        (tmp_path / "peers" / folder).mkdir(exist_ok=True)
        (tmp_path / "peers" / folder / "__init__.py").touch()
    (tmp_path / "peers/lightly/models/utils.py").touch()
    (tmp_path / "peers/lightly/loss/ntx_ent_loss.py").write_text(DYING)
    for name in ("info_nce_pytorch-0", "lightly-0"):
        (tmp_path / "peers" / f"{name}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name[:-2]}\nVersion: 0\n"
        (tmp_path / "peers" / f"{name}.dist-info" / "METADATA").write_text(metadata)
    only = ["headlines", "peers", "info_nce", "nt_xent"]
    record, _ = dry_run(tmp_path / "out", only, f"--peers={tmp_path / 'peers'}")
    assert record["runs"][0]["steps"]["peers"]["processes"] == 4
    assert len(record["rows"]) == 4
    for row in record["rows"]:
        found = row["implementations"]
        assert found["fastkd"]["milliseconds"] and found["eager"]["milliseconds"]
        bad = dict(info_nce="info-nce-pytorch", nt_xent="lightly")[row["loss"]]
        assert ("CUDA error" if row["loss"] == "info_nce" else "SIGABRT") in found[bad]["note"]


POISONED = """
import pytest
lost = []

@pytest.mark.parametrize("i", range(6))
def test_it(i):
    if i == 1:
        lost.append(i)
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


@pytest.mark.parametrize("options", [["-n1"], []], ids=["xdist", "alone"])
def test_a_test_that_loses_the_gpu_does_not_fail_the_others(tmp_path, options):
    paths = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path += {paths}\n"
        "from lost_gpu import pytest_runtest_makereport, pytest_runtest_protocol\n"
    )
    (tmp_path / "test_poisoned.py").write_text(POISONED)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options]
    printed = subprocess.run(
        [*command, f"--rootdir={tmp_path}", str(tmp_path)],
        env=NO_XDIST, cwd=tmp_path, capture_output=True, text=True,
    ).stdout  # fmt: skip
    failed = re.findall(r"FAILED .*test_it\[(\d)\]|test_it\[(\d)\] FAILED", printed)
    assert {"".join(groups) for groups in failed} == {"1"}, printed
    assert "CUDA error: an illegal memory access" in printed
    # alone, the others are not run, and it says why
    n_passed = int(re.search(r"(\d) passed", printed)[1])
    assert n_passed == (5 if options else 1)
    assert options or "the GPU is lost to this process" in printed
