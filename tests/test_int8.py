"""INT8 from scales up: error bounds, the saturation trap, and the rollout copy."""

import copy
import warnings
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cpugrpo_edu.engine import int8 as Q
from cpugrpo_edu.errors import UserError

torch.set_num_threads(1)


def tiny(tied=True, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.05,  # logits of standard deviation 0.4: errors below are a share of it
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def with_lora(model, **options):
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **options)
    )
    for name, p in peft_model.named_parameters():
        if "lora_B" in name:  # B starts at zero: make the adapter matter
            nn.init.normal_(p, std=1.0)
    return peft_model


packed_copy = partial(Q.quantize_for_rollout, kernel="packed")


@pytest.fixture
def ids():
    return torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["kernel", "fallback"])
def engine(request, monkeypatch):
    if request.param == "fallback":
        monkeypatch.setattr(Q, "quantized_engine", lambda: "torch")
    elif Q.quantized_engine() == "torch":
        pytest.skip("this build of torch has no INT8 kernel")


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def gap(a, b):
    """Root mean square difference; the logits themselves have about 0.4."""
    return float((a - b).pow(2).mean().sqrt())


# --- from zero


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e38]),
    st.floats(-3, 3),
    st.integers(0, 2**31),
)
def test_error_is_at_most_half_a_step(rows, cols, per_channel, symmetric, size, shift, seed):
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)
    w = (w + shift).clamp(-3, 3) * size
    w[0] = 0  # a row that needs no scale at all
    q, scale, zero = Q.quantize_tensor(w, per_channel, symmetric)
    assert q.dtype == torch.int8 and q.shape == w.shape
    assert scale.shape == zero.shape == ((rows,) if per_channel else ())
    bound = scale.reshape(-1, 1) * 0.5001
    assert ((w - Q.dequantize(q, scale, zero)).abs() <= bound).all()
    assert symmetric is False or (not zero.any() and int(q.min()) >= -127)


def test_known_values():
    q, scale, zero = Q.quantize_tensor(torch.tensor([[-12.7, 0.0, 6.35], [127.0, 1.0, -2.0]]))
    assert q.tolist() == [[-127, 0, 64], [127, 1, -2]]  # 63.5 rounds to even
    assert scale.tolist() == pytest.approx([0.1, 1.0])
    q, scale, zero = Q.quantize_tensor(torch.tensor([0.0, 1.0, 255.0]), False, False)
    assert (q.tolist(), float(scale), int(zero)) == ([-128, -127, 127], 1.0, -128)


def test_asymmetric_halves_the_step_of_one_sided_weights():
    w = torch.linspace(0, 1, 256).reshape(1, -1)
    assert float(Q.quantize_tensor(w, symmetric=False)[1]) == pytest.approx(1 / 255)
    assert float(Q.quantize_tensor(w)[1]) == pytest.approx(1 / 127)


def test_zero_is_stored_exactly():
    w = torch.tensor([[0.0, 5.0, 9.0], [0.0, -7.0, -3.0]])
    assert Q.dequantize(*Q.quantize_tensor(w, symmetric=False))[:, 0].tolist() == [0, 0]


def test_per_channel_beats_per_tensor_on_outliers():
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    w[5] *= 100

    def error(per_channel):  # each row relative to its own size
        back = Q.dequantize(*Q.quantize_tensor(w, per_channel))
        return ((w - back).norm(dim=1) / w.norm(dim=1)).mean()

    assert error(True) < 0.02 < 0.3 < error(False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_weights_of_a_diverged_run(bad):
    with pytest.raises(UserError, match="NaN or infinite"):
        Q.quantize_tensor(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (4,)])
def test_refuses_shapes_without_rows(shape):
    with pytest.raises(UserError, match="shape"):
        Q.quantize_tensor(torch.ones(shape))


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20), st.sampled_from([7, 8]))
@settings(max_examples=40, deadline=None)
def test_activations_stay_in_range_and_close(values, bits):
    x = torch.tensor(values)
    q, scale, zero = Q.quantize_activations(x, bits)
    assert q.dtype == torch.uint8 and int(q.max()) < 2**bits
    # Rounding x and rounding the zero point cost up to half a step each.
    assert ((q.float() - zero) * scale - x).abs().max() <= scale * 1.001


