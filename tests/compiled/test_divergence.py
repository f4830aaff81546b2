"""What is particular to the compiled kernels of the divergences; the rest is in the budgets."""

import pytest
import torch
from gate import DEVICES, capture
from sass import analyse, complaints

import fastkd

LONG, ODD = (4096, 128256), (4096, 151669)


def launches(loss, shape, dtype=torch.bfloat16, target="sm_90", backward=True, teacher_dtype=None):
    student = torch.empty(shape, dtype=dtype, device="meta", requires_grad=backward)
    teacher = torch.empty(shape, dtype=teacher_dtype or dtype, device="meta")
    labels = [torch.empty(shape[:-1], dtype=torch.int64, device="meta")] if loss == "kd" else []
    with capture(target) as found, fastkd.backend("triton"):
        result = getattr(fastkd, loss)(student, teacher, *labels, temperature=2.0)
        if backward:
            result.backward()
    return found


def wide_loops(launch):
    """Of the innermost loops, those that sweep over a row."""
    return [loop for loop in analyse(launch).loops if loop["LDG.128"]]


@pytest.mark.parametrize("loss, sweeps", [("forward_kl", 1), ("jensen_shannon", 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads_sweep_over_long_rows_on_their_own(loss, sweeps, dtype):
    (launch,) = launches(loss, LONG, dtype, backward=False)
    loops = wide_loops(launch)
    assert len(loops) == sweeps
    for loop in loops:
        assert not loop["barriers"]
        assert not loop["shuffles"]


@pytest.mark.parametrize("loss", ["forward_kl", "jensen_shannon", "kd"])
@pytest.mark.parametrize("shape", [ODD, (4096, 50257)])
def test_rows_off_the_boundary_are_read_in_vectors(loss, shape):
    statistics, gradient = launches(loss, shape)
    for loop in wide_loops(statistics):
        assert loop["load_bytes"] == 16 * loop["LDG.128"]
    assert len(wide_loops(statistics)) == len(analyse(statistics).loops)
    assert not complaints(gradient)
    assert analyse(gradient).outside["STG.128"]


@pytest.mark.parametrize("target", DEVICES)
def test_few_rows_fill_the_device(target):
    (split, *_) = launches("forward_kl", (2, 262144), target=target, backward=False)
    assert split.grid[1] == 32  # columns / 8192, fewer than two programs a multiprocessor
    (whole, *_) = launches("forward_kl", (512, 262144), target=target, backward=False)
    assert whole.grid == (512, 1, 1)


def test_small_rows_share_programs():
    (many,) = launches("forward_kl", (1 << 20, 10), torch.float32, backward=False)
    assert many.grid == (4096, 1, 1)
    (few,) = launches("forward_kl", (128, 10), torch.float32, backward=False)
    assert few.grid == (128, 1, 1)


def test_mixed_dtypes_keep_wide_loads():
    statistics, gradient = launches("forward_kl", LONG, teacher_dtype=torch.float32)
    (loop,) = wide_loops(statistics)
    assert loop["LDG.128"] == 3  # one of bfloat16, two of float32
    assert not complaints(gradient)


def test_float64_is_computed_in_float64():
    for shape in (LONG, (256, 1000)):
        for launch in launches("jensen_shannon", shape, torch.float64):
            assert analyse(launch).total["fp64"]


def test_where_a_tensor_lies_compiles_nothing_anew():
    """An allocator gives any multiple of 512 bytes; a step of a training must not wait for that."""
    room = torch.empty(4096 * 8192 + 1024, dtype=torch.bfloat16, device="meta")
    with capture("sm_90") as found, fastkd.backend("triton"):
        for start in (0, 256, 512, 1024):
            student = room[start : start + 4096 * 8192].view(4096, 8192)
            fastkd.forward_kl(student, torch.empty_like(student))
    assert len({id(launch.kernel) for launch in found}) == 1
