"""Losses of features in frameworks: each takes ours in one line, with its value and gradient.

The lines are those of docs/frameworks.md. Three of the packages want torchvision, which wants CUDA:
their losses are imported without the rest of them. What cannot be installed is written out here.
"""

import importlib
import importlib.util
import logging
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkd

pytestmark = pytest.mark.integration


@pytest.fixture
def alone(monkeypatch):
    """Import a module whose packages, and whatever `others` names, are left nearly empty."""

    def imported(name, **others):
        package, *_ = name.split(".")
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: `make test-integrations` installs it")
        for known in [x for x in sys.modules if x.split(".")[0] in (package, "torchvision")]:
            monkeypatch.delitem(sys.modules, known)
        (folder,) = importlib.util.find_spec(package).submodule_search_locations
        parts = name.split(".")
        for i in range(1, len(parts)):
            path = ".".join(parts[:i])
            empty = types.ModuleType(path)
            empty.__path__ = ["/".join([folder, *parts[1:i]])]
            monkeypatch.setitem(sys.modules, path, empty)
        for path, values in others.items():
            path = path.replace("__", ".")
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
            vars(sys.modules[path]).update(values, __path__=[])
        module = importlib.import_module(name)
        for known in [x for x in sys.modules if x.split(".")[0] in (package, "torchvision")]:
            monkeypatch.delitem(sys.modules, known)
        return module

    return imported


def features(*shapes, seed=0):
    """Return features of the student, which are trained, and of the teacher."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return found[0].requires_grad_(), *found[1:]


def assert_same(found, expected, *trained):
    for x, y in zip(
        [found, *torch.autograd.grad(found, trained, retain_graph=True)],
        [expected, *torch.autograd.grad(expected, trained)],
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------- torchdistill


def outputs(**layers):
    return {name: {"output": value} for name, value in layers.items()}


def at(layer):
    return {"io": "output", "path": layer}


@pytest.fixture
def torchdistill(alone):
    logger = {"def_logger": logging.getLogger("torchdistill")}
    return alone("torchdistill.losses.mid_level", torchdistill__common__constant=logger)


def test_attention_transfer_of_torchdistill(torchdistill):
    student, teacher = features((3, 4, 6, 6), (3, 7, 6, 6))
    theirs = torchdistill.ATLoss({"pair": {"student": at("a"), "teacher": at("b"), "weight": 2.0}})
    expected = theirs(outputs(a=student), outputs(b=teacher))
    assert_same(2 * fastkd.attention_transfer(student, teacher), expected, student)


def test_variational_information_of_torchdistill(torchdistill):
    student, teacher = features((3, 4, 6, 6), (3, 7, 6, 6))
    ours = fastkd.VIDLoss(4, 7).double()
    mean = ours.regressor(student)
    variance = F.softplus(ours.variance_parameter) + 1e-5
    theirs = torchdistill.VIDLoss({"pair": {"student": at("a"), "teacher": at("b")}})
    expected = theirs(
        outputs(a=(mean, variance.view(1, -1, 1, 1).expand_as(mean))), outputs(b=teacher)
    )
    assert_same(ours(student, teacher), expected, student, *ours.parameters())


def test_flows_of_torchdistill(torchdistill):
    """Its loss sums norms of columns, but the matrices are the same."""
    theirs = torchdistill.FSPLoss
    student, student_2, teacher, teacher_2 = features(
        (3, 4, 6, 6), (3, 5, 3, 3), (3, 4, 6, 6), (3, 5, 3, 3)
    )
    found = fastkd.fsp(
        (F.adaptive_max_pool2d(student, 3), student_2),
        (F.adaptive_max_pool2d(teacher, 3), teacher_2),
    )
    flows = [theirs.compute_fsp_matrix(*x) for x in ((student, student_2), (teacher, teacher_2))]
    assert_same(found, F.mse_loss(*flows), student)


# --------------------------------------------------------------------------------------------- timm


class Backbone(nn.Module):
    """A model with all that timm's task asks for."""

    def __init__(self, width):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 5)
        self.head_hidden_size, self.num_classes, self.in_chans = width, 5, 3
        self.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}

    def forward_features(self, x):
        return self.stem(x)

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def test_feature_distillation_of_timm(alone):
    class Anything:
        pass

    names = dict.fromkeys(("create_model", "group_parameters", "clean_state_dict"))
    utils = dict(unwrap_model=lambda model: model, get_state_dict=None)
    losses = dict.fromkeys(("create_classification_loss", "LOSS_TYPES", "MULTI_LABEL_LOSS_TYPES"))
    module = alone(
        "timm.task.distillation",
        timm__models=names,
        timm__utils=utils,
        timm__utils__model=utils,
        timm__utils__model_ema={"ModelEmaV3": Anything},
        timm__loss=losses,
    )
    torch.manual_seed(0)
    student, teacher = Backbone(4), Backbone(6)
    task = module.FeatureDistillationTask(
        student, teacher, criterion=nn.CrossEntropyLoss(), distill_loss_weight=5.0, verbose=False
    )
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 4, 2])
    expected = task(images, labels)["kd_loss"]
    hint = fastkd.HintLoss(4, 6)
    hint.projector.load_state_dict(task.trainable_module.projection.state_dict())
    with torch.no_grad():
        target = teacher.forward_head(teacher.forward_features(images), pre_logits=True)
    found = hint(student.forward_head(student.forward_features(images), pre_logits=True), target)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, student.stem.weight)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


