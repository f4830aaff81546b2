"""Losses between vocabularies: what a row is worth, what becomes of mass, what is refused."""

import inspect
import math

import pytest
import torch
from cases import named, of
from choice import quick_if
from exactness import assert_same, results
from force import in_chunks_of
from inputs import DEVICE, normal, two_vocabularies, with_a_map, with_matched_ids
from meter import PeakMemory

import fastkd
from fastkd.portable import sorted_rows
from fastkd.problems.rows import DIVERGENCES

CASES = of("uld", "matched_kl", "projected_kl", "alm")
each_case = pytest.mark.parametrize("case", CASES, ids=str)
T = dict(temperature=2.0, scale_t2=False, reduction="none")


def says(error, *sentences):
    """Expect the error, with a message that holds all of them."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{x})" for x in sentences))


def each_row(case, inputs):
    """Return the published losses of the examples, one after the other."""
    student, teacher, *others = inputs
    shape = student.shape if case.name == "alm" else student.shape[:-1]
    rows = zip(*(x.reshape(shape.numel(), 1, -1) for x in (student, teacher)), strict=True)
    return torch.stack([case.truth(s, t, *others) for s, t in rows]).view(shape)


# ------------------------------------------------------------------------------------------- rows


@each_case
def test_each_row_has_its_loss(case, engine):
    inputs = case.inputs((2, 3), 7)
    found = results(lambda *xs: case(*xs, reduction="none"), inputs)
    assert_same(found, results(lambda *xs: each_row(case, xs), inputs), 1e-11)


@each_case
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_weights_and_an_example_of_weight_0(case, bad, engine):
    inputs = case.inputs((4,), 7)
    shape = inputs[0].shape if case.name == "alm" else (4,)
    weights = normal(*shape, seed=5).abs()
    weights[1] = 0
    total = weights.sum()
    expected = results(lambda *xs: (weights * each_row(case, xs)).sum() / total, inputs)
    with torch.no_grad():
        inputs[0][1] = inputs[1][1] = bad
    assert_same(results(lambda *xs: case(*xs, weights=weights), inputs), expected, 1e-11)
    found = results(lambda *xs: case(*xs, weights=weights, normalizer=7.0), inputs)
    assert_same(found, [x * total / 7 for x in expected], 1e-11)


@pytest.mark.parametrize("case", [x for x in CASES if x.name != "alm"], ids=str)
def test_labels_say_which_rows_count(case, engine):
    inputs = case.inputs((4,), 7)
    labels = torch.tensor([3, -100, 6, 0], device=DEVICE)
    found = results(lambda *xs: case(*xs, labels=labels), inputs)
    assert_same(found, results(lambda *xs: case(*xs, weights=labels >= 0), inputs))


@pytest.mark.parametrize(
    "case", [*(x for x in CASES if x.name != "alm"), *named("reverse_kl-temperature=2.0")], ids=str
)
def test_logarithms_of_probabilities_have_the_digits_of_a_student_in_float64(case, engine):
    student, teacher, *others = case.inputs((4,), 7)
    teacher = teacher.softmax(-1).float()
    found = case(student, teacher, *others, teacher_form="probabilities")
    with fastkd.backend("formula"):
        assert_same([found], [case(student, teacher, *others, teacher_form="probabilities")])


@pytest.mark.parametrize("case", [x for x in CASES if x.name != "alm"], ids=str)
def test_temperatures_of_each_network_and_forms_of_the_teacher(case, engine):
    student, teacher, *others = case.inputs((4,), 7)
    scale = dict(scale_t2=False) if case.name != "uld" else {}
    expected = results(
        lambda x: case(x / 3, teacher / 0.5, *others, **scale, temperature=1.0), [student]
    )
    options = dict(student_temperature=3.0, teacher_temperature=0.5)
    found = results(lambda x: case(x, teacher, *others, **options, **scale), [student])
    assert_same(found, expected)
    if scale:
        found = results(lambda x: case(x, teacher, *others, **options), [student])
        assert_same(found, [1.5 * x for x in expected])
    for form, x in (("probabilities", teacher.softmax(-1)), ("log_probabilities", teacher)):
        x = x if form == "probabilities" else x.log_softmax(-1)
        found = case(student, x, *others, teacher_form=form)
        assert_same([found], [case(student, teacher, *others)])


@each_case
@quick_if(lambda case: case.name == "uld")
def test_torch_compile_makes_one_graph(case):
    inputs = case.inputs((19,), 5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: case(*x) * 1.5, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, inputs), results(lambda *x: case(*x) * 1.5, inputs))


# ------------------------------------------------------------------------------------------ sorted


def test_uld_does_not_know_what_entries_mean(engine):
    student, teacher = two_vocabularies((5,), 9)
    loss = fastkd.uld(student, teacher)
    shuffled = teacher[:, torch.randperm(11, generator=torch.Generator().manual_seed(3)).to(DEVICE)]
    assert_same([fastkd.uld(student, shuffled)], [loss])
    with_masked = torch.nn.functional.pad(teacher, (0, 4), value=-math.inf)
    assert_same([fastkd.uld(student, with_masked)], [loss])
    found = results(lambda x: fastkd.uld(x, x.detach()), [student])
    assert not any(x.any() for x in found)
    assert_same([fastkd.uld(teacher.requires_grad_(), student.detach())], [loss])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_backward_that_finds_nothing_sorts_again(reduction, monkeypatch):
    student, teacher = two_vocabularies((9,), 40)
    sorts, sort = [], torch.sort
    monkeypatch.setattr(torch, "sort", lambda *x, **options: sorts.append(x) or sort(*x, **options))
    with fastkd.backend("portable"):
        losses = fastkd.uld(student, teacher, reduction=reduction)
        ones = torch.ones_like(losses)
        first = torch.autograd.grad(losses, student, ones, retain_graph=True)
        assert len(sorts) == 2  # one of each network
        second = torch.autograd.grad(losses, student, ones)
    assert len(sorts) == 4
    assert_same(first, second)


def test_signs_are_never_taken_for_a_gradient():
    """Foresee nothing in float16, because a loss is scaled there before its backward."""
    student, teacher = two_vocabularies((9,), 40, torch.float16, device="cpu")
    for upstream in (1.0, 0.0, 256.0):
        found = []
        for backend in ("portable", "formula"):
            with fastkd.backend(backend):
                loss = upstream * fastkd.uld(student, teacher)
            found.append(torch.autograd.grad(loss, student))
        assert_same(*found, 2e-3)


def test_numbers_that_are_sorted_at_once_are_in_order():
    """Equal ones in that of their places, a NaN of either sign first."""
    rows = normal(70, 1000, dtype=torch.float32).cpu().softmax(-1)
    rows[1, 5:200], rows[2, ::2], rows[3], rows[4] = 0.25, 0.0, math.nan, -math.nan
    found, places = sorted_rows._sorted(rows)
    expected, order = torch.sort(rows, dim=-1, descending=True, stable=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    if places.ndim == 1:
        places = places.view_as(rows) - 1000 * torch.arange(70).unsqueeze(1)
    assert torch.equal(places, order)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("is_known", [True, False])
def test_numbers_that_are_sorted_at_once_may_lie_anywhere(is_known, reduction):
    """Images have their classes in dimension 1, and the user another default device."""
    student, teacher = (
        normal(2, 30, 40, 35, seed=i, dtype=torch.float32).cpu() for i in range(2)
    )  # fmt: skip
    found, expected = [], []
    for results_of, layout in ((found, lambda x: x), (expected, torch.Tensor.contiguous)):
        z, z_teacher = (layout(x.movedim(1, -1)) for x in (student, teacher))
        z = z.detach().requires_grad_()
        with fastkd.backend("portable"), torch.device("meta"):
            losses = fastkd.uld(z, z_teacher, reduction=reduction).sum()
        factor = 1 if is_known else 3
        grads = [torch.autograd.grad(factor * losses, z, retain_graph=True) for _ in range(2)]
        results_of += [losses.detach(), *grads[0], *grads[1]]
    assert_same(found, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_uld_keeps_its_gradient_or_a_byte_for_each_logit(reduction, dtype, monkeypatch):
    """Exactly that and one chunk: of a mean the gradient, or signs and later the gradient."""
    n_rows, width = 64, 20000
    student, teacher = two_vocabularies((n_rows,), width, dtype, device="meta")
    in_chunks_of(3 * width, monkeypatch)
    n, chunk = n_rows * width, 3 * 64 * width
    gradient = n * dtype.itemsize
    kept, made = (gradient, 0) if reduction == "mean" else (n, gradient)
    with fastkd.backend("portable"):
        with PeakMemory() as forward:
            losses = fastkd.uld(student, teacher, reduction=reduction)
        with PeakMemory() as backward:
            losses.backward(torch.ones_like(losses))
        with PeakMemory() as evaluated, torch.no_grad():
            fastkd.uld(student, teacher)
    assert kept < forward.peak_bytes <= kept + chunk
    assert made < backward.peak_bytes <= made + chunk
    assert evaluated.peak_bytes <= chunk
    with fastkd.backend("formula"), PeakMemory() as formula:
        fastkd.uld(student, teacher)
    assert formula.peak_bytes > 20 * n


# ------------------------------------------------------------------------------------------ matched


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_raw_terms_of_all_entries_are_the_divergence(divergence):
    """Cut the vocabulary in any two parts; the whole of it is the divergence in each convention."""
    student, teacher = (x[:, :9] for x in two_vocabularies((6,), 9))
    ids = torch.randperm(9, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    own = dict.fromkeys(("beta", "skew", "weight"), 0.3)
    loss = getattr(fastkd, divergence)
    options = {x: own[x] for x in own if x in inspect.signature(loss).parameters}
    expected = results(lambda x: loss(x, teacher, **T, **options), [student])

    def matched(*parts, **mass):
        return lambda x: sum(
            fastkd.matched_kl(x, teacher, i, i, divergence=divergence, **mass, **own, **T)
            for i in parts
        )

    assert_same(results(matched(ids[:4], ids[4:], mass="raw"), [student]), expected, 1e-11)
    for mass in ("renormalized", "tail", "raw"):
        assert_same(results(matched(ids, mass=mass), [student]), expected, 1e-11)


def test_what_the_masses_are(engine):
    student, teacher, student_ids, _ = with_matched_ids((6,), 9)
    teacher = teacher[:, :9]
    ids = (student_ids, student_ids)
    full = fastkd.forward_kl(student, teacher, **T)
    tail, renormalized, raw = (
        fastkd.matched_kl(student, teacher, *ids, mass=mass, **T)
        for mass in ("tail", "renormalized", "raw")
    )
    q, p = ((x / 2).softmax(-1)[:, student_ids].sum(-1) for x in (student, teacher))
    of_both = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert_same([tail], [p * renormalized + of_both], 1e-11)
    assert_same([raw], [tail - (1 - p) * ((1 - p) / (1 - q)).log()], 1e-11)
    assert (tail >= 0).all() and (tail <= full).all()
    # the teacher's likelihoods, but all of the mass at what is matched
    others = torch.ones(9, dtype=torch.bool, device=DEVICE).index_fill(0, student_ids, False)
    student = teacher.masked_fill(others, -math.inf)
    assert (fastkd.matched_kl(student, teacher, *ids, mass="raw", **T) < 0).all()


def test_a_tail_of_which_little_is_left_keeps_its_digits(engine):
    """1 − Σ would be 0 in float32, and its logarithm −∞."""
    student = torch.tensor([[30.0, 0.0, 1.0, -2.0]], device=DEVICE)
    teacher = torch.tensor([[1.0, 1.0, -1.0, 0.5]], device=DEVICE)
    ids = torch.tensor([0], device=DEVICE)
    found = fastkd.matched_kl(student, teacher, ids, ids, mass="tail")
    log_q, log_p = (x.double().log_softmax(-1) for x in (student, teacher))
    (q, p), (tail_q, tail_p) = (
        [x[:, 0] for x in (log_q, log_p)],
        [x[:, 1:].logsumexp(-1) for x in (log_q, log_p)],
    )
    expected = p.exp() * (p - q) + tail_p.exp() * (tail_p - tail_q)
    torch.testing.assert_close(found, expected[0].float(), rtol=1e-6, atol=0)


def test_an_excluded_tail_is_a_masked_entry(engine):
    student, teacher = two_vocabularies((4,), 6)
    with torch.no_grad():
        student[:, 4:] = teacher[:, 4:] = -math.inf
    ids = torch.arange(4, device=DEVICE)
    found = results(lambda x: fastkd.matched_kl(x, teacher, ids, ids, mass="tail"), [student])
    expected = results(lambda x: fastkd.matched_kl(x, teacher, ids, ids), [student])
    assert_same(found, expected)


# ---------------------------------------------------------------------------------------- projected


def test_a_map_of_one_entry_each_renames_them(engine):
    student, teacher = (x[:, :9] for x in two_vocabularies((6,), 9))
    names = torch.randperm(9, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ids = torch.stack([names, torch.full_like(names, -1)], 1)
    expected = results(lambda x: fastkd.forward_kl(x, teacher[:, names], **T), [student])
    for mass in ("renormalized", "full"):
        options = dict(mass=mass, **T)
        found = results(lambda x: fastkd.projected_kl(x, teacher, ids, **options), [student])  # noqa: B023
        assert_same(found, expected)


def test_shares_are_divided_by_their_sum_and_equal_without_any(engine):
    student, teacher, ids, shares = with_a_map((6,), 9)
    loss = fastkd.projected_kl(student, teacher, ids, shares)
    assert_same([fastkd.projected_kl(student, teacher, ids, 7 * shares)], [loss])
    equal = fastkd.projected_kl(student, teacher, ids, torch.ones_like(shares))
    assert_same([fastkd.projected_kl(student, teacher, ids)], [equal])


def test_what_the_map_does_not_reach(engine):
    student, teacher, ids, shares = with_a_map((6,), 9)
    is_reached = torch.isin(torch.arange(11, device=DEVICE), ids)
    without = teacher.masked_fill(~is_reached, -math.inf)
    expected = fastkd.projected_kl(student, without, ids, shares, mass="full")
    assert_same([fastkd.projected_kl(student, teacher, ids, shares)], [expected])
    assert_same([fastkd.projected_kl(student, without, ids, shares)], [expected])
    options = dict(mass="full", reduction="none")
    losses, gradient = results(
        lambda x: fastkd.projected_kl(x, teacher, ids, shares, **options), [student]
    )
    assert (losses == math.inf).all() and gradient.isfinite().all()


def test_little_mass_keeps_its_digits(engine):
    """e⁻²⁰⁰ would be 0 in float32, and its logarithm −∞."""
    student, teacher, ids, shares = with_a_map((6,), 9)
    with torch.no_grad():
        student[:, 1:] -= 200
    expected = fastkd.projected_kl(student, teacher, ids, shares)
    found = fastkd.projected_kl(student.float(), teacher.float(), ids, shares)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)


# -------------------------------------------------------------------------------------- likelihoods


def by_hand(log_q, log_p):
    """Return the binarised KL in Python floats."""
    of_rest = math.log(-math.expm1(log_p)) - math.log(-math.expm1(log_q))
    return math.exp(log_p) * (log_p - log_q) - math.expm1(log_p) * of_rest


def test_likelihoods_near_0_and_1_keep_their_digits():
    pairs = [(-1e-4, -3e-4), (-1e-3, -40.0), (-60.0, -1e-3), (-30.0, -20.0), (-1e-6, -2.0)]
    log_q, log_p = torch.tensor(pairs, device=DEVICE).T.contiguous()
    found = fastkd.alm(log_q, log_p, temperature=1.0, reduction="none")
    expected = [by_hand(q, p) for q, p in torch.stack([log_q, log_p], 1).double().tolist()]
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, device=DEVICE).double(), rtol=2e-3, atol=1e-9
    )
    expected = [abs(math.expm1(p) - math.expm1(q)) for q, p in pairs]
    found = fastkd.alm(log_q, log_p, temperature=1.0, divergence="tv", reduction="none")
    torch.testing.assert_close(found, torch.tensor(expected, device=DEVICE), rtol=1e-5, atol=0)


def test_likelihoods_that_nearly_agree_have_no_loss_below_0():
    log_p = -normal(1000, dtype=torch.float32).abs()
    for factor in (1 - 3e-7, 1 + 3e-7):
        student = (log_p * factor).requires_grad_()
        losses = fastkd.alm(student, log_p, temperature=1.0, reduction="none")
        assert (losses >= 0).all()
        # 0 is where rounding ends, but the gradient is that of the formula
        (gradient,) = torch.autograd.grad(losses.sum(), student)
        assert gradient.isfinite().all() and gradient[losses == 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["kl", "tv"])
def test_certain_and_excluded_likelihoods(divergence, dtype):
    values = [0.0, -1e-30, -1e-9, -1.0, -1e4, -math.inf]
    log_q, log_p = torch.cartesian_prod(*2 * [torch.tensor(values, dtype=dtype, device=DEVICE)]).T
    options = dict(temperature=1.0, divergence=divergence, reduction="none")
    student = log_q.clone().requires_grad_()
    losses = fastkd.alm(student, log_p, **options)
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    excluded = (log_q == -math.inf) & (log_p > -math.inf) & (log_p.exp() > 0)
    assert torch.equal(losses == math.inf, excluded & (divergence == "kl"))
    assert (losses >= 0).all() and gradient.isfinite().all()
    assert not losses[log_q == log_p].any() and not gradient[log_q == log_p].any()


def test_sums_of_groups():
    values = normal(2, 6).requires_grad_()
    groups = torch.tensor([[0, 0, 2, -1, 2, 2], [-1, 1, 0, 3, 3, -5]], device=DEVICE)
    with torch.no_grad():
        values[0, 3] = math.nan  # in no group
    upstream = normal(2, 4, seed=3)
    found = fastkd.sum_by_group(values, groups, 4)
    expected = [
        [sum(v for v, g in zip(row, own, strict=True) if g == i) for i in range(4)]
        for row, own in zip(values.tolist(), groups.tolist(), strict=True)
    ]
    assert_same([found], [torch.tensor(expected, device=DEVICE, dtype=torch.float64)])
    (gradient,) = torch.autograd.grad(found, values, upstream)
    each = torch.where(groups < 0, 0, upstream.gather(1, groups.clamp(min=0)))
    assert torch.equal(gradient, each)
    narrow = fastkd.sum_by_group(values.detach().bfloat16(), groups, 4)
    assert narrow.dtype == torch.float32
    assert fastkd.sum_by_group(values[:0], groups[:0], 4).shape == (0, 4)
    assert fastkd.sum_by_group(values, torch.full_like(groups, -1), 0).shape == (2, 0)
    again = torch.func.vmap(lambda *x: fastkd.sum_by_group(*x, 4))(values, groups)
    assert_same([again], [found])


# ------------------------------------------------------------------------------------------- errors


def test_errors_of_logits():
    student, teacher, student_ids, teacher_ids = with_matched_ids((4,), 7, torch.float32)
    *_, ids, shares = with_a_map((4,), 7, torch.float32)
    for loss, others in (
        (fastkd.uld, ()),
        (fastkd.matched_kl, (student_ids, teacher_ids)),
        (fastkd.projected_kl, (ids, shares)),
    ):
        with says(ValueError, r"\[4, 7\] and \[3, 9\]", "the same rows", "fastkd.align begin"):
            loss(student, teacher[:3], *others)
        with says(TypeError, "teacher_logits must be a tensor", "got list"):
            loss(student, [[0.0]], *others)
        with says(ValueError, "temperature must be a finite number above 0", "got 0"):
            loss(student, teacher, *others, temperature=0)
        with says(ValueError, "teacher_form", "got 'odds'"):
            loss(student, teacher, *others, teacher_form="odds")
        with says(ValueError, "numbers of at least 0", "got -"):
            loss(student, teacher, *others, teacher_form="probabilities")
        with says(ValueError, f"on {DEVICE}", "on meta", "move them together"):
            loss(student, teacher.to("meta"), *others)
    for loss, others in ((fastkd.matched_kl, (student_ids,) * 2), (fastkd.projected_kl, (ids,))):
        with says(ValueError, "divergence must be", '"reverse_kl"', "got 'logit_mse'"):
            loss(student, teacher, *others, divergence="logit_mse")
        with says(ValueError, r"beta must be a number in \[0, 1\], got 2"):
            loss(student, teacher, *others, divergence="jensen_shannon", beta=2)
        with says(ValueError, "mass must be", '"renormalized"', "got 'half'"):
            loss(student, teacher, *others, mass="half")


def test_errors_of_ids():
    student, teacher, student_ids, teacher_ids = with_matched_ids((4,), 7, torch.float32)

    def matched(of_student=student_ids, of_teacher=teacher_ids):
        fastkd.matched_kl(student, teacher, of_student, of_teacher)

    with says(TypeError, "teacher_ids must be a tensor of token ids", "got list"):
        matched(of_teacher=[1, 2])
    with says(TypeError, "student_ids must be a tensor of token ids", "got torch.float32"):
        matched(student_ids.float())
    with says(ValueError, r"student_ids needs the shape \[K\] with K ≥ 1", r"got \[0\]"):
        matched(student_ids[:0])
    with says(ValueError, "the same K strings in the same order", r"\[4\] and \[3\]"):
        matched(of_teacher=teacher_ids[1:])
    for wrong in (-1, 7):
        with says(ValueError, r"student_ids must lie in \[0, 7\)", f"got {wrong}", "drop"):
            matched(torch.tensor([0, 1, 2, wrong], device=DEVICE))
    with says(ValueError, "teacher_ids must name each entry once, got 5 repeatedly", "keep one"):
        matched(of_teacher=torch.tensor([5, 1, 2, 5], device=DEVICE))


def test_errors_of_maps():
    student, teacher, ids, shares = with_a_map((4,), 7, torch.float32)
    with says(ValueError, r"ids needs the shape \[V, k\] = \[7, k\]", r"got \[6, 3\]", "no entry"):
        fastkd.projected_kl(student, teacher, ids[1:], shares[1:])
    with says(ValueError, r"ids must lie in \[-1, 9\)", "got 9"):
        fastkd.projected_kl(student, teacher, ids + 1, shares)
    with says(ValueError, "shares needs the shape of ids", r"\[7, 2\] for \[7, 3\]"):
        fastkd.projected_kl(student, teacher, ids, shares[:, 1:])
    with says(TypeError, "shares must be a floating-point tensor", "got torch.int64"):
        fastkd.projected_kl(student, teacher, ids, ids)
    with says(ValueError, "shares must be at least 0, got -", r"\.exp\(\)"):
        fastkd.projected_kl(student, teacher, ids, shares.log() - 1)


def test_errors_of_likelihoods_and_groups():
    log_q, log_p = -torch.ones(2, 3, device=DEVICE), -torch.ones(2, 3, device=DEVICE)
    with says(ValueError, r"\[2, 3\] and \[2, 2\]", "fastkd.sum_by_group"):
        fastkd.alm(log_q, log_p[:, 1:])
    with says(ValueError, "teacher_logprobs must be logarithms", "got 1", "log_softmax"):
        fastkd.alm(log_q, -log_p)
    with says(ValueError, r"shape \(..., C\)", "got a number"):
        fastkd.alm(log_q[0, 0], log_p[0, 0])
    with says(TypeError, "student_logprobs must be a tensor", "got list"):
        fastkd.alm([-1.0], log_p)
    with says(ValueError, 'divergence must be "kl" or "tv", got \'js\''):
        fastkd.alm(log_q, log_p, divergence="js")
    groups = torch.tensor([[0, 1, 2], [0, 0, 0]], device=DEVICE)
    with says(ValueError, "below n_groups=2, got 2", "most of them"):
        fastkd.sum_by_group(log_q, groups, 2)
    with says(ValueError, r"\[2, 3\] and \[2, 2\]", "a group for each token"):
        fastkd.sum_by_group(log_q, groups[:, 1:], 3)
    with says(TypeError, "groups must be a tensor of integers", "got torch.float32"):
        fastkd.sum_by_group(log_q, groups.float(), 3)
    with says(ValueError, "n_groups must be a whole number", "got 2.5"):
        fastkd.sum_by_group(log_q, groups, 2.5)
