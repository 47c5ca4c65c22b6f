r"""Where a completion states its answer, in each format that the package reads.

``hash`` is the mark of GSM8K, ``#### 42``. ``auto`` reads what chat models write: the mark,
``\boxed{42}``, ``<answer>42</answer>``, "The answer is 42." and "Answer: 42" anywhere; without
any of them the bold text and the result after the last ``=`` in the last line, or the only number
of the last sentence, "So she has 12 apples.". ``boxed`` and ``sentence`` read one of these,
``last-number`` the last number of the text, and ``math-verify`` the same as ``auto``, compared by
the library of that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from cpugrpo_edu.data import ANSWER_MARK
from cpugrpo_edu.tasks.quantities import SCALES, leading_quantity, read_quantity
from cpugrpo_edu.tasks.spelling import BOLD, MAX_ANSWER_CHARS, without_markup

ANSWER_FORMATS = ("auto", "hash", "boxed", "sentence", "last-number", "math-verify")

MAX_STATEMENTS = 8
"""More distinct spellings than this count as hedging and are not read."""

MAX_SENTENCES = 64
"""Of more sentences that state an answer, only the first are read."""

_MARK = re.compile(rf"(?<!#){ANSWER_MARK}(?!#)")  # ##### is a heading, not a mark
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TAG = re.compile(r"<answer>([^<]*)</answer>", re.IGNORECASE)
_SENTENCE = re.compile(
    r"(?:\b(?:so|therefore|thus|hence),?\s)?(?:\b(?:the|my|our)\s)?(?:\b(?:final|correct)\s)?"
    r"\banswer(?:\s(?:to|of|for)\s[^\n.:?!]{1,80}?)?[*_]*(?:\s(?:is|would\sbe)\b:?|\s?[:=])"
    r"(?:[*_]+(?=\s))?\s*",
    re.IGNORECASE,
)
_END_OF_SENTENCE = re.compile(r"[.!?](?=[\s*_)]|$)|\n")
_REASON = re.compile(r",?\s+(?:because|since|as|which|that is|so)\b.*", re.IGNORECASE | re.DOTALL)
_BOLD = re.compile(BOLD)
_RESULT = re.compile(r"=|\bequals\b|\bequal to\b", re.IGNORECASE)
_SYMBOL = re.compile(r"(?<![^\W_])([a-z]) ?= ?(-?\$?[0-9][0-9.,/]*)", re.IGNORECASE)
_BARE = re.compile(r"(?:^|[^\W\d_]\s|[:;,=])\s*(-?\$?[0-9][0-9.,]*)\s*$")  # not in "40 + 2"
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w)\]}%])[-−])?(?<![\d.])\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?"
    rf"(?: (?:{'|'.join(SCALES)})s?\b)?",
    re.IGNORECASE,
)
_DELIMITERS = re.compile(r"\\[\[\]()]|\$")


@dataclass(frozen=True)
class Statement:
    """A stated answer: its text, and where the statement begins and ends in the completion."""

    text: str
    start: int
    end: int


def statements(completion: str, answer_format: str = "hash") -> list[Statement]:
    """The answers that a completion states, in order; a bare ``####`` states an empty one."""
    if answer_format == "hash":
        return list(_marked(completion))
    if answer_format == "boxed":
        return list(_boxed(completion))
    if answer_format == "sentence":
        found = list(_sentences(completion))
        return _claims(found) or found
    if answer_format == "last-number":
        return _last_number(completion)
    found = explicit(completion)
    if claims := _claims(found):
        return claims
    last = _in_last_line(completion)
    return last if not found or (_claims(last) and all(map(_is_prose, found))) else found


def explicit(completion: str) -> list[Statement]:
    """The statements of every form that says "this is the answer"; of nested ones the outermost."""
    found = [
        *(s for s in _marked(completion) if s.text),
        *_boxed(completion),
        *(Statement(m[1].strip(), *m.span()) for m in _TAG.finditer(completion)),
        *_sentences(completion),
    ]
    outermost: list[Statement] = []
    for statement in sorted(found, key=lambda s: (s.start, -s.end)):
        if not outermost or statement.start >= outermost[-1].end:
            outermost.append(statement)
    return outermost


def working(completion: str, answer_format: str = "hash") -> str:
    """The text before the first stated answer: all of it where a step states the answer."""
    if answer_format == "hash":
        return completion.split(ANSWER_MARK, 1)[0]
    first = statements(completion, "auto")[:1]
    return (
        completion[: first[0].start] if first and first[0] in explicit(completion) else completion
    )


def _marked(text: str) -> Iterator[Statement]:
    """The rest of the line after each ``####``, up to the next one."""
    start = 0
    for line in text.splitlines(keepends=True):
        if ANSWER_MARK in line:
            marks = [*_MARK.finditer(line)]
            ends = [*(mark.start() for mark in marks[1:]), len(line)]
            for mark, end in zip(marks, ends, strict=False):
                yield Statement(line[mark.end() : end].strip(), start + mark.start(), start + end)
        start += len(line)


