"""What chapter 19 shows: pass@k of made-up populations, and of a real model's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpugrpo_edu.record.evaluations import SampledEvaluation
from cpugrpo_edu.record.pass_at_k import sampled_table
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.palette import BLUE, GREEN, GREY, VERMILLION, Plot, new_figure, tidy
from cpugrpo_edu.show.text import percent, records_folder

Floats = NDArray[np.float64]
KS = (1, 2, 4, 8, 16, 32, 64)

STORIES: dict[str, str] = {
    "before": "the base model",
    "reliable": "more reliable: the odds of every problem rise by one factor",
    "narrowed": "narrowed: the same, but what was rare is lost",
    "taught": "taught: the same, and every second hopeless problem is solved now and then",
}
LOOKS = ((GREY, "-", "o"), (BLUE, "-", "s"), (VERMILLION, "--", "^"), (GREEN, ":", "D"))
RARE, TAUGHT = 0.05, 0.1


def base_problems(count: int = 400, hopeless: float = 0.3) -> Floats:
    """Chances of a right answer, one a problem: a share of 0, the others spread from easy to hard.

    They are quantiles of 1 % + 80 % of the square of a uniform number, so hard ones are common.
    """
    dead = round(hopeless * count)
    ranks = (np.arange(count - dead) + 0.5) / (count - dead)
    return np.concatenate([np.zeros(dead), 0.01 + 0.8 * ranks**2])


def with_odds_times(p: Floats, factor: float) -> Floats:
    """The chances when the odds p / (1 - p) are multiplied, as exp(reward / beta) does."""
    return factor * p / (factor * p + 1 - p)


def after(story: str, p: Floats, factor: float) -> Floats:
    """The chances after a training of this kind, see ``STORIES``."""
    if story == "before":
        return p
    trained = with_odds_times(p, factor)
    if story == "narrowed":
        trained = np.where(p < RARE, 0.0, trained)
    if story == "taught":
        hopeless = np.flatnonzero(p == 0)[::2]
        trained[hopeless] = TAUGHT
    return trained


def pass_rates(p: Floats, ks: Sequence[int] = KS) -> list[float]:
    """Exact pass@k of a population: the mean of 1 - (1 - p)^k."""
    return [float(np.mean(1 - (1 - p) ** k)) for k in ks]


def _finish(axes: Any, ks: Sequence[int], title: str) -> None:
    """Axes of pass@k: k doubles from mark to mark."""
    axes.set_xscale("log", base=2)
    axes.set(xticks=list(ks), xticklabels=[str(k) for k in ks], ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, title, "k, answers to each problem", "share solved at least once")


def ladder(curves: Mapping[str, Sequence[float]], ks: Sequence[int], title: str) -> Plot:
    """Curves of pass@k with k doubling, each with its own colour, line and marker."""
    figure = new_figure(6.5, 3.1)
    axes = figure.add_subplot()
    words = []
    for (name, shares), (colour, line, marker) in zip(curves.items(), LOOKS, strict=False):
        axes.plot(ks, shares, line, marker=marker, ms=4, color=colour, label=name)
        words.append(f"{name} {shares[0]:.0%} to {shares[-1]:.0%}")
    _finish(axes, ks, title)
    return Plot(figure, f"pass@k from k = {ks[0]} to {ks[-1]}: {'; '.join(words)}.")


def three_stories(factor: float) -> Plot:
    """Four models that may have the same pass@1 or not, told apart by pass@64."""
    p = base_problems()
    curves = {story: pass_rates(after(story, p, factor)) for story in STORIES}
    return ladder(curves, KS, f"Odds of every problem times {factor:g}")


def measured_ladder(evaluations: Sequence[SampledEvaluation]) -> Plot:
    """pass@k of sampled evaluations of the same problems, with 95 % intervals."""
    figure = new_figure(6.5, 3.1)
    axes = figure.add_subplot()
    words = []
    for evaluation, (colour, line, marker) in zip(evaluations, LOOKS, strict=False):
        passes = sampled_table(evaluation)["overall"]["pass_at_k"]
        ks, rows = [int(k) for k in passes], list(passes.values())
        middle = [row["estimate"] for row in rows]
        spread = [
            [row["estimate"] - row["low"] for row in rows],
            [row["high"] - row["estimate"] for row in rows],
        ]
        looks: dict[str, Any] = {"color": colour, "ls": line, "marker": marker, "ms": 4}
        axes.errorbar(ks, middle, yerr=spread, capsize=3, label=evaluation.label, **looks)
        words.append(f"{evaluation.label} {middle[0]:.0%} to {middle[-1]:.0%}")
    _finish(axes, ks, "At least one of k answers is right")
    alt = f"pass@k with intervals, from k = {ks[0]} to {ks[-1]}: {'; '.join(words)}."
    return Plot(figure, alt)


def sampled_rows(evaluation: SampledEvaluation) -> list[list[str]]:
    """Rows of a table: one answer, the majority vote, and the best of all, with intervals."""
    part = sampled_table(evaluation)["overall"]
    passes = part["pass_at_k"]
    last = max(passes, key=int)
    named = {
        "one answer (pass@1)": passes["1"],
        f"majority of {last}": part["majority"],
        f"best of {last} (pass@{last})": passes[last],
    }
    return [
        [name, percent(row["estimate"]), f"{percent(row['low'])} to {percent(row['high'])}"]
        for name, row in named.items()
    ]


def recorded_study() -> RunRecord | None:
    """The record of the study `real-model`, if it has been run."""
    path = records_folder() / "study-real-model.json"
    return RunRecord.load(path) if path.exists() else None
