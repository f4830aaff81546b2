"""Particulars of pairs: scales, maxima, classes, banks and queues, memory."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import LOSSES, OPTIONS, VIEWS, named, of
from choice import ENGINES, full, pairwise, quick_if
from exactness import (
    assert_as_exact,
    assert_exact,
    assert_same,
    by_formula,
    exact,
    in_dtype,
    results,
)
from force import in_chunks_of
from inputs import DEVICE, normal, with_bank, with_classes
from meter import PeakMemory

import fastkd

PAIRS = of("pairs")
EACH = [case for case in LOSSES if case.problem == "pairs"]
NCE, BOTH, CLIP, SIGLIP, NT_XENT, SUP_CON, SOFT = named(
    "info_nce", "info_nce-symmetric=True", "clip_contrastive-logit_scale=5.0",
    "siglip-logit_scale=5.0-logit_bias=-2.0", "nt_xent", "sup_con", "similarity_kl",
)  # fmt: skip
each_case = pytest.mark.parametrize("case", PAIRS, ids=str)
each_loss = pytest.mark.parametrize("case", EACH, ids=str)


DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 1e-3)]


def number(x):
    return torch.tensor(x, dtype=torch.float64, device=DEVICE, requires_grad=True)


# ---------------------------------------------------------------------------------------- numbers


@full  # contracts have what is quick
@pairwise(
    case=EACH,
    engine=ENGINES,
    dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
)
def test_every_dtype(case, engine, dtype):
    assert_exact(case, case.inputs((67,), 33, dtype), rounds_halves=engine == "triton")


def of_scale(case, scale):
    return {
        "clip_contrastive": dict(logit_scale=scale),
        "siglip": dict(logit_scale=scale, logit_bias=-scale),
        "similarity_kl": dict(student_temperature=1 / scale, teacher_temperature=1 / scale),
    }.get(case.name, dict(temperature=1 / scale))


@pytest.mark.parametrize("scale", [1.0, pytest.param(30.0, marks=full), 100.0, 1e4])
@pytest.mark.parametrize("case", [NCE, BOTH, CLIP, SIGLIP, SOFT], ids=str)
@quick_if(lambda case, scale, engine: engine != "triton" or scale == 1e4)
def test_any_scale(case, scale, engine):
    """Also where exponentials without a maximum would overflow, or be 0."""
    inputs = case.inputs((40,), 3)
    inputs[0].detach()[3] = inputs[1].detach()[4, :3]  # a close pair, in a row
    inputs[0].detach()[-1].neg_()
    options = of_scale(case, scale)
    found = results(lambda *x: case(*x, **options), inputs)
    expected = results(lambda *x: case.truth(*x, **options), inputs)
    for x, y in zip(found, expected, strict=True):  # log-sum-exp − positive loses digits
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11 * y.abs().max() + 1e-14 * scale)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", [NCE, NT_XENT, CLIP, SOFT], ids=str)
def test_rows_without_anything_close(case, dtype, tolerance, monkeypatch):
    """A later chunk finds that it needs maxima: what the first ones added is made anew.

    In float32 all of its exponentials are 0 without them.
    """
    in_chunks_of(100, monkeypatch)
    query, key = (F.normalize(x) for x in normal(2, 30, 6).abs())
    far = torch.where(torch.arange(30)[:, None] == 25, -1.0, 1.0).double().to(DEVICE)
    inputs = [(query * far).requires_grad_(), key.requires_grad_(case is not SOFT)]
    options = of_scale(case, 110.0)
    options.pop("teacher_temperature", None)
    with fastkd.backend("portable"):
        found = results(lambda *x: case(*x, **options), in_dtype(dtype, inputs))
    assert_same(found, results(lambda *x: case.truth(*x, **options), inputs), tolerance)


@pytest.mark.parametrize("temperature", [0.1, 0.07, 0.05])
@quick_if(lambda temperature, engine: engine != "triton" or temperature == 0.05)
def test_views_that_are_alike_keep_their_gradient(temperature, engine):
    """The rest of it is far smaller than what float32 leaves of 1 − p."""
    view, noise = normal(2, 64, 128, seed=3)
    pair = [view.requires_grad_(), (view + 0.1 * noise).detach().requires_grad_()]
    loss = partial(fastkd.nt_xent, temperature=temperature)
    truth = results(partial(NT_XENT.truth, temperature=temperature), pair)
    narrow = in_dtype(torch.float32, pair)
    assert_as_exact(results(loss, narrow), by_formula(loss, narrow), truth)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("temperature", [0.2, 0.07])
@quick_if(lambda temperature, engine: engine != "triton" or temperature == 0.07)
def test_far_negatives_of_each_query_keep_their_gradient(temperature, decoupled, engine):
    """The negatives of the batch are so close that theirs is a small share of the loss."""
    n, width = 64, 32
    query = normal(1, width, seed=1) + 0.5 * normal(n, width)
    inputs = [query, query + 0.25 * normal(n, width, seed=2), normal(n, 3, width, seed=3)]
    inputs = in_dtype(torch.float32, [x.requires_grad_() for x in inputs])
    loss = partial(fastkd.info_nce, temperature=temperature, decoupled=decoupled)
    assert_as_exact(
        results(loss, inputs), by_formula(loss, inputs), by_formula(loss, exact(inputs))
    )


@pytest.mark.parametrize("spread", [1e-3, 0.1, pytest.param(1.0, marks=full)])
@pytest.mark.parametrize("n_centres", [1, 10])
@quick_if(lambda n_centres, spread, engine: engine != "triton" or (n_centres, spread) == (10, 1e-3))
def test_classes_hardly_apart_keep_their_gradient(n_centres, spread, engine):
    """Features of all classes or of one are alike: attraction and repulsion cancel."""
    centres, noise = normal(n_centres, 64, seed=3), normal(128, 64)
    labels = torch.arange(128, device=DEVICE) % 10
    inputs = [(centres[labels % n_centres] + spread * noise).requires_grad_(), labels]
    truth, narrow = results(SUP_CON.truth, inputs), in_dtype(torch.float32, inputs)
    assert_as_exact(results(fastkd.sup_con, narrow), by_formula(fastkd.sup_con, narrow), truth)


def test_large_classes_of_close_features_keep_their_loss():
    """Sums of many features that are alike are rounded often."""
    centre, noise = normal(1, 4, seed=3), normal(4096, 4)
    features, labels = centre + 0.01 * noise, torch.arange(4096, device=DEVICE) % 2
    loss = partial(fastkd.sup_con, labels=labels, temperature=0.05)
    with fastkd.backend("formula"):
        truth = loss(features)
    with fastkd.backend("portable"):
        found = loss(features.float())
    assert (found - truth).abs() <= torch.finfo(torch.float32).eps * truth


@pytest.mark.parametrize("alike", ["all", "none", "some"])
@pytest.mark.parametrize("anchors", ["with_positive", "all"])
def test_labels_of_any_kind(alike, anchors, engine):
    features, _ = SUP_CON.inputs((9,), 4)
    labels = dict(all=[5] * 9, none=[*range(9)], some=[3, -1, 3, 3, 7, 2**40, 7, 0, 2**40])[alike]
    options = dict(labels=torch.tensor(labels, device=DEVICE), anchors=anchors)
    expected = results(partial(SUP_CON.truth, **options), [features])
    assert_same(results(partial(fastkd.sup_con, **options), [features]), expected)


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case, engine):
    for n in (0, 1, 7) if engine != "triton" else (7,):
        inputs = case.inputs((n,), 5)
        found = results(case, inputs)
        expected = results(case.truth, inputs) if n else [0 * x for x in found]
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12 * max(1.0, float(y.norm())))


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_formulas_write_into_no_view(case):
    """Tracing refuses such a formula, which then could not be compiled."""
    inputs = [x.detach() for x in case.inputs((4,), 5)]
    with fastkd.backend("formula"):
        assert_same([torch.func.functionalize(case)(*inputs)], [case(*inputs)])


def test_rounding_leaves_no_loss_below_0(engine):
    """Students near their teachers, and two examples of one class, are where it would show."""
    for seed in range(4):
        x = normal(6, 8, seed=seed, dtype=torch.float32)
        near = x + 1e-5 * normal(6, 8, seed=seed + 9, dtype=torch.float32)
        of_one = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        for reduction in ("mean", "none"):
            assert (fastkd.similarity_kl(near, x, reduction=reduction) >= 0).all()
            for normalize in (True, False):
                options = dict(normalize=normalize, reduction=reduction)
                assert (fastkd.sup_con(x[:2], of_one, **options) >= 0).all()


@pytest.mark.parametrize("length", [0, 1e-13, 1e-12])
@quick_if(lambda length, engine: engine != "triton" or length == 0)
def test_a_vector_without_a_direction(length, engine):
    """Its value is that of F.normalize, and its gradient 0 where that has 1e12 times the others."""
    margin = replace(BOTH, options=dict(symmetric=True, margin=0.1))
    for case, (dtype, tolerance) in itertools.product(
        (BOTH, margin, NT_XENT, SUP_CON, SOFT), DTYPES
    ):
        inputs, options = case.inputs((5,), 3, dtype), of_scale(case, 2.0)
        for x in inputs:
            if x.requires_grad:
                x.detach()[2] = length * F.one_hot(torch.tensor(1), 3)
        loss, *gradients = results(partial(case.truth, **options), exact(inputs))
        for x in gradients:
            x[2] = 0
        ours = partial(case, **options)
        for found in (results(ours, inputs), by_formula(ours, inputs)):
            assert not any(x[2].any() for x in found[1:])
            assert_same(found, [loss, *gradients], tolerance)


def test_a_student_whose_embeddings_are_alike(engine):
    """The sums of its exponentials and of the teacher's are float32 numbers, their quotient not."""
    generator = torch.Generator().manual_seed(0)
    noise, teacher = torch.randn(2, 32, 2048, generator=generator, dtype=torch.float64).to(DEVICE)
    student = 1 + 0.01 * noise
    options = dict(student_temperature=0.01, teacher_temperature=0.01, mask_self=True)
    found = fastkd.similarity_kl(student.float(), teacher.float(), **options).double()
    torch.testing.assert_close(found, SOFT.truth(student, teacher, **options), rtol=1e-4, atol=0)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"mask_self": True}], ids=str)
