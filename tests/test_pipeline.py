"""One tiny run from end to end, its resumption, and everything that it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, fields, replace
from pathlib import Path
from string import ascii_letters
from types import SimpleNamespace

import pytest
import torch
from command_line import invoke
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import cpugrpo_edu
from cpugrpo_edu.curriculum import make_stages
from cpugrpo_edu.data import DIFFICULTIES, Problem
from cpugrpo_edu.engine.memory import PeakMemory
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.record.evaluations import load_evaluation
from cpugrpo_edu.record.files import write_text
from cpugrpo_edu.record.metrics import read_metrics
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.rewards import REWARDS
from cpugrpo_edu.run import pipeline, results
from cpugrpo_edu.run.anchors import load_anchor
from cpugrpo_edu.run.config import RunConfig, flag_of, plain
from cpugrpo_edu.run.consolidate import fisher_examples
from cpugrpo_edu.run.data import load_data
from cpugrpo_edu.run.pause import Control, Interrupted
from cpugrpo_edu.run.pipeline import run
from cpugrpo_edu.run.prepare import protected_problems
from cpugrpo_edu.run.saver import CheckpointSaver
from cpugrpo_edu.run.signal_check import PROMPTS
from cpugrpo_edu.run.state import RunState, Session, load_state
from cpugrpo_edu.show.progress import ProgressDisplay
from cpugrpo_edu.show.report import headline

ask_after = 0  # calls of the reward until it sends Ctrl-C; 0 never does


def odd_tokens(problem, episode):
    """The share of odd token ids: any random model differs in it."""
    global ask_after
    if ask_after:
        ask_after -= 1
        if not ask_after:
            os.kill(os.getpid(), signal.SIGINT)
    ids = episode.completion_ids
    return sum(i % 2 for i in ids) / len(ids)


@pytest.fixture(autouse=True, scope="module")
def setup():
    """A reward with variance on a random model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REWARDS, "odd_tokens", odd_tokens)
        yield


@pytest.fixture(scope="module")
def config(tiny_folder):
    return RunConfig(
        model=str(tiny_folder),
        domains=("lists",),
        steps=(2, 2, 2),
        learning_rates=(1e-2, 1e-2, 1e-2),
        prompts_per_step=2,
        num_generations=2,
        max_completion=6,
        patience=0,
        rewards="odd_tokens=1",
        fisher_examples=2,
        ewc_strength=0.1,
        per_cell=2,
        threads=1,
    )


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(pipeline, "write_report", lambda record, folder: None)


@pytest.fixture(scope="module")
def first(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, run(config, folder)


def small(config, **changes):
    """The least that still has three stages and one evaluation problem a difficulty."""
    least = replace(config, steps=(1, 0, 0), per_cell=0, fisher_examples=0, int8_evaluation=False)
    return replace(least, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "expected"), [(None, "auto"), ("boxed", "boxed")])
def test_every_problem_of_a_run_is_read_in_the_format_of_its_model(
    config, tmp_path, monkeypatch, form, expected
):
    """A model that is not ours; the held-out problems, the rewards and the system prompt."""
    folder = shutil.copytree(config.model, tmp_path / "chat")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"cpugrpo_format": False}))
    seen = set()

    def note(problem, episode):
        seen.add(problem.answer_format)
        return odd_tokens(problem, episode)

    monkeypatch.setitem(REWARDS, "odd_tokens", note)
    judged = []
    judge = results.evaluate
    monkeypatch.setattr(
        results,
        "evaluate",
        lambda policy, problems, *rest: (
            judged.append((policy.system, {p.answer_format for p in problems}))
            or judge(policy, problems, *rest)
        ),
    )
    run(small(config, model=str(folder), answer_format=form, per_cell=1), tmp_path / "run")
    assert seen == {expected} and judged
    assert all(found == (None, {expected}) for found in judged)


# What a run leaves behind


