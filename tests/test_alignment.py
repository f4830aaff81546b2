"""Tokenizations of one text are grouped where both end a token, and the groups become tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

import fastkd


def cuts(ends):
    """Return the offsets of tokens that end at these places."""
    return [*zip([0, *ends], ends, strict=False)]


def text_of(token_range, offsets, text):
    return "".join(text[slice(*offsets[i])] for i in token_range)


@some.composite
def tokenizations(draw):
    """Draw a text and two ways to cut it, with tokens without text among them."""
    text = draw(some.text(min_size=1, max_size=30))
    found = []
    for _ in range(2):
        inner = draw(some.lists(some.integers(0, len(text)), max_size=len(text)))
        found.append(cuts([*sorted(inner), len(text)]))
    return text, *found


@given(tokenizations())
def test_groups_are_the_shortest_that_cover_the_same_text(drawn):
    text, student, teacher = drawn
    found = fastkd.align(student, teacher)
    spans = found.spans()
    assert found.n_groups == len(spans)
    # both have the same text in each group, and all of it in all of them
    for of_student, of_teacher in spans:
        assert text_of(of_student, student, text) == text_of(of_teacher, teacher, text) != ""
    assert "".join(text_of(x, student, text) for x, _ in spans) == text
    # a group for each place where both end a token
    ends = [{end for start, end in offsets if start < end} for offsets in (student, teacher)]
    assert [student[x[-1]][1] for x, _ in spans] == sorted(ends[0] & ends[1])
    for groups, offsets in ((found.student, student), (found.teacher, teacher)):
        assert [g == -1 for g in groups] == [start == end for start, end in offsets]
        numbers = [g for g in groups if g >= 0]
        assert numbers == sorted(numbers)


def test_an_example():
    #   un|believ|able|!        unbe|liev|able!
    student = [(0, 0), (0, 2), (2, 8), (8, 12), (12, 13)]
    teacher = [(0, 4), (4, 8), (8, 13), (13, 13)]
    found = fastkd.align(student, teacher)
    assert found == ([-1, 0, 0, 1, 1], [0, 0, 1, -1], 2)
    assert found.spans() == [(range(1, 3), range(2)), (range(3, 5), range(2, 3))]
    assert fastkd.align([], []) == ([], [], 0)
    assert fastkd.align([(0, 0)], []).spans() == []


def test_dropped_spaces_and_shared_characters():
    # one tokenizer keeps the space before a word, the other one drops it
    assert fastkd.align([(0, 1), (1, 3)], [(0, 1), (2, 3)]) == ([0, 1], [0, 1], 2)
    # three tokens are bytes of one character
    three = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    assert fastkd.align(three, [(0, 1), (1, 2), (2, 3)]).student == [0, 1, 1, 1, 2]
    assert fastkd.align(three, three).teacher == [0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        (
            [(0, 3)],
            [(0, 2)],
            "student_offsets that end at 3 and teacher_offsets that end at 2: cut",
        ),
        ([(0, 3)], [], "end at 3 and .* end at 0"),
        ([(2, 4), (0, 2)], [(0, 4)], r"student_offsets .* order .* got \(0, 2\) after \(2, 4\)"),
        ([(2, 4), (1, 5)], [(0, 5)], r"student_offsets .* got \(1, 5\) after \(2, 4\)"),
        ([(0, 4)], [(3, 2)], r"teacher_offsets must be \(start, end\) .* got \(3, 2\)"),
        ([(0, 4)], [(-1, 4)], r"teacher_offsets must be \(start, end\) .* got \(-1, 4\)"),
    ],
)
def test_errors_of_offsets(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        fastkd.align(student, teacher)


@given(some.text(max_size=20), some.data())
def test_byte_offsets(text, data):
    encoded = text.encode()
    ends = data.draw(some.lists(some.integers(0, len(encoded)), max_size=8))
    offsets = cuts([*sorted(ends), len(encoded)])
    assert fastkd.byte_offsets(text, [encoded[slice(*x)] for x in offsets]) == offsets
    ends = data.draw(some.lists(some.integers(0, len(text)), max_size=8))
    offsets = cuts([*sorted(ends), len(text)])
    in_bytes = fastkd.byte_offsets(text, offsets)
    pieces = [text[slice(*x)] for x in offsets]
    assert [encoded[slice(*x)].decode() for x in in_bytes] == pieces


def test_errors_of_byte_offsets():
    with pytest.raises(ValueError, match=r"got b'x' as token 1 where the text has b'\\x82': leave"):
        fastkd.byte_offsets("€", [b"\xe2", b"x", b"\xac"])
    with pytest.raises(ValueError, match="the whole text, got 2 of its 3 bytes: cut"):
        fastkd.byte_offsets("€", [b"\xe2", b"\x82"])
    with pytest.raises(ValueError, match=r"≤ 1, in characters of the text, got \(0, 3\)"):
        fastkd.byte_offsets("€", [(0, 3)])


def test_groups_of_a_batch_are_tensors():
    alignments = [
        fastkd.align([(0, 0), (0, 2), (2, 5), (5, 6)], [(0, 5), (5, 6)]),
        fastkd.align([(0, 1)], [(0, 1), (1, 1), (1, 1)]),
    ]
    groups = fastkd.group_tensors(alignments)
    assert groups.student.tolist() == [[-1, 0, 0, 1], [0, -1, -1, -1]]
    assert groups.teacher.tolist() == [[0, 1, -1], [0, -1, -1]]
    assert groups.student_first.tolist() == [[1, 3], [0, 0]]
    assert groups.teacher_first.tolist() == [[0, 1], [0, 0]]
    assert groups.present.tolist() == [[True, True], [True, False]]
    assert all(x.device.type == "meta" for x in fastkd.group_tensors(alignments, device="meta"))
    assert fastkd.group_tensors([fastkd.align([], [])]).present.shape == (1, 0)
    with pytest.raises(ValueError, match="one alignment for each sequence, got none"):
        fastkd.group_tensors([])


def test_likelihoods_of_groups_are_products():
    """The chain rule, in both tokenizations, whatever stands in padding and special tokens."""
    groups = fastkd.group_tensors(
        [
            fastkd.align([(0, 0), (0, 2), (2, 5), (5, 6)], [(0, 5), (5, 6)]),
            fastkd.align([(0, 1)], [(0, 1)]),
        ]
    )
    probabilities = torch.tensor([[0.9, 0.5, 0.25, 0.5], [0.125, 0.0, 0.0, 0.0]])
    found = fastkd.sum_by_group(probabilities.log(), groups.student, 2)
    torch.testing.assert_close(found.exp(), torch.tensor([[0.125, 0.5], [0.125, 1.0]]))
    teacher = fastkd.sum_by_group(torch.tensor([[0.3, 0.5], [0.5, 0.1]]).log(), groups.teacher, 2)
    each = fastkd.alm(found, teacher, reduction="none")
    mean = fastkd.alm(found, teacher, weights=groups.present)
    torch.testing.assert_close(mean, (each[0, 0] + each[0, 1] + each[1, 0]) / 3)
