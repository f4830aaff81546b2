"""The engines of features: the same numbers, bytes and memory, chunks, huge pages."""

from functools import partial

import pytest
import torch
from choice import pairwise, quick_if
from exactness import results
from force import in_chunks_of, on_device_of
from inputs import DEVICE, INTERPRETED, normal
from meter import PeakMemory

import fastkd
from fastkd import _pages
from fastkd.portable import moments as portable
from fastkd.problems.moments import Maps, Moments

KINDS = ["mse", "smooth_l1", "cosine", "normalized_mse"]  # of two networks
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
ONES = ["sum", "max"]  # kinds of one network
# positions and features that are several tiles, with rests, or less than one
DIVISIONS = {"walks": (2, 11, 300), "long rows": (1, 3, 1100), "many": (3, 150, 5)}


def laid_out(x, layout):
    """Return [B, P, C] with the features, the positions or nothing contiguous."""
    if layout == "features":
        return x.contiguous()
    if layout == "positions":
        return x.mT.contiguous().mT
    return x.repeat_interleave(2, 2)[..., ::2]


@interpreted
@pairwise(
    kind=[*KINDS, *ONES], division=DIVISIONS, student=["features", "positions", "neither"],
    teacher=["features", "positions", "neither"], number=[2.0, 2.5, torch.tensor(0.5)],
    masked=[False, True],
)  # fmt: skip
def test_the_kernels_are_the_twin_of_the_portable_engine(
    kind, division, student, teacher, number, masked, monkeypatch
):
    from fastkd.kernels.moments import launch

    shape = DIVISIONS[division]
    if division == "many":  # which share programs on a small device
        on_device_of(1, monkeypatch)
    s, t = laid_out(normal(*shape), student), laid_out(normal(*shape, seed=1), teacher)
    mask = normal(*shape[:2], seed=2) > 0 if masked else None
    if masked:
        s, t = (x.masked_fill(~mask[..., None], torch.nan) for x in (s, t))
        s, t = laid_out(s, student), laid_out(t, teacher)
    weights = normal(*shape[:2], seed=4) if masked and student == teacher else None
    problem = Moments(s, None if kind in ONES else t, mask, weights, number, kind)
    upstream, found = normal(*shape[:2], seed=3), []
    if division == "many":  # as the gradient of a plain mean comes
        upstream = upstream[:1, :1].expand(shape[:2])
    for engine in (launch, portable):
        (values,), (statistics,) = engine.forward(problem, (True,))
        assert statistics.shape == (*shape[:2], engine.n_statistics(problem))
        gradient = engine.backward(problem, statistics, (upstream,))
        assert gradient.stride() == torch.empty_like(s).stride()
        found.append([values, gradient])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@interpreted
@pytest.mark.parametrize("kind", [*KINDS, *ONES])
def test_kernels_know_where_vectors_lie_in_each_tensor(kind):
    """The gradient of expanded features is laid out otherwise, and features may have gaps."""
    from fastkd.kernels.moments import launch

    students = {
        "one feature, expanded": normal(2, 5, 1).expand(2, 5, 6),
        "one position, expanded": normal(2, 1, 6).expand(2, 5, 6),
        "one position": normal(5, 1, 6),
    }
    for student in students.values():
        teacher = normal(*student.shape[:-1], 12, seed=1)[..., ::2]
        problem = Moments(student, None if kind in ONES else teacher, None, None, 1.5, kind)
        upstream, found = normal(*student.shape[:-1], seed=2), []
        for engine in (launch, portable):
            (values,), (statistics,) = engine.forward(problem, (True,))
            found.append((values, engine.backward(problem, statistics, (upstream,))))
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@interpreted
@pytest.mark.parametrize("shape", [(3, 6), (1, 1), (2, 5003)])
def test_maps_are_compared_as_by_the_portable_engine(shape):
    from fastkd.kernels.moments import launch

    maps_of_two = Maps(*(1e30 * normal(*shape, seed=i).abs() for i in range(2)))
    maps_of_two.student[0] = 0
    for needs_grad in ((True,), (False,)):
        (loss, (gradient,)), (expected, (slopes,)) = (
            engine.value_and_gradients(maps_of_two, needs_grad) for engine in (launch, portable)
        )
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        assert (gradient is None) == (slopes is None) == (not needs_grad[0])
        if needs_grad[0]:
            torch.testing.assert_close(gradient, slopes, rtol=1e-9, atol=1e-45)
            assert shape == (1, 1) or gradient.any()