@pytest.mark.slow
def test_the_record_is_complete(first, config):
    folder, record = first
    on_disk = RunRecord.load(folder / "record.json")
    assert on_disk.results == json.loads(json.dumps(record.results))
    assert record.kind == "run" and record.seed == 0 and record.commit
    assert record.config == plain(config)
    assert record.machine["usable_cores"] >= 1 and "torch" in record.versions
    results = record.results
    assert results["weights_changed"]["changed"]
    assert 0 < results["weights_changed"]["relative_l2"] < 1
    assert results["peak_rss_bytes"] > 10**7 and results["cpu_percent"] > 0
    seconds = results["seconds"]
    assert set(seconds) == {"load", "train", "evaluate", "report", "total"}
    assert all(value > 0 for value in seconds.values())
    assert results["tokens_per_second"]["rollout"] > 0
    assert [table["label"] for table in results["evaluations"]] == [
        "before", "after basic", "after intermediate", "after advanced", "after, INT8",
    ]  # fmt: skip
    assert all(table["table"]["overall"]["n"] == 6 for table in results["evaluations"])
    assert set(results["comparisons"]) == {"after vs before", "INT8 vs fp32"}
    assert len(results["samples"]) == 5 and results["forgetting"] and results["working"]


@pytest.mark.slow
def test_every_component_acts_in_a_run_with_ewc(first):
    parts = first[1].results["components"]
    assert {name: part["on"] for name, part in parts.items()} == {
        "curriculum": True,
        "ewc": True,
        "fisher": True,
        "int8_rollouts": True,
        "int8_evaluation": True,
        "gradient_checkpointing": True,
        "adaptive_micro_batch": True,
        "memory_cleanup": True,
        "memory_efficient_loading": True,
        "threads": True,
    }
    assert all("detail" in part for part in parts.values())
    assert parts["threads"]["detail"]["threads"] == 1
    # The INT8 copy really computes in INT8, although TRL has patched the model it copies.
    assert parts["int8_evaluation"]["detail"]["max_logit_error"] > 0


@pytest.mark.slow
def test_ewc_acts_from_the_second_stage(first):
    folder, record = first
    rows = read_metrics(folder / "metrics.jsonl")
    penalties = {(row["stage"], row["step"]): row.get("ewc_penalty") for row in rows}
    assert penalties["basic", 1] is None and penalties["basic", 2] is None
    # At a stage's first step nothing has moved from the anchor yet.
    assert penalties["intermediate", 1] == 0 and penalties["intermediate", 2] > 0
    assert penalties["advanced", 2] > 0
    assert [s["ewc_penalty_last"] is not None for s in record.results["stages"]] == [
        False, True, True,
    ]  # fmt: skip
    fisher = load_anchor(folder / "stages" / "3-advanced" / "anchor.safetensors").fisher
    mean = sum(float(f.sum()) for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    assert mean == pytest.approx(3, rel=1e-3)  # three stages, each scaled to a mean of 1


@pytest.mark.slow
def test_one_row_of_metrics_a_step(first):
    rows = read_metrics(first[0] / "metrics.jsonl")
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows] == [1, 2] * 3
    for row in rows:
        assert {"reward", "loss", "entropy", "grad_norm", "rss_bytes", "time"} <= set(row)
        assert 0 <= row["reward"] <= 1


@pytest.mark.slow
def test_reports_and_models_are_there(first):
    folder, _ = first
    assert "weights" in (folder / "report.md").read_text()
    assert "<html" in (folder / "report.html").read_text()
    card = (folder / "model" / "README.md").read_text()
    assert headline(RunRecord.load(folder / "record.json")) in card
    final = AutoModelForCausalLM.from_pretrained(folder / "model")
    last = AutoModelForCausalLM.from_pretrained(folder / "stages" / "3-advanced")
    for one, other in zip(final.parameters(), last.parameters(), strict=True):
        assert torch.equal(one, other)
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template
    assert not list((folder / "checkpoints").glob("*"))
    after = load_evaluation(folder / "evaluations" / "after_advanced.json.gz")
    assert len(after.completions) == 6


# Settings and state, without a model


