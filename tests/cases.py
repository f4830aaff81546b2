"""Every loss and its variants on one line each: the table that tests, budgets and benchmarks read.

A loss joins with its line, and all contracts of test_contracts.py hold for it from then on. The
table knows each loss independently of fastkd, as its paper or its users write it.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import published
import textbook
import torch
from inputs import (
    Inputs,
    crops,
    embeddings,
    heads,
    heads_of_two_teachers,
    likelihoods,
    logits,
    logits_and_labels,
    logits_of_one_network,
    logits_of_three,
    maps,
    maps_of_layers,
    patches,
    peers,
    scores,
    tokens,
    two_vocabularies,
    weighted,
    with_a_map,
    with_a_mask,
    with_bank,
    with_class_weights,
    with_classes,
    with_false_negatives,
    with_keys,
    with_labelled_keys,
    with_matched_ids,
    with_negatives_of_each,
    with_soft_labels,
    with_variances,
    with_views,
    with_weak_logits,
)
from torch import Tensor

import fastkd
from fastkd.problems.peers import MOST


@dataclass(frozen=True)
class Case:
    """A loss with options, and what is known of it independently of fastkd."""

    loss: Callable[..., Any]
    problem: str | None  # that engines solve; without one the loss is its formula
    inputs: Inputs
    published: Callable[..., Tensor]  # (*inputs, **options): for each example, or of the batch
    options: Mapping[str, Any] = field(default_factory=dict)
    by_hand: Callable[..., float] | None = None  # in Python floats, of one row
    per_example: bool = False
    has_kernels: bool = True
    note: str = ""

    @property
    def name(self) -> str:
        return self.loss.__name__

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.loss).parameters

    @property
    def id(self) -> str:
        options = (f"{k}={v}" for k, v in self.options.items())
        return "-".join([self.name, *([self.note] if self.note else []), *options])

    def __str__(self) -> str:
        return self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __call__(self, *inputs: Tensor, **options: Any) -> Tensor:
        """Compute the loss of fastkd, unreduced where it has one for each example."""
        reduction = {"reduction": "none"} if self.per_example else {}
        return self.loss(*inputs, **{**reduction, **self.options, **options})

    def truth(self, *inputs: Tensor, **options: Any) -> Tensor:
        """Compute the same as it is published."""
        return self.published(*inputs, **{**self.options, **options})

    def hand(self, *inputs: Tensor, **options: Any) -> Tensor:
        """Compute the same in Python floats, row by row."""
        assert self.by_hand is not None
        options = {**self.options, **options}
        rows = [x.flatten(0, inputs[0].ndim - 2).tolist() for x in inputs]
        numbers = [self.by_hand(*row, **options) for row in zip(*rows, strict=True)]
        losses = torch.tensor(numbers, dtype=torch.float64, device=inputs[0].device)
        return losses.view(inputs[0].shape[:-1])


def _rows(
    loss: Callable, known: tuple, temperature: float = 2.0, has_kernels: bool = True, **options: Any
) -> Case:
    options = dict(temperature=temperature) | options
    return Case(loss, "rows", logits, known[1], options, known[0], True, has_kernels)


def _kd(divergence: str, known: tuple, **options: Any) -> Case:
    options = dict(temperature=4.0, alpha=0.3, divergence=divergence) | options
    by_hand, eager = textbook.with_labels(known)
    return Case(fastkd.kd, "rows", logits_and_labels, eager, options, by_hand, per_example=True)


def _of_labels(
    problem: str, loss: Callable, known: tuple, inputs: Inputs = logits_and_labels, **options: Any
) -> Case:
    by_hand, eager = known
    return Case(loss, problem, inputs, eager, options, by_hand, True, loss.has_kernels)


def _batch(
    problem: str | None, loss: Callable, inputs: Inputs, note: str = "", **options: Any
) -> Case:
    as_published, has_kernels = (
        getattr(published, loss.__name__),
        getattr(loss, "has_kernels", True),
    )
    return Case(loss, problem, inputs, as_published, options, None, False, has_kernels, note)


def _with_keys(student, teacher, student_keys, teacher_keys, **options):
    keys = dict(student_keys=student_keys, teacher_keys=teacher_keys)
    return fastkd.similarity_kl(student, teacher, **keys, **options)


_with_keys.__name__ = "similarity_kl"


def _last(loss: Callable, *names: str) -> Callable:
    """Return the loss whose last tensors are given by these names."""

    @functools.wraps(loss)
    def named_last(*inputs, **options):
        n = len(inputs) - len(names)
        return loss(*inputs[:n], **dict(zip(names, inputs[n:], strict=True)), **options)

    return named_last


def _option(loss: Callable, inputs: Inputs, *names: str, **options: Any) -> Case:
    """Return a case whose last tensors are options with these names."""
    as_published = _last(getattr(published, loss.__name__), *names)
    return Case(_last(loss, *names), "pairs", inputs, as_published, options, note="-".join(names))


def _channels(student, teacher, weights=None, **options):
    """Return the loss of rows as of channels of maps [B, C, L], as they are or with one channel."""
    examples, n_cols = student.shape[:-1], student.shape[-1]
    n_rows = math.prod(examples)
    if student.ndim != 3 or not n_rows:
        student, teacher = (x.reshape(n_rows, 1, n_cols) for x in (student, teacher))
        weights = weights.reshape(n_rows, 1) if isinstance(weights, Tensor) else weights
    losses = fastkd.channel_wise(student, teacher, weights=weights, **options)
    return losses.view(examples) if losses.ndim else losses


_channels.__name__ = "channel_wise"


@functools.wraps(fastkd.fsp)
def _of_layers(student, teacher, student_2, teacher_2, **options):
    return fastkd.fsp((student, student_2), (teacher, teacher_2), **options)


def _tokens(loss: Callable, inputs: Inputs, *last: str, **options: Any) -> Case:
    """Return a case of tokens, the last tensors of which are options."""
    name, has_kernels = loss.__name__, loss.has_kernels
    as_published, per_example = (
        _last(getattr(published, name), *last),
        name in ("token_relation", "cka"),
    )
    return Case(
        _last(loss, *last), "tokens" if loss.has_engines else None, inputs, as_published,
        options, None, per_example, has_kernels, "-".join(last),
    )  # fmt: skip


def _minilm(*tensors: Tensor, **options: Any) -> Tensor:
    """Return the loss of relations whose vectors come one after the other."""
    n = len(tensors) // 2
    return fastkd.minilm_relation(tensors[:n], tensors[n:], **options)


_minilm.__name__ = "minilm_relation"
_minilm.has_kernels = _minilm.has_engines = True


@functools.wraps(fastkd.koleo)
def _of_views(first, second, **options):
    return fastkd.koleo(torch.cat([first, second]), **options)


def _patches(**options: Any) -> Case:
    # whose kernels are those of other losses of rows
    return Case(fastkd.ibot, "rows", patches, published.ibot, options, None, True, False)


@functools.wraps(fastkd.mutual_kl)
def _mutual(*logits, **options):
    return fastkd.mutual_kl(logits, **options)


def _peers(n: int, **options: Any) -> Case:
    """Return a case of n networks that teach each other."""
    return Case(
        _mutual, "peers", peers(n), published.mutual_kl, options, None, True, n <= MOST,
        note=f"{n} networks",
    )  # fmt: skip


def _linear(**options: Any) -> Case:
    """Return a case of hidden states and heads, the student's with a bias."""
    loss = _last(fastkd.linear_kd, "student_bias")
    as_published = _last(published.linear_kd, "student_bias")
    return Case(loss, "linear", heads, as_published, options)


