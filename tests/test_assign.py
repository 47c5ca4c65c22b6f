"""``cpugrpo assign``: the course folder, each step of the instructor, and refused mistakes."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import grading_fixtures as small
import nbformat
import pytest
from nbformat.v4 import new_code_cell
from typer.testing import CliRunner

pytest.importorskip("nbgrader", reason="grading needs the extra cpugrpo-edu[grading]")

from cpugrpo_edu.cli import assign
from cpugrpo_edu.course import autograde, checks, downloads, guard, student_seeds
from cpugrpo_edu.course import course as grading
from cpugrpo_edu.course.course import Course
from cpugrpo_edu.errors import UserError

ROSTER = [
    ("alice", "Alice", "Ångström", "alice@example.org", "901"),
    ("bob", "Bob", "=cmd()", "bob@example.org", "902"),
    ("carol", "Carol", "Jones", "carol@example.org", "903"),
]
ANSWERS = {
    "alice": {},
    "bob": {"mean": "def mean(values):\n    return float('xylophone')"},
    "carol": {"double": "import numpy as np\ndef double(x):\n    return np.float64(abs(2 * x))"},
}


def invoke(*arguments):
    """Result as JSON of a command that succeeds."""
    done = CliRunner().invoke(assign.app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout.splitlines()[-1])


def refused(*arguments):
    """The sentence of a command that must fail."""
    done = CliRunner().invoke(assign.app, [*map(str, arguments)])
    assert isinstance(done.exception, UserError), (done.output, done.exception)
    return str(done.exception)


def write_roster(root):
    with (root / "roster.csv").open("w", newline="") as file:
        csv.writer(file).writerows([grading.ROSTER, *ROSTER])


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A course with a released assignment and no submission: course folder, student notebook."""
    top = tmp_path_factory.mktemp("assign")
    root = top / "course"
    made = invoke("new-course", root)["made"]
    assert {"nbgrader_config.py", "roster.csv", "gradebook.db", "limits.json"} <= set(made)
    write_roster(root)
    master = small.write_master(top / "master")
    done = invoke("release", "small", "--master", master, "--course", root)
    return root, nbformat.read(f"{done['released']}/small.ipynb", as_version=4)


@pytest.fixture(scope="module")
def graded(released, tmp_path_factory):
    """The course after a first grading: its folder and the outcomes by student."""
    before, notebook = released
    top = tmp_path_factory.mktemp("graded")
    root = shutil.copytree(before, top / "course")
    small.skip_where_root_cannot_grade(Course(root))
    small.write_submissions(top / "in", notebook, ANSWERS)
    invoke("collect", "small", "--from", top / "in", "--course", root)
    done = invoke("autograde", "small", "--course", root, "--jobs", 2, "--quiet")
    return root, {each["student"]: each for each in done}


