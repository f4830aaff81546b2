"""Particulars of the losses of features: positions, layouts, masks, pooling, maps."""

from functools import partial

import published
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, INTERPRETED, maps, normal
from choice import pairwise
from exactness import assert_same, results
from force import in_chunks_of, on_device_of
from meter import PeakMemory

import fastkd
from fastkd.portable import _pages
from fastkd.portable import moments as portable
from fastkd.problems.moments import Maps, Moments

KINDS = ["mse", "smooth_l1", "cosine", "normalized_mse"]


def pair(*shape, dtype=torch.float64):
    """Return features of student and teacher."""
    student, teacher = (normal(*shape, dtype=dtype, seed=seed) for seed in range(2))
    return [student.requires_grad_(), teacher]


# --------------------------------------------------------------------------------------- positions

LAYOUTS = {
    # shape, options, shapes of weights that fit
    "rows": ((5, 4), {}, [(5,), (5, 1), (1,)]),
    "sequences": ((3, 5, 4), {}, [(3, 5), (3, 5, 1), (3, 1), (5,), ()]),
    "tokens first": ((5, 3, 4), dict(batch_dim=1), [(5, 3), (5, 1), (1, 3, 1)]),
    "maps": ((3, 4, 2, 5), {}, [(3, 2, 5), (3, 1, 2, 5), (2, 5), (3, 1, 1), (1, 1, 1, 5)]),
    "features last": ((3, 2, 5, 4), dict(feature_dim=-1), [(3, 2, 5), (3, 2, 5, 1), (5,)]),
    "volumes": ((2, 4, 3, 1, 2), {}, [(2, 3, 1, 2), (3, 1, 2), (2, 1, 3, 1, 2)]),
    "features first": ((4, 3, 5), dict(feature_dim=0, batch_dim=1), [(3, 5), (1, 3, 5), (5,)]),
}


@pairwise(
    layout=LAYOUTS, kind=KINDS, reduction=["mean", "sum", "none"], engine=["portable", "triton"]
)
def test_weights_of_every_layout(layout, kind, reduction, engine):
    shape, options, of_weights = LAYOUTS[layout]
    options, inputs = dict(options, kind=kind, reduction=reduction), pair(*shape)
    (feature,) = (i for i, size in enumerate(shape) if size == 4)  # each has four features
    sizes = [*shape[:feature], *shape[feature + 1 :]]
    for i, own in enumerate(of_weights):
        weights = normal(*own, seed=3 + i).abs()
        if weights.numel() > 1:
            weights.view(-1)[0] = 0
        of_each = weights.squeeze(feature) if weights.ndim == len(shape) else weights
        of_each = of_each.expand(sizes)
        for given, whole in ((weights, of_each), (weights > 0.5, of_each > 0.5)):
            found = results(partial(fastkd.hint, weights=given, **options), inputs)
            truth = results(partial(published.hint, weights=whole, **options), inputs)
            assert_same(found, truth)


