"""The report of a run, as Markdown and HTML, and the glue from records into prose.

Every number comes from a :class:`~cpugrpo_edu.record.run_record.RunRecord`. The ``results``
of a training run have this layout; every part may be missing (an interrupted
run, a run without evaluation)::

    evaluations   [{"label", "table": accuracy_table output}]:
                  "before", "after basic", ..., "after, INT8"; the last
                  one without INT8 is "after"
    comparisons   {"after vs before": compare output, ...}
    forgetting    forgetting_matrix output
    stages        [{"name", "steps", "seconds", "learning_rate",
                  "reward_first", "reward_last", "tokens_generated",
                  "fisher_seconds", "ewc_penalty_last"}]
    steps         [{"stage", "step", "reward", ...}]: the learning curve
    components    {"int8_rollouts": {"on": bool, "detail": {...}}, ...}
    seconds       {"load", "train", "evaluate", "report", "total"}
    peak_rss_bytes, cpu_percent (100 is one busy core),
    tokens_per_second {"rollout"}
    weights_changed  {"changed": bool, "relative_l2"}:
                  |after - before| / |before|
    samples       [{"question", "answer", "difficulty", "domain",
                  "before", "after", "before_correct", "after_correct"}]

``metrics.jsonl`` beside the record has one object a step, see :mod:`cpugrpo_edu.show.progress`.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.record.stats import difficulty_order, over_seeds, wilson_interval
from cpugrpo_edu.show.progress import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    Metrics,
    Plot,
    clock_time,
    gib,
    new_figure,
    plot_learning,
    read_metrics,
    tidy,
)

__all__ = [
    "headline",
    "number",
    "plot_accuracy",
    "plot_forgetting",
    "plot_learning",
    "plot_time_and_memory",
    "records_folder",
    "replace_between_markers",
    "results_table",
    "value",
    "write_report",
]

COMPONENTS = {
    "curriculum": "Curriculum",
    "ewc": "EWC",
    "fisher": "Fisher information",
    "int8_rollouts": "INT8 rollouts",
    "int8_evaluation": "INT8 evaluation",
    "gradient_checkpointing": "Gradient checkpointing",
    "adaptive_micro_batch": "Adaptive micro-batch",
    "memory_cleanup": "Memory cleanup",
    "memory_efficient_loading": "Memory-efficient loading",
    "threads": "Threads",
}
MAIN, INT8 = "after vs before", "INT8 vs fp32"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


# Numbers as text


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(low: float, high: float) -> str:
    """An interval of fractions, in signed percentage points."""
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _difference(row: Mapping[str, Any]) -> str:
    return f"{100 * row['difference']:+.1f} ({points(row['low'], row['high'])})"


def _accuracy(row: Mapping[str, Any]) -> str:
    return f"{percent(row['accuracy'])} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def _or_dash(mapping: Mapping[str, Any], key: str, form: Callable[[Any], str] = str) -> str:
    return "–" if mapping.get(key) is None else form(mapping[key])


def _signed_points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _tables(record: RunRecord) -> dict[str, dict[str, Any]]:
    """The accuracy tables by label, in order of time."""
    return {e["label"]: e["table"] for e in record.results.get("evaluations", [])}


def _before_and_after(record: RunRecord) -> list[dict[str, Any]]:
    """The first table, and the last one that is not of the quantized model."""
    full = [table for label, table in _tables(record).items() if "INT8" not in label]
    return [full[0], full[-1]] if len(full) > 1 else full


def headline(record: RunRecord) -> str:
    """What the run shows, in a sentence or two that claim no more than the interval does."""
    results = record.results
    compared = results.get("comparisons", {}).get(MAIN)
    if compared:
        row = compared["overall"]
        verb = "rose" if row["difference"] > 0 else "fell"
        span = f"from {percent(row['before'])} to {percent(row['after'])}"
        evidence = (
            f"on the same {row['n']:,} problems ({100 * row['difference']:+.1f} points, "
            f"{round(100 * compared['confidence'])} % interval {points(row['low'], row['high'])}, "
            f"McNemar {p_text(row['p_value'])})"
        )
        if not row["significant"]:
            text = (
                f"This run does not show that training changed accuracy: it went {span} "
                f"{evidence}, no more than the chance of which problems were drawn explains."
            )
        elif row["difference"] > 0:
            text = f"After training, accuracy {verb} {span} {evidence}."
        else:
            text = f"Training made the model worse: accuracy {verb} {span} {evidence}."
    elif results.get("evaluations"):
        text = "The model was not evaluated both before and after training, so nothing is compared."
    else:
        text = "This run was not evaluated: it says nothing about accuracy."
    if results.get("weights_changed", {}).get("changed") is False:
        text = "The weights did not change: nothing was learned. " + text
    cost = []
    if (seconds := results.get("seconds", {}).get("total")) is not None:
        cost.append(f"took {clock_time(seconds)}")
    if (peak := results.get("peak_rss_bytes")) is not None:
        cost.append(f"peaked at {gib(peak)} of memory")
    return text + (f" The run {' and '.join(cost)}." if cost else "")


# Plots


def _message_plot(text: str) -> Plot:
    figure = new_figure(7, 1.2)
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return Plot(figure, text)


def plot_accuracy(record: RunRecord) -> Plot:
    """Accuracy before and after, by domain x difficulty, with Wilson intervals."""
    tables = _before_and_after(record)
    if not tables:
        return _message_plot("No accuracies: this run has no evaluation.")
    first = tables[0]
    names = [("all problems", lambda t: t["overall"])] + [
        (f"{domain}, {level}", lambda t, d=domain, x=level: t["cells"][d][x])
        for domain in sorted(first["cells"])
        for level in difficulty_order(first["cells"][domain])
    ]
    figure = new_figure(7, 1.1 + 0.32 * len(names))
    axes = figure.add_subplot()
    styles = [(GREY, "o", "none", -0.13), (BLUE, "s", BLUE, 0.13)]
    for table, (colour, marker, fill, shift) in zip(tables, styles, strict=False):
        rows = [pick(table) for _, pick in names]
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
    axes.set_yticks(range(len(names)), [name for name, _ in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 102)
    tidy(axes, x=f"accuracy in % (bars: {round(100 * first['confidence'])} % Wilson)", grid="both")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    facts = [
        f"{name} {' to '.join(percent(pick(table)['accuracy']) for table in tables)}"
        for name, pick in names
    ]
    labels = " and ".join(table["label"] for table in tables)
    return Plot(
        figure, f"Dot chart of accuracy with intervals, {labels}, in % right: {'; '.join(facts)}."
    )


def plot_forgetting(record: RunRecord) -> Plot:
    """Accuracy on each difficulty after each stage, with Wilson intervals."""
    matrix = record.results.get("forgetting")
    if not matrix:
        return _message_plot("No forgetting matrix: this run was not evaluated after its stages.")
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


def _seconds(record: RunRecord) -> tuple[dict[str, float], float | None]:
    """The parts of the time in the order of the run, with what they leave over, and the total."""
    seconds = {k: v for k, v in record.results.get("seconds", {}).items() if v is not None}
    total = seconds.pop("total", None)
    order = [k for k in ("load", "train", "evaluate", "report") if k in seconds]
    parts = {k: seconds[k] for k in order + sorted(seconds.keys() - set(order))}
    if total is not None and (rest := total - sum(parts.values())) > 0.005 * total:
        parts["other"] = rest
    return parts, total


def plot_time_and_memory(record: RunRecord, metrics: Sequence[Metrics] = ()) -> Plot:
    """Where the seconds went, and the resident memory over the training steps."""
    parts, _ = _seconds(record)
    memory = [row for row in metrics if row.get("rss_bytes") is not None and "time" in row]
    peak = record.results.get("peak_rss_bytes")
    if not parts and not memory:
        return _message_plot("No times and no memory were recorded.")
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


# Content: one list of sections, two renderings


@dataclass
class Table:
    caption: str
    header: list[str]
    rows: list[list[str]]


@dataclass
class Picture:
    """A plot, drawn once for both renderings; ``name`` is its file in ``plots/``."""

    name: str
    alt: str
    png: bytes


@dataclass
class Sample:
    """One problem with the completions before and after, as untrusted as any model output."""

    title: str
    question: str
    completions: list[tuple[str, str]]  # (heading, text)


Block: TypeAlias = "str | list[str] | Table | Picture | Sample"
Section: TypeAlias = tuple[str, list[Block]]


def _picture(name: str, plot: Plot) -> Picture:
    return Picture(name, plot.alt, plot.png())


def _sections(record: RunRecord, metrics: Sequence[Metrics]) -> list[Section]:
    made: list[Section] = [
        ("Accuracy", _accuracy_blocks(record)),
        ("Learning", [_picture("learning.png", plot_learning(metrics))] if metrics else []),
        ("Stages", _stages(record)),
        ("Forgetting", _forgetting(record)),
        ("Time and memory", _time_and_memory(record, metrics)),
        ("Completions before and after", _samples(record)),
        ("What this does not show", [_limits(record)]),
        ("Components", _components(record)),
        ("Machine, versions and configuration", _machine(record)),
    ]
    return [(title, blocks or ["Not recorded in this run."]) for title, blocks in made]


def _plain(found: Any) -> str:
    """A value of the record as text, nested ones as JSON."""
    return found if isinstance(found, str) else json.dumps(found)


def _quantity(key: str, found: Any) -> str:
    """A detail of the record for reading: three digits, and memory in GiB or MiB."""
    if isinstance(found, list):
        return ", ".join(_quantity(key, each) for each in found)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return _plain(found)
    if "bytes" in key or "memory" in key:
        return gib(found) if found >= 2**30 else f"{found / 2**20:.3g} MiB"
    return f"{found:.3g}" if isinstance(found, float) else str(found)


def _flat(mapping: Mapping[str, Any]) -> str:
    return "; ".join(f"{key.replace('_', ' ')}: {_quantity(key, v)}" for key, v in mapping.items())


def _machine(record: RunRecord) -> list[Block]:
    facts = [
        ["Command", f"{record.kind}, seed {record.seed}, {record.created}"],
        ["Code", f"commit {record.commit}"],
        ["Machine", _flat(record.machine)],
        ["Versions", _flat(record.versions)],
    ]
    config = [[key, _plain(v)] for key, v in sorted(record.config.items())]
    return [
        Table("Where and with what this was measured", ["Fact", "Value"], facts),
        Table("Configuration", ["Setting", "Value"], config),
    ]


def _accuracy_blocks(record: RunRecord) -> list[Block]:
    blocks: list[Block] = []
    tables = _tables(record)
    if tables:
        blocks.append(_picture("accuracy.png", plot_accuracy(record)))
        some = next(iter(tables.values()))
        levels = difficulty_order(some["by_difficulty"])
        percent_text = f"{round(100 * some['confidence'])} %"
        rows = []
        for label, table in tables.items():
            overall = table["overall"]
            rows.append(
                [label, f"{overall['n']:,}", _accuracy(overall)]
                + [_accuracy(table["by_difficulty"][x]) for x in levels]
                + [percent(overall["step_score"]), f"{overall['tokens']:.0f}"]
                + [percent(overall["finished"])]
            )
        header = ["Evaluation", "Problems", "All", *levels]
        header += ["Step score", "Tokens each", "Finished"]
        blocks.append(
            Table(f"Exact-match accuracy with {percent_text} Wilson intervals", header, rows)
        )
    comparisons = record.results.get("comparisons", {})
    for name in sorted(comparisons, key=lambda name: (name != MAIN, name)):
        compared = comparisons[name]
        named = [("all problems", compared["overall"])]
        named += [
            (x, compared["by_difficulty"][x]) for x in difficulty_order(compared["by_difficulty"])
        ]
        named += [
            (f"{domain}, {x}", compared["cells"][domain][x])
            for domain in sorted(compared["cells"])
            for x in difficulty_order(compared["cells"][domain])
        ]
        rows = [
            [
                label,
                str(row["n"]),
                percent(row["before"]),
                percent(row["after"]),
                _difference(row),
                f"{row['gained']} / {row['lost']}",
                p_text(row["p_value"]),
            ]
            for label, row in named
        ]
        caption = (
            f"{name}: paired on the same problems, difference in points with "
            f"{round(100 * compared['confidence'])} % bootstrap interval "
            "(exact bound where no item changed), McNemar's exact test"
        )
        header = ["Problems", "n", compared["before"], compared["after"], "Difference"]
        blocks.append(Table(caption, [*header, "Gained / lost", "p"], rows))
    return blocks


def _stages(record: RunRecord) -> list[Block]:
    shown: list[tuple[str, str, Callable[[Any], str]]] = [
        ("name", "Stage", str),
        ("steps", "Steps", str),
        ("seconds", "Time", clock_time),
        ("learning_rate", "Learning rate", "{:.2g}".format),
        ("reward_first", "First reward", "{:.3f}".format),
        ("reward_last", "Last reward", "{:.3f}".format),
        ("tokens_generated", "Tokens generated", "{:,}".format),
        ("fisher_seconds", "Fisher", clock_time),
        ("ewc_penalty_last", "EWC penalty", "{:.3g}".format),
    ]
    rows = [
        [_or_dash(stage, key, form) for key, _, form in shown]
        for stage in record.results.get("stages", [])
    ]
    return [Table("Stages in order", [title for _, title, _ in shown], rows)] if rows else []


def _forgetting(record: RunRecord) -> list[Block]:
    matrix = record.results.get("forgetting")
    if not matrix:
        return []
    columns = matrix["columns"]
    rows = [
        [label, *map(percent, row)]
        for label, row in zip(matrix["rows"], matrix["accuracy"], strict=True)
    ]
    lost = [matrix["forgetting"][x] for x in columns]
    rows.append(
        ["forgotten, points"]
        + [
            f"{x['points']:+.1f} ({x['points_low']:+.1f} to {x['points_high']:+.1f})" if x else "–"
            for x in lost
        ]
    )
    return [
        _picture("forgetting.png", plot_forgetting(record)),
        Table("Accuracy by difficulty after each stage", ["", *columns], rows),
        "Forgotten: the best accuracy from the stage that trained a difficulty onward, minus the "
        "last (Chaudhry et al. 2018); negative where later stages helped, a dash where no later "
        "stage followed.",
    ]


def _components(record: RunRecord) -> list[Block]:
    components = record.results.get("components")
    if not components:
        return []
    others = {key: key.replace("_", " ") for key in sorted(components.keys() - COMPONENTS.keys())}
    rows = []
    for key, title in (COMPONENTS | others).items():
        part = components.get(key)
        state = "not recorded" if part is None else "on" if part.get("on") else "off"
        rows.append([title, state, _flat((part or {}).get("detail", {})) or "–"])
    return [Table("What was switched on", ["Component", "State", "Detail"], rows)]


def _time_and_memory(record: RunRecord, metrics: Sequence[Metrics]) -> list[Block]:
    results = record.results
    parts, total = _seconds(record)
    rows = [[f"Time, {key}", clock_time(s)] for key, s in parts.items()]
    shown: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("Time, total", total, clock_time),
        ("Peak resident memory", results.get("peak_rss_bytes"), gib),
        ("CPU use (100 % is one core)", results.get("cpu_percent"), "{:.0f} %".format),
    ]
    shown += [
        (f"Tokens per second, {key}", rate, "{:,.0f}".format)
        for key, rate in results.get("tokens_per_second", {}).items()
    ]
    changed = results.get("weights_changed", {})
    shown.append(
        ("Relative change of the weights (L2)", changed.get("relative_l2"), "{:.2e}".format)
    )
    rows += [[name, form(number)] for name, number, form in shown if number is not None]
    if not rows:
        return []
    picture = _picture("time_and_memory.png", plot_time_and_memory(record, metrics))
    return [picture, Table("Cost of the run", ["Quantity", "Value"], rows)]


def _samples(record: RunRecord) -> list[Block]:
    def verdict(sample: Mapping[str, Any], side: str) -> str:
        correct = sample.get(f"{side}_correct")
        return f"{side}: {'not checked' if correct is None else 'right' if correct else 'wrong'}"

    return [
        Sample(
            f"{sample.get('domain', '?')}, {sample.get('difficulty', '?')} "
            f"(answer {sample.get('answer', '?')})",
            str(sample.get("question", "")),
            [(verdict(sample, s), str(sample[s])) for s in ("before", "after") if s in sample],
        )
        for sample in record.results.get("samples", [])
    ]


def _limits(record: RunRecord) -> list[str]:
    """Caveats, those of this very run first."""
    results = record.results
    limits = [
        f"One run with seed {record.seed}. The intervals are about which problems were drawn, not "
        "about how another seed would have trained; only several seeds show that.",
    ]
    tables = _before_and_after(record)
    if tables:
        temperature = tables[-1]["temperature"]
        how = "greedily" if temperature == 0 else f"by sampling at temperature {temperature:g}"
        limits.append(
            f"Accuracy on {tables[-1]['overall']['n']:,} generated problems of the trained kinds, "
            f"answered {how}: not a measure of reasoning in general."
        )
    compared = results.get("comparisons", {})
    if compared:
        limits.append(
            "The table by domain and difficulty holds many comparisons; some intervals miss zero "
            "by chance alone."
        )
    if MAIN in compared and not compared[MAIN]["overall"]["significant"]:
        limits.append("No difference shown is not the same as no difference.")
    if INT8 in compared and not compared[INT8]["overall"]["significant"]:
        row = compared[INT8]["overall"]
        limits.append(
            "INT8 was not shown to differ from fp32; that it costs nothing does not follow: the "
            f"interval still allows {points(row['low'], row['high'])} points."
        )
    if results.get("components"):
        limits.append(
            "Which component earned what: the components were on together; that takes runs with "
            "one of them off."
        )
    if results.get("seconds"):
        limits.append("Times of other machines, or of this one with other work on it.")
    return limits


# Rendering


def _clean(text: str) -> str:
    """Replace control, bidirectional-override and surrogate characters."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _md_text(text: str) -> str:
    """One line of Markdown in which nothing of ``text`` is markup."""
    return re.sub(r"([\\`*_\[\]|<>&$~])", r"\\\1", " ".join(_clean(text).split()))


