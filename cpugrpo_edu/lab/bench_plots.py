"""Pictures of benchmark records, each with a text that says what it shows.

Colours are those of Okabe and Ito; nothing is shown by colour alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.cost import CostModel, StepSpec, fit_sweep
from cpugrpo_edu.lab.tables import TABLES
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.palette import BLUE, GREEN, GREY, ORANGE, VERMILLION, Plot, new_figure, tidy

PANELS = {
    "bench-b1": ("s a step", "peak GB"),
    "bench-b2": ("s a step", "peak GB"),
    "bench-b3": ("s a step", "peak GB"),
    "bench-ablate": ("s a step", "peak GB"),
    "bench-rollout": ("tokens/s", "peak GB"),
    "bench-train": ("rollout tokens/s", "tokens/s in all"),
}
"""Kind of record -> the columns of its table that are drawn."""


def plot_record(record: RunRecord) -> Plot:
    """The picture of a benchmark's record. UserError for a kind that has none."""
    if record.kind == "bench-sweep":
        return plot_sweep(record)
    if record.kind not in PANELS:
        known = ", ".join([*PANELS, "bench-sweep"])
        raise UserError(f"no plot for a record of kind {record.kind!r}; there are {known}")
    return plot_bars(record)


def plot_bars(record: RunRecord) -> Plot:
    """The columns of the record's table as horizontal bars, ours in another colour and hatched."""
    _, header, make_rows = TABLES[record.kind]
    rows = make_rows(record)
    names = [f"{row[0]} (G {row[1]})" if "G" in header else row[0] for row in rows]
    first = header.index(PANELS[record.kind][0])
    skipped = [name for name, row in zip(names, rows) if not is_number(row[first])]
    figure, facts = new_figure(7.4, 1.4 + 0.45 * (len(rows) - len(skipped))), []
    for panel, column in enumerate(PANELS[record.kind]):
        cells = zip(names, (row[header.index(column)] for row in rows))
        shown = [(name, cell) for name, cell in cells if is_number(cell)]
        axes = figure.add_subplot(1, len(PANELS[record.kind]), panel + 1)
        for at, (name, cell) in enumerate(shown):
            ours = name.startswith(("ours", "fast", "all on"))
            colour, hatch = (BLUE, "//") if ours else (ORANGE, None)
            axes.barh(at, float(cell), color=colour, hatch=hatch, alpha=0.85)
            axes.text(float(cell), at, f" {cell}", va="center", fontsize=9)
        axes.set_yticks(range(len(shown)), [name for name, _ in shown])
        axes.invert_yaxis()
        axes.margins(x=0.25)
        tidy(axes, x=column, grid="x")
        facts.append(f"{column}: " + ", ".join(f"{name} {cell}" for name, cell in shown))
    left_out = f" Skipped: {', '.join(skipped)}." if skipped else ""
    return Plot(figure, f"Bar charts, a bar a row of the table. {'; '.join(facts)}.{left_out}")


def is_number(cell: str) -> bool:
    return cell.replace(".", "").isdigit()


def plot_sweep(record: RunRecord) -> Plot:
    """Measured against predicted seconds, with the line of no error; and time over tokens."""
    points, model = record.results["points"], fit_sweep(record.results)
    figure = new_figure(7.4, 3.6)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for label, colour, marker in (
        ("INT8 base", BLUE, "o"),
        ("float32 base", ORANGE, "s"),
        ("bundled", GREEN, "^"),
    ):
        chosen = [(p, e) for p, e in zip(points, model.steps.errors) if kind_of(p) == label]
        measured = [p["step_seconds"] for p, _ in chosen]
        predicted = [p["step_seconds"] * (1 + e) for p, e in chosen]
        left.plot(measured, predicted, marker, color=colour, label=label, ls="")
    ends = [f(p["step_seconds"] for p in points) for f in (min, max)]
    for factor, style in ((1, "-"), (1.2, ":"), (0.8, ":")):
        left.plot(ends, [factor * end for end in ends], color=GREY, lw=1, ls=style)
    left.set_xscale("log")
    left.set_yscale("log")
    left.tick_params(which="minor", labelbottom=False)  # they overlap
    left.legend(frameon=False, fontsize=8)
    tidy(left, "Left out of the fit (dotted: ± 20 %)", x="measured s a step", y="predicted s")
    shared, series = longest_series(points, model)
    tokens = [t for t, _, _ in series]
    right.plot(tokens, [m for _, m, _ in series], "o", color=BLUE, label="measured")
    right.plot(tokens, [fitted for _, _, fitted in series], color=VERMILLION, label="fitted")
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=8)
    title = f"{shared.architecture.layers} layers, G = {shared.group}"
    tidy(right, title, x="tokens of a completion", y="s a step")
    sizes = sorted(map(abs, model.steps.errors))
    return Plot(
        figure,
        f"Left: predicted against measured seconds a step of {len(points)} points, each predicted "
        f"by a fit without it; mean error {sum(sizes) / len(sizes):.0%}, worst {sizes[-1]:.0%}. "
        "Right: seconds a step over the tokens of a completion, measured and fitted: "
        + "; ".join(f"{t:.0f} tokens {m:.2f} s and {p:.2f} s" for t, m, p in series)
        + ".",
    )


def kind_of(point: dict[str, Any]) -> str:
    if point["step"]["frozen"]:
        return "INT8 base"
    return "float32 base" if point["step"]["lora_rank"] else "bundled"


def longest_series(
    points: list[dict[str, Any]], model: CostModel
) -> tuple[StepSpec, list[tuple[float, float, float]]]:
    """The largest set of points that differ only in the tokens of a completion: what they share,
    and (tokens, measured seconds, fitted seconds) of each."""
    series: dict[StepSpec, list[tuple[float, float, float]]] = {}
    for point in points:
        step = StepSpec.from_json(point["step"])
        shared = replace(step, tokens=0, architecture=replace(step.architecture, name=""))
        times = (step.tokens, point["step_seconds"], model.step_seconds(step))
        series.setdefault(shared, []).append(times)
    shared, found = max(series.items(), key=lambda item: len(item[1]))
    return shared, sorted(found)