# --- the layer


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_close_to_float(engine, per_channel, bias):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias)
    layer = Q.Int8Linear(linear.weight, linear.bias, per_channel)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        want, got = linear(x), layer(x)
    assert got.shape == (2, 5, 48)
    assert (got - want).norm() / want.norm() < 0.02
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(torch.zeros(0, 64)).shape == (0, 48)
    assert "per channel" in repr(layer) or not per_channel


def test_layer_does_not_saturate(engine):
    """Two u8 * s8 products overflow 16 bits; a kernel that lets them gives half the sum."""
    layer = Q.Int8Linear(torch.ones(16, 64))
    assert layer(torch.ones(2, 64)) == pytest.approx(torch.full((2, 16), 64.0), rel=0.01)
    layer = Q.Int8Linear(-torch.ones(16, 64))
    assert layer(torch.ones(2, 64)) == pytest.approx(torch.full((2, 16), -64.0), rel=0.01)


def test_layer_computes_with_what_it_says(engine):
    torch.manual_seed(0)
    w, b = torch.randn(16, 32), torch.randn(16)
    layer = Q.Int8Linear(w, b)
    torch.testing.assert_close(layer.dequantized(), Q.dequantize(*Q.quantize_tensor(w)))
    # Whole numbers from 0 to the largest code make the activations' scale 1, so they are exact.
    top = 255 if layer.plain or not layer.reduce_range else 127
    x = torch.randint(0, 128, (4, 32)).float()
    x[0, 0] = top
    torch.testing.assert_close(layer(x), x @ layer.dequantized().T + b, rtol=1e-4, atol=1e-3)
    assert layer.nbytes == 16 * 32 + 12 * 16 + 4 * 16


def test_bias_is_copied_not_borrowed(engine):
    bias = torch.zeros(16)
    layer = Q.Int8Linear(torch.ones(16, 8), bias)
    bias += 5
    assert layer(torch.zeros(1, 8)).abs().max() == 0


def test_gradient_through_int8_is_refused(engine):
    layer = Q.Int8Linear(torch.ones(16, 8))
    x = torch.ones(1, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(x)
    with torch.no_grad():
        layer(x)


def test_no_warning_reaches_the_learner():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Q._kernel_works.cache_clear()
        layer = Q.Int8Linear(torch.ones(16, 8))
        layer.dequantized()
        layer(torch.ones(1, 8))


def test_engine_without_working_kernel_falls_back(monkeypatch):
    assert Q.quantized_engine() in ("x86", "fbgemm", "onednn", "qnnpack", "torch")
    Q._kernel_works.cache_clear()
    monkeypatch.setattr(Q, "_linear_dynamic", lambda x, packed, reduce: torch.full((2, 16), 32.4))
    assert Q.quantized_engine() == "torch"  # it saturates
    Q._kernel_works.cache_clear()

    def missing(*_):
        raise RuntimeError("Didn't find engine for operation quantized::linear_prepack NoQEngine")

    monkeypatch.setattr(Q, "_pack", missing)
    assert Q.quantized_engine() == "torch"
    assert Q.Int8Linear(torch.ones(16, 8))(torch.ones(1, 8))[0, 0] == pytest.approx(8, rel=0.01)
    Q._kernel_works.cache_clear()


# --- the rollout copy


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_copy_is_close_and_shares(engine, ids, tied, head, per_channel):
    model = tiny(tied)
    before = copy.deepcopy(model.state_dict())
    served = packed_copy(model, per_channel=per_channel, quantize_head=head)
    p, q = (logits(m, ids).log_softmax(-1) for m in (model, served))
    assert 0 < (p - q).abs().max() < 0.1
    count = sum(isinstance(m, Q.Int8Linear) for m in served.modules())
    assert count == 2 * 7 + head
    embed, live_embed = served.get_input_embeddings(), model.get_input_embeddings()
    assert embed.weight.data_ptr() == live_embed.weight.data_ptr()
    assert not any(p.requires_grad for p in served.parameters()) and not served.training
    # The live model is untouched, and still trains.
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, Q.Int8Linear) for m in model.modules())


