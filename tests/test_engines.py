"""The contract of engines: whatever is asked of it, an engine solves a problem as its twin does."""

import importlib

import pytest
import torch
from cases import named, of
from choice import quick_if
from exactness import assert_same, results
from force import in_chunks_of, through_chunks
from inputs import DEVICE, INTERPRETED, logits_and_labels, normal

import fastkd
from fastkd.problems.pairs import Pairs, SoftPairs
from fastkd.problems.relations import Relations
from fastkd.problems.rows import Rows

DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jensen_shannon": dict(beta=0.3),
    "skew_kl": dict(skew=0.2),
    "skew_reverse_kl": dict(skew=0.2),
    "symmetric_kl": dict(weight=0.3),
    "total_variation": {},
    "soft_cross_entropy": {},
}
WIDTHS = [17, 8999]


@pytest.fixture
def solver(engine):
    """Return the module that solves a problem."""
    path = "fastkd.kernels.{}.launch" if engine == "triton" else "fastkd.portable.{}"
    return lambda problem: importlib.import_module(path.format(problem))


# ------------------------------------------------------------------------------------------- rows


def rows(divergence, n_cols=17, dtype=torch.float64, **others):
    """Return a problem with all that is optional."""
    student, teacher, labels = logits_and_labels((4,), n_cols, dtype)
    labels[2] = -1
    return Rows(
        student=student.detach(),
        teacher=teacher,
        labels=labels,
        row_mask=torch.tensor([True, True, False, True], device=DEVICE),
        student_temperature=2.0,
        teacher_temperature=0.7,
        weight=(*DIVERGENCES[divergence].values(), 0.0)[0],
        scale=3.0,
        divergence=divergence,
    )._replace(**others)


def upstreams(dtype=torch.float64):
    return normal(4, dtype=dtype, seed=8), normal(4, dtype=dtype, seed=9)


def gradient_of_rows(engine, problem, saved, upstream):
    """Return what the op makes of statistics, or of gradients that `forward` has made already."""
    statistics, *gradients = saved
    if statistics is not None:
        return engine.backward(problem, statistics, upstream)
    parts = zip(gradients, upstream, strict=True)
    return sum(gradient * factor[..., None] for gradient, factor in parts if factor is not None)


