"""Chunks of positions: rows that count, their products, memory and rounding."""

import pytest
import torch
from choice import quick_if
from exactness import assert_same
from hidden_states import Products, nine_positions, results, three_teachers, trained
from inputs import DEVICE, normal
from meter import PeakMemory

import fastkd
from fastkd import _heads, _products
from fastkd.portable._mixtures import mix


@pytest.fixture
def networks():
    return nine_positions()


# ------------------------------------------------------------------------------ rows that count


@pytest.fixture(params=["at hand", "on a GPU"])
def weights_are(request, monkeypatch):
    """Let the loop treat weights as a GPU's, at which it must not look."""
    if request.param == "on a GPU":
        monkeypatch.setattr(_heads, "are_at_hand", lambda weights: False)
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "none"])
@quick_if(lambda weights_are, engine: engine != "triton" or weights_are == "on a GPU")
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
@quick_if(lambda reduction, engine: engine != "triton" or reduction == "none")
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


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@quick_if(
    lambda divergence, weights_are, engine: (
        engine != "triton" or (divergence, weights_are) == ("forward_kl", "on a GPU")
    )
)
def test_several_teachers_where_nothing_counts(networks, divergence, weights_are, engine):
    """Rows of weight 0 may hold anything in every teacher."""
    (student, weight, *_), _ = networks
    hidden, weights, biases = three_teachers()
    counted = torch.arange(9, device=DEVICE) % 3 > 0
    options = dict(weights=counted, divergence=divergence, teacher_bias=biases)
    expected = results([student, weight], hidden, weights, **options)
    dirty = [torch.where(counted[:, None], x, torch.nan) for x in hidden]
    assert_same(results([student, weight], dirty, weights, **options), expected)


# --------------------------------------------------------------------------- products and memory


@pytest.mark.parametrize("n_chunks", [1, 3])
@quick_if(lambda n_chunks, engine: engine != "triton" or n_chunks == 3)
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
