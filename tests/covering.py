"""Cases in which every pair of options occurs, in place of their product.

``@every_pair(reset=RESETS, surrogate=SURROGATES, held=(False, True))`` stands for three ``pytest.mark.parametrize``.
The cases are always the same ones, except with ``-m long``, which draws others each time and ends with their seed:
``G2G_CASES=SEED pytest ...`` runs them again.
"""

import itertools
import os
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

Case = dict[str, Any]


def covering(
    options: Mapping[str, Iterable[Any]], draw: random.Random, possible: Callable[[Case], bool] = lambda case: True
) -> dict[str, Case]:
    """A few cases, by name, in which every pair of the arguments' values occurs that is possible; ``possible`` says
    whether values go together, and is also asked for two alone."""
    values = {argument: list(each) for argument, each in options.items()}
    places = [[(argument, number) for number in range(len(each))] for argument, each in values.items()]
    pairs = [pair for one, other in itertools.combinations(places, 2) for pair in itertools.product(one, other)]

    def case(numbers: Iterable[tuple[str, int]]) -> Case:
        return {argument: values[argument][number] for argument, number in numbers}

    missing = dict.fromkeys(pair for pair in pairs if possible(case(pair)))
    found = {}
    while missing:
        wanted = dict(draw.choice(list(missing)))
        best: tuple[Any, ...] = ()
        gain: set[Any] = set()
        for _ in range(50):
            drawn = tuple((name, wanted.get(name, draw.randrange(len(each)))) for name, each in values.items())
            new = missing.keys() & set(itertools.combinations(drawn, 2))
            if len(new) > len(gain) and possible(case(drawn)):
                best, gain = drawn, new
        missing = {pair: None for pair in missing if pair not in gain}
        if best:
            found[name_of(case(best))] = case(best)
    return found


def name_of(case: Case) -> str:
    names = ((argument, getattr(value, "id", value)) for argument, value in case.items())
    return " ".join(name if isinstance(name, str) else f"{argument}={name}" for argument, name in names)


def drawn_cases(
    options: Mapping[str, Iterable[Any]], possible: Callable[[Case], bool] = lambda case: True
) -> dict[str, Case]:
    """The covering cases of the seed that ``G2G_CASES`` names, or of the usual one."""
    return covering(options, random.Random(os.environ.get("G2G_CASES", "0")), possible)


def every_pair(
    possible: Callable[[Case], bool] = lambda case: True, /, **options: Iterable[Any]
) -> pytest.MarkDecorator:
    """Parametrizes a test by covering cases of these arguments, whose values may be ``pytest.param`` with marks."""
    cases = []
    for name, case in drawn_cases(options, possible).items():
        each = [value if isinstance(value, type(pytest.param())) else pytest.param(value) for value in case.values()]
        marks = [mark for value in each for mark in value.marks]
        cases.append(pytest.param(*(value for of in each for value in of.values), id=name, marks=marks))
    return pytest.mark.parametrize(list(options), cases)
