"""Sphinx: a page of the API reference lists the modules of its room as they are now.

A line ``<!-- modules: engine -->`` becomes a section for every module of
``cpugrpo_edu/engine``; ``<!-- modules: . -->`` is the root of the package. So a module that
moves or gets a new name needs no edit here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

PACKAGE = Path(__file__).resolve().parent.parent.parent / "cpugrpo_edu"
MARK = re.compile(r"^<!-- modules: (\S+) -->$", re.M)


def modules(room: str) -> list[str]:
    """Dotted names of the modules in a room; those of the root do not include other rooms."""
    folder = PACKAGE if room == "." else PACKAGE / room
    files = sorted(folder.glob("*.py") if room == "." else folder.rglob("*.py"))
    names = [".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts) for p in files]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    return [name for name in names if name != PACKAGE.name]


def sections(room: str) -> str:
    return "\n\n".join(
        f"## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```"
        for name in modules(room)
    )


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = MARK.sub(lambda match: sections(match[1]), source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", fill)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
