"""Run by test_ranks.py, as one process or as several: ``ranks.py MODEL FOLDER``.

Takes one optimizer step for every case, on completions that depend on the prompt alone, and
saves the gradient and the facts that the tests compare.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from cpugrpo_edu.data import Problem
from cpugrpo_edu.engine import ranks
from cpugrpo_edu.engine.hardware import configure_threads
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.trl_data import to_dataset, trl_rewards
from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
from cpugrpo_edu.models.load import fingerprint, load_policy
from cpugrpo_edu.rewards import Reward

PROMPTS = ["a", "b c", "Compute 1 + 2.", "x y z"]
PROBLEMS = [Problem(text, "mine", "basic", text, "") for text in PROMPTS]
GROUP = 4

# Prompts whose completions differ in reward. Of two ranks, the first has the first two.
CASES = {
    "dapo": {"rewarded": PROMPTS},
    "grpo": {"rewarded": PROMPTS, "loss_type": "grpo"},
    "bnpo": {"rewarded": PROMPTS, "loss_type": "bnpo"},
    "dr_grpo": {"rewarded": PROMPTS, "loss_type": "dr_grpo"},
    "kl": {"rewarded": PROMPTS, "beta": 0.1},
    "lora": {"rewarded": PROMPTS, "lora": 4},
    "checkpointing": {"rewarded": PROMPTS, "gradient_checkpointing": True},
    "one rank has a single row": {"rewarded": PROMPTS[:2]},
    "the other has it": {"rewarded": PROMPTS[2:]},
    "one group in all": {"rewarded": PROMPTS[3:]},
    "no signal": {"rewarded": []},
}


class SameForEveryone(CPUGRPOTrainer):
    """Draws a prompt's completions from a seed of the prompt's own; keeps the gradient."""

    def rollout(self, prompts, trainer=None):
        whole = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for i in range(0, len(prompts), GROUP):
            block = prompts[i : i + GROUP]
            self.prompt_seed = zlib.crc32(repr(self.encode(block[0])).encode())
            new = super().rollout(block)
            whole["prompt_ids"] += new["prompt_ids"]
            for tokens, values in zip(new["completion_ids"], new["logprobs"], strict=True):
                # a random model seldom ends by itself
                end = 1 + zlib.crc32(repr(tokens).encode()) % len(tokens)
                whole["completion_ids"].append(tokens[:end])
                whole["logprobs"].append(values[:end])
        self.tokens = sum(map(len, whole["completion_ids"]))
        return whole

    def rollout_seed(self):
        return self.prompt_seed

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.gradient = {
            name: p.grad.clone()
            for name, p in self.policy.model.named_parameters()
            if p.requires_grad
        }
        return loss


def step(model, rewarded, lora=0, **settings):
    """The trainer after one step."""

    def odd_tokens(problem, episode):
        ids = episode.completion_ids
        return sum(i % 2 for i in ids) / len(ids) if problem.question in rewarded else 0.0

    policy = load_policy(model, lora_rank=lora, seed=0)
    if lora:  # B is zero at first, and then A has no gradient
        torch.manual_seed(0)
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    more = {"ddp_broadcast_buffers": False} if ranks.size() > 1 else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SameForEveryone(
            policy,
            cpu_config(
                folder,
                prompts_per_step=len(PROMPTS) // ranks.size(),
                num_generations=GROUP,
                max_completion_length=12,
                max_steps=1,
                optim="sgd",
                learning_rate=0.1,
                max_grad_norm=0.0,
                **{"loss_type": "dapo"} | settings | more,
            ),
            trl_rewards([Reward("odd_tokens", odd_tokens)], PROBLEMS),
            to_dataset(PROBLEMS),
            EngineOptions(micro_batch=3, patience=0),
        )
        traffic = ranks.Traffic()
        if ranks.size() > 1:
            wrap = trainer.accelerator.prepare_model

            def watched(*args, **kwargs):
                wrapped = wrap(*args, **kwargs)
                if hasattr(wrapped, "register_comm_hook"):
                    traffic.watch(wrapped)
                return wrapped

            trainer.accelerator.prepare_model = watched
        trainer.train()
    return trainer, traffic


def main(model, folder):
    configure_threads(1)
    ranks.join()
    facts = {}
    for name, case in CASES.items():
        trainer, traffic = step(model, **case)
        [row] = [row for row in trainer.state.log_history if "reward" in row]
        facts[name] = {
            "weights": ranks.gather(fingerprint(trainer.policy.model)),
            "metrics": ranks.gather({k: row[k] for k in ("loss", "reward")}),
            "skipped": ranks.gather(trainer.tally.skipped),
            "tokens": ranks.gather(trainer.tokens),
            "bytes": traffic.bytes_per_step,
            "gradient_bytes": sum(g.nbytes for g in trainer.gradient.values()),
        }
        if ranks.is_main():
            save_file(trainer.gradient, Path(folder) / f"{name}.safetensors")
    if ranks.is_main():
        Path(folder, "facts.json").write_text(json.dumps(facts))
    ranks.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
