"""Defaults by kind of model: the bundled one keeps its own, all others get a chat model's."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, fields, replace

import pytest
from command_line import invoke

from cpugrpo_edu.data import DIFFICULTIES
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import default_answer_format, load_policy
from cpugrpo_edu.run.config import (
    ALL_WEIGHTS,
    CHAT_MODEL,
    RunConfig,
    check_settings,
    config_for,
    is_ours,
)
from cpugrpo_edu.run.pause import Interrupted
from cpugrpo_edu.run.scenarios import SCENARIOS
from cpugrpo_edu.run.state import RunState


@pytest.fixture
def chat_folder(tiny_folder, tmp_path):
    """A model folder that is not of our kind."""
    folder = shutil.copytree(tiny_folder, tmp_path / "chat")
    settings = json.loads((folder / "config.json").read_text())
    del settings["cpugrpo_format"]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def asked(monkeypatch):
    """The configurations that the command line would run; it stops before the run."""
    found = []

    def stop(config, folder, **named):
        found.append(config)
        raise Interrupted("stopped")

    monkeypatch.setattr("cpugrpo_edu.run.pipeline.run", stop)
    monkeypatch.setattr("cpugrpo_edu.cli.run.fewer_threads", lambda model: None)
    return found


def test_our_models_keep_the_defaults_of_runconfig(tiny_folder):
    assert config_for() == config_for("bundled") == RunConfig()
    assert config_for(str(tiny_folder)) == RunConfig(str(tiny_folder))
    assert config_for("bundled", lora_rank=4) == RunConfig(lora_rank=4)


def test_a_model_is_ours_where_its_answers_are_read_as_ours(tiny_folder, chat_folder):
    for folder in (tiny_folder, chat_folder):
        read = default_answer_format(load_policy(folder).model.config)
        assert is_ours(str(folder)) == (read == "hash")
    assert not is_ours(str(chat_folder)) and is_ours("bundled") and not is_ours("smollm2")


@pytest.mark.parametrize("content", ["", "[1]", '"x"', "{", "\ud800", None])
def test_a_broken_folder_is_not_ours(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content, errors="surrogatepass")
    assert not is_ours(str(tmp_path)) and not is_ours("a\0b") and not is_ours("x" * 5000)


@pytest.mark.parametrize("model", ["smollm2", "Qwen/Qwen2-0.5B-Instruct"])
def test_a_chat_model_has_defaults_of_its_own(model):
    config = config_for(model)
    assert asdict(config) == asdict(RunConfig(model)) | CHAT_MODEL
    assert config.frozen and config.lora_rank and config.domains == ("small_stories",)
    assert not config.consolidates and not config.int8_evaluation
    check_settings(config)
    assert all(getattr(RunConfig(), name) != value for name, value in CHAT_MODEL.items())


def test_what_is_given_counts_more():
    config = config_for("smollm2", steps=(1, 1, 1), dtype="float32", per_cell=0, beta=0.5)
    expected = replace(config_for("smollm2"), steps=(1, 1, 1), dtype="float32", per_cell=0)
    assert config == replace(expected, beta=0.5)
    # A value that is the bundled model's default is as good as any other.
    assert config_for("smollm2", temperature=RunConfig().temperature).temperature == 1.0
    with pytest.raises(TypeError, match="nonsense"):
        config_for("smollm2", nonsense=1)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({}, "last-number"),
        ({"domains": ("stories",)}, "last-number"),
        ({"domains": ("stories", "lists")}, None),
        ({"data": "reasoning-gym:chain_sum"}, None),
        ({"data": "own.jsonl", "answer_format": "boxed"}, "boxed"),
    ],
)
def test_the_last_number_is_the_answer_only_where_every_answer_is_a_number(given, read):
    assert config_for("smollm2", **given).answer_format == read


def test_settings_that_belong_together_change_together():
    """Without LoRA there is nothing to train on a frozen base."""
    config = config_for("smollm2", lora_rank=0)
    assert (config.dtype, config.learning_rates) == tuple(ALL_WEIGHTS.values())
    check_settings(config)
    assert config_for("smollm2", lora_rank=0, learning_rates=(1.0, 1.0, 1.0)).learning_rates[0] == 1


def test_ewc_is_off_unless_it_is_asked_for():
    """The default stages forget nothing, so there it could only cost."""
    assert not RunConfig().consolidates and not config_for("smollm2").consolidates
    assert RunConfig(ewc_strength=0.1).consolidates
    assert config_for("smollm2", ewc_strength=0.1).consolidates
    assert not RunConfig(ewc_strength=0.1, fisher_examples=0).consolidates


def test_a_scenario_has_settings_of_its_own():
    config = config_for(scenario="letters")
    check_settings(config)
    assert asdict(config) == asdict(RunConfig(scenario="letters")) | SCENARIOS["letters"].settings
    assert config.consolidates and [stage.name for stage in config.stages if stage.steps] == [
        "advanced"
    ]
    assert set(SCENARIOS["letters"].levels) == set(DIFFICULTIES)
    assert config_for(scenario="letters", ewc_strength=0.0) == replace(config, ewc_strength=0.0)
    sums = config_for(scenario="sums", seed=3)
    check_settings(sums)
    expected = asdict(RunConfig("smollm2", scenario="sums", seed=3)) | CHAT_MODEL
    assert asdict(sums) == expected | SCENARIOS["sums"].settings
    assert config_for("bundled", scenario="sums").model == "bundled"
    with pytest.raises(UserError, match="unknown --scenario 'letter'; allowed are letters"):
        check_settings(config_for(scenario="letter"))
    with pytest.raises(UserError, match="--protect has easy; allowed are basic, intermediate"):
        check_settings(RunConfig(protect=("basic", "easy")))


# The command line


def test_flags_count_more_than_the_kind_of_model(asked, tmp_path, chat_folder):
    shared = ["run", "--quiet", "--output", tmp_path / "out"]
    invoke(*shared, "--model", chat_folder)
    invoke(*shared, "--model", chat_folder, "--steps", 5, "--per-cell", 20, "--int8-evaluation")
    invoke(*shared, "--model", chat_folder, "--profile", "frugal", "--temperature", 1)
    invoke(*shared)
    chat = config_for(str(chat_folder))
    assert asked == [
        chat,
        replace(chat, steps=(5, 5, 5), per_cell=20, int8_evaluation=True),
        replace(chat, temperature=1.0, threads=1, micro_batch=4, save_minutes=0.5),
        RunConfig(),
    ]


def test_help_shows_both_defaults_where_they_differ(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    _, out, _ = invoke("run", "--help")
    assert len(re.findall("chat model: ", out)) == len(CHAT_MODEL)
    assert f"(1.0; chat model: {CHAT_MODEL['temperature']})" in out
    assert f"(6,6,6; chat model: {','.join(map(str, CHAT_MODEL['steps']))})" in out
    assert {field.name for field in fields(RunConfig)} >= CHAT_MODEL.keys()


def test_a_resumed_run_keeps_its_recorded_settings(asked, tmp_path):
    """Not the defaults of today, nor the bundled model where another was trained."""
    begun = replace(config_for("smollm2"), temperature=0.7, steps=(1, 2, 3), threads=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state.json").write_text(json.dumps(asdict(RunState.new(begun))))
    resume = ["run", "--quiet", "--resume", "--output", tmp_path / "out"]
    invoke(*resume)
    invoke(*resume, "--model", "smollm2", "--seed", 5)
    assert asked == [begun, replace(begun, seed=5)]  # the run refuses the other seed


@pytest.mark.parametrize("change", [{"steps": "many"}, {"temperature": "hot"}])
def test_settings_that_cannot_be_read_are_refused_by_the_run(tmp_path, change):
    state = asdict(RunState.new(RunConfig(threads=1)))
    state["config"] |= change
    (tmp_path / "state.json").write_text(json.dumps(state))
    code, _, err = invoke("run", "-q", "--resume", "--output", tmp_path, "--threads", 1)
    assert code == 2 and f"begun with other settings ({next(iter(change))})" in err
