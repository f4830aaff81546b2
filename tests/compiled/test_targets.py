"""Every loss compiles in every pair of dtypes for every target, and its kernels fit there."""

import pytest
import targets
import torch
from choice import quick_if
from targets import CALLS, Outcome, compile_call

DOUBLE, SINGLE, HALF = torch.float64, torch.float32, torch.bfloat16
# a type that a kernel forgets shows on any target, and what does not fit on the small ones
QUICK = {
    ("total_variation", DOUBLE, SINGLE),
    ("jensen_shannon", DOUBLE, DOUBLE), ("kd", DOUBLE, HALF), ("hint", DOUBLE, SINGLE),
    ("rkd_distance", DOUBLE, DOUBLE), ("attention_transfer", HALF, DOUBLE),
    ("similarity_kl", DOUBLE, HALF), ("info_nce", SINGLE, SINGLE),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=str)
@quick_if(lambda call: call.target == "sm_120" and (call.loss.name, *call.dtypes) in QUICK)
def test_every_pair_of_dtypes_compiles(call):
    compile_call(call)


def test_a_sweep_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    """The record has what passed, but not what failed, nor a line that was cut off."""
    file, compiled = tmp_path / "record", []

    def outcome_of(call):
        compiled.append(call)
        is_last = call.dtypes[0] == DOUBLE
        return Outcome(str(call), {call.loss.name: ("kernel", 0)}, "too large" * is_last, 0.5)

    def main(*options):
        compiled.clear()
        command = ["sm_90", "--loss", "hint", "forward_kl", "--record", str(file), *options]
        monkeypatch.setattr("sys.argv", ["targets.py", *command])
        return targets.main(), len(compiled), capsys.readouterr().out

    monkeypatch.setattr(targets, "outcome_of", outcome_of)
    status, n_compiled, output = main("--dtypes", "equal")
    assert (status, n_compiled) == (1, 8) and output.count("too large") == 2
    assert output.split("\n")[-2].split() == "sm_90 2 4 8 2 0 2 4".split()
    assert main("--dtypes", "equal")[:2] == (1, 2)  # what failed is tried again
    file.write_text(file.read_text()[:-9])
    assert main("--dtypes", "equal")[1] == 3
    assert main("--dtypes", "mixed")[1] == 24
    file.write_text("Triton 3.0.0\n" + file.read_text().partition("\n")[2])
    assert main()[1] == 32


@pytest.mark.parametrize("kernel, spills, status", [("a", 0, 0), ("a", 1, 1), ("b", 2, 0)])
def test_only_allowed_spills_pass(kernel, spills, status, monkeypatch):
    monkeypatch.setattr("sys.argv", ["targets.py", "sm_90", "--loss", "hint", "--dtypes", "equal"])
    monkeypatch.setattr(targets, "ALLOWED", {"b": 2})
    monkeypatch.setattr(
        targets, "outcome_of", lambda call: Outcome(str(call), {"hash": (kernel, spills)}, "", 0.0)
    )
    assert targets.main() == status
