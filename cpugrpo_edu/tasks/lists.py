"""List manipulation, a domain that is not mathematics: ``reverse, drop first``."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from cpugrpo_edu.data import (
    ANSWER_MARK,
    Problem,
    Step,
    StepReport,
)
from cpugrpo_edu.tasks.answers import ExactMatch
from cpugrpo_edu.tasks.equations import step_score, working_lines
from cpugrpo_edu.tasks.spelling import plain_text, without_markup

OPERATIONS: dict[str, Callable[[list[str]], list[str]]] = {
    "reverse": lambda items: items[::-1],
    "rotate left": lambda items: items[1:] + items[:1],
    "rotate right": lambda items: items[-1:] + items[:-1],
    "swap ends": lambda items: [items[-1], *items[1:-1], items[0]],
    "drop first": lambda items: items[1:],
    "drop last": lambda items: items[:-1],
    "sort": sorted,
}
SHAPES: dict[str, tuple[int, int]] = {
    # difficulty: (letters, operations)
    "basic": (4, 2),
    "intermediate": (5, 3),
    "advanced": (6, 4),
}
LETTERS = "abcdefghijkl"
SORTED = {"basic": 3, "intermediate": 4, "advanced": 5}
"""Letters of a list that is only sorted."""


@dataclass(frozen=True)
class Lists(ExactMatch):
    name: str = "lists"

    def generate(self, difficulty: str, rng: random.Random) -> Problem:
        length, count = SHAPES[difficulty]
        items = rng.sample(LETTERS, length)
        names = [rng.choice(list(OPERATIONS)) for _ in range(count)]
        return self.problem(difficulty, items, names)

    def problem(self, difficulty: str, items: list[str], names: list[str]) -> Problem:
        """What asks for these operations, one after the other."""
        lines, current = [], items
        for name in names:
            current = OPERATIONS[name](current)
            lines.append(f"{name}: {' '.join(current)}")
        answer = " ".join(current)
        question = f"Take {' '.join(items)}. Then {', '.join(names)}."
        solution = "\n".join([*lines, f"{ANSWER_MARK} {answer}"])
        return Problem("", self.name, difficulty, question, answer, solution)

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        """A step is valid if it is exactly the next line of the worked solution.

        In formats other than ``hash``, only the letters at the end of a line count, and a line
        that does not end in letters is no step.
        """
        wanted = working_lines(problem.solution)
        given = working_lines(completion, self.answer_format)
        if self.answer_format != "hash":
            wanted = [letters(line) for line in wanted]
            given = [found for line in given if (found := letters(line))]
        useful = 0
        steps = []
        for line in given:
            valid = useful < len(wanted) and line == wanted[useful]
            useful += valid
            steps.append(Step(line, valid))
        return StepReport(
            tuple(steps), len(wanted), step_score(useful, len(given) - useful, len(wanted))
        )


@dataclass(frozen=True)
class Letters(Lists):
    """Lists of three, four or five letters to sort: the first is the shortest, not the easiest."""

    name: str = "letters"

    def generate(self, difficulty: str, rng: random.Random) -> Problem:
        return self.problem(difficulty, rng.sample(LETTERS, SORTED[difficulty]), ["sort"])


def letters(line: str) -> str:
    """The letters after the last colon, equals sign or arrow: ``1. Reverse: b, a`` gives b a."""
    last = plain_text(re.split(r"[:=]|->|→", without_markup(line))[-1])
    return last if re.fullmatch(rf"[{LETTERS}](?: [{LETTERS}])*", last) else ""
