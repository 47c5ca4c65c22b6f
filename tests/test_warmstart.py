"""Supervised baselines: only right answers are imitated, and only their tokens have a loss."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
import torch
from command_line import invoke
from transformers import AutoModelForCausalLM

from cpugrpo_edu.data import Episode, Group
from cpugrpo_edu.engine.trl_internals import without_notices
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.fisher import Example
from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.policy import token_log_probs
from cpugrpo_edu.record.metrics import MetricsLog, read_metrics
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.run import lessons as lessons_module
from cpugrpo_edu.run import warmstart as warmstart_module
from cpugrpo_edu.run.consolidate import solution_ids
from cpugrpo_edu.run.lessons import own_lessons, worked_lessons, worked_solution
from cpugrpo_edu.run.pause import Control
from cpugrpo_edu.run.sft import Reporter, make_trainer
from cpugrpo_edu.run.warmstart import draw_problems, warmstart
from cpugrpo_edu.run.warmstart_config import WarmstartConfig
from cpugrpo_edu.show.progress import ProgressDisplay
from cpugrpo_edu.tasks import TASKS, make_problems
from cpugrpo_edu.tasks.answers import with_answer_format

QUIET = ProgressDisplay(quiet=True)


def small(model, **settings):
    """A warm start of seconds."""
    defaults = {"problems": 6, "steps": 12, "batch_size": 4, "domains": ("arithmetic",)}
    defaults |= {"lora_rank": 0, "learning_rate": 1e-2, "threads": 1}
    return WarmstartConfig(str(model), **(defaults | settings))


@torch.no_grad()
def log_likelihood(policy, problems):
    """Mean log-probability of the worked solutions, one by one, in nats a token."""
    total, tokens = 0.0, 0
    for problem in problems:
        prompt, done = policy.encode_problem(problem), solution_ids(policy, problem)
        mask = torch.ones(1, len(prompt) + len(done), dtype=torch.long)
        ids = torch.tensor([prompt]), torch.tensor([done])
        total += float(token_log_probs(policy.model, *ids, mask).sum())
        tokens += len(done)
    return total / tokens


def trainer_of(policy, examples, config, micro_batch, folder):
    reporter = Reporter(config, MetricsLog(folder / "metrics.jsonl"), QUIET, Control())
    with without_notices():
        return make_trainer(policy, examples, config, micro_batch, reporter)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_worked_solutions_become_likelier_in_a_plain_model_folder(tiny_folder, tmp_path, rank):
    config, out = small(tiny_folder, lora_rank=rank), tmp_path / "warm"
    problems = draw_problems(config, out)
    before = log_likelihood(load_policy(tiny_folder), problems)
    record = warmstart(config, out)
    after = log_likelihood(load_policy(out), problems)
    assert after > before + 0.5
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    assert (out / "adapter").exists() == bool(rank)

    assert RunRecord.load(out / "record.json") == record and record.kind == "warmstart"
    found, losses = record.results, [row["loss"] for row in read_metrics(out / "metrics.jsonl")]
    assert len(losses) == found["steps"] == 12
    assert found["loss"] == {"first": losses[0], "last": losses[-1]} and losses[-1] < losses[0]
    assert found["weights_changed"]["changed"] and found["weights_changed"]["relative_l2"] > 0
    assert found["problems"] == found["taught"] == found["lessons"] == 6
    rows = [json.loads(line) for line in (out / "lessons.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == [p.question for p in problems]
    assert [row["completion"] for row in rows] == [p.solution for p in problems]


def test_only_the_completion_has_a_loss_and_trls_is_the_mean_over_its_tokens(
    tiny_folder, tiny_policy, tmp_path
):
    problems = make_problems("lists", "basic", "train", 4)
    examples = [example for _, example in worked_lessons(tiny_policy, problems)]
    wanted = {(tuple(e.prompt_ids), tuple(e.completion_ids)) for e in examples}
    assert wanted == {
        (tuple(tiny_policy.encode_problem(p)), tuple(solution_ids(tiny_policy, p)))
        for p in problems
    }
    assert all(done[-1] == tiny_policy.tokenizer.eos_token_id for _, done in wanted)
    trainer = trainer_of(tiny_policy, examples, small(tiny_folder), 4, tmp_path)
    [batch] = trainer.get_train_dataloader()
    found = set()
    for ids, labels, mask in zip(*(batch[k] for k in ("input_ids", "labels", "attention_mask"))):
        on = labels != -100
        assert torch.equal(ids[on], labels[on])
        found.add((tuple(ids[~on & mask.bool()].tolist()), tuple(ids[on].tolist())))
    assert found == wanted
    with torch.no_grad():
        loss = float(trainer.compute_loss(tiny_policy.model, dict(batch)))
    assert loss == pytest.approx(-log_likelihood(tiny_policy, problems), abs=1e-4)


def test_the_size_of_the_micro_batches_does_not_matter(tiny_folder, tmp_path, monkeypatch):
    losses = []
    for size in (4, 1):
        monkeypatch.setattr(warmstart_module, "plan_micro_batch", lambda *_, size=size: size)
        warmstart(small(tiny_folder, problems=4, steps=3), tmp_path / str(size))
        losses.append([row["loss"] for row in read_metrics(tmp_path / str(size) / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("form", ["hash", "auto", "boxed", "sentence", "last-number"])
@pytest.mark.parametrize("domain", TASKS)
def test_worked_solutions_state_the_answer_in_every_format(domain, form):
    problems = with_answer_format(make_problems(domain, "intermediate", "train", 5), form)
    stated = [problem.verify(worked_solution(problem)) for problem in problems]
    # The answer of a list problem need not be a number.
    assert all(stated) or (form == "last-number" and domain in ("lists", "letters"))


def test_only_different_complete_right_answers_of_the_model_are_kept(
    tiny_folder, tiny_policy, monkeypatch
):
    problems = make_problems("arithmetic", "basic", "train", 3)
    right = f"#### {problems[0].answer}"
    wrong = f"#### {int(problems[0].answer) + 1}"

    def answers(policy, asked, n, sampling, on_done):
        said = [("a\n" + right, True), (wrong, True), (right, False), ("a\n" + right + " ", True)]
        said += [("b\n" + right, True), ("c\n" + right, True)]
        episodes = [Episode([i], finished=end, text=text) for i, (text, end) in enumerate(said)]
        no = [Episode([9], text="#### no")] * n
        assert n == len(said) and sampling.temperature == 0.5
        return [Group([1], episodes if p is asked[0] else no, p) for p in asked]

    monkeypatch.setattr(lessons_module, "rollout", answers)
    config = small(tiny_folder, samples=6, keep=2, temperature=0.5)
    lessons, counts = own_lessons(tiny_policy, problems, config, QUIET)
    assert lessons == [(problems[0], Example([1], [0])), (problems[0], Example([1], [4]))]
    assert counts == {"sampled": 18, "right": 4}
    with pytest.raises(UserError, match="6 answers to each of 2 problems none was complete and"):
        own_lessons(tiny_policy, problems[1:], config, QUIET)


def test_a_model_learns_from_its_own_right_answers(tmp_path):
    config = small(
        "bundled", method="rft", problems=8, steps=2, samples=6, keep=1, learning_rate=None,
        domains=("algebra",), max_completion=48,
    )  # fmt: skip
    record = warmstart(config, tmp_path / "own")
    rows = [json.loads(x) for x in (tmp_path / "own" / "lessons.jsonl").read_text().splitlines()]
    problems = {p.question: p for p in draw_problems(config, tmp_path / "new")}
    assert all(problems[row["question"]].verify(row["completion"]) for row in rows)
    found = record.results
    assert found["problems"] == 8 and found["sampled"] == 48
    assert 1 <= len(rows) == found["lessons"] == found["taught"] <= found["right"] < 48
    load_policy(tmp_path / "own")


def test_a_stop_saves_what_was_learned(tiny_folder, tmp_path):
    control = Control()
    control.stop()
    record = warmstart(small(tiny_folder), tmp_path / "warm", control=control)
    assert record.results["steps"] == 1 and record.results["weights_changed"]["changed"]
    assert len(read_metrics(tmp_path / "warm" / "metrics.jsonl")) == 1
    load_policy(tmp_path / "warm")


def test_ctrl_c_stops_after_the_step_and_says_so(tiny_folder, tmp_path, monkeypatch):
    write = MetricsLog.write

    def interrupted(log, row):
        write(log, row)
        if row["step"] == 2:  # is over, so the third is the current one
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsLog, "write", interrupted)
    flags = ["--model", tiny_folder, "--domains", "lists", "--problems", 4, "--steps", 9, "--quiet"]
    code, out, _ = invoke("warmstart", *flags, "--threads", 1, "--output", tmp_path / "warm")
    assert code == 130 and "stopped after 3" in out
    assert RunRecord.load(tmp_path / "warm" / "record.json").results["steps"] == 3
    load_policy(tmp_path / "warm")


def test_a_loss_that_is_not_the_models_own_is_refused(tiny_policy, tiny_folder, tmp_path):
    """As it would be for an architecture with a logit scale that TRL does not know."""
    [(_, example)] = worked_lessons(tiny_policy, make_problems("lists", "basic", "train", 1))
    head = tiny_policy.model.lm_head
    head.register_forward_hook(lambda module, inputs, logits: 0.5 * logits)
    with pytest.raises(UserError, match="another loss for a 'qwen2' model"):
        trainer_of(tiny_policy, [example], small(tiny_folder), 1, tmp_path)


def test_a_full_disk_leaves_no_half_model(tiny_folder, tmp_path, monkeypatch):
    def fail(policy, folder):
        (warmstart_module.Path(folder) / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(warmstart_module, "save_policy", fail)
    with pytest.raises(UserError, match="the disk is full; .* with another --output"):
        warmstart(small(tiny_folder, steps=1), tmp_path / "warm")
    left = sorted(path.name for path in (tmp_path / "warm").iterdir())
    assert left == ["lessons.jsonl", "metrics.jsonl"]


def test_a_loss_that_is_no_number_ends_the_training(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="the loss of step . is nan, .* smaller --lr"):
        warmstart(small(tiny_folder, learning_rate=1e30, steps=9), tmp_path / "warm")
    assert not (tmp_path / "warm" / "config.json").exists()


# The command


def test_the_command(tiny_folder, tmp_path):
    flags = ["--model", tiny_folder, "--domains", "lists", "--problems", 4, "--steps", 2]
    flags += ["--batch-size", 2, "--lora", 2, "--lr", 0.001, "--threads", 1, "--quiet"]
    code, out, err = invoke("warmstart", *flags, "--output", tmp_path / "warm", "--json")
    found = json.loads(out)
    assert code == 0, err
    assert found["model"] == str(tmp_path / "warm") and found["steps"] == 2
    record = RunRecord.load(found["record"])
    assert "fine-tuned on examples" in (tmp_path / "warm" / "README.md").read_text()
    assert record.config["domains"] == ["lists"] and record.config["learning_rate"] == 0.001
    rated = ("evaluate", "--model", tmp_path / "warm", "--per-cell", 1, "--max-completion", 3)
    assert invoke(*rated, "--quiet")[0] == 0
    before = (tmp_path / "warm" / "record.json").read_bytes()
    code, _, err = invoke("warmstart", *flags, "--output", tmp_path / "warm")
    assert code == 2 and "already exists and is not empty; give another --output" in err
    assert (tmp_path / "warm" / "record.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "dpo"], "unknown --method 'dpo'; allowed are sft, rft"),
        (["--dtype", "int8"], "unknown --dtype 'int8'; allowed are auto, float32, bfloat16"),
        (["--dtype", "bfloat16", "--lora", 0], "full fine-tuning in bfloat16 loses most updates"),
        (["--lr", 0], "--lr is 0.0; give more than 0"),
        (["--steps", 0], "--steps is 0; give at least 1"),
        (["--keep", 0], "--keep is 0; give at least 1"),
        (["--domains", "poetry"], "unknown domains poetry; allowed are"),
        (["--answer-format", "xml"], "unknown --answer-format 'xml'; allowed are auto, hash"),
        (["--model", "./nowhere"], "no model folder at ./nowhere"),
    ],
)
def test_refusals(tmp_path, flags, words):
    code, out, err = invoke("warmstart", "--quiet", *flags, "--output", tmp_path / "warm")
    assert code == 2 and out == "" and words in err and "Traceback" not in err
    assert not (tmp_path / "warm").exists()


def test_data_without_worked_solutions(tiny_folder, tmp_path):
    rows = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(30)]
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="has a worked solution that its verifier accepts; .* rft"):
        warmstart(small(tiny_folder, data=str(data), domains=(), problems=4), tmp_path / "warm")
    assert not (tmp_path / "warm").exists()
