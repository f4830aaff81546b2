"""Docstrings say what comes back: they open with no word that makes them fragments."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REFUSED = "Of What Whose Those And In For As From By Without".split()
FOLDERS = ("fastkd", "kernels", "tests", "benchmarks")


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_open_with_a_verb_or_a_name(folder):
    found = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            words = (ast.get_docstring(node) or "-").split()
            if words[0].strip(",:") in REFUSED:
                name = getattr(node, "name", "the module")
                found.append(f"{file.relative_to(ROOT)}: {name}: {' '.join(words[:8])}")
    assert not found, "\n".join(["open these with what is returned or done:", *found])
