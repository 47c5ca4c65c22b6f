"""Start, watch and steer a run from a notebook.

    from cpugrpo_edu.notebook.dashboard import train
    train("runs/live", per_cell=30)

The run works in a thread, so the notebook stays usable; buttons pause, stop and resume it.
``watch("runs/live")`` only shows a run that another process does.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.metrics import Metrics, read_metrics
from cpugrpo_edu.run.pause import Control
from cpugrpo_edu.show.plots import plot_learning
from cpugrpo_edu.show.progress import Phase, ProgressDisplay, readings

if TYPE_CHECKING:
    from cpugrpo_edu.run.config import RunConfig

SAMPLES = 3
"""Completions shown, the latest first."""


def train(
    output: str | Path, config: RunConfig | None = None, *, resume: bool = False, **settings: Any
) -> Dashboard:
    """Begin a run in a thread and return its dashboard, which a notebook displays.

    ``settings`` are fields of ``RunConfig``, if no ``config`` is given. With ``resume`` it
    continues the run in ``output``. Raises UserError for settings that do not exist.
    """
    from cpugrpo_edu.run.config import config_for

    if config is not None and settings:
        raise UserError(f"give a config, or settings ({', '.join(settings)}), not both")
    try:
        dashboard = Dashboard(output, config or config_for(**settings))
    except TypeError as error:
        raise UserError(f"{error}; RunConfig's fields are the settings") from error
    dashboard.begin(resume)
    return dashboard


def watch(output: str | Path, interval: float = 3.0) -> Dashboard:
    """The dashboard of a run that another process does, or did, in ``output``."""
    dashboard = Dashboard(output, interval=interval)
    dashboard.follow()
    return dashboard


class Dashboard:
    """Widgets that show a run's folder; with a ``config``, buttons that do and steer the run.

    ``error`` is what ended the run early, if anything did, and ``record`` its result.
    """

    def __init__(self, output: str | Path, config: RunConfig | None = None, interval: float = 3.0):
        try:
            import ipywidgets as w
        except ImportError as error:
            raise UserError(
                "the dashboard needs ipywidgets, which is not installed; pip install ipywidgets"
            ) from error
        self.output, self.config, self.interval = Path(output), config, interval
        self.control = Control()
        self.record: Any = None
        self.error: BaseException | None = None
        self.status = w.HTML("Waiting for the first step …")
        self.numbers, self.plots, self.samples = w.HTML(), w.HTML(), w.HTML()
        self.pause = w.ToggleButton(description="Pause", tooltip="Wait after this step")
        self.stop = w.Button(description="Stop", tooltip="Save after this step and end")
        self.resume = w.Button(description="Resume", tooltip="Continue the stopped run")
        self.pause.observe(self._on_pause, names="value")
        self.stop.on_click(lambda _: self._on_stop())
        self.resume.on_click(lambda _: self.begin(resume=True))
        buttons = [w.HBox([self.pause, self.stop, self.resume])] if config is not None else []
        self.widget = w.VBox([*buttons, self.status, self.numbers, self.plots, self.samples])
        self._end = threading.Event()
        self._run: threading.Thread | None = None
        self._watch: threading.Thread | None = None
        self._size = -1
        self._drawing = threading.Lock()
        self._enable(running=False)

    # The run

    @property
    def running(self) -> bool:
        return self._run is not None and self._run.is_alive()

    def begin(self, resume: bool = False) -> None:
        """Do the run in a thread."""
        if self.config is None or self.running:
            return
        self.control, self.error = Control(), None
        self.pause.value = False
        self._enable(running=True)
        self.say("Loading …")
        self._run = threading.Thread(target=self._do, args=(resume,), daemon=True)
        self._run.start()
        self.follow()

    def _do(self, resume: bool) -> None:
        from cpugrpo_edu.run.pipeline import Interrupted, run

        assert self.config is not None
        try:
            self.record = run(
                self.config,
                self.output,
                resume=resume,
                display=StatusDisplay(self.say),
                control=self.control,
            )
            ending = f"Complete. Report: {self.output / 'report.html'}"
        except Interrupted as error:
            self.error = error
            ending = f"{str(error).capitalize()}; saved. Press Resume to continue."
        except UserError as error:
            self.error = error
            ending = f"Ended: {error}"
        except BaseException as error:  # nobody would see the traceback of a thread
            self.error = error
            ending = f"Ended by {type(error).__name__}: {error}"
        self._end.set()
        self.refresh()
        self.say(ending)
        self._enable(running=False)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the run has ended, at most ``timeout`` seconds."""
        if self._run is not None:
            self._run.join(timeout)

    def close(self) -> None:
        """Stop watching; the run itself continues."""
        self._end.set()

    # The buttons

    def _enable(self, running: bool) -> None:
        self.pause.disabled = self.stop.disabled = not running
        resumable = (self.output / "state.json").exists()
        complete = (self.output / "record.json").exists()
        self.resume.disabled = running or complete or not resumable

    def _on_pause(self, change: Any) -> None:
        self.pause.description = "Continue" if change["new"] else "Pause"
        if change["new"]:
            self.control.pause()
            self.say("Pausing after this step …")
        else:
            self.control.go_on()
            if self.running:
                self.say("Continuing …")

    def _on_stop(self) -> None:
        self.control.stop()
        self.pause.value = False
        self.pause.disabled = self.stop.disabled = True
        self.say("Stopping after this step …")

    # What it shows

    def say(self, text: str) -> None:
        self.status.value = f'<p role="status"><b>{html.escape(text)}</b></p>'

    def follow(self) -> None:
        """Redraw from a thread whenever the metrics file has grown."""
        if self._watch is not None and self._watch.is_alive():
            self._end.set()
            self._watch.join()
        self._end = threading.Event()
        self._watch = threading.Thread(target=self._follow, args=(self._end,), daemon=True)
        self._watch.start()

    def _follow(self, end: threading.Event) -> None:
        self.refresh()
        while not end.wait(self.interval):
            if self.control.waiting and self.running:
                self.say("Paused; memory is kept. Press Continue, or Stop to save and end.")
            self.refresh()

    def refresh(self) -> None:
        """Redraw if the metrics file has changed."""
        path = self.output / "metrics.jsonl"
        with self._drawing:
            size = path.stat().st_size if path.exists() else 0
            if size in (0, self._size):  # no step yet, or nothing new
                return
            try:
                metrics = read_metrics(path)
            except UserError as error:  # the file is being replaced, or holds something else
                self.say(str(error))
                return
            if not metrics:
                return
            self._size = size
            if self.config is None:
                self.say(position(metrics[-1]))
            self.numbers.value = numbers_html(metrics[-1])
            plot = plot_learning(metrics, most=12, columns=4)
            self.plots.value = (
                f'<img style="max-width:100%" alt="{html.escape(plot.alt)}" '
                f'src="data:image/png;base64,{plot.base64(dpi=80)}">'
            )
            self.samples.value = samples_html(metrics)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)  # type: ignore[no-untyped-call]


