"""Call code of others that may never return."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class TookTooLong(BaseException):
    """Not an Exception, so that a verifier's own ``except Exception`` cannot swallow it."""


def limited(function: Callable[..., T], *arguments: Any, seconds: float) -> T:
    """Call ``function``; raise ``TookTooLong`` if it does not return within ``seconds``.

    In the main thread a signal interrupts the call. In other threads and on Windows, the call
    runs in a thread of its own, which is abandoned and keeps running until the program ends.
    """
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():

        def stop(number: int, frame: FrameType | None) -> None:
            raise TookTooLong

        previous = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # repeated, in case it is swallowed
        try:
            return function(*arguments)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function(*arguments))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TookTooLong
    return results[0]
