"""The pages say what is true: they build without a warning, their code runs, their names exist."""

import ast
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastkd

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [name for name in fastkd.__all__ if name not in ("__version__", "backend")]
NO_LOSSES = {
    "EMATeacher", "LayerPairs", "align", "byte_offsets", "group_tensors", "head_options",
    "sinkhorn_center", "sum_by_group", "teacher_weights",
}  # fmt: skip
FUNCTIONS = [name for name in NAMES if name.islower() and name not in NO_LOSSES]
FRAMEWORKS = ("lightning", "transformers", "trl")  # in the extra `integrations` alone


def page_id(page):
    return str(page.relative_to(ROOT))


def code_of(page):
    """Return the Python code blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


# ------------------------------------------------------------------------------------------- code


def loop_of_the_reader():
    """Return the names that the pages take for granted: a batch, and networks for it."""
    torch.manual_seed(0)
    batch, width, n_classes, length = 8, 16, 10, 5

    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    def normalized(width):
        return F.normalize(torch.randn(batch, width)).requires_grad_()

    def convolutional(width):
        layers = dict(stem=torch.nn.Conv2d(3, width, 3), body=torch.nn.Conv2d(width, width, 3))
        return torch.nn.Sequential(OrderedDict(layers))

    def classifier():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, n_classes))

    inputs = torch.randint(n_classes, (2, length))
    return dict(
        torch=torch, F=F, fastkd=fastkd, T=2.0, alpha=0.3,
        student_logits=leaf(batch, n_classes), teacher_logits=torch.randn(batch, n_classes),
        labels=torch.randint(n_classes, (batch,)),
        student_features=leaf(batch, width), teacher_features=torch.randn(batch, width),
        hard_negatives=torch.randn(batch, 3, width),
        image=normalized(width), text=normalized(width),
        teacher_image=normalized(24).detach(), teacher_text=normalized(24).detach(),
        logit_scale=torch.tensor(10.0, requires_grad=True),
        student_lm=torch.nn.Embedding(n_classes, n_classes),
        teacher_lm=torch.nn.Embedding(n_classes, n_classes).requires_grad_(False),
        micro_batches=[(inputs, inputs), (inputs[:1], inputs[:1])],
        student_head=torch.nn.Linear(width, 64), crops=torch.randn(10 * batch, width),
        teacher_head=torch.nn.Linear(width, 64),
        images=torch.randn(batch, 3, 8, 8), student_net=convolutional(4),
        teacher_net=convolutional(6),
        student_maps=leaf(batch, 4, 6, 6), teacher_maps=torch.randn(batch, 6, 6, 6),
        wide_teacher_maps=torch.randn(batch, 8, 6, 6),
        other_teacher_logits=torch.randn(batch, n_classes),
        teacher_scores=torch.rand(batch, 6, 6),
        student_tokens=leaf(batch, length, width),
        teacher_tokens=torch.randn(batch, length, width),
        attention_mask=torch.arange(length) < torch.arange(batch)[:, None],
        wide_tokens=torch.randn(batch, length, 24),
        student_qkv=[leaf(batch, length, width) for _ in range(3)],
        teacher_qkv=[torch.randn(batch, length, 24) for _ in range(3)],
        student_classes=leaf(2, 5, 6, 6), teacher_classes=torch.randn(2, 5, 6, 6),
        student_edges=leaf(7, 4, 16), teacher_edges=torch.randn(7, 4, 16),
        teacher_edge_scores=torch.rand(7, 4),
        **{name: leaf(batch, length, 48) for name in "qkv"},
        **{f"{name}_t": torch.randn(batch, length, 96) for name in "qkv"},
        patches=leaf(batch, length, width), teacher_patches=torch.randn(batch, length, 24),
        earlier_patches=torch.randn(batch, length, width),
        first_net=classifier(), second_net=classifier(), third_net=classifier(),
        patch_mask=torch.arange(length) % 3 < torch.arange(batch)[:, None] % 3,
    )  # fmt: skip


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CONTRIBUTING.md"], ids=page_id)
def test_the_code_of_a_page_runs(page):
    names = loop_of_the_reader()
    for code in code_of(page):
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(code))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                         [alias.name for alias in node.names])
        }  # fmt: skip
        if all(importlib.util.find_spec(name) for name in imported):
            exec(compile(code, page_id(page), "exec"), names)


def test_the_code_before_and_after_in_the_readme_is_one_loss():
    before, after = code_of(ROOT / "README.md")[:2]
    results = []
    for code in (before, after):
        names = loop_of_the_reader()
        exec(code, names)
        results.append(
            [names["loss"], *torch.autograd.grad(names["loss"], names["student_logits"])]
        )
    torch.testing.assert_close(*results)


def test_the_code_for_frameworks_is_that_which_the_integration_tests_train():
    trained = "\n".join(
        file.read_text(encoding="utf-8") for file in (ROOT / "tests/integrations").glob("*.py")
    )
    for code in code_of(ROOT / "docs/frameworks.md"):
        if any(name in code for name in FRAMEWORKS):
            _, definitions = code.split("\n\n\n", 1)  # after the imports
            assert definitions.strip() in trained


# ----------------------------------------------------------------------------------------- recipe


def apply(change, root):
    """Apply a diff of a page, which has no line numbers, to a file below the root."""
    name, *lines = change.splitlines()
    file = root / name.removeprefix("--- ")
    before = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
    after = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"CONTRIBUTING.md quotes lines that {name} does not have once"
    file.write_text(text.replace(before, after), encoding="utf-8")


COPIED = "fastkd kernels tests docs README.md CONTRIBUTING.md pyproject.toml"


@pytest.fixture
def changed(tmp_path):
    """Return a copy of the repository in which the recipe of CONTRIBUTING.md was followed."""
    for name in COPIED.split():
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", *["kernels"] * (name == "fastkd"))
            shutil.copytree(source, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(source, tmp_path)
    (tmp_path / "fastkd/kernels").symlink_to("../kernels")
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for change in re.findall(r"^```diff\n(.*?)^```$", page, re.M | re.S):
        apply(change, tmp_path)
    return tmp_path


def test_the_recipe_quotes_the_code_as_it_is(changed):
    assert "squared_hellinger" in (changed / "kernels/rows/terms.py").read_text(encoding="utf-8")


@pytest.mark.full
@pytest.mark.parametrize("selected", [
    ["tests/test_contracts.py", "-k", "squared_hellinger"],
    ["tests/test_docs.py", "tests/test_doctor.py", "-k", "one_row or squared_hellinger or healthy"],
])  # fmt: skip
def test_the_recipe_adds_a_loss_that_keeps_all_contracts(changed, selected):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected],
        cwd=changed,
        env=os.environ | {"PYTHONPATH": str(changed), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


# ------------------------------------------------------------------------------------------ names


def test_the_readme_has_one_row_for_each_public_name():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*) \| (.*) \|$", text, re.M)
    assert sorted(name for row in rows for name in row[:2]) == sorted({*NAMES} - NO_LOSSES)
    assert all(f"`{name}`" in text for name in NO_LOSSES)
    for function, module, _, paper in rows:
        assert getattr(fastkd, module).function is getattr(fastkd, function)
        documented = getattr(fastkd, function).__doc__
        for number in re.findall(r"arxiv.org/abs/(\d+\.\d+)", paper):
            assert number in documented, f"{function}: the README names another paper"


def test_the_page_of_losses_tells_the_engines_of_each():
    text = (ROOT / "docs/losses.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (kernels|portable|formula) \| (.*) \| (.+) \|$", text, re.M)
    told = [(name, engine) for engine, names, _ in rows for name in re.findall(r"`(\w+)`", names)]

    def best_of(loss):
        return "kernels" if loss.has_kernels else "portable" if loss.has_engines else "formula"

    assert sorted(told) == [(name, best_of(getattr(fastkd, name))) for name in sorted(FUNCTIONS)]


def test_the_readme_tells_of_every_demo_and_method():
    from fastkd.__main__ import _DEMOS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in set(_DEMOS) - {"digits"}:
        assert f"`fastkd demo {name}`" in text
    for method in ("Vanilla", "Feature", "Relational", "Contrastive"):
        assert f"\n| **{method}**" in text


def test_the_numbers_of_the_readme_are_those_of_the_records():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (measured|counted) \| (.*?) \| (.*?) \| (.*?) \|$", text, re.M)
    results = ROOT / "benchmarks/results"
    measured = json.loads((results / "amd-epyc.json").read_text())["rows"]
    for (loss, shape), (_, what, ours, others) in zip(
        {"forward_kl": [2048, 32000], "rkd": [256, 512], "info_nce": [8192, 256]}.items(),
        rows,
        strict=False,
    ):
        assert f"`{loss}`" in what
        (found,) = (
            row["implementations"]
            for row in measured
            if (row["loss"], row["shape"], row["dtype"]) == (loss, shape, "float32")
            and (row["direction"], row["threads"]) == ("forward+backward", 1)
        )
        milliseconds = float(re.match(r"([\d.]+) ms", ours)[1])
        assert milliseconds == pytest.approx(found["fastkd"]["milliseconds"], rel=0.005)
        ratio = float(re.search(r"([\d.]+) × the time", others)[1])
        assert ratio == pytest.approx(found["eager"]["ratio"], rel=0.02)
        unit = 4 * math.prod(shape) if "tensors" in ours else 1e6
        for cell, name in ((ours, "fastkd"), (others, "eager")):
            memory = float(re.search(r"([\d.]+) (?:MB|tensors)", cell)[1])
            assert memory == pytest.approx(found[name]["peak_extra_bytes"] / unit, rel=0.02)
    counted = json.loads((results / "inductor.json").read_text())["losses"][0]
    assert counted["loss"] == "forward_kl"
    numbers = [int(n) for cell in rows[3][2:] for n in re.findall(r"\d+", cell)]
    assert numbers == [
        round(counted[name][of][1])
        for name in ("fastkd", "eager", "torch.compile")
        for of in ("bytes_per_entry", "launches")
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_tells_all_about_its_function(name):
    function = getattr(fastkd, name)
    text = inspect.getdoc(function)
    sections = dict(re.findall(r"^(Args|Returns|Raises):\n((?:    .*\n|\n)*)", text + "\n", re.M))
    assert set(sections) == {"Args", "Returns", "Raises"}
    entries = re.findall(r"^    (\w+(?:, \w+)*)(?: \(.*\))?:", sections["Args"], re.M)
    documented = [name for entry in entries for name in entry.split(", ")]
    assert documented == list(inspect.signature(function).parameters)


# --------------------------------------------------------------------------------------- glossary

# the glossary has another word for each of these
SYNONYMS = {
    "left out": "masked",
    "weighed": "weighted",
    "burn in": "specialise",
    "burnt in": "specialised",
    "what is computed in": "compute dtype",
}


@pytest.mark.parametrize("folder", ["fastkd", "kernels", "tests", "benchmarks", "docs"])
def test_words_are_those_of_the_glossary(folder):
    wrong = [
        f"{file.relative_to(ROOT)}: {words!r} is {better!r} here"
        for file in sorted((ROOT / folder).rglob("*.py"))
        if file != Path(__file__).resolve()
        for words, better in SYNONYMS.items()
        if re.search(rf"\b{words}\b", file.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


# ------------------------------------------------------------------------------------------ links


def slugs(page):
    """Return the anchors of the headings of a page, made as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", link), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if page.parent == ROOT / "docs":
            assert target.parent == ROOT / "docs", f"{link} is no page of the site"
        if anchor:
            assert anchor in slugs(target), link


