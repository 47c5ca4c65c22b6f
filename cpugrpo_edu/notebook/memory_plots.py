"""The pictures of chapter 9: what a training step holds, and what checkpointing saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cpugrpo_edu.engine.sizes import models_that_fit
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
from cpugrpo_edu.show.text import gib

MIB, GIB = 2**20, 2**30

PARTS = {
    "weights": (BLUE, ""),
    "gradients": (GREEN, "//"),
    "optimizer": (ORANGE, ".."),
    "activations": (VERMILLION, "xx"),
    "logits": (PURPLE, "--"),
}


def stacked_parts(found: Mapping[str, Mapping[str, int]], title: str, limit: float) -> Plot:
    """Bars of the five parts of a step's memory, for each way to train; ``limit`` in GiB."""
    figure = new_figure(6.5, 3.2)
    axes = figure.subplots()
    left = np.zeros(len(found))
    for part, (colour, hatch) in PARTS.items():
        width = np.array([parts[part] / GIB for parts in found.values()])
        axes.barh(
            list(found), width, left=left, color=colour, hatch=hatch, edgecolor="white", label=part
        )
        left += width
    axes.invert_yaxis()
    axes.set_xlim(0, limit)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    tidy(axes, title, "GiB, estimated", grid="x")
    said = ", ".join(f"{way} {gib(parts['total'])}" for way, parts in found.items())
    return Plot(figure, f"Stacked bars of estimated memory. {title}: {said}.")


def ledger_and_growth(counted: Mapping[str, float], grown: Mapping[str, float]) -> Plot:
    """Paired bars (MiB) after each phase of a step: what must be there, and what RSS grew by."""
    figure = new_figure(6.5, 3)
    axes = figure.subplots()
    at = np.arange(len(grown))
    axes.bar(at - 0.2, list(counted.values()), 0.38, color=GREY, label="ledger")
    looks: dict[str, Any] = {"color": BLUE, "hatch": "//", "edgecolor": "white"}
    axes.bar(at + 0.2, list(grown.values()), 0.38, label="growth of RSS", **looks)
    axes.set_xticks(at, [f"after {name}" for name in grown])
    axes.legend(frameon=False, loc="upper left")
    tidy(axes, "One training step", "", "MiB")
    said = "; ".join(f"{name} {counted[name]:.0f} and {grown[name]:.0f}" for name in grown)
    return Plot(figure, f"Paired bars in MiB, ledger and growth of RSS, after {said}.")


def activations(lengths: Sequence[int], counted: Sequence[int], formula: Sequence[int]) -> Plot:
    """Bytes of activations of two sequences, counted and by the formula, against their length."""
    off = max(abs(f / c - 1) for c, f in zip(counted, formula, strict=True))
    return curves(
        {
            "counted": (lengths, [c / MIB for c in counted]),
            "formula": (lengths, [f / MIB for f in formula]),
        },
        "Activations of two sequences",
        "tokens in each",
        "MiB",
        from_zero=True,
        alt=f"Two lines through zero, {off:.0%} apart at most.",
    )


def peak_by_block(
    layers: Sequence[int], measured: Sequence[float], formula: Sequence[float]
) -> Plot:
    """Peak bytes of a checkpointed step against the layers in a block."""
    lowest = [layers[list(ys).index(min(ys))] for ys in (measured, formula)]
    return curves(
        {
            "measured": (layers, [y / MIB for y in measured]),
            "formula": (layers, [y / MIB for y in formula]),
        },
        "Peak against block size",
        "layers in a block",
        "MiB",
        from_zero=True,
        alt="Peak memory of blocks of several sizes: the lowest is measured with blocks of "
        f"{lowest[0]}, and the formula's with {lowest[1]}.",
    )


def held_by_step(held: Mapping[str, Sequence[float]]) -> Plot:
    """MiB that autograd holds after each step, a curve for each loop."""
    said = ", ".join(f"{name} {after[-1]:.0f} MiB" for name, after in held.items())
    steps = range(1, 1 + max(map(len, held.values())))
    return curves(
        {name: (steps, after) for name, after in held.items()},
        "Held after each step",
        "step",
        "MiB",
        ticks=steps,
        alt=f"Held after the last step: {said}.",
    )


def mountain(history: Sequence[float], title: str, beside: Sequence[float] = ()) -> Plot:
    """Bytes that autograd holds over the events of a step, and another step's ``beside`` it."""
    figure = new_figure(6.5, 2.6)
    axes = figure.subplots()
    for held, colour, name in ((beside, GREY, "without"), (history, BLUE, "with")):
        share = np.linspace(0, 1, len(held))
        height = np.array(held) / MIB
        if colour == BLUE:
            axes.fill_between(share, height, color=colour, label=name, step="post")
        elif len(held):
            axes.plot(share, height, color=colour, ls="--", label=name)
    if len(beside):
        axes.legend(frameon=False, loc="upper right")
    peak = f"peak {max(history) / MIB:.1f} MiB"
    tidy(axes, f"{title}: {peak}", "forward and back (share of events)", "MiB held")
    other = f", beside one with a peak of {max(beside) / MIB:.1f} MiB" if len(beside) else ""
    return Plot(figure, f"Bytes held by autograd over a step. {title}: {peak}{other}.")


def models(available: int) -> Plot:
    """What known small models need, with so many GiB available."""
    figure = new_figure(6.8, 3.4)
    axes = figure.subplots()
    rows = models_that_fit(available * GIB)
    at = np.arange(len(rows))
    kinds = (("evaluate", GREEN, "^"), ("lora", ORANGE, "s"), ("full", VERMILLION, "o"))
    for kind, colour, marker in kinds:  # marks, for bars have no length on a logarithmic axis
        needed = [row[f"{kind}_bytes"] / GIB for row in rows]
        axes.plot(needed, at, marker, color=colour, ms=7, label=kind)
    names = [f"{row['name']}: {row['verdict']}" for row in rows]
    axes.set_yticks(at, names, fontsize=8)
    axes.axvline(0.8 * available, color=GREY, ls="--")
    axes.set_xscale("log")
    axes.set_xlim(0.005, 60)
    axes.set_xticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    tidy(axes, f"{available} GiB available, verdict beside the name", "GiB needed", grid="both")
    return Plot(figure, f"Needed memory with {available} GiB available. {'; '.join(names)}.")
