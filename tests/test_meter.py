"""The meter and the count of memory are exact, and see planted faults."""

import pytest
import torch
import triton
import triton.language as tl
from meter import Meter, PeakMemory
from triton.runtime.errors import InterpreterError


@triton.jit
def _double(x_ptr, out_ptr, LOADS: tl.constexpr, STORES: tl.constexpr):
    i = tl.program_id(0) * 64 + tl.arange(0, 64)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, mask=i < LOADS), mask=i < STORES)


@triton.jit
def _add_up(x_ptr, out_ptr, ATOMIC: tl.constexpr):
    x = tl.sum(tl.load(x_ptr + tl.program_id(0) * 64 + tl.arange(0, 64)), 0)
    if ATOMIC:
        tl.atomic_add(out_ptr, x)
    else:
        tl.store(out_ptr, tl.load(out_ptr) + x)


@triton.jit
def _shift(x_ptr, BY: tl.constexpr):
    i = tl.program_id(0) * 64 + tl.arange(0, 64)
    tl.store(x_ptr + i, tl.load(x_ptr + i + BY, mask=i + BY < 256))


@triton.jit
def _last_one_stores(x_ptr):
    i = tl.arange(0, 64)
    x = tl.load(x_ptr + i)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(x_ptr + i, x + 1)


@triton.jit
def _collapse(x_ptr, out_ptr):
    i = tl.arange(0, 64)
    tl.store(out_ptr + i // 2, tl.load(x_ptr + i))


def double(x, result, loads=100, stores=100):
    _double[(2,)](x, result, loads, stores)


def test_the_meter_counts_every_byte():
    room = torch.zeros(300)
    x, result = torch.randn(100).bfloat16(), torch.empty(100)
    with Meter() as meter:
        double(x, result)
        double(room[:200].view(torch.float64), room[200:])  # two parts of one storage
        double(result, result)
    first, second, third = meter.launches
    assert (first.name, first.grid) == ("_double", (2, 1, 1))
    assert (first.arguments["x_ptr"].loaded, first.arguments["x_ptr"].stored) == (200, 0)
    assert (first.arguments["out_ptr"].loaded, first.arguments["out_ptr"].stored) == (0, 400)
    assert second.arguments["x_ptr"].unique_loaded == 800
    assert second.arguments["out_ptr"].unique_stored == 400
    assert [*third.arguments] == ["x_ptr/out_ptr"]  # aliases are counted together
    assert [x.traffic for x in meter.launches] == [x.floor for x in meter.launches]
    assert meter.traffic == 600 + 1200 + 800
    assert not meter.races


def test_the_floor_counts_a_byte_once():
    x, result = torch.randn(1, 64), torch.empty(2, 64)
    with Meter() as meter:
        double(x.expand(2, 64), result, loads=64, stores=64)
        _collapse[(1,)](x, result)
    assert [launch.traffic for launch in meter.launches] == [512, 512]
    assert [launch.floor for launch in meter.launches] == [512, 384]


# the planted faults hit no other memory: there is room around what they are given
OUTSIDE = {
    "28 of 64 lanes loaded": lambda room: double(room[0, :100], room[1, :100], loads=128),
    "28 of 64 lanes stored": lambda room: double(room[0, :100], room[1, :100], stores=128),
    "28 of 64 lanes loaded outside": lambda room: double(torch.randn(100), room[0], loads=128),
    "lanes loaded outside": lambda room: double(room.view(8, 32)[:, :28], torch.empty(128)),
}


@pytest.mark.parametrize("fault", OUTSIDE)
def test_an_access_outside_of_all_arguments_is_caught(fault):
    with pytest.raises(InterpreterError, match=fault), Meter():
        OUTSIDE[fault](torch.randn(2, 128))


@pytest.mark.parametrize(
    "launch, races",
    [
        (lambda x: _shift[(4,)](x, BY=0), {}),
        (lambda x: _shift[(4,)](x, BY=1), {"_shift stores over what another program loads": 3}),
        (
            lambda x: _add_up[(4,)](x, torch.zeros(1), ATOMIC=False),
            {
                "_add_up loads what another program stores": 3,
                "_add_up stores over what another program stores": 3,
                "_add_up stores over what another program loads": 3,
            },
        ),
        (lambda x: _add_up[(4,)](x, torch.zeros(1), ATOMIC=True), {"_add_up is atomic": 4}),
        (
            lambda x: _last_one_stores[(3,)](x),
            {"_last_one_stores stores over what another program loads": 64},
        ),
        (
            lambda x: _collapse[(1,)](x, torch.empty(64)),
            {"_collapse stores twice in one instruction": 32},
        ),
    ],
)
def test_what_depends_on_the_order_of_programs_is_a_race(launch, races):
    with Meter() as meter:
        launch(torch.randn(256))
    assert meter.races == races


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
    with PeakMemory() as memory:  # what is expanded moves its storage
        x[None].expand(50, 1000).sum()
    assert memory.moved_bytes == 4000 + 4


def test_peak_memory_sees_what_autograd_keeps():
    x = torch.ones(1000, requires_grad=True)
    with PeakMemory() as memory:
        loss = x.exp().square().sum()
        assert memory.live_bytes == 4000 + 4  # exp is its own derivative; square saves it too
        loss.backward()
    assert memory.live_bytes == 4000 + 4  # the gradient, and the loss
