"""Mend what editors, browsers and copied cells do to a notebook, before it is graded.

:func:`find_notebooks` tells which files are the notebooks that an assignment asks for,
:func:`read_notebook` mends the file and its format, and :func:`place_cells` finds the cells that
are graded. Each adds a sentence to ``notes`` for what it mended, which the student reads too.
Nothing here changes an answer, and the tests themselves come from the gradebook.
"""

from __future__ import annotations

import codecs
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from cpugrpo_edu.course.checks import names_of, nbgrader_of
from cpugrpo_edu.course.feedback import regions, squeeze

COPY = re.compile(r"[\s_-]*(\(\d+\)|-\s?copy\s?\d*|\bcopy( \d+)?|[-_]\d+)$", re.IGNORECASE)
"""What browsers, Jupyter and file managers add to the name of a second copy."""

LARGEST = 20_000_000
"""Bytes of the largest notebook that is graded."""

SCHEMA = 3
"""Version of nbgrader's cell metadata, ``nbgrader.nbgraderformat.MetadataValidator``."""


class Unreadable(Exception):
    """Work that cannot be graded as it is; the message is one clause, without a full stop."""


# Which files


def plain_stem(stem: str) -> str:
    """The name of a notebook without the marks of a copy and in small letters."""
    while shorter := COPY.sub("", stem):
        if shorter == stem:
            break
        stem = shorter
    return stem.removeprefix("Copy of ").casefold()


def asked_for(stem: str, names: list[str]) -> str:
    """The name of the notebook that a file is by its own name, or nothing."""
    exact = [name for name in names if stem == name]
    alike = [name for name in names if plain_stem(stem).endswith(name.casefold())]
    return max(exact or alike, key=len, default="")


def notebook_of(stem: str, names: list[str]) -> str:
    """As :func:`asked_for`; where one notebook is asked for, any file is that one."""
    return asked_for(stem, names) or (names[0] if len(names) == 1 else "")


def find_notebooks(folder: Path, names: list[str], notes: list[str]) -> dict[str, Path]:
    """The file of each of ``names`` in a submission; missing are those not handed in.

    The exact name counts first, then the name of a copy, then the only notebook there is. Raises
    ``Unreadable`` if that leaves a choice between different files.
    """
    files = [path for path in sorted(folder.glob("*.ipynb")) if not path.is_symlink()]
    found: dict[str, Path] = {}
    for name in names:
        choice = [path for path in files if path.stem == name]
        choice = choice or [path for path in files if asked_for(path.stem, names) == name]
        choice = choice or (files if len(names) == 1 else [])
        if len(choice) > 1 and len({path.read_bytes() for path in choice}) > 1:
            given = ", ".join(path.name for path in choice)
            raise Unreadable(f"{given} are different, and none is called {name}.ipynb")
        if choice:
            found[name] = choice[0]
            if choice[0].stem != name:
                notes.append(f"'{choice[0].name}' was graded as {name}.ipynb")
    if not found:
        raise Unreadable(f"there is no notebook {' or '.join(f'{n}.ipynb' for n in names)}")
    left = [path for path in files if path not in found.values()]
    if aside := [path.name for path in left if asked_for(path.stem, names)]:
        notes.append(f"not graded, since there is the notebook itself: {', '.join(aside)}")
    return found


# The file and its format


def read_notebook(path: Path, notes: list[str]) -> NotebookNode:
    """The cells of a notebook in a valid form, without outputs. Raises ``Unreadable``."""
    if (size := path.stat().st_size) > LARGEST:
        raise Unreadable(f"{path.name} has {size} bytes; allowed are {LARGEST}")
    given = as_json(path.name, path.read_bytes(), notes)
    if "worksheets" in given or given.get("nbformat") == 3:
        notes.append("converted from version 3 of the notebook format")
        given = nbformat.reads(json.dumps({"nbformat": 3, "nbformat_minor": 0} | given), 4)
    cells = given.get("cells")
    if not isinstance(cells, list):
        raise Unreadable(f"{path.name} is no notebook: it has no list of cells")
    if reason := invalid(given):
        notes.append(f"the notebook format was mended ({reason})")
    taken: set[str] = set()
    made = [new_cell(cell, taken) for cell in cells if isinstance(cell, dict)]
    return nbformat.v4.new_notebook(cells=made)


def as_json(name: str, raw: bytes, notes: list[str]) -> dict[str, Any]:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        encoding = "utf-8-sig"
    if encoding == "utf-16" or raw.startswith(codecs.BOM_UTF8):
        notes.append("the file began with a byte-order mark")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
        notes.append("the file was not in UTF-8 and was read as Windows-1252")
    try:
        given = json.loads(text, strict=False)
    except (ValueError, RecursionError) as problem:
        reason = "it is empty" if not text.strip() else str(problem)
        raise Unreadable(f"{name} is no valid notebook: {reason[:120]}") from problem
    if not isinstance(given, dict):
        raise Unreadable(f"{name} is no valid notebook: it holds no cells")
    return given


def invalid(given: dict[str, Any]) -> str:
    """What is against the notebook format, in a few words, or nothing."""
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            nbformat.validate(json.loads(json.dumps(given)), version=4)
    except Exception as problem:  # whatever it is, the notebook is made anew
        return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:120]
    return str(heard[0].message).split(".")[0].split(",")[0][:120] if heard else ""


