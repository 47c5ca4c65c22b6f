"""Domains of problems. Each task generates, solves and verifies its own problems.

Splits are disjoint by construction: the hash of a question, or of what its task gives as its id,
decides its split, for every seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

from cpugrpo_edu.data import DIFFICULTIES, Problem, Split, Task
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks.algebra import Algebra
from cpugrpo_edu.tasks.arithmetic import Arithmetic
from cpugrpo_edu.tasks.lists import Letters, Lists
from cpugrpo_edu.tasks.stories import SMALL_STORIES, Stories
from cpugrpo_edu.tasks.sums import Sums
from cpugrpo_edu.tasks.word_problems import WordProblems

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(Arithmetic(), WordProblems(), Algebra(), Lists(), Letters()),
        *(Sums(), Stories(), SMALL_STORIES),
    )
}

DOMAINS: tuple[str, ...] = ("arithmetic", "word_problems", "algebra", "lists")
"""The domains of the bundled model, in the order in which tables show them. ``letters`` and
``sums`` are for the scenarios of these names; ``sums``, ``stories`` and ``small_stories`` need the
words of a real model."""

SPLIT_SHARES: dict[Split, float] = {"pretrain": 0.70, "train": 0.15, "eval": 0.15}


EVALUATION_SEED = 2026
"""The held-out problems are the same in every run; a run's own seed affects only training."""


def get_task(name: str) -> Task:
    """The generated domain of that name; ``UserError`` if there is none."""
    if name not in TASKS:
        raise UserError(f"unknown domain {name!r}; allowed are {', '.join(TASKS)}")
    return TASKS[name]


def question_hash(question: str) -> str:
    return hashlib.sha256(question.encode()).hexdigest()


def split_of(question: str) -> Split:
    """The one split that a question (or an id) belongs to."""
    position = int(question_hash(question)[:8], 16) / 16**8
    for split, share in SPLIT_SHARES.items():
        if position < share:
            return split
        position -= share
    return "eval"


def make_problems(
    domain: str, difficulty: str, split: Split, count: int, seed: int = 0
) -> list[Problem]:
    """Draw ``count`` distinct problems of one cell from one split.

    The same arguments give the same problems on every machine.
    """
    if difficulty not in DIFFICULTIES:
        raise UserError(f"unknown difficulty {difficulty!r}; allowed are {', '.join(DIFFICULTIES)}")
    task = get_task(domain)
    rng = random.Random(f"{domain}/{difficulty}/{split}/{seed}")
    problems: dict[str, Problem] = {}
    in_vain = 0  # draws since the last new problem
    for _ in range(200 * count + 1000):
        if len(problems) == count or in_vain > 10_000 + 50 * len(problems):
            break
        in_vain += 1
        problem = task.generate(difficulty, rng)
        if problem.question not in problems and split_of(problem.id or problem.question) == split:
            identity = f"{domain}/{difficulty}/{question_hash(problem.question)[:10]}"
            problems[problem.question] = replace(problem, id=identity, task=task)
            in_vain = 0
    if len(problems) < count:
        raise UserError(
            f"only {len(problems)} distinct {difficulty} {domain} problems found in the {split} "
            f"split, but {count} were requested; ask for fewer"
        )
    return list(problems.values())


def held_out_problems(
    per_cell: int, domains: Sequence[str] = DOMAINS, seed: int = EVALUATION_SEED
) -> list[Problem]:
    """``per_cell`` problems of the evaluation split for each domain and difficulty."""
    if per_cell < 1:
        raise UserError(f"per_cell is {per_cell}; give at least 1 problem per cell")
    return [
        problem
        for domain in domains
        for difficulty in DIFFICULTIES
        for problem in make_problems(domain, difficulty, "eval", per_cell, seed)
    ]


def prompt_messages(problem: Problem, system: str | None = None) -> list[dict[str, str]]:
    """The chat messages that ask the question, or the problem's own, whose system prompt counts
    more."""
    own: list[dict[str, str]] = getattr(problem, "messages", [])
    messages = own or [{"role": "user", "content": problem.question}]
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]
