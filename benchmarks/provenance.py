"""Where a figure comes from: the device, the commit, and the code that it is a figure of.

The hash is that of the syntax tree, which is the same in every release of Python: a comment, a
docstring or another layout leaves a figure fresh, a changed constant makes it stale.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


@functools.cache
def hash_of_sources(family: str, engine: str) -> str:
    """Of the modules that compute a family: `engine` is "kernels" or "portable"."""
    files = modules(f"fastkd.{family}", f"fastkd.{engine}.{family}")
    code = "\n".join(structure(ast.parse(file.read_text())) for file in files)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def modules(*names: str) -> list[Path]:
    """The files of these modules of fastkd and of all that they import of fastkd."""
    found, waiting = set(), list(names)
    while waiting:
        file = _file(waiting.pop())
        # a release alone changes no figure
        if file.exists() and file.name != "_version.py" and file not in found:
            found.add(file)
            waiting += _imports(ast.parse(file.read_text()))
    return sorted(found)


def _file(module: str) -> Path:
    inside = module.split(".")[1:]
    folder = [] if inside[:1] == ["kernels"] else ["fastkd"]
    return ROOT.joinpath(*folder, *inside).with_suffix(".py")


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastkd":
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def structure(node: Any) -> str:
    """The code as text, without comments, docstrings and layout."""
    if isinstance(node, list):
        return f"[{','.join(structure(x) for x in node if not _is_docstring(x))}]"
    if isinstance(node, ast.AST):
        # a field without a value may be missing in another release of Python
        fields = ((name, x) for name, x in ast.iter_fields(node) if x is not None and x != [])
        return f"{type(node).__name__}({','.join(f'{name}={structure(x)}' for name, x in fields)})"
    return repr(node)


def _is_docstring(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def device() -> str:
    """The GPU, or the CPU where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """FASTKD_COMMIT names it where the files travel without their history."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if found:
            return found
    return os.environ.get("FASTKD_COMMIT", "unknown")
