"""The data types of the package: problems, tasks, completions and groups.

The rest of the package consists of functions on these types. Read this module first; it imports
only the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Difficulty = Literal["basic", "intermediate", "advanced"]
DIFFICULTIES: tuple[Difficulty, ...] = ("basic", "intermediate", "advanced")

Split = Literal["pretrain", "train", "eval"]

ANSWER_MARK = "####"
"""A worked solution states its final answer after this mark, as in GSM8K."""


@dataclass(frozen=True)
class Step:
    """One line of working in a completion, and whether it is valid."""

    text: str
    valid: bool


@dataclass(frozen=True)
class StepReport:
    """What a step checker found.

    ``required`` is the number of steps in the worked solution. ``score`` is in [0, 1]: the share
    of required steps that were reached, reduced by invalid ones. Padding with true but useless
    lines never pays.
    """

    steps: tuple[Step, ...]
    required: int
    score: float


class Task(Protocol):
    """A domain of problems: it generates them and judges completions."""

    @property
    def name(self) -> str: ...

    def generate(self, difficulty: str, rng: Any) -> Problem:
        """Draw one problem with its worked solution; ``rng`` is a ``random.Random``."""
        ...

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether the completion's stated final answer is exactly right."""
        ...

    def grade(self, problem: Problem, completion: str) -> float:
        """1 if the completion is right, 0 if it is wrong, or a grade in between."""
        ...

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        """Check every line of working in the completion."""
        ...


@dataclass(frozen=True)
class Problem:
    """One question with a verifiable answer, and the task that judges completions of it.

    ``solution`` is a worked solution: one step per line, then ``#### answer``. ``task`` may be
    None if completions of the problem are never judged.
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
        """The task that judges completions. Raises ``ValueError`` if there is none."""
        if self.task is None:
            raise ValueError(f"problem {self.id!r} has no task, so no completion can be judged")
        return self.task

    @property
    def answer_format(self) -> str:
        """Where the task reads the answer of a completion, see `cpugrpo_edu.tasks.statements`."""
        return getattr(self.task, "answer_format", "hash")

    def verify(self, completion: str) -> bool:
        """Whether the completion's stated final answer is exactly right."""
        return self.judge.verify(self, completion)

    def grade(self, completion: str) -> float:
        """The grade of the completion, from 0 to 1."""
        return self.judge.grade(self, completion)

    def check_steps(self, completion: str) -> StepReport:
        """Check every line of working in the completion."""
        return self.judge.check_steps(self, completion)


@dataclass
class Episode:
    """One sampled completion, as the policy produced it.

    ``logprobs[t]`` is log pi(completion_ids[t] | prefix) under the sampling
    distribution, in nats. ``finished`` is False if the length limit cut the completion off.
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
