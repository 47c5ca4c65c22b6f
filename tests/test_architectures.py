"""On every architecture, every feature is right or refused: never wrong, never a traceback."""

from __future__ import annotations

import json
import shutil

import architectures as tool
import pytest
import torch
from command_line import invoke
from transformers import AutoConfig, AutoModelForCausalLM

from cpugrpo_edu.engine import architectures as module
from cpugrpo_edu.engine.architectures import context_length, require, require_context, supports
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import add_lora, check_policy, load_policy
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.rewards import REWARDS
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.run.pipeline import run

RECORD = RunRecord.load(tool.RECORD)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Models of the zoo by name, each made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tool.Case(name, tmp_path_factory.mktemp("zoo"))
        return made[name]

    return make


@pytest.fixture(autouse=True)
def threads():
    """Commands set their own number of threads; the other tests need one."""
    yield
    torch.set_num_threads(1)


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tool.ZOO)
def test_every_feature_is_right_or_refused_as_recorded(name, case):
    found = {feature: tool.outcome(case(name), feature) for feature in tool.FEATURES}
    assert found == RECORD.results["table"][name], "run `python tools/architectures.py`"
    assert all(words.split(":")[0] in VERDICTS for words in found.values())


VERDICTS = ("right", "right, slower", "refused")


def test_the_record_has_every_architecture_and_what_must_work():
    assert list(tool.ZOO) == RECORD.config["architectures"] and len(tool.ZOO) >= 18
    table = RECORD.results["table"]
    assert set(table["Qwen2"].values()) == {"right"}
    for name, row in table.items():
        if name != "RecurrentGemma":  # wrong in transformers itself, see check_rollouts
            assert row["training"] == "right" and row["rollouts"].startswith("right"), name
            assert row["shared prefix"].startswith("right") and row["export"] == "right", name
    for name in ("Llama", "Mistral", "Qwen3", "SmolLM3", "OLMo 2", "Phi-3", "StableLM"):
        assert table[name]["frozen INT8 base"] == "right"
    for name in ("Gemma 2", "Cohere", "Granite", "Qwen2 (sliding window)"):
        assert table[name]["LoRA"] == table[name]["INT8 copy"] == "right"


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("Mistral (sliding window)", "shared prefix"),
        ("Gemma 2", "shared prefix"),
        ("Granite", "shared prefix"),
        ("Cohere", "frozen INT8 base"),
        ("Gemma", "frozen INT8 base"),
        ("Qwen2 (sliding window)", "GGUF"),
        ("Mixtral", "LoRA"),
    ],
)
def test_the_comparison_notices_what_the_lists_prevent(name, feature, case, monkeypatch):
    every = {kind for kind, _ in tool.ZOO.values()}
    unlimited = {**dict.fromkeys(module.TYPES, every), "fast engine": module.FAST}
    monkeypatch.setattr(module, "TYPES", unlimited)
    monkeypatch.setattr(module, "peculiarities", lambda config, feature: iter(()))
    assert tool.outcome(case(name), feature).startswith("WRONG")


# --- decided from the config ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "feature", "reason"),
    [
        ("qwen2", {}, "packed pass", None),
        ("qwen2", {"sliding_window": 8}, "packed pass", None),  # use_sliding_window is off
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
         "packed pass", "sliding window"),
        ("mistral", {"sliding_window": None}, "frozen base", None),
        ("mistral", {}, "frozen base", "sliding window"),
        ("llama", {"logit_scale": 0.5}, "packed pass", "logit_scale"),
        ("llama", {"quantization_config": {"bits": 4}}, "frozen base", "quantized already"),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "GGUF", "rotary"),
        ("gpt_neox", {}, "frozen base", "not on this architecture"),
        ("bert", {}, "LoRA", "not on this architecture"),
    ],
)  # fmt: skip
def test_the_config_decides(kind, settings, feature, reason):
    config = AutoConfig.for_model(kind, **settings)
    found = supports(config, feature)
    assert found is None if reason is None else reason in found
    if reason:
        with pytest.raises(UserError, match=f"does not work on this '{kind}' model: .*; "):
            require(config, feature)


def test_an_unknown_feature_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="feature is 'teleport'; allowed are rollouts"):
        supports(AutoConfig.for_model("qwen2"), "teleport")


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("GPT-NeoX", {"dtype": "int8", "lora_rank": 4}, "frozen INT8 base"),
        ("Qwen2-MoE", {"dtype": "int8", "lora_rank": 4}, "LoRA"),
        ("Mamba", {"lora_rank": 4}, "LoRA"),
        ("Gemma 3", {"dtype": "int8", "lora_rank": 4}, "frozen INT8 base"),
    ],
)
def test_a_refusal_reads_no_weights(name, settings, words, case, tmp_path):
    folder = shutil.copytree(case(name).folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"{words} does not work") as caught:
        load_policy(folder, **settings)
    assert "network" not in str(caught.value)


def test_lora_refuses_a_model_given_by_hand(case):
    with pytest.raises(UserError, match="LoRA does not work on this 'mixtral' model"):
        add_lora(case("Mixtral").plain, 2)


