"""Which files of the project go to learners: none that holds the solution of a problem set.

``setup.py`` runs this file to put them into the wheel, so it imports nothing of the package.
"""

from pathlib import Path

PATTERNS = (
    "notebooks/*.ipynb",  # the chapters; the folders below hold solutions and keys
    "records/**/*.json",
    "records/**/*.json.gz",
    "docs/LOG.md",  # chapter 15 reads it
    "book/studies/*.md",  # chapters link to them
)


def learner_files(root: Path) -> list[str]:
    """The names of these files below the project folder ``root``, with slashes, sorted."""
    found = {path for pattern in PATTERNS for path in root.glob(pattern)}
    return sorted(path.relative_to(root).as_posix() for path in found)
