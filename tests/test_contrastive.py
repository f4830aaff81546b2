"""Contrastive losses, and the divergence of similarities, equal the published ones everywhere."""

from functools import partial

import contrasts
import pytest
import torch
import torch.nn.functional as F
from contrasts import (
    BOTH_WAYS,
    INFO_NCE,
    LOSSES,
    NAMES,
    NT_XENT,
    SIGLIP,
    SUP_CON,
    each_case,
    each_loss,
    published_info_nce,
    published_nt_xent,
    published_sup_con,
    smoke,
    unit_embeddings,
    with_bank,
)
from exactness import assert_as_exact, assert_same, exact, in_dtype, results
from losses import DEVICE, normal
from meter import PeakMemory

import fastkd
from fastkd import _pairs, similarity
from fastkd.portable import _similarities as portable

engine = contrasts.engine

# -------------------------------------------------------------------------------------- numbers


@smoke
@each_case
@pytest.mark.parametrize("n, width", [(2, 3), (7, 5), (33, 3), (19, 40)])
def test_the_published_loss_and_gradient(case, n, width, engine):
    inputs = case.inputs((n,), width)
    found, expected = results(case, inputs), results(case.eager, inputs)
    for x, y in zip(found, expected, strict=True):  # two examples may have nothing to learn
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12 * max(1.0, y.abs().max()))


def reordered(inputs, shift):
    n = len(inputs[0])
    moved = [x.roll(shift, 1) if x.is_floating_point() else x for x in inputs]
    return [x.roll(5 * shift, 0) if len(x) == n else x for x in moved]


@each_case
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_every_dtype(case, dtype, engine):
    inputs = case.inputs((67,), 33, dtype)
    truth = results(case.eager, exact(inputs))
    with fastkd.backend("formula"):
        yardstick = results(case, inputs)
        # how one number is rounded is luck: the worst of some orders of features and examples
        losses = [case(*reordered(inputs, shift)).detach() for shift in range(8)]
    yardstick[0] = max(losses, key=lambda loss: (loss.double() - truth[0]).abs())
    found = results(case, inputs)
    if engine in ("triton", "portable in half") and dtype.itemsize == 2:
        # a GPU weighs embeddings in half precision, as attention does: one more rounding
        assert_as_exact(found[:1], yardstick[:1], truth[:1])
        for x, y in zip(found[1:], truth[1:], strict=True):
            assert (x.double() - y).abs().max() <= torch.finfo(dtype).eps * y.abs().max()
    else:
        assert_as_exact(found, yardstick, truth)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    trained = [x for x in inputs if x.requires_grad]
    assert [x.dtype for x in found[1:]] == [x.dtype for x in trained]


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("name", ["info_nce", "symmetric", "clip", "siglip", "similarity_kl"])
def test_any_scale(name, scale, engine):
    """Also where exponentials without a maximum would overflow, or be 0."""
    losses = dict(zip(NAMES, LOSSES, strict=True))
    options = dict(
        info_nce=dict(temperature=1 / scale),
        symmetric=dict(temperature=1 / scale),
        clip=dict(logit_scale=scale),
        siglip=dict(logit_scale=scale, logit_bias=-scale),
        similarity_kl=dict(student_temperature=1 / scale, teacher_temperature=1 / scale),
    )[name]
    case = losses[name]
    inputs = case.inputs((40,), 3)
    inputs[0].detach()[3] = inputs[1].detach()[4, :3]  # a close pair, in a row
    inputs[0].detach()[-1].neg_()
    found = results(lambda *x: case(*x, **options), inputs)
    expected = results(lambda *x: case.eager(*x, **options), inputs)
    for x, y in zip(found, expected, strict=True):  # log-sum-exp − positive loses digits
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11 * y.abs().max() + 1e-14 * scale)


