"""The contrastive family: its losses by every engine equal the published ones, and stay small."""

import math
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_exact, assert_same, exact, in_dtype, results
from losses import DEVICE, BatchCase, normal
from meter import PeakMemory
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import _pairs, similarity
from fastkd._backend import triton_obstacle
from fastkd.portable import _similarities as portable
from fastkd.portable import contrastive as by_chunks

smoke = pytest.mark.smoke
ENGINES = [
    "formula",
    "portable",
    "portable in chunks",
    "portable with maxima",
    "portable in half",
    "triton",
]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Each in turn computes the losses of the test."""
    if request.param == "triton":
        obstacle = triton_obstacle([torch.empty(0, device=DEVICE)])
        if obstacle:
            pytest.skip(f"{obstacle}; TRITON_INTERPRET=1 runs the kernels without one")
    for family in (_pairs, similarity):  # small batches have a test of their own
        monkeypatch.setattr(family, "_FEW_PAIRS", 0)
    if request.param == "portable in chunks":
        monkeypatch.setitem(portable._CHUNK_ELEMENTS, "cpu", 50)
    if request.param == "portable in half":  # as on a GPU, where half precision is multiplied

        def product(a, b, out):
            return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

        monkeypatch.setattr(
            portable, "multiplies_halves", lambda rows, half: rows.dtype == torch.float32
        )
        monkeypatch.setattr(portable, "_product", product)
    if request.param in ("portable with maxima", "portable in half"):  # as on a GPU
        monkeypatch.setitem(portable._CHUNK_ELEMENTS, "cpu", 50)
        monkeypatch.setattr(portable.Similarities, "shift", lambda similarities: None)
    with fastkd.backend(request.param.split()[0]):
        yield request.param


# ------------------------------------------------------------- the losses as people write them


def unit(x):
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-12)


def published_info_nce(
    query, key, negatives=None, temperature=0.07, negative_weight=1.0, normalize=True,
    symmetric=False, margin=0.0, decoupled=False, in_batch_negatives=True,
):  # fmt: skip
    """Row by row."""
    if normalize:
        query, key = unit(query), unit(key)
        negatives = None if negatives is None else unit(negatives)

    def one_way(query, key, negatives):
        losses = []
        for i, q in enumerate(query):
            positive = (q @ key[i] - margin) / temperature
            others = [j for j in range(len(key)) if j != i and in_batch_negatives]
            logits = [key[others] @ q, *([] if negatives is None else [negatives @ q])]
            logits = torch.cat(logits) / temperature
            if not len(logits):
                losses.append(0 * positive)
                continue
            below = torch.cat([logits + math.log(negative_weight), positive[None]])
            losses.append((below[:-1] if decoupled else below).logsumexp(0) - positive)
        return torch.stack(losses).mean()

    loss = one_way(query, key, negatives)
    return (loss + one_way(key, query, None)) / 2 if symmetric else loss


def published_clip(image, text, logit_scale=5.0, logit_bias=0.0):
    logits = logit_scale * image @ text.T + logit_bias
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def published_siglip(image, text, logit_scale=5.0, logit_bias=-2.0):
    logits = logit_scale * image @ text.T + logit_bias
    signs = 2 * torch.eye(len(image), device=image.device, dtype=image.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


def published_nt_xent(view1, view2, temperature=0.5):
    z = unit(torch.cat([view1, view2]))
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(own, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(view1)))


def published_sup_con(features, labels, temperature=0.1, anchors="with_positive"):
    """Anchor by anchor."""
    z, losses = unit(features), []
    for i, label in enumerate(labels.tolist()):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if int(labels[j]) == label]
        if positives:
            log_sum = (z[others] @ z[i] / temperature).logsumexp(0)
            losses.append(log_sum - (z[positives] @ z[i]).mean() / temperature)
        elif anchors == "all":
            losses.append(0 * z[i].sum())
    return torch.stack(losses).mean() if losses else 0 * z.sum()


def published_similarity_kl(
    student, teacher, student_keys=None, teacher_keys=None, student_temperature=0.07,
    teacher_temperature=0.07, symmetric=False, mask_self=False,
):  # fmt: skip
    networks = ((student, student_keys), (teacher, teacher_keys))
    s, t = (unit(q) @ unit(q if k is None else k).T for q, k in networks)
    s, t = s / student_temperature, t / teacher_temperature
    if mask_self:
        kept = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
        s, t = (x.T[kept].view(len(x), -1) if symmetric is None else x for x in (s, t))
        rows = [(a[k], b[k]) for a, b, k in zip(s, t, kept, strict=True)]
        columns = [(a[k], b[k]) for a, b, k in zip(s.T, t.T, kept.T, strict=True)]
    else:
        rows, columns = zip(s, t, strict=True), zip(s.T, t.T, strict=True)

    def mean_kl(pairs):
        return torch.stack(
            [F.kl_div(a.log_softmax(0), b.softmax(0), reduction="sum") for a, b in pairs]
        ).mean()

    return (mean_kl(rows) + mean_kl(columns)) / 2 if symmetric else mean_kl(rows)


# ------------------------------------------------------------------------------------- the cases


def embeddings(examples, n_features, dtype=torch.float64, seed=0, n=2):
    tensors = [normal(*examples, n_features, seed=seed + i, dtype=dtype) for i in range(n)]
    return [x.requires_grad_() for x in tensors]


def unit_embeddings(*arguments):
    tensors = [F.normalize(x.detach(), dim=-1) for x in embeddings(*arguments)]
    return [x.requires_grad_() for x in tensors]


def with_bank(examples, n_features, dtype=torch.float64, seed=0):
    bank = normal(*examples[:-1], 13, n_features, seed=7, dtype=dtype)
    return [*embeddings(examples, n_features, dtype, seed), bank.requires_grad_()]


def with_labels(examples, n_features, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-2, 3, examples, generator=generator).mul_(1000).to(DEVICE)
    return [*embeddings(examples, n_features, dtype, seed, n=1), labels]


def of_two_networks(examples, n_features, dtype=torch.float64, seed=0):
    student, teacher = embeddings(examples, n_features, dtype, seed)
    return [student, torch.cat([teacher, teacher[..., :2].square()], -1).detach()]


def with_keys(examples, n_features, dtype=torch.float64, seed=0):
    networks = of_two_networks(examples, n_features, dtype, seed)
    keys = of_two_networks((*examples[:-1], 11), n_features, dtype, seed + 5)
    return [*networks, *keys]


def similarity_kl(student, teacher, student_keys, teacher_keys, **options):
    keys = dict(student_keys=student_keys, teacher_keys=teacher_keys)
    return fastkd.similarity_kl(student, teacher, **keys, **options)


def case(loss, published, inputs=embeddings, **options):
    return BatchCase(loss, options, (None, published), inputs)


NCE = fastkd.info_nce, published_info_nce
KL = fastkd.similarity_kl, published_similarity_kl
INFO_NCE = case(*NCE)
BOTH_WAYS = case(*NCE, symmetric=True)
CLIP = case(partial(fastkd.clip_contrastive, logit_scale=5.0), published_clip, unit_embeddings)
SIGLIP = case(
    partial(fastkd.siglip, logit_scale=5.0, logit_bias=-2.0), published_siglip, unit_embeddings
)
NT_XENT = case(fastkd.nt_xent, published_nt_xent)
SUP_CON = case(fastkd.sup_con, published_sup_con, with_labels)
SOFT = case(*KL, of_two_networks)
LOSSES = [INFO_NCE, BOTH_WAYS, CLIP, SIGLIP, NT_XENT, SUP_CON, SOFT]
NAMES = ["info_nce", "symmetric", "clip", "siglip", "nt_xent", "sup_con", "similarity_kl"]
WITH_OPTIONS = [
    case(*NCE, with_bank, negative_weight=0.3, margin=0.1),
    case(*NCE, with_bank, negative_weight=0.3, symmetric=True, decoupled=True),
    case(*NCE, with_bank, in_batch_negatives=False, temperature=0.2),
    case(*NCE, with_bank, in_batch_negatives=False, decoupled=True),
    case(*NCE, unit_embeddings, normalize=False, symmetric=True, margin=-0.2),
    case(*NCE, decoupled=True, negative_weight=2.0),
    case(fastkd.sup_con, published_sup_con, with_labels, anchors="all", temperature=0.3),
    case(*KL, of_two_networks, mask_self=True, teacher_temperature=0.2),
    case(*KL, of_two_networks, mask_self=True, symmetric=True),
    case(similarity_kl, published_similarity_kl, with_keys, teacher_temperature=0.03),
    case(similarity_kl, published_similarity_kl, with_keys, symmetric=True),
]
each_loss = pytest.mark.parametrize("case", LOSSES, ids=NAMES)
each_case = pytest.mark.parametrize(
    "case", LOSSES + WITH_OPTIONS, ids=NAMES + [f"with options {i}" for i in range(11)]
)


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
@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "clip", "similarity_kl"])
def test_rows_without_anything_close(name, monkeypatch):
    """A later chunk finds that it needs maxima: what the first ones added is made anew."""
    monkeypatch.setitem(portable._CHUNK_ELEMENTS, "cpu", 100)
    case = dict(zip(NAMES, LOSSES, strict=True))[name]
    option = dict(clip="logit_scale", similarity_kl="student_temperature").get(name, "temperature")
    query, key = normal(2, 30, 6).abs().requires_grad_().unbind()
    far = torch.where(torch.arange(30)[:, None] == 25, -1.0, 1.0).double().to(DEVICE)
    inputs = [F.normalize(x * far).detach().requires_grad_() for x in (query, key)]
    inputs[1] = F.normalize(key).detach().requires_grad_()
    inputs[1].requires_grad_(name != "similarity_kl")
    options = {option: 110.0 if name == "clip" else 1 / 110}
    found = results(lambda *x: case(*x, **options), inputs)
    assert_same(found, results(lambda *x: case.eager(*x, **options), inputs), 1e-11)


def test_a_student_whose_embeddings_are_alike(engine):
    """The sums of its exponentials and of the teacher's are float32 numbers, their quotient not."""
    generator = torch.Generator().manual_seed(0)
    noise, teacher = torch.randn(2, 32, 64, generator=generator, dtype=torch.float64).to(DEVICE)
    student = (1 + 0.01 * noise).requires_grad_()
    options = dict(student_temperature=0.01, teacher_temperature=0.01, mask_self=True)
    truth = published_similarity_kl(student, teacher, **options).detach()
    found = fastkd.similarity_kl(student.float(), teacher.float(), **options).detach()
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=0)


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


