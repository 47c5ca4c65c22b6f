"""The command line: results on stdout, one sentence and code 2 for every mistake."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from command_line import invoke
from typer.testing import CliRunner

from cpugrpo_edu import cli
from cpugrpo_edu.data import Episode, Group
from cpugrpo_edu.engine import hardware
from cpugrpo_edu.engine.sizes import models_that_fit
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab import estimate
from cpugrpo_edu.models.load import SYSTEM_PROMPT, load_policy, save_policy
from cpugrpo_edu.rewards import REWARDS
from cpugrpo_edu.run.config import RunConfig, config_for, flag_of
from cpugrpo_edu.run.pause import Interrupted
from cpugrpo_edu.tasks import split_of

COMMANDS = (
    "doctor",
    "check",
    "run",
    "warmstart",
    "evaluate",
    "generate",
    "report",
    "pretrain",
    "models",
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tests run side by side: unless asked for more, a command takes one thread, not every core."""
    original = hardware.configure_threads
    monkeypatch.setattr(
        hardware,
        "configure_threads",
        lambda threads=None: original(1 if threads is None else threads),
    )
    monkeypatch.setattr(
        "cpugrpo_edu.engine.threads.fastest_threads", lambda model: hardware.usable_cores()
    )


def refused(*arguments):
    """The one sentence that a mistake ends with."""
    code, out, err = invoke(*arguments)
    assert code == 2, (code, out, err)
    assert out == "" and "Traceback" not in err
    [sentence] = [line for line in err.splitlines() if line.startswith("cpugrpo: ")]
    return sentence


def odd_tokens(problem, episode):
    return sum(i % 2 for i in episode.completion_ids) / len(episode.completion_ids)


@pytest.fixture
def tiny_run(tiny_folder, monkeypatch):
    """The options of the smallest run, without what test_pipeline looks at."""
    monkeypatch.setitem(REWARDS, "odd_tokens", odd_tokens)
    return [
        "run", "--quiet", "--model", tiny_folder, "--steps", "1,0,0", "--prompts-per-step", 2,
        "--num-generations", 2, "--max-completion", 4, "--patience", 0, "--fisher-examples", 0,
        "--domains", "lists", "--rewards", "odd_tokens=1", "--threads", 1, "--no-int8-evaluation",
        "--per-cell", 0,
    ]  # fmt: skip


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command):
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"cpugrpo {command}" in result.stdout and "Example" in result.stdout


def test_help_of_the_real_program_loads_nothing_heavy():
    code = (
        "import sys; from cpugrpo_edu import cli\n"
        "try: cli.main()\n"
        "finally: print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    assert all(command in done.stdout for command in COMMANDS)
    assert done.stdout.rstrip().endswith("[]")


def test_unknown_command_and_option():
    assert invoke("dance")[0] == 2
    code, _, err = invoke("generate", "x", "--colour", "red")
    assert code == 2 and "--colour" in err


# Looking around


def test_doctor_as_json():
    code, out, _ = invoke("doctor", "--json")
    checks = json.loads(out)
    assert {"name", "ok", "detail", "fix"} <= set(checks[0])
    assert code == int(any(check["ok"] == "fail" for check in checks))


def test_doctor_fails_with_code_1(monkeypatch):
    from cpugrpo_edu.engine.doctor import Check

    monkeypatch.setattr(
        "cpugrpo_edu.engine.doctor.examine",
        lambda: [Check("cores", "ok", "2"), Check("disk", "fail", "none left", "free some")],
    )
    code, out, _ = invoke("doctor")
    assert code == 1 and "FAIL" in out and "free some" in out


def test_models():
    code, out, _ = invoke("models", "--memory-gib", 1, "--json")
    rows = {row["name"]: row["verdict"] for row in json.loads(out)}
    assert code == 0 and rows["TinyLlama-1.1B-Chat"] == "too big"
    code, out, _ = invoke("models", "--memory-gib", 64)
    assert code == 0 and "64.0 GiB" in out
    assert "--memory-gib is 0.0; give at least 0.01" in refused("models", "--memory-gib", 0)


# Generating and evaluating


def test_generate(tiny_folder):
    model = ("--model", tiny_folder, "--max-completion", 5)
    code, out, _ = invoke("generate", "Compute 1 + 2.", *model, "--json")
    [found] = json.loads(out)
    assert code == 0 and found["log_prob"] < 0 and 1 <= found["tokens"] <= 5
    assert found["finished"] or found["tokens"] == 5
    again = invoke("generate", "Compute 1 + 2.", *model)[1]
    assert again.rstrip("\n") == found["text"].rstrip("\n")  # greedy
    sampled = ("--n", 3, "--temperature", 1, "--json")
    several = json.loads(invoke("generate", "a", *model, *sampled)[1])
    assert len({item["text"] for item in several}) > 1
    assert several == json.loads(invoke("generate", "a", *model, *sampled)[1])


def test_evaluate_and_generate_take_a_system_prompt(tiny_folder, tmp_path, monkeypatch):
    """By default that which a model was trained with."""
    folder, asked = tmp_path / "trained", []
    save_policy(load_policy(tiny_folder, system="Be brief."), folder)

    def answer(policy, problems, n, sampling, on_done=None):
        asked.append(policy.tokenizer.decode(policy.encode_problem(problems[0])))
        return [Group([1], [Episode(text="5")], problem) for problem in problems]

    monkeypatch.setattr("cpugrpo_edu.evaluate.rollout", answer)
    monkeypatch.setattr("cpugrpo_edu.sample.rollout", answer)
    for command in (("evaluate", "--per-cell", 1, "--quiet"), ("generate", "a")):
        for flags in ((), ("--system", "Be kind.")):
            code, _, err = invoke(*command, "--model", folder, *flags)
            assert code == 0, err
    assert ["Be brief." in text for text in asked] == [True, False, True, False]
    assert ["Be kind." in text for text in asked] == [False, True, False, True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["  "], "the prompt is empty"),
        (["a", "--n", 0], "--n is 0; give at least 1"),
        (["a", "--temperature", -1], "--temperature is -1.0"),
        (["a", "--max-completion", 0], "--max-completion is 0"),
        (["a", "--model", "./nowhere"], "no model folder at ./nowhere"),
    ],
)
def test_generate_refuses(arguments, words):
    assert words in refused("generate", *arguments)


