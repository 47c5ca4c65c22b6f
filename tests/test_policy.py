"""The policy's mathematics against enumeration, against TRL, and against common mistakes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from cpugrpo_edu.policy import (
    clipped_surrogate,
    completion_logits,
    gather_log_probs,
    group_advantages,
    grpo_loss,
    kl_estimates,
    sequence_mean,
    token_entropy,
    token_log_probs,
)

V, LENGTH = 5, 2
PROMPT = torch.tensor([[1, 3, 2]])


def tiny_policy(seed: int = 0, vocab_size: int = V) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,  # far from uniform, so that mistakes show
    )
    return Qwen2ForCausalLM(config).eval()


def every_completion() -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))


def sequence_log_probs(model) -> torch.Tensor:
    """log pi(o | q) of every completion, (V ** LENGTH,)."""
    completions = every_completion()
    prompts = PROMPT.expand(len(completions), -1)
    mask = torch.ones(len(completions), PROMPT.shape[1] + LENGTH)
    return token_log_probs(model, prompts, completions, mask).sum(dim=1)


def flat_gradient(scalar: torch.Tensor, model) -> torch.Tensor:
    gradients = torch.autograd.grad(scalar, list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients])


def exact_policy_gradient(model, rewards: torch.Tensor) -> torch.Tensor:
    """Gradient of J = sum_o pi(o | q) r(o), without any sampling."""
    return flat_gradient((sequence_log_probs(model).exp() * rewards).sum(), model)


# --- log-probabilities --------------------------------------------------------


def test_probabilities_of_all_completions_sum_to_one():
    assert sequence_log_probs(tiny_policy()).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_log_probs_equal_a_token_by_token_computation():
    model, completion, temperature = tiny_policy(), [4, 0, 2], 0.7
    expected = []
    for t in range(3):
        prefix = torch.tensor([PROMPT[0].tolist() + completion[:t]])
        logits = model(prefix).logits[0, -1] / temperature
        expected.append(logits.log_softmax(-1)[completion[t]].item())
    actual = token_log_probs(
        model, PROMPT, torch.tensor([completion]), torch.ones(1, 6), temperature
    )
    assert actual[0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["rotary", "absolute"])
def test_padding_changes_nothing(family):
    model = tiny_policy()
    if family == "absolute":  # needs explicit position_ids
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.5
        )
        model = GPT2LMHeadModel(config).eval()
    completion = torch.tensor([[4, 1]])
    alone = token_log_probs(model, PROMPT, completion, torch.ones(1, 5))
    padded = token_log_probs(
        model,
        torch.tensor([[0, 0, 1, 3, 2], [2, 2, 2, 2, 2]]),
        torch.tensor([[4, 1, 0], [3, 3, 3]]),
        torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [1] * 8]),
    )
    assert torch.allclose(padded[0, :2], alone[0], atol=1e-5)
    assert padded[0, 2] == 0


def test_only_completion_positions_reach_the_head():
    model, seen = tiny_policy(), []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    token_log_probs(model, PROMPT, torch.tensor([[4, 1]]), torch.ones(1, 5))
    assert seen == [(1, 2, 16)]


def test_entropy_against_the_definition():
    logits = completion_logits(tiny_policy(), PROMPT, torch.tensor([[4, 1]]), torch.ones(1, 5))
    p = logits.softmax(-1)
    assert torch.allclose(token_entropy(logits), -(p * p.log()).sum(-1), atol=1e-6)
    assert token_entropy(torch.zeros(V)).item() == pytest.approx(torch.tensor(float(V)).log())
    assert token_entropy(torch.tensor([0.0, float("-inf")])).item() == 0


@pytest.mark.parametrize(
    ("prompt", "mask", "temperature", "words"),
    [
        (PROMPT, torch.ones(1, 4), 1.0, "attention_mask has shape"),
        (PROMPT[:, :0], torch.ones(1, 2), 1.0, "0 tokens"),
        (PROMPT, torch.ones(1, 5), 0.0, "temperature is 0.0"),
    ],
)
def test_bad_input_is_named(prompt, mask, temperature, words):
    with pytest.raises(ValueError, match=words):
        token_log_probs(tiny_policy(), prompt, torch.tensor([[4, 1]]), mask, temperature)


# --- advantages ---------------------------------------------------------------


def test_group_advantages_use_ddof_one():
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    sample_std = 0.5  # population std (ddof = 0) would be 0.433
    assert advantages.tolist() == pytest.approx(
        [0.75 / (sample_std + 1e-4)] + [-0.25 / (sample_std + 1e-4)] * 3
    )


rewards_strategy = st.lists(
    st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4), min_size=1, max_size=4
).map(torch.tensor)


@settings(max_examples=50, deadline=None)
@given(rewards=rewards_strategy, scale=st.sampled_from(["group", "batch", "none"]))
def test_advantages_centre_each_group_and_ignore_a_common_shift(rewards, scale):
    advantages = group_advantages(rewards, scale)
    assert advantages.shape == rewards.shape
    assert torch.allclose(advantages.sum(-1), torch.zeros(len(rewards)), atol=2e-2)
    for shifted in (rewards.double() + 1, (rewards.double() + 1).float()):
        # Where the spread is no larger than rounding, 1e-4 in the denominator enlarges it.
        assert torch.allclose(advantages, group_advantages(shifted, scale).float(), atol=5e-2)


@settings(max_examples=50, deadline=None)
@given(rewards=rewards_strategy)
def test_group_scale_keeps_the_order_and_bounds_the_size(rewards):
    advantages = group_advantages(rewards)
    # With ddof = 1 no advantage can exceed (G - 1) / sqrt(G) = 1.5 for G = 4.
    assert advantages.abs().max() <= 1.5 + 1e-3
    differs = rewards[:, :1] > rewards[:, 1:] + 1e-3
    assert (advantages[:, :1] > advantages[:, 1:])[differs].all()


def test_equal_rewards_give_no_advantage():
    assert group_advantages(torch.full((2, 8), 0.3)).abs().max() < 1e-2
    assert group_advantages(torch.ones(2, 8)).abs().max() == 0


def test_scales_differ():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    assert group_advantages(rewards, "none").tolist() == [[-0.5, 0.5], [-2, 2]]
    batch = group_advantages(rewards, "batch")
    assert torch.allclose(batch * (rewards.std() + 1e-4), group_advantages(rewards, "none"))
    assert group_advantages(rewards)[1, 1] == pytest.approx(2 / (8**0.5 + 1e-4))


@pytest.mark.parametrize(
    ("rewards", "scale", "words"),
    [
        (torch.tensor([[1.0]]), "group", "at least 2"),
        (torch.tensor(1.0), "group", "at least 2"),
        (torch.tensor([1.0, float("nan")]), "group", "NaN"),
        (torch.tensor([1.0, 2.0]), "mean", "scale is 'mean'"),
    ],
)
def test_bad_rewards_are_named(rewards, scale, words):
    with pytest.raises(ValueError, match=words):
        group_advantages(rewards, scale)


# --- KL -----------------------------------------------------------------------


def categorical_pair():
    torch.manual_seed(3)
    logits = torch.randn(V, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(V, dtype=torch.float64).log_softmax(-1)
    return logits, ref


def test_k1_and_k3_are_unbiased_for_kl_pi_ref():
    logits, ref = categorical_pair()
    log_p = logits.log_softmax(-1).detach()
    p = log_p.exp()
    true = (p * (log_p - ref)).sum().item()
    reverse = (ref.exp() * (ref - log_p)).sum().item()
    assert abs(true - reverse) > 1e-2  # the direction is visible here
    estimates = kl_estimates(log_p, ref)
    assert (p * estimates.k1).sum().item() == pytest.approx(true, abs=1e-12)
    assert (p * estimates.k3).sum().item() == pytest.approx(true, abs=1e-12)
    assert abs((p * estimates.k2).sum().item() - true) > 1e-3
    # The reversed sign, a mistake found in the wild.
    swapped = kl_estimates(ref, log_p)
    assert (p * swapped.k1).sum().item() == pytest.approx(-true)
    assert abs((p * swapped.k3).sum().item() - true) > 1e-2


def test_gradients_of_the_estimators_are_not_what_their_values_suggest():
    logits, ref = categorical_pair()
    log_p = logits.log_softmax(-1)
    weight = log_p.detach().exp()  # samples from pi: no gradient through the sampling

    def gradient(scalar):
        return torch.autograd.grad(scalar, logits, retain_graph=True)[0]

    forward = gradient((log_p.exp() * (log_p - ref)).sum())
    reverse = gradient((ref.exp() * (ref - log_p)).sum())
    estimates = kl_estimates(log_p, ref)
    assert torch.allclose(gradient((weight * estimates.k1).sum()), torch.zeros(V).double())
    assert torch.allclose(gradient((weight * estimates.k2).sum()), forward)
    assert torch.allclose(gradient((weight * estimates.k3).sum()), reverse)
    assert not torch.allclose(forward, reverse, atol=1e-2)
    # Times the ratio pi / pi_old, with its gradient, k3 is right, on- and off-policy.
    for old in (log_p.detach(), torch.randn(V).double().log_softmax(-1)):
        corrected = (old.exp() * (log_p - old).exp() * estimates.k3).sum()
        assert torch.allclose(gradient(corrected), forward)


@settings(max_examples=50, deadline=None)
@given(a=st.floats(-20, 0), b=st.floats(-20, 0))
def test_k2_and_k3_are_never_negative(a, b):
    estimates = kl_estimates(torch.tensor(a), torch.tensor(b))
    assert estimates.k2 >= 0
    assert estimates.k3 >= -1e-6


# --- policy gradient ----------------------------------------------------------


def test_score_function_and_group_baseline_against_enumeration():
    """E[grad log pi . r] is the exact gradient, and the expected score is zero."""
    model = tiny_policy()
    rewards = (every_completion().sum(1) % 3).float()
    exact = exact_policy_gradient(model, rewards)
    log_probs = sequence_log_probs(model)
    pi = log_probs.detach().exp()
    estimate = flat_gradient((pi * rewards * log_probs).sum(), model)
    assert torch.allclose(estimate, exact, atol=1e-5)
    score = flat_gradient((pi * sequence_log_probs(model)).sum(), model)
    assert score.abs().max() < 1e-5


def test_grpo_loss_is_the_policy_gradient_in_expectation():
    """Over all groups of G = 2: -grad of the unscaled loss is (G - 1) / G of the exact gradient.

    The factor appears because a completion's own reward is part of its baseline.
    """
    model = tiny_policy()
    rewards = (every_completion().sum(1) % 3).float()
    exact = exact_policy_gradient(model, rewards)
    log_probs = sequence_log_probs(model)
    pi = log_probs.detach().exp()
    first, second = map(torch.tensor, zip(*itertools.product(range(V**LENGTH), repeat=2)))
    advantages = group_advantages(torch.stack([rewards[first], rewards[second]], dim=1), "none")
    # A whole completion as one "token" makes the sum over tokens the sum over the sequence.
    pairs = torch.stack([log_probs[first], log_probs[second]], dim=1)
    surrogate = clipped_surrogate(pairs, pairs.detach(), advantages)
    expected_loss = -(pi[first] * pi[second] * surrogate.mean(dim=1)).sum()
    assert torch.allclose(-flat_gradient(expected_loss, model), exact / 2, atol=1e-5)


# --- losses -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "has_gradient"),
    [
        (1.0, 1.0, 1.0, True),
        (1.5, 1.0, 1.3, False),  # good and already more likely: stop
        (0.5, 1.0, 0.5, True),  # good but less likely: keep pushing
        (0.5, -1.0, -0.8, False),  # bad and already less likely: stop
        (1.5, -1.0, -1.5, True),  # bad but more likely: keep pushing
    ],
)
def test_clipping_is_one_sided(ratio, advantage, objective, has_gradient):
    log_prob = torch.tensor(ratio).log().requires_grad_()
    value = clipped_surrogate(log_prob, torch.tensor(0.0), torch.tensor(advantage), 0.2, 0.3)
    value.backward()
    assert value.item() == pytest.approx(objective)
    assert (log_prob.grad.item() != 0) == has_gradient


def loss_inputs(batch: int = 4, length: int = 6):
    torch.manual_seed(1)
    log_probs = -torch.rand(batch, length) * 2
    old = log_probs + 0.5 * torch.randn(batch, length)
    ref = log_probs + 0.5 * torch.randn(batch, length)
    advantages = torch.tensor([1.2, -0.7, 0.3, -0.8])
    mask = (torch.arange(length) < torch.tensor([[6], [2], [4], [1]])).float()
    return log_probs, old, ref, advantages, mask


def test_reductions_divide_by_what_they_say():
    log_probs, old, ref, advantages, mask = loss_inputs()
    token_loss = -clipped_surrogate(log_probs, old, advantages[:, None])
    kl = (log_probs - old).exp() * kl_estimates(log_probs, ref).k3
    token_loss = (token_loss + 0.1 * kl) * mask
    lengths = mask.sum(1)
    expected = {
        "grpo": (token_loss.sum(1) / lengths).mean(),
        "bnpo": token_loss.sum() / 13,
        "dr_grpo": token_loss.sum() / (4 * 10),
        "dapo": token_loss.sum() / 50,
    }
    assert len({round(v.item(), 6) for v in expected.values()}) == 4
    for reduction, value in expected.items():
        actual = grpo_loss(
            log_probs,
            old,
            advantages,
            mask,
            ref_log_probs=ref,
            beta=0.1,
            reduction=reduction,
            max_length=10,
            total_tokens=50,
        )
        assert actual.item() == pytest.approx(value.item(), rel=1e-5), reduction


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("reduction", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_values_on_padding_do_not_matter(importance, reduction):
    log_probs, old, ref, advantages, mask = loss_inputs()

    def loss(noise):
        filled = [torch.where(mask.bool(), x, noise) for x in (log_probs, old, ref)]
        return grpo_loss(
            filled[0],
            filled[1] * 1.5,
            advantages,
            mask,
            ref_log_probs=filled[2],
            beta=0.1,
            importance=importance,
            reduction=reduction,
            max_length=8,
        ).item()

    assert loss(torch.tensor(-0.1)) == pytest.approx(loss(torch.tensor(-3.0)), rel=1e-5)


def test_dapo_micro_batches_add_up_and_bnpo_ones_do_not():
    log_probs, old, _, advantages, mask = loss_inputs()

    def total(reduction, **options):
        halves = [
            grpo_loss(log_probs[s], old[s], advantages[s], mask[s], reduction=reduction, **options)
            for s in (slice(0, 2), slice(2, 4))
        ]
        return sum(halves).item()

    whole = grpo_loss(log_probs, old, advantages, mask, reduction="dapo").item()
    assert total("dapo", total_tokens=mask.sum()) == pytest.approx(whole, rel=1e-5)
    assert abs(total("bnpo") / 2 - whole) > 1e-3


def test_sequence_importance_is_one_geometric_mean_ratio():
    log_probs, old, _, advantages, mask = loss_inputs()
    lengths = mask.sum(1)
    ratio = (((log_probs - old) * mask).sum(1) / lengths).exp()
    objective = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    actual = grpo_loss(log_probs, old, advantages, mask, importance="sequence", reduction="grpo")
    assert actual.item() == pytest.approx(-objective.mean().item(), rel=1e-5)


def test_advantages_may_differ_by_token_and_an_empty_sequence_is_harmless():
    log_probs, old, _, advantages, mask = loss_inputs()
    by_token = advantages[:, None].expand_as(log_probs)
    assert grpo_loss(log_probs, old, by_token, mask) == grpo_loss(log_probs, old, advantages, mask)
    for reduction in ("grpo", "bnpo", "dapo"):
        assert grpo_loss(log_probs, old, advantages, 0 * mask, reduction=reduction) == 0
    assert sequence_mean(log_probs, 0 * mask).tolist() == [[0.0]] * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.1}, "ref_log_probs is missing"),
        ({"importance": "word"}, "importance is 'word'"),
        ({"reduction": "mean"}, "reduction is 'mean'"),
        ({"reduction": "dr_grpo"}, "max_length is None"),
        ({"reduction": "dr_grpo", "max_length": -1}, "max_length is -1"),
    ],
)
def test_bad_options_are_named(options, words):
    log_probs, old, _, advantages, mask = loss_inputs()
    with pytest.raises(ValueError, match=words):
        grpo_loss(log_probs, old, advantages, mask, **options)


def test_gather_log_probs_is_a_log_softmax():
    logits, ids = torch.randn(3, 4, V), torch.randint(0, V, (3, 4))
    expected = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert torch.allclose(gather_log_probs(logits, ids), expected, atol=1e-6)
