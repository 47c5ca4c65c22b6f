"""The dashboard: every button acts on a real run; what is shown is what was recorded."""

from __future__ import annotations

import json
import sys
import threading
import time

import pytest
from lab_fixtures import until

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.notebook.dashboard import Dashboard, numbers_html, samples_html, train, watch
from cpugrpo_edu.record.metrics import read_metrics
from cpugrpo_edu.run.config import RunConfig, config_for
from cpugrpo_edu.run.pause import Control
from cpugrpo_edu.run.pipeline import Interrupted, run

SMALL = {
    "steps": (2, 2, 2),
    "prompts_per_step": 4,
    "num_generations": 4,
    "max_completion": 48,
    "per_cell": 2,
    "fisher_examples": 4,
    "int8_evaluation": False,
    "patience": 0,
    "threads": 1,
}


def steps(folder):
    path = folder / "metrics.jsonl"
    return len(read_metrics(path)) if path.exists() else 0


# Control


def test_control_waits_while_paused_and_reports_a_stop():
    control = Control()
    assert control.should_stop() is False
    control.pause()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(control.should_stop()))
    thread.start()
    until(lambda: control.waiting)
    assert not answers
    control.go_on()
    thread.join()
    assert answers == [False] and not control.waiting
    control.pause()
    control.stop()
    assert control.should_stop() is True and not control.paused


def test_a_stop_before_the_first_step_is_resumable(tmp_path):
    """While groups are sampled to find a signal; and then during the evaluation."""
    control = Control()
    control.stop()
    with pytest.raises(Interrupted, match="before the first step"):
        run(RunConfig(**SMALL), tmp_path / "run", control=control)
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    state["signals"] = {"basic": None}  # known already
    (tmp_path / "run" / "state.json").write_text(json.dumps(state))
    with pytest.raises(Interrupted, match="evaluating 'before'"):
        run(RunConfig(**SMALL), tmp_path / "run", resume=True, control=control)
    assert not steps(tmp_path / "run")


def test_a_notebook_gets_the_defaults_of_its_kind_of_model(tmp_path, monkeypatch):
    monkeypatch.setattr(Dashboard, "begin", lambda self, resume: None)
    found = train(tmp_path / "run", model="smollm2", per_cell=3)
    assert found.config == config_for("smollm2", per_cell=3)


# The buttons, on a run


@pytest.mark.slow
def test_pause_go_on_stop_and_resume_act_on_the_run(tmp_path):
    folder = tmp_path / "run"
    dashboard = train(folder, **SMALL)
    dashboard.interval = 0.05
    assert dashboard.resume.disabled and not dashboard.stop.disabled
    until(lambda: steps(folder) >= 1)
    dashboard.pause.value = True
    assert dashboard.pause.description == "Continue"
    until(lambda: dashboard.control.waiting)
    done = steps(folder)
    time.sleep(1.5)  # several steps' time
    assert steps(folder) == done and dashboard.running
    dashboard.pause.value = False
    assert dashboard.pause.description == "Pause"
    until(lambda: steps(folder) > done or not dashboard.running)
    dashboard.stop.click()
    dashboard.wait(120)
    assert not dashboard.running and isinstance(dashboard.error, Interrupted)
    assert "Press Resume to continue" in dashboard.status.value
    assert not (folder / "record.json").exists()
    assert not dashboard.resume.disabled and dashboard.stop.disabled and dashboard.pause.disabled
    dashboard.resume.click()
    dashboard.wait(300)
    assert dashboard.error is None and dashboard.record is not None
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # none twice, none missing
    assert "Complete" in dashboard.status.value and dashboard.resume.disabled
    assert {"clip_fraction", "frac_zero_std", "cpu_percent", "rss_bytes"} <= rows[-1].keys()
    assert rows[-1]["sample"]["completion"].strip() in dashboard.samples.value.replace("&gt;", ">")


def test_a_mistake_in_the_settings_is_said_in_the_status(tmp_path):
    dashboard = train(tmp_path / "run", **{**SMALL, "temperature": -1.0})
    dashboard.wait(60)
    assert "temperature is -1.0" in dashboard.status.value and not dashboard.running
    assert dashboard.stop.disabled and isinstance(dashboard.error, UserError)
    with pytest.raises(UserError, match="'colour'"):
        train(tmp_path / "other", colour=1)
    with pytest.raises(UserError, match="not both"):
        train(tmp_path / "other", RunConfig(), seed=1)


# Looking at a run of another process


def test_watch_follows_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    dashboard = watch(tmp_path, interval=0.01)
    assert "Waiting" in dashboard.status.value
    assert dashboard.status is dashboard.widget.children[0]  # no buttons: the run is not ours
    path.write_text('{"half')
    dashboard.refresh()
    assert not dashboard.plots.value
    path.write_text(json.dumps({"stage": "<b>", "step": 7, "reward": 0.5}) + "\n")
    until(lambda: "img" in dashboard.plots.value)
    until(lambda: "&lt;b&gt;, step 7" in dashboard.status.value)  # which is written after the plots
    assert 'alt="Line charts' in dashboard.plots.value
    with path.open("a") as file:
        file.write(json.dumps({"stage": "<b>", "step": 8, "reward": 0.6, "kl": 0.1}) + "\n")
    until(lambda: "step 8" in dashboard.status.value)
    dashboard.close()
    until(lambda: not dashboard._watch.is_alive())


def test_numbers_say_what_was_not_measured():
    shown = numbers_html({"stage": "basic", "step": 1, "reward": 0.25})
    assert "reward: <b>0.25</b>" in shown and "clipped tokens: <b>–</b>" in shown
    assert "KL is not measured while beta is 0" in shown
    assert "not measured" not in numbers_html({"kl": 0.1})


def test_samples_are_the_latest_with_their_verdict():
    rows = [
        {"step": i, "sample": {"prompt": "<i>", "completion": f"c{i}", "correct": correct}}
        for i, correct in enumerate([True, True, False, None])
    ]
    shown = samples_html(rows)
    assert "c3" in shown and "c1" in shown and "c0" not in shown and "<i>" not in shown
    assert shown.index("c3") < shown.index("c1")
    assert "✓ right" in shown and "✗ wrong" in shown and "not judged" in shown


def test_dashboard_without_ipywidgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(UserError, match="pip install ipywidgets"):
        Dashboard("runs/first")


# Trackers


def test_a_missing_tracker_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        run(RunConfig(**SMALL), tmp_path / "run", report_to="tensorboard")
    with pytest.raises(
        UserError, match="unknown --report-to 'paper'; allowed are none, tensorboard"
    ):
        run(RunConfig(**SMALL), tmp_path / "run", report_to="paper")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_tensorboard_gets_every_step(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(RunConfig(**{**SMALL, "per_cell": 0}), tmp_path / "run", report_to="tensorboard")
    for stage in ("basic", "intermediate", "advanced"):
        events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard" / stage))
        events.Reload()
        assert [event.step for event in events.Scalars("train/reward")] == [1, 2]
