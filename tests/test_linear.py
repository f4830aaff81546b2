"""Losses from hidden states and heads: vocabularies, rows that count, products, memory, options."""

import contextlib
import types

import pytest
import torch
import torch.nn.functional as F
from choice import quick_if
from exactness import assert_same
from inputs import DEVICE, heads, normal
from meter import PeakMemory
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastkd
from fastkd import _checks, _heads, _products
from fastkd.portable._mixtures import mix
from fastkd.problems.rows import DIVERGENCES

N_ENTRIES = 13


@pytest.fixture
def networks():
    """Return hidden states and heads of 9 positions, and their labels."""
    *tensors, labels, _ = heads((9,), 5)
    return tensors, labels


def trained(tensors):
    student, weight, *teacher = (x.detach().clone() for x in tensors)
    return [student.requires_grad_(), weight.requires_grad_(), *teacher]


def results(tensors, *more, loss=fastkd.linear_kd, **options):
    """Return the loss and the gradients of the student's hidden states and head."""
    tensors = trained(tensors)
    value = loss(*tensors, *more, **options)
    upstream = normal(*value.shape, dtype=value.dtype, seed=99)
    return [value.detach(), *torch.autograd.grad(value, tensors[:2], upstream)]


def eager(student, weight, teacher, teacher_weight, labels=None, entries=slice(None)):
    """Return the forward KL of all logits at once, of some entries of the vocabulary."""
    log_q = (student @ weight[entries].T).log_softmax(-1)
    log_p = (teacher @ teacher_weight[entries].T).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


# ----------------------------------------------------------------------------------- vocabularies


def test_vocabularies_of_two_sizes_are_refused_with_three_ways_out(networks):
    (student, weight, teacher, teacher_weight), _ = networks
    ways = r'(?s)13 .* 11.*vocab="common".*vocab="pad".*vocab=ids'
    with pytest.raises(ValueError, match=ways):
        fastkd.linear_kd(student, weight, teacher, teacher_weight[:11])


def test_the_common_vocabulary_is_renormalised(networks, engine):
    (student, weight, teacher, teacher_weight), _ = networks
    expected = results(networks[0], loss=lambda *x: eager(*x, entries=slice(0, 11)))
    longer = [student, weight, teacher, teacher_weight[:11]]
    assert_same(results(longer, vocab="common"), expected)
    shorter = [student, weight[:11], teacher, teacher_weight]
    found = results(shorter, vocab="common")
    assert_same(found, [expected[0], expected[1], expected[2][:11]])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_missing_entries_are_padded_with_a_probability_of_0(networks, divergence, engine):
    (student, weight, teacher, teacher_weight), _ = networks
    loss = getattr(fastkd, divergence)

    def expected(student, weight, teacher, teacher_weight):
        z, z_teacher = student @ weight.T, teacher @ teacher_weight.T
        width = max(z.shape[1], z_teacher.shape[1])
        z, z_teacher = (F.pad(x, (0, width - x.shape[1]), value=-torch.inf) for x in (z, z_teacher))
        with fastkd.backend("formula"):
            return loss(z, z_teacher)

    for tensors in (
        [student, weight, teacher, teacher_weight[:11]],
        [student, weight[:11], teacher, teacher_weight],
    ):
        found = results(tensors, vocab="pad", divergence=divergence)
        truth = results(tensors, loss=expected)
        assert_same(found[:1], truth[:1])
        if truth[0].isfinite():
            assert_same(found, truth)


