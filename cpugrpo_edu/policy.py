"""GRPO from zero: log-probabilities, advantages, KL estimators, and the losses.

A language model is a policy: at position t it draws token o_t from
pi(o_t | q, o_<t). This module contains the algorithm as plain functions of tensors, in the
order in which a training step uses them; ``train`` combines them. ``cpugrpo run`` uses TRL's
implementation of the same formulas, and tests check that both agree.

Shapes: B sequences, P prompt positions (padded on the left), C completion
positions (padded on the right), V tokens in the vocabulary. ``mask`` is (B, C),
1 on completion tokens and 0 on padding. Logarithms are natural, so
log-probabilities, entropies and KL divergences are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cpugrpo_edu.data import Group, Problem
from cpugrpo_edu.tasks import prompt_messages

Scale = Literal["group", "batch", "none"]
Reduction = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
Importance = Literal["token", "sequence"]

ADVANTAGE_EPS = 1e-4
"""Added to the standard deviation of the rewards; TRL's value."""


# --- The policy: a model and how to prompt it --------------------------------


@dataclass
class Policy:
    """A model with its tokenizer and how to prompt it.

    ``model`` may be wrapped by PEFT. ``source`` is the folder or hub id it came from, ``system``
    the system prompt or None. ``sampler`` completes prompts; None means ``sample.sample``.
    """

    model: Any
    tokenizer: Any
    source: str
    system: str | None = None
    sampler: Callable[..., list[Group]] | None = None

    @property
    def eos_ids(self) -> set[int]:
        """Every token that ends a completion, from the tokenizer and the generation config."""
        ids = getattr(self.model.generation_config, "eos_token_id", None)
        ids = ids if isinstance(ids, list) else [ids]
        return {int(i) for i in [*ids, self.tokenizer.eos_token_id] if i is not None}

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the chat template, up to where the answer begins."""
        return list(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )

    def encode_problem(self, problem: Problem) -> list[int]:
        """Token ids of the prompt that gives the problem to this model."""
        return self.encode_chat(prompt_messages(problem, self.system))


# --- Log-probabilities of a completion ---------------------------------------


def completion_logits(
    model: Any,
    prompt_ids: Tensor,
    completion_ids: Tensor,
    attention_mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Logits (B, C, V) in fp32, divided by ``temperature``, that predict the completion.

    ``prompt_ids`` is (B, P), left-padded; ``completion_ids`` (B, C), right-padded;
    ``attention_mask`` (B, P + C), 1 on real tokens. Raises ``ValueError`` if the shapes do
    not match, the prompt is empty, or the temperature is not positive.
    """
    (batch, prompt), (_, completion) = prompt_ids.shape, completion_ids.shape
    if attention_mask.shape != (batch, prompt + completion) or len(completion_ids) != batch:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected "
            f"{(batch, prompt + completion)}, one entry for each prompt and completion token: "
            "concatenate the prompt mask and the completion mask along dim 1"
        )
    if prompt == 0:
        raise ValueError("the prompt has 0 tokens; start it with a BOS token, at least")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be greater than 0")
    # Position 0 is the first real token. Without this, left padding would shift the
    # positions, which changes the output of models with absolute positions.
    position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    # The logits at position i predict token i + 1. Only these C positions go through
    # the head: with a large vocabulary it is the most expensive layer.
    predicting = torch.arange(prompt - 1, prompt + completion - 1, device=prompt_ids.device)
    output = model(
        input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
        attention_mask=attention_mask,
        position_ids=position_ids,
        logits_to_keep=predicting,
        use_cache=False,
    )
    return output.logits.float() / temperature


