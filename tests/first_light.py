"""One small problem for each kernel: what a GPU runs first, in the order of what it tells."""

from typing import NamedTuple

import torch
from cases import Case, named
from inputs import logits_of_three, peers

import fastkd

HALF, FLOAT = torch.bfloat16, torch.float32
# of rows: several of them in one program, and several programs for each
SHORT, SPLIT = ((5,), 1000), ((3,), 20011)
# of embeddings: tiles, the widest ones, and chunks through cuBLAS
TILES, WIDE, CHUNKS = ((67,), 33), ((150,), 256), ((67,), 512)


class Light(NamedTuple):
    """A problem, and the kernels that solve it."""

    case: Case
    examples: tuple[int, ...]
    width: int
    dtype: torch.dtype
    kernels: tuple[str, ...]

    def __str__(self) -> str:
        sizes = "x".join(map(str, (*self.examples, self.width)))
        return f"{self.kernels[-1]}-{self.case.name}-{sizes}-{str(self.dtype)[6:]}"

    def inputs(self, **options) -> list[torch.Tensor]:
        return self.case.inputs(self.examples, self.width, self.dtype, **options)


def _routed(student, *teachers, **options):
    """Compute the loss of rows that learn from one of the teachers each."""
    index = torch.arange(len(student), device=student.device) % len(teachers)
    return fastkd.multi_teacher(student, teachers, teacher_index=index, **options)


def _learning(student, teacher, **options):
    """Compute the loss of two networks that both learn."""
    return fastkd.forward_kl(student, teacher, teacher_gradient=True, **options)


_ROUTED = Case(_routed, "ensembles", logits_of_three, _routed, per_example=True)
_LEARNING = Case(_learning, "softened", peers(2), _learning, per_example=True)


def _light(case, shape, *kernels, dtype=HALF):
    return Light(*named(case), *shape, dtype, kernels)


_KL, _JSD = "forward_kl-temperature=4.0", "jensen_shannon-temperature=2.0-beta=0.1"
_KD = "kd-temperature=4.0-alpha=0.3-divergence=forward_kl"
_CLIP, _SIGLIP = "clip_contrastive-logit_scale=5.0", "siglip-logit_scale=5.0-logit_bias=-2.0"
_MSE = "token_relation-divergence=mse-normalize=True-temperature=1.0"
_MUTUAL = "mutual_kl-2 networks-temperature=2.0"
_MIXED = "linear_kd-two teachers-alpha=0.3-temperature=2.0"
_AVERAGED = "multi_teacher-temperature=2.0-divergence=jensen_shannon-beta=0.1-combine=logits"
_COSINE = "hint-weights-kind=cosine"
_WHOLE, _LONG = ("whole_rows",), ("row_statistics", "combine", "gradient", "certain_classes")
_CORRECTED = ("corrected_sums", "combine_corrected", "corrected_gradient")
_MFT = "mft-threshold=0.2-temperature=1.0"
_VIRTUAL = "teacher_free_kd-correct_probability=0.99-temperature=20.0"
_SIDES = ("lay_out", "gradients")
_COLUMNS = (
    *_SIDES, "row_and_column_log_sums", "column_log_sums", "log_sum_penalties", "weighed_sums",
)  # fmt: skip
_POSITIVES = (*_SIDES, "log_sums", "log_sum_penalties", "weighed_sums")
_DIVERGENCES = (*_SIDES, "divergences", "weighed_differences")
_CHUNK = ("exponentials_of_chunk", "log_sums_of_chunk")
_DIFFERENCES = ("divergences_of_chunk", "differences_of_chunk")
_TOKENS = ("relation_divergences", "relation_gradients")
_EDGES = ("transposes", "squares", "distances", "edges", "sum_splits", "laplacian")

