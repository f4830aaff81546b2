"""Losses between layers: names, hooks, wrappers, and what is kept of a forward."""

import copy
import gc
import pickle
import re
import warnings
import weakref
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import layers


class Block(nn.Module):
    """A layer that returns its hidden states and more, as those of Hugging Face's models do."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)

    def forward(self, x):
        hidden = self.linear(x).relu()
        return hidden, {"attention": hidden * 2}


class Network(nn.Module):
    def __init__(self, width, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(3, width)
        self.blocks = nn.ModuleList([Block(width, width), Block(width, width)])
        self.head = nn.Linear(width, 2)
        self.reentrant = None

    def forward(self, x):
        x = self.embed(x).relu()
        for block in self.blocks:
            if self.reentrant is None:
                x, _ = block(x)
            else:
                x = checkpoint(lambda h, b=block: b(h)[0], x, use_reentrant=self.reentrant)
        return self.head(x)


PAIRS = {"embed": "embed", "blocks.0": "blocks.1"}


def inputs(seed=7):
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))


def networks(student=4, teacher=4):
    return Network(student, 1), Network(teacher, 2).requires_grad_(False)


def run(student, teacher, x):
    """Run both networks, the student last because the order must not matter."""
    with torch.no_grad():
        teacher(x)
    return student(x)


def outputs_of(network, x):
    """Return what the layers of PAIRS are known to return."""
    embedded = network.embed(x)
    first, _ = network.blocks[0](embedded.relu())
    return embedded, first, network.blocks[1](first)[0]


def expected_of(student, teacher, x):
    embedded, first, _ = outputs_of(student, x)
    with torch.no_grad():
        target, _, second = outputs_of(teacher, x)
    return F.mse_loss(embedded, target), F.mse_loss(first, second)


def gradients(loss, network):
    network.zero_grad()
    loss.backward()  # and not torch.autograd.grad, which reentrant checkpointing refuses
    return [x.grad.clone() for x in network.parameters() if x.grad is not None]


def assert_same(found, expected, tolerance=1e-6):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def assert_trains_as_expected(pairs, attached, plain, x):
    """Compare two steps of `attached` networks with those of plain ones, value and gradients."""
    student, teacher = attached
    with pairs.attach(student, teacher):
        for _ in range(2):
            loss = run(student, teacher, x).sum() + pairs()
            expected = plain[0](x).sum() + sum(expected_of(*plain, x))
            assert_same([loss], [expected])
            assert_same(gradients(loss, student), gradients(expected, plain[0]))


# ------------------------------------------------------------------------------------------- pairs


def test_pairs_are_their_losses_on_the_outputs_of_layers():
    student, teacher = networks()
    pairs = fastkd.LayerPairs(PAIRS, F.mse_loss, weights=[2.0, 0.5], reduce="mean")
    with pairs.attach(student, teacher):
        run(student, teacher, inputs())
        loss, *parts = pairs(return_parts=True)
    expected = expected_of(student, teacher, inputs())
    assert_same(parts, expected)
    assert_same([loss], [(2 * expected[0] + 0.5 * expected[1]) / 2])
    assert_same(gradients(loss, student), gradients(expected[0] + 0.25 * expected[1], student))


def test_a_list_may_name_a_layer_several_times_and_a_tuple_is_several_layers():
    student, teacher = networks()
    losses = [fastkd.HintLoss(), fastkd.hint, fastkd.FSPLoss()]
    two = ("embed", "blocks.0")
    pairs = fastkd.LayerPairs([("embed", "embed"), ("embed", "blocks.1"), (two, two)], losses)
    maps = lambda outputs: outputs[0] if isinstance(outputs, tuple) else outputs  # noqa: E731
    with pairs.attach(student, teacher):
        pairs.select = pairs.teacher_select = None
        run(student, teacher, inputs())
        with pytest.raises(ValueError, match="H, W"):  # FSP wants maps
            pairs()
    as_maps = [
        *losses[:2],
        lambda s, t: fastkd.fsp([x[..., None] for x in s], [x[..., None] for x in t]),
    ]
    pairs = fastkd.LayerPairs(pairs.pairs, as_maps, select=maps)
    with pairs.attach(student, teacher):
        run(student, teacher, inputs())
        _, *parts = pairs(return_parts=True)
    s, t = outputs_of(student, inputs()), outputs_of(teacher, inputs())
    flows = [a[:, :, None] * b[:, None] for a, b, _ in (s, t)]
    assert_same(parts, [F.mse_loss(s[0], t[0]), F.mse_loss(s[0], t[2]), F.mse_loss(*flows)])


def test_select_says_what_of_an_output_is_compared():
    student, teacher = networks()
    for select, factor in ((0, 1), (lambda x: x[1]["attention"], 2)):
        pairs = fastkd.LayerPairs(
            {"blocks.0": "blocks.0"}, F.mse_loss, select=select, teacher_select=lambda x: x[0]
        )
        with pairs.attach(student, teacher):
            run(student, teacher, inputs())
            loss = pairs()
        s, t = (outputs_of(x, inputs())[1] for x in (student, teacher))
        assert_same([loss], [F.mse_loss(factor * s, t)])


class Outputs(NamedTuple):
    hidden: torch.Tensor
    others: dict


class Whole(nn.Module):
    """A network with one child, named as by DistributedDataParallel, that returns a structure."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x):
        for layer in self.module:
            x = layer(x)
        return Outputs(x, {"doubled": [2 * x]})


