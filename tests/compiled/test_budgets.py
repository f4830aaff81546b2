"""No loss of the benchmarks' table breaks a rule of the gate or costs more than recorded."""

import json

import budgets
import pytest
import torch
from budgets import Change, changes
from choice import quick_if
from counts import FUSED, compiled, resources
from sass import complaints

RECORD = budgets.read()


# one launch site of each kernel; all of them are compiled by `make test-all`
QUICK = {
    ("forward_kl", (4096, 151669)), ("jensen_shannon", (8192, 8192)), ("kd", (256, 1000)),
    ("rkd", (256, 512)), ("clip_contrastive", (4096, 64)), ("similarity_kl", (4096, 64)),
    ("siglip", (4096, 64)), ("info_nce", (4096, 64)),
    ("hint", (16, 256, 64, 64)), ("attention_transfer", (16, 64, 8, 8)),
    ("embedding_mse", (4096, 768)),
    ("token_relation", (8, 512, 768)),
}  # fmt: skip
ON_AMD = ("forward_kl", "rkd", "siglip", "hint", "attention_transfer", "token_relation")
POINTS = [
    pytest.param(case, target, *point, id=f"{case.name}-{target}-{budgets.name_of(*point)}")
    for case in FUSED
    for target in budgets.TARGETS
    for point in budgets.points(case, target)
]


@pytest.mark.parametrize("case, target, shape, dtype", POINTS)
@quick_if(
    lambda case, target, shape, dtype: (
        (case.name, shape) in QUICK
        and target in ("sm_90", *["gfx942"] * (case.name in ON_AMD))
        and dtype == torch.bfloat16
    )
)
def test_every_launch_keeps_the_rules_and_its_budget(case, target, shape, dtype):
    if target == "gfx942" and tuple(map(int, budgets.VERSION.split("."))) < (3, 5):
        pytest.skip("needs an external ld.lld before triton 3.5")
    run, name = compiled(case, shape, dtype, target), budgets.name_of(shape, dtype)
    assert not [sentence for launch in run.launches for sentence in broken_rules(launch)]
    present = {target: budgets.of_kernels(run, target)}
    if target == "sm_90":  # others split the work otherwise
        present["call"] = budgets.of_call(run)
    recorded = RECORD["counts"].get(case.name, {}).get(name, {})
    recorded = {part: recorded.get(part, {}) for part in present}
    found = budgets.changes({name: recorded}, {name: present})
    if RECORD["triton"] != budgets.VERSION:
        largest = "; ".join(map(str, found[:3])) or "none"
        pytest.skip(f"recorded with Triton {RECORD['triton']}; the largest differences: {largest}")
    worse = [str(change) for change in found if change.is_worse]
    assert not worse, "\n".join(["if on purpose: python tests/budgets.py --write", *worse])


def broken_rules(launch) -> list[str]:
    if "hsaco" in launch.asm:
        spills = resources(launch, 1)["spills"]
        return [f"{launch.name}: {spills} spilled registers"] if spills else []
    rules = RECORD["rules"].get(launch.name, {})
    return complaints(launch, **{name: x for name, x in rules.items() if name != "because"})


def test_rules_have_reasons_and_kernels():
    losses = RECORD["counts"].values()
    kernels = {
        name.split()[0]
        for points in losses
        for point in points.values()
        for target in budgets.TARGETS
        for name in point.get(target, ())
    }
    assert set(RECORD["rules"]) <= kernels
    for rules in RECORD["rules"].values():
        assert len(rules) > 1 and rules["because"].endswith(".")
    for spills in RECORD["spills"].values():
        assert spills["most"] and spills["because"].endswith(".")


def test_the_file_has_what_the_table_has():
    points = {
        case.name: {
            budgets.name_of(*point) for t in budgets.TARGETS for point in budgets.points(case, t)
        }
        for case in FUSED
    }
    assert {name: set(RECORD["counts"][name]) for name in RECORD["counts"]} == points


def test_bytes_are_counted_where_the_launch_sites_choose_as_for_the_whole():
    for case in FUSED:
        for shape in case.family.compiled_sizes:
            counts = RECORD["counts"][case.name][budgets.name_of(shape, torch.bfloat16)]
            assert counts["traffic"]["launches"] == counts["call"]["launches"]


@pytest.mark.parametrize(
    "what, recorded, present, is_worse",
    [
        ("registers", 100, 104, False),
        ("registers", 100, 106, True),
        ("registers", 100, 90, False),
        ("spills", 0, 1, True),
        ("warps_per_sm", 40, 39, False),
        ("warps_per_sm", 40, 36, True),
        ("warps_per_sm", 40, 48, False),
        ("tensor", 8, 0, True),
        ("bytes[1]", None, 14.0, True),
        ("launches[0]", 1, None, True),
    ],
)
def test_worse_by_more_than_the_slack_fails(what, recorded, present, is_worse):
    assert Change(f"kernel {what}", recorded, present).is_worse == is_worse


def test_changes_are_those_of_every_number():
    recorded = {"a": {"mufu": [1.0, 2.0], "spills": 0}, "b": {"registers": 50}}
    present = {"a": {"mufu": [0.5, 3.0], "spills": 0}, "c": {"registers": 50}}
    assert sorted(map(str, changes(recorded, present))) == [
        "WORSE a mufu[1]: 2.0 → 3.0 (+50.0%)",
        "WORSE b registers: 50 → nothing",
        "WORSE c registers: nothing → 50",
        "a mufu[0]: 1.0 → 0.5 (-50.0%)",
    ]
    assert not changes(recorded, recorded)


def test_the_file_is_as_the_command_writes_it():
    written = budgets.FILE.read_text()
    assert written == budgets.text(RECORD) + "\n"
    assert json.loads(written) == RECORD
    assert budgets.rounded({"a": [1 / 3, 123456]}) == {"a": [0.3333, 123456]}


def test_the_command_prints_the_difference_and_records_it(tmp_path, monkeypatch, capsys):
    file = tmp_path / "budgets.json"
    file.write_text('{"rules": {"kernel": {"float64": true}}, "triton": "3.0", "counts": {}}')
    present = {"loss": {"registers": 40}}
    monkeypatch.setattr(budgets, "FILE", file)
    monkeypatch.setattr(budgets, "count", lambda: present)

    def main(*options):
        monkeypatch.setattr("sys.argv", ["budgets.py", *options])
        return budgets.main()

    assert main() == 1
    assert "WORSE loss registers: nothing → 40\n1 counts differ" in capsys.readouterr().out
    assert budgets.read()["counts"] == {}
    assert main("--write") == main() == 0
    rules = {"kernel": {"float64": True}}
    assert budgets.read() == {"rules": rules, "triton": budgets.VERSION, "counts": present}


def test_the_counts_are_those_of_the_algorithm():
    """Two networks of 2 bytes; a gradient as large as the logits; nothing else that grows."""
    (case,) = (case for case in FUSED if case.name == "forward_kl")
    shape = (4096, 128256)
    run = compiled(case, shape, torch.bfloat16, "sm_90")
    assert (run.trained_bytes, run.element_bytes) == (2 * 4096 * 128256, 4)
    assert budgets.of_call(run) == {"launches": [1, 3], "extra_memory": [0.0001248, 1.0]}
    statistics, gradient, _ = budgets.of_kernels(run, "sm_90").values()
    assert (len(statistics["instructions"]), len(gradient["instructions"])) == (1, 1)
    assert 2 <= statistics["mufu"][0] <= 2.5
    assert 15 <= statistics["instructions"][0] <= 21  # two of them, so that e is 1 at the maximum
