"""The gate sees every launch, and the count of instructions sees planted faults."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from gate import DEVICES, Tensor, capture
from sass import analyse, complaints, occupancy, per_element
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


def only(launches):
    (launch,) = launches
    return launch


@pytest.fixture(scope="module")
def clean():
    with capture("sm_90") as launches:
        sum_of_exponentials(meta(4096, 128256))
    return only(launches)


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
    assert only(launches).asm["hsaco" if target == "gfx942" else "cubin"]


def test_a_launch_is_described(clean):
    assert (clean.name, clean.grid) == ("_sum_of_exponentials", (4096, 1, 1))
    assert clean.args["x_ptr"] == Tensor((4096, 128256), (128256, 1), torch.bfloat16)
    with capture("sm_90") as launches:
        sum_of_exponentials(meta(7, 1024)[:, :1000])
    assert only(launches).args["x_ptr"] == Tensor((7, 1000), (1024, 1), torch.bfloat16)
    assert (clean.args["n"], clean.args["BLOCK"]) == (128256, 2048)
    assert clean.signature["x_ptr"] == "*bf16"
    assert clean.metadata.num_warps == 4


def test_a_second_launch_is_seen_though_it_is_not_compiled(clean):
    with capture("sm_90") as launches:
        sum_of_exponentials(meta(5, 128256))
        sum_of_exponentials(meta(6, 128256))
    assert [launch.grid for launch in launches] == [(5, 1, 1), (6, 1, 1)]
    assert launches[0].kernel is launches[1].kernel is clean.kernel


def test_a_clean_kernel_is_counted(clean):
    report = analyse(clean)
    assert not complaints(clean)
    assert (report.warps, report.spills, report.stack_bytes) == (4, 0, 0)
    assert report.warps_per_sm >= 32
    assert len(report.loops) == 1
    assert report.main is report.loops[0]
    assert report.main["load_bytes"] == 2048 * 2 / (4 * 32)
    assert report.main["LDG.128"] == 2
    assert not report.main["barriers"]
    each = per_element(report.main, elements=16)
    assert each["mufu"] == each["MUFU.EX2"] == 1
    assert 3 < each["instructions"] < 10


def test_of_nested_loops_the_innermost_is_counted():
    with capture("sm_90") as launches:
        x, result = meta(4096, 4096, dtype=torch.float32), meta(4096, dtype=torch.float32)
        _row_sums[(132,)](x, result, 4096, 4096, BLOCK=1024)
    report = analyse(only(launches))
    (loop,) = report.loops
    assert loop["load_bytes"] % (1024 * 4 / (4 * 32)) == 0  # unrolled
    assert report.outside["barriers"]
    assert not loop["barriers"]


@pytest.mark.parametrize("dtype, moved", [(torch.bfloat16, 32), (torch.float32, 64)])
def test_rows_that_are_not_aligned_load_narrowly(dtype, moved):
    with capture("sm_90") as launches:
        sum_of_exponentials(meta(4096, 128255, dtype=dtype))
    (complaint,) = complaints(only(launches))
    narrow = f"{moved} of {moved} bytes a thread moves by LDG go in accesses narrower than 8"
    assert narrow in complaint
    assert not complaints(only(launches), least_bytes=dtype.itemsize)


def test_spills_and_low_occupancy_are_seen():
    with capture("sm_90") as launches:
        sum_of_exponentials(meta(4096, 131072, dtype=torch.float32), BLOCK=32768)
    report, found = analyse(only(launches)), complaints(only(launches))
    stores, loads = report.total["STL"], report.total["LDL"]
    assert stores and loads and report.spills == stores + loads
    assert report.warps_per_sm == 8
    assert report.limited_by == "registers"
    assert complaints(only(launches), least_warps=8) == found[:1]
    assert len(found) == 2
    assert "spill" in found[0]
    assert "8 warps fit" in found[1]


def test_float64_is_seen():
    with capture("sm_90") as launches:
        _normalised[(1,)](*[meta(1024, dtype=torch.float64)] * 2, BLOCK=1024)
    assert "float64" in complaints(only(launches))[0]
    assert not any("float64" in x for x in complaints(only(launches), float64=True))


@pytest.mark.parametrize(
    "registers, warps, shared, fitting, limited_by",
    [
        (32, 4, 0, 64, "warps"),
        (33, 4, 0, 48, "registers"),  # 40: they come in eights
        (255, 8, 0, 8, "registers"),
        (32, 4, 113 * 1024, 8, "shared memory"),  # each reserves 1 KiB more
        (32, 4, 114 * 1024, 4, "shared memory"),
        (32, 1, 0, 32, "programs"),
    ],
)
def test_occupancy_is_that_of_the_calculator(registers, warps, shared, fitting, limited_by):
    metadata = SimpleNamespace(num_warps=warps, shared=shared)
    launch = SimpleNamespace(metadata=metadata, device=DEVICES["sm_90"])
    assert occupancy(launch, registers) == (fitting, limited_by)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_tensor_cores_are_seen(target):
    with capture(target) as launches:
        _product[(1,)](*[meta(64, 64)] * 3, SIZE=64)
    report = analyse(only(launches))
    assert report.total["tensor"]
    assert report.shared_bytes


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
