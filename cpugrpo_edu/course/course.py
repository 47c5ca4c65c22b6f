"""A course folder and the steps that an instructor takes, over nbgrader's API."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
import warnings
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nbgrader.api import Gradebook
from nbgrader.apps.api import NbGraderAPI
from nbgrader.converters.base import NbGraderException
from nbgrader.coursedir import CourseDirectory
from traitlets.config import PyFileConfigLoader

from cpugrpo_edu.course.downloads import ID, find_downloads, not_collected, unzip
from cpugrpo_edu.course.export import HEADS, PlatformExport, not_graded
from cpugrpo_edu.course.feedback import Feedback, not_graded_pages
from cpugrpo_edu.course.outcome import Limits, Outcome
from cpugrpo_edu.course.peers import Review, peer_reviews
from cpugrpo_edu.course.repair import Source, notebook_of
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

# For a plain `nbgrader autograde`, which is not contained; `cpugrpo assign autograde` is.
c.ExecutePreprocessor.timeout = 60
"""

PRIVATE = ("source", "submitted", "autograded", "feedback", "outcomes")
"""Folders closed to other users, which protects them where submissions are not contained."""

UNVERSIONED = ("course_secret", "gradebook.db", "submitted/", "autograded/", "peers/")

ROSTER = ["id", "first_name", "last_name", "email", "lms_user_id"]


