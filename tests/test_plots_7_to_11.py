"""Pictures of chapters 7 to 11: their words hold the numbers they were given."""

from __future__ import annotations

import pytest
import torch

from cpugrpo_edu.notebook import (
    batch_plots,
    hardware_plots,
    int8_plots,
    memory_plots,
    pictures,
)


def test_curves_have_an_axis_for_each_wish():
    plot = pictures.curves(
        {"a": ([1, 2, 4], [1.0, 2.0, 4.0]), "b": ([1, 2, 4], [4.0, 2.0, 1.0])},
        "title",
        log="xy",
        ticks=[1, 2, 4],
        level=3,
        alt="words",
    )
    [axes] = plot.figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2", "4"]
    assert len(axes.lines) == 3  # two curves and the level
    colours = {line.get_color() for line in axes.lines[:2]}
    markers = {line.get_marker() for line in axes.lines[:2]}
    assert len(colours) == len(markers) == 2, "never told apart by colour alone"
    assert plot.alt == "words"


def test_bars_begin_at_zero_and_say_their_numbers():
    plot = pictures.bars({"one": 0.4, "two": 1.25}, "", "ratio", level=1, fmt="{:.2f}")
    [axes] = plot.figure.axes
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0
    assert plot.alt == "Bars, ratio: one 0.40, two 1.25."


def test_panels_leave_out_steps_without_a_value():
    rows = [{"step": 1, "kl": 0.5}, {"step": 2, "kl": None}, {"step": 3, "kl": 0.25}]
    plot = pictures.panels(rows, {"kl": "KL"}, "step", "words")
    assert list(plot.figure.axes[0].lines[0].get_xdata()) == [1, 3]


@pytest.mark.parametrize(
    ("threads", "words"), [(1, "first 100 ms"), (4, "first 50 ms"), (16, "first 12 ms")]
)
def test_a_quota_is_used_up_sooner_by_more_threads(threads, words):
    assert words in hardware_plots.quota(threads).alt


def test_measured_curves_say_their_numbers():
    assert "by size: 1, 2." in hardware_plots.rate_by_size([8, 16], [1e9, 2e9]).alt
    assert "by size: 1, 2." in hardware_plots.reading_by_size([16, 32], [1e9, 2e9]).alt
    step = hardware_plots.step_by_rows([1, 4], {"measured": [1e-3, 2e-3]}, [1.0, 1.5])
    assert step.alt.endswith("1: 1.0, 4: 1.5.")
    assert "10% apart" in memory_plots.activations([16, 32], [100, 200], [110, 200]).alt
    best = memory_plots.peak_by_block([1, 2, 4], [3.0, 2.0, 4.0], [3.0, 4.0, 5.0])
    assert best.alt.endswith("with blocks of 2, and the formula's with 1.")
    assert "number 5 MiB" in memory_plots.held_by_step({"number": [0.0, 5.0]}).alt


def test_amdahl_says_the_speed_up():
    assert "15.4 times as fast on 64 cores" in hardware_plots.amdahl(0.95).alt
    assert "64.0 times as fast" in hardware_plots.amdahl(1.0).alt


def test_the_marked_point_of_the_roofline_is_that_of_its_rows():
    plot = hardware_plots.roofline(4, [1, 4], [1e-3, 2e-3], (100, 100), 1e11, 1e10)
    assert "rows: 4, 2.0 ms, or 500 µs a row" in plot.alt


def test_a_step_below_the_spacing_of_bfloat16_is_stuck():
    """Around 1 the spacing is 2**-7 upwards and 2**-8 downwards: half of that rounds away."""
    weights = torch.tensor([1.0, 0.01], dtype=torch.bfloat16)
    assert "50% of the weights are stuck" in hardware_plots.stuck(weights, 0.001).alt
    assert "0% of the weights" in hardware_plots.stuck(weights, 0.01).alt


def test_timings_and_threads_say_their_numbers():
    alt = hardware_plots.timings(torch.tensor([1.0, 2.0, 9.0])).alt
    assert "shortest 1.0, median 2.0, mean 4.0" in alt
    plot = hardware_plots.threads([1, 2], {"sum": [10.0, 15.0]}, {"sum": [50.0, 90.0]}, 2)
    assert "sum 1 threads 1.0, 2 threads 1.5" in plot.alt


