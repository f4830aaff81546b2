"""The floor model on counts made by hand: what binds, what adds, and that a check can fail."""

import json
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from counts import main_walk
from floor import DEVICES, FILE, Counts, check, classes_of, executed, floor, summary, walked
from workloads import FUSED

H100, H200, A100 = DEVICES
GIGABYTE = 1e9
IDLE = Counts(warps=0, work={}, unique_bytes=0, uncached_bytes=0)
WARPS = 132 * 1000  # a thousand for each multiprocessor
ROW = dict(loss="forward_kl", shape=[4096, 128256], dtype="bfloat16")
MODELLED = {"rows": [{**ROW, "device": "H100", "forward": {"milliseconds": [0.684, 0.7]}}]}


def measured(milliseconds=0.69, device="NVIDIA H100 80GB HBM3", name="fastkd", **changed):
    implementations = {name: dict(milliseconds=milliseconds)}
    row = dict(**ROW, direction="forward", implementations=implementations)
    return dict(device=device, rows=[row | changed])


def moving(unique, uncached=None):
    return IDLE._replace(unique_bytes=unique, uncached_bytes=uncached or unique)


def working(**instructions):
    total = sum(instructions.values())
    return IDLE._replace(warps=WARPS, work=classes_of({"instructions": total, **instructions}))


@pytest.mark.parametrize(
    "counts, binds",
    [
        (working(FFMA=4000), "issue"),  # FMA as well: the first of equals is named
        (working(FADD=1000, IMAD=1500), "FMA"),
        (working(ISETP=2000), "ALU"),
        (working(MUFU=500, FFMA=500), "MUFU"),
        (working(LDS=600, SHFL=400), "shared memory"),
    ],
)
def test_the_busiest_unit_binds(counts, binds):
    found = floor(counts, H100)
    assert found.binds == binds
    assert found.seconds == pytest.approx(1000 * 1000 / H100.clock)
    assert found.seconds_uncached == found.seconds


def test_memory_and_tensor_cores_bind():
    read = floor(moving(GIGABYTE, 2 * GIGABYTE), H100)
    assert read.binds == "memory"
    assert read.seconds == pytest.approx((GIGABYTE - H100.cache) / H100.bandwidth)
    assert read.seconds_uncached == pytest.approx(2 * GIGABYTE / H100.bandwidth)
    assert floor(moving(H100.cache), H100).seconds == 0
    products = floor(IDLE._replace(flops=790e12), H100)
    assert (products.binds, products.seconds) == ("tensor cores", pytest.approx(1))


def test_devices_differ():
    counts = moving(3 * GIGABYTE)._replace(warps=WARPS, work={"all": 5700})
    assert [floor(counts, device).binds for device in (H100, H200)] == ["memory", "issue"]
    fused, integer = (floor(working(**{x: 1000}), A100).seconds for x in ("FFMA", "IMAD"))
    assert fused == integer  # a multiply-add is half as fast as on an H100


def test_floors_add_over_launches():
    read, compute = floor(moving(GIGABYTE), H100), floor(working(MUFU=2000), H100)
    found = summary([read, compute, compute])
    low = 1e3 * (read.seconds + 2 * compute.seconds)
    high = 1e3 * (read.seconds_uncached + 2 * compute.seconds)
    assert found["milliseconds"] == pytest.approx([low, high], rel=1e-4)
    assert summary([read])["binds"] == "memory" and found["binds"] == "MUFU"


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


def test_the_loop_over_whole_tiles_is_walked():
    """The one with a mask does more; the one that computes rows anew stores nothing of columns."""
    moved = Counter(load_bytes=128, store_bytes=8, tensor=8)
    whole, masked = (moved + Counter(instructions=n) for n in (100, 150))
    anew = Counter(load_bytes=128, tensor=8, instructions=80)
    for loops in permutations([whole, masked, anew]):
        assert main_walk(loops) is whole
        found = walked(Counter(instructions=7), loops, trips=10, started=1)
        assert found["instructions"] == 7 + 10 * 100 + 150 + 80


def test_a_time_below_its_floor_is_found():
    assert check(measured(), MODELLED) == []
    below = measured(0.683)
    assert check(below, MODELLED) == [{**below["rows"][0], "floor": 0.684}]


OTHERS = [dict(loss="reverse_kl"), dict(shape=[4096, 32000]), dict(dtype="float32")]
OTHERS += [dict(direction="forward+backward"), dict(device="NVIDIA A100-SXM4-80GB")]
OTHERS += [dict(name="torch.compile"), dict(implementations=dict(fastkd=dict(note="no memory")))]


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_modelled_is_passed_over(other):
    assert check(measured(**{"milliseconds": 0.1, **other}), MODELLED) == []


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
