"""The figures of a run: learning curves, accuracy, forgetting, time and memory.

Each says in its alternative text what it shows. The layout of a record's ``results`` is in
:mod:`cpugrpo_edu.show.report`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpugrpo_edu.record.metrics import Metrics
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.record.stats import difficulty_order, wilson_interval
from cpugrpo_edu.show.palette import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    Plot,
    new_figure,
    text_plot,
    tidy,
)
from cpugrpo_edu.show.text import clock_time, gib, percent

Floats = NDArray[np.float64]

PANELS = [
    # metric, title, unit of the axis, number in words, factor to the unit
    ("reward", "Reward", "mean over completions", "{:.2f}", 1.0),
    ("accuracy", "Accuracy of samples", "share right", "{:.2f}", 1.0),
    ("completion_length", "Completion length", "tokens", "{:.1f}", 1.0),
    ("kl", "KL to the reference", "nats per token", "{:.4f}", 1.0),
    ("entropy", "Entropy", "nats per token", "{:.3f}", 1.0),
    ("loss", "Loss", "loss", "{:.4f}", 1.0),
    ("clip_fraction", "Clip fraction", "share of tokens", "{:.3f}", 1.0),
    ("frac_zero_std", "Zero-variance groups", "share of groups", "{:.2f}", 1.0),
    ("tokens_per_second", "Rollout speed", "tokens per second", "{:.0f}", 1.0),
    ("rss_bytes", "Memory", "GiB", "{:.2f}", 2.0**-30),
    ("cpu_percent", "CPU", "% of one core", "{:.0f}", 1.0),
]


# Learning curves


def plot_learning(metrics: Sequence[Metrics], most: int = 4, columns: int = 2) -> Plot:
    """Learning curves over all steps: the first ``most`` of ``PANELS`` that were recorded.

    Thin lines are single steps, thick ones running means over a twentieth of the run; the band
    is one standard deviation of the reward; dashed lines separate stages.
    """
    recorded = [(panel, _series(metrics, panel[0])) for panel in PANELS]
    panels = [(panel, values) for panel, values in recorded if not np.isnan(values).all()][:most]
    if not panels:
        return text_plot("No learning curves: no step has been recorded.")
    stages = [str(row.get("stage", "")) for row in metrics]
    starts = {i: name for i, name in enumerate(stages) if i == 0 or name != stages[i - 1]}
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(3.7 * columns, 2.4 * rows)
    sentences = []
    for index, ((key, title, unit, form, factor), values) in enumerate(panels):
        values = factor * values
        axes = figure.add_subplot(rows, columns, index + 1)
        if key == "reward":
            sd = _series(metrics, "reward_std")
            steps = np.arange(1, len(values) + 1)
            axes.fill_between(steps, values - sd, values + sd, color=BLUE, alpha=0.12, lw=0)
        _draw_curve(axes, values)
        # In a row of small panels the names of the stages would be too many.
        _mark_stages(axes, starts, named=index == 0 or columns <= 2)
        tidy(axes, title, "optimizer step", unit)
        axes.locator_params(axis="x", integer=True)
        sentences.append(f"{title} ({unit}) {_curve_in_words(values, form)}")
    order = ", ".join(f"{name} from step {i + 1}" for i, name in starts.items() if name)
    alt = f"Line charts over {len(metrics)} optimizer steps" + (f" ({order})" if order else "")
    return Plot(figure, f"{alt}. {' '.join(sentences)}")


def _series(metrics: Sequence[Metrics], key: str) -> Floats:
    """One metric over the steps, (steps,); NaN where it was not measured."""
    values = [row.get(key) for row in metrics]
    return np.array([math.nan if v is None else float(v) for v in values])


def _draw_curve(axes: Any, values: Floats) -> None:
    steps = np.arange(1, len(values) + 1)
    window = max(1, len(values) // 20)
    parts = [values[max(0, i - window) : i] for i in steps]
    # np.nanmean would warn where a whole window is missing.
    smooth = [math.nan if np.isnan(part).all() else np.nanmean(part) for part in parts]
    axes.plot(steps, values, color=BLUE, alpha=0.4, lw=0.8)
    axes.plot(steps, smooth, color=BLUE, lw=2, marker="o" if len(steps) == 1 else None)


def _mark_stages(axes: Any, starts: Mapping[int, str], named: bool) -> None:
    """A dashed line where a stage begins, and its name at the top, in two alternating rows."""
    for i, (start, name) in enumerate(starts.items()):
        if start:
            axes.axvline(start + 0.5, color=GREY, ls="--", lw=0.8)
        if named:
            axes.annotate(
                name,
                (start + 1, 1),
                xycoords=("data", "axes fraction"),
                xytext=(2, -2 - 9 * (i % 2)),
                textcoords="offset points",
                fontsize=8,
                color=GREY,
                va="top",
            )


def _curve_in_words(values: Floats, form: str) -> str:
    seen = values[~np.isnan(values)]
    tenth = max(1, len(seen) // 10)
    numbers = (seen[:tenth].mean(), seen[-tenth:].mean(), seen.min(), seen.max())
    first, last, low, high = map(form.format, numbers)
    return (
        f"went from {first} in the first tenth to {last} in the last tenth, "
        f"between {low} and {high}."
    )


# Accuracy and forgetting


def evaluation_tables(record: RunRecord) -> dict[str, dict[str, Any]]:
    """The accuracy tables by label, in order of time."""
    return {e["label"]: e["table"] for e in record.results.get("evaluations", [])}


def before_and_after(record: RunRecord) -> list[dict[str, Any]]:
    """The first table, and the last one that is not of the quantized model."""
    full = [table for label, table in evaluation_tables(record).items() if "INT8" not in label]
    return [full[0], full[-1]] if len(full) > 1 else full


def cells_in_order(table: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and row of every domain x difficulty, difficulties from easy to hard."""
    for domain, cells in sorted(table["cells"].items()):
        for level in difficulty_order(cells):
            yield f"{domain}, {level}", cells[level]