def new_cell(cell: dict[str, Any], taken: set[str]) -> NotebookNode:
    """A valid cell with the source, attachments and nbgrader's metadata of the given one."""
    kind = cell.get("cell_type")
    kind = kind if kind in ("code", "raw") else "markdown"
    source = cell.get("source") or ""
    source = "".join(map(str, source)) if isinstance(source, list) else str(source)
    made = getattr(nbformat.v4, f"new_{kind}_cell")(source)
    given = str(cell.get("id", ""))
    if re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", given) and given not in taken:
        made.id = given
    taken.add(made.id)
    about = cell.get("metadata")
    mine = about.get("nbgrader") if isinstance(about, dict) else None
    if isinstance(mine, dict) and isinstance(mine.get("grade_id"), str):
        made.metadata["nbgrader"] = {"grade_id": mine["grade_id"]}
    pictures = cell.get("attachments")
    if kind != "code" and isinstance(pictures, dict):
        made.attachments = {k: v for k, v in pictures.items() if isinstance(v, dict)}
    return made


# The graded cells


@dataclass(frozen=True)
class Source:
    """A cell of the released notebook; ``points`` is None if it is not graded."""

    name: str
    cell_type: str
    source: str
    locked: bool
    solution: bool
    points: float | None
    task: bool = False

    @property
    def fixed(self) -> bool:
        """Whether the released text counts, whatever a submission has in its place."""
        return not self.solution

    @property
    def released(self) -> str:
        return "\n".join(regions(self.source)[0])

    def metadata(self) -> dict[str, Any]:
        found = {
            "grade_id": self.name,
            "grade": self.points is not None and not self.task,
            "solution": self.solution,
            "locked": self.locked,
            "task": self.task,
            "schema_version": SCHEMA,
        }
        return found if self.points is None else found | {"points": self.points}

    def new(self) -> NotebookNode:
        cell = getattr(nbformat.v4, f"new_{self.cell_type}_cell")(self.source)
        cell.metadata["nbgrader"] = self.metadata()
        return cell


def place_cells(
    cells: list[NotebookNode], sources: list[Source], public: set[str], notes: list[str]
) -> list[NotebookNode]:
    """The cells with each of ``sources`` exactly once, and nbgrader's metadata as released.

    ``public`` has the squeezed texts of the released notebook. A cell that lost its label is
    recognised by its text, by what it defines or, a written answer, by its place. Of several
    copies a test keeps the first behind the cell before it, and an answer the last; a deleted
    test is put back behind the cell that it followed.
    """
    cells = list(cells)
    labels = [nbgrader_of(cell).get("grade_id") for cell in cells]
    for cell in cells:
        cell.metadata.pop("nbgrader", None)
    free = {id(cell) for cell, label in zip(cells, labels) if label is None}
    copies: dict[str, list[NotebookNode]] = {}
    lost = []
    for source in sources:
        same = [cell for cell, label in zip(cells, labels) if label == source.name]
        same = [c for c in same if not source.fixed or c.cell_type == source.cell_type]
        copies[source.name] = same or recognised(cells, source, sources, copies, free, public)
        if not same and copies[source.name]:
            lost.append(source.name)
        free -= {id(cell) for cell in copies[source.name]}
    if lost:
        notes.append(f"labels were lost, and these cells were found by text: {', '.join(lost)}")
    place = 0
    for source in sources:
        place = put(cells, copies[source.name], source, place, notes)
    return cells


def recognised(
    cells: list[NotebookNode],
    source: Source,
    sources: list[Source],
    copies: dict[str, list[NotebookNode]],
    free: set[int],
    public: set[str],
) -> list[NotebookNode]:
    """Cells without a label that stand for ``source``; usually one or none."""
    unlabelled = [c for c in cells if id(c) in free and c.cell_type == source.cell_type]
    same = [cell for cell in unlabelled if squeeze(cell.source) == squeeze(source.released)]
    if same or source.fixed:
        return same
    if source.cell_type == "code":
        wanted = set(names_of(source.source))
        return [cell for cell in unlabelled if wanted & set(names_of(cell.source))]
    # a written answer: what is new between the graded cells around it
    where = {id(cell): index for index, cell in enumerate(cells)}
    before = [where[id(cell)] for found in copies.values() for cell in found]
    later = sources[sources.index(source) + 1 :]
    texts = {squeeze(each.released) for each in later}
    after = [i for i, cell in enumerate(cells) if squeeze(cell.source) in texts]
    first, last = max(before, default=-1), min(after, default=len(cells))
    return [
        cell
        for cell in unlabelled
        if first < where[id(cell)] < last and squeeze(cell.source) not in public
    ]


def put(
    cells: list[NotebookNode],
    same: list[NotebookNode],
    source: Source,
    place: int,
    notes: list[str],
) -> int:
    """Label one of the cells that stand for ``source``; returns the place behind it."""
    where = [index for index, cell in enumerate(cells) if any(cell is each for each in same)]
    if not where:
        if source.fixed or source.points is not None:
            cells.insert(place, source.new())
            notes.append(f"deleted and put back: {source.name}")
            return place + 1
        return place
    if source.fixed:
        chosen = next((index for index in where if index >= place), where[-1])
    else:
        answered = [i for i in where if cells[i].source.strip()]
        chosen = (answered or where)[-1]
    cell = cells[chosen]
    if len(where) > 1:
        notes.append(f"{source.name} was there {len(where)} times")
    if source.fixed:
        cell.source = source.source
    elif len(where) > 1 and source.cell_type == "markdown":
        parts = dict.fromkeys(cells[index].source for index in where)  # a person reads them all
        cell.source = "\n\n".join(parts)
    cell.metadata["nbgrader"] = source.metadata()
    if cell.cell_type != source.cell_type:
        notes.append(f"{source.name} was no {source.cell_type} cell any more and is one again")
        cells[chosen] = source.new()
        cells[chosen].source = cell.source
    return chosen + 1
