"""Two steps of GRPO, alone or as one rank of several, on completions that depend on the prompt."""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpugrpo_edu.engine.hardware import configure_threads
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.trl_data import to_dataset, trl_rewards
from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
from cpugrpo_edu.models.load import fingerprint, load_policy
from cpugrpo_edu.notebook import quiet_libraries
from cpugrpo_edu.rewards import parse_rewards
from cpugrpo_edu.tasks import make_problems

GROUP, PROMPTS, STEPS = 4, 2, 2

# The same calls on all ranks: fixed sizes, nothing skipped.
OPTIONS = EngineOptions(micro_batch=GROUP * PROMPTS, skip_zero_advantage=False)


class SameForEveryone(CPUGRPOTrainer):
    """Draws a prompt's completions from a seed of the prompt's own, whichever rank draws them."""

    def rollout(self, prompts: Any, trainer: Any = None) -> dict[str, Any]:
        found: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for i in range(0, len(prompts), GROUP):
            group = prompts[i : i + GROUP]  # the same prompt, repeated
            self.prompt_seed = zlib.crc32(repr(self.encode(group[0])).encode())
            for name, rows in super().rollout(group).items():
                found[name] += rows
        return found

    def rollout_seed(self) -> int:
        return self.prompt_seed


def train(accumulation: int, rate: float = 0.5) -> tuple[Tensor, dict[str, Any]]:
    """Two optimizer steps of SGD; the change of all weights, flattened, and some facts."""
    quiet_libraries()
    policy = load_policy("bundled")
    parameters = list(policy.model.parameters())
    before = [p.detach().clone() for p in parameters]
    rewards = parse_rewards("correct_answer=1,valid_steps=1")
    problems = make_problems("arithmetic", "basic", "train", 24)
    settings: dict[str, Any] = {
        "prompts_per_step": PROMPTS,
        "num_generations": GROUP,
        "gradient_accumulation_steps": accumulation,
        "max_completion_length": 32,
        "max_steps": STEPS,
        "optim": "sgd",
        "learning_rate": rate,
        "reward_weights": [reward.weight for reward in rewards],
    }
    with tempfile.TemporaryDirectory() as folder:
        rows, judges = to_dataset(problems), trl_rewards(rewards, problems)
        trainer = SameForEveryone(policy, cpu_config(folder, **settings), judges, rows, OPTIONS)
        trainer.train()
    pairs = zip(parameters, before, strict=True)
    change = torch.cat([(new.detach() - old).flatten() for new, old in pairs])
    log = [row for row in trainer.state.log_history if "reward" in row]
    facts = {
        "weights": fingerprint(policy.model),
        "rewards": [round(row["reward"], 6) for row in log],
        "processes": trainer.accelerator.num_processes,
        "kind": str(trainer.accelerator.distributed_type.value),
    }
    return change, facts


def main(folder: str) -> None:
    configure_threads(1)
    change, facts = train(accumulation=1)
    facts["change"] = change[::37].tolist()
    rank = torch.distributed.get_rank()
    Path(folder, f"rank{rank}").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
