"""``cpugrpo check`` shows what a run would begin with, and writes nothing."""

from __future__ import annotations

import json

import pytest
from command_line import invoke

from cpugrpo_edu.data import Problem
from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.rewards import REWARDS


@pytest.fixture
def command(tiny_folder, tmp_path, monkeypatch):
    odd = lambda problem, episode: sum(i % 2 for i in episode.completion_ids)  # noqa: E731
    monkeypatch.setitem(REWARDS, "odd_tokens", odd)
    rows = [{"prompt": f"What is {i} + 1?", "answer": f"It is surely {i + 1}"} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return (
        "check", "--model", tiny_folder, "--data", "sums.jsonl", "--rewards", "odd_tokens=1",
        "--num-generations", 4, "--max-completion", 5, "--threads", 1, "--system", "Be brief.",
    )  # fmt: skip


def test_it_shows_prompt_completions_signal_and_drift(command, tiny_folder, tmp_path):
    code, out, err = invoke(*command, "--json")
    assert code == 0, err
    found = json.loads(out)
    question = found["completions"][0]["question"]
    policy = load_policy(tiny_folder, system="Be brief.")
    ids = policy.encode_problem(Problem("1", "custom", "basic", question, ""))
    assert found["prompt"] == policy.tokenizer.decode(ids)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in found["prompt"]
    assert len({each["question"] for each in found["completions"]}) == 4
    for each in found["completions"]:
        assert each["reward"] == int(each["reward"]) and 1 <= each["tokens"] <= 5
        assert each["ended"] or each["tokens"] == 5
        assert each["reference"].startswith("It is surely")
    assert found["signal"]["groups"] == 4 and 0 <= found["drift"]["kl"] < 0.05
    assert "expected" in found["ahead"] or "no estimate" in found["ahead"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sums.jsonl"]

    code, out, _ = invoke(*command, "--quiet")
    assert code == 0 and "  | <|im_start|>user\n" in out and "cut at the limit" in out
    assert "INT8 copy: KL" in out and "close enough" in out and "Ahead: " in out
    assert "Note: " in out  # a random model is never right


def test_it_refuses_what_a_run_refuses(command):
    code, _, err = invoke(*command, "--max-completion", 5000)
    assert code == 2 and "but this model takes" in err
    code, _, err = invoke(*command, "--answer-column", "gold")
    assert code == 2 and "nothing under 'gold'" in err
