"""A concept inventory before and after the course: the form, its answers, and item analysis.

The bank (``notebooks/instructor/concept_inventory.json``) names a misconception for each wrong
choice. Students get it without the key; their answers stay in files of their own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import write_text
from cpugrpo_edu.record.stats import Interval

LETTERS = "abcdef"
PHASES = ("pre", "post")
CODE = re.compile(r"[a-z0-9]{4,12}")

Right = NDArray[np.bool_]
"""Whether each answer is right, students x items."""


@dataclass(frozen=True)
class Item:
    """One question; ``misconceptions`` has a name for each wrong choice and None for the right one.

    In a student version ``misconceptions`` and ``topic`` are empty, since they give answers away.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    misconceptions: tuple[str | None, ...] = ()
    topic: str = ""

    @property
    def key(self) -> str:
        """Letter of the right choice."""
        return LETTERS[self.misconceptions.index(None)]


@dataclass(frozen=True)
class Bank:
    name: str
    version: int
    items: tuple[Item, ...]
    misconceptions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Claim and chapter of each misconception by its name; empty in a student version."""


@dataclass(frozen=True)
class Sheet:
    """One student's letters by item, in one phase; a question left out has no letter."""

    code: str
    phase: str
    answers: Mapping[str, str]
    inventory: str
    version: int
    simulated: bool = False


def read_bank(path: Path) -> Bank:
    """Read a bank, with its key or without. Raises ``UserError`` if it is broken."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        items = tuple(
            Item(
                each["id"],
                each["question"],
                tuple(choice["text"] for choice in each["choices"]),
                tuple(choice.get("misconception") for choice in each["choices"])
                if stored.get("misconceptions")
                else (),
                each.get("topic", ""),
            )
            for each in stored["items"]
        )
        bank = Bank(stored["name"], stored["version"], items, stored.get("misconceptions", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"cannot read the inventory {path}: {problem!r}") from problem
    ids = Counter(item.id for item in items)
    for item in items:
        wrong = [name for name in item.misconceptions if name is not None]
        if ids[item.id] > 1 or not 2 <= len(item.choices) <= len(LETTERS):
            raise UserError(
                f"{path}: item {item.id!r} is there twice, or has not 2 to {len(LETTERS)} choices"
            )
        if item.misconceptions and len(wrong) != len(item.choices) - 1:
            raise UserError(f"{path}: item {item.id!r} needs exactly one right choice")
        if unknown := set(wrong) - set(bank.misconceptions):
            names = ", ".join(sorted(unknown))
            raise UserError(f"{path}: item {item.id!r} names unknown misconceptions: {names}")
    return bank


def write_student_version(bank: Bank, folder: Path) -> list[Path]:
    """Write the questions without the key, and a notebook with the form; returns both paths."""
    import nbformat

    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / "concepts.json"
    plain = {
        "name": bank.name,
        "version": bank.version,
        "items": [
            {"id": i.id, "question": i.question, "choices": [{"text": c} for c in i.choices]}
            for i in bank.items
        ],
    }
    write_text(questions, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    # ids instead of random ones: the same file every time
    text = nbformat.v4.new_markdown_cell(PAGE.format(count=len(bank.items)), id="cell-0")
    code = 'from cpugrpo_edu.course.inventory import form\n\nform("concepts.json")'
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    page = nbformat.v4.new_notebook(
        cells=[text, nbformat.v4.new_code_cell(code, id="cell-1")], metadata={"kernelspec": kernel}
    )
    notebook = folder / "concepts.ipynb"
    write_text(notebook, nbformat.writes(page) + "\n")
    return [notebook, questions]


PAGE = """# What do you think?

{count} questions, about 30 minutes, once before the course and once after it. It is not graded.
Please answer without help and without looking anything up. If you do not know, leave the question
out: that says more than a guess.

**Anonymous.** Choose a code that you will remember at the end of the course and that nobody can
connect with you, such as the third letter of your street, the day your mother was born and the last
letter of your first school. Your answers are written under that code to a file beside this
notebook, and nowhere else.

