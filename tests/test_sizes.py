"""Sizes of models and micro-batches, against real models and counted bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
)

from cpugrpo_edu.engine import memory as M
from cpugrpo_edu.engine import sizes as S
from cpugrpo_edu.errors import UserError

torch.set_num_threads(1)
MIB, GIB = 2**20, 2**30


def config(kind=Qwen2Config, **changes):
    base = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    return kind(**{**base, **changes})


# --- estimating


@pytest.mark.parametrize(
    "made",
    [
        config(),
        config(tie_word_embeddings=False),
        config(num_key_value_heads=4),
        config(LlamaConfig),
        config(LlamaConfig, head_dim=32, tie_word_embeddings=False),
    ],
)
def test_formula_is_the_real_count(made):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    real = sum(p.numel() for p in model.parameters())
    assert S.Architecture.from_config(made).parameters == S.count_parameters(made) == real


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("SmolLM2-135M-Instruct", 134_515_008),
        ("SmolLM2-360M-Instruct", 361_821_120),
        ("Qwen2-0.5B-Instruct", 494_032_768),
        ("TinyLlama-1.1B-Chat", 1_100_048_384),
        ("Qwen2.5-1.5B-Instruct", 1_543_714_304),
    ],
)
def test_catalogue_has_the_published_sizes(name, published):
    (model,) = [m for m in S.CATALOGUE if m.name == name]
    assert model.parameters == published
    assert S.estimate_model_bytes(model) == 4 * published
    assert S.estimate_model_bytes(model, torch.bfloat16) == 2 * published


def test_lora_formula_is_what_peft_adds():
    from peft import LoraConfig, get_peft_model

    made = config()
    model = get_peft_model(
        AutoModelForCausalLM.from_config(made), LoraConfig(r=5, target_modules="all-linear")
    )
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert S.Architecture.from_config(made).lora_parameters(5) == real


def test_model_bytes_from_a_folder(tmp_path):
    made = config(tie_word_embeddings=False)
    made.save_pretrained(tmp_path)
    count = S.count_parameters(made)
    assert S.estimate_model_bytes(tmp_path) == S.estimate_model_bytes(str(tmp_path)) == 4 * count
    assert S.Architecture.from_config(tmp_path).parameters == count
    assert S.count_parameters(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)) > 0
    with pytest.raises(UserError, match="absent"):
        S.estimate_model_bytes(tmp_path / "absent")
    with pytest.raises(UserError, match="'float3'"):
        S.estimate_model_bytes(made, "float3")


def test_counting_allocates_no_weights():
    big = config(hidden_size=8192, intermediate_size=32768, num_hidden_layers=16)
    assert S.estimate_model_bytes(big) > 40 * GIB


@pytest.mark.parametrize("kind", [GPT2Config, Qwen2MoeConfig])
def test_other_architectures_are_refused(kind):
    with pytest.raises(UserError, match="dense decoder-only"):
        S.Architecture.from_config(kind())


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("changes", [{}, {"intermediate_size": 64}, {"hidden_size": 128}])
def test_activation_formula_against_counted_bytes(mode, changes):
    """Padded batch, as in training: what autograd keeps, within a fifth of the formula."""
    made = config(num_hidden_layers=4, **changes)
    model = Qwen2ForCausalLM(made).train()
    if mode == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    ids = torch.zeros(3, 40, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    body = model.get_base_model().model if mode == "lora" else model.model
    counted = M.saved_activation_bytes(
        model, lambda: body(input_ids=ids, attention_mask=mask, use_cache=False)
    )
    estimate = S.estimate_training_memory(
        made, mode=mode, lora_rank=2, tokens_per_sequence=40, micro_batch=3
    )
    assert estimate["activations"] == pytest.approx(counted, rel=0.2)


def test_checkpointing_is_seen_by_the_count_and_by_the_formula():
    made = config(num_hidden_layers=6)
    model = Qwen2ForCausalLM(made).train()
    ids = torch.zeros(2, 64, dtype=torch.long)

    def count():
        return M.saved_activation_bytes(model, lambda: model.model(input_ids=ids, use_cache=False))

    plain = count()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = count()
    assert kept < plain / 5
    sizes = {"tokens_per_sequence": 64, "micro_batch": 2}
    on = S.estimate_training_memory(made, checkpointing=True, **sizes)["activations"]
    off = S.estimate_training_memory(made, **sizes)["activations"]
    assert kept < on < off / 3  # the formula adds the layer that is being recomputed


def test_training_memory_by_hand():
    a = S.Architecture("toy", 1, 8, 16, 2, 1, 10, True)
    p = 10 * 8 + (2 * 8 * (8 + 4) + 3 * 8 * 16 + 16) + 8
    assert a.parameters == p
    full = S.estimate_training_memory(a, tokens_per_sequence=3, micro_batch=2, reference=True)
    assert full["weights"] == full["gradients"] == full["reference"] == 4 * p
    assert full["optimizer"] == 8 * p
    assert full["activations"] == 6 * (6 * 8 + 4 * 8 + 4 * 16) * 4
    assert full["logits"] == 3 * 4 * 6 * 10
    assert full["total"] == sum(v for k, v in full.items() if k != "total")
    lora = S.estimate_training_memory(a, mode="lora", lora_rank=1, dtype_bytes=2, reference=True)
    adapters = 8 + 8 + 8 + 8 + 8 + 4 + 8 + 4 + 3 * (8 + 16)
    assert lora["weights"] == 2 * p + 4 * adapters and lora["reference"] == 0
    assert lora["gradients"] == 4 * adapters and lora["optimizer"] == 8 * adapters
    tiled = S.estimate_training_memory(a, tokens_per_sequence=3, micro_batch=2, logits_tile=2)
    assert tiled["logits"] == full["logits"] // 3


@pytest.mark.parametrize(
    "bad",
    [
        {"mode": "qlora"},
        {"lora_rank": 0},
        {"dtype_bytes": 0},
        {"tokens_per_sequence": -1},
        {"micro_batch": 0},
        {"logits_tile": 0},
    ],
)
def test_training_memory_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        S.estimate_training_memory(S.CATALOGUE[0], **bad)


def test_any_decoder_has_rough_sizes():
    """Enough to bound its memory: GPT-2 and a mixture of experts have no Architecture."""
    a = S.Architecture.roughly(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=9))
    assert (a.layers, a.hidden, a.ffn, a.kv, a.vocab) == (3, 8, 32, 8, 9)
    made = config(LlamaConfig, head_dim=32)
    assert S.Architecture.roughly(made) == S.Architecture.from_config(made)
    assert S.Architecture.roughly(Qwen2MoeConfig()).layers == Qwen2MoeConfig().num_hidden_layers


# --- deciding


sizes = st.integers(1, 200)


@given(sizes, sizes, sizes, st.sampled_from([0.5, 0.8, 1.0]), st.none() | sizes, st.booleans())
def test_plan_fits_and_is_the_fewest(available, each, count, safety, maximum, must_divide):
    options = {"safety": safety, "maximum": maximum, "must_divide": must_divide}
    budget = int(safety * available)
    able = [n for n in range(1, min(count, maximum or count) + 1) if n * each <= budget]
    if not able:
        with pytest.raises(UserError, match="one sequence needs"):
            S.plan_micro_batch(available, each, count, **options)
        return
    size = S.plan_micro_batch(available, each, count, **options)
    assert size in able
    if must_divide:
        assert size == max(n for n in able if count % n == 0)
    else:
        batches = -(-count // size)
        assert batches == -(-count // max(able))  # as few as the largest size would need
        assert not any(-(-count // n) == batches for n in range(1, size))  # and the most even


def test_plan_evens_out():
    assert S.plan_micro_batch(25, 1, 32) == 16  # 20 fit: 16 and 16, not 20 and 12
    assert S.plan_micro_batch(10**9, 1, 32, maximum=5) == 5
    assert S.plan_micro_batch(10**9, 1, 32, maximum=5, must_divide=True) == 4


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((9, 0, 1), {}),
        ((9, 1, 0), {}),
        ((9, 1, 1), {"maximum": 0}),
        ((9, 1, 1), {"safety": 0}),
        ((9, 1, 1), {"safety": 1.1}),
    ],
)
def test_plan_refuses(arguments, options):
    with pytest.raises(ValueError, match="at least 1|safety"):
        S.plan_micro_batch(*arguments, **options)


def test_plan_names_budget_need_and_how_to_fix_it():
    with pytest.raises(UserError) as error:
        S.plan_micro_batch(2 * GIB, 3 * GIB, 8)
    for words in ("3.00 GiB", "1.60 GiB", "2.00 GiB", "checkpointing"):
        assert words in str(error.value)


def test_fits_keeps_a_reserve(monkeypatch):
    assert S.fits(8, 10) and not S.fits(9, 10) and S.fits(9, 10, safety=0.9)
    monkeypatch.setattr(S, "available_memory", lambda: 100)
    assert S.fits(80) and not S.fits(81)
    S.ensure_fits("it", 80)
    with pytest.raises(UserError, match="Qwen2 needs about 3.00 GiB") as error:
        S.ensure_fits("Qwen2", 3 * GIB, 2 * GIB)
    assert "2.00 GiB" in str(error.value) and "LoRA" in str(error.value)


def test_checkpointing_only_when_needed():
    policy = S.checkpointing_policy
    assert policy("on", 1, 100) and not policy("off", 1000, 100)
    assert policy("auto", 81, 100) and not policy("auto", 80, 100)
    with pytest.raises(ValueError, match="'maybe'"):
        policy("maybe")


def test_models_that_fit(monkeypatch, tmp_path):
    monkeypatch.setattr(S, "BUNDLED_MODEL", tmp_path / "model.safetensors")
    assert [row["verdict"] for row in S.models_that_fit(0)] == ["too big"] * 5
    assert {row["verdict"] for row in S.models_that_fit(10**13)} == {"full"}
    monkeypatch.setattr(S, "available_memory", lambda: 6 * GIB)
    rows = {row["name"]: row for row in S.models_that_fit()}
    assert rows["SmolLM2-135M-Instruct"]["verdict"] == "full"
    assert rows["Qwen2-0.5B-Instruct"]["verdict"] == "lora"
    assert rows["TinyLlama-1.1B-Chat"]["verdict"] == "evaluate"
    assert rows["Qwen2.5-1.5B-Instruct"]["verdict"] == "too big"
    for row in rows.values():
        assert row["parameters"] * 4 < row["evaluate_bytes"] < row["lora_bytes"] < row["full_bytes"]
    config().save_pretrained(tmp_path)
    first = S.models_that_fit()[0]  # smallest first
    assert first["name"] == "bundled" and first["parameters"] == S.count_parameters(config())


def test_rows_that_fit_grow_with_memory_and_shrink_with_length():
    rows = [S.rows_that_fit(S.CATALOGUE[2], 400, free) for free in (0, 10**8, 10**9, 10**10)]
    assert rows[0] == 1 and rows == sorted(rows) and rows[-1] > rows[1]
    assert all(row & (row - 1) == 0 for row in rows)
    assert S.rows_that_fit(S.CATALOGUE[2], 4000, 10**10) < rows[-1]
