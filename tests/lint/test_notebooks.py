"""Every chapter has its parts, solved exercises, and words for its pictures."""

from __future__ import annotations

import ast
import itertools
import json
import re
from pathlib import Path

import pytest

from cpugrpo_edu.notebook import Question, clinic, stored_questions

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RECORDS = ROOT / "records" / "notebooks"

WIDTH = 76  # columns of code
LONGEST = 40  # lines of printed output
NOISE = re.compile(r"\w+Warning\b|deprecat|Traceback|\r", re.I)
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
    assert any("explore(" in c for c in code), "a chapter needs a slider"
    assert any("quiz(" in c for c in code)
    assert text.count("**Predict") >= 3, "the reader bets before looking"
    assert "{cite}" in text.split("## Further reading")[1]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_exercises_have_solutions(path):
    text = "\n\n".join(source(cell) for cell in cells(path, "markdown"))
    exercises = re.findall(r"^`{3,}\{exercise\}.*\n:label: (\S+)", text, re.M)
    solutions = re.findall(r"^`{3,}\{solution-start\} (\S+)\n:class: dropdown", text, re.M)
    assert 3 <= len(exercises) <= 6
    assert exercises == solutions
    for label in exercises:
        asked = text.index(f":label: {label}\n")
        solved = text.index("{solution-start} " + label)
        assert "{admonition} Hint" in text[asked:solved], f"{label} has no hint"
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
def test_every_cell_is_executed_and_short(path):
    counts = []
    for cell in cells(path, "code"):
        counts.append(cell["execution_count"])
        wide = [line for line in source(cell).splitlines() if len(line) > WIDTH]
        assert not wide, f"over {WIDTH} columns: {wide[0]}"
        if "NBVAL_CHECK_OUTPUT" in source(cell):
            assert cell["outputs"], f"no stored output to compare with: {source(cell)}"
        for output in cell["outputs"]:
            assert output["output_type"] != "error", source(cell)
            text = "".join(output.get("text", ""))
            assert output.get("name") != "stderr", text
            assert not NOISE.search(text), text
            assert text.count("\n") <= LONGEST, f"a wall of text: {source(cell)}"
    assert counts == list(range(1, len(counts) + 1)), "execute it again, from top to bottom"


def asked_in(path):
    """The questions of a chapter's quiz: stored in a file, or written into a hidden cell."""
    [asked] = [cell for cell in cells(path, "code") if re.search(r"^quiz\(", source(cell), re.M)]
    if f'quiz("{path.stem}")' in source(asked):
        return stored_questions(path.stem)
    assert asked["metadata"]["jupyter"]["source_hidden"], "the source gives the answers away"
    tree = ast.parse(source(asked))
    [call] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Expr) and getattr(node.value.func, "id", "") == "quiz"
    ]
    parts = [{k.arg: ast.literal_eval(k.value) for k in q.keywords} for q in call.args]
    return [Question("", p["right"], p["wrong"]) for p in parts]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_quiz_hides_its_answers_and_explains_itself(path):
    questions = asked_in(path)
    assert len(questions) >= 4
    for question in questions:
        answers = [question.right, *question.wrong]
        assert len(answers) >= 3 and len({text for text, _ in answers}) == len(answers)
        assert all(len(why) >= 10 for _, why in answers), answers


def test_the_clinic_has_enough_broken_runs():
    names = [case.name for case in clinic.cases()]
    assert len(names) >= 8
    faults = ("template", "truncated", "greedy", "drowns", "right", "end-of-text", "rate", "KL")
    for fault in faults:
        assert any(fault in name for name in names), fault


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