def test_whole_outputs_are_compared_and_the_teachers_are_detached():
    student, teacher, seen = Whole(1), Whole(2), []

    def loss(s, t):
        seen.append(t)
        return F.mse_loss(s.hidden, t.hidden) + F.mse_loss(s.others["doubled"][0], t.hidden)

    losses = [loss, F.mse_loss]
    pairs = fastkd.LayerPairs([("", ""), ("module.0", "module.1")], losses, select=lambda x: x)
    with pairs.attach(student, teacher):
        of_student, of_teacher = student(inputs()), teacher(inputs())
        found = pairs()
    first, second = student.module[0](inputs()), of_teacher.hidden
    expected = loss(of_student, of_teacher) + F.mse_loss(first, second)
    torch.testing.assert_close(found, expected)
    detached = seen[0]
    assert isinstance(detached, Outputs)
    assert not detached.hidden.requires_grad and not detached.others["doubled"][0].requires_grad


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return OrderedDict(logits=2 * self.inner(x), hidden=x)


def test_outputs_with_keys_need_one():
    x = inputs().requires_grad_()
    student, teacher = Keyed(), Keyed()
    pairs = fastkd.LayerPairs({"": ""}, F.mse_loss)
    with (
        pairs.attach(student, teacher),
        pytest.raises(TypeError, match=r"''.* OrderedDict with the keys logits, hidden.*select="),
    ):
        student(x)
    pairs = fastkd.LayerPairs({"": ""}, F.mse_loss, select="logits", teacher_select="hidden")
    with pairs.attach(student, teacher):
        run(student, teacher, x)
        assert_same([pairs()], [x.square().mean()])


def test_what_belongs_to_a_batch_goes_to_all_losses():
    student, teacher = networks()
    mask = torch.tensor([1, 0, 1, 1, 0])
    pairs = fastkd.LayerPairs(PAIRS, fastkd.HintLoss())
    with pairs.attach(student, teacher):
        run(student, teacher, inputs())
        loss = pairs(mask=mask)
    assert_same([loss], [sum(expected_of(student, teacher, inputs()[mask.bool()]))])


# --------------------------------------------------------------------------------- hooks and memory


def n_hooks(network):
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in network.modules())


def test_hooks_are_removed_at_the_end_and_after_an_error():
    student, teacher = networks()
    pairs = fastkd.LayerPairs(PAIRS, F.mse_loss)
    handle = pairs.attach(student, teacher)
    assert n_hooks(student) == n_hooks(teacher) == 4
    with pytest.raises(RuntimeError, match=r"attached already.*remove\(\)"):
        pairs.attach(student, teacher)
    handle.remove()
    handle.remove()
    with pytest.raises(ZeroDivisionError), pairs.attach(student, teacher):
        run(student, teacher, inputs())
        raise ZeroDivisionError
    with (
        pytest.raises(ValueError, match="layer"),
        fastkd.LayerPairs({"embed": "no"}, F.mse_loss).attach(student, teacher),
    ):
        pass
    assert n_hooks(student) == n_hooks(teacher) == 0
    with pytest.raises(RuntimeError, match=r"not attached.*with pairs.attach\(student, teacher\)"):
        pairs()