def test_the_default_feature_dimension_is_that_of_maps_and_of_sequences(engine):
    for shape, dim in (((3, 4), -1), ((3, 5, 4), -1), ((3, 4, 2, 5), 1), ((2, 4, 3, 1, 2), 1)):
        inputs, weights = pair(*shape), normal(*shape[:1], *[1] * (len(shape) - 2)).abs()
        found = fastkd.hint(*inputs, weights=weights)
        assert torch.equal(found, fastkd.hint(*inputs, weights=weights, feature_dim=dim))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_may_hold_anything(kind, engine):
    """NaN and infinity reach neither the loss nor another position, and get the gradient 0."""
    inputs, mask = pair(3, 4, 2, 5), normal(3, 2, 5, seed=5) > 0
    weights = normal(3, 2, 5, seed=6).abs()
    expected = results(partial(fastkd.hint, kind=kind, mask=mask, weights=weights), inputs)
    assert not expected[1].movedim(1, -1)[~mask].any()
    assert expected[1].movedim(1, -1)[mask].all()
    without = fastkd.hint(*inputs, kind=kind, weights=weights)
    assert abs(float(without.detach() - expected[0])) > 1e-3
    masked = ~mask[:, None].expand(-1, 4, -1, -1)
    for value in (torch.nan, torch.inf):
        dirty = [x.detach().masked_fill(masked, value) for x in inputs]
        dirty[0].requires_grad_()
        for options in (
            dict(mask=mask, weights=weights.masked_fill(~mask, value)),
            dict(mask=mask.long(), weights=weights),
            dict(weights=torch.where(mask, weights, 0)),
        ):
            found = results(partial(fastkd.hint, kind=kind, **options), dirty)
            assert_same(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_position_left(reduction, engine):
    inputs = pair(3, 5, 4)
    for options in (
        dict(mask=torch.zeros(3, 5, dtype=torch.bool, device=DEVICE)),
        dict(weights=torch.zeros(3, 5, device=DEVICE)),
    ):
        loss, gradient = results(partial(fastkd.hint, reduction=reduction, **options), inputs)
        assert not loss.any() and not gradient.any()
    if reduction == "none":  # one example without a position among others
        mask = torch.ones(3, 5, dtype=torch.bool, device=DEVICE)
        mask[1] = False
        loss, gradient = results(partial(fastkd.hint, mask=mask, reduction="none"), inputs)
        assert not loss[1] and not gradient[1].any() and loss[0] and gradient[2].all()


def test_the_normalizer_replaces_the_divisor(engine):
    inputs, weights = pair(3, 5, 4), normal(3, 5, seed=2).abs()
    total = fastkd.hint(*inputs, weights=weights, reduction="sum")
    for normalizer in (7, 2.5, torch.tensor([7.0], device=DEVICE)):
        found = fastkd.hint(*inputs, weights=weights, normalizer=normalizer)
        torch.testing.assert_close(found, total / float(normalizer))


def test_weights_that_are_learnt_get_a_gradient(engine):
    inputs, weights = pair(3, 5, 4), normal(3, 5, seed=2).abs().requires_grad_()
    for reduction in ("mean", "sum", "none"):
        options = dict(reduction=reduction)
        found, truth = (
            torch.autograd.grad(loss(*inputs, weights, **options).sum(), [inputs[0], weights])
            for loss in (lambda s, t, w, **o: fastkd.hint(s, t, weights=w, **o), published.hint)
        )
        assert_same(found, truth)


def test_what_users_write(engine):
    """The detector trainer's score, a tokenizer's mask, and the plain mean."""
    student, teacher = pair(3, 4, 2, 5)
    score = normal(3, 1, 2, 5, seed=3).sigmoid()
    written = ((student - teacher) ** 2 * score).sum() / (score.sum() * 4 + 1e-9)
    torch.testing.assert_close(fastkd.hint(student, teacher, weights=score), written)
    torch.testing.assert_close(fastkd.hint(student, teacher), F.mse_loss(student, teacher))
    student, teacher = pair(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], device=DEVICE)
    s, t = (x[mask.bool()] for x in (student, teacher))
    written = F.cosine_embedding_loss(s, t, torch.ones(len(s), device=DEVICE))
    torch.testing.assert_close(fastkd.hint(student, teacher, mask=mask, kind="cosine"), written)
    squares = F.mse_loss(student, teacher, reduction="none")
    written = (squares * mask[..., None]).sum() / (mask.sum() * 4)
    torch.testing.assert_close(fastkd.hint(student, teacher, mask=mask), written)
    torch.testing.assert_close(fastkd.hint(student, teacher, reduction="sum") * 4, squares.sum())


@pytest.mark.parametrize("kind", ["cosine", "normalized_mse"])
def test_positions_of_zeros_have_no_direction(kind, engine):
    student, teacher = pair(3, 5, 4)
    for x in (student, teacher):
        x.detach()[0, 1] = 0
    student.detach()[1, 2], teacher.detach()[2, 3] = 0, 0
    _, gradient = results(partial(fastkd.hint, kind=kind, reduction="sum"), [student, teacher])
    assert not gradient[0, 1].any() and not gradient[1, 2].any()
    assert gradient.abs().max() < 100
    values = fastkd.hint(
        student.flatten(0, 1), teacher.flatten(0, 1), kind=kind, reduction="none"
    ).view(3, 5)
    expected = {"cosine": [1.0, 1.0, 1.0], "normalized_mse": [0.0, 0.25, 0.25]}[kind]
    found = torch.stack([values[0, 1], values[1, 2], values[2, 3]])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype, device=DEVICE))


