"""Ask a model each problem several times: how often it is right, and what most answers say."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from cpugrpo_edu.data import Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.evaluations import SampledEvaluation
from cpugrpo_edu.sample import Sampling, rollout
from cpugrpo_edu.tasks.answers import exact_match, extract_answer


def evaluate_samples(
    policy: Policy,
    problems: Sequence[Problem],
    label: str,
    n: int,
    sampling: Sampling,
    on_done: Callable[[int], None] = lambda problems: None,
) -> SampledEvaluation:
    """Sample and verify ``n`` completions of each problem.

    Raises ``UserError`` if there are no problems, or for several greedy completions.
    """
    if not problems:
        raise UserError("there are no problems to evaluate on; give at least one")
    check_samples(n, sampling)
    start = time.perf_counter()
    groups = rollout(policy, problems, n, sampling, on_done=on_done)
    texts = [[episode.text for episode in group.episodes] for group in groups]
    asked = list(zip(problems, texts, strict=True))
    return SampledEvaluation(
        label=label,
        seed=sampling.seed,
        temperature=sampling.temperature,
        item_ids=[problem.id for problem in problems],
        domains=[problem.domain for problem in problems],
        difficulties=[problem.difficulty for problem in problems],
        correct=[[problem.verify(text) for text in said] for problem, said in asked],
        majority=[majority(problem, said) for problem, said in asked],
        tokens=[[len(episode.completion_ids) for episode in group.episodes] for group in groups],
        finished=[[episode.finished for episode in group.episodes] for group in groups],
        completions=texts,
        seconds=time.perf_counter() - start,
    )


def check_samples(n: int, sampling: Sampling) -> None:
    """UserError if several greedy completions are asked: they would all be the same."""
    if n > 1 and sampling.temperature == 0:
        raise UserError(
            f"{n} greedy completions of a problem are all the same; give a --temperature above 0, "
            "such as 0.8"
        )


def majority(problem: Problem, completions: Sequence[str]) -> int | None:
    """The place of the first completion that states the most frequent answer, None if none does.

    Self-consistency (Wang et al. 2022, arXiv:2203.11171). Answers are the same if the verifier
    would take one for the other (18 and 18.0). Of two equally frequent ones, the first drawn wins.
    """
    form = problem.answer_format
    votes: dict[int, int] = {}  # by the first completion that stated the answer
    stated: dict[int, Problem] = {}
    for place, text in enumerate(completions):
        answer = extract_answer(text, form)
        if answer is None:
            continue
        same = (i for i, earlier in stated.items() if exact_match(earlier, text, form))
        first = next(same, place)
        stated.setdefault(first, replace(problem, answer=answer))
        votes[first] = votes.get(first, 0) + 1
    return max(votes, key=lambda place: votes[place], default=None)
