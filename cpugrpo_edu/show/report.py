"""The report of a run, as Markdown and as HTML; templates/ holds how each looks.

Every number comes from a :class:`~cpugrpo_edu.record.run_record.RunRecord`. The ``results``
of a training run have this layout; every part may be missing (an interrupted run, a run
without evaluation)::

    evaluations   [{"label", "table": accuracy_table output}]:
                  "before", "after basic", ..., "after, INT8"; the last
                  one without INT8 is "after"
    comparisons   {"after vs before": compare output, ...}
    forgetting    forgetting_matrix output
    stages        [{"name", "steps", "seconds", "learning_rate",
                  "reward_first", "reward_last", "tokens_generated",
                  "fisher_seconds", "ewc_penalty_last",
                  "signal": {"groups", "with_signal", "mean_reward"}}]
    steps         [{"stage", "step", "reward", ...}]: the learning curve
    components    {"int8_rollouts": {"on": bool, "detail": {...}}, ...}
    seconds       {"load", "train", "evaluate", "report", "total"}
    peak_rss_bytes, cpu_percent (100 is all cores busy),
    tokens_per_second {"rollout"}
    weights_changed  {"changed": bool, "relative_l2"}:
                  |after - before| / |before|
    levels        {difficulty: what the run's scenario calls it}
    samples       [{"question", "answer", "difficulty", "domain",
                  "before", "after", "before_correct", "after_correct"}]

``metrics.jsonl`` beside the record has one object a step, see :mod:`cpugrpo_edu.record.metrics`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from cpugrpo_edu.record.markdown import markdown_table, markdown_text, printable
from cpugrpo_edu.record.metrics import Metrics, read_metrics
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.record.stats import difficulty_order, is_graded
from cpugrpo_edu.show import plots
from cpugrpo_edu.show.palette import Plot
from cpugrpo_edu.show.text import (
    MAIN,
    change_in_words,
    clock_time,
    difference_text,
    gib,
    p_text,
    percent,
    points,
)

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
INT8 = "INT8 vs fp32"


def headline(record: RunRecord) -> str:
    """What the run shows, in a sentence or two that claim no more than the interval does."""
    results = record.results
    compared = results.get("comparisons", {}).get(MAIN)
    if compared:
        text = change_in_words(compared["overall"], compared["confidence"])
    elif results.get("evaluations"):
        text = "The model was not evaluated both before and after training, so nothing is compared."
    else:
        text = "This run was not evaluated: it says nothing about accuracy."
    if (tables := plots.before_and_after(record)) and any(is_graded(t["overall"]) for t in tables):
        grades = [f"{t['overall']['grade']:.3f}" for t in tables]
        text += (
            f" The mean grade is {' before and '.join(grades)} after, and accuracy the share of "
            "full marks."
        )
    if results.get("weights_changed", {}).get("changed") is False:
        text = "The weights did not change: nothing was learned. " + text
    if compared and (levels := results.get("levels")):
        ends = [
            f"{name} from {percent(row['before'])} to {percent(row['after'])}"
            for level, name in levels.items()
            if (row := compared["by_difficulty"].get(level))
        ]
        text += f" Of these, {', '.join(ends)}."
    cost = []
    if (seconds := results.get("seconds", {}).get("total")) is not None:
        cost.append(f"took {clock_time(seconds)}")
    if (peak := results.get("peak_rss_bytes")) is not None:
        cost.append(f"peaked at {gib(peak)} of memory")
    return text + (f" The run {' and '.join(cost)}." if cost else "")


def acted(record: RunRecord) -> str:
    """Which components were on, and where EWC helps if it was off."""
    parts = record.results.get("components", {})
    on = [title for key, title in COMPONENTS.items() if parts.get(key, {}).get("on")]
    text = f"On: {', '.join(on) or 'nothing'}."
    if parts.get("ewc", {}).get("on") is False:
        text += (
            " Off: EWC, since the default stages forget nothing; "
            "cpugrpo run --scenario letters turns it on where training forgets."
        )
    return text


def level_name(record: RunRecord, level: str) -> str:
    """A difficulty as the run's scenario calls it."""
    return str(record.results.get("levels", {}).get(level, level))


# Content: one list of sections for both templates


