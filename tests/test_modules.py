"""The modules are their functions, with the options fixed at construction."""

import copy
import inspect
import pickle
import re

import pytest
import torch

import fastkd
from fastkd import modules

OPTIONS = {  # none of them a default
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
    fastkd.RKDDistanceLoss: dict(normalize=True, smooth_l1_beta=0.3),
    fastkd.RKDAngleLoss: dict(normalize=True, smooth_l1_beta=0.3),
    fastkd.RKDLoss: dict(distance_weight=1.0, angle_weight=3.0, normalize=True),
    fastkd.SimilarityPreservingLoss: {},
    fastkd.PKTLoss: {},
    fastkd.CorrelationCongruenceLoss: dict(form="kernel", gamma=0.7, order=3),
    fastkd.DISTLoss: dict(beta=2.0, gamma=0.5, temperature=4.0),
    fastkd.InfoNCELoss: dict(temperature=0.3, negative_weight=0.5, symmetric=True, margin=0.2),
    fastkd.ClipLoss: {},
    fastkd.SigLipLoss: {},
    fastkd.NTXentLoss: dict(temperature=0.3),
    fastkd.SupConLoss: dict(temperature=0.3, anchors="all"),
    fastkd.SimilarityKLLoss: dict(student_temperature=0.3, teacher_temperature=0.2, mask_self=True),
    fastkd.DINOLoss: dict(student_temperature=0.3, teacher_temperature=0.2, skip_same_view=False),
}
OF_A_BATCH = {"weights", "normalizer"}
KEYS = {"student_keys", "teacher_keys"}
OF_A_MODULE = {"queue_size", "n_prototypes", "center_momentum", "center"}


def make(module, **options):
    return module(11, **options) if module is fastkd.DINOLoss else module(**options)


def takes_weights(module):
    """Return whether the loss has a value for each example."""
    return OF_A_BATCH <= set(inspect.signature(module.function).parameters)


every_module = pytest.mark.parametrize("module", OPTIONS, ids=lambda module: module.__name__)


def batch(module):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 11, generator=generator)
    tensors = [student.requires_grad_(), teacher]
    if module is fastkd.SupConLoss:
        return [student, torch.tensor([3, 0, 3, 0, 5])]
    if module is fastkd.DINOLoss:
        return [x.unflatten(0, (5, 1)) for x in tensors]
    if module is fastkd.ClipLoss:
        return [*tensors, 0.5]
    if module is fastkd.SigLipLoss:
        return [*tensors, 0.5, -1.0]
    return [*tensors, torch.tensor([3, 0, -100, 10, 5])] if module is fastkd.KDLoss else tensors


def value_and_gradient(loss, tensors, **options):
    value = loss(*tensors, **options)
    return value, *torch.autograd.grad(value.sum(), tensors[0])


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
    if "normalizer" in of_the_batch:
        options.pop("reduction", None)
    tensors = batch(module)
    got = value_and_gradient(make(module, **options), tensors, **of_the_batch)
    assert_same(got, value_and_gradient(module.function, tensors, **options, **of_the_batch))
    assert got[1].any()
    for name in options:  # each of them arrives: leaving it out gives something else
        fewer = {key: value for key, value in options.items() if key != name}
        left_out = make(module, **fewer)(*tensors, **of_the_batch)
        assert left_out.shape != got[0].shape or not torch.equal(left_out, got[0]), name


@every_module
def test_defaults_are_those_of_the_function(module):
    tensors = batch(module)
    assert_same(
        value_and_gradient(make(module), tensors), value_and_gradient(module.function, tensors)
    )


def test_every_loss_has_one_module_and_all_are_exported():
    classes = [
        value
        for value in vars(modules).values()
        if inspect.isclass(value)
        and issubclass(value, modules._Loss)
        and value is not modules._Loss
    ]
    functions = [module.function for module in classes]
    names = (name for name in fastkd.__all__ if name.islower() and name != "__version__")
    public = [getattr(fastkd, name) for name in names if name != "backend"]
    assert len(public) == len(OPTIONS) == len(classes) == 24
    assert all(functions.count(function) == 1 for function in public)
    assert all(getattr(fastkd, module.__name__, None) is module for module in classes)
    assert {module.__name__ for module in classes} <= set(fastkd.__all__)
    assert fastkd.__all__ == sorted(fastkd.__all__)


@every_module
def test_signatures_are_those_of_the_function(module):
    of_function = inspect.signature(module.function).parameters
    options = [p for name, p in of_function.items() if p.kind == p.KEYWORD_ONLY]
    options = [p for p in options if p.name not in OF_A_BATCH | KEYS | {"labels"}]
    shown = inspect.signature(module).parameters.values()
    assert [p for p in shown if p.name not in OF_A_MODULE] == options
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
    twin.options["alpha"] = 9.0  # a copy has its own options
    assert loss.options.get("alpha") != 9.0


def test_repr_shows_the_options():
    shown = repr(fastkd.SkewKLLoss(temperature=2.0))
    assert shown.startswith("SkewKLLoss(skew=0.1, temperature=2.0, student_temperature=None, ")


def test_a_loss_in_a_model_adds_no_state():
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2), "loss": fastkd.KDLoss()})
    assert set(model.state_dict()) == {"layer.weight", "layer.bias"}
    assert [*fastkd.KDLoss().parameters()] == []
    model.load_state_dict(model.state_dict())
    model.to(torch.float64).train(False)


def test_options_can_be_annealed():
    loss, tensors = fastkd.ForwardKLLoss(temperature=4.0), batch(fastkd.ForwardKLLoss)
    loss.options["temperature"] = 2.0
    assert torch.equal(loss(*tensors), fastkd.forward_kl(*tensors, temperature=2.0))
    assert fastkd.ForwardKLLoss().options["temperature"] == 1.0


def test_temperature_may_be_a_tensor():
    loss, tensors = fastkd.KDLoss(temperature=torch.tensor(2.0)), batch(fastkd.KDLoss)
    torch.testing.assert_close(loss(*tensors), fastkd.kd(*tensors, temperature=2.0))


def test_options_belong_to_the_construction():
    tensors = batch(fastkd.ForwardKLLoss)
    with pytest.raises(TypeError):
        fastkd.ForwardKLLoss(2.0)
    with pytest.raises(TypeError, match="temperature"):
        fastkd.ForwardKLLoss()(*tensors, temperature=2.0)
    with pytest.raises(TypeError):
        fastkd.KDLoss()(*tensors)  # without labels


def test_construction_asks_no_engine_and_leaves_the_backend_alone():
    with fastkd.backend("triton"):  # which may not run here, but perhaps where the batches are
        with pytest.raises(ValueError, match="temperature"):
            fastkd.KDLoss(temperature=0)
        fastkd.KDLoss()
        assert fastkd._backend._current == "triton"


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
