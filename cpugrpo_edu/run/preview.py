"""In about a minute: one prompt, a few completions and their rewards, before hours of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cpugrpo_edu.data import Group
from cpugrpo_edu.engine.architectures import supports
from cpugrpo_edu.engine.int8 import Drift, measure_drift, quantize_for_rollout
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.models.load import check_policy, default_answer_format, load_policy
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.rewards import parse_rewards
from cpugrpo_edu.run.config import RunConfig, check_settings
from cpugrpo_edu.run.data import load_data
from cpugrpo_edu.run.prepare import problems_of_stage
from cpugrpo_edu.run.references import check_references, is_compared
from cpugrpo_edu.run.signal_check import Signal, signal_of
from cpugrpo_edu.sample import Sampling, rollout
from cpugrpo_edu.tasks.answers import extract_answer, with_answer_format

PROMPTS = 4
"""Groups that are sampled."""
SHOWN = 4
"""Completions that are shown, of different groups first."""
SEED = 32_452_843
"""Neither the training nor its signal check has it."""


@dataclass(frozen=True)
class Preview:
    """What a run would begin with."""

    prompt: str
    """As the model sees it, special tokens included."""
    completions: list[dict[str, Any]]
    """"text", "answer" (as read; None if a verifier judges, or there is none), "reward", "tokens"
    and "ended" (by itself, not by the limit)."""
    answer_format: str
    warning: str | None
    """About references that cannot be matched."""
    signal: Signal
    drift: Drift | None
    """Of the INT8 copy that would roll out; None where there is none."""


def preview(config: RunConfig, on_done: Callable[[int], None] = lambda prompts: None) -> Preview:
    """Load data and model as a run does, and sample a few groups. Writes nothing. Raises UserError
    for whatever a run would refuse."""
    check_settings(config)
    training, _ = load_data(config)
    index = next((i for i, stage in enumerate(config.stages) if stage.steps), 0)
    policy = load_policy(
        config.model,
        dtype=config.weights,
        kernel=config.kernel,
        lora_rank=config.lora_rank,
        system=config.system,
        answer_format=config.answer_format,
        options=EngineOptions(config.engine),
    )
    check_policy(policy)
    form = default_answer_format(policy.model.config)
    problems = with_answer_format(problems_of_stage(config, index, training), form)
    warning = check_references(problems)
    sampling = Sampling(config.max_completion, config.temperature, seed=SEED + config.seed)
    rewards = parse_rewards(config.rewards, config.max_completion)
    groups = rollout(policy, problems[:PROMPTS], config.num_generations, sampling, rewards, on_done)
    return Preview(
        prompt=policy.tokenizer.decode(groups[0].prompt_ids),
        completions=shown(groups),
        answer_format=form,
        warning=warning,
        signal=signal_of(groups),
        drift=drift_of(config, policy, groups),
    )


def shown(groups: list[Group]) -> list[dict[str, Any]]:
    """Completions of every group in turn."""
    turns = [
        (group.problem, group.episodes[turn])
        for turn in range(len(groups[0].episodes))
        for group in groups
        if group.problem is not None
    ]
    return [
        {
            "question": problem.question,
            "text": episode.text,
            "answer": extract_answer(episode.text, problem.answer_format)
            if is_compared(problem)
            else None,
            "reference": problem.answer,
            "reward": episode.reward,
            "tokens": len(episode.completion_ids),
            "ended": episode.finished,
        }
        for problem, episode in turns[:SHOWN]
    ]


def drift_of(config: RunConfig, policy: Policy, groups: list[Group]) -> Drift | None:
    """How far an INT8 copy of the policy is from it, if the run would sample from one."""
    if config.frozen or not config.int8_rollouts or supports(policy.model.config, "INT8 copy"):
        return None
    copy = quantize_for_rollout(policy.model, kernel=config.kernel)
    few = [Group(group.prompt_ids, group.episodes[:1]) for group in groups]
    return measure_drift(policy.model, copy, few, config.temperature)
