"""The GPU run tried out without a GPU, and which changes of the code make its figures stale."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exactness import assert_same

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import comparison  # noqa: E402
import peers  # noqa: E402
import plots  # noqa: E402
import provenance  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402
from cases import CASES  # noqa: E402


def run(script, *options):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / script), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_dry_run_does_all_of_it(tmp_path):
    only = "--only=tests,ceilings,bench,sweep,sanitizer,logit_mse,kd"
    result = run("gpu_run.py", "--dry", only, f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    steps = record["steps"]
    assert not [step for step in steps.values() if "error" in step], steps
    assert steps["tests"]["status"] == steps["sanitizer"]["unwatched"] == 0
    assert "passed" in steps["tests"]["last_line"]
    assert all(record["ceilings"].values())
    assert (record["schema"], record["label"]) == (2, "dry")

    assert {(row["op"], row["direction"]) for row in record["rows"]} == {
        (op, way) for op in ("logit_mse", "kd") for way in ("forward", "forward+backward")
    }
    assert {"fastkd", "eager", "torch.compile"} <= {r["implementation"] for r in record["rows"]}
    for row in record["rows"]:
        if row["implementation"] in ("fastkd", "eager", "torch.compile"):
            assert row["p20"] <= row["milliseconds"] <= row["p80"]
            assert row["ratio_to_fastkd"] > 0
            assert row["bytes"] > 0
            assert row["peak_extra_bytes"] > 0
            assert row["sources"] == provenance.hash_of_sources("divergence", "kernels")
            assert "note" not in row
    assert {row["kernel"] for row in record["sweep"] if row["milliseconds"]} == {
        "row_statistics", "gradient", "whole_rows", "ON_CHIP",
    }  # fmt: skip
    assert not [row for row in record["sweep"] if row["choice"] is None and "note" in row]
    assert "CHOICES = {" in result.stdout

    page = file.with_suffix(".md").read_text()
    assert "A dry run" in page and "| kd | 2×9000 | bfloat16 |" in page
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert not report.records(tmp_path), "a dry run is no measurement"


def test_what_is_not_known_is_refused(tmp_path):
    result = run("gpu_run.py", "--dry", "--only=forward_lk", f"--out={tmp_path}")
    assert result.returncode != 0
    assert "got forward_lk; known: " in result.stderr


CODE = '''
"""What it is."""
def f(x, *, scale=2.0):
    """What it does."""
    if x:
        x += 1  # why
        x *= scale
    return f"{x!r:>{scale}} of it"
'''


def structure(code):
    return provenance.structure(ast.parse(code))


@pytest.mark.parametrize(
    "old, new",
    [
        ("  # why", "  # because"),
        ('"""What it does."""', ""),
        ('"""What it is."""', '"""What it was."""'),
        ("def f(x, *, scale=2.0):", "def f(\n    x,\n    *,\n    scale=2.0,\n):"),
        ("    if x:", "\n\n    if (x):"),
    ],
)
def test_comments_docstrings_and_layout_leave_a_figure_fresh(old, new):
    assert old in CODE
    assert structure(CODE.replace(old, new)) == structure(CODE)


@pytest.mark.parametrize(
    "old, new",
    [
        ("2.0", "3.0"),
        ("x += 1", "x -= 1"),
        ("        x *= scale", "    x *= scale"),
        ("of it", "of all"),
        ("!r", "!s"),
        ("*, scale", "scale"),
    ],
)
def test_changed_code_makes_a_figure_stale(old, new):
    assert old in CODE
    assert structure(CODE.replace(old, new)) != structure(CODE)


def test_a_figure_depends_on_the_modules_that_compute_it():
    names = {
        engine: {
            str(file.relative_to(ROOT))
            for file in provenance.modules("fastkd.divergence", f"fastkd.{engine}.divergence")
        }
        for engine in ("kernels", "portable")
    }
    shared = {"fastkd/divergence.py", "fastkd/_engine.py", "fastkd/_loss.py"}
    assert shared < names["kernels"] & names["portable"]
    assert {"kernels/divergence.py", "kernels/_tiles.py"} < names["kernels"]
    assert not [name for name in names["portable"] if name.startswith("kernels")]


def a_record(**changed):
    """A GPU's record of three implementations, one of them faster than ours."""
    sources = provenance.hash_of_sources("divergence", "kernels")
    row = dict(op="kd", shape=[8, 16], dtype="bfloat16", direction="forward", bytes=512)
    row |= dict(milliseconds=2.0, p20=1.9, p80=2.1, peak_extra_bytes=512, sources=sources) | changed
    rows = [
        row | dict(implementation="fastkd", ratio_to_fastkd=1.0, share_of_ceiling=0.5),
        row | dict(implementation="faster", ratio_to_fastkd=0.75),
        row | dict(implementation="larger", milliseconds=None, note="out of memory"),
    ]
    rows = [{"device": "GPU", **row} for row in rows]
    return dict(
        schema=2, label="measured", device="GPU", torch="2", triton="3", commit="c", dirty=False,
        utc="2000-01-01", ceilings=dict(copy_GBps=3000.0, matmul_bf16_TFLOPs=700.0), rows=rows,
    )  # fmt: skip


