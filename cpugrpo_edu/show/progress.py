"""Watching a run: metrics as JSON lines, progress in a terminal, a live plot in a notebook.

The trainer writes one JSON object an optimizer step; everything else here reads
those. A file of lines survives a crash, can be followed while it grows, and is
what the report plots afterwards.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
Metrics = Mapping[str, Any]

# Okabe & Ito (2008): distinguishable with every common colour vision deficiency.
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#666666",
)


# Metrics on disk


class MetricsLog:
    """Append-only JSON lines, one optimizer step each; safe to cut off at any moment.

    Every line reaches the operating system as it is written, so a killed process
    loses at most a half line, which reopening removes. ``time`` (Unix, seconds) is
    added where it is missing; NaN and infinity become null, which JSON lacks.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_half_line()
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def _drop_half_line(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)

    def write(self, row: Metrics) -> None:
        """Append one step; values are anything JSON, or anything ``float()`` takes."""
        row = {"time": time.time(), **row}
        plain = json.loads(json.dumps(row, default=float), parse_constant=lambda _: None)
        self._file.write(json.dumps(plain) + "\n")

    def forget_after(self, global_step: int) -> None:
        """Keep one row for each step up to ``global_step``; the later ones are done again."""
        rows = read_metrics(self.path)
        kept = [row for row in rows if row.get("global_step", 0) <= global_step]
        if len(kept) == sum(1 for _ in self.path.open("rb")):
            return
        self.close()
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All steps of a metrics file, in order; a half last line is ignored.

    A resumed run does the steps after its checkpoint again: of several rows with
    the same (stage, step) the last one counts. Raises UserError if there is no
    such file or a line before the last is no JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read metrics from {path}: {error.strerror}; give a run's metrics.jsonl"
        ) from error
    rows: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"line {number} of {path} is no JSON object; delete the line or the file"
            ) from error
        rows[(str(row.get("stage")), str(row["step"])) if "step" in row else number] = row
    return list(rows.values())


# Progress in a terminal


def gib(n_bytes: float) -> str:
    """Bytes as text in GiB, or in MiB below one GiB."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def clock_time(seconds: float) -> str:
    """Seconds as ``4.2 s``, ``3:07`` (minutes) or ``1:02:03`` (hours)."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _summary(metrics: Metrics) -> str:
    shown: list[tuple[str, str, Callable[[Any], str]]] = [
        ("reward", "reward {}", "{:.2f}".format),
        ("accuracy", "accuracy {}", "{:.0%}".format),
        ("tokens_per_second", "{} tokens/s", "{:.0f}".format),
        ("rss_bytes", "memory {}", gib),
    ]
    return "  ".join(
        text.format(form(metrics[key])) for key, text, form in shown if metrics.get(key) is not None
    )


@dataclass
class _Phase:
    """What is being counted: a training stage, or the items of an evaluation."""

    name: str
    total: int | None
    started: float
    first: int = 0  # steps a resumed run had done before: no evidence of speed
    done: int = 0
    task: TaskID | None = None

    def position(self, now: float) -> str:
        if self.total is None:
            return str(self.done)
        text = f"{self.done}/{self.total}"
        if self.first < self.done < self.total:
            pace = (now - self.started) / (self.done - self.first)
            text += f"  {clock_time(pace * (self.total - self.done))} left"
        return text


READINGS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("reward", "reward", "{:.2f}".format),
    ("accuracy", "accuracy", "{:.0%}".format),
    ("kl", "KL, nats/token", "{:.4f}".format),
    ("entropy", "entropy, nats/token", "{:.3f}".format),
    ("clip_fraction", "clipped tokens", "{:.1%}".format),
    ("completion_length", "length, tokens", "{:.0f}".format),
    ("frac_zero_std", "zero-variance groups", "{:.0%}".format),
    ("tokens_per_second", "rollout tokens/s", "{:.0f}".format),
    ("rss_bytes", "memory", gib),
    ("cpu_percent", "CPU (100 % a core)", "{:.0f} %".format),
]
"""What is shown of a step, here and in the notebook: the metric, its name, how to write it."""


