"""Verifiable rewards in TRL's signature, hardened against gaming.

A reward is a function ``reward(prompts, completions, **columns) -> list[float]`` with one
finite number per completion. TRL hands over the dataset's columns as lists (see
`problem_columns`), repeated for each of the G completions of a group, and more that we
ignore (``trainer_state``, ``log_metric``, ...). A completion is a string, or a list of
messages when the prompt is a conversation.

    functions, weights = combine("correct_answer=1,valid_steps=0.5")
    GRPOTrainer(reward_funcs=functions, args=GRPOConfig(reward_weights=weights), ...)

What a reward measures is what the policy learns to produce, so each one here is checked
against exact ground truth, and none counts words.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from cpugrpo_edu.data import ANSWER_MARK, Problem, Task
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks import get_task
from cpugrpo_edu.tasks.answers import extract_answer, stated_answers

RewardFunction = Callable[..., list[float]]

LARGEST = 1e18
"""A reward beyond this, squared for the standard deviation in float32, would be infinite."""


@dataclass(frozen=True)
class Reward:
    """One term of the total reward, sum over terms of weight times function."""

    name: str
    function: RewardFunction
    weight: float = 1.0


def guarded(function: RewardFunction) -> RewardFunction:
    """Let a reward function fail with one clear sentence.

    An exception, a wrong number of rewards, or a reward that is not a finite number stops
    the run with a `UserError`. TRL itself would drop a NaN silently from the total.
    """
    name = getattr(function, "__name__", type(function).__name__)

    def checked(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        try:
            rewards = function(prompts=prompts, completions=completions, **columns)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"reward {name} failed with {type(error).__name__}: {error}; mend the function"
            ) from error
        if not isinstance(rewards, Sequence) or len(rewards) != len(completions):
            raise UserError(
                f"reward {name} returned {rewards!r:.80}; return a list of {len(completions)} "
                "numbers, one per completion"
            )
        for i, reward in enumerate(rewards):
            if not isinstance(reward, Real) or not abs(reward) <= LARGEST:  # so for NaN too
                raise UserError(
                    f"reward {name} gave {reward!r:.80} for completion {i}; "
                    "return a finite number for each completion"
                )
        return [float(reward) for reward in rewards]

    functools.update_wrapper(checked, function)
    checked.__name__ = name  # a callable object has none, and TRL's metrics need one
    return checked


@guarded
def correct_answer(
    prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
) -> list[float]:
    """1 if the stated final answer is exactly right, else 0.

    A user's own verifier may grade in between; see `cpugrpo_edu.tasks.custom`.
    """

    def score(task: Task, problem: Problem, text: str) -> float:
        return float(getattr(task, "grade", task.verify)(problem, text))

    return _score_each("correct_answer", score, completions, columns)


@guarded
def valid_steps(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Share in [0, 1] of the required steps that the working reaches (`StepReport.score`)."""

    def score(task: Task, problem: Problem, text: str) -> float:
        value = task.check_steps(problem, text).score
        if not 0 <= value <= 1:
            raise ValueError(f"a step score of {value} is outside [0, 1]")
        return value

    return _score_each("valid_steps", score, completions, columns)


