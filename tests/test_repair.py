"""Mending a notebook before it is graded: which file it is, its format, its graded cells."""

from __future__ import annotations

import json

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell

pytest.importorskip("nbgrader", reason="grading needs the extra cpugrpo-edu[grading]")

from cpugrpo_edu.course.repair import (
    Source,
    Unreadable,
    find_notebooks,
    place_cells,
    read_notebook,
)

SOURCES = [
    Source("setup", "code", "import math", locked=True, solution=False, points=None),
    Source("answer", "code", "def f():\n    pass", locked=False, solution=True, points=None),
    Source("test", "code", "assert f() == 1", locked=True, solution=False, points=2),
    Source("why", "markdown", "YOUR ANSWER", locked=False, solution=True, points=1),
]


def cells(*pairs):
    """Cells from (label or None, source); markdown where the label is ``why`` or ``text``."""
    made = []
    for label, source in pairs:
        new = new_markdown_cell if label in ("why", "text") else new_code_cell
        made.append(new(source))
        if label not in (None, "text"):
            made[-1].metadata["nbgrader"] = {"grade_id": label}
    return made


GIVEN = [("setup", "import math"), ("answer", "1"), ("test", "assert f() == 1"), ("why", "so")]


@pytest.mark.parametrize(
    ("given", "wanted", "note"),
    [
        (GIVEN, GIVEN, ""),
        # a test keeps the copy behind the answer, an answer the last copy
        (
            [GIVEN[0], GIVEN[2], ("answer", "0"), *GIVEN[1:]],
            [GIVEN[0], (None, GIVEN[2][1]), (None, "0"), *GIVEN[1:]],
            "answer was there 2 times; test was there 2 times",
        ),
        # a changed test is the released one again, a deleted one comes behind its answer
        ([*GIVEN[:2], ("test", "True"), GIVEN[3]], GIVEN, ""),
        ([GIVEN[0], GIVEN[1], GIVEN[3]], GIVEN, "deleted and put back: test"),
        # a solution cell that was deleted needs no cell
        ([GIVEN[0], *GIVEN[2:]], [GIVEN[0], *GIVEN[2:]], ""),
        # no labels: by text, by what is defined, by place; what was released there is no answer
        (
            [
                (None, "import  math"), (None, "def f(): return 1"), (None, "assert f() == 1"),
                ("text", "Why?"), ("text", "so"),
            ],
            [
                ("setup", "import math"), ("answer", "def f(): return 1"), GIVEN[2],
                (None, "Why?"), GIVEN[3],
            ],
            "labels were lost",
        ),
        # both halves of a written answer reach the person who reads it
        ([*GIVEN, ("why", "and so")], [*GIVEN[:3], (None, "so"), ("why", "so\n\nand so")], "why"),
        # an unknown label counts for nothing
        ([*GIVEN, ("bonus", "1")], [*GIVEN, (None, "1")], ""),
    ],
)  # fmt: skip
def test_each_graded_cell_is_there_once(given, wanted, note):
    notes = []
    made = place_cells(cells(*given), SOURCES, {"Why?"}, notes)
    found = [(c.metadata.get("nbgrader", {}).get("grade_id"), c.source) for c in made]
    assert found == wanted
    assert note in "; ".join(notes) and bool(note) == bool(notes)
    points = [c.metadata["nbgrader"].get("points") for c in made if c.metadata]
    assert [p for p in points if p] == [2, 1], "points are those of the release"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"ps1": "a"}, "ps1"),
        ({"ps1 (1)": "a"}, "ps1 (1)"),
        ({"PS1 - Copy (2)": "a"}, "PS1 - Copy (2)"),
        ({"mine": "a"}, "mine"),
        ({"ps1": "a", "ps1-Copy1": "b", "other": "c"}, "ps1"),
        ({"ps1 (1)": "a", "scratch": "b"}, "ps1 (1)"),
        ({"ps1 (1)": "a", "ps1 (2)": "a"}, "ps1 (1)"),
        ({"ps1 (1)": "a", "ps1 (2)": "b"}, None),
        ({"mine": "a", "other": "b"}, None),
        ({}, None),
    ],
)
def test_which_file_is_the_notebook(tmp_path, files, wanted):
    for stem, text in files.items():
        (tmp_path / f"{stem}.ipynb").write_text(text)
    if wanted is None:
        with pytest.raises(Unreadable):
            find_notebooks(tmp_path, ["ps1"], [])
        return
    notes = []
    assert find_notebooks(tmp_path, ["ps1"], notes)["ps1"].stem == wanted
    assert bool(notes) == (wanted != "ps1" or "ps1-Copy1" in files)


def test_two_notebooks_are_told_apart(tmp_path):
    for stem in ("ps1", "bonus-ps1 (1)", "notes"):
        (tmp_path / f"{stem}.ipynb").write_text(stem)
    found = find_notebooks(tmp_path, ["ps1", "bonus-ps1"], [])
    assert {name: path.stem for name, path in found.items()} == {
        "ps1": "ps1",
        "bonus-ps1": "bonus-ps1 (1)",
    }


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "it is empty"),
        (b"\x89PNG\r\n", "is no valid notebook"),
        (b'{"cells": [', "is no valid notebook"),
        (b"[1]", "it holds no cells"),
        (b'{"cells": 3}', "no list of cells"),
        (b"[" * 200_000, "is no valid notebook"),
    ],
)
def test_what_is_no_notebook(tmp_path, raw, why):
    (tmp_path / "x.ipynb").write_bytes(raw)
    with pytest.raises(Unreadable, match=why):
        read_notebook(tmp_path / "x.ipynb", [])


def test_only_sources_and_labels_are_kept(tmp_path):
    """Outputs and other metadata may be invalid, or meant to deceive."""
    label = {"grade_id": "test", "points": 99}
    cell = {"cell_type": "code", "source": ["a\n", "b"], "outputs": [7], "id": "x y"}
    cell["metadata"] = {"cg_done": True, "tags": ["skip-execution"], "nbgrader": label}
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": [cell, "no cell"]}))
    [made] = read_notebook(tmp_path / "x.ipynb", notes := []).cells
    assert (made.source, made.outputs) == ("a\nb", [])
    assert made.metadata == {"nbgrader": {"grade_id": "test"}}
    assert "format was mended" in notes[0]
