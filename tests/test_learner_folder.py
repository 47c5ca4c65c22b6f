"""`cpugrpo lab`: what learners get, what of theirs stays, and that the wheel carries it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import invoke

from cpugrpo_edu.course import learner_folder as module
from cpugrpo_edu.course.learner_files import learner_files

ROOT = Path(__file__).resolve().parent.parent
CHAPTER, RECORD = "notebooks/01_policy.ipynb", "records/run.json"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one chapter and one record, as this version of the package brings it."""
    folder = tmp_path / "project"
    release(folder, "one")
    secret = folder / "notebooks" / "psets" / "ps1"
    secret.mkdir(parents=True)
    (secret / "ps1.ipynb").write_text("the solution")
    monkeypatch.setattr(module, "project_files", lambda: folder)
    return folder


def release(folder, text):
    for name in (CHAPTER, RECORD):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}: {text}")


def filled(folder, ask=None):
    done = module.fill(folder, ask)
    return done.written, done.kept, done.waiting


def refuse(name):
    raise AssertionError(f"asks about {name}")


def test_everything_but_solutions_is_copied_once(project, tmp_path):
    mine = tmp_path / "deep" / "mine"
    assert filled(mine) == ([CHAPTER, RECORD], [], [])
    assert (mine / CHAPTER).read_text() == f"{CHAPTER}: one"
    assert not (mine / "notebooks" / "psets").exists()
    assert filled(mine, refuse) == ([], [], [])


def test_a_new_version_replaces_what_the_learner_left_alone(project, tmp_path):
    mine = tmp_path / "mine"
    filled(mine)
    release(project, "two")
    assert filled(mine, refuse) == ([CHAPTER, RECORD], [], [])
    assert (mine / CHAPTER).read_text() == f"{CHAPTER}: two"


def test_a_changed_file_stays_without_a_question_while_there_is_nothing_new(project, tmp_path):
    mine = tmp_path / "mine"
    filled(mine)
    (mine / CHAPTER).write_text("my work")
    assert filled(mine, refuse) == ([], [CHAPTER], [])
    (mine / CHAPTER).unlink()
    assert filled(mine, refuse) == ([CHAPTER], [], [])


@pytest.mark.parametrize("yes", [True, False])
def test_a_new_version_of_a_changed_file_is_asked_about_once(project, tmp_path, yes):
    mine, asked = tmp_path / "mine", []
    filled(mine)
    (mine / CHAPTER).write_text("my work")
    release(project, "two")
    done = filled(mine, lambda name: asked.append(name) or yes)
    assert asked == [CHAPTER]
    assert done == (([CHAPTER, RECORD], [], []) if yes else ([RECORD], [CHAPTER], []))
    assert (mine / CHAPTER).read_text() == (f"{CHAPTER}: two" if yes else "my work")
    assert filled(mine, refuse) == ([], [] if yes else [CHAPTER], [])


def test_a_file_that_was_not_copied_by_us_is_asked_about(project, tmp_path):
    mine = tmp_path / "mine"
    (mine / "notebooks").mkdir(parents=True)
    (mine / CHAPTER).write_text("from elsewhere")
    assert filled(mine, lambda name: False) == ([RECORD], [CHAPTER], [])


def test_without_a_terminal_the_learners_file_stays_and_the_next_terminal_asks(project, tmp_path):
    mine = tmp_path / "mine"
    assert invoke("lab", mine, "--no-start")[0] == 0  # no terminal under pytest
    (mine / CHAPTER).write_text("my work")
    release(project, "two")
    for _ in range(2):
        code, out, _ = invoke("lab", mine, "--no-start")
        assert code == 0 and "in a terminal to be asked" in out and CHAPTER in out
        assert (mine / CHAPTER).read_text() == "my work"
    assert filled(mine, lambda name: True) == ([CHAPTER], [], [])


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("typed", "code", "text"),
    [("y\n", 0, f"{CHAPTER}: two"), ("\n", 0, "my work"), ("", 130, "my work")],
)
def test_a_terminal_is_asked_and_enter_keeps_the_learners_file(
    project, tmp_path, monkeypatch, typed, code, text
):
    mine = tmp_path / "mine"
    filled(mine)
    (mine / CHAPTER).write_text("my work")
    release(project, "two")
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    assert invoke("lab", mine, "--no-start")[0] == code
    assert (mine / CHAPTER).read_text() == text


