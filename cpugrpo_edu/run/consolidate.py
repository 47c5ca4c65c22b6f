"""After a stage: estimate the Fisher information of what was learned, and anchor EWC there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpugrpo_edu.data import Problem
from cpugrpo_edu.engine import ranks
from cpugrpo_edu.engine.fisher import estimate_fisher
from cpugrpo_edu.engine.memory import retry_smaller
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.ewc import merge_anchors, normalize_fisher, take_anchor
from cpugrpo_edu.fisher import Example, examples_from_groups
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.run.state import Learner, Session
from cpugrpo_edu.sample import Sampling, rollout

GIVEN = ("empirical", "batched")
"""The estimates that score a given completion: a worked solution, or a bare answer."""
NO_DATA = ("lightning", "uniform")
"""The estimates that look at no completion."""


def check_solutions(config: RunConfig, problems: Sequence[Sequence[Problem]]) -> None:
    """UserError if the estimate scores given completions and a problem of a stage has none."""
    if config.fisher not in GIVEN or not config.consolidates:
        return
    stages = zip(config.stages, problems, strict=True)
    scored = [p for stage, part in stages if stage.steps for p in part[-config.fisher_examples :]]
    without = sum(not given_completion(problem) for problem in scored)
    if without:
        raise UserError(
            f"--fisher {config.fisher} scores solutions, and {without} of {len(scored)} problems "
            "have neither a solution nor an answer; choose --fisher rollout_score, which scores "
            "the policy's own completions"
        )


def given_completion(problem: Problem) -> str:
    return (problem.solution or problem.answer).strip()


def solution_ids(policy: Policy, problem: Problem) -> list[int]:
    """Tokens of the given completion as the policy would have to write it: without the token that
    begins a text, and with the one that ends it."""
    ids = policy.tokenizer(given_completion(problem), add_special_tokens=False)["input_ids"]
    end = policy.tokenizer.eos_token_id
    return [*ids, min(policy.eos_ids) if end is None else end]


def protect_start(session: Session, learner: Learner) -> None:
    """Anchor the untrained model, if the settings name difficulties that it must not forget."""
    if session.config.consolidates and session.protected:
        add_anchor(session, learner, session.protected, len(session.config.stages))


def consolidate(session: Session, learner: Learner, index: int) -> dict[str, Any]:
    """Merge this stage's Fisher information into ``learner.anchor``; returns a part of its row."""
    begun = time.perf_counter()
    config = session.config
    detail: dict[str, Any] = {}
    # A stage of no steps learned nothing since the last anchor, which would count twice.
    if config.consolidates and config.stages[index].steps:
        problems = session.problems[index][-config.fisher_examples :]
        detail = add_anchor(session, learner, problems, index)
    return {"fisher": detail, "fisher_seconds": time.perf_counter() - begun}


def add_anchor(
    session: Session, learner: Learner, problems: list[Problem], seed: int
) -> dict[str, Any]:
    """Merge the Fisher information on ``problems`` into ``learner.anchor``; what the record says
    of it."""
    config = session.config
    count = len(problems)
    fisher = fisher_of(session, learner.policy, ranks.share(problems), seed)
    values = torch.cat([f.flatten() for f in fisher.values()])
    mean = float(values.mean())
    if mean > 0:
        latest = take_anchor(learner.policy.model, normalize_fisher(fisher))
        learner.anchor = merge_anchors(learner.anchor, latest, config.ewc_decay)
    return {
        "variant": config.fisher,
        "examples": count,
        "mean": mean,
        "largest": float(values.max()),
        "parameters": values.numel(),
    }


def fisher_of(
    session: Session, policy: Policy, problems: list[Problem], index: int
) -> dict[str, Tensor]:
    """The Fisher diagonal on this rank's problems, averaged over ranks; name to tensor."""
    config = session.config
    seed = config.seed + 101 * ranks.rank()
    examples = fisher_examples(config, policy, problems, seed + index)

    def estimate(batch_size: int) -> dict[str, Tensor]:
        return estimate_fisher(
            policy.model,
            examples,
            config.fisher,  # type: ignore[arg-type]
            batch_size=batch_size,
            seed=seed,
            memory_limit=session.memory_limit,
        )

    fisher = retry_smaller(estimate, 8, session.display.message)
    return ranks.average(fisher, len(problems))


def fisher_examples(
    config: RunConfig, policy: Policy, problems: list[Problem], seed: int
) -> list[Example]:
    """What the chosen estimate looks at: worked solutions, the policy's rollouts, or nothing."""
    if config.fisher in NO_DATA:
        return []
    if config.fisher in GIVEN:
        return [
            Example(policy.encode_problem(problem), solution_ids(policy, problem))
            for problem in problems
        ]
    sampling = Sampling(config.max_completion, 1.0, seed=seed)
    return examples_from_groups(rollout(policy, problems, 1, sampling))
