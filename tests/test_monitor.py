"""Metrics that survive a crash, progress in and out of terminals, plots with alt text."""

from __future__ import annotations

import io
import math
import sys
import time
from unittest import mock

import numpy as np
import pytest
from rich.console import Console

from cpugrpo_edu.engine.memory import release_memory
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.evaluate import evaluate
from cpugrpo_edu.record.metrics import MetricsLog, read_metrics
from cpugrpo_edu.sample import Sampling, draw
from cpugrpo_edu.show.plots import plot_learning
from cpugrpo_edu.show.progress import ProgressDisplay
from cpugrpo_edu.show.text import clock_time, gib
from cpugrpo_edu.tasks import make_problems

# Metrics on disk


def test_metrics_round_trip(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"stage": "basic", "step": 1, "reward": np.float32(0.5), "kl": math.nan})
        # On disk already, before the file is closed:
        assert read_metrics(path)[0]["reward"] == 0.5
        log.write({"stage": "basic", "step": 2, "loss": math.inf, "time": 3.0})
    first, second = read_metrics(path)
    assert first["kl"] is None and abs(first["time"] - time.time()) < 60
    assert second == {"stage": "basic", "step": 2, "loss": None, "time": 3.0}
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_every_possible_crash_leaves_whole_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "reward": 0.5}\n'
    half = '{"step": 2, "reward": 0.25}\n'
    for cut in range(len(half)):
        path.write_text(whole + half[:cut])
        assert [row["step"] for row in read_metrics(path)][:1] == [1]
        with MetricsLog(path) as log:
            log.write({"step": 2, "reward": 0.75})
        assert [row["reward"] for row in read_metrics(path)] == [0.5, 0.75]


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for stage, step, reward in [
            ("a", 1, 0),
            ("a", 2, 1),
            ("b", 1, 2),
            ("b", 2, 3),
            ("b", 1, 4),
        ]:
            log.write({"stage": stage, "step": step, "reward": reward})
        log.write({"note": 1})
        log.write({"note": 2})
    rows = read_metrics(path)
    assert [r["reward"] for r in rows if "reward" in r] == [0, 1, 4, 3] and len(rows) == 6


def test_reading_refuses_what_is_no_metrics_file(tmp_path):
    with pytest.raises(UserError, match="cannot read metrics"):
        read_metrics(tmp_path / "none.jsonl")
    for bad in ("nonsense", "[1]", "3"):
        path = tmp_path / "bad.jsonl"
        path.write_text(f'{bad}\n{{"step": 1}}\n')
        with pytest.raises(UserError, match="line 1 of"):
            read_metrics(path)
    path.write_bytes(b'{"step": 1}\n\xff\xfe')
    assert read_metrics(path) == [{"step": 1}]


# Progress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def display_to_pipe(**options):
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=False, width=40)
    return ProgressDisplay(console=console, clock=clock, **options), out, clock


def test_a_pipe_gets_a_plain_line_for_every_step_and_few_for_an_evaluation():
    display, out, clock = display_to_pipe()
    with display:
        display.start_stage("basic", steps=100)
        for step in range(1, 101):
            clock.now += 1.5
            display.update(step, reward=step / 100, accuracy=0.256, tokens_per_second=310.4)
        done = display.counter("evaluate", 100)
        for _ in range(100):
            clock.now += 1.5  # 150 seconds in all
            done(1)
    lines = out.getvalue().splitlines()
    assert lines[0] == "basic: begins" and len(lines) == 101 + 6  # at 30, 60 .. and 150 s
    assert lines[20].startswith("basic: 20/100  2:00 left  reward 0.20  accuracy 26%  310 tokens/s")
    assert "memory" in lines[1] and "\x1b" not in out.getvalue()
    assert lines[100].startswith("basic: 100/100  reward 1.00")


