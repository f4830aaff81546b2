"""Particulars of relations between tokens: masks, many and few tokens, other libraries' losses."""

import math

import published
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, LOSSES
from choice import ENGINES, full, pairwise, quick_if
from exactness import assert_as_exact, assert_same, by_formula, exact, results
from force import in_chunks_of
from inputs import DEVICE, INTERPRETED, normal
from meter import PeakMemory

import fastkd

MASKED = [case for case in CASES if "mask" in case.id and case.name in ("token_relation", "cka")]
MASKED += [case for case in CASES if "mask" in case.id and case.name == "gram_anchoring"]
TOKENS = [c for c in LOSSES if c.name in ("token_relation", "gram_anchoring", "cka")]


def tokens(*shape, wider=0, seed=0, dtype=torch.float64):
    student = normal(*shape, seed=seed, dtype=dtype).requires_grad_()
    return student, normal(*shape[:-1], shape[-1] + wider, seed=seed + 1, dtype=dtype)


def assert_close(found, expected):
    """Compare in units of one: a token alone has the loss and the gradient 0, up to rounding."""
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------- what is computed


@pairwise(
    engine=ENGINES,
    n=[1, 2, 31, 70, 130],  # a tile, several, and blocks and groups of rows
    heads=[1, 3],
    divergence=["kl", "mse"],
    causal=[False, True],
    normalize=[False, True],
    masked=[False, True],
    n_sequences=[1, 5],
)
def test_every_option(engine, n, heads, divergence, causal, normalize, masked, n_sequences):
    student, teacher = tokens(n_sequences, n, 3 * heads, wider=2 * heads)
    mask = normal(n_sequences, n, seed=3) > -0.3 if masked else None
    options = dict(
        heads=heads, divergence=divergence, causal=causal, normalize=normalize, temperature=0.7,
        teacher_temperature=None if n == 31 else 1.3, mask=mask,
    )  # fmt: skip

    def loss(student, teacher):
        return fastkd.token_relation(student, teacher, reduction="none", **options)

    truth = results(lambda *x: published.token_relation(*x, **options), [student, teacher])
    assert_close(results(loss, [student, teacher]), truth)


@pairwise(
    engine=ENGINES,
    n=[1, 31, 67],
    removed=["both", "teacher", None],
    per_image=[True, False],
    masked=[False, True],
    is_one_image=[False, True],
)
def test_every_option_of_anchoring(engine, n, removed, per_image, masked, is_one_image):
    inputs = tokens(*([] if is_one_image else [3]), n, 4, wider=1)
    mask = normal(*inputs[0].shape[:-1], seed=3) > -0.3 if masked else None
    options = dict(remove_negative=removed, per_image=per_image, mask=mask)
    found = results(lambda *x: fastkd.gram_anchoring(*x, **options), inputs)
    assert_close(found, results(lambda *x: published.gram_anchoring(*x, **options), inputs))


def test_one_sequence_needs_no_batch(engine):
    inputs = tokens(7, 6, wider=2)
    for loss in (fastkd.token_relation, fastkd.gram_anchoring, fastkd.cka):
        found = results(loss, inputs)
        batch = [x.detach()[None].requires_grad_(x.requires_grad) for x in inputs]
        value, gradient = results(lambda *x, loss=loss: loss(*x), batch)
        assert_same(found, [value, gradient[0]])
    mask = torch.arange(7, device=DEVICE) > 2
    found = results(lambda *x: fastkd.token_relation(*x, mask=mask), inputs)
    fewer = [x[3:] for x in inputs]
    assert_same(found[:1], [fastkd.token_relation(*fewer)])


