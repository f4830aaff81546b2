"""Tiles of similarities cost few launches and instructions on a GPU, and copy ahead."""

import re

import pytest
import torch
from choice import full, quick_if
from counts import compiled, main_walk
from sass import analyse
from step import count
from workloads import BY_NAME

from fastkd.kernels.pairs import tiling

SMALL = ["info_nce", "clip_contrastive", "siglip", "nt_xent", "sup_con"]
LOSSES = [*SMALL, "similarity_kl"]
SIZES = [(4096, 64), (4096, 128), (32768, 128), (32768, 256)]
BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(4096, 256), (1024, 64)], ids=str)
@quick_if(lambda name, shape: shape == (1024, 64) and name in ("clip_contrastive", "sup_con"))
def test_small_contrasts_launch_little(name, shape):
    """A small batch takes as long as the host does to start it."""
    assert count(BY_NAME[name], shape, BF16).launches <= 16


def loops_of_products(ptx):
    """Return the lines of each innermost loop with products of tensor cores."""
    lines = ptx.splitlines()
    labels = {line.rstrip(": \t").split(":")[0]: i for i, line in enumerate(lines) if ":" in line}
    found = []
    for i, line in enumerate(lines):
        jump = re.search(r"\bbra\S*\s+(\$\w+);", line)
        start = labels.get(jump[1], i) if jump else i
        if start < i and any("mma" in x for x in lines[start:i]):
            found.append(lines[start:i])
    return found


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120"])
@quick_if(
    lambda name, shape, target: (name, shape, target) == ("clip_contrastive", (32768, 256), "sm_90")
)
def test_the_next_tile_is_on_its_way_during_the_products(name, shape, target):
    """A loop waits for all copies but the latest ones, and spills nothing."""
    if (name, target) in (("similarity_kl", "sm_89"), ("similarity_kl", "sm_120")):
        if shape[1] == 256:
            pytest.skip("one tile of both networks fills the shared memory")
    for launch in compiled(BY_NAME[name], shape, BF16, target).launches:
        loops = loops_of_products(launch.asm["ptx"])
        assert bool(loops) == ("TILE" in launch.args)
        for loop in loops:
            waits = [int(x) for x in re.findall(r"cp\.async\.wait_group\s+(\d+);", "\n".join(loop))]
            assert waits and min(waits) >= 1, launch.name
        assert not analyse(launch).spills, launch.name


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@quick_if(lambda name, shape: (name, shape) == ("similarity_kl", (32768, 256)))
def test_tiles_fit_where_products_are_added_in_tensor_memory(name, shape):
    """There, slopes pass through shared memory; what does not fit would go through chunks."""
    launches = compiled(BY_NAME[name], shape, BF16, "sm_100").launches
    assert any("TILE" in x.args for x in launches)
    assert not [x.name for x in launches if x.name.endswith("_of_chunk")]
    assert not [x.name for x in launches if analyse(x).spills]


@full
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize("width", [64, 128])
def test_float32_is_on_its_way_too(target, width, monkeypatch):
    monkeypatch.setattr(tiling, "_may_be_rounded", lambda nvidia: nvidia)
    for name in ("info_nce", "clip_contrastive", "sup_con"):
        for launch in compiled(BY_NAME[name], (4096, width), F32, target).launches:
            waits = re.findall(r"cp\.async\.wait_group\s+(\d+);", launch.asm["ptx"])
            assert "TILE" not in launch.args or max(map(int, waits)) >= 1, launch.name
            assert not analyse(launch).spills, launch.name


@pytest.mark.parametrize("shape, most", [((32768, 256), 14), ((32768, 128), 13), ((4096, 64), 12)])
@quick_if(lambda shape, most: shape == (32768, 256))
def test_instructions_of_a_pair_for_the_sums_of_its_row_and_its_column(shape, most):
    """One exponential serves both; what a program stores, it does not read."""
    run = compiled(BY_NAME["clip_contrastive"], shape, BF16, "sm_90")
    (launch,) = (x for x in run.launches if x.name == "row_and_column_log_sums")
    tile, report = launch.args["TILE"], analyse(launch)
    pairs = tile.ROWS * tile.COLUMNS / (32 * report.warps)  # of a thread
    loop = main_walk(report.loops)
    assert loop["instructions"] <= most * pairs
    assert loop["mufu"] <= 1.25 * pairs
    assert not loop["LDG"]
    columns = launch.args["columns"]
    n_blocks = launch.grid[0]
    assert columns.total_ptr.shape == columns.largest_ptr.shape == (n_blocks, shape[0])
