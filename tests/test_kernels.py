"""Kernels in the interpreter: every division of the work, bytes, boundaries, halves and TF32."""

import math
from functools import partial

import pytest
import torch
from cases import LOSSES, named, of
from choice import pairwise, quick_if
from exactness import assert_as_exact, assert_exact, assert_same, by_formula, exact, results
from force import in_chunks_of, multiplying_halves, on_device_of, through_chunks
from inputs import DEVICE, EMULATED, INTERPRETED

import fastkd

if not INTERPRETED and not EMULATED:
    reason = "needs Triton's interpreter, TRITON_INTERPRET=1, or an emulated GPU, PTX_TARGET=sm_90"
    pytest.skip(reason, allow_module_level=True)

if INTERPRETED:
    from meter import Meter

from fastkd import _products as products
from fastkd.kernels.pairs import chunks, tiling
from fastkd.kernels.rows import gradients, launch, reading
from fastkd.portable import rows as twin
from fastkd.problems._temperatures import EPSILON
from fastkd.problems.rows import Rows

MIXTURES = ["jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation"]
DIVERGENCES = ["forward_kl", "reverse_kl", "symmetric_kl", "soft_cross_entropy", *MIXTURES]
ON_CHIP, LOOPED = 1000, 8192 + 2048 + 3  # whole vectors, a rest of them, and edges
PAIRS = of("pairs")
EACH = [case for case in LOSSES if case.problem == "pairs"]
each_pair = pytest.mark.parametrize("case", PAIRS, ids=str)
each_loss = pytest.mark.parametrize("case", EACH, ids=str)
each_way = pytest.mark.parametrize("way", ["tiles", "chunks"])
# Pairs, and columns of a block, that take several programs for a row of a chunk. Compiled ones have
# 128 threads: each must have columns of its own, because slopes replace what a second would read.
N_PAIRS, COLUMNS = (260, 256) if EMULATED else (19, 16)
STRIDED = named("info_nce", "sup_con", "siglip-logit_scale=5.0-logit_bias=-2.0")
SIGLIP = STRIDED[-1]


@pytest.fixture(autouse=True)
def triton():
    with fastkd.backend("triton"):
        yield


@pytest.fixture(params=["whole rows", "split rows"])
def division(request, monkeypatch):
    """One multiprocessor is filled by any row, many are not."""
    on_device_of(1 if request.param == "whole rows" else 132, monkeypatch)


def problem(divergence, student, teacher, labels=None, row_mask=None):
    return Rows(student, teacher, labels, row_mask, 2.0, 1.5, 0.3, 4.0, divergence)


def logits(n_rows, n_cols, dtype=torch.bfloat16):
    student, teacher = torch.randn(2, n_rows, n_cols).to(dtype)
    return student.requires_grad_(), teacher


