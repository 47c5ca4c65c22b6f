"""A heuristic complexity score of a question, kept for comparison with its true difficulty."""

from __future__ import annotations

import re


def complexity(question: str) -> float:
    """The predecessor project's sorting score: tokens + 2 operators + 1.5 numbers + 3 depth.

    It uses only the text: tokens are words, and depth is the nesting depth of brackets.
    """
    depth = deepest = 0
    for character in question:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    operators = len(re.findall(r"[-+*/=%]", question))
    numbers = len(re.findall(r"\d+(?:\.\d+)?", question))
    return len(question.split()) + 2 * operators + 1.5 * numbers + 3 * deepest
