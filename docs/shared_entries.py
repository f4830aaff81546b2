"""Write out what docstrings share: "temperature, weights: As in `forward_kl`." on the site.

The docstrings say it once for all functions, but a reader of the site wants every argument with its
type, its default and its description.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ENTRY = r"^ {4}%s:((?:.*\n)(?: {8}.*\n)*)"  # a name and its description, in a dedented docstring
_SHARED = re.compile(r"^ {4}(\w+(?:, \w+)*): As in\s+`(\w+)`\.\n", re.M)


class SharedEntries(griffe.Extension):
    """Replace each shared entry by the entries of the function that it refers to."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the docstrings of all functions of the package, which is loaded by now."""
        functions = [*_functions(pkg)]
        texts = {function.path: f"{function.docstring.value}\n" for function in functions}

        def entries(match: re.Match[str]) -> str:
            names, source = match.groups()
            text = texts[pkg.members[source].canonical_path]  # of a public function
            return "".join(f"    {x}:{_description(text, x)}" for x in names.split(", "))

        for function in functions:
            function.docstring.value = _SHARED.sub(entries, texts[function.path]).rstrip()


def _functions(module: griffe.Module) -> Iterator[griffe.Function]:
    for member in module.members.values():
        if member.is_alias:
            continue
        if member.is_module:
            yield from _functions(member)
        elif member.is_function and member.docstring:
            yield member


def _description(text: str, name: str) -> str:
    found = re.search(_ENTRY % name, text, re.M)
    if not found:
        raise ValueError(f"a docstring refers to an entry {name!r} that does not exist")
    return found[1]
