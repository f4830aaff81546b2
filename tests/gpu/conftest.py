"""Skip what only a GPU can show where there is none, but for what the interpreter can run.

A test that loses the GPU ends its process, so that the others do not fail with it.
"""

import sys
from pathlib import Path

import pytest
from inputs import DEVICE, INTERPRETED

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import checkout  # noqa: F401
from lost_gpu import pytest_runtest_makereport, pytest_runtest_protocol  # noqa: F401

import fastkd


def pytest_runtest_setup(item):
    is_small = item.get_closest_marker("sanitize") or item.get_closest_marker("first_light")
    runs_anywhere = INTERPRETED and is_small
    if DEVICE.type != "cuda" and not runs_anywhere:
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def triton():
    with fastkd.backend("triton"):
        yield