def new_course(folder: Path, exchange: Path | None = None) -> list[str]:
    """Lay out a course in a new or empty folder; returns the names of what was made.

    ``exchange`` is a folder that all users of a hub write to; without one the course has its own.
    """
    if exchange is not None and not (exchange.is_dir() and os.access(exchange, os.W_OK | os.X_OK)):
        raise UserError(
            f"{exchange} is no folder that you may write to; have it made as the instructor guide "
            "says, or leave out --exchange to work without a hub"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; give a new folder for the course")
    prepare_nbgrader()
    name = re.sub(r"[^A-Za-z0-9_-]", "-", folder.resolve().name)
    folder.mkdir(parents=True, exist_ok=True)
    for part in PRIVATE:
        (folder / part).mkdir(mode=0o700)
    where = 'str(here / "exchange")' if exchange is None else repr(str(exchange.resolve()))
    if exchange is None:
        (folder / "exchange").mkdir()
        (folder / "exchange").chmod(0o777)
    (folder / "nbgrader_config.py").write_text(CONFIG.format(name=name, exchange=where))
    (folder / "roster.csv").write_text(",".join(ROSTER) + "\n")
    (folder / "roster.csv").chmod(0o600)
    (folder / "limits.json").write_text(json.dumps(asdict(Limits()), indent=2) + "\n")
    (folder / "course_secret").touch(0o600)
    (folder / "course_secret").write_text(secrets.token_hex(32) + "\n")
    (folder / ".gitignore").write_text("".join(f"{name}\n" for name in UNVERSIONED))
    with Gradebook(f"sqlite:///{(folder / 'gradebook.db').resolve()}"):
        pass
    (folder / "gradebook.db").chmod(0o600)
    return sorted(path.name for path in folder.iterdir())


def prepare_nbgrader() -> None:
    """Let nbgrader find alembic, and silence a warning about its queries that no user can fix.

    nbgrader calls alembic by name, which works only if the environment is activated.
    """
    programs, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if programs not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([programs, path])
    warnings.filterwarnings("ignore", message="Object of type <Submitted", category=Warning)


class Course:
    """An opened course folder. Raises ``UserError`` if ``folder`` is none."""

    def __init__(self, folder: Path) -> None:
        self.root = folder.resolve()
        if not (self.root / "nbgrader_config.py").is_file():
            raise UserError(
                f"{folder} is no course folder (it has no nbgrader_config.py); "
                "make one with: cpugrpo assign new-course DIR"
            )
        prepare_nbgrader()
        self.config = PyFileConfigLoader("nbgrader_config.py", path=str(self.root)).load_config()
        self.coursedir = CourseDirectory(config=self.config, root=str(self.root))
        self.api = NbGraderAPI(coursedir=self.coursedir, config=self.config)
        self.api.log.setLevel(logging.CRITICAL)
        self.exchange = Path(self.config.Exchange.root) / self.coursedir.course_id

    # The folder

    @property
    def secret(self) -> str:
        path = self.root / "course_secret"
        if not path.is_file() or not path.read_text().strip():
            raise UserError(
                f"{path} is missing or empty; restore the one that this course was graded with, "
                "since each student's test data are derived from it"
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

    def submitted(self, assignment: str, student: str) -> Path:
        return self.path(self.coursedir.submitted_directory, student, assignment)

    def one_student(self, assignment: str, student: str) -> CourseDirectory:
        """The course as a converter of nbgrader sees it that works on one submission."""
        return CourseDirectory(
            config=self.config, root=str(self.root), assignment_id=assignment, student_id=student
        )

    def assignments(self) -> list[str]:
        """The released assignments."""
        with self.gradebook() as book:
            return sorted(each.name for each in book.assignments)

    def sources(self, assignment: str) -> dict[str, list[Source]]:
        """The graded, locked and solution cells of each notebook, as they were released."""
        found = {}
        with self.gradebook() as book:
            for notebook in book.find_assignment(assignment).notebooks:
                graded = [*notebook.grade_cells, *notebook.task_cells]
                points = {cell.name: cell.max_score for cell in graded}
                tasks = {cell.name for cell in notebook.task_cells}
                solutions = {cell.name for cell in notebook.solution_cells}
                found[notebook.name] = [
                    Source(
                        name=cell.name,
                        cell_type=cell.cell_type,
                        source=cell.source,
                        locked=cell.locked,
                        solution=cell.name in solutions,
                        points=points.get(cell.name),
                        task=cell.name in tasks,
                    )
                    for cell in notebook.source_cells
                ]
        return found

    def check_released(self, assignment: str) -> None:
        known = self.assignments()
        if assignment not in known:
            raise UserError(
                f"{assignment!r} was not released; released are: {', '.join(known) or 'none'}. "
                f"First: cpugrpo assign release {assignment}"
            )

    def roster(self) -> dict[str, dict[str, str]]:
        """The rows of roster.csv by student id."""
        path = self.root / "roster.csv"
        if not path.exists():
            return {}
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        if rows and "id" not in rows[0]:
            raise UserError(f"{path} has no column 'id'; its columns are: {', '.join(ROSTER)}")
        for student in (row["id"] for row in rows if row.get("id")):
            if not ID.fullmatch(student):
                raise UserError(
                    f"{student!r} cannot be a student id; allowed are letters, digits and . _ @ -"
                )
        return {row["id"]: row for row in rows if row.get("id")}

    def enter_roster(self) -> None:
        """Copy the roster into the gradebook."""
        with self.gradebook() as book:
            for student, row in self.roster().items():
                known = {key: row.get(key) or None for key in ROSTER[1:]}
                book.update_or_create_student(student, **known)

    # Before grading

    def release(self, assignment: str, master: Path | None = None) -> Path:
        """Make the student version, enter it in the gradebook, put it in the exchange."""
        source = self.root / "source" / assignment
        if master is not None:
            if not master.is_file() or master.suffix != ".ipynb":
                raise UserError(f"{master} is no notebook; give the master's .ipynb file")
            unwanted = shutil.ignore_patterns(".*", "__pycache__", "checkpoints")
            shutil.copytree(master.parent, source, dirs_exist_ok=True, ignore=unwanted)
        if not list(source.glob("*.ipynb")):
            found = sorted(p.name for p in (self.root / "source").iterdir() if p.is_dir())
            raise UserError(
                f"source/{assignment} has no notebook; there are: {', '.join(found) or 'none'}. "
                "Give one with --master FILE.ipynb"
            )
        self.enter_roster()
        done = self.api.generate_assignment(assignment, force=True)
        check_done(done, f"nbgrader refuses {assignment}")
        shutil.rmtree(self.exchange / "outbound" / assignment, ignore_errors=True)
        done = self.api.release_assignment(assignment)
        check_done(done, f"cannot put {assignment} into the exchange")
        return self.path(self.coursedir.release_directory, ".", assignment)

    def collect(
        self, assignment: str, downloaded: Path | None = None
    ) -> tuple[list[str], list[str]]:
        """Take submissions from the exchange, or from a folder or zip of downloaded ones.

        Returns the students who handed in, and what was held back and why; the others go on.
        """
        self.check_released(assignment)
        if downloaded is None:
            held = self.collect_exchanged(assignment)
        elif downloaded.is_dir():
            held = self.collect_downloads(assignment, downloaded)
        elif downloaded.is_file():
            with tempfile.TemporaryDirectory() as scratch:
                unzip(downloaded, Path(scratch))
                held = self.collect_downloads(assignment, Path(scratch))
        else:
            raise UserError(f"{downloaded} does not exist; give a folder or a .zip")
        return self.submissions(assignment), held

    def collect_downloads(self, assignment: str, folder: Path) -> list[str]:
        with self.gradebook() as book:
            names = [each.name for each in book.find_assignment(assignment).notebooks]
        found, held = find_downloads(folder, names, self.roster())
        new = {(each.student, notebook_of(Path(each.name).stem, names)) for each in found}
        for student, notebook in new:
            for old in self.submitted(assignment, student).glob("*.ipynb"):
                if notebook_of(old.stem, names) == notebook:
                    old.unlink()
        for each in found:
            target = self.submitted(assignment, each.student)
            target.mkdir(parents=True, exist_ok=True)
            if each.own_folder:  # a capstone is more than its notebook
                source = each.file.parent
                shutil.copytree(source, target, dirs_exist_ok=True, ignore=not_collected)
            shutil.copyfile(each.file, target / each.name)
            when = datetime.fromtimestamp(each.file.stat().st_mtime, UTC)
            (target / "timestamp.txt").write_text(f"{when:%Y-%m-%d %H:%M:%S.%f} UTC\n")
        return held

    def collect_exchanged(self, assignment: str) -> list[str]:
        """Collect from the exchange, but not from students with a folder that is refused."""
        inbound = sorted((self.exchange / "inbound").glob(f"*+{assignment}+*"))
        refused = {folder: why for folder in inbound if (why := self.refused(folder))}
        students = {folder: folder.name.rsplit(f"+{assignment}+", 1)[0] for folder in inbound}
        others = {*students.values()} - {students[folder] for folder in refused}
        try:
            for student in sorted(others) if refused else [""]:  # all of them, for nbgrader
                self.coursedir.student_id = student or "*"
                check_done(self.api.collect(assignment), f"cannot collect {assignment}")
        finally:
            self.coursedir.student_id = "*"
        return [f"{folder}, {why}; look at it and move it away" for folder, why in refused.items()]

    def refused(self, folder: Path) -> str:
        """Why not to collect a folder of the exchange: links, or another student's name.

        Anyone can put a folder there. nbgrader would follow a link in it with the grader's
        rights, for example to the master, which would then be the student's own answer.
        """
        owner = folder.lstat().st_uid
        try:
            name = folder.owner()
        except (KeyError, OSError, NotImplementedError):
            name = f"user {owner}"
        if any(path.is_symlink() for path in (folder, *folder.rglob("*"))):
            return f"made by {name}, holds a link, which collecting would follow with your rights"
        # where all users of a hub are one user, as in containers, owners say nothing
        if owner != os.getuid() and name != folder.name.split("+")[0]:
            return f"made by {name}, has another student's name"
        return ""

    def submissions(self, assignment: str) -> list[str]:
        """The students who handed in."""
        folder = self.root / self.coursedir.submitted_directory
        return sorted(
            path.parent.name
            for path in folder.glob(f"*/{assignment}")
            if path.is_dir() and ID.fullmatch(path.parent.name)
        )

    def peers(self, assignment: str, force: bool = False) -> list[Review]:
        """Deal the submissions out for anonymous review, into peers/ASSIGNMENT/REVIEWER/CODE.

        peers/ASSIGNMENT/pairs.csv tells who wrote what. Raises ``UserError`` if reviews were
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

        def not_shown(folder: str, names: list[str]) -> list[str]:
            """Time, reviews of others, hidden files, and links, which may lead anywhere."""
            ours = ("timestamp", "peer_", ".")
            return [n for n in names if n.startswith(ours) or Path(folder, n).is_symlink()]

        shutil.rmtree(top, ignore_errors=True)
        top.parent.mkdir(mode=0o700, exist_ok=True)
        for each in reviews:
            given = self.submitted(assignment, each.author)
            shutil.copytree(given, top / each.reviewer / each.code, ignore=not_shown)
        write_text(pairs, text)
        return reviews

    # Outcomes of grading

    def outcome_path(self, assignment: str, student: str) -> Path:
        return self.root / "outcomes" / assignment / f"{student}.json"

    def outcome(self, assignment: str, student: str) -> Outcome | None:
        try:
            return Outcome(**json.loads(self.outcome_path(assignment, student).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def keep_outcome(self, assignment: str, outcome: Outcome) -> None:
        path = self.outcome_path(assignment, outcome.student)
        write_text(path, json.dumps(asdict(outcome), indent=2) + "\n")

    def digest(self, assignment: str, student: str) -> str:
        """Changes when the submission, the master or the secret does."""
        total = hashlib.sha256(self.secret.encode())
        source = self.root / "source" / assignment
        for folder in (self.submitted(assignment, student), source):
            for file in sorted(folder.rglob("*")):
                if file.is_symlink() or not file.is_file():
                    continue
                total.update(str(file.relative_to(folder)).encode())
                with file.open("rb") as stream:
                    total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()

    def changed(self, assignment: str, student: str) -> bool:
        """Whether a submission was never graded, or is another one now."""
        before = self.outcome(assignment, student)
        return before is None or before.digest != self.digest(assignment, student)

    def status(self) -> list[dict[str, Any]]:
        """One row for each assignment: submitted, graded, changed since, flagged, failed, ..."""
        rows = []
        for name in self.assignments():
            submitted = self.submissions(name)
            graded = [o for s in submitted if (o := self.outcome(name, s)) is not None]
            with self.gradebook() as book:
                manual = [s.needs_manual_grade for s in book.assignment_submissions(name)]
            rows.append(
                {
                    "assignment": name,
                    "submitted": len(submitted),
                    "graded": len(graded),
                    "changed": sum(self.changed(name, o.student) for o in graded),
                    "flagged": sorted(o.student for o in graded if o.status == "flagged"),
                    "failed": sorted(o.student for o in graded if o.status == "failed"),
                    "to grade by hand": sum(map(bool, manual)),
                }
            )
        return rows

    # After grading

    def feedback(self, assignment: str, release: bool = False) -> list[Path]:
        """Write HTML pages without hidden tests and mark schemes; returns their paths.

        Work that was not graded gets a page that says why. ``release`` puts the pages into the
        exchange, where nbgrader gives each student their own.
        """
        self.check_released(assignment)
        made, problems = [], []
        for student in self.submissions(assignment):
            outcome = self.outcome(assignment, student)
            target = self.path(self.coursedir.feedback_directory, student, assignment)
            if outcome and outcome.status == "failed":
                names = list(self.sources(assignment))
                why, given = "; ".join(outcome.flags), self.submitted(assignment, student)
                made += not_graded_pages(target, names, why, outcome.notes, given)
                continue
            graded = self.path(self.coursedir.autograded_directory, student, assignment)
            if not graded.is_dir():
                continue
            coursedir = self.one_student(assignment, student)
            writer = Feedback(coursedir=coursedir, config=self.config, force=True)
            writer.notes = outcome.notes if outcome else []
            writer.log.setLevel(logging.CRITICAL)
            try:
                writer.start()
            except NbGraderException as error:
                problems.append(f"cannot write the feedback of {student}: {error}")
                continue
            made += sorted(target.glob("*.html"))
        if problems:  # the pages of the others are there
            raise UserError("; ".join(problems))
        if not made:
            raise UserError(
                f"no graded submission of {assignment}; first: cpugrpo assign autograde"
            )
        if release:
            self.release_feedback(assignment, {page.parent for page in made})
        return made

    def release_feedback(self, assignment: str, folders: set[Path]) -> None:
        """For those who handed in through the exchange: a download has no secret."""
        without = {f.parent.name for f in folders if not (f / "submission_secret.txt").is_file()}
        if len(without) == len(folders):
            raise UserError(
                f"no submission of {assignment} came through the exchange, so nobody could fetch "
                f"the feedback there; hand out {self.coursedir.feedback_directory}/"
            )
        self.coursedir.student_id_exclude = ",".join(sorted(without))
        done = self.api.release_feedback(assignment)
        check_done(done, "cannot put the feedback into the exchange")

    def export(
        self, platform: str, to: Path, assignments: list[str] | None = None
    ) -> tuple[int, list[str]]:
        """Write scores as CSV for ``canvas`` or ``moodle``, or ``plain``.

        Returns the number of rows, and as "STUDENT ASSIGNMENT" what is not graded.
        """
        if platform not in HEADS:
            raise UserError(f"--for is {platform!r}; allowed are canvas, moodle and plain")
        for name in assignments or []:
            self.check_released(name)
        chosen = assignments or self.assignments()
        self.enter_roster()
        with self.gradebook() as book:
            handed_in = [s for name in chosen for s in book.assignment_submissions(name)]
            students = sorted({*self.roster(), *(s.student_id for s in handed_in)})
            writer = PlatformExport(
                platform=platform, to=str(to), student=students, assignment=chosen
            )
            writer.export(book)
            waiting = [f"{s.student_id} {s.assignment.name}" for s in handed_in if not_graded(s)]
        return len(students), sorted(waiting)


def check_done(done: dict[str, Any], problem: str) -> None:
    """Raise the last line of nbgrader's log as a ``UserError`` if it did not succeed."""
    if not done["success"]:
        log = str(done.get("log") or done.get("error") or "").strip().splitlines()
        raise UserError(f"{problem}: {log[-1] if log else 'no reason given'}")
