"""The pictures of the chapter on variants: curves of races, curves of enumerations, weights.

Each says in its alternative text what its numbers are, so the words cannot leave the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor

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

LOOKS = [
    (VERMILLION, "--"),
    (BLUE, "-"),
    (GREEN, "-."),
    (ORANGE, ":"),
    (PURPLE, (0, (5, 1))),
    (GREY, (0, (1, 1))),
]

Panels = Mapping[str, Mapping[str, Any]]
"""Title of a panel: name of a line: its values."""


def plot_races(panels: Panels, y: Sequence[str], x: str = "step") -> Plot:
    """Means over runs with their 95 % t intervals as bands; each line is (steps + 1, R)."""
    figure = new_figure(*_size(panels))
    sentences = []
    for i, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for (name, values), (color, style) in zip(lines.items(), LOOKS):
            mean, half = _mean_and_half(values)
            at = torch.arange(len(mean))
            axes.fill_between(at, mean - half, mean + half, color=color, alpha=0.15, lw=0)
            axes.plot(at, mean, color=color, ls=style, label=name)
            sentences.append(f"{title}, {name}: from {mean[0]:.2f} to {mean[-1]:.2f}.")
        tidy(axes, title, x, y[i])
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    runs = next(iter(next(iter(panels.values())).values())).shape[1]
    return Plot(figure, f"Curves with bands, means of {runs} runs. " + " ".join(sentences))


def _size(panels: Panels) -> tuple[float, float]:
    return (5.0, 2.8) if len(panels) == 1 else (3.5 * len(panels), 2.8)


def _mean_and_half(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over runs and half the 95 % t interval, both (steps + 1,)."""
    n = values.shape[1]
    error = values.std(1, correction=1) / n**0.5
    return values.mean(1), float(stats.t.ppf(0.975, n - 1)) * error


def plot_lines(
    at: Sequence[float],
    panels: Panels,
    x: str,
    y: Sequence[str],
    marker: str = "",
) -> Plot:
    """Enumerated curves without error: each line is a sequence of values at ``at``."""
    figure = new_figure(*_size(panels))
    sentences = []
    for i, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for (name, values), (color, style) in zip(lines.items(), LOOKS):
            axes.plot(at, values, color=color, ls=style, marker=marker, ms=4, label=name)
            first, last = (0.0 if abs(v) < 1e-12 else v for v in (values[0], values[-1]))
            sentences.append(
                f"{title}, {name}: {first:.3g} at {at[0]:g}, {last:.3g} at {at[-1]:g}."
            )
        axes.axhline(0, color="black", lw=0.8)
        tidy(axes, title, x, y[i])
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    return Plot(figure, f"Lines over {x}. " + " ".join(sentences))


def plot_weighted(means: Mapping[str, float], old: float, new: float, title: str) -> Plot:
    """Means of one number under several weights, with the old and the new policy's own means."""
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    colors = [GREEN if abs(mean - new) < 1e-9 else VERMILLION for mean in means.values()]
    axes.scatter(range(len(means)), list(means.values()), color=colors, zorder=3)
    axes.axhline(new, color="black", lw=1, ls="--")
    axes.axhline(old, color=GREY, lw=1, ls=":")
    axes.text(len(means) - 0.5, new, " new", va="center")
    axes.text(len(means) - 0.5, old, " old", va="center", color=GREY)
    axes.set_xticks(range(len(means)), list(means))
    axes.set_xlim(-0.5, len(means) - 0.5)
    tidy(axes, title, y="mean of f")
    values = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
    return Plot(figure, f"{title}. Old policy {old:.4f}, new policy {new:.4f}; weighted: {values}.")
