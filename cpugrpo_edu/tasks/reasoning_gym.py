"""Tasks of Reasoning Gym (Stojanovski et al. 2025, arXiv:2505.24760), judged by its own scorers.

The package is optional (the extra ``reasoning-gym``, Apache-2.0). Its generators have curricula:
their first three levels are our difficulties. A generator without one has a single difficulty,
"basic".
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from cpugrpo_edu.data import ANSWER_MARK, DIFFICULTIES, Problem, StepReport
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks.answers import MAX_ANSWER_CHARS, ExactMatch, extract_answer
from cpugrpo_edu.tasks.prose import check_prose
from cpugrpo_edu.tasks.time_limit import TookTooLong, limited

PREFIX = "reasoning-gym:"
TIME_LIMIT = 5.0
"""Seconds for drawing one problem, and for scoring one answer; a slower answer is wrong."""

MAX_SLOW = 5
"""After so many problems that take too long, a difficulty counts as exhausted."""

NONSENSE = "banana"
"""What no scorer should accept."""

MAX_IN_VAIN = 300
"""After so many draws without a new problem, a task counts as exhausted."""

Keep = Callable[[str], bool]
"""Whether a question belongs to the split that is asked for."""

SOME = "chain_sum, basic_arithmetic, gsm_symbolic, leg_counting, gcd, letter_counting, syllogism"


@dataclass(frozen=True)
class ReasoningGym(ExactMatch):
    """The task of one problem: the data set that drew ``entry`` scores its answers."""

    name: str
    dataset: Any = field(repr=False, compare=False)
    entry: dict[str, Any] = field(repr=False, compare=False)

    def generate(self, difficulty: str, rng: Any) -> Problem:
        raise UserError(f"{self.name} problems come from --data {PREFIX}{self.name}")

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether the scorer gives the stated answer its full mark, 1."""
        return self.grade(problem, completion) == 1

    def grade(self, problem: Problem, completion: str) -> float:
        """The scorer's mark of the stated answer, from 0 to 1; some scorers give a part."""
        stated = extract_answer(completion, self.answer_format)
        return 0.0 if stated is None else self.mark(stated.rstrip(". "))

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        return check_prose(problem, completion, self.answer_format)

    def mark(self, answer: str) -> float:
        """The scorer's mark; 0 if it cannot read the answer."""
        try:
            mark = limited(self.dataset.score_answer, answer, self.entry, seconds=TIME_LIMIT)
            return min(1.0, max(0.0, float(mark)))
        except (Exception, SystemExit, TookTooLong):
            return 0.0


def load_reasoning_gym(source: str, per_cell: int, seed: int, keep: Keep) -> list[Problem]:
    """At most ``per_cell`` problems of each task and difficulty; fewer if a task has no more.

    ``source`` names tasks, such as ``reasoning-gym:chain_sum,gcd``. Only problems whose question
    ``keep`` accepts are taken, and each question once. Raises `UserError` if the package is
    missing, for an unknown task, and for one that has no short answers to score.
    """
    problems: dict[str, Problem] = {}
    for name in task_names(source):
        before = len(problems)
        for difficulty, settings in levels(name).items():
            settings = replace(settings, seed=seed * 1_000_003 % 2**31, size=4 * per_cell + 1000)
            taken, in_vain = 0, 0
            for problem in draw(name, difficulty, settings):
                new = problem.question not in problems and keep(problem.question)
                if new and is_usable(problem):
                    problems[problem.question] = problem
                    taken, in_vain = taken + 1, 0
                else:
                    in_vain += 1
                if taken == per_cell or in_vain == MAX_IN_VAIN:
                    break
        if len(problems) == before:
            raise UserError(
                f"Reasoning Gym's {name} has no problems that can be used here: one line of at "
                f"most {MAX_ANSWER_CHARS} characters as the answer, drawn within {TIME_LIMIT:g} s; "
                f"choose another task, such as {SOME}"
            )
    return list(problems.values())


def task_names(source: str) -> list[str]:
    """The tasks that ``reasoning-gym:NAME,NAME`` names; UserError if one cannot be had."""
    names = [name.strip() for name in source.removeprefix(PREFIX).split(",")]
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(
            f"{source} needs the package reasoning-gym, which is not installed; pip install "
            f"reasoning-gym (our extra of that name) gives you {SOME} and more"
        )
    from reasoning_gym.factory import DATASETS

    for name in names:
        if name not in DATASETS:
            close = difflib.get_close_matches(name, DATASETS, 3)
            meant = f" (did you mean {' or '.join(close)}?)" if close else ""
            raise UserError(
                f"Reasoning Gym has no task {name!r}{meant}; some of its {len(DATASETS)} are {SOME}"
            )
    if len(set(names)) < len(names):
        raise UserError(f"{source} names a task twice; name each once")
    return names


def levels(name: str) -> dict[str, Any]:
    """The settings of each difficulty, from the task's own curriculum.

    A level whose settings the task itself refuses is left out.
    """
    from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
    from reasoning_gym.factory import DATASETS, create_curriculum, has_curriculum

    found: dict[str, Any] = {}
    if has_curriculum(name):
        only_this_level = DefaultCurriculumContext(RangeAttributeMode.UPPER_BOUND)
        for level, difficulty in enumerate(DIFFICULTIES):
            curriculum = create_curriculum(name)
            curriculum.set_global_level(level)
            try:
                settings = curriculum.generate_configuration(context=only_this_level)
                settings.validate()
            except (AssertionError, ValueError):
                continue
            found[difficulty] = settings
    return found or {"basic": DATASETS[name][1]()}


def draw(name: str, difficulty: str, settings: Any) -> Iterator[Problem]:
    """Up to ``settings.size`` problems, without those that fail or exceed `TIME_LIMIT`."""
    from reasoning_gym.factory import DATASETS

    try:
        dataset = DATASETS[name][0](settings)
    except Exception as error:  # it is code of others
        raise UserError(
            f"Reasoning Gym's {name} cannot be set up here ({type(error).__name__}: {error}); "
            f"choose another task, such as {SOME}"
        ) from error
    slow = 0
    for i in range(settings.size):
        try:
            entry = limited(dataset.__getitem__, i, seconds=TIME_LIMIT)
        except TookTooLong:
            slow += 1
            if slow == MAX_SLOW:
                return
            continue
        except Exception:  # some generators give up on some of their seeds
            continue
        question, answer = entry["question"].strip(), str(entry["answer"] or "")
        identity = f"{name}/{difficulty}/{hashlib.sha256(question.encode()).hexdigest()[:10]}"
        task = ReasoningGym(name, dataset, entry)
        yield Problem(identity, name, difficulty, question, answer, task=task)


def is_usable(problem: Problem) -> bool:
    """Whether the answer is short and the scorer accepts it, and only it."""
    answer = problem.answer
    if not answer or "\n" in answer or len(answer) > MAX_ANSWER_CHARS:
        return False
    if problem.verify(f"{ANSWER_MARK} {NONSENSE}"):
        raise UserError(
            f"the scorer of Reasoning Gym's {problem.domain} accepts any text; "
            f"choose another task, such as {SOME}"
        )
    return problem.verify(f"{ANSWER_MARK} {answer}")
