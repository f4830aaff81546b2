"""The work of kernels that walk over points or tiles in a trip, which their bytes do not tell.

Of relations each thread has some pairs of its program's tile, whose parts it loads for itself. A
trip handles one point of every pair (of `squares`: DEPTH features). Of similarities, and of tokens,
a trip handles a tile of pairs, in products of tiles on tensor cores.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

from fastkd.kernels.relations.tiles import TILE

SIDE = TILE.value


class Work(NamedTuple):
    """The work of one launch."""

    per_trip: float  # pairs and points that a program handles in a trip
    trips: float  # of all programs together
    programs: float  # that have any
    bytes_per_trip: float  # asked for by a program
    flops: float = 0  # on tensor cores, of all programs together


def upper(tiles: int) -> float:
    """Return the number of programs that do not leave their work to the one above the diagonal."""
    return tiles * (tiles + 1) / 2


def squares(x: Mapping[str, Any], grid: tuple[int, ...]) -> Work:
    side, depth = x["SIDE"], x["DEPTH"]
    programs = upper(grid[0])  # of each network
    networks = [(x[name].width, x[name].ptr.dtype.itemsize) for name in NETWORKS]
    trips = sum(programs * -(-width // depth) for width, _ in networks)
    moved = sum(size for _, size in networks) / 2 * 2 * side * depth
    return Work(side * side * depth, trips, 2 * programs, moved)


def edges(x: Mapping[str, Any], grid: tuple[int, ...]) -> Work:
    tiles, _, splits = grid
    size = x["pairs_ptr"].dtype.itemsize
    return Work(SIDE * SIDE, upper(tiles) * x["n"], upper(tiles) * splits, 2 * 4 * SIDE * size)


def distances(x: Mapping[str, Any], grid: tuple[int, ...]) -> Work:
    return Work(SIDE * SIDE, 0, prod(grid), 0)


def sum_splits(x: Mapping[str, Any], grid: tuple[int, ...]) -> Work:
    programs, size = prod(grid), x["pairs_ptr"].dtype.itemsize
    trips = programs * max(0, x["n_splits"] - 1) if x["NEEDS_GRAD"] else 0
    return Work(SIDE * SIDE, trips, programs, SIDE * SIDE * size)


def laplacian(x: Mapping[str, Any], grid: tuple[int, ...]) -> Work:
    rows, columns, depth, programs = x["ROWS"], x["COLUMNS"], x["DEPTH"], prod(grid)
    moved = rows * x["slopes_ptr"].dtype.itemsize + columns * x["x"].ptr.dtype.itemsize
    trips = programs * -(-x["n"] // depth)
    return Work(rows * columns * depth, trips, programs, moved * depth)


def tiles(x: Mapping[str, Any], grid: tuple[int, ...], *products: tuple[str, str, int]) -> Work:
    """`products`: the arguments with similarities and their tiles, and the products of each."""
    rows, columns = x["TILE"].ROWS, x["TILE"].COLUMNS
    trips = x["n_padded"] // rows * -(-x["m"] // columns)
    networks = [(x[matrix].y.ptr.dtype.itemsize, x[tile].DEPTH, n) for matrix, tile, n in products]
    moved = sum(columns * depth * size for size, depth, _ in networks)
    flops = sum(2 * rows * columns * depth * n for _, depth, n in networks)
    return Work(rows * columns, trips, prod(grid), moved, trips * flops)


def with_values(x: Mapping[str, Any], grid: tuple[int, ...]) -> Work:
    return tiles(x, grid, ("similarities", "TILE", 2 - (x["values_ptr"] is None)))


def of_two(x: Mapping[str, Any], grid: tuple[int, ...], n: int) -> Work:
    return tiles(x, grid, ("student", "TILE", n), ("teacher", "TILE_T", 1))


def of_tokens(x: Mapping[str, Any], grid: tuple[int, ...], n: int) -> Work:
    """`n`: the products of the student; a program meets every tile of its head."""
    rows, columns = x["TILE"].ROWS, x["TILE"].COLUMNS
    trips = prod(grid) * -(-x["n_tokens"] // columns)
    depths = x["TILE"].DEPTH, x["TILE"].DEPTH_T
    sizes = [x[name].ptr.dtype.itemsize for name in NETWORKS]
    moved = sum(columns * depth * size for depth, size in zip(depths, sizes, strict=True))
    flops = 2 * rows * columns * (n * depths[0] + depths[1])
    return Work(rows * columns, trips, prod(grid), moved, trips * flops)


SWEEPS: dict[str, Callable[..., Work]] = {
    "log_sums": with_values,
    "row_and_column_log_sums": lambda x, grid: tiles(x, grid, ("similarities", "TILE", 1)),
    "softplus_sums": with_values,
    "weighed_sums": with_values,
    "divergences": lambda x, grid: of_two(x, grid, 1),
    "weighed_differences": lambda x, grid: of_two(x, grid, 2),
    "relation_divergences": lambda x, grid: of_tokens(x, grid, 1),
    "relation_gradients": lambda x, grid: of_tokens(x, grid, 2),
    "relation_squares": lambda x, grid: of_tokens(x, grid, 2 - (x["gradient_ptr"] is None)),
}
NETWORKS = ("student", "teacher")
KERNELS: dict[str, Callable[..., Work]] = {
    kernel.__name__: kernel for kernel in (squares, distances, edges, sum_splits, laplacian)
} | SWEEPS


def work_of(launch: Any) -> Work | None:
    """None for a kernel that reads everything once."""
    found = KERNELS.get(launch.name)
    return found and found(launch.args, launch.grid)
