"""Your own prompts, judged by your own verifier."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from cpugrpo_edu.data import DIFFICULTIES, Problem, StepReport
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks.answers import ExactMatch, exact_match, normalize_answer
from cpugrpo_edu.tasks.gsm8k import read_jsonl
from cpugrpo_edu.tasks.prose import check_prose
from cpugrpo_edu.tasks.time_limit import TookTooLong, limited

Verifier = Callable[[Problem, str], Any]
"""``verify(problem, completion)`` returns a bool, or a grade from 0 to 1."""

TIME_LIMIT = 10.0
"""Seconds that a call of the verifier may take; importing its file may take six times as long."""

MAX_PROMPT_CHARS = 100_000


@dataclass(frozen=True)
class Custom(ExactMatch):
    """Problems judged by ``verifier``, whatever it raises becomes a `UserError`; without one, by
    exact comparison."""

    verifier: Verifier | None = None
    name: str = "custom"

    def generate(self, difficulty: str, rng: Any) -> Problem:
        raise UserError(f"{self.name} problems are not generated; load them from a file instead")

    def grade(self, problem: Problem, completion: str) -> float:
        """The verifier's verdict in [0, 1]; the reward `correct_answer` is this number."""
        if self.verifier is None:
            return float(exact_match(problem, completion, self.answer_format))
        name = getattr(self.verifier, "__name__", type(self.verifier).__name__)
        try:
            verdict = limited(self.verifier, problem, completion, seconds=TIME_LIMIT)
        except TookTooLong:
            raise UserError(
                f"verifier {name} took longer than {TIME_LIMIT:g} s for problem {problem.id!r}; "
                "fix the verifier"
            ) from None
        except (Exception, SystemExit) as error:
            raise UserError(
                f"verifier {name} failed on problem {problem.id!r} with "
                f"{type(error).__name__}: {error}; fix the verifier"
            ) from error
        ok = isinstance(verdict, Real) and 0 <= verdict <= 1  # type: ignore[operator]
        if not ok:  # also true for NaN
            raise UserError(
                f"verifier {name} returned {verdict!r:.80} for problem {problem.id!r}; "
                "return True, False or a number from 0 to 1"
            )
        return float(verdict)

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether the verifier gave the full grade, 1."""
        return self.grade(problem, completion) == 1

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        return check_prose(problem, completion, self.answer_format)


def load_custom(prompts_file: str | Path, verifier: str | Verifier | None = None) -> list[Problem]:
    """Read prompts from a JSONL file; each problem carries the verifier that judges it.

    A line is ``{"prompt": ..., "answer": ..., "difficulty": ..., "id": ...}``; it may have
    "question" instead of "prompt", and only this is required. Without a verifier, every line needs
    an answer, which must match exactly. **A verifier given as "path/to/file.py:function"
    executes that file in this process** with your permissions: use only files that you trust.
    Raises `UserError`, which names the faulty line or verifier.
    """
    judge = load_verifier(verifier) if isinstance(verifier, str) else verifier
    if judge is not None and not callable(judge):
        raise UserError(f"verifier {judge!r} is not callable; give a function or file.py:function")
    task = Custom(judge)
    path = Path(prompts_file)
    problems: dict[str, Problem] = {}
    for number, row in read_jsonl(path):
        problem = _problem(row, number, f"line {number} of {path}", task)
        if problem.id in problems:
            raise UserError(
                f"line {number} of {path} repeats the id {problem.id!r}; make it unique"
            )
        if judge is None and not normalize_answer(problem.answer):
            raise UserError(
                f"line {number} of {path} has no answer to compare with, or one that is too long; "
                "add a short answer, or give a verifier"
            )
        problems[problem.id] = problem
    if not problems:
        raise UserError(
            f'no prompts in {path}; write one object per line, such as {{"prompt": "..."}}'
        )
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
        limited(module_spec.loader.exec_module, module, seconds=6 * TIME_LIMIT)
    except TookTooLong:
        raise UserError(
            f"importing {path} did not finish within {6 * TIME_LIMIT:g} s; fix the file"
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{path} cannot be imported: {type(error).__name__}: {error}; fix the file"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{path} has no function {name!r}; define it there or correct the name")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise UserError(
            f"{name} in {path} must take two arguments, problem and completion ({error}); fix it"
        ) from error
    except ValueError:  # a builtin without a signature
        pass
    return function


def _problem(row: dict[str, Any], number: int, where: str, task: Custom) -> Problem:
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
    if len(values["question"]) > MAX_PROMPT_CHARS:
        raise UserError(f"{where} has a prompt longer than {MAX_PROMPT_CHARS} characters; cut it")
    for key, value in values.items():
        if "\0" in value or (
            not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value)
        ):
            raise UserError(f"{where} has a NUL or a lone surrogate under {key!r}; delete it")
    if values["difficulty"] not in DIFFICULTIES:
        raise UserError(
            f"{where} has the difficulty {values['difficulty']!r}; "
            f"allowed are {', '.join(DIFFICULTIES)}"
        )
    return Problem(domain="custom", task=task, **values)
