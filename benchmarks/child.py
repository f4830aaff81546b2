"""Programs beside the run, which neither their crash nor their hanging can end."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMED_OUT = 124


def run(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> int:
    """Its exit status; what it printed is in the log, even if it was stopped."""
    with log.open("w") as file:
        child = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            return child.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # with its own children
                child.wait()