def test_evaluate(tiny_folder, tmp_path):
    kept = tmp_path / "items.json.gz"
    common = ("evaluate", "--model", tiny_folder, "--per-cell", 1, "--max-completion", 3, "--quiet")
    code, out, _ = invoke(*common, "--json", "--output", kept)
    table = json.loads(out)
    assert code == 0 and table["overall"]["n"] == 12 and kept.exists()
    before = kept.read_bytes()
    assert "already exists; give another --output" in refused(*common, "--output", kept)
    assert kept.read_bytes() == before
    code, out, _ = invoke(*common, "--int8")
    assert code == 0 and "INT8" in out and "Overall 0.0 (0.0–24.2), 12" in out
    code, out, _ = invoke(*common, "--json", "--domains", "stories, lists")
    assert code == 0 and set(json.loads(out)["cells"]) == {"stories", "lists"}
    assert "unknown domains poetry; allowed are" in refused(*common, "--domains", "poetry")
    assert "--per-cell is -1" in refused("evaluate", "--model", tiny_folder, "--per-cell", -1)
    words = refused("evaluate", "--model", tiny_folder, "--answer-format", "xml")
    assert "unknown answer format 'xml'; allowed are auto, hash" in words


@pytest.mark.parametrize(("form", "right"), [(None, 3), ("auto", 3), ("boxed", 1), ("hash", 0)])
def test_evaluate_reads_answers_as_the_model_writes_them(
    tiny_folder, tmp_path, monkeypatch, form, right
):
    """A model that is not ours: by default any form counts, and no system prompt of ours."""
    folder = shutil.copytree(tiny_folder, tmp_path / "chat")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"cpugrpo_format": False}))
    said = iter(["The answer is 5.", r"\boxed{5}", "so 2 + 3 = 5"])
    held_out = [q for i in range(99) if split_of(q := f"{i}. What is 2 + 3?") == "eval"][:3]
    rows = [{"prompt": q, "answer": "5"} for q in [*held_out, "What is 2 + 3?", "2 + 3?"]]
    assert sum(split_of(row["prompt"]) == "eval" for row in rows) == 3
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = []

    def answer(policy, problems, n, sampling, on_done):
        asked.append(policy.system)
        return [Group([1], [Episode(text=next(said))], problem) for problem in problems]

    monkeypatch.setattr("cpugrpo_edu.evaluate.rollout", answer)
    flags = [] if form is None else ["--answer-format", form]
    data = ("--data", tmp_path / "sums.jsonl", "--json", "--quiet")
    code, out, _ = invoke("evaluate", "--model", folder, *data, *flags)
    assert code == 0 and round(3 * json.loads(out)["overall"]["accuracy"]) == right
    assert asked == [SYSTEM_PROMPT if form == "hash" else None]


