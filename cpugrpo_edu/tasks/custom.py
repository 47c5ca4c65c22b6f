"""Your own prompts, judged by your own verifier."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import cpugrpo_edu.tasks as tasks
from cpugrpo_edu.answers import exact_match, normalize_answer
from cpugrpo_edu.tasks.gsm8k import check_prose, read_jsonl
from cpugrpo_edu.types import DIFFICULTIES, Difficulty, Problem, StepReport, UserError

Verifier = Callable[[Problem, str], Any]
"""``verify(problem, completion)`` returns a bool, or a grade from 0 to 1."""


@dataclass
class Custom:
    """The domain of problems judged by ``verifier``; whatever that raises is a `UserError`."""

    verifier: Verifier = exact_match
    name: str = "custom"

    def generate(self, difficulty: Difficulty, rng: Any) -> Problem:
        raise UserError(f"{self.name} problems are not generated; load them from a file instead")

    def grade(self, problem: Problem, completion: str) -> float:
        """The verifier's verdict in [0, 1]; the reward `correct_answer` is this number."""
        name = getattr(self.verifier, "__name__", type(self.verifier).__name__)
        try:
            verdict = self.verifier(problem, completion)
        except Exception as error:
            raise UserError(
                f"verifier {name} failed on problem {problem.id!r} with "
                f"{type(error).__name__}: {error}; mend the verifier"
            ) from error
        if not isinstance(verdict, Real) or not 0 <= float(verdict) <= 1:  # False for NaN too
            raise UserError(
                f"verifier {name} returned {verdict!r:.80} for problem {problem.id!r}; "
                "return True, False or a number from 0 to 1"
            )
        return float(verdict)

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether the verifier gave the full grade, 1."""
        return self.grade(problem, completion) == 1

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        return check_prose(problem, completion)


def load_custom(prompts_file: str | Path, verifier: str | Verifier | None = None) -> list[Problem]:
    """Read prompts from a JSONL file and register the ``custom`` domain with its verifier.

    A line is ``{"prompt": ..., "answer": ..., "difficulty": ..., "id": ...}``; "question"
    may stand for "prompt", and only that is required. Without a verifier every line needs
    an answer, which is matched exactly. **A verifier given as "path/to/file.py:function"
    executes that file in this process**, with all your rights: name only files you trust.
    Raises `UserError` naming the line or the verifier at fault.
    """
    judge = load_verifier(verifier) if isinstance(verifier, str) else verifier or exact_match
    if not callable(judge):
        raise UserError(f"verifier {judge!r} is not callable; give a function or file.py:function")
    path = Path(prompts_file)
    problems: dict[str, Problem] = {}
    for number, row in read_jsonl(path):
        problem = _problem(row, number, f"line {number} of {path}")
        if problem.id in problems:
            raise UserError(
                f"line {number} of {path} repeats the id {problem.id!r}; make it unique"
            )
        if judge is exact_match and not normalize_answer(problem.answer):
            raise UserError(
                f"line {number} of {path} has no answer to compare with (or too long a one); "
                "add a short one, or give a verifier"
            )
        problems[problem.id] = problem
    if not problems:
        raise UserError(
            f'no prompts in {path}; write one object a line, such as {{"prompt": "..."}}'
        )
    tasks.register(Custom(judge))
    return list(problems.values())


def load_verifier(spec: str) -> Verifier:
    """Import ``function`` from ``path/to/file.py:function``. This executes the file."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not name:
        raise UserError(f"cannot read the verifier {spec!r}; write it as path/to/file.py:function")
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"no Python file {path} for the verifier {spec!r}; check the path")
    module_name = f"cpugrpo_verifier_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None and module_spec.loader is not None  # true of every .py file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses in the file look themselves up there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"{path} cannot be imported: {type(error).__name__}: {error}; mend the file"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{path} has no function {name!r}; define it there or correct the name")
    return function


def _problem(row: dict[str, Any], number: int, where: str) -> Problem:
    values = {
        "question": row.get("prompt", row.get("question")),
        "answer": row.get("answer", ""),
        "difficulty": row.get("difficulty", "basic"),
        "id": row.get("id", f"custom/{number}"),
    }
    for key, value in values.items():
        if not isinstance(value, str):
            raise UserError(f"{where} has {value!r} for {key!r}; give text or a number")
    if not values["question"].strip():
        raise UserError(f'{where} has an empty prompt; write it under "prompt" or "question"')
    if values["difficulty"] not in DIFFICULTIES:
        raise UserError(
            f"{where} has the difficulty {values['difficulty']!r}; "
            f"allowed are {', '.join(DIFFICULTIES)}"
        )
    return Problem(domain="custom", **values)