@dataclass
class Table:
    caption: str
    header: list[str]
    rows: list[list[str]]


class Picture:
    """A plot, drawn once for both templates; ``name`` is its file in ``plots/``."""

    def __init__(self, name: str, plot: Plot):
        self.name, self.alt, self.png = name, plot.alt, plot.png()

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode("ascii")


@dataclass
class Sample:
    """One problem with the completions before and after: as untrusted as any model output."""

    title: str
    question: str
    completions: list[tuple[str, str]]  # (heading, text)


Block: TypeAlias = "str | list[str] | Table | Picture | Sample"


def sections(record: RunRecord, metrics: Sequence[Metrics]) -> list[tuple[str, list[Block]]]:
    """Heading and content of every section; one that has nothing to show says so."""
    made: list[tuple[str, list[Block]]] = [
        ("The same problems before and after training", _samples(record)),
        ("Accuracy", [*_accuracy(record), *_comparisons(record)]),
        ("Learning", [Picture("learning.png", plots.plot_learning(metrics))] if metrics else []),
        ("Stages", _stages(record)),
        ("Forgetting", _forgetting(record)),
        ("Time and memory", _time_and_memory(record, metrics)),
        ("What this does not show", [limits(record)]),
        ("Components", _components(record)),
        ("Machine, versions and configuration", _machine(record)),
    ]
    return [(title, blocks or ["Not recorded in this run."]) for title, blocks in made]


def _share(row: Mapping[str, Any]) -> str:
    return f"{percent(row['accuracy'])} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def _accuracy(record: RunRecord) -> list[Block]:
    tables = plots.evaluation_tables(record)
    if not tables:
        return []
    some = next(iter(tables.values()))
    levels = difficulty_order(some["by_difficulty"])
    rows = []
    for label, table in tables.items():
        overall = table["overall"]
        shares = [overall, *(table["by_difficulty"][level] for level in levels)]
        rows.append([label, f"{overall['n']:,}", *map(_share, shares)])
        rows[-1] += [percent(overall["step_score"]), f"{overall['tokens']:.0f}"]
        rows[-1] += [percent(overall["finished"])]
    names = [level_name(record, level) for level in levels]
    header = ["Evaluation", "Problems", "All", *names, "Step score", "Tokens each", "Finished"]
    what = "Exact-match accuracy"
    if any(is_graded(table["overall"]) for table in tables.values()):
        what, header = "Share of full marks", [*header, "Mean grade"]
        for row, table in zip(rows, tables.values(), strict=True):
            row.append(f"{table['overall'].get('grade', table['overall']['accuracy']):.3f}")
    caption = f"{what} with {round(100 * some['confidence'])} % Wilson intervals"
    return [Picture("accuracy.png", plots.plot_accuracy(record)), Table(caption, header, rows)]


def _comparisons(record: RunRecord) -> list[Block]:
    blocks: list[Block] = []
    comparisons = record.results.get("comparisons", {})
    for name in sorted(comparisons, key=lambda name: (name != MAIN, name)):
        compared = comparisons[name]
        levels = compared["by_difficulty"]
        named = {
            "all problems": compared["overall"],
            **{level_name(record, x): levels[x] for x in difficulty_order(levels)},
            **dict(plots.cells_in_order(compared)),
        }
        rows = [
            [
                label,
                *(str(row["n"]), percent(row["before"]), percent(row["after"])),
                *(difference_text(row), f"{row['gained']} / {row['lost']}", p_text(row["p_value"])),
            ]
            for label, row in named.items()
        ]
        caption = (
            f"{name}: paired on the same problems, difference in points with "
            f"{round(100 * compared['confidence'])} % interval (bootstrap; "
            "Tango's score interval for small or hardly changed groups), McNemar's exact test"
        )
        header = ["Problems", "n", compared["before"], compared["after"], "Difference"]
        blocks.append(Table(caption, [*header, "Gained / lost", "p"], rows))
    return blocks