def plot_accuracy(record: RunRecord) -> Plot:
    """Accuracy before and after, by domain x difficulty, with Wilson intervals."""
    tables = before_and_after(record)
    if not tables:
        return text_plot("No accuracies: this run has no evaluation.")
    columns = [{"all problems": t["overall"], **dict(cells_in_order(t))} for t in tables]
    names = list(columns[0])
    figure = new_figure(7, 1.1 + 0.32 * len(names))
    axes = figure.add_subplot()
    styles = [(GREY, "o", "none", -0.13), (BLUE, "s", BLUE, 0.13)]
    for table, column, (colour, marker, fill, shift) in zip(tables, columns, styles, strict=False):
        rows = [column[name] for name in names]
        axes.errorbar(
            [100 * r["accuracy"] for r in rows],
            [y + shift for y in range(len(rows))],
            xerr=[
                [100 * (r["accuracy"] - r["low"]) for r in rows],
                [100 * (r["high"] - r["accuracy"]) for r in rows],
            ],
            fmt=marker,
            color=colour,
            markerfacecolor=fill,
            capsize=2,
            label=table["label"],
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 102)
    confidence = round(100 * tables[0]["confidence"])
    tidy(axes, x=f"accuracy in % (bars: {confidence} % Wilson)", grid="both")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    facts = [f"{x} {' to '.join(percent(c[x]['accuracy']) for c in columns)}" for x in names]
    labels = " and ".join(table["label"] for table in tables)
    return Plot(
        figure, f"Dot chart of accuracy with intervals, {labels}, in % right: {'; '.join(facts)}."
    )


