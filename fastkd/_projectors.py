"""Projectors and resizing, which bring features to the width and the size of the other network."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import _checks
from fastkd.problems import _maps as maps

RESIZES = ("pool", "interpolate")
_INTERPOLATIONS = ("linear", "bilinear", "trilinear")  # for one, two and three dimensions


class Pointwise(nn.Linear):
    """A linear layer of the features of each position, in whichever dimension they lie."""

    def forward(self, features: Tensor, dim: int = -1) -> Tensor:
        """Return features with `out_features` in the dimension `dim`."""
        if dim % features.ndim == features.ndim - 1:
            return super().forward(features)
        if dim % features.ndim != 1:
            return super().forward(features.movedim(dim, -1)).movedim(-1, dim)
        # a product from the left, so that maps are not transposed and copied
        found = self.weight @ features.flatten(2)
        if self.bias is not None:
            found = found + self.bias[:, None]
        return found.unflatten(2, features.shape[2:])


def _bottleneck(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 1), nn.ReLU(), nn.Conv2d(n_out, n_out, 1))


def _convolution(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out))


PROJECTORS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": Pointwise,
    "conv1x1": lambda n_in, n_out: nn.Conv2d(n_in, n_out, 1),
    "conv1x1-relu-conv1x1": _bottleneck,
    "conv3x3-bn": _convolution,
}


def projector(
    kind: str | nn.Module | None, n_in: int | None, n_out: int | None
) -> nn.Module | None:
    """Return the projector of a name, or the module itself; None where none is needed."""
    if isinstance(kind, nn.Module):
        return kind
    if kind is None:
        if n_in is None or n_out is None or n_in == n_out:
            return None
        kind = "linear"
    if not isinstance(kind, str) or kind not in PROJECTORS:
        names = ", ".join(f'"{name}"' for name in PROJECTORS)
        raise ValueError(f"projector must be {names}, a torch.nn.Module or None, got {kind!r}")
    if n_in is None or n_out is None:
        raise ValueError(
            f"projector={kind!r} needs student_channels and teacher_channels, got {n_in} and "
            f"{n_out}: name both widths, or pass a module"
        )
    return PROJECTORS[kind](n_in, n_out)


@torch.no_grad()
def freeze(module: nn.Module) -> None:
    """Make weights orthogonal, which distorts least of what is random, and take their gradients."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.orthogonal_(parameter)
        elif name.endswith("bias"):
            parameter.zero_()
        parameter.requires_grad_(False)


def project(module: nn.Module, features: Tensor, dim: int) -> Tensor:
    """Return projected features; modules but our own know themselves where features lie."""
    if isinstance(module, Pointwise):
        return module(features, dim)
    first = module
    while isinstance(first, nn.Sequential) and len(first):
        first = first[0]
    # it would take three dimensions for one map of one example
    if isinstance(first, nn.Conv2d) and (features.ndim != 4 or dim % 4 != 1):
        raise ValueError(
            "the projector is a convolution of maps [B, C, H, W], got features in dimension "
            f"{dim} of {_checks.shape(features)}: tokens [B, L, C] of a grid are maps by "
            '.mT.unflatten(-1, (H, W)), and a linear layer, as projector="linear" of '
            "fastkd.HintLoss is, takes others"
        )
    return module(features)


def check_width(features: Tensor, dim: int, width: int | None, side: str) -> None:
    if width is not None and features.shape[dim] != width:
        raise ValueError(
            f"the module was made for {side}_channels={width}, got {width_of(features, dim)}: make "
            f"it for this width, or name the dimension of the features by feature_dim="
        )


def width_of(features: Tensor, dim: int) -> str:
    return f"{features.shape[dim]} in dimension {dim} of {_checks.shape(features)}"


def of_one_size(
    student: Tensor, teacher: Tensor, feature: int, batch: int, resize: str | None
) -> tuple[Tensor, Tensor]:
    """Return both in one size of positions: the smaller one by averages, or the teacher's."""
    if resize is None or student.ndim != teacher.ndim:
        return student, teacher
    s, t = (x.movedim((batch, feature), (0, 1)) for x in (student, teacher))
    if s.shape[2:] == t.shape[2:]:
        return student, teacher
    if resize == "pool":
        s, t = maps.of_the_smaller_size(s, t)
    elif s.ndim > 5:
        raise ValueError(
            "features of more than three dimensions of positions are not interpolated, got "
            f'{_checks.shape(student)} and {_checks.shape(teacher)}: take resize="pool"'
        )
    else:
        s = F.interpolate(s, t.shape[2:], mode=_INTERPOLATIONS[s.ndim - 3])
    s, t = (x.movedim((0, 1), (batch, feature)) for x in (s, t))
    return s, t
