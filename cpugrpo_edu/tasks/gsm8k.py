"""Grade-school word problems in the format of GSM8K (Cobbe et al. 2021, arXiv:2110.14168).

A row is ``{"question": ..., "answer": "3 bags hold 3*4=<<3*4=12>>12 apples.\\n#### 12"}``.
The data set is not part of the package: give `load_gsm8k` a local copy or a hub id.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from cpugrpo_edu.data import (
    ANSWER_MARK,
    Problem,
    Step,
    StepReport,
)
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks.answers import ExactMatch, extract_answer, parse_number
from cpugrpo_edu.tasks.equations import step_score

MAX_WORKING_CHARS = 10_000
"""Working is read only up to here, which bounds the cost of checking it."""

MAX_SIDE_CHARS = 60
"""The longest side of an equation that is read."""

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # a calculator annotation, as in 3*4=<<3*4=12>>12
_PLAIN = r"(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)"
_TERM = rf"[($-]*{_PLAIN}\)*"
_NUMBER = re.compile(_PLAIN, re.ASCII)
_LEFT = re.compile(rf"{_TERM}(?: *[-+*/x] *{_TERM})+ *$", re.ASCII)
_RIGHT = re.compile(rf" *(-? *\$? *{_PLAIN}(?:/\d+)?)", re.ASCII)


@dataclass
class GSM8K(ExactMatch):
    """Problems from a file in GSM8K's format."""

    name: str = "gsm8k"

    def generate(self, difficulty: str, rng: Any) -> Problem:
        raise UserError(f"{self.name} problems are not generated; load them from a file instead")

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        return check_prose(problem, completion)


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


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each non-empty line; numbers are kept as text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; give a UTF-8 JSONL file") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_int=str, parse_float=str)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"line {number} of {path} is not JSON ({error}); write one object per line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {path} is not an object; write {{...}} on each line")
        yield number, row


def check_prose(problem: Problem, completion: str) -> StepReport:
    """Check the equations in running text, such as ``so 3 * 4 = 12 apples``.

    A step is valid if it is exactly true. It is useful if in addition its operands are known
    (from the question, the worked solution's givens, or an earlier useful step) and its
    result is wanted. The wanted results are those of the worked solution; without one, they are
    the results that a numeric reference answer depends on, and then every equation counts as
    required. Each result counts once, so repeating a true equation, or adding ``1 + 1 = 2``,
    earns nothing. With neither a worked solution nor a numeric answer, the score is 0.
    """
    reference = _equations(problem.solution)
    found = _equations(completion)
    known = _numbers(problem.question)
    if reference:
        wanted = Counter(e.result for e in reference)
        known |= set().union(*(e.operands for e in reference)) - set(wanted)
    else:
        wanted = _trace_back(found, parse_number(problem.answer))
    useful = 0
    for equation in found:
        if equation.true and equation.operands <= known and wanted[equation.result] > 0:
            wanted[equation.result] -= 1
            known.add(abs(equation.result))
            useful += 1
    steps = tuple(Step(equation.text, equation.true) for equation in found)
    required = len(reference or found)
    invalid = sum(not step.valid for step in steps)
    return StepReport(steps, required, step_score(useful, invalid, required))


@dataclass(frozen=True)
class _Equation:
    text: str
    operands: frozenset[Fraction]
    result: Fraction
    true: bool


def _equations(text: str) -> list[_Equation]:
    """Find ``expression = number`` in the working before the first answer mark."""
    working = text.split(ANSWER_MARK, 1)[0][:MAX_WORKING_CHARS]
    working = _ANNOTATION.sub("", working).replace("×", "*").replace("÷", "/").replace("−", "-")
    found = []
    for line in working.splitlines():
        for before, after in pairwise(line.split("=")):
            left = _LEFT.search(before[-MAX_SIDE_CHARS:])
            right = _RIGHT.match(after[:MAX_SIDE_CHARS])
            if not left or not right:
                continue
            expression = left[0].strip()
            if expression.count("(") != expression.count(")"):  # as in "(so 3 + 4 = 7)"
                expression = expression.strip("()")
            result = _evaluate(right[1])
            if result is not None:
                text = f"{expression} = {right[1].strip()}"
                true = _evaluate(expression) == result
                found.append(_Equation(text, frozenset(_numbers(expression)), result, true))
    return found


def _trace_back(equations: list[_Equation], answer: Fraction | None) -> Counter[Fraction]:
    """The results that the answer depends on, each once, found by following operands back."""
    wanted: Counter[Fraction] = Counter()
    open_values = set() if answer is None else {answer}
    for equation in reversed(equations):
        reached = open_values & {equation.result, abs(equation.result)}
        if equation.true and reached:
            open_values = (open_values - reached) | equation.operands
            wanted[equation.result] = 1
    return wanted


def _numbers(text: str) -> set[Fraction]:
    """The magnitudes of all numbers in a text."""
    return {Fraction(n.replace(",", "")) for n in _NUMBER.findall(text) if len(n) < MAX_SIDE_CHARS}


def _evaluate(expression: str) -> Fraction | None:
    """The exact value of ``+ - * /`` and brackets; None for anything else or a zero divisor."""
    plain = expression.replace(",", "").replace("$", "").replace("x", "*").strip()
    try:
        return _value(ast.parse(plain, mode="eval").body, plain)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr, source: str) -> Fraction:
    if isinstance(node, ast.Constant):  # from its text: 0.1 is 1/10, never the float
        return Fraction(ast.get_source_segment(source, node) or "")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, source)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, source), _value(node.right, source)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise ValueError(f"not arithmetic: {source}")


def _rows(source: str | Path, split: str) -> Iterable[tuple[int, dict[str, Any]]]:
    path = Path(source)
    if path.is_dir():
        return _rows_of_folder(path, split)
    if path.exists() or path.suffix in (".jsonl", ".json", ".parquet"):
        return _rows_of_file(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
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
    if file.suffix != ".parquet":
        return read_jsonl(file)
    import pyarrow.parquet

    try:
        return enumerate(pyarrow.parquet.read_table(file).to_pylist(), start=1)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"cannot read {file}: {error}; give a Parquet file") from error


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
    solution = _ANNOTATION.sub("", row["answer"]).strip()
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
