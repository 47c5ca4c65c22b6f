"""Read the stated answer from a completion and compare it exactly with the reference.

A verifiable reward is only as good as its parser: the policy will find whatever the parser
lets through. Three rules prevent this. An answer counts only where the completion states it, in
a form that `statements` lists: by default after the mark ``####`` (the format of GSM8K: Cobbe et
al. 2021, arXiv:2110.14168). Two different stated answers count as none, so hedging never pays.
Numbers are compared as exact fractions, never as floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cpugrpo_edu.data import ANSWER_MARK, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks import symbolic
from cpugrpo_edu.tasks.quantities import MAX_NUMBER_CHARS, parse_number, read_quantity
from cpugrpo_edu.tasks.spelling import MAX_ANSWER_CHARS, plain_text
from cpugrpo_edu.tasks.statements import ANSWER_FORMATS, MAX_STATEMENTS, statements

__all__ = [
    "MAX_ANSWER_CHARS",
    "MAX_NUMBER_CHARS",
    "ExactMatch",
    "answers_match",
    "exact_match",
    "extract_answer",
    "normalize_answer",
    "parse_number",
    "well_formed",
    "with_answer_format",
]


def extract_answer(completion: str, answer_format: str = "hash") -> str | None:
    """Return the answer a completion states: in the format ``hash``, the line after ``####``.

    Repeating the same answer (18, then 18.0) is allowed, and the last one is returned. None if
    there is no stated answer, if two stated answers differ, or if one is longer than
    `MAX_ANSWER_CHARS`. Takes time linear in the completion's length.
    """
    stated = [s.text for s in statements(completion, answer_format) if s.text]  # no bare marks
    spellings = set(stated)
    if not spellings or len(spellings) > MAX_STATEMENTS:
        return None
    return stated[-1] if _agree(list(spellings)) else None


def _agree(spellings: Sequence[str]) -> bool:
    """Whether all spell one answer: the same number, or the same words."""
    found = [read_quantity(text) for text in spellings]
    numbers = [number for number in found if number is not None]
    if len(numbers) == len(spellings):
        return all(a.same(b) for a in numbers for b in numbers)
    words = {plain_text(text) for text in spellings}
    return len(words) == 1 and "" not in words


def well_formed(completion: str, answer_format: str = "hash") -> bool:
    """Whether there is working, then exactly one stated answer, and then nothing.

    In the format ``hash`` the answer stands alone on the last line: ``#### answer``. In the
    others, only punctuation and closing markup may follow the statement.
    """
    answer = extract_answer(completion, answer_format)
    stated = statements(completion, answer_format)
    if answer is None or len(stated) != 1:
        return False
    if answer_format == "hash":
        before, _, last = completion.strip().replace("\r\n", "\n").rpartition("\n")
        return last == f"{ANSWER_MARK} {answer}" and any(map(str.isalnum, before))
    before, after = completion[: stated[0].start], completion[stated[0].end :]
    return any(map(str.isalnum, before)) and not any(map(str.isalnum, after))


def normalize_answer(text: str) -> str:
    """Return the canonical spelling: an integer, a fraction ``p/q``, or plain folded text.

    ``$1,000.`` gives ``1000``, ``0.5`` gives ``1/2``, ``18 km`` gives ``18``, and
    ``[B, d]`` gives ``b d``. Empty for text longer than `MAX_ANSWER_CHARS`.
    """
    number = parse_number(text)
    return plain_text(text) if number is None else str(number)


def exact_match(problem: Problem, completion: str, answer_format: str = "hash") -> bool:
    """Whether the completion states one answer, and it equals the problem's."""
    stated = extract_answer(completion, answer_format)
    if answer_format == "math-verify" and stated is not None:
        return symbolic.equal(stated, problem.answer)
    return answers_match(stated, problem.answer)


def answers_match(stated: str | None, reference: str) -> bool:
    """Whether a stated answer equals the reference.

    Two numbers must have exactly the same value, and no different known unit (60 min is not
    60 h). Anything else is compared as text or as a list, ignoring case, spaces, commas and
    brackets.
    """
    if stated is None:
        return False
    ours, theirs = read_quantity(stated), read_quantity(reference)
    if ours is not None and theirs is not None:
        return ours.same(theirs)
    text = plain_text(reference)
    return text != "" and plain_text(stated) == text


def with_answer_format(problems: Sequence[Problem], answer_format: str) -> list[Problem]:
    """The same problems, whose tasks read answers in this format.

    Raises `UserError` for an unknown format, or if the library for ``math-verify`` is missing.
    """
    check_answer_format(answer_format)
    return [
        replace(problem, task=replace(problem.task, answer_format=answer_format))
        if isinstance(problem.task, ExactMatch)
        else problem
        for problem in problems
    ]


def check_answer_format(name: str) -> None:
    """UserError for an unknown format, or one whose library is missing."""
    if name not in ANSWER_FORMATS:
        raise UserError(f"unknown answer format {name!r}; allowed are {', '.join(ANSWER_FORMATS)}")
    if name == "math-verify":
        symbolic.check_installed()


@dataclass(frozen=True)
class ExactMatch:
    """Judges a completion by exact comparison of its stated answer with the reference."""

    answer_format: str = field(default="hash", kw_only=True)

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether the completion's stated final answer is exactly right."""
        return exact_match(problem, completion, self.answer_format)

    def grade(self, problem: Problem, completion: str) -> float:
        """1 if ``verify``, else 0."""
        return float(self.verify(problem, completion))
