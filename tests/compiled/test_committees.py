"""Several networks at once as they are compiled: launches, bytes, and no spills."""

import pytest
import torch
from choice import quick_if
from counts import resources
from gate import capture
from step import count, of_kernel
from targets import ALLOWED, TARGETS, spills_of
from workloads import BY_NAME

import fastkd
from fastkd.problems.ensembles import COMBINATIONS

BF16 = torch.bfloat16
SHORT, LONG = (4096, 8192), (4096, 128256)  # rows that stay on chip, and those that do not


def launches_of(loss, shape, n, target="sm_90", dtype=BF16, n_trained=1, **options):
    """Return what a loss of n networks launches, the first of which are trained."""
    logits = [torch.empty(shape, dtype=dtype, device="meta") for _ in range(n)]
    trained = [x.requires_grad_() for x in logits[:n_trained]]
    arguments = [logits] if loss == "mutual_kl" else [logits[0], logits[1:]]
    with capture(target) as found, fastkd.backend("triton"):
        torch.autograd.grad(getattr(fastkd, loss)(*arguments, **options).sum(), trained)
    return found


@pytest.mark.parametrize("name, n_read, n_written", [("multi_teacher", 4, 1), ("mutual_kl", 2, 2)])
@pytest.mark.parametrize("shape", [(4096, 1000), SHORT, LONG], ids=str)
@quick_if(lambda name, n_read, n_written, shape: shape != SHORT)
def test_a_step_reads_all_once_in_each_launch(name, n_read, n_written, shape):
    """The forward of several teachers makes the gradient, which the backward keeps."""
    found = count(BY_NAME[name], shape, BF16)
    kernels = [x for x in found.operations if x.is_kernel]
    assert len(kernels) == 2 and found.launches <= 5
    n_sweeps = 1 if name == "multi_teacher" else 2
    expected = 2 * (n_sweeps * n_read + n_written)
    assert found.bytes / (shape[0] * shape[1]) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    "shape, divergence, n_sweeps",
    [(SHORT, "forward_kl", 1), (LONG, "forward_kl", 1), (LONG, "reverse_kl", 2)],
)
def test_three_teachers_cost_three_reads(shape, divergence, n_sweeps):
    """Beside one teacher there are the reads of two more, in every launch, and nothing else."""
    one, three = (
        sum(
            x.read + x.written
            for x in map(of_kernel, launches_of("multi_teacher", shape, n, divergence=divergence))
        )
        for n in (2, 4)
    )
    # the backward of a foreseen gradient is counted as nothing
    logits = 2 * shape[0] * shape[1]
    assert (three - one) / logits == pytest.approx(2 * n_sweeps, abs=0.01)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [SHORT, LONG], ids=str)
@pytest.mark.parametrize("combine", [*COMBINATIONS, "chosen"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("reduction", ["sum", "none"])  # with the gradient and without it
@quick_if(
    lambda target, shape, combine, divergence, reduction: (
        (target, divergence) == ("sm_90", "forward_kl") and combine == "mixture"
    )
)
def test_ensembles_compile_without_spills(target, shape, combine, divergence, reduction):
    options = dict(divergence=divergence, reduction=reduction)
    if combine == "chosen":
        options["teacher_index"] = torch.empty(shape[0], dtype=torch.int64, device="meta")
    else:
        options["combine"] = combine
    for launch in launches_of("multi_teacher", shape, 4, target, **options):
        assert spills_of(launch) <= ALLOWED.get(launch.name, 0), launch.name
        if "cubin" in launch.asm:
            assert resources(launch, 8)["warps_per_sm"] >= 8


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [SHORT, LONG], ids=str)
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("detach_peers", [True, False])
@quick_if(lambda target, shape, n, detach_peers: (target, n, detach_peers) == ("sm_90", 2, True))
def test_peers_compile_without_spills(target, shape, n, detach_peers):
    options = dict(detach_peers=detach_peers, n_trained=n)
    for launch in launches_of("mutual_kl", shape, n, target, **options):
        assert spills_of(launch) <= ALLOWED.get(launch.name, 0), launch.name
        if "cubin" in launch.asm:
            assert resources(launch, 2 * n)["warps_per_sm"] >= 8
