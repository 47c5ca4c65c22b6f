"""Pictures of benchmark records, each with a text that says what it shows.

Colours are those of Okabe and Ito; nothing is shown by colour alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.cost import CostModel, StepSpec, fit_sweep
from cpugrpo_edu.lab.tables import steady_seconds
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.palette import BLUE, GREEN, GREY, ORANGE, VERMILLION, Plot, new_figure, tidy


def bars(axes: Any, names: list[str], values: list[float], form: str, ours: str = "ours") -> None:
    """Horizontal bars with their values, ours in another colour and hatched."""
    for at, (name, value) in enumerate(zip(names, values)):
        own = name.startswith(ours) or name == "all on"
        axes.barh(at, value, color=BLUE if own else ORANGE, hatch="//" if own else None, alpha=0.85)
        axes.text(value, at, " " + form.format(value), va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.2)


def time_and_memory(
    ran: dict[str, Any], inches: float, floor: float | None = None
) -> tuple[Any, str]:
    """Seconds a step, with the ``floor`` if any, and peak memory: a bar for each result, with
    ``inches`` of room. The figure, and what all bars show in words."""
    names = list(ran)
    seconds = [steady_seconds(result) for result in ran.values()]
    peaks = [result["peak_rss_bytes"] / 1e9 for result in ran.values()]
    figure = new_figure(7.4, 1.4 + inches * len(names))
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    bars(left, names, seconds, "{:.1f}")
    title = "Time"
    if floor is not None:
        left.axvline(floor, color=VERMILLION, ls="--", lw=1.5)
        title = f"Time (dashed: floor, {floor:.1f} s)"
    tidy(left, title, x="s a step", grid="x")
    bars(right, names, peaks, "{:.1f}")
    right.set_yticks(range(len(names)), [""] * len(names))
    tidy(right, "Memory", x="peak RSS in GB", grid="x")
    facts = [f"{n} {s:.2f} s and {p:.2f} GB" for n, s, p in zip(names, seconds, peaks, strict=True)]
    return figure, "; ".join(facts)


def plot_comparison(record: RunRecord) -> Plot:
    """Seconds a step and peak memory of every contestant, with the floor drawn in."""
    every = {"ours": record.results["ours"], **record.results["peers"]}
    ran = {name: result for name, result in every.items() if "skipped" not in result}
    floor = sum(record.results["step_floor"].values())
    figure, facts = time_and_memory(ran, 0.5, floor)
    skipped = [name for name in every if name not in ran]
    left_out = f" Skipped: {', '.join(skipped)}." if skipped else ""
    return Plot(
        figure,
        f"Bar charts of seconds a GRPO step and peak memory, a bar a contestant: "
        f"{facts}. The machine's floor is {floor:.2f} s a step.{left_out}",
    )


def plot_ablation(record: RunRecord) -> Plot:
    """Seconds a step and peak memory with one fast path off at a time."""
    ran = {k: v for k, v in record.results["ablations"].items() if "skipped" not in v}
    figure, facts = time_and_memory(ran, 0.4)
    return Plot(
        figure,
        "Bar charts of seconds a GRPO step and peak memory with one fast path off at a time: "
        f"{facts}.",
    )


def plot_rollout(record: RunRecord) -> Plot:
    """Tokens a second of every rollout engine, a panel a group size."""
    engines = record.results["engines"]
    groups = list(next(iter(engines.values())))
    figure = new_figure(7.4, 1.4 + 0.4 * len(engines))
    facts = []
    for panel, group in enumerate(groups):
        ran = {e: r[group] for e, r in engines.items() if "skipped" not in r[group]}
        axes = figure.add_subplot(1, len(groups), panel + 1)
        speeds = [result["tokens_per_second"] for result in ran.values()]
        bars(axes, list(ran), speeds, "{:.0f}")
        tidy(axes, f"G = {group}", x="tokens/s", grid="x")
        each = ", ".join(f"{e} {s:.0f}" for e, s in zip(ran, speeds))
        facts.append(f"with G = {group}: {each}")
    return Plot(
        figure,
        f"Bar charts of sampled tokens a second, a bar an engine; {'; '.join(facts)}.",
    )


def plot_train(record: RunRecord) -> Plot:
    """Tokens a second of the bundled model's steps by rollout engine."""
    engines = record.results["engines"]
    names = list(engines)
    figure = new_figure(7.4, 1.4 + 0.4 * len(names))
    facts = []
    for panel, (key, title) in enumerate(
        (("rollout_tokens_per_second", "Rollouts alone"), ("tokens_per_second", "Whole steps"))
    ):
        axes = figure.add_subplot(1, 2, panel + 1)
        values = [result[key] for result in engines.values()]
        bars(axes, names, values, "{:.0f}", ours="fast")
        tidy(axes, title, x="sampled tokens/s", grid="x")
        each = ", ".join(f"{n} {v:.0f}" for n, v in zip(names, values))
        facts.append(f"{title.lower()}: {each}")
    return Plot(
        figure,
        "Bar charts of the bundled model's sampled tokens a second by rollout engine; "
        f"{'; '.join(facts)}.",
    )


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


PLOTS: dict[str, Callable[[RunRecord], Plot]] = {
    "bench-b1": plot_comparison,
    "bench-b2": plot_comparison,
    "bench-b3": plot_comparison,
    "bench-ablate": plot_ablation,
    "bench-rollout": plot_rollout,
    "bench-train": plot_train,
    "bench-sweep": plot_sweep,
}


def plot_record(record: RunRecord) -> Plot:
    """The picture of a benchmark's record. UserError for a kind that has none."""
    if record.kind not in PLOTS:
        raise UserError(
            f"no plot for a record of kind {record.kind!r}; there are {', '.join(PLOTS)}"
        )
    return PLOTS[record.kind](record)
