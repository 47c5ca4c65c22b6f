"""Right answers in odd notebooks: each oddity of honest work must get full marks and no accusation.

Oddities that do not touch each other share a notebook, so that the whole zoo is one short batch.
``make psets`` prints its line. What cannot be graded at all is held back: it gets a page that says
why, and no 0.
"""

from __future__ import annotations

import builtins
import copy
import csv
import json
import re
from types import SimpleNamespace

import grading_fixtures as small
import nbformat
import pytest
from grading_fixtures import meta
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

pytest.importorskip("nbgrader", reason="grading needs the extra cpugrpo-edu[grading]")

from cpugrpo_edu.course import autograde
from cpugrpo_edu.course import course as grading

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Object of type <Submitted"),  # of nbgrader's queries
]

SETUP = """import math, re, json, time, random
import numpy as np


class Pair:
    def __init__(self, low, high):
        self.low, self.high = low, high


def close(a, b):
    return max(abs(x - y) for x, y in zip(list(a), tuple(b))) < float("1e-9")"""
CLIP = "def clip(x):\n    return Pair(-10, x if x < 10 else 10)"
MEAN = """def mean(numbers):
    total = 0
    for n in numbers:
        total += n
    return total / numbers.__len__()"""
VISIBLE = "assert isinstance(clip(3), Pair), 'a Pair is asked for'\nassert clip(3).high == 3"
HIDDEN = """# Hidden: more numbers.
### BEGIN HIDDEN TESTS
for name in sorted({"ada", "bob"}):
    assert close([mean(range(101))], [50.0]), repr(name)
assert all(type(mean([k, k])) is type(mean([1, 2])) for k in range(3))
assert len(str(vars(clip(99)))) == len(str(dict(low=-10, high=10)))
assert sum(map(int, ["1", "2"])) == math.sqrt(9) and hash(1) == 1 and any([1]) and bytes(1)
assert re.match("a", "ab") and json.loads("[1]") and getattr(time, "time")() > 0
try:
    mean([])
except Exception as problem:
    print(id(problem), set([problem]), open)
else:
    raise AssertionError
assert random.Random(1).random() and np.isclose(mean([1, 2]), 1.5)
round(2 * (clip(99).high == 10) - 0.0, 1)
### END HIDDEN TESTS"""


def master():
    return new_notebook(
        cells=[
            new_markdown_cell("# Homework", metadata=meta("title", locked=True)),
            new_code_cell(SETUP, metadata=meta("setup", locked=True)),
            new_code_cell(
                "def clip(x):\n    ### BEGIN SOLUTION\n    return Pair(-10, min(x, 10))\n"
                "    ### END SOLUTION",
                metadata=meta("clip", solution=True),
            ),
            new_code_cell(VISIBLE, metadata=meta("visible", grade=True, locked=True, points=1)),
            new_code_cell(
                "def mean(numbers):\n    ### BEGIN SOLUTION\n    return sum(numbers) / len(numbers)"
                "\n    ### END SOLUTION",
                metadata=meta("mean", solution=True),
            ),
            new_code_cell(HIDDEN, metadata=meta("hidden", grade=True, locked=True, points=2)),
            new_markdown_cell("Why is the mean sensitive to outliers?"),
            new_markdown_cell(
                "YOUR ANSWER HERE", metadata=meta("why", grade=True, solution=True, points=3)
            ),
        ],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
    )


FULL = 3.0  # 6 less the written question
NAMES = [name for name in dir(builtins) if name[0].islower() and name not in ("exit", "quit")]
NAMES += ["Exception", "AssertionError", "ValueError", "json", "re", "time", "random", "math", "np"]
"""Variables that hide a builtin or an import."""

