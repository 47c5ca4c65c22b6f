"""Before a stage trains: a run without a signal stops with a sentence, any other goes on."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace

import pytest
from command_line import invoke

from cpugrpo_edu.data import DIFFICULTIES, Episode, Group, Problem
from cpugrpo_edu.engine.memory import PeakMemory
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import fingerprint, load_policy
from cpugrpo_edu.rewards import REWARDS
from cpugrpo_edu.run import pipeline, signal_check
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.run.pause import Control, Interrupted
from cpugrpo_edu.run.pipeline import run
from cpugrpo_edu.run.prepare import load, prepare
from cpugrpo_edu.run.results import problems_to_show
from cpugrpo_edu.run.signal_check import PROMPTS, ROUNDS, Signal, check_signal, signal_of
from cpugrpo_edu.show.progress import ProgressDisplay


def odd_tokens(problem, episode):
    """Any random model differs in it."""
    return sum(i % 2 for i in episode.completion_ids) / len(episode.completion_ids)


@pytest.fixture
def reward(monkeypatch):
    """Call it with the reward function of the runs."""

    def use(function):
        monkeypatch.setitem(REWARDS, "test", function)

    use(odd_tokens)
    return use


@pytest.fixture
def config(tiny_folder, reward):
    return RunConfig(
        model=str(tiny_folder),
        domains=("lists",),
        steps=(2, 2, 0),
        learning_rates=(1e-2, 1e-2, 1e-2),
        prompts_per_step=2,
        num_generations=2,
        max_completion=6,
        rewards="test=1",
        fisher_examples=0,
        per_cell=0,
        threads=1,
        int8_evaluation=False,
    )


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(pipeline, "write_report", lambda record, folder: None)


def ready(config, folder, display=None):
    session = prepare(
        config, folder, False, display=display or ProgressDisplay(quiet=True), control=Control(),
        peak=PeakMemory(), started=time.time(), report_to="none",
    )  # fmt: skip
    return session, load(session)


def state(folder):
    return json.loads((folder / "state.json").read_text())


def test_a_signal_is_counted_from_the_rewards():
    def group(*rewards, finished=True):
        return Group([1], [Episode([1], reward=r, finished=finished) for r in rewards])

    found = signal_of([group(0.0, 1.0), group(1.0, 1.0), group(0.0, 0.0, finished=False)])
    assert found == Signal(groups=3, with_signal=1, mean_reward=0.5, cut=1 / 3)
    assert str(found).startswith("1 of 3 groups") and str(found).endswith("mean reward 0.50")


# It stops


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, ("easier problems", "--domains", "--answer-format", "cpugrpo warmstart")),
        (1.0, ("harder problems", "--domains")),
    ],
)
def test_rewards_that_are_all_equal_stop_the_run_before_its_first_step(
    config, tmp_path, reward, value, words
):
    judged = []
    reward(lambda problem, episode: judged.append(problem.question) or value)
    with pytest.raises(UserError, match="before its first step") as caught:
        run(replace(config, per_cell=1), tmp_path / "run")
    sentence = str(caught.value)
    for word in ("--num-generations", "--temperature", "--max-completion", *words):
        assert word in sentence
    groups = ROUNDS * min(PROMPTS, 4)
    assert f"none of {groups} groups of 2 completions" in sentence and f"is {value:.2f}" in sentence
    assert len(judged) == 2 * groups  # every one was sampled, and nothing else
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    assert not (tmp_path / "run" / "evaluations").exists()
    assert state(tmp_path / "run")["signals"] == {}


def test_it_gives_up_after_a_minute(config, tmp_path, reward, monkeypatch):
    reward(lambda problem, episode: 0.0)
    session, learner = ready(config, tmp_path / "run")
    clock = itertools.count(0, 35)
    monkeypatch.setattr(signal_check.time, "monotonic", lambda: next(clock))
    with pytest.raises(UserError, match=r"none of 8 groups"):  # 35 s, and then 70 s
        check_signal(session, learner, 0)


def test_the_command_ends_with_that_sentence_and_code_2(config, tmp_path, reward):
    reward(lambda problem, episode: 0.0)
    code, out, err = invoke(
        "run", "--quiet", "--model", config.model, "--output", tmp_path / "run", "--steps", 1,
        "--prompts-per-step", 1, "--num-generations", 2, "--max-completion", 4, "--threads", 1,
        "--rewards", "test=1",
    )  # fmt: skip
    assert code == 2 and out == ""
    [line] = [line for line in err.splitlines() if line.startswith("cpugrpo: ")]
    assert "before its first step" in line


# It goes on


def test_one_group_with_a_signal_is_enough(config, tmp_path, reward):
    """The first two rounds have none."""
    count = min(PROMPTS, 4) * config.num_generations
    numbers = itertools.count()
    reward(lambda problem, episode: float(next(numbers) == 2 * count))
    session, learner = ready(config, tmp_path / "run")
    check_signal(session, learner, 0)
    found = session.state.signals["basic"]
    assert (found["groups"], found["with_signal"]) == (3 * min(PROMPTS, 4), 1)
    assert found["mean_reward"] == pytest.approx(1 / (3 * count))


def test_without_patience_it_only_says_so(config, tmp_path, reward, capsys):
    reward(lambda problem, episode: 0.0)
    with pytest.raises(UserError, match="the weights did not change"):
        run(replace(config, patience=0), tmp_path / "run", display=ProgressDisplay())
    assert "basic: 0 of 4 groups sampled before training have a signal" in capsys.readouterr().err


def test_a_later_stage_only_says_so(config, tmp_path, reward):
    session, learner = ready(config, tmp_path / "run")
    said = []
    session.display.message = said.append
    reward(lambda problem, episode: 0.0)
    session.rewards = [replace(session.rewards[0], function=REWARDS["test"])]
    check_signal(session, learner, 2)  # of no steps: nothing
    check_signal(session, learner, 1)
    assert [line.split(" groups")[0] for line in said] == ["intermediate: 0 of 4"]
    assert list(session.state.signals) == ["intermediate"]


def test_a_run_learns_the_same_with_it(config, tmp_path, monkeypatch):
    """It has random numbers of its own."""
    with_check = run(config, tmp_path / "with")
    monkeypatch.setattr(pipeline, "check_signal", lambda *_: None)
    without = run(config, tmp_path / "without")
    models = [load_policy(tmp_path / name / "model").model for name in ("with", "without")]
    assert fingerprint(models[0]) == fingerprint(models[1])
    for key in ("steps", "weights_changed"):
        assert with_check.results[key] == without.results[key]
    found = [stage["signal"] for stage in with_check.results["stages"]]
    assert found[0]["with_signal"] > 0 and found[1]["groups"] == 4 and found[2] is None


def test_a_resumed_run_does_not_repeat_it(config, tmp_path, monkeypatch):
    control, looked = Control(), []
    look = signal_check.look

    def noted(session, learner, index, rounds):
        looked.append(index)
        return look(session, learner, index, rounds)

    monkeypatch.setattr(signal_check, "look", noted)
    measure = pipeline.measure
    monkeypatch.setattr(
        pipeline, "measure", lambda *args: control.stop() if args[2] == "before" else None
    )
    with pytest.raises(Interrupted, match="stopped after step 1 of stage 'basic'"):
        run(config, tmp_path / "run", control=control)
    assert looked == [0]
    before = state(tmp_path / "run")["signals"]["basic"]
    monkeypatch.setattr(pipeline, "measure", measure)
    record = run(config, tmp_path / "run", resume=True)
    assert looked == [0, 1] and record.results["stages"][0]["signal"] == before


# What the terminal shows


def test_each_stage_shows_an_answer_before_and_after(config, tmp_path, capsys):
    run(replace(config, steps=(1, 1, 0)), tmp_path / "run", display=ProgressDisplay())
    lines = [line for line in capsys.readouterr().err.splitlines() if " -> " in line]
    starts = [line.split(": ")[0] for line in lines]
    assert starts == [
        f"{stage}, {when} training" for stage in ("basic", "intermediate")
        for when in ("before", "after")
    ]  # fmt: skip
    questions = [line.split(": ", 1)[1].split(" -> ")[0] for line in lines]
    assert questions[0] == questions[1] != questions[2] == questions[3]


# What the report opens with


def problem(domain, difficulty, number):
    return Problem(f"{domain}/{difficulty}/{number}", domain, difficulty, f"{number}?", "1")


@pytest.mark.parametrize(
    ("domains", "counts", "expected"),
    [
        (["a"], (2, 2, 2), ["a0", "a0", "a0", "a1", "a1"]),
        (["a", "b"], (2, 2, 2), ["a0", "a0", "a0", "b0", "b0"]),
        (["a"], (4, 0, 1), ["a0", "a0", "a1", "a2", "a3"]),
        (["a"], (1, 1, 0), ["a0", "a0"]),
    ],
)
def test_the_places_of_problems_decide_which_are_shown(domains, counts, expected):
    """Difficulties take turns, and within one the domains."""
    problems = [
        problem(domain, level, i)
        for domain in domains
        for level, count in zip(DIFFICULTIES, counts, strict=True)
        for i in range(count)
    ]
    chosen = [problems[i] for i in problems_to_show(problems)]
    assert [p.domain + p.question[0] for p in chosen] == expected
    levels = [level for level, count in zip(DIFFICULTIES, counts, strict=True) if count]
    assert [p.difficulty for p in chosen][: len(levels)] == levels
    assert len(set(map(id, chosen))) == len(chosen)
