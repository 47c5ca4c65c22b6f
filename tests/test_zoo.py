"""Every wrong answer of the zoo loses its points, every right one gets full marks."""

from __future__ import annotations

import pytest
from rich.console import Console

from tools import psets


@pytest.mark.parametrize("pset", psets.problem_sets())
def test_zoo(pset: str) -> None:
    assert psets.run_zoo(pset, Console(quiet=True)) == []


@pytest.mark.parametrize("pset", psets.problem_sets())
def test_masters_pass_for_other_students(pset: str) -> None:
    nb = psets.read_master(pset)
    for who in ("grace", "alan", "emmy"):
        with psets.student(who):
            assert not any(psets.grade(nb).values())


@pytest.mark.parametrize("pset", psets.problem_sets())
def test_zoo_is_large_enough(pset: str) -> None:
    answers = psets.zoo(pset)
    for cell in psets.solutions(psets.read_master(pset)):
        mine = [a for a in answers if a.cell == cell]
        assert sum(bool(a.fails) for a in mine) >= 5
        assert sum(not a.fails for a in mine) >= 2