def test_relations_are_added_up(engine):
    (q, q_t), (v, v_t) = tokens(3, 5, 8, wider=4), tokens(3, 5, 8, wider=4, seed=2)
    found = results(lambda *x: fastkd.minilm_relation(x, [q_t, v_t], n_heads=4), [q, v])
    one = results(lambda x: fastkd.token_relation(x, q_t, heads=4), [q])
    other = results(lambda x: fastkd.token_relation(x, v_t, heads=4), [v])
    assert_same(found, [one[0] + other[0], one[1], other[1]])
    options = dict(n_heads=4, weights=[0, torch.tensor(2.0, device=DEVICE)])
    assert_same([fastkd.minilm_relation([q, v], [q_t, v_t], **options)], [2 * other[0]])
    nothing = fastkd.minilm_relation([q], [q_t], n_heads=4, weights=[0])
    assert nothing == 0 and not torch.autograd.grad(nothing, q)[0].any()


# ------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("case", MASKED, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_tokens_reach_nothing(case, bad, engine):
    student, teacher, mask = case.inputs((4,), 5)
    expected = results(case, [student, teacher, mask])
    bad_student, bad_teacher = (
        torch.where(mask[..., None], x.detach(), bad).requires_grad_(x.requires_grad)
        for x in (student, teacher)
    )
    found = results(case, [bad_student, bad_teacher, mask])
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    assert not found[1][~mask].any() and found[1][mask].any()


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_a_mask_of_integers_is_one_of_bool_and_none_is_another_loss(case, engine):
    student, teacher, mask = case.inputs((4,), 5)
    expected = results(case, [student, teacher, mask])
    for dtype in (torch.int64, torch.uint8):
        assert_same(results(case, [student, teacher, mask.to(dtype)]), expected, 0)
    unmasked = case(student, teacher, torch.ones_like(mask))
    assert not torch.allclose(unmasked, expected[0])
    assert_same([case(student, teacher, None)], [unmasked])


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_sequences_without_tokens_are_no_part_of_the_mean(case, engine):
    student, teacher, mask = case.inputs((5,), 4)
    mask[:], mask[3:] = True, False
    options = dict(reduction="mean") if case.per_example else {}
    loss = case(student, teacher, mask, **options)
    assert_same([loss], [case(student[:3], teacher[:3], mask[:3], **options)])
    mask[:] = False
    loss = case(student, teacher, mask, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0 and not gradient.any()


def test_weights_and_a_mask(engine):
    student, teacher = tokens(4, 6, 4)
    mask = torch.ones(4, 6, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    weights = torch.tensor([2.0, 3.0, 0.0, 1.0], device=DEVICE)
    with torch.no_grad():
        student[2] = math.nan
    loss, gradient = results(
        lambda *x: fastkd.token_relation(*x, mask=mask, weights=weights), [student, teacher]
    )
    first, second = (fastkd.token_relation(student[i], teacher[i]) for i in (1, 3))
    assert_same([loss], [(3 * first + second) / 4])
    assert not gradient[[0, 2]].any() and gradient.isfinite().all()


# ----------------------------------------------------------------------------------- what is exact


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_students_near_the_teacher(divergence, normalize, engine):
    """Logarithms are subtracted before probabilities are rounded."""
    teacher = 2 * normal(3, 40, 16, dtype=torch.float32)
    student = (teacher + 1e-3 * normal(3, 40, 16, dtype=torch.float32, seed=1)).requires_grad_()
    options = dict(heads=2, divergence=divergence, normalize=normalize)

    def loss(*inputs):
        return fastkd.token_relation(*inputs, **options)

    inputs = [student, teacher]
    found, yardstick = results(loss, inputs), by_formula(loss, inputs)
    truth = by_formula(loss, exact(inputs))
    assert found[0] >= 0 and (found[0].double() - truth[0]).abs() <= 1e-6
    assert_as_exact(found[1:], yardstick[1:], truth[1:])
    same = [teacher.clone().requires_grad_(), teacher]
    loss_of_none, gradient = results(loss, same)
    assert 0 <= loss_of_none <= 1e-6 and gradient.abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [dict(heads=3), dict(normalize=True, temperature=0.07)], ids=str
)
def test_halves(dtype, options, engine):
    inputs = [x.to(dtype) for x in tokens(2, 70, 24, wider=24)]
    inputs[0] = inputs[0].detach().requires_grad_()

    def loss(*inputs):
        return fastkd.token_relation(*inputs, **options)

    (value, gradient), truth = results(loss, inputs), by_formula(loss, exact(inputs))
    assert (value.double() - truth[0]).abs() <= 1e-5 * truth[0]
    eps = torch.finfo(dtype).eps
    assert (gradient.double() - truth[1]).abs().max() <= eps * truth[1].abs().max()


def test_large_tokens(engine):
    """Exponents of many hundreds neither overflow nor are lost."""
    student, teacher = (30 * x for x in tokens(2, 9, 8))
    inputs = [student.detach().requires_grad_(), teacher]
    found = results(fastkd.token_relation, inputs)
    assert_same(found, by_formula(fastkd.token_relation, inputs))
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("student_temperature, teacher_temperature", [(3.0, 1e-2), (1e-2, 3.0)])
@pytest.mark.parametrize("causal", [False, True])
@quick_if(lambda causal, engine: engine != "triton")
def test_products_of_sizes_far_apart(student_temperature, teacher_temperature, causal, engine):
    """Maxima are subtracted from each network's own products before these are compared."""
    inputs = tokens(2, 70, 8, wider=8, dtype=torch.float32)
    options = dict(causal=causal, mask=normal(2, 70, seed=3) > -0.5)
    options |= dict(
        student_temperature=student_temperature, teacher_temperature=teacher_temperature
    )

    def loss(*inputs):
        return fastkd.token_relation(*inputs, **options)

    (value, gradient), truth = results(loss, inputs), by_formula(loss, exact(inputs))
    assert (value.double() - truth[0]).abs() <= 1e-6 * truth[0]
    assert (gradient.double() - truth[1]).abs().max() <= 1e-5 * truth[1].abs().max()


@pytest.mark.parametrize("loss", [fastkd.gram_anchoring, fastkd.token_relation])
def test_tokens_without_a_direction_get_no_gradient(loss, engine):
    options = dict(normalize=True) if loss is fastkd.token_relation else {}
    student, teacher = tokens(2, 9, 4)
    with torch.no_grad():
        student[0, 3] = teacher[1, 2] = 0
    found = results(lambda *x: loss(*x, **options), [student, teacher])
    assert_same(found, by_formula(lambda *x: loss(*x, **options), [student, teacher]))
    assert not found[1][0, 3].any() and found[1].abs().max() < 100


# --------------------------------------------------------------------------------- other libraries


def test_the_local_loss_of_lightly_train(engine):
    """A mean over all rows of all images, of features that it expects to be normalised."""
    student, teacher = tokens(3, 9, 5)

    def of_rows(student, teacher):
        s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
        s, t = ((x @ x.mT / 0.07).flatten(0, 1) for x in (s, t))
        return F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")

    found = results(
        lambda *x: fastkd.token_relation(*x, normalize=True, temperature=0.07), [student, teacher]
    )
    assert_same(found, results(of_rows, [student, teacher]))


def test_anchoring_is_a_relation_of_squares(engine):
    inputs = tokens(3, 9, 5)
    options = dict(normalize=True, temperature=1.0, divergence="mse")
    found = results(lambda *x: fastkd.token_relation(*x, **options), inputs)
    assert_same(found, results(lambda *x: fastkd.gram_anchoring(*x, remove_negative=None), inputs))


@pytest.mark.parametrize("shape", [(3, 9, 5), (3, 5, 9)])  # products of features, and of positions
@pytest.mark.parametrize("masked", [False, True])
def test_patch_kernel_alignment(shape, masked):
    """That of lightly: kernels are centred on both sides, and small ones are clamped."""
    student, teacher = tokens(*shape, wider=2)
    mask = normal(*shape[:2], seed=3) > -0.5 if masked else None

    def paka(student, teacher):
        losses = []
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            kept = slice(None) if mask is None else mask[i]
            s, t = (x[kept] @ x[kept].T for x in (s, t))
            s, t = (k - k.mean(0) - k.mean(1, keepdim=True) + k.mean() for k in (s, t))
            norms = [(k * k).sum().clamp(min=1e-6).sqrt() for k in (s, t)]
            losses.append(1 - (s * t).sum() / math.prod(norms))
        return torch.stack(losses).mean()

    found = results(lambda *x: fastkd.cka(*x, mask=mask), [student, teacher])
    assert_same(found, results(paka, [student, teacher]))


# --------------------------------------------------------------------------------------------- cka


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_alignment_ignores_scale_shift_and_rotation(shape):
    student, _ = tokens(*shape)
    rotation, _ = torch.linalg.qr(normal(shape[1], shape[1], seed=4))
    for teacher in (student, 3 * student + 2, student @ rotation):
        loss, gradient = results(fastkd.cka, [student, teacher.detach()])
        assert 0 <= loss <= 1e-14 and gradient.abs().max() <= 1e-14
    single = student.detach().float().requires_grad_()
    loss, _ = results(fastkd.cka, [single, single.detach().clone()])
    assert 0 <= loss <= 1e-6
    for size in (1e-15, 1e15):
        scaled = (single.detach() * size).requires_grad_()
        other = normal(*shape, seed=5).float()
        expected = results(fastkd.cka, [single, other])
        loss, gradient = results(fastkd.cka, [scaled, other * size])
        assert_same([loss, gradient * size], expected, 1e-5)


@pytest.mark.parametrize("value", [0.0, 3.7, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_that_are_alike_have_no_kernel(value, dtype):
    student, teacher = tokens(2, 50, 3, dtype=dtype)
    with torch.no_grad():
        student[0] = value
    losses = fastkd.cka(student, teacher, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert losses[0] == 1 and not gradient[0].any() and gradient[1].any()
    (gradient,) = torch.autograd.grad(
        fastkd.cka(teacher.requires_grad_(), student.detach()), teacher
    )
    assert not gradient[0].any() and gradient.isfinite().all()


def test_one_position_has_no_alignment():
    student, teacher = tokens(3, 1, 4)
    loss, gradient = results(fastkd.cka, [student, teacher])
    assert loss == 0 and not gradient.any()
    assert_same([fastkd.cka(student, teacher, center=False)], [torch.zeros((), device=DEVICE)], 1)


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("shape, heads", [((2, 1024, 64), 2), ((1, 2048, 32), 1)])
@pytest.mark.parametrize("name", ["token_relation", "gram_anchoring"])
def test_no_matrix_of_all_pairs(shape, heads, name, monkeypatch):
    """The gradient and its product with the upstream, what workers share, and a few chunks."""
    in_chunks_of(1 << 15, monkeypatch)
    student, teacher = tokens(*shape, dtype=torch.float32)
    options = dict(heads=heads) if name == "token_relation" else {}
    with fastkd.backend("portable"), PeakMemory() as memory:
        getattr(fastkd, name)(student, teacher, **options).backward()
    n_pairs = 4 * shape[0] * heads * shape[1] ** 2
    assert memory.peak_bytes <= 14 * student.nbytes + 4 * 4 * (1 << 15) < n_pairs


def test_no_matrix_of_all_positions():
    student, teacher = tokens(4096, 32, dtype=torch.float32)
    with PeakMemory() as memory:
        fastkd.cka(student, teacher).backward()
    assert memory.peak_bytes <= 12 * student.nbytes < 4 * 4096**2 / 8


# ---------------------------------------------------------------------------------------- ways


@pytest.mark.skipif(not INTERPRETED, reason="kernels are run in Triton's interpreter")
@pytest.mark.parametrize("widths", [(3, 40), (40, 3), (128, 17)], ids=str)
@pytest.mark.parametrize("divergence", ["kl", "mse"])
@quick_if(lambda widths, divergence: widths == (3, 40))
def test_kernels_of_any_width(widths, divergence):
    student = normal(2, 37, 2 * widths[0]).requires_grad_()
    teacher = normal(2, 37, 2 * widths[1], seed=1)
    options = dict(heads=2, divergence=divergence, normalize=True)
    with fastkd.backend("triton"):
        found = results(lambda *x: fastkd.token_relation(*x, **options), [student, teacher])
    truth = by_formula(lambda *x: fastkd.token_relation(*x, **options), [student, teacher])
    assert_same(found, truth)


def test_which_problems_kernels_take(monkeypatch):
    """Wide heads, float64, and float32 that must not be rounded go through cuBLAS."""
    from fastkd.kernels.tokens import launch
    from fastkd.problems.tokens import TokenRelations

    monkeypatch.setattr(launch, "INTERPRETED", False)

    def takes(student, teacher, width, heads=2):
        x, y = (
            torch.empty(1, 4, heads * width, dtype=x, device="meta") for x in (student, teacher)
        )
        return launch.takes(TokenRelations(x, y, None, 1.0, 1.0, heads, "kl", False, False, ""))

    half, single = torch.bfloat16, torch.float32
    for tf32 in (False, True):
        monkeypatch.setattr(launch, "_may_be_rounded", lambda tf32=tf32: tf32)
        assert takes(half, torch.float16, 128) and not takes(half, half, 129)
        assert takes(single, single, 64) == takes(half, single, 64) == tf32
        assert not takes(single, single, 65) and not takes(torch.float64, half, 16)


@pytest.mark.parametrize("case", TOKENS, ids=str)
@full
def test_strides_of_maps(case, engine):
    """Patches of a feature map in either memory format need no copy of their own."""
    maps = [normal(2, n, 3, 4, seed=n).requires_grad_(n == 4) for n in (4, 6)]
    expected = results(lambda *x: case(*(y.flatten(2).mT for y in x)), maps)
    last = [x.detach().to(memory_format=torch.channels_last) for x in maps]
    last[0].requires_grad_()
    assert_same(results(lambda *x: case(*(y.flatten(2).mT for y in x)), last), expected)


# ------------------------------------------------------------------------------------------ errors

X, W = torch.ones(2, 3, 4), torch.ones(2, 3, 6)
MASK = torch.ones(2, 3, dtype=torch.bool)
CALLS = [
    (lambda: fastkd.token_relation(X, W[:1]), r"one B and L, got \[2, 3, 4\] and \[1, 3, 6\]: res"),
    (
        lambda: fastkd.token_relation(X[0, 0], W),
        r"student needs .*\[L, D\] for one sequence.*\[4\]",
    ),
    (
        lambda: fastkd.gram_anchoring(X[None], W[None]),
        r"student needs .*for one image.*got \[1, 2, 3, 4\]: a feature map .*flatten\(2\)\.mT",
    ),
    (lambda: fastkd.cka(X[..., :0], W), r"D ≥ 1, got \[2, 3, 0\]"),
    (lambda: fastkd.cka(X, W.long()), "teacher must hold floating-point .*int64"),
    (lambda: fastkd.cka([X], W), "student must be a tensor .*for one example.*got list"),
    (lambda: fastkd.cka(X, W.to("meta")), "move them together"),
    (lambda: fastkd.token_relation(X, W, heads=4), "4 and 6, got 4: pass a divisor of 2"),
    (lambda: fastkd.token_relation(X, W, heads=0), "heads must be a whole number of at least 1"),
    (lambda: fastkd.token_relation(X, W, temperature=0), "temperature must be a finite number ab"),
    (lambda: fastkd.token_relation(X, W, divergence="l1"), '"kl" or "mse", got \'l1\''),
    (lambda: fastkd.token_relation(X, W, mask=MASK[:1]), r"shape \[2, 3\], got \[1, 3\]"),
    (lambda: fastkd.token_relation(X, W, mask=MASK.float()), "float32: an additive mask"),
    (lambda: fastkd.token_relation(X, W, mask=[[1] * 3] * 2), "got list: pass torch.tensor"),
    (lambda: fastkd.token_relation(X, W, mask=MASK.to("meta")), "move them together"),
    (lambda: fastkd.token_relation(X, W, weights=torch.ones(2, 3)), r"\[2\], got \[2, 3\]"),
    (lambda: fastkd.token_relation(X, W, weights=torch.ones(3)), r"the shape \[2\], got \[3\]"),
    (lambda: fastkd.gram_anchoring(X, W, remove_negative="all"), '"both", "teacher" or None'),
    (lambda: fastkd.gram_anchoring(X, W, reduction="sum"), "has no option 'reduction'"),
    (lambda: fastkd.minilm_relation(X, W), r"list or tuple .*got Tensor: pass .*chunk\(3, -1\)"),
    (lambda: fastkd.minilm_relation(0, W), "student_qkv must be a list or tuple .*got int$"),
    (lambda: fastkd.minilm_relation([X], [W, W]), "one at least, got 1 and 2"),
    (lambda: fastkd.minilm_relation([], []), "one at least, got 0 and 0"),
    (lambda: fastkd.minilm_relation([X], [W]), "heads must divide .*got 48: pass a divisor of 2"),
    (
        lambda: fastkd.minilm_relation([X, X[:1]], [W, W[:1]], n_heads=2),
        r"all relations need the same tokens.*\[1, 3, 4\] in student_qkv\[1\]",
    ),
    (
        lambda: fastkd.minilm_relation([X], [W[:1]], n_heads=2),
        r"student_qkv\[0\] and teacher_qkv\[0",
    ),
    (
        lambda: fastkd.minilm_relation([X], [W], n_heads=2, weights=[1, 1]),
        r"a number for each of 1 relations, got \[1, 1\]",
    ),
    (
        lambda: fastkd.minilm_relation([X], [W], n_heads=2, weights=[-1]),
        "weights must be a finite number of at least 0",
    ),
    (lambda: fastkd.MiniLMRelationLoss(n_heads=0), "n_heads must be a whole number"),
    (lambda: fastkd.TokenRelationLoss(mask=MASK), "has no option 'mask'"),
]


@pytest.mark.parametrize("call, words", CALLS, ids=range(len(CALLS)))
def test_errors(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_the_teachers_of_relations_are_constants(engine):
    (q, q_t), (v, v_t) = tokens(2, 3, 4), tokens(2, 3, 4, seed=2)
    q_t.requires_grad_()
    from fastkd import _checks

    _checks._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"teacher_qkv\[0\] requires grad"):
        loss = fastkd.minilm_relation([q, v], [q_t, v_t], n_heads=2)
    gradients = torch.autograd.grad(loss, [q, v, q_t], allow_unused=True)
    assert [x is None for x in gradients] == [False, False, True]


def test_modules_take_masks_at_the_call():
    student, teacher = tokens(2, 3, 4)
    loss = fastkd.TokenRelationLoss(heads=2)
    mask = MASK.to(DEVICE)
    mask = mask & (torch.arange(3, device=DEVICE) < 2)
    expected = fastkd.token_relation(student, teacher, heads=2, mask=mask)
    assert torch.equal(loss(student, teacher, mask=mask), expected)
    loss.heads = 4
    assert loss(student, teacher) == fastkd.token_relation(student, teacher, heads=4)
    with pytest.raises(ValueError, match="whole number"):
        loss.heads = 0


@pytest.mark.parametrize(
    "options", [{}, dict(divergence="mse", causal=True), dict(normalize=True)], ids=str
)
@full
def test_compiled_with_a_mask(options, engine):
    torch._dynamo.reset()
    for n in (5, 9):
        student, teacher = tokens(2, n, 4)
        mask = normal(2, n, seed=3) > -0.5

        def loss(student, teacher, mask=mask):
            return fastkd.token_relation(student, teacher, mask=mask, **options)

        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        assert_same(results(compiled, [student, teacher]), results(loss, [student, teacher]))
