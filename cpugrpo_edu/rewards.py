"""Verifiable rewards: a completion is scored against exact ground truth.

A reward is a function ``reward(problem, episode) -> float``: the problem's task judges the answer
(`Problem.task`), and the episode holds the completion's text and tokens. The total reward of a
completion is the weighted sum of its terms:

    rewards = parse_rewards("correct_answer=1,valid_steps=0.5")
    give_rewards(groups, rewards)  # fills in every episode's reward

The policy learns to produce whatever the reward measures. So correctness is checked against
ground truth, and no reward pays for longer text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

from cpugrpo_edu.data import Episode, Group, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks.answers import well_formed

RewardFunction = Callable[[Problem, Episode], float | None]

LARGEST = 1e18
"""Largest allowed reward: the square of a larger one, in the variance, would overflow float32."""


@dataclass(frozen=True)
class Reward:
    """One term of the total reward: ``weight`` times ``function(problem, episode)``.

    Calling it returns the function's value without the weight, or None where the function abstains:
    as in TRL, the other terms then make the total. If the function raises an error or returns
    anything but a finite number, the run ends with a `UserError` that names the function. (TRL
    would take a NaN for a None.)
    """

    name: str
    function: RewardFunction
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UserError(
                f"weight {self.weight} of reward {self.name} is not allowed; give 0 or more"
            )

    def __call__(self, problem: Problem, episode: Episode) -> float | None:
        try:
            value = self.function(problem, episode)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"reward {self.name} failed on problem {problem.id!r} with "
                f"{type(error).__name__}: {error}; fix the reward function or the verifier of "
                f"domain {problem.domain!r}"
            ) from error
        if value is None:
            return None
        if not isinstance(value, Real) or not abs(value) <= LARGEST:  # also true for NaN
            raise UserError(
                f"reward {self.name} gave {value!r:.80} for problem {problem.id!r}; "
                "return a finite number for each completion, or None where it does not apply"
            )
        return float(value)


def give_rewards(groups: Iterable[Group], rewards: Sequence[Reward]) -> None:
    """Set every episode's ``reward``. Raises ``ValueError`` if a group has no problem."""
    for group in groups:
        if group.problem is None:
            raise ValueError("a group has no problem to judge its completions by")
        for episode in group.episodes:
            episode.reward = total_reward(rewards, group.problem, episode)


def total_reward(rewards: Iterable[Reward], problem: Problem, episode: Episode) -> float:
    """The weighted sum of the terms that judge the completion; UserError if all abstain."""
    values = [(reward.weight, reward(problem, episode)) for reward in rewards]
    judged = [weight * value for weight, value in values if value is not None]
    if values and not judged:
        raise UserError(
            f"every reward returned None for a completion of problem {problem.id!r}; at least one "
            "must return a number"
        )
    return sum(judged)


# --- The terms ----------------------------------------------------------------


def correct_answer(problem: Problem, episode: Episode) -> float:
    """1 if the stated final answer is exactly right, else 0; a custom verifier may grade."""
    return problem.grade(episode.text) if episode.text.strip() else 0.0


def valid_steps(problem: Problem, episode: Episode) -> float:
    """Share in [0, 1] of the required steps that the working reaches (`StepReport.score`)."""
    score = problem.check_steps(episode.text).score if episode.text.strip() else 0.0
    if not 0 <= score <= 1:
        raise ValueError(f"a step score of {score} is outside [0, 1]")
    return score


def good_format(problem: Problem, episode: Episode) -> float:
    """1 if the completion has working, then one stated answer and nothing after it, else 0.

    It does not check the answer: alone it would teach only the format, so keep its weight small.
    """
    return float(well_formed(episode.text, problem.answer_format))


def make_length_penalty(soft_limit: int = 192, hard_limit: int = 256) -> RewardFunction:
    """Make a reward that is 0 up to ``soft_limit`` and falls linearly to -1 at ``hard_limit``.

    This is the soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13), with
    ``hard_limit`` for L_max and ``hard_limit - soft_limit`` for L_cache. Lengths are in tokens, or
    in characters if the episode has only text.
    """
    if not 0 <= soft_limit < hard_limit:
        raise UserError(
            f"length limits {soft_limit} and {hard_limit} are not allowed; give 0 <= soft < hard"
        )

    def length_penalty(problem: Problem, episode: Episode) -> float:
        length = len(episode.completion_ids or episode.text)
        excess = (length - soft_limit) / (hard_limit - soft_limit)
        return -min(1.0, excess) if excess > 0 else 0.0

    return length_penalty


length_penalty = make_length_penalty()

REWARDS: dict[str, RewardFunction] = {
    "correct_answer": correct_answer,
    "valid_steps": valid_steps,
    "good_format": good_format,
    "length_penalty": length_penalty,
}


def parse_rewards(text: str, max_completion: int | None = None) -> list[Reward]:
    """Parse rewards such as ``"correct_answer=1,valid_steps=0.5"``.

    If ``max_completion`` is given, the length penalty falls over its last quarter of tokens.
    """
    rewards: list[Reward] = []
    for term in text.split(","):
        name, _, weight = (part.strip() for part in term.partition("="))
        if any(reward.name == name for reward in rewards):
            raise UserError(f"reward {name!r} is given twice; give each name once")
        try:
            number = float(weight)
        except ValueError:
            raise UserError(
                f"cannot read the reward {term.strip()!r}; write name=weight, where the name is "
                f"one of {', '.join(REWARDS)}, for example correct_answer=1,valid_steps=0.5"
            ) from None
        if name not in REWARDS:
            raise UserError(f"unknown reward {name!r}; allowed are {', '.join(REWARDS)}")
        function = REWARDS[name]
        if function is length_penalty and max_completion:
            function = make_length_penalty(3 * max_completion // 4, max_completion)
        rewards.append(Reward(name, function, number))
    if not any(reward.weight for reward in rewards):
        raise UserError("all reward weights are zero; give at least one a weight above 0")
    return rewards
