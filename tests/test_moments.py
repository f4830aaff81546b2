"""Particulars of the losses of features: positions, layouts, masks, pooling, maps."""

from functools import partial

import published
import pytest
import torch
import torch.nn.functional as F
from choice import pairwise, quick_if
from exactness import assert_same, results
from inputs import DEVICE, maps, normal

import fastkd

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
@quick_if(lambda layout, engine: engine != "triton" or layout in ("rows", "maps"))
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


def test_the_dtype_is_that_of_the_features(engine):
    """Weights of more digits change no dtype, and one network in float64 is enough for all."""
    inputs, weights = pair(3, 5, 4, dtype=torch.float32), normal(3, 5, seed=2).abs()
    for given in (weights, weights.clone().requires_grad_()):
        for reduction in ("mean", "sum", "none"):
            loss = fastkd.hint(*inputs, weights=given, reduction=reduction)
            assert loss.dtype == torch.float32
    student, teacher = pair(3, 4, 2, 5, dtype=torch.float32)
    for kind in ("sum", "max"):
        at = partial(fastkd.attention_transfer, p=1.5, kind=kind)
        for given in ((student, teacher.double()), (student.detach().double(), teacher)):
            truth = at(*(x.detach().double() for x in given))
            torch.testing.assert_close(at(*given).detach(), truth, rtol=1e-12, atol=1e-12)
            layers = [[x, x.float()] for x in given]  # of which one layer is in float32 alone
            torch.testing.assert_close(at(*layers).detach(), 2 * truth, rtol=1e-12, atol=1e-12)


def test_pooled_maps_have_deterministic_gradients(engine):
    """PyTorch's adaptive averages refuse them on a GPU; those of four dimensions are there too."""
    student, teacher = pair(2, 3, 5, 4)[0], normal(2, 4, 3, 4, seed=1)
    pooled = F.adaptive_avg_pool2d(student, (3, 4))
    expected = results(fastkd.attention_transfer, [pooled.detach().requires_grad_(), teacher])
    (expected[1],) = torch.autograd.grad(pooled, student, expected[1])
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(results(fastkd.attention_transfer, [student, teacher]), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    x = normal(2, 3, 2, 1, 3, 4)
    found = fastkd.attention_transfer(x, x.mean(2, keepdim=True))
    assert found.abs() < 1e-12


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


FORMATS = {
    "plain": lambda x: x.clone(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: F.pad(x, (1, 2, 1, 0), value=torch.nan)[..., 1:, 1:-2],
}


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
    with says(TypeError, "teacher must be feature maps", "got int"):
        transfer([x], [1])
    with says(ValueError, 'kind must be "sum" or "max"'):
        transfer(x, x, kind="mean")
    for p in (0, -1.0, float("nan")):
        with says(ValueError, "p must be a finite number above 0"):
            transfer(x, x, p=p)
    with says(ValueError, "on cpu, teacher on meta"):
        transfer(x, x.to("meta"))
