"""A frozen INT8 base: the same function and gradient as its dequantized weights."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cpugrpo_edu.engine import c_kernel, int8_matrix
from cpugrpo_edu.engine.blocks import causal_lm
from cpugrpo_edu.engine.decode import CompiledDecoder, Decoder, prefill, sample
from cpugrpo_edu.engine.fisher import estimate_fisher
from cpugrpo_edu.engine.int8_base import Int8Embedding, is_frozen, load_frozen, token_log_probs
from cpugrpo_edu.engine.int8_matrix import BlockInt8Linear, Int8Matrix
from cpugrpo_edu.engine.shared_prefix import packed_log_probs
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.fisher import Example
from cpugrpo_edu.models.load import add_lora, load_policy, save_policy
from cpugrpo_edu.sample import Sampling


@pytest.fixture(params=["packed", "compiled"])
def kernel(request):
    if request.param == "compiled" and not c_kernel.available():
        pytest.skip(c_kernel.library()[1])
    return request.param


@pytest.fixture(autouse=True)
def float32_products(monkeypatch):
    """Passes in float32 here: what bfloat16 costs is measured in test_int8_matrix."""
    monkeypatch.setattr(int8_matrix, "native_bfloat16", lambda: False)


def close(actual, expected, tolerance):
    """Relative error in the Frobenius norm."""
    assert ((actual - expected).norm() / expected.norm()).item() < tolerance


def test_a_frozen_base_is_not_saved_without_its_layers(tiny_folder, tmp_path):
    model = load_frozen(str(tiny_folder), AutoConfig.from_pretrained(tiny_folder))
    with pytest.raises(UserError, match="cpugrpo export"):
        model.save_pretrained(tmp_path / "base")
    add_lora(model, 2).save_pretrained(tmp_path / "adapter")  # the adapter alone is
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probs_without_stored_logits(kernel, temperature):
    torch.manual_seed(0)
    matrix = Int8Matrix(torch.randn(5000, 16) * 0.3, kernel)  # more than one tile
    hidden = torch.randn(70, 16, requires_grad=True)
    tokens = torch.randint(0, 5000, (70,))
    g = torch.randn(70)
    log_p, entropy = token_log_probs(hidden, tokens, BlockInt8Linear(matrix), temperature)
    (log_p * g).sum().backward()
    dense = torch.nn.Linear(16, 5000, bias=False)
    dense.weight.data = matrix.dequantized()
    plain = hidden.detach().clone().requires_grad_()
    expected, expected_entropy = token_log_probs(plain, tokens, dense, temperature)
    (expected * g).sum().backward()
    torch.testing.assert_close(log_p, expected, rtol=0, atol=5e-4)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=5e-4)
    close(hidden.grad, plain.grad, 1e-3)
    assert not entropy.requires_grad


def frozen_and_float(folder, kernel, rank=4):
    """The same policy twice: on the frozen base, and on the dequantized float weights."""
    frozen = load_frozen(str(folder), AutoConfig.from_pretrained(folder), kernel)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in frozen.named_modules():
        if isinstance(module, BlockInt8Linear | Int8Embedding):
            plain.get_submodule(name).weight.data = module.matrix.dequantized()
    policies = []
    for model in (frozen, plain):
        policies.append(add_lora(model, rank, seed=0))
        generator = torch.Generator().manual_seed(5)
        for name, p in policies[-1].named_parameters():
            if "lora_B" in name:  # B starts at zero: make the adapter matter
                p.data = torch.randn(p.shape, generator=generator) * 0.1
    return policies


def batch():
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(3, 300, (3, 9), generator=generator)
    completions = torch.randint(3, 300, (3, 7), generator=generator)
    prompts[1] = prompts[0]
    prompt_mask, completion_mask = torch.ones_like(prompts), torch.ones_like(completions)
    prompt_mask[2, :4] = 0
    completion_mask[1, 5:] = 0
    return prompts, prompt_mask, completions, completion_mask


def test_the_whole_policy_and_its_adapter_gradient(tiny_folder, kernel):
    frozen, plain = frozen_and_float(tiny_folder, kernel)
    inputs = batch()
    gradients = []
    for model in (frozen, plain):
        log_p, _ = packed_log_probs(model, *inputs)
        log_p.sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    with torch.no_grad():
        a, b = (packed_log_probs(model, *inputs)[0] for model in (frozen, plain))
    assert (a - b).abs().max() < 5e-4
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 0
    flat = [torch.cat([g.flatten() for g in each.values()]) for each in gradients]
    close(*flat, 1e-3)


def test_the_reference_is_the_base_with_the_adapter_off(tiny_folder):
    frozen, _ = frozen_and_float(tiny_folder, "packed")
    inputs = batch()
    with torch.no_grad():
        with frozen.disable_adapter():
            off, _ = packed_log_probs(frozen, *inputs)
        bare = load_frozen(str(tiny_folder), AutoConfig.from_pretrained(tiny_folder), "packed")
        base, _ = packed_log_probs(bare, *inputs)
        on, _ = packed_log_probs(frozen, *inputs)
    torch.testing.assert_close(off, base)
    assert (on - off).abs().max() > 1e-3


def test_rollouts_record_the_log_probs_that_training_sees(tiny_folder, kernel):
    frozen, _ = frozen_and_float(tiny_folder, kernel)
    sampling = Sampling(max_new_tokens=6, seed=1)
    [group] = sample(frozen, [[5, 6, 7]], 3, sampling, eos_ids=set(), pad_id=0)
    prompts = torch.tensor([[5, 6, 7]] * 3)
    tokens = torch.tensor([e.completion_ids for e in group.episodes])
    with torch.no_grad():
        log_p, _ = packed_log_probs(
            frozen, prompts, torch.ones_like(prompts), tokens, torch.ones_like(tokens)
        )
    sampled = torch.tensor([e.logprobs for e in group.episodes])
    assert (log_p - sampled).abs().max() < 5e-4


@pytest.mark.skipif(not c_kernel.available(), reason=c_kernel.library()[1])
@pytest.mark.parametrize("adapter", [True, False])
def test_a_token_in_c_is_that_of_torch(tiny_folder, adapter):
    """Rows with and without padding on the left, several tokens after each other."""
    model, _ = frozen_and_float(tiny_folder, "compiled")
    lm = causal_lm(model)
    prompts = [[5, 6, 7, 8, 9], [10, 11]]
    with torch.inference_mode(), nullcontext() if adapter else model.disable_adapter():
        found = []
        plain = Decoder(lm)
        assert CompiledDecoder.serves(plain)
        for decoder in (CompiledDecoder(plain), plain):
            _, lengths, cache = prefill(decoder, prompts, 0)
            cache = cache.select(torch.tensor([0, 1, 1]), cache.length + 4)
            position = lengths[torch.tensor([0, 1, 1])]
            states = []
            for token in ([3, 4, 5], [6, 7, 8], [9, 8, 7]):
                ids = torch.tensor(token)[:, None]
                valid = torch.ones(3, 1, dtype=torch.bool)
                states.append(decoder.forward(ids, position[:, None], valid, cache))
                position = position + 1
            found.append((torch.stack(states), torch.stack(cache.keys)[..., : cache.length, :]))
        assert found[0][0].abs().max() > 0.1
        close(found[0][0], found[1][0], 2e-4)
        close(found[0][1][:, :, :, -3:], found[1][1][:, :, :, -3:], 2e-4)


def test_fisher_of_the_adapter(tiny_folder):
    frozen, plain = frozen_and_float(tiny_folder, "packed")
    examples = [Example([5, 6], [7, 8, 9]), Example([5, 6, 7, 8], [9])]
    ours, expected = (estimate_fisher(m, examples, "rollout_score") for m in (frozen, plain))
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-3, atol=1e-7)


def test_load_policy_and_save_the_adapter(tiny_folder, tmp_path):
    policy = load_policy(tiny_folder, dtype="int8", lora_rank=2)
    assert is_frozen(policy.model)
    trainable = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    folder = save_policy(policy, tmp_path / "saved")
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()


def test_untied_and_sharded_weights(tiny_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    untied = copy.deepcopy(model)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    untied.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    frozen = load_frozen(str(tmp_path), AutoConfig.from_pretrained(tmp_path), kernel="packed")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        close(frozen(ids).logits, untied(ids).logits, 0.05)


def test_a_folder_without_safetensors(tiny_folder, tmp_path):
    AutoConfig.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="safetensors"):
        load_frozen(str(tmp_path), AutoConfig.from_pretrained(tmp_path))
