"""The pictures of chapter 11: rounding, an INT8 policy and its gradient, four bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpugrpo_edu.notebook.number_formats import NF4_VALUES
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

Rounding = Callable[[Tensor], tuple[Tensor, float]]
"""From numbers to what is stored of them, and the scale."""


def staircase(w: Tensor, rounding: Rounding, bits: int) -> Plot:
    """What is stored of each number, and the errors of a real matrix."""
    figure = new_figure(6.5, 2.8)
    stairs, errors = figure.subplots(1, 2)
    line = torch.linspace(float(w.min()), float(w.max()), 1500)
    stairs.plot(line, line, ":", c=GREY)
    stairs.plot(line, rounding(line)[0], c=BLUE)
    tidy(stairs, f"{bits} bits", "number", "what is stored")
    stored, scale = rounding(w)
    errors.hist((w - stored).flatten(), 60, color=ORANGE, alpha=0.8)
    for end in (-scale / 2, scale / 2):
        errors.axvline(end, c=VERMILLION, ls="--")
    errors.set_yticks([])
    errors.locator_params(axis="x", nbins=4)
    tidy(errors, "errors of real weights", "error", grid="x")
    return Plot(
        figure,
        f"Left, the staircase of {bits} bits around the diagonal. Right, the errors of a weight "
        "matrix; all lie between the dashed lines at half a step.",
    )


def dots_by_kind(values: Mapping[str, Sequence[float]], title: str, x: str, level: float) -> Plot:
    """One dot for each layer, a line of dots for each kind, and a line at ``level``."""
    rng = np.random.default_rng(0)
    figure = new_figure(6.5, 0.9 + 0.6 * len(values))
    axes = figure.subplots()
    for i, (points, colour, marker) in enumerate(
        zip(values.values(), (BLUE, ORANGE, GREEN), "oD^", strict=False)
    ):
        spread = i + rng.uniform(-0.15, 0.15, len(points))
        axes.plot(points, spread, marker, c=colour, ms=5, alpha=0.7)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(-0.5, len(values) - 0.5)
    axes.axvline(level, c=GREY, ls=":")
    tidy(axes, title, x, "", "x")
    ranges = ", ".join(f"{name} {min(v):.2f} to {max(v):.2f}" for name, v in values.items())
    return Plot(figure, f"One dot for each linear layer. {x}: {ranges}.")


def two_ways(
    points: Mapping[str, tuple[Sequence[Any], Sequence[float]]],
    title: str,
    x: str,
    y: str,
    **more: Any,
) -> Plot:
    """Crosses against circles: the same errors with one scale for all and with one for each row.

    ``more``: ``log``, a logarithmic y axis from 0.1 to 200; ``names``, of the places on the x axis;
    ``alt``, instead of the median of each.
    """
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    for (name, (at, error)), colour, marker in zip(
        points.items(), (VERMILLION, BLUE), "xo", strict=False
    ):
        axes.plot(at, error, marker, c=colour, ms=5, label=name)
    if more.get("log"):
        axes.set_yscale("log")
        axes.set_ylim(0.1, 200)
    else:
        axes.set_ylim(0)
    if names := more.get("names"):
        axes.set_xticks(range(len(names)), names)
    axes.legend(frameon=False, ncols=2, loc="upper right")
    tidy(axes, title, x, y)
    said = ", ".join(f"{name} {np.median(error):.2g}" for name, (_, error) in points.items())
    return Plot(figure, more.get("alt") or f"{title}. Median of the {y}: {said}.")


def outliers(found: Mapping[str, Sequence[float]]) -> Plot:
    """The median token's error (per cent) in each layer, from first to last, by name."""
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    looks = zip((BLUE, GREEN, VERMILLION, ORANGE), ("o-", "^:", "D--", "s:"), strict=True)
    for (name, errors), (colour, style) in zip(found.items(), looks, strict=False):
        depth = np.linspace(0, 1, len(errors))
        axes.plot(depth, errors, style, c=colour, ms=4, label=name)
    axes.legend(frameon=False, fontsize=8)
    axes.set_ylim(0)
    title = "Inputs of down_proj, rounded to 8 bits"
    tidy(axes, title, "depth of the layer", "error of the median token, %")
    worst = ", ".join(f"{name} {max(errors):.0f} %" for name, errors in found.items())
    return Plot(figure, f"Error of the median token against the layer's depth; worst: {worst}.")


