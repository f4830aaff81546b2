"""The modules are their functions, with the options fixed at construction."""

import copy
import inspect
import io
import pickle
import re
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.distributed.checkpoint as checkpoint
from torch.utils._pytree import tree_leaves

import fastkd
from fastkd import _module, feature_modules, modules

OPTIONS = {  # none of them a default
    fastkd.DecoupledKDLoss: dict(alpha=2.0, standardize=True),
    fastkd.NKDLoss: dict(gamma=2.0, temperature=3.0),
    fastkd.USKDLoss: dict(alpha=0.5, beta=0.7, mu=0.3, label_smoothing=0.4),
    fastkd.ForwardKLLoss: dict(temperature=2.0, scale_t2=False),
    fastkd.ReverseKLLoss: dict(temperature=3.0, reduction="sum"),
    fastkd.JensenShannonLoss: dict(beta=0.3, temperature=2.0),
    fastkd.SkewKLLoss: dict(skew=0.2, temperature=2.0),
    fastkd.SkewReverseKLLoss: dict(skew=0.3, reduction="none"),
    fastkd.SymmetricKLLoss: dict(weight=0.2, temperature=2.0),
    fastkd.TotalVariationLoss: dict(temperature=2.0),
    fastkd.SoftCrossEntropyLoss: dict(temperature=2.0, reduction="sum"),
    fastkd.LogitMSELoss: dict(temperature=2.0, scale_t2=False),
    fastkd.KDLoss: dict(alpha=0.2, temperature=2.0, divergence="skew_kl", skew=0.3),
    fastkd.WSLDLoss: dict(temperature=3.0, scale_t2=False),
    fastkd.MFTLoss: dict(threshold=0.4, temperature=2.0, reduction="sum"),
    fastkd.TeacherFreeKDLoss: dict(correct_probability=0.8, temperature=2.0),
    fastkd.LinearKDLoss: dict(temperature=2.0, divergence="jensen_shannon", beta=0.3),
    fastkd.MultiTeacherLoss: dict(combine="logits", divergence="reverse_kl", temperature=2.0),
    fastkd.MutualKLLoss: dict(temperature=2.0, scale_t2=False),
    fastkd.RKDDistanceLoss: dict(normalize=True, smooth_l1_beta=0.3),
    fastkd.RKDAngleLoss: dict(normalize=True, smooth_l1_beta=0.3),
    fastkd.RKDLoss: dict(distance_weight=1.0, angle_weight=3.0, normalize=True),
    fastkd.SimilarityPreservingLoss: {},
    fastkd.PKTLoss: {},
    fastkd.CorrelationCongruenceLoss: dict(form="kernel", gamma=0.7, order=3),
    fastkd.DISTLoss: dict(beta=2.0, gamma=0.5, temperature=4.0, epsilon=0.1),
    fastkd.MLKDLoss: dict(temperatures=(1.0, 3.0), batch_weight=0.5, class_weight=2.0),
    fastkd.InfoNCELoss: dict(temperature=0.3, negative_weight=0.5, symmetric=True, margin=0.2),
    fastkd.ClipLoss: {},
    fastkd.SigLipLoss: {},
    fastkd.NTXentLoss: dict(temperature=0.3),
    fastkd.SupConLoss: dict(temperature=0.3, anchors="all"),
    fastkd.SimilarityKLLoss: dict(student_temperature=0.3, teacher_temperature=0.2, mask_self=True),
    fastkd.DINOLoss: dict(student_temperature=0.3, teacher_temperature=0.2, skip_same_view=False),
    fastkd.IBOTLoss: dict(student_temperature=0.3, teacher_temperature=0.2, reduction="sum"),
    fastkd.KoLeoLoss: dict(epsilon=0.1),
    fastkd.ChannelWiseLoss: dict(temperature=2.0, scale_t2=False),
    fastkd.LocalizationLoss: dict(temperature=2.0, bins="mean"),
    fastkd.NSTLoss: dict(reduction="sum"),
    fastkd.FSPLoss: dict(reduction="sum"),
    fastkd.AttentionMSELoss: dict(masked_below=-0.5),
    fastkd.EmbeddingMSELoss: dict(normalize=True, reduction="sum"),
    fastkd.AttentionTransferLoss: dict(p=3.0, kind="max"),
    fastkd.TokenRelationLoss: dict(
        heads=2,
        normalize=True,
        temperature=0.5,
        teacher_temperature=0.4,
        causal=True,
        divergence="mse",
        reduction="sum",
    ),
    fastkd.MiniLMRelationLoss: dict(n_heads=2, weights=[0.5, 2.0], causal=True),
    fastkd.GramAnchoringLoss: dict(remove_negative="teacher", per_image=False),
    fastkd.CKALoss: dict(center=False, reduction="sum"),
    fastkd.ULDLoss: dict(temperature=2.0, reduction="sum"),
    fastkd.MatchedKLLoss: dict(mass="tail", divergence="jensen_shannon", beta=0.3, temperature=2.0),
    fastkd.ProjectedKLLoss: dict(mass="full", divergence="skew_kl", skew=0.3, temperature=2.0),
    fastkd.ALMLoss: dict(temperature=2.0, divergence="tv"),
}
OF_A_BATCH = {"weights", "normalizer"}
LABELLED = (
    fastkd.KDLoss, fastkd.DecoupledKDLoss, fastkd.NKDLoss, fastkd.WSLDLoss, fastkd.MFTLoss,
)  # fmt: skip
OWNERS = {fastkd.HintLoss, fastkd.VIDLoss}  # have parameters of their own: test_projectors.py
KEYS = {"student_keys", "teacher_keys"}
CENTRED = (fastkd.DINOLoss, fastkd.IBOTLoss)
OF_A_MODULE = {
    "queue_size", "n_prototypes", "center_momentum", "center", "centering", "sinkhorn_iterations",
}  # fmt: skip