def test_dropout_is_off_in_training_too(case):
    policy = load_policy(case("GPT-2").folder)
    policy.model.train()
    first, second = (policy.model(torch.tensor([[5, 6, 7]])).logits for _ in range(2))
    assert torch.equal(first, second)
    assert AutoConfig.from_pretrained(case("GPT-2").folder).resid_pdrop > 0


@pytest.mark.parametrize("name", ["GPT-2", "Mamba"])
def test_the_trainer_says_which_short_cuts_it_leaves_out(name, case, tmp_path):
    said = []
    trainer = tool.trainer_of(
        load_policy(case(name).folder), str(tmp_path), said.append, int8_rollouts=True,
        share_prefix=True,
    )  # fmt: skip
    assert trainer.copy_kind is None and not trainer.packs(trainer.model)
    assert "float weights, not an INT8 copy" in said[0] and "scored again" in said[1]


def test_the_balance_loss_of_experts_is_left_out(tmp_path):
    assert tool.cpu_config(tmp_path).router_aux_loss_coef == 0
    with pytest.raises(UserError, match="router_aux_loss_coef is 0.1"):
        tool.cpu_config(tmp_path, router_aux_loss_coef=0.1)


def test_an_architecture_outside_the_table_is_checked_when_it_is_loaded(case, monkeypatch):
    policy = load_policy(case("Qwen2").folder)
    monkeypatch.setitem(module.TYPES, "rollouts", set())
    check_policy(policy)  # it is right, so it may be used
    forward = policy.model.forward
    monkeypatch.setattr(policy.model, "forward", lambda *args, **given: doubled(forward, *args))
    with pytest.raises(UserError, match="other probabilities when it generates"):
        check_policy(policy)


def doubled(forward, *args):
    output = forward(*args)
    output.logits = output.logits * 2
    return output


def test_a_run_on_an_architecture_outside_the_table(tiny_folder, tmp_path, monkeypatch):
    """Arcee, whose MLP has no gate: it is checked, and trained without the short cuts."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = AutoConfig.for_model("arcee", **{**tool.DENSE, "max_position_embeddings": 512})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    monkeypatch.setitem(REWARDS, "odd", lambda problem, episode: sum(episode.completion_ids) % 2.0)
    config = RunConfig(
        str(folder), steps=(1, 0, 0), prompts_per_step=4, num_generations=4, max_completion=8,
        per_cell=1, fisher_examples=2, ewc_strength=0.1, rewards="odd=1", threads=1,
    )  # fmt: skip
    results = run(config, tmp_path / "out").results
    assert results["stages"][0]["rollouts_from"] == "policy"
    assert results["weights_changed"]["changed"] and results["stages"][0]["fisher"]["mean"] > 0
    evaluated = {path.name for path in (tmp_path / "out" / "evaluations").iterdir()}
    assert evaluated and not any("INT8" in name for name in evaluated)


# --- the length of a sequence ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "length"),
    [
        ("qwen2", {"max_position_embeddings": 77}, 77),
        ("gpt2", {"n_positions": 33}, 33),
        ("mamba", {}, None),
        ("bloom", {}, None),  # ALiBi
        ("qwen2", {"max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        ("llama", {"max_position_embeddings": 512, "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, 512),
        ("llama", {"max_position_embeddings": 512, "rope_parameters": {
            "rope_type": "dynamic", "factor": 8.0, "original_max_position_embeddings": 64}}, 64),
        ("gemma3_text", {"max_position_embeddings": 99}, 99),
    ],
)  # fmt: skip
def test_how_long_a_sequence_may_be(kind, settings, length):
    config = AutoConfig.for_model(kind, **settings)
    assert context_length(config) == length
    if length is None:
        require_context(config, 10**6, 10**6)
    else:
        require_context(config, length - 5, 5)
        with pytest.raises(UserError, match=f"up to 5 new ones .* takes {length} in all; give"):
            require_context(config, length - 4, 5)


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "Compute 1+2."),
        ("evaluate", "--per-cell", 1),
        ("run", "--steps", 1, "--per-cell", 0),
    ],
    ids=lambda command: command[0],
)
def test_a_completion_beyond_the_context_is_one_sentence(command, tiny_folder, tmp_path):
    output = tmp_path / "out"
    more = ["--output", output] if command[0] == "run" else []
    code, _, err = invoke(*command, "--model", tiny_folder, "--max-completion", 2000, *more)
    assert code and "Traceback" not in err and not output.exists()
    assert "this model takes 1024 in all" in " ".join(err.split())


def test_a_run_refuses_one_long_problem_before_it_begins(tiny_folder, tmp_path):
    rows = [{"question": f"What is 1 + {i}?", "answer": f"#### {1 + i}"} for i in range(40)]
    rows[17]["question"] += " " + "three " * 900
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    config = RunConfig(str(tiny_folder), data=str(data), steps=(2, 2, 2), per_cell=0)
    with pytest.raises(UserError, match="this model takes 1024 in all"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
