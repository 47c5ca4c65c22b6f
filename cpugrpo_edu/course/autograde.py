"""Grade submissions by nbgrader's steps, each one executed in a contained kernel."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import chdir
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbgrader.converters import Autograde
from nbgrader.converters.base import BaseConverter, NbGraderException
from nbgrader.preprocessors import Execute, NbGraderPreprocessor

from cpugrpo_edu.course import execute, sandbox
from cpugrpo_edu.course.checks import names_of
from cpugrpo_edu.course.course import Course
from cpugrpo_edu.course.feedback import squeeze
from cpugrpo_edu.course.outcome import Outcome
from cpugrpo_edu.course.repair import Unreadable, find_notebooks, place_cells, read_notebook
from cpugrpo_edu.course.sandbox import Sandbox
from cpugrpo_edu.course.student_seeds import student_key
from cpugrpo_edu.errors import UserError

USERS = range(60001, 60501)
"""User ids that submissions run as where each has a user of its own."""


def autograde(
    course: Course,
    assignment: str,
    *,
    jobs: int = 1,
    force: bool = False,
    only: list[str] | None = None,
    on_done: Callable[[Outcome, int], None] = lambda outcome, total: None,
) -> list[Outcome]:
    """Grade what is new or changed, ``jobs`` submissions at a time; returns the outcomes.

    A submission that cannot be graded is recorded as failed, without points, and the others go
    on. ``on_done`` gets each outcome and the number of submissions to grade.
    """
    course.check_released(assignment)
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}; give at least 1")
    students = course.submissions(assignment)
    if not students:
        raise UserError(f"there is no submission of {assignment}; first: cpugrpo assign collect")
    if missing := sorted(set(only or []) - set(students)):
        raise UserError(f"no submission of {', '.join(missing)}; there are: {', '.join(students)}")
    secret, weakest = course.secret, Sandbox("none", USERS[0], course.root, course.limits())
    check_outside(course)
    todo = [s for s in only or students if force or course.changed(assignment, s)]
    if not todo:
        return []
    strongest = sandbox.strongest(weakest)
    check_not_root(strongest)
    lock, futures, outcomes = threading.Lock(), [], []
    with chdir(course.root), ThreadPoolExecutor(jobs) as pool:  # nbgrader uses relative paths
        for student, uid in zip(todo, cycle(USERS)):
            key, box = student_key(secret, student), replace(strongest, uid=uid)
            futures.append(pool.submit(grade, course, assignment, student, key, box, lock))
        try:
            for future in as_completed(futures):
                outcomes.append(future.result())
                on_done(outcomes[-1], len(todo))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(outcomes, key=lambda each: each.student)


def check_outside(course: Course) -> None:
    for path in sandbox.needed_folders():
        if Path(path).resolve().is_relative_to(course.root):
            raise UserError(
                f"{path} lies in the course folder, which submissions must not see; "
                "keep Python and the package outside it"
            )


def check_not_root(box: Sandbox) -> None:
    if box.level in ("limits", "none") and hasattr(os, "getuid") and os.getuid() == 0:
        raise UserError(
            f"submissions would run as root: this machine allows no namespaces (or has no "
            f"bubblewrap), and another user cannot start {sys.executable}; install Python and the "
            "package where all users can read them (such as /opt), or grade as an ordinary user"
        )


def grade(
    course: Course, assignment: str, student: str, key: str, box: Sandbox, lock: threading.Lock
) -> Outcome:
    """Grade one submission and store its outcome. Only one thread at a time is in nbgrader."""
    outcome = Outcome(student, level=box.level, digest=course.digest(assignment, student))
    with lock, tempfile.TemporaryDirectory(prefix="cg-") as mended:
        problem, undecided = "", list[tuple[str, str]]()
        try:
            exercise = mend(course, assignment, student, Path(mended), outcome.notes)
            coursedir = course.one_student(assignment, student)
            coursedir.submitted_directory = mended
            grader = ContainedAutograde(coursedir=coursedir, config=course.config)
            grader.log.setLevel(logging.CRITICAL)
            grader.force, grader.key, grader.sandbox = True, key, box
            grader.outcome, grader.lock, grader.exercise = outcome, lock, exercise
            grader.undecided = undecided
            grader.start()
        except Unreadable as error:
            problem = str(error)
        except NbGraderException as error:
            problem = f"nbgrader could not grade it: {str(error).splitlines()[0]}"
        except Exception as error:  # whatever it is, the batch goes on
            problem = f"{type(error).__name__}: {error}"[:200]
        if problem:
            outcome.status = "failed"
            outcome.flags.append(problem)
            shutil.rmtree(
                course.path(course.coursedir.autograded_directory, student, assignment),
                ignore_errors=True,
            )
        elif outcome.flags or outcome.review:
            outcome.status = "flagged"
        open_grades(course, assignment, student, None if problem else undecided)
        with course.gradebook() as book:
            submission = book.find_submission(assignment, student)
            outcome.score, outcome.max_score = submission.score, submission.max_score
        course.keep_outcome(assignment, outcome)
    return outcome


def mend(
    course: Course, assignment: str, student: str, to: Path, notes: list[str]
) -> dict[str, list[str]]:
    """Copy a submission to ``to``, its notebooks mended; raises ``Unreadable``.

    Returns the names that each notebook asks to define.
    """
    submitted, target = course.submitted(assignment, student), to / student / assignment

    def left_out(folder: str, names: list[str]) -> list[str]:
        """Notebooks, and links and pipes, which may lead anywhere or never end."""
        paths = [Path(folder, name) for name in names]
        odd = [p for p in paths if p.is_symlink() or not (p.is_file() or p.is_dir())]
        notes.extend(f"left out, since it is no file: {path.name}" for path in odd)
        return [p.name for p in paths if p in odd or p.suffix == ".ipynb"]

    shutil.copytree(submitted, target, ignore=left_out)
    sources = course.sources(assignment)
    released = course.path(course.coursedir.release_directory, ".", assignment)
    for name, path in find_notebooks(submitted, list(sources), notes).items():
        notebook = read_notebook(path, notes)
        given = released / f"{name}.ipynb"
        cells = nbformat.read(given, as_version=4).cells if given.is_file() else []
        public = {squeeze(cell.source) for cell in cells}
        notebook.cells = place_cells(notebook.cells, sources[name], public, notes)
        nbformat.write(notebook, target / f"{name}.ipynb")
    # by the released version: a submission could define any builtin that a test uses
    return {
        name: [word for each in cells if each.solution for word in names_of(each.source)]
        for name, cells in sources.items()
    }


def open_grades(
    course: Course, assignment: str, student: str, undecided: list[tuple[str, str]] | None
) -> None:
    """Leave the points of (notebook, test) pairs to a person, all of them for None: not 0."""
    with course.gradebook() as book:
        book.update_or_create_student(student)
        submission = book.update_or_create_submission(assignment, student)
        for notebook in submission.notebooks:
            for each in notebook.grades:
                if undecided is None or (notebook.name, each.name) in undecided:
                    each.auto_score, each.needs_manual_grade = None, True
        book.db.commit()


# nbgrader's steps, one of them replaced


class ContainedExecute(NbGraderPreprocessor):
    """nbgrader's ``Execute``, in a process of its own with a contained kernel."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        grader = self.parent.parent  # the exporter's converter
        meta = resources["nbgrader"]
        job = asdict(grader.sandbox) | {
            "course": str(grader.sandbox.course),
            "notebook": nb,
            "exercise": grader.exercise[meta["notebook"]],
            "files": grader._format_dest(meta["assignment"], meta["student"]),
            "student": meta["student"],
            "key": grader.key,
        }
        grader.lock.release()  # only this part runs beside other submissions
        try:
            result = run_job(job)
        finally:
            grader.lock.acquire()
        for kind in ("flags", "review", "notes"):
            known = getattr(grader.outcome, kind)
            known += [text for text in result[kind] if text not in known]
        grader.undecided += [(meta["notebook"], name) for name in result["undecided"]]
        return nbformat.from_dict(result["notebook"]), resources


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """``execute.execute(job)`` in a process of its own; a person decides if it does not answer.

    Raises ``KeyboardInterrupt`` if Ctrl-C ended that process: the submission was not graded.
    """
    result = {"notebook": job["notebook"], "flags": [], "review": [], "notes": [], "undecided": []}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cpugrpo_edu.course.execute"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=job["limits"]["seconds"] + 120,
            cwd=tempfile.gettempdir(),
            env={**os.environ, "PYTHONPATH": str(sandbox.PACKAGE)},
        )
        if done.returncode in (-signal.SIGINT, 128 + signal.SIGINT):
            raise KeyboardInterrupt
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        reason = "time limit of the notebook"
        result["flags"].append(reason)
        execute.fail_rest(job["notebook"], reason)
    except (ValueError, IndexError, OSError):
        execute.nobody_knows(result, "the grading process ended without a result")
    return result


class ContainedAutograde(Autograde):
    """nbgrader's ``Autograde`` with contained execution.

    ``exercise`` has, by notebook, the names that it asks to define; ``lock`` is held by the thread
    that works in nbgrader; ``undecided`` gets the tests, as (notebook, name), left to a person.
    """

    sandbox: Sandbox
    key: str
    outcome: Outcome
    lock: threading.Lock
    exercise: dict[str, list[str]]
    undecided: list[tuple[str, str]]

    def _init_preprocessors(self) -> None:
        steps = self.sanitize_preprocessors if self._sanitizing else self.autograde_preprocessors
        self.exporter._preprocessors = []
        for step in steps:
            self.exporter.register_preprocessor(ContainedExecute if step is Execute else step)

    def convert_single_notebook(self, notebook_filename: str) -> None:
        """Make both passes as nbgrader does, but without its change of ``os.environ``.

        Threads share ``os.environ``, and nbgrader fails when two of them change it.
        """
        for self._sanitizing in (True, False):
            self._init_preprocessors()
            BaseConverter.convert_single_notebook(self, notebook_filename)
            folder = Path(self.writer.build_directory)
            notebook_filename = str(folder / Path(notebook_filename).name)
        self._sanitizing = True