# ------------------------------------------------------------------------------------------- site


class Loaded(HTMLParser):
    """The addresses from which a page loads something when it is opened."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("script", "img", "iframe", "source"):
            self.addresses.append(attributes.get("src") or "")
        if tag == "link" and attributes.get("rel") != "canonical":
            self.addresses.append(attributes.get("href") or "")


@pytest.mark.full
def test_the_site(tmp_path):
    """`make docs` needs no network, documents every name, and its pages load nothing from afar."""
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    nowhere = {"http_proxy": "http://0.0.0.0:9", "https_proxy": "http://0.0.0.0:9"}
    result = subprocess.run(
        [sys.executable, ROOT / "docs/build.py", tmp_path],
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr

    losses, modules, results, online = (
        (tmp_path / f"{name}.html").read_text(encoding="utf-8")
        for name in ("losses", "modules", "results", "online")
    )
    headings = re.findall(r'<h3 id="([\w.]+)" class="doc doc-heading">', losses + modules)
    assert sorted(heading.split(".")[-1] for heading in headings) == sorted([*NAMES, "backend"])
    for name in ("constant", "linear", "cosine", "warmup", "until"):
        assert f'id="fastkd.schedules.{name}"' in online
    assert "As in" not in losses  # what docstrings share is written out
    assert "Σ<sub>ij</sub>" in losses and ">arXiv:1503.02531</a>" in losses
    assert "forward_kl" in results

    for page in tmp_path.rglob("*.html"):
        parser = Loaded()
        parser.feed(page.read_text(encoding="utf-8"))
        assert not [address for address in parser.addresses if "//" in address], page.name
    for sheet in tmp_path.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?https?:|@import", sheet.read_text(encoding="utf-8"))
