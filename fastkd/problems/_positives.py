"""The positive pairs of contrasts, for engines that know negative pairs alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.problems.pairs import (
    IGNORED,
    LINEAR,
    SHORTEST,
    Gradients,
    Pairs,
    divisors,
    own_columns,
    units,
)

Solve = Callable[[Pairs, Sequence[bool]], tuple[Tensor, Gradients]]


def with_positives(solve_negatives: Solve) -> Solve:
    """Extend an engine that knows negative pairs alone to all problems.

    The engine takes positive logits of queries, and of keys if columns have a loss, as given. Their
    gradient becomes one in the embeddings here, as do the positive pairs of the form "pairs". All
    of it costs a few passes over [n, D], and no memory of that size.
    """

    def value_and_gradients(problem: Pairs, needs_grad: Sequence[bool]) -> tuple[Tensor, Gradients]:
        if problem.classes is not None and problem.positive_logits is None:
            return solve_negatives(
                problem._replace(positive_logits=means_over_classes(problem)), needs_grad
            )
        by_pairs = problem.form == "pairs"
        if problem.first < 0 or not (by_pairs or problem.positive_logits is None):
            return solve_negatives(problem, needs_grad)

        scale = problem.scale.to(problem.query.dtype)
        positives = _positives(problem)
        positive = positives.cosines * scale
        if by_pairs:
            loss, gradients = solve_negatives(problem, needs_grad)
            assert problem.positive_logits is not None
            odds = positive - problem.positive_logits.to(scale.dtype)
            weights = problem.weights.to(scale.dtype)
            loss = loss + F.softplus(-odds, threshold=LINEAR) @ weights
            of_pairs = torch.sigmoid(-odds) * -weights
            slopes: Tensor | None = of_pairs
            of_logits = None if gradients[3] is None else gradients[3] - of_pairs
        else:
            given = problem._replace(
                positive_logits=positive,
                key_positive_logits=None if problem.key_weights is None else positive,
            )
            needs_slopes = any(needs_grad[:3])
            loss, gradients = solve_negatives(given, (*needs_grad[:3], needs_slopes, False))
            of_logits, slopes = None, gradients[3]
        if slopes is not None and any(needs_grad[:3]):
            _add_positive_pairs(problem, gradients, slopes, positives)
        return loss, (*gradients[:3], of_logits, None)

    return value_and_gradients


class _Positives(NamedTuple):
    """The pairs of queries with their positive keys, in blocks of rows that lie side by side."""

    blocks: list[tuple[slice, slice]]  # queries, and the keys of those
    q_lengths: Tensor  # [n], 1 if rows are not normalised
    k_lengths: Tensor  # [n], of the positive keys
    cosines: Tensor  # [n], or products if rows are not normalised


def _positives(problem: Pairs) -> _Positives:
    """Find the positive pairs and their cosines without a copy of the embeddings."""
    query, first, n = problem.query, problem.first, len(problem.query)
    keys, half = query if problem.key is None else problem.key, n // 2
    blocks = [(slice(0, n), slice(first, first + n))]
    if problem.two_views:
        blocks = [
            (slice(0, half), slice(first + half, first + n)),
            (slice(half, n), slice(first, first + half)),
        ]
    products = [torch.linalg.vecdot(query[rows], keys[columns]) for rows, columns in blocks]
    cosines = torch.cat(products)
    q_lengths = k_lengths = torch.ones_like(cosines)
    if problem.normalize:
        q_lengths, k_lengths = (
            torch.linalg.vector_norm(x, dim=1).clamp_(min=SHORTEST)
            for x in (query, keys[own_columns(problem)])
        )
        k_lengths = k_lengths.roll(half) if problem.two_views else k_lengths
        cosines.div_(q_lengths * k_lengths)
    return _Positives(blocks, q_lengths, k_lengths, cosines)


def _add_positive_pairs(
    problem: Pairs, gradients: Gradients, slopes: Tensor, positives: _Positives
) -> None:
    """Add the gradients of the positive pairs, in place, from the slopes in their similarities.

    The gradient of a cosine in q is (k / ‖k‖ − cos · q / ‖q‖) / ‖q‖, and the same in k.
    """
    of_query, of_key, of_scale = gradients[:3]
    blocks, q_lengths, k_lengths, cosines = positives
    if of_scale is not None:
        of_scale += slopes @ cosines
    slopes = slopes * problem.scale.to(slopes.dtype)
    of_q, of_k = divisors(q_lengths), divisors(k_lengths)
    across_q, across_k = slopes / (of_q * k_lengths), slopes / (q_lengths * of_k)
    along_q, along_k = (-slopes * cosines / x.square() for x in (of_q, of_k))
    keys, of_keys = problem.key, of_key
    if keys is None:
        keys, of_keys = problem.query, of_query

    def add(gradient: Tensor, other: Tensor, across: Tensor, own: Tensor, along: Tensor) -> None:
        gradient.addcmul_(other, across[:, None])
        if problem.normalize:
            gradient.addcmul_(own, along[:, None])

    for rows, columns in blocks:
        q, k = problem.query[rows], keys[columns]
        if of_query is not None:
            add(of_query[rows], k, across_q[rows], q, along_q[rows])
        if of_keys is not None:
            add(of_keys[columns], q, across_k[rows], k, along_k[rows])


# ---------------------------------------------------------------------------------------- classes


def with_attractions(problem: Pairs) -> Pairs:
    """Return a problem with numbers in place of labels, attractions, and weights that heed both."""
    classes, labels = problem.classes, problem.query_classes
    if classes is None or labels is None or problem.attractions is not None:
        return problem
    numbers, query_numbers, n_positives = numbers_of_classes(classes, labels, problem.scale.dtype)
    if problem.first >= 0:
        n_positives.sub_(1)
    n_positives.mul_(labels != IGNORED)
    factors = n_positives.clamp(max=1) * problem.weights.to(n_positives.dtype)
    if problem.over_anchors:
        factors = factors / factors.sum().clamp(min=torch.finfo(factors.dtype).tiny)
    return problem._replace(
        classes=numbers, query_classes=query_numbers, weights=factors,
        attractions=factors / n_positives.clamp(min=1),
    )  # fmt: skip


def numbers_of_classes(
    key_labels: Tensor, labels: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers of the classes of keys and of queries, and how many keys each query's has.

    The number of a class, found without a host sync, is the place of its first label among those of
    all keys in order. A query without a key of its class gets the number of another one.
    """
    ordered = key_labels.sort()[0]
    place = torch.searchsorted(ordered, labels)
    n_alike = torch.searchsorted(ordered, labels, right=True).sub_(place).to(dtype)
    # a label above those of all keys has the place after the last
    place = place.clamp(max=len(ordered) - 1)
    return torch.searchsorted(ordered, key_labels).to(dtype), place.to(dtype), n_alike