Run the cell below."""


def form(path: str | Path, folder: str | Path = ".") -> Any:
    """A widget with the questions, and a button that saves the answers in ``folder``."""
    import ipywidgets as widgets

    bank = read_bank(Path(path))
    wide = widgets.Layout(width="auto")
    code = widgets.Text(description="Code", placeholder="4 to 12 letters and digits")
    phase = widgets.ToggleButtons(
        options=[("before the course", "pre"), ("after the course", "post")], description="When"
    )
    parts: list[Any] = [code, phase]
    chosen: dict[str, Any] = {}
    for number, item in enumerate(bank.items, 1):
        options = [("no answer", "")]
        options += [(f"{letter}) {text}", letter) for letter, text in zip(LETTERS, item.choices)]
        chosen[item.id] = widgets.RadioButtons(options=options, value="", layout=wide)
        text = widgets.HTMLMath(f"<b>{number}. {item.question}</b>")
        parts += [text, chosen[item.id]]
    save = widgets.Button(description="Save", button_style="primary")
    said = widgets.HTML()

    def saved(_: Any) -> None:
        answers = {name: each.value for name, each in chosen.items() if each.value}
        sheet = Sheet(code.value.strip().lower(), phase.value, answers, bank.name, bank.version)
        try:
            to = write_sheet(sheet, Path(folder))
        except UserError as problem:
            said.value = f"Not saved: {problem}"
            return
        said.value = f"Saved {len(answers)} of {len(chosen)} answers in {to}"

    save.on_click(saved)
    return widgets.VBox([*parts, widgets.HBox([save, said])])


def write_sheet(sheet: Sheet, folder: Path) -> Path:
    """Write ``concepts_PHASE_CODE.json``. Raises ``UserError`` if the code is not allowed."""
    if not CODE.fullmatch(sheet.code):
        raise UserError(f"the code is {sheet.code!r}; give 4 to 12 letters a to z and digits")
    path = folder / f"concepts_{sheet.phase}_{sheet.code}.json"
    write_text(path, json.dumps(asdict(sheet), indent=1) + "\n")
    return path


def read_sheets(folder: Path, bank: Bank) -> list[Sheet]:
    """All sheets in a folder and below.

    Raises ``UserError`` on a file that is no sheet of this bank, on two with the same code and
    phase, and if there is none.
    """
    sheets: dict[tuple[str, str], Path] = {}
    found = []
    for path in sorted(folder.rglob("concepts_*.json")):
        try:
            sheet = Sheet(**json.loads(path.read_text(encoding="utf-8")))
            sheet = Sheet(**{**asdict(sheet), "answers": dict(sheet.answers)})
        except (ValueError, TypeError) as problem:
            raise UserError(f"{path} is no answer sheet ({problem}); move it away") from problem
        about = (sheet.code, sheet.phase)
        if (sheet.inventory, sheet.version) != (bank.name, bank.version):
            raise UserError(f"{path} answers another inventory than {bank.name} {bank.version}")
        letters = {item.id: LETTERS[: len(item.choices)] for item in bank.items}
        fits = all(len(a) == 1 and a in letters.get(i, "") for i, a in sheet.answers.items())
        if sheet.phase not in PHASES or not CODE.fullmatch(sheet.code) or not fits:
            raise UserError(f"{path} has an unknown phase, code, item or choice; move it away")
        if about in sheets:
            raise UserError(f"{path} and {sheets[about]} have the same code; keep one of them")
        sheets[about] = path
        found.append(sheet)
    if not found:
        raise UserError(f"{folder} has no answer sheet (concepts_pre_CODE.json)")
    return found


def write_csv(sheets: Sequence[Sheet], bank: Bank, path: Path) -> None:
    """Write one row for each sheet: code, phase, simulated or not, and a letter for each item."""
    rows = [["code", "phase", "simulated", *(item.id for item in bank.items)]]
    for s in sheets:
        letters = [s.answers.get(item.id, "") for item in bank.items]
        rows.append([s.code, s.phase, str(int(s.simulated)), *letters])
    write_text(path, "".join(",".join(row) + "\n" for row in rows))


# Analysis


def matched(sheets: Sequence[Sheet], bank: Bank) -> tuple[Right, Right]:
    """Right answers before and after, of the students who handed in both sheets.

    Raises ``UserError`` on fewer than 2 of them.
    """
    by_code = {(s.code, s.phase): s for s in sheets}
    codes = sorted({c for c, _ in by_code if all((c, phase) in by_code for phase in PHASES)})
    if len(codes) < 2:
        raise UserError(f"{len(codes)} students handed in before and after; 2 are needed")
    pre, post = (
        np.array([marks(by_code[code, phase], bank) for code in codes]) for phase in PHASES
    )
    return pre, post


def marks(sheet: Sheet, bank: Bank) -> list[bool]:
    """Whether each item was answered right; a question left out was not."""
    return [sheet.answers.get(item.id) == item.key for item in bank.items]


def normalised_gain(pre: Right, post: Right) -> float:
    """(post - pre) / (1 - pre) of the class means (Hake 1998); nan if all were right before."""
    before, after = float(pre.mean()), float(post.mean())
    return (after - before) / (1 - before) if before < 1 else float("nan")


def difficulty(right: Right) -> NDArray[np.float64]:
    """Share of right answers for each item: the classical index, large for an easy item."""
    return right.mean(axis=0)


def discrimination(right: Right) -> NDArray[np.float64]:
    """Correlation of each item with the score on the others; nan where nothing varies."""
    total = right.sum(axis=1)
    found = []
    for index in range(right.shape[1]):
        item, rest = right[:, index].astype(float), (total - right[:, index]).astype(float)
        varies = item.std() > 0 and rest.std() > 0
        found.append(float(np.corrcoef(item, rest)[0, 1]) if varies else float("nan"))
    return np.array(found)


def kr20(right: Right) -> float:
    """Reliability by formula 20 of Kuder and Richardson (1937): Cronbach's alpha of right or wrong.

    nan for a single item, or if all students have the same score.
    """
    items = right.shape[1]
    spread = float(right.sum(axis=1).var())
    if items < 2 or spread == 0:
        return float("nan")
    p = right.mean(axis=0)
    return items / (items - 1) * (1 - float((p * (1 - p)).sum()) / spread)


def interval(
    statistic: Callable[..., float],
    *samples: Right,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over students, who are rows of every sample and are drawn together."""
    rng, students = np.random.default_rng(seed), len(samples[0])
    resampled = (rng.integers(students, size=students) for _ in range(resamples))
    drawn = [statistic(*(sample[rows] for sample in samples)) for rows in resampled]
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Interval(statistic(*samples), float(low), float(high))


