"""The benchmarks compare like with like, and their record says what it is a figure of."""

import ast
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import CASES
from choice import quick_if
from exactness import assert_same

import fastkd
from fastkd._op import Op

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import agreement  # noqa: E402
import bench  # noqa: E402
import devices  # noqa: E402
import logit_rows  # noqa: E402
import peers  # noqa: E402
import records  # noqa: E402
import report  # noqa: E402
import runner  # noqa: E402
from workloads import BY_NAME, WORKLOADS  # noqa: E402


@pytest.fixture
def main(monkeypatch):
    """Return what calls a script's main with command-line options."""

    def call(script, *options):
        monkeypatch.setattr(sys, "argv", [script.__name__, *options])
        return script.main()

    return call


# -------------------------------------------------------------------------------------- workloads


@pytest.mark.parametrize(
    "workload",
    [*WORKLOADS, *(x for x in logit_rows.WORKLOADS if x.of_options)],
    ids=lambda workload: workload.label,
)
def test_what_is_compared_is_the_same_loss(workload):
    n, *sizes = min(workload.family.sizes)
    results = []
    for loss in (workload.fastkd, workload.eager):
        inputs = workload.inputs((min(n, 8), *sizes), torch.float64, "cpu")
        value = loss(*inputs)
        value.backward()
        results.append([value.detach(), *(x.grad for x in inputs if x.requires_grad)])
    assert_same(*results)


@pytest.mark.parametrize("name", BY_NAME)
@quick_if(lambda name: name in ("decoupled_kd", "mlkd", "uld", "uskd"))
def test_losses_agree_with_their_published_forms(name):
    """People's expressions, too, are no further away than rounding takes them."""
    published, people = agreement.of_published(name)
    assert published.worst < 1e-12 and people.worst < 1e-12


def test_a_difference_from_a_published_form_shows():
    case = BY_NAME["decoupled_kd"].case
    found = agreement.difference(
        case, lambda *x: case.truth(*x, beta=8.001), case.inputs((12,), 20)
    )
    assert 1e-6 < min(found) and max(found) < 1e-3


def test_the_table_of_exactness(main, capsys, monkeypatch):
    """Libraries that cannot be imported are named with the reason."""
    monkeypatch.setattr(agreement, "BY_NAME", {name: BY_NAME[name] for name in ("nkd", "alm")})
    monkeypatch.setattr(agreement, "LIBRARIES", {"torch": agreement.pytorch, "none": nowhere})
    monkeypatch.setattr(agreement.peers, "available", lambda: ({}, {}))
    assert main(report, "exactness") == 0
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    names = [row[0].strip() for row in rows]
    assert names[2:4] == ["nkd", "alm"] and names.count("kd, class weights") == 1
    assert "- none: nothing is here" in printed


def nowhere():
    raise ModuleNotFoundError("nothing is here")


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
    found = []
    for function in (BY_NAME[op].eager, loss):
        inputs = BY_NAME[op].inputs((120, 50), dtype, device)  # some classes have one example
        value = function(*inputs)
        value.backward()
        gradients = [x.grad for x in inputs if x.grad is not None]
        found.append([value.detach(), *gradients])
    assert_same(found[1], found[0], tolerance=1e-12 if dtype == torch.float64 else 1e-5)


# ----------------------------------------------------------------------------------------- runner


def test_an_error_after_which_nothing_works_is_raised():
    def fails(student, teacher):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    workload, announced = BY_NAME["forward_kl"], []
    losses = {"fastkd": workload.fastkd, "eager": fails, "later": workload.eager}
    device = devices.Cpu(threads=1, quick=True)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        runner.measure(problem("forward_kl"), losses, device, announced.append)
    assert announced == ["fastkd", "eager"]


def test_the_time_of_the_host_is_that_of_a_call_that_waits_for_nothing(monkeypatch):
    """Neither emptying the cache nor a full queue counts."""
    clock = [0.0]
    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock[0])

    def takes(*seconds):
        waits = list(seconds)

        def step(*args):
            clock[0] += waits.pop(0)

        return step

    class Event:
        def __init__(self, enable_timing):
            self.record = takes(1.0)

        def elapsed_time(self, end):
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("_sleep", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, takes(1.0, 1.0))
    gpu = devices.Gpu()
    gpu._other = SimpleNamespace(nbytes=100, sum=takes(1.0, 1.0, 1.0))
    batch = gpu.time(takes(0.003, 0.002, 0.5), 3, 10, 1e-3)
    assert batch.milliseconds == [7.0] * 3 and batch.host_milliseconds == pytest.approx(2.0)