def _virtual(**options: Any) -> Case:
    """Return a case of logits and labels without a teacher."""
    loss, known = fastkd.teacher_free_kd, textbook.TEACHER_FREE_KD
    return _of_labels("corrected", loss, known, logits_of_one_network, **options)


@functools.wraps(fastkd.multi_teacher)
def _of_three(student, *teachers, **options):
    return fastkd.multi_teacher(student, teachers, **options)


def _ensemble(temperature: float = 2.0, **options: Any) -> Case:
    options = dict(temperature=temperature) | options
    return Case(
        _of_three, "ensembles", logits_of_three, published.multi_teacher, options, per_example=True
    )


def _of_two_teachers(loss: Callable) -> Callable:
    @functools.wraps(loss)
    def paired(student, head, first, first_head, second, second_head, labels, bias, **options):
        teachers = (first, second), (first_head, second_head)
        return loss(student, head, *teachers, labels, student_bias=bias, **options)

    return paired


def _linear_of_two(**options: Any) -> Case:
    loss, as_published = _of_two_teachers(fastkd.linear_kd), _of_two_teachers(published.linear_kd)
    inputs, note = heads_of_two_teachers, "two teachers"
    return Case(loss, "linear", inputs, as_published, options, note=note)


_with_weights = _last(fastkd.hint, "weights")
_with_class_weights = _last(fastkd.kd, "class_weights")
ONE_WIDTH, TWO_WIDTHS, UNIT = embeddings(), embeddings(wider=2), embeddings(trained=2, unit=True)
VIEWS = embeddings(trained=2)