def make(module, **options):
    return module(11, **options) if module in CENTRED else module(**options)


def takes_weights(module):
    """Return whether the loss has a value for each example."""
    return OF_A_BATCH <= set(inspect.signature(module.function).parameters)


every_module = pytest.mark.parametrize("module", OPTIONS, ids=lambda module: module.__name__)


def batch(module):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 11, generator=generator)
    tensors = [student.requires_grad_(), teacher]
    if module is fastkd.LinearKDLoss:
        return [student, teacher.sin().requires_grad_(), teacher, student.detach().cos()]
    if module is fastkd.MultiTeacherLoss:
        return [student, [teacher, teacher.sin()]]
    if module is fastkd.MutualKLLoss:
        return [(student, teacher.sin().requires_grad_(), teacher.requires_grad_())]
    if module is fastkd.MatchedKLLoss:
        return [*tensors, torch.tensor([4, 0, 10]), torch.tensor([3, 9, 1])]
    if module is fastkd.ProjectedKLLoss:
        return [*tensors, torch.arange(22).view(11, 2) % 7]
    if module is fastkd.ALMLoss:
        return [(-student.detach()[:, 0].abs()).requires_grad_(), -teacher[:, 0].abs()]
    if module is fastkd.SupConLoss:
        return [student, torch.tensor([3, 0, 3, 0, 5])]
    if module is fastkd.DINOLoss:
        return [x.unflatten(0, (5, 1)) for x in tensors]
    if module is fastkd.IBOTLoss:
        masks = torch.tensor([[True, False], [True, True], [False, False], [True, True], [0, 1]])
        return [torch.stack([x, x.cos()], 1) for x in tensors] + [masks]
    if module is fastkd.KoLeoLoss:
        return tensors[:1]
    if module in (fastkd.NSTLoss, fastkd.AttentionMSELoss):
        return [x[:, None] for x in tensors]
    if module is fastkd.ChannelWiseLoss:
        return [x.unflatten(1, (1, 11)) for x in tensors]
    if module is fastkd.FSPLoss:
        return [(x[:, None], x[:, None].sin()) for x in tensors]
    if module is fastkd.AttentionTransferLoss:
        maps = torch.randn(2, 5, 11, 4, generator=generator)
        return [maps[0].requires_grad_(), maps[1]]
    if module in (fastkd.TokenRelationLoss, fastkd.GramAnchoringLoss, fastkd.CKALoss):
        return [x[:, :8].unflatten(1, (2, 4)) for x in tensors]
    if module is fastkd.MiniLMRelationLoss:
        student, teacher = (
            x.detach()[:, :8].unflatten(1, (2, 4)).repeat(1, 1, 12) for x in tensors
        )
        return [(student.requires_grad_(), student.sin().detach()), (teacher, teacher.sin())]
    if module is fastkd.ClipLoss:
        return [*tensors, 0.5]
    if module is fastkd.SigLipLoss:
        return [*tensors, 0.5, -1.0]
    labels = torch.tensor([3, 0, -100, 10, 5])
    if module is fastkd.TeacherFreeKDLoss:
        return [student, labels]
    if module is fastkd.USKDLoss:
        return [student, labels, teacher.requires_grad_()]
    return [*tensors, labels] if module in LABELLED else tensors