def own_sums(folder, count=60):
    rows = [{"prompt": f"What is {i} + 1?", "answer": f"{i + 1}"} for i in range(count)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "sums.jsonl"


def test_evaluate_says_how_many_of_your_problems_it_evaluates(tiny_folder, tmp_path):
    data = own_sums(tmp_path)
    held_out = sum(split_of(f"What is {i} + 1?") == "eval" for i in range(60))
    common = ("evaluate", "--model", tiny_folder, "--data", data, "--max-completion", 2, "--json")
    code, out, err = invoke(*common)
    assert code == 0 and json.loads(out)["overall"]["n"] == held_out < 60
    assert f"evaluating {held_out} of 60 problems of {data}" in err and "--all" in err
    code, out, err = invoke(*common, "--all")
    assert code == 0 and json.loads(out)["overall"]["n"] == 60 and "evaluating" not in err
    assert "--all is for your own data" in refused("evaluate", "--model", tiny_folder, "--all")
    for command in (("evaluate",), ("run",), ("warmstart",)):
        words = refused(*command, "--model", tiny_folder, "--data", data, "--domains", "lists")
        assert "--domains is for generated problems" in words


def test_grades_and_full_marks_are_two_numbers(tiny_folder, tmp_path):
    (tmp_path / "judge.py").write_text(
        "def judge(problem, completion):\n    return [0, 0.25, 1][int(problem.answer) % 3]\n"
    )
    common = ("evaluate", "--model", tiny_folder, "--data", own_sums(tmp_path), "--all", "--quiet")
    common += ("--verifier", f"{tmp_path / 'judge.py'}:judge", "--max-completion", 2)
    code, out, _ = invoke(*common, "--json")
    found = json.loads(out)["overall"]
    assert code == 0 and (found["accuracy"], found["grade"]) == (1 / 3, pytest.approx(1.25 / 3))
    code, out, _ = invoke(*common)
    words = " ".join(out.split())  # the title wraps where the folder has a long name
    assert "full marks" in words and "with full marks; mean grade 0.417" in words


def test_evaluate_has_the_defaults_of_run(tiny_folder, tmp_path, monkeypatch):
    """For a model that is not ours, and for one that learned to state its answers in a way."""
    folder = shutil.copytree(tiny_folder, tmp_path / "chat")
    settings = json.loads((folder / "config.json").read_text()) | {"cpugrpo_format": False}
    seen = []

    def answer(policy, problems, n, sampling, on_done):
        seen.append((problems[0].domain, problems[0].answer_format, sampling.max_new_tokens))
        return [Group([1], [Episode(text="5")], problem) for problem in problems]

    monkeypatch.setattr("cpugrpo_edu.evaluate.rollout", answer)
    for more in ({}, {"cpugrpo_answer_format": "boxed"}):
        (folder / "config.json").write_text(json.dumps({**settings, **more}))
        assert invoke("evaluate", "--model", folder, "--per-cell", 1, "--quiet")[0] == 0
    wanted = config_for("someone/model")
    assert seen == [
        (wanted.domains[0], wanted.answer_format, wanted.max_completion),
        (wanted.domains[0], "boxed", wanted.max_completion),
    ]
    assert invoke("evaluate", "--model", tiny_folder, "--per-cell", 1, "--quiet")[0] == 0
    assert seen[2] == ("arithmetic", "hash", RunConfig().max_completion)


# Runs


def test_run_and_report(tiny_run, tmp_path):
    folder = tmp_path / "run"
    code, out, err = invoke(*tiny_run, "--output", folder, "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["record"] == str(folder / "record.json") and found["headline"]
    record = json.loads((folder / "record.json").read_text())
    assert record["config"]["steps"] == [1, 0, 0] and record["config"]["threads"] == 1

    (folder / "report.md").unlink()
    code, out, _ = invoke("report", folder, "--json")
    assert code == 0 and json.loads(out)["markdown"] == str(folder / "report.md")
    assert (folder / "report.md").exists()

    before = (folder / "record.json").read_bytes()
    assert "already exists and is not empty" in refused(*tiny_run, "--output", folder)
    assert "is complete" in refused(*tiny_run, "--output", folder, "--resume")
    assert (folder / "record.json").read_bytes() == before


def test_an_interrupted_run_says_how_to_go_on(tiny_run, tmp_path, monkeypatch):
    rewarded = []

    def interrupting(problem, episode):
        rewarded.append(problem)
        if len(rewarded) == 5:  # two groups of two were sampled before the first step
            os.kill(os.getpid(), signal.SIGINT)
        return odd_tokens(problem, episode)

    monkeypatch.setitem(REWARDS, "odd_tokens", interrupting)
    folder = tmp_path / "run"
    code, out, err = invoke(*tiny_run, "--output", folder)
    assert code == 130 and out == ""
    assert f"--resume --output {folder}" in err and "stopped after stage 'basic'" in err
    monkeypatch.setitem(REWARDS, "odd_tokens", odd_tokens)
    assert invoke(*tiny_run, "--output", folder, "--resume")[0] == 0
    assert (folder / "record.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "1,2"], "--steps: cannot read '1,2'; give one number or three"),
        (["--steps", "many"], "--steps: cannot read 'many'"),
        (["--steps", "1.5"], "--steps: cannot read '1.5'"),
        (["--steps", ""], "--steps: cannot read ''"),
        (["--steps", "0"], "at least one step in total"),
        (["--lr", "1,,2"], "--lr: cannot read '1,,2'"),
        (["--lr", "nan"], "--lr is (nan, nan, nan)"),
        (["--resume"], "--resume needs the --output folder"),
        (["--model", "./nowhere"], "no model folder at ./nowhere"),
        (["--domains", "lists,poetry"], "unknown domains poetry"),
        (["--num-generations", 1], "--num-generations is 1; give at least 2"),
        (["--threads", 0], "--threads is 0"),
        (["--memory-budget", -1], "memory budget"),
        (["--data", "./nowhere.jsonl"], "nowhere.jsonl"),
        (["--verifier", "judge.py:judge"], "--data"),
    ],
)
def test_run_refuses(arguments, words, tmp_path):
    output = [] if arguments == ["--resume"] else ["--output", tmp_path / "out"]
    assert words in refused("run", "--quiet", *arguments, *output)
    assert not (tmp_path / "out" / "stages").exists()


def test_run_names_the_line_of_bad_data(tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": oops}\n')
    assert "line 2 of" in refused("run", "--data", data, "--output", tmp_path / "out")
    data.write_text("")
    assert "no prompts in" in refused("run", "--data", data, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_report_of_nothing(tmp_path):
    assert "cannot read a run record" in refused("report", tmp_path / "none")
    (tmp_path / "record.json").write_text("{}")
    assert "cannot read a run record" in refused("report", tmp_path)


def test_pretrain(tmp_path, monkeypatch):
    import cpugrpo_edu.models.pretrain as module

    original = module.train_tokenizer
    monkeypatch.setattr(
        module, "train_tokenizer", lambda size, seed=0: original(size, seed, samples=100)
    )
    folder = tmp_path / "model"
    common = ("pretrain", "--output", folder, "--steps", 2, "--layers", 1, "--per-cell", 1, "-q")
    code, out, err = invoke(*common, "--hidden", 40, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["config"]["steps"] == 2 and summary["config"]["hidden"] == 40
    assert (folder / "model.safetensors").exists() and (folder / "README.md").exists()
    assert "already holds a model" in refused(*common)


# Failing


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("x is 3; give 4"), 2, "cpugrpo: x is 3; give 4\n"),
        (KeyboardInterrupt(), 130, "cpugrpo: interrupted"),
        (MemoryError(), 2, "out of memory; choose a smaller model"),
    ],
)
def test_known_failures_end_in_one_line(error, code, words, capsys):
    with pytest.raises(SystemExit) as end, cli.failing_clearly():
        raise error
    captured = capsys.readouterr()
    assert end.value.code == code and words in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_unknown_failures_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), cli.failing_clearly():
        raise ZeroDivisionError