def test_a_student_like_its_teacher_has_no_loss(options, engine):
    (student, _) = SOFT.inputs((9,), 4)
    found = results(partial(fastkd.similarity_kl, **options), [student, 3 * student.detach()])
    assert all(x.abs().max() <= 1e-14 for x in found)  # lengths do not count


def test_among_the_queries_columns_are_rows(engine):
    inputs = SOFT.inputs((9,), 4)
    by_rows = results(fastkd.similarity_kl, inputs)
    assert_same(results(partial(fastkd.similarity_kl, symmetric=True), inputs), by_rows)
    keys = dict(student_keys=inputs[0], teacher_keys=inputs[1])
    assert_same([fastkd.similarity_kl(*inputs, **keys)], by_rows[:1])


def test_numbers_learn(engine):
    """Temperatures, scales, margins and weights get the gradient of the definition."""
    query, key, bank = with_bank((9,), 4)
    image, text = CLIP.inputs((6,), 4)
    labels = torch.tensor([0, 1, 0, 1, 1, 2], device=DEVICE)
    nce = partial(fastkd.info_nce, query, key, bank, symmetric=True)
    for loss, *numbers in (
        (lambda t, w, m: nce(temperature=t, negative_weight=w, margin=m), 0.3, 0.4, 0.2),
        (lambda s: fastkd.clip_contrastive(image, text, s), 3.0),
        (lambda s, b: fastkd.siglip(image, text, s, b), 3.0, -1.0),
        (lambda t: fastkd.nt_xent(image, text, temperature=t), 0.4),
        (lambda t: fastkd.sup_con(image, labels, temperature=t), 0.4),
        (lambda t: fastkd.similarity_kl(image, text.detach(), student_temperature=t), 0.4),
    ):
        learnt = [*map(number, numbers)]
        assert_same(results(loss, learnt), by_formula(loss, learnt), 1e-10)
    bias = number(3.0)  # it cancels
    clip = partial(fastkd.clip_contrastive, image, text, 4.0)
    for _, of_bias in (results(clip, [bias]), by_formula(clip, [bias])):
        assert of_bias == 0
    for whole in (torch.tensor(-10), torch.tensor(True)):
        expected = fastkd.siglip(image, text, 3.0, float(whole))
        assert_same([fastkd.siglip(image, text, 3.0, whole)], [expected])


