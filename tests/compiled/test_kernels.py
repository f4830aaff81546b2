"""Particulars of compiled kernels, where they are launched; the rest is in the budgets."""

import itertools
from math import prod

import pytest
import torch
from budgets import LARGE, SMALL, VERSION
from choice import full, pairwise, quick_if
from counts import FUSED, compiled, launches_of, resources, the
from gate import DEVICES, STAND_INS, StandIn, capture
from sass import analyse, complaints
from tile_work import work_of

import fastkd
from fastkd import _products as products
from fastkd.kernels.device import _warn_of_portable_engine, warn_of_chunks
from fastkd.kernels.pairs import tiling

HAS_LINKER = tuple(map(int, VERSION.split("."))) >= (3, 5)  # which gfx942 needs
LONG, ODD = (4096, 128256), (4096, 151669)
MIB = 1 << 20


# ------------------------------------------------------------------------------------------- rows


def wide_loops(launch):
    """Return the innermost loops that sweep over a row."""
    return [loop for loop in analyse(launch).loops if loop["LDG.128"]]


@pytest.mark.parametrize("loss, sweeps", [("forward_kl", 1), ("jensen_shannon", 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=full)])
def test_threads_sweep_over_long_rows_on_their_own(loss, sweeps, dtype):
    (launch,) = launches_of(loss, LONG, dtype, backward=False)
    loops = wide_loops(launch)
    assert len(loops) == sweeps
    assert not any(loop["barriers"] or loop["shuffles"] for loop in loops)


@pytest.mark.parametrize("loss", ["forward_kl", "jensen_shannon", "kd"])
@pytest.mark.parametrize("shape", [ODD, (4096, 50257)])
@quick_if(lambda loss, shape: loss == "forward_kl" and shape == ODD)
def test_rows_off_the_boundary_are_read_in_vectors(loss, shape):
    statistics, gradient, _ = launches_of(loss, shape)
    for loop in wide_loops(statistics):
        assert loop["load_bytes"] == 16 * loop["LDG.128"]
    assert len(wide_loops(statistics)) == len(analyse(statistics).loops)
    assert not complaints(gradient)
    assert analyse(gradient).outside["STG.128"]


@pytest.mark.parametrize("target", LARGE)
@quick_if(lambda target: target == "sm_90")
def test_as_many_programs_as_fill_the_device(target):
    if target == "gfx942" and not HAS_LINKER:
        pytest.skip("needs an external ld.lld before triton 3.5")
    (split, *_) = launches_of("forward_kl", (2, 262144), target=target, backward=False)
    assert split.grid[1] == 32  # columns / 8192, fewer than two programs a multiprocessor
    (whole, *_) = launches_of("forward_kl", (512, 262144), target=target, backward=False)
    assert whole.grid == (512, 1, 1)
    (many,) = launches_of("forward_kl", (1 << 20, 10), torch.float32, target, backward=False)
    (few,) = launches_of("forward_kl", (128, 10), torch.float32, target, backward=False)
    if target == "sm_90":  # small rows share programs
        assert (many.grid, few.grid) == ((1 << 15, 1, 1), (128, 1, 1))


@full
def test_mixed_dtypes_keep_wide_loads_and_float64_is_float64():
    statistics, gradient = launches_of("forward_kl", LONG, teacher_dtype=torch.float32)
    (loop,) = wide_loops(statistics)
    assert loop["LDG.128"] == 3  # one of bfloat16, two of float32
    assert not complaints(gradient)
    for shape in (LONG, (256, 1000)):
        for launch in launches_of("jensen_shannon", shape, torch.float64):
            assert analyse(launch).total["fp64"]


def test_where_a_tensor_lies_compiles_nothing_anew():
    """An allocator gives any multiple of 512 bytes; a step of a training must not wait for that."""
    room = torch.empty(4096 * 8192 + 1024, dtype=torch.bfloat16, device="meta")
    with capture("sm_90") as found, fastkd.backend("triton"):
        for start in (0, 256, 512, 1024):
            student = room[start : start + 4096 * 8192].view(4096, 8192)
            fastkd.forward_kl(student, torch.empty_like(student))
    assert len({id(launch.kernel) for launch in found}) == 1


