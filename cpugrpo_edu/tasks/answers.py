"""Read the stated answer from a completion and compare it exactly with the reference.

A verifiable reward is only as good as its parser: the policy will find whatever the parser
lets through. Three rules prevent this. An answer counts only after the mark
``####`` (the format of GSM8K: Cobbe et al. 2021, arXiv:2110.14168). Two different stated
answers count as none, so hedging never pays. Numbers are compared as exact fractions, never
as floats.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from cpugrpo_edu.data import ANSWER_MARK, Problem

MAX_ANSWER_CHARS = 100
"""A longer stated answer is not accepted."""

MAX_NUMBER_CHARS = 40
"""A longer number is not read as a number, which bounds the cost of exact arithmetic."""

MAX_STATEMENTS = 8
"""More distinct spellings than this count as hedging and are not read."""

_MARK = re.compile(rf"(?<!#){ANSWER_MARK}(?!#)")  # ##### is a heading, not a mark
_CURRENCY = "$€£¥₹"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\ ?[{_CURRENCY}%]?\ ?(?P<inner_sign>[+-]?)
    (?P<value>(?:[0-9]+|[1-9][0-9]{{0,2}}(?:,[0-9]{{3}})+)(?:\.[0-9]+)?|\.[0-9]+)
    (?:\ ?/\ ?(?P<denominator>[0-9]+))?
    \ ?(?P<unit>[%°{_CURRENCY}]|°?[^\W\d_]+(?:/[^\W\d_]+)?)?""",
    re.VERBOSE,
)
# Words after a number that change its value are not units.
_SCALES = {"k", "hundred", "thousand", "million", "billion", "trillion", "dozen", "score", "half"}
_SEPARATORS = re.compile(r"""[\s,;\[\](){}"']+""")


def extract_answer(completion: str) -> str | None:
    """Return the answer a completion states: the rest of the line after ``####``.

    Repeating the same answer (18, then 18.0) is allowed, and the last one is returned; only
    the rest of the marked line counts. None if there is no stated answer, if two stated
    answers differ, or if one is longer than `MAX_ANSWER_CHARS`. Takes time linear in
    the completion's length.
    """
    stated = [text for text in stated_answers(completion) if text]  # a bare mark states nothing
    spellings = set(stated)
    if not spellings or len(spellings) > MAX_STATEMENTS:
        return None
    values = {normalize_answer(text) for text in spellings}
    return stated[-1] if len(values) == 1 and "" not in values else None


def stated_answers(completion: str) -> list[str]:
    """Return the text after each ``####`` on its line, stripped, in order; it may be empty."""
    return [
        text.strip()
        for line in completion.splitlines()
        if ANSWER_MARK in line
        for text in _MARK.split(line)[1:]
    ]


def normalize_answer(text: str) -> str:
    """Return the canonical spelling: an integer, a fraction ``p/q``, or plain folded text.

    ``$1,000.`` gives ``1000``, ``0.5`` gives ``1/2``, ``18 km`` gives ``18``, and
    ``[B, d]`` gives ``b d``. Empty for text longer than `MAX_ANSWER_CHARS`.
    """
    number = parse_number(text)
    return _plain_text(text) if number is None else str(number)


def exact_match(problem: Problem, completion: str) -> bool:
    """Whether the completion states one answer, and it equals the problem's."""
    return answers_match(extract_answer(completion), problem.answer)


def answers_match(stated: str | None, reference: str) -> bool:
    """Whether a stated answer equals the reference.

    A numeric reference requires a single number of exactly the same value, with at most one
    currency sign and one unit word. Any other reference is compared as text or as a list,
    ignoring case, spaces, commas and brackets.
    """
    if stated is None:
        return False
    value = parse_number(reference)
    if value is not None:
        return parse_number(stated) == value
    text = _plain_text(reference)
    return text != "" and _plain_text(stated) == text


def parse_number(text: str) -> Fraction | None:
    """Read a single number exactly; None if the text is anything else.

    Accepts signs, thousands separators (``1,000``, but not ``1,00``), decimals, fractions,
    a currency or percent sign, one unit word and a final period. A percent sign is
    read as a unit: ``18%`` is 18. Rejects exponents, ``nan`` and ``inf``.
    """
    match = _NUMBER.fullmatch(_fold(text))
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    unit = match["unit"] or ""
    if unit in _SCALES or unit[:1].isnumeric():  # "18 thousand", "1½"
        return None
    value, denominator = match["value"], match["denominator"] or "1"
    if len(value) + len(denominator) > MAX_NUMBER_CHARS or not int(denominator):
        return None
    number = Fraction(value.replace(",", "")) / int(denominator)
    return -number if "-" in match["sign"] + match["inner_sign"] else number


def _plain_text(text: str) -> str:
    return _SEPARATORS.sub(" ", _fold(text)).strip().rstrip(". ")


def _fold(text: str) -> str:
    """Fold case, spaces and Unicode variants; drop invisible characters and a final period."""
    if len(text) > MAX_ANSWER_CHARS:
        return ""
    text = "".join(map(_fold_character, text)).casefold()
    return " ".join(text.split()).rstrip(". ")


def _fold_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Nd":  # decimal digits of every script
        return str(unicodedata.decimal(character))
    if category == "Cf":  # zero-width and bidirectional marks
        return ""
    if category == "No":  # NFKC would read "1²" as 12 and "1½" as 11/2
        return character
    return "-" if character in "−–" else unicodedata.normalize("NFKC", character)


class ExactMatch:
    """Judges a completion by exact comparison of its stated answer with the reference."""

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether the completion's stated final answer is exactly right."""
        return exact_match(problem, completion)

    def grade(self, problem: Problem, completion: str) -> float:
        """1 if ``verify``, else 0."""
        return float(self.verify(problem, completion))
