"""The pictures of chapter 10: weights of tokens, padding, plans, and groups without a signal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from torch import Tensor

from cpugrpo_edu.engine.sizes import plan_micro_batch
from cpugrpo_edu.show.palette import (
    BLUE,
    GREY,
    ORANGE,
    VERMILLION,
    Plot,
    new_figure,
    tidy,
)


def histogram(lengths: Tensor) -> Plot:
    """The lengths of the completions of one step."""
    figure = new_figure(6.5, 2.6)
    axes = figure.subplots()
    axes.hist(lengths.numpy(), bins=range(0, int(lengths.max()) + 4, 3), color=BLUE)
    tidy(axes, f"{len(lengths)} completions of one step", "tokens", "completions")
    return Plot(
        figure,
        f"Histogram of {len(lengths)} lengths, median {int(lengths.median())} and maximum "
        f"{int(lengths.max())} tokens.",
    )


def token_weights(size: int, lengths: Tensor, relative: Tensor) -> Plot:
    """The weight of a token over its right weight, against the length of its completion."""
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    axes.scatter(lengths.numpy(), relative.numpy(), s=16, color=VERMILLION, alpha=0.6)
    axes.axhline(1, color=GREY, ls="--")
    axes.set_yscale("log")
    axes.set_ylim(0.03, 30)
    axes.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    title = f"micro-batches of {size}: weight of a token, right weight = 1"
    tidy(axes, title, "length of its completion (tokens)", "weight")
    return Plot(
        figure,
        f"Relative weight of a token with micro-batches of {size}, from {relative.min():.2f} to "
        f"{relative.max():.2f}; right would be 1.",
    )


def error_table(errors: Tensor, rows: Sequence[str], columns: Sequence[str]) -> Plot:
    """Relative errors as a coloured table; what rounds to zero is written 0."""
    figure = new_figure(6.5, 3.4)
    axes = figure.subplots()
    axes.imshow(errors.clamp(max=1).numpy(), cmap="cividis", aspect="auto")
    said = []
    for i, row in enumerate(errors.tolist()):
        words = ["0" if value < 1e-5 else f"{value:.2f}" for value in row]
        for j, (text, value) in enumerate(zip(words, row, strict=True)):
            colour = "white" if value < 0.5 else "black"
            axes.text(j, i, text, ha="center", va="center", color=colour)
        said.append(f"{rows[i]}: {', '.join(words)}")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    tidy(axes, "Relative error of the token weights", grid="x")
    axes.grid(False)
    return Plot(figure, f"Errors for {', '.join(columns)}. {'; '.join(said)}.")


def shuffled_weights(
    lengths: Tensor, exact: Tensor, right: Tensor, mean: Tensor, error: Tensor
) -> Plot:
    """The naive weight over all shuffles, exact and sampled (with standard errors), and the
    right one."""
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    at = np.arange(len(lengths))
    axes.bar(at - 0.2, exact.numpy(), 0.38, color=VERMILLION, label="naive, exact")
    look: dict[str, Any] = {"fmt": "o", "color": "black", "capsize": 4}
    axes.errorbar(
        at - 0.2, mean.numpy(), 1.96 * error.numpy(), label="naive, shuffles, 95 %", **look
    )
    style: dict[str, Any] = {"color": BLUE, "hatch": "//", "edgecolor": "white"}
    axes.bar(at + 0.2, right.numpy(), 0.38, label="right", **style)
    axes.set_xticks(at, [f"length {n}" for n in lengths.tolist()])
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, "Weight of one token, averaged over all shuffles", "", "weight")
    said = ", ".join(
        f"length {n} {a:.3f} instead of {b:.3f}"
        for n, a, b in zip(lengths.tolist(), exact.tolist(), right.tolist(), strict=True)
    )
    return Plot(figure, f"Bars of the expected naive weight: {said}.")


Parts = Sequence[Mapping[str, Tensor]]
"""Micro-batches in TRL's layout."""


def padding_share(parts: Parts) -> float:
    """Share of positions (prompt and completion) that are padding."""
    masks = [part[name] for part in parts for name in ("prompt_mask", "completion_mask")]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def padding_picture(parts: Parts, width: int) -> Tensor:
    """(rows, width): 0 outside, 1 padding, 2 real; micro-batches from top to bottom."""
    lines = []
    for part in parts:
        real = torch.cat([part["prompt_mask"], part["completion_mask"]], 1)
        line = torch.zeros(len(real), width)
        line[:, : real.shape[1]] = 1 + real
        lines.append(line)
    return torch.cat(lines)


def padding(ways: Mapping[str, Parts], width: int, size: int) -> Plot:
    """Real tokens and padding of the same rows, cut into micro-batches in two ways."""
    figure = new_figure(6.8, 3.2)
    panels = figure.subplots(1, len(ways), sharey=True)
    look: dict[str, Any] = {
        "cmap": ListedColormap(["white", ORANGE, BLUE]),
        "vmin": 0,
        "vmax": 2,
        "aspect": "auto",
        "interpolation": "nearest",
    }
    said = []
    for axes, (name, parts) in zip(panels, ways.items(), strict=True):
        axes.imshow(padding_picture(parts, width).numpy(), **look)
        said.append(f"{name}: {padding_share(parts):.0%} padding")
        tidy(axes, said[-1], "position", "completion")
        axes.grid(False)
    panels[-1].set_ylabel("")
    return Plot(figure, f"The batch in micro-batches of {size}. {', '.join(said)}.")


def plan(fitting: int, rows: int = 32) -> Plot:
    """Micro-batches of as many rows as fit, and evened out."""
    figure = new_figure(6.5, 2.4)
    axes = figure.subplots()
    even = plan_micro_batch(fitting, 1, rows, safety=1.0)
    for y, size, colour in ((1, fitting, ORANGE), (0, even, BLUE)):
        for start in range(0, rows, size):
            width = min(size, rows - start)
            axes.barh(y, width, left=start, color=colour, edgecolor="white", lw=2)
            place: dict[str, Any] = {"ha": "center", "va": "center", "color": "white"}
            axes.text(start + width / 2, y, str(width), **place)
    axes.set_yticks([1, 0], ["as many as fit", "evened out"])
    axes.set_xlim(0, rows)
    title = f"{fitting} fit at once: peak {even} instead of {min(fitting, rows)}"
    tidy(axes, title, f"{rows} completions", grid="x")
    return Plot(figure, f"{rows} completions cut greedily, and evened out. {title}.")


def silent_groups(
    size: int, tried: Tensor, enumerated: Sequence[float], sampled: Any = None
) -> Plot:
    """The share of groups of ``size`` without a signal against the probability of a right
    answer; where given, enumerated values and (shares, standard errors) of sampled groups."""
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    p = torch.linspace(0, 1, 101)
    axes.plot(p, p**size + (1 - p) ** size, color=BLUE, label="formula")
    if sampled is not None:
        shares, errors = sampled
        axes.plot(tried.numpy(), enumerated, "x", color="black", label="enumerated")
        look: dict[str, Any] = {"fmt": "o", "ms": 4, "capsize": 3, "color": ORANGE}
        axes.errorbar(tried.numpy(), shares, 1.96 * np.array(errors), label="sampled, 95 %", **look)
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False)
    tidy(
        axes,
        f"G = {size}: share of groups without signal",
        "probability of a right answer",
        "share",
    )
    return Plot(
        figure,
        f"Share of groups without signal for G = {size}: one at both ends, lowest in the middle "
        f"at {2 * 0.5**size:.3g}.",
    )