def problem(name, shape=(8, 16), direction="forward+backward"):
    return runner.Problem(BY_NAME[name], shape, torch.float32, direction)


@pytest.mark.parametrize("direction", runner.DIRECTIONS)
def test_only_what_agrees_is_timed(direction):
    workload = BY_NAME["forward_kl"]

    def fails(student, teacher):
        raise NotImplementedError("no kernel\nfor this")

    losses = {
        "fastkd": workload.fastkd,
        "eager": workload.eager,
        "of a sum": lambda student, teacher: 8 * workload.eager(student, teacher),
        "without a side": lambda student, teacher: workload.eager(
            (student + student.detach()) / 2, teacher
        ),
        "fails": fails,
    }
    device = devices.Cpu(threads=1, quick=True)
    row = runner.measure(problem("forward_kl", direction=direction), losses, device)
    found = row["implementations"]
    assert found["fails"] == {"note": "NotImplementedError: no kernel"}
    assert found["of a sum"]["note"].startswith("its loss is ")
    if direction == "forward":
        assert "note" not in found["without a side"]
    else:
        assert found["without a side"]["note"].endswith("by 50.00%")
    for entry in (found["fastkd"], found["eager"]):
        low, high = entry["quartiles"]
        assert 0 < low <= entry["milliseconds"] <= high
        assert entry["peak_extra_bytes"] > 0
    assert found["fastkd"]["ratio"] == 1
    assert (row["threads"], row["shape"], row["direction"]) == (1, [8, 16], direction)


def test_what_does_not_fit_is_not_compared(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 17)  # a memory of 16 GiB
    device = devices.Cpu(quick=True)
    importable = {"liger-kernel": {"info_nce": None}}

    def names(shape):
        return {*runner.implementations(problem("info_nce", shape), device, importable)}

    assert names((65536, 64)) == {"fastkd", "liger-kernel"}
    assert names((1024, 64)) == {"fastkd", "eager", "liger-kernel"}


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_every_loss_has_its_least_bytes(workload):
    name, inputs = workload.name, workload.inputs((8, 16), torch.bfloat16, "meta")
    assert {x.device.type for x in inputs} == {"meta"} and inputs[0].requires_grad
    forward, both = (
        runner.Problem(workload, (8, 16), torch.bfloat16, way) for way in ("forward", "both")
    )
    # of 8 examples: two networks or towers, two views of half of them, the features of one, crops
    n_tensors = {"nt_xent": 1, "sup_con": 1, "dino": 12, "fsp": 4, "minilm_relation": 6}
    n_tensors |= {"teacher_free_kd": 1, "multi_teacher": 4, "ibot": 2 * 5}  # patches
    n_tensors["linear_kd"] = 2 + 2 * 2  # hidden states, and heads of 16 entries
    wider = dict.fromkeys(("matched_kl", "projected_kl"), 1 + 18 / 16)  # two entries more
    n_tensors = (n_tensors | wider | {"vid": 2 + 1 / 8}).get(name, 2)
    n_trained = {"info_nce": 2, "clip_contrastive": 2, "siglip": 2, "dino": 10, "fsp": 2}
    n_trained |= {"linear_kd": 1 + 2, "mutual_kl": 2, "koleo": 2, "ibot": 5, "uskd": 2}
    n_trained = (n_trained | {"vid": 1 + 1 / 8, "minilm_relation": 3}).get(name, 1)
    others = {"kd": 8 * 8, "sup_con": 8 * 8, "clip_contrastive": 4, "siglip": 8, "dino": 2 * 16}
    others |= {"hint": 2 * 8, "ibot": 8 * 5 + 4 * 16}  # weights; a mask and a centre
    others["matched_kl"], others["projected_kl"] = 8 * 2 * 10, (8 + 2) * 16 * 3  # ids, shares
    labelled = ("decoupled_kd", "nkd", "uskd", "wsld", "mft", "teacher_free_kd")
    others |= dict.fromkeys(labelled, 8 * 8)
    read = 2 * 8 * 16 * n_tensors + others.get(name, 0)
    assert runner.least_bytes(forward, inputs) == read
    again = read if workload.family.independent else 0  # of logits, which a backward reads again
    assert runner.least_bytes(both, inputs) == read + again + 2 * 8 * 16 * n_trained
    flops = [runner.least_flops(x) for x in (forward, both)]
    # in products of all queries with all keys, or of slopes with either
    products = {"similarity_kl": (2, 4)}.get(name, (1, 3))
    if workload.problem == "pairs":
        assert flops == [2 * 8 * 8 * 16 * n for n in products]
    else:
        assert flops == sorted(flops) and all(flops) == (workload.problem == "relations")


