"""The figures of chapter 6: intervals, coverage, power, and what luck looks like.

Accuracies, intervals and differences are fractions, unless a name says points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cpugrpo_edu.record.stats import Interval, SeedSummary
from cpugrpo_edu.show.palette import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    Plot,
    new_figure,
    tidy,
)

Recipe = Callable[[NDArray[np.int64], int], tuple[ArrayLike, ArrayLike]]
"""Counts of right answers of n to the lower and upper ends of their intervals."""


def tests_plot(tests: NDArray[np.float64], accuracy: float) -> Plot:
    """Histogram of the accuracies of one model on many random tests."""
    figure = new_figure(6.5, 3)
    axes = figure.add_subplot()
    axes.hist(100 * tests, bins=np.arange(-0.5, 100).tolist(), color=BLUE, alpha=0.7)
    axes.axvline(100 * accuracy, color=VERMILLION, ls="--", label="all of them")
    axes.set_xlim(100 * tests.min() - 3, 100 * tests.max() + 3)
    axes.legend(frameon=False)
    title = f"The same model on {len(tests):,} tests of 100 problems"
    tidy(axes, title, "accuracy on the test (%)", "tests")
    alt = (
        f"Histogram of the accuracies that one and the same model gets on {len(tests):,} random "
        f"tests of 100 problems, from {tests.min():.0%} to {tests.max():.0%}; the accuracy on all "
        f"problems, {accuracy:.1%}, is marked by a dashed line."
    )
    return Plot(figure, alt)


def interval_plot(recipes: Mapping[str, Recipe], n: int) -> Plot:
    """Two kinds of intervals for every possible count of right answers."""
    figure = new_figure(6.5, 3.4)
    axes = figure.add_subplot()
    k = np.arange(n + 1)
    words = []
    looks = ((ORANGE, -0.16, "s"), (BLUE, 0.16, "o"))
    for (name, recipe), (color, shift, marker) in zip(recipes.items(), looks, strict=True):
        low, high = (np.asarray(end) for end in recipe(k, n))
        axes.vlines(k + shift, low, high, color=color, lw=2)
        axes.plot(k + shift, k / n, marker, color=color, ms=4, label=name)
        outside = int(((low < -1e-12) | (high > 1 + 1e-12)).sum())
        points = int((high - low < 1e-12).sum())
        words.append(f"{name}: {outside} leave the range from 0 to 1, {points} are a point")
    axes.axhspan(-0.2, 0, color=GREY, alpha=0.25, lw=0)
    axes.axhspan(1, 1.2, color=GREY, alpha=0.25, lw=0)
    axes.set_ylim(-0.2, 1.2)
    axes.set_xticks(range(0, n + 1, 5))
    axes.legend(frameon=False, loc="lower right")
    title = f"All {n + 1} possible results of {n} problems"
    tidy(axes, title, f"right of {n}", "accuracy")
    alt = f"Two intervals for every count of right answers out of {n}. {'; '.join(words)}."
    return Plot(figure, alt)


def coverage_plot(p: ArrayLike, wald: ArrayLike, wilson: ArrayLike, n: int) -> Plot:
    """Exact coverage of the two intervals against the true accuracy."""
    figure = new_figure(6.5, 3)
    axes = figure.add_subplot()
    axes.plot(p, wald, color=ORANGE, ls="--", lw=1)
    axes.plot(p, wilson, color=BLUE, lw=1.4)
    axes.axhline(0.95, color=GREY, lw=1)
    axes.text(0.5, 0.62, "dashed: Wald    solid: Wilson", ha="center")
    axes.set_ylim(0.5, 1.01)
    title = f"What an interval of 95 % covers, n = {n}"
    tidy(axes, title, "true accuracy p", "coverage")
    alt = (
        f"Exact coverage for n = {n} against the true accuracy. Wilson oscillates around 0.95 and "
        f"is {np.min(wilson):.2f} at worst; Wald is {np.min(wald):.2f} at worst, where the true "
        "accuracy is near 0 or 1."
    )
    return Plot(figure, alt)


def kinds_plot(intervals: Mapping[str, Interval], n: int) -> Plot:
    """Accuracy and interval of each kind of problem, the first on top."""
    figure = new_figure(6.5, 3.6)
    axes = figure.add_subplot()
    for i, w in enumerate(intervals.values()):
        axes.hlines(i, 100 * w.low, 100 * w.high, color=BLUE, lw=2)
        axes.plot(100 * w.estimate, i, "o", color=BLUE, ms=5)
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    title = f"Accuracy with Wilson's 95 % interval, n = {n} each"
    tidy(axes, title, "accuracy (%)", grid="x")
    words = ", ".join(f"{kind} {w.low:.0%} to {w.high:.0%}" for kind, w in intervals.items())
    return Plot(figure, f"Wilson's interval for each kind of problem: {words}.")


def gains_plot(gains: Mapping[str, Mapping[str, Any]], seeds: SeedSummary) -> Plot:
    """Gain of each run with its interval over items, and their mean with that over seeds."""
    figure = new_figure(6.5, 2.8)
    axes = figure.add_subplot()
    for i, gain in enumerate(gains.values()):
        axes.hlines(i, 100 * gain["low"], 100 * gain["high"], color=BLUE, lw=2)
        axes.plot(100 * gain["difference"], i, "o", color=BLUE)
    top = len(gains)
    axes.hlines(top, 100 * seeds.low, 100 * seeds.high, color=ORANGE, lw=3)
    axes.plot(100 * seeds.mean, top, "D", color=ORANGE)
    axes.set_yticks(range(top + 1), [*gains, "mean over seeds"])
    title = "Gain of the stored runs: items (circles), seeds (diamond)"
    tidy(axes, title, "gain in accuracy (percentage points)", grid="x")
    words = ", ".join(f"{name} {100 * gain['difference']:+.1f}" for name, gain in gains.items())
    alt = (
        f"The gain of each stored run in points with its paired interval over items ({words}), "
        f"and above them the mean over seeds, {100 * seeds.low:+.1f} to {100 * seeds.high:+.1f}."
    )
    return Plot(figure, alt)


def draws_plot(first: Interval, accuracies: NDArray[np.float64]) -> Plot:
    """Wilson's interval of the first draw and the accuracies of all draws."""
    figure = new_figure(6.5, 2.2)
    axes = figure.add_subplot()
    axes.hlines(0, 100 * first.low, 100 * first.high, color=BLUE, lw=3)
    axes.plot(100 * first.estimate, 0, "o", color=BLUE)
    axes.plot(100 * accuracies, np.ones(len(accuracies)), "|", color=ORANGE, ms=18)
    axes.set_yticks([0, 1], ["draw 0, Wilson", f"{len(accuracies)} draws"])
    axes.set_ylim(-0.6, 1.6)
    title = f"One model, {len(accuracies)} times"
    tidy(axes, title, "accuracy (%)", grid="x")
    inside = int(((accuracies >= first.low) & (accuracies <= first.high)).sum())
    alt = (
        f"Wilson's interval of the first draw, and above it the accuracies of all "
        f"{len(accuracies)} draws, {inside} of which lie inside its range."
    )
    return Plot(figure, alt)


