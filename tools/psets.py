"""Problem sets: student versions, zoo of answers, leaks, honest oddities, hostile answers.

    python tools/psets.py                 # all five, for every problem set
    python tools/psets.py zoo ps1         # only the zoo of one

A master is ``notebooks/psets/psN/psN.ipynb``; ``tests/psets/zoo/psN/NAME.py`` holds right and
wrong answers to its solution cell ``psN-NAME``, each under a line

    # %% right: how it differs
    # %% wrong: what students get wrong -> NAME-hidden, ...

with the test cells that a wrong answer must fail. Student versions are written to build/.
"""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from rich.console import Console
from rich.table import Table

from cpugrpo_edu.course import student_seeds
from cpugrpo_edu.course.feedback import SHORTEST, normalise, regions, squeeze

ROOT = Path(__file__).resolve().parent.parent
MASTERS = ROOT / "notebooks" / "psets"
ZOO = ROOT / "tests" / "psets" / "zoo"
BUILD = ROOT / "build" / "psets"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-s"]
SECRETS = ("SOLUTION", "HIDDEN TESTS", "MARK SCHEME")


def problem_sets() -> list[str]:
    return sorted(path.parent.name for path in MASTERS.glob("ps*/ps*.ipynb"))


def read_master(name: str) -> Any:
    return nbformat.read(MASTERS / name / f"{name}.ipynb", as_version=4)


def meta(cell: Any) -> dict[str, Any]:
    return dict(cell.metadata.get("nbgrader", {}))


# --- the zoo ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One answer to the solution cell ``cell``; ``fails`` is empty for a right one."""

    pset: str
    cell: str
    label: str
    fails: tuple[str, ...]
    source: str


def zoo(pset: str) -> list[Answer]:
    """All answers to a problem set in the zoo."""
    answers = []
    for path in sorted((ZOO / pset).glob("*.py")):
        for part in re.split(r"^# %% ", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
            head, source = part.split("\n", 1)
            kind, _, label = head.partition(": ")
            label, _, cells = label.partition(" -> ")
            fails = tuple(f"{pset}-{cell.strip()}" for cell in cells.split(",") if cell.strip())
            if kind not in ("right", "wrong") or (kind == "wrong") != bool(fails):
                raise ValueError(f"{path}: cannot read {head!r}")
            answers.append(Answer(pset, f"{pset}-{path.stem}", label, fails, source))
    return answers


def grade(nb: Any, replace: dict[str, str] | None = None) -> dict[str, str | None]:
    """Execute the cells in one plain namespace; test cell id to None (passed) or its error."""
    space: dict[str, Any] = {"__name__": "__main__"}
    results: dict[str, str | None] = {}
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        about = meta(cell)
        name = about.get("grade_id", "cell")
        source = (replace or {}).get(name, cell.source)
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(source, name, "exec"), space)
            error = None
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        if about.get("grade") or (error and not replace):
            results[name] = error
    return results


@contextlib.contextmanager
def student(name: str) -> Iterator[None]:
    """Let hidden tests draw the data of this student of an invented course."""
    before, student_seeds._key = (
        student_seeds._key,
        bytes.fromhex(student_seeds.student_key("zoo", name)),
    )
    try:
        yield
    finally:
        student_seeds._key = before


def points(nb: Any) -> dict[str, int]:
    return {m["grade_id"]: m["points"] for m in map(meta, nb.cells) if m.get("points")}


def run_zoo(pset: str, console: Console) -> list[str]:
    """Grade every answer and print the kill table; returns what went wrong, one line each."""
    nb, problems = read_master(pset), []
    worth = points(nb)
    table = Table(title=f"{pset}: answers of the zoo and the points they lost")
    for heading in ("cell", "answer", "must fail", "lost", "verdict"):
        table.add_column(heading, justify="right" if heading == "lost" else "left")
    with student("ada"):
        if broken := {cell: error for cell, error in grade(nb).items() if error}:
            problems.append(f"{pset}: the master fails its own tests: {broken}")
        for answer in zoo(pset):
            failed = {c for c, error in grade(nb, {answer.cell: answer.source}).items() if error}
            if answer.fails:
                good = set(answer.fails) <= failed
                verdict = "killed" if good else "SURVIVED"
            else:
                good = not failed
                verdict = "full marks" if good else "LOST POINTS"
            if not good:
                problems.append(f"{answer.cell}, {answer.label}: failed {sorted(failed)}")
            short = ", ".join(cell.removeprefix(f"{pset}-") for cell in answer.fails)
            lost = str(sum(worth[cell] for cell in failed))
            row = (answer.cell.removeprefix(f"{pset}-"), answer.label, short, lost, verdict)
            table.add_row(*row, style=None if good else "bold red")
    console.print(table)
    return problems


# --- leaks ------------------------------------------------------------------------------------