def position(metrics: Metrics) -> str:
    return f"{metrics.get('stage', 'run')}, step {metrics.get('step', '?')}"


def numbers_html(metrics: Metrics) -> str:
    """The latest step as a table of names and numbers."""
    cells = [
        f'<td style="padding:0 16px 0 0;text-align:left;white-space:nowrap">'
        f"{html.escape(name)}: <b>{html.escape(text)}</b></td>"
        for name, text in readings(metrics)
    ]
    table = "".join(f"<tr>{''.join(cells[i : i + 4])}</tr>" for i in range(0, len(cells), 4))
    note = "" if metrics.get("kl") is not None else "<p>KL is not measured while beta is 0.</p>"
    return f'<table style="line-height:1.4">{table}</table>{note}'


def samples_html(metrics: Sequence[Metrics]) -> str:
    """The latest completions, each with its prompt and whether the answer is right."""
    parts = []
    for row in [row for row in metrics if row.get("sample")][: -SAMPLES - 1 : -1]:
        sample = row["sample"]
        verdict = {True: "✓ right", False: "✗ wrong"}.get(sample["correct"], "not judged")
        parts.append(
            f"<p><b>{html.escape(position(row))}, {verdict}</b><br>"
            f"{html.escape(sample['prompt'])}</p>"
            f'<pre style="white-space:pre-wrap;margin-left:1em">'
            f"{html.escape(sample['completion'])}</pre>"
        )
    return "<p>Sample completions</p>" + "".join(parts) if parts else ""


class StatusDisplay(ProgressDisplay):
    """Progress as one line of text, passed to ``say`` at most twice a second."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__(quiet=True)
        self._say, self._said = say, 0.0

    def _show(self, phase: Phase, details: Sequence[str] = ()) -> None:
        now = time.monotonic()
        if now - self._said >= 0.5 or phase.done == phase.total:
            self._said = now
            self._say(f"{phase.name}: {phase.position(self._clock())}")
