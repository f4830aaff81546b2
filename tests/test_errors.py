"""Every error says what was got, what is needed and what to do."""

from functools import partial

import pytest
import torch
from cases import LOSSES, of
from inputs import DEVICE, logits

import fastkd

OTHER_INPUTS = ("channel_wise", "ibot")  # maps, or masked
ROWS = [c for c in of("rows", cases=LOSSES) if c.per_example and c.name not in OTHER_INPUTS]
each_loss = pytest.mark.parametrize("case", ROWS, ids=str)
FEATURES = [c for c in LOSSES if c.problem in ("relations", "gram") and c.name != "dist_kd"]


@pytest.fixture
def inputs():
    student, teacher = logits((4,), 7, torch.float32)
    return student, teacher, torch.tensor([0, 6, 2, -100], device=DEVICE)


def says(error, *sentences):
    """Expect the error, with a message that holds all of them."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{x})" for x in sentences))


@each_loss
def test_logits(case):
    inputs = case.inputs((4,), 7)
    student, teacher, *labels = inputs
    with says(ValueError, r"\[4, 7\] and \[4, 6\]", "need one shape", "cut both to the vocabulary"):
        case(student, teacher[:, :6], *labels)
    with says(ValueError, r"\[4, 7\] and \[3, 7\]", "align the positions"):
        case(student, teacher[:3], *labels)
    for place, name in enumerate(("student_logits", "teacher_logits")):
        wrong = partial(lambda place, x: case(*inputs[:place], x, *inputs[place + 1 :]), place)
        with says(TypeError, f"{name} must be a tensor", "got list"):
            wrong([[0.0] * 7] * 4)
        with says(TypeError, f"{name} must hold floating-point", "got torch.int64", "labels"):
            wrong(torch.zeros(4, 7, dtype=torch.int64, device=DEVICE))
        for shape in ((), (4, 0)):
            with says(ValueError, rf"{name} needs the shape \(..., V\)", rf"\{[*shape]}"):
                wrong(torch.zeros(shape, device=DEVICE))
    for temperature in (0, -1.0, float("inf"), float("nan"), "warm"):
        with says(
            ValueError, "temperature must be a finite number above 0", f"got {temperature!r}"
        ):
            case(*inputs, temperature=temperature)
    with pytest.raises(TypeError, match="teacher_logits"):
        case.loss(student)
    with pytest.raises(TypeError):
        case.loss(*inputs, student)


@each_loss
def test_weights_reduction_and_normalizer(case):
    inputs = case.inputs((2, 2), 7)
    with says(ValueError, 'reduction must be "mean", "sum" or "none", got \'batchmean\''):
        case(*inputs, reduction="batchmean")
    for reduction in ("sum", "none"):
        with says(ValueError, "normalizer replaces the divisor", f"got reduction='{reduction}'"):
            case(*inputs, reduction=reduction, normalizer=3)
    with says(ValueError, "a tensor of one element", r"got \[2, 1\]", r"pass normalizer\[0\]"):
        case(*inputs, reduction="mean", normalizer=torch.ones(2, 1, device=DEVICE))
    expected = case(*inputs, reduction="mean", normalizer=3.0)
    for normalizer in (torch.tensor([3.0], device=DEVICE), torch.tensor([[3]], device=DEVICE)):
        assert torch.equal(case(*inputs, reduction="mean", normalizer=normalizer), expected)
    for shape in ((4,), (2, 2, 1)):
        sentence = "one real number or bool for each example"
        with says(ValueError, sentence, r"\[2, 2\]", rf"\{[*shape]}"):
            case(*inputs, weights=torch.ones(shape, device=DEVICE))
    with says(ValueError, "one real number", "complex64"):
        case(*inputs, weights=torch.ones(2, 2, dtype=torch.complex64, device=DEVICE))
    with says(TypeError, "weights must be a tensor, got list"):
        case(*inputs, weights=[[1.0, 1.0], [1.0, 1.0]])


def test_two_devices(inputs):
    student, teacher, labels = inputs
    meta = torch.device("meta")
    with says(ValueError, f"student_logits is on {DEVICE}", "teacher_logits on meta", "move them"):
        fastkd.forward_kl(student, teacher.to(meta))
    with says(ValueError, f"student_logits is on {DEVICE}", "labels on meta", "move them"):
        fastkd.kd(student, teacher, labels.to(meta))
    with says(ValueError, "weights are on meta", f"the losses on {DEVICE}", "move them"):
        fastkd.forward_kl(student, teacher, weights=torch.ones(4, device=meta))


@pytest.mark.parametrize("case", [case for case in ROWS if "dim" in case.parameters], ids=str)
def test_a_temperature_that_is_no_number_of_each_row(case):
    inputs = case.inputs((4,), 7)
    for shape in ((4, 1), (3,)):
        temperature = torch.ones(shape, device=DEVICE)
        got = r"expands to \[4\]", rf"got \{[*shape]} of"
        with says(ValueError, "one number for each row", *got, r"squeeze\(-1\)", "divide"):
            case(*inputs, temperature=temperature)
    with says(ValueError, "floating-point tensor", "torch.int64", r"\.float\(\)"):
        case(*inputs, temperature=torch.ones(4, dtype=torch.int64, device=DEVICE))


def test_a_flag_is_true_or_false(inputs):
    student, teacher, _ = inputs
    for name in ("standardize", "teacher_gradient"):
        with says(TypeError, f"{name} must be True or False", "got 'yes'"):
            fastkd.forward_kl(student, teacher, **{name: "yes"})
    with says(TypeError, "metrics must be True or False", "got 1"):
        fastkd.linear_kd(student, student.t()[:, :4].t(), teacher, teacher, metrics=1)


def test_a_mixture_is_not_learnt():
    learnt = torch.tensor(0.5, requires_grad=True, device=DEVICE)
    way = r'with fastkd.backend\("formula"\):'
    with says(ValueError, "beta", "without gradient", "not differentiable", way):
        fastkd.jensen_shannon(*logits((4,), 7), beta=learnt)


def test_probabilities_of_a_teacher_that_learns(inputs):
    student, teacher, _ = inputs
    with says(ValueError, "teacher_gradient=True needs logits", "before the softmax"):
        p = teacher.softmax(-1)
        fastkd.forward_kl(student, p, teacher_form="probabilities", teacher_gradient=True)


def test_a_dimension_that_does_not_exist(inputs):
    student, teacher, _ = inputs
    for dim in (2, -3, 1.0):
        with says(ValueError, r"dim must be .* \[-2, 2\)", r"\[4, 7\]", f"got {dim}"):
            fastkd.forward_kl(student, teacher, dim=dim)


@pytest.mark.parametrize(
    "case", [c for c in LOSSES if c.name not in ("dino", "channel_wise", "koleo")], ids=str
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_in_one_piece(case):
    inputs = case.inputs((4,), 7)
    nested = [
        torch.nested.nested_tensor([*x.detach()], layout=layout)
        for x in inputs[:1]
        for layout in (torch.jagged, torch.strided)
    ]
    for x in nested:
        way = "pass .*(val|padded|mask)"
        with says(TypeError, r"(student|query|image|view1|features|logits)\S* is a nested", way):
            case(x, *inputs[1:])
    spread = inputs[0].detach().as_subclass(Spread)
    with says(TypeError, "is a DTensor", r"full_tensor\(\)", r"to_local\(\)"):
        case(spread, *inputs[1:])


class Spread(torch.Tensor):
    """A tensor that the checks take for a DTensor, which needs a process group to be made."""

    full_tensor = to_local = None


def test_soft_labels_and_classes_in_dimension_1_have_their_way(inputs):
    student, teacher, _ = inputs
    soft = logits((4,), 7, torch.float32)[1].softmax(-1)
    with says(TypeError, "class indices", "float32", "argmax"):
        fastkd.mft(student, teacher, soft)
    images = torch.ones(2, 5, 4, 3, device=DEVICE)
    of_pixels = torch.ones(2, 4, 3, dtype=torch.int64, device=DEVICE)
    last = r"classes come last: pass dim=1 or, .* student_logits.movedim\(1, -1\)"
    with says(ValueError, r"got \[2, 4, 3\]", last):
        fastkd.kd(images, images, of_pixels)
    with says(ValueError, r"got \[2, 4, 3\]", last):
        fastkd.forward_kl(images, images, weights=of_pixels)
    with says(TypeError, "ignore_index must be a whole number, got None", "none is ignored"):
        fastkd.kd(*inputs, ignore_index=None)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "half", None])
def test_fractions(value, inputs):
    student, teacher, labels = inputs
    for loss, option in (
        (fastkd.jensen_shannon, "beta"),
        (fastkd.skew_kl, "skew"),
        (fastkd.skew_reverse_kl, "skew"),
        (fastkd.symmetric_kl, "weight"),
        (partial(fastkd.kd, labels=labels), "alpha"),
        (partial(fastkd.kd, labels=labels, divergence="jensen_shannon"), "beta"),
    ):
        with says(ValueError, rf"{option} must be a number in \[0, 1\], got {value!r}"):
            loss(student, teacher, **{option: value})


def test_tensors_by_name_and_options_that_do_not_exist(inputs):
    student, teacher, labels = inputs
    both = dict(teacher_logits=teacher, student_logits=student)
    assert fastkd.forward_kl(**both) == fastkd.forward_kl(student, teacher)
    assert fastkd.kd(labels=labels, **both) == fastkd.kd(student, teacher, labels)
    with says(
        TypeError,
        "forward_kl has no option 'tau'",
        "its options are temperature, student_temperature",
    ):
        fastkd.forward_kl(student, teacher, tau=2.0)
    with says(TypeError, "reverse_kl has no option 'beta'"):
        fastkd.reverse_kl(student, teacher, beta=0.5)
    with pytest.raises(TypeError, match="tau"):
        fastkd.kd(student, teacher, labels, tau=2.0)
    with says(ValueError, "divergence must be one of forward_kl, reverse_kl", "got 'kl'"):
        fastkd.kd(student, teacher, labels, divergence="kl")
    for loss, n in ((fastkd.forward_kl, 2), (fastkd.info_nce, 4)):
        name = loss.__name__
        with says(TypeError, f"{name} takes", "option=value", "too many positional arguments"):
            loss(*torch.ones(n, 4, 3, device=DEVICE), 2.0)


def test_labels(inputs):
    student, teacher, labels = inputs
    for wrong, got in (
        (labels.float(), "torch.float32"),
        (labels > 0, "torch.bool"),
        ([0], "list"),
    ):
        with says(TypeError, "class indices", f"got {got}"):
            fastkd.kd(student, teacher, wrong)
    with says(ValueError, r"one class for each row: the shape \[4\]", r"got \[4, 1\]"):
        fastkd.kd(student, teacher, labels.unsqueeze(1))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="looking at labels on a GPU would wait for it")
@pytest.mark.parametrize("wrong", [7, -1])
def test_labels_out_of_range(wrong, inputs):
    student, teacher, labels = inputs
    labels[1] = wrong
    with says(ValueError, rf"in \[0, 7\) or be ignore_index=-100, got {wrong}"):
        fastkd.kd(student, teacher, labels)


def test_backend():
    with says(ValueError, "got the backend 'cuda'", "need one of auto, triton, portable, formula"):
        fastkd.backend("cuda")


A, B = torch.ones(3, 2), torch.ones(4, 2)


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features(case):
    for student, teacher, error, words in (
        (B, A, ValueError, r"one N, got \[4, 2\] and \[3, 2\]"),
        (A[:, 0], A, ValueError, r"student needs the shape \[N, D\] with D ≥ 1.* got \[3\]"),
        (A, A[:, 0], ValueError, r"teacher needs the shape \[N, D\]"),
        (A[:, :0], A, ValueError, "with D ≥ 1"),
        (A.int(), A, TypeError, "floating-point"),
        ([1.0], A, TypeError, "student must be a tensor"),
        (A, 0.5, TypeError, "teacher must be a tensor.* got float; an option goes by its name"),
        (A.to("meta"), A, ValueError, "move them together"),
    ):
        with pytest.raises(error, match=words):
            case(student, teacher)


F, Q, K = torch.ones(3, 4), torch.ones(4, 3), torch.ones(4, 3)
S, T, Y = torch.ones(4, 3, 5), torch.ones(2, 3, 5), torch.ones(4, dtype=torch.int64)
CALLS = [
    # relations and gram
    (lambda: fastkd.rkd(A, A, smooth_l1_beta=-1.0), "smooth_l1_beta must be a finite number of at"),
    (lambda: fastkd.rkd(A, A, angle_weight=float("inf")), "angle_weight must be a finite number"),
    (lambda: fastkd.rkd(A, A, precision="best"), '"default" or "high", got \'best\''),
    (lambda: fastkd.rkd(A, A, reduction="sum"), "rkd has no option 'reduction'"),
    (lambda: fastkd.rkd(A, A, group="world"), "init_process_group"),
    (lambda: fastkd.correlation_congruence(A, F), r"one width, got \[3, 2\] and \[3, 4\]; project"),
    (
        lambda: fastkd.correlation_congruence(A, F, form="gaussian"),
        'form must be "sequential" or "kernel", got \'gaussian\'',
    ),
    (
        lambda: fastkd.correlation_congruence(A, F, form="kernel", gamma=-1.0),
        "gamma must be a finite number of at least 0, got -1.0",
    ),
    (
        lambda: fastkd.correlation_congruence(A, F, form="kernel", order=1.5),
        "order must be a whole number of at least 1, got 1.5",
    ),
    (lambda: fastkd.dist_kd(F[:, :3], F), r"need one shape, got \[3, 3\] and \[3, 4\]"),
    (lambda: fastkd.dist_kd(F, F, temperature=0), "temperature must be a finite number above 0"),
    (lambda: fastkd.dist_kd(F, F, beta=-1.0), "beta must be a finite number of at least 0"),
    (lambda: fastkd.dist_kd(F, F, gamma=-1.0), "gamma must be a finite number of at least 0"),
    (lambda: fastkd.dist_kd(F, F, reduction="sum"), "dist_kd has no option 'reduction'"),
    # pairs
    (lambda: fastkd.info_nce(Q, K[:3]), r"query and key need the same .* \[3, 3\]"),
    (lambda: fastkd.info_nce(Q, torch.ones(4, 5)), "one D, got .* project"),
    (lambda: fastkd.info_nce(Q, K, torch.ones(2, 5)), "query and negatives"),
    (lambda: fastkd.info_nce(Q[0], K[0]), r"\[N, D\] .* got \[3\]"),
    (lambda: fastkd.info_nce(Q.long(), K), "floating-point .*int64"),
    (lambda: fastkd.info_nce(Q, [1.0]), "key must be a tensor .* got list"),
    (lambda: fastkd.info_nce(Q, K, temperature=0), "above 0, got 0"),
    (lambda: fastkd.info_nce(Q, K, negative_weight=0.0), "negative_weight .* 0"),
    (lambda: fastkd.info_nce(Q, K, margin=torch.ones(2)), r"margin .* \[2\].*: all examples share"),
    (lambda: fastkd.rkd(A, A, angle_weight=torch.ones(3, 1)), r"\[3, 1\].*: all examples share"),
    (lambda: fastkd.info_nce(Q, K, in_batch_negatives=False), "negatives=None"),
    (
        lambda: fastkd.info_nce(Q, K, K, in_batch_negatives=False, symmetric=True),
        "symmetric=True",
    ),
    (lambda: fastkd.info_nce(Q, K, group=3), "init_process_group"),
    (lambda: fastkd.info_nce(Q, K, torch.ones(3, 2, 3)), "query and negatives .*one N"),
    (lambda: fastkd.info_nce(Q, K, torch.ones(4, 2, 5)), "query and negatives need one D"),
    (lambda: fastkd.info_nce(Q, K, None, Q), "must be a tensor of torch.bool, got torch.float32"),
    (lambda: fastkd.info_nce(Q, K, None, Q[:2] > 0), r"one row for each of 4 .*\[2, 3\]"),
    (lambda: fastkd.info_nce(Q, K, None, Q > 0), r"one column for each of 4 keys.*\[4, 3\]"),
    (lambda: fastkd.InfoNCELoss(queue_size=2)(Q, K, F), "query and negatives need one D"),
    (lambda: fastkd.InfoNCELoss(queue_size=2)(Q, K, [K]), "negatives must be .* got list"),
    (
        lambda: fastkd.InfoNCELoss(queue_size=2)(Q, K, None, Q[0] > 0),
        r"one row for each of 4 .*\[3",
    ),
    (
        lambda: fastkd.InfoNCELoss(queue_size=2)(Q, K, torch.ones(4, 2, 3)),
        r"a queue has negatives of all queries, got negatives \[4, 2, 3\] of each query: pass",
    ),
    (lambda: fastkd.info_nce(Q, K, weights=Q[0]), r"for each example: the shape \[4\], got \[3\]"),
    (lambda: fastkd.nt_xent(Q, K, reduction="batchmean"), "\"none\", got 'batchmean'"),
    (lambda: fastkd.clip_contrastive(Q, K, "5"), "logit_scale .* '5'"),
    (lambda: fastkd.siglip(Q, K, 5.0, torch.ones(1)), r"logit_bias .* \[1\].*squeeze"),
    (lambda: fastkd.nt_xent(Q, K[:2]), "view1 and view2"),
    (lambda: fastkd.sup_con(Q, torch.ones(4)), "labels .*float32"),
    (lambda: fastkd.sup_con(Q, torch.ones(3).long()), r"4 features.* \[3\]"),
    (lambda: fastkd.sup_con(Q, torch.ones(4).long(), anchors="x"), "anchors .*'x'"),
    (lambda: fastkd.sup_con(Q, Y.as_subclass(Spread)), "labels is a DTensor"),
    (lambda: fastkd.sup_con(Q, positives=torch.ones(4, 5) > 0), r"each of 4 keys.* \[4, 5\]"),
    (lambda: fastkd.info_nce(Q, Q, weights=Q[:, 0].as_subclass(Spread)), "weights is a DTensor"),
    (lambda: fastkd.rkd(Q, Q, smooth_l1_beta=Q[0, 0].as_subclass(Spread)), "beta is a DTensor"),
    (lambda: fastkd.kd(Q, Q, Y, normalizer=Q[0, 0].as_subclass(Spread)), "izer is a DTensor"),
    (lambda: fastkd.kd(Q, Q, torch.eye(4, 3).long()), r"got \[4, 3\]; .* labels.argmax"),
    (lambda: fastkd.sup_con(S[None], Y), r"features .* \[N, M, D\] .*got \[1, 4, 3, 5\]: pool"),
    (lambda: fastkd.nt_xent(S, S), r"view1 .*\[4, 3, 5\]: pool .*flatten\(0, -2\)"),
    (lambda: fastkd.sup_con(Q), "needs labels, or positives.* got neither"),
    (lambda: fastkd.sup_con(Q, Y, positives=Q > 0), "got both"),
    (lambda: fastkd.sup_con(Q, Y, K), "got keys without key_labels"),
    (lambda: fastkd.sup_con(Q, Y, key_labels=Y), "got key_labels without keys"),
    (lambda: fastkd.sup_con(Q, None, K, Y, Q > 0), "got key_labels without labels"),
    (lambda: fastkd.sup_con(Q, Y, K, Y[:2]), r"key_labels need .*4 keys.* \[2\]"),
    (lambda: fastkd.sup_con(Q, positives=Q > 0), r"one column for each of 4 keys.* \[4, 3\]"),
    (lambda: fastkd.sup_con(S, Y, weights=Y), r"the shape \[4, 3\], got \[4\]"),
    (lambda: fastkd.sup_con(Q, Y, base_temperature=0), "base_temperature .* got 0"),
    (lambda: fastkd.similarity_kl(Q, K[:2]), "student and teacher"),
    (lambda: fastkd.similarity_kl(Q, K, form="ce"), "\"cross_entropy\", got 'ce'"),
    (
        lambda: fastkd.similarity_kl(Q, K, Q, K, symmetric=True, reduction="sum"),
        "not a loss of each query; got reduction='sum'",
    ),
    (lambda: fastkd.similarity_kl(Q, K, student_keys=K), "give both"),
    (
        lambda: fastkd.similarity_kl(Q, K, student_keys=K[:3], teacher_keys=K),
        "student_keys and teacher_keys",
    ),
    (
        lambda: fastkd.similarity_kl(Q, K, student_keys=K[:3], teacher_keys=K[:3], mask_self=True),
        "mask_self .* 3 and 4",
    ),
    # crops
    (lambda: fastkd.dino(S.flatten(0, 1), T), r"student needs .*\[12, 5\].*unfl"),
    (lambda: fastkd.dino(S, [T]), r"teacher needs crops.* \[2, 3, 5\]"),
    (lambda: fastkd.dino([*S], [*T.as_subclass(Spread)]), "teacher is a DTensor"),
    (lambda: fastkd.dino(S, 3.0), "teacher needs crops.* got float"),
    (lambda: fastkd.dino(S, [T[0], 1]), "teacher needs crops.* got list"),
    (lambda: fastkd.dino([], T), "student needs crops.* got no crop"),
    (lambda: fastkd.dino(S, T[:0]), "teacher needs crops.* got no crop"),
    (lambda: fastkd.dino(S[..., :0], T), r"K ≥ 1, got \[4, 3, 0\]"),
    (lambda: fastkd.dino(S.long(), T), "student .*floating-point.*int64"),
    (lambda: fastkd.dino(S, T[:, :2]), r"same B .*\[4, 3, 5\].*\[2, 2, 5\]"),
    (lambda: fastkd.dino([*S, S[0, :, :2]], T), r"same B .*\[3, 2\] in student"),
    (lambda: fastkd.dino(S, T.to("meta")), "student is on cpu, teacher on meta"),
    (lambda: fastkd.dino(S[:1], T[:1]), "teacher's 1 and the student's 1 crops"),
    (lambda: fastkd.dino(S, T, T[:1, 0]), r"center .* K = 5 .* \[1, 5\]"),
    (lambda: fastkd.dino(S, T, torch.ones(5).int()), "center needs .* of torch.int32"),
    (lambda: fastkd.dino(S, T, 0.0), r"center must .* \[K\], got float"),
    (lambda: fastkd.dino(S, T, T[0, 0].to("meta")), "center on meta"),
    (lambda: fastkd.dino(S, T, student_temperature=0), "student_temp.* got 0"),
    (lambda: fastkd.dino(S, T, teacher_temperature=-1), "teacher_temp.* got -1"),
    (lambda: fastkd.dino(S, T, temperature=1), "dino has no option 'temperature'"),
    (lambda: fastkd.dino(S, T, group=3), "init_process_group"),
    # modules
    (lambda: fastkd.DINOLoss(6)(S, T), r"K = 5 outputs, got \[6\]"),
    (lambda: fastkd.DINOLoss(0), "n_prototypes .* got 0"),
    (lambda: fastkd.DINOLoss(5, center_momentum=2), "center_momentum .* got 2"),
    (lambda: fastkd.DINOLoss(5, teacher_temperature=0), "teacher_temp.* got 0"),
    (lambda: fastkd.DINOLoss(5, T=1), "DINOLoss has no option 'T'"),
    (lambda: fastkd.DINOLoss(), "n_prototypes"),
    (lambda: fastkd.SkewKLLoss(alpha=0.1), "SkewKLLoss has no option 'alpha'.* skew"),
    (lambda: fastkd.KDLoss(T=4.0), "KDLoss has no option 'T'.* temperature"),
    (lambda: fastkd.KDLoss(weights=torch.ones(5)), "no option 'weights'"),
    (lambda: fastkd.ForwardKLLoss(temperature=0), "above 0, got 0"),
    (lambda: fastkd.LogitMSELoss(temperature=-1.0), "above 0, got -1"),
    (lambda: fastkd.KDLoss(alpha=1.5), "alpha .* got 1.5"),
    (lambda: fastkd.KDLoss(divergence="kl"), "forward_kl, .* got 'kl'"),
    (lambda: fastkd.JensenShannonLoss(beta=2), "beta .* got 2"),
    (lambda: fastkd.SymmetricKLLoss(weight=-1), "weight .* got -1"),
    (lambda: fastkd.CorrelationCongruenceLoss(form="rbf"), "\"kernel\", got 'rbf'"),
    (lambda: fastkd.DISTLoss(temperature=0), "above 0, got 0"),
    (lambda: fastkd.ReverseKLLoss(reduction="avg"), "\"mean\".* got 'avg'"),
]
KINDS = {"floating-point": TypeError, "must be a tensor": TypeError, "has no option": TypeError}
KINDS |= {
    "no option": TypeError,
    "init_process_group": RuntimeError,
    "needs crops.* got float": TypeError,
}
KINDS |= {"got list": TypeError, "got float": TypeError, "labels .*float32": TypeError}
KINDS |= {"n_prototypes$": TypeError, "is a DTensor": TypeError}


@pytest.mark.parametrize("call, sentence", CALLS)
def test_what_does_not_fit_is_told(call, sentence):
    kinds = [kind for part, kind in KINDS.items() if part in f"{sentence}$"]
    with pytest.raises((kinds or [ValueError])[0], match=sentence):
        call()
