"""Docstrings are sentences, in the words of the glossary of CONTRIBUTING.md."""

import ast
import functools
import io
import re
import tokenize
from itertools import chain
from pathlib import Path

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
SYNONYMS = {
    "left out": "masked",
    "weighed": "weighted",
    "weighs": "weights",
    "burn in": "specialise",
    "burnt in": "specialised",
    "what is computed in": "compute dtype",
}


@functools.cache
def sentences(file):
    """Return (where, sentence) of the docstrings and of the comments of a file."""
    text = file.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    docstrings = [(getattr(x, "name", "module"), ast.get_docstring(x) or "") for x in nodes]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [(f"line {x.start[0]}", x.string) for x in tokens if x.type == tokenize.COMMENT]
    return docstrings, comments


def test_docstrings_are_sentences():
    wrong = [
        f"{file.relative_to(ROOT)}, {where}: {docstring.splitlines()[0]}"
        for file in SOURCES
        for where, docstring in sentences(file)[0]
        if re.match(r"\W*\w*", docstring)[0] in REFUSED
    ]
    assert not wrong, "start these with a verb:\n" + "\n".join(wrong)


def test_words_are_those_of_the_glossary():
    wrong = [
        f"{file.relative_to(ROOT)}, {where}: {words!r} is {better!r} here"
        for file in SOURCES
        if file != Path(__file__).resolve()
        for where, sentence in chain(*sentences(file))
        for words, better in SYNONYMS.items()
        if re.search(rf"\b{words}\b", sentence)
    ]
    assert not wrong, "\n".join(wrong)
