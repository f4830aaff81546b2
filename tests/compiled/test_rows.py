"""Whole rows as they are compiled: instructions, barriers, spills, and specialisations."""

import itertools

import pytest
import torch
from choice import full, quick_if
from gate import capture
from sass import analyse
from targets import ALLOWED, TARGETS, spills_of

import fastkd
from fastkd._precision import compute_dtype
from fastkd.kernels.rows import launch
from fastkd.problems.rows import DIVERGENCES, Rows

MANY = 1 << 16
# of student and teacher
DTYPES = [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)]
DTYPES += [(torch.float64,) * 2, (torch.float16, torch.float64)]


def problem(
    divergence, n_cols, dtypes=DTYPES[0], labelled=False, row_weight=0.0, n_rows=MANY
):  # fmt: skip
    student, teacher = (torch.empty(n_rows, n_cols, dtype=x, device="meta") for x in dtypes)
    labels = torch.empty(n_rows, dtype=torch.int64, device="meta") if labelled else None
    return Rows(student, teacher, labels, None, 2.0, 2.0, 0.3, 4.0, divergence, row_weight)


def captured(rows, target="sm_90"):
    """Return the launches of the forward, of the backward and of both at once."""
    n_rows = rows.student.shape[0]
    upstream = torch.empty(n_rows, device="meta")
    upstreams = upstream, None if rows.labels is None else upstream
    dtype = compute_dtype(rows.student, rows.teacher)
    statistics = rows.student.new_empty((n_rows, launch.n_statistics(rows)), dtype=dtype)
    calls = (
        lambda: launch.forward(rows, (False,)),
        lambda: launch.backward(rows, statistics, upstreams),
        lambda: launch.value_and_gradients(
            rows, (True,), row_weights=upstream, ce_weights=upstreams[1]
        ),
    )
    for call in calls:
        with capture(target) as found:
            call()
        yield [x for x in found if x.name != "kernel"]


def too_many_spills(launches):
    """Return the kernels that spill more than budgets.json allows, and how much."""
    found = [(x.name, spills_of(x)) for x in launches]
    return [(name, spills) for name, spills in found if spills > ALLOWED.get(name, 0)]


@pytest.mark.parametrize("n_cols", [1000, 4096, 8192])
@quick_if(lambda n_cols: n_cols != 4096)
def test_instructions_and_barriers_of_whole_rows(n_cols):
    """A row whose student is certain of a class takes a branch that other rows do not."""
    (forward,), (backward,), (both,) = captured(problem("forward_kl", n_cols))
    for found in (forward, backward):
        report = analyse(found)
        n_entries = found.args["ROWS"] * found.args["COLUMNS"] / (32 * report.warps)
        assert report.total["instructions"] / n_entries <= 32
        # the branch is a loop over all entries; what follows it is counted as often as the loop
        n_trips = n_entries / (report.few["load_bytes"] / 4) if report.few["load_bytes"] else 0
        assert n_trips * report.few["instructions"] / n_entries <= 42
        assert not report.spills and report.warps_per_sm >= 24
        assert report.total["barriers"] == 0 or report.warps > 1
    report = analyse(both)  # keeps all entries, and reads the student once more: a branch
    n_entries = both.args["ROWS"] * both.args["COLUMNS"] / (32 * report.warps)
    assert report.few["load_bytes"] == 2 * n_entries
    assert report.few["instructions"] / n_entries <= 12


LONGEST = "the longest on chip"
LENGTHS = [100, 1000, LONGEST]


def columns(length, dtypes):
    """Return the columns of rows of a length."""
    if length != LONGEST:
        return length
    return launch.ON_CHIP // 4 if torch.float64 in dtypes else launch.ON_CHIP


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda x: "-".join(map(str, x)))
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@quick_if(
    lambda target, dtypes, divergence, labelled, length: (
        (target, dtypes, labelled, length) == ("sm_90", DTYPES[0], True, LONGEST)
        and divergence == "jensen_shannon"
    )
)
def test_whole_rows_compile_without_spills(target, dtypes, divergence, labelled, length):
    n_cols = columns(length, dtypes)
    for found in captured(problem(divergence, n_cols, dtypes, labelled), target):
        assert [x.name for x in found] == ["whole_rows"]
        assert not too_many_spills(found)