@pytest.mark.slow
def test_run_says_its_estimate_first(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "estimate_text", lambda config: f"about {config.steps} expected")
    loud = [word for word in tiny_run if word != "--quiet"]
    code, out, err = invoke(*loud, "--json", "--output", tmp_path / "loud")
    assert code == 0 and "headline" in json.loads(out.splitlines()[-1])
    lines = err.splitlines()
    assert lines[0] == "about (1, 0, 0) expected" and "expected" not in out
    code, _, err = invoke(*tiny_run, "--output", tmp_path / "quiet")
    assert code == 0 and "expected" not in err


def test_models_show_what_a_step_takes(monkeypatch):
    step = {"int8_step_seconds": 4.21, "int8_step_error": 0.2, "int8_peak_bytes": 2 * 2**30}
    names = [row["name"] for row in models_that_fit()]
    found = (dict.fromkeys(names, step), "what a step is")
    monkeypatch.setattr(estimate, "catalogue_steps", lambda: found)
    code, out, _ = invoke("models")
    assert code == 0 and "what a step is" in out
    code, out, _ = invoke("models", "--json")
    assert all(row["int8_step_seconds"] == 4.21 for row in json.loads(out))
    monkeypatch.setattr(estimate, "catalogue_steps", lambda: ({}, "No estimate of time: why."))
    code, out, _ = invoke("models")
    assert code == 0 and "No estimate of time: why." in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"checkpointing": "on", "threads": None, "micro_batch": None}),
        (["--profile", "fast"], {"checkpointing": "auto"}),
        (["--profile", "frugal"], {"threads": 1, "micro_batch": 4, "save_minutes": 0.5}),
        (["--profile", "frugal", "--micro-batch", 9], {"threads": 1, "micro_batch": 9}),
    ],
)
def test_profiles_and_what_counts_more(monkeypatch, tmp_path, arguments, expected):
    asked = []

    def stop(config, folder, **named):
        asked.append(config)
        raise Interrupted("stopped")

    monkeypatch.setattr("cpugrpo_edu.run.pipeline.run", stop)
    code, _, _ = invoke("run", "--output", tmp_path, *arguments)
    assert code == 130
    for name, value in expected.items():
        assert getattr(asked[0], name) == value