def test_no_nan_of_a_number_is_hidden(engine):
    query, key, bank = (normal(16, 5, seed=i, dtype=torch.float32) for i in range(3))
    nan, labels = torch.tensor(torch.nan), torch.arange(16, device=DEVICE) % 3
    for loss in (
        partial(fastkd.info_nce, query, key, bank, temperature=nan),
        partial(fastkd.info_nce, query, key, symmetric=True, temperature=nan),
        partial(fastkd.clip_contrastive, query, key, nan),
        partial(fastkd.siglip, query, key, nan, nan),
        partial(fastkd.nt_xent, query, key, temperature=nan),
        partial(fastkd.sup_con, query, labels, temperature=nan),
    ):
        assert loss().isnan()


def test_a_processor_without_subnormal_numbers():
    """Reciprocals of large sums are 0 then."""
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]).requires_grad_()
    loss = partial(fastkd.clip_contrastive, text=image.detach(), logit_scale=88.0)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has them always")
    try:
        with fastkd.backend("portable"):
            found = results(loss, [image])
    finally:
        torch.set_flush_denormal(False)
    for x, y in zip(found, by_formula(loss, [image]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------- banks and queues


@pytest.mark.parametrize(
    "options",
    [{}, dict(symmetric=True, margin=0.1), dict(decoupled=True), dict(normalize=False)],
    ids=str,
)
def test_a_bank_without_a_gradient(options, engine):
    query, key, bank = with_bank((40,), 5)
    numbers = [query, key, number(0.2)]
    found = results(
        lambda q, k, t: fastkd.info_nce(q, k, bank.detach(), temperature=t, **options), numbers
    )
    expected = results(
        lambda q, k, t: NCE.truth(q, k, bank.detach(), temperature=t, **options), numbers
    )
    assert_same(found, expected, 1e-11)


def test_an_empty_bank_is_on_the_graph(engine):
    query, key, _ = with_bank((5,), 4)
    bank = torch.empty(0, 4, dtype=query.dtype, device=DEVICE, requires_grad=True)
    fastkd.info_nce(query.detach(), key.detach(), bank).backward()
    assert bank.grad.shape == bank.shape


def test_a_queue_of_the_keys_before():
    loss, keys = fastkd.InfoNCELoss(queue_size=7, temperature=0.3), []
    for step in range(4):
        query, key = VIEWS((3,), 4, seed=step)
        bank = torch.cat([key[:0].detach(), *keys])[-7:]
        expected = fastkd.info_nce(query, key, bank, temperature=0.3)
        assert_same([loss(query, key)], [expected])
        keys.append(key.detach())
        kept = F.pad(torch.cat(keys)[-7:], (0, 0, max(7 - 3 * len(keys), 0), 0))
        for held, x in zip(loss.queue.T, kept.T, strict=True):  # the others are 0; in any order
            assert torch.equal(held.sort()[0], x.sort()[0])
        assert loss.queue.shape == (7, 4) and not loss.queue.requires_grad
    twin = fastkd.InfoNCELoss(queue_size=7, temperature=0.3)
    twin.load_state_dict(loss.state_dict())
    twin.eval()
    assert_same([twin(query, key), twin(query, key)], [loss.eval()(query, key)] * 2)
    for size in (2, 9):  # another size keeps the latest
        other = fastkd.InfoNCELoss(queue_size=size)
        other.load_state_dict(loss.state_dict())
        latest = torch.cat(keys)[-7:][-size:]
        assert torch.equal(other.queue[: len(latest)], latest) and len(other.queue) == size
    assert not fastkd.InfoNCELoss().state_dict()
    for size in (-1, 2.5, True):
        with pytest.raises(ValueError, match=rf"queue_size .* got {size}"):
            fastkd.InfoNCELoss(queue_size=size)
    with pytest.raises(ValueError, match=r"queue holds keys of D = 4, got keys \[3, 5\]"):
        twin(*VIEWS((3,), 5))


def test_a_queue_alone_has_no_negatives_in_the_first_step():
    loss = fastkd.InfoNCELoss(queue_size=5, in_batch_negatives=False)
    query, key = VIEWS((3,), 4)
    assert loss(query, key) == 0
    expected = fastkd.info_nce(query, key, key.detach(), in_batch_negatives=False)
    assert_same([loss(query, key)], [expected])


# ---------------------------------------------------------------------------------- training loops


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=full)])
def test_one_tensor_in_two_places(compiled, engine):
    x, constant = normal(9, 4).requires_grad_(), normal(9, 4, seed=9)
    for loss in (
        lambda x: fastkd.clip_contrastive(x, x, 3.0),
        lambda x: fastkd.siglip(x, x, 3.0, -1.0),
        lambda x: fastkd.nt_xent(x, x),
        lambda x: fastkd.info_nce(x, x, normalize=False, symmetric=True),
        lambda x: fastkd.info_nce(x, x, x, in_batch_negatives=False),
        lambda x: fastkd.info_nce(x, constant, constant),
        lambda x: fastkd.similarity_kl(x, constant, student_keys=x, teacher_keys=constant),
    ):
        torch._dynamo.reset()
        call = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
        assert_same(results(call, [x]), by_formula(loss, [x]))


