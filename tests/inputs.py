"""Inputs of losses, the same on every device: functions of (examples, width, dtype, seed, device).

What is trained requires grad.
"""

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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


Inputs = Callable[..., list[Tensor]]


def logits(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    student, teacher = 3 * normal(2, *examples, width, seed=seed, device=device)
    return [student.to(dtype).requires_grad_(), teacher.to(dtype)]


def peers(n: int) -> Inputs:
    """Return the logits of n networks, all of which are trained."""

    def inputs(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
        tensors = 3 * normal(n, *examples, width, seed=seed, device=device)
        return [x.to(dtype).requires_grad_() for x in tensors]

    return inputs


def logits_of_three(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return logits of a student and of three teachers."""
    tensors = 3 * normal(4, *examples, width, seed=seed, device=device)
    return [x.to(dtype).requires_grad_(i < 1) for i, x in enumerate(tensors)]


def logits_and_labels(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(width, examples, generator=generator).to(device)
    return [*logits(examples, width, dtype, seed, device), labels]


def with_soft_labels(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return logits and probabilities of classes, as mixup gives them."""
    probabilities = normal(*examples, width, dtype=dtype, seed=seed + 2, device=device).softmax(-1)
    return [*logits(examples, width, dtype, seed, device), probabilities]


def with_class_weights(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return logits, labels, and a weight of each class."""
    weights = 0.1 + normal(width, dtype=dtype, seed=seed + 2, device=device).square()
    return [*logits_and_labels(examples, width, dtype, seed, device), weights]


def two_vocabularies(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return logits of which the teacher has two more."""
    student = 3 * normal(*examples, width, seed=seed, device=device)
    teacher = 3 * normal(*examples, width + 2, seed=seed + 1, device=device)
    return [student.to(dtype).requires_grad_(), teacher.to(dtype)]


def with_matched_ids(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return further the ids of two thirds of the entries, the last ones among them."""
    generator, n = torch.Generator().manual_seed(seed), max(1, 2 * width // 3)
    ids = [
        torch.cat([torch.tensor([last]), torch.randperm(last, generator=generator)[: n - 1]])
        for last in (width - 1, width + 1)
    ]
    return [*two_vocabularies(examples, width, dtype, seed, device), *(x.to(device) for x in ids)]


def with_a_map(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return further three entries of the teacher for each of the student's, or fewer, and shares.

    The teacher's first entry is reached by none.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, width + 2, (width, 3), generator=generator)
    ids[::4, 1] = -1
    ids[-1, -1] = width + 1
    shares = torch.rand(width, 3, generator=generator, dtype=torch.float64) + 0.1
    tensors = two_vocabularies(examples, width, dtype, seed, device)
    return [*tensors, ids.to(device), shares.to(device, dtype)]


def likelihoods(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    student, teacher = -3 * normal(2, *examples, width, seed=seed, device=device).abs()
    return [student.to(dtype).requires_grad_(), teacher.to(dtype)]


def logits_of_one_network(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    student, _, labels = logits_and_labels(examples, width, dtype, seed, device)
    return [student, labels]


def with_weak_logits(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return logits of one network, labels, and logits of an earlier layer."""
    inputs = logits_of_one_network(examples, width, dtype, seed, device)
    weak = normal(*examples, width, dtype=dtype, seed=seed + 1, device=device)
    return [*inputs, weak.requires_grad_()]


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


def heads(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return hidden states and heads of two networks, labels, some of them ignored, and a bias."""
    *batches, n = examples
    found = []
    for i, size in enumerate((width, width + 2)):
        hidden = normal(*batches, n, size, dtype=dtype, seed=seed + i, device=device)
        head = 2 * normal(*batches, 13, size, seed=seed + 3 + i, device=device) / size**0.5
        found += [hidden.requires_grad_(i == 0), head.to(dtype).requires_grad_(i == 0)]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(13, (*batches, n), generator=generator).to(device)
    labels[..., 2::5] = -100
    bias = normal(*batches, 13, dtype=dtype, seed=seed + 9, device=device)
    return [*found, labels, bias.requires_grad_()]


def heads_of_two_teachers(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return the same with the hidden states and the head of a second teacher after the first."""
    *batches, n = examples
    networks, rest = (found := heads(examples, width, dtype, seed, device))[:4], found[4:]
    hidden = normal(*batches, n, width + 1, dtype=dtype, seed=seed + 11, device=device)
    head = normal(*batches, 13, width + 1, dtype=dtype, seed=seed + 12, device=device)
    return [*networks, hidden, head, *rest]


def crops(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return outputs of four and two crops and a centre, small as the temperatures want them."""
    *batches, n = examples
    student = 0.3 * normal(*batches, 4, n, width, seed=seed, device=device)
    teacher = 0.3 * normal(*batches, 2, n, width, seed=seed + 1, device=device)
    center = 0.3 * normal(*batches, width, seed=seed + 2, device=device)
    wide = torch.promote_types(dtype, torch.float32)
    return [student.to(dtype).requires_grad_(), teacher.to(dtype), center.to(wide)]


def patches(examples, width, dtype=torch.float64, seed=0, device=DEVICE):
    """Return outputs for five patches of each image, a mask of them, and a centre."""
    student, teacher = (
        0.3 * normal(*examples, 5, width, seed=seed + i, device=device) for i in (0, 1)
    )
    mask = normal(*examples, 5, seed=seed + 3, device=device) > -0.5
    mask[..., -1] = True  # where a NaN must show
    mask[..., : examples[-1] // 3, :] = False
    center = 0.3 * normal(width, seed=seed + 2, device=device)
    wide = torch.promote_types(dtype, torch.float32)
    return [student.to(dtype).requires_grad_(), teacher.to(dtype), mask, center.to(wide)]


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
