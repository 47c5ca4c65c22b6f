"""Pause and stop a run: from another thread, such as a notebook's buttons, or with Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):
    """The run was stopped on request; its state is saved."""


class Control:
    """Requests that a run obeys between two steps, or two batches of an evaluation.

    Pausing keeps everything in memory; stopping saves, as Ctrl-C does, so that
    ``resume`` continues. All methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._go = threading.Event()
        self._go.set()
        self._stop = threading.Event()
        self._waiting = threading.Event()

    def pause(self) -> None:
        self._go.clear()

    def go_on(self) -> None:
        self._go.set()

    def stop(self) -> None:
        """Ask the run to end after the current step; this ends a pause too."""
        self._stop.set()
        self._go.set()

    @property
    def paused(self) -> bool:
        """Whether a pause was asked for; the run may still be finishing its step."""
        return not self._go.is_set()

    @property
    def waiting(self) -> bool:
        """Whether the run is standing still in a pause."""
        return self._waiting.is_set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def should_stop(self) -> bool:
        """Called by the run between two steps: wait while paused; True if it must stop."""
        if self.paused:
            self._waiting.set()
            self._go.wait()
            self._waiting.clear()
        return self.stopping


@contextmanager
def stop_on_interrupt(control: Control) -> Iterator[None]:
    """The first Ctrl-C asks for a stop after the current step; the second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows signal handlers in the main thread only
        return
    previous = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        control.stop()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