def gather_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """log softmax(logits)[token] in nats, from shapes (..., V) and (...) to (...)."""
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(dim=-1)


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy -sum_v p_v log p_v of the next token in nats, from shape (..., V) to (...)."""
    log_p = logits.log_softmax(dim=-1)
    # A token of probability 0 (logit -inf) contributes 0, not 0 * -inf = NaN.
    return torch.special.entr(log_p.exp()).sum(dim=-1)


def token_log_probs(
    model: Any,
    prompt_ids: Tensor,
    completion_ids: Tensor,
    attention_mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """log pi(o_t | q, o_<t) for every completion token, (B, C); 0 on padding.

    Therefore ``.sum(dim=1)`` is log pi(o | q). For inputs and errors see ``completion_logits``.
    """
    logits = completion_logits(model, prompt_ids, completion_ids, attention_mask, temperature)
    mask = attention_mask[:, prompt_ids.shape[1] :].bool()
    return gather_log_probs(logits, completion_ids).masked_fill(~mask, 0.0)


# --- How good a completion was, compared with its group -----------------------


def group_advantages(rewards: Tensor, scale: Scale = "group") -> Tensor:
    """A = (r - mean of its group) / (std + 1e-4); same shape as ``rewards``.

    ``rewards`` is (groups, G), or (G,) for one group: **the last dimension is the
    group**, so reshape a flat batch with ``rewards.view(-1, G)``. ``scale`` chooses the standard
    deviation to divide by: that of the "group" (Shao et al. 2024, arXiv 2402.03300, section
    4.1.2), that of the whole "batch", or "none" (Liu et al. 2025, Dr. GRPO, arXiv 2503.20783:
    division favours prompts that are solved almost always or almost never).
    The standard deviation has ddof = 1, as in TRL. Raises ``ValueError`` if G < 2, if a
    reward is not finite, or if ``scale`` is unknown.
    """
    if not rewards.is_floating_point():
        rewards = rewards.float()
    if rewards.ndim == 0 or rewards.shape[-1] < 2:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}; the last dimension is the group and must "
            "be at least 2: sample at least 2 completions per prompt and use rewards.view(-1, G)"
        )
    if not rewards.isfinite().all():
        raise ValueError(
            "rewards contain NaN or infinity; only finite numbers are allowed: "
            "let the reward function return 0.0 for a completion it cannot score"
        )
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    if scale == "none":
        return centred
    if scale == "group":
        return centred / (rewards.std(dim=-1, correction=1, keepdim=True) + ADVANTAGE_EPS)
    if scale == "batch":
        return centred / (rewards.std(correction=1) + ADVANTAGE_EPS)
    raise ValueError(f"scale is {scale!r}; allowed are 'group', 'batch' and 'none': choose one")


# --- How far the policy has moved from the reference --------------------------


class KLEstimates(NamedTuple):
    """Three estimators of KL(pi || ref) from one sample of pi; nats, same shape as the input."""

    k1: Tensor
    k2: Tensor
    k3: Tensor


def kl_estimates(log_probs: Tensor, ref_log_probs: Tensor) -> KLEstimates:
    """Estimate KL(pi || ref) = E_pi[log pi - log ref] from tokens sampled from **pi**.

    With d = log ref - log pi (Schulman 2020, "Approximating KL divergence";
    GRPO eq. 4 and TRL use k3):

    - k1 = -d: unbiased, often negative;
    - k2 = d^2 / 2: biased, never negative, low variance;
    - k3 = e^d - d - 1: unbiased, never negative.

    Unbiased as a *value* does not mean unbiased as a *loss*. If you differentiate the
    estimators directly, with samples from pi, the expected gradient is zero for k1, the
    gradient of KL(pi || ref) for k2, and for k3 the gradient of KL(ref || pi), which is the
    other direction. The tests check this by enumeration. To correct it, multiply by the ratio
    pi / pi_old and differentiate the product: E[ratio k3] has both the value and the gradient
    of KL(pi || ref). If the sign of d is wrong, k2 is unchanged, k3 is biased, and k1 turns from
    a penalty into a bonus.
    """
    d = ref_log_probs - log_probs
    return KLEstimates(k1=-d, k2=d.square() / 2, k3=d.expm1() - d)


# --- The loss -----------------------------------------------------------------


def clipped_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> Tensor:
    """PPO's objective min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), to be *maximised*.

    rho = pi / pi_old is the importance ratio; the shapes broadcast (Schulman et al. 2017,
    arXiv 1707.06347, eq. 7; eps_high > eps_low is DAPO's "clip-higher", arXiv 2503.14476,
    eq. 10). The minimum removes the gradient once the ratio has moved far enough in the
    direction that A rewards, and only in that direction.
    """
    ratio = (log_probs - old_log_probs).exp()
    return torch.min(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of each sequence, from (B, C) to (B, 1); 0 if there are none."""
    return (values * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_log_probs: Tensor | None = None,
    beta: float = 0.0,
    correct_kl: bool = True,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    importance: Importance = "token",
    reduction: Reduction = "dapo",
    max_length: int | None = None,
    total_tokens: float | Tensor | None = None,
) -> Tensor:
    """The loss to minimise, a scalar: -(clipped surrogate) + beta KL, reduced over tokens.

    ``log_probs`` (of the live policy, with gradient), ``old_log_probs`` (of the policy that
    sampled) and ``ref_log_probs`` are (B, C); ``advantages`` is (B,) or (B, C).

    The KL term is k3, times the importance ratio if ``correct_kl`` (TRL 1.16's default,
    ``use_bias_correction_kl``; DeepSeek-V3.2, arXiv 2512.02556). False is the original GRPO.

    ``importance="sequence"`` is GSPO (Zheng et al. 2025, arXiv 2507.18071, eq. 7): one
    ratio per sequence, the geometric mean of its token ratios.

    For the other options see ``reduce_tokens``. Raises ``ValueError`` if an option is missing or
    unknown.
    """
    mask = mask.to(log_probs.dtype)
    if advantages.ndim == 1:
        advantages = advantages.unsqueeze(1)
    if importance == "sequence":
        new, old = sequence_mean(log_probs, mask), sequence_mean(old_log_probs, mask)
    elif importance == "token":
        new, old = log_probs, old_log_probs
    else:
        raise ValueError(f"importance is {importance!r}; allowed are 'token' and 'sequence'")
    loss = -clipped_surrogate(new, old, advantages, eps_low, eps_high)
    if beta:
        if ref_log_probs is None:
            raise ValueError(f"beta is {beta} but ref_log_probs is missing: pass it, or beta 0")
        kl = kl_estimates(log_probs, ref_log_probs).k3
        loss = loss + beta * ((new - old).exp() * kl if correct_kl else kl)
    # The product also spreads a per-sequence loss (B, 1) over its tokens.
    return reduce_tokens(loss * mask, mask, reduction, max_length, total_tokens)


