"""``cpugrpo assign``: a course in nbgrader, from the folder to the CSV of grades."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from cpugrpo_edu.errors import UserError

if TYPE_CHECKING:
    from cpugrpo_edu.course.course import Course

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Release problem sets, collect and autograde submissions, hand out feedback and grades.",
)

Folder = Annotated[Path, typer.Option("--course", help="The course folder.")]
Name = Annotated[str, typer.Argument(help="The assignment, such as ps1.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]


def grading() -> ModuleType:
    """The module over nbgrader, which is an extra."""
    try:
        from cpugrpo_edu.course import course
    except ImportError as error:
        raise UserError(
            f"grading needs nbgrader ({error}); install it with: pip install 'cpugrpo-edu[grading]'"
        ) from error
    return course


def opened(folder: Path) -> Course:
    course: Course = grading().Course(folder)
    return course


@app.command("new-course")
def new_course(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    exchange: Annotated[
        Path | None, typer.Option(help="On a hub: the folder that all users exchange files in.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Lay out a course: configuration, roster, gradebook, exchange, limits, secret.

    Example: `cpugrpo assign new-course grpo-2027`
    """
    made = grading().new_course(folder, exchange)
    where = shlex.quote(str(folder))
    print(
        json.dumps({"course": str(folder), "made": made})
        if as_json
        else f"{folder}: {', '.join(made)}\nNext: fill in roster.csv, keep a copy of "
        f"course_secret, then: cpugrpo assign release ps1 --master ps1.ipynb --course {where}"
    )


@app.command()
def release(
    assignment: Name,
    course: Folder = Path("."),
    master: Annotated[Path | None, typer.Option(help="The instructor's notebook.")] = None,
    as_json: Json = False,
) -> None:
    """Make the student version and put it into the exchange.

    Example: `cpugrpo assign release ps1 --master notebooks/psets/ps1/ps1.ipynb`
    """
    path = opened(course).release(assignment, master)
    print(json.dumps({"released": str(path)}) if as_json else f"Student version: {path}")


@app.command()
def collect(
    assignment: Name,
    course: Folder = Path("."),
    downloaded: Annotated[
        Path | None, typer.Option("--from", help="A folder or zip of downloaded submissions.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Take the submissions, from the exchange or from what Canvas or Moodle let you download.

    Example: `cpugrpo assign collect ps1 --from submissions.zip`
    """
    found = opened(course).collect(assignment, downloaded)
    print(json.dumps({"submissions": found}) if as_json else f"{len(found)} submissions")


@app.command()
def autograde(
    assignment: Name,
    course: Folder = Path("."),
    jobs: Annotated[int, typer.Option(help="Submissions at the same time.")] = 1,
    force: Annotated[bool, typer.Option(help="Grade again what has not changed.")] = False,
    student: Annotated[list[str] | None, typer.Option(help="Only these; repeatable.")] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Grade every new or changed submission, each one shut in. Ctrl-C and go on later.

    Example: `cpugrpo assign autograde ps1 --jobs 4`
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from cpugrpo_edu.course.outcome import Outcome

    opening = opened(course)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task(f"autograde {assignment}", total=None)

        def done(outcome: Outcome) -> None:
            progress.advance(task)
            if outcome.status != "ok":
                why = "; ".join([*outcome.flags, *outcome.review])
                progress.console.print(f"{outcome.student}: {outcome.status}: {why}", markup=False)

        outcomes = opening.autograde(
            assignment,
            jobs=jobs,
            force=force,
            only=student,
            on_start=lambda total: progress.update(task, total=total),
            on_done=done,
        )
    if as_json:
        print(json.dumps([asdict(outcome) for outcome in outcomes]))
        return
    for each in outcomes:
        print(f"{each.student}\t{each.score:g}/{each.max_score:g}\t{each.status}")
    skipped = len(opening.submissions(assignment)) - len(outcomes)
    print(f"{len(outcomes)} graded, {skipped} unchanged or not chosen")
    if outcomes:
        from cpugrpo_edu.course.outcome import CONTAINED

        print(f"Containment on this machine: {CONTAINED[outcomes[0].level]}")


@app.command()
def feedback(
    assignment: Name,
    course: Folder = Path("."),
    release: Annotated[bool, typer.Option("--release", help="Into the exchange as well.")] = False,
    as_json: Json = False,
) -> None:
    """Write a page for each student, without hidden tests and mark schemes.

    Example: `cpugrpo assign feedback ps1`
    """
    pages = opened(course).feedback(assignment, release)
    text = f"{len(pages)} pages in feedback/STUDENT/{assignment}/"
    print(json.dumps({"pages": [str(page) for page in pages]}) if as_json else text)


@app.command()
def peers(
    assignment: Name,
    course: Folder = Path("."),
    force: Annotated[bool, typer.Option(help="Deal anew where reviews were dealt.")] = False,
    as_json: Json = False,
) -> None:
    """Deal the submissions out for anonymous peer review: each student gives and gets one.

    Example: `cpugrpo assign peers ps6`
    """
    reviews = opened(course).peers(assignment, force)
    where = f"peers/{assignment}"
    print(
        json.dumps({"folder": where, "reviews": len(reviews)})
        if as_json
        else f"{len(reviews)} reviews: hand each student the folder {where}/STUDENT; "
        f"keep {where}/pairs.csv, which tells who wrote what"
    )


@app.command()
def concepts(
    folder: Annotated[Path, typer.Argument(help="A folder for the student's files.")],
    bank: Annotated[Path, typer.Option(help="The inventory with its key.")] = Path(
        "notebooks/instructor/concept_inventory.json"
    ),
    as_json: Json = False,
) -> None:
    """Write the concept inventory for students: a notebook with a form, without the key.

    Example: `cpugrpo assign concepts hand-out/concepts`
    """
    from cpugrpo_edu.course.inventory import read_bank, write_student_version

    made = [str(path) for path in write_student_version(read_bank(bank), folder)]
    print(json.dumps({"made": made}) if as_json else "\n".join(made))


@app.command()
def export(
    to: Annotated[Path, typer.Argument(help="The CSV file to write.")],
    course: Folder = Path("."),
    kind: Annotated[str, typer.Option("--for", help="canvas, moodle or plain.")] = "canvas",
    assignment: Annotated[list[str] | None, typer.Option(help="Only these; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Write the scores as a CSV file that Canvas or Moodle can import.

    Example: `cpugrpo assign export grades.csv --for moodle`
    """
    rows = opened(course).export(kind, to, assignment)
    print(json.dumps({"file": str(to), "rows": rows}) if as_json else f"{to}: {rows} students")


@app.command()
def status(course: Folder = Path("."), as_json: Json = False) -> None:
    """How many submissions of each assignment are there, graded, flagged, to grade by hand.

    Example: `cpugrpo assign status`
    """
    rows = opened(course).status()
    if as_json:
        print(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(course))
    heads = ["assignment", "submitted", "graded", "changed", "flagged", "failed"]
    for head in [*heads, "to grade by hand"]:
        table.add_column(head)
    for row in rows:
        cells = [", ".join(v) if isinstance(v, list) else str(v) for v in row.values()]
        table.add_row(*cells)
    Console().print(table)
