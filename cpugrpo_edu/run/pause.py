"""Pause and stop: how another thread, such as a notebook's buttons, steers a run."""

from __future__ import annotations

import threading


class Control:
    """Requests that a run obeys between two steps, or two batches of an evaluation.

    Pausing keeps everything in memory; stopping saves, as Ctrl-C does, so that
    ``resume`` goes on. All methods may be called from any thread.
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
        """Ask for an end after the step that is being done; ends a pause too."""
        self._stop.set()
        self._go.set()

    @property
    def paused(self) -> bool:
        """Whether a pause was asked for; the run may still be finishing its step."""
        return not self._go.is_set()

    @property
    def waiting(self) -> bool:
        """Whether the run stands still in a pause now."""
        return self._waiting.is_set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def checkpoint(self) -> bool:
        """Called by the run between two steps: wait while paused; True if it shall stop."""
        if self.paused:
            self._waiting.set()
            self._go.wait()
            self._waiting.clear()
        return self.stopping
