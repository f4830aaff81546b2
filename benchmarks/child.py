"""Processes beside this one, which neither their crash nor their hanging can end."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIMED_OUT = 124
PATIENCE = 120.0  # seconds without a word from a worker, which is longer than any compilation
GRACE = 10.0  # seconds that a task may take beyond its deadline
_SIGNS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "device-side assert")


def run(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> int:
    """Return the exit status; what it printed is appended to the log, even if it was stopped."""
    with log.open("a") as file:
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
            _end(child)


def _end(child: subprocess.Popen) -> None:
    """Kill a process that is still there, with the processes that it has started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a kernel that hangs may hold it
            child.wait(10)


class Lost(Exception):
    """A worker died, hung or lost its GPU; `at` says what it was doing."""

    def __init__(self, at: str, why: str) -> None:
        super().__init__(why)
        self.at = at


class Late(Exception):
    """The time was up before a worker had done its task."""


class Worker:
    """A process that does tasks, one after the other; when it is lost the next has another one.

    It is the other end's `serve` that answers. Of what is on its way nothing is kept here, so that
    whoever asks decides what becomes of a task that was lost.
    """

    def __init__(self, command: Sequence[str], log: Path, patience: float = PATIENCE) -> None:
        self.command, self.log, self.patience = command, log, patience
        self.started = 0  # processes until now
        self._child: subprocess.Popen | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def ask(self, task: Mapping[str, Any], deadline: float) -> Any:
        """Return the answer to a task; raises Lost or Late."""
        child = self._child or self._start()
        assert child.stdin is not None
        at = ""
        try:
            child.stdin.write(json.dumps(task) + "\n")
            child.stdin.flush()
            while True:
                seconds = min(self.patience, deadline + GRACE - time.monotonic())
                line = self._lines.get(timeout=max(0.0, seconds))
                if line is None:
                    raise BrokenPipeError
                message = json.loads(line)
                if "at" in message:
                    at = message["at"]
                elif "lost" in message:
                    self.stop()
                    raise Lost(at, message["lost"])
                else:
                    return message["answer"]
        except queue.Empty:
            self.stop()
            if seconds < self.patience:
                raise Late from None
            raise Lost(at, f"hangs: no word in {self.patience:.0f} s") from None
        except BrokenPipeError:
            status = child.wait()
            self.stop()
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            raise Lost(at, f"its process died ({name})") from None

    def _start(self) -> subprocess.Popen:
        self.started += 1
        with self.log.open("a") as file:
            child = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,
            )
        self._child, self._lines = child, queue.Queue()

        def read(lines: queue.Queue[str | None]) -> None:
            assert child.stdout is not None
            for line in child.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, args=[self._lines], daemon=True).start()
        return child

    def stop(self) -> None:
        if self._child is not None:
            _end(self._child)
            self._child = None


def is_device_error(error: BaseException | None) -> bool:
    """Return whether a process must not use its GPU any more after this error or its cause.

    After an illegal access every later call fails, whatever it calls; a full memory is no harm.
    """
    while error is not None:
        text = str(error)
        if "out of memory" not in text and any(sign in text for sign in _SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


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
