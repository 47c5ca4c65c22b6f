"""A heuristic score of a question's text, kept to be compared with true difficulty."""

from __future__ import annotations

import re


def complexity(question: str) -> float:
    """The ancestor project's sorting score: tokens + 2 operators + 1.5 numbers + 3 depth.

    A heuristic on the text alone; tokens are words, depth is that of brackets.
    """
    depth = deepest = 0
    for character in question:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    operators = len(re.findall(r"[-+*/=%]", question))
    numbers = len(re.findall(r"\d+(?:\.\d+)?", question))
    return len(question.split()) + 2 * operators + 1.5 * numbers + 3 * deepest