def _md_fence(text: str) -> str:
    """A code block that no run of backticks in ``text`` can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{_clean(text)}\n{fence}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of plain text; columns of numbers are aligned to the right."""
    numeric = [
        all(re.match(r"[+-]?\d|–|p [<=]", row[i]) for row in rows) for i in range(len(header))
    ]
    safe = [[_md_text(cell) for cell in line] for line in (header, *rows)]
    safe.insert(1, ["---:" if right else "---" for right in numeric])
    return "\n".join(f"| {' | '.join(line)} |" for line in safe)


def _markdown(block: Block) -> str:
    match block:
        case str():
            return _md_text(block)
        case list():
            return "\n".join(f"- {_md_text(item)}" for item in block)
        case Table():
            return f"**{_md_text(block.caption)}**\n\n{markdown_table(block.header, block.rows)}"
        case Picture():
            return f"![{_md_text(block.alt)}](plots/{block.name})"
        case Sample():
            parts = [f"### {_md_text(block.title)}", _md_fence(block.question)]
            for heading, text in block.completions:
                parts += [f"{_md_text(heading)}", _md_fence(text)]
            return "\n\n".join(parts)


def _esc(text: str) -> str:
    return html.escape(_clean(text))


def _cell(text: str) -> str:
    """A table's cell; a number with its unit stays on one line."""
    return f'<td class="short">{_esc(text)}</td>' if len(text) < 12 else f"<td>{_esc(text)}</td>"


