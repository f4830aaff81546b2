"""Particulars of textures and attention scores: sizes, masks, weights, directions of nothing."""

import itertools

import published
import pytest
import torch
import torch.nn.functional as F
from cases import named
from exactness import assert_as_exact, assert_same, exact, in_dtype, results
from inputs import DEVICE, normal
from meter import PeakMemory

import fastkd
from fastkd.problems import _maps

NST, FEW, FSP, VID, ATTENTION = named(
    "nst", "nst-few channels", "fsp", "vid-epsilon=0.01", "attention_mse"
)
EACH = pytest.mark.parametrize("case", [NST, FEW, FSP, VID, ATTENTION], ids=str)


def maps(*shapes, dtype=torch.float64, trained=1):
    networks = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return [x.requires_grad_(i < trained) for i, x in enumerate(networks)]


@pytest.mark.parametrize(
    "sizes", [((6, 6), (4, 4)), ((5, 8), (10, 4)), ((4, 4), (8, 8)), ((9,), (4,))], ids=str
)
def test_sizes_are_pooled_to_the_smaller_one(sizes):
    student, teacher = maps((3, 4, *sizes[0]), (3, 4, *sizes[1]))
    alpha = normal(4, seed=9)
    assert_same(
        results(fastkd.nst, [student, teacher]), results(published.nst, [student, teacher]), 1e-12
    )
    assert_same(
        results(fastkd.vid, [student, teacher, alpha]),
        results(published.vid, [student, teacher, alpha]),
    )
    layers = [student, teacher.sin(), teacher, student.detach().cos()]

    def fsp(first, of_teacher, second, of_teacher_2):
        return fastkd.fsp((first, second), (of_teacher, of_teacher_2))

    assert_same(results(fsp, layers), results(published.fsp, layers))


@pytest.mark.parametrize("length, n", [(7, 3), (12, 5), (10, 10), (8, 2), (5, 1), (33, 32)])
def test_pooling_is_that_of_torch(length, n):
    x = normal(2, 3, length, 5)
    assert_same([_maps.pooled(x, [n, 5])], [F.adaptive_avg_pool2d(x, (n, 5))])


def test_both_ways_through_the_channels_agree():
    """Gram matrices of channels or of positions are taken, whichever are less work."""
    for n_s, n_t, size in itertools.product((2, 30), (3, 40), (2, 9)):
        inputs = maps((2, n_s, size, size), (2, n_t, size, size))
        assert_same(results(fastkd.nst, inputs), results(published.nst, inputs), 1e-11)


@pytest.mark.parametrize("n_channels, size", [(40, 2), (3, 9)])
def test_channels_of_zeros_get_no_gradient(n_channels, size):
    student, teacher = maps(*2 * [(2, n_channels, size, size)])
    with torch.no_grad():
        student[:, 1], teacher[:, 2] = 0, 0
    loss, gradient = results(fastkd.nst, [student, teacher])
    assert_same([loss], [published.nst(student, teacher)], 1e-12)
    assert not gradient[:, 1].any() and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("n_channels, size", [(40, 2), (16, 9)])
def test_a_distance_is_not_negative(n_channels, size):
    """The terms cancel where the networks agree; rounding leaves their gradient as it is."""
    student, _ = maps(*2 * [(64, n_channels, size, size)], dtype=torch.float32)
    near = (student.detach() + 1e-6 * normal(*student.shape, seed=3).float()).requires_grad_()
    losses = fastkd.nst(near, student.detach(), reduction="none")
    assert (losses >= 0).all()
    assert torch.autograd.grad(losses.sum(), near)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EACH
def test_errors_are_at_most_those_of_what_people_write(case, dtype):
    inputs = in_dtype(dtype, case.inputs((5,), 33))
    truth = results(case.truth, exact(inputs))
    wide = in_dtype(torch.float32, inputs)
    eager = results(case.truth, wide)
    yardstick = [eager[0], *in_dtype(dtype, eager[1:])]
    assert_as_exact(results(case, inputs), yardstick, truth)


@pytest.mark.parametrize("size", [(32, 32), (6, 6)], ids=str)
def test_nst_takes_no_more_than_its_gram_matrices(size):
    """A full-size tensor for each gradient of a product, and the matrices of both networks."""
    n_channels = 64
    student, teacher = maps(*2 * [(4, n_channels, *size)], dtype=torch.float32)

    def peak(loss):
        student.grad = None
        with PeakMemory() as memory:
            loss(student, teacher).backward()
        return memory.peak_bytes

    gram = 4 * min(n_channels, size[0] * size[1]) ** 2 * 4
    assert peak(fastkd.nst) <= 4 * student.nbytes + 16 * gram
    assert peak(published.nst) > 2 * peak(fastkd.nst)


