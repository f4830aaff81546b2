"""The sizes, the inputs and the expression with which each loss of tests/cases.py is measured.

A new loss joins with its line in tests/cases.py; what that line cannot know stands here, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

import checkout  # noqa: F401
import eager
from cases import LOSSES, Case
from eager import T
from torch import Tensor
from workload_inputs import (
    N_CROPS,
    Inputs,
    Shape,
    both_trained,
    crops,
    heads,
    likelihoods,
    maps_and_variances,
    maps_of_layers,
    one_network,
    relations,
    towers,
    two_networks,
    views,
    weighted_maps,
    with_classes,
    with_labels,
    with_weak_logits,
)

import fastkd

# the losses that a GPU measures first, at all of their headlines; any other has the first of them
LEADERS = (
    "forward_kl", "info_nce", "rkd", "jensen_shannon", "clip_contrastive", "siglip",
    "similarity_kl", "dino", "hint", "attention_transfer", "embedding_mse", "token_relation",
    "linear_kd",
)  # fmt: skip


class Family(NamedTuple):
    """The sizes at which losses of one kind are measured and compiled."""

    temporary: Callable[[Shape], int]  # numbers in the largest tensor that eager writes
    sizes: list[Shape]  # that take a CPU seconds at most
    gpu_sizes: list[Shape]
    headlines: list[Shape]  # of a GPU, one for each way that a loss goes there; the first of all
    compiled_sizes: list[Shape]  # where the launch sites choose other code
    independent: bool = False  # whether each example has its own loss


# rows and classes, or tokens and vocabulary: digits, CIFAR-100, ImageNet, Llama 2, Llama 3
_ROWS = [(128, 10), (128, 100), (256, 1000), (2048, 32000)]
# batches of images, and global ones; widths of ResNets and of transformers
_RELATIONS = [(64, 64), *product((64, 128, 256, 512, 1024, 2048), (128, 512, 1024))]
# features of a layer, of a small and of a large batch; rows and classes for DIST
_GRAMS = [(64, 128), (256, 1000), (256, 16384), (2048, 512)]
# batches of CIFAR-100 and of ImageNet; of their V² products for each T there is room for few more
_LEVELS = [(64, 100), (512, 100), (256, 1000)]
# images of a GPU and outputs of DINO's head, and smaller
_CROPS = [(8, 1024), (16, 8192), (16, 65536)]
# images with five patches, and outputs of a head; half of a batch of global embeddings
N_PATCHES, _PROTOTYPES = 5, [(16, 1024), (64, 4096), (256, 8192)]
_GLOBAL = [(64, 384), (1024, 768), (4096, 768)]
_PAIRS = Family(
    lambda shape: shape[0] ** 2,
    [(256, 256), (1024, 256), (4096, 256), (8192, 256)],
    [*product((1024, 4096, 8192, 16384, 32768, 65536), (64, 256, 512, 1024))],
    [(32768, 256), (8192, 512), (1024, 256)],
    # many and few rows of tiles, and the widest tiles
    [(32768, 256), (32768, 128), (4096, 256), (4096, 64)],
)
# tokens, widths of student and teacher, vocabulary: a small one, Llama 2, Llama 3, Qwen 3
_HEADS = [(256, 64, 128, 4096), (2048, 512, 512, 32000)]
_OF_LANGUAGE_MODELS = [(8192, 2048, 4096, 128256), (8192, 2048, 4096, 151936)]
# a small layer; layers of a ResNet and of a detector; tokens are rows with their features last
_MAPS = [(16, 64, 8, 8), (64, 512, 28, 28), (16, 256, 64, 64)]
_TOKENS = [(256, 768), (4096, 768)]
# layers of a small network, of a segmenter's logits and of a detector
_CHANNELS = [(4, 32, 16, 16), (16, 256, 64, 64), (8, 19, 128, 256)]
_EDGES = [(4096, 17), (65536, 17)]  # of boxes, with the bins of a detector
# maps whose channels are multiplied with one another, position by position where it is published
_TEXTURES = [(4, 32, 8, 8), (2, 256, 32, 32), (16, 256, 14, 14)]
_SCORES = [(4, 4, 32, 32), (32, 12, 128, 128)]  # of all heads of a layer
_CROSSED = Family(
    lambda shape: math.prod(shape) * shape[1],  # the products of two channels at each position
    _TEXTURES,
    [*_TEXTURES, (64, 512, 14, 14)],
    [(64, 512, 14, 14)],
    [],
)
# sequences of a BERT with 12 heads; patches of ViTs
_TOKENS_BY_HEADS = Family(
    lambda shape: shape[0] * 12 * shape[1] ** 2,
    [(8, 128, 384), (32, 128, 768), (8, 512, 768)],
    [(32, 128, 768), (8, 512, 768), (32, 512, 768), (8, 2048, 1536)],
    [(32, 512, 768), (8, 2048, 1536)],
    [(8, 512, 768), (32, 128, 768), (8, 500, 1536)],
)
_PATCHES = Family(
    lambda shape: shape[0] * shape[1] ** 2,
    [(32, 196, 384), (8, 784, 768), (1, 4096, 384)],
    [(64, 196, 384), (32, 784, 768), (4, 4096, 1024)],
    [(32, 784, 768)],
    [],
)
_VOCABULARIES = Family(
    math.prod,
    [(256, 1000), (1024, 32000), (256, 128256)],
    [(1024, 32000), (4096, 128256)],
    [(4096, 128256)],
    [],  # the kernels are those of "rows"
    independent=True,
)
_LABELLED = Family(
    math.prod, _ROWS, [*_ROWS, (4096, 128256)], [(4096, 128256), (256, 1000)], [], independent=True
)
_NETWORKS = Family(  # of which there are more than two: long rows, and on chip
    math.prod,
    _ROWS,
    [*_ROWS, (4096, 128256)],
    [(4096, 128256), (8192, 8192), (256, 1000)],
    [(4096, 128256), (8192, 8192), (256, 1000)],
    independent=True,
)
FAMILIES = {  # by problem, or by loss where a loss differs
    "rows": Family(
        math.prod,
        _ROWS,
        [*_ROWS, (4096, 128256)],
        [(4096, 128256), (8192, 8192), (256, 1000), (8, 128256)],
        # long rows, off the boundary of 16 bytes, fewer than multiprocessors, on chip, many in one
        [(4096, 128256), (4096, 151669), (8, 128256), (8192, 8192), (256, 1000), (128, 10)],
        independent=True,
    ),
    "relations": Family(
        lambda shape: shape[0] ** 2 * sum(shape),  # all cosines, and all differences
        _RELATIONS,
        [*_RELATIONS, (4096, 512)],
        [(1024, 512), (256, 512)],
        # several programs for a third of each tile's points, and one
        [(2048, 1024), (1024, 512), (256, 512), (64, 128)],
    ),
    "gram": Family(lambda shape: shape[0] * max(shape), _GRAMS, _GRAMS, [(2048, 512)], []),
    "moments": Family(
        math.prod,
        _MAPS,
        [*_MAPS, (64, 256, 128, 128)],
        [(64, 256, 128, 128), (64, 512, 28, 28)],
        # a walk over the channels, positions that are no whole vectors, and one tile of each map
        [(16, 256, 64, 64), (64, 512, 14, 14), (16, 64, 8, 8)],
        independent=True,
    ),
    "embedding_mse": Family(
        math.prod,
        _TOKENS,
        [*_TOKENS, (65536, 1024)],
        [(65536, 1024)],
        # rows that are one tile, and longer ones
        [(4096, 768), (512, 8192)],
        independent=True,
    ),
    # the kernels are those of "rows"
    "wsld": _LABELLED,
    # with and without a teacher: long rows, off the boundary, several programs for each; on chip
    "corrected": _LABELLED._replace(
        compiled_sizes=[(4096, 128256), (4096, 151669), (8, 128256), (8192, 8192), (256, 1000)]
    ),
    "levels": Family(math.prod, _LEVELS, _LEVELS, [(256, 1000)], []),
    "ensembles": _NETWORKS,
    # the kernels are those of "rows"
    "channel_wise": Family(
        math.prod,
        _CHANNELS,
        [*_CHANNELS, (64, 256, 128, 128)],
        [(64, 256, 128, 128)],
        [],
        independent=True,
    ),
    "localization": Family(
        math.prod, _EDGES, [*_EDGES, (1 << 20, 17)], [(1 << 20, 17)], [], independent=True
    ),
    # tokens and vocabularies of models with other tokenizers
    "sorted_rows": _VOCABULARIES,
    "matched_kl": _VOCABULARIES,
    "projected_kl": _VOCABULARIES,
    "uskd": _VOCABULARIES._replace(  # classes of ImageNet, and of its whole
        sizes=[(256, 1000), (512, 21841)],
        gpu_sizes=[(4096, 1000), (4096, 21841)],
        headlines=[(4096, 21841)],
    ),
    "alm": Family(math.prod, [(8, 512), (64, 1024)], [(64, 1024)], [(64, 1024)], []),
    "ibot": Family(
        lambda shape: N_PATCHES * math.prod(shape),
        _PROTOTYPES,
        _PROTOTYPES,
        [(256, 8192)],
        [],
        independent=True,
    ),
    "mutual_kl": _NETWORKS,
    "koleo": Family(lambda shape: 4 * shape[0] ** 2, _GLOBAL, _GLOBAL, [(1024, 768)], []),
    "nst": _CROSSED,
    "fsp": _CROSSED,
    "vid": Family(math.prod, _MAPS, _MAPS, [(16, 256, 64, 64)], []),
    "attention_mse": Family(
        math.prod, _SCORES, [*_SCORES, (8, 32, 1024, 1024)], [(8, 32, 1024, 1024)], []
    ),
    "tokens": _TOKENS_BY_HEADS,
    # heads that are wider than the kernels' tiles, by the portable engine
    "gram_anchoring": _PATCHES,
    "cka": _PATCHES,
    "pairs": _PAIRS,
    # other widths, and batches whose similarities fit into no memory
    "info_nce": _PAIRS._replace(
        sizes=[
            *_PAIRS.sizes,
            *[(4096, 64), (4096, 512), (4096, 1024), (16384, 256), (32768, 256), (65536, 64)],
        ]
    ),
    "clip_contrastive": _PAIRS._replace(sizes=[*_PAIRS.sizes, (65536, 64)]),
    "similarity_kl": _PAIRS._replace(compiled_sizes=[(32768, 256), (4096, 64)]),
    "linear": Family(
        lambda shape: shape[0] * shape[-1],  # logits
        _HEADS,
        [_HEADS[-1], *_OF_LANGUAGE_MODELS],
        _OF_LANGUAGE_MODELS,
        [],  # the kernels are those of "rows"
    ),
    "dino": Family(
        lambda shape: N_CROPS[0] * math.prod(shape),
        _CROPS,
        [*_CROPS, (64, 65536), (64, 131072)],
        [(64, 65536)],
        [],  # the kernels are those of "rows"
        independent=True,
    ),
}


INPUTS: dict[str, Inputs] = {
    "alm": likelihoods,
    "fsp": maps_of_layers,
    "vid": maps_and_variances,
    "minilm_relation": relations,
    "kd": with_labels,
    "decoupled_kd": with_labels,
    "nkd": with_labels,
    "wsld": with_labels,
    "mft": with_labels,
    "teacher_free_kd": one_network,
    "uskd": with_weak_logits,
    "dino": crops,
    "linear_kd": heads,
    "hint": weighted_maps,
    "info_nce": both_trained,
    "clip_contrastive": towers(1),
    "siglip": towers(2),
    "nt_xent": views,
    "sup_con": with_classes,
}
# what the tests call with rows, or with a bias, and is measured otherwise
PUBLIC = {"channel_wise": fastkd.channel_wise, "linear_kd": fastkd.linear_kd}
OPTIONS: dict[str, Mapping[str, Any]] = {
    "dist_kd": {"temperature": T},
    "correlation_congruence": {"form": "kernel"},
    "mft": {"threshold": 0.2, "temperature": T},
    "teacher_free_kd": {"correct_probability": 0.99, "temperature": 20.0},
    "token_relation": {"heads": 12},
    "minilm_relation": {"n_heads": 12},
}


class Workload(NamedTuple):
    """A loss as it is measured."""

    case: Case
    family: Family
    inputs: Inputs
    options: Mapping[str, Any]
    eager: Callable[..., Tensor]  # the expression that people write
    of_options: str = ""  # other options, in words
    ours: Callable[..., Tensor] | None = None  # the loss with those
    others: Mapping[str, Callable[..., Tensor]] = {}  # other losses, which are timed beside it

    @property
    def name(self) -> str:
        return self.case.name + "-teacher_gradient" * ("teacher_gradient" in self.options)

    @property
    def problem(self) -> str | None:
        return self.case.problem

    @property
    def label(self) -> str:
        return f"{self.name}, {self.of_options}" if self.of_options else self.name

    def fastkd(self, *inputs: Tensor) -> Tensor:
        if self.ours is not None:
            return self.ours(*inputs)
        return PUBLIC.get(self.name, self.case.loss)(*inputs, **self.options)


def inputs_of(case: Case) -> Inputs:
    """Return what makes the inputs: of two networks of one width, or as in the tests."""
    _, *others = case.inputs((2,), 4, device="meta")
    if len(others) == 1 and not others[0].requires_grad:
        return two_networks
    return lambda shape, dtype, device="cpu": case.inputs(
        shape[:-1], shape[-1], dtype, device=device
    )


def workload(case: Case) -> Workload:
    default = {"temperature": T} if "temperature" in case.options else {}
    options = OPTIONS.get(case.name, default)

    def published(*inputs: Tensor) -> Tensor:
        return case.published(*inputs, **options).mean()

    return Workload(
        case,
        FAMILIES.get(case.name) or FAMILIES[case.problem or "rows"],
        INPUTS.get(case.name) or inputs_of(case),
        options,
        getattr(eager, case.name, published),
    )


def learning(workload: Workload) -> Workload:
    """Return the workload whose teacher gets a gradient too."""

    def inputs(*arguments: Any) -> list[Tensor]:
        return [x.requires_grad_() for x in workload.inputs(*arguments)]

    return workload._replace(inputs=inputs, options={**workload.options, "teacher_gradient": True})


WORKLOADS = [workload(case) for case in LOSSES]
BY_NAME = {workload.name: workload for workload in WORKLOADS}
FUSED = [x for x in WORKLOADS if x.case.has_kernels and x.family.compiled_sizes]
BOTH = [learning(x) for x in FUSED if "teacher_gradient" in x.case.parameters]