def test_an_answer_is_one_short_line_without_control_characters():
    display, out, _ = display_to_pipe()
    sample = {"prompt": "Why?", "completion": "1+1=2\n\n#### 2\x1b[31m", "correct": True}
    display.answer("basic, before training", sample)
    display.answer("x", {**sample, "completion": 900 * "y", "correct": False})
    first, second = out.getvalue().splitlines()
    assert first == "basic, before training: Why? -> right: 1+1=2 | #### 2\ufffd[31m"
    assert second == "x: " + ("Why? -> wrong: " + 900 * "y")[:500] + "…"


def test_a_resumed_stage_judges_speed_by_its_own_steps():
    display, out, clock = display_to_pipe(interval=0)
    display.start_stage("advanced", steps=100, done=90)
    clock.now += 4
    display.update(92, rss_bytes=2**20)
    assert out.getvalue().splitlines()[-1] == "advanced: 92/100  16.0 s left  memory 1 MiB"


def test_a_counter_counts_what_is_reported_done():
    display, out, clock = display_to_pipe(interval=1)
    done = display.counter("evaluate before", 10)
    for more in (2, 3, 0, 5):
        clock.now += 2
        done(more)
    assert out.getvalue().splitlines() == [
        "evaluate before: begins",
        "evaluate before: 2/10  8.0 s left",
        "evaluate before: 5/10  4.0 s left",
        "evaluate before: 5/10  6.0 s left",
        "evaluate before: 10/10",
    ]
    # A stage that is running beside it keeps its own count.
    display.start_stage("basic", steps=4)
    display.counter("Fisher", 2)(2)
    display.update(4)
    assert out.getvalue().splitlines()[-1].startswith("basic: 4/4")


