"""An export is kept only if it was loaded back and is close to the model in KL."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import load_policy, save_policy
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.run import export as module
from cpugrpo_edu.run import gguf_file as module_of_gguf
from cpugrpo_edu.run.export import export, load_int8
from cpugrpo_edu.tasks import DOMAINS, held_out_problems


def make_run(folder, config, policy):
    save_policy(policy, folder / "model")
    RunRecord("run", "now", 0, "abc", {}, {"torch": "2"}, config, {}).save(folder / "record.json")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The bundled model as if it were a run's result."""
    return make_run(tmp_path_factory.mktemp("run"), {"model": "bundled"}, load_policy())


@pytest.fixture
def adapted(tmp_path):
    """A run that trained an adapter, far enough to change answers."""
    policy = load_policy(lora_rank=4, seed=1)
    torch.manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return make_run(tmp_path / "run", {"model": "bundled", "lora_rank": 4}, policy)


@pytest.mark.parametrize("kind", ["merged", "int8", "gguf"])
def test_an_export_answers_as_the_model(run, tmp_path, kind):
    if kind == "gguf":
        pytest.importorskip("gguf")
    done = export(run, kind, tmp_path / "out", problems=12)
    assert 0 <= done["kl"] <= (0.05 if kind == "int8" else 1e-6)
    assert done["agreement"] > (0.9 if kind == "int8" else 0.999)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "says nothing about accuracy" in card and f"{done['kl']:.2g} nats a token" in card
    assert RunRecord.load(tmp_path / "out" / "record.json").commit == "abc"


def test_adapter_and_merged_of_a_lora_run(adapted, tmp_path):
    done = export(adapted, "adapter", tmp_path / "adapter", problems=12)
    assert done["kl"] < 1e-6
    assert done["bytes"] < 1_000_000  # without the base
    assert export(adapted, "merged", tmp_path / "merged", problems=12)["kl"] < 1e-6


def test_exports_of_an_adapter_on_a_bfloat16_base_are_base_plus_adapter_in_float32(
    tiny_folder, tmp_path
):
    """In bfloat16 changes of this size would be lost in the sum."""
    policy = load_policy(tiny_folder, dtype="bfloat16", lora_rank=2)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    name = "model.layers.0.mlp.down_proj"
    layer = policy.model.get_submodule(f"base_model.model.{name}")
    change = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha = 2 rank
    wanted = layer.base_layer.weight.float() + change
    run = make_run(tmp_path / "run", {"model": str(tiny_folder), "lora_rank": 2}, policy)
    export(run, "merged", tmp_path / "merged", problems=2)
    stored = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    assert stored.dtype is torch.float32 and 0 < change.abs().max() < 1e-3
    torch.testing.assert_close(stored, wanted, rtol=0, atol=1e-7)
    export(run, "int8", tmp_path / "int8", problems=2)
    q, scale, _ = module.quantize_tensor(wanted)
    kept = load_file(tmp_path / "int8" / "model-int8.safetensors")
    assert (kept[f"{name}.weight"].int() - q.int()).abs().max() <= 1  # a tie may round either way
    torch.testing.assert_close(kept[f"{name}.weight_scale"], scale)


def test_a_good_int8_model_is_kept_whatever_it_writes(tiny_folder, tmp_path):
    """A random model's texts diverge at the first near tie; its distributions hardly do."""
    run = make_run(tmp_path / "run", {"model": str(tiny_folder)}, load_policy(tiny_folder))
    done = export(run, "int8", tmp_path / "out", problems=12)
    problems = held_out_problems(1)
    ours = [g.episodes[0].text for g in module.completions(load_policy(tiny_folder), problems)]
    theirs = [g.episodes[0].text for g in module.completions(load_int8(tmp_path / "out"), problems)]
    assert done["kl"] < 0.01 and ours != theirs


def test_the_kl_is_that_of_a_plain_computation(adapted, tmp_path):
    done = export(adapted, "int8", tmp_path / "out", problems=3)
    trained, exported = load_policy(adapted / "model"), load_int8(tmp_path / "out")
    values = []
    for group in module.completions(trained, held_out_problems(1)[::4]):
        ids = torch.tensor([group.prompt_ids + group.episodes[0].completion_ids])
        with torch.no_grad():
            p, q = (m.model(input_ids=ids).logits.softmax(-1) for m in (trained, exported))
        kl = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)[0]
        values += kl[len(group.prompt_ids) - 1 : -1].tolist()
    assert done["kl"] == pytest.approx(sum(values) / len(values), rel=1e-3)


