"""Losses of logits with the options that go another way, beside the code that people publish.

They are measured by `bench.py --logits`, at the logits of a batch of images and of a language
model, and `bars` says which goals are met: half of the time of eager PyTorch, little more memory
than the gradients need, and for three teachers little more time than twice that for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import eager
import torch
import torch.nn.functional as F
from eager import T
from tables import markdown
from torch import Tensor
from workload_inputs import Inputs, Shape, normal, two_networks, with_labels
from workloads import BY_NAME, Workload

import fastkd

SHAPES = [(256, 1000), (2048, 32000)]
ONE_TEACHER = "one teacher"
_FASTER, _LEANER, _MORE_TEACHERS = 2.0, 1.2, 2.2
Loss = Callable[..., Tensor]


# ----------------------------------------------------------------------------------------- inputs


def networks(n: int, n_trained: int = 1) -> Inputs:
    """Return a maker of the logits of n networks, the first of which are trained."""

    def inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        made = [normal(shape, dtype, device, seed) for seed in range(n)]
        return [x.requires_grad_(i < n_trained) for i, x in enumerate(made)]

    return inputs


def with_mixed_labels(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return logits and labels of two classes each, as mixup makes them."""
    labels = torch.zeros(shape, dtype=dtype, device=device)
    places = torch.arange(shape[0], device=device)
    labels[places, places % shape[1]] = 0.7
    labels[places, (7 * places + 1) % shape[1]] += 0.3
    return [*two_networks(shape, dtype, device), labels]