def _boxed(text: str) -> Iterator[Statement]:
    r"""The content of each ``\boxed{...}`` with balanced braces."""
    for match in _BOXED.finditer(text):
        depth = 1
        for brace in re.finditer(r"[{}]", text[match.end() : match.end() + 2 * MAX_ANSWER_CHARS]):
            depth += 1 if brace[0] == "{" else -1
            if not depth:
                end = match.end() + brace.start()
                yield Statement(text[match.end() : end].strip(), match.start(), end + 1)
                break


def _sentences(text: str) -> Iterator[Statement]:
    """What follows "The answer is" or "Answer:", up to the end of the sentence."""
    done = 0
    for match in islice(_SENTENCE.finditer(text), MAX_SENTENCES):
        if match.start() < done:  # "Answer: the answer is 42" is one statement
            continue
        rest = text[match.end() : match.end() + 2 * MAX_ANSWER_CHARS]
        end = _END_OF_SENTENCE.search(rest)
        said = rest[: end.start()] if end else rest
        done = match.end() + len(said)
        said = without_markup(said).strip("*_ \t\r")
        number = leading_quantity(_REASON.sub("", said))
        if said:
            said = said if read_quantity(number) is None else number
            yield Statement(said, match.start(), done)


def _claims(found: Sequence[Statement]) -> list[Statement]:
    """Those that claim a number, without prose such as "The answer is found below".

    What begins with a number, or joins two by "or", is a claim as well: it hedges.
    """
    spellings = {s.text for s in found}
    if len(spellings) > MAX_STATEMENTS:
        return list(found)
    claims = {
        text
        for text in spellings
        if read_quantity(text) is not None
        or text[:1].isdigit()
        or (re.search(r"\bor\b", text) and any(map(str.isdigit, text)))
    }
    return [s for s in found if s.text in claims]


def _is_prose(statement: Statement) -> bool:
    return statement.text.endswith(":") or len(statement.text.split()) > 8


def _in_last_line(text: str) -> list[Statement]:
    """The bold text of the last line, and the number after its last ``=``; or all of it."""
    lines = [m for m in re.finditer(r"[^\n]+", text) if any(map(str.isalnum, m[0]))]
    if not lines:
        return []
    line, start = lines[-1][0][-10 * MAX_ANSWER_CHARS :], lines[-1].end()
    start -= len(line)
    if not _RESULT.search(line) and read_quantity(line) is not None:
        return [Statement(line.strip(), start, start + len(line))]
    found = [
        Statement(m[1].strip(), start + m.start(), start + m.end()) for m in _BOLD.finditer(line)
    ]
    result = _result(line, start)
    if result is None:
        return _claims(found) or found or _closing(line, start)
    return [*(s for s in _claims(found) if s.end <= result.start), result]


def _closing(line: str, start: int) -> list[Statement]:
    """The only number of the last sentence, if that is complete: "So she has 12 apples."."""
    sentence = re.split(r"(?<=[.!?])\s+", line.rstrip())[-1]
    numbers = [*_LAST_NUMBER.finditer(sentence)]
    complete = sentence.rstrip('*_")').endswith((".", "!"))
    if not complete or len(numbers) != 1 or re.search(r"\bor\b", sentence):
        return []
    at = start + len(line.rstrip()) - len(sentence)
    return [Statement(numbers[0][0], at + numbers[0].start(), at + len(sentence))]


def _result(line: str, start: int) -> Statement | None:
    """The number after the last ``=`` of a line, unless the line says "or" or one x twice."""
    signs = [*_RESULT.finditer(line)]
    if not signs or re.search(r"\bor\b", line):
        return None
    values: dict[str, set[str]] = {}
    for symbol, value in _SYMBOL.findall(line):
        values.setdefault(symbol, set()).add(value.rstrip(".,"))
    if any(len(said) > 1 for said in values.values()):
        return None
    said = without_markup(line[signs[-1].end() :])
    said = _DELIMITERS.sub("", said) if "$" not in line[: signs[-1].end()] else said.rstrip("$ ")
    text = leading_quantity(said.strip(" *_.\t\r"))
    number, left = read_quantity(text), _BARE.search(without_markup(line[: signs[-1].start()]))
    other = read_quantity(left[1]) if left else None
    if number is None or (other is not None and not number.same(other)):  # "it is 41 = 42"
        return None
    name = re.search(r"(?<![^\W_])[^\W\d_]\s*$", line[: signs[-1].start()])
    text = f"{name[0].strip()} = {text}" if name else text
    return Statement(text, start + signs[-1].end(), start + len(line))


def _last_number(text: str) -> list[Statement]:
    return [Statement(m[0], *m.span()) for m in _LAST_NUMBER.finditer(text)][-1:]