# ------------------------------------------------------------------------------------------ lightly


def test_patch_kernel_alignment_of_lightly(alone):
    module = alone(
        "lightly.loss.patch_kernel_alignment_loss",
        torchvision={},
        torchvision__ops={"roi_align": None},
    )
    student, teacher = features((3, 9, 6), (3, 9, 6))
    ignored = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) > 0.7
    loss = module.PatchKernelAlignmentLoss()
    for mask in (None, ignored):
        student32 = student.detach().float().requires_grad_()  # it computes in float32
        expected = loss(student32, teacher.float(), mask=mask)
        found = fastkd.cka(student32, teacher.float(), mask=None if mask is None else ~mask)
        gradients = [torch.autograd.grad(x, student32)[0] for x in (found, expected)]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------- TextBrewer


@pytest.fixture
def textbrewer(alone):
    return alone("textbrewer.losses")


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_hidden_states_of_textbrewer(mask, textbrewer):
    student, teacher = features((3, 5, 6), (3, 5, 6))
    expected = textbrewer.hid_mse_loss(student, teacher, mask)
    assert_same(fastkd.hint(student, teacher, mask=mask), expected, student)
    expected = textbrewer.cos_loss(student, teacher, mask)
    assert_same(fastkd.hint(student, teacher, kind="cosine", mask=mask), expected, student)


def test_patient_distillation_of_textbrewer(textbrewer):
    student, teacher = features((3, 5, 6), (3, 5, 6))
    expected = textbrewer.pkd_loss(student, teacher)
    found = fastkd.hint(student[:, 0], teacher[:, 0], kind="normalized_mse")
    assert_same(6 * found, expected, student)  # which sums over the width


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_flows_of_textbrewer(mask, textbrewer):
    student, student_2, teacher, teacher_2 = features((3, 5, 6), (3, 5, 7), (3, 5, 6), (3, 5, 7))
    pairs = (student, student_2), (teacher, teacher_2)
    expected = textbrewer.fsp_loss(*pairs, mask)
    assert_same(fastkd.fsp(*([x.mT for x in p] for p in pairs), mask=mask), expected, student)
    student, student_2, teacher, teacher_2 = features((3, 5, 6), (3, 5, 6), (3, 5, 8), (3, 5, 8))
    pairs = (student, student_2), (teacher, teacher_2)
    assert_same(fastkd.fsp(*pairs), textbrewer.mmd_loss(*pairs), student)  # its "nst"


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_attention_scores_of_textbrewer(mask, textbrewer):
    student, teacher = features((3, 2, 5, 5), (3, 2, 5, 5))
    expected = textbrewer.att_mse_loss(student, teacher, mask)
    below = -1e-3 if mask is None else -100.0
    found = fastkd.attention_mse(student, teacher, mask=mask, masked_below=below)
    assert_same(found, expected, student)


# --------------------------------------------------- formulas of what is not installed, written out


