"""Pictures of chapter 15: their words hold the numbers they were given."""

from __future__ import annotations

import numpy as np

from cpugrpo_edu.notebook import claim_plots
from cpugrpo_edu.record.stats import Interval, over_seeds, wilson_interval


def test_looks_at_nothing_count_who_found_something():
    p = np.full((4, 6), 0.5)
    p[1, 2] = p[3, 5] = 0.01  # the second is seen only by who looks six times
    plots = [claim_plots.looks_plot(p, k, lambda k: 1 - 0.95**k, {3: 0.04}) for k in (3, 6)]
    assert [plot.figure.axes[0].get_title(loc="left") for plot in plots] == [
        "1 of 4 groups found something",
        "2 of 4 groups found something",
    ]
    assert "the probability is 14%" in plots[0].alt and "at most 4.0%" in plots[0].alt


def test_a_pair_of_arms_says_every_seed_and_the_interval():
    plot = claim_plots.seeds_plot({"a": [0.5, 0.7], "b": [0.4, 0.4]}, over_seeds([0.1, 0.3]), 0.2)
    assert "(a 0.50, 0.70; b 0.40, 0.40), with a dashed line at 0.20" in plot.alt
    assert "+20.0 points (-107.1 to +147.1)" in plot.alt


def test_small_figures_of_claims_say_their_numbers():
    alt = claim_plots.shares_plot({"base": 43}, 60).alt
    w = wilson_interval(43, 60)
    assert f"base 43 of 60, {w.low:.2f} to {w.high:.2f}" in alt
    assert "looks 0.30, exact 0.00" in claim_plots.score_plot({"x": 0.3}, {"x": 0.0}).alt
    habit = claim_plots.habit_plot(0.1, Interval(0.6, 0.4, 0.7), 0.3).alt
    assert "0.10 at the start; 0.60 (0.40 to 0.70)" in habit and "0.30 after" in habit
    assert "2 of 4 lie below" in claim_plots.p_values_plot(np.array([0.01, 0.04, 0.3, 0.9])).alt
