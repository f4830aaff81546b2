"""Losses and gradients beside the code of the libraries that are installed here."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
# of which there is a row for each of their losses that is one of ours
LIBRARIES = ["torch", "torchdistill", "mmrazor", "nvidia-modelopt", "textbrewer", "lightly", "trl"]


def test_losses_agree_with_those_of_libraries():
    """A process of its own imports the packages, which it leaves without most of their modules."""
    command = [sys.executable, "-W", "ignore", "benchmarks/report.py", "exactness"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    _, libraries = printed.split("**Beside the code of libraries")
    lines = [line for line in libraries.splitlines() if line.startswith("| ")][2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert {*LIBRARIES} <= {row[1] for row in rows}
    for name, library, _, loss, gradient, because in rows:
        # an epsilon of the library is named where it shows, and only there
        worst = max(0.0 if x == "–" else float(x) for x in (loss, gradient))
        low, high = (1e-9, 1e-6) if because else (0, 1e-12)
        assert low <= worst <= high, (name, library)
