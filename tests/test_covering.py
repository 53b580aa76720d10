"""``covering.py``: every possible pair of options occurs, in far fewer cases than there are combinations."""

import itertools
import random

import pytest
from covering import covering, drawn_cases, every_pair

OPTIONS = {"a": (1, 2, 3), "b": "wxyz", "c": (False, True), "d": range(5)}


def possible(case):
    return not (case.get("a") == 1 and case.get("c"))


def test_every_pair_that_is_possible_occurs_and_no_other():
    for seed in range(20):
        cases = covering(OPTIONS, random.Random(seed), possible).values()
        found = {pair for case in cases for pair in itertools.combinations(case.items(), 2)}
        names = itertools.combinations(OPTIONS, 2)
        every = {((a, x), (b, y)) for a, b in names for x in OPTIONS[a] for y in OPTIONS[b]}
        assert every - found == {(("a", 1), ("c", True))}
        assert 20 <= len(cases) <= 27  # of 100


def test_cases_are_those_of_a_seed_and_the_same_ones_unless_it_is_given(monkeypatch):
    found = []
    for seed in (None, "0", "1"):
        monkeypatch.delenv("G2G_CASES", raising=False)
        if seed:
            monkeypatch.setenv("G2G_CASES", seed)
        found.append(list(drawn_cases(OPTIONS)))
    assert found[0] == found[1] != found[2]


def test_a_test_gets_values_names_and_marks():
    names, cases = every_pair(a=(1,), b=("x", pytest.param(2, id="two", marks=pytest.mark.ci))).mark.args
    assert names == ["a", "b"]
    found = sorted((case.id, case.values, [each.name for each in case.marks]) for case in cases)
    assert found == [("a=1 two", (1, 2), ["ci"]), ("a=1 x", (1, "x"), [])]