def readings(metrics: Metrics) -> list[tuple[str, str]]:
    """Name and text of every metric of ``READINGS``; a dash for what was not measured."""
    return [
        (name, "–" if metrics.get(key) is None else form(metrics[key]))
        for key, name, form in READINGS
    ]


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
            sample = self.latest.get("sample")
            if sample:
                verdict = {True: "right: ", False: "wrong: ", None: ""}[sample["correct"]]
                lines = f"{sample['prompt']} -> {verdict}{sample['completion']}".split("\n")
                line = " | ".join(part.strip() for part in lines if part.strip())
                yield Text(line, no_wrap=True, overflow="ellipsis", style="dim")
        yield self.make_tasks_table(self.tasks)


class ProgressDisplay:
    """Progress of a run: a live bar in a terminal or notebook, plain lines elsewhere.

    In a pipe or in CI it prints a line when a phase begins, at most one every
    ``interval`` seconds while it goes on, and one when it is complete. ``quiet``
    prints nothing. Writes to stderr, so that stdout stays free for results.

    >>> with ProgressDisplay() as display:                      # doctest: +SKIP
    ...     display.start_stage("basic", steps=120)
    ...     display.update(1, reward=0.4, accuracy=0.3)
    ...     for problem in display.track(problems, "evaluating"):
    ...         ...
    """

    def __init__(
        self,
        quiet: bool = False,
        console: Console | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.console = Console(quiet=True) if quiet else console or Console(stderr=True)
        self.interval = interval
        self._clock = clock
        self._last_line = -math.inf
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the clock
        self._stage: _Phase | None = None
        self._bars: LivePanel | None = None
        if not quiet and (self.console.is_terminal or self.console.is_jupyter):
            self._bars = LivePanel(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
                console=self.console,
                refresh_per_second=4,
            )

    def __enter__(self) -> ProgressDisplay:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def message(self, text: str) -> None:
        """Print one line now, above the bar if there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start_stage(self, name: str, steps: int, done: int = 0) -> None:
        """Begin a stage of ``steps`` optimizer steps, ``done`` of them in an earlier run."""
        self._stage = self._begin(name, steps, done)

    def update(self, step: int, **metrics: Any) -> None:
        """Show that ``step`` steps of the stage are complete, and the latest metrics."""
        if self._stage is None:
            raise UserError("progress was updated before a stage began; call start_stage first")
        self._stage.done = step
        metrics.setdefault("rss_bytes", self.rss_bytes())
        if self._bars:
            self._bars.latest = metrics
            self._show(self._stage)
            return
        self._show(self._stage, _summary(metrics))

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

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        """Yield the items of an evaluation or a Fisher pass while showing how far it is."""
        if total is None and isinstance(iterable, Sequence):
            total = len(iterable)
        phase = self._begin(description, total)
        for item in iterable:
            yield item
            phase.done += 1
            self._show(phase)

    def _begin(self, name: str, total: int | None, done: int = 0) -> _Phase:
        phase = _Phase(name, total, self._clock(), first=done, done=done)
        if self._bars:
            phase.task = self._bars.add_task(name, total=total, completed=done, text="")
        else:
            self._print_line(f"{name}: begins")
        return phase

    def _show(self, phase: _Phase, text: str = "") -> None:
        now = self._clock()
        text = "  ".join(part for part in (phase.position(now), text) if part)
        if self._bars and phase.task is not None:
            self._bars.update(phase.task, completed=phase.done, text=text)
        elif phase.done == phase.total or now - self._last_line >= self.interval:
            self._print_line(f"{phase.name}: {text}")

    def _print_line(self, text: str) -> None:
        self._last_line = self._clock()
        self.message(text)


# Plots


@dataclass
class Plot:
    """A figure with the text that replaces it for who cannot see it.

    Displays itself in a notebook, alternative text included.
    """

    figure: Figure
    alt: str

    def png(self, dpi: int = 144) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=dpi)
        return buffer.getvalue()

    def base64(self, dpi: int = 144) -> str:
        return base64.b64encode(self.png(dpi)).decode("ascii")

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        data = {"image/png": self.base64(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own (inches): no pyplot, so no global state and no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Any, title: str = "", x: str = "", y: str = "", grid: str = "y") -> None:
    """Label the axes and leave out what carries no data."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis=grid, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


_PANELS = [
    # metric, title, unit of the axis, number in words, factor to the unit
    ("reward", "Reward", "mean over completions", "{:.2f}", 1.0),
    ("accuracy", "Accuracy of samples", "share right", "{:.2f}", 1.0),
    ("completion_length", "Completion length", "tokens", "{:.1f}", 1.0),
    ("kl", "KL to the reference", "nats per token", "{:.4f}", 1.0),
    ("entropy", "Entropy", "nats per token", "{:.3f}", 1.0),
    ("loss", "Loss", "loss", "{:.4f}", 1.0),
    ("clip_fraction", "Clip fraction", "share of tokens", "{:.3f}", 1.0),
    ("frac_zero_std", "Zero-variance groups", "share of groups", "{:.2f}", 1.0),
    ("tokens_per_second", "Rollout speed", "tokens per second", "{:.0f}", 1.0),
    ("rss_bytes", "Memory", "GiB", "{:.2f}", 2.0**-30),
    ("cpu_percent", "CPU", "% of one core", "{:.0f}", 1.0),
]


def plot_learning(metrics: Sequence[Metrics], most: int = 4, columns: int = 2) -> Plot:
    """Learning curves over all steps: the first ``most`` of reward, accuracy, ... recorded.

    Thin lines are single steps, thick ones running means over a twentieth of the
    run; the band is one standard deviation of the reward; dashed lines separate stages.
    """
    import numpy as np

    def series(key: str) -> Any:
        values = [row.get(key) for row in metrics]
        return np.array([math.nan if v is None else float(v) for v in values])

    panels = [p for p in _PANELS if not np.isnan(series(p[0])).all()][:most]
    if not panels:
        figure = new_figure(7, 1.2)
        alt = "No learning curves: no step has been recorded."
        figure.text(0.5, 0.5, alt, ha="center", va="center")
        return Plot(figure, alt)

    steps = np.arange(1, len(metrics) + 1)
    stages = [str(row.get("stage", "")) for row in metrics]
    borders = [i for i in range(1, len(stages)) if stages[i] != stages[i - 1]]
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(3.7 * columns, 2.4 * rows)
    sentences = []
    for index, (key, title, unit, form, factor) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        values = factor * series(key)
        window = max(1, len(values) // 20)
        smooth = np.array(
            [_mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
        )
        if key == "reward":
            sd = series("reward_std")
            axes.fill_between(steps, values - sd, values + sd, color=BLUE, alpha=0.12, lw=0)
        axes.plot(steps, values, color=BLUE, alpha=0.4, lw=0.8)
        axes.plot(steps, smooth, color=BLUE, lw=2, marker="o" if len(steps) == 1 else None)
        for i, start in enumerate([0, *borders]):
            if start:
                axes.axvline(start + 0.5, color=GREY, ls="--", lw=0.8)
            if index and columns > 2:
                continue  # small panels: the names of the stages once
            axes.annotate(
                stages[start],
                (start + 1, 1),
                xycoords=("data", "axes fraction"),
                xytext=(2, -2 - 9 * (i % 2)),
                textcoords="offset points",
                fontsize=8,
                color=GREY,
                va="top",
            )
        tidy(axes, title, "optimizer step", unit)
        axes.locator_params(axis="x", integer=True)
        seen = values[~np.isnan(values)]
        tenth = max(1, len(seen) // 10)
        first, last = form.format(seen[:tenth].mean()), form.format(seen[-tenth:].mean())
        low, high = form.format(seen.min()), form.format(seen.max())
        sentences.append(
            f"{title} ({unit}) went from {first} in the first tenth to {last} in the last tenth, "
            f"between {low} and {high}."
        )
    order = ", ".join(f"{stages[i]} from step {i + 1}" for i in [0, *borders] if stages[i])
    alt = f"Line charts over {len(metrics)} optimizer steps" + (f" ({order})" if order else "")
    return Plot(figure, f"{alt}. {' '.join(sentences)}")


def _mean(values: Any) -> float:
    """Mean of what is not NaN (NaN if nothing is, without NumPy's warning)."""
    known = values[values == values]
    return float(known.mean()) if known.size else math.nan
