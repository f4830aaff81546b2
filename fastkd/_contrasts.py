"""What the engines of contrastive losses solve: queries against keys, one problem for all."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._engine import Engine, compute_dtype, is_differentiated
from fastkd._pairs import empty_gradients, empty_statistics


class Problem(NamedTuple):
    """Queries against keys: the arguments that every function of an engine of this family takes.

    With S = scale · Q Kᵀ, of rows divided by their lengths if `normalize`, and all sums without the
    own pairs the loss is, by its form,

    softplus  Σ_i w_i softplus(n_i − a_i)   n_i = log Σ_j exp S_ij
    linear    Σ_i w_i (n_i − a_i)
    pairs     Σ_i w_i Σ_j softplus(S_ij − a_i)

    and with anchors of keys, in the first two, the same over the columns of those keys besides.
    With classes it is linear, and r_i S_ij, which is r_j S_ij, is taken off for each pair of one.
    """

    query: Tensor  # [n, D]
    key: Tensor | None  # [M, D]; None: the queries
    scale: Tensor  # 0-dim
    anchors: Tensor  # a, [n]
    weights: Tensor  # w, [n]
    bank: Tensor | None  # [B, D], further keys, which get no gradient
    key_anchors: Tensor | None  # [N], of the first N keys
    key_weights: Tensor | None
    classes: Tensor | None  # [M], of all keys and, among them, of the queries' own; numbers
    attractions: Tensor | None  # r, [M], the same for all of a class
    form: str
    first: int  # the own pair of query i is key first + i; -1: it has none
    two_views: bool  # queries are two views of each example, own pairs those with the other too
    normalize: bool
    half: str  # "bfloat16" or "float16", if that holds all rows without rounding
    wanted: str  # of query, key, scale and anchors: what gets a gradient
    group: str  # the name of the process group over whose ranks columns are summed, or nothing

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return compute_dtype(self.query, self.query if self.key is None else self.key)

    def allocate(self) -> tuple[Tensor, Tensor]:
        """Empty: the loss, and all gradients in a row."""
        return empty_statistics(self.allocate_gradients(), self.dtype)

    def allocate_gradients(self) -> tuple[Tensor, ...]:
        """Empty, one for each trained tensor."""
        return empty_gradients(
            self.wanted, query=self.query, key=self.key, scale=self.scale, anchors=self.anchors
        )


_engine = Engine(
    "contrastive",
    tensors="Tensor query, Tensor? key, Tensor scale, Tensor anchors, Tensor weights, "
    "Tensor? bank, Tensor? key_anchors, Tensor? key_weights, Tensor? classes, "
    "Tensor? attractions",
    options="str form, int first, bool two_views, bool normalize, str half, str wanted, str group",
    n_trained=4,
)


def by_engine(
    engine: str,
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    anchors: Tensor,
    weights: Tensor,
    *,
    form: str,
    first: int,
    half: str,
    bank: Tensor | None = None,
    two_views: bool = False,
    normalize: bool = True,
    key_anchors: Tensor | None = None,
    classes: Tensor | None = None,
    attractions: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """The loss of the whole batch by an engine; with anchors of keys, half of it theirs."""
    key_weights = None
    if key_anchors is not None:
        key_weights = torch.full_like(key_anchors, 0.5 / len(key_anchors))
    if bank is not None and (bank is query or bank is key):  # the compiler refuses a tensor twice
        bank = bank.view_as(bank)
    if key is query:
        key = key.view_as(key)
    trained = {"query": query, "key": key, "scale": scale, "anchors": anchors}
    wanted = [name for name, x in trained.items() if x is not None and is_differentiated(x)]
    over = group.group_name if group is not None and key_anchors is not None else ""
    loss, _ = _engine(
        engine, query, key, scale, anchors, weights, bank, key_anchors, key_weights,
        classes, attractions,
        form, first, two_views, normalize, half, " ".join(wanted), over,
    )  # fmt: skip
    return loss


def means_of_classes(rows: Tensor, place: Tensor, n_alike: Tensor) -> Tensor:
    """Of each row's class: twice, since the sum of many rows that are alike is rounded often."""

    def of_class(rows: Tensor) -> Tensor:
        sums = torch.zeros_like(rows)
        if rows.is_cuda:  # index_add would add in any order
            sums = sums.index_put((place,), rows, accumulate=True)
        else:
            sums = sums.index_add(0, place, rows)
        return sums[place].div_(n_alike[:, None])

    means = of_class(rows)
    return means.add_(of_class(rows - means))


def places_of_classes(labels: Tensor) -> Tensor:
    """Classes numbered from 0, without waiting for their number."""
    ordered, order = labels.sort()
    is_new = ordered != ordered.roll(1)
    is_new[:1] = False
    return is_new.cumsum(0)[order.argsort()]
