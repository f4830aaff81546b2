"""Losses of similarities in training loops: autograd, compiler, autocast, devices."""

from functools import partial

import contracts
import contrasts
import pytest
import torch
import torch.nn.functional as F
from contrasts import (
    FEW,
    FOR_FEW,
    SOFT,
    SUP_CON,
    WITH_OPTIONS,
    each_case,
    each_loss,
    embeddings,
    for_many,
    similarity_kl,
    smoke,
    unit_embeddings,
    what_computes,
    with_bank,
)
from exactness import assert_same, results
from losses import DEVICE, normal
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd import _pairs
from fastkd.portable import _small_contrastive

engine = contrasts.engine


@for_many
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
    contracts.agrees_with_itself(case, case.inputs((70,), 5, torch.float32))


@for_many
@each_loss
def test_func_grad_and_vmap(case, engine):
    inputs = case.inputs((2, 5), 3)
    both = tuple(i for i, x in enumerate(inputs) if x.is_floating_point())
    contracts.maps_over_batches(case, inputs, both if case is not SOFT else 0)


@for_many
def test_vmap_over_labels_alone(engine):
    """Of one and the same features, whose classes are told in several ways."""
    features, labels = SUP_CON.inputs((3, 9), 4)
    features = features[0].detach()
    found = torch.func.vmap(torch.func.grad_and_value(fastkd.sup_con), (None, 0))(features, labels)
    single = [torch.func.grad_and_value(fastkd.sup_con)(features, each) for each in labels]
    assert_same(found, [torch.stack(x) for x in zip(*single, strict=True)])


@each_loss
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(case, reentrant, engine):
    contracts.survives_checkpoint(case, case.inputs((5,), 3), reentrant)


@smoke
@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(case, dtype, engine):
    inputs = case.inputs((9,), 5, torch.float32)
    contracts.ignores_autocast(case, inputs, dtype, what_computes(case, engine))


@for_many
@each_case
def test_torch_compile(case, engine):
    contracts.compiles(case, case.inputs((19,), 3))


@pytest.fixture
def computed(monkeypatch):
    """What is computed as for few, from here on: whether it was finite."""
    taken, compute = [], _small_contrastive._computed

    def recorded(*arguments):
        found = compute(*arguments)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(_small_contrastive, "_computed", recorded)
    return taken


@smoke
@each_case
def test_a_small_batch_takes_few_calls(case, computed):
    """Value and gradients at once; what is rare is left to the formula."""
    inputs = case.inputs((9,), 4)
    found = results(case, inputs)
    with fastkd.backend("formula"):
        expected = results(case, inputs)
    assert computed == [True] * (case in FEW)
    for x, y in zip(found, expected, strict=True):
        assert_same([x], [y], 1e-12 if case in FEW else 0)
    with torch.no_grad():
        assert_same([case(*inputs)], expected[:1])


@smoke
def test_what_few_examples_leave_to_the_formula(computed):
    query, key, bank = with_bank((9,), 4)
    labels = torch.arange(9, device=DEVICE) % 3
    far, tiny = 200 * F.normalize(query), query * torch.tensor([[1e-13]] + 8 * [[1.0]])
    alike = F.normalize(10 + query).float()
    close, number = query + 0.6 * key, torch.tensor(3.0, requires_grad=True)
    for loss, taken in (
        (lambda: fastkd.info_nce(query, key, bank), [True]),
        (lambda: fastkd.info_nce(query, key, bank.detach(), normalize=False), [True]),
        (lambda: fastkd.info_nce(query, key, bank, symmetric=True), []),
        (lambda: fastkd.info_nce(query, key, margin=0.1), []),
        (lambda: fastkd.info_nce(query, key, negative_weight=0.1), []),
        (lambda: fastkd.info_nce(query, key, decoupled=True), []),
        (lambda: fastkd.info_nce(tiny, key), [True]),
        (lambda: fastkd.info_nce(query, key, temperature=1e-4), [False]),
        (lambda: fastkd.nt_xent(query, close, temperature=1 / 80), [True]),
        (lambda: fastkd.info_nce(query, close, temperature=1 / 100), [True]),
        (lambda: fastkd.info_nce(alike, alike, temperature=1 / 100), [True]),  # of powers above all
        (lambda: fastkd.clip_contrastive(alike, -alike, 95.0), [False]),  # of powers near 0
        (lambda: fastkd.sup_con(query, labels, temperature=1 / 80), [False]),
        (lambda: fastkd.sup_con(query, labels + 2**25), [False]),
        (lambda: fastkd.clip_contrastive(far, -far, 5.0), [False]),
        (lambda: fastkd.clip_contrastive(query, key, 5.0, 1.0), [True]),
        (lambda: fastkd.clip_contrastive(query, key, 5.0, number), []),
        (lambda: fastkd.clip_contrastive(query, key, 0 * number), [False]),
    ):
        computed.clear()
        found = loss()
        assert computed == taken
        with fastkd.backend("formula"):
            assert_same([found], [loss()], 1e-12 if found.dtype == torch.float64 else 1e-6)


def test_what_many_examples_leave_to_the_engine(monkeypatch):
    monkeypatch.setattr(_pairs, "_FEWER_PAIRS", 0)
    case = WITH_OPTIONS[5]
    contracts.says_how_to_differentiate_twice(case, case.inputs((4,), 3), "portable")


@smoke
def test_few_examples_hide_no_nan_and_take_whole_numbers():
    query, key, bank = (normal(16, 5, seed=i, dtype=torch.float32) for i in range(3))
    nan = torch.tensor(torch.nan)
    labels = torch.arange(16, device=DEVICE) % 3
    for loss in (
        lambda x: fastkd.info_nce(query, key, bank, temperature=x),
        lambda x: fastkd.info_nce(query, key, symmetric=True, temperature=x),
        lambda x: fastkd.clip_contrastive(query, key, x),
        lambda x: fastkd.siglip(query, key, x, x),
        lambda x: fastkd.nt_xent(query, key, temperature=x),
        lambda x: fastkd.sup_con(query, labels, temperature=x),
    ):
        assert loss(nan).isnan()
    for bias in (torch.tensor(-10), torch.tensor(True)):
        expected = fastkd.siglip(query, key, 3.0, float(bias))
        assert_same([fastkd.siglip(query, key, 3.0, bias)], [expected])


@smoke
def test_few_examples_without_subnormal_numbers():
    """Reciprocals of large sums are 0 then."""
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]).requires_grad_()
    case = partial(fastkd.clip_contrastive, text=image.detach(), logit_scale=88.0)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has them always")
    try:
        found = results(case, [image])
    finally:
        torch.set_flush_denormal(False)
    with fastkd.backend("formula"):
        for x, y in zip(found, results(case, [image]), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


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
    if compiled and engine == FOR_FEW:
        pytest.skip("what is compiled takes another engine")
    (x,) = embeddings((9,), 4, n=1)
    constant = normal(9, 4, seed=9)  # as key and as bank too
    for loss in (
        lambda x: fastkd.clip_contrastive(x, x, 3.0),
        lambda x: fastkd.siglip(x, x, 3.0, -1.0),
        lambda x: fastkd.nt_xent(x, x),
        lambda x: fastkd.info_nce(x, x, normalize=False, symmetric=True),
        lambda x: fastkd.info_nce(x, x, x, in_batch_negatives=False),
        lambda x: fastkd.info_nce(x, constant, constant),
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
    contracts.says_how_to_differentiate_twice(case, inputs, what_computes(case, engine))
