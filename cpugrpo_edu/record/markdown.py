"""Markdown tables of text that nobody has checked: what a model wrote, paths, names."""

from __future__ import annotations

import re
from collections.abc import Sequence


def printable(text: str) -> str:
    """Replace control, bidirectional-override and surrogate characters."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def markdown_text(text: str) -> str:
    """One line of Markdown in which nothing of ``text`` is markup."""
    return re.sub(r"([\\`*_\[\]|<>&$~])", r"\\\1", " ".join(printable(text).split()))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of plain text; columns of numbers are aligned to the right."""
    numeric = [
        all(re.match(r"[+-]?\d|–|p [<=]", row[i]) for row in rows) for i in range(len(header))
    ]
    safe = [[markdown_text(cell) for cell in line] for line in (header, *rows)]
    safe.insert(1, ["---:" if right else "---" for right in numeric])
    return "\n".join(f"| {' | '.join(line)} |" for line in safe)
