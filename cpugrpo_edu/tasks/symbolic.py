"""Equality of formulas, by the optional library math-verify."""

from __future__ import annotations

import importlib.util
import logging
import re
from typing import Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks.quantities import read_quantity
from cpugrpo_edu.tasks.spelling import fold, plain_text
from cpugrpo_edu.tasks.time_limit import TookTooLong, limited

TIME_LIMIT = 5.0
"""Seconds that one comparison may take; a longer one counts as not equal."""

_WORD = re.compile(r"(?<!\\)\b(?!(?:sin|cos|tan|log|ln|exp|pi|sqrt)\b)[^\W\d_]{2,}")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
# Powers of powers and factorials of large numbers would not end, and no signal interrupts them.
_SMALL_POWER = re.compile(r"(?:\{[^{}^!]{1,6}\}|\(?-?\w{1,2}\)?)(?!\s*(?:\^|\*\*|\w))")
_POWER = re.compile(r"(?:\^|\*\*)\s*")
_LARGE_FACTORIAL = re.compile(r"\d{4}!|[^\d\s\w]\s*!|!\s*!|!\s*\^")


def check_installed() -> None:
    """UserError if math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "the answer format math-verify needs the library of that name (our extra math), which "
            "is not installed; pip install math-verify, or choose the answer format auto"
        )


def equal(stated: str, reference: str) -> bool:
    """Whether both are the same number, the same formula, or the same words.

    Numbers are compared by `read_quantity`, since math-verify rounds them and drops their units.
    """
    ours, theirs = read_quantity(stated), read_quantity(reference)
    if ours is not None and theirs is not None:
        return ours.same(theirs)
    words = plain_text(reference)
    if words and words == plain_text(stated):
        return True
    formulas = fold(reference), fold(stated)
    if not all(map(is_formula, formulas)):
        return False
    try:
        return limited(_verify, *formulas, seconds=TIME_LIMIT)
    except TookTooLong:
        return False


def is_formula(text: str) -> bool:
    """Whether the text is a formula, without words, that is cheap to evaluate."""
    powers = list(_POWER.finditer(text))
    return (
        any(character.isdigit() or character in "\\=<>+^" for character in text)
        and not _WORD.search(_COMMAND.sub(" ", text))
        and not _LARGE_FACTORIAL.search(text)
        and all(_SMALL_POWER.match(text, power.end()) for power in powers)
        and sum(text[: power.start()].rstrip().endswith((")", "}")) for power in powers) <= 2
    )


def _verify(reference: str, stated: str) -> bool:
    # Only LaTeX is read: the library's reader of plain expressions calls eval.
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> Any:
        return parse(
            f"${text}$",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,  # its own timeouts work in the main thread alone
        )

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the missing timeout
    return bool(verify(read(reference), read(stated), timeout_seconds=None, float_rounding=15))
