"""Problems and rewards in the shapes that TRL's ``GRPOTrainer`` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datasets import Dataset

from cpugrpo_edu.data import Episode, Problem
from cpugrpo_edu.rewards import Reward
from cpugrpo_edu.tasks import prompt_messages

TRLReward = Callable[..., list[float | None]]


def to_dataset(problems: Iterable[Problem], system: str | None = None) -> Dataset:
    """A row for each problem: its prompt as a conversation, and its id for the rewards."""
    problems = list(problems)
    return Dataset.from_dict(
        {
            "prompt": [prompt_messages(problem, system) for problem in problems],
            "problem_id": [problem.id for problem in problems],
        }
    )


def trl_rewards(rewards: Sequence[Reward], problems: Iterable[Problem]) -> list[TRLReward]:
    """The rewards as functions of TRL's columns; the problems are found by their ids.

    Their weights go into ``GRPOConfig(reward_weights=[r.weight for r in rewards])``. Raises
    ``ValueError`` if two different problems have the same id.
    """
    by_id: dict[str, Problem] = {}
    for problem in problems:
        if by_id.setdefault(problem.id, problem) != problem:
            raise ValueError(f"two problems have the id {problem.id!r}; make ids unique")
    return [_as_trl(reward, by_id) for reward in rewards]


def _as_trl(reward: Reward, by_id: dict[str, Problem]) -> TRLReward:
    def function(
        completions: Sequence[Any],
        problem_id: Sequence[str],
        completion_ids: Sequence[list[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        ids = completion_ids or [[] for _ in completions]
        return [
            reward(by_id[key], Episode(list(tokens), text=message_text(completion)))
            for key, tokens, completion in zip(problem_id, ids, completions, strict=True)
        ]

    function.__name__ = reward.name  # TRL's name for the metric
    return function


def message_text(message: Any) -> str:
    """The text of a completion, or of what the assistant says in a conversation."""
    if isinstance(message, str):
        return message
    contents = [m.get("content") for m in message if m.get("role", "assistant") == "assistant"]
    return "\n".join(content for content in contents if isinstance(content, str))