def secret_lines(nb: Any) -> set[str]:
    """Normalised lines that only the solutions, hidden tests and mark schemes hold."""
    secret: set[str] = set()
    public: set[str] = set()
    for cell in nb.cells:
        outside, inside = regions(cell.source, SECRETS)
        public.update(normalise(line) for line in outside)
        secret.update(normalise(line) for line in inside)
    return {line for line in secret - public if len(line) >= SHORTEST}


def without_html(text: str) -> str:
    return html.unescape(re.sub(r"<[^<>]*>", "", text)) if "</" in text else text


def leaks(secrets: set[str], texts: dict[str, str]) -> list[str]:
    """``place: line`` for every secret line that a text contains."""
    found = []
    for place, text in texts.items():
        # both as it is and as HTML, since code with "<" in it looks like a tag
        flat = {squeeze(text), squeeze(without_html(text))}
        found += [f"{place}: {s}" for s in sorted(secrets) if any(s in f for f in flat)]
    return found


def ordinary_lines() -> set[str]:
    """Lines of the published package and chapters: what is taught there is no secret."""
    lines: set[str] = set()
    for path in (ROOT / "cpugrpo_edu").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").split("\n"):
            lines |= {normalise(line), normalise(line.split("  # ")[0])}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            lines.update(normalise(line) for line in cell.source.split("\n"))
    return lines


