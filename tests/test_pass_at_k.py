"""pass@k and majority votes, against enumeration of all subsets and all votes."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from command_line import invoke
from scipy import stats

from cpugrpo_edu.data import Episode, Group, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.evaluations import (
    SampledEvaluation,
    load_evaluation,
    load_sampled_evaluation,
    save_evaluation,
)
from cpugrpo_edu.record.pass_at_k import ks, pass_at_k, sampled_table
from cpugrpo_edu.record.stats import wilson_interval
from cpugrpo_edu.run.vote import evaluate_samples, majority
from cpugrpo_edu.sample import Sampling
from cpugrpo_edu.tasks import held_out_problems
from cpugrpo_edu.tasks.custom import Custom


def evaluation(correct, majority, difficulties=None, **changes):
    n = len(correct)
    same = [[1] * len(row) for row in correct]
    fields = dict(
        label="m", seed=0, temperature=0.8, item_ids=[str(i) for i in range(n)],
        domains=["lists"] * n, difficulties=difficulties or ["basic"] * n, correct=correct,
        majority=majority, tokens=same, finished=same, completions=[["x"] * 2] * n, seconds=1.0,
    )  # fmt: skip
    return SampledEvaluation(**(fields | changes))


def vote(answer, *texts, answer_format="hash"):
    problem = Problem("p", "custom", "basic", "?", answer, task=Custom(answer_format=answer_format))
    return majority(problem, texts)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_pass_at_k_is_unbiased_and_the_plug_in_estimate_is_not(p):
    """Expectations over the binomial number of right completions, by enumeration."""
    n, k = 8, 4
    mass = stats.binom.pmf(np.arange(n + 1), n, p)
    truth = 1 - (1 - p) ** k
    assert mass @ [pass_at_k(n, c, k) for c in range(n + 1)] == pytest.approx(truth, abs=1e-12)
    assert mass @ [1 - (1 - c / n) ** k for c in range(n + 1)] < truth - 0.01


@pytest.mark.parametrize("wrong", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses(wrong):
    with pytest.raises(ValueError, match="k in 1..n"):
        pass_at_k(*wrong)


def test_the_interval_of_a_mean_is_on_the_safe_side():
    """Coverage of the mean pass@2 over 30 problems, each with its own chance of being solved."""
    rng = np.random.default_rng(0)
    chance = rng.beta(0.5, 1.5, 30)
    truth, draws = float(np.mean(1 - (1 - chance) ** 2)), 2000
    held = 0
    for right in rng.binomial(4, chance, (draws, 30)):
        found = wilson_interval(math.fsum(pass_at_k(4, int(c), 2) for c in right), 30)
        held += found.low <= truth <= found.high
    assert held / draws > 0.95


def test_which_k_are_shown():
    assert ks(1) == [1] and ks(6) == [1, 2, 4, 6] and ks(8) == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("texts", "place"),
    [
        (["#### 1", "#### 2", "#### 2.0", "no"], 1),  # one number, two spellings
        (["#### 2", "#### 1", "#### 1", "#### 2"], 0),  # as frequent: the first drawn
        (["no", "#### 3", "no", "no"], 1),  # silence is no vote
        (["no", "nor this"], None),
        (["#### 60 min", "#### 60 h", "#### 60 h"], 1),  # two answers, not one
        (["#### a, b", "#### [A b]", "#### c"], 0),
    ],
)
def test_majority(texts, place):
    assert vote("1", *texts) == place


def test_the_majority_reads_answers_in_the_format_of_the_problem():
    texts = [r"\boxed{5} and #### 6", r"\boxed{7} and #### 6", r"so \boxed{7}"]
    assert vote("7", *texts) == 0 and vote("7", *texts, answer_format="boxed") == 1


def test_the_table_counts_problems(tmp_path):
    correct = [[True, False], [False, False], [True, True]]
    one = evaluation(correct, [1, None, 0], ["basic", "basic", "advanced"])
    assert one.majority_correct == [False, False, True]
    table = sampled_table(one)
    whole = table["overall"]
    assert (table["samples"], whole["n"]) == (2, 3)
    assert whole["pass_at_k"]["1"]["estimate"] == pytest.approx(1 / 2)
    assert whole["pass_at_k"]["2"]["estimate"] == pytest.approx(2 / 3)
    assert whole["majority"]["low"] == wilson_interval(1, 3).low
    assert table["by_difficulty"]["basic"]["pass_at_k"]["1"]["estimate"] == pytest.approx(1 / 4)
    assert list(table["by_difficulty"]) == ["basic", "advanced"]
    path = save_evaluation(one, tmp_path / "items.json.gz")
    assert load_sampled_evaluation(path) == one
    with pytest.raises(UserError, match="cannot read an evaluation"):
        load_evaluation(path)


def test_every_completion_is_judged(tiny_policy, monkeypatch):
    problems = held_out_problems(1, ["arithmetic"])[:2]

    def answer(policy, asked, n, sampling, on_done):
        said = [[f"#### {p.answer}", "#### no", f"#### {p.answer}"] for p in asked]
        return [
            Group([1], [Episode([1] * (i + 1), text=text) for i, text in enumerate(row)], p)
            for p, row in zip(asked, said, strict=True)
        ]

    monkeypatch.setattr("cpugrpo_edu.run.vote.rollout", answer)
    found = evaluate_samples(tiny_policy, problems, "m", 3, Sampling(8, 0.5, seed=4))
    assert found.correct == [[True, False, True]] * 2 and found.majority == [0, 0]
    assert found.tokens == [[1, 2, 3]] * 2 and (found.seed, found.temperature, found.n) == (
        4,
        0.5,
        3,
    )
    assert found.item_ids == [p.id for p in problems]
    with pytest.raises(UserError, match="no problems"):
        evaluate_samples(tiny_policy, [], "m", 3, Sampling(8, 0.5))


def test_the_command(tiny_folder, tmp_path):
    kept = tmp_path / "items.json.gz"
    common = ("evaluate", "--model", tiny_folder, "--per-cell", 1, "--max-completion", 3, "--quiet")
    several = (*common, "--samples", 3, "--temperature", 0.8)
    code, out, err = invoke(*several, "--json", "--output", kept)
    found = json.loads(out)
    assert code == 0, err
    assert found["samples"] == 3 and found["overall"]["n"] == 12
    assert list(found["overall"]["pass_at_k"]) == ["1", "2", "3"]
    assert load_sampled_evaluation(kept).n == 3
    code, out, _ = invoke(*several)
    assert code == 0 and "pass@2" in out and "majority of 3" in out and "(0.0–24.2)" in out
    code, out, err = invoke(*common, "--samples", 2)
    assert code == 2 and "2 greedy completions of a problem are all the same" in err
    assert "--samples is 0; give at least 1" in invoke(*common, "--samples", 0)[2]
