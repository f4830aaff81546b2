"""The base of all losses as modules: options that are attributes, groups that copies share."""

from __future__ import annotations

import difflib
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import _option_checks
from fastkd._loss import Loss

_OF_A_MODULE = ("center", "variance_parameter")  # parameters that a module keeps as its state


class LossModule(nn.Module):
    """A loss as a module, whose subclass names its function.

    ``class KDLoss(LossModule, function=kd)`` is all that a loss without state of its own needs.
    """

    function: Any  # a Loss
    # keyword parameters that belong to a batch
    of_a_batch: tuple[str, ...] = ("labels", "mask", "weights", "normalizer")
    defaults: dict[str, Any]
    empty_shape: tuple[int, ...] = (0, 1)  # of a tensor of no examples

    def __init_subclass__(cls, function: Loss[..., Any] | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if function is None:  # a user's subclass of a loss
            return
        parameters = inspect.signature(function).parameters.values()
        by_name = (p for p in parameters if p.kind is p.KEYWORD_ONLY)
        options = [p for p in by_name if p.name not in cls.of_a_batch]
        cls.function = staticmethod(function)
        cls.defaults = {p.name: p.default for p in options}
        batch = [p for p in parameters if p not in options and p.name not in _OF_A_MODULE]
        _, *own = inspect.signature(cls.__init__).parameters.values()
        own = [p for p in own if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        at_construction = sorted(options + own, key=lambda p: p.kind)  # positional ones first
        cls.__init__ = _with_signature(cls.__init__, at_construction)  # type: ignore[method-assign]
        cls.forward = _with_signature(cls.forward, batch)  # type: ignore[method-assign]

    def __init__(self, *misplaced: Any, **options: Any) -> None:
        """Keep the options of the function, which raises TypeError or ValueError for wrong ones."""
        super().__init__()
        name = type(self).__name__
        if misplaced:
            raise TypeError(
                f"{name} takes its options by name, got {misplaced[0]!r} without one: write "
                f"{name}(option=value) with an option of {', '.join(self.defaults) or 'none'}"
            )
        _option_checks.options(options, self.defaults, name)
        if options.get("group", self) is None:
            _warn_of_no_group(name)
        options = self.defaults | options
        self._check_options(options)
        for option, value in options.items():
            self._keep(option, value)

    def forward(self, *tensors: Any, **of_a_batch: Any) -> Any:
        """Return the loss of the function with these options."""
        if of_a_batch:
            self._refuse_options(of_a_batch)
        return self.function(*tensors, **of_a_batch, **self._options())

    @property
    def options(self) -> Mapping[str, Any]:
        """Return the options with their values, to be read; they are set as attributes."""
        return types.MappingProxyType(self._options())

    def extra_repr(self) -> str:
        options = self._options().items()
        shown = {k: v.detach() if isinstance(v, Tensor) else v for k, v in options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.defaults}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.defaults:
            self._check_options(self._options() | {name: value})
            self._keep(name, value)
        else:
            if (
                type(self).__module__.startswith("fastkd.")
                and name[0] != "_"
                and not hasattr(self, name)
            ):
                self._refuse_misspelt(name)
            super().__setattr__(name, value)

    def _keep(self, name: str, value: Any) -> None:
        """Make an option an attribute: a parameter, a buffer, or as it is."""
        for kept in (self.__dict__, self._parameters, self._buffers):
            kept.pop(name, None)
        self._non_persistent_buffers_set.discard(name)
        # what requires grad and is no parameter belongs to somebody else
        is_buffer = isinstance(value, Tensor) and not value.requires_grad
        if is_buffer and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value, persistent=False)
        else:
            super().__setattr__(name, value)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Let the function check options now, on an empty batch, not in the first step."""
        numbers = [option for option in options.values() if isinstance(option, Tensor)]
        empty = torch.empty(self.empty_shape, device=numbers[0].device if numbers else "cpu")
        needed = [
            p.name
            for p in inspect.signature(self.function).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD and self._is_in_empty_batch(p, options)
        ]
        batch = {name: self._of_empty_batch(name, empty, options) for name in needed}
        self.function.check(batch, options)

    def _of_empty_batch(self, name: str, empty: Tensor, options: Mapping[str, Any]) -> Any:
        """Return what stands for a parameter of the function where its options are checked."""
        if name == "labels":
            return empty.new_empty(0, dtype=torch.int64)
        if name.endswith("ids"):  # one entry of the one that the empty logits have
            return empty.new_zeros((1, 1) if name == "ids" else 1, dtype=torch.int64)
        return 1.0 if name in ("logit_scale", "logit_bias") else empty

    def _is_in_empty_batch(self, parameter: inspect.Parameter, options: Mapping[str, Any]) -> bool:
        """Return whether options are checked with a tensor for this parameter of the function."""
        return parameter.default is parameter.empty or parameter.name == "labels"

    def _refuse_options(self, of_a_batch: Mapping[str, Any]) -> None:
        for name in of_a_batch:
            if name in self.defaults:
                raise TypeError(
                    f"{name} is an option of the module and not of a call: set it before, "
                    f"loss.{name} = {of_a_batch[name]!r}, or at construction"
                )

    def _refuse_misspelt(self, name: str) -> None:
        if name in inspect.signature(self.function).parameters:
            raise AttributeError(
                f"{name} belongs to a batch and is no option of {type(self).__name__}, which would "
                f"not read it: pass it at the call, as loss(..., {name}={name})"
            )
        known = inspect.signature(type(self)).parameters
        option = next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), name)
        if option != name:
            raise AttributeError(
                f"{type(self).__name__} has no option {name!r}; did you mean {option!r}?"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        group = state.get("group")  # an option, or a module's own
        if not isinstance(group, (str, types.NoneType)):
            state["group"] = _Shared(group)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        group = state.get("group")
        if isinstance(group, _Shared):
            state = {**state, "group": group.group}
        super().__setstate__(state)


class _Shared:
    """A process group on its way into a copy, which shares it, or into a pickle, as its name."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self

    def __reduce__(self) -> Any:
        is_world = self.group is torch.distributed.group.WORLD
        return str, ("world" if is_world else self.group.group_name,)


def _warn_of_no_group(loss: str) -> None:
    """Warn of a group None that may be a world which is not initialised yet."""
    if torch.distributed.is_available() and not torch.distributed.is_initialized():
        warnings.warn(
            f"{loss} got group=None, as torch.distributed.group.WORLD is before "
            'init_process_group, and will see this process alone: pass group="world" for all '
            "ranks, or leave group out",
            UserWarning,
            stacklevel=4,
        )


def _with_signature(method: Callable, parameters: Iterable[inspect.Parameter]) -> Callable:
    """Return the method with a signature of these parameters, for help() and inspect."""

    @functools.wraps(method)
    def same(self: LossModule, *arguments: Any, **options: Any) -> Any:
        return method(self, *arguments, **options)

    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    same.__signature__ = inspect.Signature([me, *parameters])  # type: ignore[attr-defined]
    return same
