"""Unpack the peers for a machine without network: python benchmarks/fetch_peers.py FOLDER

`python benchmarks/gpu_run.py --peers FOLDER` puts them on the path. Wheels of pure Python only:
what needs compiled code (quack: nvidia-cutlass-dsl) must be part of the machine's own Python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# the peers, and what of their needs an image with PyTorch and transformers lacks
PACKAGES = [
    "liger-kernel==0.8.5",
    *("trl==1.16.0", "datasets", "dill", "multiprocess"),
    *("flash-linear-attention==0.6.0", "fla-core==0.6.0", "einops"),
    "quack-kernels==0.6.5",
    "torchdistill==1.1.5",
    *("open_clip_torch==3.3.0", "lightly==1.6.0", "info-nce-pytorch==0.1.4"),
    *("pytorch-metric-learning==2.9.0", "tqdm"),
    "cut-cross-entropy==25.1.1",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("packages", nargs="*", default=PACKAGES)
    parser.add_argument("--python-version", default="3.12", help="of the machine without network")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    pure = ["--only-binary=:all:", "--platform=any", f"--python-version={options.python_version}"]
    for package in options.packages:
        with tempfile.TemporaryDirectory() as wheels:
            found = subprocess.run([*download, *pure, "--dest", wheels, package])
            for wheel in Path(wheels).glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(options.folder)
            print("not fetched:" if found.returncode else "unpacked:", package)


if __name__ == "__main__":
    main()
