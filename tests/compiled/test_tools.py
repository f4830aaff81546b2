"""The gate sees every launch, and the count of instructions sees planted faults."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from gate import DEVICES, Tensor, capture
from sass import analyse, complaints, occupancy
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

import fastkd
from fastkd.kernels.rows import launch as kernels

BEFORE_3_5 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5)


@triton.jit
def _sum_of_exponentials(x_ptr, out_ptr, n, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + i, mask=i < n, other=0.0)
        total += tl.exp2(x.to(tl.float32))
    tl.store(out_ptr + row, tl.sum(total, 0))


@triton.jit
def _row_sums(x_ptr, out_ptr, n_rows, n, BLOCK: tl.constexpr):
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            total += tl.load(x_ptr + row * n + i, mask=i < n, other=0.0)
        tl.store(out_ptr + row, tl.sum(total, 0))


@triton.jit
def _normalised(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) / tl.sum(tl.exp2(tl.load(x_ptr + i)), 0))


@triton.jit
def _product(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tile = i[:, None] * SIZE + i[None, :]
    tl.store(out_ptr + tile, tl.dot(tl.load(x_ptr + tile), tl.load(y_ptr + tile)))


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def sum_of_exponentials(x, **options):
    result = meta(x.shape[0], dtype=torch.float32)
    options = {"BLOCK": 2048, "num_warps": 4, **options}
    _sum_of_exponentials[(x.shape[0],)](x, result, x.shape[1], x.stride(0), **options)


def launched(run, *arguments, target="sm_90", **options):
    with capture(target) as launches:
        run(*arguments, **options)
    (launch,) = launches
    return launch


@pytest.fixture(scope="module")
def clean():
    return launched(sum_of_exponentials, meta(4096, 128256))


@pytest.mark.parametrize("target", DEVICES)
def test_every_target_compiles(target):
    if target == "gfx942" and BEFORE_3_5:
        pytest.skip("needs an external ld.lld before triton 3.5")
    with capture(target) as launches:
        sum_of_exponentials(meta(7, 1000))
        properties = driver.active.utils.get_device_properties(driver.active.get_current_device())
        assert properties["multiprocessor_count"] == DEVICES[target].multiprocessors
        assert driver.active.get_current_target() == DEVICES[target].target
        assert str(DEVICES[target].target.arch) == target.removeprefix("sm_")
    (launch,) = launches
    assert launch.asm["hsaco" if target == "gfx942" else "cubin"]


def test_a_launch_is_described(clean):
    assert (clean.name, clean.grid) == ("_sum_of_exponentials", (4096, 1, 1))
    assert clean.args["x_ptr"] == Tensor((4096, 128256), (128256, 1), torch.bfloat16)
    assert (clean.args["n"], clean.args["BLOCK"]) == (128256, 2048)
    assert clean.metadata.num_warps == 4
    again = launched(sum_of_exponentials, meta(5, 128256 + 16)[:, :128256])
    assert again.args["x_ptr"] == Tensor((5, 128256), (128272, 1), torch.bfloat16)
    assert again.kernel is clean.kernel  # it is seen though it is not compiled


def test_a_clean_kernel_is_counted(clean):
    report = analyse(clean)
    assert not complaints(clean)
    assert (report.warps, report.spills, report.stack_bytes) == (4, 0, 0)
    assert report.warps_per_sm >= 32
    (loop,) = report.loops
    assert report.main is loop
    assert loop["load_bytes"] == 2048 * 2 / (4 * 32)
    assert loop["LDG.128"] == 2
    assert not loop["barriers"]
    assert loop["mufu"] == loop["MUFU.EX2"] == 16  # elements of a thread
    assert 3 * 16 < loop["instructions"] < 10 * 16


def test_of_nested_loops_the_innermost_is_counted():
    x, result = meta(4096, 4096, dtype=torch.float32), meta(4096, dtype=torch.float32)
    report = analyse(launched(_row_sums[(132,)], x, result, 4096, 4096, BLOCK=1024))
    (loop,) = report.loops
    assert loop["load_bytes"] % (1024 * 4 / (4 * 32)) == 0  # unrolled
    assert report.outside["barriers"]
    assert not loop["barriers"]
    outer, inner = report.bodies
    assert inner == loop and outer["barriers"]


def test_loops_that_load_no_vectors_are_sweeps_too():
    x, result = meta(4096, 4095, dtype=torch.float32), meta(4096, dtype=torch.float32)
    report = analyse(launched(_row_sums[(132,)], x, result, 4096, 4095, BLOCK=1024))
    (loop,) = report.loops
    assert not loop["LDG.128"] and report.sweeps == [loop]


def test_rows_that_are_not_aligned_load_narrowly():
    launch = launched(sum_of_exponentials, meta(4096, 128255))
    (complaint,) = complaints(launch)
    assert "32 of 32 bytes a thread moves by LDG go in accesses narrower than 8" in complaint
    assert not complaints(launch, least_bytes=2)


def test_spills_and_low_occupancy_are_seen():
    launch = launched(sum_of_exponentials, meta(64, 65536), BLOCK=32768)
    report, found = analyse(launch), complaints(launch)
    stores, loads = report.total["STL"], report.total["LDL"]
    assert stores and loads and report.spills == stores + loads
    assert (report.warps_per_sm, report.limited_by) == (8, "registers")
    assert complaints(launch, least_warps=8) == found[:1]
    assert "spill" in found[0] and "8 warps fit" in found[1]


def test_float64_is_seen():
    launch = launched(_normalised[(1,)], *[meta(1024, dtype=torch.float64)] * 2, BLOCK=1024)
    assert "float64" in complaints(launch)[0]
    assert not any("float64" in x for x in complaints(launch, float64=True))


@pytest.mark.parametrize(
    "target, registers, warps, shared, fitting, limited_by",
    [
        ("sm_90", 32, 4, 0, 64, "warps"),
        ("sm_90", 33, 4, 0, 48, "registers"),  # 40: they come in eights
        ("sm_90", 255, 8, 0, 8, "registers"),
        ("sm_90", 32, 4, 113 * 1024, 8, "shared memory"),  # each reserves 1 KiB more
        ("sm_90", 32, 4, 114 * 1024, 4, "shared memory"),
        ("sm_90", 32, 1, 0, 32, "programs"),
        ("sm_86", 32, 1, 0, 16, "programs"),
        ("sm_89", 32, 1, 0, 24, "programs"),
        ("sm_120", 32, 4, 0, 48, "warps"),
        ("sm_120", 32, 4, 49 * 1024, 8, "shared memory"),
        ("sm_120", 32, 4, 50 * 1024, 4, "shared memory"),
    ],
)
def test_occupancy_is_that_of_the_calculator(target, registers, warps, shared, fitting, limited_by):
    metadata = SimpleNamespace(num_warps=warps, shared=shared)
    launch = SimpleNamespace(metadata=metadata, device=DEVICES[target])
    assert occupancy(launch, registers) == (fitting, limited_by)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_tensor_cores_are_seen(target):
    report = analyse(launched(_product[(1,)], *[meta(64, 64)] * 3, SIZE=64, target=target))
    assert report.total["tensor"] and report.shared_bytes


def test_a_kernel_too_large_for_its_target_raises():
    with pytest.raises(OutOfResources), capture("sm_80"):
        _product[(1,)](*[meta(256, 256)] * 3, SIZE=256, num_warps=32)


LOOKS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.sum()),
    "float": lambda x: float(x.sum()),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "device": lambda x: torch.cuda.synchronize(),
    "stream": lambda x: torch.cuda.Stream.synchronize(None),
    "event": lambda x: torch.cuda.Event.synchronize(None),
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("look", LOOKS)
def test_an_engine_that_waits_for_the_gpu_is_caught(look, direction, monkeypatch):
    compute = getattr(kernels, direction)

    def waiting(*arguments):
        LOOKS[look](arguments[0].student)
        return compute(*arguments)

    monkeypatch.setattr(kernels, direction, waiting)
    student = meta(64, 1000).requires_grad_()
    with capture("sm_90"), fastkd.backend("triton"):
        with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta|nonzero|waits for"):
            torch.autograd.grad(fastkd.forward_kl(student, meta(64, 1000)), student)