def test_a_vector_of_zeros(engine):
    """As torch.nn.functional.normalize has it."""
    for case in (INFO_NCE, BOTH_WAYS, NT_XENT):
        inputs = case.inputs((5,), 3)
        inputs[0].detach()[2] = 0
        found = results(case, inputs)
        assert all(x.isfinite().all() for x in found)


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


# -------------------------------------------------------------------------------------- kernels


@pytest.fixture
def kernels():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("in Triton's interpreter: TRITON_INTERPRET=1")
    with fastkd.backend("triton"):
        yield pytest.importorskip("fastkd.kernels._similarities")


@smoke
@each_case
@pytest.mark.parametrize("multiprocessors", [1, 3, 1000])
def test_however_programs_share_the_work(case, multiprocessors, kernels, monkeypatch):
    """Few have several tiles of rows and add to their own sums, many share the columns of one."""
    family = pytest.importorskip("fastkd.kernels.contrastive")
    device = kernels.Device(multiprocessors, False)
    for module in (kernels, family):
        monkeypatch.setattr(module, "device_of", lambda tensor: device)
    inputs = case.inputs((150,), 5)
    assert_same(results(case, inputs), results(case.eager, inputs), 1e-11)


@each_case
def test_float32_where_it_may_be_rounded(case, kernels, monkeypatch):
    inputs = case.inputs((67,), 33, torch.float32)
    truth = results(case.eager, exact(inputs))
    by_chunks = results(case, inputs)
    monkeypatch.setattr(kernels, "_may_be_rounded", lambda nvidia: True)
    found = results(case, inputs)
    for x, y in zip(found, truth, strict=True):  # of a TF32 number 11 digits are kept
        assert (x.double() - y).abs().max() <= 2**-7 * y.abs().max()
    # and by the kernels it was
    assert any(not torch.equal(x, y) for x, y in zip(found, by_chunks, strict=True))


