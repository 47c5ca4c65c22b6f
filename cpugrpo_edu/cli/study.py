"""``cpugrpo study`` and ``cpugrpo calculator``: questions that one run cannot answer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from cpugrpo_edu.cli.command import Call, app, command, group, within
from cpugrpo_edu.engine import hardware
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import check_output_folder

study = group("Questions that one run cannot answer: run them here, read them in the book.")
app.add_typer(study, name="study")


@command(study, "list")
def study_list(call: Call) -> None:
    """List the studies, and whether each has a record.

    Example: `cpugrpo study list`
    """
    from cpugrpo_edu.lab.studies.registry import STUDIES
    from cpugrpo_edu.record.markdown import markdown_table
    from cpugrpo_edu.show.text import records_folder

    paths = {name: records_folder() / f"study-{name}.json" for name in STUDIES}
    rows = [
        {
            "name": name,
            "question": STUDIES[name].question,
            "record": str(path) if path.exists() else None,
        }
        for name, path in paths.items()
    ]
    lines = [[str(r["name"]), str(r["question"]), r["record"] or "not run yet"] for r in rows]
    call.give(rows, markdown_table(["Study", "Question", "Record"], lines))


@command(study, "run")
def study_run(
    call: Call,
    name: Annotated[str, Argument(help="One of cpugrpo study list.")],
    reduced: Annotated[bool, Option("--reduced", help="A minute, to see that it works.")] = False,
    output: Annotated[Path | None, Option(help="Default: WORK/study-NAME.json.")] = None,
    model: Annotated[list[str] | None, Option(help="One more model; repeatable.")] = None,
    seeds: Annotated[
        int | None, Option(help="How many training seeds.", callback=within(1))
    ] = None,
    only: Annotated[
        str | None, Option(help="One factor of the ablations, or one arm of real-model.")
    ] = None,
    work: Annotated[Path, Option(help="Folder of what is done so far.")] = Path("runs/studies"),
    cache: Annotated[Path | None, Option(help="Folder of the models that it trains.")] = None,
) -> None:
    """Run a study and write its record. After Ctrl-C, the same command resumes it.

    Example: `cpugrpo study run quantization --reduced`
    """
    from cpugrpo_edu.lab.studies.registry import study_named
    from cpugrpo_edu.lab.studies.setting import Setting
    from cpugrpo_edu.record.markdown import markdown_table

    chosen = study_named(name)
    path = output or work / f"study-{name}{'-reduced' if reduced else ''}.json"
    check_output_folder(path.parent)
    hardware.configure_threads()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    setting = Setting(reduced, work, cache, call.say, tuple(model or ()), seeds, only)
    outcome = chosen.run(setting)
    for saved in outcome.save(path):
        call.say(f"saved: {saved}")
    tables = [
        f"\n{title}\n\n{markdown_table(header, rows)}"
        for title, header, rows in chosen.tables(outcome.record)
    ]
    findings = "\n" + "\n".join(f"- {line}" for line in chosen.load().findings(outcome.record))
    call.give(asdict(outcome.record), *tables, findings)


@command(app)
def calculator(
    call: Call,
    change: Annotated[
        list[str] | None,
        Option("--set", help="An assumption, such as gpu_speed=20; repeatable."),
    ] = None,
) -> None:
    """What a class needs in time, energy and money on laptops, cloud CPUs and cloud GPUs.

    Every assumption is shown and can be set. No GPU was measured: without its speed you get the
    speed at which it would start to pay.

    Example: `cpugrpo calculator --set students=120 --set gpu_price=0.6`
    """
    from cpugrpo_edu.lab.studies import cpu_or_gpu as module
    from cpugrpo_edu.record.markdown import markdown_table

    inputs = module.assumptions(dict(map(assumption, change or ())))
    found = module.calculate(module.values_of(inputs))
    listed = [asdict(each) for each in inputs]
    rows = [[each.key, *row] for each, row in zip(inputs, module.assumption_rows(listed))]
    call.give(
        {"assumptions": listed, "class": found},
        markdown_table(["Name", "Assumption", "Value", "Unit", "Source"], rows),
        f"\n{markdown_table(module.CLASS_HEADER, module.class_rows(found))}",
        f"\n{module.pays_text(found)}",
    )


def assumption(text: str) -> tuple[str, float]:
    key, _, number = text.partition("=")
    try:
        return key.strip(), float(number)
    except ValueError:
        raise UserError(
            f"cannot read --set {text!r}; give a name and a number, such as gpu_speed=20"
        ) from None