@guarded
def good_format(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 if there is working, and then one last line ``#### answer``; else 0.

    Says nothing on right or wrong: on its own it teaches a shape, so keep its weight small.
    """
    return [float(_is_well_formed(_text(completion))) for completion in completions]


def make_length_penalty(soft_limit: int = 192, hard_limit: int = 256) -> RewardFunction:
    """Make a reward that is 0 up to ``soft_limit`` and falls linearly to -1 at ``hard_limit``.

    The soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 13), with
    ``hard_limit`` for L_max and ``hard_limit - soft_limit`` for L_cache. Lengths are in
    tokens if TRL hands over ``completion_ids``, else in characters.
    """
    if not 0 <= soft_limit < hard_limit:
        raise UserError(
            f"length limits {soft_limit} and {hard_limit} do not fit; give 0 <= soft < hard"
        )

    def length_penalty(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        measured = map(_text, completions) if completion_ids is None else completion_ids
        excess = [(len(item) - soft_limit) / (hard_limit - soft_limit) for item in measured]
        return [-min(1.0, x) if x > 0 else 0.0 for x in excess]

    return guarded(length_penalty)


length_penalty = make_length_penalty()

REWARDS: dict[str, RewardFunction] = {
    "correct_answer": correct_answer,
    "valid_steps": valid_steps,
    "good_format": good_format,
    "length_penalty": length_penalty,
}


def parse_rewards(text: str) -> list[Reward]:
    """Read ``"correct_answer=1,valid_steps=0.5"``."""
    weights: dict[str, float] = {}
    for term in text.split(","):
        name, _, weight = (part.strip() for part in term.partition("="))
        if name in weights:
            raise UserError(f"reward {name!r} is given twice; give each name once")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise UserError(
                f"cannot read the reward {term.strip()!r}; write name=weight with a name out of "
                f"{', '.join(REWARDS)}, for example correct_answer=1,valid_steps=0.5"
            ) from None
    return _named_rewards(weights)


def combine(
    rewards: str | Mapping[str, float] | Sequence[Reward], max_completion: int | None = None
) -> tuple[list[RewardFunction], list[float]]:
    """Return the functions for ``GRPOTrainer`` and the weights for ``GRPOConfig.reward_weights``.

    Takes the command line's text, ``{"correct_answer": 1.0}``, or `Reward` objects, which
    may hold functions of your own; those are `guarded`. Given ``max_completion``, the length
    penalty falls over its last quarter.
    """
    if isinstance(rewards, str):
        rewards = parse_rewards(rewards)
    elif isinstance(rewards, Mapping):
        rewards = _named_rewards(rewards)
    for reward in rewards:
        if not (math.isfinite(reward.weight) and reward.weight >= 0):
            raise UserError(
                f"weight {reward.weight} of reward {reward.name} is not allowed; give 0 or more"
            )
    if not any(reward.weight for reward in rewards):
        raise UserError("all reward weights are zero; give at least one a weight above 0")
    functions = [reward.function for reward in rewards]
    if max_completion:
        fitting = make_length_penalty(3 * max_completion // 4, max_completion)
        functions = [fitting if f is length_penalty else f for f in functions]
    return [guarded(f) for f in functions], [reward.weight for reward in rewards]


def problem_columns(problems: Sequence[Problem]) -> dict[str, list[str]]:
    """Return the dataset columns that the rewards read, one list entry per problem."""
    return {
        _column(field.name): [getattr(problem, field.name) for problem in problems]
        for field in fields(Problem)
    }


def _column(name: str) -> str:
    return "problem_id" if name == "id" else name


def _named_rewards(weights: Mapping[str, float]) -> list[Reward]:
    for name in weights:
        if name not in REWARDS:
            raise UserError(f"unknown reward {name!r}; allowed are {', '.join(REWARDS)}")
    return [Reward(name, REWARDS[name], weight) for name, weight in weights.items()]


def _score_each(
    name: str,
    score: Callable[[Task, Problem, str], float],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
) -> list[float]:
    """Score each non-empty completion with the task that owns its problem's domain."""
    rewards = []
    for problem, completion in zip(_problems(columns, len(completions)), completions, strict=True):
        text = _text(completion)
        try:
            rewards.append(score(get_task(problem.domain), problem, text) if text.strip() else 0.0)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"reward {name} failed on problem {problem.id!r} with {type(error).__name__}: "
                f"{error}; mend the verifier of domain {problem.domain!r}"
            ) from error
    return rewards


def _problems(columns: Mapping[str, Any], count: int) -> list[Problem]:
    values = {}
    for field in fields(Problem):
        column = _column(field.name)
        if len(columns.get(column, ())) != count:
            raise UserError(
                f"the rewards need the dataset column {column!r} with one entry per completion; "
                "build the dataset's columns with cpugrpo_edu.rewards.problem_columns"
            )
        values[field.name] = columns[column]
    return [Problem(**{key: values[key][i] for key in values}) for i in range(count)]


def _text(completion: Any) -> str:
    """The completion's text; of a conversation, what the assistant said."""
    if isinstance(completion, str):
        return completion
    contents = [m.get("content") for m in completion if m.get("role", "assistant") == "assistant"]
    return "\n".join(content for content in contents if isinstance(content, str))


def _is_well_formed(text: str) -> bool:
    """Some working, then exactly one ``#### answer``, alone on the last line."""
    answer = extract_answer(text)
    if answer is None or len(stated_answers(text)) != 1:
        return False
    working, _, last = text.strip().replace("\r\n", "\n").rpartition("\n")
    return last == f"{ANSWER_MARK} {answer}" and any(map(str.isalnum, working))