LIGHTS = [
    _light(_KL, SPLIT, *_LONG),
    _light(_KL, SHORT, *_WHOLE),
    _light(_MFT, SPLIT, *_CORRECTED),
    _light(_MFT, SHORT, "corrected_rows"),
    _light("info_nce", TILES, *_POSITIVES),
    _light("sup_con", TILES, "class_numbers", *_POSITIVES),
    _light(_CLIP, TILES, *_COLUMNS),
    _light(_SIGLIP, TILES, *_SIDES, "softplus_sums", "pair_penalties", "weighed_sums"),
    _light("similarity_kl", TILES, *_DIVERGENCES),
    _light("info_nce", CHUNKS, *_CHUNK),
    _light(_CLIP, CHUNKS, *_CHUNK, "fold_chunk"),
    _light(_SIGLIP, CHUNKS, "pairs_of_chunk"),
    _light("similarity_kl", CHUNKS, *_DIFFERENCES),
    _light("rkd", ((33,), 17), *_EDGES),
    _light("embedding_mse", ((33,), 140), "values", "slopes"),
    _light("attention_transfer", ((7,), 5), "values", "slopes", "map_differences"),
    _light("token_relation-heads=2", ((3,), 16), *_TOKENS),
    _light(_MSE, ((3,), 16), "relation_squares"),
    _light("multi_teacher-temperature=2.0", SHORT, "whole_ensembles"),
    _light("multi_teacher-temperature=2.0", SPLIT, "ensemble_statistics", "ensemble_gradient"),
    _light(_MUTUAL, SHORT, "whole_peers"),
    _light(_MUTUAL, SPLIT, "peer_statistics", "peer_gradients"),
    _light(_MIXED, TILES, "whole_rows", "add_probabilities"),
    Light(_LEARNING, *SPLIT, HALF, (*_LONG[:2], "finish_rows", "both_gradients")),
    Light(_LEARNING, *SHORT, HALF, (*_WHOLE, "both_of_whole_rows")),
    # the same kernels with other options and precisions
    _light(_AVERAGED, SHORT, "whole_ensembles", dtype=FLOAT),
    Light(_ROUTED, *SHORT, HALF, ("whole_ensembles",)),
    Light(_ROUTED, *SPLIT, HALF, ("ensemble_statistics", "ensemble_gradient")),
    _light(_JSD, SPLIT, *_LONG),
    _light(_JSD, SHORT, *_WHOLE),
    _light(_KD, SPLIT, *_LONG),
    _light(_KD, SHORT, *_WHOLE),
    _light("total_variation-temperature=2.0", SPLIT, *_LONG),
    _light(_KL, SPLIT, *_LONG, dtype=FLOAT),
    _light("dino", SHORT, *_WHOLE),
    _light("decoupled_kd", SPLIT, *_LONG),
    _light("decoupled_kd-standardize=True", SHORT, *_WHOLE),
    _light("nkd", SHORT, *_WHOLE),
    _light(_VIRTUAL, SPLIT, *_CORRECTED),
    _light(_VIRTUAL, SHORT, "corrected_rows"),
    _light("channel_wise-temperature=4.0", SHORT, *_WHOLE),
    _light("info_nce", WIDE, *_POSITIVES),
    _light(_CLIP, WIDE, *_COLUMNS),
    _light("similarity_kl", ((150,), 250), *_DIVERGENCES),
    _light("nt_xent", TILES, *_POSITIVES),
    _light("nt_xent", CHUNKS, *_CHUNK),
    _light("sup_con", CHUNKS, *_CHUNK),
    _light("info_nce", TILES, *_CHUNK, dtype=FLOAT),
    _light("similarity_kl", TILES, *_DIFFERENCES, dtype=FLOAT),
    _light("rkd", ((40,), 64), *_EDGES, dtype=FLOAT),
    _light("rkd_distance", ((40,), 64), *_EDGES[:3], *_EDGES[4:]),
    _light("rkd_angle", ((40,), 64), "transposes", "squares", "edges", "sum_splits", "laplacian"),
    _light("hint-weights", ((20,), 64), "values", "slopes"),
    _light(_COSINE, ((7,), 5), "values", "slopes"),
    _light("minilm_relation-n_heads=2-weights=[1.0, 0.5]", ((3,), 16), *_TOKENS),
    _light("gram_anchoring", ((2,), 60), "relation_squares"),
    _light("embedding_mse", ((33,), 140), "values", "slopes", dtype=FLOAT),
]
