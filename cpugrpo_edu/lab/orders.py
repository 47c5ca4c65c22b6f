"""Chapter 12's race: orders of the same problems at an equal budget of generated tokens."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpugrpo_edu.curriculum import Stage, make_stages, stage_problems
from cpugrpo_edu.data import DIFFICULTIES, Problem
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.trl_data import to_dataset, trl_rewards
from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
from cpugrpo_edu.evaluate import evaluate
from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.record.stats import working_share
from cpugrpo_edu.rewards import parse_rewards
from cpugrpo_edu.sample import Sampling
from cpugrpo_edu.tasks import DOMAINS, held_out_problems

ARMS: dict[str, dict[str, Any]] = {
    "curriculum": {"order": "curriculum", "replay": 0.3},
    "no replay": {"order": "curriculum", "replay": 0.0},
    "mixed": {"order": "mixed"},
    "reversed": {"order": "reversed", "replay": 0.3},
}
REWARDS = parse_rewards("correct_answer=1,valid_steps=0.5,good_format=0.2")
RATE, PROMPTS, GROUP = 5e-4, 8, 8
GREEDY = Sampling(max_new_tokens=96, temperature=0.0)
AT_MOST = 40
"""Steps of a stage; the budget ends it earlier."""
PLAN: dict[str, Any] = {"budget": 15_000, "per_cell": 20, "seeds": list(range(10, 16))}
"""Of the stored race; fixed before it ran."""


class TokenBudget(CPUGRPOTrainer):
    """Stops at the step nearest to a budget of generated tokens."""

    budget = float("inf")

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        before = self.tally.tokens
        loss = super().training_step(*args, **kwargs)
        step = self.tally.tokens - before
        if self.tally.tokens + step / 2 >= self.budget:
            self.control.should_training_stop = True
        return loss


def train_stage(policy: Policy, stage: Stage, budget: float, seed: int) -> list[dict[str, float]]:
    """Train one stage; what happened in each step."""
    problems = stage_problems(stage, DOMAINS, AT_MOST * PROMPTS, seed)
    rows: list[dict[str, float]] = []

    def note(metrics: Mapping[str, float]) -> None:
        rows.append(
            {
                "tokens": trainer.tally.tokens,
                "reward": metrics["reward"],
                "alike": metrics["frac_reward_zero_std"],
                "length": metrics["completions/mean_length"],
            }
        )

    with tempfile.TemporaryDirectory() as folder:
        config = cpu_config(
            folder,
            prompts_per_step=PROMPTS,
            num_generations=GROUP,
            max_completion_length=GREEDY.max_new_tokens,
            max_steps=AT_MOST,
            learning_rate=stage.learning_rate,
            reward_weights=[reward.weight for reward in REWARDS],
            seed=seed,
        )
        trainer = TokenBudget(
            policy,
            config,
            trl_rewards(REWARDS, problems),
            to_dataset(problems),
            EngineOptions(patience=0),
            on_step=note,
        )
        trainer.budget = budget
        trainer.train()
    return rows


def run_order(
    arm: str, seed: int, budget: float, problems: Sequence[Problem]
) -> list[dict[str, Any]]:
    """Three stages of one arm, a third of the budget each, all tested on the same problems."""
    gc.freeze()  # TRL collects garbage after each run: skip what stays
    policy = load_policy("bundled")
    stages = make_stages(**ARMS[arm], steps=(AT_MOST,) * 3, learning_rates=(RATE,) * 3)
    found: list[dict[str, Any]] = []
    used: float = 0
    for i, stage in enumerate(stages):
        rows = train_stage(policy, stage, budget * (i + 1) / 3 - used, 1000 * seed + i)
        rows = [{**row, "tokens": row["tokens"] + used} for row in rows]
        used = rows[-1]["tokens"]
        result = evaluate(policy, problems, stage.name, GREEDY)
        right, level = np.array(result.correct), np.array(result.difficulties)
        found.append(
            {
                "stage": stage.name,
                "steps": rows,
                "overall": float(right.mean()),
                "accuracy": {x: float(right[level == x].mean()) for x in DIFFICULTIES},
                "working": working_share(result)["share_with_working"],
            }
        )
    return found


def remake(path: Path) -> None:
    """Run the plan and store it: many minutes."""
    problems = held_out_problems(PLAN["per_cell"])
    runs = [
        {"arm": arm, "seed": seed, "stages": run_order(arm, seed, PLAN["budget"], problems)}
        for seed in PLAN["seeds"]
        for arm in ARMS
    ]
    config = PLAN | {"arms": ARMS, "learning_rate": RATE}
    new_record("orders", config, {"runs": runs}, PLAN["seeds"][0]).save(path)


def outcome(record: RunRecord, arm: str, key: str, stage: int = -1) -> NDArray[np.float64]:
    """One value per seed, in the order of the seeds. ``key`` is "overall", "working", a difficulty,
    "tokens" or "steps" (their number in that stage)."""
    by_seed = {r["seed"]: r["stages"][stage] for r in record.results["runs"] if r["arm"] == arm}
    return np.array([_value(by_seed[seed], key) for seed in record.config["seeds"]])


def _value(stage: Mapping[str, Any], key: str) -> float:
    if key in DIFFICULTIES:
        return float(stage["accuracy"][key])
    if key == "tokens":
        return float(stage["steps"][-1]["tokens"])
    return float(len(stage["steps"]) if key == "steps" else stage[key])


def forgotten(record: RunRecord, arm: str, level: str) -> NDArray[np.float64]:
    """Best accuracy after the stages before the last minus accuracy at the end, in points."""
    first, second, end = (outcome(record, arm, level, stage) for stage in range(3))
    return 100 * (np.maximum(first, second) - end)
