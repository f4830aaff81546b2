"""Schedules: their values at the ends and between, and that they are plain data."""

import math
import pickle

import pytest

from fastkd.schedules import constant, cosine, linear, until, warmup

MADE = [
    constant(0.5),
    linear(8.0, 1.0, 10, warmup=2),
    cosine(0.996, 1.0, 10),
    warmup(4, cosine(1.0, 0.0, 6)),
    until(5, linear(1.0, 0.0, 5), 2.0),
]


def values(schedule, steps):
    return [schedule(step) for step in steps]


def test_a_line_keeps_its_start_and_its_end():
    assert values(linear(8.0, 2.0, 5, warmup=2), range(8)) == [8, 8, 8, 6, 4, 2, 2, 2]
    assert values(linear(0.1, 0.3, 1), (0, 1, 9)) == [0.1, 0.3, 0.3]
    assert values(linear(1.0, 3.0, 0), (0, 1)) == [3.0, 3.0]


def test_a_cosine_is_flat_at_both_ends():
    schedule = cosine(0.996, 1.0, 100, warmup=20)
    assert values(schedule, (0, 20, 100, 101)) == [0.996, 0.996, 1.0, 1.0]
    for step in (21, 37, 60, 99):
        x = (step - 20) / 80
        assert schedule(step) == pytest.approx(1 - 0.004 * (1 + math.cos(math.pi * x)) / 2, 1e-15)
    assert schedule(60) == pytest.approx(0.998, 1e-15)


def test_a_warm_up_ends_where_the_next_schedule_begins():
    assert values(warmup(4, 2.0), range(6)) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    schedule = warmup(2, linear(4.0, 0.0, 4), start=2.0)
    assert values(schedule, range(8)) == [2, 3, 4, 3, 2, 1, 0, 0]
    assert values(warmup(0, 2.0), (0, 1)) == [2.0, 2.0]


def test_a_phase_ends_before_its_step():
    assert values(until(3, 0.5, 1.0), range(5)) == [0.5, 0.5, 0.5, 1.0, 1.0]
    schedule = until(2, linear(0.0, 4.0, 4), linear(10.0, 12.0, 2))
    assert values(schedule, range(6)) == [0, 1, 10, 11, 12, 12]
    assert values(until(2, lambda step: step / 4, 7), range(3)) == [0.0, 0.25, 7.0]


@pytest.mark.parametrize("schedule", MADE, ids=str)
def test_a_pickle_is_the_same_schedule(schedule):
    twin = pickle.loads(pickle.dumps(schedule))
    assert twin == schedule and hash(twin) == hash(schedule)
    assert values(twin, range(12)) == values(schedule, range(12))
    assert all(type(x) is float for x in values(schedule, range(12)))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: constant(math.nan), ValueError, "value must be a finite number, got nan"),
        (lambda: linear("1", 2.0, 3), ValueError, "start must be a finite number, got '1'"),
        (lambda: cosine(1.0, math.inf, 3), ValueError, "end must be a finite number, got inf"),
        (lambda: linear(1.0, 2.0, 2.5), ValueError, "steps must be a whole number .* got 2.5"),
        (lambda: linear(1.0, 2.0, 3, warmup=-1), ValueError, "warmup must be a whole number"),
        (lambda: cosine(1.0, 2.0, 3, 5), ValueError, "got 3 of those: pass steps=8"),
        (lambda: until(3, "1", 2.0), TypeError, "value must be a number or a schedule, .* got str"),
        (lambda: warmup(3, None), TypeError, "then must be a number or a schedule"),
    ],
)
def test_what_is_no_schedule_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