def test_score_weighted_squares_of_ultralytics():
    """Σ (s − t)² · score / (Σ score · C), the score that of the teacher's best class."""
    student, teacher, logits = features((2, 8, 6, 6), (2, 12, 6, 6), (2, 5, 6, 6))
    hint = fastkd.HintLoss(8, 12, projector="conv1x1-relu-conv1x1").double()
    score = logits.sigmoid().amax(1, keepdim=True)
    squares = (hint.projector(student) - teacher).square()
    expected = (squares * score).sum() / (score.sum() * 12 + 1e-9)
    assert_same(hint(student, teacher, weights=score), expected, student, *hint.parameters())


@pytest.mark.parametrize("removed", [None, "both"])
def test_gram_anchoring_of_dinov3(removed):
    student, teacher = features((2, 9, 6), (2, 9, 8))
    s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
    s, t = s @ s.mT, t @ t.mT
    if removed:
        s, t = s.clamp(min=0), t.clamp(min=0)
    found = fastkd.gram_anchoring(student, teacher, remove_negative=removed)
    assert_same(found, F.mse_loss(s, t), student)


def test_local_relations_of_lightly_train():
    student, teacher = features((2, 9, 6), (2, 9, 8))
    s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
    s, t = ((x @ x.mT / 0.07).flatten(0, 1) for x in (s, t))
    expected = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    found = fastkd.token_relation(student, teacher, normalize=True, temperature=0.07)
    assert_same(found, expected, student)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "cosine", "normalized_mse"])
def test_intermediate_layers_of_automodel(kind):
    """Pairs of layers with weights and a mask, by hooks on both networks."""

    class Layer(nn.Linear):
        def forward(self, x):
            return (super().forward(x).tanh(),)  # a tuple, as those of language models

    class Model(nn.Module):
        def __init__(self, n_layers):
            super().__init__()
            self.layers = nn.ModuleList(Layer(6, 6) for _ in range(n_layers))

        def forward(self, x):
            states = []
            for layer in self.layers:
                (x,) = layer(x)
                states.append(x)
            return states

    torch.manual_seed(0)
    student, teacher = Model(2).double(), Model(4).double()
    (tokens,) = features((3, 5, 6))
    pairs = fastkd.LayerPairs(
        {"layers.0": "layers.1", "layers.1": "layers.3"},
        fastkd.HintLoss(kind=kind),
        weights=[1.0, 0.5],
        reduce="mean",
    )
    with pairs.attach(student, teacher):
        states = student(tokens)
        with torch.no_grad():
            targets = teacher(tokens)
        found = pairs(mask=MASK)
    kept, losses = MASK.bool(), []
    for weight, s, t in ((1.0, states[0], targets[1]), (0.5, states[1], targets[3])):
        s, t = s[kept], t[kept]
        if kind == "cosine":
            loss = (1 - F.cosine_similarity(s, t)).mean()
        elif kind == "smooth_l1":
            loss = F.smooth_l1_loss(s, t)
        else:
            if kind == "normalized_mse":
                s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
            loss = F.mse_loss(s, t)
        losses.append(weight * loss)
    assert_same(found, torch.stack(losses).mean(), *student.layers[0].parameters())


# ------------------------------------------------------------------------------------- transformers


def test_layers_of_transformers(tiny_llama):
    """The states that hooks catch are those of `output_hidden_states`."""
    student, teacher = tiny_llama(0, width=16), tiny_llama(1, width=32)
    tokens = torch.randint(1, 32, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    pairs = fastkd.LayerPairs(
        {"model.embed_tokens": "model.embed_tokens", "model.layers.0.mlp": "model.layers.0.mlp"},
        [fastkd.HintLoss(16, 32), fastkd.TokenRelationLoss(heads=2)],
    )
    batch = dict(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    with pairs.attach(student, teacher):
        states = student(**batch).hidden_states
        with torch.no_grad():
            targets = teacher(**batch).hidden_states
        found, hint, _ = pairs(return_parts=True, mask=mask)
    expected = fastkd.hint(pairs.losses[0].projector(states[0]), targets[0], mask=mask)
    torch.testing.assert_close(hint, expected)
    found.backward()
    assert student.model.layers[0].mlp.down_proj.weight.grad.any()
    assert all(x.grad is None for x in teacher.parameters())
