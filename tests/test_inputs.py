"""Verifier, data and prompt stay what they were from a stop to --resume, or nothing goes on."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest
from command_line import invoke

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.evaluations import evaluation_path, load_evaluation
from cpugrpo_edu.rewards import REWARDS
from cpugrpo_edu.run import pipeline
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.run.pause import Control, Interrupted
from cpugrpo_edu.run.pipeline import run
from cpugrpo_edu.show.report import sections

JUDGE = """from helper_of_inputs import ends

def judge(problem, completion):
    return ends({})
"""
OLD, NEW = JUDGE.format("0 * problem.n"), JUDGE.format("len(completion) % 2 + 0 * problem.n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "helper_of_inputs.py").write_text("def ends(x):\n    return x\n")
    (tmp_path / "judge.py").write_text(OLD)
    write_data(tmp_path, range(40))
    yield tmp_path
    for name in ("helper_of_inputs", "cpugrpo_verifier_judge"):
        sys.modules.pop(name, None)


def write_data(folder, numbers):
    rows = [{"prompt": f"Say {i}.", "n": i} for i in numbers]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(folder, tiny_folder, monkeypatch):
    shutil.copytree(tiny_folder, folder / "model")
    # any random model differs in it, whatever the verifier says
    odd = lambda problem, episode: sum(i % 2 for i in episode.completion_ids)  # noqa: E731
    monkeypatch.setitem(REWARDS, "odd_tokens", odd)
    return RunConfig(
        model=str(folder / "model"),
        data=str(folder / "prompts.jsonl"),
        verifier=f"{folder / 'judge.py'}:judge",
        steps=(1, 1, 0),
        learning_rates=(1e-2, 1e-2, 1e-2),
        prompts_per_step=2,
        num_generations=4,
        max_completion=6,
        rewards="odd_tokens=1",
        fisher_examples=0,
        per_cell=3,
        threads=1,
        int8_rollouts=False,
        int8_evaluation=False,
    )


@pytest.fixture
def stopped(folder, config, monkeypatch):
    return stop(folder, config, monkeypatch)


def stop(folder, config, monkeypatch):
    """A run that was stopped after its first stage."""
    control, measure = Control(), pipeline.measure

    def stopping(session, learner, label):
        measure(session, learner, label)
        if label == "after basic":
            control.stop()

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "measure", stopping)
        with pytest.raises(Interrupted):
            run(config, folder / "run", control=control)
    return folder / "run"


CHANGES = {
    "verifier": ("the verifier .*judge.py:judge is not as it was.* --rejudge", lambda folder: (
        folder / "judge.py").write_text(NEW)),
    "helper": ("the verifier .* is not as it was", lambda folder: (
        folder / "helper_of_inputs.py").write_text("def ends(x):\n    return 1 - x\n")),
    "data": ("the data of .*prompts.jsonl are not those", lambda folder: write_data(
        folder, [99, *range(40)])),
    "a column": ("the data of .*prompts.jsonl are not those", lambda folder: (
        folder / "prompts.jsonl").write_text(
            (folder / "prompts.jsonl").read_text().replace('"n": 7}', '"n": 8}'))),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_said_and_nothing_goes_on(stopped, folder, config, name):
    words, change = CHANGES[name]
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    change(folder)
    with pytest.raises(UserError, match=f"^{words}") as caught:
        run(config, stopped, resume=True)
    assert "another --output" in str(caught.value) and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_another_chat_template_is_said(folder, config, monkeypatch):
    """With LoRA, whose base is read again."""
    config = replace(config, lora_rank=2, per_cell=1)
    stopped, path = stop(folder, config, monkeypatch), folder / "model" / "chat_template.jinja"
    path.write_text("Please: " + path.read_text())
    with pytest.raises(UserError, match=r"^the model .*model is not prompted as when the run"):
        run(config, stopped, resume=True)


def test_without_a_change_it_goes_on(stopped, config, folder):
    (folder / "other.py").write_text("")  # a file that the verifier does not use
    record = run(config, stopped, resume=True)
    assert "verifier_changed" not in record.results


def test_rejudged_evaluations_are_those_of_the_new_verifier(stopped, config, folder):
    (folder / "judge.py").write_text(NEW)
    record = run(config, stopped, resume=True, rejudge=True)
    for label in ("before", "after basic", "after intermediate"):
        found = load_evaluation(evaluation_path(stopped, label))
        assert found.correct == [len(text) % 2 == 1 for text in found.completions]
    overall = record.results["comparisons"]["after vs before"]["overall"]
    first = load_evaluation(evaluation_path(stopped, "before"))
    assert overall["before"] == pytest.approx(sum(first.correct) / len(first.correct))
    assert record.results["verifier_changed"] == ["after basic"]
    [limits] = dict(sections(record, []))["What this does not show"]
    assert any("verifier was replaced after basic" in line for line in limits)


def test_the_data_may_not_change_with_the_verifier(stopped, config, folder):
    (folder / "judge.py").write_text(NEW)
    write_data(folder, range(1, 40))
    with pytest.raises(UserError, match="^the data of"):
        run(config, stopped, resume=True, rejudge=True)


def test_rejudge_is_for_resumed_runs():
    code, _, err = invoke("run", "--rejudge")
    assert code == 2 and "give it with --resume" in err
