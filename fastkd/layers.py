"""Losses between layers of two networks, whose outputs are caught by hooks while they run."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastkd import _option_checks

Layers = str | tuple[str, ...]  # a name of a module, or several for a loss of several layers
Pairs = Mapping[Any, Any] | Sequence[tuple[Any, Any]]
Select = Callable[[Any], Any] | int | str | None

STUDENT, TEACHER = "student", "teacher"
# what torch.compile, FSDP and checkpoint_wrapper put into the names of modules
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class LayerPairs(nn.Module):
    """Σ w · loss(student's layer, teacher's layer) over pairs of layers, named as modules.

        pairs = fastkd.LayerPairs({"layer3": "layer5"}, fastkd.HintLoss(128, 256))
        with pairs.attach(student, teacher):
            for inputs, labels in loader:
                loss = criterion(student(inputs), labels)
                with torch.no_grad():
                    teacher(inputs)
                (loss + pairs()).backward()

    Attached, it keeps what the layers return in the latest forward of each network, the teacher's
    detached, until it is called or the network runs again. Calls of the layers outside of a forward
    of their network are not seen, nor what activation checkpointing computes again in a backward.

    Names are those of `named_modules()`, "" for the network itself; the parts that
    DistributedDataParallel, FSDP, checkpoint_wrapper and torch.compile put into them may be left
    out. Networks are attached after they are wrapped by FSDP, and before the first call of one that
    is compiled: the compiler takes the hooks into its graph, without a graph break, but does not
    notice later ones. The networks may share layers; they may be one network, whose forwards under
    `torch.no_grad()` are the teacher's. Inside reentrant checkpointing a layer has no gradient;
    take `use_reentrant=False`. Replicas of torch.nn.DataParallel are not seen.

    The losses are submodules: give `pairs.parameters()` to the optimizer where they have any. Under
    DistributedDataParallel wrap these pairs as well, which are called without inputs.

    Args:
        pairs: Layers of the student and of the teacher, {"layer3": "layer5"} or a list of pairs,
            [("layer3", "layer5"), ("layer3", "layer6")]. A tuple of names in place of a name gives
            the loss a tuple, as `FSPLoss` takes it.
        loss: A function or module of a student's and a teacher's output, or one for each pair.
        weights: w, one number for each pair; 1 by default.
        reduce: "sum", or "mean", which divides the sum by the number of pairs.
        select: What of a layer's output is compared: an index, a key or a function of it. By
            default the output, or the first element of a tuple, which is the hidden state of layers
            in Hugging Face's models.
        teacher_select: The same for the teacher; by default that of the student.
    """

    def __init__(
        self,
        pairs: Pairs,
        loss: Any,
        *,
        weights: Sequence[float] | None = None,
        reduce: str = "sum",
        select: Select = None,
        teacher_select: Select = None,
    ) -> None:
        super().__init__()
        self.pairs = [_pair(x) for x in (pairs.items() if isinstance(pairs, Mapping) else pairs)]
        n = len(self.pairs)
        if not n:
            raise ValueError('pairs are empty: name layers, as in {"layer3": "layer5"}')
        losses = [*loss] if isinstance(loss, (list, tuple, nn.ModuleList)) else [loss] * n
        for name, values in (("loss", losses), ("weights", weights)):
            if isinstance(values, (int, float)):
                raise TypeError(f"{name} must be one for each of the {n} pairs, got {values!r}")
            if values is not None and len(values) != n:
                raise ValueError(
                    f"{name} must be one for all, or one for each of the {n} pairs, "
                    f"got {len(values)}"
                )
        self.losses = nn.ModuleList(x if isinstance(x, nn.Module) else _Function(x) for x in losses)
        self.weights = [1.0] * n if weights is None else [*weights]
        _option_checks.number(**{f"weights[{i}]": w for i, w in enumerate(self.weights)})
        _option_checks.one_of(("sum", "mean"), reduce=reduce)
        self.reduce = reduce
        self.select = select
        self.teacher_select = select if teacher_select is None else teacher_select
        self._attachment: Attachment | None = None

    def attach(self, student: nn.Module, teacher: nn.Module) -> Attachment:
        """Return hooks on both networks, which stay until its `remove()` or the end of `with`."""
        if self._attachment is not None and self._attachment.is_attached:
            raise RuntimeError(
                "these pairs are attached already: call remove() of what attach() returned, or "
                "leave its with block"
            )
        names = [list(dict.fromkeys(x for p in self.pairs for x in _names(p[i]))) for i in (0, 1)]
        selects = (self.select, self.teacher_select)
        self._attachment = Attachment((student, teacher), names, selects)
        return self._attachment

    def forward(self, *, return_parts: bool = False, **of_a_batch: Any) -> Any:
        """Return the loss of what was caught, and forget it.

        Args:
            return_parts: Whether to return (loss, l_1, l_2, …), the losses of the pairs without
                their weights, in their order.
            of_a_batch: What all losses get besides, for example mask=attention_mask.
        """
        if self._attachment is None or not self._attachment.is_attached:
            raise RuntimeError(
                "the pairs are not attached to networks: run both in "
                "`with pairs.attach(student, teacher):`, and call pairs() there"
            )
        outputs = self._attachment.take()
        parts = [
            loss(*(_of_layers(outputs[i], pair[i]) for i in (0, 1)), **of_a_batch)
            for loss, pair in zip(self.losses, self.pairs, strict=True)
        ]
        total = parts[0] * self.weights[0]
        for part, weight in zip(parts[1:], self.weights[1:], strict=True):
            total = total + part * weight
        if self.reduce == "mean":
            total = total / len(parts)
        return (total, *parts) if return_parts else total

    def extra_repr(self) -> str:
        return f"pairs={self.pairs}, weights={self.weights}, reduce={self.reduce!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attachment": None}


class Attachment:
    """Hooks on a student and a teacher, and what their layers returned in the latest forwards.

    A copy or a pickle of a network takes the hooks along, which are idle there.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module] = (),
        names: Sequence[Sequence[str]] = (),
        selects: Sequence[Select] = (),
    ) -> None:
        self._roots = [_unwrapped(network) for network in networks]
        self._names = names
        self._outputs: list[dict[str, Any]] = [{} for _ in networks]
        self._has_run = [False for _ in networks]
        self._running: list[int] = []  # whose forwards are under way, the innermost one last
        self._handles: list[Any] = []
        layers = [_layers(root) for root in self._roots]
        found = [
            [_named(name, known, side) for name in of_side]
            for side, known, of_side in zip((STUDENT, TEACHER), layers, names, strict=False)
        ]
        for side, modules in enumerate(found):
            for name, module in zip(names[side], modules, strict=True):
                hook = functools.partial(self._catch, side, name, selects[side])
                self._handles.append(module.register_forward_hook(hook))
        for root in {id(x): x for x in self._roots}.values():
            self._handles += [
                root.register_forward_pre_hook(self._begin),
                root.register_forward_hook(self._end, always_call=True),
            ]
        self.is_attached = bool(self._handles)

    def remove(self) -> None:
        """Remove the hooks, and forget what they caught."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._roots, self.is_attached = [], [], False
        self._outputs = [{} for _ in self._outputs]

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def take(self) -> list[dict[str, Any]]:
        """Return the outputs of the student's and the teacher's layers by name, once."""
        for side, name in enumerate((STUDENT, TEACHER)):
            if not self._has_run[side]:
                raise RuntimeError(
                    f"the {name} has not run since it was attached, or since the last call of "
                    f"these pairs: run both networks, then call the pairs once. A network that "
                    "was compiled must be attached before its first call"
                )
            missing = [x for x in self._names[side] if x not in self._outputs[side]]
            if missing:
                raise RuntimeError(
                    f"the forward of the {name} did not call {', '.join(map(repr, missing))}: "
                    "name layers that it calls as modules, or run all of the network"
                )
        outputs, self._outputs = self._outputs, [{} for _ in self._outputs]
        self._has_run = [False for _ in self._has_run]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _warn_of_no_gradient(outputs[0])
        return outputs

    def _begin(self, network: nn.Module, inputs: Any) -> None:
        sides = [i for i, root in enumerate(self._roots) if root is network]
        if not sides or _is_in_backward():  # a copy of the network, or computed again
            return
        # of a network that is its own teacher, forwards without a graph are the teacher's
        side = sides[-1] if len(sides) == 1 or not torch.is_grad_enabled() else sides[0]
        self._outputs[side] = {}
        self._running.append(side)

    def _end(self, network: nn.Module, inputs: Any, output: Any) -> None:
        if self._running and self._roots[self._running[-1]] is network and not _is_in_backward():
            self._has_run[self._running.pop()] = True

    def _catch(
        self, side: int, name: str, select: Select, layer: nn.Module, inputs: Any, output: Any
    ) -> None:
        if self._running and self._running[-1] == side:
            selected = _selected(output, select, name)
            self._outputs[side][name] = _detached(selected) if side else selected

    def __deepcopy__(self, memo: Any) -> Attachment:
        return self

    def __reduce__(self) -> Any:
        return Attachment, ()


class _Function(nn.Module):
    """A function as a module, so that functions and modules are one list."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(
                f"loss must be a function or a module of two outputs, got {function!r}: "
                "fastkd.hint, for example, or fastkd.HintLoss(...)"
            )
        self.function = function

    def forward(self, *outputs: Any, **of_a_batch: Any) -> Any:
        """Return what the function returns."""
        return self.function(*outputs, **of_a_batch)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def _pair(pair: Any) -> tuple[Layers, Layers]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(
            f"a pair must be the name of a layer of the student and one of the teacher, got "
            f'{pair!r}: pairs are {{"layer3": "layer5"}} or [("layer3", "layer5")]'
        )
    for names in pair:
        if not all(isinstance(name, str) for name in _names(names)):
            raise TypeError(
                f"layers are given by their names in named_modules(), or tuples of names, got "
                f"{names!r}"
            )
    student, teacher = (tuple(x) if isinstance(x, list) else x for x in pair)
    return student, teacher


