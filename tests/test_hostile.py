"""Broken and hostile submissions: one batch grades them all, and then each result is checked.

Nothing here can harm the machine even where a protection is missing: what the submissions try to
delete or reach belongs to this test, and those that need a protection are left out without it.
``CPUGRPO_HOSTILE_LEVEL=user`` (or another of ``sandbox.CONTAINED``) tries a weaker containment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import grading_fixtures as small
import nbformat
import psutil
import pytest

pytest.importorskip("nbgrader", reason="grading needs the extra cpugrpo-edu[grading]")

from cpugrpo_edu.course import autograde, sandbox
from cpugrpo_edu.course import course as grading
from cpugrpo_edu.course.sandbox import Sandbox

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Object of type <Submitted"),  # of nbgrader's queries
]

CHECKOUT = sandbox.PACKAGE
WRONG = "def mean(values):\n    return -1.0"
FULL = 5.0  # 6 less the written question
LIMITS = {
    "cell_seconds": 5,
    "seconds": 25,
    "memory_bytes": 1_500_000_000,
    "processes": 40,
    "file_bytes": 5_000_000,
    "disk_bytes": 20_000_000,
    "output_bytes": 100_000,
}
SPACES = ("namespaces+user", "namespaces")
SHUT = (*SPACES, "user")
LIMITED = (*SHUT, "limits")


def answers(course, canary, port):
    """The submissions by name: the levels each needs (None: any) and the answers."""
    mean = "\ndef mean(values):\n    return sum(values) / len(values)\n"
    look = f"""
import os, sqlite3, time
found = []
until = time.monotonic() + 3
for top in ({str(course)!r}, '/proc', '/tmp', '/var/tmp', os.getcwd()):
    for folder, _, files in os.walk(top):
        if time.monotonic() > until:
            break
        for file in files:
            if top == '/proc' and file not in ('environ', 'cmdline', 'maps'):
                continue
            try:
                with open(os.path.join(folder, file), errors='replace') as stream:
                    if 'xylo' + 'phone' in stream.read(10**6):
                        found.append(file)
            except OSError:
                pass
try:
    sqlite3.connect({str(course / "gradebook.db")!r}).execute('select * from grade').fetchall()
    found.append('the gradebook')
except sqlite3.Error:
    pass
print('FOUND', found)
"""
    reach = f"""
import os, socket
print('SEES', [path for path in {[str(CHECKOUT / "notebooks"), str(CHECKOUT / ".git")]!r}
               if os.path.exists(path)])
for address in (('127.0.0.1', {port}), ('192.0.2.1', 80)):
    try:
        socket.create_connection(address, 1).sendall(b'answers please')
        print('REACHED', address)
    except OSError as error:
        print(error)
"""
    delete = f"""
import os, shutil, cpugrpo_edu
for path in ({str(course)!r}, {str(canary)!r}):
    shutil.rmtree(path, ignore_errors=True)
    try:
        with open(os.path.join(path, 'note.txt'), 'w') as file:
            file.write('was here')
    except OSError:
        pass
for path in (os.path.dirname(cpugrpo_edu.__file__), os.sep):
    print('WRITABLE' if os.access(path, os.W_OK) else 'closed', path)
try:
    home = [entry.name for entry in os.scandir({str(Path.home())!r}) if entry.is_file()]
except OSError:
    home = []
