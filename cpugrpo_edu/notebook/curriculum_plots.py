"""The figures of chapter 12: difficulty, mixed groups, stages and the race of orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpugrpo_edu.curriculum import make_stages
from cpugrpo_edu.data import DIFFICULTIES
from cpugrpo_edu.record.stats import over_seeds, wilson_interval
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

Numbers = NDArray[np.float64]

LEVEL_COLOURS: dict[str, str] = dict(zip(DIFFICULTIES, (GREEN, ORANGE, VERMILLION), strict=True))
HATCH: dict[str, str] = dict(zip(DIFFICULTIES, ("", "//", "xx"), strict=True))
LOOKS = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (ORANGE, "D"))
ARM_STYLE: dict[str, dict[str, Any]] = {
    "curriculum": {"color": BLUE, "marker": "o", "ls": "-"},
    "no replay": {"color": PURPLE, "marker": "D", "ls": "-."},
    "mixed": {"color": GREY, "marker": "s", "ls": "--"},
    "reversed": {"color": VERMILLION, "marker": "^", "ls": ":"},
}


def success_by(rank: Numbers, text: Numbers, success: Numbers, domains: NDArray[np.str_]) -> Plot:
    """Success rate of single problems by label and by complexity of the text."""
    figure = new_figure(6.8, 3)
    axes = figure.subplots(1, 2)
    shown = success + np.random.default_rng(0).uniform(-0.02, 0.02, len(success))
    names = list(dict.fromkeys(domains))
    for i, (name, (colour, mark)) in enumerate(zip(names, LOOKS, strict=True)):
        here = domains == name
        look: dict[str, Any] = {
            "color": colour,
            "ms": 4,
            "alpha": 0.7,
            "label": name.replace("_", " "),
        }
        axes[0].plot(rank[here] + 0.15 * (i - 1.5), shown[here], mark, **look)
        axes[1].plot(text[here], shown[here], mark, **look)
    axes[0].set_xticks(range(3), DIFFICULTIES)
    axes[0].legend(fontsize=7)
    tidy(axes[0], "", "label", "success rate")
    tidy(axes[1], "", "complexity of the text")
    means = ", ".join(f"{x} {success[rank == i].mean():.2f}" for i, x in enumerate(DIFFICULTIES))
    texts = ", ".join(f"{x} {text[domains == x].mean():.0f}" for x in names)
    return Plot(
        figure,
        f"Success rates of single problems. Left by label, mean rates {means}. Right by complexity "
        f"of the text; its mean by domain: {texts}.",
    )


def mixed_groups(G: int, mixed: Any, success: Numbers, labels: NDArray[np.str_]) -> Plot:
    """The share of mixed groups, with the measured problems below."""
    figure = new_figure(6.5, 3)
    axes = figure.add_subplot()
    grid = np.linspace(0, 1, 201)
    axes.plot(grid, mixed(grid, G), color=BLUE, lw=2)
    for y, (label, colour) in enumerate(LEVEL_COLOURS.items()):
        here = np.sort(success[labels == label])
        at = here + np.linspace(-0.012, 0.012, len(here))
        axes.plot(at, np.full(len(here), -0.1 - 0.08 * y), "|", color=colour, ms=8)
        axes.text(1.04, -0.1 - 0.08 * y, label, color=colour, va="center")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.32, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    tidy(axes, f"G = {G}", "success rate p", "share of mixed groups")
    never = ", ".join(f"{x} {np.mean(success[labels == x] == 0):.0%}" for x in LEVEL_COLOURS)
    return Plot(
        figure,
        f"For G = {G} the share of mixed groups is 0 at success rates 0 and 1 and "
        f"{mixed(0.5, G):.2f} at one half. Marks below are the problems; never solved: {never}.",
    )


def alive_groups(rewards: Mapping[str, Numbers], labels: NDArray[np.str_]) -> Plot:
    """Share of groups with any difference in reward, by label; ``rewards`` are (groups, G)."""
    figure = new_figure(6.2, 2.8)
    axes = figure.add_subplot()
    said = []
    for shift, (name, reward), colour, mark in zip(
        (-0.1, 0.1), rewards.items(), (GREY, BLUE), "so", strict=True
    ):
        for x, label in enumerate(DIFFICULTIES):
            alive = np.ptp(reward[labels == label], axis=1) > 1e-9
            share = wilson_interval(int(alive.sum()), len(alive))
            spread = [[share.estimate - share.low], [share.high - share.estimate]]
            look: dict[str, Any] = {
                "fmt": mark,
                "color": colour,
                "capsize": 3,
                "label": "" if x else name,
            }
            axes.errorbar(x + shift, share.estimate, spread, **look)
            said.append(f"{name}, {label}: {share.estimate:.2f}")
    axes.set_xticks(range(3), DIFFICULTIES)
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8, loc="lower left")
    tidy(axes, "Groups that teach something", "", "share, 95 % interval")
    return Plot(figure, f"Share of groups with any difference in reward. {'; '.join(said)}.")


def stage_mixtures(replay: float) -> Plot:
    """The mixtures of the three orders as stacked bars."""
    figure = new_figure(6.8, 2.7)
    for i, order in enumerate(("curriculum", "mixed", "reversed")):
        axes = figure.add_subplot(1, 3, i + 1)
        bottom = np.zeros(3)
        stages = make_stages(order, replay=replay)
        for label, colour in LEVEL_COLOURS.items():
            share = np.array([stage.mixture[label] for stage in stages])
            look: dict[str, Any] = {
                "color": colour,
                "hatch": HATCH[label],
                "edgecolor": "white",
                "label": label,
            }
            axes.bar([1, 2, 3], share, bottom=bottom, **look)
            bottom += share
        tidy(axes, order, "stage", "" if i else "share of problems")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8)
    return Plot(
        figure,
        f"Stacked bars of three stages for three orders. With replay {replay:g}, {1 - replay:.0%} "
        "of a stage of the curriculum or its reverse have the stage's own label; mixed has thirds "
        "throughout.",
    )


def race(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Plot:
    """Training reward of each step, and held-out accuracy after each stage, against tokens."""
    figure = new_figure(6.8, 3)
    left, right = figure.subplots(1, 2)
    said = []
    for arm, stages in found.items():
        rows = [row for stage in stages for row in stage["steps"]]
        tokens = [row["tokens"] for row in rows]
        left.plot(tokens, [row["reward"] for row in rows], **ARM_STYLE[arm], ms=3)
        ends = [stage["steps"][-1]["tokens"] for stage in stages]
        right.plot(ends, [s["overall"] for s in stages], **ARM_STYLE[arm], ms=5, label=arm)
        said.append(f"{arm} " + ", ".join(f"{stage['overall']:.2f}" for stage in stages))
    right.legend(fontsize=8)
    tidy(left, "Training reward", "tokens generated", "mean of the step")
    tidy(right, "Held-out accuracy", "tokens generated", "share right")
    return Plot(
        figure,
        "Left: training reward against tokens, each arm on its own problems. Right: held-out "
        f"accuracy after each stage: {'; '.join(said)}.",
    )


def orders_by_seed(overall: Mapping[str, Numbers], base: str) -> Plot:
    """Final accuracy of each arm, a point a seed, and its paired differences to ``base``; in %."""
    figure = new_figure(6.8, 3)
    left, right = figure.subplots(1, 2)
    said = []
    for y, (arm, values) in enumerate(overall.items()):
        style = ARM_STYLE[arm]
        shown = [(left, values)]
        if arm != base:
            shown.append((right, values - overall[base]))
        for axes, each in shown:
            s = over_seeds(list(each))
            colour, mark = style["color"], style["marker"]
            axes.plot(each, np.full(len(each), y), mark, color=colour, ms=4, alpha=0.5)
            spread = [[s.mean - s.low], [s.high - s.mean]]
            axes.errorbar(s.mean, y + 0.25, xerr=spread, fmt=mark, color=colour, capsize=4)
            said.append(f"{arm} {s.mean:.1f} ({s.low:.1f} to {s.high:.1f})")
    for axes, title, x in ((left, "Accuracy at the end", "%"), (right, f"Minus {base}", "points")):
        axes.set_yticks(range(len(overall)), list(overall) if axes is left else [])
        axes.set_ylim(-0.5, len(overall) - 0.2)
        tidy(axes, title, x, grid="x")
    right.axvline(0, color=GREY, lw=1)
    return Plot(
        figure,
        "Left: final accuracy of each arm, one point a seed, with mean and interval; right: the "
        f"difference to {base}. In turn: {'; '.join(said)}.",
    )


def along_the_way(means: Mapping[str, Mapping[str, Sequence[float]]]) -> Plot:
    """Accuracy by label after each stage, a panel for each arm."""
    figure = new_figure(7, 2.7)
    said = []
    for i, (arm, levels) in enumerate(means.items()):
        axes = figure.add_subplot(1, len(means), i + 1)
        for mark, (label, values) in zip("os^", levels.items(), strict=True):
            axes.plot([1, 2, 3], values, marker=mark, color=LEVEL_COLOURS[label], label=label)
        axes.set_ylim(0, 0.8)
        axes.set_xticks([1, 2, 3])
        tidy(axes, arm, "after stage", "" if i else "share right")
        if i == 0:
            axes.legend(fontsize=7, loc="upper left")
        ends = ", ".join(f"{label} {values[-1]:.0%}" for label, values in levels.items())
        said.append(f"{arm}: {ends}")
    return Plot(
        figure,
        "Accuracy by label after each of three stages, a panel an arm, means over seeds. At the "
        f"end: {'; '.join(said)}.",
    )