# ------------------------------------------------------------------------------------------ pairs

PAIRS = [case for case in FUSED if case.problem == "pairs"]
MOST_PRODUCTS = {"info_nce": 4, "clip_contrastive": 5, "siglip": 4, "nt_xent": 3, "sup_con": 3}
MOST_PRODUCTS["similarity_kl"] = 3 + 2  # of the student and of the teacher, which is as wide
# two sweeps, or three; embeddings are laid out, the loss is made of sums, gradients of what is left
LAUNCHES = dict(info_nce=7, clip_contrastive=9, siglip=7, nt_xent=5, sup_con=6, similarity_kl=5)
# what reads a chunk: its log-sum-exps or divergences or pairs, columns, slopes
SWEEPS = dict(info_nce=2, clip_contrastive=3, siglip=1, nt_xent=2, sup_con=2, similarity_kl=2)
each_pair = pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.name)


@each_pair
@pytest.mark.parametrize("shape", [(4096, 64), (32768, 256), (1024, 128)], ids=str)
@quick_if(lambda case, shape: shape == (4096, 64) and case.name not in ("nt_xent", "sup_con"))
def test_products_launches_and_memory(case, shape):
    """Tensor cores make the products: whole warp groups on Hopper, in loss and gradient."""
    run, (n, width) = compiled(case, shape, torch.bfloat16, "sm_90"), shape
    works = [work_of(launch) for launch in run.launches]
    flops = sum(work.flops for work in works if work)
    assert flops / (2 * n**2 * width) == MOST_PRODUCTS[case.name]
    assert len(run.launches) == LAUNCHES[case.name]
    # rows of float32 numbers for both sides, the sums of splits, and two numbers of each column
    # for each block of rows, where columns are summed
    tiles = [x.args["TILE"] for x in run.launches if x.name == "row_and_column_log_sums"]
    of_blocks = sum(8 * n * n / tile.ROWS for tile in tiles)
    of_splits = 2 * 4 * 132 * 64 * width
    assert run.peak_bytes <= 12 * 4 * n * width + of_splits + of_blocks + MIB
    assert n < 32768 or run.peak_bytes < 4 * n**2 / 8
    swept = [analyse(launch) for launch in run.launches if work_of(launch)]
    assert len(swept) >= 2
    for report in swept:
        walks = [loop for loop in report.loops if loop["tensor"]]
        assert walks and all(loop["HGMMA"] == loop["tensor"] for loop in walks)


@full
@each_pair
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_float32_where_it_may_be_rounded(case, target, monkeypatch):
    monkeypatch.setattr(tiling, "_may_be_rounded", lambda nvidia: nvidia)
    for shape in ((8192, 128), (1024, 64)):
        found = compiled(case, shape, torch.float32, target).launches
        assert len(found) == LAUNCHES[case.name]
        for launch in found:
            assert not analyse(launch).spills
            assert analyse(launch).total["tensor"] or not work_of(launch)


@full
@pytest.mark.parametrize("dtypes", [*itertools.product([torch.bfloat16, torch.float32], repeat=2)])
def test_two_networks_of_any_precision(dtypes, monkeypatch):
    monkeypatch.setattr(tiling, "_may_be_rounded", lambda nvidia: nvidia)
    found = launches_of("similarity_kl", (8192, 128), dtypes[0], teacher_dtype=dtypes[1])
    assert len(found) == LAUNCHES["similarity_kl"]
    for launch in found:
        assert not analyse(launch).spills
        assert analyse(launch).total["HGMMA"] or not work_of(launch)


WIDE = [  # student and teacher
    ((torch.float32, 128), (torch.float32, 128)),
    ((torch.float32, 128), (torch.bfloat16, 256)),
    ((torch.bfloat16, 256), (torch.float32, 128)),
    ((torch.bfloat16, 256), (torch.bfloat16, 256)),
]