def test_float16_keeps_what_is_small(kernels):
    """Slopes of 1e-9 in each pair."""
    family = pytest.importorskip("fastkd.kernels.contrastive")
    query, key = normal(5, 32).half().double(), normal(2000, 32, seed=1).half().double()
    numbers = [torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (1.0, [20.0], [0.2])]
    scale, anchors, weights = numbers[0], numbers[1].repeat(5), numbers[2].repeat(5)

    def gradients(engine, dtype):
        tensors = [x.to(dtype) for x in (query, key, scale, anchors, weights)]
        options = "pairs", -1, False, True, "float16", "query key", ""
        found = engine.forward(*tensors, None, None, *options)[1].double()
        return found.split([query.numel(), key.numel()])

    for x, y in zip(
        gradients(family, torch.float32), gradients(by_chunks, torch.float64), strict=True
    ):
        assert (x - y).norm() <= 1e-2 * y.norm()


def test_who_allows_the_rounding(kernels, monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        for precision, may in (("highest", False), ("high", True), ("medium", True)):
            torch.set_float32_matmul_precision(precision)
            assert kernels._may_be_rounded(True) == may == matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


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


# ------------------------------------------------------------------------------- training loops


@each_case
@pytest.mark.parametrize("tensors", ["fake", "meta"])
def test_no_step_waits_for_a_gpu(case, tensors, engine):
    """Looking at a value that is not there raises."""
    if engine == "triton" and tensors == "meta":
        pytest.skip("kernels for tensors without memory are compiled: tests/compiled")
    like = case.inputs((19,), 5)
    with FakeTensorMode() if tensors == "fake" else torch.device("meta"):
        inputs = [torch.empty(x.shape, dtype=x.dtype).requires_grad_(x.requires_grad) for x in like]
        gradients = torch.autograd.grad(case(*inputs), [x for x in inputs if x.requires_grad])
    assert [x.shape for x in gradients] == [x.shape for x in like if x.requires_grad]


@each_case
def test_two_runs_agree_bit_for_bit(case, engine):
    inputs = case.inputs((70,), 5, torch.float32)
    for first, second in zip(results(case, inputs), results(case, inputs), strict=True):
        assert torch.equal(first, second)


@each_loss
def test_func_grad_and_vmap(case, engine):
    inputs = [x.detach() for x in case.inputs((2, 5), 3)]
    both = tuple(i for i, x in enumerate(inputs) if x.is_floating_point())
    gradient_and_value = torch.func.grad_and_value(case, both if case is not SOFT else 0)
    single = [gradient_and_value(*pair) for pair in zip(*inputs, strict=True)]
    found = torch.func.vmap(gradient_and_value)(*inputs)
    flat = [torch.utils._pytree.tree_leaves(x) for x in single]
    expected = [torch.stack(x) for x in zip(*flat, strict=True)]
    assert_same(torch.utils._pytree.tree_leaves(found), expected)


@each_loss
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(case, reentrant, engine):
    inputs = case.inputs((5,), 3)
    trained = [x for x in inputs if x.requires_grad]
    expected = torch.autograd.grad(case(*inputs), trained)
    checkpoint(case, *inputs, use_reentrant=reentrant).backward()
    assert_same([x.grad for x in trained], expected)


@smoke
@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(case, dtype, engine):
    inputs = case.inputs((9,), 5, torch.float32)
    trained = [x for x in inputs if x.requires_grad]
    expected = case(*inputs)
    with torch.autocast(DEVICE.type, dtype):
        found = case(*inputs)
    assert torch.equal(found, expected)
    for x, y in zip(*(torch.autograd.grad(z, trained) for z in (found, expected)), strict=True):
        assert torch.equal(x, y)


@each_case
def test_torch_compile(case, engine):
    inputs = case.inputs((19,), 3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: case(*x) * 1.5, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, inputs), results(lambda *x: case(*x) * 1.5, inputs))
    with torch.no_grad():
        assert_same([compiled(*inputs)], [case(*inputs) * 1.5])


