"""How far losses and gradients lie from published forms and from other libraries, in float64.

Printed by `python benchmarks/report.py exactness`. A published form is a loss as its paper or its
authors have it, written anew in tests/published.py and tests/textbook.py; people's is the eager
expression of benchmarks/eager.py, with what it adds to logits or divides by. A library is imported
where it is installed. A difference is relative, |ours − theirs| / |theirs|, of gradients by their
norms. No form knows the truth in its last digits, so that some 1e-15 is agreement.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import peers
import torch
import torch.nn.functional as F
from cases import CASES
from inputs import logits, logits_and_labels, normal, two_vocabularies
from tables import section
from torch import Tensor
from workloads import BY_NAME

import fastkd

Inputs = Sequence[Tensor]
Loss = Callable[..., Tensor]


class Difference(NamedTuple):
    """The distances of two forms of a loss, relative to the second one."""

    loss: float
    gradient: float  # NaN where nothing is trained

    @property
    def worst(self) -> float:
        return max(x for x in self if not math.isnan(x))


def difference(ours: Loss, theirs: Loss, inputs: Inputs) -> Difference:
    """Return by how much the losses and the gradients of their means differ."""
    trained = [x for x in inputs if x.requires_grad]
    losses, gradients = [], []
    for function in (ours, theirs):
        loss = function(*inputs)
        losses.append(loss.detach())
        if trained:
            found = torch.autograd.grad(loss.mean(), trained)
            gradients.append(torch.cat([x.flatten() for x in found]))
    return Difference(_relative(*losses), _relative(*gradients) if trained else math.nan)


def _relative(found: Tensor, expected: Tensor) -> float:
    size = torch.linalg.vector_norm(expected)
    return float(torch.linalg.vector_norm(found - expected) / (size if size else 1))


def of_published(name: str) -> tuple[Difference, Difference]:
    """Return the worst difference of all cases of a loss, and that from people's expression."""
    worst = [
        difference(case, case.truth, case.inputs((12,), 20)) for case in CASES if case.name == name
    ]
    workload = BY_NAME[name]
    inputs = workload.inputs(min(workload.family.sizes), torch.float64, "cpu")
    people = difference(workload.fastkd, workload.eager, inputs)
    return Difference(*(max(x) for x in zip(*worst, strict=True))), people


# ---------------------------------------------------------------------------------------- libraries


class Form(NamedTuple):
    """A loss as a library has it, and the call of fastkd that is the same."""

    name: str  # of the function of fastkd and of what is special about the call
    theirs: Loss
    ours: Loss
    inputs: Inputs
    because: str = ""  # why they differ by more than rounding


def pytorch() -> Iterator[Form]:
    student, teacher, labels = logits_and_labels((12,), 20)
    weights = normal(20, seed=1).abs()
    for name, target, theirs, ours in (
        ("smoothed labels", labels, dict(label_smoothing=0.1), dict(label_smoothing=0.1)),
        ("class weights", labels, dict(weight=weights), dict(class_weights=weights)),
        ("soft labels", teacher.softmax(-1), {}, {}),
    ):

        def expected(z: Tensor, y: Tensor, options: Any = theirs) -> Tensor:
            return F.cross_entropy(z, y, **options)

        def found(z: Tensor, y: Tensor, options: Any = ours) -> Tensor:
            return fastkd.kd(z, teacher, y, alpha=1.0, **options)

        yield Form(f"kd, {name}", expected, found, [student, target])


