"""The concept inventory: its items, the form without a key, and what the analysis recovers."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
from typer.testing import CliRunner

from cpugrpo_edu.cli import assign
from cpugrpo_edu.course import inventory
from cpugrpo_edu.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
BANK = ROOT / "notebooks" / "instructor" / "concept_inventory.json"


@pytest.fixture(scope="module")
def bank():
    return inventory.read_bank(BANK)


def test_items_are_in_form(bank):
    assert len(bank.items) >= 20
    used = {name for item in bank.items for name in item.misconceptions if name}
    assert used == set(bank.misconceptions), "a misconception that no choice stands for"
    for about in bank.misconceptions.values():
        assert (ROOT / "notebooks" / f"{about['chapter']}.ipynb").exists(), about
    for item in bank.items:
        assert len(set(item.choices)) == len(item.choices) == 4
        wrong = [name for name in item.misconceptions if name]
        assert len(set(wrong)) == 3, f"{item.id}: two choices for the same misconception"


def test_the_key_gives_no_hint(bank):
    """Neither the letter nor the length of a choice gives the right one away."""
    keys = Counter(item.key for item in bank.items)
    assert max(keys.values()) <= 0.4 * len(bank.items)
    longest = [max(range(4), key=lambda k, item=item: len(item.choices[k])) for item in bank.items]
    hits = sum(inventory.LETTERS[k] == item.key for k, item in zip(longest, bank.items))
    assert hits <= 0.4 * len(bank.items)


def test_students_get_no_key(bank, tmp_path):
    done = CliRunner().invoke(assign.app, ["concepts", str(tmp_path), "--bank", str(BANK)])
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["concepts.ipynb", "concepts.json"]
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    topics = [f'"{item.topic}"' for item in bank.items]
    for secret in ("misconception", *bank.misconceptions, *topics, "correct"):
        # a word of a question or choice is no key
        shown = " ".join(i.question + " ".join(i.choices) for i in bank.items)
        assert text.count(secret) <= shown.count(secret), secret
    plain = inventory.read_bank(tmp_path / "concepts.json")
    assert [i.choices for i in plain.items] == [i.choices for i in bank.items]
    assert all(i.misconceptions == () for i in plain.items)
    nbformat.validate(nbformat.read(tmp_path / "concepts.ipynb", as_version=4))


def test_the_form_saves_what_was_chosen(bank, tmp_path):
    inventory.write_student_version(bank, tmp_path)
    box = inventory.form(tmp_path / "concepts.json", tmp_path)
    code, phase, *_ = box.children
    buttons = [w for w in box.children if type(w).__name__ == "RadioButtons"]
    save, said = box.children[-1].children
    assert len(buttons) == len(bank.items)
    buttons[0].value, buttons[2].value = "b", "d"
    save.click()
    assert "Not saved" in said.value and not list(tmp_path.glob("concepts_*"))
    code.value, phase.value = "AB12", "post"
    save.click()
    [sheet] = inventory.read_sheets(tmp_path, bank)
    assert sheet.answers == {bank.items[0].id: "b", bank.items[2].id: "d"}
    assert (sheet.code, sheet.phase, sheet.simulated) == ("ab12", "post", False)


def sheets_of(bank, gain, students=60, seed=0):
    chances = inventory.simulated_chances(students, len(bank.items), gain, seed)
    return inventory.simulate(bank, chances, seed)


@pytest.mark.slow
@pytest.mark.parametrize("gain", [0.0, 0.3, 0.7])
def test_a_known_gain_is_recovered(bank, gain):
    """Closely in a large class; in small ones the interval covers it about as often as stated."""
    pre, post = inventory.matched(sheets_of(bank, gain, students=3000), bank)
    assert abs(inventory.normalised_gain(pre, post) - gain) < 0.03
    covered = 0
    for seed in range(40):
        pre, post = inventory.matched(sheets_of(bank, gain, 30, seed), bank)
        found = inventory.interval(inventory.normalised_gain, pre, post, resamples=400)
        assert found.low <= found.estimate <= found.high
        covered += found.low <= gain <= found.high
    assert covered >= 33  # 38 expected of 40; fewer than 33 by chance in less than 1 of 200


@pytest.mark.slow
def test_item_indices_are_recovered(bank):
    chances = inventory.simulated_chances(4000, len(bank.items), 0.4)
    pre, _ = inventory.matched(inventory.simulate(bank, chances), bank)
    assert np.abs(inventory.difficulty(pre) - chances["pre"].mean(axis=0)).max() < 0.04
    # an item answered by dice does not go with the others
    dice = chances["pre"].copy()
    dice[:, 4] = 0.25
    diced, _ = inventory.matched(inventory.simulate(bank, chances | {"pre": dice}), bank)
    found = inventory.discrimination(diced)
    assert abs(found[4]) < 0.05 and np.delete(found, 4).min() > 0.1


def test_indices_by_hand():
    right = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=bool)
    # sum of p (1 - p) is 3/16 + 4/16 + 3/16, the variance of 2, 1, 0, 3 is 5/4
    assert inventory.kr20(right) == pytest.approx(1.5 * (1 - (10 / 16) / (5 / 4)))
    rest = np.array([1, 0, 0, 2])
    assert inventory.discrimination(right)[0] == pytest.approx(np.corrcoef(right[:, 0], rest)[0, 1])
    assert np.isnan(inventory.kr20(np.ones((3, 4), dtype=bool)))
    assert np.isnan(inventory.discrimination(np.ones((3, 4), dtype=bool))).all()
    full = np.ones((2, 2), dtype=bool)
    assert np.isnan(inventory.normalised_gain(full, full))
    assert inventory.normalised_gain(right, full[:1]) == 1.0


def test_kr20_of_students_who_guess_is_near_zero(bank):
    rng = np.random.default_rng(0)
    assert abs(inventory.kr20(rng.random((4000, 30)) < 0.25)) < 0.1


def test_a_misconception_is_found(bank):
    """A student who always chooses one misconception is found to have that one and no other."""
    name = "mask-optional"
    sheets = [
        inventory.Sheet(
            "abcd",
            "pre",
            {
                item.id: inventory.LETTERS[item.misconceptions.index(name)]
                if name in item.misconceptions
                else item.key
                for item in bank.items
            },
            bank.name,
            bank.version,
        )
    ]
    shares = inventory.misconceptions(sheets, bank, "pre")
    assert shares[name] == 1 and sum(shares.values()) == 1
    assert set(inventory.misconceptions(sheets, bank, "post").values()) == set()


def test_files_go_there_and_back(bank, tmp_path):
    sheets = sheets_of(bank, 0.5, students=5)
    for sheet in sheets:
        inventory.write_sheet(sheet, tmp_path)
    back = inventory.read_sheets(tmp_path, bank)
    assert sorted(back, key=str) == sorted(sheets, key=str)
    assert all(sheet.simulated for sheet in back)
    inventory.write_csv(back, bank, tmp_path / "all.csv")
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and {row["simulated"] for row in rows} == {"1"}
    assert rows[0][bank.items[0].id] == back[0].answers[bank.items[0].id]


def test_mistakes_get_one_sentence(bank, tmp_path):
    def refused(call, *arguments):
        with pytest.raises(UserError) as caught:
            call(*arguments)
        return str(caught.value)

    sheet = sheets_of(bank, 0.5, students=1)[0]
    assert "no answer sheet" in refused(inventory.read_sheets, tmp_path, bank)
    assert "2 are needed" in refused(inventory.matched, [sheet], bank)
    assert "4 to 12" in refused(inventory.write_sheet, replace(sheet, code="../x"), tmp_path)
    assert "cannot read" in refused(inventory.read_bank, tmp_path / "none.json")
    path = inventory.write_sheet(sheet, tmp_path)
    for change in ({"version": 9}, {"answers": {"ewc": "z"}}, {"phase": "mid"}, {"extra": 1}):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert str(path) in refused(inventory.read_sheets, tmp_path, bank)
        inventory.write_sheet(sheet, tmp_path)
    (tmp_path / "copy").mkdir()
    inventory.write_sheet(sheet, tmp_path / "copy")
    assert "same code" in refused(inventory.read_sheets, tmp_path, bank)
    stored = json.loads(BANK.read_text())
    for item, text in (("twice", "twice"), ("one", "exactly one"), ("odd", "unknown")):
        broken = json.loads(json.dumps(stored))
        if item == "twice":
            broken["items"].append(broken["items"][0])
        else:
            for choice in broken["items"][0]["choices"]:
                if item == "one":
                    choice.pop("misconception", None)
                elif "misconception" in choice:
                    choice["misconception"] = "odd"
        (tmp_path / "bank.json").write_text(json.dumps(broken))
        assert text in refused(inventory.read_bank, tmp_path / "bank.json")


@pytest.mark.slow
def test_the_analysis_notebook_runs(tmp_path):
    """The stored notebook runs without an error and shows simulated classes."""
    from nbclient import NotebookClient

    path = ROOT / "notebooks" / "instructor" / "concept_analysis.ipynb"
    stored = nbformat.read(path, as_version=4)
    assert "SIMULATED" in str([cell.get("outputs") for cell in stored.cells])
    NotebookClient(stored, timeout=120, resources={"metadata": {"path": path.parent}}).execute()