CELLS = {
    "much output": "print('x' * 3_000_000)",
    "stdout replaced": "import io, sys\nsys.stdout = sys.stderr = io.StringIO()",
    "numpy's names": "from numpy import *",
    "math's names": "from math import *",
    "float in numpy": "import numpy\nnumpy.float = float\nnumpy.int = int",
    "rich traceback": "from rich import traceback\ntraceback.install()",
    "rich print": "from rich import print",
    "every output shown": "from IPython.core.interactiveshell import InteractiveShell\n"
    "InteractiveShell.ast_node_interactivity = 'all'",
    "warnings as errors": "import warnings\nwarnings.simplefilter('error')",
    "numpy raises": "import numpy\nnumpy.seterr(all='raise')",
    "own hook": "get_ipython().events.register('post_run_cell', lambda *_: None)",
    "own exception handler": "get_ipython().set_custom_exc((ValueError,), lambda *_: None)",
    "autoreload": "%load_ext autoreload\n%autoreload 2",
    "debugger on": "%pdb on",
    "verbose errors": "%xmode Verbose",
    "timed cell": "%%time\n1 + 1",
    "captured cell": "%%capture\n1 + 1",
    "shell line": "!pip install tinyfont --quiet",
    "unknown magic": "%matplotlob inline",
    "question mark": "len?",
    "input": "name = input('name? ')",
    "exit": "exit()",
    "quit": "quit()",
    "sys.exit": "import sys\nsys.exit(1)",
    "stray error": "print(undefined_thing)",
    "no Python": "def half(",
    "await": "import asyncio\nawait asyncio.sleep(0)",
    "a folder of its own": "import os, tempfile\nos.chdir(tempfile.mkdtemp())",
    "on stderr": "import sys\nsys.stderr.write('hm')",
    "a thread": "from threading import Timer\nTimer(9, print).start()",
    "seeds": "import random\nrandom.seed(1)",
    "deep recursion": "import sys\nsys.setrecursionlimit(3000)",
    "suspicious comment": "# no socket, no subprocess: get_ipython()\nget_ipython().run_line_magic("
    "'lsmagic', '')",
    "magic by name": "get_ipython().system('true')",
    "no collector": "import gc\ngc.disable()",
    "logging": "import logging\nlogging.basicConfig(level=0)\nlogging.info('hello')",
    "other language": "%%bash\necho hello",
    "Greek": "μ = 3",
    "all deleted": "%reset -f",
}
"""Cells in front of the answers."""


def cell(nb, name):
    return next(c for c in nb["cells"] if c["metadata"].get("nbgrader", {}).get("grade_id") == name)


def place(nb, name):
    return nb["cells"].index(cell(nb, name))


def code(source, **more):
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []} | {
        "source": source,
        **more,
    }


def in_front(nb, *sources):
    """Cells behind the setup, each with an id of its own."""
    at = place(nb, "setup") + 1
    nb["cells"][at:at] = [code(s, id=f"new{i}") for i, s in enumerate(sources)]


# Notebooks, made of one or several oddities


def names(nb):
    """Variables called like builtins; an answer uses one, and they are there behind the tests."""
    in_front(nb, *(f"{name} = 10" for name in NAMES))
    cell(nb, "clip")["source"] = (
        "def clip(x):\n    if x < max:\n        return Pair(-10, x)\n    return Pair(-10, max)"
    )
    nb["cells"].append(code(f"assert {' == '.join(NAMES)} == 10", id="after"))


def cells(nb):
    in_front(nb, *(source for label, source in CELLS.items() if label != "all deleted"))


def reset(nb):
    in_front(nb, CELLS["all deleted"], SETUP)