def value_and_gradient(loss, tensors, **options):
    value = loss(*tensors, **options)
    trained = [x for x in tree_leaves(tensors) if getattr(x, "requires_grad", False)]
    return value, *torch.autograd.grad(value.sum(), trained)


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@every_module
@pytest.mark.parametrize(
    "of_the_batch",
    [{}, dict(weights=torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])), dict(normalizer=7)],
    ids=["plain", "weights", "normalizer"],
)
def test_a_module_is_its_function(module, of_the_batch):
    if of_the_batch and not takes_weights(module):
        return  # one number for the batch as a whole
    options = dict(OPTIONS[module])
    if module is fastkd.ChannelWiseLoss and "weights" in of_the_batch:
        of_the_batch = {"weights": of_the_batch["weights"][:, None]}
    if "normalizer" in of_the_batch:
        options.pop("reduction", None)
    tensors = batch(module)
    got = value_and_gradient(make(module, **options), tensors, **of_the_batch)
    assert_same(got, value_and_gradient(module.function, tensors, **options, **of_the_batch))
    assert got[1].any()
    for name in options:  # each of them arrives: leaving it out gives something else
        fewer = {key: value for key, value in options.items() if key != name}
        masked_pairs = make(module, **fewer)(*tensors, **of_the_batch)
        assert masked_pairs.shape != got[0].shape or not torch.equal(masked_pairs, got[0]), name


@every_module
def test_defaults_are_those_of_the_function(module):
    tensors = batch(module)
    assert_same(
        value_and_gradient(make(module), tensors), value_and_gradient(module.function, tensors)
    )


def test_every_loss_has_one_module_and_all_are_exported():
    classes = [
        value
        for value in (vars(modules) | vars(feature_modules)).values()
        if inspect.isclass(value)
        and issubclass(value, _module.LossModule)
        and value is not _module.LossModule
    ]
    functions = [module.function for module in classes]
    names = (name for name in fastkd.__all__ if name.islower() and name != "__version__")
    public = [x for x in (getattr(fastkd, name) for name in names) if hasattr(x, "formula")]
    assert len(public) == len(classes) and {*classes} == {*OPTIONS} | OWNERS
    assert all(functions.count(function) == 1 for function in public)
    assert all(getattr(fastkd, module.__name__, None) is module for module in classes)
    assert {module.__name__ for module in classes} <= set(fastkd.__all__)
    assert fastkd.__all__ == sorted(fastkd.__all__)


@every_module
def test_signatures_are_those_of_the_function(module):
    of_function = inspect.signature(module.function).parameters
    options = [p for name, p in of_function.items() if p.kind == p.KEYWORD_ONLY]
    options = [p for p in options if p.name not in {*module.of_a_batch} | KEYS]
    shown = inspect.signature(module).parameters.values()
    own = OF_A_MODULE | ({"group"} if module is fastkd.IBOTLoss else set())
    assert [p for p in shown if p in options or p.name not in own] == options
    assert set(OPTIONS[module]) <= {p.name for p in options}
    of_call = inspect.signature(make(module).forward).parameters
    of_a_batch = [p for p in of_function.values() if p.name not in OF_A_MODULE and p not in options]
    assert [*of_call.values()] == of_a_batch
    assert (OF_A_BATCH <= set(of_call)) == takes_weights(module)


@every_module
def test_docstring_names_the_function_and_its_papers(module):
    of_module, of_function = inspect.getdoc(module), inspect.getdoc(module.function)
    formula, _, rest = of_module.partition(", the module of ")
    assert formula and rest.startswith(f"`fastkd.{module.function.__name__}`.")
    papers = re.compile(r"\d{4}\.\d{5}")
    assert {*papers.findall(of_module)} <= {*papers.findall(of_function)}