def test_a_run_writes_its_record(tmp_path, main, capsys):
    options = ["--quick", "--loss=forward_kl,rkd", "--sizes=4x8", "--threads=1"]
    assert main(bench, *options, f"--out={tmp_path}") == 0
    assert "| forward_kl |   4×8 |" in capsys.readouterr().out
    (record,) = records.read(tmp_path)
    assert {(row["loss"], row["direction"], row["threads"]) for row in record["rows"]} == {
        (loss, direction, 1) for loss in ("forward_kl", "rkd") for direction in runner.DIRECTIONS
    }
    assert {"utc", "commit", "torch", "python", "peers"} <= record["runs"][0].keys()
    assert not [row for row in record["rows"] if report.is_stale(row)]


def test_a_run_of_logits_says_which_goals_are_met(tmp_path, main, capsys):
    options = ["--quick", "--logits", "--loss=multi_teacher", "--sizes=4x8", "--threads=1"]
    assert main(bench, *options, f"--out={tmp_path}") == 0
    page = capsys.readouterr().out
    assert "| multi_teacher, mixture of 3 |   4×8 |" in page
    assert "| multi_teacher, sum of 3 4×8, 3 teachers / 1" in page
    (record,) = records.read(tmp_path)
    assert len(record["rows"]) == 4 and len({records.key_of(row) for row in record["rows"]}) == 4


def test_a_goal_is_met_or_missed():
    def row(loss, ratio, peak, **others):
        entries = {"fastkd": dict(peak_extra_bytes=peak), "eager": dict(ratio=ratio), **others}
        where = dict(shape=[2048, 32000], direction=runner.DIRECTIONS[0])
        return dict(loss=loss, implementations=entries, **where)

    n_bytes = 4 * 2048 * 32000
    rows = [
        row("wsld", 1.99, 1.21 * n_bytes),
        row("mutual_kl", 2.0, 3.6 * n_bytes) | dict(options="3 networks"),
        row("multi_teacher", 3.0, n_bytes, **{logit_rows.ONE_TEACHER: dict(ratio=0.4)})
        | dict(options="sum of 3"),
    ]
    lines = [line.split("|")[1:5] for line in logit_rows.bars(rows).splitlines()[2:]]
    assert [[x.strip() for x in line[2:]] for line in lines] == [
        ["1.99", "missed"], ["1.21", "missed"], ["2.00", "met"], ["1.20", "met"],
        ["3.00", "met"], ["1.00", "met"], ["2.50", "missed"],
    ]  # fmt: skip


def test_a_run_refuses_what_it_does_not_know(main, capsys):
    with pytest.raises(SystemExit):
        main(bench, "--loss=forward_lk")
    assert "got forward_lk" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- records


def a_row(loss="kd", **changed):
    entry = dict(milliseconds=2.0, quartiles=[1.9, 2.1], peak_extra_bytes=512)
    entries = {"fastkd": entry | dict(ratio=1.0, ratio_quartiles=[1.0, 1.0])}
    entries["faster"] = entry | dict(ratio=0.75, ratio_quartiles=[0.7, 0.8])
    entries["larger"] = dict(note="out of memory")
    row = dict(loss=loss, shape=[8, 16], dtype="bfloat16", direction="forward", threads=None)
    row |= dict(sources=records.sources(BY_NAME[loss].case, "triton"), implementations=entries)
    return row | changed