def test_an_evaluation_of_ten_minutes_in_one_batch_shows_how_far_it_is(tiny_policy):
    """The engine reports within the batch; by our clock a token takes five seconds."""
    display, out, clock = display_to_pipe()
    problems = make_problems("arithmetic", "basic", "eval", 30)

    def slow(*arguments):
        clock.now += 5
        return draw(*arguments)

    with (
        mock.patch("cpugrpo_edu.engine.decode.draw", slow),
        mock.patch.object(type(tiny_policy), "eos_ids", set()),
    ):
        bar = display.counter("evaluate", len(problems))
        evaluate(tiny_policy, problems, "x", Sampling(120, temperature=0.0), bar)
    lines = out.getvalue().splitlines()
    assert lines[0] == "evaluate: begins" and lines[-1] == "evaluate: 30/30"
    assert 15 <= len(lines) <= 22  # 600 seconds, a line every 30 to 40
    assert lines[len(lines) // 2].startswith("evaluate: 1") and lines[5].endswith(" left")


def test_a_long_step_shows_its_parts_and_a_short_one_does_not():
    display, out, clock = display_to_pipe()
    display.part("rollouts", 1, 8)  # before any stage: nothing
    display.start_stage("basic", steps=2)
    for done in range(1, 9):
        clock.now += 1
        display.part("rollouts", done, 8)
    display.update(1, rss_bytes=0)
    assert out.getvalue().splitlines() == ["basic: begins", "basic: 1/2  8.0 s left  memory 0 MiB"]
    for done in range(1, 9):
        clock.now += 20
        display.part("rollouts", done, 8)
    assert out.getvalue().splitlines()[2:] == [
        "basic 1/2: rollouts 2/8  2:00 left",
        "basic 1/2: rollouts 4/8  1:20 left",
        "basic 1/2: rollouts 6/8  40.0 s left",
        "basic 1/2: rollouts 8/8",
    ]


def test_resident_memory_is_in_bytes_and_grows():
    display, *_ = display_to_pipe()
    release_memory()  # else what other tests left may be collected, or used, in between
    before = display.rss_bytes()
    held = np.ones(8 * 2**20)  # 64 MiB
    assert isinstance(before, int) and display.rss_bytes() - before > 32 * 2**20
    assert held.all()


def test_messages_are_not_markup():
    display, out, _ = display_to_pipe()
    display.message("[bold]x[/bold] " + 60 * "y")
    assert out.getvalue() == "[bold]x[/bold] " + 60 * "y" + "\n"


def test_quiet_prints_nothing(capsys):
    with ProgressDisplay(quiet=True, console=Console(force_terminal=True)) as display:
        display.start_stage("basic", steps=1)
        display.update(1)
        display.message("x")
        display.counter("evaluating", 1)(1)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_live_bar_and_messages_above_it():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with ProgressDisplay(console=console) as display:
        display.start_stage("[basic]", steps=2)
        display.update(1, reward=0.25)
        display.message("a message")
        display.counter("evaluating", 2)(2)
        display.update(2, reward=0.75)
    text = out.getvalue()
    assert "[basic]" in text and "reward: 0.75" in text and "2/2" in text and "evaluating" in text
    assert "a message" in text and "\x1b" in text


def test_the_display_ends_when_the_run_fails():
    out = io.StringIO()
    display = ProgressDisplay(console=Console(file=out, force_terminal=True))
    with pytest.raises(ZeroDivisionError), display:
        display.start_stage("basic", steps=2)
        raise ZeroDivisionError
    assert out.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_update_needs_a_stage():
    with pytest.raises(RuntimeError, match="start_stage"):
        ProgressDisplay(quiet=True).update(1)


def test_units():
    assert [clock_time(s) for s in (0.04, 59.9, 63, 187, 3723)] == [
        "0.0 s",
        "59.9 s",
        "1:03",
        "3:07",
        "1:02:03",
    ]
    assert (gib(2**29), gib(3 * 2**29)) == ("512 MiB", "1.50 GiB")


# Plots


def rows(n, **extra):
    return [
        {"stage": "a" if i < n / 2 else "b", "reward": i / n + 0.013, **extra} for i in range(n)
    ]


def test_learning_curves_show_what_was_recorded():
    plot = plot_learning(rows(100, reward_std=0.1, kl=0.5, loss=None, entropy=2.0))
    assert [axes.get_title(loc="left") for axes in plot.figure.axes] == [
        "Reward",
        "KL to the reference",
        "Entropy",
    ]
    assert "over 100 optimizer steps (a from step 1, b from step 51)" in plot.alt
    # the means of 0.013 ... 0.103 and of 0.913 ... 1.003
    assert "went from 0.06 in the first tenth to 0.96 in the last" in plot.alt
    assert all(axes.get_ylabel() for axes in plot.figure.axes)
    data, metadata = plot._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == plot.alt == data["text/plain"]


def test_learning_curves_of_little():
    assert "no step" in plot_learning([]).alt
    assert "no step" in plot_learning([{"step": 1, "reward": None}]).alt
    one = plot_learning([{"reward": 0.5}])
    assert "from 0.50" in one.alt and one.png(dpi=30).startswith(b"\x89PNG")
    gap = plot_learning([{"reward": 0.5}, {"kl": 1.0}, {"reward": 0.7}])
    assert "between 0.50 and 0.70" in gap.alt


def test_the_terminal_shows_every_metric_and_a_completion():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with ProgressDisplay(console=console) as display:
        display.start_stage("basic", steps=4)
        display.update(
            2,
            reward=0.5,
            accuracy=0.25,
            entropy=0.125,
            clip_fraction=0.031,
            completion_length=17.2,
            frac_zero_std=0.5,
            tokens_per_second=310.4,
            rss_bytes=2**30,
            cpu_percent=180.0,
            sample={"prompt": "Compute 1+1.", "completion": "1+1=3\n#### 3", "correct": False},
        )
    text = out.getvalue()
    for part in (
        *("basic", "2/4", "reward: 0.50", "accuracy: 25%", "KL, nats/token: –"),
        *("entropy, nats/token: 0.125", "clipped tokens: 3.1%", "length, tokens: 17"),
        *("zero-variance groups: 50%", "tokens/s: 310", "memory: 1.00 GiB", "180 %"),
        "Compute 1+1. -> wrong: 1+1=3 | #### 3",
    ):
        assert part in text, part


def test_import_is_light():
    """Neither torch nor pyplot is needed to watch a run."""
    import subprocess

    code = (
        "import sys, cpugrpo_edu.show.report; "
        "print(*[m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