# what the kernels solve besides the divergences: classes set apart, standardized logits, smooth,
# weighted and soft labels, a temperature of each row, and the cross-entropy alone
VARIANTS = {
    "decoupled": dict(divergence="decoupled_kl", apart=True),
    "others": dict(divergence="soft_cross_entropy", apart=True, labelled=True),
    "standardized": dict(divergence="forward_kl", standardized=True),
    "standardized mixture": dict(divergence="jensen_shannon", standardized=True),
    "standardized decoupled": dict(divergence="decoupled_kl", standardized=True, apart=True),
    "smooth": dict(divergence="forward_kl", labelled=True, label_smoothing=0.1),
    "weighted": dict(divergence="forward_kl", labelled=True, weighted=True),
    "smooth, weighted": dict(
        divergence="forward_kl", labelled=True, label_smoothing=0.1, weighted=True
    ),
    "soft": dict(divergence="forward_kl", soft=torch.bfloat16),
    "soft mixture": dict(divergence="jensen_shannon", soft=torch.float32),
    "soft, smooth, weighted": dict(
        divergence="forward_kl", soft=torch.float32, label_smoothing=0.1, weighted=True
    ),
    "per row": dict(divergence="reverse_kl", per_row=True),
    "labels alone": dict(divergence="", labelled=True),
}
MOST_REGISTERS = (
    "others", "standardized mixture", "standardized decoupled", "soft mixture",
    "soft, smooth, weighted",
)  # fmt: skip


def variant(name, n_cols, dtypes, n_rows=MANY):
    """Return rows of a name of VARIANTS."""
    options = VARIANTS[name]
    classes = torch.empty(n_rows, dtype=torch.int64, device="meta")
    own = torch.empty(n_rows, device="meta")
    labelled = options.get("labelled", False)
    rows = problem(options["divergence"], n_cols, dtypes, labelled, n_rows=n_rows)
    rows = rows._replace(
        apart=classes if "apart" in options else None,
        standardized=options.get("standardized", False),
        student_temperature=own if "per_row" in options else 2.0,
        label_smoothing=options.get("label_smoothing", 0.0),
        class_weights=torch.empty(n_cols, device="meta") if "weighted" in options else None,
    )
    if "soft" in options:
        rows = rows._replace(labels=torch.empty_like(rows.student, dtype=options["soft"]))
    return rows


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda x: "-".join(map(str, x)))
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("length", [*LENGTHS, 32000])
@quick_if(
    lambda target, dtypes, name, length: (
        (target, dtypes, length) == ("sm_90", DTYPES[0], LONGEST) and name in MOST_REGISTERS
    )
)
def test_variants_of_rows_compile_without_spills(target, dtypes, name, length):
    rows = variant(name, columns(length, dtypes), dtypes)
    for found in captured(rows, target):
        assert found and not too_many_spills(found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", VARIANTS)
@quick_if(lambda target, name: target == "sm_90" and name.startswith("standardized"))
def test_long_rows_that_programs_share_compile_without_spills(target, name):
    for found in captured(variant(name, 32000, DTYPES[0], n_rows=32), target):
        assert found and not too_many_spills(found)


def kernels_of(sizes, n_cols, **options):
    """Return the specialisations of each kernel that training steps of these sizes need."""
    found = set()
    for n_rows in sizes:
        student = torch.empty(n_rows, n_cols, dtype=torch.bfloat16, device="meta")
        student.requires_grad_()
        with capture("sm_90") as launches, fastkd.backend("triton"):
            loss = fastkd.forward_kl(student, torch.empty_like(student), **options)
            torch.autograd.grad(loss.sum(), student)
        found |= {(x.name, id(x.kernel)) for x in launches}
    return sorted(name for name, _ in found)


def test_batches_of_any_size_compile_nothing_anew():
    sizes = [2, 3, 7, 8, 15, 16, 31, 32, 64, 100, 128, 255, 256, 512, 1000, 4096]
    assert kernels_of(sizes, 1000) == ["whole_rows"] * 2
    assert kernels_of(sizes, 1000, reduction="none") == ["whole_rows"] * 2


@full
def test_batches_of_long_rows_compile_what_splits_need():
    """A row is swept by 8 warps, or by 16 where there are few."""
    sizes = [*range(200, 216), 300, 511, 512]
    names = kernels_of(sizes, 32000)
    expected = {"row_statistics": 2, "gradient": 1, "certain_classes": 1}
    assert {name: names.count(name) for name in names} == expected


@full
def test_what_the_forward_makes_for_a_known_weight_does_not_spill():
    for divergence, n_cols in itertools.product(DIVERGENCES, (1000, 8192)):
        rows = problem(divergence, n_cols, row_weight=1 / MANY)
        with capture("sm_90") as found:
            launch.forward(rows, (True,))
        (report,) = map(analyse, found)
        assert not report.spills
