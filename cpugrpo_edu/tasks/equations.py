"""Steps of the form ``12*3=36``, shared by the numerical domains."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from cpugrpo_edu.data import ANSWER_MARK, Problem, Step, StepReport
from cpugrpo_edu.tasks.statements import working

NUMBER = r"-?\d{1,12}"
EQUATION = re.compile(rf"({NUMBER}) ?([-+*/]) ?({NUMBER}) ?= ?({NUMBER})", re.ASCII)
MAX_LINES = 64


def apply(left: Fraction, operator: str, right: Fraction) -> Fraction | None:
    """The exact result, or None for a division by zero."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    return left / right if right else None


def working_lines(completion: str, answer_format: str = "hash") -> list[str]:
    """The non-empty lines before the final answer, at most ``MAX_LINES`` of them."""
    lines = (line.strip() for line in working(completion, answer_format).splitlines())
    return [line for line in lines if line][:MAX_LINES]


def step_score(useful: int, invalid: int, required: int) -> float:
    """The share of required steps reached minus the share of invalid ones, clipped to [0, 1]."""
    return min(1.0, max(0.0, (useful - invalid) / max(required, 1)))


def check_equations(problem: Problem, completion: str) -> StepReport:
    """Check each line ``a op b = c``.

    A step is valid if it is exactly true and its operands are known: they occur in the
    question or in the worked solution's givens, or an earlier step reached them.
    It is useful if the worked solution also reaches its result. Each result counts
    once, so repeating a true line, or adding ``1 + 1 = 2``, earns nothing.
    """
    reference = [match.groups() for match in EQUATION.finditer(problem.solution)]
    wanted = Counter(result for *_, result in reference)
    known = set(re.findall(r"\d+", problem.question))
    reached: set[str] = set()
    for left, _, right, result in reference:
        known |= {left, right} - reached  # givens such as the 60 minutes of an hour
        reached.add(result)
    steps, useful = [], 0
    for line in working_lines(completion):
        match = EQUATION.fullmatch(line)
        valid = False
        if match:
            left, operator, right, result = match.groups()
            true = apply(Fraction(left), operator, Fraction(right)) == Fraction(result)
            valid = true and left in known and right in known
        if match and valid:
            known.add(result)
            if wanted[result] > 0:
                wanted[result] -= 1
                useful += 1
        steps.append(Step(line, valid))
    invalid = sum(not step.valid for step in steps)
    return StepReport(tuple(steps), len(reference), step_score(useful, invalid, len(reference)))


def write_solution(steps: list[tuple[int, str, int]], answer: int | None = None) -> tuple[str, str]:
    """Carry out ``(left, operator, right)`` steps; return the worked solution and the answer.

    Raises ``ValueError`` if a division leaves a remainder: the domains use only whole numbers.
    """
    lines = []
    result = 0
    for left, operator, right in steps:
        value = apply(Fraction(left), operator, Fraction(right))
        if value is None or value.denominator != 1:
            raise ValueError(f"{left} {operator} {right} is not a whole number")
        result = int(value)
        lines.append(f"{left}{operator}{right}={result}")
    final = str(result if answer is None else answer)
    return "\n".join([*lines, f"{ANSWER_MARK} {final}"]), final
