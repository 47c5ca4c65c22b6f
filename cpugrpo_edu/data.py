"""The nouns of the package: what a problem, a task, a completion and its group are.

Everything else is a function from some of these to others. Read this module
first; it imports nothing from the package but the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Difficulty = Literal["basic", "intermediate", "advanced"]
DIFFICULTIES: tuple[Difficulty, ...] = ("basic", "intermediate", "advanced")

Split = Literal["pretrain", "train", "eval"]

ANSWER_MARK = "####"
"""A completion states its final answer after this mark, as in GSM8K."""


@dataclass(frozen=True)
class Step:
    """One line of working in a completion, and whether it holds."""

    text: str
    valid: bool


@dataclass(frozen=True)
class StepReport:
    """What a step checker found.

    ``required`` is the number of steps the worked solution takes. ``score`` lies
    in [0, 1]: the share of required steps reached, lowered by invalid ones, so
    that padding with true but useless lines never pays.
    """

    steps: tuple[Step, ...]
    required: int
    score: float


class Task(Protocol):
    """A domain: makes problems, and owns the ground truth for them."""

    @property
    def name(self) -> str: ...

    def generate(self, difficulty: str, rng: Any) -> Problem:
        """Draw one problem with its worked solution; ``rng`` is a ``random.Random``."""
        ...

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether the completion's stated final answer is exactly right."""
        ...

    def grade(self, problem: Problem, completion: str) -> float:
        """1 or 0 by ``verify``, or a grade in between."""
        ...

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        """Check every line of working in the completion."""
        ...


@dataclass(frozen=True)
class Problem:
    """One question with a verifiable answer, and the task that judges completions of it.

    ``solution`` is a worked solution: one step a line, then ``#### answer``. ``task`` may be
    missing from a problem that is only asked, never judged.
    """

    id: str
    domain: str
    difficulty: str
    question: str
    answer: str
    solution: str = ""
    task: Task | None = field(default=None, repr=False, compare=False)

    @property
    def judge(self) -> Task:
        """The task; a `ValueError` if there is none."""
        if self.task is None:
            raise ValueError(f"problem {self.id!r} has no task, so no completion can be judged")
        return self.task

    def verify(self, completion: str) -> bool:
        """Whether the completion's stated final answer is exactly right."""
        return self.judge.verify(self, completion)

    def grade(self, completion: str) -> float:
        """How right the completion is, from 0 to 1."""
        return self.judge.grade(self, completion)

    def check_steps(self, completion: str) -> StepReport:
        """Check every line of working in the completion."""
        return self.judge.check_steps(self, completion)


@dataclass
class Episode:
    """One sampled completion, as the policy produced it.

    ``logprobs[t]`` is log pi(completion_ids[t] | prefix) under the sampling
    distribution, in nats. ``finished`` is False when the length limit cut it.
    """

    completion_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = True
    text: str = ""
    reward: float = 0.0


@dataclass
class Group:
    """The G completions of one prompt that GRPO compares with each other."""

    prompt_ids: list[int]
    episodes: list[Episode]
    problem: Problem | None = None