@smoke
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "clip", "similarity_kl"])
def test_rows_without_anything_close(name, dtype, tolerance, monkeypatch):
    """A later chunk finds that it needs maxima: what the first ones added is made anew.

    In float32 all of its exponentials are 0 without them.
    """
    monkeypatch.setitem(portable._CHUNK_ELEMENTS, "cpu", 100)
    for family in (_pairs, similarity):  # else the formula
        monkeypatch.setattr(family, "_FEW_PAIRS", 0)
    case = dict(zip(NAMES, LOSSES, strict=True))[name]
    option = dict(clip="logit_scale", similarity_kl="student_temperature").get(name, "temperature")
    query, key = normal(2, 30, 6).abs().requires_grad_().unbind()
    far = torch.where(torch.arange(30)[:, None] == 25, -1.0, 1.0).double().to(DEVICE)
    inputs = [F.normalize(x * far).detach().requires_grad_() for x in (query, key)]
    inputs[1] = F.normalize(key).detach().requires_grad_()
    inputs[1].requires_grad_(name != "similarity_kl")
    options = {option: 110.0 if name == "clip" else 1 / 110}
    found = results(lambda *x: case(*x, **options), in_dtype(dtype, inputs))
    assert_same(found, results(lambda *x: case.eager(*x, **options), inputs), tolerance)


@pytest.mark.parametrize("temperature", [0.1, 0.07, 0.05])
def test_views_that_found_each_other_keep_their_gradient(temperature, engine):
    """What is left of it is far smaller than what float32 leaves of 1 − p."""
    view, noise = normal(2, 64, 128, seed=3)
    pair = [view.requires_grad_(), (view + 0.1 * noise).detach().requires_grad_()]
    truth = results(partial(published_nt_xent, temperature=temperature), pair)
    loss, narrow = partial(fastkd.nt_xent, temperature=temperature), in_dtype(torch.float32, pair)
    found = results(loss, narrow)
    with fastkd.backend("formula"):
        assert_as_exact(found, results(loss, narrow), truth)


@smoke
@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("n_centres", [1, 10])
def test_classes_hardly_apart_keep_their_gradient(n_centres, spread, engine):
    """Of all features that are alike, or of those of a class: attraction and repulsion cancel."""
    centres, noise = normal(n_centres, 64, seed=3), normal(256, 64)
    labels = torch.arange(256, device=DEVICE) % 10
    inputs = [(centres[labels % n_centres] + spread * noise).requires_grad_(), labels]
    truth, narrow = results(published_sup_con, inputs), in_dtype(torch.float32, inputs)
    found = results(fastkd.sup_con, narrow)
    with fastkd.backend("formula"):
        assert_as_exact(found, results(fastkd.sup_con, narrow), truth)


@smoke
def test_large_classes_of_close_features_keep_their_loss():
    """Sums of many features that are alike are rounded often."""
    centre, noise = normal(1, 4, seed=3), normal(4096, 4)
    features, labels = centre + 0.01 * noise, torch.arange(4096, device=DEVICE) % 2
    loss = partial(fastkd.sup_con, labels=labels, temperature=0.05)
    with fastkd.backend("formula"):
        truth = loss(features)
    assert (loss(features.float()) - truth).abs() <= torch.finfo(torch.float32).eps * truth


@pytest.mark.parametrize("alike", ["all", "none", "some"])
@pytest.mark.parametrize("anchors", ["with_positive", "all"])
def test_labels_of_any_kind(alike, anchors, engine):
    features, _ = SUP_CON.inputs((9,), 4)
    labels = dict(all=[5] * 9, none=[*range(9)], some=[3, -1, 3, 3, 7, 2**40, 7, 0, 2**40])[alike]
    labels = torch.tensor(labels, device=DEVICE)
    found = results(partial(fastkd.sup_con, labels=labels, anchors=anchors), [features])
    expected = results(partial(published_sup_con, labels=labels, anchors=anchors), [features])
    assert_same(found, expected)


@smoke
@each_case
def test_duplicates(case, engine):
    inputs = case.inputs((8,), 5)
    for x in inputs:
        if x.is_floating_point():
            x.detach()[1:4] = x.detach()[0]
    found = results(case, inputs)
    assert all(x.isfinite().all() for x in found)
    assert_same(found, results(case.eager, inputs), 1e-11)


