"""Every kernel of the divergences, as the real launch sites start it, compiled for each target."""

import pytest
import torch
from gate import DEVICES, capture
from sass import analyse, complaints, per_element

import fastkd

LOSSES = {
    "forward_kl": fastkd.forward_kl,
    "reverse_kl": fastkd.reverse_kl,
    "symmetric_kl": fastkd.symmetric_kl,
    "soft_cross_entropy": fastkd.soft_cross_entropy,
    "jensen_shannon": fastkd.jensen_shannon,
    "skew_kl": fastkd.skew_kl,
    "skew_reverse_kl": fastkd.skew_reverse_kl,
    "total_variation": fastkd.total_variation,
    "kd": fastkd.kd,
}
MIXTURES = ("jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation")
LONG, ODD, FEW, ON_CHIP = (4096, 128256), (4096, 151669), (8, 128256), (8192, 8192)
CLASSES = [(128, 10), (128, 100), (256, 1000)]
# instructions and special functions for each element of a sweep over the rows
BUDGETS = {
    "forward_kl": (20, 2.5),
    "soft_cross_entropy": (20, 2.5),
    "reverse_kl": (20, 2.5),
    "symmetric_kl": (27, 2.5),
    "jensen_shannon": (25, 3.5),
    "skew_kl": (25, 4),
    "skew_reverse_kl": (25, 4),
    "total_variation": (20, 2.5),
}
each_loss = pytest.mark.parametrize("loss", LOSSES)


def launches(loss, shape, dtype=torch.bfloat16, target="sm_90", backward=True, teacher_dtype=None):
    student = torch.empty(shape, dtype=dtype, device="meta", requires_grad=backward)
    teacher = torch.empty(shape, dtype=teacher_dtype or dtype, device="meta")
    labels = [torch.empty(shape[:-1], dtype=torch.int64, device="meta")] if loss == "kd" else []
    with capture(target) as found, fastkd.backend("triton"):
        result = LOSSES[loss](student, teacher, *labels, temperature=2.0)
        if backward:
            result.backward()
    return found


def names(found):
    return [launch.name for launch in found]


def wide_loops(launch):
    """Of the innermost loops, those that sweep over a row."""
    return [loop for loop in analyse(launch).loops if loop["LDG.128"]]


@each_loss
@pytest.mark.parametrize("target", ["sm_90", "sm_80", "sm_100"])
def test_nothing_spills_and_all_vectors_are_wide(loss, target):
    shapes = [LONG, FEW, ON_CHIP] + (CLASSES if target == "sm_90" else [])
    for shape in shapes:
        dtype = torch.float32 if shape in CLASSES else torch.bfloat16
        for launch in launches(loss, shape, dtype, target):
            if launch.name == "combine":  # a few numbers for each row
                assert not analyse(launch).spills
            elif shape in CLASSES[:2]:  # rows shorter than a warp
                assert not analyse(launch).spills
                assert analyse(launch).warps_per_sm >= 16
            else:
                assert not complaints(launch)


@each_loss
def test_it_compiles_for_gfx942(loss):
    for shape in (LONG, FEW, ON_CHIP):
        for launch in launches(loss, shape, target="gfx942"):
            assert launch.asm["hsaco"]


@pytest.mark.parametrize("loss", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_instructions_of_the_sweeps(loss, dtype):
    (launch,) = launches(loss, LONG, dtype, backward=False)
    loops = wide_loops(launch)
    assert len(loops) == (2 if loss in MIXTURES else 1)
    most, most_mufu = BUDGETS[loss]
    for loop in loops:
        each = per_element(loop, loop["load_bytes"] / (2 * dtype.itemsize))
        assert each["instructions"] <= most
        assert each["mufu"] <= most_mufu
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


@each_loss
def test_launches(loss):
    assert names(launches(loss, LONG)) == ["row_statistics", "gradient"]
    assert names(launches(loss, ON_CHIP)) == ["whole_rows", "whole_rows"]
    for shape in CLASSES:
        assert names(launches(loss, shape)) == ["whole_rows", "whole_rows"]
    sweep = ["row_statistics", "combine"]
    assert names(launches(loss, FEW)) == sweep * (2 if loss in MIXTURES else 1) + ["gradient"]


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
