"""A course folder and the steps an instructor takes, over nbgrader's API."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import queue
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import nbformat
from nbconvert.preprocessors import ClearMetadataPreprocessor
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.apps.api import NbGraderAPI
from nbgrader.converters import Autograde
from nbgrader.converters.base import BaseConverter, NbGraderException
from nbgrader.coursedir import CourseDirectory
from nbgrader.nbgraderformat import MetadataValidator
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    ClearOutput,
    DeduplicateIds,
    IgnorePattern,
    LimitOutput,
    NbGraderPreprocessor,
    OverwriteCells,
    OverwriteKernelspec,
    SaveAutoGrades,
)
from traitlets.config import PyFileConfigLoader

from cpugrpo_edu.course import execute, sandbox
from cpugrpo_edu.course.outcome import Limits, Outcome
from cpugrpo_edu.course.peers import Review, peer_reviews
from cpugrpo_edu.course.student_seeds import student_key
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import write_text

CONFIG = """# Settings of this course; every option of nbgrader can be added.
from pathlib import Path

c = get_config()  # noqa: F821
here = Path(__file__).resolve().parent
c.CourseDirectory.course_id = {name!r}
c.CourseDirectory.root = str(here)
c.CourseDirectory.db_url = f"sqlite:///{{here / 'gradebook.db'}}"
c.Exchange.root = {exchange}
c.Exchange.assignment_dir = str(here)
c.ClearSolutions.code_stub = {{"python": "# your code here\\nraise NotImplementedError"}}