CASES = [
    _rows(fastkd.forward_kl, textbook.FORWARD_KL, temperature=4.0),
    _rows(fastkd.forward_kl, textbook.FORWARD_KL, scale_t2=False),
    _rows(fastkd.reverse_kl, textbook.REVERSE_KL),
    _rows(fastkd.jensen_shannon, textbook.JENSEN_SHANNON, beta=0.1),
    _rows(fastkd.jensen_shannon, textbook.JENSEN_SHANNON, beta=0.5, temperature=1.0),
    _rows(fastkd.jensen_shannon, textbook.FORWARD_KL, beta=0.0),
    _rows(fastkd.jensen_shannon, textbook.REVERSE_KL, beta=1.0),
    _rows(fastkd.skew_kl, textbook.SKEW_KL, skew=0.1),
    _rows(fastkd.skew_kl, textbook.FORWARD_KL, skew=0.0),
    _rows(fastkd.skew_reverse_kl, textbook.SKEW_REVERSE_KL, skew=0.1),
    _rows(fastkd.skew_reverse_kl, textbook.REVERSE_KL, skew=0.0),
    _rows(fastkd.symmetric_kl, textbook.SYMMETRIC_KL, weight=0.3),
    _rows(fastkd.symmetric_kl, textbook.REVERSE_KL, weight=0.0),
    _rows(fastkd.symmetric_kl, textbook.FORWARD_KL, weight=1.0),
    _rows(fastkd.total_variation, textbook.TOTAL_VARIATION),
    _rows(fastkd.soft_cross_entropy, textbook.SOFT_CROSS_ENTROPY, temperature=4.0),
    _rows(fastkd.logit_mse, textbook.LOGIT_MSE, scale_t2=False, has_kernels=False),
    _rows(_channels, textbook.FORWARD_KL, temperature=4.0),
    _rows(fastkd.localization, textbook.LOCALIZATION, temperature=4.0, bins="mean"),
    _rows(fastkd.localization, textbook.LOCALIZATION, scale_t2=False, bins="sum"),
    _kd("forward_kl", textbook.FORWARD_KL),
    _kd("jensen_shannon", textbook.JENSEN_SHANNON, beta=0.1),
    _kd("total_variation", textbook.TOTAL_VARIATION),
    _kd("forward_kl", textbook.standardized(textbook.FORWARD_KL), standardize=True),
    _batch("rows", fastkd.kd, with_soft_labels, "soft labels", alpha=0.3, temperature=4.0),
    _batch(
        "rows",
        _with_class_weights,
        with_class_weights,
        "class weights",
        alpha=0.3,
        temperature=4.0,
        label_smoothing=0.1,
    ),
    _of_labels("rows", fastkd.decoupled_kd, textbook.DECOUPLED_KD),
    _of_labels(
        "rows", fastkd.decoupled_kd, textbook.DECOUPLED_KD, alpha=2.0, beta=0.5, scale_t2=False
    ),
    _of_labels(
        "rows", fastkd.decoupled_kd, textbook.standardized(textbook.DECOUPLED_KD), standardize=True
    ),
    *(
        _rows(loss, textbook.standardized(known), standardize=True)
        for loss, known in (
            (fastkd.forward_kl, textbook.FORWARD_KL),
            (fastkd.reverse_kl, textbook.REVERSE_KL),
            (fastkd.total_variation, textbook.TOTAL_VARIATION),
        )
    ),
    _of_labels("rows", fastkd.nkd, textbook.NKD),
    _of_labels("rows", fastkd.nkd, textbook.NKD, gamma=0.5, temperature=3.0),
    _batch("rows", fastkd.uskd, with_weak_logits),
    _batch("rows", fastkd.uskd, with_weak_logits, ranking="log_probabilities", beta=2.0),
    _batch("rows", fastkd.uskd, logits_of_one_network, "alone", alpha=0.5),
    _peers(2, temperature=2.0),
    _peers(3),
    _peers(4, temperature=2.0, scale_t2=False, detach_peers=False),
    _peers(5, detach_peers=False),
    _of_labels("rows", fastkd.wsld, textbook.WSLD, temperature=4.0),
    _of_labels("corrected", fastkd.mft, textbook.MFT, threshold=0.2, temperature=1.0),
    _of_labels("corrected", fastkd.mft, textbook.MFT, threshold=0.7, temperature=3.0),
    _virtual(correct_probability=0.99, temperature=20.0),
    _virtual(correct_probability=0.6, temperature=1.0, scale_t2=False),
    _ensemble(),
    _ensemble(divergence="reverse_kl", teacher_weights=[0.5, 0.2, 0.9]),
    _ensemble(divergence="jensen_shannon", beta=0.1, combine="logits"),
    _ensemble(combine="sum", teacher_weights=[0.5, 0.2, 0.9]),
    _ensemble(divergence="total_variation", combine="sum", scale_t2=False),
    _linear(alpha=0.3, temperature=2.0),
    _linear(alpha=0.3, divergence="jensen_shannon", beta=0.1, reduction="none"),
    _linear(divergence={"reverse_kl": 0.5, "total_variation": 2.0}, student_softcap=2.0),
    _linear(alpha=1.0, student_logit_scale=0.5),
    _batch("sorted_rows", fastkd.uld, two_vocabularies, temperature=2.0),
    _batch("rows", fastkd.matched_kl, with_matched_ids, temperature=2.0),
    _batch(
        "rows",
        fastkd.matched_kl,
        with_matched_ids,
        mass="tail",
        divergence="jensen_shannon",
        beta=0.1,
        temperature=2.0,
    ),
    _batch("rows", fastkd.projected_kl, with_a_map, temperature=2.0),
    _batch("rows", fastkd.projected_kl, with_a_map, mass="full", divergence="reverse_kl"),
    _batch(None, fastkd.alm, likelihoods, temperature=2.0),
    _batch(None, fastkd.alm, likelihoods, divergence="tv"),
    _linear_of_two(alpha=0.3, temperature=2.0),
    _linear_of_two(alpha=0.3, divergence="reverse_kl", reduction="none"),
    _batch("rows", fastkd.dino, crops),
    _batch("rows", fastkd.dino, crops, skip_same_view=False, teacher_temperature=0.07),
    _patches(),
    _patches(student_temperature=0.2, teacher_temperature=0.07),
    _batch(None, _of_views, VIEWS),
    _batch(None, _of_views, VIEWS, epsilon=0.1),
    _batch("relations", fastkd.rkd, TWO_WIDTHS),
    _batch(
        "relations",
        fastkd.rkd,
        TWO_WIDTHS,
        distance_weight=1.0,
        angle_weight=2.0,
        smooth_l1_beta=0.25,
    ),
    _batch("relations", fastkd.rkd_distance, TWO_WIDTHS),
    _batch("relations", fastkd.rkd_angle, TWO_WIDTHS),
    _batch("gram", fastkd.similarity_preserving, TWO_WIDTHS),
    _batch("gram", fastkd.pkt, TWO_WIDTHS),
    _batch("gram", fastkd.correlation_congruence, TWO_WIDTHS, form="kernel"),
    _batch("gram", fastkd.correlation_congruence, TWO_WIDTHS, form="kernel", gamma=1.5, order=1),
    _batch("gram", fastkd.correlation_congruence, TWO_WIDTHS, form="kernel", gamma=0.8, order=4),
    _batch("gram", fastkd.correlation_congruence, ONE_WIDTH),
    _batch("gram", fastkd.dist_kd, logits),
    _batch("gram", fastkd.dist_kd, logits, beta=2.0, gamma=0.5, temperature=4.0, epsilon=0.1),
    _batch("levels", fastkd.mlkd, logits),
    _batch("levels", fastkd.mlkd, logits, temperatures=(1.0, 4.0), instance_weight=0.0),
    _batch("levels", fastkd.mlkd, logits, batch_weight=0.3, class_weight=0.0),
    _batch(None, fastkd.nst, maps(wider=2)),
    _batch(None, fastkd.nst, maps(wider=2, size=(90,)), "few channels"),
    _batch(None, _of_layers, maps_of_layers),
    _batch("rows", fastkd.vid, with_variances, epsilon=0.01),
    _batch(None, fastkd.attention_mse, scores),
    _batch("moments", _with_weights, maps(weighted=True), "weights"),
    _batch("moments", fastkd.hint, maps()),
    _batch("moments", _with_weights, maps(weighted=True), "weights", kind="cosine"),
    _batch("moments", fastkd.hint, ONE_WIDTH, "rows"),
    _batch("moments", fastkd.hint, maps(), kind="smooth_l1", beta=0.5),
    _batch("moments", fastkd.hint, maps(), kind="normalized_mse"),
    _batch("moments", fastkd.embedding_mse, ONE_WIDTH),
    _batch("moments", fastkd.embedding_mse, ONE_WIDTH, normalize=True),
    _batch("moments", fastkd.attention_transfer, maps(wider=2)),
    _batch("moments", fastkd.attention_transfer, maps(wider=2), p=1.0),
    _batch("moments", fastkd.attention_transfer, maps(wider=2), p=3.0, kind="max"),
    _batch("pairs", fastkd.info_nce, VIEWS),
    _batch("pairs", fastkd.info_nce, VIEWS, symmetric=True),
    _batch("pairs", fastkd.info_nce, with_bank, "bank", negative_weight=0.3, margin=0.1),
    _batch(
        "pairs",
        fastkd.info_nce,
        with_bank,
        "bank",
        negative_weight=0.3,
        symmetric=True,
        decoupled=True,
    ),
    _batch("pairs", fastkd.info_nce, with_bank, "bank", in_batch_negatives=False, temperature=0.2),
    _batch("pairs", fastkd.info_nce, with_bank, "bank", in_batch_negatives=False, decoupled=True),
    _batch("pairs", fastkd.info_nce, UNIT, "unit", normalize=False, symmetric=True, margin=-0.2),
    _batch("pairs", fastkd.info_nce, VIEWS, decoupled=True, negative_weight=2.0),
    _batch("pairs", fastkd.clip_contrastive, UNIT, logit_scale=5.0),
    _batch("pairs", fastkd.siglip, UNIT, logit_scale=5.0, logit_bias=-2.0),
    _batch("pairs", fastkd.nt_xent, VIEWS),
    _batch("pairs", fastkd.sup_con, with_classes),
    _batch("pairs", fastkd.sup_con, with_classes, anchors="all", temperature=0.3),
    _batch("pairs", fastkd.similarity_kl, TWO_WIDTHS),
    _batch("pairs", fastkd.similarity_kl, TWO_WIDTHS, mask_self=True, teacher_temperature=0.2),
    _batch("pairs", fastkd.similarity_kl, TWO_WIDTHS, mask_self=True, symmetric=True),
    _batch("pairs", _with_keys, with_keys, "keys", teacher_temperature=0.03),
    _batch("pairs", _with_keys, with_keys, "keys", symmetric=True),
    _tokens(fastkd.token_relation, tokens(), heads=2),
    _tokens(fastkd.token_relation, tokens(masked=True), "mask", heads=2, student_temperature=2.0),
    _tokens(fastkd.token_relation, tokens(), causal=True, normalize=True, temperature=0.1),
    _tokens(fastkd.token_relation, tokens(), divergence="mse", normalize=True, temperature=1.0),
    _tokens(fastkd.token_relation, tokens(masked=True), "mask", divergence="mse", causal=True),
    _tokens(_minilm, tokens(2), n_heads=2, weights=[1.0, 0.5]),
    _tokens(fastkd.gram_anchoring, tokens()),
    _tokens(fastkd.gram_anchoring, tokens(), remove_negative="teacher", per_image=False),
    _tokens(fastkd.gram_anchoring, tokens(masked=True), "mask", remove_negative=None),
    _tokens(fastkd.cka, tokens()),
    _tokens(fastkd.cka, tokens(masked=True), "mask", center=False),
]
# further options of contrasts, whose numbers test_pairs.py compares
_NCE, _MASK, _EACH = fastkd.info_nce, "false_negatives", with_negatives_of_each
OPTIONS = [
    _option(_NCE, weighted(VIEWS), "weights", symmetric=True),
    _option(_NCE, weighted(with_bank), "negatives", "weights", reduction="sum"),
    _option(_NCE, weighted(VIEWS), "weights", reduction="none", decoupled=True),
    _option(_NCE, _EACH, margin=0.1, negative_weight=0.3),
    _option(_NCE, weighted(_EACH), "negatives", "weights", decoupled=True),
    _option(_NCE, _EACH, in_batch_negatives=False),
    _option(_NCE, _EACH, symmetric=True, normalize=False, temperature=1.0),
    _option(_NCE, with_false_negatives(VIEWS), _MASK, symmetric=True),
    _option(_NCE, with_false_negatives(VIEWS), _MASK, decoupled=True),
    _option(_NCE, with_false_negatives(with_bank, 13), "negatives", _MASK, margin=0.1),
    _option(_NCE, with_false_negatives(_EACH, 3), "negatives", _MASK),
    _option(fastkd.clip_contrastive, weighted(UNIT), "weights", logit_scale=5.0),
    _option(fastkd.clip_contrastive, UNIT, logit_scale=5.0, reduction="none"),
    _option(fastkd.siglip, weighted(UNIT), "weights", logit_scale=5.0, logit_bias=-2.0),
    _option(fastkd.siglip, UNIT, logit_scale=5.0, negative_only=True),
    _option(fastkd.siglip, UNIT, logit_scale=5.0, reduction="none"),
    _option(fastkd.nt_xent, weighted(VIEWS), "weights", decoupled=True),
    _option(fastkd.nt_xent, weighted(VIEWS), "weights", normalize=False, reduction="sum"),
    _option(fastkd.nt_xent, VIEWS, reduction="none", decoupled=True),
    _option(fastkd.sup_con, weighted(with_classes), "weights"),
    _option(fastkd.sup_con, with_views, normalize=False, base_temperature=0.07, temperature=0.5),
    _option(fastkd.sup_con, with_labelled_keys),
    _option(
        fastkd.sup_con, weighted(with_labelled_keys), "keys", "key_labels", "weights", anchors="all"
    ),
    _option(fastkd.sup_con, with_labelled_keys, reduction="none"),
    _option(fastkd.sup_con, with_a_mask, "positives", reduction="none"),
    _option(fastkd.similarity_kl, TWO_WIDTHS, form="cross_entropy", mask_self=True),
    _option(fastkd.similarity_kl, weighted(with_keys), "student_keys", "teacher_keys", "weights"),
    _option(fastkd.similarity_kl, weighted(TWO_WIDTHS), "weights", reduction="sum", symmetric=True),
    _option(
        fastkd.similarity_kl,
        weighted(TWO_WIDTHS),
        "weights",
        form="cross_entropy",
        normalize=False,
        student_temperature=2.0,
        teacher_temperature=3.0,
    ),
    _option(fastkd.similarity_kl, TWO_WIDTHS, reduction="none"),
]
# the first line of each function: what does not depend on the options is tested with it
LOSSES = [case for i, case in enumerate(CASES) if case.name not in [c.name for c in CASES[:i]]]


