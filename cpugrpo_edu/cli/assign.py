"""``cpugrpo assign``: a course in nbgrader, from the folder to the CSV of grades."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from cpugrpo_edu.cli.command import Call, command, group, table
from cpugrpo_edu.errors import UserError

if TYPE_CHECKING:
    from cpugrpo_edu.course.course import Course

app = group(
    "Release problem sets, collect and autograde submissions, hand out feedback and grades."
)

Folder = Annotated[Path, typer.Option("--course", help="The course folder.")]
Name = Annotated[str, typer.Argument(help="The assignment, such as ps1.")]


def grading() -> ModuleType:
    """The module of the course folder, which needs the optional nbgrader."""
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


@command(app, "new-course")
def new_course(
    call: Call,
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    exchange: Annotated[
        Path | None, typer.Option(help="On a hub: the folder that all users exchange files in.")
    ] = None,
) -> None:
    """Lay out a course: configuration, roster, gradebook, exchange, limits, secret.

    Example: `cpugrpo assign new-course grpo-2027`
    """
    made = grading().new_course(folder, exchange)
    call.give(
        {"course": str(folder), "made": made},
        f"{folder}: {', '.join(made)}\nNext: fill in roster.csv, keep a copy of course_secret, "
        f"then: cpugrpo assign release ps1 --master ps1.ipynb --course {shlex.quote(str(folder))}",
    )


@command(app)
def release(
    call: Call,
    assignment: Name,
    course: Folder = Path("."),
    master: Annotated[Path | None, typer.Option(help="The instructor's notebook.")] = None,
) -> None:
    """Make the student version and put it into the exchange.

    Example: `cpugrpo assign release ps1 --master notebooks/psets/ps1/ps1.ipynb`
    """
    path = str(opened(course).release(assignment, master))
    call.give({"released": path}, f"Student version: {path}")


@command(app)
def collect(
    call: Call,
    assignment: Name,
    course: Folder = Path("."),
    downloaded: Annotated[
        Path | None, typer.Option("--from", help="A folder or zip of downloaded submissions.")
    ] = None,
) -> None:
    """Take the submissions, from the exchange or from what Canvas or Moodle let you download.

    Example: `cpugrpo assign collect ps1 --from submissions.zip`
    """
    found, held = opened(course).collect(assignment, downloaded)
    lines = [f"{len(found)} submissions", *(f"held back: {each}" for each in held)]
    call.give({"submissions": found, "held_back": held}, *lines)


@command(app)
def autograde(
    call: Call,
    assignment: Name,
    course: Folder = Path("."),
    jobs: Annotated[int, typer.Option(help="Submissions at the same time.")] = 1,
    force: Annotated[bool, typer.Option(help="Grade again what has not changed.")] = False,
    student: Annotated[list[str] | None, typer.Option(help="Only these; repeatable.")] = None,
) -> None:
    """Grade each new or changed submission, contained. After Ctrl-C the same command goes on.

    Example: `cpugrpo assign autograde ps1 --jobs 4`
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    folder = opened(course)  # first: it says how to install nbgrader
    from cpugrpo_edu.course import autograde as grader
    from cpugrpo_edu.course.outcome import Outcome
    from cpugrpo_edu.course.sandbox import CONTAINED

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=call.quiet) as progress:
        task = progress.add_task(f"autograde {assignment}", total=None)

        def done(outcome: Outcome, total: int) -> None:
            progress.update(task, total=total, advance=1)
            if why := "; ".join([*outcome.flags, *outcome.review, *outcome.notes]):
                progress.console.print(f"{outcome.student}: {outcome.status}: {why}", markup=False)

        outcomes = grader.autograde(
            folder, assignment, jobs=jobs, force=force, only=student, on_done=done
        )
    skipped = len(folder.submissions(assignment)) - len(outcomes)
    points = ["-" if o.status == "failed" else f"{o.score:g}" for o in outcomes]
    lines = [f"{o.student}\t{p}/{o.max_score:g}\t{o.status}" for o, p in zip(outcomes, points)]
    lines.append(f"{len(outcomes)} graded, {skipped} unchanged or not chosen")
    if outcomes:
        lines.append(f"Containment on this machine: {CONTAINED[outcomes[0].level]}")
    call.give([asdict(outcome) for outcome in outcomes], *lines)


@command(app)
def feedback(
    call: Call,
    assignment: Name,
    course: Folder = Path("."),
    release: Annotated[bool, typer.Option("--release", help="Into the exchange as well.")] = False,
) -> None:
    """Write a page for each student, without hidden tests and mark schemes, also for failed work.

    Example: `cpugrpo assign feedback ps1`
    """
    pages = [str(page) for page in opened(course).feedback(assignment, release)]
    call.give({"pages": pages}, f"{len(pages)} pages in feedback/STUDENT/{assignment}/")


@command(app)
def peers(
    call: Call,
    assignment: Name,
    course: Folder = Path("."),
    force: Annotated[bool, typer.Option(help="Deal anew where reviews were dealt.")] = False,
) -> None:
    """Deal the submissions out for anonymous peer review: each student gives and gets one.

    Example: `cpugrpo assign peers ps6`
    """
    reviews = opened(course).peers(assignment, force)
    where = f"peers/{assignment}"
    call.give(
        {"folder": where, "reviews": len(reviews)},
        f"{len(reviews)} reviews: hand each student the folder {where}/STUDENT; "
        f"keep {where}/pairs.csv, which tells who wrote what",
    )


@command(app)
def concepts(
    call: Call,
    folder: Annotated[Path, typer.Argument(help="A folder for the student's files.")],
    bank: Annotated[Path, typer.Option(help="The inventory with its key.")] = Path(
        "notebooks/instructor/concept_inventory.json"
    ),
) -> None:
    """Write the concept inventory for students: a notebook with a form, without the key.

    Example: `cpugrpo assign concepts hand-out/concepts`
    """
    from cpugrpo_edu.course.inventory import read_bank, write_student_version

    made = [str(path) for path in write_student_version(read_bank(bank), folder)]
    call.give({"made": made}, *made)


@command(app)
def export(
    call: Call,
    to: Annotated[Path, typer.Argument(help="The CSV file to write.")],
    course: Folder = Path("."),
    platform: Annotated[str, typer.Option("--for", help="canvas, moodle or plain.")] = "canvas",
    assignment: Annotated[list[str] | None, typer.Option(help="Only these; repeatable.")] = None,
) -> None:
    """Write the scores as a CSV file that Canvas or Moodle can import.

    Example: `cpugrpo assign export grades.csv --for moodle`
    """
    rows, waiting = opened(course).export(platform, to, assignment)
    lines = [f"{to}: {rows} students", *(f"not graded: {each}" for each in waiting)]
    call.give({"file": str(to), "rows": rows, "not_graded": waiting}, *lines)


@command(app)
def status(call: Call, course: Folder = Path(".")) -> None:
    """Count the submissions of each assignment: graded, flagged, failed, to grade by hand.

    Example: `cpugrpo assign status`
    """
    rows = opened(course).status()
    heads = ["assignment", "submitted", "graded", "changed", "flagged", "failed"]
    cells = [
        [", ".join(value) if isinstance(value, list) else str(value) for value in row.values()]
        for row in rows
    ]
    call.give(rows, table(str(course), [*heads, "to grade by hand"], cells))