def test_what_was_caught_is_forgotten_after_the_call_or_replaced():
    student, teacher = networks()
    caught = []

    def watched(s, t):
        caught.extend(weakref.ref(x) for x in (s, t))
        assert s.requires_grad and not t.requires_grad
        return F.mse_loss(s, t)

    pairs = fastkd.LayerPairs({"embed": "embed"}, watched)
    with pairs.attach(student, teacher):
        run(student, teacher, inputs(1))
        run(student, teacher, inputs(2))  # which replaces the first one
        loss = pairs()
        assert_same([loss], [expected_of(student, teacher, inputs(2))[0]])
        del loss
        gc.collect()
        assert len(caught) == 2 and not any(x() is not None for x in caught)
        with pytest.raises(RuntimeError, match=r"student has not run .* since the last call"):
            pairs()
        student(inputs())
        with pytest.raises(RuntimeError, match="teacher has not run"):
            pairs()


def test_accumulated_micro_batches_add_up():
    student, teacher = networks()
    pairs = fastkd.LayerPairs(PAIRS, F.mse_loss)
    parts = [inputs(seed) for seed in (1, 2, 3)]
    with pairs.attach(student, teacher):
        for x in parts:
            run(student, teacher, x)
            pairs().backward()
    found = [x.grad for x in student.parameters() if x.grad is not None]
    assert_same(
        found, gradients(sum(sum(expected_of(student, teacher, x)) for x in parts), student)
    )


def test_a_forward_that_fails_leaves_nothing_behind():
    student, teacher = networks()
    pairs = fastkd.LayerPairs(PAIRS, F.mse_loss)
    with pairs.attach(student, teacher):
        with pytest.raises(RuntimeError):
            student(torch.zeros(5, 4))  # too wide
        student.embed(inputs())  # outside of a forward of the network
        with torch.no_grad():
            teacher(inputs())
        student(inputs())
        assert_same([pairs()], [sum(expected_of(student, teacher, inputs()))])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_again_unseen(reentrant):
    student, teacher = networks()
    plain = copy.deepcopy(student)
    student.reentrant = reentrant
    pairs = fastkd.LayerPairs(PAIRS, F.mse_loss)
    assert_trains_as_expected(pairs, (student, teacher), (plain, teacher), inputs())
    with pairs.attach(student, teacher):
        run(student, teacher, inputs())
        pairs().backward()
        assert not any(pairs._attachment._outputs)
    # deeper inside, reentrant checkpointing has no graph
    pairs = fastkd.LayerPairs({"blocks.0.linear": "embed"}, F.mse_loss)
    layers._warn_once.cache_clear()
    with pairs.attach(student, teacher), warnings.catch_warnings(record=True) as caught:
        run(student, teacher, inputs())
        assert pairs().requires_grad != reentrant
    message = r"'blocks.0.linear' has no gradient.*use_reentrant=False"
    assert [bool(re.search(message, str(x.message))) for x in caught] == [True] * reentrant


def test_a_whole_network_that_is_checkpointed_is_seen_once():
    student, teacher = networks()
    pairs = fastkd.LayerPairs(PAIRS, F.mse_loss)
    with pairs.attach(student, teacher):
        for _ in range(2):
            with torch.no_grad():
                teacher(inputs())
            output = checkpoint(student, inputs(), use_reentrant=False)
            loss = pairs()
            (loss + output.sum()).backward()
            assert not any(pairs._attachment._outputs) and not any(pairs._attachment._has_run)
    assert_same([loss], [sum(expected_of(student, teacher, inputs()))])


# ------------------------------------------------------------------------------- names and wrappers


