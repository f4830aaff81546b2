"""Tiles of rows that are too long to stay on chip, of a student and of what its teachers say."""

from typing import NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.ensembles.tiles import mixture_tile, teacher_tile
from fastkd.kernels.rows.reading import edges, vectors
from fastkd.kernels.tiles import INFINITY


class Span(NamedTuple):
    """A row of n_cols elements in vectors, of which `head` elements precede the first."""

    n_vectors: tl.tensor
    head: tl.tensor
    n_cols: tl.tensor


@triton.jit
def tile_of(i, span, AT_EDGE: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the columns [R, K] from vector i, or those of the row's two edges, and a mask."""
    if AT_EDGE:
        return edges(span.head, span.n_cols, THREADS, WIDTH)
    inside = (i + tl.arange(0, THREADS) < span.n_vectors)[:, None]
    return vectors(i, THREADS, WIDTH), tl.broadcast_to(inside, THREADS, WIDTH)


@triton.jit
def has_edges(span, WIDTH: tl.constexpr):
    """Return whether a row has elements before its first vector or after its last one."""
    return span.n_cols % WIDTH + span.head > 0


@triton.jit
def load_tile(
    student_row, of, i, span, AT_EDGE: tl.constexpr, TERM: tl.constexpr, COMBINE: tl.constexpr,
    LOGS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Return a tile of the student's logits, and of those that the teachers make of this TERM."""
    columns, inside = tile_of(i, span, AT_EDGE, THREADS, WIDTH)
    if COMBINE == "mixture":
        y = mixture_tile(of, columns, inside, LOGS, DTYPE, FAST)
    else:
        y = teacher_tile(of, columns, inside, TERM, COMBINE, DTYPE)
    return tl.load(student_row + columns, inside, -INFINITY).to(DTYPE), y
