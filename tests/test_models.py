"""Loading policies: what is refused before loading, what is repaired, what is saved."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from cpugrpo_edu.engine import sizes
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models import load
from cpugrpo_edu.models.load import (
    SYSTEM_PROMPT,
    SYSTEM_TO_USER,
    add_lora,
    check_policy,
    default_answer_format,
    fingerprint,
    load_policy,
    prepare_tokenizer,
    relative_change,
    save_policy,
    snapshot,
)

PHI3 = Phi3Config(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0, bos_token_id=None, eos_token_id=1,
)  # fmt: skip
QUESTION = [{"role": "user", "content": "Compute 1+2."}]
QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit(path, **changes):
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def no_loading(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def test_a_model_of_ours_needs_no_system_prompt(tiny_policy):
    assert tiny_policy.system is None
    assert tiny_policy.tokenizer.padding_side == "left"
    assert tiny_policy.eos_ids == {tiny_policy.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    text = tiny_policy.tokenizer.decode(tiny_policy.encode_chat(QUESTION))
    assert text == "<|im_start|>user\nCompute 1+2.<|im_end|>\n<|im_start|>assistant\n"


def test_another_model_keeps_its_system_prompt_unless_it_must_write_marks(folder):
    assert load_policy(folder, answer_format="hash").system is None  # ours knows the mark
    edit(folder / "config.json", cpugrpo_format=None)
    assert load_policy(folder).system is None
    assert load_policy(folder, answer_format="auto").system is None
    assert load_policy(folder, answer_format="hash").system == SYSTEM_PROMPT
    assert load_policy(folder, system="", answer_format="hash").system == ""
    assert load_policy(folder, system="Mine.").system == "Mine."


def test_a_model_states_its_answers_in_a_format_of_its_own(folder):
    assert default_answer_format(load_policy(folder).model.config) == "hash"
    edit(folder / "config.json", cpugrpo_format=None)
    assert default_answer_format(load_policy(folder, lora_rank=1).model.config) == "auto"


def test_a_model_without_a_chat_template_gets_a_plain_one(folder):
    (folder / "chat_template.jinja").unlink()
    policy = load_policy(folder)
    assert policy.tokenizer.decode(policy.encode_chat(QUESTION)) == "Compute 1+2.\n"


GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start>' + message['role'] + '\n' + message['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
FORGETFUL_TEMPLATE = (
    "{% for message in messages if message['role'] != 'system' %}"
    "{{ '<start>' + message['role'] + '\n' + message['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [GEMMA_TEMPLATE, FORGETFUL_TEMPLATE])
def test_a_template_without_a_system_role_gets_its_text_in_the_first_turn(
    folder, tmp_path, template
):
    (folder / "chat_template.jinja").write_text(template)
    policy = load_policy(folder, system="Be brief.")
    check_policy(policy)

    def shown(messages):
        return policy.tokenizer.decode(policy.encode_chat(messages))

    bare = "<start>user\nCompute 1+2.<end>\n<start>model\n"
    asked = bare.replace("Compute", "Be brief.\n\nCompute")
    system = {"role": "system", "content": "Be brief."}
    plain = load_policy(folder)
    assert plain.tokenizer.decode(plain.encode_chat(QUESTION)) == bare
    assert shown(QUESTION) == shown([system, *QUESTION]) == asked
    longer = [system, *QUESTION, {"role": "assistant", "content": "3"}, *QUESTION]
    assert shown(longer).startswith(asked[: -len("<start>model\n")] + "<start>assistant\n3<end>")
    assert shown(longer).count("Be brief.") == 1
    # Saved with the model, for whoever loads it without us; and once only.
    saved = AutoTokenizer.from_pretrained(save_policy(policy, tmp_path / "saved"))
    assert saved.chat_template.endswith(SYSTEM_TO_USER + template)
    assert saved.chat_template.count("Be brief.") == 1
    assert load_policy(tmp_path / "saved").tokenizer.chat_template == saved.chat_template


def test_a_template_that_shows_the_system_prompt_stays_as_it_is(folder):
    before = (folder / "chat_template.jinja").read_text()
    assert load_policy(folder).tokenizer.chat_template == before


def test_the_policys_own_system_prompt_is_tried(folder):
    refuse = "{% if messages[0]['content'] == 'X' %}{{ raise_exception('no X') }}{% endif %}"
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(refuse + template)
    check_policy(load_policy(folder, system="Y"))
    with pytest.raises(UserError, match="chat template .* fails .no X"):
        check_policy(load_policy(folder, system="X"))


def test_every_end_of_the_generation_config_counts(folder):
    edit(folder / "generation_config.json", eos_token_id=[0, 5])
    assert load_policy(folder).eos_ids == {0, 5, 2}


class Bare:
    padding_side, pad_token_id, pad_token, chat_template = "right", None, None, None

    def __init__(self, eos_token):
        self.eos_token = eos_token

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "pad_token" and value:
            super().__setattr__("pad_token_id", 7)


def test_a_missing_padding_token_is_the_end_token_and_missing_both_is_refused():
    tokenizer = Bare("</s>")
    prepare_tokenizer(tokenizer)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("</s>", "left")
    assert tokenizer.chat_template
    with pytest.raises(UserError, match="neither a padding nor an end-of-text token"):
        prepare_tokenizer(Bare(None))


def test_a_folder_whose_tokenizer_has_no_padding_token_loads(folder):
    edit(
        folder / "tokenizer_config.json", pad_token=None, tokenizer_class="PreTrainedTokenizerFast"
    )
    policy = load_policy(folder)
    assert policy.pad_id == policy.tokenizer.pad_token_id
    assert policy.tokenizer(["a", "a b c"], padding=True)["attention_mask"][0][0] == 0


# --- Refusals -----------------------------------------------------------------


def test_a_missing_bundled_model_is_an_error_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "BUNDLED", tmp_path)
    with pytest.raises(UserError, match="cpugrpo pretrain"):
        load_policy("bundled")


def test_bundled_means_the_folder_in_the_package(monkeypatch, tiny_folder):
    monkeypatch.setattr(load, "BUNDLED", tiny_folder)
    policy = load_policy()
    assert (policy.source, policy.system) == (str(tiny_folder), None)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "~/model", "a/b/c", "../x"], ids=str
)
def test_an_unknown_folder_is_not_taken_for_a_hub_id(name, monkeypatch):
    no_loading(monkeypatch)
    with pytest.raises(UserError, match="no model folder at"):
        load_policy(name)


def test_a_folder_or_file_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_policy(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="no model folder at"):
        load_policy(tmp_path / "file")


@pytest.mark.parametrize("where", [AutoConfig, AutoTokenizer, AutoModelForCausalLM])
@pytest.mark.parametrize("error", [OSError("no network\nsecond line"), ConnectionError()])
def test_a_hub_id_without_network_is_explained(monkeypatch, tiny_folder, where, error):
    config = AutoConfig.from_pretrained(tiny_folder)

    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: config)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    monkeypatch.setattr(where, "from_pretrained", broken)
    with pytest.raises(UserError, match=r"'some/model' \((no network|ConnectionError)\).*network"):
        load_policy("some/model")


@pytest.mark.parametrize("damage", ["weights", "config", "no weights"])
def test_a_damaged_folder_is_an_error_of_one_sentence(folder, damage):
    weights = folder / "model.safetensors"
    if damage == "weights":  # as a broken copy leaves it
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "config":
        (folder / "config.json").write_text("{")
    else:
        weights.unlink()
    with pytest.raises(UserError, match="cannot load the model"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [({"dtype": "float16"}, "'float16'.*bfloat16"), ({"lora_rank": -1}, "lora_rank is -1")],
)
def test_bad_arguments(tiny_folder, arguments, names):
    with pytest.raises(UserError, match=names):
        load_policy(tiny_folder, **arguments)


def test_a_model_that_cannot_fit_is_refused_before_a_weight_is_read(tiny_folder, monkeypatch):
    monkeypatch.setattr(sizes, "available_memory", lambda: 10_000)
    with monkeypatch.context() as patch:
        no_loading(patch)
        with pytest.raises(UserError, match="loading .*GiB"):
            load_policy(tiny_folder)
    load_policy(tiny_folder, check_memory=False)


@pytest.mark.parametrize("native", [True, False])
def test_dtypes(tiny_folder, monkeypatch, native):
    monkeypatch.setattr(load, "native_bfloat16", lambda: native)
    expected = torch.bfloat16 if native else torch.float32
    assert load_policy(tiny_folder, dtype="auto").model.dtype is expected
    policy = load_policy(tiny_folder, dtype="bfloat16")
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    assert len(fingerprint(policy.model)) == 64


# --- LoRA, saving, change -----------------------------------------------------


def test_lora_freezes_the_base_and_starts_at_the_base(tiny_folder, tiny_policy):
    policy = load_policy(tiny_folder, lora_rank=2)
    trainable = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert len(trainable) == 2 * 7 * 2  # A and B on seven linear layers of two blocks
    torch.testing.assert_close(logits(policy.model), logits(tiny_policy.model))
    logits_of = policy.model(input_ids=torch.tensor([[5, 6]])).logits
    logits_of.sum().backward()
    assert all(p.grad is None for n, p in policy.model.named_parameters() if n not in trainable)


def test_lora_seeds(tiny_folder):
    first, same, other = (load_policy(tiny_folder, lora_rank=2, seed=s) for s in (1, 1, 2))
    assert fingerprint(first.model) == fingerprint(same.model) != fingerprint(other.model)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=4, n_layer=1, n_head=1)), 4),
        (Phi3ForCausalLM(PHI3), 4),  # qkv_proj, o_proj, gate_up_proj, down_proj
    ],
    ids=["gpt2", "phi3"],
)
def test_lora_covers_every_linear_layer_but_the_head(model, layers):
    linear = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    before = logits(model.eval())
    adapted = add_lora(model, 2)
    found = [n for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "lora_B")]
    assert sorted(found) == sorted(set(linear) - {"lm_head"}) and len(found) == layers
    torch.testing.assert_close(logits(adapted), before)


@pytest.mark.parametrize("rank", [0, 2])
def test_saved_policies_load_with_plain_transformers(tiny_folder, tmp_path, rank):
    policy = load_policy(tiny_folder, lora_rank=rank)
    base = logits(policy.model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    before = fingerprint(policy.model)
    folder = save_policy(policy, tmp_path / "saved")
    assert fingerprint(policy.model) == before  # saving leaves the policy as it was
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert type(plain) is Qwen2ForCausalLM
    torch.testing.assert_close(logits(plain), logits(policy.model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(plain), base, atol=1e-2)
    assert (folder / "adapter" / "adapter_config.json").exists() is (rank > 0)
    again = load_policy(folder)
    assert again.encode_chat(QUESTION) == policy.encode_chat(QUESTION)
    assert (again.system, again.eos_ids) == (policy.system, policy.eos_ids)


def test_a_bfloat16_base_keeps_small_changes_when_saved(tiny_folder, tmp_path):
    """Adam at a learning rate of 1e-5 changes B by about 1e-5 in its first step."""
    policy = load_policy(tiny_folder, dtype="bfloat16", lora_rank=4)
    base = load_policy(tiny_folder, dtype="bfloat16").model.state_dict()
    layers = {
        n: m for n, m in policy.model.get_base_model().named_modules() if hasattr(m, "lora_A")
    }
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in layers.values():
            weight = layer.lora_B["default"].weight
            weight.copy_(1e-5 * torch.randn(weight.shape).sign())
    saved = load_file(save_policy(policy, tmp_path / "saved") / "model.safetensors")
    missed = learned = 0.0
    for name, layer in layers.items():
        down, up = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        change = (layer.scaling["default"] * up @ down).detach()
        kept = saved[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        missed += float((kept - change).square().sum())
        learned += float(change.square().sum())
    assert learned > 0 and (missed / learned) ** 0.5 < 1e-3


def test_fingerprints_see_a_single_bit(tiny_policy):
    before = fingerprint(tiny_policy.model)
    weight = tiny_policy.model.model.layers[1].mlp.up_proj.weight
    assert fingerprint(tiny_policy.model) == before
    with torch.no_grad():
        old = weight[3, 4].clone()
        weight[3, 4] = torch.nextafter(old, torch.tensor(9.0))
        assert fingerprint(tiny_policy.model) != before
        weight[3, 4] = old
    assert fingerprint(tiny_policy.model) == before


def test_relative_change_is_that_of_the_norms(tiny_policy):
    model = tiny_policy.model
    before = snapshot(model)
    assert relative_change(model, before) == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    assert relative_change(model, before) == pytest.approx(0.25, rel=1e-4)


def test_relative_change_of_a_large_matrix_is_estimated_from_a_sample():
    model = torch.nn.Linear(1000, 500, bias=False)
    before = snapshot(model)
    assert before["weight"].numel() < 1.2 * load.SNAPSHOT_NUMBERS
    with torch.no_grad():
        model.weight.add_(0.1 * model.weight)
    assert relative_change(model, before) == pytest.approx(0.1, rel=1e-3)


# --- A folder laid out as Qwen2-0.5B-Instruct's --------------------------------


@pytest.fixture
def qwen2_like(tmp_path):
    """vocab.json, merges.txt and tokenizer_config.json only, with Qwen2's chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, "he", "lp"])}
    special = {n: len(vocab) + i for i, n in enumerate(("<|endoftext|>", "<|im_start|>"))}
    special["<|im_end|>"] = len(vocab) + 2
    folder = tmp_path / "qwen2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nl p\n")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {"content": name, "special": True, **flags} for name, i in special.items()
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": QWEN2_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = Qwen2Config(
        vocab_size=264, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
        bos_token_id=special["<|endoftext|>"], eos_token_id=special["<|im_end|>"],
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    edit(
        folder / "generation_config.json",
        eos_token_id=[special["<|im_end|>"], special["<|endoftext|>"]],
        do_sample=True,
        repetition_penalty=1.1,
        top_k=20,
    )
    return folder, special


def test_a_folder_like_qwen2_instruct(qwen2_like):
    folder, special = qwen2_like
    policy = load_policy(folder, answer_format="hash")
    assert policy.system == SYSTEM_PROMPT
    assert policy.pad_id == special["<|endoftext|>"]
    assert policy.eos_ids == {special["<|im_end|>"], special["<|endoftext|>"]}
    ids = load_policy(folder).encode_chat(QUESTION)
    assert policy.tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nCompute 1+2.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(special["<|im_start|>"]) == 3  # each one token, not spelled out
    assert ids.count(special["<|im_end|>"]) == 2
    asked = policy.encode_chat([{"role": "system", "content": policy.system}, *QUESTION])
    text = policy.tokenizer.decode(asked)
    assert text.startswith(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user")
    assert "helpful assistant" not in text
