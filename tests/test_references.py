"""What a run says, before it trains and while it does, of completions that cannot be right."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cpugrpo_edu.data import Episode, Group, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.rewards import REWARDS
from cpugrpo_edu.run import pipeline
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.run.pipeline import run
from cpugrpo_edu.run.references import check_references, unmatched
from cpugrpo_edu.show.progress import ProgressDisplay
from cpugrpo_edu.tasks import TASKS, held_out_problems
from cpugrpo_edu.tasks.answers import with_answer_format
from cpugrpo_edu.tasks.custom import Custom
from cpugrpo_edu.tasks.statements import ANSWER_FORMATS


def problem(answer, form="auto", verifier=None):
    task = Custom(verifier, answer_format=form)
    return Problem("1", "custom", "basic", "What is it?", answer, task=task)


# References


@pytest.mark.parametrize("form", [f for f in ANSWER_FORMATS if f not in ("last-number",)])
def test_references_of_the_generated_problems_can_be_matched(form):
    if form == "math-verify":
        pytest.importorskip("math_verify")
    domains = [name for name in TASKS if name != "lists" or form != "math-verify"]
    assert check_references(with_answer_format(held_out_problems(2, domains), form)) is None


def test_references_that_nothing_matches():
    words = [problem("Paris", "last-number"), problem("Rome", "last-number")]
    with pytest.raises(UserError, match="no completion can be right: .*last-number") as caught:
        check_references(words)
    assert "none of 2 references, such as 'Paris' for 'What is it?'" in str(caught.value)
    some = check_references([*words, problem("7", "last-number")])
    assert some.startswith("2 of 3 references cannot be matched in the answer format last-number")
    assert check_references([problem("7", "last-number")]) is None
    assert check_references([problem("", verifier=lambda problem, text: False)]) is None


def said(problem, *texts):
    return [Group([1], [Episode([1], text=text) for text in texts], problem)]


def test_an_answer_is_shown_beside_its_reference():
    found = unmatched(said(problem("Step by step it is 10"), "hm", "The answer is 10."))
    assert found == (
        "none of 2 completions is right; asked 'What is it?', one states '10', and the reference "
        "is 'Step by step it is 10'"
    )
    found = unmatched(said(problem("10", "boxed"), "It is 10", "10!"))
    assert found == (
        "in none of 2 completions an answer was found (--answer-format boxed); one ends 'It is 10'"
    )
    assert unmatched(said(problem("10"), "hm", "#### 10")) is None
    assert unmatched(said(problem("", verifier=lambda problem, text: False), "hm")) is None


# In a run


@pytest.fixture
def config(tiny_folder, monkeypatch):
    odd = lambda problem, episode: sum(i % 2 for i in episode.completion_ids)  # noqa: E731
    monkeypatch.setitem(REWARDS, "odd_tokens", odd)
    monkeypatch.setattr(pipeline, "write_report", lambda record, folder: None)
    return RunConfig(
        model=str(tiny_folder),
        domains=("lists",),
        steps=(2, 2, 2),
        learning_rates=(1e-2, 1e-2, 1e-2),
        prompts_per_step=2,
        num_generations=4,
        max_completion=6,
        rewards="odd_tokens=1",
        fisher_examples=0,
        per_cell=0,
        threads=1,
        int8_rollouts=False,
        int8_evaluation=False,
    )


def test_a_run_whose_references_cannot_be_matched_leaves_nothing_behind(config, tmp_path):
    rows = [{"prompt": f"The capital of {i}?", "answer": f"City {chr(97 + i)}"} for i in range(26)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, data=str(data), answer_format="last-number")
    with pytest.raises(UserError, match="no completion can be right"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_shows_before_it_trains_that_no_answer_is_found(config, tmp_path, capsys):
    run(replace(config, steps=(1, 0, 0)), tmp_path / "run", display=ProgressDisplay())
    lines = capsys.readouterr().err.splitlines()
    [shown] = [i for i, line in enumerate(lines) if "in none of 8 completions an answer" in line]
    assert "--answer-format hash" in lines[shown]
    assert shown < lines.index("basic: begins")


def test_a_run_that_cannot_learn_says_so_with_the_example(config, tmp_path):
    with pytest.raises(UserError, match=r"nothing to learn from \((in )?none of \d+ completions"):
        run(replace(config, rewards="correct_answer=1"), tmp_path / "run")


def test_cut_completions_are_said_while_it_happens_and_counted_over_all_stages(
    config, tmp_path, capsys
):
    """Two steps a stage: no stage alone reaches the patience of 5."""
    config = replace(config, patience=5, max_completion=2)
    with pytest.raises(UserError, match="all completions were cut .* in 5 steps in a row"):
        run(config, tmp_path / "run", display=ProgressDisplay())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert any("100% of the completions cut at the limit" in line for line in lines)
    steps = [line for line in lines if ": 1/2" in line or ": 2/2" in line]
    assert len(steps) == 5 and all("cut 100%" in line for line in steps)
    [warned] = [i for i, line in enumerate(lines) if "all completions of the last 3 steps" in line]
    assert lines[warned - 1].startswith("intermediate: 1/2")
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["guard"]["truncated"] == 4
    # What was counted is not forgotten by a stop.
    with pytest.raises(UserError, match="in 5 steps in a row"):
        run(config, tmp_path / "run", resume=True)
