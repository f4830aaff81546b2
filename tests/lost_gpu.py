"""Leave pytest after a test that lost the GPU, because in that process every later one would fail.

A plugin, whose hooks tests/gpu/conftest.py imports.
"""

from __future__ import annotations

import os

import pytest
from child import is_device_error

_LOST = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    if call.excinfo and is_device_error(call.excinfo.value):
        item.stash[_LOST] = True
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    result = yield  # with which the test's report has been sent
    if item.stash.get(_LOST, False):
        if hasattr(item.config, "workerinput"):  # xdist starts another worker with the rest
            os._exit(1)
        item.session.shouldstop = f"the GPU is lost to this process after {item.nodeid}"
    return result