def _stages(record: RunRecord) -> list[Block]:
    shown: list[tuple[str, str, Callable[[Any], str]]] = [
        ("name", "Stage", str),
        ("steps", "Steps", str),
        ("seconds", "Time", clock_time),
        ("signal", "Groups with a signal", "{0[with_signal]} of {0[groups]}".format),
        ("learning_rate", "Learning rate", "{:.2g}".format),
        ("reward_first", "First reward", "{:.3f}".format),
        ("reward_last", "Last reward", "{:.3f}".format),
        ("tokens_generated", "Tokens generated", "{:,}".format),
        ("fisher_seconds", "Fisher", clock_time),
        ("ewc_penalty_last", "EWC penalty", "{:.3g}".format),
    ]
    rows = [
        ["–" if stage.get(key) is None else form(stage[key]) for key, _, form in shown]
        for stage in record.results.get("stages", [])
    ]
    return [Table("Stages in order", [title for _, title, _ in shown], rows)] if rows else []


def _forgetting(record: RunRecord) -> list[Block]:
    matrix = record.results.get("forgetting")
    if not matrix:
        return []
    columns = matrix["columns"]
    pairs = zip(matrix["rows"], matrix["accuracy"], strict=True)
    rows = [[label, *map(percent, row)] for label, row in pairs]
    lost = [matrix["forgetting"][x] for x in columns]
    rows.append(
        ["forgotten, points"]
        + [
            f"{x['points']:+.1f} ({x['points_low']:+.1f} to {x['points_high']:+.1f})" if x else "–"
            for x in lost
        ]
    )
    return [
        Picture("forgetting.png", plots.plot_forgetting(record)),
        Table(
            "Accuracy by difficulty after each stage",
            ["", *(level_name(record, x) for x in columns)],
            rows,
        ),
        "Forgotten: the best accuracy from the stage that trained a difficulty onward (or from "
        "the start, if it was to be protected), minus the last (Chaudhry et al. 2018); negative "
        "where later stages helped, a dash where no later stage followed.",
    ]


def _time_and_memory(record: RunRecord, metrics: Sequence[Metrics]) -> list[Block]:
    results = record.results
    rows = [[f"Time, {key}", clock_time(s)] for key, s in plots.time_parts(record).items()]
    shown: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("Time, total", results.get("seconds", {}).get("total"), clock_time),
        ("Peak resident memory", results.get("peak_rss_bytes"), gib),
        ("CPU use (100 % is all cores)", results.get("cpu_percent"), "{:.0f} %".format),
    ]
    shown += [
        (f"Tokens per second, {key}", rate, "{:,.0f}".format)
        for key, rate in results.get("tokens_per_second", {}).items()
    ]
    changed = results.get("weights_changed", {}).get("relative_l2")
    shown.append(("Relative change of the weights (L2)", changed, "{:.2e}".format))
    rows += [[name, form(number)] for name, number, form in shown if number is not None]
    if not rows:
        return []
    picture = Picture("time_and_memory.png", plots.plot_time_and_memory(record, metrics))
    return [picture, Table("Cost of the run", ["Quantity", "Value"], rows)]


def _samples(record: RunRecord) -> list[Block]:
    marks = {None: "not checked", True: "right", False: "wrong"}
    return [
        Sample(
            f"{sample.get('domain', '?')}, {sample.get('difficulty', '?')} "
            f"(answer {sample.get('answer', '?')})",
            str(sample.get("question", "")),
            [
                (f"{side}: {marks[sample.get(f'{side}_correct')]}", str(sample[side]))
                for side in ("before", "after")
                if side in sample
            ],
        )
        for sample in record.results.get("samples", [])
    ]


def limits(record: RunRecord) -> list[str]:
    """Caveats, those of this very run first."""
    results = record.results
    limits = [
        f"One run with seed {record.seed}. The intervals are about which problems were drawn, not "
        "about how another seed would have trained; only several seeds show that.",
    ]
    if tables := plots.before_and_after(record):
        temperature, data = tables[-1]["temperature"], record.config.get("data", "generated")
        kind = "generated problems of the trained kinds"
        if data != "generated":
            kind = f"held-out problems of {data}"
        how = "greedily" if temperature == 0 else f"by sampling at temperature {temperature:g}"
        limits.append(
            f"Accuracy on {tables[-1]['overall']['n']:,} {kind}, answered {how}: "
            "not a measure of reasoning in general."
        )
    if changed := results.get("verifier_changed"):
        limits.append(
            f"The verifier was replaced {', '.join(changed)}. All evaluations were judged by the "
            "last one, but training before that followed another."
        )
    compared = results.get("comparisons", {})
    if compared:
        limits.append(
            "The report's table by domain and difficulty holds many comparisons; some intervals "
            "miss zero by chance alone."
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
            "What each component contributed: they were on together, and only runs with one of "
            "them off can tell."
        )
    if results.get("seconds"):
        limits.append("Times on other machines, or on this one with other work on it.")
    return limits