@pytest.mark.parametrize("is_stale", [False, True])
def test_the_report_says_what_is_stale_and_who_wins(is_stale, tmp_path):
    record = a_record(**(dict(sources="0" * 16) if is_stale else {}))
    (tmp_path / "record.json").write_text(json.dumps(record))
    (tmp_path / "dry.json").write_text(json.dumps({**a_record(sources="0"), "label": "dry"}))
    result = run("report.py", str(tmp_path))
    assert result.returncode == 0, result.stderr
    line = (
        "| kd | 8×16 | bfloat16 | forward | 2 [1.9, 2.1] | 50% | 0.75 | out of memory | 2.00 | – |"
    )
    assert f"{line} {'stale' if is_stale else ''} |" in result.stdout
    assert ("3 of 3 rows are stale" in result.stdout) == is_stale
    assert "no figure of a GPU" not in result.stdout
    check = run("report.py", "--check", str(tmp_path))
    assert check.returncode == is_stale, check.stderr
    assert check.stdout == ("stale: 3 rows of kd on GPU\n" if is_stale else "")


def test_the_report_says_that_there_is_no_figure_of_a_gpu(tmp_path):
    assert "There is no figure of a GPU yet." in run("report.py", str(tmp_path)).stdout


def test_a_record_of_a_cpu_is_read_as_well():
    row = dict(loss="kd", shape=[8, 16], dtype="float32", direction="forward", seconds=0.5, ratio=1)
    record = dict(label="measured", device="CPU", sources="old", rows=[row])
    (found,) = report.rows_of(record)
    assert (found["op"], found["milliseconds"], found["stale"]) == ("kd", 500.0, True)
    record["sources"] = provenance.hash_of_sources("divergence", "portable")
    assert not report.rows_of(record)[0]["stale"]


def test_a_later_run_replaces_a_problem_as_a_whole():
    """Implementations that were not timed side by side are never shown side by side."""
    earlier, later = a_record()["rows"], a_record(milliseconds=1.0)["rows"][:1]
    (members,) = report.problems([*earlier, *later]).values()
    assert {name: row["milliseconds"] for name, row in members.items()} == {"fastkd": 1.0}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_loss_has_its_least_bytes(case):
    inputs = case.inputs((8, 16), torch.bfloat16, "meta")
    is_of_crops = case.name == "dino"  # 10 of the student, 2 of the teacher
    # of 8 examples: two networks or towers, two views of half of them, or the labels of all
    tensors = 8 * 16 if case.name in ("nt_xent", "sup_con") else 2 * 8 * 16
    tensors = 12 * 8 * 16 if is_of_crops else tensors
    others = {"kd": 8 * 8, "sup_con": 8 * 8, "clip_contrastive": 4, "siglip": 8, "dino": 2 * 16}
    read = 2 * tensors + others.get(case.name, 0)
    assert comparison.least_bytes(case, inputs, "forward") == read
    both = comparison.least_bytes(case, inputs, "forward+backward")
    # of logits, which a backward reads again
    again = read if case.family.name == "divergence" or is_of_crops else 0
    trained = tensors if case.family.name == "contrastive" else tensors // 2
    trained = 10 * 8 * 16 if is_of_crops else trained
    assert both == read + again + 2 * trained
    flops = [comparison.least_flops(case, (8, 16), way) for way in ("forward", "forward+backward")]
    # in products of all queries with all keys, or of slopes with either
    products = {"contrastive": (1, 3), "similarity": (2, 4)}
    if case.family.name in products:
        assert flops == [2 * 8 * 8 * 16 * n for n in products[case.family.name]]
    else:
        assert flops == sorted(flops) and all(flops) == (case.family.name == "relational")


def losses_of_peers():
    return [
        pytest.param(loss, name, op, id=f"{name}-{op}")
        for name, losses in peers.available()[0].items()
        for op, loss in losses.items()
    ]


@pytest.mark.parametrize("loss, name, op", losses_of_peers())
def test_a_peer_computes_the_same_loss(loss, name, op):
    """Where it is installed; with a GPU, or in float64 what needs none."""
    needs_gpu = name in peers.NEED_A_GPU
    dtype = torch.float32 if needs_gpu else torch.float64
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and needs_gpu:
        pytest.skip(f"{name} needs a GPU")
    (case,) = (case for case in CASES if case.name == op)
    found = []
    for function in (case.eager, loss):
        inputs = case.inputs((120, 50), dtype, device)  # some of a class of their own, others not
        value = function(*inputs)
        value.backward()
        gradients = [x.grad for x in inputs if x.grad is not None]
        found.append([value.detach(), *gradients])
    assert_same(found[1], found[0], tolerance=1e-12 if dtype == torch.float64 else 1e-5)


def test_another_loss_is_noticed():
    value, gradient = torch.tensor(2.0), torch.tensor([3.0, 4.0])
    ours = timing.Found(value, gradient)
    rounded = timing.Found(value * (1 + 1e-6), gradient * (1 - 1e-6))
    assert not timing.disagreement(rounded, ours, 1e-3)
    assert not timing.disagreement(timing.Found(value, None), ours, 1e-3)
    of_a_sum = timing.disagreement(timing.Found(value * 8, gradient * 8), ours, 1e-3)
    assert of_a_sum == "its loss is 16, fastkd's 2"
    without_a_side = timing.disagreement(timing.Found(value, gradient / 2), ours, 1e-3)
    assert without_a_side == "its gradient, of norm 2.5, is off fastkd's, 5, by 50.00%"
    assert timing.disagreement(timing.Found(value * torch.nan, gradient), ours, 1e-3)


def test_a_plot_follows_the_line_of_most_shapes():
    widths = [[4096, d] for d in (64, 256, 512)]
    batches = [[n, 256] for n in (1024, 4096, 8192, 16384)]
    shapes = [*widths, *batches, [65536, 64]]
    assert [plots.densest(axis, shapes) for axis in (0, 1)] == [[16384, 256], [4096, 512]]
