"""A model keeps how it is prompted; a folder with only an adapter is a model like any other."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from command_line import invoke
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from cpugrpo_edu.data import Problem
from cpugrpo_edu.engine.int8_base import is_frozen
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.adapters import adapter_in, base_of
from cpugrpo_edu.models.load import (
    SYSTEM_PROMPT,
    default_answer_format,
    fingerprint,
    load_policy,
    save_policy,
)
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.rewards import REWARDS
from cpugrpo_edu.run.config import is_ours
from cpugrpo_edu.run.export import export

PROBLEM = Problem("p", "arithmetic", "basic", "Compute 1+2.", "3")
SYSTEM = 'Say "hash" \\ {{ 1 }}\n{% raw %} – then ‘42’ 😀.'


@pytest.fixture
def foreign(tiny_folder, tmp_path):
    """A copy of the tiny model that is not one of ours."""
    folder = shutil.copytree(tiny_folder, tmp_path / "foreign")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "cpugrpo_format": False}))
    return folder


def change(policy, std=0.05, seed=0):
    """Train, as it were: give the adapters other weights."""
    torch.manual_seed(seed)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return policy


@pytest.fixture
def adapter_only(tiny_folder, tmp_path):
    """What a run with --lora 2 --dtype int8 leaves, and its policy."""
    policy = load_policy(tiny_folder, dtype="int8", lora_rank=2, kernel="packed")
    return change(policy), save_policy(policy, tmp_path / "adapted" / "model")


# How it is prompted


@pytest.mark.parametrize("dtype, lora", [("float32", 0), ("float32", 2), ("int8", 2)])
def test_prompt_and_answer_format_are_saved_with_the_model(foreign, tmp_path, dtype, lora):
    asked = {"dtype": dtype, "lora_rank": lora, "kernel": "packed"}
    policy = load_policy(foreign, system=SYSTEM, answer_format="boxed", **asked)
    folder = save_policy(policy, tmp_path / "saved")
    again = load_policy(folder)
    assert again.encode_problem(PROBLEM) == policy.encode_problem(PROBLEM)
    text = again.tokenizer.decode(again.encode_problem(PROBLEM))
    assert text.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nCompute")
    assert text.count(SYSTEM) == 1
    assert default_answer_format(again.model.config) == "boxed"
    # Programs that know nothing of us prompt it in the same way.
    plain = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": PROBLEM.question}]
    shown = plain.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert shown == text


def test_another_system_prompt_replaces_that_of_the_training(foreign, tmp_path):
    for given, expected in (("Other.", "Other."), ("", None), (None, "First.")):
        folder = save_policy(load_policy(foreign, system="First."), tmp_path / "first")
        again = save_policy(load_policy(folder, system=given), tmp_path / "again")
        text = load_policy(again).tokenizer.decode(load_policy(again).encode_problem(PROBLEM))
        start = f"<|im_start|>system\n{expected}<|im_end|>\n" if expected else ""
        assert text.startswith(f"{start}<|im_start|>user\n") and text.count("system") == bool(start)


def test_a_model_trained_to_write_marks_is_not_told_so_twice(foreign, tmp_path):
    """Nor is its own system prompt replaced."""
    folder = save_policy(load_policy(foreign, answer_format="hash"), tmp_path / "told")
    again = load_policy(folder)
    assert default_answer_format(again.model.config) == "hash"
    assert again.tokenizer.decode(again.encode_problem(PROBLEM)).count(SYSTEM_PROMPT) == 1
    own = save_policy(load_policy(foreign, system="Mine."), tmp_path / "own")
    text = load_policy(own, answer_format="hash")
    assert "Mine." in text.tokenizer.decode(text.encode_problem(PROBLEM))


# A folder with only an adapter


def merged_by_peft(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def same_weights(model, wanted, **tolerance):
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, msg=name, **tolerance)


def test_it_is_loaded_as_its_base_with_the_adapter_merged_in(tiny_folder, adapter_only):
    _, folder = adapter_only
    assert not list(folder.glob("*.safetensors")) and adapter_in(folder) == folder / "adapter"
    assert base_of(folder / "adapter") == str(tiny_folder)
    wanted = merged_by_peft(tiny_folder, folder / "adapter")
    again = load_policy(folder)
    same_weights(again.model, wanted, rtol=0, atol=0)
    assert all(p.requires_grad for p in again.model.parameters())  # PEFT leaves them frozen
    same_weights(load_policy(folder / "adapter").model, wanted, rtol=0, atol=0)
    assert fingerprint(again.model) != fingerprint(load_policy(tiny_folder).model)
    half = load_policy(folder, dtype="bfloat16").model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    same_weights(half, {name: tensor.bfloat16() for name, tensor in wanted.items()})


def test_it_can_be_trained_again_on_integers(tiny_folder, adapter_only, tmp_path):
    _, folder = adapter_only
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    plain.load_state_dict(merged_by_peft(tiny_folder, folder / "adapter"))
    plain.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "merged")
    asked = {"dtype": "int8", "lora_rank": 2, "kernel": "packed", "seed": 3}
    found, wanted = (load_policy(x, **asked) for x in (folder, tmp_path / "merged"))
    assert is_frozen(found.model)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(found.model(ids).logits, wanted.model(ids).logits)
    # The second adapter stands on the first.
    second = save_policy(change(found, seed=1), tmp_path / "second")
    assert base_of(second / "adapter") == str(folder)
    both = merged_by_peft(tmp_path / "merged", second / "adapter")
    same_weights(load_policy(second).model, both, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, "does not say which model it belongs to"),
        (" ", "does not say which model it belongs to"),
        ("/nowhere/base", "belongs to the model /nowhere/base, which is not there"),
    ],
)
def test_a_base_that_is_not_named_or_not_there(adapter_only, name, words):
    _, folder = adapter_only
    path = folder / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "base_model_name_or_path": name}))
    with pytest.raises(UserError, match=words) as caught:
        load_policy(folder)
    assert "adapter_config.json" in str(caught.value) and "network" not in str(caught.value)


def test_merged_and_adapter_exports_of_an_adapter_on_integers(tiny_folder, adapter_only, tmp_path):
    _, folder = adapter_only
    config = {"model": str(tiny_folder), "lora_rank": 2, "dtype": "int8"}
    record = RunRecord("run", "now", 0, "abc", {}, {"torch": "2"}, config, {})
    record.save(folder.parent / "record.json")
    wanted = merged_by_peft(tiny_folder, folder / "adapter")
    export(folder.parent, "merged", tmp_path / "merged", problems=1)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0)
    export(folder.parent, "adapter", tmp_path / "adapter", problems=1)
    same_weights(load_policy(tmp_path / "adapter").model, wanted, rtol=0, atol=0)


def test_a_command_does_not_say_what_the_libraries_do_to_load_it(adapter_only):
    _, folder = adapter_only
    logging.enable_progress_bar()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        code, _, err = invoke("generate", "Compute 1+2.", "--model", folder, "--max-completion", 2)
    assert code == 0 and err == ""
    assert not [each for each in heard if each.category is FutureWarning]
    assert logging.is_progress_bar_enabled()  # whoever calls from Python has bars of their own


def test_every_command_takes_it(tiny_folder, adapter_only, tmp_path, monkeypatch):
    _, folder = adapter_only
    assert is_ours(str(folder)) is is_ours(str(tiny_folder))
    small = ["--max-completion", "4", "--quiet"]
    code, said, err = invoke("generate", "Compute 1+2.", "--model", folder, *small[:2])
    assert code == 0 and said.strip(), err
    want = ["evaluate", "--model", folder, "--per-cell", "1", "--domains", "lists", *small]
    code, said, err = invoke(*want)
    assert code == 0 and "Overall" in said, err
    monkeypatch.setattr("cpugrpo_edu.run.pipeline.write_report", lambda *_: None)
    odd = lambda problem, episode: sum(i % 2 for i in episode.completion_ids)  # noqa: E731
    monkeypatch.setitem(REWARDS, "odd_tokens", odd)  # any random model differs in it
    steps = ["--steps", "1,0,0", "--prompts-per-step", "2", "--num-generations", "8"]
    off = ["--per-cell", "0", "--fisher-examples", "0", "--no-int8-evaluation", "--threads", "1"]
    off += ["--patience", "0", "--domains", "lists", "--lr", "0.01"]
    for i, ways in enumerate((["--lora", "2", "--dtype", "int8"], ["--lora", "0"])):
        out = tmp_path / f"run{i}"
        code, said, err = invoke(
            "run", "--model", folder, "--output", out, *steps, *off, *ways, *small,
            "--rewards", "odd_tokens=1",
        )  # fmt: skip
        assert code == 0, err
        assert load_policy(out / "model")
    code, said, err = invoke(
        "run", "--model", folder, "--output", tmp_path / "kl", *steps, *off, *ways, *small,
        "--beta", "0.1",
    )  # fmt: skip
    assert code == 2 and "which is an adapter; train with --lora, or export" in err
    assert not (tmp_path / "kl").exists()
