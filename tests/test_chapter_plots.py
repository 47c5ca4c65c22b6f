"""The figures of chapters 0 to 3 say in words what they draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.notebook import gradient_plots, grpo_plots, policy_plots, setup_plots


def test_groups_and_parts():
    right = np.array([[True, False], [False, False], [True, True]])
    plot = setup_plots.groups(right, 3)
    assert plot.alt == "After 3 training steps 3 of 6 are right; 1 of 3 groups hold both kinds."
    sizes = setup_plots.part_sizes(model := load_policy("bundled").model)
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())
    half = {"embedding": 1, "attention": 1, "MLP": 2, "norms": 0}
    assert "MLP 50 %" in setup_plots.shares({"a": half, "b": half}).alt


def test_probabilities_of_words():
    logits = torch.tensor([0.0, 0.0, float("-inf")])
    alt = policy_plots.logits_and_probabilities(["a", "b", "c"], logits.clamp(min=-99)).alt
    assert "Probabilities: a 0.50, b 0.50, c 0.00." in alt
    alt = policy_plots.likeliest(["a", "b", "c"], torch.tensor([0.2, 0.5, 0.3]), most=2).alt
    assert alt == "Bars of probabilities: b 0.500, c 0.300."
    assert "right 1.00, wrong 0.60" in policy_plots.sums({"right": 1.0, "wrong": 0.6}).alt
    at = policy_plots.at_temperature(["a", "b"], torch.tensor([1.0, 0.0]))
    assert "temperature 0.01: a 1.00, b 0.00" in at(0.01).alt
    assert "END included" in policy_plots.padded_batch().alt


def test_probabilities_of_completions():
    whole = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    tokens = torch.log(torch.tensor([0.5, 0.4, 0.1]))
    alt = policy_plots.two_temperatures(whole, tokens, torch.tensor([1, 2, 3])).alt
    assert "0 of 1 completions of 1 token, 1 of 1 completions of 2 tokens" in alt
    steady = {"a": torch.full((20,), 2.0), "b": torch.full((20,), 3.0)}
    assert (
        "exact 2.50 nats: a ends at 2.00, b ends at 3.00"
        in policy_plots.running_means(steady, 2.5).alt
    )
    pairs = {"bare": (torch.tensor([1.5, 2.0]), torch.tensor([3.0, 1.2]))}
    assert "bare: 1 of 2 above the diagonal" in policy_plots.perplexities(pairs).alt
    exact = torch.tensor([0.5, 0.9])
    alt = policy_plots.exact_and_sampled([0, 1], exact, [50, 10], 100).alt
    assert "1 of 2 intervals cover the bar" in alt


def test_a_model_at_work():
    policy = load_policy("bundled")
    ids = policy.tokenizer.encode("1+1=2\n")
    logits = torch.zeros(len(ids), len(policy.tokenizer))
    logits[1, ids[1]] = 9.0
    draw = policy_plots.next_tokens(policy.tokenizer, logits, ids)
    assert "The solution goes on with +." in draw(1).alt
    assert "The solution goes on with ↵." in draw(5).alt
    assert policy_plots.readable("$") == r"\$"
    pieces = [policy.tokenizer.decode([i]) for i in ids]
    assert "↵ 1.00" in policy_plots.surprise(pieces, torch.ones(len(ids))).alt


def test_gradients_and_their_noise():
    g = torch.tensor([0.1, -0.1])
    assert (
        "A +0.100, B -0.100" in gradient_plots.rewards_and_gradient(["A", "B"], g.abs(), 0.1, g).alt
    )
    assert "A +0.200" in gradient_plots.estimate_and_exact(["A", "B"], g, 2 * g, g.abs(), 9).alt
    many = torch.zeros(4, 5)
    assert "baseline 0.5" in gradient_plots.cloud(many, many[0], 0.5, 0.1).alt
    marks = {"none": (0.0, 0.2), "J": (0.3, 0.1), "best": (0.4, 0.05)}
    assert "best 0.050" in gradient_plots.variance(torch.arange(3), [1, 2, 3], marks).alt
    runs = {(b, s): torch.full((3, 5), 0.5).double() for b in (0, 10) for s in (False, True)}
    assert "bonus 10, no baseline: mean 0.50" in gradient_plots.bonus(runs).alt
    assert "GRPO from 2.0 to 1.0" in gradient_plots.noise([2, 3], {"GRPO": [2.0, 1.0]}).alt
    p = torch.tensor([0.1, 0.9])
    assert "1.00 to 1.00" in gradient_plots.weight(p, 8, torch.ones(2), 2 * torch.ones(2)).alt
    kinds = ("none", "leave one out", "GRPO")
    found = {kind: [torch.tensor([0.2, 0.2]), torch.tensor([0.8, 0.8])] for kind in kinds}
    assert "GRPO from 0.20 to 0.80" in gradient_plots.cosines([1, 2], found).alt
    assert "exact 0.90" in gradient_plots.climbs({"exact": [[0.1, 0.9]]}).alt


def test_the_parts_of_grpo():
    two = torch.tensor([2.0, 1.0])
    assert "group of 3: right ones fall from 2.00" in grpo_plots.advantages([1, 2], two, -two).alt
    lines = {name: [1.0, 0.5] for name in ("token ratios", "product", "root (GSPO)")}
    assert "product: cosine 0.500" in grpo_plots.ratios([0, 1], lines, lines).alt
    d = torch.linspace(-1, 1, 3)
    same = {name: torch.tensor([0.1, 0.3]) for name in ("k1", "k2", "k3")}
    alt = grpo_plots.kl_estimators(d, dict.fromkeys(same, d), same, 0.2).alt
    assert "means of 2 samples, k1 0.200" in alt and "exact 0.200" in alt
    token = {how: torch.tensor([0.5, 0.25]) for how in ("grpo", "dapo", "dr_grpo")}
    assert "dapo 0.5000, 0.2500" in grpo_plots.pushes(torch.tensor([1, 2]), token).alt


@pytest.mark.parametrize(("at", "said"), [(1.5, "no gradient, for"), (0.7, "gradient +1, for")])
def test_the_clip_is_one_sided(at, said):
    def surrogate(ratio, A, eps):
        return torch.min(ratio * A, ratio.clamp(1 - eps, 1 + eps) * A)

    assert said in grpo_plots.clip(surrogate)(at).alt


def test_learning():
    exact = {5: [0.1, 0.2], 10: [0.8, 0.9]}
    alt = grpo_plots.learning([0.1, 0.9], [0.1, 0.5, 0.0], exact).alt
    assert "trained on from 0.10 to 0.80, held out from 0.20 to 0.90" in alt
    chances = torch.full((10, 10), 0.25)
    assert "its mean is 0.25" in grpo_plots.grid(chances, torch.tensor([[1, 2]]), 5).alt
    runs = {"clip": torch.full((2, 9), 0.5), "no clip": torch.full((2, 9), 0.25)}
    assert "no clip: mean from 0.25 to 0.25" in grpo_plots.with_and_without_clip(runs).alt
    row = {"step": 1, "reward": 0.5, "completion_length": 9.0, "frac_zero_std": 0.0}
    assert "completions (tokens) from 9.00 to 9.00" in grpo_plots.history([row, row]).alt