def test_an_export_with_another_tokenizer_is_not_kept(run, tmp_path, monkeypatch):
    def read(folder, original, record):
        policy = module.read_merged(folder, original, record)
        policy.tokenizer.chat_template = "{{ messages[0]['content'] }}"
        return policy

    monkeypatch.setitem(module.WAYS, "merged", (module.write_merged, read))
    with pytest.raises(UserError, match="into other tokens"):
        export(run, "merged", tmp_path / "out", problems=2)
    assert list(tmp_path.iterdir()) == []


def test_int8_is_a_quarter_and_within_half_a_step(run, tmp_path):
    export(run, "int8", tmp_path / "out", problems=12)
    stored = load_file(tmp_path / "out" / "model-int8.safetensors")
    ours, theirs = load_policy().model.state_dict(), load_int8(tmp_path / "out").model.state_dict()
    for name, tensor in ours.items():
        scale = stored.get(f"{name}_scale")
        bound = scale[:, None] / 2 + 1e-7 if scale is not None else 0.0
        if name != "lm_head.weight":
            assert ((tensor - theirs[name]).abs() <= bound).all(), name
    small = (tmp_path / "out" / "model-int8.safetensors").stat().st_size
    assert small < 0.3 * (run / "model" / "model.safetensors").stat().st_size


def test_an_export_that_is_another_model_is_not_kept(run, tmp_path, monkeypatch):
    def damaged(policy, run, record, folder):
        module.write_merged(policy, run, record, folder)
        weights = load_file(folder / "model.safetensors")
        for tensor in weights.values():
            tensor.add_(0.3 * torch.randn_like(tensor))
        module.save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setitem(module.WAYS, "merged", (damaged, module.read_merged))
    with pytest.raises(UserError, match=r"KL \d.* nats a token, where 1e-06 is allowed"):
        export(run, "merged", tmp_path / "out", problems=12)
    assert list(tmp_path.iterdir()) == []


def test_bad_requests(run, tmp_path):
    for words, arguments in (
        ("cannot export to 'pickle'", (run, "pickle", tmp_path / "out")),
        ("so there is no adapter", (run, "adapter", tmp_path / "out")),
        ("already exists", (run, "merged", tmp_path)),
        ("cannot read a run record", (tmp_path / "none", "merged", tmp_path / "out")),
    ):
        with pytest.raises(UserError, match=words):
            export(*arguments)
    (tmp_path / "empty").mkdir()
    record = json.loads((run / "record.json").read_text())
    (tmp_path / "empty" / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="holds no trained model"):
        export(tmp_path / "empty", "merged", tmp_path / "out")
    with pytest.raises(UserError, match="cannot read an INT8 export"):
        load_int8(tmp_path / "empty")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def llama_run(tiny_folder, tmp_path):
    """A run of a model of Llama's shape, with more query heads than key heads."""
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return make_run(tmp_path / "run", {"model": str(folder)}, load_policy(folder))


def test_a_llama_model_comes_back_from_gguf_with_its_rotary_pairs(llama_run, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    done = export(llama_run, "gguf", tmp_path / "out", problems=3)
    assert done["kl"] < 1e-6
    rows = torch.arange(16.0).reshape(8, 2).numpy()  # two heads of width 4
    assert module_of_gguf.with_pairs_together(rows, 2)[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]
    monkeypatch.setattr(module_of_gguf, "with_pairs_together", lambda rows, heads: rows)
    with pytest.raises(UserError, match="another model"):
        export(llama_run, "gguf", tmp_path / "wrong", problems=3)


def test_an_unknown_kind_of_tokenizer_is_refused(llama_run, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(module_of_gguf, "SPLITTERS", {})
    with pytest.raises(UserError, match="no tokenizer of this kind"):
        export(llama_run, "gguf", tmp_path / "out", problems=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, set(DOMAINS)),
        ({"domains": ["small_stories"]}, {"small_stories"}),
        ({"domains": ["small_stories"], "data": "own.jsonl"}, set(DOMAINS)),
    ],
)
def test_an_export_is_compared_on_problems_of_its_run(config, expected):
    record = new_record("run", config, {})
    for count in (3, 24):
        chosen = module.questions(record, count)
        assert len(chosen) == count and {p.domain for p in chosen} <= expected
    assert {p.domain for p in chosen} == expected
