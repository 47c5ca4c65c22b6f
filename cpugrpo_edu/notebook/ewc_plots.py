"""The figures of chapter 14: tasks learned in a row, the pull of springs, runs with and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cpugrpo_edu.record.stats import over_seeds
from cpugrpo_edu.show.palette import (
    BLUE,
    GREY,
    ORANGE,
    VERMILLION,
    Plot,
    new_figure,
    tidy,
)


def stage_table(
    table: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str]
) -> Plot:
    """Accuracy by stage (rows) and task (columns) as a map with its numbers."""
    figure = new_figure(6.5, 3.2)
    axes = figure.subplots()
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    for i, row in enumerate(table):
        for j, cell in enumerate(row):
            axes.text(j, i, f"{cell:.2f}", ha="center", va="center")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    tidy(axes, "Held-out accuracy", "task")
    axes.grid(False)
    said = "; ".join(
        f"{name}: {', '.join(f'{x:.2f}' for x in row)}"
        for name, row in zip(rows, table, strict=True)
    )
    return Plot(figure, f"Accuracy on {', '.join(columns)}. {said}.")


def compromise_picture(
    strength: float,
    springs: Mapping[str, Tensor],
    minimum: Callable[[float, Tensor], Tensor],
    losses: Sequence[Callable[[Tensor], Tensor]],
    places: Sequence[Tensor],
) -> Plot:
    """Task A's valley, and where the minimum of B's loss plus springs lies as lambda grows.

    ``minimum(lambda, stiffness)`` is that minimum, ``losses`` are those of A and B, ``places``
    their minima; ``springs`` are two kinds by name.
    """
    figure = new_figure(6.5, 3.4)
    axes = figure.subplots()
    x, y = torch.meshgrid(torch.linspace(-1, 2.5, 80), torch.linspace(-0.8, 1.7, 80), indexing="xy")
    rings = [0.05, 0.2, 0.5, 1.0, 2.0, 4.0]
    valley = losses[0](torch.stack([x, y], dim=-1))
    axes.contour(x, y, valley, levels=rings, colors=GREY, alpha=0.5)
    every = [0.0, *torch.logspace(-2, 3, 60).tolist()]
    words = []
    for (name, stiff), (colour, look) in zip(
        springs.items(), ((BLUE, "-o"), (VERMILLION, "--s")), strict=True
    ):
        axes.plot(*torch.stack([minimum(s, stiff) for s in every]).T, look[:-1], color=colour, lw=1)
        point = minimum(strength, stiff)
        axes.plot(*point, look[-1], color=colour, ms=9, label=name)
        words.append(f"{name} {float(losses[0](point)):.2f} and {float(losses[1](point)):.2f}")
    for name, place, mark in zip("AB", places, "*P", strict=True):
        axes.plot(*place, f"k{mark}", ms=10)
        axes.annotate(name, tuple(place.tolist()), (8, 4), textcoords="offset points")
    axes.legend(frameon=False, loc="upper left")
    title = f"lambda {strength:g}; loss of A and B: {', '.join(words)}"
    tidy(axes, title, "first weight (slack)", "second weight (stiff)")
    return Plot(
        figure,
        f"Contours of task A's long valley, the minima A and B, and the compromise for {title}. "
        "With equal springs it lies on the straight line from B to A; with EWC it first "
        "drops into the valley, then moves along its floor.",
    )


def dots(values: Mapping[str, Sequence[float]], title: str, x: str) -> Plot:
    """A row for each name: a dot a seed, and a diamond at the mean."""
    figure = new_figure(6.5, 0.45 * len(values) + 0.9)
    axes = figure.subplots()
    means = []
    for y, each in enumerate(values.values()):
        axes.plot(each, [y] * len(each), "o", color=BLUE, alpha=0.5)
        means.append(sum(each) / len(each))
        axes.plot(means[-1], y + 0.25, "D", color=ORANGE)
        axes.text(means[-1], y - 0.2, f"{means[-1]:.2f}", ha="center", size=8)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.6)
    axes.set_xlim(0, 1)
    tidy(axes, title, x, grid="x")
    said = ", ".join(f"{name} {mean:.2f}" for name, mean in zip(values, means, strict=True))
    return Plot(figure, f"{title}, a dot a seed; means: {said}.")


def stages_with_and_without(
    grids: Mapping[str, Tensor], levels: Sequence[str], names: Mapping[str, str]
) -> Plot:
    """Exact match in % after each stage, means over seeds with 95 % t intervals.

    ``grids`` are (seeds, stages, levels) by arm, the first stage before training.
    """
    figure = new_figure(6.5, 3)
    said = []
    for j, (axes, level) in enumerate(zip(_panels(figure, len(levels)), levels, strict=True)):
        for shift, (arm, colour, look) in enumerate(
            zip(grids, (BLUE, VERMILLION), ("o-", "s--"), strict=True)
        ):
            runs = [over_seeds(x.tolist()) for x in 100 * grids[arm][:, :, j].T]
            axes.errorbar(
                [i + 0.1 * shift - 0.05 for i in range(len(runs))],
                [r.mean for r in runs],
                yerr=[r.high - r.mean for r in runs],
                fmt=look,
                ms=4,
                capsize=3,
                color=colour,
                label=names[arm],
            )
            said.append(f"{level} {names[arm]} " + ", ".join(f"{r.mean:.0f}" for r in runs))
        axes.set_xticks(range(len(runs)), ["base", *range(1, len(runs))])
        tidy(axes, f"{level} problems", "after stage", "" if j else "exact match, %")
        if j == 0:
            axes.legend(frameon=False, fontsize=8)
    return Plot(
        figure,
        "Exact match in percent before training and after each stage, means over seeds with 95 % t "
        f"intervals: {'; '.join(said)}.",
    )


def _panels(figure: Any, count: int) -> Any:
    return figure.subplots(1, count, sharey=True)
