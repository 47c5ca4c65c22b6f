"""Figures of chapters 4, 5, 6 and 16: their words and marks say what the numbers say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpugrpo_edu.data import Episode
from cpugrpo_edu.notebook import evaluation_plots, reward_plots, rollout_plots, scaling_plots
from cpugrpo_edu.notebook.diary import Diary, equations_on, right_on, tokens_of
from cpugrpo_edu.record.stats import wilson_interval
from cpugrpo_edu.rewards import total_reward
from cpugrpo_edu.tasks import make_problems

# Chapter 4


def last_word(text, reference):
    return text.split()[-1] == reference


def everything(text, reference):
    return True


CASES = [("it is 4", "4", True), ("4 it is", "4", True), ("4 or 5", "5", False)]


def test_verdicts_tell_missed_from_paid():
    table = reward_plots.verdicts(CASES, [last_word, everything])
    assert table.tolist() == [[0, 0], [1, 0], [2, 2]]
    plot = reward_plots.verdict_table(CASES, [last_word, everything])
    assert "last_word misses 1 and pays 1; everything misses 0 and pays 1" in plot.alt
    words = [text.get_text() for text in plot.figure.axes[0].texts]
    assert words == ["ok", "ok", "missed", "ok", "PAID", "PAID"]


def test_a_loophole_is_described_by_its_path():
    path = np.array([[0.5, 0.2, 0.2, 0.1], [0.6, 0.2, 0.15, 0.05], [0.1, 0.1, 0.1, 0.7]])
    plot = reward_plots.loophole_plot(path, [1, 0, 0, 0.6], [1, 0, 0, 0], "abcd")
    assert "is paid 0.60" in plot.alt
    assert "starts at 0.1, has 0.05 at its lowest and ends at 0.7" in plot.alt
    assert "starts at 0.50, has 0.60 at its highest and ends at 0.10" in plot.alt
    title = plot.figure.axes[0].get_title(loc="left")
    assert title == "In the end the pay is 0.52, the truth 0.10"


def test_rewards_of_texts_say_who_earns_most():
    scores = np.array([[0.0, 1.0], [0.5, 0.0]])
    plot = reward_plots.score_table(scores, ["good", "bad"], ["naive", "strict"])
    assert "naive pays 'bad' most (0.50); strict pays 'good' most (1.00)" in plot.alt
    parts = {"a": [1, 0, 0.5], "b": [0, 0.2, 0.7], "c": [0, 0, 0]}
    plot = reward_plots.stacked_rewards(parts, ["x", "y", "z"])
    assert plot.alt.endswith("highest first: z 1.20, x 1.00, y 0.20.")
    assert "answer 0.50" in reward_plots.silent_plot({"answer": 0.5}, 24).alt


@pytest.fixture
def diary():
    problem = make_problems("arithmetic", "basic", "train", 1)[0]
    found = Diary()
    for right in (0, 1, 2):
        texts = [f"#### {problem.answer}"] * right + ["1+1=2\n2-5=-3\n2+2=5\n#### x"] * (2 - right)
        for text in texts:
            episode = Episode(text=text, completion_ids=list(range(len(text))))
            assert total_reward([found.observer], problem, episode) == 0
        found.turn_page()
    return found


def test_a_diary_keeps_every_completion_of_every_step(diary):
    assert [len(page) for page in diary.pages] == [2, 2, 2]
    assert [right_on(page).tolist() for page in diary.pages] == [
        [False, False],
        [True, False],
        [True, True],
    ]
    assert len(diary.written()) == 6 and len(diary.written(slice(1, None))) == 4
    episodes = [episode for _, episode in diary.pages[1]]
    assert tokens_of(diary.pages[1]).tolist() == [len(e.text) for e in episodes]
    assert equations_on(diary.pages[1]).tolist() == [[2, 2], [-3, -3], [4, 5]]
    assert equations_on(diary.pages[2]).shape == (0, 2)


def test_pictures_of_runs_count_what_is_right(diary):
    plot = reward_plots.runs_plot({"mine": diary.pages * 2})
    assert "Runs of 6 steps" in plot.alt and "mine: from " in plot.alt
    assert "0.38 to 0.62 right" in plot.alt  # means of steps 1 to 4 and of steps 3 to 6
    assert "Step 2: 2 completions" in (page := reward_plots.page_plot(diary.pages, 2)).alt
    assert "50% right" in page.alt
    assert "before 1 of 9" in reward_plots.exam_plot({"before": 1, "after": 8}, 9).alt
    reward_plots.penalty_plot([0, 1], [0, 1], [0, -1])


# Chapter 5


def test_medians_ignore_a_hiccup():
    seconds = [0.001] * 14 + [1.0] + [0.002] * 15 + [9.0]
    assert rollout_plots.medians(seconds).tolist() == [1.0, 2.0]
    plot = rollout_plots.token_cost_plot({"a": seconds, "b": seconds})
    assert "a from 1.0 to 2.0 ms, b from 1.0 to 2.0 ms" in plot.alt


def test_an_exact_zero_has_a_mark_on_the_logarithmic_axis():
    ways = ["equal", "close", "far"]
    plot = rollout_plots.distance_plot(ways, {"m": [0.0, 1e-6, 0.5], "n": [0.1, 0.2, 0.3]})
    [axes] = plot.figure.axes
    drawn = {marker: 0 for marker in ("o", "D", "<")}
    for line in axes.lines:
        drawn[line.get_marker()] += len(line.get_xdata())
        assert all(axes.get_xlim()[0] < x < axes.get_xlim()[1] for x in line.get_xdata())
    assert drawn == {"o": 2, "D": 3, "<": 1}
    assert "m: equal 0; close 1e-06; far 0.5" in plot.alt


def test_floors_bend_where_arithmetic_takes_over():
    plot = rollout_plots.floors_plot("a million", 1e6, bandwidth=4e9, arithmetic=2e10)
    # one row: 4 MB at 4 GB/s take 1 ms; 10 rows: 2e7 operations at 2e10 a second take as long
    assert "from 1,000.0 with one row and is flat beyond 10 rows" in plot.alt


def test_waste_of_a_batch_is_what_is_computed_in_vain():
    plot = rollout_plots.retiring_plot(0.5, [4, 4, 2], [4, 3, 1], 1)
    assert "20% of the work wasted, 1 copies" in plot.alt
    assert "below half of that after 2 steps" in rollout_plots.alive_plot([4, 3, 1], 4).alt


def test_counts_are_compared_in_standard_errors():
    exact = np.array([0.5, 0.5])
    counts = {name: [50, 50] for name in "abc"} | {"d": [65, 35]}  # 3 standard errors of 5
    plot = rollout_plots.counts_plot(counts, exact, dict.fromkeys("abc", 0.9) | {"d": 1e-9})
    assert "a, p = 0.90, at most 0.0; " in plot.alt
    assert "d, p < 0.001, at most 3.0 standard errors" in plot.alt


def test_other_pictures_of_rollouts_say_their_numbers():
    alt = rollout_plots.batching_plot([1, 8], [2.0, 5.0], [2.0, 5.0]).alt
    assert "1 rows 2.0 ms, 8 rows 5.0 ms" in alt
    assert "from 1 to 9, once" in rollout_plots.prefill_plot([1, 2], [1, 9], [1, 2]).alt
    real = torch.tensor([[False, True], [True, True]])
    assert "2 rows" in rollout_plots.padding_plot(real, real.flip(1)).alt
    assert "one 10, all 2,000" in rollout_plots.speed_plot({"one": 10, "all": 2000}).alt


# Chapter 6


def wald(k, n):
    half = 1.96 * np.sqrt(k / n * (1 - k / n) / n)
    return k / n - half, k / n + half


def whole(k, n):
    return np.zeros(len(k)), np.ones(len(k))


def test_intervals_are_counted_where_they_break():
    alt = evaluation_plots.interval_plot({"Wald": wald, "whole": whole}, 4).alt
    # of 0 to 4: 1/4 and 3/4 reach beyond the ends; 0 and 4 are points
    assert "Wald: 2 leave the range from 0 to 1, 2 are a point" in alt
    assert "whole: 0 leave the range from 0 to 1, 0 are a point" in alt


def test_pictures_of_luck_say_how_much_of_it_they_show():
    first = wilson_interval(5, 10)
    inside = evaluation_plots.draws_plot(first, np.array([0.5, 0.01, 0.99])).alt
    assert "all 3 draws, 1 of which lie inside" in inside
    rates = np.array([10.0, 14.0, 12.0])
    assert "the best is 14.0 %, and measured afresh 11.0 %" in (
        evaluation_plots.checkpoints_plot(rates, 11.0).alt
    )
    error = np.array([0.01, 0.02])
    assert "from 1.0 points with 1 for each problem to 2.0 with 4" in (
        evaluation_plots.budget_plot(np.array([1, 4]), error, 100).alt
    )
    curves = {name: [0.1, 0.9] for name in ("few", "some", "many")}
    assert "few from 0.10 to 0.90" in evaluation_plots.power_plot([50, 100], curves).alt
    tests = np.array([0.1, 0.2, 0.3])
    assert "from 10% to 30%" in evaluation_plots.tests_plot(tests, 0.2).alt
    assert "arithmetic 24% to 76%" in evaluation_plots.kinds_plot({"arithmetic": first}, 10).alt


def test_significance_inflates_by_what_the_picture_says():
    seen = np.array([4.0, 8.0, 1.0, -6.0])
    found = np.array([True, True, False, True])
    plot = evaluation_plots.significance_plot(100, seen, found, truth=2)
    assert "power 75%; what is significant is 3.0 times the truth" in plot.alt
    assert "33% of it has the wrong sign" in plot.alt
    nothing = evaluation_plots.significance_plot(100, seen, np.zeros(4, dtype=bool), truth=2)
    assert "power 0%" in nothing.alt and "nan" not in nothing.alt


# Chapter 16


def test_pictures_of_ranks_say_how_far_off_they_are():
    full = torch.tensor([3.0, 4.0])
    alt = scaling_plots.imbalance_plot(full, torch.tensor([3.0, 3.0]), 28, 12, 5.0).alt
    assert "28 and 12 tokens" in alt and "off by 20%" in alt
    counts = np.array([[1.0, 2.0], [2.0, 1.0]])
    assert "2 of the 4 cells" in scaling_plots.ring_plot(counts, 1).alt
    others = {"two ranks": full, "half": 2 * full}
    change = scaling_plots.change_plot(full, others).alt
    assert "two ranks: off the diagonal by 0.0e+00" in change and "by 1.0e+00" in change
    gains = {"full": [1, 0.9], "LoRA": [1, 1.8]}
    assert "With 2: 0.90 with full, 1.80 with LoRA" in (
        scaling_plots.speedup_plot([1, 2], gains, "a cable").alt
    )
    assert (
        "small 1.0e+05, large 1.0e+09" in scaling_plots.wire_plot({"large": 1e9, "small": 1e5}).alt
    )
    assert "2.0 ms" in scaling_plots.threads_plot(0.002, 0.001).alt