def reduce_tokens(
    loss: Tensor,
    mask: Tensor,
    reduction: Reduction,
    max_length: int | None = None,
    total_tokens: float | Tensor | None = None,
) -> Tensor:
    """Add up token losses (B, C), 0 outside the mask, and divide: how much a token counts.

    - "grpo": mean over each sequence, then over sequences, so a token of a long answer
      counts less (arXiv 2402.03300, eq. 3);
    - "bnpo": the number of tokens in this micro-batch;
    - "dr_grpo": B x ``max_length``, a constant, so there is no length bias (arXiv 2503.20783);
    - "dapo": ``total_tokens``, the number of tokens in the whole optimizer step
      (arXiv 2503.14476, eq. 8). The default, the tokens of this batch, equals "bnpo".

    When you accumulate gradients over n micro-batches, divide the loss by n, except for "dapo":
    its micro-batch losses add up.
    """
    if reduction == "grpo":
        return sequence_mean(loss, mask).mean()
    if reduction == "bnpo":
        return loss.sum() / mask.sum().clamp(min=1)
    if reduction == "dr_grpo":
        if not max_length or max_length < 1:
            raise ValueError(
                f"max_length is {max_length}; reduction 'dr_grpo' divides by it and needs at least "
                "1: pass the largest allowed number of completion tokens"
            )
        return loss.sum() / (len(loss) * max_length)
    if reduction == "dapo":
        tokens = mask.sum() if total_tokens is None else torch.as_tensor(total_tokens)
        return loss.sum() / tokens.clamp(min=1)
    raise ValueError(f"reduction is {reduction!r}; allowed are {', '.join(get_args(Reduction))}")
