"""The chapter on variants: every loss, weight and estimate against an independent calculation."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch

from cpugrpo_edu.notebook.variant_plots import plot_lines, plot_races, plot_weighted
from cpugrpo_edu.notebook.variants import (
    Critic,
    Race,
    aim,
    answers,
    at_cost,
    attention,
    batch_attention,
    centred,
    cispo_loss,
    clip_cov,
    coin_drift,
    contrast,
    corrected,
    entropy_bonus,
    essays,
    expected_update,
    gae,
    language,
    leave_one_out,
    moments,
    passwords,
    pays,
    policy_gradient,
    prefix_values,
    skill_race,
    soft_overlong,
    step_advantages,
    steps_to,
    token_scores,
)
from cpugrpo_edu.policy import group_advantages, grpo_loss

MIXED = language([[0], [1, 0], [1, 1, 0], [1, 1, 1]])
"""Completions of one to three words."""


def policy(world, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(world.start.shape, generator=generator, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


# --- languages ----------------------------------------------------------------------------------


def test_probabilities_are_the_products_along_the_tree():
    theta = policy(MIXED)
    first, second, third = theta.softmax(-1)
    expected = [first[0], first[1] * second[0], first[1] * second[1] * third[0]]
    close(MIXED.chances(theta), torch.stack([*expected, first[1] * second[1] * third[1]]))
    assert MIXED.mask.sum(1).tolist() == [1, 2, 3, 3]
    p = MIXED.chances(theta)
    close(MIXED.entropy(theta), -(p * p.log()).sum())


@pytest.mark.parametrize("world", [MIXED, answers(4), passwords(3, 3), essays(5)])
def test_every_language_is_a_distribution(world):
    p = world.chances(torch.stack([policy(world, seed) for seed in range(2)]))
    close(p.sum(-1), torch.ones(2, dtype=torch.float64))


def test_words_that_cannot_follow_get_no_chance():
    world = essays(3)
    assert world.allowed[0].tolist() == [True, True, False, False]
    assert world.mask.sum(1).tolist() == [2, 3, 3, 2, 3, 3]


@pytest.mark.parametrize("wrong", [[[]], [[0], [0]], [[0], [0, 1]]])
def test_a_language_that_cannot_be_told_apart_is_refused(wrong):
    with pytest.raises(ValueError, match="beginning of another"):
        language(wrong)


# --- exact gradients ----------------------------------------------------------------------------


def test_scores_sum_to_the_exact_gradient():
    theta, r = policy(MIXED), torch.tensor([0.3, 1.0, 0.0, 0.7]).double()
    estimates = token_scores(MIXED, theta).sum(1) * r[:, None, None]
    mean, variance = moments(MIXED.chances(theta), estimates)
    close(mean, policy_gradient(MIXED, theta, r))
    spread = (estimates - mean).square().sum((1, 2))
    assert variance == pytest.approx(float(MIXED.chances(theta) @ spread))


def test_values_are_the_mean_reward_below_each_prefix():
    theta, r = policy(MIXED), torch.tensor([0.3, 1.0, 0.0, 0.7]).double()
    p = theta.softmax(-1)
    third = p[2, 0] * r[2] + p[2, 1] * r[3]
    second = p[1, 0] * r[1] + p[1, 1] * third
    close(
        prefix_values(MIXED, theta, r),
        torch.stack([p[0, 0] * r[0] + p[0, 1] * second, second, third]),
    )


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_gae_is_the_discounted_sum_of_surprises(lam):
    r, v = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.2, 0.4, 0.9])
    delta = [0.0 + 0.4 - 0.2, 0.5 + 0.9 - 0.4, 1.0 - 0.9]
    expected = [sum(lam ** (j - t) * delta[j] for j in range(t, 3)) for t in range(3)]
    torch.testing.assert_close(gae(r, v, lam), torch.tensor(expected))


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_an_exact_critic_makes_every_gae_unbiased(lam):
    world = passwords(3, 3)
    theta, r = policy(world), torch.linspace(0, 1, 27).double()
    values = prefix_values(world, theta, r)[world.prefixes]
    paid = torch.zeros(27, 3).double()
    paid[:, -1] = r
    estimates = (gae(paid, values, lam)[..., None, None] * token_scores(world, theta)).sum(1)
    close(moments(world.chances(theta), estimates)[0], policy_gradient(world, theta, r))


def test_a_wrong_critic_is_forgiven_only_at_lambda_one():
    world = passwords(3, 3)
    theta, r = policy(world), torch.linspace(0, 1, 27).double()
    paid = torch.zeros(27, 3).double()
    paid[:, -1] = r
    guess = torch.rand(13, generator=torch.Generator().manual_seed(1)).double()[world.prefixes]
    exact = policy_gradient(world, theta, r)
    bias = {
        lam: (
            moments(
                world.chances(theta),
                (gae(paid, guess, lam)[..., None, None] * token_scores(world, theta)).sum(1),
            )[0]
            - exact
        ).norm()
        for lam in (0.5, 1.0)
    }
    assert bias[1.0] < 1e-9 < bias[0.5]


# --- the variants' expectations -------------------------------------------------------------------


def test_leave_one_out_has_the_exact_gradient_and_the_mean_a_shorter_one():
    theta, r = policy(MIXED), torch.tensor([1.0, 0.0, 1.0, 0.0]).double()
    loss = partial(grpo_loss, reduction="dr_grpo", max_length=1)
    exact = policy_gradient(MIXED, theta, r)
    close(expected_update(MIXED, theta, r, loss, leave_one_out, 3), exact)
    close(expected_update(MIXED, theta, r, loss, centred, 3), exact * 2 / 3)


def test_the_divisor_of_grpo_adds_a_push_on_lengths_and_that_of_dr_grpo_none():
    world = essays(4)
    theta = world.start.clone()
    theta[0, 0] = -1.0
    right = torch.tensor([1.0] * 4 + [0.0] * 4).double()
    p, length = world.chances(theta), world.mask.sum(1)
    wrong = p * (right == 0)
    mean = (wrong @ length) / wrong.sum()
    scores = token_scores(world, theta).sum(1)
    slope = torch.einsum("n,npv->pv", wrong * (length - mean) / wrong.sum(), scores)
    moved = {
        how: float(
            (
                expected_update(
                    world, theta, right, partial(grpo_loss, reduction=how, max_length=4), centred, 2
                )
                * slope
            ).sum()
        )
        for how in ("grpo", "dr_grpo")
    }
    assert moved["grpo"] > 1e-3 and abs(moved["dr_grpo"]) < 1e-12


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_attention_is_the_length_of_the_expected_group_gradient(p):
    world, r = answers(2), torch.tensor([1.0, 0.0]).double()
    theta = torch.tensor([[p, 1 - p]], dtype=torch.float64).log()
    exact = policy_gradient(world, theta, r)
    for grade in (leave_one_out, centred, group_advantages):
        update = expected_update(world, theta, r, grpo_loss, grade, 4)
        close(update, attention(p, 4, grade) * exact)
    assert attention(p, 4, leave_one_out) == pytest.approx(1)


def test_attention_of_large_groups_is_one_over_the_standard_deviation():
    assert attention(0.3, 2000, group_advantages) == pytest.approx(0.21**-0.5, rel=2e-3)


def test_batch_attention_by_sampling():
    def whole(r):
        return (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-4)

    chances = torch.tensor([0.1, 0.3, 0.8]).double()
    generator = torch.Generator().manual_seed(0)
    r = torch.bernoulli(chances.expand(200_000, 3), generator=generator)
    score = (r - chances) / (chances * (1 - chances))
    sampled = (whole(r) * score).mean(0)
    torch.testing.assert_close(batch_attention(chances.tolist(), whole), sampled, atol=0.03, rtol=0)
    close(batch_attention(chances.tolist(), lambda r: r), torch.ones(3).double())


def test_each_ratio_alone_is_the_weight_of_a_mixed_policy():
    world = passwords(3, 3)
    old, new = policy(world), policy(world, 1)
    f = torch.rand(27, generator=torch.Generator().manual_seed(2)).double()
    log_old, log_new = world.log_probs(old), world.log_probs(new)
    ratio, p_old = (log_new - log_old).exp(), world.chances(old)
    close(p_old @ (ratio.prod(1) * f), world.chances(new) @ f)
    for t in range(3):
        mixed = torch.stack([log_new[:, s] if s == t else log_old[:, s] for s in range(3)]).sum(0)
        close(p_old @ (ratio[:, t] * f), mixed.exp() @ f)


def test_only_the_weight_of_the_whole_sequence_corrects_a_stale_policy():
    world = passwords(3, 2)
    old, new = policy(world), policy(world, 1)
    r, p = torch.linspace(0, 1, 9).double(), world.chances(old)
    found = {}
    for level in ("none", "token", "sequence"):
        loss = corrected(level)
        total = torch.zeros_like(new)
        for i in range(9):
            theta = new.clone().requires_grad_()
            value = loss(
                world.log_probs(theta)[[i]], world.log_probs(old)[[i]], r[[i]], world.mask[[i]]
            )
            total -= p[i] * torch.autograd.grad(value, theta)[0] * 2  # two tokens, undone
        found[level] = (total - policy_gradient(world, new, r)).norm()
    assert found["sequence"] < 1e-9
    assert min(found["none"], found["token"]) > 1e-3


def test_cispo_keeps_the_gradient_that_the_clip_drops():
    old, mask = torch.zeros(1, 2), torch.ones(1, 2)
    new = torch.tensor([[0.1, 1.2]], requires_grad=True)  # ratios 1.1 and 3.3
    A = torch.ones(1)
    clipped = torch.autograd.grad(grpo_loss(new, old, A, mask), new)[0]
    kept = torch.autograd.grad(cispo_loss(new, old, A, mask, most=2.0), new)[0]
    assert clipped[0, 1] == 0
    torch.testing.assert_close(kept, -torch.tensor([[math.exp(0.1), 2.0]]) / 2)


def test_the_entropy_bonus_climbs_the_entropy():
    theta = policy(MIXED)
    zero = torch.zeros(4).double()
    length = MIXED.mask.sum(1)
    p = MIXED.chances(theta)
    total = torch.zeros_like(theta)
    for i in range(4):
        x = theta.clone().requires_grad_()
        rows = MIXED.log_probs(x)[[i]], MIXED.log_probs(theta)[[i]]
        value = entropy_bonus(0.5)(*rows, zero[[i]], MIXED.mask[[i]])
        total -= p[i] * length[i] * torch.autograd.grad(value, x)[0]
    exact = torch.func.grad(MIXED.entropy)(theta)
    close(total, 0.5 * exact)


def test_clip_cov_drops_the_common_and_good():
    old = torch.tensor([[-0.1], [-0.1], [-3.0], [-3.0]])
    new = old.clone().requires_grad_()
    A = torch.tensor([1.0, -1.0, 1.0, -1.0])
    g = torch.autograd.grad(clip_cov(0.5)(new, old, A, torch.ones(4, 1)), new)[0]
    assert (g[:, 0] != 0).tolist() == [False, True, True, False]


def test_overlong_penalty_has_the_three_parts_of_the_paper():
    lengths = torch.tensor([5.0, 8.0, 10.0, 12.0, 15.0])
    assert soft_overlong(lengths, 12, 4).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_steps_are_compared_with_the_group_at_the_same_step():
    r = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    assert step_advantages(r).tolist() == [[0.0, -0.0, 0.5], [0.0, 0.0, -0.5]]


def test_coin_drift_by_brute_force():
    p, size = 0.7, 3
    world = answers(2)
    start = torch.tensor([[p, 1 - p]], dtype=torch.float64).log()
    drift = 0.0
    for index in itertools.product((0, 1), repeat=size):
        for flips in itertools.product((0.0, 1.0), repeat=size):
            A = group_advantages(torch.tensor(flips).double())
            theta = start.clone()
            for _ in range(4):
                x = theta.clone().requires_grad_()
                rows = world.log_probs(x)[list(index)], world.log_probs(start)[list(index)]
                value = grpo_loss(*rows, A, torch.ones(size, 1))
                theta = theta - torch.autograd.grad(value, x)[0]
            chance = math.prod(p if i == 0 else 1 - p for i in index) / 2**size
            drift += chance * float(world.chances(theta)[0] - p)
    assert coin_drift(p, grpo_loss, size, 4, 1.0)[0] == pytest.approx(drift, abs=1e-6)
    assert coin_drift(0.5, grpo_loss)[0] == pytest.approx(0, abs=1e-9)


# --- races ----------------------------------------------------------------------------------------


def small_race(**options):
    world = answers(3)
    watch = {"good": lambda theta: world.chances(theta)[..., 0]}
    settings = {"steps": 20, "rate": 0.5, "runs": 6, "watch": watch} | options
    return Race(world, pays([1.0, 0.0, 0.0]), world.start, **settings)


def test_a_race_learns_and_is_repeatable():
    first, again = small_race().run()["good"], small_race().run()["good"]
    assert first.shape == (21, 6) and torch.equal(first, again)
    assert first[0].tolist() == pytest.approx([1 / 3] * 6) and first[-1].min() > 0.8
    assert not torch.equal(first, small_race(seed=1).run()["good"])


def test_a_step_of_a_race_is_a_step_of_gradient_descent():
    race = small_race(steps=1, runs=1)
    index = torch.multinomial(
        race.world.chances(race.start)[None], 8, True, generator=torch.Generator().manual_seed(0)
    )[0]
    theta = race.start.clone().requires_grad_()
    A = group_advantages((index == 0).double())
    rows = race.world.log_probs(theta)[index], race.world.log_probs(race.start)[index]
    grad = torch.autograd.grad(grpo_loss(*rows, A, torch.ones(8, 1)), theta)[0]
    close(race.run()["good"][1, 0], race.world.chances(race.start - 0.5 * grad)[0])


def test_a_lag_delays_what_the_samples_know():
    fresh, stale = small_race().run(corrected("none")), small_race(lag=5).run(corrected("none"))
    assert torch.equal(fresh["good"][1], stale["good"][1])
    assert not torch.equal(fresh["good"][2], stale["good"][2])


def test_the_critic_learns_the_value_of_each_prefix():
    world = passwords(2, 2)
    r = torch.tensor([1.0, 0.0, 0.0, 0.0]).double()
    race = Race(world, pays(r), world.start, runs=2)
    critic = Critic(race, lam=1.0, rate=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        index = torch.randint(4, (2, 8), generator=generator)
        advantages = critic(index, r[index])
    expected = prefix_values(world, world.start, r).expand(2, -1)
    torch.testing.assert_close(critic.values, expected, atol=0.12, rtol=0)
    assert advantages.shape == (2, 8, 2)


def test_dynamic_sampling_spends_more_and_learns_more_a_step():
    plain, dynamic = (skill_race(kind, steps=10, runs=4) for kind in (False, True))
    assert (plain[1][-1] == 10 * 16 * 8).all() and (dynamic[1][-1] > plain[1][-1]).all()
    assert dynamic[0][-1].mean() > plain[0][-1].mean()


def test_without_a_baseline_one_prompt_is_aimed_at_exactly_or_not_at_all():
    hit = aim([0.1], lambda r: r, group=4, options=5, batches=2000, runs=4)
    assert hit.mean().item() == pytest.approx(1 - 0.9**4, abs=0.02)
    assert torch.equal(aim([0.1], lambda r: 3 * r, runs=2), aim([0.1], lambda r: r, runs=2))


def test_large_groups_aim_at_the_exact_gradient_unless_divided_by_their_deviation():
    spread = [0.05, 0.5, 0.95]
    straight = aim(spread, leave_one_out, group=3000, options=3, batches=2, runs=2)
    bent = aim(spread, group_advantages, group=3000, options=3, batches=2, runs=2)
    assert straight.min() > 0.99 > bent.max()


def test_readings_of_a_race():
    values, spent = (
        torch.tensor([[0.1, 0.2], [0.6, 0.3], [0.9, 0.4]]),
        torch.tensor([[0, 0], [10, 30], [20, 60]]),
    )
    torch.testing.assert_close(at_cost(values, spent, 20), torch.tensor([0.9, 0.2]))
    assert steps_to(values, 0.5).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("shift", "words"), [(1.0, "higher"), (-1.0, "lower"), (0.0, "no difference is shown")]
)
def test_a_contrast_says_what_its_interval_allows(shift, words):
    noise = torch.tensor([-0.1, 0.0, 0.1])
    assert contrast(noise + shift, torch.zeros(3)).endswith(words)


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_say_their_numbers():
    lines = {"a": torch.tensor([[0.0, 0.0], [1.0, 0.5]])}
    assert "Left, a: from 0.00 to 0.75" in plot_races({"Left": lines}, ["y"]).alt
    assert "W, b: 2 at 0, 3 at 1" in plot_lines([0, 1], {"W": {"b": [2.0, 3.0]}}, "x", ["y"]).alt
    assert "all 0.2500" in plot_weighted({"all": 0.25}, 0.5, 0.25, "A title").alt
