"""``covering.py``: every possible pair of options occurs, in far fewer cases than there are combinations."""

import itertools
import random

import pytest
from covering import covering, every_pair

OPTIONS = {"a": (1, 2, 3), "b": "wxyz", "c": (False, True), "d": range(5)}


def possible(case):
    return not (case.get("a") == 1 and case.get("c"))


def test_every_pair_that_is_possible_occurs_and_no_other():
    for day in range(20):
        cases = covering(OPTIONS, random.Random(day), possible).values()
        found = {pair for case in cases for pair in itertools.combinations(case.items(), 2)}
        names = itertools.combinations(OPTIONS, 2)
        every = {((a, x), (b, y)) for a, b in names for x in OPTIONS[a] for y in OPTIONS[b]}
        assert every - found == {(("a", 1), ("c", True))}
        assert 20 <= len(cases) <= 27  # of 100


def test_a_day_has_cases_of_its_own():
    first, again, other = (list(covering(OPTIONS, random.Random(day))) for day in ("1", "1", "2"))
    assert first == again != other


def test_a_test_gets_values_names_and_marks():
    names, cases = every_pair(a=(1,), b=("x", pytest.param(2, id="two", marks=pytest.mark.ci))).mark.args
    assert names == ["a", "b"]
    found = sorted((case.id, case.values, [each.name for each in case.marks]) for case in cases)
    assert found == [("a=1 two", (1, 2), ["ci"]), ("a=1 x", (1, "x"), [])]
