"""Your own prompts, judged by your own verifier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpugrpo_edu.data import DIFFICULTIES, Problem, StepReport
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks.answers import ExactMatch, exact_match, extract_answer, normalize_answer
from cpugrpo_edu.tasks.prose import check_prose
from cpugrpo_edu.tasks.quantities import read_quantity
from cpugrpo_edu.tasks.rows import Row, read_rows
from cpugrpo_edu.tasks.statements import explicit
from cpugrpo_edu.tasks.time_limit import TookTooLong, limited
from cpugrpo_edu.tasks.verifiers import Verifier, adapted, as_grade, load_verifier, name_of

TIME_LIMIT = 10.0
"""Seconds that a call of the verifier may take."""

MAX_PROMPT_CHARS = 100_000

PROMPT_COLUMNS = ("prompt", "question", "instruction", "problem", "messages")
ANSWER_COLUMNS = ("answer", "ground_truth", "reward_model.ground_truth", "output", "solution")
"""Where the prompt and the reference are looked for, in this order, unless a column is named."""

NONSENSE = "I do not know."
"""Every verifier must be able to judge it."""


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
        name = name_of(self.verifier)
        try:
            verdict = limited(self.verifier, problem, completion, seconds=TIME_LIMIT)
        except UserError:
            raise
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
        grade = as_grade(verdict)
        if grade is None:
            raise UserError(
                f"verifier {name} returned {verdict!r:.80} for problem {problem.id!r}; "
                "return True, False or a number from 0 to 1, or None for no verdict, which counts "
                "as 0"
            )
        return grade

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether the verifier gave the full grade, 1."""
        return self.grade(problem, completion) == 1

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        return check_prose(problem, completion, self.answer_format)


@dataclass(frozen=True)
class CustomProblem(Problem):
    """A problem of the user's data. ``columns`` is its row, every column of which can be read as
    ``problem.name`` or ``problem["name"]``; ``messages`` its conversation, where it is one."""

    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    messages: list[dict[str, str]] = field(default_factory=list, repr=False, compare=False)

    def __getattr__(self, name: str) -> Any:
        columns = self.__dict__.get("columns", {})
        if name in columns:
            return columns[name]
        raise AttributeError(f"no column {name!r} in the data, which have {', '.join(columns)}")

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]


def load_custom(
    source: str | Path,
    verifier: str | Verifier | None = None,
    *,
    split: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
) -> list[Problem]:
    """Read prompts from a file, or a split of a folder; each problem has the verifier that judges
    it.

    A row is ``{"prompt": ..., "answer": ..., "difficulty": ..., "id": ...}``; only the prompt is
    required, a text or chat messages. Other columns can be named, those of `PROMPT_COLUMNS` and
    `ANSWER_COLUMNS` are found, and all reach the verifier. Without a verifier, every row needs an
    answer, which must match exactly. **A verifier given as "path/to/file.py:function" executes that
    file in this process** with your permissions: use only files that you trust. Raises
    `UserError`, which names the faulty row or verifier.
    """
    judge = load_verifier(verifier) if isinstance(verifier, str) else verifier
    if judge is not None and not callable(judge):
        raise UserError(f"verifier {judge!r} is not callable; give a function or file.py:function")
    if judge is not None and not isinstance(verifier, str):
        judge = adapted(judge, f"verifier {name_of(judge)}")
    task = Custom(judge)
    problems: dict[str, Problem] = {}
    ids = f"custom/{split}" if split else "custom"
    for row in read_rows(source, split):
        problem = _problem(row, ids, task, prompt_column, answer_column)
        if problem.id in problems:
            raise UserError(f"{row.where} repeats the id {problem.id!r}; make it unique")
        if judge is None and not normalize_answer(problem.answer):
            raise UserError(
                f"{row.where} has no answer to compare with, or one that is too long; its keys are "
                f"{', '.join(row.values)}: name that of a short answer with --answer-column, or "
                "give a verifier"
            )
        problems[problem.id] = problem
    if not problems:
        raise UserError(
            f'no prompts in {source}; write one object per line, such as {{"prompt": "..."}}'
        )
    return list(problems.values())


