"""The figures of chapter 13: curvature, forecasts and estimates of the Fisher information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cpugrpo_edu.notebook.pictures import curves
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

LOOKS = ((BLUE, "o"), (GREEN, "s"), (ORANGE, "^"), (VERMILLION, "v"), (PURPLE, "D"), (GREY, "x"))
HATCHES = ("", "", "", "//", "xx", "..")


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    x: str,
    y: str,
    **look: Any,
) -> Plot:
    """``pictures.curves`` whose words are the first and the last value of each curve."""
    said = "; ".join(
        f"{name or y} {ys[0]:.2g} at {xs[0]:.2g}, {ys[-1]:.2g} at {xs[-1]:.2g}"
        for name, (xs, ys) in series.items()
    )
    return curves(series, title, x, y, alt=f"{title} by {x}: {said}.", **look)


def coin(steps: Tensor, kl: Tensor, p: float) -> Plot:
    """KL after a step of the coin's weight, and the parabola of its Fisher p (1 - p)."""
    figure = new_figure(6.5, 3)
    axes = figure.subplots()
    axes.plot(steps, kl, color=BLUE, lw=2, label="KL")
    axes.plot(steps, p * (1 - p) * steps**2 / 2, "--", color=VERMILLION, label="½ F d²")
    axes.set_ylim(0, 1.2)
    axes.legend(frameon=False, loc="upper center")
    tidy(
        axes,
        f"heads with probability {p}: F = {p * (1 - p):.3f}",
        "change d of the weight",
        "nats",
    )
    return Plot(
        figure,
        "KL divergence and the parabola half F d squared against the change d of the weight, for a "
        f"coin with p = {p}; the two touch at d = 0 and part as d grows.",
    )


def coin_biases(p: Tensor, curves: Mapping[str, Tensor], m: float) -> Plot:
    """Fishers of a coin against its p, when a share m of the given labels is heads."""
    figure = new_figure(7, 3)
    axes = figure.subplots()
    for (name, values), colour, line in zip(
        curves.items(), (BLUE, ORANGE, VERMILLION), ("-", "--", ":"), strict=True
    ):
        axes.plot(p, values, line, color=colour, lw=2 if line == "-" else 1.5, label=name)
    axes.axvline(m, color=GREY, lw=0.8)
    axes.set_ylim(0, 0.7)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    title = f"{100 * m:.0f} % of the given labels are heads"
    tidy(axes, title, "policy's probability p of heads", "Fisher")
    return Plot(
        figure,
        f"True, EMPIRICAL and BATCHED Fisher of a coin against p when a share {m} of the given "
        "labels is heads. EMPIRICAL meets the truth where p equals that share.",
    )


def spectrum(eigenvalues: Tensor, rank: int) -> Plot:
    """Eigenvalues in falling order, and where they end."""
    figure = new_figure(6.5, 3)
    axes = figure.subplots()
    axes.semilogy(range(1, len(eigenvalues) + 1), eigenvalues, color=BLUE)
    axes.axvline(rank, color=GREY, ls="--")
    axes.annotate(f"rank {rank}", (rank, 1e-6), (8, 0), textcoords="offset points")
    tidy(axes, "Stiff and free directions", "direction", "curvature (eigenvalue)")
    return Plot(
        figure,
        f"{len(eigenvalues)} eigenvalues of the Fisher matrix in falling order, log scale, from "
        f"{float(eigenvalues[0]):.1g}; they drop to numerical zero after direction {rank}.",
    )


def columns(values: Mapping[str, Tensor], title: str, x: str) -> Plot:
    """A column of points for each name, log scale, with a line at 1."""
    figure = new_figure(6.5, 3)
    axes = figure.subplots()
    said = []
    for place, ((name, each), (colour, mark)) in enumerate(
        zip(values.items(), LOOKS, strict=False)
    ):
        jitter = torch.linspace(-0.2, 0.2, len(each))
        axes.semilogy(place + jitter, each, mark, color=colour)
        said.append(f"{name} {float(each.min()):.2g} to {float(each.max()):.2g}")
    axes.axhline(1, color=GREY, lw=0.8)
    axes.set_xticks(range(len(values)), list(values))
    tidy(axes, title, x, "ratio")
    return Plot(figure, f"{title}, columns of points on a log scale: {'; '.join(said)}.")


def estimates_against_truth(truth: Tensor, estimates: Mapping[str, Tensor]) -> Plot:
    """A panel for each estimate, a point for each weight."""
    figure = new_figure(6.5, 4.4)
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flatten()
    known, ends = truth > 1e-8, [1e-6, 100]
    for axes, (name, estimate) in zip(panels, estimates.items(), strict=True):
        axes.loglog(truth[known], estimate[known], ".", ms=3, alpha=0.5, color=BLUE)
        axes.plot(ends, ends, color=VERMILLION, lw=1)
        axes.set_xlim(ends)
        axes.set_ylim(ends)
        tidy(axes, name, grid="both")
    figure.supxlabel("true Fisher of a weight")
    figure.supylabel("estimate")
    return Plot(
        figure,
        "Scatter plots of estimated against true Fisher by weight, log scales, with the line of "
        f"equality: {', '.join(estimates)}. Lightning is a few flat bands.",
    )


