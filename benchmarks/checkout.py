"""Put the tests' tools on the path, and fastkd where it is not installed: import this first."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
for folder in (str(ROOT / "tests"), str(ROOT / "benchmarks")):
    if folder not in sys.path:
        sys.path.insert(0, folder)
if importlib.util.find_spec("fastkd") is None:
    sys.path.append(str(ROOT))  # last, so that the folder kernels/ shadows no package of that name
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*filter(None, [os.getenv("PYTHONPATH")]), str(ROOT)]
    )
if importlib.util.find_spec("fastkd.kernels") is None:  # because only an installation maps it
    sys.modules["fastkd"].__path__.append(str(ROOT))
