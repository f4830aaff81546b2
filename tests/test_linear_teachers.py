"""Several teachers with heads: their mixture, chunks, memory, torch.compile, shares."""

import contextlib

import pytest
import torch
from choice import quick_if
from exactness import assert_same
from hidden_states import (
    N_ENTRIES,
    Products,
    compiled,
    nine_positions,
    results,
    three_teachers,
    trained,
)
from inputs import DEVICE, normal
from meter import PeakMemory
from torch.utils._pytree import tree_leaves

import fastkd
from fastkd import _checks, _heads
from fastkd.problems.rows import DIVERGENCES


@pytest.fixture
def networks():
    return nine_positions()


@pytest.fixture
def teachers():
    return three_teachers()


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
    student, weight = normal(9, 5), normal(64, 5, seed=1)
    hidden, weights = ([normal(size, n, seed=size + n) for n in (3, 4)] for size in (9, 64))
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


@pytest.mark.parametrize("n_chunks", [1, 3])
@quick_if(lambda n_chunks, engine: engine != "triton" or n_chunks == 1)
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

    def peak(n_teachers, **options):
        tensors = [torch.empty(x, width, device="meta") for x in (n_rows, n_cols)]
        teachers = [[torch.empty_like(x)] * n_teachers for x in tensors]
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
    assert peak(3, temperature=2.0) == peak(3)  # metrics alone need the mixture at T = 1 too


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


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wide", ["teacher_hidden", "teacher_weight", "teacher_weights"])
def test_a_teacher_that_is_not_read_widens_the_compute_dtype_too(networks, wide, reduction, engine):
    (*of_student, teacher, teacher_weight), labels = networks
    of_teacher = dict(
        teacher_hidden=teacher, teacher_weight=teacher_weight,
        teacher_weights=torch.ones(1, device=DEVICE),
    )  # fmt: skip
    of_teacher = {k: x.double() if k == wide else x.float() for k, x in of_teacher.items()}

    def found():
        narrow = [x.float() for x in of_student]
        return results(narrow, labels=labels, alpha=1.0, reduction=reduction, **of_teacher)

    with fastkd.backend("formula"):
        expected = found()
    assert [x.dtype for x in found()] == [torch.float64, torch.float32, torch.float32]
    assert_same(found()[:1], expected[:1], 1e-14)
    assert_same(found()[1:], expected[1:], 1e-6)


def test_shares_have_the_digits_of_weights_in_float64(networks, engine):
    narrow = [x.detach().float() for x in networks[0]]
    options = dict(
        divergence={"forward_kl": 0.3, "reverse_kl": 0.7},
        teacher_weights=torch.ones(1, dtype=torch.float64, device=DEVICE),
    )
    found = fastkd.linear_kd(*narrow, **options)
    with fastkd.backend("formula"):
        assert_same([found], [fastkd.linear_kd(*narrow, **options)], 1e-14)


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