@pytest.mark.parametrize("kernel", ["auto", "packed", "bf16"])
def test_a_copy_is_not_saved_without_its_layers(tmp_path, kernel):
    served = Q.quantize_for_rollout(tiny(), kernel=kernel)
    with pytest.raises(UserError, match="cpugrpo export"):
        served.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    tiny().save_pretrained(tmp_path / "live")


def test_loss_of_the_copy_has_no_gradient(ids):
    served = packed_copy(tiny())
    with pytest.raises(RuntimeError, match="does not require grad"):
        served(input_ids=ids, labels=ids).loss.backward()


def test_copy_generates_like_the_original(engine, ids):
    model = tiny()
    served = packed_copy(model)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    out = served.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert out.shape == (3, 18)
    with torch.no_grad():
        full = served(input_ids=ids).logits[:, -1]
        past = served(input_ids=ids[:, :-1], use_cache=True).past_key_values
        step = served(input_ids=ids[:, -1:], past_key_values=past).logits[:, -1]
    # Not equal: one activation scale covers all tokens at hand, many or one.
    assert (full - step).abs().max() < 0.05


def test_refresh_follows_an_optimizer_step(engine, ids):
    model = tiny(tied=False)
    served = packed_copy(model, quantize_head=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    stale = gap(logits(served, ids), logits(model, ids))
    assert Q.refresh(served, model) is served
    fresh = gap(logits(served, ids), logits(model, ids))
    assert fresh < 0.05 and 3 * fresh < stale
    again = packed_copy(model, quantize_head=True)
    torch.testing.assert_close(logits(served, ids), logits(again, ids))


@pytest.mark.parametrize("kernel", ["compiled", "packed", "bf16"])
@pytest.mark.parametrize("adapted", [False, True])
def test_refresh_keeps_the_float32_biases_of_a_bfloat16_model(ids, kernel, adapted):
    """The kernel in C reads the biases as float32: bfloat16 ones would be noise to it."""
    model = tiny().bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    model = with_lora(model) if adapted else model
    served = Q.quantize_for_rollout(model, kernel=kernel)
    before = logits(served, ids)
    kept = {n: p.dtype for n, p in served.named_parameters()}
    Q.refresh(served, model)
    assert {n: p.dtype for n, p in served.named_parameters()} == kept
    torch.testing.assert_close(logits(served, ids), before)


def test_refresh_follows_replaced_storage(ids):
    model = tiny()
    served = packed_copy(model)
    other = tiny(seed=7)
    model.load_state_dict(other.state_dict(), assign=True)
    model.tie_weights()
    Q.refresh(served, model)
    assert gap(logits(served, ids), logits(other, ids)) < 0.05
    assert not any(p.requires_grad for p in served.parameters())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_lora_is_merged_and_refreshed(engine, ids, options):
    model = with_lora(tiny(), **options)
    want = logits(model, ids)
    served = packed_copy(model)
    assert type(served) is Qwen2ForCausalLM
    assert not any("lora" in name for name, _ in served.named_modules())
    assert gap(logits(served, ids), want) < 0.05
    torch.testing.assert_close(logits(model, ids), want)  # the live one is left unmerged
    with model.disable_adapter():
        without = logits(model, ids)
        assert gap(logits(packed_copy(model), ids), without) < 0.05
    assert gap(without, want) > 0.1  # so the adapter is worth merging
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.data.neg_()
    now = logits(model, ids)
    assert gap(logits(served, ids), now) > 0.1
    Q.refresh(served, model)
    assert gap(logits(served, ids), now) < 0.05
    errors = Q.quantization_report(model, served, ids)["layer_error"]
    assert len(errors) == 14 and max(errors.values()) < 0.02
    assert "model.layers.0.self_attn.q_proj" in errors


def test_lora_already_merged_counts_once(ids):
    model = with_lora(tiny())
    want = logits(model, ids)
    model.merge_adapter()
    assert gap(logits(packed_copy(model), ids), want) < 0.05


def test_checkpointing_hook_stays_with_the_live_model(ids):
    model = with_lora(tiny())
    model.enable_input_require_grads()
    live = model.get_input_embeddings()
    assert len(live._forward_hooks) == 1
    served = packed_copy(model)
    assert len(live._forward_hooks) == 1
    assert len(served.get_input_embeddings()._forward_hooks) == 0
    served(input_ids=ids)  # would raise if the embeddings still asked for a gradient


def test_a_copy_ends_with_its_last_reference(no_collection):
    model = tiny()
    model._original_forward = model.forward  # as accelerate does, in bfloat16
    model.forward = lambda *args, **kwargs: model._original_forward(*args, **kwargs)
    served = weakref.ref(packed_copy(model))
    assert served() is None


def test_prompt_tuning_and_models_without_linears_are_refused():
    from peft import PromptTuningConfig, get_peft_model

    prompt = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        num_layers=2,
        num_attention_heads=4,
        token_dim=64,
    )
    prompted = get_peft_model(tiny(), prompt)
    with pytest.raises(UserError, match="learned prompt"):
        packed_copy(prompted)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1))
    for kind, model in (("gpt2", gpt2), ("mamba", mamba)):
        with pytest.raises(UserError, match=f"INT8 copy does not work on this '{kind}' model"):
            packed_copy(model)  # layers of the one are Conv1D, weights of the other in no layer
    with pytest.raises(UserError, match=r"no torch\.nn\.Linear"):
        packed_copy(nn.Sequential(nn.Embedding(4, 4)))


