"""Curves and bars of the chapters: what is drawn stays in the cell, how is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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

STYLES = (
    *((BLUE, "o-"), (ORANGE, "s--"), (GREEN, "^-."), (VERMILLION, "D:")),
    *((PURPLE, "x-"), (GREY, "v--")),
)
"""Colour, marker and line of the first, second, ... curve: never told apart by colour alone."""


def log_axes(axes: Any, log: str, ticks: Sequence[float] | None) -> None:
    """Logarithmic axes ("x", "y" or "xy") whose ticks are plain numbers; ``ticks`` are those of x
    on any axis."""
    for name in log:
        getattr(axes, f"set_{name}scale")("log")
    if ticks is not None:
        axes.set_xticks(ticks, [f"{at:g}" for at in ticks])
        axes.xaxis.minorticks_off()
    if "y" in log:
        axes.yaxis.set_major_formatter("{x:g}")


def draw_curves(axes: Any, series: Mapping[str, tuple[Any, Any]], styles: Sequence[Any]) -> None:
    """One curve for each entry: its name and its (x, y)."""
    for (name, (x, y)), (colour, style) in zip(series.items(), styles, strict=False):
        axes.plot(x, y, style, color=colour, label=name, ms=4)


def curves(
    series: Mapping[str, tuple[Any, Any]],
    title: str = "",
    x: str = "",
    y: str = "",
    *,
    alt: str,
    log: str = "",
    ticks: Sequence[float] | None = None,
    level: float | None = None,
    from_zero: bool = False,
    styles: Sequence[tuple[str, str]] = STYLES,
    height: float = 2.8,
) -> Plot:
    """Curves by name, each (x, y), with a legend if there are several.

    ``log`` names logarithmic axes, ``ticks`` the numbers on the x axis; ``level`` is a dashed
    line to compare with; ``from_zero`` lets the y axis begin at 0.
    """
    figure = new_figure(6.5, height)
    axes = figure.subplots()
    draw_curves(axes, series, styles)
    log_axes(axes, log, ticks)
    if level is not None:
        axes.axhline(level, color=GREY, ls="--", lw=1)
    if from_zero:
        axes.set_ylim(0)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9)
    tidy(axes, title, x, y, grid="both")
    return Plot(figure, alt)


def bars(
    values: Mapping[str, float],
    title: str = "",
    y: str = "",
    *,
    alt: str = "",
    colours: Sequence[str] | str = BLUE,
    level: float | None = None,
    fmt: str = "{:.0f}",
    height: float = 2.6,
) -> Plot:
    """Bars by name on a linear axis that begins at zero, each with its number.

    Without ``alt`` the picture's words are its numbers.
    """
    figure = new_figure(6.5, height)
    axes = figure.subplots()
    drawn = axes.bar(list(values), list(values.values()), color=colours, width=0.6)
    axes.bar_label(drawn, [fmt.format(value) for value in values.values()], fontsize=8)
    if level is not None:
        axes.axhline(level, color=GREY, ls="--", lw=1)
    axes.margins(y=0.12)
    tidy(axes, title, "", y)
    said = ", ".join(f"{name} {fmt.format(value)}" for name, value in values.items())
    return Plot(figure, alt or f"Bars, {y or title}: {said}.")


def panels(
    rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], step: str, alt: str
) -> Plot:
    """A small curve over ``step`` for each key of ``names``, two beside each other."""
    figure = new_figure(6.8, 1.8 * ((len(names) + 1) // 2))
    for i, (key, title) in enumerate(names.items()):
        axes = figure.add_subplot((len(names) + 1) // 2, 2, i + 1)
        points = [(row[step], row[key]) for row in rows if row.get(key) is not None]
        axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", ms=4)
        tidy(axes, title, step if i >= len(names) - 2 else "")
    return Plot(figure, alt)
