"""The figures of chapter 17: groups with a signal, the pilot, accuracy after training by arm.

Shares and accuracies are fractions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cpugrpo_edu.record.stats import wilson_interval
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

Rewards = Mapping[str, NDArray[np.float64]]
"""By difficulty, (prompts, G)."""


def signal_plot(group: int, marked: Sequence[float] = (0.01, 0.07, 0.8)) -> Plot:
    """The share of groups that hold right and wrong completions, by the rate of right ones."""

    def mixed(p: NDArray[np.float64] | float) -> NDArray[np.float64]:
        return np.asarray(1 - np.power(p, group) - np.power(1 - np.asarray(p), group))

    figure = new_figure(6.5, 2.6)
    axes = figure.subplots()
    p = np.linspace(0, 1, 401)
    axes.plot(p, mixed(p), color=BLUE, lw=2)
    axes.fill_between(p, mixed(p), color=BLUE, alpha=0.12)
    facts = []
    for at, mark in zip(marked, "vos", strict=True):
        share = float(mixed(at))
        axes.plot(at, share, mark, color=VERMILLION, ms=7)
        axes.annotate(f"{share:.0%}", (at + 0.02, share - 0.05), fontsize=8)
        facts.append(f"{share:.0%} at {at}")
    axes.set(xlim=(0, 1), ylim=(0, 1.05))
    title = f"Groups of {group}: how many carry a signal"
    tidy(axes, title, "probability p of a right completion", "share mixed")
    return Plot(
        figure,
        f"Share of groups of {group} with both right and wrong completions against the success "
        f"rate: {', '.join(facts)}, zero at both ends.",
    )


def pilot_plot(exact: Rewards, graded: Rewards, names: Sequence[str]) -> Plot:
    """Left, how many sampled completions are right; right, how many groups' rewards differ."""
    figure = new_figure(6.5, 2.7)
    left, right = figure.subplots(1, 2)
    facts = []
    for x, (level, name) in enumerate(zip(exact, names, strict=True)):
        hits = exact[level].ravel()
        w = wilson_interval(int(hits.sum()), hits.size)
        sides = [[w.estimate - w.low], [w.high - w.estimate]]
        left.errorbar(x, w.estimate, sides, fmt="o", color=BLUE, capsize=5)
        moving = [float(np.mean(r[level].std(axis=1) > 0)) for r in (exact, graded)]
        for shift, share, colour, hatch in zip(
            (-0.2, 0.2), moving, (BLUE, ORANGE), ("", "//"), strict=True
        ):
            right.bar(x + shift, share, 0.38, color=colour, hatch=hatch)
        facts.append(
            f"{name}: {w.estimate:.0%} right ({w.low:.0%} to {w.high:.0%}), groups with a signal "
            f"{moving[0]:.0%} exact, {moving[1]:.0%} graded"
        )
    for axes in (left, right):
        axes.set(xticks=range(len(names)), xticklabels=names, ylim=(0, 1.05))
        axes.set(xlim=(-0.5, len(names) - 0.5))
    right.legend(["exact", "graded"], fontsize=8, frameon=False)
    tidy(left, "Right when sampled", "", "share, 95 % interval")
    tidy(right, "Groups with a signal", "", "share of groups")
    return Plot(figure, f"The pilot. {'; '.join(facts)}.")


def ends_plot(
    start: Sequence[float], arms: Mapping[str, Sequence[Sequence[float]]], names: Sequence[str]
) -> Plot:
    """Accuracy after training, a dot a run, by arm and difficulty; dashed, before training.

    ``arms`` holds for each arm and difficulty the accuracies of its runs.
    """
    figure = new_figure(6.5, 2.9)
    axes = figure.subplots()
    looks = list(zip((BLUE, ORANGE, GREEN), "oDs", strict=True))[: len(arms)]
    facts = []
    for x, name in enumerate(names):
        axes.plot(
            [x - 0.3, x + 0.3],
            [start[x]] * 2,
            color=GREY,
            ls="--",
            label="start" if not x else None,
        )
        said = []
        for i, ((arm, ends), (colour, mark)) in enumerate(zip(arms.items(), looks, strict=True)):
            at = x + 0.24 * (i - (len(arms) - 1) / 2)
            label = arm if not x else None
            axes.plot([at] * len(ends[x]), ends[x], mark, color=colour, ms=7, label=label)
            said.append(f"{arm} {', '.join(f'{end:.2f}' for end in ends[x])}")
        facts.append(f"{name}: start {start[x]:.2f}, {', '.join(said)}")
    axes.set(xticks=range(len(names)), xticklabels=names, ylim=(-0.05, 1.05))
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    tidy(axes, "Trained on five letters only", "held-out prompts", "exact match")
    return Plot(figure, f"Exact match on held-out prompts after training. {'; '.join(facts)}.")
