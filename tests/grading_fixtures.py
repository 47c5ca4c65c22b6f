"""A small assignment and submissions of it, for the tests of grading."""

from __future__ import annotations

import copy
import os

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HIDDEN = "assert mean([4.25, 9.75]) == 7.0, 'hidden word xylophone'"
SCHEME = "Full marks name the baseline and the variance it removes"


def meta(name, *, grade=False, solution=False, locked=False, points=None):
    found = {
        "grade_id": name,
        "grade": grade,
        "solution": solution,
        "locked": locked,
        "task": False,
        "schema_version": 3,
    }
    if points is not None:
        found["points"] = points
    return {"nbgrader": found}


def master():
    return new_notebook(
        cells=[
            new_markdown_cell("# Small", metadata=meta("title", locked=True)),
            new_code_cell(
                "import math\nimport numpy as np\nfrom cpugrpo_edu.errors import UserError",
                metadata=meta("imports", locked=True),
            ),
            new_code_cell(
                "def mean(values):\n"
                "    ### BEGIN SOLUTION\n"
                "    return float(np.sum(values) / len(values))\n"
                "    ### END SOLUTION",
                metadata=meta("mean", solution=True),
            ),
            new_code_cell(
                "assert np.isclose(mean([1, 2, 3]), 2.0), 'the mean of 1, 2, 3 is 2'\n"
                f"### BEGIN HIDDEN TESTS\n{HIDDEN}\n### END HIDDEN TESTS",
                metadata=meta("test-mean", grade=True, locked=True, points=3),
            ),
            new_code_cell(
                "def double(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION",
                metadata=meta("double", solution=True),
            ),
            new_code_cell(
                "share = 0.5 * (double(2) == 4) + 0.5 * (double(-1.5) == -3.0)\n2 * share",
                metadata=meta("test-double", grade=True, locked=True, points=2),
            ),
            new_markdown_cell(
                f"Why subtract a baseline?\n### BEGIN MARK SCHEME\n{SCHEME}\n### END MARK SCHEME",
                metadata=meta("why", grade=True, solution=True, points=1),
            ),
        ],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
    )


RIGHT = {
    "mean": "def mean(values):\n    return sum(values) / len(values)",
    "double": "def double(x):\n    return x + x",
}


def cell_of(notebook, name):
    return next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == name)


def submission(released, **answers):
    """The released notebook with answers written into its solution cells."""
    notebook = copy.deepcopy(released)
    for name, source in {**RIGHT, **answers}.items():
        cell_of(notebook, name).source = source
    return notebook


def write_master(folder):
    folder.mkdir(parents=True)
    path = folder / "small.ipynb"
    nbformat.write(master(), path)
    return path


def write_submissions(folder, released, answers):
    """``STUDENT/small.ipynb`` for each student; the value is answers, or a notebook's text."""
    for student, given in answers.items():
        (folder / student).mkdir(parents=True)
        path = folder / student / "small.ipynb"
        if isinstance(given, str):
            path.write_text(given)
        else:
            nbformat.write(submission(released, **given), path)


def scores_of(course, assignment, student):
    """Points by the name of the graded cell."""
    with course.gradebook() as book:
        found = book.find_submission(assignment, student)
        return {grade.name: grade.score for nb in found.notebooks for grade in nb.grades}


def skip_where_root_cannot_grade(course):
    """Skip where neither bubblewrap nor another user can run a submission that root grades."""
    from cpugrpo_edu.course.sandbox import Sandbox, strongest

    level = strongest(Sandbox("none", 60001, course.root, course.limits())).level
    if os.getuid() == 0 and level in ("limits", "none"):
        pytest.skip("root needs bubblewrap to grade here, or a Python that other users can start")
