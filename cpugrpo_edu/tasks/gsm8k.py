"""Grade-school word problems in the format of GSM8K (Cobbe et al. 2021, arXiv:2110.14168).

A row is ``{"question": ..., "answer": "3 bags hold 3*4=<<3*4=12>>12 apples.\\n#### 12"}``.
The data set is not part of the package: give `load_gsm8k` a local copy or a hub id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cpugrpo_edu.data import ANSWER_MARK, Problem, StepReport
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks.answers import ExactMatch, extract_answer
from cpugrpo_edu.tasks.prose import ANNOTATION, check_prose
from cpugrpo_edu.tasks.rows import HUB_ID, read_rows


@dataclass(frozen=True)
class GSM8K(ExactMatch):
    """Problems from a file in GSM8K's format."""

    name: str = "gsm8k"

    def generate(self, difficulty: str, rng: Any) -> Problem:
        raise UserError(f"{self.name} problems are not generated; load them from a file instead")

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        return check_prose(problem, completion, self.answer_format)


def load_gsm8k(source: str | Path, split: str = "test", limit: int | None = None) -> list[Problem]:
    """Read the first ``limit`` problems of a split, in order.

    ``source`` is a JSONL or Parquet file, a folder with ``<split>.jsonl`` or the hub's
    ``main/<split>-00000-of-00001.parquet``, or a hub id such as ``openai/gsm8k``, which is
    downloaded. The number of lines in the worked solution decides the difficulty: up to 2 is basic,
    3 or 4 intermediate, 5 or more advanced. Raises `UserError`, which names the faulty row.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} is not allowed; give 1 or more, or none for all problems")
    rows = islice(_rows(source, split), limit)
    problems = [_problem(row, f"row {i} of {source}", f"gsm8k/{split}/{i}") for i, row in rows]
    if not problems:
        raise UserError(f"no problems in {source}; give a file with one problem per line")
    return problems


def is_gsm8k(source: str | Path) -> bool:
    """Whether the first row of the source is in this format; of a hub id its name decides."""
    if not Path(source).exists():
        return "gsm8k" in str(source).lower()
    try:
        _, row = next(iter(_rows(source, "train")), (0, {}))
    except UserError:
        return False
    return "question" in row and ANSWER_MARK in str(row.get("answer"))


def _rows(source: str | Path, split: str) -> Iterable[tuple[int, dict[str, Any]]]:
    path = Path(source)
    if path.is_dir():
        return _rows_of_folder(path, split)
    if path.exists() or path.suffix in (".jsonl", ".json", ".parquet"):
        return _rows_of_file(path)
    if re.fullmatch(HUB_ID, str(source)):
        return enumerate(_download(str(source), split), start=1)
    raise UserError(
        f"{source} is not a file or folder; give a JSONL file, a folder, or a hub id such as "
        "openai/gsm8k"
    )


def _rows_of_folder(folder: Path, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    files = [
        file
        for place in (folder, folder / "main")
        for pattern in (f"{split}.jsonl", f"{split}-*.parquet", f"{split}.parquet")
        for file in sorted(place.glob(pattern))
    ]
    if not files:
        raise UserError(
            f"{folder} holds no split {split!r}; put {split}.jsonl or main/{split}-*.parquet there"
        )
    number = 0
    for file in files:
        for _, row in _rows_of_file(file):
            number += 1
            yield number, row


def _rows_of_file(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    return ((row.number, row.texts) for row in read_rows(file))


def _download(name: str, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(name, "main", split=split)
    except Exception as error:  # the hub client raises many unrelated exceptions
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"could not load {name} (split {split!r}) from the hub: {type(error).__name__}: "
            f"{reason}; check the name and the connection and try again, or give a local copy"
        ) from error


def _problem(row: dict[str, Any], where: str, identity: str) -> Problem:
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where} has no text under {key!r}; every row needs it")
    solution = ANNOTATION.sub("", row["answer"]).strip()
    answer = extract_answer(solution)
    if answer is None:
        raise UserError(
            f"{where} does not state one answer after {ANSWER_MARK}; "
            f"end its solution with a line such as '{ANSWER_MARK} 12'"
        )
    lines = sum(bool(line.strip()) for line in solution.split(ANSWER_MARK)[0].splitlines())
    difficulty = "basic" if lines <= 2 else "intermediate" if lines <= 4 else "advanced"
    question = row["question"].strip()
    return Problem(identity, "gsm8k", difficulty, question, answer, solution, GSM8K())