def test_vmap_over_labels_alone(engine):
    """The classes of one and the same features are told in several ways."""
    features, labels = with_classes((3, 9), 4)
    features = features[0].detach()
    both = torch.func.grad_and_value(fastkd.sup_con)
    found = torch.func.vmap(both, (None, 0))(features, labels)
    single = [both(features, each) for each in labels]
    assert_same(found, [torch.stack(x) for x in zip(*single, strict=True)])


@pytest.mark.parametrize("n", [1, 3])
def test_numbers_on_the_host_with_rows_on_a_device(n):
    """A last batch of one example has no loss, and asks for no other device."""
    x, y = (torch.empty(n, 4, device="meta", requires_grad=True) for _ in range(2))
    half = torch.tensor(0.5, requires_grad=True)
    for loss in (
        fastkd.info_nce(x, y, temperature=half, negative_weight=half, margin=half),
        fastkd.clip_contrastive(x, y, half, half),
        fastkd.nt_xent(x, y, temperature=half),
        fastkd.sup_con(x, torch.zeros(n, dtype=torch.int64, device="meta"), temperature=half),
        fastkd.similarity_kl(x, y.detach(), student_temperature=half, mask_self=True),
    ):
        assert loss.device.type == "meta"


CHUNK = 1 << 14  # numbers


@each_loss
def test_no_matrix_of_similarities(case, monkeypatch):
    """Memory is that of chunks, and of numbers for each example and feature."""
    in_chunks_of(CHUNK, monkeypatch)
    n, width = 1024, 16
    inputs = case.inputs((n,), width, torch.float32)

    def peak():
        results(case, inputs)
        with PeakMemory() as memory:
            results(case, inputs)
        return memory.peak_bytes

    rows = 4 * n * width * (2 if case is NT_XENT else 1)
    with fastkd.backend("portable"):
        assert peak() <= 14 * rows + 3 * 4 * CHUNK + 128 * n
    with fastkd.backend("formula"):  # so that the numbers above mean something
        assert peak() >= 2 * 4 * n * n


@full
@each_case
@pytest.mark.parametrize("n, width", [(33, 3), (19, 40), (150, 5)])
def test_every_shape(case, n, width, engine):
    inputs = case.inputs((n,), width)
    assert_same(results(case, inputs), results(case.truth, exact(inputs)))
