"""Every loss and its variants on one line each: the table that tests, budgets and benchmarks read.

A loss joins with its line, and all contracts of test_contracts.py hold for it from then on. The
table knows each loss independently of fastkd, as its paper or its users write it.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import published
import textbook
import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = "PTX_TARGET" in os.environ  # compiled kernels are executed on the CPU: tests/ptx
ON_GPU = torch.cuda.is_available() and not INTERPRETED and not EMULATED
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def normal(
    *shape: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    device: torch.device | str = DEVICE,
) -> Tensor:
    """Return the same numbers on every device and in every dtype, up to rounding."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


# ----------------------------------------------------------------------------------------- inputs
# functions of (examples, width, dtype, seed, device); what is trained requires grad

Inputs = Callable[..., list[Tensor]]


def logits(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    student, teacher = 3 * normal(2, *examples, width, seed=seed, device=device)
    return [student.to(dtype).requires_grad_(), teacher.to(dtype)]


def logits_and_labels(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(width, examples, generator=generator).to(device)
    return [*logits(examples, width, dtype, seed, device), labels]


def embeddings(wider: int = 0, trained: int = 1, unit: bool = False) -> Inputs:
    """Return the inputs of two networks; the second has `wider` features more."""

    def inputs(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
        tensors = [
            normal(*examples, width + i * wider, dtype=dtype, seed=seed + i, device=device)
            for i in range(2)
        ]
        if unit:
            tensors = [F.normalize(x, dim=-1) for x in tensors]
        return [x.requires_grad_(i < trained) for i, x in enumerate(tensors)]

    return inputs


def with_bank(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    bank = normal(*examples[:-1], 13, width, seed=seed + 7, dtype=dtype, device=device)
    return [*embeddings(trained=2)(examples, width, dtype, seed, device), bank.requires_grad_()]


def with_classes(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-2, 3, examples, generator=generator).mul_(1000).to(device)
    return [
        normal(*examples, width, dtype=dtype, seed=seed, device=device).requires_grad_(),
        labels,
    ]


def weighted(inputs: Inputs) -> Inputs:
    """Return further the weights of the examples, the first of which is 0."""

    def more(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
        weights = normal(*examples, seed=seed + 4, device=device).square()
        weights[..., :1] = 0
        return [*inputs(examples, width, dtype, seed, device), weights.float()]

    return more


def with_negatives_of_each(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    others = normal(*examples, 3, width, seed=seed + 7, dtype=dtype, device=device)
    return [*embeddings(trained=2)(examples, width, dtype, seed, device), others.requires_grad_()]


def with_false_negatives(inputs: Inputs, n_further: int = 0) -> Inputs:
    """Return further a mask of pairs; the last query has no negative left."""

    def more(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
        n_keys = examples[-1] + n_further
        mask = normal(*examples, n_keys, seed=seed + 5, device=device) > 0.5
        mask[..., -1:, :] = True
        return [*inputs(examples, width, dtype, seed, device), mask]

    return more


def with_views(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    labels = with_classes(examples, width, dtype, seed, device)[1]
    return [
        normal(*examples, 2, width, dtype=dtype, seed=seed, device=device).requires_grad_(),
        labels,
    ]


def with_labelled_keys(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return keys some of which have no class, nor have some features; two classes have no key."""
    features, labels = with_classes(examples, width, dtype, seed, device)
    keys, key_labels = with_classes((*examples[:-1], 11), width, dtype, seed + 5, device)
    labels[..., :1], key_labels[..., :2], key_labels[..., 2:3] = 7, -100, 8
    labels[..., 1:2], labels[..., 2:3] = -100, 9000  # above all labels of keys
    return [features, labels, keys, key_labels]


def with_a_mask(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    features, labels = with_views(examples, width, dtype, seed, device)
    return [features, labels[..., None] == labels[..., None, :]]


def with_keys(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    queries = embeddings(wider=2)(examples, width, dtype, seed, device)
    return queries + embeddings(wider=2)((*examples[:-1], 11), width, dtype, seed + 5, device)


def crops(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return outputs of four and two crops and a centre, small as the temperatures want them."""
    *batches, n = examples
    student = 0.3 * normal(*batches, 4, n, width, seed=seed, device=device)
    teacher = 0.3 * normal(*batches, 2, n, width, seed=seed + 1, device=device)
    center = 0.3 * normal(*batches, width, seed=seed + 2, device=device)
    wide = torch.promote_types(dtype, torch.float32)
    return [student.to(dtype).requires_grad_(), teacher.to(dtype), center.to(wide)]


def maps(wider: int = 0, weighted: bool = False, size: tuple[int, ...] = (3, 2)) -> Inputs:
    """Return feature maps; the teacher's have `wider` channels more."""

    def inputs(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
        tensors = [
            normal(*examples, width + i * wider, *size, dtype=dtype, seed=seed + i, device=device)
            for i in range(2)
        ]
        if weighted:
            weights = normal(*examples, 1, *size, seed=seed + 4, device=device).square()
            weights[..., :1] = 0
            tensors.append(weights.float())
        return [x.requires_grad_(i < 1) for i, x in enumerate(tensors)]

    return inputs


def tokens(n_relations: int = 1, masked: bool = False) -> Inputs:
    """Return sequences of 6 tokens of two networks of an even width; the first may be masked."""

    def inputs(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
        widths = [2 * width] * n_relations + [2 * width + 4] * n_relations
        tensors = [
            normal(*examples, 6, x, dtype=dtype, seed=seed + i, device=device)
            for i, x in enumerate(widths)
        ]
        tensors = [x.requires_grad_(i < n_relations) for i, x in enumerate(tensors)]
        if not masked:
            return tensors
        mask = normal(*examples, 6, seed=seed + 5, device=device) > -0.5
        mask[..., -1] = True  # where a NaN must show
        mask[..., : examples[-1] // 3, :] = False
        return [*tensors, mask]

    return inputs


def maps_of_layers(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return maps of a layer and, with one channel more, of another one, for both networks."""
    first = maps()(examples, width, dtype, seed, device)
    return [*first, *maps()(examples, width + 1, dtype, seed + 2, device)]


def with_variances(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    alpha = normal(*examples[:-1], width, dtype=dtype, seed=seed + 3, device=device)
    return [*maps()(examples, width, dtype, seed, device), alpha.requires_grad_()]


def scores(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return scores of 3 heads of `width` tokens; some exclude a key."""
    tensors = normal(2, *examples, 3, width, width, seed=seed, device=device)
    tensors[..., width // 2] -= 200 * (tensors[..., 0] > 1)
    return [x.to(dtype).requires_grad_(i < 1) for i, x in enumerate(tensors)]


# ------------------------------------------------------------------------------------------ table


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


_with_weights = _last(fastkd.hint, "weights")
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
    _batch("rows", fastkd.dino, crops),
    _batch("rows", fastkd.dino, crops, skip_same_view=False, teacher_temperature=0.07),
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
    "info_nce", "info_nce-bank-negative_weight=0.3-symmetric=True-decoupled=True",
    "siglip-logit_scale=5.0-logit_bias=-2.0", "sup_con", "similarity_kl-keys-symmetric=True",
    "hint-weights-kind=cosine", "attention_transfer-p=3.0-kind=max",
    "token_relation-mask-heads=2-student_temperature=2.0", "gram_anchoring",
)  # fmt: skip
