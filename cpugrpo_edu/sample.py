"""Rollouts: a policy answers each problem n times, and every answer gets a reward.

Training, evaluation and the notebooks all call `rollout`. It turns problems into prompts, lets a
*sampler* complete them, and adds texts and rewards. `sample` is the readable sampler; a policy from
``load_policy`` uses the engine's fast one. A test checks that both draw from the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpugrpo_edu.data import Episode, Group, Problem
from cpugrpo_edu.errors import DIVERGED, UserError
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.rewards import Reward, give_rewards


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. ``temperature`` 0 is greedy; ``stop_at_eos`` False forces full length."""

    max_new_tokens: int = 96
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; give a number above 0 and at most 1")


def rollout(
    policy: Policy,
    problems: Sequence[Problem],
    n: int,
    sampling: Sampling,
    rewards: Sequence[Reward] = (),
    on_done: Callable[[int], None] = lambda prompts: None,
) -> list[Group]:
    """Sample ``n`` completions of each problem: one group per problem, in the given order.

    Every episode has its tokens, their log-probabilities in nats and its text; with ``rewards``
    also its reward. ``on_done`` gets the number of prompts just completed. Completions include
    their end-of-text token. Raises ``ValueError`` for an empty prompt or n < 1.
    """
    prompts = [policy.encode_problem(problem) for problem in problems]
    if n < 1 or not all(prompts):
        raise ValueError(f"n is {n} or a prompt has no tokens; give at least 1 of each")
    sampler = policy.sampler or sample
    groups: list[Group] = sampler(
        policy.model,
        prompts,
        n,
        sampling,
        eos_ids=policy.eos_ids,
        pad_id=policy.pad_id,
        on_done=on_done,
    )
    for group, problem in zip(groups, problems, strict=True):
        group.problem = problem
        ids = [episode.completion_ids for episode in group.episodes]
        texts = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for episode, text in zip(group.episodes, texts, strict=True):
            episode.text = text
    if rewards:
        give_rewards(groups, rewards)
    return groups


@torch.inference_mode()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    n: int,
    sampling: Sampling,
    *,
    eos_ids: set[int],
    pad_id: int,
    on_done: Callable[[int], None] = lambda prompts: None,
) -> list[Group]:
    """Complete each tokenized prompt ``n`` times, all rows in one batch, token by token.

    Each step feeds only the newest tokens to the model; the KV cache holds the keys and values of
    all earlier ones. Finished rows keep drawing tokens, which are ignored, until all are finished.
    """
    was_training = model.training
    model.eval()  # no dropout in rollouts
    rows = [prompt for prompt in prompts for _ in range(n)]
    ids, mask = left_pad(rows, pad_id)
    episodes = [Episode(finished=False) for _ in rows]
    stop = eos_ids if sampling.stop_at_eos else set()
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = None
    for _ in range(sampling.max_new_tokens):
        # Without this, left padding would shift the positions.
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        tokens, log_probs = draw(output.logits[:, -1], sampling, generator)
        drawn = zip(episodes, tokens.tolist(), log_probs.tolist(), strict=True)
        for episode, token, log_prob in drawn:
            if not episode.finished:
                episode.completion_ids.append(token)
                episode.logprobs.append(log_prob)
                episode.finished = token in stop
        if all(episode.finished for episode in episodes):
            break
        ids = tokens[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    model.train(was_training)
    on_done(len(prompts))
    return regroup(prompts, n, episodes)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one token per row from (rows, V) logits: ids (rows,) and their log-probs in nats.

    The log-probs belong to the distribution that is sampled, so they include temperature and
    top-p. Greedy decoding reports the model's own log-probs.
    """
    greedy = sampling.temperature == 0
    logits = logits.float() / (1 if greedy else sampling.temperature)
    if sampling.top_p < 1 and not greedy:
        logits = keep_top_p(logits, sampling.top_p)
    log_total = logits.logsumexp(-1, keepdim=True)
    if not log_total.isfinite().all():
        raise UserError(f"the model's scores are NaN or infinite; {DIVERGED}")
    token = logits.argmax(-1, keepdim=True)
    if not greedy:
        # Inverse transform sampling: one random number per row, where Gumbel-max needs one a token.
        mass = (logits - log_total).exp_().cumsum(-1, dtype=torch.float64)
        point = mass[:, -1:] * torch.rand(len(mass), 1, generator=generator, dtype=torch.float64)
        token = torch.searchsorted(mass, point, right=True)
    return token.squeeze(-1), (logits.gather(-1, token) - log_total).squeeze(-1)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities reach ``top_p``; set the rest to -inf."""
    ordered, order = logits.sort(-1, descending=True)
    mass = ordered.softmax(-1).cumsum(-1)
    drop = mass - ordered.softmax(-1) >= top_p
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (rows, width) padded on the left, and a mask of the same shape, 1 on tokens."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, (torch.arange(width) >= (width - lengths)[:, None]).long()


def regroup(prompts: Sequence[Sequence[int]], n: int, episodes: Sequence[Episode]) -> list[Group]:
    """Put the episodes, ``n`` consecutive ones for each prompt, into one group per prompt."""
    return [
        Group(list(prompt), list(episodes[i * n : (i + 1) * n])) for i, prompt in enumerate(prompts)
    ]
