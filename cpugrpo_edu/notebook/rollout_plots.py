"""The figures of chapter 5: what a rollout costs, row by row and token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

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


def medians(seconds: ArrayLike, window: int = 15) -> NDArray[np.float64]:
    """Median of each window, in milliseconds: one hiccup is no trend."""
    found = np.asarray(seconds, dtype=float)
    whole = found[: len(found) // window * window].reshape(-1, window)
    return np.array(1e3 * np.median(whole, axis=1))


def token_cost_plot(loops: Mapping[str, ArrayLike], window: int = 15) -> Plot:
    """Milliseconds of each token (seconds given) for two ways to decode."""
    figure = new_figure(6.5, 3)
    axes = figure.subplots()
    words = []
    looks = (("o-", VERMILLION), ("s--", BLUE))
    for (name, seconds), (style, color) in zip(loops.items(), looks, strict=True):
        ms = medians(seconds, window)
        axes.plot(np.arange(len(ms)) * window + window / 2, ms, style, ms=4, c=color, label=name)
        words.append(f"{name} from {ms[0]:.1f} to {ms[-1]:.1f} ms")
    axes.set_ylim(0)
    axes.legend(frameon=False)
    tidy(axes, "What one more token costs", "token number", "ms per token")
    return Plot(figure, f"Milliseconds per token, first to last: {', '.join(words)}.")


def batching_plot(rows: ArrayLike, step_ms: ArrayLike, fitted_ms: ArrayLike) -> Plot:
    """Milliseconds of a step against its rows, measured and fitted; both axes logarithmic."""
    rows, step_ms = np.asarray(rows), np.asarray(step_ms)
    figure = new_figure(6.5, 3)
    axes = figure.subplots()
    axes.loglog(rows, step_ms[0] * rows, ":", c=GREY, label="each row like the first")
    axes.loglog(rows, fitted_ms, "--", c=ORANGE, label="fixed + rows x cost per row")
    axes.loglog(rows, step_ms, "o-", c=BLUE, label="measured")
    axes.set_xticks(rows, [str(n) for n in rows])
    axes.minorticks_off()
    axes.legend(frameon=False)
    tidy(axes, "A step of many rows", "rows in the batch", "ms for one token each", "both")
    pairs = ", ".join(f"{n} rows {ms:.1f} ms" for n, ms in zip(rows, step_ms, strict=True))
    return Plot(figure, f"Time of a step against its rows, both axes logarithmic: {pairs}.")


def floors_plot(name: str, parameters: float, bandwidth: float, arithmetic: float) -> Plot:
    """Ceiling of tokens per second of a float32 model; bytes and operations per second given."""
    rows = np.geomspace(1, 512, 60)
    read, compute = 4 * parameters / bandwidth, 2 * parameters * rows / arithmetic
    knee = 4 * arithmetic / (2 * bandwidth)
    figure = new_figure(6.5, 3)
    axes = figure.subplots()
    axes.loglog(rows, rows / read, ":", c=GREY)
    axes.loglog(rows, rows / compute, "-.", c=GREY)
    axes.loglog(rows, rows / np.maximum(read, compute), c=BLUE, lw=2.5)
    axes.axvline(knee, c=VERMILLION, ls="--", lw=1)
    axes.text(knee * 1.1, 0.06, "bound by arithmetic", c=VERMILLION)
    axes.text(knee / 1.1, 0.06, "bound by memory", c=VERMILLION, ha="right")
    axes.set_ylim(0.03, 3e6)
    title = f"Ceiling for {name} parameters in fp32 on this machine"
    tidy(axes, title, "rows in the batch", "tokens per second", "both")
    alt = (
        f"The ceiling of tokens per second against rows for {name} parameters: it rises from "
        f"{1 / read:,.1f} with one row and is flat beyond {knee:.0f} rows, where arithmetic "
        "limits it. Larger models shift it down."
    )
    return Plot(figure, alt)


def prefill_plot(groups: Sequence[int], apart: Sequence[float], together: Sequence[float]) -> Plot:
    """Milliseconds of the prefill of G equal prompts, each for itself and once for all."""
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    axes.plot(groups, apart, "o-", c=VERMILLION, label="each row its own")
    axes.plot(groups, together, "s--", c=BLUE, label="once, then copied")
    axes.legend(frameon=False)
    axes.set_xticks(groups)
    axes.set_ylim(0)
    tidy(axes, "Prefill of 16 prompts", "completions per prompt G", "ms")
    alt = (
        f"Milliseconds for the prefill, for G from {groups[0]} to {groups[-1]}: each row its own "
        f"from {apart[0]:.0f} to {apart[-1]:.0f}, once and then copied from {together[0]:.0f} to "
        f"{together[-1]:.0f}."
    )
    return Plot(figure, alt)


def padding_plot(left_real: Tensor, right_real: Tensor) -> Plot:
    """Where prompts (True) and padding lie before the next three tokens: (rows, columns)."""
    import torch

    figure = new_figure(6.5, 2.3)
    titles = ("padding on the left", "padding on the right")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, real, title in zip(panels, (left_real, right_real), titles, strict=True):
        steps = torch.full((len(real), 3), 2)
        grid = torch.cat([real.long(), steps], 1)
        axes.imshow(grid.numpy(), aspect="auto", cmap="cividis", interpolation="nearest")
        axes.set_yticks([])
        tidy(axes, title, "column", "row", "x")
    alt = (
        f"Two grids of {len(left_real)} rows. On the left the padding (dark) comes first and "
        "every prompt (grey) touches the new tokens (yellow). On the right, padding stands "
        "between the shorter prompts and the new tokens."
    )
    return Plot(figure, alt)


def distance_plot(
    ways: Sequence[str], models: Mapping[str, Sequence[float]], least: float = 1e-9
) -> Plot:
    """Distances of each way on a logarithmic axis; what is below ``least`` has a mark at its end.

    A logarithmic axis has no zero, and "exactly equal" is the best result there is.
    """
    figure = new_figure(6.5, 3)
    axes = figure.subplots()
    looks = (("o", BLUE, -0.12), ("D", ORANGE, 0.12))
    words = []
    for (name, found), (marker, color, shift) in zip(models.items(), looks, strict=True):
        y = np.arange(len(ways)) + shift
        seen = np.array(found)
        tiny = seen < least
        axes.plot(seen[~tiny], y[~tiny], marker, ms=8, c=color, label=name)
        axes.plot(np.full(tiny.sum(), least), y[tiny], "<", ms=8, c=color, mfc="none")
        pairs = zip(ways, seen, strict=True)
        words.append(f"{name}: {'; '.join(f'{way} {x:.1g}' for way, x in pairs)}")
    axes.legend(loc="center", bbox_to_anchor=(0.55, 0.5))
    axes.set_xscale("log")
    axes.set_xlim(least / 2, 2)
    ticks = 10.0 ** np.arange(-8, 1, 2)
    axes.set_xticks([least, *ticks], ["0", *(f"$10^{{{round(np.log10(x))}}}$" for x in ticks)])
    axes.minorticks_off()
    axes.set_yticks(np.arange(len(ways)), list(ways))
    axes.invert_yaxis()
    title = "How far from the prompt alone? (open triangle: equal)"
    tidy(axes, title, "total variation distance, the worst prompt", grid="both")
    return Plot(figure, f"Distances, the worst prompt each. {'. '.join(words)}.")


def alive_plot(alive: Sequence[int], rows: int) -> Plot:
    """How many of the rows still run at each step."""
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    axes.stairs(alive, fill=True, color=BLUE, alpha=0.5)
    axes.axhline(rows, c=GREY, ls="--")
    axes.text(len(alive), 0.97 * rows, "all rows", ha="right", va="top")
    tidy(axes, "Who is still talking?", "step (tokens)", "rows not yet ended")
    half = sum(n >= rows / 2 for n in alive)
    alt = (
        f"The number of unfinished rows against the step. It starts at {rows}, is below half "
        f"of that after {half} steps, and the last row ends after {len(alive)}."
    )
    return Plot(figure, alt)


def retiring_plot(share: float, sizes: Sequence[int], alive: Sequence[int], copies: int) -> Plot:
    """Rows computed at each step upon the rows still running."""
    wasted = 1 - sum(alive) / sum(sizes)
    title = f"{wasted:.0%} of the work wasted, {copies} copies of the cache"
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    axes.stairs(sizes, fill=True, color=ORANGE, alpha=0.6)
    axes.stairs(alive, fill=True, color=BLUE)
    tidy(axes, title, "step (tokens)", "rows computed")
    alt = (
        "Rows computed per step (orange) above rows still running (blue), when the batch is "
        f"made smaller below a share of {share}: {title}."
    )
    return Plot(figure, alt)


def counts_plot(
    counts: Mapping[str, ArrayLike], exact: NDArray[np.float64], p_values: Mapping[str, float]
) -> Plot:
    """By how many standard errors the counts of each completion miss its exact probability."""
    figure = new_figure(6.5, 3)
    axes = figure.subplots()
    order = np.argsort(-exact)
    words = []
    looks = zip("os^x", (BLUE, GREEN, ORANGE, VERMILLION), strict=True)
    for (name, found), (marker, color) in zip(counts.items(), looks, strict=True):
        count = np.asarray(found)
        n, p = count.sum(), p_values[name]
        z = (count - n * exact) / np.sqrt(n * exact * (1 - exact))
        label = f"{name}, p = {p:.2f}" if p > 1e-3 else f"{name}, p < 0.001"
        axes.plot(z[order], marker, c=color, ms=4, label=label)
        words.append(f"{label}, at most {np.abs(z).max():.1f}")
    axes.axhspan(-2, 2, color=GREY, alpha=0.2)
    axes.set_yscale("symlog", linthresh=4)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
    axes.set_ylim(-60, 400)
    ticks = [-10, -2, 0, 2, 10, 100]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    x, y = "completion, most probable first", "standard errors off"
    tidy(axes, "Counted against enumerated", x, y)
    alt = (
        f"For each of the {len(exact)} completions, by how many standard errors the counts miss "
        f"the exact probability, with a band of two. {'; '.join(words)} standard errors off."
    )
    return Plot(figure, alt)


def speed_plot(rates: Mapping[str, float]) -> Plot:
    """Tokens per second of several ways to decode."""
    figure = new_figure(6.5, 2.6)
    axes = figure.subplots()
    colors: list[Any] = [VERMILLION, ORANGE, GREY, GREEN, BLUE]
    bars = axes.barh(list(rates), list(rates.values()), color=colors[: len(rates)])
    axes.bar_label(bars, [f" {v:,.0f}" for v in rates.values()])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(rates.values()))
    tidy(axes, "", "tokens per second, the better of 2", grid="x")
    words = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    return Plot(figure, f"Tokens per second: {words}.")
