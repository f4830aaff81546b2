"""The kernels of relations where they are launched: work for each triple, launches, memory."""

import pytest
import torch
from counts import compiled, resources
from gate import DEVICES, capture
from sass import analyse
from tile_work import work_of

import fastkd
from fastkd.kernels import relational as kernels
from fastkd.kernels._relational_tiles import TILE

SIZES = [(64, 128), (256, 512), (1024, 512), (2048, 1024)]
MIB = 1 << 20


def step(loss, shape, dtype, trained=True):
    from cases import CASES

    (case,) = (case for case in CASES if case.loss is loss)
    if trained:
        return compiled(case, shape, dtype, "sm_90")
    inputs = [x.detach() for x in case.inputs(shape, dtype, "meta")]
    with capture("sm_90") as launches, fastkd.backend("triton"):
        case.fastkd(*inputs)
    return launches


def walk(launch):
    """The loop over third points, for each pair and point."""
    report = analyse(launch)
    loop = max(report.loops, key=lambda loop: loop["load_bytes"])
    n_pairs = TILE.value**2 / (32 * report.warps)
    return {what: number / n_pairs for what, number in loop.items()}


@pytest.mark.parametrize("loss", [fastkd.rkd, fastkd.rkd_angle])
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("trained, most", [(True, 36), (False, 14)])
def test_instructions_of_each_pair_and_third_point(loss, shape, dtype, trained, most):
    run = step(loss, shape, dtype, trained)
    (launch,) = (x for x in (run.launches if trained else run) if x.name == "edges")
    loop = walk(launch)
    assert loop["instructions"] <= most
    assert not any(loop.get(name) for name in ("BAR", "LDS", "STS", "SHFL", "barriers", "MUFU"))
    if trained:
        assert resources(launch, 4)["instructions"] == [loop["instructions"]]


@pytest.mark.parametrize("loss", [fastkd.rkd, fastkd.rkd_angle, fastkd.rkd_distance])
@pytest.mark.parametrize("shape", SIZES)
def test_launches_and_memory(loss, shape):
    """And the product with the upstream, which is PyTorch's."""
    n, n_features = shape
    run = step(loss, shape, torch.float32)
    names = [launch.name for launch in run.launches]
    of_both = ["squares", "distances", "edges", "sum_splits", "laplacian"]
    left_out = {fastkd.rkd_angle: "distances", fastkd.rkd_distance: "edges"}.get(loss)
    assert names == [name for name in of_both if name != left_out]
    most = 8 * 4 * n * n if n >= 1024 else 12 * MIB
    assert run.forward_bytes <= most and run.peak_bytes <= most + 4 * n * n_features
    assert [launch.name for launch in step(loss, shape, torch.float32, False)] == names[:-1]


def problem(n, parts, precision, trained, part, dtype):
    student = torch.empty(n, 96, dtype=dtype, device="meta")
    own, everyone = (student[: n // 2], student) if part else (student, None)
    return own, student, everyone, 25.0, 50.0, 1.0, parts, precision, trained, 0


@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("parts", ["distance", "angle", "both"])
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_way_compiles_without_spills(target, parts, part, dtype):
    for n in (64, 1024):
        for trained in (True, False):
            with capture(target) as launches:
                kernels.forward(*problem(n, parts, "default", trained, part, dtype))
            for launch in launches:
                counts = resources(launch, 4)
                if "warps_per_sm" not in counts:
                    assert not counts["spills"], launch.name
                elif dtype == torch.float32:
                    assert not counts["spills"], launch.name
                    assert counts["warps_per_sm"] >= 16
                    assert not analyse(launch).total["fp64"]
                else:  # its divisions are calls, around which registers are saved
                    assert not any(x["LDL"] + x["STL"] for x in analyse(launch).loops), launch.name


def test_high_precision_is_float64_throughout():
    with capture("sm_90") as launches:
        kernels.forward(*problem(64, "both", "high", True, False, torch.bfloat16))
    for launch in launches:
        assert analyse(launch).total["fp64"], launch.name


def test_numbers_that_vary_compile_nothing_anew():
    found = set()
    for n, beta, weight in ((128, 1.0, 25.0), (128, 0.3, 2.0), (77, 0.3, 2.0), (500, 0.3, 2.0)):
        student = torch.empty(n, 96, device="meta", requires_grad=True)
        with capture("sm_90") as launches, fastkd.backend("triton"):
            fastkd.rkd(student, student.detach(), distance_weight=weight, smooth_l1_beta=beta)
        found.add(tuple(launch.asm["cubin"] for launch in launches))
    assert len(found) == 1


def test_the_work_of_a_launch():
    """Every pair of different examples and itself meets every third once."""
    run = step(fastkd.rkd, (256, 512), torch.bfloat16)
    squares, _, edges, sum_splits, laplacian = map(work_of, run.launches)
    pairs = 36 * 32 * 32  # tiles on and above the diagonal
    assert edges.trips * edges.per_trip == pairs * 256
    assert squares.trips * squares.per_trip == 2 * pairs * 512
    assert laplacian.trips * laplacian.per_trip == 256 * 256 * 512
    n_splits = run.launches[2].grid[2]
    assert sum_splits.trips * sum_splits.per_trip == 256 * 256 * (n_splits - 1)
