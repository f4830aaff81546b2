"""Two tokenizations of one text: which tokens of one cover the same bytes as tokens of the other.

A tokenizer of Hugging Face returns offsets with `return_offsets_mapping=True`, in characters. Where
a token ends inside a character, as tokens of bytes may, take bytes for both: `byte_offsets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Offsets = Sequence[tuple[int, int]]  # where each token starts and ends, the end not included


class Alignment(NamedTuple):
    """The groups of two tokenizations of one text: the shortest whose ends coincide.

    A group has a number, in the order of the text, and tokens of both. A token without text, as
    special ones are, is in no group: −1.
    """

    student: list[int]  # the group of each of the student's tokens
    teacher: list[int]  # the group of each of the teacher's
    n_groups: int

    def spans(self) -> list[tuple[range, range]]:
        """Return the tokens of each group, the student's and the teacher's."""
        found = []
        for places in (_places(self.student), _places(self.teacher)):
            found.append([range(places[i][0], places[i][1] + 1) for i in range(self.n_groups)])
        return list(zip(*found, strict=True))


class Groups(NamedTuple):
    """The groups of the sequences of a batch, padded to one length."""

    student: Tensor  # [B, L], the group of each of the student's tokens, −1 for none
    teacher: Tensor  # [B, L'], the group of each of the teacher's
    student_first: Tensor  # [B, C], the first token of each group, 0 where there is no group
    teacher_first: Tensor  # [B, C]
    present: Tensor  # [B, C], bool: whether there is a group


def align(student_offsets: Offsets, teacher_offsets: Offsets) -> Alignment:
    """Group the tokens of two tokenizations of one text by the places where both end a token.

    Tokens that share a character, as the bytes of one do, are in one group. Text that a tokenizer
    drops between two tokens, such as a space, belongs to the next of them.

    Args:
        student_offsets: (start, end) of each of the student's tokens, in characters or in bytes of
            the text, in its order. A token with start = end has no text.
        teacher_offsets: Those of the teacher's tokens, in the same unit.

    Returns:
        The group of each token. It takes time for the number of tokens.

    Raises:
        ValueError: Offsets are not in the order of the text, or the tokenizations end at different
            places.
    """
    student_ends = _ends("student_offsets", student_offsets)
    teacher_ends = _ends("teacher_offsets", teacher_offsets)
    last = [ends[-1][0] if ends else 0 for ends in (student_ends, teacher_ends)]
    if last[0] != last[1]:
        raise ValueError(
            "both tokenizations must cover the same text in the same unit, got student_offsets "
            f"that end at {last[0]} and teacher_offsets that end at {last[1]}: cut the longer one "
            "there, or make bytes of characters by byte_offsets"
        )
    student, teacher = [-1] * len(student_offsets), [-1] * len(teacher_offsets)
    group = i = j = 0
    while i < len(student_ends):
        first = i, j
        while student_ends[i][0] != teacher_ends[j][0]:
            if student_ends[i][0] < teacher_ends[j][0]:
                i += 1
            else:
                j += 1
        for groups, ends, places in (
            (student, student_ends, range(first[0], i + 1)),
            (teacher, teacher_ends, range(first[1], j + 1)),
        ):
            for place in places:
                for token in ends[place][1]:
                    groups[token] = group
        i, j, group = i + 1, j + 1, group + 1
    return Alignment(student, teacher, group)


def _ends(name: str, offsets: Offsets) -> list[tuple[int, list[int]]]:
    """Return the ends of tokens that are no part of the next token, and the tokens before each."""
    found: list[tuple[int, list[int]]] = []
    last_start = last_end = 0
    for token, (start, end) in enumerate(offsets):
        if start == end:
            continue
        if not 0 <= start < end:
            raise ValueError(
                f"{name} must be (start, end) with 0 ≤ start ≤ end, got {(start, end)}"
            )
        if start < last_start or end < last_end:
            raise ValueError(
                f"{name} must be in the order of the text, got {(start, end)} after "
                f"{(last_start, last_end)}: pass those of one text at a time"
            )
        if found and start < last_end:  # both have a part of one character
            _, before = found.pop()
            before.append(token)
            found.append((end, before))
        else:
            found.append((end, [token]))
        last_start, last_end = start, end
    return found


def byte_offsets(text: str, tokens: Iterable[bytes] | Offsets) -> list[tuple[int, int]]:
    """Return (start, end) of each token in bytes of the text, encoded as UTF-8.

    Args:
        text: The text.
        tokens: The bytes of each token, which are the text one after the other, or the offsets of
            each token in characters, as tokenizers of Hugging Face return them. SentencePiece gives
            no text to the first bytes of a character that it has no token for: take bytes there.

    Raises:
        ValueError: The tokens are not those of the text.
    """
    pieces: list[Any] = list(tokens)
    encoded = text.encode()
    found = []
    if pieces and not isinstance(pieces[0], bytes):
        places = [0]
        for character in text:
            places.append(places[-1] + len(character.encode()))
        for start, end in pieces:
            if not 0 <= start <= end < len(places):
                raise ValueError(
                    f"tokens must have offsets (start, end) with 0 ≤ start ≤ end ≤ {len(text)}, in "
                    f"characters of the text, got {(start, end)}"
                )
            found.append((places[start], places[end]))
        return found
    place = 0
    for i, token in enumerate(pieces):
        end = place + len(token)
        if encoded[place:end] != token:
            raise ValueError(
                f"tokens must be the bytes of the text one after the other, got {token!r} as token "
                f"{i} where the text has {encoded[place:end]!r}: leave special tokens out, or pass "
                'b"" for them'
            )
        found.append((place, end))
        place = end
    if place != len(encoded):
        raise ValueError(
            f"tokens must be the whole text, got {place} of its {len(encoded)} bytes: cut the text "
            "there"
        )
    return found


def group_tensors(
    alignments: Sequence[Alignment], *, device: torch.device | str | None = None
) -> Groups:
    """Return the groups of the sequences of a batch as tensors, for the losses.

    `sum_by_group(logprobs, groups.student, groups.present.shape[1])` has the log-probability of
    each group, of which `alm` wants both networks' and `weights=groups.present`. The distributions
    that the other losses compare are those of the first token of each group, which both networks
    predict from the same text: `logits.take_along_dim(groups.student_first.unsqueeze(-1), 1)`, if
    position i of the logits predicts token i.

    Args:
        alignments: What `align` returned for each sequence. Tokens beyond its end have no group.
        device: Where the tensors are.

    Raises:
        ValueError: There is no sequence.
    """
    if not alignments:
        raise ValueError("alignments must hold one alignment for each sequence, got none")
    n_groups = max(x.n_groups for x in alignments)
    of_each = [[x.student for x in alignments], [x.teacher for x in alignments]]
    student, teacher = (_padded(x, max(map(len, x)), -1, device) for x in of_each)
    student_first, teacher_first = (
        _padded([[first for first, _ in _places(x).values()] for x in groups], n_groups, 0, device)
        for groups in of_each
    )
    sizes = torch.tensor([x.n_groups for x in alignments], device=device)
    present = torch.arange(n_groups, device=device) < sizes[:, None]
    return Groups(student, teacher, student_first, teacher_first, present)


def _padded(
    rows: Sequence[Sequence[int]], width: int, value: int, device: torch.device | str | None
) -> Tensor:
    rows = [[*row, *[value] * (width - len(row))] for row in rows]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), width)


def _places(groups: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Return the first and the last token of each group, in the order of the groups."""
    found: dict[int, tuple[int, int]] = {}
    for token, group in enumerate(groups):
        if group >= 0:
            found[group] = found.get(group, (token, token))[0], token
    return found
