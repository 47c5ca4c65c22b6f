"""What every chapter must have: parts, solved exercises, words for pictures."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RECORDS = ROOT / "records" / "notebooks"

SECTIONS = ["Check yourself", "Take-aways", "What this does not show", "Further reading"]
LARGEST = 800_000  # bytes


def cells(path, kind):
    notebook = json.loads(path.read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_has_its_parts(path):
    markdown = [source(cell) for cell in cells(path, "markdown")]
    text = "\n\n".join(markdown)
    assert markdown[0].startswith("# "), "begin with the title"
    assert "**Objectives.**" in markdown[0] and "**Before:**" in markdown[0]
    headings = re.findall(r"^(#+) (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    assert [h for level, h in headings if level == "#"] == [headings[0][1]], "one title"
    levels = [len(level) for level, _ in headings]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), "a level is skipped"
    titles = [title for _, title in headings]
    assert titles[-3:] == SECTIONS[1:] and SECTIONS[0] in titles
    code = [source(cell) for cell in cells(path, "code")]
    assert f'begin("{path.stem}", TIER)' in code[0] and 'TIER = "SMOKE"' in code[0]
    assert any("explore(" in c for c in code), "a slider where moving something teaches"
    assert any("quiz(" in c for c in code)
    assert "{cite}" in text.split("## Further reading")[1]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_exercises_have_solutions(path):
    text = "\n\n".join(source(cell) for cell in cells(path, "markdown"))
    exercises = re.findall(r"^`{3,}\{exercise\}.*\n:label: (\S+)", text, re.M)
    solutions = re.findall(r"^`{3,}\{solution-start\} (\S+)\n:class: dropdown", text, re.M)
    assert 3 <= len(exercises) <= 6
    assert exercises == solutions
    assert len(re.findall(r"^`{3,}\{solution-end\}", text, re.M)) == len(solutions)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_pictures_have_words(path):
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            data, metadata = output.get("data", {}), output.get("metadata", {})
            if "image/png" in data:
                assert metadata.get("image/png", {}).get("alt"), f"use show(): {source(cell)}"
            images = re.findall(r"<img\b[^>]*>", "".join(data.get("text/html", "")))
            assert all(re.search(r'\balt="[^"]+"', image) for image in images), source(cell)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_is_clean_and_measured(path):
    text = path.read_text()
    assert len(text) < LARGEST, f"{len(text)} bytes: fewer or smaller pictures"
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", text), "a path of a machine"
    notebook = json.loads(text)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags", "jupyter", "mystnb"}
    record = json.loads((RECORDS / f"{path.stem}.json").read_text())
    assert record["kind"] == "notebook"
    assert f"{record['results']['seconds']:.0f} s" in json.dumps(cells(path, "code")[0]["outputs"])


def test_citations_are_in_the_bibliography():
    known = set(
        re.findall(r"^@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text(), re.M)
    )
    for path in CHAPTERS:
        for cell in cells(path, "markdown"):
            cited = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", source(cell))
            keys = {key.strip() for group in cited for key in group.split(",")}
            assert keys <= known, f"{path.stem}: {sorted(keys - known)}"