def interval_rows(rows: Mapping[str, Mapping[str, Any]], margin: float, first: str) -> Plot:
    """Paired intervals of a difference, in points; the row called ``first`` stands out."""
    figure = new_figure(6.5, 0.6 + 0.28 * len(rows))
    axes = figure.subplots()
    for y, (name, row) in enumerate(rows.items()):
        colour, marker = (GREEN, "D") if name == first else (BLUE, "o")
        axes.plot([100 * row["low"], 100 * row["high"]], [y, y], c=colour)
        axes.plot(100 * row["difference"], y, marker, c=colour)
    axes.axvline(0, c=GREY, ls=":")
    axes.axvline(-100 * margin, c=VERMILLION, ls="--")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.invert_yaxis()
    tidy(axes, "", "INT8 minus float, points of exact match (95 %)", "", "x")
    said = "; ".join(f"{name} {100 * row['difference']:+.1f}" for name, row in rows.items())
    return Plot(figure, f"Paired intervals of INT8 minus float, in points. Middles: {said}.")


def speedups(found: Mapping[str, Sequence[float]], rows: Sequence[int]) -> Plot:
    """Time in float32 over time in INT8 against the rows in the batch, by matrix."""
    figure = new_figure(7, 3)
    axes = figure.subplots()
    for (name, ratios), colour, marker in zip(
        found.items(), (ORANGE, GREEN, BLUE), "oDs", strict=False
    ):
        axes.plot(rows, ratios, marker + "-", c=colour, label=name)
    axes.axhline(1, c=VERMILLION, ls="--", label="break-even")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(rows, [str(n) for n in rows])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    title = "One linear layer: time in float32 / time in INT8"
    tidy(axes, title, "rows in the batch", "speed-up (below 1: slower)", "both")
    said = "; ".join(
        f"{name} " + ", ".join(f"{ratio:.1f}" for ratio in ratios) for name, ratios in found.items()
    )
    return Plot(figure, f"Speed-up for {', '.join(map(str, rows))} rows: {said}.")


def ratios(per_token: Tensor, per_text: Tensor, lengths: Sequence[int]) -> Plot:
    """Log importance ratios: of tokens, and of completions against their length."""
    figure = new_figure(6.5, 2.8)
    left, right = figure.subplots(1, 2)
    left.hist(per_token.log(), np.linspace(-0.6, 0.6, 61), color=BLUE)
    left.set_yscale("log")
    tidy(left, "tokens", "log ratio, nats", "number of tokens")
    right.plot(lengths, per_text.log(), "o", c=ORANGE, ms=3, alpha=0.5)
    right.axhline(0, c=GREY, ls=":")
    tidy(right, "completions", "length, tokens", "log ratio, nats")
    return Plot(
        figure,
        f"Left, a histogram of token log-ratios, from {per_token.log().min():.2f} to "
        f"{per_token.log().max():.2f} nats. Right, log-ratios of completions against their "
        f"length, from {per_text.log().min():.2f} to {per_text.log().max():.2f}.",
    )