@every_module
def test_copies_and_pickles_give_the_same(module):
    loss, tensors = make(module, **OPTIONS[module]).eval(), batch(module)
    expected = value_and_gradient(loss, tensors)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(twin) is module
        assert_same(value_and_gradient(twin, tensors), expected)
    for name, value in OPTIONS[module].items():  # a copy has its own options
        setattr(twin, name, module.defaults[name])
        assert getattr(loss, name) == value != getattr(twin, name)


def test_repr_shows_the_options():
    shown = repr(fastkd.SkewKLLoss(temperature=2.0))
    assert shown.startswith("SkewKLLoss(skew=0.1, temperature=2.0, student_temperature=None, ")


def test_a_loss_in_a_model_adds_no_state():
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2), "loss": fastkd.KDLoss()})
    assert set(model.state_dict()) == {"layer.weight", "layer.bias"}
    assert [*fastkd.KDLoss().parameters()] == []
    model.load_state_dict(model.state_dict())
    model.to(torch.float64).train(False)


@every_module
def test_an_option_that_is_set_is_used_and_checked(module):
    tensors, loss = batch(module), make(module)
    for name, value in OPTIONS[module].items():
        setattr(loss, name, value)
    fresh = make(module, **OPTIONS[module])
    assert loss.options == fresh.options == module.defaults | OPTIONS[module]
    assert_same(value_and_gradient(loss, tensors), value_and_gradient(fresh, tensors))
    assert make(module).options == module.defaults
    for name in (k for k, value in OPTIONS[module].items() if not isinstance(value, bool)):
        with pytest.raises(ValueError, match=name):
            setattr(loss, name, "no such thing")
    assert loss.options == fresh.options


def test_a_misspelt_option_is_not_lost():
    loss = fastkd.DINOLoss(3)
    for name, meant in (("teacher_temprature", "teacher_temperature"), ("Group", "group")):
        with pytest.raises(AttributeError, match=f"no option '{name}'; did you mean '{meant}'"):
            setattr(loss, name, 2.0)
    with pytest.raises(AttributeError, match=r"weights belongs to a batch .* at the call"):
        fastkd.KDLoss().weights = torch.ones(3)
    with pytest.raises(TypeError):
        loss.options["teacher_temperature"] = 2.0
    with pytest.raises(AttributeError):
        fastkd.InfoNCELoss().queue_size = 3
    loss.note = "what a framework notes on a module"

    class Mine(fastkd.KDLoss):
        def __init__(self):
            super().__init__()
            self.temperatures = [1.0, 2.0]

    assert Mine().temperatures


CONTRASTS = {
    fastkd.InfoNCELoss: "temperature",
    fastkd.NTXentLoss: "temperature",
    fastkd.SupConLoss: "temperature",
    fastkd.SimilarityKLLoss: "student_temperature",
}


@pytest.mark.parametrize("module, name", CONTRASTS.items(), ids=str)
def test_a_learnt_option_is_a_parameter(module, name):
    temperature, tensors = torch.nn.Parameter(torch.tensor(0.3)), batch(module)
    model = torch.nn.Sequential(make(module, **{name: temperature}))
    assert [*model.parameters()] == [temperature] and [*model.state_dict()] == [f"0.{name}"]
    model[0](*tensors).backward()
    assert temperature.grad != 0
    twins = copy.deepcopy(torch.nn.ModuleList([model, torch.nn.ParameterList([temperature])]))
    assert [*twins[0].parameters()] == [twins[1][0]] and twins[1][0] is not temperature
    twins[0].load_state_dict({f"0.{name}": torch.tensor(0.7)})
    assert getattr(twins[0][0], name).item() == pytest.approx(0.7)
    assert getattr(model.double()[0], name).dtype == torch.float64
    setattr(model[0], name, 0.3)  # numbers, tensors and parameters take each other's place
    assert not [*model.parameters()]
    setattr(model[0], name, torch.tensor(0.3, dtype=torch.float64))
    assert [*model.buffers()] == [getattr(model[0], name)] and not model.state_dict()
    assert getattr(model.to("meta")[0], name).is_meta
    setattr(model[0], name, temperature)
    assert not [*model.buffers()] and [*model.parameters()] == [temperature]


