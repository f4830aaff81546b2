"""Losses from hidden states and heads: vocabularies, what is asked, options, errors."""

import types

import pytest
import torch
import torch.nn.functional as F
from choice import quick_if
from exactness import assert_same
from hidden_states import N_ENTRIES, compiled, nine_positions, results
from inputs import DEVICE, heads, normal
from torch import nn

import fastkd
from fastkd.problems.rows import DIVERGENCES

# rows of logits are what its kernels solve, whose divergences test_rows.py and test_kd.py show
one_on_kernels = quick_if(
    lambda divergence, engine: engine != "triton" or divergence == "jensen_shannon"
)


@pytest.fixture
def networks():
    return nine_positions()


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
@one_on_kernels
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
@one_on_kernels
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


@pytest.mark.parametrize("options", [{"forward_kl": 0.3}, {"forward_kl": 0.7, "reverse_kl": 1.1}])
def test_shares_have_the_digits_of_a_teacher_in_float64(networks, options, engine):
    tensors, _ = networks
    student, weight, *of_teacher = tensors
    narrow = [x.detach().float() for x in (student, weight)]
    found = fastkd.linear_kd(*narrow, *of_teacher, divergence=options)
    with fastkd.backend("formula"):
        assert_same([found], [fastkd.linear_kd(*narrow, *of_teacher, divergence=options)])


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
