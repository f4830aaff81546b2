"""Products of float32 matrices by oneDNN: their values, their layouts, and where they are used."""

import pytest
import torch

from fastkd import _onednn
from fastkd._products import multiply

HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="PyTorch without oneDNN or without MKL")


@pytest.fixture(autouse=True)
def quicker(monkeypatch):
    monkeypatch.setattr(_onednn, "_is_quicker", lambda: True)
    monkeypatch.setattr(_onednn, "_LARGE", 0)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def factors(name):
    """Return the factors that make logits, and gradients of hidden states and of a head."""
    hidden, head, dz = random(130, 267), random(5003, 267), random(130, 5003)
    return {
        "logits": (hidden, head.t()),
        "strided hidden": (random(130, 270)[:, :267], head.t()),
        "of hidden": (dz, head),
        "of head": (dz.t(), hidden),
        "transposed head": (random(5003, 300), random(300, 130)),
        "with holes": (random(130, 600)[:, ::2], random(300, 1000)[:, ::2]),
    }[name]


NAMES = ("logits", "strided hidden", "of hidden", "of head", "transposed head", "with holes")


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("block", [1 << 19, 1 << 14])
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_pytorch(name, block, adds, monkeypatch):
    monkeypatch.setattr(_onednn, "_BLOCK", block)
    monkeypatch.setattr(_onednn, "_FEWEST_ROWS", 1)
    a, b = factors(name)
    out = random(len(a), b.shape[1])
    exact = a.double() @ b.double() + adds * out.double()
    assert _onednn.pays(a, b, out)
    calls = []
    product = _onednn._product
    monkeypatch.setattr(_onednn, "_product", lambda *x: calls.append(x) or product(*x))
    multiply(a, b, out, adds=adds)
    assert (out - exact).norm() <= 5e-7 * exact.norm()
    assert all(block >= x.shape[0] * y.shape[0] for x, y in calls)
    work = sum(x.numel() * len(y) for x, y in calls)
    assert work == a.numel() * b.shape[1]  # nothing twice
    assert all(y.is_contiguous() or y.t().is_contiguous() for _, y in calls)


@pytest.mark.parametrize("n_inner", [500, 4096])
def test_long_sums_keep_their_digits(n_inner):
    """One chain of additions has an error of 4e-7 and more."""
    a, b = random(300, n_inner), random(n_inner, 400)
    out = torch.empty(300, 400)
    multiply(a, b, out)
    exact = a.double() @ b.double()
    assert (out - exact).norm() <= 3e-7 * exact.norm()


def test_what_is_made_stays_small():
    a, b = random(1024, 512), random(8192, 512)
    out = torch.empty(1024, 8192)
    with torch.profiler.profile(profile_memory=True) as profile:
        multiply(a, b.t(), out)
    made = [x.cpu_memory_usage for x in profile.events() if x.name == "[memory]"]
    assert made and max(made) <= 4 * _onednn._BLOCK < out.nbytes / 3


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (random(300, 300).double(), random(300, 300).double()),
        (random(300, 300).bfloat16(), random(300, 300).bfloat16()),
        (random(300, 64), random(64, 9000)),  # of which 256 rows are a large block
        (random(8, 8), random(8, 8)),
        (torch.ones(300, 300, device="meta"), torch.ones(300, 300, device="meta")),
    ],
)
def test_other_products_stay_with_pytorch(a, b):
    assert not _onednn.pays(a, b, a.new_empty(len(a), b.shape[1]))


def test_small_matrices_stay_with_pytorch(monkeypatch):
    """Blocks would be more memory than the matrices themselves."""
    monkeypatch.undo()
    monkeypatch.setattr(_onednn, "_is_quicker", lambda: True)
    hidden, head = random(256, 300), random(9000, 300)
    assert not _onednn.pays(hidden, head.t(), torch.empty(256, 9000))
    assert _onednn.pays(hidden, random(17000, 300).t(), torch.empty(256, 17000))


def test_parameters_are_matrices_like_others():
    a = torch.nn.Parameter(random(300, 300), requires_grad=False)
    assert _onednn.pays(a, a, a)


def test_a_disabled_onednn_is_not_used():
    a = random(300, 300)
    assert _onednn.pays(a, a, a)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not _onednn.pays(a, a, a)


@pytest.mark.parametrize("made_by_intel", [False, True])
def test_intel_processors_keep_mkl(made_by_intel, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(_onednn, "_is_made_by_intel", lambda: made_by_intel)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert _onednn._is_quicker.__wrapped__() is not made_by_intel


def test_an_operator_of_another_shape_is_not_used(monkeypatch):
    monkeypatch.undo()

    def product(a, transposed):
        raise RuntimeError("expected another schema")

    monkeypatch.setattr(_onednn, "_is_made_by_intel", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(_onednn, "_product", product)
    assert not _onednn._is_quicker.__wrapped__()