def budget_plot(m: NDArray[np.int64], error: NDArray[np.float64], budget: int) -> Plot:
    """Standard error for a fixed number of completions, m of them for each problem."""
    figure = new_figure(6.5, 2.8)
    axes = figure.add_subplot()
    axes.plot(m, 100 * error, "o-", color=BLUE)
    axes.set_ylim(0)
    x = f"completions per problem m (so {budget}/m problems)"
    title = f"{budget:,} completions, spent in different ways"
    tidy(axes, title, x, "standard error (points)")
    alt = (
        f"Standard error of the accuracy for {budget} completions: it rises from "
        f"{100 * error[0]:.1f} points with {m[0]} for each problem to {100 * error[-1]:.1f} with "
        f"{m[-1]}."
    )
    return Plot(figure, alt)


def power_plot(sizes: Sequence[int], curves: Mapping[str, Sequence[float]]) -> Plot:
    """Power against the number of problems."""
    figure = new_figure(6.5, 3)
    axes = figure.add_subplot()
    looks = ((GREEN, "^-"), (BLUE, "o-"), (ORANGE, "s--"))
    for (name, found), (color, style) in zip(curves.items(), looks, strict=True):
        axes.plot(sizes, found, style, color=color, label=name)
    axes.axhline(0.8, color=GREY, lw=1)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    title = "Chance to notice a true gain of two points"
    tidy(axes, title, "problems in the test (log scale)", "power")
    ends = [f"{name} from {c[0]:.2f} to {c[-1]:.2f}" for name, c in curves.items()]
    alt = f"Power for {sizes[0]} to {sizes[-1]} problems: {'; '.join(ends)}."
    return Plot(figure, alt)


def significance_plot(
    n: int, seen: NDArray[np.float64], found: NDArray[np.bool_], truth: float
) -> Plot:
    """Observed differences (points) of many tests, coloured where they are significant."""
    figure = new_figure(6.5, 3)
    axes = figure.add_subplot()
    step = max(100 / n, 0.2)
    parts = [seen[~found], seen[found & (seen > 0)], seen[found & (seen < 0)]]
    bins = np.arange(-14 - step / 2, 18, step).tolist()
    labels = ["not significant", "significant", "significant, wrong sign"]
    colors = [GREY, BLUE, VERMILLION]
    bars: Any = axes.hist(parts, bins, stacked=True, color=colors, label=labels)[2]
    for patch in bars[2]:
        patch.set_hatch("////")
    axes.axvline(truth, color="black", ls="--", lw=1)
    axes.set_xlim(-10, 14)
    axes.set_yticks([])
    axes.legend(frameon=False, fontsize=8)
    words = f"power {found.mean():.0%}"
    if found.any():
        times = np.abs(seen[found]).mean() / truth
        words += f"; what is significant is {times:.1f} times the truth"
    x = "observed difference (points); dashed: the truth"
    tidy(axes, f"n = {n}: {words}", x, "imagined tests")
    wrong = len(parts[2]) / max(1, int(found.sum()))
    alt = (
        f"Observed differences of imagined tests with n = {n} problems when the truth is "
        f"{truth:+g} points: {words}, and {wrong:.0%} of it has the wrong sign."
    )
    return Plot(figure, alt)


def checkpoints_plot(rates: NDArray[np.float64], fresh: float) -> Plot:
    """Accuracies (%) of evaluations of one model, the best marked and measured afresh."""
    best = int(rates.argmax())
    figure = new_figure(6.5, 2.8)
    axes = figure.add_subplot()
    axes.plot(range(len(rates)), rates, "o-", color=BLUE, label="as measured")
    axes.plot(best, rates[best], "o", color=ORANGE, ms=11, label="the best")
    axes.plot(best, fresh, "X", color=VERMILLION, ms=10, label="measured afresh")
    axes.axhline(rates.mean(), color=GREY, ls="--", lw=1)
    axes.legend(frameon=False, fontsize=8)
    title = f"{len(rates)} 'checkpoints' of a model that never changed"
    tidy(axes, title, "checkpoint", "accuracy (%)")
    alt = (
        f"Accuracies of {len(rates)} evaluations of one unchanged model, {rates.mean():.1f} % in "
        f"the mean (dashed); the best is {rates[best]:.1f} %, and measured afresh {fresh:.1f} %."
    )
    return Plot(figure, alt)