# --- the report


def test_report_counts_bytes_from_tensors(ids):
    model = tiny(tied=True)
    served = packed_copy(model)
    report = Q.quantization_report(model, served, ids)
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    packed = sum(m.weight.numel() + 12 * m.out_features for m in linears)
    packed += sum(m.bias.nbytes for m in linears if m.bias is not None)
    floats = sum(p.nbytes for m in linears for p in m.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    assert report["bytes_before"] == sum(p.nbytes for p in model.parameters()) + buffers
    assert report["bytes_after"] == report["bytes_before"] - floats + packed
    assert report["bytes_extra"] == packed + buffers
    assert report["engine"] == Q.quantized_engine()


def test_report_of_quality(ids):
    model = tiny(dropout=0.5).train()
    served = packed_copy(model)
    report = Q.quantization_report(model, served, ids)
    assert model.training  # put back
    assert 0 < report["kl"] < 1e-3 and report["max_logit_error"] < 0.1
    assert report["top1_agreement"] > 0.8
    assert len(report["layer_error"]) == 14 and max(report["layer_error"].values()) < 0.02
    p, q = (logits(m, ids).log_softmax(-1) for m in (model, served))
    assert report["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    coarse = Q.quantization_report(model, packed_copy(model, per_channel=False), ids)
    assert sum(coarse["layer_error"].values()) > sum(report["layer_error"].values())


def test_report_exposes_a_wrong_copy(ids):
    """A copy of another model must look bad in every number."""
    model, served = tiny(tied=False), packed_copy(tiny(tied=False, seed=5))
    report = Q.quantization_report(model, served, ids)
    assert report["kl"] > 0.01 and report["top1_agreement"] < 0.7
    assert min(report["layer_error"].values()) > 0.5


def test_report_leaves_out_masked_tokens(ids):
    model = tiny()
    served = packed_copy(model)
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    a = Q.quantization_report(model, served, ids, mask)
    with torch.no_grad():
        p, q = (
            m(input_ids=ids, attention_mask=mask).logits[:, :6].log_softmax(-1)
            for m in (model.eval(), served)
        )
    assert a["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert a["kl"] != pytest.approx(Q.quantization_report(model, served, ids)["kl"], rel=1e-3)
