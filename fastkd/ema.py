"""A teacher that is the moving average of its student."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

BUFFERS = ("copy", "average")
# what wraps a module puts its own name between those of the module and of its parameters
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


class EMATeacher(nn.Module):
    """A copy of a network whose parameters follow: teacher = d · teacher + (1 − d) · student.

    The copy is in eval mode, whatever mode the module around it gets, its parameters require no
    gradient, and a call is made under torch.no_grad. The network may be wrapped by
    DistributedDataParallel or torch.compile. One that `fully_shard` is to shard is averaged as well
    if it is copied before, and the copy is sharded in the same way:

        teacher = fastkd.EMATeacher(model, decay=fastkd.schedules.cosine(0.996, 1.0, steps))
        for network in (model, teacher.module):
            fully_shard(network)
        for images in batches:
            loss = criterion(model(images), teacher(images))
            ...  # backward and a step of the optimizer
            teacher.update(model)

    The state has the parameters, the buffers and the number of steps, so that training goes on from
    a checkpoint with the same bits. Averages in half precision stand still, because a change of one
    thousandth is rounded away: ``EMATeacher(model).float()`` keeps them in float32.

    Args:
        module: The network.
        decay: d in [0, 1], or a schedule of it: a function of the number of updates before, such as
            `fastkd.schedules.cosine`. An attribute, which can be set.
        buffers: Whether `update` copies the network's buffers, such as the statistics of batch
            normalisation ("copy", as timm and torch.optim.swa_utils do), or averages those with
            floating-point numbers ("average"). Others are copied in any case.

    Raises:
        TypeError: The module is no nn.Module, or one that cannot be copied; decay is no number.
        ValueError: The decay is not in [0, 1], or buffers is unknown.

    Reference:
        Tarvainen and Valpola, Mean Teachers are Better Role Models, 2017. arXiv:1703.01780
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float | Callable[[int], float] = 0.999,
        *,
        buffers: str = "copy",
    ) -> None:
        super().__init__()
        if buffers not in BUFFERS:
            raise ValueError(f'buffers must be "copy" or "average", got {buffers!r}')
        self.buffers_are = buffers
        self.decay = decay
        self.step = 0  # the number of updates
        self.module = _copy_of(_unwrapped(module)).requires_grad_(False).eval()

    @property
    def decay(self) -> float | Callable[[int], float]:
        """Return d, or the schedule of it; either may be set."""
        return self._decay

    @decay.setter
    def decay(self, value: float | Callable[[int], float]) -> None:
        self._decay = value if callable(value) else _checked(value)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return what the averaged network makes of the inputs, without a gradient."""
        with torch.no_grad():
            return self.module(*inputs, **options)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the network, after a step of its optimizer.

        Args:
            module: The network, wrapped or not. It has the parameters and the buffers that it had
                when it was copied.

        Raises:
            TypeError: The module is no nn.Module.
            ValueError: It has other parameters or buffers than the copy, or the decay of this step
                is not in [0, 1].
        """
        student, teacher = _unwrapped(module), self.module
        decay = _checked(self._decay(self.step)) if callable(self._decay) else self._decay
        for network in (student, teacher):
            _reshard(network)
        pairs = _pairs("parameter", teacher.named_parameters(), student.named_parameters())
        copied = _pairs("buffer", teacher.named_buffers(), student.named_buffers())
        if self.buffers_are == "average":
            pairs, copied = pairs + copied, []
        averaged: list[tuple[Tensor, Tensor]] = []
        for pair in pairs:
            has_mean = pair[0].is_floating_point() or pair[0].is_complex()
            (averaged if has_mean else copied).append(pair)
        if averaged:
            torch._foreach_lerp_([x for x, _ in averaged], [x for _, x in averaged], 1 - decay)
        if copied:
            torch._foreach_copy_([x for x, _ in copied], [x for _, x in copied])
        self.step += 1

    def train(self, mode: bool = True) -> EMATeacher:
        """Set the mode of this module alone: the copy stays in eval mode."""
        super().train(mode)
        self.module.eval()
        return self

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)

    def extra_repr(self) -> str:
        return f"decay={self._decay!r}, buffers={self.buffers_are!r}, step={self.step}"


def _checked(decay: Any) -> float:
    """Return the decay, or raise an error if it is no number in [0, 1]."""
    if not isinstance(decay, (int, float)):
        raise TypeError(
            "decay must be a number in [0, 1] or a schedule, a function of the number of updates "
            f"that returns one, got {type(decay).__name__}"
        )
    if not 0 <= decay <= 1:  # which a NaN is not either
        raise ValueError(
            f"decay must be a number in [0, 1], got {decay!r}: 1 keeps the teacher as it is, and 0 "
            "makes it the student"
        )
    return decay


def _unwrapped(module: Any) -> nn.Module:
    """Return the network inside of what torch.compile and DistributedDataParallel made of it."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    while True:
        if "_orig_mod" in module._modules:  # torch.compile's, without an import of its modules
            module = module._orig_mod
        elif isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        else:
            return module


def _copy_of(module: nn.Module) -> nn.Module:
    if any(map(_is_sharded, module.modules())):
        raise TypeError(
            "module is sharded by fully_shard, and such a network cannot be copied: make the "
            "EMATeacher of it first, and call fully_shard on the network and on teacher.module"
        )
    return copy.deepcopy(module)


def _is_sharded(module: nn.Module) -> bool:
    """Return whether `fully_shard` has made the module one of its own."""
    return any(x.__name__ == "FSDPModule" for x in type(module).__mro__)


def _reshard(network: nn.Module) -> None:
    """Let a sharded network have its shards as parameters, also after a call without backward."""
    for module in network.modules():
        if _is_sharded(module):
            module.reshard()  # type: ignore[operator]


def _pairs(
    kind: str, teacher: Iterable[tuple[str, Tensor]], student: Iterable[tuple[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of both networks by their names, on each rank its shards of them.

    A student's is moved to the device and the dtype of the teacher's.
    """
    of_teacher, of_student = _by_name(teacher), _by_name(student)
    if of_teacher.keys() != of_student.keys():
        name = min(of_teacher.keys() ^ of_student.keys())
        who = "the copy" if name in of_teacher else "the module"
        raise ValueError(
            f"module needs the {kind}s that it had when it was copied, got {len(of_student)} "
            f"{kind}s for {len(of_teacher)}, and {name!r} in {who} alone: make a new EMATeacher"
        )
    pairs = []
    for name, average in of_teacher.items():
        new = of_student[name]
        if average.shape != new.shape or _placed(average) != _placed(new):
            raise ValueError(
                f"the {kind} {name!r} needs the shape and the shards that it has in the copy, "
                f"{[*average.shape]} and {_placed(average) or 'none'}, got {[*new.shape]} and "
                f"{_placed(new) or 'none'}: shard both networks in the same way, or make a new "
                "EMATeacher"
            )
        average, new = _local(average), _local(new)
        pairs.append((average, new.to(average)))
    return pairs


def _by_name(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors by their names without those of wrappers."""
    found = {}
    for name, tensor in tensors:
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        found[name] = tensor
    return found


def _placed(tensor: Tensor) -> Any:
    """Return where the parts of a DTensor are, or None of another tensor."""
    return getattr(tensor, "placements", None)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, in its own memory, or another tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
