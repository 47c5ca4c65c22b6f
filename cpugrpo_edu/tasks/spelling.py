r"""Bring the spellings of an answer together: markup, LaTeX, Unicode.

Language models write ``**42**``, ``\boxed{42}``, ``\(42\)`` or ``\$42`` where a person writes 42.
"""

from __future__ import annotations

import re
import unicodedata

MAX_ANSWER_CHARS = 100
"""A longer stated answer is not accepted."""

BOLD = r"(?<![\w)*])\*\*([^*\n]+)\*\*(?![\w(*])"  # not the power in 2**3
_LATEX = (  # in this order
    (re.compile(r"\\(?:boxed|fbox|mathbf|textbf|mathrm|text|mbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r" \1/\2 "),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r" \1/\2 "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})"), "°"),
    (re.compile(r"\\(?:times|cdot)\b"), "*"),
    (re.compile(r"\\div\b"), "/"),
    (re.compile(r"\\(?:[()\[\],;:! ]|(?:left|right|displaystyle)\b)"), ""),
    (re.compile(r"\\([$%#&_{}])"), r"\1"),
)
_MARKUP = (
    (re.compile(BOLD), r"\1"),
    (re.compile(r"</?answer>", re.IGNORECASE), " "),
    (re.compile(r"`([^`\n]*)`"), r"\1"),
    (re.compile(r"\$\$"), " "),
    (re.compile(r"(?<![\w$])\$([^$\n]+)\$(?![\w$])"), r"\1"),  # $42$, but not $5 and $6
)
_PHRASE = re.compile(
    r"^\W*(?:so,?\s+|therefore,?\s+|thus,?\s+|hence,?\s+)?(?:(?:the|my|our)\s+)?"
    r"(?:(?:final|correct)\s+)?answer(?:\s+is|\s*[:=])\s*:?\s*(?=\S)",
    re.IGNORECASE,
)
_SEPARATORS = re.compile(r"""[\s,;\[\](){}"']+""")


def without_markup(text: str) -> str:
    """The text without Markdown's bold and code, and with LaTeX's common commands spelled out."""
    for _ in range(3):  # they nest: \boxed{\text{42}}
        before = text
        for pattern, replacement in (*_LATEX, *_MARKUP):
            text = pattern.sub(replacement, text)
        if text == before:
            break
    return text


def fold(text: str) -> str:
    """One spelling of a stated answer, with its capitals.

    Without markup, invisible characters, a phrase such as "The answer is" and a final period;
    characters of every script as ASCII where they mean the same. Empty for text longer than
    `MAX_ANSWER_CHARS`.
    """
    if len(text) > MAX_ANSWER_CHARS:
        return ""
    text = _PHRASE.sub("", without_markup(text))
    text = "".join(map(_fold_character, text))
    return " ".join(text.split()).rstrip(". ")


def plain_text(text: str) -> str:
    """The words alone: without capitals, brackets, commas and quotes."""
    return _SEPARATORS.sub(" ", fold(text).casefold()).strip().rstrip(". ")


def _fold_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Nd":  # decimal digits of every script
        return str(unicodedata.decimal(character))
    if category == "Cf":  # zero-width and bidirectional marks
        return ""
    if category == "No":  # NFKC would read "1²" as 12; only a fraction such as "1½" is safe
        if unicodedata.decomposition(character).startswith("<fraction>"):
            return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
        return character
    return "-" if character in "−–" else unicodedata.normalize("NFKC", character)
