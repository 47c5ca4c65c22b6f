"""The figures of chapter 15: looks at nothing, pairs of seeds, p-values, a score of looks, habit.

Accuracies and shares are fractions, unless a name says points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cpugrpo_edu.record.stats import Interval, SeedSummary, wilson_interval
from cpugrpo_edu.show.palette import (
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    Plot,
    new_figure,
    tidy,
)

Family = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Numbers of looks to the probability of a false alarm in any of them."""


def looks_plot(
    p: NDArray[np.float64], looks: int, family: Family, corrected: Mapping[int, float]
) -> Plot:
    """The first ``looks`` of each row's p-values, and the probability of a false alarm.

    ``corrected`` holds Bonferroni's probability by number of looks.
    """
    figure = new_figure(6.5, 2.9)
    left, right = figure.subplots(1, 2)
    groups, most = p.shape
    found = p[:, :looks] < 0.05
    finders = int(found.any(axis=1).sum())
    for chosen, colour, mark, size in ((~found, GREY, ".", 2), (found, VERMILLION, "X", 6)):
        group, look = np.nonzero(chosen)
        left.plot(look + 1, group + 1, mark, color=colour, ms=size)
    left.set(xlim=(0, most + 1), ylim=(0.3, groups + 0.7), yticks=[1, *range(5, groups + 1, 5)])
    tidy(left, f"{finders} of {groups} groups found something", "look", "group", grid="x")
    k = np.arange(1, most + 1)
    right.plot(k, family(k), color=VERMILLION, label="each look at 0.05")
    right.plot(list(corrected), list(corrected.values()), color=BLUE, ls=":", label="Bonferroni")
    chance = float(family(np.array([looks]))[0])
    right.plot(looks, chance, "o", color=VERMILLION)
    right.set(ylim=(0, 1))
    right.legend(fontsize=8, frameon=False)
    tidy(right, "At least one false alarm", "looks", "probability")
    return Plot(
        figure,
        f"{groups} groups with {looks} looks each at nothing: {finders} have at least one p-value "
        f"below 0.05. In theory the probability is {chance:.0%} for each; with Bonferroni it is at "
        f"most {max(corrected.values()):.1%}.",
    )


def seeds_plot(
    scores: Mapping[str, Sequence[float]],
    summary: SeedSummary,
    start: float | None = None,
    unit: str = "exact match",
) -> Plot:
    """Two arms, a line for each seed, and the mean difference with its interval."""
    figure = new_figure(6.5, 2.9)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    one, other = scores
    for i, pair in enumerate(zip(*scores.values(), strict=True)):
        left.plot([0, 1], pair, color=GREY, lw=1, marker="osD^v"[i % 5], mfc=BLUE)
    if start is not None:
        left.axhline(start, color=ORANGE, ls="--", lw=1.2)
        left.annotate("before training", (0.5, start), fontsize=8, va="bottom")
    left.set(xticks=[0, 1], xticklabels=[one, other], xlim=(-0.3, 1.3))
    tidy(left, "Every seed", "", unit)
    mean, low, high = (100 * x for x in (summary.mean, summary.low, summary.high))
    right.errorbar(0, mean, high - mean, marker="D", color=PURPLE, capsize=6)
    right.axhline(0, color="black", lw=1)
    right.set(xticks=[], xlim=(-1, 1))
    tidy(right, f"{one} minus {other}", "", "points")
    ends = "; ".join(
        f"{name} {', '.join(f'{x:.2f}' for x in values)}" for name, values in scores.items()
    )
    return Plot(
        figure,
        f"Left: {unit} of each seed ({ends})"
        + (f", with a dashed line at {start:.2f} before training" if start is not None else "")
        + f". Right: the mean difference, {mean:+.1f} points ({low:+.1f} to {high:+.1f}), and a "
        "line at zero.",
    )


