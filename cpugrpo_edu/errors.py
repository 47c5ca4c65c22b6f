"""The one exception that a user sees as a sentence."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input: one sentence naming the value, what is allowed, and the mend.

    The command line prints the sentence and exits with code 2; no traceback.
    """
