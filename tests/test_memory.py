"""How much memory the losses take, and that nothing waits for a GPU."""

import pytest
import textbook
import torch
from losses import LOSSES, each_loss
from meter import PeakMemory
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd.portable import divergence as portable
from fastkd.portable import relational

CHUNK = portable._CHUNK_ELEMENTS["cpu"]
SCRATCH = 6 * 4 + 1  # bytes for each element of a chunk: six of float32, one of bool
FUSED = [case for case in LOSSES if case.loss is not fastkd.logit_mse]
each_fused_loss = pytest.mark.parametrize("case", FUSED, ids=str)


def peak_of(case, inputs):
    student = inputs[0].requires_grad_()
    with PeakMemory() as memory:
        case(*inputs, reduction="mean").backward()
    assert student.grad is not None
    return memory.peak_bytes


@each_fused_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_portable_keeps_the_gradient_and_one_chunk(case, dtype):
    """Exactly: the gradient, the scratch, and less than 64 numbers a row."""
    n_rows, n_cols = 256, 8000
    inputs = case.inputs((n_rows,), n_cols, dtype)
    gradient = n_rows * n_cols * dtype.itemsize
    scratch = SCRATCH * (CHUNK // n_cols) * n_cols
    with fastkd.backend("portable"):
        peak = peak_of(case, inputs)
    assert gradient < peak <= gradient + scratch + 256 * n_rows


@pytest.mark.parametrize("case", [LOSSES[0], LOSSES[2], LOSSES[-1]], ids=str)
def test_portable_at_the_size_of_a_language_model(case):
    """The scratch is 6 MiB, the gradient 250."""
    n_rows, n_cols = 2048, 32000
    inputs = [
        torch.empty(n_rows, n_cols, device="meta"),
        torch.empty(n_rows, n_cols, device="meta"),
        *(torch.zeros(n_rows, dtype=torch.int64, device="meta") for _ in case.inputs((1,), 3)[2:]),
    ]
    logits = 4 * n_rows * n_cols
    with pytest.MonkeyPatch.context() as patch, fastkd.backend("portable"):
        patch.setitem(portable._CHUNK_ELEMENTS, "meta", CHUNK)
        assert peak_of(case, inputs) <= 1.15 * logits


@each_fused_loss
def test_portable_never_copies_strided_logits(case):
    """Shifted logits, [B, S, V] without the last position, as every language model has them."""
    n_rows, n_cols = 128, 8000
    inputs = case.inputs((4, n_rows), n_cols, torch.float32)
    shifted = [inputs[0].detach()[:, :-1], inputs[1][:, :-1], *(x[:, :-1] for x in inputs[2:])]
    gradient = 4 * (n_rows - 1) * n_cols * 4
    with fastkd.backend("portable"):
        assert peak_of(case, shifted) <= 1.15 * gradient + SCRATCH * CHUNK


@each_loss
def test_the_formula_takes_more(case):
    """So that the numbers above mean something."""
    inputs = case.inputs((64,), 1000, torch.float32)
    with fastkd.backend("formula"):
        assert peak_of(case, inputs) >= 2 * 64 * 1000 * 4


@each_loss
@pytest.mark.parametrize("tensors", ["fake", "meta"])
def test_no_step_waits_for_a_gpu(case, tensors, engine):
    """Looking at a value that is not there raises. Fake ones run the ops, meta ones the engines."""
    if engine == "triton":
        pytest.skip("no kernel runs without values; tests/compiled launches the same code")
    n_labels = len(case.inputs((4,), 7)) - 2
    with FakeTensorMode() if tensors == "fake" else torch.device("meta"):
        student, teacher = torch.empty(4, 7).requires_grad_(), torch.empty(4, 7)
        labels = [torch.empty(4, dtype=torch.int64) for _ in range(n_labels)]
        for weights in (None, torch.empty(4), torch.empty(4, dtype=torch.bool)):
            for own in (dict(), dict(temperature=torch.empty(())), dict(reduction="sum")):
                options = dict(reduction="mean", weights=weights) | own
                loss = case(student, teacher, *labels, **options)
                (gradient,) = torch.autograd.grad(loss, student)
                assert gradient.shape == (4, 7)


def published_rkd(student, teacher):
    return 25 * textbook.RKD_DISTANCE[1](student, teacher) + 50 * textbook.RKD_ANGLE[1](
        student, teacher
    )


def peak_of_batch(loss, n, n_features, device="cpu"):
    student = torch.ones(n, n_features, device=device).requires_grad_()
    teacher = torch.ones(n, n_features, device=device)
    with PeakMemory() as memory:
        loss(student, teacher).backward()
    return memory.peak_bytes


def test_relations_take_a_hundredth_of_the_published_memory():
    with fastkd.backend("portable"):
        peak = peak_of_batch(fastkd.rkd, 256, 512)
    assert peak <= peak_of_batch(published_rkd, 256, 512) / 100


@pytest.mark.parametrize("n, n_features", [(256, 512), (512, 1024)])
def test_relations_take_memory_for_pairs_and_one_chunk(n, n_features):
    """Three buffers of a chunk; 21 numbers for each pair: at N = 2048 less than 400 MB."""
    chunk = relational._CHUNK_ELEMENTS["cpu"]
    with pytest.MonkeyPatch.context() as patch, fastkd.backend("portable"):
        patch.setitem(relational._CHUNK_ELEMENTS, "meta", chunk)
        peak = peak_of_batch(fastkd.rkd, n, n_features, "meta")
    assert peak <= 4 * (3 * chunk + 21 * n**2 + 3 * n * n_features)