def test_ids_restrict_the_vocabulary(networks, engine):
    (student, weight, teacher, teacher_weight), _ = networks
    ids = torch.tensor([7, 2, 12, 0], device=DEVICE)
    expected = results(networks[0], loss=lambda *x: eager(*x, entries=ids))
    assert_same(results(networks[0], vocab=ids), expected)
    # a draft model has these entries alone
    draft = [student, weight[ids], teacher, teacher_weight]
    assert_same(results(draft, vocab=ids), [*expected[:2], expected[2][ids]])
    # in another order, where the positions of labels are others
    order, labels = torch.arange(N_ENTRIES, device=DEVICE).flip(0), networks[1]
    turned = torch.where(labels < 0, labels, N_ENTRIES - 1 - labels)
    found = results(networks[0], turned, vocab=order, alpha=0.3)
    assert_same(found, results(networks[0], labels, alpha=0.3))
    logits = teacher @ teacher_weight.T
    found = results([student, weight], vocab=ids, teacher_logits=logits)
    assert_same(found, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_entries_that_both_biases_exclude_change_nothing(divergence, engine):
    """Vocabularies are padded to a multiple of 64, with biases of −∞, where others give NaN."""
    student, weight, teacher, teacher_weight = heads((9,), 5)[:4]
    bias = normal(N_ENTRIES, seed=4)
    excluding = torch.where(torch.arange(N_ENTRIES, device=DEVICE) < 11, bias, -torch.inf)
    options = dict(divergence=divergence, skew=0.1)
    found = results(
        [student, weight, teacher, teacher_weight],
        student_bias=excluding, teacher_bias=excluding, **options,
    )  # fmt: skip
    fewer = [student, weight[:11], teacher, teacher_weight[:11]]
    expected = results(fewer, student_bias=bias[:11], teacher_bias=bias[:11], **options)
    assert all(x.isfinite().all() for x in found)
    assert_same([*found[:2], found[2][:11]], expected)
    assert not found[2][11:].any()


# ------------------------------------------------------------------------------ rows that count


@pytest.fixture(params=["at hand", "on a GPU"])
def weights_are(request, monkeypatch):
    """Let the loop treat weights as a GPU's, at which it must not look."""
    if request.param == "on a GPU":
        monkeypatch.setattr(_heads, "are_at_hand", lambda weights: False)
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_of_weight_0_reach_no_product(networks, reduction, weights_are, engine):
    tensors, labels = networks
    weights = torch.tensor([1.0, 0, 2, 0.5, 0, 1, 1, 0, 3], device=DEVICE, dtype=torch.float64)
    options = dict(alpha=0.3, weights=weights, reduction=reduction)
    expected = results(tensors, labels, **options)
    student, weight, teacher, teacher_weight = (x.detach().clone() for x in tensors)
    student[weights == 0], teacher[weights == 0] = torch.nan, torch.inf
    found = results([student, weight, teacher, teacher_weight], labels, **options)
    assert_same(found, expected)
    assert not found[1][weights == 0].any()


def test_a_bound_of_the_rows_that_count_saves_the_others(networks, weights_are):
    tensors, labels = networks
    weights = torch.tensor([0, 1.0, 0, 2, 0, 0, 0, 3, 0.5], device=DEVICE, dtype=torch.float64)
    expected = results(tensors, labels, alpha=0.3, weights=weights)
    for bound in (3, 4, 9, 12):
        with Products() as products:
            found = results(tensors, labels, alpha=0.3, weights=weights, num_valid=bound)
        assert_same(found, expected)
        rows = 3 if weights_are == "at hand" else min(bound, 9)
        assert products.rows == {rows}
    found = results(tensors, labels, alpha=0.3, weights=weights, num_valid=2)
    assert found[0].isnan() == (weights_are == "on a GPU")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bound_without_weights_or_labels_changes_nothing(networks, reduction, weights_are):
    expected = results(networks[0], reduction=reduction)
    assert_same(results(networks[0], reduction=reduction, num_valid=2), expected)


def test_a_bound_that_is_too_small_gives_no_gradient_to_step_with(networks, monkeypatch):
    monkeypatch.setattr(_heads, "are_at_hand", lambda weights: False)
    tensors, labels = networks
    loss, _, of_head = results(tensors, labels, alpha=0.3, num_valid=2)
    assert loss.isnan() and of_head.isnan().all()


@pytest.mark.parametrize("backend", ["portable", "formula"])
@pytest.mark.parametrize("teachers", ["hidden", "logits", "several", "shares"])
@pytest.mark.parametrize("by", ["labels", "weights"])
def test_what_does_not_count_may_hold_anything(networks, teachers, by, backend):
    """A NaN there would reach the head, whose gradient is a product with the hidden states."""
    (student, weight, teacher, teacher_weight), labels = networks
    out = labels == -100
    options = dict(metrics=True) | (dict(weights=~out) if by == "weights" else {})
    given = dict(labels=labels, alpha=0.3) if by == "labels" else {}
    logits = teacher @ teacher_weight.T

    def found(of_student, of_teacher, of_logits, shares):
        tensors, more = trained([of_student, weight, of_teacher, teacher_weight]), {}
        if teachers == "hidden":
            batch = tensors
        elif teachers == "several":
            batch = [*tensors[:2], [tensors[2]] * 2, [teacher_weight] * 2]
        else:
            batch = tensors[:2]
            more["teacher_logits"] = of_logits if teachers == "logits" else [of_logits] * 2
            more |= {} if teachers == "logits" else {"teacher_weights": shares}
        with fastkd.backend(backend):
            loss, details = fastkd.linear_kd(*batch, **given, **options, **more)
            gradients = torch.autograd.grad(loss, tensors[:2])
        return [loss.detach(), *gradients, *details.values()]

    shares = normal(9, 2, seed=22).softmax(-1)
    expected = found(student, teacher, logits, shares)
    assert not any(x[out].any() for x in expected[3:])  # nor is it measured
    dirty = [x.detach().clone() for x in (student, teacher, logits, shares)]
    for x, value in zip(dirty, (torch.nan, torch.inf, torch.nan, 0.0), strict=True):
        x[out] = value
    assert_same(found(*dirty), expected)


def test_metrics_of_what_does_not_count_are_0_on_a_gpu_too(networks, weights_are):
    tensors, labels = networks
    _, found = fastkd.linear_kd(*tensors, labels, alpha=0.3, metrics=True)
    assert len(found) == 5
    for x in found.values():
        assert not x[labels == -100].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_that_are_learnt_get_a_gradient(networks, reduction, engine):
    (student, weight, teacher, teacher_weight), labels = networks
    initial = normal(9, seed=23).exp()

    def found(loss):
        weights = initial.clone().requires_grad_()
        value = loss(weights)
        upstream = normal(*value.shape, seed=24)
        return [value.detach(), *torch.autograd.grad(value, weights, upstream)]

    z, z_teacher = student @ weight.T, teacher @ teacher_weight.T
    options = dict(alpha=0.3, reduction=reduction)
    expected = found(lambda w: fastkd.kd(z, z_teacher, labels, weights=w, temperature=1, **options))

    def loss(weights):
        value, *parts = fastkd.linear_kd(
            student, weight, teacher, teacher_weight, labels,
            weights=weights, return_parts=True, **options,
        )  # fmt: skip
        assert not any(x.requires_grad for x in parts)
        return value

    assert_same(found(loss), expected)


# --------------------------------------------------------------------------- products and memory


class Products(TorchDispatchMode):
    """The products of a region, and how many rows of hidden states the first ones have."""

    def __init__(self):
        super().__init__()
        self.n, self.rows = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            if self.n < 1:
                self.rows.add(len(args[0]))
            self.n += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("n_chunks", [1, 3])
def test_products_of_a_chunk(networks, n_chunks, monkeypatch, engine):
    """Four with both gradients, three with a frozen head, two without a gradient."""
    monkeypatch.setattr(_heads, "MOST_ROWS", 9 // n_chunks)
    (student, weight, teacher, teacher_weight), labels = networks
    options = dict(alpha=0.3, divergence=("forward_kl", "total_variation", "jensen_shannon"))
    frozen = [student.detach().requires_grad_(), weight.detach()]
    for of_student, n in ((trained(networks[0])[:2], 4), (frozen, 3)):
        with Products() as products:
            loss = fastkd.linear_kd(*of_student, teacher, teacher_weight, labels, **options)
            loss.backward()
        # labels at hand leave 7 rows
        assert products.n == n * (3 if n_chunks == 3 else 1)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Products() as products:
            fastkd.linear_kd(student, weight, teacher, teacher_weight, labels, **options)
        assert products.n == 2 * (3 if n_chunks == 3 else 1)
    with Products() as products:
        results(networks[0], labels, reduction="none", **options)
    assert products.n == (2 + 4) * (3 if n_chunks == 3 else 1)


@pytest.mark.parametrize("budget", [1 << 18, 1 << 22, 1 << 30])
def test_a_chunk_takes_no_more_than_its_budget(budget):
    n_rows, n_cols, width = 300, 2000, 16
    hidden, head, other = (torch.empty(x, width, device="meta") for x in (n_rows, n_cols, n_cols))
    with fastkd.backend("portable"), PeakMemory() as memory:
        loss = fastkd.linear_kd(
            hidden.requires_grad_(), head.requires_grad_(), hidden.detach(), other,
            memory_budget=budget,
        )  # fmt: skip
        loss.backward()
    of_gradients = 4 * (n_rows + n_cols) * width
    # scratch of a chunk of rows; a head's gradient is there twice, before and after its upstream
    scratch = 8 * min(1 << 23, n_rows * n_cols) * 4
    logits = 2 * 4 * n_rows * n_cols
    assert memory.peak_bytes <= min(budget, logits) + 2 * of_gradients + scratch


def test_chunks_are_balanced():
    def size(n_rows, budget=-1, n_cols=32000):
        hidden, head = torch.empty(n_rows, 8, device="meta"), torch.empty(n_cols, 8, device="meta")
        seen = []

        def solve_rows(rows, needs_grad, **_):
            seen.append(len(rows.student))
            return (rows.student[:, 0] * 0, None), (None,)

        engine = _heads.Engine(solve_rows, mix)
        with fastkd.backend("portable"), pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastkd.portable.linear.value_and_gradients", engine.value_and_gradients)
            options = {} if budget < 0 else {"memory_budget": budget}
            fastkd.linear_kd(hidden, head, hidden, head, **options)
        return seen

    assert size(2048, n_cols=1000) == [1024, 1024]
    assert size(1100, n_cols=1000) == [550, 550]
    assert size(1000, budget=1, n_cols=100) == [1] * 1000
    assert size(100, budget=8 * 1000 * 30, n_cols=1000) == [25] * 4
    assert size(2048, n_cols=1 << 21)[0] == 256  # fewer would make products slow


# ------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("is_close", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_gradients_of_bfloat16_are_rounded_once(divergence, is_close):
    """Rounding a result of float64 once errs by 1.66e-3; dz in bfloat16 would err by 2.3e-3."""
    n, n_cols, width = 128, 512, 64
    hidden, head = normal(n, width), normal(n_cols, width, seed=1) / 4
    teacher = hidden + 1e-2 * normal(n, width, seed=2) if is_close else normal(n, width, seed=2)
    other = head if is_close else normal(n_cols, width, seed=3) / 4
    tensors = [x.bfloat16() for x in (hidden, head, teacher, other)]
    _, *found = results(tensors, divergence=divergence)
    with fastkd.backend("formula"):
        _, *truth = results([x.double() for x in tensors], divergence=divergence)
    for x, y in zip(found, truth, strict=True):
        assert x.dtype == torch.bfloat16
        assert (x.double() - y).norm() <= 1.75e-3 * y.norm()


def test_products_of_halves_keep_what_one_half_would_lose(monkeypatch):
    """CUDA multiplies factors of half precision as they are, and dz becomes two of them."""
    seen = []

    def product(a, b, out):
        seen.append(a.dtype)
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    def multiplies(half, sums):
        return half.dtype == torch.bfloat16

    monkeypatch.setattr(_products, "product", product)
    monkeypatch.setattr(_products, "_multiplies", multiplies)
    monkeypatch.setattr(
        _products,
        "add_product",
        lambda a, b, sums: sums.add_(product(a, b, torch.empty_like(sums))),
    )
    test_gradients_of_bfloat16_are_rounded_once("forward_kl", True)
    assert {*seen} == {torch.bfloat16}


@pytest.mark.parametrize("shapes", [(3, 5, 4), (3, 4, 700), (3, 700, 4)], ids=str)
@pytest.mark.parametrize("adds", [False, True])
def test_products_of_tiles(shapes, adds, monkeypatch):
    monkeypatch.setattr(_products, "_TILE", 100)
    n, k, m = shapes
    a, b = normal(n, k, dtype=torch.float32), normal(k, m, dtype=torch.bfloat16, seed=1)
    out = normal(n, m, dtype=torch.float32, seed=2)
    expected = a.double() @ b.double() + (out.double() if adds else 0)
    _products.multiply(a, b, out, adds=adds)
    assert_same([out], [expected], 1e-6)


# ----------------------------------------------------------------------------------- what is asked


def test_parts_and_metrics(networks, engine):
    tensors, labels = networks
    student, weight, teacher, teacher_weight = tensors
    names = {"forward_kl": 0.5, "jensen_shannon": 2.0}
    loss, ce, *parts, found = fastkd.linear_kd(
        *tensors, labels, alpha=0.3, temperature=2.0, divergence=names, metrics=True,
        return_parts=True,
    )  # fmt: skip
    z, z_teacher, counted = student @ weight.T, teacher @ teacher_weight.T, labels != -100
    own = [getattr(fastkd, name)(z, z_teacher, temperature=2.0, reduction="none") for name in names]
    losses = F.cross_entropy(z, labels, reduction="none")
    assert_same([ce], [losses[counted].mean()])
    assert_same(parts, [x[counted].mean() for x in own])
    assert_same([loss], [0.3 * ce + 0.7 * (0.5 * parts[0] + 2.0 * parts[1])])
    assert not any(x.requires_grad for x in (ce, *parts, *found.values()))
    q, p = z.softmax(-1), z_teacher.softmax(-1)
    expected = {
        **dict(zip(names, own, strict=True)),
        "student_entropy": -(q * q.log()).sum(-1),
        "teacher_entropy": -(p * p.log()).sum(-1),
        "top1_agreement": (q.argmax(-1) == p.argmax(-1)).double(),
        "label_log_probability": -losses,
    }
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert_same([found[name]], [torch.where(counted, x, 0)])


def test_cross_entropy_alone_needs_no_teacher(networks, engine):
    (student, weight, *_), labels = networks
    found = results([student, weight], None, None, labels, alpha=1.0)
    expected = results([student, weight], loss=lambda h, w: F.cross_entropy(h @ w.T, labels))
    assert_same(found, expected)


def test_autocast_multiplies_as_a_linear_layer(networks):
    tensors = [x.detach().float() for x in networks[0]]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = results(tensors)
    halves = [x.bfloat16() for x in tensors]
    expected = results(halves)
    assert [x.dtype for x in found] == [torch.float32] * 3
    assert_same(found, [x.float() for x in expected], 0)


def test_a_tied_head_gets_both_gradients(networks, engine):
    """The teacher of a tied head is the same matrix, as a constant."""
    (student, weight, *_), _ = networks
    embedding = weight.detach().clone().requires_grad_()
    ids = torch.arange(9, device=DEVICE)

    def loss(embedding, own):
        hidden = F.embedding(ids, embedding)
        return own(hidden, embedding, student.detach(), weight.detach())

    found = torch.autograd.grad(3 * loss(embedding, fastkd.linear_kd), embedding)
    assert_same(found, torch.autograd.grad(3 * loss(embedding, eager), embedding))


def test_a_compiled_loss_is_one_op(networks):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda *x: fastkd.linear_kd(*x, memory_budget=1), backend=backend, fullgraph=True
    )
    with torch.no_grad():
        compiled(*networks[0])
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("fastkd.linear_forward" in name for name in called) == 1
    assert not any("mm" in name for name in called)


def compiled(loss, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(loss, backend=backend, fullgraph=True)


def test_a_bound_of_the_rows_that_count_is_not_specialised_on(networks):
    """It is another number in each step, which would compile again until the limit is reached."""
    tensors, labels = networks
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    loss = compiled(lambda *x: fastkd.linear_kd(*x[:-1], alpha=0.3, num_valid=x[-1]), backend)
    for bound in (6, 7, 8, 9):
        loss(*tensors, labels, bound)
    assert len(graphs) <= 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_options(networks, reduction):
    """One tensor may be passed twice, a wide one that does not widen the result, and by name."""
    (student, weight, *_), labels = networks
    head = weight.detach().float().T.contiguous().T  # stored as its transpose
    student, bias = student.detach().float(), torch.zeros(len(head), device=DEVICE)
    weights = normal(9, seed=25).exp()
    options = dict(alpha=0.3, weights=weights, student_bias=bias, teacher_bias=bias)

    def loss(function):
        def of(student, weight):
            return function(
                student, weight, teacher_hidden=student.detach() / 2, teacher_weight=head,
                labels=labels, reduction=reduction, **options,
            )  # fmt: skip

        return of

    found, expected = (
        results([student, head], loss=loss(function))
        for function in (compiled(fastkd.linear_kd), fastkd.linear_kd)
    )
    assert [x.dtype for x in found] == [torch.float32] * 3
    assert_same(found, expected, 1e-6)


# ------------------------------------------------------------------------------- many teachers


def test_several_teachers_are_a_mixture(networks):
    (student, weight, teacher, teacher_weight), _ = networks
    another = normal(9, 3, seed=20), normal(N_ENTRIES, 3, seed=21)
    logits = [teacher @ teacher_weight.T, another[0] @ another[1].T]
    of_rows = normal(9, 2, seed=22).softmax(-1)
    for shares in (None, torch.tensor([0.3, 0.7], dtype=torch.float64, device=DEVICE), of_rows):
        p = torch.stack([(x / 2).softmax(-1) for x in logits], -1)
        p = p.mean(-1) if shares is None else (p * shares[..., None, :]).sum(-1)

        def expected(student, weight, p=p):
            return fastkd.forward_kl(
                student @ weight.T, p, temperature=2.0, teacher_form="probabilities",
                teacher_temperature=1.0, scale_t2=False,
            ) * 4  # fmt: skip

        options = dict(teacher_weights=shares, temperature=2.0)
        truth = results([student, weight], loss=expected)
        heads_of_both = [teacher, another[0]], [teacher_weight, another[1]]
        assert_same(results([student, weight], *heads_of_both, **options), truth)
        assert_same(results([student, weight], teacher_logits=logits, **options), truth)


@pytest.fixture
def teachers():
    """Return hidden states, heads and biases of three teachers of other widths and dtypes."""
    hidden = [normal(9, width, seed=20 + width) for width in (3, 7, 4)]
    weights = [normal(N_ENTRIES, width, seed=30 + width) for width in (3, 7, 4)]
    hidden[1], weights[2] = hidden[1].float(), weights[2].bfloat16()
    return hidden, weights, [normal(N_ENTRIES, seed=40), None, normal(N_ENTRIES, seed=41)]


def by_both(tensors, *more, dtype=torch.float64, **options):
    """Return losses, gradients and metrics of the engine, and those of the formula."""

    def found(backend):
        tensors_of_student = [x.detach().clone().to(dtype).requires_grad_() for x in tensors]
        with fastkd.backend(backend) if backend else contextlib.nullcontext():
            value, details = fastkd.linear_kd(*tensors_of_student, *more, metrics=True, **options)
        upstream = normal(*value.shape, dtype=value.dtype, seed=99)
        gradients = torch.autograd.grad(value, tensors_of_student, upstream)
        return [value.detach(), *gradients, *details.values()]

    return found(None), found("formula")


SHARES = {
    "none": lambda: None,
    "numbers": lambda: [1.0, 0.0, 3.0],
    "of each row": lambda: normal(9, 3, seed=22).softmax(-1),
}


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("vocab", ["same", "common", "pad", "ids"])
@pytest.mark.parametrize("of", ["hidden states", "logits"])
@quick_if(
    lambda of, vocab, shares, engine: (
        engine != "triton" or (of, vocab, shares) == ("hidden states", "pad", "of each row")
    )
)
def test_several_teachers_in_chunks_are_the_formula(networks, teachers, of, vocab, shares, engine):
    (student, weight, *_), labels = networks
    hidden, weights, biases = teachers
    if vocab != "same":
        weights = [weights[0][:11], weights[1], weights[2][:12]]
        biases = [biases[0][:11], None, biases[2][:12]]
    options = dict(temperature=2.0, alpha=0.3, vocab=vocab, divergence="jensen_shannon")
    if vocab == "ids":
        options["vocab"] = torch.tensor([7, 2, 10, 0], device=DEVICE)
    labels = labels.clamp(max={"ids": 3, "common": 10}.get(vocab, 12))
    options["teacher_weights"] = SHARES[shares]()
    if of == "hidden states":
        batch, options["teacher_bias"] = (hidden, weights, labels), biases
    else:
        batch = (None, None, labels)
        options["teacher_logits"] = [
            h @ w.to(h.dtype).T for h, w in zip(hidden, weights, strict=True)
        ]
    options["teacher_softcap"] = 5.0 if of == "hidden states" else None
    found, expected = by_both([student, weight], *batch, **options)
    assert_same(found, expected)
    found, expected = by_both([student, weight], *batch, reduction="none", **options)
    assert_same(found, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@quick_if(lambda divergence, engine: engine != "triton" or divergence == "jensen_shannon")
def test_several_teachers_in_float32(divergence, engine):
    """The error is at most twice that of the formula."""
    student, weight = normal(40, 5), normal(64, 5, seed=1)
    hidden, weights = ([normal(size, n, seed=size + n) for n in (3, 4)] for size in (40, 64))
    options = dict(divergence=divergence, temperature=2.0)

    def of(dtype):
        more = [[x.to(dtype) for x in xs] for xs in (hidden, weights)]
        return by_both([student, weight], *more, dtype=dtype, **options)

    found, eager = of(torch.float32)
    _, truth = of(torch.float64)
    assert found[0].dtype == torch.float32
    for x, y, true in zip(found, eager, truth, strict=True):
        allowed = 2 * (y - true).norm() + 1e-6 * true.norm()
        assert (x - true).norm() <= allowed


@pytest.mark.parametrize("options", [{}, dict(alpha=0.3, metrics=True, reduction="none")], ids=str)
def test_a_sequence_of_one_teacher_is_that_teacher_bit_for_bit(networks, options, engine):
    (student, weight, teacher, teacher_weight), labels = networks
    logits = teacher @ teacher_weight.T

    def found(*batch, **more):
        with torch.no_grad():
            return tree_leaves(
                fastkd.linear_kd(student, weight, *batch, labels=labels, **options, **more)
            )

    for one, many in (
        (found(teacher, teacher_weight), found([teacher], [teacher_weight])),
        (found(teacher_logits=logits), found(teacher_logits=(logits,))),
    ):
        assert len(one) == len(many) and all(map(torch.equal, one, many))
    for x, y in zip(
        results(networks[0]), results([student, weight], [teacher], [teacher_weight]), strict=True
    ):
        assert torch.equal(x, y)


def test_no_probability_of_a_mixture_vanishes(engine):
    """Float32 has none below 1e-45, but their logarithms; an excluded entry stays excluded."""
    student, weight = normal(3, 4), normal(6, 4, seed=1)
    logits = torch.tensor([[0.0, 150, -300, -400, -torch.inf, -torch.inf]], device=DEVICE)
    logits = [logits.expand(3, 6), logits.roll(1, 1).expand(3, 6)]
    options = dict(divergence="reverse_kl", teacher_logits=logits)
    assert results([student, weight], **options)[0] == torch.inf  # and no NaN
    weight[:, 0] = torch.tensor([1.0, 1, 1, 1, 1, -1000.0])
    student[:, 0] = 10.0  # which gives the entry that all teachers exclude a probability of 0
    found, expected = by_both([student, weight], dtype=torch.float32, **options)
    assert found[0].isfinite() and found[0] > 100
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_several_teachers_where_nothing_counts(networks, teachers, divergence, weights_are, engine):
    """Rows of weight 0 may hold anything in every teacher."""
    (student, weight, *_), _ = networks
    hidden, weights, biases = teachers
    counted = torch.arange(9, device=DEVICE) % 3 > 0
    options = dict(weights=counted, divergence=divergence, teacher_bias=biases)
    expected = results([student, weight], hidden, weights, **options)
    dirty = [torch.where(counted[:, None], x, torch.nan) for x in hidden]
    assert_same(results([student, weight], dirty, weights, **options), expected)


@pytest.mark.parametrize("n_chunks", [1, 3])
@quick_if(lambda n_chunks, engine: engine != "triton" or n_chunks == 3)
def test_products_of_several_teachers(networks, teachers, n_chunks, monkeypatch, engine):
    """Each teacher takes one for a chunk, and its logits are made once for all divergences."""
    monkeypatch.setattr(_heads, "MOST_ROWS", 9 // n_chunks)
    student, weight = trained(networks[0])[:2]
    options = dict(divergence=("forward_kl", "total_variation"), metrics=True, temperature=2.0)
    for of_student, n in (((student, weight), 3 + 3), ((student, weight.detach()), 2 + 3)):
        with Products() as products:
            loss, _ = fastkd.linear_kd(*of_student, *teachers[:2], **options)
            loss.backward()
        assert products.n == n * n_chunks
    with torch.no_grad(), Products() as products:
        fastkd.linear_kd(student, weight, *teachers[:2], **options)
    assert products.n == (1 + 3) * n_chunks


@pytest.mark.parametrize("of", ["hidden states", "logits"])
def test_further_teachers_take_one_chunk_of_memory(of):
    n_rows, n_cols, width = 300, 2000, 16

    def peak(n_teachers):
        tensors = [torch.empty(x, width, device="meta") for x in (n_rows, n_cols)]
        teachers = [[torch.empty_like(x)] * n_teachers for x in tensors]
        options = {}
        if of == "logits":
            teachers, options["teacher_logits"] = [], [tensors[0] @ tensors[1].T] * n_teachers
        student = [x.requires_grad_() for x in tensors]
        with fastkd.backend("portable"), PeakMemory() as memory:
            # a budget of 100 rows for two tensors, and for three of them
            budget = 4 * n_cols * 100 * (2 + (n_teachers > 1))
            fastkd.linear_kd(*student, *teachers, memory_budget=budget, **options).backward()
        return memory.peak_bytes

    chunk = 4 * n_cols * 100
    # a mixture, or the logits of the next teacher; and less than 16 numbers a row
    assert peak(3) <= peak(1) + chunk + 64 * n_rows
    assert peak(5) <= peak(3) + 64 * n_rows


def test_a_compiled_mixture_is_one_op(networks, teachers):
    (student, weight, *_), labels = networks
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def loss(student, weight, *teachers):
        return fastkd.linear_kd(student, weight, teachers[:3], teachers[3:], labels, alpha=0.3)

    with torch.no_grad():
        compiled(loss, backend)(student, weight, *teachers[0], *teachers[1])
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("fastkd.linear_forward" in name for name in called) == 1
    assert not any("mm" in name or "logaddexp" in name for name in called)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_mixture_of_teachers_that_share_a_head(networks, reduction):
    """The head is passed twice, and one teacher ran under inference mode."""
    (student, weight, teacher, teacher_weight), labels = networks
    other = normal(9, teacher.shape[1], seed=20)
    with torch.inference_mode():
        other = other.clone()

    def loss(function, other):
        def of(student, weight):
            return function(
                student, weight, [teacher, other, teacher], [teacher_weight] * 3, labels,
                teacher_weights=[0.5, 1.0, 2.0], alpha=0.3, reduction=reduction,
            )  # fmt: skip

        return of

    found = results([student, weight], loss=loss(compiled(fastkd.linear_kd), other.clone()))
    assert_same(found, results([student, weight], loss=loss(fastkd.linear_kd, other)))
    with fastkd.backend("formula"):
        assert_same(found, results([student, weight], loss=loss(fastkd.linear_kd, other.clone())))


@pytest.mark.parametrize("backend", ["portable", "formula"])
def test_shares_of_teachers_are_constants(networks, backend):
    (student, weight, teacher, teacher_weight), _ = networks
    student, weight = trained(networks[0])[:2]
    shares = torch.tensor([0.3, 0.7], device=DEVICE, requires_grad=True)
    _checks._warn_once.cache_clear()
    with fastkd.backend(backend), pytest.warns(UserWarning, match="teacher_weights requires grad"):
        loss = fastkd.linear_kd(
            student, weight, [teacher] * 2, [teacher_weight] * 2, teacher_weights=shares
        )
    assert torch.autograd.grad(loss, shares, allow_unused=True) == (None,)


def test_shares_of_teachers_are_divided_by_their_sum(networks):
    (student, weight, teacher, teacher_weight), _ = networks
    logits = [teacher @ teacher_weight.T, normal(9, N_ENTRIES, seed=20)]
    found, expected = (
        results([student, weight], teacher_logits=logits, teacher_weights=shares)
        for shares in ([1.0, 3.0], [0.25, 0.75])
    )
    assert_same(found, expected)


def test_the_parts_of_several_teachers_are_detached(networks):
    (student, weight, teacher, teacher_weight), _ = networks
    student, weight = trained(networks[0])[:2]
    loss, *parts = fastkd.linear_kd(
        student, weight, [teacher] * 2, [teacher_weight] * 2, return_parts=True
    )
    assert loss.requires_grad and not any(x.requires_grad for x in parts)


@pytest.mark.parametrize("backend", ["portable", "formula"])
def test_the_compute_dtype_is_the_widest_of_all_networks(networks, backend):
    student, weight, teacher, teacher_weight = (x.detach().float() for x in networks[0])
    logits = (teacher @ teacher_weight.T).double()
    with fastkd.backend(backend):
        for loss in (
            fastkd.linear_kd(student, weight, teacher.double(), teacher_weight),
            fastkd.linear_kd(student, weight, teacher, teacher_weight.double()),
            fastkd.linear_kd(student, weight, teacher_logits=logits),
            fastkd.linear_kd(student, weight, teacher_logits=[logits, logits]),
        ):
            assert loss.dtype == torch.float64


@pytest.mark.parametrize("backend", ["portable", "formula"])
def test_terms_of_share_0_count_for_nothing(networks, backend):
    (student, weight, teacher, teacher_weight), labels = networks
    student, weight = trained(networks[0])[:2]
    with fastkd.backend(backend):
        loss = fastkd.linear_kd(
            student, weight, teacher, teacher_weight, divergence={"forward_kl": 0.0}
        )
        assert loss == 0
        assert not any(x.any() for x in torch.autograd.grad(loss, [student, weight]))
        # the forward KL is +∞ where the student lacks what the teacher has
        half = torch.tensor(0.5, device=DEVICE)
        value = fastkd.linear_kd(
            student, weight[:11], teacher, teacher_weight, labels.clamp(max=10),
            alpha=1.0, vocab="pad", divergence={"forward_kl": half},
        )  # fmt: skip
    assert value.isfinite()


# -------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "config, expected",
    [
        (dict(final_logit_softcapping=30.0), dict(student_softcap=30.0)),
        (dict(final_logit_softcapping=None), {}),
        (dict(logit_scale=0.0625), dict(student_logit_scale=0.0625)),
        (dict(model_type="granite", logits_scaling=8.0), dict(student_logit_scale=1 / 8)),
        (dict(model_type="hyperclovax", logits_scaling=8.0), dict(student_logit_scale=8.0)),
        (dict(logits_soft_cap=30.0), dict(student_softcap=30.0)),
        (dict(output_logit_soft_cap=30.0), dict(student_softcap=30.0)),
        (dict(logits_mup_width_multiplier=4.0), dict(student_logit_scale=0.25)),
        (dict(model_type="mpt", logit_scale="inv_sqrt_d_model"), {}),
        (
            dict(model_type="minicpm", hidden_size=2304, dim_model_base=256),
            dict(student_logit_scale=1 / 9),
        ),
        (dict(hidden_size=2304, dim_model_base=256), {}),
        (dict(lm_head_multiplier=0.5), dict(student_logit_scale=0.5)),
        (dict(output_multiplier=2.0), dict(student_logit_scale=2.0)),
        (dict(text_config=dict(final_logit_softcapping=5.0)), dict(student_softcap=5.0)),
        (dict(logit_scale=1.0), {}),
    ],
    ids=str,
)
def test_options_of_a_configuration(config, expected):
    text = config.get("text_config")
    as_object = dict(config) | ({} if text is None else dict(text_config=fake(text)))
    for given in (config, fake(as_object)):
        assert fastkd.head_options(given) == expected
        of_teacher = {k.replace("student", "teacher"): x for k, x in expected.items()}
        assert fastkd.head_options(given, "teacher") == of_teacher
    with pytest.raises(ValueError, match='network must be "student" or "teacher"'):
        fastkd.head_options(config, "peer")


def fake(attributes):
    return types.SimpleNamespace(**attributes)


def test_softcap_and_scale_are_those_of_the_model(networks, engine):
    tensors, labels = networks
    options = dict(student_softcap=2.0, teacher_softcap=3.0, student_logit_scale=0.5)
    options |= dict(teacher_logit_scale=2.0, alpha=0.3)

    def expected(student, weight, teacher, teacher_weight, labels):
        z = 2 * torch.tanh(0.5 * (student @ weight.T) / 2)
        z_teacher = 3 * torch.tanh(2 * (teacher @ teacher_weight.T) / 3)
        return fastkd.kd(z, z_teacher, labels, alpha=0.3, temperature=1.0)

    assert_same(results(tensors, labels, **options), results(tensors, labels, loss=expected))


def test_the_module_has_the_options_of_the_function(networks):
    tensors, labels = networks
    module = fastkd.LinearKDLoss(alpha=0.3, divergence="reverse_kl", temperature=2.0)
    options = dict(alpha=0.3, divergence="reverse_kl", temperature=2.0)
    assert_same([module(*tensors, labels)], [fastkd.linear_kd(*tensors, labels, **options)])
    ids = torch.tensor([7, 2, 12], device=DEVICE)
    module = fastkd.LinearKDLoss(vocab=ids)
    assert_same([module(*tensors)], [fastkd.linear_kd(*tensors, vocab=ids)])


# --------------------------------------------------------------------------------------- errors


class Sharded:
    """A tensor that is a DTensor by what is looked at."""

    def full_tensor(self):
        raise AssertionError


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda x: x.update(student_weight=Sharded()), r"DTensor.*student_weight.full_tensor\(\)"),
        (lambda x: x.update(student_weight=x["student_weight"].T), r"H = 5.*student_weight.t\(\)"),
        (lambda x: x.update(teacher_hidden=x["teacher_hidden"][:3]), "the same positions"),
        (lambda x: x.update(teacher_weight=None), "teacher_weight is missing"),
        (lambda x: x.update(teacher_logits=torch.zeros(9, 13)), "got teacher_logits and"),
        (
            lambda x: x.update(teacher_hidden=None, teacher_weight=None),
            "got no teacher and alpha=0.0",
        ),
        (lambda x: x.update(alpha=0.5), "needs labels"),
        (lambda x: x.update(student_bias=torch.zeros(5)), r"needs the shape \[13\]"),
        (lambda x: x.update(divergence="kl"), "divergence must be one of forward_kl"),
        (lambda x: x.update(divergence=("reverse_kl",) * 2), "names one twice"),
        (lambda x: x.update(divergence={"reverse_kl": -1.0}), r"reverse_kl.* at least 0"),
        (lambda x: x.update(divergence="jensen_shannon", beta=2.0), "beta must be a number in"),
        (lambda x: x.update(temperature=0.0), "temperature must be a finite number above 0"),
        (lambda x: x.update(student_softcap=0.0), "student_softcap must be a finite number above"),
        (lambda x: x.update(num_valid=2.5), "num_valid must be a whole number of at least 0"),
        (lambda x: x.update(memory_budget=0), "memory_budget must be a whole number of at least 1"),
        (lambda x: x.update(vocab="both"), 'vocab must be "same" or "common" or "pad"'),
        (lambda x: x.update(vocab=torch.tensor([0, 0])), "holds an entry twice"),
        (lambda x: x.update(vocab=torch.tensor([0, 13])), r"entries in \[0, 13\)"),
        (lambda x: x.update(vocab=torch.zeros(2)), r"a tensor \[K\] of entries"),
        (lambda x: x.update(labels=torch.full((9,), 13), alpha=0.5), r"lie in \[0, 13\)"),
        (lambda x: x.update(teacher_weights=[1.0, 2.0]), "for each of 1 teachers"),
        (lambda x: x.update(student_hidden=x["student_hidden"].long()), "floating-point"),
        (lambda x: x.update(teacher_weights=[-1.0]), "shares of the mixture, must be at least 0"),
        (lambda x: x.update(teacher_weights=[0.0]), "one of them above"),
        (lambda x: x.update(teacher_weights="a"), "for each of 1 teachers"),
        (lambda x: x.update(teacher_hidden=[x["teacher_hidden"]]), "several teachers need"),
        (lambda x: x.update(teacher_weight=[x["teacher_weight"]]), "several teachers need"),
        (lambda x: x.update(student_weight=nn.Linear(5, 13)), "pass its .weight, and its .bias"),
        (lambda x: x.update(divergence=5), "divergence must be one of forward_kl"),
        (lambda x: x.update(divergence=iter(["forward_kl"])), "divergence must be one of"),
        (lambda x: x.update(temperature=torch.ones(9)), "neither bias nor softcap nor alpha"),
        (
            lambda x: x.update(student_logit_scale=torch.ones((), requires_grad=True)),
            "multiply the hidden states by one that is learnt",
        ),
        (
            lambda x: x.update(student_softcap=torch.ones((), requires_grad=True)),
            "make the logits and pass them to fastkd.kd",
        ),
    ],
)
def test_errors_say_what_to_do(change, sentence):
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    given = dict(zip(names, (x.detach() for x in heads((9,), 5)[:4]), strict=True))
    given = {name: x.cpu() for name, x in given.items()}
    change(given)
    with pytest.raises((TypeError, ValueError), match=f"(?s).*{sentence}"):
        fastkd.linear_kd(**given)


def test_the_error_for_weights_speaks_of_no_logits():
    hidden, head = torch.zeros(2, 4, 5), torch.zeros(13, 5)
    with pytest.raises(ValueError, match=r"shape \[2, 4\], got \[2, 5\] of torch.float32$"):
        fastkd.linear_kd(hidden, head, hidden, head, weights=torch.zeros(2, 5))