def _names(layers: Any) -> Sequence[Any]:
    return layers if isinstance(layers, (tuple, list)) else (layers,)


def _of_layers(outputs: Mapping[str, Any], layers: Layers) -> Any:
    """Return the output of a layer, or of a tuple of layers."""
    return outputs[layers] if isinstance(layers, str) else tuple(outputs[x] for x in layers)


# ---------------------------------------------------------------------------------- names of layers


def _unwrapped(network: nn.Module) -> nn.Module:
    """Return the network inside torch.compile's and DistributedDataParallel's modules."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"a network must be a torch.nn.Module, got {type(network).__name__}")
    while True:
        children = dict(network.named_children())
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = children["module"]
        elif [*children] == ["_orig_mod"]:
            network = children["_orig_mod"]
        else:
            return network


def _cleaned(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by name; of a wrapper and what is in it the wrapper, which runs around."""
    layers: dict[str, nn.Module] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        layers.setdefault(_cleaned(name), module)
    return layers


def _named(name: str, layers: Mapping[str, nn.Module], side: str) -> nn.Module:
    cleaned = _cleaned(name)
    for candidate in (cleaned, cleaned.removeprefix("module."), f"module.{cleaned}"):
        if candidate in layers:
            return layers[candidate]
    near = difflib.get_close_matches(cleaned, layers, n=3, cutoff=0.4)
    way = f"near it are {', '.join(map(repr, near))}" if near else "none is like it"
    raise ValueError(
        f"the {side} has no layer {name!r}; {way}. Names are those of {side}.named_modules()"
    )


# ---------------------------------------------------------------------------------------- outputs


def _selected(output: Any, select: Select, name: str) -> Any:
    """Return what of a layer's output is compared."""
    if callable(select):
        return select(output)
    if select is not None:
        return output[select]
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        has_keys = isinstance(output, Mapping)
        keys = f" with the keys {', '.join(map(str, output))}" if has_keys else ""
        raise TypeError(
            f"the layer {name!r} returns {type(output).__name__}{keys} and no tensor: say by "
            "select= which, an index, a key or a function of the output"
        )
    return output


def _is_in_backward() -> bool:
    """Return whether a checkpointed forward is computed again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return tree_map_only(Tensor, Tensor.detach, output)


def _warn_of_no_gradient(outputs: Mapping[str, Any]) -> None:
    for name, output in outputs.items():
        if isinstance(output, Tensor) and not output.requires_grad:
            _warn_once(name)


@functools.cache
def _warn_once(name: str) -> None:
    warnings.warn(
        f"the student's layer {name!r} has no gradient, so that its pair trains nothing in the "
        "student: it is frozen, ran under torch.no_grad(), or inside reentrant checkpointing, "
        "where use_reentrant=False is the cure",
        UserWarning,
        stacklevel=5,
    )