def means_over_classes(problem: Pairs) -> Tensor:
    """Return for each query its mean similarity to the other keys of its class."""
    assert problem.classes is not None and problem.query_classes is not None
    keys = problem.query if problem.key is None else problem.key
    k, _ = units(keys, problem.normalize)
    place, of_queries = problem.classes.long(), problem.query_classes.long()
    zeros = torch.zeros_like(place, dtype=k.dtype)
    n_alike = zeros.index_add(0, place, zeros + 1).clamp_(min=1)
    means, n_positives = _class_means(k, place, n_alike)[of_queries], n_alike[of_queries]
    is_among_keys = problem.first >= 0
    q = k[own_columns(problem)] if is_among_keys else units(problem.query, problem.normalize)[0]
    of_class = torch.linalg.vecdot(q, means) * n_positives
    if is_among_keys:
        of_class, n_positives = of_class - q.square().sum(1), (n_positives - 1).clamp(min=1)
    return of_class / n_positives * problem.scale.to(k.dtype)


def _class_means(rows: Tensor, place: Tensor, n_alike: Tensor) -> Tensor:
    """Return the mean of each class, by its number.

    The mean of the differences from a first mean is added to it, because a sum of many rows that
    are alike is rounded often.
    """

    def means_of(rows: Tensor) -> Tensor:
        sums = torch.zeros_like(rows)
        if rows.is_cuda:  # index_add has no fixed order there
            sums.index_put_((place,), rows, accumulate=True)
        else:
            sums.index_add_(0, place, rows)
        return sums.div_(n_alike[:, None])

    means = means_of(rows)
    return means.add_(means_of(means[place].neg_().add_(rows)))