def test_words_of_the_pictures_of_chapter_11():
    w = torch.randn(4, 64)
    staircase = int8_plots.staircase(w, lambda x: ((x / 0.5).round() * 0.5, 0.5), 3)
    assert "3 bits" in staircase.alt
    dots = int8_plots.dots_by_kind({"a": [1.0, 1.5], "b": [2.0]}, "", "gain", 1)
    assert "a 1.00 to 1.50, b 2.00 to 2.00" in dots.alt
    pairs = {"all": ([0, 1], [1.0, 2.0]), "each": ([0, 1], [0.5, 0.6])}
    for more in ({"log": True}, {"names": ["q", "k"]}):
        assert int8_plots.two_ways(pairs, "", "", "", alt="words", **more).alt == "words"
    assert "worst: m 90 %" in int8_plots.outliers({"m": [10.0, 90.0]}).alt
    row = {"low": -0.01, "high": 0.03, "difference": 0.01}
    assert "one +1.0" in int8_plots.interval_rows({"one": row}, 0.02, "one").alt
    assert "m 0.5, 2.0" in int8_plots.speedups({"m": [0.5, 2.0]}, [1, 4]).alt
    ratios = int8_plots.ratios(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]), [3, 4])
    assert "to 0.69 nats" in ratios.alt and "from -0.69" in ratios.alt
    p = torch.tensor([0.5, 0.5])
    moments = {"none": (0.2, 1.0), "token": (0.1, 1.0), "sequence": (0.0, 2.0)}
    assert "none 0.200" in int8_plots.error_curves(4, p, p, moments).alt
    best = int8_plots.best_limits([1.0, 2.0], [(0.5, 0.1), (0.1, 9.0)], (4, 10_000))
    assert "1.00 for 4 samples and 2.00 for 10,000 samples" in best.alt
    assert "sixteen" in int8_plots.grids(w).alt
    kl = int8_plots.kl_by_bits({"m": {"Q4_0": (4.5, 0.25)}})
    assert "m: Q4_0 0.25" in kl.alt


def test_words_of_the_pictures_of_chapter_9():
    parts = dict.fromkeys(memory_plots.PARTS, 2**29) | {"total": 5 * 2**29}
    assert "full 2.50 GiB" in memory_plots.stacked_parts({"full": parts}, "Title", 5).alt
    paired = memory_plots.ledger_and_growth({"build": 46.0}, {"build": 50.0})
    assert "build 46 and 50" in paired.alt
    history = [0, 2**20, 3 * 2**20, 0]
    assert memory_plots.mountain(history, "a").alt.endswith("a: peak 3.0 MiB.")
    beside = memory_plots.mountain(history, "b", [0, 2**22, 0])
    assert "beside one with a peak of 4.0 MiB" in beside.alt
    assert "bundled: full" in memory_plots.models(32).alt
    assert not memory_plots.models(32).figure.axes[0].patches, "no bars on a logarithmic axis"


def test_a_plan_is_evened_out():
    assert "peak 16 instead of 20" in batch_plots.plan(20).alt
    assert "peak 32 instead of 32" in batch_plots.plan(32).alt


def test_padding_is_counted_in_prompts_and_completions():
    part = {
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_mask": torch.tensor([[1, 0, 0], [1, 1, 1]]),
    }
    assert batch_plots.padding_share([part]) == pytest.approx(3 / 10)
    picture = batch_plots.padding_picture([part], 6)
    assert picture.tolist() == [[1, 2, 2, 1, 1, 0], [2, 2, 2, 2, 2, 0]]
    alt = batch_plots.padding({"drawn": [part], "again": [part]}, 6, 2).alt
    assert "drawn: 30% padding, again: 30% padding" in alt


def test_words_of_the_pictures_of_chapter_10():
    lengths = torch.tensor([1, 5, 9])
    assert "median 5 and maximum 9" in batch_plots.histogram(lengths).alt
    relative = torch.tensor([0.5, 1.0, 2.0])
    assert "from 0.50 to 2.00" in batch_plots.token_weights(2, lengths, relative).alt
    table = batch_plots.error_table(torch.tensor([[1e-7, 0.8]]), ["grpo"], ["drawn", "sorted"])
    assert "grpo: 0, 0.80" in table.alt
    third = torch.full((3,), 1 / 3)
    bars = batch_plots.shuffled_weights(lengths, relative, third, relative, third)
    assert "length 1 0.500 instead of 0.333" in bars.alt
    silent = batch_plots.silent_groups(2, third, [0.5] * 3, ([0.5] * 3, [0.1] * 3))
    assert "lowest in the middle at 0.5" in silent.alt
    assert len(batch_plots.silent_groups(4, third, []).figure.axes[0].lines) == 1