def error_curves(
    bits: int, pi: Tensor, mu: Tensor, moments: Mapping[str, tuple[float, float]]
) -> Plot:
    """The rounded policy against the float one; the gradient's error against the samples.

    ``moments``: relative (bias, variance) of each estimator.
    """
    figure = new_figure(6.5, 3)
    left, right = figure.subplots(1, 2)
    left.loglog(pi, mu, "o", c=BLUE, ms=4, alpha=0.6)
    left.loglog([1e-5, 1], [1e-5, 1], ":", c=GREY)
    left.set(xlim=(1e-5, 1), ylim=(1e-5, 1))
    tidy(left, f"{bits} bits", "float policy", "rounded policy", "both")
    n = np.geomspace(1, 1e6, 50)
    for (name, (bias, variance)), colour, style in zip(
        moments.items(), (VERMILLION, ORANGE, BLUE), ("--", "-.", "-"), strict=True
    ):
        right.loglog(n, np.sqrt(bias**2 + variance / n), style, c=colour, label=name)
    right.set_ylim(1e-4, 100)
    right.legend(frameon=False)
    tidy(right, "", "completions averaged", "relative error", "both")
    said = ", ".join(f"{name} {bias:.3f}" for name, (bias, _) in moments.items())
    return Plot(
        figure,
        f"Left, outcome probabilities of the policy rounded to {bits} bits against the float one. "
        f"Right, relative error of the gradient against samples, down to the bias: {said}.",
    )


def best_limits(limits: Any, found: Sequence[tuple[float, float]], samples: Sequence[int]) -> Plot:
    """The error of truncated importance sampling against the limit, the best one marked."""
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    said = []
    for n, colour, style in zip(samples, (BLUE, ORANGE), ("-", "--"), strict=False):
        error = np.array([(bias**2 + variance / n) ** 0.5 for bias, variance in found])
        axes.loglog(limits, error, style, c=colour, label=f"{n:,} samples")
        best = int(error.argmin())
        axes.plot(limits[best], error[best], "D", c=colour)
        said.append(f"{limits[best]:.2f} for {n:,} samples")
    axes.legend(frameon=False)
    tidy(axes, "", "truncation limit C", "relative error", "both")
    return Plot(figure, f"Relative error against the limit C; the best is {' and '.join(said)}.")


def grids(w: Tensor) -> Plot:
    """Sixteen even values and the sixteen of NF4, under a histogram of a block's weights."""
    figure = new_figure(6.5, 2.6)
    axes = figure.subplots()
    shares = w.unflatten(-1, (-1, 64)) / w.unflatten(-1, (-1, 64)).abs().amax(-1, keepdim=True)
    axes.hist(shares.flatten(), 80, color=GREY, alpha=0.5)
    top = axes.get_ylim()[1]
    for values, height, colour, marker, name in (
        (torch.arange(-8, 8) / 8, 0.12, VERMILLION, "|", "Q4_0: even"),
        (NF4_VALUES, 0.06, BLUE, "x", "NF4: quantiles"),
    ):
        axes.plot(values, [height * top] * 16, marker, c=colour, ms=9, label=name)
    axes.legend(frameon=False, loc="upper right")
    axes.set_yticks([])
    tidy(axes, "Real weights, divided by the largest of their block", "weight", grid="x")
    return Plot(
        figure,
        "Histogram of weights over the largest of their block, most near zero. Below it, sixteen "
        "even values, and the sixteen of NF4, which lie closer together near zero.",
    )


def kl_by_bits(found: Mapping[str, Mapping[str, tuple[float, float]]]) -> Plot:
    """KL against the bits of a weight, for each model: {model: {format: (bits, KL)}}."""
    figure = new_figure(6.5, 3)
    axes = figure.subplots()
    for (model, formats), colour, marker in zip(
        found.items(), (BLUE, VERMILLION), "oD", strict=False
    ):
        for name, (bits, kl) in formats.items():
            axes.semilogy(bits, max(kl, 1e-6), marker, c=colour, ms=7)
            axes.annotate(f" {name}", (bits, max(kl, 1e-6)), fontsize=8, va="center")
        axes.plot([], [], marker, c=colour, label=model)
    axes.legend(frameon=False)
    axes.margins(x=0.15)
    tidy(
        axes,
        "Rounded weights, float activations",
        "bits a weight, scales included",
        "KL, nats a token",
        "both",
    )
    said = "; ".join(
        f"{model}: " + ", ".join(f"{name} {kl:.2g}" for name, (_, kl) in formats.items())
        for model, formats in found.items()
    )
    return Plot(figure, f"KL from the float policy against the bits of a weight. {said}.")
