"""Do what a GPU run asks for, in a process that an error of the GPU may take with it.

Reads a task from each line of its input, and answers each with one line of JSON after some that say
what it is at. What libraries print goes to the log. child.Worker is the other end.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import devices
import peers
import runner
import sweep
import torch
from child import is_device_error
from workloads import BY_NAME

Say = Callable[[Mapping[str, Any]], None]


def ceilings(device: Any, say: Say) -> dict[str, float]:
    return devices.ceilings(device)


@functools.cache
def importable() -> tuple[dict[str, Any], dict[str, str]]:
    return peers.available()


def import_peers(device: Any, say: Say) -> dict[str, Any]:
    """Return the losses of each peer, and its version or what it lacks."""
    losses, versions = importable()
    return {"losses": {name: [*of_it] for name, of_it in losses.items()}, "versions": versions}


def row(
    device: Any, say: Say, loss: str, shape: list[int], dtype: str, direction: str, names: list[str]
) -> runner.Row:
    """Return the row of a problem, with the implementations of these names."""
    problem = runner.Problem(BY_NAME[loss], tuple(shape), getattr(torch, dtype), direction)
    of_peers = importable()[0] if peers.PEERS.keys() & {*names} else {}
    losses = runner.implementations(problem, device, of_peers)
    losses = {name: losses[name] for name in names if name in losses}
    return runner.measure(problem, losses, device, lambda name: say({"at": name}))


def trial(device: Any, say: Say, *values: Any, **named: Any) -> float:
    return sweep.measure(device, sweep.Trial(*values, **named))


TASKS = {"ceilings": ceilings, "peers": import_peers, "row": row, "trial": trial}


def serve(device: Any, say: Say) -> None:
    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer = TASKS[task.pop("task")](device, say, **task)
        except Exception as error:
            if is_device_error(error):  # every later call would fail too, whatever it calls
                say({"lost": runner.sentence(error)})
                return
            answer = {"note": runner.sentence(error)}
        device.forget()  # so that the memory is there for the tests beside this process
        say({"answer": answer})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--peers", type=Path)
    options = parser.parse_args()
    if options.peers:  # last: what is installed comes first
        sys.path.append(str(options.peers))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # because libraries print

    def say(message: Mapping[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    serve(devices.Interpreter() if options.dry else devices.Gpu(), say)


if __name__ == "__main__":
    main()