@smoke
@each_case
@pytest.mark.parametrize("n", [0, 1])
def test_hardly_any_examples(case, n, engine):
    """No loss without examples or without negatives, but on the graph."""
    inputs = case.inputs((n,), 3)
    found = results(case, inputs)
    assert all(x.isfinite().all() for x in found)
    bank = len(inputs) > 2
    if n == 0 or not bank:
        siglip = n == 1 and case is SIGLIP  # has its own pair
        assert bool(found[0].abs() > 1e-15) == siglip
    if n == 1:
        for x, y in zip(found, results(case.eager, inputs), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@smoke
@pytest.mark.parametrize("length", [0, 1e-13])
def test_a_vector_without_a_direction(length, engine):
    """As torch.nn.functional.normalize has it: divided by 1e-12, and not projected."""
    for case in (INFO_NCE, BOTH_WAYS, NT_XENT, SUP_CON):
        inputs = case.inputs((5,), 3)
        inputs[0].detach()[2] *= length
        assert_same(results(case, inputs), results(case.eager, inputs))


@each_case
@pytest.mark.parametrize("place", [0, -1])
def test_nan_is_not_hidden(case, place, engine):
    inputs = case.inputs((40,), 3)
    if not inputs[place].is_floating_point():
        pytest.skip("labels are numbers")
    inputs[place].detach()[-1, 1] = torch.nan
    assert case(*inputs).isnan()


@smoke
def test_temperatures_scales_and_options_learn(engine):
    def number(x):
        return torch.tensor(x, dtype=torch.float64, device=DEVICE, requires_grad=True)

    query, key, bank = with_bank((9,), 4)
    nce = partial(fastkd.info_nce, symmetric=True)
    options = dict(temperature=number(0.3), negative_weight=number(0.4), margin=number(0.2))

    def learns(loss, *numbers):
        return torch.autograd.gradcheck(lambda *x: loss(*x), numbers)

    names = [*options]
    assert learns(
        lambda *x: nce(query, key, bank, **dict(zip(names, x, strict=True))), *options.values()
    )
    image, text = unit_embeddings((6,), 4)
    assert learns(lambda s: fastkd.clip_contrastive(image, text, s), number(3.0))
    assert learns(lambda s, b: fastkd.siglip(image, text, s, b), number(3.0), number(-1.0))
    assert learns(lambda t: fastkd.nt_xent(image, text, temperature=t), number(0.4))
    labels = torch.tensor([0, 1, 0, 1, 1, 2], device=DEVICE)
    assert learns(lambda t: fastkd.sup_con(image, labels, temperature=t), number(0.4))
    assert learns(
        lambda t: fastkd.similarity_kl(image, text.detach(), student_temperature=t), number(0.4)
    )
    bias = number(3.0)
    (of_bias,) = torch.autograd.grad(fastkd.clip_contrastive(image, text, 4.0, bias), bias)
    assert abs(of_bias) < 1e-15  # it cancels


@smoke
@each_case
def test_only_some_get_a_gradient(case, engine):
    """What is detached changes nothing for the others."""
    inputs = case.inputs((12,), 4)
    value, *gradients = results(case, inputs)
    trained = [i for i, x in enumerate(inputs) if x.requires_grad]
    for kept, gradient in zip(trained, gradients, strict=True):
        fewer = [x.detach().requires_grad_(i == kept) for i, x in enumerate(inputs)]
        fewer = (
            [x if y.is_floating_point() else y for x, y in zip(fewer, inputs, strict=True)]
            if (all(x.is_floating_point() for x in inputs))
            else inputs
        )
        assert_same(results(case, fewer), [value, gradient])
    with torch.no_grad():
        assert_same([case(*inputs)], [value])


@smoke
@pytest.mark.parametrize(
    "options",
    [{}, dict(symmetric=True, margin=0.1), dict(decoupled=True), dict(normalize=False)],
    ids=str,
)
def test_a_bank_without_a_gradient(options, engine):
    query, key, bank = with_bank((150,), 5)
    numbers = [query, key, torch.tensor(0.2, dtype=query.dtype, device=DEVICE, requires_grad=True)]
    found = results(
        lambda q, k, t: fastkd.info_nce(q, k, bank.detach(), temperature=t, **options), numbers
    )
    of_all = results(
        lambda q, k, t, b: published_info_nce(q, k, b, temperature=t, **options), [*numbers, bank]
    )
    assert_same(found, of_all[:-1], 1e-11)


# --------------------------------------------------------------------------------------- memory

CHUNK = 1 << 16


def peak_of(case, inputs):
    loss = case(*inputs)
    if loss.requires_grad:
        loss.backward()
    for x in inputs:
        x.grad = None
    with PeakMemory() as memory:
        loss = case(*inputs)
        if loss.requires_grad:
            loss.backward()
    return memory.peak_bytes


@each_loss
def test_no_matrix_of_similarities(case, monkeypatch):
    """Chunks, and numbers for each example and feature."""
    monkeypatch.setitem(portable._CHUNK_ELEMENTS, "cpu", CHUNK // 4)
    n, width = 2048, 16
    inputs = case.inputs((n,), width, torch.float32)
    rows = 4 * n * width * (2 if case is NT_XENT else 1)
    assert peak_of(case, inputs) <= 14 * rows + 3 * CHUNK + 128 * n
    with fastkd.backend("formula"):  # so that the numbers above mean something
        assert peak_of(case, inputs) >= 2 * 4 * n * n


@smoke
@pytest.mark.parametrize("n_keys, gap", [(1000, 8), (1008, 0), (1024, 16), (8191, 17)])
def test_rows_of_a_portable_chunk_start_on_lines_that_few_share(n_keys, gap):
    """Products of others are slower."""
    query, key = torch.ones(2, 1), torch.ones(n_keys, 1)
    options = dict(dtype=query.dtype, first=0, normalize=True, half="", wanted="")
    similarities = portable.Similarities(query, key, torch.tensor(1.0), **options)
    for part in (similarities.buffer(), similarities.of_spare(similarities.buffer())):
        assert part.shape == (2, n_keys) and part.stride() == (n_keys + gap, 1)


# ---------------------------------------------------------------------------------------- errors

Q, K = torch.ones(4, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: fastkd.info_nce(Q, K[:3]), ValueError, "query and key need the same .* [3, 3]"),
        (lambda: fastkd.info_nce(Q, torch.ones(4, 5)), ValueError, "one D, got .* project"),
        (lambda: fastkd.info_nce(Q, K, torch.ones(2, 5)), ValueError, "query and negatives"),
        (lambda: fastkd.info_nce(Q[0], K[0]), ValueError, r"\[N, D\] .* got \[3\]"),
        (lambda: fastkd.info_nce(Q.long(), K), TypeError, "floating-point .*int64"),
        (lambda: fastkd.info_nce(Q, [1.0]), TypeError, "key must be a tensor .* got list"),
        (lambda: fastkd.info_nce(Q, K, temperature=0), ValueError, "above 0, got 0"),
        (lambda: fastkd.info_nce(Q, K, negative_weight=0.0), ValueError, "negative_weight .* 0"),
        (lambda: fastkd.info_nce(Q, K, margin=torch.ones(2)), ValueError, r"margin .* \[2\]"),
        (lambda: fastkd.info_nce(Q, K, in_batch_negatives=False), ValueError, "negatives=None"),
        (
            lambda: fastkd.info_nce(Q, K, K, in_batch_negatives=False, symmetric=True),
            ValueError,
            "symmetric=True",
        ),
        (lambda: fastkd.info_nce(Q, K, group=3), RuntimeError, "init_process_group"),
        (lambda: fastkd.clip_contrastive(Q, K, "5"), ValueError, "logit_scale .* '5'"),
        (lambda: fastkd.siglip(Q, K, 5.0, torch.ones(1)), ValueError, r"logit_bias .* \[1\]"),
        (lambda: fastkd.nt_xent(Q, K[:2]), ValueError, "view1 and view2"),
        (lambda: fastkd.sup_con(Q, torch.ones(4)), TypeError, "labels .*float32"),
        (lambda: fastkd.sup_con(Q, torch.ones(3).long()), ValueError, r"4 features.* \[3\]"),
        (lambda: fastkd.sup_con(Q, torch.ones(4).long(), anchors="x"), ValueError, "anchors .*'x'"),
    ],
)
def test_wrong_inputs(call, error, sentence):
    with pytest.raises(error, match=sentence.replace("[3, 3]", r"\[3, 3\]")):
        call()