def test_an_option_that_is_learnt_is_a_parameter():
    learnt, tensors = torch.nn.Parameter(torch.tensor(2.0)), batch(fastkd.KDLoss)
    criterion = fastkd.KDLoss(temperature=learnt)
    assert [*criterion.parameters()] == [learnt]
    criterion(*tensors).backward()
    small = torch.tensor(1e-3)
    around = [fastkd.kd(*tensors, temperature=2.0 + sign * small) for sign in (1, -1)]
    torch.testing.assert_close(
        learnt.grad, (around[0] - around[1]) / (2 * small), rtol=1e-2, atol=1e-4
    )


@pytest.fixture
def world():
    """Let this process be all of the ranks."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("module", [m for m in OPTIONS if "group" in m.defaults], ids=str)
def test_a_group_is_shared_by_copies_and_named_in_pickles(module, world):
    model = torch.nn.Sequential(make(module, group=world).eval())
    expected = value_and_gradient(model[0], batch(module))
    for twin in (copy.deepcopy(model), copy.copy(model)):
        assert twin[0].group is world
        assert_same(value_and_gradient(twin[0], batch(module)), expected)
    assert copy.copy(model[0]).group is world
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)[0]
    assert loaded.group == "world"
    assert_same(value_and_gradient(loaded, batch(module)), expected)


def test_a_group_is_looked_up_by_its_name(world):
    tensors = batch(fastkd.RKDLoss)
    part = torch.distributed.new_group([0])
    loss = pickle.loads(pickle.dumps(fastkd.RKDLoss(group=part)))
    assert loss.group == part.group_name
    assert torch.equal(loss(*tensors), fastkd.rkd(*tensors, group="world"))
    loss.group = "another"
    with pytest.raises(ValueError, match=r"no process group here has the name 'another'.*world"):
        loss(*tensors)


def test_a_world_that_is_not_there_yet_is_told():
    assert torch.distributed.group.WORLD is None
    with pytest.warns(UserWarning, match='RKDLoss got group=None.* pass group="world"'):
        fastkd.RKDLoss(group=torch.distributed.group.WORLD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastkd.RKDLoss()
        later = fastkd.RKDLoss(group="world")
    with pytest.raises(RuntimeError, match="init_process_group"):
        later(*batch(fastkd.RKDLoss))


def test_options_belong_to_the_construction():
    tensors = batch(fastkd.KDLoss)
    for module, arguments in ((fastkd.KDLoss, [4.0]), (fastkd.DINOLoss, [7, 0.1])):
        name = module.__name__
        with pytest.raises(TypeError, match=rf"{name} takes its options by name.*temperature"):
            module(*arguments)
    with pytest.raises(TypeError, match=r"temperature is .* loss.temperature = 2.0, or at constr"):
        fastkd.KDLoss()(*tensors, temperature=2.0)
    with pytest.raises(TypeError):
        fastkd.KDLoss()(*tensors[:2])  # without labels


def test_construction_asks_no_engine_and_leaves_the_backend_alone():
    with fastkd.backend("triton"):  # which may not run here, but perhaps where the batches are
        with pytest.raises(ValueError, match="temperature"):
            fastkd.KDLoss(temperature=0)
        fastkd.KDLoss()
        assert fastkd._backend.chosen() == "triton"


def test_a_loss_can_be_subclassed():
    class Halved(fastkd.ForwardKLLoss):
        def __init__(self, share, **options):
            super().__init__(**options)
            self.share = share

        def forward(self, *tensors, **of_the_batch):
            return self.share * super().forward(*tensors, **of_the_batch)

    tensors = batch(Halved)
    expected = 0.5 * fastkd.forward_kl(*tensors, temperature=2.0)
    assert torch.equal(Halved(0.5, temperature=2.0)(*tensors), expected)


# --------------------------------------------------------------------------------- state of modules


class Queued(torch.nn.Sequential):
    """A network before a loss with a queue, and a layer with buffers behind it."""

    def __init__(self):
        torch.manual_seed(0)
        loss = fastkd.InfoNCELoss(queue_size=7, temperature=0.3)
        super().__init__(torch.nn.Linear(4, 4), loss, torch.nn.BatchNorm1d(4))

    def forward(self, keys):
        return self[1](self[2](self[0](keys)), keys)


def keys_of_steps(n):
    return torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(5))


def trained(n):
    """Return a model whose queue has seen n batches of three keys."""
    model = Queued()
    for keys in keys_of_steps(n):
        model(keys).backward()
    return model


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_queue_survives_copies_and_checkpoints(n, tmp_path):
    """Distributed checkpoints load in place, into a queue that does not know its width yet."""
    model, (keys, more) = trained(n), keys_of_steps(2).flip(0)
    state = {"model": Queued().state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it saves without a process group, as it was told
        checkpoint.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "d", no_dist=True)
        checkpoint.load(state, checkpoint_id=tmp_path / "d", no_dist=True)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), Queued(), Queued()]
    twins[2].load_state_dict(state["model"])
    twins[3].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    expected = [model(keys), model(more)]
    for twin in twins:
        assert_same([twin(keys), twin(more)], expected)
        assert torch.equal(twin[1].queue, model[1].queue)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_a_queue_does_not_disturb_averaged_models(use_buffers):
    """The average exists before the first batch has told the width of the keys."""
    model = Queued()
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=use_buffers)
    for step, keys in enumerate(keys_of_steps(4)):
        model(keys)
        averaged.update_parameters(model)
        assert model[1].queue.shape == (7, 4) and averaged.n_averaged == step + 1


def test_a_queue_has_the_device_and_the_dtype_of_the_keys():
    model = trained(1)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model.to(dtype)(keys_of_steps(1)[0].to(dtype))
        assert model[1].queue.dtype == dtype
    model[1].eval()(*torch.zeros(2, 3, 4))
    assert model[1].queue.dtype == torch.float64  # what is only looked at stays as it is
    model[1].train()(*torch.zeros(2, 3, 4, device="meta"))
    assert model[1].queue.is_meta


def test_no_key_of_a_queue_is_a_false_negative():
    loss, (first, keys) = fastkd.InfoNCELoss(queue_size=7), keys_of_steps(2)
    loss(first, first)
    false = torch.eye(3).bool().flip(0)
    none = torch.zeros(3, 3, dtype=torch.bool)
    expected = fastkd.info_nce(keys.sin(), keys, first, torch.cat([false, none], 1))
    assert torch.equal(loss(keys.sin(), keys, false_negatives=false), expected)


def test_a_full_queue_compiles_nothing_anew():
    torch._dynamo.reset()
    graphs, eager = torch._dynamo.testing.CompileCounterWithBackend("aot_eager"), trained(3)[1]
    loss = copy.deepcopy(eager)
    compiled = torch.compile(loss, backend=graphs, fullgraph=True)
    for keys in keys_of_steps(4):
        assert_same([compiled(keys.sin(), keys)], [eager(keys.sin(), keys)])
    assert graphs.frame_count == 1 and torch.equal(loss.queue, eager.queue)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_centre_of_a_module_in_half_precision_is_float32(dtype):
    loss, wide = fastkd.DINOLoss(3, center_momentum=0.99), torch.promote_types(dtype, torch.float32)
    loss.center.fill_(2.9999)
    before = loss.center.to(wide)
    assert torch.equal(loss.to(dtype).center, before)
    loss.load_state_dict({"center": before.to(dtype)}, assign=True)
    loss.center.fill_(2.5)
    outputs = torch.full((2, 4, 3), 3.0, dtype=dtype)
    for _ in range(30):  # each step is smaller than half precision can tell from none
        loss(outputs, outputs)
    expected = torch.full((3,), 3 - 0.5 * 0.99**30, dtype=wide)
    torch.testing.assert_close(loss.center, expected)


def test_the_momentum_of_the_centre_is_an_option_too():
    loss, outputs = fastkd.DINOLoss(3), torch.ones(2, 4, 3)
    loss.center_momentum = 0.25
    loss(outputs, outputs)
    torch.testing.assert_close(loss.center, torch.full((3,), 0.75))
    with pytest.raises(ValueError, match=r"center_momentum .* got 2"):
        loss.center_momentum = 2