def torchdistill() -> Iterator[Form]:
    module, paths = peers.mid_level_of_torchdistill(), ("", "x", "", "x")
    inputs = logits_and_labels((12,), 20)

    def by_paths(loss: Any) -> Loss:
        return lambda z, t, y: loss({"": {"x": z}}, {"": {"x": t}}, y)

    yield Form(
        "kd",
        by_paths(module.KDLoss(*paths, temperature=4.0, alpha=0.3)),
        lambda *x: fastkd.kd(*x, alpha=0.3, temperature=4.0),
        inputs,
    )
    yield Form(
        "kd, standardized logits",
        by_paths(module.LogitStdKDLoss(*paths, temperature=2.0, alpha=0.1, beta=9.0)),
        lambda *x: fastkd.kd(*x, alpha=0.1, distill_weight=9.0, temperature=2.0, standardize=True),
        inputs,
    )


def mmrazor() -> Iterator[Form]:
    registry = SimpleNamespace(register_module=lambda: lambda loss: loss)
    peers.stub("mmrazor.registry", MODELS=registry)
    folder, inputs = "mmrazor.models.losses.", logits_and_labels((12,), 20)
    decoupled = peers.alone(folder + "decoupled_kd").DKDLoss(4.0, 1.0, 8.0, reduction="sum")
    weighted = peers.alone(folder + "weighted_soft_label_distillation").WSLD(2.0, num_classes=20)
    yield Form(
        "decoupled_kd", decoupled, lambda *x: fastkd.decoupled_kd(*x, reduction="sum"), inputs
    )
    yield Form("wsld", weighted, fastkd.wsld, inputs, "it adds 1e-7 to a divisor")


def modelopt() -> Iterator[Form]:
    module, inputs = peers.alone("modelopt.torch.distill.losses"), logits_and_labels((12,), 20)
    yield Form(
        "forward_kl",
        module.LogitsDistillationLoss(4.0, "batchmean"),
        lambda *x: fastkd.forward_kl(*x, temperature=4.0),
        inputs[:2],
    )
    for threshold in (0.2, 0.7):
        yield Form(
            f"mft, threshold {threshold}",
            module.MFTLoss(2.0, threshold),
            lambda *x, tau=threshold: fastkd.mft(*x, threshold=tau, temperature=2.0),
            inputs,
            "it adds 1e-7 to a divisor",
        )


def textbrewer() -> Iterator[Form]:
    module, inputs = peers.alone("textbrewer.losses"), logits((12,), 20)
    options = dict(temperature=4.0, scale_t2=False)
    yield Form(
        "soft_cross_entropy",
        lambda *x: module.kd_ce_loss(*x, 4.0),
        lambda *x: fastkd.soft_cross_entropy(*x, **options),
        inputs,
    )
    temperatures = torch.linspace(1, 5, 12, dtype=torch.float64)
    yield Form(
        "soft_cross_entropy, a temperature for each row",
        lambda *x: module.kd_ce_loss(*x, temperatures),
        lambda *x: fastkd.soft_cross_entropy(*x, temperature=temperatures, scale_t2=False),
        inputs,
    )


def lightly() -> Iterator[Form]:
    embeddings = normal(12, 20).requires_grad_()
    yield Form(
        "koleo",
        peers.alone("lightly.loss.koleo_loss").KoLeoLoss(),
        fastkd.koleo,
        [embeddings],
        "it adds 1e-8 to each coordinate too",
    )