def try_verifier(problems: Iterable[Problem]) -> None:
    """Let the verifier judge two texts on the first problem. UserError for one that fails, or whose
    verdict is no grade: better now than after an evaluation."""
    problem = next(iter(problems))
    for text in (problem.answer or "1", NONSENSE):
        problem.grade(text)


def _problem(
    row: Row, ids: str, task: Custom, prompt: str | None, answer: str | None
) -> CustomProblem:
    key, asked = _column(row, PROMPT_COLUMNS if prompt is None else (prompt,), "prompt")
    messages, said = _conversation(asked, row.where, key) if isinstance(asked, list) else ([], "")
    asked = messages[-1]["content"] if messages else asked
    if key == "instruction" and isinstance(more := row.texts.get("input"), str) and more.strip():
        asked = f"{asked}\n\n{more}"
    wanted = ANSWER_COLUMNS if answer is None else (answer,)
    _, reference = _column(row, wanted, "answer", said if answer is None else None)
    values = {
        key: asked,
        "answer": reference,
        "difficulty": row.texts.get("difficulty", "basic"),
        "id": row.texts.get("id", f"{ids}/{row.number}"),
    }
    _check(values, key, row.where)
    short = _short(reference)
    return CustomProblem(
        values["id"],
        "custom",
        values["difficulty"],
        asked,
        short,
        "" if short == reference else reference,
        task,
        columns=row.values,
        messages=messages,
    )


def _column(
    row: Row, names: tuple[str, ...], what: str, default: str | None = None
) -> tuple[str, Any]:
    """Name and value of the first of these columns that the row has; a dot goes into an object."""
    for name in names:
        value: Any = row.texts
        for part in [name] if name in row.texts else name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return name, value
    if default is None and what == "answer" and len(names) > 1:
        default = ""
    if default is None:
        raise UserError(
            f"{row.where} has nothing under {' or '.join(map(repr, names))}; its keys are "
            f"{', '.join(map(repr, row.values)) or 'none'}: name the right one with "
            f"--{what}-column"
        )
    return names[0], default


def _conversation(messages: list[Any], where: str, key: str) -> tuple[list[dict[str, str]], str]:
    """The chat messages up to the last question, and what the assistant says after it."""
    for message in messages:
        parts = message if isinstance(message, dict) else {}
        if not all(isinstance(parts.get(name), str) for name in ("role", "content")):
            raise UserError(
                f"{where} has {message!r:.80} among the messages of {key!r}; give objects with "
                'a text under "role" and under "content"'
            )
    turns = [{"role": m["role"], "content": m["content"]} for m in messages]
    said = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else ""
    if not turns or turns[-1]["role"] != "user":
        raise UserError(f"{where} has no question of a user at the end of {key!r}; add one")
    return turns, said


def _check(values: dict[str, Any], prompt: str, where: str) -> None:
    """UserError for a value that is no usable text."""
    for key, value in values.items():
        if not isinstance(value, str):
            raise UserError(f"{where} has {value!r} for {key!r}; give text or a number")
    if not values[prompt].strip():
        raise UserError(f"{where} has an empty prompt under {prompt!r}; write one")
    if len(values[prompt]) > MAX_PROMPT_CHARS:
        raise UserError(f"{where} has a prompt longer than {MAX_PROMPT_CHARS} characters; cut it")
    for key, value in values.items():
        if "\0" in value or (
            not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value)
        ):
            raise UserError(f"{where} has a NUL or a lone surrogate under {key!r}; delete it")
    if values["difficulty"] not in DIFFICULTIES:
        raise UserError(
            f"{where} has the difficulty {values['difficulty']!r}; allowed are "
            f"{', '.join(DIFFICULTIES)}: write one of them, or rename the "
            "column, then all problems are basic"
        )


def _short(reference: str) -> str:
    r"""The answer in a reference that states it: after ####, in \boxed{} or <answer>, or after the
    last = of a calculation. Any other reference is the answer itself."""
    if read_quantity(reference) is not None:
        return reference
    if not (explicit(reference) or "=" in reference):
        return reference.strip().strip("$") if reference.count("$") == 2 else reference
    return extract_answer(reference, "auto") or reference
