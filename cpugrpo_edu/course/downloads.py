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
    notebook: str
    file: Path
    own_folder: bool


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


def find_downloads(folder: Path, notebooks: list[str], roster: Roster) -> list[Download]:
    """All downloads of an assignment's ``notebooks`` in a folder.

    Accepts ``STUDENT/NOTEBOOK.ipynb`` (the folder may go on after ``_``, as Moodle's do) and
    ``STUDENT_..._NOTEBOOK.ipynb`` (the names that Canvas and nbgrader's zip collector give).
    Other folders may lie in between: the outermost name that the roster knows counts. Raises
    ``UserError`` on a file that cannot be assigned, on two for one student, and on none at all.
    """
    found: dict[tuple[str, str], Download] = {}
    strange = []
    for file in sorted(folder.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in file.parts or file.is_symlink():
            continue
        *folders, _ = file.relative_to(folder).parts
        stem = re.sub(r"-\d+$", "", file.stem)  # Canvas adds -1 to a second submission
        ending = [name for name in notebooks if stem.endswith(name)]
        notebook = max(ending, key=len, default="")
        known = [label for label in (*folders, stem) if student_of(label, roster) in roster]
        unknown = [name for name in reversed(folders) if name not in notebooks]
        label = [*known, *unknown, stem][0]
        student = student_of(label, roster)
        if not notebook or label == notebook or not ID.fullmatch(student):
            strange.append(str(file.relative_to(folder)))
            continue
        if other := found.get((student, notebook)):
            raise UserError(
                f"both {other.file.relative_to(folder)} and {file.relative_to(folder)} would be "
                f"{notebook} of {student}; keep one, or enter both students in roster.csv"
            )
        found[student, notebook] = Download(student, notebook, file, label in folders)
    if strange or not found:
        names = ", ".join(strange[:5])
        what = f"no student could be found for {names}" if strange else "it is empty"
        first = notebooks[0]
        raise UserError(
            f"{folder.name}: {what}; name the files STUDENT/{first}.ipynb or STUDENT_{first}.ipynb"
        )
    return list(found.values())


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
