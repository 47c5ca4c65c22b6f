"""Progress of a run: a live panel in a terminal or notebook, plain lines in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from cpugrpo_edu.record.markdown import printable
from cpugrpo_edu.record.metrics import Metrics
from cpugrpo_edu.show.text import clock_time, gib

READINGS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("reward", "reward", "{:.2f}".format),
    ("accuracy", "accuracy", "{:.0%}".format),
    ("kl", "KL, nats/token", "{:.4f}".format),
    ("entropy", "entropy, nats/token", "{:.3f}".format),
    ("clip_fraction", "clipped tokens", "{:.1%}".format),
    ("completion_length", "length, tokens", "{:.0f}".format),
    ("clipped_ratio", "cut at the limit", "{:.0%}".format),
    ("frac_zero_std", "zero-variance groups", "{:.0%}".format),
    ("tokens_per_second", "rollout tokens/s", "{:.0f}".format),
    ("rss_bytes", "memory", gib),
    ("cpu_percent", "CPU (100 % a core)", "{:.0f} %".format),
]
"""What is shown of a step, here and in the notebook: the metric, its name, how to write it."""

LOGGED: list[tuple[str, Callable[[Any], str]]] = [
    ("reward", "reward {:.2f}".format),
    ("accuracy", "accuracy {:.0%}".format),
    ("grade", "mean grade {:.2f}".format),
    ("clipped_ratio", "cut {:.0%}".format),
    ("tokens_per_second", "{:.0f} tokens/s".format),
    ("rss_bytes", lambda n: f"memory {gib(n)}"),
]
"""What a plain line shows of a step."""
LONGEST = 500
"""Characters that are printed of a question and its answer."""


def readings(metrics: Metrics) -> list[tuple[str, str]]:
    """Name and text of every metric of ``READINGS``; a dash for what was not measured."""
    return [
        (name, "–" if metrics.get(key) is None else form(metrics[key]))
        for key, name, form in READINGS
    ]


def one_line(sample: Mapping[str, Any]) -> str:
    """A question with its answer ({"prompt", "completion", "correct"}) in one line."""
    verdict = {True: "right: ", False: "wrong: ", None: ""}[sample["correct"]]
    lines = printable(f"{sample['prompt']} -> {verdict}{sample['completion']}").split("\n")
    return " | ".join(part.strip() for part in lines if part.strip())


@dataclass
class Phase:
    """What is being counted: the steps of a training stage, or the items of an evaluation."""

    name: str
    total: int
    started: float
    first: int = 0  # steps that an earlier run had done: they say nothing about the speed
    done: int = 0
    task: TaskID | None = None

    def position(self, now: float) -> str:
        text = f"{self.done}/{self.total}"
        if self.first < self.done < self.total:
            pace = (now - self.started) / (self.done - self.first)
            text += f"  {clock_time(pace * (self.total - self.done))} left"
        return text


class LivePanel(Progress):
    """Bars, and above them the latest step's metrics and one of its completions."""

    latest: Metrics | None = None

    def get_renderables(self) -> Iterator[RenderableType]:
        if self.latest is not None:
            grid = Table.grid(padding=(0, 2))
            pairs = readings(self.latest)
            for i in range(0, len(pairs), 3):
                grid.add_row(*(Text(f"{name}: {text}") for name, text in pairs[i : i + 3]))
            yield grid
            if sample := self.latest.get("sample"):
                yield Text(one_line(sample), no_wrap=True, overflow="ellipsis", style="dim")
        yield self.make_tasks_table(self.tasks)