def test_new_course_keeps_what_is_there(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "is not empty" in refused("new-course", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_new_course_keeps_its_secrets(released):
    root, _ = released
    assert (root / "course_secret").stat().st_mode & 0o077 == 0
    assert (root / "gradebook.db").stat().st_mode & 0o077 == 0
    assert (root / "roster.csv").stat().st_mode & 0o077 == 0
    assert "course_secret" in (root / ".gitignore").read_text()


def test_student_version_has_no_answers(released):
    root, notebook = released
    text = nbformat.writes(notebook)
    for hidden in (small.HIDDEN, small.SCHEME, "np.sum(values)", "BEGIN"):
        assert hidden not in text
    assert "your code here" in text and "the mean of 1, 2, 3 is 2" in text
    [exchanged] = (root / "exchange").glob("*/outbound/small/small.ipynb")
    assert nbformat.read(exchanged, as_version=4) == notebook


def test_collect_from_a_folder_and_a_zip(released, tmp_path):
    before, notebook = released
    root = shutil.copytree(before, tmp_path / "course")
    small.write_submissions(tmp_path / "moodle", notebook, {"Carol Jones_77_assignsubmission": {}})
    assert invoke("collect", "small", "--from", tmp_path / "moodle", "--course", root) == {
        "submissions": ["carol"],
        "held_back": [],
    }
    packed = tmp_path / "canvas.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("angstromalice_901_55_small-1.ipynb", nbformat.writes(notebook))
        archive.writestr("bob_LATE_small.ipynb", nbformat.writes(notebook))
        archive.writestr("../../outside_small.ipynb", nbformat.writes(notebook))
    found = invoke("collect", "small", "--from", packed, "--course", root)
    assert found == {"submissions": ["alice", "bob", "carol", "outside"], "held_back": []}
    assert not list(tmp_path.parent.glob("outside*")), "a zip wrote outside its folder"
    assert (root / "submitted/alice/small/timestamp.txt").read_text().endswith("UTC\n")


def packed_notebook(text, *more):
    """A zip of the folder `small`, as a student packs it."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, content in [("small.ipynb", text), *more]:
            member = zipfile.ZipInfo(f"small/{name}", date_time=(2027, 3, 4, 5, 6, 8))
            archive.writestr(member, content)
    return memory.getvalue()


def test_collect_folders_that_students_zipped(released, tmp_path):
    before, notebook = released
    root = shutil.copytree(before, tmp_path / "course")
    packed, text = tmp_path / "moodle.zip", nbformat.writes(notebook)
    with zipfile.ZipFile(packed, "w") as archive:
        inner = packed_notebook(text, ("claim.md", "mine"), (".secret", "x"))
        archive.writestr("Carol Jones_77_assignsubmission_file/small.zip", inner)
        archive.writestr("jones/angstromalice_901_55_small.zip", packed_notebook(text))
    collect = ("collect", "small", "--from", packed, "--course", root)
    assert invoke(*collect) == {"submissions": ["alice", "carol"], "held_back": []}
    carol = root / "submitted/carol/small"
    assert sorted(path.name for path in carol.iterdir()) == [
        "claim.md",
        "small.ipynb",
        "timestamp.txt",
    ]
    # the time it was packed, which stays when the same download is collected again
    handed_in = datetime(2027, 3, 4, 5, 6, 8).astimezone(UTC)
    assert (carol / "timestamp.txt").read_text().startswith(f"{handed_in:%Y-%m-%d %H:%M:%S}")


def test_collect_takes_no_links_and_no_other_names(released, tmp_path, monkeypatch):
    before, notebook = released
    root = shutil.copytree(before, tmp_path / "course")
    [inbound] = (root / "exchange").glob("*/inbound")
    folder = inbound / "alice+small+2027-03-04 05:06:08.000000 UTC+random"
    folder.mkdir()
    (folder / "timestamp.txt").write_text("2027-03-04 05:06:08.000000 UTC\n")
    (folder / "small.ipynb").symlink_to(root / "source/small/small.ipynb")
    honest = inbound / "bob+small+2027-03-04 05:06:09.000000 UTC+random"
    shutil.copytree(folder, honest, symlinks=True)
    (honest / "small.ipynb").unlink()
    nbformat.write(notebook, honest / "small.ipynb")
    collect = ("collect", "small", "--course", root)
    found = invoke(*collect)
    assert found["submissions"] == ["bob"], "one student's link must not stop the others"
    assert len(found["held_back"]) == 1 and "holds a link" in found["held_back"][0]
    (folder / "small.ipynb").unlink()
    nbformat.write(notebook, folder / "small.ipynb")
    with monkeypatch.context() as other:
        other.setattr(grading.os, "getuid", lambda: -1)  # a hub with users of their own
        assert "another student's name" in invoke(*collect)["held_back"][0]
    assert invoke(*collect) == {"submissions": ["alice", "bob"], "held_back": []}


def test_collect_loses_nobody(released, tmp_path):
    before, notebook = released
    root = shutil.copytree(before, tmp_path / "course")
    given = {"alice_1/x": {}, "alice_1/y": {"mean": "pass"}, "carol_2": {}}
    small.write_submissions(tmp_path / "in", notebook, given)
    collect = ("collect", "small", "--from", tmp_path / "in", "--course", root)
    found = invoke(*collect)
    assert found["submissions"] == ["carol"]
    assert "would both be of alice" in found["held_back"][0]
    shutil.rmtree(tmp_path / "in/carol_2")
    assert "would both be of alice" in refused(*collect)


def test_collect_takes_notebooks_of_other_names(released, tmp_path):
    before, notebook = released
    root = shutil.copytree(before, tmp_path / "course")
    text = nbformat.writes(notebook)
    for name in ("alice/small (1).ipynb", "bob/homework.ipynb", "jonescarol_903_4_small-2.ipynb",
                 "mystery.ipynb", "small.ipynb"):  # fmt: skip
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    collect = ("collect", "small", "--from", tmp_path / "in", "--course", root)
    found = invoke(*collect)
    assert found["submissions"] == ["alice", "bob", "carol"]
    assert [each.split(":")[0] for each in found["held_back"]] == ["mystery.ipynb", "small.ipynb"]

    def names():
        return sorted(str(p.relative_to(root)) for p in root.glob("submitted/*/small/*.ipynb"))

    assert names() == [
        "submitted/alice/small/small (1).ipynb",
        "submitted/bob/small/homework.ipynb",
        "submitted/carol/small/small.ipynb",
    ]
    (tmp_path / "in/alice/small (1).ipynb").rename(tmp_path / "in/alice/small.ipynb")
    invoke(*collect)  # a later download replaces the earlier one, whatever its name was
    assert names()[0] == "submitted/alice/small/small.ipynb" and len(names()) == 3


@pytest.mark.parametrize(
    ("label", "student"),
    [
        ("alice_1_2_small", "alice"),
        ("jonescarol_903_4_small", "carol"),
        ("jonescarol_LATE_1_2_small", "carol"),
        ("Carol Jones_77_assignsubmission_file", "carol"),
        ("dan_1_2_small", "dan"),
    ],
)
def test_whose_a_download_is(label, student):
    roster = {row[0]: dict(zip(grading.ROSTER, row, strict=True)) for row in ROSTER}
    assert downloads.student_of(label, roster) == student


@pytest.mark.slow
def test_scores(graded):
    root, outcomes = graded
    assert {s: o["score"] for s, o in outcomes.items()} == {"alice": 5, "bob": 2, "carol": 4}
    assert {o["status"] for o in outcomes.values()} == {"ok"}
    # a NumPy number counts as partial credit, which nbgrader alone would turn into full marks
    assert small.scores_of(Course(root), "small", "carol")["test-double"] == 1


@pytest.mark.slow
def test_autograde_goes_on_where_it_was(graded, monkeypatch, tmp_path):
    root = shutil.copytree(graded[0], tmp_path / "course")
    course = Course(root)
    done = []
    outcomes = {student: course.outcome("small", student) for student in ANSWERS}
    monkeypatch.setattr(
        autograde, "grade", lambda *given: done.append(given[2]) or outcomes[given[2]]
    )
    assert autograde.autograde(course, "small") == []
    (root / "outcomes/small/bob.json").unlink()  # as if it had been interrupted before bob
    autograde.autograde(course, "small")
    assert done == ["bob"]
    path = root / "submitted/carol/small/small.ipynb"
    path.write_text(path.read_text() + "\n")
    assert course.status()[0]["changed"] == 1
    done.clear()
    autograde.autograde(course, "small", only=["alice"], force=True)
    assert done == ["alice"]
    done.clear()
    autograde.autograde(course, "small", force=True)
    assert sorted(done) == ["alice", "bob", "carol"]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_night_goes_on(graded, tmp_path, ending):
    """Stopped in the middle of a submission; all get their points, and none is graded twice."""
    root = shutil.copytree(graded[0], tmp_path / "course")
    shutil.rmtree(root / "outcomes/small"), shutil.rmtree(root / "autograded")
    for student in ("bob", "carol"):  # long enough to be stopped in the middle
        path = root / "submitted" / student / "small/small.ipynb"
        notebook = nbformat.read(path, as_version=4)
        notebook.cells.insert(0, new_code_cell("import time\ntime.sleep(4)"))
        nbformat.write(notebook, path)
    start = [sys.executable, "-m", "cpugrpo_edu.cli", "assign", "autograde", "small", "--quiet"]
    job = subprocess.Popen(start, cwd=root, start_new_session=True, stderr=subprocess.DEVNULL)
    done = root / "outcomes/small/alice.json"
    try:
        for _ in range(1200):
            if done.exists() or job.poll() is not None:
                break
            time.sleep(0.05)
        time.sleep(1)  # in bob's kernel
    finally:
        # Ctrl-C reaches the grading process as well; a kill only the command
        os.killpg(job.pid, ending) if ending == signal.SIGINT else job.kill()
        assert job.wait(60) != 0
    assert sorted(path.name for path in done.parent.glob("*.json")) == ["alice.json"]
    again = invoke("autograde", "small", "--course", root, "--quiet")
    assert [each["student"] for each in again] == ["bob", "carol"]
    for each in again:
        assert (each["score"], each["status"]) == (graded[1][each["student"]]["score"], "ok")
    assert invoke("status", "--course", root)[0]["graded"] == 3
    assert invoke("autograde", "small", "--course", root, "--quiet") == []


@pytest.mark.slow
def test_regrading_gives_the_same(graded, tmp_path):
    root = shutil.copytree(graded[0], tmp_path / "course")
    [again] = invoke(
        "autograde", "small", "--force", "--student", "carol", "--course", root, "--quiet"
    )
    assert again["score"] == graded[1]["carol"]["score"]


@pytest.mark.slow
def test_status(graded):
    [row] = invoke("status", "--course", graded[0])
    assert (row["submitted"], row["graded"], row["changed"]) == (3, 3, 0)
    assert row["flagged"] == row["failed"] == []
    done = CliRunner().invoke(assign.app, ["status", "--course", str(graded[0])])
    assert "small" in done.stdout


@pytest.mark.slow
def test_feedback_gives_nothing_away(graded, tmp_path):
    root = shutil.copytree(graded[0], tmp_path / "course")
    pages = invoke("feedback", "small", "--course", root)["pages"]
    assert len(pages) == 3
    for page in pages:
        text = Path(page).read_text(encoding="utf-8")
        plain = re.sub(r"<[^>]+>", "", text)  # as read: highlighting splits the code
        for hidden in ("hidden word", "9.75", "4.25", small.SCHEME, "HIDDEN TESTS", "MARK SCHEME"):
            assert hidden not in plain, hidden
        assert "the mean of 1, 2, 3 is 2" in plain or "bob" in page
        assert not re.search(r"<(script|link)[^>]*(src|href)=[\"']?(https?:)?//", text)


def test_a_hub_has_one_exchange(tmp_path):
    hub, root = tmp_path / "exchange", tmp_path / "course"
    nowhere = refused("new-course", root, "--exchange", hub)
    assert "no folder that you may write to" in nowhere
    hub.mkdir()
    hub.chmod(0o1777)
    assert "exchange" not in invoke("new-course", root, "--exchange", hub)["made"]
    invoke("release", "small", "--master", small.write_master(tmp_path / "m"), "--course", root)
    assert (hub / "course/outbound/small/small.ipynb").is_file()
    assert hub.stat().st_mode & 0o7777 == 0o1777, "others could remove the course's folder"


@pytest.mark.slow
def test_feedback_goes_to_those_who_handed_in_through_the_exchange(graded, tmp_path):
    root = shutil.copytree(graded[0], tmp_path / "course")
    release = ("feedback", "small", "--release", "--course", root)
    assert "came through the exchange" in refused(*release)
    (root / "autograded/alice/small/submission_secret.txt").write_text("alice's own")
    assert len(invoke(*release)["pages"]) == 3
    [page] = (root / "exchange").glob("*/feedback/*.html")
    assert page.read_bytes() == (root / "feedback/alice/small/small.html").read_bytes()


def test_peers_get_a_folder_without_names(released, tmp_path):
    before, notebook = released
    root = shutil.copytree(before, tmp_path / "course")
    at = ("--course", root)
    small.write_submissions(tmp_path / "in", notebook, {s: {} for s in ("alice", "bob", "carol")})
    invoke("collect", "small", "--from", tmp_path / "in", *at)
    (root / "submitted/alice/small/peer_1a2b.md").write_text("my review")
    (root / "submitted/bob/small/link").symlink_to(root / "course_secret")
    assert invoke("peers", "small", *at) == {"folder": "peers/small", "reviews": 3}
    with (root / "peers/small/pairs.csv").open(newline="") as file:
        pairs = list(csv.DictReader(file))
    assert {p["reviewer"] for p in pairs} == {p["author"] for p in pairs} == {*ANSWERS}
    for pair in pairs:
        assert pair["reviewer"] != pair["author"]
        [given] = (root / "peers/small" / pair["reviewer"]).iterdir()
        assert given.name == pair["code"]
        assert [path.name for path in given.iterdir()] == ["small.ipynb"]
    shutil.copytree(root / "submitted/alice", root / "submitted/dan")
    assert "--force" in refused("peers", "small", *at)
    assert invoke("peers", "small", "--force", *at)["reviews"] == 4
    shutil.rmtree(root / "submitted/dan"), shutil.rmtree(root / "submitted/carol")
    assert "at least 3" in refused("peers", "small", "--force", *at)


@pytest.mark.slow
def test_export_for_canvas_and_moodle(graded, tmp_path):
    rows = {}
    for kind in ("canvas", "moodle", "plain"):
        to = tmp_path / f"{kind}.csv"
        assert invoke("export", to, "--for", kind, "--course", graded[0])["rows"] == 3
        with to.open(newline="", encoding="utf-8") as file:
            rows[kind] = list(csv.DictReader(file))
    top, alice, bob, carol = rows["canvas"]
    assert (top["Student"], top["small"]) == ("Points Possible", "6")
    assert (alice["ID"], alice["SIS User ID"], alice["small"]) == ("901", "alice", "5")
    assert bob["Student"].startswith("'="), "a spreadsheet would run this name"
    assert rows["moodle"][2] == {
        "ID number": "carol",
        "Email address": "carol@example.org",
        "small": carol["small"],
    }
    assert [row["small"] for row in rows["plain"]] == ["5", "2", "4"]


def test_export_subtracts_a_late_penalty(graded, tmp_path):
    root = shutil.copytree(graded[0], tmp_path / "course")
    with Course(root).gradebook() as book:
        for notebook in book.find_submission("small", "alice").notebooks:
            notebook.late_submission_penalty = 2
        book.db.commit()
    invoke("export", tmp_path / "late.csv", "--for", "plain", "--course", root)
    assert (tmp_path / "late.csv").read_text().splitlines()[1] == "alice,3"


def test_mistakes_get_one_sentence(released, tmp_path):
    before, _ = released
    root = shutil.copytree(before, tmp_path / "course")
    at = ("--course", root)
    assert "is no course folder" in refused("status", "--course", tmp_path)
    assert "released are: small" in refused("autograde", "ps9", *at)
    assert "there is no submission of small" in refused("autograde", "small", *at)
    assert "no graded submission" in refused("feedback", "small", *at)
    assert "does not exist" in refused("collect", "small", "--from", tmp_path / "no", *at)
    assert "is no notebook" in refused("release", "x", "--master", tmp_path, *at)
    assert "has no notebook" in refused("release", "x", *at)
    assert "canvas, moodle and plain" in refused("export", tmp_path / "g", "--for", "x", *at)
    assert "at least 1" in refused("autograde", "small", "--jobs", 0, *at)
    (tmp_path / "bad.zip").write_text("no zip")
    assert "cannot be read as a zip file" in refused(
        "collect", "small", "--from", tmp_path / "bad.zip", *at
    )
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "essay.ipynb").write_text("{}")
    assert "essay.ipynb" in refused("collect", "small", "--from", tmp_path / "odd", *at)
    (root / "submitted/dan/small").mkdir(parents=True)
    assert "there are: dan" in refused("autograde", "small", "--student", "eve", *at)
    (root / "limits.json").write_text('{"seconds": "long"}')
    assert "whole numbers for cell_seconds" in refused("autograde", "small", *at)
    (root / "course_secret").unlink()
    assert "course_secret" in refused("autograde", "small", *at)
    (root / "roster.csv").write_text("name\nAnn\n")
    assert "no column 'id'" in refused("release", "small", *at)


def test_a_course_around_its_python_is_refused(released, tmp_path, monkeypatch):
    root = shutil.copytree(released[0], tmp_path / "course")
    (root / "submitted/dan/small").mkdir(parents=True)
    monkeypatch.setattr(sys, "prefix", str(root / ".venv"))
    assert "lies in the course folder" in refused("autograde", "small", "--course", root)


def test_students_keys_differ_and_stay():
    keys = {student_seeds.student_key("secret", s) for s in ("alice", "bob")}
    assert len(keys) == 2 and student_seeds.student_key("secret", "alice") in keys
    assert student_seeds.student_key("other", "alice") not in keys


@pytest.mark.parametrize(
    ("source", "result"),
    [
        ("assert True", "None"),
        ("1.5", "1.5"),
        ("x = 2\nx / 4", "0.5"),
        ("import numpy\nnumpy.float64(0.5)", "0.5"),
        ("True", "None"),
        ("assert sum([1, 2]) == 3 and math.sqrt(4) == 2", "None"),
        ("sum = 5\nassert sum == 5", "None"),
        ("assert taken == 7, list", "None"),
        ("assert False, 'no'", "AssertionError: no, line 1"),
        ("x = 1\nraise SystemExit", "SystemExit: , line 2"),
        ("missing", "NameError: name 'missing' is not defined, line 1"),
        ("double", "2.0"),
    ],
)
def test_only_a_test_that_reaches_its_end_passes(source, result, monkeypatch):
    """In a namespace where the student took names of builtins and imports for variables."""
    names = {"sum": 6, "list": [1], "float": 1.0, "math": 0, "taken": 7, "double": 2}
    shell = SimpleNamespace(user_ns=dict(names))
    monkeypatch.setattr(guard, "get_ipython", lambda: shell)
    guard.give_names(["import math"])
    own = checks.BUILTINS | {"math"}
    happened = guard.run_test(
        checks.compiled(ast.parse("def helper(): pass"), own, "<helpers>"),
        checks.compiled_test(source, own),
    )
    if happened["passed"]:
        assert str(happened["value"]) == result
    else:
        assert f"{happened['name']}: {happened['text']}, line {happened['line']}" == result
    kept = {name: shell.user_ns[name] for name in names if name != "sum" or "sum =" not in source}
    assert kept == {name: names[name] for name in kept}, "a test must leave them as they are"
