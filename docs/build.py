"""Build the site: python docs/build.py [FOLDER]. A warning is an error, and no network is needed.

The tables of results.md are made from the records first, so that none of them is in git.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PAPER = r"\barXiv:(\d{4}\.\d{4,5})"  # as docstrings name papers
_LINK = r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>'


def main(folder: Path) -> None:
    """Write the tables, then the site into the folder."""
    report = [sys.executable, "benchmarks/report.py"]
    tables = subprocess.run(report, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build/measured.md").write_text(tables, encoding="utf-8")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--clean"]
    # Material announces its successor on every build: CONTRIBUTING.md says why it is used
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run([*build, "--site-dir", folder], cwd=ROOT, check=True, env=environment)
    for page in folder.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(re.sub(_PAPER, _LINK, text), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "site")
