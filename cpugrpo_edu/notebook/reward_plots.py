"""The figures of chapter 4: what verifiers and rewards pay for, and what a run made of it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cpugrpo_edu.notebook.diary import Page, right_on, tokens_of
from cpugrpo_edu.record.stats import wilson_interval
from cpugrpo_edu.show.palette import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    Plot,
    new_figure,
    tidy,
)

Verifier = Callable[[str, str], bool]
Case = tuple[str, str, bool]
"""A completion, the reference answer, and whether the completion is right."""

OK, MISSED, PAID = range(3)

LOOKS = ((BLUE, "-"), (GREY, "--"), (PURPLE, ":"), (VERMILLION, "-."))


# Verifiers


def verdicts(cases: Sequence[Case], verifiers: Sequence[Verifier]) -> NDArray[np.int64]:
    """OK, MISSED (a right answer) or PAID (for a wrong one): (cases, verifiers)."""
    table = np.zeros((len(cases), len(verifiers)), dtype=np.int64)
    for i, (text, reference, right) in enumerate(cases):
        for j, verifier in enumerate(verifiers):
            if verifier(text, reference) != right:
                table[i, j] = MISSED if right else PAID
    return table


def verdict_table(
    cases: Sequence[Case], verifiers: Sequence[Any], labels: Sequence[str] | None = None
) -> Plot:
    """A row a case, a column a verifier."""
    from matplotlib.colors import ListedColormap

    table = verdicts(cases, verifiers)
    figure = new_figure(6.5, 0.6 + 0.27 * len(cases))
    axes = figure.add_subplot()
    colors = ListedColormap(["#f2f2f2", ORANGE, VERMILLION])
    axes.pcolormesh(table, cmap=colors, vmin=0, vmax=2, edgecolors="white")
    for (i, j), found in np.ndenumerate(table):
        word, color = (("ok", "black"), ("missed", "black"), ("PAID", "white"))[found]
        axes.text(j + 0.5, i + 0.5, word, ha="center", va="center", color=color, fontsize=8)
    rows = labels or [repr(text)[1:-1] for text, _, _ in cases]
    _as_table(axes, rows, [v.__name__ for v in verifiers])
    axes.tick_params(axis="y", labelsize=8)
    missed, paid = (table == MISSED).sum(axis=0), (table == PAID).sum(axis=0)
    words = [
        f"{v.__name__} misses {m} and pays {p}"
        for v, m, p in zip(verifiers, missed, paid, strict=True)
    ]
    return Plot(figure, f"Verdicts on {len(cases)} texts: {'; '.join(words)}.")


def _as_table(axes: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    """The first row on top, names of the columns above it, no lines."""
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)


# Loopholes


def loophole_plot(
    path: NDArray[np.float64], pay: ArrayLike, truth: ArrayLike, ways: Sequence[str]
) -> Plot:
    """Probabilities of four ways to answer over training: (steps, ways)."""
    pay, truth = np.asarray(pay), np.asarray(truth)
    steps = np.arange(1, len(path) + 1)
    figure = new_figure(6.5, 2.9)
    axes = figure.add_subplot()
    for way, share, (color, style) in zip(ways, path.T, LOOKS, strict=True):
        axes.plot(steps, share, style, color=color, lw=2, label=way)
    right = path @ truth
    axes.plot(steps, right, color="black", lw=1, label="truly right")
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    title = f"In the end the pay is {path[-1] @ pay:.2f}, the truth {right[-1]:.2f}"
    tidy(axes, title, "exact gradient step (log scale)", "probability")
    alt = (
        f"Probability of four ways to answer over {len(path)} steps when the last way is paid "
        f"{pay[-1]:.2f}. It starts at {path[0, -1]:.3g}, has {path[:, -1].min():.2g} at its "
        f"lowest and ends at {path[-1, -1]:.2g}; the share of right answers starts at "
        f"{right[0]:.2f}, has {right.max():.2f} at its highest and ends at {right[-1]:.2f}."
    )
    return Plot(figure, alt)


# Rewards of single texts


def score_table(scores: NDArray[np.float64], texts: Sequence[str], names: Sequence[str]) -> Plot:
    """Rewards of texts, (texts, rewards): first the naive ones, then as many of the package."""
    figure = new_figure(6.5, 3)
    axes = figure.add_subplot()
    axes.pcolormesh(scores, cmap="Blues", vmin=0, vmax=1.4, edgecolors="white")
    for (i, j), x in np.ndenumerate(scores):
        axes.text(j + 0.5, i + 0.5, f"{x:.2f}", ha="center", va="center")
    _as_table(axes, texts, [name.replace("_", "\n") for name in names])
    axes.axvline(len(names) // 2, color="black", lw=1.5)
    best = []
    for name, column in zip(names, scores.T, strict=True):
        first = [repr(text) for text in np.array(texts)[column == column.max()].tolist()]
        best.append(f"{name} pays {' and '.join(first)} most ({column.max():.2f})")
    return Plot(figure, f"{len(names)} rewards of {len(texts)} texts: {'; '.join(best)}.")


def stacked_rewards(parts: Mapping[str, ArrayLike], texts: Sequence[str]) -> Plot:
    """Weighted rewards of the texts, one upon the other: a name and a value a text."""
    figure = new_figure(6.5, 2.7)
    axes = figure.add_subplot()
    left = np.zeros(len(texts))
    looks = ((BLUE, ""), (GREEN, "///"), (ORANGE, "..."))
    for (name, part), (color, hatch) in zip(parts.items(), looks, strict=True):
        axes.barh(
            range(len(texts)), np.asarray(part), left=left, color=color, hatch=hatch,
            edgecolor="white", label=name,
        )  # fmt: skip
        left += np.asarray(part)
    axes.set_yticks(range(len(texts)), texts)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, "Total reward", "reward", grid="x")
    order = np.argsort(-left, kind="stable")
    words = ", ".join(f"{texts[i]} {left[i]:.2f}" for i in order)
    return Plot(figure, f"Stacked bars of the weighted rewards, highest first: {words}.")


# Silent groups


def silent_plot(silent: Mapping[str, float], groups: int) -> Plot:
    """The exact chance of a silent group, and the share of silent ones under each reward."""
    figure = new_figure(6.5, 2.8)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    p = np.linspace(0, 1, 201)
    for size, style in ((4, ":"), (8, "-"), (16, "--")):
        left.plot(p, p**size + (1 - p) ** size, style, color=BLUE, label=f"G = {size}")
    left.legend(frameon=False)
    tidy(left, "Answer alone, exact", "chance p to be right", "P(silent)")
    right.bar(list(silent), list(silent.values()), color=[BLUE, GREEN, ORANGE])
    right.set_ylim(0, 1)
    tidy(right, f"{groups} real groups of 8", "", "share silent")
    shares = ", ".join(f"{name} {share:.2f}" for name, share in silent.items())
    alt = (
        "Left: the exact probability that a group is silent is close to one for problems that "
        "are almost never or almost always solved, and smaller for larger groups. Right: the "
        f"share of silent groups among {groups} real ones: {shares}."
    )
    return Plot(figure, alt)


# Runs


def smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """The mean of each value and its neighbours, up to ``width`` in all: a step has few
    completions."""
    half = width // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def runs_plot(runs: Mapping[str, Sequence[Page]]) -> Plot:
    """Length and truth over the steps of some runs, by name."""
    figure = new_figure(6.5, 3)
    panels = figure.subplots(1, 2)
    words = []
    looks = ((VERMILLION, "--"), (BLUE, "-"), (PURPLE, ":"))
    for (name, pages), (color, style) in zip(runs.items(), looks, strict=False):
        steps = range(1, len(pages) + 1)
        lengths = [float(tokens_of(page).mean()) for page in pages]
        truth = [float(right_on(page).mean()) for page in pages]
        panels[0].plot(steps, smooth(lengths), style, color=color, lw=2, label=name)
        panels[1].plot(steps, truth, ".", color=color, alpha=0.5)
        panels[1].plot(steps, smooth(truth), style, color=color, lw=2)
        ends = f"from {np.mean(lengths[:4]):.0f} to {np.mean(lengths[-4:]):.0f} tokens"
        shares = f"from {np.mean(truth[:4]):.2f} to {np.mean(truth[-4:]):.2f} right"
        words.append(f"{name}: {ends}, {shares}")
    panels[0].legend(frameon=False, fontsize=8)
    tidy(panels[0], "What is written", "optimizer step", "tokens")
    tidy(panels[1], "The truth", "optimizer step", "share right")
    panels[1].set_ylim(0)
    count = len(next(iter(runs.values())))
    alt = f"Runs of {count} steps, means of the first and the last four. {'; '.join(words)}."
    return Plot(figure, alt)


def page_plot(pages: Sequence[Page], step: int) -> Plot:
    """A page of the diary: length and verdict of each completion, and the text of the longest."""
    page = pages[step - 1]
    right, tokens = right_on(page), tokens_of(page)
    figure = new_figure(6.5, 2.8)
    axes, words = figure.subplots(1, 2, width_ratios=[3, 2])
    y = np.random.default_rng(0).random(right.size)
    axes.plot(tokens[right], y[right], "o", color=BLUE, ms=5)
    axes.plot(tokens[~right], y[~right], "x", color=VERMILLION, ms=5)
    axes.set_xlim(0, max(int(tokens_of(p).max()) for p in pages) + 2)
    axes.set_yticks([])
    share = f"{right.mean():.0%} right"
    tidy(axes, f"Step {step}: {share}", "tokens; o right, x wrong (height is random)")
    asked, longest = page[int(tokens.argmax())]
    lines = [asked.question, ""]
    for line in longest.text.splitlines():
        lines += textwrap.wrap(line, 24) or [""]
    words.text(0, 1, "\n".join(lines[:11]), va="top", family="monospace", size=9)
    words.set_title("the longest", fontsize=11, loc="left")
    words.axis("off")
    alt = (
        f"Step {step}: {right.size} completions of {tokens.mean():.0f} tokens on average, "
        f"{share}, and the text of the longest one."
    )
    return Plot(figure, alt)


def exam_plot(right: Mapping[str, int], n: int) -> Plot:
    """Right answers of n with Wilson's interval, by name."""
    figure = new_figure(6.5, 0.7 + 0.4 * len(right))
    axes = figure.add_subplot()
    for i, k in enumerate(right.values()):
        w = wilson_interval(k, n)
        axes.hlines(i, 100 * w.low, 100 * w.high, color=BLUE, lw=2)
        axes.plot(100 * w.estimate, i, "o", color=BLUE)
        at, aside = (100 * w.high, i), (6, -3)
        axes.annotate(f"{k} of {n}", at, xytext=aside, textcoords="offset points", fontsize=8)
    axes.set_yticks(range(len(right)), list(right))
    axes.set_xlim(0, 100)
    axes.set_ylim(len(right) - 0.5, -0.5)
    tidy(axes, "", "greedy exact match (%)", grid="x")
    words = ", ".join(f"{name} {k} of {n}" for name, k in right.items())
    return Plot(figure, f"Held-out exact match with intervals: {words}.")


def penalty_plot(sizes: ArrayLike, paid: ArrayLike, penalty: ArrayLike) -> Plot:
    """A reward for length and the length penalty against the length."""
    figure = new_figure(6.5, 2)
    axes = figure.add_subplot()
    axes.plot(sizes, paid, "--", color=VERMILLION)
    axes.plot(sizes, penalty, color=BLUE)
    axes.text(20, 0.62, "longer_is_better", color=VERMILLION, ha="center")
    axes.text(20, -0.35, "make_length_penalty", color=BLUE, ha="center")
    tidy(axes, "", "length", "reward")
    alt = (
        "Two rewards against length: longer_is_better rises from zero to one; the length "
        "penalty is zero up to its soft limit and then falls to minus one at the hard limit."
    )
    return Plot(figure, alt)