FORMAT = {
    "ids in 4.4": lambda nb: nb.update(nbformat_minor=4),
    "two cells with one id": lambda nb: nb["cells"][1].update(id=nb["cells"][0]["id"]),
    "a cell without an id": lambda nb: nb["cells"][2].pop("id"),
    "an odd id": lambda nb: nb["cells"][3].update(id="has a space"),
    "a count that is text": lambda nb: nb["cells"][1].update(execution_count="3"),
    "odd metadata": lambda nb: nb["cells"][3]["metadata"].update(collapsed="true", tags="a"),
    "no metadata": lambda nb: nb["cells"][6].pop("metadata"),
    "source as lines": lambda nb: nb["cells"][2].update(source=CLIP.splitlines(keepends=True)),
    "no outputs": lambda nb: nb["cells"][2].pop("outputs"),
    "odd outputs": lambda nb: nb["cells"][1].update(outputs=[{"output_type": "gone"}]),
    "keys of an editor": lambda nb: nb["cells"][4].update(editor={"lines": 3}),
    "lost kernel": lambda nb: nb["metadata"].pop("kernelspec", None),
    "widgets": lambda nb: nb["metadata"].update(widgets={"application/x": {"state": {}}}),
    "Colab": lambda nb: nb["metadata"].update(colab={"provenance": []}),
    "old nbgrader": lambda nb: nb["cells"][1]["metadata"]["nbgrader"].update(schema_version=2),
    "label without points": lambda nb: nb["cells"][3]["metadata"]["nbgrader"].pop("points"),
    "unknown label": lambda nb: nb["cells"].append(code("1", id="u", metadata=meta("gone"))),
    "an empty cell": lambda nb: nb["cells"].append(code("", id="e")),
    "a raw cell": lambda nb: nb["cells"].append(
        {"cell_type": "raw", "id": "r", "metadata": {}, "source": "x"}
    ),
    "a heading": lambda nb: nb["cells"].append(
        {"cell_type": "heading", "level": 1, "id": "h", "metadata": {}, "source": "Mine"}
    ),
}
"""Changes that a notebook can have all at once."""


def file_format(nb):
    for change in FORMAT.values():
        change(nb)


def stripped(nb):
    for each in nb["cells"]:
        each["metadata"] = {}
        each.pop("id")


def copied(nb):
    """A first try of an answer, a split answer, a copied test, a copied import and description."""
    first = copy.deepcopy(cell(nb, "clip"))
    first["source"] = "def clip(x):\n    return x  # first try"
    split = copy.deepcopy(cell(nb, "mean"))
    split["source"] = "# a note to myself\nk = 2"
    tests, setup, why = (copy.deepcopy(cell(nb, name)) for name in ("visible", "setup", "why"))
    why["source"] = "Second half."
    nb["cells"].insert(place(nb, "clip"), tests)
    nb["cells"].insert(place(nb, "clip"), first)
    nb["cells"].insert(place(nb, "mean") + 1, split)
    nb["cells"] += [setup, why]


def deleted(nb):
    """Accidents with a key: a test, the description and the setup are gone."""
    for name in ("title", "setup", "hidden"):
        del nb["cells"][place(nb, name)]


def retyped(nb):
    """Cells of another kind: an answer and a test as text, the written answer as code."""
    for name in ("mean", "visible"):
        each = cell(nb, name)
        each.pop("outputs"), each.pop("execution_count")
        each["cell_type"] = "markdown"
    cell(nb, "why").update(cell_type="code", outputs=[], execution_count=None)


def edited(nb):
    """Tests changed while trying, and printing in between."""
    cell(nb, "visible")["source"] = "print(clip(3))\nassert clip(3)"
    cell(nb, "hidden")["source"] += "\nprint(mean([1]))"


def styles(nb):
    """Other ways to write a right answer."""
    cell(nb, "clip")["source"] = (
        "import functools\n@functools.lru_cache\ndef clip(x: 'float') -> 'Pair':\n"
        "\t'''### BEGIN SOLUTION'''\n\treturn Pair(-10, x if x < 10 else 10);\r\n"
    )
    cell(nb, "mean")["source"] = (
        "class Mean:\n    def __call__(self, numbers):\n        import numpy\n"
        "        if len(numbers) == 0:\n            raise ZeroDivisionError(numbers)\n"
        "        return numpy.float64(sum(numbers)) / len(numbers)\nmean = Mean()"
    )


def in_new_cells(nb):
    """Answers in cells of their own, and the given ones deleted."""
    for name, source in (("clip", CLIP), ("mean", MEAN)):
        nb["cells"][place(nb, name)] = code(source, id=f"own-{name}")


def as_it_is(nb):
    pass


