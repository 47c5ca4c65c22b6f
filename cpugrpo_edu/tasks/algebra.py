"""Linear equations in one unknown: ``Solve for x: 5x+3=2x+18``."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from cpugrpo_edu.data import (
    ANSWER_MARK,
    Problem,
    Step,
    StepReport,
)
from cpugrpo_edu.tasks.answers import ExactMatch
from cpugrpo_edu.tasks.equations import step_score, working_lines

TERM = re.compile(r"([+-]?)(\d{1,9})?(x)?", re.ASCII)
BRACKET = re.compile(r"([+-]?\d{1,9})\(x([+-]\d{1,9})\)", re.ASCII)


@dataclass(frozen=True)
class Algebra(ExactMatch):
    name: str = "algebra"

    def generate(self, difficulty: str, rng: random.Random) -> Problem:
        x = rng.randint(2, 15)
        a, b = rng.randint(2, 9), rng.randint(1, 50)
        if difficulty == "basic":
            lines = [side(a, b) + f"={a * x + b}"]
        elif difficulty == "intermediate":
            c = rng.randint(1, 7)
            a += c
            right = (a - c) * x + b
            lines = [f"{side(a, b)}={side(c, right)}", f"{side(a - c, b)}={right}"]
            a -= c
        else:
            c = rng.randint(1, 5)
            a, b = rng.randint(2, 6), rng.randint(1, 9)
            k = a + c
            total = (k - c) * x + k * b
            lines = [
                f"{k}(x+{b})-{term(c)}={total}",
                f"{term(k)}+{k * b}-{term(c)}={total}",
                f"{side(k - c, k * b)}={total}",
            ]
            b, a = k * b, k - c
        lines += [f"{term(a)}={a * x}"] + ([f"x={x}"] if a > 1 else [])
        question, *steps = lines
        solution = "\n".join([*steps, f"{ANSWER_MARK} {x}"])
        return Problem("", self.name, difficulty, f"Solve for x: {question}", str(x), solution)

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        """A step is valid if it holds only for the true x, and useful if it is also simpler.

        "Simpler" means fewer terms than all lines before, or x alone on a side. So it does not
        pay to copy the question, swap or scale its sides, or subtract x from both again and again.
        """
        x = int(problem.answer)
        required = len(working_lines(problem.solution))
        simplest = complexity(problem.question.removeprefix("Solve for x: "))
        steps, useful = [], 0
        for line in working_lines(completion):
            valid = holds_only_for(line, x)
            if valid and complexity(line) < simplest:
                simplest = complexity(line)
                useful += 1
            steps.append(Step(line, valid))
        invalid = sum(not step.valid for step in steps)
        return StepReport(tuple(steps), required, step_score(useful, invalid, required))


def term(coefficient: int) -> str:
    return "x" if coefficient == 1 else f"{coefficient}x"


def side(coefficient: int, constant: int) -> str:
    return f"{term(coefficient)}{'+' if constant >= 0 else '-'}{abs(constant)}"


def linear(text: str) -> tuple[int, int] | None:
    """Read ``4(x+3)-2x`` as (coefficient of x, constant); None if it is not linear text."""
    text = text.replace(" ", "")
    coefficient = constant = 0
    for factor, inner in BRACKET.findall(text):
        coefficient += int(factor)
        constant += int(factor) * int(inner)
    text = BRACKET.sub("", text)
    position = 0
    while position < len(text):
        match = TERM.match(text, position)
        if match is None or match.end() == position or not (match[2] or match[3]):
            return None
        if position > 0 and not match[1]:
            return None
        value = int(match[2] or 1) * (-1 if match[1] == "-" else 1)
        if match[3]:
            coefficient += value
        else:
            constant += value
        position = match.end()
    return coefficient, constant


def holds_only_for(line: str, x: int) -> bool:
    """Whether the line is a linear equation whose only solution is x."""
    sides = line.split("=")
    if len(line) > 80 or len(sides) != 2 or not all(part.strip() for part in sides):
        return False
    left, right = linear(sides[0]), linear(sides[1])
    if left is None or right is None:
        return False
    coefficient, constant = left[0] - right[0], left[1] - right[1]
    return coefficient != 0 and coefficient * x + constant == 0


def complexity(line: str) -> tuple[int, int]:
    """(number of terms, 0 if x stands alone on a side, else 1)."""
    sides = [part.strip() for part in line.split("=")]
    return len(re.findall(r"\d*x|\d+", line)), int("x" not in sides)