def test_a_name_that_does_not_exist_has_its_way():
    student, teacher = networks()
    for pairs, message in (
        ({"blocks.2": "embed"}, r"student has no layer 'blocks.2'; near it are 'blocks.\d'"),
        ({"embed": "embedding"}, r"teacher has no layer 'embedding'; near it are 'embed'"),
        ({"xyz%": "embed"}, r"'xyz%'; none is like it. Names are .*named_modules\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fastkd.LayerPairs(pairs, F.mse_loss).attach(student, teacher)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got function"):
        fastkd.LayerPairs(PAIRS, F.mse_loss).attach(F.relu, teacher)


def test_layers_that_a_forward_does_not_call_are_named():
    student, teacher = networks()
    student.unused = nn.Linear(3, 3)
    pairs = fastkd.LayerPairs({"embed": "embed", "unused": "embed"}, F.mse_loss)
    with pairs.attach(student, teacher):
        run(student, teacher, inputs())
        with pytest.raises(RuntimeError, match="forward of the student did not call 'unused'"):
            pairs()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (({}, F.mse_loss), ValueError, "pairs are empty"),
        ((["embed"], F.mse_loss), TypeError, "a pair must be .* got 'embed'"),
        (({"embed": 3}, F.mse_loss), TypeError, "names in named_modules.*got 3"),
        ((PAIRS, [F.mse_loss] * 3), ValueError, "loss must be .* the 2 pairs, got 3"),
        ((PAIRS, "mse"), TypeError, "loss must be a function or a module .* got 'mse'"),
    ],
)
def test_arguments_that_are_none(arguments, error, message):
    with pytest.raises(error, match=message):
        fastkd.LayerPairs(*arguments)
    with pytest.raises(ValueError, match=r"weights must be .* the 2 pairs, got 1"):
        fastkd.LayerPairs(PAIRS, F.mse_loss, weights=[1.0])
    with pytest.raises(TypeError, match=r"weights must be one for each of the 2 pairs, got 2\.0"):
        fastkd.LayerPairs(PAIRS, F.mse_loss, weights=2.0)
    with pytest.raises(ValueError, match=r"weights\[1\] must be a finite number"):
        fastkd.LayerPairs(PAIRS, F.mse_loss, weights=[1.0, float("nan")])
    with pytest.raises(ValueError, match='reduce must be "sum" or "mean"'):
        fastkd.LayerPairs(PAIRS, F.mse_loss, reduce="none")


