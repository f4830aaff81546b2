"""The table of losses from hidden states and heads is a figure of the same loss everywhere."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import head_losses  # noqa: E402
import head_rows  # noqa: E402
import heads  # noqa: E402
import peers  # noqa: E402
import records  # noqa: E402
import report  # noqa: E402

SHAPE = 24, 60, 8
CASES = [
    head_losses.Loss("forward_kl"),
    head_losses.Loss("reverse_kl", temperature=2.0),
    head_losses.Loss("jensen_shannon", 0.3, 2.0),
    head_losses.Loss("forward_kl", 1.0),
]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return what measures tiny rows and returns them as the record has them, by their names."""
    for module in (heads, head_rows):
        monkeypatch.setattr(module, "SMALL", SHAPE)

    def call(*options):
        command = ["heads", f"--out={tmp_path}", "--dtypes=float32", "--only=fastkd,eager"]
        monkeypatch.setattr(sys, "argv", [*command, *options])
        assert heads.main() == 0
        (record,) = records.read(tmp_path)
        return {(row["options"], row["direction"]): row for row in record["rows"]}

    return call


def test_a_library_that_cannot_be_imported_leaves_nothing_in_place_of_another(monkeypatch):
    def alone(*names):
        raise ModuleNotFoundError(names[0])

    monkeypatch.setattr(peers, "alone", alone)
    with pytest.raises(ModuleNotFoundError):
        head_losses.trl()
    for name in ("transformers", "transformers.utils"):
        assert name not in sys.modules or importlib.util.find_spec(name)


@pytest.mark.parametrize("loss", CASES, ids=str)
@pytest.mark.parametrize("name", head_losses.CONTENDERS)
def test_what_is_compared_is_the_same_loss(name, loss):
    """Compare a library where it is installed."""
    contenders, _ = head_losses.available()
    if name not in contenders or head_losses.lacks(name, loss) or "compiled" in name:
        pytest.skip("missing, without this loss, or compiled for seconds")
    row = heads.Row(loss, SHAPE)
    x = heads.batch_of(row)
    found, exact = (
        heads.results_of(contender, row, x) for contender in (contenders[name], head_losses.eager)
    )
    for of_found, of_exact in zip(found.values(), exact.values(), strict=True):
        assert heads.error_of(of_found, of_exact.double()) < 1e-5


def test_a_run_writes_times_memory_and_products(run, capsys):
    found = run("--sizes=16x60x8", "--rows=JSD", "--parts=memory,time", "--rounds=2")[
        "JSD", "forward+backward"
    ]["implementations"]
    logits = 2 * 16 * 60 * 8
    for name in ("fastkd", "eager"):
        entry = found[name]
        assert (entry["products"], entry["flops"], entry["calls"]) == (4, 4 * logits, 2)
        assert entry["milliseconds"] > 0 <= entry["peak_extra_bytes"]
        assert entry["peak_allocated_bytes"] > 4 * (16 * 8 + 60 * 8)  # both gradients
    assert found["fastkd"]["ratio"] == 1
    page = capsys.readouterr().out
    assert "| JSD  |" in page and "def jensen_shannon" in page


def test_a_run_goes_on_from_its_record(run, tmp_path, monkeypatch):
    options = "--rows=forward KL,JSD of a padded teacher", "--sizes=24x60x8", "--parts=errors"
    first = run(*options)
    measured = []
    monkeypatch.setattr(heads, "measure_errors", lambda row, *others: measured.append(row))
    assert run(*options) == first and not measured
    (file,) = tmp_path.glob("*.json")
    file.write_text(file.read_text().replace(first["forward KL", "errors"]["sources"], "0" * 16))
    found = run(*options)  # of other code fastkd's figures are gone, and eager's have stayed
    assert len(measured) == 2
    entries, before = (x["forward KL", "errors"]["implementations"] for x in (found, first))
    assert entries == {"fastkd": {}, "eager": before["eager"]}


def test_errors_are_those_of_the_result_and_a_padded_vocabulary_is_said(run):
    found = run("--sizes=24x60x8", "--parts=errors")
    for row in found.values():
        entries = row["implementations"]
        for name, error in entries["fastkd"]["errors"].items():
            assert 0 <= error < 1e-5, (row["options"], name)
    padded = found["JSD of a padded teacher", "errors"]["implementations"]
    assert padded["fastkd"]["result"].endswith("hidden finite, head finite")
    assert padded["eager"]["result"].startswith("loss nan")
    assert padded["eager"]["errors"]["hidden"] == "NaN"
    assert report.is_stale(row) is False


def test_products_are_counted_where_an_op_hides_them():
    a, b = torch.ones(3, 4), torch.ones(4, 5)

    @torch.library.custom_op("fastkd_tests::hidden", mutates_args=())
    def hidden(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.addmm(torch.zeros(3, 5), a, b) + torch.bmm(a[None], b[None])[0]

    with heads.profiler() as profile:
        hidden(a, b)
        torch.addmm(torch.zeros(5), a, b, out=torch.empty(3, 5))
    assert heads.products(profile) == (3, 3 * 2 * 3 * 4 * 5)
    with heads.profiler() as profile:
        x = torch.ones(1000)
        del x
        torch.ones(500)
    assert 4000 <= heads.allocated(profile) < 4100


def test_what_a_peer_lacks_is_said(run, monkeypatch):
    def fails():
        raise ImportError("no wheel\nmore")

    monkeypatch.setitem(head_losses.CONTENDERS, "trl", fails)
    options = "--sizes=16x60x8", "--rows=CE", "--parts=time", "--rounds=1"
    row = run(*options, "--only=fastkd,trl,liger-kernel")["CE", "forward+backward"]
    found = row["implementations"]
    assert found["trl"]["note"] == f"{peers.MISSING}: ImportError: no wheel"
    assert "note" in found["liger-kernel"]
    assert json.dumps(row)