def plot_forgetting(record: RunRecord) -> Plot:
    """Accuracy on each difficulty after each stage, with Wilson intervals."""
    matrix = record.results.get("forgetting")
    if not matrix:
        return text_plot("No forgetting matrix: this run was not evaluated after its stages.")
    figure = new_figure(7, 3.2)
    axes = figure.add_subplot()
    columns, rows, facts = matrix["columns"], matrix["rows"], []
    for j, name in enumerate(columns):
        values = [row[j] for row in matrix["accuracy"]]
        n = matrix["n"][name]
        ends = [wilson_interval(round(v * n), n, matrix["confidence"]) for v in values]
        axes.errorbar(
            [i + 0.06 * (j - (len(columns) - 1) / 2) for i in range(len(rows))],
            [100 * v for v in values],
            yerr=[
                [100 * max(0, v - e.low) for v, e in zip(values, ends, strict=True)],
                [100 * max(0, e.high - v) for v, e in zip(values, ends, strict=True)],
            ],
            color=(BLUE, ORANGE, GREEN, PURPLE, VERMILLION)[j % 5],
            marker="os^Dv"[j % 5],
            capsize=2,
            label=name,
        )
        lost = matrix["forgetting"][name]
        facts.append(
            f"{name} {', '.join(percent(v) for v in values)}"
            + (f" (forgotten: {lost['points']:+.1f} points)" if lost else "")
        )
    axes.set_xticks(range(len(rows)), rows)
    axes.set_ylim(0, 103)
    tidy(axes, y="accuracy in %")
    figure.legend(loc="outside upper right", ncols=len(columns), frameon=False)
    return Plot(
        figure,
        f"Line chart of accuracy in order {', '.join(rows)}, by difficulty: {'; '.join(facts)}.",
    )


# Time and memory


def time_parts(record: RunRecord) -> dict[str, float]:
    """Seconds of each part, in the order of the run; what they leave of the total is "other"."""
    seconds = {k: v for k, v in record.results.get("seconds", {}).items() if v is not None}
    total = seconds.pop("total", None)
    order = [k for k in ("load", "train", "evaluate", "report") if k in seconds]
    parts = {k: seconds[k] for k in order + sorted(seconds.keys() - set(order))}
    if total is not None and (rest := total - sum(parts.values())) > 0.005 * total:
        parts["other"] = rest
    return parts


def plot_time_and_memory(record: RunRecord, metrics: Sequence[Metrics] = ()) -> Plot:
    """Where the seconds went, and the resident memory over the training steps."""
    parts = time_parts(record)
    memory = [row for row in metrics if row.get("rss_bytes") is not None and "time" in row]
    peak = record.results.get("peak_rss_bytes")
    if not parts and not memory:
        return text_plot("No times and no memory were recorded.")
    facts = []
    figure = new_figure(7, 2.6)
    panels = bool(parts) + bool(memory)
    if parts:
        axes = figure.add_subplot(1, panels, 1)
        bars = axes.barh(list(parts), list(parts.values()), color=BLUE)
        axes.bar_label(bars, [clock_time(s) for s in parts.values()], padding=3, fontsize=9)
        axes.margins(x=0.25)
        axes.invert_yaxis()
        tidy(axes, "Time", "seconds", grid="x")
        facts.append("Bars of time: " + ", ".join(f"{k} {clock_time(s)}" for k, s in parts.items()))
    if memory:
        axes = figure.add_subplot(1, panels, panels)
        start = memory[0]["time"]
        used = [row["rss_bytes"] / 2**30 for row in memory]
        axes.plot([row["time"] - start for row in memory], used, color=BLUE, marker=".")
        if peak is not None:
            axes.axhline(peak / 2**30, color=VERMILLION, ls="--", lw=1, label="peak of the run")
            axes.legend(loc="lower right", frameon=False, fontsize=9)
        axes.set_ylim(0, 1.15 * max([*used, (peak or 0) / 2**30]))
        tidy(axes, "Resident memory", "seconds since the first step", "GiB")
        facts.append(
            f"Line of resident memory while training: {min(used):.2f} to {max(used):.2f} GiB"
        )
    if peak is not None:
        facts.append(f"Peak of the run: {gib(peak)}")
    return Plot(figure, ". ".join(facts) + ".")