def test_every_setting_has_a_flag_that_reaches_the_run(monkeypatch, tmp_path):
    asked = []

    def stop(config, folder, **named):
        asked.append(config)
        raise Interrupted("stopped")

    monkeypatch.setattr("cpugrpo_edu.run.pipeline.run", stop)
    given = {
        "model": "a/b", "seed": 1, "data": "c", "verifier": "d", "prompt_column": "f",
        "answer_column": "g", "domains": ("lists", "parity"), "system": "e",
        "answer_format": "boxed", "order": "mixed", "steps": (1, 2, 3),
        "learning_rates": (0.1, 0.1, 0.1),
        "replay": 0.5, "prompts_per_step": 2, "num_generations": 3, "max_completion": 4,
        "temperature": 0.5, "beta": 0.25, "loss_type": "grpo", "importance_level": "sequence",
        "epsilon": 0.125, "rewards": "good_format=1", "patience": 5, "lora_rank": 6,
        "dtype": "bfloat16", "kernel": "compiled", "checkpointing": "off", "micro_batch": 7,
        "memory_budget_gib": 3.5, "cleanup": False, "threads": 1, "engine": "generate",
        "int8_rollouts": True, "int8_evaluation": False, "importance_correction": False,
        "share_prefix": False, "fisher": "exact", "fisher_examples": 8, "ewc_strength": 0.75,
        "protect": ("basic",), "scenario": "letters", "ewc_decay": 0.5, "per_cell": 9,
        "save_minutes": 2.0,
    }  # fmt: skip
    written = {"learning_rates": "0.1", "memory_budget_gib": "3.5GiB"}
    arguments = []
    for name, value in given.items():
        flag = flag_of(name)
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            arguments += [flag, written.get(name, text)]
    for without in ("domains", "data"):  # one has no use for the other
        at = arguments.index(flag_of(without))
        some = arguments[:at] + arguments[at + 2 :]
        assert invoke("run", "--quiet", "--output", tmp_path, *some)[0] == 130
        found = dataclasses.asdict(asked.pop())
        default = found.pop(without)
        assert default != given[without]
        assert found == {name: value for name, value in given.items() if name != without}


def test_every_command_knows_json_and_quiet():
    def commands(group):
        for command in group.registered_commands:
            yield inspect.signature(command.callback).parameters
        for each in group.registered_groups:
            yield from commands(each.typer_instance)

    found = list(commands(cli.app))
    assert len(found) > 30 and all({"as_json", "quiet"} <= set(names) for names in found)


def test_an_unknown_profile():
    assert "unknown --profile 'hasty'; allowed are balanced, fast, frugal" in refused(
        "run", "--profile", "hasty"
    )


def test_export_and_checkpoints_of_a_folder_that_holds_no_run(tmp_path):
    assert "cannot read a run record" in refused("export", tmp_path)
    assert "cannot export to 'pickle'" in refused("export", tmp_path, "--to", "pickle")
    assert "holds no run" in refused("checkpoints", "list", tmp_path)
    assert "--keep is 0" in refused("checkpoints", "prune", tmp_path, "--keep", 0)