# ------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("divergence", DIVERGENCES)
@quick_if(
    lambda divergence, division: divergence in DIVERGENCES[0 if division[0] == "w" else 1 :: 4]
)
def test_every_division_of_a_row_gives_its_sums(divergence, division):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 3, LOOPED, dtype=torch.float64, generator=generator)
    student[:, : LOOPED // 2] -= 50  # the pivots rise
    labels, mask = torch.tensor([LOOPED - 1, -1, 0]), torch.tensor([True, True, False])
    rows = problem(divergence, student, teacher, labels, mask)
    assert_solved(rows, rtol=1e-10)
    student[0, 5], teacher[2] = math.nan, -math.inf
    (losses, _), (gradient,) = launch.value_and_gradients(
        problem(divergence, student, teacher), (True,)
    )
    assert losses.isnan().tolist() == [True, False, True]
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()


def assert_solved(rows, rtol):
    """Compare the kernels with the portable engine."""
    weights = torch.tensor([0.5, -2, 3], dtype=torch.float64)
    found, expected = (
        engine.value_and_gradients(rows, (True,), row_weights=weights, ce_weights=weights + 1)
        for engine in (launch, twin)
    )
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("divergence", [*DIVERGENCES, "decoupled_kl"])
@quick_if(
    lambda divergence, division: (
        divergence in (["symmetric_kl"] if division[0] == "w" else ["jensen_shannon"])
    )
)
def test_every_division_of_a_standardized_row_gives_its_sums(divergence, division):
    """Rows of other scales and places, of excluded classes, and of a label that is smooth."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 3, LOOPED, dtype=torch.float64, generator=generator)
    student[:, : LOOPED // 2] -= 50  # the pivots rise
    student[1] = student[1] * 1e-3 - 2000
    for x in (student, teacher):
        x[1, 1024:5000] = -math.inf  # all that some threads read
    labels, mask = torch.tensor([LOOPED - 1, -1, 0]), torch.tensor([True, True, False])
    rows = problem(divergence, student, teacher, labels, mask)
    rows = rows._replace(standardized=True, label_smoothing=0.3)
    if divergence == "decoupled_kl":
        rows = rows._replace(labels=None, label_smoothing=0.0, apart=torch.tensor([7, 0, 2]))
    assert_solved(rows, rtol=1e-8)
    student[0], teacher[0] = 3.1, -0.7  # all equal, and so are the softmaxes
    (losses, _), (gradient,) = launch.value_and_gradients(
        rows._replace(student=student, teacher=teacher), (True,)
    )
    entropy = rows.scale * math.log(LOOPED) if divergence == "soft_cross_entropy" else 0.0
    assert losses[0] == pytest.approx(entropy, rel=1e-12, abs=0)
    # a skew divergence subtracts Σ q, which is 1 but for the last digit, from 1
    last_digit = 2.0**-52 / (LOOPED * EPSILON) if divergence.startswith("skew") else 0.0
    assert gradient[0].abs().max() <= last_digit


# what the targets of rows are made of: soft labels or classes, weights, smoothing
TARGETS = {
    "soft": (True, False, 0.0),
    "soft, smoothed": (True, False, 0.3),
    "soft, smoothed, weighted": (True, True, 0.3),
    "weighted": (False, True, 0.0),
    "smoothed": (False, False, 0.3),
    "smoothed, weighted": (False, True, 0.3),
}
each_target = pytest.mark.parametrize("target", TARGETS)


def labels_of(target, student):
    """Return labels of rows, of which the last is masked, and weights of classes."""
    are_soft, are_weighted, _ = TARGETS[target]
    n_rows, n_cols = student.shape
    labels = torch.tensor([n_cols - 1, 5, -1][:n_rows])
    if are_soft:
        labels = torch.rand(n_rows, n_cols).to(student.dtype)
        labels[0, :1024], labels[1], labels[2:] = 0, 0, math.nan
    return labels, torch.rand(n_cols).to(student.dtype) if are_weighted else None


@pytest.mark.parametrize("n_cols", [ON_CHIP, LOOPED])
@pytest.mark.parametrize("divergence", ["", "forward_kl", "jensen_shannon"])
@each_target
@quick_if(
    lambda target, divergence, n_cols, division: (
        divergence != "jensen_shannon" and (n_cols == LOOPED or division[0] == "w")
    )
)
def test_every_division_of_a_target_gives_its_sums(target, divergence, n_cols, division):
    """Masked rows hold NaN, and those without a target contribute nothing."""
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 3, n_cols, dtype=torch.float64)
    student[:, : n_cols // 2] -= 50  # the pivots rise
    student[0, 7], student[2] = -math.inf if target == "soft" else -1000, math.nan
    labels, weights = labels_of(target, student)
    rows = problem(divergence, student, teacher, labels, torch.tensor([True, True, False]))
    rows = rows._replace(label_smoothing=TARGETS[target][2], class_weights=weights)
    assert_solved(rows, rtol=1e-9)
    (losses, of_labels), (gradient,) = launch.value_and_gradients(
        rows, (True,), ce_weights=torch.ones(3, dtype=torch.float64)
    )
    assert losses[2] == of_labels[2] == 0 and not gradient[2].any()
    assert (of_labels[1] == 0) == (target == "soft")


@pytest.mark.parametrize("n_cols", [ON_CHIP, LOOPED])
@each_target
def test_targets_are_read_with_the_logits(target, n_cols, division):
    """Count the bytes of two networks and a gradient, and those of soft labels beside them."""
    torch.manual_seed(0)
    student, teacher = logits(2, n_cols)
    labels, weights = labels_of(target, student.detach())
    with Meter() as meter:
        fastkd.kd(
            student, teacher, labels, class_weights=weights, label_smoothing=TARGETS[target][2]
        ).backward()
    names = [x.name for x in meter.launches if x.name != "combine"]
    if n_cols == ON_CHIP:
        assert names == ["whole_rows"] * 2
    else:
        assert names == ["row_statistics", "gradient", "certain_classes"]
    moved = sum(
        argument.loaded + argument.stored
        for x in meter.launches
        for name, argument in x.arguments.items()
        if any(word in name for word in ("student", "teacher", "gradient", "soft"))
    )
    assert moved // student.numel() == (14 if TARGETS[target][0] else 10)


@pytest.mark.parametrize("n_cols", [ON_CHIP, LOOPED])
def test_gradients_in_place_overwrite_the_student_alone(n_cols, division):
    for divergence in ("reverse_kl", "jensen_shannon"):
        student, teacher = (x.detach() for x in logits(3, n_cols))
        rows = problem(divergence, student, teacher, torch.tensor([3, -1, n_cols - 1]))
        weights = dict(row_weights=torch.ones(3), ce_weights=torch.ones(3))
        expected = launch.value_and_gradients(rows, (True,), **weights)
        with Meter() as meter:
            found = launch.value_and_gradients(rows, (True,), **weights, in_place=True)
        assert not meter.races
        assert found[1][0] is student
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        is_on_chip = n_cols == ON_CHIP
        # bytes of bfloat16: two networks and a gradient, in one sweep or in two or three
        moved = sum(
            argument.loaded + argument.stored
            for x in meter.launches
            for name, argument in x.arguments.items()
            if any(word in name for word in ("student", "teacher", "gradient"))
        )
        sweeps_of_row = 2 if divergence in MIXTURES else 1
        assert moved // student.numel() == (6 if is_on_chip else 4 * sweeps_of_row + 6)


@pytest.mark.parametrize("upstream", [1.0, 0.3])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gradients_that_the_forward_makes(name, dtype, upstream, pytestconfig):
    """Compare with float64; where the upstream is 1, the backward has nothing left to do."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 3, ON_CHIP, generator=generator)
    inputs = [student.to(dtype).requires_grad_(), teacher.to(dtype)]
    function = getattr(fastkd, name)

    def step(inputs, count=lambda: 0):
        loss = function(*inputs)
        before = count()
        (gradient,) = torch.autograd.grad(loss, inputs[0], torch.full_like(loss, upstream))
        return [loss.detach(), gradient], count() - before

    launches = pytestconfig.emulator.launches if EMULATED else []
    found, n_instructions = step(inputs, lambda: sum(x.instructions for x in launches))
    if EMULATED:  # a kernel looks at the upstream, and returns
        assert (n_instructions < 50) == (upstream == 1)
    with fastkd.backend("formula"):
        (yardstick, _), (truth, _) = step(inputs), step(exact(inputs))
    assert_as_exact(found, yardstick, truth)


@pytest.mark.parametrize("n_cols", [ON_CHIP, LOOPED])
def test_masked_rows_are_not_read(n_cols, division):
    student, teacher = logits(4, n_cols)
    with Meter() as meter:
        fastkd.forward_kl(
            student, teacher, weights=torch.tensor([True, False, False, True])
        ).backward()
    read = [
        argument.loaded
        for x in meter.launches
        for name, argument in x.arguments.items()
        if name.replace("_", ".") == "teacher.ptr"
    ]
    if n_cols == LOOPED:  # on chip their reads cost nothing that shows
        assert sum(read) == 2 * student.numel()
    stored = [x.arguments["gradient_ptr"].stored for x in meter.launches]
    assert sum(stored) == 2 * student.numel()
    assert not student.grad[1:3].any()


VIEWS = {
    "contiguous": lambda rows, n: torch.randn(rows, n),
    "padded": lambda rows, n: torch.randn(rows, n + 24)[:, :n],
    "padded off the boundary": lambda rows, n: torch.randn(rows, n + 3)[:, :n],
    "all but the last": lambda rows, n: torch.randn(1, rows + 1, n)[:, :-1],
    "all but the first": lambda rows, n: torch.randn(1, rows + 1, n)[:, 1:],
    "inside a row": lambda rows, n: torch.randn(rows, n + 9)[:, 5 : n + 5],
    "transposed": lambda rows, n: torch.randn(n, rows).T,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("view", ["padded off the boundary", "inside a row"])
def test_vectors_start_on_their_boundary(view, dtype, division, monkeypatch):
    """The compiler is told so: on a GPU any other address would stop the kernel."""
    places = []

    def watched(pointer, offset, aligned):
        moved = pointer + offset
        if getattr(aligned, "value", aligned):
            places.extend(moved.handle.data.ravel() % 16)
        return moved

    if INTERPRETED:  # an emulated GPU reports by itself what is off
        for module in (reading, gradients):
            monkeypatch.setattr(module, "at_boundary", watched)
    student = VIEWS[view](3, LOOPED).to(dtype)
    room = torch.empty(3, LOOPED + 3, dtype=dtype)[:, :LOOPED].copy_(student)
    fastkd.forward_kl(room.requires_grad_(), VIEWS[view](3, LOOPED).to(dtype)).backward()
    assert EMULATED or (len(places) > 6 and not any(places))


SEEN_ALREADY = (7, 1), (LOOPED - 1, 1)  # in each layout of either network, by others


@pairwise(
    view=VIEWS, of_teacher=[*VIEWS], n_cols=[7, 257, LOOPED - 1, LOOPED + 6],
    multiprocessors=[1, 132],
)  # fmt: skip
@quick_if(lambda n_cols, multiprocessors: (n_cols, multiprocessors) not in SEEN_ALREADY)
def test_every_access_is_inside_and_every_output_written(
    view, of_teacher, n_cols, multiprocessors, monkeypatch
):
    on_device_of(multiprocessors, monkeypatch)
    student = VIEWS[view](3, n_cols).squeeze(0).requires_grad_()
    teacher = VIEWS[of_teacher](3, n_cols).bfloat16().squeeze(0)
    labels = torch.tensor([0, n_cols - 1, -100])
    name = "jensen_shannon" if n_cols % 2 else "forward_kl"
    with Meter() as meter:
        fastkd.kd(student, teacher, labels, divergence=name).backward()
    assert not meter.races
    losses = [x.arguments["losses_ptr"].unique_stored for x in meter.launches]
    assert sum(losses) == 3 * 4
    written = [x.arguments["gradient_ptr"] for x in meter.launches]
    for count in ("stored", "unique_stored"):
        assert sum(getattr(x, count) for x in written) == 3 * n_cols * 4


# ------------------------------------------------------------------------------------------ pairs


# few have several tiles of rows and add to their own sums, many share the columns of one
@pytest.mark.parametrize(
    "case, way",
    [
        pytest.param(case, way, id=f"{case}-{way}")
        for way, cases in (("tiles", [*PAIRS, *named("rkd")]), ("chunks", PAIRS))
        for case in cases
    ],
)
@pytest.mark.parametrize("multiprocessors", [1, 3, 1000])
@quick_if(
    lambda case, way, multiprocessors: (
        case in EACH and multiprocessors == (3 if way == "tiles" else 1000)
    )
)
def test_however_programs_share_the_work(case, way, multiprocessors, monkeypatch):
    if way == "chunks":
        through_chunks(monkeypatch, COLUMNS)
    on_device_of(multiprocessors, monkeypatch)
    inputs = case.inputs((100 if way == "tiles" else N_PAIRS,), 5)
    assert_same(results(case, inputs), results(case.truth, inputs), 1e-12)


@each_way
@pytest.mark.parametrize("case", STRIDED, ids=str)
@quick_if(lambda case, way: way == "tiles" or case in STRIDED[:1])
def test_weights_of_any_stride(case, way, monkeypatch):
    if way == "chunks":
        through_chunks(monkeypatch, COLUMNS)
    inputs = case.inputs((N_PAIRS,), 5)
    weights = torch.full((N_PAIRS, 3), torch.nan, device=DEVICE, dtype=torch.float64)[:, 0]
    weights.copy_(torch.arange(N_PAIRS))
    reduction = "mean" if case.name == "sup_con" else "sum"  # neither divides the weights before

    def found(weights):
        return results(partial(case, weights=weights, reduction=reduction), inputs)

    assert_same(found(weights), found(weights.contiguous()))


@each_way
def test_one_bias_of_all_images(way, monkeypatch):
    if way == "chunks":
        through_chunks(monkeypatch, COLUMNS)
    inputs = SIGLIP.inputs((N_PAIRS,), 5)
    inputs.append(torch.tensor(-2.0, dtype=torch.float64, device=DEVICE, requires_grad=True))

    def siglip(image, text, bias):
        return fastkd.siglip(image, text, 5.0, bias)

    assert_same(results(siglip, inputs), by_formula(siglip, inputs), 1e-10)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("engine", ["triton", "portable"])
@quick_if(
    lambda case, dtype, engine: (
        engine == "portable" or (dtype == torch.bfloat16) == (case in EACH[::2])
    )
)
def test_chunks_of_half_precision(case, dtype, engine, monkeypatch):
    """The loss is as exact as the formula, gradients to one more rounding, as tiles have them."""
    through_chunks(monkeypatch, COLUMNS)
    in_chunks_of(100, monkeypatch)
    multiplying_halves(monkeypatch)
    with fastkd.backend(engine):
        assert_exact(case, case.inputs((N_PAIRS,), 5, dtype), rounds_halves=True)


@pytest.mark.parametrize("can", [True, False])
def test_products_are_added_in_place_where_pytorch_can(can, monkeypatch):
    """It adds half precision to float32 on CUDA, in newer versions; older ones refuse."""
    multiplying_halves(monkeypatch)
    a, b = torch.randn(2, 16, 16).bfloat16()
    before, added = torch.randn(16, 16), []

    def addmm(sums, a, b, *, out_dtype, out):
        if not can:
            raise RuntimeError("self and mat2 must have the same dtype")
        assert out is sums and out_dtype == torch.float32
        added.append(a)
        return out.add_(a.float() @ b.float())

    monkeypatch.setattr(torch, "addmm", addmm)
    products._adds_in_place.cache_clear()
    sums = before.clone()
    for _ in range(2):
        products.add_product(a, b, sums)
    products._adds_in_place.cache_clear()
    torch.testing.assert_close(sums, before + 2 * (a.float() @ b.float()))
    assert len(added) == (3 if can else 0)  # a trial, and both


@pytest.mark.parametrize("n, m, n_rows", [(3, 1000, 3), (40, 1000, 16), (100, 1000, 16)])
def test_a_chunk_is_never_larger_than_all_of_it(n, m, n_rows, monkeypatch):
    """Several chunks have whole vectors of rows."""
    monkeypatch.setattr(chunks, "ELEMENTS", 15000)
    x, y, scale = torch.randn(n, 4), torch.randn(m, 4), torch.ones(())
    parts = chunks.Chunks(x, y, scale, first=-1, half="")
    buffer = parts.buffer()
    assert buffer.shape == (n_rows, m) and buffer.stride(0) % 16 == 0
    rows = [rows for rows, _ in parts.chunks(buffer)]
    assert [i for x in rows for i in range(x.start, x.stop)] == [*range(n)]


@each_pair
@quick_if(
    lambda case: case in EACH and case.name in ("clip_contrastive", "siglip", "similarity_kl")
)
def test_float32_where_it_may_be_rounded(case, monkeypatch):
    inputs = case.inputs((67,), 33, torch.float32)
    truth, by_chunks = results(case.truth, exact(inputs)), results(case, inputs)
    monkeypatch.setattr(tiling, "_may_be_rounded", lambda nvidia: True)
    found = results(case, inputs)
    for x, y in zip(found, truth, strict=True):  # of a TF32 number 11 digits are kept
        assert (x.double() - y).abs().max() <= 2**-7 * y.abs().max()
    # and by the kernels it was
    assert any(not torch.equal(x, y) for x, y in zip(found, by_chunks, strict=True))


def test_who_allows_the_rounding():
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        for precision, may in (("highest", False), ("high", True), ("medium", True)):
            torch.set_float32_matmul_precision(precision)
            assert tiling._may_be_rounded(True) == may == matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
