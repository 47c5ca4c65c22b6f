"""The figures of chapter 16: gradients on several ranks, and what they cost to exchange."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cpugrpo_edu.show.palette import BLUE, GREEN, GREY, VERMILLION, Plot, new_figure, tidy


def imbalance_plot(full: Tensor, wrong: Tensor, here: int, there: int, limit: float) -> Plot:
    """A gradient and the mean of two ranks' means, parameter by parameter."""
    figure = new_figure(6.5, 2.6)
    axes = figure.subplots()
    at = np.arange(full.numel())
    axes.bar(at - 0.2, full.flatten().numpy(), 0.4, color=BLUE, label="one process")
    second = axes.bar(
        at + 0.2, wrong.flatten().numpy(), 0.4, color=VERMILLION, label="mean of means"
    )
    for bar in second:
        bar.set_hatch("//")
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper left")
    axes.set(ylim=(-limit, limit), xticks=[])
    tidy(axes, f"{here} tokens on rank 0, {there} on rank 1", "parameter", "gradient")
    off = float((wrong - full).norm() / full.norm())
    alt = (
        f"Gradient of every parameter, computed by one process and as the mean of two ranks' "
        f"means with {here} and {there} tokens. The second is off by {off:.0%} of the "
        "gradient's length."
    )
    return Plot(figure, alt)


def ring_plot(counts: NDArray[np.float64], step: int) -> Plot:
    """How many ranks' contributions each piece holds: (ranks, pieces)."""
    n = len(counts)
    figure = new_figure(6.5, 2.6)
    axes = figure.subplots()
    axes.imshow(counts, cmap="cividis", vmin=0, vmax=n, aspect="auto")
    for (rank, piece), held in np.ndenumerate(counts):
        color = "white" if held < n - 1 else "black"
        axes.text(piece, rank, f"{held:.0f}", color=color, ha="center", va="center")
    axes.set(xticks=range(n), yticks=range(n))
    phase = "adding up" if step < n else "passing on"
    title = f"after {step} steps" + (f" ({phase})" if step else "")
    tidy(axes, title, "piece of the gradient", "rank", grid="both")
    axes.grid(visible=False)
    done = int((counts == n).sum())
    alt = (
        f"{n} ranks by {n} pieces after {step} steps of the ring: {done} of the {counts.size} "
        f"cells hold the sum over all {n} ranks."
    )
    return Plot(figure, alt)


def threads_plot(crowded: float, split: float) -> Plot:
    """Seconds of a matrix product with the threads as inherited and as split."""
    figure = new_figure(6.5, 1.8)
    axes = figure.subplots()
    axes.barh([1, 0], [1e3 * crowded, 1e3 * split], color=[VERMILLION, BLUE])
    axes.set(yticks=[0, 1], yticklabels=["threads split", "as inherited"])
    tidy(axes, "512 x 512 matrix product on two ranks", "ms", "", grid="x")
    alt = (
        f"A matrix product while both ranks compute: {1e3 * crowded:.1f} ms with the threads as "
        f"inherited, {1e3 * split:.1f} ms with the threads split between them."
    )
    return Plot(figure, alt)


def change_plot(alone: Tensor, others: Mapping[str, Tensor]) -> Plot:
    """The change of each weight in two runs against that in the run with accumulation."""
    figure = new_figure(6.5, 2.9)
    panels = figure.subplots(1, 2, sharey=True)
    words = []
    for axes, (name, other), color in zip(panels, others.items(), (BLUE, VERMILLION), strict=True):
        axes.plot(alone, other, ".", ms=3, color=color)
        axes.axline((0, 0), slope=1, color=GREY, lw=1)
        tidy(axes, name, "change, accumulation 2", "", grid="both")
        axes.ticklabel_format(style="sci", scilimits=(0, 0))
        off = float((other - alone).norm() / alone.norm())
        words.append(f"{name}: off the diagonal by {off:.1e} of the change's length")
    panels[0].set_ylabel("change, the other run")
    alt = f"Change of many weights against that in the run with accumulation. {'; '.join(words)}."
    return Plot(figure, alt)


def speedup_plot(machines: ArrayLike, gains: Mapping[str, ArrayLike], cable: str) -> Plot:
    """Speed relative to one machine against the number of machines."""
    machines = np.asarray(machines)
    figure = new_figure(6.5, 2.9)
    axes = figure.subplots()
    axes.plot(machines, machines, color=GREY, ls="--", lw=1, label="ideal")
    words = []
    for (name, gain), (color, marker) in zip(
        gains.items(), ((VERMILLION, "s"), (BLUE, "o")), strict=True
    ):
        axes.plot(machines, gain, color=color, marker=marker, ms=4, label=name)
        words.append(f"{np.asarray(gain)[-1]:.2f} with {name}")
    axes.axhline(1, color="black", lw=0.8)
    axes.set(ylim=(0, machines[-1] + 0.5), xlim=(0.5, machines[-1] + 0.5))
    axes.legend(fontsize=8, frameon=False)
    tidy(axes, cable, "machines", "times one machine")
    alt = (
        f"Speed relative to one machine against the number of machines at {cable}. With "
        f"{machines[-1]}: {', '.join(words)}; {machines[-1]} would be ideal."
    )
    return Plot(figure, alt)


def wire_plot(sizes: Mapping[str, float]) -> Plot:
    """Bytes on the wire on a logarithmic axis: points, since bars would need a zero."""
    order = sorted(sizes, key=lambda name: sizes[name])
    figure = new_figure(6.5, 2.2)
    axes = figure.subplots()
    axes.plot([sizes[name] for name in order], range(len(order)), "o", ms=8, color=GREEN)
    axes.set_yticks(range(len(order)), order)
    axes.set(xscale="log", xlim=(1e4, 1e10), ylim=(-0.5, len(order) - 0.5))
    tidy(axes, "Bytes on the wire", "bytes, logarithmic", "", grid="both")
    words = ", ".join(f"{name} {sizes[name]:.1e}" for name in order)
    return Plot(figure, f"Bytes on a logarithmic axis, fewest first: {words}.")