class ProgressDisplay:
    """Progress of a run: a live panel in a terminal or notebook, plain lines elsewhere.

    In a pipe or in CI it prints a line for every optimizer step; of an evaluation one when it
    begins, at most one every ``interval`` seconds while it goes on, and one when it is complete.
    ``quiet`` prints nothing. It writes to stderr, so that stdout stays free for results.

    >>> with ProgressDisplay() as display:                      # doctest: +SKIP
    ...     display.start_stage("basic", steps=120)
    ...     display.update(1, reward=0.4, accuracy=0.3)
    ...     done = display.counter("evaluating", total=900)
    ...     done(32)
    """

    def __init__(
        self,
        quiet: bool = False,
        console: Console | None = None,
        interval: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.quiet = quiet
        self.console = Console(quiet=True) if quiet else console or Console(stderr=True)
        self.interval = interval
        self._clock = clock
        self._last_line = -math.inf
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the clock
        self._stage: Phase | None = None
        self._part: Phase | None = None  # of the stage's present step
        self._panel: LivePanel | None = None
        if not quiet and (self.console.is_terminal or self.console.is_jupyter):
            self._panel = LivePanel(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
                console=self.console,
                refresh_per_second=4,
            )

    def __enter__(self) -> ProgressDisplay:
        if self._panel:
            self._panel.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._panel:
            self._panel.stop()

    def message(self, text: str) -> None:
        """Print one line now, above the panel if there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def answer(self, label: str, sample: Mapping[str, Any]) -> None:
        """Print a question with the model's answer (see `one_line`), shortened to a few lines."""
        text = one_line(sample)
        self.message(f"{label}: {text[:LONGEST]}{'…' if len(text) > LONGEST else ''}")

    def start_stage(self, name: str, steps: int, done: int = 0) -> None:
        """Begin a stage of ``steps`` optimizer steps, ``done`` of them in an earlier run."""
        self._stage = self._begin(name, steps, done)

    def update(self, step: int, **metrics: Any) -> None:
        """Show that ``step`` steps of the stage are complete, and the latest metrics."""
        if self._stage is None:
            raise RuntimeError("progress was updated before a stage began; call start_stage first")
        self._stage.done = step
        metrics.setdefault("rss_bytes", self.rss_bytes())
        if self._panel:
            self._panel.latest = metrics
        if abs(metrics.get("grade", 0.0) - metrics.get("accuracy", 0.0)) < 1e-6:
            metrics.pop("grade", None)  # all grades are 0 or 1
        known = [form(metrics[key]) for key, form in LOGGED if metrics.get(key) is not None]
        self._last_line = -math.inf  # a step always gets its line
        self._show(self._stage, known)

    def part(self, what: str, done: int, total: int) -> None:
        """Show how far the stage's present step has come: ``done`` of ``total``, such as rollouts.

        Only a long step gets a line of its own in a log.
        """
        stage, now = self._stage, self._clock()
        if stage is None:
            return
        name = f"{stage.name} {stage.done}/{stage.total}: {what}"
        if self._part is None or self._part.name != name or done <= self._part.done:
            self._part = Phase(name, total, now, first=done, done=done)
        self._part.done = done
        if self._panel and stage.task is not None:
            text = f"{stage.position(now)}  {what} {done}/{total}"
            self._panel.update(stage.task, completed=stage.done, text=text)
        elif now - self._last_line >= self.interval:
            self._print_line(f"{name} {self._part.position(now)}")

    def rss_bytes(self) -> int:
        """Resident memory of this process now."""
        return int(self._process.memory_info().rss)

    def cpu_percent(self) -> float:
        """Processor time of this process since the last call, % of one core."""
        return float(self._process.cpu_percent())

    def counter(self, description: str, total: int) -> Callable[[int], None]:
        """Begin a phase of ``total`` items; call the result with how many more are done."""
        phase = self._begin(description, total)

        def show(more: int) -> None:
            phase.done += more
            self._show(phase)

        return show

    def _begin(self, name: str, total: int, done: int = 0) -> Phase:
        phase = Phase(name, total, self._clock(), first=done, done=done)
        if self._panel:
            phase.task = self._panel.add_task(name, total=total, completed=done, text="")
        else:
            self._print_line(f"{name}: begins")
        return phase

    def _show(self, phase: Phase, details: Sequence[str] = ()) -> None:
        now = self._clock()
        position = phase.position(now)
        if self._panel and phase.task is not None:
            self._panel.update(phase.task, completed=phase.done, text=position)
        elif phase.done == phase.total or now - self._last_line >= self.interval:
            self._print_line(f"{phase.name}: {'  '.join([position, *details])}")

    def _print_line(self, text: str) -> None:
        self._last_line = self._clock()
        self.message(text)
