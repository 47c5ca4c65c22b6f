"""Sums of two numbers, asked in everyday words: what a real chat model learns in a minute."""

from __future__ import annotations

import random
from dataclasses import dataclass

from cpugrpo_edu.data import Problem
from cpugrpo_edu.tasks.arithmetic import Arithmetic
from cpugrpo_edu.tasks.equations import write_solution

LARGEST = {"basic": 20, "intermediate": 50, "advanced": 100}
"""The largest number that is added."""

PHRASINGS = (
    "What is {} + {}?",
    "How much is {} plus {}?",
    "Add {} and {}.",
    "What do you get if you add {} and {}?",
)


@dataclass(frozen=True)
class Sums(Arithmetic):
    name: str = "sums"

    def generate(self, difficulty: str, rng: random.Random) -> Problem:
        left, right = (rng.randint(2, LARGEST[difficulty]) for _ in range(2))
        solution, answer = write_solution([(left, "+", right)])
        question = rng.choice(PHRASINGS).format(left, right)
        pair = f"{min(left, right)}+{max(left, right)}"  # however it is asked, in one split
        return Problem(pair, self.name, difficulty, question, answer, solution)