def a_record(folder, *rows, label="measured"):
    run = records.new_run(peers={}, ceilings=dict(copy_GBps=3000.0, matmul_bf16_TFLOPs=700.0))
    record = records.Record(folder, label, "GPU 1", run)
    for row in rows:
        record.add(row)
    return record


def test_a_later_run_replaces_a_row_as_a_whole(tmp_path):
    """Implementations that were not timed side by side are never shown side by side."""
    a_record(tmp_path, a_row("kd"), a_row("forward_kl"))
    later = a_row("kd", implementations={"fastkd": {"milliseconds": 1.0}})
    a_record(tmp_path, later)
    (record,) = records.read(tmp_path)
    assert [(row["loss"], row["run"]) for row in record["rows"]] == [("kd", 1), ("forward_kl", 0)]
    assert record["rows"][0]["implementations"] == later["implementations"]
    a_record(tmp_path, a_row("forward_kl"), a_row("forward_kl", shape=[4, 4]))
    (record,) = records.read(tmp_path)
    assert [row["run"] for row in record["rows"]] == [0, 1, 1] and len(record["runs"]) == 2


def test_processors_of_one_name_have_records_of_their_own(tmp_path, main, capsys, monkeypatch):
    """Their figures differ with their vector instructions."""
    monkeypatch.setattr(devices, "_model", lambda: "AMD EPYC")
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda x=capability: x)
        run = records.new_run(**devices.Cpu().description(), peers={})
        records.Record(tmp_path, "measured", run.pop("device"), run).add(a_row(threads=1))
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["amd-epyc-avx2.json", "amd-epyc-avx512.json"]
    assert main(report, f"--results={tmp_path}", "measured") == 0
    pages = capsys.readouterr().out
    assert "### AMD EPYC, AVX2\n" in pages and "### AMD EPYC, AVX512\n" in pages


@pytest.mark.parametrize("is_stale", [False, True])
def test_the_report_says_what_is_stale(is_stale, tmp_path, main, capsys):
    a_record(tmp_path, a_row(**(dict(sources="0" * 16) if is_stale else {})))
    a_record(tmp_path / "dry", a_row("forward_kl"), label="dry")
    assert main(report, f"--results={tmp_path}", "measured") == 0
    page = capsys.readouterr().out
    assert "| 2 [1.9, 2.1] |" in page and "| 0.75 [0.70, 0.80] | out of memory |" in page
    assert ("1 of 1 rows are stale" in page) == is_stale
    assert main(report, f"--results={tmp_path}", "--check") == is_stale
    assert capsys.readouterr().out == ("stale: 1 rows of kd on GPU 1\n" if is_stale else "")
    (record,) = records.read(tmp_path / "dry", "dry")
    assert "no figure here means anything" in report.page(record)


def test_the_page_has_the_time_of_the_host_and_says_which_peers_are_missing(tmp_path):
    entries = a_row()["implementations"]
    hosts = {name: entries["fastkd"] | dict(host_milliseconds=x) for name, x in HOSTS.items()}
    record = a_record(tmp_path, a_row(implementations=hosts))
    record.run["peers"] = {"trl": "1.0", "quack-kernels": f"{peers.MISSING} (it needs a DSL): no"}
    page = report.page(record.content)
    assert "| host, ms | eager's host, ms |" in page and "|     0.25 |             0.04 |" in page
    assert "; trl 1.0." in page
    assert (
        "missing on this machine:\n\n- quack-kernels cannot be imported (it needs a DSL): no\n"
        in page
    )
    assert "host, ms" not in report.table([a_row()])


HOSTS = {"fastkd": 0.25, "eager": 0.04}


def test_what_a_peer_lacks_is_said(monkeypatch):
    def fails():
        raise AttributeError("module 'torch.nn' has no attribute 'LinearCrossEntropyOptions'\nmore")

    monkeypatch.setattr(
        peers, "PEERS", {"torch linear_cross_entropy": fails, "quack-kernels": fails}
    )
    losses, found = peers.available()
    assert not losses and found["torch linear_cross_entropy"] == (
        "cannot be imported (it needs torch 2.13): AttributeError: module 'torch.nn' has no "
        "attribute 'LinearCrossEntropyOptions'"
    )
    assert "nvidia-cutlass-dsl" in found["quack-kernels"]


