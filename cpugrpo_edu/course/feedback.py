"""Feedback pages without hidden tests, mark schemes, and what they printed.

nbgrader's own feedback shows the student the whole graded notebook. ``cpugrpo assign feedback``
uses :class:`Feedback`; for a plain ``nbgrader generate_feedback``, put in ``nbgrader_config.py``::

    c.GenerateFeedback.preprocessors = [
        "cpugrpo_edu.course.feedback.HideAnswers",
        "nbgrader.preprocessors.GetGrades",
        "nbconvert.preprocessors.CSSHTMLHeaderPreprocessor",
    ]

Of a hidden test that failed, the page says only that it failed. What a student's code printed
about a hidden test (it can read the source of its caller) is recognised by content and removed.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor, Preprocessor
from nbgrader.api import Gradebook
from nbgrader.converters import GenerateFeedback
from nbgrader.preprocessors import GetGrades
from traitlets import Bool

REGIONS = ("HIDDEN TESTS", "MARK SCHEME")
NOTICE = "A hidden test failed. Read the task again, and test edge cases of your own."
OWN = ("Timeout", "NotCounted", "NotGraded", "NotProven")
"""Errors that grading itself reports: they say what went wrong, not what was tested."""

BY_OWNER = ("timestamp.txt", "submission_secret.txt")
"""Files by which the exchange gives a page to its owner."""

OUTSIDE = re.compile(
    r"<script[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>\s*</script>"
    r"|<link[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>"
    r"|<script[^>]*>[^<]*(?:require\.config|MathJax\.Hub|mathjax)[^<]*</script>",
    re.IGNORECASE,
)
"""What nbconvert's page would load from the network."""

SHORTEST = 12
"""Characters below which a normalised line says nothing about where it came from."""


def squeeze(text: str) -> str:
    """Text without colours, spaces, quotes and escapes."""
    return re.sub(r"[\s\"'\\]+", "", re.sub(r"\x1b\[[0-9;]*m", "", text))


def normalise(line: str) -> str:
    """A line without a line number, squeezed: equal for lines of equal content."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", line)
    return squeeze(re.sub(r"^\W*\d*\s", "", line.strip() + " "))


def regions(source: str, names: tuple[str, ...] = REGIONS) -> tuple[list[str], list[str]]:
    """The lines outside and inside the ``### BEGIN name`` ... ``### END name`` regions."""
    outside: list[str] = []
    inside: list[str] = []
    hidden = False
    for line in source.split("\n"):
        if any(f"BEGIN {name}" in line for name in names):
            hidden = True
        elif any(f"END {name}" in line for name in names):
            hidden = False
        else:
            (inside if hidden else outside).append(line)
    return outside, inside


class HideAnswers(Preprocessor):
    """nbconvert preprocessor that removes hidden tests and mark schemes, source and output."""

    enabled = Bool(True)  # nbconvert's own default is off

    def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
        secrets: set[str] = set()
        public: set[str] = set()
        for source in [*released_sources(resources), *(cell.source for cell in nb.cells)]:
            outside, inside = regions(source)
            public.update(normalise(line) for line in outside)
            secrets.update(normalise(line) for line in inside)
        secrets = {line for line in secrets - public if len(line) >= SHORTEST}
        for cell in nb.cells:
            outside, inside = regions(cell.source)
            if inside:
                cell.source = "\n".join(outside)
            if cell.cell_type == "code":
                shown = [clean(each, cell, bool(inside), secrets) for each in cell.outputs]
                cell.outputs = shown
        return nb, resources


def released_sources(resources: Any) -> list[str]:
    """The sources in the gradebook, with the mark schemes that a submission lacks."""
    about = resources.get("nbgrader")
    if not about:
        return []
    with Gradebook(about["db_url"]) as book:
        notebook = book.find_notebook(about["notebook"], about["assignment"])
        return [cell.source for cell in notebook.source_cells]


def clean(output: Any, cell: Any, hidden: bool, secrets: set[str]) -> Any:
    """The output, or a short one in its place if it would show what is hidden.

    ``hidden`` says that the cell has a hidden region, so that any of its outputs may tell.
    """
    shows = any(secret in squeeze(text_of(output)) for secret in secrets)
    if not hidden and not shows:
        return output
    if output.get("output_type") != "error":
        return type(output)(output_type="stream", name="stdout", text="(output not shown)\n")
    if output.get("ename") in OWN and not shows:
        return output
    # The message of a visible assert is a hint for the student: keep it.
    first = str(output.get("evalue", "")).strip().split("\n")[0]
    visible = first and first in cell.source
    if visible and not any(secret in normalise(first) for secret in secrets):
        notice = f"{output.get('ename', 'Error')}: {first}"
    else:
        notice = NOTICE
    output.update(ename="TestFailed", evalue=notice, traceback=[notice])
    return output


def text_of(output: Any) -> str:
    parts = [output.get("text", ""), *output.get("traceback", []), output.get("evalue", "")]
    parts += [str(value) for value in output.get("data", {}).values()]
    return "\n".join(part if isinstance(part, str) else "".join(part) for part in parts)


class Feedback(GenerateFeedback):
    """nbgrader's pages from cleaned notebooks; they load nothing from the network."""

    preprocessors: ClassVar[list[Any]] = [HideAnswers, GetGrades, CSSHTMLHeaderPreprocessor]
    notes: tuple[str, ...] | list[str] = ()
    """What grading mended, for the top of the page."""

    def write_single_notebook(self, output: str, resources: Any) -> None:
        output = OUTSIDE.sub("", output)
        if self.notes:
            said = f"<div><p>What grading mended or stopped:</p>{as_list(self.notes)}</div>"
            output = re.sub(r"<body[^>]*>", lambda body: body[0] + said, output, count=1)
        super().write_single_notebook(output, resources)

    def init_assignment(self, assignment_id: str, student_id: str) -> None:
        """Copy only the files of ``BY_OWNER`` beside the pages, where nbgrader copies all."""
        source = Path(self._format_source(assignment_id, student_id))
        copy_owner(source, Path(self._format_dest(assignment_id, student_id)))


def as_list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def copy_owner(source: Path, target: Path) -> None:
    """Copy the files of ``BY_OWNER``."""
    target.mkdir(parents=True, exist_ok=True)
    for name in BY_OWNER:
        if (source / name).is_file() and not (source / name).is_symlink():
            (target / name).write_bytes((source / name).read_bytes())


def not_graded_pages(
    folder: Path, names: list[str], why: str, notes: Iterable[str], submitted: Path
) -> list[Path]:
    """Write a page for each notebook of a submission that could not be graded."""
    copy_owner(submitted, folder)
    body = (
        "<h1>Not graded yet</h1><p>Your work arrived, but it could not be graded:</p>"
        f"{as_list([why, *notes])}<p>This is no 0. Please hand in the notebook again, saved from "
        "Jupyter under its original name, or ask your instructor.</p>"
    )
    pages = [folder / f"{name}.html" for name in names]
    for page in pages:
        page.write_text(
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{page.stem}'
            f"</title></head><body>{body}</body></html>\n",
            encoding="utf-8",
        )
    return pages