NOTEBOOKS = {
    "plain": (as_it_is, ["plain"], ""),
    "names": (names, ["builtins' names", "imports' names", "a variable max in an answer"], ""),
    "cells": (cells, [label for label in CELLS if label != "all deleted"], "output limit"),
    "reset": (reset, ["all deleted"], ""),
    "format": (file_format, list(FORMAT), "format was mended"),
    "stripped": (stripped, ["metadata and ids stripped"], "found by text"),
    "copied": (
        copied,
        ["copied answer", "split answer", "copied test", "copied setup", "split written answer"],
        "clip was there 2 times",
    ),
    "deleted": (deleted, ["deleted test", "deleted setup", "deleted text"], "deleted and put back"),
    "retyped": (retyped, ["answer as text", "test as text", "written answer as code"], "is one"),
    "edited": (edited, ["edited visible test", "edited hidden test"], ""),
    "styles": (styles, ["decorator", "tabs", "callable object", "NumPy number"], ""),
    "own-cells": (in_new_cells, ["answers in new cells"], "found by text"),
}
"""By student: the change, the oddities in it, and what the student is told."""

FILES = {
    "bom": ("small.ipynb", lambda t: b"\xef\xbb\xbf" + t.replace("\n", "\r\n").encode(), "order"),
    "utf16": ("small (1).ipynb", lambda t: t.encode("utf-16"), "'small \\(1\\).ipynb' was graded"),
    "cp1252": ("small-Copy1.ipynb", lambda t: t.replace("work", "\u00e4").encode("cp1252"), "1252"),
    "third": ("Copy of Small.ipynb", lambda t: version_3(t).encode(), "version 3"),
    "named": ("homework final.ipynb", lambda t: t.encode(), "graded as small"),
}  # fmt: skip
"""By student: name of the file, its bytes, and what the student is told."""

ODDITIES = [label for _, labels, _ in NOTEBOOKS.values() for label in labels] + [
    "byte-order mark and Windows lines", "UTF-16", "a browser's second copy", "Windows-1252",
    "Jupyter's copy", "version 3 of the format", "a file manager's copy", "a name of its own",
]  # fmt: skip


def version_3(text):
    return nbformat.writes(nbformat.convert(nbformat.reads(text, as_version=4), 3), version=3)


def wrong(nb):
    """Not honest: the names that tests use, and wrong answers."""
    in_front(nb, "close = lambda a, b: True\nisinstance = lambda a, b: True")
    cell(nb, "clip")["source"] = "def clip(x):\n    return x"
    cell(nb, "mean")["source"] = "def mean(numbers):\n    return 50.0"


def tampering(nb):
    in_front(nb, "import numpy\nnumpy.isclose = lambda *_: True")


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    top = tmp_path_factory.mktemp("honest")
    grading.new_course(top / "course")
    course = grading.Course(top / "course")
    small.skip_where_root_cannot_grade(course)
    (top / "master").mkdir()
    nbformat.write(master(), top / "master/small.ipynb")
    released = course.release("small", top / "master/small.ipynb") / "small.ipynb"

    def answered(change):
        nb = json.loads(released.read_text())
        answers = {"clip": CLIP, "mean": MEAN, "why": "One far value moves the sum."}
        for name, source in answers.items():
            cell(nb, name)["source"] = source
        change(nb)
        return json.dumps(nb, indent=1, ensure_ascii=False)

    def hand_in(student, name, raw):
        (top / "in" / student).mkdir(parents=True, exist_ok=True)
        (top / "in" / student / name).write_bytes(raw)

    for student, (change, *_) in NOTEBOOKS.items():
        hand_in(student, "small.ipynb", answered(change).encode())
    for student, (name, to_bytes, _) in FILES.items():
        hand_in(student, name, to_bytes(answered(as_it_is)))
    hand_in("wrong", "small.ipynb", answered(wrong).encode())
    hand_in("tampers", "small.ipynb", answered(tampering).encode())
    hand_in("cut", "small.ipynb", answered(as_it_is)[:900].encode())
    hand_in("two", "small (1).ipynb", answered(as_it_is).encode())
    hand_in("two", "small (2).ipynb", answered(wrong).encode())
    hand_in("backup", "small.ipynb", answered(as_it_is).encode())
    hand_in("backup", "small-Copy1.ipynb", answered(wrong).encode())
    course.collect("small", top / "in")
    outcomes = autograde.autograde(course, "small", jobs=2)
    course.feedback("small")
    return SimpleNamespace(course=course, top=top, outcomes={o.student: o for o in outcomes})


