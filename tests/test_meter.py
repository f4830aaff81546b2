"""The meter, the count of memory and the guard are exact, and see planted faults."""

import pytest
import torch
import triton
import triton.language as tl
from guard import Guard
from meter import Meter, PeakMemory
from triton.runtime.errors import InterpreterError


@triton.jit
def _double(x_ptr, out_ptr, n, BLOCK: tl.constexpr, LOADS: tl.constexpr, STORES: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < LOADS)
    tl.store(out_ptr + i, 2 * x, mask=i < STORES)


@triton.jit
def _add_up(x_ptr, out_ptr, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    x = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 0)
    if ATOMIC:
        tl.atomic_add(out_ptr, x)
    else:
        tl.store(out_ptr, tl.load(out_ptr) + x)


@triton.jit
def _shift(x_ptr, n, BLOCK: tl.constexpr, BY: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + BY, mask=i + BY < n)
    tl.store(x_ptr + i, x + 1, mask=i < n)


@triton.jit
def _last_one_stores(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(x_ptr + i, x + 1)


@triton.jit
def _collapse(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i // 2, tl.load(x_ptr + i))


@triton.jit
def _store_then_load(out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, i * 1.0)
    tl.store(out_ptr + i, tl.load(out_ptr + BLOCK - 1 - i))


def double(x, result, loads=100, stores=100):
    _double[(2,)](x, result, 100, BLOCK=64, LOADS=loads, STORES=stores)


def test_the_meter_counts_every_byte():
    x, result = torch.randn(100).bfloat16(), torch.empty(100)
    with Meter() as meter:
        double(x, result)
        double(x, result)
    first, second = meter.launches
    assert (first.name, first.grid) == ("_double", (2, 1, 1))
    assert (first.arguments["x_ptr"].loaded, first.arguments["x_ptr"].stored) == (200, 0)
    assert (first.arguments["out_ptr"].loaded, first.arguments["out_ptr"].stored) == (0, 400)
    assert first.traffic == first.floor == second.traffic == 600
    assert meter.traffic == 1200
    assert not meter.races


def test_the_floor_counts_a_byte_once():
    x, result = torch.randn(1, 64), torch.empty(2, 64)
    with Meter() as meter:
        double(x.expand(2, 64), result, loads=64, stores=64)
        _collapse[(1,)](x, result, BLOCK=64)
    assert [launch.traffic for launch in meter.launches] == [512, 512]
    assert [launch.floor for launch in meter.launches] == [512, 384]


@pytest.mark.parametrize("loads, stores, what", [(128, 100, "loaded"), (100, 128, "stored")])
def test_a_missing_mask_is_caught(loads, stores, what):
    room = torch.randn(2, 128)  # so that the planted fault hits no other memory
    x, result = room[0, :100], room[1, :100]
    with pytest.raises(InterpreterError, match=f"28 of 64 lanes {what} outside"), Meter():
        double(x, result, loads, stores)


def test_an_access_past_the_end_of_memory_is_caught():
    with pytest.raises(InterpreterError, match="28 of 64 lanes loaded outside"), Meter():
        double(torch.randn(100), torch.empty(128), loads=128, stores=128)


def test_a_load_between_the_rows_of_a_view_is_caught():
    room = torch.randn(4, 32)
    with pytest.raises(InterpreterError, match="lanes loaded outside"), Meter():
        double(room[:, :28], torch.empty(128))


def test_a_lost_update_is_a_race_and_an_atomic_is_not():
    x, result = torch.randn(256), torch.zeros(1)
    with Meter() as meter:
        _add_up[(4,)](x, result, BLOCK=64, ATOMIC=False)
    assert meter.races["_add_up stores over what another program stores"] == 3
    assert meter.races["_add_up loads what another program stores"] == 3
    with Meter() as meter:
        _add_up[(4,)](x, result, BLOCK=64, ATOMIC=True)
    assert not meter.races
    assert meter.launches[0].arguments["out_ptr"].atomic == 16
    assert meter.traffic == 1024 + 2 * 16  # an atomic loads and stores


def test_in_place_is_a_race_only_across_programs():
    x = torch.randn(256)
    with Meter() as meter:
        _shift[(4,)](x, 256, BLOCK=64, BY=0)
    assert not meter.races
    with Meter() as meter:
        _shift[(4,)](x, 256, BLOCK=64, BY=1)
    assert meter.races == {"_shift stores over what another program loads": 3}


def test_a_store_over_what_several_programs_load_is_a_race():
    with Meter() as meter:
        _last_one_stores[(3,)](torch.randn(64), BLOCK=64)
    assert meter.races == {"_last_one_stores stores over what another program loads": 64}


def test_parts_of_one_storage_are_told_apart():
    room = torch.zeros(300)
    with Meter() as meter:
        double(room[:200].view(torch.float64), room[200:])
    first = meter.launches[0].arguments
    assert (first["x_ptr"].unique_loaded, first["x_ptr"].unique_stored) == (800, 0)
    assert (first["out_ptr"].unique_loaded, first["out_ptr"].unique_stored) == (0, 400)


def test_aliased_arguments_are_counted_together():
    x = torch.randn(100)
    with Meter() as meter:
        double(x, x)
    assert list(meter.launches[0].arguments) == ["x_ptr/out_ptr"]
    assert meter.launches[0].traffic == 800
    assert not meter.races


def test_lanes_that_store_to_one_place_are_caught():
    with Meter() as meter:
        _collapse[(1,)](torch.randn(64), torch.empty(64), BLOCK=64)
    assert meter.races == {"_collapse stores twice in one instruction": 32}


def test_loads_of_own_stores_are_counted():
    with Meter() as meter:
        _store_then_load[(1,)](torch.empty(64), BLOCK=64)
    assert meter.launches[0].own_stores_loaded == 64
    assert not meter.races


def test_the_guard_passes_a_correct_kernel():
    guard = Guard()
    rows = guard.surround(torch.randn(2, 50).bfloat16(), gap=14)
    result = guard.empty(100)
    double(guard.surround(rows.reshape(100)), result)
    guard.check()
    assert torch.equal(result, 2 * rows.reshape(100).float())


def test_the_guard_catches_stores_outside():
    guard = Guard()
    double(guard.surround(torch.randn(100)), guard.empty(100), stores=128)
    with pytest.raises(AssertionError, match="28 elements overwritten"):
        guard.check()


def test_the_guard_catches_stores_between_the_rows():
    guard = Guard()
    double(guard.surround(torch.randn(100)), guard.empty(2, 50, gap=14))
    with pytest.raises(AssertionError, match="14 elements overwritten"):
        guard.check()


def test_the_guard_catches_gaps_in_an_output():
    guard = Guard()
    double(guard.surround(torch.randn(100)), guard.empty(100), stores=90)
    with pytest.raises(AssertionError, match="10 elements"):
        guard.check()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_memory_is_of_what_lives_at_once(device):
    x = torch.ones(1000, device=device)
    with PeakMemory() as memory:
        y = x.exp()
        z = y.view(10, 100) * 2
        assert memory.live_bytes == 8000
        del y
        z.add_(x.view(10, 100))
        half = x[:500].clone()
    assert (memory.peak_bytes, memory.live_bytes) == (8000, 6000)
    assert (memory.operations, memory.moved_bytes) == (4, 8000 + 8000 + 12000 + 4000)
    assert half.numel() == 500


def test_peak_memory_sees_what_autograd_keeps():
    x = torch.ones(1000, requires_grad=True)
    with PeakMemory() as memory:
        loss = x.exp().square().sum()
        assert memory.live_bytes == 4000 + 4  # exp is its own derivative; square saves it too
        loss.backward()
    assert x.grad is not None
    assert memory.live_bytes == 4000 + 4


def test_an_expanded_tensor_moves_its_storage():
    x = torch.ones(1, 1000)
    with PeakMemory() as memory:
        x.expand(50, 1000).sum()
    assert memory.moved_bytes == 4000 + 4