def texts_of(folder: Path, *patterns: str) -> dict[str, str]:
    """Relative path to text of the files in a folder."""
    return {
        str(path.relative_to(folder.parent)): path.read_text(encoding="utf-8", errors="replace")
        for pattern in patterns
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


def notebook_text(path: Path) -> str:
    """Everything a notebook shows or holds, as text: sources, outputs, metadata."""
    nb = nbformat.read(path, as_version=4)
    parts = [str(nb.metadata)]
    for cell in nb.cells:
        parts += [cell.source, str(cell.metadata), str(cell.get("attachments", ""))]
        for output in cell.get("outputs", []):
            parts += ["".join(output.get("text", "")), "\n".join(output.get("traceback", []))]
            parts += [str(value) for value in output.get("data", {}).values()]
    return "\n".join(parts)


# --- nbgrader ---------------------------------------------------------------------------------

CONFIG = """c = get_config()
c.CourseDirectory.course_id = "zoo"
c.CourseDirectory.source_directory = {masters!r}
c.CourseDirectory.db_url = "sqlite:///gradebook.db"
c.ExecutePreprocessor.timeout = 120
c.GenerateFeedback.preprocessors = [
    "cpugrpo_edu.course.feedback.HideAnswers",
    "nbgrader.preprocessors.GetGrades",
    "nbconvert.preprocessors.CSSHTMLHeaderPreprocessor",
]
"""


def nbgrader(course: Path, *arguments: str) -> None:
    """Run nbgrader in the course folder; its log is shown if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments],
        cwd=course,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CPUGRPO_COURSE_SECRET": "zoo"}
        | {"CPUGRPO_STUDENT_ID": "ada", "PYTHONPATH": str(ROOT)}
        # nbgrader calls alembic by name
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    if done.returncode:
        raise RuntimeError(f"nbgrader {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")


def new_course(course: Path) -> Path:
    """An empty course folder whose sources are the masters."""
    shutil.rmtree(course, ignore_errors=True)
    course.mkdir(parents=True)
    config = CONFIG.format(masters=str(MASTERS))
    (course / "nbgrader_config.py").write_text(config, encoding="utf-8")
    return course


def generate(psets: list[str], course: Path = BUILD) -> Path:
    """Write every student version to ``course``/release/psN/psN.ipynb."""
    new_course(course)
    for pset in psets:
        nbgrader(course, "generate_assignment", pset, "--create", "--force")
    return course


def submit(course: Path, pset: str, who: str, replace: dict[str, str]) -> None:
    """Hand in the student version with these solution cells."""
    nb = nbformat.read(course / "release" / pset / f"{pset}.ipynb", as_version=4)
    for cell in nb.cells:
        cell.source = replace.get(meta(cell).get("grade_id", ""), cell.source)
    target = course / "submitted" / who / pset
    target.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, target / f"{pset}.ipynb")


def solutions(nb: Any) -> dict[str, str]:
    return {meta(c)["grade_id"]: c.source for c in nb.cells if meta(c).get("solution")}


def spy(pset: str) -> dict[str, str]:
    """Wrong answers whose code prints the source of the test cell that calls them."""
    lookup = (
        "import inspect as _i, linecache as _l\n"
        "def {name}(*args, **kwargs):\n"
        "    for f in _i.stack():\n"
        "        print(''.join(_l.getlines(f.filename)))\n"
        "    raise ValueError(''.join(_l.getlines(_i.stack()[1].filename)))\n"
    )
    answers = {}
    for cell, source in solutions(read_master(pset)).items():
        names = re.findall(r"^def (\w+)", source, flags=re.M)
        answers[cell] = "\n".join(lookup.format(name=name) for name in names)
    return answers


def grade_with_nbgrader(pset: str, course: Path) -> dict[str, float]:
    """Autograde a right, an empty and a spying submission; returns their points by tests."""
    from nbgrader.api import Gradebook

    submit(course, pset, "right", solutions(read_master(pset)))
    submit(course, pset, "empty", {})
    submit(course, pset, "spy", spy(pset))
    nbgrader(course, "autograde", pset, "--create", "--force")
    nbgrader(course, "generate_feedback", pset, "--force")
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        return {
            who: float(sum(g.auto_score or 0 for n in s.notebooks for g in n.grades))
            for who in ("right", "empty", "spy")
            for s in [book.find_submission(pset, who)]
        }


def wheel_texts(folder: Path) -> dict[str, str]:
    """Build the wheel and read the text files in it."""
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "source"
    source.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE-CODE", "LICENSE-PROSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    # The masters are copied as well: the build itself must leave them out of the wheel.
    for name in ("cpugrpo_edu", "notebooks/psets", "tests/psets"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    build = "import setuptools.build_meta as b; print(b.build_wheel('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {
            f"wheel/{name}": archive.read(name).decode("utf-8", errors="replace")
            for name in archive.namelist()
            if not name.endswith((".safetensors", ".png"))
        }


def book_texts() -> dict[str, str]:
    """The sources of the book, and the built book if there is one."""
    texts = texts_of(ROOT / "book", "*.md")
    texts |= {
        f"notebooks/{path.name}": notebook_text(path)
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    }
    built = ROOT / "_build" / "html"
    return texts | (texts_of(built, "*.html", "*.ipynb", "*.js") if built.exists() else {})


def find_leaks(psets: list[str], course: Path) -> list[str]:
    """Look for secret lines in student versions, feedback, book and wheel."""
    secrets: set[str] = set()
    for pset in psets:
        secrets |= secret_lines(read_master(pset))
    # A line that the package teaches (such as `k3 = d.exp() - d - 1`) is no leak there.
    own = secrets - ordinary_lines()
    found = leaks(own, book_texts() | wheel_texts(course.parent / "wheel"))
    for pset in psets:
        lines = secret_lines(read_master(pset))
        student_nb = course / "release" / pset / f"{pset}.ipynb"
        texts = {f"release/{pset}": notebook_text(student_nb)}
        # Not "right": that page shows the student's own answer, which here is the model answer.
        for who in ("empty", "spy"):
            texts |= texts_of(course / "feedback" / who / pset, "*.html")
        found += leaks(lines, texts)
        hidden = {s for s in lines if s not in _solution_lines(pset)}
        found += leaks(hidden, texts_of(course / "feedback" / "right" / pset, "*.html"))
    return found


def _solution_lines(pset: str) -> set[str]:
    cells = read_master(pset).cells
    return {normalise(line) for c in cells for line in regions(c.source, ("SOLUTION",))[1]}


def main(arguments: list[str]) -> int:
    console = Console(width=120)
    known = ("generate", "zoo", "leaks", "honest", "hostile")
    what = [a for a in arguments if a in known] or list(known)
    psets = [a for a in arguments if a in problem_sets()] or problem_sets()
    if unknown := set(arguments) - set(what) - set(psets):
        console.print(f"unknown: {sorted(unknown)}; allowed are {', '.join(known)}, psN")
        return 2
    problems: list[str] = []
    course = BUILD
    if "generate" in what or "leaks" in what:
        generate(psets, course)
        console.print(f"student versions: {course.relative_to(ROOT) / 'release'}")
    if "zoo" in what:
        began = time.perf_counter()
        for pset in psets:
            problems += run_zoo(pset, console)
        count = sum(len(zoo(pset)) for pset in psets)
        console.print(f"{count} answers graded in {time.perf_counter() - began:.0f} s")
    if "leaks" in what:
        for pset in psets:
            scores = grade_with_nbgrader(pset, course)
            most = sum(w for c, w in points(read_master(pset)).items() if _is_test(pset, c))
            console.print(f"{pset} by nbgrader, of {most} points: {scores}")
            if scores != {"right": most, "empty": 0, "spy": 0}:
                problems.append(f"{pset}: nbgrader gave {scores}, of {most} points")
        found = find_leaks(psets, course)
        console.print(f"leak count: {len(found)}")
        problems += found
    for name in ("honest", "hostile"):
        test = [*PYTEST, f"tests/test_{name}.py"]
        if name in what and subprocess.run(test, cwd=ROOT).returncode:
            problems.append(f"{name} set: see the failed tests above")
    for problem in problems:
        console.print(problem, style="red", markup=False)
    return bool(problems)


def _is_test(pset: str, cell: str) -> bool:
    cells = {m["grade_id"]: m for m in map(meta, read_master(pset).cells) if m.get("grade_id")}
    return bool(cells[cell].get("grade"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