def test_settings_are_light():
    """--help reads them, so they must not load torch or what depends on it."""
    heavy = ("torch", "transformers", "trl", "peft", "datasets", "numpy")
    code = (
        "import sys; from cpugrpo_edu.run.config import RunConfig, check_settings; "
        f"check_settings(RunConfig()); print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("item", fields(RunConfig), ids=lambda item: item.name)
def test_every_setting_has_a_sentence_of_help(item):
    text = item.metadata["help"]
    assert text[0] in ascii_letters and text.endswith(".") and len(text) < 100


def test_flags_of_settings():
    assert [flag_of(name) for name in ("prompts_per_step", "seed", "learning_rates")] == [
        "--prompts-per-step", "--seed", "--lr",
    ]  # fmt: skip


def test_a_state_survives_the_disk(config, tmp_path):
    state = RunState.new(config)
    write_text(tmp_path / "state.json", json.dumps(asdict(state)))
    assert load_state(tmp_path, config) == state
    rows = [{"name": "basic"}]
    write_text(tmp_path / "state.json", json.dumps(asdict(replace(state, stages=rows))))
    with pytest.raises(UserError, match=r"1-basic, with the model after stage 'basic', is missing"):
        load_state(tmp_path, config)
    (tmp_path / "stages" / "1-basic").mkdir(parents=True)
    assert load_state(tmp_path, config).stages == rows
    write_text(tmp_path / "state.json", json.dumps({**asdict(state), "more": 1}))
    with pytest.raises(UserError, match="not the state of a run"):
        load_state(tmp_path, config)


def test_a_phase_is_timed_and_saved_also_when_it_was_stopped(config, tmp_path):
    session = Session(
        config, tmp_path, RunState.new(config), [], [], [], [], {}, ProgressDisplay(quiet=True),
        Control(), PeakMemory(), time.time(), "none",
    )  # fmt: skip
    with pytest.raises(Interrupted), session.phase("train"):
        raise Interrupted("stopped")
    saved = load_state(tmp_path, config)
    assert saved.seconds["train"] > 0 and saved.seconds_before > 0
    with pytest.raises(ValueError), session.phase("train"):
        raise ValueError("broken")
    assert load_state(tmp_path, config) == saved


def test_few_frames_from_the_command_to_a_token(config, tmp_path, monkeypatch):
    """What a reader must step through: this package's frames, the command's and draw's included."""
    package, frames = Path(cpugrpo_edu.__file__).parent, []

    def spy(*args, **options):
        for frame in traceback.extract_stack():
            path = Path(frame.filename)
            if package in path.parents:
                frames.append(f"{path.relative_to(package)}: {frame.name}")
        raise KeyboardInterrupt  # this first token is enough

    monkeypatch.setattr(pipeline, "check_signal", lambda *_: None)
    monkeypatch.setattr(torch, "searchsorted", spy)  # how ``draw`` picks a token
    code, _, err = invoke(
        "run", "--quiet", "--output", tmp_path / "run", "--model", config.model, "--threads", 1,
        "--prompts-per-step", 2, "--num-generations", 2, "--max-completion", 4, "--per-cell", 0,
        "--no-int8-rollouts",
    )  # fmt: skip
    assert code == 130, err
    assert frames[0].endswith("main") and frames[-1] == "sample.py: draw"
    assert len(frames) <= 12, "\n".join(frames)


# Refusals


def files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_complete_run_is_neither_overwritten_nor_resumed(first, config):
    folder, _ = first
    before = files(folder)
    with pytest.raises(UserError, match="already exists and is not empty"):
        run(config, folder)
    with pytest.raises(UserError, match="is complete; there is nothing to resume"):
        run(config, folder, resume=True)
    with pytest.raises(UserError, match=r"other settings \(beta, seed\)"):
        run(replace(config, seed=1, beta=0.5), folder, resume=True)
    assert files(folder) == before


def test_output_that_is_a_file_and_resume_of_nothing(config, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        run(config, file)
    assert file.read_text() == "mine"
    with pytest.raises(UserError, match=r"no state\.json"):
        run(config, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"domains": ("lists", "poetry")}, "unknown domains poetry; allowed are"),
        ({"domains": ()}, r"unknown domains \(none given\)"),
        ({"order": "random"}, "unknown --order 'random'"),
        ({"steps": (0, 0, 0)}, "at least one step in total"),
        ({"steps": (1, -1, 1)}, "at least one step in total"),
        ({"replay": 1.0}, "--replay is 1.0; give at least 0 and less than 1"),
        ({"rewards": "beauty=1"}, "unknown reward 'beauty'"),
        ({"rewards": "odd_tokens=0"}, "all reward weights are zero"),
        ({"engine": "warp"}, "unknown --engine 'warp'; allowed are fast, generate"),
        ({"fisher": "guess"}, "unknown --fisher 'guess'; allowed are exact"),
        ({"checkpointing": "maybe"}, "unknown --checkpointing 'maybe'"),
        ({"loss_type": "ppo"}, "unknown --loss-type 'ppo'"),
        ({"importance_level": "word"}, "unknown --importance-level"),
        ({"num_generations": 1}, "--num-generations is 1; give at least 2"),
        ({"prompts_per_step": 0}, "--prompts-per-step is 0; give at least 1"),
        ({"max_completion": 0}, "--max-completion is 0; give at least 1"),
        ({"micro_batch": 0}, "--micro-batch is 0"),
        ({"per_cell": -1}, "--per-cell is -1; give at least 0"),
        ({"fisher_examples": -1}, "--fisher-examples is -1"),
        ({"ewc_strength": float("nan")}, "--ewc is nan"),
        ({"ewc_decay": 1.5}, "--ewc-decay is 1.5; give at least 0 and at most 1"),
        ({"temperature": 0.0}, "--temperature is 0.0; give more than 0"),
        ({"learning_rates": (1e-3, -1e-3, 1e-3)}, "--lr is"),
        ({"model": "./nowhere"}, "no model folder at ./nowhere"),
        ({"dtype": "float8"}, "unknown --dtype 'float8'"),
        ({"dtype": "bfloat16"}, "in bfloat16 loses most updates.*use --dtype float32"),
        ({"memory_budget_gib": 1e-4}, "training .* needs about .* GiB"),
        ({"data": "./nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(config, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        run(replace(config, **changes), tmp_path / "out")
    assert not (tmp_path / "out" / "stages").exists()
    assert not (tmp_path / "out" / "evaluations").exists()


def test_weights_that_do_not_change_fail_the_run(config, tmp_path):
    with pytest.raises(UserError, match="the weights did not change in stage 'basic'"):
        run(small(config, learning_rates=(0.0, 0.0, 0.0)), tmp_path / "out")
    assert not (tmp_path / "out" / "record.json").exists()


# Interruptions


def interrupt(config, folder, step):
    """Send Ctrl-C while the completions of a step are rewarded."""
    global ask_after
    stages = 1 + (step - 1) // config.steps[0]  # before each, some of its groups are sampled
    sampled = stages * min(PROMPTS, config.steps[0] * config.prompts_per_step)
    ask_after = ((step - 1) * config.prompts_per_step + sampled) * config.num_generations + 1
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after") as caught:
        run(config, folder)
    assert signal.getsignal(signal.SIGINT) == handler
    assert not (folder / "record.json").exists()
    return str(caught.value)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


@pytest.mark.slow
def test_an_interrupted_run_ends_as_if_it_had_not_been(first, config, tmp_path, no_report):
    folder, record = first
    again = tmp_path / "again"
    assert interrupt(config, again, 3) == "stopped after step 1 of stage 'intermediate'"
    assert [row["global_step"] for row in read_metrics(again / "metrics.jsonl")] == [1, 2, 3]
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        run(replace(config, seed=1), again, resume=True)
    resumed = run(config, again, resume=True)
    rows = read_metrics(again / "metrics.jsonl")
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    wanted = weights(folder)
    for name, tensor in weights(again).items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=1e-4, msg=name)
    for key in ("relative_l2", "changed"):
        ours, theirs = resumed.results["weights_changed"][key], record.results["weights_changed"]
        assert ours == pytest.approx(theirs[key], rel=1e-3)
    assert len(resumed.results["stages"]) == 3 and len(resumed.results["evaluations"]) == 5


def stop_when_measured(label, monkeypatch, config, folder):
    """Run until the evaluation ``label`` begins, and stop there."""
    control, evaluate = Control(), results.evaluate

    def stopping(policy, problems, name, *options):
        if name == label:
            control.stop()
        return evaluate(policy, problems, name, *options)

    with monkeypatch.context() as patch:
        patch.setattr(results, "evaluate", stopping)
        with pytest.raises(Interrupted):
            run(config, folder, control=control)


@pytest.mark.slow
def test_a_stage_is_measured_on_its_own_model_after_a_resumption(
    first, config, tmp_path, no_report, monkeypatch
):
    folder, _ = first
    stop_when_measured("after basic", monkeypatch, config, tmp_path / "cut")
    run(config, tmp_path / "cut", resume=True)
    for label in ("after_basic", "after_intermediate"):
        path = Path("evaluations") / f"{label}.json.gz"
        cut, straight = (load_evaluation(where / path) for where in (tmp_path / "cut", folder))
        assert cut.completions == straight.completions


@pytest.mark.slow
def test_the_reference_is_the_base_after_a_resumption(config, tmp_path, no_report, monkeypatch):
    config = small(config, beta=0.5, steps=(1, 2, 0), per_cell=1, int8_rollouts=False)
    run(config, tmp_path / "straight")
    stop_when_measured("after basic", monkeypatch, config, tmp_path / "cut")
    run(config, tmp_path / "cut", resume=True)
    wanted = weights(tmp_path / "straight")
    for name, tensor in weights(tmp_path / "cut").items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_lora_goes_on_after_a_complete_stage(config, tmp_path, no_report):
    config = small(config, lora_rank=2, steps=(1, 1, 0), fisher_examples=1)
    folder = tmp_path / "lora"
    assert interrupt(config, folder, 1) == "stopped after stage 'basic'"
    assert (folder / "stages" / "1-basic" / "adapter" / "adapter_model.safetensors").exists()
    resumed = run(config, folder, resume=True)
    straight = run(config, tmp_path / "straight")
    assert len(read_metrics(folder / "metrics.jsonl")) == 2
    assert resumed.results["weights_changed"]["changed"]
    wanted = weights(tmp_path / "straight")
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=1e-4, msg=name)
    assert [s["name"] for s in straight.results["stages"]] == ["basic", "intermediate", "advanced"]


# Switches and data


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fast", "generate"])
def test_lora_on_a_bfloat16_base(config, tmp_path, no_report, engine):
    config = small(config, dtype="bfloat16", lora_rank=2, engine=engine)
    assert run(config, tmp_path / engine).results["weights_changed"]["changed"]


@pytest.mark.parametrize(
    "lora_rank, wanted", [(0, {torch.float32}), (2, {torch.bfloat16, torch.float32})]
)
def test_auto_trains_in_float32(config, tmp_path, no_report, monkeypatch, lora_rank, wanted):
    """All weights, or the adapters of LoRA, whose base may be bfloat16."""
    monkeypatch.setattr("cpugrpo_edu.models.load.native_bfloat16", lambda: True)
    trained, held = set(), set()

    def begin(session, learner, index):
        for parameter in learner.policy.model.parameters():
            held.add(parameter.dtype)
            trained.update([parameter.dtype] if parameter.requires_grad else [])
        raise Interrupted("seen")

    monkeypatch.setattr(pipeline, "begin_stage", begin)
    with pytest.raises(Interrupted):
        run(small(config, dtype="auto", lora_rank=lora_rank), tmp_path / "out")
    assert (trained, held) == ({torch.float32}, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
def test_the_record_says_which_type_auto_chose(config, tmp_path, no_report, monkeypatch, native):
    monkeypatch.setattr("cpugrpo_edu.models.load.native_bfloat16", lambda: native)
    record = run(small(config, dtype="auto", lora_rank=2), tmp_path / "out")
    detail = record.results["components"]["memory_efficient_loading"]["detail"]
    assert detail["dtype"] == ("bfloat16" if native else "float32")


def test_too_few_problems_show_before_anything_is_trained(config, tmp_path):
    config = small(config, domains=("algebra",), steps=(1, 0, 5000))
    with pytest.raises(UserError, match="distinct basic algebra problems"):
        run(config, tmp_path / "many")
    assert not (tmp_path / "many").exists()


def test_a_stage_of_no_steps_is_not_consolidated(config, tmp_path, no_report):
    record = run(small(config, fisher_examples=2), tmp_path / "one")
    assert [bool(stage["fisher"]) for stage in record.results["stages"]] == [True, False, False]


@pytest.mark.slow
def test_what_is_protected_holds_from_the_first_step_and_can_be_forgotten(config, tmp_path):
    changes = {"steps": (2, 0, 0), "order": "reversed", "replay": 0.0, "per_cell": 2}
    changes |= {"fisher": "uniform", "fisher_examples": 3, "protect": ("basic", "intermediate")}
    config = small(config, **changes)
    difficulties = [problem.difficulty for problem in protected_problems(config, None)]
    assert len(difficulties) == 3 and set(difficulties) == {"basic", "intermediate"}
    assert protected_problems(replace(config, ewc_strength=0.0), None) == []
    record = run(config, tmp_path / "held")
    rows = read_metrics(tmp_path / "held" / "metrics.jsonl")
    assert rows[0]["ewc_penalty"] == 0 < rows[1]["ewc_penalty"]
    forgotten = record.results["forgetting"]
    assert forgotten["rows"] == ["before", "after advanced"]  # no stage without steps
    assert forgotten["forgetting"]["advanced"] is None
    assert all(forgotten["forgetting"][x] for x in config.protect)
    run(replace(config, ewc_strength=0.0), tmp_path / "free")
    rows = read_metrics(tmp_path / "free" / "metrics.jsonl")
    assert "ewc_penalty" not in rows[1]


def test_forgetting_counts_what_a_stage_replays():
    stages = make_stages("reversed", steps=(1, 1, 0), replay=0.3)
    assert [sorted(stage.trained) for stage in stages] == [sorted(DIFFICULTIES)] * 2 + [[]]
    assert make_stages("curriculum", replay=0.0)[0].trained == ["basic"]


def test_everything_off(config, tmp_path):
    off = {"int8_rollouts": False, "checkpointing": "off", "micro_batch": 2, "cleanup": False}
    config = small(config, ewc_strength=0.0, order="mixed", **off)
    record = run(config, tmp_path / "off")
    on = {name for name, part in record.results["components"].items() if part["on"]}
    assert on == {"memory_efficient_loading", "threads"}
    assert "evaluations" not in record.results
    assert not list((tmp_path / "off").rglob("anchor.safetensors"))
    assert (tmp_path / "off" / "report.html").exists()


@pytest.mark.slow
def test_everything_on(config, tmp_path, no_report):
    config = small(config, int8_rollouts=True, checkpointing="on", lora_rank=2, beta=0.1)
    record = run(replace(config, importance_level="sequence"), tmp_path / "on")
    parts = record.results["components"]
    assert parts["int8_rollouts"]["on"] and parts["gradient_checkpointing"]["on"]
    assert "kl" in read_metrics(tmp_path / "on" / "metrics.jsonl")[0]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_lora_on_a_frozen_int8_base(config, tmp_path, no_report):
    with pytest.raises(UserError, match="add --lora"):
        run(replace(config, dtype="int8"), tmp_path / "refused")
    changes = {"dtype": "int8", "lora_rank": 2, "beta": 0.1, "checkpointing": "off"}
    record = run(replace(config, **changes), tmp_path / "run")
    assert record.results["weights_changed"]["changed"]
    assert record.results["components"]["int8_rollouts"]["on"]
    assert record.results["components"]["ewc"]["detail"]["penalty_last"]
    assert (tmp_path / "run" / "model" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fisher", ["empirical", "batched"])
def test_a_fisher_of_solutions_needs_some_before_anything_is_trained(config, tmp_path, fisher):
    judge, data = tmp_path / "judge.py", tmp_path / "prompts.jsonl"
    judge.write_text("def judge(problem, completion):\n    return 1.0\n")
    data.write_text("".join(json.dumps({"prompt": f"Say {x}."}) + "\n" for x in ascii_letters))
    given = {"data": str(data), "verifier": f"{judge}:judge", "rewards": "odd_tokens=1"}
    with pytest.raises(UserError, match=f"--fisher {fisher} .*choose --fisher rollout_score"):
        run(small(config, fisher=fisher, fisher_examples=2, **given), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_given_completion_is_what_the_policy_would_write(tiny_folder):
    """A tokenizer that begins texts with a token of its own does not do so in the middle."""
    policy = load_policy(tiny_folder)
    tokenizer = policy.tokenizer
    plain = tokenizer("12 + 3 = 15\n#### 15", add_special_tokens=False)["input_ids"]
    begin = tokenizer.pad_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.pad_token_id)]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.pad_token_id
    problem = Problem("p", "arithmetic", "basic", "12 + 3", "15", "12 + 3 = 15\n#### 15")
    config = RunConfig(fisher="empirical")
    [example] = fisher_examples(config, policy, [problem], 0)
    assert example.completion_ids == [*plain, tokenizer.eos_token_id]
    assert example.prompt_ids == policy.encode_problem(problem)
    bare = replace(problem, solution="")
    [example] = fisher_examples(config, policy, [bare], 0)
    assert tokenizer.decode(example.completion_ids[:-1]) == "15"


def test_prompts_and_verifier_of_ones_own(config, tmp_path, no_report):
    data = write_lines(
        tmp_path / "prompts.jsonl", [{"prompt": f"Say {i}.", "id": str(i)} for i in range(24)]
    )
    judge = tmp_path / "judge.py"
    judge.write_text("def judge(problem, completion):\n    return len(completion) % 5 / 4\n")
    config = small(config, data=data, verifier=f"{judge}:judge", rewards="correct_answer=1")
    config = replace(config, num_generations=4, per_cell=1)
    record = run(config, tmp_path / "out")
    domains = {s["domain"] for s in record.results["samples"]}
    assert domains == {"custom"} and record.results["weights_changed"]["changed"]
    # The mean grade and the share of full marks are two numbers.
    [row] = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert row["grade"] == pytest.approx(row["reward"]) and 0 <= row["accuracy"] < row["grade"]
    assert (8 * row["accuracy"]).is_integer()
    overall = record.results["evaluations"][0]["table"]["overall"]
    before = load_evaluation(tmp_path / "out" / "evaluations" / "before.json.gz")
    assert before.grade == [len(text) % 5 / 4 for text in before.completions]
    assert overall["grade"] == pytest.approx(sum(before.grade) / len(before.grade))
    assert overall["accuracy"] == sum(grade == 1 for grade in before.grade) / len(before.grade)

    judge.write_text("def judge(problem, completion):\n    return problem.nonsense\n")
    with pytest.raises(UserError, match="judge failed on problem .*AttributeError"):
        run(config, tmp_path / "broken")


def gsm8k_rows(count):
    return [
        {"question": f"What is {i} + 1?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"}
        for i in range(count)
    ]


def test_data_is_split_without_overlap(config, tmp_path):
    rows = gsm8k_rows(40)
    own = [{"prompt": row["question"], "answer": "1"} for row in rows]
    for name, lines in (("gsm8k", rows), ("custom", own)):
        data = write_lines(tmp_path / f"{name}.jsonl", lines)
        training, held_out = load_data(replace(config, data=data))
        assert training and 0 < len(held_out) <= 6
        assert not {p.question for p in training} & {p.question for p in held_out}
        assert {p.domain for p in training + held_out} == {name}
    one = write_lines(tmp_path / "one.jsonl", rows[:1])
    with pytest.raises(UserError, match="1 problems are too few"):
        load_data(replace(config, data=one))


@pytest.mark.slow
def test_gsm8k_format_trains(config, tmp_path, no_report):
    config = small(config, data=write_lines(tmp_path / "gsm8k.jsonl", gsm8k_rows(24)))
    assert run(config, tmp_path / "out").results["weights_changed"]["changed"]


def test_a_checkpoint_at_once_when_memory_is_about_to_run_out(tmp_path, monkeypatch):
    said, alarm = [], {"text": None}
    monkeypatch.setattr("cpugrpo_edu.run.saver.memory_alarm", lambda: alarm["text"])
    trainer = SimpleNamespace(add_callback=lambda callback: None, say=said.append)
    saver = CheckpointSaver(trainer, tmp_path, minutes=60)

    def save_after_step(text):
        alarm["text"], control = text, SimpleNamespace(should_save=False)
        saver.on_step_end(None, None, control)
        return control.should_save

    assert not save_after_step(None)
    assert save_after_step("only 9 MiB are left") and "saving a checkpoint now" in said[0]
    assert not save_after_step("only 8 MiB are left")  # once, until it is over
    assert not save_after_step(None)
    assert save_after_step("only 7 MiB are left") and len(said) == 2


def test_a_budget_that_cannot_hold_the_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"needs about .* for the program and the weights") as error:
        run(RunConfig(memory_budget_gib=0.01), tmp_path / "out")
    assert "raise it" in str(error.value) and not (tmp_path / "out").exists()