# Of a plain `nbgrader autograde`, which is not contained; `cpugrpo assign autograde` is.
c.ExecutePreprocessor.timeout = 60
"""

# of nbgrader's own queries; nothing that a user of it could mend
warnings.filterwarnings("ignore", message="Object of type <Submitted", category=Warning)

# nbgrader calls alembic by name, which is found only where the environment is activated
BESIDE = str(Path(sys.executable).parent)
if BESIDE not in os.environ.get("PATH", "").split(os.pathsep):
    os.environ["PATH"] = os.pathsep.join([BESIDE, os.environ.get("PATH", "")])

PRIVATE = ("source", "submitted", "autograded", "feedback", "outcomes")
"""Closed to other users, which counts where submissions cannot be kept from seeing the folder."""

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
ROSTER = ["id", "first_name", "last_name", "email", "lms_user_id"]


def new_course(folder: Path, exchange: Path | None = None) -> list[str]:
    """Lay out a course in a new or empty folder; returns what was made.

    ``exchange`` is a folder that all users of a hub write to; without one the course has its own.
    """
    if exchange is not None and not (exchange.is_dir() and os.access(exchange, os.W_OK | os.X_OK)):
        raise UserError(
            f"{exchange} is no folder that you may write to; have it made as the instructor guide "
            "says, or leave out --exchange to work without a hub"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; give a new folder for the course")
    name = re.sub(r"[^A-Za-z0-9_-]", "-", folder.resolve().name)
    folder.mkdir(parents=True, exist_ok=True)
    for part in PRIVATE:
        (folder / part).mkdir(mode=0o700)
    where = 'str(here / "exchange")' if exchange is None else repr(str(exchange.resolve()))
    if exchange is None:
        (folder / "exchange").mkdir()
        (folder / "exchange").chmod(0o777)
    (folder / "nbgrader_config.py").write_text(CONFIG.format(name=name, exchange=where))
    with (folder / "roster.csv").open("w", newline="") as file:
        csv.writer(file).writerow(ROSTER)
    (folder / "roster.csv").chmod(0o600)
    (folder / "limits.json").write_text(json.dumps(asdict(Limits()), indent=2) + "\n")
    secret = folder / "course_secret"
    with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    private = ("course_secret", "gradebook.db", "submitted/", "autograded/", "peers/")
    (folder / ".gitignore").write_text("".join(f"{name}\n" for name in private))
    with Gradebook(f"sqlite:///{(folder / 'gradebook.db').resolve()}"):
        pass
    (folder / "gradebook.db").chmod(0o600)
    return sorted(path.name for path in folder.iterdir())


def check_id(student: str) -> str:
    if not ID.fullmatch(student):
        raise UserError(
            f"{student!r} cannot be a student id; allowed are letters, digits and . _ @ -"
        )
    return student


class Course:
    """An opened course folder. Raises ``UserError`` if ``folder`` is none."""

    def __init__(self, folder: Path) -> None:
        self.root = folder.resolve()
        if not (self.root / "nbgrader_config.py").is_file():
            raise UserError(
                f"{folder} is no course folder (it has no nbgrader_config.py); "
                "make one with: cpugrpo assign new-course DIR"
            )
        config = PyFileConfigLoader("nbgrader_config.py", path=str(self.root)).load_config()
        self.coursedir = CourseDirectory(config=config)
        self.coursedir.root = str(self.root)
        self.api = NbGraderAPI(coursedir=self.coursedir, config=config)
        self.config = config
        self.api.log.setLevel(logging.CRITICAL)
        self.lock = threading.Lock()

    @property
    def secret(self) -> str:
        path = self.root / "course_secret"
        if not path.is_file() or not path.read_text().strip():
            raise UserError(
                f"{path} is missing or empty; restore the one that this course was graded with, "
                "since each student's test data derive from it"
            )
        return path.read_text().strip()

    def limits(self) -> Limits:
        path = self.root / "limits.json"
        try:
            given = json.loads(path.read_text()) if path.exists() else {}
            return Limits(**{key: int(value) for key, value in given.items()})
        except (ValueError, TypeError, AttributeError) as problem:
            names = ", ".join(asdict(Limits()))
            raise UserError(
                f"cannot read {path} ({problem}); it holds whole numbers for {names}"
            ) from problem

    def gradebook(self) -> Gradebook:
        return Gradebook(self.coursedir.db_url, self.coursedir.course_id)

    def path(self, step: str, student: str, assignment: str) -> Path:
        return Path(self.coursedir.format_path(step, student, assignment))

    def check_released(self, assignment: str) -> None:
        with self.gradebook() as book:
            known = sorted(each.name for each in book.assignments)
        if assignment not in known:
            raise UserError(
                f"{assignment!r} was not released; released are: {', '.join(known) or 'none'}. "
                f"First: cpugrpo assign release {assignment}"
            )

    def students(self) -> dict[str, dict[str, str]]:
        """The roster by student id."""
        path = self.root / "roster.csv"
        if not path.exists():
            return {}
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        if rows and "id" not in rows[0]:
            raise UserError(f"{path} has no column 'id'; its columns are: {', '.join(ROSTER)}")
        return {check_id(row["id"]): row for row in rows if row.get("id")}

    def release(self, assignment: str, master: Path | None = None) -> Path:
        """Make the student version, enter it in the gradebook, put it in the exchange."""
        source = self.root / "source" / assignment
        if master is not None:
            if not master.is_file() or master.suffix != ".ipynb":
                raise UserError(f"{master} is no notebook; give the master's .ipynb file")
            shutil.copytree(
                master.parent,
                source,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns(".*", "__pycache__", "checkpoints"),
            )
        if not list(source.glob("*.ipynb")):
            found = sorted(p.name for p in (self.root / "source").iterdir() if p.is_dir())
            raise UserError(
                f"source/{assignment} has no notebook; there are: {', '.join(found) or 'none'}. "
                "Give one with --master FILE.ipynb"
            )
        with self.gradebook() as book:
            for student, row in self.students().items():
                known = {key: row.get(key) or None for key in ROSTER[1:]}
                book.update_or_create_student(student, **known)
        done = self.api.generate_assignment(assignment, force=True)
        if not done["success"]:
            raise UserError(f"nbgrader refuses {assignment}: {last_line(done)}")
        outbound = Path(self.config.Exchange.root) / self.coursedir.course_id / "outbound"
        shutil.rmtree(outbound / assignment, ignore_errors=True)
        done = self.api.release_assignment(assignment)
        if not done["success"]:
            raise UserError(f"cannot put {assignment} into the exchange: {last_line(done)}")
        return self.path(self.coursedir.release_directory, ".", assignment)

    def collect(self, assignment: str, downloaded: Path | None = None) -> list[str]:
        """Take submissions from the exchange, or from a folder or zip of downloaded ones."""
        self.check_released(assignment)
        submitted = self.coursedir.submitted_directory
        if downloaded is None:
            self.check_inbound(assignment)
            done = self.api.collect(assignment)
            if not done["success"]:
                raise UserError(f"cannot collect {assignment}: {last_line(done)}")
        else:
            if not downloaded.exists():
                raise UserError(f"{downloaded} does not exist; give a folder or a .zip")
            with self.gradebook() as book:
                names = [each.name for each in book.find_assignment(assignment).notebooks]
            with tempfile.TemporaryDirectory() as scratch:
                folder = downloaded
                if downloaded.is_file():
                    folder = Path(scratch)
                    unzip(downloaded, folder)
                found = downloaded_notebooks(folder, names, self.students())
                for student, notebook, file, own_folder in found:
                    target = self.path(submitted, student, assignment)
                    target.mkdir(parents=True, exist_ok=True)
                    if own_folder:  # a capstone is more than its notebook
                        shutil.copytree(file.parent, target, dirs_exist_ok=True, ignore=not_taken)
                    shutil.copyfile(file, target / f"{notebook}.ipynb")
                    when = datetime.fromtimestamp(file.stat().st_mtime, UTC)
                    (target / "timestamp.txt").write_text(f"{when:%Y-%m-%d %H:%M:%S.%f} UTC\n")
        return self.submissions(assignment)

    def check_inbound(self, assignment: str) -> None:
        """Refuse what nbgrader would take from the exchange: links, and another student's name.

        Anybody can put a folder there. A link in it would be followed with the grader's rights,
        for example to the master, which would then be the student's own answer.
        """
        inbound = Path(self.config.Exchange.root) / self.coursedir.course_id / "inbound"
        for folder in sorted(inbound.glob(f"*+{assignment}+*")):
            owner = folder.lstat().st_uid
            try:
                name = folder.owner()
            except (KeyError, OSError, NotImplementedError):
                name = f"user {owner}"
            wrong = ""
            if any(path.is_symlink() for path in (folder, *folder.rglob("*"))):
                wrong = "holds a link, which collecting would follow with your rights"
            # where all of a hub are one user, as in containers, owners say nothing
            elif owner != os.getuid() and name != folder.name.split("+")[0]:
                wrong = "has another student's name"
            if wrong:
                raise UserError(f"{folder}, made by {name}, {wrong}; look at it and move it away")

    def submissions(self, assignment: str) -> list[str]:
        folder = self.root / self.coursedir.submitted_directory
        return sorted(
            path.parent.name
            for path in folder.glob(f"*/{assignment}")
            if path.is_dir() and ID.fullmatch(path.parent.name)
        )

    def peers(self, assignment: str, force: bool = False) -> list[Review]:
        """Deal the submissions out for anonymous review, into peers/ASSIGNMENT/REVIEWER/CODE.

        Who wrote what is in peers/ASSIGNMENT/pairs.csv. Raises ``UserError`` if reviews were
        dealt before and a later submission changes who gets what, unless ``force`` is given.
        """
        self.check_released(assignment)
        reviews = peer_reviews(self.submissions(assignment), self.secret, assignment)
        top = self.root / "peers" / assignment
        pairs = top / "pairs.csv"
        rows = [[each.reviewer, each.code, each.author] for each in reviews]
        text = "".join(",".join(row) + "\n" for row in [["reviewer", "code", "author"], *rows])
        if pairs.exists() and pairs.read_text() != text and not force:
            raise UserError(
                f"{pairs} has other pairs, since submissions came or went; reviews that were "
                "handed out would no longer fit. Deal anew with --force"
            )
        shutil.rmtree(top, ignore_errors=True)
        top.parent.mkdir(mode=0o700, exist_ok=True)
        for each in reviews:
            shutil.copytree(
                self.path(self.coursedir.submitted_directory, each.author, assignment),
                top / each.reviewer / each.code,
                ignore=lambda folder, names: [
                    name
                    for name in names
                    if name.startswith(("timestamp", "peer_", "."))
                    or Path(folder, name).is_symlink()
                ],
            )
        write_text(pairs, text)
        return reviews

    # Grading

    def outcome_path(self, assignment: str, student: str) -> Path:
        return self.root / "outcomes" / assignment / f"{student}.json"

    def outcome(self, assignment: str, student: str) -> Outcome | None:
        try:
            return Outcome(**json.loads(self.outcome_path(assignment, student).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def digest(self, assignment: str, student: str) -> str:
        """Changes when the submission, the master or the secret does."""
        total = hashlib.sha256(self.secret.encode())
        for folder in (
            self.path(self.coursedir.submitted_directory, student, assignment),
            self.root / "source" / assignment,
        ):
            for file in sorted(folder.rglob("*")):
                if file.is_symlink() or not file.is_file():
                    continue
                total.update(str(file.relative_to(folder)).encode())
                with file.open("rb") as stream:
                    total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()

    def autograde(
        self,
        assignment: str,
        *,
        jobs: int = 1,
        force: bool = False,
        only: list[str] | None = None,
        on_start: Callable[[int], None] = lambda _: None,
        on_done: Callable[[Outcome], None] = lambda _: None,
    ) -> list[Outcome]:
        """Grade what is new or changed; one that breaks is recorded and the rest goes on."""
        self.check_released(assignment)
        if jobs < 1:
            raise UserError(f"--jobs is {jobs}; give at least 1")
        students = self.submissions(assignment)
        if not students:
            raise UserError(
                f"there is no submission of {assignment}; first: cpugrpo assign collect"
            )
        missing = sorted(set(only or []) - set(students))
        if missing:
            raise UserError(
                f"no submission of {', '.join(missing)}; there are: {', '.join(students)}"
            )
        secret, limits = self.secret, self.limits()
        for path in map(Path, self.sandbox_spec(limits, 0)["keep"]):
            if path.resolve().is_relative_to(self.root):
                raise UserError(
                    f"{path} lies in the course folder, which submissions must not see; "
                    "keep Python and the package outside it"
                )
        todo = []
        for student in only or students:
            before = self.outcome(assignment, student)
            if force or before is None or before.digest != self.digest(assignment, student):
                todo.append(student)
        on_start(len(todo))
        if not todo:
            return []
        level = sandbox.strongest(self.sandbox_spec(limits, 60001))
        if level in ("limits", "none") and hasattr(os, "getuid") and os.getuid() == 0:
            raise UserError(
                f"submissions would run as root: this machine gives no namespaces, and another "
                f"user cannot start {sys.executable}; install Python and the package where all "
                "users can read them (such as /opt), or grade as an ordinary user"
            )
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(jobs):
            slots.put(60001 + slot)

        def one(student: str) -> Outcome:
            uid = slots.get()
            try:
                spec = {**self.sandbox_spec(limits, uid), "level": level}
                return self.grade(assignment, student, secret, limits, spec)
            finally:
                slots.put(uid)

        outcomes = []
        with working_in(self.root), ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(one, student) for student in todo]
            try:
                for future in as_completed(futures):
                    outcomes.append(future.result())
                    on_done(outcomes[-1])
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
        return sorted(outcomes, key=lambda each: each.student)

    def sandbox_spec(self, limits: Limits, uid: int) -> dict[str, Any]:
        package = Path(__file__).resolve().parents[2]
        libraries = [path for path in sys.path if Path(path).name.endswith("-packages")]
        return {
            "uid": uid,
            "hide": [str(self.root)],
            "keep": [sys.prefix, sys.base_prefix, str(package), *libraries],
            "path": str(package),
            "memory_bytes": limits.memory_bytes,
            "processes": limits.processes,
            "file_bytes": limits.file_bytes,
            "disk_bytes": limits.disk_bytes,
            "seconds": limits.seconds,
        }

    def grade(
        self, assignment: str, student: str, secret: str, limits: Limits, spec: dict[str, Any]
    ) -> Outcome:
        outcome = Outcome(student, level=spec["level"])
        outcome.digest = self.digest(assignment, student)
        job = {
            "student": student,
            "key": student_key(secret, student),
            "sandbox": spec,
            "cell_seconds": limits.cell_seconds,
            "output_bytes": limits.output_bytes,
        }
        submitted = self.path(self.coursedir.submitted_directory, student, assignment)
        with self.lock:
            problem = unreadable(submitted)
            if not problem:
                try:
                    grader = ContainedAutograde(
                        coursedir=one_student(self.config, self.root, assignment, student),
                        config=self.config,
                    )
                    grader.log.setLevel(logging.CRITICAL)
                    grader.force, grader.job, grader.outcome = True, job, outcome
                    grader.lock = self.lock
                    grader.start()
                except NbGraderException as error:
                    problem = f"nbgrader could not grade it: {str(error).splitlines()[0]}"
                except Exception as error:  # whatever it is, the batch goes on
                    problem = f"{type(error).__name__}: {error}"[:200]
            if problem:
                outcome.status = "failed"
                outcome.flags.append(problem)
                self.score_zero(assignment, student)
            elif outcome.flags or outcome.review:
                outcome.status = "flagged"
            with self.gradebook() as book:
                submission = book.find_submission(assignment, student)
                outcome.score, outcome.max_score = submission.score, submission.max_score
            path = self.outcome_path(assignment, student)
            write_text(path, json.dumps(asdict(outcome), indent=2) + "\n")
        return outcome

    def score_zero(self, assignment: str, student: str) -> None:
        graded = self.path(self.coursedir.autograded_directory, student, assignment)
        shutil.rmtree(graded, ignore_errors=True)
        with self.gradebook() as book:
            book.update_or_create_student(student)
            submission = book.update_or_create_submission(assignment, student)
            for notebook in submission.notebooks:
                for grade in notebook.grades:
                    grade.auto_score, grade.needs_manual_grade = 0, False
            book.db.commit()

    # Afterwards

    def feedback(self, assignment: str, release: bool = False) -> list[Path]:
        """HTML pages without hidden tests and mark schemes; returns their paths.

        ``release`` puts them into the exchange, where nbgrader gives each student their own.
        """
        from cpugrpo_edu.course.feedback import Feedback

        self.check_released(assignment)
        made = []
        for student in self.submissions(assignment):
            graded = self.path(self.coursedir.autograded_directory, student, assignment)
            if not graded.is_dir():
                continue
            maker = Feedback(
                coursedir=one_student(self.config, self.root, assignment, student),
                config=self.config,
            )
            maker.log.setLevel(logging.CRITICAL)
            maker.force = True
            try:
                maker.start()
            except NbGraderException as error:
                raise UserError(f"cannot write the feedback of {student}: {error}") from error
            target = self.path(self.coursedir.feedback_directory, student, assignment)
            made += sorted(target.glob("*.html"))
        if not made:
            raise UserError(
                f"no graded submission of {assignment}; first: cpugrpo assign autograde"
            )
        if release:
            self.release_feedback(assignment, {page.parent for page in made})
        return made

    def release_feedback(self, assignment: str, folders: set[Path]) -> None:
        """Into the exchange, for those who handed in through it: a download has no secret."""
        without = {f.parent.name for f in folders if not (f / "submission_secret.txt").is_file()}
        if len(without) == len(folders):
            raise UserError(
                f"no submission of {assignment} came through the exchange, so nobody could fetch "
                f"the feedback there; hand out {self.coursedir.feedback_directory}/"
            )
        self.coursedir.student_id_exclude = ",".join(sorted(without))
        done = self.api.release_feedback(assignment)
        if not done["success"]:
            raise UserError(f"cannot put the feedback into the exchange: {last_line(done)}")

    def scores(self, assignment: str) -> dict[str, tuple[float, float]]:
        with self.gradebook() as book:
            return {
                each.student.id: (each.score, each.max_score)
                for each in book.assignment_submissions(assignment)
            }

    def export(self, kind: str, to: Path, assignments: list[str] | None = None) -> int:
        """Write scores as CSV for ``canvas`` or ``moodle``, or ``plain``; returns the rows."""
        if kind not in ("canvas", "moodle", "plain"):
            raise UserError(f"--for is {kind!r}; allowed are canvas, moodle and plain")
        with self.gradebook() as book:
            known = [each.name for each in book.assignments]
        chosen = assignments or known
        for name in chosen:
            self.check_released(name)
        scores = {name: self.scores(name) for name in chosen}
        roster = self.students()
        students = sorted({*roster, *(s for each in scores.values() for s in each)})
        heads = {
            "canvas": ["Student", "ID", "SIS User ID", "SIS Login ID", "Section"],
            "moodle": ["ID number", "Email address"],
            "plain": ["student"],
        }[kind]
        with to.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*heads, *chosen])
            if kind == "canvas":
                top = [max((m for _, m in scores[n].values()), default=0) for n in chosen]
                writer.writerow(["Points Possible", "", "", "", "", *(f"{m:g}" for m in top)])
            for student in students:
                row = roster.get(student, {})
                last, first = row.get("last_name") or "", row.get("first_name") or ""
                name = ", ".join(part for part in (last, first) if part) or student
                start = {
                    "canvas": [name, row.get("lms_user_id") or "", student, student, ""],
                    "moodle": [student, row.get("email") or ""],
                    "plain": [student],
                }[kind]
                marks = [
                    f"{scores[n][student][0]:g}" if student in scores[n] else "" for n in chosen
                ]
                writer.writerow([unformula(part) for part in start] + marks)
        return len(students)

    def status(self) -> list[dict[str, Any]]:
        """A row an assignment: submissions, graded, changed since, flagged, failed, by hand."""
        rows = []
        with self.gradebook() as book:
            names = [each.name for each in book.assignments]
        for name in sorted(names):
            submitted = self.submissions(name)
            found = {student: self.outcome(name, student) for student in submitted}
            graded = {s: o for s, o in found.items() if o is not None}
            with self.gradebook() as book:
                manual = sum(
                    bool(each.needs_manual_grade) for each in book.assignment_submissions(name)
                )
            rows.append(
                {
                    "assignment": name,
                    "submitted": len(submitted),
                    "graded": len(graded),
                    "changed": sum(o.digest != self.digest(name, s) for s, o in graded.items()),
                    "flagged": sorted(s for s, o in graded.items() if o.status == "flagged"),
                    "failed": sorted(s for s, o in graded.items() if o.status == "failed"),
                    "to grade by hand": manual,
                }
            )
        return rows


def last_line(done: dict[str, Any]) -> str:
    text = str(done.get("log") or done.get("error") or "").strip().splitlines()
    return text[-1] if text else "no reason given"


def unformula(text: str) -> str:
    """A spreadsheet would execute a name that begins like a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "@", "\t") else text


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def one_student(config: Any, root: Path, assignment: str, student: str) -> CourseDirectory:
    coursedir = CourseDirectory(config=config)
    coursedir.root = str(root)
    coursedir.assignment_id, coursedir.student_id = assignment, student
    return coursedir