print('HOME', home)
"""
    return {
        "honest": (
            None,
            {"mean": "import sys\nprint('hm', file=sys.stderr)" + mean},
        ),
        "second": (None, {"mean": "import warnings\nwarnings.warn('old')" + mean}),
        "stubborn": (
            LIMITED,
            {
                "mean": "while True:\n    try:\n        while True:\n            pass\n"
                "    except BaseException:\n        pass"
            },
        ),
        "loop": (None, {"mean": "def mean(values):\n    while True:\n        pass"}),
        "memory": (
            LIMITED,
            {"mean": "def mean(values):\n    [b'x' * 10**8 for _ in range(100)]\n    return 2.0"},
        ),
        "forks": (
            SHUT,
            {
                "mean": "import os\nwhile True:\n    try:\n        os.fork()\n"
                "    except OSError:\n        pass"
            },
        ),
        "disk": (
            LIMITED,
            {
                "mean": "for i in range(1000):\n    with open(f'{i}.bin', 'wb') as file:\n"
                "        file.write(b'x' * 4_000_000)\n    import time\n    time.sleep(0.05)" + mean
            },
        ),
        "deletes": (SHUT, {"mean": delete + mean}),
        "reads": (SHUT, {"mean": look + mean}),
        "network": (SPACES, {"mean": reach + mean}),
        "tampers": (None, {"mean": WRONG}),  # and its tests are rewritten below
        "cuts": (None, {"mean": WRONG}),  # and its tests are deleted below
        "output": (
            None,
            {"mean": "for _ in range(100):\n    print('x' * 1_000_000)" + mean},
        ),
        "exits": (None, {"mean": "import sys\ndef mean(values):\n    sys.exit(0)"}),
        "dies": (None, {"mean": "import os\ndef mean(values):\n    os._exit(0)"}),
        "marks": (None, {"mean": "import os\nos._exit(0)"}),  # its tests carry our mark, see below
        "retypes": (None, {"mean": WRONG}),  # its tests are text, see below
        "numpy": (None, {"mean": "import numpy\nnumpy.isclose = lambda *a: True\n" + WRONG}),
        "package": (
            None,
            {
                "mean": "import cpugrpo_edu.errors\n"
                "cpugrpo_edu.errors.UserError.__init__ = lambda *a: None\n" + WRONG
            },
        ),
        "hides": (
            None,
            {"mean": "import cpugrpo_edu.errors\ncpugrpo_edu.errors.abs = lambda x: 0\n" + WRONG},
        ),
        "asserts": (
            None,
            {
                "mean": "import ast\nclass Drop(ast.NodeTransformer):\n"
                "    def visit_Assert(self, node):\n        return ast.Pass()\n"
                "get_ipython().ast_transformers.append(Drop())\n" + WRONG
            },
        ),
        "builtins": (
            None,
            {
                "mean": "import builtins\nclass Calm(Exception):\n    pass\n"
                "builtins.AssertionError = Calm\n" + WRONG
            },
        ),
        "shadows": (
            None,
            {"double": "float = lambda x: 2.0\ndef double(x):\n    return 0"},
        ),
        "redefines": (
            None,
            {"double": "def float(x):\n    return 2.0\ndef double(x):\n    return 0"},
        ),
        "frames": (
            None,
            {"mean": "import sys\ndef mean(values):\n    sys._getframe(1)\n    return -1.0"},
        ),
        "large": (None, {"double": "def double(x):\n    return x + x\n#" + "x" * 21_000_000}),
        "not-json": (None, "{ this is no notebook"),
        "no-cells": (None, json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}})),
    }


def digests(*folders):
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """One grading run of all submissions that this machine can contain."""
    top = tmp_path_factory.mktemp("hostile")
    root = top / "course"
    grading.new_course(root)
    course = grading.Course(root)
    small.skip_where_root_cannot_grade(course)
    notebook = nbformat.read(
        course.release("small", small.write_master(top / "master")) / "small.ipynb", as_version=4
    )
    (root / "limits.json").write_text(json.dumps(LIMITS))
    canary = top / "canary"
    canary.mkdir()
    canary.chmod(0o777)
    (canary / "file.txt").write_text("still here")
    (canary / "file.txt").chmod(0o666)
    box = sandbox.strongest(Sandbox("none", 60001, root, course.limits()))
    level = os.environ.get("CPUGRPO_HOSTILE_LEVEL") or box.level
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.01)
        chosen = {
            name: given
            for name, (needs, given) in answers(root, canary, listener.getsockname()[1]).items()
            if needs is None or level in needs
        }
        small.write_submissions(top / "in", notebook, chosen)
        cut = top / "in/cuts/small.ipynb"
        left = nbformat.read(cut, as_version=4)
        left.cells = [
            cell
            for cell in left.cells
            if cell.metadata.get("nbgrader", {}).get("grade_id") not in ("test-mean", "imports")
        ]
        nbformat.write(left, cut)
        for name, change in (
            ("marks", lambda cell: cell.metadata.update(cg_done=True, tags=["skip-execution"])),
            ("retypes", lambda cell: cell.update(cell_type="markdown", attachments={})),
            ("tampers", lambda cell: cell.update(source="assert True")),
        ):
            path = top / "in" / name / "small.ipynb"
            submitted = nbformat.read(path, as_version=4)
            for cell in submitted.cells:
                if cell.metadata.get("nbgrader", {}).get("grade"):
                    change(cell)
                    if cell.cell_type == "markdown":
                        cell.pop("outputs", None), cell.pop("execution_count", None)
            nbformat.write(submitted, path)
        course.collect("small", top / "in")
        package = Path(grading.__file__).parents[1]
        watched = (canary, package, root / "source", root / "release", root / "submitted")
        watched += (root / "exchange",)
        before = digests(*watched)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sandbox, "strongest", lambda box: replace(box, level=level))
            outcomes = autograde.autograde(course, "small", jobs=2)
        try:
            listener.accept()
            reached = True
        except TimeoutError:
            reached = False
    print(table(outcomes, level, [name for name in answers(root, canary, 0) if name not in chosen]))
    for _ in range(50):  # the last ones may still be ending
        left_over = [p.pid for p in psutil.process_iter(["uids"]) if owned(p)]
        if not left_over:
            break
        time.sleep(0.1)
    return SimpleNamespace(
        course=course,
        level=level,
        names=set(chosen),
        outcomes={each.student: each for each in outcomes},
        before=before,
        after=digests(*watched),
        reached=reached,
        left_over=left_over,
    )


def table(outcomes, level, left_out):
    """The result of each submission, which ``pytest -s`` shows."""
    lines = [
        f"hostile set, contained by: {level}",
        f"{'submission':12}{'points':>8}  status, reasons",
    ]
    for each in outcomes:
        why = "; ".join([*each.flags, *each.review, *each.notes])
        lines.append(
            f"{each.student:12}{each.score:>6g}/{FULL:g}  {each.status}  {why:.90}".rstrip()
        )
    lines += [f"{name:12}{'':>8}  left out: it needs more protection" for name in left_out]
    return "\n" + "\n".join(lines)


def owned(process):
    try:
        mine = process.info["uids"].real in autograde.USERS
        return mine and process.status() != psutil.STATUS_ZOMBIE
    except (AttributeError, psutil.Error):
        return False


def seen(batch, name):
    """Outcome, points by cell, and what the graded notebook shows."""
    if name not in batch.names:
        pytest.skip(f"this machine contains a submission by '{batch.level}' only")
    path = batch.course.path("autograded", name, "small") / "small.ipynb"
    outcome = batch.outcomes[name]
    return SimpleNamespace(
        status=outcome.status,
        score=outcome.score,
        why="; ".join([*outcome.flags, *outcome.review, *outcome.notes]),
        points=small.scores_of(batch.course, "small", name),
        text=path.read_text() if path.exists() else "",
    )


def test_the_batch_goes_on(batch):
    assert set(batch.outcomes) == batch.names
    for name in ("honest", "second"):
        found = seen(batch, name)
        assert (found.score, found.status, found.why) == (FULL, "ok", "")


def test_nothing_outside_changed(batch):
    assert batch.after == batch.before
    assert not batch.left_over


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("stubborn", "took longer|time limit"),
        ("loop", "a test took longer than 5 s"),
        ("forks", "took longer|(time|memory) limit|kernel ended|did not answer"),
        ("disk", "disk limit"),
        ("tampers", ""),
        ("cuts", "deleted and put back: imports; deleted and put back: test-mean"),
        ("exits", ""),
        ("dies", "the kernel ended early"),
        ("marks", "the kernel ended early"),
        ("retypes", "deleted and put back: test-mean"),
        ("memory", ""),
        ("numpy", "numpy.isclose"),
        ("package", "cpugrpo_edu.errors.UserError"),
        ("hides", "cpugrpo_edu.errors.abs"),
        ("asserts", "ast_transformers"),
        ("builtins", "builtins.AssertionError"),
        ("frames", "_getframe"),
        ("large", "bytes; allowed are"),
        ("not-json", "is no valid notebook"),
        ("no-cells", "is no notebook"),
    ],
)
def test_no_points_for(batch, name, why):
    found = seen(batch, name)
    assert found.points["test-mean"] == 0, found
    assert re.search(why, found.why), found
    if name in ("cuts", "retypes"):  # as happens by accident: mended, said, and no reason to accuse
        assert found.status == "ok"
    elif why:
        assert found.status in ("flagged", "failed")


@pytest.mark.parametrize("name", ["exits", "loop", "memory", "tampers", "cuts", "retypes"])
def test_the_rest_of_a_notebook_still_counts(batch, name):
    assert seen(batch, name).points["test-double"] == 2


@pytest.mark.parametrize("name", ["shadows", "redefines"])
def test_shadowed_names_do_not_reach_a_test(batch, name):
    assert seen(batch, name).points["test-double"] == 0


def test_hidden_tests_and_gradebook_are_out_of_reach(batch):
    found = seen(batch, "reads")
    assert "FOUND []" in found.text, found.text
    assert found.status == "flagged" and "gradebook" in found.why


def test_no_network(batch):
    found = seen(batch, "network")
    assert "REACHED" not in found.text.replace("print('REACHED'", "") and not batch.reached
    assert found.status == "flagged" and "socket" in found.why


def test_a_checkout_with_its_masters_is_out_of_sight(batch):
    assert "SEES []" in seen(batch, "network").text


def test_deletion_is_flagged_and_only_its_own_folder_is_writable(batch):
    found = seen(batch, "deletes")
    assert "rmtree" in found.why
    cells = nbformat.reads(found.text, as_version=4).cells
    printed = "".join(o.get("text", "") for cell in cells for o in cell.get("outputs", []))
    assert "closed" in printed and "WRITABLE" not in printed, printed
    assert "HOME []" in printed, printed


def test_output_is_cut(batch):
    found = seen(batch, "output")
    assert "output limit" in found.why and len(found.text) < 2_000_000
    assert found.score == FULL, "the code itself is right"


def test_feedback_of_the_batch_gives_nothing_away(batch):
    pages = batch.course.feedback("small")
    for page in pages:
        assert "hidden word" not in page.read_text(), page
