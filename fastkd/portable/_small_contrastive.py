"""Contrastive losses of few examples, whose calls cost more than their memory: value and gradients.

The matrix S of similarities is kept. The fewest calls of PyTorch turn it, in place, into the slopes
G of the loss in it, and with dQ = scale · G K and dK = scale · Gᵀ Q all is ready for the backward.
Exponentials are powers of 2, which are the quickest, and need no maxima where S has bounds.
Infinities are not cared for: they show in the loss, and the caller then goes another way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import _engine
from fastkd._pairs import Number, is_number
from fastkd.portable._similarities import LARGEST, LEAST, of_lengths, units

_LN2 = math.log(2)
_MOST = 1e37  # of powers: the reciprocal of more may be flushed to 0
_MOST_CLASSES = 1 << 24  # that float32 tells apart


class _Slopes(NamedTuple):
    loss: Tensor
    matrix: Tensor  # times `factor` the slopes in S, of one kind G + Gᵀ; if it is trained
    factor: float


class _Contrast(NamedTuple):
    slopes: Callable[[Tensor, float, bool], _Slopes | None]  # of S in bits, its bound, is_trained
    normalize: bool = True
    is_inverse: bool = True  # the number is a temperature, not a scale
    bank: Tensor | None = None  # keys after the others, that get no gradient


# ------------------------------------------------------------------------------------- the losses


def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: Number,
    negative_weight: Number,
    normalize: bool,
    symmetric: bool,
    margin: Number,
    decoupled: bool,
    in_batch_negatives: bool,
) -> Tensor | None:
    if decoupled or not in_batch_negatives or (symmetric and negatives is not None):
        return None
    if not (is_number(margin, 0) and is_number(negative_weight, 1)):
        return None
    if negatives is not None and _engine.is_differentiated(negatives):
        key, negatives = torch.cat([key, negatives]), None
    slopes = _found_both_ways if symmetric else _found
    return _loss(_Contrast(slopes, normalize, bank=negatives), query, key, temperature)


def clip_contrastive(
    image: Tensor, text: Tensor, logit_scale: Number, logit_bias: Number | None = None
) -> Tensor | None:
    if isinstance(logit_bias, Tensor):
        return None
    return _loss(_Contrast(_found_both_ways, False, False), image, text, logit_scale)


def siglip(image: Tensor, text: Tensor, logit_scale: Number, logit_bias: Number) -> Tensor | None:
    return _loss(_Contrast(_told_apart, False, False), image, text, logit_scale, logit_bias)


def nt_xent(view1: Tensor, view2: Tensor, *, temperature: Number) -> Tensor | None:
    return _loss(_Contrast(_found_each_other), torch.cat([view1, view2]), None, temperature)


def sup_con(
    features: Tensor, labels: Tensor, *, temperature: Number, anchors: str
) -> Tensor | None:
    slopes = functools.partial(_attracted, labels=labels, anchors=anchors)
    return _loss(_Contrast(slopes), features, None, temperature)


# ------------------------------------------------------------------------------ from S to slopes


def _found(s: Tensor, bound: float, is_trained: bool) -> _Slopes | None:
    """Each query finds its key in its row."""
    own = s.diagonal()
    if not _are_powers(s, own, bound):
        return None
    sums = s.sum(1)
    loss = (sums / own).log_().mean()
    if is_trained:
        s.div_(sums.unsqueeze(1))
        own.sub_(1)
    return _Slopes(loss, s, 1 / len(s))


def _found_both_ways(s: Tensor, bound: float, is_trained: bool) -> _Slopes | None:
    """And each key its query in its column."""
    own = s.diagonal()
    if not _are_powers(s, own, bound):
        return None
    rows, columns, factor = s.sum(1), s.sum(0), 0.5 / len(s)
    if bound == math.inf and not rows.sum().item() < _MOST:
        return None
    loss = (rows / own).mul_(columns / own).log_().sum().mul_(factor)
    if is_trained:
        s.mul_(rows.reciprocal_().unsqueeze(1) + columns.reciprocal_())
        own.sub_(2)
    return _Slopes(loss, s, factor)


def _found_each_other(s: Tensor, bound: float, is_trained: bool) -> _Slopes | None:
    """Of two views each the other, in a matrix that is symmetric.

    The pairs are left out of the sums: where they are nearly all no digits are lost, as
    −log p = log1p(others / own).
    """
    n = len(s)
    # the pairs (i, i + n/2) and (i + n/2, i)
    pairs = s.as_strided((2, n // 2), (n * n // 2 - n // 2, n + 1), n // 2)
    if not _are_powers(s, pairs, bound):
        return None
    own = pairs.flatten()
    pairs.zero_()
    others = s.fill_diagonal_(0).sum(1)
    loss = (others / own).log1p_().mean()
    if is_trained:
        factors = own.add_(others).reciprocal_()
        s.mul_(factors.unsqueeze(1) + factors)
        pairs.sub_(others.mul_(factors).view(2, -1).sum(0))
    return _Slopes(loss, s, 1 / n)


def _are_powers(s: Tensor, own: Tensor, bound: float) -> bool:
    """2^S in place, and whether nothing that counts was flushed to 0; an overflow shows itself."""
    if LARGEST < bound < math.inf:
        s.sub_(own.amax())
    s.exp2_()
    return bound <= LARGEST or own.amin().item() > LEAST


def _told_apart(s: Tensor, bound: float, is_trained: bool) -> _Slopes:
    """Each pair by itself: softplus(S), of own pairs softplus(−S)."""
    own = s.diagonal()
    own.neg_()
    e = s.exp2_()
    scratch = torch.log1p(e)
    loss = scratch.sum().div_(len(s))
    if is_trained:
        e.div_(torch.add(e, 1, out=scratch))
        own.neg_()
    return _Slopes(loss, e, 1 / len(s))


def _attracted(
    s: Tensor, bound: float, is_trained: bool, *, labels: Tensor, anchors: str
) -> _Slopes | None:
    """Each example finds those of its class."""
    labels = labels.to(s.dtype)
    if bound > LARGEST or labels.abs().amax().item() >= _MOST_CLASSES:
        return None
    # booleans and their sums take far longer
    alike = torch.eq(labels.unsqueeze(1), labels, out=torch.empty_like(s)).fill_diagonal_(0)
    n_alike = alike.sum(1)
    is_anchor, share = n_alike.clamp(max=1), n_alike.clamp(min=1).reciprocal_()
    near = torch.linalg.vecdot(alike, s).mul_(share)
    e = s.exp2_().fill_diagonal_(0)
    sums = e.sum(1)
    n_anchors = max(is_anchor.sum().item(), 1) if anchors == "with_positive" else len(s)
    loss = sums.log().sub_(near, alpha=_LN2).mul_(is_anchor).sum().div_(n_anchors)
    if is_trained:
        factors = is_anchor.div_(sums)
        e.mul_(factors.unsqueeze(1) + factors).addcmul_(alike, share.unsqueeze(1), value=-2)
    return _Slopes(loss, e, 1 / n_anchors)


# ------------------------------------------------------------------------- from slopes to gradients


def _loss(
    contrast: _Contrast,
    query: Tensor,
    key: Tensor | None,
    number: Number,
    bias: Number | None = None,
) -> Tensor | None:
    """One number; None if it is not finite."""
    if torch.is_grad_enabled():
        trained = (query, key, number, bias)
        if any(isinstance(x, Tensor) and x.requires_grad for x in trained):
            # what `apply` does without torch.func
            function: Any = super(torch.autograd.Function, Contrastive)
            return function.apply(contrast, *trained)
    found = _computed(contrast, (False,) * 4, query, key, number, bias)
    return None if found is None else found[0]


class Contrastive(torch.autograd.Function):
    """Its name is that of the engine's: it is in the graph of a loss."""

    @staticmethod
    def forward(ctx: Any, contrast: _Contrast, *arguments: Any) -> Tensor | None:
        wanted = ctx.needs_input_grad[1:]
        found = _computed(contrast, wanted, *arguments)
        if found is None:
            return None
        loss, gradients = found
        # what is trained, since autograd then notices if it is overwritten
        trained = [x if wanted[i] else None for i, x in enumerate(arguments)]
        ctx.save_for_backward(*gradients, *trained)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        _engine.refuse_batches(upstream)
        saved = ctx.saved_tensors
        found = [None if x is None else x * upstream for x in saved[:4]]
        if torch.is_grad_enabled():  # only under create_graph=True
            trained = [x for x in saved[4:] if x is not None]
            found = [None if x is None else _Constant.apply(x, *trained) for x in found]
        return None, *found