def with_class_weights(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    weights = normal(shape[1:], dtype, device, seed=2).abs().add_(0.1)
    return [*with_labels(shape, dtype, device), weights]


def with_index(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return the logits of a student and three teachers, and the teacher of each row."""
    index = torch.arange(shape[0], device=device) % 3
    return [*networks(4)(shape, dtype, device), index]


# ----------------------------------------------------------------------------- what people publish


def _standardized(logits: Tensor) -> Tensor:
    return (logits - logits.mean(-1, keepdim=True)) / (1e-7 + logits.std(-1, keepdim=True))


def _of_standardized(divergence: Loss) -> Loss:
    return lambda student, teacher: divergence(_standardized(student), _standardized(teacher))


def _kd(cross_entropy: Callable[..., Tensor]) -> Loss:
    def kd(student: Tensor, teacher: Tensor, *of_labels: Tensor) -> Tensor:
        return 0.5 * cross_entropy(student, *of_labels) + 0.5 * eager.forward_kl(student, teacher)

    return kd


def _divergence(student: Tensor, p: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(student / T, dim=-1), p, reduction="batchmean") * T**2


def mixture(student: Tensor, *teachers: Tensor) -> Tensor:
    p = torch.stack([F.softmax(x / T, dim=-1) for x in teachers]).mean(0)
    return _divergence(student, p)


def mean_logits(student: Tensor, *teachers: Tensor) -> Tensor:
    return _divergence(student, F.softmax(torch.stack(teachers).mean(0) / T, dim=-1))


def mean_losses(student: Tensor, *teachers: Tensor) -> Tensor:
    return torch.stack([eager.forward_kl(student, x) for x in teachers]).mean()


def chosen(student: Tensor, *teachers_and_index: Tensor) -> Tensor:
    *teachers, index = teachers_and_index
    places = index[None, :, None].expand(1, *student.shape)
    return eager.forward_kl(student, torch.stack(teachers).gather(0, places)[0])


def mutual(*logits: Tensor) -> Tensor:
    """Return the sum of all networks' losses, each of which takes the others for constants."""
    losses = [
        eager.forward_kl(z, other.detach()) for z in logits for other in logits if other is not z
    ]
    return torch.stack(losses).sum() / (len(logits) - 1)


def uld(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (F.softmax(x, dim=-1).sort(-1, descending=True).values for x in (student, teacher))
    return (q - p).abs().sum(-1).mean()


# ------------------------------------------------------------------------------------ what is timed


def _measured(
    loss: str,
    options: str = "",
    published: Loss | None = None,
    inputs: Inputs | None = None,
    ours: Loss | None = None,
    others: Mapping[str, Loss] | None = None,
) -> Workload:
    """Return a loss with its options in words; what is not given is that of its first case."""
    known = BY_NAME[loss]
    return known._replace(
        inputs=inputs or known.inputs,
        eager=published or known.eager,
        of_options=options,
        ours=ours,
        others=others or {},
    )


def _ours(loss: Loss, *last: str, **options: Any) -> Loss:
    """Return the loss with these options, of which the last inputs are those that are named."""

    def with_options(*inputs: Tensor) -> Tensor:
        n = len(inputs) - len(last)
        return loss(*inputs[:n], **dict(zip(last, inputs[n:], strict=True)), **options)

    return with_options


def _of_teachers(combine: str, published: Loss) -> Workload:
    def ours(student: Tensor, *teachers: Tensor) -> Tensor:
        return fastkd.multi_teacher(student, teachers, temperature=T, combine=combine)

    return _measured(
        "multi_teacher", f"{combine} of 3", published, networks(4), ours,
        {ONE_TEACHER: lambda student, first, *others: ours(student, first)},
    )  # fmt: skip


def _of_chosen() -> Workload:
    def ours(student: Tensor, *teachers_and_index: Tensor) -> Tensor:
        *teachers, index = teachers_and_index
        return fastkd.multi_teacher(student, teachers, teacher_index=index, temperature=T)

    def one(student: Tensor, first: Tensor, *others: Tensor) -> Tensor:
        return fastkd.multi_teacher(student, [first], temperature=T)

    return _measured("multi_teacher", "one of 3", chosen, with_index, ours, {ONE_TEACHER: one})


def _of_peers(n: int) -> Workload:
    def ours(*logits: Tensor) -> Tensor:
        return fastkd.mutual_kl(logits, temperature=T)

    return _measured("mutual_kl", f"{n} networks", mutual, networks(n, n), ours)


_KD = "kd"
WORKLOADS = [
    _measured("decoupled_kd"),
    _measured("nkd"),
    *(
        _measured(
            name, "standardized", _of_standardized(getattr(eager, name)),
            ours=_ours(getattr(fastkd, name), standardize=True, temperature=T),
        )
        for name in ("forward_kl", "reverse_kl", "total_variation")
    ),
    _measured(
        _KD, "label_smoothing", _kd(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)),
        ours=_ours(fastkd.kd, label_smoothing=0.1, temperature=T),
    ),
    _measured(
        _KD, "class_weights", _kd(lambda z, y, w: F.cross_entropy(z, y, w)), with_class_weights,
        _ours(fastkd.kd, "class_weights", temperature=T),
    ),
    _measured(
        _KD, "class_weights, label_smoothing",
        _kd(lambda z, y, w: F.cross_entropy(z, y, w, label_smoothing=0.1)), with_class_weights,
        _ours(fastkd.kd, "class_weights", label_smoothing=0.1, temperature=T),
    ),
    _measured(
        _KD, "soft labels", _kd(F.cross_entropy), with_mixed_labels,
        _ours(fastkd.kd, temperature=T),
    ),
    _measured("wsld"),
    _measured("mft"),
    _measured("teacher_free_kd"),
    _measured("mlkd"),
    _of_teachers("mixture", mixture),
    _of_teachers("logits", mean_logits),
    _of_teachers("sum", mean_losses),
    _of_chosen(),
    _of_peers(2),
    _of_peers(3),
    _measured("uld", "", uld, two_networks, _ours(fastkd.uld)),
]  # fmt: skip


def shapes(workload: Workload) -> list[Shape]:
    """Return both shapes, but where the V² numbers of pairs of classes would fill the memory."""
    return SHAPES[:1] if workload.name == "mlkd" else SHAPES


# ------------------------------------------------------------------------------------------- goals


def bars(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of the goals of each row, what was found, and whether they are met."""
    known = {(x.name, x.of_options): x for x in WORKLOADS}
    lines = []

    def add(what: str, goal: str, found: float | None, is_met: bool) -> None:
        answer = "–" if found is None else "met" if is_met else "missed"
        lines.append([what, goal, "–" if found is None else f"{found:.2f}", answer])

    for row in rows:
        workload = known.get((row["loss"], row.get("options", "")))
        if workload is None or row["direction"] == "forward":
            continue
        shape = row["shape"]
        what = " ".join([workload.label, "×".join(map(str, shape))])
        found = row["implementations"]
        ratio = found.get("eager", {}).get("ratio")
        add(f"{what}, eager / fastkd", f"≥ {_FASTER:g}", ratio, (ratio or 0) >= _FASTER)
        peak = found["fastkd"].get("peak_extra_bytes")
        if peak is not None and shape == [*SHAPES[-1]]:
            inputs = workload.inputs((1, 8), torch.float32, "meta")
            n_logits = sum(x.requires_grad for x in inputs)
            logits = peak / (4 * shape[0] * shape[1] * n_logits)
            add(f"{what}, memory / gradients", f"≤ {_LEANER:g}", logits, logits <= _LEANER)
        if (one := found.get(ONE_TEACHER, {}).get("ratio")) is not None:
            add(f"{what}, 3 teachers / 1", f"≤ {_MORE_TEACHERS:g}", 1 / one,
                1 / one <= _MORE_TEACHERS)  # fmt: skip
    return markdown(["what", "goal", "found", ""], lines)
