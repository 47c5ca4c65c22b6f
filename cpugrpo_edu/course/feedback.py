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

import re
from pathlib import Path
from typing import Any, ClassVar

from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor, Preprocessor
from nbgrader.api import Gradebook
from nbgrader.converters import GenerateFeedback
from nbgrader.preprocessors import GetGrades
from traitlets import Bool

REGIONS = ("HIDDEN TESTS", "MARK SCHEME")
NOTICE = "A hidden test failed. Read the task again, and test edge cases of your own."
OWN = ("Timeout", "Tampering", "NotGraded", "NotProven")
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

    def write_single_notebook(self, output: str, resources: Any) -> None:
        super().write_single_notebook(OUTSIDE.sub("", output), resources)

    def init_assignment(self, assignment_id: str, student_id: str) -> None:
        """Copy only the files of ``BY_OWNER`` beside the pages, where nbgrader copies all."""
        target = Path(self._format_dest(assignment_id, student_id))
        target.mkdir(parents=True, exist_ok=True)
        for name in BY_OWNER:
            source = Path(self._format_source(assignment_id, student_id)) / name
            if source.is_file() and not source.is_symlink():
                (target / name).write_bytes(source.read_bytes())
