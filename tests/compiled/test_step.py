"""The count of a step sees every operation and every argument of a kernel, once each."""

import re
import sys

import pytest
import step
import torch
import triton
import triton.language as tl
from gate import capture
from logit_rows import WORKLOADS
from meter import PeakMemory
from step import SEVERAL, Operation, Operations, count, of_kernel, unit_of
from torch.profiler import ProfilerActivity, profile
from workloads import BY_NAME

import fastkd


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def read_and_written(function, *arguments):
    """Return names, bytes read and bytes written by the operations."""
    with Operations() as operations:
        function(*arguments)
    return [(x.name, x.read, x.written) for x in operations.found]


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda x, y: x + 1, [("add", 400, 400)]),
        (lambda x, y: x * x, [("mul", 400, 400)]),
        (lambda x, y: x.exp_(), [("exp_", 400, 400)]),
        (lambda x, y: y.copy_(x), [("copy_", 400, 200)]),
        (lambda x, y: x.zero_(), [("zero_", 0, 400)]),
        (lambda x, y: x.bfloat16(), [("_to_copy", 400, 200)]),
        (lambda x, y: x.sum(1), [("sum", 400, 40)]),
        (lambda x, y: torch.add(x, 1, out=torch.empty_like(x)), [("add", 400, 400)]),
        (lambda x, y: torch.mm(x[:5], x), [("mm", 600, 200)]),
        (lambda x, y: torch.mm(y, y, out_dtype=x.dtype, out=x), [("mm", 200, 400)]),
        (lambda x, y: x.addmm_(x.mT, x + 0), [("add", 400, 400), ("addmm_", 1200, 400)]),
        (lambda x, y: x[0].expand(10, 10) + x, [("add", 440, 400)]),
        (lambda x, y: x.logsumexp(0), [("logsumexp", 400, 40)]),
        (lambda x, y: (x.view(-1)[3:].unsqueeze(0), y.mT, torch.empty_like(x)), []),
        (lambda x, y: (x[:0] + 1, torch.ones(5) * 2), []),  # of nothing, and on the host
    ],
)
def test_what_operations_read_and_write(function, expected):
    x, y = meta(10, 10), meta(10, 10, dtype=torch.bfloat16)
    assert read_and_written(function, x, y) == expected


INSIDE = {
    "logsumexp": lambda x: x.logsumexp(1),
    "constant_pad_nd": lambda x: torch.nn.functional.pad(x, (0, 1)),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1),
}
VIEWS = {f"aten::{name}" for name in ("empty", "narrow", "squeeze", "real")}


