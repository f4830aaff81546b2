"""Particulars of compiled kernels of relations: of the examples of a batch, and of tokens."""

import pytest
import torch
from budgets import LARGE, VERSION
from choice import full, quick_if
from counts import compiled, launches_of, resources, the
from gate import capture
from sass import analyse
from tile_work import work_of

import fastkd
from fastkd.kernels.relations import launch as relations
from fastkd.kernels.relations.tiles import TILE
from fastkd.kernels.tokens import launch as tokens
from fastkd.problems.relations import Relations
from fastkd.problems.tokens import TokenRelations

HAS_LINKER = tuple(map(int, VERSION.split("."))) >= (3, 5)  # which gfx942 needs
MIB = 1 << 20


# -------------------------------------------------------------------------------------- relations

SIZES = [(256, 512), (64, 128), (1024, 512), (2048, 1024)]
RELATIONS = ["rkd", "rkd_angle", "rkd_distance"]


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@quick_if(lambda name, shape, dtype: (name, shape[0], dtype) == ("rkd", 256, torch.bfloat16))
def test_instructions_of_each_pair_and_third_point_launches_and_memory(name, shape, dtype):
    """The last launch is followed by the product with the upstream, which is PyTorch's."""
    run, (n, width) = compiled(the(name), shape, dtype, "sm_90"), shape
    kernels = ["transposes", "squares", "distances", "edges", "sum_splits", "laplacian"]
    missing = dict(rkd_angle="distances", rkd_distance="edges").get(name)
    assert [x.name for x in run.launches] == [x for x in kernels if x != missing]
    most = 8 * 4 * n * n if n >= 1024 else 12 * MIB
    if dtype == torch.float32:
        assert run.forward_bytes <= most and run.peak_bytes <= most + 4 * n * width
    forward = launches_of(name, shape, dtype, backward=False) if name == "rkd" else []
    if forward:
        assert [x.name for x in forward] == kernels[:-1]
    for found, instructions in ((run.launches, 36), (forward, 14)):
        for launch in (x for x in found if x.name == "edges"):
            report = analyse(launch)
            loop = max(report.loops, key=lambda loop: loop["load_bytes"])
            n_pairs = TILE.value**2 / (32 * report.warps)
            assert loop["instructions"] / n_pairs <= instructions
            assert not any(loop.get(x) for x in ("BAR", "LDS", "STS", "SHFL", "barriers", "MUFU"))


