"""Anonymous peer review: each student gives one review and gets one."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from cpugrpo_edu.course.student_seeds import student_key
from cpugrpo_edu.errors import UserError


@dataclass(frozen=True)
class Review:
    """``reviewer`` gets the folder of ``author`` under the name ``code``, and nothing else."""

    reviewer: str
    author: str
    code: str


def peer_reviews(students: Sequence[str], secret: str, label: str = "ps6") -> list[Review]:
    """One review for each student: a ring whose order only the course secret determines.

    The same arguments give the same reviews, in whatever order the students are listed;
    another ``label`` gives another ring. Raises ``UserError`` if a student is listed twice, or
    for fewer than 3: with 2, both know who wrote what.
    """
    if len(set(students)) < len(students) or len(students) < 3:
        raise UserError(
            f"{len(students)} students, {len(set(students))} of them different; peer review "
            "needs at least 3, each listed once: fix the roster"
        )

    def digest(student: str) -> str:
        key = bytes.fromhex(student_key(secret, student))
        return hmac.new(key, label.encode(), hashlib.sha256).hexdigest()

    ring = sorted(students, key=digest)
    # The code comes from the author's digest, which reveals nothing without the secret.
    return [
        Review(reviewer, author, digest(author)[:8])
        for reviewer, author in zip(ring, ring[1:] + ring[:1], strict=True)
    ]
