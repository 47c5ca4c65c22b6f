"""What chapter 19 claims of its made-up problems, and its pictures of sampled answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cpugrpo_edu.notebook import teach_or_sharpen as T
from cpugrpo_edu.record.evaluations import SampledEvaluation


def test_odds_are_multiplied_and_nothing_comes_from_nothing():
    p = np.array([0.0, 0.2, 0.5, 1.0])
    tilted = T.with_odds_times(p, 3)
    assert tilted[0] == 0 and tilted[3] == 1
    assert tilted[1:3] / (1 - tilted[1:3]) == pytest.approx(3 * p[1:3] / (1 - p[1:3]))


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_only_large_k_tells_the_stories_apart(factor):
    p = T.base_problems()
    rates = {story: T.pass_rates(T.after(story, p, factor)) for story in T.STORIES}
    base, reliable, narrowed, taught = rates.values()
    assert min(reliable[0], narrowed[0], taught[0]) > base[0] + 0.04
    assert abs(reliable[0] - narrowed[0]) < 0.05
    assert 0 <= reliable[-1] - base[-1] < (reliable[0] - base[0]) / 2
    assert narrowed[-1] < base[-1] - 0.05 and taught[-1] > base[-1] + 0.05
    assert all(a <= b for each in rates.values() for a, b in itertools.pairwise(each))


def test_pass_rates_are_those_of_enumeration():
    assert T.pass_rates(np.array([0.5, 0.0]), (1, 2)) == pytest.approx([0.25, 0.375])
    assert T.three_stories(4).alt.startswith("pass@k from k = 1 to 64: before ")


def a_sample():
    correct = [[True, False, False, False], [False] * 4]
    return SampledEvaluation(
        label="base",
        seed=0,
        temperature=0.7,
        item_ids=["a", "b"],
        domains=["d", "d"],
        difficulties=["basic", "basic"],
        correct=correct,
        majority=[0, None],
        tokens=[[1] * 4] * 2,
        finished=[[True] * 4] * 2,
        completions=[["x"] * 4] * 2,
        seconds=1.0,
    )


def test_the_table_and_the_figure_say_what_was_sampled():
    rows = T.sampled_rows(a_sample())
    assert [row[:2] for row in rows] == [
        ["one answer (pass@1)", "12.5 %"],
        ["majority of 4", "50.0 %"],
        ["best of 4 (pass@4)", "50.0 %"],
    ]
    assert "base 12% to 50%" in T.measured_ladder([a_sample()]).alt


def test_without_a_record_there_is_no_study(tmp_path, monkeypatch):
    monkeypatch.setattr(T, "records_folder", lambda: tmp_path)
    assert T.recorded_study() is None
