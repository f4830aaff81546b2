"""Processes beside this one, which neither their crash nor their hanging can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIMED_OUT = 124


def run(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> int:
    """Return the exit status; what it printed is in the log, even if it was stopped."""
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
                os.killpg(child.pid, signal.SIGKILL)  # with the processes that it has started
                child.wait()


def interpreted(script: str, option: str, question: Any = None) -> Any:
    """Return the answer, as JSON, of a script whose kernels run in Triton's interpreter.

    It has a process of its own, because Triton decides at import whether to interpret.
    """
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", script, option],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        input=json.dumps(question).encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(answer.stdout)
