"""Submissions as Canvas or Moodle let an instructor download them: a folder, or a zip of one.

nbgrader's own ``zip_collect`` is not used here: it unpacks without a bound on the size, loses the
time at which a file was packed (by which late penalties go), and needs the student's id in each
file name, where these platforms give a name or a number of their own.
"""

from __future__ import annotations

import os
import re
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cpugrpo_edu.course.repair import asked_for, notebook_of, plain_stem
from cpugrpo_edu.errors import UserError

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")

Roster = Mapping[str, Mapping[str, str]]
"""The rows of roster.csv by student id."""

LARGEST = 2**30
"""Bytes that one zip may unpack to."""


@dataclass(frozen=True)
class Download:
    """One downloaded notebook; with ``own_folder``, the folder around it is the student's too."""

    student: str
    file: Path
    own_folder: bool
    notebook: str

    @property
    def name(self) -> str:
        """Its name in a submission: without the student's, and without Canvas's -1 for a second."""
        stem = self.file.stem
        if self.own_folder or self.notebook.casefold() not in stem.casefold():
            return self.file.name
        start = stem.casefold().rindex(self.notebook.casefold())
        return re.sub(r"-\d+$", "", stem[start:]) + ".ipynb"


def unzip(path: Path, folder: Path, nested: int = 2) -> None:
    """Unpack, and ``nested`` levels of zips inside, which is how deep Canvas and Moodle go."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > LARGEST:
                raise UserError(f"{path} unpacks to more than {LARGEST} bytes; split it")
            for member in members:
                packed = time.mktime((*member.date_time, 0, 0, -1))
                os.utime(archive.extract(member, folder), (packed, packed))
    except (zipfile.BadZipFile, RuntimeError) as error:  # the latter: a password
        raise UserError(
            f"{path} cannot be read as a zip file; give a folder or a .zip without a password"
        ) from error
    for inner in sorted(folder.rglob("*.zip")):
        if not nested:
            raise UserError(f"{inner.name} is a zip in a zip in a zip; unpack it by hand")
        unzip(inner, inner.with_suffix(""), nested - 1)


def not_collected(folder: str, names: list[str]) -> list[str]:
    """For ``shutil.copytree``: other notebooks, hidden files and links of a student's folder."""
    return [
        name
        for name in names
        if name.startswith((".", "__"))
        or name.endswith(".ipynb")
        or Path(folder, name).is_symlink()
    ]


def find_downloads(
    folder: Path, notebooks: list[str], roster: Roster
) -> tuple[list[Download], list[str]]:
    """All downloads of an assignment's ``notebooks`` in a folder, and what is held back, and why.

    Accepts ``STUDENT/NOTEBOOK.ipynb`` (the folder may go on after ``_``, as Moodle's do) and
    ``STUDENT_..._NOTEBOOK.ipynb`` (the names that Canvas and nbgrader's zip collector give).
    Other folders may lie in between: the outermost name that the roster knows counts. A notebook
    of another name counts where its student is known; grading finds out which one it is. Held
    back are files without a student and two for one student. Raises ``UserError`` if that is all.
    """
    found: dict[tuple[str, str], list[Download]] = {}
    held = []
    for file in sorted(folder.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in file.parts or file.is_symlink():
            continue
        *folders, _ = file.relative_to(folder).parts
        notebook = asked_for(file.stem, notebooks)
        known = [label for label in (*folders, file.stem) if student_of(label, roster) in roster]
        unknown = [name for name in reversed(folders) if name not in notebooks]
        label = [*known, *unknown, file.stem][0]
        student = student_of(label, roster)
        nobody = not (notebook or label in folders or student in roster)
        if nobody or plain_stem(label) == notebook.casefold() or not ID.fullmatch(student):
            held.append(f"{file.relative_to(folder)}: its student is not known")
            continue
        each = Download(student, file, label in folders, notebook)
        found.setdefault((student, notebook_of(file.stem, notebooks)), []).append(each)
    taken = []
    for (student, _), files in found.items():
        nearest = min(len(each.file.parts) for each in files)
        files = [each for each in files if len(each.file.parts) == nearest]
        places = {each.file.parent if each.own_folder else each.file for each in files}
        if len(places) > 1 and len({each.file.read_bytes() for each in files}) > 1:
            both = " and ".join(str(each.file.relative_to(folder)) for each in files)
            held.append(
                f"{both} would both be of {student}: keep one, or enter both students in roster.csv"
            )
        else:
            taken += files
    if not taken:
        first = notebooks[0]
        raise UserError(
            f"{folder.name}: {'; '.join(held[:5]) or 'it is empty'}; name the files "
            f"STUDENT/{first}.ipynb or STUDENT_{first}.ipynb"
        )
    return taken, held


def student_of(label: str, roster: Roster) -> str:
    """The student that a file or folder name begins with: by id, by number, or by name.

    Canvas begins with the name in one word and has the user's number further on; Moodle begins
    with first and last name. Without a match in the roster, the part before the first ``_``.
    """
    ids = [student for student in roster if label == student or label.startswith(f"{student}_")]
    if ids:
        return max(ids, key=len)
    start, *rest = label.split("_")
    numbers = [s for s, row in roster.items() if (row.get("lms_user_id") or "-") in rest]
    if len(numbers) == 1:
        return numbers[0]

    def letters(*names: str | None) -> str:
        return re.sub(r"\W", "", "".join(name or "" for name in names)).casefold()

    named = []
    for student, row in roster.items():
        first, last = row.get("first_name"), row.get("last_name")
        if (first or last) and letters(start) in (letters(first, last), letters(last, first)):
            named.append(student)
    return named[0] if len(named) == 1 else start