@pytest.mark.parametrize("beta", [0.0, 0.3, torch.tensor(0.3)], ids=str)
def test_the_linear_part_of_smooth_l1(beta, engine):
    inputs, beta = pair(3, 4, 2, 5), beta.to(DEVICE) if isinstance(beta, torch.Tensor) else beta
    inputs[0].detach()[0, 0] = inputs[1][0, 0]  # where the slope of |s − t| is 0
    found = results(partial(fastkd.hint, kind="smooth_l1", beta=beta), inputs)
    truth = results(lambda *x: F.smooth_l1_loss(*x, beta=float(beta)), inputs)
    assert_same(found, truth, 1e-7 if isinstance(beta, torch.Tensor) else 1e-12)


def test_embeddings_and_their_directions(engine):
    inputs, mask = pair(3, 5, 4), normal(3, 5, seed=4) > 0
    for normalize, kind in ((False, "mse"), (True, "normalized_mse")):
        for reduction in ("mean", "sum"):
            options = dict(reduction=reduction)
            loss = partial(fastkd.embedding_mse, normalize=normalize, weights=mask, **options)
            truth = partial(published.hint, kind=kind, weights=mask, **options)
            assert_same(results(loss, inputs), results(truth, inputs))
        each = fastkd.embedding_mse(*inputs, normalize=normalize, weights=mask, reduction="none")
        rows = published.hint(*(x.flatten(0, 1) for x in inputs), kind=kind, reduction="none")
        assert_same([each], [rows.view(3, 5) * mask])


# ----------------------------------------------------------------------------------- memory formats


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def cropped(x):
    return F.pad(x, (1, 2, 1, 0), value=torch.nan)[..., 1:, 1:-2]


FORMATS = {"plain": lambda x: x.clone(), "channels last": channels_last, "cropped": cropped}


@pairwise(
    student=FORMATS, teacher=FORMATS, kind=[*KINDS, "attention sum", "attention max"],
    engine=["portable", "portable in chunks", "triton"],
)  # fmt: skip
def test_memory_formats(student, teacher, kind, engine):
    inputs = pair(3, 6, 4, 5)

    def loss(s, t):
        if "attention" in kind:
            return fastkd.attention_transfer(s, t, kind=kind.split()[1])
        return fastkd.hint(s, t, kind=kind)

    moved = [FORMATS[student](inputs[0].detach()).requires_grad_(), FORMATS[teacher](inputs[1])]
    found = results(loss, moved)
    assert_same(found, results(loss, inputs))
    assert found[1].stride() == torch.empty_like(moved[0]).stride()
    assert student == "cropped" or found[1].stride() == moved[0].stride()


# ----------------------------------------------------------------------------------- attention maps


@pytest.mark.parametrize("p", [0.5, 1, 1.0, 2, 3, 4.0, torch.tensor(2.5)], ids=str)
@pytest.mark.parametrize("kind", ["sum", "max"])
def test_powers(p, kind, engine):
    inputs, p = maps(wider=2)((4,), 5), p.to(DEVICE) if isinstance(p, torch.Tensor) else p
    options = dict(kind=kind)
    found = results(partial(fastkd.attention_transfer, p=p, **options), inputs)
    truth = results(partial(published.attention_transfer, p=float(p), **options), inputs)
    assert_same(found, truth, 1e-7 if isinstance(p, torch.Tensor) else 1e-11)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("kind", ["sum", "max"])
def test_zeros_in_maps_and_maps_of_zeros(p, kind, engine):
    """A zero feature gets no gradient whatever the power, and a map of zeros none at all."""
    student, teacher = maps(wider=2)((4,), 5)
    student.detach()[0] = 0
    student.detach()[1, :, 1] = 0
    student.detach()[2, 1] = 0
    teacher[3] = 0
    loss, gradient = results(partial(fastkd.attention_transfer, p=p, kind=kind), [student, teacher])
    assert loss.isfinite() and gradient.isfinite().all()
    assert not gradient[0].any() and not gradient[1, :, 1].any() and not gradient[2, 1].any()
    assert gradient[1, :, 0].any() and gradient[3].abs().max() < 1e-12


def test_maxima_that_are_equal_share_the_gradient(engine):
    student, teacher = maps()((4,), 5)
    student.detach()[:, 3] = -student.detach()[:, 1]
    found = results(partial(fastkd.attention_transfer, kind="max"), [student, teacher])
    truth = results(partial(published.attention_transfer, kind="max"), [student, teacher])
    assert_same(found, truth)
    assert_same([found[1][:, 3]], [-found[1][:, 1]])


