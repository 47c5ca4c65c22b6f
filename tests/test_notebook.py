"""The notebooks' helpers: head, figures, sliders, quizzes."""

from __future__ import annotations

import base64
import os
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from cpugrpo_edu import notebook
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.notebook import (
    Question,
    begin,
    explore,
    head,
    measured,
    model_for,
    quiz,
    show,
    stored_questions,
)
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.palette import Plot, new_figure


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: found.append((a, k)))
    return found


@pytest.fixture
def records(tmp_path, monkeypatch):
    folder = tmp_path / "records"
    monkeypatch.setattr(notebook, "records_folder", lambda: folder)
    return folder


def store(folder, seconds=41.6, peak=812 * 2**20):
    RunRecord(
        "notebook",
        "2026-01-02T03:04:05+00:00",
        0,
        "c",
        {"cpu": "A Chip", "usable_cores": 2},
        {},
        {},
        {"seconds": seconds, "peak_rss_bytes": peak},
    ).save(folder / "notebooks" / "07_trl.json")


def test_head_takes_time_and_memory_from_the_record(records):
    assert "not measured" in measured("07_trl")
    store(records)
    text = head("07_trl")
    assert "42 s and 812 MiB" in text and "2 cores of A Chip (2026-01-02)" in text
    assert "torch" in text and "trl" in text


def test_begin_shows_the_head_and_checks_the_tier(records, shown, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    begin("07_trl")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE", "the user's choice stays"
    [((markdown,), _)] = shown
    assert "Versions here" in markdown.data
    with pytest.raises(UserError, match="'HUGE'"):
        begin("07_trl", "HUGE")


def test_begin_says_when_the_full_model_is_missing(records, shown, monkeypatch):
    monkeypatch.delenv("CPUGRPO_FULL_MODEL", raising=False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: None)
    begin("07_trl", "FULL")
    assert "was not found" in shown[1][0][0].data
    monkeypatch.setenv("CPUGRPO_FULL_MODEL", "/mine")
    shown.clear()
    begin("07_trl", "FULL")
    assert len(shown) == 1


def test_the_full_model_is_looked_for_and_never_downloaded(monkeypatch):
    assert model_for("SMOKE") == "bundled"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: None)
    assert model_for("FULL") is None
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: "/q/config.json")
    assert model_for("FULL") == "/q"
    monkeypatch.setenv("CPUGRPO_FULL_MODEL", "/mine")
    assert model_for("FULL") == "/mine"
    with pytest.raises(UserError, match="tier"):
        model_for("LARGE")


def test_show_carries_the_alternative_text(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: shown.append((a, k)))
    plot = Plot(Figure(figsize=(1, 1)), "a figure of nothing")
    show(plot)
    show(Figure(figsize=(1, 1)), alt="an empty square")
    show(plot, alt="said otherwise")
    alts = [k["metadata"]["image/png"]["alt"] for _, k in shown]
    assert alts == [plot.alt, "an empty square", "said otherwise"]
    assert base64.b64decode(shown[1][0][0]["image/png"]).startswith(b"\x89PNG")
    with pytest.raises(UserError, match="alternative text"):
        show(Figure(), alt=" ")
    with pytest.raises(UserError, match="alternative text"):
        show(Figure())


def line(slope):
    figure = new_figure(2, 1)
    figure.subplots().plot([0, 1], [0, slope])
    return figure


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_a_slider_is_a_widget_and_a_page_without_a_kernel(shown):
    explore(line, [0.5, 1.0, 2.0], "slope of <line>", alt=lambda v: f"a line of slope {v}")
    [((data,), _)] = shown
    assert "application/vnd.jupyter.widget-view+json" in data
    parser = Tags()
    parser.feed(data["text/html"])
    images = [a for tag, a in parser.found if tag == "img"]
    assert [a["alt"] for a in images] == [f"a line of slope {v}" for v in (0.5, 1.0, 2.0)]
    assert ["display:none" in a["style"] for a in images] == [True, False, True]
    assert "run the cell for a slider" in data["text/html"]  # until the script shows it
    [slider] = [a for tag, a in parser.found if tag == "input"]
    assert (slider["max"], slider["value"]) == ("2", "1")
    assert "slope of &lt;line&gt;" in data["text/html"]
    assert not re.search(r"https?://", data["text/html"])


def test_moving_the_live_slider_changes_picture_and_words():
    frames = [("UE5H", "flat"), ("SlBH", "steep & high"), ("R0lG", "steeper")]
    box = notebook.slider_widget(frames, ["1", "2", "3"], "slope", 0)
    slider, picture = box.children
    assert "UE5H" in picture.value and 'alt="flat"' in picture.value
    slider.index = 1
    assert "SlBH" in picture.value and 'alt="steep &amp; high"' in picture.value


def test_a_slider_needs_positions_and_words():
    with pytest.raises(UserError, match="no values"):
        explore(line, [], "slope", alt="a line")
    with pytest.raises(UserError, match="alternative text"):
        explore(line, [1], "slope")


def test_a_plot_brings_its_own_words(shown):
    explore(lambda v: Plot(line(v), f"slope {v}"), [1, 2], "slope")
    assert "slope 2" in shown[0][0][0]["text/html"]


def test_a_quiz_explains_every_answer(monkeypatch):
    asked = []
    monkeypatch.setattr("jupyterquiz.display_quiz", lambda entries, **k: asked.extend(entries))
    quiz(Question("Two and two?", right=("4", "count"), wrong=[("5", "one too many")]))
    [entry] = asked
    assert [(a["answer"], a["correct"], a["feedback"]) for a in entry["answers"]] == [
        ("4", True, "count"),
        ("5", False, "one too many"),
    ]
    with pytest.raises(UserError, match="explanation"):
        quiz(Question("Two and two?", right=("4", "count"), wrong=[("5", "")]))
    with pytest.raises(UserError, match="wrong answer"):
        quiz(Question("Two and two?", right=("4", "count"), wrong=[]))


def test_a_name_stands_for_the_stored_questions(monkeypatch):
    asked = []
    monkeypatch.setattr("jupyterquiz.display_quiz", lambda entries, **k: asked.extend(entries))
    quiz("04_rewards")
    assert [e["question"] for e in asked] == [q.text for q in stored_questions("04_rewards")]
    with pytest.raises(UserError, match="'99_nothing'; allowed are .*04_rewards"):
        quiz("99_nothing")