class _Constant(_engine.FirstOrder):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *trained: Tensor) -> Tensor:
        return gradient.clone()


def _computed(
    contrast: _Contrast,
    wanted: Sequence[bool],
    query: Tensor,
    key: Tensor | None,
    number: Number,
    bias: Number | None,
) -> tuple[Tensor, list[Tensor | None]] | None:
    """The loss, and the gradients of what is wanted of query, key, number and bias."""
    scale = number.item() if isinstance(number, Tensor) else float(number)
    if contrast.is_inverse:
        scale = 1 / scale if scale else math.inf
    # a product with a factor that is no number may be one
    if not scale or not math.isfinite(scale):
        return None
    normalize, bank = contrast.normalize, contrast.bank
    q, q_lengths = units(query, normalize)
    k, k_lengths = (q, q_lengths) if key is None else units(key, normalize)
    keys = k if bank is None else torch.cat((k, units(bank, normalize)[0]))
    added: Any = bias
    share = 1 / _LN2
    if bias is None:  # a factor of 0 ignores what it multiplies
        added, share = keys.new_empty(()), 0.0
    elif not isinstance(bias, Tensor):
        added = keys.new_full((), bias)
    elif bias.dtype != keys.dtype:  # a whole number
        added = bias.to(keys.dtype)
    s = torch.addmm(added, q, keys.T, beta=share, alpha=scale / _LN2)
    slopes = contrast.slopes(s, abs(scale) if normalize else math.inf, any(wanted))
    if slopes is None or not math.isfinite(slopes.loss.item()):
        return None
    loss, g, factor = slopes
    of_query, of_key, of_number, of_bias = wanted
    found: list[Tensor | None] = [None] * 4
    if of_query or of_number:
        found[0], along = _gradient(q, q_lengths, g, keys, scale * factor, of_scale=of_number)
        if along is not None:  # in G + Gᵀ each pair counts twice
            slope = -scale if contrast.is_inverse else 1 / scale
            found[2] = along.mul_(slope / 2 if key is None else slope)
    if of_key:
        found[1], _ = _gradient(k, k_lengths, g[:, : len(k)].T, q, scale * factor)
    if of_bias:
        found[3] = g.sum().mul_(factor)
    return loss, found


def _gradient(
    rows: Tensor,
    lengths: Tensor | None,
    g: Tensor,
    others: Tensor,
    scale: float,
    of_scale: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """In the rows, and what adds up to that in the logarithm of the scale, if it is wanted."""
    sums = torch.addmm(rows, g, others, beta=0, alpha=scale)
    along = torch.linalg.vecdot(sums, rows).sum() if of_scale else None
    return of_lengths(sums, rows, lengths), along