@pairwise(target=SMALL, networks=WIDE, has_keys=[False, True])
@quick_if(lambda target, networks: (target, networks) == ("sm_86", WIDE[0]))
def test_wide_tiles_of_two_networks_fit_on_small_devices(target, networks, has_keys, monkeypatch):
    """A program gets 99 KB of shared memory; what needs more would warn and go by chunks."""
    monkeypatch.setattr(tiling, "_may_be_rounded", lambda nvidia: nvidia)
    rows = [
        torch.empty(n, width, dtype=dtype, device="meta", requires_grad=i == 0)
        for n in (4096, 4000)
        for i, (dtype, width) in enumerate(networks)
    ]
    keys = dict(student_keys=rows[2], teacher_keys=rows[3]) if has_keys else {}
    with capture(target) as found, fastkd.backend("triton"):
        torch.autograd.grad(fastkd.similarity_kl(*rows[:2], **keys), rows[0])
    sweeps = ["divergences", *["weighed_differences"] * (1 + has_keys)]
    assert [x.name for x in found if work_of(x)] == sweeps
    assert not any(analyse(launch).spills for launch in found)


@pytest.mark.parametrize("name", ["info_nce", "similarity_kl"])
def test_tiles_that_fit_nowhere_go_by_chunks_with_a_warning(name, monkeypatch):
    small = StandIn(DEVICES["sm_90"]._replace(shared_bytes=8192), 2000)
    monkeypatch.setitem(STAND_INS, "sm_90", small)
    warn_of_chunks.cache_clear()
    with pytest.warns(UserWarning, match="need more shared memory than .* not 8192") as warned:
        for _ in range(2):
            run = compiled(the(name), (4096, 64), torch.bfloat16, "sm_90")
    assert len(warned) == 1
    # only the first sweep tells that tiles do not fit, after both sides are laid out
    names = [launch.name for launch in run.launches]
    assert names[:2] == ["lay_out"] * 2 and len(names[2:]) == SWEEPS[name]
    assert all("chunk" in name for name in names[2:])


@pytest.mark.parametrize(
    "name, shape", [("attention_transfer", (16, 64, 8, 8)), ("token_relation", (8, 512, 768))]
)
def test_what_fits_nowhere_is_left_to_the_portable_engine_with_a_warning(name, shape, monkeypatch):
    small = StandIn(DEVICES["sm_90"]._replace(shared_bytes=8), 2001)
    monkeypatch.setitem(STAND_INS, "sm_90", small)
    _warn_of_portable_engine.cache_clear()
    with pytest.warns(UserWarning, match="needs more shared memory than .* not 8.") as warned:
        for _ in range(2):
            run = compiled(the(name), shape, torch.bfloat16, "sm_90")
    needed = [launch.metadata.shared for launch in run.launches]
    assert len({str(x.message) for x in warned}) == len(warned)
    assert all(shared <= 8 for shared in needed)


@each_pair
@pytest.mark.parametrize("target", LARGE)
@pytest.mark.parametrize("halves", [False, True])
@quick_if(lambda case, target, halves: (case.name, target) == ("info_nce", "sm_90"))
def test_what_goes_through_cublas(case, target, halves, monkeypatch):
    """Wide embeddings, and float32 that is not to be rounded: 16 bytes at a time, no spills."""
    if target == "gfx942" and (halves or not HAS_LINKER):
        pytest.skip("multiplies no halves, and needs an external linker before triton 3.5")
    if halves:  # cuBLAS multiplies them, but on a device only
        monkeypatch.setattr(products, "multiplies_halves", lambda rows, half: bool(half))
    size = ((1024, 512), torch.bfloat16) if halves else ((1000, 64), torch.float32)
    run = compiled(case, *size, target)
    assert len(run.launches) == SWEEPS[case.name]
    for launch in run.launches:
        assert not resources(launch, 1)["spills"]
        if target != "gfx942":
            counts = analyse(launch).main
            assert counts["LDG.128"] and not counts["barriers"]
            assert counts["instructions"] <= 48 * 16  # for the 16 pairs of a thread, or more
            assert prod(launch.grid) >= launch.device.multiprocessors


@full
@pytest.mark.parametrize("width", [1, 17, 100, 200])
def test_pairs_of_any_width(width):
    run = compiled(the("info_nce"), (1000, width), torch.bfloat16, "sm_90")
    assert len(run.launches) == LAUNCHES["info_nce"]