@pytest.mark.parametrize("n_cols", WIDTHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@quick_if(lambda divergence, n_cols: n_cols == 17 or divergence in ("forward_kl", "jensen_shannon"))
def test_gradients_of_rows_are_those_of_their_values(divergence, n_cols, solver):
    """Temperatures 2 and 0.7 of the networks are one of 1 of logits divided by them."""
    problem, weights = rows(divergence, n_cols), upstreams()
    student = problem.student.clone().requires_grad_()
    formula = getattr(fastkd, divergence).formula
    options = dict(temperature=1.0, scale_t2=True) | DIVERGENCES[divergence]
    losses = problem.row_mask * 3 * formula(student / 2, problem.teacher / 0.7, **options)
    ce = torch.nn.functional.cross_entropy(
        student, problem.labels, ignore_index=-1, reduction="none"
    )
    total = (weights[0] * losses + weights[1] * ce).sum()
    (gradient,) = torch.autograd.grad(total, student)
    engine = solver("rows")
    for needs_grad in (False, True):  # an engine may prepare for it
        found, saved = engine.forward(problem, (needs_grad,))
        assert_same(found, [losses, ce])
        assert_same([gradient_of_rows(engine, problem, saved, weights)], [gradient], 1e-11)
        if not needs_grad:
            shapes = [x.shape for x in saved if isinstance(x, torch.Tensor)]
            assert shapes == [(4, engine.n_statistics(problem))]
    first = gradient_of_rows(engine, problem, saved, (weights[0], None))
    second = gradient_of_rows(engine, problem, saved, (None, weights[1]))
    assert_same([first + second], [gradient], 1e-11)
    assert first.any() and second.any()


@pytest.mark.parametrize("n_cols", WIDTHS)
@quick_if(lambda n_cols, engine: engine != "triton" or n_cols == WIDTHS[0])
def test_numbers_of_rows_may_be_tensors_and_the_rest_missing(n_cols, solver):
    """Temperatures that change at every step live on the device; None is labels for no row."""
    engine, problem = solver("rows"), rows("jensen_shannon", n_cols)
    numbers = dict(student_temperature=2.5, teacher_temperature=0.75, weight=0.25, scale=3.0)
    on_device = {name: torch.tensor(x, device=DEVICE) for name, x in numbers.items()}
    neutral = dict(
        labels=torch.full((4,), -1, device=DEVICE),
        row_mask=torch.ones(4, dtype=torch.bool, device=DEVICE),
    )
    pairs = [(numbers, on_device), *(({k: x}, {k: None}) for k, x in neutral.items())]
    for options, others in pairs:
        expected, found = [], []
        for given, kept in ((options, expected), (others, found)):
            asked = problem._replace(**given)
            losses, saved = engine.forward(asked, (True,))
            upstream = (upstreams()[0], None if asked.labels is None else upstreams()[1])
            kept += [losses[0], gradient_of_rows(engine, asked, saved, upstream)]
        assert_same(found, expected)


# ------------------------------------------------------------------------------------------ pairs

FORMS = {
    "linear": {},
    "classes": {},
    "softplus": dict(columns=True),
    "softplus of two views": dict(two_views=True),
    "softplus with further negatives": dict(further=3),
    "linear with further negatives": dict(further=3),
    "pairs": {},
}
QUICK_FORMS = ("linear", "classes", "softplus with further negatives")
NEEDS = [(True, True, True, True), (True, False, False, False), (False, True, True, False)]
NEEDS += [(False, False, True, True), (False, False, False, False)]


NEEDS_EMBEDDINGS = {Pairs: (True, True, True, False, False), SoftPairs: (True,) * 3}


def pairs(form, first, n=34, n_keys=85, columns=False, two_views=False, further=0):
    """Return queries of one rank, whose positive keys are somewhere among those of all ranks."""
    scale = torch.tensor(3.0, dtype=torch.float64, device=DEVICE)
    positive = positive_logits = normal(n, seed=3)
    bank, classes, query_classes = normal(9, 5, seed=2), None, None
    if form == "classes":
        classes = torch.arange(n_keys, device=DEVICE) % 7
        query_classes, bank, positive_logits = classes[first : first + n], None, None
    query, key = normal(n, 5), normal(n_keys, 5, seed=1)
    if form == "classes":  # whose positive keys are those of the other examples of a class
        query = key[first : first + n].clone()
    return Pairs(
        query=query,
        key=key,
        scale=scale,
        positive_logits=positive_logits,
        further_logits=normal(n, further, seed=7) if further else None,
        weights=positive.square(),
        bank=bank,
        masked_pairs=None,
        key_positive_logits=normal(n_keys, seed=4) if columns else None,
        key_weights=normal(n_keys, seed=5).square() if columns else None,
        classes=classes,
        query_classes=query_classes,
        attractions=None,
        attractions_differ=True,
        over_anchors=False,
        form=dict(classes="linear").get(form, form.split()[0]),
        first=first,
        two_views=two_views,
        normalize=True,
        half="",
        group="",
    )


def soft_pairs(first, n=34, n_keys=85):
    scale = torch.tensor(3.0, dtype=torch.float64, device=DEVICE)
    networks = [
        x
        for width, seed in ((5, 0), (7, 2))
        for x in (normal(n, width, seed=seed), normal(n_keys, width, seed=seed + 1), scale)
    ]
    return SoftPairs(*networks, normal(n, seed=5).square(), "kl", first, True, "", "")


def assert_twins_agree(module, problem, needs_grad):
    """Compare with the portable engine in several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        in_chunks_of(1000, patch)  # so many that S is not kept
        twin = importlib.import_module("fastkd.portable.pairs")
        loss, gradients = twin.value_and_gradients(problem, needs_grad)
    found, of_found = module.value_and_gradients(problem, needs_grad)
    assert [x is not None for x in of_found] == [*needs_grad]
    pairs = zip([found, *of_found], [loss, *gradients], strict=True)
    for x, y in ((x, y) for x, y in pairs if x is not None):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13 * float(y.abs().max()))


# S of a small batch is kept, and kernels go by tiles or through cuBLAS
WAYS = ["portable", "triton", "triton through chunks"]


@pytest.fixture
def way(request, monkeypatch):
    if request.param == "triton through chunks":
        through_chunks(monkeypatch, columns=64)
    path = "kernels.pairs.launch" if "triton" in request.param else "portable.pairs"
    if "triton" in request.param and not INTERPRETED:
        pytest.skip("compared in Triton's interpreter: TRITON_INTERPRET=1")
    return importlib.import_module(f"fastkd.{path}")


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("first", [0, 37, 51])  # 51: the last rank
@pytest.mark.parametrize("form", FORMS)
@quick_if(lambda form, first, way: first == 37 and (way == "portable" or form in QUICK_FORMS))
def test_queries_of_one_rank(form, first, way, request):
    if "columns" in FORMS[form] and "portable" in request.node.name:
        return  # without a group no columns have losses on other ranks
    problem = pairs(form, first, **FORMS[form])
    is_quick = "portable" in request.node.name
    for needs_grad in NEEDS if is_quick else NEEDS[0:3:2] if first == 37 else NEEDS[:1]:
        needs_further = needs_grad[3] and problem.further_logits is not None
        needs_logits = needs_grad[3] and problem.positive_logits is not None
        assert_twins_agree(way, problem, (*needs_grad[:3], needs_logits, needs_further))


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("first", [0, 37, 51])  # 51: the last rank
@quick_if(lambda first, way: first == 37)
def test_similarities_of_one_rank(first, way):
    for needs_grad in ((True,) * 3, (False, True, True), (True, False, False)):
        assert_twins_agree(way, soft_pairs(first), needs_grad)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_rank_without_queries(way):
    """Its keys, and those of others, get no gradient from it."""
    problems = [pairs(form, 37, n=0, **options) for form, options in FORMS.items()]
    for problem in (*problems, soft_pairs(37, n=0)):
        loss, gradients = way.value_and_gradients(problem, NEEDS_EMBEDDINGS[type(problem)])
        assert loss == 0
        for x, like in zip(gradients, problem[:3], strict=False):
            assert x.shape == like.shape and not x.any()


def test_slopes_that_are_small_survive_float16(solver, engine):
    """Slopes of each pair are 1e-9."""
    half = [normal(5, 32).half(), normal(2000, 32, seed=1).half()]
    positive, weights = torch.tensor([[20.0], [0.2]], device=DEVICE).expand(2, 5).contiguous()
    twin = importlib.import_module("fastkd.portable.pairs")

    def gradients(module, dtype, kind):
        numbers = [x.to(dtype) for x in (*half, torch.ones((), device=DEVICE), positive, weights)]
        *embeddings, positive_logits, of_examples = numbers
        problem = Pairs(
            *embeddings, positive_logits, None, of_examples, *[None] * 7,
            False, False, "pairs", -1, False, True, kind, "",
        )  # fmt: skip
        return module.value_and_gradients(problem, (True, True, False, False, False))[1][:2]

    found = gradients(solver("pairs"), torch.float32, "float16")
    for x, y in zip(found, gradients(twin, torch.float64, ""), strict=True):
        assert (x.double() - y).norm() <= 3e-3 * y.norm()


# -------------------------------------------------------------------------------------- relations


@pytest.mark.parametrize("parts", ["distance", "angle", "both"])
@pytest.mark.parametrize("sizes", [[2, 4, 3], [33, 0, 7]], ids=str)
@quick_if(lambda parts, sizes: parts == "both" or sizes[0] == 2)
def test_parts_of_a_batch_have_shares_of_the_loss(parts, sizes, solver):
    (whole, *_) = of("relations")
    inputs = whole.inputs((sum(sizes),), 3)
    weights = 2.0 * (parts != "angle"), 4.0 * (parts != "distance")
    options = dict(distance_weight=weights[0], angle_weight=weights[1])
    expected = results(lambda *x: fastkd.rkd(*x, **options), inputs)
    upstream = normal(seed=99)
    student, teacher = inputs[0].detach(), inputs[1]
    losses, gradients, first = [], [], 0
    for n in sizes:
        mine = student[first : first + n]
        problem = Relations(mine, teacher, student, *weights, 1.0, parts, "default", first)
        loss, (gradient,) = solver("relations").value_and_gradients(problem, (True,))
        without, (nothing,) = solver("relations").value_and_gradients(problem, (False,))
        assert nothing is None
        assert_same([without], [loss])
        losses, gradients, first = [*losses, loss], [*gradients, gradient], first + n
    assert_same([torch.stack(losses).sum(), upstream * torch.cat(gradients)], expected)


# --------------------------------------------------------------------- kernels that do not fit

COSINES, LARGEST, DIVERGENCES_OF_TOKENS, SQUARES_OF_TOKENS = named(
    "hint-weights-kind=cosine", "attention_transfer-p=3.0-kind=max", "token_relation-heads=2",
    "token_relation-mask-divergence=mse-causal=True",
)  # fmt: skip
TOO_LARGE = [
    (COSINES, "moments.sweeps.values"),
    (COSINES, "moments.sweeps.slopes"),
    (LARGEST, "moments.sweeps.slopes"),
    (LARGEST, "moments.sweeps.map_differences"),
    (DIVERGENCES_OF_TOKENS, "tokens.launch.relation_gradients"),
    (SQUARES_OF_TOKENS, "tokens.launch.relation_squares"),
]


class TooLarge:
    """A kernel that fits on no GPU."""

    def __getitem__(self, grid):
        from triton.runtime.errors import OutOfResources

        def launch(*arguments, **options):
            raise OutOfResources(300, 200, "shared memory")

        return launch


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("case, kernel", TOO_LARGE, ids=str)
def test_the_portable_engine_does_what_fits_on_no_gpu(case, kernel, monkeypatch):
    """A backward takes the statistics of a forward that did fit; a warning says so once."""
    from fastkd.kernels import device

    inputs = case.inputs((5,), 4)
    with fastkd.backend("portable"):
        expected = results(case, inputs)
    device._warn_of_portable_engine.cache_clear()
    monkeypatch.setattr(f"fastkd.kernels.{kernel}", TooLarge())
    with fastkd.backend("triton"), pytest.warns(UserWarning) as warned:
        assert_same(results(case, inputs), expected)
        assert_same(results(case, inputs), expected)
    # numpy, which the interpreter computes with, warns in another category
    (message,) = (str(x.message) for x in warned if x.category is UserWarning)
    assert "needs more shared memory than this GPU gives a program (300, not 200)" in message
