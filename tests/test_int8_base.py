"""A frozen INT8 base: the same function and gradient as its dequantized weights."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.blocks import causal_lm
from cpugrpo_edu.engine.decode import CompiledDecoder, Decoder, prefill, sample
from cpugrpo_edu.engine.fisher import estimate_fisher
from cpugrpo_edu.engine.int8 import quantized_engine
from cpugrpo_edu.engine.int8_base import (
    KERNELS,
    FrozenInt8Embedding,
    FrozenInt8Head,
    FrozenInt8Linear,
    is_frozen,
    load_frozen,
    token_log_probs,
)
from cpugrpo_edu.engine.shared_prefix import packed_log_probs
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.fisher import Example
from cpugrpo_edu.models.load import add_lora, load_policy, save_policy
from cpugrpo_edu.sample import Sampling


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param == "packed" and quantized_engine() == "torch":
        pytest.skip("this build of torch has no INT8 kernel")
    if request.param == "compiled" and not c_kernel.available():
        pytest.skip(c_kernel.library()[1])
    return request.param


def close(actual, expected, tolerance):
    """Relative error in the Frobenius norm."""
    assert ((actual - expected).norm() / expected.norm()).item() < tolerance


@pytest.mark.parametrize("bias", [False, True])
def test_product_and_gradient_are_those_of_the_dequantized_weights(kernel, bias):
    torch.manual_seed(0)
    weight, b = torch.randn(48, 64), torch.randn(48) if bias else None
    layer = FrozenInt8Linear(weight, b, kernel)
    close(layer.dequantized(), weight, 0.01)
    # rows of very different size: one scale for all would drown the small ones
    sizes = 10.0 ** torch.arange(-4, 6).float()[:, None]
    x = (torch.randn(10, 64) * sizes).requires_grad_()
    g = torch.randn(10, 48) * sizes.flip(0)
    tolerance = 1e-5 if kernel == "exact" else 0.04  # 7 bits
    y = layer(x)
    y.backward(g)
    expected = F.linear(x.detach(), layer.dequantized(), b)
    for row in range(10):
        close(y.detach()[row], expected[row], tolerance)
        close(x.grad[row], (g @ layer.dequantized())[row], tolerance)
    assert not any(p.requires_grad for p in layer.parameters())


def test_embedding_rows_and_their_weighted_sums():
    torch.manual_seed(0)
    weight = torch.randn(5000, 16)  # more than one tile
    rows = FrozenInt8Embedding(weight)
    ids = torch.tensor([[0, 4999], [4096, 7]])
    close(rows(ids), weight[ids], 0.01)
    dense = rows(torch.arange(5000))
    p = torch.rand(3, 5000)
    total = torch.zeros(3, 16)
    for tile in rows.tiles():
        rows.add_weighted_sum(total, p[:, tile], tile)
    torch.testing.assert_close(total, p @ dense, rtol=1e-4, atol=1e-3)
    rounded = torch.zeros(3, 16)
    for tile in rows.tiles():
        rows.add_weighted_sum(rounded, p[:, tile], tile, bfloat16=True)
    assert 0 < (rounded - total).norm() / total.norm() < 0.01


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probs_without_stored_logits(kernel, temperature):
    torch.manual_seed(0)
    rows = FrozenInt8Embedding(torch.randn(300, 16) * 0.3)
    head = FrozenInt8Head(rows, kernel)
    hidden = torch.randn(70, 16, requires_grad=True)  # more than one piece
    tokens = torch.randint(0, 300, (70,))
    g = torch.randn(70)
    log_p, entropy = token_log_probs(hidden, tokens, head, temperature)
    (log_p * g).sum().backward()
    dense = torch.nn.Linear(16, 300, bias=False)
    dense.weight.data = rows(torch.arange(300))
    plain = hidden.detach().clone().requires_grad_()
    expected, expected_entropy = token_log_probs(plain, tokens, dense, temperature)
    (expected * g).sum().backward()
    tolerance = 1e-4 if kernel == "exact" else 0.1
    assert (log_p - expected).abs().max() < tolerance
    assert (entropy - expected_entropy).abs().max() < tolerance
    close(hidden.grad, plain.grad, tolerance)
    assert not entropy.requires_grad
    logits = head(hidden)
    (slope,) = torch.autograd.grad(logits, hidden, torch.ones_like(logits))
    close(slope, torch.ones(70, 300) @ rows(torch.arange(300)), 1e-4 if kernel == "exact" else 0.01)


def frozen_and_float(folder, kernel, rank=4):
    """The same policy twice: on the frozen base, and on the dequantized float weights."""
    frozen = load_frozen(str(folder), AutoConfig.from_pretrained(folder), kernel)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in frozen.named_modules():
        if isinstance(module, FrozenInt8Linear):
            plain.get_submodule(name).weight.data = module.dequantized()
    rows = frozen.get_input_embeddings()
    plain.get_input_embeddings().weight.data = rows(torch.arange(rows.num_embeddings))
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
    assert (a - b).abs().max() < (1e-4 if kernel == "exact" else 0.1)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 0
    flat = [torch.cat([g.flatten() for g in each.values()]) for each in gradients]
    close(*flat, 1e-4 if kernel == "exact" else 0.1)


def test_the_reference_is_the_base_with_the_adapter_off(tiny_folder):
    frozen, _ = frozen_and_float(tiny_folder, "exact")
    inputs = batch()
    with torch.no_grad():
        with frozen.disable_adapter():
            off, _ = packed_log_probs(frozen, *inputs)
        bare = load_frozen(str(tiny_folder), AutoConfig.from_pretrained(tiny_folder), "exact")
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
    assert (log_p - sampled).abs().max() < (1e-4 if kernel == "exact" else 0.1)


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
        # the same levels but where a sum's last bit tips a rounding
        close(found[0][0], found[1][0], 2e-3)
        close(found[0][1][:, :, :, -3:], found[1][1][:, :, :, -3:], 2e-3)


def test_fisher_of_the_adapter(tiny_folder):
    frozen, plain = frozen_and_float(tiny_folder, "exact")
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
    frozen = load_frozen(str(tmp_path), AutoConfig.from_pretrained(tmp_path), kernel="exact")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        close(frozen(ids).logits, untied(ids).logits, 0.05)


def test_a_folder_without_safetensors(tiny_folder, tmp_path):
    AutoConfig.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="safetensors"):
        load_frozen(str(tmp_path), AutoConfig.from_pretrained(tmp_path))
