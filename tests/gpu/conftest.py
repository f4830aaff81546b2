"""Skip what only a GPU can show where there is none, but for what the interpreter can run."""

import sys
from pathlib import Path

import pytest
from cases import DEVICE, INTERPRETED

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import checkout  # noqa: F401

import fastkd


def pytest_runtest_setup(item):
    runs_anywhere = INTERPRETED and item.get_closest_marker("sanitize")
    if DEVICE.type != "cuda" and not runs_anywhere:
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def triton():
    with fastkd.backend("triton"):
        yield