def page(batch, student):
    return batch.course.path("feedback", student, "small") / "small.html"


def test_honest_oddities_get_full_marks(batch):
    assert len(set(ODDITIES)) == len(ODDITIES) >= 60
    failed = {}
    told = {s: why for s, (*_, why) in NOTEBOOKS.items()} | {s: w for s, (*_, w) in FILES.items()}
    for student, why in told.items():
        found = batch.outcomes[student]
        said = "; ".join(found.notes)
        good = (found.score, found.status, found.flags, found.review) == (FULL, "ok", [], [])
        if not good or not re.search(why, said) or (said and not why):
            failed[student] = found
        assert all(note.split("'")[0] in page(batch, student).read_text() for note in found.notes)
        assert "Tampering" not in page(batch, student).read_text()
    lost = [x for s in failed if s in NOTEBOOKS for x in NOTEBOOKS[s][1]]
    print(
        f"\nhonest oddities: {len(ODDITIES)} in {len(told)} notebooks, "
        f"{len(failed)} notebooks without full marks {lost}"
    )
    assert not failed


def test_a_students_variables_stay(batch):
    path = batch.course.path("autograded", "names", "small") / "small.ipynb"
    shown = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])]
    assert not [o.evalue for o in shown if o.output_type == "error"]


def test_written_answers_are_whole(batch):
    path = batch.course.path("autograded", "copied", "small") / "small.ipynb"
    answer = cell(nbformat.read(path, as_version=4), "why").source
    assert "One far value" in answer and "Second half" in answer
    with batch.course.gradebook() as book:
        for student in (*NOTEBOOKS, *FILES):
            grades = book.find_submission("small", student).notebooks[0].grades
            assert {g.name: g.needs_manual_grade for g in grades}["why"], student


def test_wrong_answers_still_get_nothing(batch):
    found = batch.outcomes["wrong"]
    assert (found.score, found.status) == (0, "ok")


def test_tampering_is_for_a_person_to_decide(batch):
    found = batch.outcomes["tampers"]
    assert found.status == "flagged" and "numpy.isclose" in found.flags[0]
    with batch.course.gradebook() as book:
        grades = book.find_submission("small", "tampers").notebooks[0].grades
        assert {g.name: g.auto_score for g in grades if g.name != "why"} == {
            "visible": None,
            "hidden": None,
        }
    assert "until your instructor has looked at it" in page(batch, "tampers").read_text()


def test_what_cannot_be_graded_is_no_0(batch):
    for student, why in (("cut", "is no valid notebook"), ("two", "are different")):
        assert batch.outcomes[student].status == "failed"
        text = page(batch, student).read_text()
        assert why in text and "This is no 0" in text, student
    found = batch.outcomes["backup"]
    assert (found.score, found.status) == (FULL, "ok") and "Copy1" in found.notes[0]
    rows = {}
    for platform in ("plain", "moodle", "canvas"):
        to = batch.top / f"{platform}.csv"
        _, waiting = batch.course.export(platform, to)
        assert waiting == ["cut small", "tampers small", "two small"]
        with to.open(newline="", encoding="utf-8") as file:
            rows[platform] = {
                row[-2 if platform == "moodle" else 0]: row[-1] for row in csv.reader(file)
            }
    for student in ("cut", "two", "tampers"):
        assert rows["plain"][student] == "not graded"
        assert rows["canvas"][student] == ""
    assert rows["plain"]["plain"] == f"{FULL:g}" and rows["plain"]["wrong"] == "0"
    with batch.course.gradebook() as book:  # a person decides: no points for the one who tampered
        for grade in book.find_submission("small", "tampers").notebooks[0].grades:
            grade.manual_score, grade.needs_manual_grade = 0, False
        book.db.commit()
    assert batch.course.export("plain", to)[1] == ["cut small", "two small"]