def test_an_unreadable_note_of_what_was_copied_asks_more_not_less(project, tmp_path):
    mine = tmp_path / "mine"
    filled(mine)
    (mine / module.COPIED).write_text("[")
    (mine / CHAPTER).write_text("my work")
    assert filled(mine) == ([], [], [CHAPTER])


def test_jupyterlab_starts_in_the_folder_and_its_exit_code_is_ours(project, tmp_path, monkeypatch):
    starter = tmp_path / "starter.py"
    starter.write_text(
        "import json, os, sys\n"
        "json.dump([os.getcwd(), sys.argv[1:]], open('started.json', 'w'))\n"
        "sys.exit(7)\n"
    )
    monkeypatch.setattr(module, "JUPYTERLAB", [sys.executable, str(starter)])
    monkeypatch.setattr(module, "check_jupyterlab", lambda: None)
    mine = tmp_path / "mine"
    code, out, _ = invoke("lab", mine, "--no-browser", "--", "--port", "9000")
    assert code == 7 and f"Copied 2 files to {mine}" in out
    where, options = json.loads((mine / "started.json").read_text())
    assert Path(where) == mine
    assert options[1:] == ["--no-browser", "--port", "9000"]
    assert options[0].endswith(f"preferred_dir={mine / 'notebooks'}")


def test_without_jupyterlab_nothing_is_copied_and_the_way_out_is_said(
    project, tmp_path, monkeypatch
):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    code, _, err = invoke("lab", tmp_path / "mine")
    assert code == 2 and "cpugrpo-edu[notebooks]" in err and not (tmp_path / "mine").exists()
    assert invoke("lab", tmp_path / "mine", "--no-start")[0] == 0


@pytest.mark.parametrize("name", ["mine", f"mine/{CHAPTER}", "--port"])
def test_a_folder_that_cannot_be_one_is_said_in_one_sentence(project, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name == "mine":
        Path(name).write_text("a file")
    else:
        Path(name).mkdir(parents=True)  # a folder where the chapter belongs
    argument = ["--", name] if name == "--port" else ["mine"]
    code, _, err = invoke("lab", "--no-start", *argument)
    assert code == 2 and "cpugrpo lab DIR" in err and len(err.splitlines()) == 1


# The real files


def test_learners_get_every_chapter_and_record_and_no_solution():
    names = learner_files(ROOT)
    chapters = {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    records = {path.relative_to(ROOT).as_posix() for path in (ROOT / "records").rglob("*.json*")}
    assert chapters | records <= set(names)
    assert not [name for name in names if re.search("psets|instructor|concept_inv", name)]


def test_every_link_of_a_chapter_leads_to_a_file_that_learners_get():
    names, missing = {ROOT / name for name in learner_files(ROOT)}, []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", "".join(cell["source"]))
                places = [(path.parent / link).resolve() for link in links]
                missing += [(path.name, place) for place in places if place not in names]
    assert not missing


def test_wheel_and_source_distribution_carry_the_learners_files(tmp_path):
    code = (
        "import runpy, sys; from setuptools import setup; import setuptools\n"
        "made = []; setuptools.setup = lambda **given: made.append(setup(**given))\n"
        "runpy.run_path('setup.py'); build = made[0].get_command_obj('build_py')\n"
        "print(*build.get_source_files(), sep='\\n')"
    )
    command = [sys.executable, "-c", code, "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["build_py", "--build-lib", str(tmp_path / "built")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    wanted = set(learner_files(ROOT))
    assert wanted <= set(done.stdout.splitlines())
    package = tmp_path / "built" / "cpugrpo_edu"
    carried = {
        path.relative_to(package / "_lab").as_posix()
        for path in (package / "_lab").rglob("*")
        if path.is_file()
    }
    assert carried == wanted
    # and the built package finds them, though no checkout is around
    look = (
        "from cpugrpo_edu.course.learner_folder import project_files\n"
        "from cpugrpo_edu.show.text import records_folder\n"
        "print(project_files(), records_folder(), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", look],
        cwd=tmp_path,
        env={"PYTHONPATH": str(package.parent), "PATH": ""},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(package / "_lab"), str(package / "_lab" / "records")]
