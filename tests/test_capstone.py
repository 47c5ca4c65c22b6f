"""Chapter 17: its pictures say their numbers, and its checker finds what is missing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cpugrpo_edu.notebook import capstone_plots
from cpugrpo_edu.notebook.submission import CARD_FIELDS, check_submission
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.record.stats import wilson_interval

JUDGE = "def good(problem, text):\n    return text == '#### 1'\n\n\n"
JUDGE += "def generous(problem, text):\n    return '#' in text\n"


def test_pictures_say_their_numbers():
    assert "mixed" in capstone_plots.signal_plot(2).figure.axes[0].get_ylabel()
    assert "50% at 0.5" in capstone_plots.signal_plot(2, (0.1, 0.5, 0.9)).alt  # 1 - 2 / 4
    some = np.array([[1.0, 0.0], [1.0, 1.0]])
    alt = capstone_plots.pilot_plot({"basic": some}, {"basic": some / 2}, ["three"]).alt
    w = wilson_interval(3, 4)
    assert (
        f"three: 75% right ({w.low:.0%} to {w.high:.0%})" in alt and "50% exact, 50% graded" in alt
    )
    arms = {"one": [[0.25, 0.5]], "other": [[0.75]]}
    plot = capstone_plots.ends_plot([0.5], arms, ["three"])
    assert "three: start 0.50, one 0.25, 0.50, other 0.75" in plot.alt
    labels = [text.get_text() for text in plot.figure.axes[0].get_legend().get_texts()]
    assert labels == ["start", "one", "other"]


@pytest.fixture
def handed_in(tmp_path):
    """A folder in which everything holds."""
    plan = {"arms": ["good", "fine"], "seeds": [1, 2], "written": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "judge.py").write_text(JUDGE + "\n\nfine = good\n")
    rows = [json.dumps({"prompt": f"Say {i}."}) for i in range(100)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    (tmp_path / "card.md").write_text("\n".join(f"**{field}.** x" for field in CARD_FIELDS))
    for arm in plan["arms"]:
        for seed in plan["seeds"]:
            config = {"verifier": arm, "seed": seed, "steps": 6}
            results = {"weights_changed": {"changed": True}}
            record = RunRecord("run", "2026-01-02", seed, "abc", {}, {}, config, results)
            (tmp_path / "runs" / f"{arm}-{seed}").mkdir(parents=True)
            record.save(tmp_path / "runs" / f"{arm}-{seed}" / "record.json")
    return tmp_path


def broken(folder):
    return {finding for finding, holds in check_submission(folder) if not holds}


def test_a_complete_folder_has_no_faults(handed_in):
    assert broken(handed_in) == set()


def change_plan(folder, **changes):
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | changes))


def test_each_fault_is_found_and_no_other(handed_in):
    card = (handed_in / "card.md").read_text()
    (handed_in / "card.md").write_text(card.replace("**Damage.** x", ""))
    assert broken(handed_in) == {"the card has all fields"}
    (handed_in / "card.md").write_text(card + " word" * 400)
    assert broken(handed_in) == {"the card fits on a page"}
    (handed_in / "card.md").write_text(card)
    change_plan(handed_in, written="2026-01-03T00:00:00+00:00")
    assert broken(handed_in) == {"plan older than every run"}
    change_plan(handed_in, written="2026-01-01T00:00:00+00:00")
    path = handed_in / "runs" / "good-1" / "record.json"
    record = RunRecord.load(path)
    record.config["steps"] = 12
    record.save(path)
    assert broken(handed_in) == {"arms differ in judge and seed only"}
    path.unlink()
    assert broken(handed_in) == {"a record for every planned run"}


def test_a_judge_that_pays_for_nonsense_is_found(handed_in):
    (handed_in / "judge.py").write_text(JUDGE + "\n\nfine = generous\n")
    assert broken(handed_in) == {"judge fine gives nonsense nothing"}
