"""How tests choose among their parameters: what `make test` leaves out, and pairs instead of all."""

import itertools
import random

import pytest

ENGINES = ["portable", "portable in chunks", "triton"]
full = pytest.mark.full  # only `make test-all` runs it


def quick_if(condition):
    """Mark `full` the combinations of parameters that the condition, a function of some, refuses."""
    return pytest.mark.quick_if.with_args(condition)


def pairwise(**axes):
    """Parametrize a test so that every two values of any two axes meet in one combination at least."""
    values = [[*axis] for axis in axes.values()]
    rows = [tuple(values[i][k] for i, k in enumerate(row)) for row in covering(map(len, values))]
    indirect = ["engine"] if "engine" in axes else False
    return pytest.mark.parametrize([*axes], rows, indirect=indirect, ids=str)


def covering(sizes):
    """Return rows of indices that hold every pair of two columns; greedy, always the same ones."""
    sizes, chance = [*sizes], random.Random(0)
    columns = [*itertools.combinations(range(len(sizes)), 2)]
    missing = {(i, a, j, b) for i, j in columns for a in range(sizes[i]) for b in range(sizes[j])}

    def pairs(row):
        return {(i, row[i], j, row[j]) for i, j in columns}

    rows = []
    while missing:
        i, a, j, b = min(missing)
        candidates = []
        for _ in range(20):
            row = [chance.randrange(size) for size in sizes]
            row[i], row[j] = a, b
            for place in chance.sample(range(len(sizes)), len(sizes)):
                if place not in (i, j):

                    def gain(value, row=row, place=place):
                        return len(pairs([*row[:place], value, *row[place + 1 :]]) & missing)

                    row[place] = max(range(sizes[place]), key=gain)
            candidates.append(row)
        best = max(candidates, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        rows.append(best)
    return rows