def _html(block: Block) -> str:
    match block:
        case str():
            return f"<p>{_esc(block)}</p>"
        case list():
            return "<ul>" + "".join(f"<li>{_esc(item)}</li>" for item in block) + "</ul>"
        case Table():
            head = "".join(f'<th scope="col">{_esc(cell)}</th>' for cell in block.header)
            body = "".join(
                f'<tr><th scope="row">{_esc(first)}</th>' + "".join(map(_cell, rest)) + "</tr>"
                for first, *rest in block.rows
            )
            caption = _esc(block.caption)
            return (  # a wide table scrolls by itself, with the keyboard too
                f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
                f"<table><caption>{caption}</caption>"
                f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
            )
        case Picture():
            source = f"data:image/png;base64,{base64.b64encode(block.png).decode()}"
            return f'<img alt="{_esc(block.alt)}" src="{source}">'
        case Sample():
            sides = "".join(
                f"<div><h4>{_esc(heading)}</h4><pre>{_esc(text)}</pre></div>"
                for heading, text in block.completions
            )
            return (
                f"<h3>{_esc(block.title)}</h3><pre>{_esc(block.question)}</pre>"
                f'<div class="sides">{sides}</div>'
            )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }}
.headline {{ font-size: 1.15rem; border-left: .3rem solid #0072b2; padding-left: 1rem; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: .9rem; }}
caption {{ text-align: left; font-weight: bold; padding: .3rem 0; }}
th, td {{ border-bottom: 1px solid #8886; padding: .25rem .6rem; text-align: left; }}
td {{ font-variant-numeric: tabular-nums; }}
.short {{ white-space: nowrap; }}
img {{ max-width: 100%; height: auto; background: #fff; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #8882; padding: .6rem; }}
.sides {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="headline">{headline}</p>
{body}
</main>
</body>
</html>
"""


def write_report(
    record: RunRecord | str | Path, folder: str | Path, metrics: Sequence[Metrics] | None = None
) -> tuple[Path, Path]:
    """Write ``report.md`` with ``plots/*.png``, and a self-contained ``report.html``.

    ``metrics`` default to ``folder/metrics.jsonl`` if it is there. Missing parts of
    the record are named as missing.
    """
    record = record if isinstance(record, RunRecord) else RunRecord.load(record)
    folder = Path(folder)
    if metrics is None:
        path = folder / "metrics.jsonl"
        metrics = read_metrics(path) if path.exists() else []
    sections = _sections(record, metrics)
    title, summary = f"Report: {record.kind}, seed {record.seed}", headline(record)

    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for _, blocks in sections:
        for block in blocks:
            if isinstance(block, Picture):
                (folder / "plots" / block.name).write_bytes(block.png)
    parts = [f"# {_md_text(title)}", _md_text(summary)]
    for heading, blocks in sections:
        parts += [f"## {heading}", *map(_markdown, blocks)]
    markdown_path, html_path = folder / "report.md", folder / "report.html"
    markdown_path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    body = "\n".join(
        f"<section><h2>{heading}</h2>\n" + "\n".join(map(_html, blocks)) + "\n</section>"
        for heading, blocks in sections
    )
    page = _PAGE.format(title=_esc(title), headline=_esc(summary), body=body)
    html_path.write_text(page, encoding="utf-8")
    return markdown_path, html_path


# Glue: numbers from records into prose


def value(source: RunRecord | str | Path, key: str) -> Any:
    """The value at a dotted key of a record, ``value(record, "results.seconds.train")``.

    Parts of the key are field names, dictionary keys or list positions; a key with
    a dot in it cannot be reached. Raises UserError naming the part that is missing
    and what there is.
    """
    record = source if isinstance(source, RunRecord) else RunRecord.load(source)
    found: Any = vars(record)
    for depth, part in enumerate(key.split(".")):
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            here = ".".join(key.split(".")[:depth]) or "the record"
            there = (
                ", ".join(map(str, found))
                if isinstance(found, dict)
                else f"positions 0 to {len(found) - 1}"
                if isinstance(found, list)
                else f"the value {found!r}"
            )
            raise UserError(f"key {key!r}: no {part!r} in {here}, which has {there}") from error
    return found


def records_folder() -> Path:
    """``records/`` of the working directory, a parent of it, or the source tree."""
    here = Path.cwd()
    places = [p / "records" for p in (here, *here.parents, Path(__file__).resolve().parent.parent)]
    return next((place for place in places if place.is_dir()), places[0])


OVER: dict[str, Callable[[list[Any]], Any]] = {
    "mean": fmean,
    "min": min,
    "max": max,
    "sum": sum,
    "count": len,
}


def number(
    record_name: str,
    key: str,
    fmt: str = "{:.1f}",
    scale: float = 1.0,
    folder: str | Path | None = None,
    over: str = "mean",
) -> str:
    """A number of ``records/<record_name>.json`` as text for prose, times ``scale``.

    ``number("smoke", "results.peak_rss_bytes", "{:.2f} GiB", scale=2**-30)``. A name with
    wildcards, ``run-seed?-ewc``, takes the number from every record that fits, and ``over``
    says what of them: their mean, min, max, sum or count.
    """
    folder = records_folder() if folder is None else Path(folder)
    paths = sorted(folder.glob(f"{record_name}.json"))
    if not paths:
        names = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none"
        raise UserError(f"no record {record_name!r} in {folder}; there are: {names}")
    if over not in OVER:
        raise UserError(f"cannot take {over!r} of records; allowed are {', '.join(OVER)}")
    values = [value(path, key) for path in paths]
    try:
        several = len(values) > 1 or re.search(r"[*?\[]", record_name)
        found = OVER[over](values) if several else values[0]
        return fmt.format(found if scale == 1.0 else found * scale)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"{key!r} of record {record_name!r} is {values[0]!r}, which {fmt!r} cannot show; "
            "name a number, or give another fmt"
        ) from error


RUN_FORMS: list[Callable[[float], str]] = [
    *(percent, percent, _signed_points, _signed_points),
    *(clock_time, clock_time, gib),
]


def _run_row(record: RunRecord) -> tuple[list[float | None], list[str]]:
    """The numbers of one run in ``results_table``, and how they are shown."""
    results = record.results
    overall = results.get("comparisons", {}).get(MAIN, {}).get("overall", {})
    forgotten = results.get("forgetting", {}).get("forgetting", {}).values()
    worst: dict[str, Any] = max(
        (cell for cell in forgotten if cell), key=lambda cell: cell["points"], default={}
    )
    seconds = results.get("seconds", {})
    total, evaluating = seconds.get("total"), seconds.get("evaluate")
    numbers = [overall.get(key) for key in ("before", "after", "difference")]
    numbers += [worst["points"] / 100 if worst else None]
    numbers += [None if None in (total, evaluating) else total - evaluating, total]
    numbers += [results.get("peak_rss_bytes")]
    cells = ["–" if x is None else form(x) for x, form in zip(numbers, RUN_FORMS, strict=True)]
    if overall:
        cells[2] = _difference(overall)
    if worst:
        cells[3] += f" ({points(worst['points_low'] / 100, worst['points_high'] / 100)})"
    return numbers, cells


def results_table(records: Sequence[RunRecord]) -> str:
    """Markdown table of training runs: a row a seed, then their mean; with EWC, then without.

    A seed's interval is about which problems were drawn (paired bootstrap); that of a
    mean about the seed (95 % t interval, ddof = 1). Forgetting is that of the
    difficulty that lost most; positive is lost. Raises UserError if a seed comes twice
    with the same state of EWC.
    """
    if not records:
        raise UserError("a results table needs at least one run record; none was given")
    groups: dict[bool, dict[int, RunRecord]] = {True: {}, False: {}}
    for record in records:
        ewc = bool(record.results.get("components", {}).get("ewc", {}).get("on", False))
        if record.seed in groups[ewc]:
            state = "with" if ewc else "without"
            raise UserError(f"two records of seed {record.seed} {state} EWC; give one of each")
        groups[ewc][record.seed] = record

    rows = []
    for ewc, runs in groups.items():
        state = "on" if ewc else "off"
        columns = []
        for seed in sorted(runs):
            numbers, cells = _run_row(runs[seed])
            rows.append([str(seed), state, *cells])
            columns.append(numbers)
        if len(columns) < 2:
            continue
        means = []
        for i, (column, form) in enumerate(zip(zip(*columns, strict=True), RUN_FORMS, strict=True)):
            known = [x for x in column if x is not None]
            cell = form(sum(known) / len(known)) if known else "–"
            if i in (2, 3) and len(known) > 1:  # difference and forgetting
                spread = over_seeds(known)
                cell += f" ({points(spread.low, spread.high)})"
            means.append(cell + (f" (n = {len(known)})" if 0 < len(known) < len(column) else ""))
        rows.append([f"mean of {len(columns)} seeds", state, *means])
    header = ["Seed", "EWC", "Before", "After", "Difference, points (95 % interval)"]
    header += ["Worst forgetting, points (95 % interval)", "Time without evaluation"]
    return markdown_table([*header, "Time in all", "Peak memory"], rows)


def replace_between_markers(text: str, table: str) -> str:
    """``text`` with everything between the two results markers replaced by ``table``."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"the text must hold {BEGIN} once and {END} once after it; add them")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table.strip()}\n{END}{rest.split(END)[1]}"