SIZES = [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((7, 6), (3, 4)), ((8, 3), (4, 6)), ((5,), (2,))]
SIZES.append(((4, 3, 2), (2, 3, 3)))


@pytest.mark.parametrize("own, other", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_larger_maps_are_pooled(own, other, dtype, engine):
    student, teacher = normal(3, 5, *own, dtype=dtype), normal(3, 7, *other, dtype=dtype, seed=1)
    pool = [F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d][len(own) - 1]
    sizes = [min(pair) for pair in zip(own, other, strict=True)]
    found = results(fastkd.attention_transfer, [student.requires_grad_(), teacher])

    def written(s, t):
        s, t = (
            F.normalize(pool(x.to(found[0].dtype), sizes).square().sum(1).flatten(1))
            for x in (s, t)
        )
        return F.mse_loss(s, t)

    truth = results(written, [student, teacher])
    assert_same(found, truth, 1e-12 if dtype == torch.float64 else 1e-2)
    assert found[1].dtype == dtype


def test_layers_are_added_up(engine):
    pairs = [maps(wider=2)((4,), 5, seed=seed) for seed in (1, 5)]
    students, teachers = zip(*pairs, strict=True)
    found = results(lambda *x: fastkd.attention_transfer(list(x), teachers, p=3), students)
    each = [results(partial(fastkd.attention_transfer, p=3), pair) for pair in pairs]
    expected = sum(loss for loss, _ in each)
    assert_same(found, [expected, *(gradient for _, gradient in each)])
    module = fastkd.AttentionTransferLoss(p=3)
    assert_same([module(students, teachers)], [expected])
    _, gradient = results(lambda x: fastkd.attention_transfer([x, x], teachers), students[:1])
    assert gradient.isfinite().all()


def test_the_length_of_a_map_neither_overflows_nor_vanishes(engine):
    inputs = [x.detach().float() for x in maps(wider=2)((4,), 5)]
    expected = fastkd.attention_transfer(*inputs)
    for size in (1e-12, 1e12):
        found = fastkd.attention_transfer(*(size * x for x in inputs))
        torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------- errors


def says(error, *sentences):
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{x})" for x in sentences))


def test_errors_of_hints():
    x, hint = torch.zeros(2, 4, 3, 5), fastkd.hint
    with says(
        ValueError,
        r"\[2, 4, 3, 5\] and \[2, 6, 3, 5\]",
        r"HintLoss\(student_channels=4, teacher_channels=6\)",
    ):
        hint(x, torch.zeros(2, 6, 3, 5))
    with says(ValueError, r"\[2, 4, 3, 5\] and \[2, 4, 6, 5\]", "adaptive_avg_pool2d", "resize="):
        hint(x, torch.zeros(2, 4, 6, 5))
    with says(ValueError, "another order", r"permute\(\[0, 3, 1, 2\]\)", "feature_dim"):
        hint(x, torch.zeros(2, 3, 5, 4))
    with says(ValueError, "same examples", r"\[S, B, H\]"):
        hint(torch.zeros(2, 4, 3), torch.zeros(3, 4, 3))
    with says(ValueError, r"transpose\(0, 1\)", "batch_dim"):
        hint(torch.zeros(2, 4, 3), torch.zeros(4, 2, 3))
    with says(ValueError, "need one shape", r"mT.unflatten"):
        hint(x, torch.zeros(2, 4, 15))
    with says(ValueError, "at least two dimensions", r"\[4\]"):
        hint(torch.zeros(4), torch.zeros(4))
    with says(ValueError, "no feature", r"\[2, 0, 3, 5\]"):
        hint(x[:, :0], x[:, :0])
    with says(ValueError, 'kind must be "mse" or', "got 'l2'"):
        hint(x, x, kind="l2")
    with says(ValueError, "beta must be a finite number of at least 0"):
        hint(x, x, kind="smooth_l1", beta=-1)
    for name, value in (("feature_dim", 4), ("batch_dim", "first"), ("feature_dim", True)):
        with says(ValueError, f"{name} must be a whole number from -4 to 3", f"got {value!r}"):
            hint(x, x, **{name: value})
    with says(ValueError, "must differ", "got 0 for both"):
        hint(x, x, feature_dim=-4)
    with says(TypeError, "student must be the features", "got list"):
        hint([x], [x])
    with says(TypeError, "teacher must hold floating-point", "torch.int64"):
        hint(x, x.long())
    with says(ValueError, "on cpu, teacher on meta"):
        hint(x, x.to("meta"))
    for options in (dict(reduction="batchmean"), dict(reduction="sum", normalizer=2)):
        with says(ValueError, "reduction"):
            hint(x, x, **options)