@pytest.fixture
def world():
    """Let this process be all of the ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_under_distributed_data_parallel(world):
    plain = networks(4, 6)
    pairs = fastkd.LayerPairs(
        {"module.embed": "embed", "blocks.0": "blocks.1"},
        [fastkd.HintLoss(4, 6), fastkd.HintLoss(4, 6)],
    )
    twin, student = copy.deepcopy(pairs), DistributedDataParallel(plain[0])
    trained = DistributedDataParallel(pairs)
    with pairs.attach(student, plain[1]):
        output = run(student, plain[1], inputs())
        (trained() + output.sum()).backward()
    with twin.attach(*plain):
        output = run(*plain, inputs())
        parameters = [*plain[0].parameters(), *twin.parameters()]
        expected = torch.autograd.grad(twin() + output.sum(), parameters)
    found = [x.grad for x in (*student.parameters(), *pairs.parameters())]
    assert_same(found, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["fsdp1", "fsdp2"])
def test_under_fully_sharded_data_parallel(way, world):
    plain = networks()
    student = copy.deepcopy(plain[0])
    pairs = fastkd.LayerPairs(PAIRS, F.mse_loss)
    if way == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        wrap = dict(
            device_id=torch.device("cpu"),
            sharding_strategy=ShardingStrategy.NO_SHARD,
            use_orig_params=True,
        )
        student.blocks[0] = FullyShardedDataParallel(student.blocks[0], **wrap)
        student = FullyShardedDataParallel(student, **wrap)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (1,))
        for block in student.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(student, mesh=mesh)
    with pairs.attach(student, plain[1]):
        for _ in range(2):
            student.zero_grad()
            output = run(student, plain[1], inputs())
            loss = pairs()
            (loss + output.sum()).backward()
    expected = sum(expected_of(*plain, inputs()))
    assert_same([loss], [expected])
    of_expected = torch.autograd.grad(expected + plain[0](inputs()).sum(), [*plain[0].parameters()])
    found = [x.grad.full_tensor() if way == "fsdp2" else x.grad for x in student.parameters()]
    assert_same(found, of_expected)


def compiled(network):
    return torch.compile(network, backend="aot_eager", fullgraph=True)


def compiled_in_place(network):
    network.compile(backend="aot_eager", fullgraph=True)
    return network


def with_a_compiled_block(network):
    network.blocks[0] = compiled(network.blocks[0])
    return network


def with_a_checkpointed_block(network):
    network.blocks[0] = checkpoint_wrapper(network.blocks[0])
    return network


@pytest.mark.parametrize(
    "wrap", [compiled, compiled_in_place, with_a_compiled_block, with_a_checkpointed_block]
)
@pytest.mark.parametrize("names", [PAIRS, {"_orig_mod.embed": "embed", "blocks.0": "blocks.1"}])
def test_under_torch_compile_and_checkpoint_wrapper(wrap, names):
    torch._dynamo.reset()
    plain = networks()
    student = wrap(copy.deepcopy(plain[0]))
    assert_trains_as_expected(
        fastkd.LayerPairs(names, F.mse_loss), (student, plain[1]), plain, inputs()
    )


def test_a_compiled_step_is_one_graph():
    torch._dynamo.reset()
    student, teacher = networks(4, 6)
    pairs = fastkd.LayerPairs(PAIRS, [fastkd.HintLoss(4, 6), fastkd.HintLoss(4, 6, kind="cosine")])

    def step(x):
        output = run(student, teacher, x)
        return output.sum() + pairs()

    with pairs.attach(student, teacher):
        expected = step(inputs())
        whole = torch.compile(step, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            loss = whole(inputs())
            assert_same([loss], [expected])
            assert_same(gradients(loss, student), gradients(step(inputs()), student))


def test_networks_that_share_layers():
    student, teacher = networks()
    teacher.embed = student.embed
    plain = copy.deepcopy((student, teacher))
    assert_trains_as_expected(
        fastkd.LayerPairs(PAIRS, F.mse_loss), (student, teacher), plain, inputs()
    )
    inside = nn.Module()  # a student whose forward runs the teacher
    inside.student, inside.teacher = networks()
    inside.forward = lambda x: inside.student(x) + inside.teacher(x)
    pairs = fastkd.LayerPairs({"student.embed": "embed"}, F.mse_loss)
    with pairs.attach(inside, inside.teacher):
        inside(inputs())
        assert_same([pairs()], [expected_of(inside.student, inside.teacher, inputs())[0]])


def test_a_network_may_be_its_own_teacher():
    """Its adapter may be switched off; the forward without a graph is the teacher's."""
    network = Network(4)
    pairs = fastkd.LayerPairs({"embed": "blocks.1"}, F.mse_loss)
    with pairs.attach(network, network):
        network(inputs(1))
        with torch.no_grad():
            network(inputs(2))
        loss = pairs()
    expected = F.mse_loss(
        outputs_of(network, inputs(1))[0], outputs_of(network, inputs(2))[2].detach()
    )
    assert_same([loss], [expected])
    assert_same(gradients(loss, network), gradients(expected, network))


def test_copies_and_pickles_of_networks_and_pairs_are_idle():
    student, teacher = networks()
    pairs = fastkd.LayerPairs(PAIRS, fastkd.HintLoss())
    with pairs.attach(student, teacher):
        run(student, teacher, inputs())
        average = copy.deepcopy(student)
        loaded = pickle.loads(pickle.dumps(student))
        for twin in (average, loaded):
            twin(inputs(3))
        of_pairs = pickle.loads(pickle.dumps(copy.deepcopy(pairs)))
        assert_same([pairs()], [sum(expected_of(student, teacher, inputs()))])
    with of_pairs.attach(average, teacher):
        run(average, teacher, inputs())
        assert_same([of_pairs()], [sum(expected_of(student, teacher, inputs()))])


def test_parameters_of_the_losses_are_those_of_the_pairs():
    pairs = fastkd.LayerPairs(PAIRS, [fastkd.HintLoss(4, 6), fastkd.hint])
    assert [*pairs.state_dict()] == ["losses.0.projector.weight", "losses.0.projector.bias"]
    assert "HintLoss" in repr(pairs) and "hint" in repr(pairs)