def misconceptions(sheets: Sequence[Sheet], bank: Bank, phase: str) -> dict[str, float]:
    """How often each misconception was chosen where it was offered, most frequent first."""
    taken: Counter[str] = Counter()
    offered: Counter[str] = Counter()
    for sheet in sheets:
        if sheet.phase != phase:
            continue
        for item in bank.items:
            offered.update(name for name in item.misconceptions if name)
            letter = sheet.answers.get(item.id)
            name = item.misconceptions[LETTERS.index(letter)] if letter else None
            taken.update([name] if name else [])
    shares = {name: taken[name] / count for name, count in offered.items()}
    return dict(sorted(shares.items(), key=lambda each: -each[1]))


# Simulated classes, to try the analysis on


def simulate(
    bank: Bank, probabilities: Mapping[str, NDArray[np.float64]], seed: int = 0
) -> list[Sheet]:
    """Sheets of a simulated class, marked as such.

    ``probabilities`` has the probability of a right answer for each phase, students x items; a
    wrong answer is drawn uniformly from the other choices.
    """
    rng = np.random.default_rng(seed)
    sheets = []
    for phase, chances in probabilities.items():
        for student, row in enumerate(chances):
            answers = {}
            for item, chance in zip(bank.items, row, strict=True):
                wrong = [x for x in LETTERS[: len(item.choices)] if x != item.key]
                answers[item.id] = item.key if rng.random() < chance else str(rng.choice(wrong))
            code = f"sim{student:04d}"
            sheets.append(Sheet(code, phase, answers, bank.name, bank.version, simulated=True))
    return sheets


def simulated_chances(
    students: int, items: int, gain: float, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Probabilities for :func:`simulate` whose expected normalised gain is exactly ``gain``.

    Before the course, by an item response model with guessing: p = 1/4 + 3/4 sigmoid(ability -
    difficulty), both normal. After it, every p has become p + gain (1 - p).
    """
    rng = np.random.default_rng(seed)
    ability = rng.normal(0, 1.2, (students, 1))
    hard = rng.normal(0.8, 0.8, (1, items))
    pre = 0.25 + 0.75 / (1 + np.exp(hard - ability))
    return {"pre": pre, "post": pre + gain * (1 - pre)}