@pytest.mark.parametrize("name", SEVERAL)
def test_operations_made_of_several(name):
    """PyTorch's own trace has those inside."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        INSIDE[name](torch.rand(3, 4))
    *_, innermost = (x for x in trace.events() if x.name == f"aten::{name}")
    inside = [x.name for x in innermost.cpu_children if x.name not in VIEWS]
    with Operations() as operations:
        INSIDE[name](meta(3, 4))
    assert operations.found[-1].launches == SEVERAL[name] == len(inside), inside


@triton.jit
def _walk(pair, sums_ptr, out_ptr, unused_ptr, n, IN_PLACE: tl.constexpr):
    pointer = pair[0] + tl.arange(0, 64)
    total = tl.zeros([64], tl.float32)
    for _ in range(n):
        total += tl.load(pointer)
        pointer += 64
    tl.store(out_ptr + tl.arange(0, 64), total)
    if IN_PLACE:
        tl.store(pair[1] + tl.arange(0, 64), tl.load(pair[1] + tl.arange(0, 64)) + 1)
    if unused_ptr is not None:
        tl.store(sums_ptr, tl.sum(total, 0))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("unused", [False, True])
def test_what_kernels_read_and_write(in_place, unused):
    pair = meta(1, 16, 64).expand(8, 16, 64), meta(64, dtype=torch.bfloat16)
    unused_ptr = meta(1000) if unused else None
    with capture("sm_90") as launches:
        _walk[(1,)](pair, meta(1), meta(64), unused_ptr, 16, in_place)
    expected = 4 * 16 * 64 + 128 * in_place, 4 * 64 + 128 * in_place + 4 * unused
    assert of_kernel(launches[0]) == Operation("_walk", 1, *expected, is_kernel=True)


def test_a_step_is_forward_and_backward_of_both():
    """Two networks of 2 bytes, and once more with a gradient; the mean, its slope and its 1."""
    case, shape = BY_NAME["forward_kl"], (4096, 128256)
    found = count(case, shape, torch.bfloat16)
    kernels = ["row_statistics", "gradient", "certain_classes"]
    assert [x.name for x in found.operations if x.is_kernel] == kernels
    names = [x.name for x in found.operations]
    assert names == ["row_statistics", "mean", "gradient", "certain_classes", "ones_like", "div"]
    assert (found.launches, found.n_forward, unit_of(case, shape)[0]) == (6, 2, "element")
    assert found.bytes / (4096 * 128256) == pytest.approx(10, abs=0.01)


@pytest.mark.parametrize("n_cols", [1000, 128256])
@pytest.mark.parametrize("name, n_bytes", [("mft", 10), ("teacher_free_kd", 6)])
def test_corrected_rows_are_read_once_each_way(name, n_bytes, n_cols):
    """Two networks of 2 bytes, or one, and once more with a gradient; no teacher is written."""
    found = count(BY_NAME[name], (4096, n_cols), torch.bfloat16)
    kernels = [x.name for x in found.operations if x.is_kernel]
    is_long = n_cols > 8192
    assert kernels == (
        ["corrected_sums", "corrected_gradient"] if is_long else ["corrected_rows"] * 2
    )
    assert found.bytes / (4096 * n_cols) == pytest.approx(n_bytes, abs=0.06)


@pytest.mark.parametrize("n_cols", [1000, 32000])
@pytest.mark.parametrize(
    "options, n_bytes",
    [
        ("label_smoothing", 10),
        ("class_weights", 10),
        ("class_weights, label_smoothing", 10),
        ("soft labels", 14),
    ],
)
def test_labels_of_every_kind_take_no_sweep_of_their_own(options, n_bytes, n_cols):
    """Two networks of 2 bytes, once more with a gradient, and soft labels of 2 bytes each time."""
    (case,) = (x for x in WORKLOADS if (x.name, x.of_options) == ("kd", options))
    found = count(case, (4096, n_cols), torch.bfloat16)
    kernels = [x.name for x in found.operations if x.is_kernel]
    is_long = n_cols > 8192
    assert kernels == (
        ["row_statistics", "gradient", "certain_classes"] if is_long else ["whole_rows"] * 2
    )
    assert found.bytes / (4096 * n_cols) == pytest.approx(n_bytes, abs=0.12)


def test_products_of_halves_are_seen():
    found = count(BY_NAME["info_nce"], (512, 512), torch.bfloat16)
    products = [x for x in found.operations if x.name.startswith(("mm", "addmm"))]
    assert len(products) == 3
    assert products[0].read == 2 * 2 * 512**2 and products[0].written == 4 * 512**2
    assert {x.name for x in found.operations} >= {"log_sums_of_chunk", "exponentials_of_chunk"}


@pytest.mark.parametrize(
    "name, most_launches, most_bytes", [("info_nce", 972, 26.31), ("similarity_kl", 566, 38.17)]
)
def test_wide_embeddings_of_a_large_batch(name, most_launches, most_bytes):
    """Per pair: products 4 written, 4 read in each of two sweeps, slopes 2 written and read twice.

    64 chunks of 1024 rows add to all of the keys' gradient, 4 bytes; embeddings are the rest.
    """
    found = count(BY_NAME[name], (65536, 512), torch.bfloat16)
    assert found.launches <= most_launches
    assert found.bytes / 65536**2 <= most_bytes


@pytest.mark.parametrize("n", [256, 1024])
def test_memory_of_a_small_batch_is_that_of_its_pairs(n):
    """Products of 4 bytes and slopes of 2, besides embeddings and their gradients."""
    inputs = BY_NAME["info_nce"].inputs((n, 512), torch.bfloat16, "meta")
    with capture("sm_90"), step.multiplying_halves(), PeakMemory() as memory:
        with fastkd.backend("triton"):
            torch.autograd.grad(fastkd.info_nce(*inputs), inputs)
    assert memory.peak_bytes <= 6 * n**2 + 8 * 2 * 4 * n * 512


def test_the_command_prints_the_whole_and_every_kind(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step.py", "rkd", "256x512", "float32", "sm_80"])
    step.main()
    heading, *lines = capsys.readouterr().out.splitlines()
    sums = [*map(float, re.findall(r"[\d.]+", heading.split(":")[1]))]
    assert heading.startswith("rkd 256x512 float32 sm_80: ") and heading.endswith("each pair")
    rows = [line.split() for line in lines]
    assert sum(int(row[0]) for row in rows) == sums[0] == sums[1] + sums[2]
    assert sum(float(row[1]) for row in rows) == pytest.approx(sums[3], abs=0.01)
    assert {row[2] for row in rows} >= {"squares", "edges", "laplacian", "ones_like"}