def p_values_plot(p: NDArray[np.float64]) -> Plot:
    """All p-values in order, beside the diagonal of no effect."""
    figure = new_figure(6.5, 2.6)
    axes = figure.subplots()
    rank = np.arange(1, p.size + 1)
    axes.plot(rank, np.sort(p), "o", ms=3, color=BLUE, label="INT8 against fp32")
    axes.plot(rank, rank / p.size, color=GREY, ls="--", label="uniform")
    axes.axhline(0.05, color=VERMILLION, lw=1, ls=":", label="0.05")
    axes.legend(fontsize=8, frameon=False)
    tidy(axes, "Sorted p-values of all cells", "rank", "p-value")
    return Plot(
        figure,
        "Sorted p-values of all cells of all INT8 comparisons, beside the diagonal that continuous "
        f"p-values without any effect would follow. {(p < 0.05).sum()} of {p.size} lie below the "
        f"dotted line at 0.05; by chance alone it would be about {0.05 * p.size:.0f}.",
    )


def score_plot(looks: Mapping[str, float], exact: Mapping[str, float]) -> Plot:
    """A score of looks beside exact match, for groups of completions."""
    figure = new_figure(6.5, 2.7)
    axes = figure.subplots()
    x = np.arange(len(looks))
    axes.bar(x - 0.2, list(looks.values()), 0.38, color=ORANGE, hatch="//", label="looks")
    axes.bar(x + 0.2, list(exact.values()), 0.38, color=BLUE, label="exact match")
    axes.set(xticks=x, xticklabels=list(looks), ylim=(0, 1.1))
    axes.legend(fontsize=8, frameon=False, ncols=2)
    tidy(axes, "The audited score against the truth", "", "mean score")
    facts = "; ".join(f"{name}: looks {looks[name]:.2f}, exact {exact[name]:.2f}" for name in looks)
    return Plot(figure, f"Bars of two scores for three groups of completions. {facts}.")


def shares_plot(counts: Mapping[str, int], n: int) -> Plot:
    """Shares of ``n`` outputs with their 95 % Wilson intervals."""
    figure = new_figure(6.5, 1.9)
    axes = figure.subplots()
    facts = []
    for y, (name, count) in enumerate(counts.items()):
        w = wilson_interval(count, n)
        sides = [[w.estimate - w.low], [w.high - w.estimate]]
        axes.errorbar(w.estimate, y, xerr=sides, fmt="o", color=BLUE, capsize=5)
        facts.append(f"{name} {count} of {n}, {w.low:.2f} to {w.high:.2f}")
    axes.set(yticks=range(len(counts)), yticklabels=list(counts), xlim=(0.4, 1))
    axes.set_ylim(-0.6, len(counts) - 0.4)
    tidy(axes, "95 % Wilson intervals", f"share of {n} outputs", "", grid="x")
    return Plot(figure, f"Shares with their 95 % intervals: {'; '.join(facts)}.")


def habit_plot(start: float, habit: Interval, trained: float) -> Plot:
    """Accuracy at the start, at the start with the trained model's habit, and after training."""
    figure = new_figure(6.5, 2.2)
    axes = figure.subplots()
    axes.barh([2, 0], [start, trained], 0.55, color=[GREY, BLUE])
    axes.barh(1, habit.estimate, 0.55, color=ORANGE, hatch="//")
    sides = [[habit.estimate - habit.low], [habit.high - habit.estimate]]
    axes.errorbar(habit.estimate, 1, xerr=sides, color="black", capsize=5)
    names = ["trained", "start, with the habit", "start"]
    axes.set(yticks=[0, 1, 2], yticklabels=names, xlim=(0, 1))
    tidy(axes, "Habit or skill?", "exact match", "", grid="x")
    return Plot(
        figure,
        f"Exact match: {start:.2f} at the start; {habit.estimate:.2f} ({habit.low:.2f} to "
        f"{habit.high:.2f}) if the starting model showed its working as often as the trained one; "
        f"{trained:.2f} after training.",
    )