def trl() -> Iterator[Form]:
    loss = importlib.import_module("trl.experimental.gold.gold_trainer").ULDLoss
    names = ["crossentropy_weight", "skip_student_eos", "skip_teacher_eos"]
    settings: dict[str, Any] = {f"uld_{name}": 0.0 for name in names}
    settings |= dict(
        uld_distillation_weight=1.0, uld_student_temperature=1.5, uld_teacher_temperature=0.8,
        use_extended_uld=False, uld_token_merge_strategy="observed", beta=0.3,
    )  # fmt: skip
    ids = torch.tensor([10, 2, 5]), torch.tensor([1, 12, 4])
    vocabularies = [
        SimpleNamespace(get_vocab=lambda of=of: dict(zip("abc", of.tolist(), strict=True)))
        for of in ids
    ]
    weights = dict(uld_hybrid_matched_weight=1.0, uld_hybrid_unmatched_weight=0.0)
    hybrid = settings | dict(uld_use_hybrid_loss=True) | weights
    options: dict[str, Any] = dict(student_temperature=1.5, teacher_temperature=0.8)
    divergence = dict(mass="raw", divergence="jensen_shannon", beta=0.3, scale_t2=False)
    # one sequence, all of whose tokens count
    labels = torch.ones(1, 7, dtype=torch.int64)

    def on_tokens(module: Any) -> Loss:
        return lambda z, t: module(z, t, labels, labels, labels, labels)

    inputs = two_vocabularies((1, 7), 11)
    yield Form(
        "uld", on_tokens(loss(SimpleNamespace(**settings))), lambda *x: fastkd.uld(*x, **options),
        inputs,
    )  # fmt: skip
    yield Form(
        "matched_kl, raw mass",
        on_tokens(loss(SimpleNamespace(**hybrid), *vocabularies)),
        lambda *x: fastkd.matched_kl(*x, *ids, **divergence, **options),
        inputs,
    )


# by the name on PyPI
LIBRARIES: dict[str, Callable[[], Iterator[Form]]] = {
    "torch": pytorch,
    "torchdistill": torchdistill,
    "mmrazor": mmrazor,
    "nvidia-modelopt": modelopt,
    "textbrewer": textbrewer,
    "lightly": lightly,
    "trl": trl,
}


class Agreement(NamedTuple):
    """A loss beside that of a library."""

    name: str
    library: str
    found: Difference
    because: str


def of_libraries() -> tuple[list[Agreement], dict[str, str]]:
    """Return the losses beside those of the libraries that are here, and why others are not."""
    rows, missing = [], {}
    for library, forms in LIBRARIES.items():
        try:
            for form in forms():
                found = difference(form.ours, form.theirs, form.inputs)
                rows.append(Agreement(form.name, library, found, form.because))
        except ImportError as error:
            missing[library] = str(error).splitlines()[0]
    losses, versions = peers.available()
    for library, functions in losses.items():
        if library in peers.NEED_A_GPU:
            continue
        for name, theirs in functions.items():
            inputs = BY_NAME[name].inputs((120, 50), torch.float64, "cpu")
            found = difference(BY_NAME[name].fastkd, theirs, inputs)
            rows.append(Agreement(name, library, found, ""))
    missing |= {x: why for x, why in versions.items() if why.startswith(peers.MISSING)}
    return rows, {name: why for name, why in missing.items() if name not in peers.NEED_A_GPU}


# ------------------------------------------------------------------------------------------ tables


def _in_figures(found: Difference) -> list[str]:
    return ["–" if math.isnan(x) else "0" if x == 0 else f"{x:.0e}" for x in found]


def page() -> str:
    """Return the tables of all losses, which takes a CPU some seconds."""
    rows = [
        [name, *(x for found in of_published(name) for x in _in_figures(found))] for name in BY_NAME
    ]
    agreements, missing = of_libraries()
    published = section(
        "Beside published forms, in float64: counted",
        ["loss", "loss, published", "gradient", "loss, people's", "gradient"],
        rows,
        "Relative differences, the worst of all tested options of a loss. Published: as its paper "
        "or its authors have it, written anew. People's: the eager expression that the benchmarks "
        "time, with what it subtracts or adds so that nothing is infinite.",
    )
    why = "".join(f"\n- {name}: {reason}" for name, reason in missing.items())
    libraries = section(
        "Beside the code of libraries, in float64: counted",
        ["loss", "library", "version", "loss differs by", "gradient", "because"],
        [
            [x.name, x.library, _version(x.library), *_in_figures(x.found), x.because]
            for x in agreements
        ],
        f"Not compared, because they cannot be imported here:\n{why}" if why else "",
    )
    return f"{published}\n{libraries}"


def _version(library: str) -> str:
    return importlib.metadata.version(library.split()[0])
