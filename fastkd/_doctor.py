"""Say how the losses run on this machine: `fastkd doctor`."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastkd
from fastkd import _backend
from fastkd._loss import Loss


def _logits(device: str, dtype: torch.dtype) -> list[Tensor]:
    # float32 has a large problem and bfloat16 a small one, because engines solve them differently
    n_rows = 263 if dtype == torch.float32 else 7
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(n_rows, 1003, generator=generator).to(device, dtype) for _ in range(2)]


def _logits_of_peers(device: str, dtype: torch.dtype) -> list[Any]:
    first, second = _logits(device, dtype)
    return [(first, second, first.cos())]


def _logits_of_teachers(device: str, dtype: torch.dtype) -> list[Any]:
    student, teacher = _logits(device, dtype)
    return [student, [teacher, teacher.sin()]]


def _logits_and_labels(device: str, dtype: torch.dtype) -> list[Tensor]:
    logits = _logits(device, dtype)
    return [*logits, torch.arange(len(logits[0]), device=device)]


def _heads(device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(67, 33), (1003, 33), (67, 65), (1003, 65)]
    return [(torch.randn(*x, generator=generator) / 2).to(device, dtype) for x in shapes]


def _embeddings(device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(67, n, generator=generator).to(device, dtype) for n in (33, 65)]


def _logits_and_ids(device: str, dtype: torch.dtype) -> list[Tensor]:
    student, teacher = _logits(device, dtype)
    ids = torch.arange(0, student.shape[1], 2, device=device)
    return [student, teacher, ids, ids.flip(0)]


def _logits_and_map(device: str, dtype: torch.dtype) -> list[Tensor]:
    student, teacher = _logits(device, dtype)
    ids = torch.arange(student.shape[1], device=device)
    return [student, teacher, torch.stack([ids.flip(0), ids // 2], 1)]


def _likelihoods(device: str, dtype: torch.dtype) -> list[Tensor]:
    return [-x.abs() for x in _logits(device, dtype)]


def _embeddings_of_one_width(device: str, dtype: torch.dtype) -> list[Tensor]:
    return [embeddings[:, :33] for embeddings in _embeddings(device, dtype)]


def _embeddings_alone(device: str, dtype: torch.dtype) -> list[Tensor]:
    return _embeddings(device, dtype)[:1]


def _pairs(device: str, dtype: torch.dtype) -> list[Tensor]:
    pairs = [F.normalize(x) for x in _embeddings_of_one_width(device, dtype)]
    return [*pairs, torch.tensor(5.0, device=device), torch.tensor(-2.0, device=device)]


def _classes(device: str, dtype: torch.dtype) -> list[Tensor]:
    features, _ = _embeddings(device, dtype)
    return [features, torch.arange(len(features), device=device) % 7]


def _crops(device: str, dtype: torch.dtype) -> list[Tensor]:
    student, teacher = _logits(device, dtype)
    crops = [torch.stack([student, teacher.flip(1), student.flip(1)]), teacher.expand(2, -1, -1)]
    return [*crops, teacher[0]]


def _patches(device: str, dtype: torch.dtype) -> list[Tensor]:
    student, teacher = _logits(device, dtype)
    n_images = 7 if len(student) == 7 else 1
    mask = torch.arange(len(student), device=device).unflatten(0, (n_images, -1)) % 3 < 2
    return [*(x.unflatten(0, (n_images, -1)) for x in (student, teacher)), mask, teacher[0]]


def _maps(device: str, dtype: torch.dtype) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(7, n, 12, 13, generator=generator).to(device, dtype) for n in (33, 65)]


def _maps_of_one_width(device: str, dtype: torch.dtype) -> list[Any]:
    return [maps[:, :33] for maps in _maps(device, dtype)]


def _maps_of_layers(device: str, dtype: torch.dtype) -> list[Any]:
    student, teacher = _maps_of_one_width(device, dtype)
    return [(student, teacher.sin()), (teacher, student.sin())]


def _maps_and_variances(device: str, dtype: torch.dtype) -> list[Any]:
    return [*_maps_of_one_width(device, dtype), torch.linspace(-1, 5, 33, device=device)]


def _tokens(device: str, dtype: torch.dtype) -> list[Any]:
    return [maps[:, :32, 0].mT for maps in _maps(device, dtype)]


def _tokens_of_relations(device: str, dtype: torch.dtype) -> list[Any]:
    student, teacher = (x.repeat(1, 1, 3) for x in _tokens(device, dtype))
    return [(student, teacher.sin()), (teacher, student.sin())]


Inputs = Callable[[str, torch.dtype], list[Any]]
_BY_FIRST_PARAMETER: dict[str, Inputs] = {
    "student_logits": _logits,
    "student_hidden": _heads,
    "student_logprobs": _likelihoods,
    "student": _embeddings,
    "query": _embeddings_of_one_width,
    "view1": _embeddings_of_one_width,
    "image": _pairs,
    "features": _classes,
}
_BY_NAME: dict[str, Inputs] = {
    "kd": _logits_and_labels,
    "decoupled_kd": _logits_and_labels,
    "nkd": _logits_and_labels,
    "mutual_kl": _logits_of_peers,
    "matched_kl": _logits_and_ids,
    "projected_kl": _logits_and_map,
    "wsld": _logits_and_labels,
    "mft": _logits_and_labels,
    "teacher_free_kd": lambda device, dtype: _logits_and_labels(device, dtype)[::2],
    "uskd": lambda device, dtype: _logits_and_labels(device, dtype)[::2],
    "multi_teacher": _logits_of_teachers,
    "correlation_congruence": _embeddings_of_one_width,
    "dino": _crops,
    "ibot": _patches,
    "koleo": _embeddings_alone,
    "channel_wise": _maps_of_one_width,
    "nst": _maps,
    "fsp": _maps_of_layers,
    "vid": _maps_and_variances,
    "attention_mse": _maps_of_one_width,
    "hint": _embeddings_of_one_width,
    "embedding_mse": _embeddings_of_one_width,
    "attention_transfer": _maps,
    "token_relation": _tokens,
    "minilm_relation": _tokens_of_relations,
    "gram_anchoring": _tokens,
    "cka": _tokens,
}


def _inputs_of(loss: Loss[..., Any]) -> Inputs:
    first_parameter = next(iter(signature(loss).parameters))
    return _BY_NAME.get(loss.__name__) or _BY_FIRST_PARAMETER[first_parameter]


# every public loss, and the function that makes the inputs with which it is checked
_PUBLIC = (getattr(fastkd, name) for name in fastkd.__all__)
LOSSES: dict[Loss[..., Any], Inputs] = {x: _inputs_of(x) for x in _PUBLIC if hasattr(x, "formula")}
# relative: bfloat16 gradients have 8 bits, and eager PyTorch itself errs by 2e-5 in float32
TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 1e-2}


def doctor() -> int:
    print("python  ", platform.python_version(), "on", platform.system(), platform.machine())
    print("torch   ", torch.__version__)
    print("triton  ", _triton())
    print("fastkd  ", fastkd.__version__)
    print(
        "backend ",
        _backend.chosen(),
        f"(FASTKD_BACKEND: {os.environ.get('FASTKD_BACKEND', 'not set')})",
    )
    n_wrong, cannot_run = 0, dict.fromkeys(LOSSES)
    for device, name in _devices().items():
        print(f"\n{device}  {name}".rstrip())
        reasons = []
        for loss, inputs in LOSSES.items():
            engine, reason = _engine_and_reason(loss, device)
            if engine:
                cannot_run.pop(loss, None)
                wrong = _wrong(loss, inputs, device)
                n_wrong += wrong is not None
                print(f"  {loss.__name__:24}{engine:10}{wrong or 'ok'}")
            else:
                print(f"  {loss.__name__:24}cannot run")
            reasons.append(reason)
        for reason in filter(None, dict.fromkeys(reasons)):  # each once, since losses share them
            print(f"  {reason}")
    print()
    if cannot_run:
        print("No device here can run", ", ".join(loss.__name__ for loss in cannot_run))
    print(f"{n_wrong} wrong" if n_wrong else "What runs gives the values of its formula.")
    return 1 if n_wrong or cannot_run else 0


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def _devices() -> dict[str, str]:
    """Return every device of this machine with its name."""
    devices = {"cpu": ""}
    if torch.accelerator.is_available():
        kind = str(torch.accelerator.current_accelerator())
        name = getattr(torch.get_device_module(kind), "get_device_name", lambda _: "")
        devices |= {f"{kind}:{i}": name(i) for i in range(torch.accelerator.device_count())}
    return devices


def _engine_and_reason(loss: Loss[..., Any], device: str) -> tuple[str | None, str]:
    """Return the engine that computes the loss, or None, and why it is not a better one."""
    tensors, has_kernels = [torch.empty(0, device=device)], loss.has_kernels
    try:
        engine = loss.engine_for(tensors)
    except RuntimeError as error:
        return None, str(error)
    if engine == "triton":
        obstacle = _obstacle_of(torch.bfloat16, device)
        return engine, f"triton, but not of bfloat16: {obstacle}" if obstacle else ""
    if _backend.chosen() == engine:
        return engine, f'{engine}: FASTKD_BACKEND asks for it; "auto" takes the best engine'
    if not loss.has_engines:
        return engine, "formula: the best engine of losses that are few products and sweeps"
    if engine == "formula":
        return engine, "formula: it has fewer launches there than the portable engine"
    if not has_kernels:
        return engine, f"{engine}: the best engine of losses that have no kernels"
    obstacle = _backend.triton_obstacle(tensors)
    return engine, f"{engine}, not triton: {obstacle or 'Triton would only interpret the kernels'}"


def _obstacle_of(dtype: torch.dtype, device: str) -> str | None:
    return _backend.triton_obstacle([torch.empty(0, dtype=dtype, device=device)])


def _wrong(loss: Loss[..., Any], inputs: Inputs, device: str) -> str | None:
    """Return how value or gradient differ from the formula's, or the error, or None."""
    for dtype, tolerance in TOLERANCES.items():
        is_triton = loss.engine_for([torch.empty(0, device=device)]) == "triton"
        if is_triton and _obstacle_of(dtype, device):
            continue
        try:
            got = _value_and_gradients(loss, inputs(device, dtype))
            with fastkd.backend("formula"):
                true = tree_map(_exact, inputs("cpu", dtype))
                expected = _value_and_gradients(loss, true)
        except Exception as error:  # any, so that the other losses are still examined
            return f"{dtype}: {type(error).__name__}: {error}"
        for what, a, b in zip(("value", *_GRADIENTS), got, expected, strict=False):
            difference = ((a - b).abs().max() / b.abs().max()).item()
            if not difference <= tolerance:
                return f"{dtype}: its {what} is {difference:.1e} from the formula's"
    return None


def _exact(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


_GRADIENTS = "gradient", "gradient with the teacher's", "gradient in the teacher"


def _value_and_gradients(loss: Loss[..., Any], tensors: list[Any]) -> list[Tensor]:
    """Return value and gradient and, of a loss whose teacher may learn, those of both networks."""
    student, *_ = tree_leaves(tensors)
    tensors = tree_map(lambda x: x.detach() if x is not student else x.requires_grad_(), tensors)
    value = loss(*tensors)
    found = [value, *torch.autograd.grad(value, student)]
    if "teacher_gradient" in signature(loss).parameters:
        both = [x.detach().requires_grad_() for x in tensors]
        found += torch.autograd.grad(loss(*both, teacher_gradient=True), both)
    return [x.detach().cpu().double() for x in found]