def _components(record: RunRecord) -> list[Block]:
    components = record.results.get("components")
    if not components:
        return []
    others = {key: key.replace("_", " ") for key in sorted(components.keys() - COMPONENTS.keys())}
    rows = []
    for key, title in (COMPONENTS | others).items():
        part = components.get(key)
        state = "not recorded" if part is None else "on" if part.get("on") else "off"
        rows.append([title, state, _facts((part or {}).get("detail", {})) or "–"])
    return [Table("Which components were on", ["Component", "State", "Detail"], rows)]


def _machine(record: RunRecord) -> list[Block]:
    facts = [
        ["Command", f"{record.kind}, seed {record.seed}, {record.created}"],
        ["Code", f"commit {record.commit}"],
        ["Machine", _facts(record.machine)],
        ["Versions", _facts(record.versions)],
    ]
    config = [[key, _plain(v)] for key, v in sorted(record.config.items())]
    return [
        Table("Where and with what this was measured", ["Fact", "Value"], facts),
        Table("Configuration", ["Setting", "Value"], config),
    ]


def _facts(mapping: Mapping[str, Any]) -> str:
    return "; ".join(f"{key.replace('_', ' ')}: {_quantity(key, v)}" for key, v in mapping.items())


def _quantity(key: str, found: Any) -> str:
    """A detail of the record for reading: three digits, and memory in GiB or MiB."""
    if isinstance(found, list):
        return ", ".join(_quantity(key, each) for each in found)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return _plain(found)
    if "bytes" in key or "memory" in key:
        return gib(found) if found >= 2**30 else f"{found / 2**20:.3g} MiB"
    return f"{found:.3g}" if isinstance(found, float) else str(found)


def _plain(found: Any) -> str:
    """A value of the record as text, nested ones as JSON."""
    return found if isinstance(found, str) else json.dumps(found)


# Rendering


def _fence(text: str) -> Markup:
    """A code block that no run of backticks in ``text`` can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}text\n{printable(text)}\n{fence}")


def _render(name: str, finalize: Callable[[Any], str], **content: Any) -> str:
    """A template with ``content``; ``finalize`` is applied to every expression in it."""
    environment = Environment(
        loader=PackageLoader("cpugrpo_edu.show"),
        autoescape=name.endswith(".html.j2"),
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["fence"] = _fence
    return environment.get_template(name).render(markdown_table=markdown_table, **content)


def write_report(
    record: RunRecord | str | Path, folder: str | Path, metrics: Sequence[Metrics] | None = None
) -> tuple[Path, Path]:
    """Write ``report.md`` with ``plots/*.png``, and a self-contained ``report.html``.

    ``metrics`` default to those of ``folder/metrics.jsonl``, if it is there. The report names
    the parts that the record lacks. Returns the two paths, Markdown first.
    """
    record = record if isinstance(record, RunRecord) else RunRecord.load(record)
    folder = Path(folder)
    if metrics is None:
        path = folder / "metrics.jsonl"
        metrics = read_metrics(path) if path.exists() else []
    content = {
        "title": f"Report: {record.kind}, seed {record.seed}",
        "headline": headline(record),
        "sections": sections(record, metrics),
    }
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for _, blocks in content["sections"]:
        for block in blocks:
            if isinstance(block, Picture):
                (folder / "plots" / block.name).write_bytes(block.png)
    markdown = _render(
        "report.md.j2", lambda x: x if isinstance(x, Markup) else markdown_text(str(x)), **content
    )
    page = _render("report.html.j2", lambda x: printable(str(x)), **content)
    paths = folder / "report.md", folder / "report.html"
    for path, text in zip(paths, (markdown, page), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths
