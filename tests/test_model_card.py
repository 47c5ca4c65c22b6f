"""The card of a saved model says what its record says, and nothing about this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import metadata_load

from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.run.model_card import WITH_TRANSFORMERS, base_of, model_card

RECORD = Path(__file__).resolve().parent.parent / "records" / "run-seed0-no-ewc.json"


@pytest.fixture
def record():
    return RunRecord.load(RECORD)


def written(folder, record):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(model_card(record, WITH_TRANSFORMERS), encoding="utf-8")
    return folder


def test_a_card_has_the_numbers_of_the_record_with_their_intervals(record):
    card = model_card(record, WITH_TRANSFORMERS)
    change = record.results["comparisons"]["after vs before"]["overall"]
    assert f"from {change['before']:.1%} to {change['after']:.1%}".replace("%", " %") in card
    assert f"{100 * change['low']:+.1f} to {100 * change['high']:+.1f}" in card
    for table in (record.results["evaluations"][0], record.results["evaluations"][-2]):
        row = table["table"]["overall"]
        assert f"({100 * row['low']:.1f} to {100 * row['high']:.1f})" in card
    assert record.commit[:12] in card and f"seed {record.seed}" in card
    assert f"* num_generations: `{record.config['num_generations']}`" in card
    assert WITH_TRANSFORMERS in card and "What this does not show" in card


@pytest.mark.parametrize(
    ("model", "licence", "base"),
    [
        ("bundled", "mit", None),
        ("smollm2", "apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("someone/a-model", None, "someone/a-model"),
    ],
)
def test_licence_and_base_model_pass_from_run_to_run(record, tmp_path, model, licence, base):
    first = written(tmp_path / "first", replace(record, config={"model": model}))
    second = written(tmp_path / "second", replace(record, config={"model": str(first)}))
    for folder in (first, second):
        said = metadata_load(folder / "README.md")
        assert (said.get("license"), said.get("base_model")) == (licence, base)
        assert said["tags"][0] == "grpo"


@pytest.mark.parametrize(
    "card", [None, "no front matter", "---\nlicense: [\n---\n", "---\n- a\n---"]
)
def test_a_folder_without_a_card_that_can_be_read_is_known_by_its_name(tmp_path, card):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert base_of(str(tmp_path)) == {"name": tmp_path.name}


def test_a_card_names_no_folder_of_this_machine(record, tmp_path):
    folder = tmp_path / "ann" / "model"
    folder.mkdir(parents=True)
    record.config |= {
        "model": str(folder),
        "data": str(folder / "mine.jsonl"),
        "verifier": f"{folder}/judge.py:polite",
        "system": "/think",
    }
    card = model_card(record, WITH_TRANSFORMERS)
    assert str(tmp_path) not in card and "ann" not in card.replace("answer", "")
    assert "mine.jsonl" in card and "judge.py:polite" in card and "/think" in card


def test_a_run_without_evaluation_claims_nothing(record):
    bare = replace(record, results={"weights_changed": {"changed": True}})
    card = model_card(bare, WITH_TRANSFORMERS)
    assert "says nothing about accuracy" in card and "| before" not in card


def test_supervised_training_is_not_called_grpo(record):
    card = model_card(replace(record, kind="warmstart", results={}), WITH_TRANSFORMERS)
    assert "fine-tuned on examples" in card and "GRPO" not in card and "- sft" in card
