"""The centre of a teacher's outputs, which losses of self-distillation keep as their state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fastkd import _option_checks
from fastkd._module import LossModule
from fastkd._op import Number
from fastkd._ranks import Ranks
from fastkd._reduction import selected
from fastkd.problems._patches import places_of
from fastkd.self_distillation import sinkhorn_center

CENTERINGS = ("mean", "sinkhorn")


class CentredLoss(LossModule):
    """A loss whose centre c [K] is a buffer: a moving mean, or what a batch makes of it.

    Args:
        n_prototypes: K, the length of the centre, which is saved with the state.
        center_momentum: m in [0, 1] of the moving mean m c + (1 − m) mean t.
        centering: "mean", or "sinkhorn" for the centre that `fastkd.sinkhorn_center` makes of the
            call's own outputs.
        sinkhorn_iterations: How many iterations it makes.
        options: Those of the function.
    """

    center: Tensor
    group: Any = None

    def __init__(
        self,
        n_prototypes: int,
        *misplaced: Any,
        center_momentum: float = 0.9,
        centering: str = "mean",
        sinkhorn_iterations: int = 3,
        **options: Any,
    ) -> None:
        _option_checks.at_least_1(n_prototypes=n_prototypes)
        super().__init__(*misplaced, **options)
        self.center_momentum = center_momentum
        self.centering = centering
        self.sinkhorn_iterations = sinkhorn_iterations
        self.register_buffer("center", _in_float32_or_wider(torch.zeros(n_prototypes)))

    @property
    def center_momentum(self) -> float:
        """Return m, which may be set, for example by a schedule."""
        return self._center_momentum

    @center_momentum.setter
    def center_momentum(self, value: float) -> None:
        _option_checks.fraction(center_momentum=value)
        self._center_momentum = value

    @property
    def centering(self) -> str:
        """Return "mean" or "sinkhorn", which may be set."""
        return self._centering

    @centering.setter
    def centering(self, value: str) -> None:
        _option_checks.one_of(CENTERINGS, centering=value)
        self._centering = value

    @property
    def sinkhorn_iterations(self) -> int:
        """Return the number of iterations, which may be set."""
        return self._sinkhorn_iterations

    @sinkhorn_iterations.setter
    def sinkhorn_iterations(self, value: int) -> None:
        _option_checks.at_least_1(sinkhorn_iterations=value)
        self._sinkhorn_iterations = value

    def _check_batch(self, **batch: Any) -> None:
        """Raise the errors of the function for a batch of which a centre is to be made first."""
        self.function.check(batch, self._options())

    def _sinkhorn_center(self, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the centre that the outputs (..., K) of a call have by themselves."""
        return sinkhorn_center(
            teacher,
            mask,
            teacher_temperature=cast(Number, self.teacher_temperature),
            n_iterations=self.sinkhorn_iterations,
            group=self.group,
        )

    @torch.no_grad()
    def _follow(self, teacher: Tensor, center: Tensor, mask: Tensor | None = None) -> None:
        """Keep the centre of a call, or move the mean towards its outputs (..., K)."""
        if self.centering == "mean":
            center = _in_float32_or_wider(center)
            outputs, n = _counted(teacher, mask)
            total = torch.cat([outputs.sum(0, dtype=center.dtype), n.to(center)])
            total = Ranks.of(self.group).sum(total)
            count = total[-1:]
            rate = (1 - self.center_momentum) * count.clamp(max=1)  # 0 outputs move nothing
            center = center.lerp(total[:-1] / count.clamp(min=1), rate)
        if center.dtype == self.center.dtype:
            self.center.copy_(center)
        else:  # what loads states may have made it narrower
            self.center = center

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CentredLoss:
        """Move the module, whose centre stays at least float32: a mean of many steps needs that."""
        center = self.center
        super()._apply(fn, recurse)
        if self.center.dtype.itemsize < 4:
            self.center = _in_float32_or_wider(center).to(self.center.device)
        return self

    def extra_repr(self) -> str:
        own = f"n_prototypes={len(self.center)}, center_momentum={self.center_momentum}"
        if self.centering != "mean":
            own += f", centering={self.centering!r}, sinkhorn_iterations={self.sinkhorn_iterations}"
        return f"{own}, {super().extra_repr()}"


def _counted(teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the outputs [n, K] that count, or 0 in place of others, and how many count, [1]."""
    if mask is None:
        outputs = teacher.flatten(0, -2)
        return outputs, outputs.new_full((1,), len(outputs), dtype=torch.int64)
    places = places_of(mask)
    outputs = selected(teacher, mask) if places is None else teacher
    outputs = outputs.flatten(0, -2)
    return outputs if places is None else outputs[places], mask.sum().view(1)


def _in_float32_or_wider(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
