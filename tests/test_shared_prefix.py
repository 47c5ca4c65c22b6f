"""Packed groups: the same log-probabilities and gradients as separate sequences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cpugrpo_edu.engine.blocks import norm_of
from cpugrpo_edu.engine.shared_prefix import (
    group_attention,
    group_bias,
    group_rows,
    pack_group,
    packed_log_probs,
)
from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.policy import completion_logits


def batch(rows=5, prompt=6, completion=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, 300, (rows, prompt), generator=generator)
    completions = torch.randint(3, 300, (rows, completion), generator=generator)
    prompt_mask, completion_mask = torch.ones_like(prompts), torch.ones_like(completions)
    prompts[3] = prompts[0]  # the same prompt, not neighbours
    prompts[4, 2:], prompt_mask[4, :2] = prompts[0, 2:], 0  # like it, but shorter
    completion_mask[1, 3:] = 0
    completion_mask[3, 1:] = 0
    return prompts, prompt_mask, completions, completion_mask


def separate(model, prompts, prompt_mask, completions, completion_mask, temperature):
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    logits = completion_logits(model, prompts, completions, mask, temperature)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    chosen = log_p.gather(-1, completions.unsqueeze(-1)).squeeze(-1)
    return chosen * completion_mask, entropy * completion_mask


def gradient(model, log_p):
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, log_p.numel()).view_as(log_p)
    parts = torch.autograd.grad((log_p * weights).sum(), parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in parts if g is not None])


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_separate_sequences(tiny_folder, lora_rank, temperature):
    model = load_policy(tiny_folder, lora_rank=lora_rank).model
    inputs = batch()
    ours, entropy = packed_log_probs(model, *inputs, temperature)
    expected, expected_entropy = separate(model, *inputs, temperature)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradient(model, ours), gradient(model, expected), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_products_in_bfloat16_change_little(tiny_folder, lora_rank):
    model = load_policy(tiny_folder, lora_rank=lora_rank).model
    exact, _ = packed_log_probs(model, *batch())
    rounded, _ = packed_log_probs(model, *batch(), bfloat16=True)
    assert 0 < (exact - rounded).abs().max() < 0.05
    slope, rounded_slope = gradient(model, exact), gradient(model, rounded)
    assert (rounded_slope - slope).norm() / slope.norm() < 0.1


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_weights_in_bfloat16_are_multiplied_as_they_are(tiny_folder, lora_rank):
    model = load_policy(tiny_folder, lora_rank=lora_rank, dtype="bfloat16").model
    for found, expected in zip(
        packed_log_probs(model, *batch(), bfloat16=True), packed_log_probs(model, *batch())
    ):
        torch.testing.assert_close(found, expected)


def test_a_completion_sees_the_prompt_and_itself():
    ids, positions = pack_group(
        torch.tensor([10, 11]), [torch.tensor([20, 21]), torch.tensor([30])]
    )
    bias = group_bias(2, [2, 1], torch.float32)
    assert ids.tolist() == [10, 11, 20, 21, 30]
    assert positions.tolist() == [0, 1, 2, 3, 2]
    assert (bias == 0).long().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("lengths", [[3, 5, 1], [4], [2, 0, 3], [0, 2, 0], [0, 0]])
def test_attention_in_parts_is_that_of_the_mask(lengths):
    torch.manual_seed(0)
    prompt, heads, dim = 6, 4, 8
    length = prompt + sum(lengths)
    states = [torch.randn(1, n, length, dim, requires_grad=True) for n in (heads, 2, 2)]
    bias = group_bias(prompt, lengths, torch.float32)
    expected = F.scaled_dot_product_attention(*states, attn_mask=bias, enable_gqa=True)
    found = group_attention(prompt, lengths)(*states)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape)
    slopes = [torch.autograd.grad((y * weights).sum(), states) for y in (found, expected)]
    for got, want in zip(*slopes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_norm_and_its_gradient():
    torch.manual_seed(0)
    norm = torch.nn.RMSNorm(16, eps=1e-5)
    norm.variance_epsilon = norm.eps
    norm.weight.data = torch.rand(16)
    x = torch.randn(3, 5, 16, requires_grad=True)
    g = torch.randn(3, 5, 16)
    results = [norm_of(norm)(x), F.rms_norm(x, (16,), norm.weight, 1e-5)]
    torch.testing.assert_close(*results)
    slopes = [torch.autograd.grad((y * g).sum(), (x, norm.weight)) for y in results]
    for got, want in zip(*slopes, strict=True):
        torch.testing.assert_close(got, want)


def test_rows_are_grouped_by_their_prompt():
    prompts, prompt_mask, _, _ = batch()
    assert group_rows(prompts, prompt_mask) == [[0, 3], [1], [2], [4]]


def test_computing_mlps_or_whole_layers_again_keeps_less_and_changes_no_gradient(tiny_folder):
    model = load_policy(tiny_folder, lora_rank=4).model
    inputs = batch(completion=40)

    def kept_bytes(recompute):
        kept = {}

        def count(tensor):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            packed_log_probs(model, *inputs, recompute=recompute)
        return sum(kept.values())

    plain, _ = packed_log_probs(model, *inputs)
    again, _ = packed_log_probs(model, *inputs, recompute=True)
    torch.testing.assert_close(again, plain)
    slope = gradient(model, plain)
    torch.testing.assert_close(gradient(model, again), slope)
    bytes_of_all, without_mlps = kept_bytes(False), kept_bytes(True)
    assert without_mlps < 0.8 * bytes_of_all
    model.gradient_checkpointing_enable({"use_reentrant": False})
    whole, _ = packed_log_probs(model, *inputs, recompute=True)
    torch.testing.assert_close(whole, plain)
    torch.testing.assert_close(gradient(model, whole), slope)
    assert kept_bytes(True) < 0.8 * without_mlps
