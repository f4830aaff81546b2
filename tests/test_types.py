"""Types as a checker and an editor see them, and packages as they are installed."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CALLS = """
import torch
import fastkd

x = torch.randn(4, 10)
good = fastkd.forward_kl(x, x, temperature=3.0, reduction="sum")
fastkd.forward_kl(1, 2, tempreature=3)
fastkd.info_nce(x, x, negative_wieght=2.0)
fastkd.kd(x, x)
"""
# the types of torch take ten seconds to read, and the names of options need none of them
WITHOUT_TORCH = """
[mypy]
ignore_missing_imports = True
follow_imports = silent
[mypy-torch.*]
follow_imports = skip
"""


@pytest.fixture
def mypy(tmp_path):
    """Run mypy where kernels/ lies inside fastkd/, as in an installation."""
    pytest.importorskip("mypy", reason="needs the extra `dev`")
    package = tmp_path / "fastkd"
    package.mkdir()
    for path in (ROOT / "fastkd").iterdir():
        (package / path.name).symlink_to(path)
    if not (package / "kernels").exists():  # a checkout may have a link of its own
        (package / "kernels").symlink_to(ROOT / "kernels")

    def run(*arguments, config=ROOT / "pyproject.toml"):
        command = [sys.executable, "-m", "mypy", "--config-file", config, *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        return result.returncode, result.stdout + result.stderr

    return run


def test_a_misspelt_option_is_an_error(mypy, tmp_path):
    (tmp_path / "calls.py").write_text(CALLS)
    (tmp_path / "quick.ini").write_text(WITHOUT_TORCH)
    status, report = mypy("calls.py", config="quick.ini")
    errors = [line for line in report.splitlines() if ": error: " in line]
    assert status == 1 and len(errors) == 3, report
    assert 'calls.py:7: error: Unexpected keyword argument "tempreature"' in errors[0]
    assert 'calls.py:8: error: Unexpected keyword argument "negative_wieght"' in errors[1]
    assert "calls.py:9: error: Missing positional argument" in errors[2]


@pytest.mark.full
def test_the_library_and_its_kernels_are_typed(mypy):
    status, report = mypy("-p", "fastkd")
    assert status == 0, report
    n_files = sum(len([*folder.glob("*.py")]) for folder in folders().values())
    assert f"no issues found in {n_files} source files" in report


def folders():
    """Return package -> folder for the whole library, kernels/ under its installed name."""
    found = {}
    for name, top in (("fastkd", ROOT / "fastkd"), ("fastkd.kernels", ROOT / "kernels")):
        for init in top.rglob("__init__.py"):
            parts = init.parent.relative_to(top).parts
            if "kernels" not in parts:  # a checkout may have a link of that name
                found[".".join((name, *parts))] = init.parent
    return found


def test_every_package_is_installed():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(folders())


def test_no_package_with_the_name_kernels_is_installed():
    """Hugging Face has a package of that name, which ours would shadow."""
    owners = importlib.metadata.packages_distributions().get("kernels", [])
    assert "fastkd" not in owners


@pytest.mark.full
def test_a_wheel_holds_fastkd_and_nothing_beside_it(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="builds a wheel")
    source = tmp_path / "source"
    for name in ("fastkd", "kernels"):
        ignored = shutil.ignore_patterns("kernels", "__pycache__")  # a link within fastkd/
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", tmp_path, source], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"fastkd"}
    for package, folder in folders().items():
        for file in folder.glob("*.py"):
            assert f"{package.replace('.', '/')}/{file.name}" in names
    assert "fastkd/py.typed" in names
