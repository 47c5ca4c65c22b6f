"""Limits of a submission, and the outcome of grading it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """Limits of one submission, in seconds of wall clock and in bytes.

    ``memory_bytes``, ``disk_bytes`` and ``processes`` count all processes that it starts.
    """

    cell_seconds: int = 60
    seconds: int = 600
    memory_bytes: int = 6 * 2**30
    processes: int = 64
    file_bytes: int = 64 * 2**20
    disk_bytes: int = 256 * 2**20
    output_bytes: int = 1_000_000


@dataclass
class Outcome:
    """The result of grading one submission; ``status`` is ok, flagged or failed.

    ``flags`` and ``review`` are for the instructor; ``notes``, for the student as well, say what
    was mended and what was stopped. A failed one was not graded.
    """

    student: str
    status: str = "ok"
    score: float = 0.0
    max_score: float = 0.0
    flags: list[str] = field(default_factory=list)
    review: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    digest: str = ""
    level: str = ""
