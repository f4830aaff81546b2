"""How much memory the portable engines take, counted on any machine."""

import pytest
import torch
from cases import LOSSES, of
from choice import full
from force import in_chunks_of
from meter import PeakMemory

import fastkd

CHUNK = 1 << 14  # numbers
SCRATCH = 6 * 4 + 1  # bytes for each number of a chunk: six of float32, one of bool
OTHERS = ("logit_mse", "ibot")
ROWS = [x for x in LOSSES if x.per_example and x.problem == "rows" and x.name not in OTHERS]
LABELLED = next(x for x in ROWS if x.name == "kd")
each_of_rows = pytest.mark.parametrize("case", ROWS, ids=str)


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    in_chunks_of(CHUNK, monkeypatch)
    with fastkd.backend("portable"):
        yield


def peak_of(case, inputs, **options):
    student = inputs[0].requires_grad_()
    with PeakMemory() as memory:
        case(*inputs, **options).backward()
    assert student.grad is not None
    return memory.peak_bytes


@each_of_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_keep_the_gradient_and_one_chunk(case, dtype):
    """Exactly: the gradient, the scratch, and less than 64 numbers a row."""
    n_rows, n_cols = 64, 2000
    inputs = case.inputs((n_rows,), n_cols, dtype)
    gradient = n_rows * n_cols * dtype.itemsize
    peak = peak_of(case, inputs, reduction="mean")
    assert gradient < peak <= gradient + SCRATCH * CHUNK + 256 * n_rows
    # shifted logits, without the last position, as every language model has them, are not copied
    inputs = case.inputs((4, n_rows + 1), n_cols, dtype)
    shifted = [inputs[0].detach()[:, :-1], inputs[1][:, :-1], *(x[:, :-1] for x in inputs[2:])]
    peak = peak_of(case, shifted, reduction="mean")
    assert peak <= 4 * gradient + SCRATCH * CHUNK + 4 * 256 * n_rows


@pytest.mark.parametrize("case", ROWS[:3], ids=str)
def test_rows_at_the_size_of_a_language_model(case):
    """The gradient is 8 MiB, all else less than one."""
    n_rows, n_cols = 64, 32000
    inputs = case.inputs((n_rows,), n_cols, torch.float32, device="meta")
    assert peak_of(case, inputs, reduction="mean") <= 1.15 * 4 * n_rows * n_cols


@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1, class_weights=True)], ids=str)
@pytest.mark.parametrize("are_soft", [False, True], ids=["classes", "soft"])
def test_labels_of_every_kind_take_no_more(options, are_soft):
    """Soft labels that are smoothed are those of a chunk, which are made of one other."""
    n_rows, n_cols = 64, 2000
    student, teacher, labels = LABELLED.inputs((n_rows,), n_cols, torch.float32)
    if are_soft:
        labels = torch.nn.functional.one_hot(labels, n_cols).float()
    if "class_weights" in options:
        options = options | dict(class_weights=torch.rand(n_cols))
    n_targets = 2 * bool(are_soft and options)
    peak = peak_of(fastkd.kd, [student, teacher, labels], **options)
    allowed = 4 * n_rows * n_cols + (SCRATCH + 4 * n_targets) * CHUNK
    assert peak <= allowed + 256 * n_rows + 8 * n_cols


def test_formulas_take_more():
    """So that the numbers above mean something."""
    for case in ROWS:
        with fastkd.backend("formula"):
            inputs = case.inputs((64,), 1000, torch.float32)
            assert peak_of(case, inputs, reduction="mean") >= 2 * 64 * 1000 * 4


@pytest.mark.parametrize("case", of("gram", cases=LOSSES), ids=str)
def test_gram_keeps_the_gradient_and_a_sheet(case, monkeypatch):
    """Half of a sheet more in buffers, and less than 64 numbers an example and 64 a class."""
    n, width = 1024, 256
    in_chunks_of(2 * CHUNK, monkeypatch)
    student, teacher = case.inputs((n,), width, torch.float32)
    few, gradient, sheet = 256 * (n + width), 4 * n * width, 4 * 4 * CHUNK

    def forward(*inputs):
        with PeakMemory() as memory:
            case(*inputs)
        return memory.peak_bytes

    assert gradient < forward(student, teacher) <= gradient + 1.5 * sheet + few
    assert forward(student.detach(), teacher) <= 1.5 * sheet + few
    copies = 2 * gradient * (case.name != "dist_kd")  # which the products need in float32
    narrow = [x.detach().bfloat16() for x in (student, teacher)]
    assert forward(*narrow) <= copies + 1.5 * sheet + few
    with fastkd.backend("formula"):
        assert forward(student, teacher) >= 2 * gradient


@pytest.mark.parametrize("n, width", [(128, 512), pytest.param(512, 1024, marks=full)])
def test_relations_take_memory_for_pairs_and_one_chunk(n, width):
    """Three buffers of a chunk and 21 numbers for each pair."""
    peak = peak_of(fastkd.rkd, [torch.empty(n, width, device="meta") for _ in range(2)])
    assert peak <= 4 * (3 * CHUNK + 21 * n**2 + 3 * n * width)