def unreadable(submitted: Path, largest: int = 20_000_000) -> str:
    """Why a submission cannot be graded, or nothing."""
    for path in submitted.rglob("*"):
        if path.is_symlink():
            return f"{path.name} is a link"
    for path in submitted.glob("*.ipynb"):
        if path.stat().st_size > largest:
            return f"{path.name} has {path.stat().st_size} bytes; allowed are {largest}"
        try:
            notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
            nbformat.validate(notebook)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return f"{path.name} is no valid notebook: {reason[:120]}"
    return ""


def unzip(path: Path, folder: Path, largest: int = 2**30, deep: int = 2) -> None:
    """Unpack, and the zips inside as well, as far down as Canvas and Moodle nest them."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > largest:
                raise UserError(f"{path} unpacks to more than {largest} bytes; split it")
            for member in members:  # inside the folder, and with the time it was packed with
                to = archive.extract(member, folder)
                packed = datetime(*member.date_time).timestamp()
                os.utime(to, (packed, packed))
            for inner in sorted(folder.rglob("*.zip")):
                if not deep:
                    raise UserError(f"{inner.name} is a zip in a zip in a zip; unpack it by hand")
                unzip(inner, inner.with_suffix(""), largest, deep - 1)
    except (zipfile.BadZipFile, RuntimeError) as error:  # the latter: a password
        raise UserError(
            f"{path} is no zip file that can be read; give a folder or a .zip"
        ) from error


def not_taken(folder: str, names: list[str]) -> list[str]:
    """Other notebooks, hidden files and links of a downloaded folder."""
    return [
        n
        for n in names
        if n.startswith((".", "__")) or n.endswith(".ipynb") or Path(folder, n).is_symlink()
    ]


def downloaded_notebooks(
    folder: Path, names: list[str], roster: dict[str, dict[str, str]]
) -> list[tuple[str, str, Path, bool]]:
    """Student, notebook and file of each download, and whether its folder is the student's.

    Understood are ``STUDENT/NOTEBOOK.ipynb`` (the folder may go on after ``_``, as Moodle's do)
    and ``STUDENT_..._NOTEBOOK.ipynb`` (as Canvas and nbgrader's zip collector name them). Folders
    may lie in between: the outermost name that the roster knows counts.
    """
    found: list[tuple[str, str, Path, bool]] = []
    strange = []
    for file in sorted(folder.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in file.parts or file.is_symlink():
            continue
        inside = file.relative_to(folder).parts
        stem = re.sub(r"-\d+$", "", file.stem)  # Canvas adds -1 to a second hand-in
        notebook = next((n for n in sorted(names, key=len)[::-1] if stem.endswith(n)), None)
        known = [label for label in (*inside[:-1], stem) if who(label, roster) in roster]
        label = [*known, *[name for name in inside[:-1] if name not in names][::-1], stem][0]
        student = who(label, roster)
        if notebook is None or label == notebook or not ID.fullmatch(student):
            strange.append(str(file.relative_to(folder)))
            continue
        for other in [each[2] for each in found if each[:2] == (student, notebook)]:
            raise UserError(
                f"both {other.relative_to(folder)} and {file.relative_to(folder)} would be "
                f"{notebook} of {student}; keep one, or enter both students in roster.csv"
            )
        found.append((student, notebook, file, label in inside[:-1]))
    if strange or not found:
        what = (
            f"cannot tell whose these are: {', '.join(strange[:5])}" if strange else "it is empty"
        )
        raise UserError(
            f"{folder.name}: {what}; name them STUDENT/{names[0]}.ipynb or STUDENT_{names[0]}.ipynb"
        )
    return found


def who(label: str, roster: dict[str, dict[str, str]]) -> str:
    """The student of a download: by id, else by the LMS's number, else by name, else as it is.

    Canvas begins with the name in one word and has the user's number further on; Moodle begins
    with first and last name.
    """
    ids = [s for s in roster if label == s or label.startswith(f"{s}_")]
    if ids:
        return max(ids, key=len)
    parts = label.split("_")
    numbers = [s for s, row in roster.items() if (row.get("lms_user_id") or "-") in parts[1:]]
    if len(numbers) == 1:
        return numbers[0]

    def plain(*names: str | None) -> str:
        return re.sub(r"\W", "", "".join(name or "" for name in names)).casefold()

    named = [
        s
        for s, row in roster.items()
        for first, last in [(row.get("first_name"), row.get("last_name"))]
        if (first or last) and plain(parts[0]) in (plain(first, last), plain(last, first))
    ]
    return named[0] if len(named) == 1 else parts[0]


# nbgrader's steps with ours in their place


class RestoreCells(NbGraderPreprocessor):
    """Put deleted locked cells and tests back, each behind the cell it followed.

    A test that was made another type of cell is no test: that counts as deleted. nbgrader's own
    option stops when a locked description in front of the test is gone as well.
    """

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        meta = resources["nbgrader"]
        with Gradebook(meta["db_url"]) as book:
            source = book.find_notebook(meta["notebook"], meta["assignment"])
            graded = {cell.name: cell.max_score for cell in source.grade_cells}
            solutions = {cell.name for cell in source.solution_cells}
            place = 0
            for cell in source.source_cells:
                here = [
                    index
                    for index, each in enumerate(nb.cells)
                    if each.metadata.get("nbgrader", {}).get("grade_id") == cell.name
                ]
                if here:
                    place = here[0] + 1
                if not cell.locked and cell.name not in graded:
                    continue
                retyped = [i for i in here if nb.cells[i].cell_type != cell.cell_type]
                for index in retyped:
                    del nb.cells[index].metadata["nbgrader"]
                if len(here) > len(retyped):
                    continue
                make = getattr(nbformat.v4, f"new_{cell.cell_type}_cell")
                restored = make(cell.source)
                restored.metadata["nbgrader"] = {
                    "grade_id": cell.name,
                    "grade": cell.name in graded,
                    "solution": cell.name in solutions,
                    "locked": cell.locked,
                    "task": False,
                    "points": graded.get(cell.name, 0),
                    "cell_type": cell.cell_type,
                    "checksum": cell.checksum,
                    "schema_version": MetadataValidator.schema_version,
                }
                if cell.name not in graded:
                    del restored.metadata["nbgrader"]["points"]
                nb.cells.insert(place, restored)
                place += 1
                self.parent.parent.outcome.review.append(f"deleted and put back: {cell.name}")
        nb.nbformat_minor = max(nb.nbformat_minor, 5)
        return nb, resources


class ContainedExecute(NbGraderPreprocessor):
    """nbgrader's Execute, in a process of its own with the kernel shut in."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        grader = self.parent.parent  # exporter, then the converter
        job, outcome = dict(grader.job), grader.outcome
        meta = resources["nbgrader"]
        files = grader.coursedir.format_path(
            grader.coursedir.autograded_directory, meta["student"], meta["assignment"]
        )
        for cell in nb.cells:
            cell.metadata.pop("cg_done", None)  # the mark of a test that was run
        with tempfile.TemporaryDirectory(prefix="cg-") as scratch:
            path = Path(scratch) / "notebook.ipynb"
            nbformat.write(nb, path)
            job |= {"notebook": str(path), "files": files, "scratch": tempfile.gettempdir()}
            order = Path(scratch) / "job.json"
            order.write_text(json.dumps(job))
            grader.lock.release()  # only this part runs beside others
            try:
                found = run_job(order, job["sandbox"]["seconds"] + 120)
            finally:
                grader.lock.acquire()
            outcome.flags += [each for each in found["flags"] if each not in outcome.flags]
            outcome.review += [each for each in found["review"] if each not in outcome.review]
            nb = nbformat.read(path, as_version=4)
        if not found["ran"]:
            execute.fail_rest(nb, found["flags"][0])
        return nb, resources


def run_job(order: Path, seconds: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cpugrpo_edu.course.execute", str(order)],
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=order.parent,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )
        return {**json.loads(done.stdout.splitlines()[-1]), "ran": True}
    except subprocess.TimeoutExpired:
        reason = "time limit of the notebook"
    except (ValueError, IndexError, OSError):
        reason = "the grading process ended without a result"
    return {"flags": [reason], "review": [], "ran": False}


class ContainedAutograde(Autograde):
    """nbgrader's autograde with restored cells and contained execution."""

    job: dict[str, Any]
    outcome: Outcome
    lock: Any

    def convert_single_notebook(self, notebook_filename: str) -> None:
        """Both passes as nbgrader makes them, but without its change of ``os.environ``.

        Threads share that one, and two at a time made nbgrader fail on a submission.
        """
        self._sanitizing = True
        self._init_preprocessors()
        BaseConverter.convert_single_notebook(self, notebook_filename)
        self._sanitizing = False
        self._init_preprocessors()
        try:
            copied = Path(self.writer.build_directory) / Path(notebook_filename).name
            BaseConverter.convert_single_notebook(self, str(copied))
        finally:
            self._sanitizing = True

    sanitize_preprocessors: ClassVar[list[Any]] = [
        ClearOutput,
        DeduplicateIds,
        OverwriteKernelspec,
        RestoreCells,
        OverwriteCells,
        CheckCellMetadata,
    ]
    autograde_preprocessors: ClassVar[list[Any]] = [
        ContainedExecute,
        IgnorePattern,
        ClearMetadataPreprocessor,
        LimitOutput,
        SaveAutoGrades,
        AssignLatePenalties,
        CheckCellMetadata,
    ]