OF_ONE_EXAMPLE = {
    "nst": (fastkd.nst, 2, (64, 40, 40)),
    "fsp": (lambda s, t, s2, t2: fastkd.fsp((s, s2), (t, t2)), 4, (16, 200, 200)),
    "vid": (lambda s, t: fastkd.vid(s, t, torch.zeros(1)), 2, (1, 512, 512)),
    "attention_mse": (fastkd.attention_mse, 2, (1, 512, 512)),
}


def depends_on_threads(maps):
    """Return whether the BLAS cuts the product of the channels by the number of threads."""
    rows, found = maps.flatten(1), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(rows @ rows.T)
    torch.set_num_threads(1)
    return not all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("name", OF_ONE_EXAMPLE)
def test_one_example_is_the_same_for_any_number_of_threads(name):
    """A sum of all its numbers at once would be cut by the number of threads."""
    loss, n_maps, shape = OF_ONE_EXAMPLE[name]
    # products are as the BLAS of this machine makes them
    cuts_products = name in ("nst", "fsp") and depends_on_threads(normal(*shape).cpu().float())
    for seed in range(0, 8 * n_maps, n_maps):  # because sums may agree by luck
        maps = [normal(1, *shape, seed=seed + i, device="cpu").float() for i in range(n_maps)]
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(results(loss, [maps[0].requires_grad_(), *maps[1:]]))
        torch.set_num_threads(1)
        for y in found[1:]:
            if cuts_products:
                assert_same(y, found[0], 4e-6)
            else:
                assert all(torch.equal(*x) for x in zip(y, found[0], strict=True))


# --------------------------------------------------------------------------- weights and masks


@pytest.mark.parametrize("case", [NST, FEW, FSP, VID], ids=str)
def test_weights_of_examples(case):
    inputs = case.inputs((3,), 3)
    weights = torch.tensor([0.5, 0.0, 2.0], device=DEVICE)
    losses = case(*inputs, reduction="none")
    assert losses.shape == (3,)
    assert_same([losses.mean()], [case.truth(*inputs)])
    expected = (losses * weights).sum()
    assert_same([case(*inputs, weights=weights)], [expected / 2.5])
    assert_same([case(*inputs, weights=weights, normalizer=4)], [expected / 4])
    assert_same([case(*inputs, weights=weights, reduction="sum")], [expected])
    with torch.no_grad():
        for x in inputs:
            if x.ndim > 1:
                x[1] = torch.nan
    found = results(lambda *x: case(*x, weights=weights), inputs)
    assert_same(found[:1], [expected / 2.5])
    assert all(x.isfinite().all() for x in found)
    with pytest.raises(ValueError, match=r"the shape \[3\], got \[3, 3\]"):
        case(*inputs, weights=torch.ones(3, 3, device=DEVICE))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64], ids=str)
def test_positions_of_fsp_that_are_masked(kind):
    layers = maps((3, 4, 2, 3), (3, 5, 2, 3), (3, 4, 2, 3), (3, 5, 2, 3), trained=2)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [1] * 6, [0] * 6], device=DEVICE).view(3, 2, 3)

    def fsp(*layers, **options):
        return fastkd.fsp(layers[:2], layers[2:], reduction="none", **options)

    def one(i):
        return fsp(*(x[i : i + 1, :, mask[i] != 0] for x in layers))

    expected = torch.cat([one(0), one(1), torch.zeros(1, dtype=torch.float64, device=DEVICE)])
    of_expected = torch.autograd.grad(expected.sum(), layers[:2])
    with torch.no_grad():
        for x in layers:
            x.movedim(1, -1)[mask == 0] = torch.nan
    found = fsp(*layers, mask=mask.to(kind))
    gradients = torch.autograd.grad(found.sum(), layers[:2])
    assert_same([found, *gradients], [expected, *(x.nan_to_num() for x in of_expected)])


