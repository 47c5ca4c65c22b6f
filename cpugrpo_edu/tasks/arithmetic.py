"""Multi-step arithmetic: ``Compute 7 + 5 * 3 - 4.``, worked out by precedence."""

from __future__ import annotations

import random
from dataclasses import dataclass

from cpugrpo_edu.answers import answers_match, extract_answer
from cpugrpo_edu.tasks.equations import check_equations, write_solution
from cpugrpo_edu.types import Difficulty, Problem, StepReport

SHAPES: dict[str, tuple[int, int, str]] = {
    # difficulty: (operations, largest number, operators)
    "basic": (2, 20, "+-"),
    "intermediate": (3, 30, "+-*"),
    "advanced": (4, 60, "+-*"),
}
FACTOR_LIMIT = 9
"""The right side of a multiplication, so that the tables of a small model suffice."""


@dataclass(frozen=True)
class Arithmetic:
    name: str = "arithmetic"

    def generate(self, difficulty: Difficulty, rng: random.Random) -> Problem:
        operations, largest, operators = SHAPES[difficulty]
        while True:
            numbers = [rng.randint(2, largest) for _ in range(operations + 1)]
            chain = [rng.choice(operators) for _ in range(operations)]
            if "*" in operators and chain.count("*") != 1:
                continue
            for i, operator in enumerate(chain):
                if operator == "*":
                    numbers[i + 1] = rng.randint(2, FACTOR_LIMIT)
            steps = order_of_work(numbers, chain)
            if steps is not None:
                break
        solution, answer = write_solution(steps)
        text = " ".join([str(numbers[0])] + [f"{o} {n}" for o, n in zip(chain, numbers[1:], strict=True)])
        return Problem("", self.name, difficulty, f"Compute {text}.", answer, solution)

    def verify(self, problem: Problem, completion: str) -> bool:
        stated = extract_answer(completion)
        return stated is not None and answers_match(stated, problem.answer)

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        return check_equations(problem, completion)


def order_of_work(numbers: list[int], chain: list[str]) -> list[tuple[int, str, int]] | None:
    """Multiplications first, then from the left; None if a value would go below zero."""
    numbers, chain = list(numbers), list(chain)
    steps = []
    while chain:
        i = chain.index("*") if "*" in chain else 0
        left, operator, right = numbers[i], chain[i], numbers[i + 1]
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
        if result < 0:
            return None
        steps.append((left, operator, right))
        numbers[i : i + 2] = [result]
        del chain[i]
    return steps
