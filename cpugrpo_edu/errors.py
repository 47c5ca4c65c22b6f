"""The exception for users' mistakes, shown as one sentence."""

from __future__ import annotations

DIVERGED = "the run diverged: lower the learning rate and start from an earlier checkpoint"


class UserError(Exception):
    """A mistake in the input: one sentence with the value, what is allowed, and how to fix it.

    The command line prints the sentence without a traceback and exits with code 2.
    """