def relations_of(n, parts, precision, dtype, is_part):
    student = torch.empty(n, 96, dtype=dtype, device="meta")
    mine, whole = (student[: n // 2], student) if is_part else (student, None)
    return Relations(mine, student, whole, 25.0, 50.0, 1.0, parts, precision, 0)


@full
@pytest.mark.parametrize("target", LARGE)
@pytest.mark.parametrize("parts", ["distance", "angle", "both"])
@pytest.mark.parametrize("is_part", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_way_compiles_without_spills(target, parts, is_part, dtype):
    for n in (64, 1024):
        for needs_grad in (True, False):
            problem = relations_of(n, parts, "default", dtype, is_part)
            with capture(target) as found:
                relations.value_and_gradients(problem, (needs_grad,))
            for launch in found:
                counts = resources(launch, 4)
                if "warps_per_sm" not in counts:
                    assert not counts["spills"], launch.name
                elif dtype == torch.float32:
                    assert not counts["spills"], launch.name
                    assert counts["warps_per_sm"] >= 16
                    assert not analyse(launch).total["fp64"]
                else:  # its divisions are calls, around which registers are saved
                    assert not any(x["LDL"] + x["STL"] for x in analyse(launch).loops), launch.name


@full
def test_high_precision_is_float64_throughout():
    with capture("sm_90") as found:
        problem = relations_of(64, "both", "high", torch.bfloat16, False)
        relations.value_and_gradients(problem, (True,))
    for launch in found[1:]:  # the transposes compute nothing
        assert analyse(launch).total["fp64"], launch.name


def test_numbers_that_vary_compile_nothing_anew():
    found = set()
    for n, beta, weight in ((128, 1.0, 25.0), (128, 0.3, 2.0), (77, 0.3, 2.0), (500, 0.3, 2.0)):
        student = torch.empty(n, 96, device="meta", requires_grad=True)
        with capture("sm_90") as launched, fastkd.backend("triton"):
            fastkd.rkd(student, student.detach(), distance_weight=weight, smooth_l1_beta=beta)
        found.add(tuple(launch.asm["cubin"] for launch in launched))
    assert len(found) == 1


def test_numbers_that_would_be_rounded_or_waited_for_lie_on_the_device():
    """A Python float reaches a kernel as float32, and of a tensor one would have to wait."""
    there = torch.empty((), device="meta")
    for dtype, weight in ((torch.float32, 2.0), (torch.float32, there), (torch.float64, 2.0)):
        problem = relations_of(64, "distance", "default", dtype, False)
        with capture("sm_90") as found:
            relations.value_and_gradients(problem._replace(distance_weight=weight), (False,))
        is_there = dtype == torch.float64 or weight is there
        assert {x.args["ON_DEVICE"] for x in found[1:]} == {is_there}  # all but the transposes


def test_the_work_of_a_launch():
    """Every pair of different examples and itself meets every third once."""
    run = compiled(the("rkd"), (256, 512), torch.bfloat16, "sm_90")
    _, squares, _, edges, sum_splits, laplacian = map(work_of, run.launches)
    pairs = 36 * 32 * 32  # tiles on and above the diagonal
    assert edges.trips * edges.per_trip == pairs * 256
    assert squares.trips * squares.per_trip == 2 * pairs * 512
    assert laplacian.trips * laplacian.per_trip == 256 * 256 * 512
    n_splits = run.launches[3].grid[2]
    assert sum_splits.trips * sum_splits.per_trip == 256 * 256 * (n_splits - 1)


# ------------------------------------------------------------------------------------------ tokens

HALVES = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
TF32 = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
WIDTHS_OF_HEADS = [
    *((dtypes, width) for dtypes in HALVES for width in (24, 64, 128)),
    *((dtypes, width) for dtypes in TF32 for width in (16, 64)),
]
OPTIONS_OF_TOKENS = [  # masked, normalize, causal
    (False, False, False), (True, False, True), (True, True, True),
]  # fmt: skip


@pytest.mark.parametrize("target", LARGE)
@pytest.mark.parametrize("dtypes, width", WIDTHS_OF_HEADS)
@pytest.mark.parametrize("masked, normalize, causal", OPTIONS_OF_TOKENS)
@quick_if(
    lambda target, dtypes, width, masked, normalize, causal: (
        (target, dtypes[0], width) == ("sm_90", torch.bfloat16, 64) and causal and not normalize
    )
)
def test_tokens_compile_without_spills(
    target, dtypes, width, masked, normalize, causal, monkeypatch
):
    if target == "gfx942" and (dtypes in TF32 or not HAS_LINKER):
        pytest.skip("has no TF32, and needs an external linker before triton 3.5")
    monkeypatch.setattr(tokens, "_may_be_rounded", lambda: dtypes in TF32)
    student, teacher = (torch.empty(2, 100, 3 * width, dtype=x, device="meta") for x in dtypes)
    mask = torch.empty(2, 100, dtype=torch.bool, device="meta") if masked else None
    for divergence, removed, needs_grad in (
        ("kl", "", True), ("kl", "", False), ("mse", "teacher", True), ("mse", "both", False),
    ):  # fmt: skip
        problem = TokenRelations(
            student, teacher, mask, 1.0, 1.0, 3, divergence, normalize, causal, removed
        )
        assert tokens.takes(problem)
        with capture(target) as found:
            tokens.value_and_gradients(problem, (needs_grad,))
        assert len(found) == 1 + (divergence == "kl" and needs_grad)
        for launch in found:
            assert not resources(launch, 1)["spills"], launch.name


@pytest.mark.parametrize("shape", [(8, 512, 768), (32, 128, 768)], ids=str)
def test_products_launches_and_memory_of_tokens(shape):
    """Two numbers of the gradient for one of half precision, four for each token and head."""
    run, (n, length, width) = compiled(the("token_relation"), shape, torch.bfloat16, "sm_90"), shape
    works = [work_of(launch) for launch in run.launches]
    assert [x.name for x in run.launches] == ["relation_divergences", "relation_gradients"]
    assert sum(work.flops for work in works) == 5 * 2 * n * length**2 * width
    assert run.forward_bytes <= 4 * n * length * (width + 5 * 12) + MIB
    for launch in run.launches:
        walks = [loop for loop in analyse(launch).loops if loop["tensor"]]
        assert walks and all(loop["HGMMA"] == loop["tensor"] for loop in walks)
