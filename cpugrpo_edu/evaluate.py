"""Evaluate a policy on held-out problems: exact match and step scores for every item.

All models get the same problems in the same order: evaluations are paired, see `record.stats`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from cpugrpo_edu.data import Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.evaluations import Evaluation
from cpugrpo_edu.sample import Sampling, rollout

GREEDY = Sampling(max_new_tokens=128, temperature=0.0)


def evaluate(
    policy: Policy,
    problems: Sequence[Problem],
    label: str,
    sampling: Sampling = GREEDY,
    on_done: Callable[[int], None] = lambda problems: None,
) -> Evaluation:
    """Sample and verify one completion per problem; decoding is greedy by default.

    To evaluate another model with the same prompts, such as an INT8 copy, pass
    ``dataclasses.replace(policy, model=copy)``. Raises ``UserError`` if there are no problems.
    """
    if not problems:
        raise UserError("there are no problems to evaluate on; give at least one")
    start = time.perf_counter()
    groups = rollout(policy, problems, 1, sampling, on_done=on_done)
    episodes = [group.episodes[0] for group in groups]
    texts = [episode.text for episode in episodes]
    grades = [problem.grade(text) for problem, text in zip(problems, texts, strict=True)]
    return Evaluation(
        label=label,
        seed=sampling.seed,
        temperature=sampling.temperature,
        item_ids=[problem.id for problem in problems],
        domains=[problem.domain for problem in problems],
        difficulties=[problem.difficulty for problem in problems],
        correct=[grade == 1 for grade in grades],
        grade=grades,
        step_score=[p.check_steps(text).score for p, text in zip(problems, texts, strict=True)],
        tokens=[len(episode.completion_ids) for episode in episodes],
        finished=[episode.finished for episode in episodes],
        completions=texts,
        seconds=time.perf_counter() - start,
    )
