"""All of GRPO: sample groups, reward them, compare within each group, update. Read from the bottom.

    policy = load_policy("bundled")
    train(policy, make_problems("arithmetic", "basic", "train", 256), on_step=print)

The chapters teach this algorithm. It is built only from functions of this package. The trainer
behind ``cpugrpo run``, ``engine.trl_trainer``, takes the same steps through TRL and makes them fast
and safe on a CPU. A test checks that both have the same batch, loss, gradient and optimizer step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cpugrpo_edu.data import Group, Problem
from cpugrpo_edu.policy import Policy, Scale, group_advantages, grpo_loss, token_log_probs
from cpugrpo_edu.rewards import Reward, parse_rewards
from cpugrpo_edu.sample import Sampling, left_pad, rollout

REWARDS = "correct_answer=1,valid_steps=0.5,good_format=0.2"


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of GRPO. The defaults suit the bundled model."""

    prompts_per_step: int = 16
    completions: int = 8  # G, per prompt
    max_new_tokens: int = 104
    temperature: float = 1.0
    learning_rate: float = 3e-4
    eps: float = 0.2  # how far the importance ratio may move from 1 before it is clipped
    scale: Scale = "group"
    reduction: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    max_grad_norm: float = 1.0
    micro_batch: int = 128  # completions per backward pass; changes memory, not the result
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """The completions of one step: B rows, prompts padded on the left, completions on the right."""

    prompt_ids: Tensor  # (B, P)
    completion_ids: Tensor  # (B, C)
    attention_mask: Tensor  # (B, P + C), 1 on tokens
    old_log_probs: Tensor  # (B, C) in nats, under the policy that sampled
    advantages: Tensor  # (B,)

    @property
    def mask(self) -> Tensor:
        """(B, C), 1 on completion tokens."""
        return self.attention_mask[:, self.prompt_ids.shape[1] :]

    def split(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self.advantages), size):
            rows = slice(start, start + size)
            yield Batch(*(getattr(self, field.name)[rows] for field in fields(self)))


def make_batch(groups: Sequence[Group], scale: Scale, pad_id: int) -> Batch:
    """Pad the completions of all groups into one batch and compute their advantages."""
    rewards = torch.tensor([[e.reward for e in g.episodes] for g in groups], dtype=torch.float64)
    episodes = [episode for group in groups for episode in group.episodes]
    prompts = [group.prompt_ids for group in groups for _ in group.episodes]
    prompt_ids, prompt_mask = left_pad(prompts, pad_id)
    written = [torch.tensor(episode.completion_ids) for episode in episodes]
    old = [torch.tensor(episode.logprobs) for episode in episodes]
    mask = pad_sequence([torch.ones_like(ids) for ids in written], batch_first=True)
    return Batch(
        prompt_ids,
        pad_sequence(written, batch_first=True, padding_value=pad_id),
        torch.cat([prompt_mask, mask], dim=1),
        pad_sequence(old, batch_first=True),
        group_advantages(rewards, scale).flatten().float(),
    )


def batch_loss(model: Any, batch: Batch, settings: Settings, total_tokens: Tensor) -> Tensor:
    """The clipped GRPO loss of a micro-batch of a step with ``total_tokens`` completion tokens."""
    log_probs = token_log_probs(
        model, batch.prompt_ids, batch.completion_ids, batch.attention_mask, settings.temperature
    )
    return grpo_loss(
        log_probs,
        batch.old_log_probs,
        batch.advantages,
        batch.mask,
        eps_low=settings.eps,
        eps_high=settings.eps,
        reduction=settings.reduction,
        max_length=settings.max_new_tokens,
        total_tokens=total_tokens,
    )


def update(
    model: Any, batch: Batch, optimizer: torch.optim.Optimizer, settings: Settings
) -> dict[str, float]:
    """One optimizer step on a batch; returns the loss and the gradient's norm before clipping."""
    total_tokens, loss = batch.mask.sum(), 0.0
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.dtype is torch.bfloat16 for p in trained):  # a step is mostly below their rounding
        raise ValueError("bfloat16 weights lose their updates; load them in float32, or use LoRA")
    for part in batch.split(settings.micro_batch):
        share = len(part.advantages) / len(batch.advantages)
        part_loss = batch_loss(model, part, settings, total_tokens)
        if settings.reduction != "dapo":  # the others average over rows, so the parts do too
            part_loss = part_loss * share
        part_loss.backward()
        loss += part_loss.item()
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss, "grad_norm": grad_norm.item()}


def measure(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics to watch: reward, its spread over the step, groups that teach nothing, length."""
    rewards = torch.tensor([[e.reward for e in g.episodes] for g in groups])
    lengths = [len(e.completion_ids) for g in groups for e in g.episodes]
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        "frac_zero_std": (rewards.std(dim=1) < 1e-6).float().mean().item(),
        "completion_length": sum(lengths) / len(lengths),
    }


def train(
    policy: Policy,
    problems: Sequence[Problem],
    rewards: Sequence[Reward] | str = REWARDS,
    steps: int = 20,
    settings: Settings = Settings(),
    on_step: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> list[dict[str, float]]:
    """Train ``policy.model`` in place with GRPO (Shao et al. 2024, arXiv 2402.03300).

    Each step draws ``prompts_per_step`` of the problems. Returns every step's metrics; ``on_step``
    gets them as they come.
    """
    if isinstance(rewards, str):
        rewards = parse_rewards(rewards, settings.max_new_tokens)
    if not any(reward.weight for reward in rewards):
        raise ValueError("no reward has a weight above 0, so nothing can be learned; give one")
    sampling = Sampling(settings.max_new_tokens, settings.temperature)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    shuffle = random.Random(settings.seed)
    policy.model.train()
    history = []
    for step in range(1, steps + 1):
        chosen = shuffle.sample(list(problems), min(settings.prompts_per_step, len(problems)))
        seeded = replace(sampling, seed=settings.seed * 1_000_003 + step)
        groups = rollout(policy, chosen, settings.completions, seeded, rewards)
        batch = make_batch(groups, settings.scale, policy.pad_id)
        metrics = {"step": step, **measure(groups)}
        metrics |= update(policy.model, batch, optimizer, settings)
        history.append(metrics)
        on_step(metrics)
    return history
