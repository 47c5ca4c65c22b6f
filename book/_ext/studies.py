"""Sphinx: the studies' pages, from their records at build time.

- the directive ``{study} NAME``: what the record says, its tables and its plot; or that the
  study was not run yet;
- the directive ``{calculator}``: the form over the assumptions of the study "CPU or GPU?",
  worked by ``_static/calculator.js``.
"""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.studies import cpu_or_gpu
from cpugrpo_edu.lab.studies.registry import STUDIES, study_named
from cpugrpo_edu.record.markdown import markdown_table
from cpugrpo_edu.record.run_record import RunRecord

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDS = ROOT / "records"

REDUCED = (
    "**This is the reduced version**, made in a minute: it shows that the study works, but "
    "answers nothing."
)


def study_record(name: str) -> RunRecord | None:
    path = RECORDS / f"study-{study_named(name).name}.json"
    return RunRecord.load(path) if path.exists() else None


def only_reduced(record: RunRecord) -> bool:
    """Whether a record answers nothing. A study that trains nothing has no reduced version."""
    return bool(record.config.get("reduced")) and record.kind != "study-cpu-or-gpu"


def not_run(name: str) -> str:
    return (
        f"**Not run yet.** This page shows the design; there is no result. "
        f"`cpugrpo study run {name} --output records/study-{name}.json` runs it."
    )


def study_text(name: str) -> str:
    """A study's findings and tables as Markdown, or that it was not run."""
    study, record = study_named(name), study_record(name)
    if record is None:
        return not_run(name)
    machine = record.machine
    parts = [
        f"Measured on {machine['cpu']}, {machine['usable_cores']} usable cores, "
        f"{record.created[:10]}, commit {record.commit[:10]}{record.commit[40:]}."
    ]
    if only_reduced(record):
        parts.append(REDUCED)
    parts.append("\n".join(f"- {line}" for line in study.load().findings(record)))
    for title, header, rows in study.tables(record):
        parts += [f"**{title}**", markdown_table(header, rows)]
    return "\n\n".join(parts)


def table_studies() -> str:
    """The list of studies, and whether each has a record."""
    rows = []
    for study in STUDIES.values():
        record = study_record(study.name)
        state = "not run yet" if record is None else f"recorded {record.created[:10]}"
        if record is not None and only_reduced(record):
            state += ", reduced version only"
        page = study.name.replace("-", "_")
        rows.append(f"| {{doc}}`{study.name} <{page}>` | {study.question} | {state} |")
    return "\n".join(["| Study | Question | State |", "| --- | --- | --- |", *rows])


def calculator_form() -> str:
    """The form with the defaults and what they give, so that it can be read without scripts."""
    inputs = cpu_or_gpu.assumptions()
    found = cpu_or_gpu.calculate(cpu_or_gpu.values_of(inputs))
    groups = {"": "The class", **cpu_or_gpu.PLACES}
    fields = []
    for place, title in groups.items():
        rows = []
        for each in inputs:
            start = each.key.split("_")[0]
            if (start if start in cpu_or_gpu.PLACES else "") != place:
                continue
            data = asdict(each)
            value = "" if each.value is None else f"{each.value:.4g}"
            needed = "" if each.value is None else " required"
            label = each.label.split(": ")[-1]
            rows.append(
                f'<p><label for="calc-{data["key"]}">{escape(label)}, {escape(each.unit)}</label> '
                f'<input type="number" step="any" min="{each.least:g}" id="calc-{each.key}" '
                f'name="{each.key}" value="{value}"{needed} '
                f'aria-describedby="calc-{each.key}-source"> '
                f'<small id="calc-{each.key}-source">{escape(each.source)}</small></p>'
            )
        fields.append(f"<fieldset><legend>{title}</legend>{''.join(rows)}</fieldset>")
    keys = ("hours_each", "wall_hours", "machine_hours", "kwh", "money")
    body = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(
            f'<td data-place="{place}" data-key="{key}">'
            f"{f'{found[place][key]:.2f}' if found[place] else '–'}</td>"
            for key in keys
        )
        + "</tr>"
        for place, name in cpu_or_gpu.PLACES.items()
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in cpu_or_gpu.CLASS_HEADER)
    pays = {
        name: cpu_or_gpu.saves_from(name, value) for name, value in found["gpu_pays_from"].items()
    }
    return (
        '<form class="calculator" aria-label="Calculator">'
        + "".join(fields)
        + '<p><button type="reset">Back to the defaults</button></p>'
        + '<p role="alert" data-error></p>'
        + '<div aria-live="polite"><table class="table"><caption>The class under these '
        + f"assumptions</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        + "<p>The GPU against the cloud CPU: "
        + "; ".join(f'<span data-pays="{name}">{text}</span>' for name, text in pays.items())
        + ".</p></div></form>"
    )


class StudyResults(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        self.env.note_dependency(str(RECORDS / f"study-{name}.json"))
        try:
            lines, record = study_text(name).splitlines(), study_record(name)
            plot = None if record is None else study_named(name).load().plot(record)
        except UserError as error:
            raise self.error(str(error)) from error
        box = nodes.container(classes=["from-records"])
        self.state.nested_parse(StringList(lines, "studies"), self.content_offset, box)
        if plot is None:
            return [box]
        path = Path(self.env.srcdir) / "_build" / "records" / f"study-{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plot.png(dpi=150, colours=64))
        return [box, nodes.image(uri=f"/_build/records/{path.name}", alt=plot.alt, width="100%")]


class StudyList(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        for path in RECORDS.glob("study-*.json"):
            self.env.note_dependency(str(path))
        box = nodes.container(classes=["from-records"])
        lines = StringList(table_studies().splitlines(), "studies")
        self.state.nested_parse(lines, self.content_offset, box)
        return [box]


class Calculator(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        for path in RECORDS.glob("run-*.json"):
            self.env.note_dependency(str(path))
        up = "../" * self.env.docname.count("/")
        script = f'<script src="{up}_static/calculator.js"></script>'
        return [nodes.raw("", calculator_form() + script, format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("study", StudyResults)
    app.add_directive("studies", StudyList)
    app.add_directive("calculator", Calculator)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
