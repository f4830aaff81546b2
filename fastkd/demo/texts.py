"""Paragraphs of the documentation of Python's standard library, real text on every machine.

A paragraph of a docstring belongs to the subject of its module, and the subjects are the classes.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

SUBJECTS = {
    "networks": "ftplib http imaplib ipaddress smtplib socket ssl urllib wsgiref",
    "concurrency": "asyncio concurrent multiprocessing subprocess threading",
    "mail": "email mailbox",
    "numbers": "decimal fractions math random statistics",
    "tests": "doctest pdb unittest",
    "introspection": "ast dis inspect typing",
    "files": "os pathlib shutil tarfile tempfile zipfile",
    "configuration": "argparse configparser logging optparse",
}
LENGTH, LEAST_WORDS, MOST_TOKENS = 32, 5, 2048
PADDING, UNKNOWN = 0, 1


class Texts(NamedTuple):
    """Paragraphs as tokens, and the numbers of their subjects."""

    tokens: Tensor  # [N, LENGTH], int64, PADDING behind the end
    mask: Tensor  # [N, LENGTH], bool: which are tokens
    subjects: Tensor  # [N]
    n_tokens: int  # how many different ones there are

    def take(self, rows: Tensor) -> Texts:
        """Return the paragraphs with these numbers."""
        return Texts(self.tokens[rows], self.mask[rows], self.subjects[rows], self.n_tokens)


def load(device: str) -> Texts:
    """Return all paragraphs of more than a few words, in a random but fixed order."""
    words, subjects = list[list[str]](), list[int]()
    seen = set[str]()
    for subject, modules in enumerate(SUBJECTS.values()):
        for paragraph in paragraphs(modules.split()):
            own = re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", paragraph.lower())
            if paragraph not in seen and sum(w.isalpha() for w in own) >= LEAST_WORDS:
                seen.add(paragraph)
                words.append(own[:LENGTH])
                subjects.append(subject)
    counts = Counter(word for own in words for word in own)
    known = sorted(counts, key=lambda word: (-counts[word], word))[: MOST_TOKENS - 2]
    number = {word: i for i, word in enumerate(known, UNKNOWN + 1)}
    tokens = torch.full((len(words), LENGTH), PADDING)
    for row, own in zip(tokens, words, strict=True):
        row[: len(own)] = torch.tensor([number.get(word, UNKNOWN) for word in own])
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    tokens = tokens[order].to(device)
    return Texts(
        tokens, tokens != PADDING, torch.tensor(subjects)[order].to(device), len(known) + 2
    )


def paragraphs(modules: list[str]) -> Iterator[str]:
    """Return the paragraphs of the docstrings of modules, and of all that is public in them."""
    for name in modules:
        module = importlib.import_module(name)
        parts = [module]
        for inner in pkgutil.iter_modules(getattr(module, "__path__", [])):
            if inner.name[0] != "_":
                with contextlib.suppress(ImportError):  # some are for another system
                    parts.append(importlib.import_module(f"{name}.{inner.name}"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # some members warn when looked at
            found = dict.fromkeys(x for part in parts for x in docstrings(part))
        for docstring in found:
            for paragraph in re.split(r"\n\s*\n", docstring):
                yield " ".join(paragraph.split())


def docstrings(owner: Any) -> Iterator[str]:
    """Return the docstring of a module or class, and those of its own public members."""
    yield inspect.getdoc(owner) or ""
    home = owner.__name__ if inspect.ismodule(owner) else owner.__module__
    for name, member in sorted(vars(owner).items()):
        is_own = getattr(member, "__module__", home) == home
        is_documented = callable(member) or isinstance(member, property)
        if name.startswith("_") or not is_own or not is_documented:
            continue
        if inspect.isclass(member) and member is not owner:
            yield from docstrings(member)
        else:
            yield inspect.getdoc(member) or ""
