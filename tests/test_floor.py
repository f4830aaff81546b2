"""The floor model on counts made by hand: what binds, what adds, and that a check can fail."""

import json
import sys
from pathlib import Path

import pytest
import torch
from gate import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from floor import DEVICES, FILE, Counts, check, classes_of, executed, floor, summary, tensors_in
from workloads import FUSED

H100, H200, A100 = DEVICES
GIGABYTE = 1e9
IDLE = Counts(warps=0, work={}, unique_bytes=0, uncached_bytes=0)
WARPS = 132 * 1000  # a thousand for each multiprocessor
MODELLED = {
    "rows": [
        {
            "loss": "forward_kl",
            "shape": [4096, 128256],
            "dtype": "bfloat16",
            "device": "H100",
            "forward": {"milliseconds": [0.684, 0.7], "binds": "memory"},
        }
    ]
}


def measured(milliseconds=0.69, device="NVIDIA H100 80GB HBM3", name="fastkd", **changed):
    row = dict(loss="forward_kl", shape=[4096, 128256], dtype="bfloat16", direction="forward")
    row |= dict(implementations={name: dict(milliseconds=milliseconds)}) | changed
    return dict(device=device, rows=[row])


def moving(unique, uncached=None):
    return IDLE._replace(unique_bytes=unique, uncached_bytes=uncached or unique)


def working(**instructions):
    total = sum(instructions.values())
    return IDLE._replace(warps=WARPS, work=classes_of({"instructions": total, **instructions}))


@pytest.mark.parametrize(
    "counts, binds, clocks",
    [
        (working(BAR=4000), "issue", 1000),
        (working(FFMA=4000), "issue", 1000),  # FMA as well: the first of equals is named
        (working(FADD=1000, IMAD=1500), "FMA", 1000),
        (working(ISETP=2000), "ALU", 1000),
        (working(MUFU=500, FFMA=500), "MUFU", 1000),
        (working(LDS=600, SHFL=400), "shared memory", 1000),
    ],
)
def test_the_busiest_unit_binds(counts, binds, clocks):
    found = floor(counts, H100)
    assert found.binds == binds
    assert found.seconds == pytest.approx(1000 * clocks / H100.clock)
    assert found.seconds_uncached == found.seconds


def test_memory_and_tensor_cores_bind():
    read = floor(moving(3000 * GIGABYTE), H100)
    assert read.binds == "memory"
    assert read.seconds_uncached == pytest.approx(1)
    assert floor(IDLE._replace(flops=790e12), H100).seconds == pytest.approx(1)
    assert floor(IDLE._replace(flops=790e12), H100).binds == "tensor cores"


def test_a_faster_memory_moves_what_binds():
    counts = moving(3 * GIGABYTE)._replace(warps=WARPS, work={"all": 5700})
    assert [floor(counts, device).binds for device in (H100, H200)] == ["memory", "issue"]


def test_a_multiply_add_is_half_as_fast_on_an_a100():
    fused = floor(working(FFMA=1000), A100)
    assert fused.binds == "FMA"
    integer = floor(working(IMAD=1000), A100)
    assert fused.seconds == integer.seconds


def test_memory_is_a_bracket():
    found = floor(moving(GIGABYTE, 2 * GIGABYTE), H100)
    assert found.seconds == pytest.approx((GIGABYTE - H100.cache) / H100.bandwidth)
    assert found.seconds_uncached == pytest.approx(2 * GIGABYTE / H100.bandwidth)
    on_chip = floor(moving(H100.cache), H100)
    assert on_chip.seconds == 0 < on_chip.seconds_uncached


def test_floors_add_over_launches():
    read, compute = floor(moving(GIGABYTE), H100), floor(working(MUFU=2000), H100)
    found = summary([read, compute, compute])
    low = 1e3 * (read.seconds + 2 * compute.seconds)
    high = 1e3 * (read.seconds_uncached + 2 * compute.seconds)
    assert found["milliseconds"] == pytest.approx([low, high], rel=1e-4)
    assert read.seconds < compute.seconds
    assert [summary(launches)["binds"] for launches in ([read], [read, compute])] == [
        "memory",
        "MUFU",
    ]


@pytest.mark.parametrize("unrolled", [1, 4])
def test_trips_come_from_bytes(unrolled):
    sweep = {"instructions": 10 * unrolled, "MUFU": unrolled, "load_bytes": 32 * unrolled}
    wait = {"instructions": 3, "load_bytes": 0}
    outside = {"instructions": 100, "load_bytes": 64}
    found = executed(outside, [sweep, wait], loaded=64 + 3200)
    assert found["instructions"] == 100 + 3 + 1000
    assert found["MUFU"] == 100
    twice = executed(outside, [sweep, wait, sweep], loaded=64 + 6400)
    assert twice["instructions"] == 100 + 3 + 2000


def test_a_time_below_its_floor_is_found():
    assert check(measured(), MODELLED) == []
    below = measured(0.683)
    assert check(below, MODELLED) == [{**below["rows"][0], "floor": 0.684}]


@pytest.mark.parametrize(
    "other",
    [
        dict(loss="reverse_kl"),
        dict(shape=[4096, 32000]),
        dict(dtype="float32"),
        dict(direction="forward+backward"),
        dict(device="NVIDIA A100-SXM4-80GB"),
        dict(name="torch.compile"),
        dict(implementations=dict(fastkd=dict(note="out of memory"))),
    ],
)
def test_what_is_not_modelled_is_passed_over(other):
    assert check(measured(**{"milliseconds": 0.1, **other}), MODELLED) == []


def test_tensors_are_found_in_the_tuples_of_a_kernel():
    first, second = (Tensor((n,), (1,), torch.float32) for n in (1, 2))
    assert [*tensors_in([first, 3, (second, None, (first,))])] == [first, second, first]


def test_the_record_has_every_loss_size_and_device():
    record = json.loads(FILE.read_text())
    assert record["label"] == "modelled"
    found = {(row["loss"], tuple(row["shape"]), row["device"]) for row in record["rows"]}
    assert found == {
        (case.name, shape, device.name)
        for case in FUSED
        for shape in case.family.compiled_sizes
        for device in DEVICES
    }
    for row in record["rows"]:
        low, high = row["forward+backward"]["milliseconds"]
        assert 0 < low <= high
