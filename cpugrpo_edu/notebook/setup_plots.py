"""The figures of chapter 0: groups of right and wrong completions, and a model's parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpugrpo_edu.show.palette import BLUE, GREY, ORANGE, Plot, new_figure, tidy


def groups(right: NDArray[np.bool_], step: int) -> Plot:
    """Right and wrong completions, (problems, completions), after some training steps."""
    figure = new_figure(6.5, 3.6)
    axes = figure.add_subplot()
    row, column = np.nonzero(right)
    axes.plot(column + 1, row + 1, "o", color=BLUE, ms=7, label="right")
    row, column = np.nonzero(~right)
    axes.plot(column + 1, row + 1, "x", color=ORANGE, ms=6, label="wrong")
    axes.set_xlim(0.5, right.shape[1] + 0.5)
    axes.set_ylim(len(right) + 0.5, 0.5)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    said = f"{right.sum()} of {right.size} are right"
    mixed = int((right.any(axis=1) & ~right.all(axis=1)).sum())
    tidy(axes, f"After {step} steps, {said}", "completion", "problem", grid="x")
    return Plot(
        figure,
        f"After {step} training steps {said}; {mixed} of {len(right)} groups hold both kinds.",
    )


PARTS = ("embedding", "attention", "MLP", "norms")


def part_sizes(model: Any) -> dict[str, int]:
    """Number of parameters by part of a transformer."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if "embed" in name or "lm_head" in name:
            part = "embedding"
        elif "self_attn" in name:
            part = "attention"
        else:
            part = "MLP" if "mlp" in name else "norms"
        sizes[part] += parameter.numel()
    return sizes


def shares(models: Mapping[str, Mapping[str, int]]) -> Plot:
    """Bars of each part's share of the parameters, for several models."""
    figure = new_figure(6.5, 2.4)
    axes = figure.add_subplot()
    facts = []
    for i, ((name, sizes), color) in enumerate(zip(models.items(), (BLUE, GREY), strict=True)):
        total = sum(sizes.values())
        y = np.arange(len(sizes)) + 0.4 * (i - 0.5)
        values = [100 * count / total for count in sizes.values()]
        label = f"{name}: {total:,} parameters"
        axes.barh(y, values, 0.38, color=color, label=label, hatch="//" * i)
        pairs = zip(sizes, values, strict=True)
        facts.append(f"{label}; {', '.join(f'{part} {v:.0f} %' for part, v in pairs)}")
    axes.set_yticks(range(len(PARTS)), PARTS)
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower right")
    tidy(axes, x="share of the parameters in %", grid="x")
    return Plot(figure, f"Bars of the share of each part. {'. '.join(facts)}.")
