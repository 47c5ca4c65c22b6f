"""Limits of a submission and what grading it came to."""

from __future__ import annotations

from dataclasses import dataclass, field

CONTAINED = {
    "namespaces+user": "limits, a user of its own, read-only, no network, the course out of sight",
    "namespaces": "limits, read-only, no network, the course out of sight; the same user",
    "user": "limits and a user of its own; the network as it is here",
    "limits": "limits only; the same user, open network: use the container",
    "none": "NONE beside the time limit: use the container",
}


@dataclass
class Limits:
    """Of one submission. Seconds are wall clock; bytes and processes count all it starts."""

    cell_seconds: int = 60
    seconds: int = 600
    memory_bytes: int = 6 * 2**30
    processes: int = 64
    file_bytes: int = 64 * 2**20
    disk_bytes: int = 256 * 2**20
    output_bytes: int = 1_000_000


@dataclass
class Outcome:
    """What grading one submission came to; ``status`` is ok, flagged or failed."""

    student: str
    status: str = "ok"
    score: float = 0.0
    max_score: float = 0.0
    flags: list[str] = field(default_factory=list)
    review: list[str] = field(default_factory=list)
    digest: str = ""
    level: str = ""