@each_case
def test_a_small_batch_is_its_formula(case):
    """Fewer calls than an engine makes."""
    inputs = case.inputs((9,), 4)
    found = results(case, inputs)
    with fastkd.backend("formula"):
        for x, y in zip(found, results(case, inputs), strict=True):
            assert torch.equal(x, y)


def test_numbers_are_not_burned_into_the_graph():
    """A temperature that is annealed, or a λ, is not compiled again and again."""
    query, key, bank = with_bank((9,), 4)
    labels = torch.arange(9, device=DEVICE) % 3
    numbers = [0.05 + 0.01 * i for i in range(12)]
    for loss in (
        lambda x: fastkd.info_nce(query, key, bank, temperature=x),
        lambda x: fastkd.info_nce(query, key, negative_weight=x, margin=x),
        lambda x: fastkd.clip_contrastive(query, key, x),
        lambda x: fastkd.siglip(query, key, x, -x),
        lambda x: fastkd.nt_xent(query, key, temperature=x),
        lambda x: fastkd.sup_con(query, labels, temperature=x),
        lambda x: fastkd.similarity_kl(query, key.detach(), student_temperature=x),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for x in numbers:
            assert_same([compiled(x)], [loss(x)])


@pytest.mark.parametrize("compiled", [False, True])
def test_one_tensor_in_two_places(compiled, engine):
    (x,) = embeddings((9,), 4, n=1)
    constant = normal(9, 4, seed=9)
    for loss in (
        lambda x: fastkd.clip_contrastive(x, x, 3.0),
        lambda x: fastkd.siglip(x, x, 3.0, -1.0),
        lambda x: fastkd.nt_xent(x, x),
        lambda x: fastkd.info_nce(x, x, normalize=False, symmetric=True),
        lambda x: fastkd.info_nce(x, x, x, in_batch_negatives=False),
        lambda x: similarity_kl(x, constant, x, constant),
    ):
        torch._dynamo.reset()
        call = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
        with fastkd.backend("formula"):
            expected = results(loss, [x])
        assert_same(results(call, [x]), expected)


@pytest.mark.parametrize("n", [1, 3])
def test_numbers_on_the_host_with_rows_on_a_device(n):
    """A last batch of one example has no loss, and asks for no other device."""
    x, y = (torch.empty(n, 4, device="meta", requires_grad=True) for _ in range(2))
    number = torch.tensor(0.5, requires_grad=True)
    for loss in (
        fastkd.info_nce(x, y, temperature=number, negative_weight=number, margin=number),
        fastkd.clip_contrastive(x, y, number, number),
        fastkd.nt_xent(x, y, temperature=number),
        fastkd.sup_con(x, torch.zeros(n, dtype=torch.int64, device="meta"), temperature=number),
        fastkd.similarity_kl(x, y.detach(), student_temperature=number, mask_self=True),
    ):
        assert loss.device.type == "meta"


def test_a_tower_in_inference_mode(engine):
    image, text = unit_embeddings((9,), 4)
    with torch.inference_mode():
        frozen = text.clone()
    for loss in (
        lambda x, y: fastkd.clip_contrastive(x, y, 3.0),
        lambda x, y: fastkd.siglip(x, y, 3.0, -1.0),
        lambda x, y: fastkd.info_nce(x, y, normalize=False),
    ):
        found, expected = (
            results(lambda x, loss=loss, other=other: loss(x, other), [image])
            for other in (frozen, text.detach())
        )
        assert_same(found, expected)


def test_an_empty_bank_is_on_the_graph(engine):
    query, key, _ = with_bank((5,), 4)
    bank = torch.empty(0, 4, dtype=query.dtype, device=DEVICE, requires_grad=True)
    fastkd.info_nce(query.detach(), key.detach(), bank).backward()
    assert bank.grad.shape == bank.shape


@each_loss
def test_double_backward_says_how(case, engine):
    inputs = case.inputs((4,), 3)
    if engine == "formula":
        inputs = [x.detach().requires_grad_() if x.requires_grad else x for x in inputs]
        assert torch.autograd.gradgradcheck(lambda x: case(x, *inputs[1:]), inputs[:1])
        return
    gradients = torch.autograd.grad(case(*inputs), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r'Double backward .* fastkd.backend\("formula"\)'):
        gradients[0].square().sum().backward()


# ----------------------------------------------------------------------------------------- queue


def test_a_queue_of_the_keys_before():
    loss, keys = fastkd.InfoNCELoss(queue_size=7, temperature=0.3), []
    for step in range(4):
        query, key = embeddings((3,), 4, seed=step)
        bank = torch.cat([key[:0].detach(), *keys])[-7:]
        expected = fastkd.info_nce(query, key, bank, temperature=0.3)
        assert_same([loss(query, key)], [expected])
        keys.append(key.detach())
        assert torch.equal(loss.queue, torch.cat(keys)[-7:]) and not loss.queue.requires_grad
    twin = fastkd.InfoNCELoss(queue_size=7, temperature=0.3)
    twin.load_state_dict(loss.state_dict())
    twin.eval()
    assert_same([twin(query, key), twin(query, key)], [loss.eval()(query, key)] * 2)
    for size in (-1, 2.5, True):
        with pytest.raises(ValueError, match=rf"queue_size .* got {size}"):
            fastkd.InfoNCELoss(queue_size=size)
    with pytest.raises(ValueError, match=r"queue holds keys of D = 4, got keys \[3, 5\]"):
        twin(*embeddings((3,), 5))


def test_a_queue_holds_no_more_than_its_keys():
    loss = fastkd.InfoNCELoss(queue_size=4)
    loss(*embeddings((50,), 3))
    assert loss.queue.untyped_storage().nbytes() == loss.queue.nbytes == 4 * 3 * 8
    shorter = fastkd.InfoNCELoss(queue_size=2)
    shorter.load_state_dict(loss.state_dict())
    assert torch.equal(shorter.queue, loss.queue[-2:])
    assert not fastkd.InfoNCELoss().state_dict()


def test_a_queue_alone():
    """The first step has no negatives."""
    loss = fastkd.InfoNCELoss(queue_size=5, in_batch_negatives=False)
    query, key = embeddings((3,), 4)
    assert loss(query, key) == 0
    expected = fastkd.info_nce(query, key, key.detach(), in_batch_negatives=False)
    assert_same([loss(query, key)], [expected])


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
        (lambda: fastkd.similarity_kl(Q, K[:2]), ValueError, "student and teacher"),
        (lambda: fastkd.similarity_kl(Q, K, student_keys=K), ValueError, "give both"),
        (
            lambda: fastkd.similarity_kl(Q, K, student_keys=K[:3], teacher_keys=K),
            ValueError,
            "student_keys and teacher_keys",
        ),
        (
            lambda: fastkd.similarity_kl(
                Q, K, student_keys=K[:3], teacher_keys=K[:3], mask_self=True
            ),
            ValueError,
            "mask_self .* 3 and 4",
        ),
    ],
)
def test_wrong_inputs(call, error, sentence):
    with pytest.raises(error, match=sentence.replace("[3, 3]", r"\[3, 3\]")):
        call()


def test_the_teacher_gets_no_gradient(engine):
    student, teacher = embeddings((5,), 3)
    fastkd.similarity_kl(student, teacher).backward()
    assert teacher.grad is None and student.grad.any()
