"""Grade submissions by nbgrader's steps, each one executed in a contained kernel."""

from __future__ import annotations

import json
import logging
import os
import shutil
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
from nbgrader.api import Gradebook
from nbgrader.converters import Autograde
from nbgrader.converters.base import BaseConverter, NbGraderException
from nbgrader.nbgraderformat import MetadataValidator
from nbgrader.preprocessors import Execute, NbGraderPreprocessor, OverwriteCells

from cpugrpo_edu.course import execute, sandbox
from cpugrpo_edu.course.course import Course
from cpugrpo_edu.course.outcome import Outcome
from cpugrpo_edu.course.sandbox import Sandbox
from cpugrpo_edu.course.student_seeds import student_key
from cpugrpo_edu.errors import UserError

USERS = range(60001, 60501)
"""User ids that submissions run as where each has a user of its own."""

LARGEST = 20_000_000
"""Bytes of the largest notebook that is graded."""


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

    A submission that breaks is recorded as failed and the others go on. ``on_done`` gets each
    outcome and the number of submissions to grade.
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
    with lock:
        problem = unreadable(course.submitted(assignment, student))
        if not problem:
            try:
                grader = ContainedAutograde(
                    coursedir=course.one_student(assignment, student), config=course.config
                )
                grader.log.setLevel(logging.CRITICAL)
                grader.force, grader.key, grader.sandbox = True, key, box
                grader.outcome, grader.lock = outcome, lock
                grader.start()
            except NbGraderException as error:
                problem = f"nbgrader could not grade it: {str(error).splitlines()[0]}"
            except Exception as error:  # whatever it is, the batch goes on
                problem = f"{type(error).__name__}: {error}"[:200]
        if problem:
            outcome.status = "failed"
            outcome.flags.append(problem)
            score_zero(course, assignment, student)
        elif outcome.flags or outcome.review:
            outcome.status = "flagged"
        with course.gradebook() as book:
            submission = book.find_submission(assignment, student)
            outcome.score, outcome.max_score = submission.score, submission.max_score
        course.keep_outcome(assignment, outcome)
    return outcome


def unreadable(submitted: Path) -> str:
    """Why a submission cannot be graded, or nothing."""
    for path in submitted.rglob("*"):
        if path.is_symlink():
            return f"{path.name} is a link"
    for path in submitted.glob("*.ipynb"):
        if path.stat().st_size > LARGEST:
            return f"{path.name} has {path.stat().st_size} bytes; allowed are {LARGEST}"
        try:
            nbformat.validate(nbformat.reads(path.read_text(encoding="utf-8"), as_version=4))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return f"{path.name} is no valid notebook: {reason[:120]}"
    return ""


def score_zero(course: Course, assignment: str, student: str) -> None:
    graded = course.path(course.coursedir.autograded_directory, student, assignment)
    shutil.rmtree(graded, ignore_errors=True)
    with course.gradebook() as book:
        book.update_or_create_student(student)
        submission = book.update_or_create_submission(assignment, student)
        for notebook in submission.notebooks:
            for each in notebook.grades:
                each.auto_score, each.needs_manual_grade = 0, False
        book.db.commit()


# nbgrader's steps, two of them replaced


class RestoreCells(NbGraderPreprocessor):
    """Put deleted locked cells and tests back, each behind the cell that it followed.

    A test that was changed into another type of cell is no test and counts as deleted. nbgrader's
    own option stops if the locked description in front of a test was deleted too.
    """

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        meta, grader = resources["nbgrader"], self.parent.parent
        with Gradebook(meta["db_url"]) as book:
            source = book.find_notebook(meta["notebook"], meta["assignment"])
            points = {cell.name: cell.max_score for cell in source.grade_cells}
            solutions = {cell.name for cell in source.solution_cells}
            # by the released version: a submission could define any builtin that a test uses
            stubs = [cell.source for cell in source.source_cells if cell.name in solutions]
            grader.exercise = [name for stub in stubs for name in execute.defined(stub)]
            place = 0
            for cell in source.source_cells:
                ids = [execute.nbgrader_of(each).get("grade_id") for each in nb.cells]
                same = [index for index, name in enumerate(ids) if name == cell.name]
                place = same[0] + 1 if same else place
                if not cell.locked and cell.name not in points:
                    continue
                retyped = [i for i in same if nb.cells[i].cell_type != cell.cell_type]
                for index in retyped:
                    del nb.cells[index].metadata["nbgrader"]
                if len(retyped) < len(same):
                    continue
                restored = getattr(nbformat.v4, f"new_{cell.cell_type}_cell")(cell.source)
                restored.metadata["nbgrader"] = {  # OverwriteCells, the next step, adds the rest
                    "grade_id": cell.name,
                    "grade": cell.name in points,
                    "solution": cell.name in solutions,
                    "locked": cell.locked,
                    "task": False,
                    "schema_version": MetadataValidator.schema_version,
                } | ({"points": points[cell.name]} if cell.name in points else {})
                nb.cells.insert(place, restored)
                place += 1
                grader.outcome.review.append(f"deleted and put back: {cell.name}")
        nb.nbformat_minor = max(nb.nbformat_minor, 5)  # restored cells have ids
        return nb, resources


class ContainedExecute(NbGraderPreprocessor):
    """nbgrader's ``Execute``, in a process of its own with a contained kernel."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        grader = self.parent.parent  # the exporter's converter
        meta = resources["nbgrader"]
        for cell in nb.cells:
            cell.metadata.pop("cg_done", None)  # our mark of a test that was run
        job = asdict(grader.sandbox) | {
            "course": str(grader.sandbox.course),
            "notebook": nb,
            "exercise": grader.exercise,
            "files": grader._format_dest(meta["assignment"], meta["student"]),
            "student": meta["student"],
            "key": grader.key,
        }
        grader.lock.release()  # only this part runs beside other submissions
        try:
            result = run_job(job)
        finally:
            grader.lock.acquire()
        outcome = grader.outcome
        outcome.flags += [flag for flag in result["flags"] if flag not in outcome.flags]
        outcome.review += [word for word in result["review"] if word not in outcome.review]
        return nbformat.from_dict(result["notebook"]), resources


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """``execute.execute(job)`` in a process of its own; its tests fail if it does not answer."""
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
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        reason = "time limit of the notebook"
    except (ValueError, IndexError, OSError):
        reason = "the grading process ended without a result"
    execute.fail_rest(job["notebook"], reason)
    return {"notebook": job["notebook"], "flags": [reason], "review": []}


class ContainedAutograde(Autograde):
    """nbgrader's ``Autograde`` with restored cells and contained execution.

    ``exercise`` has the names that the assignment asks to define; ``lock`` is held by the thread
    that works in nbgrader.
    """

    sandbox: Sandbox
    key: str
    outcome: Outcome
    lock: threading.Lock
    exercise: list[str]

    def _init_preprocessors(self) -> None:
        restored = {OverwriteCells: [RestoreCells, OverwriteCells], Execute: [ContainedExecute]}
        steps = self.sanitize_preprocessors if self._sanitizing else self.autograde_preprocessors
        self.exporter._preprocessors = []
        for step in (new for each in steps for new in restored.get(each, [each])):
            self.exporter.register_preprocessor(step)

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