def files_of(case, engine):
    """Return the names of the files that a figure of the case depends on."""
    engine = engine if case.has_kernels else "portable"
    files = records.modules(case.name, case.problem, engine)
    return {str(file.relative_to(ROOT)) for file in files}


def test_a_figure_depends_on_the_code_that_computes_it():
    def names(name, engine):
        return files_of(BY_NAME[name].case, engine)

    rows = {"fastkd/portable/rows.py", "fastkd/problems/rows.py"}
    shared = {"fastkd/_pages.py", "fastkd/_precision.py", "fastkd/_reduction.py"}
    assert rows | shared <= names("kd", "portable") == names("forward_kl", "portable")
    kernels = {"kernels/rows/launch.py", "kernels/rows/terms.py", "kernels/tiles.py"}
    assert kernels | {"fastkd/problems/rows.py"} < names("kd", "triton")
    assert "fastkd/_loss.py" not in names("kd", "portable") | names("kd", "triton")
    assert not [x for x in names("info_nce", "triton") if "rows" in x or "portable" in x]
    assert names("pkt", "triton") == names("pkt", "portable")  # it has no kernels
    hashes = [records.sources(BY_NAME[name].case, "portable") for name in ("kd", "pkt", "rkd")]
    assert len({*hashes}) == 3


@pytest.mark.parametrize("engine", ["portable", "triton"])
def test_a_figure_depends_on_how_its_loss_is_stated(engine):
    """The statements of other losses of a problem are none of its code."""
    statements = {
        "nkd": {"fastkd/problems/_decoupled.py"},
        "matched_kl": {"fastkd/problems/_vocabularies.py"},
        "dino": {"fastkd/problems/_crops.py"},
        "channel_wise": {"fastkd/problems/_maps.py"},
    }
    of_rows = files_of(BY_NAME["forward_kl"].case, engine)
    for name, files in statements.items():
        assert files_of(BY_NAME[name].case, engine) - of_rows == files
    linear = files_of(BY_NAME["linear_kd"].case, engine)
    assert {"fastkd/_heads.py", "fastkd/_logits.py", "fastkd/_products.py"} < linear


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_figure_depends_on_all_problems_that_are_solved_for_it(case, monkeypatch):
    solved, solve = set(), Op.__call__

    def noted(op, engine, problem):
        solved.add(f"fastkd/portable/{op.module}.py")
        return solve(op, engine, problem)

    monkeypatch.setattr(Op, "__call__", noted)
    with fastkd.backend("portable"):
        case(*case.inputs((5,), 4, torch.float32))
    assert solved <= (files_of(case, "portable") if case.problem else set())


CODE = '''
"""Name the thing."""
def f(x, *, scale=2.0):
    """Do the thing."""
    if x:
        x += 1  # why
        x *= scale
    if not x:
        raise ValueError("got it")
    return f"{x!r:>{scale}} of it"
'''
THE_SAME = {
    "  # why": "  # because",
    '"""Do the thing."""': "",
    '"""Name the thing."""': '"""Name another."""',
    "def f(x, *, scale=2.0):": "def f(\n    x,\n    *,\n    scale=2.0,\n):",
    "    if x:": "\n\n    if (x):",
    "got it": "got that",
}
ANOTHER = {"2.0": "3.0", "x += 1": "x -= 1", "        x *= scale": "    x *= scale"}
ANOTHER |= {"of it": "of all", "!r": "!s", "*, scale": "scale"}


def test_only_changed_code_makes_a_figure_stale():
    for old, new in (THE_SAME | ANOTHER).items():
        assert old in CODE
        changed = records.structure(ast.parse(CODE.replace(old, new)))
        is_same = changed == records.structure(ast.parse(CODE))
        assert is_same == (old in THE_SAME), old


def test_the_records_in_git_can_be_read():
    for record in records.read():
        assert record["schema"] == 3
        assert all(row["run"] < len(record["runs"]) for row in record["rows"])
        keys = [records.key_of(row) for row in record["rows"]]
        assert len({*keys}) == len(keys)
        assert report.page(record).count("\n| ") > len(keys)
    text = (records.RESULTS / "inductor.json").read_text()
    assert json.loads(text)["label"] == "counted"
