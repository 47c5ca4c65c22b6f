"""Multi-step arithmetic: ``Compute 7+5*3-4.``, worked out in order of precedence."""

from __future__ import annotations

import random
from dataclasses import dataclass

from cpugrpo_edu.data import Problem, StepReport
from cpugrpo_edu.tasks.answers import ExactMatch
from cpugrpo_edu.tasks.equations import check_equations, write_solution
from cpugrpo_edu.tasks.prose import check_prose

SHAPES: dict[str, tuple[int, int, int]] = {
    # difficulty: (operations, multiplications among them, largest number)
    "basic": (2, 0, 30),
    "intermediate": (3, 1, 30),
    "advanced": (4, 2, 50),
}
FACTOR_LIMIT = 9
"""Largest factor in a multiplication, so that a small model needs only the times tables."""


@dataclass(frozen=True)
class Arithmetic(ExactMatch):
    name: str = "arithmetic"

    def generate(self, difficulty: str, rng: random.Random) -> Problem:
        operations, products, largest = SHAPES[difficulty]
        while True:
            numbers = [rng.randint(2, largest) for _ in range(operations + 1)]
            chain = ["*"] * products + rng.choices("+-", k=operations - products)
            rng.shuffle(chain)
            if "**" in "".join(chain):
                continue
            for i, operator in enumerate(chain):
                if operator == "*":
                    numbers[i : i + 2] = [rng.randint(2, FACTOR_LIMIT) for _ in range(2)]
            steps = order_of_work(numbers, chain)
            if steps is not None:
                break
        solution, answer = write_solution(steps)
        text = str(numbers[0]) + "".join(f"{o}{n}" for o, n in zip(chain, numbers[1:], strict=True))
        return Problem("", self.name, difficulty, f"Compute {text}.", answer, solution)

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        """The lines of the worked solutions, or in other formats equations in running text."""
        if self.answer_format == "hash":
            return check_equations(problem, completion)
        return check_prose(problem, completion, self.answer_format)


def order_of_work(numbers: list[int], chain: list[str]) -> list[tuple[int, str, int]] | None:
    """Steps with multiplications first, then left to right; None if a value would be negative."""
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