def expectations(expected: Mapping[str, float], trials: Mapping[str, Tensor]) -> Plot:
    """Bars of exact expectations relative to the truth; dots of simulated means, two errors."""
    figure = new_figure(6.5, 3.2)
    axes = figure.subplots()
    colours = (BLUE, BLUE, BLUE, ORANGE, VERMILLION, PURPLE)
    for place, (name, height) in enumerate(expected.items()):
        axes.barh(place, height, color=colours[place], alpha=0.35, hatch=HATCHES[place])
        axes.text(height * 1.25, place + 0.02, f"{height:.2f}", va="center")
        if name in trials:
            trial = trials[name]
            error = 2 * float(trial.std(correction=1)) / len(trial) ** 0.5
            axes.errorbar(float(trial.mean()), place, xerr=error, fmt="k.", capsize=3)
    axes.axvline(1, color=GREY, ls="--")
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(expected)), list(expected))
    axes.invert_yaxis()
    tidy(axes, "Expected sum of the diagonal", "relative to the truth", grid="x")
    said = ", ".join(f"{name} {height:.2f}" for name, height in expected.items())
    return Plot(figure, f"Expected sum of the Fisher diagonal relative to the truth: {said}.")


def two_costs(
    counts: Sequence[int], errors: Mapping[str, Sequence[float]], passes: Mapping[str, int]
) -> Plot:
    """Error against completions, and against backward passes: ``passes`` for each completion."""
    figure = new_figure(6.5, 3)
    left, right = figure.subplots(1, 2, sharey=True)
    for (name, values), (colour, mark) in zip(errors.items(), LOOKS, strict=False):
        left.loglog(counts, values, f"{mark}-", color=colour, label=name)
        right.loglog([n * passes[name] for n in counts], values, f"{mark}-", color=colour)
    left.legend(frameon=False)
    tidy(left, "Per completion", "completions", "error / size of the truth")
    tidy(right, "Per backward pass", "backward passes")
    said = "; ".join(f"{n} from {v[0]:.2f} to {v[-1]:.2f}" for n, v in errors.items())
    return Plot(
        figure,
        f"Mean error on log scales from {counts[0]} to {counts[-1]} completions: {said}. On the "
        "right against backward passes, where exact is shifted to the right.",
    )


def agreement(matches: Mapping[str, Mapping[str, float]], kinds: Sequence[str]) -> Plot:
    """Rank correlations by kind of weight, a mark for each estimate."""
    figure = new_figure(6.5, 3)
    axes = figure.subplots()
    for shift, ((name, found), (colour, mark)) in enumerate(
        zip(matches.items(), LOOKS, strict=False)
    ):
        places = [i + 0.1 * (shift - 2) for i in range(len(kinds))]
        axes.plot(places, [found[kind] for kind in kinds], mark, color=colour, label=name)
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set_ylim(-1, 1.3)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.legend(frameon=False, ncols=5, fontsize=8, loc="upper center")
    tidy(axes, "Agreement with another set of rollouts", "", "rank correlation")
    said = "; ".join(
        f"{name} {', '.join(f'{kind} {found[kind]:.2f}' for kind in kinds)}"
        for name, found in matches.items()
    )
    return Plot(figure, f"Rank correlation of estimates with an independent one: {said}.")


def by_layer(maps: Mapping[str, Mapping[tuple[str, int], float]]) -> Plot:
    """Mean Fisher a weight by (kind, layer), a panel for each estimate."""
    figure = new_figure(6.5, 3.4)
    panels = figure.subplots(1, len(maps), sharey=True)
    looks = {
        "embedding": (GREY, "D"),
        "attention": (BLUE, "o-"),
        "mlp": (GREEN, "s--"),
        "norm": (VERMILLION, "^:"),
    }
    for axes, (name, places) in zip(panels, maps.items(), strict=True):
        for kind, (colour, line) in looks.items():
            layers = [layer for k, layer in places if k == kind]
            values = [places[kind, layer] for layer in layers]
            axes.semilogy(layers, values, line, color=colour, label=kind)
        tidy(axes, name, "layer (−1: outside the layers)")
    panels[0].set_ylabel("mean Fisher a weight")
    panels[-1].legend(frameon=False, fontsize=8)
    return Plot(
        figure,
        f"Mean Fisher a weight by layer and kind of weight, log scale; panels: {', '.join(maps)}.",
    )
