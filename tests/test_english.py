"""Docstrings are sentences, in the words of the glossary of CONTRIBUTING.md."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    file
    for folder in ("fastkd", "kernels", "tests", "benchmarks", "docs")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if file.parts[len(ROOT.parts) : len(ROOT.parts) + 2] != ("fastkd", "kernels")
]
# a docstring that opens with one of these is half a sentence, which ruff's D401 lets pass
REFUSED = "Of What Whose Those And In For As From By Without Also Or".split()
# the glossary has another word for each of these
SYNONYMS = {"left out": "masked", "weighed": "weighted", "burn in": "specialise", "burnt in": "-"}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_are_sentences(file):
    text = file.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        node: ast.get_docstring(node)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented)
    }
    for node, docstring in docstrings.items():
        if docstring:
            name = getattr(node, "name", "the module")
            assert re.match(r"\W*\w*", docstring)[0] not in REFUSED, f"{name}: {docstring}"
    comments = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT]  # fmt: skip
    if file != Path(__file__).resolve():
        for words, better in SYNONYMS.items():
            for sentence in (*filter(None, docstrings.values()), *comments):
                assert words not in sentence, f"{words!r} is {better!r} in: {sentence}"
