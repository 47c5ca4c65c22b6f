"""Sphinx: numbers, tables and plots of the book's pages, from the records at build time.

- the role ``{record}`RECORD:KEY|FORMAT|SCALE|OVER` ``: one number, by
  :func:`cpugrpo_edu.show.text.number`; all but the first part may be left out;
- the directive ``{records} NAME``: a table or list, one of ``TABLES``;
- the directive ``{record-plot} NAME``: a figure with its alternative text, one of ``PLOTS``.

Nothing here is stored, so nothing can be out of date. A missing record or key is a warning,
and the book is built with warnings as errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab import bench_plots
from cpugrpo_edu.lab.tables import COEFFICIENT_HEADER, coefficient_rows, sweep_summary
from cpugrpo_edu.lab.tables import TABLES as BENCH_TABLES
from cpugrpo_edu.notebook.real_model import full_runs
from cpugrpo_edu.record.markdown import markdown_table, markdown_text
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.record.stats import over_seeds
from cpugrpo_edu.show.palette import BLUE, GREEN, GREY, ORANGE, VERMILLION, Plot, new_figure, tidy
from cpugrpo_edu.show.plots import plot_accuracy
from cpugrpo_edu.show.text import (
    MAIN,
    answers_table,
    clock_time,
    gib,
    number,
    percent,
    points,
    results_table,
    value,
)

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDS = ROOT / "records"
CLASS = 30  # students


def runs(ewc: bool | None = None) -> list[RunRecord]:
    """The recorded training runs of the bundled model; with EWC, without, or all."""
    found = [RunRecord.load(path) for path in sorted(RECORDS.glob("run-seed*.json"))]
    return [r for r in found if ewc is None or value(r, "results.components.ewc.on") == ewc]


def chapters() -> list[RunRecord]:
    """What executing each chapter took."""
    found = [RunRecord.load(path) for path in sorted((RECORDS / "notebooks").glob("*.json"))]
    return [record for record in found if record.kind == "notebook"]


def listed(words: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(words))


# Tables


def table_runs() -> str:
    return results_table(runs())


def table_chat() -> str:
    return results_table(full_runs())


def table_answers() -> str:
    """Answers of the chat model before and after training, as in the report of its first run."""
    return answers_table(full_runs()[0])


def table_working() -> str:
    """Habit and skill told apart, without EWC: how often working is shown, how good it is."""
    rows = []
    for side in ("before", "after"):
        found = [value(record, f"results.working.{side}") for record in runs(ewc=False)]
        cells = [
            percent(fmean([row[key] for row in found]))
            for key in ("share_with_working", "accuracy_with_working", "accuracy_bare")
            if all(row[key] is not None for row in found)
        ]
        rows.append([f"{side} training", *cells])
    header = ["When", "Completions with working", "Accuracy with working", "Accuracy without"]
    return markdown_table(header, rows)


def table_int8() -> str:
    """The trained model in INT8 against itself in float32, a row a run."""
    rows = []
    for record in runs():
        row = record.results["comparisons"].get("INT8 vs fp32", {}).get("overall")
        if row is None:
            continue
        ewc = "on" if value(record, "results.components.ewc.on") else "off"
        change = f"{100 * row['difference']:+.1f} ({points(row['low'], row['high'])})"
        rows.append([str(record.seed), ewc, percent(row["before"]), percent(row["after"]), change])
    header = ["Seed", "EWC", "float32", "INT8", "Difference, points (95 % interval)"]
    return markdown_table(header, rows)


def table_chapters() -> str:
    """What each chapter took, from top to bottom, and all of them together."""
    rows = []
    for record in chapters():
        name = record.config["notebook"]
        took, peak = (value(record, f"results.{k}") for k in ("seconds", "peak_rss_bytes"))
        exercises = str(value(record, "results.exercises"))
        rows.append([f"{{doc}}`../notebooks/{name}`", clock_time(took), gib(peak), exercises])
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    seconds = sum(value(record, "results.seconds") for record in chapters())
    peak = max(value(record, "results.peak_rss_bytes") for record in chapters())
    exercises = sum(value(record, "results.exercises") for record in chapters())
    lines.append(f"| all | {clock_time(seconds)} | {gib(peak)} at most | {exercises} |")
    return "\n".join(
        ["| Chapter | Time | Peak memory | Exercises |", "| --- | ---: | ---: | ---: |", *lines]
    )


def table_class() -> str:
    """What a class needs at once, if everybody executes the hungriest chapter together."""
    records = chapters()
    peak = max(value(record, "results.peak_rss_bytes") for record in records)
    longest = max(value(record, "results.seconds") for record in records)
    whole = sum(value(record, "results.seconds") for record in records)
    cores = max(record.machine["usable_cores"] for record in records)
    run = max(value(record, "results.peak_rss_bytes") for record in runs(ewc=False))
    run_seconds = max(value(record, "results.seconds.total") for record in runs(ewc=False))
    rows = [
        ["Memory, the hungriest chapter", gib(peak), gib(CLASS * peak)],
        ["Memory, one `make run`", gib(run), gib(CLASS * run)],
        ["Cores, everybody executing at once, at the recorded speed", cores, CLASS * cores],
        [
            "Core time, the longest chapter",
            clock_time(longest * cores),
            clock_time(CLASS * longest * cores),
        ],
        [
            "Core time, one `make run`",
            clock_time(run_seconds * cores),
            clock_time(CLASS * run_seconds * cores),
        ],
        [
            "Core time, every chapter once",
            clock_time(whole * cores),
            clock_time(CLASS * whole * cores),
        ],
    ]
    lines = [f"| {what} | {one} | {many} |" for what, one, many in rows]
    header = [f"| Need | One student | {CLASS} students |", "| --- | ---: | ---: |"]
    return "\n".join([*header, *lines])


NO_BENCHMARK = "No benchmark is recorded yet, so none is quoted."


def benchmarks() -> list[RunRecord]:
    """The recorded benchmarks that the page shows, in its order."""
    found = [RunRecord.load(path) for path in sorted(RECORDS.glob("**/*.json"))]
    order = list(BENCH_TABLES)
    return sorted(
        (record for record in found if record.kind in order), key=lambda r: order.index(r.kind)
    )


def table_benchmarks() -> str:
    """The recorded benchmarks, each with its machine."""
    parts = []
    for record in benchmarks():
        title, header, rows = BENCH_TABLES[record.kind]
        machine = f"{record.machine['cpu']}, {record.machine['usable_cores']} usable cores"
        parts.append(f"**{title}** {machine}, {record.created[:10]}:")
        parts.append(markdown_table(header, rows(record)))
        if record.kind == "bench-sweep":
            parts.append("How many times its floor each kind of work takes, as fitted:")
            parts.append(markdown_table(COEFFICIENT_HEADER, coefficient_rows(record)))
            parts.append(sweep_summary(record))
    return "\n\n".join(parts) or NO_BENCHMARK


def table_origin() -> str:
    """Where and when the runs were made, and the commit that made them."""
    found = runs() + full_runs()
    machines = listed(
        f"{r.machine['cpu']}, {r.machine['usable_cores']} usable cores, "
        f"{gib(r.machine['total_memory'])} of memory"
        for r in found
    )
    names = ("python", "torch", "transformers", "trl")
    packages = listed(", ".join(f"{name} {r.versions[name]}" for name in names) for r in found)
    return "\n".join(
        [
            f"- **Machine:** {machines}",
            f"- **Versions:** {packages}",
            f"- **Days:** {listed(sorted(r.created[:10] for r in found))}",
            f"- **Commits:** {listed(r.commit[:10] + r.commit[40:] for r in found)}",
        ]
    )


def table_architectures() -> str:
    """What each feature gives on each architecture, a row for each."""
    record = RunRecord.load(RECORDS / "architectures.json")
    features, found = record.config["features"], record.results["table"]
    rows = [
        [name, *(found[name][feature].partition(":")[0] for feature in features)]
        for name in record.config["architectures"]
    ]
    return markdown_table(["Architecture", *features], rows)


def table_refusals() -> str:
    """The sentences that say why, each with the architectures that get it."""
    record = RunRecord.load(RECORDS / "architectures.json")
    names: dict[str, list[str]] = {}
    for name in record.config["architectures"]:
        for result in record.results["table"][name].values():
            verdict, _, sentence = result.partition(": ")
            if verdict == "refused":
                general = re.sub(r"'\w+' model", "model", sentence)
                names.setdefault(general, []).append(name)
    return "\n".join(
        f"- *{markdown_text(sentence)}* ({', '.join(dict.fromkeys(who))})"
        for sentence, who in sorted(names.items())
    )


def table_outcomes() -> str:
    """Objectives and exercises of every chapter, as its notebook states them."""
    parts = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        objectives = re.search(r"\*\*Objectives\.\*\*[^\n]*\n\n(.*?)\n\n\*\*Before", prose, re.S)
        exercises = re.findall(r"^`{3,}\{exercise\} ?(.*)\n:label: (\S+)", prose, re.M)
        links = ", ".join(f"{{ref}}`{title} <{label}>`" for title, label in exercises)
        name = f"{{doc}}`../notebooks/{path.stem}`"
        listed_objectives = objectives.group(1) if objectives else ""
        parts.append(f"**{name}.** After it, a learner can\n\n{listed_objectives}")
        parts.append(f"Exercises: {links}.")
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    "runs": table_runs,
    "chat": table_chat,
    "answers": table_answers,
    "working": table_working,
    "int8": table_int8,
    "chapters": table_chapters,
    "class": table_class,
    "benchmarks": table_benchmarks,
    "origin": table_origin,
    "outcomes": table_outcomes,
    "architectures": table_architectures,
    "refusals": table_refusals,
}


# Plots


def plot_differences() -> Plot:
    """The gain of every run with its interval, and the mean over seeds with the seeds' interval."""
    figure = new_figure(7, 3.6)
    axes = figure.add_subplot()
    labels: list[str] = []
    facts = []
    for ewc, colour, marker in ((True, BLUE, "o"), (False, ORANGE, "s")):
        state = "with EWC" if ewc else "without EWC"
        gains = []
        for record in runs(ewc):
            row = value(record, f"results.comparisons.{MAIN}.overall")
            middle, low, high = (100 * row[k] for k in ("difference", "low", "high"))
            gains.append(middle)
            spread = [[middle - low], [high - middle]]
            at = len(labels)
            axes.errorbar([middle], [at], xerr=spread, fmt=marker, color=colour, capsize=3)
            labels.append(f"seed {record.seed}, {state}")
        if len(gains) > 1:
            mean = over_seeds(gains)
            spread = [[mean.mean - mean.low], [mean.high - mean.mean]]
            at = len(labels)
            axes.errorbar(
                [mean.mean], [at], xerr=spread, fmt="D", color=VERMILLION, capsize=3, ms=8
            )
            labels.append(f"mean, {state}")
            facts.append(
                f"{state} the mean is {mean.mean:+.1f} points "
                f"({mean.low:+.1f} to {mean.high:+.1f} over {len(gains)} seeds), "
                f"single runs {min(gains):+.1f} to {max(gains):+.1f}"
            )
    axes.axvline(0, color=GREY, lw=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    tidy(axes, x="change of accuracy in points (bars: 95 % intervals)", grid="both")
    return Plot(figure, f"Dot chart of the change in accuracy, a row a run: {'; '.join(facts)}.")


def plot_stages() -> Plot:
    """Accuracy on each difficulty after each stage: mean over seeds with its t interval."""
    figure = new_figure(7.4, 3.4)
    facts = []
    first = None
    for panel, ewc in enumerate((True, False)):
        matrices = [value(record, "results.forgetting") for record in runs(ewc)]
        axes = figure.add_subplot(1, 2, panel + 1, sharey=first)
        first = first or axes
        state = "with EWC" if ewc else "without EWC"
        rows = matrices[0]["rows"]
        for j, level in enumerate(matrices[0]["columns"]):
            columns = [[100 * m["accuracy"][i][j] for m in matrices] for i in range(len(rows))]
            spreads = [over_seeds(column) for column in columns]
            means = [spread.mean for spread in spreads]
            axes.errorbar(
                [i + 0.06 * (j - 1) for i in range(len(rows))],
                means,
                yerr=[
                    [s.mean - s.low for s in spreads],
                    [s.high - s.mean for s in spreads],
                ],
                color=(BLUE, ORANGE, GREEN)[j % 3],
                marker="os^"[j % 3],
                capsize=2,
                label=level if panel == 0 else None,
            )
            facts.append(f"{state}, {level}: " + ", ".join(f"{mean:.0f} %" for mean in means))
        axes.set_xticks(range(len(rows)), [row.replace("after ", "after\n") for row in rows])
        axes.set_ylim(0, 100)
        tidy(axes, state, y="accuracy in %" if panel == 0 else "")
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    order = ", ".join(rows)
    return Plot(
        figure,
        f"Line charts of accuracy on held-out problems ({order}), means over seeds: "
        f"{'; '.join(facts)}.",
    )


def plot_reward() -> Plot:
    """The learning curve: mean reward of the sampled completions at every step, a line a seed."""
    figure = new_figure(7, 3)
    axes = figure.add_subplot()
    facts = []
    for ewc, colour, style in ((True, BLUE, "-"), (False, ORANGE, "--")):
        state = "with EWC" if ewc else "without EWC"
        curves = [
            [step["reward"] for step in record.results["steps"]]
            for record in runs(ewc)
            if record.results.get("steps")
        ]
        if not curves:
            continue
        for line in curves:
            axes.plot(range(1, len(line) + 1), line, color=colour, ls=style, lw=0.7, alpha=0.5)
        mean = [fmean(column) for column in zip(*curves, strict=True)]
        steps = range(1, len(mean) + 1)
        axes.plot(steps, mean, color=colour, ls=style, lw=2.2, label=f"{state}, mean of seeds")
        facts.append(f"{state} from {mean[0]:.2f} at the first step to {mean[-1]:.2f} at the last")
    if not facts:
        alt = "No learning curve: the records were made before they kept the steps."
        axes.text(0.5, 0.5, alt, ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return Plot(figure, alt)
    stages = [
        step["stage"] for step in next(r for r in runs() if "steps" in r.results).results["steps"]
    ]
    for i in range(1, len(stages)):
        if stages[i] != stages[i - 1]:
            axes.axvline(i + 0.5, color=GREY, ls=":", lw=1)
    tidy(axes, x="optimizer step (dotted: a new stage begins)", y="mean reward of a batch")
    axes.legend(frameon=False, loc="lower right")
    return Plot(
        figure,
        "Line chart of the mean reward of the sampled completions over the optimizer steps, "
        f"a thin line a seed: {'; '.join(facts)}.",
    )


def plot_benchmark(kind: str) -> Plot | None:
    """The picture of a benchmark's record, if there is one."""
    for record in benchmarks():
        if record.kind == kind:
            return bench_plots.plot_record(record)
    return None


PLOTS: dict[str, Callable[[], Plot | None]] = {
    "differences": plot_differences,
    "stages": plot_stages,
    "reward": plot_reward,
    "accuracy": lambda: plot_accuracy(runs(False)[0]),
    "bench-b1": lambda: plot_benchmark("bench-b1"),
    "bench-rollout": lambda: plot_benchmark("bench-rollout"),
    "bench-sweep": lambda: plot_benchmark("bench-sweep"),
}


# Sphinx


def from_record(text: str) -> str:
    """The text for a role: ``RECORD:KEY``, then optional parts ``|FORMAT|SCALE|OVER``."""
    where, *parts = text.split("|")
    name, colon, key = where.partition(":")
    if not colon or len(parts) > 3:
        raise UserError(f"{text!r} is not RECORD:KEY|FORMAT|SCALE|OVER")
    fmt, scale, over = [*parts, *("{:.1f}", "1", "mean")[len(parts) :]]
    return number(name, key, fmt, float(scale), RECORDS, over)


class RecordRole(SphinxRole):
    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        try:
            shown = from_record(self.text)
        except (UserError, ValueError) as error:
            message = self.inliner.reporter.error(f"record: {error}", line=self.lineno)
            return [nodes.problematic(self.rawtext, self.rawtext)], [message]
        return [nodes.inline(self.rawtext, shown, classes=["record"])], []


class FromRecords(SphinxDirective):
    required_arguments = 1
    choices: dict[str, Any]

    def choose(self) -> Any:
        name = self.arguments[0]
        for path in RECORDS.glob("**/*.json"):
            self.env.note_dependency(str(path))
        if name not in self.choices:
            raise self.error(f"{name!r} is none of {', '.join(self.choices)}")
        try:
            return self.choices[name]()
        except UserError as error:
            raise self.error(str(error)) from error


class RecordsTable(FromRecords):
    choices = TABLES

    def run(self) -> list[nodes.Node]:
        lines = self.choose().splitlines()
        box = nodes.container(classes=["from-records"])
        self.state.nested_parse(StringList(lines, "records"), self.content_offset, box)
        return [box]


class RecordPlot(FromRecords):
    choices = PLOTS
    has_content = True

    def run(self) -> list[nodes.Node]:
        plot = self.choose()
        if plot is None:  # no record: the page says so in words
            return []
        path = Path(self.env.srcdir) / "_build" / "records" / f"{self.arguments[0]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plot.png(dpi=150, colours=64))
        image = nodes.image(uri=f"/_build/records/{path.name}", alt=plot.alt, width="100%")
        figure = nodes.figure("", image)
        if self.content:
            caption = nodes.Element()
            self.state.nested_parse(self.content, self.content_offset, caption)
            figure += nodes.caption("", "", *caption.children[0].children)
        return [figure]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_role("record", RecordRole())
    app.add_directive("records", RecordsTable)
    app.add_directive("record-plot", RecordPlot)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