@pytest.mark.parametrize("heads", [(), (3,)], ids=str)
def test_tokens_of_scores_that_are_masked(heads):
    student, teacher = maps(*2 * [(4, *heads, 5, 5)])
    mask = torch.tensor([[1, 1, 0, 1, 0], [1] * 5, [0, 0, 1, 0, 0], [0] * 5], device=DEVICE)
    kept = [i.nonzero().flatten() for i in mask]
    squares = [
        (student[i][..., k[:, None], k] - teacher[i][..., k[:, None], k]).square().flatten()
        for i, k in enumerate(kept)
    ]
    expected = torch.cat(squares).mean()
    of_expected = torch.autograd.grad(expected, student)
    with torch.no_grad():
        for x in (student, teacher):
            x.movedim(-1, 1)[mask == 0], x.movedim(-2, 1)[mask == 0] = torch.nan, torch.inf
    for kind in (torch.bool, torch.int64):
        found = fastkd.attention_mse(student, teacher, mask=mask.to(kind))
        gradients = torch.autograd.grad(found, student)
        assert_same([found, *gradients], [expected, *of_expected])
    none = fastkd.attention_mse(student, teacher, mask=0 * mask)
    assert none == 0 and not torch.autograd.grad(none, student)[0].any()


def test_scores_that_exclude_count_as_none():
    student, teacher = maps(*2 * [(2, 3, 4, 4)])
    with torch.no_grad():
        student[..., 1], teacher[..., 2] = -torch.inf, -1e4
    s, t = student.detach().clone(), teacher.clone()
    s[..., 1], t[..., 2] = 0, 0
    loss, gradient = results(fastkd.attention_mse, [student, teacher])
    assert_same([loss], [F.mse_loss(s, t)])
    assert not gradient[..., 1].any() and gradient.isfinite().all()
    bound = torch.tensor(-1e-3, dtype=torch.float64, device=DEVICE)
    for below in (-1e-3, bound):
        loss = fastkd.attention_mse(student, teacher, masked_below=below)
        assert_same([loss], [F.mse_loss(s.clamp(min=0), t.clamp(min=0))], 1e-2)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: fastkd.fsp(x, x), "student must be the maps of two layers.*got Tensor"),
        (lambda x: fastkd.fsp((x,), (x, x)), r"\(first, second\), got 1 maps"),
        (lambda x: fastkd.fsp((x, x), (x, 3.0)), r"teacher\[1\] must be a tensor"),
        (lambda x: fastkd.fsp((x, x), (x, x[:, :2])), r"\[4, 4\] and \[4, 2\].*1×1 convolution"),
        (lambda x: fastkd.fsp((x, x[:1]), (x, x)), "all maps need the same examples"),
        (
            lambda x: fastkd.fsp((x, x), (x, x), mask=torch.ones(2, 3)),
            r"for each position: the shape \[2, 3, 3\], got \[2, 3\] of torch.float32",
        ),
        (
            lambda x: fastkd.fsp((x, x), (x, x[..., :2]), mask=torch.ones(2, 3, 3).bool()),
            "a mask needs maps of one size",
        ),
        (lambda x: fastkd.nst(x, x[:1]), "the same examples"),
        (lambda x: fastkd.nst(x[0, 0], x[0, 0]), r"needs the shape \[B, C, H, W\]"),
        (lambda x: fastkd.attention_mse(x, x[:, :2]), r"one shape.*\.mean\(1\).*minilm_relation"),
        (lambda x: fastkd.attention_mse(x[0, 0], x[0, 0]), r"needs the shape \[B, heads, L, L\]"),
        (lambda x: fastkd.attention_mse(x.long(), x), "must hold floating-point scores"),
        (lambda x: fastkd.attention_mse(x, x, mask=[1]), "mask must be a tensor, got list"),
        (
            lambda x: fastkd.attention_mse(x, x, mask=torch.ones(2, 4).bool()),
            r"for each token: the shape \[2, 3\], got \[2, 4\]",
        ),
        (
            lambda x: fastkd.attention_mse(x[..., :2], x[..., :2], mask=torch.ones(2, 2).bool()),
            "a mask of tokens needs scores of all against all",
        ),
        (lambda x: fastkd.attention_mse(x, x, masked_below="low"), "masked_below must be"),
        (lambda x: fastkd.vid(x, x, torch.zeros(4), epsilon=0.0), "epsilon must be .* above 0"),
    ],
)
def test_errors_have_their_way(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.zeros(2, 4, 3, 3))


@EACH
def test_formulas_compile_and_differentiate_twice(case):
    torch._dynamo.reset()
    inputs = case.inputs((3,), 5)
    compiled = torch.compile(case, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, inputs), results(case, inputs))
    small = case.inputs((2,), 3)
    with fastkd.backend("formula"):
        assert torch.autograd.gradgradcheck(lambda x: case(x, *small[1:]), small[:1])