def of(*names: str, cases: list[Case] = CASES) -> list[Case]:
    """Return the cases of these problems or of these functions."""
    return [case for case in cases if {case.problem, case.name} & {*names}]


def named(*ids: str) -> list[Case]:
    by_id = {case.id: case for case in CASES}
    return [by_id[name] for name in ids]


# one for each way through an op: what depends on the op alone is tested with these
WAYS = named(
    "forward_kl-temperature=4.0", "jensen_shannon-temperature=2.0-beta=0.1",
    "kd-temperature=4.0-alpha=0.3-divergence=forward_kl", "dino", "rkd", "pkt", "dist_kd",
    "mutual_kl-2 networks-temperature=2.0", "linear_kd-alpha=0.3-temperature=2.0", "mlkd",
    "mft-threshold=0.2-temperature=1.0",
    "teacher_free_kd-correct_probability=0.99-temperature=20.0",
    "linear_kd-alpha=0.3-divergence=jensen_shannon-beta=0.1-reduction=none", "uld-temperature=2.0",
    "info_nce", "info_nce-bank-negative_weight=0.3-symmetric=True-decoupled=True",
    "multi_teacher-temperature=2.0", "linear_kd-two teachers-alpha=0.3-temperature=2.0",
    "linear_kd-two teachers-alpha=0.3-divergence=reverse_kl-reduction=none",
    "siglip-logit_scale=5.0-logit_bias=-2.0", "sup_con", "similarity_kl-keys-symmetric=True",
    "hint-weights-kind=cosine", "attention_transfer-p=3.0-kind=max",
    "token_relation-mask-heads=2-student_temperature=2.0", "gram_anchoring",
)  # fmt: skip
