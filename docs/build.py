"""Build the site: python docs/build.py [FOLDER]. A warning is an error, and no network is needed.

The tables of results.md are made from the records first, so that none of them is in git.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_CLEARLY = 0.97  # of fastkd's time: closer ones differ from run to run
_FORMULA = r'<div class="highlight"><pre><span></span><code>(.*?)</code></pre></div>'
_SCRIPT = (
    r"(?P<kept><(?P<tag>code|script|style|title)\b.*?</(?P=tag)>|<[^>]*>)"
    r"|(?P<sign>[_^])(?:\{(?P<group>[^{}]*)\}|(?P<index>[ijkpstv·]+(?:\+1)?|(?<=\^)\([^()]*\))(?!\w))"
)
_PAPER = r"\barXiv:(\d{4}\.\d{4,5})"  # as docstrings name papers
_LINK = r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>'


def main(folder: Path) -> None:
    """Write the tables, then the site into the folder."""
    report = [sys.executable, "benchmarks/report.py"]
    tables = subprocess.run(report, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build/records.md").write_text(tables, encoding="utf-8")
    (ROOT / "build/slower.md").write_text(slower(), encoding="utf-8")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--clean"]
    # Material announces its successor on every build: CONTRIBUTING.md says why it is used
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run([*build, "--site-dir", folder], cwd=ROOT, check=True, env=environment)
    for name in ("losses.html", "modules.html", "layers.html"):
        page = folder / name
        page.write_text(typeset(page.read_text(encoding="utf-8")), encoding="utf-8")


def slower() -> str:
    """Return a table of all that was measured to be faster than fastkd."""
    lines = [
        "| device | loss | shape | direction | threads | faster | its time / fastkd's |",
        "|---|---|---:|---|---:|---|---:|",
    ]
    for file in sorted((ROOT / "benchmarks/results").rglob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        for row in record["rows"] if record.get("label") == "measured" else ():
            shape = "×".join(map(str, row["shape"]))
            loss = f"`{row['loss']}`"
            loss += f" {row['options']}, {row['dtype']}" if "options" in row else ""
            what = [record["device"], loss, shape, row["direction"]]
            for name, found in row["implementations"].items():
                if found.get("ratio", 1) < _CLEARLY:
                    cells = [*what, row.get("threads") or "–", name, f"{found['ratio']:.2f}"]
                    lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def typeset(html: str) -> str:
    """Return a page with links to papers, and with formulas that have subscripts and exponents."""

    def text_of(match: re.Match[str]) -> str:
        if match["kept"]:
            return match["kept"]
        tag = "sup" if match["sign"] == "^" else "sub"
        # an exponent may have an index itself
        inside = re.sub(_SCRIPT, text_of, match["group"] or match["index"])
        return f"<{tag}>{inside}</{tag}>"

    html = re.sub(_FORMULA, r'<pre class="formula">\1</pre>', html, flags=re.S)
    html = re.sub(_PAPER, _LINK, html)
    return re.sub(_SCRIPT, text_of, html, flags=re.S)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "site")
