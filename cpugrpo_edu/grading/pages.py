"""Feedback pages that give nothing away and load nothing from the network.

nbgrader's own show the hidden tests and mark schemes, in the cells and again in tracebacks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbformat import NotebookNode
from nbformat.v4 import new_output
from nbgrader.api import Gradebook
from nbgrader.converters import GenerateFeedback
from nbgrader.preprocessors import GetGrades, NbGraderPreprocessor

SECRET = re.compile(
    r"^.*BEGIN (HIDDEN TESTS|MARK SCHEME).*\n(?:.*\n)*?.*END \1.*(?:\n|\Z)", re.MULTILINE
)
OUTSIDE = re.compile(
    r"<script[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>\s*</script>"
    r"|<link[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>"
    r"|<script[^>]*>[^<]*(?:require\.config|MathJax\.Hub|mathjax)[^<]*</script>",
    re.IGNORECASE,
)
ANSI = re.compile(r"\x1b\[[0-9;]*m")
LEFT_OUT = "(left out)"


def without_secrets(source: str) -> str:
    return SECRET.sub("", source + "\n").rstrip("\n")


def secret_lines(sources: list[str]) -> set[str]:
    """Lines of hidden tests and mark schemes, long enough not to be met by chance."""
    lines = {
        line.strip()
        for source in sources
        for found in SECRET.finditer(source + "\n")
        for line in found.group().splitlines()
    }
    visible = {line.strip() for source in sources for line in without_secrets(source).splitlines()}
    return {line for line in lines - visible if len(line) >= 8}


def redact(value: Any, secrets: set[str]) -> Any:
    """The value with every line that contains a secret one replaced."""
    if isinstance(value, list):
        return [redact(each, secrets) for each in value]
    if isinstance(value, dict):
        return {key: redact(each, secrets) for key, each in value.items()}
    if not isinstance(value, str):
        return value
    plain = ANSI.sub("", value)
    if not any(line in plain or repr(line)[1:-1] in plain for line in secrets):
        return value
    return "\n".join(
        LEFT_OUT if any(s in line or repr(s)[1:-1] in line for s in secrets) else line
        for line in plain.split("\n")
    )


class StripSecrets(NbGraderPreprocessor):
    """Take hidden tests and mark schemes out of sources and outputs."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        meta = resources["nbgrader"]
        with Gradebook(meta["db_url"]) as book:
            notebook = book.find_notebook(meta["notebook"], meta["assignment"])
            secrets = secret_lines([cell.source for cell in notebook.source_cells])
        for cell in nb.cells:
            hidden = bool(SECRET.search(cell.source + "\n"))
            cell.source = redact(without_secrets(cell.source), secrets)
            if cell.cell_type != "code":
                continue
            outputs = []
            for output in cell.outputs:
                if hidden and output.output_type == "error":
                    seen = output.evalue and str(output.evalue) in cell.source
                    own = output.ename in ("Timeout", "Tampering", "NotGraded", "NotProven")
                    text = f"{output.ename}: {output.evalue}" if seen or own else "A test failed."
                    output = new_output("error", ename="Test", evalue=text, traceback=[text])
                outputs.append(NotebookNode(redact(output, secrets)))
            cell.outputs = outputs
        return nb, resources


class Feedback(GenerateFeedback):
    """nbgrader's pages from stripped notebooks, without anything from outside."""

    preprocessors: ClassVar[list[Any]] = [StripSecrets, GetGrades, CSSHTMLHeaderPreprocessor]

    def write_single_notebook(self, output: str, resources: Any) -> None:
        super().write_single_notebook(OUTSIDE.sub("", output), resources)

    def init_assignment(self, assignment_id: str, student_id: str) -> None:
        """Only pages: the files beside a notebook are not copied."""
        Path(self._format_dest(assignment_id, student_id)).mkdir(parents=True, exist_ok=True)
