"""The kernels of contrasts where they are launched: products, tensor cores, launches, memory."""

import pytest
import torch
from budgets import TARGETS, VERSION
from counts import FUSED, compiled, resources
from gate import capture
from sass import analyse
from tile_work import work_of

import fastkd
from fastkd.kernels import _similarities
from fastkd.portable import _similarities as portable

CONTRASTS = [case for case in FUSED if case.family.name in ("contrastive", "similarity")]
MOST_PRODUCTS = {"info_nce": 4, "clip_contrastive": 5, "siglip": 4, "nt_xent": 3, "sup_con": 3}
MOST_PRODUCTS["similarity_kl"] = 3 + 2  # of the student and of the teacher, which is as wide
MOST_LAUNCHES = {"clip_contrastive": 4}  # columns have sums of their own, and their sums an end

each_case = pytest.mark.parametrize("case", CONTRASTS, ids=lambda case: case.name)


def products(run, n, width):
    """In units of 2 N M D FLOPs."""
    works = [work_of(launch) for launch in run.launches]
    return sum(work.flops for work in works if work) / (2 * n**2 * width)


@each_case
@pytest.mark.parametrize("shape", [(32768, 256), (4096, 64), (1024, 128)], ids=str)
def test_products_launches_and_memory(case, shape):
    run, (n, width) = compiled(case, shape, torch.bfloat16, "sm_90"), shape
    assert products(run, n, width) == MOST_PRODUCTS[case.name]
    assert len(run.launches) == MOST_LAUNCHES.get(case.name, 2)
    # rows of float32 numbers for both sides, and what programs leave of columns and of shares
    of_programs = 2 * 4 * 132 * n + 2 * 4 * 132 * 64 * width
    assert run.peak_bytes <= 12 * 4 * n * width + of_programs + (1 << 20)
    if n == 32768:
        assert run.peak_bytes < 4 * n**2 / 8


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tensor_cores_make_the_products(case, dtype):
    """Of whole warp groups on Hopper, in the loss and in its gradient."""
    for shape in (case.family.compiled_sizes[0], case.family.compiled_sizes[-1]):
        launches = compiled(case, shape, dtype, "sm_90").launches
        swept = [analyse(launch) for launch in launches if work_of(launch)]
        assert len(swept) >= 2
        for report in swept:
            walks = [loop for loop in report.loops if loop["tensor"]]
            assert len(walks) >= 1
            assert all(loop["HGMMA"] == loop["tensor"] for loop in walks)


@each_case
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_float32_where_it_may_be_rounded(case, target, monkeypatch):
    monkeypatch.setattr(_similarities, "_may_be_rounded", lambda nvidia: nvidia)
    for shape in ((8192, 128), (1024, 64)):
        launches = compiled(case, shape, torch.float32, target).launches
        assert len(launches) == MOST_LAUNCHES.get(case.name, 2)
        for launch in launches:
            assert not analyse(launch).spills
            assert analyse(launch).total["tensor"] or not work_of(launch)


@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_networks_of_any_precision(dtype, teacher_dtype, monkeypatch):
    monkeypatch.setattr(_similarities, "_may_be_rounded", lambda nvidia: nvidia)
    student = torch.empty(8192, 128, dtype=dtype, device="meta").requires_grad_()
    teacher = torch.empty(8192, 128, dtype=teacher_dtype, device="meta")
    with capture("sm_90") as launches, fastkd.backend("triton"):
        torch.autograd.grad(fastkd.similarity_kl(student, teacher), student)
    assert len(launches) == 2
    for launch in launches:
        assert not analyse(launch).spills and analyse(launch).total["HGMMA"]


# what reads a chunk: its log-sum-exps or divergences or pairs, columns, slopes
SWEEPS = dict(info_nce=2, clip_contrastive=3, siglip=1, nt_xent=2, sup_con=2, similarity_kl=2)


@pytest.fixture(params=["plain", "halves"])
def multiplied(request, monkeypatch):
    """What cuBLAS multiplies: half precision only on a device."""
    if request.param == "halves":
        monkeypatch.setattr(portable, "multiplies_halves", lambda rows, half: bool(half))
        monkeypatch.setattr(portable, "_product", lambda a, b, out: out)
    return request.param


@each_case
@pytest.mark.parametrize(
    "target, multiplied",
    [(target, "plain") for target in TARGETS]
    + [(target, "halves") for target in TARGETS if target != "gfx942"],
    indirect=["multiplied"],
)
def test_what_goes_through_cublas(case, target, multiplied):
    """Wide embeddings, and float32 that is not to be rounded: 16 bytes at a time, no spills."""
    if target == "gfx942" and tuple(map(int, VERSION.split("."))) < (3, 5):
        pytest.skip("needs an external linker before triton 3.5")
    size = ((1024, 512), torch.bfloat16) if multiplied == "halves" else ((1000, 64), torch.float32)
    run = compiled(case, *size, target)
    assert len(run.launches) == SWEEPS[case.name]
    for launch in run.launches:
        assert not resources(launch, 1)["spills"]
        if target != "gfx942":
            counts = analyse(launch).main
            assert counts["LDG.128"]
            assert counts["instructions"] <= 64 * 16  # for the 16 pairs of a thread


@pytest.mark.parametrize("width", [1, 17, 100, 200])
def test_any_width(width):
    (case,) = (case for case in CONTRASTS if case.name == "info_nce")
    run = compiled(case, (1000, width), torch.bfloat16, "sm_90")
    assert len(run.launches) == 2