def test_errors_of_weights_and_masks():
    x, tokens = torch.zeros(2, 4, 3, 5), torch.zeros(7, 2, 4)
    for name, entries in (("weights", torch.ones), ("mask", torch.BoolTensor)):
        with says(
            ValueError, f"{name} needs one entry", r"the shape \[2, 3, 5\], got \[2, 4, 3, 5\]"
        ):
            fastkd.hint(x, x, **{name: entries(2, 4, 3, 5)})
        with says(ValueError, rf"{name}\[:, None, None\]", r"got \[2\]"):
            fastkd.hint(x, x, **{name: entries(2)})
        with says(ValueError, "batch_dim=1", r"the shape \[7, 2\], got \[2, 7\]"):
            fastkd.hint(tokens, tokens, **{name: entries(2, 7)})
        with says(TypeError, f"{name} must be a tensor, got list"):
            fastkd.hint(x, x, **{name: [1.0]})
        with says(ValueError, "on meta, the features on cpu"):
            fastkd.hint(x, x, **{name: entries(2, 3, 5).to("meta")})
    with says(TypeError, "mask must hold bools", "torch.float32", "weights="):
        fastkd.hint(x, x, mask=torch.ones(2, 3, 5))
    with says(TypeError, "weights must be real"):
        fastkd.hint(x, x, weights=torch.ones(2, 3, 5, dtype=torch.complex64))


def test_errors_of_embeddings():
    x = torch.zeros(2, 4, 3)
    with says(ValueError, r"\[2, 4, 3\] and \[2, 4, 5\]", r"nn.Linear\(3, 5\)", "HintLoss"):
        fastkd.embedding_mse(x, torch.zeros(2, 4, 5))
    with says(ValueError, r"\[2, 4, 3\] and \[2, 3, 3\]", "the same rows"):
        fastkd.embedding_mse(x, torch.zeros(2, 3, 3))
    with says(ValueError, "D ≥ 1", r"\[2, 4, 0\]"):
        fastkd.embedding_mse(x[..., :0], x[..., :0])
    with says(TypeError, "student must be embeddings", "got float", "by its name"):
        fastkd.embedding_mse(1.0, x)
    with says(ValueError, "one real number or bool", r"\[2, 4\]"):
        fastkd.embedding_mse(x, x, weights=torch.ones(2, 3))


def test_errors_of_maps():
    x, transfer = torch.zeros(2, 4, 3, 5), fastkd.attention_transfer
    with says(ValueError, "at least three", r"\[2, 4\]", "unflatten"):
        transfer(x[..., 0, 0], x[..., 0, 0])
    with says(ValueError, "as many dimensions", r"\[2, 4, 3\]"):
        transfer(x, x[..., 0])
    with says(ValueError, "same examples", r"\[2, 4, 3, 5\] and \[1, 4, 3, 5\]"):
        transfer(x, x[:1])
    with says(ValueError, "as many maps", "got 2 and 1"):
        transfer([x, x], x)
    with says(ValueError, "at least one, got 0 and 0"):
        transfer([], [])
    with says(ValueError, "at least one channel and position", r"\[2, 0, 3, 5\]"):
        transfer(x, x[:, :0])
    with says(ValueError, "more than three spatial", "bring them to one size"):
        transfer(torch.zeros(2, 4, 1, 1, 1, 2), torch.zeros(2, 4, 1, 1, 1, 1))
    with says(TypeError, "teacher must be feature maps", "got int"):
        transfer([x], [1])
    with says(ValueError, 'kind must be "sum" or "max"'):
        transfer(x, x, kind="mean")
    for p in (0, -1.0, float("nan")):
        with says(ValueError, "p must be a finite number above 0"):
            transfer(x, x, p=p)
    with says(ValueError, "on cpu, teacher on meta"):
        transfer(x, x.to("meta"))


# ------------------------------------------------------------------------------------------ engines

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
        inputs = [channels_last(x) for x in inputs]
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