@interpreted
@pytest.mark.parametrize("layout", ["features", "positions"])
@pytest.mark.parametrize("kind", [*KINDS, *ONES])
@quick_if(lambda kind, layout: (layout == "features") == (kind in [*KINDS, *ONES][::2]))
def test_bytes_that_the_kernels_move(kind, layout):
    """Each network is read once by each launch, and the gradient is written once."""
    from meter import Meter

    from fastkd.kernels.moments import launch

    n_networks = 1 if kind in ONES else 2
    s, t = (laid_out(normal(2, 16, 48, seed=i).bfloat16(), layout) for i in range(2))
    problem = Moments(s, None if kind in ONES else t, None, None, 2.0, kind)
    with Meter() as forward:
        (values,), (statistics,) = launch.forward(problem, (True,))
    with Meter() as backward:
        launch.backward(problem, statistics, (torch.ones_like(values),))
    assert len(forward.launches) == len(backward.launches) == 1
    assert not forward.races and not backward.races
    for launched, n_written in ((forward.launches[0], 0), (backward.launches[0], 1)):
        moved = [x for name, x in launched.arguments.items() if name.endswith(".ptr")]
        assert sum(x.loaded for x in moved) == n_networks * s.nbytes
        assert sum(x.stored for x in moved) == n_written * s.nbytes
    # for each position a value, two statistics where there are some, and what the backward reads
    numbers = 4 * values.numel() * launch.n_statistics(problem)
    assert forward.traffic == n_networks * s.nbytes + 4 * values.numel() + numbers


@interpreted
def test_masked_positions_are_not_read_where_features_are_last():
    from meter import Meter

    from fastkd.kernels.moments import launch

    s, t = (normal(2, 6, 40, dtype=torch.float32, seed=i) for i in range(2))
    mask = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE)
    mask[0, 2] = mask[1, 5] = True
    with Meter() as meter:
        launch.forward(Moments(s, t, mask, None, 0.0, "mse"), (True,))
    assert meter.launches[0].arguments["student.ptr"].loaded == 2 * 40 * 4


@pytest.mark.parametrize("layout", ["features", "positions"])
def test_memory_is_the_gradient_and_a_chunk(layout, monkeypatch):
    """Besides the gradient: at most four buffers of a chunk, and eight numbers a position."""
    n, chunk = 64, 1 << 13
    in_chunks_of(chunk, monkeypatch)
    inputs = [normal(n, 32, 8, 8, dtype=torch.float32, seed=i) for i in range(2)]
    if layout == "features":
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    inputs[0].requires_grad_()
    size, few = inputs[0].nbytes, 8 * 8 * n * 64

    def peak(loss):
        with PeakMemory() as memory:
            torch.autograd.grad(loss(*inputs), inputs[0])
        return memory.peak_bytes

    losses = [partial(fastkd.hint, kind=kind) for kind in KINDS]
    losses += [partial(fastkd.attention_transfer, p=p, kind=kind) for p in (2, 3) for kind in ONES]
    for loss in losses:
        with fastkd.backend("portable"):
            assert size < peak(loss) <= size + 4 * 4 * chunk + few
        with fastkd.backend("formula"):
            assert peak(loss) >= 2 * size


def test_large_tensors_ask_for_huge_pages(monkeypatch):
    """Advice is for whole pages inside the tensor, and for nothing that has no such page."""
    asked, page = [], 1 << 21
    monkeypatch.setattr(_pages, "_advise", lambda: lambda *arguments: asked.append(arguments))
    fresh = torch.empty(3 * page, dtype=torch.uint8)
    assert _pages.in_huge_pages(fresh) is fresh
    ((start, size, _),) = asked
    assert start % page == size % page == 0 and size >= 2 * page
    assert fresh.data_ptr() <= start and start + size <= fresh.data_ptr() + fresh.nbytes
    for other in (torch.empty(page), fresh.to("meta")):
        _pages.in_huge_pages(other[: page // 4])
    assert len(asked) == 1
    monkeypatch.setattr(_pages, "_advise", lambda: None)  # as other systems have it
    assert _pages.in_huge_pages(fresh) is fresh


def test_a_small_layer_is_one_chunk():
    inputs = [normal(4, 8, 6, 6, dtype=torch.float32, seed=i) for i in range(2)]
    with fastkd.backend("portable"), PeakMemory() as memory:
        fastkd.hint(*inputs)
    assert memory.operations <= 10


def test_workers_and_chunks_change_no_bit(monkeypatch):
    """Chunks depend on the sizes alone, whatever takes them."""
    in_chunks_of(1 << 10, monkeypatch)
    found, n_threads = [], torch.get_num_threads()
    inputs = [normal(5, 24, 7, 9, dtype=torch.float32, seed=i) for i in range(2)]
    inputs[0].requires_grad_()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            with fastkd.backend("portable"):
                found.append(
                    results(partial(fastkd.hint, kind="cosine"), inputs)
                    + results(fastkd.attention_transfer, inputs)
                )
    finally:
        torch.set_num_threads(n_threads)
    assert all(map(torch.equal, *found))
