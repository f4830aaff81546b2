"""How tests choose among their parameters: what `make test` leaves out, pairs instead of all."""

import itertools
import random

import pytest

ENGINES = ["portable", "portable in chunks", "triton"]
full = pytest.mark.full  # only `make test-all` runs it


def quick_if(condition):
    """Mark `full` the combinations that the condition, a function of some parameters, refuses."""
    return pytest.mark.quick_if.with_args(condition)


def pairwise(**axes):
    """Parametrize a test so that every two values of any two axes meet at least once."""
    values = [[*axis] for axis in axes.values()]
    rows = [tuple(values[i][k] for i, k in enumerate(row)) for row in covering(map(len, values))]
    indirect = ["engine"] if "engine" in axes else False
    return pytest.mark.parametrize([*axes], rows, indirect=indirect, ids=str)


def covering(sizes):
    """Return rows of indices that hold every pair of two columns; greedy, always the same ones."""
    sizes, chance = [*sizes], random.Random(0)
    columns = [*itertools.combinations(range(len(sizes)), 2)]
    missing = {(i, a, j, b) for i, j in columns for a in range(sizes[i]) for b in range(sizes[j])}

    def found(row):
        return {(i, row[i], j, row[j]) for i, j in columns}

    def gain(row):
        return len(found(row) & missing)

    rows = []
    while missing:
        i, a, j, b = min(missing)
        candidates = []
        for _ in range(20):
            row = [chance.randrange(size) for size in sizes]
            row[i], row[j] = a, b
            for place in {*range(len(sizes))} - {i, j}:
                trials = [[*row[:place], value, *row[place + 1 :]] for value in range(sizes[place])]
                row = max(trials, key=gain)
            candidates.append(row)
        best = max(candidates, key=gain)
        missing -= found(best)
        rows.append(best)
    return rows
