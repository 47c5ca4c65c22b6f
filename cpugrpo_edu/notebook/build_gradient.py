"""What the reader builds in chapter 2: the policy gradient from samples, and advantages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpugrpo_edu.notebook.checks import Build
from cpugrpo_edu.policy import group_advantages, grpo_loss

# --- The gradient, and advantages ---------------------------------------------


def _by_loss(theta: Tensor, rewards: Tensor, answers: Tensor) -> Tensor:
    """Minus the gradient of the package's loss, with the rewards as advantages."""
    weights = theta.clone().requires_grad_()
    log_probs = weights.log_softmax(0)[answers][:, None]
    loss = grpo_loss(
        log_probs,
        log_probs.detach(),
        rewards[answers],
        torch.ones_like(log_probs),
        reduction="dr_grpo",
        max_length=1,  # the sum over tokens, the mean over completions
    )
    return -torch.autograd.grad(loss, weights)[0]


def _hot_only(theta: Tensor, rewards: Tensor, answers: Tensor) -> Tensor:
    one_hot = torch.eye(len(theta), dtype=theta.dtype)[answers]
    return (rewards[answers, None] * one_hot).mean(0)


def _weighted_twice(theta: Tensor, rewards: Tensor, answers: Tensor) -> Tensor:
    return _by_loss(theta, rewards * theta.softmax(0), answers)


def _bandit() -> Sequence[tuple[Tensor, ...]]:
    theta = torch.tensor([0.5, 0.0, -0.5, 1.0, 0.2]).double()
    rewards = torch.tensor([1.0, 0.2, 0.6, 0.0, 0.4]).double()
    return [(theta, rewards, torch.tensor(o)) for o in ([0, 3, 3, 2], [1, 1, 4])]


GRADIENT = Build(
    _by_loss,
    _bandit,
    [
        (
            (
                "the one-hot vector is there, but not what the softmax takes away: the score is "
                "the one-hot vector minus pi."
            ),
            _hot_only,
        ),
        (
            "this is the sum over the answers; take their mean.",
            lambda t, r, o: len(o) * _by_loss(t, r, o),
        ),
        (
            "the sign is wrong: this is the way down, away from rewards.",
            lambda *case: -_by_loss(*case),
        ),
        (
            "the rewards are missing: each score is multiplied by the reward of its answer.",
            lambda t, r, o: _by_loss(t, torch.ones_like(r), o),
        ),
        (
            ("each answer is weighted by its probability again; sampling has done that already."),
            _weighted_twice,
        ),
    ],
)


def advantages(rewards: Tensor, kind: str) -> Tensor:
    """Advantages of groups of rewards (..., G): "leave one out", "group mean" or "GRPO"."""
    G = rewards.shape[-1]
    if kind == "GRPO":
        return group_advantages(rewards)
    return group_advantages(rewards, "none") * (G / (G - 1) if kind == "leave one out" else 1)


def _with_std(rewards: Tensor, kind: str, correction: int, eps: float) -> Tensor:
    if kind != "GRPO":
        return advantages(rewards, kind)
    std = rewards.std(-1, keepdim=True, correction=correction)
    return (rewards - rewards.mean(-1, keepdim=True)) / (std + eps)


ADVANTAGES = Build(
    advantages,
    lambda: [
        (torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [0.5, 0.2, 0.2, 0.9]]).double(), kind)
        for kind in ("leave one out", "group mean", "GRPO")
    ],
    [
        (
            (
                "your mean is that of all groups together; take it over the last dimension only "
                "(keepdim=True keeps the shapes fitting)."
            ),
            lambda r, kind: advantages(r.flatten(), kind).view(r.shape),
        ),
        (
            "your standard deviation divides by G; GRPO's divides by G - 1 (correction=1).",
            lambda r, kind: _with_std(r, kind, 0, 1e-4),
        ),
        (
            "leave-one-out divides by the number of the others, G - 1.",
            lambda r, kind: (
                r - (r.sum(-1, keepdim=True) - r) / r.shape[-1]
                if kind == "leave one out"
                else advantages(r, kind)
            ),
        ),
        (
            (
                "leave-one-out compares with the mean of the others, without the completion's own "
                "reward."
            ),
            lambda r, kind: advantages(r, "group mean" if kind != "GRPO" else kind),
        ),
        (
            "GRPO divides the centred rewards by their standard deviation.",
            lambda r, kind: advantages(r, "group mean" if kind == "GRPO" else kind),
        ),
    ],
)
