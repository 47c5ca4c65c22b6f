"""Test data that differ by student and stay the same at every regrading.

A hidden test draws its data from ``student_seed("ps1-advantages")``. While grading, the seed
comes from the student's key, so that a constant copied from another student does not pass; in a
student's own run it is a fixed public one. With HMAC-SHA256 (RFC 2104),

    key  = HMAC(course secret, student id)
    seed = HMAC(key, label), its first 31 bits.

The grader sets either ``CPUGRPO_STUDENT_KEY`` (the key in hex, see :func:`student_key`; the
better way, since the course secret never enters the student's process) or both
``CPUGRPO_COURSE_SECRET`` and ``CPUGRPO_STUDENT_ID``. Importing this module removes key and secret
from ``os.environ``; the first, locked cell of a problem set does that. A limit: code in the same
process can still look for them (in this module, in /proc). A student's key reveals the data of
that student's own tests, but no one else's, and not the course secret.
"""

from __future__ import annotations

import hashlib
import hmac
import os

from cpugrpo_edu.errors import UserError

PUBLIC_KEY = hashlib.sha256(b"cpugrpo_edu: a student's own run").digest()


def student_key(secret: str, student_id: str) -> str:
    """The key of one student as 64 hexadecimal digits. Raises ``UserError`` if either is empty."""
    for name, value in (("course secret", secret), ("student id", student_id)):
        if not value:
            raise UserError(f"the {name} is {value!r}; it must not be empty: set one")
    return hmac.new(secret.encode(), student_id.encode(), hashlib.sha256).hexdigest()


def _take_key() -> bytes:
    key = os.environ.pop("CPUGRPO_STUDENT_KEY", "")
    secret = os.environ.pop("CPUGRPO_COURSE_SECRET", "")
    if not key and secret:
        key = student_key(secret, os.environ.get("CPUGRPO_STUDENT_ID", ""))
    try:
        return bytes.fromhex(key) or PUBLIC_KEY
    except ValueError:
        raise UserError(
            "CPUGRPO_STUDENT_KEY is not hexadecimal; set it to what student_key returns, "
            "or leave it out"
        ) from None


_key = _take_key()


def student_seed(label: str) -> int:
    """A seed in [0, 2**31) for the test data named ``label``, different for each student."""
    digest = hmac.new(_key, label.encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:4], "big") >> 1
