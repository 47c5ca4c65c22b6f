"""Feedback pages without hidden tests, mark schemes and what they printed.

nbgrader's own feedback shows the student the whole graded notebook. ``cpugrpo assign feedback``
uses :class:`Feedback`; for a plain ``nbgrader generate_feedback``, in ``nbgrader_config.py``::

    c.GenerateFeedback.preprocessors = [
        "cpugrpo_edu.course.feedback.HideAnswers",
        "nbgrader.preprocessors.GetGrades",
        "nbconvert.preprocessors.CSSHTMLHeaderPreprocessor",
    ]

A hidden test that failed is reported as failed, and no more. What a student's code printed about
a hidden test (it can read the source of its caller) is taken out by content.
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
"""Errors that grading itself reports; they tell what went wrong, not what was tested."""

OUTSIDE = re.compile(
    r"<script[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>\s*</script>"
    r"|<link[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>"
    r"|<script[^>]*>[^<]*(?:require\.config|MathJax\.Hub|mathjax)[^<]*</script>",
    re.IGNORECASE,
)
"""What nbconvert's page would load from the network."""

SHORTEST = 12
"""Characters of a normalised line below which it says nothing about where it came from."""


def normalise(line: str) -> str:
    """A line without spaces, escapes, quotes and line numbers, to be compared by content."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", line)
    line = re.sub(r"^\W*\d*\s", "", line.strip() + " ")
    return re.sub(r"[\s\"'\\]+", "", line)


def regions(source: str, names: tuple[str, ...] = REGIONS) -> tuple[list[str], list[str]]:
    """The lines outside, and those inside, the ``### BEGIN name`` ... ``### END name`` regions."""
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
    """nbconvert preprocessor: takes out hidden tests and mark schemes, source and output."""

    enabled = Bool(True)  # nbconvert's own default is off

    def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
        secrets: set[str] = set()
        public: set[str] = set()
        with_hidden = []
        for source in _released(resources):
            outside, inside = regions(source)
            public.update(normalise(line) for line in outside)
            secrets.update(normalise(line) for line in inside)
        for cell in nb.cells:
            outside, inside = regions(cell.source)
            public.update(normalise(line) for line in outside)
            if inside:
                cell.source = "\n".join(outside)
                secrets.update(normalise(line) for line in inside)
                with_hidden.append(cell)
        secrets = {line for line in secrets - public if len(line) >= SHORTEST}
        for cell in nb.cells:
            if cell.cell_type == "code":
                hide = any(cell is other for other in with_hidden)
                cell.outputs = [_cleaned(o, cell, hide, secrets) for o in cell.get("outputs", [])]
        return nb, resources


BY_OWNER = ("timestamp.txt", "submission_secret.txt")


class Feedback(GenerateFeedback):
    """nbgrader's pages from cleaned notebooks; they load nothing from the network."""

    preprocessors: ClassVar[list[Any]] = [HideAnswers, GetGrades, CSSHTMLHeaderPreprocessor]

    def write_single_notebook(self, output: str, resources: Any) -> None:
        super().write_single_notebook(OUTSIDE.sub("", output), resources)

    def init_assignment(self, assignment_id: str, student_id: str) -> None:
        """Only pages, and what the exchange finds their owner by; no other file is copied."""
        target = Path(self._format_dest(assignment_id, student_id))
        target.mkdir(parents=True, exist_ok=True)
        for name in BY_OWNER:
            source = Path(self._format_source(assignment_id, student_id)) / name
            if source.is_file() and not source.is_symlink():
                (target / name).write_bytes(source.read_bytes())


def _released(resources: Any) -> list[str]:
    """The sources that the gradebook holds, with mark schemes that a submission lacks."""
    about = resources.get("nbgrader")
    if not about:
        return []
    with Gradebook(about["db_url"]) as book:
        notebook = book.find_notebook(about["notebook"], about["assignment"])
        return [cell.source for cell in notebook.source_cells]


def _cleaned(output: Any, cell: Any, hide: bool, secrets: set[str]) -> Any:
    """The output, or a short one in its place if it would show what is hidden."""
    text = _text(output)
    flat = re.sub(r"[\s\"'\\]+", "", re.sub(r"\x1b\[[0-9;]*m", "", text))
    shows = any(secret in flat for secret in secrets)
    if not hide and not shows:
        return output
    if output.get("output_type") == "error":
        if output.get("ename") in OWN and not shows:
            return output
        # The message of a visible assert is a hint for the student: keep it.
        message = str(output.get("evalue", "")).strip()
        first = message.split("\n")[0]
        notice = f"{output.get('ename', 'Error')}: {first}" if first else NOTICE
        if not first or first not in cell.source or any(s in normalise(first) for s in secrets):
            notice = NOTICE
        output.update(ename="TestFailed", evalue=notice, traceback=[notice])
        return output
    return type(output)(output_type="stream", name="stdout", text="(output not shown)\n")


def _text(output: Any) -> str:
    parts = [output.get("text", ""), *output.get("traceback", []), output.get("evalue", "")]
    parts += [str(value) for value in output.get("data", {}).values()]
    return "\n".join(part if isinstance(part, str) else "".join(part) for part in parts)
