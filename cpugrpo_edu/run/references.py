"""Before training: can a completion be right at all? Answers and references, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from cpugrpo_edu.data import ANSWER_MARK, Group, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks.answers import ExactMatch, extract_answer
from cpugrpo_edu.tasks.custom import Custom

STATED = {
    "boxed": r"\boxed{{{}}}",
    "sentence": "The answer is {}.",
    "last-number": "The answer is {}.",
}
"""How a completion states its answer, by answer format; all others read it after the mark."""
TRIED = 200
"""Problems of which the references are tried."""
SHOWN = 100
"""Characters that a message shows of a text."""


def is_compared(problem: Problem) -> bool:
    """Whether the answer is read from the completion and compared, not judged by a verifier."""
    task = problem.task
    return isinstance(task, ExactMatch) and not (isinstance(task, Custom) and task.verifier)


def check_references(problems: Sequence[Problem]) -> str | None:
    """What to say of references that no completion can match; UserError if that is all of them.

    A completion that states the reference itself, as the answer format asks, must be right.
    """
    tried = [problem for problem in problems if is_compared(problem)][:TRIED]
    lost = [problem for problem in tried if not problem.verify(stating(problem))]
    if not lost:
        return None
    form = lost[0].answer_format
    example = f"such as {short(lost[0].answer)} for {short(lost[0].question)}"
    advice = "choose another --answer-format, or name the column of short answers (--answer-column)"
    if len(lost) == len(tried):
        raise UserError(
            f"no completion can be right: an answer that --answer-format {form} reads equals none "
            f"of {len(tried)} references, {example}; {advice}"
        )
    return (
        f"{len(lost)} of {len(tried)} references cannot be matched in the answer format {form}, "
        f"{example}; {advice}"
    )


def stating(problem: Problem) -> str:
    """A completion that states the reference."""
    return STATED.get(problem.answer_format, f"{ANSWER_MARK} {{}}").format(problem.answer)


def unmatched(groups: Sequence[Group]) -> str | None:
    """What to say where none of the sampled answers is right: one beside its reference, or a
    completion in which no answer was found. None if some are right, or a verifier judges."""
    said = [
        (group.problem, episode.text)
        for group in groups
        if group.problem is not None and is_compared(group.problem)
        for episode in group.episodes
    ]
    if not said or any(problem.verify(text) for problem, text in said):
        return None
    stated = [
        (problem, answer)
        for problem, text in said
        if (answer := extract_answer(text, problem.answer_format)) is not None
    ]
    if not stated:
        problem, text = said[0]
        return (
            f"in none of {len(said)} completions an answer was found (--answer-format "
            f"{problem.answer_format}); one ends {short(text.strip()[-SHOWN:])}"
        )
    problem, answer = stated[0]
    return (
        f"none of {len(said)} completions is right; asked {short(problem.question)}, one states "
        f"{short(answer)}, and the reference is {short(problem.answer)}"
    )


def short(text: str) -> str:
    """The beginning of a text, quoted."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")
