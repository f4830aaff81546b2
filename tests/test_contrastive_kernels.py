"""The kernels of contrasts in Triton's interpreter: any division of the work, TF32, float16."""

import os

import contrasts
import pytest
import torch
from contrasts import each_case, each_loss, smoke
from exactness import assert_same, exact, results
from losses import DEVICE, normal

import fastkd
from fastkd.portable import _similarities as portable
from fastkd.portable import contrastive as by_chunks
from fastkd.portable import similarity

engine = contrasts.engine


@pytest.fixture
def kernels():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("in Triton's interpreter: TRITON_INTERPRET=1")
    with fastkd.backend("triton"):
        yield pytest.importorskip("fastkd.kernels._similarities")


@pytest.fixture(params=["tiles", "chunks"])
def way(request, kernels, monkeypatch):
    if request.param == "chunks":
        through_chunks(monkeypatch, columns=128)
    return request.param


def through_chunks(monkeypatch, columns=16):
    """What goes through cuBLAS on a GPU: several chunks, several programs for a row."""
    sweeps = pytest.importorskip("fastkd.kernels._chunks")
    families = [pytest.importorskip(f"fastkd.kernels.{x}") for x in ("contrastive", "similarity")]
    for family in families:
        monkeypatch.setattr(family, "tiling", lambda *arguments: None)
    for module in (sweeps, families[1]):
        monkeypatch.setattr(module, "COLUMNS", columns)
    monkeypatch.setattr(sweeps, "_TILE", (8, 16))
    monkeypatch.setitem(portable._CHUNK_ELEMENTS, "cpu", 20 * columns)


@smoke
@each_case
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_chunks(case, multiprocessors, kernels, monkeypatch):
    through_chunks(monkeypatch)
    device = kernels.Device(multiprocessors, False)
    sweeps = pytest.importorskip("fastkd.kernels._chunks")
    monkeypatch.setattr(sweeps, "device_of", lambda tensor: device)
    inputs = case.inputs((19,), 5)
    assert_same(results(case, inputs), results(case.eager, inputs), 1e-13)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_chunks_of_half_precision(case, dtype, kernels, monkeypatch):
    """The loss as exact as the formula, gradients to one more rounding, as tiles have them."""
    through_chunks(monkeypatch)
    contrasts.multiply_halves(monkeypatch)
    inputs = case.inputs((19,), 5, dtype)
    truth = results(case.eager, exact(inputs))
    with fastkd.backend("formula"):
        yardstick = results(case, inputs)
    found = results(case, inputs)
    assert (found[0] - truth[0]).abs() <= max(
        2 * (yardstick[0] - truth[0]).abs(), 2 * torch.finfo(torch.float32).eps * truth[0].abs()
    )
    for x, y in zip(found[1:], truth[1:], strict=True):
        assert (x.double() - y).abs().max() <= torch.finfo(dtype).eps * y.abs().max()


@smoke
@each_case
@pytest.mark.parametrize("multiprocessors", [1, 3, 1000])
def test_however_programs_share_the_work(case, multiprocessors, kernels, monkeypatch):
    """Few have several tiles of rows and add to their own sums, many share the columns of one."""
    family = pytest.importorskip("fastkd.kernels.contrastive")
    device = kernels.Device(multiprocessors, False)
    for module in (kernels, family):
        monkeypatch.setattr(module, "device_of", lambda tensor: device)
    inputs = case.inputs((150,), 5)
    assert_same(results(case, inputs), results(case.eager, inputs), 1e-13)


@smoke
@pytest.mark.parametrize("first", [0, 37, 130])
@pytest.mark.parametrize(
    "form, columns, two_views",
    [
        ("linear", False, False),
        ("classes", False, False),
        ("softplus", True, False),
        ("softplus", False, True),
        ("pairs", False, False),
    ],
)
def test_queries_of_one_rank(form, columns, two_views, first, way):
    """Whose own keys are somewhere among those of all ranks."""
    family = pytest.importorskip("fastkd.kernels.contrastive")
    query, key, bank = normal(70, 5), normal(200, 5, seed=1), normal(9, 5, seed=2)
    scale, anchors = torch.tensor(3.0, dtype=query.dtype, device=DEVICE), normal(70, seed=3)
    weights, of_keys = anchors.square(), (None, None)
    if columns:
        of_keys = normal(200, seed=4), normal(200, seed=5).square()
    of_classes = None, None
    if form == "classes":
        form, bank, numbers = "linear", None, torch.arange(200, device=DEVICE) % 7
        of_classes = numbers.to(query.dtype), normal(7, seed=6).square()[numbers]
    options = form, first, two_views, True, "", "query key scale anchors", ""
    arguments = query, key, scale, anchors, weights, bank, *of_keys, *of_classes, *options
    for x, y in zip(family.forward(*arguments), by_chunks.forward(*arguments), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-14)


@smoke
@pytest.mark.parametrize("first", [0, 37, 130])
def test_similarities_of_one_rank(first, way):
    family = pytest.importorskip("fastkd.kernels.similarity")
    networks = [
        x
        for width, seed in ((5, 0), (7, 2))
        for x in (
            normal(70, width, seed=seed),
            normal(200, width, seed=seed + 1),
            torch.tensor(3.0, dtype=torch.float64, device=DEVICE),
        )
    ]
    arguments = *networks, first, "", "", "query key scale"
    for x, y in zip(family.forward(*arguments), similarity.forward(*arguments), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-14)


@each_case
def test_float32_where_it_may_be_rounded(case, kernels, monkeypatch):
    inputs = case.inputs((67,), 33, torch.float32)
    truth = results(case.eager, exact(inputs))
    by_chunks = results(case, inputs)
    monkeypatch.setattr(kernels, "_may_be_rounded", lambda nvidia: True)
    found = results(case, inputs)
    for x, y in zip(found, truth, strict=True):  # of a TF32 number 11 digits are kept
        assert (x.double() - y).abs().max() <= 2**-7 * y.abs().max()
    # and by the kernels it was
    assert any(not torch.equal(x, y) for x, y in zip(found, by_chunks, strict=True))


def test_float16_keeps_what_is_small(kernels):
    """Slopes of 1e-9 in each pair."""
    family = pytest.importorskip("fastkd.kernels.contrastive")
    query, key = normal(5, 32).half().double(), normal(2000, 32, seed=1).half().double()
    numbers = [torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (1.0, [20.0], [0.2])]
    scale, anchors, weights = numbers[0], numbers[1].repeat(5), numbers[2].repeat(5)

    def gradients(engine, dtype):
        tensors = [x.to(dtype) for x in (query, key, scale, anchors, weights)]
        options = "pairs", -1, False, True, "float16", "query key", ""
        found = engine.forward(*tensors, *[None] * 5, *options)[1].double()
        return found.split([query.numel(), key.numel()])

    for x, y in zip(
        gradients(family, torch.float32), gradients(by_chunks, torch.float64), strict=True
    ):
        assert (x - y).norm() <= 3e-3 * y.norm()


def test_who_allows_the_rounding(kernels, monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        for precision, may in (("highest", False), ("high", True), ("medium", True)):
            torch.set_float32_matmul_precision(precision)
            assert kernels._may_be_rounded(True) == may == matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
